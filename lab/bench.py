"""How fast, and how much memory: as ratios within one run.

    python -m lab.bench                          # the mathematics at (512, 2048)
    python -m lab.bench --batch 64 --tokens 512  # another size, printed only
    python -m lab.bench memory                   # scoring at a vocabulary of 151,936
    python -m lab.bench iteration                # SAPO, GRPO and TRL's GRPO
    python -m lab.bench turns                    # worlds that answer, in 1, 5 and 20 turns
    python -m lab.bench tokens                   # is the cost linear in the tokens?
    python -m lab.bench gpu                      # true sizes, random weights, a CUDA card
    python -m lab.bench gpu --small              # narrow models, with or without one, printed only

They write results/bench_<what>.json, and gpu.json. What each measures, and how, stands at the head
of lab/bench_<what>.py.
"""

import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch

from lab.common import LARGEST_SEED, command_line, whole, writable

RESULTS = Path(__file__).parent.parent / "results"
FILES = {
    "math": "bench_math.json",
    "memory": "bench_memory.json",
    "iteration": "bench_iteration.json",
    "turns": "bench_turns.json",
    "tokens": "bench_tokens.json",
    "gpu": "gpu.json",
}


def main(argv=None) -> dict:
    """The command line: measure, print, write the outcome. -> the outcome."""
    parser = command_line("bench", __doc__)
    parser.add_argument("what", nargs="?", default="math", choices=list(FILES))
    parser.add_argument("--batch", type=whole(1), default=512, help="math: responses")
    parser.add_argument(
        "--tokens", type=whole(1), default=2048, help="math: tokens of the longest one"
    )
    parser.add_argument(
        "--repeats", type=whole(1), default=3, help="math: rounds; the best times count"
    )
    parser.add_argument("--small", action="store_true", help="gpu: narrow models, on a CPU too")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="math: of the batch")
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write (default: in results/; nowhere for another --batch or --tokens)",
    )
    args = parser.parse_args(argv)
    if args.small and args.what != "gpu":
        parser.error(f"--small: of the gpu measurement alone, not of {args.what}")
    command = "python -m lab.bench"
    if args.what == "math":
        command += f" --batch {args.batch} --tokens {args.tokens}"
        command += f" --repeats {args.repeats} --seed {args.seed}"
    else:
        command += f" {args.what}" + " --small" * args.small
    is_usual = (args.batch, args.tokens) == (512, 2048) or args.what != "math"
    file = args.out
    if file is None and is_usual and not args.small:
        file = RESULTS / FILES[args.what]

    def keep(so_far):
        if file:
            save(file, so_far, command)

    try:
        if file:
            writable(file)
        outcome = measure(args, keep)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{command}: {error}") from None
    keep(outcome)
    if file:
        print(f"written to {file}")
    return outcome


def measure(args, keep) -> dict:
    """Take the measurement called `args.what`. Each module is imported only when it is wanted.

    keep(outcome): called with what there is so far, by the measurement that takes long.
    """
    if args.what == "math":
        from lab import bench_math

        return bench_math.measure(args.batch, args.tokens, args.repeats, args.seed)
    if args.what == "memory":
        from lab import bench_memory

        return bench_memory.measure()
    if args.what == "iteration":
        from lab import bench_iteration

        return bench_iteration.measure()
    if args.what == "turns":
        from lab import bench_turns

        return bench_turns.measure()
    if args.what == "tokens":
        from lab import bench_tokens

        return bench_tokens.measure()
    from lab import bench_gpu

    return bench_gpu.small() if args.small else bench_gpu.measure(keep=keep)


def save(file, outcome, command):
    """Write an outcome with what made it."""
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        **outcome.get("versions", {}),
    }
    made = {"command": command, "date": date.today().isoformat()}
    import checkpoint  # not above: it brings transformers, whose memory would be measured too

    checkpoint.write_json(file, made | outcome | {"versions": versions})


if __name__ == "__main__":
    main()
