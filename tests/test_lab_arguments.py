"""The command lines of lab/: a wrong word is refused in one line, before any work."""

import importlib

import pytest

# {words: the end of the line that refuses them}
ABBREVIATED = {
    "bench --bat=4": "unrecognized arguments: --bat=4",
    "critic --seed 3": "unrecognized arguments: --seed 3",
    "episode a b --fold c": "unrecognized arguments: --fold c",
    "kills --kill 1": "unrecognized arguments: --kill 1",
    "mutants --fold a": "unrecognized arguments: --fold a",
    "soak --minute 5": "unrecognized arguments: --minute 5",
    "theorems sapo:segment_gae --example 3": "unrecognized arguments: --example 3",
    "treasure a --game 3": "unrecognized arguments: --game 3",
    "trl_sapo --ou a.json": "not used by the HfArgumentParser: ['--ou', 'a.json']",
}


def said_by(words, capsys):
    """The last line with which a command refuses some words."""
    name, *words = words.split()
    with pytest.raises(SystemExit) as refused:
        importlib.import_module(f"lab.{name}").main(words)
    code = refused.value.code
    assert code not in (0, None)
    said = capsys.readouterr().err if code == 2 else str(code)
    assert code == 2 or "\n" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(("words", "line"), ABBREVIATED.items(), ids=ABBREVIATED)
def test_a_flag_is_not_guessed_from_its_beginning(words, line, capsys):
    assert said_by(words, capsys).endswith(line)
