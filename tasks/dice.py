"""DiceSum: read the dice in a picture, then add them up."""

import math
from dataclasses import dataclass

from tasks.pictures import PIPS, dice_picture
from tasks.sums import TextSum


@dataclass(frozen=True)
class DiceSum(TextSum):
    """n dice in a square of cells, none above `largest`; read them row by row, then add them up.

    The content is (the faces,), as a tuple of texts.
    """

    largest: int = 6
    ranges = {"n": (1, 25), "largest": (2, 6), "verbosity": (0, 200)}
    read_size = 1
    faces = tuple(PIPS)
    mistaken = {"6": "5"}
    """what the bad habit takes a face for"""

    @property
    def side(self):
        return math.isqrt(self.n - 1) + 1  # the square root of n, rounded up

    def _present(self, content, rng):
        (faces,) = content
        return dice_picture(faces, self.side, rng), "Sum the dice."

    def _slips(self, right, result):
        is_read = result is None
        if is_read:
            return [face for face in self.faces if face != right]
        return super()._slips(right, result)

    def _habit(self, right, result):
        """Takes a six for a five (`mistaken`), and forgets the carry as TextSum does."""
        is_read = result is None
        if is_read:
            return self.mistaken.get(right)
        return super()._habit(right, result)
