"""sapo.py, critic: a value head on a backbone, whatever the backbone gives and in what dtype; and
one that hears how unlikely the policy's tokens were."""

import math
from types import SimpleNamespace

import pytest
import torch
from plain_loops import exact, random_batch
from torch import nn

import sapo
from sapo import SegmentCritic


class Backbone(nn.Module):
    """Hidden states from token ids, as a tensor or as transformers models give them."""

    def __init__(self, gives_object, dtype=torch.float32):
        super().__init__()
        # Eighths: their sums have no rounding, in whichever order a machine adds them
        states = torch.arange(-11, 13).view(6, 4) / 8
        self.table = nn.Embedding.from_pretrained(states.to(dtype), freeze=False)
        self.gives_object = gives_object
        self.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=4))

    def forward(self, ids, scale=1.0):
        hidden = scale * self.table(ids)
        return SimpleNamespace(last_hidden_state=hidden) if self.gives_object else hidden


IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
any_backbone = pytest.mark.parametrize(
    ("gives_object", "dtype"),
    [
        (False, torch.float32),
        (True, torch.float32),
        (False, torch.bfloat16),
        (True, torch.bfloat16),
    ],
)


@any_backbone
def test_values_are_float32_and_zero_before_training(gives_object, dtype):
    values = SegmentCritic(Backbone(gives_object, dtype))(IDS, scale=2.0)
    assert values.shape == (2, 3)
    assert values.dtype == torch.float32
    assert not values.any()


@any_backbone
def test_the_head_moves_first(gives_object, dtype):
    """As long as it is zero, no gradient passes it on the way to the backbone."""
    critic = SegmentCritic(Backbone(gives_object, dtype))
    critic(IDS, scale=2.0).sum().backward()
    assert critic.head.weight.grad.any()
    assert critic.head.bias.grad.item() == 6
    assert not critic.backbone.table.weight.grad.any()


@any_backbone
def test_a_trained_head_reads_the_hidden_states(gives_object, dtype):
    """And the arguments reach the backbone."""
    critic = SegmentCritic(Backbone(gives_object, dtype))
    with torch.no_grad():
        critic.head.weight += 0.5
        critic.head.bias += 1
    values = critic(IDS, scale=2.0)
    exact(values, 2.0 * critic.backbone.table(IDS).float().sum(-1) * 0.5 + 1)
    values.sum().backward()
    assert critic.backbone.table.weight.grad.all()


def test_the_width_is_found_in_either_config():
    """A text model's config has hidden_size itself, a vision-language model's its text_config."""
    backbone = Backbone(gives_object=False)
    backbone.config = SimpleNamespace(hidden_size=4)
    assert SegmentCritic(backbone).head.in_features == 4


def test_a_critic_of_a_given_width_and_type():
    """Here all of it is bfloat16, the head too; the values are float32 all the same."""
    critic = SegmentCritic(nn.Embedding(6, 3), hidden_size=3).to(torch.bfloat16)
    assert critic(torch.tensor([[1, 2]])).dtype == torch.float32


# ----------------------------------------------------------------------------------- surprise


def least_so_far(logp, mask):
    """Plain loops: the least log-probability of a policy token up to here, between -20 and 0."""
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(mask.tolist()):
        least = 0.0
        for t, is_policy in enumerate(row):
            if is_policy:
                least = min(least, max(-20.0, logp[b, t].item()))
            expected[b, t] = least
    return expected


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "clamped"])
def test_surprise_is_the_least_log_probability_so_far(batch, scale):
    """Across holes, which it passes on; a log-probability above 0 counts as 0."""
    logp = scale * batch.logp
    exact(sapo.surprise(logp, batch.mask), least_so_far(logp, batch.mask))


def test_an_impossible_token_surprises_by_20_nats(batch):
    logp = batch.old_logp.clone()
    logp[:, 3] = -math.inf
    ours = sapo.surprise(logp, batch.mask)
    exact(ours, least_so_far(logp, batch.mask))
    assert ours.isfinite().all()
    assert (ours[batch.mask[:, 3], 3:] == -20).all() and ours[:, :3].min() > -20


def test_surprise_never_looks_ahead():
    """Another token at t: what stands before t stays as it was."""
    batch = random_batch(0)
    before, moved = sapo.surprise(batch.old_logp, batch.mask), 0
    for t in range(batch.mask.shape[1]):
        other = batch.old_logp.clone()
        other[:, t] -= 5.0
        after = sapo.surprise(other, batch.mask)
        assert torch.equal(after[:, :t], before[:, :t])
        assert torch.equal(after[:, t] != before[:, t], batch.mask[:, t])
        moved += (after[:, t + 1 :] != before[:, t + 1 :]).sum().item()
    assert moved > 0


# -------------------------------------------------------------------------- a critic that hears

TOLD = torch.tensor([[0.0, -1.0, -2.5], [-0.5, -0.5, -20.0]])


@any_backbone
def test_before_training_it_is_the_plain_critic(gives_object, dtype):
    """As long as u is zero, whatever it is told; and the plain one is told in vain."""
    backbone = Backbone(gives_object, dtype)
    plain, hearing = SegmentCritic(backbone), SegmentCritic(backbone, hears=True)
    assert hearing.hears and not plain.hears
    assert not hearing(IDS, surprise=TOLD).any()
    for critic in (plain, hearing):
        nn.init.ones_(critic.head.weight)
    assert torch.equal(hearing(IDS, surprise=TOLD, scale=2.0), plain(IDS, scale=2.0))
    assert torch.equal(plain(IDS, surprise=TOLD), plain(IDS))


@any_backbone
def test_a_nat_of_surprise_counts_u(gives_object, dtype):
    critic = SegmentCritic(Backbone(gives_object, dtype), hears=True).to(dtype)
    nn.init.ones_(critic.head.weight)
    deaf = critic(IDS, surprise=torch.zeros_like(TOLD))
    nn.init.constant_(critic.per_nat, 0.25)
    values = critic(IDS, surprise=TOLD)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, deaf + 0.25 * TOLD)
    values.sum().backward()
    assert critic.per_nat.grad.item() == pytest.approx(TOLD.sum().item(), rel=1e-2)


def test_a_critic_that_hears_must_be_told():
    """Silence would be taken for certainty."""
    with pytest.raises(ValueError, match=r"^surprise\b.*the critic hears"):
        SegmentCritic(Backbone(gives_object=False), hears=True)(IDS)


def explained(hears):
    """What a critic explains of an outcome that only log-probabilities betray: all tokens are the
    same, and a response is right unless one of its tokens was unlikely."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(256, 5, dtype=torch.long)
    mask = torch.ones(256, 5, dtype=torch.bool)
    slips = torch.rand(256, 5, generator=generator) < 0.1
    told = sapo.surprise(torch.where(slips, -4.0, -0.05), mask)
    outcome = (~slips.any(1)).float()[:, None].expand(256, 5)
    reads = torch.zeros_like(mask)
    reads[:, -1] = True  # after the last token all is known
    torch.manual_seed(0)
    critic = SegmentCritic(nn.Embedding(1, 4), hidden_size=4, hears=hears)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    for _ in range(150):
        loss, _ = sapo.value_loss(critic(ids, surprise=told), outcome, reads, reads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 1 - loss.item() / outcome[:, -1].var(correction=0).item()


def test_it_learns_what_only_log_probabilities_betray():
    assert explained(hears=True) > 0.95
    assert abs(explained(hears=False)) < 0.05
