"""sapo.py, ratio and losses: Eq. 8, 9 and 10 and the KL estimate, term by term in plain loops."""

import math

import pytest
import torch
from plain_loops import exact, mean_of, policy_positions, read_at, segments, to_tokens

import sapo

# -------------------------------------------------------------------------------------- ratio


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "clamped"])
def test_segment_ratio_is_the_geometric_mean(batch, scale):
    """At a scale of 100 the clamp of single log-ratios to +-20 bites."""
    logp, old_logp = scale * batch.logp, scale * batch.old_logp
    ratios = []
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        ratios.append([])
        for segment in row:
            log_ratios = [(logp[b, t] - old_logp[b, t]).item() for t in segment]
            clamped = [max(-20.0, min(20.0, log_ratio)) for log_ratio in log_ratios]
            ratios[b].append(math.exp(sum(clamped) / len(segment)))
    ours = sapo.segment_ratio(logp, old_logp, batch.ends, batch.mask)
    exact(ours, to_tokens(ratios, batch.ends, batch.mask, off=1.0))


def sharing(kind, batch):
    """For each response the lists of positions that share one ratio."""
    if kind == "token":
        return [[[t] for t in row] for row in policy_positions(batch.mask)]
    if kind == "response":
        return [[row] if row else [] for row in policy_positions(batch.mask)]
    return segments(batch.ends, batch.mask)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "clamped"])
@pytest.mark.parametrize("kind", sapo.RATIOS)
def test_importance_ratio_of_every_kind(batch, kind, scale):
    """The clamp to +-20 bites at each token, and for a product at the sum of them again."""
    logp, old_logp = scale * batch.logp, scale * batch.old_logp
    expected = torch.ones(batch.mask.shape, dtype=torch.float64)
    for b, row in enumerate(sharing(kind, batch)):
        for positions in row:
            total = 0.0
            for t in positions:
                total += max(-20.0, min(20.0, (logp[b, t] - old_logp[b, t]).item()))
            if kind == "product":
                log_ratio = max(-20.0, min(20.0, total))
            else:
                log_ratio = total / len(positions)
            for t in positions:
                expected[b, t] = math.exp(log_ratio)
    exact(sapo.importance_ratio(logp, old_logp, batch.ends, batch.mask, kind), expected)


def test_each_kind_of_ratio_is_a_segment_ratio_under_its_own_cut(batch):
    logp, old_logp, mask = batch.logp, batch.old_logp, batch.mask
    whole = mask.clone()
    whole[4:] = False  # the rows below have no hole
    cuts = {
        "segment": (batch.ends, mask),
        "token": (sapo.token_ends(mask), mask),
        "response": (sapo.response_ends(whole), whole),
    }
    for kind, (ends, mask) in cuts.items():
        ours = sapo.importance_ratio(logp, old_logp, batch.ends, mask, kind)
        assert torch.equal(ours, sapo.segment_ratio(logp, old_logp, ends, mask)), kind
    default = sapo.importance_ratio(logp, old_logp, batch.ends, batch.mask)
    assert torch.equal(default, sapo.segment_ratio(logp, old_logp, batch.ends, batch.mask))


def test_a_product_is_the_product_of_the_token_ratios(batch):
    of_tokens = sapo.importance_ratio(
        batch.logp, batch.old_logp, batch.ends, batch.mask, kind="token"
    )
    products = []
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        products.append([math.prod(of_tokens[b, segment].tolist()) for segment in row])
    ours = sapo.importance_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask, "product")
    exact(ours, to_tokens(products, batch.ends, batch.mask, off=1.0))


def test_a_hole_does_not_part_the_response_of_a_response_ratio():
    """Nor does an end that stands in it; for the other kinds it does."""
    mask = torch.tensor([[True, True, False, True]])
    logp, nothing = torch.tensor([[0.1, 0.2, 9.0, 0.6]]), torch.zeros(1, 4)
    for ends in (mask, ~mask, torch.zeros_like(mask)):
        ratio = sapo.importance_ratio(logp, nothing, ends, mask, "response")
        torch.testing.assert_close(ratio[mask], torch.full((3,), math.exp(0.3)))
        assert ratio[0, 2] == 1


@pytest.mark.parametrize("kind", ["word", "", None])
def test_an_unknown_kind_of_ratio_is_refused_with_the_known_ones(batch, kind):
    said = f"^ratio: {kind!r}, expected one of segment, token, response, product$"
    with pytest.raises(ValueError, match=said):
        sapo.importance_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask, kind)


def test_approx_kl_token_by_token(batch):
    terms = []
    for b, row in enumerate(policy_positions(batch.mask)):
        log_ratios = [(batch.logp[b, t] - batch.old_logp[b, t]).item() for t in row]
        terms.append([math.exp(d) - 1 - d for d in log_ratios])
    ours = sapo.approx_kl(batch.logp, batch.old_logp, batch.mask)
    assert ours == pytest.approx(mean_of(terms, "token"))


def test_approx_kl_of_no_token_is_zero(batch):
    assert sapo.approx_kl(batch.logp, batch.old_logp, torch.zeros_like(batch.mask)) == 0


def test_approx_kl_clamps_log_ratios_too():
    """e^d of a token that was nearly impossible would be infinite."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    kl = sapo.approx_kl(torch.zeros(1, 1), torch.full((1, 1), -1e4), mask)
    assert kl == pytest.approx(math.exp(20) - 21)


# -------------------------------------------------------------------------------- policy loss


def objective_of(ratio, advantage, low, high, dual_clip):
    """(objective of one token, is it clipped?), as Eq. 9 and the dual clip say."""
    plain = ratio * advantage
    clipped = min(max(ratio, 1 - low), 1 + high) * advantage
    objective = min(plain, clipped)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return objective, clipped < plain


@pytest.mark.parametrize("average", ["response", "token"])
@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.1, 0.1)])
def test_policy_loss_term_by_term(batch, average, dual_clip, low, high):
    objectives, clipped = [], []
    for b, row in enumerate(policy_positions(batch.mask)):
        terms = []
        for t in row:
            ratio, advantage = batch.ratio[b, t].item(), batch.advantages[b, t].item()
            terms.append(objective_of(ratio, advantage, low, high, dual_clip))
        objectives.append([objective for objective, _ in terms])
        clipped.append([float(is_clipped) for _, is_clipped in terms])
    loss, stats = sapo.policy_loss(
        batch.ratio, batch.advantages, batch.mask, low, high, dual_clip, average
    )
    assert loss.item() == pytest.approx(-mean_of(objectives, average), abs=1e-12)
    assert stats["clip_fraction"] == pytest.approx(mean_of(clipped, "token"))


# --------------------------------------------------------------------------------- value loss


def error_of(value, old_value, the_return, value_clip):
    """(squared error of one segment, is it that of the clipped value?)"""
    plain = (value - the_return) ** 2
    if value_clip is None:
        return plain, False
    near_old = min(max(value, old_value - value_clip), old_value + value_clip)
    clipped = (near_old - the_return) ** 2
    return max(plain, clipped), clipped > plain


@pytest.mark.parametrize("average", ["response", "token"])
@pytest.mark.parametrize("value_clip", [None, 0.5])
@pytest.mark.parametrize("value_at", ["start", "end"])
def test_value_loss_term_by_term(batch, average, value_clip, value_at):
    errors, clipped = [], []
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        terms = []
        for segment in row:
            t = read_at(segment, value_at)
            value, old_value = batch.values[b, t].item(), batch.old_values[b, t].item()
            terms.append(error_of(value, old_value, batch.returns[b, t].item(), value_clip))
        errors.append([error for error, _ in terms])
        clipped.append([float(is_clipped) for _, is_clipped in terms])
    loss, stats = sapo.value_loss(
        batch.values,
        batch.returns,
        batch.ends,
        batch.mask,
        value_at,
        batch.old_values,
        value_clip,
        average,
    )
    assert loss.item() == pytest.approx(mean_of(errors, average))
    assert stats["value_clip_fraction"] == pytest.approx(mean_of(clipped, "token"))


def test_old_values_are_checked_even_where_no_clip_reads_them():
    x = torch.zeros(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    for wrong in (x[:1], torch.full_like(x, math.nan)):
        with pytest.raises(ValueError, match=r"^old_values\b"):
            sapo.value_loss(x, x, mask, mask, old_values=wrong)
    assert sapo.value_loss(x, x, mask, mask, old_values=x + 1)[0] == 0


def test_without_options_the_clip_is_the_papers():
    """1 +- 0.2: a bad token counts as if it had kept 0.8, a good one as if it had reached 1.2."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio, advantages = torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, 1.0]])
    loss, stats = sapo.policy_loss(ratio, advantages, mask)
    assert loss.item() == pytest.approx(-(1.2 - 0.8) / 2) and stats["clip_fraction"] == 1


def test_a_clip_of_zero_is_a_clip():
    """Then nothing is won by moving at all."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio = torch.tensor([[1.1, 0.9]])
    advantages = torch.tensor([[1.0, -1.0]])
    loss, stats = sapo.policy_loss(ratio, advantages, mask, clip_low=0.0, clip_high=0.0)
    assert loss == 0 and stats["clip_fraction"] == 1
