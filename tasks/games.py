"""Games: worlds that answer. What a game is, and how one becomes something to learn from.

A game is any object with two methods:

    reset(seed) -> observation
    step(command) -> (observation, reward, terminated, truncated, info)

An observation is a string, or a pair of a string and a PIL picture. The same seed and the same
commands give the same game. With these a policy can be trained by reward alone. A game may have
more. To be told what to do, and to play itself:

    rules                           what a model is told before the game begins: aim and commands
    words                           those that the tiny model is to have one token for
    demonstrate(rng, error_rate) -> the text of a good next turn, "<think>...</think><act>...</act>"
    check(text) -> [((start, end), is it right?), ...], the steps in a turn's text at this moment;
                               the last of them is its command
    exact_value(error_rate) -> the expected sum of rewards from this moment on, of the player who
                               demonstrates, if his commands are wrong so often; or None. The credit
                               explorer shows it beside the critic's V

An episode is *turns*. In its turn the policy writes what it likes, in one or more segments, and
closes a command: `<act>go north</act>`. The game's next observation is the *reply*.
"""

import copy
import functools
import re
import warnings

from PIL import Image

from tasks.base import END, Example, check_index

FIRST_EVAL_SEED = 2**31  # games of a seed below are for training, the others for evaluation
MAX_RESETS = 3  # seeds that are tried for one game
STOP = "</act>"
FORM = (
    "You play a game, turn by turn. In each turn think first, then give one command. A turn reads: "
    "<think>your thoughts</think><act>the command</act>"
)
COMMAND = re.compile(r"<act>([^<]*)</act>\Z")


def seed_of(index, split):
    """The seed of the index-th game of a split. ValueError for an index beyond a split's seeds."""
    check_index(index, split)
    if index >= FIRST_EVAL_SEED:
        raise ValueError(f"index={index!r}: expected an integer below {FIRST_EVAL_SEED}")
    return int(index) + (FIRST_EVAL_SEED if split == "eval" else 0)


def words_and_picture(observation):
    """An observation as a pair: its string, and its picture as RGB, or None. TypeError for anything
    else."""
    if isinstance(observation, str):
        return observation, None
    words, picture = observation
    if not isinstance(words, str) or not isinstance(picture, Image.Image):
        raise TypeError("an observation is a string, or a string and a PIL picture")
    return words, picture.convert("RGB")


def until_end(text):
    """The part of a turn's text that counts, and why it ends there: `(turn, reason)`.

    "act" where a command was closed, "end" where `END` came first, "" where nothing has ended yet.
    """
    closed, end = text.find(STOP), text.find(END)
    if closed >= 0 and (end < 0 or end > closed):
        return text[: closed + len(STOP)], "act"
    if end >= 0:
        return text[: end + len(END)], "end"
    return text, ""


def command_in(turn):
    """The command that closes a turn, or "" where it is empty, holds a "<", or was not opened."""
    command = COMMAND.search(turn)
    return command[1].strip() if command else ""


def turns_of(response):
    """What a policy wrote in a whole episode, turn by turn; the last may be unfinished."""
    turns = []
    while response:
        turn, _ = until_end(response)
        turns.append(turn)
        response = response[len(turn) :]
    return turns


class GameTask:
    """A game as what is asked: the counterpart of `tasks.Task`, whose `stop` (what ends a turn) and
    `replies` it has, too.

    game    the one that is played
    make    makes another like it, to look things up while an episode is under way; a copy of the
            game, if left out
    """

    stop = STOP
    replies = True

    def __init__(self, game, make=None):
        if not all(callable(getattr(game, method, None)) for method in ("reset", "step")):
            raise ValueError(f"game={game!r}: expected an object with the methods reset and step")
        self.game = game
        self._make = make or functools.partial(copy.deepcopy, game)
        # Its attributes that are plain values, before it has been played
        self.settings = {
            name: value
            for name, value in getattr(game, "__dict__", {}).items()
            if isinstance(value, int | float | str)
        }

    @functools.cached_property
    def _second(self):
        return self._make()

    @property
    def tags(self):
        """What the tiny model has one token for: the tags of a turn, and the game's own `words`."""
        return ("<think>", "</think>", "<act>", "</act>", *getattr(self.game, "words", ()))

    @property
    def system(self):
        """What a model is told first: the form of a turn, and the game's own `rules`."""
        return f"{FORM} {getattr(self.game, 'rules', '')}".strip()

    def __repr__(self):
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self.game).__name__}({settings})"

    def size(self, split):
        """The number of games in a split: there is no end to them."""
        return None

    def example_at(self, index, split="train"):
        """The index-th game of a split, at its beginning; `self.game` is reset to it.

        Where `reset` raises, the game of the next seed stands in, and a warning says so; ValueError
        where the next few raise, too.
        """
        first, reason = seed_of(index, split), ""
        of_split = range(first - int(index), first - int(index) + FIRST_EVAL_SEED)
        for further in range(MAX_RESETS):
            seed = of_split[(int(index) + further) % FIRST_EVAL_SEED]
            try:
                words, picture = words_and_picture(self.game.reset(seed))
            except Exception as error:  # whatever a foreign game does, the batch goes on
                reason = reason or f"{self}: reset({seed}) raised {error!r}"
                continue
            if reason:
                warnings.warn(f"{reason}; the game of seed {seed} stands in", stacklevel=2)
            return Example(picture, words, f"{split}/{index}", (seed,))
        raise ValueError(f"{reason}, and the next {MAX_RESETS - 1} seeds raised, too")

    def transcript(self, example, rng, error_rate=0.0):
        """A demonstrated episode: [(what is heard, what is seen, what is written), ...], turn by
        turn: the observation's words and its picture or None, and the text that answers them.

        ValueError for a game that does not demonstrate.
        """
        if not hasattr(self.game, "demonstrate"):
            raise ValueError(
                f"{self}: this game has no demonstrations; expected --warm_start_steps 0, "
                "and a model that can play already"
            )
        observation = self.game.reset(example.content[0])
        turns, over = [], False
        while not over:
            text = self.game.demonstrate(rng, error_rate)
            turns.append((*words_and_picture(observation), text))
            observation, _, terminated, truncated, _ = self.game.step(command_in(text))
            over = terminated or truncated
        return turns

    def replayed(self, example, turns):
        """Play an episode once more, from the turns that a policy wrote. Yields before each of them
        `(game, observation, turn, why)`: the game at that moment, what it has said, the part of the
        turn that counts and why it ends there (`until_end`).

        The command is obeyed when the caller goes on. It ends with the game, with the turns, or
        with a turn that closed no command. The last turn's command is not obeyed: no turn asks what
        it did.
        """
        game = self._second
        observation = game.reset(example.content[0])
        for number, turn in enumerate(turns, 1):
            counted, why = until_end(turn)
            yield game, observation, counted, why
            if why != "act" or number == len(turns):
                break
            observation, _, terminated, truncated, _ = game.step(command_in(counted))
            if terminated or truncated:
                break

    def observed(self, example, turns):
        """[(words, picture or None), ...]: what was seen before each of the turns that a policy
        wrote, in words and as a picture."""
        moments = self.replayed(example, turns)
        return [words_and_picture(observation) for _, observation, _, _ in moments]

    def were_right(self, example, turns):
        """[was its command right?, ...] of each turn that a policy closed with a command. What the
        game does not know for right is wrong."""
        right = []
        for game, _, turn, why in self.replayed(example, turns):
            if why == "act":
                steps = game.check(turn)
                right.append(bool(steps) and bool(steps[-1][1]))
        return right

    def exact_values(self, example, turns, error_rate):
        """[(V before it, V behind its command), ...] of each of the turns that a policy wrote, by
        the game's `exact_value`; None where that is None. Behind a command lies the reward that it
        earns, and what is to come: V before the next turn, or nothing where the game has ended."""
        game, values = self._second, []
        game.reset(example.content[0])
        for turn in turns:  # not `replayed`: the last command counts, too
            counted, why = until_end(turn)
            before, behind = game.exact_value(error_rate), 0.0
            if before is None:
                return None
            if why == "act":
                _, reward, terminated, truncated, _ = game.step(command_in(counted))
                behind = reward + (0 if terminated or truncated else game.exact_value(error_rate))
            values.append((before, behind))
        return values

    def checked(self, example, turns):
        """[((start, end), is it right?), ...] of the steps in what a policy wrote, turn by turn;
        characters count through all turns. [] for a game that does not know."""
        if not hasattr(self.game, "check"):
            return []
        steps, start = [], 0
        moments = self.replayed(example, turns)
        for written, (game, _, turn, _) in zip(turns, moments, strict=False):
            try:
                known = game.check(turn)
            except Exception as error:  # whatever a foreign game does, the run goes on
                warnings.warn(f"{self}: check raised {error!r}", stacklevel=2)
                break
            for (first, end), right in known:
                steps.append(((start + first, start + end), right))
            start += len(written)  # what stands behind the part that counts has its place
        return steps
