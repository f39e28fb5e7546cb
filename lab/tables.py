"""The tables of README.md and docs/, made from the files under results/.

    python -m lab.tables      # prints all of them; tests hold the pages to them, row by row

The figures beside the tables are `python -m lab.figures results`.
"""

import re

import numpy as np

import sapo
from lab.common import command_line, read_outcome
from lab.stats import of_reuse
from lab.sweep import METHODS, ROOT, chosen_trial, collapsed, table, trials_of
from lab.theorems import THEOREMS

RESULTS = ROOT / "results"


def summaries(names) -> list[dict]:
    """The files of results/ that a pattern names, in the order of their names."""
    return [read_outcome(file) for file in sorted(RESULTS.glob(names))]


def markdown(heads, rows) -> str:
    """A table: its column heads, and rows of as many cells."""
    head, *body = (f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows))
    return "\n".join([head, "|---" * len(heads) + "|", *body])


def default_runs() -> list[dict]:
    """The summaries of `python train.py` with no flag but a seed."""
    return summaries("default-sapo-seed*.json")


def accuracies(run, kind) -> str:
    """A run's held-out accuracy by one way of decoding, before and after training."""
    before, after = (
        run[when][kind]["eval_accuracy"] for when in ("evaluations_before", "evaluations")
    )
    return f"{before:.3f} to {after:.3f}"


def default_table(runs) -> str:
    """Accuracy by the way of decoding, before and after, and what a run costs."""
    kinds = ("temperature 1", "temperature 0.6, top-p 0.95", "greedy")
    rows = [
        (
            run["seed"],
            *(accuracies(run, kind) for kind in kinds),
            f"{run['warm_start_seconds']:.0f} + {run['seconds']:.0f}",
            f"{run['peak_rss_mb']:.0f}",
        )
        for run in runs
    ]
    return markdown(("seed", *kinds, "seconds: warm start + RL", "peak MB"), rows)


def worlds_table(runs) -> str:
    """Runs on other tasks and games: what was run, accuracy before and after."""
    kinds = ("temperature 1", "greedy")
    rows = [
        (
            f"`{re.sub(' --name [^ ]+', '', run['command'])}`",
            run["seed"],
            *(accuracies(run, kind) for kind in kinds),
            f"{run['warm_start_seconds']:.0f} + {run['seconds']:.0f}",
            run["date"],
        )
        for run in runs
    ]
    return markdown(("run", "seed", *kinds, "seconds: warm start + RL", "date"), rows)


def mechanism_table(runs) -> str:
    """Whether the parts of the default run do their work: over the run or its second half, and
    its critic and credit at mid-run."""
    heads = (
        "seed",
        "explained variance, second half",
        "held out, at mid-run",
        "clip fraction",
        "largest approx_kl",
        "AUROC of TD errors: first wrong step",
        "all wrong steps",
        "share of blame on the first wrong step",
    )
    rows = []
    for run in runs:
        part = run["mechanism"]
        mid = part["mid_run"]
        rows.append(
            (
                run["seed"],
                f"{part['explained_variance_second_half']:.2f}",
                f"{mid['explained_variance']:.2f}",
                f"{part['clip_fraction']:.2%}",
                f"{part['largest_approx_kl']:.3f}",
                f"{mid['auroc_of_first_wrong_step']:.2f}",
                f"{mid['auroc_in_wrong_responses']:.2f}",
                f"{mid['own_credit']['share_on_first_wrong_step'][0]:.3f}",
            )
        )
    return markdown(heads, rows)


def critic_table(results) -> str:
    """What each variant of the critic sees at its last measurement: the mean over seeds."""
    measured = results["measured"]
    tasks = list(dict.fromkeys(row["task"] for row in measured))

    def cell(task, variant):
        ends = [
            row["curve"][-1]
            for row in measured
            if row["task"] == task and row["variant"] == variant
        ]
        if not ends:  # not measured yet
            return ""
        explained = np.mean([end["explained_variance"] for end in ends])
        auroc = np.mean([end["auroc_of_first_wrong_step"] for end in ends])
        share = np.mean([end["share_of_blame"][0] for end in ends])
        return f"{explained:.2f}, {auroc:.2f}, {share:.2f}"

    heads = ["critic", *(f"{task}: explained variance, AUROC, share of blame" for task in tasks)]
    names = {name: name for name in results["variants"]} | {"ceiling": "64 continuations"}
    rows = [(words, *(cell(task, name) for task in tasks)) for name, words in names.items()]
    return markdown(heads, rows)


def four_epochs_table(unbounded, bounded, free=()) -> str:
    """Four epochs, seed by seed: earlier runs without a KL bound, runs with the default's, and runs
    of the default without it."""
    heads = ("KL bound", "seed", "temperature 1", "greedy", "clip fraction", "largest approx_kl")
    rows = [
        (
            bound,
            run["seed"],
            accuracies(run, "temperature 1"),
            accuracies(run, "greedy"),
            f"{run['mechanism']['clip_fraction']:.2%}",
            f"{run['mechanism']['largest_approx_kl']:.3f}",
        )
        for bound, runs in (
            ("none, earlier settings", unbounded),
            (sapo.SAPOConfig().target_kl, bounded),
            ("none", free),
        )
        for run in runs
    ]
    return markdown(heads, rows)


# Runs of train.py on other tasks: {a table's name: {what the runs are: their files}}
TRIED = {
    "nine-dice-today-*.json": {"today's default": "nine-dice-today-seed*.json"},
    "nine-dice-*.json": {
        "warm start of 600 steps, lambda 0.8, clip 0.2, 65 rollouts": "nine-dice-600-seed*.json",
        "warm start of 1200 steps": "nine-dice-seed*.json",
        "the same, and the critic learns from the outcomes": "nine-dice-outcomes-seed*.json",
        "warm start of 1200 steps, lambda 0.95": "nine-dice-lambda-0.95-seed*.json",
        "the same, and the critic hears nothing": "nine-dice-deaf-seed*.json",
    },
    "arrows-today-*.json": {
        "warm start of 600 steps": "arrows-today-seed*.json",
        "warm start of 2400 steps, lambda 0.95": "arrows-today-2400-seed*.json",
    },
    "arrows-*.json": {
        "lambda 0.7": "arrows-default-seed*.json",
        "lambda 0.95": "arrows-lambda-0.95-seed*.json",
        "lambda 0.7, the critic hears nothing": "arrows-deaf-seed*.json",
        "lambda 0.7, whitened": "arrows-whitened-seed*.json",
    },
}


def tried_table(tried) -> str:
    """What was tried on a task, seed by seed. tried: {what the runs are: their summaries}."""
    heads = ("", "seed", "temperature 1", "greedy", "explained variance, second half", "tokens")
    rows = [
        (
            what,
            run["seed"],
            accuracies(run, "temperature 1"),
            accuracies(run, "greedy"),
            f"{run['mechanism']['explained_variance_second_half']:.2f}",
            run["generated_tokens"],
        )
        for what, runs in tried.items()
        for run in runs
    ]
    return markdown(heads, rows)


# Of the trials that name none: how widely the weights were drawn, and the warm start's rate
FIRST_START = {"spread": 0.02, "rate": 3e-3}


def trials_table(results) -> str:
    """The trials by which the defaults were chosen."""
    heads = (
        *("seed", "habits", "start", "critic hears", "critic first", "lambda", "batch"),
        *("epochs x steps", "rates"),
        *("half-life", "whitened", "clip", "KL bound", "tokens", "temperature 1", "greedy"),
        *("explained variance", "clip fraction"),
    )
    rows = [
        (
            *(trial[name] for name in ("seed", "habits")),
            "{spread:g}, {rate:g}".format(**trial.get("start", FIRST_START)),
            trial["critic_hears"],
            trial.get("value_pretraining", 0),
            *(trial[name] for name in ("lam", "batch")),
            f"{trial['epochs']} x {trial['batch'] // trial['minibatch']}",
            f"{trial['actor_lr']:g}, {trial['critic_lr']:g}",
            f"{trial['actor_half_life']:.0f}",
            "yes" if trial["whiten_advantages"] else "no",
            trial["clip_low"],
            trial["target_kl"] or "none",
            trial["generated_tokens"],
            f"{trial['accuracy']:.3f}",
            f"{trial['greedy']:.3f}",
            f"{trial['explained_variance_second_half']:.2f}",
            f"{trial['clip_fraction']:.2%}",
        )
        for trial in results["trials"]
    ]
    return markdown(heads, rows)


def cures_table(results) -> str:
    """What keeps alive a run that uses a rollout four times: a row per guard."""
    heads = (
        "guard",
        "temperature 1, by seed",
        "greedy, by seed",
        "collapsed",
        "clip fraction",
        "largest approx_kl",
    )
    rows = []
    for guard in dict.fromkeys(run["label"] for run in results["measured"]):
        of_guard = [run for run in results["measured"] if run["label"] == guard]
        runs = [run for run in of_guard if "failed" not in run]
        if not runs:
            rows.append((guard, *["diverged"] * 2, f"{len(of_guard)} of {len(of_guard)}", "", ""))
            continue
        _, clipped, kl = of_reuse(runs)
        rows.append(
            (
                guard,
                *(", ".join(f"{run[kind]:.3f}" for run in runs) for kind in ("accuracy", "greedy")),
                f"{sum(map(collapsed, runs)) + len(of_guard) - len(runs)} of {len(of_guard)}",
                f"{clipped:.1%}",
                f"{kl:.2g}",
            )
        )
    return markdown(heads, rows)


def reuse_table(results) -> str:
    """How often a rollout can be used: a row per variant (mostly kinds of ratio), a column per
    number of epochs. In a cell the IQM of the accuracy, how many runs collapsed, the mean share of
    tokens clipped, and the largest approx_kl of any run."""
    cells = {}  # kind -> {epochs: cell}
    for label in dict.fromkeys(run["label"] for run in results["runs"]):
        kind, epochs = label.rsplit(", ", 1)
        runs = [run for run in results["runs"] if run["label"] == label]
        accuracy, clipped, kl = of_reuse(runs)
        lost = sum(map(collapsed, runs))
        text = f"{accuracy:.3f}, {lost} of {len(runs)}, {clipped:.1%}, {kl:.2g}"
        cells.setdefault(kind, {})[epochs] = text
    columns = list(dict.fromkeys(epochs for row in cells.values() for epochs in row))
    rows = [(kind, *(row.get(epochs, "") for epochs in columns)) for kind, row in cells.items()]
    return markdown(("IQM, collapsed, clipped, largest approx_kl", *columns), rows)


def tuning_table(results) -> str:
    """A tuning: a row per method, and in a cell for each of its trials the mean accuracy over
    seeds, at temperature 1 and greedy. In bold the one that the comparison takes."""
    rows = []
    for method in METHODS:
        cells = []
        for flags, runs in trials_of(results["runs"], method).items():
            means = [np.mean([run[kind] for run in runs]) for kind in ("accuracy", "greedy")]
            words = flags.replace("--actor_lr ", "").replace(" --lam ", ", lambda ")
            cell = f"{words}: {means[0]:.3f}, {means[1]:.3f}"
            is_chosen = flags.split() == chosen_trial(results["runs"], method)
            cells.append(f"**{cell}**" if is_chosen else cell)
        if cells:
            rows.append((method, *cells))
    longest = max((len(row) for row in rows), default=1)
    rows = [(*row, *[""] * (longest - len(row))) for row in rows]
    return markdown(("method", *["rate: temperature 1, greedy"] * (longest - 1)), rows)


def truth_table(results) -> str:
    """Credit and gradients of each method on one policy (lab/truth.py): do the advantages tell
    right steps from wrong ones, and does the gradient point where the objective rises?"""
    heads = (
        "credit by",
        "AUROC of all steps",
        "within wrong answers",
        "of the first wrong step",
        "share of blame on it",
        "cosine with the reference gradient",
        "variance",
    )
    rows = []
    for name, of_method in results["methods"].items():
        low, high = of_method["auroc_interval"]
        share, cosine = of_method["share_on_first_wrong_step"], of_method["cosine"]
        rows.append(
            (
                name,
                f"{of_method['auroc']:.2f} ({low:.2f} to {high:.2f})",
                f"{of_method['auroc_in_wrong_responses']:.2f}",
                f"{of_method['auroc_of_first_wrong_step']:.2f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*share),
                "{:.2f} ({:.2f} to {:.2f})".format(*cosine),
                f"{of_method['variance']:.2f}",
            )
        )
    return markdown(heads, rows)


KINDS = {"gae": "advantages", "group": "advantages of groups", "ratio": "ratios", "loss": "losses"}


def theorem_tables(results) -> dict[str, str]:
    """{a kind of function: which theorems hold of which}, and under "failures" each failure: what
    was found, and what the function was asked."""
    tables, failures = {}, []
    for kind, called in KINDS.items():
        columns = [row for row in results["rows"] if row["kind"] == kind]
        names = list(dict.fromkeys(name for row in columns for name in row["verdicts"]))
        words = {"holds": "yes", "fails": "**no**", "does not apply": ""}
        rows = [
            (f"`{name}`", *(words[row["verdicts"][name]["outcome"]] for row in columns))
            for name in names
        ]
        tables[called] = markdown(("theorem", *(row["name"] for row in columns)), rows)
        for row in columns:
            for name, verdict in row["verdicts"].items():
                if verdict["outcome"] == "fails":
                    asked = "; then ".join(f"`{line}`" for line in verdict.get("asked", []))
                    failures.append((row["name"], f"`{name}`", verdict["reason"], asked))
    heads = ("function", "theorem", "found", "asked")
    return tables | {"failures": markdown(heads, failures)}


def statements() -> str:
    """The theorems in words."""
    rows = [
        (f"`{theorem.name}`", ", ".join(theorem.kinds), theorem.says, theorem.otherwise)
        for theorem in THEOREMS
    ]
    return markdown(("theorem", "of", "says", "where it does not hold"), rows)


def all_tables() -> dict[str, str]:
    """{where a table's numbers come from: the table}, of every table that results/ can give."""
    tables = {
        "default-sapo-seed*.json": default_table(default_runs()),
        "default-sapo-seed*.json, mechanism": mechanism_table(default_runs()),
    }
    kinds = ("epochs4-unbounded-seed*.json", "epochs4-seed*.json", "epochs4-free-seed*.json")
    four = tuple(map(summaries, kinds))
    if any(four):
        tables["epochs4-*.json"] = four_epochs_table(*four)
    worlds = summaries("worlds-*.json")
    if worlds:
        tables["worlds-*.json"] = worlds_table(worlds)
    for name, files_of in TRIED.items():
        tried = {what: summaries(files) for what, files in files_of.items()}
        if any(tried.values()):
            tables[name] = tried_table(tried)
    for file in sorted(RESULTS.glob("*.json")):
        results = read_outcome(file)
        if file.name == "critic.json":
            tables[file.name] = critic_table(results)
        elif file.name == "cures.json":
            tables[file.name] = cures_table(results)
        elif file.name == "trials.json":
            tables[file.name] = trials_table(results)
        elif file.name == "theorems.json":
            made = theorem_tables(results) | {"statements": statements()}
            tables |= {f"{file.name}, {what}": lines for what, lines in made.items()}
        elif results.get("experiment") == "truth":
            tables[file.name] = truth_table(results)
        elif results.get("experiment") == "reuse":
            tables[file.name] = reuse_table(results)
        elif results.get("experiment") == "tune" and results["runs"]:
            tables[file.name] = tuning_table(results)
        elif "runs" in results:
            tables[file.name] = table(results)
    return tables


def main():
    """Print every table."""
    try:
        tables = all_tables()
    except ValueError as error:  # a file that is damaged
        raise SystemExit(f"python -m lab.tables: {error}") from error
    for source, lines in tables.items():
        print(f"results/{source}\n\n{lines}\n")


if __name__ == "__main__":
    command_line("tables", __doc__).parse_args()
    main()
