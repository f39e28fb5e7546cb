"""tasks/digits.py: handwritten digits, whose scans are held out for evaluation."""

import itertools
import sys

import numpy as np
import pytest

from tasks.base import SPLITS

pytest.importorskip("sklearn", reason="needs scikit-learn")

from tasks import DigitSum, digits  # noqa: E402

TASK = DigitSum()


def test_each_of_the_1797_scans_is_for_training_or_for_evaluation():
    counts = {split: sum(map(len, of_split.values())) for split, of_split in digits.scans().items()}
    assert sum(counts.values()) == 1797
    assert 0.15 < counts["eval"] / 1797 < 0.25
    bytes_of = [
        {scan.tobytes() for of_digit in digits.scans()[split].values() for scan in of_digit}
        for split in SPLITS
    ]
    assert not bytes_of[0] & bytes_of[1]


def test_an_example_shows_scans_of_its_split_alone(monkeypatch):
    white = {digit: np.zeros((1, 8, 8)) for digit in digits.DIGITS}
    black = {digit: np.ones((1, 8, 8)) for digit in digits.DIGITS}
    monkeypatch.setattr(digits, "scans", lambda: {"train": white, "eval": black})
    task = DigitSum()
    for index in range(10):
        assert np.array(task.example_at(index, "train").image).min() > 150
        assert np.array(task.example_at(index, "eval").image).min() < 110


def test_a_digit_is_shown_as_itself():
    """The nearest scan, by eye as it were, is mostly one of the digit that the example says."""
    references = [
        (digit, scan) for digit, of_digit in digits.scans()["train"].items() for scan in of_digit
    ]
    stack = np.stack([scan for _, scan in references])  # (scans, 8, 8)
    right = []
    for index in range(40):
        example = DigitSum(n=1).example_at(index, "eval")
        grey = example.image.convert("L")
        distances = []
        for left, top in itertools.product(range(3), repeat=2):  # it may lie anywhere in its cell
            crop = grey.crop((left, top, left + 14, top + 14)).resize((8, 8))
            paper = np.asarray(crop, dtype=float)
            ink = (paper.max() - paper) / np.ptp(paper)
            distances.append(np.square(stack - ink).sum((1, 2)))
        nearest = np.min(distances, axis=0).argmin()
        right.append(references[nearest][0] == example.content[0][0])
    assert np.mean(right) >= 0.9


def test_examples_stay_the_same_and_cover_all_digits():
    seen = set()
    for index in range(60):
        first, second = TASK.example_at(index), TASK.example_at(index)
        assert first.content == second.content
        assert first.image.tobytes() == second.image.tobytes()
        assert first.answer == str(sum(map(int, first.content[0])))
        seen |= set(first.content[0])
    assert seen == set(digits.DIGITS)


def test_the_habits_take_sevens_for_ones_and_forget_carries():
    rng = np.random.default_rng(0)
    task = DigitSum(habits=1)
    for index in range(30):
        example = task.example_at(index)
        text = task.demonstrate(example, rng)
        read = text.removeprefix("<see>").partition("<")[0]
        assert read == "".join(example.content[0]).replace("7", "1")
        assert int(task.read_answer(text)) < 10


@pytest.mark.parametrize("largest", [0, 10])
def test_digits_end_at_nine(largest):
    with pytest.raises(ValueError, match="largest"):
        DigitSum(largest=largest)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.scans.cache_clear()
    try:
        with pytest.raises(ImportError, match="pip install scikit-learn"):
            DigitSum()
    finally:
        digits.scans.cache_clear()
