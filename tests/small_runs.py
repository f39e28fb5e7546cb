"""Trainings that take seconds, and what tests want to know of a run's folder."""

import json
import re

import gymnasium as gym
import numpy as np

import env
import tasks
import train
from lab.kills import equal, outcome

# One number to copy, "Add 37." -> "<think></think><answer>37</answer>", and half the demonstrations
# are wrong: the cheapest task that a tiny model learns in seconds, with room left for RL.
TASK = [
    *("--env", "SAPO/TextSum-v0", "--env_args", "n=1", "largest=99", "--max_new_tokens", "16"),
    *("--error_rate", "0.5", "--warm_start_steps", "150", "--warm_start_batch", "64"),
]
SHORT = [
    *TASK,
    *("--batch", "16", "--eval_episodes", "8", "--actor_lr", "1e-3", "--minibatch", "8"),
]
# A method with the groups, trees and continuations that fit a batch of 16 or 32
SMALL = [
    *("--group", "4", "--branching", "2", "2", "2", "--segment_tokens", "2"),
    *("--continuations", "3"),
]


def parsed(runs, *flags):
    """(settings, config) of a short run in the folder `runs`."""
    return train.parse([*SHORT, "--runs", str(runs), *flags])


def built(runs, *flags):
    """A short run, ready to train."""
    return train.build(*parsed(runs, *flags))


def resumed(folder, *flags):
    """The run of a folder, ready to go on."""
    return train.build(*train.parse(["--resume", str(folder), *flags]))


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(one, other):
    """The two folders hold the same checkpoint, metrics and samples, to the last bit."""
    a, b = outcome(one), outcome(other)
    for part in a.keys() | b.keys():
        assert equal(a[part], b[part]), part


def tokens_of(text):
    """Tokens as the tiny model has them: a tag each, a character each, the end mark as one."""
    return re.findall("|".join([*tasks.TAGS, env.END]) + "|[\\s\\S]", text)


def an_episode(**kwargs):
    """A fresh episode of three numbers to add, and its right response."""
    episode = gym.make("SAPO/TextSum-v0", n=3, disable_env_checker=True, **kwargs)
    episode.reset(options={"index": 5})
    task, example = episode.unwrapped.task, episode.unwrapped.example
    return episode, task.demonstrate(example, np.random.default_rng(0))


def check_samples(rows, has_critic):
    """What every row of samples.jsonl promises."""
    for row in rows:
        n, text = len(row["tokens"]), "".join(row["tokens"])
        assert {len(row[key]) for key in ("entropy", "advantages", "ends")} == {n}
        assert row["ends"][-1] is True
        assert all(0 <= a <= b < n and isinstance(right, bool) for a, b, right in row["steps"])
        assert all(entropy >= 0 for entropy in row["entropy"])
        split = "train" if "learned_from" in row else "eval"
        assert row["example_id"].startswith(f"{split}/")
        per_segment = [row["advantages"]]
        if has_critic:
            assert len(row["values"]) == n
            per_segment.append(row["values"])
        else:
            assert row["values"] is None
        ends = [place + 1 for place, end in enumerate(row["ends"]) if end]
        for start, end in zip([0, *ends], ends, strict=False):
            assert all(len(set(numbers[start:end])) == 1 for numbers in per_segment)
        if row["reward"] == 1:
            assert row["predicted"] == row["answer"]
            assert f"<answer>{row['answer']}</answer>" in text
            first, last, right = row["steps"][-1]
            assert right and "".join(row["tokens"][first : last + 1]) == row["answer"]
