"""What must hold for every input, I: cuts and advantages. The paper's identities as properties.

Each test's first line says its identity in the paper's terms. SAPO_EXAMPLES=1000 looks harder. Part
II is test_properties_losses.py (ratio and losses), part III test_properties_end_to_end.py (padding,
order and the split into parts do not matter).
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_loops import always_ends, exact, policy_positions, read_at, segments, top_positions
from strategies import (
    batches,
    cuts,
    discounts,
    masks,
    numbers,
    shares,
    tensors,
    value_places,
)
from torch.testing import assert_close

import sapo

# ----------------------------------------------------------------- the cut (Eq. 5 and Eq. 11)


@given(st.data(), masks(), shares)
def test_entropy_cut_has_the_promised_number_of_ends(data, mask, top_k):
    """max(1, ceil(k n)) tokens of highest entropy end a segment, and the always-ends do."""
    coarse = st.integers(0, 5).map(float)  # so that ties are common
    entropy = data.draw(tensors(*mask.shape, coarse))
    ends, always = sapo.entropy_ends(entropy, mask, top_k), always_ends(mask)
    for b, policy in enumerate(policy_positions(mask)):
        expected = {*top_positions(policy, entropy[b], top_k), *always[b]}
        assert set(ends[b].nonzero()[:, 0].tolist()) == expected


def stretched(entropy):
    return 3 * entropy - 7


def cubed(entropy):
    return entropy**3 + entropy


@pytest.mark.parametrize("increasing", [torch.exp, torch.atan, stretched, cubed])
@given(data=st.data(), mask=masks(), top_k=shares)
def test_entropy_cut_knows_only_the_order_of_the_entropies(increasing, data, mask, top_k):
    """A strictly increasing function of H_t (of all H_t alike) leaves the cut where it is."""
    eighths = st.integers(0, 40).map(lambda n: n / 8)  # far enough apart to stay distinct
    entropy = data.draw(tensors(*mask.shape, eighths))
    expected = sapo.entropy_ends(entropy, mask, top_k)
    assert torch.equal(sapo.entropy_ends(increasing(entropy), mask, top_k), expected)


@given(batches("entropy"), shares, shares)
def test_entropy_cut_refines_as_top_k_grows(batch, one_share, other_share):
    """Every end at k% is an end at more than k%: a larger share splits segments, it moves none of
    their ends."""
    smaller, larger = sorted((one_share, other_share))
    coarse = sapo.entropy_ends(batch.entropy, batch.mask, smaller)
    fine = sapo.entropy_ends(batch.entropy, batch.mask, larger)
    assert not (coarse & ~fine).any()


@given(batches("entropy", "other_future"), numbers, st.integers(1, 7))
def test_threshold_cut_is_causal(batch, threshold, t):
    """Whether y_t ends a segment depends on H_t alone: what comes later may change, the cut up to
    there does not."""
    is_past = torch.arange(batch.mask.shape[1]) < t
    changed = torch.where(is_past, batch.entropy, batch.other_future)
    ends = sapo.threshold_ends(batch.entropy, batch.mask, threshold)
    ends_with_other_future = sapo.threshold_ends(changed, batch.mask, threshold)
    assert torch.equal(ends[:, :t], ends_with_other_future[:, :t])


CALM = torch.tensor([[1.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
AGITATED_LATER = torch.tensor([[1.0, 2.0, 1.0, 9.0, 9.0, 0.0]])
SIX_TOKENS = torch.ones(1, 6, dtype=torch.bool)


def test_entropy_cut_is_not_causal():
    """The paper's cut ranks the whole response: a later token's entropy moves an earlier end."""
    calm = sapo.entropy_ends(CALM, SIX_TOKENS)
    agitated = sapo.entropy_ends(AGITATED_LATER, SIX_TOKENS)
    assert not torch.equal(calm[:, :3], agitated[:, :3])


def test_threshold_cut_stays_where_the_entropy_cut_moves():
    calm = sapo.threshold_ends(CALM, SIX_TOKENS, 1.5)
    agitated = sapo.threshold_ends(AGITATED_LATER, SIX_TOKENS, 1.5)
    assert torch.equal(calm[:, :3], agitated[:, :3])


@given(batches("entropy"), shares)
def test_entropy_quantile_cuts_the_promised_share(batch, top_k):
    """Of N policy tokens ceil(k N) exceed the quantile; with ties fewer, but never more."""
    assume(batch.mask.any())
    entropies = batch.entropy[batch.mask]
    threshold = sapo.entropy_quantile(batch.entropy, batch.mask, top_k)
    exceeding = (entropies > threshold).sum().item()
    wanted = math.ceil(top_k * len(entropies) - 1e-9)
    has_ties = len(entropies.unique()) < len(entropies)
    assert exceeding == wanted or (has_ties and exceeding < wanted)


@given(batches("entropy"), st.data(), shares)
def test_every_cut_closes_a_response_and_stays_on_the_mask(batch, data, top_k):
    """e_M = T (Eq. 5): the last policy token, and the last one before a hole, end a segment under
    every cut."""
    mask = batch.mask
    is_delimiter = data.draw(tensors(*mask.shape, st.booleans()))
    always = sapo.response_ends(mask)
    for ends in (
        sapo.entropy_ends(batch.entropy, mask, top_k),
        sapo.threshold_ends(batch.entropy, mask, 0.5),
        sapo.delimiter_ends(is_delimiter, mask),
        sapo.low_prob_ends(batch.entropy, mask),
        sapo.token_ends(mask),
    ):
        assert ends.dtype == torch.bool
        assert not (ends & ~mask).any()
        assert not (always & ~ends).any()


@given(batches())
def test_segments_part_the_response(batch):
    """y = z_1 || ... || z_M (Eq. 5): numbered from 0 in the order of the text, the number grows by
    one after an end."""
    index = sapo.segment_index(batch.ends)
    assert (index[:, 0] == 0).all()
    assert torch.equal(index.diff(dim=1), batch.ends[:, :-1].long())


@given(batches("x"))
def test_segment_mean_is_a_projection(batch):
    """A segment's mean is constant on it: averaging again changes nothing, and the response's sum
    is kept."""
    mean = sapo.segment_mean(batch.x, batch.ends, batch.mask)
    exact(sapo.segment_mean(mean, batch.ends, batch.mask), mean)
    exact(mean.sum(1), (batch.x * batch.mask).sum(1))


@given(batches("x"))
def test_segment_sum_is_the_mean_times_the_length(batch):
    mean = sapo.segment_mean(batch.x, batch.ends, batch.mask)
    length = sapo.segment_sum(batch.mask, batch.ends, batch.mask)
    exact(sapo.segment_sum(batch.x, batch.ends, batch.mask), mean * length)


# ------------------------------------------------------------------- advantages (Eq. 6 and 7)


def gae(batch, gamma, lam, value_at="start"):
    """(advantages, returns) of a batch with rewards, values and a cut."""
    return sapo.segment_gae(
        batch.rewards, batch.values, batch.ends, batch.mask, gamma, lam, value_at
    )


@given(batches("rewards", "values", cut="token", holes=False), discounts, discounts, value_places)
def test_one_token_per_segment_is_ppo(batch, gamma, lam, value_at):
    """SAPO with one token per segment *is* PPO: segment GAE is token GAE (Eq. 4), wherever V is
    read."""
    advantages, _ = gae(batch, gamma, lam, value_at)
    expected = torch.zeros_like(batch.values)
    for b, length in enumerate(batch.mask.sum(1).tolist()):
        advantage = next_value = 0.0
        for t in reversed(range(length)):
            delta = batch.rewards[b, t] + gamma * next_value - batch.values[b, t]
            advantage = delta + gamma * lam * advantage
            next_value = batch.values[b, t]
            expected[b, t] = advantage
    exact(advantages, expected)


@given(batches("rewards", "values", cut="response", holes=False), discounts, discounts)
def test_one_segment_gives_return_minus_value(batch, gamma, lam):
    """With M = 1, A = R - V(s_1) for every lambda and gamma: a sequence-level method with a critic
    for baseline."""
    advantages, returns = gae(batch, gamma, lam)
    total = (batch.rewards * batch.mask).sum(1, keepdim=True)
    exact(advantages, torch.where(batch.mask, total - batch.values[:, :1], 0.0))
    exact(returns, torch.where(batch.mask, total, 0.0))


@given(batches("rewards", "values"), value_places)
def test_lambda_one_telescopes(batch, value_at):
    """With gamma = lambda = 1 the deltas telescope: A_m = (rewards from z_m on) - V(s_m), and R_m
    is that sum."""
    advantages, returns = gae(batch, 1.0, 1.0, value_at)
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        for m, segment in enumerate(row):
            to_go = sum(batch.rewards[b, later].sum() for later in row[m:])
            value = batch.values[b, read_at(segment, value_at)]
            exact(returns[b, segment], to_go.expand(len(segment)))
            exact(advantages[b, segment], (to_go - value).expand(len(segment)))


@given(batches("rewards", "values"), discounts, value_places)
def test_lambda_zero_gives_the_td_error(batch, gamma, value_at):
    """With lambda = 0, A_m = delta_m = r_m + gamma V(s_{m+1}) - V(s_m), where V after the last
    segment is 0."""
    advantages, _ = gae(batch, gamma, 0.0, value_at)
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        values = [batch.values[b, read_at(segment, value_at)] for segment in row] + [0.0]
        for m, segment in enumerate(row):
            delta = batch.rewards[b, segment].sum() + gamma * values[m + 1] - values[m]
            exact(advantages[b, segment], delta.expand(len(segment)))


@given(batches("rewards", "more", "values"), discounts, discounts, value_places, numbers)
def test_advantages_are_linear_in_the_rewards(batch, gamma, lam, value_at, factor):
    """A(r + c r', V) = A(r, 0) + A(0, V) + c A(r', 0): Eq. 6 and 7 are linear."""

    def advantages(rewards, values):
        return sapo.segment_gae(rewards, values, batch.ends, batch.mask, gamma, lam, value_at)[0]

    nothing = torch.zeros_like(batch.values)
    of_rewards, of_values = advantages(batch.rewards, nothing), advantages(nothing, batch.values)
    of_more = factor * advantages(batch.more, nothing)
    together = advantages(batch.rewards + factor * batch.more, batch.values)
    exact(together, of_rewards + of_values + of_more)


@given(batches("rewards", "values"), discounts, discounts, value_places)
def test_returns_are_advantages_plus_values(batch, gamma, lam, value_at):
    """R_m = A_m + V(s_m) (Eq. 7)."""
    advantages, returns = gae(batch, gamma, lam, value_at)
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        for segment in row:
            value = batch.values[b, read_at(segment, value_at)]
            expected = advantages[b, segment[0]] + value
            exact(returns[b, segment], expected.expand(len(segment)))


@given(batches("rewards", "values"), discounts, discounts, value_places)
def test_every_token_of_a_segment_gets_its_advantage(batch, gamma, lam, value_at):
    """And nothing off the mask does."""
    advantages, returns = gae(batch, gamma, lam, value_at)
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        for segment in row:
            assert len(advantages[b, segment].unique()) == 1
            assert len(returns[b, segment].unique()) == 1
    assert not advantages[~batch.mask].any()
    assert not returns[~batch.mask].any()


@given(batches("rewards", "values"), st.data())
def test_with_lambda_one_later_cuts_do_not_matter(batch, data):
    """With gamma = lambda = 1 a segment's advantage is blind to how the rest of the response is
    cut."""
    t = data.draw(st.integers(0, batch.mask.shape[1] - 1))
    rows = batch.mask[:, t]  # in these a segment ends at t, under both cuts
    batch.ends[:, t] = rows
    other_ends = data.draw(cuts(batch.mask))
    other_ends[:, : t + 1] = batch.ends[:, : t + 1]
    advantages, _ = gae(batch, 1.0, 1.0)
    batch.ends = other_ends
    advantages_of_other_cut, _ = gae(batch, 1.0, 1.0)
    exact(advantages[rows, : t + 1], advantages_of_other_cut[rows, : t + 1])


@given(batches("x"), st.floats(0.5, 3), numbers)
def test_whitening(batch, scale, shift):
    """Zero mean and unit variance over the mask, blind to the scale and the origin of x."""
    assume(batch.mask.sum() > 1 and batch.x[batch.mask].std() > 0.1)  # else the 1e-8 is felt
    white = sapo.whiten(batch.x, batch.mask)
    assert white[batch.mask].mean().abs() < 1e-9
    assert white[batch.mask].std().item() == pytest.approx(1, abs=1e-5)
    assert_close(sapo.whiten(scale * batch.x + shift, batch.mask), white, rtol=1e-5, atol=1e-5)


@given(batches("x"))
def test_whitening_is_finite_and_zero_off_the_mask(batch):
    white = sapo.whiten(batch.x, batch.mask)
    assert white.isfinite().all()
    assert not white[~batch.mask].any()


@given(masks(), st.floats(-1e30, 1e30))
def test_whitening_nothing_gives_zeros(mask, level):
    """No spread, no advantage: equal tokens, a single one or none give zeros, never NaN."""
    assert not sapo.whiten(torch.full(mask.shape, level, dtype=torch.float64), mask).any()
