"""The credit explorer: a run's held-out responses as a page to play with, credit.html.

The page (lab/explorer.html) needs nothing but itself: the responses stand in it as JSON, and it
computes cut, advantages and returns anew when a slider moves, by the formulas of sapo.py.
`python -m lab.figures runs/<name>` writes it from samples.jsonl.

Text from a model is untrusted. As JSON in the page it holds no "<" and nothing but ASCII; the page
sets it as text, never as markup, and its policy forbids every request.
"""

import json
import math
from itertools import zip_longest
from pathlib import Path

from lab.common import read_lines, run_title

TEMPLATE = Path(__file__).with_name("explorer.html")
CHECKPOINTS = 4  # that are kept, the first and the last among them
RESPONSES = 24  # of each
# Of a row of samples.jsonl: what the page needs beside what `_response` works out
KEPT = ("prompt", "answer", "predicted", "reward", "tokens", "ends", "image", "turns", "logp")


def explorer(run_folder) -> Path:
    """Write credit.html into a run's folder, from its samples.jsonl and config.json.

    FileNotFoundError for a missing samples.jsonl, ValueError for an unusable one.
    """
    run_folder = Path(run_folder)
    by_iteration = {}
    for row in read_lines(run_folder / "samples.jsonl"):
        by_iteration.setdefault(row["iteration"], []).append(row)
    iterations = _spread(sorted(by_iteration), CHECKPOINTS)
    ids = _chosen_ids(by_iteration[iterations[-1]])
    data = {
        "title": run_title(run_folder),
        "settings": _settings(run_folder),
        "checkpoints": [
            _checkpoint(iteration, by_iteration[iteration], ids) for iteration in iterations
        ],
    }
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    page = TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text.replace("<", "\\u003c"))
    file = run_folder / "credit.html"
    file.write_text(page, encoding="utf-8")
    return file


def _spread(items, count):
    """At most `count` of some items, the first and the last among them, evenly between."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _settings(run_folder):
    """Where the sliders begin: the run's own settings, or the paper's where they are not known."""
    begin = {"top_k": 0.3, "lam": 0.99, "gamma": 1.0}
    try:
        config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))["config"]
        return {name: float(config.get(name, number)) for name, number in begin.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return begin


def _chosen_ids(rows):
    """The examples to show, wrong and right by turns: those that were wrong last teach most."""
    right = [row.get("example_id") for row in rows if row["reward"] > 0.5]
    wrong = [row.get("example_id") for row in rows if row["reward"] <= 0.5]
    by_turns = [name for pair in zip_longest(wrong, right) for name in pair if name is not None]
    return by_turns[:RESPONSES]


def _checkpoint(iteration, rows, ids):
    """One checkpoint: its responses to the chosen examples, and what GRPO would compare with."""
    rewards = [row["reward"] for row in rows]
    mean = sum(rewards) / len(rewards)
    spread = sum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1)
    of_example = {row.get("example_id"): row for row in rows}
    return {
        "iteration": iteration,
        "group": {"mean": mean, "std": math.sqrt(spread)},
        "responses": [_response(of_example[name]) for name in ids if name in of_example],
    }


def _response(row):
    """A row of samples.jsonl as the page takes it. ValueError where its lists do not fit."""
    length = len(row["tokens"])
    response = {name: row[name] for name in KEPT if name in row} | {
        "id": str(row.get("example_id", "")),
        "written": row.get("written", [True] * length),
        "entropy": row.get("entropy", [0.0] * length),
        "values": row.get("token_values"),
        "rewards": row.get("rewards", [0.0] * (length - 1) + [row["reward"]]),
        "advantages": [0.0 if number is None else number for number in row["advantages"]],
        "steps": row.get("steps", []),
    }
    for name in ("written", "entropy", "values", "rewards", "advantages", "ends"):
        if response[name] is not None and len(response[name]) != length:
            raise ValueError(
                f"samples.jsonl, iteration {row['iteration']}, example {response['id']!r}: "
                f"{len(response[name])} {name} for {length} tokens"
            )
    return response
