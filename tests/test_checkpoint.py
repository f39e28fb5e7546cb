"""checkpoint.py: resumed runs equal uninterrupted ones, and no kill at any moment loses a run."""

import fcntl
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    SHORT,
    SMALL,
    assert_same_run,
    built,
    equal,
    outcome,
    parsed,
    resumed,
    rows_of,
)

import checkpoint
import tiny
import train

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

# ----------------------------------------------------------------------------------- resuming

RESUMED = {
    "topk": [],
    "causal": ["--cut", "causal", "--kl_coef", "0.05", "--critic_hears", "nothing"],
    "grpo": ["--method", "grpo"],
    "spo-tree": ["--method", "spo-tree"],
    "spo-chain": ["--method", "spo-chain"],
}


@pytest.mark.parametrize("which", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(runs, which):
    """Four iterations against two and two, to the last bit: weights, optimizers, random stream,
    metrics, samples."""
    flags = [*SMALL, *RESUMED[which], "--eval_every", "2", "--checkpoint_every", "3"]
    whole = built(runs, "--name", f"whole-{which}", "--iterations", "4", *flags)
    assert train.train(whole)
    torch.rand(1)  # what happens in between does not matter
    half = built(runs, "--name", f"half-{which}", "--iterations", "2", *flags)
    assert train.train(half)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(half.folder / name, "a") as file:
            # what a kill leaves: a later iteration, and a torn line
            file.write('{"iteration": 3, "accuracy": 0.9}\n{"iteration": 4, "acc')
    continued = resumed(half.folder, "--iterations", "4")
    assert continued.progress.iteration == 2
    assert train.train(continued)
    assert_same_run(whole.folder, half.folder)
    metrics = rows_of(whole.folder / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3, 4]
    # something was learned, so the test means something
    assert max(row["policy_grad_norm"] for row in metrics[1:]) > 0
    task = whole.grading_env.unwrapped.task
    start = load_file(tiny.cached_warm_start(task, whole.settings) / "model.safetensors")
    ended = outcome(whole.folder)
    assert start.keys() == ended["policy"].keys() and not equal(start, ended["policy"])
    if which == "topk":  # its critic hears
        assert ended["critic"]["per_nat"] != 0
    elif which == "causal":
        assert ended["critic"] and "per_nat" not in ended["critic"]


def test_a_run_killed_before_its_first_iteration_goes_on_from_there(runs):
    """The evaluation before training is neither made nor logged a second time."""
    whole = built(runs, "--name", "whole-0", "--iterations", "1")
    assert train.train(whole)
    half = built(runs, "--name", "half-0", "--iterations", "0")
    assert train.train(half)
    assert train.train(resumed(half.folder, "--iterations", "1"))
    assert_same_run(whole.folder, half.folder)


def test_a_resumed_run_takes_other_rates_from_its_flags(runs):
    run = built(runs, "--name", "rates", "--iterations", "1")
    assert train.train(run)
    again = resumed(run.folder, "--iterations", "2", "--actor_lr", "1e-5", "--critic_lr", "1e-6")
    assert train.train(again)
    assert rows_of(run.folder / "metrics.jsonl")[-1]["actor_lr"] == pytest.approx(1e-5, rel=1e-2)
    assert again.models.critic_optimizer.param_groups[0]["lr"] == 1e-6


def test_the_seconds_of_a_resumed_run_go_on(runs):
    run = built(runs, "--name", "seconds", "--iterations", "0")
    assert train.train(run)
    again = resumed(run.folder, "--iterations", "1")
    again.progress.seconds = 1000.0
    assert train.train(again)
    assert rows_of(run.folder / "metrics.jsonl")[-1]["seconds"] > 1000


@pytest.fixture(scope="module")
def bound_to_its_start(runs):
    """A function: "lora" or "kl_coef" -> the folder of a run that reads its start again."""

    @functools.cache
    def folder(flag):
        if flag == "lora":
            pytest.importorskip("peft", reason="LoRA needs peft")
        run = built(runs, "--name", f"bound-{flag}", "--iterations", "0", f"--{flag}", "1")
        assert train.train(run)
        return run.folder

    return folder


@pytest.mark.parametrize("bound", ["lora", "kl_coef"])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--warm_start_steps", "0"], "--warm_start_steps: 0, but .* 150, and that cannot change"),
        (["--error_rate", "0.4"], "--error_rate: 0.4, but .* 0.5, and that cannot change"),
        (["--habits", "0"], "--habits: 0.0, but .* 0.6, and that cannot change"),
        (["--model", "ANOTHER"], "--resume .*: --model .* has other weights here than those"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_that_rests_on_its_start_resumes_on_no_other(
    bound_to_its_start, tmp_path, bound, other, said
):
    folder = bound_to_its_start(bound)
    config = (folder / "config.json").read_text()
    other = [word.replace("ANOTHER", str(tmp_path)) for word in other]
    tiny.build_tiny(tmp_path)
    with pytest.raises(SystemExit, match=f"^train.py: {said}"):
        train.main(["--resume", str(folder), *other])
    assert (folder / "config.json").read_text() == config, "and nothing was written"
    assert resumed(folder).progress.start, "on its own it goes on"


def test_the_folder_of_the_start_may_move(runs, tmp_path, bound_to_its_start):
    folder = bound_to_its_start("kl_coef")
    settings, _ = parsed(runs)
    own = tiny.cached_warm_start(train.make_env(settings).unwrapped.task, settings)
    shutil.copytree(own, tmp_path / "moved")
    resumed(folder, "--model", str(tmp_path / "moved"), "--dtype", "bfloat16")


def test_a_checkpoint_from_before_starts_were_noted_is_taken_as_it_is(
    bound_to_its_start, tmp_path, monkeypatch
):
    folder = tmp_path / "old"
    shutil.copytree(bound_to_its_start("kl_coef"), folder)
    restore = checkpoint.restore

    def older(*args):
        progress = restore(*args)
        del progress["start"]
        return progress

    monkeypatch.setattr(checkpoint, "restore", older)
    tiny.build_tiny(tmp_path / "another")
    again = resumed(folder, "--model", str(tmp_path / "another"))
    assert again.progress.start is None


def test_a_run_that_does_not_read_its_start_again_resumes_on_any(runs):
    run = built(runs, "--name", "unbound", "--iterations", "0")
    assert train.train(run) and run.progress.start
    again = resumed(run.folder, "--warm_start_steps", "0", "--model", "tiny")
    assert again.progress.start == run.progress.start


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(runs, sent):
    """The real command line, interrupted; then resumed; and it equals the run that nobody
    interrupted. A second start while it runs is refused."""
    # an evaluation draws from the random stream, and the interrupted run makes none
    flags = ["--eval_every", "10000"]
    folder = runs / f"interrupted-{sent.name}"
    metrics = folder / "metrics.jsonl"
    command = [sys.executable, "train.py", *SHORT, "--runs", str(runs), *flags]
    process = subprocess.Popen(
        [*command, "--name", folder.name, "--iterations", "100000"],
        cwd=ROOT,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        for again in (["--name", folder.name, "--runs", str(runs)], ["--resume", str(folder)]):
            said = f"{folder}: process {process.pid} is writing there; let it end, or begin"
            with pytest.raises(SystemExit, match=said):
                train.main(again)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err and f"--resume {folder}" in out
    saved = torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)
    done = saved["progress"]["iteration"]
    assert f"stopped at iteration {done}" in out and rows_of(metrics)[-1]["iteration"] == done
    iterations = ["--iterations", str(done + 1)]
    assert train.train(resumed(folder, *iterations))
    whole = built(runs, "--name", f"left-alone-{sent.name}", *flags, *iterations)
    assert train.train(whole)
    assert_same_run(folder, whole.folder)


START = """
import signal, sys
import train

def interrupted_there(*_):
    signal.raise_signal(getattr(signal, sys.argv[1]))

where, name = sys.argv[2].split(".")
setattr(getattr(train, where), name, interrupted_there)
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("tiny.warm_start", "interrupted before training began; give the same command again"),
        (
            "evaluation.final_evaluations",
            r"interrupted in iteration 0; python train.py --resume \S* goes on from the last",
        ),
    ],
)
def test_an_interruption_before_or_after_the_loop_is_one_line(runs, tmp_path, sent, where, said):
    flags = [*SHORT, "--iterations", "0", "--name", "cut"]
    folder = tmp_path if where == "tiny.warm_start" else runs
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START, sent, where, *flags, "--runs", str(folder)],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == train.INTERRUPTED and "Traceback" not in done.stderr, done.stderr
    assert re.match(said, done.stdout) and done.stdout.count("\n") == 1
    with checkpoint.held(folder / "cut"):
        pass  # nothing is left that would block the next start
    assert not list(folder.glob("*.holder"))


def test_of_the_random_streams_of_cards_only_the_runs_own_is_kept(runs, monkeypatch):
    """Where it is resumed, other cards may be visible, or none."""
    run = built(runs, "--name", "cards", "--iterations", "0")
    streams = {"cuda:0": torch.tensor([0]), "cuda:1": torch.tensor([1])}
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda card: streams[str(card)])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [*streams.values()])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, card: restored.append((str(card), state.item()))
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    run.settings.device = "cuda:1"
    checkpoint.save(run)
    saved = checkpoint.newest(run.folder)
    checkpoint.restore(run.models, saved, "cpu")
    assert restored == []
    checkpoint.restore(run.models, saved, "cuda:0")
    assert restored == [("cuda:0", 1)]


def test_the_first_evaluation_touches_no_card_but_the_runs_own(runs, monkeypatch):
    run = built(runs, "--name", "own-card", "--iterations", "0")
    forked, fork_rng = [], torch.random.fork_rng

    def recorded(devices=None, **more):
        forked.append(devices)
        return fork_rng(devices, **more)

    monkeypatch.setattr(torch.random, "fork_rng", recorded)
    assert train.train(run)
    assert forked == [[]]


# -------------------------------------------------------------------------------------- kills

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import checkpoint, train, vlm

torch.set_num_threads(1)
run = train.build(*train.parse(sys.argv[1:]))
rng = random.Random(0)

def save(number):  # a state that shows whether it is whole: one number everywhere
    for model in (run.models.policy.model, run.models.critic):
        for parameter in model.parameters():
            parameter.data.fill_(number)
    run.progress.iteration = number
    checkpoint.save(run)

def numbers_in(tensors):
    return {number for tensor in tensors for number in tensor.unique().tolist()}

started = time.monotonic()
save(1)
once = time.monotonic() - started
folders = set()
for attempt in range(10):
    child = os.fork()
    if child == 0:
        for number in range(attempt * 40 + 2, attempt * 40 + 40):
            save(number)
        os._exit(0)
    time.sleep(rng.uniform(0, 4 * once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = checkpoint.newest(run.folder)
    saved = torch.load(newest / "trainer.pt", weights_only=True)
    numbers = {saved["progress"]["iteration"]} | numbers_in(saved["critic"].values())
    numbers |= numbers_in(vlm.load(newest).model.parameters())
    assert len(numbers) == 1, (attempt, newest, numbers)
    for folder in Path(run.folder).glob("checkpoint*"):
        folders.add((folder.name, len(list(folder.iterdir()))))
print("whole", len(folders), folders)
"""


def test_a_kill_during_a_save_leaves_a_whole_checkpoint(runs):
    """SIGKILL at 10 random moments of a process that does nothing but save."""
    flags = [*SHORT, "--runs", str(runs), "--name", "killed"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *flags],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert ".new" in done.stdout  # some kills did hit a save half way: the test means something


@pytest.mark.parametrize("damage", ["flipped", "truncated", "lost"])
def test_a_damaged_checkpoint_is_named_and_the_older_whole_one_used(runs, damage):
    run = built(runs, "--name", f"damage-{damage}", "--iterations", "1", "--eval_every", "2")
    assert train.train(run)
    stored = run.folder / "checkpoint"
    shutil.copytree(stored, run.folder / "checkpoint.old")
    file = stored / "model.safetensors"
    content = file.read_bytes()
    if damage == "lost":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.newest(run.folder) == run.folder / "checkpoint.old"
    shutil.rmtree(run.folder / "checkpoint.old")
    said = f"^train.py: {stored}: damaged, model.safetensors; start the run again"
    with pytest.raises(SystemExit, match=said):
        train.main(["--resume", str(run.folder)])


def change_config(key, value):
    """A function that changes one setting in the config.json of a run's folder."""

    def change(folder):
        file = folder / "config.json"
        stored = json.loads(file.read_text())
        of = "config" if key in stored["config"] else "settings"
        stored[of][key] = value
        file.write_text(json.dumps(stored))

    return change


def write_into(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def lose(name):
    return lambda folder: (folder / name).unlink()


DAMAGED = {  # what was done to a run's folder, and what is said
    "config.json empty": (write_into("config.json", b""), "config.json: Expecting value"),
    "config.json cut": (write_into("config.json", b"{"), "config.json: Expecting property"),
    "config.json no text": (write_into("config.json", b"\xff"), "config.json: 'utf-8' codec"),
    "config.json a list": (write_into("config.json", b"[]"), "config.json: expected an object"),
    "no settings": (write_into("config.json", b"{}"), "config.json: settings: None, expected an"),
    "settings a list": (
        write_into("config.json", b'{"settings": [1], "config": {}}'),
        r"config.json: settings: \[1\], expected an object",
    ),
    "batch a list": (
        change_config("batch", [1]),
        r"config.json: batch: \[1\], expected a whole number",
    ),
    "batch a fraction": (
        change_config("batch", 2.5),
        "config.json: batch: 2.5, expected a whole number",
    ),
    "batch true": (
        change_config("batch", True),
        "config.json: batch: True, expected a whole number",
    ),
    "batch 0": (
        change_config("batch", 0),
        r"config.json: batch: 0, expected a number in \[1, 65536\]",
    ),
    "env a number": (change_config("env", 5), "config.json: env: 5, expected a word"),
    "env_args numbers": (
        change_config("env_args", [1]),
        r"config.json: env_args: \[1\], expected a list",
    ),
    "method unknown": (
        change_config("method", "nope"),
        "config.json: method: 'nope', expected one of sapo",
    ),
    "ratio unknown": (
        change_config("ratio", "word"),
        "config.json: ratio: 'word', expected one of segment",
    ),
    "lam null": (change_config("lam", None), "config.json: lam: None, expected a number"),
    "key unknown": (
        change_config("new_setting", 3),
        "config.json: new_setting: not a setting of this version",
    ),
    "trainer.pt lost": (lose("checkpoint/trainer.pt"), "checkpoint: damaged, trainer.pt; start"),
    "manifest lost": (lose("checkpoint/manifest.json"), "checkpoint: damaged, manifest.json; st"),
    "metrics.jsonl empty": (write_into("metrics.jsonl", b""), "metrics.jsonl: no row of iterat"),
    "a garbage line": (write_into("metrics.jsonl", b"x}\n"), r"metrics.jsonl, line 1: no row"),
    "no text": (write_into("samples.jsonl", b"\xff}\n"), r"samples.jsonl, line 1: no row of a"),
    "no iteration": (write_into("samples.jsonl", b'{"a": 1}\n'), r"samples.jsonl, line 1: no r"),
    "not a number": (
        write_into("samples.jsonl", b'{"iteration": "x"}\n'),
        r"samples.jsonl, line 1: no row of a run",
    ),
}


@pytest.fixture(scope="module")
def whole_run(runs):
    run = built(runs, "--name", "whole-files", "--iterations", "0")
    assert train.train(run)
    return run.folder


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_of_a_run_is_named_in_one_line(whole_run, tmp_path, damage, said):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    damage(folder)
    with pytest.raises(SystemExit, match=f"^train.py: {folder}/{said}") as left:
        train.main(["--resume", str(folder)])
    assert "\n" not in left.value.code and "start the run again" in left.value.code


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "config.json"
    checkpoint.write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        checkpoint.write_whole(file, "new \ud800")
    assert file.read_text() == "old"
    with open(file) as reader:  # who has it open reads the old one to its end
        checkpoint.write_whole(file, "new")
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    checkpoint.write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def strictly(text):
    """A JSON text as jq, a browser and most other programs read it: without NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_json_has_no_number_for_stands_there_as_a_word(tmp_path):
    infinite = {"a": [math.inf, (np.float64(-math.inf), math.nan)], "b": {"c": 1.5}, "d": "inf"}
    words = {"a": ["inf", ["-inf", "nan"]], "b": {"c": 1.5}, "d": "inf"}
    checkpoint.write_json(tmp_path / "a.json", infinite)
    checkpoint.append_lines(tmp_path / "a.jsonl", [infinite] * 2)
    assert strictly((tmp_path / "a.json").read_text()) == words
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [strictly(line) for line in lines] == [words, words]


def test_every_file_of_a_run_is_json_for_every_program(runs):
    flags = ["--clip_high", "inf", "--actor_half_life", "inf", "--iterations", "1"]
    run = built(runs, "--name", "infinite", *flags)
    train.run_to_its_end(run)
    assert strictly((run.folder / "config.json").read_text())["config"]["clip_high"] == "inf"
    strictly((run.folder / "summary.json").read_text())
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (run.folder / name).read_text().splitlines():
            strictly(line)


def test_a_folder_that_is_gone_is_said_in_one_line(runs, monkeypatch):
    iterate = train.iterate

    def iterate_and_lose_it(run):
        metrics = iterate(run)
        shutil.rmtree(run.folder)
        return metrics

    monkeypatch.setattr(train, "iterate", iterate_and_lose_it)
    with pytest.raises(SystemExit, match=r"^iteration 1: .*No such file.*metrics\.jsonl"):
        train.main([*SHORT, "--runs", str(runs), "--name", "gone", "--iterations", "3"])


FULL = """
import resource, sys
import train

_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
where, name = sys.argv[1].split(".")
module = getattr(train, where)
then = getattr(module, name)

def fill_the_disk(*arguments):  # from here on no file grows beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), most))
    return then(*arguments)

setattr(module, name, fill_the_disk)
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("where", "size", "said"),
    [
        ("checkpoint.save", 100_000, r"iteration 0: .*checkpoint.new could not be written: is"),
        # enough for the weights, not for the optimizers beside them
        ("checkpoint.save", 1_500_000, r"iteration 1: .*checkpoint.new could not be written: is"),
        ("evaluation.summarise", 10, r"iteration 0: .*File too large"),
        ("tiny.warm_start", 100_000, r"train.py: .*\.new could not be written: is the disk full"),
    ],
    ids=["weights", "trainer.pt", "summary", "warm start"],
)
def test_a_full_disk_is_said_in_one_line(runs, tmp_path, where, size, said):
    """A bound on the size of a file stands for it."""
    folder = tmp_path if where == "tiny.warm_start" else runs
    flags = [*SHORT, "--warm_start_steps", "1"] if where == "tiny.warm_start" else SHORT
    name = f"full-{size}"
    flags = [*flags, "--iterations", "1" if size > 1e6 else "0"]
    flags += ["--runs", str(folder), "--name", name]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, where, str(size), *flags],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=100,
    )
    *_, line = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.match(said, line), line


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (FileNotFoundError("no such folder"), "no such folder"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory beyond"),
    ],
)
def test_what_goes_wrong_in_the_last_evaluation_is_one_line(runs, monkeypatch, failure, said):
    def refused(_):
        raise failure

    monkeypatch.setattr(train.evaluation, "final_evaluations", refused)
    with pytest.raises(SystemExit, match=f"^iteration 0: .*{said}"):
        train.main([*SHORT, "--runs", str(runs), "--name", "end", "--iterations", "0"])


IS_HELD = f"process {os.getpid()} is writing there"


def hold(folder, within=None):
    with checkpoint.held(folder, within):
        pass


def test_a_folder_is_held_by_one_at_a_time_by_whatever_path(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    with checkpoint.held(folder):
        for path in (folder, f"{folder}/", ".", "../run", tmp_path / "link"):
            with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {IS_HELD}"):
                hold(path)
    hold(".")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "run"]


def test_a_lock_file_that_was_removed_locks_nothing(tmp_path, monkeypatch):
    """One process has opened it, and then another lets it go, and a third holds the next."""
    flock, folder = fcntl.flock, tmp_path / "run"
    first, third = checkpoint.held(folder), checkpoint.held(folder)
    first.__enter__()

    def late(lock, kind):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        third.__enter__()
        flock(lock, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match=IS_HELD):
        hold(folder)
    assert fcntl.flock is flock
    third.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_refused_command_leaves_no_lock_behind(tmp_path):
    with pytest.raises(SystemExit, match="no such"):
        train.main(["--env", "no such", "--runs", str(tmp_path), "--name", "refused"])
    assert not list(tmp_path.iterdir())


def test_a_lock_that_somebody_has_taken_away_is_no_error(tmp_path):
    with checkpoint.held(tmp_path / "run"):
        (tmp_path / "run.lock").unlink()
        (tmp_path / "run.lock").touch()  # another's
    assert (tmp_path / "run.lock").exists()


def test_a_folder_is_held_together_with_those_around_it(tmp_path):
    """A start on `sweep` would move the folder in which a run writes."""
    with checkpoint.held(tmp_path / "sweep" / "one", tmp_path):
        hold(tmp_path / "sweep" / "two", tmp_path)  # beside it there is room
        with pytest.raises(ValueError, match="sweep: a run within or around it is writing there"):
            hold(tmp_path / "sweep", tmp_path)
    with checkpoint.held(tmp_path / "sweep", tmp_path), pytest.raises(ValueError, match=IS_HELD):
        hold(tmp_path / "sweep" / "one", tmp_path)


@pytest.mark.parametrize(("there", "new"), [("a", "a/b"), ("a", "a/b/c"), ("a/b/c", "a")])
def test_a_run_does_not_lie_within_another(tmp_path, there, new):
    (tmp_path / there).mkdir(parents=True)
    (tmp_path / there / "metrics.jsonl").touch()
    flags = ["--runs", str(tmp_path), "--name", new]
    said = f"^train.py: {tmp_path / new}: {tmp_path / there} is a run, and one cannot lie within"
    with pytest.raises(SystemExit, match=said):
        train.main(flags)
    hold(tmp_path / there, tmp_path)  # itself it may go on


def test_a_resumed_run_imports_no_module_that_its_folder_names(runs, tmp_path, monkeypatch):
    run = built(runs, "--name", "foreign", "--iterations", "0")
    file = run.folder / "config.json"
    stored = json.loads(file.read_text())
    stored["settings"]["env"] = "evil_module:SAPO/TextSum-v0"
    file.write_text(json.dumps(stored))
    (tmp_path / "evil_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="a module is imported only where it is named; add --env"):
        train.main(["--resume", str(run.folder)])
    with pytest.raises(SystemExit, match="it ran"):
        train.main(["--resume", str(run.folder), "--env", "evil_module:SAPO/TextSum-v0"])


def test_a_kill_between_the_two_renames_costs_nothing(runs):
    run = built(runs, "--name", "renames", "--iterations", "1", "--eval_every", "2")
    assert train.train(run)
    folder, saved = run.folder, outcome(run.folder)
    # the whole new one, not yet in its place
    shutil.copytree(folder / "checkpoint", folder / "checkpoint.new")
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    assert checkpoint.newest(folder) == folder / "checkpoint.old"
    again = resumed(folder, "--iterations", "1")
    assert again.progress.iteration == 1
    checkpoint.save(again)
    assert equal(outcome(folder), saved)
    assert sorted(file.name for file in folder.glob("checkpoint*")) == ["checkpoint"]
    # killed a moment later, while the old one is removed: the new one counts
    shutil.copytree(folder / "checkpoint", folder / "checkpoint.old")
    (folder / "checkpoint.old" / "config.json").unlink()
    assert checkpoint.newest(folder) == folder / "checkpoint"
    checkpoint.save(again)
    assert sorted(file.name for file in folder.glob("checkpoint*")) == ["checkpoint"]


# ------------------------------------------------------------------------------------ folders


def test_a_start_that_fails_leaves_an_earlier_run_its_name(runs):
    flags = ("--name", "first", "--iterations", "0")
    built(runs, *flags)
    with pytest.raises(OSError):
        built(runs, *flags, "--model", str(runs / "nowhere"))
    assert (runs / "first" / "config.json").is_file() and not list(runs.glob("first-2*"))


def test_earlier_runs_of_the_same_name_are_kept(runs):
    """Also when they follow each other within a second."""
    for number in range(3):
        run = built(runs, "--name", "again", "--seed", "0")
        assert not (run.folder / "mine").exists()
        (run.folder / "mine").write_text(str(number))
    assert sorted(file.read_text() for file in runs.glob("again*/mine")) == ["0", "1", "2"]


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "folder"
    with checkpoint.replacing(folder) as aside:
        (aside / "a").write_text("first")
    with pytest.raises(OSError), checkpoint.replacing(folder) as aside:
        (aside / "a").write_text("second")
        raise OSError("no space left")
    assert (folder / "a").read_text() == "first"
    with checkpoint.replacing(folder) as aside:
        assert not list(aside.iterdir())  # nothing of the failed one
        (aside / "a").write_text("third")
    assert (folder / "a").read_text() == "third"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_lines_after_the_checkpoint_are_dropped_and_torn_ones_too(tmp_path):
    file = tmp_path / "metrics.jsonl"
    checkpoint.append_lines(file, [{"iteration": number} for number in (0, 1, 2)])
    with open(file, "a") as stream:
        stream.write('\n{"iteration": 1, "torn')  # a blank line is none
    lines, iterations = checkpoint.lines_up_to(file, 1)
    assert [json.loads(line) for line in lines] == [{"iteration": 0}, {"iteration": 1}]
    assert iterations == [0, 1] and "torn" in file.read_text()
