"""tutorial.md: examples that run as they stand, equations that are functions, fresh pictures."""

import contextlib
import io
import json
import re
from operator import itemgetter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import baselines
import sapo
from lab import tutorial_figures
from lab.explorer import TEMPLATE

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tutorial.md").read_text()
SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
EPISODE = json.loads((ROOT / "results" / "episode.json").read_text())


def test_the_examples_run_one_after_the_other_and_print_what_stands_below_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```(?:\n```text\n(.*?)^```)?", TEXT, re.DOTALL | re.M)
    assert len(blocks) > 15
    namespace = {}
    for code, output in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "tutorial.md", "exec"), namespace)
        assert printed.getvalue() == output, code


def test_it_can_be_pasted_into_a_session():
    assert ">>>" not in TEXT


def test_as_a_notebook_it_has_no_cell_but_its_examples():
    """jupytext makes a cell of a block in any language that it knows: of "bash" one that would
    train for minutes before the first example. It takes these three for text."""
    languages = set(re.findall(r"^```(\w+)", TEXT, re.MULTILINE))
    assert languages - {"python"} == {"shell", "text", "mermaid"}


# ---------------------------------------------------------------------------------- equations
def equations_of(text):
    """The numbers of the equations that a text names: "Eq. 6 and 7", "Eq. 1-4", "Eq. 19-26"."""
    numbers = set()
    for first, link, last in re.findall(r"Eq\. (\d+)(?:( and |-)(\d+))?", text):
        numbers.add(int(first))
        if link == "-":
            numbers |= set(range(int(first), int(last) + 1))
        elif link:
            numbers.add(int(last))
    return numbers


TAGGED = [
    (section.splitlines()[0], int(number), section)
    for section in SECTIONS
    for number in re.findall(r"\\tag\{Eq\. (\d+)\}", section)
]


@pytest.mark.parametrize(("title", "number", "section"), TAGGED, ids=[str(n) for _, n, _ in TAGGED])
def test_every_equation_is_a_function_that_its_section_names(title, number, section):
    names = set(re.findall(r"sapo\.(\w+)", section))
    functions = [getattr(sapo, name) for name in names if hasattr(sapo, name)]
    if number == 5:  # not a function but what `ends` is, as the banner in sapo.py says
        assert "(Eq. 5)" in Path(sapo.__file__).read_text()
        return
    assert any(number in equations_of(function.__doc__ or "") for function in functions), title


def test_every_name_of_the_code_exists():
    for module, name in re.findall(r"`(sapo|baselines)\.(\w+)", TEXT):
        assert name == "py" or hasattr({"sapo": sapo, "baselines": baselines}[module], name), name


# ----------------------------------------------------------------------------------- glossary
GLOSSARY = TEXT.split("### F. Glossary")[1]
_HEAD, *ROWS = re.findall(r"^\| ([^|]*) \| ([^|]*)\| .* \|$", GLOSSARY, re.MULTILINE)
WORDS = [word for words, _ in ROWS for word in words.split(", ")]
SIGNS = [sign.strip() for _, signs in ROWS for sign in signs.split(",") if sign.strip()]
# How LaTeX spells a sign; the names of functions and of layout are no signs
SPELLED = {"pi": "π", "gamma": "γ", "lambda": "λ", "delta": "δ", "epsilon": "ε", "mu": "μ"}
SPELLED |= {"nabla": "∇", "mathbb": "𝔼"}
LAYOUT = {"Big", "big", "left", "right", "quad", "qquad", "begin", "end", "tag", "text", "dots"}
LAYOUT |= {"frac", "tfrac", "mid", "in", "lt", "sim"}
LAYOUT |= {"exp", "log", "min", "prod", "sum"}


def signs_of(formula):
    """The letters and signs of a formula in LaTeX: "πyx" of \\pi(y \\mid x)."""
    formula = re.sub(r"\\(text|tag|begin|end)\{[^}]*\}|\\mathbb\{E\}", _spelled, formula)
    formula = re.sub(r"\\([a-zA-Z]+)", _spelled, formula)
    return {char for char in formula if char.isalpha() or char in SPELLED.values()}


def _spelled(found):
    name = re.match(r"\\([a-z]+)", found[0])
    return SPELLED.get(name[1], " ") if name else " "


def test_no_word_and_no_sign_stands_in_the_glossary_twice():
    assert len(WORDS) > 50 and sorted(WORDS) == sorted(set(WORDS))
    assert len(SIGNS) > 25 and sorted(SIGNS) == sorted(set(SIGNS))


def test_the_glossary_has_every_sign_of_the_formulas():
    text = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    shown = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    beside = re.findall(r"\$([^$]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))
    assert len(shown) == 8 and len(beside) > 40
    indexed = "".join(sign.partition("_")[0] if sign[1:2] == "_" else sign for sign in SIGNS)
    explained = indexed.replace("∇ log π(y)", "") + "TMe"  # in the words of a row; Euler's number
    for formula in shown + beside:
        assert set(re.findall(r"\\([a-zA-Z]+)", formula)) <= SPELLED.keys() | LAYOUT, formula
        assert signs_of(formula) <= set(explained), formula
    assert signs_of(r"\mathbb{E}_{y \sim \pi}\big[ \tfrac{1}{L} \big]") == set("𝔼yπL")


def test_the_glossary_has_every_word_that_the_text_introduces():
    """In bold, where it is not the head of a paragraph."""
    said = re.findall(r"\*\*([a-z][a-z -]+|[A-Z][A-Za-z ]+)\*\*", TEXT)
    heads = {"Not", "bad habits", "A critic", "A segment", "Every token", "The whole answer"}
    words = {word.lower().rstrip("s") for word in WORDS} | {"hear"}
    assert len(said) > 25
    for word in set(said) - heads:
        assert word.lower().rstrip("s") in words, word


# ------------------------------------------------------------------------------ what it says
def test_the_minutes_make_forty_five():
    minutes = re.findall(r"^\| \[\d+\. [^|]*\| (\d+) \|", TEXT, re.MULTILINE)
    assert len(minutes) == 9 and sum(map(int, minutes)) == 45  # the exercises not counted


def test_the_sum_by_hand_is_of_the_episode():
    """To three digits, as it is written there."""
    entropy, values, _, mask = tutorial_figures.tensors(EPISODE)
    starts = sapo.boundaries(sapo.entropy_ends(entropy, mask, 0.05), mask)
    first, second, third = (round(value, 3) for value in values[starts].tolist())
    by_hand = {}
    for line in re.findall(r"^delta_.*$", TEXT, re.MULTILINE):
        for part in re.split(r"\s+(?=[AR]_\d =)", line):
            by_hand[part[: part.index(" =")]] = float(part.split("=")[-1])
    delta = [second - first, third - second, -third]
    advantage = [0.0, 0.0, delta[2]]
    advantage[1] = delta[1] + 0.5 * advantage[2]
    advantage[0] = delta[0] + 0.5 * advantage[1]
    for m, value in enumerate((first, second, third)):
        assert by_hand[f"delta_{m + 1}"] == pytest.approx(delta[m], abs=1e-3)
        assert by_hand[f"A_{m + 1}"] == pytest.approx(advantage[m], abs=1e-3)
        assert by_hand[f"R_{m + 1}"] == pytest.approx(advantage[m] + value, abs=1.1e-3)


def test_the_right_digit_hardly_moved_and_the_wrong_one_did():
    wrong, right = EPISODE["digits"].values()
    assert wrong["written"] == "5" and wrong["after"][5] < wrong["before"][5] - 0.05
    assert wrong["after"][6] > wrong["before"][6] + 0.05
    assert abs(right["after"][5] - right["before"][5]) < 0.01


def test_the_baselines_and_the_guard_are_what_the_text_says():
    text = " ".join(TEXT.split())
    assert f"half-way through the run, 0 − {EPISODE['baseline']:.2f}.)" in text
    assert f"less that model's mean reward, 0 − {-EPISODE['step']['advantage']:.2f} " in text
    assert f"`target_kl`, {sapo.SAPOConfig().target_kl} in `train.py`" in text


def test_the_titles_of_the_pictures_of_credit_are_true():
    entropy, _, _, mask = tutorial_figures.tensors(EPISODE)
    first, last = tutorial_figures.wrong_span(EPISODE)
    cut = sapo.entropy_ends(entropy, mask)
    for ends in (sapo.token_ends(mask), cut):  # "the others most of all the slip"
        row = tutorial_figures.gae_row(EPISODE, ends, sapo.SAPOConfig().lam)
        assert first <= row.index(min(row)) <= last
    before = []  # "the smaller lambda is, the fewer segments before the slip are blamed"
    for lam in tutorial_figures.LAMBDAS:
        row = tutorial_figures.gae_row(EPISODE, cut, lam)
        before.append(sum(advantage < 0 for advantage in row[:first]))
    assert before == sorted(before) and before[0] == 0 < before[-1]


def test_one_critic_sees_the_slip_and_the_other_does_not():
    first, last = tutorial_figures.wrong_span(EPISODE)
    for values, falls in ((EPISODE["token_values"], True), (EPISODE["blind_values"], False)):
        assert (values[first] - values[last + 1] > 0.3) == falls


def test_the_broken_runs_broke_and_their_divergence_told_of_it():
    runs = json.loads(tutorial_figures.REUSE.read_text())["runs"]
    whole = [json.loads(line) for line in tutorial_figures.RUN.read_text().splitlines()]
    largest = max(row["approx_kl"] for row in whole if "approx_kl" in row)
    assert f"at most {largest:.3f} in the run above" in " ".join(TEXT.split())
    other = json.loads((ROOT / "results" / "default-sapo-seed2.json").read_text())["mechanism"]
    furthest = other["largest_approx_kl"]
    assert largest < sapo.SAPOConfig().target_kl < furthest
    assert f"and {furthest:.3f} on seed 2, just beyond it." in " ".join(TEXT.split())
    for run in runs:
        if run["seed"] == 0 and run["label"] in tutorial_figures.BROKEN:
            accuracy = run["curve"]["accuracy"]
            assert accuracy[-1] < max(accuracy) - 0.3
            assert max(run["curve"]["approx_kl"]) > max(10 * largest, tutorial_figures.WARNING)
    assert f"| `approx_kl` | stay below {tutorial_figures.WARNING} |" in TEXT


# ---------------------------------------------------------------------------------- pictures
PICTURES = re.findall(r"\]\(results/tutorial-(\w+)\.svg\)", TEXT)


def test_every_picture_that_is_drawn_is_shown():
    drawn = {path.stem.removeprefix("tutorial-") for path in ROOT.glob("results/tutorial-*.svg")}
    assert sorted(PICTURES) == sorted(drawn) and len(drawn) == 8


@pytest.mark.parametrize("name", PICTURES)
def test_no_picture_is_stale(name):
    """Each holds the hash of its data and of the code that draws it."""
    made_of = tutorial_figures.made_of(name)
    again = "draw them again: python -m lab.figures tutorial"
    assert made_of in (ROOT / "results" / f"tutorial-{name}.svg").read_text(), again


@pytest.mark.parametrize(("name", "task"), [("credit", "DiceSum"), ("treasure-credit", "Treasure")])
def test_a_committed_page_is_of_todays_template(name, task):
    """Written anew by lab.explorer.explorer(folder): of a default run, of a small Treasure."""
    page = (ROOT / "results" / f"{name}.html").read_text()
    (data,) = re.findall(r'id="data">(.*)</script>', page)
    assert page == TEMPLATE.read_text().replace("__DATA__", data)
    assert len(page) < 400_000 and json.loads(data)["title"] == f"SAPO on {task}, seed 0"


def drawn_answers(path):
    """Of a credit map: [[(text, advantage) of each token] of each answer], from its cells."""
    answers = []
    for group in ElementTree.parse(path).iterfind(".//{*}g[@class='token']"):
        place, number = re.match(r"token (\d+): advantage (.\d+\.\d+)", group[0].text).groups()
        if place == "0":
            answers.append([])
        shown = group.find("{*}text").text.replace("·", " ")
        answers[-1].append((shown, float(number.replace("−", "-"))))
    return answers


@pytest.mark.parametrize("name", ["credit", "treasure-credit"])
def test_a_committed_picture_and_its_page_show_the_same_answers_of_one_run(name):
    path = ROOT / "results" / f"{name}.svg"
    (page,) = re.findall(r'id="data">(.*)</script>', path.with_suffix(".html").read_text())
    page = json.loads(page)
    shown = {}
    for checkpoint in page["checkpoints"]:
        title = f"Where the credit went: {page['title']}, {checkpoint['name']}"
        shown[title] = [
            [(t, round(a, 3)) for t, a, written in zip(*told, strict=True) if written]
            for told in map(itemgetter("tokens", "advantages", "written"), checkpoint["responses"])
        ]
    of_picture = shown[ElementTree.parse(path).find("{*}title").text]
    assert of_picture is shown[title.removesuffix(", learned from")], "the last checkpoint"
    assert drawn_answers(path)
    for answer in drawn_answers(path):
        assert answer in of_picture, (
            "of another run: draw both by python -m lab.figures runs/<name>"
        )


def test_the_update_in_the_committed_page_moved_what_the_text_says():
    (data,) = re.findall(r'id="data">(.*)</script>', (ROOT / "results" / "credit.html").read_text())
    (checkpoint,) = [c for c in json.loads(data)["checkpoints"] if c["key"] == "30-learned"]
    moved = {True: [], False: []}  # the ratios other than 1.00, of right answers and of wrong ones
    largest = {True: 0.0, False: 0.0}  # praise or blame
    expected = []  # V before the first token of the wrong answers
    for response in checkpoint["responses"]:
        logp, new_logp = (torch.tensor([response[key]]) for key in ("logp", "new_logp"))
        ends, mask = (torch.tensor([response[key]]) for key in ("ends", "written"))
        ratio = sapo.segment_ratio(new_logp, logp, ends, mask)[ends & mask].tolist()
        won = bool(response["won"])
        credit = torch.tensor([response["advantages"]])[ends & mask].tolist()
        strayed = [(r, a) for r, a in zip(ratio, credit, strict=True) if f"{r:.2f}" != "1.00"]
        assert all(advantage > 0 for _, advantage in strayed), "none of them was blamed"
        moved[won] += [f"{one:.2f}" for one, _ in strayed]
        largest[won] = max(largest[won], *map(abs, response["advantages"]))
        expected += [] if won else [response["values"][0]]
    text = " ".join(TEXT.split())
    lost = sum(not response["won"] for response in checkpoint["responses"])
    assert (len(checkpoint["responses"]), lost) == (6, 2) and "Two were wrong." in text
    assert f"to praise (at most {largest[True]:.2f}), and all their ratios are 1.00." in text
    assert moved[True] == []
    assert "unsure ({}, {} and {}). None".format(*moved[False]) in text
    assert f"to blame (at most {largest[False]:.2f})" in text
    assert f"expected {expected[0]:.2f} and {expected[1]:.2f} from the start" in text
    clip = baselines.SETTINGS["sapo"]["clip_low"]
    assert f"stays at 0.94, beyond the clip at {1 - clip:g}." in text and 1 - clip > 0.94
    for said in ("and {} in `train.py`.)", "(0.2 in the picture, {} in `train.py`)"):
        assert said.format(clip) in text
    assert f"`train.py` runs SAPO at {clip} (`baselines.SETTINGS`)" in text


def test_all_of_them_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(tutorial_figures, "RESULTS", tmp_path)
    paths = list(tutorial_figures.drawn())
    assert len(paths) == 8 and all("<path" in path.read_text() for path in paths)


def test_the_tokens_of_a_cut_are_tinted_by_their_advantage():
    entropy, _, _, mask = tutorial_figures.tensors(EPISODE)
    cut = sapo.entropy_ends(entropy, mask)
    row = tutorial_figures.gae_row(EPISODE, cut, 0.0)
    first, _ = tutorial_figures.wrong_span(EPISODE)
    assert min(row) == row[first], "at lambda 0 the slip is blamed most"
    assert torch.tensor(row).isfinite().all()
