"""baselines.py: GRPO's group advantage against plain loops, and what must hold for every reward."""

import dataclasses
import math
import typing

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import baselines
import sapo
import train

close = torch.testing.assert_close
numbers = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))  # no meaningless magnitudes


@st.composite
def groups(draw, elements=numbers):
    """(rewards (B,) float64, group), with B a multiple of the group."""
    group = draw(st.integers(2, 6))
    B = group * draw(st.integers(1, 4))
    return torch.tensor(draw(st.lists(elements, min_size=B, max_size=B)), dtype=torch.float64), group


def by_loops(rewards, group):
    """The formula, with Bessel's correction, one number at a time."""
    out = []
    for first in range(0, len(rewards), group):
        part = rewards[first:first + group]
        mean = sum(part) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in part) / (group - 1))
        out += [(r - mean) / (std + 1e-6) for r in part]
    return torch.tensor(out, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------- group advantages
@given(groups())
def test_group_advantages_against_loops(batch):
    rewards, group = batch
    before = rewards.clone()
    close(baselines.group_advantages(rewards, group), by_loops(rewards.tolist(), group), rtol=1e-6, atol=1e-6)
    close(rewards, before, rtol=0, atol=0)  # the argument is not changed


def test_group_advantages_by_hand():
    """One right answer of four: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4, so 3/2 and three times -1/2."""
    found = baselines.group_advantages(torch.tensor([0.0, 1.0, 0.0, 0.0]), 4)
    close(found, torch.tensor([-0.5, 1.5, -0.5, -0.5]), rtol=1e-5, atol=1e-5)


@given(groups())
def test_each_group_has_zero_mean_and_at_most_unit_spread(batch):
    rewards, group = batch
    grouped = baselines.group_advantages(rewards, group).view(-1, group)
    close(grouped.mean(1), torch.zeros(len(grouped), dtype=torch.float64), rtol=0, atol=1e-6)
    assert (grouped.std(1) <= 1 + 1e-9).all()


@given(groups(), st.floats(0.1, 50), st.floats(-50, 50))
def test_scale_and_shift_change_nothing(batch, scale, shift):
    """Where the spread is far above the epsilon of 1e-6."""
    rewards, group = batch
    assume((rewards.view(-1, group).std(1) > 0.01).all())
    found = baselines.group_advantages(scale * rewards + shift, group)
    close(found, baselines.group_advantages(rewards, group), rtol=2e-3, atol=1e-6)


@given(groups(), st.data())
def test_groups_know_nothing_of_each_other(batch, data):
    rewards, group = batch
    changed = rewards.clone()
    changed[:group] = torch.tensor(data.draw(st.lists(numbers, min_size=group, max_size=group)), dtype=torch.float64)
    before, after = (baselines.group_advantages(x, group)[group:] for x in (rewards, changed))
    close(before, after, rtol=0, atol=0)


@given(st.integers(2, 9), st.integers(1, 3), numbers, st.sampled_from([torch.float32, torch.float64]))
@example(3, 1, 1000.1, torch.float32)  # the mean of three equal numbers can differ from them by one unit in the last
@example(7, 2, 0.3, torch.float32)     # place, which the epsilon then blows up: 61 and 0.03 were seen here
def test_equal_rewards_give_exact_zeros(group, count, reward, dtype):
    found = baselines.group_advantages(torch.full((group * count,), reward, dtype=dtype), group)
    close(found, torch.zeros(group * count, dtype=dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert baselines.group_advantages(torch.tensor([0, 1, 1, 0], dtype=dtype), 2).dtype == dtype


@pytest.mark.parametrize("shape, group", [((6,), 4), ((6,), 1), ((6,), 0), ((6,), -2), ((3, 2), 2), ((), 2)])
def test_what_cannot_be_grouped_is_refused(shape, group):
    with pytest.raises(ValueError, match=f"group: {group}"):
        baselines.group_advantages(torch.zeros(shape), group)


# ---------------------------------------------------------------------------------------------------------- settings
def test_every_method_is_a_set_of_settings():
    assert set(baselines.SETTINGS) == set(typing.get_args(typing.get_type_hints(train.Settings)["method"]))
    assert baselines.SETTINGS["sapo"] == {}  # the defaults are SAPO
    names = {f.name for cls in (sapo.SAPOConfig, baselines.Method) for f in dataclasses.fields(cls)}
    for method, changes in baselines.SETTINGS.items():
        assert set(changes) <= names
        parsed = {**vars(train.parse(["--method", method])[0]), **vars(train.parse(["--method", method])[1])}
        assert changes.items() <= parsed.items()
