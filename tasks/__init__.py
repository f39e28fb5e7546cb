"""What is asked: tasks solved by a chain of small decisions, each of which can be checked.

    DiceSum    Sum the dice.
               <see>3526</see><think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>
    ArrowPath  Follow 2 arrows.
               <see>B2</see><think>RC2;DC3</think><answer>C3</answer>
    TextSum    Add 3 5 2 6.
               <think>3+5=8;8+2=10;10+6=16</think><answer>16</answer>

Every read, addition, move and answer is one *step*, and `Task.check_steps` says which are right
given what the response itself said before. So the slip that spoilt a response is known, and credit
assignment can be measured, not guessed. Every task has a `verbosity`: so many words that decide
nothing stand before each move. And it has `habits`: the share of the time that its demonstrations
follow a bad habit (a six taken for a five, a carry forgotten, an arrow up taken for one down).

    base.py      what all tasks share: where a response ends, its steps, which of them are right
    sums.py      TextSum, the simplest task
    dice.py      DiceSum, the same sums read off a picture
    digits.py    DigitSum, the same with real handwritten digits
    arrows.py    ArrowPath, where one slip ruins the rest
    pictures.py  how dice and arrows are drawn, and pictures of any kind made RGB
    games.py     worlds that answer: what a game is, and how one becomes something to learn from
    treasure.py  Treasure, a game: find the key, open the door, take what lies behind it
    babyai.py    the levels of BabyAI, as games
    textworld.py games made by the package textworld, seen in one line
    dataset.py   your own pictures, questions and answers
    grading.py   how their answers are compared
    latex.py     answers read as mathematics, and which are worked out
    reasoning.py any data set of the package reasoning-gym, with its own grader
    judge.py     the process in which graders work that may never end

A task of your own is a class like TextSum. Left out on purpose: partial credit, which would give
away what SAPO has to find out.
"""

from tasks.arrows import ArrowPath
from tasks.babyai import BabyAI
from tasks.base import CELL, END, SPLITS, TAGS, Example, Task, read_answer, until_end
from tasks.dice import DiceSum
from tasks.digits import DigitSum
from tasks.sums import TextSum
from tasks.textworld import TextWorld
from tasks.treasure import Treasure

TASKS = {"DiceSum": DiceSum, "ArrowPath": ArrowPath, "TextSum": TextSum, "DigitSum": DigitSum}
GAMES = {"Treasure": Treasure, "BabyAI": BabyAI, "TextWorld": TextWorld}

__all__ = [
    "CELL",
    "END",
    "GAMES",
    "SPLITS",
    "TAGS",
    "TASKS",
    "ArrowPath",
    "BabyAI",
    "DiceSum",
    "DigitSum",
    "Example",
    "Task",
    "TextSum",
    "TextWorld",
    "Treasure",
    "read_answer",
    "until_end",
]
