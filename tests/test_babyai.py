"""tasks/babyai.py: levels of BabyAI as games, with its bot as the teacher."""

import sys

import numpy as np
import pytest
from games import demonstrated

from tasks.games import FIRST_EVAL_SEED, GameTask

pytest.importorskip("minigrid", reason="needs: pip install minigrid")

from tasks.babyai import BabyAI, described, draw  # noqa: E402


@pytest.mark.parametrize("level", ["GoToLocal", "PickupLoc", "UnlockLocal", "GoToSeq"])
def test_the_bot_solves_what_it_demonstrates(level):
    game = BabyAI(level)
    for seed in range(4):
        turns = demonstrated(game, seed)
        *_, (_, reward, terminated, truncated, _) = turns[-1]
        assert 0 < reward <= 1 and terminated and not truncated
        assert all(stepped[1] == 0 for _, _, stepped in turns[:-1])
        assert all(right for _, checks, _ in turns for _, right in checks)


def test_slips_are_seen_and_a_habit_is_one_and_the_bot_finds_its_way_all_the_same():
    slips = demonstrated(BabyAI(), 3, error_rate=0.4)
    assert not all(right for _, checks, _ in slips for _, right in checks)
    turns = [turn for seed in range(12) for turn in demonstrated(BabyAI(habits=1), seed)]
    assert not any("turn right" in text for text, _, _ in turns)
    wrong = [text for text, checks, _ in turns if not checks[1][1]]
    assert wrong and all("turn left" in text for text in wrong)


def test_the_bot_knows_what_was_done_without_its_advice():
    asked, unasked = BabyAI(), BabyAI()
    for game in (asked, unasked):
        game.reset(11)
        for command in ("turn left", "go forward", "turn left"):
            if game is asked:
                game.check("<think></think><act>done</act>")
            game.step(command)
    rng = np.random.default_rng(0)
    assert asked.demonstrate(rng) == unasked.demonstrate(rng)


def test_the_same_seed_is_the_same_world_and_the_splits_share_none():
    def world(seed):
        game = BabyAI()
        game.reset(seed)
        return game.world.mission, game.world.grid.encode().tobytes()

    assert world(5) == world(5) != world(6)
    train, held_out = ({world(first + i) for i in range(40)} for first in (0, FIRST_EVAL_SEED))
    assert len(train) == len(held_out) == 40 and not train & held_out


def test_the_picture_shows_what_the_words_say():
    in_words, in_pictures = BabyAI(picture=False), BabyAI()
    words = in_words.reset(5)
    mission, picture = in_pictures.reset(5)
    assert words.startswith(f"{mission}\n")
    assert picture.size == (64, 64) and picture.getpixel((0, 0)) == (0, 0, 0)
    seen = in_pictures._seen()
    assert described(seen) == words.partition("\n")[2]
    assert draw(seen).tobytes() == picture.tobytes()


def test_what_is_seen_is_made_of_words_that_have_a_token():
    from minigrid.core.constants import COLOR_NAMES

    assert {*COLOR_NAMES, "ball", "box", "key", "door", "wall", "Go on.", "Done!"} <= set(
        BabyAI.words
    )


def test_words_name_the_nearest_things_first_and_where_they_are():
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

    seen = np.zeros((7, 7, 3), np.uint8)  # unseen
    seen[2:5, 3:, 0] = OBJECT_TO_IDX["empty"]
    seen[2, 4] = OBJECT_TO_IDX["ball"], COLOR_TO_IDX["red"], 0
    seen[3, 3] = OBJECT_TO_IDX["wall"], COLOR_TO_IDX["grey"], 0
    seen[4, 3] = OBJECT_TO_IDX["wall"], COLOR_TO_IDX["grey"], 0
    seen[4, 6] = OBJECT_TO_IDX["key"], COLOR_TO_IDX["blue"], 0
    assert described(seen) == "blue key 1 right; red ball 2 ahead, 1 left; wall 3 ahead"
    assert described(np.zeros((7, 7, 3), np.uint8)) == "nothing"


def test_an_unknown_command_changes_nothing_and_is_told():
    game = BabyAI()
    game.reset(2)
    before = game.world.grid.encode().tobytes(), game.world.agent_pos, game.world.agent_dir
    (words, _), reward, terminated, truncated, _ = game.step("open sesame")
    assert words.startswith("Say turn left") and (reward, terminated, truncated) == (
        0,
        False,
        False,
    )
    after = game.world.grid.encode().tobytes(), game.world.agent_pos, game.world.agent_dir
    assert before == after


def test_whole_responses_are_checked_while_another_game_goes_on():
    task = GameTask(BabyAI())
    example = task.example_at(4)
    turns = [text for _, _, text in task.transcript(example, np.random.default_rng(0))]
    task.game.reset(99)
    before = task.game.world.grid.encode().tobytes()
    checks = task.checked(example, turns)
    assert len(checks) == 2 * len(turns) and all(right for _, right in checks)
    assert task.game.world.grid.encode().tobytes() == before


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="level='GoHome' is unknown; expected one of .*GoToLocal"):
        BabyAI("GoHome")
    with pytest.raises(ValueError, match="habits=2"):
        BabyAI(habits=2)
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(ImportError, match="pip install minigrid"):
        BabyAI("GoToObjS4")
