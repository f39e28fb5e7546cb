"""The command lines of lab/: a wrong word is refused in one line, before any work."""

import argparse
import importlib
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

import checkpoint
from lab import bench, critic, kills, soak
from lab.common import read_outcome, whole, writable

# {words: the end of the line that refuses them}
ABBREVIATED = {
    "bench --bat=4": "unrecognized arguments: --bat=4",
    "critic --seed 3": "unrecognized arguments: --seed 3",
    "episode a b --fold c": "unrecognized arguments: --fold c",
    "kills --kill 1": "unrecognized arguments: --kill 1",
    "mutants --fold a": "unrecognized arguments: --fold a",
    "soak --minute 5": "unrecognized arguments: --minute 5",
    "theorems sapo:segment_gae --example 3": "unrecognized arguments: --example 3",
    "treasure a --game 3": "unrecognized arguments: --game 3",
    "trl_sapo --ou a.json": "--ou: no flag of this program; did you mean --out or --group?",
    "trl_sapo --trll=a=1": "--trll=a=1: no flag of this program; did you mean --trl?",
    "trl_sapo --grou 4": "--grou: no flag of this program; did you mean --group?",
}

SENSELESS = {
    "bench --batch -1 --tokens 8": "argument --batch: -1: expected a whole number of at least 1",
    "bench --batch 4 --tokens 0": "argument --tokens: 0: expected",
    "bench --repeats 0": "argument --repeats: 0: expected",
    "bench --seed=-1": "argument --seed: -1: expected a whole number from 0 to 4294967295",
    "critic --seeds=-1": "argument --seeds: -1: expected a whole number from 0 to 4294967295",
    "critic --rollouts 0": "argument --rollouts: 0: expected a whole number of at least 1",
    "critic --continuations -3": "argument --continuations: -3: expected",
    "critic --states-of 0": "argument --states-of: 0: expected a whole number from 1 to 256",
    "critic --states-of 257": "argument --states-of: 257: expected",
    "critic --run a --responses 0": "argument --responses: 0: expected",
    "critic --run a --responses 99999": "argument --responses: 99999: expected a whole number from",
    "critic --run /nowhere": "--resume /nowhere: no config.json there",
    "kills --seed=-1 --kills 1": "argument --seed: -1: expected a whole number from 0 to 42949",
    "kills --kills 0": "argument --kills: 0: expected a whole number of at least 1",
    "kills --kills 1.5": "argument --kills: 1.5: expected a whole number of at least 1",
    "soak --minutes inf": "--minutes inf: expected at least 2, to see growth, and an end",
    "theorems ..x:y": "python -m lab.theorems: ..x:y: a relative name; expected module:function",
    "theorems :y": "python -m lab.theorems: ':y': expected module:function",
    "theorems sapo:__doc__": "expected a function",
    "theorems sapo:segment_gae --examples 0": "argument --examples: 0: expected",
    "treasure a --games 0": "argument --games: 0: expected",
}


def said_by(words, capsys):
    """The last line with which a command refuses some words."""
    name, *words = words.split()
    with pytest.raises(SystemExit) as refused:
        importlib.import_module(f"lab.{name}").main(words)
    code = refused.value.code
    assert code not in (0, None)
    said = capsys.readouterr().err if code == 2 else str(code)
    assert code == 2 or "\n" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(("words", "line"), ABBREVIATED.items(), ids=ABBREVIATED)
def test_a_flag_is_not_guessed_from_its_beginning(words, line, capsys):
    assert said_by(words, capsys).endswith(line)


@pytest.mark.parametrize(("words", "line"), SENSELESS.items(), ids=SENSELESS)
def test_a_senseless_word_is_refused_by_name(words, line, capsys):
    assert line in said_by(words, capsys)


def test_a_damaged_run_is_no_traceback_of_the_critics(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[]")
    said = said_by(f"critic --run {tmp_path}", capsys)
    assert said.startswith(f"python -m lab.critic: {tmp_path}/config.json: expected an object")


@pytest.mark.parametrize("name", ["estimators", "memory", "ratio_noise", "tables"])
def test_a_command_without_flags_takes_no_words(name, monkeypatch, capsys):
    """It took them in silence, and worked for minutes where --help was asked for."""
    monkeypatch.setattr(sys, "argv", [name, "--nope"])
    monkeypatch.delitem(sys.modules, f"lab.{name}", raising=False)
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_module(f"lab.{name}", run_name="__main__")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"python -m lab.{name}: error: unrecognized arguments: --nope"


@pytest.mark.parametrize(("word", "number"), [("0", None), ("1", 1), ("3", 3), ("4", None)])
def test_a_whole_number_lies_within_its_bounds(word, number):
    if number is None:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{word}: expected .* from 1 to 3$"):
            whole(1, 3)(word)
    else:
        assert whole(1, 3)(word) == number


@pytest.mark.parametrize("word", ["", "one", "1.0", "nan"])
def test_no_whole_number_is_said_to_be_none(word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{word}: expected a whole number of"):
        whole(0)(word)


# ------------------------------------------------------------------------ where an outcome goes


def test_the_folder_of_an_outcome_is_made_and_its_file_is_not(tmp_path):
    file = tmp_path / "of" / "mine" / "outcome.json"
    assert writable(file) == file
    assert file.parent.is_dir() and not list(file.parent.iterdir())
    file.write_text("as it was")
    writable(file)
    assert file.read_text() == "as it was" and list(file.parent.iterdir()) == [file]


def test_an_outcome_that_cannot_be_written_is_refused_with_its_name(tmp_path):
    """Nor is one written in place of /dev/null."""
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    within = (tmp_path / "file" / "a.json", tmp_path / "file" / "of" / "a.json")
    for file in (tmp_path, tmp_path / "pipe", Path("/dev/null"), *within):
        with pytest.raises(SystemExit, match=f"^{re.escape(str(file))} cannot be written"):
            writable(file)


def test_an_outcome_is_read_as_it_was_written(tmp_path):
    outcome = {"auroc": math.nan, "of": [[-math.inf, 0.5], {"is": "word", "none": None}]}
    file = tmp_path / "a.json"
    checkpoint.write_json(file, outcome)
    assert repr(read_outcome(file)) == repr(outcome)


@pytest.mark.parametrize(
    "words",
    [
        "bench tokens --out FILE/a.json",
        "compare --results FILE",
        "critic --results FILE",
        "trl_sapo --out FILE/a.json",
    ],
)
def test_no_command_works_for_what_it_cannot_write(words, tmp_path, monkeypatch, capsys):
    if words.startswith("trl_sapo"):
        monkeypatch.setattr("lab.trl_sapo.build", None)
    monkeypatch.setattr(bench, "measure", None)
    monkeypatch.setattr(critic, "experiment", None)
    monkeypatch.setattr("lab.compare.measure", None)
    (tmp_path / "file").write_text("")
    said = said_by(words.replace("FILE", str(tmp_path / "file")), capsys)
    assert said.startswith(f"{tmp_path}/file/") and "cannot be written (" in said


@pytest.mark.parametrize("module", [kills, soak])
def test_long_work_is_not_begun_for_a_committed_file_that_cannot_be_written(
    module, tmp_path, monkeypatch, capsys
):
    (tmp_path / "results").write_text("")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(kills, "FILE", tmp_path / "results" / "kills.json")
    monkeypatch.setattr(module, "tempfile", None)
    assert "cannot be written" in said_by(module.__name__.removeprefix("lab."), capsys)
