"""lab/steps.py: steps counted by whether the teacher's bad habit applies to them."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from small_runs import SHORT, built

import rollout
from lab import steps


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

    assert counted(r"\g<0>") | {"accuracy": 0} == {
        "questions": 8,
        "accuracy": 0,
        "steps": {"hard": [8, 1.0]},
    }
    assert counted("nothing")["steps"] == {"hard": [8, 0.0]}
    monkeypatch.setattr(type(task), "hard_steps", lambda task, example, text: [False])
    assert counted(r"\g<0>")["steps"] == {"other": [8, 1.0]}


def test_the_outcome_says_how_it_was_made(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    words = [*SHORT, "--runs", str(runs), "--name", "counted"]
    steps.main(words)
    outcome = json.loads((tmp_path / "results" / "steps-counted.json").read_text())
    assert outcome["command"].endswith("--name counted") and outcome["steps"]
    with pytest.raises(SystemExit, match="python -m lab.steps: "):
        steps.main([*words, "--model", str(tmp_path / "none")])
