"""Lines of sapo.py and baselines.py broken on purpose: which of them does no test notice?

    pip install mutmut
    mutmut run                        # an hour or two of one core; it can be stopped and goes on
    python -m lab.mutants             # -> results/mutants.json

mutmut makes mutants: copies of a function with one thing changed (a number, a sign, a comparison,
an argument). Each is tried with the tests that call that function (pyproject.toml has which files).
Here its records are read: how many were tried, and how each survivor differs from the original.
What only changes the wording of a sentence is left out; so is `setting`, which has done its work
before a mutant is put in. A survivor may say `why` it lives: who has found it out writes that
into the file, and the next run keeps it where the mutant is the same.
"""

import argparse
import collections
import difflib
import importlib.metadata
import json
import re
import time
from pathlib import Path

import torch

import checkpoint
from lab.common import command_line
from lab.sweep import ROOT

SOURCES = ("sapo.py", "baselines.py")
LEFT_OUT = ("setting",)
# What mutmut notes of a mutant. All else, a crash among it, is no answer, and counts as not tried
SURVIVED = {0, 5, 33}  # the last two: no test calls the function
KILLED = {1, 3, 24, -24, 36, 152, 255}  # a test failed, raised, or took far too long


def read(folder) -> dict:
    """mutmut's records in a folder: {"tried", "killed", "functions", "survivors"}.

    functions: {name: mutants of it that were tried}; survivors: [{"name", "was", "is"}, ...].
    """
    tried, survivors = collections.Counter(), []
    for source in SOURCES:
        code = Path(folder) / source
        record = json.loads(Path(f"{code}.meta").read_text())["exit_code_by_key"]
        spans = json.loads(Path(f"{code}.spans").read_text())["spans"]
        lines = code.read_text().splitlines()
        for key, status in record.items():
            name = key.partition(".")[2]
            function = function_of(name)
            first, last = spans[f"{re.sub('[0-9]+$', '', name)}orig"]
            original = lines[first - 1 : last]
            first, last = spans[name]
            was, now = changes(original, lines[first - 1 : last])
            if function in LEFT_OUT or same_but_for_wording(was, now):
                continue
            if status not in SURVIVED | KILLED:
                continue
            tried[f"{source}: {function}"] += 1
            if status in SURVIVED:
                survivors.append({"name": f"{source}: {function}", "was": was, "is": now})
    total = sum(tried.values())
    return {
        "tried": total,
        "killed": total - len(survivors),
        "functions": dict(tried),
        "survivors": survivors,
    }


def function_of(name) -> str:
    """The function of a mutant: x_whiten__mutmut_3 is of whiten, xǁMethodǁcut__mutmut_1 of
    Method.cut."""
    return (
        name.partition("__mutmut_")[0]
        .removeprefix("x")
        .strip("ǁ")
        .removeprefix("_")
        .replace("ǁ", ".")
    )


def changes(original, mutant) -> tuple[str, str]:
    """The lines that differ between two versions of a function: (as they were, as they are). Its
    name, which differs anyhow, is left out."""
    was, now = [], []
    for line in difflib.ndiff(original, mutant):
        if "__mutmut_" in line:
            continue
        if line.startswith("- "):
            was.append(line[2:].strip())
        elif line.startswith("+ "):
            now.append(line[2:].strip())
    return " ".join(was), " ".join(now)


def same_but_for_wording(was, now) -> bool:
    """Does only the wording of a sentence differ, a string with a blank in it? mutmut puts XX
    around a string, or changes its case. A single word is a name that the code acts by."""
    before, after = re.findall(r'"([^"]*)"', was), re.findall(r'"([^"]*)"', now)
    differ = [string for string, other in zip(before, after, strict=False) if string != other]
    is_wording = now.replace("XX", "").casefold() == was.casefold()
    return is_wording and all(" " in string for string in differ)


def explain(survivors, earlier) -> None:
    """Give each survivor the `why` that it had in an earlier run; but for "tested" and "gone",
    which a mutant that has lived once more refutes."""
    told = {(one["name"], one["was"], one["is"]): one.get("why", "") for one in earlier}
    for one in survivors:
        why = told.get((one["name"], one["was"], one["is"]), "")
        if why.startswith(("same", "card")):
            one["why"] = why


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = command_line("mutants", __doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "mutants", help="mutmut's")
    return parser.parse_args(argv)


def main(argv=None):
    """Read mutmut's records, and write what survived."""
    folder = parse(argv).folder
    try:
        found = read(folder)
    except OSError as error:
        raise SystemExit(f"python -m lab.mutants: {error}; first: mutmut run") from error
    file = ROOT / "results" / "mutants.json"
    explain(found["survivors"], json.loads(file.read_text())["survivors"] if file.is_file() else [])
    outcome = {
        "command": "mutmut run; python -m lab.mutants",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "mutmut": importlib.metadata.version("mutmut")},
        **found,
    }
    checkpoint.write_json(file, outcome)
    print(f"{found['killed']} of {found['tried']} were noticed; these were not:")
    for survivor in found["survivors"]:
        print(f"{survivor['name']}\n  - {survivor['was']}\n  + {survivor['is']}")


if __name__ == "__main__":
    main()
