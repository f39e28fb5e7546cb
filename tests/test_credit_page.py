"""lab/credit_page.py on samples written here: what it promises to draw, to escape and to refuse."""

import re
from xml.etree import ElementTree

import pytest
from run_files import finished_run, png, sample, write_lines

from lab.common import GREEN
from lab.credit_page import credit_map

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


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)


def draw(run, samples, **options):
    """The credit map of these samples: the parsed SVG."""
    write_lines(run, "samples.jsonl", samples)
    assert credit_map(run, **options) == run / "credit.svg"
    return ElementTree.fromstring((run / "credit.svg").read_text(encoding="utf-8"))


def of_class(root, name):
    """The elements of the drawing that have this class."""
    return [element for element in root.iter() if name in element.get("class", "").split()]


def tints(root):
    """Fill of each token cell, as (red, green, blue)."""
    fills = [group.find("{*}rect").get("fill") for group in of_class(root, "token")]
    return [tuple(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for fill in fills]


# ------------------------------------------------------------------------------ what is drawn


def test_only_what_is_held_out_is_drawn(run):
    """Not what the policy had just learned from, which the explorer shows beside it."""
    learned = sample(list("ABC"), learned_from=True, new_logp=[-1.0] * 3)
    root = draw(run, [learned, sample(list("held")), learned])
    assert len(of_class(root, "token")) == len("held")


def test_a_cell_per_token_and_a_mark_per_end(run):
    texts = [list("<see>3526</see>") * repeat for repeat in (1, 2, 15)]
    samples = [sample(text, reward) for text, reward in zip(texts, (1, 0, 1), strict=True)]
    root = draw(run, samples)
    marks = len(of_class(root, "cut")) - 1  # one more explains it in the legend
    assert len(of_class(root, "token")) == sum(len(text) for text in texts)
    assert marks == sum(sum(response["ends"]) for response in samples)
    width = float(root.get("width"))
    for group in of_class(root, "token"):
        cell = group.find("{*}rect")
        left = float(cell.get("x"))
        assert left >= 0 and left + float(cell.get("width")) <= width  # long ones wrap


def test_the_tint_says_sign_and_size_of_the_advantage(run):
    advantages = [0.0, 0.1, 0.5, 1.0, -0.1, -0.5, -1.0, None]
    root = draw(run, [sample(list("abcdefgh"), advantages=advantages)])
    zero, *signed, missing = tints(root)
    assert zero == (255, 255, 255)
    assert len(set(missing)) == 1 and missing != zero  # grey
    credit, blame = signed[:3], signed[3:]
    assert all(blue > red for red, _, blue in credit)
    assert all(red > blue for red, _, blue in blame)
    for colours in (credit, blame):  # from faint to full
        brightness = [sum(colour) for colour in colours]
        assert brightness == sorted(brightness, reverse=True)


def test_one_colour_scale_for_the_whole_page(run):
    samples = [sample(["a"], advantages=[4.0]), sample(["b"], advantages=[0.4])]
    big, small = tints(draw(run, samples))
    assert sum(big) < sum(small) < 3 * 255


def test_a_page_without_any_advantage_is_white(run):
    """The colour scale has nothing to divide by."""
    fills = tints(draw(run, [sample(["a"], advantages=[0.0])]))
    assert fills == [(255, 255, 255)]


@pytest.mark.parametrize("count, expected", [(1, "✓"), (2, "✓✗"), (3, "✓✗✓"), (6, "✓✗✓✓")])
def test_right_and_wrong_responses_of_the_last_iteration_by_turns(run, count, expected):
    """Of the four that there are."""
    credit_map(run, count=count)
    text = (run / "credit.svg").read_text(encoding="utf-8")
    assert "".join(re.findall("[✓✗]", text)) == expected
    assert "early" not in text


def test_examples_are_drawn_in_the_order_they_are_asked_for(run):
    samples = [sample(list(word), example_id=f"eval/{word}") for word in ("ab", "cd", "ef")]
    root = draw(run, samples, examples=["eval/ef", "eval/ab"])
    assert "".join(group.find("{*}text").text for group in of_class(root, "token")) == "efab"
    with pytest.raises(
        ValueError, match="no response to 'eval/7' in the last iteration; .* eval/ab, eval/cd"
    ):
        credit_map(run, examples=["eval/7"])


def test_wrong_steps_are_underlined_and_right_ones_are_not(run):
    steps = [[0, 1, True], [2, 4, False]]
    in_legend = 1
    root = draw(run, [sample(list("abcdef"), steps=steps)])
    assert len(of_class(root, "wrong")) == 3 + in_legend
    root = draw(run, [sample(list("abcdef"))])
    assert len(of_class(root, "wrong")) == in_legend


@pytest.mark.parametrize("key", ["values", "entropy", "image", "predicted", "prompt", "steps"])
def test_what_may_be_absent(run, key):
    null = sample(list("3+5=8"), **{key: None})
    absent = {name: value for name, value in null.items() if name != key}
    for fields in (null, absent):
        root = draw(run, [fields])
        assert len(of_class(root, "token")) == 5
        assert len(of_class(root, "value")) == (0 if key == "values" else 1)
        assert len(of_class(root, "entropy")) == (0 if key == "entropy" else 1)


def test_numbers_that_are_not_finite_leave_a_gap(run):
    values = [0.1, float("nan"), 0.3]
    advantages = [float("nan"), 0.1, float("inf")]
    root = draw(run, [sample(list("abc"), values=values, advantages=advantages)])
    (curve,) = of_class(root, "value")
    path = curve.get("d")
    assert path.count("M") == 2 and "nan" not in path


# --------------------------------------------------------------------------- what is kept out


def test_a_game_is_shown_turn_by_turn(run):
    tokens = list("<go><go><up>")
    turns = [
        {"first": first, "last": first + 3, "said": said, "image": png()}
        for first, said in ((0, "Begin.\nA map"), (4, "A wall."), (8, "<Go on>"))
    ]
    played = sample(tokens, turns=turns, values=[i / 10 for i in range(12)])
    played["steps"] = [[9, 10, False]]
    root = draw(run, [played])
    drawn = ["".join(element.itertext()) for element in of_class(root, "heard")]
    assert [said for said in drawn if said[0].isdigit()] == [
        "1. Begin.",
        "2. A wall.",
        "3. <Go on>",
    ]
    # the value where a turn begins, as a number and as a bar
    assert [value for value in drawn if value[0] == "V"] == ["V 0.00", "V 0.40", "V 0.80"]
    bars = [
        float(bar.get("height")) for bar in root.findall(".//{*}rect") if bar.get("fill") == GREEN
    ]
    assert bars[0] == 0 and bars[2] == pytest.approx(2 * bars[1], abs=0.2)
    assert len(root.findall(".//{*}image")) == 3 and len(of_class(root, "token")) == 12
    # side by side, and no token in two of them
    lefts = [float(element.get("x")) for element in root.findall(".//{*}image")]
    assert lefts == sorted(set(lefts))
    assert not of_class(root, "map"), "the picture is seen"


def test_where_there_is_no_picture_the_lines_of_a_map_are_drawn(run):
    world = "Find it.\n ?#\n<b>@\n" + "a word " * 99
    turns = [{"first": 0, "last": 1, "said": world}, {"first": 2, "last": 3, "said": "Go on.\n.#"}]
    played = sample(list("abcd"), turns=turns, prompt=world, image=None)
    root = draw(run, [played])
    lines = ["".join(line.itertext()) for line in of_class(root, "map")]
    assert lines[:2] == ["\u00a0?#", "<b>@"] and lines[-2:] == ["…", ".#"]
    assert max(map(len, lines)) <= 24 and len(lines) == 9
    said = "\n".join("".join(element.itertext()) for element in root.findall(".//{*}text"))
    assert said.count("Find it.") == 1, "the first turn says it"
    assert "V 0.00" in said and "V 0.50" in said


def test_five_turns_stand_in_a_row(run):
    turns = [{"first": i, "last": i, "said": "Go on.", "image": png()} for i in range(6)]
    root = draw(run, [sample(list("abcdef"), turns=turns)])
    places = [(element.get("x"), element.get("y")) for element in root.findall(".//{*}image")]
    lefts, tops = zip(*places, strict=True)
    assert len(set(tops[:5])) == 1 and len(set(lefts[:5])) == 5
    assert lefts[5] == lefts[0] and tops[5] != tops[0]


def test_the_head_explains_what_is_drawn_and_nothing_else(run):
    def head(samples):
        root = draw(run, samples)
        texts = ["".join(element.itertext()) for element in root.findall("{*}text")]
        return {word for word in ("Entropy:", "Value:", "V:") if any(word in t for t in texts)}

    turns = [{"first": 0, "last": 3, "said": "Begin."}]
    assert head([sample(list("abcd"))]) == {"Entropy:", "Value:"}
    assert head([sample(list("abcd"), values=None)]) == {"Entropy:"}
    assert head([sample(list("abcd"), turns=turns)]) == {"V:"}


def test_the_entropy_is_drawn_on_a_log_scale_and_named_beside_it(run):
    """0.001, 0.01 and 0.1 nats are as far from each other; a value below 0 has a minus sign."""
    values = [-0.5, 0.0, 1.0]
    root = draw(run, [sample(list("abc"), entropy=[0.001, 0.01, 0.1], values=values)])
    (path,) = of_class(root, "entropy")
    bottom, middle, top = map(float, re.findall(r"(?:M[\d.]+ |V)([\d.]+)", path.get("d")))
    assert bottom - middle == pytest.approx(middle - top, abs=0.11) and middle - top > 5
    texts = {"".join(text.itertext()): text for text in of_class(root, "small")}
    assert {"0.1", "0.001", "1", "−0.5"} <= set(texts)
    ends = {name: float(text.get("x")) for name, text in texts.items()}
    widest = 6 * 6  # of a number, in pixels
    assert ends["entropy"] <= ends["0.001"] - widest and ends["value"] <= ends["−0.5"] - widest


@pytest.mark.parametrize(
    ("told", "mark"),
    [({"reward": 0.2}, "✓ won"), ({"reward": 0.2, "correct": False}, "✗ not won")],
)
def test_a_game_is_won_where_it_says_so_and_else_where_it_earns(run, told, mark):
    played = sample(list("<go>"), turns=[{"first": 0, "last": 3, "said": "Begin."}])
    (head,) = of_class(draw(run, [{**played, **told}]), "head")
    assert "".join(head.itertext()).startswith(mark)


def test_right_and_wrong_take_turns_by_what_a_row_says(run):
    rows = [(0.9, False), (0.1, True), (0.9, False), (0.1, True)]
    written = [
        sample(list("ab"), reward, correct=correct, predicted=str(i))
        for i, (reward, correct) in enumerate(rows)
    ]
    heads = ["".join(head.itertext()) for head in of_class(draw(run, written), "head")]
    assert [head[:7] for head in heads] == ["✓ right", "✗ wrong"] * 2


def test_a_game_without_pictures_and_values_is_shown_too(run):
    turns = [{"first": 0, "last": 3, "said": "Begin."}]
    played = sample(list("<go>"), turns=turns)
    del played["values"]
    assert len(of_class(draw(run, [played]), "token")) == 4


def test_hostile_text_is_shown_and_never_markup(run):
    hostile = "".join(HOSTILE)
    fields = {"prompt": hostile, "answer": hostile, "predicted": hostile, "steps": []}
    root = draw(run, [sample(HOSTILE, image='"/><script>', **fields)])
    assert len(of_class(root, "token")) == len(HOSTILE)
    shown = [group.find("{*}text").text for group in of_class(root, "token")]
    assert shown[:8] == ["<script>", "&", "␀", "\ufffd", "⏎", "·", "\ufffd", "\ufffd"]
    assert shown[8:13] == ["]]>", '"', "é", "骰子", "🎲"]
    assert len(shown[-1]) < 30
    for name in ("credit.svg",):
        text = (run / name).read_text(encoding="utf-8")
        assert "<script" not in text
        assert all(char == "\n" or char >= " " for char in text)


def test_no_request_leaves_the_page(run):
    credit_map(run)
    for name in ("credit.svg",):
        text = (run / name).read_text(encoding="utf-8")
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("url(#scale)", "")
        assert "http" not in text and "url(" not in text and "@import" not in text
        assert set(re.findall(r'(?:href|src)="(.{0,21})', text)) == {"data:image/png;base64"}


# ---------------------------------------------------------------------------- what is refused


def test_lists_of_other_lengths_than_the_tokens_are_named(run):
    where = r"samples.jsonl, iteration 4, example 7: 1 ends for 3 tokens"
    with pytest.raises(ValueError, match=where):
        draw(run, [sample(list("abc"), ends=[True])])


@pytest.mark.parametrize(
    "step", [[0, 10**12, False], [-1, 1, False], [2, 1, False], [0, 1], [0, 1, "no"], 7]
)
def test_steps_that_are_none_are_named_before_they_are_drawn(run, step):
    with pytest.raises(ValueError, match="example 7: the step .*within 3 tokens"):
        draw(run, [sample(list("abc"), steps=[step])])


def test_steps_that_are_no_list_are_named(run):
    with pytest.raises(ValueError, match="example 7: steps 5, expected a list"):
        draw(run, [sample(list("abc"), steps=5)])


def test_missing_keys_are_named(run):
    with pytest.raises(ValueError, match="example 7: no tokens, reward"):
        draw(run, [sample(list("abc")) | {"tokens": None, "reward": None}])


def test_a_map_of_no_response_is_refused(run):
    with pytest.raises(ValueError, match="count is 0"):
        credit_map(run, count=0)
