"""baselines.py: GRPO's advantages within a group, and SRPO's weights of a response's roles."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from plain_loops import policy_positions
from strategies import batches
from torch.testing import assert_close

import baselines
import sapo
from sapo import Rollout, SAPOConfig

# Three decimals: no meaningless magnitudes
rewards_of_responses = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))
rollouts = batches("logp", "old_logp", "rewards")

# ----------------------------------------------------------------------- rewards of responses


@given(rollouts)
def test_response_rewards_are_sums(batch):
    """Over all policy tokens, however the response is cut; an empty response has 0."""
    rollout = Rollout(batch.mask, batch.ends, batch.logp, batch.rewards)
    expected = (batch.rewards * batch.mask).sum(1)
    assert_close(baselines.response_rewards(rollout, SAPOConfig()), expected)


@given(rollouts)
def test_the_kl_penalty_comes_off_the_response_rewards(batch):
    mask = batch.mask
    rollout = Rollout(
        mask, sapo.response_ends(mask), batch.logp, batch.rewards, ref_logp=batch.old_logp
    )
    log_ratio = ((batch.logp - batch.old_logp) * mask).sum(1)
    expected = (batch.rewards * mask).sum(1) - 0.1 * log_ratio
    assert_close(baselines.response_rewards(rollout, SAPOConfig(kl_coef=0.1)), expected)


# -------------------------------------------------------------------------- GRPO's advantages


@st.composite
def groups(draw):
    """(rewards (B,) float64, group), with B a multiple of the group."""
    group = draw(st.integers(2, 6))
    B = group * draw(st.integers(1, 4))
    rewards = draw(st.lists(rewards_of_responses, min_size=B, max_size=B))
    return torch.tensor(rewards, dtype=torch.float64), group


def group_advantages_by_loops(rewards, group):
    """The formula, with Bessel's correction, one number at a time."""
    advantages = []
    for first in range(0, len(rewards), group):
        part = rewards[first : first + group]
        mean = sum(part) / group
        std = math.sqrt(sum((reward - mean) ** 2 for reward in part) / (group - 1))
        advantages += [(reward - mean) / (std + 1e-6) for reward in part]
    return torch.tensor(advantages, dtype=torch.float64)


@given(groups())
def test_group_advantages_against_loops(batch):
    rewards, group = batch
    expected = group_advantages_by_loops(rewards.tolist(), group)
    assert_close(baselines.group_advantages(rewards, group), expected, rtol=1e-6, atol=1e-6)


@given(groups())
def test_group_advantages_leave_the_rewards_alone(batch):
    rewards, group = batch
    copy = rewards.clone()
    baselines.group_advantages(rewards, group)
    assert torch.equal(rewards, copy)


def test_group_advantages_by_hand():
    """One right answer of four: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4, so 3/2 and three times
    -1/2."""
    advantages = baselines.group_advantages(torch.tensor([0.0, 1.0, 0.0, 0.0]), 4)
    assert_close(advantages, torch.tensor([-0.5, 1.5, -0.5, -0.5]), rtol=1e-5, atol=1e-5)


@given(groups())
def test_each_group_has_zero_mean_and_at_most_unit_spread(batch):
    rewards, group = batch
    grouped = baselines.group_advantages(rewards, group).view(-1, group)
    assert grouped.mean(1).abs().max() <= 1e-6
    assert grouped.std(1).max() <= 1 + 1e-9


@given(groups(), st.floats(0.1, 50), st.floats(-50, 50))
def test_scale_and_shift_change_nothing(batch, scale, shift):
    """Where the spread is far above the epsilon of 1e-6."""
    rewards, group = batch
    assume((rewards.view(-1, group).std(1) > 0.01).all())
    changed = baselines.group_advantages(scale * rewards + shift, group)
    assert_close(changed, baselines.group_advantages(rewards, group), rtol=2e-3, atol=1e-6)


@given(groups(), st.data())
def test_groups_know_nothing_of_each_other(batch, data):
    rewards, group = batch
    other_rewards = data.draw(st.lists(rewards_of_responses, min_size=group, max_size=group))
    changed = rewards.clone()
    changed[:group] = torch.tensor(other_rewards, dtype=torch.float64)
    advantages = baselines.group_advantages(rewards, group)
    assert torch.equal(baselines.group_advantages(changed, group)[group:], advantages[group:])


@given(
    st.integers(2, 9),
    st.integers(1, 3),
    rewards_of_responses,
    st.sampled_from([torch.float32, torch.float64]),
)
# The mean of three equal numbers can differ from them by one unit in the last place, which the
# epsilon then blows up: advantages of 61 and 0.03 came out of these two
@example(3, 1, 1000.1, torch.float32)
@example(7, 2, 0.3, torch.float32)
def test_equal_rewards_give_exact_zeros(group, count, reward, dtype):
    rewards = torch.full((group * count,), reward, dtype=dtype)
    assert torch.equal(baselines.group_advantages(rewards, group), torch.zeros_like(rewards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_advantages_keep_the_dtype(dtype):
    rewards = torch.tensor([0, 1, 1, 0], dtype=dtype)
    assert baselines.group_advantages(rewards, 2).dtype == dtype


@pytest.mark.parametrize(
    ("shape", "group"),
    [((6,), 4), ((6,), 1), ((6,), 0), ((6,), -2), ((3, 2), 2), ((), 2), ((0,), 2)],
)
def test_what_cannot_be_grouped_is_refused(shape, group):
    with pytest.raises(ValueError, match=f"group: {group}"):
        baselines.group_advantages(torch.zeros(shape), group)


# --------------------------------------------------------------------------------------- SRPO

signals = batches("signal").map(lambda batch: (batch.signal, batch.mask))


@given(signals, st.floats(0.05, 100))
def test_role_weights_are_positive_of_mean_one(batch, temperature):
    signal, mask = batch
    weights = baselines.role_weights(signal, mask, temperature)
    assert (weights[mask] > 0).all()
    assert (weights[~mask] == 0).all()
    assert_close(weights.sum(1), mask.sum(1).to(weights.dtype))


@given(signals, st.floats(0.05, 100))
def test_role_weights_keep_the_sign_of_an_advantage(batch, temperature):
    signal, mask = batch
    advantages = torch.where(mask, signal.flip(0), 0.0)
    weights = baselines.role_weights(signal, mask, temperature)
    assert torch.equal((weights * advantages).sign(), advantages.sign())


def test_role_weights_by_hand():
    """Signals 0 and 2 have the baseline 1; at temperature 2 that is e^-1/2 and e^1/2 over their
    mean. At temperature 0.1 the limit of one e-fold bites."""
    mask = torch.tensor([[True, False, True]])
    signal = torch.tensor([[0.0, 99.0, 2.0]])
    for temperature, exponent in ((2.0, 0.5), (0.1, 1.0)):
        weights = baselines.role_weights(signal, mask, temperature)
        mean = math.cosh(exponent)  # of e^-exponent and e^exponent
        expected = [math.exp(-exponent) / mean, 0.0, math.exp(exponent) / mean]
        assert_close(weights, torch.tensor([expected]))


def test_role_weights_have_mean_one_where_the_limit_makes_them_smaller():
    """One token carries all of the signal: unlimited, no mean of these exponentials is below 1."""
    mask = torch.ones(1, 6, dtype=torch.bool)
    weights = baselines.role_weights(torch.tensor([[6.0, 0, 0, 0, 0, 0]]), mask)
    assert weights.mean().item() == pytest.approx(1.0)
    assert weights[0, 0] / weights[0, 1] == pytest.approx(math.e**2)


def test_without_options_the_signal_counts_in_nats():
    mask, signal = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.0, 1.0]])
    weights = baselines.role_weights(signal, mask)
    assert weights[0, 1] / weights[0, 0] == pytest.approx(math.e)


@given(signals)
def test_at_infinite_temperature_srpo_is_grpo(batch):
    signal, mask = batch
    ones = mask.to(signal.dtype)
    assert_close(baselines.role_weights(signal, mask, math.inf), ones)
    assert_close(baselines.role_weights(signal, mask, 1e9), ones, rtol=0, atol=1e-6)


@given(signals, st.floats(-50, 50))
def test_both_roles_share_one_baseline(batch, shift):
    """Raising the signal of the whole response changes nothing."""
    signal, mask = batch
    weights = baselines.role_weights(signal, mask)
    assert_close(baselines.role_weights(signal + shift, mask), weights, rtol=1e-6, atol=1e-9)


@given(signals)
def test_a_higher_signal_gives_a_token_more_weight(batch):
    """And leaves the other responses alone."""
    signal, mask = batch
    weights = baselines.role_weights(signal, mask)
    for b, row in enumerate(policy_positions(mask)):
        if len(row) > 1:
            raised = signal.clone()
            raised[b, row[0]] += 0.5
            new_weights = baselines.role_weights(raised, mask)
            assert new_weights[b, row[0]] >= weights[b, row[0]]
            others = torch.arange(len(mask)) != b
            assert torch.equal(new_weights[others], weights[others])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="role_temperature"):
        baselines.role_weights(torch.zeros(1, 2), torch.ones(1, 2) > 0, temperature)


PERCEPTION_TEXTS = [["<see>", "3", "</see>", "4", "!"], list("<see>3</see>4"), list("abc"), ["<a>"]]


def perceived():
    longest = max(len(pieces) for pieces in PERCEPTION_TEXTS)
    lengths = torch.tensor([[len(pieces)] for pieces in PERCEPTION_TEXTS])
    mask = torch.arange(longest) < lengths
    return baselines.perception(PERCEPTION_TEXTS, mask), mask


def test_perception_goes_up_to_the_token_that_closes_it():
    """However the tag is split into tokens; a response that closes nothing perceives nothing."""
    perceives, _ = perceived()
    assert perceives.sum(1).tolist() == [3, len("<see>3</see>"), 0, 0]
    assert "".join(PERCEPTION_TEXTS[1][int(perceives[1].sum()) :]) == "4"


def test_perception_stays_on_the_mask():
    perceives, mask = perceived()
    assert not (perceives & ~mask).any()
    hole = mask.clone()
    hole[0, 1] = False
    assert baselines.perception(PERCEPTION_TEXTS, hole)[0].nonzero().flatten().tolist() == [0, 2]
