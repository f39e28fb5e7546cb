"""lab/steps.py: steps, and their credit, by whether the teacher's bad habit applies to them."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import SHORT, built

import rollout
import train
from lab import steps
from tasks import DiceSum


def test_steps_are_counted_by_kind_and_by_whether_they_are_right(runs, monkeypatch):
    """Of answers written here, whose one step, the answer, is said to be hard, or not."""
    run = built(runs, "--name", "stepped", "--batch", "8", "--habits", "0")
    task = run.grading_env.unwrapped.task
    monkeypatch.setattr(
        type(task),
        "hard_steps",
        lambda task, example, text: [True],
    )
    collect, change = rollout.collect, {}

    def rewritten(run, indices, split):
        batch = collect(run, indices, split)
        texts = [
            task.demonstrate(environment.unwrapped.example, np.random.default_rng(0))
            for environment in batch.envs
        ]
        return replace(batch, texts=[[re.sub("(?<=<answer>).*(?=</)", *change, t)] for t in texts])

    def counted(answer):
        monkeypatch.setattr(rollout, "collect", rewritten)
        change.clear()
        change[answer] = None
        return steps.counted(run)

    outcome = counted(r"\g<0>")
    assert list(outcome) == ["questions", "accuracy", "steps", "credit"]
    assert outcome["questions"] == 8 and outcome["steps"] == {"hard": [8, 1.0]}
    assert outcome["credit"]["hard"]["answer"]["right"][0] == 8
    assert counted("nothing")["steps"] == {"hard": [8, 0.0]}
    monkeypatch.setattr(type(task), "hard_steps", lambda task, example, text: [False])
    assert counted(r"\g<0>")["steps"] == {"other": [8, 1.0]}


def test_steps_are_credited_by_kind_and_by_whether_they_are_right():
    """Three responses to a six and a five, of which reading the six is hard, and so is the sum that
    carries. The last one's answer is empty: that step has no token."""
    texts = [
        "<see> 6 5 </see> <think> 6+5= 11 </think> <answer> 11 </answer>",
        "<see> 5 5 </see> <think> 5+5= 10 </think> <answer> 10 </answer>",
        "<see> 6 6 </see> <think> 6+6= 2 </think> <answer> </answer>",
    ]
    example = SimpleNamespace(content=(("6", "5"),))
    environment = SimpleNamespace(unwrapped=SimpleNamespace(task=DiceSum(n=2), example=example))
    rewards = torch.zeros(3, 11)
    rewards[0, 3], rewards[0, 10], rewards[1, 10] = 0.25, 0.75, 0.5
    batch = SimpleNamespace(
        envs=[environment] * 3,
        texts=[text.split() for text in texts],
        rollout=SimpleNamespace(rewards=rewards),
    )
    advantages = torch.full((3, 11), 9.0)  # of the tokens that are in no step
    advantages[:, 1:3] = torch.tensor([[0.1, 0.2], [-0.1, 0.4], [0.5, -0.3]])  # two reads
    advantages[:, 5:7] = torch.tensor([[0.3, 0.5], [-0.2, -0.8], [-0.4, -0.6]])  # one move
    advantages[:2, 9] = torch.tensor([0.7, -0.5])  # the answer
    assert steps.credited(batch, advantages) == {
        "hard": {
            "read": {"right": [2, 0.5, 0.3], "wrong": [1, 0.5, -0.1]},
            "move": {"right": [2, 0.75, -0.05], "wrong": [1, 0.0, -0.5]},
        },
        "other": {
            "read": {"right": [2, 0.75, 0.3], "wrong": [1, 0.0, -0.3]},
            "answer": {"right": [2, 0.75, 0.1]},
        },
    }


def test_only_a_critic_credits_steps(runs):
    run = built(runs, "--name", "uncredited", "--batch", "8", "--method", "grpo", "--group", "4")
    assert list(steps.counted(run)) == ["questions", "accuracy", "steps"]


def test_the_credit_is_that_of_training(runs, monkeypatch):
    """The advantages of `train.assign_credit`, from the batch whose steps are counted."""
    run = built(runs, "--name", "credited", "--batch", "8")
    asked = []

    def of_one_number(run, batch):
        asked.append((run, batch))
        return train.Credit(torch.full(batch.tokens.shape, 0.125), None)

    monkeypatch.setattr(train, "assign_credit", of_one_number)
    outcome = steps.counted(run)
    ((credited, batch),) = asked
    assert credited is run and len(batch.tokens) == 8
    (answers,) = outcome["credit"]["other"].values()  # nothing to read, and no move
    counts = [of_outcome[0] for of_outcome in answers.values()]
    assert sum(counts) == outcome["steps"]["other"][0]
    assert {of_outcome[2] for of_outcome in answers.values()} == {0.125}


@pytest.mark.parametrize(("words", "trained"), [([], 0), (["--iterations", "2"], 2)])
def test_it_trains_for_as_many_rollouts_as_are_asked_for(
    runs, tmp_path, monkeypatch, words, trained
):
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    iterate, counted, order = train.iterate, steps.counted, []

    def iterated(run):
        order.append("iterate")
        return iterate(run)

    def noted(run):
        order.append((run.progress.iteration, torch.rand(1).item()))
        return counted(run)

    monkeypatch.setattr(train, "iterate", iterated)
    monkeypatch.setattr(steps, "counted", noted)
    steps.main([*SHORT, "--runs", str(runs), "--name", f"after-{trained}", *words])
    torch.manual_seed(0)  # that of the run: the same draws, however long it trained
    assert order == ["iterate"] * trained + [(trained, torch.rand(1).item())]
    outcome = json.loads((tmp_path / "results" / f"steps-after-{trained}.json").read_text())
    assert outcome["credit"]["other"]["answer"]


def test_the_outcome_says_how_it_was_made(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    words = [*SHORT, "--runs", str(runs), "--name", "counted"]
    steps.main(words)
    outcome = json.loads((tmp_path / "results" / "steps-counted.json").read_text())
    assert outcome["command"].endswith("--name counted") and outcome["steps"]
    with pytest.raises(SystemExit, match="python -m lab.steps: "):
        steps.main([*words, "--model", str(tmp_path / "none")])
