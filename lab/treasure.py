"""Treasure: a critic's values against exact ones.

    python -m lab.treasure runs/<name>        # -> results/treasure-values-<name>.json

The policy of a finished run plays held-out games. At the start of each of its turns the critic says
what it expects, and the world says exactly how likely an explorer succeeds from there who gives a
wrong command as often as this policy does (`Treasure.value`). That is no ceiling for a critic. The
explorer is not the policy, which errs more where it sees badly; and his value is computed by one
who sees the whole world, dark cells included. The outcomes judge both.
"""

import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import evaluation
import rollout
import train
from lab.common import command_line, whole, writable
from lab.sweep import ROOT
from tasks import Treasure


def turn_starts(batch, row):
    """The position of the first token of each turn of a response."""
    written = batch.rollout.mask[row].nonzero().flatten().tolist()
    return [first for first, _ in evaluation.runs_of(written)]


def states_of(played):
    """[(world, state, turns left), ...] at the beginning of the turns of a played game."""
    turns = [turn for turn, _ in played.turns]
    moments = played.task.replayed(played.example, turns)
    return [(game.world, game.state, game.limit - game.turns) for game, *_ in moments]


@torch.no_grad()
def measure(run, count=256) -> dict:
    """A run's critic on the first `count` held-out games. ValueError for a run without a critic,
    or of another world."""
    game = getattr(run.grading_env.unwrapped.task, "game", None)
    if run.models.critic is None or not isinstance(game, Treasure):
        raise ValueError(f"{run.folder}: expected a run with a critic on SAPO/Treasure-v0")
    guesses, outcomes, states, won, right = [], [], [], [], []
    for first in range(0, count, len(run.envs)):
        indices = np.arange(first, min(count, first + len(run.envs)))
        batch = rollout.collect(run, indices, "eval")
        for row, environment in enumerate(batch.envs):
            played = environment.unwrapped
            of_row = states_of(played)
            starts = turn_starts(batch, row)[: len(of_row)]  # a turn cut off is no state
            guesses += batch.rollout.values[row, starts].tolist()
            right += played.task.were_right(played.example, [turn for turn, _ in played.turns])
            won.append(float(batch.infos[row]["correct"]))
            outcomes += [won[-1]] * len(of_row)
            states += of_row
    error_rate = 1 - np.mean(right)
    exact = [game.value(*state, error_rate) for state in states]
    guesses, exact, outcomes = map(np.array, (guesses, exact, outcomes))
    return {
        "games": count,
        "states": len(states),
        "wrong_commands": float(error_rate),
        "success": float(np.mean(won)),
        "rmse": float(np.sqrt(np.mean((guesses - exact) ** 2))),
        "spread_of_exact": float(exact.std()),
        # none where one of them says the same of every state
        "correlation": float(np.corrcoef(guesses, exact)[0, 1])
        if guesses.std() and exact.std()
        else None,
        "explained_variance_of_outcomes": {
            "critic": explained(outcomes, guesses),
            "exact values of the explorer": explained(outcomes, exact),
        },
    }


def explained(outcomes, values):
    """1 - Var(outcome - value) / Var(outcome)."""
    return float(1 - np.var(outcomes - values) / np.var(outcomes))


def main(argv=None):
    """The command line."""
    parser = command_line("treasure", __doc__)
    parser.add_argument("folder", type=Path, help="a finished run, runs/<name>")
    parser.add_argument("--games", type=whole(1), default=256)
    arguments = parser.parse_args(argv)
    file = writable(ROOT / "results" / f"treasure-values-{arguments.folder.name}.json")
    try:
        run = train.build(*train.parse(["--resume", str(arguments.folder)]))
        measured = measure(run, arguments.games)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.treasure: {error}") from error
    outcome = {
        "command": f"python -m lab.treasure {arguments.folder} --games {arguments.games}",
        "seed": run.settings.seed,
        "date": time.strftime("%Y-%m-%d"),
        **measured,
    }
    checkpoint.write_json(file, outcome)
    print(checkpoint.as_json(outcome, indent=1))


if __name__ == "__main__":
    main()
