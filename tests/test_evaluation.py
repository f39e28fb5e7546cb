"""evaluation.py: held-out accuracy, the rows of samples.jsonl, the final outcome."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SMALL, built, check_samples, rows_of, without_times

import checkpoint
import evaluation
import rollout
import sapo
import train
import vlm


def test_wilson_against_known_values():
    """Wilson (1927): 8 of 10 gives 0.490 to 0.943; 0 of 10 gives 0 to 0.278, 10 its mirror."""
    assert evaluation.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert evaluation.wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-5)
    assert evaluation.wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-5)
    for right in range(51):
        low, high = evaluation.wilson(right, 50)
        assert -1e-12 <= low <= right / 50 <= high <= 1 + 1e-12


@given(st.integers(1, 1000), st.data())
def test_wilson_holds_the_shares_that_the_normal_test_does_not_refuse(n, data):
    """Its two ends p solve |right / n - p| = z sqrt(p (1 - p) / n), the score test's edge."""
    right = data.draw(st.integers(0, n))
    for share in evaluation.wilson(right, n):
        edge = 1.96 * math.sqrt(max(0, share * (1 - share)) / n)
        assert abs(right / n - share) == pytest.approx(edge, abs=1e-6)


@pytest.mark.parametrize("episodes", [5, 16, 21])
def test_evaluation_counts_held_out_episodes(runs, episodes):
    """Also when they are no multiple of the batch. Greedy, so that a second look must agree."""
    run = built(runs, "--name", f"counted-{episodes}", "--eval_episodes", str(episodes))
    outcome = evaluation.evaluate(run, temperature=0.0)
    right = 0
    for i in range(episodes):
        envs, inputs = rollout.ask(run, [i], "eval")
        _, _, texts = rollout.write(run, inputs, 0.0)
        *_, info = envs[0].step("".join(texts[0]))
        right += info["correct"]
        assert envs[0].unwrapped.example_id == f"eval/{i}"
    assert outcome["eval_accuracy"] == right / episodes
    assert (outcome["eval_low"], outcome["eval_high"]) == evaluation.wilson(right, episodes)


def test_samples_of_a_group_method(runs):
    run = built(runs, *SMALL, "--name", "sampled", "--method", "grpo")
    rows = train.samples(run)
    assert [row["example_id"] for row in rows] == [f"eval/{i}" for i in range(4)]
    check_samples(json.loads(json.dumps(rows)), has_critic=False)


def test_a_run_that_ends_without_an_evaluation_is_evaluated(runs):
    """A resume whose --iterations are already done, after Ctrl-C between two evaluations."""
    run = built(runs, "--name", "unevaluated", "--iterations", "1")
    assert train.train(run)
    file = run.folder / "metrics.jsonl"
    kept = []
    for row in rows_of(file):
        if row["iteration"]:
            row = {key: value for key, value in row.items() if "eval" not in key}
        kept.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    train.finish(run)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]


def test_a_sample_shows_the_entropy_the_values_and_the_advantages_of_its_response(runs):
    """A segment's value is that at its first token."""
    run = built(runs, "--name", "shown")
    torch.nn.init.normal_(run.models.critic.head.weight)  # a new critic values nothing
    torch.manual_seed(0)
    rows = train.samples(run)
    torch.manual_seed(0)
    batch = rollout.collect(run, evaluation.sample_indices(run.settings), "eval")
    advantages, _ = sapo.credit(batch.rollout, run.config)
    for i, row in enumerate(rows):
        n = len(row["tokens"])
        assert row["entropy"] == pytest.approx(batch.entropy[i, :n].tolist(), abs=1e-4)
        assert row["advantages"] == pytest.approx(advantages[i, :n].tolist(), abs=1e-4)
        values, start = batch.rollout.values[i].tolist(), 0
        for t, ends in enumerate(row["ends"]):
            assert row["values"][t] == pytest.approx(values[start], abs=1e-4)
            if ends:
                start = t + 1


def test_the_final_evaluations_decode_as_they_are_called(runs, monkeypatch):
    run = built(runs, "--name", "decoded", "--iterations", "0")
    assert train.train(run)
    generate, decoded = vlm.generate, []

    def noted(model, inputs, limit, temperature, top_p, *more, **also):
        decoded.append((temperature, top_p))
        return generate(model, inputs, limit, temperature, top_p, *more, **also)

    monkeypatch.setattr(vlm, "generate", noted)
    outcome = evaluation.final_evaluations(run)
    assert list(outcome) == ["temperature 1", "temperature 0.6, top-p 0.95", "greedy"]
    assert decoded == [(0.6, 0.95), (0, 1.0)]  # at temperature 1 the curve's last point counts


def test_looking_at_other_decodings_before_training_moves_no_number(runs, monkeypatch):
    """They sample, too, but from a random stream of their own."""
    looked = built(runs, "--name", "looked", "--iterations", "1")
    assert train.train(looked)
    monkeypatch.setattr(evaluation, "by_decoding", lambda run, start: {"temperature 1": start})
    blind = built(runs, "--name", "blind-start", "--iterations", "1")
    assert train.train(blind)
    rows = [without_times(rows_of(run.folder / "metrics.jsonl")) for run in (looked, blind)]
    assert rows[0] == rows[1]


def summary_with(greedy_before, greedy_after):
    def evaluations(greedy):
        shares = {"temperature 1": 0.5, "temperature 0.6, top-p 0.95": 0.6, "greedy": greedy}
        return {
            kind: {"eval_accuracy": share, "eval_low": share - 0.1, "eval_high": share + 0.1}
            for kind, share in shares.items()
        }

    return {
        "method": "sapo",
        "env": "SAPO/DiceSum-v0",
        "seed": 0,
        "eval_episodes": 512,
        "mechanism": {
            "explained_variance_second_half": 0.25,
            "clip_fraction": 0.0125,
            "largest_approx_kl": 0.03,
        },
        "evaluations_before": evaluations(greedy_before),
        "evaluations": evaluations(greedy_after),
        "seconds": 1.0,
        "warm_start_seconds": 2.0,
        "peak_rss_mb": 3.0,
    }


def test_a_run_whose_greedy_accuracy_fell_says_so(capsys):
    evaluation.print_summary(summary_with(0.918, 0.748), "runs/x")
    assert "greedy accuracy FELL, from 91.8% to 74.8%" in capsys.readouterr().out


def test_the_table_has_a_row_per_decoding_before_and_after(capsys):
    evaluation.print_summary(summary_with(0.1, 0.95), "runs/x")
    printed = capsys.readouterr().out
    assert "FELL" not in printed
    (row,) = [line for line in printed.splitlines() if "greedy" in line]
    assert row.split() == [
        "greedy",
        "10.0%",
        "(0.0%",
        "to",
        "20.0%)",
        "95.0%",
        "(85.0%",
        "to",
        "105.0%)",
    ]


def test_the_table_says_whether_the_parts_did_their_work(capsys):
    """Without a critic nothing of it; without an iteration nothing at all."""
    summary = summary_with(0.1, 0.95)
    evaluation.print_summary(summary, "runs/x")
    printed = capsys.readouterr().out
    assert "clip holds back 1.25% of the tokens; in the second half" in printed
    assert "critic explains 25% of the outcomes\n" in printed
    summary["mechanism"]["explained_variance_second_half"] = None
    evaluation.print_summary(summary, "runs/x")
    assert "clip holds back 1.25% of the tokens\n" in capsys.readouterr().out
    summary["mechanism"]["clip_fraction"] = None
    evaluation.print_summary(summary, "runs/x")
    assert "clip" not in capsys.readouterr().out


def test_a_run_on_a_card_names_it(monkeypatch):
    """Not a run on the CPU of a machine that has one, or one that only pretends to have it."""
    assert evaluation.of_card("cpu") == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluation.of_card("cuda") == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    told = evaluation.of_card("cuda:1")
    assert told.keys() == {"card", "cuda", "cudnn", "peak_card_mb"}
    assert (told["card"], told["peak_card_mb"]) == ("the card cuda:1", 3)
    assert evaluation.of_card("cpu") == {}


def mechanism_of(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluation.mechanism(folder)


def test_the_mechanism_by_hand(tmp_path):
    """Five iterations have a second half of three; one without a finite step has no number."""
    rows = [{"iteration": 0, "eval_accuracy": 0.5}]
    for iteration, explained in enumerate((-9.0, -9.0, 0.1, 0.2, 0.6), 1):
        number = iteration / 100
        row = {"iteration": iteration, "clip_fraction": number, "approx_kl": 0.05 - number}
        rows.append(row | {"explained_variance": explained, "value_loss": 1.0})
    rows.append({"iteration": 6, "explained_variance": 9.0, "value_loss": 1.0})
    mechanism = mechanism_of(tmp_path, rows)
    assert mechanism == pytest.approx(
        {
            "explained_variance_second_half": 0.3,
            "clip_fraction": 0.03,
            "largest_approx_kl": 0.04,
        }
    )
    for row in rows:
        row.pop("value_loss", None)  # as without a critic, whose values were sampled
    without_critic = mechanism_of(tmp_path, rows)
    assert without_critic == mechanism | {"explained_variance_second_half": None}
    assert set(mechanism_of(tmp_path, rows[:1]).values()) == {None}


def test_the_mechanism_of_a_critic_that_is_infinitely_wrong(tmp_path):
    row = {"clip_fraction": 0.1, "approx_kl": math.inf, "explained_variance": -math.inf}
    checkpoint.append_lines(tmp_path / "metrics.jsonl", [row | {"value_loss": 1.0}])
    found = {"explained_variance_second_half": -math.inf, "clip_fraction": 0.1}
    assert evaluation.mechanism(tmp_path) == found | {"largest_approx_kl": math.inf}
