"""What must hold for every input, II: ratio and losses. The paper's identities as properties.

Each test's first line says its identity in the paper's terms. SAPO_EXAMPLES=1000 looks harder.
"""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from plain_loops import exact, read_at, segments
from strategies import averages, batches, cuts, numbers, seeds, value_places
from torch.testing import assert_close

import sapo

# -------------------------------------------------------------------- ratio (Eq. 8 and 19-26)


@given(batches("logp"))
def test_ratio_is_one_on_policy(batch):
    """pi = pi_old: every segment's ratio is exactly 1, on the mask and off it."""
    assert (sapo.segment_ratio(batch.logp, batch.logp.clone(), batch.ends, batch.mask) == 1).all()


@given(batches("logp", "old_logp", cut="token"))
def test_one_token_per_segment_gives_the_token_ratio(batch):
    """SAPO with one token per segment *is* PPO: the segment ratio (Eq. 8) is the token ratio
    (Eq. 2)."""
    ratio = sapo.segment_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask)
    token_ratio = (batch.logp - batch.old_logp).exp()
    exact(ratio[batch.mask], token_ratio[batch.mask])


@given(batches("old_logp", "shift"), st.data())
def test_ratio_is_invariant_to_splitting_a_segment_of_equal_log_ratios(batch, data):
    """Where a segment's tokens have equal log-ratios, the geometric mean is theirs: a further cut
    changes nothing."""
    logp = batch.old_logp + sapo.segment_mean(batch.shift, batch.ends, batch.mask)
    finer = batch.ends | data.draw(cuts(batch.mask))
    exact(
        sapo.segment_ratio(logp, batch.old_logp, finer, batch.mask),
        sapo.segment_ratio(logp, batch.old_logp, batch.ends, batch.mask),
    )


@given(batches("logp", "old_logp"))
def test_ratio_is_a_geometric_mean(batch):
    """Its power |z_m| is the product of the token ratios, and it lies between the least and the
    greatest of them."""
    ratio = sapo.segment_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask)
    token_ratio = (batch.logp - batch.old_logp).exp()
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        for segment in row:
            ratios, length = token_ratio[b, segment], len(segment)
            assert_close(ratio[b, segment] ** length, ratios.prod().expand(length))
            assert ratios.min() - 1e-9 <= ratio[b, segment[0]] <= ratios.max() + 1e-9


@given(batches("logp", "old_logp"))
def test_ratio_of_the_reverse_is_the_reciprocal(batch):
    """Swapping pi and pi_old inverts every ratio."""
    there = sapo.segment_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask)
    back = sapo.segment_ratio(batch.old_logp, batch.logp, batch.ends, batch.mask)
    exact(there * back, torch.ones_like(there))


@given(st.lists(st.floats(-0.5, 0.5, allow_subnormal=False), min_size=1, max_size=12))
def test_bias_of_the_geometric_mean_is_bounded(log_ratios):
    """|R - R~| <= e^(L |mu|) (L - 1) |mu| (Eq. 26): R the product of a segment's token ratios, R~
    the segment ratio."""
    log_ratio = torch.tensor([log_ratios], dtype=torch.float64)
    mask, length = torch.ones_like(log_ratio, dtype=torch.bool), len(log_ratios)
    ends = sapo.response_ends(mask)
    ratio = sapo.segment_ratio(log_ratio, torch.zeros_like(log_ratio), ends, mask)[0, 0].item()
    size = abs(log_ratio.mean().item())  # |mu|
    bound = math.exp(length * size) * (length - 1) * size
    assert abs(log_ratio.sum().exp().item() - ratio) <= bound * (1 + 1e-9) + 1e-12


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.data())
def test_mean_of_approx_kl_is_the_exact_kl(counts, data):
    """E under pi_old of e^d - 1 - d is KL(pi_old || pi): on tokens in pi_old's proportions it is
    that very number."""
    flat = data.draw(st.lists(numbers, min_size=len(counts), max_size=len(counts)))
    log_new = torch.tensor(flat, dtype=torch.float64).log_softmax(0)
    log_old = (torch.tensor(counts).double() / sum(counts)).log()
    vocabulary = torch.arange(len(counts))
    tokens = vocabulary.repeat_interleave(torch.tensor(counts))[None]  # token v stands n_v times
    mask = torch.ones_like(tokens, dtype=torch.bool)
    estimate = sapo.approx_kl(log_new[tokens], log_old[tokens], mask)
    expected = (log_old.exp() * (log_old - log_new)).sum().item()
    assert estimate == pytest.approx(expected, abs=1e-9)


@given(batches("logp", "old_logp"))
def test_approx_kl_is_never_negative(batch):
    """Every single term e^d - 1 - d is >= 0, and 0 only at pi = pi_old: the estimate's sign is
    never wrong."""
    differences = (batch.logp - batch.old_logp)[batch.mask].abs()
    largest = differences.max().item() if batch.mask.any() else 0.0
    kl = sapo.approx_kl(batch.logp, batch.old_logp, batch.mask)
    assert kl >= 0
    assert kl > 0 or largest < 1e-6
    assert sapo.approx_kl(batch.logp, batch.logp, batch.mask) == 0


# --------------------------------------------------------------------- losses (Eq. 9, 10, 13)


@given(batches("log_ratio", "advantages"), averages)
def test_clipped_objective_is_a_lower_bound(batch, average):
    """min(ratio A, clip(ratio) A) <= ratio A for either sign of A: clipping only takes hope away.
    The dual clip gives some back."""

    def objective(**options):
        ratio = batch.log_ratio.exp()
        loss, _ = sapo.policy_loss(ratio, batch.advantages, batch.mask, average=average, **options)
        return -loss.item()

    clipped = objective()
    assert clipped <= objective(clip_low=99, clip_high=99) + 1e-9
    assert clipped <= objective(dual_clip=1.5) + 1e-9


@given(st.floats(0.01, 9), numbers)
@example(5.0, -1.0)  # A < 0 far above the clip: the objective must keep falling
@example(5.0, 1.0)
@example(0.1, -1.0)
@example(0.1, 1.0)
def test_clip_stops_only_the_rewarding_direction(ratio, advantage):
    """A > 0: the ratio is capped at 1 + eps; A < 0: floored at 1 - eps. In the other direction the
    objective follows ratio A."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    ratios = torch.full((1, 1), ratio, dtype=torch.float64)
    advantages = torch.full((1, 1), advantage, dtype=torch.float64)
    loss, stats = sapo.policy_loss(ratios, advantages, mask, 0.2, 0.28)
    counted_ratio = min(ratio, 1.28) if advantage > 0 else max(ratio, 0.8)
    assert loss.item() == pytest.approx(-counted_ratio * advantage)
    assert stats["clip_fraction"] == (counted_ratio != ratio and advantage != 0)


def gradient_by_equation_13(batch, advantages, score, average):
    """J's gradient by the logits, from `score` (B, T, V), the gradient of each token's log pi."""
    gradient = torch.zeros_like(score)
    lengths = batch.mask.sum(1).tolist()
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        tokens = len(lengths) * lengths[b] if average == "response" else sum(lengths)
        for segment in row:
            pull = advantages[b, segment[0]] / len(segment) / tokens
            for _ in segment:  # each of the segment's tokens pulls at all of them
                gradient[b, segment] += pull * score[b, segment]
    return gradient


@given(batches("advantages"), averages, seeds)
def test_gradient_at_ratio_one_is_equation_13(batch, average, seed):
    """grad J = sum over t of ratio_m A_m (1/|z_m|) sum over i in z_m of grad log pi(y_i) (Eq. 13):
    by autograd and by the formula."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch.mask.shape, 5, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    tokens = torch.randint(5, batch.mask.shape, generator=generator)
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    advantages = sapo.segment_mean(batch.advantages, batch.ends, batch.mask)  # one per segment
    ratio = sapo.segment_ratio(logp, logp.detach(), batch.ends, batch.mask)
    loss, _ = sapo.policy_loss(ratio, advantages, batch.mask, average=average)
    loss.backward()

    one_hot = torch.nn.functional.one_hot(tokens, 5)
    score = one_hot - logits.detach().softmax(-1)  # grad log pi of a categorical distribution
    exact(-logits.grad, gradient_by_equation_13(batch, advantages, score, average))


@given(batches("values", "returns", "old_values"), value_places, averages, st.floats(0.01, 2))
def test_value_clip_only_adds_loss(batch, value_at, average, value_clip):
    """The clipped loss is the larger of two errors: never below Eq. 10, and equal to it for a
    critic that stayed."""

    def loss(old_values, clip):
        return sapo.value_loss(
            batch.values,
            batch.returns,
            batch.ends,
            batch.mask,
            value_at,
            old_values,
            clip,
            average,
        )[0]

    assert loss(batch.old_values, value_clip) >= loss(None, None) - 1e-12
    exact(loss(batch.values, value_clip), loss(None, None))


@given(batches("rewards", "values"), value_places, averages)
def test_value_loss_is_zero_exactly_at_the_returns(batch, value_at, average):
    """Eq. 10 is 0 where V(s_m) = R_m, whatever V is at positions nobody reads."""
    _, returns = sapo.segment_gae(
        batch.rewards, batch.values, batch.ends, batch.mask, value_at=value_at
    )
    perfect = batch.values.clone()
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        for segment in row:
            perfect[b, read_at(segment, value_at)] = returns[b, segment[0]]
    loss, _ = sapo.value_loss(perfect, returns, batch.ends, batch.mask, value_at, average=average)
    assert loss == 0
