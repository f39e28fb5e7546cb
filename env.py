"""Gymnasium environments in which an action is a segment of reasoning, an episode a response.

Every `step` takes the next piece of the response, as text. The reward comes once, when the response
ends: in our tasks when the first `<answer>...</answer>` closes. Where the pieces begin and end is
the agent's business: the same text earns the same, and ends the same, under every cut into pieces
(within `max_segments`).

    import gymnasium as gym, env      # importing env registers SAPO/DiceSum-v0 and the others
    episode = gym.make("SAPO/DiceSum-v0", n=9, render_mode="ansi")
    observation, info = episode.reset(seed=0)  # or options={"index": 7, "split": "eval"}
    observation, reward, terminated, truncated, info = episode.step("<see>352614263</see>")

What is asked stands in `tasks`: DiceSum, DigitSum, ArrowPath and TextSum there; SAPO/Dataset-v0 has
the rows of a data set (tasks/dataset.py), SAPO/ReasoningGym-v0 the items of one of the package
reasoning-gym (tasks/reasoning.py). TextSum has no "image" in its observations: it is the
text-only branch. SAPO/Treasure-v0 is a game: the world replies to a command, and the next turn
begins (`GameEnv`; any object with `reset` and `step` is a game, tasks/games.py).

`AsyncVectorEnv` needs `shared_memory=False`, or Gymnasium corrupts the texts. Left out on purpose:
torch, and partial credit, which would give away what SAPO has to find out.
"""

import inspect
import math
import re
import warnings

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tasks import CELL, END, GAMES, TASKS, Task, games
from tasks.dataset import DatasetTask
from tasks.reasoning import ReasoningGym

# ------------------------------------------------------------------------------------- spaces


class AnyText(gym.spaces.Text):
    """Any string of at most `max_length` characters.

    Gymnasium's own `Text` rejects most of Unicode, and the empty string too.
    """

    def contains(self, x):
        return isinstance(x, str) and len(x) <= self.max_length


class Pictures(gym.Space):
    """A tuple of RGB pictures, (H, W, 3) uint8 arrays of any size.

    A vector environment gives one such tuple per environment.
    """

    def __eq__(self, other):
        return isinstance(other, Pictures)

    def sample(self, mask=None, probability=None):
        return (self.np_random.integers(0, 256, (16, 16, 3), np.uint8),)

    def contains(self, x):
        return isinstance(x, tuple) and all(self._is_picture(picture) for picture in x)

    def _is_picture(self, picture):
        is_array = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
        return is_array and picture.shape[2:] == (3,)


# --------------------------------------------------------------- what all environments share


def _made(kind, settings):
    """Make a task or a game of its class. ValueError where settings that it needs are missing: a
    class may say in `needs` what they are, {name: what to give}; else their annotations stand for
    that."""
    try:
        parameters = inspect.signature(kind).parameters
    except ValueError:  # a class that is not written in Python need not tell
        return kind(**settings)
    for name, parameter in parameters.items():
        is_open = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_open or parameter.default is not parameter.empty or name in settings:
            continue
        expected = getattr(kind, "needs", {}).get(name)
        if expected is None and parameter.annotation is not parameter.empty:
            expected = inspect.formatannotation(parameter.annotation)
        raise ValueError(f"{kind.__name__}: {name}= is missing; give it {expected or 'a value'}")
    return kind(**settings)


class Episode(gym.Env):
    """What an environment whose action is a segment has in common with the others: the settings
    that all have, the options of `reset`, and what `step` takes."""

    metadata = {"render_modes": ["ansi", "rgb_array", "human"], "render_fps": 2}

    def _settle(self, render_mode, **limits):
        """Take the render mode and the limits at which an episode is truncated, each at least 1."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode={render_mode!r} is unknown; "
                f"expected one of {self.metadata['render_modes']}"
            )
        if min(limits.values()) < 1:
            named = ", ".join(f"{name}={limit}" for name, limit in limits.items())
            raise ValueError(f"{named}: expected each to be at least 1")
        for name, limit in limits.items():
            setattr(self, name, limit)
        self.render_mode = render_mode
        self.end_reason = "not reset"

    def _chosen(self, options):
        """The options of `reset` with what stands for those not given: index, split, response."""
        self.end_reason = "not reset"  # until it is: a refused reset leaves no episode to go on
        # Drawn even where it is not used, so that later draws are the same
        drawn = int(self.np_random.integers(2**31))
        chosen = {"index": drawn, "split": "train", "response": ""}
        if options is not None:
            if not isinstance(options, dict) or not set(options) <= set(chosen):
                raise ValueError(
                    f"options={options!r} is not valid; "
                    f"expected a dict with some of {tuple(chosen)} as keys"
                )
            chosen.update(options)
        return chosen

    def _check_action(self, action):
        """TypeError for what is no string, ResetNeeded after the end."""
        if not isinstance(action, str):
            raise TypeError(
                f"an action is a str, the next segment of the response; got {type(action).__name__}"
            )
        if self.end_reason:
            raise gym.error.ResetNeeded(
                f"step() after the episode's end ({self.end_reason}); call reset() first"
            )


# ----------------------------------------------------------------- one response, step by step


class SegmentEnv(Episode):
    """One response, written segment by segment.

    task             a `Task`; or a class of tasks, or the name of one of ours ("DiceSum"), with its
                     settings as further keywords
    max_chars        at which an episode is truncated; if left out what the task needs (`task.room`)
    max_segments     the same, in segments; if left out as many as characters, so that the same text
                     earns the same however it is cut
    format_reward    paid besides, at the end, if the response is its blocks in order (`task.form`)
                     and nothing else
    render_mode      "ansi", "rgb_array", "human" or None

    `task`, `example`, `response` and `segments` may be read at any time after a reset.
    """

    def __init__(
        self,
        task="DiceSum",
        max_segments=None,
        max_chars=None,
        format_reward=0.0,
        render_mode=None,
        **settings,
    ):
        kind = TASKS.get(task) if isinstance(task, str) else task
        if settings and isinstance(kind, Task):
            raise ValueError(f"{tuple(settings)}: expected no more keywords beside a task")
        self.task = _made(kind, settings) if isinstance(kind, type) else kind
        if not isinstance(self.task, Task):
            raise ValueError(f"task={task!r} is unknown; expected one of {tuple(TASKS)} or a Task")
        max_chars = self.task.room if max_chars is None else max_chars
        max_segments = max_chars if max_segments is None else max_segments
        self._settle(render_mode, max_segments=max_segments, max_chars=max_chars)
        self.format_reward = float(format_reward)

        spaces = {}
        if self.task.side:
            size = self.task.side * CELL
            spaces["image"] = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        spaces["prompt"] = AnyText(self.task.max_prompt)
        spaces["response"] = AnyText(max_chars)
        spaces["segment_index"] = gym.spaces.Discrete(max_segments + 1)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = AnyText(max_chars)

    def reset(self, *, seed=None, options=None):
        """Begin a response. Returns `(observation, info)`.

        options: a dict with some of
            "index"     which example of the split, an integer >= 0; else one is drawn from
                        `np_random`
            "split"     "train" (the default) or "eval"
            "response"  an unfinished response to go on from

        Any other option, and a wrong value, is a ValueError.
        """
        super().reset(seed=seed)
        chosen = self._chosen(options)
        self._check_prefix(chosen["response"])

        self._open_example(chosen["index"], chosen["split"])
        self.prefix = chosen["response"]
        self.response = self.prefix
        self.segments = []
        self.end_reason = ""
        self.reward_terms = {"answer": 0.0, "format": 0.0}
        return self._report()

    def _check_prefix(self, prefix):
        fits = isinstance(prefix, str) and len(prefix) < self.max_chars
        if not fits or self.task.until_end(prefix)[1]:
            raise ValueError(
                f"response={prefix!r:.200} is not valid; expected an unfinished response: a str "
                f"shorter than max_chars={self.max_chars}, without a closed <answer> or {END}"
            )

    def _open_example(self, index, split):
        self.example = self.task.example_at(index, split)
        self.example_id = f"{split}/{index}"
        has_picture = self.example.image is not None
        self._pixels = np.asarray(self.example.image) if has_picture else None  # (H, W, 3)

    def step(self, action):
        """Append a segment, any string. Returns Gymnasium's five values; the reward is 0 until the
        end. TypeError for what is no string, ResetNeeded after the end, FloatingPointError for a
        reward that is not finite."""
        self._check_action(action)
        start = len(self.response)
        text = (self.response + action)[: self.max_chars]
        self.response, self.end_reason = self.task.until_end(text)
        self.segments.append(self.response[start:])

        terminated = bool(self.end_reason)
        truncated = False
        if terminated:
            self.reward_terms["answer"] = self._graded()
            if re.fullmatch(self.task.form, self.response):
                self.reward_terms["format"] = self.format_reward
        elif len(self.response) == self.max_chars:
            truncated = True
            self.end_reason = "max_chars"
        elif len(self.segments) == self.max_segments:
            truncated = True
            self.end_reason = "max_segments"
        observation, info = self._report()
        return observation, self._reward(), terminated, truncated, info

    def _graded(self):
        """The task's reward for the response. FloatingPointError where it is no finite number."""
        reward = float(self.task.grade(self.example, self.response))
        if not math.isfinite(reward):
            raise FloatingPointError(
                f"{self.task} gives {self.example_id} a reward of {reward}; expected a finite one"
            )
        return reward

    def _reward(self):
        return sum(self.reward_terms.values())

    def _report(self):
        """(observation, info) of the moment; in the render mode "human" it is shown, too."""
        if self.render_mode == "human":
            print(_as_text(self))
        return self._observation(), self._info()

    def _observation(self):
        observation = {
            "prompt": self.example.question,
            "response": self.response,
            "segment_index": len(self.segments),
        }
        if self.task.side:
            # (H, W, 3), a copy, so that a caller may change it
            observation["image"] = self._pixels.copy()
        return observation

    def _info(self):
        return {
            "example_id": self.example_id,
            "answer": self.example.answer,
            "predicted": self.task.read_answer(self.response),
            "correct": self.reward_terms["answer"] == 1,
            "segment_index": len(self.segments),
            "segment_text": self.segments[-1] if self.segments else "",
            "reward_terms": dict(self.reward_terms),
            "end_reason": self.end_reason,
            "steps_correct": self.task.check_steps(self.example, self.response),
        }

    def render(self):
        """A string ("ansi"), an (H, W, 3) uint8 array ("rgb_array"), or None: in the mode "human"
        every step prints itself."""
        if self.render_mode == "ansi":
            return _as_text(self)
        if self.render_mode == "rgb_array":
            return _as_frame(self)
        return None


class DatasetEnv(SegmentEnv):
    """A `SegmentEnv` of a `DatasetTask`, whose settings it takes as further keywords.

    In its observations "images", a tuple of arrays, replaces "image". In the style "boxed" only
    `END` ends a response: one that is cut off before earns nothing.
    """

    def __init__(
        self,
        path=None,
        max_segments=None,
        max_chars=None,
        format_reward=0.0,
        render_mode=None,
        **settings,
    ):
        if path is not None:
            settings["path"] = path
        task = _made(DatasetTask, settings)
        super().__init__(task, max_segments, max_chars, format_reward, render_mode)
        self.observation_space.spaces["images"] = Pictures()

    def _open_example(self, index, split):
        self.example = self.task.example_at(index, split)
        self.example_id = self.example.key  # which row it is: the index goes round and round
        self._images = tuple(np.asarray(picture) for picture in self.example.content)
        self._pixels = None
        if self._images and self.render_mode:
            # For a terminal, 48 x 48. First fitted into a larger square: in the small one a picture
            # that is a mere line would be thinner than a pixel.
            fitted = ImageOps.pad(self.example.image, (320, 320))
            self._pixels = np.asarray(fitted.resize((48, 48)))

    def _observation(self):
        images = tuple(image.copy() for image in self._images)
        return {**super()._observation(), "images": images}


# ------------------------------------------------------------- a game, turn by turn and in steps


class GameEnv(Episode):
    """A game (tasks/games.py), each of whose turns is written segment by segment.

    A turn ends where it closes a command, `<act>go north</act>`; what stands behind that in the
    same segment is dropped. The game obeys, and `info["reply"]` is what it says; pictures come with
    the observation. A reward belongs to the segment that closed the command. `END` ends the
    episode.

    game             a game; or a class of games, or the name of one of ours ("Treasure"), with its
                     settings as keywords
    max_turns        at which an episode is truncated, if the game has not ended it before
    max_segments     the same, in segments: generous, as one token per action is legal too
    max_chars        the same, in characters that the policy wrote; a reply is cut off after as many

    A game whose `step` raises, or returns what it should not, ends its episode with a warning that
    names it; no batch is lost by it. info["correct"]: the game ended, and its rewards sum to more
    than 0.
    """

    def __init__(
        self,
        game="Treasure",
        max_turns=100,
        max_segments=16384,
        max_chars=16384,
        render_mode=None,
        **settings,
    ):
        limits = {"max_turns": max_turns, "max_segments": max_segments, "max_chars": max_chars}
        self._settle(render_mode, **limits)
        if isinstance(game, str) and game not in GAMES:
            raise ValueError(f"game={game!r} is unknown; expected one of {tuple(GAMES)} or a game")
        kind = GAMES[game] if isinstance(game, str) else game
        if isinstance(kind, type):
            self.task = games.GameTask(_made(kind, settings), lambda: kind(**settings))
        elif settings:
            raise ValueError(f"{tuple(settings)}: expected no more keywords beside a game")
        else:
            self.task = games.GameTask(kind)
        self.observation_space = gym.spaces.Dict(
            {
                "images": Pictures(),
                "prompt": AnyText(max_chars),
                "response": AnyText(max_chars),
                "reply": AnyText(max_chars),
                "segment_index": gym.spaces.Discrete(max_segments + 1),
            }
        )
        self.action_space = AnyText(max_chars)

    def reset(self, *, seed=None, options=None):
        """Begin a game. Returns `(observation, info)`.

        options: a dict with some of
            "index"     which game of the split, an integer >= 0; else one is drawn from `np_random`
            "split"     "train" (the default) or "eval"
            "response"  what a policy has written already, of all turns; its commands are obeyed

        Any other option, and a wrong value, is a ValueError.
        """
        super().reset(seed=seed)
        chosen = self._chosen(options)
        self.example = self.task.example_at(chosen["index"], chosen["split"])
        self.example_id = self.example.key
        self.response = ""  # all turns that the policy has written
        self.turn = ""  # the present one
        self.turn_is_open = True  # nothing has ended it yet: no closed command, no `END`
        self.turns = []  # (what was written, the reply to it) of each finished one
        self.reply = ""
        self.picture = self.example.image
        self.won = False
        self.earned = 0.0  # in the whole game, the turns of a prefix included
        self._begin_episode()
        self._play_prefix(chosen["response"])
        self._begin_episode()  # what a prefix earned is not the episode's
        return self._report()

    def _begin_episode(self):
        self.segments = []
        self.reward_terms = {"game": 0.0}
        self.end_reason = ""

    def _play_prefix(self, prefix):
        """Obey what was written before the episode. ValueError for what is no unfinished game."""
        is_text = isinstance(prefix, str)
        for turn in games.turns_of(prefix) if is_text else ():
            self._write(turn)
            if self.end_reason:
                break
        if not is_text or self.end_reason:
            self.end_reason = "not reset"
            raise ValueError(
                f"response={prefix!r:.200} is not valid; expected what was written in a game "
                "that is not over"
            )

    def step(self, action):
        """Append a segment, any string. Returns Gymnasium's five values. TypeError for what is no
        string, ResetNeeded after the end."""
        self._check_action(action)
        reward, terminated, truncated = self._write(action)
        if not (terminated or truncated) and len(self.segments) == self.max_segments:
            truncated = True
            self.end_reason = "max_segments"
        observation, info = self._report()
        return observation, reward, terminated, truncated, info

    def _write(self, text):
        """Append to the turn, and play it where it closes. -> (reward, terminated, truncated)."""
        room = self.max_chars - len(self.response)
        turn, reason = games.until_end(self.turn + text[:room])
        self.segments.append(turn[len(self.turn) :])
        self.response += self.segments[-1]
        self.turn = turn
        self.turn_is_open = not reason
        self.reply = ""
        reward = 0.0
        terminated = truncated = False
        if reason == "act":
            reward, terminated, truncated = self._play(games.command_in(turn))
        elif reason == "end":
            terminated = True
            self.end_reason = "end"
        if not (terminated or truncated) and len(self.response) >= self.max_chars:
            truncated = True
            self.end_reason = "max_chars"
        self.reward_terms["game"] += reward
        self.earned += reward
        self.won = self.end_reason == "game" and self.earned > 0
        return reward, terminated, truncated

    def _play(self, command):
        """Give a command to the game. -> (reward, terminated, truncated)."""
        try:
            observation, reward, terminated, truncated, _ = self.task.game.step(command)
            words, self.picture = games.words_and_picture(observation)
            reward, terminated, truncated = float(reward), bool(terminated), bool(truncated)
            if not math.isfinite(reward):
                raise ValueError(f"a reward of {reward}")
        except Exception as error:  # whatever a foreign game does, the batch goes on
            warnings.warn(
                f"{self.task}: step({command!r}) raised {error!r}; the episode ends", stacklevel=2
            )
            self.end_reason = "error"
            return 0.0, False, True
        self.reply = words[: self.max_chars]
        self.turns.append((self.turn, self.reply))
        self.turn = ""
        truncated = truncated and not terminated
        if terminated or truncated:
            self.end_reason = "game" if terminated else "game_truncated"
        elif len(self.turns) >= self.max_turns:
            truncated = True
            self.end_reason = "max_turns"
        return reward, terminated, truncated

    def _report(self):
        """(observation, info) of the moment; in the render mode "human" it is shown, too."""
        if self.render_mode == "human":
            print(self.render_text())
        images = () if self.picture is None else (np.asarray(self.picture),)
        observation = {
            "images": images,
            "prompt": self.example.question[: self.max_chars],
            "response": self.response,
            "reply": self.reply,
            "segment_index": len(self.segments),
        }
        info = {
            "example_id": self.example_id,
            "answer": "",
            "predicted": games.command_in(self.turns[-1][0]) if self.turns else None,
            "correct": self.won,
            "segment_index": len(self.segments),
            "segment_text": self.segments[-1] if self.segments else "",
            "reward_terms": dict(self.reward_terms),
            "end_reason": self.end_reason,
            "steps_correct": [],
            "reply": self.reply,
        }
        return observation, info

    def render_text(self):
        """The transcript for a terminal: what the policy wrote, and what the game said. Control
        characters are spelled out."""
        lines = [self.example.question]
        for turn, reply in self.turns:
            lines += [turn, f"    {reply}"]
        if self.turn:
            lines.append(self.turn)
        return "".join(char if char == "\n" else _shown(char) for char in "\n".join(lines))

    def render(self):
        """A string ("ansi"), an (H, W, 3) uint8 array ("rgb_array"), or None: in the mode "human"
        every step prints itself."""
        if self.render_mode == "ansi":
            picture = [] if self.picture is None else _half_blocks(np.asarray(self.picture))
            return "\n".join([*picture, self.render_text()])
        if self.render_mode == "rgb_array":
            picture = self.picture or Image.new("RGB", (CELL, CELL), _PAPER)
            scale = max(1, _PICTURE // max(picture.size))
            return np.asarray(
                picture.resize(
                    (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
                )
            )
        return None


# ---------------------------------------------------------------------------------- rendering

# Light and strong Okabe-Ito colours, which all eyes tell apart: light ones as the ground of the
# segments, by turns, and strong ones to underline steps.
_TINTS = ((186, 220, 244), (255, 222, 158), (184, 230, 208), (240, 204, 226))
_PREFIX_TINT = (226, 226, 226)
_PAPER, _INK = (252, 252, 250), (24, 24, 32)
_RIGHT, _WRONG = (0, 114, 178), (213, 94, 0)

# A frame, in pixels: on the left the picture, if there is one, on the right the texts.
_WIDTH, _HEIGHT = 960, 384
_MARGIN = 32
_PICTURE = 320  # edge of the square that the picture is fitted into
_TEXT_LEFT = _MARGIN + _PICTURE + _MARGIN
_TEXT_TOP, _LAST_LINE_TOP, _LINE = 80, 232, 38  # the response; of a long one the last lines show
_LEGEND_TOP = 306


def _pieces(episode):
    """[(tint, shown characters)] of the prefix and of every segment, without the empty ones.

    Control characters are spelled out: a terminal would obey them.
    """
    pieces = [(_PREFIX_TINT, episode.prefix)]
    for i, segment in enumerate(episode.segments):
        pieces.append((_TINTS[i % len(_TINTS)], segment))
    return [(tint, [_shown(char) for char in text]) for tint, text in pieces if text]


def _shown(char):
    return char if char.isprintable() else repr(char)[1:-1]  # without the quotes


def _verdict(episode):
    checks = episode.task.check_steps(episode.example, episode.response)
    if episode.end_reason:
        end = f"ended by {episode.end_reason}, true answer {episode.example.answer}"
    else:
        end = "not finished"
    steps = f"{sum(checks)} of {len(checks)} steps right"
    return f"reward {episode._reward():g}   |   {steps}   |   {end}"


def _as_text(episode):
    """For a terminal: the picture, the question, the response with its segments, the verdict."""
    lines = [] if episode._pixels is None else _half_blocks(episode._pixels)
    lines.append(episode.example.question)
    pieces = []
    for (red, green, blue), shown in _pieces(episode):
        pieces.append(f"\x1b[30;48;2;{red};{green};{blue}m{''.join(shown)}\x1b[0m")
    lines.append("|".join(pieces))
    lines.append(_verdict(episode))
    return "\n".join(lines)


def _half_blocks(pixels):
    """Lines of upper half blocks: each character shows two pixels, one above the other."""
    lines = []
    even = pixels[: len(pixels) // 2 * 2]
    for upper_row, lower_row in zip(even[::2], even[1::2], strict=True):
        blocks = []
        for upper, lower in zip(upper_row, lower_row, strict=True):
            blocks.append("\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*upper, *lower))
        lines.append("".join(blocks) + "\x1b[0m")
    return lines


def _as_frame(episode):
    """The same as a picture, an (H, W, 3) uint8 array; the response's steps are underlined."""
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(canvas)
    font, small_font = ImageFont.load_default(21), ImageFont.load_default(16)
    left = _MARGIN
    if episode.example.image is not None:
        _paste_picture(canvas, episode)
        left = _TEXT_LEFT
    headline, _, _ = episode.example.question.partition("\n")
    pen.text((left, _MARGIN), headline, _INK, font)
    _draw_response(pen, font, left, episode)
    legend = "underlined in blue: a right step, in orange: a wrong one"
    texts = f"{legend}\n{_verdict(episode)}"
    pen.text((left, _LEGEND_TOP), texts, _INK, small_font, spacing=8)
    return np.array(canvas)  # (H, W, 3)


def _paste_picture(canvas, episode):
    is_drawn = episode.task.side > 0  # of cells, whose edges are to stay sharp; not a photograph
    resampling = Image.Resampling.NEAREST if is_drawn else Image.Resampling.BICUBIC
    picture = ImageOps.contain(episode.example.image, (_PICTURE, _PICTURE), resampling)
    canvas.paste(picture, (_MARGIN, _MARGIN))


def _draw_response(pen, font, left, episode):
    letters, last_top = _laid_out(pen, font, left, episode)
    underlines = _underlines(episode)
    scrolled = max(0, last_top - _LAST_LINE_TOP)
    for position, (x, y, right, shown, tint) in enumerate(letters):
        top = y - scrolled
        if top >= _TEXT_TOP:
            underline = underlines.get(position, tint)
            pen.rectangle((x, top, right, top + 26), tint)
            pen.rectangle((x, top + 27, right, top + 30), underline)
            pen.text((x, top), shown, _INK, font)


def _laid_out(pen, font, left, episode):
    """([(left, top, right, shown character, tint)] of the whole response, the last line's top)."""
    x, y = left, _TEXT_TOP
    letters = []
    for tint, characters in _pieces(episode):
        for shown in characters:
            width = pen.textlength(shown, font)
            if x + width > _WIDTH - _MARGIN:
                x = left
                y += _LINE
            letters.append((x, y, x + width, shown, tint))
            x += width
        x += 4  # a gap between segments
    return letters, y


def _underlines(episode):
    """{position in the response: colour} of the characters that belong to a step."""
    spans = episode.task.step_spans(episode.response)
    checks = episode.task.check_steps(episode.example, episode.response)
    colours = {}
    for (start, end), is_right in zip(spans, checks, strict=True):
        for position in range(start, end):
            colours[position] = _RIGHT if is_right else _WRONG
    return colours


# ------------------------------------------------------------------------------- registration


def _register(name, entry_point, **settings):
    if name not in gym.registry:  # Gymnasium warns of a second time
        gym.register(name, entry_point, kwargs=settings)


for _task in TASKS:
    _register(f"SAPO/{_task}-v0", "env:SegmentEnv", task=_task)
for _game in GAMES:
    _register(f"SAPO/{_game}-v0", "env:GameEnv", game=_game)
_register("SAPO/Dataset-v0", "env:DatasetEnv")
_register("SAPO/ReasoningGym-v0", "env:SegmentEnv", task=ReasoningGym)
