"""lab/cures.py: guards against a collapse, each a run of its own; two bring code of their own."""

import json

import pytest
import torch
from small_runs import SHORT, built

import models
import rollout
import sapo
import train
from lab import cures, tables


def test_a_bounded_critic_begins_at_one_half_and_stays_a_probability(runs, monkeypatch):
    monkeypatch.setattr(models, "SegmentCritic", cures.BoundedCritic)
    run = built(runs, "--name", "bounded")
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    mask = batch.rollout.mask
    assert (batch.rollout.values[mask] == 0.5).all() and not batch.rollout.values[~mask].any()
    with torch.no_grad():
        run.models.critic.head.weight += 9.0
    values = rollout.values_of(
        run.models.critic, batch, batch.rollout.logp, torch.arange(len(batch.tokens))
    )[mask]
    assert values.min() >= 0 and values.max() <= 1 and len(values.unique()) > 2


def test_the_critic_learns_first_and_its_new_values_assign_the_credit(runs, monkeypatch):
    run = built(runs, "--name", "first", "--critic_lr", "0.01")
    before = {name: w.clone() for name, w in run.models.policy.model.state_dict().items()}
    met = {}

    def update(run, batch, credit):
        met["policy"] = run.models.policy.model.state_dict()
        met["values"] = batch.rollout.values.clone()
        met["credit"] = credit
        return "history"

    monkeypatch.setattr(cures, "UPDATE", update)
    torch.manual_seed(0)
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    first = train.assign_credit(run, batch)
    old_values = batch.rollout.values
    assert cures.critic_first(run, batch, first) == "history"
    assert all(torch.equal(w, met["policy"][name]) for name, w in before.items())
    assert not old_values.any() and met["values"].any()  # a new critic says 0 of everything
    with torch.no_grad():
        rows = torch.arange(len(batch.tokens))
        now = rollout.values_of(run.models.critic, batch, batch.rollout.logp, rows)
    assert torch.equal(met["values"], now)
    expected, _ = sapo.credit(batch.rollout, run.config)
    assert torch.equal(met["credit"].advantages, expected)
    assert not torch.equal(met["credit"].advantages, first.advantages)


@pytest.fixture
def short(monkeypatch, runs, tmp_path):
    """The command line of runs that take a second."""
    monkeypatch.setattr(cures, "FLAGS", [*SHORT, "--iterations", "1"])
    cache = tmp_path / "runs" / "cache"
    cache.parent.mkdir()
    cache.symlink_to(runs / "cache")
    return ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


def test_each_guard_is_a_run_and_what_is_done_is_kept(short, tmp_path, monkeypatch):
    guards = ["nothing", "bounded critic", "critic first"]
    cures.main([*short, "--seeds", "0", "--guards", *guards])
    file = tmp_path / "results" / "cures.json"
    measured = json.loads(file.read_text())["measured"]
    assert [(run["label"], run["seed"]) for run in measured] == [(guard, 0) for guard in guards]
    assert all(run["command"].startswith("python -m lab.cures --runs") for run in measured)
    losses = [run["curve"]["value_loss"] for run in measured]
    assert losses[0] != losses[1] != losses[2] != losses[0]  # each guard did something
    assert (models.SegmentCritic, train.update) == (sapo.SegmentCritic, cures.UPDATE)  # put back

    written = file.read_bytes()
    monkeypatch.setattr(train, "main", None)
    cures.main([*short, "--seeds", "0", "--guards", *guards])
    assert file.read_bytes() == written


def test_every_guard_is_flags_that_train_takes():
    parsed = {
        guard: train.parse([*cures.FLAGS, *flags])[1] for guard, (flags, _) in cures.GUARDS.items()
    }
    assert parsed["KL bound"].target_kl == 0.015
    assert parsed["whitened advantages"].whiten_advantages
    assert parsed["value clip"].value_clip == 0.2
    assert parsed["critic learns from outcomes"].critic_lam == 1
    plain = parsed.pop("nothing")
    assert plain.epochs == 4 and plain.target_kl == float("inf")
    for config in parsed.values():
        differing = {name for name in vars(config) if vars(config)[name] != vars(plain)[name]}
        assert len(differing) <= 1  # one thing at a time


def test_a_run_that_diverges_is_written_down_and_the_next_one_made(short, tmp_path, monkeypatch):
    train_main = train.main

    def main(words):
        if "cures/nothing-seed0" in words:
            error = FloatingPointError("three minibatches in a row were not finite")
            raise SystemExit(f"iteration 3: {error}") from error
        train_main(words)

    monkeypatch.setattr(train, "main", main)
    cures.main([*short, "--seeds", "0", "--guards", "nothing", "KL bound"])
    measured = json.loads((tmp_path / "results" / "cures.json").read_text())["measured"]
    assert "three minibatches" in measured[0]["failed"] and "accuracy" in measured[1]
    rows = tables.cures_table({"measured": measured}).splitlines()[2:]
    assert rows[0] == "| nothing | diverged | diverged | 1 of 1 |  |  |" and len(rows) == 2
    well = measured[1] | {
        "label": "nothing",
        "seed": 1,
        "accuracy": 0.9,
        "warm_start_accuracy": 0.5,
    }
    first, *_ = tables.cures_table({"measured": [*measured, well]}).splitlines()[2:]
    assert first.startswith("| nothing | 0.900 |") and "| 1 of 2 |" in first


@pytest.mark.parametrize("code", [train.INTERRUPTED, "iteration 3: No space left on device"])
def test_what_says_nothing_of_the_guard_ends_the_command(code, short, tmp_path, monkeypatch):
    def main(words):
        raise SystemExit(code) from OSError()

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(SystemExit) as left:
        cures.main([*short, "--seeds", "0", "--guards", "nothing"])
    assert left.value.code == code and not (tmp_path / "results" / "cures.json").exists()


def test_runs_of_other_flags_are_not_taken_for_these(short, tmp_path, monkeypatch):
    cures.main([*short, "--seeds", "0", "--guards", "nothing"])
    monkeypatch.setattr(cures, "FLAGS", [*cures.FLAGS, "--lam", "0.5"])
    with pytest.raises(SystemExit, match="seed 0 was run with no --lam, and would be with --lam 0"):
        cures.main([*short, "--seeds", "1", "--guards", "nothing"])


def test_a_stopped_run_ends_the_command_with_one_line(short, monkeypatch):
    monkeypatch.setattr(train, "main", lambda words: None)
    with pytest.raises(SystemExit, match="nothing-seed0: its training was stopped; give"):
        cures.main([*short, "--seeds", "0", "--guards", "nothing"])


def test_the_table_has_a_row_per_guard():
    def run(label, seed, accuracy, kl):
        curve = {"clip_fraction": [0.02, 0.04], "approx_kl": [kl, kl / 2]}
        row = {"label": label, "seed": seed, "accuracy": accuracy, "greedy": accuracy + 0.1}
        return row | {"warm_start_accuracy": 0.25, "curve": curve}

    measured = [run("nothing", 0, 0.0, 3.0), run("KL bound", 0, 0.8, 0.02)]
    measured += [run("nothing", 1, 0.5, 0.5), run("KL bound", 1, 0.7, 0.04)]
    rows = tables.cures_table({"measured": measured}).splitlines()[2:]
    assert rows == [
        "| nothing | 0.000, 0.500 | 0.100, 0.600 | 1 of 2 | 3.0% | 3 |",
        "| KL bound | 0.800, 0.700 | 0.900, 0.800 | 0 of 2 | 3.0% | 0.04 |",
    ]
