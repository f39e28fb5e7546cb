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
