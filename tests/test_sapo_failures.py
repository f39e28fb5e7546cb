"""sapo.py, `sapo_update`: what happens when a model gives NaN, and when the caller is wrong."""

import math

import pytest
import torch
from learners import FreeNumbers, update, update_policy

import sapo
from sapo import SAPOConfig

# ------------------------------------------------------------------------- a model that fails

FAILURES = ["NaN log-probability", "infinite loss", "NaN gradient", "infinite gradient"]
every_failure = pytest.mark.parametrize("failure", FAILURES)


def spoiled(logp, failure):
    """Log-probabilities that fail in one of the ways in which models fail."""
    if failure == "NaN log-probability":
        return logp + math.nan
    if failure == "infinite loss":  # log-ratios at the clamp: e^20 times an advantage of 1e305
        return logp + 1e9
    if failure == "NaN gradient":  # the number is right, its slope is 0 * inf
        return logp + (0 * logp).sqrt()
    assert failure == "infinite gradient"
    spoiled_logp = logp + 0
    spoiled_logp.register_hook(lambda gradient: gradient * math.inf)
    return spoiled_logp


def fail(learner, failure, calls=None):
    """Let the learner's policy fail, at these `calls` of `score` (None: at all of them)."""
    score, count = learner.score, 0

    def failing(rows):
        nonlocal count
        logp, entropy = score(rows)
        if calls is None or count in calls:
            logp = spoiled(logp, failure)
        count += 1
        return logp, entropy

    learner.score = failing
    return learner


def always_failing(failure):
    """A learner, with Adam, whose policy fails at every call."""
    learner = fail(FreeNumbers(), failure)
    if failure == "infinite loss":
        learner.rollout.rewards = learner.rollout.rewards - 1e305
    learner.optimizers = (torch.optim.Adam([learner.logp]), torch.optim.Adam([learner.values]))
    return learner


@every_failure
def test_a_step_that_is_not_finite_is_skipped(failure):
    learner = always_failing(failure)
    start = learner.logp.detach().clone()
    update(learner, SAPOConfig(epochs=1))
    assert torch.equal(learner.logp.detach(), start)  # bit for bit
    assert not learner.optimizers[0].state[learner.logp]  # nor did it reach Adam's moments
    assert learner.logp.grad is None  # and nothing is left for the next step to trip over


@every_failure
def test_a_step_that_is_not_finite_is_counted(failure):
    [metrics] = update(always_failing(failure), SAPOConfig(epochs=1))
    assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == 1


@every_failure
def test_three_in_a_row_stop_the_run(failure):
    said = r"three minibatches in a row were not finite, the last: {.*'policy_loss': "
    with pytest.raises(FloatingPointError, match=said):
        update(always_failing(failure), SAPOConfig(epochs=1, minibatch=2))


def test_two_in_a_row_do_not_stop_the_run():
    [metrics] = update(always_failing("NaN gradient"), SAPOConfig(epochs=1, minibatch=4))
    assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == 2


def test_without_a_count_from_before_the_row_begins_here():
    """Whoever learns from one rollout alone hands over none."""
    learner = always_failing("NaN gradient")
    optimizers = (learner.optimizers[0], None)
    [metrics] = sapo.sapo_update(
        *(learner.rollout, torch.ones_like(learner.rollout.rewards), None, learner.score, None),
        *(optimizers, SAPOConfig(epochs=1)),
    )
    assert metrics["skipped_in_a_row"] == 1


def test_three_in_a_row_across_epochs():
    with pytest.raises(FloatingPointError):
        update(always_failing("NaN gradient"), SAPOConfig(epochs=3))


def test_three_in_a_row_across_calls():
    learner, skipped = always_failing("NaN gradient"), 0
    for call_number in range(2):
        [metrics] = update(learner, SAPOConfig(epochs=1), skipped_in_a_row=skipped)
        skipped = metrics["skipped_in_a_row"]
        assert skipped == call_number + 1
    with pytest.raises(FloatingPointError):
        update(learner, SAPOConfig(epochs=1), skipped_in_a_row=skipped)


def test_a_good_step_ends_the_row():
    """Of four minibatches the first, the second and the last fail: three, but not in a row."""
    learner = fail(FreeNumbers(), "NaN gradient", calls=(0, 1, 3))
    start = learner.logp.detach().clone()
    [metrics] = update(learner, SAPOConfig(epochs=1, minibatch=2, target_kl=math.inf))
    assert metrics["skipped_steps"] == 3
    assert metrics["skipped_in_a_row"] == 1
    assert not torch.equal(learner.logp.detach(), start)
    assert learner.logp.isfinite().all()


def test_metrics_are_means_over_the_steps_that_were_taken():
    learner = fail(FreeNumbers(), "NaN log-probability", calls=(0, 1, 3))
    [metrics] = update(learner, SAPOConfig(epochs=1, minibatch=2))
    assert all(math.isfinite(number) for number in metrics.values())
    assert metrics["ratio"] > 0


def test_one_bad_micro_batch_spoils_the_step():
    """The gradients of the good parts are dropped with it: half a minibatch is another one."""
    learner = fail(FreeNumbers(), "NaN log-probability", calls=(2,))
    start = learner.logp.detach().clone()
    [metrics] = update(learner, SAPOConfig(epochs=1, micro_batch=2))
    assert torch.equal(learner.logp.detach(), start)
    assert metrics["skipped_steps"] == 1


def failing_critic():
    learner = FreeNumbers()
    learner.value = lambda rows: learner.values[rows] * math.nan
    return learner


def test_a_critic_that_fails_is_counted_too():
    learner = failing_critic()
    start = learner.values.detach().clone()
    [metrics] = update(learner, SAPOConfig(epochs=1))
    assert torch.equal(learner.values.detach(), start)
    assert metrics["skipped_steps"] == 1


def test_a_critic_that_fails_does_not_hold_the_policy_back():
    learner = failing_critic()
    start = learner.logp.detach().clone()
    update(learner, SAPOConfig(epochs=1))
    assert not torch.equal(learner.logp.detach(), start)


# ---------------------------------------------------------------------- a caller who is wrong
#
# Only a model may give NaN. A rollout with one is a mistake to be told, not a step to be skipped.


def nan_at_position_4(tensor):
    """A copy with NaN in column 4, where some rows have a policy token."""
    spoiled_tensor = tensor.clone()
    spoiled_tensor[:, 4] = math.nan
    return spoiled_tensor


@pytest.mark.parametrize("name", ["rewards", "logp", "values"])
def test_a_nan_in_the_rollout_is_an_error_not_a_skip(name):
    learner = FreeNumbers()
    advantages = torch.ones_like(learner.rollout.rewards)
    setattr(learner.rollout, name, nan_at_position_4(getattr(learner.rollout, name)))
    with pytest.raises(ValueError, match=rf"^{name}\b.*NaN"):
        update_policy(learner, advantages, SAPOConfig(epochs=1))


def one_per_response(tensor):
    return tensor[:, :1]


@pytest.mark.parametrize("spoil", [nan_at_position_4, one_per_response])
def test_wrong_advantages_are_an_error_not_a_skip(spoil):
    learner = FreeNumbers()
    advantages = spoil(torch.ones_like(learner.rollout.rewards))
    with pytest.raises(ValueError, match=r"^advantages\b"):
        update_policy(learner, advantages, SAPOConfig(epochs=1))


def test_scores_of_a_wrong_shape_are_an_error_not_a_skip():
    learner = FreeNumbers()
    learner.score = lambda rows: (learner.logp[rows][:, :-1], learner.entropy[rows])
    with pytest.raises(ValueError, match=r"^logp\b"):
        update(learner, SAPOConfig(epochs=1))


def test_values_of_a_wrong_shape_are_an_error_not_a_skip():
    learner = FreeNumbers()
    learner.value = lambda rows: learner.values[rows][:, :-1]
    with pytest.raises(ValueError, match=r"^values\b"):
        update(learner, SAPOConfig(epochs=1))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("ratio", "word"), ("average", "batch"), ("value_at", "middle"), ("target_kl", 0.0)],
)
def test_a_setting_that_went_wrong_later_is_an_error_not_a_skip(name, wrong):
    learner = FreeNumbers()
    start = learner.logp.detach().clone()
    config = SAPOConfig()
    setattr(config, name, wrong)
    with pytest.raises(ValueError, match=rf"^{name}: .*{wrong}.*, expected"):
        update_policy(learner, torch.ones_like(start), config)
    assert torch.equal(learner.logp.detach(), start)


def test_a_wrong_rollout_teaches_nothing():
    """It is refused before the first step."""
    learner = FreeNumbers()
    start = learner.logp.detach().clone()
    learner.rollout.rewards = nan_at_position_4(learner.rollout.rewards)
    with pytest.raises(sapo.NaNError):
        update_policy(learner, torch.ones_like(start), SAPOConfig(epochs=1, minibatch=2))
    assert torch.equal(learner.logp.detach(), start)


@pytest.mark.parametrize("returns", [None, "NaN", "one per response"])
def test_returns_that_do_not_fit_a_critic_are_an_error_not_a_skip(returns):
    learner = FreeNumbers()
    advantages, right = sapo.credit(learner.rollout, SAPOConfig())
    if returns == "NaN":
        returns = torch.where(learner.rollout.mask, math.nan, right)
    elif returns == "one per response":
        returns = right[:, 0]
    said = "^returns: "
    if returns is None:
        said += r"None, expected returns \(B, T\), as there is a critic$"
    with pytest.raises(ValueError, match=said):
        teach(learner, advantages, returns)


def test_a_rollout_without_values_cannot_teach_a_critic():
    learner = FreeNumbers()
    advantages, returns = sapo.credit(learner.rollout, SAPOConfig())
    learner.rollout.values = None
    said = r"^values: None, expected values \(B, T\), as there are returns$"
    with pytest.raises(ValueError, match=said):
        teach(learner, advantages, returns)


def teach(learner, advantages, returns):
    optimizers = learner.optimizers
    return sapo.sapo_update(
        *(learner.rollout, advantages, returns, learner.score, learner.value, optimizers),
        SAPOConfig(epochs=1),
    )
