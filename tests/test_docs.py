"""What the documents promise: examples that run, commands that parse, links that lead somewhere,
and numbers that stand under results/.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import train
from lab import compare, figures, sweep
from lab.stats import interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = ["README.md", "tutorial.md", "docs/results.md", "docs/metrics.md", "docs/models.md"]


def text(page):
    """The text of a page."""
    return (ROOT / page).read_text()


def prose(page):
    """The text of a page with single blanks, so that a sentence is found across lines."""
    return " ".join(text(page).split())


def result(name):
    """A file of results/, read."""
    return json.loads((RESULTS / name).read_text())


# ------------------------------------------------------------------------ the README's length
def test_the_readme_has_at_most_150_lines():
    assert len(text("README.md").splitlines()) <= 150


# ----------------------------------------------------------------------------------- examples
EXAMPLES = [
    (page, code, output)
    for page in PAGES
    for code, output in re.findall(
        r"^```python\n(.*?)^```(?:\n```text\n(.*?)^```)?", text(page), re.DOTALL | re.MULTILINE
    )
    if ">>>" not in code  # the tutorial's are doctests: pytest runs that file itself
]


def test_the_readme_has_an_example():
    assert "README.md" in [page for page, _, _ in EXAMPLES]


@pytest.mark.parametrize(("page", "code", "output"), EXAMPLES)
def test_python_examples_run_and_print_what_stands_below_them(page, code, output):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    assert printed.getvalue() == output


# ----------------------------------------------------------------------------------- commands
def commands_of(page):
    """Every `python ...` of a page: the lines of its code blocks, and code within a sentence."""
    joined = text(page).replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", joined, re.DOTALL | re.MULTILINE)
    sentences = re.sub(r"^```.*?^```", "", joined, flags=re.DOTALL | re.MULTILINE)
    codes = [line for block in blocks for line in block.splitlines()]
    codes += re.findall(r"`([^`]+)`", sentences)
    commands = []
    for code in codes:
        command = " ".join(code.split("#")[0].split())
        command = re.sub(r"^SAPO_EXAMPLES=\d+ ", "", command)
        if command.startswith("python "):
            commands.append(command)
    return commands


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


def beginning_with(*programs, without=()):
    """The commands of some programs, without those that have one of some flags."""
    chosen = [command for command in COMMANDS if command.startswith(programs)]
    return [command for command in chosen if not any(flag in command for flag in without)]


HELP = [command for command in COMMANDS if command.endswith(" --help")]
RESUMED = [command for command in COMMANDS if "--resume" in command]
TRAINING = beginning_with("python train.py", without=("--help", "--resume"))
COMPARING = beginning_with("python -m lab.compare", without=("--help",))
MEASURING = beginning_with("python -m lab.bench", "python -m lab.figures")
TESTING = beginning_with("python -m pytest", "python tests/")


def arguments(command, program):
    """The words of a command behind its program."""
    words = shlex.split(command)
    count = len(program.split())
    assert words[:count] == program.split()
    return words[count:]


def test_every_command_is_of_a_kind_that_is_tested_here():
    assert sorted(HELP + RESUMED + TRAINING + COMPARING + MEASURING + TESTING) == COMMANDS


def test_ci_finds_the_test_command_in_the_readme():
    install = (
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python"
    )
    lines = text("README.md").splitlines()
    found_by_ci = [line for line in lines if re.match("python3? -m venv .*-m pytest$", line)]
    assert found_by_ci == [f"{install} -m pytest"]
    assert f"{install} train.py" in lines


@pytest.mark.parametrize("command", HELP)
def test_help_is_given_where_the_pages_say_so(command):
    program = command.removeprefix("python ").removeprefix("-m ").removesuffix(" --help")
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(program.removesuffix(".py")).main(["--help"])


@pytest.mark.parametrize("command", RESUMED)
def test_resuming_commands_take_a_runs_folder(command, tmp_path):
    settings, config = train.parse(["--iterations", "7"])
    stored = {"settings": asdict(settings), "config": asdict(config)}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    words = arguments(command.replace("runs/<name>", str(tmp_path)), "python train.py")
    resumed, _ = train.parse(words)
    assert resumed.iterations == 7


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_parse(command):
    settings, _ = train.parse(arguments(command, "python train.py"))
    if "Dataset" not in settings.env:  # its data would be downloaded
        train.make_env(settings)


@pytest.mark.parametrize("command", COMPARING)
def test_comparisons_plan_runs_that_train_py_takes(command):
    comparison, extra = compare.parse(arguments(command, "python -m lab.compare"))
    flags = [[*comparison.task_flags, *extra]]
    if comparison.experiment not in ("truth", "lift"):
        flags = [run.flags for run in sweep.plan(comparison, extra)]
    assert flags
    for of_run in flags:
        settings, _ = train.parse(of_run)
    train.make_env(settings)


@pytest.mark.parametrize("command", MEASURING)
def test_measurements_and_figures_take_these_words(command, monkeypatch):
    class ParsedError(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, words):
        parse_args(parser, words)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    module, *words = arguments(command, "python -m")
    with pytest.raises(ParsedError):
        importlib.import_module(module).main(words)


@pytest.mark.parametrize("command", TESTING)
def test_test_commands_name_files_that_exist(command):
    files = [word for word in shlex.split(command) if word.endswith((".py", ".md"))]
    assert all((ROOT / file).is_file() for file in files)


# -------------------------------------------------------------------------------------- links
def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\(([^)]+)\)", text(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_of_results_that_a_page_names_exist(page):
    names = set(re.findall(r"`results/([^`]+)`", text(page)))
    for name in names - {"gpu.json"}:  # no card was at hand
        assert list(RESULTS.glob(name)), f"{page} names results/{name}"


def test_the_claims_stand_once_and_the_others_link_to_them():
    assert [page for page in PAGES if "| the paper | here |" in text(page)] == ["docs/results.md"]
    assert "(docs/results.md)" in text("README.md")
    assert "(docs/results.md#claim-by-claim)" in text("tutorial.md")


# ---------------------------------------------------------------------------- the default run
RUNS = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("dicesum-sapo-seed*.json"))]
METRICS = [
    json.loads(line)
    for line in (RESULTS / "dicesum-sapo-seed0-metrics.jsonl").read_text().splitlines()
]


def test_the_table_of_runs_is_what_results_hold():
    assert RUNS
    for run in RUNS:
        low, high = run["accuracy_low"], run["accuracy_high"]
        cool = run["evaluations"]["temperature 0.6, top-p 0.95"]["eval_accuracy"]
        greedy = run["evaluations"]["greedy"]["eval_accuracy"]
        row = (
            f"| {run['seed']} | {run['warm_start_accuracy']:.3f} | "
            f"{run['accuracy']:.3f} ({low:.3f} to {high:.3f}) | {cool:.3f} | {greedy:.3f} | "
            f"{run['warm_start_seconds']:.0f} + {run['seconds']:.0f} | {run['peak_rss_mb']:.0f} |"
        )
        assert row in text("README.md"), f"README.md lacks the row {row!r}"
        assert f"({run['date']}, " in text("README.md")


def test_the_time_from_start_to_end_is_what_results_hold():
    whole = next(run["wall_seconds"] for run in RUNS if run["seed"] == 0)
    said = f"{whole // 60:.0f} min {whole % 60:.0f} s from its start to its end"
    assert said in prose("README.md")


def test_the_default_run_costs_and_gains_what_the_readme_says_first():
    before = np.mean([run["warm_start_accuracy"] for run in RUNS])
    accuracy = np.mean([run["accuracy"] for run in RUNS])
    said = "under five minutes of two CPU cores, "
    said += f"from {before:.0%} right answers to some {accuracy:.0%}"
    assert said in prose("README.md")
    assert max(run.get("wall_seconds", 0) for run in RUNS) < 300


def test_the_longer_runs_ended_where_the_results_page_says():
    longer = RESULTS.glob("dicesum-sapo-80rollouts-seed*.json")
    ends = sorted(json.loads(file.read_text())["accuracy"] for file in longer)
    assert len(ends) == 3
    assert f"ends at {ends[0]:.2f} to {ends[-1]:.2f} " in prose("docs/results.md")


def test_the_critic_and_the_clip_do_as_little_as_the_readme_says():
    iterations = METRICS[1:]  # the first line is the evaluation before RL
    explained = max(abs(row["explained_variance"]) for row in iterations)
    assert f"`explained_variance` stays within {explained:.2f} of 0" in prose("README.md")
    assert max(row["clip_fraction"] for row in iterations) < 0.002
    assert "the clip touches less than 0.2% of the tokens" in prose("README.md")


def test_greedy_accuracy_with_bad_habits_is_what_results_hold():
    files = sorted(RESULTS.glob("habits-sapo-seed*.json"))
    assert len(files) == 3
    for file in files:
        run = json.loads(file.read_text())
        before, after = (
            run[when]["greedy"]["eval_accuracy"] for when in ("evaluations_before", "evaluations")
        )
        assert f"from {before:.3f} to {after:.3f}" in prose("README.md")
        assert "--env_args habits=0.65 --error_rate 0.02" in run["command"]


def test_every_metric_of_a_run_is_explained_and_no_other():
    table = text("docs/metrics.md").split("## The metrics")[1]
    first_cells = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    explained = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert explained == {name for row in METRICS for name in row}


# ------------------------------------------------------------------- models, memory and speed
def test_optional_packages_are_bounded_as_in_requirements():
    requirements = (ROOT / "requirements.txt").read_text()
    packages = re.findall(r'^pip install "?([^"\s]+)', text("docs/models.md"), re.MULTILINE)
    assert len(packages) == 4
    assert [package for package in packages if package not in requirements] == []
    bound = re.search(r"^transformers(\S+)", requirements, re.MULTILINE)[1]
    assert f"bounds transformers to `{bound}`" in text("docs/models.md")


def test_the_readme_and_the_page_of_models_give_the_same_command():
    real = [[c for c in commands_of(page) if "--model" in c] for page in PAGES]
    assert real[PAGES.index("README.md")] == real[PAGES.index("docs/models.md")] != []


def test_the_speed_of_the_mathematics_is_what_results_hold():
    measured = result("bench_math.json")
    ratio = measured["ratio"]
    assert ratio["torch slices"] >= 100
    said = prose("docs/models.md")
    assert f"take {1000 * measured['seconds']['sapo.py']:.0f} ms of one core" in said
    assert f"{ratio['torch slices']:.0f} times as long on torch slices" in said
    assert f"{ratio['numpy slices']:.0f} times on NumPy slices" in said
    assert f"{ratio['python floats']:.0f} times on Python floats" in said


def test_the_memory_of_scoring_is_what_results_hold():
    ways = result("bench_memory.json")["ways"]
    pieces = ways["in pieces"]["megabytes"]
    plain = ways["log_softmax"]["megabytes"]
    library = ways["torch.distributions"]["megabytes"]
    assert pieces <= plain / 4
    assert all(max(way["largest_difference"]) < 1e-5 for way in ways.values())
    said = (
        f"{pieces} MB where `log_softmax` on all of it takes {plain} "
        f"and `torch.distributions` {library}"
    )
    assert said in prose("docs/models.md")


def test_the_race_of_iterations_is_what_results_hold():
    share = result("bench_iteration.json")["of_grpo"]
    ours, theirs = share["SAPO"], share["TRL's GRPO"]
    said = f"takes {ours:.2f} of our GRPO's time and TRL's `GRPOTrainer` {theirs:.2f} of it"
    assert said in prose("docs/models.md")


def test_the_earlier_races_are_what_results_hold():
    races = result("bench_iteration_earlier.json")["races"]
    ours = [race["of_grpo"]["SAPO"] for race in races]
    theirs = [race["of_grpo"]["TRL's GRPO"] for race in races]
    said = f"gave {min(ours):.2f} to {max(ours):.2f}, and {min(theirs):.2f} to {max(theirs):.2f},"
    assert said in prose("docs/models.md")


def test_the_table_of_the_card_is_what_results_hold():
    page = text("docs/models.md")
    if not (RESULTS / "gpu.json").is_file():
        assert page.count("| not measured | not measured |") == 1
        return
    for row in result("gpu.json")["rows"]:
        settings = f"LoRA {row['lora']}" if row["lora"] else "all weights"
        measured = "out of memory"
        if row.get("peak_gib"):
            measured = f"{row['peak_gib']:.1f} GiB | {row['seconds_per_iteration']:.1f}"
        assert f"| {row['model']} | {settings} | {measured} |" in page


# ---------------------------------------------------------------------------- the comparisons
MEASURED = [
    file.name
    for file in sorted(RESULTS.glob("*.json"))
    if "experiment" in json.loads(file.read_text())
]
COMPARED = [name for name in MEASURED if not name.startswith(("tune", "truth", "lift"))]


def assert_rows(rows, name):
    """All rows of the table stand on the results page."""
    missing = [row for row in rows if row not in text("docs/results.md").splitlines()]
    assert rows
    assert not missing, f"docs/results.md lacks these rows of {name}: {missing}"


def test_each_kind_of_measurement_is_there():
    kinds = {result(name)["experiment"] for name in MEASURED}
    assert kinds == {*sweep.EXPERIMENTS, "truth", "lift"}


@pytest.mark.parametrize("name", MEASURED)
def test_the_results_page_has_the_command_and_the_date_of_each_measurement(name):
    measured = result(name)
    command = measured["command"].replace("python compare.py", "python -m lab.compare")
    assert command in commands_of("docs/results.md")
    assert measured["date"] in text("docs/results.md")


@pytest.mark.parametrize("name", COMPARED)
def test_the_tables_of_comparisons_are_what_results_hold(name):
    assert_rows(sweep.table(result(name)).splitlines()[2:], name)


@pytest.mark.parametrize("name", [name for name in MEASURED if name.startswith("truth")])
def test_the_table_of_the_truth_is_what_results_hold(name):
    rows = []
    for method, measured in result(name)["methods"].items():
        low, high = measured["auroc_interval"]
        rows.append(
            f"| {method} | {measured['auroc']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{measured['auroc_in_wrong_responses']:.2f} | "
            f"{measured['share_on_first_wrong_step'][0]:.2f} | "
            f"{measured['cosine'][0]:.2f} | {measured['variance']:.1f} |"
        )
    assert_rows(rows, name)


# Where the values come from that Lift is computed of: the columns of the table, twice.
SOURCES = ("Monte Carlo", "critic")


def lift_cell(lift):
    """Lift and its interval, as the tables have it."""
    value, low, high = lift
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


@pytest.mark.parametrize("name", [name for name in MEASURED if name.startswith("lift")])
def test_the_table_of_lift_is_what_results_hold(name):
    measured = result(name)
    curves = [measured[when][source]["lift"] for when in ("early", "late") for source in SOURCES]
    rows = []
    for q in curves[0]:
        cells = " | ".join(lift_cell(curve[q]) for curve in curves)
        rows.append(f"| {float(q):.0%} | {cells} |")
    assert_rows(rows, name)


# --------------------------------------------------------------------------------- the claims
ARROWS = "ArrowPath-length=10-grid=4-long.json"
LONG = "horizon-DiceSum-verbosity=8-long.json"
SHARES = ("5%", "10%", "20%", "30%", "50%", "100%")


def after(name, *labels):
    """What the tables give as a variant's accuracy after training, for each label."""
    runs = result(name)["runs"]
    accuracies = []
    for label in labels:
        of_seeds = [run["accuracy"] for run in runs if run["label"] == label]
        accuracies.append(f"{interval(of_seeds)[0]:.3f}")
    return accuracies


def at_the_end(name, metric, digits, *labels):
    """A metric of the last part of training, the mean over a variant's seeds, for each label."""
    means = []
    for label in labels:
        runs = [run for run in result(name)["runs"] if run["label"] == label]
        means.append(np.mean([run["curve"][metric][-1] for run in runs]))
    return [f"{mean:.{digits}f}" for mean in means]


def against(rival):
    """SAPO's and a rival's accuracy at 31, 49 and 140 tokens; VC-PPO did not run at 140."""
    accuracies = after("main-DiceSum.json", "sapo", rival) + after(f"main-{ARROWS}", "sapo", rival)
    if rival != "vc-ppo":
        accuracies += after(LONG, "sapo", rival)
    return accuracies


def ppo_claim():
    return against("ppo") + after(LONG, "ppo, lambda 0.99")


def entropy_claim():
    names = ("main-DiceSum.json", f"main-{ARROWS}")
    dice, arrows = (at_the_end(name, "entropy", 3, "sapo", "ppo") for name in names)
    return dice + arrows


def value_loss_claim():
    critic = result("truth-DiceSum.json")["values"]["segment critic"]
    losses = at_the_end("main-DiceSum.json", "value_loss", 2, "sapo", "ppo")
    return [f"{critic['rmse']:.3f}", f"{critic['spread_of_truth']:.3f}", *losses]


def lift_claim():
    measured = result("lift-DiceSum.json")
    curves = [measured[when]["Monte Carlo"]["lift"] for when in ("early", "late")]
    cells = [lift_cell(curve[q]) for curve in curves for q in ("0.5", "0.3", "0.2")]
    return [figure for cell in cells for figure in re.findall(r"\d\.\d", cell)]


def variance_claim():
    methods = result("truth-DiceSum.json")["methods"]
    return [f"{methods[method]['variance']:.1f}" for method in ("sapo", "ppo", "vc-ppo")]


def control_claim(variant):
    """SAPO and SAPO with one thing changed, at 49 and at 31 tokens."""
    arrows = after(f"controls-{ARROWS}", "sapo", f"sapo, {variant}")
    return arrows + after("controls-DiceSum.json", "sapo", f"sapo, {variant}")


# {how a row begins: (the function that computes its figures, its arguments)}
CLAIMS = {
    "SAPO ends above PPO": (ppo_claim,),
    "SAPO ends above GRPO": (against, "grpo"),
    "SAPO ends above VC-PPO": (against, "vc-ppo"),
    "Entropy does not collapse": (entropy_claim,),
    "The value loss is lower": (value_loss_claim,),
    "High entropy is where the value jumps": (lift_claim,),
    "Token-level credit gives the noisier": (variance_claim,),
    "The segment ratio beats": (control_claim, "token ratio"),
    "Cuts at high entropy": (after, "cuts-DiceSum.json", "topk", "delimiter", "low-prob", "fixed"),
    "30% is the best share": (after, "topk-DiceSum.json", *SHARES),
    "Not in the paper: V read": (control_claim, "V at end"),
    "Not in the paper: averages": (control_claim, "token mean"),
    "Not in the paper: the causal cut": (after, "cuts-DiceSum.json", "topk", "causal"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_figures_of_each_claim_are_what_results_hold(claim):
    function, *arguments = CLAIMS[claim]
    rows = text("docs/results.md").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| {claim}")]
    cell = re.sub(r"\]\([^)]*\)|lambda 0\.99", "", row.split(" | ")[2])
    assert sorted(re.findall(r"\d\.\d+", cell)) == sorted(function(*arguments))


def test_every_claim_with_a_figure_is_tested():
    table = text("docs/results.md").split("| the paper | here |")[1].split("\n\n")[0]
    rows = [row for row in table.splitlines() if re.search(r"\d\.\d", row.split(" | ")[-1])]
    assert len(rows) == len(CLAIMS)


# -------------------------------------------------------------------------------- the figures
def test_the_figures_of_results_are_drawn_from_results(tmp_path):
    """`python -m lab.figures results` gives them back, byte for byte under the same matplotlib."""
    for file in RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for path in figures.drawn(tmp_path):
        kept = (RESULTS / path.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," not in kept:
            pytest.skip(f"results/ was drawn with another matplotlib than {matplotlib.__version__}")
        assert kept == path.read_text(), f"{path.name} is not what its JSON holds"
