"""tasks/reasoning.py: data sets of reasoning-gym, with their graders, as a task."""

import sys
import time

import gymnasium as gym
import numpy as np
import pytest

import env  # noqa: F401  registers the environments
import train
from tasks.judge import Judge

reasoning_gym = pytest.importorskip("reasoning_gym", reason="needs: pip install reasoning-gym")

from tasks import reasoning  # noqa: E402
from tasks.reasoning import ReasoningGym  # noqa: E402

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    reasoning._GRADER.close()


def answered(text):
    return f"<think></think><answer>{text}</answer>"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("chain_sum", SUMS),  # some two hundred different questions
        ("spell_backward", {"max_word_len": 3}),
        ("word_ladder", {}),  # it ends, after 500 items
        ("letter_counting", {}),
    ],
)
def test_no_question_is_in_both_splits(name, settings):
    task = ReasoningGym(name, **settings)
    questions = [
        {task.example_at(index, split).question for index in range(150)}
        for split in ("train", "eval")
    ]
    assert not questions[0] & questions[1]
    assert len(questions[0]) > 20 and len(questions[1]) > 5


def test_an_index_is_always_the_same_item():
    first, second = ReasoningGym("chain_sum"), ReasoningGym("chain_sum")
    assert first.example_at(7, "eval") == second.example_at(7, "eval")
    assert first.example_at(7, "eval") != first.example_at(8, "eval")
    assert first.example_at(7).question != ReasoningGym("chain_sum", seed=1).example_at(7).question


@pytest.mark.parametrize("name", ["advanced_geometry", "countdown", "number_sorting", "chain_sum"])
def test_an_answer_earns_what_the_own_grader_gives_also_a_part(name):
    task = ReasoningGym(name)
    dataset = reasoning_gym.create_dataset(name, seed=0)
    earned = set()
    for index in range(3):
        example = task.example_at(index, "eval")
        for answer in (example.answer, "zzz", "1"):
            expected = dataset.score_answer(answer, example.content[0])
            assert task.grade(example, answered(answer)) == expected
            earned.add(expected)
        assert task.grade(example, "<think>no answer</think>") == 0
    assert 1 in earned
    if name == "countdown":
        assert any(0 < reward < 1 for reward in earned)


def test_an_episode_pays_at_its_end():
    episode = gym.make("SAPO/ReasoningGym-v0", dataset="advanced_geometry")
    _, info = episode.reset(options={"index": 3, "split": "eval"})
    _, reward, terminated, _, _ = episode.step("<think>so it is ")
    assert (reward, terminated) == (0, False)
    _, reward, terminated, _, info = episode.step("wrong</think><answer>zzz</answer>")
    assert terminated and 0 < reward < 1 and not info["correct"]
    assert info["steps_correct"] == []


def test_a_grader_that_never_ends_earns_nothing(monkeypatch):
    slow = "import time\ndef judge(name, settings, item, answer): time.sleep(60)"
    monkeypatch.setattr(reasoning, "_GRADER", Judge("reasoning-gym", slow, deadline=0.5))
    task = ReasoningGym("chain_sum")
    example, start = task.example_at(0), time.perf_counter()
    assert task.grade(example, answered(example.answer)) == 0
    assert time.perf_counter() - start < 20


def test_a_demonstration_is_the_answer_or_that_of_another_question():
    task, rng = ReasoningGym("letter_counting"), np.random.default_rng(0)
    example = task.example_at(0)
    assert task.demonstrate(example, rng) == answered(example.answer)
    slips = [task.read_answer(task.demonstrate(example, rng, 0.5)) for _ in range(100)]
    assert 20 < sum(slip != example.answer for slip in slips) < 70


def test_what_has_many_right_answers_has_no_demonstrations():
    task = ReasoningGym("graph_color")
    with pytest.raises(ValueError, match="--warm_start_steps 0"):
        task.demonstrate(task.example_at(0), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        (["dataset=chain_sums"], "dataset='chain_sums' is unknown; expected one of ab, acre"),
        (["dataset=chain_sum", "colour=3"], "unexpected keyword argument 'colour'"),
        (["dataset=chain_sum", "min_terms=0"], "min_terms must be positive"),
        ([], "(ReasoningGym: dataset= is missing; give it the name of one of"),
    ],
)
def test_bad_input_is_one_line(keywords, said):
    settings, _ = train.parse(["--env", "SAPO/ReasoningGym-v0"])
    settings.env_args = keywords
    with pytest.raises(ValueError) as raised:
        train.make_env(settings)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        ReasoningGym("chain_sum")


def test_it_is_trained_end_to_end(tmp_path):
    flags = ["--env", "SAPO/ReasoningGym-v0", "--env_args", "dataset=chain_sum", "max_terms=2"]
    flags += ["--warm_start_steps", "2", "--batch", "4", "--minibatch", "2", "--iterations", "1"]
    flags += ["--max_new_tokens", "12", "--eval_episodes", "4", "--runs", str(tmp_path)]
    settings, config = train.parse(flags)
    run = train.build(settings, config)
    assert train.train(run)
    assert np.isfinite(train.iterate(run)["reward"])
