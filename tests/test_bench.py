"""bench.py: a fair race is one in which all compute the same, and its file says how it was run."""

import json

import pytest
import torch

import bench


@pytest.mark.parametrize("loop", bench.LOOPS.values(), ids=bench.LOOPS)
@pytest.mark.parametrize("seed", range(3))
def test_every_loop_computes_the_same(loop, seed):
    batch = bench.make_batch(9, 40, seed, torch.float64)
    for mine, theirs in zip(bench.by_sapo(*batch), loop(*batch), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-9)


def test_a_small_race_is_printed_and_written(tmp_path, capsys):
    times, ratios, differences = bench.main(["--batch", "32", "--tokens", "256", "--repeats", "1",
                                             "--out", str(tmp_path / "results" / "bench.json")])
    assert max(differences.values()) < 1e-5
    assert ratios["torch slices"] > 3  # (32, 256) is small; at (512, 2048) it is far more
    printed = capsys.readouterr().out
    assert all(name in printed for name in times)
    written = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert written["ratio"] == ratios and {"command", "seeds", "date", "versions"} <= set(written)


def test_other_sizes_leave_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    bench.main(["--batch", "2", "--tokens", "4", "--repeats", "1"])
    assert not list(tmp_path.iterdir())
