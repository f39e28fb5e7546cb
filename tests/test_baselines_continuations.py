"""baselines.py: Monte-Carlo values from continuations (SPO-chain, VinePPO), against a policy small
enough to enumerate."""

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import baselines
import sapo


class Chain:
    """A policy small enough to enumerate: strings of four digits 0 or 1, a reward for each string.
    The probability of a 1 depends on how many there are already."""

    LENGTH = 4

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.probability_of_one = torch.rand(self.LENGTH + 1, generator=self.generator).tolist()
        self.rewards = {}
        for digits in itertools.product("01", repeat=self.LENGTH):
            self.rewards["".join(digits)] = torch.randn((), generator=self.generator).item()

    def value(self, prefix):
        """Exact, by recursion over everything that may follow."""
        if len(prefix) == self.LENGTH:
            return self.rewards[prefix]
        p = self.probability_of_one[prefix.count("1")]
        return (1 - p) * self.value(prefix + "0") + p * self.value(prefix + "1")

    def continuation(self, prefix):
        """A random one, as a list of digits."""
        text = prefix
        while len(text) < self.LENGTH:
            p = self.probability_of_one[text.count("1")]
            is_one = torch.rand((), generator=self.generator) < p
            text += "1" if is_one else "0"
        return list(text[len(prefix) :])


STRINGS = ["0110", "1011"]
CHAIN_MASK = torch.ones(2, 4, dtype=torch.bool)
CHAIN_ENDS = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)
COUNT = 4000
every_chain = pytest.mark.parametrize("seed", [0, 1])


@cache
def chain_values(seed):
    """(the chain, values (B, T), how often each (row, prefix) was graded)."""
    chain = Chain(seed)
    settings = SimpleNamespace(continuations=COUNT, batch=3000)
    graded = {}

    def rewards_after(rows, positions):
        assert len(rows) <= 3000
        rewards = []
        for row, t in zip(rows.tolist(), positions.tolist(), strict=True):
            prefix = STRINGS[row][:t]
            graded[row, prefix] = graded.get((row, prefix), 0) + 1
            rewards.append(chain.rewards[prefix + "".join(chain.continuation(prefix))])
        return rewards

    values = baselines.continuation_values(CHAIN_ENDS, CHAIN_MASK, settings, rewards_after)
    return chain, values, graded


@every_chain
def test_monte_carlo_values_are_unbiased(seed):
    """Within five standard errors (of the widest spread that rewards in this range can have)."""
    chain, values, _ = chain_values(seed)
    exact = torch.tensor([[chain.value(string[:t]) for t in range(4)] for string in STRINGS])
    largest_std = (max(chain.rewards.values()) - min(chain.rewards.values())) / 2
    reads = sapo.boundaries(CHAIN_ENDS, CHAIN_MASK)
    assert (values - exact)[reads].abs().max() < 5 * largest_std / math.sqrt(COUNT)
    assert (values[~reads] == 0).all()


def test_each_segment_start_is_continued_so_many_times():
    _, _, graded = chain_values(0)
    starts = [(0, ""), (0, "01"), (1, ""), (1, "1"), (1, "101")]
    assert graded == dict.fromkeys(starts, COUNT)


@every_chain
def test_at_lambda_0_the_values_give_spos_advantages(seed):
    """V(s_{m+1}) - V(s_m), and R - V(s_M) for the last segment."""
    chain, values, _ = chain_values(seed)
    rewards = torch.zeros(2, 4)
    rewards[:, 3] = torch.tensor([chain.rewards[string] for string in STRINGS])
    advantages, _ = sapo.segment_gae(rewards, values, CHAIN_ENDS, CHAIN_MASK, lam=0.0)
    first, second = values[0, 2] - values[0, 0], rewards[0, 3] - values[0, 2]
    assert_close(advantages[0], torch.stack([first, first, second, second]))
    first, second = values[1, 1] - values[1, 0], values[1, 3] - values[1, 1]
    third = rewards[1, 3] - values[1, 3]
    assert_close(advantages[1], torch.stack([first, second, second, third]))


def test_each_value_is_the_mean_of_its_own_continuations():
    """Rewards 0, 1, 2, ... in the order of asking, three for each segment start."""
    mask = ends = torch.ones(2, 2, dtype=torch.bool)
    count = itertools.count()
    values = baselines.continuation_values(
        ends,
        mask,
        SimpleNamespace(continuations=3, batch=5),
        lambda rows, positions: [float(next(count)) for _ in rows],
    )
    assert values.tolist() == [[1, 4], [7, 10]]


def test_one_continuation_is_a_value():
    mask = torch.ones(1, 2, dtype=torch.bool)
    settings = SimpleNamespace(continuations=1, batch=8)
    values = baselines.continuation_values(mask, mask, settings, lambda rows, _: [0.5] * len(rows))
    assert values.tolist() == [[0.5, 0.5]] and values.dtype == torch.float32


@pytest.mark.parametrize("count", [0, -3])
def test_no_continuation_at_all_is_refused(count):
    settings = SimpleNamespace(continuations=count, batch=8)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="continuations"):
        baselines.continuation_values(mask, mask, settings, None)
