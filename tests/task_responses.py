"""Responses to the three tasks, right, wrong and hostile: for the tests of env.py and of tasks/."""

import numpy as np
from hypothesis import strategies as st

from tasks import END, TAGS, ArrowPath, DiceSum, TextSum

TASKS = (DiceSum(), ArrowPath(), TextSum())
EXAMPLES = {task: task.example_at(3) for task in TASKS}

# Text that looks like an attack on the grader: tags, halves of tags, true and false contents,
# digits of other scripts.
SCRAPS = [
    *TAGS,
    END,
    *("<answer>", "</answer>", "<", ">", "</", "answer>", "<end"),
    *("16", "B2", "C3", "3526", "3+5=8;", "8+2=10;", "10+6=16", "RC2;", "DC3"),
    *(" ", "\n", "\0", "１６", "٣", "²", "9" * 20, "-", "0"),
]
soup = st.lists(st.one_of(st.sampled_from(SCRAPS), st.text(max_size=4)), max_size=12).map("".join)

# The same for answers in LaTeX.
LATEX_SCRAPS = [
    *TAGS,
    *(END, r"\boxed{", "}", "{", "$", r"\text{", "16", "1/2", ",", ".", " ", "\\"),
    *("\ud800", "\0", "x", "²", "°"),
    *(
        r"\frac",
        r"\sqrt",
        r"\pi",
        "^",
        "0",
        "-",
        "(",
        ")",
        "1,000",
        "1.2.3",
        " million",
        "%",
        r"\$",
    ),
]
latex_pieces = st.one_of(st.sampled_from(LATEX_SCRAPS), st.text(max_size=3))
latex_soup = st.lists(latex_pieces, max_size=10).map("".join)


def play(episode, text, pieces=None, **options):
    """Reset, then write the text, in the given pieces or as one. -> (last step, total reward)"""
    episode.reset(options=options)
    total, last = 0.0, None
    for piece in [text] if pieces is None else pieces:
        last = episode.step(piece)
        _, reward, terminated, truncated, _ = last
        total += reward
        if terminated or truncated:
            break
    return last, total


def mistakes(task, count, error_rate):
    """(example, demonstration with slips) for the first so many examples."""
    rng = np.random.default_rng(0)
    for index in range(count):
        example = task.example_at(index)
        yield example, task.demonstrate(example, rng, error_rate)
