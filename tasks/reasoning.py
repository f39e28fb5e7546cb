"""Any data set of the package reasoning-gym as a task: `import env` registers SAPO/ReasoningGym-v0.

    gym.make("SAPO/ReasoningGym-v0", dataset="chain_sum", max_terms=3, max_digits=1)

A hundred procedural data sets come with their graders, whose partial scores stay partial: an answer
may earn 0.01 or 0.5. Further keywords are the data set's own settings. The steps of a response are
not known, so none is ever checked.

A data set makes its items from a seed and a number. Where there are few different ones (the words
of three letters, say) far-off numbers repeat a question, so it is the question that decides on its
split, by a hash, as in our own tasks.
"""

import base64
import json
import pickle
import zlib

from tasks.base import MAX_DRAWS, Example, StepsUnknown, check_index, split_of
from tasks.dataset import MAX_PROMPT, STYLES
from tasks.judge import Judge

# Graders parse, and some run, what a model has written. (The item comes along, as some data sets do
# not make it again in another process.)
_GRADER = Judge(
    "reasoning-gym",
    r"""
import base64, functools, json, pickle, reasoning_gym

@functools.cache
def made(name, settings):
    return reasoning_gym.create_dataset(name, **json.loads(settings))

def judge(name, settings, item, answer):
    return made(name, settings).score_answer(answer, pickle.loads(base64.b64decode(item)))
""",
)


class ReasoningGym(StepsUnknown):
    """The data set of that name, with its own settings as further keywords.

    ImportError without the package, ValueError for an unknown data set and for settings that it
    refuses.
    """

    system = STYLES["tags"]
    max_prompt = MAX_PROMPT
    needs = {"dataset": "the name of one of reasoning-gym's data sets, such as chain_sum"}

    def __init__(self, dataset, **settings):
        try:
            import reasoning_gym
        except ImportError:
            raise ImportError(
                "SAPO/ReasoningGym-v0 needs a package that is not installed: "
                "pip install reasoning-gym"
            ) from None
        if dataset not in reasoning_gym.factory.DATASETS:
            known = ", ".join(sorted(reasoning_gym.factory.DATASETS))
            raise ValueError(f"dataset={dataset!r} is unknown; expected one of {known}")
        self.dataset, self.settings = dataset, {"seed": 0, **settings}
        try:
            self.made = reasoning_gym.create_dataset(dataset, **self.settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"dataset={dataset!r}, {settings}: {error}") from None

    def __repr__(self):
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"ReasoningGym({self.dataset!r}, {settings})"

    def example_at(self, index, split="train"):
        """The index-th item of a split; its `content` is the data set's own record of it.

        ValueError if the split seems to have none.
        """
        check_index(index, split)
        for draw in range(MAX_DRAWS):
            number = zlib.crc32(f"{split} {index} {draw}".encode())
            item = self._item(number)
            if split_of(item["question"]) == split:
                answer = item["answer"] or ""  # None where many answers are right
                return Example(None, item["question"], f"{number}", (item,), answer)
        raise ValueError(
            f"{self} is too small: none of its few possible questions falls into the {split!r} "
            "split"
        )

    def _item(self, number):
        try:
            return self.made[number]
        except IndexError:  # a few data sets end
            return self.made[number % len(self.made)]

    def demonstrate(self, example, rng, error_rate=0.0):
        """The bare answer, without a thought: the steps to it are not known. With probability
        error_rate it is the answer to another question. ValueError where an item names none."""
        answer = example.answer
        if not answer:
            raise ValueError(f"{self}: expected --warm_start_steps 0, as its items name no answer")
        if rng.random() < error_rate:
            answer = self.example_at(int(rng.integers(2**31))).answer
        return f"<think></think><answer>{answer}</answer>"

    def grade(self, example, text):
        """What the data set's own grader gives for the answer, from 0 to 1; 0.0 where there is no
        answer, and where the grader fails or takes longer than five seconds."""
        answer = self.read_answer(text)
        if answer is None:
            return 0.0
        (item,) = example.content
        packed = base64.b64encode(pickle.dumps(item)).decode()
        return _GRADER(self.dataset, json.dumps(self.settings), packed, answer)
