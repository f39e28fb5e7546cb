"""tasks/dataset.py: rows whose pictures or cells cannot be used, and what is read when."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from data_files import (
    DICE,
    additions,
    dice_rows,
    geometry,
    jsonl,
    rows_of,
    skipped,
    stored,
)
from PIL import Image

import tasks.dataset
from tasks.dataset import DatasetTask

pytest.importorskip("datasets", reason="SAPO/Dataset-v0 needs: pip install datasets")
pytestmark = pytest.mark.usefixtures("dataset_cache")


@pytest.fixture
def eval_path(tmp_path):
    """Rows for evaluation, so that all others are for training, in their order."""
    return jsonl(tmp_path / "eval.jsonl", additions())


def bomb(width=200_000, height=200_000):
    """A PNG of a few bytes that says it is enormous."""

    def chunk(name, body):
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def test_unusable_rows_are_skipped_with_their_numbers(tmp_path, eval_path):
    good = stored(DICE[0].image)
    rows = [
        ([good], "fine", "1"),
        ([bomb()], "bomb", "1"),
        ([bomb(8000, 8000)], "too large", "1"),
        ([b"hello"], "text", "1"),
        ([good], "  ", "1"),
        ([good], "no answer", None),
        ([good], None, "1"),
        ([good, b"\x89PNG"], "second", "1"),
        ([good], "blank", " "),
        ([good], "q" * 65_537, "1"),
        ([good], "long", "1" * 1001),
        ([bomb(201, 1)], "a line", "1"),
        ([good], "fine", "2"),
    ]
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with pytest.warns(UserWarning) as caught:
        task = DatasetTask(geometry(tmp_path / "rows.parquet", rows), eval_path=eval_path)
    (message,) = [str(one.message) for one in caught]
    assert "11 of 13 rows cannot be used: row 1: picture: Decompression" in message
    assert message.count("row ") == 5 and "0x" not in message
    too_large = "8000 x 8000, expected max_pixels=33554432, 1:200 at most"
    assert f"row 2: picture: ValueError, {too_large}" in message
    assert "row 3: picture: UnidentifiedImageError" in message
    assert "row 4: question is '  ', expected a text of 1 to 65536 characters; row 5" in message
    assert "row 5: answer is None" in message
    assert task.size("train") == 2 and set(rows_of(task, "train")) == {0, 12}
    assert set(skipped(task)) == set(range(1, 12))
    assert filters == warnings.filters and limit == Image.MAX_IMAGE_PIXELS  # nothing of ours leaks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DatasetTask(task.path, eval_path=task.eval_path)  # said once


def test_between_our_limit_and_pillows_own(tmp_path):
    """max_pixels is ours to raise, up to what Pillow takes for a bomb: its warning ends the row."""
    rows = [([bomb(8000, 8000)], "q", "1"), ([bomb(10_000, 10_000)], "q", "1")]
    path = geometry(tmp_path / "rows.parquet", rows)
    message = r"1 of 2 rows cannot be used: row 1: picture: DecompressionBombWarning"
    with pytest.warns(UserWarning, match=message):
        DatasetTask(path, max_pixels=10**9)


def test_missing_and_odd_pictures_in_json(tmp_path, eval_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "page.eps").write_bytes(postscript)
    names = ("a.png", "b.png", ".", "page.eps", "a\0b")
    rows = [{"image": name, "question": "q", "answer": "1"} for name in names]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    message = "4 of 5 rows cannot be used: row 1: picture: FileNotFoundError"
    with pytest.warns(UserWarning, match=message):
        task = DatasetTask(path, eval_path=eval_path)
    assert task.size("train") == 1 and "UnidentifiedImageError" in skipped(task)[3]
    assert skipped(task)[2] == "picture: ValueError, . is no file"


def test_a_picture_that_is_neither_bytes_nor_a_path(tmp_path):
    path = jsonl(tmp_path / "odd.jsonl", [{"image": {"url": "x"}, "question": "q", "answer": "1"}])
    message = "1 of 1 rows cannot be used: row 0: picture: KeyError, 'path'"
    with pytest.raises(ValueError, match=message):
        DatasetTask(path)


def test_dates_are_no_answers(tmp_path):
    """JSON readers turn "2020-01-31" into a date; better no row than another spelling of it."""
    rows = [{"question": f"q{i}", "answer": "2020-01-31"} for i in range(3)]
    message = "3 of 3 rows cannot be used: row 0: answer is datetime"
    with pytest.raises(ValueError, match=message):
        DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))


def test_lists_are_no_answers(tmp_path):
    rows = [{"question": "q", "answer": ["a", "b"]}]
    with pytest.raises(ValueError, match=r"row 0: answer is \['a', 'b'\]"):
        DatasetTask(jsonl(tmp_path / "lists.jsonl", rows))


# ------------------------------------------------------------ damage that only decoding finds

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def rows_with_damage(content, damaged):
    return [
        ([content], "a", "0"),
        ([damaged], "b", "1"),
        ([content, damaged], "c", "2"),
        ([content], "d", "3"),
    ]


def damaged_tiff():
    """With its end, where a TIFF has its header, but a hole in its middle."""
    content = stored(NOISE, "TIFF", compression="tiff_adobe_deflate")
    return content, content[:200] + b"\xff" * 2000 + content[2200:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_a_damaged_picture_is_replaced_by_the_next_good_row(tmp_path, kind, eval_path):
    content = stored(NOISE, kind)
    damaged = content[: len(content) * 3 // 5]
    if kind == "TIFF":
        content, damaged = damaged_tiff()
    path = geometry(tmp_path / "rows.parquet", rows_with_damage(content, damaged))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = DatasetTask(path, eval_path=eval_path)
    assert task.size("train") == 4
    with pytest.warns(UserWarning) as caught:
        keys = [task.example_at(i).key for i in (1, 0, 2, 3, 1, 5, 4)]
    assert keys == [f"train/{i}" for i in (3, 0, 3, 3, 3, 3, 0)] and task.size("train") == 4
    messages = [str(one.message) for one in caught if "so far" in str(one.message)]
    assert len(messages) == 2
    assert "row 1 skipped, 1 so far: picture" in messages[0]
    assert "row 2 skipped, 2 so far" in messages[1]


def test_of_a_truncated_webp_the_header_tells(tmp_path, eval_path):
    content = stored(NOISE, "WEBP")
    rows = rows_with_damage(content, content[: len(content) * 3 // 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = DatasetTask(geometry(tmp_path / "rows.parquet", rows), eval_path=eval_path)
    assert set(skipped(task)) == {1, 2}


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path, monkeypatch):
    path = geometry(tmp_path / "rows.parquet", dice_rows())
    decoded = []
    to_rgb = tasks.dataset.to_rgb

    def counted(image):
        decoded.append(image)
        return to_rgb(image)

    monkeypatch.setattr(tasks.dataset, "to_rgb", counted)
    task = DatasetTask(path)
    assert not decoded
    task.example_at(0)
    assert len(decoded) == 1


def test_when_all_rows_of_a_split_turn_out_to_be_damaged(tmp_path, eval_path):
    damaged = stored(Image.new("RGB", (64, 64)))[:60]
    path = geometry(tmp_path / "rows.parquet", [([damaged], "a", "1")] * 3)
    task = DatasetTask(path, eval_path=eval_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="the 'train' split has no row"):
        task.example_at(1)


@pytest.mark.parametrize("name", ["../secret.png", "pipe"])
def test_a_path_that_leaves_the_data_or_names_no_file_is_skipped(tmp_path, eval_path, name):
    """A pipe, opened, would be waited for without end."""
    folder = tmp_path / "data"
    folder.mkdir()
    DICE[0].image.save(tmp_path / "secret.png")
    DICE[0].image.save(folder / "fine.png")
    os.mkfifo(folder / "pipe")
    rows = [{"image": path, "question": "q", "answer": "1"} for path in ("fine.png", name)]
    path = jsonl(folder / "rows.jsonl", rows)
    message = "1 of 2 rows cannot be used: row 1: picture: ValueError, .*(outside|no file)"
    with pytest.warns(UserWarning, match=message):
        DatasetTask(path, eval_path=eval_path)


def test_an_absolute_path_within_the_data_is_read(tmp_path, eval_path):
    DICE[0].image.save(tmp_path / "dice.png")
    rows = [{"image": str(tmp_path / "dice.png"), "question": "q", "answer": "1"}]
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", rows), eval_path=eval_path)
    assert task.example_at(0).image.size == DICE[0].image.size
