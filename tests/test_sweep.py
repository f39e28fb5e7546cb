"""lab/sweep.py: the plan of every experiment, a run killed and continued, what is kept of it."""

import dataclasses
import json
import math
import os
import subprocess
import warnings

import pytest
from small_runs import rows_of
from small_sweeps import LEARNED, SUM_TASK, parsed_sweep

import sapo
import train
from lab import sweep


# ----------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("experiment", sweep.EXPERIMENTS)
def test_every_run_of_every_experiment_parses(experiment, tmp_path):
    untuned = ["--results", str(tmp_path)]
    runs = list(sweep.plan(*parsed_sweep("--experiment", experiment, "--seeds", "2", *untuned)))
    assert len(runs) == 2 * len(sweep.EXPERIMENTS[experiment])
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        settings, _ = train.parse(run.flags)
        assert (settings.seed, settings.token_budget) == (run.seed, 500_000)
        assert f"{settings.runs}/{settings.name}" == str(run.folder)


def test_all_variants_of_a_seed_come_before_the_next_seed():
    runs = sweep.plan(*parsed_sweep("--seeds", "3", "--first_seed", "10"))
    seeds = [run.seed for run in runs]
    assert seeds == sorted(seeds) and set(seeds) == {10, 11, 12}


def test_labels_say_what_a_run_is():
    for run in sweep.plan(*parsed_sweep("--experiment", "main", "--seeds", "1")):
        assert train.parse(run.flags)[0].method == run.label.split(",")[0]
    for run in sweep.plan(*parsed_sweep("--experiment", "cuts", "--seeds", "1")):
        assert train.parse(run.flags)[0].cut == run.label
    for run in sweep.plan(*parsed_sweep("--experiment", "topk", "--seeds", "1")):
        assert f"{train.parse(run.flags)[1].top_k:.0%}" == run.label
    wide = ("segment ratio, clip 0.2", "token ratio", "product of ratios", "ppo", "grpo")
    for run in sweep.plan(*parsed_sweep("--experiment", "reuse", "--seeds", "1")):
        settings, config = train.parse(run.flags)
        kind, epochs = run.label.rsplit(", ", 1)
        assert epochs == f"{config.epochs} epochs"
        if kind in ("ppo", "grpo"):
            assert settings.method == kind
        elif kind != "no clip":
            assert kind.split(" ")[0] == config.ratio
        assert (config.clip_high == 0.2) == (kind in wide)
        assert (config.target_kl == math.inf) == (kind != "segment ratio and KL bound")


def test_ppo_is_compared_at_its_own_lambda_and_at_sapos(tmp_path):
    untuned = parsed_sweep("--seeds", "1", "--results", str(tmp_path))
    runs = {run.label: run for run in sweep.plan(*untuned)}
    own, sapos = (train.parse(runs[label].flags)[1] for label in ("ppo", "ppo, lambda of sapo"))
    assert own == train.parse(["--method", "ppo"])[1]
    assert sapos == dataclasses.replace(own, lam=sapo.SAPOConfig().lam)


def test_a_subset_of_the_methods_takes_the_users_flags():
    flags = ["--methods", "ppo", "sapo", "--seeds", "1", *SUM_TASK, "--lam", "0.9"]
    runs = list(sweep.plan(*parsed_sweep(*flags)))
    # PPO at SAPO's lambda would be PPO once more
    assert sorted(run.label for run in runs) == ["ppo", "sapo"]
    for run in runs:
        settings, config = train.parse(run.flags)
        assert settings.env_args == ["n=1", "largest=99"]
        assert config.lam == 0.9


@pytest.mark.parametrize(
    ("experiment", "method", "labels"),
    [
        ("main", "ppo", ["ppo", "ppo, lambda of sapo"]),
        ("main", "sapo", ["sapo"]),
        ("main", "vc-ppo", ["vc-ppo"]),
        ("horizon", "ppo", ["ppo, lambda 0.99"]),
        ("games", "grpo", ["grpo, rate 4e-4", "grpo, rate 2e-4"]),
        (
            "controls",
            "sapo",
            [
                *("sapo", "sapo, token ratio", "sapo, clip 0.2"),
                *("sapo, V at end", "sapo, token mean"),
            ],
        ),
        ("reuse", "grpo", [f"grpo, {epochs} epochs" for epochs in (1, 2, 4, 8)]),
        ("seeing", "vineppo", ["vineppo"]),
        ("cuts", "sapo", list(sweep.CUTS)),
        ("tune", "gspo", [f"gspo --actor_lr {rate}" for rate in sweep.RATES]),
    ],
)
def test_a_method_is_taken_with_all_its_variants(experiment, method, labels, tmp_path):
    flags = ["--experiment", experiment, "--methods", method, "--seeds", "1"]
    flags += ["--results", str(tmp_path)]  # untuned
    assert [run.label for run in sweep.plan(*parsed_sweep(*flags))] == labels


def test_srpo_takes_no_part_where_there_is_no_picture():
    labels = {run.label for run in sweep.plan(*parsed_sweep(*SUM_TASK))}
    assert labels == set(sweep.EXPERIMENTS["main"]) - {"srpo"}


def test_an_unknown_experiment_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="nope: expected one of tune, main, .*, truth, lift"):
        list(sweep.plan(*parsed_sweep("--experiment", "nope")))


@pytest.mark.parametrize("word", ["..", "../../elsewhere", "/tmp/elsewhere", "a/b"])
def test_a_tag_does_not_lead_out_of_the_folder(word, tmp_path):
    for option in (["--tag", word], ["--env_args", f"path={word}"]):
        made, extra = parsed_sweep("--results", str(tmp_path), "--seeds", "1", *option)
        assert made.file.parent == tmp_path and word.replace("/", "_") in made.file.name
        for run in sweep.plan(made, extra):
            assert len(run.folder.relative_to("runs").parts) == 2 and ".." not in run.folder.parts


# ------------------------------------------------------------------------- the learning rates
@pytest.fixture
def tuned(tmp_path):
    """A folder with a tuning: of GSPO's two best rates the smaller, GRPO's second, PPO's first."""
    accuracies = {
        "gspo --actor_lr 1e-4": [0.5, 0.6],  # as good as the next, within the error
        "gspo --actor_lr 2e-4": [0.545, 0.56],
        "gspo --actor_lr 4e-4": [0.9, 0.1],
        "grpo --actor_lr 1e-4": [0.5, 0.5],
        "grpo --actor_lr 2e-4": [0.55, 0.55],
        "ppo --actor_lr 2e-4 --lam 0.7": [0.3, 0.3],
        "ppo --actor_lr 1e-4 --lam 0.95": [0.5, 0.5],
    }
    runs = []
    for label, of_seeds in accuracies.items():
        runs += [{"label": label, "accuracy": accuracy} for accuracy in of_seeds]
    (tmp_path / "tune-DiceSum.json").write_text(json.dumps({"runs": runs}))
    return tmp_path


def tuned_numbers(*flags):
    """{label: (learning rate, lambda) of its run}"""
    runs = sweep.plan(*parsed_sweep(*flags, "--seeds", "1"))
    configs = {run.label: train.parse(run.flags)[1] for run in runs}
    return {label: (config.actor_lr, config.lam) for label, config in configs.items()}


def defaults(method):
    """The same, of a method that was not tuned."""
    _, config = train.parse(["--method", method])
    return config.actor_lr, config.lam


def test_the_first_trial_as_good_as_the_tunings_best_is_used(tuned):
    chosen = tuned_numbers("--results", str(tuned))
    assert chosen.pop("gspo") == (1e-4, defaults("gspo")[1])
    assert chosen.pop("grpo") == (2e-4, defaults("grpo")[1])
    assert chosen.pop("ppo") == (1e-4, 0.95)
    # a variant's own flags win over the tuned ones
    assert chosen.pop("ppo, lambda of sapo") == (1e-4, sapo.SAPOConfig().lam)
    assert chosen == {method: defaults(method) for method in chosen} and len(chosen) > 3


def test_ppo_at_sapos_lambda_takes_the_one_that_sapo_was_tuned_to(tuned):
    runs = [
        {"label": "sapo --actor_lr 2e-4 --lam 0.95", "accuracy": 0.9},
        {"label": "sapo --actor_lr 2e-4 --lam 0.7", "accuracy": 0.5},
        {"label": "ppo --actor_lr 1e-4 --lam 0.7", "accuracy": 0.9},
    ]
    (tuned / "tune-DiceSum.json").write_text(json.dumps({"runs": runs}))
    chosen = tuned_numbers("--results", str(tuned))
    assert chosen["sapo"] == (2e-4, 0.95)
    assert chosen["ppo"] == (1e-4, 0.7)
    assert chosen["ppo, lambda of sapo"] == (1e-4, 0.95)


def test_ppo_at_sapos_lambda_is_not_run_where_that_is_its_own(tuned):
    runs = [
        {"label": f"{method} --actor_lr 1e-4 --lam 0.7", "accuracy": 0.9}
        for method in ("sapo", "ppo")
    ]
    (tuned / "tune-DiceSum.json").write_text(json.dumps({"runs": runs}))
    assert "ppo, lambda of sapo" not in tuned_numbers("--results", str(tuned))


def test_a_trial_clearly_below_the_best_is_not_used(tuned):
    runs = [
        {"label": "gspo --actor_lr 1e-4", "accuracy": 0.5},
        {"label": "gspo --actor_lr 4e-4", "accuracy": 0.6},
    ]
    (tuned / "tune-DiceSum.json").write_text(json.dumps({"runs": runs}))
    assert tuned_numbers("--results", str(tuned))["gspo"][0] == 4e-4


@pytest.mark.parametrize(("seeds", "rate"), [(1, 1e-4), (2, 4e-4)])
def test_more_seeds_make_the_tunings_error_smaller(tuned, seeds, rate):
    """At 0.6 the standard error of 512 evaluations is 0.022, of 1024 it is 0.015."""
    accuracies = {"gspo --actor_lr 1e-4": 0.58, "gspo --actor_lr 4e-4": 0.6}
    runs = [{"label": label, "accuracy": share} for label, share in accuracies.items()] * seeds
    (tuned / "tune-DiceSum.json").write_text(json.dumps({"runs": runs}))
    assert tuned_numbers("--results", str(tuned))["gspo"][0] == rate


def test_the_tuning_itself_makes_as_many_trials_of_every_method(tuned):
    chosen = tuned_numbers("--experiment", "tune", "--results", str(tuned))
    trials = {}
    for label, (rate, lam) in chosen.items():
        method, _, rate_word, *lam_flag = label.split()
        assert rate == float(rate_word)
        assert lam == (float(lam_flag[1]) if lam_flag else defaults(method)[1])
        trials.setdefault(method, []).append((rate, lam))
    assert set(trials) == set(sweep.METHODS)
    assert {len(set(of_method)) for of_method in trials.values()} == {4}


def test_a_users_rate_wins_over_the_tunings(tuned):
    chosen = tuned_numbers("--results", str(tuned), "--actor_lr", "5e-4")
    assert {rate for rate, _ in chosen.values()} == {5e-4}


def test_a_tuning_counts_for_its_own_tag(tmp_path):
    runs = [{"label": "grpo --actor_lr 1e-4", "accuracy": 0.9}]
    (tmp_path / "tune-DiceSum-long.json").write_text(json.dumps({"runs": runs}))
    flags = ["--results", str(tmp_path), "--methods", "grpo", "vineppo"]
    untuned = {method: defaults(method) for method in ("grpo", "vineppo")}
    assert tuned_numbers(*flags) == untuned
    tagged = tuned_numbers(*flags, "--tag", "long")
    assert tagged.pop("grpo")[0] == 1e-4 != untuned.pop("grpo")[0]
    assert tagged == untuned


def test_a_methods_own_batch_stands_behind_the_users(tmp_path):
    flags = ["--methods", "ppo", "vineppo", "--seeds", "1", "--batch", "128"]
    flags += ["--results", str(tmp_path)]  # untuned
    runs = sweep.plan(*parsed_sweep(*flags))
    batches = {run.label: train.parse(run.flags)[0].batch for run in runs}
    assert batches == {"ppo": 128, "ppo, lambda of sapo": 128, "vineppo": 16}


# ----------------------------------------------------------------------------------- the runs
def test_a_run_that_was_killed_goes_on_from_its_checkpoint(runs):
    flags = ["--methods", "grpo", "--seeds", "1", *SUM_TASK, "--runs", str(runs)]
    (planned,) = sweep.plan(*parsed_sweep(*flags, "--tokens", "600", "--tag", "killed", *LEARNED))
    run = train.build(*train.parse([*planned.flags, "--token_budget", "200"]))
    assert train.train(run)
    stored = json.loads((planned.folder / "config.json").read_text())
    stored["settings"]["token_budget"] = 600
    stored["settings"]["env"] = "env:SAPO/TextSum-v0"  # a module, imported only where it is named
    (planned.folder / "config.json").write_text(json.dumps(stored))
    named = [flag.replace("SAPO/TextSum", "env:SAPO/TextSum") for flag in planned.flags]
    sweep.execute(planned.folder, named)
    rows = rows_of(planned.folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["generated_tokens"] >= 600
    # The evaluations are those of the start, the first stop and the end.
    assert sum("eval_accuracy" in row for row in rows) == 3


def test_a_variants_own_flags_win_over_the_users():
    flags = ["--experiment", "topk", "--seeds", "1", "--top_k", "0.42"]
    for run in sweep.plan(*parsed_sweep(*flags)):
        assert f"{train.parse(run.flags)[1].top_k:.0%}" == run.label


def test_the_budget_alone_ends_a_run_and_no_evaluation_falls_in_between():
    """An evaluation takes time that a comparison's seconds would count."""
    for run in sweep.plan(*parsed_sweep("--seeds", "1", "--tokens", "300")):
        settings, _ = train.parse(run.flags)
        assert settings.token_budget == 300
        assert settings.iterations == settings.eval_every == 100_000


def test_a_run_takes_one_thread(tmp_path, monkeypatch):
    """Two jobs with a thread per core each would be in each other's way."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environments = []

    def recorded(command, env, **named):
        environments.append(env)
        (tmp_path / "run" / "summary.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", recorded)
    (tmp_path / "run").mkdir()
    sweep.execute(tmp_path / "run", [])
    (environment,) = environments
    assert environment["OMP_NUM_THREADS"] == "1" and environment["PATH"] == os.environ["PATH"]


def test_a_finished_run_is_left_alone(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    sweep.execute(tmp_path, ["--no_such_flag"])
    assert not (tmp_path.parent / f"{tmp_path.name}.log").exists()


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    """And the line has the cause, which is the last of the log."""
    with pytest.raises(ChildProcessError) as failed:
        sweep.execute(tmp_path / "broken", ["--batch", "1", "--method", "grpo"])
    cause = (tmp_path / "broken.log").read_text().splitlines()[-1]
    assert "--batch 1: --credit group needs a multiple of" in cause
    assert f"ended with 1 and said: {cause}; see {tmp_path}/broken.log" in str(failed.value)


def test_a_run_that_says_nothing_is_named_too(tmp_path, monkeypatch):
    silent = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: silent)
    with pytest.raises(ChildProcessError, match="ended with 1 and said: nothing; see .*mute.log"):
        sweep.execute(tmp_path / "mute", [])


# ------------------------------------------------------------------------------ what came out
def row(iteration, **metrics):
    tokens = 100 * iteration
    return {"iteration": iteration, "actor_lr": 1e-3, "generated_tokens": tokens, **metrics}


def test_a_curve_has_the_mean_of_each_part_and_the_tokens_at_its_end():
    rows = [row(i, accuracy=i / 10) for i in range(1, 6)]
    curve = sweep.training_curve(rows, bins=2)  # of five rows the first part gets three
    assert curve == {"generated_tokens": [300, 500], "accuracy": [0.2, 0.45]}
    assert len(sweep.training_curve(rows)["accuracy"]) == 5  # never more parts than rows


def test_a_row_without_losses_does_not_count_for_their_mean():
    rows = [row(1, entropy=0.5), row(2), row(3, entropy=0.3)]
    assert sweep.training_curve(rows, bins=1)["entropy"] == [0.4]


def test_the_word_for_infinity_counts_as_that_number():
    rows = [row(1, approx_kl=0.5), row(2, approx_kl="inf")]
    assert sweep.training_curve(rows, bins=1)["approx_kl"] == [math.inf]


def test_while_the_critic_learns_alone_the_policy_has_no_numbers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_critic, of_both = sweep.training_curve([row(1), row(2, entropy=0.5)])["entropy"]
    assert math.isnan(of_critic) and of_both == 0.5


def test_an_outcome_is_the_summary_the_flags_and_the_curve(tmp_path):
    accuracies = {"warm_start_accuracy": 0.5, "accuracy": 0.9}
    accuracies |= {"accuracy_low": 0.8, "accuracy_high": 0.95}
    cost = {"generated_tokens": 200, "seconds": 3.0}
    evaluations = {
        "evaluations": {"greedy": {"eval_accuracy": 0.97}},
        "evaluations_before": {"greedy": {"eval_accuracy": 0.55}},
        "peak_rss_mb": 500,
    }
    summary = {**accuracies, **cost, **evaluations}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    before_training = {"iteration": 0, "eval_accuracy": 0.5}
    rows = [before_training, row(1, accuracy=0.6), row(2, accuracy=0.8)]
    lines = "".join(json.dumps(line) + "\n" for line in rows)
    (tmp_path / "metrics.jsonl").write_text(lines)
    planned = sweep.Planned("sapo", 3, tmp_path, ["--env_args", "a b"])
    assert sweep.outcome(planned) == {
        "label": "sapo",
        "seed": 3,
        "flags": "--env_args 'a b'",
        "iterations": 2,
        **accuracies,
        **cost,
        "greedy_before": 0.55,
        "greedy": 0.97,
        "curve": {"generated_tokens": [100, 200], "accuracy": [0.6, 0.8]},
    }


def test_a_table_has_a_row_per_variant_by_hand():
    run = {"warm_start_accuracy": 0.5, "greedy_before": 0.625}
    run |= {"generated_tokens": 1000, "seconds": 10.0}
    accuracies = (0.4, 0.8, 0.8, 0.8)
    runs = [{"label": "sapo", "accuracy": share, "greedy": 0.9, **run} for share in accuracies]
    runs += [{"label": "ppo", "accuracy": 0.5, "greedy": share, **run} for share in accuracies]
    head, rule, *rows = sweep.table({"runs": runs}).splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {9}
    sapos, ppos = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert sapos[:3] == ["sapo", "4", "0.500, 0.625"] and sapos[5:] == ["", "1000", "10"]
    # the interquartile mean of four leaves the lowest and the highest out
    assert sapos[3].startswith("0.800 (") and sapos[4] == "0.900 (0.900 to 0.900)"
    assert ppos[3] == "0.500 (0.500 to 0.500)" and ppos[4] == sapos[3]
    assert ppos[5].startswith("0.75 (")  # three of SAPO's four ended above PPO's


def test_a_variant_that_is_called_by_its_lambda_has_it():
    named = [
        (label.rsplit(" ", 1)[1], flags)
        for variants in sweep.EXPERIMENTS.values()
        for label, flags in variants.items()
        if ", lambda 0." in label
    ]
    assert len(named) >= 5
    for lam, flags in named:
        assert flags[flags.index("--lam") + 1] == lam


def test_a_tag_of_its_own_says_that_the_tuning_is_not_taken(tmp_path):
    """As a tag alone changes the rates, two comparisons that differ in it differ in more."""
    (tmp_path / "tune-DiceSum.json").write_text("{}")

    def told(*words):
        swept, _ = parsed_sweep("--results", str(tmp_path), *words)
        return sweep.tuning_of_another_tag(swept)

    line = told("--experiment", "topk", "--tag", "wide")
    assert line.startswith("tune-DiceSum-wide.json is not there: rates and lambdas are train.py's")
    assert line.endswith("and not those of tune-DiceSum.json")
    assert told("--experiment", "topk") == told("--experiment", "tune", "--tag", "wide") == ""
    assert told("--env_args", "n=9", "--tag", "wide") == "", "a task that nobody tuned"
    (tmp_path / "tune-DiceSum-wide.json").write_text("{}")
    assert told("--experiment", "topk", "--tag", "wide") == ""
