"""Pictures of runs and comparisons, drawn from the files that train.py and lab.compare left.

    python -m lab.figures runs/<name>    learning_curve.png, credit.html, credit.svg in that folder
    python -m lab.figures results        every comparison, as SVG beside its JSON
    python -m lab.figures tutorial       those of tutorial.md (lab/tutorial_figures.py)

The learning curve asks: did it learn and stay healthy? A comparison: where did each method end, and
how did it get there? SAPO stands out in one colour; the others are grey, named where they end.

Imports nothing that trains, so that a picture can be made again long after the run; matplotlib only
when it draws. The same files give the same SVG, to the byte. Left out: what needs the model itself.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np

from lab.common import (
    BLUE,
    FAINT,
    GREEN,
    PURPLE,
    VERMILLION,
    new_figure,
    read_metrics,
    run_title,
    save_svg,
)
from lab.credit_page import credit_map
from lab.explorer import explorer
from lab.stats import interval, iqm

# Grey lines of one picture differ in their shade and, from the fourth on, in their dashes.
GREYS = ("#404040", "#A0A0A0", "#707070")
DASHES = ("-", "--", ":")
LABEL_SIZE = 9  # points, of the names at the ends of lines
# Of each experiment: what a row of it is, and the row that is SAPO with its default settings.
ROWS = {
    "main": ("method", "sapo"),
    "horizon": ("method", "sapo, lambda 0.99"),
    "games": ("player", "sapo, rate 4e-4"),
    "controls": ("variant of SAPO", "sapo"),
    "seeing": ("way to credit", "sapo"),
    "cuts": ("way to cut", "topk"),
    "topk": ("value of top-k", "30%"),
}


# -------------------------------------------------------------------- what all pictures share


def _read_results(file):
    """A JSON that lab.compare wrote."""
    return json.loads(Path(file).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- the learning curve


def _moving_mean(iterations, values):
    """The centred mean over about a tenth of the run: (iterations, means, values in a window).

    None within half a window of an edge: the mean of what is left of a window there would start too
    high in a run that rises. None at all below 20 values, where a window holds one.
    """
    reach = len(values) // 20
    window = 2 * reach + 1
    if reach == 0:
        return [], [], window
    means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    return iterations[reach : len(values) - reach], means, window


def _draw_metric(axes, lines, key, colour, scale=1.0):
    """Draw a metric as logged (thin) and its moving mean (thick); return the values drawn.

    Says so on the axes where the metric is absent.
    """
    logged = {line["iteration"]: line[key] for line in lines if key in line}  # the later of two
    if not logged:
        middle = {"transform": axes.transAxes, "ha": "center", "color": FAINT}
        axes.text(0.5, 0.5, "not logged in this run", **middle)
        return []
    iterations = sorted(logged)
    values = [scale * logged[iteration] for iteration in iterations]
    thin = {"color": colour, "linewidth": 0.8, "alpha": 0.45}
    dot = "." if len(values) == 1 else None  # a line of one point would be invisible
    axes.plot(iterations, values, marker=dot, label="training batch", **thin)
    centres, means, window = _moving_mean(iterations, values)
    if means:
        thick = {"color": colour, "linewidth": 2.2}
        axes.plot(centres, means, label=f"mean over {window} iterations", **thick)
    return values


def _draw_held_out(axes, lines):
    """Draw held-out accuracies (%) with their intervals; return [(iteration, accuracy)], sorted."""
    evaluations = {line["iteration"]: line for line in lines if "eval_accuracy" in line}
    iterations = sorted(evaluations)
    accuracies, below, above = [], [], []
    for iteration in iterations:
        evaluation = evaluations[iteration]
        accuracy = evaluation["eval_accuracy"]
        accuracies.append(accuracy)
        below.append(100 * max(0, accuracy - evaluation.get("eval_low", accuracy)))
        above.append(100 * max(0, evaluation.get("eval_high", accuracy) - accuracy))
    if iterations:
        percent = [100 * accuracy for accuracy in accuracies]
        style = {"fmt": "o", "color": VERMILLION, "markersize": 5, "capsize": 3, "zorder": 3}
        label = "held-out, 95% interval"
        axes.errorbar(iterations, percent, [below, above], label=label, **style)
    return list(zip(iterations, accuracies, strict=True))


def _draw_critic(axes, lines):
    """Draw the critic's explained variance, with a dashed line at that of a constant guess.

    Not the value loss: that also falls because answers become alike, and the critic knows nothing.
    """
    explained = _draw_metric(axes, lines, "explained_variance", GREEN)
    if explained:
        axes.axhline(0, color=FAINT, linestyle="--", linewidth=1)
    lowest = min((value for value in explained if math.isfinite(value)), default=0)
    bottom = max(-1, min(0, lowest)) - 0.05  # an untaught critic can be far below -1: left out
    axes.set(ylim=(bottom, 1.05), ylabel="explained variance of the outcomes")
    axes.set_title("Critic: 1 perfect, 0 a constant guess")


def learning_figure(lines, title):
    """Accuracy, entropy and the critic's explained variance over the iterations, as a figure.

    `lines` are the objects of metrics.jsonl without nulls. The title is completed by the outcome:
    held-out accuracy at the first and at the last evaluation.
    """
    figure, (accuracy, entropy, critic) = new_figure(12, 4, 3, dpi=150)
    _draw_metric(accuracy, lines, "accuracy", BLUE, scale=100)
    held_out = _draw_held_out(accuracy, lines)
    accuracy.set(ylim=(-2, 102), ylabel="responses that are right (%)")
    accuracy.set_title("Accuracy: higher is better")
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(loc="lower right", fontsize=9)
    _draw_metric(entropy, lines, "entropy", PURPLE)
    entropy.set_ylim(bottom=0)
    entropy.set(title="Entropy: should not collapse to zero", ylabel="entropy (nats per token)")
    _draw_critic(critic, lines)
    last = max(line["iteration"] for line in lines)
    for axes in (accuracy, entropy, critic):
        axes.set(xlabel="iteration", xlim=(-0.02 * last - 0.5, 1.02 * last + 0.5))
    if len(held_out) > 1:
        (_, first), (iterations, final) = held_out[0], held_out[-1]
        title += f": held-out accuracy {first:.0%} → {final:.0%} in {iterations} iterations"
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    return figure


def learning_curve(run_folder):
    """Write `learning_figure` as learning_curve.png into a run's folder; return its path.

    Raises FileNotFoundError for a missing metrics.jsonl, ValueError for an unusable one,
    ImportError without matplotlib.
    """
    run_folder = Path(run_folder)
    figure = learning_figure(read_metrics(run_folder / "metrics.jsonl"), run_title(run_folder))
    path = run_folder / "learning_curve.png"
    figure.savefig(path)
    return path


# ---------------------------------------------------------------------- parts of a comparison


def _task(results):
    """The task in words: "ArrowPath (length=10, grid=4)" for "ArrowPath-length=10-grid=4"."""
    name, _, keywords = results["task"].partition("-")
    if not keywords:
        return name
    return f"{name} ({keywords.replace('-', ', ')})"


def _counted(number, noun):
    """A number, in words up to nine, of what the noun says: "nine methods", "six ways to cut"."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    in_words = words[number] if number < len(words) else str(number)
    thing, *what_kind = noun.split(" ")
    if number != 1:
        thing += "s"
    return " ".join([in_words, thing, *what_kind])


def _runs_by_label(results):
    """The runs of every variant, in the order of the file: {label: [run, ...]}."""
    runs = {}
    for run in results["runs"]:
        runs.setdefault(run["label"], []).append(run)
    return runs


def _mean_curve(runs, key):
    """A metric through training, mean over runs: (generated tokens in thousands, values).

    Both empty where no run logged it. Ends with the shortest run: behind it, fewer seeds would
    speak.
    """
    curves = [run["curve"] for run in runs if key in run["curve"]]
    if not curves:
        return [], []
    parts = min(len(curve[key]) for curve in curves)
    tokens = np.mean([curve["generated_tokens"][:parts] for curve in curves], axis=0)  # (parts,)
    values = np.mean([curve[key][:parts] for curve in curves], axis=0)  # (parts,)
    return (tokens / 1000).tolist(), values.tolist()


def spread(heights, gap, low, high):
    """Heights at least `gap` apart within [low, high], in their order, moved as little as can be.

    The least sum of squared moves. With i * gap taken off the i-th height from below, "gap apart"
    becomes "not falling": isotonic regression, by pooling neighbours that fall. Where the range is
    too small for all, they go on above it.
    """
    order = np.argsort(heights, kind="stable")
    pools = []  # [mean, count] of neighbours that touch each other
    for rank, index in enumerate(order):
        pools.append([heights[index] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            lower_mean, lower_count = pools[-1]
            total = lower_count + count
            pools[-1] = [(lower_mean * lower_count + mean * count) / total, total]
    means = [mean for mean, count in pools for _ in range(count)]
    highest = high - (len(means) - 1) * gap
    moved = [0.0] * len(means)
    for rank, index in enumerate(order):
        moved[index] = max(low, min(highest, means[rank])) + rank * gap
    return moved


def _name_lines(axes):
    """Write each line's label to the right of the axes, with a thin leader from its last point.

    Expects titles and axis labels in place: they decide how high the axes are, and with it how far
    apart labels must stand.
    """
    axes.figure.draw_without_rendering()  # lays the figure out
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    points = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap = 1.35 * LABEL_SIZE * (high - low) / points
    ends = [line.get_xydata()[-1] for line in axes.lines]
    heights = spread([end[1] for end in ends], gap, low, high)
    for line, end, height in zip(axes.lines, ends, heights, strict=True):
        colour = line.get_color()
        axes.annotate(
            line.get_label(),
            end,
            xytext=(1.05, height),
            textcoords=axes.get_yaxis_transform(),  # a share of the axes' width, data's height
            va="center",
            color=BLUE if colour == BLUE else GREYS[0],
            fontweight="bold" if colour == BLUE else "normal",
            fontsize=LABEL_SIZE,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def _line_styles(labels, highlighted):
    """A style per label: blue and thick for the highlighted one, a grey of its own for others."""
    greys = itertools.cycle(itertools.product(DASHES, GREYS))  # all greys, then all greys dashed
    styles = {}
    for label in labels:
        if label == highlighted:
            styles[label] = {"color": BLUE, "linewidth": 2.8, "zorder": 3}
        else:
            dashes, grey = next(greys)
            styles[label] = {"color": grey, "linestyle": dashes, "linewidth": 1.4}
    return styles


def _dots(axes, rows, highlighted, unit):
    """Horizontal dots with intervals: rows of (label, (value, low, high)), the first on top."""
    axes.set_yticks([-place for place in range(len(rows))], [label for label, _ in rows])
    ticks = axes.get_yticklabels()
    for place, (label, (value, low, high)) in enumerate(rows):
        colour = GREYS[2]
        if label == highlighted:
            colour = BLUE
            ticks[place].set(color=BLUE, fontweight="bold")
        height = [-place, -place]
        axes.plot([low, high], height, color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(value, -place, "o", color=colour, markersize=7)
    axes.set(xlabel=unit, ylim=(-len(rows) + 0.4, 0.6))


# ---------------------------------------------------------------------------- the comparisons


def comparison_figure(results):
    """Where every variant ended, its interval over seeds, and how it got there, as a figure."""
    row, highlighted = ROWS.get(results["experiment"], ("variant", "sapo"))
    runs = _runs_by_label(results)
    figure, (ends, paths) = new_figure(11, 1.6 + 0.36 * max(6, len(runs)), 2)
    accuracies = {label: [run["accuracy"] for run in runs[label]] for label in runs}
    counts = sorted({len(values) for values in accuracies.values()})
    title = (
        f"Held-out accuracy after {results['budget_tokens']:,} tokens: "
        f"{_counted(len(runs), row)} on {_task(results)}, {' or '.join(map(str, counts))} seeds"
    )
    figure.suptitle(title, fontweight="bold")

    outcomes = []
    for label, values in accuracies.items():
        outcomes.append((label, [100 * bound for bound in interval(values)]))
    _dots(ends, outcomes, highlighted, "held-out accuracy (%): IQM over seeds, 95% interval")
    start = 100 * np.mean([run["warm_start_accuracy"] for run in results["runs"]])
    ends.axvline(start, color=FAINT, linestyle="--", linewidth=1)
    beside = {"xytext": (4, -2), "textcoords": "offset points", "ha": "left", "va": "top"}
    ends.annotate("warm start", (start, 0.55), color=FAINT, fontsize=9, **beside)

    for label, style in _line_styles(runs, highlighted).items():
        tokens, accuracy = _mean_curve(runs[label], "accuracy")
        paths.plot(tokens, [100 * share for share in accuracy], label=label, **style)
    paths.set(xlabel="generated tokens (thousands)", ylabel="training accuracy (%), mean")
    _name_lines(paths)
    return figure


def comparison(file):
    """Write `comparison_figure` of a sweep's JSON beside it; return the SVG's path.

    Raises ValueError for a sweep without a finished run, ImportError without matplotlib.
    """
    results = _read_results(file)
    if not results["runs"]:
        raise ValueError(f"{file} holds no finished run yet")
    return save_svg(comparison_figure(results), Path(file).with_suffix(".svg"))


def reuse_figure(results):
    """How often can a rollout be used? Three measures against the number of epochs, as a figure."""
    of_kind = {}  # kind of ratio -> {epochs: its runs}
    for label, runs in _runs_by_label(results).items():
        kind, epochs = label.rsplit(", ", 1)
        of_kind.setdefault(kind, {})[int(epochs.split()[0])] = runs
    measures = {
        "held-out accuracy (%): IQM over seeds": lambda run: 100 * run["accuracy"],
        "tokens clipped (%): IQM": lambda run: 100 * np.mean(run["curve"]["clip_fraction"]),
        "largest approx_kl (nats per token): IQM; lines as at left": lambda run: max(
            run["curve"]["approx_kl"]
        ),
    }
    figure, panels = new_figure(14, 4.2, 3)
    seeds = max(len(runs) for kind in of_kind.values() for runs in kind.values())
    title = f"How often can a rollout be used? {results['budget_tokens']:,} tokens"
    figure.suptitle(f"{title} of {_task(results)}, {_counted(seeds, 'seed')}", fontweight="bold")
    figure.get_layout_engine().set(w_pad=0.12)  # inches, between a line's name and the next panel
    ticks = sorted({count for runs in of_kind.values() for count in runs})
    for axes, (unit, measure) in zip(panels, measures.items(), strict=True):
        for kind, style in _line_styles(of_kind, "segment ratio").items():
            epochs = sorted(of_kind[kind])
            middle = [iqm([measure(run) for run in of_kind[kind][count]]) for count in epochs]
            axes.plot(epochs, middle, marker="o", markersize=4, label=kind, **style)
        axes.set(xscale="log", xlabel="epochs over each rollout", ylabel=unit)
        axes.set_xticks(ticks, ticks)
    panels[2].set_yscale("log")
    panels[2].yaxis.set_major_formatter("{x:g}")
    for axes in panels:
        axes.minorticks_off()
    for axes in panels[:2]:
        _name_lines(axes)
    return figure


def reuse(file):
    """Write `reuse_figure` of a sweep's JSON beside it; return the SVG's path."""
    return save_svg(reuse_figure(_read_results(file)), Path(file).with_suffix(".svg"))


def truth_figure(results):
    """Does the credit find the wrong steps, and does the gradient point the right way?"""
    methods = results["methods"]
    figure, (steps, slope) = new_figure(11, 1.8 + 0.36 * max(5, len(methods)), 2)
    figure.suptitle(f"Credit and gradient on {_task(results)}, policy frozen", fontweight="bold")
    credit = [(name, (row["auroc"], *row["auroc_interval"])) for name, row in methods.items()]
    unit = "P(advantage of a right step > of a wrong one),\n95% interval"
    _dots(steps, credit, "sapo", unit)
    steps.set_title("Does the credit find the wrong steps?")
    steps.axvline(0.5, color=FAINT, linestyle="--", linewidth=1)
    cosines = [(name, row["cosine"]) for name, row in methods.items()]
    unit = "cosine with the reference gradient,\nat equal generated tokens, 95% interval"
    _dots(slope, cosines, "sapo", unit)
    slope.set_title("Does the gradient point the right way?")
    slope.axvline(0, color=FAINT, linestyle="--", linewidth=1)
    return figure


def truth(file):
    """Write `truth_figure` of a ground truth's JSON beside it; return the SVG's path."""
    return save_svg(truth_figure(_read_results(file)), Path(file).with_suffix(".svg"))


def lift_figure(results):
    """Lift (Eq. 12) over q, before and after training, by sampled values and by the critic."""
    figure, panels = new_figure(11, 4, 2)
    moments = {"early": "before training", "late": "after training"}
    for axes, (moment, title) in zip(panels, moments.items(), strict=True):
        # The two stand a little apart, so that neither hides the other.
        for colour, shift, name in ((BLUE, -0.6, "Monte Carlo"), (VERMILLION, 0.6, "critic")):
            curve = results[moment][name]["lift"]  # {q: (Lift, low, high)}
            places = [100 * float(q) + shift for q in curve]
            values, low, high = zip(*curve.values(), strict=True)
            axes.vlines(places, low, high, color=colour, linewidth=2.5)
            label = f"values by {name}"
            axes.plot(places, values, "o", color=colour, markersize=7, label=label)
        axes.axhline(1, color=FAINT, linestyle="--", linewidth=1)
        axes.set(xlabel="q: share of tokens called high-entropy (%)", title=title)
        axes.legend(fontsize=9)
    panels[0].set_ylabel("Lift (Eq. 12), 95% interval over responses")
    panels[1].sharey(panels[0])
    title = f"Does V jump where entropy is high? {results['task']}"
    figure.suptitle(title, fontweight="bold")
    return figure


def lift(file):
    """Write `lift_figure` of a lift measurement's JSON beside it; return the SVG's path."""
    return save_svg(lift_figure(_read_results(file)), Path(file).with_suffix(".svg"))


def critic_figure(results):
    """What variants of the critic see of one frozen policy: a column per task, two measures."""
    measured = results["measured"]
    tasks = list(dict.fromkeys(row["task"] for row in measured))
    variants = list(results["variants"])
    figure, _ = new_figure(3.4 * len(tasks) + 1.5, 6.4, 1)
    figure.clear()
    grid = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    measures = {
        "explained_variance": "explained variance\nof the outcome",
        "auroc_of_first_wrong_step": "AUROC of TD errors:\nfirst wrong step against right ones",
    }
    styles = _line_styles(variants, "hears")
    for column, task in enumerate(tasks):
        for axes, (measure, label) in zip(grid[:, column], measures.items(), strict=True):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            for name in variants:
                curves = _curves_of(measured, task, name)
                if not curves:  # not measured yet
                    continue
                steps = [point["optimizer_steps"] for point in curves[0]]
                of_seeds = [[point[measure] for point in curve] for curve in curves]
                axes.plot(steps, np.mean(of_seeds, 0), label=name, **styles[name])
            ceilings = [curve[0][measure] for curve in _curves_of(measured, task, "ceiling")]
            if ceilings:
                axes.axhline(
                    np.mean(ceilings), color=GREEN, linestyle="--", label="64 continuations"
                )
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(f"{task}: {_accuracy(measured, task):.0%} right")
        grid[1, column].set_xlabel("optimizer steps")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle("What a critic sees of frozen policies", fontweight="bold")
    return figure


def _curves_of(measured, task, variant):
    """The curves of a variant on a task, one per seed."""
    return [row["curve"] for row in measured if row["task"] == task and row["variant"] == variant]


def _accuracy(measured, task):
    """How often the frozen policies of a task are right."""
    return np.mean([row["accuracy"] for row in measured if row["task"] == task])


def critic(file):
    """Write `critic_figure` of lab.critic's JSON beside it; return the SVG's path."""
    return save_svg(critic_figure(_read_results(file)), Path(file).with_suffix(".svg"))


def drawn(folder):
    """Draw all that lab.compare and lab.critic left in a folder of results; yields the path of each
    picture. A comparison that ROWS does not know, a tuning say, has none."""
    for file in sorted(Path(folder).glob("*.json")):
        experiment = file.stem.split("-")[0]
        if file.stem == "critic":
            yield critic(file)
        elif experiment == "truth":
            yield truth(file)
        elif experiment == "lift":
            yield lift(file)
        elif experiment == "reuse":
            yield reuse(file)
        elif experiment in ROWS and "runs" in _read_results(file):
            yield comparison(file)


# --------------------------------------------------------------------------- the command line


def main(argv=None):
    """Draw a run's pictures, a folder of results, or the tutorial's; print the paths."""
    parser = argparse.ArgumentParser(prog="python -m lab.figures", description=main.__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        help="the folder that train.py wrote, runs/<name>; or results; or tutorial",
    )
    parser.add_argument(
        "--count", type=int, default=6, help="responses on the credit map (default 6)"
    )
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    try:
        if folder == Path("tutorial"):
            from lab import tutorial_figures  # they need torch

            for path in tutorial_figures.drawn():
                print(path)
            return
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder: expected runs/<name>, written by train.py"
            )
        if not (folder / "metrics.jsonl").is_file() and any(folder.glob("*.json")):
            for path in drawn(folder):
                print(path)
        else:
            print(learning_curve(folder))
            print(credit_map(folder, arguments.count))
            print(explorer(folder))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"lab.figures: {error}") from None


if __name__ == "__main__":
    main()
