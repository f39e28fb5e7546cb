"""lab/compare.py: the command line of the comparisons, a small sweep from end to end."""

import json
import re

import pytest
from small_sweeps import FAST, SUM_TASK

from lab import compare, figures


def test_a_sweep_end_to_end_and_again(tmp_path, capsys):
    """A method by two seeds through the real command line; a second call finds all of it done."""
    flags = [*SUM_TASK, "--methods", "grpo", "--seeds", "2", "--tokens", "1200", "--tag", "small"]
    flags += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    flags += [*FAST, "--actor_lr", "1e-3"]
    compare.main(flags)
    file = tmp_path / "main-TextSum-n=1-largest=99-small.json"
    outcome = json.loads(file.read_text())
    assert outcome["command"].startswith("python -m lab.compare --env SAPO/TextSum-v0 ")
    assert {"experiment", "task", "budget_tokens", "jobs", "date", "versions"} <= outcome.keys()
    runs = outcome["runs"]
    assert sorted((run["label"], run["seed"]) for run in runs) == [("grpo", 0), ("grpo", 1)]
    for run in runs:
        assert 1200 <= run["generated_tokens"] < 1800
        assert run["curve"]["generated_tokens"][-1] == run["generated_tokens"]
        assert len({len(curve) for curve in run["curve"].values()}) == 1
    warm_starts = list((tmp_path / "runs" / "cache").glob("*/manifest.json"))
    assert len(warm_starts) == 2  # one per seed
    shown = capsys.readouterr().out
    assert re.search(r"^\| grpo \| 2 \|", shown, re.MULTILINE) and "IQM" in shown

    logs = list((tmp_path / "runs").rglob("*.log"))
    times = [log.stat().st_mtime_ns for log in logs]
    compare.main(flags)
    assert len(logs) == 2 and times == [log.stat().st_mtime_ns for log in logs]
    assert json.loads(file.read_text())["runs"] == runs

    pictures = list(figures.drawn(tmp_path))
    assert [p.name for p in pictures] == [file.stem + ".svg", file.stem + "-training.svg"]
    assert all("<path" in picture.read_text() for picture in pictures)


def test_the_tag_is_made_of_train_pys_flags_unless_given():
    flags = ["--seeds", "3", "--lam", "0.9", "--model", "hub/name"]
    sweep, extra = compare.parse(flags)
    assert extra == ["--lam", "0.9", "--model", "hub/name"] and sweep.seeds == 3
    assert sweep.name == "main-DiceSum-lam_0.9_model_hub_name"
    assert compare.parse([*flags, "--tag", "mine"])[0].name == "main-DiceSum-mine"
    assert compare.parse([])[0].name == "main-DiceSum"


@pytest.mark.parametrize(("experiment", "measurement"), [("truth", "truth"), ("lift", "lifts")])
def test_a_measurement_is_written_with_every_part(experiment, measurement, tmp_path, monkeypatch):
    file = tmp_path / f"{experiment}-DiceSum-lam_0.9.json"
    written_so_far = []

    def two_parts(sweep, extra):
        assert (sweep.seeds, extra) == (5, ["--lam", "0.9"])
        yield {"values": 1}
        written_so_far.append(json.loads(file.read_text()))
        yield {"values": 1, "methods": 2}

    monkeypatch.setattr(compare, measurement, two_parts)
    compare.main(["--experiment", experiment, "--results", str(tmp_path), "--lam", "0.9"])
    (first,) = written_so_far
    last = json.loads(file.read_text())
    assert first["values"] == 1 and "methods" not in first
    assert last == {**first, "methods": 2} and last["experiment"] == experiment


def test_what_is_wrong_becomes_one_line(tmp_path):
    with pytest.raises(SystemExit, match="nope: expected one of"):
        compare.main(["--experiment", "nope", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="see .*grpo-seed0.log"):
        flags = ["--methods", "grpo", "--seeds", "1", "--batch", "1", "--runs", str(tmp_path)]
        compare.main([*flags, "--results", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))
