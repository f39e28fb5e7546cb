"""bench.py: a fair race is one in which all compute the same, and its file says how it was run."""

import json
from types import SimpleNamespace as Space

import pytest
import torch

import bench
import sapo


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


def test_the_true_sizes_are_those_of_the_published_models():
    """Parameters, counted without making them: SmolVLM's 256 M and 2.25 B, Qwen2.5-VL's 3.75 B and 8.29 B."""
    for (name, size), millions in zip(list(bench.SIZES.items())[1:], (256, 2246, 3755, 8292), strict=True):
        kind, config, picture_tokens, _ = size()
        with torch.device("meta"):
            model = kind._from_config(config, dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02), name
        assert config.image_token_id in picture_tokens


@pytest.mark.parametrize(("name", "rank"), [("tiny", 0), ("small Qwen", 2)])
def test_the_gpu_measurement_runs_whole_on_a_small_model(monkeypatch, name, rank):
    if rank:
        pytest.importorskip("peft", reason="LoRA needs peft")
    monkeypatch.setitem(bench.SIZES, "small Qwen", lambda: bench._qwen(
        256, 1, 2, 1, 32, 152_000, True, depth=2, hidden_size=32, intermediate_size=32, num_heads=2))
    row = bench.one_size(name, "cpu", rank, rows=2, written=3, prompt=4, micro_batch=1)
    assert row["seconds"].keys() == {"generate", "score", "values", "update"} and row["generated_per_second"] > 0
    assert (row["trained"] < row["parameters"] / 2) == bool(rank)


def test_without_a_card_the_gpu_measurement_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA card"):
        bench.main(["gpu", "--out", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_out_of_memory_counts_weights_gradients_and_adams_moments():
    trained, frozen = (torch.nn.Linear(2**15, 2**13, bias=False, device="meta") for _ in range(2))  # 1 GiB each
    run = Space(policy=Space(model=trained), critic=None, reference=Space(model=frozen), critic_optimizer=None,
                actor_optimizer=torch.optim.Adam(trained.parameters()), folder="runs/x",
                settings=Space(device="cpu", batch=8), config=sapo.SAPOConfig(micro_batch=2))
    assert "Adam take 5.00" in bench.out_of_memory(run, RuntimeError("can't allocate memory"))
