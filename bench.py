"""How fast is the mathematics, as ratios within one run.

    python bench.py                             # (512, 2048), as the paper trains; writes results/bench_math.json
    python bench.py --batch 64 --tokens 512     # another size, printed only

The contest: advantages, returns and ratios of ragged responses, cut at the 30% of highest entropy, by sapo.py
and by loops over responses and their segments. Three kinds of loop: on slices of torch tensors, as one would write it
in a trainer (of the loops only this one can carry the ratio's gradient, or stay on a GPU); on slices of NumPy arrays;
on lists of Python floats, conversion from and to tensors included. All must give the same numbers.

Everyone has one thread, and what counts is its processor time, the best of several: so neither the number of cores nor
the machine's other work takes part.
"""

import argparse
import json
import math
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

import sapo

GAMMA, LAM = 1.0, 0.99


def make_batch(rows, tokens, seed, dtype=torch.float32):
    """Ragged responses with a reward each, cut at the 30% of highest entropy: the six tensors (B, T) of the contest."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(rows, tokens, generator=generator, dtype=dtype)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    ends = sapo.entropy_ends(uniform(), mask, 0.3)
    rewards = torch.where(sapo.response_ends(mask), uniform().round(), 0.0)
    old_logp = -2 * uniform()
    return rewards, uniform(), old_logp + 0.2 * (uniform() - 0.5), old_logp, ends, mask


def by_sapo(rewards, values, logp, old_logp, ends, mask):
    """(advantages, returns, ratios), (B, T) each."""
    return (*sapo.segment_gae(rewards, values, ends, mask, GAMMA, LAM), sapo.segment_ratio(logp, old_logp, ends, mask))


# --------------------------------------------------------------------------------- the same in loops, in three dialects
def segments_backwards(ends):
    """The first and the last position of each segment of a response, the last segment first."""
    first, found = 0, []
    for last in ends:
        found.append((first, last))
        first = last + 1
    return reversed(found)


def by_torch_slices(rewards, values, logp, old_logp, ends, mask):
    """Advantages and ratios by loops over responses and segments, on slices of torch tensors."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    ratio = torch.ones_like(values)
    for b in range(len(mask)):
        advantage = next_value = 0.0
        for first, last in segments_backwards(ends[b].nonzero()[:, 0].tolist()):
            z = slice(first, last + 1)
            value = values[b, first]
            advantage = rewards[b, z].sum() + GAMMA * next_value - value + GAMMA * LAM * advantage
            advantages[b, z], returns[b, z] = advantage, advantage + value
            ratio[b, z] = (logp[b, z] - old_logp[b, z]).clamp(-20, 20).mean().exp()
            next_value = value
    return advantages, returns, ratio


def by_numpy_slices(*batch):
    """The same loops on slices of NumPy arrays."""
    rewards, values, logp, old_logp, ends, mask = (x.numpy() for x in batch)
    advantages, returns, ratio = np.zeros_like(values), np.zeros_like(values), np.ones_like(values)
    for b in range(len(mask)):
        advantage = next_value = 0.0
        for first, last in segments_backwards(np.flatnonzero(ends[b]).tolist()):
            z = slice(first, last + 1)
            value = values[b, first]
            advantage = rewards[b, z].sum() + GAMMA * next_value - value + GAMMA * LAM * advantage
            advantages[b, z], returns[b, z] = advantage, advantage + value
            ratio[b, z] = np.exp((logp[b, z] - old_logp[b, z]).clip(-20, 20).mean())
            next_value = value
    return torch.from_numpy(advantages), torch.from_numpy(returns), torch.from_numpy(ratio)


def by_python_floats(*batch):
    """The same loops on lists of Python floats."""
    tokens, advantages, returns, ratio = batch[0].shape[1], [], [], []
    for rewards, values, logp, old_logp, ends, _ in zip(*(x.tolist() for x in batch), strict=True):
        a, r, s = [0.0] * tokens, [0.0] * tokens, [1.0] * tokens
        advantage = next_value = 0.0
        for first, last in segments_backwards([t for t, end in enumerate(ends) if end]):
            value, length = values[first], last + 1 - first
            advantage = sum(rewards[first:last + 1]) + GAMMA * next_value - value + GAMMA * LAM * advantage
            mean = sum(max(-20.0, min(20.0, logp[t] - old_logp[t])) for t in range(first, last + 1)) / length
            for t in range(first, last + 1):
                a[t], r[t], s[t] = advantage, advantage + value, math.exp(mean)
            next_value = value
        advantages, returns, ratio = [*advantages, a], [*returns, r], [*ratio, s]
    return tuple(torch.tensor(x, dtype=batch[0].dtype) for x in (advantages, returns, ratio))


LOOPS = {"torch slices": by_torch_slices, "numpy slices": by_numpy_slices, "python floats": by_python_floats}


# ---------------------------------------------------------------------------------------------------------- the contest
def seconds(function, batch):
    """(CPU seconds, result) of one call."""
    start = time.process_time()
    result = function(*batch)
    return time.process_time() - start, result


def race(rows, tokens, repeats, seed):
    """Everyone in turn, `repeats` times (sapo.py before each loop): the best time of each, and how far numbers differ.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = make_batch(rows, tokens, seed)
    expected = by_sapo(*batch)  # also warms up
    times, differences = {name: [] for name in ("sapo.py", *LOOPS)}, {}
    for _ in range(repeats):
        for name, loop in LOOPS.items():
            times["sapo.py"].append(seconds(by_sapo, batch)[0])
            taken, found = seconds(loop, batch)
            times[name].append(taken)
            differences[name] = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
    torch.set_num_threads(threads)
    return {name: min(x) for name, x in times.items()}, differences


def main(arguments=None):
    """The command line: measure, check that all agree, print, write the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=512, help="responses")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the longest response")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the race; the best times count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the result (default: results/bench_math.json, for the "
                                                 "default batch only)")
    args = parser.parse_args(arguments)
    usual = (args.batch, args.tokens) == (parser.get_default("batch"), parser.get_default("tokens"))
    out = args.out or (Path(__file__).parent / "results" / "bench_math.json" if usual else None)

    times, differences = race(args.batch, args.tokens, args.repeats, args.seed)
    print(f"segment_gae and segment_ratio, ({args.batch}, {args.tokens}), 30% cut: processor time, one thread")
    ratios = {name: times[name] / times["sapo.py"] for name in LOOPS}
    print(f"{'sapo.py':14} {1000 * times['sapo.py']:10.1f} ms")
    for name in LOOPS:
        print(f"{name:14} {1000 * times[name]:10.1f} ms   {ratios[name]:6.1f} times slower   largest difference "
              f"{differences[name]:.1g}")
    if out:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({
            "what": "Processor seconds on one thread (best of several) for advantages, returns and ratios, by sapo.py "
                    "and by loops over responses and segments, and how many times slower the loops are.",
            "command": "python bench.py " + " ".join(f"--{name} {getattr(args, name)}"
                                                     for name in ("batch", "tokens", "repeats", "seed")),
            "date": date.today().isoformat(), "seeds": [args.seed],
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
            "seconds": times, "ratio": ratios, "largest_difference": differences}, indent=1) + "\n")
        print(f"written to {out}")
    return times, ratios, differences


if __name__ == "__main__":
    main()
