"""lab/critic.py: variants of the critic learn from one frozen policy, and are measured alike."""

import copy
import json
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from small_runs import SHORT, built, equal

import models
import rollout
import sapo
import vlm
from lab import critic, figures

CONFIG = sapo.SAPOConfig()
SIGHT = {"explained_variance", "auroc_in_wrong_responses", "auroc_of_first_wrong_step"}
SIGHT |= {"share_of_blame", "wrong_responses"}


@pytest.fixture(scope="module")
def collected(runs):
    """(a run, a batch of its responses to held-out prompts)."""
    run = built(runs, "--name", "critics")
    torch.manual_seed(0)
    return run, rollout.collect(run, np.arange(16), "eval")


def made(run, variant):
    """(a new critic, its optimizer)"""
    torch.manual_seed(0)
    policy = run.models.policy
    backbone = copy.deepcopy(policy.model.base_model)
    new = sapo.SegmentCritic(backbone, policy.hidden_size, variant.hears)
    return new, models.adam(new.parameters(), variant.lr)


def error(new, variant, batch):
    """Mean squared error of the outcome at segment starts."""
    episodes = critic.valued(new, variant, batch).rollout
    reads = sapo.boundaries(episodes.ends, episodes.mask)
    return (episodes.values - sapo.outcomes(episodes, CONFIG))[reads].square().mean().item()


@pytest.mark.parametrize("logistic", [False, True])
@pytest.mark.parametrize("hears", [False, True])
def test_teaching_lowers_the_error(collected, hears, logistic):
    """Of the critic alone: the policy stays as it is."""
    run, batch = collected
    weights = copy.deepcopy(run.models.policy.model.state_dict())
    variant = critic.Variant(hears=hears, logistic=logistic)
    new, optimizer = made(run, variant)
    before = error(new, variant, batch)
    targets = sapo.outcomes(batch.rollout, CONFIG)
    for _ in range(8):
        critic.teach(new, optimizer, variant, batch, targets, torch.arange(16))
    assert error(new, variant, batch) < before - 0.02
    assert equal(dict(run.models.policy.model.state_dict()), dict(weights))
    assert not hears or new.per_nat != 0


def test_the_values_of_a_logistic_critic_are_probabilities(collected):
    run, batch = collected
    variant = critic.Variant(logistic=True)
    new, _ = made(run, variant)
    torch.nn.init.normal_(new.head.weight)
    seen, mask = critic.valued(new, variant, batch).rollout.values, batch.rollout.mask
    plain = critic.valued(new, critic.Variant(), batch).rollout.values
    assert torch.equal(seen[mask], plain[mask].sigmoid()) and not seen[~mask].any()
    assert plain[mask].min() < 0 < plain[mask].max()


def test_values_that_know_every_outcome_explain_all_of_it(collected):
    run, batch = collected
    all_seen = replace(batch.rollout, values=sapo.outcomes(batch.rollout, CONFIG))
    seen = critic.sight(replace(batch, rollout=all_seen), run.config)
    assert seen["explained_variance"] == pytest.approx(1)
    wrong = sum(not info["correct"] for info in batch.infos)
    assert set(seen) == SIGHT and 0 < wrong < 16
    assert seen["wrong_responses"] <= wrong  # a response without an answer has no step


def test_demonstrations_teach_too(collected):
    run, _ = collected
    new, optimizer = made(run, critic.PLAIN)
    critic.read_demonstrations(run, new, optimizer, replace(critic.PLAIN, demonstrations=0))
    assert not new.head.bias.any()
    critic.read_demonstrations(run, new, optimizer, replace(critic.PLAIN, demonstrations=2))
    assert new.head.bias > 0  # half of them end well


# ---------------------------------------------------------------------------- the whole command


def test_every_variant_is_measured_and_the_ceiling(runs, tmp_path, monkeypatch):
    few = {}
    for name, variant in critic.VARIANTS.items():
        few[name] = replace(variant, demonstrations=min(1, variant.demonstrations))
    monkeypatch.setattr(critic, "VARIANTS", few)
    monkeypatch.setattr(critic, "TASKS", {"sum": SHORT})
    monkeypatch.setattr(critic, "EVERY", 1)
    sizes = ["--rollouts", "2", "--continuations", "2", "--states-of", "6"]
    where = ["--seeds", "0", "--runs", str(runs), "--results", str(tmp_path)]
    critic.main([*sizes, *where])

    result = json.loads((tmp_path / "critic.json").read_text())
    assert set(result) == {"command", "date", "versions", "variants", "measured"}
    assert result["command"].startswith("python -m lab.critic --rollouts 2 --continuations 2 ")
    assert result["variants"] == {name: asdict(variant) for name, variant in few.items()}
    *measured, ceiling = result["measured"]
    assert [row["variant"] for row in measured] == list(few) and len(few) > 4
    for row in (*measured, ceiling):
        assert set(row) == {"task", "seed", "flags", "accuracy", "variant", "curve"}
        assert (row["task"], row["seed"]) == ("sum", 0) and 0 < row["accuracy"] < 1
    tokens = {tuple(point["generated_tokens"] for point in row["curve"]) for row in measured}
    ((first, second),) = tokens  # all learned from the same rollouts
    assert 0 < first < second
    for row in measured:
        assert all(
            set(point) == {"optimizer_steps", "generated_tokens"} | SIGHT for point in row["curve"]
        )
        passes, read_first = few[row["variant"]].passes, few[row["variant"]].demonstrations
        steps = [read_first + passes, read_first + 2 * passes]
        assert [point["optimizer_steps"] for point in row["curve"]] == steps
    assert ceiling["variant"] == "ceiling"
    (best,) = ceiling["curve"]
    assert set(best) == {"responses", "continuations"} | SIGHT
    assert (best["responses"], best["continuations"]) == (6, 2)
    assert len({str(row["curve"]) for row in measured}) > 4  # and what differs is the variant
    if find_spec("matplotlib"):
        assert [picture.name for picture in figures.drawn(tmp_path)] == ["critic.svg"]


def test_a_later_policy_is_trained_once_and_measured_as_it_is(runs, monkeypatch, capsys):
    """The run that makes it stays where it is; a finished run can be measured by its folder."""
    monkeypatch.setattr(critic, "TASKS", {"later": SHORT})
    monkeypatch.setattr(critic, "LATER", ["--iterations", "1"])
    frozen = critic.frozen_run("later", 0, str(runs))
    folder = runs / "critic-later-seed0"
    trained = vlm.load(folder / "checkpoint").model.state_dict()
    assert equal(dict(frozen.models.policy.model.state_dict()), dict(trained))
    made_at = (folder / "summary.json").stat().st_mtime_ns
    critic.frozen_run("later", 0, str(runs))
    assert (folder / "summary.json").stat().st_mtime_ns == made_at

    capsys.readouterr()
    critic.main(["--run", str(folder), "--responses", "8"])
    seen = json.loads(capsys.readouterr().out)
    assert set(seen) == {"iteration", "lam", "responses", "own_credit"} | SIGHT
    assert (seen["iteration"], seen["responses"]) == (1, 8)
    assert seen["lam"] == frozen.config.lam and 0 <= seen["own_credit"]["auroc"] <= 1
    assert equal(dict(vlm.load(folder / "checkpoint").model.state_dict()), dict(trained))
