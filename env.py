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

Every task has a `verbosity`: so many words that decide nothing stand before each move. `AsyncVectorEnv` needs
`shared_memory=False`, or Gymnasium corrupts the texts. TextSum has no "image" in its observations: it is the text-only
branch. SAPO/Dataset-v0 has the rows of a data set: see data.py. Left out on purpose: torch, and partial credit, which
would give away what SAPO has to find out.
"""
import functools
import math
import re
import zlib
from dataclasses import dataclass, field, replace

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

END = "<end>"  # the end-of-response mark
TAGS = ("<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>")
SPLITS = ("train", "eval")
CELL = 16  # pixels: the tiny vision model has one image token per 16 x 16 block, so one per die or arrow
MOVES = {"R": (1, 0), "D": (0, 1), "L": (-1, 0), "U": (0, -1)}  # (columns, rows), row 1 at the top
FILLER = "so now we look at what stands there and go on with the next one"  # words that decide nothing: `verbosity`
_SEE, _THINK, _ITEM = re.compile("<see>([^<]*)"), re.compile("<think>([^<]*)"), re.compile("(?:[a-z]+ )*([^;]+)")
_RESULT = re.compile(r"(?:(?<![0-9])[0-9]{1,12}|[A-I][1-9])\Z")  # what a move ends in; int() raises beyond 4300 digits


# --------------------------------------------------------------------------------------- where a response ends
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
    nested = any(before.rfind(f"<{block}>") > before.rfind(f"</{block}>") for block in ("see", "think"))
    return None if nested else rest[:-len("</answer>")].strip(" \t\r\n")


# --------------------------------------------------------------------------------------------------- the tasks
@dataclass(frozen=True)
class Example:
    """A picture (or None), its question, the true answer and steps. `content` is what was drawn at random, first of all
    the tuple of true reads (or numbers to add); `key` identifies it and decides the split."""
    image: Image.Image | None
    question: str
    key: str
    content: tuple
    answer: str = ""
    steps: tuple[str, ...] = ()

class Task:
    """A chain of small decisions: reads off the picture, moves, each from the result of the last, and the answer.

    A subclass draws the content, presents it, and says which move is right (`_move`) and what may be mistaken for a
    right step (`_slips`). True steps, demonstrations and checks all follow from these."""
    side = 0       # cells along the picture's edge; 0: no picture
    read_size = 0  # characters of one read inside <see>; 0: nothing to read, the question says what is known
    cut, read, system = staticmethod(cut), staticmethod(read_answer), ""  # `system`: what a model is to be told first
    filler = property(lambda self: "".join(f"{word} " for word in (40 * FILLER.split())[:self.verbosity]))
    form = property(lambda it: "<see>[^<]+</see>" * (it.read_size > 0) + "<think>[^<]*</think><answer>[^<]+</answer>")

    def __post_init__(self):
        for name, (low, high) in self.ranges.items():
            if type(getattr(self, name)) is not int or not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid; expected an integer {low} to {high}")

    def sample(self, rng, split=None):
        """An `Example` drawn with `rng`, a numpy Generator, from one split or either. ValueError if there is none. The
        content alone decides the split, 1 in 5 being "eval": the two never share an example."""
        for _ in range(4000):
            key = repr(content := self._draw(rng))
            if split is None or split == SPLITS[zlib.crc32(key.encode()) % 5 == 0]:
                example = Example(*self._present(content, rng), key, content)
                text = self.demonstrate(example, rng)
                steps = tuple(text[start:end] for start, end in self.step_spans(text))
                return replace(example, answer=steps[-1], steps=steps)
        raise ValueError(f"{self} is too small: none of its few possible examples falls into the {split!r} split")

    def example_at(self, index, split="train"):
        """The index-th example of a split: a pure function of the settings, the split and the index."""
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0 or split not in SPLITS:
            raise ValueError(f"index={index!r}, split={split!r}: expected an integer >= 0 and one of {SPLITS}")
        return self.sample(np.random.default_rng((zlib.crc32(repr(self).encode()), SPLITS.index(split), index)), split)

    def demonstrate(self, example, rng, error_rate=0.0):
        """A canonical response whose every step is wrong with probability `error_rate`, with a plausible wrong value,
        and then carried on consistently."""
        def pick(right, last):
            slips = self._slips(right, last) if rng.random() < error_rate else [right]
            return slips[int(rng.random() * len(slips))]

        known = [pick(right, None) for right in example.content[0]] if self.read_size else example.content[0]
        last, moves = known[0], []
        for i in range(self.moves):
            moves.append(pick(self._move(example.content, known, i, last), last))
            last = _RESULT.search(moves[-1])[0]
        see = f"<see>{''.join(known)}</see>" if self.read_size else ""
        return f"{see}<think>{';'.join(self.filler + x for x in moves)}</think><answer>{pick(last, last)}</answer>"

    def _parse(self, response):
        # (reads, moves, answers): spans of the complete steps, left to right, so that a longer response only adds some
        response, reason = cut(response)
        limit, size, reads, moves = len(response.partition("<answer>")[0]), self.read_size, [], []
        think = _THINK.search(response, 0, limit)
        see = _SEE.search(response, 0, think.start() if think else limit) if size else None
        if see:
            start, end = see.span(1)
            reads = [(at, min(at + size, end)) for at in range(start, end - (end == len(response)) * (size - 1), size)]
        if think:  # an item at the very end may still grow, "3+5=1" to "3+5=10": not complete
            moves = [item.span(1) for item in _ITEM.finditer(response, *think.span(1)) if item.end() < len(response)]
        return reads, moves, [(limit + len("<answer>"), len(response) - len("</answer>"))] * (reason == "answer")

    def step_spans(self, response):
        """(start, end) in characters of every complete step in a response, any string."""
        return [span for spans in self._parse(response) for span in spans]

    def check_steps(self, example, response):
        """One bool per step of `step_spans`: is it right *given what the response wrote before*? After a slip, the
        consistent continuation is right. The answer is right if it repeats the last result of a finished chain.
        All right, the answer among them, means reward 1; not the reverse, as two slips can cancel."""
        reads, moves, answers = ([response[a:b] for a, b in spans] for spans in self._parse(response))
        true = example.content[0]
        known = reads if self.read_size else true
        right = [i < len(true) and read == true[i] for i, read in enumerate(reads)]
        last = known[0] if known else ""
        for i, move in enumerate(moves):
            right.append(i < self.moves and move == self._move(example.content, known, i, last))
            last = (_RESULT.search(move) or [last])[0]
        done = len(known) == len(true) and len(moves) == self.moves
        return right + [done and read_answer(cut(response)[0]) == last for _ in answers]

    def grade(self, example, response):
        """1.0 if `read_answer` equals the true answer, character by character ("016" is not "16"), else 0.0."""
        return float(read_answer(response) == example.answer)

@dataclass(frozen=True)
class TextSum(Task):
    """n numbers from 1 to `largest`, given in the question; add them up one by one."""
    n: int = 4
    largest: int = 9
    verbosity: int = field(default=0, repr=False)  # the examples stay the same
    ranges = {"n": (1, 64), "largest": (2, 999), "verbosity": (0, 200)}
    moves = property(lambda self: self.n - 1)

    def _draw(self, rng):
        return tuple(str(number) for number in rng.integers(1, self.largest + 1, self.n)),

    def _present(self, content, rng):
        return None, f"Add {' '.join(content[0])}."

    def _move(self, content, known, i, last):
        if i + 1 < len(known) and last.isdecimal() and known[i + 1].isdecimal():
            return f"{last}+{known[i + 1]}={int(last) + int(known[i + 1])}"

    def _slips(self, right, last):
        terms, equals, total = right.rpartition("=")
        return [f"{terms}{equals}{int(total) + off}" for off in (-3, -2, -1, 1, 2, 3) if int(total) + off >= 0]

@dataclass(frozen=True)
class DiceSum(TextSum):
    """n dice in a square of cells, none above `largest`; read the pips row by row, then add them up one by one."""
    largest: int = 6
    read_size, ranges = 1, {"n": (1, 25), "largest": (2, 6), "verbosity": (0, 200)}
    side = property(lambda self: math.isqrt(self.n - 1) + 1)  # ceil(sqrt(n))

    def _present(self, content, rng):
        return _picture([_DICE[face] for face in content[0]], self.side, (58, 104, 96), rng), "Sum the dice."

    def _slips(self, right, last):
        return super()._slips(right, last) if last else [face for face in "123456" if face != right]

@dataclass(frozen=True)
class ArrowPath(Task):
    """A grid of arrows: from the golden cell follow `length` of them; one slip ruins the rest. A cell is a column
    letter and a row digit, A1 at the top left; a move is the arrow read and the cell reached, "RC2"."""
    length: int = 8
    grid: int = 4
    verbosity: int = field(default=0, repr=False)
    read_size, ranges = 2, {"length": (1, 256), "grid": (2, 9), "verbosity": (0, 200)}
    moves, side = property(lambda self: self.length), property(lambda self: self.grid)

    @functools.cached_property
    def roads(self):
        """{cell: {arrow: the cell it leads to}}, without the arrows that would leave the grid."""
        cells = {(x, y): f"{chr(65 + x)}{y + 1}" for y in range(self.grid) for x in range(self.grid)}
        return {cell: {arrow: cells[x + dx, y + dy] for arrow, (dx, dy) in MOVES.items() if (x + dx, y + dy) in cells}
                for (x, y), cell in cells.items()}

    def _draw(self, rng):
        # Random arrows alone soon end in a two-cell ping-pong, so a walk through fresh cells is laid over them (8 tries
        # for a whole one); where it must end too early, it closes its longest loop. The other arrows stay random, or a
        # glance at the field would give the path away.
        arrows = {cell: list(roads)[int(rng.random() * len(roads))] for cell, roads in self.roads.items()}
        wanted, walk = min(self.length, self.grid**2 - 1), {}
        for _ in range(8):
            if len(walk) < wanted:
                cell, walk = list(self.roads)[rng.integers(self.grid**2)], {}
            while len(walk) < wanted and (fresh := [a for a, to in self.roads[cell].items() if to not in walk]):
                walk[cell] = fresh[int(rng.random() * len(fresh))]
                cell = self.roads[cell][walk[cell]]
        if len(walk) < self.length:
            walk[cell] = min(self.roads[cell], key=lambda arrow: list(walk).index(self.roads[cell][arrow]))
        return (next(iter(walk)),), arrows | walk

    def _present(self, content, rng):
        glyphs = [_ARROWS[arrow, cell == content[0][0]] for cell, arrow in content[1].items()]
        return _picture(glyphs, self.grid, (66, 78, 104), rng), f"Follow {self.length} arrows."

    def _move(self, content, known, i, last):
        if last in self.roads:
            return content[1][last] + self.roads[last][content[1][last]]

    def _slips(self, right, last):
        moves = [arrow + cell for arrow, cell in self.roads.get(last, {}).items()]
        return [slip for slip in (moves if right in moves else self.roads) if slip != right]


# ------------------------------------------------------------------------------------------------ the pictures
def _glyph(tile, *boxes):  # one cell of colour numbers: 0 the ground, 1 a tile, 2 ink, 3 a golden tile
    glyph = Image.new("P", (CELL, CELL))
    ImageDraw.Draw(glyph).rounded_rectangle((1, 1, 14, 14), 2, tile)
    for box in boxes:
        ImageDraw.Draw(glyph).rectangle(box, 2)
    return np.array(glyph)

_SPOTS = [(x, y, x + 1, y + 1) for y in (3, 7, 11) for x in (3, 7, 11)]  # where a die may have a pip, row by row
_DICE = {face: _glyph(1, *(_SPOTS[int(spot)] for spot in spots))
         for face, spots in zip("123456", ("4", "08", "048", "0268", "02468", "023568"), strict=True)}
_RIGHTWARD = (3, 6, 7, 9), *((8 + k, 3 + k, 8 + k, 12 - k) for k in range(5))  # a shaft, then ever shorter columns
_ARROWS = {(arrow, start): np.rot90(_glyph(3 if start else 1, *_RIGHTWARD), turns)
           for turns, arrow in enumerate("RULD") for start in (False, True)}
# For rendering, light and strong Okabe-Ito colours, which all eyes tell apart: tints of segments, underlines of steps
_TINTS, _GREY = ((186, 220, 244), (255, 222, 158), (184, 230, 208), (240, 204, 226)), (226, 226, 226)
_INK, _RIGHT, _WRONG = (24, 24, 32), (0, 114, 178), (213, 94, 0)

def _picture(glyphs, side, ground, rng):
    """side x side cells, filled row by row; the colours vary a little from example to example."""
    cells = np.zeros((side * side, CELL, CELL), np.uint8)
    cells[:len(glyphs)] = glyphs
    picture = cells.reshape(side, side, CELL, CELL).swapaxes(1, 2).reshape(side * CELL, side * CELL)
    colours = np.array([ground, (232, 228, 218), (34, 32, 46), (242, 172, 40)]) + rng.integers(-12, 13, (4, 3))
    return Image.fromarray(colours.astype(np.uint8)[picture])


# --------------------------------------------------------------------------------------------- the environment
class AnyText(gym.spaces.Text):
    """Any string of at most `max_length` characters. Gymnasium's own `Text` rejects most of Unicode, and "" too."""

    def contains(self, x):
        return isinstance(x, str) and len(x) <= self.max_length

class SegmentEnv(gym.Env):
    """One response, written segment by segment. `task`, `example`, `response` and `segments` may be read at any time.

    task                      a `Task`, or the name of one ("DiceSum") with its settings as further keywords (n=9)
    max_segments, max_chars   end it as truncated; generous, as one token per action is a legal cut too
    format_reward             paid besides, at the end, if the response is its blocks in order (`task.form`), no more"""
    metadata = {"render_modes": ["ansi", "rgb_array", "human"], "render_fps": 2}

    def __init__(self, task="DiceSum", max_segments=512, max_chars=2048, format_reward=0.0, render_mode=None, **kwargs):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} is unknown; expected one of {self.metadata['render_modes']}")
        if not isinstance(task, Task) and task not in TASKS:
            raise ValueError(f"task={task!r} is unknown; expected one of {tuple(TASKS)} or a Task")
        if min(max_segments, max_chars) < 1:
            raise ValueError(f"max_segments={max_segments}, max_chars={max_chars}: expected both to be at least 1")
        self.task = TASKS[task](**kwargs) if isinstance(task, str) else task
        self.max_segments, self.max_chars, self.format_reward = max_segments, max_chars, float(format_reward)
        self.render_mode, self.end_reason = render_mode, "not reset"
        size, segments = self.task.side * CELL, gym.spaces.Discrete(max_segments + 1)
        spaces = {"image": gym.spaces.Box(0, 255, (size, size, 3), np.uint8)} if size else {}
        spaces |= {"prompt": AnyText(512), "response": AnyText(max_chars), "segment_index": segments}
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), AnyText(max_chars)

    def reset(self, *, seed=None, options=None):
        """options: "index" (the i-th example of the split; by default drawn from `np_random`), "split" ("train" or
        "eval"), "response" (an unfinished response to go on from). Anything else is a ValueError."""
        super().reset(seed=seed)
        chosen = {"index": int(self.np_random.integers(2**31)), "split": "train", "response": ""}
        if not isinstance(options, dict | None) or set(options or ()) - set(chosen):
            raise ValueError(f"options={options!r} is not valid; expected a dict with some of {tuple(chosen)} as keys")
        index, split, prefix = (chosen | (options or {})).values()
        if not isinstance(prefix, str) or len(prefix) >= self.max_chars or self.task.cut(prefix)[1]:
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
        self.response, self.end_reason = self.task.cut((self.response + action)[:self.max_chars])
        self.segments.append(self.response[before:])
        if terminated := bool(self.end_reason):
            bonus = self.format_reward if re.fullmatch(self.task.form, self.response) else 0.0
            self.reward_terms = {"answer": self.task.grade(self.example, self.response), "format": bonus}
        elif len(self.response) == self.max_chars or len(self.segments) == self.max_segments:
            self.end_reason = "max_chars" if len(self.response) == self.max_chars else "max_segments"
        observation, info = self._report()
        return observation, sum(self.reward_terms.values()), terminated, not terminated and bool(self.end_reason), info

    def _report(self):
        observation = {"prompt": self.example.question, "response": self.response, "segment_index": len(self.segments)}
        if self.task.side:
            observation["image"] = self._pixels.copy()  # (H, W, 3), a copy: who writes on it spoils only his own
        info = {"example_id": self.example_id, "answer": self.example.answer,
                "predicted": self.task.read(self.response), "correct": self.reward_terms["answer"] == 1,
                "segment_index": len(self.segments), "segment_text": self.segments[-1] if self.segments else "",
                "reward_terms": dict(self.reward_terms), "end_reason": self.end_reason,
                "steps_correct": self.task.check_steps(self.example, self.response)}
        if self.render_mode == "human":
            print(self._terminal())
        return observation, info

    def render(self):
        """A string ("ansi"), an (H, W, 3) uint8 array ("rgb_array"), or None ("human": every step prints itself)."""
        return {"ansi": self._terminal, "rgb_array": self._frame}.get(self.render_mode, lambda: None)()

    def _pieces(self):  # (tint, shown characters) of the prefix and of every segment, control characters spelled out
        pieces = [(_GREY, self.prefix), *((_TINTS[i % 4], segment) for i, segment in enumerate(self.segments))]
        return [(tint, [c if c.isprintable() else repr(c)[1:-1] for c in text]) for tint, text in pieces if text]

    def _verdict(self):
        right = self.task.check_steps(self.example, self.response)
        end = f"ended by {self.end_reason}, true answer {self.example.answer}" if self.end_reason else "not finished"
        return f"reward {sum(self.reward_terms.values()):g}   |   {sum(right)} of {len(right)} steps right   |   {end}"

    def _terminal(self):
        rows, colour = [] if self._pixels is None else self._pixels, "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580"
        lines = ["".join(colour.format(*top, *bottom) for top, bottom in zip(*pair, strict=True)) + "\x1b[0m"
                 for pair in zip(rows[::2], rows[1::2], strict=True)]  # an upper half block is two pixels
        text = "|".join(f"\x1b[30;48;2;{r};{g};{b}m{''.join(shown)}\x1b[0m" for (r, g, b), shown in self._pieces())
        return "\n".join([*lines, self.example.question, text, self._verdict()])

    def _frame(self):
        canvas = Image.new("RGB", (960, 384), (252, 252, 250))
        draw, font, small, left = ImageDraw.Draw(canvas), ImageFont.load_default(21), ImageFont.load_default(16), 32
        if self._pixels is not None:
            how = Image.Resampling.NEAREST if self.task.side else Image.Resampling.BICUBIC
            canvas.paste(ImageOps.contain(self.example.image, (320, 320), how), (32, 32))
            left = 384
        draw.text((left, 32), self.example.question.partition("\n")[0], _INK, font)
        spans, checks = self.task.step_spans(self.response), self.task.check_steps(self.example, self.response)
        marks = {at: (_WRONG, _RIGHT)[right] for span, right in zip(spans, checks, strict=True) for at in range(*span)}
        x, y, placed = left, 80, []
        for tint, shown in self._pieces():
            for glyph in shown:
                width = draw.textlength(glyph, font)
                x, y = (left, y + 38) if x + width > 928 else (x, y)
                placed.append((x, y, x + width, glyph, tint, marks.get(len(placed), tint)))
                x += width
            x += 4
        scroll = max(0, y - 232)  # of a long response the latest lines are shown
        for x, y, end, glyph, tint, mark in placed:
            if y - scroll >= 80:
                draw.rectangle((x, y - scroll, end, y - scroll + 26), tint)
                draw.rectangle((x, y - scroll + 27, end, y - scroll + 30), mark)
                draw.text((x, y - scroll), glyph, _INK, font)
        legend = "underlined in blue: a right step, in orange: a wrong one"
        draw.text((left, 306), f"{legend}\n{self._verdict()}", _INK, small, spacing=8)
        return np.array(canvas)  # (H, W, 3)

TASKS = {task.__name__: task for task in (DiceSum, ArrowPath, TextSum)}
for _name in (*TASKS, "Dataset"):
    if f"SAPO/{_name}-v0" not in gym.registry:
        gym.register(f"SAPO/{_name}-v0", f"{__name__}:SegmentEnv" if _name in TASKS else "data:DatasetEnv",
                     kwargs={"task": _name} if _name in TASKS else {})
