"""env.GameEnv: a game's turns, written segment by segment; and what a batch survives."""

import gymnasium as gym
import numpy as np
import pytest
from games import Breaks, Endless, Spell
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import env
import train
from env import GameEnv
from tasks.games import FIRST_EVAL_SEED, GameTask, command_in, turns_of, until_end


def begun(game=None, index=1, **settings):
    """A game of "cab", at its beginning."""
    episode = GameEnv(game or Spell(), **settings)
    episode.reset(options={"index": index})
    return episode


def turn(command):
    return f"<think>hm</think><act>{command}</act>"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("picture", [True, False])
def test_gymnasiums_checker_finds_nothing_wrong(picture):
    made = gym.make("SAPO/Treasure-v0", size=4, picture=picture, disable_env_checker=True)
    check_env(made.unwrapped)


def test_a_turn_ends_where_its_command_closes():
    episode = begun()
    observation, reward, terminated, truncated, info = episode.step("<think>c?</think>")
    assert (reward, terminated, truncated, info["reply"]) == (0.0, False, False, "")
    observation, reward, terminated, truncated, info = episode.step("<act>c</act>")
    assert (reward, terminated, truncated, info["reply"]) == (1.0, False, False, "Yes.")
    assert (
        observation["reply"] == "Yes."
        and observation["response"] == "<think>c?</think><act>c</act>"
    )
    assert episode.step(turn("x"))[1] == 0.0
    assert episode.step(turn("a"))[1:3] == (1.0, False)
    _, reward, terminated, truncated, info = episode.step(turn("b"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["correct"] and info["end_reason"] == "game"
    assert info["reward_terms"] == {"game": 3.0} and info["predicted"] == "b"
    with pytest.raises(gym.error.ResetNeeded, match="game"):
        episode.step("x")


def test_pictures_come_with_the_observations():
    episode = GameEnv(Spell(pictured=True))
    first, _ = episode.reset(options={"index": 1})
    (before,) = first["images"]
    (after,) = episode.step(turn("c"))[0]["images"]
    assert before.shape == after.shape == (32, 32, 3) and not np.array_equal(before, after)
    assert begun().step(turn("c"))[0]["images"] == ()


@given(st.data())
def test_how_a_turn_is_cut_changes_nothing(data):
    text = turn("c") + turn("x") + turn("a") + turn("b")
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))))
    ends = [i + len("</act>") for i in range(len(text)) if text.startswith("</act>", i)]
    episode, rewards, replies, over = begun(), {}, [], False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        # a segment never goes beyond its turn: the always-ends of a cut see to that
        for last in [e for e in ends if start < e < end] + [end]:
            _, reward, over, _, info = episode.step(text[start:last])
            rewards[last] = reward
            replies += [info["reply"]] if info["reply"] else []
            start = last
    assert over and replies == ["Yes.", "No.", "Yes.", "Yes."]
    assert [rewards[end] for end in ends] == [1.0, 0.0, 1.0, 1.0]
    assert sum(rewards.values()) == 3.0


def test_what_stands_behind_a_command_is_dropped():
    episode = begun()
    observation, reward, *_ = episode.step(turn("c") + turn("a"))
    assert reward == 1.0 and observation["response"] == turn("c")
    assert episode.step(turn("a"))[1] == 1.0


@pytest.mark.parametrize("text", ["</act>", "<act></act>", "<act>c<</act>", "<act>c</act >x</act>"])
def test_what_is_no_command_is_a_turn_all_the_same(text):
    _, reward, terminated, truncated, info = begun().step(text)
    assert (reward, terminated, truncated, info["reply"]) == (0.0, False, False, "No.")


def test_end_ends_the_episode():
    _, reward, terminated, truncated, info = begun().step("<think>I give up" + env.END)
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert info["end_reason"] == "end" and not info["correct"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"max_turns": 3}, "max_turns"), ({"max_segments": 2}, "max_segments")],
)
def test_a_game_that_never_ends_is_truncated(limits, reason):
    episode, truncated, steps = begun(Endless(), **limits), False, 0
    while not truncated:
        *_, terminated, truncated, info = episode.step(turn("x"))
        steps += 1
        assert not terminated
    assert info["end_reason"] == reason and steps == next(iter(limits.values()))


def test_a_turn_that_is_never_closed_is_truncated():
    episode = begun(max_chars=10)
    assert episode.step("<think>")[3] is False
    observation, _, _, truncated, info = episode.step("and so on")
    assert truncated and info["end_reason"] == "max_chars"
    assert observation["response"] == "<think>and"


def test_a_long_reply_is_cut_off():
    assert begun(Endless(), max_chars=50).step(turn("x"))[4]["reply"] == ("on and " * 8)[:50]


def test_a_reward_that_is_none_ends_the_episode_too():
    class Stingy(Spell):
        def step(self, command):
            return "Well.", None, False, False, {}

    with pytest.warns(UserWarning, match="Stingy.*TypeError"):
        assert begun(Stingy()).step(turn("c"))[1:4] == (0.0, False, True)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_ends_the_episode_too(reward):
    class Odd(Spell):
        def step(self, command):
            return "Well.", reward, False, False, {}

    with pytest.warns(UserWarning, match="Odd.*a reward of"):
        assert begun(Odd()).step(turn("c"))[1:4] == (0.0, False, True)


def test_a_game_may_have_slots_and_end_itself_without_success():
    class Slotted:
        __slots__ = ()

        def reset(self, seed):
            return "Well?"

        def step(self, command):
            return "Enough.", 1.0, False, True, {}

    *_, truncated, info = begun(Slotted()).step(turn("c"))
    assert truncated and info["end_reason"] == "game_truncated" and not info["correct"]


def test_a_turn_that_closes_at_the_last_character_is_the_last():
    episode = begun(max_chars=len(turn("c")))
    _, reward, terminated, truncated, info = episode.step(turn("c"))
    assert (reward, terminated, truncated, info["end_reason"]) == (1.0, False, True, "max_chars")


def test_where_a_game_does_not_begin_that_of_the_next_seed_stands_in():
    class Picky(Spell):
        def reset(self, seed):
            if seed % 4 != 3:
                raise KeyError("no such word")
            return super().reset(seed)

    said = r"Picky.*reset\(1\) raised KeyError.*the game of seed 3 stands in"
    with pytest.warns(UserWarning, match=said) as warned:
        example = GameTask(Picky()).example_at(1)
    assert example.content == (3,) and example.question == Spell().reset(3)
    assert len(warned) == 1


def test_the_game_that_stands_in_is_of_the_same_split():
    class Late(Spell):
        def reset(self, seed):
            if seed == FIRST_EVAL_SEED - 1:
                raise KeyError("too late")
            return super().reset(seed)

    with pytest.warns(UserWarning, match="the game of seed 0 stands in"):
        assert GameTask(Late()).example_at(FIRST_EVAL_SEED - 1).content == (0,)


def test_a_game_that_never_begins_is_named_in_one_line(recwarn):
    class Never(Spell):
        def reset(self, seed):
            raise KeyError("no words at all")

    class Mute(Spell):
        def reset(self, seed):
            return None

    with pytest.raises(ValueError, match=r"Never.*reset\(1\).*no words at all.*next 2 seeds"):
        GameTask(Never()).example_at(1)
    with pytest.raises(ValueError, match=r"Mute.*reset\(1\) raised TypeError"):
        GameTask(Mute()).example_at(1)
    assert not recwarn.list


def test_a_class_of_games_is_made_with_its_settings():
    assert GameEnv(Spell, pictured=True).task.game.pictured
    registered = gym.envs.registration.EnvSpec("Spell-v0", GameEnv, kwargs={"game": Spell()})
    first, second = (gym.make(registered, disable_env_checker=True).unwrapped for _ in range(2))
    assert first.task.game is not second.task.game, "each environment has a game of its own"


def test_a_game_that_raises_ends_its_episode_and_is_named():
    episode = begun(Breaks())
    episode.step(turn("c"))
    episode.step(turn("a"))
    with pytest.warns(UserWarning, match=r"Breaks.*step\('b'\) raised RuntimeError.*wheels"):
        _, reward, terminated, truncated, info = episode.step(turn("b"))
    assert (reward, terminated, truncated, info["end_reason"]) == (0.0, False, True, "error")


# ------------------------------------------------------------------------------ where it begins
def test_training_and_evaluation_have_other_seeds():
    seeds = []

    class Noted(Spell):
        def reset(self, seed):
            seeds.append(seed)
            return super().reset(seed)

    episode = GameEnv(Noted())
    for split in ("train", "eval"):
        _, info = episode.reset(options={"index": 7, "split": split})
        assert info["example_id"] == f"{split}/7"
    assert seeds == [7, FIRST_EVAL_SEED + 7]


def test_a_game_begins_in_the_middle():
    episode = begun()
    prefix = turn("c") + turn("x") + "<think>now"
    episode.max_segments = 2  # those of a prefix do not count
    observation, _ = episode.reset(options={"index": 1, "response": prefix})
    assert observation["response"] == prefix and observation["segment_index"] == 0
    _, reward, *_ = episode.step(" a</think><act>a</act>")
    assert reward == 1.0 and episode.step(turn("b"))[2]
    assert episode.reward_terms == {"game": 2.0}, "what the prefix earned is not earned again"
    episode.max_segments = 1
    episode.reset(options={"index": 1, "response": turn("c")})
    assert episode.step(turn("a"))[3], "a single segment is allowed, and it is not the last turn"


def test_a_game_won_by_its_prefix_is_won():
    class Early(Spell):
        def step(self, command):
            observation, _, terminated, truncated, info = super().step(command)
            return observation, float(self.left == "ab"), terminated, truncated, info

    episode = begun(Early())
    episode.reset(options={"index": 1, "response": turn("c")})
    episode.step(turn("a"))
    *_, info = episode.step(turn("b"))
    assert info["correct"] and info["reward_terms"] == {"game": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"response": turn("c") + turn("a") + turn("b")},
        {"response": "<think>" + env.END},
        {"response": 3},
        {"index": -1},
        {"index": FIRST_EVAL_SEED},
        {"split": "test"},
        {"level": 1},
        "index",
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        begun().reset(options={"index": 1, **options} if isinstance(options, dict) else options)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"game": "Chess"}, "game='Chess' is unknown"),
        ({"max_turns": 0}, "max_turns=0"),
        ({"render_mode": "smell"}, "render_mode='smell'"),
        ({"size": 99}, "size=99"),
        ({"game": 42}, "game=42: expected an object with the methods reset and step"),
        ({"game": Spell(), "max_turn": 3}, "max_turn.*expected no more keywords beside a game"),
    ],
)
def test_a_wrong_setting_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        GameEnv(**settings)


def test_a_setting_that_a_game_needs_is_named():
    class Levels(Spell):
        def __init__(self, level, *rest, **others):
            super().__init__()

    with pytest.raises(ValueError, match="^Levels: level= is missing; give it a value$"):
        GameEnv(Levels, size=3)
    assert GameEnv(Levels, level=3).task.game


def test_what_is_no_observation_is_named():
    class Silent(Spell):
        def reset(self, seed):
            return "words", "no picture"

    with pytest.raises(ValueError, match="Silent.*an observation is a string, or a string and a"):
        GameEnv(Silent()).reset(options={"index": 0})


def test_an_action_is_a_string():
    with pytest.raises(TypeError, match="got int"):
        begun().step(3)


# ---------------------------------------------------------------------------------- the texts
@given(st.lists(st.sampled_from(["<act>", "</act>", "a", env.END, "<think>", " "]), max_size=12))
def test_turns_join_to_what_was_written(pieces):
    response = "".join(pieces)
    turns = turns_of(response)
    assert "".join(turns) == response and all(turns)
    for text in turns[:-1]:
        assert until_end(text) == (text, "act" if text.endswith("</act>") else "end")


def test_the_command_is_the_last_thing_in_a_turn():
    assert command_in("<act>wait</act x><act> go north </act>") == "go north"
    assert command_in("go north</act>") == command_in("<act>go") == ""


def test_a_game_can_be_seen():
    episode = begun(render_mode="ansi")
    episode.step(turn("c"))
    episode.step("<think>\x1b[2J")
    assert episode.render() == f"Spell cab.\n{turn('c')}\n    Yes.\n<think>\\x1b[2J"
    made = GameEnv("Treasure", size=4, render_mode="rgb_array")
    made.reset(options={"index": 0})
    assert made.render().shape == (320, 320, 3)


def test_steps_are_those_of_each_turn_in_its_own_moment():
    task = GameTask(env.GAMES["Treasure"](size=4))
    example = task.example_at(5)
    rng, response = np.random.default_rng(0), ""
    for _, _, text in task.transcript(example, rng):
        response += text
    turns = turns_of(response)
    task.game.reset(0)  # another game is under way, and goes on undisturbed
    under_way = task.game.state, task.game.world
    steps = task.checked(example, turns)
    assert (task.game.state, task.game.world) == under_way
    assert len(steps) == 3 * len(turns) and all(right for _, right in steps)
    assert response[slice(*steps[-1][0])].startswith("go ")
    assert task.checked(example, turns + turns) == steps, "the game is over by then"
    assert task.checked(example, [*turns[:2], env.END, *turns[2:]]) == steps[:6], "or given up"
    # what a token holds behind a closed command was not played, but has its place
    longer = task.checked(example, [f"{text}\n" for text in turns])
    assert [right for _, right in longer] == [right for _, right in steps]
    assert longer[3][0][0] == steps[3][0][0] + 1
    assert GameTask(Spell()).checked(example, turns) == []


def test_a_model_is_told_the_form_of_a_turn_and_the_rules():
    told = GameTask(env.GAMES["Treasure"]()).system
    assert "<act>the command</act>" in told and "go north" in told
    assert GameTask(Spell()).system.endswith("</act>")


def test_what_the_last_command_does_is_not_asked():
    class Judged(Breaks):
        def check(self, text):
            return [((0, 1), True)]

    task = GameTask(Judged())
    example = task.example_at(0)
    assert len(task.checked(example, [turn("a"), turn("b")])) == 2


def test_a_check_that_raises_is_named_and_ends_no_run():
    class Judged(Spell):
        def check(self, text):
            raise RuntimeError("no idea")

    task = GameTask(Judged())
    with pytest.warns(UserWarning, match="check raised RuntimeError"):
        assert task.checked(task.example_at(0), [turn("a")]) == []


def test_a_second_game_is_made_only_when_it_is_asked_for():
    made = []
    task = GameTask(Spell(), make=lambda: made.append(Spell()) or made[-1])
    example = task.example_at(1)
    assert not made
    task.observed(example, [turn("c"), turn("a")])
    assert task.observed(example, [turn("c")]) == [("Spell cab.", None)]
    assert len(made) == 1


def test_a_registered_game_may_be_an_object_that_has_no_hash():
    class Unhashable(Spell):
        __hash__ = None

    gym.register("Unhashable-v0", "env:GameEnv", kwargs={"game": Unhashable()})
    settings, _ = train.parse(["--env", "Unhashable-v0", "--model", "elsewhere"])
    assert isinstance(train.make_env(settings).unwrapped.task.game, Unhashable)


def test_what_ends_first_ends_a_turn():
    assert until_end(f"x{env.END}<act>y</act>") == (f"x{env.END}", "end")
    assert until_end(f"<act>y</act>{env.END}") == ("<act>y</act>", "act")
