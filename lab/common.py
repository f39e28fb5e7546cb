"""What the pictures share: their colours, a figure and its file, and the files of a run.

Imports none of the project's modules, so that a picture can be made again long after the run.
"""

import json

# The colours of Okabe and Ito (2008), told apart with any common colour blindness.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#A8437E"
INK = "#222222"
FAINT = "#6B6B6B"


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
        if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
            raise ValueError(
                f"{path}, line {number}: no object with a whole `iteration` but {row[:60]!r}"
            )
        lines.append({key: value for key, value in line.items() if value is not None})
    if not lines:
        raise ValueError(f"{path} holds no complete line: let the run finish an iteration first")
    return lines


def is_right(sample):
    """Was a response right, or its game won? A row of samples.jsonl says so; of one that does not,
    by its reward: more than half, or in a game, where a reward may be partial, more than none."""
    return sample.get("correct", sample["reward"] > (0 if "turns" in sample else 0.5))


def checked_steps(steps, length, where):
    """The steps of a response of `length` tokens: [(first token, last token, right?), ...].

    ValueError, saying where, for anything else. (A range of 10^12 tokens fits into a short line of
    a file, and into no memory.)
    """
    if not isinstance(steps, list):
        raise ValueError(f"{where}: steps {steps!r:.60}, expected a list")
    for step in steps:
        fits = isinstance(step, list) and len(step) == 3
        fits = fits and all(type(token) is int for token in step[:2])
        if not fits or not 0 <= step[0] <= step[1] < length or not isinstance(step[2], bool):
            raise ValueError(
                f"{where}: the step {step!r:.60}, expected [first token, last token, true or "
                f"false] within {length} tokens"
            )
    return steps


def run_title(run_folder):
    """A title, "SAPO on DiceSum, seed 1"; the folder's name without a usable config.json."""
    try:
        config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
        method, env, seed = config["method"], config["env"], config["seed"]
    except (OSError, ValueError, TypeError, KeyError):
        return run_folder.resolve().name
    task = str(env).removeprefix("SAPO/").rsplit("-v", 1)[0]
    return f"{str(method).upper()} on {task}, seed {seed}"


def new_figure(width, height, columns, rows=1, width_ratios=None, **options):
    """A matplotlib figure of `width` by `height` inches, and its axes, row by row."""
    try:
        # Not pyplot, which picks a window system and keeps global state: a bare Figure does not.
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures are drawn with matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", **options)
    panels = figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios).ravel()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save_svg(figure, path, description=None):
    """Write the figure, the same at every drawing: no date in it, and no random names."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "sapo"}):
        figure.savefig(path, metadata={"Date": None, "Description": description})
    return path
