"""Hypothesis strategies for batches of responses: small, in float64, of magnitudes at which the
identities hold to rounding.

A mask drawn here has holes, rows without any policy token and rows of one. A cut is any set of
policy tokens, with or without the last token of a response. Off the mask stand ordinary numbers: a
function that reads them is found out.
"""

from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from plain_loops import always_ends, cut_at, policy_positions

MAX_ROWS, MAX_TOKENS = 4, 8

numbers = st.floats(-3, 3, allow_subnormal=False)
discounts = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, allow_subnormal=False)
shares = st.sampled_from([0.1, 0.28, 0.3, 0.5, 1.0]) | st.floats(0.01, 1)  # top_k
value_places = st.sampled_from(["start", "end"])  # value_at
averages = st.sampled_from(["response", "token"])
seeds = st.integers(0, 2**31 - 1)


@st.composite
def tensors(draw, rows, tokens, elements=numbers):
    """A (rows, tokens) tensor of `elements`: float64, or bool if those are booleans."""
    flat = draw(st.lists(elements, min_size=rows * tokens, max_size=rows * tokens))
    dtype = torch.bool if isinstance(flat[0], bool) else torch.float64
    return torch.tensor(flat, dtype=dtype).view(rows, tokens)


@st.composite
def masks(draw, min_tokens=1, max_tokens=MAX_TOKENS, holes=True, empty_rows=True):
    """A mask (B, T): right-padded lengths, any of them 0 with `empty_rows`; with `holes`, gaps."""
    rows = draw(st.integers(1, MAX_ROWS))
    tokens = draw(st.integers(min_tokens, max_tokens))
    shortest = 0 if empty_rows else 1
    lengths = draw(st.lists(st.integers(shortest, tokens), min_size=rows, max_size=rows))
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    if holes and draw(st.booleans()):
        mask = mask & draw(tensors(rows, tokens, st.booleans()))
    return mask


@st.composite
def cuts(draw, mask):
    """Any set of the mask's tokens: half of the time the last ones of each response are in it."""
    ends = mask & draw(tensors(*mask.shape, st.booleans()))
    if draw(st.booleans()):
        ends = ends | cut_at(always_ends(mask), mask)
    return ends


@st.composite
def batches(draw, *names, cut="any", **options):
    """A namespace with `mask`, a cut `ends`, and a float tensor (B, T) for each name.

    cut: "any" set of policy tokens, or "token" or "response" for those two cuts. options: those of
    `masks`.
    """
    mask = draw(masks(**options))
    if cut == "token":
        ends = cut_at(policy_positions(mask), mask)
    elif cut == "response":
        ends = cut_at(always_ends(mask), mask)
    else:
        ends = draw(cuts(mask))
    batch = SimpleNamespace(mask=mask, ends=ends)
    for name in names:
        setattr(batch, name, draw(tensors(*mask.shape)))
    return batch
