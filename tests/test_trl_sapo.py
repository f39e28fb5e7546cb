"""SAPO on top of TRL: the same step as ours, the same on two processes as on one."""

import importlib
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import sapo
import train
import vlm

pytest.importorskip("trl", reason='needs: pip install "trl>=1.16"')

import trl_worker
from transformers import TrainerCallback

from lab import trl_sapo, trl_trainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL reports its use otherwise


class Recorder(TrainerCallback):
    """What stood before each optimizer step, and the gradients that it took."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
        trainer.critic_optimizer.register_step_pre_hook(self.on_critic_step)

    def on_step_begin(self, *_, **__):
        self.steps.append({"weights": copied(trl_worker.weights(self.trainer))})

    def on_critic_step(self, *_):
        self.steps[-1]["critic"] = copied(gradients(self.trainer.critic))

    def on_pre_optimizer_step(self, *_, model, **__):
        self.steps[-1]["policy"] = copied(gradients(model))


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def trained(runs, *flags):
    """(run, trainer, recorder) of a training on pictures of dice, by a model with random weights."""
    dice = ["--env", "SAPO/DiceSum-v0", "--warm_start_steps", "0", "--max_new_tokens", "12"]
    words = ["--runs", str(runs), *trl_worker.FLAGS, *trl_worker.RATES, *dice, *flags]
    settings, config = train.parse([*words, "--actor_lr", "3e-2", "--max_grad_norm", "inf"])
    run, trainer = trl_sapo.build(settings, config, {"disable_tqdm": True}, runs / "trl")
    trainer.reward_funcs = [trl_worker.reward]
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.1)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return run, trainer, recorder


def our_step(run, config, batch, weights):
    """(the rollout, advantages, gradients, metrics) of one step of sapo.sapo_update on a batch that
    TRL sampled, from these weights."""
    policy = run.models.policy
    policy.model.load_state_dict({n: w for n, w in weights.items() if "critic" not in n})
    policy.banned[:] = False  # TRL's log-probabilities count them
    critic = sapo.SegmentCritic(models.Backbone(policy), policy.hidden_size, hears=True)
    critic.load_state_dict({n[7:]: w for n, w in weights.items() if n.startswith("critic.")})
    inputs = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    inputs |= {name: batch[name] for name in batch if name.startswith("pixel_")}
    tokens, mask = batch["completion_ids"], batch["completion_mask"].bool()
    heard = sapo.surprise(batch["old_per_token_logps"], mask)

    def score(rows):
        return vlm.score(policy, vlm.take(inputs, rows), tokens[rows], mask[rows])

    def value(rows):
        taken = vlm.take(inputs, rows)
        return vlm.prefix_values(critic, taken, tokens[rows], mask[rows], heard[rows])

    with torch.no_grad():
        everyone = torch.arange(len(mask))
        logp, entropy = score(everyone)
        texts = [[{"content": text}] for text in policy.processor.batch_decode(tokens, True)]
        rewards = torch.zeros(mask.shape)
        rewards[everyone, mask.sum(1) - 1] = torch.tensor(trl_worker.reward(texts))
        ends = sapo.entropy_ends(entropy, mask, config.top_k)
        rollout = sapo.Rollout(mask, ends, logp, rewards, value(everyone))
    return rollout, score, value, critic


def test_every_step_is_that_of_sapo_update(runs):
    run, trainer, recorder = trained(runs)
    config, batch = run.config, trainer._buffered_inputs[0]
    assert len(recorder.steps) == config.epochs == 3
    rollout, *_ = our_step(run, config, batch, recorder.steps[0]["weights"])
    advantages, returns = sapo.credit(rollout, config)
    assert torch.equal(rollout.ends, batch["ends"])
    torch.testing.assert_close(rollout.logp, batch["old_per_token_logps"], atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.values, batch["values"], atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages, batch["advantages"], atol=1e-5, rtol=0)
    assert advantages.abs().max() > 0.1

    seen = []
    for step in recorder.steps:
        _, score, value, critic = our_step(run, config, batch, step["weights"])
        taken = {}

        def standing(name, module, taken=taken):
            """An optimizer that keeps the gradients and takes no step."""
            optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

            def keep(*_):
                taken[name] = copied(gradients(module))

            optimizer.register_step_pre_hook(keep)
            return optimizer

        optimizers = standing("policy", run.models.policy.model), standing("critic", critic)
        one_step = train.replace(config, epochs=1)
        (metrics,) = sapo.sapo_update(
            rollout, advantages, returns, score, value, optimizers, one_step
        )
        for name in ("policy", "critic"):
            assert taken[name].keys() == step[name].keys()
            for parameter, gradient in taken[name].items():
                torch.testing.assert_close(gradient, step[name][parameter], atol=1e-5, rtol=1e-4)
        seen.append(metrics)
    assert seen[0]["clip_fraction"] == 0 and seen[2]["clip_fraction"] > 0.05, "the last clips"
    logged = trainer.state.log_history[0]  # of all steps: the means
    for name in ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "entropy"):
        mean = sum(metrics[name] for metrics in seen) / 3
        assert float(logged[name]) == pytest.approx(mean, rel=1e-3, abs=1e-5), name
