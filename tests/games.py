"""Games for the tests, foreign ones: no more than `reset` and `step`."""

import numpy as np
from helpers import picture

from tasks.games import command_in


class Spell:
    """Spell a word, one letter a turn; each right letter earns 1. The seed chooses the word."""

    spelled = ("ab", "cab", "a", "bacab")

    def __init__(self, pictured=False):
        self.pictured = pictured

    def reset(self, seed):
        self.left = self.spelled[seed % len(self.spelled)]
        return self._shown(f"Spell {self.left}.")

    def step(self, command):
        if command != self.left[0]:
            return self._shown("No."), 0.0, False, False, {}
        self.left = self.left[1:]
        return self._shown("Yes."), 1.0, not self.left, False, {}

    def _shown(self, words):
        return (words, picture(len(self.left))) if self.pictured else words


class Breaks(Spell):
    """Raises in its second turn."""

    def step(self, command):
        if len(self.left) < 2:
            raise RuntimeError("the wheels came off")
        return super().step(command)


class Endless(Spell):
    """Never ends, and talks a lot."""

    def step(self, command):
        return "on and " * 100 + "on", 0.0, False, False, {}


def demonstrated(game, seed, error_rate=0.0):
    """[(the teacher's turn, its checks, the step's five values), ...] of a game."""
    rng = np.random.default_rng(seed)
    game.reset(seed)
    turns, over = [], False
    while not over:
        text = game.demonstrate(rng, error_rate)
        checks = game.check(text)
        stepped = game.step(command_in(text))
        turns.append((text, checks, stepped))
        over = stepped[2] or stepped[3]
    return turns
