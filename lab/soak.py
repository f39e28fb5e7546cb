"""A long run, watched from outside: do memory, open files or the time of an iteration grow?

    python -m lab.soak                  # an hour -> results/soak.json
    python -m lab.soak --minutes 5      # printed only

A small SAPO run is started whose iterations never come to an end, with an evaluation, samples and a
checkpoint every 50 of them. Every few seconds its resident memory, its open files, its threads and
its CPU time are read from /proc (so: on Linux), and how far it has come from metrics.jsonl. An
iteration's time is that of the CPU, so that other work on the machine does not count. At the end
the run gets SIGTERM, saves, and must leave without an error.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import checkpoint
from lab.common import command_line, writable
from lab.sweep import ROOT

FLAGS = (
    *("--env", "SAPO/TextSum-v0", "--env_args", "n=2", "--max_new_tokens", "24"),
    *("--warm_start_steps", "300", "--batch", "16", "--minibatch", "8", "--actor_lr", "1e-5"),
    *("--eval_every", "50", "--eval_episodes", "64", "--checkpoint_every", "50"),
    *("--iterations", "1000000"),
)
LONG = 60  # minutes from which on the outcome is written into the results
SETTLED = 0.2  # of the time: before it caches fill, and growth says nothing


def seen(process, metrics) -> dict:
    """What /proc and the run's own log say of a process at this moment."""
    proc = Path("/proc") / str(process.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    # behind the name, which may hold blanks: user and system time are the 12th and 13th field
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    iterations = metrics.read_bytes().count(b"\n") - 1 if metrics.is_file() else 0
    return {
        "iterations": max(0, iterations),  # the first line is the evaluation before training
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "cpu_seconds": ticks / os.sysconf("SC_CLK_TCK"),
    }


def watch(runs, minutes, every=10.0) -> tuple[list[dict], int]:
    """Run for so many minutes from the first iteration on, and look every so many seconds.
    -> (what was seen, each with its "minute"; the run's exit status).

    Raises RuntimeError, with what the run said, where it ends by itself."""
    command = [sys.executable, "train.py", *FLAGS, "--runs", str(runs), "--name", "soak"]
    metrics = Path(runs) / "soak" / "metrics.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        try:
            start, looks = None, []
            while start is None or time.time() - start < 60 * minutes:
                time.sleep(every if start else 0.5)
                try:
                    look = seen(process, metrics)
                except (OSError, KeyError):  # it has ended, or is just ending
                    process.wait()
                    said.seek(0)
                    raise RuntimeError(f"the run ended by itself:\n{said.read()[-2000:]}") from None
                if start is None and look["iterations"] > 0:
                    start = time.time()
                if start is not None:
                    looks.append({"minute": (time.time() - start) / 60, **look})
            process.send_signal(signal.SIGTERM)
            return looks, process.wait(timeout=600)
        finally:
            if process.poll() is None:
                process.kill()


def growth(looks) -> dict:
    """What grew, from when the run had settled on: slopes of straight lines through all looks."""
    settled = [look for look in looks if look["minute"] >= SETTLED * looks[-1]["minute"]]
    minutes = np.array([look["minute"] for look in settled])

    def per_hour(name):
        return float(60 * np.polyfit(minutes, [look[name] for look in settled], 1)[0])

    def of_an_iteration(some):
        """CPU seconds of each iteration between the first and the last of some looks."""
        iterations = some[-1]["iterations"] - some[0]["iterations"]
        return (some[-1]["cpu_seconds"] - some[0]["cpu_seconds"]) / iterations

    half = len(settled) // 2
    return {
        "rss_mb_per_hour": per_hour("rss_mb"),
        "open_files_per_hour": per_hour("open_files"),
        "threads_per_hour": per_hour("threads"),
        "cpu_seconds_of_an_iteration": {
            "first half": of_an_iteration(settled[: half + 1]),
            "second half": of_an_iteration(settled[half:]),
        },
    }


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = command_line("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=float(LONG), help="2 or more")
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.minutes < math.inf:
        parser.error(
            f"--minutes {arguments.minutes}: expected at least 2, to see growth, and an end"
        )
    return arguments


def main(argv=None):
    """Watch a run, and say what grew. Exit status 1 where the run did not leave in order."""
    argv = sys.argv[1:] if argv is None else argv
    minutes = parse(argv).minutes
    file = ROOT / "results" / "soak.json"
    if minutes >= LONG:
        writable(file)
    with tempfile.TemporaryDirectory() as runs:
        looks, status = watch(runs, minutes)
    outcome = {
        "command": shlex.join(["python", "-m", "lab.soak", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "flags": shlex.join(FLAGS),
        "exit_status": status,
        "growth": growth(looks),
        "looks": looks[:: max(1, len(looks) // 60)],
    }
    if minutes >= LONG and status == 0:
        checkpoint.write_json(file, outcome)
    print(checkpoint.as_json(outcome, indent=1))
    sys.exit(status != 0)


if __name__ == "__main__":
    main()
