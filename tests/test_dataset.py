"""tasks/dataset.py: rows from real files, their columns, and splits by content alone."""

import csv
import json
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from data_files import (
    DICE,
    additions,
    dice_rows,
    geometry,
    geometry_rows,
    geometry_table,
    jsonl,
    only,
    rows_of,
    stored,
)
from PIL import Image

from env import DatasetEnv
from tasks import SPLITS
from tasks.dataset import DatasetTask

datasets = pytest.importorskip("datasets", reason="SAPO/Dataset-v0 needs: pip install datasets")
pytestmark = pytest.mark.usefixtures("dataset_cache")


# ------------------------------------------------------------------------------------ sources


def check_dice(task):
    rows = rows_of(task, "train") | rows_of(task, "eval")
    assert sorted(rows) == list(range(len(DICE)))
    for number, one in rows.items():
        assert one.answer == DICE[number].answer
        assert one.question == f"Sum the dice. ({number})"
        assert len(one.content) == 1 and one.image is one.content[0] and one.image.mode == "RGB"
        assert np.array_equal(np.asarray(one.image), np.asarray(DICE[number].image))


def test_parquet_in_the_layout_of_geometry3k(tmp_path, offline):
    check_dice(DatasetTask(geometry(tmp_path / "rows.parquet", dice_rows())))


def write_plain_parquet(path, rows):
    """As other libraries do, without saying which bytes are pictures."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_parquet_file_with_pictures_as_a_plain_struct(tmp_path):
    write_plain_parquet(tmp_path / "struct.parquet", geometry_rows(dice_rows()))
    check_dice(DatasetTask(str(tmp_path / "struct.parquet")))


def test_a_parquet_file_with_pictures_as_bare_bytes(tmp_path):
    rows = []
    for row in geometry_rows(dice_rows()):
        rows.append(row | {"images": row["images"][0]["bytes"]})
    write_plain_parquet(tmp_path / "bytes.parquet", rows)
    check_dice(DatasetTask(str(tmp_path / "bytes.parquet")))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "odd [name] *.jsonl"])
def test_json_lines_with_paths_relative_to_the_file(tmp_path, name, offline, monkeypatch):
    (tmp_path / "pictures").mkdir()
    rows = []
    for i, one in enumerate(DICE):
        one.image.save(tmp_path / "pictures" / f"{i}.png")
        question = f"Sum the dice. <image> ({i})"
        rows.append({"image": f"pictures/{i}.png", "question": question, "answer": int(one.answer)})
    path = jsonl(tmp_path / name, rows)
    check_dice(DatasetTask(path))
    monkeypatch.chdir(tmp_path)  # a relative path to the file itself
    check_dice(DatasetTask(name))


def test_one_json_array_is_read_too(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(additions(5)))
    task = DatasetTask(str(tmp_path / "rows.json"))
    assert task.size("train") + task.size("eval") == 5


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    "metadata, write", [("metadata.jsonl", jsonl), ("metadata.csv", write_csv)]
)
def test_an_image_folder(tmp_path, metadata, write, offline):
    rows = []
    for i, one in enumerate(DICE):
        name = f"{i:02}.png"
        one.image.save(tmp_path / name)
        rows.append({"file_name": name, "question": f"Sum the dice. ({i})", "answer": one.answer})
    write(tmp_path / metadata, rows)
    check_dice(DatasetTask(str(tmp_path)))


def test_a_folder_of_parquet_files_has_splits(tmp_path, offline):
    geometry(tmp_path / "train-00000.parquet", dice_rows()[:12])
    geometry(tmp_path / "train-00001.parquet", dice_rows()[12:20])
    geometry(tmp_path / "test-00000.parquet", dice_rows()[20:])
    task = DatasetTask(str(tmp_path), eval_split="test")
    assert (task.size("train"), task.size("eval")) == (20, 20)
    held_out = [task.example_at(i, "eval").answer for i in range(20)]
    trained = [task.example_at(i).answer for i in range(20)]
    assert held_out == [one.answer for one in DICE[20:]]
    assert trained == [one.answer for one in DICE[:20]]
    no_eval_split = DatasetTask(str(tmp_path), train_split="test")
    assert no_eval_split.size("train") < 20  # a share is held out
    with pytest.raises(ValueError, match=r'split \'nope\'.*"nope"'):
        DatasetTask(str(tmp_path), train_split="nope")


def test_a_folder_of_json_lines_has_its_pictures_beside_them(tmp_path, offline):
    DICE[0].image.save(tmp_path / "0.png")
    for split in ("train", "test"):
        row = {"image": "0.png", "question": f"{split}?", "answer": "1"}
        jsonl(tmp_path / f"{split}.jsonl", [row])
    task = DatasetTask(str(tmp_path), eval_split="test")
    questions = [task.example_at(0, split).question for split in SPLITS]
    assert questions == ["train?", "test?"]
    assert task.example_at(0).image.tobytes() == DICE[0].image.tobytes()


def test_a_hub_name_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        rows = [([stored(one.image)], f"{split} {i}", one.answer) for i, one in enumerate(DICE[:7])]
        return geometry_table(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = DatasetTask("hiyouga/geometry3k", eval_split="test", train_split="validation")
    assert asked == [("hiyouga/geometry3k", "validation"), ("hiyouga/geometry3k", "test")]
    assert task.example_at(8).question == "validation 1"
    assert task.example_at(0, "eval").question == "test 0"
    assert task.example_at(0).image.size == DICE[0].image.size


def test_many_environments_share_one_data_set(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "rows.jsonl", additions())
    gym.make("SAPO/Dataset-v0", path=path)

    def load_dataset(*_, **__):
        pytest.fail("loaded twice")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    start = time.perf_counter()
    many = []
    for _ in range(257):
        many.append(gym.make("SAPO/Dataset-v0", disable_env_checker=True, path=path))
    assert time.perf_counter() - start < 10
    assert len({id(one.unwrapped.task._rows("train")[0]) for one in many}) == 1


# -------------------------------------------------------------------------- columns and cells


def test_usual_column_names(tmp_path):
    row = {"image": None, "question": "How many?", "multiple_choice_answer": "two"}
    assert only(DatasetTask(jsonl(tmp_path / "vqa.jsonl", [row] * 3))).answer == "two"


def test_columns_that_are_given(tmp_path):
    row = {"image": None, "question": "How many?", "problem_id": 3, "solution": "2"}
    path = jsonl(tmp_path / "vqa.jsonl", [row] * 3)
    one = only(DatasetTask(path, answer="solution", question="problem_id"))
    assert (one.question, one.answer, one.image, one.content) == ("3", "2", None, ())
    with pytest.raises(
        ValueError, match=r"no column picture, only \['image', 'quest.*; give images="
    ):
        DatasetTask(path, answer="solution", images="picture")
    with pytest.raises(ValueError, match=r"no column answers, only .*; give answer="):
        DatasetTask(path, answer="answers")


def with_eval_rows(tmp_path, path):
    """A task that trains on all rows of a file, in their order."""
    return DatasetTask(path, eval_path=jsonl(tmp_path / "eval.jsonl", additions()))


def test_parquet_rows_with_no_picture_one_and_several(tmp_path):
    pictures = [stored(Image.new("RGB", (8 + i, 6), (40 * i, 0, 0))) for i in range(3)]
    rows = [
        ([], "none", "0"),
        (pictures[:1], "<image>one", "1"),
        (pictures, "<image><image>\n<image> three ", "3"),
    ]
    path = geometry(tmp_path / "rows.parquet", rows)
    examples = rows_of(with_eval_rows(tmp_path, path), "train")
    assert [len(examples[i].content) for i in range(3)] == [0, 1, 3] and examples[0].image is None
    assert [examples[i].question for i in range(3)] == ["none", "one", "three"]
    assert [one.size for one in examples[2].content] == [(8, 6), (9, 6), (10, 6)]


@pytest.mark.parametrize(
    "cells, counts",
    [
        ([{"images": ["a.png", "b.png"]}, {}, {"images": []}], [2, 0, 0]),
        ([{"image": {"path": "b.png"}}], [1]),
        ([{"image": "a.png"}, {"image": ""}], [1, 0]),
    ],
)
def test_json_rows_with_no_picture_one_and_several(tmp_path, cells, counts):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (5, 5), "red").save(tmp_path / name)
    rows = [cell | {"question": "q", "answer": str(i)} for i, cell in enumerate(cells)]
    task = with_eval_rows(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    examples = rows_of(task, "train")
    assert [len(examples[i].content) for i in range(len(cells))] == counts
    assert examples[0].image.size == (5, 5)


@pytest.mark.parametrize(
    "text, tidied",
    [
        ("<image>Find x.", "Find x."),
        ("See <image> and find x", "See and find x"),
        ("A\n<image>\nB", "A B"),
        ("  a\n\n  b <image>  ", "a\n\n  b"),
        ("<image><image>\nq", "q"),
        ("x < image > 3", "x < image > 3"),
    ],
)
def test_placeholders_go(tmp_path, text, tidied):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": "1"}] * 2))
    assert only(task).question == tidied


def test_answers_that_are_numbers_or_mixed(tmp_path):
    answers = [3, 2.5, "x", True, -7, 1.0]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    task = with_eval_rows(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    read = [task.example_at(i).answer for i in range(6)]
    assert read == ["3", "2.5", "x", "True", "-7", "1"]
    assert task.example_at(0, "eval").answer == "1"


@pytest.mark.parametrize("first", [10**30, 2**63, -(10**30)])
def test_numbers_that_a_reader_rounds_are_refused(tmp_path, first):
    """They would all read as one, and a right answer would earn 0."""
    rows = [{"question": f"q{i}", "answer": first + i} for i in range(5)]
    with pytest.raises(ValueError, match="row 0: answer is .*exactly: write it as a string") as no:
        DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl" in str(no.value) and "\n" not in str(no.value)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="array.json.* as (a string|strings)"):
        DatasetTask(str(tmp_path / "array.json"))


def test_a_rounded_number_takes_only_its_own_row_away(tmp_path):
    rows = [{"question": f"q{i}", "answer": i} for i in range(30)]
    rows.append({"question": "large", "answer": 10**30})
    with pytest.warns(UserWarning, match="1 of 31 rows cannot be used: row 30: answer is 1e.30"):
        task = DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))
    answers = [one.answer for split in SPLITS for one in rows_of(task, split).values()]
    assert sorted(answers, key=int) == [str(i) for i in range(30)]


def test_numbers_of_64_bits_and_longer_ones_as_strings_are_exact(tmp_path):
    numbers = [*range(2**53 - 2, 2**53 + 3), *range(2**62, 2**62 + 20)]
    rows = [{"question": f"q{n}", "answer": n} for n in numbers]
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))
    rows = [row | {"answer": str(10**30 + row["answer"])} for row in rows]
    task_of_strings = DatasetTask(jsonl(tmp_path / "strings.jsonl", rows))
    for one, more in ((task, 0), (task_of_strings, 10**30)):
        answers = {row.answer for split in SPLITS for row in rows_of(one, split).values()}
        assert answers == {str(more + n) for n in numbers}


@pytest.mark.parametrize(("number", "fits"), [(2.0**53 - 1, True), (2.0**53, False)])
def test_a_float_in_a_parquet_file_is_taken_as_far_as_it_is_exact(tmp_path, number, fits):
    path = tmp_path / "floats.parquet"
    table = {"question": [str(i) for i in range(9)], "answer": [number] * 9}
    datasets.Dataset.from_dict(table).to_parquet(str(path))
    if fits:
        assert DatasetTask(str(path)).example_at(0).answer == "9007199254740991"
        return
    with pytest.raises(ValueError, match="9007199254740992.0, a number too large to be read"):
        DatasetTask(str(path))


def test_whole_numbers_stored_as_floats(tmp_path):
    """As pandas does if one of them is missing."""
    table = datasets.Dataset.from_dict({"question": ["a", "b"], "answer": [3.0, float("nan")]})
    table.to_parquet(str(tmp_path / "floats.parquet"))
    with pytest.warns(UserWarning, match="1 of 2 rows cannot be used: row 1: answer is nan"):
        task = DatasetTask(str(tmp_path / "floats.parquet"))
    assert only(task).answer == "3"


# ------------------------------------------------------------------------------------- splits


def test_the_shares_are_disjoint_and_depend_on_the_content_alone(tmp_path):
    rows = additions(300)
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", rows))
    train, held_out = rows_of(task, "train"), rows_of(task, "eval")
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 300
    assert 35 <= len(held_out) <= 85
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(300)]
    every_row_twice = DatasetTask(jsonl(tmp_path / "again.jsonl", shuffled + rows))
    questions = {}
    for split in SPLITS:
        questions[split] = {one.question for one in rows_of(every_row_twice, split).values()}
    assert questions["eval"] == {one.question for one in held_out.values()}
    assert not questions["eval"] & questions["train"]
    assert every_row_twice.size("eval") == 2 * len(held_out)


def test_pictures_belong_to_the_content_that_decides_the_split(tmp_path):
    """One question for all, and one answer: only the pictures can put rows into both shares."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    rows = [([stored(Image.fromarray(one))], "<image>How many?", "1") for one in noise]
    task = DatasetTask(geometry(tmp_path / "rows.parquet", rows))
    assert 0 < task.size("eval") < 40


def test_the_shares_are_the_same_on_every_machine(tmp_path):
    """Pinned: a change here silently changes which rows a run trains on."""
    path = tmp_path / "rows.jsonl"
    Image.new("RGB", (2, 2), "red").save(tmp_path / "red.bmp")  # a format without compression
    jsonl(path, [row | {"image": "red.bmp"} for row in additions(20)])
    assert sorted(rows_of(DatasetTask(str(path)), "eval")) == [1, 2, 10, 18]


def test_index_wraps_and_is_checked(tmp_path):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", additions()))
    n = task.size("train")
    assert task.example_at(n + 2) == task.example_at(2) == task.example_at(np.int64(2 + 5 * n))
    assert task.example_at(2) != task.example_at(3)
    for index, split in (
        (-1, "train"),
        (True, "train"),
        (1.0, "train"),
        ("1", "train"),
        (0, "test"),
    ):
        with pytest.raises(ValueError, match="expected an integer >= 0 and one of"):
            task.example_at(index, split)


def test_sample_draws_from_the_split_asked_for(tmp_path):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", additions()))
    drawn = {}
    for split in ("train", "eval", None):
        keys = [task.sample(np.random.default_rng(i), split).key for i in range(40)]
        drawn[split] = {key.split("/")[0] for key in keys}
    assert drawn == {"train": {"train"}, "eval": {"eval"}, None: {"train", "eval"}}
    again = [task.sample(np.random.default_rng(3), "train") for _ in range(2)]
    assert again[0] == again[1]


def test_a_file_of_its_own_for_the_eval_split(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", additions(10))
    other = jsonl(tmp_path / "other.jsonl", additions(4))
    task = DatasetTask(one, eval_path=other)
    assert (task.size("train"), task.size("eval")) == (10, 4)
    for same_rows in ({"eval_path": one}, {"eval_split": "train"}):
        with pytest.raises(ValueError, match="the eval rows are the training rows"):
            DatasetTask(one, **same_rows)


def test_a_split_without_rows(tmp_path):
    task = DatasetTask(jsonl(tmp_path / "rows.jsonl", additions(1)))
    empty = "eval" if task.size("train") else "train"
    assert task.size(empty) == 0 and only(task).answer == "1"
    message = f"the '{empty}' split has no rows; name others with eval_path= or eval_spl"
    with pytest.raises(ValueError, match=message):
        task.example_at(0, empty)


# ------------------------------------------------------------------------------------- errors


def test_wrong_sources_are_told_in_one_line(tmp_path):
    (tmp_path / "text.parquet").write_text("hello, this is no parquet file")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text('{"question": "q", "answer": 1}\n{"question": \n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "folder").mkdir()
    no_rows = datasets.Dataset.from_dict({"problem": [], "answer": []})
    no_rows.to_parquet(str(tmp_path / "none.parquet"))
    reasons = {
        "missing.parquet": "no such file",
        "owner/missing.jsonl": "no such file",
        "/not/there": "no such file",
        "text.parquet": "arquet",
        "notes.txt": "another kind",
        "broken.jsonl": "JSON",
        "empty.jsonl": "empty file",
        "empty.parquet": "empty file",
        "none.parquet": "no data",
        "folder": "any data files",
    }
    for name, reason in reasons.items():
        path = name if "/" in name else str(tmp_path / name)
        with pytest.raises(ValueError) as caught:
            DatasetTask(path)
        message = str(caught.value)
        assert name in message and reason in message and "\n" not in message, message
        assert "expected a .parquet, .jsonl or .json file, a folder of" in message


def test_of_a_long_reason_the_first_line_is_told(monkeypatch):
    def load_dataset(path, split):
        raise ConnectionError("cannot reach the hub\nsee the manual")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"path='owner/name', split 'train': no rows \(cannot reach the hub\); exp"
    with pytest.raises(ValueError, match=message):
        DatasetTask("owner/name")


def test_columns_without_a_usual_name_have_to_be_given(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "q", "label": 1}])
    message = r"no column problem or question, only \['text', 'label'\]; give question="
    with pytest.raises(ValueError, match=message):
        DatasetTask(path)


def test_other_errors(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "q", "label": 1}])
    message = r"style='latex' is unknown; expected one of \('tags', 'boxed'\)"
    with pytest.raises(ValueError, match=message):
        DatasetTask(path, style="latex")
    with pytest.raises(TypeError, match="colour"):
        DatasetEnv(path, colour="red")
    with pytest.raises(ValueError, match="^DatasetTask: path= is missing; give it a .parquet, "):
        DatasetEnv(style="boxed")
    task = DatasetTask(path, question="text", answer="label")
    with pytest.raises(ValueError, match="no demonstrations.*without a warm start"):
        task.demonstrate(None, np.random.default_rng(0))


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError) as caught:
        DatasetTask("some/where")
    message = "SAPO/Dataset-v0 needs a package that is not installed: pip install datasets"
    assert str(caught.value) == message
