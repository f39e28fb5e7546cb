"""Compare methods on one budget: one warm start per seed, the same number of generated tokens.

    python -m lab.compare                      # SAPO and its neighbours on DiceSum (Table 1, small)
    python -m lab.compare --experiment cuts    # or tune, topk, horizon, controls (lab/sweep.py)
    python -m lab.compare --experiment truth   # on one frozen policy: is the credit right, are the
                                               # values, the gradients? (lab/truth.py)
    python -m lab.compare --experiment lift    # does V jump where entropy is high, before and
                                               # after training? (lab/truth.py)
    python -m lab.compare --env SAPO/ArrowPath-v0 --env_args length=12 grid=4
    python -m lab.compare --methods sapo ppo --seeds 3 --tokens 300000 --lam 0.9

Flags that are not a sweep's are train.py's, and hold for every run. `--jobs` runs go side by side,
a process of one thread each; a sweep that was killed continues. After each run the outcome,
results/<experiment>-<task>.json, is written anew.

The learning rate of each method is chosen from one grid for all (`--experiment tune`, with seeds of
its own, on the same task and --tag), and read from results/ where that exists.

Statistics as in Agarwal et al. (arXiv:2108.13264, the rliable paper): the interquartile mean over
seeds, and its 95% interval by bootstrap. Left out: significance tests; read the intervals.
"""

import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from tqdm import tqdm

from lab.sweep import Sweep, execute, finished, outcome, plan, table
from lab.truth import lifts, truth


def parse(argv=None) -> tuple[Sweep, list[str]]:
    """The command line -> (the sweep, the flags that are train.py's)."""
    parser = transformers.HfArgumentParser(
        Sweep, prog="python -m lab.compare", description=__doc__.split("\n\n")[0]
    )
    sweep, extra = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
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
    """Make a sweep's runs, `jobs` at a time. Yields the outcomes so far, each time one is done."""
    runs = list(plan(sweep, extra))
    folders = [run.folder for run in runs]
    flags = [run.flags for run in runs]
    bar = tqdm(total=len(runs), desc=f"{sweep.experiment} on {sweep.task}", disable=None)
    with bar, ThreadPoolExecutor(sweep.jobs) as pool:
        for _ in pool.map(execute, folders, flags):
            yield {"runs": [outcome(run) for run in runs if finished(run.folder)]}
            bar.update()


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
    sweep, extra = parse(argv)
    first_lines = heading(sweep, argv)
    sweep.file.parent.mkdir(exist_ok=True)
    try:
        for part in measure(sweep, extra):
            sweep.file.write_text(json.dumps(first_lines | part, indent=1) + "\n")
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.compare: {error}") from error
    text = sweep.file.read_text()
    if sweep.experiment in ("truth", "lift"):
        print(text)
    else:
        print(table(json.loads(text)))


if __name__ == "__main__":
    main()
