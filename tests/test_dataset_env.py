"""env.DatasetEnv: Gymnasium's contract with rows of a data set, in both styles."""

import json
import re
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
from data_files import geometry, only, stored, styled_tasks
from gymnasium.utils.env_checker import check_env
from PIL import Image

from env import DatasetEnv, Pictures
from tasks import END, DiceSum
from tasks.dataset import STYLES, DatasetTask

pytestmark = pytest.mark.usefixtures("dataset_cache")


@pytest.fixture(scope="module")
def path(tmp_path_factory, dataset_cache):
    """Rows with no picture, one, and two of different sizes."""
    pictures = []
    for i in range(5):
        pictures.append(stored(Image.new("RGB", (20 + 7 * i, 31), (200, 40 * i, 0))))
    rows = []
    for i in range(30):
        question = "<image>" * (i % 3) + f"What is half of {i}?\nBe exact."
        rows.append((pictures[: i % 3], question, rf"\frac{{{i}}}{{2}}"))
    return geometry(tmp_path_factory.mktemp("rows") / "rows.parquet", rows)


@pytest.fixture(scope="module")
def styled(tmp_path_factory, dataset_cache):
    return styled_tasks(tmp_path_factory.mktemp("rows"))


# ----------------------------------------------------------------------- Gymnasium's contract


@pytest.mark.parametrize("style", STYLES)
def test_check_env_passes_without_a_warning(path, style, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("SAPO/Dataset-v0", path=path, style=style).unwrapped)


def test_a_whole_episode_with_tags(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        episode = gym.make("SAPO/Dataset-v0", path=path, format_reward=0.25)
        observation, info = episode.reset(options={"index": 4, "split": "eval"})
        row = episode.unwrapped.example
        assert set(observation) == {"images", "prompt", "response", "segment_index"}
        assert observation in episode.observation_space
        assert info["example_id"] == row.key and re.fullmatch("eval/[0-9]+", info["example_id"])
        assert len(observation["images"]) == len(row.content)
        pairs = zip(observation["images"], row.content, strict=True)
        assert all(np.array_equal(shown, picture) for shown, picture in pairs)
        answer = info["answer"]
        assert answer not in observation["prompt"]

        last = episode.step("<think>1 < 2 and so</think>\n<answer>")
        _, reward, terminated, truncated, info = last
        assert (reward, terminated, truncated) == (0, False, False)
        assert info["predicted"] is None and info["steps_correct"] == []

        last = episode.step(f"${answer}$</answer> and more")
        observation, reward, terminated, truncated, info = last
        assert (reward, terminated, truncated) == (1.25, True, False)
        assert info["predicted"] == f"${answer}$" and info["correct"]
        assert info["end_reason"] == "answer" and observation["response"].endswith("</answer>")


def test_a_whole_episode_boxed(path):
    episode = gym.make("SAPO/Dataset-v0", path=path, style="boxed", format_reward=0.25)
    _, info = episode.reset(options={"index": 4})
    answer = info["answer"]
    texts = (r"<think>\boxed{1}", "</think> <answer>2</answer>", rf" \boxed{{{answer}}}")
    predicted = []
    for text in texts:
        _, reward, terminated, _, info = episode.step(text)
        assert not terminated and not reward
        predicted.append(info["predicted"])
    assert predicted == ["1", "1", answer]
    _, reward, terminated, truncated, info = episode.step(f". {END}ignored")
    assert (reward, terminated, truncated) == (1.25, True, False)
    assert (info["predicted"], info["end_reason"]) == (answer, "end")
    assert info["reward_terms"] == {"answer": 1.0, "format": 0.25}


def test_in_the_style_boxed_an_answer_ends_nothing(path):
    episode = DatasetEnv(path, style="boxed")
    answer = episode.reset(options={"index": 4})[1]["answer"]
    prefix = rf"<answer></answer>\boxed{{{answer}}}"
    episode.reset(options={"index": 4, "response": prefix})
    assert episode.step(END)[1] == 1
    with pytest.raises(ValueError, match="an unfinished response"):
        episode.reset(options={"response": END})


def test_a_boxed_response_that_is_cut_off_earns_nothing(path):
    episode = DatasetEnv(path, style="boxed", max_chars=40)
    episode.reset(options={"index": 4})
    text = rf"\boxed{{{episode.example.answer}}}" + " " * 40
    _, reward, terminated, truncated, info = episode.step(text)
    assert (reward, terminated, truncated) == (0, False, True)
    assert info["end_reason"] == "max_chars"
    assert info["predicted"] == episode.example.answer and not info["correct"]


def test_who_writes_on_a_picture_spoils_only_his_own(path):
    episode = DatasetEnv(path)
    i = next(i for i in range(9) if episode.reset(options={"index": i})[0]["images"])
    observation, _ = episode.reset(options={"index": i})
    kept = observation["images"][0].copy()
    observation["images"][0][:] = 7
    assert np.array_equal(episode.step("a")[0]["images"][0], kept)
    assert np.array_equal(episode.reset(options={"index": i})[0]["images"][0], kept)
    assert "image" not in observation and "image" not in episode.observation_space.spaces


def test_every_reset_shows_its_own_row(path):
    episode = DatasetEnv(path)
    for index in range(12):
        observation, info = episode.reset(options={"index": index})
        row = episode.task.example_at(index)
        assert (info["example_id"], info["answer"]) == (row.key, row.answer)
        assert observation["prompt"] == row.question
        shown = [picture.tobytes() for picture in observation["images"]]
        assert shown == [picture.tobytes() for picture in row.content]


def test_same_seed_same_episode(path):
    one, two = DatasetEnv(path), DatasetEnv(path)
    first = [one.reset(seed=7)[1], one.reset()[1]]
    assert first == [two.reset(seed=7)[1], two.reset()[1]]
    assert len({one.reset(seed=i)[1]["example_id"] for i in range(40)}) > 10


def test_vector_environments(path):
    make = [lambda: DatasetEnv(path, style="boxed")] * 2
    vector = gym.vector.SyncVectorEnv(make)
    observation, _ = vector.reset(seed=3)
    alone, _ = DatasetEnv(path, style="boxed").reset(seed=4)
    assert len(observation["images"]) == 2
    pairs = zip(observation["images"][1], alone["images"], strict=True)
    assert all(np.array_equal(picture, other) for picture, other in pairs)
    observation, _, terminated, _, _ = vector.step(("a", END))
    assert observation["response"] == ("a", END) and terminated.tolist() == [False, True]
    vector.close()


def test_the_space_of_pictures():
    space = Pictures(seed=1)
    good = np.zeros((2, 3, 3), np.uint8)
    for fine in ((), (good,), (good, np.zeros((9, 1, 3), np.uint8)), space.sample()):
        assert fine in space
    for bad in ([good], good, (good[..., :1],), (good.astype(float),), (good[0],), (None,), "x"):
        assert bad not in space
    assert space == Pictures() and space != gym.spaces.Discrete(2)


def test_a_spec_survives_json(path):
    episode = gym.make("SAPO/Dataset-v0", path=path, style="boxed", max_segments=7)
    spec = json.dumps(json.loads(episode.spec.to_json()))
    again = gym.make(gym.envs.registration.EnvSpec.from_json(spec))
    assert again.unwrapped.task == episode.unwrapped.task == DatasetTask(path, style="boxed")
    assert again.unwrapped.max_segments == 7


# --------------------------------------------------------------------------------- the styles


def test_system_texts_ask_for_what_the_grader_reads(styled):
    tags, boxed = styled["tags"].system, styled["boxed"].system
    assert {"tags": tags, "boxed": boxed} == STYLES and DiceSum().system == ""
    form = tags.partition("reads: ")[2]
    assert "boxed" not in tags and styled["tags"].read_answer(form) == "the final answer"
    assert r"\boxed{}" in boxed and "<think> and </think>" in boxed and "answer>" not in boxed


@pytest.mark.parametrize(
    "style, text, right",
    [
        ("tags", "<think>a</think><answer>1</answer>", True),
        ("tags", "<answer>1</answer>", False),
        ("tags", "a<think>a</think><answer>1</answer>", False),
        ("tags", "<think>a<think>b</think><answer>1</answer>", False),
        ("boxed", r"<think>a</think>\boxed{1}<end>", True),
        ("boxed", r"\boxed{1}<end>", False),
        ("boxed", r"<think>\boxed{1}</think><end>", False),
    ],
)
def test_the_format(styled, style, text, right):
    assert bool(re.fullmatch(styled[style].form, text)) == right


@pytest.mark.parametrize(
    "style, text",
    [
        ("tags", "<think>" * 2000),
        ("tags", " " * 16000),
        ("tags", "<think>" + "a" * 16000),
        ("boxed", "<think></think>" * 1000),
        ("boxed", "<think></think>" + r"\boxed{" * 2000 + "\n"),
    ],
    ids=["opened", "blanks", "one thought", "thoughts", "boxes"],
)
def test_the_format_is_checked_in_linear_time(styled, style, text):
    start = time.perf_counter()
    re.fullmatch(styled[style].form, text)
    assert time.perf_counter() - start < 1


# ---------------------------------------------------------------------------------- rendering


def index_of(path, pictures):
    """An example with so many pictures."""
    task = DatasetTask(path)
    size = task.size("train")
    return next(i for i in range(size) if len(task.example_at(i).content) == pictures)


def thinking(path, index, mode):
    """An episode shortly after its beginning."""
    episode = gym.make("SAPO/Dataset-v0", path=path, render_mode=mode)
    episode.reset(options={"index": index})
    episode.step("<think>Half of it</think>")
    return episode


@pytest.mark.parametrize("pictures, least, most", [(0, 0, 0.1), (1, 0.5, 0.99), (2, 0.5, 0.99)])
def test_a_frame_has_the_first_picture_on_the_left(path, pictures, least, most):
    frame = thinking(path, index_of(path, pictures), "rgb_array").render()
    assert frame.shape == (384, 960, 3) and frame.dtype == np.uint8
    board = frame[32:352, 32:352].reshape(-1, 3).astype(int)  # (pixels, 3)
    red = (np.abs(board - [200, 0, 0]).max(1) < 50).mean()
    assert least <= red < most  # fitted, not stretched


@pytest.mark.parametrize("pictures, blocks", [(0, 0), (1, 24 * 48), (2, 24 * 48)])
def test_a_terminal_has_the_first_picture_above_the_question(path, pictures, blocks):
    episode = thinking(path, index_of(path, pictures), "ansi")
    shown = episode.render()
    assert "What is half of" in shown and "Half of it" in shown
    assert shown.count("▀") == blocks
    episode.reset(options={"index": index_of(path, 0)})
    assert "▀" not in episode.render()  # nothing of the last example's picture


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
@pytest.mark.parametrize("size", [(199, 1), (1, 199), (1, 1)])
def test_rendering_a_picture_of_an_odd_shape(tmp_path, size, mode):
    rows = [([stored(Image.new("RGB", size))], "q", "1")]
    episode = DatasetEnv(geometry(tmp_path / "rows.parquet", rows), render_mode=mode)
    split, _, _ = only(episode.task).key.partition("/")
    episode.reset(options={"split": split})
    assert len(episode.render())


def test_human_rendering_prints(path, capsys):
    episode = DatasetEnv(path, render_mode="human")
    episode.reset(seed=1)
    assert "What is half of" in capsys.readouterr().out
