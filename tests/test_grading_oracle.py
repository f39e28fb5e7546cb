r"""tasks/grading.py against an oracle: answers are made of values, so what is equal is known.

Two answers are made of the same few *parts* (two numbers, a unit, a date, a word), or of nearly the
same: a sign, a digit, a unit apart. Each is of a *kind* (a percentage, a pair, a time), written in
one of the ways in which people write that. What an answer means is a tuple of Python's numbers and
strings, and two answers are one if those are equal (`earns`). It uses none of the grader's code.

Taken from docs/models.md: an answer that leaves work to be done earns nothing. A name before a
value or a unit behind it may be left out, but not be another one. And 50% is not 0.5, (1,2) not
\{1,2\}, 3:4 not 3/4. What could be argued either way is left out: `is_choice` lists it.

SAPO_EXAMPLES=10000 tries more; results/fuzz.json holds the count of a long run.
"""

import math
import sys
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from data_files import styled_tasks
from hypothesis import assume, event, given
from hypothesis import strategies as st

from tasks import END, Example, grading
from tasks.dataset import STYLES

pytestmark = pytest.mark.usefixtures("dataset_cache")


# --------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Answer:
    text: str
    means: tuple
    """the value without name and unit: equal where the answers are"""
    name: str = ""
    unit: str = ""
    is_worked: bool = True


def earns(given, true):
    """Should it? None where that is a choice."""
    if not given.is_worked:
        return False
    if is_choice(given.means, true.means):
        return None
    is_same = given.means == true.means or given.means == worked_out(true.means)
    return is_same and agree(given.name, true.name) and agree(given.unit, true.unit)


def agree(one, other):
    return not one or not other or one == other


def worked_out(means):
    """A power as a number, which is an answer where the power is one. Not the other way round."""
    if means[0] != "power":
        return means
    _, factor, base, exponent = means
    return ("number", factor * Fraction(base) ** exponent)


def is_choice(given, true):
    """May the grader say either?

    5 million and 5000000: equal, but words are not worked out
    one day in two ways of writing dates
    a ratio and a time in the same digits
    0,5 and the numbers 0 and 5
    """
    kinds = {given[0], true[0]}
    if kinds == {"number", "changed"}:
        return value_in_words(given) == value_in_words(true)
    if given[0] == true[0] == "date":
        return given[1] != true[1] and given[2:] == true[2:]
    if kinds == {"ratio", "time"}:
        return given[1:3] == true[1:3]
    return kinds == {"decimal comma", "list"}


def value_in_words(means):
    return means[1] * SCALES.get(means[-1], 1)


CHOICES = [  # not drawn, as either could be argued: (given, true, does it earn today)
    ("5", "5 March", True),  # read as a unit, and so is pm
    ("5", "5 pm", True),
    ("3 quarters", "3", True),  # coins
    ("5%", "5", False),  # even to "how many percent?"
    ("5 million", "5000000", False),
    ("5 min", "5 minutes", False),
    ("1.5e3", "1500", False),
    (r"1.5\times10^3", "1500", False),  # work is left, as in 2^{10}
    ("5=x", "x=5", False),
    ("x=5 or x=6", "5, 6", False),
    ("1<x<2", "(1,2)", False),
    ("{1,2}", r"\{1,2\}", False),
    ("1, 000", "1000", False),
    ("0,5", "0.5", False),
    ("3:5", "3:05", True),
    (r"\sqrt23", r"\sqrt{23}", True),  # to LaTeX 3 times the root of 2
]


@pytest.mark.parametrize(("given", "true", "is_paid"), CHOICES)
def test_a_choice_is_made_as_it_is_written_here(either_way, given, true, is_paid):
    assert grading.same(given, true) == is_paid


# ---------------------------------------------------------------------------------- the parts

SQUAREFREE = [2, 3, 5, 6, 7, 10]
BRACKETS = ["()", "[]", "(]", "[)", "{}", ""]
UNITS = {  # how each is written behind a number
    "cm": [" cm", r"\text{ cm}", r"\,\mathrm{cm}", r"\ \text{cm}", "~cm"],
    "km": [" km", r"\text{ km}", r"\,\mathrm{km}"],
    "m": [r"\text{ m}", r"\,\mathrm{m}"],
    "cm^2": [" cm^2", " cm²", r"\text{ cm}^2", r"\text{ cm}^{2}", r"\,\mathrm{cm}^2"],
    "cm^3": [" cm^3", " cm³", r"\text{ cm}^3", r"\text{ cm}^{3}", r"\,\mathrm{cm}^3"],
    "km/h": [" km/h", r"\text{ km/h}"],
    "m/s": [r"\text{ m/s}", r"\,\mathrm{m/s}"],
    "mW": [" mW", r"\text{ mW}"],
    "MW": [" MW", r"\text{ MW}"],
    "degrees": ["°", r"^\circ", r"^{\circ}", " degrees", r"\text{ degrees}"],
    "apples": [" apples", r"\text{ apples}", " Apples"],
    "square feet": [" square feet", r"\text{ square feet}"],
}
CURRENCIES = {"dollars": r"\$", "pounds": "£", "euros": "€"}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
CHANGES = [*SCALES, "squared", "cubed", "or more", "or less", "and a half", "tenths", "thirds"]
WORDS = ["yes", "no", "true", "false", "no solution", "solution", "cat", "act", "even", "odd"]
WORDS += ["World War 1", "World War 2", "none", "one"]


def like(number):
    """Numbers that a careless reader takes for this one."""
    turned_round = int(str(number.numerator)[::-1].rstrip("-"))
    factors = [10, 100, 1000, Fraction(1, 10), Fraction(1, 100), Fraction(1, 1000)]
    return [
        *(-number, number + 1, number - 1, number + Fraction(1, 10**7), number * number),
        *(number * factor for factor in factors),
        Fraction(number.denominator, number.numerator or 1),
        Fraction(turned_round, number.denominator),
    ]


numbers = st.one_of(
    st.integers(-20, 20).map(Fraction),
    st.integers(-9999, 9999).map(Fraction),
    st.integers(100_000, 10**20).map(Fraction),
    st.builds(Fraction, st.integers(-99, 99), st.integers(2, 12)),
    st.builds(Fraction, st.integers(-9999, 9999), st.sampled_from([10, 100, 1000])),
    st.builds(Fraction, st.integers(1, 9), st.just(10**7)),
)
PARTS = {
    "a": numbers,
    "b": numbers,
    "root": st.sampled_from(SQUAREFREE),
    "brackets": st.sampled_from(BRACKETS),
    "name": st.sampled_from(["x", "y", "AB", "f(x)", r"\theta", "x_1"]),
    "unit": st.sampled_from(sorted(UNITS)),
    "currency": st.sampled_from(sorted(CURRENCIES)),
    "change": st.sampled_from(CHANGES),
    "relation": st.sampled_from(["<", "<=", ">", ">="]),
    "exponent": st.integers(-9, 12),
    "year": st.integers(1000, 2100),
    "month": st.integers(1, 12),
    "day": st.integers(1, 28),
    "date_form": st.sampled_from(["iso", "slashes", "dots", "words", "american"]),
    "hour": st.integers(1, 12),
    "minute": st.integers(0, 59),
    "half": st.sampled_from(["", " am", " pm"]),
    "letter": st.sampled_from("ABCDE"),
    "word": st.sampled_from(WORDS),
}


class Parts:
    """What answers are made of, each drawn when a kind first asks for it."""

    def __init__(self, draw, **known):
        self.draw = draw
        self.known = known

    def __getattr__(self, name):
        if name not in self.known:
            self.known[name] = self.draw(PARTS[name])
        return self.known[name]

    def nearly(self):
        """The same parts, or one or two of them changed."""
        near = dict(self.known)
        for _ in range(self.draw(st.integers(0, 2))):
            name = self.draw(st.sampled_from(sorted(near)))
            values = PARTS[name]
            if name in ("a", "b") and self.draw(st.booleans()):
                values = st.sampled_from(like(near[name]))
            near[name] = self.draw(values)
        return Parts(self.draw, **near)


# --------------------------------------------------------------------- how a number is written


def decimal(number):
    """0.25 for 1/4, or None for 1/3."""
    scaled = number * 10**9
    if scaled.denominator > 1:
        return None
    return f"{scaled.numerator // 10**9}.{scaled.numerator % 10**9:09}".rstrip("0").rstrip(".")


def as_worked(number, has_separators):
    """Ways to write a number, worked out."""
    size = abs(number)
    top, bottom, whole = size.numerator, size.denominator, int(size)
    texts = []
    if bottom == 1:
        texts += [f"{top}", f"{top}.0", f"{top}.00", f"0{top}"]
        if has_separators and top >= 1000:
            texts += [f"{top:,}".replace(",", mark) for mark in (",", "{,}", r",\!", r",\! ")]
    else:
        texts += [f"{top}/{bottom}"]
        texts += [rf"\{frac}{{{top}}}{{{bottom}}}" for frac in ("frac", "dfrac")]
        if top < 10 and bottom < 10:
            texts += [rf"\frac{top}{bottom}", rf"\tfrac {top} {bottom}"]
        if whole:
            rest = top - whole * bottom
            texts += [rf"{whole}\frac{{{rest}}}{{{bottom}}}", f"{whole} {rest}/{bottom}"]
        if decimal(size):
            texts += [decimal(size), decimal(size) + "0", decimal(size).removeprefix("0")]
    if number < 0:
        return [sign + text for text in texts for sign in ("-", "- ", "−")]
    return texts + ["+" + text for text in texts if number > 0]


def as_work(number, k):
    """Ways to write a number that leave something to be worked out; k from 2 on."""
    top, bottom = number.numerator, number.denominator
    if bottom > 1:
        whole = math.floor(number)
        part = number - whole
        return [
            rf"\frac{{{k * top}}}{{{k * bottom}}}",
            f"{k * top}/{k * bottom}",
            f"{top}/{bottom}+0",
            rf"{whole}+\frac{{{part.numerator}}}{{{bottom}}}",
            rf"{top}\cdot\frac{{1}}{{{bottom}}}",
            rf"\frac{{{top - k}+{k}}}{{{bottom}}}",
            rf"1-\frac{{{bottom - top}}}{{{bottom}}}",
        ]
    texts = [f"{top - k}+{k}", f"{top + k}-{k}", f"{top * k}/{k}", rf"\frac{{{top * k}}}{{{k}}}"]
    texts += [f"{top}+0", rf"{top}\cdot 1", f"{top}+x-x", f"({top})^1", rf"\frac{{{top}}}{{1}}"]
    if top >= 0:
        texts += [f"-(-{top})", f"|-{top}|", rf"\sqrt{{{top * top}}}", f"-{k}+{top + k}"]
    if top % k == 0:
        texts += [f"{top // k}*{k}", rf"{k} \times {top // k}", f"({k})({top // k})"]
    return texts


def write(draw, number, is_worked, has_separators=True):
    if is_worked:
        return draw(st.sampled_from(as_worked(number, has_separators)))
    return draw(st.sampled_from(as_work(number, draw(st.integers(2, 9)))))


# ---------------------------------------------------------------------------------- the kinds


def number(draw, parts, is_worked):
    return Answer(write(draw, parts.a, is_worked), ("number", parts.a), is_worked=is_worked)


def equation(draw, parts, is_worked):
    value = number(draw, parts, is_worked)
    form = draw(st.sampled_from(["{}={}", "{} = {}", "{}=${}$"]))
    return replace(value, text=form.format(parts.name, value.text), name=parts.name)


def two_sides(draw, parts, is_worked):
    """An equation that is copied whole: 2+3=5."""
    work, result = write(draw, parts.a, False), write(draw, parts.a, True)
    sides = draw(st.permutations([work, result]))
    return Answer(" = ".join(sides), ("sides", parts.a), is_worked=False)


def quantity(draw, parts, is_worked):
    value = number(draw, parts, is_worked)
    text = value.text + draw(st.sampled_from(UNITS[parts.unit]))
    return replace(value, text=text, unit=parts.unit)


def money(draw, parts, is_worked):
    value = number(draw, Parts(draw, a=abs(parts.a)), is_worked)
    sign, forms = CURRENCIES[parts.currency], ["{sign}{value}", "{value}{sign}"]
    if parts.currency != "pounds":  # which are a weight, too
        forms += ["{value} {word}", r"{value}\text{{ {word}}}"]
    text = draw(st.sampled_from(forms)).format(sign=sign, value=value.text, word=parts.currency)
    return replace(value, text=text, unit=parts.currency)


def percentage(draw, parts, is_worked):
    value = number(draw, parts, is_worked)
    text = value.text + draw(st.sampled_from(["%", r"\%", r"\,\%", " percent", " per cent"]))
    return replace(value, text=text, means=("percent", parts.a))


def changed(draw, parts, is_worked):
    """A number with words that make another one of it: 5 million, 5 or more."""
    value = number(draw, parts, is_worked)
    form = draw(st.sampled_from(["{} {}", r"{}\text{{ {}}}"]))
    text = form.format(value.text, parts.change)
    return replace(value, text=text, means=("changed", parts.a, parts.change))


def multiple(draw, parts, is_worked):
    r"""Of a root or of \pi."""
    n, times = parts.root, parts.a.numerator
    assume(times)
    ways = {rf"\sqrt{{{n}}}": n, rf"\sqrt[3]{{{n}}}": (3, n), r"\pi": "pi", "π": "pi"}
    of = draw(st.sampled_from(list(ways)))
    if abs(times) == 1 and is_worked:
        text = of if times == 1 else "-" + of
    else:
        times = times if is_worked else f"({write(draw, Fraction(times), False)})"
        text = draw(st.sampled_from([f"{times}{of}", rf"{times}\cdot {of}", f"{times} {of}"]))
    if parts.a.denominator > 1:
        text = rf"\frac{{{text}}}{{{parts.a.denominator}}}"
    return Answer(text, ("multiple", parts.a, ways[of]), is_worked=is_worked)


def square_inside(draw, parts, is_worked):
    """A root out of which a square can be taken."""
    times = abs(parts.a.numerator)
    assume(times > 1)
    text = rf"\sqrt{{{times * times * parts.root}}}"
    return Answer(text, ("multiple", Fraction(times), parts.root), is_worked=False)


def rounded(draw, parts, is_worked):
    """A root to two decimals, which is not the root."""
    value = float(parts.a) * math.sqrt(parts.root)
    text = f"{value:.2f}"
    assume(abs(value) < 1e6 and abs(value - float(text)) > 1e-5)
    return Answer(text, ("number", Fraction(text)))


def scientific(draw, parts, is_worked):
    mantissa = Fraction(abs(parts.a.numerator) % 90 + 10, 10)
    first = write(draw, mantissa, is_worked)
    assume("/" not in first and "frac" not in first)
    form = draw(st.sampled_from([r"{}\times10^{{{}}}", r"{} \cdot 10^{{{}}}", r"{}\times 10^{}"]))
    text = form.format(first, parts.exponent)
    return Answer(text, ("power", mantissa, 10, parts.exponent), is_worked=is_worked)


def power(draw, parts, is_worked):
    base = parts.root + 1
    form = draw(st.sampled_from(["{}^{}", "{}^{{{}}}", "{} ^ {{ {} }}"]))
    return Answer(form.format(base, parts.exponent), ("power", 1, base, parts.exponent))


def several(draw, parts, is_worked):
    """A pair, an interval, a set, or two numbers side by side."""
    members = [write(draw, parts.a, is_worked, False), write(draw, parts.b, True, False)]
    values = (parts.a, parts.b)
    if parts.brackets in ("{}", ""):
        values = tuple(sorted(values))
        members = draw(st.permutations(members))
    between = [", ", r",\ ", " , "]
    between += [","] if parts.brackets else [" and ", r"\text{ and }", " or "]
    text = draw(st.sampled_from(between)).join(members)
    if parts.brackets:
        form = draw(st.sampled_from(["{}{}{}", r"\left{}{}\right{}", "{} {} {}"]))
        text = in_brackets(form, text, parts.brackets)
    return Answer(text, ("list", parts.brackets, *values), is_worked=is_worked)


def in_brackets(form, text, brackets):
    opening, closing = (mark if mark in "()[]" else "\\" + mark for mark in brackets)
    return form.format(opening, text, closing)


def both_signs(draw, parts, is_worked):
    assume(parts.a > 0)
    value = write(draw, parts.a, is_worked, False).removeprefix("+")
    text = draw(st.sampled_from([r"\pm ", "±"])) + value
    return Answer(text, ("list", "", -parts.a, parts.a), is_worked=is_worked)


def member(draw, parts, is_worked):
    """x in [1,2)"""
    assume(parts.brackets)
    value = several(draw, parts, is_worked)
    sign = draw(st.sampled_from([r" \in ", " ∈ "]))
    return replace(value, text=parts.name + sign + value.text, name=parts.name)


def endless(draw, parts, is_worked):
    """An interval without an end, or two of them."""
    value = write(draw, parts.a, is_worked, False)
    opening, closing = draw(st.sampled_from(["()", "[)"]))
    infinity = draw(st.sampled_from([r"\infty", "∞"]))
    right, left = f"{opening}{value}, {infinity}{closing}", f"(-{infinity}, 0)"
    intervals = [right, left] if draw(st.booleans()) else [right]
    text = draw(st.sampled_from([r" \cup ", "∪"])).join(draw(st.permutations(intervals)))
    means = ("endless", opening, parts.a, len(intervals))
    return Answer(text, means, is_worked=is_worked)


def points(draw, parts, is_worked):
    """Two points, in any order."""
    one, other = (parts.a, parts.b), (parts.b, Fraction(parts.root))
    texts = []
    for x, y in draw(st.permutations([one, other])):
        texts.append(f"({write(draw, x, True, False)}, {write(draw, y, True, False)})")
    text = draw(st.sampled_from([", ", " and "])).join(texts)
    return Answer(text, ("points", *sorted([one, other])))


def system(draw, parts, is_worked):
    """x=1, y=2"""
    texts = ["x = " + write(draw, parts.a, is_worked), "y=" + write(draw, parts.b, True)]
    text = ", ".join(draw(st.permutations(texts)))
    return Answer(text, ("system", parts.a, parts.b), is_worked=is_worked)


def single(draw, parts, is_worked):
    """A set or a list of one."""
    assume(parts.brackets in ("[]", "{}"))
    text = in_brackets("{}{}{}", write(draw, parts.a, is_worked, False), parts.brackets)
    return Answer(text, ("list", parts.brackets, parts.a), is_worked=is_worked)


def decimal_comma(draw, parts, is_worked):
    """0,125 is no number here, and certainly not 125."""
    assume(0 < parts.a < 1 and decimal(parts.a))
    return Answer(decimal(parts.a).replace(".", ","), ("decimal comma", parts.a))


def relation(draw, parts, is_worked):
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}[parts.relation]
    value = write(draw, parts.a, is_worked)
    latex = {"<": "<", ">": ">", "<=": r"\le ", ">=": r"\geq "}
    signs = draw(st.sampled_from([{sign: sign for sign in latex}, latex]))
    texts = [f"x {signs[parts.relation]} {value}", f"{value} {signs[turned]} x"]
    text = draw(st.sampled_from(texts))
    return Answer(text, ("relation", parts.relation, parts.a), is_worked=is_worked)


def between(draw, parts, is_worked):
    """1 < x <= 2"""
    assume(parts.a < parts.b)
    first, second = draw(st.sampled_from(["<", "<="])), draw(st.sampled_from(["<", "<="]))
    low, high = write(draw, parts.a, is_worked), write(draw, parts.b, True)
    latex = {"<": "<", "<=": r"\leq "}
    text = f"{low} {latex[first]} x {latex[second]} {high}"
    if draw(st.booleans()):
        turned = {"<": ">", "<=": r"\ge "}
        text = f"{high} {turned[second]} x {turned[first]} {low}"
    return Answer(text, ("between", first, second, parts.a, parts.b), is_worked=is_worked)


def ratio(draw, parts, is_worked):
    left, right = parts.a.numerator, parts.a.denominator
    sign = draw(st.sampled_from([":", " : "]))
    return Answer(f"{left}{sign}{right}", ("ratio", left, right))


def linear(draw, parts, is_worked):
    slope, shift = parts.a.numerator, abs(parts.b.numerator)
    assume(slope not in (0, 1, -1) and shift)
    texts = [f"{slope}x+{shift}", f"{slope} x + {shift}", f"{shift}+({slope}x)"]
    texts += [rf"{slope}\cdot x+{shift}"]
    return Answer(draw(st.sampled_from(texts)), ("linear", slope, shift))


def complex_number(draw, parts, is_worked):
    real, imaginary = parts.a.numerator, abs(parts.b.numerator)
    assume(real and imaginary > 1)
    texts = [f"{real}+{imaginary}i", f"{real} + {imaginary} i"]
    if real > 0:
        texts += [f"{imaginary}i+{real}"]
    return Answer(draw(st.sampled_from(texts)), ("complex", real, imaginary))


MONTHS = "January February March April May June July August September October November December"


def date(draw, parts, is_worked):
    year, month, day = parts.year, parts.month, parts.day
    name = MONTHS.split()[month - 1]
    text = {
        "iso": f"{year}-{month:02}-{day:02}",
        "slashes": f"{day}/{month}/{year}",
        "dots": f"{day}.{month}.{year}",
        "words": f"{day} {name} {year}",
        "american": f"{name} {day}, {year}",
    }[parts.date_form]
    return Answer(text, ("date", parts.date_form, year, month, day))


def time(draw, parts, is_worked):
    text = f"{parts.hour}:{parts.minute:02}{parts.half}"
    return Answer(text, ("time", parts.hour, parts.minute, parts.half))


def duration(draw, parts, is_worked):
    form = draw(st.sampled_from(["{} hours {} minutes", r"{}\text{{ hours }}{}\text{{ minutes}}"]))
    return Answer(form.format(parts.hour, parts.minute), ("duration", parts.hour, parts.minute))


def letters(draw, parts, is_worked):
    """The right ones of a multiple choice."""
    both = [parts.letter, chr(ord(parts.letter) + parts.root)]
    text = draw(st.sampled_from([", ", ",", " and "])).join(draw(st.permutations(both)))
    return Answer(text, ("letters", *sorted(both)))


def choice(draw, parts, is_worked):
    forms = ["{}", "({})", r"\text{{{}}}", r"\textbf{{({})}}", r"\text{{({})}}"]
    text = draw(st.sampled_from(forms)).format(parts.letter)
    return Answer(text, ("words", parts.letter.lower()))


def word(draw, parts, is_worked):
    texts = [parts.word, rf"\text{{{parts.word}}}", rf"\mathrm{{{parts.word}}}"]
    if parts.word.islower():
        texts += [parts.word.upper(), parts.word.capitalize()]
    return Answer(draw(st.sampled_from(texts)), ("words", parts.word))


KINDS = [number, equation, quantity, money, percentage, changed, multiple, rounded, scientific]
KINDS += [power, several, several, both_signs, member, single, endless, points, system]
KINDS += [decimal_comma, relation, between, ratio, linear, complex_number, date, time, duration]
KINDS += [letters, choice, word]
WRONG_KINDS = [two_sides, square_inside]  # never an answer

# Whatever an answer was, it is another one so, or has to be worked out.
SPOILT = ["The answer is {}", "not {}", "about {}", "{0}, {0}", "{0} {0}", "{} or 77", "{} 77"]
SPOILT += ["77 {}", "{}x", "2{}", "{}^2", "1/{}", r"\sqrt{{{}}}", "{}!", "{}/2", "{}+0", "{}=7"]
TYPESETTING = ["{}", " {} ", "{}.", "${}$", "${}$.", "$${}$$", r"\({}\)", r"\[ {} \]"]
TYPESETTING += [r"\boxed{{{}}}"]
QUESTIONS = ["How much is it?", "What is ${}$?", "Compute {}.", r"Evaluate: \({}\)", "{} = ?"]
FORMS = {"tags": "<think>so</think><answer>{}</answer>", "boxed": r"So it is \boxed{{{}}}." + END}


@st.composite
def exams(draw):
    """(a question, the answer given, the true one)"""
    parts = Parts(draw)
    kind = draw(st.sampled_from(KINDS))
    true = kind(draw, parts, True)
    how = draw(st.sampled_from(["same kind", "same kind", "any kind", "mistyped", "spoilt"]))
    if how == "mistyped":
        given = mistyped(draw, true)
    elif how == "spoilt":
        text = draw(st.sampled_from(SPOILT)).format(true.text)
        given = replace(true, text=text, is_worked=False)
    else:
        given_kind = kind if how == "same kind" else draw(st.sampled_from(KINDS + WRONG_KINDS))
        given = given_kind(draw, parts.nearly(), draw(st.sampled_from([True, True, False])))
    work = write(draw, parts.a, False) if given.is_worked else given.text
    question = draw(st.sampled_from(QUESTIONS)).format(work)
    return question, typeset(draw, given), typeset(draw, true)


def mistyped(draw, answer):
    """With another digit somewhere: certainly another answer."""
    digits = [at for at, letter in enumerate(answer.text) if letter in "0123456789"]
    assume(digits)
    at = draw(st.sampled_from(digits))
    digit = draw(st.sampled_from(sorted(set("0123456789") - {answer.text[at]})))
    return replace(answer, text=answer.text[:at] + digit + answer.text[at + 1 :], means=("typo",))


def typeset(draw, answer):
    return replace(answer, text=draw(st.sampled_from(TYPESETTING)).format(answer.text))


@pytest.fixture(scope="module")
def styled(tmp_path_factory, dataset_cache):
    return styled_tasks(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", params=["with math-verify", "without"])
def either_way(request):
    """With the package math-verify, and without it."""
    grading.same.cache_clear()
    if request.param == "without":
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "math_verify", None)
            yield
    else:
        pytest.importorskip("math_verify", reason="needs: pip install math-verify")
        yield
    grading.same.cache_clear()


@given(exams(), st.sampled_from(sorted(STYLES)))
def test_an_answer_earns_just_if_it_is_the_true_one(styled, either_way, exam, style):
    question, given, true = exam
    should = earns(given, true)
    event(f"should earn: {should}")
    response = FORMS[style].format(given.text)
    reward = styled[style].grade(Example(None, question, "k", (), true.text), response)
    assert should is None or reward == should, (given, true, question)
