"""How often does the CPU wait for the card? -> results/pretended_card.json.

    PYTHONPATH=. python tests/count_syncs.py                     # keeps what was before
    PYTHONPATH=. python tests/count_syncs.py --before 6fc4806    # counts at that commit, too

Counted on the pretended card, in one iteration of the default run and in its samples for
samples.jsonl, with 16 responses of 64 tokens each: the model is untrained, so hardly one ends
early. What transformers waits for counts for our line that called it.
"""

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
import transformers
from pretended_card import ROOT, PretendedCard

import evaluation
import rollout
import train

FLAGS = ["--device", "cuda", "--batch", "16", "--warm_start_steps", "0"]
SHOWN = 12  # lines of each part in the file, those that wait most


def measure(*flags) -> dict:
    """The waits of one iteration, and of one call of train.samples and of evaluation.samples."""
    with tempfile.TemporaryDirectory() as folder, PretendedCard() as card:
        run = train.build(*train.parse([*FLAGS, "--runs", folder, *flags]))
        batch = rollout.collect(run, evaluation.sample_indices(run.settings), "eval")
        credit = train.assign_credit(run, batch)
        parts = {
            "iteration": lambda: train.iterate(run),
            "train.samples": lambda: train.samples(run),
            "evaluation.samples": lambda: evaluation.samples(run, batch, credit.advantages),
        }
        counts = {}
        for name, part in parts.items():
            card.syncs.clear()
            torch.manual_seed(0)
            part()
            lines = card.syncs.most_common(SHOWN)
            counts[name] = {
                "to host": card.counted("to host"),
                "to card": card.counted("to card"),
                "lines": {f"{line}, {way}": number for (line, way), number in lines},
            }
    return counts


def measure_at(commit) -> dict:
    """`measure` in another commit's code."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        for name in ("pretended_card.py", "count_syncs.py"):
            (Path(folder) / "tests" / name).write_text((ROOT / "tests" / name).read_text())
        code = "import json, count_syncs; print(json.dumps(count_syncs.measure()))"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,  # from where -c imports first
            env={**os.environ, "PYTHONPATH": f"{folder}/tests"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return json.loads(ran.stdout.splitlines()[-1])


def main(argv=None):
    """Count, and write the file."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("python tests/count_syncs.py", description=main.__doc__)
    parser.add_argument("--before", help="a commit to compare with")
    commit = parser.parse_args(argv).before
    file = ROOT / "results" / "pretended_card.json"
    if commit:
        before = {"before_commit": commit, "before": measure_at(commit)}
    else:
        stored = json.loads(file.read_text())
        before = {name: stored[name] for name in ("before_commit", "before")}
    outcome = {
        "command": "PYTHONPATH=. " + shlex.join(["python", "tests/count_syncs.py", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "flags": shlex.join(FLAGS),
        **before,
        "after": measure(),
    }
    file.write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main()
