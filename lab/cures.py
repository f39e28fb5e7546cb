"""What keeps a run alive that uses each rollout four times? Guards, one at a time.

    python -m lab.cures                       # every guard on every seed -> results/cures.json
    python -m lab.cures --seeds 0 1 --guards nothing "value clip"

At twice the default's rate, without a guard, four epochs over a rollout move the policy faster than
the critic follows: it lags, nearly every advantage turns negative, and all that was written is
pushed down. Each guard is one remedy for that, tried alone.

Two of them need code that train.py does not have: a critic whose values are bounded, and one that
learns from a rollout before the policy does. They stand here whole.

Runs that stand in the file already are not made again; an unfinished one begins anew. A run that
diverges is written down as one that failed.
"""

import argparse
import contextlib
import shlex
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import transformers

import checkpoint
import models
import rollout
import sapo
import train
from lab.common import LARGEST_SEED, command_line, read_outcome, whole, writable
from lab.sweep import ROOT, UNBOUNDED, Planned, differing, finished, outcome

# Settings from before there was a bound on the KL divergence, and twice the rate
FLAGS = [
    *("--epochs", "4", "--lam", "0.9", "--clip_low", "0.2", "--clip_high", "0.2"),
    *("--batch", "256", "--minibatch", "64", "--actor_lr", "4e-4", "--actor_half_life", "2e5"),
    *("--iterations", "15", "--eval_every", "100"),
]


class BoundedCritic(sapo.SegmentCritic):
    """V is a sigmoid, so it lies in (0, 1), as outcomes do, and cannot run away; it learns by
    squared error as ever. The head starts at zero, hence V at one half."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).sigmoid()


def critic_first(run, batch, credit) -> list[dict]:
    """In place of train.update: the critic learns from the rollout alone, then its values are read
    anew, and credit is assigned by them before the usual update. So it takes twice the steps."""
    critic = run.models.critic

    def value(rows):
        return rollout.values_of(critic, batch, batch.rollout.logp, rows)

    optimizers = (run.models.actor_optimizer, run.models.critic_optimizer)
    sapo.sapo_update(
        batch.rollout, credit.advantages, credit.returns, None, value, optimizers, run.config
    )
    with torch.no_grad():
        batch.rollout.values = value(torch.arange(len(batch.tokens)))
    return UPDATE(run, batch, train.assign_credit(run, batch))


UPDATE = train.update

# {guard: (flags of train.py, what stands in place of its code meanwhile)}
GUARDS = {
    "nothing": (UNBOUNDED, contextlib.nullcontext),
    "KL bound": (["--target_kl", "0.015"], contextlib.nullcontext),
    "whitened advantages": ([*UNBOUNDED, "--whiten_advantages"], contextlib.nullcontext),
    "value clip": ([*UNBOUNDED, "--value_clip", "0.2"], contextlib.nullcontext),
    "bounded critic": (
        UNBOUNDED,
        lambda: mock.patch.object(models, "SegmentCritic", BoundedCritic),
    ),
    "critic first": (UNBOUNDED, lambda: mock.patch.object(train, "update", critic_first)),
    "critic learns from outcomes": ([*UNBOUNDED, "--critic_lam", "1"], contextlib.nullcontext),
}


def planned(guard, seed, runs) -> Planned:
    """The run of a guard."""
    flags, _ = GUARDS[guard]
    folder = Path(runs) / f"cures/{guard.replace(' ', '-')}-seed{seed}"
    words = [*FLAGS, *flags, "--seed", str(seed), "--name", f"cures/{folder.name}", "--runs", runs]
    return Planned(guard, seed, folder, words)


def made(run: Planned) -> dict:
    """Make a run, unless it is there. -> its outcome; of one that diverged what it said."""
    _, in_place = GUARDS[run.label]
    if not finished(run.folder):
        try:
            with in_place():
                train.main(run.flags)
        except SystemExit as error:
            if not isinstance(error.__cause__, FloatingPointError | sapo.NaNError):
                raise  # refused, interrupted, a full disk: it says nothing of the guard
            failed = {"label": run.label, "seed": run.seed, "flags": shlex.join(run.flags)}
            return failed | {"failed": str(error)}
    if not finished(run.folder):  # stopped by Ctrl-C or SIGTERM
        raise SystemExit(f"{run.folder}: its training was stopped; give the same command again")
    return outcome(run)


def kept(file, runs) -> dict[tuple, dict]:
    """{(guard, seed): outcome} of the runs that the file has. ValueError where one of them, asked
    for now, would have other flags."""
    measured = read_outcome(file)["measured"] if file.is_file() else []
    for row in measured:
        again = planned(row["label"], row["seed"], runs)
        was, now = differing(shlex.split(row["flags"]), again.flags)
        if was != now:
            raise ValueError(
                f"{file}: {row['label']} of seed {row['seed']} was run with {was}, and would be "
                f"with {now} now; take --results and --runs of its own"
            )
    return {(row["label"], row["seed"]): row for row in measured}


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = command_line("cures", main.__doc__)
    parser.add_argument("--guards", nargs="+", default=list(GUARDS), choices=list(GUARDS))
    parser.add_argument("--seeds", nargs="+", type=whole(0, LARGEST_SEED), default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--results", default="results", help="folder of the outcome")
    return parser.parse_args(argv)


def main(argv=None):
    """Use each rollout four times, with one guard or another against a collapse."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    try:
        file = writable(ROOT / arguments.results / "cures.json")
        measured = kept(file, arguments.runs)
        told = {
            "command": shlex.join(["python", "-m", "lab.cures", *argv]),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        for seed in arguments.seeds:
            for guard in arguments.guards:
                if (guard, seed) not in measured:
                    run = planned(guard, seed, arguments.runs)
                    measured[guard, seed] = told | made(run)
                    checkpoint.write_json(file, {"measured": list(measured.values())})
        print(file)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.cures: {error}") from error


if __name__ == "__main__":
    main()
