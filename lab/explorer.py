"""The credit explorer: a run's responses as a page to play with, credit.html. Most are held out.
Some the policy had just learned from: of these the page shows the importance ratio, too.

The page (lab/explorer.html) needs nothing but itself: the responses stand in it as JSON, and it
computes cut, advantages and returns anew when a slider moves, by the formulas of sapo.py.
`python -m lab.figures runs/<name>` writes it from samples.jsonl.

Text from a model is untrusted. As JSON in the page it holds no "<" and nothing but ASCII; the page
sets it as text, never as markup, and its policy forbids loading anything.
"""

import json
import math
from itertools import zip_longest
from pathlib import Path

from lab.common import check_examples, is_right, read_samples, run_title

TEMPLATE = Path(__file__).with_name("explorer.html")
CHECKPOINTS = 4  # that are kept, the first and the last among them
RESPONSES = 24  # of each, or fewer: as many as fit into a page of this size
LEARNED_FROM = 6  # responses beside each that the policy had just learned from
LARGEST = 1_000_000  # characters
# Of a row of samples.jsonl: what is copied as it is; `_response` adds the rest
KEPT = (
    *("prompt", "answer", "predicted", "reward", "tokens", "ends", "image", "turns"),
    *("logp", "new_logp"),
)
# What the page computes with
FINITE = ("entropy", "token_values", "rewards", "advantages", "logp", "new_logp", "exact_values")


def explorer(run_folder, examples=None) -> Path:
    """Write credit.html into a run's folder, from its samples.jsonl and config.json: of what is
    held out, responses to the `examples` (their ids), or else wrong and right ones by turns.

    FileNotFoundError for a missing samples.jsonl, ValueError for an unusable one and for an example
    that is not there.
    """
    run_folder = Path(run_folder)
    path = run_folder / "samples.jsonl"
    held_out, learned = {}, {}  # iteration -> {example: its response}, in the order of the file
    for row in read_samples(path):
        response = _response(row, f"{path}, iteration {row['iteration']}")
        if any(response["written"]):
            by_iteration = learned if "learned_from" in row else held_out
            by_iteration.setdefault(row["iteration"], {}).setdefault(response["id"], response)
    if not held_out:
        raise ValueError(f"{path} holds no response of at least one token")
    iterations = _spread(sorted(held_out), CHECKPOINTS)
    last = held_out[iterations[-1]]
    check_examples(examples or (), last, path)
    ids = examples or _chosen_ids(last.values(), RESPONSES)
    head = {"title": run_title(run_folder)} | _settings(run_folder)
    template = TEMPLATE.read_text(encoding="utf-8")
    for count in range(len(ids), 0, -1):
        checkpoints = []
        for i in iterations:
            checkpoints.append(_checkpoint(str(i), f"iteration {i}", held_out[i], ids[:count]))
            if i in learned:
                own_ids = _chosen_ids(learned[i].values(), min(count, LEARNED_FROM))
                name = f"iteration {i}, learned from"
                checkpoints.append(_checkpoint(f"{i}-learned", name, learned[i], own_ids))
        data = head | {"pictures": _put_together(checkpoints), "checkpoints": checkpoints}
        try:
            text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        page = template.replace("__DATA__", text.replace("<", "\\u003c"))
        if len(page) <= LARGEST:
            break
    file = run_folder / "credit.html"
    file.write_text(page, encoding="utf-8")
    return file


def _put_together(checkpoints):
    """Every picture once, as a list; in the responses and their turns stand places in it."""
    places = {}
    for checkpoint in checkpoints:
        checkpoint["responses"] = [dict(response) for response in checkpoint["responses"]]
        for response in checkpoint["responses"]:
            if "turns" in response:
                response["turns"] = [dict(turn) for turn in response["turns"]]
            for part in (response, *response.get("turns", [])):
                if part.get("image"):
                    part["image"] = places.setdefault(part["image"], len(places))
                else:
                    part.pop("image", None)
    return list(places)


def _spread(items, count):
    """At most `count` of some items, the first and the last among them, evenly between."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _settings(run_folder):
    """Of the run, or of the paper where they are not known:

    settings  where the sliders begin, and the clip
    ratio     which ratio is clipped, one of sapo.RATIOS
    is_sapo   is the run's credit what the page's SAPO computes?
    """
    begin = {"top_k": 0.3, "lam": 0.99, "gamma": 1.0, "clip_low": 0.2, "clip_high": 0.2}
    try:
        stored = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
        config, settings = stored["config"], stored["settings"]
        is_sapo = settings["credit"] == "critic" and settings["cut"] == "topk"
        is_sapo = is_sapo and config["value_at"] == "start"
        own = {name: float(config.get(name, number)) for name, number in begin.items()}
        own = {name: min(number, 1e9) for name, number in own.items()}  # no clip is inf
        if not all(map(math.isfinite, own.values())):
            raise ValueError("not all settings are numbers")
        ratio = str(config.get("ratio", "segment"))
        return {"settings": own, "ratio": ratio, "is_sapo": is_sapo}
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ):
        return {"settings": begin, "ratio": "segment", "is_sapo": True}


def _chosen_ids(responses, count):
    """The examples to show, wrong and right by turns. Of the wrong ones those come first of which
    the critic noticed most: the page opens on the largest `fall_at_first_wrong_step`."""
    right = [response["id"] for response in responses if response["won"]]
    lost = [response for response in responses if not response["won"]]
    lost.sort(key=fall_at_first_wrong_step, reverse=True)
    wrong = [response["id"] for response in lost]
    by_turns = [name for pair in zip_longest(wrong, right) for name in pair if name is not None]
    return by_turns[:count]


def _checkpoint(key, name, of_example, ids):
    """One checkpoint: its responses to the chosen examples, and what GRPO would compare with."""
    rewards = [response["reward"] for response in of_example.values()]
    # One reward is subtracted first, so that equal ones differ from their mean by exact zeros
    shifted = [reward - rewards[0] for reward in rewards]
    mean = sum(shifted) / len(shifted)
    variance = sum((reward - mean) ** 2 for reward in shifted) / max(1, len(shifted) - 1)
    return {
        "key": key,
        "name": name,
        "group": {"mean": rewards[0] + mean, "std": math.sqrt(variance)},
        "responses": [of_example[name] for name in ids if name in of_example],
    }


def _response(row, where):
    """A row of samples.jsonl as the page takes it, 0 for null. ValueError, saying where, for NaN,
    which JSON does not know."""
    for key in FINITE:
        for token, number in enumerate(row.get(key, [])):
            if number is not None and not math.isfinite(number):
                raise ValueError(
                    f"{where}, example {row.get('example_id')!r:.60}: {key}[{token}] is {number}, "
                    "expected a finite number"
                )
    length = len(row["tokens"])
    response = {key: row[key] for key in KEPT if key in row} | {
        "id": str(row.get("example_id", "")),
        "won": is_right(row),
        "written": row.get("written", [True] * length),
        "entropy": row.get("entropy"),
        "values": row.get("token_values"),
        "rewards": row.get("rewards", [0.0] * (length - 1) + [row["reward"]]),
        "advantages": row["advantages"],
        "steps": row.get("steps", []),
    }
    # In a game a wrong step can be made good, so only the game itself can say what it cost
    of_steps = None if "turns" in row else perfect_values(response["steps"], length)
    response["perfect"] = row.get("exact_values", of_steps)
    for key in ("entropy", "values", "perfect", "rewards", "advantages", "logp", "new_logp"):
        if response.get(key) is not None:
            response[key] = [0.0 if number is None else number for number in response[key]]
    return response


def fall_at_first_wrong_step(response):
    """V before the first wrong step less V after it, of a response as the page takes it; 0 where no
    step is known to be wrong, or no V. After the last token V is 0."""
    values = response["values"]
    wrong_steps = [step for step in response["steps"] if not step[2]]
    if not values or not wrong_steps:
        return 0.0
    first, last, _ = wrong_steps[0]
    after = [t for t in range(last + 1, len(values)) if response["written"][t]]
    return values[first] - (values[after[0]] if after else 0.0)


def perfect_values(steps, length):
    """V before each token by a critic that knows which steps are right, and takes all that come for
    right: 1 up to the last token of the first wrong step, and 0 after it. None where no step is
    known."""
    if not steps:
        return None
    lost = next((last for _, last, right in steps if not right), length)
    return [1.0 if t <= lost else 0.0 for t in range(length)]
