"""lab/kills.py: runs that are killed end where the uncut one ends, and a difference is seen."""

import json

import pytest
import torch

from lab import kills


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What a kill did, and the folder of the runs."""
    runs = tmp_path_factory.mktemp("killed")
    shorter = tuple("4" if word == "12" else word for word in kills.FLAGS)  # iterations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kills, "FLAGS", shorter)
        return kills.kill_at_random(runs, kills=1, seed=1, say=lambda line: None), runs


def test_killed_runs_end_where_the_uncut_one_ends(killed):
    found, _ = killed
    assert found["all_equal"]
    assert [kill["signal"] for kill in found["kills"]] == ["SIGKILL"]
    assert all(0 <= kill["after"] <= found["seconds_uncut"] for kill in found["kills"])
    assert found["runs_ended"] >= 1


def test_one_bit_of_a_weight_or_of_a_number_is_seen(killed):
    _, runs = killed
    whole = kills.outcome(runs / "uncut")
    file = runs / "uncut" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["entropy"] += 1e-12
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not kills.equal(kills.outcome(runs / "uncut"), whole)
    state = {"critic": [torch.zeros(3)], "step": 1}
    assert kills.equal(state, {"critic": [torch.zeros(3)], "step": 1})
    assert not kills.equal(state, {"critic": [torch.tensor([0.0, 0.0, 1e-30])], "step": 1})


def test_a_run_that_fails_by_itself_stops_the_count(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "FLAGS", ("--lam", "2"))
    with pytest.raises(RuntimeError, match="lam"):
        kills.kill_at_random(tmp_path, kills=1, seed=0, say=lambda line: None)
