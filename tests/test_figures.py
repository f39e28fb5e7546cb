"""figures.py on files written here: what it promises to draw, to escape and to refuse."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

import figures

HOSTILE = [
    "<script>",
    "&",
    "\x00",
    "\ud800",
    "\n",
    " ",
    "\u202e",
    "\uffff",
    "]]>",
    '"',
    "é",
    "骰子",
    "🎲",
    "",
    "x" * 500,
]


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (0, 120, 80)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def sample(tokens, reward=1.0, iteration=4, **changes):
    n = len(tokens)
    fields = {
        "iteration": iteration,
        "example_id": 7,
        "prompt": "Add up the dice.",
        "image": png(),
        "answer": "16",
        "predicted": "16" if reward else "15",
        "reward": reward,
        "tokens": tokens,
        "entropy": [0.1 * (i % 5) for i in range(n)],
        "values": [i / n for i in range(n)],
        "advantages": [(-1) ** i * i / n for i in range(n)],
        "ends": [i % 3 == 2 or i == n - 1 for i in range(n)],
        "method": "sapo",
        "cut": "topk",
    }
    return fields | changes


def write(folder, name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """A finished run of 20 iterations, evaluated at 0, 10 and 20, with four responses sampled at 0 and at 4."""
    train = [
        {
            "iteration": i,
            "accuracy": 0.5 + i / 50,
            "entropy": 0.3 - i / 100,
            "value_loss": 0.2 / i,
            "clip_fraction": 0.1,
        }
        for i in range(1, 21)
    ]
    evaluation = [
        {"iteration": i, "eval_accuracy": 0.5 + i / 50, "eval_low": 0.45 + i / 50, "eval_high": 0.55 + i / 50}
        for i in (0, 10, 20)
    ]
    write(tmp_path, "metrics.jsonl", evaluation[:1] + train[:10] + evaluation[1:2] + train[10:] + evaluation[2:])
    early = [sample(["early"], iteration=0)]
    late = [sample(list("<3526> 16"), reward) for reward in (1.0, 1.0, 1.0, 0.0)]
    write(tmp_path, "samples.jsonl", early + late)
    (tmp_path / "config.json").write_text(json.dumps({"method": "sapo", "env": "SAPO/DiceSum-v0", "seed": 3}))
    return tmp_path


def draw(run, samples, **options):
    """The credit map of these samples: the parsed SVG, after the page was seen to hold the same drawing."""
    write(run, "samples.jsonl", samples)
    assert figures.credit_map(run, **options) == run / "credit.html"
    svg = (run / "credit.svg").read_text(encoding="utf-8")
    assert svg in (run / "credit.html").read_text(encoding="utf-8")
    return ElementTree.fromstring(svg)


def of_class(root, name):
    return [element for element in root.iter() if name in element.get("class", "").split()]


def tints(root):
    """Fill of each token cell, as (red, green, blue)."""
    fills = [group.find("{*}rect").get("fill") for group in of_class(root, "token")]
    return [tuple(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for fill in fills]


# The learning curve


def test_learning_curve_is_a_picture_of_the_promised_size(run):
    path = figures.learning_curve(run)
    assert path == run / "learning_curve.png"
    with Image.open(path) as picture:
        assert picture.size == (1800, 600)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 20)}
    for colour in (figures.BLUE, figures.VERMILLION, figures.PURPLE, figures.GREEN):
        assert tuple(bytes.fromhex(colour[1:])) in colours  # batch accuracy, held-out accuracy, entropy, value loss


@pytest.mark.parametrize(
    "lines",
    [
        [{"iteration": 0, "eval_accuracy": 0.5, "eval_low": 0.4, "eval_high": 0.6}],
        [
            {"iteration": 0, "eval_accuracy": 0.5, "eval_low": None},
            {"iteration": 1, "accuracy": 0.5, "value_loss": None},
        ],
        [{"iteration": 1, "accuracy": 0.5, "entropy": float("nan")}],
        [{"iteration": i, "accuracy": 0.5, "entropy": 0.2} for i in (*range(1, 30), 20, 21)],  # resumed at 20
        [{"iteration": 3}],
    ],
    ids=["only the warm start", "nulls", "nan", "resumed", "no metric"],
)
def test_learning_curve_draws_what_there_is(run, lines):
    write(run, "metrics.jsonl", lines)
    (run / "config.json").unlink()
    assert figures.learning_curve(run).stat().st_size > 10_000


def test_without_matplotlib_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib") as caught:
        figures.learning_curve(run)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    figures.credit_map(run)  # needs none


def test_importing_figures_does_not_import_matplotlib():
    program = "import sys, figures; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(figures.__file__).parent, check=True)


# The credit map


def test_a_cell_per_token_and_a_mark_per_end(run):
    samples = [sample(list("<see>3526</see>") * repeat, reward=repeat % 2) for repeat in (1, 2, 15)]
    root = draw(run, samples)
    marks = len(of_class(root, "cut")) - 1  # one more explains it in the legend
    assert len(of_class(root, "token")) == sum(len(s["tokens"]) for s in samples)
    assert marks == sum(sum(s["ends"]) for s in samples)
    width = float(root.get("width"))
    for group in of_class(root, "token"):
        cell = group.find("{*}rect")
        assert 0 <= float(cell.get("x")) and float(cell.get("x")) + float(cell.get("width")) <= width  # long ones wrap


def test_the_tint_says_sign_and_size_of_the_advantage(run):
    advantages = [0.0, 0.1, 0.5, 1.0, -0.1, -0.5, -1.0, None]
    zero, *rest, missing = tints(draw(run, [sample(list("abcdefgh"), advantages=advantages)]))
    assert zero == (255, 255, 255) and len(set(missing)) == 1 and missing != zero
    credit, blame = rest[:3], rest[3:]
    assert all(blue > red for red, _, blue in credit) and all(red > blue for red, _, blue in blame)
    assert [sum(colour) for colour in credit] == sorted((sum(colour) for colour in credit), reverse=True)
    assert [sum(colour) for colour in blame] == sorted((sum(colour) for colour in blame), reverse=True)


def test_one_colour_scale_for_the_whole_page(run):
    big, small = tints(draw(run, [sample(["a"], advantages=[4.0]), sample(["b"], advantages=[0.4])]))
    assert sum(big) < sum(small) < 3 * 255
    assert draw(run, [sample(["a"], advantages=[0.0])]) is not None  # no advantage at all: nothing to divide by


def test_right_and_wrong_responses_of_the_last_iteration_by_turns(run):
    for count, expected in [(1, "✓"), (2, "✓✗"), (3, "✓✗✓"), (6, "✓✗✓✓")]:  # there are four
        figures.credit_map(run, count=count)
        text = (run / "credit.svg").read_text(encoding="utf-8")
        assert "".join(re.findall("[✓✗]", text)) == expected and "early" not in text


def test_wrong_steps_are_underlined_and_right_ones_are_not(run):
    steps = [[0, 1, True], [2, 4, False]]
    assert len(of_class(draw(run, [sample(list("abcdef"), steps=steps)]), "wrong")) == 3 + 1  # + 1 in the legend
    assert len(of_class(draw(run, [sample(list("abcdef"))]), "wrong")) == 1


def test_hostile_text_is_shown_and_never_markup(run):
    hostile = "".join(HOSTILE)
    root = draw(
        run, [sample(HOSTILE, prompt=hostile, answer=hostile, predicted=hostile, image='"/><script>', steps=[])]
    )
    assert len(of_class(root, "token")) == len(HOSTILE)
    shown = [group.find("{*}text").text for group in of_class(root, "token")]
    assert shown[:8] == ["<script>", "&", "␀", "\ufffd", "⏎", "·", "\ufffd", "\ufffd"]
    assert shown[8:13] == ["]]>", '"', "é", "骰子", "🎲"] and len(shown[-1]) < 30
    for name in ("credit.svg", "credit.html"):
        text = (run / name).read_text(encoding="utf-8")
        assert "<script" not in text
        assert all(char == "\n" or char >= " " for char in text)


def test_no_request_leaves_the_page(run):
    figures.credit_map(run)
    for name in ("credit.svg", "credit.html"):
        text = (run / name).read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http" not in text and "url(" not in text.replace("url(#scale)", "") and "@import" not in text
        assert set(re.findall(r'(?:href|src)="(.{0,21})', text)) == {"data:image/png;base64"}


@pytest.mark.parametrize("key", ["values", "entropy", "image", "predicted", "prompt", "steps"])
def test_what_may_be_absent(run, key):
    null = sample(list("3+5=8"), **{key: None})
    absent = {name: value for name, value in null.items() if name != key}
    for fields in (null, absent):
        root = draw(run, [fields])
        assert len(of_class(root, "token")) == 5
        assert len(of_class(root, "value")) == (key != "values") and len(of_class(root, "entropy")) == (
            key != "entropy"
        )


def test_numbers_that_are_not_finite_leave_a_gap(run):
    root = draw(
        run, [sample(list("abc"), values=[0.1, float("nan"), 0.3], advantages=[float("nan"), 0.1, float("inf")])]
    )
    (path,) = (element.get("d") for element in of_class(root, "value"))
    assert path.count("M") == 2 and "nan" not in path


# What is refused, and how


@pytest.mark.parametrize(
    "make, name", [(figures.learning_curve, "metrics.jsonl"), (figures.credit_map, "samples.jsonl")]
)
def test_missing_empty_and_torn_files(run, make, name):
    path = run / name
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index(b"\n") // 2])  # killed while it wrote a line
    make(run)
    path.write_bytes(whole.replace(b"\n", b"\n\n") + b'{"iteration": "\xe2')  # inside a character; blank lines
    make(run)
    for text, message in [
        ("", "no complete line"),
        ('{"iter', "no complete line"),
        ("[1]\n", "line 1: no object"),
        ('{"a": 1}\n', "line 1: no object"),
        ('{"iter\n{"iteration": 1}\n', "line 1 is not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            make(run)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        make(run)


def test_samples_that_do_not_fit_together_are_named(run):
    with pytest.raises(ValueError, match=r"samples.jsonl, iteration 4, example 7: 1 ends for 3 tokens"):
        draw(run, [sample(list("abc"), ends=[True])])
    with pytest.raises(ValueError, match="example 7: no tokens, reward"):
        draw(run, [sample(list("abc"), reward=1.0) | {"tokens": None, "reward": None}])
    with pytest.raises(ValueError, match="count is 0"):
        figures.credit_map(run, count=0)


def test_the_command_draws_both_or_says_why_not_in_one_line(run, tmp_path):
    command = [sys.executable, figures.__file__]
    done = subprocess.run([*command, str(run), "--count", "2"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [str(run / "learning_curve.png"), str(run / "credit.html")]
    for folder, message in [(tmp_path / "none", "is no folder"), (tmp_path / "empty", "metrics.jsonl is missing")]:
        if "empty" in folder.name:
            folder.mkdir()
        failed = subprocess.run([*command, str(folder)], capture_output=True, text=True)
        assert failed.returncode == 1 and message in failed.stderr and failed.stderr.count("\n") == 1
