"""Kill a run again and again at random moments: does it end where an uncut one ends?

    python -m lab.kills                  # 50 kills -> results/kills.json
    python -m lab.kills --kills 5        # printed only

A short run of SAPO is started, killed (SIGKILL, and by turns SIGTERM, which lets it save) and
resumed (or begun again, where it has no checkpoint yet), until it has come to its end; then the
next one begins, until there were as many kills as asked for. Whatever was killed, each ended run
must equal the uncut one bit for bit: its weights, its optimizers, its metrics and samples, without
the times in them.

Most of a run is rollout and evaluation, and a save takes a few hundredths of a second: a moment
drawn from the whole run hardly ever meets one. So each kill aims at a phase, by turns, and at a
random moment in it; the phase that it met stands beside it. The run itself knows nothing of phases:
it is started through `train_with_phases`, which notes when the functions of PHASES are entered and
left.
"""

import argparse
import collections
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import checkpoint
import train
from lab.common import LARGEST_SEED, command_line, whole, writable
from lab.sweep import ROOT

FLAGS = (
    *("--env", "SAPO/TextSum-v0", "--env_args", "n=1", "largest=99", "--max_new_tokens", "16"),
    *("--error_rate", "0.5", "--warm_start_steps", "60", "--batch", "16", "--minibatch", "8"),
    *("--iterations", "12", "--eval_every", "3", "--checkpoint_every", "2"),
    *("--eval_episodes", "32", "--actor_lr", "1e-3"),
)
FILE = ROOT / "results" / "kills.json"
WRITTEN_FROM = 50  # kills; of fewer, results/kills.json would say less than it does

# A phase of a run: the functions in which it passes. Within one of them the others count for it
PHASES = {
    "start": (),  # imports and models, until the first of the others
    "warm start": ("tiny.warm_start",),
    "rollout": ("rollout.collect",),
    "update": ("sapo.sapo_update",),
    "save": ("checkpoint.save",),
    "evaluation": ("evaluation.evaluate", "evaluation.by_decoding", "train.samples"),
    "finish": ("train.finish",),
}
BETWEEN = "between"  # the phases


# --------------------------------------------------------------------------- a run and its phases


def train_with_phases():
    """train.py in a process of its own, that appends to the file of its first argument when it
    comes into a phase: lines of the time and the phase."""
    file, *words = sys.argv[1:]
    inside = []

    def note(phase):
        with open(file, "a") as log:
            log.write(f"{time.time():.4f} {phase}\n")

    def noted(function, phase):
        @functools.wraps(function)
        def call(*args, **options):
            if inside:
                return function(*args, **options)
            inside.append(phase)
            note(phase)
            try:
                return function(*args, **options)
            finally:
                inside.pop()
                note(BETWEEN)

        return call

    note("start")
    import train  # late: it takes seconds, which belong to the start

    for phase, functions in PHASES.items():
        for name in functions:
            module, _, attribute = name.partition(".")
            module = importlib.import_module(module)
            setattr(module, attribute, noted(getattr(module, attribute), phase))
    train.main(words)


def phases_of(file) -> list[tuple[float, str]]:
    """What `train_with_phases` noted: (when, which phase began), in order."""
    whole, _, _ = Path(file).read_text().rpartition("\n")  # the last line may be half written
    return [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in whole.splitlines()]


def lengths(phases) -> dict[str, list[float]]:
    """{phase: how long it took, each time, in seconds} of a run that came to its end."""
    found = collections.defaultdict(list)
    for (began, phase), (ended, _) in zip(phases, phases[1:], strict=False):
        found[phase].append(ended - began)
    return found


CHILD = "from lab import kills; kills.train_with_phases()"


@dataclass
class Started:
    """A run that was started, by a process of its own."""

    process: subprocess.Popen
    folder: Path
    phases: Path  # the file of its phases
    said: Path  # the file of its errors

    def finish(self) -> None:
        """Wait for its end. RuntimeError where it fails."""
        if self.process.wait():
            raise RuntimeError(f"train.py: {self.said.read_text().strip()}")

    def wait_for(self, phase, times) -> bool:
        """Wait until it has come into a phase so many times. -> False where it ends before."""
        while self.process.poll() is None:
            if sum(name == phase for _, name in phases_of(self.phases)) >= times:
                return True
            time.sleep(0.002)
        return False

    def has_ended(self) -> bool:
        """Has it come to its end? Its summary is the last thing that it writes."""
        return (self.folder / "summary.json").is_file()

    def phase(self) -> str:
        """The one that it is in, or was killed in."""
        phases = phases_of(self.phases)
        return phases[-1][1] if phases else "start"


def start(runs, name) -> Started:
    """Start the run of this name, or go on with it where it has a checkpoint."""
    folder = Path(runs) / name
    begun = checkpoint.is_there(folder)
    words = ["--resume", str(folder)] if begun else [*FLAGS, "--runs", str(runs), "--name", name]
    phases, said = (Path(runs) / f"{name}.{what}" for what in ("phases", "said"))
    phases.write_text("")
    with open(said, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(phases), *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # two would wait for each other's cores
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    return Started(process, folder, phases, said)


# -------------------------------------------------------------------------- what it left, the same?


def outcome(folder) -> dict:
    """Everything that a run left but the times: its checkpoint, its metrics and its samples."""
    left = torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)
    left["progress"] = _without_times(left["progress"])
    left["policy"] = load_file(folder / "checkpoint" / "model.safetensors")
    for name in ("metrics", "samples"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        left[name] = [_without_times(json.loads(line)) for line in lines]
    return left


def _without_times(row):
    return {key: value for key, value in row.items() if not key.endswith("seconds")}


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------------------------------- to kill


def kill_at_random(runs, kills, seed, say=print) -> dict:
    """Kill runs `kills` times in all. -> what happened, and whether every ended run equals the
    uncut one. RuntimeError where a run fails that nobody killed."""
    rng = np.random.default_rng(seed)
    began = time.time()
    run = start(runs, "uncut")
    run.finish()
    seconds_uncut = time.time() - began
    uncut = outcome(Path(runs) / "uncut")
    uncut_lengths = lengths(phases_of(run.phases))

    killed, ended, all_equal = [], 0, True
    while len(killed) < kills:
        name = f"killed-{ended}"
        shutil.rmtree(Path(runs) / "cache")  # the warm start is among what is killed
        while True:
            run = start(runs, name)
            one = None
            if len(killed) < kills:
                one = kill(run, len(killed), uncut_lengths, rng)
            if one is None:
                run.finish()
                break
            file = Path(runs) / name / "metrics.jsonl"
            one["rows"] = len(file.read_text().splitlines()) if file.is_file() else 0
            killed.append(one)
            say(f"kill {len(killed)}: " + ", ".join(f"{key} {of}" for key, of in one.items()))
        ended += 1
        is_equal = equal(outcome(Path(runs) / name), uncut)
        all_equal = all_equal and is_equal
        say(f"{name} ended: {'equal' if is_equal else 'NOT equal'}")
    return {
        "kills": killed,
        "runs_ended": ended,
        "all_equal": all_equal,
        "seconds_uncut": seconds_uncut,
    }


def kill(run, number, uncut_lengths, rng) -> dict | None:
    """Kill a run at a random moment of the phase whose turn it is. -> by what, in which phase (that
    one, or the next where it has just ended), after how long; None where it came to its end.

    uncut_lengths: how long each phase took, each time, in a run that nobody killed.
    RuntimeError where it fails by itself.
    """
    began = time.time()
    aims = [phase for phase in PHASES if uncut_lengths[phase]]
    turn, place = divmod(number, len(aims))
    aim = aims[place]
    # By turns, and the other one when the phase's turn comes again
    kind = (signal.SIGKILL, signal.SIGTERM)[(turn + place) % 2]
    times = int(rng.integers(len(uncut_lengths[aim]))) + 1
    met = None
    while met != aim:  # it may have been over sooner than expected: then the next time
        if not run.wait_for(aim, times):
            return None
        time.sleep(float(rng.uniform(0, min(uncut_lengths[aim]))))
        met = run.phase()
        times += 1
    after = time.time() - began
    run.process.send_signal(kind)
    code = run.process.wait()
    if code == 0 and (kind is signal.SIGKILL or run.has_ended()):
        return None  # it came to its end first
    if code not in (-kind, 0, train.INTERRUPTED):
        raise RuntimeError(f"train.py: {run.said.read_text().strip()}")
    if kind is signal.SIGKILL:
        met = run.phase()  # no longer in doubt
    return {"signal": kind.name, "phase": met, "after": round(after, 1)}


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = command_line("kills", __doc__)
    parser.add_argument("--kills", type=whole(1), default=50)
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="of the moments")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line. Exit status 1 where a run differs."""
    arguments = parse(argv)
    if arguments.kills >= WRITTEN_FROM:
        writable(FILE)
    with tempfile.TemporaryDirectory() as runs:
        found = kill_at_random(Path(runs), arguments.kills, arguments.seed)
    heading = {
        "command": f"python -m lab.kills --kills {arguments.kills} --seed {arguments.seed}",
        "flags": " ".join(FLAGS),
        "date": time.strftime("%Y-%m-%d"),
    }
    if arguments.kills >= WRITTEN_FROM:
        checkpoint.write_json(FILE, heading | found)
        print(f"written to {FILE}")
    else:
        print(f"not written: {FILE.name} is for {WRITTEN_FROM} kills or more")
    met = collections.Counter(one["phase"] for one in found["kills"])
    print(", ".join(f"{count} in {phase}" for phase, count in met.items()))
    print(
        f"{len(found['kills'])} kills, {found['runs_ended']} runs ended, "
        f"{'all equal' if found['all_equal'] else 'NOT all equal'}"
    )
    sys.exit(not found["all_equal"])


if __name__ == "__main__":
    main()
