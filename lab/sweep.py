"""A sweep: which runs a comparison of methods needs, running them, and the table of what came out.

The budget of a run counts every token that the policy writes in training: groups, trees and
Monte-Carlo continuations too. Each run is a `python train.py` of its own with one thread, so a
sweep that was killed goes on where it was. The command line is lab/compare.py.
"""

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import baselines
import checkpoint
import sapo
from lab.common import read_outcome
from lab.stats import interval, probability_of_improvement
from sapo import setting

ROOT = Path(__file__).parent.parent


# --------------------------------------------------------------------------- what is compared
METHODS = list(baselines.SETTINGS)
RATES = ("5e-5", "1e-4", "2e-4", "4e-4")

# The trials of the tuning, as many for every method: four learning rates, or two by two lambdas
# where the method has a lambda. Of trials that end within a standard error of the best, the first
# is taken: the smallest rate, and the lambda that trusts the critic less.
TRIALS = {
    **{method: [f"--actor_lr {rate}" for rate in RATES] for method in METHODS},
    **{
        method: [f"--actor_lr {rate} --lam {lam}" for lam in (0.95, 0.9) for rate in RATES[1:3]]
        for method in ("sapo", "ppo", "vc-ppo")
    },
}

# Monte-Carlo values cost many tokens per response, so these methods take smaller batches from the
# same budget, and as many optimizer steps from each.
BATCHES = {
    "spo-chain": ["--batch", "32", "--minibatch", "8", "--continuations", "4"],
    "vineppo": ["--batch", "16", "--minibatch", "4", "--continuations", "4"],
}

CUTS = ("topk", "causal", "delimiter", "low-prob", "fixed")
TOP_K_PERCENT = (5, 10, 20, 30, 50, 100)

# How often can a rollout be used? The ratio and its clip are there for that, so the bound on the KL
# divergence, a guard of ours, is off in every variant but the last.
UNBOUNDED = ["--target_kl", "inf"]
# Where no clip is named: a token's ratio, and a product of them, scatter more than a mean over a
# segment or a response, so those two have the wider clip that PPO has, and the others train.py's.
# The segment's ratio and the token's are there with either.
WIDE = ["--clip_low", "0.2", "--clip_high", "0.2"]
REUSED = {
    "segment ratio": UNBOUNDED,
    "segment ratio, clip 0.2": [*WIDE, *UNBOUNDED],
    "token ratio": ["--ratio", "token", *WIDE, *UNBOUNDED],
    "token ratio, clip 0.04": ["--ratio", "token", *UNBOUNDED],
    "response ratio": ["--ratio", "response", *UNBOUNDED],
    "product of ratios": ["--ratio", "product", *WIDE, *UNBOUNDED],
    "no clip": ["--clip_low", "1", "--clip_high", "inf", *UNBOUNDED],
    "ppo": ["--method", "ppo", *UNBOUNDED],
    "grpo": ["--method", "grpo", *UNBOUNDED],
    "segment ratio and KL bound": [],
}

# Who plays games, each at two rates, which is all the tuning there is: the grid is shown whole
PLAYERS = {
    "sapo": ["--lam", "0.95"],
    "sapo, a segment is a turn": ["--lam", "0.95", "--cut", "turn"],
    "ppo": ["--method", "ppo", "--lam", "0.95"],
    "grpo": ["--method", "grpo"],
}

# {experiment: {label: the flags of train.py that make this variant}}
EXPERIMENTS = {
    "tune": {
        f"{method} {trial}": ["--method", method, *trial.split()]
        for method in METHODS
        for trial in TRIALS[method]
    },
    "main": {
        **{method: ["--method", method] for method in METHODS},
        "ppo, lambda of sapo": ["--method", "ppo", "--lam", str(sapo.SAPOConfig().lam)],
    },
    "reuse": {
        f"{name}, {epochs} epochs": [*flags, "--epochs", str(epochs)]
        for epochs in (1, 2, 4, 8)
        for name, flags in REUSED.items()
    },
    "cuts": {cut: ["--cut", cut] for cut in CUTS},
    "topk": {f"{percent}%": ["--top_k", str(percent / 100)] for percent in TOP_K_PERCENT},
    # Does it pay that credit lands on the wrong step? Critics that hear and that do not, at the
    # tuned lambda and at the paper's; then values by sampling, which need no critic; then no
    # values at all.
    "seeing": {
        "sapo": [],
        "sapo, lambda 0.99": ["--lam", "0.99"],
        "sapo, hears nothing": ["--critic_hears", "nothing"],
        "sapo, hears nothing, lambda 0.99": ["--critic_hears", "nothing", "--lam", "0.99"],
        **{method: ["--method", method] for method in ("ppo", "vineppo", "spo-tree", "grpo")},
    },
    # The default, its lambda of before, and a clip that does not hold back, on many seeds. With a
    # --tag of its own, as "parts"
    "seeds": {
        "sapo": [],
        "sapo, lambda 0.7": ["--lam", "0.7"],
        "sapo, clip 0.2": WIDE,
    },
    # The default, with the paper's lambda, with a smaller one, and with what is ours in it, not the
    # paper's, taken away. With a --tag of its own: without one the tuned rate and lambda take the
    # place of the default's
    "parts": {
        "sapo": [],
        "sapo, lambda 0.99": ["--lam", "0.99"],
        "sapo, lambda 0.7": ["--lam", "0.7"],
        "sapo, hears nothing": ["--critic_hears", "nothing"],
        "sapo, no KL bound": UNBOUNDED,
    },
    # How far ahead must lambda look on a longer chain? Beside "main", where it is the tuned one.
    "horizon": {
        "sapo, lambda 0.99": ["--lam", "0.99"],
        "ppo, lambda 0.99": ["--method", "ppo", "--lam", "0.99"],
    },
    "games": {
        f"{name}, rate {rate}": [*flags, "--actor_lr", rate]
        for rate in ("4e-4", "2e-4")
        for name, flags in PLAYERS.items()
    },
    "controls": {
        "sapo": [],
        "sapo, token ratio": ["--ratio", "token", *WIDE],
        "sapo, clip 0.2": WIDE,
        "sapo, V at end": ["--value_at", "end"],
        "sapo, token mean": ["--average", "token"],
    },
}


@dataclass
class Sweep:
    """What to compare."""

    experiment: str = setting("main", f"one of {', '.join(EXPERIMENTS)}, truth, lift")
    methods: list[str] = setting([], "only these methods, in place of all of the experiment")
    env: str = setting("SAPO/DiceSum-v0", "Gymnasium id of the task")
    env_args: list[str] = setting([], "keywords of the task: n=9, length=12 grid=5")
    tag: str = setting(
        "", "one more word in the names of the outcome and the runs; by default train.py's flags"
    )
    seeds: int = setting(5, "runs per method", "[1, 1000]")
    first_seed: int = setting(
        0, "the first of them; tuning takes others than the comparison", "[0, 4294967295]"
    )
    tokens: int = setting(
        500_000, "budget of a run, in tokens generated while training", "[1, inf)"
    )
    jobs: int = setting(2, "processes side by side, one thread each", "[1, inf)")
    runs: str = setting("runs", "folder of all runs")
    results: str = setting("results", "folder of the outcomes")

    def __post_init__(self):
        sapo.check_settings(self)

    @property
    def task(self) -> str:
        """The task and its keywords in one word: "ArrowPath-length=12-grid=4"."""
        return "-".join([self.env.split("/")[-1].split("-")[0], *self.env_args])

    @property
    def name(self) -> str:
        """What the outcome's file and the folder of the runs are called."""
        words = [self.experiment, self.task]
        if self.tag:
            words.append(self.tag)
        return "-".join(words).replace("/", "_")  # one name, and no way out of the folder

    @property
    def file(self) -> Path:
        """Where the outcome is written."""
        return ROOT / self.results / f"{self.name}.json"

    @property
    def task_flags(self) -> list[str]:
        """The task, as flags of train.py."""
        flags = ["--env", self.env]
        if self.env_args:
            flags += ["--env_args", *self.env_args]
        return flags


# ----------------------------------------------------------------------------------- the runs
class Planned(NamedTuple):
    """A run of a sweep, made already or not."""

    label: str  # the variant's name within the experiment
    seed: int
    folder: Path
    flags: list[str]  # of train.py


def best_trial(sweep: Sweep, method: str) -> list[str]:
    """A method's first trial within a standard error of the tuning's best, as flags of train.py.

    The tuning is the "tune" experiment of the same task and tag. No flags where it has no run of
    this method: then train.py's defaults hold.
    """
    file = replace(sweep, experiment="tune").file
    if sweep.experiment == "tune" or not file.is_file():
        return []
    return chosen_trial(read_outcome(file)["runs"], method)


def tuning_of_another_tag(sweep: Sweep) -> str:
    """A line where the task is tuned, but not under the sweep's tag, so that `best_trial` finds
    nothing; "" otherwise."""
    own = replace(sweep, experiment="tune").file
    untagged = replace(sweep, experiment="tune", tag="").file
    if sweep.experiment in ("tune", "truth", "lift") or own.is_file() or not untagged.is_file():
        return ""
    return (
        f"{own.name} is not there: rates and lambdas are train.py's defaults, where no flag says "
        f"otherwise, and not those of {untagged.name}"
    )


def trials_of(runs: list[dict], method: str) -> dict[str, list[dict]]:
    """{flags of a trial: its runs} of a method in a tuning, in the order of its file, which is that
    of the grid. Read from the runs: tunings on other tasks, or of other days, had other grids."""
    trials = {}
    for run in runs:
        of_method, _, flags = run["label"].partition(" ")
        if of_method == method:
            trials.setdefault(flags, []).append(run)
    return trials


def chosen_trial(runs: list[dict], method: str) -> list[str]:
    """`best_trial` of a tuning's runs."""
    accuracies = {
        trial: [run["accuracy"] for run in of_trial]
        for trial, of_trial in trials_of(runs, method).items()
    }
    if not accuracies:
        return []
    best, seeds = max((np.mean(of_trial), len(of_trial)) for of_trial in accuracies.values())
    # The standard error of 512 evaluations per seed alone: runs vary more than that.
    enough = best - math.sqrt(best * (1 - best) / (512 * seeds))
    return next(
        trial.split() for trial, of_trial in accuracies.items() if np.mean(of_trial) >= enough
    )


def lambda_of(sweep: Sweep, method: str, extra: list[str]) -> str:
    """The lambda at which the sweep runs a method: that of the user's flags, the tuned one, or
    train.py's default."""
    default = baselines.SETTINGS[method].get("lam", sapo.SAPOConfig().lam)
    return by_flag([*best_trial(sweep, method), *extra]).get("--lam", str(default))


def method_of(variant: list[str]) -> str:
    """The method that a variant's flags name, or train.py's default."""
    return variant[variant.index("--method") + 1] if "--method" in variant else "sapo"


def of_methods(sweep: Sweep, variants: dict[str, list[str]]) -> dict[str, list[str]]:
    """The variants of the sweep's --methods, or all. ValueError for a method that none has."""
    known = dict.fromkeys(map(method_of, variants.values()))
    for method in sweep.methods:
        if method not in known:
            raise ValueError(
                f"--methods {method}: expected some of those that --experiment {sweep.experiment} "
                f"has: {', '.join(known)}"
            )
    wanted = sweep.methods or known
    return {label: flags for label, flags in variants.items() if method_of(flags) in wanted}


def plan(sweep: Sweep, extra: list[str]):
    """Every run of the sweep, all variants on a seed before the next seed. Yields Planned.

    `extra`: flags of train.py for every run. They win over the tuned ones; a method's own
    batch and a variant's own flags win over them. Raises ValueError for an unknown experiment, and
    for a method that it does not have.
    """
    if sweep.experiment not in EXPERIMENTS:
        known = ", ".join([*EXPERIMENTS, "truth", "lift"])
        raise ValueError(f"--experiment {sweep.experiment}: expected one of {known}")
    variants = of_methods(sweep, EXPERIMENTS[sweep.experiment])
    for seed in range(sweep.first_seed, sweep.first_seed + sweep.seeds):
        for label, variant in variants.items():
            method = method_of(variant)
            if label == "ppo, lambda of sapo":
                of_sapo, own = (lambda_of(sweep, name, extra) for name in ("sapo", "ppo"))
                if of_sapo == own:
                    continue  # it is PPO once more
                variant = [*variant, "--lam", of_sapo]
            if method == "srpo" and "TextSum" in sweep.env:  # it weighs what was seen on a picture
                continue
            words = label.replace(" ", "_").replace(",", "")
            name = f"{sweep.name}/{words}-seed{seed}"
            flags = [
                *sweep.task_flags,
                *best_trial(sweep, method),
                *extra,
                *BATCHES.get(method, []),
                *variant,
            ]
            flags += ["--seed", str(seed), "--name", name, "--runs", sweep.runs]
            # The budget alone ends a run, and it is evaluated at its start and its end only.
            flags += ["--token_budget", str(sweep.tokens), "--iterations", "100000"]
            flags += ["--eval_every", "100000"]
            yield Planned(label, seed, Path(sweep.runs) / name, flags)


def kept_outcomes(sweep: Sweep, extra: list[str]) -> dict[tuple, dict]:
    """{(label, seed): outcome} of the runs that an earlier sweep, perhaps on another machine, has
    left in the results: they are not made again.

    ValueError where one of them, asked for now, would have other flags: then the file is of
    another comparison. Labels that this version does not know are taken as they are.
    """
    if not sweep.file.is_file():
        return {}
    kept = {(run["label"], run["seed"]): run for run in read_outcome(sweep.file)["runs"]}
    for of_seed in sorted({seed for _, seed in kept}):
        for planned in plan(replace(sweep, methods=[], first_seed=of_seed, seeds=1), extra):
            if (planned.label, of_seed) in kept:
                earlier = shlex.split(kept[planned.label, of_seed]["flags"])
                was, now = differing(earlier, planned.flags)
                if was != now:
                    raise ValueError(
                        f"{sweep.file}: its {planned.label} of seed {of_seed} was run with {was}, "
                        f"and would be with {now} now; one file holds one comparison: take "
                        "another --tag, or --results and --runs of its own"
                    )
    return kept


def differing(one: list[str], other: list[str]) -> tuple[str, str]:
    """The flags in which two runs differ, as each of them has these; equal words where they differ
    in nothing. Where a run lies is no part of it."""
    values = by_flag(one), by_flag(other)
    names = [name for name in values[0] | values[1] if name != "--runs"]
    names = [name for name in names if values[0].get(name) != values[1].get(name)]
    was, now = (
        ", ".join(f"{name} {of_run[name]}" if name in of_run else f"no {name}" for name in names)
        for of_run in values
    )
    return was, now


def by_flag(words: list[str]) -> dict[str, str]:
    """{flag: its values} of a command line; of a flag that stands there twice the last counts."""
    values, flag = {}, ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values[flag] = value
        else:
            values[flag] = f"{values.get(flag, '')} {word}".strip()
    return values


def finished(folder: Path) -> bool:
    """Is the run in this folder done? train.py writes summary.json last."""
    return (folder / "summary.json").is_file()


def execute(folder: Path, flags: list[str]):
    """Make one run, from where it was left; its output goes to <folder>.log.

    Raises ChildProcessError, with the log and its last line, when train.py fails.
    """
    if finished(folder):
        return
    with contextlib.suppress(ValueError):  # no checkpoint: it starts from nothing
        checkpoint.newest(folder)
        flags = [*flags, "--resume", str(folder)]  # a module is imported only where it is named
    command = [sys.executable, "train.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        process = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
    if process.returncode or not finished(folder):
        said = Path(f"{folder}.log").read_text(errors="replace").strip() or "nothing"
        raise ChildProcessError(
            f"{shlex.join(command)} ended with {process.returncode} and said: "
            f"{said.splitlines()[-1]}; see {folder}.log"
        )


# ------------------------------------------------------------------------------ what came out
SUMMARISED = (
    "warm_start_accuracy",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "generated_tokens",
    "seconds",
)
CURVES = (
    "accuracy",
    "entropy",
    "value_loss",
    "explained_variance",
    "clip_fraction",
    "approx_kl",
    "response_tokens",
    "segments_per_response",
)


def training_curve(rows: list[dict], bins: int = 20) -> dict[str, list]:
    """A run's metrics as means over at most `bins` equal parts, and the tokens at a part's end."""
    parts = np.array_split(np.arange(len(rows)), min(bins, len(rows)))
    curve = {"generated_tokens": [rows[part[-1]]["generated_tokens"] for part in parts]}
    for metric in CURVES:
        if metric in rows[-1]:  # GRPO has no value loss
            curve[metric] = [_mean_of(metric, [rows[i] for i in part]) for part in parts]
    return curve


def _mean_of(metric, rows):
    """The mean over the rows that have the metric, NaN if none has: a row of skipped updates has no
    loss, and while VC-PPO's critic learns alone the policy has no numbers."""
    values = [float(row[metric]) for row in rows if metric in row]  # "inf" is a word there
    return round(float(np.mean(values)), 5) if values else math.nan


def outcome(planned: Planned) -> dict:
    """What results/ keeps of a finished run: numbers of its summary, and its training curve."""
    summary = read_outcome(planned.folder / "summary.json")
    lines = (planned.folder / "metrics.jsonl").read_text().splitlines()
    # The evaluation before training stands in a row of its own, without a learning rate.
    rows = [json.loads(line) for line in lines if '"actor_lr"' in line]
    return {
        "label": planned.label,
        "seed": planned.seed,
        "flags": shlex.join(planned.flags),
        "iterations": len(rows),
        **{key: summary[key] for key in SUMMARISED},
        "greedy_before": summary["evaluations_before"]["greedy"]["eval_accuracy"],
        "greedy": summary["evaluations"]["greedy"]["eval_accuracy"],
        "curve": training_curve(rows),
    }


def collapsed(run: dict) -> bool:
    """Has a run unlearned? It ends below where its warm start was, at temperature 1."""
    return run["accuracy"] < run["warm_start_accuracy"]


def table(results: dict) -> str:
    """A comparison's outcome as a Markdown table: per variant the IQM over seeds, 95% interval.

    Accuracy at temperature 1 and greedy, before and after. "first beats it": the probability that a
    run of the table's first variant ends above one of this variant (rliable's probability of
    improvement), at temperature 1.
    """
    lines = [
        "| | seeds | before: temperature 1, greedy | after, temperature 1: IQM, 95% interval | "
        "after, greedy: IQM, 95% interval | first beats it | tokens | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_label = {}
    for run in results["runs"]:
        by_label.setdefault(run["label"], []).append(run)
    first = None
    for label, runs in by_label.items():
        before, greedy_before, tokens, seconds = (
            np.mean([run[key] for run in runs])
            for key in ("warm_start_accuracy", "greedy_before", "generated_tokens", "seconds")
        )
        after = [run["accuracy"] for run in runs]
        greedy = [run["greedy"] for run in runs]
        beaten = ""
        if first is None:
            first = after
        else:
            beaten = "{:.2f} ({:.2f} to {:.2f})".format(*probability_of_improvement(first, after))
        lines.append(
            f"| {label} | {len(runs)} | {before:.3f}, {greedy_before:.3f} | {_shares(after)} | "
            f"{_shares(greedy)} | {beaten} | {tokens:.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _shares(accuracies):
    """The IQM of accuracies with its 95% interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*interval(accuracies))
