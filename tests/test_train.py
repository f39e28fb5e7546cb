"""train.py: iterations of every method, the loop, and one short run through the command line."""

import base64
import contextlib
import io
import json
import math
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SHORT, SMALL, TASK, built, check_samples, rows_of

import checkpoint
import evaluation
import rollout
import sapo
import train
import vlm

# ------------------------------------------------------------------------------ one iteration


def two_iterations(runs, method, *flags):
    """Did the policy move, in each of two iterations? All numbers are finite, and tokens count."""
    name = f"steps-{method}"
    run = built(runs, *SMALL, "--method", method, *flags, "--name", name, "--batch", "32")
    moved = []
    for _ in range(2):
        weights = [p.detach().clone() for p in run.models.policy.model.parameters()]
        row = train.iterate(run)
        now = run.models.policy.model.parameters()
        moved.append(any(not torch.equal(a, b) for a, b in zip(weights, now, strict=True)))
        assert all(map(math.isfinite, row.values()))
    assert row["generated_tokens"] == run.tokens_written >= row["response_tokens"] * 32
    return moved


@pytest.mark.parametrize("method", ["sapo", "gspo", "spo-chain", "vineppo"])
def test_an_iteration_moves_the_policy(runs, method):
    assert two_iterations(runs, method) == [True, True]


def test_an_iteration_on_trees_moves_the_policy(runs):
    name = "steps-spo-tree"
    run = built(runs, *SMALL, "--method", "spo-tree", "--name", name, "--batch", "32")
    weights = [p.detach().clone() for p in run.models.policy.model.parameters()]
    row = train.iterate(run)
    now = run.models.policy.model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    assert all(map(math.isfinite, row.values())) and row["generated_tokens"] == run.tokens_written


@pytest.mark.parametrize("method", ["sapo", "spo-chain", "spo-tree"])
def test_responses_are_drawn_and_scored_at_the_temperature(runs, monkeypatch, method):
    """In the update too: else the ratio would not begin at 1."""
    flags = [*SMALL, "--method", method, "--temperature", "0.7"]
    run = built(runs, "--name", f"temperature-{method}", *flags)
    drawn, scored = [], []
    generate, score = vlm.generate, vlm.score

    def generated(model, inputs, limit, temperature, *more, **also):
        drawn.append(temperature)
        return generate(model, inputs, limit, temperature, *more, **also)

    def scored_at(model, inputs, tokens, mask, temperature=1.0):
        scored.append(temperature)
        return score(model, inputs, tokens, mask, temperature)

    monkeypatch.setattr(vlm, "generate", generated)
    monkeypatch.setattr(vlm, "score", scored_at)
    train.iterate(run)
    assert set(drawn) == set(scored) == {0.7}


@pytest.mark.parametrize("method", ["spo-chain", "spo-tree"])
def test_the_update_learns_from_the_tokens_of_the_loss_mask_alone(runs, monkeypatch, method):
    run = built(runs, *SMALL, "--method", method, "--name", f"loss-mask-{method}")
    assign_credit, sapo_update = train.assign_credit, sapo.sapo_update
    credits, learned = [], []

    def credited(run, batch):
        credits.append(assign_credit(run, batch))
        return credits[-1]

    def updated(episodes, advantages, *more, **named):
        learned.append((episodes.mask, advantages))
        return sapo_update(episodes, advantages, *more, **named)

    monkeypatch.setattr(train, "assign_credit", credited)
    monkeypatch.setattr(sapo, "sapo_update", updated)
    metrics = train.iterate(run)
    ((mask, advantages),), (credit,) = learned, credits
    assert credit.loss_mask.any() and torch.equal(mask, credit.loss_mask)
    assert torch.equal(advantages, credit.advantages * credit.loss_mask)
    # The cut is logged as it was made, not as the loss reads it
    assert metrics["tokens_per_segment"] > 1 and metrics["segments_per_response"] >= 1


def test_credit_is_logged_as_it_is_before_whitening(runs, monkeypatch):
    flags = ("--whiten_advantages", "true", "--advantage_clamp", "0.1")
    run = built(runs, *SMALL, *flags, "--name", "credit-logged")
    assign_credit, expected = train.assign_credit, {}

    def credited(run, batch):
        credit = assign_credit(run, batch)
        expected.update(sapo.credit_metrics(batch.rollout, credit.advantages, run.config))
        return credit

    monkeypatch.setattr(train, "assign_credit", credited)
    metrics = train.iterate(run)
    assert expected["advantage_std"] > 0.1  # beyond the clamp
    assert {name: metrics[name] for name in expected} == expected


def test_vc_ppo_first_teaches_its_critic_alone(runs):
    assert two_iterations(runs, "vc-ppo", "--value_pretraining", "1") == [False, True]


def test_value_pretraining_leaves_no_trace_in_the_policys_optimizer(runs):
    """Moments of gradients that an untrained critic gave would be in its first steps."""
    run = built(runs, "--value_pretraining", "1", "--iterations", "2", "--name", "pretrained")
    metrics = train.iterate(run)
    assert metrics["policy_steps"] == 0 and "policy_loss" not in metrics
    assert metrics["value_loss"] > 0 and run.models.critic_optimizer.state
    assert not run.models.actor_optimizer.state
    assert train.iterate(run)["policy_steps"] > 0 and run.models.actor_optimizer.state


def test_the_budget_counts_generated_tokens_and_the_rate_falls_with_them(runs):
    run = built(
        runs,
        *("--name", "budget", "--token_budget", "400", "--iterations", "100"),
        *("--actor_half_life", "200"),
    )
    assert train.train(run)
    rows = rows_of(run.folder / "metrics.jsonl")
    spent = [0, *(row["generated_tokens"] for row in rows[1:])]
    assert spent[-2] < 400 <= spent[-1] and "eval_accuracy" in rows[-1]
    rates = [row["actor_lr"] for row in rows[1:]]
    assert rates == [1e-3 * 0.5 ** (tokens / 200) for tokens in spent[:-1]]


def test_the_causal_threshold_is_the_last_batchs(runs):
    run = built(runs, "--name", "threshold", "--cut", "causal")
    thresholds = [run.progress.threshold]
    for _ in range(2):
        train.iterate(run)
        thresholds.append(run.progress.threshold)
    assert thresholds[0] is None and thresholds[1] != thresholds[2]


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_others(runs, monkeypatch, capsys):
    run = built(runs, "--name", "one-picture-less", "--iterations", "1", "--eval_every", "2")
    assert train.train(run)

    def cannot(folder):
        raise ValueError("no colours left")

    monkeypatch.setattr(train.credit_page, "credit_map", cannot)
    train.finish(run)
    assert "no colours left" in capsys.readouterr().out
    assert (run.folder / "credit.html").is_file()
    assert (run.folder / "learning_curve.png").is_file()


def test_samples_hold_the_rewards_less_the_kl_penalty(runs):
    run = built(runs, "--name", "penalised", "--kl_coef", "0.5", "--iterations", "1")
    train.iterate(run)  # now the policy is not the reference any more
    batch = rollout.collect(run, np.arange(4), "eval")
    penalised = sapo.penalised_rewards(batch.rollout, run.config)
    assert not torch.equal(penalised, batch.rollout.rewards)
    for row, sample in enumerate(evaluation.samples(run, batch, penalised)):
        expected = penalised[row, : len(sample["tokens"])].tolist()
        assert sample["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_samples_leave_the_causal_threshold_as_it_was(runs):
    run = built(runs, "--name", "threshold-kept", "--cut", "causal")
    for threshold in (None, 0.25):
        run.progress.threshold = threshold
        assert train.samples(run) and run.progress.threshold == threshold


def test_a_batch_is_cut_at_the_threshold_of_the_one_before(runs, monkeypatch):
    run = built(runs, "--name", "threshold-used", "--cut", "causal")
    train.iterate(run)
    threshold_of_the_last_batch, at = run.progress.threshold, []
    threshold_ends = sapo.threshold_ends

    def recorded(entropy, mask, threshold):
        at.append(threshold)
        return threshold_ends(entropy, mask, threshold)

    monkeypatch.setattr(sapo, "threshold_ends", recorded)
    train.iterate(run)
    assert at == [threshold_of_the_last_batch]


def test_minibatches_that_are_never_finite_stop_the_run_and_leave_the_checkpoint(runs, monkeypatch):
    """An infinite value loss skips every step; the third in a row is a clear error."""
    run = built(runs, "--name", "infinite", "--minibatch", "16", "--iterations", "9")
    task = type(run.grading_env.unwrapped.task)
    monkeypatch.setattr(task, "grade", lambda *_: 1e30)  # whose square no float32 holds
    with pytest.raises(FloatingPointError, match="three minibatches in a row"):
        train.train(run)
    weights = vlm.load(checkpoint.newest(run.folder)).model.state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_finite_number_ends_in_one_line(runs, monkeypatch, reward):
    """Whose it is, and what it was: a task's own `grade` may be anybody's."""
    run = built(runs, "--name", "nan-reward", "--iterations", "1")
    monkeypatch.setattr(type(run.grading_env.unwrapped.task), "grade", lambda *_: reward)
    said = f"^iteration 0: .*TextSum.* a reward of {reward}; expected a finite one; there is no"
    with pytest.raises(SystemExit, match=said):
        train.run_to_its_end(run)


def test_a_run_that_diverges_ends_in_one_line_and_leaves_its_checkpoint(runs):
    run = built(runs, "--name", "diverged", "--iterations", "9", "--actor_lr", "1e10")
    with pytest.raises(SystemExit, match=r"^iteration \d: .*lower the learning rates; .*--resume"):
        train.run_to_its_end(run)
    weights = vlm.load(checkpoint.newest(run.folder)).model.state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_probabilities_that_are_nan_end_in_one_line(runs):
    run = built(runs, "--name", "no-numbers", "--iterations", "1")
    for parameter in run.models.policy.model.parameters():
        parameter.data.fill_(math.nan)
    said = "^iteration 0: the policy's probabilities are NaN.*lower the learning rates"
    with pytest.raises(SystemExit, match=f"{said}.*there is no checkpoint yet"):
        train.run_to_its_end(run)


def test_memory_that_runs_out_in_the_update_is_said_so(runs, monkeypatch):
    run = built(runs, "--name", "larger", "--iterations", "1", "--eval_every", "2")

    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(sapo, "sapo_update", refused)
    with pytest.raises(SystemExit, match="^iteration 1: out of memory beyond") as left:
        train.run_to_its_end(run)
    said = left.value.code
    assert "scored or learned from" in said and "Lower --micro_batch to 4 or less" in said
    assert said.endswith(f"python train.py --resume {run.folder} goes on from the last checkpoint")


def test_memory_that_runs_out_while_writing_is_said_so(runs, monkeypatch):
    """The first thing a run does, when it has no checkpoint yet."""
    run = built(runs, "--name", "large", "--iterations", "1")

    def refused(*_, **__):
        return torch.empty(2**60)  # a real refusal of the allocator

    monkeypatch.setattr(run.models.policy.model, "generate", refused)
    with pytest.raises(SystemExit, match=r"^iteration 0: out of memory beyond [\d.]+ GiB") as left:
        train.run_to_its_end(run)
    said = left.value.code
    assert "while responses were written" in said and "Lower --generate_batch to 8 or less" in said
    assert "micro_batch" not in said and "--resume" not in said and "\n" not in said
    assert said.endswith("there is no checkpoint yet: the same command begins it again")


# ------------------------------------------------------------------------------ one short run


@pytest.fixture(scope="module")
def finished(runs):
    """`python train.py` with these flags, from the cached warm start to the table on the terminal:
    (folder, what was printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train.main(
            [
                *TASK,
                *("--runs", str(runs), "--name", "finished", "--iterations", "8"),
                *("--batch", "128", "--actor_lr", "5e-4", "--critic_lr", "1e-3"),
                *("--eval_every", "4", "--eval_episodes", "256"),
            ]
        )
    return runs / "finished", out.getvalue()


def test_a_short_run_improves_accuracy(finished):
    """Trials with seeds 0 to 3 went from 0.32-0.36 to 0.69-0.80 on the held-out examples."""
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    metrics = rows_of(folder / "metrics.jsonl")
    assert summary["warm_start_accuracy"] < 0.45
    assert summary["accuracy"] > summary["warm_start_accuracy"] + 0.1
    assert summary["accuracy_low"] > metrics[0]["eval_high"]  # the intervals do not touch
    accuracy = [row["accuracy"] for row in metrics[1:]]
    assert np.mean(accuracy[-3:]) > np.mean(accuracy[:2]) + 0.1


def test_the_summary_has_what_was_promised(finished):
    folder, printed = finished
    summary = json.loads((folder / "summary.json").read_text())
    promised = {"warm_start_accuracy", "accuracy", "accuracy_low", "accuracy_high", "episodes"}
    promised |= {"seconds", "warm_start_seconds", "peak_rss_mb", "method", "seed", "command"}
    assert promised <= set(summary)
    assert (summary["method"], summary["seed"], summary["episodes"]) == ("sapo", 0, 8 * 128)
    assert 0 < summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"] < 1
    assert 50 < summary["peak_rss_mb"] < 3000 and summary["seconds"] > 0
    last = rows_of(folder / "metrics.jsonl")[-1]
    assert summary["accuracy"] == last["eval_accuracy"]  # what the curve ends with
    kinds = {"temperature 1", "temperature 0.6, top-p 0.95", "greedy"}
    assert set(summary["evaluations"]) == set(summary["evaluations_before"]) == kinds
    assert all(kind in printed for kind in kinds)
    before = summary["evaluations_before"]["temperature 1"]["eval_accuracy"]
    assert before == summary["warm_start_accuracy"] and f"{before:.1%}" in printed
    assert f"{summary['accuracy']:.1%}" in printed and str(folder) in printed
    assert summary["command"].startswith("python train.py --env SAPO/TextSum-v0")


def test_the_promised_files_are_there(finished):
    folder, _ = finished
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoint"} <= names
    if find_spec("matplotlib"):
        assert {"learning_curve.png", "credit.html"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["batch"] == 128 and config["config"]["actor_lr"] == 5e-4
    # Hugging Face format, like any other
    assert vlm.load(folder / "checkpoint").model.dtype == torch.float32


def test_metrics_are_complete_finite_and_strict_json(finished):
    folder, _ = finished
    rows = rows_of(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(9))
    assert [row["iteration"] for row in rows if "eval_accuracy" in row] == [0, 4, 8]
    needed = {"accuracy", "reward", "response_tokens", "policy_loss", "value_loss", "ratio"}
    needed |= {"clip_fraction", "approx_kl", "entropy", "policy_grad_norm", "value_grad_norm"}
    needed |= {"advantage_mean", "advantage_std", "explained_variance", "skipped_steps"}
    needed |= {"segments_per_response", "tokens_per_segment", "episodes", "generated_tokens"}
    needed |= {"seconds", "actor_lr", "value_clip_fraction", "skipped_in_a_row"}
    needed |= {"positive_advantages"}
    for iteration, row in enumerate(rows[1:], 1):
        assert needed <= set(row) and all(math.isfinite(value) for value in row.values())
        assert row["episodes"] == 128 * iteration
        assert row["reward"] == pytest.approx(row["accuracy"])
        assert row["generated_tokens"] >= row["episodes"]
    for earlier, later in zip(rows[1:], rows[2:], strict=False):
        assert earlier["seconds"] < later["seconds"]


def test_samples_are_consistent(finished):
    folder, _ = finished
    rows = rows_of(folder / "samples.jsonl")
    learned_from = [row for row in rows if "learned_from" in row]
    assert [row["iteration"] for row in learned_from] == [4] * 16 + [8] * 16
    held_out = [row for row in rows if "learned_from" not in row]
    assert [row["iteration"] for row in held_out] == [0] * 64 + [4] * 64 + [8] * 64
    for row in learned_from:
        assert row["example_id"].startswith("train/")
        assert len(row["new_logp"]) == len(row["logp"]) == len(row["tokens"])
    assert all(row["image"] is None for row in rows)
    assert {row["reward"] for row in rows} == {0.0, 1.0}
    check_samples(rows, has_critic=True)


def test_before_an_evaluation_an_iteration_keeps_the_ratio_of_its_update(runs, monkeypatch):
    """The log-probabilities of the policy as the update has left it, beside the rollout's own."""
    run = built(runs, "--name", "ratios", "--eval_every", "2", "--actor_lr", "1e-2")
    file, batches, collect = run.folder / "samples.jsonl", [], rollout.collect

    def remembered(*arguments):
        batches.append(collect(*arguments))
        return batches[-1]

    monkeypatch.setattr(rollout, "collect", remembered)
    train.iterate(run)
    assert rows_of(file) == []
    train.iterate(run)
    with torch.no_grad():
        new_logp, _ = rollout.score(run, run.models.policy, batches[1])
    assert len(rows_of(file)) == 16
    for i, row in enumerate(rows_of(file)):
        assert row["iteration"] == 2 and row["example_id"] == f"train/{batches[1].indices[i]}"
        length = len(row["tokens"])
        for key, expected in (("logp", batches[1].rollout.logp), ("new_logp", new_logp)):
            assert row[key] == pytest.approx(expected[i, :length].tolist(), rel=1e-4, abs=1e-6)
    assert any(row["logp"] != pytest.approx(row["new_logp"]) for row in rows_of(file))


def test_a_run_on_pictures(tmp_path):
    """From an untrained model, which earns nothing: every part must bear that, too."""
    train.main(
        [
            *("--env", "SAPO/DiceSum-v0", "--env_args", "n=2", "--warm_start_steps", "2"),
            *("--warm_start_batch", "4", "--runs", str(tmp_path), "--name", "dice"),
            *("--iterations", "2", "--batch", "4", "--eval_episodes", "4"),
            *("--max_new_tokens", "8"),
        ]
    )
    rows = rows_of(tmp_path / "dice" / "samples.jsonl")
    check_samples(rows, has_critic=True)
    task = gym.make("SAPO/DiceSum-v0", n=2).unwrapped.task
    expected = task.example_at(0, "eval").image
    image = Image.open(io.BytesIO(base64.b64decode(rows[0]["image"])))
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert rows[0]["prompt"] == "Sum the dice."


def test_a_run_needs_no_network(tmp_path, offline):
    """Warm start, iteration, evaluations, pictures and all."""
    train.main(
        [
            *("--warm_start_steps", "1", "--warm_start_batch", "4", "--iterations", "1"),
            *("--batch", "4", "--eval_episodes", "4", "--max_new_tokens", "8"),
            *("--runs", str(tmp_path), "--name", "alone"),
        ]
    )
    assert (tmp_path / "alone" / "summary.json").is_file()


def test_a_run_without_an_iteration_ends_in_its_table(runs, capsys):
    train.main([*SHORT, "--runs", str(runs), "--name", "nothing", "--iterations", "0"])
    printed = capsys.readouterr().out
    assert "temperature 0.6, top-p 0.95" in printed
    names = {file.name for file in (runs / "nothing").iterdir()}
    assert {"summary.json", "credit.svg", "credit.html"} <= names


@pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs peft")
def test_adapters_of_a_tiny_model_resume_on_its_warm_start(runs):
    run = built(runs, "--name", "adapters", "--lora", "2", "--iterations", "1")
    assert train.train(run)
    again = train.build(*train.parse(["--resume", str(run.folder), "--iterations", "2"]))
    weights, resumed = (dict(made.models.policy.model.state_dict()) for made in (run, again))
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)
    assert train.train(again)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_an_event_file(runs):
    run = built(runs, "--name", "board", "--tensorboard", "--iterations", "1")
    assert train.train(run)
    (file,) = run.folder.glob("events.out.tfevents.*")
    assert file.stat().st_size > 0
