"""Random batches of responses, and plain loops over them, to hold sapo.py's functions against.

Slow, and meant to be checked by reading. Shapes as in sapo.py: B responses, T token positions.
"""

import math
from types import SimpleNamespace

import torch

import sapo


def exact(actual, expected):
    """Equal but for rounding, in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------- random batches


def random_batch(seed, rows=8, tokens=10):
    """Responses of every kind, with all that a function of sapo.py may ask for, (B, T) each.

    Rows 0, 1 and 2 are a full response, one of one token and an empty one; rows 4 to 7 have holes.
    The cut closes the responses of even rows, others it may leave open. In row 5 an end stands on
    every token off the mask: it parts the segments around a hole and makes none of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(rows, tokens, generator=generator)

    def normal():
        return torch.randn(rows, tokens, dtype=torch.float64, generator=generator)

    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[:3] = torch.tensor([tokens, 1, 0])
    mask = torch.arange(tokens) < lengths[:, None]
    mask[4:] &= uniform()[4:] < 0.75
    ends = mask & (uniform() < 0.35)
    ends[5] |= ~mask[5]
    ends[::2] |= cut_at(always_ends(mask), mask)[::2]

    batch = SimpleNamespace(mask=mask, ends=ends)
    for name in ("rewards", "values", "old_values", "x", "advantages", "returns"):
        setattr(batch, name, normal())
    batch.old_logp = -3 * uniform().double()
    batch.entropy = (8 * uniform()).floor().double() / 4  # eight levels: with ties
    batch.logp = batch.old_logp + 0.4 * normal()
    batch.ratio = torch.exp(0.5 * normal())
    batch.is_delimiter = uniform() < 0.3
    return batch


def random_rollout(seed=0, **fields):
    """The same responses as a closed sapo.Rollout, the empty one last; `fields` replace its own."""
    batch = random_batch(seed)
    order = [0, 1, 3, 4, 5, 6, 7, 2]
    mask = batch.mask[order]
    ends = batch.ends[order] | cut_at(always_ends(mask), mask)
    numbers = {"rewards": batch.rewards[order], "values": batch.values[order]}
    defaults = {"mask": mask, "ends": ends, "logp": batch.old_logp[order], **numbers}
    return sapo.Rollout(**defaults | fields)


# -------------------------------------------------------------------------------- plain loops


def policy_positions(mask):
    """For each response, the positions of its policy tokens."""
    return [[t for t, is_policy in enumerate(row) if is_policy] for row in mask.tolist()]


def on_policy(tensor, mask):
    """The numbers of (B, T) that stand on policy tokens, row by row, as a list."""
    return [tensor[b, t].item() for b, row in enumerate(policy_positions(mask)) for t in row]


def always_ends(mask):
    """For each response, the policy tokens with no policy token right behind them."""
    return [[t for t in row if t + 1 not in row] for row in policy_positions(mask)]


def top_positions(policy, entropy, top_k):
    """The share top_k of a response's policy tokens, at least one, that has the highest entropy.

    policy: their positions; entropy (T,). Ties: the earlier token.
    """
    ranked = sorted(policy, key=lambda t: (-entropy[t].item(), t))
    return ranked[: max(1, math.ceil(top_k * len(policy) - 1e-9))]


def cut_at(positions, mask):
    """A cut, bool (B, T), from a list of positions for each response."""
    ends = torch.zeros_like(mask)
    for b, row in enumerate(positions):
        for t in row:
            ends[b, t] = True
    return ends


def segments(ends, mask):
    """For each response its segments in the order of the text, each a list of policy positions."""
    responses = []
    for row_ends, row_mask in zip(ends.tolist(), mask.tolist(), strict=True):
        closed, segment = [], []
        for t, (is_end, is_policy) in enumerate(zip(row_ends, row_mask, strict=True)):
            if is_policy:
                segment.append(t)
            if is_end and segment:
                closed.append(segment)
                segment = []
        if segment:
            closed.append(segment)
        responses.append(closed)
    return responses


def read_at(segment, value_at):
    """The position at which V(s_m) is read."""
    return segment[0] if value_at == "start" else segment[-1]


def to_tokens(per_segment, ends, mask, off=0.0):
    """(B, T) float64: each segment's number on its tokens, `off` elsewhere.

    per_segment: a list of numbers for each response, one for each of its segments.
    """
    tokens = torch.full(mask.shape, off, dtype=torch.float64)
    for b, row in enumerate(segments(ends, mask)):
        for segment, number in zip(row, per_segment[b], strict=True):
            for t in segment:
                tokens[b, t] = number
    return tokens


def mean_of(terms, average):
    """The mean of a list of terms per response: of each response first, then of all responses
    ("response"), or of all terms ("token"). An empty response counts as 0."""
    if average == "response":
        return sum(sum(row) / max(len(row), 1) for row in terms) / len(terms)
    return sum(sum(row) for row in terms) / sum(len(row) for row in terms)
