"""env.py: Gymnasium's contract, and episodes that do not depend on how a response is cut."""

import copy
import json
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import event, given
from hypothesis import strategies as st
from task_responses import EXAMPLES, TASKS, play, soup

import env
from env import END, GameEnv, SegmentEnv
from tasks import SPLITS, ArrowPath, DiceSum, TextSum

IDS = ("SAPO/DiceSum-v0", "SAPO/ArrowPath-v0", "SAPO/TextSum-v0")
INFO_KEYS = {
    *("example_id", "answer", "predicted", "correct", "segment_index", "segment_text"),
    *("reward_terms", "end_reason", "steps_correct"),
}


# ----------------------------------------------------------------------- Gymnasium's contract


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
        assert set(info) == INFO_KEYS and info["end_reason"] == ""
        assert info["predicted"] is None and not info["correct"]
        unwrapped = episode.unwrapped
        text = unwrapped.task.demonstrate(unwrapped.example, np.random.default_rng(0))
        for i, char in enumerate(text, start=1):
            observation, reward, terminated, truncated, info = episode.step(char)
            assert set(info) == INFO_KEYS and observation in episode.observation_space
            assert info["segment_index"] == observation["segment_index"] == i
            assert info["segment_text"] == char and not truncated
            assert (reward, terminated) == ((1.0, True) if i == len(text) else (0.0, False))
        assert info["correct"] and info["predicted"] == info["answer"]
        assert info["end_reason"] == "answer" and all(info["steps_correct"])
        assert info["reward_terms"] == {"answer": 1.0, "format": 0.0}
        assert unwrapped.response == observation["response"] == text


@pytest.mark.parametrize("name", IDS)
def test_same_seed_same_episode(name):
    one, two = gym.make(name), gym.make(name)
    first = [one.reset(seed=7), one.reset(), one.reset()]
    second = [two.reset(seed=7), two.reset(), two.reset()]
    for (observation, info), (observation_again, info_again) in zip(first, second, strict=True):
        assert info == info_again and observation.keys() == observation_again.keys()
        for key, value in observation.items():
            assert np.array_equal(value, observation_again[key])
    ids = {one.reset(seed=seed)[1]["example_id"] for seed in range(20)}
    assert len(ids) == 20 and all(episode_id.startswith("train/") for episode_id in ids)


def test_a_spec_survives_json_and_settings_reach_the_task():
    episode = gym.make("SAPO/DiceSum-v0", n=9, max_segments=77, max_chars=99, format_reward=0.25)
    stored = json.dumps(json.loads(episode.spec.to_json()))
    again = gym.make(gym.envs.registration.EnvSpec.from_json(stored))
    for unwrapped in (episode.unwrapped, again.unwrapped):
        assert unwrapped.task == DiceSum(n=9)
        assert unwrapped.observation_space["image"].shape == (48, 48, 3)
        assert (unwrapped.max_segments, unwrapped.max_chars) == (77, 99)
        assert unwrapped.format_reward == 0.25
    assert SegmentEnv(ArrowPath(length=3)).task.length == 3


def test_shapes_and_prompts_of_the_defaults():
    shapes = {"SAPO/DiceSum-v0": (32, 32, 3), "SAPO/ArrowPath-v0": (64, 64, 3)}
    for name in IDS:
        observation, _ = gym.make(name).reset(options={"index": 0})
        assert ("image" in observation) == (name in shapes)
        if name in shapes:
            assert observation["image"].shape == shapes[name]
            assert observation["image"].dtype == np.uint8
    assert EXAMPLES[DiceSum()].question == "Sum the dice."
    assert EXAMPLES[ArrowPath()].question == "Follow 8 arrows."
    assert re.fullmatch(r"Add \d \d \d \d\.", EXAMPLES[TextSum()].question)


def test_vector_environments_agree():
    """With shared memory Gymnasium would corrupt the texts: hence shared_memory=False."""
    make = [lambda: SegmentEnv("DiceSum")] * 2
    sync = gym.vector.SyncVectorEnv(make)
    background = gym.vector.AsyncVectorEnv(make, shared_memory=False)
    try:
        ours, theirs = [sync.reset(seed=3)], [background.reset(seed=3)]
        for actions in (("<see>é漢", ""), ("<answer>", "1\n2")):
            ours.append(sync.step(actions))
            theirs.append(background.step(actions))
        for (observation, *_), (observation_there, *_) in zip(ours, theirs, strict=True):
            assert observation.keys() == observation_there.keys()
            for key in ("image", "segment_index"):
                assert np.array_equal(observation[key], observation_there[key])
            for key in ("prompt", "response"):
                assert observation[key] == observation_there[key]
        assert observation["response"] == ("<see>é漢<answer>", "1\n2")
    finally:
        sync.close()
        background.close()


def test_observations_cannot_corrupt_the_environment():
    episode = SegmentEnv("DiceSum")
    first, info = episode.reset(options={"index": 1})
    kept = first["image"].copy()
    first["image"][:] = 0
    first["response"] = "spoilt"
    info["reward_terms"]["answer"] = 9.0
    info["steps_correct"] = None
    second, reward, _, _, info = episode.step("x")
    assert np.array_equal(second["image"], kept)
    assert second["response"] == "x" and reward == 0 and info["reward_terms"]["answer"] == 0
    assert np.array_equal(episode.reset(options={"index": 1})[0]["image"], kept)


@pytest.mark.parametrize("name", IDS)
def test_the_answer_is_never_observed(name):
    episode = gym.make(name).unwrapped
    observation, _ = episode.reset(options={"index": 2})
    assert set(observation) <= {"image", "prompt", "response", "segment_index"}
    assert observation["response"] == ""
    words = observation["prompt"].replace("8 arrows", "").split()
    assert episode.example.answer not in words


def imported_by(module):
    """The names of all modules that importing this one brings along."""
    code = f"import sys, {module}; print(*sys.modules)"
    here = Path(env.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=here, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_env_needs_no_torch():
    assert not {"torch", "transformers", "datasets", "math_verify"} & imported_by("env")


@pytest.mark.parametrize("module", ["tasks", "tasks.dataset", "tasks.grading", "tasks.pictures"])
def test_tasks_need_neither_torch_nor_env_nor_optional_packages(module):
    too_many = {"torch", "transformers", "env", "gymnasium", "datasets", "math_verify"}
    assert not too_many & imported_by(module)


def test_an_episode_can_be_copied_and_the_copies_part_ways():
    episode = SegmentEnv("TextSum")
    episode.reset(options={"index": 0})
    episode.step("<think>")
    other = copy.deepcopy(episode)
    episode.step("a")
    other.step("b")
    assert episode.response == "<think>a" and other.response == "<think>b"


# ----------------------------------------------------------------------------- reset and step


def test_options_choose_the_example_the_split_and_the_beginning():
    episode = SegmentEnv("DiceSum")
    for split in SPLITS:
        _, info = episode.reset(options={"index": np.int64(4), "split": split})
        assert info["example_id"] == f"{split}/4"
        assert episode.example == episode.task.example_at(4, split)
    observation, info = episode.reset(options={"index": 4, "response": "<see>35"})
    assert observation["response"] == "<see>35" and observation["segment_index"] == 0
    assert len(info["steps_correct"]) == 2
    episode.reset(seed=1, options={"split": "eval"})
    assert episode.example_id.startswith("eval/")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"idx": 1}, "idx"),
        ([1], "options"),
        ("index", "options"),
        ({"index": -1}, "index"),
        ({"index": 1.0}, "index"),
        ({"index": True}, "index"),
        ({"index": "1"}, "index"),
        ({"split": "test"}, "split"),
        ({"split": None}, "split"),
        ({"split": []}, "split"),
        ({"response": None}, "response"),
        ({"response": b""}, "response"),
        ({"response": "<answer>1</answer>"}, "response"),
        ({"response": f"a{END}"}, "response"),
        ({"response": "x" * 2048}, "max_chars"),
    ],
)
def test_a_wrong_option_is_a_value_error_that_names_it(options, named):
    with pytest.raises(ValueError, match=named):
        SegmentEnv("DiceSum").reset(options=options)


@pytest.mark.parametrize("made", [SegmentEnv, GameEnv])
@pytest.mark.parametrize("options", [{"split": "z"}, {"index": -1}, {"response": 3}, {"idx": 1}])
def test_after_a_refused_reset_no_episode_goes_on(made, options):
    episode = made()
    episode.reset(seed=0)
    with pytest.raises(ValueError):
        episode.reset(options=options)
    with pytest.raises(gym.error.ResetNeeded, match="not reset"):
        episode.step("a")


def test_an_unknown_option_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"index.*split.*response"):
        SegmentEnv("DiceSum").reset(options={"idx": 1})


@given(st.data())
def test_resuming_from_a_prefix_is_as_if_it_had_just_been_written(data):
    task = data.draw(st.sampled_from(TASKS))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    text = task.demonstrate(EXAMPLES[task], rng, 0.2)
    at = data.draw(st.integers(0, len(text) - 1))
    episode = SegmentEnv(task)
    whole, total = play(episode, text, index=3)
    resumed, total_resumed = play(episode, text[at:], index=3, response=text[:at])
    assert total == total_resumed and whole[2] == resumed[2]
    assert whole[0]["response"] == resumed[0]["response"]
    assert whole[4]["steps_correct"] == resumed[4]["steps_correct"]


@dataclass(frozen=True)
class Table(TextSum):
    """A task of a user's, with settings that have no defaults."""

    needs = {"rows": "a file of sums"}
    rows: str = field(kw_only=True)
    columns: int = field(kw_only=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"columns": 3}, "Table: rows= is missing; give it a file of sums"),
        ({"rows": "sums.csv", "n": 4}, "Table: columns= is missing; give it int"),
    ],
)
def test_a_setting_that_a_task_needs_is_named(settings, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        SegmentEnv(Table, **settings)
    assert SegmentEnv(Table, rows="sums.csv", columns=3).task.columns == 3


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


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"task": "DiceSun"}, "DiceSun"),
        ({"task": None}, "None"),
        ({"render_mode": "ascii"}, "ascii"),
        ({"n": 0}, "n=0"),
        ({"n": 26}, "n=26"),
        ({"n": 4.0}, "n=4.0"),
        ({"n": True}, "n=True"),
        ({"largest": 7}, "largest=7"),
        ({"max_segments": 0}, "max_segments=0"),
        ({"max_chars": 0}, "max_chars=0"),
        ({"task": "ArrowPath", "grid": 10}, "grid=10"),
        ({"task": "ArrowPath", "grid": 1}, "grid=1"),
        ({"task": "ArrowPath", "length": 0}, "length=0"),
        ({"task": "TextSum", "n": 65}, "n=65"),
        ({"task": DiceSum(), "n": 9}, "n.*no more keywords beside a task"),
    ],
)
def test_wrong_settings_are_value_errors_with_the_value_seen(bad, named):
    with pytest.raises(ValueError, match=named):
        SegmentEnv(**bad)


def test_running_out_of_segments_truncates():
    episode = SegmentEnv("DiceSum", max_segments=3)
    (observation, reward, terminated, truncated, info), _ = play(episode, "", ["a", "", "b"])
    assert (terminated, truncated, reward) == (False, True, 0)
    assert info["end_reason"] == "max_segments" and observation["segment_index"] == 3
    assert observation in SegmentEnv("DiceSum", max_segments=3).observation_space


def test_running_out_of_characters_truncates():
    (observation, _, terminated, truncated, info), _ = play(
        SegmentEnv("DiceSum", max_chars=5), "abcdefgh"
    )
    assert (terminated, truncated, info["end_reason"]) == (False, True, "max_chars")
    assert observation["response"] == "abcde"


@pytest.mark.parametrize(
    "text, reason", [("<answer>1</answer>", "answer"), ("x" * 13 + END, "end")]
)
def test_an_end_exactly_at_both_limits_is_an_end_and_no_truncation(text, reason):
    tight = SegmentEnv("DiceSum", max_chars=len(text), max_segments=1)
    (_, _, terminated, truncated, info), _ = play(tight, text)
    assert (terminated, truncated, info["end_reason"]) == (True, False, reason)


@pytest.mark.parametrize(
    "text", [f"<see>35{END}", f"<answer>16{END}</answer>", f"{END}<answer>16</answer>"]
)
def test_the_end_mark_ends_without_an_answer_wherever_it_is_cut(text):
    for at in range(len(text)):
        last, total = play(SegmentEnv("DiceSum"), text, [text[:at], text[at:]])
        observation, _, terminated, truncated, info = last
        assert terminated and not truncated and total == 0
        assert info["end_reason"] == "end" and info["predicted"] is None
        assert observation["response"] == text[: text.index(END) + len(END)]


def test_the_format_term_is_paid_only_if_asked_for_and_only_for_the_form():
    task = DiceSum()
    right = task.demonstrate(EXAMPLES[task], np.random.default_rng(0))
    wrong = right.replace("<answer>", "<answer>9")
    bare = right[right.index("<answer>") :]
    unclosed = right.replace("</answer>", END)
    # (response, what its answer earns, whether it has the form)
    cases = ((right, 1, 1), (wrong, 0, 1), (bare, 1, 0), ("x" + right, 1, 0), (unclosed, 0, 0))
    for text, answer, form in cases:
        for bonus in (0.0, 0.5):
            (*_, info), total = play(SegmentEnv(task, format_reward=bonus), text, index=3)
            assert info["reward_terms"] == {"answer": answer, "format": form * bonus}
            assert total == answer + form * bonus
    text = "<see>1</see><think></think><answer>1</answer>"  # with a block that TextSum has not
    (*_, info), _ = play(SegmentEnv("TextSum", format_reward=0.5), text)
    assert info["reward_terms"]["format"] == 0


# -------------------------------------------------------------- the cut into segments is free


def split_anywhere(data, text):
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.data())
def test_any_partition_of_a_text_gives_the_same_response_end_and_reward(data):
    task = data.draw(st.sampled_from(TASKS))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    canonical = st.just(task.demonstrate(EXAMPLES[task], rng, 0.05))
    joined = "{}{}".format
    text = data.draw(
        st.one_of(
            canonical, soup, st.builds(joined, canonical, soup), st.builds(joined, soup, canonical)
        )
    )
    max_chars = data.draw(st.sampled_from([30, 2048]))
    episode = SegmentEnv(task, format_reward=0.5, max_chars=max_chars)
    outcomes = []
    by_character = [*text[:400], text[400:]] if len(text) > 400 else list(text) or [""]
    for pieces in ([text], split_anywhere(data, text), by_character):
        last, total = play(episode, text, pieces, index=3)
        observation, _, terminated, truncated, info = last
        keys = ("predicted", "correct", "reward_terms", "end_reason", "steps_correct")
        told = {key: info[key] for key in keys}
        outcomes.append((observation["response"], total, terminated, truncated, told))
        assert "".join(episode.segments) == episode.response and not (terminated and truncated)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    event(outcomes[0][4]["end_reason"] or "goes on")


# ---------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_rgb_frames_have_one_size_and_show_every_change(task):
    episode = SegmentEnv(task, render_mode="rgb_array")
    episode.reset(options={"index": 3})
    frames = [episode.render()]
    for piece in ("<think>", "", "3+5", "x" * 1500, "\n\0é\ud800\u202e", END):
        episode.step(piece)
        frames.append(episode.render())
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((384, 960, 3), "uint8")}
    pairs = zip(frames, frames[1:], strict=False)
    unchanged = [np.array_equal(one, other) for one, other in pairs]
    assert unchanged == [False, True, False, False, False, False]  # the empty segment shows nothing


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_rgb_frames_show_where_a_text_was_cut(task):
    episode = SegmentEnv(task, render_mode="rgb_array")
    outcomes = []
    for pieces in (["<answer>", "1</answer>"], ["<answer>1", "</answer>"]):
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
    assert "Sum the dice." in plain and "\x1b[2J" not in shown
    assert r"<see>|35|\x1b[2J|<answer>1</answer>" in plain
    assert "reward 0" in plain and f"true answer {episode.example.answer}" in plain
    assert plain.count("\u2580") == 32 * 16


def test_human_rendering_prints_each_step(capsys):
    episode = SegmentEnv("TextSum", render_mode="human")
    episode.reset()
    episode.step("<think>")
    assert episode.render() is None and capsys.readouterr().out.count("Add ") == 2


def test_without_a_mode_nothing_is_rendered(capsys):
    episode = SegmentEnv("TextSum")
    episode.reset()
    assert episode.render() is None and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("ArrowPath", {"length": 128}),
        ("DiceSum", {"n": 25, "verbosity": 200}),
        ("TextSum", {"n": 64}),
    ],
)
def test_a_long_answer_earns_the_same_whole_and_by_the_character(task, settings):
    episode = SegmentEnv(task, **settings)
    episode.reset(options={"index": 3})
    text = episode.task.demonstrate(episode.example, np.random.default_rng(0))
    assert len(text) > 512
    *_, info = episode.step(text)
    assert info["correct"]
    episode.reset(options={"index": 3})
    for letter in text:
        *_, info = episode.step(letter)
    assert info["correct"] and info["segment_index"] == len(text)


def test_a_task_that_has_no_hash_has_room_too():
    class Long(TextSum):
        __hash__ = None

    assert SegmentEnv(Long(n=64, verbosity=50)).max_chars > 2048 == SegmentEnv("DiceSum").max_chars
