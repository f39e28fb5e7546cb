"""lab/critic.py: variants of the critic learn from one frozen policy, and are measured alike."""

import copy
import json
import math
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from plain_loops import mean_of, segments
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
    return new, models.Adam(new.parameters(), variant.lr)


def uneven(batch):
    """The batch with its responses broken off at random, and cut at random."""
    torch.manual_seed(0)
    shape = batch.written.shape
    written = batch.written & (torch.arange(shape[1]) < torch.randint(2, shape[1], (shape[0], 1)))
    ends = written & (torch.rand(shape) < 0.4) | sapo.response_ends(written)
    return replace(batch, written=written, rollout=replace(batch.rollout, mask=written, ends=ends))


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


@pytest.mark.parametrize("logistic", [False, True])
def test_the_loss_term_by_term(collected, logistic, monkeypatch):
    """Of the rows that are asked for: a mean over each response's segment starts, then over all."""
    run, batch = collected
    variant, batch, rows = critic.Variant(logistic=logistic), uneven(batch), [3, 14, 2, 9, 5]
    new, optimizer = made(run, variant)
    torch.nn.init.normal_(new.head.weight)
    targets = torch.rand(batch.written.shape)
    values = critic.valued(new, critic.Variant(), batch).rollout.values
    cut = segments(batch.rollout.ends, batch.rollout.mask)
    terms = []
    for b in rows:
        of_starts = [(values[b, s[0]].item(), targets[b, s[0]].item()) for s in cut[b]]
        if logistic:
            terms.append([math.log1p(math.exp(v)) - target * v for v, target in of_starts])
        else:
            terms.append([(v - target) ** 2 for v, target in of_starts])
    losses = []
    monkeypatch.setattr(critic, "descend", lambda *args: losses.append(args[-1].item()))
    critic.teach(new, optimizer, variant, batch, targets, torch.tensor(rows))
    assert len({len(of_row) for of_row in terms}) > 1
    assert losses == [pytest.approx(mean_of(terms, "response"), rel=1e-4)]


def test_a_step_follows_its_own_gradient_of_norm_1_at_most():
    point = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(point.weight)
    optimizer = torch.optim.SGD(point.parameters(), lr=1.0)
    critic.descend(point, optimizer, (point.weight * torch.tensor([3.0, 4.0])).sum())
    torch.testing.assert_close(point.weight.detach(), torch.tensor([[-0.6, -0.8]]))
    critic.descend(point, optimizer, (point.weight * torch.tensor([-0.3, 0.4])).sum())
    torch.testing.assert_close(point.weight.detach(), torch.tensor([[-0.3, -1.2]]))


def test_the_values_of_a_logistic_critic_are_probabilities(collected):
    run, batch = collected
    batch = uneven(batch)
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


def test_demonstrations_err_as_often_as_those_of_the_warm_start(collected, monkeypatch):
    run, _ = collected
    value_loss, read = sapo.value_loss, []

    def noted(values, targets, *cut):
        read.append(targets)
        return value_loss(values, targets, *cut)

    monkeypatch.setattr(sapo, "value_loss", noted)
    critic.read_demonstrations(
        run, *made(run, critic.PLAIN), replace(critic.PLAIN, demonstrations=1)
    )
    (targets,) = read
    assert torch.equal(targets, targets[:, :1].expand_as(targets)) and len(targets) == 128
    assert targets[:, 0].mean().item() == pytest.approx(1 - run.settings.error_rate, abs=0.15)


@pytest.mark.parametrize("at_the_mean", [False, True])
def test_a_critic_starts_at_the_mean_reward_or_at_zero(collected, at_the_mean, monkeypatch):
    run, batch = collected
    started = []
    monkeypatch.setattr(critic, "sight", lambda batch, config: started.append(batch.rollout) or {})
    untaught = replace(critic.PLAIN, passes=0, at_the_mean=at_the_mean)
    critic.learned(run, untaught, [batch], batch)
    (episodes,) = started
    mean = batch.rollout.rewards.sum(1).mean() if at_the_mean else torch.tensor(0.0)
    torch.testing.assert_close(episodes.values, mean * batch.rollout.mask)
    assert 0 < batch.rollout.rewards.sum() < 16


def test_a_critic_that_reads_nothing_knows_the_surprise_alone(collected, monkeypatch):
    """Its values are a line in what it hears: a constant, and so much for each nat."""
    run, batch = collected
    seen = []
    monkeypatch.setattr(critic, "sight", lambda batch, config: seen.append(batch.rollout) or {})
    for variant in (critic.Variant(lr=2e-2), critic.Variant(lr=2e-2, reads=False)):
        critic.learned(run, variant, [batch], batch)
    errors = []
    for episodes in seen:
        heard = sapo.surprise(episodes.logp, episodes.mask).roll(1, 1)
        heard[:, 0] = 0.0  # before the first token
        heard, values = heard[episodes.mask], episodes.values[episodes.mask]
        lines = torch.stack([heard, torch.ones_like(heard)], 1)
        slope, constant = torch.linalg.lstsq(lines, values[:, None]).solution.flatten()
        errors.append((values - slope * heard - constant).abs().max().item())
    assert errors[0] > 1e-2 and errors[1] < 1e-5


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

    file = tmp_path / "critic.json"
    result = json.loads(file.read_text())
    how = {"rollouts", "states_of", "continuations", "variants"}
    assert set(result) == {*how, "measured"}
    assert (result["rollouts"], result["states_of"], result["continuations"]) == (2, 6, 2)
    assert result["variants"] == {name: asdict(variant) for name, variant in few.items()}
    *measured, ceiling = result["measured"]
    assert [row["variant"] for row in measured] == list(few) and len(few) > 4
    for row in (*measured, ceiling):
        told = {"command", "date", "versions"}
        assert set(row) == {"task", "seed", "flags", "accuracy", "variant", "curve"} | told
        assert row["command"].startswith("python -m lab.critic --rollouts 2 --continuations 2 ")
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
    # Interrupted before the last two, it goes on from there, and then has nothing left to do
    file.write_text(json.dumps(result | {"measured": result["measured"][:-2]}))
    critic.main([*sizes, *where])
    again = json.loads(file.read_text())["measured"]
    assert again == result["measured"]
    file.write_text(json.dumps(result | {"measured": result["measured"][1:]}))
    with monkeypatch.context() as patched:
        patched.setattr(critic, "ceiling", None)  # it stands there
        critic.main([*sizes, *where])
    again = json.loads(file.read_text())["measured"]
    assert again == [*result["measured"][1:], result["measured"][0]]
    monkeypatch.setattr(critic, "frozen_run", None)
    critic.main([*sizes, *where])
    # Other sizes or variants do not mix with them, and lose nothing
    for other in (["--rollouts", "3"], ["--states-of", "5"], ["--continuations", "3"]):
        with pytest.raises(SystemExit, match=f"{other[0][2:5]}.* and is {other[1]} now; expected"):
            critic.main([*sizes, *where, *other])
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="variants was .*now;"):
        patched.setattr(critic, "VARIANTS", {"hears": few["hears"]})
        critic.main([*sizes, *where])
    assert json.loads(file.read_text())["measured"] == again
    # What another policy's flags gave does not stand for this one's
    monkeypatch.setattr(critic, "TASKS", {"sum": [*SHORT, "--lam", "0.5"]})
    with pytest.raises(TypeError):  # it would be measured
        critic.main([*sizes, *where])
    if find_spec("matplotlib"):
        assert [picture.name for picture in figures.drawn(tmp_path)] == ["critic.svg"]


def test_a_later_policy_is_trained_once_and_measured_as_it_is(runs, monkeypatch, capsys):
    """The run that makes it stays where it is; a finished run can be measured by its folder."""
    monkeypatch.setattr(critic, "TASKS", {"later": SHORT})
    monkeypatch.setattr(critic, "TRAINED", {"later": ["--iterations", "1"]})
    frozen = critic.frozen_run("later", 0, str(runs))
    folder = runs / "critic-later-seed0"
    trained = vlm.load(folder / "checkpoint").model.state_dict()
    assert equal(dict(frozen.models.policy.model.state_dict()), dict(trained))
    made_at = (folder / "summary.json").stat().st_mtime_ns
    critic.frozen_run("later", 0, str(runs))
    assert (folder / "summary.json").stat().st_mtime_ns == made_at

    capsys.readouterr()
    batch = json.loads((folder / "config.json").read_text())["settings"]["batch"]
    critic.main(["--run", str(folder), "--responses", str(batch + 8)])
    assert json.loads((folder / "config.json").read_text())["settings"]["batch"] == batch
    seen = json.loads(capsys.readouterr().out)
    assert set(seen) == {"iteration", "lam", "responses", "own_credit"} | SIGHT
    assert (seen["iteration"], seen["responses"]) == (1, batch + 8)
    assert seen["lam"] == frozen.config.lam and 0 <= seen["own_credit"]["auroc"] <= 1
    assert equal(dict(vlm.load(folder / "checkpoint").model.state_dict()), dict(trained))
