"""lab/soak.py: what it reads of a process, and that growth is seen."""

import json

import pytest

from lab import soak

pytestmark = pytest.mark.skipif(not soak.Path("/proc/self").is_dir(), reason="reads /proc")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """(looks, exit status, the run's folder) of some seconds."""
    runs = tmp_path_factory.mktemp("soak")
    few = tuple("20" if word == "300" else word for word in soak.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "FLAGS", few)
        return *soak.watch(runs, minutes=0.05, every=0.5), runs / "soak"


def test_a_run_is_watched_while_it_goes_on_and_saves_when_it_is_told_to_end(short):
    looks, status, folder = short
    assert status == 0
    assert len(looks) >= 3 and (folder / "checkpoint" / "trainer.pt").is_file()
    for name in ("minute", "iterations", "cpu_seconds"):
        numbers = [look[name] for look in looks]
        assert numbers == sorted(numbers) and numbers[0] < numbers[-1]
    assert all(50 < look["rss_mb"] < 3000 and look["open_files"] > 2 for look in looks)
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["iteration"] >= looks[-1]["iterations"] > 0


def test_what_grows_is_seen_from_when_it_has_settled():
    looks = [
        {
            "minute": minute,
            "iterations": 100 * minute,
            "rss_mb": 500.0 + (100 if minute < 10 else 2 * minute),  # the start does not count
            "open_files": 7,
            "threads": 3 + minute / 60,
            "cpu_seconds": 30.0 * minute + (minute > 36) * 15 * (minute - 36),
        }
        for minute in range(61)
    ]
    found = soak.growth(looks)
    assert found["rss_mb_per_hour"] == pytest.approx(120)
    assert found["open_files_per_hour"] == pytest.approx(0)
    assert found["threads_per_hour"] == pytest.approx(1)
    halves = found["cpu_seconds_of_an_iteration"]
    assert halves["first half"] == pytest.approx(0.3)
    assert halves["second half"] == pytest.approx(0.45)


@pytest.mark.parametrize("minutes", ["1", "-1", "nan"])
def test_too_short_a_time_is_refused(minutes, capsys):
    with pytest.raises(SystemExit):
        soak.parse(["--minutes", minutes])
    assert "expected at least 2" in capsys.readouterr().err


def test_a_run_that_ends_by_itself_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "FLAGS", ("--lam", "2"))
    with pytest.raises(RuntimeError, match="ended by itself:(.|\n)*lam"):
        soak.watch(tmp_path, minutes=1)
