"""baselines.py: every method against plain loops, hand-made trees and chains, and what must hold for every reward."""

import dataclasses
import itertools
import math
import typing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import batches

import baselines
import sapo
import train

close = torch.testing.assert_close
rollouts = batches("logp", "old_logp", "rewards", "values")
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


# ---------------------------------------------------------------------------------------------------------- segments
@given(rollouts, st.integers(1, 5))
def test_fixed_ends_against_loops(batch, tokens):
    mask = batch.mask
    found = baselines.fixed_ends(mask, tokens)
    for row in range(len(mask)):
        places, wanted = mask[row].nonzero().flatten().tolist(), set()
        for number, t in enumerate(places, 1):
            if number % tokens == 0 or t + 1 == mask.shape[1] or not mask[row, t + 1]:
                wanted.add(t)
        assert set(found[row].nonzero().flatten().tolist()) == wanted


def test_every_cut_of_the_command_line_is_there():
    texts = [["<see>", "3", "</see>", "a", ";", "b"]]
    mask, entropy = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.4]])
    logp = torch.log(torch.tensor([[0.5, 0.5, 0.95, 0.5, 0.5, 0.5]]))
    expected = {"topk": [1, 3, 5], "causal": [1, 3, 5], "delimiter": [2, 4, 5], "low-prob": [5], "fixed": [1, 3, 5],
                "token": [0, 1, 2, 3, 4, 5], "response": [5]}
    assert set(expected) == set(typing.get_args(typing.get_type_hints(baselines.Method)["cut"]))
    for name, places in expected.items():
        ends = baselines.cut(name, mask, entropy, logp, texts, top_k=0.3, threshold=0.5, segment_tokens=2)
        assert ends[0].nonzero().flatten().tolist() == places, name


@pytest.mark.parametrize("tokens", [0, -1])
def test_segments_of_no_token_are_refused(tokens):
    with pytest.raises(ValueError, match="segment_tokens"):
        baselines.fixed_ends(torch.ones(1, 2, dtype=torch.bool), tokens)


# -------------------------------------------------------------------------------------------------------- identities
@given(rollouts)
def test_vc_ppo_has_ppos_advantages_and_monte_carlo_returns(batch):
    """Decoupled: the actor's advantages know nothing of the critic's lambda, and at 1 the returns are plain sums."""
    rollout = sapo.Rollout(batch.mask, sapo.token_ends(batch.mask), batch.logp, batch.rewards, batch.values)
    plain = sapo.credit(rollout, sapo.SAPOConfig(lam=0.95))
    decoupled = sapo.credit(rollout, sapo.SAPOConfig(lam=0.95, critic_lam=1.0))
    close(decoupled[0], plain[0], rtol=0, atol=0)
    close(decoupled[1], sapo.credit(rollout, sapo.SAPOConfig(lam=1.0))[1], rtol=0, atol=0)
    close(sapo.credit(rollout, sapo.SAPOConfig(lam=0.95, critic_lam=0.95))[1], plain[1], rtol=0, atol=0)


@given(rollouts)
def test_gspo_is_sapos_ratio_with_one_segment(batch):
    """GSPO's s = (pi(y) / pi_old(y))^(1/|y|), by loops over responses without holes."""
    T = batch.mask.shape[1]
    mask = torch.arange(T) < batch.mask.sum(1, keepdim=True)
    ends = baselines.cut("response", mask, None, None, None)
    ratio = sapo.segment_ratio(batch.logp, batch.old_logp, ends, mask)
    for row, n in enumerate(mask.sum(1).tolist()):
        difference = (batch.logp - batch.old_logp)[row, :n].clamp(-20, 20)
        close(ratio[row, :n], (difference.sum() / max(n, 1)).exp().expand(n))


@given(rollouts)
def test_response_rewards_are_sums_and_the_kl_penalty_comes_off(batch):
    mask = batch.mask
    rollout = sapo.Rollout(mask, sapo.response_ends(mask), batch.logp, batch.rewards)
    close(baselines.response_rewards(rollout, sapo.SAPOConfig()), (batch.rewards * mask).sum(1))
    rollout.ref_logp = batch.old_logp
    penalty = ((batch.logp - batch.old_logp).clamp(-20, 20) * mask).sum(1)
    expected = (batch.rewards * mask).sum(1) - 0.1 * penalty
    close(baselines.response_rewards(rollout, sapo.SAPOConfig(kl_coef=0.1)), expected)


# -------------------------------------------------------------------------------------------------------------- SRPO
signals = rollouts.map(lambda batch: (batch.values, batch.mask))


@given(signals, st.floats(0.05, 100))
def test_role_weights_are_positive_of_mean_one_and_keep_the_sign(batch, temperature):
    signal, mask = batch
    weights = baselines.role_weights(signal, mask, temperature)
    assert (weights[mask] > 0).all() and (weights[~mask] == 0).all()
    count = mask.sum(1)
    close(weights.sum(1), count.to(weights.dtype))
    advantages = torch.where(mask, signal.flip(0), 0.0)
    assert torch.equal((weights * advantages).sign(), advantages.sign())


@given(signals)
def test_at_infinite_temperature_srpo_is_grpo(batch):
    signal, mask = batch
    close(baselines.role_weights(signal, mask, math.inf), mask.to(signal.dtype))
    close(baselines.role_weights(signal, mask, 1e9), mask.to(signal.dtype), rtol=0, atol=1e-6)


@given(signals, st.floats(-50, 50))
def test_both_roles_share_one_baseline(batch, shift):
    """Raising the signal of the whole response changes nothing; raising one token's raises its weight."""
    signal, mask = batch
    weights = baselines.role_weights(signal, mask)
    close(baselines.role_weights(signal + shift, mask), weights, rtol=1e-6, atol=1e-9)
    for row in range(len(mask)):
        if mask[row].sum() > 1:
            t, raised = int(mask[row].nonzero()[0]), signal.clone()
            raised[row, t] += 0.5
            after = baselines.role_weights(raised, mask)
            assert after[row, t] >= weights[row, t] and torch.equal(after[:row], weights[:row])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="role_temperature"):
        baselines.role_weights(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), temperature)


def test_the_roles_are_disjoint_and_cover_the_response():
    texts = [["<see>", "3", "</see>", "4", "!"], list("<see>3</see>4"), list("abc"), ["<think>"]]
    T = max(map(len, texts))
    mask = torch.arange(T) < torch.tensor([[len(x)] for x in texts])
    seen = baselines.perception(texts, mask)
    assert seen.sum(1).tolist() == [3, len("<see>3</see>"), 0, 0]
    assert not (seen & ~mask).any() and ("".join(texts[1])[int(seen[1].sum()):]) == "4"


# ------------------------------------------------------------------------------------------------ SPO-chain, VinePPO
class Chain:
    """A policy small enough to enumerate: T tokens of 0 or 1, P(1) depends on the sum so far; a reward per string."""
    T = 4

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.p = torch.rand(self.T + 1, generator=generator).tolist()
        self.rewards = {y: float(torch.randn((), generator=generator)) for y in itertools.product("01", repeat=self.T)}
        self.generator = generator

    def value(self, prefix):
        """Exact, by recursion over everything that may follow."""
        if len(prefix) == self.T:
            return self.rewards[tuple(prefix)]
        p = self.p[prefix.count("1")]
        return (1 - p) * self.value(prefix + "0") + p * self.value(prefix + "1")

    def go_on(self, prefix):
        text = prefix
        while len(text) < self.T:
            text += "01"[int(torch.rand((), generator=self.generator) < self.p[text.count("1")])]
        return list(text[len(prefix):])


@pytest.mark.parametrize("seed", [0, 1])
def test_monte_carlo_values_are_unbiased_and_make_spos_advantages(seed):
    chain, strings = Chain(seed), ["0110", "1011"]
    mask = torch.ones(2, 4, dtype=torch.bool)
    ends = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)
    rewards = torch.zeros(2, 4)
    rewards[:, 3] = torch.tensor([chain.rewards[tuple(y)] for y in strings])
    batch = SimpleNamespace(rollout=sapo.Rollout(mask, ends, torch.zeros(2, 4), rewards),
                            texts=[list(y) for y in strings])
    settings = SimpleNamespace(continuations=4000, max_new_tokens=4, batch=3000)
    seen = []

    def go_on(rows, lengths, limit):
        assert limit == 4 - lengths.min() and len(rows) <= 3000
        return [chain.go_on(strings[row][:t]) for row, t in zip(rows.tolist(), lengths.tolist(), strict=True)]

    def judge(row, prefix, text):
        seen.append((row, len(prefix)))
        return chain.rewards[tuple(prefix + text)]

    values = baselines.continuation_values(batch, settings, go_on, judge)
    reads = sapo.boundaries(ends, mask)
    exact = torch.tensor([[chain.value(y[:t]) for t in range(4)] for y in strings])
    spread = max(chain.rewards.values()) - min(chain.rewards.values())
    assert ((values - exact)[reads].abs() < 5 * spread / 2 / math.sqrt(4000)).all()
    assert (values[~reads] == 0).all() and len(seen) == 4000 * int(reads.sum())
    advantages, _ = sapo.segment_gae(rewards, values, ends, mask, lam=0.0)
    close(advantages[0, :2], (values[0, 2] - values[0, 0]).expand(2))
    close(advantages[0, 2:], (rewards[0, 3] - values[0, 2]).expand(2))
    close(advantages[1], torch.stack([values[1, 1] - values[1, 0], *2 * [values[1, 3] - values[1, 1]],
                                      rewards[1, 3] - values[1, 3]]))


def test_continuations_stop_at_the_longest_response():
    mask, ends = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    batch = SimpleNamespace(texts=[list("abc"), list("d")], rollout=sapo.Rollout(mask, ends, torch.zeros(2, 3), None))
    judged = []
    values = baselines.continuation_values(
        batch, SimpleNamespace(continuations=1, max_new_tokens=3, batch=8),
        lambda rows, lengths, limit: [["x"] * limit for _ in rows],
        lambda row, prefix, text: judged.append(prefix + text) or 1.0)
    assert judged == ["xxx", "axx", "xxx"] and values.tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("count", [0, -3])
def test_no_continuation_at_all_is_refused(count):
    batch = SimpleNamespace(rollout=sapo.Rollout(torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), None, None))
    with pytest.raises(ValueError, match="continuations"):
        settings = SimpleNamespace(continuations=count, max_new_tokens=4, batch=8)
        baselines.continuation_values(batch, settings, None, None)


# ---------------------------------------------------------------------------------------------------------- SPO-tree
# prompt 0 -> 2 -> leaves 4 (R 1), 5 (R 0); prompt 0 -> 3, a leaf (R 1); prompt 1 -> 6 -> leaves 7, 8 (R 0 both)
TREE = baselines.Tree([-1, -1, 0, 0, 2, 2, 1, 6, 6], [4, 5, 3, 7, 8],
                      torch.tensor([[2, 2, 4], [2, 2, 5], [3, 3, 0], [6, 7, 7], [6, 8, 0]]))
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
WRITTEN = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()


def test_a_tree_by_hand():
    values = baselines.tree_values(TREE, REWARDS)
    assert values.tolist() == [0.75, 0, 0.5, 1, 1, 0, 0, 0, 0]  # the mean of the children, not of the leaves (2/3)
    assert baselines.tree_advantages(TREE, REWARDS).tolist() == [0, 0, -0.25, 0.25, 0.5, -0.5, 0, 0, 0]
    by_spread = baselines.tree_advantages(TREE, REWARDS, "grpo")
    close(by_spread[2:6], torch.tensor([-1, 1, 1, -1], dtype=torch.float64) / math.sqrt(2), rtol=1e-4, atol=0)
    assert (by_spread[6:] == 0).all()
    advantages, keep = baselines.tree_credit(TREE, REWARDS, WRITTEN)
    assert advantages.tolist() == [[-0.25, -0.25, 0.5], [-0.25, -0.25, -0.5], [0.25, 0.25, 0], [0, 0, 0], [0, 0, 0]]
    assert keep.tolist() == [[True, True, True], [False, False, True], [True, True, False], 3 * [False], 3 * [False]]
    with pytest.raises(ValueError, match="tree_advantage"):
        baselines.tree_advantages(TREE, REWARDS, "mean")


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3), st.randoms())
def test_growing_a_tree(branching, tokens, prompts, random):
    """Against a random writer that may end anywhere: a leaf reads as its own path, siblings share what is before."""
    settings = SimpleNamespace(branching=branching, segment_tokens=tokens, max_new_tokens=tokens * len(branching) + 1)
    asked = []

    def write(prompt, prefix, lengths, limit):
        asked.append(len(prompt))
        ids, texts = [], []
        for _ in prompt:
            n = next((n for n in range(1, limit) if random.random() < 0.2), limit)  # ends here, with a 9
            last = 9 if n < limit else random.randrange(1, 9)
            ids.append([*(random.randrange(1, 9) for _ in range(n - 1)), last])
            texts.append([str(i) for i in ids[-1]])
        mask = torch.arange(max(map(len, ids))) < torch.tensor([[len(x)] for x in ids])
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in ids], True), mask, texts

    prompt, written, mask, tree = baselines.grow(prompts, settings, write, lambda text: text.endswith("9"))
    assert all(parent < node for node, parent in enumerate(tree.parent)) and tree.parent[:prompts] == [-1] * prompts
    children = [tree.parent.count(node) for node in range(len(tree.parent))]
    assert [node for node in range(len(children)) if not children[node]] == sorted(tree.leaf)
    assert asked[0] == prompts * branching[0] and len(tree.parent) == prompts + sum(asked)
    text_of = {}
    for row, leaf in enumerate(tree.leaf):
        path = baselines._ancestors(leaf, tree.parent)
        assert path[0] == prompt[row]
        nodes = tree.nodes[row][mask[row]].tolist()
        assert list(dict.fromkeys(nodes)) == path[1:]  # the tokens follow the path
        for node in path[1:]:
            text = [i for i, n in zip(written[row].tolist(), nodes, strict=False) if n == node]
            assert text_of.setdefault(node, text) == text  # the same wherever it is shared
    assert all(children[node] == 0 for node, text in text_of.items() if text[-1] == 9)  # nothing follows an end
    rewards = torch.tensor([random.randrange(5) / 4 for _ in tree.leaf])
    advantages, keep = baselines.tree_credit(tree, rewards, mask)
    edges = [node for node in range(prompts, len(tree.parent)) if baselines.tree_advantages(tree, rewards)[node] != 0]
    assert sorted(tree.nodes[keep].tolist()) == sorted(n for n in edges for _ in text_of[n])  # each edge once
    for node in range(len(tree.parent)):  # siblings' advantages sum to zero: the parent is their mean
        found = baselines.tree_advantages(tree, rewards)[[i for i, p in enumerate(tree.parent) if p == node]]
        assert abs(found.sum()) < 1e-9


@pytest.mark.parametrize("changes", [{"branching": []}, {"branching": [2, 0]}, {"segment_tokens": 0},
                                     {"max_new_tokens": 20}])
def test_trees_that_cannot_grow_are_refused(changes):
    settings = SimpleNamespace(**{"branching": [2, 2, 2], "segment_tokens": 10, "max_new_tokens": 64} | changes)
    with pytest.raises(ValueError, match="branching"):
        baselines.grow(1, settings, None, None)


@given(rollouts, st.data())
def test_what_leaves_the_loss_leaves_the_gradient(batch, data):
    """`masked`: the loss and its gradient are those of the kept tokens alone, with the credit of whole responses."""
    mask, config = batch.mask, sapo.SAPOConfig(ratio="token", average="token")
    rollout = sapo.Rollout(mask, sapo.token_ends(mask), batch.logp, batch.rewards, batch.values)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel())))
    keep = mask & chosen.view(mask.shape)
    learned = baselines.masked(rollout, keep, config)
    assert torch.equal(learned.mask, keep) and torch.equal(learned.ends, keep)
    close(learned.advantages[keep], sapo.credit(rollout, config)[0][keep])
    logp = batch.logp.clone().requires_grad_()
    sapo.policy_loss(sapo.segment_ratio(logp, batch.logp, learned.ends, keep), learned.advantages, keep,
                     average="token")[0].backward()
    close(logp.grad, -learned.advantages / max(1, int(keep.sum())))


# ---------------------------------------------------------------------------------------------------------- settings
def test_every_method_is_a_set_of_settings():
    assert set(baselines.SETTINGS) == set(typing.get_args(typing.get_type_hints(train.Settings)["method"]))
    assert baselines.SETTINGS["sapo"] == {}  # the defaults are SAPO
    names = {f.name for cls in (sapo.SAPOConfig, baselines.Method) for f in dataclasses.fields(cls)}
    for method, changes in baselines.SETTINGS.items():
        assert set(changes) <= names
        parsed = {**vars(train.parse(["--method", method])[0]), **vars(train.parse(["--method", method])[1])}
        assert changes.items() <= parsed.items()
