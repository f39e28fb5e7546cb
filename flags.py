"""The words of a command line, and what they set. Whatever is wrong with one is one line.

The fields of dataclasses are its flags (transformers.HfArgumentParser), written out in full.
"""

import argparse
import difflib
from dataclasses import fields

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
