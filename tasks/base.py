"""What all tasks share: where a response ends, what it answers, and which of its steps are right.

A task has two halves. It *makes examples* from random numbers: a picture or none, a question, the
true answer. And it *reads responses*, any string at all: it finds the complete steps in it and
checks each against what the response said before. `Task.demonstrate` joins the halves: it writes a
response, with as many slips as asked for.
"""

import itertools
import re
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

END = "<end>"  # the end-of-response mark
TAGS = ("<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>")
SPLITS = ("train", "eval")

# Pixels along a cell's edge. The tiny vision model has one image token per 16 x 16 block, so it has
# one per die or arrow.
CELL = 16

# Words that decide nothing, for `verbosity`; they are repeated as often as needed.
FILLER = "so now we look at what stands there and go on with the next one"

# A task whose first so many draws all miss the split asked for is taken to have no example there.
MAX_DRAWS = 4000


# ---------------------------------------------------------------------- where a response ends


def until_end(text):
    """The part of a text that counts, and why it ends there: `(response, reason)`.

    The response is the text up to and with its first end. The reason is "answer" if an `<answer>`
    was closed, "end" if `END` came first, and "" if there is no end yet: then the response is the
    whole text.
    """
    opened = text.find("<answer>")
    closed = text.find("</answer>", opened) if opened >= 0 else -1
    end = text.find(END)
    if closed >= 0 and (end < 0 or end > closed):
        return text[: closed + len("</answer>")], "answer"
    if end >= 0:
        return text[: end + len(END)], "end"
    return text, ""


def read_answer(text):
    """The content of the one answer in a text, without the ASCII blanks around it, or None.

    None unless there is exactly one `<answer>`, closed exactly once, before any `END`, and not
    inside a `<see>` or `<think>` that is still open. So whoever writes several answers, or buries
    one in a thought, has given none. (An environment ends a response at its first closed answer,
    and grades what it took: there nobody comes to write a second.)
    """
    response, reason = until_end(text)
    if reason != "answer" or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    reasoning, _, answer = response.partition("<answer>")
    if _is_open(reasoning, "see") or _is_open(reasoning, "think"):
        return None
    return answer.removesuffix("</answer>").strip(" \t\r\n")


def _is_open(text, block):
    return text.rfind(f"<{block}>") > text.rfind(f"</{block}>")


# ------------------------------------------------------------------------ examples and splits


@dataclass(frozen=True)
class Example:
    """One question, with all that is known about it."""

    image: Image.Image | None
    """the picture, or None where the question says all"""
    question: str
    """what the model is asked, in words"""
    key: str
    """identifies the example"""
    content: tuple
    """what was drawn at random; its first item is the tuple of true reads, or of numbers to add"""
    answer: str = ""
    """the true answer"""
    steps: tuple[str, ...] = ()
    """the true steps: reads, moves and, last, the answer"""


def split_of(key):
    """The split of an example with this key: "eval" for 1 in 5, else "train".

    The key alone decides, so the two splits never share an example. It is hashed by a checksum, as
    Python's own `hash` differs from process to process.
    """
    is_held_out = zlib.crc32(key.encode()) % 5 == 0
    return "eval" if is_held_out else "train"


def check_index(index, split):
    """ValueError unless the index is an integer >= 0, Python's or numpy's, and the split exists."""
    is_integer = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
    if not is_integer or index < 0 or split not in SPLITS:
        raise ValueError(
            f"index={index!r}, split={split!r}: expected an integer >= 0 and one of {SPLITS}"
        )


# ----------------------------------------------------------------------------------- settings


def check_integers(settings, ranges):
    """ValueError unless each setting is an integer within its range.

    settings: an object that has them as attributes; ranges: {name: (lowest, highest value)}.
    """
    for name, (lowest, highest) in ranges.items():
        value = getattr(settings, name)
        if type(value) is not int or not lowest <= value <= highest:  # True is an int, too
            raise ValueError(
                f"{name}={value!r} is not valid; expected an integer {lowest} to {highest}"
            )


def check_share(name, share):
    """ValueError, naming it, unless it is a number from 0 to 1."""
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not 0 <= share <= 1:  # NaN, too, is refused
        raise ValueError(f"{name}={share!r} is not valid; expected a share from 0 to 1")


# ------------------------------------------------------------------------ the steps in a text

_SEE = re.compile("<see>([^<]*)")
_THINK = re.compile("<think>([^<]*)")

# One item of <think>: words that do not count, then the move itself.
_MOVE = re.compile("(?:[a-z]+ )*([^;]+)")

# What a move ends in: a number or a cell. At most 12 digits, as int() raises beyond 4300.
_RESULT = re.compile(r"(?:(?<![0-9])[0-9]{1,12}|[A-I][1-9])\Z")


def _read_spans(response, limit, size):
    """(start, end) of every read, `size` characters each, in the first `<see>` before `limit`."""
    see = _SEE.search(response, 0, limit)
    if not see:
        return []
    start, end = see.span(1)
    # If something follows the block, all of it counts, and a last read that is too short is a wrong
    # one. At the very end of a response the missing characters may still come.
    may_grow = end == len(response)
    stop = end - size + 1 if may_grow else end
    return [(at, min(at + size, end)) for at in range(start, stop, size)]


def _move_spans(response, think):
    """(start, end) of every complete move in a `<think>`, given as a match of _THINK."""
    items = _MOVE.finditer(response, *think.span(1))
    # An item at the very end of a response may still grow, "3+5=1" to "3+5=10".
    return [item.span(1) for item in items if item.end() < len(response)]


def _result_of(move, default):
    """The number or cell that a move ends in, from which the next move starts; else `default`."""
    result = _RESULT.search(move)
    return result[0] if result else default


# ----------------------------------------------------------------------------------- the task


class Task:
    """A chain of small decisions: reads off the picture, moves, and the answer.

    A subclass is a frozen dataclass of settings, each with its range in `ranges`. It draws the
    content (`_draw`), presents it (`_present`), and says which move is right (`_move`) and what may
    be mistaken for a right step (`_slips`). True steps, demonstrations and checks all follow from
    these. Its repr seeds the examples: a setting that must not change them is a field with
    repr=False.
    """

    ranges = {}
    """{setting: (lowest, highest value)}"""
    needs = {}
    """{setting without a default: what to give}"""
    side = 0
    """cells along the picture's edge; 0: no picture"""
    read_size = 0
    """characters of one read inside <see>; 0: nothing to read, the question says what is known"""
    move_count = 0
    """moves from the first read to the answer"""
    verbosity = 0
    """words that decide nothing, before each move of a demonstration"""
    habits = 0.0
    """how often a demonstration follows a bad habit where there is one (`_habit`): 0 to 1"""
    system = ""
    """what a model is to be told before anything else; "": nothing"""
    stop = "</answer>"
    """what ends a response: writing on behind it earns nothing; None: only END does"""
    replies = False
    """whether the world replies, so that an episode may have more than one turn"""
    max_prompt = 512
    """characters of the longest question"""
    tags = TAGS
    """what the tiny model has one token for, besides characters"""

    def __post_init__(self):
        check_integers(self, self.ranges)
        check_share("habits", self.habits)

    @property
    def room(self):
        """How many characters a response may have: twice what a demonstration takes, and 2048 at
        least."""
        text = self.demonstrate(self.example_at(0), np.random.default_rng(0))
        return max(2048, 2 * len(text))

    # ---- what a subclass gives

    def _draw(self, rng):
        """A content, drawn with the numpy Generator `rng`: see `Example.content`."""
        raise NotImplementedError

    def _present(self, content, rng):
        """(image or None, question); `rng` may vary what decides nothing, such as colours."""
        raise NotImplementedError

    def _move(self, content, known, i, result):
        """The right i-th move, counted from 0, or None where no move can be right.

        known: the reads of the response, right or wrong, or the numbers in the question.
        result: what the last move ended in; before the first move, the first of `known`.
        """
        raise NotImplementedError

    def _slips(self, right, result):
        """The plausible wrong values of a step whose right value is `right`.

        result: for a move as in `_move`, for a read None, for the answer equal to `right`.
        """
        raise NotImplementedError

    def _habit(self, right, result):
        """The wrong value that the teacher's bad habit puts in place of `right`, or None where no
        habit applies. `result` as in `_slips`."""
        return None

    # ---- making examples

    def size(self, split):
        """The number of examples in a split, or None: there is no end to them."""
        return None

    def sample(self, rng, split=None):
        """An `Example` drawn with `rng`, a numpy Generator, from one split or either.

        ValueError if the split seems to have none.
        """
        for _ in range(MAX_DRAWS):
            content = self._draw(rng)
            key = repr(content)
            if split is None or split == split_of(key):
                image, question = self._present(content, rng)
                return self._with_true_steps(Example(image, question, key, content), rng)
        raise ValueError(
            f"{self} is too small: none of its few possible examples falls into the {split!r} split"
        )

    def _with_true_steps(self, example, rng):
        text = self._written_out(example, rng)
        steps = tuple(text[start:end] for start, end in self.step_spans(text))
        return replace(example, answer=steps[-1], steps=steps)

    def example_at(self, index, split="train"):
        """The index-th example of a split: a pure function of the settings, split and index."""
        check_index(index, split)
        seed = (zlib.crc32(repr(self).encode()), SPLITS.index(split), index)
        return self.sample(np.random.default_rng(seed), split)

    # ---- writing responses

    @property
    def form(self):
        """A regular expression: the blocks of a response in order, and nothing else."""
        see = "<see>[^<]+</see>" if self.read_size else ""
        return f"{see}<think>[^<]*</think><answer>[^<]+</answer>"

    @property
    def filler(self):
        """The words before every move: `verbosity` of them, each with a blank behind it."""
        words = itertools.islice(itertools.cycle(FILLER.split()), self.verbosity)
        return "".join(f"{word} " for word in words)

    def demonstrate(self, example, rng, error_rate=0.0):
        """A canonical response, as a fallible teacher writes it.

        Each step is wrong with probability `error_rate` (0 to 1), with a plausible wrong value. On
        top of these slips, where a bad habit applies (`_habit`) it wins with probability
        `self.habits`. What follows a wrong step is carried on consistently from it.

        Slips are spread thinly: greedy decoding of a model that copies them makes none. A habit
        that wins more often than not is what such a model does greedily; the right way stands in
        the rest of the demonstrations, so reinforcement can find it.
        """
        return self._written_out(example, rng, error_rate, self.habits)

    def _written_out(self, example, rng, error_rate=0.0, habits=0.0):
        """A canonical response with slips and habits as often as asked for."""

        def write(right, result):
            habit = self._habit(right, result) if habits else None
            if habit is not None and rng.random() < habits:
                return habit
            # Every step takes two random numbers, so that a slip moves no later one.
            slips = rng.random() < error_rate
            choices = self._slips(right, result) if slips else [right]
            return choices[int(rng.random() * len(choices))]

        see = ""
        known = example.content[0]
        if self.read_size:
            known = [write(read, None) for read in known]
            see = f"<see>{''.join(known)}</see>"

        result = known[0]
        moves = []
        for i in range(self.move_count):
            right = self._move(example.content, known, i, result)
            moves.append(write(right, result))
            result = _result_of(moves[-1], default=result)
        answer = write(result, result)

        filler = self.filler
        think = ";".join(filler + move for move in moves)
        return f"{see}<think>{think}</think><answer>{answer}</answer>"

    # ---- reading responses

    def until_end(self, text):
        """The part of a text that counts, and why it ends there: as `until_end` above."""
        return until_end(text)

    def read_answer(self, text):
        """The answer that a text gives, or None: as `read_answer` above."""
        return read_answer(text)

    def grade(self, example, text):
        """1.0 for the true answer, character by character ("016" is not "16"), else 0.0."""
        return float(self.read_answer(text) == example.answer)

    def step_spans(self, text):
        """(start, end) in characters of every complete step in a text, any string, in order."""
        reads, moves, answers = self._parse(text)
        return reads + moves + answers

    def step_kinds(self, text):
        """What every step of `step_spans` is: "read", "move" or "answer"."""
        reads, moves, answers = self._parse(text)
        return ["read"] * len(reads) + ["move"] * len(moves) + ["answer"] * len(answers)

    def _parse(self, text):
        """The spans of the complete steps in a text: `(reads, moves, answers)`.

        A longer text only adds to them: what is a step stays one, whatever follows.
        """
        response, reason = until_end(text)
        reasoning, _, _ = response.partition("<answer>")
        think = _THINK.search(response, 0, len(reasoning))
        reads, moves, answers = [], [], []
        if self.read_size:  # only before thinking: what is seen later cannot have been used
            limit = think.start() if think else len(reasoning)
            reads = _read_spans(response, limit, self.read_size)
        if think:
            moves = _move_spans(response, think)
        if reason == "answer":
            start = len(reasoning) + len("<answer>")
            answers.append((start, len(response) - len("</answer>")))
        return reads, moves, answers

    def checked(self, example, turns):
        """[((start, end) in characters, is it right?), ...] of every complete step in a response.

        turns: what was written between replies; here there are none, so it is one text.
        """
        text = "".join(turns)
        return list(zip(self.step_spans(text), self.check_steps(example, text), strict=True))

    def check_steps(self, example, text):
        """One bool per step of `step_spans`: is it right *given what the response said before*?

        After a slip, the consistent continuation is right. The answer is right if it repeats the
        last result of a finished chain. All right, the answer among them, means reward 1; not the
        reverse, as two slips can cancel.
        """
        steps = self._steps_with_right(example, text)
        return [right is not None and written == right for written, right, _ in steps]

    def hard_steps(self, example, text):
        """One bool per step of `step_spans`: would the teacher's bad habit change the right step?

        Whether `habits` is set or not, and whatever the response has written there. False where
        nothing can be right.
        """
        steps = self._steps_with_right(example, text)
        return [
            right is not None and self._habit(right, result) is not None
            for _, right, result in steps
        ]

    def _steps_with_right(self, example, text):
        """(what is written, what would be right, the result before) of every step of `step_spans`.

        Right given what the response said before; None where nothing can be. The result before is
        `result` as in `_slips`: None for a read.
        """
        read_spans, move_spans, answer_spans = self._parse(text)
        reads = [text[start:end] for start, end in read_spans]
        moves = [text[start:end] for start, end in move_spans]

        true_reads = example.content[0]
        known = reads if self.read_size else true_reads
        steps = []
        for i, read in enumerate(reads):
            steps.append((read, true_reads[i] if i < len(true_reads) else None, None))

        result = known[0] if known else ""
        for i, move in enumerate(moves):
            right = None
            if i < self.move_count:
                right = self._move(example.content, known, i, result)
            steps.append((move, right, result))
            result = _result_of(move, default=result)  # also of a wrong move

        if answer_spans:
            is_finished = len(known) == len(true_reads) and len(moves) == self.move_count
            response, _ = until_end(text)  # what stands behind the end does not count
            steps.append((read_answer(response), result if is_finished else None, result))
        return steps


class StepsUnknown(Task):
    """A task whose true steps nobody knows: of its responses only the end is judged."""

    room = 16384  # what they take is not known either

    def step_spans(self, text):
        """No step is known."""
        return []

    def step_kinds(self, text):
        """No step is known."""
        return []

    def check_steps(self, example, text):
        """No step is known."""
        return []

    def hard_steps(self, example, text):
        """No step is known."""
        return []
