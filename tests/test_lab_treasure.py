"""lab/treasure.py: a critic's values beside exact ones, at the start of each turn."""

import numpy as np
import pytest
import torch

import rollout
import train
from lab import treasure

WORLD = ["--env", "SAPO/Treasure-v0", "--env_args", "size=3", "shortest=2", "longest=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    flags = ["--warm_start_steps", "3", "--warm_start_batch", "4", "--batch", "8"]
    flags += ["--max_new_tokens", "12", "--runs", str(tmp_path_factory.mktemp("runs"))]
    return train.build(*train.parse([*WORLD, *flags]))


def explorer_plays(run, monkeypatch):
    """The policy writes the explorer's turns, and gives up in its second turn in odd games."""

    def write(run, inputs, temperature, top_p=1.0, limit=None):
        live = [episode for episode in run.envs if episode.unwrapped.end_reason == ""]
        texts = []
        for episode in live:
            number = int(episode.unwrapped.example.key.split("/")[1])
            game = episode.unwrapped.task.game
            gives_up = number % 2 == 1 and len(episode.unwrapped.turns) == 1
            texts.append(
                "<end_of_utterance>" if gives_up else game.demonstrate(np.random.default_rng(0))
            )
        policy = run.models.policy
        rows = [torch.tensor(ids) for ids in policy.tokenizer(texts)["input_ids"]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, policy.eos_ids[0])
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])
        return tokens, mask, rollout.vlm.token_texts(policy, tokens, mask, "<end>")

    monkeypatch.setattr(rollout, "write", write)
    for episode in run.envs:
        episode.unwrapped.task.game.habits = 0.0


def test_an_explorer_who_never_errs_has_the_exact_value_one(run, monkeypatch):
    explorer_plays(run, monkeypatch)
    monkeypatch.setattr(
        rollout, "critic_values", lambda run, responses, logp: torch.full(logp.shape, 0.5)
    )
    measured = treasure.measure(run, 16)
    assert measured["wrong_commands"] == 0 and measured["success"] == 0.5
    assert measured["rmse"] == pytest.approx(0.5) and measured["spread_of_exact"] == 0
    assert measured["states"] > 16
    assert measured["explained_variance_of_outcomes"]["critic"] == pytest.approx(0.0)


def test_other_worlds_are_refused_in_a_line(tmp_path):
    flags = ["--warm_start_steps", "0", "--batch", "4", "--runs", str(tmp_path)]
    other = train.build(*train.parse(flags))
    with pytest.raises(ValueError, match="expected a run with a critic on SAPO/Treasure-v0"):
        treasure.measure(other)
