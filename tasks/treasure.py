"""Treasure: a small world that answers. Find the key, open the door, take what lies behind it.

    game = Treasure(size=5)
    text, picture = game.reset(seed=7)                 # with picture=False the text alone
    (text, picture), reward, terminated, truncated, info = game.step("go east")

A world is a grid of cells, a column letter and a row digit each, A1 at the top left. Some are
walls. Only what lies within `sight` of a cell that the player has stood on has been seen; the rest
is dark. The key is taken by stepping on it. The door lets in who has the key, and behind it, in a
corner with no other way in, lies the treasure. Taking it earns 1 and ends the game; nothing else
earns anything.

The *explorer* is a player who knows what he has seen, and no more: he heads for the nearest cell
that he wants (`Treasure.goals`). He says which commands are right, writes the demonstrations, and
the chance that he succeeds, slips included but no habit, is computed exactly (`Treasure.value`). A
turn of his:

    <think>B2 key C3</think><act>go east</act>      I stand on B2, and want the key on C3
"""

import functools
import itertools
import re
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from tasks.base import CELL, MAX_DRAWS, check_integers, check_share, split_of
from tasks.games import FIRST_EVAL_SEED

# Where a command leads: (columns, rows), with row 1 at the top.
DIRECTIONS = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}
COMMANDS = tuple(f"go {direction}" for direction in DIRECTIONS)

# What is heard after a command.
REPLIES = (
    "Go on.",
    "A wall.",
    "It is locked.",
    "The key!",
    "The treasure!",
    "Say go north, go east, go south or go west.",
)
FREE, WALL, LOCKED, KEY, TREASURE, UNKNOWN = REPLIES

# A turn as the explorer writes it: where he is, what he wants and where it is, his command.
TURN = re.compile(
    r"<think>([A-I][1-9]) ((?:treasure|key|door|look) [A-I][1-9])</think><act>([^<]*)</act>\Z"
)


@dataclass(frozen=True)
class World:
    """What does not change during a game. A cell is (column, row), counted from 0."""

    walls: frozenset
    start: tuple[int, int]
    key: tuple[int, int]
    door: tuple[int, int]
    treasure: tuple[int, int]


@dataclass(frozen=True)
class State:
    """What changes: where the player stands, whether he has the key, and what he has seen."""

    place: tuple[int, int]
    has_key: bool
    seen: frozenset


def name_of(cell):
    """A cell as it is written: (1, 2) is B3."""
    column, row = cell
    return f"{chr(ord('A') + column)}{row + 1}"


class Treasure:
    """A game: `reset(seed)` begins one, `step(command)` plays on.

    size       cells along the edge, 3 to 9
    sight      how far one sees, in cells, diagonals included, 1 to 9
    shortest   the explorer needs so many turns at least,
    longest    and so many at most; after `limit` turns the game is over
    limit      two more than `longest`, if 0: one slip costs two turns
    walls      the share of the cells without start, key, door or treasure that become walls, 0 to
               1. One wall more shuts the treasure's corner
    picture    whether observations have one; without it their text holds a map
    habits     how often a demonstration follows the explorer's bad habit, 0 to 1: to go south where
               he should go north, and can

    ValueError for a setting out of its range. `reset` raises it where no world of this size was
    found that takes so many turns.
    """

    rules = (
        "Find the key, open the door with it, and take the treasure behind it. The commands are: "
        f"{', '.join(COMMANDS)}."
    )
    words = (*COMMANDS, *REPLIES, "treasure", "key", "door", "look")

    def __init__(
        self,
        size=4,
        sight=1,
        shortest=6,
        longest=10,
        limit=0,
        walls=0.25,
        picture=True,
        habits=0.0,
    ):
        self.size, self.sight, self.picture = size, sight, bool(picture)
        self.shortest, self.longest, self.limit = shortest, longest, limit
        self.walls, self.habits = walls, habits
        check_integers(self, {"size": (3, 9), "sight": (1, 9), "shortest": (1, 99)})
        check_integers(self, {"longest": (shortest, 99), "limit": (0, 500)})
        check_share("walls", walls)
        check_share("habits", habits)
        if limit and limit < shortest:
            raise ValueError(f"limit={limit}: expected 0, or at least shortest={shortest}")
        self.limit = limit or longest + 2
        self.cells = tuple(itertools.product(range(size), repeat=2))

    # ---- the game

    def reset(self, seed):
        """Begin a game in the world of this seed, an integer >= 0. -> observation."""
        if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed={seed!r} is not valid; expected an integer >= 0")
        self.world, self.shades = _drawn(self, int(seed))
        self.state = self.begin(self.world)
        self.turns = 0
        return self._observation("Find the treasure.")

    def step(self, command):
        """Obey a command. -> (observation, reward, terminated, truncated, info).

        What is no command of `COMMANDS` costs a turn, and is told so.
        """
        self.state, heard = self.after(self.world, self.state, command)
        self.turns += 1
        terminated = heard == TREASURE
        truncated = not terminated and self.turns >= self.limit
        return self._observation(heard), float(terminated), terminated, truncated, {}

    def _observation(self, words):
        if self.picture:
            return words, self.draw()
        return f"{words}\n{self.map()}"

    # ---- its rules

    def begin(self, world):
        """The state at a game's start."""
        return State(world.start, False, self._around(world.start))

    def after(self, world, state, command):
        """What a command does: (the next state, what is heard)."""
        if command not in COMMANDS:
            return state, UNKNOWN
        target = self.towards(state.place, command)
        if target is None or target in world.walls:
            return state, WALL
        if target == world.door and not state.has_key:
            return state, LOCKED
        finds_key = target == world.key and not state.has_key
        seen = state.seen | self._around(target)
        heard = KEY if finds_key else TREASURE if target == world.treasure else FREE
        return State(target, state.has_key or finds_key, seen), heard

    def towards(self, cell, command):
        """The cell that a command leads to, or None beyond the edge."""
        columns, rows = DIRECTIONS[command.removeprefix("go ")]
        target = cell[0] + columns, cell[1] + rows
        return target if target in self.cells else None

    def _around(self, place):
        """The cells that are seen from a place."""
        return frozenset(
            cell
            for cell in self.cells
            if max(abs(cell[0] - place[0]), abs(cell[1] - place[1])) <= self.sight
        )

    # ---- the explorer

    def goals(self, world, state):
        """Where an explorer heads: {cell: what for}, the nearest of what he wants most.

        The treasure, if he has seen it and a way to it; else the key or, if he has got it, the
        door, likewise; else ("look") any place that shows something new. A way leads through cells
        that he has seen. Several goals are equally near.
        """
        distances = self._distances(world, state)
        wanted = {world.treasure: "treasure"}
        if not state.has_key:
            wanted[world.key] = "key"
        elif state.place != world.door:
            wanted[world.door] = "door"
        for cell, kind in wanted.items():
            if cell in distances:
                return {cell: kind}
        new = [cell for cell in distances if not self._around(cell) <= state.seen]
        nearest = min(distances[cell] for cell in new)
        return {cell: "look" for cell in new if distances[cell] == nearest}

    def right_commands(self, world, state):
        """The commands that begin a shortest way to one of the explorer's goals, in order."""
        goals = self.goals(world, state)
        here = self._distances(world, state)
        right = []
        for command in COMMANDS:
            target = self.towards(state.place, command)
            if target in here:
                onward = self._distances(world, replace(state, place=target))
                if any(onward.get(goal) == here[goal] - 1 for goal in goals):
                    right.append(command)
        return right

    def _distances(self, world, state):
        """{cell: steps from where the player stands}, through cells that he has seen."""
        return _walked(self, world, state.place, state.seen, state.has_key)

    def explore(self, world):
        """How many turns the explorer takes, of right commands the first."""
        state, turns, heard = self.begin(world), 0, ""
        while heard != TREASURE:
            state, heard = self.after(world, state, self.right_commands(world, state)[0])
            turns += 1
        return turns

    def value(self, world, state, turns, error_rate=0.0, gamma=1.0):
        """The explorer's exact value, by one who sees the whole world: E[gamma^(K-1)] if he takes
        the treasure in his K-th turn from here on, and 0 if not within `turns`; at gamma 1 his
        chance to succeed.

        He gives one of the right commands, each as likely; with probability error_rate one of the
        wrong ones, if there are any. His bad habit is left out. By recursion over what can happen,
        each state once.
        """
        known = _values(self, world, error_rate, gamma)

        def of(state, turns):
            if turns == 0:
                return 0.0
            if (state, turns) not in known:
                right = self.right_commands(world, state)
                wrong = [command for command in COMMANDS if command not in right]
                shares = dict.fromkeys(right, (1 - error_rate if wrong else 1.0) / len(right))
                if error_rate:
                    shares |= dict.fromkeys(wrong, error_rate / max(1, len(wrong)))
                total = 0.0
                for command, share in shares.items():
                    onward, heard = self.after(world, state, command)
                    total += share * (1.0 if heard == TREASURE else gamma * of(onward, turns - 1))
                known[state, turns] = total
            return known[state, turns]

        return of(state, turns)

    def exact_value(self, error_rate):
        """`value` from this moment on, in the turns that are left. None beyond four cells along the
        edge, where it takes seconds."""
        if self.size > 4:
            return None
        return self.value(self.world, self.state, self.limit - self.turns, error_rate)

    # ---- the explorer's words

    def demonstrate(self, rng, error_rate=0.0):
        """The explorer's next turn, as text. Each of its three parts is wrong with probability
        error_rate, in a plausible way; and he has his bad habit (`habits`)."""
        state = self.state
        goals = self.goals(self.world, state)
        right = self.right_commands(self.world, state)
        goal = list(goals)[int(rng.integers(len(goals)))]
        command = right[int(rng.integers(len(right)))]
        back = self.after(self.world, state, "go south")[0].place
        if command == "go north" and back != state.place and rng.random() < self.habits:
            command = "go south"

        def written(part, true, choices):
            """The part, or with probability error_rate one of the choices that is not true, if
            there is one."""
            wrong = [choice for choice in choices if choice not in true]
            slips = rng.random() < error_rate and wrong
            return wrong[int(rng.integers(len(wrong)))] if slips else part

        names = [name_of(cell) for cell in self.cells]
        here, there = name_of(state.place), name_of(goal)
        place = written(here, {here}, names)
        wish = f"{goals[goal]} {written(there, set(map(name_of, goals)), names)}"
        return f"<think>{place} {wish}</think><act>{written(command, right, COMMANDS)}</act>"

    def check(self, text):
        """[((start, end) in characters, is it right?), ...] of the three parts of a turn's text, at
        the present state; [] for a turn of another form."""
        turn = TURN.fullmatch(text)
        if turn is None:
            return []
        goals = self.goals(self.world, self.state)
        right = (
            {name_of(self.state.place)},
            {f"{kind} {name_of(cell)}" for cell, kind in goals.items()},
            self.right_commands(self.world, self.state),
        )
        return [(turn.span(i + 1), turn[i + 1].strip() in right[i]) for i in range(3)]

    # ---- worlds

    def random_world(self, rng):
        """A world, or None where the key cannot be reached.

        The treasure lies in a corner, one of whose two neighbours is a wall and the other the door.
        """
        last = self.size - 1
        corner = tuple(int(last * side) for side in rng.integers(2, size=2))
        beside = [self.towards(corner, command) for command in COMMANDS]
        wall, door = (cell for cell in beside if cell is not None)
        if rng.random() < 0.5:
            wall, door = door, wall
        others = [cell for cell in self.cells if cell not in (corner, wall, door)]
        order = [others[i] for i in rng.permutation(len(others))]
        start, key, *rest = order
        walls = frozenset([wall, *rest[: int(self.walls * len(rest))]])
        world = World(walls, start, key, door, corner)
        everything = frozenset(self.cells)
        without_key = _walked(self, world, start, everything, has_key=False)
        with_key = _walked(self, world, key, everything, has_key=True)
        return world if key in without_key and corner in with_key else None

    # ---- what is shown

    def map(self):
        """What has been seen, as text: @ is the player, & the player with the key; # a wall, D the
        door, k the key, t the treasure, . nothing; ? is dark."""
        rows = []
        for row in range(self.size):
            rows.append("".join(self._letter((column, row)) for column in range(self.size)))
        return "\n".join(rows)

    def _letter(self, cell):
        world, state = self.world, self.state
        if cell == state.place:
            return "&" if state.has_key else "@"
        if cell not in state.seen:
            return "?"
        if cell in world.walls:
            return "#"
        things = {world.treasure: "t", world.door: "D"}
        if not state.has_key:
            things[world.key] = "k"
        return things.get(cell, ".")

    def draw(self):
        """What has been seen, as a picture: CELL pixels per cell, RGB."""
        side = self.size * CELL
        picture = Image.new("RGB", (side, side))
        pen = ImageDraw.Draw(picture)
        for column, row in self.cells:
            letter = self._letter((column, row))
            _draw_cell(pen, column * CELL, row * CELL, letter, self.shades)
        return picture


@functools.lru_cache(maxsize=4)  # they are many
def _values(game, world, error_rate, gamma):
    """{(state, turns): value} that `Treasure.value` has found, and adds to."""
    return {}


@functools.lru_cache(maxsize=2**14)
def _walked(game, world, place, seen, has_key):
    """{cell: steps from a place}, breadth first, by cells that were seen and can be entered."""
    distances, waiting = {place: 0}, deque([place])
    while waiting:
        cell = waiting.popleft()
        for command in COMMANDS:
            target = game.towards(cell, command)
            closed = target in world.walls or (target == world.door and not has_key)
            if target in seen and target not in distances and not closed:
                distances[target] = distances[cell] + 1
                waiting.append(target)
    return distances


@functools.lru_cache(maxsize=2**10)  # who demonstrates a game begins it once more
def _drawn(game, seed):
    """The world of a seed, whose explorer takes as many turns as asked for, and what its
    picture's colours differ by, which decides nothing."""
    settings = (game.size, game.sight, game.shortest, game.longest)  # what shapes a world
    rng = np.random.default_rng((*settings, seed))
    split = "train" if seed < FIRST_EVAL_SEED else "eval"
    for _ in range(MAX_DRAWS):
        world = game.random_world(rng)
        if world is None or split_of(repr(world)) != split:
            continue
        if game.shortest <= game.explore(world) <= game.longest:
            return world, rng.integers(-12, 13, 3)
    raise ValueError(
        f"size={game.size}, sight={game.sight}: no {split} world was found that takes "
        f"{game.shortest} to {game.longest} turns; expected a range that this size has"
    )


# ------------------------------------------------------------------------------- the picture

DARK, FLOOR, STONE, INK, GOLD, WOOD = (
    (24, 26, 34),
    (226, 222, 210),
    (110, 104, 112),
    (34, 60, 132),
    (242, 172, 40),
    (134, 84, 44),
)


def _draw_cell(pen, left, top, letter, shades):
    """One cell of the picture. Its thing differs from the others in form and in colour."""

    def shade(colour):
        return tuple(int(part + change) for part, change in zip(colour, shades, strict=True))

    def box(x0, y0, x1, y1):
        return left + x0, top + y0, left + x1, top + y1

    ground = {"?": DARK, "#": STONE}.get(letter, FLOOR)
    pen.rectangle(box(0, 0, CELL - 1, CELL - 1), shade(ground))
    if letter in "@&":
        pen.ellipse(box(3, 3, 12, 12), shade(INK))
        if letter == "&":  # he has the key
            pen.rectangle(box(6, 6, 9, 9), shade(GOLD))
    elif letter == "k":
        pen.ellipse(box(3, 5, 8, 10), outline=shade(GOLD), width=2)
        pen.rectangle(box(8, 7, 13, 8), shade(GOLD))
    elif letter == "D":
        pen.rectangle(box(2, 1, 13, 15), shade(WOOD))
        pen.rectangle(box(10, 8, 11, 9), shade(GOLD))
    elif letter == "t":
        pen.polygon(
            [(left + 8, top + 2), (left + 13, top + 8), (left + 8, top + 13), (left + 2, top + 8)],
            shade(GOLD),
        )
