"""Figures of a run, drawn from the files that train.py left in its folder.

    python figures.py runs/<name>          learning_curve.png, credit.html and credit.svg, into the same folder
    python figures.py results              every comparison that compare.py wrote there, as SVG beside its JSON

The learning curve asks: did it learn and stay healthy?  The credit map: did the credit land on the right tokens?
Reads metrics.jsonl, samples.jsonl and, for the titles, config.json; imports none of the project's modules, so that a
figure can be made again long after the run.  Left out: whatever needs a network, a browser script or the model itself.
"""

import argparse
import json
import math
import unicodedata
from html import escape
from itertools import zip_longest
from pathlib import Path

import numpy as np

# The colours of Okabe and Ito (2008), told apart with any common colour blindness.
BLUE, VERMILLION, GREEN, PURPLE, INK, FAINT = "#0072B2", "#D55E00", "#009E73", "#A8437E", "#222222", "#6B6B6B"
PALETTE = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK)

# --------------------------------------------------------------------------------------------- reading the run's files


def _read(path):
    """The JSON objects of a .jsonl file, without their nulls.  A torn last line (a run killed mid-write) is dropped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the folder of a run, as train.py writes it")
    rows = path.read_text(encoding="utf-8", errors="replace").split("\n")  # not splitlines: it also cuts at U+2028
    rows = [(number, row) for number, row in enumerate(rows, 1) if row.strip()]
    lines = []
    for number, row in rows:
        try:
            line = json.loads(row)
        except json.JSONDecodeError as error:
            if (number, row) == rows[-1]:
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): repair or remove that line") from None
        match line:
            case {"iteration": int()}:
                lines.append({key: value for key, value in line.items() if value is not None})
            case _:
                raise ValueError(f"{path}, line {number}: no object with a whole `iteration` but {row[:60]!r}")
    if not lines:
        raise ValueError(f"{path} holds no complete line: let the run finish an iteration first")
    return lines


def wilson(right, n, z=1.96):
    """95% interval of a share (Wilson's score interval). -> (low, high)."""
    centre, spread = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def report(run, before):
    """A run's outcome: its summary.json and the evaluation `before` as a table on the terminal, and its pictures."""
    summary = json.loads((run / "summary.json").read_text())
    print(f"\n{summary['method']} on {summary['env']}, seed {summary['seed']}: "
          f"{summary['eval_episodes']} held-out episodes")
    for kind, x in {"before, temperature 1": before, **summary["evaluations"]}.items():
        print(f"  {kind:<30}{x['eval_accuracy']:7.1%}   95% interval {x['eval_low']:.1%} to {x['eval_high']:.1%}")
    print(f"  {summary['seconds']:.0f} s of training, {summary['warm_start_seconds']:.0f} s of warm start, "
          f"{summary['peak_rss_mb']:.0f} MB at most; files in {run}")
    try:
        learning_curve(run), credit_map(run)
    except ImportError as missing:
        print(missing)


def _name(run):
    """What was run, for a title: "SAPO on DiceSum, seed 1"; the folder's name where there is no config.json."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        method, env, seed = config["method"], config["env"], config["seed"]
    except (OSError, ValueError, TypeError, KeyError):
        return run.resolve().name
    return f"{str(method).upper()} on {str(env).removeprefix('SAPO/').rsplit('-v', 1)[0]}, seed {seed}"


# -------------------------------------------------------------------------------------------------- the learning curve


def _trace(axes, lines, key, colour, scale=1.0):
    """Draw a metric as it was logged (thin) and its centred moving mean (thick); say so on the axes if it is absent."""
    found = {line["iteration"]: line[key] for line in lines if key in line}  # of two lines, the later
    if not found:
        axes.text(0.5, 0.5, "not logged in this run", transform=axes.transAxes, ha="center", color=FAINT)
        return
    x = sorted(found)
    y = [scale * found[iteration] for iteration in x]
    reach = len(y) // 20  # the window is about a tenth of the run
    windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
    dot = "." if len(y) == 1 else None  # a line of one point would be invisible
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.45, marker=dot, label="training batch")
    if reach:
        means = [sum(window) / len(window) for window in windows]
        axes.plot(x, means, color=colour, linewidth=2.2, label=f"mean over {2 * reach + 1} iterations")


def learning_curve(run):
    """Write learning_curve.png: accuracy, entropy and value loss over the iterations of `run`; return its path.

    The title states the outcome: held-out accuracy at the first and the last evaluation.  Raises FileNotFoundError for
    a missing file, ValueError for an unusable one, ImportError without matplotlib.
    """
    run = Path(run)
    lines = _read(run / "metrics.jsonl")
    try:  # not pyplot, which picks a window system and keeps global state: a bare Figure saves with the Agg backend
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures.py draws the learning curve with matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained", facecolor="white")
    accuracy, entropy, value_loss = figure.subplots(1, 3)
    _trace(accuracy, lines, "accuracy", BLUE, scale=100)
    held_out = {line["iteration"]: line for line in lines if "eval_accuracy" in line}
    x = sorted(held_out)
    y = [held_out[i]["eval_accuracy"] for i in x]
    if x:
        low = [100 * max(0, v - held_out[i].get("eval_low", v)) for i, v in zip(x, y, strict=True)]
        high = [100 * max(0, held_out[i].get("eval_high", v) - v) for i, v in zip(x, y, strict=True)]
        style = {"fmt": "o", "color": VERMILLION, "markersize": 5, "capsize": 3, "zorder": 3}
        accuracy.errorbar(x, [100 * v for v in y], [low, high], label="held-out, 95% interval", **style)
    accuracy.set(ylim=(-2, 102), title="Accuracy: higher is better", ylabel="responses that are right (%)")
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(loc="lower right", fontsize=9)
    _trace(entropy, lines, "entropy", PURPLE)
    entropy.set(title="Entropy: should not collapse to zero", ylabel="entropy (nats per token)")
    _trace(value_loss, lines, "value_loss", GREEN)
    value_loss.set(title="Value loss: should fall", ylabel="value loss (squared reward)")
    for axes in (entropy, value_loss):
        axes.set_ylim(bottom=0)
    last = max(line["iteration"] for line in lines)
    for axes in (accuracy, entropy, value_loss):
        axes.set(xlabel="iteration", xlim=(-0.02 * last - 0.5, 1.02 * last + 0.5))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    outcome = f": held-out accuracy {y[0]:.0%} → {y[-1]:.0%} in {x[-1]} iterations" if len(y) > 1 else ""
    figure.suptitle(_name(run) + outcome, fontsize=14, fontweight="bold", parse_math=False)
    path = run / "learning_curve.png"
    figure.savefig(path)
    return path


# ------------------------------------------------------ the credit map: one drawing, as an SVG and inside an HTML page

WIDTH, PICTURE, MARGIN, CHAR = 1000, 128, 20, 7.2  # pixels; CHAR is the advance of a 12-pixel monospace letter
CELL, GAP, STRIP = 24, 10, 26  # heights of a token cell, of the room for a wrong step's wave, of a curve
STYLE = f"""
text {{ font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: {INK} }}
.token text {{ font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; text-anchor: middle }}
.token rect {{ stroke: #D9D9D9; stroke-width: 0.7 }}
.cut {{ stroke: #000; stroke-width: 3 }} .guide {{ stroke: #BDBDBD; stroke-width: 1 }}
.wrong {{ stroke: {INK}; stroke-width: 1.6; fill: none }}
.entropy {{ stroke: {PURPLE} }} .value {{ stroke: {GREEN} }} .curve {{ stroke-width: 1.6; fill: none }}
text.small {{ font-size: 10px; fill: {FAINT} }} text.end {{ text-anchor: end }}
text.big {{ font-size: 18px; font-weight: 700 }} text.head {{ font-size: 14px; font-weight: 600 }}
image {{ image-rendering: pixelated }}
"""


def _visible(text, limit, token=False):
    """Text for SVG and HTML: marks in place of what has no shape, at most `limit` characters, markup escaped.

    Control characters, lone surrogates and the like are no legal XML, and direction marks would reorder the line.
    """
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    shown = []
    for char in text:
        category = unicodedata.category(char)
        if category == "Zs":
            char = "·" if token else " "
        elif category[0] == "C" or category in ("Zl", "Zp"):
            char = {"\n": "⏎", "\t": "⇥"}.get(char, chr(0x2400 + ord(char)) if char < " " else "\ufffd")
        shown.append(char)
    return escape("".join(shown))


def _tint(advantage, limit):
    """Cell colour: white at 0, blue for credit and orange for blame, full at ±limit; grey where there is no number.

    The share is raised to the power 0.6, here and in the legend alike, so that small credits are still seen.
    """
    if not math.isfinite(advantage):
        return "#DDDDDD"
    full, share = ((77, 157, 224) if advantage > 0 else (240, 146, 60)), min(1.0, abs(advantage) / limit) ** 0.6
    return "#" + "".join(f"{round(255 + (part - 255) * share):02X}" for part in full)


def _choose(samples, count):
    """At most `count` of the responses: right and wrong by turns, as far as there are some of each."""
    right = [sample for sample in samples if sample["reward"] > 0.5]
    wrong = [sample for sample in samples if sample["reward"] <= 0.5]
    return [sample for pair in zip_longest(right, wrong) for sample in pair if sample][:count]


def _checked(sample, path):
    """The response with NaN for null numbers; ValueError if it lacks a key or a list does not fit its tokens."""
    where = f"{path}, iteration {sample['iteration']}, example {sample.get('example_id')!r}"
    if missing := [key for key in ("tokens", "advantages", "ends", "reward") if key not in sample]:
        raise ValueError(f"{where}: no {', '.join(missing)}")
    for key in ("advantages", "ends", "entropy", "values"):
        if key in sample and len(sample[key]) != len(sample["tokens"]):
            raise ValueError(f"{where}: {len(sample[key])} {key} for {len(sample['tokens'])} tokens")
    numbers = {key: sample[key] for key in ("advantages", "entropy", "values") if key in sample}
    return sample | {key: [math.nan if x is None else x for x in row] for key, row in numbers.items()}


def _wrap(tokens, ends, left):
    """Rows of (token index, text, x, width) that fit between `left` and the right margin, with a gap after each end."""
    rows, x = [[]], left
    for index, token in enumerate(tokens):
        letters = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in token[:24])
        width = max(1, letters) * CHAR + 4
        if rows[-1] and x + width > WIDTH - MARGIN:
            rows.append([])
            x = left
        rows[-1].append((index, _visible(token, 24, token=True), x, width))
        x += width + (4 if ends[index] else 0)
    return rows


def _curve(row, numbers, kind, y, low, high):
    """A step curve of one number per token, each as wide as its token, with its scale on the left."""
    path, pen = [], "M"
    for index, _, x, width in row:
        if not math.isfinite(numbers[index]):
            pen = "M"  # a gap
            continue
        height = y + STRIP * (high - numbers[index]) / (high - low)
        path.append((f"M{x:.1f} {height:.1f}" if pen == "M" else f"H{x:.1f}V{height:.1f}") + f"H{x + width:.1f}")
        pen = "H"
    left, right = row[0][2], row[-1][2] + row[-1][3]
    return [
        f'<path class="guide" d="M{left:.1f} {y + STRIP}H{right:.1f}"/>',
        f'<path class="curve {kind}" d="{"".join(path)}"/>' if path else "",
        f'<text class="small end" x="{left - 32}" y="{y + STRIP / 2 + 3}">{kind}</text>',
        f'<text class="small end" x="{left - 5}" y="{y + 8}">{high:.2g}</text>',
        f'<text class="small end" x="{left - 5}" y="{y + STRIP}">{low:.2g}</text>',
    ]


def _tokens(sample, top, left, limit, scales):
    """The rows of a response: cells, waves under wrong steps, curves, cuts; returns (SVG elements, y below them)."""
    wrong = {i for first, last, right in sample.get("steps") or [] if not right for i in range(first, last + 1)}
    curves = {kind: sample[key] for kind, key in (("entropy", "entropy"), ("value", "values")) if sample.get(key)}
    parts = []
    for row in _wrap(sample["tokens"], sample["ends"], left):
        below = top + CELL + GAP + len(curves) * (STRIP + 8) - 8
        for index, text, x, width in row:
            advantage = sample["advantages"][index]
            note = [f"advantage {advantage:+.3f}"] + [f"{kind} {curves[kind][index]:.3f}" for kind in curves]
            parts.append(
                f'<g class="token"><title>token {index}: {", ".join(note)}</title><rect x="{x:.1f}" y="{top}" '
                f'width="{width:.1f}" height="{CELL}" fill="{_tint(advantage, limit)}"/>'
                f'<text x="{x + width / 2:.1f}" y="{top + 16}">{text}</text></g>'
            )
            if index in wrong:
                waves = round(width / 8)
                wave = f"q{width / waves / 4:.2f} -4 {width / waves / 2:.2f} 0t{width / waves / 2:.2f} 0" * waves
                parts.append(f'<path class="wrong" d="M{x:.1f} {top + CELL + 4.5}{wave}"/>')
        for place, (kind, numbers) in enumerate(curves.items()):
            parts += _curve(row, numbers, kind, top + CELL + GAP + place * (STRIP + 8), *scales[kind])
        for index, _, x, width in row:
            if sample["ends"][index]:
                end = x + width + 2
                parts.append(f'<path class="guide" d="M{end:.1f} {top + CELL}V{below}"/>')
                parts.append(f'<path class="cut" d="M{end:.1f} {top - 4}V{top + CELL + 4}"/>')
        top = below + 22
    return parts, top


def _card(sample, top, limit, scales, pictures):
    """One response: picture, question, outcome, tokens; returns (SVG elements, y below them)."""
    left = MARGIN + (PICTURE + 20 if pictures else 0)
    parts = [f'<path class="guide" d="M{MARGIN} {top}H{WIDTH - MARGIN}"/>']
    if sample.get("image"):
        place = f'x="{MARGIN}" y="{top + 16}" width="{PICTURE}" height="{PICTURE}"'
        parts.append(f'<image {place} href="data:image/png;base64,{_visible(str(sample["image"]), 10**9)}"/>')
    right = sample["reward"] > 0.5
    mark, colour = ("✓ right", GREEN) if right else ("✗ wrong", VERMILLION)
    answered, answer = (_visible(str(sample.get(key, "nothing")), 24) for key in ("predicted", "answer"))
    outcome = f"answered {answered}, true answer {answer}, reward {sample['reward']:g}"
    parts += [
        f'<text class="head" x="{left}" y="{top + 30}"><tspan fill="{colour}">{mark}</tspan>  {outcome}</text>',
        f'<text x="{left}" y="{top + 50}">{_visible(str(sample.get("prompt", "")), 120)}</text>',
    ]
    rows, bottom = _tokens(sample, top + 68, left + 64, limit, scales)
    return parts + rows, max(bottom, top + (PICTURE + 34 if sample.get("image") else 0))


def _legend(title, limit):
    """The page's head: title, how to read it, the colour scale and the marks."""
    stops = "".join(f'<stop offset="{i / 16}" stop-color="{_tint(i / 8 - 1, 1)}"/>' for i in range(17))
    lines = [
        "Each box is a token the model wrote. Between two bars lies one segment; its tokens share one advantage: "
        + "the credit or blame they get in training.",
        "Entropy: how unsure the model was of the token, in nats; SAPO cuts after the peaks. "
        + "Value: the reward that the critic expected where the segment begins.",
    ]
    return [
        f'<text class="big" x="{MARGIN}" y="34">{title}</text>',
        *(f'<text x="{MARGIN}" y="{58 + 18 * i}">{line}</text>' for i, line in enumerate(lines)),
        f'<linearGradient id="scale">{stops}</linearGradient>',
        f'<text class="end" x="105" y="114">blame  −{limit:.2g}</text>',
        '<rect x="111" y="102" width="160" height="16" fill="url(#scale)" stroke="#D9D9D9"/>',
        f'<text x="277" y="114">+{limit:.2g}  credit</text>',
        '<path class="cut" d="M400 98v24"/><text x="409" y="114">cut: a segment ends here</text>',
        f'<path class="wrong" d="M590 111{"q2 -4 4 0t4 0" * 4}"/><text x="630" y="114">step known to be wrong</text>',
    ]


def credit_map(run, count=6):
    """Write credit.html and credit.svg, `count` responses of the last sampled iteration; return the path of the page.

    Both hold the same drawing; the page also shows a token's numbers when pointed at.  One colour scale and one scale
    per curve for all responses.  Raises FileNotFoundError for a missing file, ValueError for an unusable one.
    """
    run = Path(run)
    if count < 1:
        raise ValueError(f"count is {count}: expected at least 1 response")
    samples = _read(run / "samples.jsonl")
    last = max(sample["iteration"] for sample in samples)
    samples = [_checked(sample, run / "samples.jsonl") for sample in samples if sample["iteration"] == last]
    samples = _choose(samples, count)

    def numbers(key):
        return [x for sample in samples for x in sample.get(key, []) if math.isfinite(x)]

    limit = max(map(abs, numbers("advantages")), default=0) or 1.0
    scales = {
        "entropy": (0.0, max(numbers("entropy"), default=0) or 1.0),
        "value": (min([0.0, *numbers("values")]), max([1.0, *numbers("values")])),
    }
    title = f"Where the credit went: {_visible(_name(run), 80)}, iteration {last}"
    parts, y = _legend(title, limit), 140
    for sample in samples:
        card, y = _card(sample, y, limit, scales, any(sample.get("image") for sample in samples))
        parts += card
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">'
        f"<title>{title}</title><style>{STYLE}</style>"
        f'<rect width="{WIDTH}" height="{y}" fill="#FFFFFF"/>' + "\n".join(parts) + "</svg>\n"
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light">'
        f"<title>{title}</title><style>body {{ margin: 0; background: #FFFFFF }} svg {{ display: block; margin: auto; "
        f"max-width: 100%; height: auto }}</style></head><body>\n{drawing}</body></html>\n"
    )
    (run / "credit.svg").write_text(drawing, encoding="utf-8")
    (run / "credit.html").write_text(page, encoding="utf-8")
    return run / "credit.html"


# ---------------------------------------------------------------------------------------------------- the comparisons


def iqm(x):
    """Interquartile mean: of the middle half of the values, along the last axis."""
    x = np.sort(x, axis=-1)
    cut = x.shape[-1] // 4
    return x[..., cut:x.shape[-1] - cut].mean(-1)


def interval(values, statistic=iqm, draws=2000, seed=0):
    """(value, low, high): a statistic of the seeds' values and its 95% bootstrap interval."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    drawn = statistic(values[rng.integers(len(values), size=(draws, len(values)))])
    return float(statistic(values)), *np.quantile(drawn, (0.025, 0.975)).tolist()


def table(found):
    """The outcome as a Markdown table, a row per variant."""
    lines = ["| | seeds | before | after: IQM, 95% interval | beats its start | tokens | seconds |",
             "|---|---|---|---|---|---|---|"]
    for label in dict.fromkeys(run["label"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["label"] == label]
        mean = {k: np.mean([run[k] for run in runs]) for k in ("warm_start_accuracy", "generated_tokens", "seconds")}
        value, low, high = interval([run["accuracy"] for run in runs])
        better = sum(run["accuracy"] > run["warm_start_accuracy"] for run in runs)
        before, tokens, seconds = mean.values()
        lines.append(f"| {label} | {len(runs)} | {before:.3f} | {value:.3f} ({low:.3f} to {high:.3f}) | "
                     f"{better} of {len(runs)} | {tokens:.0f} | {seconds:.0f} |")
    return "\n".join(lines)


def _figure(width, height, columns=1):
    """A matplotlib figure whose SVG is the same at every drawing, and its axes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures.py draws comparisons with matplotlib: pip install matplotlib") from None
    matplotlib.rcParams["svg.hashsalt"] = "sapo"
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for part in axes:
        part.grid(alpha=0.25)
        part.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path):
    figure.savefig(path, metadata={"Date": None})
    return path


def _dots(axes, rows, colour, unit):
    """Horizontal dots with intervals: rows of (label, (value, low, high)), the first on top."""
    for place, (_, (value, low, high)) in enumerate(rows):
        axes.plot([low, high], [-place, -place], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(value, -place, "o", color=colour, markersize=7)
    axes.set_yticks([-place for place in range(len(rows))], [label for label, _ in rows])
    axes.set(xlabel=unit, ylim=(-len(rows) + 0.4, 0.6))


def comparison(file):
    """Where every variant of a sweep ended, with its interval over seeds, and how it got there. -> the SVG's path."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    runs = {label: [r for r in found["runs"] if r["label"] == label] for label in
            dict.fromkeys(r["label"] for r in found["runs"])}
    if not runs:
        raise ValueError(f"{file} holds no finished run yet")
    figure, (ends, paths) = _figure(11, 1.6 + 0.36 * max(6, len(runs)), 2)
    rows = [(label, [100 * x for x in interval([r["accuracy"] for r in of])]) for label, of in runs.items()]
    _dots(ends, rows, BLUE, "held-out accuracy (%): IQM over seeds, 95% interval")
    start = 100 * sum(r["warm_start_accuracy"] for r in found["runs"]) / len(found["runs"])
    ends.axvline(start, color=FAINT, linestyle="--", linewidth=1)
    ends.annotate("warm start", (start, 0.55), color=FAINT, fontsize=9, ha="left", xytext=(4, -2),
                  textcoords="offset points", va="top")
    for i, (label, of) in enumerate(runs.items()):
        curves = [list(zip(r["curve"]["generated_tokens"], r["curve"]["accuracy"], strict=True)) for r in of]
        points = [[sum(x) / len(x) for x in zip(*point, strict=True)] for point in zip(*curves, strict=False)]
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": "-" if i < len(PALETTE) else "--"}
        paths.plot([x / 1e3 for x, _ in points], [100 * y for _, y in points], label=label, linewidth=1.6, **style)
    paths.set(xlabel="generated tokens (thousands)", ylabel="training accuracy (%), mean")
    paths.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)  # hides no curve
    seeds = max(len(of) for of in runs.values())
    figure.suptitle(f"{found['experiment']} on {found['task']}: {found['budget_tokens']:,} tokens each, {seeds} seeds",
                    fontweight="bold")
    return _save(figure, Path(file).with_suffix(".svg"))


def training(file, methods=("sapo", "ppo", "vc-ppo", "grpo")):
    """Value loss, entropy and response length through training, mean over seeds (Fig. 6 and 7 of the paper)."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    figure, axes = _figure(13, 4, 3)
    names = {"value_loss": "value loss (squared reward)", "entropy": "entropy (nats per token)",
             "response_tokens": "response length (tokens)"}
    for part, (key, unit) in zip(axes, names.items(), strict=True):
        for colour, method in zip(PALETTE, methods, strict=False):
            curves = [list(zip(r["curve"]["generated_tokens"], r["curve"][key], strict=True))
                      for r in found["runs"] if r["label"] == method and key in r["curve"]]
            points = [[sum(x) / len(x) for x in zip(*point, strict=True)] for point in zip(*curves, strict=False)]
            if points:
                part.plot([x / 1e3 for x, _ in points], [y for _, y in points], label=method, color=colour, linewidth=2)
        part.set(xlabel="generated tokens (thousands)", ylabel=unit)
        if part.lines:  # GRPO alone has no value loss
            part.legend(fontsize=9)
    figure.suptitle(f"Through training on {found['task']}", fontweight="bold")
    return _save(figure, Path(file).with_name(Path(file).stem + "-training.svg"))


def truth(file):
    """Does the credit find the wrong steps, and does the gradient point the right way? -> the SVG's path."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    figure, (steps, slope) = _figure(11, 1.2 + 0.36 * max(5, len(found["methods"])), 2)
    rows = [(name, (x["auroc"], *x["auroc_interval"])) for name, x in found["methods"].items()]
    _dots(steps, rows, VERMILLION, "P(advantage of a right step > of a wrong one), 95% interval")
    steps.axvline(0.5, color=FAINT, linestyle="--", linewidth=1)
    _dots(slope, [(name, x["cosine"]) for name, x in found["methods"].items()], GREEN,
          "cosine with the reference gradient, at equal generated tokens")
    slope.axvline(0, color=FAINT, linestyle="--", linewidth=1)
    figure.suptitle(f"Credit and gradient on {found['task']}, policy frozen", fontweight="bold")
    return _save(figure, Path(file).with_suffix(".svg"))


def lift(file):
    """Lift (Eq. 12) over q, early and late in training, by sampled values and by the critic. -> the SVG's path."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    figure, axes = _figure(11, 4, 2)
    for part, (when, title) in zip(axes, {"early": "before training", "late": "after training"}.items(), strict=True):
        for colour, shift, name in ((BLUE, -0.6, "Monte Carlo"), (VERMILLION, 0.6, "critic")):
            curve = found[when][name]["lift"]
            places = [100 * float(q) + shift for q in curve]
            values, low, high = zip(*curve.values(), strict=True)
            part.vlines(places, low, high, color=colour, linewidth=2.5)
            part.plot(places, values, "o", color=colour, markersize=7, label=f"values by {name}")
        part.axhline(1, color=FAINT, linestyle="--", linewidth=1)
        part.set(xlabel="q: share of tokens called high-entropy (%)", title=title)
        part.legend(fontsize=9)
    axes[0].set_ylabel("Lift (Eq. 12), 95% interval over responses")
    axes[1].sharey(axes[0])
    figure.suptitle(f"Does V jump where entropy is high? {found['task']}", fontweight="bold")
    return _save(figure, Path(file).with_suffix(".svg"))


def drawn(folder):
    """Draw all that compare.py left in a folder of results. -> paths."""
    for file in sorted(Path(folder).glob("*.json")):
        kind = file.stem.split("-")[0]
        if kind in ("truth", "lift"):
            yield {"truth": truth, "lift": lift}[kind](file)
        elif kind != "tune" and "runs" in json.loads(file.read_text(encoding="utf-8")):
            yield comparison(file)
            if kind == "main":
                yield training(file)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a run's learning curve and credit map into its folder.")
    parser.add_argument("run", type=Path, help="the folder that train.py wrote, runs/<name>; or results")
    parser.add_argument("--count", type=int, default=6, help="responses on the credit map (default 6)")
    settings = parser.parse_args()
    try:
        if not settings.run.is_dir():
            raise FileNotFoundError(f"{settings.run} is no folder: expected runs/<name>, written by train.py")
        if not (settings.run / "metrics.jsonl").is_file() and any(settings.run.glob("*.json")):
            print(*drawn(settings.run), sep="\n")
            return
        print(learning_curve(settings.run))
        print(credit_map(settings.run, settings.count))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"figures.py: {error}") from None


if __name__ == "__main__":
    main()
