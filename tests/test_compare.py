"""lab/compare.py: the command line of the comparisons, a small sweep from end to end."""

import contextlib
import json
import re
import shlex
from dataclasses import asdict

import pytest
from small_sweeps import LEARNED, SUM_TASK, parsed_sweep

import checkpoint
import train
from lab import compare, figures, truth
from lab.sweep import CURVES, ROOT, finished, kept_outcomes, plan

SHARES = ("warm_start_accuracy", "accuracy", "accuracy_low", "accuracy_high")
SHARES += ("greedy_before", "greedy")


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs are made here: a process of their own takes seconds to begin. test_sweep.py has one."""

    def run_here(folder, flags):
        assert not finished(folder)
        train.main(flags)

    monkeypatch.setattr(compare, "execute", run_here)
    # only a main thread may have a handler of Ctrl-C
    quietly = contextlib.nullcontext(lambda: False)
    monkeypatch.setattr(train, "stop_as_a_flag", lambda: quietly)


def test_a_sweep_end_to_end_and_again(runs, tmp_path, capsys, in_this_process):
    """A method by two seeds. The first is run; the second's outcome is among the results, made
    elsewhere. A second call finds all of it done."""
    flags = [*SUM_TASK, "--methods", "grpo", "--tokens", "400", "--tag", "small"]
    flags += ["--runs", str(runs), "--results", str(tmp_path), *LEARNED, "--actor_lr", "1e-3"]
    file = tmp_path / "main-TextSum-n=1-largest=99-small.json"
    (elsewhere,) = plan(*parsed_sweep(*flags, "--first_seed", "1", "--seeds", "1"))
    shares = dict.fromkeys(SHARES, 0.5)
    kept = {"label": "grpo", "seed": 1, "flags": shlex.join(elsewhere.flags), **shares}
    kept |= {"iterations": 1, "generated_tokens": 450, "seconds": 1.0}
    kept["curve"] = {name: [0.5] for name in ("accuracy", *sorted({*CURVES} - {"accuracy"}))}
    kept["curve"] = {"generated_tokens": [450], **kept["curve"]}
    file.write_text(json.dumps({"runs": [kept]}))
    flags += ["--seeds", "2"]
    compare.main(flags)
    outcome = json.loads(file.read_text())
    assert outcome["command"].startswith("python -m lab.compare --env SAPO/TextSum-v0 ")
    assert {"experiment", "task", "budget_tokens", "jobs", "date", "versions"} <= outcome.keys()
    made, other = outcome["runs"]
    assert (made["label"], made["seed"]) == ("grpo", 0) and other == kept
    assert 400 <= made["generated_tokens"] < 700
    assert made["curve"]["generated_tokens"][-1] == made["generated_tokens"]
    assert len({len(curve) for curve in made["curve"].values()}) == 1
    assert made.keys() == kept.keys() and made["accuracy"] != 0.5
    shown = capsys.readouterr().out
    assert re.search(r"^\| grpo \| 2 \|", shown, re.MULTILINE) and "IQM" in shown

    folders = [path.name for path in runs.glob(f"{file.stem}/*") if path.is_dir()]
    assert folders == ["grpo-seed0"]
    compare.main(flags)
    folders = [path.name for path in runs.glob(f"{file.stem}/*") if path.is_dir()]
    assert folders == ["grpo-seed0"]
    assert json.loads(file.read_text())["runs"] == [made, kept]

    pictures = list(figures.drawn(tmp_path))
    assert [p.name for p in pictures] == [file.stem + ".svg"]
    assert all("<path" in picture.read_text() for picture in pictures)


def test_outcomes_that_a_smaller_call_does_not_plan_are_kept(tmp_path, monkeypatch):
    """In a whole sweep's order."""
    flags = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    made = []
    for planned in plan(*parsed_sweep(*flags, "--seeds", "2")):
        made.append((planned.label, planned.seed, shlex.join(planned.flags)))
    numbers = dict.fromkeys((*SHARES, "generated_tokens", "seconds"), 0.5)
    kept = [{"label": label, "seed": seed, "flags": line} | numbers for label, seed, line in made]
    gone = {"label": "of an earlier version", "seed": 0, "flags": "--gone", **numbers}
    file = tmp_path / "main-DiceSum.json"
    file.write_text(json.dumps({"runs": [*kept[:-1][::-1], gone]}))
    monkeypatch.setattr(compare, "execute", lambda folder, flags: None)
    monkeypatch.setattr(compare, "finished", lambda folder: False)

    compare.main([*flags, "--methods", kept[-1]["label"].split(",")[0], "--first_seed", "1"])
    per_seed = len(kept) // 2
    assert json.loads(file.read_text())["runs"] == [*kept[:per_seed], gone, *kept[per_seed:-1]]

    new = kept[-1] | {"accuracy": 0.9}
    monkeypatch.setattr(compare, "finished", lambda folder: str(folder).endswith("-seed1"))
    monkeypatch.setattr(compare, "outcome", lambda run: new)
    compare.main([*flags, "--seeds", "2"])
    assert json.loads(file.read_text())["runs"] == [*kept[:per_seed], gone, *kept[per_seed:-1], new]


def left_outcome(folder, *flags, methods=("sapo",)):
    """The file that a comparison of two seeds with these flags has left in a folder."""
    sweep, extra = compare.parse([*flags, "--results", str(folder), "--seeds", "2"])
    numbers = dict.fromkeys((*SHARES, "generated_tokens", "seconds"), 0.5)
    runs = [
        {"label": run.label, "seed": run.seed, "flags": shlex.join(run.flags), **numbers}
        for run in plan(sweep, extra)
        if run.label in methods
    ]
    sweep.file.write_text(json.dumps({"command": "as it was", "runs": runs}))
    return sweep.file


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tokens 9 --seeds 2", "--token_budget 500000, .*--token_budget 9 now"),
        ("--tokens 9 --first_seed 2", "sapo of seed 0 was run with --token_budget 500000"),
        ("--tokens 9 --methods ppo --seeds 2", "its sapo of seed 0 was run with --token_budget"),
        ("--lam 0.5", "run with no --lam, and would be with --lam 0.5 now"),
        ("--lam=0.5", "run with no --lam, and would be with --lam 0.5 now"),
    ],
)
def test_outcomes_of_other_flags_are_not_replaced(flags, said, tmp_path, monkeypatch, capsys):
    """Nor do outcomes of two comparisons come to stand in one file."""
    file = left_outcome(tmp_path, "--tag", "mine")
    before = file.read_text()
    monkeypatch.setattr(compare, "execute", None)
    words = [*flags.split(), "--tag", "mine", "--results", str(tmp_path)]
    line = said_by([*words, "--runs", str(tmp_path / "runs")], capsys)
    assert line.startswith(f"python -m lab.compare: {file}: its sapo of seed 0 was run with ")
    assert re.search(said, line) and "take another --tag" in line
    assert file.read_text() == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ("--seeds 3 --methods sapo", 1),
        ("--seeds 2 --methods sapo ppo --jobs 1", 4),  # at the lambda of sapo too
        ("--first_seed 1 --seeds 1 --methods grpo", 1),
        ("--seeds 2 --methods sapo --max_new_tokens=64", 0),
        ("--seeds 2 --methods sapo --max_new_tokens 9 --max_new_tokens 64", 0),
    ],
)
def test_the_same_flags_go_on(flags, made, tmp_path, monkeypatch):
    """With more seeds, other methods and jobs, in another folder of runs, in other words."""
    tag = ["--tag", "mine", "--max_new_tokens", "64"]
    file = left_outcome(tmp_path, *tag)
    begun = []
    monkeypatch.setattr(compare, "execute", lambda folder, flags: begun.append(folder))
    words = [*flags.split(), "--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    compare.main([*tag, *words])
    assert len(begun) == made
    assert [run["seed"] for run in json.loads(file.read_text())["runs"]] == [0, 1]


def test_the_commands_of_the_page_make_the_runs_of_one_file_and_no_others():
    page = (ROOT / "docs" / "results.md").read_text()
    file = ROOT / "results" / "main-DiceSum.json"
    commands = [line for line in page.splitlines() if line.startswith("python -m lab.compare")]
    commands = [command for command in commands if "--tokens 96000" in command]
    commands = [command for command in commands if "--experiment" not in command]
    planned = set()
    for command in commands:
        sweep, extra = compare.parse(shlex.split(command)[3:])
        kept = kept_outcomes(sweep, extra)
        assert sweep.file == file and len(kept) == len(json.loads(file.read_text())["runs"])
        planned |= {(run.label, run.seed) for run in plan(sweep, extra)}
    assert planned == set(kept), "none is made again, and none is of another command"


@pytest.mark.parametrize("experiment", ["truth", "lift"])
def test_an_outcome_of_one_piece_is_replaced_by_its_own_command_alone(
    experiment, tmp_path, monkeypatch, capsys
):
    words = ["--experiment", experiment, "--results", str(tmp_path)]
    command = shlex.join(["python", "-m", "lab.compare", *words])
    file = tmp_path / f"{experiment}-DiceSum.json"
    file.write_text(json.dumps({"command": command}))
    monkeypatch.setattr(compare, "measure", lambda *_: [{"anew": True}])
    line = said_by([*words, "--tokens", "9"], capsys)
    assert re.search(f"{re.escape(str(file))}: made by .*replaced by .*--tokens 9", line)
    assert "take another --tag" in line and "anew" not in file.read_text()
    compare.main(words)
    assert json.loads(file.read_text())["anew"]


@pytest.mark.parametrize("experiment", ["main", "lift"])
def test_a_run_of_other_settings_in_a_runs_folder_is_not_taken_for_it(
    experiment, tmp_path, monkeypatch, capsys
):
    flags = ["--methods", "sapo", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    flags += ["--results", str(tmp_path / "other")]
    (planned,) = plan(*compare.parse(flags))
    planned.folder.mkdir(parents=True)
    settings, config = train.parse(planned.flags)
    stored = {"settings": asdict(settings), "config": asdict(config)}
    stored["settings"]["eval_episodes"] = 7  # as of a data set that has no more
    checkpoint.write_json(planned.folder / "config.json", stored)
    monkeypatch.setattr(compare, "execute", None)
    monkeypatch.setattr(truth, "execute", None)
    line = said_by([*flags, "--experiment", experiment, "--tokens", "9"], capsys)
    assert f"{planned.folder}: a run with --token_budget 500000 lies there, and this one" in line
    assert "has 9; take another --tag" in line
    if experiment == "main":
        monkeypatch.setattr(compare, "execute", lambda folder, flags: None)
        compare.main(flags)


def test_a_damaged_outcome_is_named_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "execute", None)
    (tmp_path / "main-DiceSum.json").write_text('{"runs": [{"lab')
    line = said_by(["--results", str(tmp_path)], capsys)
    assert f"{tmp_path}/main-DiceSum.json: expected one whole object of JSON" in line
    assert (tmp_path / "main-DiceSum.json").read_text() == '{"runs": [{"lab'


def test_the_tag_is_made_of_train_pys_flags_unless_given():
    flags = ["--seeds", "3", "--lam", "0.9", "--model", "hub/name"]
    sweep, extra = compare.parse(flags)
    assert extra == ["--lam", "0.9", "--model", "hub/name"] and sweep.seeds == 3
    assert sweep.name == "main-DiceSum-lam_0.9_model_hub_name"
    assert compare.parse([*flags, "--tag", "mine"])[0].name == "main-DiceSum-mine"
    assert compare.parse([])[0].name == "main-DiceSum"


@pytest.mark.parametrize(("experiment", "measurement"), [("truth", "truth"), ("lift", "lifts")])
def test_a_measurement_is_written_with_every_part(experiment, measurement, tmp_path, monkeypatch):
    file = tmp_path / f"{experiment}-DiceSum-lam_0.9.json"
    written_so_far = []

    def two_parts(sweep, extra):
        assert (sweep.seeds, extra) == (5, ["--lam", "0.9"])
        yield {"values": 1}
        written_so_far.append(json.loads(file.read_text()))
        yield {"values": 1, "methods": 2}

    monkeypatch.setattr(compare, measurement, two_parts)
    compare.main(["--experiment", experiment, "--results", str(tmp_path), "--lam", "0.9"])
    (first,) = written_so_far
    last = json.loads(file.read_text())
    assert first["values"] == 1 and "methods" not in first
    assert last == {**first, "methods": 2} and last["experiment"] == experiment


def test_what_is_wrong_becomes_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nope: expected one of"):
        compare.main(["--experiment", "nope", "--results", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))

    def failed(folder, flags):  # test_sweep.py has a real one
        raise ChildProcessError(f"python train.py ended with 1; see {folder}.log")

    monkeypatch.setattr(compare, "execute", failed)
    with pytest.raises(SystemExit, match="see .*grpo-seed0.log"):
        flags = ["--methods", "grpo", "--seeds", "1", "--runs", str(tmp_path)]
        compare.main([*flags, "--results", str(tmp_path)])
    assert not list(tmp_path.glob("*.json")), "no outcome, no file"


def said_by(words, capsys):
    """The one line with which the command refuses some words."""
    with pytest.raises(SystemExit) as refused:
        compare.main(words)
    assert refused.value.code not in (0, None)
    said = str(refused.value.code) if refused.value.code != 2 else capsys.readouterr().err
    return said.splitlines()[-1]


WRONG = {
    "--seeds 0": "seeds: 0, expected a number in [1, 1000]",
    "--seeds -2": "seeds: -2, expected",
    "--seeds 99999999999": "seeds: 99999999999, expected",
    "--seeds 0 --methods nope": "seeds: 0, expected",
    "--first_seed -3": "first_seed: -3, expected",
    "--tokens 0": "tokens: 0, expected",
    "--jobs 0": "jobs: 0, expected",
    "--methods nope": "--methods nope: expected some of those that --experiment main has: sapo, ",
    "--methods grpoo sapo": "--methods grpoo: expected",
    "--experiment cuts --methods ppo": "--experiment cuts has: sapo",
    "--experiment truth --methods nope": "--methods nope: expected",
    "--experiment lift --methods ppo": "--experiment lift has: sapo",
    "--seed 3": "--seed: not for every run of a comparison; take --seeds, how many, and",
    "--seed=3": "--seed=3: not for every run",
    "--method ppo": "--method: not for every run of a comparison; choose by --methods",
    "--meth ppo": "--meth: not for every run",
    "--token 9": "--token: not for every run of a comparison; take --tokens",
    "--token-budget 9": "--token-budget: not for every run",
    "--iterations 3": "--tokens alone ends a run",
    "--eval_every 3": "evaluated at its start and its end",
    "--name mine": "take --tag",
    "--run elsewhere": "write --runs in full",
    "--resume runs/one": "goes on by itself",
    # train.py's, of which some would be refused by a later run only
    "--lam 7": "lam: 7.0, expected",
    "--lam seven": "--lam: invalid float value: 'seven'",
    "--group 3": "--batch 128: --credit group needs a multiple of the 3 responses",
    "--batch 20": "--batch 20: --credit group needs a multiple of the 8 responses",
    "--minibatch 256": "--minibatch 256: above --batch 128",
    "--batch 66 --minibatch 11": "--batch 66: --credit group needs",
    "--env_args n=99": "--env SAPO/DiceSum-v0 --env_args n=99: expected",
    "--env SAPO/Nope-v0": "--env SAPO/Nope-v0",
    "--env SAPO/Treasure-v0": "SAPO/Treasure-v0 replies",
    "--nope 1": "--nope",
    "cuts": "cuts: no flag of this program",
    "--model nowhere": "--model nowhere: neither a folder nor a hub name (owner/name)",
    "--device nowhere": "--device nowhere: ",
    "--first_seed 4294967295": "seed: 4294967296, expected",
    "--experiment truth --lam 7": "lam: 7.0, expected",
    "--experiment truth --group 3": "--batch 256: --credit group needs",
    "--experiment truth --env SAPO/TextSum-v0": "--method srpo: SAPO/TextSum-v0 has no picture",
    "--experiment lift --model nowhere": "--model nowhere: neither",
    "--methods srpo --env SAPO/TextSum-v0": "no run of it is for --env SAPO/TextSum-v0",
}


@pytest.mark.parametrize(("words", "line"), WRONG.items(), ids=WRONG)
def test_a_wrong_word_is_refused_before_any_work(words, line, tmp_path, monkeypatch, capsys):
    """And the outcome of earlier work stays as it was, with the command that made it."""
    monkeypatch.setattr(compare, "execute", None)
    monkeypatch.setattr(truth, "frozen", None)
    monkeypatch.setattr(truth, "execute", None)
    file = tmp_path / "main-DiceSum.json"
    file.write_text('{"command": "as it was", "runs": []}')
    said = said_by([*words.split(), "--results", str(tmp_path)], capsys)
    assert line in said and re.match(r"python -m lab\.compare: |.*: error: argument ", said)
    assert file.read_text() == '{"command": "as it was", "runs": []}'
    assert list(tmp_path.iterdir()) == [file]


def test_where_all_was_done_the_file_says_still_what_made_it(tmp_path, monkeypatch, capsys):
    flags = ["--results", str(tmp_path), "--methods", "grpo", "--seeds", "1"]
    (planned,) = plan(*parsed_sweep(*flags))
    numbers = dict.fromkeys((*SHARES, "generated_tokens", "seconds"), 0.5)
    kept = {"label": "grpo", "seed": 0, "flags": shlex.join(planned.flags), **numbers}
    file = tmp_path / "main-DiceSum.json"
    file.write_text(json.dumps({"command": "as it was", "runs": [kept]}))
    monkeypatch.setattr(compare, "execute", None)
    compare.main(flags)
    assert json.loads(file.read_text())["command"] == "as it was"
    assert "| grpo | 1 |" in capsys.readouterr().out


def test_a_comparison_says_that_its_tag_leaves_the_tuning_behind(tmp_path, capsys):
    """Before its first run, and before what is wrong with its methods."""
    (tmp_path / "tune-DiceSum.json").write_text("{}")
    words = ["--experiment", "topk", "--methods", "none", "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        compare.main([*words, "--clip_low", "0.2"])
    assert capsys.readouterr().err.startswith("tune-DiceSum-clip_low_0.2.json is not there:")
