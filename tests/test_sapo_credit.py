"""sapo.py, credit: segment GAE, whitening, the KL penalty, `credit` and its metrics."""

import math
from dataclasses import replace

import pytest
import torch
from plain_loops import (
    exact,
    on_policy,
    policy_positions,
    random_batch,
    random_rollout,
    read_at,
    segments,
    to_tokens,
)

import sapo
from sapo import Rollout, SAPOConfig

# -------------------------------------------------------------------------------- segment GAE


def gae_by_loops(batch, gamma, lam, value_at):
    """(advantages, returns) of Eq. 6 and 7: for each response a list over its segments."""
    advantages, returns = [], []
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        values = [batch.values[b, read_at(segment, value_at)].item() for segment in row]
        next_values = [*values[1:], 0.0]
        deltas = []
        for segment, value, next_value in zip(row, values, next_values, strict=False):
            reward = sum(batch.rewards[b, t].item() for t in segment)
            deltas.append(reward + gamma * next_value - value)
        row_advantages = []
        for m in range(len(row)):
            later = enumerate(deltas[m:])
            row_advantages.append(sum((gamma * lam) ** k * delta for k, delta in later))
        advantages.append(row_advantages)
        returns.append([a + v for a, v in zip(row_advantages, values, strict=True)])
    return advantages, returns


@pytest.mark.parametrize("value_at", ["start", "end"])
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.99), (1.0, 1.0), (0.9, 0.0), (0.8, 0.7), (0.0, 1.0)]
)
def test_segment_gae_is_the_sum_over_later_deltas(batch, gamma, lam, value_at):
    advantages, returns = sapo.segment_gae(
        batch.rewards, batch.values, batch.ends, batch.mask, gamma, lam, value_at
    )
    expected_advantages, expected_returns = gae_by_loops(batch, gamma, lam, value_at)
    exact(advantages, to_tokens(expected_advantages, batch.ends, batch.mask))
    exact(returns, to_tokens(expected_returns, batch.ends, batch.mask))


# ---------------------------------------------------------------------------------- whitening


def test_whiten_is_bessels(batch):
    policy = on_policy(batch.x, batch.mask)
    mean = sum(policy) / len(policy)
    variance = sum((number - mean) ** 2 for number in policy) / (len(policy) - 1)
    expected = torch.zeros_like(batch.x)
    for b, row in enumerate(policy_positions(batch.mask)):
        for t in row:
            expected[b, t] = (batch.x[b, t] - mean) / math.sqrt(variance + 1e-8)
    exact(sapo.whiten(batch.x, batch.mask), expected)


def test_whiten_adds_1e_8_under_the_root():
    x = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)  # variance 2e-8
    exact(sapo.whiten(x, torch.ones(1, 2, dtype=torch.bool)), x / math.sqrt(3e-8))


@pytest.mark.parametrize(
    "positions",
    [[(0, 0), (0, 1), (1, 0)], [(0, 0)], []],
    ids=["equal tokens", "one token", "no token"],
)
@pytest.mark.parametrize("level", [1e8, 1000.1])
def test_whiten_without_spread_gives_zeros(positions, level):
    """Exact zeros, whatever stands off the mask. The mean of three times 1000.1 is another number
    in float32; over the root of 1e-8 that error would be an advantage of 0.5."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for b, t in positions:
        mask[b, t] = True
    x = torch.tensor([[level, level, math.nan], [level, 5.0, -math.inf]])
    assert torch.equal(sapo.whiten(x, mask), torch.zeros(2, 3))


# ------------------------------------------------------------------ credit of a whole rollout


def test_kl_to_the_reference_goes_into_the_reward():
    """k1: each token pays kl_coef (log pi_old - log pi_ref), and a segment pays for its tokens."""
    rollout = random_rollout()
    mask = rollout.mask
    rollout.ref_logp = torch.where(mask, random_batch(9).logp, math.nan)  # off the mask: anything
    paid = rollout.rewards - 0.3 * (rollout.logp - rollout.ref_logp)
    returns_by_loops, values_by_loops = [], []
    for b, row in enumerate(segments(rollout.ends, mask)):
        rewards = [sum(paid[b, t].item() for t in segment) for segment in row]
        returns_by_loops.append([sum(rewards[m:]) for m in range(len(row))])
        values_by_loops.append([rollout.values[b, segment[0]].item() for segment in row])

    advantages, returns = sapo.credit(rollout, SAPOConfig(kl_coef=0.3, lam=1.0))
    exact(returns, to_tokens(returns_by_loops, rollout.ends, mask))
    exact(advantages, returns - to_tokens(values_by_loops, rollout.ends, mask))


def test_penalised_rewards_subtract_the_log_ratio_to_the_reference():
    """A token more probable now than under the reference pays; a log-ratio counts up to 20."""
    rollout = random_rollout(ref_logp=random_batch(9).logp)
    rollout.ref_logp[0, 0] = -100.0
    rewards = sapo.penalised_rewards(rollout, SAPOConfig(kl_coef=0.3))
    for b, row in enumerate(policy_positions(rollout.mask)):
        for t in row:
            log_ratio = min(20, (rollout.logp[b, t] - rollout.ref_logp[b, t]).item())
            expected = rollout.rewards[b, t].item() - 0.3 * log_ratio
            assert rewards[b, t].item() == pytest.approx(expected)


def test_without_a_reference_the_rewards_stay_as_they_are():
    rollout = random_rollout()
    rewards = sapo.penalised_rewards(rollout, SAPOConfig(kl_coef=0.3))
    assert torch.equal(rewards, rollout.rewards)


def test_credit_is_segment_gae_with_the_settings():
    """In the order of the arguments, and not whitened: the returns are formed before that."""
    rollout = random_rollout()
    config = SAPOConfig(gamma=0.9, lam=0.8, value_at="end", whiten_advantages=True)
    expected = sapo.segment_gae(
        rollout.rewards, rollout.values, rollout.ends, rollout.mask, 0.9, 0.8, "end"
    )
    for ours, theirs in zip(sapo.credit(rollout, config), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_credit_with_a_lambda_of_the_critics_own():
    """VC-PPO: critic_lam changes the returns, and only them; lam = critic_lam changes nothing."""
    rollout, config = random_rollout(), SAPOConfig(gamma=0.9, lam=0.8, value_at="end")
    advantages, returns = sapo.credit(rollout, config)
    decoupled = sapo.credit(rollout, replace(config, critic_lam=0.3))
    assert torch.equal(decoupled[0], advantages)
    assert torch.equal(decoupled[1], sapo.credit(rollout, replace(config, lam=0.3))[1])
    assert not torch.equal(decoupled[1], returns)
    assert torch.equal(sapo.credit(rollout, replace(config, critic_lam=0.8))[1], returns)


def test_credit_leaves_the_rollout_alone():
    rollout = random_rollout(ref_logp=random_batch(9).logp)
    copies = {name: tensor.clone() for name, tensor in vars(rollout).items()}
    sapo.credit(rollout, SAPOConfig(kl_coef=0.3, critic_lam=0.5))
    for name, copy in copies.items():
        assert torch.equal(getattr(rollout, name), copy), name


def test_credit_needs_values():
    said = r"^values: None, expected values \(B, T\) of the rollout$"
    with pytest.raises(ValueError, match=said):
        sapo.credit(random_rollout(values=None), SAPOConfig())


@pytest.mark.parametrize("name", ["rewards", "logp", "values", "ref_logp"])
def test_credit_refuses_a_nan_on_a_policy_token(name):
    rollout = random_rollout(ref_logp=random_batch(9).logp)
    getattr(rollout, name)[:, 4] = math.nan
    with pytest.raises(ValueError, match=rf"^{name}\b.*NaN"):
        sapo.credit(rollout, SAPOConfig())


@pytest.mark.parametrize("name", ["rewards", "logp", "values", "ref_logp", "ends"])
def test_credit_refuses_a_wrong_shape(name):
    rollout = random_rollout(ref_logp=random_batch(9).logp)
    setattr(rollout, name, getattr(rollout, name)[:, :-1])
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        sapo.credit(rollout, SAPOConfig())


# ------------------------------------------------------------------------------------ metrics


def variance(numbers):
    mean = sum(numbers) / len(numbers)
    return sum((number - mean) ** 2 for number in numbers) / len(numbers)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("value_at", ["start", "end"])
def test_credit_metrics_by_plain_loops(value_at, gamma):
    rollout, config = random_rollout(), SAPOConfig(lam=0.9, gamma=gamma, value_at=value_at)
    advantages, _ = sapo.credit(rollout, config)
    policy = on_policy(advantages, rollout.mask)
    responses = segments(rollout.ends, rollout.mask)
    count = sum(len(row) for row in responses)
    rewards = sapo.penalised_rewards(rollout, config)
    outcomes, errors = [], []
    for b, row in enumerate(responses):
        outcome = 0.0
        for segment in reversed(row):
            outcome = sum(rewards[b, t].item() for t in segment) + gamma * outcome
            outcomes.append(outcome)
            errors.append(outcome - rollout.values[b, read_at(segment, value_at)].item())

    metrics = sapo.credit_metrics(rollout, advantages, config)
    assert metrics == pytest.approx(
        {
            "advantage_mean": sum(policy) / len(policy),
            "advantage_std": math.sqrt(variance(policy)),
            "positive_advantages": sum(number > 0 for number in policy) / len(policy),
            "segments_per_response": count / len(responses),
            "tokens_per_segment": len(policy) / count,
            "explained_variance": 1 - variance(errors) / variance(outcomes),
        },
        rel=1e-7,  # a share is a mean of bools, in float32
        abs=1e-12,
    )


@pytest.mark.parametrize(("of_all", "share"), [(1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)])
def test_the_share_of_positive_advantages(of_all, share):
    """An advantage of 0 is not positive, and what stands off the mask does not count."""
    rollout = random_rollout()
    advantages = torch.where(rollout.mask, of_all, 7.0)
    metrics = sapo.credit_metrics(rollout, advantages, SAPOConfig())
    assert metrics["positive_advantages"] == share


def test_values_that_foretell_rare_rewards_explain_all_of_them():
    """Of outcomes of 0 or 1, whose variance is below 1."""
    mask = torch.ones(4, 3, dtype=torch.bool)
    rewards = torch.zeros(4, 3)
    rewards[0, 2] = 1.0
    values = rewards.sum(1, keepdim=True).expand(4, 3)
    rollout = Rollout(mask, sapo.response_ends(mask), rewards, rewards, values)
    metrics = sapo.credit_metrics(rollout, torch.zeros(4, 3), SAPOConfig())
    assert metrics["explained_variance"] == 1
    alone = Rollout(mask[:1], sapo.response_ends(mask[:1]), rewards[:1], rewards[:1])
    metrics = sapo.credit_metrics(alone, torch.zeros(1, 3), SAPOConfig())
    assert metrics["tokens_per_segment"] == 3 and metrics["segments_per_response"] == 1


def test_without_values_there_is_no_explained_variance():
    rollout = random_rollout(values=None)
    metrics = sapo.credit_metrics(rollout, rollout.rewards, SAPOConfig())
    assert "explained_variance" not in metrics
    assert len(metrics) == 5


def explained_variance(rollout, lam=1.0):
    config = SAPOConfig(lam=lam)
    advantages, _ = sapo.credit(rollout, config)
    return sapo.credit_metrics(rollout, advantages, config)["explained_variance"]


def test_a_critic_that_knows_every_outcome_explains_all_variance():
    rollout = random_rollout()
    _, outcomes = sapo.credit(rollout, SAPOConfig(lam=1.0))
    assert explained_variance(replace(rollout, values=outcomes)) == pytest.approx(1, abs=1e-9)


def test_a_critic_that_says_the_same_everywhere_explains_nothing():
    rollout = random_rollout()
    same = torch.full_like(rollout.values, 7.0)
    assert explained_variance(replace(rollout, values=same)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.99])
def test_a_critic_does_not_flatter_itself_below_lambda_1(lam):
    """At lambda 0 the targets are mostly V itself; the outcome is not."""
    rollout = random_rollout()
    assert explained_variance(rollout, lam) == explained_variance(rollout, 1.0)


def test_where_no_outcome_differs_there_is_nothing_to_explain():
    """Not even rounding errors, whatever the values."""
    rollout = random_rollout()
    nothing = torch.zeros_like(rollout.rewards)
    assert explained_variance(replace(rollout, rewards=nothing)) == 0
    same = torch.full_like(rollout.values, 7.0)
    assert explained_variance(replace(rollout, rewards=nothing, values=same)) == 0


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_outcome_of_a_segment_is_all_that_is_earned_from_it_on(gamma):
    episodes = random_rollout()
    earned = []
    for b, row in enumerate(segments(episodes.ends, episodes.mask)):
        rewards = [sum(episodes.rewards[b, t].item() for t in segment) for segment in row]
        earned.append(
            [
                sum(gamma**later * reward for later, reward in enumerate(rewards[m:]))
                for m in range(len(row))
            ]
        )
    outcomes = sapo.outcomes(episodes, SAPOConfig(gamma=gamma))
    torch.testing.assert_close(outcomes, to_tokens(earned, episodes.ends, episodes.mask))


def test_an_outcome_is_less_the_kl_penalty():
    episodes = random_rollout()
    episodes.ref_logp = episodes.logp - 0.25
    plain = sapo.outcomes(episodes, SAPOConfig(kl_coef=0.0))
    penalised = sapo.outcomes(episodes, SAPOConfig(kl_coef=1.0))
    assert ((plain - penalised)[episodes.mask] > 0.2).all()


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_large_numbers_are_whitened_too(size):
    mask = torch.ones(1, 4, dtype=torch.bool)
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    torch.testing.assert_close(sapo.whiten(size * x, mask), sapo.whiten(x, mask))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_whitened_numbers_are_float32_however_many_there_are(tokens):
    mask = torch.arange(3)[None] < tokens
    assert sapo.whiten(torch.ones(1, 3, dtype=torch.bfloat16), mask).dtype == torch.float32
