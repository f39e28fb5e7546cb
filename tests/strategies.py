"""Hypothesis strategies for batches of responses: small, in float64, of magnitudes at which the identities are exact.

A mask drawn here has holes, rows without any policy token and rows of one; a cut is any set of policy tokens, with or
without the last token of a response. Off the mask stand ordinary numbers: a function that reads them is found out.
"""

from types import SimpleNamespace

import torch
from hypothesis import strategies as st

MAX_ROWS, MAX_TOKENS = 4, 8
numbers = st.floats(-3, 3, allow_subnormal=False)
discounts = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, allow_subnormal=False))
shares = st.one_of(st.sampled_from([0.1, 0.28, 0.3, 0.5, 1.0]), st.floats(0.01, 1))  # top_k
sides = st.sampled_from(["start", "end"])                                            # value_at
averages = st.sampled_from(["response", "token"])
seeds = st.integers(0, 2**31 - 1)


@st.composite
def tensors(draw, rows, tokens, elements=numbers):
    """A (rows, tokens) tensor of `elements`: float64, or bool if those are booleans."""
    flat = draw(st.lists(elements, min_size=rows * tokens, max_size=rows * tokens))
    return torch.tensor(flat, dtype=None if isinstance(flat[0], bool) else torch.float64).view(rows, tokens)


@st.composite
def masks(draw, min_tokens=1, max_tokens=MAX_TOKENS, holes=True, empty_rows=True):
    """A mask (B, T): right-padded lengths, any of them 0 with `empty_rows`; with `holes`, gaps in some."""
    rows, tokens = draw(st.integers(1, MAX_ROWS)), draw(st.integers(min_tokens, max_tokens))
    lengths = draw(st.lists(st.integers(0 if empty_rows else 1, tokens), min_size=rows, max_size=rows))
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    if holes and draw(st.booleans()):
        mask = mask & draw(tensors(rows, tokens, st.booleans()))
    return mask


@st.composite
def batches(draw, *names, cut="any", **options):
    """A namespace with `mask`, a cut `ends`, and a float tensor (B, T) for each name.

    cut: "any" set of policy tokens, or "token" or "response" for those two cuts. options: those of `masks`."""
    mask = draw(masks(**options))
    anywhere, closed = draw(tensors(*mask.shape, st.booleans())), draw(st.booleans())
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    ends = {"any": mask & (anywhere | last if closed else anywhere), "token": mask.clone(), "response": last}[cut]
    return SimpleNamespace(mask=mask, ends=ends, **{name: draw(tensors(*mask.shape)) for name in names})
