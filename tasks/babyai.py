"""BabyAI: a level of it as a game (the package minigrid). `import env` registers SAPO/BabyAI-v0.

    gym.make("SAPO/BabyAI-v0", level="GoToLocal")      # or PickupLoc, GoToObj, ... : BabyAI's names

The player sees what lies before him, as a picture in which he stands in the middle of the lower
edge and looks upwards; with picture=False, in words. BabyAI's own bot demonstrates. A turn of his:

    <think>3 ahead, 1 left</think><act>go forward</act>      the nearest thing that is asked for
    <think>not seen</think><act>turn right</act>
"""

import contextlib
import functools
import io
import re

import numpy as np
from PIL import Image

from tasks.base import MAX_DRAWS, check_share, split_of
from tasks.games import FIRST_EVAL_SEED

# Our commands, in the order of minigrid's actions.
COMMANDS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle", "done")
UNKNOWN = f"Say {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}."
TURN = re.compile(r"<think>([^<]*)</think><act>([^<]*)</act>\Z")
NOT_SEEN = "not seen"
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
KINDS = ("ball", "box", "key", "door", "wall")

TILE = 8  # pixels along a tile's edge: small, for the tiny model
EDGE = 64  # pixels along the picture's, a multiple of 16: 7 x 7 tiles, and a margin


class BabyAI:
    """A game: `reset(seed)` begins one, `step(command)` plays on. See `tasks.games`.

    level      BabyAI's name for it, without "BabyAI-" and "-v0"
    picture    whether observations have one; without it their text names what is seen
    habits     how often a demonstration follows the bad habit, 0 to 1: to turn left where it should
               turn right

    The reward is BabyAI's: 1 for the mission, less up to 0.9 for the time that it took. ImportError
    without the package, ValueError for an unknown level.
    """

    rules = f"You see what lies before you. The commands are: {', '.join(COMMANDS)}."
    words = (*COMMANDS, NOT_SEEN, "ahead", "left", "right", *COLOURS, *KINDS, "Go on.", "Done!")

    def __init__(self, level="GoToLocal", picture=True, habits=0.0):
        self._made = _made(level)
        check_share("habits", habits)
        self.level, self.picture, self.habits = level, bool(picture), habits

    # ---- the game

    def reset(self, seed):
        """Begin the game of this seed, an integer >= 0. -> observation."""
        split = "train" if seed < FIRST_EVAL_SEED else "eval"
        for draw in range(MAX_DRAWS):
            self.seed = int(np.random.SeedSequence((int(seed), draw)).generate_state(1)[0])
            self.world = self._made()
            seen = _reset(self.world, self.seed)
            # What a world is decides on its split, so that none is in both.
            if split_of(repr((self.world.mission, self.world.grid.encode().tolist()))) == split:
                break
        else:
            raise ValueError(f"level={self.level!r} is too small: it has no {split} world")
        self.actions = []  # that were taken
        self._bot = None
        return self._observation(f"{self.world.mission.capitalize()}.", seen)

    def step(self, command):
        """Obey a command. -> (observation, reward, terminated, truncated, info).

        What is no command of `COMMANDS` changes nothing, and is told so.
        """
        if command not in COMMANDS:
            return self._observation(UNKNOWN, self._seen()), 0.0, False, False, {}
        self.actions.append(COMMANDS.index(command))
        seen, reward, terminated, truncated, _ = self.world.step(self.actions[-1])
        said = "Done!" if reward > 0 else "Go on."
        return self._observation(said, seen["image"]), float(reward), terminated, truncated, {}

    def _seen(self):
        """(columns, rows, 3): kind, colour and state of every tile before the player, as minigrid
        encodes them; he stands in the middle of the last row."""
        return self.world.gen_obs()["image"]

    def _observation(self, words, seen):
        if self.picture:
            return words, draw(seen)
        return f"{words}\n{described(seen)}"

    # ---- the bot

    def _advice(self):
        """What BabyAI's bot would do now: an action's number.

        It plans on a world of its own, in which it is told what was done, turn by turn.
        """
        from minigrid.utils.baby_ai_bot import BabyAIBot

        if self._bot is None:
            twin = self._made()
            _reset(twin, self.seed)
            self._bot, self._twin, self._told = BabyAIBot(twin), twin, 0
            self._advised = self._bot.replan(None)
        for action in self.actions[self._told :]:
            self._twin.step(action)
            self._advised = self._bot.replan(action)
        self._told = len(self.actions)
        return int(self._advised)

    def _thought(self):
        """Where the nearest thing that the mission asks for is seen: "2 ahead, 1 left"."""
        instruction = self.world.instrs
        wanted = getattr(instruction, "desc", None)
        if wanted is None:  # a mission of several parts, or of two things
            return NOT_SEEN
        places = []
        for place in wanted.obj_poss:  # of all things that fit the mission
            seen_at = self.world.relative_coords(*place)
            if seen_at is not None and self.world.in_view(*place):
                places.append(seen_at)
        size = self.world.agent_view_size
        return _place_in_words(places, size)

    def demonstrate(self, rng, error_rate=0.0):
        """The bot's next turn, as text. Thought and command are wrong with probability error_rate
        each; and it has its bad habit (`habits`)."""
        advised = COMMANDS[self._advice()]
        if advised == "turn right" and rng.random() < self.habits:
            advised = "turn left"
        elif rng.random() < error_rate:
            others = [command for command in COMMANDS[:3] if command != advised]
            advised = others[int(rng.integers(len(others)))]
        thought = self._thought()
        if rng.random() < error_rate:
            thought = NOT_SEEN if thought != NOT_SEEN else "1 ahead"
        return f"<think>{thought}</think><act>{advised}</act>"

    def check(self, text):
        """[((start, end), is it right?), ...] of thought and command of a turn's text, now; [] for
        a turn of another form. The one right command is the bot's."""
        turn = TURN.fullmatch(text)
        if turn is None:
            return []
        right = (self._thought(), COMMANDS[self._advice()])
        return [(turn.span(i + 1), turn[i + 1] == right[i]) for i in range(2)]


@functools.cache
def _made(level):
    """What makes worlds of a level."""
    try:
        import gymnasium
        import minigrid  # noqa: F401  registers its levels
    except ImportError:
        raise ImportError(
            "SAPO/BabyAI-v0 needs a package that is not installed: pip install minigrid"
        ) from None
    name = f"BabyAI-{level}-v0"
    if name not in gymnasium.registry:
        known = sorted(
            known.removeprefix("BabyAI-").removesuffix("-v0")
            for known in gymnasium.registry
            if known.startswith("BabyAI-")
        )
        raise ValueError(f"level={level!r} is unknown; expected one of {', '.join(known)}")
    spec = gymnasium.spec(name)
    return lambda: gymnasium.make(spec, disable_env_checker=True).unwrapped


def _reset(world, seed):
    """Reset a world, which says aloud when it has to draw again. -> what is seen."""
    with contextlib.redirect_stdout(io.StringIO()):
        observation, _ = world.reset(seed=seed)
    return observation["image"]


# ------------------------------------------------------------------------------ what is seen


def _place_in_words(places, size):
    """The nearest of some tiles (column, row) before the player: "2 ahead, 1 left"."""
    if not places:
        return NOT_SEEN
    ways = [(size - 1 - row, column - size // 2) for column, row in places]
    ahead, aside = min(ways, key=lambda way: (way[0] + abs(way[1]), way))
    parts = [f"{ahead} ahead"] if ahead else []
    if aside:
        parts.append(f"{abs(aside)} {'right' if aside > 0 else 'left'}")
    return ", ".join(parts) or "here"


def described(seen):
    """In words what is seen, nearest first: "red ball 2 ahead, 1 left; wall 3 ahead". Of walls only
    the one that he looks at."""
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT

    size = len(seen)
    things = []
    for column in range(size):
        for row in range(size):
            kind, colour, _ = seen[column, row]
            name = IDX_TO_OBJECT[int(kind)]
            is_beside = name == "wall" and column != size // 2
            if is_beside or name in ("unseen", "empty", "floor", "agent"):
                continue
            full = name if name == "wall" else f"{IDX_TO_COLOR[int(colour)]} {name}"
            distance = (size - 1 - row) + abs(column - size // 2)
            things.append((distance, f"{full} {_place_in_words([(column, row)], size)}"))
    return "; ".join(text for _, text in sorted(things)) or "nothing"


def draw(seen):
    """What is seen as a picture of EDGE x EDGE pixels, RGB; dark where nothing can be seen."""
    size = len(seen)
    picture = Image.new("RGB", (EDGE, EDGE))
    margin = (EDGE - size * TILE) // 2
    for column in range(size):
        for row in range(size):
            is_player = (column, row) == (size // 2, size - 1)
            tile = _tile(*map(int, seen[column, row]), is_player)
            picture.paste(tile, (margin + column * TILE, margin + row * TILE))
    return picture


@functools.cache
def _tile(kind, colour, state, is_player):
    """A tile as minigrid draws it, but smaller; black where it is unseen."""
    from minigrid.core.constants import OBJECT_TO_IDX
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import WorldObj

    if kind == OBJECT_TO_IDX["unseen"]:
        return Image.new("RGB", (TILE, TILE))
    thing = WorldObj.decode(kind, colour, state)
    direction = 3 if is_player else None  # upwards
    pixels = Grid.render_tile(thing, direction, highlight=True, tile_size=TILE)
    return Image.fromarray(pixels.astype(np.uint8))
