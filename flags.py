"""Read the command line. Every error is a ValueError, whose message is one line.

The fields of dataclasses are its flags (transformers.HfArgumentParser), written out in full. Behind
them stands what is asked of single words: a task's keywords, the name of a run, and what a run that
is resumed keeps.
"""

import argparse
import difflib
import json
import math
import os
from dataclasses import fields
from pathlib import Path

import transformers


def given(words, kinds, description) -> dict:
    """{name: value} of the fields of some dataclasses that the command line names, and no others.

    words: as of sys.argv[1:], which None stands for. ValueError for a flag that is unknown, without
    a value, or with one that is not of the field's type. Ranges are not looked at here.
    """
    parser = transformers.HfArgumentParser(
        kinds, description=description, allow_abbrev=False, exit_on_error=False
    )
    meanings = {part.name: part.metadata["help"] for kind in kinds for part in fields(kind)}
    # argparse sets no default where there is a value: what stays None was not given
    unset = argparse.Namespace(**dict.fromkeys(meanings))
    try:
        parsed, unknown = parser.parse_known_args(words, unset)
    except argparse.ArgumentError as error:
        flag = error.argument_name.split("/")[0]  # --max_new_tokens/--max-new-tokens
        meaning = meanings[flag.removeprefix("--")]
        raise ValueError(f"{flag}: {error.message} ({meaning})") from None
    if unknown:
        raise ValueError(f"{unknown[0]}: no flag of this program; {_nearest(unknown[0], meanings)}")
    values = {name: value for name, value in vars(parsed).items() if value is not None}
    for name, value in values.items():
        if value in ("", [], [""]):  # --resume "$unset", --batch=--
            raise ValueError(f"--{name}: it has no value ({meanings[name]})")
    return values


def one_line(message) -> str:
    """A message in one line of characters that show: others, as a newline in a word that it
    repeats, are written as Python would."""
    shown = (c if c.isprintable() else ascii(c).strip("'") for c in str(message).strip())
    return "".join(shown)


def _nearest(word, names):
    """What somebody may have meant who wrote a flag that there is not."""
    name = word.split("=")[0].strip("-").replace("-", "_")
    longer = [known for known in names if name and name in known]  # lr: actor_lr, critic_lr
    near = longer or difflib.get_close_matches(name, names)
    if word.startswith("--") and near:
        return f"did you mean {' or '.join(f'--{known}' for known in near[:3])}?"
    return "--help names them all"


# --------------------------------------------------------------------------- a task's keywords


def value_of(name, word):
    """The value of a task's keyword: as in JSON, or else the word itself. ValueError for NaN and
    infinity, which no task takes."""
    try:
        value = json.loads(word)
    except ValueError:
        value = word
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    if is_infinite or word.lower().strip("+-") in ("nan", "inf", "infinity"):
        raise ValueError(f"{name}={word}: expected a finite number")
    return value


# ----------------------------------------------------------------------- a run that is resumed

# What --resume may not change: with another value it would be another run, the weights would not
# fit, examples would be asked again, or before and after would be of other questions. Not `model`:
# its folder may have moved
FIXED = (
    *("method", "credit", "critic", "critic_hears", "lora", "env", "env_args", "seed", "name"),
    *("batch", "group", "branching", "eval_episodes"),
)
# The same of a run that rests on its warm start: under LoRA's adapters, or as a KL penalty's
# reference. Whether another --model has the same weights is seen when they are there
OF_THE_START = ("warm_start_steps", "warm_start_batch", "warm_start_lr", "habits", "error_rate")


def is_same(name, given, stored) -> bool:
    """Is a setting what it was? A task's keywords may come in another order, and its data may have
    moved: a keyword named path, eval_path and the like."""
    if name != "env_args":
        return given == stored

    def keywords(words):
        pairs = (word.split("=", 1) for word in words if "=" in word)
        return {key: value_of(key, value) for key, value in pairs if "path" not in key}

    return keywords(given) == keywords(stored)


def check_resumed(settings, config, stored) -> None:
    """ValueError for a setting that a run's --resume must not change."""
    rests_on_start = settings.model == "tiny" and (settings.lora or config.kl_coef)
    for name in FIXED + (OF_THE_START if rests_on_start else ()):
        given = getattr(settings, name)
        if name in stored and not is_same(name, given, stored[name]):
            raise ValueError(
                f"--{name}: {given!r}, but the run of --resume {settings.resume} has "
                f"{stored[name]!r}, and that cannot change; leave the flag out, or begin a new run"
            )


# -------------------------------------------------------------------------------- a run's name


def default_name(settings) -> str:
    """A run's name, from what makes it: DiceSum-sapo-topk-n=9-seed0."""
    task = settings.env.split("/")[-1].split("-")[0]  # SAPO/DiceSum-v0 -> DiceSum
    words = [task, settings.method, settings.cut, *settings.env_args, f"seed{settings.seed}"]
    return "-".join(words).replace("/", "_")


def check_folder(settings) -> None:
    """ValueError for a --runs or a --name that gives a new run no folder of its own within --runs.
    Of a run that is resumed the folder is there, whatever its name."""
    named = {"--runs": settings.runs}
    if not settings.resume:
        named["--name"] = settings.name
    for flag, word in named.items():
        if not word or not word.isprintable() or word != word.strip():
            raise ValueError(
                f"{flag} {word!r}: expected the name of a folder, in characters that show and "
                "without blanks around it"
            )
    if settings.resume:
        return
    parts = Path(settings.name).parts
    if Path(settings.name).is_absolute() or ".." in parts or parts[:1] in ((), ("cache",)):
        raise ValueError(f"--name {settings.name}: expected a folder within --runs, not its cache")
    if any(len(os.fsencode(part)) > 200 for part in parts):
        raise ValueError(
            f"--name {settings.name:.40}...: longer than 200 bytes; give a shorter one"
        )
