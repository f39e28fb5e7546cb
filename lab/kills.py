"""Kill a run again and again at random moments: does it end where an uncut one ends?

    python -m lab.kills                  # 50 kills -> results/kills.json
    python -m lab.kills --kills 5

A short run of SAPO is started, killed (SIGKILL, and by turns SIGTERM, which lets it save) after a
random time, and resumed (or begun again, where it has no checkpoint yet), until it has come to its
end; then the next one begins, until there were as many kills as asked for. Whatever was killed
(imports, warm start, rollout, update, save, evaluation), each ended run must equal the uncut one
bit for bit: its weights, its optimizers, its metrics and samples, without the times in them.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lab.sweep import ROOT

FLAGS = (
    *("--env", "SAPO/TextSum-v0", "--env_args", "n=1", "largest=99", "--max_new_tokens", "16"),
    *("--error_rate", "0.5", "--warm_start_steps", "60", "--batch", "16", "--minibatch", "8"),
    *("--iterations", "12", "--eval_every", "3", "--checkpoint_every", "2"),
    *("--eval_episodes", "32", "--actor_lr", "1e-3"),
)
CHECKPOINTS = ("checkpoint", "checkpoint.old")


def start(runs, name):
    """Start the run of this name, or go on with it where it has a checkpoint. -> the process"""
    folder = Path(runs) / name
    begun = any((folder / which / "trainer.pt").is_file() for which in CHECKPOINTS)
    words = ["--resume", str(folder)] if begun else [*FLAGS, "--runs", str(runs), "--name", name]
    return subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # two threads would wait for each other's cores
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def kill_at_random(runs, kills, seed, say=print) -> dict:
    """Kill runs `kills` times in all. -> what happened, and whether every ended run equals the
    uncut one. RuntimeError where a run fails that nobody killed."""
    rng = np.random.default_rng(seed)
    began = time.time()
    finish(start(runs, "uncut"))
    length = time.time() - began
    uncut = outcome(Path(runs) / "uncut")

    killed, ended, all_equal = [], 0, True
    while len(killed) < kills:
        name = f"killed-{ended}"
        shutil.rmtree(Path(runs) / "cache")  # the warm start is among what is killed
        while True:
            process = start(runs, name)
            delay = float(rng.uniform(0, length)) if len(killed) < kills else None
            try:
                finish(process, delay)
                break
            except subprocess.TimeoutExpired:
                kind = (signal.SIGKILL, signal.SIGTERM)[len(killed) % 2]
                process.send_signal(kind)
                _, said = process.communicate()
                if process.returncode == 0 and kind is signal.SIGKILL:
                    break  # it came to its end first
                if process.returncode not in (-kind, 0):
                    raise RuntimeError(f"{name}: {said.strip()}") from None
                folder = Path(runs) / name
                rows = 0
                if (folder / "metrics.jsonl").is_file():
                    rows = len((folder / "metrics.jsonl").read_text().splitlines())
                killed.append({"signal": kind.name, "after": round(delay, 1), "rows": rows})
                say(f"kill {len(killed)}: {kind.name} after {delay:.1f} s, {rows} rows of metrics")
        ended += 1
        is_equal = equal(outcome(Path(runs) / name), uncut)
        all_equal = all_equal and is_equal
        say(f"{name} ended: {'equal' if is_equal else 'NOT equal'}")
    return {"kills": killed, "runs_ended": ended, "all_equal": all_equal, "seconds_uncut": length}


def finish(process, seconds=None):
    """Wait for a run to end. subprocess.TimeoutExpired where it takes longer; RuntimeError where it
    fails."""
    _, said = process.communicate(timeout=seconds)
    if process.returncode:
        raise RuntimeError(f"train.py: {said.strip()}")


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = argparse.ArgumentParser("python -m lab.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    if arguments.kills < 1:
        parser.error(f"--kills {arguments.kills}: expected at least 1")
    return arguments


def main(argv=None):
    """The command line. Exit status 1 where a run differs."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as runs:
        found = kill_at_random(Path(runs), arguments.kills, arguments.seed)
    heading = {
        "command": f"python -m lab.kills --kills {arguments.kills} --seed {arguments.seed}",
        "flags": " ".join(FLAGS),
        "date": time.strftime("%Y-%m-%d"),
    }
    file = ROOT / "results" / "kills.json"
    file.write_text(json.dumps(heading | found, indent=1) + "\n")
    print(
        f"{len(found['kills'])} kills, {found['runs_ended']} runs ended, "
        f"{'all equal' if found['all_equal'] else 'NOT all equal'}"
    )
    sys.exit(not found["all_equal"])


if __name__ == "__main__":
    main()
