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
        return kills.kill_at_random(runs, kills=2, seed=1, say=lambda line: None), runs


def test_killed_runs_end_where_the_uncut_one_ends(killed):
    found, _ = killed
    assert found["all_equal"]
    assert [kill["signal"] for kill in found["kills"]] == ["SIGKILL", "SIGTERM"]
    assert all(kill["after"] >= 0 for kill in found["kills"])
    assert found["runs_ended"] >= 1


def test_each_kill_says_which_phase_it_met(killed):
    """The one that it was aimed at, or one just behind: a machine is not always as fast."""
    found, _ = killed
    assert found["kills"][0]["phase"] in {"start", "warm start"}
    assert found["kills"][1]["phase"] in {*kills.PHASES, kills.BETWEEN} - {"start"}


def test_an_uncut_run_comes_into_every_phase(killed):
    """As often as it should, and all that it did is a phase or stands between two."""
    _, runs = killed
    lengths = kills.lengths(kills.phases_of(runs / "uncut.phases"))
    assert set(lengths) == {*kills.PHASES, kills.BETWEEN}
    count = {phase: len(times) for phase, times in lengths.items()}
    assert count["start"] == count["warm start"] == count["finish"] == 1
    assert count["update"] == 4 and count["save"] == 3  # at the start, after 2 and at the end


class Pretended:
    """A run that comes into any phase at once, and whose process does as it is told."""

    def __init__(self, ends_with=None):
        self.asked, self.signals, self.ends_with = [], [], ends_with
        self.process = self

    def wait_for(self, phase, times):
        self.asked.append((phase, times))
        return self.ends_with != "its end"

    def phase(self):
        return self.asked[-1][0]

    def send_signal(self, kind):
        self.signals.append(kind)

    def wait(self):
        return 0 if self.ends_with == "its end at the last moment" else -self.signals[-1]

    def has_ended(self):
        return self.ends_with == "its end at the last moment"


def test_kills_are_spread_over_the_phases_and_both_signals():
    rng = kills.np.random.default_rng(0)
    lengths = {phase: [1e-6] * 3 for phase in kills.PHASES}
    met = [kills.kill(Pretended(), number, lengths, rng) for number in range(50)]
    counts = {phase: [one["phase"] for one in met].count(phase) for phase in kills.PHASES}
    assert min(counts.values()) >= 7
    for phase in kills.PHASES:
        assert {one["signal"] for one in met if one["phase"] == phase} == {"SIGKILL", "SIGTERM"}


def test_who_comes_too_late_into_a_phase_waits_for_the_next_time():
    run = Pretended()
    phases = iter(["between", "rollout", "start", "start"])
    run.phase = lambda: next(phases)
    rng = kills.np.random.default_rng(0)
    one = kills.kill(run, 0, {phase: [1e-6] for phase in kills.PHASES}, rng)
    assert one["phase"] == "start"
    assert [times for _, times in run.asked] == [1, 2, 3]


def test_a_run_that_ends_before_its_phase_comes_is_not_counted():
    rng = kills.np.random.default_rng(0)
    lengths = {phase: [1e-6] for phase in kills.PHASES}
    assert kills.kill(Pretended("its end"), 0, lengths, rng) is None
    for number in range(2):  # with either signal
        assert kills.kill(Pretended("its end at the last moment"), number, lengths, rng) is None


@pytest.mark.parametrize(("count", "is_written"), [(5, False), (50, True)])
def test_a_few_kills_leave_the_committed_file_alone(
    tmp_path, monkeypatch, capsys, count, is_written
):
    file = tmp_path / "kills.json"
    file.write_text("as it was")
    one = {"signal": "SIGKILL", "phase": "save", "after": 1.0, "rows": 3}
    found = {"kills": [one] * count, "runs_ended": 1, "all_equal": True, "seconds_uncut": 1.0}
    monkeypatch.setattr(kills, "FILE", file)
    monkeypatch.setattr(kills, "kill_at_random", lambda *_: found)
    with pytest.raises(SystemExit) as done:
        kills.main(["--kills", str(count)])
    assert not done.value.code and f"{count} in save" in capsys.readouterr().out
    assert (file.read_text() != "as it was") == is_written


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
