"""lab/bench.py: in a fair race all compute the same, and a file says how it was made."""

import json

import pytest
import torch

from lab import (
    bench,
    bench_gpu,
    bench_iteration,
    bench_math,
    bench_memory,
    bench_tokens,
    bench_turns,
)


# ---------------------------------------------------------------------------- the mathematics
@pytest.mark.parametrize("loop", bench_math.LOOPS.values(), ids=bench_math.LOOPS)
@pytest.mark.parametrize("seed", range(3))
def test_every_loop_computes_the_same(loop, seed):
    batch = bench_math.make_batch(9, 40, seed, torch.float64)
    for ours, theirs in zip(bench_math.by_sapo(*batch), loop(*batch), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


def test_a_small_race_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "results" / "bench.json"
    size = ["--batch", "32", "--tokens", "256", "--repeats", "1"]
    outcome = bench.main([*size, "--out", str(file)])
    assert max(outcome["largest_difference"].values()) < 1e-5
    assert outcome["ratio"]["torch slices"] > 3  # (32, 256) is small; at (512, 2048) it is far more
    printed = capsys.readouterr().out
    assert all(name in printed for name in outcome["seconds"])
    stored = json.loads(file.read_text())
    assert outcome.items() <= stored.items() and {"date", "versions", "seeds"} <= stored.keys()
    flags = "--batch 32 --tokens 256 --repeats 1 --seed 0"
    assert stored["command"] == f"python -m lab.bench {flags}"
    for name, ratio in stored["ratio"].items():
        assert ratio == stored["seconds"][name] / stored["seconds"]["sapo.py"]


def test_other_sizes_leave_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["--batch", "2", "--tokens", "4", "--repeats", "1"])
    assert not list(tmp_path.iterdir())


def test_the_usual_measurements_go_to_results(tmp_path, monkeypatch):
    """Each kind to its file, with its own versions beside ours."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "measure", lambda *_: {"versions": {"trl": "1"}})
    for what, name in bench.FILES.items():
        bench.main([what])
        stored = json.loads((tmp_path / name).read_text())
        assert {"trl", "torch", "numpy", "python"} == stored["versions"].keys()
    assert len(list(tmp_path.iterdir())) == len(bench.FILES) == 6


# ------------------------------------------------------------------------------------- memory
def test_all_ways_to_score_give_the_same_numbers(capsys):
    outcome = bench_memory.measure(rows=2, tokens=16, vocabulary=2048)
    printed = capsys.readouterr().out
    assert outcome["shape"] == [2, 16, 2048]
    assert outcome["ways"].keys() == {"in pieces", "log_softmax", "torch.distributions"}
    for name, way in outcome["ways"].items():
        assert max(way["largest_difference"]) < 1e-5
        assert f"{name:22}{way['megabytes']:8} MB" in printed


# --------------------------------------------------------------------------------- iterations
def test_seconds_of_our_iterations_are_one_each(monkeypatch):
    iterations = []
    monkeypatch.setattr(bench_iteration.train, "iterate", iterations.append)
    seconds = bench_iteration.seconds_here("a run", 3)
    assert iterations == ["a run"] * 3 and len(seconds) == 3 and min(seconds) >= 0


# -------------------------------------------------------------------- true sizes, on one card
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SmolVLM-256M", 256),
        ("SmolVLM-2.2B", 2246),
        ("Qwen2.5-VL-3B", 3755),
        ("Qwen2.5-VL-7B", 8292),
    ],
)
def test_the_true_sizes_are_those_of_the_published_models(name, millions):
    """Parameters, counted without making them."""
    size = bench_gpu.SIZES[name]
    with torch.device("meta"):
        model = size.kind._from_config(size.config, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert size.config.image_token_id in size.picture_tokens


def check_row(row):
    assert row["seconds"].keys() == {"generate", "score", "values", "update"}
    assert row["generated_per_second"] > 0 and row["peak_gib"] > 0
    assert row["peak_gib_of"].keys() == row["seconds"].keys()
    assert row["seconds_per_iteration"] == pytest.approx(sum(row["seconds"].values()))


def test_the_gpu_measurement_runs_whole_on_narrow_models(capsys, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft")
    outcome = bench.main(["gpu", "--small", "--out", str(tmp_path / "gpu.json")])
    assert [row["lora"] for row in outcome["rows"]] == [0, 2, 0, 2]
    for row in outcome["rows"]:
        check_row(row)
        trains_all = row["trained"] > row["parameters"] / 2
        assert trains_all == (row["lora"] == 0)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["rows"] == outcome["rows"] and kept["command"] == "python -m lab.bench gpu --small"
    assert {"card", "cuda", "cudnn"} < kept.keys()
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_narrow_models_of_the_gpu_measurement_leave_results_alone(monkeypatch):
    monkeypatch.setattr(bench_gpu, "small", lambda: {"rows": []})
    monkeypatch.setattr(bench, "save", None)
    assert bench.main(["gpu", "--small"]) == {"rows": []}


def test_every_size_is_measured_with_and_without_lora(monkeypatch, capsys):
    measured = []

    def one_size(size, device, lora, rows, new_tokens):
        measured.append((size, lora))
        if size == "large":
            raise torch.OutOfMemoryError("no room\nfor it")
        if size == "odd":
            raise KeyError("no kernel")
        return {"scoring_rate": 5.0}

    monkeypatch.setattr(bench_gpu, "one_size", one_size)
    kept = []
    outcome = bench_gpu.measure(
        "cpu",
        {"a": "small", "b": "large", "c": "odd"},
        rank=2,
        rows=1,
        new_tokens=1,
        keep=lambda so_far: kept.append(len(so_far["rows"])),
    )
    assert measured == [(size, lora) for size in ("small", "large", "odd") for lora in (0, 2)]
    assert kept == [1, 2, 3, 4, 5, 6]
    small, _, large, _, odd, _ = outcome["rows"]
    assert odd == {"model": "c", "lora": 0, "error": "KeyError: 'no kernel'"}
    assert small["share_of_matrix_rate"] == 5.0 / outcome["matrix_rate"]
    assert large == {"model": "b", "lora": 0, "out_of_memory": "no room"}
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_without_a_card_the_gpu_measurement_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA card"):
        bench.main(["gpu", "--out", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_an_iteration_is_timed_for_each_of_its_tokens(monkeypatch, capsys):
    seen = []
    iterate = bench_tokens.train.iterate

    def counted(run):
        before = run.progress.generated_tokens
        metrics = iterate(run)
        seen.append(run.progress.generated_tokens - before)
        return metrics

    monkeypatch.setattr(bench_tokens.train, "iterate", counted)
    threads = torch.get_num_threads()
    outcome = bench_tokens.measure(sizes=((128, 32), (2, 5)), rounds=1)
    assert seen == [128 * 32] * 2 + [2 * 5] * 2, "nothing ends early"
    assert torch.get_num_threads() == threads
    reference, small = outcome["rows"]
    assert (small["responses"], small["tokens_each"]) == (2, 5)
    assert reference["of_reference"] == 1 and reference["seconds_per_token"] > 0
    assert "of the reference" in capsys.readouterr().out


def test_turns_are_timed_at_equally_many_tokens(monkeypatch):
    written = []
    play = bench_turns.rollout.play

    def counted(run, *args):
        responses = play(run, *args)
        mask = responses.written
        turns = (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).sum(1).tolist()
        written.append((mask.sum(1).tolist(), turns))
        return responses

    monkeypatch.setattr(bench_turns.rollout, "play", counted)
    outcome = bench_turns.measure(rows=2, rounds=1)
    assert written == [([120, 120], [turns] * 2) for turns in (1, 5, 5, 20, 20)]
    assert set(outcome["of_one_turn"]) == {
        "1 turns, kept",
        *(f"{turns} turns, {how}" for turns in (5, 20) for how in ("kept", "read again")),
    }
    assert outcome["of_one_turn"]["1 turns, kept"] == 1
