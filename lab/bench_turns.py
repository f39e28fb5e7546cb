"""What does it cost that a world answers? The time per generated token, by the number of turns."""

import tempfile
import time
from unittest import mock

import numpy as np
import torch

import env
import rollout
import train
import vlm

TOKENS = 120  # that each episode writes, whatever the number of its turns
TURNS = (1, 5, 20)


class Clockwork:
    """A game of so many turns, whatever the commands; its reply is two words."""

    def __init__(self, turns):
        self.turns = turns

    def reset(self, seed):
        self.left = self.turns
        return "Write."

    def step(self, command):
        self.left -= 1
        return "Go on.", 0.0, self.left == 0, False, {}


class Paced(env.GameEnv):
    """Every `step` is a turn: the command is closed for a policy with random weights, which would
    never close it."""

    def step(self, action):
        return super().step("<act></act>")


def measure(rows=64, rounds=5) -> dict:
    """Seconds per generated token at each of TURNS. -> results/bench_turns.json.

    64 episodes of 120 tokens each, with the tiny model: one turn of 120, five of 24, twenty of 6.
    With and without keys and values kept between the turns. In turn, in one process; medians.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env", "SAPO/Treasure-v0", "--env_args", "size=3", "shortest=2", "longest=4"]
        flags += ["--warm_start_steps", "0", "--runs", folder, "--batch", str(rows)]
        run = train.build(*train.parse(flags))
        seconds = {}
        for _ in range(rounds):
            for turns in TURNS:
                for kept in (True, False) if turns > 1 else (True,):
                    name = f"{turns} turns, {'kept' if kept else 'read again'}"
                    seconds.setdefault(name, []).append(seconds_per_token(run, rows, turns, kept))
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    single = median["1 turns, kept"]
    of_single = {name: middle / single for name, middle in median.items()}
    for name, share in of_single.items():
        print(f"{name:22}{1e6 * median[name]:8.1f} us per token   {share:.2f} of one turn")
    return {
        "what": "Seconds per generated token: 64 episodes of 120 tokens, in 1, 5 or 20 turns, keys "
        "and values kept between turns or all read again. The tiny model, text replies.",
        "threads": torch.get_num_threads(),
        "seconds_per_token": seconds,
        "median": median,
        "of_one_turn": of_single,
    }


@torch.no_grad()
def seconds_per_token(run, rows, turns, kept):
    """One batch of episodes, timed."""
    run.envs = [Paced(Clockwork(turns)) for _ in range(rows)]
    run.settings.max_new_tokens = TOKENS // turns
    torch.manual_seed(0)
    can_keep = vlm.can_keep_cache if kept else lambda inputs: False
    # Nothing ends a turn but its length, so that all episodes write equally much.
    policy = run.models.policy
    banned, closes = policy.banned.clone(), policy.tokenizer.convert_tokens_to_ids("</act>")
    policy.banned[[*policy.eos_ids, closes]] = True
    try:
        with mock.patch.object(vlm, "can_keep_cache", can_keep):
            begin = time.perf_counter()
            written = rollout.play(run, np.arange(rows), "train", 1.0).written
            took = time.perf_counter() - begin
    finally:
        policy.banned[:] = banned
    return took / int(written.sum())
