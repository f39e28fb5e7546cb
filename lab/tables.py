"""The tables of README.md and docs/results.md, made from the files under results/.

    python -m lab.tables      # prints all of them; tests hold the pages to them, row by row

Imports nothing that trains. The figures beside the tables are `python -m lab.figures results`.
"""

import json
from pathlib import Path

import numpy as np

from lab.sweep import ROOT, table

RESULTS = ROOT / "results"


def read(name):
    """A file of results/."""
    return json.loads((RESULTS / name).read_text())


def default_runs() -> list[dict]:
    """The summaries of `python train.py` with no flag but a seed."""
    return [
        json.loads(file.read_text()) for file in sorted(RESULTS.glob("default-sapo-seed*.json"))
    ]


def default_table(runs) -> str:
    """Accuracy by the way of decoding, before and after, and what a run costs."""
    lines = [
        "| seed | temperature 1 | temperature 0.6, top-p 0.95 | greedy | "
        "seconds: warm start + RL | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        cells = []
        for kind, after in run["evaluations"].items():
            before = run["evaluations_before"][kind]["eval_accuracy"]
            cells.append(f"{before:.3f} to {after['eval_accuracy']:.3f}")
        lines.append(
            f"| {run['seed']} | {' | '.join(cells)} | "
            f"{run['warm_start_seconds']:.0f} + {run['seconds']:.0f} | {run['peak_rss_mb']:.0f} |"
        )
    return "\n".join(lines)


def mechanism_table(runs) -> str:
    """Whether the parts of the default run do their work: means over the run, or its second half,
    and its critic and credit at mid-run."""
    lines = [
        "| seed | explained variance, second half | clip fraction | largest approx_kl | "
        "AUROC of TD errors: first wrong step | all wrong steps | "
        "share of blame on the first wrong step |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        part = run["mechanism"]
        mid = part["mid_run"]
        lines.append(
            f"| {run['seed']} | {part['explained_variance_second_half']:.2f} | "
            f"{part['clip_fraction']:.2%} | {part['largest_approx_kl']:.3f} | "
            f"{mid['auroc_of_first_wrong_step']:.2f} | {mid['auroc_in_wrong_responses']:.2f} | "
            f"{mid['own_credit']['share_on_first_wrong_step'][0]:.2f} |"
        )
    return "\n".join(lines)


def critic_table(results) -> str:
    """What each variant of the critic sees at its last measurement: the mean over seeds."""
    measured = results["measured"]
    tasks = list(dict.fromkeys(row["task"] for row in measured))
    head = " | ".join(f"{task}: explained variance, AUROC, share of blame" for task in tasks)
    lines = [f"| critic | {head} |", "|---" * (1 + len(tasks)) + "|"]
    for variant in [*results["variants"], "ceiling"]:
        cells = []
        for task in tasks:
            ends = [
                row["curve"][-1]
                for row in measured
                if row["task"] == task and row["variant"] == variant
            ]
            if not ends:
                cells.append("")
                continue
            explained = np.mean([end["explained_variance"] for end in ends])
            auroc = np.mean([end["auroc_of_first_wrong_step"] for end in ends])
            share = np.mean([end["share_of_blame"][0] for end in ends])
            cells.append(f"{explained:.2f}, {auroc:.2f}, {share:.2f}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def guards_table(runs) -> str:
    """Four epochs at the default's rates, seed by seed."""
    lines = [
        "| seed | accuracy before, after 15 rollouts | greedy before, after | clip fraction | "
        "largest approx_kl |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        before, after = run["evaluations_before"], run["evaluations"]
        lines.append(
            f"| {run['seed']} | {before['temperature 1']['eval_accuracy']:.3f}, "
            f"{after['temperature 1']['eval_accuracy']:.3f} | "
            f"{before['greedy']['eval_accuracy']:.3f}, {after['greedy']['eval_accuracy']:.3f} | "
            f"{run['mechanism']['clip_fraction']:.2%} | "
            f"{run['mechanism']['largest_approx_kl']:.3f} |"
        )
    return "\n".join(lines)


def trials_table(results) -> str:
    """The trials by which the defaults were chosen."""
    lines = [
        "| seed | habits | critic hears | lambda | epochs x steps | rates | half-life | whitened | "
        "tokens | temperature 1 | greedy | explained variance | clip fraction |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trial in results["trials"]:
        lines.append(
            f"| {trial['seed']} | {trial['habits']} | {trial['critic_hears']} | {trial['lam']} | "
            f"{trial['epochs']} x {trial['batch'] // trial['minibatch']} | "
            f"{trial['actor_lr']:g}, {trial['critic_lr']:g} | {trial['actor_half_life']:.0f} | "
            f"{'yes' if trial['whiten_advantages'] else 'no'} | {trial['generated_tokens']} | "
            f"{trial['accuracy']:.3f} | {trial['greedy']:.3f} | "
            f"{trial['explained_variance_second_half']:.2f} | {trial['clip_fraction']:.2%} |"
        )
    return "\n".join(lines)


def all_tables() -> dict[str, str]:
    """{where a table's numbers come from: the table}, of every table that results/ can give."""
    tables = {
        "default-sapo-seed*.json": default_table(default_runs()),
        "default-sapo-seed*.json, mechanism": mechanism_table(default_runs()),
    }
    four = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("epochs4-seed*.json"))]
    if four:
        tables["epochs4-seed*.json"] = guards_table(four)
    for file in sorted(RESULTS.glob("*.json")):
        results = json.loads(file.read_text())
        if file.name == "critic.json":
            tables[file.name] = critic_table(results)
        elif file.name == "trials.json":
            tables[file.name] = trials_table(results)
        elif "runs" in results and results.get("experiment") != "tune":
            tables[file.name] = table(results)
    return tables


def main():
    """Print every table."""
    for source, lines in all_tables().items():
        print(f"results/{Path(source)}\n\n{lines}\n")


if __name__ == "__main__":
    main()
