"""tasks/base.py and the three tasks: examples, splits, and grading that cannot be tricked."""

import copy
import random

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from task_responses import EXAMPLES, SCRAPS, TASKS, play, soup

from env import SegmentEnv
from tasks import END, SPLITS, TAGS, ArrowPath, DiceSum, Example, TextSum, until_end

EPISODES = {task: SegmentEnv(task, max_chars=20_000) for task in TASKS}


# ------------------------------------------------------------------------ examples and splits


@pytest.mark.parametrize("task", [*TASKS, DiceSum(n=2), ArrowPath(length=2, grid=2)], ids=str)
def test_splits_share_no_content_and_examples_are_pure_functions_of_their_index(task):
    keys = {}
    for split in SPLITS:
        keys[split] = {task.example_at(index, split).key for index in range(250)}
    assert keys["train"] and keys["eval"] and not keys["train"] & keys["eval"]
    again = copy.deepcopy(task).example_at(17, "eval")
    assert again == task.example_at(17, "eval") and again != task.example_at(18, "eval")


def test_one_example_in_five_is_held_out():
    task = TextSum(n=8)
    held_out = 0
    for index in range(1000):  # asking for "eval" skips what the same generator draws for "train"
        any_split = task.sample(np.random.default_rng(index))
        asked = task.sample(np.random.default_rng(index), "eval")
        held_out += any_split.key == asked.key
    assert 150 < held_out < 250


def test_examples_are_the_same_on_every_machine():
    """Pinned: a change here silently changes every published number."""
    answers = [(task.example_at(0).answer, task.example_at(1, "eval").answer) for task in TASKS]
    assert answers == [("15", "16"), ("C2", "D1"), ("17", "21")]


def test_a_split_that_is_empty_is_a_clear_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="too small.*eval"):
        TextSum(n=1, largest=2).example_at(0, "eval")
    with pytest.raises(ValueError, match="split"):
        DiceSum().example_at(0, None)


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_drawn_tasks_are_endless(task, split):
    assert task.size(split) is None


def test_paths_run_through_fresh_cells_and_never_leave_the_grid():
    task = ArrowPath()
    are_fresh = []
    for index in range(200):
        path = task.example_at(index)
        (start,), arrows = path.content
        assert all(arrow in task.roads[cell] for cell, arrow in arrows.items())
        cells = [step[-2:] for step in path.steps[:-1]]
        are_fresh.append(len(set(cells)) == 9)
        assert cells[0] == start and path.answer == cells[-1]
    assert np.mean(are_fresh) > 0.98


def test_a_path_too_long_for_its_grid_ends_in_a_loop_not_in_a_ping_pong():
    for index in range(30):
        steps = ArrowPath(length=100, grid=4).example_at(index).steps
        last_cells = {step[-2:] for step in steps[-40:-1]}
        assert len(last_cells) >= 4


@pytest.mark.parametrize("kind", [DiceSum, ArrowPath, TextSum])
def test_verbosity_adds_words_and_no_decisions(kind):
    """The same examples, decisions and checks, with so many words more before every move."""
    plain, wordy = kind(), kind(verbosity=20)
    for index in range(5):
        one = plain.example_at(index)
        assert wordy.example_at(index).content == one.content
        short, long = (
            task.demonstrate(one, np.random.default_rng(index), 0.3) for task in (plain, wordy)
        )
        assert long.count(" ") - short.count(" ") == 20 * plain.move_count
        short_steps = [short[start:end] for start, end in wordy.step_spans(short)]
        long_steps = [long[start:end] for start, end in wordy.step_spans(long)]
        assert short_steps == long_steps
        assert wordy.check_steps(one, short) == wordy.check_steps(one, long)
        assert wordy.grade(one, wordy.demonstrate(one, np.random.default_rng(0))) == 1
    with pytest.raises(ValueError, match="verbosity=-1"):
        kind(verbosity=-1)


# ---------------------------------------------------------------- a teacher with bad habits


def example_with(task, is_wanted):
    """The first training example whose content is wanted."""
    return next(
        example for example in map(task.example_at, range(3000)) if is_wanted(example.content)
    )


def test_the_teacher_of_dice_takes_sixes_for_fives_and_forgets_the_carry():
    task = DiceSum(n=3, habits=1.0)
    one = example_with(task, lambda content: content[0] == ("6", "4", "6"))
    expected = "<see>545</see><think>5+4=9;9+5=4</think><answer>4</answer>"
    assert task.demonstrate(one, np.random.default_rng(0)) == expected
    assert task.check_steps(one, expected) == [False, True, False, True, False, True]


def test_the_teacher_of_sums_forgets_the_carry_and_only_that():
    task = TextSum(n=3, largest=30, habits=1.0)
    one = example_with(task, lambda content: int(content[0][0]) % 10 == 8 and content[0][1] == "13")
    first, last = int(one.content[0][0]), int(one.content[0][2])
    wrong = first + 3  # 8+13 is 21, less the ten that is carried
    total = wrong + last - (10 if wrong % 10 + last % 10 >= 10 else 0)
    text = task.demonstrate(one, np.random.default_rng(0))
    assert f"<think>{first}+13={wrong};{wrong}+{last}={total}</think>" in text


def test_the_teacher_of_arrows_goes_down_where_an_arrow_points_up():
    task = ArrowPath(habits=1.0)
    wrong = 0
    for index in range(30):
        one = task.example_at(index)
        text = task.demonstrate(one, np.random.default_rng(index))
        (start,), arrows = one.content
        cell = start
        for first, end in task.step_spans(text)[1:-1]:
            move = text[first:end]
            if arrows[cell] == "U" and "D" in task.roads[cell]:
                assert move == "D" + task.roads[cell]["D"]
                wrong += 1
            else:
                assert move == arrows[cell] + task.roads[cell][arrows[cell]]
            cell = move[-2:]
    assert wrong > 30


@pytest.mark.parametrize("kind", [DiceSum, ArrowPath, TextSum])
def test_habits_change_the_demonstrations_and_nothing_else(kind):
    """The same examples and true steps; where no habit applied, the same text."""
    plain, fallible = kind(), kind(habits=1.0)
    unlike = 0
    for index in range(40):
        one = plain.example_at(index)
        other = fallible.example_at(index)
        assert (one.content, one.answer, one.steps) == (other.content, other.answer, other.steps)
        text = fallible.demonstrate(other, np.random.default_rng(index))
        is_right = text == plain.demonstrate(one, np.random.default_rng(index))
        assert is_right == all(fallible.check_steps(other, text))
        unlike += not is_right
    assert unlike > 20


@pytest.mark.parametrize(
    "task, content, text, hard",
    [
        (
            DiceSum(n=3),
            (("6", "5", "1"),),
            "<see>651</see><think>6+5=11;11+1=12</think><answer>12</answer>",
            [True, False, False, True, False, False],
        ),
        (
            DiceSum(
                n=3
            ),  # the six was read as a five: what follows is hard or not as it is written
            (("6", "5", "1"),),
            "<see>551</see><think>5+5=10;10+1=13</think><answer>13</answer>",
            [True, False, False, True, False, False],
        ),
        (
            TextSum(n=3),
            (("8", "1", "1"),),
            "<think>8+1=9;9+1=0;3+3=6</think><answer>6</answer>",  # one move too many
            [False, True, False, False],
        ),
        (
            DiceSum(n=2),  # what was read is no number, though it looks like a part of a move
            (("6", "5"),),
            "<see>==</see><think>x;</think><answer>1</answer>",
            [True, False, False, False],
        ),
    ],
)
def test_hard_steps_are_those_where_a_habit_would_win(task, content, text, hard):
    """Whatever was written there, and with no habit set; a step that nothing can make right is not
    hard."""
    example = Example(None, "", "", content)
    assert task.hard_steps(example, text) == hard


def test_with_no_hard_step_a_teacher_of_habits_is_right():
    """And with one it is wrong: its demonstrations at habits 1 are judged by their own steps."""
    rng = np.random.default_rng(0)
    for task in (DiceSum(habits=1.0), TextSum(habits=1.0), ArrowPath(habits=1.0)):
        for index in range(100):
            example = task.example_at(index)
            text = task.demonstrate(example, rng)
            wrong = [not right for right in task.check_steps(example, text)]
            assert wrong == task.hard_steps(example, text)


def test_a_habit_wins_as_often_as_it_is_told():
    task = DiceSum(n=1, habits=0.65)
    one = example_with(task, lambda content: content[0] == ("6",))
    rng = np.random.default_rng(0)
    reads = [task.demonstrate(one, rng)[len("<see>")] for _ in range(2000)]
    assert set(reads) == {"5", "6"} and abs(np.mean([read == "5" for read in reads]) - 0.65) < 0.04


@pytest.mark.parametrize("habits", [-0.1, 1.1, float("nan"), "often", True, None])
def test_habits_that_are_no_share_are_refused(habits):
    with pytest.raises(ValueError, match="habits="):
        DiceSum(habits=habits)


# ------------------------------------------------------------------- ends, and what is earned


@given(soup)
def test_nothing_is_written_after_the_first_end(text):
    response, reason = until_end(text)
    assert text.startswith(response) and until_end(response) == (response, reason)
    for at in range(max(0, len(response) - 30), len(response)):
        assert until_end(response[:at])[1] == ""
    assert reason or response == text


def test_grading_is_exact_and_single_valued():
    task = TextSum()
    one = task.example_at(0)
    a = one.answer
    full_width = "".join(chr(ord(digit) + 0xFEE0) for digit in a)
    close = f"{a}</answer>"
    good = (
        f"<answer>{a}</answer>",
        f"<answer> {a}\n</answer>",
        f"I think <answer>{a}</answer>",
        f"<think></think><answer>{a}</answer>{END}",
        f"<answer>{a}</answer> trailing",
    )
    bad = (
        "",
        a,
        f"<answer>{a}",
        close,
        "<answer></answer>",
        f"<answer>it is {close}",
        f"<answer>{a} {close}",
        f"<answer>17 {close}",
        f"<answer>0{close}",
        f"<answer>+{close}",
        f"<answer>{a}.0</answer>",
        f"<answer>{full_width}</answer>",
        f"<answer>{a}\0</answer>",
        f"<answer>\u3000{close}",
        f"<answer><answer>{close}",
        f"<answer><answer>{close}</answer>",
        f"</answer><answer>{close}",
        f"<answer>{close}<answer>{close}",
        f"<answer>1</answer><answer>{close}",
        f"<answer>{close}<answer>1</answer>",
        f"{END}<answer>{close}",
        f"<answer>{a}{END}</answer>",
        f"<think><answer>{close}</think>",
        f"<think>so <answer>{close}",
        f"<see><answer>{close}",
        f"<Answer>{close}",
        f"<answer >{close}",
        f"<answer>{'9' * 10000}</answer>",
        f"<answer>\ud800{close}",
    )
    for text in good:
        assert task.grade(one, text) == 1.0, text
    for text in bad:
        assert task.grade(one, text) == 0.0, text


def grade_by_hand(text, answer):
    """Plain loops over the text instead of finds and counts: what the contract says, in order."""
    opened, closed, ended, content, at = 0, 0, False, "", 0
    open_blocks = {"see": False, "think": False}
    while at < len(text):
        marks = [mark for mark in (*TAGS, END) if text[at : at + len(mark)] == mark]
        mark = marks[0] if marks else text[at]
        if not ended and opened and mark != "</answer>":
            content += mark
        if mark == "<answer>":
            opened += 1
        elif mark == "</answer>":
            closed += 1
            ended = ended or opened > 0
        elif not ended and mark == END:
            return 0.0
        elif not opened and mark[1:-1] in open_blocks:
            open_blocks[mark[1:-1]] = True
        elif not opened and mark[2:-1] in open_blocks and mark[:2] == "</":
            open_blocks[mark[2:-1]] = False
        at += len(mark)
    is_single = opened == closed == 1 and ended
    is_nested = any(open_blocks.values())
    return float(is_single and not is_nested and content.strip(" \t\r\n") == answer)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_many_quick_soups_earn_what_they_should(task):
    """20 times as many as Hypothesis draws elsewhere: a case takes microseconds here."""
    draw, one = random.Random(str(task)), EXAMPLES[task]
    scraps = [*SCRAPS, *[f"<answer>{one.answer}</answer>", one.answer] * 4]
    earned = 0
    for _ in range(20 * settings.default.max_examples):
        text = "".join(draw.choices(scraps, k=draw.randrange(9)))
        grade = task.grade(one, text)
        assert grade == grade_by_hand(text, one.answer), text
        earned += grade
    assert earned > 0


contents = st.sampled_from(["@", " @ ", "@@", "@\0"])  # @ stands for the true answer
answered = st.builds("{}<answer>{}</answer>{}".format, soup, contents, soup)
NINES = "9" * 5000


@settings(max_examples=2000)
@given(st.one_of(soup, st.text(max_size=40), answered), st.sampled_from(TASKS))
@example("<answer><answer>@</answer>", TASKS[0])
@example("<think></think></think><think><answer>@</answer>", TASKS[0])
@example(f"\0<answer>{NINES}</answer>", TASKS[2])
@example("<see>²²</see><think>²+²=4;2+²=4</think><answer>4</answer>", TASKS[0])
@example(f"<see>3</see><think>3+5={NINES};{NINES}+1=2</think><answer>4</answer>", TASKS[2])
def test_2000_random_strings_never_raise_and_never_earn_what_they_should_not(text, task):
    one = EXAMPLES[task]
    text = text.replace("@", one.answer)
    grade = task.grade(one, text)
    assert grade == grade_by_hand(text, one.answer)
    event(f"earned {grade}")
    (_, reward, _, _, info), _ = play(EPISODES[task], text, index=3)
    assert reward == task.grade(one, until_end(text)[0])
    assert reward == 0 or info["predicted"] == one.answer
    checks, spans = task.check_steps(one, text), task.step_spans(text)
    assert len(checks) == len(spans) and info["steps_correct"] == checks
    hard = task.hard_steps(one, text)
    assert len(hard) == len(spans) and all(type(value) is bool for value in (*checks, *hard))
    assert all(0 <= start <= end <= len(text) for start, end in spans) and spans == sorted(spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    if all(checks) and info["end_reason"] == "answer":  # all steps right, the answer among them
        assert reward == 1
