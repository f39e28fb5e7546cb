"""The episode of the tutorial: one real response, and all that the tutorial computes from it.

    python train.py --iterations 34 --name half
    python train.py --iterations 34 --critic_hears nothing --name half-deaf
    python -m lab.episode runs/half runs/half-deaf        # -> results/episode.json

The committed file is of 2026-11-28: of the default of then (lambda 0.7, a clip of 0.1, and another
warm start), which commit 305aea6 has. Both runs stop half-way, where the policy still makes
mistakes. The first wrote the response, and its critic valued it; the critic of the second, which
hears nothing, values the same text. Chosen is the first held-out response whose only wrong step is
its second or third reading.

Then one step of REINFORCE is made on this response alone, by the policy of the warm start, which
has bad habits: the probability of each digit, before the step and after it, where the wrong
digit was written and where the digit before it was.
"""

import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import evaluation
import rollout
import tiny
import train
import vlm
from lab.common import command_line, read_outcome, writable
from lab.sweep import ROOT

DIGITS = "0123456789"
STEP_SIZE = 0.3  # of the one step of gradient descent: large, so that it can be seen


def is_clear(sample):
    """Is the second or the third of the four readings wrong, and no other step?"""
    wrong = [i for i, (*_, right) in enumerate(sample["steps"]) if not right]
    return sample["reward"] == 0 and wrong in ([1], [2])


def digit_probabilities(policy, batch, row, position):
    """The probability of each digit at a position of a response: ten responses that differ there
    are scored. (10,)."""
    rows = torch.full((len(DIGITS),), row)
    tokens = batch.tokens[rows].clone()
    tokens[:, position] = torch.tensor(policy.tokenizer.convert_tokens_to_ids(list(DIGITS)))
    with torch.no_grad():
        logp, _ = vlm.score(policy, vlm.take(batch.inputs, rows), tokens, batch.written[rows])
    return logp[:, position].exp()


def reinforce_step(policy, batch, row, advantage):
    """One step of gradient descent on -A log pi(y), the mean over the response's tokens."""
    rows = torch.tensor([row])
    parameters = list(policy.model.parameters())
    inputs = vlm.take(batch.inputs, rows)
    logp, _ = vlm.score(policy, inputs, batch.tokens[rows], batch.written[rows])
    loss = -advantage * logp[batch.written[rows]].mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= STEP_SIZE * gradient


def record(run, deaf) -> dict:
    """The episode. ValueError if no response is of the kind that is wanted."""
    batch = rollout.collect(run, np.arange(run.settings.batch), "eval")
    samples = evaluation.samples(run, batch, train.assign_credit(run, batch).advantages)
    row = next((row for row, sample in enumerate(samples) if is_clear(sample)), None)
    if row is None:
        raise ValueError(f"{run.folder}: none of {len(samples)} responses has one reading wrong")
    sample = samples[row]
    wrong = next(first for first, _, right in sample["steps"] if not right)
    with torch.no_grad():
        blind = rollout.values_of(
            deaf.models.critic, batch, batch.rollout.logp, torch.tensor([row])
        )
    baseline = float(batch.rollout.rewards.sum(1).mean())

    started_from = tiny.cached_warm_start(run.grading_env.unwrapped.task, run.settings)
    novice = vlm.load(started_from, run.settings.device)
    usual = run.progress.evaluations_before["temperature 1"]["eval_accuracy"]
    places = {"the wrong digit": wrong, "the right digit before it": wrong - 1}
    before = {name: digit_probabilities(novice, batch, row, t) for name, t in places.items()}
    reinforce_step(novice, batch, row, sample["reward"] - usual)
    after = {name: digit_probabilities(novice, batch, row, t) for name, t in places.items()}
    return {
        **sample,
        "blind_values": [round(value, 6) for value in blind[0, : len(sample["tokens"])].tolist()],
        "baseline": baseline,
        "step": {"size": STEP_SIZE, "advantage": sample["reward"] - usual},
        "digits": {
            name: {
                "position": t,
                "written": sample["tokens"][t],
                "before": [round(p, 6) for p in before[name].tolist()],
                "after": [round(p, 6) for p in after[name].tolist()],
            }
            for name, t in places.items()
        },
    }


def main(argv=None):
    """The command line."""
    parser = command_line("episode", __doc__)
    parser.add_argument("folder", type=Path, help="a finished run on SAPO/DiceSum-v0")
    parser.add_argument("deaf", type=Path, help="another, whose critic hears nothing")
    arguments = parser.parse_args(argv)
    file = writable(ROOT / "results" / "episode.json")
    try:
        deaf = train.build(*train.parse(["--resume", str(arguments.deaf)]))
        # Built last, as it restores the random stream that the responses are drawn from
        run = train.build(*train.parse(["--resume", str(arguments.folder)]))
        episode = record(run, deaf)
        summaries = [folder / "summary.json" for folder in (arguments.folder, arguments.deaf)]
        commands = [read_outcome(summary)["command"] for summary in summaries]
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.episode: {error}") from error
    outcome = {
        "command": f"python -m lab.episode {arguments.folder} {arguments.deaf}",
        "commands": commands,
        "seed": run.settings.seed,
        "date": time.strftime("%Y-%m-%d"),
        **episode,
    }
    checkpoint.write_json(file, outcome)


if __name__ == "__main__":
    main()
