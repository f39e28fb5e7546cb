"""TextWorld: games that its generator makes (the package textworld). SAPO/TextWorld-v0.

    The objective is to drop thing3 in room0.
    room0: P-box (closed), key1, thing6; north; carrying nothing
        <act>open P-box</act>
    room0: P-box (open: thing3), key1, thing6; north; carrying nothing
        <act>take thing3 from P-box</act>

What is shown is trimmed to what a small model needs: in place of TextWorld's prose, one line with
the room, the things in sight and where they lie, the ways out, and what is carried. So its compiler
of prose is not needed either. Only the last command of the quest is asked for; what has to be done
before must be found out. TextWorld's own winning policy demonstrates.
"""

import contextlib
import functools
import io
import os
import re
import zlib
from pathlib import Path

from tasks.base import MAX_DRAWS, check_integers, check_share, split_of
from tasks.games import FIRST_EVAL_SEED

THEMES = ("basic", "house")
DIRECTIONS = ("north", "east", "south", "west")
TURN = re.compile(r"<act>([^<]*)</act>\Z")
UNKNOWN = "That cannot be done."

# What the tiny model has one token for, in the theme "basic".
WORDS = (
    *("The objective is to ", "take", "drop", "open", "close", "unlock", "lock", "insert", "put"),
    *("eat", "cook", "examine", "look", "inventory", "go ", " from ", " into ", " on ", " with "),
    *(" in ", " the ", " it's ", *DIRECTIONS, "room", "box", "key", "thing", "door", "gate"),
    *("chest", "table", "shelf", "food", "locked", "closed", "carrying", "nothing", "by ", "Done!"),
    UNKNOWN,
)


class TextWorld:
    """A game: `reset(seed)` begins one, `step(command)` plays on. See `tasks.games`.

    quest        commands that win it, 1 to 20
    rooms        1 to 20
    objects      things in it, 1 to 40
    theme        "basic" (room0, P-box, thing3) or "house" (a kitchen, a desktop computer)
    admissible   whether the commands that can be given are shown, too
    games        how many there are in a split; a seed stands for one of them
    limit        the game is over after so many turns; 2 * quest + 2, if 0
    cache        the folder in which the games are kept; half a second each when they are made
    habits       how often a demonstration follows the bad habit, 0 to 1: to examine what should be
                 opened or unlocked

    It pays 1 for the quest. ImportError without the package, ValueError for a setting out of its
    range, and for a quest that does not fit into its rooms.
    """

    rules = (
        "Commands are such as: go north, look, inventory, examine key1, take key1, take key1 from "
        "box2, drop key1, open box2, close box2, unlock box2 with key1, lock box2 with key1, "
        "put key1 on table3, insert key1 into box2, eat food4."
    )
    words = WORDS
    ranges = {
        "quest": (1, 20),
        "rooms": (1, 20),
        "objects": (1, 40),
        "games": (1, 2**31),
        "limit": (0, 999),
    }

    def __init__(
        self,
        quest=3,
        rooms=2,
        objects=4,
        theme="basic",
        admissible=False,
        games=400,
        limit=0,
        cache="runs/textworld",
        habits=0.0,
    ):
        self.quest, self.rooms, self.objects, self.theme = quest, rooms, objects, theme
        self.admissible, self.games, self.limit = bool(admissible), games, limit
        self.cache, self.habits = str(cache), habits
        check_integers(self, self.ranges)
        check_share("habits", habits)
        if theme not in THEMES:
            raise ValueError(f"theme={theme!r} is unknown; expected one of {THEMES}")
        _package()
        self.limit = limit or 2 * quest + 2

    # ---- the game

    def reset(self, seed):
        """Begin the game of this seed, an integer >= 0. -> observation."""
        split = "train" if seed < FIRST_EVAL_SEED else "eval"
        self.file = str(self._file(split, int(seed) % self.games))
        self.world = _begun(self.file)
        self.turns, self.obeyed = 0, []  # the commands that could be done
        return f"{self.world.state.objective.strip()}\n{self._shown()}"

    def step(self, command):
        """Obey a command. -> (observation, reward, terminated, truncated, info).

        What cannot be done changes nothing, and is told so.
        """
        self.turns += 1
        if command not in self.world.state.admissible_commands:
            return f"{UNKNOWN}\n{self._shown()}", 0.0, False, self.turns >= self.limit, {}
        self.obeyed.append(command)
        state, _, _ = self.world.step(command)
        terminated = state.won or state.lost
        said = "Done!" if state.won else self._shown()
        truncated = not terminated and self.turns >= self.limit
        return said, float(state.won), terminated, truncated, {}

    def _shown(self):
        state = self.world.state
        commands = f"\n{'; '.join(state.admissible_commands)}" if self.admissible else ""
        return described(state.facts) + commands

    # ---- the teacher

    def right_commands(self):
        """The commands after which TextWorld's winning policy is shorter."""
        state = self.world.state
        right = []
        for command in state.admissible_commands:
            twin = _begun(self.file)  # faster than a copy
            for earlier in self.obeyed:
                twin.step(earlier)
            after, _, _ = twin.step(command)
            if after.won or 0 < len(after.policy_commands) < len(state.policy_commands):
                right.append(command)
        return right

    def demonstrate(self, rng, error_rate=0.0):
        """The winning policy's next command. With probability error_rate another one; and it has
        its bad habit (`habits`)."""
        state = self.world.state
        command = state.policy_commands[0]
        verb, _, rest = command.partition(" ")
        habit = f"examine {rest.partition(' with ')[0]}"
        others = [other for other in state.admissible_commands if other != command]
        if verb in ("open", "unlock") and habit in others and rng.random() < self.habits:
            command = habit
        elif rng.random() < error_rate and others:
            command = others[int(rng.integers(len(others)))]
        return f"<act>{command}</act>"

    def check(self, text):
        """[((start, end), is it right?)] of the command of a turn's text, now; [] for a turn of
        another form."""
        turn = TURN.fullmatch(text)
        return [(turn.span(1), turn[1] in self.right_commands())] if turn else []

    # ---- its games

    def _file(self, split, number):
        """The file of a split's game of that number; it is made where it is missing."""
        sizes = f"{self.theme}-rooms{self.rooms}-objects{self.objects}-quest{self.quest}"
        file = Path(self.cache) / sizes / f"{split}-{number}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(f".{os.getpid()}.json")
            self._drawn(split, number).save(str(aside))
            os.replace(aside, file)  # whoever else makes it makes the same
        return file

    def _drawn(self, split, number):
        """A game whose content decides, by a hash, that it is of this split."""
        textworld = _package()
        for draw in range(MAX_DRAWS):
            options = textworld.GameOptions()
            options.seeds = zlib.crc32(f"{split} {number} {draw}".encode())
            options.nb_rooms, options.nb_objects = self.rooms, self.objects
            options.quest_length = self.quest
            options.grammar.theme, options.grammar.only_last_action = self.theme, True
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    game = textworld.generator.make_game(options)
            except Exception as error:  # it knows several, and they say why
                raise ValueError(
                    f"{_settings(self)}: TextWorld makes no such game ({error})"
                ) from None
            content = (game.objective, sorted(map(str, game.world.facts)))
            if split_of(repr(content)) == split:
                return game
        raise ValueError(f"{_settings(self)}: TextWorld makes no {split} game of this size")


def _settings(game):
    return f"quest={game.quest}, rooms={game.rooms}, objects={game.objects}"


@functools.cache
def _package():
    """textworld, which says on import, in vain, that a package for drawing maps is missing."""
    try:
        import textworld
        import textworld.generator
    except ImportError:
        raise ImportError(
            "SAPO/TextWorld-v0 needs a package that is not installed: pip install textworld"
        ) from None
    return textworld


def _begun(file):
    """A game at its beginning, as TextWorld plays it."""
    textworld = _package()
    told = textworld.EnvInfos(
        facts=True,
        admissible_commands=True,
        policy_commands=True,
        objective=True,
        won=True,
        lost=True,
    )
    world = textworld.start(file, told)
    world.reset()
    return world


# ------------------------------------------------------------------------------ what is seen


def described(facts):
    """One line of what the player sees: "room0: P-box (open: thing3), key1; north; carrying key4".

    facts: TextWorld's propositions. What lies in another room, or in what is closed, is not told.
    """
    of = {}  # {a proposition's name: [the names of its arguments, ...]}
    for fact in facts:
        of.setdefault(fact.name, []).append([argument.name for argument in fact.arguments])

    def has(name, *arguments):
        return list(arguments) in of.get(name, [])

    def state_of(thing):
        return next((name for name in ("locked", "closed", "open") if has(name, thing)), "")

    def inside(thing):
        lies_on = [item for item, place in of.get("on", []) if place == thing]
        lies_in = [item for item, place in of.get("in", []) if place == thing]
        return sorted(lies_on + (lies_in if has("open", thing) else []))

    here = next(place for who, place in of["at"] if who == "P")
    things = []
    for thing in sorted(item for item, place in of["at"] if place == here and item != "P"):
        told = [state_of(thing), ", ".join(inside(thing))]
        told = ": ".join(part for part in told if part)
        things.append(f"{thing} ({told})" if told else thing)
    ways = []
    for direction in DIRECTIONS:
        for there, origin in of.get(f"{direction}_of", []):
            if origin != here:
                continue
            doors = [
                door for one, door, other in of.get("link", []) if {one, other} == {here, there}
            ]
            if doors:
                ways.append(f"{direction} by {doors[0]} ({state_of(doors[0])})")
            elif has("free", here, there):
                ways.append(direction)
    carried = sorted(item for item, place in of.get("in", []) if place == "I") or ["nothing"]
    return (
        f"{here}: {', '.join(things) or 'nothing'}; {', '.join(ways) or 'no way out'}; "
        f"carrying {', '.join(carried)}"
    )
