"""compare.py: a small sweep end to end, killed and continued; the statistics; the ground truth on a known case."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compare
import figures
import sapo
import train

TASK = ["--env", "SAPO/TextSum-v0", "--env_args", "n=1", "largest=99"]
FAST = ["--max_new_tokens", "16", "--error_rate", "0.5", "--warm_start_steps", "30", "--warm_start_batch", "32",
        "--batch", "16", "--minibatch", "8", "--eval_episodes", "32", "--group", "4", "--branching", "2", "2"]


# -------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("values, expected", [([3.0], 3), ([1, 2], 1.5), ([0, 1, 2, 9], 1.5), ([5, 0, 1, 2, 99], 8 / 3),
                                              ([1, 2, 3, 4, 5, 6, 7, 800], 4.5)])
def test_interquartile_mean_by_hand(values, expected):
    """A quarter of the values, rounded down, is left out on either side, as scipy's trim_mean(0.25) does."""
    assert figures.iqm(values) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_intervals_hold_their_value_and_stay_within_the_data(values):
    value, low, high = figures.interval(values)
    assert min(values) - 1e-9 <= low <= value + 1e-9 and value <= high + 1e-9 and high <= max(values) + 1e-9
    assert figures.interval(values) == (value, low, high)  # the same at every call


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=400)
    value, low, high = figures.interval(values, lambda x: x.mean(-1))
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_auroc_against_all_pairs(steps):
    right, wrong = ([score for score, r in steps if r is kind] for kind in (True, False))
    found = compare.auroc(*zip(*steps, strict=True))
    if right and wrong:
        pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
        assert found == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(found)


def test_lift_by_hand():
    """Ten tokens, the largest jump where entropy is highest: P(D | A) = 1 / 2 in the top 20%, P(D) = 1 / 10."""
    entropy, jump = np.arange(10.0), np.where(np.arange(10) == 9, 1.0, 0.01 * np.arange(10))
    assert compare.lift(entropy, jump, q=0.2) == pytest.approx(5.0)
    assert compare.lift(entropy, jump[::-1], q=0.2) == 0.0


# --------------------------------------------------------------------------------------------------------- the plan
def sweep(*flags):
    parser = compare.transformers.HfArgumentParser(compare.Sweep)
    return parser.parse_args_into_dataclasses(list(flags), return_remaining_strings=True)


@pytest.mark.parametrize("experiment", compare.EXPERIMENTS)
def test_every_run_of_every_experiment_parses(experiment):
    runs = list(compare.plan(*sweep("--experiment", experiment, "--seeds", "2")))
    assert len(runs) == 2 * len(compare.EXPERIMENTS[experiment])
    assert len({folder for _, _, folder, _ in runs}) == len(runs)
    assert [seed for _, seed, _, _ in runs] == sorted(seed for _, seed, _, _ in runs)
    for label, seed, folder, flags in runs:
        settings, config = train.parse(flags)
        assert (settings.seed, settings.token_budget) == (seed, 500_000)
        assert f"{settings.runs}/{settings.name}" == str(folder)
        if experiment == "main":
            assert settings.method == label
        if experiment == "topk":
            assert f"{config.top_k:.0%}" == label


def test_a_subset_of_the_methods_and_an_unknown_experiment():
    runs = list(compare.plan(*sweep("--methods", "ppo", "sapo", "--seeds", "1", *TASK, "--lam", "0.9")))
    assert sorted(label for label, *_ in runs) == ["ppo", "sapo"]
    assert all(train.parse(flags)[1].lam == 0.9 and "n=1" in flags for *_, flags in runs)
    assert "srpo" not in [label for label, *_ in compare.plan(*sweep(*TASK))]  # no picture there
    with pytest.raises(SystemExit, match="nope"):
        list(compare.plan(*sweep("--experiment", "nope")))


def test_the_best_rate_of_the_tuning_is_used(tmp_path):
    rates = {"1e-4": [0.5, 0.6], "3e-4": [0.545, 0.56], "6e-4": [0.9, 0.1]}  # the two first are as good: the smaller
    runs = [{"label": f"ppo {lr}", "accuracy": x} for lr, both in rates.items() for x in both]
    runs += [{"label": f"grpo {lr}", "accuracy": x} for lr, x in (("1e-4", 0.53), ("3e-4", 0.55)) for _ in range(2)]
    (tmp_path / "tune-DiceSum.json").write_text(json.dumps({"runs": runs}))
    for label, _, _, flags in compare.plan(*sweep("--results", str(tmp_path), "--seeds", "1")):
        assert train.parse(flags)[1].actor_lr == (1e-4 if label == "ppo" else sapo.SAPOConfig().actor_lr)
    for label, _, _, flags in compare.plan(*sweep("--experiment", "tune", "--results", str(tmp_path), "--seeds", "1")):
        assert train.parse(flags)[1].actor_lr == float(label.split()[1])


def test_a_tuning_counts_for_its_own_tag_and_a_methods_own_batch_stands_behind_the_users(tmp_path):
    (tmp_path / "tune-DiceSum-long.json").write_text(json.dumps({"runs": [{"label": "ppo 1e-4", "accuracy": 0.9}]}))
    flags = ["--results", str(tmp_path), "--seeds", "1", "--methods", "ppo", "vineppo", "--batch", "128"]
    for tag, rate in (("", 3e-4), ("long", 1e-4)):
        found = {label: train.parse(run) for label, _, _, run in compare.plan(*sweep(*flags, "--tag", tag))}
        assert found["ppo"][1].actor_lr == rate and found["vineppo"][1].actor_lr == 3e-4
        assert (found["ppo"][0].batch, found["vineppo"][0].batch) == (128, 32)


# ----------------------------------------------------------------------------------------------------------- a sweep
def test_a_sweep_end_to_end_and_again(tmp_path, capsys):
    """A method by two seeds through the real command line; a second call finds all of it done."""
    flags = [*TASK, "--methods", "grpo", "--seeds", "2", "--tokens", "1200", "--tag", "small",
             "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--actor_lr", "1e-3", *FAST]
    compare.main(flags)
    file = tmp_path / "main-TextSum-n=1-largest=99-small.json"
    found = json.loads(file.read_text())
    done = [(run["label"], run["seed"]) for run in found["runs"]]
    assert sorted(done) == [("grpo", 0), ("grpo", 1)]
    for run in found["runs"]:
        assert 1200 <= run["generated_tokens"] < 1800
        assert run["curve"]["generated_tokens"][-1] == run["generated_tokens"]
        assert len({len(curve) for curve in run["curve"].values()}) == 1
    start = {(run["seed"], run["warm_start_accuracy"] > 0) for run in found["runs"]}
    assert len(start) == 2 and len(list((tmp_path / "runs" / "cache").glob("*/manifest.json"))) == 2  # one per seed
    shown = capsys.readouterr().out
    assert re.search(r"^\| grpo \| 2 \|", shown, re.MULTILINE) and "IQM" in shown
    logs = {log: log.stat().st_mtime_ns for log in (tmp_path / "runs").rglob("*.log")}
    compare.main(flags)
    assert logs == {log: log.stat().st_mtime_ns for log in (tmp_path / "runs").rglob("*.log")}
    assert json.loads(file.read_text())["runs"] == found["runs"]
    paths = list(figures.drawn(tmp_path))
    assert [p.name for p in paths] == [file.stem + ".svg", file.stem + "-training.svg"]
    assert all("<path" in path.read_text() for path in paths)


def test_a_run_that_was_killed_goes_on(tmp_path):
    """From its checkpoint, not from the start; and a run that fails is named with its log."""
    (_, _, folder, flags), = compare.plan(*sweep("--methods", "grpo", "--seeds", "1", *TASK, "--runs", str(tmp_path),
                                                 "--tokens", "600", *FAST))
    settings, config = train.parse([*flags, "--token_budget", "200"])
    run = train.build(settings, config)
    assert train.train(run)
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["token_budget"] = 600
    (folder / "config.json").write_text(json.dumps(config))
    compare.execute(folder, flags)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(len(rows))) and rows[-1]["generated_tokens"] >= 600
    assert sum("eval_accuracy" in row for row in rows) == 3  # the start, the first stop, the end
    with pytest.raises(SystemExit, match="see .*broken.log"):
        compare.execute(tmp_path / "broken", ["--batch", "1", "--method", "grpo"])


# ------------------------------------------------------------------------------------------------------ ground truth
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A warm start long enough (about ten seconds) that some answers are right: credit needs rewards that differ."""
    return sweep(*TASK, "--runs", str(tmp_path_factory.mktemp("truth")), *FAST, "--warm_start_steps", "150",
                 "--warm_start_batch", "64")


def test_the_same_responses_under_every_method(small):
    runs = [compare.frozen(*small, ["--method", method]) for method in ("sapo", "ppo", "grpo")]
    tokens = [compare.same_batch(run, 16, group=4).tokens for run in runs]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


def test_the_critic_learns_while_the_policy_stays(small):
    fresh, taught = (compare.frozen(*small, ["--method", "ppo"], rollouts) for rollouts in (0, 2))
    weights = [run.policy.model.parameters() for run in (fresh, taught)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert not torch.equal(fresh.critic.head.bias, taught.critic.head.bias)


@pytest.mark.parametrize("credit, expected", [(lambda right: 2.0 * right - 1, 1.0), (lambda right: 1.0, 0.5),
                                              (lambda right: 1 - 2.0 * right, 0.0)])
def test_perfect_credit_is_found_perfect(credit, expected, monkeypatch):
    """Advantages made from the known steps of 40 demonstrations give AUROC 1, their negative 0, a constant one half."""
    made = [gym.make("SAPO/DiceSum-v0", disable_env_checker=True) for _ in range(40)]
    rng, texts, rows, first = np.random.default_rng(0), [], [], []
    for i, e in enumerate(made):
        e.reset(options={"index": i})
        task, example = e.unwrapped.task, e.unwrapped.example
        texts.append(list(task.demonstrate(example, rng, 0.1)))  # a token per character
        rows.append(torch.zeros(120))
        right = task.check_steps(example, "".join(texts[-1]))
        for (a, b), r in zip(task.step_spans("".join(texts[-1])), right, strict=True):
            rows[-1][a:b] = credit(r)
        if False in right:
            a, b = task.step_spans("".join(texts[-1]))[right.index(False)]
            first.append(float(rows[-1][a:b].abs().sum() / rows[-1].abs().sum()))
    mask = torch.arange(120) < torch.tensor([[len(text)] for text in texts])
    rollout = sapo.Rollout(mask, sapo.token_ends(mask), torch.zeros(40, 120), torch.zeros(40, 120),
                           advantages=torch.stack(rows))
    batch = SimpleNamespace(envs=made, texts=texts, rollout=rollout)
    monkeypatch.setattr(compare, "same_batch", lambda run, count: batch)
    found = compare.credit_accuracy(SimpleNamespace(config=sapo.SAPOConfig()), 40)
    assert found["auroc"] == found["auroc_in_wrong_responses"] == expected == found["auroc_interval"][0]
    assert found["share_on_first_wrong_step"][0] == pytest.approx(np.mean(first)) and len(first) > 10


@pytest.mark.parametrize("average", ["response", "token"])
def test_the_gradient_is_the_policy_gradient(small, average):
    """Against autograd on the plain objective, A log pi averaged as the method does; in parts of 8 as in one."""
    run = compare.frozen(*small, ["--method", "grpo", "--average", average])
    batch = train.collect(run, train.train_indices(run.settings, 1))
    batch.rollout.advantages = torch.randn(batch.mask.shape) * batch.mask
    batch.keep = batch.mask & (torch.rand(batch.mask.shape) < 0.7)
    found, keep = compare.gradient(run, batch), batch.keep
    run.policy.model.zero_grad()
    logp, _ = compare.vlm.score(run.policy, batch.inputs, batch.tokens, batch.mask)
    total = (batch.rollout.advantages * logp * keep).sum(1)
    (-(total / keep.sum(1).clamp(min=1)).mean() if average == "response" else -total.sum() / keep.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in run.policy.model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_values_are_compared_at_the_same_states(small):
    found, critic, exact = compare.value_error(*small, ["--method", "ppo"], rollouts=1, continuations=4, responses=8)
    assert found["states"] == int(exact.mask.sum()) and found["rmse"] > 0  # every token is a state of PPO's
    values = exact.rollout.values[exact.mask]
    assert torch.equal(values * 4, (values * 4).round()) and not torch.equal(values, critic.rollout.values[exact.mask])


def test_lift_early_and_late_from_one_command(small, tmp_path, monkeypatch):
    """It makes the comparison's run where that is missing, and the late policy is that run's."""
    monkeypatch.setattr(compare, "execute", lambda folder, flags: train.main(flags))  # without a process of its own
    policies = []
    frozen = compare.frozen
    monkeypatch.setattr(compare, "frozen", lambda *args: policies.append(frozen(*args)) or policies[-1])
    settings = dataclasses.replace(small[0], experiment="lift", seeds=1, tokens=300, tag="lift")
    found = list(compare.lifts(settings, small[1], rollouts=1, continuations=4, responses=8))[-1]
    (run,) = Path(settings.runs).glob("main-*-lift/sapo-seed0")
    trained = train.vlm.load(run / "checkpoint").model.parameters()
    weights = [list(policy.policy.model.parameters()) for policy in policies]  # early twice, late twice
    assert all(torch.equal(a, b) for a, b in zip(trained, weights[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    assert found["early"]["rmse"] != found["late"]["rmse"]
    for when, name in ((when, name) for when in ("early", "late") for name in ("critic", "Monte Carlo")):
        assert all(0 <= low <= high for _, low, high in found[when][name]["lift"].values())
        assert 0.1 <= found[when][name]["large"] <= 1
    (tmp_path / "lift-small.json").write_text(json.dumps({"task": "TextSum", **found}))
    assert [path.name for path in figures.drawn(tmp_path)] == ["lift-small.svg"]


def test_lift_reads_the_change_of_value_at_each_token():
    """Values fall by 1 after the two tokens of high entropy; what stands behind a last token does not count."""
    mask = torch.tensor([[True] * 11, [True] * 10 + [False]])
    values = torch.tensor([[2.0] * 4 + [1.0] * 7, [1.0] * 6 + [0.0] * 4 + [7.0]])  # the last: off the mask
    entropy = torch.zeros(2, 11)
    entropy[0, 3] = entropy[1, 5] = 1.0
    rollout = SimpleNamespace(mask=mask, values=values)
    found = compare.lift_over_q(SimpleNamespace(entropy=entropy, rollout=rollout), draws=50)
    assert found["lift"]["0.1"][0] == pytest.approx(19 / 2)  # both jumps, among 10 + 9 tokens
    assert found["large"] == pytest.approx(2 / 19)
    values[0, 7:] = 0.0  # a third jump, where entropy is low; three of 19 tie at the threshold, and all count
    found = compare.lift_over_q(SimpleNamespace(entropy=entropy, rollout=rollout), draws=50)
    assert found["lift"]["0.1"][0] == pytest.approx(19 / 3) and found["large"] == pytest.approx(3 / 19)


def test_equal_budgets_of_generated_tokens(small):
    """A method whose batch is small takes more batches for one gradient."""
    run = compare.frozen(*small, ["--method", "sapo"])
    seen, collect = [], train.collect
    try:
        train.collect = lambda *args: seen.append(1) or collect(*args)
        found = compare.gradients(run, 2, tokens=run.settings.batch * 20)
    finally:
        train.collect = collect
    assert len(found) == 2 and len(seen) > 2


def test_truth_writes_its_parts_as_they_come(small, monkeypatch):
    settings, extra = dataclasses.replace(small[0], methods=["grpo", "vineppo"]), small[1]
    monkeypatch.setattr(compare, "BATCHES", {"vineppo": ["--batch", "8", "--continuations", "2"]})
    parts = list(compare.truth(settings, extra, count=2, rollouts=1, continuations=2, large=2, responses=16,
                               budget=500))
    assert set(parts[-1]["methods"]) == {"grpo", "vineppo"}
    assert set(parts[-1]["values"]) == {"segment critic", "token critic"}
    assert all(-1 <= x["cosine"][0] <= 1 and x["variance"] > 0 for x in parts[-1]["methods"].values())


