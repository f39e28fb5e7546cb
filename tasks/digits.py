"""DigitSum: read real handwritten digits, then add them up. Here reading can really fail."""

import functools
from dataclasses import dataclass

import numpy as np

from tasks.base import SPLITS, split_of
from tasks.dice import DiceSum
from tasks.pictures import scans_picture

DIGITS = "0123456789"


@functools.cache
def scans():
    """{split: {digit: its scans, (count, 8, 8), 0 for paper to 1 for ink}}.

    These are the 1,797 handwritten digits that come with scikit-learn. 1 in 5 is held out for
    evaluation, by its number; a writer may have written for both splits. ImportError without
    scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "SAPO/DigitSum-v0 needs a package that is not installed: pip install scikit-learn"
        ) from None
    data = load_digits()
    split = np.array([split_of(f"scan {number}") for number in range(len(data.target))])
    return {
        name: {
            digit: data.images[(data.target == int(digit)) & (split == name)] / 16
            for digit in DIGITS
        }
        for name in SPLITS
    }


@dataclass(frozen=True)
class DigitSum(DiceSum):
    """n handwritten digits, 0 to `largest`, in a square of cells; read them row by row, then add
    them up. An example of the evaluation shows scans that no example of the training shows.

    The bad habit takes a seven for a one. The content is (the digits,), as a tuple of texts.
    ImportError without scikit-learn.
    """

    largest: int = 9
    ranges = {"n": (1, 25), "largest": (1, 9), "verbosity": (0, 200)}
    faces = tuple(DIGITS)
    mistaken = {"7": "1"}

    def __post_init__(self):
        super().__post_init__()
        scans()  # what is missing is missed at once

    def _draw(self, rng):
        return (tuple(str(digit) for digit in rng.integers(self.largest + 1, size=self.n)),)

    def _present(self, content, rng):
        (digits,) = content
        of_split = scans()[split_of(repr(content))]
        drawn = [rng.choice(of_split[digit]) for digit in digits]
        return scans_picture(drawn, self.side, rng), "Sum the digits."
