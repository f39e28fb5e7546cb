"""Does SAPO learn, then? A task small enough to enumerate, with tables for policy and critic."""

import math

import pytest
import torch
from torch import nn

import sapo
from sapo import Rollout, SAPOConfig, SegmentCritic, sapo_update


class Adding(nn.Module):
    """Write three digits below 6, the third the sum of the others modulo 6.

    Policy and critic are tables with a row per prefix: 1 empty, 6 of one digit, 36 of two.
    """

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Embedding.from_pretrained(torch.zeros(43, 6), freeze=False)
        self.critic = SegmentCritic(nn.Embedding(43, 8), hidden_size=8)
        nn.init.normal_(self.critic.backbone.weight, generator=self.generator)

    @staticmethod
    def prefixes(tokens):
        """tokens (B, 3) -> the table's row of the prefix before each of them, (B, 3)."""
        first, second = tokens[:, 0], tokens[:, 1]
        return torch.stack([torch.zeros_like(first), 1 + first, 7 + 6 * first + second], dim=1)

    def score(self, tokens):
        """(logp, entropy) of tokens (B, 3), (B, 3) each."""
        logits = self.logits(self.prefixes(tokens))  # (B, 3, 6)
        logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return logp, sapo.token_entropy(logits)

    def value(self, tokens):
        return self.critic(self.prefixes(tokens))

    @torch.no_grad()
    def expected_reward(self):
        """The probability that a response is right, from all 36 right ones."""
        right = [(a, b, (a + b) % 6) for a in range(6) for b in range(6)]
        logp, _ = self.score(torch.tensor(right))
        return logp.sum(1).exp().sum().item()

    @torch.no_grad()
    def sample(self, responses, cut):
        """(tokens, rollout) of so many responses."""
        tokens = torch.zeros(responses, 3, dtype=torch.long)
        for t in range(3):
            probabilities = self.logits(self.prefixes(tokens))[:, t].softmax(-1)
            tokens[:, t] = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        logp, entropy = self.score(tokens)
        rewards = torch.zeros(responses, 3)
        rewards[:, 2] = ((tokens[:, 0] + tokens[:, 1]) % 6 == tokens[:, 2]).float()
        return tokens, Rollout(mask, cut(entropy, mask), logp, rewards, self.value(tokens))


def train(cut, iterations=40):
    """(model, the last iteration's metrics)."""
    model = Adding(seed=0)
    optimizers = (
        torch.optim.Adam(model.logits.parameters(), lr=0.1),
        torch.optim.Adam(model.critic.parameters(), lr=0.02),
    )
    config = SAPOConfig(epochs=2, minibatch=64, max_grad_norm=10.0)
    for _ in range(iterations):
        tokens, rollout = model.sample(128, cut)
        advantages, returns = sapo.credit(rollout, config)
        history = sapo_update(
            rollout,
            advantages,
            returns,
            lambda rows, tokens=tokens: model.score(tokens[rows]),
            lambda rows, tokens=tokens: model.value(tokens[rows]),
            optimizers,
            config,
            model.generator,
        )
    return model, history[-1]


def causal_cut(entropy, mask):
    return sapo.threshold_ends(entropy, mask, 1.0)


def test_before_training_one_answer_in_six_is_right():
    assert Adding(seed=0).expected_reward() == pytest.approx(1 / 6)


@pytest.mark.parametrize("cut", [sapo.entropy_ends, causal_cut])
def test_sapo_learns_to_add(cut):
    """From chance to nearly always right."""
    model, metrics = train(cut)
    assert model.expected_reward() > 0.8
    assert metrics["entropy"] < math.log(6)
    assert metrics["clip_fraction"] < 0.5
