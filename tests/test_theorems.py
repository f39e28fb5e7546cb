"""lab/theorems.py: what holds of the project's own functions, and that each theorem refutes a
function that is wrong."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import baselines
import sapo
from lab import estimators, theorems
from lab.enumeration import world
from lab.theorems import THEOREMS, Claimant, Refuted, suite

FEW = 100  # examples, as many as the command tries by itself
NAMES = [theorem.name for theorem in THEOREMS]


def theorem_called(name):
    return THEOREMS[NAMES.index(name)]


# ------------------------------------------------------------------------------- what holds


def token_loss(logp, old_logp, advantages, mask):
    """PPO's, the mean over all tokens."""
    ratio = sapo.importance_ratio(logp, old_logp, mask, mask, "token")
    return sapo.policy_loss(ratio, advantages, mask, average="token")[0]


TestSegmentGae = suite(sapo.segment_gae, examples=FEW)
TestSegmentRatio = suite(sapo.segment_ratio, examples=FEW)
TestGroupAdvantages = suite(
    baselines.group_advantages, except_for=("unbiased_in_a_group",), examples=FEW
)
TestTokenLoss = suite(token_loss, examples=FEW)
TestSapoLoss = suite(estimators.sapo_loss, except_for=("every_token_alike",), examples=FEW)


# ------------------------------------------------------------------------------- what does not


def gae_with(step, next_of=lambda values, mask, t: values[:, t]):
    """Token GAE, one token at a time; `step` is given what a token's advantage is made of."""

    def gae(rewards, values, mask, gamma, lam):
        advantages = torch.zeros_like(values)
        advantage = next_value = torch.zeros(len(values), dtype=values.dtype)
        for t in reversed(range(values.shape[1])):
            now = step(rewards[:, t], values[:, t], next_value, advantage, gamma, lam)
            advantage = torch.where(mask[:, t], now, advantage)
            next_value = torch.where(mask[:, t], next_of(values, mask, t), next_value)
            advantages[:, t] = torch.where(mask[:, t], now, 0.0)
        return advantages

    return gae


def right_step(reward, value, next_value, advantage, gamma, lam):
    return reward + gamma * next_value - value + gamma * lam * advantage


right = gae_with(right_step)


def no_baseline(reward, value, next_value, advantage, gamma, lam):
    return reward + gamma * next_value + gamma * lam * advantage


def lambda_twice(reward, value, next_value, advantage, gamma, lam):
    return reward + gamma * next_value - value + gamma * lam**2 * advantage


def half_a_value(reward, value, next_value, advantage, gamma, lam):
    return reward + 0.5 * (gamma * next_value - value) + gamma * lam * advantage


def clipped_reward(reward, value, next_value, advantage, gamma, lam):
    return right_step(reward.clamp(-1, 1), value, next_value, advantage, gamma, lam)


def reads_the_padding(rewards, values, mask, gamma, lam):
    """V after the last token is whatever stands there."""
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = (rewards + gamma * after - values) * mask
    return right(delta, torch.zeros_like(values), mask, gamma, lam)


def bootstraps_at_the_end(rewards, values, mask, gamma, lam):
    last = theorems.is_last(mask)
    return right(rewards + gamma * torch.where(last, values, 0.0), values, mask, gamma, lam)


def multiplies_by_the_mask(rewards, values, mask, gamma, lam):
    return right(rewards * mask, values * mask, mask, gamma, lam) + 0 * (values * mask).sum()


def knows_no_holes(rewards, values, mask, gamma, lam):
    until_the_last = mask.flip(1).cumsum(1).flip(1) > 0
    return right(rewards * mask, values * mask, until_the_last, gamma, lam) * mask


def of_the_row_above(rewards, values, mask, gamma, lam):
    return right(rewards, values, mask, gamma, lam) + rewards[:1, :1]


def whitened(rewards, values, mask, gamma, lam):
    return sapo.whiten(right(rewards, values, mask, gamma, lam), mask)


def over_the_count(rewards, values, mask, gamma, lam):
    return right(rewards, values, mask, gamma, lam) * (
        mask.sum(1, keepdim=True) / mask.sum(1)[:, None]
    )


def judged_by_what_came_of_it(rewards, values, mask, gamma, lam):
    """V after a token is the baseline of that token."""
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return right(rewards, torch.zeros_like(values), mask, gamma, lam) - after


def ignores_the_cut(rewards, values, ends, mask, gamma, lam):
    return right(rewards, values, mask, gamma, lam)


def of_whole_responses(rewards, values, ends, mask, gamma, lam):
    total = torch.where(mask, rewards, 0.0).sum(1, keepdim=True)
    return (total - values[:, :1]).expand(mask.shape)


def refuses_one_token(rewards, values, mask, gamma, lam):
    if mask.sum() == 1:
        raise ValueError("one token has no variance")
    return right(rewards, values, mask, gamma, lam)


def grouped(function):
    def advantages(rewards, group):
        return function(rewards.view(-1, group)).flatten()

    return advantages


def over_the_batch(rewards, group):
    centred = rewards.view(-1, group) - rewards.view(-1, group).mean(1, keepdim=True)
    return centred.flatten() / (rewards.std() + 1e-6)


def nan_runs_on(rewards, group):
    """Nothing but a NaN shows it."""
    centred = rewards.view(-1, group) - rewards.view(-1, group).mean(1, keepdim=True)
    return centred.flatten() + 0.0 * rewards.cumsum(0)


def last_group_wrong_way(rewards, group):
    centred = rewards.view(-1, group) - rewards.view(-1, group).mean(1, keepdim=True)
    if len(centred) > 1:
        centred[-1] *= -1
    return centred.flatten()


def groups_of_three_only(rewards, group):
    if group != 3:
        raise ValueError("expected three")
    return baselines.group_advantages(rewards, group)


def ratio_of(function):
    """A ratio of a response's log-ratios (B, T), 0 off the mask."""

    def ratio(logp, old_logp, mask):
        return function(torch.where(mask, logp - old_logp, 0.0), mask)

    return ratio


def response_ratio(logp, old_logp, ends, mask):
    return sapo.importance_ratio(logp, old_logp, ends, mask, "response")


def cubed_ratio(logp, old_logp, ends, mask):
    return sapo.segment_ratio(logp, old_logp, ends, mask) ** 3


def of_the_first_token(logp, old_logp, mask):
    return (logp - old_logp)[:, :1].exp()


def on_first_tokens_only(logp, old_logp, ends, mask):
    """The segment's ratio stands on its first token, the others have their own."""
    ratio = sapo.segment_ratio(logp, old_logp, ends, mask)
    own = torch.where(mask, logp - old_logp, 0.0).exp()
    return torch.where(sapo.boundaries(ends, mask), ratio, own)


def over_the_length(rewards, values, mask, gamma, lam):
    return right(rewards, values, mask, gamma, lam) / mask.sum(1, keepdim=True)


def gradient_of_nan(logp, old_logp, advantages, mask):
    """The loss is masked, its gradient is not: 0 * NaN is NaN."""
    ratio = (logp - old_logp).exp()
    per_token = torch.where(mask, clipped(ratio, advantages), 0.0)
    return -per_token.sum() / mask.sum()


def loss_of(objective):
    """-(the mean over all tokens of an objective of token ratio and advantage)."""

    def loss(logp, old_logp, advantages, mask):
        ratio = torch.where(mask, logp - old_logp, 0.0).exp()
        per_token = torch.where(mask, objective(ratio, torch.where(mask, advantages, 0.0)), 0.0)
        return -per_token.sum() / mask.sum()

    return loss


def clipped(ratio, advantages):
    return torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def over_all_positions(logp, old_logp, advantages, mask):
    return token_loss(logp, old_logp, advantages, mask) * mask.sum() / mask.numel()


def with_nan(logp, old_logp, advantages, mask):
    ratio = (logp - old_logp).exp()
    return -(clipped(ratio, advantages) * mask).sum() / mask.sum()


def first_row_twice(logp, old_logp, advantages, mask):
    once = token_loss(logp, old_logp, advantages, mask)
    return once + token_loss(logp[:1], old_logp[:1], advantages[:1], mask[:1])


def mean_of_means(logp, old_logp, advantages, mask):
    ratio = torch.where(mask, logp - old_logp, 0.0).exp()
    per_token = torch.where(mask, clipped(ratio, advantages), 0.0)
    return -(per_token.sum(1) / mask.sum(1)).mean()


def refuses_one_token_loss(logp, old_logp, advantages, mask):
    if mask.sum() == 1:
        raise ValueError("one token has no variance")
    return token_loss(logp, old_logp, advantages, mask)


WRONG = [
    ("any_batch", refuses_one_token),
    ("any_batch", refuses_one_token_loss),
    ("padding", reads_the_padding),
    ("padding", ratio_of(lambda d, mask: d.mean(1).exp())),
    ("nan_off_the_mask", multiplies_by_the_mask),
    ("nan_off_the_mask", with_nan),
    ("nan_off_the_mask", gradient_of_nan),
    ("holes", knows_no_holes),
    ("holes", ratio_of(lambda d, mask: d[:, :1].exp() * torch.ones_like(d) + d.diff(dim=1).sum())),
    ("order_of_the_batch", of_the_row_above),
    ("order_of_the_batch", first_row_twice),
    ("company", whitened),
    ("company", ratio_of(lambda d, mask: (d.sum() / mask.sum()).exp().expand(len(d)))),
    ("an_empty_response", over_the_count),
    ("an_empty_response", mean_of_means),
    ("telescoping", gae_with(no_baseline)),
    ("td_error", bootstraps_at_the_end),
    ("the_sum", gae_with(lambda_twice)),
    ("linear_in_the_rewards", gae_with(clipped_reward)),
    ("a_constant_in_the_values", gae_with(half_a_value)),
    ("one_token_per_segment", of_whole_responses),
    ("one_segment", ignores_the_cut),
    ("shared_by_a_segment", ignores_the_cut),
    ("unbiased", judged_by_what_came_of_it),
    ("unbiased", estimators.sapo_value_at_end),
    ("unbiased", over_the_length),
    ("sum_to_zero", grouped(lambda r: r - 0.5)),
    ("equal_rewards", grouped(lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True))),
    ("origin_of_the_rewards", grouped(lambda r: r / (r.mean(1, keepdim=True).abs() + 1))),
    ("better_is_better", grouped(lambda r: r.mean(1, keepdim=True) - r)),
    ("better_is_better", grouped(lambda r: r.sign() - r.sign().mean(1, keepdim=True))),
    ("other_groups", over_the_batch),
    ("nan_stays_in_its_group", nan_runs_on),
    ("better_is_better", last_group_wrong_way),
    ("other_groups", last_group_wrong_way),
    ("any_batch", groups_of_three_only),
    ("unbiased_in_a_group", baselines.group_advantages),
    ("one_on_policy", ratio_of(lambda d, mask: (d + 1e-9).exp())),
    ("equation_8", of_the_first_token),
    ("equation_8", on_first_tokens_only),
    ("equation_8", estimators.sapo_product),
    ("geometric", estimators.sapo_product),
    ("token_ratio", response_ratio),
    ("between_its_tokens", estimators.sapo_product),
    ("reciprocal", ratio_of(lambda d, mask: d.exp().clamp(max=2.0))),
    ("bound_of_the_root", cubed_ratio),
    ("padding_of_a_loss", over_all_positions),
    ("equation_13", estimators.sapo_product_loss),
    ("equation_13", loss_of(lambda ratio, advantages: clipped(ratio, advantages.abs()))),
    ("every_token_alike", estimators.sapo_loss),
    ("pessimistic", loss_of(lambda r, a: torch.maximum(r * a, r.clamp(0.8, 1.2) * a))),
    ("a_way_back", loss_of(lambda r, a: r.clamp(0.8, 1.2) * a)),
    ("the_clip_works", loss_of(lambda r, a: r * a)),
]


@pytest.mark.parametrize(
    ("name", "wrong"), WRONG, ids=[f"{n}-{i}" for i, (n, _) in enumerate(WRONG)]
)
def test_a_theorem_refutes_who_breaks_it(name, wrong):
    assert theorem_called(name).applies_to(Claimant(wrong))
    with pytest.raises(Refuted) as refuted:
        theorem_called(name).check(wrong, FEW)
    assert name == "any_batch" or "raised" not in str(refuted.value)  # by its answers


def test_every_theorem_is_broken_above():
    assert {name for name, _ in WRONG} == set(NAMES)


def test_a_function_without_a_mask_is_asked_for_responses_of_one_length():
    def unpadded(rewards, values, gamma, lam):
        return right(rewards, values, torch.ones_like(values, dtype=torch.bool), gamma, lam)

    found = {verdict.theorem.name: verdict.outcome for verdict in theorems.verdicts(unpadded, FEW)}
    assert found["padding"] == found["holes"] == "does not apply"
    assert found["telescoping"] == found["the_sum"] == found["unbiased"] == "holds"


def nan_gae(rewards, values, ends, mask, gamma, lam):
    return values * math.nan


def nan_group(rewards, group):
    return rewards * math.nan


def nan_ratio(logp, old_logp, ends, mask):
    return logp * math.nan


def nan_loss(logp, old_logp, advantages, mask):
    return (logp * math.nan).sum()


@pytest.mark.parametrize("broken", [nan_gae, nan_group, nan_ratio, nan_loss])
def test_nan_satisfies_no_theorem_but_that_it_is_an_answer(broken):
    found = {verdict.theorem.name: verdict.outcome for verdict in theorems.verdicts(broken, 50)}
    assert [name for name, outcome in found.items() if outcome == "holds"] == ["any_batch"]


def test_who_gives_nothing_back_is_told_so():
    with pytest.raises(Refuted, match="it gave None, expected a tensor"):
        theorem_called("telescoping").check(lambda rewards, values, mask, gamma, lam: None, FEW)


@pytest.mark.parametrize("name", [of.name for of in theorems.theorems_for(Claimant(right))])
def test_the_plain_gae_that_the_wrong_ones_are_made_of_is_right(name):
    theorem_called(name).check(right, FEW)


def test_a_refusal_of_some_batches_refutes_nothing_else():
    """It is `any_batch` alone that minds."""
    theorem_called("telescoping").check(refuses_one_token, FEW)


def test_who_refuses_every_batch_is_told_its_own_words():
    def unusable(rewards, values, mask, gamma, lam):
        raise RuntimeError("no such kernel")

    with pytest.raises(Refuted, match="no such kernel"):
        theorem_called("telescoping").check(unusable, FEW)


# ------------------------------------------------------------------------- wrong when large


def forgets_late_tokens(rewards, values, mask, gamma, lam):
    return right(rewards, values, mask, gamma, lam) * (torch.arange(values.shape[1]) < 5)


def mixes_many_rows(rewards, values, mask, gamma, lam):
    advantages = right(rewards, values, mask, gamma, lam)
    return advantages if len(advantages) < 5 else advantages.flip(0)


def clamped_at_20(rewards, values, mask, gamma, lam):
    return right(rewards, values, mask, gamma, lam).clamp(-20, 20)


def knows_some_discounts(rewards, values, mask, gamma, lam):
    known = gamma if gamma in (1.0, 0.9, 0.5, 0.0) else 0.0
    return right(rewards, values, mask, known, lam)


def centred(rewards, group):
    grouped_rewards = rewards.view(-1, group)
    return (grouped_rewards - grouped_rewards.mean(1, keepdim=True)).flatten()


def large_groups_wrong_way(rewards, group):
    return centred(rewards, group) * (1 if group <= 4 else -1)


def group_clamped_at_5(rewards, group):
    return centred(rewards, group).clamp(-5, 5)


def of_the_first_five_tokens(logp, old_logp, mask):
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    return log_ratio[:, :5].sum(1).div(mask[:, :5].sum(1)).exp()


def of_small_advantages(logp, old_logp, advantages, mask):
    return token_loss(logp, old_logp, advantages.clamp(-5, 5), mask)


@pytest.mark.parametrize(
    ("name", "wrong", "place"),
    [
        ("telescoping", forgets_late_tokens, "the advantage of row 0, token 5 is -?0, not"),
        ("the_sum", mixes_many_rows, "the advantage of row 0, token 0 is"),
        ("company", mixes_many_rows, r"of row \d in the batch"),
        ("td_error", clamped_at_20, "is -?20, not"),
        ("linear_in_the_rewards", clamped_at_20, "is -?20, not"),
        ("the_sum", knows_some_discounts, "the advantage of row 0, token 0 is"),
        ("better_is_better", large_groups_wrong_way, r"responses \d+ and \d+ earned"),
        ("better_is_better", group_clamped_at_5, "and get 5 and 5|and get -5 and -5"),
        ("sum_to_zero", group_clamped_at_5, "the sum of the group"),
        ("equation_8", of_the_first_five_tokens, "the ratio of row 0, token 0 is"),
        ("equation_13", of_small_advantages, "the push of row 0, token 0 is"),
    ],
)
def test_a_large_case_refutes_who_is_wrong_only_there(name, wrong, place):
    with pytest.raises(Refuted, match=f"^in a large case .*: .*({place})") as refuted:
        theorem_called(name).check(wrong, FEW)
    assert len("; ".join(theorems.asked(refuted.value.calls))) < 500  # no dump of its numbers


def test_what_is_wrong_when_small_is_shown_small():
    with pytest.raises(Refuted) as refuted:
        theorem_called("telescoping").check(gae_with(no_baseline), FEW)
    assert "large" not in str(refuted.value)


def test_the_report_of_a_large_case_says_what_was_asked_without_its_numbers():
    telescoping = theorem_called("telescoping")
    with pytest.raises(Refuted) as refuted:
        telescoping.check(clamped_at_20, 5)
    verdict = theorems.Verdict(telescoping, "fails", str(refuted.value), refuted.value.calls)
    text = theorems.report(clamped_at_20, [verdict])
    assert "in a large case (seed 0: 9 rows, 40 tokens, gamma 1, lam 1): the advantage" in text
    assert "asked: rewards [9 x 40 numbers], values [9 x 40 numbers]" in text


def test_the_page_says_what_sizes_are_tried():
    page = (estimators.ROOT / "docs" / "theorems.md").read_text()
    small, large = theorems.Small, theorems.Large
    assert f"| 1 to {small.rows} of up to {small.tokens} tokens | {large.rows} of up to " in page
    assert f" of up to {large.tokens} tokens, segments of 4 on average |" in page
    assert f"| 1 to {small.prompts} of 2 to {small.group} responses | {large.prompts} of " in page
    assert f" of {large.group} responses |" in page
    assert f"any number from -{large.greatest:.0f} to {large.greatest:.0f} |" in page
    assert f"{theorems.EXAMPLES} small cases" in page and theorems.LARGE_CASES == 3


def test_a_large_case_is_the_same_each_time():
    first, again = (theorems.group_case(theorems.Large(1)) for _ in range(2))
    assert first.group == 8 and torch.equal(first.rewards, again.rewards)
    assert first.rewards.abs().max() > 100


def test_a_large_batch_that_is_refused_is_refused_by_any_batch():
    def small_batches_only(rewards, values, mask, gamma, lam):
        if len(rewards) > 4:
            raise ValueError("too many rows")
        return right(rewards, values, mask, gamma, lam)

    theorem_called("telescoping").check(small_batches_only, FEW)
    with pytest.raises(Refuted, match="in a large case .*too many rows"):
        theorem_called("any_batch").check(small_batches_only, FEW)


# ----------------------------------------------------------------------- the counterexample


def test_the_counterexample_is_small_and_shown_with_what_was_asked():
    with pytest.raises(Refuted) as refuted:
        theorem_called("padding").check(reads_the_padding, 100)
    longer, plain = refuted.value.calls
    assert plain["mask"].tolist() == [[True]]
    assert longer["mask"].tolist() == [[True, False]]
    assert theorems.asked(refuted.value.calls)[0].startswith("rewards [[0.0, ")
    assert "the advantage of row 0, token 0 is" in str(refuted.value)


def test_a_report_says_what_holds_what_fails_and_what_that_means():
    text = theorems.report(reads_the_padding, theorems.verdicts(reads_the_padding, 20))
    assert "reads_the_padding(rewards, values, mask, gamma, lam), a gae" in text
    assert "fails          padding: Padding changes nothing" in text
    assert "so:    short responses are judged by how long the others are." in text
    assert "does not apply one_segment" in text and "it takes no ends" in text


def test_an_answer_of_another_shape_is_refuted():
    with pytest.raises(Refuted, match=r"it gave \(\), expected the shape \(1, 1\)"):
        theorem_called("telescoping").check(
            lambda rewards, values, mask, gamma, lam: rewards.sum(), FEW
        )


def test_a_function_may_not_change_what_it_is_given():
    """In place: the theorem goes on with its own tensors."""

    def in_place(rewards, values, mask, gamma, lam):
        advantages = right(rewards, values, mask, gamma, lam)
        rewards.zero_()
        return advantages

    theorem_called("linear_in_the_rewards").check(in_place, FEW)


# ---------------------------------------------------------------------------- kinds, adapters


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (sapo.segment_gae, "gae"),
        (estimators.sb3_gae, "gae"),
        (baselines.group_advantages, "group"),
        (sapo.segment_ratio, "ratio"),
        (token_loss, "loss"),
    ],
)
def test_the_parameters_say_what_it_is(function, kind):
    assert Claimant(function).kind == kind


def test_parameters_of_another_name_keep_their_defaults():
    assert "value_at" not in Claimant(sapo.segment_gae).parameters


def test_whatever_else_it_takes_may_stay_away_and_the_order_is_free():
    def mine(gamma, lam, *rest, mask, values, rewards, **options):
        return right(rewards, values, mask, gamma, lam)

    theorem_called("telescoping").check(mine, FEW)


def test_an_exception_for_a_theorem_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no theorem is called holse"):
        suite(right, except_for=("padding", "holse"))


def test_what_is_no_function_is_told_so():
    with pytest.raises(ValueError, match="expected a function"):
        Claimant(sapo.RATIOS)


def test_who_needs_an_adapter_is_told_so():
    def theirs(values, rewards, terminals):
        return values

    with pytest.raises(ValueError, match=r"\(values, rewards, terminals\).*write an adapter"):
        Claimant(theirs)


# --------------------------------------------------------------------------- the command line


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lab.theorems", *arguments],
        capture_output=True,
        text=True,
        cwd=estimators.ROOT,
    )


def test_the_command_reports_and_exits_by_what_fails():
    done = command("baselines:group_advantages", "--examples", "5")
    assert done.returncode == 1  # GRPO's spread
    assert "7 hold, 1 fail" in done.stdout


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sapo", "expected module:function"),
        (":gae", "expected module:function"),
        ("nowhere/mine.py:gae", r"no such file.*or path/to/file\.py:function"),
        ("nowhere:gae", "No module named 'nowhere'"),
        ("sapo:nothing", "has no attribute 'nothing'"),
        ("sapo:policy_loss", "write an adapter"),
    ],
)
def test_a_wrong_name_is_one_line(name, line):
    with pytest.raises(SystemExit, match=f"^python -m lab.theorems: .*{line}"):
        theorems.main([name])


@pytest.mark.parametrize("name", ["mine:my_gae", "my/sapo.py:my_gae", "./my/sapo.py:my_gae"])
def test_a_function_elsewhere_is_found_by_its_module_or_its_file(tmp_path, name):
    """In a folder of the user's, whose file is called as one of ours and imports its neighbour."""
    (tmp_path / "my").mkdir()
    (tmp_path / "mine.py").write_text(
        "def my_gae(rewards, values):\n    return rewards.flip(1).cumsum(1).flip(1) - values\n"
    )
    (tmp_path / "my" / "beside.py").write_text((tmp_path / "mine.py").read_text())
    (tmp_path / "my" / "sapo.py").write_text("from beside import my_gae\n")
    done = subprocess.run(
        [sys.executable, "-m", "lab.theorems", name, "--examples", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(estimators.ROOT)},
    )
    assert done.stdout.startswith("my_gae(rewards, values), a gae"), done.stderr
    assert done.returncode == 0 and "4 hold, 0 fail" in done.stdout


def test_numbers_that_differ_late_are_told_apart():
    due = torch.tensor([[-52.1398]], dtype=torch.float64)
    with pytest.raises(Refuted, match="it of row 0, token 0 is -52.1399, not -52.1398$"):
        theorems.is_equal(due - 1e-4, due, "it")
    with pytest.raises(Refuted, match="is -52.13981, not -52.1398$"):
        theorems.is_equal(due - 1e-5, due, "it")


def test_without_examples_there_is_no_test():
    with pytest.raises(SystemExit):
        theorems.parse(["sapo:segment_gae", "--examples", "0"])


# -------------------------------------------------------------------------------- the table


def rows():
    return json.loads(estimators.FILE.read_text())["rows"]


def test_the_table_has_every_estimator_and_every_theorem_of_its_kind():
    names = [name for functions in estimators.ESTIMATORS.values() for name in functions]
    assert [row["name"] for row in rows()] == names
    for row in rows():
        kinds = [theorem.name for theorem in THEOREMS if row["kind"] in theorem.kinds]
        assert list(row["verdicts"]) == kinds


@pytest.mark.parametrize(
    "name", ["`--method grpo`", "`--ratio product`", "SAPO's loss as released"]
)
def test_the_table_says_what_the_theorems_say_today(name):
    function = estimators.ESTIMATORS[""][name]
    fresh = estimators.row_of(name, function, "", 50)["verdicts"]
    (kept,) = (row["verdicts"] for row in rows() if row["name"] == name)
    outcomes = {theorem: verdict["outcome"] for theorem, verdict in kept.items()}
    assert {theorem: verdict["outcome"] for theorem, verdict in fresh.items()} == outcomes


def test_the_angles_and_versions_that_the_page_names_are_those_of_the_table():
    page = " ".join((estimators.ROOT / "docs" / "theorems.md").read_text().split())
    of_name = {row["name"]: row for row in rows()}

    def angles(name, theorem):
        reason = of_name[name]["verdicts"][theorem]["reason"]
        return map(float, re.search(r"is ([\d.]+) degrees .* ([\d.]+) at most", reason).groups())

    mean, largest = angles("V at the end", "unbiased")
    assert f"{mean:.0f} degrees off the true one on average, and {largest:.0f} at most" in page
    mean, largest = angles("`--method grpo`", "unbiased_in_a_group")
    assert f"{mean:.0f} degrees off on average, {largest:.0f} at most" in page
    packages = {"verl": "verl", "trl": "TRL", "torchrl": "torchrl"}
    packages["stable-baselines3"] = "stable-baselines3"
    for row in rows():
        if row["package"]:
            assert f"{packages[row['package']]} {row['version']}" in page
        assert row["date"] in page and f"{row['examples']} examples" in page
    assert f"There are {len(THEOREMS)} theorems." in page


@pytest.mark.parametrize("package", [package for package in estimators.ESTIMATORS if package])
def test_an_adapter_calls_its_library(package):
    """Where it raises, the table says so."""
    if estimators.version(package) is None:
        pytest.skip(f"{package} is not installed")
    for name, function in estimators.ESTIMATORS[package].items():
        fresh = estimators.row_of(name, function, package, 10)["verdicts"]
        raised = {theorem for theorem, of in fresh.items() if "it raised" in of.get("reason", "")}
        (kept,) = (row["verdicts"] for row in rows() if row["name"] == name)
        assert raised <= {theorem for theorem, of in kept.items() if of["outcome"] == "fails"}


def test_a_library_that_is_missing_keeps_its_verdicts(monkeypatch, tmp_path):
    monkeypatch.setattr(estimators, "FILE", tmp_path / "theorems.json")
    kept = {"name": "theirs", "verdicts": {"kept": "as it was"}}
    estimators.FILE.write_text(json.dumps({"rows": [kept]}))
    monkeypatch.setattr(estimators, "ESTIMATORS", {"no-such-package": {"theirs": right}})
    assert "no-such-package is not installed" in estimators.write_table(FEW)
    assert json.loads(estimators.FILE.read_text())["rows"] == [kept]


def test_the_world_of_the_exact_expectation_is_complete():
    w = world(3)
    assert w.probability(w.logits).sum().item() == pytest.approx(1)
