"""sapo.py, segments: entropy, every cut, and sums over segments, against plain loops."""

import math
from itertools import product

import pytest
import torch
from plain_loops import (
    always_ends,
    cut_at,
    exact,
    on_policy,
    policy_positions,
    read_at,
    segments,
    to_tokens,
    top_positions,
)
from torch.testing import assert_close

import sapo

# ------------------------------------------------------------------------------ token entropy


@pytest.mark.parametrize("banned", [(), (1,), (0, 2, 3)])
def test_token_entropy_is_the_sum(banned):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5, 7, dtype=torch.float64, generator=generator)
    logits[..., list(banned)] = -math.inf
    entropy = sapo.token_entropy(logits)
    assert entropy.shape == (4, 5)
    for i, j in product(range(4), range(5)):
        weights = [math.exp(logit) for logit in logits[i, j].tolist()]
        probabilities = [weight / sum(weights) for weight in weights]
        expected = -sum(p * math.log(p) for p in probabilities if p > 0)
        assert entropy[i, j].item() == pytest.approx(expected)


KNOWN = torch.tensor(
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf], [5.0] + 3 * [-math.inf]]
)


def test_token_entropy_of_known_distributions():
    """Four equal tokens, two, and one that is certain."""
    assert_close(sapo.token_entropy(KNOWN), torch.tensor([math.log(4), math.log(2), 0.0]))


def test_token_entropy_has_a_finite_gradient_beside_banned_tokens():
    logits = KNOWN.clone().requires_grad_()
    sapo.token_entropy(logits).sum().backward()
    assert logits.grad.isfinite().all()


def test_token_entropy_of_one_distribution_and_of_one_token():
    assert sapo.token_entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))
    assert sapo.token_entropy(torch.zeros(3, 1)).tolist() == [0, 0, 0]
    assert sapo.token_entropy(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 3, 5)])
def test_token_entropy_needs_a_vocabulary(shape):
    with pytest.raises(ValueError) as refused:
        sapo.token_entropy(torch.zeros(shape))
    assert str(refused.value) == f"logits: {shape}, expected (..., V), not empty"


def test_the_entropy_of_a_certain_token_is_a_plain_zero():
    entropy = sapo.token_entropy(torch.tensor([[0.0, -math.inf], [200.0, 0.0]]))
    assert entropy.tolist() == [0.0, 0.0] and not entropy.signbit().any()


def test_where_there_is_no_distribution_a_cut_says_so():
    nothing = torch.full((1, 2, 3), -math.inf)
    unknown = torch.tensor([[[math.nan, 0.0, 0.0]] * 2])
    for logits in (nothing, unknown):
        entropy = sapo.token_entropy(logits)
        assert entropy.isnan().all()
        with pytest.raises(ValueError, match="entropy: NaN on a policy token"):
            sapo.entropy_ends(entropy, torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("height", [0.0, 1.0, 100.0, 1e6])
def test_a_quantile_of_one_cuts_everywhere(height):
    """Also where 1e-6 is less than the distance between two numbers."""
    entropy = torch.full((1, 3), height)
    mask = torch.ones(1, 3, dtype=torch.bool)
    threshold = sapo.entropy_quantile(entropy, mask, top_k=1.0)
    assert sapo.threshold_ends(entropy, mask, threshold).all()
    assert threshold == pytest.approx(height, rel=2e-6, abs=2e-6)


def test_a_token_of_just_the_threshold_is_not_improbable():
    mask = torch.ones(1, 3, dtype=torch.bool)
    logp = torch.full((1, 3), 0.9, dtype=torch.float64).log()
    assert sapo.low_prob_ends(logp, mask, 0.9, every=1).tolist() == [[False, False, True]]
    assert sapo.low_prob_ends(logp - 1e-9, mask, 0.9, every=1).all()


def test_token_entropy_is_computed_in_float32_or_better():
    assert sapo.token_entropy(torch.zeros(3, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert sapo.token_entropy(torch.zeros(3, 8, dtype=torch.float64)).dtype == torch.float64


# --------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("top_k", [1e-12, 0.1, 0.28, 0.3, 0.5, 1.0])
def test_entropy_ends_takes_the_first_of_the_ranking(batch, top_k):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_positions(batch.mask)):
        expected[b] += top_positions(policy, batch.entropy[b], top_k)
    ends = sapo.entropy_ends(batch.entropy, batch.mask, top_k)
    assert torch.equal(ends, cut_at(expected, batch.mask))


def test_entropy_ends_counts_like_arithmetic_not_like_floats():
    """0.28 * 25 is 7.000000000000001 to a computer; seven tokens are 28% of 25."""
    entropy, mask = -torch.arange(25.0)[None], torch.ones(1, 25, dtype=torch.bool)
    seven, eight = (sapo.entropy_ends(entropy, mask, top_k) for top_k in (0.28, 0.2801))
    assert seven[0].nonzero()[:, 0].tolist() == [*range(7), 24]
    assert eight[0].nonzero()[:, 0].tolist() == [*range(8), 24]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.75, 1.0, math.inf])
def test_threshold_ends_compares_each_token(batch, threshold):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_positions(batch.mask)):
        expected[b] += [t for t in policy if batch.entropy[b, t] > threshold]
    ends = sapo.threshold_ends(batch.entropy, batch.mask, threshold)
    assert torch.equal(ends, cut_at(expected, batch.mask))


every_top_k = pytest.mark.parametrize("top_k", [1e-6, 0.1, 0.3, 0.5, 1.0])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


def distinct_entropy(mask, dtype):
    """(B, T): 0.1, 0.2, ... in random order, so that no two are equal in any dtype."""
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(0))
    return 0.1 * order.to(dtype).view(mask.shape)


@every_top_k
@every_dtype
def test_entropy_quantile_lets_the_share_pass(batch, top_k, dtype):
    entropy = distinct_entropy(batch.mask, dtype)
    policy = on_policy(entropy, batch.mask)
    threshold = sapo.entropy_quantile(entropy, batch.mask, top_k)
    assert isinstance(threshold, float)
    assert sum(h > threshold for h in policy) == math.ceil(top_k * len(policy) - 1e-9)


@every_top_k
@every_dtype
def test_entropy_quantile_cuts_at_the_highest_entropies(batch, top_k, dtype):
    """Nothing is lost on the way from the tensor's dtype to a Python float and back."""
    entropy = distinct_entropy(batch.mask, dtype)
    policy = sorted(on_policy(entropy, batch.mask), reverse=True)
    lowest_that_cuts = policy[math.ceil(top_k * len(policy) - 1e-9) - 1]
    expected = always_ends(batch.mask)
    for b, row in enumerate(policy_positions(batch.mask)):
        expected[b] += [t for t in row if entropy[b, t].item() >= lowest_that_cuts]
    threshold = sapo.entropy_quantile(entropy, batch.mask, top_k)
    ends = sapo.threshold_ends(entropy, batch.mask, threshold)
    assert torch.equal(ends, cut_at(expected, batch.mask))


def test_delimiter_ends_are_the_marked_tokens_and_the_always_ends(batch):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_positions(batch.mask)):
        expected[b] += [t for t in policy if batch.is_delimiter[b, t]]
    ends = sapo.delimiter_ends(batch.is_delimiter, batch.mask)
    assert torch.equal(ends, cut_at(expected, batch.mask))


def test_token_ends_are_all_policy_tokens(batch):
    assert torch.equal(
        sapo.token_ends(batch.mask), cut_at(policy_positions(batch.mask), batch.mask)
    )


def test_response_ends_are_the_always_ends(batch):
    assert torch.equal(sapo.response_ends(batch.mask), cut_at(always_ends(batch.mask), batch.mask))


@pytest.mark.parametrize(("threshold", "every"), [(0.9, 5), (0.9, 1), (0.3, 2), (1.0, 3)])
def test_low_prob_ends_counts_the_unlikely_tokens(batch, threshold, every):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_positions(batch.mask)):
        unlikely = [t for t in policy if math.exp(batch.old_logp[b, t]) < threshold]
        expected[b] += unlikely[every - 1 :: every]
    ends = sapo.low_prob_ends(batch.old_logp, batch.mask, threshold, every)
    assert torch.equal(ends, cut_at(expected, batch.mask))


# --------------------------------------------------------------------- indices and boundaries


def test_segment_index_counts_the_ends_before(batch):
    index = sapo.segment_index(batch.ends)
    assert index.dtype == torch.long
    for b, row in enumerate(batch.ends.tolist()):
        assert index[b].tolist() == [sum(row[:t]) for t in range(len(row))]


@pytest.mark.parametrize("value_at", ["start", "end"])
def test_boundaries_are_first_or_last_tokens(batch, value_at):
    places = []
    for row in segments(batch.ends, batch.mask):
        places.append([read_at(segment, value_at) for segment in row])
    reads = sapo.boundaries(batch.ends, batch.mask, value_at)
    assert torch.equal(reads, cut_at(places, batch.mask))


# ----------------------------------------------------------------------------- sums and means


def sums_of_segments(batch):
    """For each response, the sum of x over each of its segments, and how many tokens it has."""
    sums, counts = [], []
    for b, row in enumerate(segments(batch.ends, batch.mask)):
        sums.append([sum(batch.x[b, t].item() for t in segment) for segment in row])
        counts.append([len(segment) for segment in row])
    return sums, counts


def test_segment_sum_adds_up_each_segment(batch):
    sums, _ = sums_of_segments(batch)
    ours = sapo.segment_sum(batch.x, batch.ends, batch.mask)
    exact(ours, to_tokens(sums, batch.ends, batch.mask))


def test_segment_mean_divides_by_the_policy_tokens(batch):
    means = []
    for sums, counts in zip(*sums_of_segments(batch), strict=True):
        means.append([total / count for total, count in zip(sums, counts, strict=True)])
    ours = sapo.segment_mean(batch.x, batch.ends, batch.mask)
    exact(ours, to_tokens(means, batch.ends, batch.mask))
