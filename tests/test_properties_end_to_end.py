"""What must hold for every input, III: padding, order and the split into parts do not matter.

Not to anything that a batch teaches, from the cut to the gradients.
"""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loops import exact
from strategies import averages, batches, numbers, value_places

import sapo

FIELDS = ("entropy", "rewards", "values", "critic", "logp", "old_logp")


def taught(batch, value_at="start", average="response"):
    """Everything that a batch teaches: the cut, both losses, and their gradients at each token."""
    mask = batch.mask
    logp = batch.logp.clone().requires_grad_()
    critic = batch.critic.clone().requires_grad_()
    by_rank = batch.ends & sapo.entropy_ends(batch.entropy, mask)
    ends = by_rank | sapo.threshold_ends(batch.entropy, mask, 1.0)
    advantages, returns = sapo.segment_gae(
        batch.rewards, batch.values, ends, mask, 0.9, 0.9, value_at
    )
    ratio = sapo.segment_ratio(logp, batch.old_logp, ends, mask)
    policy_loss, _ = sapo.policy_loss(
        ratio, sapo.whiten(advantages, mask), mask, dual_clip=3, average=average
    )
    value_loss, _ = sapo.value_loss(
        critic, returns, ends, mask, value_at, batch.values, 0.5, average
    )
    (policy_loss + value_loss).backward()
    return {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "ends": ends,
        "advantages": advantages,
        "returns": returns,
        "ratio - 1": ratio.detach() - 1,  # so that all of them are 0 off the mask
        "policy gradient": logp.grad,
        "critic gradient": critic.grad,
    }


def changed(batch, change):
    """The batch with each of its tensors changed."""
    return SimpleNamespace(**{name: change(tensor) for name, tensor in vars(batch).items()})


@given(batches(*FIELDS), value_places, averages, st.integers(1, 3), numbers)
def test_padding_does_not_matter(batch, value_at, average, extra, filler):
    """Columns of padding, whatever stands in them, change no number and get no gradient."""

    def padded(tensor):
        padding = torch.full((len(tensor), extra), filler, dtype=torch.float64)
        if tensor.dtype == torch.bool:
            padding = torch.zeros(len(tensor), extra, dtype=torch.bool)
        return torch.cat([tensor, padding], dim=1)

    T = batch.mask.shape[1]
    expected = taught(batch, value_at, average)
    for name, outcome in taught(changed(batch, padded), value_at, average).items():
        if outcome.dim():
            assert not outcome[:, T:].any(), name
            outcome = outcome[:, :T]
        exact(outcome, expected[name])


@given(batches(*FIELDS), value_places, averages, st.randoms(use_true_random=False))
def test_order_of_the_batch_does_not_matter(batch, value_at, average, random):
    """Permuting the responses permutes what each is taught."""
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    expected = taught(batch, value_at, average)
    permuted = taught(changed(batch, lambda tensor: tensor[order]), value_at, average)
    for name, outcome in permuted.items():
        is_per_token = outcome.dim() > 0
        exact(outcome, expected[name][order] if is_per_token else expected[name])


def assert_parts_add_up(batch, loss, counted, average, size):
    """The loss of a batch is that of parts of it, each weighted by what it holds: its responses, or
    the positions in `counted` (B, T) when the loss is a mean over those."""
    weights = torch.ones(len(batch.mask)) if average == "response" else counted.sum(1)
    total = 0.0
    for rows in torch.arange(len(batch.mask)).split(size):
        part = changed(batch, lambda tensor, rows=rows: tensor[rows])
        total = total + weights[rows].sum() * loss(part)
    exact(total / weights.sum().clamp(min=1), loss(batch))


@given(batches("log_ratio", "advantages"), averages, st.integers(1, 3))
def test_policy_losses_of_parts_add_up(batch, average, size):
    """By the responses, or by the policy tokens, that they hold."""

    def loss(part):
        return sapo.policy_loss(part.log_ratio.exp(), part.advantages, part.mask, average=average)[
            0
        ]

    assert_parts_add_up(batch, loss, batch.mask, average, size)


@given(batches("values", "returns"), averages, st.integers(1, 3))
def test_value_losses_of_parts_add_up(batch, average, size):
    """By the responses, or by the segments, that they hold."""

    def loss(part):
        return sapo.value_loss(part.values, part.returns, part.ends, part.mask, average=average)[0]

    reads = sapo.boundaries(batch.ends, batch.mask)
    assert_parts_add_up(batch, loss, reads, average, size)
