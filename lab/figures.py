"""Pictures of runs and comparisons, drawn from the files that train.py and lab.compare left.

    python -m lab.figures runs/<name>    learning_curve.png, credit.html, credit.svg in that folder
    python -m lab.figures results        every comparison, as SVG beside its JSON
    python -m lab.figures tutorial       those of tutorial.md (lab/tutorial_figures.py)

The learning curve asks: did it learn and stay healthy? A comparison: where did each method end, and
how did it get there? SAPO stands out in one colour; the others are grey, named where they end. A
title says what the data show, and is made from them: other data, another title.

Imports nothing that trains, so that a picture can be made again long after the run; matplotlib only
when it draws. The same files give the same SVG, to the byte. Left out: what needs the model itself.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.common import (
    FAINT,
    GREEN,
    GREYS,
    INK,
    PURPLE,
    headline,
    name_lines,
    new_figure,
    read_metrics,
    read_outcome,
    run_title,
    save_svg,
)
from lab.credit_page import credit_map
from lab.explorer import explorer
from lab.stats import interval, of_reuse, probability_of_improvement

# Grey lines of one picture differ in their shade and, from the fourth on, in their dashes.
DASHES = ("-", "--", ":")
ENOUGH = 5  # seeds of each: of fewer, a title says no order


class Rows(NamedTuple):
    """Of an experiment: which row is SAPO as it is, and the words for it and for the others."""

    highlighted: str
    subject: str
    others: str
    paths: tuple[str, ...] = ()  # whose way through training is drawn, too


ROWS = {
    "main": Rows("sapo", "SAPO", "any other method", ("sapo", "ppo", "grpo")),
    "horizon": Rows(
        "sapo, lambda 0.99",
        "SAPO",
        "PPO at lambda 0.99",
        ("sapo, lambda 0.99", "ppo, lambda 0.99"),
    ),
    "games": Rows("sapo, rate 4e-4", "SAPO at 4e-4", "any other player"),
    "controls": Rows("sapo", "SAPO", "any change of it"),
    "seeing": Rows("sapo", "SAPO", "any other credit"),
    "seeds": Rows(
        "sapo",
        "the default",
        "lambda 0.7 or a clip of 0.2",
        ("sapo", "sapo, lambda 0.7", "sapo, clip 0.2"),
    ),
    "parts": Rows("sapo", "the default", "any variant"),
    "cuts": Rows("topk", "the cut by entropy", "any other cut"),
    "topk": Rows("30%", "a cut at 30% of the tokens", "any other share"),
}
# Labels that say too little in a picture
WORDS = {
    "vineppo": "VinePPO",
    "spo-chain": "SPO-chain",
    "spo-tree": "SPO-tree",
    "topk": "where entropy is highest (topk)",
    "causal": "above a threshold of entropy (causal)",
    "delimiter": "at delimiters",
    "low-prob": "at improbable tokens (low-prob)",
    "fixed": "after every ten tokens (fixed)",
    "sapo, V at end": "SAPO, V before a segment's last token",
    "sapo, token mean": "SAPO, mean over all tokens",
    "ppo, lambda of sapo": "PPO at SAPO's lambda",
}


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
        style = {"fmt": "o", "color": INK, "markersize": 5, "capsize": 3, "zorder": 3}
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
    axes.set_title("Critic: 1 perfect, 0 a constant guess", fontsize=11)


def learning_figure(lines, title):
    """Accuracy, entropy and the critic's explained variance over the iterations, as a figure.

    `lines` are the objects of metrics.jsonl without nulls. The title is completed by the outcome:
    held-out accuracy at the first and at the last evaluation.
    """
    figure, (accuracy, entropy, critic) = new_figure(4, 3)
    _draw_metric(accuracy, lines, "accuracy", FAINT, scale=100)
    held_out = _draw_held_out(accuracy, lines)
    accuracy.set(ylim=(-2, 102), ylabel="responses that are right (%)")
    accuracy.set_title("Accuracy: higher is better", fontsize=11)
    handles = accuracy.get_legend_handles_labels()
    if handles[0]:  # not in the axes, where it would cover a run that ends low
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    _draw_metric(entropy, lines, "entropy", FAINT)
    entropy.set_ylim(bottom=0)
    entropy.set_ylabel("entropy (nats per token)")
    entropy.set_title("Entropy: should not collapse to zero", fontsize=11)
    _draw_critic(critic, lines)
    last = max(line["iteration"] for line in lines)
    for axes in (accuracy, entropy, critic):
        axes.set(xlabel="iteration", xlim=(-0.02 * last - 0.5, 1.02 * last + 0.5))
    if len(held_out) > 1:
        (_, first), (iterations, final) = held_out[0], held_out[-1]
        title += f": held-out accuracy {first:.0%} → {final:.0%} in {iterations} iterations"
    headline(figure, title)
    return figure


def learning_curve(run_folder):
    """Write `learning_figure` as learning_curve.png into a run's folder; return its path.

    Raises FileNotFoundError for a missing metrics.jsonl, ValueError for an unusable one,
    ImportError without matplotlib.
    """
    run_folder = Path(run_folder)
    figure = learning_figure(read_metrics(run_folder / "metrics.jsonl"), run_title(run_folder))
    path = run_folder / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path


# ---------------------------------------------------------------------- parts of a comparison


def _task(results):
    """The task in words: "ArrowPath (length=10, grid=4)" for "ArrowPath-length=10-grid=4"."""
    name, _, keywords = results["task"].partition("-")
    if not keywords:
        return name
    return f"{name} ({keywords.replace('-', ', ')})"


def in_words(label):
    """A label as a picture has it: "PPO, rate 4e-4" for "ppo, rate 4e-4"."""
    method, comma, rest = label.partition(",")
    if method in ("sapo", "ppo", "vc-ppo", "grpo", "gspo", "srpo"):
        method = method.upper()
    return WORDS.get(label, method + comma + rest)


def _counted(numbers):
    """How many seeds: "five seeds", "one seed"; "5 or 10 seeds" where that differs."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    numbers = sorted(set(numbers))
    if len(numbers) > 1:
        return " or ".join(map(str, numbers)) + " seeds"
    (number,) = numbers
    in_words = words[number] if number < len(words) else str(number)
    return f"{in_words} seed{'s' if number != 1 else ''}"


def _listed(labels):
    """Up to three names, "PPO and VC-PPO"; of more, or of longer ones, how many: "six others"."""
    labels = [in_words(label) for label in labels]
    if len(labels) > 3 or any("," in label for label in labels):
        return f"{_counted([len(labels)]).split()[0]} other{'s' if len(labels) > 1 else ''}"
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))


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


def _line_styles(labels, highlighted, colour=PURPLE):
    """A style per label: a thick line for the highlighted one, a grey of its own for others."""
    greys = itertools.cycle(itertools.product(DASHES, GREYS))  # all greys, then all greys dashed
    styles = {}
    for label in labels:
        if label == highlighted:
            styles[label] = {"color": colour, "linewidth": 2.8, "zorder": 3}
        else:
            dashes, grey = next(greys)
            styles[label] = {"color": grey, "linestyle": dashes, "linewidth": 1.4}
    return styles


def _dots(axes, rows, highlighted, unit):
    """Horizontal dots with intervals: rows of (label, (value, low, high)), the first on top."""
    names = [in_words(label) for label, _ in rows]
    axes.set_yticks([-place for place in range(len(rows))], names)
    ticks = axes.get_yticklabels()
    for place, (label, (value, low, high)) in enumerate(rows):
        colour = GREYS[2]
        if label == highlighted:
            colour = PURPLE
            ticks[place].set(color=PURPLE, fontweight="bold")
        height = [-place, -place]
        axes.plot([low, high], height, color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(value, -place, "o", color=colour, markersize=7)
    axes.set(xlabel=unit, ylim=(-len(rows) + 0.4, 0.6))


# ---------------------------------------------------------------------------- the comparisons


def _finding(runs, rows):
    """What a comparison shows of the highlighted row, in a sentence. runs: {label: its runs}.

    "Above" another: the 95% interval of the probability that a run of the one ends above a run of
    the other lies above 1/2. "Level": it holds 1/2, so the seeds do not tell the two apart.
    """
    seeds = _counted(len(of_label) for of_label in runs.values())
    if min(map(len, runs.values())) < ENOUGH:
        every_run = [run for of_label in runs.values() for run in of_label]
        learned = all(run["accuracy"] > run["warm_start_accuracy"] for run in every_run)
        return f"All of them learn, no order yet ({seeds})" if learned else f"No order ({seeds})"
    accuracies = {label: [run["accuracy"] for run in runs[label]] for label in runs}
    own = accuracies.pop(rows.highlighted, None)
    if own is None or not accuracies:
        return f"Where they end ({seeds})"
    places = {"above": [], "below": [], "level with": []}
    for label, others in accuracies.items():
        _, low, high = probability_of_improvement(own, others)
        place = "above" if low > 0.5 else "below" if high < 0.5 else "level with"
        places[place].append(label)
    if len(places["level with"]) == len(accuracies):
        text = f"{seeds} do not tell {rows.subject} apart from {rows.others}"
    else:
        parts = [f"{place} {_listed(labels)}" for place, labels in places.items() if labels]
        text = f"{rows.subject} ends {', '.join(parts)}"
    return text[0].upper() + text[1:]


def comparison_figure(results):
    """Where every variant ended, its interval over seeds, and how some got there, as a figure."""
    experiment = results["experiment"]
    rows = ROWS.get(experiment, Rows("sapo", "SAPO", "any other"))
    runs = _runs_by_label(results)
    again = [run["accuracy"] for run in runs.get("ppo, lambda of sapo", ())]
    if again and again == [run["accuracy"] for run in runs.get("ppo", ())]:
        del runs["ppo, lambda of sapo"]  # the tuning chose one lambda for both
    paths = [label for label in rows.paths if label in runs]
    figure, (ends, *beside) = new_figure(1.6 + 0.3 * max(4, len(runs)), 1 + bool(paths))
    headline(figure, _finding(runs, rows))

    outcomes = []
    for label, of_label in runs.items():
        outcomes.append((label, interval([100 * run["accuracy"] for run in of_label])))
    if experiment == "topk":
        ends.set_ylabel("tokens that end a segment")
    else:
        outcomes.sort(key=lambda outcome: -outcome[1][0])
    unit = (
        "held-out accuracy (%). Dot: the mean of the middle\nhalf of the seeds; line: 95% interval"
    )
    start = np.mean([run["warm_start_accuracy"] for run in results["runs"]])
    seeds = _counted(len(of_label) for of_label in runs.values())
    setup = f"{_task(results)}, {results['budget_tokens']:,} tokens, {seeds}\n"
    setup += f"(before training: {start:.0%})"
    if not paths:  # room for one line
        unit, setup = (text.replace("\n", " ") for text in (unit, setup))
    _dots(ends, outcomes, rows.highlighted, unit)
    ends.set_title(setup, fontsize=10)
    if paths:
        _draw_paths(beside[0], {label: runs[label] for label in paths}, rows.highlighted)
    return figure


def _draw_paths(axes, runs, highlighted):
    """Training accuracy over the tokens, mean over the seeds: a line per label, named."""
    for label, style in _line_styles(runs, highlighted).items():
        tokens, accuracy = _mean_curve(runs[label], "accuracy")
        axes.plot(tokens, [100 * share for share in accuracy], label=label, **style)
    axes.set_xlabel("generated tokens (thousands)")
    axes.set_title("The way there: training accuracy (%), mean", fontsize=10)
    name_lines(axes, in_words)


def comparison(file):
    """Write `comparison_figure` of a sweep's JSON beside it; return the SVG's path.

    Raises ValueError for a sweep without a finished run, ImportError without matplotlib.
    """
    results = read_outcome(file)
    if not results["runs"]:
        raise ValueError(f"{file} holds no finished run yet")
    return save_svg(comparison_figure(results), Path(file).with_suffix(".svg"))


def reuse_figure(results):
    """How often can a rollout be used? Three measures against the number of epochs, as a figure.

    Those of the table: `lab.stats.of_reuse`.
    """
    of_kind = {}  # kind of ratio -> {epochs: (accuracy, share of tokens clipped, approx_kl)}
    runs = _runs_by_label(results)
    for label, of_label in runs.items():
        kind, epochs = label.rsplit(", ", 1)
        of_kind.setdefault(kind, {})[int(epochs.split()[0])] = of_reuse(of_label)
    figure, panels = new_figure(7, 2, 2)
    figure.get_layout_engine().set(w_pad=0.1)  # inches, between a line's name and the next panel
    accuracy, empty, *below = panels
    empty.remove()
    accuracy.set_subplotspec(accuracy.get_gridspec()[0, :])
    seeds = _counted([max(map(len, runs.values()))])
    of_what = f"{_task(results)}, {results['budget_tokens']:,} tokens, {seeds}"
    titles = (
        f"Held-out accuracy (%), interquartile mean over the seeds ({of_what})",
        "Tokens clipped (%), mean",
        "Largest approx_kl of any run (nats per token)",
    )
    ticks = sorted({count for measured in of_kind.values() for count in measured})
    for i, (axes, scale) in enumerate(zip((accuracy, *below), (100, 100, 1), strict=True)):
        for kind, style in _line_styles(of_kind, "segment ratio").items():
            epochs = sorted(of_kind[kind])
            heights = [scale * of_kind[kind][count][i] for count in epochs]
            axes.plot(epochs, heights, marker="o", markersize=4, label=kind, **style)
        axes.set(xscale="log", xlabel="epochs over each rollout")
        axes.set_title(titles[i], fontsize=10)
        axes.set_xticks(ticks, ticks)
    below[1].set_yscale("log")
    below[1].yaxis.set_major_formatter("{x:g}")
    kinds = ("segment ratio", "segment ratio, clip 0.2")
    at_eight = [of_kind.get(kind, {}).get(8) for kind in kinds]
    text = "How often can a rollout be used?"
    if all(at_eight):
        (narrow, *_), (wide, *_) = at_eight
        text = (
            f"Used eight times: the segment's ratio ends at {narrow:.0%}, at a wide clip {wide:.0%}"
        )
    headline(figure, text)
    for axes in (accuracy, *below):
        axes.minorticks_off()
        name_lines(axes, in_words)
    return figure


def reuse(file):
    """Write `reuse_figure` of a sweep's JSON beside it; return the SVG's path."""
    return save_svg(reuse_figure(read_outcome(file)), Path(file).with_suffix(".svg"))


def truth_figure(results):
    """Does the credit see the first wrong step, and does the gradient point the right way?

    The AUROC of all steps would mislead: right steps are commoner in right answers, so even credit
    that blames a whole answer alike scores above 0.5 there. SAPO at other lambdas is left to the
    table, and GSPO is not drawn where its numbers are GRPO's: they differ in ratio and clip alone.
    """
    methods = {
        name: row for name, row in results["methods"].items() if not name.startswith("sapo, lambda")
    }
    seen = {name: _first_wrong(row) for name, row in methods.items()}
    if "grpo" in methods and "gspo" in methods:
        grpo, gspo = (methods[name] for name in ("grpo", "gspo"))
        if seen["grpo"] == seen["gspo"] and math.isclose(
            grpo["cosine"][0], gspo["cosine"][0], rel_tol=1e-6
        ):
            del methods["gspo"]
    methods = dict(sorted(methods.items(), key=lambda item: -seen[item[0]]))
    figure, (steps, slope) = new_figure(1.8 + 0.3 * max(5, len(methods)), 2)
    headline(figure, _truth_headline(methods, seen, _task(results)))
    credit = [(name, (seen[name],) * 3) for name in methods]  # no interval is stored for it
    unit = "P(advantage of a right step > of the first wrong one),\nin wrong answers; 0.5: blind"
    _dots(steps, credit, "sapo", unit)
    steps.set_title("Does the credit see the first wrong step?", fontsize=10)
    steps.axvline(0.5, color=FAINT, linestyle="--", linewidth=1)
    gradients = [(name, row["cosine"]) for name, row in methods.items()]
    unit = "cosine with the reference gradient,\nat equal generated tokens, 95% interval"
    _dots(slope, gradients, "sapo", unit)
    slope.tick_params(labelleft=False)
    slope.set_title("Does the gradient point the right way?", fontsize=10)
    return figure


def _first_wrong(row):
    """AUROC of a method's advantages, the first wrong step against right ones; NaN where no step
    was wrong."""
    value = row["auroc_of_first_wrong_step"]
    return math.nan if value is None else value


def _truth_headline(methods, seen, task):
    """What truth_figure shows, in a sentence: do all critics see better than what blames an answer
    as a whole, and are their gradients the best?"""
    critics = [name for name in methods if name.startswith(("sapo", "ppo", "vc-ppo"))]
    others = [name for name in methods if name not in critics]
    blind = [name for name in others if name in ("grpo", "gspo", "srpo")]
    is_so = bool(critics and blind)
    if is_so:
        cosines = {name: row["cosine"][0] for name, row in methods.items()}
        is_so = min(map(seen.get, critics)) > max(map(seen.get, blind))
        is_so = is_so and min(map(cosines.get, critics)) > max(map(cosines.get, others))
    if is_so:
        text = "A critic taught beforehand sees the first wrong step, and its gradient points best"
        return f"{text} ({task})"
    return f"Credit and gradient on {task}, policy frozen"


def truth(file):
    """Write `truth_figure` of a ground truth's JSON beside it; return the SVG's path."""
    return save_svg(truth_figure(read_outcome(file)), Path(file).with_suffix(".svg"))


def lift_figure(results):
    """Lift (Eq. 12) over q, before and after training, by sampled values and by the critic."""
    figure, panels = new_figure(4, 2, sharey=True)
    moments = {"early": "before training", "late": "after training"}
    # The two stand a little apart, so that neither hides the other.
    values_by = (
        ("Monte Carlo", "64 continuations", INK, -0.6),
        ("critic", "the critic", GREEN, 0.6),
    )
    highest = 0
    for axes, (moment, title) in zip(panels, moments.items(), strict=True):
        for name, words, colour, shift in values_by:
            curve = results[moment][name]["lift"]  # {q: (Lift, low, high)}
            places = [100 * float(q) + shift for q in curve]
            values, low, high = zip(*curve.values(), strict=True)
            highest = max(highest, *high)
            axes.vlines(places, low, high, color=colour, linewidth=2.5)
            axes.plot(places, values, "o", color=colour, markersize=7, label=f"V by {words}")
        axes.axhline(1, color=FAINT, linestyle="--", linewidth=1)
        axes.set_xlabel("q: share of tokens called high-entropy (%)")
        axes.set_title(title, fontsize=10)
    panels[0].set(ylim=(0, 1.05 * highest), ylabel="Lift (Eq. 12), 95% interval over responses")
    panels[1].legend(fontsize=9)
    tenths = [results[moment]["Monte Carlo"]["lift"].get("0.1") for moment in moments]
    text = f"Does V jump where entropy is high? {results['task']}"
    if all(tenths):
        early, late = (f"{lift:.1f}" for lift, _, _ in tenths)
        text = f"Before training V jumps {early} times as often at unsure tokens as at any"
        text += f"; after it, {late} times"
    headline(figure, text)
    return figure


def lift(file):
    """Write `lift_figure` of a lift measurement's JSON beside it; return the SVG's path."""
    return save_svg(lift_figure(read_outcome(file)), Path(file).with_suffix(".svg"))


# Of lab.critic: the variants that are drawn (the table has all), and the policies, in words
SEEN_BY = {
    "as before": "reads, one pass",
    "four passes": "reads, four passes",
    "hears": "reads and hears",
    "hears, reads nothing": "hears only",
    "ceiling": "64 continuations",
}
POLICIES = {
    "dice": "warm start, four dice",
    "arrows": "warm start, ten arrows",
    "later": "four dice, six rollouts later",
    "nine": "nine dice, trained",
}


def critic_figure(results):
    """What critics see of frozen policies: a column per policy, the least often right at the left;
    a row per measure."""
    curves, accuracies = {}, {}  # (task, variant) -> a curve per seed; task -> right how often
    for row in results["measured"]:
        curves.setdefault((row["task"], row["variant"]), []).append(row["curve"])
        accuracies.setdefault(row["task"], []).append(row["accuracy"])
    tasks = sorted(accuracies, key=lambda task: np.mean(accuracies[task]))
    measures = {
        "explained_variance": "explained variance\nof the outcome",
        "auroc_of_first_wrong_step": "AUROC of TD errors: first\nwrong step against right ones",
    }
    figure, panels = new_figure(5.6, len(tasks), 2, sharex="col", sharey="row")
    variants = [name for name in SEEN_BY if any((task, name) in curves for task in tasks)]
    styles = _line_styles(variants, "hears", GREEN)
    for axes, (measure, task) in zip(panels, itertools.product(measures, tasks), strict=True):
        tokens = [0]
        for name in variants:
            if (task, name) not in curves:
                continue
            heights = _seen(curves[task, name], measure)
            if name == "ceiling":  # measured once: a line along the others
                heights = heights * len(tokens)
            else:
                tokens = [n / 1000 for n in _seen(curves[task, name], "generated_tokens")]
            axes.plot(tokens, heights, label=SEEN_BY[name], **styles[name])
    for place, task in enumerate(tasks):
        policy = POLICIES.get(task, task)
        right = np.mean(accuracies[task])
        panels[place].set_title(f"{policy}:\n{right:.0%} right", fontsize=10)
        panels[len(tasks) + place].set_xlabel("generated tokens\n(thousands)")
    panels[0].set_ylabel(measures["explained_variance"])
    panels[len(tasks)].set_ylabel(measures["auroc_of_first_wrong_step"])
    headline(figure, _seen_best(curves, accuracies))
    for last in (panels[len(tasks) - 1], panels[-1]):
        name_lines(last, in_words)
    return figure


def _seen(of_seeds, measure):
    """A measure along the teaching, as a list: the mean over seeds."""
    return np.mean([[point[measure] for point in curve] for curve in of_seeds], 0).tolist()


def _seen_best(curves, accuracies):
    """What critic_figure shows, in a sentence: does the critic that hears explain the most of every
    policy that is mostly right?"""
    mostly_right = [task for task in accuracies if np.mean(accuracies[task]) > 0.5]
    is_so = bool(mostly_right)
    for task in mostly_right:
        ends = {}
        for name in SEEN_BY:
            if name != "ceiling" and (task, name) in curves:
                ends[name] = _seen(curves[task, name], "explained_variance")[-1]
        is_so = is_so and max(ends, key=ends.get) == "hears"
    if is_so:
        return "Of a policy that is mostly right, a critic that hears explains the most"
    return "What critics see of frozen policies"


def critic(file):
    """Write `critic_figure` of lab.critic's JSON beside it; return the SVG's path."""
    return save_svg(critic_figure(read_outcome(file)), Path(file).with_suffix(".svg"))


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
        elif experiment in ROWS and "runs" in read_outcome(file):
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
    parser.add_argument(
        "--examples",
        nargs="+",
        metavar="ID",
        help="the held-out examples to show on map and page, eval/0 eval/6 say",
    )
    arguments = parser.parse_args(argv)
    folder, examples = arguments.folder, arguments.examples
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
            print(credit_map(folder, arguments.count, examples))
            print(explorer(folder, examples))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"lab.figures: {error}") from None


if __name__ == "__main__":
    main()
