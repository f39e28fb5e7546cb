"""Games for the tests, foreign ones: no more than `reset` and `step`."""

from helpers import picture


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
