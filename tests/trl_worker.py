"""Three steps of lab.trl_trainer on greedy responses, by as many processes as start it.

    PYTHONPATH=.:tests python tests/trl_worker.py RUNS OUT

RUNS is a folder with the warm start of small_runs.TASK; OUT gets the weights of policy and critic,
and the means of their gradients.
"""

import sys
from pathlib import Path

import small_runs
import torch

import train
from lab import trl_sapo

# Greedy responses are the same however they are spread; one rollout is one minibatch
FLAGS = ("--batch", "8", "--minibatch", "8", "--iterations", "1", "--epochs", "3")
RATES = ("--actor_lr", "1e-3", "--critic_lr", "1e-2", "--target_kl", "inf", "--lam", "0.9")
UNCLIPPED = ("--max_grad_norm", "inf")  # a clipped gradient hides its scale, as Adam's step does
OPTIONS = {
    "generation_kwargs": {"do_sample": False},
    "shuffle_dataset": False,
    "disable_tqdm": True,
}


def reward(completions, **_):
    """A number in [0, 1) that nearly every text has for itself."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(i * ord(letter) for i, letter in enumerate(text)) % 101 / 101 for text in texts]


def build(runs, *flags, folder=None):
    """(run, trainer) of the task of small_runs, with the rewards of above."""
    settings, config = train.parse(
        [*small_runs.TASK, "--runs", str(runs), *FLAGS, *RATES, *UNCLIPPED, *flags]
    )
    run, trainer = trl_sapo.build(settings, config, OPTIONS, folder or Path(runs) / "trl")
    trainer.reward_funcs = [reward]
    torch.nn.init.normal_(  # the same on every process; at zero, the first values tell nothing
        trainer.critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    return run, trainer


def weights(trainer):
    """The weights of policy and critic, by name."""
    policy = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, where it is sharded
    return {**policy, **{f"critic.{n}": p for n, p in trainer.critic.state_dict().items()}}


def outcome(trainer):
    """The weights, and the means of the gradients that they moved by."""
    moments = {}
    optimizers = {"policy": trainer.optimizer, "critic": trainer.critic_optimizer}
    for name, optimizer in optimizers.items():
        for number, state in optimizer.state_dict()["state"].items():
            moments[f"gradient.{name}.{number}"] = state["exp_avg"]
    return weights(trainer) | moments


if __name__ == "__main__":
    _, trainer = build(sys.argv[1], "--micro_batch", "2")
    trainer.train()
    left = [trainer.accelerator.num_processes, outcome(trainer)]
    if trainer.accelerator.is_main_process:
        torch.save(left, sys.argv[2])
