"""tasks/base.py: demonstrations, and steps whose rightness is known."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_responses import EXAMPLES, TASKS, mistakes, play, soup

from env import SegmentEnv
from tasks import ArrowPath, DiceSum, Example, TextSum

SIZES = (
    *TASKS,
    DiceSum(n=1),
    DiceSum(n=9),
    DiceSum(n=25),
    DiceSum(n=3, largest=3),
    ArrowPath(length=1, grid=2),
    ArrowPath(length=40, grid=3),
    ArrowPath(length=256, grid=9),
    TextSum(n=64, largest=999),
)


# ----------------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("task", SIZES, ids=str)
def test_a_flawless_demonstration_earns_one_and_fits_the_default_limits(task):
    rng = np.random.default_rng(0)
    for index in range(15):
        one = task.example_at(index)
        text = task.demonstrate(one, rng)
        assert task.grade(one, text) == 1
        assert text.isascii() and text.isprintable() and text.endswith("</answer>")
        assert one.steps == tuple(text[start:end] for start, end in task.step_spans(text))
        assert one.steps[-1] == one.answer
        assert task.check_steps(one, text) == [True] * len(one.steps)
    episode = SegmentEnv(task, max_segments=2048)
    (_, reward, terminated, _, _), _ = play(episode, text, list(text), index=index)
    assert reward == 1 and terminated and len(episode.example.question) <= 512


def flawless(task):
    """(example, its demonstration)"""
    one = task.example_at(0)
    return one, task.demonstrate(one, np.random.default_rng(0))


def test_the_canonical_response_to_dice_is_as_documented():
    one, text = flawless(DiceSum())
    a, b, c, d = map(int, one.content[0])
    sums = f"{a}+{b}={a + b};{a + b}+{c}={a + b + c};{a + b + c}+{d}={a + b + c + d}"
    answer = f"<answer>{a + b + c + d}</answer>"
    assert text == f"<see>{a}{b}{c}{d}</see><think>{sums}</think>{answer}"


def test_the_canonical_response_to_arrows_is_as_documented():
    _, text = flawless(ArrowPath())
    cell, move = "[A-D][1-4]", "[RLUD][A-D][1-4]"
    think = f"<think>({move};){{7}}{move}</think>"
    assert re.fullmatch(f"<see>{cell}</see>{think}<answer>{cell}</answer>", text)


def test_the_canonical_response_to_numbers_is_as_documented():
    _, text = flawless(TextSum())
    assert re.fullmatch(r"<think>(\d+\+\d=\d+;){2}\d+\+\d=\d+</think><answer>\d+</answer>", text)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_at_error_rate_one_every_step_is_wrong_and_still_of_the_right_form(task):
    for one, text in mistakes(task, 50, 1.0):
        assert task.check_steps(one, text) == [False] * len(one.steps)
        assert re.fullmatch(task.form, text)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_each_step_is_wrong_with_the_probability_asked_for(task):
    checks = [task.check_steps(one, text) for one, text in mistakes(task, 800, 0.2)]
    wrong = ~np.array(checks)  # (examples, steps)
    assert np.abs(wrong.mean(axis=0) - 0.2).max() < 0.06 and abs(wrong.mean() - 0.2) < 0.02
    # Slips are independent: what follows one is carried on consistently, not wrong because of it.
    after_a_slip = wrong[:, 1:][wrong[:, :-1]]  # (slips before the last step,)
    assert abs(after_a_slip.mean() - 0.2) < 0.05


# ---------------------------------------------------------------------- checked as if by hand


def checks_of_a_sum(one, text):
    """What is right in a demonstration of sums, by splitting the string, without our parser."""
    see = re.search("<see>(.*)</see>", text)
    moves, answer = re.search("<think>(.*)</think><answer>(.*)</answer>", text).groups()
    true = [int(number) for number in one.content[0]]
    known = [int(number) for number in see[1]] if see else true
    checks = [a == b for a, b in zip(true, known, strict=True)] if see else []
    total = known[0]
    for number, move in zip(known[1:], moves.split(";"), strict=True):
        checks.append(move == f"{total}+{number}={total + number}")
        total = int(move.split("=")[1])
    return [*checks, answer == str(total)]


def checks_of_a_path(one, text):
    """The same for a path."""
    start_read = re.search("<see>(.*)</see>", text)[1]
    moves, answer = re.search("<think>(.*)</think><answer>(.*)</answer>", text).groups()
    (start,), arrows = one.content
    here = start_read
    checks = [here == start]
    for move in moves.split(";"):
        column, row = here
        columns, rows = {"R": (1, 0), "L": (-1, 0), "U": (0, -1), "D": (0, 1)}[arrows[here]]
        checks.append(move == f"{arrows[here]}{chr(ord(column) + columns)}{int(row) + rows}")
        here = move[1:]
    return [*checks, answer == here]


@pytest.mark.parametrize(
    "task", [DiceSum(), DiceSum(n=9), TextSum(), TextSum(n=5, largest=60)], ids=str
)
def test_sums_are_checked_as_by_hand_and_a_single_slip_always_costs_the_reward(task):
    singles = 0
    for one, text in mistakes(task, 300, 0.15):
        checks, grade = task.check_steps(one, text), task.grade(one, text)
        assert checks == checks_of_a_sum(one, text)
        assert grade == 1 or not all(checks)
        if checks.count(False) == 1:  # two slips can cancel
            singles += 1
            assert grade == 0
    assert singles > 20


@pytest.mark.parametrize("task", [ArrowPath(), ArrowPath(20, grid=5)], ids=str)
def test_paths_are_checked_as_by_hand(task):
    for one, text in mistakes(task, 300, 0.15):
        checks, grade = task.check_steps(one, text), task.grade(one, text)
        assert checks == checks_of_a_path(one, text)
        assert grade == 1 or not all(checks)


def as_checks(marks):
    return [mark == "1" for mark in marks if mark != " "]


SUMS = {  # response: its reads, additions and answer
    "<see>3526</see><think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>": "1111 111 1",
    # one misread die
    "<see>3426</see><think>3+4=7;7+2=9;9+6=15</think><answer>15</answer>": "1011 111 1",
    # read 4, added 5
    "<see>3426</see><think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>": "1011 011 1",
    # one wrong sum
    "<see>3526</see><think>3+5=9;9+2=11;11+6=17</think><answer>17</answer>": "1111 011 1",
    # stopped early
    "<see>3526</see><think>3+5=8;8+2=10</think><answer>10</answer>": "1111 11 0",
    # a die overlooked
    "<see>352</see><think>3+5=8;8+2=10</think><answer>10</answer>": "111 11 0",
    "<see>35266</see><think>3+5=8": "11110",
    "<see>3": "1",
    "<think>3+5=8;": "0",
    "": "",
    # a stray item takes the place of the second addition
    "<see>3526</see><think>3+5=8;?;8+2=10;": "1111 100",
    "<see>3526</see><think>03+5=8;": "1111 0",
    "<see>3526</see><think>3+5=08;": "1111 0",
    # what is read after thinking cannot have been used
    "<think>3+5=8;</think><see>3526</see>": "0",
    "<answer>16</answer>": "0",
    "<see>3526<think>3+5=8<answer>": "1111 1",
    "<answer>1<think>3+5=8;</answer>": "0",
}


@pytest.mark.parametrize("text, marks", SUMS.items())
def test_local_rightness_on_one_response_worked_by_hand(text, marks):
    one = Example(None, "Sum the dice.", "", (("3", "5", "2", "6"),), "16")
    assert DiceSum().check_steps(one, text) == as_checks(marks)


KINDS = {  # response: the kinds of its steps
    "<see>3526</see><think>3+5=8;?;8+2": "read read read read move move",
    "<see>35<think>3+5=8;</think><answer>8</answer>": "read read move answer",
    "<think>3+5=8;</think><see>3526</see><answer></answer>": "move answer",
    "": "",
}


@pytest.mark.parametrize("text, kinds", KINDS.items())
def test_a_step_is_a_read_a_move_or_the_answer(text, kinds):
    assert DiceSum().step_kinds(text) == kinds.split()
    assert len(DiceSum().step_spans(text)) == len(kinds.split())


PATHS = {  # response: its read, moves and answer
    "<see>A1</see><think>RB1;DB2</think><answer>B2</answer>": "1 11 1",
    # one wrong start
    "<see>B1</see><think>DB2;LA2</think><answer>A2</answer>": "0 11 1",
    # one arrow misread
    "<see>A1</see><think>DA2;UA1</think><answer>A1</answer>": "1 01 1",
    # read well, moved elsewhere
    "<see>A1</see><think>RA2;UA1</think><answer>A1</answer>": "1 01 1",
    # one move too many
    "<see>A1</see><think>RB1;DB2;LA2</think><answer>A2</answer>": "1 110 0",
    # one too few
    "<see>A1</see><think>RB1</think><answer>B1</answer>": "1 1 0",
    "<see>A1</see><think>RB1;DB2</think><answer>B1</answer>": "1 11 0",
    "<see>A1</see><think>RC1;RD1;": "1 00",
    "<see>A1B1</see><think>RB1;": "10 1",
    "<see>A1B</see>": "10",
    "<see>A": "",
    "<see>A1": "1",
    "<see>A1</see><think>RB1;DB2": "1 1",
    "<think>RB1;": "0",
}


@pytest.mark.parametrize("text, marks", PATHS.items())
def test_local_rightness_on_one_path_worked_by_hand(text, marks):
    """A   B
    1  R > D
    2  U < L      from A1, two arrows: R to B1, D to B2."""
    arrows = {"A1": "R", "B1": "D", "A2": "U", "B2": "L"}
    one = Example(None, "Follow 2 arrows.", "", (("A1",), arrows), "B2")
    assert ArrowPath(length=2, grid=2).check_steps(one, text) == as_checks(marks)


@given(st.data())
def test_a_longer_response_only_adds_steps(data):
    task = data.draw(st.sampled_from(TASKS))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    noisy = task.demonstrate(EXAMPLES[task], rng, 0.3)
    begun = st.builds("{1}{0}".format, soup, st.just(noisy[:30]))
    text = data.draw(st.one_of(st.just(noisy), soup, begun))
    at = data.draw(st.integers(0, len(text)))
    spans, shorter = task.step_spans(text), task.step_spans(text[:at])
    assert shorter == spans[: len(shorter)]
    checks = task.check_steps(EXAMPLES[task], text)
    assert task.check_steps(EXAMPLES[task], text[:at]) == checks[: len(shorter)]
