"""The task: Gymnasium environments in which one action is one segment of reasoning, and one episode one response.

Every `step` takes the next piece of the response, as text; the reward comes once, when the first `<answer>...</answer>`
closes. The cut is the agent's business: the same text earns the same, and ends the same, under every cut into pieces.

    DiceSum    Sum the dice.     <see>3526</see><think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>
    ArrowPath  Follow 2 arrows.  <see>B2</see><think>RC2;DC3</think><answer>C3</answer>
    TextSum    Add 3 5 2 6.      <think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>

Every read, addition, move and answer is one *step*, and `Task.check_steps` says which are right given what the response
itself wrote before. So the slip that spoilt a response is known, and credit assignment can be measured, not guessed.

    import gymnasium as gym, env                                # importing registers SAPO/DiceSum-v0 and the others
    episode = gym.make("SAPO/DiceSum-v0", n=9, render_mode="ansi")
    observation, info = episode.reset(seed=0)                   # or options={"index": 7, "split": "eval"}
    observation, reward, terminated, truncated, info = episode.step("<see>352614263</see>")

`SyncVectorEnv` works; `AsyncVectorEnv` needs `shared_memory=False`, or Gymnasium corrupts the texts (shared memory pads
them, and knows a fixed alphabet only). TextSum has no "image" in its observations: it is the text-only branch. Left out
on purpose: partial credit, which would give away what SAPO has to find out, and torch.
"""
import functools
import math
import re
import string
import zlib
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont

END = "<end>"  # the end-of-response mark
TAGS = ("<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>")
SPLITS = ("train", "eval")
CELL = 16  # pixels: the tiny vision model has one image token per 16 x 16 block, so one per die or arrow
MOVES = {"R": (1, 0), "D": (0, 1), "L": (-1, 0), "U": (0, -1)}  # (columns, rows), row 1 at the top
_SEE, _THINK, _ITEM = re.compile("<see>([^<]*)"), re.compile("<think>([^<]*)"), re.compile("[^;]+")
_FORM = re.compile("(<see>[^<]+</see>)?<think>[^<]*</think><answer>[^<]+</answer>")
_NUMBER = re.compile("[0-9]{1,12}")  # bounded: int() raises beyond 4300 digits
_RESULT = re.compile(r"(?:(?<![0-9])[0-9]{1,12}|[A-I][1-9])\Z")  # what a move ends in: a sum or a cell


# ------------------------------------------------------------------------------------- where a response ends
def cut(text):
    """`(response, reason)`: the text up to and with its first end. Reason "answer": an `<answer>` was closed; "end":
    `END` came first; "": it goes on."""
    opened, end = text.find("<answer>"), text.find(END)
    closed = text.find("</answer>", opened) if opened >= 0 else -1
    if closed >= 0 and not 0 <= end < closed:
        return text[:closed + len("</answer>")], "answer"
    return (text[:end + len(END)], "end") if end >= 0 else (text, "")


def read_answer(text):
    """The content of the one answer, ASCII blanks stripped. None unless there is exactly one `<answer>`, closed exactly
    once, before any `END`, and not inside a `<see>` or `<think>` that is still open."""
    response, reason = cut(text)
    if reason != "answer" or text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, _, rest = response.partition("<answer>")
    if any(before.rfind(f"<{block}>") > before.rfind(f"</{block}>") for block in ("see", "think")):
        return None
    return rest[:-len("</answer>")].strip(" \t\r\n")


# ----------------------------------------------------------------------------------------------- the tasks
@dataclass(frozen=True)
class Example:
    """A picture (or None), its question, the true answer and steps; `content` is what was drawn at random (numbers; or
    arrows and start), `key` identifies it and decides the split."""
    image: Image.Image | None
    question: str
    answer: str
    steps: tuple[str, ...]
    key: str
    content: tuple


class Task:
    """A chain of small decisions: reads off the picture, moves, each from the result of the last, and the answer.

    A subclass draws the content, presents it, and says what is true of it (`_known`), which move is right (`_move`)
    and what may be taken for a right step (`_slips`). True steps, demonstrations and checks all follow from these."""
    side = 0       # cells along the picture's edge; 0: no picture
    read_size = 0  # characters of one read inside <see>; 0: nothing to read, the question says what is known
    image_shape = property(lambda self: (self.side * CELL, self.side * CELL, 3) if self.side else None)  # (H, W, 3)

    def __post_init__(self):
        _check_integers(**{name: (getattr(self, name), *bounds) for name, bounds in self.ranges.items()})

    def split_of(self, key):
        """"train" or "eval" (1 in 5), decided by the content: the splits never share an example."""
        return SPLITS[zlib.crc32(key.encode()) % 5 == 0]

    def sample(self, rng, split=None):
        """An `Example` drawn with `rng`, a numpy Generator, from one split or either. ValueError if there is none."""
        for _ in range(4000):
            content = self._draw(rng)
            if split is None or self.split_of(repr(content)) == split:
                reads, moves, answer = self._write(content, lambda right, last: right)
                return Example(*self._present(content, rng), answer, (*reads, *moves, answer), repr(content), content)
        raise ValueError(f"{self} is too small: none of its few possible examples falls into the {split!r} split")

    def example_at(self, index, split="train"):
        """The index-th example of a split: a pure function of the settings, the split and the index."""
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0 or split not in SPLITS:
            raise ValueError(f"index={index!r}, split={split!r}: expected an integer >= 0 and one of {SPLITS}")
        return self.sample(np.random.default_rng((zlib.crc32(repr(self).encode()), SPLITS.index(split), index)), split)

    def _write(self, content, pick):
        known, moves = self._known(content), []
        if self.read_size:
            known = [pick(right, None) for right in known]
        last = known[0]
        for i in range(self.moves):
            moves.append(pick(self._move(content, known, i, last), last))
            last = _RESULT.search(moves[-1])[0]
        return known if self.read_size else [], moves, pick(last, last)

    def demonstrate(self, example, rng, error_rate=0.0):
        """A canonical response whose every step is wrong with probability `error_rate`, with a plausible wrong value,
        and then carried on consistently."""
        def pick(right, last):
            slips = self._slips(right, last) if rng.random() < error_rate else [right]
            return slips[int(rng.random() * len(slips))]

        reads, moves, answer = self._write(example.content, pick)
        see = f"<see>{''.join(reads)}</see>" if self.read_size else ""
        return f"{see}<think>{';'.join(moves)}</think><answer>{answer}</answer>"

    def _parse(self, response):
        # (reads, moves, answers): spans of the complete steps, left to right, so that a longer response only adds some
        response, reason = cut(response)
        opened, size, reads, moves = response.find("<answer>"), self.read_size, [], []
        limit = opened if opened >= 0 else len(response)
        think = _THINK.search(response, 0, limit)
        see = _SEE.search(response, 0, think.start() if think else limit) if size else None
        if see:
            start, end = see.span(1)
            stop = end if end < len(response) else end - size + 1
            reads = [(at, min(at + size, end)) for at in range(start, stop, size)]
        if think:  # an item at the very end may still grow, "3+5=1" to "3+5=10": not complete
            moves = [item.span() for item in _ITEM.finditer(response, *think.span(1)) if item.end() < len(response)]
        return reads, moves, [(opened + len("<answer>"), len(response) - len("</answer>"))] * (reason == "answer")

    def step_spans(self, response):
        """(start, end) in characters of every complete step in a response, any string."""
        return [span for spans in self._parse(response) for span in spans]

    def check_steps(self, example, response):
        """One bool per step of `step_spans`: is it right *given what the response wrote before*? After a slip, the
        consistent continuation is right. The answer is right if it repeats the last result of a finished chain.
        All right, the answer among them, means reward 1; not the reverse, as two slips can cancel."""
        reads, moves, answers = ([response[a:b] for a, b in spans] for spans in self._parse(response))
        true = self._known(example.content)
        known = reads if self.read_size else true
        right = [i < len(true) and read == true[i] for i, read in enumerate(reads)]
        last = known[0] if known else ""
        for i, move in enumerate(moves):
            right.append(i < self.moves and move == self._move(example.content, known, i, last))
            result = _RESULT.search(move)
            last = result[0] if result else last
        done = len(known) == len(true) and len(moves) == self.moves
        return right + [done and read_answer(cut(response)[0]) == last for _ in answers]

    def grade(self, example, response):
        """1.0 if `read_answer` equals the true answer, character by character ("016" is not "16"), else 0.0."""
        return float(read_answer(response) == example.answer)

    def well_formed(self, response):
        """Whether the response is its blocks in order and nothing else: what the format term pays for."""
        form = _FORM.fullmatch(response)
        return form is not None and bool(form[1]) == bool(self.read_size)


@dataclass(frozen=True)
class TextSum(Task):
    """n numbers from 1 to `largest`, given in the question; add them up one by one."""
    n: int = 4
    largest: int = 9
    ranges = {"n": (1, 64), "largest": (2, 999)}
    moves = property(lambda self: self.n - 1)

    def _draw(self, rng):
        return tuple(rng.integers(1, self.largest + 1, self.n).tolist())

    def _present(self, content, rng):
        return None, f"Add {' '.join(self._known(content))}."

    def _known(self, content):
        return [str(number) for number in content]

    def _move(self, content, known, i, last):
        if i + 1 < len(known) and _NUMBER.fullmatch(last) and _NUMBER.fullmatch(known[i + 1]):
            return f"{last}+{known[i + 1]}={int(last) + int(known[i + 1])}"

    def _slips(self, right, last):
        terms, equals, total = right.rpartition("=")
        return [f"{terms}{equals}{int(total) + off}" for off in (-3, -2, -1, 1, 2, 3) if int(total) + off >= 0]


@dataclass(frozen=True)
class DiceSum(TextSum):
    """n dice in a square of cells, none above `largest`; read the pips row by row, then add them up one by one."""
    largest: int = 6
    read_size, ranges = 1, {"n": (1, 25), "largest": (2, 6)}
    side = property(lambda self: math.isqrt(self.n - 1) + 1)  # ceil(sqrt(n))

    def _present(self, content, rng):
        return _picture([_DICE[face] for face in content], self.side, (58, 104, 96), rng), "Sum the dice."

    def _slips(self, right, last):
        return super()._slips(right, last) if last else [face for face in "123456" if face != right]


@dataclass(frozen=True)
class ArrowPath(Task):
    """A grid of arrows: from the golden cell follow `length` of them; one slip ruins the rest. Cells are named by column
    letter and row digit, A1 at the top left; a move is the arrow read and the cell reached, "RC2"."""
    length: int = 8
    grid: int = 4
    read_size, ranges = 2, {"length": (1, 256), "grid": (2, 9)}
    moves, side = property(lambda self: self.length), property(lambda self: self.grid)

    @functools.cached_property
    def roads(self):
        """{cell: {arrow: the cell it leads to}}, without the arrows that would leave the grid."""
        cells = {(x, y): f"{chr(65 + x)}{y + 1}" for y in range(self.grid) for x in range(self.grid)}
        return {cell: {arrow: cells[x + dx, y + dy] for arrow, (dx, dy) in MOVES.items() if (x + dx, y + dy) in cells}
                for (x, y), cell in cells.items()}

    def _draw(self, rng):
        # Random arrows alone soon end in a two-cell ping-pong, so a walk through fresh cells is laid first (of a few
        # tries). The arrows beside it are random too, or a glance at the field would give the path away.
        arrows, wanted, walk = {}, min(self.length, self.grid**2 - 1), {}
        for cell, draw in zip(self.roads, rng.random(self.grid**2).tolist(), strict=True):
            arrows[cell] = list(self.roads[cell])[int(draw * len(self.roads[cell]))]
        for _ in range(8):
            if len(walk) < wanted:
                start = cell = list(self.roads)[rng.integers(self.grid**2)]
                walk = {}
            while len(walk) < wanted and (fresh := [a for a, to in self.roads[cell].items() if to not in walk]):
                walk[cell] = fresh[int(rng.random() * len(fresh))]
                cell = self.roads[cell][walk[cell]]
        return "".join((arrows | walk).values()), start

    def _present(self, content, rng):
        arrows, start = content
        glyphs = [(_GOLDEN if cell == start else _ARROWS)[arrow] for cell, arrow in zip(self.roads, arrows, strict=True)]
        return _picture(glyphs, self.grid, (66, 78, 104), rng), f"Follow {self.length} arrows."

    def _known(self, content):
        return [content[1]]

    def _move(self, content, known, i, last):
        if last in self.roads:
            arrow = content[0][list(self.roads).index(last)]
            return arrow + self.roads[last][arrow]

    def _slips(self, right, last):
        if len(right) == 3:
            return [arrow + cell for arrow, cell in self.roads[last].items() if arrow != right[0]]
        return [cell for cell in self.roads if cell != right]


TASKS = {task.__name__: task for task in (DiceSum, ArrowPath, TextSum)}


def _check_integers(**settings):
    for name, (value, low, high) in settings.items():
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name}={value!r} is not valid; expected an integer from {low} to {high}")


# ---------------------------------------------------------------------------------------------- the pictures
def _glyph(tile, *boxes):  # one cell of colour numbers: 0 the ground, 1 a tile, 2 ink, 3 a golden tile
    glyph = Image.new("P", (CELL, CELL))
    ImageDraw.Draw(glyph).rounded_rectangle((1, 1, 14, 14), 2, tile)
    for box in boxes:
        ImageDraw.Draw(glyph).rectangle(box, 2)
    return glyph


def _arrows(tile):  # a shaft and a head of ever shorter columns: exactly symmetric, and so are its three turns
    right = _glyph(tile, (3, 6, 7, 9), *((8 + k, 3 + k, 8 + k, 12 - k) for k in range(5)))
    return {arrow: right.rotate(angle) for arrow, angle in (("R", 0), ("U", 90), ("L", 180), ("D", 270))}


_SPOTS = [(x, y, x + 1, y + 1) for y in (3, 7, 11) for x in (3, 7, 11)]  # where a die may have a pip, row by row
_DICE = {face: _glyph(1, *(_SPOTS[int(spot)] for spot in spots))
         for face, spots in enumerate(("4", "08", "048", "0268", "02468", "023568"), start=1)}
_ARROWS, _GOLDEN = _arrows(1), _arrows(3)
# For rendering, light and strong Okabe-Ito colours, which all eyes tell apart: segments tinted in turn, steps underlined.
_TINTS, _GREY = ((186, 220, 244), (255, 222, 158), (184, 230, 208), (240, 204, 226)), (226, 226, 226)
_INK, _RIGHT, _WRONG = (24, 24, 32), (0, 114, 178), (213, 94, 0)


def _picture(glyphs, side, ground, rng):
    """side x side cells, filled row by row; the colours vary a little from example to example."""
    picture = Image.new("P", (side * CELL, side * CELL))
    for i, glyph in enumerate(glyphs):
        picture.paste(glyph, (i % side * CELL, i // side * CELL))
    colours = np.array([ground, (232, 228, 218), (34, 32, 46), (242, 172, 40)]) + rng.integers(-12, 13, (4, 3))
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return picture.convert("RGB")


# ------------------------------------------------------------------------------------------- the environment
class AnyText(gym.spaces.Text):
    """Any string of at most `max_length` characters. Gymnasium's own `Text` rejects most of Unicode, and "" too."""

    def __init__(self, max_length):
        super().__init__(max_length, min_length=0, charset=string.printable)

    def contains(self, x):
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask=None, probability=None):  # short: a whole response's worth would truncate the episode at once
        return super().sample(mask, probability)[:self.np_random.integers(17)]


class SegmentEnv(gym.Env):
    """One response, written segment by segment. `task`, `example`, `response` and `segments` may be read at any time.

    task           a `Task`, or the name of one ("DiceSum") with its settings as further keywords (n=9)
    max_segments   actions until the episode is truncated: generous, as one token per action is a legal cut too
    max_chars      characters until the episode is truncated
    format_reward  paid at the end, beside the answer's 1, if the response has exactly the form of its task"""
    metadata = {"render_modes": ["ansi", "rgb_array", "human"], "render_fps": 2}

    def __init__(self, task="DiceSum", max_segments=512, max_chars=2048, format_reward=0.0, render_mode=None, **kwargs):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} is unknown; expected one of {self.metadata['render_modes']}")
        if not isinstance(task, Task) and task not in TASKS:
            raise ValueError(f"task={task!r} is unknown; expected one of {tuple(TASKS)} or a Task")
        _check_integers(max_segments=(max_segments, 1, 10**6), max_chars=(max_chars, 1, 10**6))
        self.task = TASKS[task](**kwargs) if isinstance(task, str) else task
        self.max_segments, self.max_chars, self.format_reward = max_segments, max_chars, float(format_reward)
        self.render_mode, self.end_reason = render_mode, "not reset"
        spaces = {"image": gym.spaces.Box(0, 255, self.task.image_shape, np.uint8)} if self.task.side else {}
        spaces |= {"prompt": AnyText(512), "response": AnyText(max_chars)}
        self.observation_space = gym.spaces.Dict({**spaces, "segment_index": gym.spaces.Discrete(max_segments + 1)})
        self.action_space = AnyText(max_chars)

    def reset(self, *, seed=None, options=None):
        """options: "index" (the i-th example of the split; by default drawn from `np_random`), "split" ("train" or
        "eval"), "response" (an unfinished response to go on from). Anything else is a ValueError."""
        super().reset(seed=seed)
        chosen = {"index": int(self.np_random.integers(2**31)), "split": "train", "response": ""}
        if not isinstance(options, dict | None) or set(options or ()) - set(chosen):
            raise ValueError(f"options={options!r} is not valid; expected a dict with some of {tuple(chosen)} as keys")
        index, split, prefix = (chosen | (options or {})).values()
        if not isinstance(prefix, str) or len(prefix) >= self.max_chars or cut(prefix)[1]:
            raise ValueError(f"response={prefix!r:.200} is not valid; expected an unfinished response: a str shorter "
                             f"than max_chars={self.max_chars}, without a closed <answer> or {END}")
        self.example, self.example_id = self.task.example_at(index, split), f"{split}/{index}"
        self.prefix, self.response, self.segments, self.end_reason = prefix, prefix, [], ""
        self.reward_terms = {"answer": 0.0, "format": 0.0}
        self._pixels = np.asarray(self.example.image) if self.task.side else None  # (H, W, 3)
        return self._report()

    def step(self, action):
        """Append a segment, any string. Returns Gymnasium's five values; the reward is 0 until the end."""
        if not isinstance(action, str):
            raise TypeError(f"an action is a str, the next segment of the response; got {type(action).__name__}")
        if self.end_reason:
            raise gym.error.ResetNeeded(f"step() after the episode's end ({self.end_reason}); call reset() first")
        before = len(self.response)
        self.response, self.end_reason = cut((self.response + action)[:self.max_chars])
        self.segments.append(self.response[before:])
        terminated = bool(self.end_reason)
        if terminated:
            self.reward_terms = {"answer": self.task.grade(self.example, self.response),
                                 "format": self.format_reward * self.task.well_formed(self.response)}
        elif len(self.response) == self.max_chars:
            self.end_reason = "max_chars"
        elif len(self.segments) == self.max_segments:
            self.end_reason = "max_segments"
        observation, info = self._report()
        return observation, sum(self.reward_terms.values()), terminated, not terminated and bool(self.end_reason), info

    def _report(self):
        index, response = len(self.segments), self.response
        observation = {"prompt": self.example.question, "response": response, "segment_index": index}
        if self.task.side:
            observation["image"] = self._pixels.copy()  # (H, W, 3), a copy: who writes on it spoils only his own
        info = {"example_id": self.example_id, "answer": self.example.answer, "predicted": read_answer(response),
                "correct": self.reward_terms["answer"] == 1, "segment_index": index,
                "segment_text": self.segments[-1] if self.segments else "", "reward_terms": dict(self.reward_terms),
                "end_reason": self.end_reason, "steps_correct": self.task.check_steps(self.example, response)}
        if self.render_mode == "human":
            self.render()
        return observation, info

    def render(self):
        """A string ("ansi"), an (H, W, 3) uint8 array ("rgb_array"), or None after printing ("human")."""
        if self.render_mode == "rgb_array":
            return self._frame()
        if self.render_mode == "human":
            print(self._terminal())
        return self._terminal() if self.render_mode == "ansi" else None

    def _pieces(self):  # (tint, shown characters) of the prefix and of every segment, control characters spelled out
        pieces = [(_GREY, self.prefix), *((_TINTS[i % 4], segment) for i, segment in enumerate(self.segments))]
        return [(tint, [c if c.isprintable() else repr(c)[1:-1] for c in text]) for tint, text in pieces if text]

    def _verdict(self):
        right = self.task.check_steps(self.example, self.response)
        end = f"ended by {self.end_reason}, true answer {self.example.answer}" if self.end_reason else "not finished"
        return f"reward {sum(self.reward_terms.values()):g}   |   {sum(right)} of {len(right)} steps right   |   {end}"

    def _terminal(self):
        rows, colour = self._pixels if self.task.side else [], "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580"
        lines = ["".join(colour.format(*top, *bottom) for top, bottom in zip(*pair, strict=True)) + "\x1b[0m"
                 for pair in zip(rows[::2], rows[1::2], strict=True)]  # an upper half block is two pixels
        text = "|".join(f"\x1b[30;48;2;{r};{g};{b}m{''.join(shown)}\x1b[0m" for (r, g, b), shown in self._pieces())
        return "\n".join([*lines, self.example.question, text, self._verdict()])

    def _frame(self):
        canvas = Image.new("RGB", (960, 384), (252, 252, 250))
        draw, font, left = ImageDraw.Draw(canvas), ImageFont.load_default(21), 32
        if self.task.side:
            canvas.paste(self.example.image.resize((320, 320), Image.Resampling.NEAREST), (32, 32))
            left = 384
        draw.text((left, 32), self.example.question, _INK, font)
        steps = zip(self.task.step_spans(self.response), self.task.check_steps(self.example, self.response), strict=True)
        marks = {at: _RIGHT if right else _WRONG for span, right in steps for at in range(*span)}
        x, y, placed = left, 80, []
        for tint, shown in self._pieces():
            for glyph in shown:
                width = draw.textlength(glyph, font)
                x, y = (left, y + 38) if x + width > 928 else (x, y)
                placed.append((x, y, x + width, glyph, tint, marks.get(len(placed), tint)))
                x += width
            x += 4
        scroll = max(0, y - 270)  # of a long response the latest lines are shown
        for x, y, end, glyph, tint, mark in placed:
            if y - scroll >= 80:
                draw.rectangle((x, y - scroll, end, y - scroll + 26), tint)
                draw.rectangle((x, y - scroll + 27, end, y - scroll + 30), mark)
                draw.text((x, y - scroll), glyph, _INK, font)
        draw.text((left, 330), self._verdict(), _INK, ImageFont.load_default(16))
        return np.asarray(canvas)  # (H, W, 3)


for _name in TASKS:
    if f"SAPO/{_name}-v0" not in gym.registry:
        gym.register(f"SAPO/{_name}-v0", f"{__name__}:SegmentEnv", kwargs={"task": _name})
