"""TextSum: add up the numbers in the question. There is no picture: the text-only branch."""

from dataclasses import dataclass, field

from tasks.base import Task

OFFSETS = (-3, -2, -1, 1, 2, 3)  # by how much a sum that slips is off


@dataclass(frozen=True)
class TextSum(Task):
    """n numbers from 1 to `largest`, given in the question; add them up one by one.

    The content is (the numbers,), as a tuple of texts.
    """

    n: int = 4
    largest: int = 9
    verbosity: int = field(default=0, repr=False)  # not in the repr: the examples stay the same
    habits: float = field(default=0.0, repr=False)  # nor this: only the demonstrations change
    ranges = {"n": (1, 64), "largest": (2, 999), "verbosity": (0, 200)}

    @property
    def move_count(self):
        return self.n - 1

    def _draw(self, rng):
        numbers = tuple(str(number) for number in rng.integers(1, self.largest + 1, self.n))
        return (numbers,)

    def _present(self, content, rng):
        (numbers,) = content
        return None, f"Add {' '.join(numbers)}."

    def _move(self, content, known, i, result):
        if i + 1 >= len(known):  # a response may have read too few
            return None
        number = known[i + 1]
        if not result.isdecimal() or not number.isdecimal():  # or read what is no number
            return None
        return f"{result}+{number}={int(result) + int(number)}"

    def _slips(self, right, result):
        # Of a move, "8+2=10", the sum after the "=" is off; of the answer, "10", all there is.
        terms, equals, total = right.rpartition("=")
        totals = [int(total) + offset for offset in OFFSETS]
        return [f"{terms}{equals}{wrong}" for wrong in totals if wrong >= 0]

    def _habit(self, right, result):
        """Forgets the carry: 8+5=3, and 18+5=13."""
        terms, equals, total = right.rpartition("=")
        is_move = equals != "" and result.isdecimal()  # not so in a response that read an "="
        if not is_move:
            return None
        # A sum carries if its last digit comes out below that of what was added to.
        carries = int(total) % 10 < int(result) % 10
        return f"{terms}={int(total) - 10}" if carries else None
