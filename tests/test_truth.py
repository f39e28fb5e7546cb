"""lab/truth.py: the ground truth on known cases, and all of it on a small frozen policy."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_sweeps import LEARNED, SUM_TASK, parsed_sweep

import baselines
import rollout
import sapo
import train
import vlm
from lab import figures, truth
from tasks import DiceSum


@pytest.fixture(scope="module")
def small(runs):
    """A warm start that is right now and then: credit needs rewards that differ."""
    return parsed_sweep(*SUM_TASK, "--runs", str(runs), *LEARNED)


# ------------------------------------------------------------------------- one policy for all
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_responses_are_the_same_as_under_sapo(small, method):
    ours, theirs = (truth.frozen(*small, ["--method", name]) for name in ("sapo", method))
    tokens = truth.same_batch(ours, 16, group=4).tokens
    assert torch.equal(tokens, truth.same_batch(theirs, 16, group=4).tokens)


def test_each_prompt_gets_its_group_of_responses(small):
    run = truth.frozen(*small, ["--method", "grpo"])
    assert (
        truth.same_batch(run, 16, group=4).indices.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    )


def test_a_tree_grows_as_many_responses_itself(small):
    run = truth.frozen(*small, ["--method", "spo-tree"])
    indices = truth.same_batch(run, 16).indices
    assert len(indices) <= 16 and set(indices) == {0, 1, 2, 3}  # 2 x 2 leaves at most to each


def test_the_critic_learns_while_the_policy_stays(small):
    fresh, taught = (truth.frozen(*small, ["--method", "ppo"], rollouts) for rollouts in (0, 2))
    weights = [run.models.policy.model.parameters() for run in (fresh, taught)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not torch.equal(fresh.models.critic.head.bias, taught.models.critic.head.bias)


# ----------------------------------------------------------------------- is the credit right?
@pytest.fixture(scope="module")
def demonstrations():
    """40 demonstrations with slips, a token per character: (environments, texts)."""
    rng, environments, texts = np.random.default_rng(0), [], []
    for index in range(40):
        environment = gym.make("SAPO/DiceSum-v0", disable_env_checker=True)
        environment.reset(options={"index": index})
        task, example = environment.unwrapped.task, environment.unwrapped.example
        environments.append(environment)
        texts.append(list(task.demonstrate(example, rng, 0.1)))
    return environments, texts


def known_steps(environment, text):
    """[(first character, past the last, is it right?), ...] as the task says."""
    task, example = environment.unwrapped.task, environment.unwrapped.example
    rights = task.check_steps(example, text)
    return [(a, b, right) for (a, b), right in zip(task.step_spans(text), rights, strict=True)]


@pytest.mark.parametrize(
    ("of_right", "of_wrong", "expected"),
    [(1.0, -1.0, 1.0), (1.0, 1.0, 0.5), (-1.0, 1.0, 0.0)],
    ids=["perfect", "constant", "reversed"],
)
def test_credit_made_from_the_known_steps_is_found_as_good_as_it_is(
    of_right, of_wrong, expected, demonstrations, monkeypatch
):
    environments, texts = demonstrations
    advantages, shares = torch.zeros(40, 120), []
    for row, (environment, text) in enumerate(zip(environments, texts, strict=True)):
        steps = known_steps(environment, "".join(text))
        for a, b, right in steps:
            advantages[row, a:b] = of_right if right else of_wrong
        wrong = [(a, b) for a, b, right in steps if not right]
        if wrong:
            a, b = wrong[0]
            total = advantages[row].abs().sum()
            shares.append(float(advantages[row, a:b].abs().sum() / total))
    batch = SimpleNamespace(envs=environments, texts=texts)
    monkeypatch.setattr(truth, "same_batch", lambda run, count: batch)
    monkeypatch.setattr(train, "assign_credit", lambda run, batch: train.Credit(advantages, None))
    accuracy = truth.credit_accuracy(None, 40)
    assert accuracy["auroc"] == accuracy["auroc_in_wrong_responses"] == expected
    assert accuracy["auroc_of_first_wrong_step"] == expected
    assert accuracy["auroc_interval"][0] == expected
    assert accuracy["wrong_responses"] == len(shares) > 10
    assert accuracy["share_on_first_wrong_step"][0] == pytest.approx(np.mean(shares))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # nor is there an AUROC, in any draw
def test_without_a_wrong_step_there_is_no_share_of_it(demonstrations, monkeypatch):
    environments, texts = demonstrations
    all_right = []
    for row, environment in enumerate(environments):
        if all(right for *_, right in known_steps(environment, "".join(texts[row]))):
            all_right.append(row)
    batch = SimpleNamespace(
        envs=[environments[row] for row in all_right], texts=[texts[row] for row in all_right]
    )
    credit = train.Credit(torch.ones(len(all_right), 120), None)
    monkeypatch.setattr(truth, "same_batch", lambda run, count: batch)
    monkeypatch.setattr(train, "assign_credit", lambda run, batch: credit)
    accuracy = truth.credit_accuracy(None, len(all_right))
    assert accuracy["auroc_in_wrong_responses"] is accuracy["auroc_of_first_wrong_step"] is None
    assert accuracy["wrong_responses"] == 0
    assert accuracy["share_on_first_wrong_step"] is None


def test_steps_in_tokens_hold_the_characters_of_the_steps(demonstrations):
    """Tokens of several characters: a step's are all that hold a character of it."""
    for environment, characters in zip(*demonstrations, strict=True):
        text = "".join(characters)
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        steps = truth.step_tokens(environment, pieces)
        known = known_steps(environment, text)
        assert [right for *_, right in steps] == [right for *_, right in known]
        for (first, end, _), (a, b, _) in zip(steps, known, strict=True):
            assert (first, end) == (a // 3, (b - 1) // 3 + 1)


def test_the_share_of_the_first_wrong_step_by_hand():
    advantages = np.array([1.0, -2.0, 3.0, -4.0])
    steps = [(0, 1, True), (1, 3, False), (3, 4, False)]
    assert truth.share_on_first_wrong(advantages, steps) == 0.5
    assert truth.share_on_first_wrong(advantages, steps[:1]) is None  # nothing wrong
    assert truth.share_on_first_wrong(0 * advantages, steps) is None  # nothing to share


A, B, C, D = (0, 1), (1, 3), (3, 4), (4, 5)  # steps of one, two, one and one token


@pytest.mark.parametrize(
    ("rights", "expected"),
    [
        ([True, True, True, True], []),  # nothing wrong
        ([True, False, True, True], [(1.0, True), (-2.0, False), (-4.0, True), (0.5, True)]),
        ([True, False, False, True], [(1.0, True), (-2.0, False), (0.5, True)]),
        ([False, True, False, False], [(1.0, False), (-2.0, True)]),
    ],
)
def test_the_deepest_advantage_of_each_step_until_a_response_is_lost(rights, expected):
    advantages = np.array([1.0, -2.0, 3.0, -4.0, 0.5])
    steps = [(*step, right) for step, right in zip((A, B, C, D), rights, strict=True)]
    assert truth.deepest_until_lost(advantages, steps) == expected


def test_the_accuracy_of_advantages_by_hand(monkeypatch):
    """Two responses: one has two wrong steps, the other none, but an advantage lower than all."""
    advantages = torch.tensor([[0.4, 0.2, -0.6, 0.9], [-0.8, 0.1, 0.1, 0.1]])
    steps = {
        "lost": [(0, 2, True), (2, 3, False), (3, 4, False)],
        "right": [(0, 2, True), (2, 4, True)],
    }
    monkeypatch.setattr(truth, "step_tokens", lambda environment, texts: steps[environment])
    batch = SimpleNamespace(envs=["lost", "right"], texts=[[], []])
    accuracy = truth.accuracy_of(advantages, batch)
    # right steps have means 0.3, -0.35 and 0.1, wrong ones -0.6 and 0.9
    assert accuracy["auroc"] == accuracy["auroc_in_wrong_responses"] == 0.5
    assert accuracy["auroc_of_first_wrong_step"] == 1.0  # 0.2 against -0.6
    assert accuracy["share_on_first_wrong_step"][0] == pytest.approx(0.6 / 2.1)
    assert accuracy["wrong_responses"] == 1


# ----------------------------------------------------- does the gradient point the right way?
# {kind of ratio: the factor on grad log pi of each token, of advantages (B, T) under a cut}
PULLS = {
    "token": lambda drawn, ends, mask: drawn,
    "segment": sapo.segment_mean,
    "response": lambda drawn, ends, mask: sapo.segment_mean(drawn, torch.zeros_like(ends), mask),
    "product": sapo.segment_sum,
}


@pytest.mark.parametrize(
    ("average", "ratio"), [("token", "token"), *(("response", ratio) for ratio in PULLS)]
)
def test_the_gradient_is_the_policy_gradient(small, average, ratio):
    """Against autograd on the plain objective, A log pi averaged as the method does; in minibatches
    of 8 as in one."""
    flags = ["--average", average, "--ratio", ratio, "--cut", "topk"]
    run = truth.frozen(*small, ["--method", "grpo", *flags])
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    loss_mask = batch.written & (torch.rand(batch.written.shape) < 0.7)
    drawn = torch.randn(batch.written.shape) * batch.written
    learned, advantages = baselines.restrict(batch.rollout, drawn, loss_mask)
    gradient = truth.gradient(run, batch, learned, advantages)

    policy = run.models.policy
    policy.model.zero_grad()
    logp, _ = vlm.score(policy, batch.inputs, batch.tokens, batch.written)
    pull = PULLS[ratio](drawn * loss_mask, learned.ends, loss_mask)
    total = (pull * logp * loss_mask).sum(1)  # (B,)
    if average == "response":
        loss = -(total / loss_mask.sum(1).clamp(min=1)).mean()
    else:
        loss = -total.sum() / loss_mask.sum()
    loss.backward()
    parameters = [p for p in policy.model.parameters() if p.grad is not None]
    expected = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_equal_budgets_of_generated_tokens(small, monkeypatch):
    """A method whose batch is small takes more batches for one gradient."""
    run = truth.frozen(*small, ["--method", "sapo"])
    batches, collect = [], rollout.collect

    def recorded(*args):
        batches.append(collect(*args))
        return batches[-1]

    monkeypatch.setattr(rollout, "collect", recorded)
    budget = run.settings.batch * 20
    gradients = truth.gradients(run, 2, tokens=budget)
    assert len(gradients) == 2 and len(batches) > 2
    assert sum(batch.generated_tokens for batch in batches) >= 2 * budget
    # Each took its last batch because the ones before it were not enough.
    assert batches[0].generated_tokens < budget
    examples = [batch.indices[0] for batch in batches]
    assert examples == sorted(set(examples))  # every batch of other examples


def test_gradient_quality_by_hand():
    drawn = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    quality = truth.gradient_quality(drawn, torch.tensor([1.0, 0.0]))
    assert quality["cosine"][0] == pytest.approx(0.5**0.5)
    assert quality["variance"] == 1.0  # both are a distance of 1 from their mean (1, 0)


# ---------------------------------------------------------------------- are the values right?
def test_values_are_compared_at_the_same_states(small):
    sizes = {"rollouts": 1, "continuations": 4, "responses": 8}
    errors, critic, exact = truth.value_error(*small, ["--method", "ppo"], **sizes)
    assert errors["states"] == int(exact.written.sum())  # every token is a state of PPO's
    assert errors["rmse"] > 0 and sizes.items() <= errors.items()
    values = exact.rollout.values[exact.written]
    assert torch.equal(values * 4, (values * 4).round())  # shares of 4 continuations
    assert not torch.equal(values, critic.rollout.values[exact.written])


def test_lift_reads_the_change_of_value_at_each_token():
    """Values fall by 1 after the two tokens of high entropy; what stands behind a last token does
    not count."""
    mask = torch.tensor([[True] * 11, [True] * 10 + [False]])
    values = torch.tensor([[2.0] * 4 + [1.0] * 7, [1.0] * 6 + [0.0] * 4 + [7.0]])  # 7: off the mask
    entropy = torch.zeros(2, 11)
    entropy[0, 3] = entropy[1, 5] = 1.0
    batch = SimpleNamespace(entropy=entropy, rollout=SimpleNamespace(mask=mask, values=values))
    measured = truth.lift_over_q(batch, draws=50)
    assert measured["lift"]["0.1"][0] == pytest.approx(19 / 2)  # both jumps, among 10 + 9 tokens
    assert measured["large"] == pytest.approx(2 / 19)
    # A third jump, where entropy is low; three of 19 tie at the threshold, and all count.
    values[0, 7:] = 0.0
    measured = truth.lift_over_q(batch, draws=50)
    assert measured["lift"]["0.1"][0] == pytest.approx(19 / 3)
    assert measured["large"] == pytest.approx(3 / 19)


def test_a_gradient_is_taken_at_the_temperature_of_the_run(small, monkeypatch):
    sweep, extra = small
    run = truth.frozen(sweep, [*extra, "--temperature", "0.7"], ["--method", "grpo"])
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    temperatures, score = [], vlm.score

    def noted(policy, inputs, tokens, mask, temperature=1.0):
        temperatures.append(temperature)
        return score(policy, inputs, tokens, mask, temperature)

    monkeypatch.setattr(vlm, "score", noted)
    truth.gradient(run, batch, batch.rollout, torch.ones(batch.tokens.shape))
    assert temperatures and set(temperatures) == {0.7}


def test_the_cut_finds_the_hard_steps_or_not():
    """Two dice, a six among them: reading it is hard, and so is the sum that carries."""
    pieces = ["<see>", "6", "5", "</see>", "<think>", "6+5=", "11", "</think>"]
    pieces += ["<answer>", "11", "</answer>"]
    example = SimpleNamespace(content=(("6", "5"),))
    environment = SimpleNamespace(unwrapped=SimpleNamespace(task=DiceSum(n=2), example=example))
    entropy = torch.tensor([[0.0, 0.9, 0.1, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0]])
    rollout = SimpleNamespace(mask=torch.ones(1, 11, dtype=torch.bool))
    batch = SimpleNamespace(envs=[environment], texts=[pieces], entropy=entropy, rollout=rollout)
    # 1 token ends a segment (the 6), and the last, which is in no step. Drawn blindly, 2 of 11 meet
    # a step of one token with probability 2/11, and one of two (the sum) with 1 - 9/11 * 8/10
    measured = truth.cut_steps(batch, top_k=0.05)
    hard = {"steps": 2, "cut": 0.5, "cut_by_chance": (2 / 11 + 1 - 72 / 110) / 2, "entropy": 0.55}
    easy = {"steps": 2, "cut": 0.0, "cut_by_chance": 2 / 11, "entropy": 0.05}
    assert measured["hard"] == pytest.approx(hard)
    assert measured["easy"] == pytest.approx(easy)
    assert truth.cut_steps(batch, top_k=0.15)["hard"]["cut"] == 1.0  # two of eleven


# ------------------------------------------------------------------------ the two experiments
def test_lift_early_and_late_from_one_command(small, tmp_path, monkeypatch):
    """It makes the comparison's run where that is missing, and the late policy is that run's."""
    sweep, extra = small
    policies, frozen = [], truth.frozen

    def in_this_process(folder, flags):
        train.main(flags)

    def recorded(*args):
        run = frozen(*args)
        policies.append(run.models.policy)
        return run

    monkeypatch.setattr(truth, "execute", in_this_process)
    monkeypatch.setattr(truth, "frozen", recorded)
    sweep = dataclasses.replace(sweep, experiment="lift", seeds=1, tokens=300, tag="lift")
    *_, measured = truth.lifts(sweep, extra, rollouts=1, continuations=4, responses=8)

    (folder,) = Path(sweep.runs).glob("main-*-lift/sapo-seed0")
    trained = list(vlm.load(folder / "checkpoint").model.parameters())
    early, _, late, _ = [list(policy.model.parameters()) for policy in policies]
    assert all(torch.equal(a, b) for a, b in zip(trained, late, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(early, late, strict=True))
    assert measured["early"]["rmse"] != measured["late"]["rmse"]
    for when in ("early", "late"):
        for name in ("critic", "Monte Carlo"):
            lift = measured[when][name]["lift"]
            assert all(0 <= low <= high for _, low, high in lift.values())
            assert 0.1 <= measured[when][name]["large"] <= 1
        assert measured[when]["steps"]["easy"]["steps"] > 0
    (tmp_path / "lift-small.json").write_text(json.dumps({"task": "TextSum", **measured}))
    assert [path.name for path in figures.drawn(tmp_path)] == ["lift-small.svg"]


def test_truth_measures_its_parts_one_after_the_other(small, monkeypatch):
    sweep, extra = small
    sweep = dataclasses.replace(sweep, methods=["grpo", "vineppo"])
    own = {"vineppo": ["--batch", "8", "--continuations", "2"]}
    monkeypatch.setattr(truth, "BATCHES", own)
    sizes = {"count": 2, "rollouts": 1, "continuations": 2, "large": 2, "responses": 16}
    so_far = []
    for part in truth.truth(sweep, extra, **sizes, budget=500):
        so_far.append([*part["values"], *part["methods"]])
    critics = ["segment critic", "token critic"]
    assert so_far == [critics[:1], critics, [*critics, "grpo"], [*critics, "grpo", "vineppo"]]
    assert -1 <= part["reference"]["cosine_of_its_halves"] <= 1
    assert part["reference"]["responses"] == 2 * 16  # of the batches that the flags ask for
    for method in part["methods"].values():
        assert -1 <= method["cosine"][0] <= 1 and method["variance"] > 0
