"""train.py through real models and environments: the command line, the cache, checkpoints, resuming, one short run."""

import base64
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import baselines
import env
import figures
import sapo
import train
import vlm

ROOT = Path(__file__).parents[1]
# One number to copy, "Add 37." -> "<think></think><answer>37</answer>", and half the demonstrations are wrong: the
# cheapest task that a tiny model learns in seconds, with room left for RL.
TASK = ["--env", "SAPO/TextSum-v0", "--env_args", "n=1", "largest=99", "--max_new_tokens", "16",
        "--error_rate", "0.5", "--warm_start_steps", "150", "--warm_start_batch", "64"]
SHORT = [*TASK, "--batch", "16", "--eval_episodes", "16", "--actor_lr", "1e-3", "--minibatch", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for the whole file, so that all of it shares one warm start (about ten seconds)."""
    folder = tmp_path_factory.mktemp("runs")
    train.cached_warm_start(train.parse([*TASK, "--runs", str(folder)])[0])
    return folder


def build(runs, *flags):
    return train.build(*train.parse([*SHORT, "--runs", str(runs), *flags]))


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(rows):
    return [{k: x for k, x in row.items() if k != "seconds"} for row in rows]


def equal(a, b):
    """Bit for bit, through dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def state(folder):
    """Everything in a run's checkpoint that is not a time."""
    saved = torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)
    saved["progress"] = {k: x for k, x in saved["progress"].items() if not k.endswith("seconds")}
    return {**saved, "policy": vlm.load(folder / "checkpoint").model.state_dict()}


def assert_same_run(one, other):
    a, b = state(one), state(other)
    for part in a.keys() | b.keys():
        assert equal(a[part], b[part]), part
    assert without_times(rows_of(one / "metrics.jsonl")) == without_times(rows_of(other / "metrics.jsonl"))
    assert rows_of(one / "samples.jsonl") == rows_of(other / "samples.jsonl")


# ---------------------------------------------------------------------------------------------------- the command line
EVERY_FIELD = [*fields(train.Settings), *fields(sapo.SAPOConfig)]


def test_help_names_and_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")  # argparse would break the lines
    with pytest.raises(SystemExit) as left:
        train.parse(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "Train a vision-language model with SAPO" in shown
    for field in EVERY_FIELD:
        assert f"--{field.name} " in shown and field.metadata["help"] in shown, field.name


def examples():
    """(name, what to write on the command line, what must arrive) for every field but --resume, which wants a run."""
    for cls in (train.Settings, sapo.SAPOConfig):
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            hint = hints[field.name]
            if field.name == "resume":
                continue
            if typing.get_origin(hint) is typing.Literal:
                for choice in typing.get_args(hint):
                    yield field.name, [choice], choice
            elif hint is bool:
                yield field.name, [], True
                yield field.name, ["false"], False
            elif hint == list[str]:
                yield field.name, ["n=9", "grid=5"], ["n=9", "grid=5"]
            elif hint == list[int]:
                yield field.name, ["6", "2"], [6, 2]
            else:
                kind = next(t for t in (int, float, str) if t is hint or t in typing.get_args(hint))
                yield field.name, [{int: "7", float: "0.25", str: "abc"}[kind]], {int: 7, float: 0.25, str: "abc"}[kind]


@pytest.mark.parametrize("name, written, expected", list(examples()), ids=lambda x: str(x)[:20])
def test_every_flag_parses_and_changes_nothing_else(name, written, expected):
    plain = [asdict(x) for x in train.parse([])]
    found = [asdict(x) for x in train.parse([f"--{name}", *written])]
    values = found[0] | found[1]
    assert values[name] == expected and type(values[name]) is type(expected)
    changed = {k for k, x in values.items() if x != (plain[0] | plain[1])[k]}
    presets = baselines.SETTINGS.get(values["method"], {})
    assert changed <= {name, "name", *presets}  # the run's folder is named after some settings


def test_no_flags_are_the_documented_defaults():
    settings, config = train.parse([])
    assert (settings.method, settings.cut, settings.env, settings.model) == ("sapo", "topk", "SAPO/DiceSum-v0", "tiny")
    assert config == sapo.SAPOConfig() and settings.name == "DiceSum-sapo-topk-seed0"


@pytest.mark.parametrize("flags", [["--method", "reinforce"], ["--cut", "never"], ["--batch", "many"], ["--nope", "1"],
                                   ["--ratio", "word"]])
def test_what_does_not_parse_is_refused_by_name(flags, capsys):
    with pytest.raises((SystemExit, ValueError)) as left:
        train.parse(flags)
    assert flags[0].strip("-") in capsys.readouterr().err + str(left.value)


@pytest.mark.parametrize("method", baselines.SETTINGS)
def test_a_method_sets_its_presets_and_explicit_flags_win(method):
    _, config = train.parse(["--method", method])
    presets = {k: x for k, x in baselines.SETTINGS[method].items() if k in asdict(config)}
    assert asdict(config) == asdict(sapo.SAPOConfig()) | presets
    for flags in (["--method", method, "--lam", "0.5", "--ratio", "segment"],
                  ["--lam=0.5", "--ratio=segment", f"--method={method}"]):
        _, config = train.parse(flags)
        assert asdict(config) == asdict(sapo.SAPOConfig()) | presets | {"lam": 0.5, "ratio": "segment"}


def test_runs_of_different_settings_get_different_folders():
    flags = [[], ["--method", "ppo"], ["--cut", "causal"], ["--seed", "1"], ["--env_args", "n=9"],
             ["--env", "SAPO/TextSum-v0"]]
    assert len({train.parse(f)[0].name for f in flags}) == len(flags)
    assert train.parse(["--name", "mine", "--seed", "3"])[0].name == "mine"
    assert "/" not in train.parse(["--env_args", "path=folder/mine.parquet"])[0].name


def test_a_model_that_is_none_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as left:
        train.main(["--model", "nowhere", "--runs", str(tmp_path)])
    assert "neither a folder nor a hub name" in str(left.value) and "\n" not in str(left.value)


def test_resuming_takes_the_runs_own_settings_and_flags_beside_it_win(tmp_path):
    flags = ["--method", "ppo", "--env_args", "n=9", "--seed", "3", "--clip_high", "0.3", "--iterations", "9"]
    first = train.parse(flags)
    (tmp_path / "config.json").write_text(json.dumps({"settings": asdict(first[0]), "config": asdict(first[1])}))
    again = train.parse(["--resume", str(tmp_path)])
    assert again[1] == first[1] and asdict(again[0]) == asdict(first[0]) | {"resume": str(tmp_path)}
    longer = train.parse(["--iterations", "20", "--resume", str(tmp_path), "--clip_high", "0.2"])
    assert asdict(longer[0]) == asdict(again[0]) | {"iterations": 20}
    assert asdict(longer[1]) == asdict(first[1]) | {"clip_high": 0.2}


def test_resuming_nothing_says_so(tmp_path, runs):
    with pytest.raises(SystemExit, match="no config.json"):
        train.parse(["--resume", str(tmp_path / "nowhere")])
    settings, config = train.parse([*SHORT, "--runs", str(runs)])
    (tmp_path / "config.json").write_text(json.dumps({"settings": asdict(settings), "config": asdict(config)}))
    with pytest.raises(SystemExit, match="no checkpoint there yet"):
        train.build(*train.parse(["--resume", str(tmp_path)]))


@pytest.mark.parametrize("args", [["n"], ["n=abc"], ["n=9", "largest"], ["n="], ["9"]])
def test_env_args_that_are_no_pairs_say_so_in_one_line(args):
    with pytest.raises(SystemExit) as left:
        train.make_env(train.parse(["--env_args", *args])[0])
    message = str(left.value)
    assert " ".join(args) in message and "n=9" in message and "\n" not in message


@pytest.mark.parametrize("args, named", [(["n=99"], "n=99"), (["n=2.5"], "n=2.5"), (["foo=3"], "foo")])
def test_env_args_that_the_task_refuses_are_named(args, named):
    with pytest.raises((SystemExit, ValueError, TypeError), match=named):
        train.make_env(train.parse(["--env_args", *args])[0])


def test_env_args_reach_the_task():
    settings, _ = train.parse(["--env", "SAPO/ArrowPath-v0", "--env_args", "length=12", "grid=5"])
    task = train.make_env(settings).unwrapped.task
    assert (task.length, task.grid) == (12, 5)


# ---------------------------------------------------------------------------------------------------- warm-start cache
def untrained(runs, *flags):
    return train.parse(["--env", "SAPO/TextSum-v0", "--warm_start_steps", "0", "--runs", str(runs), *flags])[0]


def test_the_cache_key_has_everything_that_shapes_the_warm_start(tmp_path):
    variants = [[], ["--seed", "1"], ["--error_rate", "0.2"], ["--env_args", "n=3"], ["--warm_start_steps", "1"],
                ["--warm_start_lr", "0.1"], ["--warm_start_batch", "3"], ["--env", "SAPO/ArrowPath-v0"]]
    folders = [train.cached_warm_start(untrained(tmp_path, *flags)) for flags in variants]
    assert len(set(folders)) == len(variants)
    with warnings_as_errors():  # found again, whole, and whatever else the run does
        other = untrained(tmp_path, "--method", "ppo", "--batch", "8", "--lam", "0.5")
        assert train.cached_warm_start(other) == folders[0]


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def truncated(folder):
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


DAMAGES = {
    "weights truncated": truncated,
    "one byte of the weights": lambda folder: flip(folder / "model.safetensors"),
    "tokenizer lost": lambda folder: (folder / "tokenizer.json").unlink(),
    "manifest: not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest: empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest: not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest: a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest lost": lambda folder: (folder / "manifest.json").unlink(),
    "a folder inside": lambda folder: (folder / "surprise").mkdir(),
}


def flip(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, damage):
    settings = untrained(tmp_path)
    folder = train.cached_warm_start(settings)
    whole = train.digest(folder)
    DAMAGES[damage](folder)
    with pytest.warns(UserWarning, match="damaged"):
        assert train.cached_warm_start(settings) == folder
    assert train.digest(folder) == whole == json.loads((folder / "manifest.json").read_text())
    assert [f for f in folder.parent.iterdir() if f.suffix in (".new", ".old")] == []


def test_a_warm_start_that_fails_leaves_no_cache(tmp_path):
    with pytest.raises(SystemExit, match="n=99"):
        train.cached_warm_start(untrained(tmp_path, "--env_args", "n=99"))
    assert not list(tmp_path.glob("cache/*/manifest.json"))
    assert not [f for f in (tmp_path / "cache").iterdir() if f.is_dir() and f.suffix != ".new"]


def test_a_run_does_not_depend_on_where_its_warm_start_came_from(tmp_path):
    """Cached or made on the spot: the same weights, and the same random stream after it."""
    seen = []
    for _ in range(2):
        run = train.build(untrained(tmp_path, "--batch", "2"), sapo.SAPOConfig())
        seen.append({"rng": torch.get_rng_state(), "policy": run.policy.model.state_dict(),
                     "critic": run.critic.state_dict()})
    assert equal(*seen)


# -------------------------------------------------------------------------------------------------------------- replay
def tokens_of(text):
    """Tokens as the tiny model has them: a tag each, a character each, the end mark as one."""
    return re.findall("|".join([*vlm.TAGS, env.END]) + "|[\\s\\S]", text)


def an_episode(**kwargs):
    made = gym.make("SAPO/TextSum-v0", n=3, disable_env_checker=True, **kwargs)
    made.reset(options={"index": 5})
    task, example = made.unwrapped.task, made.unwrapped.example
    return made, task.demonstrate(example, np.random.default_rng(0))


@given(st.data())
def test_replay_passes_every_segment_and_pays_at_the_right_token(data):
    """Whatever the cut: the environments get the text as it was written, and the reward stands on the last segment."""
    good, right = an_episode()
    bad, _ = an_episode()
    texts = [tokens_of(right), tokens_of(right.replace("<answer>", "<answer>1"))]
    T = max(map(len, texts)) + 2
    mask = torch.zeros(2, T, dtype=torch.bool)
    for row, pieces in enumerate(texts):
        mask[row, :len(pieces)] = True
    cuts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * T, max_size=2 * T))).view(2, T)
    ends = cuts & mask | sapo.response_ends(mask)
    rewards, used, infos = train.replay([good, bad], texts, ends, mask)
    for row, (made, pieces) in enumerate(zip((good, bad), texts, strict=True)):
        places = [-1, *ends[row].nonzero().flatten().tolist()]
        segments = ["".join(pieces[a + 1:b + 1]) for a, b in zip(places, places[1:], strict=False)]
        assert made.unwrapped.segments == segments and made.unwrapped.response == "".join(pieces)
    assert torch.equal(used, mask)
    expected = torch.zeros(2, T)
    expected[0, len(texts[0]) - 1] = 1
    assert torch.equal(rewards, expected)
    assert [i["correct"] for i in infos] == [True, False]


def test_tokens_after_the_end_of_the_episode_leave_the_mask():
    """The policy may write an end that generation does not stop at, "<end>" in single characters say."""
    made, right = an_episode()
    texts = [tokens_of(right) + list("and on"), list("1<end>") + tokens_of(right)]
    T = max(map(len, texts))
    mask = torch.arange(T) < torch.tensor([[len(x)] for x in texts])
    before = mask.clone()
    rewards, used, infos = train.replay([made, an_episode()[0]], texts, sapo.token_ends(mask), mask)
    assert torch.equal(mask, before)  # the argument is not changed
    assert used.sum(1).tolist() == [len(tokens_of(right)), len("1<end>")]
    assert used[0, :used[0].sum()].all() and used[1, :used[1].sum()].all()
    assert rewards.sum(1).tolist() == [1, 0] and rewards[0, used[0].sum() - 1] == 1
    assert [i["end_reason"] for i in infos] == ["answer", "end"]


def test_a_truncated_episode_ends_the_response_too():
    made, right = an_episode(max_segments=4)
    texts = [tokens_of(right)]
    mask = torch.ones(1, len(texts[0]), dtype=torch.bool)
    rewards, used, infos = train.replay([made], texts, sapo.token_ends(mask), mask)
    assert used.sum() == 4 and rewards.sum() == 0 and infos[0]["end_reason"] == "max_segments"


# ------------------------------------------------------------------------------------------------------------- rollout
def test_fresh_examples_every_iteration_and_groups_side_by_side():
    settings = train.parse(["--batch", "12", "--group", "4"])[0]
    seen = [train.train_indices(settings, i).tolist() for i in (1, 2, 3)]
    assert sum(seen, []) == list(range(36))
    settings = train.parse(["--batch", "12", "--group", "4", "--method", "grpo"])[0]
    seen = [train.train_indices(settings, i).tolist() for i in (1, 2)]
    assert seen == [[0] * 4 + [1] * 4 + [2] * 4, [3] * 4 + [4] * 4 + [5] * 4]


METHODS = {"topk": [], "causal": ["--cut", "causal"], "fixed": ["--cut", "fixed"],
           **{method: ["--method", method, "--group", "4", "--branching", "2", "2", "2", "--segment_tokens", "2",
                       "--continuations", "3"] for method in baselines.SETTINGS if method not in ("sapo", "srpo")}}


@pytest.mark.parametrize("which", METHODS)
def test_a_collected_batch_is_what_the_method_promises(runs, which):
    run = build(runs, *METHODS[which], "--name", f"collected-{which}", "--batch", "32", "--kl_coef", "0.1")
    batch = train.collect(run, train.train_indices(run.settings, 1))
    rollout, mask, credit = batch.rollout, batch.rollout.mask, run.settings.credit
    logp, entropy = vlm.score(run.policy, batch.inputs, batch.tokens, mask)
    torch.testing.assert_close(rollout.logp * mask, logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.ref_logp * mask, logp, rtol=0, atol=1e-5)  # no step yet: the same model
    assert not rollout.logp.requires_grad and rollout.rewards.sum() > 0
    right = torch.tensor([float(i["correct"]) for i in batch.infos])
    assert torch.equal(rollout.rewards.sum(1), right) and (rollout.rewards[~rollout.ends] == 0).all()
    written = ["".join(row) for row in batch.texts]
    assert written == [e.unwrapped.response for e in batch.envs]
    threshold = run.progress["threshold"]
    assert torch.equal(rollout.ends, baselines.cut(run.settings.cut, mask, batch.entropy, rollout.logp, batch.texts,
                                                   run.config.top_k, threshold, run.settings.segment_tokens))
    assert (run.critic is None) == (credit != "critic")
    assert (batch.keep is None) == (which not in ("spo-chain", "spo-tree"))
    if credit == "group":
        assert len({tuple(row) for row in batch.inputs["input_ids"][:4].tolist()}) == 1  # one prompt, four answers
        advantages = baselines.group_advantages(right, 4)
        torch.testing.assert_close(rollout.advantages, advantages[:, None] * mask)
    elif credit == "tree":
        assert set(batch.indices) == {0, 1, 2, 3} and list(batch.indices) == sorted(batch.indices)
        expected, keep = baselines.tree_credit(batch.tree, right, mask)
        assert torch.equal(rollout.advantages, expected) and torch.equal(batch.keep, keep) and keep.any()
        assert run.written == int(baselines.tree_credit(batch.tree, torch.rand(len(right)), batch.mask)[1].sum())
    elif credit == "continuations":
        reads = sapo.boundaries(rollout.ends, mask)
        assert (rollout.values[~reads] == 0).all() and run.written > mask.sum()
        torch.testing.assert_close(rollout.values * 3, (rollout.values * 3).round())  # means of three rewards
        if which == "spo-chain":
            assert torch.equal(batch.keep, mask & (rollout.logp.exp() <= 0.9))
    else:
        assert rollout.values.shape == mask.shape and run.written >= int(mask.sum())


@pytest.mark.parametrize("which", ["vc-ppo", "gspo", "spo-chain", "vineppo", "spo-tree"])
def test_every_method_learns_something(runs, which):
    """A step moves the policy, counts its tokens, and is finite; VC-PPO's first only the critic."""
    run = build(runs, *METHODS[which], "--name", f"steps-{which}", "--batch", "32",
                *(["--value_pretraining", "1"] if which == "vc-ppo" else []))
    for iteration in (1, 2):
        before = [p.detach().clone() for p in run.policy.model.parameters()]
        row = train.step(run)
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.policy.model.parameters(), strict=True))
        assert moved == (which != "vc-ppo" or iteration == 2) and all(map(math.isfinite, row.values()))
    assert row["generated_tokens"] == run.written >= row["response_tokens"] * 32


def test_srpo_weighs_what_the_picture_and_the_perception_carry(tmp_path):
    """On dice: the corrupted picture matters to the perception, the hidden perception to the reasoning."""
    flags = ["--env_args", "n=2", "--warm_start_steps", "2", "--warm_start_batch", "4", "--runs", str(tmp_path),
             "--batch", "8", "--group", "4", "--max_new_tokens", "24"]
    run = train.build(*train.parse([*flags, "--method", "srpo"]))
    grpo = train.build(*train.parse([*flags, "--method", "grpo"]))
    torch.manual_seed(0)
    batch = train.collect(run, train.train_indices(run.settings, 1))
    batch.texts = [["<see>", "3", "</see>", *["x"] * (batch.tokens.shape[1] - 3)]] * 8
    batch.rollout.rewards[::2, -1] = 1.0  # an untrained model is never right
    batch.rollout.advantages = None
    score = lambda mask, noised: vlm.score(
        run.policy, vlm.noised(batch.inputs) if noised else batch.inputs, batch.tokens, mask)[0]
    with torch.no_grad():
        baselines.give_credit(batch, run.settings, run.config, None, None, score)
    weighted = batch.rollout.advantages.clone()
    batch.rollout.advantages = None
    baselines.give_credit(batch, grpo.settings, run.config, None, None, score)
    plain = batch.rollout.advantages
    assert torch.equal(plain.sign(), weighted.sign()) and not torch.equal(plain, weighted)
    torch.testing.assert_close(weighted.sum(1), plain.sum(1))  # weights of mean 1


def test_srpo_without_a_picture_says_so_in_one_line(runs):
    with pytest.raises(SystemExit, match="SAPO/TextSum-v0 has no picture.*--method grpo"):
        build(runs, "--name", "blind", "--method", "srpo", "--group", "4")


def test_the_budget_counts_generated_tokens_and_the_rate_falls_with_them(runs):
    run = build(runs, "--name", "budget", "--token_budget", "400", "--iterations", "100", "--actor_half_life", "200")
    assert train.train(run)
    rows = rows_of(run.folder / "metrics.jsonl")
    spent = [0, *(row["generated_tokens"] for row in rows[1:])]
    assert spent[-2] < 400 <= spent[-1] and "eval_accuracy" in rows[-1]
    assert [row["actor_lr"] for row in rows[1:]] == [1e-3 * 0.5 ** (tokens / 200) for tokens in spent[:-1]]


def test_the_causal_threshold_is_the_last_batchs(runs):
    run = build(runs, "--name", "threshold", "--cut", "causal")
    thresholds = []
    for _ in range(2):
        before = run.progress["threshold"]
        train.step(run)
        thresholds.append((before, run.progress["threshold"]))
    assert thresholds[0][0] is None and thresholds[1][0] == thresholds[0][1] != thresholds[1][1]


def test_a_batch_that_is_no_multiple_of_the_group_is_refused_before_training(runs):
    with pytest.raises((SystemExit, ValueError), match="group"):
        build(runs, "--name", "uneven", "--method", "grpo", "--batch", "20", "--group", "8")


def test_minibatches_that_are_never_finite_stop_the_run_and_leave_the_checkpoint(runs):
    """An infinite value loss skips every step; the third in a row is a clear error."""
    run = build(runs, "--name", "infinite", "--value_coef", "inf", "--minibatch", "16", "--iterations", "9")
    with pytest.raises(FloatingPointError, match="three minibatches in a row"):
        train.train(run)
    found = vlm.load(train.newest(run.folder)).model.state_dict()
    assert all(torch.isfinite(x).all() for x in found.values())


# ---------------------------------------------------------------------------------------------------------- evaluation
def test_wilson_against_known_values():
    """Wilson (1927): 8 of 10 gives 0.490 to 0.943; 0 of 10 gives 0 to 0.278, and its mirror image."""
    assert figures.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert figures.wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-5)
    assert figures.wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-5)
    for right in range(51):
        low, high = figures.wilson(right, 50)
        assert -1e-12 <= low <= right / 50 <= high <= 1 + 1e-12


@pytest.mark.parametrize("episodes", [5, 16, 21])
def test_evaluation_counts_held_out_episodes(runs, episodes):
    """Also when they are no multiple of the batch. Greedy, so that a second look must agree."""
    run = build(runs, "--name", f"counted-{episodes}", "--eval_episodes", str(episodes))
    found = train.evaluate(run, temperature=0.0)
    right = 0
    for i in range(episodes):
        envs, inputs = train.ask(run, [i], "eval")
        _, _, texts = train.write(run, inputs, 0.0)
        right += envs[0].step("".join(texts[0]))[4]["correct"]
        assert envs[0].unwrapped.example_id == f"eval/{i}"
    assert found["eval_accuracy"] == right / episodes
    assert (found["eval_low"], found["eval_high"]) == figures.wilson(right, episodes)


# -------------------------------------------------------------------------------------------- checkpoints and resuming
RESUMED = {"topk": [], "causal": ["--cut", "causal", "--kl_coef", "0.05"], "grpo": METHODS["grpo"],
           "spo-tree": METHODS["spo-tree"], "spo-chain": METHODS["spo-chain"]}


@pytest.mark.parametrize("which", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(runs, which):
    """Four iterations against two and two, to the last bit: weights, optimizers, random stream, metrics, samples."""
    flags = [*RESUMED[which], "--eval_every", "2", "--checkpoint_every", "3"]
    whole = build(runs, "--name", f"whole-{which}", "--iterations", "4", *flags)
    assert train.train(whole)
    torch.rand(1)  # what happens in between does not matter
    half = build(runs, "--name", f"half-{which}", "--iterations", "2", *flags)
    assert train.train(half)
    with open(half.folder / "metrics.jsonl", "a") as file:  # what a kill leaves: a later iteration, and a torn line
        file.write('{"iteration": 3, "accuracy": 0.9}\n{"iteration": 4, "acc')
    resumed = train.build(*train.parse(["--resume", str(half.folder), "--iterations", "4"]))
    assert resumed.progress["iteration"] == 2
    assert train.train(resumed)
    assert_same_run(whole.folder, half.folder)
    metrics = rows_of(whole.folder / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3, 4]
    assert max(row["policy_grad_norm"] for row in metrics[1:]) > 0  # something was learned, so the test means something
    start = vlm.load(train.cached_warm_start(whole.settings)).model.state_dict()
    assert not equal(start, state(whole.folder)["policy"])


def test_a_run_killed_before_its_first_iteration_goes_on_from_there(runs):
    """The evaluation before training is neither made nor logged a second time."""
    whole = build(runs, "--name", "whole-0", "--iterations", "1")
    assert train.train(whole)
    half = build(runs, "--name", "half-0", "--iterations", "0")
    assert train.train(half)
    assert train.train(train.build(*train.parse(["--resume", str(half.folder), "--iterations", "1"])))
    assert_same_run(whole.folder, half.folder)


def test_ctrl_c_saves_and_says_how_to_go_on(runs):
    """The real command line, interrupted; then resumed; and it equals the run that nobody interrupted."""
    flags = [*SHORT, "--runs", str(runs), "--eval_every", "10000"]  # (an evaluation draws from the random stream)
    folder = runs / "interrupted"
    metrics = folder / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags, "--name", "interrupted", "--iterations", "100000"], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err and f"--resume {folder}" in out
    done = torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)["progress"]["iteration"]
    assert f"stopped at iteration {done}" in out and rows_of(metrics)[-1]["iteration"] == done
    resumed = train.build(*train.parse(["--resume", str(folder), "--iterations", str(done + 1)]))
    assert train.train(resumed)
    whole = build(runs, "--name", "left-alone", "--eval_every", "10000", "--iterations", str(done + 1))
    assert train.train(whole)
    assert_same_run(folder, whole.folder)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import train, vlm
torch.set_num_threads(1)
run = train.build(*train.parse(sys.argv[1:]))
rng = random.Random(0)

def save(number):  # a state that shows whether it is whole: one number everywhere
    for parameter in [*run.policy.model.parameters(), *run.critic.parameters()]:
        parameter.data.fill_(number)
    run.progress["iteration"] = number
    train.save(run)

started = time.monotonic()
save(1)
once = time.monotonic() - started
seen = set()
for attempt in range(15):
    child = os.fork()
    if child == 0:
        for number in range(attempt * 40 + 2, attempt * 40 + 40):
            save(number)
        os._exit(0)
    time.sleep(rng.uniform(0, 4 * once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = train.newest(run.folder)
    saved = torch.load(found / "trainer.pt", weights_only=True)
    numbers = {saved["progress"]["iteration"], *(x for t in saved["critic"].values() for x in t.unique().tolist()),
               *(x for t in vlm.load(found).model.parameters() for x in t.unique().tolist())}
    assert len(numbers) == 1, (attempt, found, numbers)
    seen |= {(f.name, len(list(f.iterdir()))) for f in Path(run.folder).glob("checkpoint*")}
print("whole", len(seen), seen)
"""


def test_a_kill_during_a_save_leaves_a_whole_checkpoint(runs):
    """SIGKILL at 15 random moments of a process that does nothing but save."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *SHORT, "--runs", str(runs), "--name", "killed"], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert ".new" in done.stdout  # some kills did hit a save half way: the test means something


def test_a_kill_between_the_two_renames_costs_nothing(runs):
    run = build(runs, "--name", "renames", "--iterations", "1", "--eval_every", "2")
    assert train.train(run)
    folder, before = run.folder, state(run.folder)
    shutil.copytree(folder / "checkpoint", folder / "checkpoint.new")  # the whole new one, not yet in its place
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    assert train.newest(folder) == folder / "checkpoint.old"
    resumed = train.build(*train.parse(["--resume", str(folder), "--iterations", "1"]))
    assert resumed.progress["iteration"] == 1
    train.save(resumed)
    assert equal(state(folder), before)
    assert sorted(f.name for f in folder.glob("checkpoint*")) == ["checkpoint"]
    # killed a moment later, while the old one is removed: the new one counts
    shutil.copytree(folder / "checkpoint", folder / "checkpoint.old")
    (folder / "checkpoint.old" / "config.json").unlink()
    assert train.newest(folder) == folder / "checkpoint"
    train.save(resumed)
    assert sorted(f.name for f in folder.glob("checkpoint*")) == ["checkpoint"]


def test_earlier_runs_of_the_same_name_are_kept(runs):
    """Also when they follow each other within a second."""
    for number in range(3):
        run = build(runs, "--name", "again", "--seed", "0")
        assert not (run.folder / "mine").exists()
        (run.folder / "mine").write_text(str(number))
    assert sorted(f.read_text() for f in runs.glob("again*/mine")) == ["0", "1", "2"]


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    with train.replacing(tmp_path / "it") as aside:
        (aside / "a").write_text("first")
    with pytest.raises(OSError), train.replacing(tmp_path / "it") as aside:
        (aside / "a").write_text("second")
        raise OSError("no space left")
    assert (tmp_path / "it" / "a").read_text() == "first"
    with train.replacing(tmp_path / "it") as aside:
        assert not list(aside.iterdir())  # nothing of the failed one
        (aside / "a").write_text("third")
    assert (tmp_path / "it" / "a").read_text() == "third"
    assert [f.name for f in tmp_path.iterdir()] == ["it"]


# ---------------------------------------------------------------------------------------------------- one short run
@pytest.fixture(scope="module")
def finished(runs):
    """`python train.py` with these flags, from the cached warm start to the table on the terminal."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train.main([*TASK, "--runs", str(runs), "--name", "finished", "--iterations", "12", "--batch", "128",
                    "--actor_lr", "5e-4", "--critic_lr", "1e-3", "--eval_every", "6", "--eval_episodes", "512"])
    return runs / "finished", out.getvalue()


def test_a_short_run_improves_accuracy(finished):
    """Trials with seeds 0 to 3 went from 0.30-0.35 to 0.55-0.64 on the held-out examples."""
    summary, metrics = json.loads((finished[0] / "summary.json").read_text()), rows_of(finished[0] / "metrics.jsonl")
    assert summary["warm_start_accuracy"] < 0.45
    assert summary["accuracy"] > summary["warm_start_accuracy"] + 0.1
    assert summary["accuracy_low"] > metrics[0]["eval_high"]  # the intervals do not touch
    accuracy = [row["accuracy"] for row in metrics[1:]]
    assert np.mean(accuracy[-3:]) > np.mean(accuracy[:2]) + 0.1


def test_the_summary_has_what_was_promised(finished):
    folder, out = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert {"warm_start_accuracy", "accuracy", "accuracy_low", "accuracy_high", "episodes", "seconds",
            "warm_start_seconds", "peak_rss_mb", "method", "seed"} <= set(summary)
    assert (summary["method"], summary["seed"], summary["episodes"]) == ("sapo", 0, 12 * 128)
    assert 0 < summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"] < 1
    assert 50 < summary["peak_rss_mb"] < 3000 and summary["seconds"] > 0
    assert summary["accuracy"] == rows_of(folder / "metrics.jsonl")[-1]["eval_accuracy"]  # what the curve ends with
    assert set(summary["evaluations"]) == {"temperature 1", "temperature 0.6, top-p 0.95", "greedy"}
    for kind in summary["evaluations"]:
        assert kind in out
    assert f"{summary['accuracy']:.1%}" in out and str(folder) in out


def test_a_rollout_is_scored_and_judged_in_micro_batches(runs, monkeypatch):
    run, sizes = build(runs, "--name", "parts", "--micro_batch", "4"), []
    for name in ("score", "prefix_values"):
        whole = getattr(vlm, name)
        monkeypatch.setattr(vlm, name, lambda *x, whole=whole: sizes.append(len(x[2])) or whole(*x))
    train.collect(run, np.arange(16))
    assert sizes == [4] * 8


@pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs peft")
def test_adapters_of_a_tiny_model_resume_on_its_warm_start(runs):
    run = build(runs, "--name", "adapters", "--lora", "2", "--iterations", "1")
    assert train.train(run)
    again = train.build(*train.parse(["--resume", str(run.folder), "--iterations", "2"]))
    before, after = (dict(x.policy.model.state_dict()) for x in (run, again))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert train.train(again)


def test_a_run_that_ends_without_an_evaluation_is_evaluated(runs):
    """A resume whose --iterations are already done, after Ctrl-C between two evaluations."""
    run = build(runs, "--name", "unjudged", "--iterations", "1")
    assert train.train(run)
    rows = rows_of(run.folder / "metrics.jsonl")
    kept = [{key: x for key, x in row.items() if not row["iteration"] or "eval" not in key} for row in rows]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    run.command = "python train.py"
    train.finish(run)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]


def test_the_promised_files_are_there(finished):
    folder, _ = finished
    names = {f.name for f in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoint"} <= names
    if find_spec("matplotlib"):
        assert {"learning_curve.png", "credit.html"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["batch"] == 128 and config["config"]["actor_lr"] == 5e-4
    assert vlm.load(folder / "checkpoint").model.dtype == torch.float32  # Hugging Face format, like any other


def test_metrics_are_complete_finite_and_strict_json(finished):
    rows = rows_of(finished[0] / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(13))
    assert [row["iteration"] for row in rows if "eval_accuracy" in row] == [0, 6, 12]
    needed = {"accuracy", "reward", "response_tokens", "policy_loss", "value_loss", "clip_fraction", "approx_kl",
              "ratio", "entropy", "policy_grad_norm", "value_grad_norm", "advantage_mean", "advantage_std",
              "explained_variance", "segments_per_response", "tokens_per_segment", "skipped_steps", "episodes",
              "generated_tokens", "seconds"}
    for i, row in enumerate(rows[1:], 1):
        assert needed <= set(row) and all(math.isfinite(x) for x in row.values())
        assert row["episodes"] == 128 * i and row["reward"] == pytest.approx(row["accuracy"])
        assert row["generated_tokens"] >= row["episodes"]
    assert all(a["seconds"] < b["seconds"] for a, b in zip(rows[1:], rows[2:], strict=False))


def check_samples(rows):
    for row in rows:
        n, text = len(row["tokens"]), "".join(row["tokens"])
        assert {len(row[k]) for k in ("entropy", "advantages", "ends")} == {n} and row["ends"][-1] is True
        assert (row["values"] is None) == (row["method"] == "grpo") and len(row["values"] or row["ends"]) == n
        assert all(0 <= a <= b < n and isinstance(right, bool) for a, b, right in row["steps"])
        assert all(x >= 0 for x in row["entropy"]) and row["example_id"].startswith("eval/")
        segments = [place + 1 for place, end in enumerate(row["ends"]) if end]
        for a, b in zip([0, *segments], segments, strict=False):  # one advantage and one value per segment
            assert len(set(row["advantages"][a:b])) == 1 and len(set((row["values"] or row["advantages"])[a:b])) == 1
        if row["reward"] == 1:
            assert row["predicted"] == row["answer"] and f"<answer>{row['answer']}</answer>" in text
            first, last, right = row["steps"][-1]
            assert right and "".join(row["tokens"][first:last + 1]) == row["answer"]


def test_samples_are_consistent(finished):
    rows = rows_of(finished[0] / "samples.jsonl")
    assert [row["iteration"] for row in rows] == [6] * 64 + [12] * 64 and all(row["image"] is None for row in rows)
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    check_samples(rows)


def test_samples_of_a_group_method(runs):
    run = build(runs, "--name", "sampled", "--method", "grpo", "--group", "4")
    rows = list(train.samples(run))
    assert [row["example_id"] for row in rows] == [f"eval/{i}" for i in range(4)]
    check_samples(json.loads(json.dumps(rows)))


def test_a_run_on_pictures(tmp_path):
    """From an untrained model, which earns nothing: every part must bear that, too."""
    train.main(["--env", "SAPO/DiceSum-v0", "--env_args", "n=2", "--warm_start_steps", "2", "--warm_start_batch", "4",
                "--runs", str(tmp_path), "--name", "dice", "--iterations", "2", "--batch", "4", "--eval_episodes", "4",
                "--max_new_tokens", "8"])
    rows = rows_of(tmp_path / "dice" / "samples.jsonl")
    check_samples(rows)
    shown = gym.make("SAPO/DiceSum-v0", n=2).unwrapped.task.example_at(0, "eval").image
    image = Image.open(io.BytesIO(base64.b64decode(rows[0]["image"])))
    assert np.array_equal(np.asarray(image), np.asarray(shown)) and rows[0]["prompt"] == "Sum the dice."


# --------------------------------------------------------------------------------------------------------- TensorBoard
def test_without_tensorboard_one_line_says_what_to_install(runs, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        train.train(build(runs, "--name", "board-missing", "--tensorboard"))
    assert "pip install tensorboard" in str(left.value) and "\n" not in str(left.value)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_an_event_file(runs):
    run = build(runs, "--name", "board", "--tensorboard", "--iterations", "1")
    assert train.train(run)
    file, = run.folder.glob("events.out.tfevents.*")
    assert file.stat().st_size > 0
