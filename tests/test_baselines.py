"""baselines.py: settings, cuts, the identities of VC-PPO and GSPO, and what a loss leaves out.

GRPO and SRPO are in test_baselines_groups.py, VinePPO and SPO-chain in
test_baselines_continuations.py, SPO-tree in test_baselines_tree.py.
"""

import math
import typing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loops import cut_at, policy_positions, random_rollout
from strategies import batches, tensors
from torch.testing import assert_close

import baselines
import sapo
import train
from sapo import Rollout, SAPOConfig


def values_of(setting):
    """The values that a setting of Method may have."""
    return typing.get_args(typing.get_type_hints(baselines.Method)[setting])


# ----------------------------------------------------------------------------------- settings


def test_the_defaults_are_sapo_with_a_narrower_clip():
    """Its ratio is a mean, as GSPO's is; all else of it stands in SAPOConfig."""
    assert baselines.Method().method == "sapo"
    assert set(baselines.SETTINGS["sapo"]) == {"clip_low", "clip_high"}
    token, segment, response = (
        train.parse(["--method", method])[1].clip_high for method in ("ppo", "sapo", "gspo")
    )
    assert token > segment > response


def test_every_method_of_the_command_line_has_settings():
    assert set(baselines.SETTINGS) == set(values_of("method"))


@pytest.mark.parametrize("method", baselines.SETTINGS)
def test_a_method_is_a_set_of_settings(method):
    changes = baselines.SETTINGS[method]
    assert set(changes) <= {*vars(SAPOConfig()), *vars(baselines.Method())}
    settings, config = train.parse(["--method", method])
    assert changes.items() <= (vars(settings) | vars(config)).items()


@pytest.mark.parametrize(
    ("method", "count"),
    [("sapo", 1), ("vc-ppo", 1), ("spo-chain", 1), ("grpo", 5), ("srpo", 5), ("spo-tree", 6)],
)
def test_responses_per_prompt(method, count):
    """A group, a tree's leaves, or one."""
    settings = baselines.Method(group=5, branching=[3, 2])
    settings.credit = baselines.SETTINGS[method].get("credit", "critic")
    assert baselines.responses_per_prompt(settings) == count


def checked(credit, batch, has_picture=True):
    settings = SimpleNamespace(
        **vars(baselines.Method(credit=credit, group=8, branching=[3, 2])),
        batch=batch,
        env="SAPO/TextSum-v0",
    )
    baselines.check(settings, has_picture)


def test_a_batch_of_whole_groups_and_trees_is_fine():
    checked("critic", 7)
    checked("group", 16)
    checked("tree", 18)
    checked("roles", 8)


@pytest.mark.parametrize(("credit", "batch"), [("group", 12), ("roles", 12), ("tree", 8)])
def test_a_batch_that_does_not_divide_is_refused(credit, batch):
    with pytest.raises(ValueError, match=rf"--batch {batch}: --credit {credit} needs a multiple"):
        checked(credit, batch)


def test_roles_without_a_picture_are_refused():
    with pytest.raises(ValueError, match="SAPO/TextSum-v0 has no picture"):
        checked("roles", 8, has_picture=False)


def test_groups_need_no_picture():
    checked("group", 8, has_picture=False)


# --------------------------------------------------------------------------------------- cuts


@given(batches(), st.integers(1, 5))
def test_fixed_ends_against_loops(batch, tokens):
    expected = []
    for row in policy_positions(batch.mask):
        ends = []
        for number, t in enumerate(row, start=1):
            if number % tokens == 0 or t + 1 not in row:
                ends.append(t)
        expected.append(ends)
    ours = baselines.fixed_ends(batch.mask, tokens)
    assert torch.equal(ours, cut_at(expected, batch.mask))


@pytest.mark.parametrize("tokens", [0, -1])
def test_segments_of_no_token_are_refused(tokens):
    with pytest.raises(ValueError, match="segment_tokens"):
        baselines.fixed_ends(torch.ones(1, 2, dtype=torch.bool), tokens)


# name -> where it ends the segments of the response below, at two tokens a segment
CUTS = {
    "topk": [1, 3, 5],
    "causal": [1, 3, 4, 5],
    "delimiter": [2, 4, 5],
    "low-prob": [4, 5],
    "fixed": [1, 3, 5],
    "token": [0, 1, 2, 3, 4, 5],
    "turn": [5],  # without replies, the response
    "response": [5],
}
TEXTS = [["<see>", "3", "</see>", "a", ";", "b"]]
SIX_TOKENS = torch.ones(1, 6, dtype=torch.bool)
ENTROPY = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.4]])
LOGP = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.95]]))


def test_these_are_the_cuts_of_the_command_line():
    assert set(CUTS) == set(values_of("cut"))


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_of_the_command_line_is_there(name):
    ends = baselines.cut(
        name, SIX_TOKENS, ENTROPY, LOGP, TEXTS, top_k=0.3, threshold=0.25, segment_tokens=2
    )
    assert ends[0].nonzero().flatten().tolist() == CUTS[name]


def test_an_unknown_cut_is_refused():
    with pytest.raises(ValueError, match=r"^cut: 'sentence'"):
        baselines.cut("sentence", SIX_TOKENS, ENTROPY, LOGP, TEXTS)


@pytest.mark.parametrize("top_k", [0.1, 0.5])
def test_the_share_of_the_entropy_cut_is_a_setting(top_k):
    ends = baselines.cut("topk", SIX_TOKENS, ENTROPY, LOGP, TEXTS, top_k=top_k)
    assert torch.equal(ends, sapo.entropy_ends(ENTROPY, SIX_TOKENS, top_k))


def test_without_options_a_cut_is_that_of_the_settings():
    mask = torch.ones(1, 25, dtype=torch.bool)
    entropy = torch.rand(1, 25)
    ends = baselines.cut("topk", mask, entropy, None, None)
    assert torch.equal(ends, sapo.entropy_ends(entropy, mask, SAPOConfig().top_k))
    ends = baselines.cut("fixed", mask, None, None, None)
    assert torch.equal(ends, baselines.fixed_ends(mask, baselines.Method().segment_tokens))


@pytest.mark.parametrize("delimiter", ["\n", ";", "</see>", "</think>"])
def test_a_token_that_holds_a_delimiter_is_marked(delimiter):
    """Alone or with other text; a token of its own or not."""
    texts = [["a", delimiter, f"b{delimiter}c", "d"], [delimiter]]
    mask = torch.arange(5) < torch.tensor([[4], [1]])
    marked = baselines.is_delimiter(texts, mask)
    assert marked.dtype == torch.bool
    assert marked.tolist() == [[False, True, True, False, False], [True] + 4 * [False]]


def test_ordinary_text_is_no_delimiter():
    texts = [["<see>", ",", "<think>", "</answer>", ""]]
    assert not baselines.is_delimiter(texts, torch.ones(1, 5, dtype=torch.bool)).any()


# ---------------------------------------------------------------------------- VC-PPO and GSPO


@given(batches("logp", "rewards", "values"))
def test_vc_ppo_has_ppos_advantages_and_monte_carlo_returns(batch):
    """Decoupled: the actor's advantages know nothing of the critic's lambda, and at 1 the returns
    are plain sums."""
    ends = sapo.token_ends(batch.mask)
    rollout = Rollout(batch.mask, ends, batch.logp, batch.rewards, batch.values)
    ppo = SAPOConfig(lam=0.95)
    advantages, returns = sapo.credit(rollout, replace(ppo, critic_lam=1.0))
    assert torch.equal(advantages, sapo.credit(rollout, ppo)[0])
    assert torch.equal(returns, sapo.credit(rollout, SAPOConfig(lam=1.0))[1])


@given(batches("logp", "rewards", "values"))
def test_with_equal_lambdas_vc_ppo_is_ppo(batch):
    ends = sapo.token_ends(batch.mask)
    rollout = Rollout(batch.mask, ends, batch.logp, batch.rewards, batch.values)
    expected = sapo.credit(rollout, SAPOConfig(lam=0.95))
    ours = sapo.credit(rollout, SAPOConfig(lam=0.95, critic_lam=0.95))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


@given(batches("logp", "old_logp", holes=False))
def test_gspo_is_sapos_ratio_with_one_segment(batch):
    """GSPO's ratio (pi(y) / pi_old(y))^(1/|y|), by loops over responses without holes."""
    ends = baselines.cut("response", batch.mask, None, None, None)
    ratio = sapo.segment_ratio(batch.logp, batch.old_logp, ends, batch.mask)
    for b, row in enumerate(policy_positions(batch.mask)):
        total = sum((batch.logp - batch.old_logp)[b, t].item() for t in row)
        for t in row:
            assert ratio[b, t].item() == pytest.approx(math.exp(total / len(row)))


# --------------------------------------------------------------------- what a loss leaves out


def test_without_a_loss_mask_nothing_changes():
    rollout = random_rollout()
    restricted, advantages = baselines.restrict(rollout, rollout.rewards, None)
    assert restricted is rollout
    assert advantages is rollout.rewards


def restricted_batch(batch, data):
    """(loss mask, restricted rollout, its advantages, those of the whole rollout)."""
    mask = batch.mask
    rollout = Rollout(mask, batch.ends, batch.logp, batch.rewards, batch.values)
    whole, _ = sapo.credit(rollout, SAPOConfig())
    loss_mask = mask & data.draw(tensors(*mask.shape, st.booleans()))
    restricted, advantages = baselines.restrict(rollout, whole, loss_mask)
    return loss_mask, restricted, advantages, whole


@given(batches("logp", "rewards", "values"), st.data())
def test_a_restricted_rollout_keeps_the_credit_of_whole_responses(batch, data):
    """Every token that is left becomes a segment of its own."""
    loss_mask, restricted, advantages, whole = restricted_batch(batch, data)
    assert torch.equal(restricted.mask, loss_mask)
    assert torch.equal(restricted.rewards, batch.rewards)
    assert torch.equal(restricted.ends, loss_mask)
    assert torch.equal(advantages[loss_mask], whole[loss_mask])
    assert not advantages[~loss_mask].any()


@given(batches("logp", "rewards", "values"), st.data())
def test_what_leaves_the_loss_leaves_the_gradient(batch, data):
    """The loss and its gradient are those of the tokens that are left, alone."""
    loss_mask, restricted, advantages, _ = restricted_batch(batch, data)
    logp = batch.logp.clone().requires_grad_()
    ratio = sapo.segment_ratio(logp, restricted.logp, restricted.ends, restricted.mask)
    loss, _ = sapo.policy_loss(ratio, advantages, restricted.mask, average="token")
    loss.backward()
    assert_close(logp.grad, -advantages / max(1, int(loss_mask.sum())))
