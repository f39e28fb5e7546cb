"""tasks/textworld.py: games that TextWorld makes, seen in one line, with its winning policy."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from games import demonstrated

from tasks.games import FIRST_EVAL_SEED, GameTask, command_in

pytest.importorskip("textworld", reason="needs: pip install textworld")

from tasks.textworld import UNKNOWN, TextWorld, described  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("textworld")


@pytest.fixture
def game(cache):
    return TextWorld(games=6, cache=cache)


def test_the_winning_policy_wins_by_right_commands(game):
    lengths = []
    for seed in range(6):
        turns = demonstrated(game, seed)
        *_, (_, _, (said, reward, terminated, truncated, _)) = turns
        assert (said, reward, terminated, truncated) == ("Done!", 1.0, True, False)
        assert all(checks[0][1] for _, checks, _ in turns)
        assert all(stepped[1] == 0 for _, _, stepped in turns[:-1])
        lengths.append(len(turns))
    assert max(lengths) == 3


def test_what_leads_nowhere_is_wrong_and_the_game_ends_at_its_limit(game):
    game.reset(1)
    assert game.check("<act>look</act>") == [((5, 9), False)]
    assert game.check("go on") == []
    ends = [game.step("look")[2:4] for _ in range(game.limit)]
    assert ends == [(False, False)] * 7 + [(False, True)]


def test_what_cannot_be_done_changes_nothing_and_is_told(game):
    begin = game.reset(2)
    said, reward, terminated, truncated, _ = game.step("open sesame")
    assert said == f"{UNKNOWN}\n{begin.partition(chr(10))[2]}"
    assert (reward, terminated, truncated) == (0.0, False, False)


def test_habits_examine_what_is_to_be_opened(cache):
    game = TextWorld(games=20, cache=cache, habits=1.0)
    dithered = 0
    for seed in range(20):
        turns = demonstrated(game, seed)
        for text, checks, _ in turns:
            if "examine" in text:
                dithered += 1
                assert not checks[0][1]
        assert not any(text.startswith(("<act>open", "<act>unlock")) for text, _, _ in turns)
    assert dithered > 3


def test_slips_are_commands_that_can_be_given(game):
    rng = np.random.default_rng(0)
    game.reset(0)
    said = {command_in(game.demonstrate(rng, 0.5)) for _ in range(60)}
    assert game.world.state.policy_commands[0] in said and len(said) > 3
    assert said <= set(game.world.state.admissible_commands)


def test_games_are_kept_and_the_splits_share_none(cache):
    again = TextWorld(games=6, cache=cache)

    def contents(first):
        return [(again.reset(first + i), again.file) for i in range(6)]

    train, held_out = contents(0), contents(FIRST_EVAL_SEED)
    assert train == contents(6)  # six games, round and round
    assert not {text for text, _ in train} & {text for text, _ in held_out}
    before = (cache / "basic-rooms2-objects4-quest3" / "train-0.json").stat().st_mtime_ns
    assert TextWorld(games=6, cache=cache).reset(0) == train[0][0]
    after = (cache / "basic-rooms2-objects4-quest3" / "train-0.json").stat().st_mtime_ns
    assert before == after


def test_admissible_commands_are_shown_on_request(cache):
    game = TextWorld(games=6, cache=cache, admissible=True)
    commands = game.reset(0).splitlines()[2].split("; ")
    assert commands == game.world.state.admissible_commands and "look" in commands


def fact(name, *arguments):
    named = [SimpleNamespace(name=argument) for argument in arguments]
    return SimpleNamespace(name=name, arguments=named)


def test_the_line_tells_what_can_be_seen_from_here_and_no_more():
    facts = [
        fact("at", "P", "room1"),
        fact("at", "A-box", "room1"),
        fact("closed", "A-box"),
        fact("in", "hidden", "A-box"),
        fact("at", "B-box", "room1"),
        fact("open", "B-box"),
        fact("in", "thing2", "B-box"),
        fact("at", "stand3", "room1"),
        fact("on", "thing4", "stand3"),
        fact("at", "elsewhere", "room2"),
        fact("north_of", "room2", "room1"),
        fact("free", "room1", "room2"),
        fact("west_of", "room3", "room1"),
        fact("link", "room1", "door5", "room3"),
        fact("locked", "door5"),
        fact("in", "key6", "I"),
        fact("match", "key6", "door5"),
    ]
    assert described(facts) == (
        "room1: A-box (closed), B-box (open: thing2), stand3 (thing4); "
        "north, west by door5 (locked); carrying key6"
    )
    assert described(facts[:1]) == "room1: nothing; no way out; carrying nothing"


def test_whole_responses_are_checked(cache):
    task = GameTask(TextWorld(games=6, cache=cache))
    example = task.example_at(4)
    turns = [text for _, _, text in task.transcript(example, np.random.default_rng(0))]
    assert [right for _, right in task.checked(example, turns)] == [True] * len(turns)
    assert [right for _, right in task.checked(example, ["<act>look</act>", *turns])] == [
        False,
        *[True] * len(turns),
    ]


def test_a_larger_house_is_won_too(cache):
    game = TextWorld(quest=4, rooms=3, objects=8, theme="house", games=2, cache=cache)
    turns = demonstrated(game, 0)
    assert turns[-1][2][1] == 1.0 and len(turns) <= 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quest": 0}, "quest=0"),
        ({"theme": "castle"}, "theme='castle' is unknown"),
        ({"habits": 2}, "habits=2"),
        ({"games": True}, "games=True"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        TextWorld(**settings)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    import tasks.textworld

    tasks.textworld._package.cache_clear()
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ImportError, match="pip install textworld"):
        TextWorld()
    tasks.textworld._package.cache_clear()
