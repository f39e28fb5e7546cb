"""lab/tables.py: each table by hand on made-up outcomes, and which tables a folder gives."""

import json

import pytest

from lab import tables
from lab.sweep import table


def cells(text):
    """The cells of a Markdown table, row by row; without the rule, which is checked here."""
    head, rule, *rows = text.splitlines()
    assert set(rule) == {"|", "-"}
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert all(line.startswith("| ") and line.endswith(" |") for line in (head, *rows))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rows)]


def evaluations(*accuracies):
    """The three ways of decoding, as a summary has them."""
    kinds = ("temperature 1", "temperature 0.6, top-p 0.95", "greedy")
    return {
        kind: {"eval_accuracy": accuracy} for kind, accuracy in zip(kinds, accuracies, strict=True)
    }


def summary(seed=0):
    """A summary of train.py with what results/ adds to it."""
    mid_run = {"auroc_of_first_wrong_step": 0.876, "auroc_in_wrong_responses": 0.654}
    mid_run |= {"explained_variance": 0.123}
    mid_run |= {"own_credit": {"share_on_first_wrong_step": [0.321, 0.2, 0.4]}}
    mechanism = {"explained_variance_second_half": 0.456, "clip_fraction": 0.0123}
    mechanism |= {"largest_approx_kl": 0.0456, "mid_run": mid_run}
    costs = {"warm_start_seconds": 20.4, "seconds": 99.6, "peak_rss_mb": 700.2}
    return {
        "seed": seed,
        "evaluations_before": evaluations(0.3, 0.4, 0.1),
        "evaluations": evaluations(0.8, 0.85, 0.9375),
        "mechanism": mechanism,
        **costs,
    }


def critics():
    """What lab.critic writes: two tasks, of which the second has no ceiling yet."""
    measured = []

    def add(task, variant, *ends):
        for seed, (explained, auroc, share) in enumerate(ends):
            first = {"explained_variance": -9, "auroc_of_first_wrong_step": 0}
            first |= {"share_of_blame": [9, 9, 9]}
            last = {"explained_variance": explained, "auroc_of_first_wrong_step": auroc}
            last |= {"share_of_blame": [share, 0, 1]}
            row = {"task": task, "seed": seed, "variant": variant, "curve": [first, last]}
            measured.append(row)

    add("dice", "as before", (0.1, 0.5, 0.1), (0.3, 0.6, 0.2))
    add("dice", "hears", (0.4, 0.8, 0.3), (0.5, 1.0, 0.5))
    add("dice", "ceiling", (0.7, 0.9, 0.6))
    add("nine", "as before", (-0.25, 0.5, 0.125))
    add("nine", "hears", (0.25, 0.75, 0.25))
    return {"variants": {"as before": {}, "hears": {}}, "measured": measured}


def trial(**changes):
    fields = {"seed": 10, "habits": 0.65, "critic_hears": "nothing", "lam": 0.99, "epochs": 4}
    fields |= {"batch": 256, "minibatch": 64, "actor_lr": 1e-4, "critic_lr": 2e-3}
    fields |= {"actor_half_life": 500000.0, "whiten_advantages": True, "accuracy": 0.8613}
    fields |= {"clip_low": 0.25, "target_kl": None}
    fields |= {"greedy": 0.9551, "generated_tokens": 159288, "clip_fraction": 0.0267}
    return fields | {"explained_variance_second_half": 0.2274} | changes


def sweep(experiment):
    """A sweep's outcome of one variant and one seed."""
    run = {"label": "sapo", "seed": 0, "accuracy": 0.75, "greedy": 0.875, "seconds": 12}
    run |= {"warm_start_accuracy": 0.5, "greedy_before": 0.625, "generated_tokens": 1000}
    return {"experiment": experiment, "task": "DiceSum", "runs": [run]}


def reuse():
    """A sweep over epochs: the token ratio has not run at two epochs yet."""

    def run(label, accuracy, kl):
        curve = {"clip_fraction": [0.01, 0.03], "approx_kl": [kl, kl / 2]}
        return {"label": label, "accuracy": accuracy, "warm_start_accuracy": 0.5, "curve": curve}

    runs = [
        run("segment ratio, 1 epochs", 0.8, 0.25),
        run("segment ratio, 1 epochs", 0.75, 0.125),
        run("token ratio, 1 epochs", 0.5, 0.125),
        run("segment ratio, 2 epochs", 0.45, 1.5),
        run("segment ratio, 2 epochs", 0.55, 1.0),
    ]
    return {"experiment": "reuse", "task": "DiceSum", "runs": runs}


def theorems():
    """What `python -m lab.estimators` writes: two functions of one kind."""
    holds, none = {"outcome": "holds"}, {"outcome": "does not apply", "reason": "it takes no mask"}
    fails = {"outcome": "fails", "reason": "it is 1, not 0", "asked": ["mask [[1]]", "lam 0"]}
    rows = [
        {"name": "ours", "kind": "gae", "verdicts": {"padding": holds, "holes": none}},
        {"name": "theirs", "kind": "gae", "verdicts": {"padding": fails, "holes": holds}},
    ]
    return {"rows": rows}


# ------------------------------------------------------------------------------- each by hand
def test_the_table_of_the_default_runs():
    head, first, second = cells(tables.default_table([summary(), summary(seed=3)]))
    assert head[1:4] == list(summary()["evaluations"])  # the columns are in this order
    decoded = ["0.300 to 0.800", "0.400 to 0.850", "0.100 to 0.938"]
    assert first == ["0", *decoded, "20 + 100", "700"]
    assert second == ["3", *first[1:]]


def test_the_table_of_the_mechanism():
    head, first, second = cells(tables.mechanism_table([summary(), summary(seed=3)]))
    assert first == ["0", "0.46", "0.12", "1.23%", "0.046", "0.88", "0.65", "0.321"]
    assert second == ["3", *first[1:]]
    assert "first wrong step" in head[5] and "all wrong steps" in head[6]


def test_the_table_of_four_epochs():
    runs = [[summary(seed)] for seed in (2, 4, 3)]
    head, *rows = cells(tables.four_epochs_table(*runs))
    assert rows[0][2:] == ["0.300 to 0.800", "0.100 to 0.938", "1.23%", "0.046"]
    assert [row[:2] for row in rows] == [
        ["none, earlier settings", "2"],
        ["0.015", "4"],
        ["none", "3"],
    ]


def test_the_table_of_nine_dice():
    tried = {"as ever": [], "longer": [summary(seed=2) | {"generated_tokens": 1234}]}
    _, row = cells(tables.tried_table(tried))
    assert row == ["longer", "2", "0.300 to 0.800", "0.100 to 0.938", "0.46", "1234"]


def test_the_table_of_the_critics_has_the_means_over_seeds_at_the_end():
    head, *rows = cells(tables.critic_table(critics()))
    assert [cell.split(":")[0] for cell in head] == ["critic", "dice", "nine"]
    assert rows == [
        ["as before", "0.20, 0.55, 0.15", "-0.25, 0.50, 0.12"],
        ["hears", "0.45, 0.90, 0.40", "0.25, 0.75, 0.25"],
        ["64 continuations", "0.70, 0.90, 0.60", ""],
    ]


def test_the_table_of_reuse_has_a_row_per_ratio_and_a_column_per_number_of_epochs():
    head, *rows = cells(tables.reuse_table(reuse()))
    assert head[1:] == ["1 epochs", "2 epochs"]
    assert rows == [
        ["segment ratio", "0.775, 0 of 2, 2.0%, 0.25", "0.500, 1 of 2, 2.0%, 1.5"],
        ["token ratio", "0.500, 0 of 1, 2.0%, 0.12", ""],
    ]


def test_the_table_of_a_tuning():
    """A trial clearly below the best is not in bold, and no row is of a method without runs. The
    trials are those of the file, whatever grid is today's."""
    accuracies = {"gspo --actor_lr 1e-4": 0.25, "gspo --actor_lr 2e-4": 0.5}
    accuracies["ppo --actor_lr 7e-4 --lam 0.3"] = 0.125
    runs = [
        {"label": label, "accuracy": share + step, "greedy": share / 2}
        for label, share in accuracies.items()
        for step in (-0.01, 0.01)
    ]
    _, of_ppo, of_gspo = cells(tables.tuning_table({"runs": runs}))
    assert of_gspo == ["gspo", "1e-4: 0.250, 0.125", "**2e-4: 0.500, 0.250**"]
    assert of_ppo == ["ppo", "**7e-4, lambda 0.3: 0.125, 0.062**", ""]


def test_the_table_of_the_trials():
    other = trial(seed=11, critic_hears="surprise", minibatch=32, whiten_advantages=False)
    other |= {"target_kl": 0.03, "value_pretraining": 6, "start": {"spread": 0.125, "rate": 5e-3}}
    head, first, second = cells(tables.trials_table({"trials": [trial(), other]}))
    places = dict(zip(head, first, strict=True))
    assert places == {
        "seed": "10",
        "habits": "0.65",
        "start": "0.02, 0.003",
        "critic first": "0",
        "clip": "0.25",
        "critic hears": "nothing",
        "lambda": "0.99",
        "batch": "256",
        "epochs x steps": "4 x 4",
        "rates": "0.0001, 0.002",
        "half-life": "500000",
        "whitened": "yes",
        "KL bound": "none",
        "tokens": "159288",
        "temperature 1": "0.861",
        "greedy": "0.955",
        "explained variance": "0.23",
        "clip fraction": "2.67%",
    }
    changed = {"seed": "11", "critic hears": "surprise", "epochs x steps": "4 x 8"}
    changed |= {"whitened": "no", "KL bound": "0.03", "start": "0.125, 0.005", "critic first": "6"}
    assert dict(zip(head, second, strict=True)) == places | changed


# ------------------------------------------------------------------------------- a folder's
def ground_truth():
    """A ground truth of one method."""
    measured = {
        "auroc": 0.751,
        "auroc_interval": [0.7, 0.8],
        "auroc_in_wrong_responses": 0.67,
        "auroc_of_first_wrong_step": 0.82,
        "share_on_first_wrong_step": [0.2, 0.1, 0.3],
        "cosine": [0.2, 0.1, 0.3],
        "variance": 0.5,
    }
    return {"experiment": "truth", "methods": {"sapo": measured}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with an outcome of every kind, in place of results/."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    files = {
        "default-sapo-seed1": summary(seed=1),
        "default-sapo-seed0": summary(seed=0),
        "epochs4-unbounded-seed1": summary(seed=1),
        "epochs4-seed0": summary(seed=0),
        "arrows-deaf-seed3": summary(seed=3) | {"generated_tokens": 9},
        "nine-dice-seed1": summary(seed=1) | {"generated_tokens": 9},
        "critic": critics(),
        "trials": {"trials": [trial()]},
        "main-DiceSum": sweep("main"),
        "reuse-DiceSum": reuse(),
        "tune-DiceSum": sweep("tune"),
        "theorems": theorems(),
        "truth-DiceSum": ground_truth(),
        "bench_math": {"seconds": 1},
    }
    for name, made in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    return tmp_path


def test_the_table_of_the_truth():
    head, row = cells(tables.truth_table(ground_truth()))
    assert row == [
        "sapo",
        "0.75 (0.70 to 0.80)",
        "0.67",
        "0.82",
        *["0.20 (0.10 to 0.30)"] * 2,
        "0.50",
    ]
    assert len(head) == len(row)


def test_the_tables_of_the_theorems():
    made = tables.theorem_tables(theorems())
    assert cells(made["advantages"]) == [
        ["theorem", "ours", "theirs"],
        ["`padding`", "yes", "**no**"],
        ["`holes`", "", "yes"],
    ]
    assert cells(made["failures"])[1:] == [
        ["theirs", "`padding`", "it is 1, not 0", "`mask [[1]]`; then `lam 0`"]
    ]


def test_summaries_come_in_the_order_of_their_names(results):
    assert [run["seed"] for run in tables.default_runs()] == [0, 1]


def test_all_tables_are_those_of_the_files_there(results):
    defaults = [summary(0), summary(1)]
    of_theorems = tables.theorem_tables(theorems()) | {"statements": tables.statements()}
    assert tables.all_tables() == {
        "default-sapo-seed*.json": tables.default_table(defaults),
        "default-sapo-seed*.json, mechanism": tables.mechanism_table(defaults),
        "epochs4-*.json": tables.four_epochs_table([summary(1)], [summary(0)]),
        "nine-dice-*.json": tables.tried_table(
            {"warm start of 1200 steps": [summary(1) | {"generated_tokens": 9}]}
        ),
        "arrows-*.json": tables.tried_table(
            {"lambda 0.7, the critic hears nothing": [summary(3) | {"generated_tokens": 9}]}
        ),
        "critic.json": tables.critic_table(critics()),
        "main-DiceSum.json": table(sweep("main")),
        "truth-DiceSum.json": tables.truth_table(ground_truth()),
        "reuse-DiceSum.json": tables.reuse_table(reuse()),
        **{f"theorems.json, {what}": lines for what, lines in of_theorems.items()},
        "tune-DiceSum.json": tables.tuning_table(sweep("tune")),
        "trials.json": tables.trials_table({"trials": [trial()]}),
    }


def test_without_runs_of_four_epochs_there_is_no_table_of_them(results):
    for file in results.glob("epochs4-*.json"):
        file.unlink()
    assert "epochs4-*.json" not in tables.all_tables()


@pytest.mark.parametrize("name", ["default-sapo-seed0.json", "main-DiceSum.json", "other.json"])
@pytest.mark.parametrize("text", ["", '{"runs": [', "[]", "\0", "[" * 10**5])
def test_a_damaged_file_is_named_in_one_line(results, name, text):
    (results / name).write_text(text)
    said = rf"^python -m lab.tables: .*/{name}: expected one whole object of JSON \(.*put it back"
    with pytest.raises(SystemExit, match=said) as left:
        tables.main()
    assert "\n" not in left.value.code


def test_main_prints_every_table_under_its_source(results, capsys):
    tables.main()
    expected = [f"results/{source}\n\n{lines}\n" for source, lines in tables.all_tables().items()]
    assert capsys.readouterr().out == "\n".join(expected) + "\n"
