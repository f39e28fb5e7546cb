"""evaluation.py: held-out accuracy, the rows of samples.jsonl, the final outcome."""

import json

import pytest
from small_runs import SMALL, built, check_samples, rows_of

import evaluation
import rollout
import train
from lab import stats


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
    assert (outcome["eval_low"], outcome["eval_high"]) == stats.wilson(right, episodes)


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
