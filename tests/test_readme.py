"""What README.md and tutorial.md promise: examples that run, flags that exist, numbers that stand under results/."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import matplotlib
import pytest

import figures
import train

ROOT = Path(__file__).parent.parent
README, TUTORIAL = ((ROOT / name).read_text() for name in ("README.md", "tutorial.md"))
COMMANDS = sorted({line.split("#")[0].strip() for line in (README + TUTORIAL).replace("\\\n", " ").splitlines()
                   if line.startswith("python train.py ") and "--help" not in line and "--resume" not in line})
RUNS = [json.loads(file.read_text()) for file in sorted((ROOT / "results").glob("dicesum-sapo-seed*.json"))]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_run(block):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    settings, _ = train.parse(shlex.split(command)[2:])
    if "Dataset" not in settings.env:  # its data would be downloaded
        train.make_env(settings)


def test_the_table_of_runs_is_what_results_hold():
    assert RUNS
    for run in RUNS:
        row = (f"| {run['seed']} | {run['warm_start_accuracy']:.3f} | {run['accuracy']:.3f} "
               f"({run['accuracy_low']:.3f} to {run['accuracy_high']:.3f}) | ")
        assert row in README, f"README.md lacks the row {row!r}"
    whole = next(run["wall_seconds"] for run in RUNS if run["seed"] == 0)
    assert f"{whole // 60:.0f} min {whole % 60:.0f} s from its start to its end" in README.replace("\n", " ")


def test_the_longer_runs_ended_where_the_readme_says():
    longer = [json.loads(file.read_text()) for file in (ROOT / "results").glob("dicesum-sapo-80rollouts-seed*.json")]
    ends = sorted(run["accuracy"] for run in longer)
    assert len(ends) == 3 and f"ends at {ends[0]:.2f} to {ends[-1]:.2f}," in README.replace("\n", " ")


def test_the_speed_of_the_mathematics_is_what_results_hold():
    ratio = json.loads((ROOT / "results" / "bench_math.json").read_text())["ratio"]
    assert ratio["torch slices"] >= 100
    assert all(f"{x:.0f} times" in README.replace("\n", " ") for x in ratio.values()), f"README.md lacks one of {ratio}"


def test_the_memory_of_scoring_is_what_results_hold():
    ways = json.loads((ROOT / "results" / "bench_memory.json").read_text())["ways"]
    pieces, plain, library = (ways[x]["megabytes"] for x in ("in pieces", "log_softmax", "torch.distributions"))
    assert pieces <= plain / 4 and all(x < 1e-5 for way in ways.values() for x in way["largest_difference"])
    said = f"{pieces} MB where `log_softmax` on all of it takes {plain} and `torch.distributions` {library}"
    assert said in README.replace("\n", " ")


def test_the_race_of_iterations_is_what_results_hold():
    share = json.loads((ROOT / "results" / "bench_iteration.json").read_text())["of_grpo"]
    ours, theirs = share["SAPO"], share["TRL's GRPO"]
    said = f"takes {ours:.2f} of our GRPO's time and TRL's `GRPOTrainer` {theirs:.2f} of it"
    assert said in README.replace("\n", " ")
    earlier = json.loads((ROOT / "results" / "bench_iteration_earlier.json").read_text())["races"]
    (low, high), (least, most) = ((min(x), max(x)) for x in ([race["of_grpo"][name] for race in earlier]
                                                             for name in ("SAPO", "TRL's GRPO")))
    assert f"gave {low:.2f} to {high:.2f}, and {least:.2f} to {most:.2f}," in README.replace("\n", " ")


def test_the_table_of_the_card_is_what_results_hold():
    file = ROOT / "results" / "gpu.json"
    if not file.is_file():
        assert README.count("| not measured | not measured |") == 1
        return
    for row in json.loads(file.read_text())["rows"]:
        settings = f"LoRA {row['lora']}" if row["lora"] else "all weights"
        peak, seconds = row.get("peak_gib"), row.get("seconds_per_iteration")
        measured = f"{peak:.1f} GiB | {seconds:.1f}" if peak else "out of memory"
        assert f"| {row['model']} | {settings} | {measured} |" in README


COMPARED = [file for file in sorted((ROOT / "results").glob("*.json"))
            if json.loads(file.read_text()).get("experiment") not in (None, "tune")]


@pytest.mark.parametrize("file", COMPARED, ids=lambda file: file.stem)
def test_the_tables_of_comparisons_are_what_results_hold(file):
    found = json.loads(file.read_text())
    if found["experiment"] == "truth":
        rows = []
        for name, x in found["methods"].items():
            within, first = x["auroc_in_wrong_responses"], x["share_on_first_wrong_step"][0]
            rows.append(f"| {name} | {x['auroc']:.2f} ({x['auroc_interval'][0]:.2f} to {x['auroc_interval'][1]:.2f}) | "
                        f"{within:.2f} | {first:.2f} | {x['cosine'][0]:.2f} | {x['variance']:.1f} |")
    elif found["experiment"] == "lift":
        shown = lambda x: f"{x[0]:.1f} ({x[1]:.1f} to {x[2]:.1f})"
        curves = [found[when][name]["lift"] for when in ("early", "late") for name in ("Monte Carlo", "critic")]
        rows = [f"| {float(q):.0%} | " + " | ".join(shown(x[q]) for x in curves) + " |" for q in curves[0]]
    else:
        rows = figures.table(found).splitlines()[2:]
    missing = [row for row in rows if row not in README]
    assert rows and not missing, f"README.md lacks these rows of {file.name}: {missing}"


def test_readme_and_tutorial_make_the_same_claims():
    rows = [re.findall(r"^\|.*\|$", text.split("| the paper | here |")[1].split("\n\n")[0], re.MULTILINE)
            for text in (README.replace("[tutorial.md](tutorial.md), ", ""), TUTORIAL)]
    assert rows[0] == rows[1] and len(rows[0]) > 5


def test_the_figures_of_results_are_drawn_from_results(tmp_path):
    """`python figures.py results` gives them back, byte for byte under the same matplotlib."""
    for file in (ROOT / "results").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for path in figures.drawn(tmp_path):
        kept = (ROOT / "results" / path.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," not in kept:
            pytest.skip(f"results/ was drawn with another matplotlib than {matplotlib.__version__}")
        assert kept == path.read_text(), f"{path.name} is not what its JSON holds: python figures.py results"


def test_line_bounds():
    bounds = {"sapo.py": 400, "env.py": 400, "vlm.py": 400, "train.py": 450, "baselines.py": 400, "compare.py": 300}
    assert {name: n for name, n in bounds.items() if len((ROOT / name).read_text().splitlines()) > n} == {}
