"""lab/treasure.py: a critic's values beside exact ones, at the start of each turn."""

import numpy as np
import pytest
import torch

import evaluation
import rollout
import train
from lab import treasure
from tasks.games import FIRST_EVAL_SEED, command_in

WORLD = ["--env", "SAPO/Treasure-v0", "--env_args", "size=3", "shortest=2", "longest=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    flags = ["--warm_start_steps", "3", "--warm_start_batch", "4", "--batch", "8"]
    flags += ["--max_new_tokens", "12", "--runs", str(tmp_path_factory.mktemp("runs"))]
    return train.build(*train.parse([*WORLD, *flags]))


def explorer_plays(run, monkeypatch, error_rate=0.0):
    """The policy writes the explorer's turns, and gives up in its second turn in odd games."""

    rng = np.random.default_rng(0)

    def write(run, inputs, temperature, top_p=1.0, limit=None):
        live = [episode for episode in run.envs if episode.unwrapped.end_reason == ""]
        texts = []
        for episode in live:
            number = int(episode.unwrapped.example.key.split("/")[1])
            game = episode.unwrapped.task.game
            gives_up = number % 2 == 1 and len(episode.unwrapped.turns) == 1
            texts.append("<end_of_utterance>" if gives_up else game.demonstrate(rng, error_rate))
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


def test_samples_have_the_exact_value_of_each_turn(run, monkeypatch):
    """Of an explorer who errs as often as they do."""
    explorer_plays(run, monkeypatch, error_rate=0.5)
    rows = train.samples(run)
    wrong = evaluation.wrong_share(rows)
    assert 0.2 < wrong < 0.8
    game, differing = run.grading_env.unwrapped.task.game, set()
    for i, row in enumerate(rows):
        game.reset(FIRST_EVAL_SEED + i)
        expected = [0.0] * len(row["tokens"])
        for turn in row["turns"]:
            tokens = range(turn["first"], turn["last"] + 1)
            chance = game.value(game.world, game.state, game.limit - game.turns, wrong)
            for t in tokens:
                expected[t] = chance
            game.step(command_in("".join(row["tokens"][t] for t in tokens)))
        assert row["exact_values"] == pytest.approx(expected, abs=1e-6)
        differing |= set(row["exact_values"])
    assert len(differing) > 3, "else this shows little"


def test_the_share_of_wrong_commands_counts_the_last_step_of_each_turn():
    turns = [{"first": 0, "last": 3}, {"first": 6, "last": 9}, {"first": 12, "last": 13}]
    steps = [[0, 0, False], [1, 2, True], [7, 7, True], [8, 8, False]]
    told = [{"turns": turns, "steps": steps}, {"turns": turns[:1], "steps": [[2, 2, True]]}]
    assert evaluation.wrong_share(told) == pytest.approx(1 / 3), "a turn of no form says nothing"
    assert evaluation.wrong_share([{"turns": turns, "steps": []}]) == 0


def test_other_worlds_are_refused_in_a_line(tmp_path):
    flags = ["--warm_start_steps", "0", "--batch", "4", "--runs", str(tmp_path)]
    other = train.build(*train.parse(flags))
    with pytest.raises(ValueError, match="expected a run with a critic on SAPO/Treasure-v0"):
        treasure.measure(other)
