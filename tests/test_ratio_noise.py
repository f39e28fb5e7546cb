"""lab/ratio_noise.py: scoring twice in other company."""

import contextlib
import json

import pytest
import torch
from helpers import pictures
from pretended_card import PretendedCard
from small_runs import SHORT

import train
import vlm
from lab import bench_gpu, ratio_noise
from lab.bench import RESULTS


def noise_in(folder, dtype):
    opened = vlm.load(folder, dtype=dtype)
    inputs = vlm.encode(opened, ["Sum the dice.", "?"] * 12, pictures(24))
    torch.manual_seed(0)
    tokens, mask = vlm.generate(opened, inputs, 24, stop="e")
    return ratio_noise.noise(opened, inputs, tokens, mask, part=16, minibatch=5)


def test_a_response_scored_again_in_other_company_is_as_likely(sharp_folder):
    """To float32's precision. In bfloat16 that depends on the machine: some CPUs round alike in any
    company."""
    full, half = (noise_in(sharp_folder, dtype) for dtype in ("float32", "bfloat16"))
    assert full["token_largest"] < 1e-4 and full["beyond_clip"] == 0
    assert half["token_largest"] == 0 or 1e-3 < half["token_largest"] < 1
    assert half["responses"] == 24
    assert half["response_rms"] <= half["response_largest"] <= half["token_largest"]


def test_what_company_changes_is_measured(sharp_folder, monkeypatch):
    """Of 24 responses, 16 and 8 at a time, then 5 and at last 4 at a time: here each companion
    makes every token likelier by 0.01 nats."""
    score = vlm.score

    def swayed(policy, inputs, tokens, mask):
        logp, entropy = score(policy, inputs, tokens, mask)
        return logp + 0.01 * len(mask) * mask, entropy

    monkeypatch.setattr(vlm, "score", swayed)
    found = noise_in(sharp_folder, "float32")
    assert found["token_largest"] == pytest.approx(0.11, abs=0.0101)
    assert found["response_largest"] == pytest.approx(found["token_largest"], abs=1e-3)
    assert 0.03 < found["response_rms"] < found["response_largest"] and found["beyond_clip"] == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_measurement_runs_whole_on_a_cpu_and_on_a_card(device, runs, tmp_path, monkeypatch):
    """With narrow models, and a card that is pretended: no devices mix."""
    flags = [*SHORT, "--batch", "128", "--runs", str(runs), "--warm_start_steps", "0"]
    monkeypatch.setattr(train, "parse", lambda words, parse=train.parse: parse([*flags, *words]))
    monkeypatch.setattr(bench_gpu, "SIZES", {"SmolVLM-256M": bench_gpu.SMALL["small SmolVLM"]})
    monkeypatch.setattr(ratio_noise, "RESULTS", tmp_path)
    entered = PretendedCard() if device == "cuda" else contextlib.nullcontext()
    with entered:
        ratio_noise.main(["--device", device])
    name = {"cpu": "ratio_noise.json", "cuda": "ratio_noise-cuda.json"}[device]
    outcome = json.loads((tmp_path / name).read_text())
    assert outcome["device"] == device and len(outcome["rows"]) == 4
    assert ("--device cuda" in outcome["command"]) == (device == "cuda")


def test_a_device_that_is_none_is_refused_in_one_line():
    line = "python -m lab.ratio_noise: --device meta: [^\n]*expected cpu, or a card as cuda"
    with pytest.raises(SystemExit, match=f"^{line}$"):
        ratio_noise.main(["--device", "meta"])


@pytest.mark.skipif(not (RESULTS / "ratio_noise.json").is_file(), reason="not measured yet")
def test_the_page_says_what_was_measured():
    rows = json.loads((RESULTS / "ratio_noise.json").read_text())["rows"]
    page = (RESULTS.parent / "docs" / "models.md").read_text()
    for row in rows:
        if row["dtype"] == "bfloat16":
            assert f"{row['response_rms']:.1e}" in page and f"{row['beyond_clip']:.0%}" in page
            worst = row["token_largest"]
        else:
            assert row["token_largest"] < 1e-6
    assert f"the worst token is off by {worst:.3f}" in page  # of the last row, SmolVLM's
