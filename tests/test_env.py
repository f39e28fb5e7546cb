"""env.py: the Gymnasium contract, grading that cannot be tricked, and steps whose rightness is known."""

import copy
import json
import re
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import env
from env import END, ArrowPath, DiceSum, SegmentEnv, TextSum, cut

IDS = ("SAPO/DiceSum-v0", "SAPO/ArrowPath-v0", "SAPO/TextSum-v0")
TASKS = (DiceSum(), ArrowPath(), TextSum())
EXAMPLES = {task: task.example_at(3) for task in TASKS}
EPISODES = {task: SegmentEnv(task, max_chars=20_000) for task in TASKS}
INFO_KEYS = {"example_id", "answer", "predicted", "correct", "segment_index", "segment_text", "reward_terms",
             "end_reason", "steps_correct"}

# Text that looks like an attack on the grader: tags, halves of tags, true and false contents, digits of other scripts.
SCRAPS = [*env.TAGS, END, "<answer>", "</answer>", "<", ">", "</", "answer>", "<end", "16", "B2", "C3", "3526",
          "3+5=8;", "8+2=10;", "10+6=16", "RC2;", "DC3", " ", "\n", "\0", "１６", "٣", "²", "9" * 20, "-", "0"]
soup = st.lists(st.one_of(st.sampled_from(SCRAPS), st.text(max_size=4)), max_size=12).map("".join)


def play(episode, text, pieces=None, **options):
    """Reset, then write the text in the given pieces (default: as one); returns the last step and the total reward."""
    episode.reset(options=options)
    total, last = 0.0, None
    for piece in [text] if pieces is None else pieces:
        last = episode.step(piece)
        total += last[1]
        if last[2] or last[3]:
            break
    return last, total


def mistakes(task, count, error_rate, start=0):
    """(example, demonstration) pairs with slips."""
    rng = np.random.default_rng(start)
    for index in range(start, start + count):
        one = task.example_at(index)
        yield one, task.demonstrate(one, rng, error_rate)


# ------------------------------------------------------------------------------------------- Gymnasium's contract
@pytest.mark.parametrize("name", IDS)
def test_check_env_passes_without_a_warning(name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(name).unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_a_default_gym_make_episode_gives_no_warning_and_the_same_info_keys(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        episode = gym.make(name)
        observation, info = episode.reset(seed=5)
        assert set(info) == INFO_KEYS and info["predicted"] is None and not info["correct"] and info["end_reason"] == ""
        unwrapped = episode.unwrapped
        text = unwrapped.task.demonstrate(unwrapped.example, np.random.default_rng(0))
        for i, char in enumerate(text, start=1):
            observation, reward, terminated, truncated, info = episode.step(char)
            assert set(info) == INFO_KEYS and info["segment_index"] == observation["segment_index"] == i
            assert observation in episode.observation_space and info["segment_text"] == char
            assert (reward, terminated) == ((1.0, True) if i == len(text) else (0.0, False)) and not truncated
        assert info["correct"] and info["predicted"] == info["answer"] and info["end_reason"] == "answer"
        assert info["reward_terms"] == {"answer": 1.0, "format": 0.0} and all(info["steps_correct"])
        assert unwrapped.response == observation["response"] == text


@pytest.mark.parametrize("name", IDS)
def test_same_seed_same_episode(name):
    one, two = gym.make(name), gym.make(name)
    first = [one.reset(seed=7), one.reset(), one.reset()]
    second = [two.reset(seed=7), two.reset(), two.reset()]
    for (seen, info), (seen_again, info_again) in zip(first, second, strict=True):
        assert info == info_again and seen.keys() == seen_again.keys()
        assert all(np.array_equal(seen[key], seen_again[key]) for key in seen)
    ids = {one.reset(seed=seed)[1]["example_id"] for seed in range(20)}
    assert len(ids) == 20 and all(episode_id.startswith("train/") for episode_id in ids)


def test_a_spec_survives_json_and_settings_reach_the_task():
    episode = gym.make("SAPO/DiceSum-v0", n=9, max_segments=77, max_chars=99, format_reward=0.25)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(json.dumps(json.loads(episode.spec.to_json()))))
    for unwrapped in (episode.unwrapped, again.unwrapped):
        assert unwrapped.task == DiceSum(n=9) and unwrapped.observation_space["image"].shape == (48, 48, 3)
        assert (unwrapped.max_segments, unwrapped.max_chars, unwrapped.format_reward) == (77, 99, 0.25)
    assert SegmentEnv(ArrowPath(length=3)).task.length == 3


def test_shapes_and_prompts_of_the_defaults():
    shapes = {"SAPO/DiceSum-v0": (32, 32, 3), "SAPO/ArrowPath-v0": (64, 64, 3)}
    for name in IDS:
        observation, info = gym.make(name).reset(options={"index": 0})
        assert ("image" in observation) == (name in shapes)
        if name in shapes:
            assert observation["image"].shape == shapes[name] and observation["image"].dtype == np.uint8
    assert EXAMPLES[DiceSum()].question == "Sum the dice." and EXAMPLES[ArrowPath()].question == "Follow 8 arrows."
    assert re.fullmatch(r"Add \d \d \d \d\.", EXAMPLES[TextSum()].question)


def test_vector_environments_agree():
    """With shared memory Gymnasium would corrupt the texts: AsyncVectorEnv needs shared_memory=False."""
    make = [lambda: SegmentEnv("DiceSum")] * 2
    sync, background = gym.vector.SyncVectorEnv(make), gym.vector.AsyncVectorEnv(make, shared_memory=False)
    try:
        for ours, theirs in ((sync.reset(seed=3), background.reset(seed=3)),
                             *((sync.step(a), background.step(a)) for a in (("<see>é漢", ""), ("<answer>", "1\n2")))):
            assert ours[0].keys() == theirs[0].keys()
            assert np.array_equal(ours[0]["image"], theirs[0]["image"])
            assert np.array_equal(ours[0]["segment_index"], theirs[0]["segment_index"])
            assert ours[0]["prompt"] == theirs[0]["prompt"] and ours[0]["response"] == theirs[0]["response"]
        assert ours[0]["response"] == ("<see>é漢<answer>", "1\n2")
    finally:
        sync.close()
        background.close()


def test_observations_cannot_corrupt_the_environment():
    episode = SegmentEnv("DiceSum")
    first, info = episode.reset(options={"index": 1})
    kept = first["image"].copy()
    first["image"][:], first["response"] = 0, "spoilt"
    info["reward_terms"]["answer"], info["steps_correct"] = 9.0, None
    second, reward, _, _, info = episode.step("x")
    assert np.array_equal(second["image"], kept) and second["response"] == "x" and reward == 0
    assert np.array_equal(episode.reset(options={"index": 1})[0]["image"], kept) and info["reward_terms"]["answer"] == 0


def test_the_answer_is_never_observed_and_env_needs_no_torch():
    for name in IDS:
        episode = gym.make(name).unwrapped
        observation, _ = episode.reset(options={"index": 2})
        assert set(observation) <= {"image", "prompt", "response", "segment_index"} and observation["response"] == ""
        assert episode.example.answer not in observation["prompt"].replace("8 arrows", "").split()
    check = "import env, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=env.__file__.rpartition("env.py")[0] or ".")


def test_an_episode_can_be_copied_and_the_copies_part_ways():
    episode = SegmentEnv("TextSum")
    episode.reset(options={"index": 0})
    episode.step("<think>")
    other = copy.deepcopy(episode)
    episode.step("a")
    other.step("b")
    assert episode.response == "<think>a" and other.response == "<think>b"


# ------------------------------------------------------------------------------------------------- reset and step
def test_options_choose_the_example_the_split_and_the_beginning():
    episode = SegmentEnv("DiceSum")
    for split in env.SPLITS:
        _, info = episode.reset(options={"index": np.int64(4), "split": split})
        assert info["example_id"] == f"{split}/4" and episode.example == episode.task.example_at(4, split)
    seen, info = episode.reset(options={"index": 4, "response": "<see>35"})
    assert seen["response"] == "<see>35" and seen["segment_index"] == 0 and len(info["steps_correct"]) == 2
    episode.reset(seed=1, options={"split": "eval"})
    assert episode.example_id.startswith("eval/")


@pytest.mark.parametrize("options, named", [
    ({"idx": 1}, "idx"), ([1], "options"), ("index", "options"), ({"index": -1}, "index"), ({"index": 1.0}, "index"),
    ({"index": True}, "index"), ({"index": "1"}, "index"), ({"split": "test"}, "split"), ({"split": None}, "split"),
    ({"split": []}, "split"), ({"response": None}, "response"), ({"response": b""}, "response"),
    ({"response": "<answer>1</answer>"}, "response"), ({"response": f"a{END}"}, "response"),
    ({"response": "x" * 2048}, "max_chars")])
def test_a_wrong_option_is_a_value_error_that_names_it(options, named):
    with pytest.raises(ValueError, match=named):
        SegmentEnv("DiceSum").reset(options=options)


def test_an_unknown_option_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"index.*split.*response"):
        SegmentEnv("DiceSum").reset(options={"idx": 1})


@given(st.data())
def test_resuming_from_a_prefix_is_as_if_it_had_just_been_written(data):
    task = data.draw(st.sampled_from(TASKS))
    text = task.demonstrate(EXAMPLES[task], np.random.default_rng(data.draw(st.integers(0, 99))), 0.2)
    at = data.draw(st.integers(0, len(text) - 1))
    episode = SegmentEnv(task)
    whole, total = play(episode, text, index=3)
    resumed, total_resumed = play(episode, text[at:], index=3, response=text[:at])
    assert total == total_resumed and whole[2] == resumed[2] and whole[0]["response"] == resumed[0]["response"]
    assert whole[4]["steps_correct"] == resumed[4]["steps_correct"]


def test_wrong_calls_are_refused_clearly():
    episode = SegmentEnv("DiceSum")
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        episode.step("a")
    episode.reset()
    for action in (None, 3, b"16", ["a"]):
        with pytest.raises(TypeError, match="str"):
            episode.step(action)
    assert episode.response == "" and episode.segments == []
    episode.step(f"{END}")
    with pytest.raises(gym.error.ResetNeeded, match="end"):
        episode.step("a")


@pytest.mark.parametrize("bad, named", [
    ({"task": "DiceSun"}, "DiceSun"), ({"task": None}, "None"), ({"render_mode": "ascii"}, "ascii"), ({"n": 0}, "n=0"),
    ({"n": 26}, "n=26"), ({"n": 4.0}, "n=4.0"), ({"n": True}, "n=True"), ({"largest": 7}, "largest=7"),
    ({"max_segments": 0}, "max_segments=0"), ({"max_chars": 0}, "max_chars=0"),
    ({"task": "ArrowPath", "grid": 10}, "grid=10"), ({"task": "ArrowPath", "grid": 1}, "grid=1"),
    ({"task": "ArrowPath", "length": 0}, "length=0"), ({"task": "TextSum", "n": 65}, "n=65")])
def test_wrong_settings_are_value_errors_with_the_value_seen(bad, named):
    with pytest.raises(ValueError, match=named):
        SegmentEnv(**bad)


def test_truncation_by_segments_and_by_characters_and_never_beside_termination():
    (seen, reward, terminated, truncated, info), _ = play(SegmentEnv("DiceSum", max_segments=3), "", ["a", "", "b"])
    assert (terminated, truncated, info["end_reason"], reward) == (False, True, "max_segments", 0)
    assert seen["segment_index"] == 3 and seen in SegmentEnv("DiceSum", max_segments=3).observation_space
    (seen, _, terminated, truncated, info), _ = play(SegmentEnv("DiceSum", max_chars=5), "abcdefgh")
    assert (terminated, truncated, info["end_reason"], seen["response"]) == (False, True, "max_chars", "abcde")
    answer = "<answer>1</answer>"  # an end exactly at both limits is an end, not a truncation
    for text, reason in ((answer, "answer"), ("x" * (len(answer) - len(END)) + END, "end")):
        tight = SegmentEnv("DiceSum", max_chars=len(answer), max_segments=1)
        (_, _, terminated, truncated, info), _ = play(tight, text)
        assert (terminated, truncated, info["end_reason"]) == (True, False, reason)


def test_the_end_mark_ends_without_an_answer_wherever_it_is_cut():
    for text in (f"<see>35{END}", f"<answer>16{END}</answer>", f"{END}<answer>16</answer>"):
        for at in range(len(text)):
            (seen, _, terminated, truncated, info), total = play(SegmentEnv("DiceSum"), text, [text[:at], text[at:]])
            assert terminated and not truncated and total == 0 and info["end_reason"] == "end"
            assert info["predicted"] is None and seen["response"] == text[:text.index(END) + len(END)]


def test_the_format_term_is_paid_only_if_asked_for_and_only_for_the_form():
    task = DiceSum()
    right = task.demonstrate(EXAMPLES[task], np.random.default_rng(0))
    wrong = right.replace("<answer>", "<answer>9")
    bare = right[right.index("<answer>"):]
    unclosed = right.replace("</answer>", END)
    for text, answer, form in ((right, 1, 1), (wrong, 0, 1), (bare, 1, 0), ("x" + right, 1, 0), (unclosed, 0, 0)):
        for bonus in (0.0, 0.5):
            (*_, info), total = play(SegmentEnv(task, format_reward=bonus), text, index=3)
            assert info["reward_terms"] == {"answer": answer, "format": form * bonus} and total == answer + form * bonus
    (*_, info), total = play(SegmentEnv("TextSum", format_reward=0.5), "<see>1</see><think></think><answer>1</answer>")
    assert info["reward_terms"]["format"] == 0


# -------------------------------------------------------------------------------- the cut into segments is free
def split_anywhere(data, text):
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.data())
def test_any_partition_of_a_text_gives_the_same_response_end_and_reward(data):
    task = data.draw(st.sampled_from(TASKS))
    canonical = task.demonstrate(EXAMPLES[task], np.random.default_rng(data.draw(st.integers(0, 99))), 0.05)
    text = data.draw(st.one_of(st.just(canonical), soup, st.builds("{}{}".format, st.just(canonical), soup),
                               st.builds("{}{}".format, soup, st.just(canonical))))
    episode = SegmentEnv(task, format_reward=0.5, max_chars=data.draw(st.sampled_from([30, 2048])))
    outcomes = []
    for pieces in ([text], split_anywhere(data, text), list(text[:400]) + [text[400:]]):
        (seen, _, terminated, truncated, info), total = play(episode, text, pieces, index=3)
        keys = ("predicted", "correct", "reward_terms", "end_reason", "steps_correct")
        outcomes.append((seen["response"], total, terminated, truncated, {key: info[key] for key in keys}))
        assert "".join(episode.segments) == episode.response and not (terminated and truncated)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    event(outcomes[0][4]["end_reason"] or "goes on")


@given(soup)
def test_nothing_is_written_after_the_first_end(text):
    response, reason = cut(text)
    assert text.startswith(response) and cut(response) == (response, reason)
    assert all(cut(response[:at])[1] == "" for at in range(max(0, len(response) - 30), len(response)))
    assert reason or response == text


# -------------------------------------------------------------------------------------------------------- grading
def test_grading_is_exact_and_single_valued():
    task = TextSum()
    one = task.example_at(0)
    a = one.answer
    full_width = "".join(chr(ord(digit) + 0xFEE0) for digit in a)
    for good in (f"<answer>{a}</answer>", f"<answer> {a}\n</answer>", f"I think <answer>{a}</answer>",
                 f"<think></think><answer>{a}</answer>{END}", f"<answer>{a}</answer> trailing"):
        assert task.grade(one, good) == 1.0
    close = f"{a}</answer>"
    for bad in ("", a, f"<answer>{a}", close, "<answer></answer>", f"<answer>it is {close}", f"<answer>{a} {close}",
                f"<answer>17 {close}", f"<answer>0{close}", f"<answer>+{close}", f"<answer>{a}.0</answer>",
                f"<answer>{full_width}</answer>", f"<answer>{a}\0</answer>", f"<answer>\u3000{close}",
                f"<answer><answer>{close}", f"<answer><answer>{close}</answer>", f"</answer><answer>{close}",
                f"<answer>{close}<answer>{close}", f"<answer>1</answer><answer>{close}",
                f"<answer>{close}<answer>1</answer>", f"{END}<answer>{close}", f"<answer>{a}{END}</answer>",
                f"<think><answer>{close}</think>", f"<think>so <answer>{close}", f"<see><answer>{close}",
                f"<Answer>{close}", f"<answer >{close}", f"<answer>{'9' * 10000}</answer>", f"<answer>\ud800{close}"):
        assert task.grade(one, bad) == 0.0, bad


def grade_by_hand(text, answer):
    """Plain loops over the text instead of finds and counts: what the contract says, in order."""
    opened, closed, ended, content, blocks, at = 0, 0, False, "", {"see": 0, "think": 0}, 0
    while at < len(text):
        mark = next((mark for mark in (*env.TAGS, END) if text[at:at + len(mark)] == mark), text[at])
        if not ended and opened and mark != "</answer>":
            content += mark
        if mark == "<answer>":
            opened += 1
        elif mark == "</answer>":
            closed, ended = closed + 1, ended or opened > 0
        elif not ended and mark == END:
            return 0.0
        elif not opened and mark[1:-1] in blocks:
            blocks[mark[1:-1]] = 1
        elif not opened and mark[2:-1] in blocks and mark[:2] == "</":
            blocks[mark[2:-1]] = 0
        at += len(mark)
    return float(opened == closed == 1 and ended and not any(blocks.values()) and content.strip(" \t\r\n") == answer)


contents = st.sampled_from(["@", " @ ", "@@", "@\0"])  # @ stands for the true answer


@settings(max_examples=2000)
@given(st.one_of(soup, st.text(max_size=40), st.builds("{}<answer>{}</answer>{}".format, soup, contents, soup)),
       st.sampled_from(TASKS))
@example("<answer><answer>@</answer>", TASKS[0])
@example("<think></think></think><think><answer>@</answer>", TASKS[0])
@example("\0<answer>" + "9" * 5000 + "</answer>", TASKS[2])
@example("<see>²²</see><think>²+²=4;2+²=4</think><answer>4</answer>", TASKS[0])
@example("<see>3</see><think>3+5=" + "9" * 5000 + ";" + "9" * 5000 + "+1=2</think><answer>4</answer>", TASKS[2])
def test_2000_random_strings_never_raise_and_never_earn_what_they_should_not(text, task):
    one = EXAMPLES[task]
    text = text.replace("@", one.answer)
    grade = task.grade(one, text)
    assert grade == grade_by_hand(text, one.answer)
    event(f"earned {grade}")
    (_, reward, terminated, _, info), _ = play(EPISODES[task], text, index=3)
    assert reward == task.grade(one, cut(text)[0]) and (reward == 0 or info["predicted"] == one.answer)
    checks, spans = task.check_steps(one, text), task.step_spans(text)
    assert len(checks) == len(spans) and set(map(type, checks)) <= {bool} and info["steps_correct"] == checks
    assert all(0 <= a <= b <= len(text) for a, b in spans) and spans == sorted(spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    if all(checks) and info["end_reason"] == "answer":  # all steps right, the answer among them: reward 1
        assert reward == 1


# ---------------------------------------------------------------------------------------- demonstrations and steps
SIZES = (*TASKS, DiceSum(n=1), DiceSum(n=9), DiceSum(n=25), DiceSum(n=3, largest=3), ArrowPath(length=1, grid=2),
         ArrowPath(length=40, grid=3), ArrowPath(length=256, grid=9), TextSum(n=64, largest=999))


@pytest.mark.parametrize("task", SIZES, ids=str)
def test_a_flawless_demonstration_earns_one_and_fits_the_default_limits(task):
    rng = np.random.default_rng(0)
    for index in range(15):
        one = task.example_at(index)
        text = task.demonstrate(one, rng)
        assert task.grade(one, text) == 1 and text.isascii() and text.isprintable() and text.endswith("</answer>")
        assert one.steps == tuple(text[a:b] for a, b in task.step_spans(text)) and one.steps[-1] == one.answer
        assert task.check_steps(one, text) == [True] * len(one.steps)
    episode = SegmentEnv(task, max_segments=2048)
    (_, reward, terminated, _, info), _ = play(episode, text, list(text), index=index)
    assert reward == 1 and terminated and len(episode.example.question) <= 512


def test_the_canonical_responses_are_as_documented():
    one = DiceSum().example_at(0)
    a, b, c, d = map(int, one.content[0])
    sums = f"{a}+{b}={a + b};{a + b}+{c}={a + b + c};{a + b + c}+{d}={a + b + c + d}"
    expected = f"<see>{a}{b}{c}{d}</see><think>{sums}</think><answer>{a + b + c + d}</answer>"
    assert DiceSum().demonstrate(one, np.random.default_rng(0)) == expected
    cell, move = "[A-D][1-4]", "[RLUD][A-D][1-4]"
    assert re.fullmatch(f"<see>{cell}</see><think>({move};){{7}}{move}</think><answer>{cell}</answer>",
                        ArrowPath().demonstrate(ArrowPath().example_at(0), np.random.default_rng(0)))
    assert re.fullmatch(r"<think>(\d+\+\d=\d+;){2}\d+\+\d=\d+</think><answer>\d+</answer>",
                        TextSum().demonstrate(TextSum().example_at(0), np.random.default_rng(0)))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_at_error_rate_one_every_step_is_wrong_and_still_of_the_right_form(task):
    for one, text in mistakes(task, 50, 1.0):
        assert task.check_steps(one, text) == [False] * len(one.steps) and re.fullmatch(task.form, text)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_each_step_is_wrong_with_the_probability_asked_for(task):
    wrong = ~np.array([task.check_steps(one, text) for one, text in mistakes(task, 800, 0.2)])  # (examples, steps)
    assert np.abs(wrong.mean(axis=0) - 0.2).max() < 0.06 and abs(wrong.mean() - 0.2) < 0.02
    # slips are independent: what follows a slip is carried on consistently, not wrong because of it
    assert abs(wrong[:, 1:][wrong[:, :-1]].mean() - 0.2) < 0.05


def checks_by_hand(task, one, text):
    """What is right in a demonstration, by splitting the string and reading the content, without env's parser."""
    see = re.search("<see>(.*)</see>", text)
    moves, answer = re.search("<think>(.*)</think><answer>(.*)</answer>", text).groups()
    moves = moves.split(";")
    if isinstance(task, ArrowPath):
        (start,), arrows = one.content
        here, right = see[1], [see[1] == start]
        for move in moves:
            (column, row), (dx, dy) = here, {"R": (1, 0), "L": (-1, 0), "U": (0, -1), "D": (0, 1)}[arrows[here]]
            right.append(move == f"{arrows[here]}{chr(ord(column) + dx)}{int(row) + dy}")
            here = move[1:]
        return [*right, answer == here]
    true = [int(number) for number in one.content[0]]
    written = [int(number) for number in see[1]] if see else true
    right, total = [a == b for a, b in zip(true, written, strict=True)] if see else [], written[0]
    for number, move in zip(written[1:], moves, strict=True):
        right.append(move == f"{total}+{number}={total + number}")
        total = int(move.split("=")[1])
    return [*right, answer == str(total)]


@pytest.mark.parametrize("task", [*TASKS, DiceSum(n=9), TextSum(n=5, largest=60), ArrowPath(20, grid=5)], ids=str)
def test_steps_are_judged_as_by_hand_and_a_single_slip_in_a_sum_always_costs_the_reward(task):
    singles = 0
    for one, text in mistakes(task, 300, 0.15):
        checks, grade = task.check_steps(one, text), task.grade(one, text)
        assert checks == checks_by_hand(task, one, text)
        assert grade == 1 or not all(checks)
        if checks.count(False) == 1 and not isinstance(task, ArrowPath):  # two slips can cancel, two paths can meet
            singles += 1
            assert grade == 0
    assert singles > 20 or isinstance(task, ArrowPath)


def test_local_rightness_on_one_response_worked_by_hand():
    task = DiceSum()
    one = env.Example(None, "Sum the dice.", "", (("3", "5", "2", "6"),), "16")
    check = {  # reads, additions, answer
        "<see>3526</see><think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>": "1111 111 1",
        "<see>3426</see><think>3+4=7;7+2=9;9+6=15</think><answer>15</answer>": "1011 111 1",   # one misread pip
        "<see>3426</see><think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>": "1011 011 1",  # read 4, added 5
        "<see>3526</see><think>3+5=9;9+2=11;11+6=17</think><answer>17</answer>": "1111 011 1",  # one wrong sum
        "<see>3526</see><think>3+5=8;8+2=10</think><answer>10</answer>": "1111 11 0",           # stopped early
        "<see>352</see><think>3+5=8;8+2=10</think><answer>10</answer>": "111 11 0",             # a die overlooked
        "<see>35266</see><think>3+5=8": "11110", "<see>3": "1", "<think>3+5=8;": "0", "": "",
        "<see>3526</see><think>3+5=8;?;8+2=10;": "1111 100",  # a stray item takes the place of the second addition
        "<see>3526</see><think>03+5=8;": "1111 0", "<see>3526</see><think>3+5=08;": "1111 0",
        "<think>3+5=8;</think><see>3526</see>": "0",       # what is read after thinking cannot have been used
        "<answer>16</answer>": "0", "<see>3526<think>3+5=8<answer>": "1111 1", "<answer>1<think>3+5=8;</answer>": "0"}
    for text, expected in check.items():
        assert task.check_steps(one, text) == [mark == "1" for mark in expected if mark != " "], text


def test_local_rightness_on_one_path_worked_by_hand():
    """   A   B
       1  R > D
       2  U < L      from A1, two arrows: R to B1, D to B2."""
    task = ArrowPath(length=2, grid=2)
    one = env.Example(None, "Follow 2 arrows.", "", (("A1",), {"A1": "R", "B1": "D", "A2": "U", "B2": "L"}), "B2")
    check = {
        "<see>A1</see><think>RB1;DB2</think><answer>B2</answer>": "1 11 1",
        "<see>B1</see><think>DB2;LA2</think><answer>A2</answer>": "0 11 1",       # one wrong start
        "<see>A1</see><think>DA2;UA1</think><answer>A1</answer>": "1 01 1",       # one arrow misread
        "<see>A1</see><think>RA2;UA1</think><answer>A1</answer>": "1 01 1",       # read well, moved elsewhere
        "<see>A1</see><think>RB1;DB2;LA2</think><answer>A2</answer>": "1 110 0",  # one move too many
        "<see>A1</see><think>RB1</think><answer>B1</answer>": "1 1 0",            # one too few
        "<see>A1</see><think>RB1;DB2</think><answer>B1</answer>": "1 11 0",
        "<see>A1</see><think>RC1;RD1;": "1 00", "<see>A1B1</see><think>RB1;": "10 1", "<see>A1B</see>": "10",
        "<see>A": "", "<see>A1": "1", "<see>A1</see><think>RB1;DB2": "1 1", "<think>RB1;": "0"}
    for text, expected in check.items():
        assert task.check_steps(one, text) == [mark == "1" for mark in expected if mark != " "], text


@given(st.data())
def test_a_longer_response_only_adds_steps(data):
    task = data.draw(st.sampled_from(TASKS))
    noisy = task.demonstrate(EXAMPLES[task], np.random.default_rng(data.draw(st.integers(0, 99))), 0.3)
    text = data.draw(st.one_of(st.just(noisy), soup, st.builds("{1}{0}".format, soup, st.just(noisy[:30]))))
    at = data.draw(st.integers(0, len(text)))
    spans, shorter = task.step_spans(text), task.step_spans(text[:at])
    assert shorter == spans[:len(shorter)]
    checks = task.check_steps(EXAMPLES[task], text)
    assert task.check_steps(EXAMPLES[task], text[:at]) == checks[:len(shorter)]


# ---------------------------------------------------------------------------------------------- examples and splits
@pytest.mark.parametrize("task", [*TASKS, DiceSum(n=2), ArrowPath(length=2, grid=2)], ids=str)
def test_splits_share_no_content_and_examples_are_pure_functions_of_their_index(task):
    keys = {split: {task.example_at(index, split).key for index in range(250)} for split in env.SPLITS}
    assert keys["train"] and keys["eval"] and not keys["train"] & keys["eval"]
    again = copy.deepcopy(task).example_at(17, "eval")
    assert again == task.example_at(17, "eval") and again != task.example_at(18, "eval")


def test_one_example_in_five_is_held_out():
    task, held_out = TextSum(n=8), set()
    for index in range(1000):  # with the same generator, asking for "eval" skips what is not of that split
        any_split, asked = (task.sample(np.random.default_rng(index), split) for split in (None, "eval"))
        held_out |= {index} if any_split.key == asked.key else set()
    assert 150 < len(held_out) < 250


def test_examples_are_the_same_on_every_machine():
    """Pinned: a change here silently changes every published number."""
    assert [(task.example_at(0).answer, task.example_at(1, "eval").answer) for task in TASKS] == [
        ("15", "16"), ("C2", "D1"), ("17", "21")]


def test_a_split_that_is_empty_is_a_clear_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="too small.*eval"):
        TextSum(n=1, largest=2).example_at(0, "eval")
    with pytest.raises(ValueError, match="split"):
        DiceSum().example_at(0, None)


def test_paths_run_through_fresh_cells_and_never_leave_the_grid():
    fresh = []
    for index in range(200):
        one = ArrowPath().example_at(index)
        (start,), arrows = one.content
        assert all(arrow in ArrowPath().roads[cell] for cell, arrow in arrows.items())
        cells = [step[-2:] for step in one.steps[:-1]]
        fresh.append(len(set(cells)))
        assert cells[0] == start and one.answer == cells[-1]
    assert np.mean(np.array(fresh) == 9) > 0.98
    for index in range(30):  # a path too long for its grid ends in a loop, not in a ping-pong
        last = [step[-2:] for step in ArrowPath(length=100, grid=4).example_at(index).steps[-40:-1]]
        assert len(set(last)) >= 4


def cells_of(image):
    pixels = np.asarray(image).astype(int)                                               # (H, W, 3)
    side = len(pixels) // 16
    return [pixels[y * 16:y * 16 + 16, x * 16:x * 16 + 16] for y in range(side) for x in range(side)]


def test_the_pixels_say_what_the_content_says():
    """Pips are counted and arrows are weighed in the picture itself: the reader of pixels needs nothing else."""
    for task in (DiceSum(), DiceSum(n=7), DiceSum(n=25)):
        for index in range(10):
            one = task.example_at(index)
            cells = cells_of(one.image)
            for face, cell in zip(one.content[0], cells, strict=False):
                assert (cell[1:15, 1:15].sum(axis=2) < 180).sum() == 4 * int(face)       # a pip is 2 x 2 pixels
            assert all(cell.std(axis=(0, 1)).max() == 0 for cell in cells[task.n:])      # no die, only the ground
    for index in range(20):
        one = ArrowPath().example_at(index)
        (start,), arrows = one.content
        for (name, arrow), cell in zip(arrows.items(), cells_of(one.image), strict=True):
            y, x = np.nonzero(cell[1:15, 1:15].sum(axis=2) < 180)
            lean = x.mean() - 6.5, y.mean() - 6.5                                         # the head is the heavier end
            assert max(env.MOVES, key=lambda move: np.dot(env.MOVES[move], lean)) == arrow and np.abs(lean).min() < 1e-9
            assert (cell[2, 2, 2] < 100) == (name == start)                               # only gold has so little blue
    met = {road for index in range(60) for road in ArrowPath().example_at(index).content[1].items()}
    assert met == {(cell, arrow) for cell, roads in ArrowPath().roads.items() for arrow in roads}


# -------------------------------------------------------------------------------------------------------- rendering
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_rgb_frames_have_one_size_and_show_every_change(task):
    episode = SegmentEnv(task, render_mode="rgb_array")
    episode.reset(options={"index": 3})
    frames = [episode.render()]
    for piece in ("<think>", "", "3+5", "x" * 1500, "\n\0é\ud800\u202e", END):
        episode.step(piece)
        frames.append(episode.render())
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((384, 960, 3), "uint8")}
    unchanged = [np.array_equal(one, other) for one, other in zip(frames, frames[1:], strict=False)]
    assert unchanged == [False, True, False, False, False, False]  # only the empty segment shows nothing
    outcomes = []
    for pieces in (["<answer>", "1</answer>"], ["<answer>1", "</answer>"]):  # the same text, cut elsewhere
        play(episode, "", pieces, index=3)
        outcomes.append(episode.render())
    assert not np.array_equal(*outcomes)


def test_text_rendering_marks_segments_and_spells_out_control_characters():
    episode = SegmentEnv("DiceSum", render_mode="ansi")
    episode.reset(options={"index": 3, "response": "<see>"})
    for piece in ("35", "\x1b[2J", "<answer>1</answer>"):
        episode.step(piece)
    shown = episode.render()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "Sum the dice." in plain and r"<see>|35|\x1b[2J|<answer>1</answer>" in plain and "\x1b[2J" not in shown
    assert "reward 0" in plain and f"true answer {episode.example.answer}" in plain and plain.count("\u2580") == 32 * 16


def test_human_rendering_prints_each_step_and_none_mode_renders_nothing(capsys):
    episode = SegmentEnv("TextSum", render_mode="human")
    episode.reset()
    episode.step("<think>")
    assert episode.render() is None and capsys.readouterr().out.count("Add ") == 2
    silent = SegmentEnv("TextSum")
    silent.reset()
    assert silent.render() is None and capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------------- verbosity
@pytest.mark.parametrize("task", [env.DiceSum, env.ArrowPath, env.TextSum])
def test_verbosity_adds_words_and_no_decisions(task):
    """The same examples, decisions and checks, with so many words more before every move."""
    plain, wordy = task(), task(verbosity=20)
    for index in range(5):
        example = plain.example_at(index)
        assert wordy.example_at(index).content == example.content
        texts = [t.demonstrate(example, np.random.default_rng(index), 0.3) for t in (plain, wordy)]
        assert texts[1].count(" ") - texts[0].count(" ") == 20 * plain.moves
        steps = [[text[a:b] for a, b in wordy.step_spans(text)] for text in texts]
        assert steps[0] == steps[1] and wordy.check_steps(example, texts[0]) == wordy.check_steps(example, texts[1])
        assert wordy.grade(example, wordy.demonstrate(example, np.random.default_rng(0))) == 1
    with pytest.raises(ValueError, match="verbosity=-1"):
        task(verbosity=-1)
