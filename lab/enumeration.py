"""A world small enough to write out every response there is: expectations without a sample.

Three tokens and four steps: 81 responses. A policy (a distribution per prefix), a reward per
response and a critic (a number per prefix) are drawn at random. Then the expectation of anything
is a sum, and can be held against the truth to rounding: `tests/test_unbiased.py` asks so where
SAPO's gradient is unbiased, and `lab/theorems.py` asks it of anybody's advantages.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import sapo

VOCABULARY, STEPS, STOP = 3, 4, 2


@dataclass
class World:
    """All responses that a random policy can give, and what each of them earns.

    N prefixes; B responses, T token positions, V vocabulary as in sapo.py.
    """

    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    prefix: Tensor  # (B, T): the number of the prefix before each token
    logits: Tensor  # (N, V): the policy
    reward: Tensor  # (B,)
    random_critic: Tensor  # (N,): any value for each prefix

    @property
    def entropy(self):
        """Of the next token after each prefix, (N,)."""
        return sapo.token_entropy(self.logits)

    def token_logp(self, logits):
        """log pi of each token of each response under a policy, (B, T)."""
        logp = logits - logits.logsumexp(-1, keepdim=True)
        return logp[self.prefix, self.tokens]

    def probability(self, logits):
        """pi of each response under a policy, (B,)."""
        return torch.where(self.mask, self.token_logp(logits), 0.0).sum(1).exp()

    def exact_critic(self):
        """E[R | prefix], (N,)."""
        prefixes = torch.arange(len(self.logits))[:, None, None]
        begins = ((self.prefix == prefixes) & self.mask).any(2).double()  # (N, B): n begins b
        probability = self.probability(self.logits)
        return begins @ (probability * self.reward) / (begins @ probability)

    def true_gradient(self):
        """Of the expected reward by the logits, (N, V)."""
        logits = self.logits.clone().requires_grad_()
        expected_reward = (self.probability(logits) * self.reward).sum()
        return torch.autograd.grad(expected_reward, logits)[0]


def all_responses(stops):
    """(responses, prefixes), as tuples of tokens: of STEPS tokens, or shorter if STOP `stops`."""
    responses, prefixes, growing = [], [], [()]
    while growing:
        prefix = growing.pop(0)
        prefixes.append(prefix)
        for token in range(VOCABULARY):
            longer = (*prefix, token)
            if len(longer) == STEPS or (stops and token == STOP):
                responses.append(longer)
            else:
                growing.append(longer)
    return responses, prefixes


@cache
def world(seed, stops=False):
    """A random policy, reward and critic, on all responses."""
    responses, prefixes = all_responses(stops)
    tokens = torch.zeros(len(responses), STEPS, dtype=torch.long)
    prefix = torch.zeros_like(tokens)
    for b, response in enumerate(responses):
        for t, token in enumerate(response):
            tokens[b, t] = token
            prefix[b, t] = prefixes.index(response[:t])
    lengths = torch.tensor([len(response) for response in responses])

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return World(
        tokens=tokens,
        mask=torch.arange(STEPS) < lengths[:, None],
        prefix=prefix,
        logits=1.5 * normal(len(prefixes), VOCABULARY),
        reward=normal(len(responses)),
        random_critic=normal(len(prefixes)),
    )
