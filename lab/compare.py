"""Compare methods on one budget: one warm start per seed, the same number of generated tokens.

    python -m lab.compare                      # SAPO and its neighbours on DiceSum (Table 1, small)
    python -m lab.compare --experiment cuts    # or tune, reuse, seeing, ... (lab/sweep.py)
    python -m lab.compare --experiment truth   # on one frozen policy: is the credit right, are the
                                               # values, the gradients? (lab/truth.py)
    python -m lab.compare --experiment lift    # does V jump where entropy is high, before and
                                               # after training? (lab/truth.py)
    python -m lab.compare --env SAPO/ArrowPath-v0 --env_args length=12 grid=4
    python -m lab.compare --methods sapo ppo --seeds 3 --tokens 300000 --lam 0.9

Flags that are not a sweep's are train.py's, and hold for every run. `--jobs` runs go side by side,
a process of one thread each. After each run the outcome, results/<experiment>-<task>.json, is
written anew; a sweep that was killed goes on, and makes no run whose outcome stands there. Outcomes
of other flags are not replaced: --tag keeps comparisons apart.

The learning rate of each method, and its lambda where it has one, is chosen by as many trials for
each (`--experiment tune`, with seeds of its own, on the same task and --tag), and read from
results/ where that exists. A line says so where only another tag was tuned.

Statistics as in Agarwal et al. (arXiv:2108.13264, the rliable paper): the interquartile mean over
seeds, and its 95% interval by bootstrap. Left out: significance tests; read the intervals.
"""

import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from tqdm import tqdm

import checkpoint
from lab.common import read_outcome, writable
from lab.sweep import (
    EXPERIMENTS,
    Sweep,
    execute,
    finished,
    kept_outcomes,
    outcome,
    plan,
    table,
    tuning_of_another_tag,
)
from lab.truth import check_left, check_runs, lifts, truth

# Flags of train.py that a run of a comparison has from its plan, and what to do in place of each
NOT_FOR_ALL = {
    "method": "choose by --methods, or another --experiment",
    "seed": "take --seeds, how many, and --first_seed",
    "token_budget": "take --tokens",
    "iterations": "--tokens alone ends a run: leave it out",
    "eval_every": "a run is evaluated at its start and its end: leave it out",
    "env_args": "write --env_args in full",
    "runs": "write --runs in full",
    "name": "take --tag",
    "resume": "a run goes on by itself where it was left: leave it out",
}


def parse(argv=None) -> tuple[Sweep, list[str]]:
    """The command line -> (the sweep, the flags that are train.py's).

    ValueError for a number out of its range, and for a flag of NOT_FOR_ALL.
    """
    parser = transformers.HfArgumentParser(
        Sweep,
        prog="python -m lab.compare",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    sweep, extra = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    for word in extra:
        given = word.split("=")[0].removeprefix("--").replace("-", "_")
        for flag, instead in NOT_FOR_ALL.items():
            # train.py refuses a flag's beginning; here it is told what to do in its place
            if word.startswith("--") and given and flag.startswith(given):
                raise ValueError(f"{word}: not for every run of a comparison; {instead}")
    if not sweep.tag:
        sweep.tag = "_".join(word.strip("-").replace("/", "_") for word in extra)
    return sweep, extra


def heading(sweep, argv) -> dict:
    """What every outcome says of itself: what was measured, by which command, when, with what."""
    return {
        "command": shlex.join(["python", "-m", "lab.compare", *argv]),
        "experiment": sweep.experiment,
        "task": sweep.task,
        "budget_tokens": sweep.tokens,
        "jobs": sweep.jobs,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def finished_runs(sweep, extra):
    """Make a sweep's runs, `jobs` at a time, but for those whose outcome the results have already.
    Yields the outcomes so far, each time one is done, in the order of a whole sweep: those that
    the plan does not have, because it is one of fewer methods or seeds, stay among them. Nothing
    where all were there: their file keeps the command and the date that made it."""
    runs = list(plan(sweep, extra))
    if not runs:
        raise ValueError(
            f"--experiment {sweep.experiment} --methods {' '.join(sweep.methods)}: no run of it is "
            f"for --env {sweep.env}; choose other methods, or another task"
        )
    kept = kept_outcomes(sweep, extra)
    missing = [run for run in runs if (run.label, run.seed) not in kept]
    planned = {(run.label, run.seed) for run in runs}
    others = [run for key, run in kept.items() if key not in planned]
    labels = list(EXPERIMENTS[sweep.experiment])
    if missing:
        check_runs([run.flags for run in missing])
        check_left([run.flags for run in missing])

    def place(run):
        known = run["label"] in labels
        return run["seed"], labels.index(run["label"]) if known else len(labels)

    def outcomes():
        done = list(others)
        for run in runs:
            if (run.label, run.seed) in kept:
                done.append(kept[run.label, run.seed])
            elif finished(run.folder):
                done.append(outcome(run))
        return sorted(done, key=place)

    bar = tqdm(total=len(missing), desc=f"{sweep.experiment} on {sweep.task}", disable=None)
    with bar, ThreadPoolExecutor(sweep.jobs) as pool:
        for _ in pool.map(lambda run: execute(run.folder, run.flags), missing):
            yield {"runs": outcomes()}
            bar.update()


def check_command(file, command):
    """ValueError where another command made the outcome of a file. It is of one piece, and would be
    replaced."""
    if not file.is_file():
        return
    earlier = read_outcome(file).get("command")
    if earlier != command:
        raise ValueError(
            f"{file}: made by {earlier!r}, and would be replaced by {command!r}; take another "
            "--tag or --results, or move the file away"
        )


def measure(sweep, extra):
    """The experiment. Yields its outcome so far, whenever a part of it is ready."""
    if sweep.experiment == "truth":
        return truth(sweep, extra)
    if sweep.experiment == "lift":
        return lifts(sweep, extra)
    return finished_runs(sweep, extra)


def main(argv=None):
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        sweep, extra = parse(argv)
        first_lines = heading(sweep, argv)
        writable(sweep.file)
        if line := tuning_of_another_tag(sweep):
            print(line, file=sys.stderr)
        if sweep.experiment in ("truth", "lift"):
            check_command(sweep.file, first_lines["command"])
        for part in measure(sweep, extra):
            checkpoint.write_json(sweep.file, first_lines | part)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.compare: {error}") from error
    if sweep.experiment in ("truth", "lift"):
        print(sweep.file.read_text())
    else:
        print(table(read_outcome(sweep.file)))


if __name__ == "__main__":
    main()
