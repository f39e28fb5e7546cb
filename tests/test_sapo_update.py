"""sapo.py, `sapo_update`: the steps it takes, what it logs, and what must not change either."""

import math
from dataclasses import replace

import pytest
import torch
from learners import FreeNumbers, update, update_policy
from plain_loops import policy_positions, random_batch, segments
from torch.testing import assert_close

import sapo
from sapo import SAPOConfig

# ------------------------------------------------------------------------------------ by hand

NO_BOUND = {"target_kl": math.inf}  # of the KL divergence: it has tests of its own below
CONFIGS = {
    "paper": SAPOConfig.paper(),
    "released": SAPOConfig.released(),
    "token ratio": SAPOConfig(ratio="token", average="token", value_clip=0.1, advantage_clamp=0.5),
    "response ratio": SAPOConfig(ratio="response", lam=0.9),
    "product of ratios": SAPOConfig(ratio="product", lam=0.9, clip_high=0.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def descend(parameter, rate, max_grad_norm):
    """One step of gradient descent, the gradient scaled down to its largest norm. -> its norm."""
    norm = parameter.grad.norm().item()
    parameter.data -= rate * parameter.grad * min(1, max_grad_norm / norm)
    parameter.grad = None
    return norm


def epochs_by_hand(learner, config):
    """Credit once, from the rollout; then a step down both losses in each epoch. -> the metrics."""
    rollout, mask, ends = learner.rollout, learner.rollout.mask, learner.rollout.ends
    advantages, returns = sapo.segment_gae(
        rollout.rewards, rollout.values, ends, mask, config.gamma, config.lam, config.value_at
    )
    if config.whiten_advantages:
        advantages = sapo.whiten(advantages, mask)
    advantages = advantages.clamp(-config.advantage_clamp, config.advantage_clamp)
    # without an end the whole response is one segment
    ratio_ends = {"token": mask, "response": torch.zeros_like(mask)}.get(config.ratio, ends)
    history = []
    for _ in range(config.epochs):
        ratio = sapo.segment_ratio(learner.logp, rollout.logp, ratio_ends, mask)
        if config.ratio == "product":  # undoes the root of the geometric mean
            ratio = ratio ** sapo.segment_sum(mask, ends, mask)
        policy_loss, policy_stats = sapo.policy_loss(
            ratio,
            advantages,
            mask,
            config.clip_low,
            config.clip_high,
            config.dual_clip,
            config.average,
        )
        value_loss, value_stats = sapo.value_loss(
            learner.values,
            returns,
            ends,
            mask,
            config.value_at,
            rollout.values,
            config.value_clip,
            config.average,
        )
        value_loss = config.value_coef * value_loss
        metrics = {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "ratio": ratio[mask].mean().item(),
            "entropy": learner.entropy[mask].mean().item(),
            "approx_kl": sapo.approx_kl(learner.logp, rollout.logp, mask),
        }
        (policy_loss + value_loss).backward()
        metrics["policy_grad_norm"] = descend(learner.logp, 2.0, config.max_grad_norm)
        metrics["value_grad_norm"] = descend(learner.values, 3.0, config.max_grad_norm)
        history.append(metrics | policy_stats | value_stats)
    return history


@every_config
def test_update_goes_where_steps_by_hand_go(config):
    """The cut and the advantages are made once and serve in all epochs."""
    config = replace(config, epochs=2, max_grad_norm=0.05, **NO_BOUND)
    learner, by_hand = FreeNumbers(), FreeNumbers()
    update(learner, config)
    epochs_by_hand(by_hand, config)
    assert_close(learner.logp, by_hand.logp, rtol=0, atol=1e-6)
    assert_close(learner.values, by_hand.values, rtol=0, atol=1e-6)


@every_config
def test_update_logs_what_steps_by_hand_give(config):
    config = replace(config, epochs=2, max_grad_norm=0.05, **NO_BOUND)
    history, by_hand = update(FreeNumbers(), config), epochs_by_hand(FreeNumbers(), config)
    assert len(history) == 2
    for metrics, expected in zip(history, by_hand, strict=True):
        for name, number in expected.items():
            assert metrics[name] == pytest.approx(number, rel=1e-5, abs=1e-7), name
        assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == 0


def test_each_epoch_logs_a_mean_over_its_minibatches():
    """Not over tokens: minibatches count alike. Rate 0, so that their order does not matter."""
    learner = FreeNumbers()
    for optimizer in learner.optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    parts, score = [], learner.score

    def remembering(rows):
        parts.append(rows)
        return score(rows)

    learner.score = remembering
    [metrics] = update(learner, SAPOConfig(epochs=1, minibatch=3, **NO_BOUND))
    entropies = []
    for rows in parts:
        entropies.append(learner.entropy[rows][learner.rollout.mask[rows]].mean().item())
    assert len(entropies) == 3
    assert metrics["entropy"] == pytest.approx(sum(entropies) / 3)


# ------------------------------------------------------------------------------------ metrics


def test_the_first_step_finds_the_policy_that_sampled():
    """A ratio of 1, nothing clipped, no divergence."""
    learner = FreeNumbers()
    learner.logp.data.copy_(learner.rollout.logp)
    [metrics] = update(learner, SAPOConfig(epochs=1))
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-12)


def test_the_names_of_the_metrics():
    [metrics] = update(FreeNumbers(), SAPOConfig(epochs=1))
    assert set(metrics) == {
        *("policy_loss", "clip_fraction", "approx_kl", "ratio", "entropy", "policy_grad_norm"),
        *("value_loss", "value_clip_fraction", "value_grad_norm"),
        *("policy_steps", "skipped_steps", "skipped_in_a_row"),
    }
    assert all(math.isfinite(number) for number in metrics.values())


# -------------------------------------------------------------------------------- minibatches


@pytest.mark.parametrize("average", ["response", "token"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_micro_batches_change_memory_not_numbers(average, micro_batch):
    """Neither parameters nor metrics; with ragged responses, an empty one, steps of 6 and of 2."""
    whole, split = FreeNumbers(), FreeNumbers()
    config = SAPOConfig(average=average, epochs=2, minibatch=6, value_clip=0.5, max_grad_norm=0.1)
    expected = update(whole, config)
    history = update(split, replace(config, micro_batch=micro_batch))
    assert_close(split.logp, whole.logp, rtol=0, atol=1e-6)
    assert_close(split.values, whole.values, rtol=0, atol=1e-6)
    for ours, theirs in zip(history, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("average", ["response", "token"])
def test_a_minibatch_without_policy_tokens_is_no_failure(average):
    """An empty response, alone in its minibatch: nothing to learn, nothing to skip."""
    [metrics] = update(FreeNumbers(), SAPOConfig(epochs=1, average=average, minibatch=1))
    assert metrics["skipped_steps"] == 0


def asked_rows(seed):
    """The rows of each minibatch of a fresh learner, in three epochs of minibatches of three."""
    learner, asked = FreeNumbers(), []
    score = learner.score

    def remembering(rows):
        asked.append(rows.tolist())
        return score(rows)

    learner.score = remembering
    update(learner, SAPOConfig(epochs=3, minibatch=3, **NO_BOUND), seed)
    return asked


def test_each_epoch_asks_for_every_response_once_in_a_new_order():
    asked = asked_rows(seed=1)
    assert [len(rows) for rows in asked] == [3, 3, 2] * 3
    epochs = [sum(asked[first : first + 3], []) for first in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_generator_alone_decides_the_order():
    torch.manual_seed(0)
    first = asked_rows(seed=1)
    torch.manual_seed(7)
    assert asked_rows(seed=1) == first
    assert asked_rows(seed=2) != first


# ------------------------------------------------------------- what it reads and leaves alone


def test_the_rollout_is_left_alone():
    learner = FreeNumbers(ref_logp=random_batch(9).logp)
    copies = {name: tensor.clone() for name, tensor in vars(learner.rollout).items()}
    update(learner, SAPOConfig.released())
    for name, copy in copies.items():
        assert torch.equal(getattr(learner.rollout, name), copy), name


def test_the_advantages_are_left_alone():
    learner = FreeNumbers()
    advantages = random_batch(0).advantages
    copy = advantages.clone()
    update_policy(learner, advantages, SAPOConfig.released())
    assert torch.equal(advantages, copy)


def given_advantages(mask):
    """GRPO's: one number per response; off the mask may stand anything."""
    per_response = torch.arange(8.0, dtype=torch.float64)[:, None] - 3
    return torch.where(mask, per_response, math.nan)


def test_given_advantages_need_no_critic():
    """J: the mean over responses of the mean over tokens of ratio times A. SGD's rate is 2."""
    learner = FreeNumbers(values=None)
    mask, start = learner.rollout.mask, learner.logp.detach().clone()
    advantages = given_advantages(mask)
    config = SAPOConfig(ratio="token", clip_low=99, clip_high=99, epochs=1, max_grad_norm=math.inf)
    update_policy(learner, advantages, config)
    step = torch.zeros_like(start)
    for b, row in enumerate(policy_positions(mask)):
        for t in row:
            ratio = math.exp(start[b, t] - learner.rollout.logp[b, t])
            step[b, t] = 2 * ratio * advantages[b, t] / len(row) / 8
    assert_close(learner.logp.detach(), start + step)


def test_without_a_critic_its_metrics_are_absent_not_zero():
    learner = FreeNumbers(values=None)
    mask = learner.rollout.mask
    config = SAPOConfig(epochs=1, ratio="token")
    [metrics] = update_policy(learner, given_advantages(mask), config)
    assert not {"value_loss", "value_grad_norm"} & set(metrics)


def steps_of(ratio):
    """(learner, how far each token moves in a step at an advantage of 1 everywhere)."""
    learner = FreeNumbers()
    start = learner.logp.detach().clone()
    config = SAPOConfig(ratio=ratio, clip_low=99, clip_high=1e9, epochs=1)
    update_policy(learner, torch.ones_like(start), config)
    return learner, learner.logp.detach() - start


def steps_of_long_segments(ratio):
    """How far each token of a segment of several tokens moves, segment by segment."""
    learner, moved = steps_of(ratio)
    steps = []
    for b, row in enumerate(segments(learner.rollout.ends, learner.rollout.mask)):
        steps += [moved[b, segment] for segment in row if len(segment) > 1]
    assert len(steps) > 5
    return steps


@pytest.mark.parametrize("ratio", ["segment", "product", "response"])
def test_a_ratio_of_several_tokens_pulls_alike_at_all_of_them(ratio):
    for step in steps_of_long_segments(ratio):
        assert_close(step, step[:1].expand_as(step))


def test_a_response_ratio_pulls_alike_at_all_tokens_of_a_response():
    """On both sides of a hole, too; other ratios part it there."""
    learner, moved = steps_of("response")
    _, by_segment = steps_of("segment")
    parted = 0
    for b, row in enumerate(policy_positions(learner.rollout.mask)):
        if row:
            assert_close(moved[b, row], moved[b, row[:1]].expand(len(row)))
            parted += (by_segment[b, row] - by_segment[b, row[0]]).abs().max().item() > 1e-3
    assert parted > 3


def test_a_token_ratio_pulls_at_each_token_by_itself():
    for step in steps_of_long_segments("token"):
        assert step.unique().numel() == step.numel()


# ------------------------------------------------------------------------- how far it may go


def near():
    """A learner whose policy begins where its rollout was made, as in training."""
    learner = FreeNumbers()
    learner.rollout.logp = learner.logp.detach().clone()
    return learner


def after(epochs, target_kl):
    """A learner after some epochs of one minibatch each, and the metrics of each epoch."""
    learner = near()
    history = update(learner, SAPOConfig(epochs=epochs, target_kl=target_kl, minibatch=8))
    return learner, history


def test_a_policy_that_has_gone_far_stays_and_the_critic_goes_on():
    """The first minibatch is on-policy (KL 0); the second is the first that can pass the bound."""
    stopped, history = after(4, target_kl=1e-9)
    assert [epoch["policy_steps"] for epoch in history] == [1, 1, 0, 0]
    assert history[1]["approx_kl"] > 1e-9
    assert_close(stopped.logp, after(2, math.inf)[0].logp, rtol=0, atol=0)
    free, free_history = after(4, math.inf)
    assert not torch.equal(stopped.logp, free.logp)
    assert_close(stopped.values, free.values, rtol=0, atol=0)
    for name in ("policy_loss", "approx_kl", "clip_fraction", "policy_grad_norm"):
        assert name in history[1]
        assert name not in history[3], "it took no step, so it has nothing to report"
    assert history[3]["value_loss"] == free_history[3]["value_loss"]


def test_the_metrics_of_an_update_are_its_last_but_the_clip_counts_in_every_step():
    """Worked by hand: the second epoch took half its steps, so its clip weighs half as much."""
    history = [
        {"policy_steps": 1.0, "clip_fraction": 0.0, "approx_kl": 0.01, "value_loss": 0.5},
        {"policy_steps": 0.5, "clip_fraction": 0.06, "approx_kl": 0.04, "value_loss": 0.4},
        {"policy_steps": 0.0, "value_loss": 0.3},
    ]
    for epoch, skipped in zip(history, (0, 2, 1), strict=True):
        epoch["skipped_steps"] = skipped
    assert sapo.update_metrics(history) == pytest.approx(
        {
            "policy_steps": 0.5,
            "clip_fraction": 0.02,
            "approx_kl": 0.04,
            "value_loss": 0.3,
            "skipped_steps": 3,
        }
    )


def test_the_metrics_of_an_update_without_a_finite_minibatch():
    history = [{"skipped_steps": 1, "skipped_in_a_row": 1}]
    metrics = {"skipped_steps": 1, "skipped_in_a_row": 1, "policy_steps": 0}
    assert sapo.update_metrics(history) == metrics


def test_the_bound_is_of_one_rollout():
    """The next call begins anew: its first minibatch is near its own rollout again."""
    learner = near()
    config = SAPOConfig(epochs=3, target_kl=1e-9, minibatch=8)
    update(learner, config)
    learner.rollout.logp = learner.logp.detach().clone()
    assert update(learner, config)[0]["policy_steps"] == 1


def test_the_bound_itself_is_not_beyond_it():
    """To the last digit: what the second step measures is taken for the bound."""
    reached = after(2, math.inf)[1][1]["approx_kl"]
    for bound, steps in ((reached, [1, 1, 1]), (reached * (1 - 1e-9), [1, 1, 0])):
        history = after(3, target_kl=bound)[1]
        assert [epoch["policy_steps"] for epoch in history] == steps


def test_no_bound_is_reached_below_it():
    history = after(3, target_kl=1e9)[1]
    assert [epoch["policy_steps"] for epoch in history] == [1, 1, 1]


def test_a_step_that_was_not_finite_does_not_stop_the_policy():
    """An infinite gradient is skipped; it must not be counted again in every later minibatch."""
    learner = near()
    good, calls = learner.score, []

    def score(rows):
        calls.append(rows)
        logp, entropy = good(rows)
        if len(calls) == 2:  # far from the rollout's, and with a gradient that overflows
            logp = logp * 1.0
            logp.register_hook(lambda gradient: gradient * math.inf)
        return logp, entropy

    learner.score = score
    history = update(learner, SAPOConfig(epochs=4, target_kl=1e-9, minibatch=8))
    assert [epoch["skipped_steps"] for epoch in history] == [0, 1, 0, 0]
    assert len(calls) == 3, "the third minibatch found it far again, and finite"


def test_target_kl_below_zero_is_refused():
    with pytest.raises(ValueError, match="target_kl"):
        after(1, target_kl=-1.0)


def test_the_numbers_of_a_single_token_are_its_own():
    """Means over one counted position: nothing is divided by more."""
    learner = FreeNumbers()
    mask = torch.zeros_like(learner.rollout.mask)
    mask[0, 0] = True
    learner.rollout = sapo.Rollout(
        mask, mask, learner.logp.detach().clone(), mask.float(), torch.zeros(mask.shape)
    )
    config = SAPOConfig(epochs=1, minibatch=len(mask), target_kl=math.inf)
    [metrics] = update(learner, config)
    assert metrics["ratio"] == pytest.approx(1.0)
    assert metrics["entropy"] == pytest.approx(learner.entropy[0, 0].item(), rel=1e-6)
