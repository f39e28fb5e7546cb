"""data.py: rows from real files, pictures of every kind and of none, and a grader that always comes back."""

import csv
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

import data
import env
from data import DatasetEnv, DatasetTask, read_boxed, same, to_rgb

datasets = pytest.importorskip("datasets", reason="SAPO/Dataset-v0 needs: pip install datasets")
try:
    import math_verify  # noqa: F401
    needs_math_verify = lambda test: test
except ImportError:
    needs_math_verify = pytest.mark.skip(reason="needs: pip install math-verify")

GEOMETRY = datasets.Features(images=datasets.List(datasets.Image()), problem=datasets.Value("string"),
                             answer=datasets.Value("string"))
DICE = [env.DiceSum().example_at(i) for i in range(40)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Nothing goes into the user's cache of data sets, and no worker outlives this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    if data._worker.cache_info().currsize:
        with data._worker(os.getpid()) as worker:
            worker.kill()
        data._worker.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    """Whoever tries to reach the network fails."""
    def connect(*_):
        raise AssertionError("a local path reached for the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)


def stored(image, kind="PNG", **options):
    """A picture as bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(content):
    return Image.open(io.BytesIO(content))


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def geometry(path, rows):
    """A parquet file in the layout of hiyouga/geometry3k from (pictures as bytes, question, answer)."""
    rows = [{"images": [{"bytes": one, "path": None} for one in images], "problem": problem, "answer": answer}
            for images, problem, answer in rows]
    datasets.Dataset.from_list(rows, features=GEOMETRY).to_parquet(str(path))
    return str(path)


def dice_rows():
    return [([stored(one.image)], f"<image>{one.question} ({i})", one.answer) for i, one in enumerate(DICE)]


def texts(count=30):
    return [{"question": f"Add {i} and 1.", "answer": i + 1} for i in range(count)]


def only(task):
    """A row of a task whose rows are all alike, and so all in one split."""
    return task.sample(np.random.default_rng(0))


def rows_of(task, split):
    """{row number: example} of a split."""
    return {int(one.key.split("/")[1]): one for one in (task.example_at(i, split) for i in range(task.size(split)))}


# ------------------------------------------------------------------------------------------------------- sources
def check_dice(task):
    found = rows_of(task, "train") | rows_of(task, "eval")
    assert sorted(found) == list(range(len(DICE)))
    for number, one in found.items():
        assert one.answer == DICE[number].answer and one.question == f"Sum the dice. ({number})"
        assert len(one.content) == 1 and one.image is one.content[0] and one.image.mode == "RGB"
        assert np.array_equal(np.asarray(one.image), np.asarray(DICE[number].image))


def test_parquet_in_the_layout_of_geometry3k(tmp_path, offline):
    check_dice(DatasetTask(geometry(tmp_path / "rows.parquet", dice_rows())))


def test_a_parquet_file_that_says_nothing_of_pictures(tmp_path):
    """Written by other libraries: a plain struct of bytes and path, or bare bytes."""
    import pyarrow
    import pyarrow.parquet
    rows = [{"images": [{"bytes": one, "path": None} for one in images], "problem": problem, "answer": answer}
            for images, problem, answer in dice_rows()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "struct.parquet")
    check_dice(DatasetTask(str(tmp_path / "struct.parquet")))
    rows = [row | {"images": row["images"][0]["bytes"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bytes.parquet")
    check_dice(DatasetTask(str(tmp_path / "bytes.parquet")))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "odd [name] *.jsonl"])
def test_json_lines_with_paths_relative_to_the_file(tmp_path, name, offline, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for i, one in enumerate(DICE):
        one.image.save(tmp_path / "pictures" / f"{i}.png")
    rows = [{"image": f"pictures/{i}.png", "question": f"Sum the dice. <image> ({i})", "answer": int(one.answer)}
            for i, one in enumerate(DICE)]
    path = jsonl(tmp_path / name, rows)
    check_dice(DatasetTask(path))
    monkeypatch.chdir(tmp_path)  # a relative path to the file itself
    check_dice(DatasetTask(name))


def test_one_json_array_is_read_too(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(texts(5)))
    task = DatasetTask(str(tmp_path / "rows.json"))
    assert task.size("train") + task.size("eval") == 5


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_an_image_folder(tmp_path, metadata, offline):
    rows = []
    for i, one in enumerate(DICE):
        one.image.save(tmp_path / f"{i:02}.png")
        rows.append({"file_name": f"{i:02}.png", "question": f"Sum the dice. ({i})", "answer": one.answer})
    if metadata.endswith("csv"):
        with open(tmp_path / metadata, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader(), writer.writerows(rows)
    else:
        jsonl(tmp_path / metadata, rows)
    check_dice(DatasetTask(str(tmp_path)))


def test_a_folder_of_parquet_files_has_splits(tmp_path, offline):
    geometry(tmp_path / "train-00000.parquet", dice_rows()[:12])
    geometry(tmp_path / "train-00001.parquet", dice_rows()[12:20])
    geometry(tmp_path / "test-00000.parquet", dice_rows()[20:])
    task = DatasetTask(str(tmp_path), eval_split="test")
    assert (task.size("train"), task.size("eval")) == (20, 20)
    assert [task.example_at(i, "eval").answer for i in range(20)] == [one.answer for one in DICE[20:]]
    assert [task.example_at(i).answer for i in range(20)] == [one.answer for one in DICE[:20]]
    assert DatasetTask(str(tmp_path), train_split="test").size("train") < 20  # no eval_split: a share is held out
    with pytest.raises(ValueError, match=r'split \'nope\'.*"nope"'):
        DatasetTask(str(tmp_path), train_split="nope")


def test_a_folder_of_json_lines_has_its_pictures_beside_them(tmp_path, offline):
    DICE[0].image.save(tmp_path / "0.png")
    for split in ("train", "test"):
        jsonl(tmp_path / f"{split}.jsonl", [{"image": "0.png", "question": f"{split}?", "answer": "1"}])
    task = DatasetTask(str(tmp_path), eval_split="test")
    assert [task.example_at(0, split).question for split in env.SPLITS] == ["train?", "test?"]
    assert task.example_at(0).image.tobytes() == DICE[0].image.tobytes()


def test_a_hub_name_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        rows = [{"images": [{"bytes": stored(one.image), "path": None}], "problem": f"{split} {i}",
                 "answer": one.answer} for i, one in enumerate(DICE[:7])]
        return datasets.Dataset.from_list(rows, features=GEOMETRY)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = DatasetTask("hiyouga/geometry3k", eval_split="test", train_split="validation")
    assert asked == [("hiyouga/geometry3k", "validation"), ("hiyouga/geometry3k", "test")]
    assert task.example_at(8).question == "validation 1" and task.example_at(0, "eval").question == "test 0"
    assert task.example_at(0).image.size == DICE[0].image.size


def test_usual_column_names_and_given_ones(tmp_path):
    row = {"image": None, "question": "How many?", "multiple_choice_answer": "two", "problem_id": 3, "solution": "2"}
    path = jsonl(tmp_path / "vqa.jsonl", [row] * 3)
    assert only(DatasetTask(path)).answer == "two"
    one = only(DatasetTask(path, answer="solution", question="problem_id"))
    assert (one.question, one.answer, one.image, one.content) == ("3", "2", None, ())
    with pytest.raises(ValueError, match=r"no column picture, only \['image', 'question', .*; give images="):
        DatasetTask(path, images="picture")
    with pytest.raises(ValueError, match=r"no column answers, only .*; give answer="):
        DatasetTask(path, answer="answers")


def test_rows_with_no_picture_one_and_several(tmp_path):
    pictures = [stored(Image.new("RGB", (8 + i, 6), (40 * i, 0, 0))) for i in range(3)]
    path = geometry(tmp_path / "rows.parquet", [([], "none", "0"), (pictures[:1], "<image>one", "1"),
                                                (pictures, "<image><image>\n<image> three ", "3")])
    found = rows_of(DatasetTask(path, eval_path=jsonl(tmp_path / "eval.jsonl", texts())), "train")
    assert [len(found[i].content) for i in range(3)] == [0, 1, 3] and found[0].image is None
    assert [found[i].question for i in range(3)] == ["none", "one", "three"]
    assert [one.size for one in found[2].content] == [(8, 6), (9, 6), (10, 6)]
    for name in ("a.png", "b.png"):
        Image.new("RGB", (5, 5), "red").save(tmp_path / name)
    lists = [{"images": ["a.png", "b.png"], "question": "q", "answer": "1"}, {"question": "q", "answer": "3"},
             {"images": [], "question": "q", "answer": "2"}]
    found = rows_of(DatasetTask(jsonl(tmp_path / "lists.jsonl", lists), eval_path=path), "train")
    assert [len(found[i].content) for i in range(3)] == [2, 0, 0]
    lists = [{"image": {"path": "b.png"}, "question": "q", "answer": "1"}]
    assert only(DatasetTask(jsonl(tmp_path / "struct.jsonl", lists))).image.size == (5, 5)
    lists = [{"image": "a.png", "question": "q", "answer": "1"}, {"image": "", "question": "q", "answer": "2"}]
    found = rows_of(DatasetTask(jsonl(tmp_path / "single.jsonl", lists), eval_path=path), "train")
    assert [len(found[i].content) for i in range(2)] == [1, 0]


@pytest.mark.parametrize("text, tidied", [
    ("<image>Find x.", "Find x."), ("See <image> and find x", "See and find x"), ("A\n<image>\nB", "A B"),
    ("  a\n\n  b <image>  ", "a\n\n  b"), ("<image><image>\nq", "q"), ("x < image > 3", "x < image > 3")])
def test_placeholders_go(tmp_path, text, tidied):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": "1"}] * 2))
    assert only(task).question == tidied


def test_answers_that_are_numbers_or_mixed(tmp_path):
    answers = [3, 2.5, "x", True, -7, 1.0]
    path = jsonl(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": one} for i, one in enumerate(answers)])
    task = DatasetTask(path, eval_path=jsonl(tmp_path / "eval.jsonl", texts(3)))
    assert [task.example_at(i).answer for i in range(6)] == ["3", "2.5", "x", "True", "-7", "1"]
    assert task.example_at(0, "eval").answer == "1"
    datasets.Dataset.from_dict({"question": ["a", "b"], "answer": [3.0, float("nan")]}).to_parquet(path := str(
        tmp_path / "floats.parquet"))  # the way pandas writes whole numbers of which one is missing
    with pytest.warns(UserWarning, match="1 of 2 rows cannot be used: row 1: answer is nan"):
        assert only(DatasetTask(path)).answer == "3"


# -------------------------------------------------------------------------------------------------------- splits
def test_the_shares_are_disjoint_and_depend_on_the_content_alone(tmp_path):
    rows = texts(300)
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))
    train, held_out = rows_of(task, "train"), rows_of(task, "eval")
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 300 and 35 <= len(held_out) <= 85
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(300)] + rows  # every row twice, in another order
    task = DatasetTask(jsonl(tmp_path / "again.jsonl", shuffled))
    questions = {split: {one.question for one in rows_of(task, split).values()} for split in env.SPLITS}
    assert questions["eval"] == {one.question for one in held_out.values()}
    assert not questions["eval"] & questions["train"]
    assert task.size("eval") == 2 * len(held_out)


def test_pictures_belong_to_the_content_that_decides_the_split(tmp_path):
    """One question for all, and one answer: the shares must differ by the pictures, or a split would be empty."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    task = DatasetTask(geometry(tmp_path / "rows.parquet", [
        ([stored(Image.fromarray(one))], "<image>How many?", "1") for one in noise]))
    assert 0 < task.size("eval") < 40


def test_index_wraps_and_is_checked(tmp_path):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", texts()))
    n = task.size("train")
    assert task.example_at(n + 2) == task.example_at(2) == task.example_at(np.int64(2 + 5 * n)) != task.example_at(3)
    for index, split in ((-1, "train"), (True, "train"), (1.0, "train"), ("1", "train"), (0, "test")):
        with pytest.raises(ValueError, match="expected an integer >= 0 and one of"):
            task.example_at(index, split)


def test_sample_draws_from_the_split_asked_for(tmp_path):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", texts()))
    drawn = {split: {task.sample(np.random.default_rng(i), split).key.split("/")[0] for i in range(40)}
             for split in ("train", "eval", None)}
    assert drawn == {"train": {"train"}, "eval": {"eval"}, None: {"train", "eval"}}
    assert task.sample(np.random.default_rng(3), "train") == task.sample(np.random.default_rng(3), "train")


def test_a_file_of_its_own_for_the_eval_split(tmp_path):
    one, other = jsonl(tmp_path / "one.jsonl", texts(10)), jsonl(tmp_path / "other.jsonl", texts(4))
    task = DatasetTask(one, eval_path=other)
    assert (task.size("train"), task.size("eval")) == (10, 4)
    for same_rows in ({"eval_path": one}, {"eval_split": "train"}):
        with pytest.raises(ValueError, match="the eval rows are the training rows"):
            DatasetTask(one, **same_rows)


def test_a_split_without_rows(tmp_path):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", texts(1)))
    empty = "eval" if task.size("train") else "train"
    assert task.size(empty) == 0 and only(task).answer == "1"
    with pytest.raises(ValueError, match=f"the '{empty}' split has no rows; name others with eval_path= or eval_spl"):
        task.example_at(0, empty)


def test_many_environments_share_one_data_set(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "rows.jsonl", texts())
    gym.make("SAPO/Dataset-v0", path=path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("loaded twice"))
    start = time.perf_counter()
    many = [gym.make("SAPO/Dataset-v0", disable_env_checker=True, path=path) for _ in range(257)]
    assert time.perf_counter() - start < 10
    assert len({id(one.unwrapped.task._rows("train")[0]) for one in many}) == 1


# ------------------------------------------------------------------------------------------------------ pictures
def deep(values, mode):
    return Image.fromarray(np.array(values, {"I": np.int32, "F": np.float32}.get(mode, np.uint16)))


TRANSPARENT = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (0, 255, 0, 255)]
ON_WHITE = [[255, 0, 0], [255, 255, 255], [127, 127, 127], [0, 255, 0]]


def rgba():
    image = Image.new("RGBA", (4, 1))
    image.putdata(TRANSPARENT)
    return image


def palette(**options):
    image = Image.new("P", (4, 1))
    image.putpalette([9, 8, 7, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 3])
    return stored(image, "PNG", **options)


def grey(mode, values, **options):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return stored(image, "PNG", **options)


PICTURES = {  # name: (a file, its pixels as RGB)
    "rgb": (stored(Image.new("RGB", (2, 1), (1, 2, 3))), [[1, 2, 3], [1, 2, 3]]),
    "alpha": (stored(rgba()), ON_WHITE),
    "alpha in webp": (stored(rgba(), "WEBP", lossless=True, exact=True), ON_WHITE),
    "grey": (grey("L", [0, 100, 255]), [[0] * 3, [100] * 3, [255] * 3]),
    "grey and alpha": (grey("LA", [(0, 255), (0, 0), (200, 255)]), [[0] * 3, [255] * 3, [200] * 3]),
    "grey with a transparent value": (grey("L", [0, 100], transparency=100), [[0] * 3, [255] * 3]),
    "rgb with a transparent colour": (stored(Image.new("RGB", (1, 1), (5, 6, 7)), transparency=(5, 6, 7)), [[255] * 3]),
    "black and white": (grey("1", [0, 1, 1]), [[0] * 3, [255] * 3, [255] * 3]),
    "palette": (palette(), [[9, 8, 7], [255, 0, 0], [0, 255, 0], [0, 0, 255]]),
    "palette with a transparent entry": (palette(transparency=1), [[9, 8, 7], [255] * 3, [0, 255, 0], [0, 0, 255]]),
    "16 bits": (stored(deep([[0, 257, 32896, 65535]], "I;16")), [[0] * 3, [1] * 3, [128] * 3, [255] * 3]),
    "16 bits, dark": (stored(deep([[0, 255, 2570]], "I;16")), [[0] * 3, [1] * 3, [10] * 3]),
    "16 bits in tiff": (stored(deep([[0, 25700, 65535]], "I;16"), "TIFF"), [[0] * 3, [100] * 3, [255] * 3]),
    "32 bits": (stored(deep([[0, 25700, 65535]], "I"), "TIFF"), [[0] * 3, [100] * 3, [255] * 3]),
    "32 bits, large": (stored(deep([[-5, 0, 2**30]], "I"), "TIFF"), [[0] * 3, [0] * 3, [255] * 3]),
    "floats": (stored(deep([[0, 0.2, 1]], "F"), "TIFF"), [[0] * 3, [51] * 3, [255] * 3]),
    "floats, large": (stored(deep([[0, 20, np.nan, 100]], "F"), "TIFF"), [[0] * 3, [51] * 3, [0] * 3, [255] * 3]),
    "cmyk": (stored(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [[255, 0, 0]]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_becomes_rgb(tmp_path, name):
    content, pixels = PICTURES[name]
    task = DatasetTask(geometry(tmp_path / "rows.parquet", [([content], "q", "1")] * 2))
    image = only(task).image
    assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8
    assert np.abs(np.asarray(image)[0].astype(int) - pixels).max() <= (1 if "alpha" in name else 0)


def test_the_modes_above_are_what_they_are_called():
    """So that a test of 16 bits does not become one of 8 when Pillow changes what it writes."""
    modes = {name: opened(content).mode for name, (content, _) in PICTURES.items()}
    assert {"RGB", "RGBA", "L", "LA", "1", "P", "I;16", "I", "F", "CMYK"} <= set(modes.values())
    assert modes["16 bits"] == "I;16" and modes["32 bits"] == "I" and modes["floats"] == "F"


def test_big_endian_16_bits():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert np.asarray(to_rgb(image)).tolist() == [[[1] * 3, [255] * 3]]


def test_a_cmyk_jpeg():
    red = to_rgb(opened(stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(np.asarray(red).astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (2, 1)), (6, (1, 0)), (8, (0, 2))])
def test_the_cameras_rotation_is_applied(orientation, corner):
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = to_rgb(opened(stored(image, "PNG", exif=exif)))
    assert turned.size == ((3, 2) if orientation in (1, 3) else (2, 3)) and turned.getpixel(corner) == (255, 255, 255)
    assert np.asarray(turned).sum() == 3 * 255 and to_rgb(turned).tobytes() == turned.tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(opened(content)))) == 3
    assert np.abs(np.asarray(to_rgb(opened(content))).astype(int) - [255, 0, 0]).max() <= 2


def bomb(width=200_000, height=200_000):
    """A PNG of a few bytes that says it is enormous."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_unusable_rows_are_skipped_with_their_numbers(tmp_path):
    good = stored(DICE[0].image)
    rows = [([good], "fine", "1"), ([bomb()], "bomb", "1"), ([bomb(8000, 8000)], "too large", "1"),
            ([b"hello"], "text", "1"), ([good], "  ", "1"), ([good], "no answer", None), ([good], None, "1"),
            ([good, b"\x89PNG"], "second", "1"), ([good], "blank", " "), ([good], "q" * 65_537, "1"),
            ([good], "long", "1" * 1001), ([bomb(201, 1)], "a line", "1"), ([good], "fine", "2")]
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with pytest.warns(UserWarning) as caught:
        task = DatasetTask(geometry(tmp_path / "rows.parquet", rows), eval_path=jsonl(tmp_path / "eval.jsonl", texts()))
    message, = [str(one.message) for one in caught]
    assert "11 of 13 rows cannot be used: row 1: picture: Decompression" in message and message.count("row ") == 5
    assert "row 2: picture: ValueError, 8000 x 8000, expected max_pixels=33554432, 1:200 at most" in message
    assert "row 3: picture: UnidentifiedImageError" in message and "0x" not in message
    assert "row 4: question is '  ', expected a text of 1 to 65536 characters; row 5: answer is None" in message
    assert task.size("train") == 2 and set(rows_of(task, "train")) == {0, 12}
    assert set(task._rows("train")[0].skipped) == set(range(1, 12))
    assert filters == warnings.filters and limit == Image.MAX_IMAGE_PIXELS  # nothing of ours leaks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DatasetTask(task.path, eval_path=task.eval_path)  # said once


def test_between_our_limit_and_pillows_own(tmp_path):
    """max_pixels is ours to raise, up to what Pillow takes for a bomb; then its warning is the end of the row."""
    path = geometry(tmp_path / "rows.parquet", [([bomb(8000, 8000)], "q", "1"), ([bomb(10_000, 10_000)], "q", "1")])
    with pytest.warns(UserWarning, match=r"1 of 2 rows cannot be used: row 1: picture: DecompressionBombWarning"):
        DatasetTask(path, max_pixels=10**9)


def test_missing_and_odd_pictures_in_json(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    names = ("a.png", "b.png", ".", "page.eps", "a\0b")
    rows = [{"image": name, "question": "q", "answer": "1"} for name in names]
    with pytest.warns(UserWarning, match="4 of 5 rows cannot be used: row 1: picture: FileNotFoundError"):
        task = DatasetTask(jsonl(tmp_path / "rows.jsonl", rows), eval_path=jsonl(tmp_path / "eval.jsonl", texts(2)))
    skipped = task._rows("train")[0].skipped
    assert task.size("train") == 1 and "UnidentifiedImageError" in skipped[3] and "directory" in skipped[2]
    with pytest.raises(ValueError, match="1 of 1 rows cannot be used: row 0: picture: KeyError, 'path'"):
        DatasetTask(jsonl(tmp_path / "odd.jsonl", [{"image": {"url": "x"}, "question": "q", "answer": "1"}]))


def test_dates_and_lists_are_no_answers(tmp_path):
    """JSON readers turn "2020-01-31" into a date; better no row than another spelling of its answer."""
    rows = [{"question": f"q{i}", "answer": "2020-01-31"} for i in range(3)]
    with pytest.raises(ValueError, match="3 of 3 rows cannot be used: row 0: answer is datetime"):
        DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"row 0: answer is \['a', 'b'\]"):
        DatasetTask(jsonl(tmp_path / "lists.jsonl", [{"question": "q", "answer": ["a", "b"]}]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_picture_is_replaced_by_the_next_good_row(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = stored(noise, kind, **({"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}))
    damaged = content[:len(content) * 3 // 5]
    if kind == "TIFF":  # its header is at the end
        damaged = content[:200] + b"\xff" * 2000 + content[2200:]
    rows = [([content], "a", "0"), ([damaged], "b", "1"), ([content, damaged], "c", "2"), ([content], "d", "3")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = DatasetTask(geometry(tmp_path / "rows.parquet", rows), eval_path=jsonl(tmp_path / "eval.jsonl", texts()))
    if kind == "WEBP":  # its header tells
        assert set(task._rows("train")[0].skipped) == {1, 2}
        return
    assert task.size("train") == 4
    with pytest.warns(UserWarning) as caught:
        seen = [task.example_at(i).key for i in (1, 0, 2, 3, 1, 5, 4)]
    assert seen == [f"train/{i}" for i in (3, 0, 3, 3, 3, 3, 0)] and task.size("train") == 4
    messages = [str(one.message) for one in caught if "so far" in str(one.message)]
    assert len(messages) == 2 and "row 1 skipped, 1 so far: picture" in messages[0]
    assert "row 2 skipped, 2 so far" in messages[1]


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path, monkeypatch):
    path = geometry(tmp_path / "rows.parquet", dice_rows())
    decoded = []
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(1) or to_rgb(image))
    task = DatasetTask(path)
    assert not decoded
    task.example_at(0)
    assert len(decoded) == 1


def test_when_all_rows_of_a_split_turn_out_to_be_damaged(tmp_path):
    damaged = stored(Image.new("RGB", (64, 64)))[:60]
    task = DatasetTask(geometry(tmp_path / "rows.parquet", [([damaged], "a", "1")] * 3),
                       eval_path=jsonl(tmp_path / "eval.jsonl", texts()))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="the 'train' split has no rows"):
        task.example_at(1)


# -------------------------------------------------------------------------------------------------------- errors
def test_wrong_sources_are_told_in_one_line(tmp_path):
    (tmp_path / "text.parquet").write_text("hello, this is no parquet file")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text('{"question": "q", "answer": 1}\n{"question": \n')
    for name in ("empty.jsonl", "empty.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_dict({"problem": [], "answer": []}).to_parquet(str(tmp_path / "none.parquet"))
    cases = {"missing.parquet": "no such file", "owner/missing.jsonl": "no such file", "/not/there": "no such file",
             "text.parquet": "arquet", "notes.txt": "another kind", "broken.jsonl": "JSON", "empty.jsonl": "empty file",
             "empty.parquet": "empty file", "none.parquet": "no data", "folder": "any data files"}
    for name, reason in cases.items():
        with pytest.raises(ValueError) as caught:
            DatasetTask(str(tmp_path / name) if name[0] not in "/o" else name)
        message = str(caught.value)
        assert name in message and reason in message and "\n" not in message, message
        assert "expected a .parquet, .jsonl or .json file, a folder of" in message


def test_of_a_long_reason_the_first_line_is_told(monkeypatch):
    def load_dataset(path, split):
        raise ConnectionError("cannot reach the hub\nsee the manual")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"path='owner/name', split 'train': no rows \(cannot reach the hub\); exp"):
        DatasetTask("owner/name")


def test_other_errors(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "q", "label": 1}])
    with pytest.raises(ValueError, match=r"no column problem or question, only \['text', 'label'\]; give question="):
        DatasetTask(path)
    with pytest.raises(ValueError, match=r"style='latex' is unknown; expected one of \('tags', 'boxed'\)"):
        DatasetTask(path, style="latex")
    with pytest.raises(TypeError, match="colour"):
        DatasetEnv(path, colour="red")
    task = DatasetTask(path, question="text", answer="label")
    with pytest.raises(ValueError, match="no demonstrations.*without a warm start"):
        task.demonstrate(None, np.random.default_rng(0))


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError) as caught:
        DatasetTask("some/where")
    assert str(caught.value) == "SAPO/Dataset-v0 needs a package that is not installed: pip install datasets"


def test_data_imports_neither_torch_nor_datasets():
    code = "import sys, data; assert not {'torch', 'datasets', 'math_verify'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data.__file__).parent)


# ------------------------------------------------------------------------------------------------------- grading
STRICT = [  # (given, true, right), with and without math-verify
    ("16", "16", 1), (" 16 ", "16", 1), ("16.", "16", 1), ("$16$", "16", 1), ("$$16$$", "16", 1), (r"\(16\)", "16", 1),
    (r"\[ 16 \]", "16", 1), (r"\text{16}", "16", 1), (r"$\text{16}.$", "16", 1), ("16", "$16$", 1), ("0.5", ".5", 1),
    ("1/2", "0.5", 1), ("+0.50", "1/2", 1), ("1,234", "1234", 1), ("1,234.50", "1234.5", 1), ("-3", "3", 0),
    ("−3", "-3", 1), ("016", "16", 1), ("16.0", "16", 1), ("17", "16", 0), ("1/3", "0.333333", 0), ("1/0", "1/0", 1),
    ("1/0", "1", 0), ("", "16", 0), ("$", "16", 0), ("$$", "16", 0), (".", "16", 0),
    (r"2 \sqrt { 221 }", r"2\sqrt{221}", 1),
    ("Yes", "yes", 1), ("the cat.", "The Cat", 1), ("act", "cat", 0), ("god", "dog", 0), (r"\text{red}", "red", 1),
    ("red", "blue", 0), ("A", "A", 1), ("a.", "A", 1), ("B", "A", 0), ("x+ y", "x + y", 1), ("１６", "16", 0),
    ("٤", "4", 0),
    ("9" * 999, "9" * 999, 1), ("9" * 1001, "9" * 1001, 0), ("1_000", "1000", 0), ("1e3", "1e3", 1), ("inf", "1", 0),
    ("nan", "nan", 1), ("1,23", "123", 0), ("30°", r"30^\circ", 1), ("漢字", "漢字", 1), ("\ud800", "\ud800", 1),
]
MATHS = [  # equal for math-verify only
    (r"\frac{1}{2}", "0.5", 1), (r"\frac12", r"\frac{1}{2}", 1), (r"x=16", "16", 1), (r"2\sqrt{3}", r"\sqrt{12}", 1),
    ("y+x", "x+y", 1), (r"30^\circ", "30", 1), ("30°", "30", 1), (r"2\pi r", r"2 \cdot \pi \cdot r", 1),
    ("2.2360679", r"\sqrt{5}", 1),
    ("(1, 2)", r"\left(1,2\right)", 1), ("2.236", r"\sqrt{5}", 0), ("16, 17", "16", 0), ("$16$ or $17$", "16", 0),
    (r"16}\boxed{17", "16", 0), (r"\pm 16", "16", 0), ("(1,3)", "(1,2)", 0), (r"\frac{1}{", r"\frac{1}{2}", 0),
    ("__import__('os').abort()", "16", 0), ("\ud800", "16", 0), ("\0\n", r"\pi", 0),
    ("=16=", "16", 0),
]
forms = {"tags": "<think>so</think><answer>{}</answer>", "boxed": r"<think>so</think> It is \boxed{{{}}}." + env.END}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", texts())
    return {style: DatasetTask(path, style=style) for style in data.STYLES}


@pytest.fixture
def without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(data, "_worker", lambda pid: pytest.fail("a worker was asked for"))
    same.cache_clear()
    yield
    same.cache_clear()


def grades(tasks, given, true, style):
    return tasks[style].grade(env.Example(None, "q", "k", (), true), forms[style].format(given))


@pytest.mark.parametrize("style", data.STYLES)
def test_the_strict_table(tasks, style, without_math_verify):
    wrong = [row for row in STRICT if grades(tasks, *row[:2], style) != row[2]]
    assert not wrong
    assert [grades(tasks, given, true, style) for given, true, _ in MATHS[:5]] == [0.0] * 5


@needs_math_verify
@pytest.mark.parametrize("style", data.STYLES)
def test_the_table_with_math_verify(tasks, style):
    wrong = [row for row in (*STRICT, *MATHS) if grades(tasks, *row[:2], style) != row[2]
             and not (style == "boxed" and row[0].count("{") != row[0].count("}"))]
    assert not wrong


def test_equal_texts_plain_numbers_and_words_ask_no_worker(monkeypatch):
    monkeypatch.setattr(data, "_judge", lambda *_: pytest.fail("asked"))
    same.cache_clear()
    for given_, true, right in (("17", "16", 0), ("act", "cat", 0), ("1/3", "0.33", 0), ("$x$", "x", 1),
                                ("x" * 1001, "x", 0)):
        assert same(given_, true) == right


@pytest.mark.parametrize("text, content", [
    (r"\boxed{16}", "16"), (r"\boxed{1}\boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("16", None),
    (r"\boxed{1} and \boxed{2", "1"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{x = \boxed{5}}", "5"), (r"\boxed{}", ""),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"} \boxed{3} {", "3"), (r"{{\boxed{3}", "3"), (r"\boxed{a{b}", None),
    (r"\boxed{1}<end>\boxed{2}", "1"), (r"<end>\boxed{2}", None), (r"\boxed", None), (r"\boxed 5", None), ("", None),
    (r"\boxed {16 }", "16"), (r"\boxed{3}}{\boxed{4}", "4"), (r"\boxed{a \boxed{b} {c}", "b"),
    (r"<think>\boxed{1}</think>\boxed{2}</answer>", "2"), (r"\\boxed{7}", "7"), (r"\boxed{1\}", None)])
def test_the_last_complete_box(text, content):
    assert read_boxed(text) == content


def test_reading_a_box_takes_linear_time():
    start = time.perf_counter()
    for text in (r"\boxed{" * 20_000, "}" * 99_999, r"\boxed{}" * 20_000, "{" * 99_999, r"\boxed" + " " * 99_999):
        read_boxed(text)
    assert time.perf_counter() - start < 5


def test_tags_keep_the_rules_of_read_answer(tasks):
    grade = lambda text: tasks["tags"].grade(env.Example(None, "q", "k", (), "16"), text)
    assert grade("<answer>16</answer>") == grade("<think>a</think><answer> 16 </answer>") == 1
    for text in (r"\boxed{16}", "16", "<answer>16", "<think><answer>16</answer>", "<answer></answer>",
                 "<end><answer>16</answer>", "<answer>15</answer><answer>16</answer>", "<answer>16<answer>16</answer>"):
        assert grade(text) == 0, text


SOUP = [*env.TAGS, env.END, r"\boxed{", "}", "{", "$", r"\text{", "16", "1/2", ",", ".", " ", "\\", "\ud800", "\0", "x",
        "²", "°"]
soup = st.lists(st.one_of(st.sampled_from(SOUP), st.text(max_size=3)), max_size=10).map("".join)


@given(soup, st.one_of(st.sampled_from(["16", "cat", "x"]), soup))
@example("$" * 1000, "16")
@example(r"\text{" * 160 + "}" * 160, "16")
@example("1" * 5000, "16")
@example("1/" + "0" * 900, "16")
def test_any_text_is_graded(tasks, text, true):
    """Without math-verify, which has its own test: an exception would be ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_judge", lambda *_: False)
        for style, task in tasks.items():
            assert task.grade(env.Example(None, "q", "k", (), true or "0"), text) in (0.0, 1.0)
            assert task.read(text) is None or isinstance(task.read(text), str)
            assert same(text, true) in (True, False)
            response, reason = task.cut(text)
            assert text.startswith(response) and task.cut(response) == (response, reason)
            assert reason in ("", "end", "answer") and task.check_steps(None, text) == task.step_spans(text) == []
            assert style == "tags" or reason != "answer"


@needs_math_verify
@settings(max_examples=25)
@given(soup)
def test_any_text_is_judged(text):
    assert same(text, r"\frac{1}{2}") in (True, False)
    assert same("1/2", r"\frac{1}{2}") is True  # the worker is in step


@needs_math_verify
def test_an_answer_that_never_ends_is_wrong_and_the_next_one_is_judged(monkeypatch):
    same(r"\frac{2}{4}", r"\frac{1}{2}")  # started
    worker = data._worker(os.getpid())
    monkeypatch.setattr(data, "DEADLINE", 1.0)
    same.cache_clear()
    start = time.perf_counter()
    assert same("9^{9^{9^{9}}}", "16") is False
    assert 0.9 < time.perf_counter() - start < 4
    assert worker.returncode == -signal.SIGKILL and worker.stdin.closed and worker.stdout.closed
    monkeypatch.setattr(data, "DEADLINE", 20.0)  # a busy machine needs more for the first answer
    assert same(r"\frac{3}{6}", r"\frac{1}{2}") is True and data._worker(os.getpid()).pid != worker.pid
    start = time.perf_counter()
    assert same("9^{9^{9^{9}}}", "16") is False and time.perf_counter() - start < 0.5  # known


@needs_math_verify
def test_a_worker_that_something_else_killed_is_replaced():
    same.cache_clear()
    assert same(r"\frac{2}{4}", r"\frac{1}{2}")
    data._worker(os.getpid()).kill(), data._worker(os.getpid()).wait()
    assert same(r"\frac{5}{10}", r"\frac{1}{2}")


@needs_math_verify
def test_a_question_that_was_interrupted_does_not_leave_its_reply_to_the_next(monkeypatch):
    same.cache_clear()
    assert same(r"\frac{2}{4}", r"\frac{1}{2}")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "wait", interrupted)
        same(r"\frac{7}{14}", r"\frac{1}{2}")
    assert not same(r"\frac{1}{3}", r"\frac{1}{2}")


@needs_math_verify
def test_threads_take_turns():
    same.cache_clear()
    found, questions = {}, [(rf"\frac{{{i}}}{{{j}}}", r"\frac{1}{2}") for i in range(1, 6) for j in range(1, 11)]

    def ask(part):
        found.update({question: same(*question) for question in part})

    threads = [threading.Thread(target=ask, args=(questions[i::4],)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert {question[0] for question, right in found.items() if right} == {
        rf"\frac{{{i}}}{{{2 * i}}}" for i in range(1, 6)} and len(found) == 50


@needs_math_verify
def test_a_reply_that_is_no_verdict_ends_the_worker(monkeypatch):
    """Something printed into the pipe: from then on every question would get the reply to the one before."""
    same.cache_clear()
    data._worker.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_SERVE", data._SERVE.replace("        given,", "        print('hm', flush=True); given,"))
        assert not same(r"\frac{2}{4}", r"\frac{1}{2}")
    assert not same(r"\frac{2}{6}", r"\frac{1}{2}") and same(r"\frac{3}{6}", r"\frac{1}{2}")


@needs_math_verify
def test_a_broken_math_verify_is_told(monkeypatch):
    same.cache_clear()
    data._worker.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_SERVE", "import no_such_package")
        with pytest.raises(RuntimeError, match="math-verify is installed, but fails"):
            same(r"\frac{2}{4}", r"\frac{1}{2}")
    assert same(r"\frac{2}{4}", r"\frac{1}{2}")


def _in_a_child(pipe):
    pipe.send((same(r"\frac{6}{12}", r"\frac{1}{2}"), data._worker(os.getpid()).pid))


@needs_math_verify
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_daemonic_fork_gets_a_worker_of_its_own_that_ends_with_it():
    same.cache_clear()
    assert same(r"\frac{2}{4}", r"\frac{1}{2}")
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(60)
    right, pid = ours.recv()
    child.join(20)
    assert right and child.exitcode == 0 and pid != data._worker(os.getpid()).pid
    assert gone(pid) and same(r"\frac{8}{16}", r"\frac{1}{2}")


def gone(pid, seconds=10):
    """Does the process end? (A zombie has ended.)"""
    for _ in range(10 * seconds):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except OSError:
            return True
        time.sleep(0.1)
    return False


@needs_math_verify
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)", "threading.Thread(target=same, args=(TOWER, '16'), "
                                 "daemon=True).start(); time.sleep(1); os.kill(os.getpid(), 9)"])
def test_no_worker_outlives_its_parent(end):
    """Nor does it hang its end: ordinary, killed while the worker waits, killed while it computes."""
    code = ("import os, threading, time, data; from data import same; data.DEADLINE = 2.0; TOWER = '9^{9^{9^{9}}}'\n"
            rf"same(r'\frac{{1}}{{2}}', r'\frac{{2}}{{4}}'); print(data._worker(os.getpid()).pid, flush=True); {end}")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=Path(data.__file__).parent)
    assert not done.stderr and gone(int(done.stdout))


# --------------------------------------------------------------------------------------- Gymnasium's contract
@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Rows with no picture, one, and two of different sizes."""
    pictures = [stored(Image.new("RGB", (20 + 7 * i, 31), (200, 40 * i, 0))) for i in range(5)]
    return geometry(tmp_path_factory.mktemp("rows") / "rows.parquet", [
        (pictures[:i % 3], "<image>" * (i % 3) + f"What is half of {i}?\nBe exact.", rf"\frac{{{i}}}{{2}}")
        for i in range(30)])


@pytest.mark.parametrize("style", data.STYLES)
def test_check_env_passes_without_a_warning(path, style, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("SAPO/Dataset-v0", path=path, style=style).unwrapped)


def test_a_whole_episode_with_tags(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        episode = gym.make("SAPO/Dataset-v0", path=path, format_reward=0.25)
        observation, info = episode.reset(options={"index": 4, "split": "eval"})
        unwrapped = episode.unwrapped
        assert set(observation) == {"images", "prompt", "response", "segment_index"}
        assert observation in episode.observation_space
        assert info["example_id"] == unwrapped.example.key and re.fullmatch("eval/[0-9]+", info["example_id"])
        assert len(observation["images"]) == len(unwrapped.example.content)
        pairs = zip(observation["images"], unwrapped.example.content, strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
        answer = info["answer"]
        assert answer not in observation["prompt"]
        observation, reward, terminated, truncated, info = episode.step("<think>1 < 2 and so</think>\n<answer>")
        assert (reward, terminated, truncated, info["predicted"], info["steps_correct"]) == (0, False, False, None, [])
        observation, reward, terminated, truncated, info = episode.step(f"${answer}$</answer> and more")
        assert (reward, terminated, truncated, info["predicted"]) == (1.25, True, False, f"${answer}$")
        assert info["correct"] and info["end_reason"] == "answer" and observation["response"].endswith("</answer>")


def test_a_whole_episode_boxed(path):
    episode = gym.make("SAPO/Dataset-v0", path=path, style="boxed", format_reward=0.25)
    observation, info = episode.reset(options={"index": 4})
    answer = info["answer"]
    texts_ = (r"<think>\boxed{1}", "</think> <answer>2</answer>", rf" \boxed{{{answer}}}")
    steps = [episode.step(text) for text in texts_]
    assert [step[2] for step in steps] == [False] * 3 and not any(step[1] for step in steps)
    assert [step[4]["predicted"] for step in steps] == ["1", "1", answer]
    _, reward, terminated, truncated, info = episode.step(f". {env.END}ignored")
    assert (reward, terminated, truncated, info["predicted"], info["end_reason"]) == (1.25, True, False, answer, "end")
    assert info["reward_terms"] == {"answer": 1.0, "format": 0.25}
    episode.reset(options={"index": 4, "response": rf"<answer></answer>\boxed{{{answer}}}"})  # an answer is no end
    assert episode.step(env.END)[1] == 1
    with pytest.raises(ValueError, match="an unfinished response"):
        episode.reset(options={"response": env.END})


def test_a_boxed_response_that_is_cut_off_earns_nothing(path):
    episode = DatasetEnv(path, style="boxed", max_chars=40)
    episode.reset(options={"index": 4})
    _, reward, terminated, truncated, info = episode.step(rf"\boxed{{{episode.example.answer}}}" + " " * 40)
    assert (reward, terminated, truncated, info["end_reason"]) == (0, False, True, "max_chars")
    assert info["predicted"] == episode.example.answer and not info["correct"]


def test_who_writes_on_a_picture_spoils_only_his_own(path):
    episode = DatasetEnv(path)
    observation, _ = episode.reset(options={"index": 1})
    i = next(i for i in range(9) if (observation := episode.reset(options={"index": i})[0])["images"])
    before = observation["images"][0].copy()
    observation["images"][0][:] = 7
    assert np.array_equal(episode.step("a")[0]["images"][0], before)
    assert np.array_equal(episode.reset(options={"index": i})[0]["images"][0], before)
    assert "image" not in observation and "image" not in episode.observation_space.spaces


def test_every_reset_shows_its_own_row(path):
    episode = DatasetEnv(path)
    for index in range(12):
        observation, info = episode.reset(options={"index": index})
        row = episode.task.example_at(index)
        assert (info["example_id"], info["answer"], observation["prompt"]) == (row.key, row.answer, row.question)
        assert [one.tobytes() for one in observation["images"]] == [one.tobytes() for one in row.content]


def test_same_seed_same_episode(path):
    one, two = DatasetEnv(path), DatasetEnv(path)
    assert [one.reset(seed=7)[1], one.reset()[1]] == [two.reset(seed=7)[1], two.reset()[1]]
    assert len({one.reset(seed=i)[1]["example_id"] for i in range(40)}) > 10


def test_system_texts_ask_for_what_the_grader_reads(tasks):
    tags, boxed = (tasks[style].system for style in ("tags", "boxed"))
    assert data.STYLES == {"tags": tags, "boxed": boxed} and env.DiceSum().system == ""
    assert "boxed" not in tags and tasks["tags"].read(tags.partition("reads: ")[2]) == "the final answer"
    assert r"\boxed{}" in boxed and "<think> and </think>" in boxed and "answer>" not in boxed


@pytest.mark.parametrize("style, text, right", [
    ("tags", "<think>a</think><answer>1</answer>", True), ("tags", "<answer>1</answer>", False),
    ("tags", "a<think>a</think><answer>1</answer>", False), ("boxed", r"\boxed{1}<end>", False),
    ("tags", "<think>a<think>b</think><answer>1</answer>", False),
    ("boxed", r"<think>a</think>\boxed{1}<end>", True), ("boxed", r"<think>\boxed{1}</think><end>", False)])
def test_the_format(tasks, style, text, right):
    assert bool(re.fullmatch(tasks[style].form, text)) == right


def test_the_format_is_checked_in_linear_time(tasks):
    start = time.perf_counter()
    for style, text in (("tags", "<think>" * 2000), ("boxed", "<think></think>" * 1000), ("tags", " " * 16000),
                        ("tags", "<think>" + "a" * 16000), ("boxed", "<think></think>" + r"\boxed{" * 2000 + "\n")):
        re.fullmatch(tasks[style].form, text)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("pictures", range(3))
def test_rendering(path, pictures):
    """The first picture stands where the board would: in the frame on the left, in the terminal above the question."""
    task = DatasetTask(path)
    index = next(i for i in range(task.size("train")) if len(task.example_at(i).content) == pictures)
    shown = {}
    for mode in ("rgb_array", "ansi"):
        episode = gym.make("SAPO/Dataset-v0", path=path, render_mode=mode)
        episode.reset(options={"index": index})
        episode.step("<think>Half of it</think>")
        shown[mode] = episode.render()
    assert shown["rgb_array"].shape == (384, 960, 3) and shown["rgb_array"].dtype == np.uint8
    board = shown["rgb_array"][32:352, 32:352].reshape(-1, 3).astype(int)
    red = (np.abs(board - [200, 0, 0]).max(1) < 50).mean()
    assert 0.5 < red < 0.99 if pictures else red < 0.1  # fitted, not stretched
    assert "What is half of" in shown["ansi"] and "Half of it" in shown["ansi"]
    assert shown["ansi"].count("▀") == 24 * 48 * bool(pictures)
    episode.reset(options={"index": next(i for i in range(9) if not task.example_at(i).content)})
    assert "▀" not in episode.render()  # nothing of the last example's picture


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
@pytest.mark.parametrize("size", [(199, 1), (1, 199), (1, 1)])
def test_rendering_a_picture_of_an_odd_shape(tmp_path, size, mode):
    path = geometry(tmp_path / "rows.parquet", [([stored(Image.new("RGB", size))], "q", "1")])
    episode = DatasetEnv(path, render_mode=mode)
    episode.reset(options={"split": only(episode.task).key.split("/")[0]})
    assert len(episode.render())


def test_human_rendering_prints(path, capsys):
    episode = DatasetEnv(path, render_mode="human")
    episode.reset(seed=1)
    assert "What is half of" in capsys.readouterr().out


def test_vector_environments(path):
    make = [lambda: DatasetEnv(path, style="boxed")] * 2
    vector = gym.vector.SyncVectorEnv(make)
    observation, info = vector.reset(seed=3)
    alone = DatasetEnv(path, style="boxed").reset(seed=4)[0]
    assert len(observation["images"]) == 2 and len(observation["images"][1]) == len(alone["images"])
    assert all(np.array_equal(a, b) for a, b in zip(observation["images"][1], alone["images"], strict=True))
    observation, rewards, terminated, _, _ = vector.step(("a", env.END))
    assert observation["response"] == ("a", env.END) and terminated.tolist() == [False, True]
    vector.close()


def test_the_space_of_pictures():
    space = data.Pictures(seed=1)
    good = np.zeros((2, 3, 3), np.uint8)
    for fine in ((), (good,), (good, np.zeros((9, 1, 3), np.uint8)), space.sample()):
        assert fine in space
    for bad in ([good], good, (good[..., :1],), (good.astype(float),), (good[0],), (None,), "x"):
        assert bad not in space
    assert space == data.Pictures() and space != gym.spaces.Discrete(2)


def test_a_spec_survives_json(path):
    episode = gym.make("SAPO/Dataset-v0", path=path, style="boxed", max_segments=7)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(json.dumps(json.loads(episode.spec.to_json()))))
    assert again.unwrapped.task == episode.unwrapped.task == DatasetTask(path, style="boxed")
    assert again.unwrapped.max_segments == 7
