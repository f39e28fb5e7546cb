"""Which steps does a policy get right, and what credit do they get: where the teacher's bad habit
applies, and elsewhere?

    python -m lab.steps --name arrows-600 --env SAPO/ArrowPath-v0 --seed 3    # a warm start
    python -m lab.steps --name early --iterations 3 --lam 0.7                 # three rollouts later
    python -m lab.steps --name later --model runs/<name>/checkpoint           # what it became

The flags are train.py's, but it trains only where --iterations is given, for so many rollouts. As
many held-out questions as --batch, at --temperature; a step is right given what the response said
before it (`Task.check_steps`). -> results/steps-<name>.json
"""

import shlex
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import torch

import checkpoint
import rollout
import train
from lab.common import writable
from lab.sweep import ROOT
from lab.truth import step_tokens


@torch.no_grad()
def counted(run) -> dict:
    """{"hard" or "other": [steps, share of them that is right]} and the accuracy. Hard are those
    that the habit would change (`Task.hard_steps`). Under a critic also what they are credited with
    (`credited`). ValueError for a task that knows no steps."""
    batch = rollout.collect(run, np.arange(run.settings.batch), "eval")
    steps, right = Counter(), Counter()
    for environment, pieces in zip(batch.envs, batch.texts, strict=True):
        task, example = environment.unwrapped.task, environment.unwrapped.example
        if not hasattr(task, "hard_steps"):
            raise ValueError(f"--env {run.settings.env}: expected a task that knows its steps")
        text = "".join(pieces)
        checked = task.check_steps(example, text), task.hard_steps(example, text)
        for is_right, is_hard in zip(*checked, strict=True):
            steps["hard" if is_hard else "other"] += 1
            right["hard" if is_hard else "other"] += is_right
    shares = {kind: [steps[kind], round(right[kind] / steps[kind], 4)] for kind in sorted(steps)}
    accuracy = np.mean([info["correct"] for info in batch.infos]).item()
    outcome = {"questions": len(batch.envs), "accuracy": accuracy, "steps": shares}
    if run.settings.credit == "critic":
        outcome["credit"] = credited(batch, train.assign_credit(run, batch).advantages)
    return outcome


def credited(batch, advantages) -> dict:
    """{"hard" or "other": {"read", "move" or "answer": {"right" or "wrong": [steps, mean reward of
    the responses that they stand in, mean advantage]}}}.

    advantages (B, T); a step's is the mean over its tokens. Empty steps, as they have none, are
    left out.
    """
    rewards = batch.rollout.rewards.sum(1)  # (B,)
    found = defaultdict(list)  # (hard or other, kind, right or wrong): [(reward, advantage), ...]
    for row, environment in enumerate(batch.envs):
        task, example = environment.unwrapped.task, environment.unwrapped.example
        text = "".join(batch.texts[row])
        known = task.step_spans(text), task.hard_steps(example, text), task.step_kinds(text)
        of_steps = [(hard, kind) for (i, j), hard, kind in zip(*known, strict=True) if j > i]
        steps = step_tokens(environment, batch.texts[row])
        for (first, end, is_right), (is_hard, kind) in zip(steps, of_steps, strict=True):
            place = "hard" if is_hard else "other", kind, "right" if is_right else "wrong"
            advantage = advantages[row, first:end].mean()
            found[place].append((rewards[row].item(), advantage.item()))
    credit = defaultdict(lambda: defaultdict(dict))
    for (habit, kind, verdict), pairs in sorted(found.items()):
        means = np.mean(pairs, axis=0).round(4).tolist()
        credit[habit][kind][verdict] = [len(pairs), *means]
    return credit


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings, config = train.parse(argv)
        file = writable(ROOT / "results" / f"steps-{train.folder_of(settings).name}.json")
        run = train.build(settings, config)
        for _ in range(train.given_flags(argv).get("iterations", 0)):
            train.iterate(run)
        torch.manual_seed(run.settings.seed)
        outcome = counted(run)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.steps: {error}") from error
    command = shlex.join(["python", "-m", "lab.steps", *argv])
    outcome = {"command": command, "date": time.strftime("%Y-%m-%d"), **outcome}
    checkpoint.write_json(file, outcome)
    print(checkpoint.as_json(outcome, indent=1))


if __name__ == "__main__":
    main()
