"""What the documents promise: examples that run, commands that parse, links that lead somewhere,
and numbers that stand under results/.
"""

import argparse
import collections
import contextlib
import importlib
import io
import itertools
import json
import math
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import baselines
import health
import train
from lab import (
    compare,
    critic,
    cures,
    figures,
    kills,
    mutants,
    soak,
    sweep,
    tables,
    theorems,
    trl_sapo,
)
from lab.stats import interval, of_reuse, probability_of_improvement
from tasks import DiceSum
from tasks.base import split_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
KINDS = (*sweep.EXPERIMENTS, "truth", "lift", "critic")  # of measurements, by a file's first word
MEASURED_ON = ("docs/results.md", "docs/earlier.md")  # today's measurements, and those before
PAGES = [
    *("README.md", "tutorial.md", *MEASURED_ON),
    *(f"docs/{name}.md" for name in ("metrics", "models", "games", "theorems")),
]


def text(*pages):
    """The text of some pages."""
    return "\n".join((ROOT / page).read_text() for page in pages)


def prose(*pages):
    """The text of some pages with single blanks, so that a sentence is found across lines."""
    return " ".join(text(*pages).split())


def sections():
    """{title: text} of the two pages of measurements. A page's own title stands for what comes
    before its first section."""
    parts = [part for page in MEASURED_ON for part in re.split(r"^##? ", text(page), flags=re.M)]
    return {part.partition("\n")[0]: part for part in parts}


def section(*titles):
    """The prose of some of them: so a number is held to the place where it is explained."""
    return " ".join(" ".join(sections()[title].split()) for title in titles)


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
    if page != "tutorial.md"  # whose examples go on from each other: test_tutorial.py
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
def commands_of(*pages):
    """Every `python ...` of some pages."""
    return commands_in(text(*pages))


def commands_in(words):
    """Every `python ...` of a text: the lines of its code blocks, and code in a sentence."""
    joined = words.replace("\\\n", " ")
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
LOOKING = beginning_with(
    *(
        f"python -m lab.{name}"
        for name in ("critic", "tables", "theorems", "estimators", "kills", "memory", "ratio_noise")
    ),
    "python -m lab.cures",
    "python -m lab.steps",
    "python -m lab.trl_sapo",
    "python -m lab.soak",
    "python -m lab.mutants",
)
TESTING = beginning_with("python -m pytest", "python tests/")


def arguments(command, program):
    """The words of a command behind its program."""
    words = shlex.split(command)
    count = len(program.split())
    assert words[:count] == program.split()
    return words[count:]


def test_every_command_is_of_a_kind_that_is_tested_here():
    assert sorted(HELP + RESUMED + TRAINING + COMPARING + MEASURING + LOOKING + TESTING) == COMMANDS


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


PACKAGE_OF = {"SAPO/DigitSum-v0": "sklearn", "SAPO/ReasoningGym-v0": "reasoning_gym"}


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_parse(command):
    settings, _ = train.parse(arguments(command, "python train.py"))
    if settings.env in PACKAGE_OF:
        package = PACKAGE_OF[settings.env]
        pytest.importorskip(package, reason=f"{settings.env} needs {package}")
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


@pytest.mark.parametrize("command", LOOKING)
def test_the_other_commands_of_the_laboratory_take_these_words(command):
    if "lab.critic" in command:
        critic.parse(arguments(command, "python -m lab.critic"))
    elif "lab.steps" in command:
        train.parse(arguments(command, "python -m lab.steps"))
    elif "lab.theorems" in command:
        theorems.parse(arguments(command, "python -m lab.theorems"))
    elif "lab.cures" in command:
        cures.parse(arguments(command, "python -m lab.cures"))
    elif "lab.kills" in command:
        kills.parse(arguments(command, "python -m lab.kills"))
    elif "lab.soak" in command:
        soak.parse(arguments(command, "python -m lab.soak"))
    elif "lab.mutants" in command:
        mutants.parse(arguments(command, "python -m lab.mutants"))
    elif "lab.trl_sapo" in command:
        trl_sapo.parse(arguments(command, "python -m lab.trl_sapo"))
    else:
        takes_no_words = ("tables", "estimators", "memory", "ratio_noise")
        assert command.removeprefix("python -m lab.") in takes_no_words


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
RUNS = tables.default_runs()
METRICS = [
    json.loads(line)
    for line in (RESULTS / "default-sapo-seed0-metrics.jsonl").read_text().splitlines()
]


def test_the_runs_of_the_readme_are_the_default_and_say_their_date():
    assert [run["seed"] for run in RUNS] == [0, 1, 2]
    for run in RUNS:
        settings, config = train.parse(arguments(run["command"], "python train.py"))
        default_settings, default_config = train.parse(["--seed", str(run["seed"])])
        settings.name = default_settings.name
        assert (settings, config) == (default_settings, default_config)
        assert f"({run['date']}, " in text("README.md")


def test_the_readmes_table_of_runs_is_what_results_hold():
    assert tables.default_table(RUNS) in text("README.md")


def test_the_time_from_start_to_end_is_what_results_hold():
    whole = next(run["wall_seconds"] for run in RUNS if run["seed"] == 0)
    said = f"{whole // 60:.0f} min {whole % 60:.0f} s in all"
    assert said in prose("README.md")


def test_why_the_default_changed_is_what_results_hold():
    page, stuck = section("How the default was chosen"), result("stuck-sapo-seed0.json")
    assert (stuck["command"], stuck["seed"], stuck["threads"]) == (
        "python train.py --name whole",
        0,
        2,
    )
    greedy = stuck["evaluations"]["greedy"]["eval_accuracy"]
    explained = stuck["mechanism"]["explained_variance_second_half"]
    said = "it ended at {:.3f}, greedy {:.3f}, while its critic explained {:.0%} of the outcomes"
    assert said.format(stuck["accuracy"], greedy, explained) in page
    lines = (RESULTS / "stuck-sapo-seed0-metrics.jsonl").read_text().splitlines()
    accuracies = [row["accuracy"] for row in map(json.loads, lines) if "actor_lr" in row]
    still = f"{min(accuracies[5:]):.2f} to {max(accuracies[5:]):.2f}"
    assert f"stood still from the sixth rollout on, at {still}" in page and len(accuracies) == 68
    seen = stuck["after_25_rollouts"]
    assert f"it read {seen['sixes_read_as_five']} of {seen['sixes']} sixes as fives" in page
    assert (
        f"11+5=17 in {seen['eleven_and_five_made_17']} of {seen['eleven_and_five']} cases" in page
    )

    small, large = (
        result(f"steps-reads-lambda-{lam}.json")["credit"]["hard"]["read"] for lam in (0.7, 0.9)
    )
    earned = (small[verdict][1] for verdict in ("right", "wrong"))
    assert "earn {:.2f} and those that do not {:.2f}; but".format(*earned) in page
    said = "the right readings have advantages of {:.2f} and the wrong ones {:.2f}, so that"
    assert said.format(*(small[verdict][2] for verdict in ("right", "wrong"))) in page
    assert "At 0.9 they have {:.2f} and {:.2f}".format(*(large[v][2] for v in large)) in page


def test_the_default_of_today_is_the_one_that_the_page_names():
    page, (settings, config) = section("Results"), train.parse([])
    assert f"lambda {config.lam} in place of 0.7, a clip of {config.clip_low} in place" in page
    assert config.clip_low == config.clip_high and settings.warm_start_lr == 5e-3
    assert "a warm start at a rate of 5e-3 in place of 3e-3" in page


def test_what_the_start_could_copy_is_what_results_hold():
    page = section("How the default was chosen")
    starts = {
        (row["seed"], row["spread"], row["steps"], row["batch"], row["rate"]): row
        for row in result("copying.json")["starts"]
    }

    def copied(seed, spread=0.02, steps=600, batch=64, rate=3e-3, move="second"):
        moves = {"second": "second_move_after_two_digits", "first": "first_move"}
        return starts[seed, spread, steps, batch, rate][moves[move]][1]

    settings, _ = train.parse([])
    read = dict.fromkeys(range(1, 7), 1 / 6)  # how often the teacher reads it
    read[5] += settings.habits / 6
    read[6] -= settings.habits / 6
    large = sum(read[a] * read[b] for a in read for b in read if a + b >= 10)
    assert round(1 / (large * (1 - settings.habits))) == 19
    assert "writes such a sum in one demonstration of nineteen" in page
    before = [f"{copied(seed):.0%}" for seed in (4, 1, 0)]
    said = "rightly in {} of its answers, of seed 1 in {}, of seed 0 in {} (`results/copying.json`)"
    assert said.format(*before) in page
    said = "gave it {:.0%}, a rate of 5e-3 {:.0%} (seed 1: {:.0%}), of 8e-3 {:.0%} ({:.0%})"
    higher = [copied(seed, rate=rate) for rate in (5e-3, 8e-3) for seed in (4, 1)]
    assert said.format(copied(4, steps=800), *higher) in page
    halves = [key for key in starts if key[2:4] == (1000, 32)]
    both = sorted(copied(*key) for key in halves)
    first = sorted(copied(*key, move="first") for key in halves)
    said = f"taught both seeds this ({both[0]:.0%} to {both[-1]:.0%}), but not the first sum"
    assert f"{said} ({first[0]:.0%} to {first[-1]:.0%})" in page
    assert f"the start of seed 4 copies {copied(4, 0.12, rate=5e-3):.0%}" in page

    trials = [t for t in result("trials.json")["trials"] if "start" in t]
    of_four = {t["lam"]: t for t in trials if t["seed"] == 4 and t["start"]["spread"] == 0.02}
    said = f"was at {of_four[0.95]['greedy']:.3f} and {of_four[0.99]['greedy']:.3f} greedy"
    assert said in page
    new = [t for t in trials if t["start"]["spread"] == 0.125]
    cold, warm = (sorted(t[key] for t in new) for key in ("accuracy", "greedy"))
    said = f"at {cold[0]:.3f} to {cold[-1]:.3f}, greedy at {warm[0]:.3f} to {warm[-1]:.3f}"
    assert said in page
    clipped = sorted(t["clip_fraction"] for t in new)
    assert f"At 0.05 the clip held back {clipped[0]:.2%} to {clipped[-1]:.2%}" in page
    first = [t for t in trials if t["value_pretraining"]]
    assert {(t["value_pretraining"], t["iterations"]) for t in first} == {(6, 30)}
    assert "alone in the first six rollouts" in page and "after 24 rollouts more" in page
    late = {t["lam"]: t["accuracy"] for t in first}
    assert f"did not help: {late[0.7]:.3f} at lambda 0.7, {late[0.95]:.3f} at 0.95" in page
    at_once = {t["lam"]: t["accuracy"] for t in trials if t["iterations"] == 25}
    assert f"without it gave {at_once[0.7]:.3f} and {at_once[0.95]:.3f}" in page
    (lucky,) = [t for t in trials if t["lam"] == 0.7 and not t["value_pretraining"]]
    assert f"with one thread, 25 rollouts brought it to {lucky['greedy']:.3f} greedy" in page


def greedy(when):
    return np.mean([run[when]["greedy"]["eval_accuracy"] for run in RUNS])


def test_the_default_run_gains_what_the_readme_says_first():
    before, after = greedy("evaluations_before"), greedy("evaluations")
    assert f"the model is right {before:.0%} of the time before RL and {after:.0%} after" in prose(
        "README.md"
    )


def test_the_parts_do_what_the_readme_says():
    parts = [run["mechanism"] for run in RUNS]
    explained = sorted(part["explained_variance_second_half"] for part in parts)
    clipped = sorted(part["clip_fraction"] for part in parts)
    said = f"the critic explains {explained[0]:.0%} to {explained[-1]:.0%} of the variance"
    assert said in prose("README.md")
    said = f"the clip holds back {clipped[0]:.2%} to {clipped[-1]:.2%} of the tokens"
    assert said in prose("README.md")


def test_the_numbers_of_seed_0_are_those_of_its_metrics():
    rows = METRICS[1:]  # the first line is the evaluation before RL
    parts = RUNS[0]["mechanism"]
    assert parts["clip_fraction"] == pytest.approx(np.mean([row["clip_fraction"] for row in rows]))
    assert parts["largest_approx_kl"] == max(row["approx_kl"] for row in rows)


def test_every_metric_of_a_run_is_explained_and_no_other():
    table = text("docs/metrics.md").split("## The metrics")[1]
    first_cells = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    explained = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert explained == {name for row in METRICS for name in row}


# ------------------------------------------------------------------- models, memory and speed
def test_optional_packages_are_bounded_as_in_requirements():
    requirements = (ROOT / "requirements.txt").read_text()
    packages = re.findall(r'^pip install "?([^"\s]+)', text("docs/models.md"), re.MULTILINE)
    assert len(packages) == 9
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


def test_the_cost_of_tokens_is_what_results_hold():
    measured, page = result("bench_tokens.json"), prose("docs/models.md")
    of_reference = [row["of_reference"] for row in measured["rows"]]
    assert f"takes {min(of_reference):.2f} to {max(of_reference):.2f} of what it takes" in page
    assert f"(CPU seconds of one thread, the tiny model; `{measured['command']}`, " in page
    assert f"{measured['date']}, `results/bench_tokens.json`)" in page
    for name, unit in (("responses", "responses"), ("tokens_each", "tokens each")):
        numbers = [row[name] for row in measured["rows"]]
        assert f"from {min(numbers)} to {max(numbers)} {unit}" in page


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


def test_what_is_said_of_training_through_trl_is_what_its_runs_hold():
    page = prose("docs/models.md")
    run = result("trl-DiceSum-seed0.json")
    assert run["command"] in commands_of("docs/models.md")
    shares = [
        f"{run[when][kind]['eval_accuracy']:.3f}"
        for kind in ("temperature 1", "greedy")
        for when in ("evaluations_before", "evaluations")
    ]
    said = "from {} to {} at temperature 1 and from {} to {} when greedy"
    assert said.format(*shares) in page and f"goes in {run['rollouts']} rollouts" in page
    assert f"(`results/trl-DiceSum-seed0.json`, {run['date']})" in page


def test_the_race_of_iterations_is_what_results_hold():
    share = result("bench_iteration.json")["of_grpo"]
    ours, theirs = share["SAPO"], share["TRL's GRPO"]
    said = f"takes {ours:.2f} of our GRPO's time and TRL's `GRPOTrainer` {theirs:.2f} of it"
    assert said in prose("docs/models.md")


def test_the_cost_of_turns_is_what_results_hold():
    share, page = result("bench_turns.json")["of_one_turn"], prose("docs/games.md")
    five, twenty = share["5 turns, kept"], share["20 turns, kept"]
    said = f"takes {five:.2f} times as long in five turns as in a single one, and {twenty:.2f}"
    assert said in page
    five, twenty = share["5 turns, read again"], share["20 turns, read again"]
    assert f"at each turn, {five:.2f} and {twenty:.2f} times" in page


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python train.py --model Hugging")]
)
def test_a_large_models_rate_does_not_die_away(command):
    """The default's half-life is of tokens of the tiny model: a batch of long answers has many."""
    settings, config = train.parse(arguments(command, "python train.py"))
    tokens = settings.iterations * settings.batch * settings.max_new_tokens
    assert tokens / settings.actor_half_life < 4


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
    file.name for file in sorted(RESULTS.glob("*.json")) if file.stem.split("-")[0] in KINDS
]
TABLES = tables.all_tables()


@pytest.mark.parametrize("name", MEASURED)
def test_a_section_has_the_command_and_the_date_of_each_measurement_and_names_its_file(name):
    measured = result(name)
    # A file that more than one command has filled says of each outcome which
    for told in [measured] if "command" in measured else measured["measured"]:
        assert any(
            told["command"] in commands_in(part) and told["date"] in part and name in part
            for part in sections().values()
        )


@pytest.mark.parametrize("source", TABLES)
def test_the_tables_of_the_pages_are_what_results_hold(source):
    others = {"worlds-*.json": ["docs/games.md"], "theorems.json": ["docs/theorems.md"]}
    pages = others.get(source.split(",")[0], MEASURED_ON)
    whole = f"\n\n{TABLES[source]}\n\n"  # with no rows but these
    assert any(whole in text(page) + "\n" for page in pages)


def test_python_m_lab_tables_prints_them(capsys):
    tables.main()
    printed = capsys.readouterr().out
    assert all(table in printed for table in TABLES.values())


# --------------------------------------------------------------------------------- the claims
def critic_claim():
    """Explained variance, then AUROC: without hearing, with it, and by what is heard alone, for the
    policy trained a while."""
    measured = [row for row in result("critic.json")["measured"] if row["task"] == "later"]
    figures_said = []
    for measure in ("explained_variance", "auroc_of_first_wrong_step"):
        for variant in ("more and larger steps", "hears", "hears, reads nothing"):
            ends = [row["curve"][-1][measure] for row in measured if row["variant"] == variant]
            figures_said.append(f"{np.mean(ends):.2f}")
    return figures_said


def clip_claim():
    """The least and the most that the clip held back in the default runs, and in four epochs; how
    eight epochs end with a narrow clip and with a wide one."""
    said = []
    for files in ("default-sapo-seed*.json", "epochs4-seed*.json"):
        runs = [json.loads(file.read_text()) for file in RESULTS.glob(files)]
        clipped = sorted(run["mechanism"]["clip_fraction"] for run in runs)
        said += [f"{100 * clipped[0]:.1f}", f"{100 * clipped[-1]:.1f}"]
    middle = middles("reuse-DiceSum.json")
    kinds = ("segment ratio", "segment ratio, clip 0.2")
    return said + [f"{middle[f'{kind}, 8 epochs']:.3f}" for kind in kinds]


def of_the_comparison():
    """{method: the accuracies of its runs} in the comparison of nine methods."""
    accuracies = {}
    for run in result("main-DiceSum.json")["runs"]:
        accuracies.setdefault(run["label"], []).append(run["accuracy"])
    return accuracies


def comparison_claim():
    """The interquartile means of SAPO, PPO, VC-PPO and GRPO, and those on nine dice."""
    on_four, on_nine = middles("main-DiceSum.json"), middles("main-DiceSum-n=9-long.json")
    said = [on_four[method] for method in ("sapo", "ppo", "vc-ppo", "grpo")]
    said += [on_nine[method] for method in ("sapo", "ppo", "grpo")]
    return [f"{middle:.3f}" for middle in said]


def middles(name):
    """{variant: the interquartile mean of its accuracies} of an experiment, in its order."""
    accuracies = {}
    for run in result(name)["runs"]:
        accuracies.setdefault(run["label"], []).append(run["accuracy"])
    return {label: interval(of_seeds)[0] for label, of_seeds in accuracies.items()}


def parts_claim():
    """The two ratios with one clip, SAPO, the best and the worst cut, every token a segment."""
    parts, cuts = middles("controls-DiceSum.json"), middles("cuts-DiceSum.json")
    numbers = [parts[label] for label in ("sapo, token ratio", "sapo, clip 0.2")]
    numbers += [parts["sapo"], max(cuts.values()), min(cuts.values())]
    numbers.append(middles("topk-DiceSum-wide-clip.json")["100%"])
    return [f"{number:.3f}" for number in numbers]


def lift_claim():
    """Lift at q = 0.1 by sampled values, before and after training."""
    lifts = result("lift-DiceSum.json")
    return [f"{lifts[when]['Monte Carlo']['lift']['0.1'][0]:.2f}" for when in ("early", "late")]


def gradient_claim():
    """AUROC of PPO and SAPO at one lambda and of SAPO at a smaller one, which are in the row, too;
    and cosine with the reference gradient."""
    methods = result("truth-DiceSum.json")["methods"]
    names = ("ppo, lambda of sapo", "sapo", "sapo, lambda 0.7")
    numbers = [methods[name]["auroc"] for name in names]
    for name in ("sapo", "ppo, lambda of sapo", "grpo"):
        numbers += [methods[name]["cosine"][0], methods[name]["variance"]]
    return ["0.9", "0.7", "0.9", *(f"{number:.2f}" for number in numbers)]


# {how a row begins: the function that computes its figures}
CLAIMS = {
    "High entropy is where": lift_claim,
    "The segment ratio beats": parts_claim,
    "A critic at segment boundaries": critic_claim,
    "The clipped segment ratio": clip_claim,
    "SAPO ends above": comparison_claim,
    "A segment's credit is finer": gradient_claim,
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_figures_of_each_claim_are_what_results_hold(claim):
    rows = text(*MEASURED_ON).splitlines()
    (row,) = [row for row in rows if row.startswith(f"| {claim}")]
    assert sorted(re.findall(r"\d+\.\d+", row.split(" | ")[2])) == sorted(CLAIMS[claim]())


def test_the_older_task_and_the_ceiling_are_what_the_page_says():
    before = result("sharpening-start-seed0.json")["evaluations_before"]
    cold, greedily = (before[kind]["eval_accuracy"] for kind in ("temperature 1", "greedy"))
    assert f"{cold:.3f} at temperature 1, {greedily:.3f} greedy" in section(
        "What was wrong with the first measurements", "The default run"
    )
    ceilings = [
        row["curve"][0]["auroc_in_wrong_responses"]
        for row in result("critic.json")["measured"]
        if row["variant"] == "ceiling" and row["task"] in ("later", "dice")
    ]
    said = f"64 continuations give {min(ceilings):.2f} to {max(ceilings):.2f} by that count"
    assert said in section("What was wrong with the first measurements", "The default run")


def test_what_makes_a_critic_see_is_what_was_measured():
    measured, page = result("critic.json")["measured"], section("What makes a critic see")
    seeds = {(row["task"], row["seed"]) for row in measured}
    assert seeds == {
        ("later", 3),
        ("later", 4),
        ("dice", 3),
        ("dice", 4),
        ("nine", 3),
        ("arrows", 3),
    }
    assert "`later` and `dice` are means of two seeds, the others are one" in page

    def ends(task, variant, measure="explained_variance"):
        rows = [row for row in measured if (row["task"], row["variant"]) == (task, variant)]
        return np.mean([row["curve"][-1][measure] for row in rows])

    more, tasks = "more and larger steps", ("dice", "later", "nine", "arrows")
    readers = [more, "four passes", "logistic", "starts at the mean", "demonstrations first"]
    said = (
        "it explains {:.2f} of `dice`, {:.2f} of `later`, {:.2f} of `nine` and {:.2f} of `arrows`"
    )
    assert said.format(*(ends(task, more) for task in tasks)) in page
    assert (
        f"first measurements, {max(ends(task, 'as before') for task in tasks):.2f} at most" in page
    )

    gains = {
        variant: [ends(task, variant) - ends(task, more) for task in tasks] for variant in readers
    }
    least, *_, most = sorted(gains.pop("demonstrations first"))
    assert f"brings more on all four, {least:.2f} to {most:.2f}" in page and least > 0
    del gains[more]
    assert f"bring up to {max(map(max, gains.values())):.2f} more" in page
    assert all(min(of_tasks) < 0.01 for of_tasks in gains.values())
    times = [ends(task, "ceiling") / ends(task, more) for task in tasks]
    assert min(times) > 1.5 and max(times) < 4.5

    def of_readers(task, measure="explained_variance"):
        """The least and the most that a critic has that reads alone, and takes enough steps."""
        numbers = [ends(task, variant, measure) for variant in readers]
        return f"{min(numbers):.2f} to {max(numbers):.2f}"

    said = f"explain {of_readers('later')}, of `nine` {of_readers('nine')}; told the surprise"
    heard = [ends(task, "hears") for task in ("later", "nine")]
    assert f"{said}, the same critic explains {heard[0]:.2f} and {heard[1]:.2f}." in page
    for task in tasks:  # of the warm starts it adds nothing that shows
        gain = ends(task, "hears") - max(ends(task, variant) for variant in readers)
        assert gain > 0.05 if task in ("later", "nine") else gain < 0.01
    first, blind = "auroc_of_first_wrong_step", "hears, reads nothing"
    said = (
        "the two numbers that read nothing mark the first wrong step as well ({:.2f} and {:.2f}) "
    )
    said += "as the critic that reads, too ({:.2f} and {:.2f}), and better than those that only "
    marks = [ends(task, name, first) for name in (blind, "hears") for task in ("later", "nine")]
    only = f"read ({of_readers('later', first)} and {of_readers('nine', first)})"
    assert f"{said.format(*marks)}{only}" in page
    alone = [ends(task, blind) for task in ("later", "nine")]
    said = "explained variance: {:.2f} in place of {:.2f}, {:.2f} in place of {:.2f}"
    assert said.format(heard[0], alone[0], heard[1], alone[1]) in page
    numbers = [ends(task, blind, of) for of in (first, "explained_variance") for task in tasks[::3]]
    said = "numbers reach {:.2f} and {:.2f}, and explain {:.2f} and {:.2f}"
    assert said.format(*numbers) in page
    best = [ends(task, "ceiling") for task in tasks]
    assert f"64 continuations explain {min(best):.2f} to {max(best):.2f}" in page
    right = {
        task: [
            row["accuracy"]
            for row in measured
            if (row["task"], row["variant"]) == (task, "ceiling")
        ]
        for task in ("later", "nine")
    }
    assert "right in {:.2f} and {:.2f} of its answers".format(*right["later"]) in page
    assert "for twelve ({:.2f})".format(*right["nine"]) in page
    few = [row["curve"][0]["wrong_responses"] for row in measured if row["variant"] == "ceiling"]
    assert f"stand on {min(few)} to {max(few)} wrong answers per policy and seed" in page


def trial_rows(name):
    """{iteration: metrics} of a trial whose metrics.jsonl results/ keeps."""
    lines = (RESULTS / f"trials-{name}-metrics.jsonl").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


def test_the_trials_that_fell_did_so_as_the_page_says():
    page = section("The trials")
    falls = {
        "seed2-at-3e-4": (4, 9, "fell from {} to {} between the fourth and the ninth rollout"),
        "seed1-lambda-0.8": (13, 17, "fell from {} to {} between the 13th and the 17th rollout"),
        "seed3-at-3e-4": (23, 26, "went from {} to {} between the 23rd and the 26th rollout"),
    }
    for name, (first, last, said) in falls.items():
        accuracies = [f"{trial_rows(name)[i]['accuracy']:.2f}" for i in (first, last)]
        assert said.format(*accuracies) in page
    mean = trial_rows("seed2-at-3e-4")[7]["advantage_mean"]
    assert f"the mean advantage went to {mean:.2f}" in page
    lost = [
        row["accuracy"] for row in trial_rows("seed3-at-3e-4").values() if row["iteration"] > 26
    ]
    assert len(lost) == 39 and max(lost) < 0.6
    assert (
        max(row["accuracy"] for row in list(trial_rows("seed1-lambda-0.6").values())[1:51]) < 0.62
    )


def test_what_a_smaller_lambda_did_is_what_the_trials_hold():
    trials = [trial for trial in result("trials.json")["trials"] if trial["clip_low"] == 0.2]
    at = {(trial["seed"], trial["lam"]): trial for trial in trials}
    quick, stuck = at[0, 0.6], at[1, 0.6]
    share, *_ = quick["mid_run"]["own_credit"]["share_on_first_wrong_step"]
    said = f"seed 0 had a share of {share:.2f} and was right greedily in {quick['greedy']:.3f}"
    assert said in section("The trials")
    assert f"ended at {stuck['accuracy']:.3f}" in section("The trials")


def test_what_stays_wrong_is_what_the_default_runs_hold():
    page = section("The default run")
    large = RUNS[0]["greedy_wrong"]["questions_with_sum_of_20_or_more"]
    for run in RUNS:
        wrong = run["greedy_wrong"]
        assert 512 * (1 - run["evaluations"]["greedy"]["eval_accuracy"]) == wrong["wrong"]
    wrong = [run["greedy_wrong"] for run in RUNS]
    of_large = [of_run["of_them_sum_of_20_or_more"] for of_run in wrong]
    assert f"the {large} held-out questions of 512 whose sum is 20 or more all on seed 0" in page
    assert f", {of_large[1]} on seed 1 and {of_large[2]} on seed 2" in page and of_large[0] == large
    others = [of_run["wrong"] - of_run["of_them_sum_of_20_or_more"] for of_run in wrong]
    said = f"nothing on the first two and {NUMBERS[others[2]]} questions on the third"
    assert said in page and others[:2] == [0, 0]


def test_where_the_blame_lies_at_mid_run_is_what_the_runs_hold():
    page, mids = section("The default run"), [run["mechanism"]["mid_run"] for run in RUNS]
    said = "({}, {} and {} of them), the TD error of the first"
    assert said.format(*(mid["wrong_responses"] for mid in mids)) in page
    aurocs = [mid["auroc_of_first_wrong_step"] for mid in mids]
    assert all(round(10 * auroc) == 9 for auroc in aurocs) and "in nine cases of ten" in page
    own = sorted(mid["own_credit"]["auroc_of_first_wrong_step"] for mid in mids)
    assert f"learns from, in {own[0]:.2f} to {own[-1]:.2f} of them" in page
    shares = sorted(mid["own_credit"]["share_on_first_wrong_step"][0] for mid in mids)
    assert f"first wrong step gets {shares[0]:.3f} to {shares[-1]:.3f}, though" in page
    assert sum(share > 0.25 for share in shares) == 1 and "on one seed of three" in page
    more = [run["mechanism"]["mid_run_of_1024"] for run in RUNS]
    counts = sorted(mid["wrong_responses"] for mid in more)
    said = "have {} to {} wrong answers, these are {:.3f}, {:.3f} and {:.3f}, and the AUROC {:.2f}"
    shares = (mid["own_credit"]["share_on_first_wrong_step"][0] for mid in more)
    aurocs = [mid["auroc_of_first_wrong_step"] for mid in more]
    assert said.format(counts[0], counts[-1], *shares, aurocs[0]) in page
    assert f", {aurocs[1]:.2f} and {aurocs[2]:.2f}. The quarter" in page
    eighth = 1 / sum(0.9**i for i in range(8))
    assert f"0.9^7) = {eighth:.2f}$ of the blame" in page
    small = result("mid-run-lambda-0.7.json")["measured"]
    shares = (mid["own_credit"]["share_on_first_wrong_step"][0] for mid in small)
    aurocs = (mid["auroc_of_first_wrong_step"] for mid in small)
    said = "256 responses) they are {:.3f}, {:.3f} and {:.3f}, the AUROC {:.2f}, {:.2f} and {:.2f}"
    assert said.format(*shares, *aurocs) in page
    assert {(mid["lam"], mid["responses"]) for mid in small} == {(0.7, 256)}
    assert {mid["responses"] for mid in mids} == {256}
    assert {mid["responses"] for mid in more} == {1024}


def test_what_the_earlier_default_did_is_what_results_hold():
    page = section("The trials")
    shares = sorted(
        run["mid_run"]["own_credit"]["share_on_first_wrong_step"][0]
        for run in result("default-of-2026-11-26.json")["measured"]
    )
    assert f"at 0.8 it had {shares[0]:.2f} to {shares[-1]:.2f}" in page
    clipped = result("clip-by-epoch-seed1.json")
    first, second, both = (
        f"{clipped[f'clip_fraction_{when}']:.2%}"
        for when in ("first_epoch", "second_epoch", "both")
    )
    said = f"{first} of the tokens in the first of two epochs and {second} in the second, {both} in"
    assert said in page


def test_what_the_narrower_clip_did_is_what_the_trials_hold():
    page = section("The trials")
    narrow = [
        trial
        for trial in result("trials.json")["trials"]
        if trial["clip_low"] == 0.1 and "start" not in trial
    ]

    def trials(lam, epochs, iterations):
        return [
            trial
            for trial in narrow
            if (trial["lam"], trial["epochs"], trial["iterations"]) == (lam, epochs, iterations)
        ]

    clipped = [trial["clip_fraction"] for trial in trials(0.8, 2, 30)]
    assert f"{min(clipped):.2%} to {max(clipped):.2%} over both, in 30 rollouts" in page
    seen = [trial["mid_run"] for trial in trials(0.7, 2, 30)]
    shares = "{:.2f}, {:.2f} and {:.2f} of the blame on seeds 0, 1 and 2"
    assert shares.format(*(s["own_credit"]["share_on_first_wrong_step"][0] for s in seen)) in page
    aurocs = "with an AUROC of {:.2f}, {:.2f} and {:.2f}"
    assert aurocs.format(*(s["auroc_of_first_wrong_step"] for s in seen)) in page
    (stood,) = [trial for trial in trials(0.6, 2, 30) if trial["seed"] == 2]
    assert f"At 0.6, seed 2 was at {stood['accuracy']:.3f} after 30 rollouts" in page
    of_trials = result("trials.json")["trials"]
    small = [t["mid_run"] for t in of_trials if t["lam"] == 0.6 and "mid_run" in t]
    shares = sorted(seen["own_credit"]["share_on_first_wrong_step"][0] for seen in small)
    assert f"at 0.6 from {shares[0]:.2f} to {shares[-1]:.2f}" in page


def runs_of(name):
    """{variant: its runs} of an experiment; five seeds of each."""
    of_label = {}
    for run in result(name)["runs"]:
        of_label.setdefault(run["label"], []).append(run)
    assert {tuple(run["seed"] for run in runs) for runs in of_label.values()} == {tuple(range(5))}
    return of_label


def chance_of(runs, others):
    """The probability that one of the runs ends above one of the others, with its interval."""
    return probability_of_improvement(*([run["accuracy"] for run in of] for of in (runs, others)))


def with_interval(chance):
    """As the pages write it."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*chance)


def on_the_way(runs, tokens):
    """The interquartile mean over seeds of the training accuracy in the first so many tokens."""
    means = []
    for run in runs:
        steps = zip(run["curve"]["generated_tokens"], run["curve"]["accuracy"], strict=True)
        means.append(np.mean([accuracy for step, accuracy in steps if step <= tokens]))
    return interval(means)[0]


def test_what_the_ratio_and_its_clip_show_is_what_their_runs_hold():
    page, runs = section("SAPO taken apart"), runs_of("controls-DiceSum.json")
    middle = middles("controls-DiceSum.json")
    own, token, clip = (runs[label] for label in ("sapo", "sapo, token ratio", "sapo, clip 0.2"))
    ways = [on_the_way(of_label, 40_000) for of_label in (own, clip, token)]
    said = "{:.2f} of SAPO's answers are right in training; with the token's clip {:.2f}, more on"
    assert f"{said} every seed, and with its ratio as well {{:.2f}}.".format(*ways) in page
    of_seeds = [[on_the_way([run], 40_000) for run in of_label] for of_label in (clip, own)]
    assert all(a > b for a, b in zip(*of_seeds, strict=True)), "more on every seed"
    above, wider, level = chance_of(token, own), chance_of(clip, own), chance_of(token, clip)
    assert f"above SAPO in {with_interval(above)} of the pairs." in page and above[1] > 0.5
    points = 100 * (middle["sapo, clip 0.2"] - middle["sapo"])
    said = f"clip is {points:.0f} points higher than SAPO, but not told apart from it"
    said += f" ({with_interval(wider)}), nor from the token's ({with_interval(level)})."
    assert said in page
    assert all(low <= 0.5 <= high for _, low, high in (wider, level))
    held = [np.mean([np.mean(run["curve"]["clip_fraction"]) for run in of]) for of in (own, clip)]
    said = "leaves {:.1%} of the tokens of these runs without gradient, that of 0.2 {:.1%}."
    assert said.format(*held) in page
    for label in ("sapo, V at end", "sapo, token mean"):
        _, low, high = chance_of(runs[label], own)
        assert low < 0.5 < high, "not told apart"


def test_what_the_cuts_show_is_what_their_runs_hold():
    page, runs = section("SAPO taken apart"), runs_of("cuts-DiceSum.json")
    middle = middles("cuts-DiceSum.json")
    assert min(middle, key=middle.get) == "topk" and max(middle, key=middle.get) == "delimiter"
    assert f"lowest IQM of the five, {middle['topk']:.3f}. A cut at" in page
    chance = chance_of(runs["delimiter"], runs["topk"])
    said = f"ends at {middle['delimiter']:.3f}, above it in {with_interval(chance)} of the pairs"
    assert said in page
    topk, causal, delimiter, fixed, whole = (
        np.mean([np.mean(run["curve"]["segments_per_response"]) for run in runs[label]])
        for label in ("topk", "causal", "delimiter", "fixed", "low-prob")
    )
    said = f"by entropy there are {topk:.1f} of them in an answer, by its threshold {causal:.1f}, "
    said += f"at delimiters {delimiter:.1f}, after every ten tokens {fixed:.1f}. At improbable "
    assert f"{said}tokens there is {whole:.1f}, the whole answer" in page
    chance = chance_of(runs["low-prob"], runs["topk"])
    assert f"from the entropy cut either ({with_interval(chance)})" in page
    others = [label for label in runs if label not in ("topk", "delimiter")]
    ends = sorted(middle[label] for label in others)
    assert f"the others at {ends[0]:.3f} to {ends[-1]:.3f}" in page and len(others) == 3
    for label in others:
        _, low, high = chance_of(runs[label], runs["topk"])
        assert low < 0.5 < high, "not told apart"


def test_what_lift_shows_is_what_results_hold():
    lifts, page = result("lift-DiceSum.json"), section("Does the value jump where entropy is high?")

    def said(when, values):
        return "{:.2f} ({:.2f} to {:.2f})".format(*lifts[when][values]["lift"]["0.1"])

    early, interval_of_early = said("early", "Monte Carlo").split(" ", 1)
    assert f"{early} times as many {interval_of_early} come with a jump" in page
    assert f"{lifts['early']['critic']['lift']['0.1'][0]:.2f} by the critic" in page
    (trained,) = (
        run["accuracy"]
        for run in result("main-DiceSum.json")["runs"]
        if (run["label"], run["seed"]) == ("sapo", 0)
    )
    assert f"{trained:.3f} at temperature 1" in page
    assert f"Lift is {said('late', 'Monte Carlo')}" in page
    assert f"The critic's, {said('late', 'critic')}, is not told from what it was" in page
    tenths = [lifts[when]["critic"]["lift"]["0.1"] for when in ("early", "late")]
    assert tenths[0][1] < tenths[1][2] and lifts["late"]["Monte Carlo"]["lift"]["0.1"][1] > 1
    wide = {
        values: [lifts["late"][values]["lift"][q] for q in ("0.2", "0.3")]
        for values in ("Monte Carlo", "critic")
    }
    numbers = [lift for values in wide.values() for lift, _, _ in values]
    said_of = "do not tell it from 1 ({:.2f} and {:.2f}); the critic does ({:.2f} and {:.2f})"
    assert said_of.format(*numbers) in page
    assert all(low < 1 for _, low, _ in wide["Monte Carlo"])
    assert all(low > 1 for _, low, _ in wide["critic"])
    cut = {
        (when, kind): f"{lifts[when]['steps'][kind]['cut']:.0%}"
        for when in ("early", "late")
        for kind in ("hard", "easy")
    }
    assert f"in {cut['early', 'hard']} of the hard steps and in {cut['early', 'easy']}" in page
    blind = [
        f"{lifts[when]['steps'][kind]['cut_by_chance']:.0%}"
        for when in ("early", "late")
        for kind in ("hard", "easy")
    ]
    late = f"in {cut['late', 'hard']} and {cut['late', 'easy']} after it (as many cuts drawn"
    assert f"{late} blindly, in {{}} and {{}}, and {{}} and {{}})".format(*blind) in page
    highest = {
        when: "{:.2f} nats in hard steps and {:.2f}".format(
            *(lifts[when]["steps"][kind]["entropy"] for kind in ("hard", "easy"))
        )
        for when in ("early", "late")
    }
    late = highest["late"].replace(" nats in hard steps", "")
    assert f"{highest['early']} in easy ones before, {late} after" in page


def test_what_seeing_pays_is_what_its_runs_hold():
    middle, page = middles("seeing-DiceSum.json"), section("Does it pay to see?")
    deaf = [f"sapo, hears nothing{at}" for at in ("", ", lambda 0.99")]
    ends = (middle[deaf[0]], middle["sapo, lambda 0.99"], middle[deaf[1]], middle["sapo"])
    said = "hears nothing ends at {:.3f}; at lambda 0.99 {:.3f} with hearing and {:.3f} without"
    assert f"{said}: the five seeds do not tell these from {{:.3f}}.".format(*ends) in page
    runs = runs_of("seeing-DiceSum.json")
    counts = [[run["iterations"] for run in runs[name]] for name in ("vineppo", "spo-tree")]
    assert counts == [[11] * 5, [37] * 5]  # of 16 answers, of two questions
    said = f"learns from {16 * 11} answers in all, SPO-tree from the branches of some {2 * 37}"
    assert said in page
    assert chance_of(runs["ppo"], runs["grpo"])[0] == 1 and "in its place, in all pairs" in page
    of_grpo = with_interval(chance_of(runs["sapo"], runs["grpo"]))
    assert f"SAPO as tuned is not told from GRPO ({of_grpo}). PPO" in page
    (far,) = {chance_of(runs[at], runs["grpo"]) for at in ("sapo, lambda 0.99", deaf[1])}
    assert f"SAPO at lambda 0.99, hearing or not, in {with_interval(far)}." in page
    labels = ("sapo", "sapo, lambda 0.99", *deaf)
    ways = sorted(on_the_way(runs[label], 40_000) for label in labels)
    assert f"{ways[0]:.2f} to {ways[-1]:.2f} of the answers are right in all four" in page
    of_ppo = chance_of(runs["ppo"], runs["sapo"])
    assert f"PPO ends above SAPO in {with_interval(of_ppo)} of the pairs here" in page
    assert of_ppo[1] > 0.5
    for label in (*deaf, "sapo, lambda 0.99"):
        _, low, high = chance_of(runs["sapo"], runs[label])
        assert low < 0.5 < high


COUNTED = ("none", "one", "two", "three", "four", "five")


def test_what_reuse_shows_is_what_its_runs_hold():
    page, runs = section("Which ratio bears reuse"), runs_of("reuse-DiceSum.json")
    assert len(runs) == 40
    for of_label in runs.values():
        flags = sweep.by_flag(shlex.split(of_label[0]["flags"]))
        has_critic = flags.get("--method") != "grpo"
        assert flags["--actor_lr"] == "2e-4" and flags.get("--lam") == (
            "0.95" if has_critic else None
        )

    def of(kind, epochs):
        return runs[f"{kind}, {epochs} epochs"]

    def end(kind, epochs):
        return f"{interval([run['accuracy'] for run in of(kind, epochs)])[0]:.3f}"

    def lowest(kind, epochs):
        return min(run["accuracy"] for run in of(kind, epochs))

    def lost(kind, epochs):
        return COUNTED[sum(map(sweep.collapsed, of(kind, epochs)))]

    def way(kind, epochs):
        return f"{on_the_way(of(kind, epochs), 40_000):.2f}"

    def above(one, other):
        return with_interval(chance_of(of(*one), of(*other)))

    narrow, wide = "segment ratio", "segment ratio, clip 0.2"
    narrow_token, wide_token = "token ratio, clip 0.04", "token ratio"
    response, bound, free = "response ratio", "segment ratio and KL bound", "no clip"
    said = f"SAPO ends at {end(narrow, 8)}, and {lost(narrow, 8)} of five runs collapses"
    assert f"{said}; with 0.2 {lost(wide, 8)} do" in page
    said = f"{lost(narrow_token, 8)} of five at 0.04, {lost(wide_token, 8)} at 0.2"
    assert said in page
    claim = section("Claim by claim")
    assert {lost(narrow, epochs) for epochs in (1, 2, 4, 8)} == {"none"}
    assert lost(wide, 4) == "one" and "at four epochs one run of five collapses and three" in claim
    assert f"at eight {lost(wide, 8)} collapse" in claim
    assert lost(narrow_token, 8) == "none" and "with 0.04 collapses on none of five" in claim
    furthest = [max(r["curve"]["approx_kl"]) for r in of(free, 4) if sweep.collapsed(r)]
    (bar,) = re.findall(r"each comes to an approximate KL divergence of (\d\.\d) or more", page)
    said = f"Without a clip {lost(free, 2)} collapses at two epochs, {lost(free, 4)} at four, where"
    assert said in page and min(furthest) >= float(bar)
    assert lost(free, 8) == "five" and "or more, and all at eight" in page
    _, *hurt, unharmed = sorted(run["accuracy"] for run in of(wide, 4))
    assert f"three more end at {hurt[0]:.3f} to {hurt[-1]:.3f};" in page and unharmed > 0.9
    at_four = chance_of(of(narrow, 4), of(wide, 4))
    assert f"(0.04 above in {with_interval(at_four)} of the pairs)" in page
    assert at_four[1] < 0.5 < at_four[2]
    said = f"segment's ratio ends at {lowest(narrow, 8):.3f}, with the token's at "
    assert f"{said}{lowest(narrow_token, 8):.3f}" in page
    said = f"{way(narrow, 2)} of the answers are right, with 0.2 {way(wide, 2)}."
    assert said in page
    at_two, at_four = (
        [way(kind, epochs) for kind in (narrow_token, narrow, response)] for epochs in (2, 4)
    )
    assert f"{at_two[0]} are right over those tokens at two epochs with the token's ratio" in page
    assert f"{at_two[1]} with the segment's and {at_two[2]} with the whole response's" in page
    assert "at four {}, {} and {}, and on every seed in this order".format(*at_four) in page
    for epochs in (1, 2, 4):
        of_kinds = (of(kind, epochs) for kind in (narrow_token, narrow, response))
        for of_seed in zip(*of_kinds, strict=True):
            early = [on_the_way([run], 40_000) for run in of_seed]
            assert early == sorted(early)
    shares = [100 * of_reuse(of(kind, 2))[1] for kind in (narrow_token, narrow, response)]
    assert "at two epochs {:.1f}%, {:.1f}% and {:.1f}% are".format(*shares) in page
    assert shares == sorted(shares)
    said = f"as soon at two epochs ({way(wide, 2)} and {way(wide_token, 2)}), and the token's is"
    assert f"{said} ahead at eight ({way(wide, 8)} and {way(wide_token, 8)})" in page
    for one, other in ((narrow, narrow_token), (wide, wide_token)):
        for epochs in (2, 4, 8):
            _, low, high = chance_of(of(one, epochs), of(other, epochs))
            assert low < 0.5 < high
    at_one = chance_of(of(narrow, 1), of(narrow_token, 1))
    assert f"at one epoch and 0.04 the segment's ends above in {with_interval(at_one)}" in page
    assert at_one[1] > 0.5
    assert (
        chance_of(of(bound, 4), of(narrow, 4))[2] < 0.5 < chance_of(of(bound, 8), of(narrow, 8))[1]
    )
    assert chance_of(of(response, 8), of(narrow, 8))[1] > 0.5
    said = f"at eight epochs {way(response, 8)} of the answers are right over those tokens, and it "
    assert f"{said}ends at {end(response, 8)}, nowhere below {lowest(response, 8):.3f}" in page
    said = f"above the segment's in {above((response, 8), (narrow, 8))} of the pairs, not told from"
    said = (
        f"{said} the token's with that clip ({above((response, 8), (narrow_token, 8))}), nor from"
    )
    assert f"{said} the segment's with the KL bound ({above((response, 8), (bound, 8))})" in page
    for kind in (narrow_token, bound):
        _, low, high = chance_of(of(response, 8), of(kind, 8))
        assert low < 0.5 < high
    _, clipped, _ = of_reuse(of(response, 8))
    assert f"clips {clipped:.1%} of the tokens there" in page
    said = f"{way(narrow, 4)} and {way(narrow, 2)} over those tokens, and {end(narrow, 4)} and "
    said += f"{end(narrow, 2)} in the end (four above two in {above((narrow, 4), (narrow, 2))}"
    assert said in page
    _, low, high = chance_of(of(narrow, 4), of(narrow, 2))
    assert low < 0.5 < high
    said = f"eight end below four in {above((narrow, 4), (narrow, 8))}, and are no sooner"
    assert f"{said} ({way(narrow, 8)})" in page
    said = f"At eight it ends above it in {above((bound, 8), (narrow, 8))}, and the lowest run at "
    assert f"{said}{lowest(bound, 8):.3f} in place of {lowest(narrow, 8):.3f}" in page
    said = f"the bounded run ends above the free one in {above((bound, 4), (narrow, 4))} of the"
    assert said in page
    said = f"PPO still ends at {end('ppo', 4)} after four epochs, and at eight {lost('ppo', 8)} of"
    assert said in page
    product = "product of ratios"
    assert f"With a product of ratios {lost(product, 8)} do at eight, and the middle falls" in page
    assert f"falls to {end(product, 8)}" in page
    of_grpo = [end("grpo", epochs) for epochs in (2, 4, 8)]
    assert of_grpo == sorted(of_grpo, reverse=True) and "{}, {}, {}.".format(*of_grpo) in page
    assert {lost("grpo", epochs) for epochs in (1, 2, 4, 8)} == {"none"}


def test_what_the_shares_of_cuts_show_is_what_their_runs_hold():
    page, runs = section("SAPO taken apart"), runs_of("topk-DiceSum.json")
    wide = runs_of("topk-DiceSum-wide-clip.json")
    for share, of_share in runs.items():
        flags = [shlex.split(of_share[0]["flags"]), shlex.split(wide[share][0]["flags"])]
        was, now = sweep.differing(*(words[: words.index("--name")] for words in flags))
        assert (was, now) == (
            "no --clip_low, no --clip_high",
            "--clip_low 0.2, --clip_high 0.2",
        )
    of_half, of_all, of_third = (
        chance_of(runs["5%"], runs[share]) for share in ("50%", "100%", "30%")
    )
    assert f"5% ends above 50% in {with_interval(of_half)} of the pairs" in page
    assert f"where every token is a segment, in {with_interval(of_all)}; from" in page
    assert f"it is not told apart ({with_interval(of_third)})" in page
    assert of_half[1] > 0.5 and of_all[1] > 0.5 and of_third[1] <= 0.5
    narrow_ways, wide_ways = (
        [on_the_way(of[share], 40_000) for share in ("5%", "30%", "100%")] for of in (runs, wide)
    )
    said = "{:.2f} of the answers are right in training at 5%, {:.2f} at 30% and {:.2f} at 100%."
    assert said.format(*narrow_ways) in page
    said = "on the way they have {:.2f}, {:.2f} and {:.2f}. So it is the clip"
    assert said.format(*wide_ways) in page
    middle = middles("topk-DiceSum-wide-clip.json")
    assert f"no share is told from 5%, 100% ends at {middle['100%']:.3f}," in page
    for share in ("10%", "20%", "30%", "50%", "100%"):
        _, low, high = chance_of(wide["5%"], wide[share])
        assert low <= 0.5 <= high
    level = chance_of(wide["100%"], wide["30%"])
    assert f"with one clip for both ({with_interval(level)})" in page
    assert level[1] <= 0.5 <= level[2]


def test_what_the_comparison_shows_is_what_its_runs_hold():
    page, accuracies = section("Nine methods on one task"), of_the_comparison()
    four = ("sapo", "ppo", "vc-ppo", "grpo")
    ends = [interval(accuracies[method])[0] for method in four]
    said = "at temperature 1: {:.3f}, PPO {:.3f}, VC-PPO {:.3f}, GRPO {:.3f}."
    assert said.format(*ends) in page
    chances = {
        label: probability_of_improvement(accuracies["sapo"], of_seeds)
        for label, of_seeds in accuracies.items()
        if label != "sapo"
    }
    said = ["{:.2f} ({:.2f} to {:.2f})".format(*chances[method]) for method in four[1:]]
    assert f"above one of PPO with a probability of {said[0]}, above one of VC" in page
    assert "of VC-PPO with {}, above one of GRPO with {}. All".format(*said[1:]) in page
    not_told_apart = {label for label, (_, low, high) in chances.items() if low <= 0.5 <= high}
    assert not_told_apart == set(four[1:])
    critic = probability_of_improvement(accuracies["ppo"], accuracies["grpo"])
    share, bounds = with_interval(critic).split(" ", 1)
    said = f"in PPO alone: it ends above GRPO in {share} of the pairs {bounds}."
    assert said in page and critic[1] > 0.5
    said = ["{:.2f} ({:.2f} to {:.2f})".format(*chances[method]) for method in ("gspo", "srpo")]
    others = "GSPO in {} of the pairs, SRPO in {}, those that sample their values in all"
    assert others.format(*said) in page
    earlier = result("nine-methods-earlier.json")
    of_sapo, of_grpo = (f"{earlier['iqm_of_ten_seeds'][method]:.3f}" for method in ("sapo", "grpo"))
    chance = "{:.2f} of the pairs ({:.2f} to {:.2f})".format(
        *earlier["sapo_above_grpo"]["ten seeds"]
    )
    assert f"SAPO was above GRPO:** {of_sapo} and {of_grpo} on ten seeds, in {chance}" in page
    assert {chances[method][0] for method in ("spo-chain", "vineppo", "spo-tree")} == {1.0}


def test_the_comparison_when_greedy_and_its_seconds_are_what_its_runs_hold():
    page, runs = section("Nine methods on one task"), result("main-DiceSum.json")["runs"]

    def of_runs(method, kind):
        return [run[kind] for run in runs if run["label"] == method]

    names = ("sapo", "ppo", "vc-ppo", "grpo", "spo-chain", "srpo")
    middle = [interval(of_runs(method, "greedy"))[0] for method in names]
    said = (
        "SAPO {:.3f}, PPO {:.3f}, VC-PPO {:.3f}, GRPO {:.3f}; SPO-chain ({:.3f}) and SRPO ({:.3f})"
    )
    assert said.format(*middle) in page
    for method in ("ppo", "vc-ppo", "grpo"):
        _, low, high = probability_of_improvement(
            of_runs("sapo", "greedy"), of_runs(method, "greedy")
        )
        assert low <= 0.5 <= high, "level"
    seconds = [np.mean(of_runs(method, "seconds")) for method in ("grpo", "sapo")]
    assert "GRPO takes {:.0f} seconds where SAPO takes {:.0f}:".format(*seconds) in page
    tuning = result("tune-DiceSum.json")["runs"]
    assert sweep.chosen_trial(tuning, "sapo") == sweep.chosen_trial(tuning, "ppo")


def test_what_nine_dice_show_of_three_methods_is_what_their_runs_hold():
    page = section("Three methods on nine dice, before")
    nine = result("main-DiceSum-n=9-earlier.json")["runs"]

    def on_the_way(runs, method, tokens):
        """Each seed's mean training accuracy over its first so many tokens."""
        means = []
        for run in (run for run in runs if run["label"] == method):
            spent, accuracy = map(
                np.array, (run["curve"]["generated_tokens"], run["curve"]["accuracy"])
            )
            means.append(accuracy[spent <= tokens].mean())
        return means

    early = {method: on_the_way(nine, method, 110_000) for method in ("sapo", "ppo")}
    assert all(s > p for s, p in zip(early["sapo"], early["ppo"], strict=True))
    middle = [interval(early[method])[0] for method in ("sapo", "ppo")]
    assert "on every seed (IQM {:.2f} and {:.2f})".format(*middle) in page
    bounds = []
    for method in ("sapo", "ppo"):
        half = []
        for run in (run for run in nine if run["label"] == method):
            pairs = zip(run["curve"]["generated_tokens"], run["curve"]["accuracy"], strict=True)
            half.append(next(tokens for tokens, accuracy in pairs if accuracy >= 0.5))
        bounds += [f"{round(min(half), -3):,}", f"{round(max(half), -3):,}"]
    said = "after {} to {} tokens, PPO after {} to {}".format(*bounds)
    assert f"right half the time {said}" in page
    far = result("horizon-DiceSum-n=9-earlier.json")["runs"]
    of_ppo, of_sapo = (
        interval(on_the_way(far, f"{method}, lambda 0.99", 110_000))[0]
        for method in ("ppo", "sapo")
    )
    assert f"its IQM is {of_ppo:.2f}, SAPO's {of_sapo:.2f}" in page and of_ppo > of_sapo
    for runs, suffix in ((nine, ""), (far, ", lambda 0.99")):  # at the end they are level
        of_sapo, of_ppo = (
            [run["accuracy"] for run in runs if run["label"] == f"{method}{suffix}"]
            for method in ("sapo", "ppo")
        )
        _, low, high = probability_of_improvement(of_sapo, of_ppo)
        assert len(of_sapo) == len(of_ppo) == 5 and low < 0.5 < high
    four = result("main-DiceSum.json")["runs"]
    middle = [interval(on_the_way(four, method, 50_000))[0] for method in ("sapo", "ppo")]
    said = (
        "over the first 50,000 tokens {:.2f} and {:.2f}, where both have one rate and lambda, too"
    )
    assert said.format(*middle) in page and "PPO is ahead on every seed." in page
    of_seeds = (on_the_way(four, method, 50_000) for method in ("sapo", "ppo"))
    assert all(of_sapo < of_ppo for of_sapo, of_ppo in zip(*of_seeds, strict=True))
    ends = sorted(run["accuracy"] for run in nine if run["label"] == "grpo")
    assert f"ends at {ends[1]:.3f} and {ends[0]:.3f} on the other two" in page and ends[2] > 0.74
    tuning = result("tune-DiceSum-n=9-earlier.json")["runs"]
    assert sweep.chosen_trial(tuning, "sapo") == sweep.chosen_trial(tuning, "ppo")
    for method, said in (
        ("sapo", "for SAPO ({:.3f} to {:.3f})"),
        ("ppo", "PPO ({:.3f} to {:.3f})"),
    ):
        of_rate = sorted(
            np.mean([run["accuracy"] for run in of_trial])
            for trial, of_trial in sweep.trials_of(tuning, method).items()
            if trial.endswith("0.7")
        )
        assert said.format(*of_rate) in page


def test_what_nine_dice_show_from_todays_start_is_what_their_runs_hold():
    page, runs = section("Three methods on nine dice"), runs_of("main-DiceSum-n=9-long.json")
    tuning = result("tune-DiceSum-n=9-long.json")["runs"]
    chosen = [" ".join(sweep.chosen_trial(tuning, name)) for name in ("sapo", "ppo", "grpo")]
    assert chosen == ["--actor_lr 2e-4 --lam 0.9", "--actor_lr 2e-4 --lam 0.95", "--actor_lr 4e-4"]
    ends = {label: sorted(run["accuracy"] for run in of) for label, of in runs.items()}
    start = np.mean([run["warm_start_accuracy"] for run in runs["sapo"]])
    assert f"at first {start:.3f} of the answers are right" in page
    low, own, grpo = (ends[label] for label in ("ppo, lambda of sapo", "sapo", "grpo"))
    said = (
        f"At 0.9 PPO ends at {low[0]:.3f} to {low[-1]:.3f}, SAPO at {own[0]:.3f} to {own[-1]:.3f}"
    )
    assert f"{said}, above in all pairs" in page and low[-1] < own[0]
    far = max(run["accuracy"] for run in tuning if re.match(r"ppo .* 0.9$", run["label"]))
    assert f"one of PPO's four runs at 0.9 came to {far:.3f}" in page
    assert "$0.9^{70} = 0.0006$" in page and round(0.9**70, 4) == 0.0006
    assert "$0.9^{23} = 0.09$" in page and round(0.9**23, 2) == 0.09
    pieces = np.mean([run["curve"]["segments_per_response"][0] for run in runs["sapo"]])
    tokens = np.mean([run["curve"]["response_tokens"][0] for run in runs["sapo"]])
    assert round(pieces) == 23 and round(tokens, -1) == 70
    ways = [on_the_way(runs[label], 110_000) for label in ("sapo", "ppo")]
    said = "Over the first 110,000 tokens {:.2f} of SAPO's answers are right in training, of PPO's"
    assert f"{said} at 0.95 {{:.2f}}, fewer on every seed".format(*ways) in page
    of_seeds = [[on_the_way([run], 110_000) for run in runs[name]] for name in ("sapo", "ppo")]
    assert all(of_sapo > of_ppo for of_sapo, of_ppo in zip(*of_seeds, strict=True))
    of_ppo = with_interval(chance_of(runs["sapo"], runs["ppo"]))
    greedy = probability_of_improvement(
        *([run["greedy"] for run in runs[label]] for label in ("sapo", "ppo"))
    )
    assert f"(SAPO above in {of_ppo} of the pairs, greedy in {with_interval(greedy)})" in page
    of_grpo = with_interval(chance_of(runs["sapo"], runs["grpo"]))
    said = f"at {grpo[0]:.3f} to {grpo[-1]:.3f}, below SAPO in {of_grpo} of the pairs"
    assert said in page
    claim = section("Claim by claim")
    assert f"above GRPO in {of_grpo} of the pairs, and not told from PPO ({of_ppo}) (" in claim
    assert chance_of(runs["sapo"], runs["grpo"])[1] > 0.5 > chance_of(runs["sapo"], runs["ppo"])[1]


def test_what_ten_arrows_show_of_three_methods_is_what_their_runs_hold():
    page = section("Three methods on ten arrows")
    runs = result("main-ArrowPath-length=10-grid=4-long.json")["runs"]
    tuning = result("tune-ArrowPath-length=10-grid=4-long.json")["runs"]
    assert sweep.chosen_trial(tuning, "sapo") == ["--actor_lr", "2e-4", "--lam", "0.7"]
    first = np.mean(
        [r["accuracy"] for r in tuning if r["label"] == "sapo --actor_lr 2e-4 --lam 0.7"]
    )
    assert f"(it came first there, {first:.3f} at temperature 1)" in page
    assert len(tuning) == 24 and first == max(
        np.mean([r["accuracy"] for r in tuning if r["label"] == run["label"]]) for run in tuning
    )
    greedy = {(run["label"], run["seed"]): run["greedy"] for run in runs}
    low = greedy.pop(("sapo", 3))
    others = [end for (label, _), end in greedy.items() if label == "sapo"]
    assert f"ends at {low:.3f} greedy on seed 3" in page
    assert f"and at {min(others):.3f} to {max(others):.3f} on the others" in page
    fell = [greedy.pop(of) for of in (("ppo", 5), ("ppo", 6), ("ppo, lambda of sapo", 7))]
    said = "ends at {:.3f} and {:.3f} on seeds 5 and 6; at SAPO's lambda at {:.3f} on seed 7"
    assert said.format(*fell) in page
    assert f"where GRPO ends at {greedy.pop(('grpo', 7)):.3f}" in page
    assert f"The rest end at {min(greedy.values()):.3f} to {max(greedy.values()):.3f}" in page
    assert len(greedy) == 15 and min(greedy.values()) > max(low, *fell)
    seconds = [
        np.mean([run["seconds"] for run in runs if run["label"] == method])
        for method in ("grpo", "sapo")
    ]
    assert "({:.0f} seconds to SAPO's {:.0f})".format(*seconds) in page
    assert f"So {NUMBERS[len({run['seed'] for run in runs})]} seeds order no methods here" in page


def test_what_gspo_clips_is_what_its_runs_hold():
    runs = result("main-DiceSum.json")["runs"]
    clipped = [np.mean(run["curve"]["clip_fraction"]) for run in runs if run["label"] == "gspo"]
    assert f"clips {min(clipped):.0%} to {max(clipped):.0%} of" in section(
        "Nine methods on one task"
    )


def test_what_wordy_answers_show_is_what_their_runs_hold():
    page = section("Three methods on wordy answers")
    runs = result("main-DiceSum-verbosity=8-long.json")["runs"]
    tuning = result("tune-DiceSum-verbosity=8-long.json")["runs"]
    assert len(tuning) == 24 and {run["seed"] for run in runs} == set(range(5))

    def span(key, method):
        ends = [run[key] for run in runs if run["label"] == method]
        return f"{min(ends):.3f} to {max(ends):.3f}"

    def tuned(lam):
        ends = [
            run["accuracy"]
            for run in tuning
            if run["label"].startswith("sapo") and run["label"].endswith(f"--lam {lam}")
        ]
        return f"{min(ends):.3f} to {max(ends):.3f}"

    said = "SAPO ends at {}, PPO at {}, GRPO at {}, and where one has"
    assert said.format(*(span("accuracy", method) for method in ("sapo", "ppo", "grpo"))) in page
    ends = (span("greedy", method) for method in ("grpo", "sapo", "ppo"))
    assert "({}; SAPO {}, PPO {})".format(*ends) in page
    greedy_firsts = []
    for seed in range(5):
        of_seed = {run["label"]: run for run in runs if run["seed"] == seed}
        assert of_seed["sapo"]["accuracy"] > of_seed["ppo"]["accuracy"]
        greedy_firsts.append(max(of_seed, key=lambda label: of_seed[label]["greedy"]))
    assert greedy_firsts.count("grpo") == 4 and "GRPO is ahead on four of the five" in page
    for label in ("sapo", "ppo", "grpo"):  # "where one has a poor seed all have (seed 2)"
        ends = [run["accuracy"] for run in runs if run["label"] == label]
        assert min(ends) == ends[2]
    assert f"SAPO's runs end at {tuned(0.7)} with it, and at {tuned(0.95)} with 0.95" in page


def test_what_is_not_equal_in_the_comparison_is_what_the_page_says():
    page, runs = section("Nine methods on one task"), result("tune-DiceSum.json")["runs"]
    for method in ("sapo", "ppo", "vc-ppo"):
        rates = {trial.split()[1] for trial in sweep.trials_of(runs, method)}
        rate, lam = sweep.chosen_trial(runs, method)[1::2]
        assert rate == "2e-4" == max(rates, key=float) and lam == "0.95", (
            "larger ones may be better"
        )
    for method in ("grpo", "gspo", "srpo", "spo-chain", "vineppo", "spo-tree"):
        rates = [trial.split()[1] for trial in sweep.trials_of(runs, method)]
        assert sweep.chosen_trial(runs, method)[1] in rates[1:-1], "not at the grid's edge"
    assert sweep.BATCHES["vineppo"][1] == "16" and sweep.BATCHES["spo-chain"][1] == "32"
    assert baselines.SETTINGS["vc-ppo"]["value_pretraining"] == 5
    clipped = sorted(
        np.mean(run["curve"]["clip_fraction"])
        for run in result("main-DiceSum.json")["runs"]
        if run["label"] == "gspo"
    )
    assert f"here clips {clipped[0]:.0%} to {clipped[-1]:.0%} of its tokens" in page


def test_the_questions_of_four_dice_are_as_many_as_the_page_says():
    example, faces = DiceSum().example_at(0), list(itertools.product("123456", repeat=4))
    assert example.key == repr(example.content) == repr((example.content[0],))
    held_out = sum(split_of(repr((four,))) == "eval" for four in faces)
    assert f"show {len(faces):,} outcomes, {held_out} of them held out" in section("Results")


def test_what_hearing_brings_is_what_results_hold():
    page, trials = section("Does it pay to see?", "The trials"), result("trials.json")["trials"]
    for hears, said in (
        ("nothing", "{:.2f} to {:.2f} in the seven trials"),
        ("logp", "{:.2f} to {:.2f} with it"),
    ):
        explained = sorted(
            trial["explained_variance_second_half"]
            for trial in trials
            if trial["critic_hears"] == hears
        )
        assert said.format(explained[0], explained[-1]) in page
    means = [
        np.mean(
            [
                np.mean(run["curve"]["explained_variance"][10:])
                for run in result("seeing-DiceSum.json")["runs"]
                if run["label"] == label
            ]
        )
        for label in ("sapo, hears nothing", "sapo")
    ]
    assert "it is {:.2f} without and {:.2f} with".format(*means) in page
    ends = [
        result(f"nine-dice-{name}-seed1.json")["evaluations"]["temperature 1"]["eval_accuracy"]
        for name in ("lambda-0.95", "deaf")
    ]
    assert "({:.3f} with, {:.3f} without)".format(*ends) in page


def tuned(kind, method, flags):
    """The mean over seeds of a trial of the tuning."""
    runs = result("tune-DiceSum.json")["runs"]
    return np.mean([run[kind] for run in runs if run["label"] == f"{method} --actor_lr {flags}"])


def test_what_the_tuning_shows_is_what_its_trials_hold():
    page, runs = section("Nine methods on one task"), result("tune-DiceSum.json")["runs"]
    assert {run["seed"] for run in runs} == {10, 11} and len(runs) == 72
    means = [
        f"{tuned('accuracy', method, f'2e-4 --lam {lam}'):.3f}"
        for method in ("sapo", "ppo")
        for lam in ("0.95", "0.9")
    ]
    assert "At 2e-4 SAPO ends at {} and {}, PPO at {} and {}".format(*means) in page
    best = {
        method: max(
            np.mean([run["accuracy"] for run in trial])
            for trial in sweep.trials_of(runs, method).values()
        )
        for method in sweep.METHODS
    }
    earlier = result("nine-methods-earlier.json")
    before = earlier["best_mean_of_two_seeds"]
    gains = {method: best[method] - before[method] for method in sweep.METHODS}
    assert min(gains.values()) > 0 and "best trial is higher than before" in page
    with_critic = sorted(gains.pop(method) for method in ("sapo", "ppo", "vc-ppo"))
    without = sorted(gains.values())
    assert f"the six without a critic gain {without[0]:.2f} to {without[-1]:.2f}, and" in page
    assert f"that have one, which gain {with_critic[0]:.2f} to {with_critic[-1]:.2f}." in page
    of_ppo, of_sapo = (earlier["at_lambda_0.7"][method] for method in ("ppo", "sapo"))
    said = "at 0.7, PPO ended at {:.2f} to {:.2f} and SAPO at {:.2f} to {:.2f} ("
    assert said.format(*of_ppo, *of_sapo) in page
    for kind, rate, said in (
        ("greedy", "5e-5", "{:.2f} to {:.2f} when greedy, and"),
        ("accuracy", "5e-5", "{:.2f} to {:.2f} at temperature 1"),
        ("greedy", "4e-4", "at 4e-4 they are right in {:.2f} to {:.2f} when greedy"),
    ):
        ends = sorted(tuned(kind, method, rate) for method in gains)
        assert len(ends) == 6 and said.format(ends[0], ends[-1]) in page, kind


def test_every_claim_with_a_figure_is_tested():
    table = text(*MEASURED_ON).split("| the paper | here |")[1].split("\n\n")[0]
    rows = [row for row in table.splitlines() if re.search(r"\d\.\d", row.split(" | ")[-1])]
    assert len(rows) == len(CLAIMS)


def test_what_the_players_of_treasure_show_is_what_their_runs_hold():
    runs = result("games-Treasure-picture=false-sight=2-walls=0-text.json")["runs"]
    page, of = (
        section("Four players of Treasure"),
        {(run["label"], run["seed"]): run for run in runs},
    )
    assert len(runs) == 40

    def span(*seeds):
        ends = [run["accuracy"] for run in runs if run["seed"] in seeds]
        return f"{min(ends):.2f} to {max(ends):.2f}"

    said = "On seed 0 the eight ways end at {} at temperature 1, on seed 1 at {}, on seeds 2 to 4 "
    said += "at {}:"
    assert said.format(span(0), span(1), span(2, 3, 4)) in page
    entropy, turn = (
        [of[f"{player}, rate 4e-4", seed]["accuracy"] for seed in range(5)]
        for player in ("sapo", "sapo, a segment is a turn")
    )
    beats, low, high = probability_of_improvement(entropy, turn)
    assert f"beats the turn's in {beats:.2f} of the pairs" in page and low < 0.5 < high
    firsts = []
    for seed, rate in itertools.product(range(5), ("4e-4", "2e-4")):
        greedy = {player: of[f"{player}, rate {rate}", seed]["greedy"] for player in sweep.PLAYERS}
        firsts.append(max(greedy, key=greedy.get))
    counts = [firsts.count(player) for player in ("grpo", "sapo", "sapo, a segment is a turn")]
    said = "GRPO comes first in {}, the entropy cut in {}, the turn in {}"
    assert sum(counts) == 10 and said.format(*counts) in page


def probability_said(one, other):
    """The probability that a run of one ends above a run of the other, as the pages print it."""
    return "{:.2f} of the pairs ({:.2f} to {:.2f})".format(*probability_of_improvement(one, other))


def test_the_default_on_ten_seeds_is_what_the_page_says():
    page, runs = (
        section("The default run", "The default on seeds that chose nothing"),
        result("seeds-DiceSum-default.json")["runs"],
    )
    ends, small = (
        {run["seed"]: (run["accuracy"], run["greedy"]) for run in runs if run["label"] == label}
        for label in ("sapo", "sapo, lambda 0.7")
    )
    assert sorted(ends) == list(range(10)) and sorted(small) == list(range(5, 10))
    cold, greedy = (sorted(ends[seed][kind] for seed in ends) for kind in (0, 1))
    said = "at {:.3f} to {:.3f} at temperature 1, and greedy at {:.3f} to {:.3f}"
    assert said.format(cold[0], cold[-1], greedy[0], greedy[-1]) in page
    above = f"{NUMBERS[sum(end > 0.95 for end in greedy)]} of ten above 0.95"
    assert above in page and f"{greedy[0]:.1%} to {greedy[-1]:.1%} on ten" in prose("README.md")
    assert f"with one thread at {ends[0][1]:.3f} greedy" in prose("README.md")
    said = "With one thread seed 0 ends at {:.3f}, greedy {:.3f}, from the same start"
    assert said.format(*ends[0]) in page
    large = sum(end > 491 / 512 for end in greedy)
    assert f"on {NUMBERS[large]} seeds above 0.959" in page
    cold, warm = (sorted(small[seed][kind] for seed in small) for kind in (0, 1))
    said = f"ends at {cold[0]:.3f} to {cold[-1]:.3f}, greedy at {warm[0]:.3f} to {warm[-1]:.3f}"
    assert f"on seeds 5 to 9 it {said}" in page
    early = {"sapo": [], "sapo, lambda 0.7": []}
    for run in runs:
        if run["seed"] >= 5 and run["label"] in early:
            assert round(run["curve"]["generated_tokens"][0], -3) in (15000, 16000)
            early[run["label"]].append(run["curve"]["accuracy"][1])  # from there to 31,000 tokens
    assert all(a > b for a, b in zip(*early.values(), strict=True)), "more on every seed"
    (low, *_, high), (small_low, *_, small_high) = map(sorted, early.values())
    said = f"{small_low:.2f} to {small_high:.2f} of its answers are right in training, of the"
    assert f"{said} default's {low:.2f} to {high:.2f}, more on every seed" in page
    unseen = sorted(ends[seed][1] for seed in range(5, 10))
    assert f"on 5 to 9 alone at {unseen[0]:.3f} to {unseen[-1]:.3f}" in page


def test_what_a_wide_clip_does_to_the_default_is_what_its_runs_hold():
    page, runs = (
        section("The default on seeds that chose nothing"),
        result("seeds-DiceSum-default.json")["runs"],
    )
    wide, own = (
        [run for run in runs if run["label"] == label and run["seed"] >= 5]
        for label in ("sapo, clip 0.2", "sapo")
    )
    assert [run["seed"] for run in wide] == [run["seed"] for run in own] == list(range(5, 10))
    held = [np.mean([np.mean(run["curve"]["clip_fraction"]) for run in of]) for of in (wide, own)]
    said = "leaves {:.2%} of the tokens of these runs without gradient in place of {:.2%}, seeds"
    assert said.format(*held) in page
    cold, warm = (sorted(run[kind] for run in wide) for kind in ("accuracy", "greedy"))
    said = f"end at {cold[0]:.3f} to {cold[-1]:.3f}, greedy at {warm[0]:.3f} to {warm[-1]:.3f};"
    assert f"{said} the default ends above it in {with_interval(chance_of(own, wide))}" in page
    ways = [[on_the_way([run], 40_000) for run in of] for of in (wide, own)]
    assert all(a > b for a, b in zip(*ways, strict=True)), "more on every seed"
    said = "{:.2f} of its answers are right in training, of the default's {:.2f}, more on every"
    assert said.format(*(on_the_way(of, 40_000) for of in (wide, own))) in page


def test_the_default_of_before_is_what_the_page_says():
    page, runs = section("The default of before"), result("parts-DiceSum-earlier.json")["runs"]

    def ends(label, key="accuracy", seeds=range(10)):
        return sorted(run[key] for run in runs if run["label"] == label and run["seed"] in seeds)

    all_seeds = {label: (ends(label), ends(label, "greedy")) for label in middles_of(runs)}
    (own, own_greedy), (large, large_greedy), (_, told_greedy) = (
        all_seeds[label] for label in ("sapo", "sapo, lambda 0.95", "sapo, critic lambda 1")
    )
    assert len(own) == len(large) == len(told_greedy) == 10
    stuck = [end for end in large_greedy if end < 0.95]
    assert len(stuck) == 2 and sum(end > 0.95 for end in own_greedy) == 4
    said = f"above 0.95, at {large_greedy[2]:.3f} to {large_greedy[-1]:.3f}, at 0.7 four"
    assert said in page and "Lambda 0.95 stopped on seeds 1 and 4" in page
    ends_at = {(run["label"], run["seed"]): run["greedy"] for run in runs}
    assert [ends_at["sapo, lambda 0.95", seed] for seed in (1, 4)] == stuck
    assert f"greedy at {stuck[0]:.3f} and {stuck[1]:.3f}" in page
    fourth = {label: end for (label, seed), end in ends_at.items() if seed == 4}
    assert f"0.7 stopped on seed 4, at {fourth['sapo']:.3f}, where every" in page
    assert max(fourth.values()) < 0.9
    assert f"0.95 is ahead in {probability_said(large_greedy, own_greedy)}" in page
    assert f"it is in {probability_said(large, own)}" in page
    middle, middle_greedy = middles_of(runs), middles_of(runs, "greedy")
    said = "ended at {} and, greedy, {}, where the default had {} and {}; greedy it beat it in {}"
    label = "sapo, critic lambda 1"
    numbers = (middle[label], middle_greedy[label], middle["sapo"], middle_greedy["sapo"])
    assert said.format(*numbers, probability_said(told_greedy, own_greedy)) in page
    label, unseen = "sapo, hears nothing", range(5, 10)
    both = (f"{interval(ends('sapo', key, unseen))[0]:.3f}" for key in ("accuracy", "greedy"))
    said = "{} without it on seeds 5 to 9, {} with it, greedy {} and {}"
    first, second = both
    assert said.format(middle[label], first, middle_greedy[label], second) in page
    without = middle["sapo, no KL bound"]
    assert f"no difference that five seeds tell** ({without} without it)" in page


def test_small_batches_are_what_the_page_says():
    page, runs = section("Does it pay to see?"), runs_of("seeing-DiceSum-small-batches.json")
    middle = middles("seeing-DiceSum-small-batches.json")
    best = "sapo, hears nothing, lambda 0.99"
    assert max(middle, key=middle.get) == best
    lowest = min(run["accuracy"] for run in runs[best])
    assert f"highest, at {middle[best]:.3f}, and none of its runs below {lowest:.3f}" in page
    for label, said in (
        ("sapo, lambda 0.99", "hears at the same lambda in {} of the pairs"),
        ("sapo, hears nothing", "the deaf one at 0.95 in as many ({})"),
        ("sapo", f"as tuned, {middle['sapo']:.3f}, five seeds do not decide ({{}})"),
    ):
        chance = chance_of(runs[best], runs[label])
        assert said.format(with_interval(chance)) in page
        assert (chance[1] > 0.5) == (label != "sapo")


def middles_of(runs, key="accuracy"):
    """{label: IQM, as it is printed} of a comparison's runs."""
    of_label = {}
    for run in runs:
        of_label.setdefault(run["label"], []).append(run[key])
    return {label: f"{interval(ends)[0]:.3f}" for label, ends in of_label.items()}


def test_four_epochs_without_the_bound_end_as_the_page_says():
    for seed in range(5):
        bound, free = (result(f"epochs4-{kind}seed{seed}.json") for kind in ("", "free-"))
        assert abs(bound["accuracy"] - free["accuracy"]) < 0.04
    assert "on each seed the two end within 0.04 of each other" in section(
        "A rollout used four times"
    )
    assert collapsed("epochs4-free-seed*.json") == (0, 5)


ARROWS = ("default", "lambda-0.95", "deaf")
NUMBERS = dict(
    enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
)


def test_ten_arrows_are_what_the_page_says():
    page = section("Ten arrows", "Ten arrows, before")
    ends = [
        result("arrows-today-seed3.json")[kind]["temperature 1"]["eval_accuracy"]
        for kind in ("evaluations_before", "evaluations")
    ]
    assert "45 rollouts bring it from {:.3f} to {:.3f}.".format(*ends) in page
    longer = result("arrows-today-2400-seed3.json")
    ends = [
        longer[kind]["greedy"]["eval_accuracy"] for kind in ("evaluations_before", "evaluations")
    ]
    said = "not measured from this start)**:** greedy from {:.3f} to {:.3f}."
    assert said.format(*ends) in page
    explained, clipped = (
        longer["mechanism"][kind] for kind in ("explained_variance_second_half", "clip_fraction")
    )
    said = f"explains {explained:.2f} of the variance in the second half, and the clip holds back"
    assert f"{said} {clipped:.2%} of the tokens. One seed" in page
    for run in (longer, result("arrows-today-seed3.json")):
        command = run["command"].split(" --name ")[0]
        page_has = [sorted(words.split()) for words in commands_of("docs/results.md")]
        assert sorted(command.split()) in page_has
    first = result("arrows-default-seed3.json")
    early, late = (result(f"steps-arrows-{steps}.json") for steps in (600, 2400))
    said = f"gets {early['steps']['other'][1]:.0%} of the steps right that no habit concerns, and "
    assert f"{said}{early['accuracy']:.0%} of its answers" in page
    assert f"2400 these are {late['steps']['other'][1]:.0%}, and of the steps" in page
    assert f"concerns it gets {late['steps']['hard'][1]:.0%} right" in page
    assert late["command"] in commands_of(*MEASURED_ON)
    files = {kind: sorted(RESULTS.glob(f"arrows-{kind}-seed?.json")) for kind in ARROWS}
    runs = {kind: [json.loads(file.read_text()) for file in files[kind]] for kind in ARROWS}
    for run in (*runs["lambda-0.95"], *runs["deaf"]):
        assert run["evaluations"]["greedy"]["eval_accuracy"] == 1
    assert len(runs["deaf"]) == 1
    assert abs(runs["deaf"][0]["mechanism"]["explained_variance_second_half"]) < 0.01
    fell = [run for run in runs["default"] if run["accuracy"] < run["warm_start_accuracy"]]
    assert fell == [first] and f"one run of {NUMBERS[len(runs['default'])]} fell" in page
    whitened = result("arrows-whitened-seed3.json")
    assert "--whiten_advantages" in whitened["command"] and whitened["seed"] == 3
    stopped = whitened["evaluations"]["greedy"]["eval_accuracy"]
    assert f"this run ends at {stopped:.3f} greedy" in page
    explained = whitened["mechanism"]["explained_variance_second_half"]
    assert f"its critic, which foretells {explained:.0%} of the outcomes" in page
    clipped = [run["mechanism"]["clip_fraction"] for of_kind in runs.values() for run in of_kind]
    clipped.append(whitened["mechanism"]["clip_fraction"])
    assert f"holds back {min(clipped):.2%} to {max(clipped):.2%} of the tokens" in page

    lines = (RESULTS / "arrows-default-seed3-metrics.jsonl").read_text().splitlines()
    rows = {row["iteration"]: row for row in map(json.loads, lines)}
    assert f"a dozen rollouts find it** (seed 3: {rows[12]['accuracy']:.0%})" in page
    assert f"right {100 * rows[22]['accuracy']:.0f} times in 100" in page
    assert f"at the 26th {100 * rows[26]['accuracy']:.0f} times" in page
    assert f"sure by then ({rows[22]['entropy']:.3f} nats a token)" in page
    assert all(rows[i]["policy_steps"] <= 0.5 for i in range(23, 27))
    since, said = {}, {}
    for iteration in range(1, 46):
        said[iteration] = health.warnings(rows[iteration], since)
    assert min(iteration for iteration, lines in said.items() if lines) == 26


def test_nine_dice_by_todays_default_are_what_the_page_says():
    runs = [result(f"nine-dice-today-seed{seed}.json") for seed in range(3)]
    page = section("Nine dice")
    for run in runs:
        settings, config = train.parse(shlex.split(run["command"])[2:])
        of_task = train.parse(["--env_args", "n=9", "--max_new_tokens", "96"])
        own = {"seed": settings.seed, "name": settings.name}
        assert (replace(of_task[0], **own), of_task[1]) == (settings, config), "no other flag"
    at_1, greedy = (
        sorted(run["evaluations"][kind]["eval_accuracy"] for run in runs)
        for kind in ("temperature 1", "greedy")
    )
    begun = max(run["evaluations_before"]["greedy"]["eval_accuracy"] for run in runs)
    explained, clipped = (
        sorted(run["mechanism"][kind] for run in runs)
        for kind in ("explained_variance_second_half", "clip_fraction")
    )
    said = (
        f"ends at {at_1[0]:.3f} to {at_1[-1]:.3f}, "
        f"greedy at {greedy[0]:.3f} to {greedy[-1]:.3f},** from {begun:.3f} at most; "
        f"its critic explains {explained[0]:.2f} to {explained[-1]:.2f}, "
        f"and the clip holds back {clipped[0]:.2%} to {clipped[-1]:.2%} of the tokens"
    )
    assert said in page
    training, start = (
        sorted(round(run[kind] / 60) for run in runs) for kind in ("seconds", "warm_start_seconds")
    )
    assert (training[0], training[-1], start[0], start[-1]) == (8, 9, 4, 6)
    assert "eight to nine minutes of one core after a warm start of four to six" in page


def test_nine_dice_are_what_the_page_says():
    learned, stuck = (
        result(f"nine-dice-seed{seed}.json")["greedy_steps"]["steps"] for seed in (0, 1)
    )
    earlier = result("nine-dice-600-seed1.json")["greedy_steps"]["steps"]
    page = section("Nine dice, before")
    assert f"gets {earlier['other sum'][1]:.0%} of the sums right that do not even carry" in page
    assert {kind for kind, (_, share) in learned.items() if share < 1} == {"carry into 40"}
    assert stuck["read a six"] == [742, 0.0] and stuck["carry into 30"][1] == 1
    assert "takes every six for a five, 742 of 742" in page
    told, one_lambda, larger = (
        result(f"nine-dice{kind}-seed1.json")["accuracy"]
        for kind in ("-outcomes", "", "-lambda-0.95")
    )
    assert f"the same seed to {told:.3f} in place of {one_lambda:.3f}" in page and told < larger


def collapsed(files):
    """(how many of these runs ended no better than 0.3 above their start when greedy, how many)."""
    count, runs = 0, [json.loads(file.read_text()) for file in RESULTS.glob(files)]
    for run in runs:
        before, after = run["evaluations_before"], run["evaluations"]
        count += after["greedy"]["eval_accuracy"] < before["greedy"]["eval_accuracy"] + 0.3
    return count, len(runs)


def test_four_epochs_collapse_as_often_as_the_page_says():
    assert collapsed("epochs4-unbounded-seed*.json") == (2, 3)
    assert collapsed("epochs4-seed*.json") == (0, 5)
    page = section("Claim by claim", "A rollout used four times")
    claim = "at four epochs two seeds of three collapse, and with a KL bound the same two do not"
    assert claim in page and "With today's default none of five does, with the bound or" in page
    bound_alone = [
        trial["accuracy"]
        for trial in result("trials.json")["trials"]
        if (trial["epochs"], trial["lam"], trial["target_kl"]) == (4, 0.9, 0.015)
    ]
    assert "seeds 0 and 1 to {:.3f} and {:.3f}".format(*bound_alone) in page


def test_what_the_guards_did_is_what_their_runs_hold():
    page, of_guard = section("A rollout used four times"), {}
    for run in result("cures.json")["measured"]:
        assert run["command"] in commands_of(*MEASURED_ON)
        of_guard.setdefault(run["label"], []).append(run)
    assert list(of_guard) == list(cures.GUARDS)
    assert [sorted(r["seed"] for r in runs) for runs in of_guard.values()] == [[0, 1, 2]] * 7
    lost = {guard: sum(map(sweep.collapsed, runs)) for guard, runs in of_guard.items()}
    always = {"nothing", "value clip", "critic learns from outcomes"}
    assert {guard for guard, count in lost.items() if count == 3} == always
    assert {guard for guard, count in lost.items() if count} - always == {"bounded critic"}
    assert lost["bounded critic"] == 1 and "(its value a sigmoid) saves two seeds of three" in page
    middle = {guard: np.mean([r["accuracy"] for r in runs]) for guard, runs in of_guard.items()}
    assert max(middle, key=middle.get) == "KL bound" and "and it ends highest" in page
    third, tenth = (
        {g: sorted(r["curve"]["accuracy"][i] for r in runs) for g, runs in of_guard.items()}
        for i in (2, 9)
    )
    bare, bound = third["nothing"], third["KL bound"]
    said = "in the third rollout {:.2f} to {:.2f} of the answers are right"
    assert f"{said.format(bare[0], bare[-1])}, and in the tenth none" in page
    assert max(tenth["nothing"]) < 0.005
    assert said.format(bound[0], bound[-1]) in page
    assert f"where the unguarded run has {bare[0]:.2f} to {bare[-1]:.2f}" in page


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


@pytest.mark.parametrize(
    ("name", "alt", "count"),
    [
        ("main-DiceSum", "Nine methods on DiceSum", 9),
        ("main-DiceSum-n=9-long", "Three methods on nine dice, PPO at two lambdas", 4),
        ("main-DiceSum-n=9-earlier", "Three methods on nine dice", 3),
        ("main-ArrowPath-length=10-grid=4-long", "Three methods on ten arrows, PPO at two", 4),
        ("games-Treasure-picture=false-sight=2-walls=0-text", "Four players of Treasure at two", 8),
    ],
)
def test_a_figure_has_as_many_rows_as_its_text_says(name, alt, count):
    ends = figures.comparison_figure(result(f"{name}.json")).axes[0]
    assert len(ends.get_yticklabels()) == count
    page = text(*MEASURED_ON)
    assert re.search(rf"!\[{re.escape(alt)}[^]]*\]\(\.\./results/{re.escape(name)}\.svg\)", page)


def test_every_figure_of_results_is_shown():
    """Beside those of the tutorial, which has a test of its own."""
    pages = "".join(page.read_text() for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
    for picture in (*RESULTS.glob("*.svg"), *RESULTS.glob("*.png")):
        assert f"results/{picture.name})" in pages, picture.name


def test_what_was_tried_on_other_games_is_what_the_page_says():
    page = prose("docs/games.md")
    baby, textworld, today = result("tried-games.json")["tried"]
    assert (
        f"the warm start wins {baby['before']['eval_accuracy']:.3f} of the games, and nine" in page
    )
    low, high = min(baby["accuracy"]), max(baby["accuracy"])
    assert len(baby["accuracy"]) == 9 and f"leave it there ({low:.3f} to {high:.3f})" in page
    assert f"KL divergence of {max(baby['approx_kl']):.3f} at most" in page
    assert max(baby["explained_variance"]) < 0.03 and baby["seconds"][-1] > 9 * 60
    assert f"the warm start wins {textworld['before']['eval_accuracy']:.3f}, so" in page
    assert (
        f"Today's start wins {today['before']['eval_accuracy']:.3f} ({today['date']}), which is "
        f"not told apart from that: {today['right_thoughts']:.0%} of its thoughts" in page
    )
    assert f"and {today['right_commands']:.0%} of its commands are the bot's" in page


def test_what_the_worlds_show_is_what_their_runs_hold():
    page, values = prose("docs/games.md"), result("treasure-values-seed0.json")
    explained = values["explained_variance_of_outcomes"]
    assert f"explains {explained['critic']:.2f} of the variance of who wins" in page
    assert f"who sees the whole world, {explained['exact values of the explorer']:.2f};" in page
    assert f"of the two is {values['correlation']:.2f}." in page
    assert f"({values['games']} games, {values['states']:,} turns" in page
    won = result("worlds-Treasure-seed0.json")
    before, after = (won[when]["temperature 1"] for when in ("evaluations_before", "evaluations"))
    assert before["eval_high"] < after["eval_low"], "it has learned"
    said = f"from {before['eval_accuracy']:.3f} to {after['eval_accuracy']:.3f} of the games"
    assert said in page
    texts = [result(f"worlds-Treasure-text-seed{seed}.json") for seed in range(3)]
    shares = {
        when: [run[when]["temperature 1"]["eval_accuracy"] for run in texts]
        for when in ("evaluations_before", "evaluations")
    }
    minutes = max(run["warm_start_seconds"] + run["seconds"] for run in texts) / 60
    assert max(shares["evaluations_before"]) < 0.5 and min(shares["evaluations"]) > 0.85
    said = "{:.3f}, {:.3f} and {:.3f} of the games before, ".format(*shares["evaluations_before"])
    said += "{:.3f}, {:.3f} and {:.3f} after, ".format(*shares["evaluations"])
    assert f"{said}in at most {math.ceil(minutes)} minutes" in page and minutes < 15
    today = result("treasure-today-seed0.json")
    before, after = today["evaluations_before"], today["evaluations"]
    said = [
        f"{when[kind]['eval_accuracy']:.3f}"
        for kind in ("temperature 1", "greedy")
        for when in (before, after)
    ]
    assert "on seed 0 from {} to {}, greedy from {} to {}".format(*said) in page
    assert today["command"].split(" --name ")[0] in commands_of("docs/games.md")
    digits = [result(f"worlds-DigitSum-seed{seed}.json")["evaluations"] for seed in range(3)]
    assert all(run["temperature 1"]["eval_accuracy"] > 0.86 for run in digits)
    assert all(run["greedy"]["eval_accuracy"] > 0.9 for run in digits)


def test_the_game_to_look_at_is_what_its_page_holds():
    """Lost by one wrong command, behind which V does not fall, so that the end has most blame."""
    page = prose("docs/games.md")
    (data,) = re.findall(r'id="data">(.*)</script>', text("results/treasure-credit.html"))
    held_out = [c for c in json.loads(data)["checkpoints"] if not c["key"].endswith("-learned")]
    assert [len(checkpoint["responses"]) for checkpoint in held_out] == [6, 6, 6]
    assert "has six games, chosen by hand, at three moments" in page
    run = result("worlds-Treasure-small-seed0.json")
    explained = run["mechanism"]["explained_variance_second_half"]
    assert f"in the second half it explains {explained:.2f} of the variance" in page
    assert f"seed {run['seed']}, {run['date']}: [`treasure-credit.html`]" in page
    assert "--name treasure-credit" in run["command"]
    game = held_out[-1]["responses"][0]
    assert game["id"] == "eval/41" and not game["won"]
    ((first, last, _),) = [step for step in game["steps"] if not step[2]]
    assert game["tokens"][first : last + 1] == ["go east"] and len(game["turns"]) == 6
    value = game["values"][game["turns"][-1]["first"]]
    assert f"still expects {value:.2f} before the last turn" in page
    assert game["perfect"][game["turns"][-1]["first"]] == 0
    credit, key = game["advantages"], game["turns"][1]["last"]  # the reply to it is "The key!"
    assert sum(credit[: key + 1]) > 1 and min(credit[: key + 1]) > -0.03
    before = [c for c in credit[game["turns"][3]["first"] : game["turns"][3]["last"] + 1] if c < 0]
    assert before and max(credit[first:]) == 0 > credit[first]
    assert credit.index(min(credit)) >= game["turns"][-1]["first"]
    ids = " ".join(response["id"] for response in held_out[-1]["responses"])
    assert f"--examples {ids}` then" in page


def test_what_is_said_of_the_kills_is_what_they_showed():
    found, page = result("kills.json"), prose("docs/models.md")
    assert found["command"] in commands_of("docs/models.md")
    assert f"a short run of {found['seconds_uncut']:.0f} seconds" in page
    assert f"{len(found['kills'])} times in all" in page
    met = [kill["phase"] for kill in found["kills"]]
    phases = ", ".join(f"{phase} ({met.count(phase)})" for phase in kills.PHASES)
    assert f"of each of its phases: {phases}, " in page and set(met) == set(kills.PHASES)
    assert f"All {found['runs_ended']} runs that came to their end" in page and found["all_equal"]
    assert {kill["signal"] for kill in found["kills"]} == {"SIGKILL", "SIGTERM"}
    assert f"(`results/kills.json`, {found['date']})" in page


def test_what_is_said_of_the_mutants_is_what_was_tried():
    found, page = result("mutants.json"), prose("docs/theorems.md")
    of_sapo = sum(n for name, n in found["functions"].items() if name.startswith("sapo.py"))
    assert sum(found["functions"].values()) == found["tried"]
    assert found["tried"] - found["killed"] == len(found["survivors"])
    said = f"Of {found['tried']} mutants, {of_sapo} of `sapo.py` and {found['tried'] - of_sapo} of"
    assert said in page and f"{found['killed']} were noticed" in page
    assert f"The {len(found['survivors'])} others, each with its `why`" in page
    kinds = collections.Counter(one["why"].partition(":")[0] for one in found["survivors"])
    said = {
        "tested": "have tests now",
        "gone": "stood in lines that are gone",
        "same": "compute the same",
        "card": "leave a tensor on the CPU",
    }
    assert kinds.keys() == said.keys()
    for kind, words in said.items():
        assert f"- {kinds[kind]} {words}" in page
    assert f"({found['versions']['mutmut']}" in page or f"` {found['versions']['mutmut']} " in page
    assert f"{found['date']}, commit {found['commit']}, 10 examples" in page


def test_what_is_said_of_the_soak_is_what_was_seen():
    found, page = result("soak.json"), prose("docs/models.md")
    growth, last = found["growth"], found["looks"][-1]
    assert found["exit_status"] == 0 and last["minute"] > 58
    assert f"(`{found['command']}`, {found['date']}, `results/soak.json`)" in page
    assert f"{last['iterations']:,} iterations, with an evaluation" in page
    said = f"memory of {last['rss_mb']:.0f} MB grew by {growth['rss_mb_per_hour']:.1f} MB, its "
    said += f"{last['open_files']} open files and {last['threads']} threads stayed"
    assert said in page
    assert abs(growth["open_files_per_hour"]) < 0.1 and abs(growth["threads_per_hour"]) < 0.1
    first, second = growth["cpu_seconds_of_an_iteration"].values()
    said = f"took {1000 * first:.0f} ms of the CPU in the first half and {1000 * second:.0f} in"
    assert said in page and f": {second / first - 1:.0%} more," in page


def test_what_is_said_of_the_made_up_inputs_is_what_was_run():
    found, page = result("fuzz.json"), prose("docs/models.md")
    *chance, pairs = found["parts"]
    graders, latex, rows, files, nonsense, trainings = (part["cases"] for part in chance)
    said = (
        f"{graders + latex:,} texts for the graders, {rows + files:,} rows, pictures and files for"
    )
    assert (
        f"{said} the data loader, {nonsense:,} command lines of nonsense, and {trainings}" in page
    )
    assert sum(part["cases"] for part in chance) > 1_000_000 and len(found["found"]) == 3
    assert found["cases"] == sum(part["cases"] for part in found["parts"])
    assert f"(`results/fuzz.json`, {found['date']})" in page
    assert f"Another {pairs['cases']:,} ({pairs['date']}) were pairs of answers" in page
    paid = sum(fault.startswith("earned: ") for fault in pairs["found"])
    assert paid == 9 and f"found {len(pairs['found'])} faults of the grader, nine of which" in page
    for part in found["parts"]:
        file = re.search(r"tests/\w+\.py", part["command"])[0]
        assert (ROOT / file).is_file()


def test_the_credit_and_the_gradients_are_what_results_hold():
    found, page = result("truth-DiceSum.json"), section("Is the credit right, and the gradient?")
    methods = found["methods"]
    firsts = {name: row["auroc_of_first_wrong_step"] for name, row in methods.items()}
    shares = {name: row["share_on_first_wrong_step"][0] for name, row in methods.items()}
    cosines = {name: row["cosine"][0] for name, row in methods.items()}
    assert f"{methods['sapo']['wrong_responses']} with a wrong step" in page
    far = sorted(firsts[name] for name in ("sapo, lambda 0.99", "sapo"))
    near = sorted(firsts[f"sapo, lambda {lam}"] for lam in (0.7, 0.5, 0.0))
    said = f"in {far[0]:.2f} to {far[1]:.2f} of the pairs at lambda 0.99 and 0.9"
    assert f"{said}, in {near[0]:.2f} to {near[-1]:.2f} from 0.7 down" in page
    assert far[-1] < near[0] - 0.1
    ends = [shares[f"sapo, lambda {lam}"] for lam in (0.99, 0.0)]
    assert "goes from {:.2f} to {:.2f}, at 0".format(*ends) in page
    of_all_steps = {name: row["auroc"] for name, row in methods.items()}
    assert max(of_all_steps, key=of_all_steps.get) == "sapo, lambda 0.7"
    assert f"answer alike: {firsts['grpo']:.2f} for the first" in page
    large = [methods[name] for name in ("sapo, lambda 0.99", "sapo")]
    small = [methods[f"sapo, lambda {lam}"] for lam in (0.7, 0.5, 0.0)]
    said = "The cosine is {:.2f} to {:.2f} at lambda 0.99 and 0.9, and 0.97 at 0.7 and below"
    assert said.format(*(row["cosine"][0] for row in large)) in page
    assert {f"{row['cosine'][0]:.2f}" for row in small} == {"0.97"}
    spread = [sorted(row["variance"] for row in rows) for rows in (small, large)]
    said = "a variance of {:.2f} to {:.2f} in place of {:.2f} to {:.2f}; only from 0.99 do the"
    assert said.format(*spread[0][:: len(small) - 1], *spread[1]) in page
    lowest = min(row["cosine"][1] for row in small)
    assert large[0]["cosine"][2] < lowest < large[1]["cosine"][2]
    of_token, of_segment = methods["ppo, lambda of sapo"], methods["sapo"]
    pairs = [(of_token[kind], of_segment[kind]) for kind in ("auroc", "auroc_of_first_wrong_step")]
    pairs.append((shares["ppo, lambda of sapo"], shares["sapo"]))
    assert all(of_tokens > of_segments for of_tokens, of_segments in pairs)
    said = "PPO's credit sees better: {:.2f} of the pairs of all steps against {:.2f}, {:.2f} of "
    said += "the first wrong step against {:.2f}, {:.2f} of the blame against {:.2f}"
    assert said.format(*itertools.chain(*pairs)) in page
    near, units = methods["sapo, lambda 0.7"], found["values"]
    tokens = units["token critic"]["states"] / units["segment critic"]["states"]
    assert f"has {tokens:.1f} tokens, and $0.9^{{{tokens:.1f}}} = {0.9**tokens:.2f}$" in page
    said = f"SAPO's sees better: {near['auroc']:.2f} of the pairs of all steps, "
    assert f"{said}{near['auroc_of_first_wrong_step']:.2f} of the first wrong step" in page
    assert near["auroc_interval"][0] > of_token["auroc_interval"][1]
    blame, of_tokens = near["share_on_first_wrong_step"], of_token["share_on_first_wrong_step"]
    assert f"the blame there is as much ({blame[0]:.2f})" in page
    assert of_tokens[1] < blame[0] < of_tokens[2]
    assert f"VinePPO, with 9 continuations, puts {shares['vineppo']:.2f} of the blame" in page
    assert train.parse([])[0].continuations == 9 and sweep.BATCHES["vineppo"][-1] == "4"
    _, low, high = methods["sapo, lambda 0.0"]["share_on_first_wrong_step"]
    assert low < shares["vineppo"] < high
    of_batch = 256 * units["token critic"]["states"] / units["token critic"]["responses"]
    spent = math.ceil(16_000 / of_batch) * of_batch
    assert round(spent, -2) == 22_700 and "some 22,700 where a batch is 256 answers" in page
    critics = [cosines[name] for name in cosines if name.startswith(("sapo", "ppo", "vc-ppo"))]
    assert f"gradient, by little:** {min(critics):.2f} to {max(critics):.2f}" in page
    others = {name: cosine for name, cosine in cosines.items() if cosine not in critics}
    assert max(others.values()) < min(critics) and max(others, key=others.get) in ("grpo", "gspo")
    assert f"has a cosine of {cosines['vineppo']:.2f}" in page
    assert f"{cosines['spo-chain']:.2f} and {cosines['spo-tree']:.2f}" in page
    assert f"reaches {cosines['grpo']:.2f}" in page
    noise = [methods[name]["variance"] for name in ("srpo", "vineppo")]
    said = f"lowest cosine, {cosines['srpo']:.2f}, and by its variance ({noise[0]:.2f}) that is"
    assert said in page and f"not noise, as VinePPO's ({noise[1]:.2f}) is" in page
    assert cosines["srpo"] == min(cosines.values())
    assert f"between its halves is {found['reference']['cosine_of_its_halves']:.3f}" in page
    critics = [found["values"][f"{unit} critic"] for unit in ("segment", "token")]
    for measure, said in (
        ("rmse", "off by {:.2f} (segments) and {:.2f} (tokens)"),
        ("spread_of_truth", "which spread by {:.2f} and {:.2f}"),
        ("correlation", "they correlate with them at {:.2f} and {:.2f}"),
    ):
        assert said.format(*(critic[measure] for critic in critics)) in page


def test_the_waits_for_a_card_are_what_results_hold():
    counted, page = result("pretended_card.json"), prose("docs/models.md")
    waits = {
        (part, when): sum(counted[when][part][way] for way in ("to host", "to card"))
        for part in ("iteration", "train.samples")
        for when in ("before", "after")
    }
    of_iteration = "{} times in an iteration of 16 responses of 64 tokens before, {} now".format(
        *(waits["iteration", when] for when in ("before", "after"))
    )
    assert of_iteration in page
    of_samples = "{} and {} in writing the samples".format(
        *(waits["train.samples", when] for when in ("before", "after"))
    )
    assert of_samples in page


def test_the_oldest_versions_are_those_that_were_tried():
    tried, page = result("oldest_versions.json"), prose("docs/models.md")
    requirements = (ROOT / "requirements.txt").read_text()
    for name, version in tried["versions"].items():
        oldest = re.search(rf"^{name}>=([\d.]+)", requirements, re.MULTILINE)[1]
        assert version == oldest or version.startswith(f"{oldest}.")
        assert f"{name} {version}" in page
    assert f"{tried['passed']:,} tests" in page and f"{tried['skipped']} skip" in page
    later = result("python312.json")
    assert f"{later['passed']:,} tests pass, {later['skipped']} skip, and one failed" in page
    assert later["failed"] == 1
