"""tasks/treasure.py: worlds that can be solved, an explorer who knows no more than he has seen."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tasks.games import FIRST_EVAL_SEED
from tasks.treasure import (
    COMMANDS,
    FREE,
    KEY,
    LOCKED,
    TREASURE,
    UNKNOWN,
    WALL,
    State,
    Treasure,
    World,
    name_of,
)

SEEDS = range(30)


def small(**settings):
    return Treasure(**{"size": 4, "shortest": 4, "longest": 10} | settings)


def begun(seed, **settings):
    game = small(**settings)
    game.reset(seed)
    return game


#   A B C         @ starts on A1, the key lies on A3, the door is B3, and behind it in C3 the
# 1 @ . #         treasure, whose other neighbour is a wall
# 2 . . #
# 3 k D t
WORLD = World(frozenset({(2, 0), (2, 1)}), (0, 0), (0, 2), (1, 2), (2, 2))


def in_world(**settings):
    game = Treasure(size=3, shortest=1, longest=9, **settings)
    game.reset(0)
    game.world, game.state = WORLD, game.begin(WORLD)
    return game


def heard(game, command):
    observation, *_ = game.step(command)
    return observation[0] if game.picture else observation.partition("\n")[0]


# -------------------------------------------------------------------------------- the rules
def test_a_game_by_hand():
    game = in_world(picture=False)
    assert game.map() == "@.?\n..?\n???"
    said = [heard(game, command) for command in ("go north", "go east", "go east", "go south")]
    assert said == [WALL, FREE, WALL, FREE]
    assert game.map() == "..#\n.@#\nkDt"
    assert heard(game, "go south") == LOCKED
    assert heard(game, "open the door") == UNKNOWN
    assert [heard(game, c) for c in ("go west", "go south")] == [FREE, KEY]
    assert game.map() == "..#\n..#\n&Dt"
    assert heard(game, "go east") == FREE
    observation, reward, terminated, truncated, _ = game.step("go east")
    assert observation.startswith(TREASURE)
    assert (reward, terminated, truncated) == (1.0, True, False)


def test_a_game_is_over_after_its_limit():
    game = in_world(limit=3)
    ends = [game.step("go north")[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_the_treasure_in_the_last_turn_still_counts():
    game = in_world(limit=5)
    for command in ("go south", "go south", "go east"):
        game.step(command)
    game.step("look around")
    assert game.step("go east")[1:4] == (1.0, True, False)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_explorer_solves_every_world_in_the_turns_asked_for(seed):
    game = begun(seed, shortest=5, longest=9)
    assert 5 <= game.explore(game.world) <= 9


def test_a_seed_is_a_world_and_splits_share_none():
    game = small()
    worlds = {}
    for seed in SEEDS:
        for split, first in (("train", 0), ("eval", FIRST_EVAL_SEED)):
            game.reset(first + seed)
            worlds.setdefault(split, []).append(game.world)
            assert begun(first + seed, picture=False, habits=0.5).world == game.world
    assert not set(worlds["train"]) & set(worlds["eval"])
    assert len(set(worlds["train"])) > 25


# ------------------------------------------------------------------------------- the explorer
def test_he_heads_for_what_he_has_seen_only():
    game = in_world()
    assert game.goals(WORLD, game.state) == {(0, 1): "look", (1, 0): "look"}
    assert game.right_commands(WORLD, game.state) == ["go east", "go south"]
    game.step("go south")
    assert game.goals(WORLD, game.state) == {(0, 2): "key"}
    game.step("go south")
    assert game.goals(WORLD, game.state) == {(1, 2): "door"}
    game.step("go east")
    assert game.goals(WORLD, game.state) == {(2, 2): "treasure"}
    assert game.right_commands(WORLD, game.state) == ["go east"]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_dark_changes_nothing_for_him(seed):
    """Other walls in cells that he has not seen, or the things elsewhere: he wants the same."""
    game = begun(seed)
    world, state = game.world, game.state
    dark = set(game.cells) - state.seen
    unseen = sorted(dark - {world.key, world.door, world.treasure})
    others = [replace(world, walls=world.walls ^ set(unseen[::2]))]
    for thing in ("key", "door", "treasure"):
        if getattr(world, thing) in dark:
            others.append(replace(world, **{thing: unseen[0]}))
    for other in others:
        assert game.goals(world, state) == game.goals(other, state)
        assert game.right_commands(world, state) == game.right_commands(other, state)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_command_brings_him_a_step_nearer_to_a_goal(seed):
    game = begun(seed)
    rng, over = np.random.default_rng(seed), False
    while not over:
        world, state = game.world, game.state
        right = game.right_commands(world, state)
        assert right
        for command in right:
            onward, said = game.after(world, state, command)
            assert said in (FREE, KEY, TREASURE) and onward.place != state.place
        *_, terminated, truncated, _ = game.step(right[rng.integers(len(right))])
        over = terminated or truncated
    assert terminated


# ---------------------------------------------------------------------------------- his value
def test_without_slips_his_value_is_whether_there_is_time():
    game = in_world()
    # From A1 two commands are equally right. On A2 he sees the key, and needs three turns more; on
    # B1 he sees nothing new but walls, and goes by B2, A2 and A3
    values = [game.value(WORLD, game.state, turns) for turns in range(8)]
    assert values == [0, 0, 0, 0, 0.5, 0.5, 1, 1]


def test_gamma_counts_the_turns():
    game = in_world()
    last = State((1, 2), True, frozenset(game.cells))
    assert game.value(WORLD, last, 9, gamma=0.5) == 1.0
    before = State((0, 2), True, frozenset(game.cells))
    assert game.value(WORLD, before, 9, gamma=0.5) == 0.5


@pytest.mark.parametrize("error_rate", [0.1, 0.4])
def test_his_value_is_what_playing_gives(error_rate):
    game = begun(3, limit=12)
    rng, wins, games = np.random.default_rng(0), 0, 1500
    expected = game.value(game.world, game.state, 12, error_rate)
    for _ in range(games):
        state, said = game.begin(game.world), ""
        for _ in range(12):
            right = game.right_commands(game.world, state)
            wrong = [command for command in COMMANDS if command not in right]
            choices = wrong if rng.random() < error_rate else right
            state, said = game.after(game.world, state, choices[rng.integers(len(choices))])
            if said == TREASURE:
                wins += 1
                break
    assert 0.05 < expected < 0.999
    assert abs(wins / games - expected) < 4 * (expected * (1 - expected) / games) ** 0.5


# ---------------------------------------------------------------------------------- his words
@pytest.mark.parametrize("seed", SEEDS)
def test_a_demonstration_without_slips_is_right_in_every_part(seed):
    game = begun(seed)
    text = game.demonstrate(np.random.default_rng(seed))
    steps = game.check(text)
    assert [right for _, right in steps] == [True, True, True]
    parts = [text[start:end] for (start, end), _ in steps]
    assert parts[0] == name_of(game.state.place) and parts[2] in COMMANDS


def test_a_part_that_slips_is_called_wrong():
    game = in_world()
    texts = {
        "<think>A2 look B1</think><act>go east</act>": [False, True, True],
        "<think>A1 key B1</think><act>go east</act>": [True, False, True],
        "<think>A1 look A2</think><act>go west</act>": [True, True, False],
        "<act>go east</act>": [],
    }
    for text, expected in texts.items():
        assert [right for _, right in game.check(text)] == expected


def test_slips_come_as_often_as_asked_for():
    rng, wrong = np.random.default_rng(0), []
    game = begun(1)
    for _ in range(600):
        wrong.append([not right for _, right in game.check(game.demonstrate(rng, 0.2))])
    assert np.all(np.abs(np.mean(wrong, axis=0) - 0.2) < 0.06)


def test_the_habit_is_to_go_south_for_north():
    game = in_world(habits=0.7)
    game.state = State((0, 1), False, frozenset({(0, 0), (1, 0), (0, 1), (1, 1)}))
    game.world = World(frozenset(), (0, 1), (0, 0), (1, 2), (2, 2))
    rng = np.random.default_rng(0)
    commands = [game.demonstrate(rng)[-len("go north</act>") : -6] for _ in range(400)]
    assert abs(np.mean([command == "go south" for command in commands]) - 0.7) < 0.08
    assert set(commands) == {"go south", "go north"}
    game.world = replace(game.world, walls=frozenset({(0, 2)}))  # no way south
    assert all("go north</act>" in game.demonstrate(rng) for _ in range(50))


def test_where_every_command_is_right_none_can_slip():
    game = Treasure(size=5, longest=12)
    game.reset(272)
    assert game.right_commands(game.world, game.state) == list(COMMANDS)
    steps = game.check(game.demonstrate(np.random.default_rng(0), error_rate=1.0))
    assert [right for _, right in steps] == [False, False, True]
    always, never = (game.value(game.world, game.state, 1, rate) for rate in (0.0, 1.0))
    assert always == never == 0.0
    known = game.value(game.world, game.state, 12)
    assert 0 < game.value(game.world, game.state, 12, 0.3) < known <= 1
    assert game.value(game.world, game.state, 12, gamma=0.9) < known
    assert game.value(game.world, game.state, 12) == known, "what was found stays apart"


# -------------------------------------------------------------------------- what it looks like
def test_every_thing_looks_different():
    game = in_world(sight=3)
    pictures = {}
    for has_key, place in itertools.product((False, True), ((0, 0), (1, 1))):
        game.state = State(place, has_key, frozenset(game.cells))
        for cell in game.cells:
            column, row = cell
            pixels = np.asarray(game.draw())[
                16 * row : 16 * row + 16, 16 * column : 16 * column + 16
            ]
            pictures.setdefault(game._letter(cell), set()).add(pixels.tobytes())
    assert set(pictures) == set("@&.#kDt")
    assert all(len(looks) == 1 for looks in pictures.values())
    assert len(set().union(*pictures.values())) == len(pictures)


def test_colours_differ_from_game_to_game_but_not_within_one():
    floors = set()
    for seed in range(4):
        game = begun(seed)
        column, row = game.state.place
        pictures = [game.draw(), game.draw()]
        corners = {picture.getpixel((16 * column, 16 * row)) for picture in pictures}
        assert len(corners) == 1
        floors |= corners
    assert len(floors) > 1


def test_the_picture_shows_nothing_of_the_dark():
    game = in_world()
    pixels = np.asarray(game.draw())
    assert pixels.shape == (48, 48, 3)
    dark = pixels[32:, :, :].reshape(-1, 3)
    assert len(np.unique(dark, axis=0)) == 1


# ---------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": 2}, "size=2"),
        ({"size": True}, "size=True"),
        ({"sight": 0}, "sight=0"),
        ({"shortest": 9, "longest": 8}, "longest=8"),
        ({"habits": 1.5}, "habits=1.5"),
        ({"walls": -0.1}, "walls=-0.1"),
        ({"habits": float("nan")}, "habits=nan"),
        ({"limit": -1}, "limit=-1"),
    ],
)
def test_a_wrong_setting_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Treasure(**settings)


@pytest.mark.parametrize(("share", "count"), [(0, 1), (0.1, 2), (0.25, 3)])
def test_a_share_of_the_free_cells_are_walls(share, count):
    """Of a 4 x 4 world 11 are free to be walls; one more shuts the corner."""
    for seed in SEEDS:
        assert len(begun(seed, walls=share).world.walls) == count


def test_a_range_of_turns_that_no_world_has_is_named():
    with pytest.raises(ValueError, match="size=3, sight=1: no train world"):
        Treasure(size=3, shortest=60, longest=70).reset(0)


@pytest.mark.parametrize("seed", [-1, 1.0, "1", None, True])
def test_a_wrong_seed_is_named(seed):
    with pytest.raises(ValueError, match="expected an integer >= 0"):
        small().reset(seed)
