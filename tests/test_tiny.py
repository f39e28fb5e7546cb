"""tiny.py: what the tiny model is, and a cache that never hands out another warm start."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import picture
from PIL import Image
from small_runs import equal

import checkpoint
import sapo
import tasks
import tiny
import train
import vlm

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------- the model


def test_the_tiny_model_is_a_small_smolvlm(sharp):
    assert type(sharp.model) is transformers.Idefics3ForConditionalGeneration
    assert 260_000 < sum(p.numel() for p in sharp.model.parameters()) < 290_000


def test_every_tag_and_every_character_is_one_token(sharp):
    for tag in tasks.TAGS:
        assert len(sharp.tokenizer(tag, add_special_tokens=False)["input_ids"]) == 1
    every = "".join(map(chr, range(32, 127))) + "\n"
    ids = sharp.tokenizer(every, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(set(ids)) == 96 and sharp.tokenizer.decode(ids) == every


def test_the_tiny_model_is_not_told_the_rules(sharp):
    picture = Image.new("RGB", (32, 32))
    told = vlm.encode(sharp, ["Sum."], [picture], system="The rules.")["input_ids"]
    untold = vlm.encode(sharp, ["Sum."], [picture])["input_ids"]
    assert told.tolist() == untold.tolist()


@pytest.mark.parametrize("width", [16, 64])
def test_the_wider_a_tiny_model_the_closer_to_zero_its_weights(tmp_path, width):
    """In the text model and in the vision tower: a standard deviation of 1 / sqrt(width)."""
    model = vlm.load(tiny.build_tiny(tmp_path, 16, hidden_size=width)).model
    drawn = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    assert any("vision" in name for name, _ in drawn) and any("text" in name for name, _ in drawn)
    for name, parameter in drawn:
        assert 0.8 < parameter.std().item() * width**0.5 < 1.2, name


def test_build_tiny_is_a_function_of_its_seed_and_leaves_the_random_stream(tmp_path):
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        folder = tiny.build_tiny(tmp_path / str(i), 16, seed=seed)
        weights.append(vlm.load(folder).model.state_dict())
    assert torch.equal(random_state, torch.get_rng_state())
    assert equal(weights[0], weights[1]) and not equal(weights[0], weights[2])


@pytest.mark.parametrize("size", [16, 48, 64])
def test_pictures_of_other_sizes(tmp_path, size):
    model = vlm.load(tiny.build_tiny(tmp_path, size))
    inputs = vlm.encode(model, ["a"], [picture(0, (size, size))])
    image = model.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image).sum() == (size // 16) ** 2
    assert inputs["pixel_values"].shape[-2:] == (size, size)
    vlm.generate(model, inputs, 2)


@pytest.mark.parametrize("size", [20, 0, 8, -16])
def test_a_picture_that_does_not_divide_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"image_size: {size}, expected"):
        tiny.build_tiny(tmp_path / "new", size)
    assert not (tmp_path / "new").exists()


def test_the_tiny_model_needs_no_torchvision(tmp_path):
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import numpy as np, tiny, vlm\n"
        "model = vlm.load(tiny.build_tiny(sys.argv[1], 16))\n"
        "inputs = vlm.encode(model, ['a'], [np.zeros((16, 16, 3), np.uint8)])\n"
        "print(vlm.generate(model, inputs, 2)[0].shape[1], 'tokens')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " tokens" in done.stdout, done.stderr


# ----------------------------------------------------------------------------- the warm start


def untrained(runs, **changes):
    """Settings of a warm start without a step, unless they say otherwise."""
    return train.Settings(**{"warm_start_steps": 0, "runs": str(runs), **changes})


def test_a_warm_start_is_a_function_of_its_settings_and_leaves_the_random_stream(tmp_path):
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    settings = untrained(tmp_path, warm_start_steps=3, warm_start_batch=4)
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings.seed = seed
        tiny.warm_start(tasks.DiceSum(n=2), settings, tmp_path / name)
        digests.append(checkpoint.digest(tmp_path / name)["model.safetensors"])
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_warm_start_learns_the_demonstrations(runs):
    """After 150 steps on numbers to copy, half of them wrong, the format is certain."""
    settings = untrained(runs, warm_start_steps=150, error_rate=0.5)
    task = tasks.TextSum(n=1, largest=99)
    model = vlm.load(tiny.cached_warm_start(task, settings))
    inputs = vlm.encode(model, [task.example_at(i).question for i in range(8)], [None] * 8)
    tokens, mask = vlm.generate(model, inputs, 16, 0.0, stop="</answer>")
    for pieces in vlm.token_texts(model, tokens, mask, tasks.END):
        assert tasks.read_answer("".join(pieces)).isdecimal()


# ---------------------------------------------------------------------- the cache and its key


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_the_cache_key_has_everything_that_shapes_the_warm_start(tmp_path):
    variants = [
        (tasks.TextSum(), {}),
        (tasks.TextSum(), {"seed": 1}),
        (tasks.TextSum(), {"error_rate": 0.2}),
        (tasks.TextSum(), {"warm_start_steps": 1}),
        (tasks.TextSum(), {"warm_start_lr": 0.1}),
        (tasks.TextSum(), {"warm_start_batch": 3}),
        (tasks.TextSum(n=3), {}),
        (tasks.ArrowPath(), {}),
    ]
    folders = []
    for task, changes in variants:
        folders.append(tiny.cached_warm_start(task, untrained(tmp_path, **changes)))
    assert len(set(folders)) == len(variants)
    with warnings_as_errors():  # found again, whole, and whatever else the run does
        other = untrained(tmp_path, method="ppo", batch=8, iterations=3)
        assert tiny.cached_warm_start(tasks.TextSum(), other) == folders[0]


def key_of(task, **changes):
    return tiny._cache_key(task, untrained("", **{"warm_start_steps": 1, **changes}))


def test_the_cache_key_has_the_device_and_the_versions(monkeypatch):
    keys = {key_of(tasks.TextSum()), key_of(tasks.TextSum(), device="cuda")}
    for module in (tiny.torch, tiny.transformers):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.0")
            keys.add(key_of(tasks.TextSum()))
    assert len(keys) == 4


def test_the_cache_key_has_what_the_tasks_setting_adds_to_demonstrations_alone():
    """`verbosity` is not in a task's repr: examples stay the same, demonstrations do not."""
    wordy = tasks.TextSum(verbosity=2)
    assert repr(wordy) == repr(tasks.TextSum())
    assert key_of(wordy) != key_of(tasks.TextSum())


def test_the_cache_key_has_habits_that_differ_less_than_the_demonstrations_shown():
    assert key_of(tasks.TextSum(habits=0.6)) != key_of(tasks.TextSum(habits=0.6001))


def draw_one_higher(monkeypatch):
    draw = tasks.DiceSum._draw
    monkeypatch.setattr(tasks.DiceSum, "_draw", lambda self, rng: (draw(self, rng)[0][::-1],))


def ask_otherwise(monkeypatch):
    present = tasks.DiceSum._present
    monkeypatch.setattr(
        tasks.DiceSum, "_present", lambda *args: (present(*args)[0], "Add up the dice.")
    )


def change_a_pixel(monkeypatch):
    present = tasks.DiceSum._present

    def with_another_pixel(*args):
        image, question = present(*args)
        image.putpixel((0, 0), (1, 2, 3))
        return image, question

    monkeypatch.setattr(tasks.DiceSum, "_present", with_another_pixel)


def slip_otherwise(monkeypatch):
    monkeypatch.setattr(tasks.DiceSum, "_slips", lambda self, right, result: [right])


def test_a_games_turns_are_learned_alone_first_and_then_together(tmp_path, monkeypatch):
    settings, _ = train.parse(["--warm_start_steps", "5", "--warm_start_batch", "2"])
    demonstrations, alone = tiny.demonstrations, []

    def recorded(*args, turns_alone):
        alone.append(turns_alone)
        return demonstrations(*args, turns_alone=turns_alone)

    monkeypatch.setattr(tiny, "demonstrations", recorded)
    task = tasks.games.GameTask(tasks.Treasure(size=3, shortest=2, longest=4))
    tiny.warm_start(task, settings, tmp_path / "tiny")
    assert alone == [True, True, False, False, False]


def test_a_change_of_a_later_picture_of_a_game_changes_the_key(monkeypatch):
    def key():
        return tiny.fingerprint(tasks.games.GameTask(tasks.Treasure()), 0.0, count=3)

    before, letter = key(), tasks.Treasure._letter
    assert key() == before
    monkeypatch.setattr(  # who has the key looks like who has not: no first picture changes
        tasks.Treasure, "_letter", lambda self, cell: letter(self, cell).replace("&", "@")
    )
    assert key() != before


@pytest.mark.parametrize("change", [draw_one_higher, ask_otherwise, change_a_pixel, slip_otherwise])
def test_a_change_of_what_the_task_shows_changes_the_key(monkeypatch, change):
    as_it_was = key_of(tasks.DiceSum())
    assert key_of(tasks.DiceSum()) == as_it_was
    change(monkeypatch)
    assert key_of(tasks.DiceSum()) != as_it_was


def test_a_colour_of_the_environments_renderer_does_not_change_the_key(monkeypatch):
    """No source is in the key but those of the files that make the model and read with it."""
    files = []
    read_text = Path.read_text

    def noted(path, *args, **kwargs):
        files.append(path.name)
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", noted)
    key_of(tasks.DiceSum())
    assert sorted(files) == ["tiny.py", "vlm.py"]


def test_a_change_of_the_code_that_makes_the_model_changes_the_key(monkeypatch):
    as_it_was = key_of(tasks.DiceSum())
    monkeypatch.setattr(Path, "read_text", lambda path: "another source")
    assert key_of(tasks.DiceSum()) != as_it_was


# ------------------------------------------------------------------------- damage and failure


def truncate_weights(folder):
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def flip_one_bit_of_the_weights(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "weights truncated": truncate_weights,
    "one byte of the weights": flip_one_bit_of_the_weights,
    "tokenizer lost": lambda folder: (folder / "tokenizer.json").unlink(),
    "manifest: not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest: empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest: not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest: a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest lost": lambda folder: (folder / "manifest.json").unlink(),
    "a folder inside": lambda folder: (folder / "surprise").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, damage):
    settings = untrained(tmp_path)
    folder = tiny.cached_warm_start(tasks.TextSum(), settings)
    whole = checkpoint.digest(folder)
    DAMAGES[damage](folder)
    with pytest.warns(UserWarning, match="damaged"):
        assert tiny.cached_warm_start(tasks.TextSum(), settings) == folder
    assert checkpoint.digest(folder) == whole == json.loads((folder / "manifest.json").read_text())
    assert [f for f in folder.parent.iterdir() if f.suffix in (".new", ".old")] == []


def test_a_warm_start_that_fails_leaves_no_cache(tmp_path, monkeypatch):
    def fail(*args):
        raise FloatingPointError("in the middle")

    monkeypatch.setattr(vlm, "score", fail)
    with pytest.raises(FloatingPointError, match="in the middle"):
        tiny.cached_warm_start(tasks.TextSum(), untrained(tmp_path, warm_start_steps=1))
    assert not list(tmp_path.glob("cache/*/manifest.json"))
    folders = [file for file in (tmp_path / "cache").iterdir() if file.is_dir()]
    assert [folder.suffix for folder in folders] == [".new"]


class Undemonstrated:
    """Like a data set: pictures and questions, but no true steps."""

    replies, tags = False, tasks.TAGS

    def example_at(self, index):
        return SimpleNamespace(image=Image.new("RGB", (32, 32)), question=f"What is {index}?")

    def demonstrate(self, example, rng, error_rate):
        raise ValueError("a data set has no demonstrations")

    def __repr__(self):
        return "Undemonstrated()"


def test_a_task_without_demonstrations_says_so_and_leaves_no_cache(tmp_path):
    with pytest.raises(ValueError, match="no demonstrations"):
        tiny.cached_warm_start(Undemonstrated(), untrained(tmp_path, warm_start_steps=1))
    assert not list(tmp_path.glob("cache/*/manifest.json"))


def test_a_task_without_demonstrations_can_have_an_untrained_model(tmp_path):
    folder = tiny.cached_warm_start(Undemonstrated(), untrained(tmp_path))
    inputs = vlm.encode(vlm.load(folder), ["What is 0?"], [picture(0)])
    assert inputs["pixel_values"].shape[-2:] == (32, 32)


def test_a_run_does_not_depend_on_where_its_warm_start_came_from(tmp_path):
    """Cached or made on the spot: the same weights, and the same random stream after it."""
    states = []
    for _ in range(2):
        settings = untrained(tmp_path, env="SAPO/TextSum-v0", batch=2, name="twice")
        run = train.build(settings, sapo.SAPOConfig())
        states.append(
            {
                "rng": torch.get_rng_state(),
                "policy": run.models.policy.model.state_dict(),
                "critic": run.models.critic.state_dict(),
            }
        )
    assert equal(*states)
