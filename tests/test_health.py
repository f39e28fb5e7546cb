"""health.py: a run that is breaking says so, once, in one line; a healthy one says nothing."""

import json
from pathlib import Path

import pytest
import small_runs

import health
import train

HEALTHY = {
    "approx_kl": 0.02,
    "advantage_std": 0.3,
    "advantage_mean": 0.01,
    "positive_advantages": 0.6,
    "explained_variance": 0.2,
}
BREAKING = {
    "approx_kl": {"approx_kl": 0.9},
    "positive_advantages": {"positive_advantages": 0.0},
    "advantage_mean": {"advantage_mean": -0.16, "positive_advantages": 0.1},
    "explained_variance": {"explained_variance": -0.8},
}


def said(rows):
    """{iteration: the lines said after it} for the metrics of iterations 1, 2, ..."""
    since, lines = {}, {}
    for iteration, row in enumerate(rows, 1):
        lines[iteration] = health.warnings({"iteration": iteration, **row}, since)
    return {iteration: said for iteration, said in lines.items() if said}


def test_a_healthy_run_says_nothing():
    without_critic = {k: v for k, v in HEALTHY.items() if k != "explained_variance"}
    skipped = {k: v for k, v in HEALTHY.items() if k != "approx_kl"}  # no minibatch was finite
    equal = HEALTHY | {"advantage_std": 0.0, "positive_advantages": 0.0}  # nothing to learn from
    assert said([HEALTHY, without_critic, skipped, equal, equal, equal]) == {}


@pytest.mark.parametrize("sign", health.SIGNS, ids=lambda sign: sign.metric)
def test_a_sign_is_said_once_when_it_has_lasted(sign):
    sick = HEALTHY | BREAKING[sign.metric]
    lines = said([HEALTHY, *[sick] * 5])
    assert list(lines) == [1 + sign.patience]
    (line,) = lines[1 + sign.patience]
    assert line.startswith(f"warning: {sign.metric} is ") and "since iteration 2," in line
    assert sign.remedy in line and "--" in sign.remedy


@pytest.mark.parametrize("sign", health.SIGNS, ids=lambda sign: sign.metric)
def test_a_sign_that_goes_and_comes_back_is_said_again(sign):
    sick = HEALTHY | BREAKING[sign.metric]
    lines = said([*[sick] * sign.patience, HEALTHY, *[sick] * sign.patience])
    assert list(lines) == [sign.patience, 2 * sign.patience + 1]


@pytest.mark.parametrize(
    ("metric", "mild", "sick", "patience"),
    [
        ("approx_kl", 0.19, 0.21, 1),
        ("positive_advantages", 0.001, 0.0, 3),
        ("explained_variance", -0.49, -0.51, 3),
    ],
)
def test_where_a_sign_begins_and_how_long_it_must_last(metric, mild, sick, patience):
    assert said([HEALTHY | {metric: mild}] * 5) == {}
    assert list(said([HEALTHY | {metric: sick}] * 5)) == [patience]


def test_the_default_run_said_nothing():
    """All that it wrote of itself, replayed."""
    file = Path(__file__).parents[1] / "results" / "default-sapo-seed0-metrics.jsonl"
    since, rows = {}, [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if "advantage_mean" in row]
    assert len(rows) == 68 and not any(health.warnings(row, since) for row in rows)


@pytest.mark.parametrize(
    ("mean", "share", "says"), [(-0.51, 0.19, 1), (-0.49, 0.19, 0), (-0.51, 0.21, 0)]
)
@pytest.mark.parametrize("spread", (0.01, 0.3, 50.0))
def test_blame_must_be_both_large_and_nearly_everywhere(mean, share, says, spread):
    """Large beside its own spread: whatever the rewards' scale is."""
    sick = {"advantage_mean": mean * spread, "advantage_std": spread, "positive_advantages": share}
    assert len(said([HEALTHY | sick] * 4)) == says


def test_the_run_that_fell_was_warned_about_while_it_fell():
    """Ten arrows at lambda 0.7: right 98 times in 100 at its 22nd rollout, 21 times at its 26th."""
    file = Path(__file__).parents[1] / "results" / "arrows-default-seed3-metrics.jsonl"
    since, lines = {}, {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if "advantage_mean" in row:
            lines[row["iteration"]] = health.warnings(row, since)
    said_at = [iteration for iteration, said in lines.items() if said]
    assert said_at == [26] and lines[26][0].startswith("warning: advantage_mean is -0.14")


def test_a_line_in_full():
    (line,) = said([HEALTHY, HEALTHY | {"approx_kl": 0.91234}])[2]
    assert line == (
        "warning: approx_kl is 0.912 since iteration 2, above 0.2: one rollout moves the policy "
        "too far; lower --actor_lr or --epochs"
    )


@pytest.mark.parametrize("share", (0.0, 1.0))
def test_all_positive_is_one_sign_too(share):
    assert said([HEALTHY | {"positive_advantages": share}] * 3)
    assert not said([HEALTHY | {"positive_advantages": abs(share - 0.01)}] * 3)


def test_a_training_that_breaks_says_so_and_goes_on(runs, capsys):
    """A rate a hundred times too large: the policy leaves the rollout's within one update."""
    run = small_runs.built(
        runs, "--name", "breaking", "--actor_lr", "0.1", "--epochs", "4", "--iterations", "2"
    )
    assert train.train(run)
    shown = capsys.readouterr()
    assert "warning: approx_kl is" in shown.out + shown.err
    rows = small_runs.rows_of(run.folder / "metrics.jsonl")
    assert max(row.get("approx_kl", 0) for row in rows) > health.KL_BOUND
    saved = json.dumps(run.progress.ailing_since)  # plain numbers: a checkpoint keeps them
    assert json.loads(saved) == run.progress.ailing_since
