"""What the pictures share: their colours, a figure and its file, and the files of a run; and what
the command lines do: their parser, its whole numbers, and the file of an outcome.

Imports none of the project's modules, so that a picture can be made again long after the run.
"""

import argparse
import errno
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np

# After Okabe and Ito (2008), told apart with any common colour blindness.
BLUE = "#0072B2"  # credit
VERMILLION = "#D55E00"  # blame
GREEN = "#009E73"  # what a critic says
PURPLE = "#A8437E"  # SAPO among other methods; entropy beside credit
INK = "#222222"
FAINT = "#6B6B6B"
GREYS = ("#404040", "#A0A0A0", "#707070")  # of lines that are told apart by their names
LABEL_SIZE = 9  # points, of the names at the ends of lines
WIDTH = 11  # inches of each picture. On GitHub's 830 pixels a text of 9 points is 9 pixels high.

LARGEST_SEED = 2**32 - 1  # that NumPy takes
NOT_FINITE = ("inf", "-inf", "nan")  # as checkpoint.as_json writes such numbers


def command_line(name, about) -> argparse.ArgumentParser:
    """The parser of `python -m lab.<name>`, which takes no flag for another that it begins."""
    program = f"python -m lab.{name}"
    return argparse.ArgumentParser(program, description=about.split("\n")[0], allow_abbrev=False)


def whole(low, high=None):
    """A `type` of argparse: a whole number that is at least `low`, and at most `high`."""
    within = f"from {low} to {high}" if high is not None else f"of at least {low}"

    def number(word):
        try:
            value = int(word)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{word}: expected a whole number {within}")
        return value

    return number


def writable(file):
    """The file of an outcome, its folder made. SystemExit, in one line, where it cannot be written:
    to be called before the work whose outcome would be lost. A file stays as it is."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # An outcome is written beside its place, and takes it when it is whole
        tempfile.TemporaryFile(dir=file.resolve().parent).close()
        if file.is_file():
            os.close(os.open(file, os.O_WRONLY))
        elif file.exists():
            raise OSError(errno.EINVAL, "it is no plain file")
    except OSError as error:
        reason = f"{file} cannot be written ({error.strerror})"
        raise SystemExit(f"{reason}; free the place, or choose another") from error
    return file


def read_outcome(file):
    """The JSON object of a file under results/, its numbers as they were before
    checkpoint.write_json. ValueError, naming the file, for one that is damaged."""
    try:
        outcome = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(outcome, dict):
            raise ValueError("something else")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: expected one whole object of JSON ({error}); put it back from a copy, or "
            "move it away and measure again"
        ) from None
    return with_infinity(outcome)


def with_infinity(content):
    """A copy of lists and dicts with numbers in place of checkpoint.as_json's words for them."""
    if isinstance(content, dict):
        return {key: with_infinity(value) for key, value in content.items()}
    if isinstance(content, list):
        return [with_infinity(value) for value in content]
    return float(content) if content in NOT_FINITE else content


def read_lines(path):
    """The JSON objects of a .jsonl file as dicts without their nulls, each with an `iteration`.

    A torn last line is dropped: the run was killed while it wrote that line. Raises
    FileNotFoundError for a missing file; ValueError for a line that is no such object, and for a
    file without a complete line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected the folder of a run, as train.py writes it"
        )
    # Not splitlines(), which also cuts at U+2028: a character that may stand inside a JSON string.
    rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [(number, row) for number, row in enumerate(rows, 1) if row.strip()]
    lines = []
    for number, row in rows:
        try:
            line = json.loads(row)
        except (ValueError, RecursionError) as error:  # also too many digits, too deep lists
            if number == rows[-1][0]:
                break
            reason = getattr(error, "msg", error)
            raise ValueError(
                f"{path}, line {number} is not JSON ({reason}): repair or remove that line"
            ) from None
        iteration = line.get("iteration") if isinstance(line, dict) else None
        if type(iteration) is not int or not 0 <= iteration < 2**53:
            raise ValueError(
                f"{path}, line {number}: no object with a whole `iteration` from 0 to 2^53 but "
                f"{row[:60]!r}"
            )
        lines.append({key: value for key, value in line.items() if value is not None})
    if not lines:
        raise ValueError(f"{path} holds no complete line: let the run finish an iteration first")
    return lines


# Of a row of metrics.jsonl: what is drawn
DRAWN = ("accuracy", "eval_accuracy", "eval_low", "eval_high", "entropy", "explained_variance")


def read_metrics(path):
    """The rows of a metrics.jsonl, as `read_lines` gives them. ValueError, naming the iteration and
    the field, where what is drawn is no number."""
    rows = read_lines(path)
    for row in rows:
        for key in DRAWN:
            if row.get(key) in NOT_FINITE:
                row[key] = float(row[key])
            if key in row and not is_number(row[key]):
                raise ValueError(
                    f"{path}, iteration {row['iteration']}: {key} is {row[key]!r:.60}, expected a "
                    "number"
                )
    return rows


# Of a row of samples.jsonl: what is said of each token (in a list of numbers null is NaN), and what
# is shown as a text (`answer` and `predicted` may be anything: a task can be somebody's own)
REQUIRED = ("tokens", "advantages", "ends", "reward")
NUMBERS = (
    *("advantages", "entropy", "values", "token_values", "rewards", "logp", "new_logp"),
    "exact_values",
)
FLAGS = ("ends", "written")
TEXTS = ("prompt", "example_id")


def read_samples(path):
    """The rows of a samples.jsonl, as `read_lines` gives them: each a response of which every field
    is what the pages take it for.

    ValueError, naming iteration, example and field, where one is not. The folder of a run may come
    from somebody else, and a range of 10^12 tokens fits into a short line of a file, and into no
    memory.
    """
    rows = read_lines(path)
    for row in rows:
        where = f"{path}, iteration {row['iteration']}, example {row.get('example_id')!r:.60}"
        try:
            _check_sample(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def _check_sample(row):
    """ValueError where a field of a response is missing, or not what it has to be."""
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    tokens = row["tokens"]
    length = len(tokens) if isinstance(tokens, list) else 0
    _check_list("tokens", tokens, length, _is_text, "a text")
    for key in NUMBERS:
        if key in row:
            _check_list(key, row[key], length, _is_number_or_null, "a number")
    for key in FLAGS:
        if key in row:
            _check_list(key, row[key], length, _is_flag, "true or false")
    for key in TEXTS:
        if isinstance(row.get(key), list | dict):
            raise ValueError(f"{key} is {row[key]!r:.60}, expected a text or a number")
    if not is_number(row["reward"]) or not math.isfinite(row["reward"]):
        raise ValueError(f"reward is {row['reward']!r:.60}, expected a finite number")
    if not _is_flag(row.get("correct", False)):
        raise ValueError(f"correct is {row['correct']!r:.60}, expected true or false")
    _check_picture(row)
    _check_steps(row.get("steps", []), length)
    if "turns" in row:
        _check_turns(row["turns"], length)


def is_number(value):
    """A float, or a whole number that is not too large for one."""
    if type(value) is int:
        return abs(value) < 2**1023
    return isinstance(value, float)


def _is_number_or_null(value):
    return value is None or is_number(value)


def _is_flag(value):
    return isinstance(value, bool)


def _is_text(value):
    return isinstance(value, str)


def _check_list(key, items, length, is_one, what):
    """A list of `length` items, one for each token."""
    if not isinstance(items, list):
        raise ValueError(f"{key} is {items!r:.60}, expected a list, {what} for each token")
    if len(items) != length:
        raise ValueError(f"{len(items)} {key} for {length} tokens")
    for token, item in enumerate(items):
        if not is_one(item):
            raise ValueError(f"{key}[{token}] is {item!r:.60}, expected {what}")


def _check_picture(part):
    """Of a response or a turn: PNG in base64, or nothing."""
    image = part.get("image")
    if image is not None and not _is_text(image):
        raise ValueError(f"image is {image!r:.60}, expected a PNG in base64")


def _check_steps(steps, length):
    """[first token, last token, right?] each."""
    if not isinstance(steps, list):
        raise ValueError(f"steps {steps!r:.60}, expected a list")
    for step in steps:
        fits = isinstance(step, list) and len(step) == 3
        if not fits or not _is_span(*step[:2], 0, length) or not _is_flag(step[2]):
            raise ValueError(
                f"the step {step!r:.60}, expected [first token, last token, true or false] within "
                f"{length} tokens"
            )


def _check_turns(turns, length):
    """{"first": token, "last": token, "said": text, "image": picture or null} each, one behind the
    other."""
    if not isinstance(turns, list):
        raise ValueError(f"turns {turns!r:.60}, expected a list")
    begin = 0
    for turn in turns:
        fits = isinstance(turn, dict) and _is_text(turn.get("said"))
        if not fits or not _is_span(turn.get("first"), turn.get("last"), begin, length):
            raise ValueError(
                f"the turn {turn!r:.60}, expected the tokens `first` to `last` from {begin} on "
                f"within {length} tokens, and what was `said`"
            )
        _check_picture(turn)
        begin = turn["last"] + 1


def _is_span(first, last, least, length):
    """Are these two tokens, the first no earlier than `least` and no later than the last?"""
    return type(first) is int and type(last) is int and least <= first <= last < length


def is_right(sample):
    """Was a response right, or its game won? A row of samples.jsonl says so; of one that does not,
    by its reward: more than half, or in a game, where a reward may be partial, more than none."""
    return sample.get("correct", sample["reward"] > (0 if "turns" in sample else 0.5))


def check_examples(examples, of_example, path):
    """ValueError, naming the file, where it holds no response to one of the examples (ids)."""
    for name in examples:
        if name not in of_example:
            some = ", ".join(list(of_example)[:4])
            raise ValueError(
                f"{path}: no response to {name!r:.60} in the last iteration; there are {some} ..."
            )


def run_title(run_folder):
    """A title, "SAPO on DiceSum, seed 1"; the folder's name without a usable config.json."""
    try:
        config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
        method, env, seed = config["method"], config["env"], config["seed"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return run_folder.resolve().name
    task = str(env).removeprefix("SAPO/").rsplit("-v", 1)[0]
    return f"{str(method).upper()} on {task}, seed {seed}"


def new_figure(height, columns=1, rows=1, **subplots):
    """A matplotlib figure, WIDTH by `height` inches, and its axes, row by row.

    `subplots`: keywords of matplotlib's Figure.subplots, sharey="row" say.
    """
    try:
        # Not pyplot, which picks a window system and keeps global state: a bare Figure does not.
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures are drawn with matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False, **subplots).ravel()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)  # the grid lies behind what is drawn
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


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


def name_lines(axes, words=str):
    """Write each line's label to the right of the axes, with a thin leader from its last point. A
    thick line has it in its colour, and bold. Nothing where there is no line. words: what turns a
    label into the words that are written.

    Expects titles and axis labels in place: they decide how high the axes are, and with it how far
    apart labels must stand.
    """
    if not axes.lines:
        return
    axes.figure.draw_without_rendering()  # lays the figure out
    axes.set_ylim(axes.get_ylim())
    gap = 1.35 * LABEL_SIZE / 72 * axes.figure.dpi / axes.get_window_extent().height
    ends = [line.get_xydata()[-1] for line in axes.lines]
    places = axes.transAxes.inverted().transform(axes.transData.transform(ends))  # shares of both
    heights = spread([height for _, height in places], gap, 0, 1)
    for line, end, height in zip(axes.lines, ends, heights, strict=True):
        colour = line.get_color()
        is_thick = line.get_linewidth() > 2
        axes.annotate(
            words(line.get_label()),
            end,
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            color=colour if is_thick else GREYS[0],
            fontweight="bold" if is_thick else "normal",
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


def headline(figure, text):
    """What the figure shows, in bold above it."""
    figure.suptitle(text, fontsize=13, fontweight="bold", parse_math=False)


def save_svg(figure, path, description=None):
    """Write the figure, the same at every drawing: no date in it, and no random names."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "sapo"}):
        figure.savefig(path, metadata={"Date": None, "Description": description})
    return path
