"""Whatever a user could hand in (settings, rows, pictures) is used as it reads, or one line says
why not.

Cases are drawn by Hypothesis, more of them with SAPO_EXAMPLES=10000; results/fuzz.json holds the
count of a long run. Grading has the like in test_tasks.py and test_grading.py.
"""

import contextlib
import io
import math
import re
import typing
from dataclasses import asdict, fields

import pytest
from data_files import additions, geometry, jsonl, stored
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import SHORT, rows_of

import baselines
import sapo
import train
from tasks.dataset import FORMATS, DatasetTask, Rows

FIELDS = {
    field.name: (field, typing.get_type_hints(cls)[field.name])
    for cls in (train.Settings, sapo.SAPOConfig)
    for field in fields(cls)
}

# -------------------------------------------------------------------------- nonsense settings
WORDS = [
    *("-1", "0", "1", "2", "0.5", "1e-9", "1e9", "1e400", "inf", "-inf", "nan", "-0.0"),
    *("", " ", "None", "true", "no", "x", "٣", "1_0", "0x10", "n=", "=", "n=-1", "é" * 300),
]


class Begun(Exception):
    """The settings were taken, and the long work would begin."""


def stop_here(*_):
    raise Begun


@st.composite
def nonsense(draw):
    """{field: its words} of one to three fields."""
    chosen = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True))
    flags = {}
    for name in chosen:
        _, hint = FIELDS[name]
        # No "-" first: that may be another flag. No "/", which may lead out of the test's folder
        letters = st.characters(exclude_characters="/")
        text = st.text(letters, max_size=6)
        word = st.sampled_from(WORDS) | text.filter(lambda text: text[:1] != "-")
        if typing.get_origin(hint) is typing.Literal:
            word = word | st.sampled_from(typing.get_args(hint))
        is_list = typing.get_origin(hint) is list
        flags[name] = draw(st.lists(word, max_size=3)) if is_list else [draw(word)]
    return flags


TRUTH = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def as_python_reads(words, hint):
    """The value of some words for a field of this type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return [as_python_reads([word], inner[0]) for word in words]
    (word,) = words
    if hint is bool:
        return TRUTH[word.lower()]
    for kind in (int, float):
        if kind in (hint, *inner):
            return kind(word)
    return word


def check_meaning(words, flags, folder):
    """The settings of an accepted command line are its words as Python reads them, and otherwise
    the method's defaults; and they are the same again from config.json."""
    typed = {name: as_python_reads(given, FIELDS[name][1]) for name, given in flags.items()}
    method = typed.get("method", train.Settings.method)
    settings, config = train.made_of(baselines.SETTINGS[method] | typed)
    settings.runs = words[words.index("--runs") + 1]
    settings.name = typed.get("name") or train.flags.default_name(settings)
    expected = asdict(settings) | asdict(config)
    # repr tells 1 from 1.0 and from True, and -0.0 from 0.0
    assert {name: repr(expected[name]) for name in typed} == {n: repr(typed[n]) for n in typed}
    accepted = train.parse(words)
    assert repr(asdict(accepted[0]) | asdict(accepted[1])) == repr(expected)
    train.prepare_folder(folder, *accepted, train.Progress())
    assert repr(train.stored_settings(folder)) == repr(expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nonsense())
@example({"clip_high": ["inf"], "name": ["inf"], "actor_lr": ["-0.0"]})
@example({"branching": ["2", "1_0"], "gradient_checkpointing": ["no"], "dtype": ["bfloat16"]})
def test_nonsense_is_refused_in_one_line_that_names_it_or_means_what_it_says_before_any_long_work(
    tmp_path, monkeypatch, flags
):
    monkeypatch.setattr(train.tiny, "cached_warm_start", stop_here)
    monkeypatch.setattr(train.models, "build", stop_here)  # of a --model that is not the tiny one
    words = [word for name, given_words in flags.items() for word in (f"--{name}", *given_words)]
    if "runs" not in flags:
        words += ["--runs", str(tmp_path)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.chdir(tmp_path):
            train.main(words)
    except Begun:
        check_meaning(words, flags, tmp_path / "begun")
        return
    except SystemExit as left:
        line = said.getvalue().strip().splitlines()[-1] if left.code == 2 else left.code
    assert "\n" not in line and len(line) < 2000
    # A flag is named, or a longer word of it. A run's name is made from some flags
    if {"env", "env_args", "method", "cut", "seed"} & flags.keys():
        flags["name"] = []
    named = "|".join([*flags, *(name.replace("_", "-") for name in flags)])
    is_named = re.search(rf"(?<![\w-])(--)?({named})(?!\w)", line)
    assert is_named or any(len(word) > 3 and word in line for word in sum(flags.values(), [])), line


# ------------------------------------------------------------------- settings at their bounds
# What a warm start is made with stays as it is, or each case would take ten seconds.
LEFT_ALONE = {
    *("env", "env_args", "model", "device", "seed", "name", "runs", "resume", "iterations"),
    *("warm_start_steps", "warm_start_batch", "warm_start_lr", "habits", "error_rate"),
}


def bounds(name):
    """Words for a field: its choices, or numbers at the ends of its range and between them."""
    field, hint = FIELDS[name]
    kinds = {hint, *typing.get_args(hint)}
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if hint is bool:
        return "true", "false"
    within = field.metadata["help"].rpartition("; in ")[2]
    low, high = (float(end) for end in within[1:-1].split(", "))
    if int in kinds:
        return [str(int(low) + more) for more in range(4)]
    inside = [low + 1e-30, low + 0.5, min(high, low + 2), min(high, 1e30)]
    ends = [end for end, bracket in ((low, within[0]), (high, within[-1])) if bracket in "[]"]
    numbers = [number for number in (*inside, *ends) if low < number < high or number in ends]
    return [str(number) for number in numbers]


BOUNDED = sorted(FIELDS.keys() - LEFT_ALONE)
pairs = st.lists(st.sampled_from(BOUNDED), min_size=2, max_size=2, unique=True).flatmap(
    lambda names: st.tuples(*(st.tuples(st.just(n), st.sampled_from(bounds(n))) for n in names))
)


@settings(
    max_examples=max(4, settings.default.max_examples // 25),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(pairs)
def test_two_settings_at_their_bounds_train_or_are_refused_in_one_line(runs, pair):
    flags = [word for name, value in pair for word in (f"--{name}", value)]
    small = ["--batch", "4", "--minibatch", "2", "--group", "2", "--eval_episodes", "2"]
    small += ["--branching", "2", "2", "--segment_tokens", "2", "--continuations", "2"]
    folder = runs / "bounds"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main(
                [*SHORT, *small, *flags]
                + ["--iterations", "1", "--runs", str(runs), "--name", "bounds"]
            )
    except SystemExit as left:
        assert isinstance(left.code, str) and "\n" not in left.code and len(left.code) < 1000
        return
    for row in rows_of(folder / "metrics.jsonl"):
        assert all(math.isfinite(number) for number in row.values()), row


# ------------------------------------------------------------------ rows, pictures and files
PICTURES = [stored(Image.new("RGB", (9, 7), "red"), kind) for kind in FORMATS]
PICTURES += [
    stored(Image.new("P", (9, 7)), "GIF", save_all=True, append_images=[Image.new("P", (9, 7), 3)]),
    stored(Image.new("LA", (9, 7)), "PNG"),
    stored(Image.new("I;16", (9, 7), 40000), "PNG"),
    stored(Image.new("F", (9, 7), 0.5), "TIFF"),
    stored(Image.new("CMYK", (9, 7)), "JPEG"),
]


@st.composite
def damaged(draw, wholes):
    """One of some contents, with bytes changed, left out, put in or cut off."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        piece = draw(st.binary(max_size=4))
        content[at : at + draw(st.integers(0, 4))] = piece
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


cells = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["<image>", " <image> ", "0.png", "../0.png", "/dev/zero", ".", "\0"])
    | damaged(PICTURES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({}, optional={"bytes": inner, "path": inner, "x": inner})
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def rows(dataset_cache, tmp_path_factory):
    """Rows of a file with a picture each, to read other records with."""
    folder = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    records = [{**row, "image": "0.png"} for row in additions(4)]
    names = {"images": "", "question": "", "answer": ""}
    return Rows(jsonl(folder / "rows.jsonl", records), "train", 10_000, names)


@given(cells, cells, cells, st.booleans())
@example("0.png", "How many?", 3, True)
def test_any_record_is_a_row_or_says_why_not(rows, picture, question, answer, decode):
    record = {"image": picture, "question": question, "answer": answer}
    try:
        question, answer, pictures = rows.read(record, decode)
    except ValueError as error:
        assert str(error).startswith(("question is ", "answer is ", "picture: "))
        return
    assert isinstance(question, str) and question.strip() == question != ""
    assert isinstance(answer, str) and answer.strip() == answer != ""
    for seen in pictures:
        assert seen.mode == "RGB" if decode else len(seen) == 3, "RGB, or what the split reads"


@given(damaged(PICTURES))
@example(b"")
def test_any_bytes_are_a_picture_or_say_why_not(rows, content):
    record = {"image": content, "question": "What?", "answer": "x"}
    try:
        (_, _, (seen,)) = rows.read(record)
    except ValueError as error:
        assert str(error).startswith("picture: ") and "\n" not in str(error)
        return
    width, height = seen.size
    assert seen.mode == "RGB" and width * height <= rows.max_pixels


@settings(
    max_examples=max(10, settings.default.max_examples // 5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_any_file_is_a_data_set_or_says_why_not_in_one_line(dataset_cache, tmp_path, kind, data):
    whole = tmp_path / f"whole.{kind}"
    if kind == "jsonl":
        jsonl(whole, additions(8))
    else:
        geometry(whole, [((PICTURES[0],), f"What is {i}?", str(i)) for i in range(8)])
    file = tmp_path / f"{data.draw(st.integers(0, 2**60))}.{kind}"  # a new name: nothing is cached
    file.write_bytes(data.draw(damaged([whole.read_bytes()])))
    try:
        task = DatasetTask(str(file), style="tags")
        for split in ("train", "eval"):
            one = task.example_at(3, split)
            assert one.question and one.answer
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(file) in str(error) or "the eval rows are the training rows" in str(error)
