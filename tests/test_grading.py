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
]


@pytest.mark.parametrize(("given", "true"), UNEARNED)
def test_an_equal_value_in_another_form_earns_nothing(given, true):
    assert not same(given, true)


MATHS = [  # equal for math-verify only
    (r"\frac{1}{2}", "0.5", 1),
    (r"\frac12", r"\frac{1}{2}", 1),
    (r"x=16", "16", 1),
    (r"2\sqrt{3}", r"\sqrt{12}", 1),
    ("y+x", "x+y", 1),
    (r"30^\circ", "30", 1),
    ("30°", "30", 1),
    (r"2\pi r", r"2 \cdot \pi \cdot r", 1),
    ("2.2360679", r"\sqrt{5}", 1),
    ("(1, 2)", r"\left(1,2\right)", 1),
    ("2.236", r"\sqrt{5}", 0),
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
        for style, task in styled.items():
            assert task.grade(asking(true or "0"), text) in (0.0, 1.0)
            answer = task.read_answer(text)
            assert answer is None or isinstance(answer, str)
            response, reason = task.until_end(text)
            assert text.startswith(response) and task.until_end(response) == (response, reason)
            assert reason in ("", "end", "answer") and (style == "tags" or reason != "answer")
            assert task.check_steps(None, text) == task.step_spans(text) == []
