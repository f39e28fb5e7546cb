"""train.py's command line: every flag, the defaults of a method, what a resumed run takes over."""

import argparse
import inspect
import json
import typing
from dataclasses import asdict, fields
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from small_runs import parsed, resumed, rows_of, without_times

import baselines
import checkpoint
import sapo
import train
from tasks import TASKS

EVERY_FIELD = [*fields(train.Settings), *fields(sapo.SAPOConfig)]


def as_dict(settings, config):
    return asdict(settings) | asdict(config)


# ------------------------------------------------------------------------------------- ranges
RANGED = [field for field in EVERY_FIELD if "; in " in field.metadata["help"]]


def test_every_number_has_a_range():
    numbers = (int, float)
    for cls in (train.Settings, sapo.SAPOConfig):
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            kinds = (hints[field.name], *typing.get_args(hints[field.name]))
            if any(kind in numbers for kind in kinds):
                assert field in RANGED, field.name


@pytest.mark.parametrize("word", ["-1", "nan", "0"])
@pytest.mark.parametrize("field", RANGED, ids=lambda field: field.name)
def test_a_number_outside_its_range_is_refused_in_one_line(field, word, tmp_path):
    within = field.metadata["help"].rpartition("; in ")[2]
    if word == "0" and within.startswith("[0"):
        return
    with pytest.raises(SystemExit) as left:
        train.main([f"--{field.name}", word, "--runs", str(tmp_path)])
    said = left.value.code
    assert f"{field.name}: " in said and "\n" not in said
    assert said.endswith((f"expected a number in {within}", f"in {within})")), "or is no integer"
    assert list(tmp_path.iterdir()) == [], "and nothing was begun"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "nonsense"], "--device nonsense: "),
        (["--device", "meta"], "--device meta: .*meta tensors.*expected cpu, or a card"),
        (["--temperature", "1e39"], r"temperature: 1e\+39, expected a number in \[0.01, 100\]"),
        (["--temperature", "1e-40"], r"temperature: 1e-40, expected a number in \[0.01, 100\]"),
        (["--warm_start_lr", "1e10"], "warm_start_lr: 10000000000.0, expected a number"),
        (["--seed", str(2**65)], f"seed: {2**65}, expected a number in"),
        (["--role_temperature", "1e-320"], "role_temperature: 1e-320, expected .* 32 bits hold"),
        (["--loss_below", "1e-320"], "loss_below: 1e-320, expected .* 32 bits hold"),
        (["--warm_start_steps", str(2**63)], f"warm_start_steps: {2**63}, .* 32 bits hold"),
        (["--group", str(2**63)], f"group: {2**63}, .* 32 bits hold"),
        (["--batch", "65537"], r"batch: 65537, expected a number in \[1, 65536\]"),
        (["--batch", str(2**31 - 1)], rf"batch: {2**31 - 1}, expected a number in \[1, 65536\]"),
        (["--warm_start_batch", "65537"], "warm_start_batch: 65537, expected a number"),
        (["--continuations", "65537"], "continuations: 65537, expected a number"),
        (["--lora", "65537"], "lora: 65537, expected a number"),
        (["--max_new_tokens", "1048577"], "max_new_tokens: 1048577, expected a number"),
        (["--eval_episodes", "1048577"], "eval_episodes: 1048577, expected a number"),
        (["--env_args", "format_reward=nan"], "format_reward=nan: expected a finite number"),
        (["--env_args", "format_reward=-Infinity"], "format_reward=-Infinity: expected a finite"),
        (["--env_args", "format_reward=inf"], "format_reward=inf: expected a finite number"),
        (["--env_args", "format_reward=1e400"], "format_reward=1e400: expected a finite number"),
        (["--name", "a\0b"], r"--name 'a\\x00b': expected the name of a folder"),
        (["--env", "CartPole-v1"], "--env CartPole-v1 .*its actions are no segments of text"),
        (["--env_args", "n=1"], "DiceSum.n=1.*too small"),
        (["--name", "../elsewhere"], "expected a folder within --runs"),
        (["--name", "/elsewhere"], "expected a folder within --runs"),
        (["--name", "cache/it"], "not its cache"),
        (["--name", "."], "expected a folder within --runs"),
        (["--name", "é" * 101], "--name .*longer than 200 bytes"),
        (["--env_args", f"path={'long' * 50}"], "--name .*longer than 200 bytes; give a shorter"),
    ],
)
def test_what_cannot_work_is_refused_before_any_long_work(flags, said, tmp_path):
    with pytest.raises(SystemExit, match=f"^train.py: .*{said}"):
        train.main([*flags, "--runs", str(tmp_path)])
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_runs_that_is_none_is_named():
    with pytest.raises(SystemExit, match="^train.py: --runs '.*': expected the name of a folder"):
        train.main(["--runs", "a\0b"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_a_card_that_is_not_here_is_named(tmp_path):
    with pytest.raises(SystemExit, match="^train.py: --device cuda: .*expected cpu, or a card"):
        train.main(["--device", "cuda", "--runs", str(tmp_path)])


def test_settings_of_the_algorithm_are_checked_without_a_command_line_too():
    with pytest.raises(ValueError, match=r"lam: 2, expected a number in \[0, 1\]"):
        sapo.SAPOConfig(lam=2)


# -------------------------------------------------------------------------------------- flags


def test_help_names_and_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")  # argparse would break the lines
    with pytest.raises(SystemExit) as left:
        train.parse(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "Train a vision-language model with SAPO" in shown
    for field in EVERY_FIELD:
        assert f"--{field.name} " in shown and field.metadata["help"] in shown, field.name


def examples_of(name, hint):
    """(what to write behind --name, what must arrive) for a field of that type."""
    if typing.get_origin(hint) is typing.Literal:
        return [([choice], choice) for choice in typing.get_args(hint)]
    if hint is bool:
        return [([], True), (["false"], False)]
    if hint == list[str]:
        return [(["n=9", "grid=5"], ["n=9", "grid=5"])]
    if hint == list[int]:
        return [(["6", "2"], [6, 2])]
    number = 1.25 if name == "dual_clip" else 0.25  # within its range
    for kind, word, value in ((int, "7", 7), (float, str(number), number), (str, "abc", "abc")):
        if kind is hint or kind in typing.get_args(hint):
            return [([word], value)]
    raise TypeError(f"{name}: no example for {hint}")


def examples():
    """(name, words, value) for every field but --resume, which wants a run."""
    for cls in (train.Settings, sapo.SAPOConfig):
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            if field.name != "resume":
                for words, value in examples_of(field.name, hints[field.name]):
                    yield field.name, words, value


@pytest.mark.parametrize(
    "name, words, expected", list(examples()), ids=lambda value: str(value)[:20]
)
def test_every_flag_parses_and_changes_nothing_else(name, words, expected):
    default = as_dict(*train.parse([]))
    values = as_dict(*train.parse([f"--{name}", *words]))
    assert values[name] == expected and type(values[name]) is type(expected)
    changed = {key for key, value in values.items() if value != default[key]}
    presets = baselines.SETTINGS["sapo"] | baselines.SETTINGS.get(values["method"], {})
    assert changed <= {name, "name", *presets}  # the run's folder is named after some settings


def test_no_flags_are_the_documented_defaults():
    settings, config = train.parse([])
    assert (settings.method, settings.cut) == ("sapo", "topk")
    assert (settings.env, settings.model) == ("SAPO/DiceSum-v0", "tiny")
    assert config == sapo.SAPOConfig(**baselines.SETTINGS["sapo"])
    assert settings.name == "DiceSum-sapo-topk-seed0"


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "reinforce"],
        ["--cut", "never"],
        ["--batch", "many"],
        ["--nope", "1"],
        ["--ratio", "word"],
    ],
)
def test_what_does_not_parse_is_refused_by_name(flags, capsys):
    with pytest.raises(SystemExit, match=f"^train.py: {flags[0]}: ") as left:
        train.main(flags)
    assert "\n" not in left.value.code and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["\udcff", " ", "a ", "a\nb", "a/\tb", "\x1b[2J", "a\u200bb"])
def test_a_name_that_does_not_show_or_cannot_be_written_is_refused(name, tmp_path):
    with pytest.raises(SystemExit, match="^train.py: --name '.*': expected the name") as left:
        train.main(["--name", name, "--runs", str(tmp_path)])
    assert left.value.code.isprintable() and list(tmp_path.iterdir()) == []


def test_a_name_may_be_of_any_language_and_lie_in_folders():
    assert train.parse(["--name", "étude/長い 名前"])[0].name == "étude/長い 名前"


@pytest.mark.parametrize("flag", ["device", "env", "env_args", "model", "resume", "cut", "zzz"])
def test_a_word_of_two_lines_is_repeated_in_one(flag, tmp_path):
    with pytest.raises(SystemExit, match=r"^train.py: .*a\\nb") as left:
        train.main([f"--{flag}=a\nb", "--runs", str(tmp_path)])
    assert left.value.code.isprintable()


@pytest.mark.parametrize("name", [field.name for field in EVERY_FIELD if field.type is not bool])
@pytest.mark.parametrize("kind", ["nothing", "no word"])
def test_a_flag_without_a_value_is_named(name, kind):
    """--resume "$unset" begins no new run, and argparse makes [] of --batch=--."""
    argparse_keeps = argparse.ArgumentParser()
    argparse_keeps.add_argument("--flag")
    if kind == "no word" and argparse_keeps.parse_args(["--flag=--"]).flag == "--":
        pytest.skip("in this version of Python it is a word")
    word = "" if kind == "nothing" else "--"
    with pytest.raises(SystemExit, match=f"^train.py: (--)?{name}: .*") as left:
        train.main([f"--{name}={word}"])
    assert "\n" not in left.value.code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--batch", "x"],
            r"--batch: invalid int value: 'x' \(responses per rollout; in \[1, 65536\]",
        ),
        (["--max_new_tokens", "x"], r"--max_new_tokens: invalid int .* \(longest response, in tok"),
        (["--batch"], r"--batch: expected one argument \(responses"),
        (["--ratio", "word"], "--ratio: invalid choice: 'word' .*'product'.*importance"),
        (["--lr", "1"], "--lr: no flag of this program; did you mean .*--actor_lr or --critic_lr"),
        (["--actor-rl=1"], "--actor-rl=1: no flag of this program; did you mean --actor_lr"),
        (["--tok", "5"], "--tok: no flag of this program; did you mean .*--token_budget"),
        (["--seeds", "5"], "--seeds: no flag of this program; did you mean --seed"),
        (["--zzz"], "--zzz: no flag of this program; --help names them all"),
        (["--seed", "1", "2"], "2: no flag of this program; --help names them all"),
        (["--model", ""], r"--model: it has no value \('tiny', or a checkpoint"),
        (["--resume", ""], r"--resume: it has no value \(folder of a run to continue"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_word_that_is_wrong_is_one_line_with_what_to_write(words, said):
    with pytest.raises(SystemExit, match=f"^train.py: {said}") as left:
        train.main(words)
    assert "\n" not in left.value.code and len(left.value.code) < 300


@pytest.mark.parametrize("method", baselines.SETTINGS)
def test_a_method_sets_its_presets_and_explicit_flags_win(method):
    _, config = train.parse(["--method", method])
    presets = {
        name: value for name, value in baselines.SETTINGS[method].items() if name in asdict(config)
    }
    assert asdict(config) == asdict(sapo.SAPOConfig()) | presets
    expected = asdict(sapo.SAPOConfig()) | presets | {"lam": 0.5, "ratio": "segment"}
    for flags in (
        ["--method", method, "--lam", "0.5", "--ratio", "segment"],
        ["--lam=0.5", "--ratio=segment", f"--method={method}"],
    ):
        _, config = train.parse(flags)
        assert asdict(config) == expected


def test_runs_of_different_settings_get_different_folders():
    variants = [
        [],
        ["--method", "ppo"],
        ["--cut", "causal"],
        ["--seed", "1"],
        ["--env_args", "n=9"],
        ["--env", "SAPO/TextSum-v0"],
    ]
    assert len({train.parse(flags)[0].name for flags in variants}) == len(variants)
    assert train.parse(["--name", "mine", "--seed", "3"])[0].name == "mine"
    assert "/" not in train.parse(["--env_args", "path=folder/mine.parquet"])[0].name


# ----------------------------------------------------------------------------------- resuming


def write_config(folder, settings, config):
    stored = {"settings": asdict(settings), "config": asdict(config)}
    checkpoint.write_json(folder / "config.json", stored)


INFINITE = [part.name for part in EVERY_FIELD if part.metadata["help"].endswith("inf]")]


@pytest.mark.parametrize("written_as", ["inf", "Infinity"])
def test_infinity_is_restored_from_its_word_and_from_what_earlier_versions_wrote(
    tmp_path, written_as
):
    """And a name that is that word stays a name."""
    flags = [word for name in INFINITE for word in (f"--{name}", "inf")]
    first = train.parse([*flags, "--name", "inf"])
    write_config(tmp_path, *first)
    if written_as == "Infinity":
        stored = {"settings": asdict(first[0]), "config": asdict(first[1])}
        (tmp_path / "config.json").write_text(json.dumps(stored))
    assert (tmp_path / "config.json").read_text().count(written_as) >= len(INFINITE)
    again = as_dict(*train.parse(["--resume", str(tmp_path)]))
    assert again == as_dict(*first) | {"resume": str(tmp_path)}
    assert {type(again[name]) for name in INFINITE} == {float} and again["name"] == "inf"


def test_resuming_takes_the_runs_own_settings_and_flags_beside_it_win(tmp_path):
    flags = ["--method", "ppo", "--env_args", "n=9", "--seed", "3", "--clip_high", "0.3"]
    first = train.parse([*flags, "--iterations", "9"])
    write_config(tmp_path, *first)
    again = train.parse(["--resume", str(tmp_path)])
    assert as_dict(*again) == as_dict(*first) | {"resume": str(tmp_path)}
    longer = train.parse(["--iterations", "20", "--resume", str(tmp_path), "--clip_high", "0.2"])
    assert as_dict(*longer) == as_dict(*again) | {"iterations": 20, "clip_high": 0.2}


@pytest.mark.parametrize(
    ("flags", "was"),
    [
        (["--method", "grpo"], "'sapo'"),
        (["--credit", "group"], "'critic'"),
        (["--critic", "shared"], "'separate'"),
        (["--critic_hears", "nothing"], "'logp'"),
        (["--lora", "4"], "0"),
        (["--env", "SAPO/DiceSum-v0"], "'SAPO/TextSum-v0'"),
        (["--env_args", "n=4"], r"\['n=1', 'largest=99'\]"),
        (["--seed", "7"], "0"),
        (["--name", "other"], "'fixed'"),
        (["--batch", "32"], "16"),
        (["--group", "4"], "8"),
        (["--branching", "2", "2"], r"\[4, 4, 4\]"),
        (["--eval_episodes", "9"], "8"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_what_a_run_is_does_not_change_where_it_is_resumed(tmp_path, runs, flags, was):
    write_config(tmp_path, *parsed(runs, "--name", "fixed"))
    said = f"^{flags[0]}: .*{flags[1]}.*, but the run of --resume {tmp_path} has {was}, and that"
    with pytest.raises(ValueError, match=said):
        train.parse(["--resume", str(tmp_path), *flags])
    stored = parsed(runs, "--name", "fixed")[0]
    same = getattr(stored, flags[0].strip("-"))  # who repeats it changes nothing
    words = [str(part) for part in (same if isinstance(same, list) else [same])]
    again, _ = train.parse(["--resume", str(tmp_path), flags[0], *words])
    assert asdict(again) == asdict(stored) | {"resume": str(tmp_path)}


def test_a_task_is_the_same_in_another_order_and_where_its_data_and_model_have_moved(
    tmp_path, runs
):
    stored = ["--env_args", "n=1", "largest=99", "path=/old/a", "--model", "/old/model"]
    write_config(tmp_path, *parsed(runs, "--name", "fixed", *stored))
    moved = ["--env_args", "largest=99", "path=/new/a", "n=1", "--model", "/new/model"]
    settings, _ = train.parse(["--resume", str(tmp_path), *moved])
    assert settings.env_args == moved[1:4] and settings.model == "/new/model"
    with pytest.raises(ValueError, match="^--env_args: .* that cannot change"):
        train.parse(["--resume", str(tmp_path), "--env_args", "largest=98", "n=1"])


def test_the_length_of_a_name_is_of_no_matter_where_its_run_is_resumed(tmp_path, runs):
    write_config(tmp_path, *parsed(runs, "--name", "n" * 200))
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["settings"]["name"] = "n" * 201  # from before names were bounded
    (tmp_path / "config.json").write_text(json.dumps(stored))
    settings, _ = train.parse(["--resume", str(tmp_path)])
    assert settings.name == "n" * 201


def test_resuming_a_folder_that_is_no_run_says_so(tmp_path):
    said = f"^--resume {tmp_path}/nowhere: no config.json there; give the folder of a run"
    with pytest.raises(ValueError, match=said):
        train.parse(["--resume", str(tmp_path / "nowhere")])


def test_resuming_a_run_without_a_checkpoint_says_so(tmp_path, runs):
    write_config(tmp_path, *parsed(runs))
    with pytest.raises(ValueError, match="no checkpoint there yet"):
        resumed(tmp_path)
    with pytest.raises(SystemExit, match="no checkpoint there yet"):
        train.main(["--resume", str(tmp_path)])


# ---------------------------------------------------------------------------- the environment


@pytest.mark.parametrize("args", [["n"], ["n=abc"], ["n=9", "largest"], ["n="], ["9"]])
def test_env_args_that_are_no_pairs_say_so_in_one_line(args):
    settings, _ = train.parse(["--env_args", *args])
    with pytest.raises(ValueError) as refused:
        train.make_env(settings)
    message = str(refused.value)
    assert " ".join(args) in message and "n=9" in message and "\n" not in message


@pytest.mark.parametrize(
    "args, named", [(["n=99"], "n=99"), (["n=2.5"], "n=2.5"), (["foo=3"], "foo")]
)
def test_env_args_that_the_task_refuses_are_named(args, named):
    settings, _ = train.parse(["--env_args", *args])
    with pytest.raises(ValueError, match=named):
        train.make_env(settings)


@pytest.mark.parametrize("pair", ["max_episode_steps=1", "render_mode=human", "id=3"])
def test_keywords_of_gymnasium_are_none_of_the_task(pair):
    """With max_episode_steps=1 each episode ended at its first segment, and nothing was right."""
    settings, _ = train.parse(["--env_args", pair])
    said = f"--env_args {pair}: .*{pair.split('=')[0]} is no keyword of a task; leave it out"
    with pytest.raises(ValueError, match=said):
        train.make_env(settings)


def test_all_keywords_of_gymnasium_are_known():
    own = inspect.signature(gym.make).parameters.keys() - {"kwargs"}
    assert own == train.NOT_OF_THE_TASK - {"render_mode"}


def test_env_args_reach_the_task():
    settings, _ = train.parse(["--env", "SAPO/ArrowPath-v0", "--env_args", "length=12", "grid=5"])
    task = train.make_env(settings).unwrapped.task
    assert (task.length, task.grid) == (12, 5)


@pytest.mark.parametrize(
    ("flags", "habits"),
    [
        (["--habits", "0.25"], 0.25),
        (["--habits", "0"], 0.0),
        (["--habits", "0.25", "--env_args", "habits=0.5"], 0.5),
        (["--env_args", "habits=0"], 0),
        ([], train.Settings().habits),
    ],
)
@pytest.mark.parametrize("env", [*(f"SAPO/{name}-v0" for name in TASKS), "env:SAPO/DiceSum-v0"])
def test_habits_reach_every_task_that_demonstrates(env, flags, habits):
    """By their own flag, unless --env_args names them."""
    if "DigitSum" in env:
        pytest.importorskip("sklearn", reason="needs scikit-learn")
    settings, _ = train.parse(["--env", env, *flags])
    assert train.make_env(settings).unwrapped.task.habits == habits


def test_habits_that_are_no_share_are_named():
    with pytest.raises(ValueError, match="habits: 2.0"):
        train.make_env(train.parse(["--habits", "2"])[0])


@pytest.mark.parametrize("env", ["SAPO/Dataset-v0", "Foreign-v0", "env:Foreign-v0"])
def test_an_environment_that_demonstrates_nothing_gets_no_habits(monkeypatch, env):
    """It might refuse them."""
    monkeypatch.setitem(gym.registry, "Foreign-v0", EnvSpec("Foreign-v0", "foreign:Env"))
    made = []

    def make(*args, **named):
        made.append((args, named))
        return SimpleNamespace(unwrapped=SimpleNamespace(task=None))

    monkeypatch.setattr(gym, "make", make)
    train.make_env(train.parse(["--env", env, "--env_args", "path=x"])[0])
    assert made == [((env,), {"disable_env_checker": True, "path": "x"})]


def test_a_module_that_registers_its_game_on_import_is_imported_first(tmp_path, monkeypatch):
    line = 'gymnasium.register("Late-v0", "env:GameEnv", kwargs={"game": "Treasure"})'
    (tmp_path / "late_game.py").write_text(f"import gymnasium\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(gym.registry, "Late-v0", raising=False)
    made = train.make_env(train.parse(["--env", "late_game:Late-v0", "--habits", "0.25"])[0])
    assert made.unwrapped.task.game.habits == 0.25


# --------------------------------------------------------------------- one line for bad input


@pytest.mark.parametrize("which", ["nowhere", "file", "empty"])
@pytest.mark.parametrize("flags", [[], ["--lora", "2"], ["--kl_coef", "1"]], ids=str)
def test_a_model_that_does_not_open_is_named_with_its_flag(tmp_path, which, flags, offline):
    (tmp_path / "file").write_text("weights")
    (tmp_path / "empty").mkdir()
    model = str(tmp_path / which)
    line = f"--model {model}: .*; give one that transformers opens as an image-text-to-text model"
    with pytest.raises(SystemExit, match=f"^train.py: {line}$") as left:
        train.main(["--model", model, *flags, "--runs", str(tmp_path / "runs")])
    assert left.value.code.isprintable()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "nowhere"], "neither a folder nor a hub name"),
        (["--env", "SAPO/Nothing-v0"], "expected a known id"),
        (["--env_args", "n=99"], "n=99"),
        (["--method", "grpo", "--batch", "20", "--group", "8"], "--group"),
    ],
    ids=["model", "id", "keyword", "group"],
)
def test_what_is_wrong_with_the_input_is_one_line(tmp_path, flags, said):
    with pytest.raises(SystemExit) as left:
        train.main([*flags, "--runs", str(tmp_path)])
    assert said in str(left.value) and "\n" not in str(left.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--method", "spo-tree", "--branching", "2", "2", "--max_new_tokens", "10"],
            r"branching: \[2, 2\], segment_tokens: 10; .* within max_new_tokens=10",
        ),
        (
            ["--method", "spo-tree", "--branching", "1", "1"],
            "--branching 1 1: no node has two children",
        ),
        (["--minibatch", "256"], "--minibatch 256: above --batch 128"),
        (["--micro_batch", "33"], "--micro_batch 33: above the 32 responses of a minibatch"),
        (
            ["--value_pretraining", "11", "--iterations", "10"],
            "--value_pretraining 11: not below --iterations 10",
        ),
        (
            ["--value_pretraining", "2", "--iterations", "2"],
            "--value_pretraining 2: not below --iterations 2",
        ),
        (
            ["--method", "grpo", "--group", "4", "--value_pretraining", "2"],
            "--value_pretraining 2: --credit group has no critic",
        ),
        (
            ["--method", "vc-ppo", "--credit", "continuations"],
            "--value_pretraining 5: --credit continuations has no critic",
        ),
        (
            ["--method", "vineppo", "--value_at", "end"],
            "--value_at end: --credit continuations samples values at the starts",
        ),
        (["--env_args", "n=9", "n=4"], "--env_args n=9 n=4: .*a name stands there twice"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_contradict_each_other_are_refused_before_any_work(tmp_path, flags, said):
    with pytest.raises(SystemExit, match=f"^train.py: .*{said}"):
        train.main([*flags, "--runs", str(tmp_path)])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "8"],  # a minibatch that nobody chose is all of it
        ["--method", "vc-ppo", "--iterations", "2"],
        ["--value_pretraining", "2", "--iterations", "3"],
        ["--value_pretraining", "2", "--iterations", "0"],  # nothing is to learn
        ["--method", "spo-tree", "--branching", "1", "2"],
        ["--branching", "1", "1"],  # of a tree that does not grow
        ["--branching", "9", "9", "--max_new_tokens", "4"],
    ],
    ids=lambda flags: flags[-1],
)
def test_what_nobody_asked_for_contradicts_nothing(flags):
    baselines.check_numbers(*train.parse(flags))


# What to give beside a method so that its parts fit a batch of 16, and other values of all settings
# that may be unread
FITTING = {"group": "4", "branching": "2 2", "segment_tokens": "2", "continuations": "2"}
OTHER = {
    **{"lam": "0.1", "gamma": "0.2", "value_at": "end", "critic_lam": "0.3", "critic_lr": "0.5"},
    **{"critic_hears": "nothing", "value_clip": "0.01", "value_coef": "9", "critic": "shared"},
    **{"top_k": "0.9", "segment_tokens": "3", "group": "8", "role_temperature": "0.1"},
    **{"continuations": "3", "loss_below": "0.2", "branching": "2 3", "tree_advantage": "grpo"},
}


@pytest.mark.parametrize(
    "flags", ["--method grpo", "--method spo-chain", "--method spo-tree", "--method ppo --lora 1"]
)
def test_what_is_said_to_be_unread_changes_nothing(runs, flags):
    """To the last digit of the metrics of two iterations."""
    if "lora" in flags:
        pytest.importorskip("peft", reason="LoRA needs peft")

    def rows(name, words):
        run = train.build(*parsed(runs, "--name", name, "--iterations", "2", *words))
        run.settings.eval_every = 9
        assert train.train(run)
        return run, without_times(rows_of(run.folder / "metrics.jsonl"))

    words = [*flags.split(), *as_flags(FITTING)]
    run, plain = rows("as-it-is", words)
    unread = baselines.unread(run.settings, run.config)
    assert unread and set(unread) <= OTHER.keys()
    changed = as_flags({name: OTHER[name] for name in unread})
    assert rows("of-other-values", [*words, *changed])[1] == plain


def as_flags(values):
    return [word for name, value in values.items() for word in (f"--{name}", *value.split())]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method grpo --lam 0.9 --top_k 0.2", "not read by --method grpo: --lam, --top_k"),
        ("--group 4", "not read by --method sapo: --group"),
        ("--lora 4 --critic shared", "not read by --lora 4: --critic"),
        ("--cut turn --top-k 0.2", "not read by --cut turn: --top_k"),
        ("--model m --habits 0.5", "not read by --model m: --habits"),
        ("--method spo-chain --lam 0.5 --gamma 0.9 --loss_below 0.5", ""),
        ("--method spo-tree --segment_tokens 4 --cut token", ""),
        ("--method vc-ppo --critic_lam 1 --critic shared --warm_start_steps 5", ""),
        ("", ""),
    ],
)
def test_flags_that_nothing_reads_are_noted(words, said):
    settings, config = train.parse(words.split())
    assert baselines.note(settings, config, train.given_flags(words.split())) == said


def test_the_warm_start_is_not_read_where_a_run_goes_on_without_it(tmp_path, runs):
    for flags, said in (([], ["habits"]), (["--kl_coef", "0.1"], []), (["--lora", "2"], [])):
        write_config(tmp_path, *parsed(runs, *flags))
        unread = baselines.unread(*train.parse(["--resume", str(tmp_path)]))
        assert [name for name in unread if name == "habits"] == said


def test_a_note_stands_before_the_work_and_refuses_nothing(tmp_path, capsys, monkeypatch):
    class Begun(Exception):
        pass

    def stop_here(*_):
        raise Begun

    monkeypatch.setattr(train, "build", stop_here)
    with pytest.raises(Begun):
        train.main(["--group", "4", "--runs", str(tmp_path)])
    assert capsys.readouterr().out == "not read by --method sapo: --group\n"


def test_one_environment_is_enough_to_refuse_what_does_not_fit(runs, monkeypatch):
    made, make_env = [], train.make_env

    def counted(settings):
        made.append(settings)
        return make_env(settings)

    monkeypatch.setattr(train, "make_env", counted)
    with pytest.raises(ValueError, match="--batch 65535: --credit group needs a multiple"):
        train.build(*parsed(runs, "--method", "grpo", "--batch", "65535"))
    assert len(made) == 1


def test_srpo_without_a_picture_says_so(runs):
    flags = ["--name", "blind", "--method", "srpo", "--group", "4"]
    with pytest.raises(ValueError, match="SAPO/TextSum-v0 has no picture.*--method grpo"):
        train.build(*parsed(runs, *flags))


def test_a_batch_that_is_no_multiple_of_the_group_is_refused_before_training(runs):
    flags = ["--name", "uneven", "--method", "grpo", "--batch", "20", "--group", "8"]
    with pytest.raises(ValueError, match="group"):
        train.build(*parsed(runs, *flags))


def test_without_tensorboard_one_line_says_what_to_install(runs, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as refused:
        train.build(*parsed(runs, "--name", "board-missing", "--tensorboard"))
    assert "pip install tensorboard" in str(refused.value) and "\n" not in str(refused.value)
