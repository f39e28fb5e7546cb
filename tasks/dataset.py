r"""Your own pictures, questions and answers as a task: `import env` registers SAPO/Dataset-v0.

    gym.make("SAPO/Dataset-v0", path="hiyouga/geometry3k", eval_split="test", style="boxed")
    gym.make("SAPO/Dataset-v0", path="mine.jsonl")     # a file of such lines:
    {"image": "figures/7.png", "question": "How long is AB?", "answer": "2\\sqrt{3}"}

`path` is a .parquet, .jsonl or .json file, a folder of parquet files, an image folder
(metadata.jsonl or metadata.csv beside the pictures) or a hub name: all through the package
`datasets`. Reading a local path uses no network. Where no rows are named for evaluation, 1 in 5 is
held out, by a hash of its content.

A row has any number of pictures: a path (in JSON relative to the file), bytes, or a list of those.
At the start only their headers are read. A row that cannot be used is skipped, and a warning says
why; row numbers count from 0.

Left out: demonstrations, as no data set tells the true steps, and resizing, which is the business
of the model's processor.
"""

import functools
import glob
import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tasks.base import (
    END,
    SPLITS,
    Example,
    StepsUnknown,
    check_index,
    read_answer,
    split_of,
    until_end,
)
from tasks.grading import MAX_ANSWER, is_copied, read_boxed, same
from tasks.pictures import to_rgb

# What the model is told first: to reason, and then to answer once, where the grader looks for it.
STYLES = {
    "tags": (
        "First think the problem through step by step, then give the final answer, and nothing but "
        "the answer. The whole response reads: "
        "<think>your steps</think><answer>the final answer</answer>"
    ),
    "boxed": (
        "First think the problem through step by step, as a monologue of your own, between <think> "
        r"and </think>. Then give the final answer, and nothing but the answer, in \boxed{}."
    ),
}

# The columns that are looked for where none is named: hiyouga/geometry3k's, then usual ones.
COLUMNS = {
    "images": ("images", "image"),
    "question": ("problem", "question"),
    "answer": ("answer", "multiple_choice_answer"),
}

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}  # as `datasets` calls them
SOURCES = (
    "a .parquet, .jsonl or .json file, a folder of parquet files or of pictures and metadata, "
    "or a hub owner/name"
)

# The kinds of pictures that are opened: not all that Pillow knows, as EPS would start Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

MAX_PROMPT = 65536  # characters
EXACT_BELOW = 2**53  # every whole number below it has a float of its own


# ------------------------------------------------------------------- a source and its columns


def _load(path, split):
    """The table of one split of a source. ImportError without the package `datasets`, ValueError
    if there are no rows."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "SAPO/Dataset-v0 needs a package that is not installed: pip install datasets"
        ) from None
    # Else each local file that is read is counted on a server
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return datasets.load_dataset(**_source(path), split=split)
    except Exception as error:  # each reader has its own kinds
        cause = error.__cause__ or error  # often the reason is in the error behind it
        reason, _, _ = str(cause).partition("\n")
        if reason.startswith(("Value is too big", "Value is too small")):  # pandas, of a number
            reason += ": write numbers beyond 64 bits as strings"
        raise ValueError(
            f"path={path!r}, split {split!r}: no rows ({reason}); expected {SOURCES}"
        ) from None


def _source(path):
    """What `datasets.load_dataset` is to be asked for. ValueError with the reason if a path is
    neither a usable file, nor a folder, nor the name of something on the hub."""
    local = Path(path).expanduser()
    reader = READERS.get(local.suffix.lower())
    if local.is_file():
        if reader is None:
            raise ValueError("a file of another kind")
        if local.stat().st_size == 0:
            raise ValueError("an empty file")
        return {"path": reader, "data_files": glob.escape(str(local))}
    may_be_on_hub = reader is None and re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    if not local.exists() and not may_be_on_hub:
        raise ValueError("there is no such file or folder")
    return {"path": str(local)}


def _find_columns(path, table, names):
    """{"images", "question", "answer": the column of the table}.

    names: the columns asked for; "" stands for the usual ones. Where no usual column has images,
    the value is None: a text-only task. Any other column that is missing is a ValueError.
    """
    columns = {}
    for role, name in names.items():
        wanted = (name,) if name else COLUMNS[role]
        present = [column for column in wanted if column in table.column_names]
        is_optional = role == "images" and not name
        if not present and not is_optional:
            raise ValueError(
                f"{path}: no column {' or '.join(wanted)}, only {table.column_names}; give {role}="
            )
        columns[role] = present[0] if present else None
    return columns


def _leave_pictures_encoded(table):
    """Changes the table in place: we decode its pictures ourselves, row by row and with care.

    (The official way, `cast_column`, would copy lists of pictures.)
    """
    import datasets

    for feature in table.info.features.values():
        item = getattr(feature, "feature", feature)  # of a list, what its items are
        if isinstance(item, datasets.Image):
            item.decode = False


# ----------------------------------------------------------------------------------- its rows


class Rows:
    """One split of a source. ValueError if none of its rows can be used.

    parts    the numbers of the usable rows: "all" of them, and in two shares, "train" and "eval"
    skipped  {number: reason} of the others
    """

    def __init__(self, path, split, max_pixels, names):
        table = _load(path, split)
        self.columns = _find_columns(path, table, names)
        _leave_pictures_encoded(table)
        self.table = table.select_columns([column for column in self.columns.values() if column])
        self.max_pixels = max_pixels
        local = Path(path).expanduser()
        folder = local if local.is_dir() else local.parent
        # Where paths of pictures begin, and what they may not leave; a source from the hub brings
        # its own
        self.folder = Path(os.path.abspath(folder)) if local.exists() else None
        self.parts = {"all": [], "train": [], "eval": []}
        self.skipped = {}
        self._sort_out()
        if not self.parts["all"]:
            raise ValueError(self._complaint(path))
        if self.skipped:
            warnings.warn(self._complaint(path), stacklevel=2)

    def _sort_out(self):
        # Of a picture that is too large to be true Pillow only warns. Here that is an error, and so
        # the end of the row.
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            for number in range(len(self.table)):
                try:  # a text that is no Unicode fails when its row is taken from the table
                    content = self.read(self.table[number], decode=False)
                except ValueError as error:
                    self.skipped[number] = str(error)
                    continue
                self.parts["all"].append(number)
                self.parts[split_of(repr(content))].append(number)

    def _complaint(self, path):
        reasons = [f"row {number}: {reason}" for number, reason in self.skipped.items()]
        counts = f"{len(self.skipped)} of {len(self.table)} rows cannot be used"
        return f"{path}: {counts}: {'; '.join(reasons[:5])}"

    def read(self, record, decode=True):
        """(question, answer, pictures) of a row, or a ValueError that says why it cannot be used.

        decode=False reads only what the split depends on: of a picture, its `_fingerprint`.
        """
        question = self._text(record, "question", MAX_PROMPT)
        answer = self._text(record, "answer", MAX_ANSWER)
        return question, answer, self._pictures(record, decode)

    def _text(self, record, role, limit):
        """A cell as text of 1 to `limit` characters, without the "<image>"s that mark where its
        pictures belong."""
        value = record[self.columns[role]]
        is_nan = value != value
        if isinstance(value, float) and value.is_integer():
            # pandas stores whole numbers as floats if one of them is missing, and a JSON reader
            # those beyond 64 bits. From 2^53 on neighbours share a float, so that which number
            # stood there is no longer known.
            if abs(value) >= EXACT_BELOW:
                raise ValueError(
                    f"{role} is {value!r}, a number too large to be read exactly: write it as a "
                    "string"
                )
            value = int(value)
        parts = [part.strip() for part in str(value).split("<image>")]
        text = " ".join(part for part in parts if part)
        if not isinstance(value, (str, int, float)) or is_nan or not 0 < len(text) <= limit:
            raise ValueError(f"{role} is {value!r:.40}, expected a text of 1 to {limit} characters")
        return text

    def _pictures(self, record, decode):
        column = self.columns["images"]
        cell = record[column] if column else None
        sources = cell if isinstance(cell, list) else [cell]
        pictures = []
        for source in sources:
            try:
                if isinstance(source, dict):  # as `datasets` stores a picture
                    content = source.get("bytes")
                    source = source["path"] if content is None else content
                if source not in (None, ""):  # else the row has text only
                    pictures.append(self._picture(source, decode))
            except Exception as error:  # Pillow raises all kinds on damaged files
                reason, _, _ = str(error).partition(" <_io")  # it may end in an object's address
                raise ValueError(f"picture: {type(error).__name__}, {reason}") from None
        return tuple(pictures)

    def _picture(self, source, decode):
        """RGB, or only the `_fingerprint`, of a picture given as bytes or by its path."""
        is_encoded = isinstance(source, bytes)
        with io.BytesIO(source) if is_encoded else open(self._file(source), "rb") as file:
            image = Image.open(file, formats=FORMATS)  # reads the header only
            self._check_size(*image.size)
            return to_rgb(image) if decode else _fingerprint(file)

    def _file(self, source):
        """The file that a path of a row names. ValueError for what is no file (a pipe would be
        waited for) and, of local data, for a path that leaves their folder; links are followed."""
        file = Path(os.path.abspath((self.folder or Path()) / source))
        if self.folder and not file.is_relative_to(self.folder):
            raise ValueError(f"{source} lies outside the folder of the data, {self.folder}")
        if file.exists() and not file.is_file():
            raise ValueError(f"{source} is no file")
        return file

    def _check_size(self, width, height):
        fits = 0 < width * height <= self.max_pixels
        if not fits or not 1 / 200 < width / height < 200:
            raise ValueError(
                f"{width} x {height}, expected max_pixels={self.max_pixels}, 1:200 at most"
            )


def _fingerprint(file):
    """What tells a file from others, without decoding it: its size and its beginning.

    The 0 between the two (where the beginning begins) has to stay: the repr of all decides a row's
    split.
    """
    size = file.seek(0, io.SEEK_END)
    start = file.seek(0)
    return size, start, file.read(4096)


@functools.lru_cache  # loaded once per process: training makes an environment per response
def _shared_rows(path, split, max_pixels, images, question, answer):
    names = {"images": images, "question": question, "answer": answer}
    return Rows(path, split, max_pixels, names)


# ----------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class DatasetTask(StepsUnknown):
    """Rows of a data set. The true steps are unknown, so no step is ever checked.

    Of an example, `content` is the tuple of its pictures, PIL RGB, `image` the first or None, and
    `key` the split and the number of the row.
    """

    path: str
    images: str = ""
    """the column of the pictures; a column is named only where none of COLUMNS fits"""
    question: str = ""
    """the column of the questions"""
    answer: str = ""
    """the column of the true answers"""
    style: str = "tags"
    """where a response gives its answer: "tags", in <answer>, or "boxed", in LaTeX's boxed{}"""
    train_split: str = "train"
    """the source's split to train on"""
    eval_path: str = ""
    """the source of the rows for evaluation; without it and eval_split, 1 row in 5 is held out"""
    eval_split: str = ""
    """the source's split for evaluation"""
    max_pixels: int = 2**25
    """a row with a picture above this is skipped"""
    max_prompt = MAX_PROMPT
    needs = {"path": SOURCES}

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r} is unknown; expected one of {tuple(STYLES)}")
        _, train_numbers = self._rows("train")
        _, eval_numbers = self._rows("eval")
        if train_numbers is eval_numbers:  # one and the same list: "all" rows of the same source
            raise ValueError(
                "the eval rows are the training rows; name others with eval_path= or eval_split="
            )

    def _rows(self, split):
        """(the source as `Rows`, the numbers of those that are in this split)"""
        path, source_split = self.path, self.train_split
        if split == "eval":
            path = self.eval_path or self.path
            source_split = self.eval_split or self.train_split
        columns = (self.images, self.question, self.answer)
        rows = _shared_rows(path, source_split, self.max_pixels, *columns)
        is_eval_named = self.eval_path or self.eval_split
        return rows, rows.parts["all" if is_eval_named else split]

    # ---- examples

    def size(self, split):
        """The number of rows in a split, with those whose pictures will turn out to be damaged."""
        _, numbers = self._rows(split)
        return len(numbers)

    def sample(self, rng, split=None):
        """An `Example` drawn with `rng`, a numpy Generator, from one split or either."""
        index = rng.integers(2**31)
        if split is None:
            split = str(rng.choice([split for split in SPLITS if self.size(split)]))
        return self.example_at(index, split)

    def example_at(self, index, split="train"):
        """The index-th row of a split, round and round; the next one where its pictures turn out to
        be damaged. ValueError if no row is left."""
        check_index(index, split)
        rows, numbers = self._rows(split)
        for i in range(len(numbers)):
            number = numbers[(index + i) % len(numbers)]
            if number in rows.skipped:
                continue
            try:
                question, answer, images = rows.read(rows.table[number])
            except ValueError as error:
                rows.skipped[number] = str(error)
                count = f"{len(rows.skipped)} so far"
                warnings.warn(f"{self.path}: row {number} skipped, {count}: {error}", stacklevel=2)
                continue
            image = images[0] if images else None
            return Example(image, question, f"{split}/{number}", images, answer)
        raise ValueError(
            f"{self.path}: the {split!r} split has no rows; name others with eval_path= or "
            "eval_split="
        )

    def demonstrate(self, example, rng, error_rate=0.0):
        """ValueError: the true steps are unknown."""
        raise ValueError(
            "a data set has no demonstrations: begin with a model that can answer, without a warm "
            "start"
        )

    # ---- responses

    @property
    def system(self):
        """What the model is told first: where to reason, and where to answer."""
        return STYLES[self.style]

    @property
    def form(self):
        """A regular expression: a response that thinks once, and then answers."""
        think = r"(?s)\s*<think>(?:(?!</?think>).)*</think>"
        if self.style == "tags":
            return think + r"\s*<answer>[^<]+</answer>"
        return think + r".*\\boxed\{.*"

    @property
    def stop(self):
        """As for every task; but in the style "boxed" an answer ends nothing, only `END` does."""
        return super().stop if self.style == "tags" else None

    def until_end(self, text):
        """As for every task; but in the style "boxed" an answer ends nothing, only `END` does."""
        if self.style == "tags":
            return until_end(text)
        response, end, _ = text.partition(END)
        return (response + end, "end") if end else (text, "")

    def read_answer(self, text):
        """As for every task; but in the style "boxed" it is what the last box holds."""
        return read_answer(text) if self.style == "tags" else read_boxed(text)

    def grade(self, example, text):
        """1.0 if the answer given is the `same` as the true one and not just copied, else 0.0."""
        answer = self.read_answer(text)
        if answer is None:
            return 0.0
        is_right = same(answer, example.answer)
        return float(is_right and not is_copied(answer, example.answer, example.question))
