r"""Your own pictures, questions and answers as a task: `import env` registers it as SAPO/Dataset-v0.

    gym.make("SAPO/Dataset-v0", path="hiyouga/geometry3k", eval_split="test", style="boxed")
    gym.make("SAPO/Dataset-v0", path="mine.jsonl")     # of such lines; 1 in 5, by a hash of its content, is held out:
    {"image": "figures/7.png", "question": "How long is AB?", "answer": "2\\sqrt{3}"}

`path` is a .parquet, .jsonl or .json file, a folder of parquet files, an image folder (metadata.jsonl or metadata.csv
beside the pictures) or a hub name: all through `datasets`; a local path downloads nothing. A row has any number of
pictures: a path (in JSON relative to the file), bytes, or a list of those; at the start only their headers are read. A
row that cannot be used is skipped, and a warning says why; row numbers count from 0. Left out: demonstrations, as no
data set tells the true steps, and resizing, which is the business of the model's processor.
"""
import functools
import glob
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
import warnings
import zlib
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import wait
from pathlib import Path

import gymnasium as gym
import numpy as np
from PIL import Image, ImageOps

import env

STYLES = {  # what the model is told first: to reason, and then to answer once, where the grader looks for it
    "tags": "First think the problem through step by step, then give the final answer, and nothing but the answer. "
            "The whole response reads: <think>your steps</think><answer>the final answer</answer>",
    "boxed": "First think the problem through step by step, as a monologue of your own, between <think> and </think>. "
             r"Then give the final answer, and nothing but the answer, in \boxed{}."}
COLUMNS = {"images": "images image", "question": "problem question", "answer": "answer multiple_choice_answer"}
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
SOURCES = "a .parquet, .jsonl or .json file, a folder of parquet files or of pictures and metadata, or a hub owner/name"
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # not all that Pillow reads: EPS starts Ghostscript
MAX_PROMPT, MAX_ANSWER, DEADLINE = 65536, 1000, 5.0  # characters; seconds that math-verify may take for one answer

# --------------------------------------------------------------------------------------------- pictures and rows
def to_rgb(image):
    """A picture of any mode as upright 8-bit RGB: EXIF's rotation applied, transparency laid on white, 16 bits and
    floats scaled (not clipped) to 8 bits, of an animation the first frame."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # white is 65535 in I;16, I;16B and I, 1 in F; or the highest value, if that is above
        values = np.nan_to_num(np.asarray(image).astype(np.float32)).clip(0)
        white = max(values.max(), 65535 if image.mode[0] == "I" else 1)
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

@functools.lru_cache  # loaded once per process: train.py makes one environment per response
class Rows:
    """One split of a source. `parts`: the numbers of its usable rows, "all" of them and in two shares, "train" and
    "eval". `skipped`: {number: reason} of the others."""

    def __init__(self, path, split, max_pixels, **names):
        try:
            import datasets
        except ImportError:
            raise ImportError("SAPO/Dataset-v0 needs a package that is not installed: pip install datasets") from None
        local, self.max_pixels, self.names = Path(path).expanduser(), max_pixels, {}
        self.folder, kind = local if local.is_dir() else local.parent, KINDS.get(local.suffix.lower())
        try:
            if local.is_file() and not (kind and local.stat().st_size):
                raise ValueError("an empty file" if kind else "a file of another kind")
            if not local.exists() and (kind or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
                raise ValueError("there is no such file or folder")
            what = {"path": kind, "data_files": glob.escape(str(local))} if local.is_file() else {"path": str(local)}
            table = datasets.load_dataset(**what, split=split)
        except Exception as error:  # each reader has its own kinds, often with the reason in the one behind it
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise ValueError(f"path={path!r}, split {split!r}: no rows ({reason}); expected {SOURCES}") from None
        for what, name in names.items():
            wanted = [name] if name else COLUMNS[what].split()
            self.names[what] = next((x for x in wanted if x in table.column_names), "")
            if not self.names[what] and (name or what != "images"):  # without pictures: a text-only task
                raise ValueError(f"{path}: no column {' or '.join(wanted)}, only {table.column_names}; give {what}=")
        for kind in table.info.features.values():
            if isinstance(kind := getattr(kind, "feature", kind), datasets.Image):
                kind.decode = False  # we do, row by row, and with care; `cast_column` would copy lists of pictures
        self.table = table.select_columns([name for name in self.names.values() if name])
        self.skipped, self.parts = {}, {"all": [], "train": [], "eval": []}
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            for number, record in enumerate(self.table):
                try:
                    share = env.SPLITS[zlib.crc32(repr(self.read(record, decode=False)).encode()) % 5 == 0]
                    self.parts["all"].append(number), self.parts[share].append(number)
                except ValueError as error:
                    self.skipped[number] = str(error)
        few = "; ".join([f"row {number}: {reason}" for number, reason in self.skipped.items()][:5])
        few = f"{path}: {len(self.skipped)} of {len(table)} rows cannot be used: {few}"
        if not self.parts["all"]:
            raise ValueError(few)
        if self.skipped:
            warnings.warn(few, stacklevel=2)

    def read(self, record, decode=True):
        """(question, answer, pictures), or a ValueError that says why the row cannot be used. Not decoded, a picture
        is its file's size and beginning: as good as unique, and equal for equal rows."""
        texts, pictures = [], []
        for what, limit in (("question", MAX_PROMPT), ("answer", MAX_ANSWER)):
            value = record[self.names[what]]
            text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
            texts.append(" ".join(part.strip() for part in text.split("<image>") if part.strip()))
            if not isinstance(value, (str, int, float)) or value != value or not 0 < len(texts[-1]) <= limit:  # NaN
                raise ValueError(f"{what} is {value!r:.40}, expected a text of 1 to {limit} characters")
        cell = record.get(self.names["images"])
        for one in cell if isinstance(cell, list) else [cell]:
            try:
                if not (source := one.get("bytes") or one["path"] if isinstance(one, dict) else one):
                    continue  # text only
                with io.BytesIO(source) if isinstance(source, bytes) else open(self.folder / source, "rb") as file:
                    width, height = (image := Image.open(file, formats=FORMATS)).size  # only the header is read
                    if not 0 < width * height <= self.max_pixels or not 1 / 200 < width / height < 200:
                        raise ValueError(f"{width} x {height}, expected max_pixels={self.max_pixels}, 1:200 at most")
                    pictures.append(to_rgb(image) if decode else (file.seek(0, 2), file.seek(0), file.read(4096)))
            except Exception as error:  # Pillow raises all kinds on damaged files
                raise ValueError(f"picture: {type(error).__name__}, {str(error).partition(' <_io')[0]}") from None
        return *texts, tuple(pictures)

# ------------------------------------------------------------------------------------------------------- grading
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_WRAPPED = re.compile(r"\$\$?([^$]*)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+|[0-9]+/0*[1-9][0-9]*)")
_LOCK = threading.Lock()
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
_SERVE = r"""  # the worker: a line of JSON comes in, [given, true], and 1 or 0 goes out
import json, signal, sys
from math_verify import LatexExtractionConfig, parse, verify
# As LaTeX only: plain expressions would go through Python's eval
read = lambda text: parse(r"\boxed{" + text + "}", [LatexExtractionConfig()], parsing_timeout=None)
print("ready", flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_REAL, 2 * float(sys.argv[1]))  # kills it, should the parent no longer be there
    try:
        given, true = map(read, json.loads(line))
        print(int(verify(true, given, timeout_seconds=None)), flush=True)
    except Exception:
        print(0, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
"""

def read_boxed(text):
    r"""The content of the last complete `\boxed{...}` before any `END`, or None; the papers' graders read it so."""
    last, opened = (0, 0), []  # where the box begins and ends; the begins of open boxes, 0 for other braces
    for brace in _BRACES.finditer(text.partition(env.END)[0]):
        if brace[0] == "}" and opened:
            last = max(last, (opened.pop(), brace.start()))
        elif brace[0][-1] == "{" and brace[0] != r"\{":
            opened.append(brace.end() if brace[0] != "{" else 0)
    return text[slice(*last)].strip() if last[0] else None

def tidy(text):
    r"""Without $ signs, \text{} and a period around it, nor blanks beside symbols; words in lower case."""
    tidied, before = " ".join(text.split()), None
    while tidied != before:
        before, tidied = tidied, tidied.rstrip(" .")
        if wrapped := _WRAPPED.fullmatch(tidied):
            tidied = wrapped[wrapped.lastindex].strip()
    tidied = re.sub(r" ?([^\w\s]) ?", r"\1", tidied)
    return tidied.casefold() if tidied.replace(" ", "").isalpha() else tidied or text

@functools.lru_cache(4096)  # a group's responses give equal answers, among them those that take seconds
def same(given, true):
    """Is the given answer the true one? Equal texts are, once tidied; of plain numbers (0.5, .5, 1/2; 1,234) only equal
    ones; on all else math-verify decides, if installed, but not on words: to it "act" is a*c*t, and so is "cat"."""
    if len(given) > MAX_ANSWER:
        return False
    given, true = (text.translate({ord("−"): "-", ord("°"): r"^\circ"}) for text in (given, true))
    plain = tidy(given), tidy(true)
    numbers = [Fraction(text.replace(",", "")) for text in plain if _NUMBER.fullmatch(text)]
    if plain[0] == plain[1] or len(numbers) == 2:
        return plain[0] == plain[1] or numbers[0] == numbers[1]
    maths = re.search(r"[0-9\\]", true) or not re.search(r"[^\W\d_]{2}", true)
    return bool(maths and importlib.util.find_spec("math_verify")) and _judge(given, true)

def _judge(given, true):
    # math-verify's verdict, from a process that is killed after DEADLINE, which means False: the library's own limit,
    # an alarm, works in the main thread only and stops no long multiplication
    with _LOCK:
        if _worker(os.getpid()).poll() is not None:  # killed, by us or by something else
            _worker.cache_clear()
        worker, reply = _worker(os.getpid()), b""
        try:
            worker.stdin.write(json.dumps([given, true]).encode() + b"\n")
            reply = wait([worker.stdout], DEADLINE) and worker.stdout.readline()
        finally:  # also after Ctrl-C: the next question must not get this one's reply
            if reply not in (b"0\n", b"1\n"):
                with worker:  # closes the pipes and waits
                    worker.kill()
    return reply == b"1\n"

@functools.lru_cache(1)
def _worker(pid):
    # One per process, forks too. A bare pipe: `multiprocessing` would run the caller's __main__ again, and refuses to
    # work in a daemonic process. The worker ends when the pipe does; Ctrl-C does not reach it in its own session.
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    worker = subprocess.Popen([sys.executable, "-c", _SERVE, str(DEADLINE)], start_new_session=True, **pipes)
    if not (wait([worker.stdout], 120) and worker.stdout.readline()):
        raise RuntimeError("math-verify is installed, but fails: try python -c 'import math_verify'")
    return worker

# ------------------------------------------------------------------------------------------ task and environment
@dataclass(frozen=True)
class DatasetTask(env.Task):
    """Rows of a data set. A column needs a name only where none of COLUMNS fits: hiyouga/geometry3k's, then usual ones.
    A row with a picture above `max_pixels` is skipped. Held out are the rows of `eval_path` and `eval_split`; with
    neither, 1 row in 5. An example's `content` is its pictures, PIL RGB, `image` the first or None, `key` split/row."""
    path: str
    images: str = ""
    question: str = ""
    answer: str = ""
    style: str = "tags"
    train_split: str = "train"
    eval_path: str = ""
    eval_split: str = ""
    max_pixels: int = 2**25
    system = property(lambda self: STYLES[self.style])
    form = property(lambda self: r"(?s)\s*<think>(?:(?!</?think>).)*</think>" + (
        r"\s*<answer>[^<]+</answer>" if self.style == "tags" else r".*\\boxed\{.*"))
    step_spans = check_steps = lambda self, *_: []  # the true steps are unknown
    size = lambda self, split: len(self._rows(split)[1])  # with the rows whose pictures will turn out to be damaged
    read = lambda self, text: env.read_answer(text) if self.style == "tags" else read_boxed(text)

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r} is unknown; expected one of {tuple(STYLES)}")
        if self._rows("train")[1] is self._rows("eval")[1]:
            raise ValueError("the eval rows are the training rows; name others with eval_path= or eval_split=")

    def _rows(self, split):  # (the source, the numbers of this split's rows)
        path = split == "eval" and self.eval_path or self.path
        part = split == "eval" and self.eval_split or self.train_split
        rows = Rows(path, part, self.max_pixels, images=self.images, question=self.question, answer=self.answer)
        return rows, rows.parts["all" if self.eval_path or self.eval_split else split]

    def sample(self, rng, split=None):
        """An `Example` drawn with `rng`, a numpy Generator, from one split or either."""
        return self.example_at(rng.integers(2**31), split or str(rng.choice([x for x in env.SPLITS if self.size(x)])))

    def example_at(self, index, split="train"):
        """The index-th row of a split, round and round; the next one where its pictures turn out to be damaged."""
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0 or split not in env.SPLITS:
            raise ValueError(f"index={index!r}, split={split!r}: expected an integer >= 0 and one of {env.SPLITS}")
        rows, numbers = self._rows(split)
        for i in range(len(numbers)):
            if (row := numbers[(index + i) % len(numbers)]) not in rows.skipped:
                try:
                    question, answer, images = rows.read(rows.table[row])
                    return env.Example(images[0] if images else None, question, f"{split}/{row}", images, answer)
                except ValueError as error:
                    rows.skipped[row] = str(error)
                    warnings.warn(f"{self.path}: row {row} skipped, {len(rows.skipped)} so far: {error}", stacklevel=2)
        raise ValueError(f"{self.path}: the {split!r} split has no rows; name others with eval_path= or eval_split=")

    def cut(self, text):
        """As `env.cut`; in the style "boxed" an answer ends nothing, only `END` does."""
        before, end, _ = text.partition(env.END)
        return env.cut(text) if self.style == "tags" else (before + end, "end" if end else "")

    def grade(self, example, response):
        """1.0 if the answer given is the `same` as the true one, else 0.0."""
        return float((given := self.read(response)) is not None and same(given, example.answer))

    def demonstrate(self, example, rng, error_rate=0.0):
        """ValueError: the true steps are unknown."""
        raise ValueError("a data set has no demonstrations: begin with a model that can answer, without a warm start")

class Pictures(gym.Space):
    """A tuple of RGB pictures, (H, W, 3) uint8 arrays of any size; a vector environment gives one such tuple each."""
    __eq__ = lambda self, other: isinstance(other, Pictures)
    sample = lambda self, mask=None, probability=None: (self.np_random.integers(0, 256, (16, 16, 3), np.uint8),)
    contains = lambda self, x: isinstance(x, tuple) and all(
        isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.shape[2:] == (3,) for one in x)

class DatasetEnv(env.SegmentEnv):
    """A `SegmentEnv` of a `DatasetTask`, whose keywords it takes too; in its observations "images", a tuple of arrays,
    replaces "image". In the style "boxed" only `END` ends a response: one that is cut off before earns nothing."""

    def __init__(self, path, max_segments=4096, max_chars=16384, format_reward=0.0, render_mode=None, **columns):
        super().__init__(DatasetTask(path, **columns), max_segments, max_chars, format_reward, render_mode)
        self.observation_space.spaces |= {"images": Pictures(), "prompt": env.AnyText(MAX_PROMPT)}

    def _report(self):
        if not self.segments:  # a reset
            self.example_id, self._images = self.example.key, tuple(np.asarray(one) for one in self.example.content)
            if self._images and self.render_mode:  # for a terminal; at 48 a line would be thinner than a pixel
                self._pixels = np.asarray(ImageOps.pad(self.example.image, (320, 320)).resize((48, 48)))
        observation, info = super()._report()
        return {**observation, "images": tuple(one.copy() for one in self._images)}, info
