"""lab/treasure.py: a critic's values beside exact ones, at the start of each turn."""

import types

import numpy as np
import pytest
import torch

import evaluation
import rollout
import train
from lab import treasure
from tasks import Treasure
from tasks.games import FIRST_EVAL_SEED, GameTask, command_in

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
    game, right, played = Treasure(size=3, shortest=2, longest=4), [], []
    for i, row in enumerate(rows):
        game.reset(FIRST_EVAL_SEED + i)
        for turn in row["turns"]:
            command = command_in("".join(row["tokens"][turn["first"] : turn["last"] + 1]))
            now = game.world, game.state, game.limit - game.turns
            reward = 0.0
            if command:
                right.append(command in game.right_commands(game.world, game.state))
                _, reward, *_ = game.step(command)
            played.append(
                (row, turn, now, (game.world, game.state, game.limit - game.turns), reward)
            )
    error_rate = 1 - np.mean(right)
    assert 0.2 < error_rate < 0.8
    falls, wins = 0, 0
    for row, turn, now, then, reward in played:
        tokens, values = row["tokens"], row["exact_values"]
        here = slice(turn["first"], turn["last"] + 1)
        closed = tokens[here].index("</act>") if "</act>" in tokens[here] else len(tokens[here])
        before = game.value(*now, error_rate)
        assert values[here][:closed] == pytest.approx([before] * closed, abs=1e-6)
        if closed < len(tokens[here]):
            behind = reward or game.value(*then, error_rate)
            assert values[here][closed:] == pytest.approx([behind], abs=1e-6)
            falls += behind < before - 0.1
            wins += reward
    assert falls and wins, "else this shows little"


def test_the_critic_is_judged_by_an_explorer_who_errs_as_often(run, monkeypatch):
    """State by state, from a replay of ours."""
    explorer_plays(run, monkeypatch, error_rate=0.5)
    monkeypatch.setattr(
        rollout, "critic_values", lambda run, responses, logp: torch.full(logp.shape, 0.5)
    )
    measured = treasure.measure(run, 8)
    right, states, game = [], [], Treasure(size=3, shortest=2, longest=4)
    explorer_plays(run, monkeypatch, error_rate=0.5)  # the same games once more
    batch = rollout.collect(run, np.arange(8), "eval")
    for i, environment in enumerate(batch.envs):
        game.reset(FIRST_EVAL_SEED + i)
        for turn, _ in environment.unwrapped.turns:
            states.append((game.world, game.state, game.limit - game.turns))
            right.append(command_in(turn) in game.right_commands(game.world, game.state))
            game.step(command_in(turn))
    error_rate = 1 - np.mean(right)
    exact = np.array([game.value(*state, error_rate) for state in states])
    assert 0.2 < error_rate < 0.8 and measured["wrong_commands"] == pytest.approx(error_rate)
    assert measured["states"] == len(states) and exact.std() > 0.05
    assert measured["spread_of_exact"] == pytest.approx(exact.std())
    assert measured["rmse"] == pytest.approx(np.sqrt(np.mean((exact - 0.5) ** 2)))


def test_a_command_of_another_form_has_a_value_behind_it():
    """The game knows no step of such a turn."""
    task = GameTask(Treasure(size=3, shortest=2, longest=4))
    example = task.example_at(0)
    pieces = ["<act>", "go up", "</act>", "<act>", "go", " up"]
    before, behind = (value for value, _ in task.exact_values(example, ["<act></act>"] * 2, 0.5))
    assert before > behind + 0.01
    turns = [{"first": 0, "last": 2}, {"first": 3, "last": 5}]
    told = [{"tokens": pieces, "turns": turns, "steps": []}]
    played = types.SimpleNamespace(task=task, example=example)
    evaluation.add_exact_values(told, [played])
    error_rate = 1.0  # one closed command, and it was wrong
    values = task.exact_values(example, ["<act>go up</act>", "<act>go up"], error_rate)
    (before, behind), (then, _) = values
    assert told[0]["exact_values"] == pytest.approx([before, before, behind, then, then, then])


def test_a_command_not_known_for_right_is_wrong():
    task = GameTask(Treasure(size=3, shortest=2, longest=4))
    example = task.example_at(0)
    (good,) = (text for _, _, text in task.transcript(example, np.random.default_rng(0))[:1])
    thought = good.partition("<act>")[0]
    other = "<act>go up</act>"  # of no form
    turns = [f"{thought}<act></act>", other, f"{thought}<act>go up</act>", good, thought]
    assert task.were_right(example, turns) == [False, False, False, True]
    assert task.were_right(example, [thought, good]) == [], "it was never closed"


def test_worlds_too_large_and_games_that_raise_go_without_exact_values(run, monkeypatch):
    explorer_plays(run, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(Treasure, "exact_value", lambda game, rate: 1 / 0)
        with pytest.warns(UserWarning, match="no exact values, as they raised ZeroDivisionError"):
            rows = train.samples(run)
    assert all("exact_values" not in row and "tokens" in row for row in rows)
    with monkeypatch.context() as patched:
        patched.setattr(Treasure, "exact_value", lambda game, rate: None)
        rows = train.samples(run)
    assert len(rows) == 8 and all("exact_values" not in row for row in rows)
    assert {row["correct"] for row in rows} == {True, False}
    large = GameTask(Treasure(size=5))
    example = large.example_at(0)
    turns = [text for _, _, text in large.transcript(example, np.random.default_rng(0))]
    assert large.exact_values(example, turns, 0.1) is None


def test_other_worlds_are_refused_in_a_line(tmp_path):
    flags = ["--warm_start_steps", "0", "--batch", "4", "--runs", str(tmp_path)]
    other = train.build(*train.parse(flags))
    with pytest.raises(ValueError, match="expected a run with a critic on SAPO/Treasure-v0"):
        treasure.measure(other)
