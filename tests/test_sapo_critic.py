"""sapo.py, critic: a value head on a backbone, whatever the backbone gives and in what dtype."""

from types import SimpleNamespace

import pytest
import torch
from plain_loops import exact
from torch import nn

from sapo import SegmentCritic


class Backbone(nn.Module):
    """Hidden states from token ids, as a tensor or as transformers models give them."""

    def __init__(self, gives_object, dtype=torch.float32):
        super().__init__()
        self.table = nn.Embedding(6, 4, dtype=dtype)
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
