"""tasks/grading.py: what counts as the same answer."""

import sys
import time

import pytest
from data_files import styled_tasks
from hypothesis import example, given
from hypothesis import strategies as st
from task_responses import latex_soup

from tasks import END, Example, grading
from tasks.dataset import STYLES
from tasks.grading import read_boxed, same

pytestmark = pytest.mark.usefixtures("dataset_cache")

STRICT = [  # (given, true, right), with and without math-verify
    ("16", "16", 1),
    (" 16 ", "16", 1),
    ("16.", "16", 1),
    ("$16$", "16", 1),
    ("$$16$$", "16", 1),
    (r"\(16\)", "16", 1),
    (r"\[ 16 \]", "16", 1),
    (r"\text{16}", "16", 1),
    ("16", "$16$", 1),
    (r"$\text{16}.$", "16", 1),
    ("0.5", ".5", 1),
    ("1/2", "0.5", 1),
    ("+0.50", "1/2", 1),
    ("1,234", "1234", 1),
    ("1,234.50", "1234.5", 1),
    ("-3", "3", 0),
    ("−3", "-3", 1),
    ("016", "16", 1),
    ("16.0", "16", 1),
    ("17", "16", 0),
    ("1/3", "0.333333", 0),
    ("1/0", "1/0", 1),
    ("1/0", "1", 0),
    ("", "16", 0),
    ("$", "16", 0),
    ("$$", "16", 0),
    (".", "16", 0),
    (r"2 \sqrt { 221 }", r"2\sqrt{221}", 1),
    ("Yes", "yes", 1),
    ("the cat.", "The Cat", 1),
    ("act", "cat", 0),
    ("god", "dog", 0),
    ("red", "blue", 0),
    (r"\text{red}", "red", 1),
    ("A", "A", 1),
    ("a.", "A", 1),
    ("B", "A", 0),
    ("x+ y", "x + y", 1),
    ("１６", "16", 0),
    ("٤", "4", 0),
    ("9" * 999, "9" * 999, 1),
    ("9" * 1001, "9" * 1001, 0),
    ("1_000", "1000", 0),
    ("1e3", "1e3", 1),
    ("inf", "1", 0),
    ("nan", "nan", 1),
    ("1,23", "123", 0),
    ("30°", r"30^\circ", 1),
    ("漢字", "漢字", 1),
    ("\ud800", "\ud800", 1),
]


def both_ways(one, other):
    return [(one, other), (other, one)]


UNEARNED = [  # (given, true): of equal value to math-verify, and no answer in the form asked for
    ("3526*17", "59942"),
    (r"3526 \times 17", "59942"),
    (r"3526\cdot17", "59942"),
    ("10!", "3628800"),
    ("2^{10}", "1024"),
    ("2+2", "4"),
    ("(2+2)", "4"),
    ("8/2/2", "2"),
    ("1=16", "16"),
    ("3526*17=59942", "59942"),
    ("x=1=16", "16"),
    ("2024-01-02", "2021"),
    ("2021", "2024-01-02"),
    ("1/2/3", "1/6"),
    ("12:30", "12/30"),
    ("5 kg", "5 cm"),
    (r"5\text{ kg}", r"5\text{ cm}"),
    (r"5 \mathrm{kg}", "5 cm"),
    ("50%", "50"),
    ("50%", "0.5"),
    ("0.5", "50%"),
    (r"50\%", "0.5"),
    ("(1,2)", r"\{1,2\}"),
    ("(1,2)", "[1,2]"),
    (r"\left(1,2\right)", "[1,2]"),
    ("(1,2]", "(1,2)"),
    # unworked, in all kinds of typesetting
    ("3526∗17", "59942"),
    ("3526⋅17", "59942"),
    ("(3526)(17)", "59942"),
    (r"3526*17\quad", "59942"),
    (r"\displaystyle 3526*17", "59942"),
    (r"\text{}3526*17", "59942"),
    (r"3526 \times 17 \text{ }", "59942"),
    (r"\boxed{3526*17}", "59942"),
    (r"\mathbf{3526}*17", "59942"),
    ("Compute $3526*17$.", "59942"),
    (r"What is $3526 \times 17$?", "59942"),
    ("x=3526*17", "59942"),
    ("x=3526*17", "x=59942"),
    ("x+1=59943", "x=59942"),
    (r"\frac{3526*17}{1}", "59942"),
    (r"\dfrac{59942}{1}", "59942"),
    (r"\frac{\frac{119884}{2}}{1}", "59942"),
    ("|3526*17|", "59942"),
    (r"\lvert 3526*17\rvert", "59942"),
    (r"\sqrt{3526^2*17^2}", "59942"),
    ("59942+0", "59942"),
    ("59942+x-x", "59942"),
    ("59942*x/x", "59942"),
    ("-(-16)", "16"),
    (r"\sqrt2-(\sqrt2-16)", "16"),
    (r"(1+\sqrt2)(1-\sqrt2)", "-1"),
    (r"\frac{2+\sqrt2}{1+\sqrt2}", r"\sqrt2"),
    ("16e^0", "16"),
    (r"3526*17\text{ cm}", "59942"),
    ("3526*17 cm", "59942 cm"),
    ("3526*17 apples", "59942 apples"),
    (r"3526*17^\circ", r"59942^\circ"),
    ("3526*17 x", "59942 x"),
    ("(3526*17,1)", "(59942,1)"),
    (r"\{3526*17\}", r"\{59942\}"),
    (r"\int_0^1 2x dx", "1"),
    (r"\gcd(12,18)", "6"),
    (r"\binom{10}{3}", "120"),
    (r"\lfloor 16.5 \rfloor", "16"),
    (r"\log_2 1024", "10"),
    (r"\ln e", "1"),
    (r"\cos\pi", "-1"),
    (r"i^2", "-1"),
    ("|3-8|", "5"),
    (r"\sqrt{256}", "16"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\sqrt2\sqrt3", r"\sqrt6"),
    (r"2\pi+3\pi", r"5\pi"),
    (r"\frac{4\sqrt3}{2}", r"2\sqrt3"),
    (r"\frac{12}{18}", r"\frac{2}{3}"),
    ("12/18", "2/3"),
    (r"\frac{7052}{2}", "3526"),
    (r"\sin^2x+\cos^2x", "1"),
    ("1+1,2", "2,2"),
    # another unit, on either side
    *both_ways(r"5\text{ cm}^2", r"5\text{ cm}^3"),
    *both_ways("5 cm^2", "5 cm"),
    *both_ways("5 km/h", "5 m/s"),
    *both_ways(r"5\,\text{kg}", r"5\,\text{cm}"),
    *both_ways(r"\sqrt{5} cm", r"\sqrt{5} kg"),
    *both_ways(r"2\pi\text{ cm}", r"2\pi\text{ m}"),
    *both_ways(r"\frac{1}{2} cm", r"\frac{1}{2} kg"),
    *both_ways("5 square feet", "5 square meters"),
    *both_ways("3 hours 20 minutes", "3 hours 20 seconds"),
    *both_ways(r"30\text{ rad}", r"30^\circ"),
    *both_ways(r"30^\circ", r"30\text{ cm}"),
    *both_ways(r"\$5", "€5"),
    *both_ways("5x", "5"),
    *both_ways("10 percent", "0.1"),
    *both_ways("10 percent", "10"),
    *both_ways(r"10\text{ pct}", "10"),
    # dates, scores, ratios, sizes
    *both_ways("2023", "2024-01"),
    *both_ways("1", "3-2"),
    *both_ways("-1", "2–3"),
    *both_ways("1.25", "5:4"),
    *both_ways("10:8", "5:4"),
    *both_ways("20", r"5\times4"),
    *both_ways("1.10.2024", "1.1.2024"),
    *both_ways("1.20.3", "1.2.3"),
    # commas: between thousands, in decimals, and between two numbers
    *both_ways("1, 200", "1200"),
    *both_ways("1, 200", "1,200"),
    *both_ways("0,123", "123"),
    *both_ways("012,345", "12345"),
    *both_ways("1,05", "1,5"),
    *both_ways("1,05", "105"),
    *both_ways("2. 5", "2.5"),
    # words and signs that make another value, which may not be left out as a unit may
    *both_ways("5 million", "5"),
    *both_ways(r"5\text{ million}", "5"),
    *both_ways("5 million", "5 billion"),
    *both_ways("5 dozen", "5"),
    *both_ways("5 squared", "5"),
    *both_ways("5 thirds", "5"),
    *both_ways("5 and a half", "5"),
    *both_ways("5 or more", "5"),
    *both_ways("5 cm or more", "5"),
    *both_ways("5 per cent", "5"),
    *both_ways(r"y=\boxed{5x}", "y=5"),
    # units that differ in a capital
    *both_ways("5 MW", "5 mW"),
    *both_ways("5 MB", "5 Mb"),
    *both_ways(r"5\text{ MHz}", r"5\text{ mHz}"),
    *both_ways("$5", "£5"),
    *both_ways("$5", "5 cm"),
    *both_ways("-$5", "$5"),
    # numbers that differ by less than math-verify's rounding
    *both_ways("(0.0000001,1)", "(0.0000002,1)"),
    *both_ways("[0,0.333333]", r"[0,\frac{1}{3}]"),
    *both_ways("x<0.0000001", "x<0.0000002"),
    *both_ways("0.0000001", "10^{-9}"),
    *both_ways(r"\frac{\sqrt{6}}{5000000}", "0.0000002"),
    *both_ways(r"(0.0000001,1)", r"(\frac{\pi}{10000000},1)"),
    (r"\sqrt{1.5\cdot10^0}", r"1.5\cdot10^0"),
    (r"\sqrt{1\cdot10^0}", r"1\cdot10^0"),
    *both_ways("1+422525614103415744i", "1+422525614103415749i"),
    *both_ways(r"\{0.0000001\pi\}", r"\{0.0000002\pi\}"),
    *both_ways(r"\frac{2+9007199254740993\sqrt5}{3}", r"\frac{2+9007199254740992\sqrt5}{3}"),
    # other brackets, other members
    *both_ways("1,2", "(1,2)"),
    *both_ways("1,2", r"\{1,2\}"),
    *both_ways(r"x\in[1,2]", "(1,2)"),
    *both_ways(r"(1,2)\cup(3,4)", r"[1,2]\cup[3,4]"),
    *both_ways("x<2", r"x\le 2"),
    *both_ways("x<2", "2"),
    *both_ways("1,1", "1"),
    *both_ways("1,1,2", "1,2,2"),
    *both_ways(r"\{16\}", "16"),
    *both_ways("(2,1)", "(1,2)"),
    *both_ways("(1,234)", "1234"),
    *both_ways("y=5", "x=5"),
    *both_ways("x", "y"),
]
EARNED = [  # either way round, with and without math-verify
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"1\frac{1}{2}", "1.5"),
    (r"5\text{ cm}", "5 cm"),
    (r"100\,\text{m}^2", "100 m²"),
    (r"30^\circ", "30"),
    ("30°", r"30 \text{ degrees}"),
    ("5", "5 cm"),
    (r"\$5", "5"),
    (r"50\%", "50%"),
    ("50%", "50 percent"),
    ("1{,}234", "1,234"),
    (r"1,\!234", "1234"),
    (r"11,\! 111,\! 100", "11111100"),
    ("x=16", "16"),
    ("y=5", "5"),
    (r"x\in(1,2)", "(1,2)"),
    ("y+x", "x+y"),
    ("x^2+2x+1", "1+2x+x^2"),
    (r"2\pi r", r"2 \cdot \pi \cdot r"),
    (r"\frac{-\sqrt3}{2}", r"-\frac{\sqrt{3}}{2}"),
    ("(1, 2)", r"\left(1,2\right)"),
    (r"(2,\frac12)", "(2, 0.5)"),
    ("2,1", "1, 2"),
    (r"2\text{ and }1", "1, 2"),
    (r"2\pm\sqrt3", r"2-\sqrt3, 2+\sqrt3"),
    (r"\{2,1\}", r"\{1,2\}"),
    (r"x\leq 2", "2 >= x"),
    ("2^{100}", "2^100"),
    (r"\ln(2)", r"\ln 2"),
    (r"3526 \times 17", "3526*17"),
    (r"\text{(B)}", "B"),
    (r"\boxed{5}", "5"),
    ("(1,234)", "(1, 234.0)"),
    (r"\frac{1+\sqrt5}{2}", r"\frac{\sqrt{5}+1}{2}"),
    (r"2(1+\sqrt3)", r"(\sqrt{3}+1) \cdot 2"),
    # a period or a wrapping around another way to write it
    ("0.5.", r"\frac{1}{2}"),
    (r"$x = \boxed{0.5}$.", "1/2"),
    ("(2,1/2).", "(2, 0.5)"),
    (r"\textbf{(B)}", "B."),
    (r"\boxed{\text{No}}", "no"),
    (r"$5\$$.", r"\$5.00"),
    ("A and C", "C, A"),
    ("1 1/2", r"\frac{3}{2}"),
    (r"-1 \frac12", "-1 1/2"),
    (r"x^2\frac{1}{2}", r"\frac{1}{2}x^2"),
    (r"5\text{ cm}^{2}", r"5\text{ cm}^2"),
    ("5 KM", "5 km"),
    ("5 mL", "5 ml"),
    ("5 meters squared", "5 Meters Squared"),
    ("5.0 million", r"5\text{ million}"),
    ("5 per cent", r"5\%"),
    ("$5", r"\$5.00"),
    ("-$5", r"\$-5"),
    ("5 dollars", r"\$5"),
    (r"5\text{ euros}", "€5"),
    ("01.10.2024", "1.10.2024"),
]


@pytest.mark.parametrize(("given", "true"), UNEARNED)
def test_an_equal_value_in_another_form_earns_nothing(given, true):
    assert not same(given, true)


@pytest.mark.parametrize(("given", "true"), EARNED)
def test_one_value_in_another_dress_earns(given, true, without_math_verify):
    assert same(given, true) and same(true, given)


MATHS = [  # equal for math-verify only
    (r"2\sqrt{3}", r"\sqrt{12}", 1),
    ("2.2360679", r"\sqrt{5}", 1),
    ("(x+1)^2", "x^2+2x+1", 1),
    (r"\frac{ab}{2}", r"\frac12 ab", 1),
    ("2x-y+1=0", "y=2x+1", 1),
    ("2.236", r"\sqrt{5}", 0),
    ("0.070711", r"\frac{\sqrt2}{20}", 1),
    ("16, 17", "16", 0),
    ("$16$ or $17$", "16", 0),
    (r"16}\boxed{17", "16", 0),
    (r"\pm 16", "16", 0),
    ("(1,3)", "(1,2)", 0),
    (r"\frac{1}{", r"\frac{1}{2}", 0),
    ("__import__('os').abort()", "16", 0),
    ("\ud800", "16", 0),
    ("\0\n", r"\pi", 0),
    ("=16=", "16", 0),
]
FORMS = {  # how a response of each style gives an answer
    "tags": "<think>so</think><answer>{}</answer>",
    "boxed": r"<think>so</think> It is \boxed{{{}}}." + END,
}


@pytest.fixture(scope="module")
def styled(tmp_path_factory, dataset_cache):
    return styled_tasks(tmp_path_factory.mktemp("rows"))


def test_a_number_earns_where_the_true_answer_is_a_power_of_that_value(without_math_verify):
    assert same("1500", r"1.5\times10^3") and not same(r"1.5\times10^3", "1500")
    assert same("0.125", "2^{-3}") and not same("0.124", "2^{-3}")
    assert not same("1", "0^0") and not same("1", "9^{9^9}") and not same("1", r"\frac{1}{0^{2}}")


def asking(true):
    return Example(None, "q", "k", (), true)


def grade(task, given, true):
    """What a response that gives this answer earns."""
    return task.grade(asking(true), FORMS[task.style].format(given))


# ------------------------------------------------------------------------------ equal answers


@pytest.fixture
def without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(grading, "_MATH_VERIFY", lambda *_: pytest.fail("it was asked"))
    same.cache_clear()
    yield
    same.cache_clear()


@pytest.mark.parametrize("style", STYLES)
def test_the_strict_table(styled, style, without_math_verify):
    graded = [(given, true, grade(styled[style], given, true)) for given, true, _ in STRICT]
    assert graded == STRICT
    for answer, true, _ in MATHS[:5]:
        assert grade(styled[style], answer, true) == 0


@pytest.mark.parametrize("style", STYLES)
def test_the_table_with_math_verify(styled, style):
    pytest.importorskip("math_verify", reason="needs: pip install math-verify")
    rows = [*STRICT, *MATHS]
    if style == "boxed":  # a box ends where its braces balance
        rows = [row for row in rows if row[0].count("{") == row[0].count("}")]
    graded = [(given, true, grade(styled[style], given, true)) for given, true, _ in rows]
    assert graded == rows


@pytest.mark.parametrize(
    "answer, true, right",
    [
        ("17", "16", False),
        ("act", "cat", False),
        ("1/3", "0.33", False),
        ("$x$", "x", True),
        ("x" * 1001, "x", False),
    ],
)
def test_equal_texts_plain_numbers_and_words_ask_no_worker(monkeypatch, answer, true, right):
    monkeypatch.setattr(grading, "_MATH_VERIFY", lambda *_: pytest.fail("asked"))
    same.cache_clear()
    assert same(answer, true) is right


# ------------------------------------------------------------------- the answer in a response


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{16}", "16"),
        (r"\boxed{1}\boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("16", None),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"} \boxed{3} {", "3"),
        (r"{{\boxed{3}", "3"),
        (r"\boxed{a{b}", None),
        (r"\boxed{1}<end>\boxed{2}", "1"),
        (r"<end>\boxed{2}", None),
        (r"\boxed", None),
        (r"\boxed 5", None),
        ("", None),
        (r"\boxed {16 }", "16"),
        (r"\boxed{3}}{\boxed{4}", "4"),
        (r"\boxed{a \boxed{b} {c}", "b"),
        (r"<think>\boxed{1}</think>\boxed{2}</answer>", "2"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{1\}", None),
    ],
)
def test_the_last_complete_box(text, content):
    assert read_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        "}" * 99_999,
        r"\boxed{}" * 20_000,
        "{" * 99_999,
        r"\boxed" + " " * 99_999,
    ],
    ids=["opened", "closed", "whole", "braces", "blanks"],
)
def test_reading_a_box_takes_linear_time(text):
    start = time.perf_counter()
    read_boxed(text)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("text", ["<answer>16</answer>", "<think>a</think><answer> 16 </answer>"])
def test_tags_earn_by_the_rules_of_read_answer(styled, text):
    assert styled["tags"].grade(asking("16"), text) == 1


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{16}",
        "16",
        "<answer>16",
        "<think><answer>16</answer>",
        "<answer></answer>",
        "<end><answer>16</answer>",
        "<answer>15</answer><answer>16</answer>",
        "<answer>16<answer>16</answer>",
    ],
)
def test_tags_earn_nothing_against_the_rules_of_read_answer(styled, text):
    assert styled["tags"].grade(asking("16"), text) == 0


@given(latex_soup, st.one_of(st.sampled_from(["16", "cat", "x"]), latex_soup))
@example("$" * 1000, "16")
@example(r"\text{" * 160 + "}" * 160, "16")
@example("1" * 5000, "16")
@example("1/" + "0" * 900, "16")
def test_any_text_is_graded(styled, text, true):
    """Without math-verify, which has its own test: an exception would be ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "_MATH_VERIFY", lambda *_: False)
        assert same(text, true) in (True, False)
        assert same(true, true) or len(true) > grading.MAX_ANSWER
        for style, task in styled.items():
            assert task.grade(asking(true or "0"), text) in (0.0, 1.0)
            answer = task.read_answer(text)
            assert answer is None or isinstance(answer, str)
            response, reason = task.until_end(text)
            assert text.startswith(response) and task.until_end(response) == (response, reason)
            assert reason in ("", "end", "answer") and (style == "tags" or reason != "answer")
            assert task.check_steps(None, text) == task.step_spans(text) == []
            assert task.step_kinds(text) == []


# ----------------------------------------------------------------- copies, and mutated answers

numbers = st.integers(11, 99)
OPERATIONS = {  # how it is written, and what its value is
    "{a}*{b}": lambda a, b: a * b,
    r"{a} \times {b}": lambda a, b: a * b,
    r"({a})\cdot({b})": lambda a, b: a * b,
    "{a}⋅{b}": lambda a, b: a * b,
    "{a}+{b}": lambda a, b: a + b,
    "{b}+{a}+1": lambda a, b: a + b + 1,
    "|{a}-100*{b}|": lambda a, b: 100 * b - a,
    r"\frac{{{a}*{b}}}{{1}}": lambda a, b: a * b,
    r"\sqrt{{{a}^2*{b}^2}}": lambda a, b: a * b,
    "{a}^{{2}}": lambda a, b: a * a,
    r"\binom{{{a}}}{{2}}": lambda a, b: a * (a - 1) // 2,
    r"\left\lfloor \frac{{{a}}}{{3}} \right\rfloor + {b}": lambda a, b: a // 3 + b,
}
TYPESETTING = [
    *("{}", "${}$", "$${}$$", r"\({}\)", r"\[ {} \]", r"\boxed{{{}}}", r"\displaystyle {}"),
    *(r"\text{{}}{}", r"{}\quad", r"\left({}\right)", r"{}\text{{ cm}}", "x={}", "$x = {}$"),
]
PROSE = ["{}", "What is {}?", "Compute {}.", "Evaluate: {}", "{} = ?", "Let {}. Find $x$."]


@st.composite
def unworked(draw):
    """(a question that holds arithmetic, the arithmetic as it is set there, its value)"""
    operation = draw(st.sampled_from(sorted(OPERATIONS)))
    a, b = draw(numbers), draw(numbers)
    typeset = draw(st.sampled_from(TYPESETTING)).format(operation.format(a=a, b=b))
    question = draw(st.sampled_from(PROSE)).format(typeset)
    return question, typeset, OPERATIONS[operation](a, b)


@given(unworked(), st.data())
def test_a_copied_question_earns_nothing_whole_or_in_part(styled, asked, data):
    pytest.importorskip("math_verify", reason="needs: pip install math-verify")
    question, typeset, value = asked
    start = data.draw(st.integers(0, len(question)))
    part = question[start : data.draw(st.integers(start, len(question)))]
    for task in styled.values():
        example = Example(None, question, "k", (), str(value))
        for copied in (question, typeset, part):
            if copied.strip(" $.") != str(value):  # a part may be the value itself
                assert task.grade(example, FORMS[task.style].format(copied)) == 0
        assert task.grade(example, FORMS[task.style].format(value)) == 1


COPIES = [  # (question, true, copied): equal, but in the form that the question has
    ("Factor $x^2-1$.", "(x-1)(x+1)", "x^2-1"),
    ("Factor x^2-1.", "(x-1)(x+1)", "-1+x^2"),
    (r"Expand \((x+1)^2 = \)", "x^2+2x+1", "(x+1)^2"),
    (r"Rationalize $\frac{1}{\sqrt2}$.", r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}"),
    ("Write $0.5$ as a fraction.", r"\frac{1}{2}", "0.5"),
    (r"Simplify $\frac{12}{18}$.", r"\frac{2}{3}", r"\frac{12}{18}"),
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("question", "true", "copied"), COPIES)
def test_a_form_that_stands_in_the_question_earns_nothing(styled, style, question, true, copied):
    example = Example(None, question, "k", (), true)
    for answer, right in ((copied, 0), (question, 0), (true, 1)):
        assert styled[style].grade(example, FORMS[style].format(answer)) == right


@pytest.mark.parametrize(
    ("question", "true", "answer"),
    [
        ("AB is 5 cm long. And BC?", "5", "5 cm"),
        ("A coin lands heads with probability 0.5. Two tosses: one head?", r"\frac{1}{2}", "0.5"),
        ("P(A)=0.5, P(B)=0.25, disjoint. 1-P(A)-P(B)?", r"\frac{1}{4}", "0.25"),
        ("Is it A or B?", "a", "A"),
        ("What is x in $x=5.0$?", "5", "5"),
        (r"Is $\frac{1}{2}$ or $\frac{1}{3}$ more?", "1/2", r"\frac{1}{2}"),
    ],
)
def test_a_value_that_stands_in_the_question_earns_in_the_true_answers_form(
    styled, question, true, answer
):
    example = Example(None, question, "k", (), true)
    assert styled["tags"].grade(example, FORMS["tags"].format(answer)) == 1


values = st.one_of(
    st.integers(2, 999).map(str),
    st.integers(2, 99).map("0.{}1".format),
    st.integers(2, 99).map(r"\frac{{1}}{{{}}}".format),
    st.sampled_from([2, 3, 5, 6, 7, 10]).map(r"\sqrt{{{}}}".format),
    st.integers(2, 99).map(r"{}\pi".format),
)
MUTATIONS = {  # {what the true answer is made of a value: what it is mutated to}
    "{}": [
        "{}+0",
        r"1\cdot{}",
        r"\frac{{{}}}{{1}}",
        "{}+x-x",
        r"\sqrt{{({})^2}}",
        r"\left|{}\right|",
    ]
    + ["{0},{0}", r"\{{{}\}}", "[{}]", "{}%", r"{}\%", "{} percent", "{}=x=3", "({})^1", "{}:1"],
    "{} cm": ["{} kg", r"{}\text{{ m}}", "{} cm^2", "{} cm^3", "{}%", r"{}^\circ", "{}+0 cm"],
    "({},1)": ["[{},1]", "{},1", r"\{{{},1\}}", "({},1]", "({}+0,1)", "({},1,1)", "(1,1,{})"],
    r"\{{{},1\}}": ["({},1)", "{},1", r"\{{{},1,1\}}", r"\{{{}+0,1\}}", r"\{{{}\}}"],
    "x={}": ["x={}+0", "y={}", "x<{}", "2x=2*{}", "x={0}={0}", "x={}%"],
}
mutations = st.sampled_from([(kind, to) for kind, tos in MUTATIONS.items() for to in tos])


@given(values, mutations)
def test_a_mutated_true_answer_earns_nothing(styled, value, mutation):
    """With the real math-verify, where it is installed."""
    true, mutated = (form.format(value) for form in mutation)
    for style, task in styled.items():
        assert grade(task, mutated, true) == 0, (mutated, true)
        assert grade(task, f"  ${true}$. " if style == "tags" else true, true) == 1
