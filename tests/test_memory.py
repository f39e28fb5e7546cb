"""lab/memory.py: its arithmetic against what the tiny model holds, and the table of the page."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import pictures

import models
import sapo
import tiny
import vlm
from lab import bench_gpu, memory

SIDE = 32  # pixels of a picture


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    model = vlm.load(tiny.build_tiny(tmp_path_factory.mktemp("tiny"), SIDE))
    model.banned[model.eos_ids] = True  # so that every response has its full length
    return model


@pytest.fixture(scope="module")
def size(opened):
    """The tiny model as one of the true sizes."""
    config = opened.model.config
    return SimpleNamespace(
        kind=type(opened.model),
        config=config,
        picture_tokens=[config.image_token_id] * (SIDE // tiny.BLOCK) ** 2,
        pictures=lambda rows: {"pixel_values": torch.zeros(rows, 1, 3, SIDE, SIDE)},
    )


def prompts(opened, rows, text="Sum the dice."):
    return vlm.encode(opened, [text] * rows, pictures(rows, (SIDE, SIDE)))


def load_of(size, inputs, written, rows, checkpointing=False):
    picture = len(size.picture_tokens)
    prompt = inputs["input_ids"].shape[1]
    return memory.Load(prompt, picture, written, rows, rows, 4, checkpointing, vlm.PIECE)


def test_what_the_profiler_counts_is_what_is_held():
    def hold():
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        return kept

    assert 6000 <= memory.peak_bytes(hold) < 6300


@pytest.mark.parametrize("written, text", [(1, "Sum the dice." * 9), (64, "Sum."), (160, "Sum.")])
def test_a_response_in_the_making_takes_what_the_arithmetic_says(opened, size, written, text):
    inputs = prompts(opened, 16, text)
    measured = memory.peak_bytes(lambda: vlm.generate(opened, inputs, written)) / 16
    expected = memory.generation_bytes(size, load_of(size, inputs, written, 16))
    assert measured == pytest.approx(expected, rel=0.15)


def test_generation_takes_memory_in_proportion_to_what_is_written_at_a_time(opened):
    inputs = prompts(opened, 32)
    peaks = [
        memory.peak_bytes(lambda at_once=n: vlm.generate(opened, inputs, 48, at_once=at_once))
        for n in (8, 16, 32)
    ]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.15)
    assert peaks[2] == pytest.approx(4 * peaks[0], rel=0.15)


def update_of(opened, size, inputs, checkpointing):
    """(measured, expected) bytes of a backward pass through answers of 48 tokens."""
    model, rows = opened.model, len(inputs["input_ids"])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens, mask = vlm.generate(opened, inputs, 48)

    def step():
        vlm.score(opened, inputs, tokens, mask)[0].sum().backward()

    step()  # so that there are gradients already
    measured = memory.peak_bytes(step)
    model.gradient_checkpointing_disable()
    return measured, memory.update_bytes(size, 0, load_of(size, inputs, 48, rows, checkpointing))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_takes_what_the_arithmetic_says(opened, size, checkpointing):
    measured, expected = update_of(opened, size, prompts(opened, 16), checkpointing)
    assert measured == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_large_vision_tower_counts_where_all_weights_are_trained(checkpointing):
    vision = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision |= {"intermediate_size": 384, "patch_size": 8}
    size = bench_gpu.smolvlm(64, 2, 4, 4, 128, vision, side=96, scale=2)
    size.config.text_config.vocab_size, size.config.image_token_id = 600, 500  # few logits
    size.picture_tokens = [500] * len(size.picture_tokens)
    opened = bench_gpu.random_learners(size, size.kind._from_config(size.config), "cpu", 0).policy
    inputs = bench_gpu.random_prompts(size, "cpu", rows=4, prompt=8)
    measured, expected = update_of(opened, size, inputs, checkpointing)
    of_text = memory.Load(44, 0, 48, 4, 4, 4, checkpointing, vlm.PIECE)
    assert measured == pytest.approx(expected, rel=0.25)
    assert expected > 1.2 * memory.update_bytes(size, 0, of_text)


@pytest.mark.parametrize("rank, trained_models", [(0, 1), (0, 2), (4, 2)])
def test_weights_and_optimizers_take_what_the_arithmetic_says(opened, size, rank, trained_models):
    """Counted on the models of a run: weights e each, and 16 more for each that is trained."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    config = sapo.SAPOConfig()
    which = "separate" if trained_models == 2 else "shared"
    settings = SimpleNamespace(lora=rank, critic=which, credit="critic", critic_hears="nothing")
    vars(settings).update(device="cpu", dtype="bfloat16", gradient_checkpointing=False)
    made = models.build(settings, config, opened.model.name_or_path)
    expected = memory.fixed_bytes(size, rank, trained_models, memory.Load(0, 0, 0, 0, 0))
    weights = {id(p): p for p in made.policy.model.parameters()}
    weights |= {id(p): p for p in made.critic.parameters()}
    held = sum(p.nbytes for p in weights.values())
    held += 16 * sum(p.numel() for p in models.trained_parameters(made))
    # A critic of its own has no language-model head, which the arithmetic gives it
    assert held == pytest.approx(expected, rel=0.05)


def test_the_page_has_the_table():
    page = Path(memory.__file__).parents[1] / "docs" / "models.md"
    assert memory.table() in page.read_text()


def test_a_larger_card_never_holds_less():
    for line in memory.table().splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")][-3:]
        sizes = [0 if cell == "no" else int(cell) for cell in cells]
        assert sizes == sorted(sizes)
