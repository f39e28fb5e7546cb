"""Which steps does a policy get right: where the teacher's bad habit applies, and elsewhere?

    python -m lab.steps --name arrows-600 --env SAPO/ArrowPath-v0 --seed 3    # a warm start
    python -m lab.steps --name later --model runs/<name>/checkpoint           # what it became

The flags are train.py's. As many held-out questions as --batch, at --temperature; a step is right
given what the response said before it (`Task.check_steps`). -> results/steps-<name>.json
"""

import shlex
import sys
import time
from collections import Counter

import numpy as np
import torch

import checkpoint
import rollout
import train
from lab.common import writable
from lab.sweep import ROOT


@torch.no_grad()
def counted(run) -> dict:
    """{"hard" or "other": [steps, share of them that is right]} and the accuracy. Hard are those
    that the habit would change (`Task.hard_steps`). ValueError for a task that knows no steps."""
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
    return {"questions": len(batch.envs), "accuracy": accuracy, "steps": shares}


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings, config = train.parse(argv)
        file = writable(ROOT / "results" / f"steps-{train.folder_of(settings).name}.json")
        run = train.build(settings, config)
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
