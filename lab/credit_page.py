"""The credit map of a run: did the credit land on the right tokens?

One drawing of a few held-out responses, credit.svg; the page to play with them is lab/explorer.py.
Each token stands in a cell tinted by its advantage, bars mark where segments end, waves underline
steps known to be wrong, and two curves show entropy and value. `python -m lab.figures runs/<name>`
makes it from samples.jsonl.

Needs the standard library alone. Left out: whatever needs a network, a browser script or the model
itself.
"""

import math
import textwrap
import unicodedata
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from lab.common import (
    FAINT,
    GREEN,
    INK,
    PURPLE,
    VERMILLION,
    check_examples,
    is_right,
    read_samples,
    run_title,
)

# All in pixels. A letter's width is the advance of a 12-pixel monospace letter.
PAGE_WIDTH = 1000
MARGIN = 20
PICTURE_SIDE = 128
LETTER_WIDTH = 7.2
TOKEN_HEIGHT = 24
WAVE_ROOM = 10  # below the tokens, for the wave under a wrong step
CURVE_HEIGHT = 26
CURVE_GAP = 8  # below a curve
SANS = 'system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif'
MONOSPACE = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace'
CSS = f"""
text {{ font: 12px {SANS}; fill: {INK} }} text.heard {{ fill: {FAINT} }}
.token text {{ font: 12px {MONOSPACE}; text-anchor: middle }}
text.map {{ font: 12px {MONOSPACE}; fill: {FAINT} }}
.token rect {{ stroke: #D9D9D9; stroke-width: 0.7 }}
.cut {{ stroke: #000; stroke-width: 3 }} .guide {{ stroke: #BDBDBD; stroke-width: 1 }}
.wrong {{ stroke: {INK}; stroke-width: 1.6; fill: none }}
.entropy {{ stroke: {PURPLE} }} .value {{ stroke: {GREEN} }} \
.curve {{ stroke-width: 1.6; fill: none }}
text.small {{ font-size: 10px; fill: {FAINT} }} text.end {{ text-anchor: end }}
text.big {{ font-size: 18px; font-weight: 700 }} text.head {{ font-size: 14px; font-weight: 600 }}
image {{ image-rendering: pixelated }}
"""
HOW_TO_READ_THE_CELLS = (
    "Each box is a token the model wrote. Between two bars lies one segment; its tokens share one "
    "advantage: the credit or blame they get in training."
)
HOW_TO_READ_ENTROPY = (
    "Entropy: how unsure the model was of the token, in nats, on a log scale; SAPO cuts after the "
    "peaks."
)
HOW_TO_READ_VALUE = "Value: the reward that the critic expected where the segment begins."
HOW_TO_READ_V = (
    "V: the reward that the critic expected where the turn begins; beside a picture also as a "
    "green bar."
)
LEAST_ENTROPY = 1e-6  # nats, on the log scale


class Cell(NamedTuple):
    """A token's place in its row of the drawing."""

    index: int  # of the token in its response
    text: str  # as shown: short and escaped
    left_edge: float  # in pixels
    width: float

    @property
    def right_edge(self):
        return self.left_edge + self.width


class Scale(NamedTuple):
    """What a curve's bottom and top stand for."""

    low: float
    high: float
    is_log: bool = False

    def share(self, number):
        """How high a number stands, from 0 at the bottom to 1 at the top."""
        low, high = self.low, self.high
        if self.is_log:
            number, low, high = (math.log(max(x, LEAST_ENTROPY)) for x in (number, low, high))
        return (number - low) / (high - low or 1.0)


# ---------------------------------------------------------------------- the responses to show


def _choose(samples, count):
    """At most `count` responses: right and wrong by turns, as far as there are some of each."""
    right = [sample for sample in samples if is_right(sample)]
    wrong = [sample for sample in samples if not is_right(sample)]
    by_turns = [sample for pair in zip_longest(right, wrong) for sample in pair]
    return [sample for sample in by_turns if sample is not None][:count]


def _without_nulls(sample):
    """The response, NaN for null."""
    whole = dict(sample)
    for key in ("advantages", "entropy", "values"):
        if key in sample:
            whole[key] = [math.nan if number is None else number for number in sample[key]]
    return whole


def _last_samples(path, count, examples=None):
    """The iteration that was sampled last, and at most `count` of its held-out responses; or those
    to the `examples`, in their order."""
    samples = [sample for sample in read_samples(path) if "learned_from" not in sample]
    if not samples:
        raise ValueError(f"{path} holds no held-out response")
    last = max(sample["iteration"] for sample in samples)
    samples = [_without_nulls(sample) for sample in samples if sample["iteration"] == last]
    if not examples:
        return last, _choose(samples, count)
    of_example = {str(sample.get("example_id")): sample for sample in samples}
    check_examples(examples, of_example, path)
    return last, [of_example[name] for name in examples]


# ---------------------------------------------------------------------------- text and colour


def _visible(text, limit, token=False):
    """At most `limit` characters for SVG and HTML: markup escaped, marks for what has no shape.

    Control characters, lone surrogates and the like are no legal XML, and direction marks would
    reorder the line.
    """
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    shown = []
    for char in text:
        category = unicodedata.category(char)
        if category == "Zs":
            char = "·" if token else " "
        elif char == "\n":
            char = "⏎"
        elif char == "\t":
            char = "⇥"
        elif char < " ":
            char = chr(0x2400 + ord(char))  # Unicode holds their pictures there
        elif category[0] == "C" or category in ("Zl", "Zp"):
            char = "\ufffd"
        shown.append(char)
    return escape("".join(shown))


def _digits(number, form):
    """A number with a real minus sign; none before a zero, where the form has a z."""
    return format(number, form).replace("-", "−")


def _tint(advantage, limit):
    """Cell colour: white at 0, blue for credit, orange for blame, full at ±limit; grey for NaN.

    The share is raised to the power 0.6, here and in the legend alike, so that small credits are
    still seen.
    """
    if not math.isfinite(advantage):
        return "#DDDDDD"
    full = (77, 157, 224) if advantage > 0 else (240, 146, 60)
    share = min(1.0, abs(advantage) / limit) ** 0.6
    return "#" + "".join(f"{round(255 + (part - 255) * share):02X}" for part in full)


# ------------------------------------------------------------------------- the rows of tokens


def _wrap(tokens, ends, left, right=PAGE_WIDTH - MARGIN, indices=None):
    """Rows of cells between `left` and `right`, with room for a bar after each segment.

    indices: of the tokens to show, all if None.
    """
    rows = [[]]
    edge = left
    for index in range(len(tokens)) if indices is None else indices:
        token = tokens[index]
        letters = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in token[:24])
        width = max(1, letters) * LETTER_WIDTH + 4
        if rows[-1] and edge + width > right:
            rows.append([])
            edge = left
        rows[-1].append(Cell(index, _visible(token, 24, token=True), edge, width))
        edge += width
        if ends[index]:
            edge += 4
    return rows


def _token(cell, top, sample, curves, limit):
    """A token's cell: its tint, its text, and its numbers for whoever points at it."""
    advantage = sample["advantages"][cell.index]
    notes = [f"advantage {_digits(advantage, '+z.3f')}"]
    for kind, numbers in curves.items():
        notes.append(f"{kind} {_digits(numbers[cell.index], 'z.3f')}")
    return (
        f'<g class="token"><title>token {cell.index}: {", ".join(notes)}</title>'
        f'<rect x="{cell.left_edge:.1f}" y="{top}" width="{cell.width:.1f}" '
        f'height="{TOKEN_HEIGHT}" fill="{_tint(advantage, limit)}"/>'
        f'<text x="{cell.left_edge + cell.width / 2:.1f}" y="{top + 16}">{cell.text}</text></g>'
    )


def _wave(cell, top):
    """The wave under a token of a wrong step, of about 8 pixels each."""
    waves = round(cell.width / 8)
    quarter, half = cell.width / waves / 4, cell.width / waves / 2
    wave = f"q{quarter:.2f} -4 {half:.2f} 0t{half:.2f} 0" * waves
    return f'<path class="wrong" d="M{cell.left_edge:.1f} {top + TOKEN_HEIGHT + 4.5}{wave}"/>'


def _curve(row, numbers, kind, top, scale):
    """A step curve of one number per token, as wide as its token; its scale on the left."""
    path = []
    pen_is_down = False
    for cell in row:
        number = numbers[cell.index]
        if not math.isfinite(number):
            pen_is_down = False  # a gap
            continue
        height = top + CURVE_HEIGHT * (1 - scale.share(number))
        if pen_is_down:
            path.append(f"H{cell.left_edge:.1f}V{height:.1f}H{cell.right_edge:.1f}")
        else:
            path.append(f"M{cell.left_edge:.1f} {height:.1f}H{cell.right_edge:.1f}")
        pen_is_down = True
    left, bottom = row[0].left_edge, top + CURVE_HEIGHT
    low, high = _digits(scale.low, "z.2g"), _digits(scale.high, "z.2g")
    return [
        f'<path class="guide" d="M{left:.1f} {bottom}H{row[-1].right_edge:.1f}"/>',
        f'<path class="curve {kind}" d="{"".join(path)}"/>' if path else "",
        f'<text class="small end" x="{left - 46}" y="{top + CURVE_HEIGHT / 2 + 3}">{kind}</text>',
        f'<text class="small end" x="{left - 5}" y="{top + 8}">{high}</text>',
        f'<text class="small end" x="{left - 5}" y="{bottom}">{low}</text>',
    ]


def _cut(cell, top, bottom):
    """The bar after a segment's last token, and a thin line through the curves down to `bottom`."""
    place = cell.right_edge + 2
    return [
        f'<path class="guide" d="M{place:.1f} {top + TOKEN_HEIGHT}V{bottom}"/>',
        f'<path class="cut" d="M{place:.1f} {top - 4}V{top + TOKEN_HEIGHT + 4}"/>',
    ]


def _wrong_tokens(sample):
    """The tokens of a response's wrong steps."""
    wrong = set()
    for first, last, right in sample.get("steps") or []:
        if not right:
            wrong.update(range(first, last + 1))
    return wrong


def _rows(sample, top, left, limit, scales):
    """A response's rows of cells, waves, curves and cuts: (SVG elements, y below them)."""
    wrong = _wrong_tokens(sample)
    curves = {"entropy": sample.get("entropy"), "value": sample.get("values")}
    curves = {kind: numbers for kind, numbers in curves.items() if numbers}
    elements = []
    for row in _wrap(sample["tokens"], sample["ends"], left):
        for cell in row:
            elements.append(_token(cell, top, sample, curves, limit))
            if cell.index in wrong:
                elements.append(_wave(cell, top))
        curve_top = top + TOKEN_HEIGHT + WAVE_ROOM
        for kind, numbers in curves.items():
            elements += _curve(row, numbers, kind, curve_top, scales[kind])
            curve_top += CURVE_HEIGHT + CURVE_GAP
        bottom = curve_top - CURVE_GAP
        for cell in row:
            if sample["ends"][cell.index]:
                elements += _cut(cell, top, bottom)
        top = bottom + 22
    return elements, top


# ----------------------------------------------------------------------- the turns of a game

PANEL_WIDTH, PANEL_GAP = 182, 12  # of a turn, in pixels: five in a row
TURN_PICTURE = 112
CAPTION = 24  # letters of what was said; and of a line of its map, as many as a panel is wide
MAP_LINES, LINE_HEIGHT = 8, 15


def _turns(sample, top, limit):
    """A game's turns as panels side by side: (SVG elements, y below them).

    In each what was said, the picture that was seen or else the lines, the value where the turn
    begins, and the tokens of the turn in their tints.
    """
    wrong = _wrong_tokens(sample)
    values = sample.get("values")
    elements, left, row_bottom = [], MARGIN, top
    for number, turn in enumerate(sample["turns"], 1):
        if left + PANEL_WIDTH > PAGE_WIDTH - MARGIN:
            left, top = MARGIN, row_bottom + 14
        first_line, _, others = turn["said"].partition("\n")
        said = _visible(first_line, CAPTION)
        elements.append(f'<text class="heard" x="{left}" y="{top + 10}">{number}. {said}</text>')
        y = top + 16
        value = values[turn["first"]] if values else math.nan
        if turn.get("image"):
            place = f'x="{left}" y="{y}" width="{TURN_PICTURE}" height="{TURN_PICTURE}"'
            image = _visible(str(turn["image"]), 10**9)
            elements.append(f'<image {place} href="data:image/png;base64,{image}"/>')
            if math.isfinite(value):
                elements += _gauge(left + TURN_PICTURE + 12, y, value)
            y += TURN_PICTURE + 8
        else:
            for line in _map_lines(others):
                y += LINE_HEIGHT
                elements.append(f'<text class="map" x="{left}" y="{y}">{line}</text>')
            if math.isfinite(value):
                y += LINE_HEIGHT + 4
                elements.append(f'<text class="heard" x="{left}" y="{y}">{_v(value)}</text>')
            y += 10
        tokens = range(turn["first"], turn["last"] + 1)
        cells = _wrap(sample["tokens"], sample["ends"], left, left + PANEL_WIDTH, tokens)
        for row in cells:
            for cell in row:
                elements.append(_token(cell, y, sample, {}, limit))
                if cell.index in wrong:
                    elements.append(_wave(cell, y))
                if sample["ends"][cell.index]:
                    place = cell.right_edge + 2
                    elements.append(
                        f'<path class="cut" d="M{place:.1f} {y - 3}V{y + TOKEN_HEIGHT + 3}"/>'
                    )
            y += TOKEN_HEIGHT + WAVE_ROOM
        row_bottom = max(row_bottom, y)
        left += PANEL_WIDTH + PANEL_GAP
    return elements, row_bottom + 8


def _map_lines(text):
    """The lines of a text as a panel has room for them: long ones wrapped, not too many."""
    lines = []
    for line in text.rstrip().splitlines():
        lines += [line] if len(line) <= CAPTION else textwrap.wrap(line, CAPTION)
    if len(lines) > MAP_LINES:
        lines = [*lines[: MAP_LINES - 1], "…"]
    return [_visible(line, CAPTION).replace(" ", "\u00a0") for line in lines]


def _v(value):
    return f"V {_digits(value, 'z.2f')}"


def _gauge(left, top, value):
    """A value from 0 to 1 as the height of a bar, with its number."""
    share = min(1.0, max(0.0, value))
    height = TURN_PICTURE - 14
    filled = share * height
    return [
        f'<rect x="{left}" y="{top}" width="12" height="{height}" fill="#EFEFEF"/>',
        f'<rect x="{left}" y="{top + height - filled:.1f}" width="12" height="{filled:.1f}" '
        f'fill="{GREEN}"/>',
        f'<text class="heard" x="{left - 4}" y="{top + TURN_PICTURE - 1}">{_v(value)}</text>',
    ]


# ----------------------------------------------------------------------------------- the page


def _card(sample, top, limit, scales, pictures):
    """One response: picture, question, outcome, tokens; (SVG elements, y below them).

    `pictures`: some response has one, so all make room for it.
    """
    is_game = "turns" in sample
    left = MARGIN
    if pictures and not is_game:
        left += PICTURE_SIDE + 20
    elements = [f'<path class="guide" d="M{MARGIN} {top}H{PAGE_WIDTH - MARGIN}"/>']
    picture_bottom = top
    if sample.get("image") and not is_game:
        place = f'x="{MARGIN}" y="{top + 16}" width="{PICTURE_SIDE}" height="{PICTURE_SIDE}"'
        image = _visible(str(sample["image"]), 10**9)
        elements.append(f'<image {place} href="data:image/png;base64,{image}"/>')
        picture_bottom = top + PICTURE_SIDE + 34
    if is_right(sample):
        mark, colour = "✓ won" if is_game else "✓ right", GREEN
    else:
        mark, colour = "✗ not won" if is_game else "✗ wrong", VERMILLION
    predicted = _visible(str(sample.get("predicted", "nothing")), 24)
    answer = _visible(str(sample.get("answer", "nothing")), 24)
    outcome = f"answered {predicted}, true answer {answer}, reward {sample['reward']:g}"
    if is_game:
        outcome = f"after {len(sample['turns'])} turns, reward {sample['reward']:.2g}"
    question = str(sample.get("prompt") or "")
    if is_game:
        question = question.partition("\n")[0]
    elements += [
        f'<text class="head" x="{left}" y="{top + 30}">'
        f'<tspan fill="{colour}">{mark}</tspan>  {outcome}</text>',
    ]
    if is_game and sample["turns"] and question == sample["turns"][0]["said"].partition("\n")[0]:
        top -= 20  # the first turn says it
    else:
        elements.append(f'<text x="{left}" y="{top + 50}">{_visible(question, 120)}</text>')
    if is_game:
        rows, rows_bottom = _turns(sample, top + 64, limit)
    else:
        rows, rows_bottom = _rows(sample, top + 68, left + 84, limit, scales)
    return elements + rows, max(rows_bottom, picture_bottom)


def _legend(title, limit, how_to_read):
    """The page's head: title, how to read it, the colour scale and the marks; (SVG elements, y
    below them)."""
    stops = [f'<stop offset="{i / 16}" stop-color="{_tint(i / 8 - 1, 1)}"/>' for i in range(17)]
    wave = "q2 -4 4 0t4 0" * 4
    elements = [f'<text class="big" x="{MARGIN}" y="34">{title}</text>']
    y = 58
    for line in how_to_read:
        elements.append(f'<text x="{MARGIN}" y="{y}">{line}</text>')
        y += 18
    y += 20
    elements += [
        f'<linearGradient id="scale">{"".join(stops)}</linearGradient>',
        f'<text class="end" x="105" y="{y}">blame  −{limit:.2g}</text>',
        f'<rect x="111" y="{y - 12}" width="160" height="16" fill="url(#scale)" stroke="#D9D9D9"/>',
        f'<text x="277" y="{y}">+{limit:.2g}  credit</text>',
        f'<path class="cut" d="M400 {y - 16}v24"/>'
        f'<text x="409" y="{y}">cut: a segment ends here</text>',
        f'<path class="wrong" d="M590 {y - 3}{wave}"/>'
        f'<text x="630" y="{y}">a wrong step; lambda blames what led to it, too</text>',
    ]
    return elements, y + 26


def _how_to_read(samples):
    """A line for each kind of thing that is drawn of these responses."""
    lines = [HOW_TO_READ_THE_CELLS]
    games = [sample for sample in samples if "turns" in sample]
    answers = [sample for sample in samples if "turns" not in sample]
    if any(sample.get("entropy") for sample in answers):
        lines.append(HOW_TO_READ_ENTROPY)
    if any(sample.get("values") for sample in answers):
        lines.append(HOW_TO_READ_VALUE)
    if any(sample.get("values") for sample in games):
        lines.append(HOW_TO_READ_V)
    return lines


def _drawing(samples, title):
    """The SVG of these responses, with one colour scale and one scale per curve for all of them."""

    def numbers(key):
        return [n for sample in samples for n in sample.get(key, []) if math.isfinite(n)]

    limit = max(map(abs, numbers("advantages")), default=0) or 1.0
    entropies = [max(number, LEAST_ENTROPY) for number in numbers("entropy")] or [1.0]
    scales = {
        "entropy": Scale(min(entropies), max(entropies), is_log=True),
        "value": Scale(min([0.0, *numbers("values")]), max([1.0, *numbers("values")])),
    }
    pictures = any(sample.get("image") for sample in samples)
    elements, height = _legend(title, limit, _how_to_read(samples))
    for sample in samples:
        card, height = _card(sample, height, limit, scales, pictures)
        elements += card
    size = f'viewBox="0 0 {PAGE_WIDTH} {height}" width="{PAGE_WIDTH}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{title}</title><style>{CSS}</style>"
        f'<rect width="{PAGE_WIDTH}" height="{height}" fill="#FFFFFF"/>'
        + "\n".join(elements)
        + "</svg>\n"
    )


def credit_map(run_folder, count=6, examples=None):
    """Draw `count` responses of the last sampled iteration, or those to the `examples` (their ids);
    return the path of credit.svg.

    Raises FileNotFoundError for a missing samples.jsonl, ValueError for an unusable one, for a
    count below 1 and for an example that is not there.
    """
    run_folder = Path(run_folder)
    if count < 1:
        raise ValueError(f"count is {count}: expected at least 1 response")
    iteration, samples = _last_samples(run_folder / "samples.jsonl", count, examples)
    title = f"Where the credit went: {_visible(run_title(run_folder), 80)}, iteration {iteration}"
    (run_folder / "credit.svg").write_text(_drawing(samples, title), encoding="utf-8")
    return run_folder / "credit.svg"
