"""baselines.py: SPO-tree, on a tree drawn by hand and on trees that a random writer grows."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import baselines

# -------------------------------------------------------------------------- SPO-tree, by hand
#
#   prompt 0 -- 2 -- 4 (reward 1)      prompt 1 -- 6 -- 7 (reward 0)
#            |     `- 5 (reward 0)                   `- 8 (reward 0)
#            `- 3 (reward 1)

TREE = baselines.Tree(
    parent=[-1, -1, 0, 0, 2, 2, 1, 6, 6],
    leaf=[4, 5, 3, 7, 8],
    nodes=torch.tensor([[2, 2, 4], [2, 2, 5], [3, 3, 0], [6, 7, 7], [6, 8, 0]]),
)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
TREE_MASK = torch.arange(3) < torch.tensor([[3], [3], [2], [3], [2]])


def test_a_node_is_worth_the_mean_of_its_children():
    """Not that of its leaves, which would be 2/3 for prompt 0."""
    values = baselines.tree_values(TREE, REWARDS)
    assert values.tolist() == [0.75, 0, 0.5, 1, 1, 0, 0, 0, 0]
    assert values.dtype == torch.float64


def test_an_advantage_is_the_difference_to_the_parent():
    advantages = baselines.tree_advantages(TREE, REWARDS)
    assert advantages.tolist() == [0, 0, -0.25, 0.25, 0.5, -0.5, 0, 0, 0]


def test_or_that_over_the_spread_of_the_siblings():
    """Two siblings are 1/sqrt(2) standard deviations from their mean, whatever their distance, but
    for the 1e-6 that is added to the spread."""
    advantages = baselines.tree_advantages(TREE, REWARDS, "grpo")
    differences = torch.tensor([-0.25, 0.25, 0.5, -0.5], dtype=torch.float64)
    expected = differences / (differences.abs() * math.sqrt(2) + 1e-6)
    assert_close(advantages[2:6], expected, rtol=1e-12, atol=0)
    assert_close(expected.abs(), torch.full_like(expected, 1 / math.sqrt(2)), rtol=1e-4, atol=0)
    assert (advantages[6:] == 0).all()


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_an_only_child_has_no_advantage(kind):
    tree = baselines.Tree([-1, 0], [1], torch.ones(1, 2, dtype=torch.long))
    assert baselines.tree_advantages(tree, torch.tensor([1.0]), kind).tolist() == [0, 0]


def test_an_unknown_tree_advantage_is_refused():
    with pytest.raises(ValueError, match="tree_advantage"):
        baselines.tree_advantages(TREE, REWARDS, "mean")


def test_every_token_gets_the_advantage_of_its_edge():
    advantages, _ = baselines.tree_credit(TREE, REWARDS, TREE_MASK)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [
        [-0.25, -0.25, 0.5],
        [-0.25, -0.25, -0.5],
        [0.25, 0.25, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_the_loss_reads_every_edge_once_and_none_without_advantage():
    _, loss_mask = baselines.tree_credit(TREE, REWARDS, TREE_MASK)
    assert loss_mask.long().tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1 / 3])
def test_an_advantage_that_is_only_rounding_is_none(reward):
    """Six children of six: the mean of six means of 0.1 is not 0.1 in floating point."""
    parent = [-1] + [0] * 6 + [1 + k // 6 for k in range(36)]
    leaf = list(range(7, 43))
    nodes = torch.tensor([[parent[node], node] for node in leaf])
    tree, mask = baselines.Tree(parent, leaf, nodes), torch.ones(36, 2, dtype=torch.bool)
    rewards = torch.full((36,), reward, dtype=torch.float64)
    for kind in ("rloo", "grpo"):
        advantages, loss_mask = baselines.tree_credit(tree, rewards, mask, kind)
        assert not loss_mask.any() and (advantages == 0).all()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_of_the_rewards_is_of_no_matter(unit):
    """What is rounding, and what a difference, is measured by the rewards themselves."""
    rewards = unit * REWARDS.double()
    advantages, loss_mask = baselines.tree_credit(TREE, rewards, TREE_MASK)
    expected, mask = baselines.tree_credit(TREE, REWARDS, TREE_MASK)
    assert_close(advantages, unit * expected)
    assert torch.equal(loss_mask, mask)


def test_the_kind_of_advantage_reaches_the_tokens():
    advantages, _ = baselines.tree_credit(TREE, REWARDS, TREE_MASK, "grpo")
    assert advantages[0, 2].item() == pytest.approx(1 / math.sqrt(2), rel=1e-4)


# ------------------------------------------------------------------------ SPO-tree, at random


class RandomWriter:
    """Writes digits 1 to 8, and may end anywhere with a 9, or with anything at its limit."""

    def __init__(self, random):
        self.random = random
        self.asked = []  # how many stems in each call

    def one(self, limit):
        digits = []
        while len(digits) + 1 < limit:
            if self.random.random() < 0.2:
                return [*digits, 9]
            digits.append(self.random.randrange(1, 9))
        return [*digits, self.random.randrange(1, 9)]

    def __call__(self, prompt, prefix, lengths, limit):
        self.asked.append(len(prompt))
        rows = [self.one(limit) for _ in prompt]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])
        return tokens, mask, [[str(digit) for digit in row] for row in rows]


@st.composite
def grown_trees(draw):
    """A tree of a random shape, with everything that came of growing it."""
    branching = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    segment_tokens = draw(st.integers(1, 3))
    settings = SimpleNamespace(
        branching=branching,
        segment_tokens=segment_tokens,
        max_new_tokens=segment_tokens * len(branching) + 1,
    )
    prompts, random = draw(st.integers(1, 3)), draw(st.randoms())
    writer = RandomWriter(random)
    prompt, tokens, mask, tree = baselines.grow(
        prompts, settings, writer, lambda text: text.endswith("9")
    )
    rewards = torch.tensor([random.randrange(5) / 4 for _ in tree.leaf])
    return SimpleNamespace(
        settings=settings,
        prompts=prompts,
        asked=writer.asked,
        prompt=prompt,
        tokens=tokens,
        mask=mask,
        tree=tree,
        rewards=rewards,
    )


def children_of(tree):
    """How many children each node has."""
    return [tree.parent.count(node) for node in range(len(tree.parent))]


def path_to(node, tree):
    """The nodes from the prompt to this one."""
    path = [node]
    while tree.parent[path[0]] >= 0:
        path.insert(0, tree.parent[path[0]])
    return path


def text_of_nodes(grown):
    """node -> the tokens that it wrote, the same in every row that passes through it."""
    texts = {}
    for row, leaf in enumerate(grown.tree.leaf):
        pairs = list(zip(grown.tree.nodes[row].tolist(), grown.tokens[row].tolist(), strict=True))
        pairs = pairs[: grown.mask[row].sum()]
        for node in path_to(leaf, grown.tree)[1:]:
            text = [token for token_node, token in pairs if token_node == node]
            assert texts.setdefault(node, text) == text
    return texts


@given(grown_trees())
def test_parents_come_before_their_children(grown):
    parent = grown.tree.parent
    assert parent[: grown.prompts] == [-1] * grown.prompts
    assert all(node_before < node for node, node_before in enumerate(parent))


@given(grown_trees())
def test_every_stem_that_was_asked_for_is_a_node(grown):
    assert grown.asked[0] == grown.prompts * grown.settings.branching[0]
    assert len(grown.tree.parent) == grown.prompts + sum(grown.asked)


@given(grown_trees())
def test_a_level_has_its_branching(grown):
    """Where a response goes on."""
    children = children_of(grown.tree)
    for node, count in enumerate(children):
        level = len(path_to(node, grown.tree)) - 1
        if count:
            assert count == grown.settings.branching[level]


@given(grown_trees())
def test_the_rows_are_the_nodes_without_children(grown):
    """In the order of the tree."""
    children = children_of(grown.tree)
    assert sorted(grown.tree.leaf) == [node for node, count in enumerate(children) if not count]
    paths = [path_to(leaf, grown.tree) for leaf in grown.tree.leaf]
    assert paths == sorted(paths)


@given(grown_trees())
def test_a_row_reads_as_the_path_to_its_leaf(grown):
    for row, leaf in enumerate(grown.tree.leaf):
        path = path_to(leaf, grown.tree)
        assert path[0] == grown.prompt[row]
        nodes = grown.tree.nodes[row][grown.mask[row]].tolist()
        assert list(dict.fromkeys(nodes)) == path[1:]


@given(grown_trees())
def test_siblings_share_what_stands_before_them(grown):
    text_of_nodes(grown)


@given(grown_trees())
def test_nothing_follows_an_end(grown):
    children = children_of(grown.tree)
    for node, text in text_of_nodes(grown).items():
        assert 9 not in text[:-1]
        if text[-1] == 9:
            assert children[node] == 0


@given(grown_trees())
def test_no_response_is_longer_than_it_may_be(grown):
    assert grown.tokens.shape[1] <= grown.settings.max_new_tokens
    children = children_of(grown.tree)
    for node, text in text_of_nodes(grown).items():
        if children[node]:
            assert len(text) <= grown.settings.segment_tokens


@given(grown_trees())
def test_the_loss_reads_each_edge_once(grown):
    """All tokens of every node whose advantage is not 0, in one row each."""
    _, loss_mask = baselines.tree_credit(grown.tree, grown.rewards, grown.mask)
    advantages = baselines.tree_advantages(grown.tree, grown.rewards)
    expected = []
    for node, text in text_of_nodes(grown).items():
        if advantages[node] != 0:
            expected += [node] * len(text)
    assert sorted(grown.tree.nodes[loss_mask].tolist()) == sorted(expected)


@given(grown_trees())
def test_siblings_advantages_sum_to_zero(grown):
    """The parent is their mean."""
    advantages = baselines.tree_advantages(grown.tree, grown.rewards)
    for node in range(len(grown.tree.parent)):
        siblings = [child for child, parent in enumerate(grown.tree.parent) if parent == node]
        assert abs(advantages[siblings].sum()) < 1e-9


def test_the_last_level_may_fill_what_the_shortest_stem_leaves():
    """Stems of one and of three tokens: the longest response has five."""
    limits = []

    def write(prompt, prefix, lengths, limit):
        limits.append(limit)
        tokens = torch.ones(len(prompt), limit, dtype=torch.long)
        mask = torch.arange(limit) < torch.tensor([[1], [3]])
        return tokens, mask, [["a"] * int(count) for count in mask.sum(1)]

    settings = SimpleNamespace(branching=[2, 1], segment_tokens=3, max_new_tokens=5)
    baselines.grow(1, settings, write, lambda text: False)
    assert limits == [3, 5 - 1]


def test_the_children_of_a_node_are_asked_for_side_by_side():
    prompts = []

    def write(prompt, prefix, lengths, limit):
        prompts.append(prompt.tolist())
        ones = torch.ones(len(prompt), 1, dtype=torch.long)
        return ones, ones > 0, [["a"] for _ in prompt]

    settings = SimpleNamespace(branching=[2, 2], segment_tokens=1, max_new_tokens=5)
    baselines.grow(2, settings, write, lambda text: False)
    assert prompts == [[0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_a_stem_is_what_the_policy_wrote():
    """What the mask of `write` leaves out goes into no prefix and no response."""
    prefixes = []

    def write(prompt, prefix, lengths, limit):
        assert prefix.dtype == torch.long  # also where nothing is written yet
        prefixes.append((prefix.tolist(), lengths.tolist()))
        return torch.tensor([[7, 8, 9]]), torch.tensor([[True, False, True]]), [["a", "", "b"]]

    texts = []
    settings = SimpleNamespace(branching=[1, 1, 1], segment_tokens=3, max_new_tokens=9)

    def ended(text):  # asked of every stem but the last
        texts.append(text)
        return len(text) > 2

    prompt, tokens, mask, tree = baselines.grow(1, settings, write, ended)
    assert texts == ["ab", "abab"]
    assert prefixes == [([[]], [0]), ([[7, 9]], [2])]
    assert tokens.tolist() == [[7, 9, 7, 9]]
    assert mask.all()
    assert tree.nodes.tolist() == [[1, 1, 2, 2]]
    assert prompt.tolist() == [0]


def test_a_stem_that_gets_no_answer_is_an_error():
    """A tree would lose a branch, and the others would be compared without it."""

    def write(prompt, prefix, lengths, limit):
        tokens = torch.ones(len(prompt), limit, dtype=torch.long)
        return tokens, tokens > 0, [["a"] * limit for _ in prompt[1:]]

    settings = SimpleNamespace(branching=[2, 2], segment_tokens=1, max_new_tokens=5)
    with pytest.raises(ValueError, match="shorter"):
        baselines.grow(1, settings, write, lambda text: False)


@pytest.mark.parametrize(
    "changes",
    [{"branching": []}, {"branching": [2, 0]}, {"segment_tokens": 0}, {"max_new_tokens": 20}],
)
def test_trees_that_cannot_grow_are_refused(changes):
    possible = {"branching": [2, 2, 2], "segment_tokens": 10, "max_new_tokens": 64}
    settings = SimpleNamespace(**possible | changes)
    with pytest.raises(ValueError, match="branching"):
        baselines.grow(1, settings, None, None)
