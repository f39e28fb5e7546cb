"""How fast is the mathematics? sapo.py against the same in loops over responses and segments.

The contest: cut ragged responses at the 30% of highest entropy; then advantages, returns, ratios.
Three kinds of loop: on slices of torch tensors, as one would write it in a trainer (of the loops
only this one can carry the ratio's gradient, or stay on a GPU); on slices of NumPy arrays; on lists
of Python floats, conversion from and to tensors included. All must give the same numbers.

Everyone has one thread, and what counts is its processor time, the best of several: so neither the
number of cores nor the machine's other work takes part.

Shapes: B responses, T tokens.
"""

import math
import time

import numpy as np
import torch

import sapo

GAMMA, LAM, TOP_K = 1.0, 0.99, 0.3


def make_batch(rows, tokens, seed, dtype=torch.float32):
    """Ragged responses with a reward each: the six tensors (B, T) of the contest.

    -> (rewards, values, logp, old_logp, entropy, mask), the arguments of every contestant.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(rows, tokens, generator=generator, dtype=dtype)

    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    entropy = uniform()
    rewards = torch.where(sapo.response_ends(mask), uniform().round(), 0.0)
    old_logp = -2 * uniform()
    values = uniform()
    logp = old_logp + 0.2 * (uniform() - 0.5)
    return rewards, values, logp, old_logp, entropy, mask


# ---------------------------------------------------------------------------- the contestants
# Each takes a batch and returns (advantages, returns, ratio), (B, T) each.


def by_sapo(rewards, values, logp, old_logp, entropy, mask):
    """The functions of sapo.py: Eq. 6 to 8 and 11."""
    ends = sapo.entropy_ends(entropy, mask, TOP_K)
    advantages, returns = sapo.segment_gae(rewards, values, ends, mask, GAMMA, LAM)
    return advantages, returns, sapo.segment_ratio(logp, old_logp, ends, mask)


def wanted(length):
    """How many of `length` tokens the cut takes."""
    return max(1, math.ceil(TOP_K * length - 1e-9))


def segments_backwards(ends):
    """The first and the last position of each segment of a response, the last segment first.

    ends: the positions that end one, in their order.
    """
    first, segments = 0, []
    for last in ends:
        segments.append((first, last))
        first = last + 1
    return reversed(segments)


def by_torch_slices(rewards, values, logp, old_logp, entropy, mask):
    """The same by loops over responses and segments, on slices of torch tensors."""
    advantages = torch.zeros_like(values)
    returns = torch.zeros_like(values)
    ratio = torch.ones_like(values)
    for b, length in enumerate(mask.sum(1).tolist()):
        by_entropy = entropy[b, :length].argsort(descending=True, stable=True)
        ends = sorted({*by_entropy[: wanted(length)].tolist(), length - 1})
        advantage = next_value = 0.0
        for first, last in segments_backwards(ends):
            z = slice(first, last + 1)
            value = values[b, first]
            delta = rewards[b, z].sum() + GAMMA * next_value - value
            advantage = delta + GAMMA * LAM * advantage
            advantages[b, z] = advantage
            returns[b, z] = advantage + value
            ratio[b, z] = (logp[b, z] - old_logp[b, z]).clamp(-20, 20).mean().exp()
            next_value = value
    return advantages, returns, ratio


def by_numpy_slices(*batch):
    """The same loops on slices of NumPy arrays."""
    rewards, values, logp, old_logp, entropy, mask = (tensor.numpy() for tensor in batch)
    advantages = np.zeros_like(values)
    returns = np.zeros_like(values)
    ratio = np.ones_like(values)
    for b, length in enumerate(mask.sum(1)):
        by_entropy = (-entropy[b, :length]).argsort(kind="stable")
        ends = np.union1d(by_entropy[: wanted(length)], length - 1).tolist()
        advantage = next_value = 0.0
        for first, last in segments_backwards(ends):
            z = slice(first, last + 1)
            value = values[b, first]
            delta = rewards[b, z].sum() + GAMMA * next_value - value
            advantage = delta + GAMMA * LAM * advantage
            advantages[b, z] = advantage
            returns[b, z] = advantage + value
            ratio[b, z] = np.exp((logp[b, z] - old_logp[b, z]).clip(-20, 20).mean())
            next_value = value
    return torch.from_numpy(advantages), torch.from_numpy(returns), torch.from_numpy(ratio)


def by_python_floats(*batch):
    """The same loops on lists of Python floats."""
    lists = [tensor.tolist() for tensor in batch]
    responses = [_one_response_in_floats(*rows) for rows in zip(*lists, strict=True)]
    columns = zip(*responses, strict=True)  # B triples -> three lists of B rows
    return tuple(torch.tensor(rows, dtype=batch[0].dtype) for rows in columns)


def _one_response_in_floats(rewards, values, logp, old_logp, entropy, mask):
    """(advantages, returns, ratio) of one response, lists of T floats each."""
    length = sum(mask)
    by_entropy = sorted(range(length), key=lambda t: -entropy[t])  # sorting is stable
    ends = sorted({*by_entropy[: wanted(length)], length - 1})
    advantages, returns, ratio = [0.0] * len(mask), [0.0] * len(mask), [1.0] * len(mask)
    advantage = next_value = 0.0
    for first, last in segments_backwards(ends):
        segment = range(first, last + 1)
        value = values[first]
        delta = sum(rewards[first : last + 1]) + GAMMA * next_value - value
        advantage = delta + GAMMA * LAM * advantage
        log_ratios = [max(-20.0, min(20.0, logp[t] - old_logp[t])) for t in segment]
        mean = sum(log_ratios) / len(segment)
        for t in segment:
            advantages[t] = advantage
            returns[t] = advantage + value
            ratio[t] = math.exp(mean)
        next_value = value
    return advantages, returns, ratio


LOOPS = {
    "torch slices": by_torch_slices,
    "numpy slices": by_numpy_slices,
    "python floats": by_python_floats,
}


# -------------------------------------------------------------------------------- the contest
def processor_seconds(function, batch):
    """(CPU seconds, result) of one call."""
    start = time.process_time()
    result = function(*batch)
    return time.process_time() - start, result


def race(rows, tokens, repeats, seed):
    """Everyone in turn, `repeats` times, sapo.py before each loop.

    -> (the best CPU seconds of each, the largest difference of each loop's numbers from sapo.py's).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = make_batch(rows, tokens, seed)
    expected = by_sapo(*batch)  # also warms up
    times = {name: [] for name in ("sapo.py", *LOOPS)}
    differences = {}
    for _ in range(repeats):
        for name, loop in LOOPS.items():
            seconds, _ = processor_seconds(by_sapo, batch)
            times["sapo.py"].append(seconds)
            seconds, result = processor_seconds(loop, batch)
            times[name].append(seconds)
            pairs = zip(expected, result, strict=True)
            differences[name] = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    torch.set_num_threads(threads)
    return {name: min(seconds) for name, seconds in times.items()}, differences


def measure(rows=512, tokens=2048, repeats=3, seed=0) -> dict:
    """Race and print. -> what results/bench_math.json holds."""
    times, differences = race(rows, tokens, repeats, seed)
    ratios = {name: times[name] / times["sapo.py"] for name in LOOPS}
    print(f"cut, segment_gae and segment_ratio, ({rows}, {tokens}): processor time, one thread")
    print(f"{'sapo.py':14} {1000 * times['sapo.py']:10.1f} ms")
    for name in LOOPS:
        print(
            f"{name:14} {1000 * times[name]:10.1f} ms   {ratios[name]:6.1f} times slower   "
            f"largest difference {differences[name]:.1g}"
        )
    return {
        "what": "Processor seconds on one thread (best of several) for the cut, advantages, "
        "returns and ratios, by sapo.py and by loops over responses and segments, and how much "
        "slower the loops are.",
        "seeds": [seed],
        "seconds": times,
        "ratio": ratios,
        "largest_difference": differences,
    }
