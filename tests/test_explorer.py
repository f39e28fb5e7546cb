"""lab/explorer.py: the page computes what sapo.py computes, keeps to itself, and trusts no text.

In headless Chromium, driven by Playwright. Without them these tests skip, unless the variable
SAPO_NEEDS_CHROMIUM is set.
"""

import io
import json
import math
import os
import re
import shutil
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import finished_run, png, sample, write_lines

import baselines
import sapo
from lab.explorer import (
    LEARNED_FROM,
    RESPONSES,
    explorer,
    fall_at_first_wrong_step,
    perfect_values,
)

needed = bool(os.environ.get("SAPO_NEEDS_CHROMIUM"))
chromium = shutil.which("chromium") or shutil.which("chromium-browser")
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    chromium = None
if chromium is None and not needed:
    pytest.skip("needs: pip install playwright, and chromium", allow_module_level=True)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end nothing has been complained of, and nothing asked for."""
    complaints, requests, contexts = [], [], []

    def opened(file, fragment="", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{file}{fragment}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def batch(rows, T, seed):
    """Random (written, entropy, values, rewards), (rows, T) each; holes, padding, and ties."""
    generator = torch.Generator().manual_seed(seed)
    written = torch.rand(rows, T, generator=generator) < 0.8
    written[:, 0] = True
    entropy = (torch.rand(rows, T, generator=generator) * 8).round() / 8
    values = torch.rand(rows, T, generator=generator, dtype=torch.float64)
    rewards = torch.rand(rows, T, generator=generator, dtype=torch.float64) * written
    return written, entropy.double(), values, rewards


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_the_page_computes_what_sapo_computes(run, open_page, seed):
    page = open_page(explorer(run))
    written, entropy, values, rewards = batch(16, 23, seed)
    for k, gamma, lam, at in [
        (0.3, 1.0, 0.7, "start"),
        (0.05, 0.9, 0.0, "end"),
        (1.0, 0.5, 1.0, "start"),
    ]:
        ends = sapo.entropy_ends(entropy, written, k)
        expected = sapo.segment_gae(rewards, values, ends, written, gamma, lam, at)
        for row in range(len(written)):
            arguments = [x[row].tolist() for x in (entropy, written, rewards, values)]
            found = page.evaluate(
                """([entropy, written, rewards, values, k, ...how]) => {
                    const ends = Credit.entropyEnds(entropy, written, k);
                    return {ends, ...Credit.segmentGae(rewards, values, ends, written, ...how)};
                }""",
                [*arguments, k, gamma, lam, at],
            )
            assert found["ends"] == ends[row].tolist()
            for name, tensor in zip(("advantages", "returns"), expected, strict=True):
                np.testing.assert_allclose(found[name], tensor[row].tolist(), atol=1e-6)


@pytest.mark.parametrize("kind", sapo.RATIOS)
def test_the_ratio_is_that_of_sapo(run, open_page, kind):
    page = open_page(explorer(run))
    written, entropy, logp, new_logp = batch(16, 23, 3)
    logp[0], new_logp[0] = -30.0, 5.0  # beyond where a log-ratio is clamped
    ends = sapo.entropy_ends(entropy, written, 0.3)
    expected = sapo.importance_ratio(new_logp, logp, ends, written, kind)
    for row in range(len(written)):
        arguments = [x[row].tolist() for x in (logp, new_logp, ends, written)]
        found = page.evaluate("a => Credit.importanceRatio(...a).ratios", [kind, *arguments])
        np.testing.assert_allclose(found, expected[row].tolist(), rtol=1e-6)


def learned_from():
    """A response of four segments, after the update: the first two and the last were praised."""
    row = response(iteration=8, written=[True] * 12, ends=[False, False, True] * 4)[0]
    moved = [0.3, 0.0, 0.0] + [-0.9] * 3 + [-0.9] * 3 + [0.9] * 3  # of the log-probabilities
    row["advantages"] = [0.5] * 6 + [-0.5] * 3 + [0.5] * 3
    row["logp"] = [-1.0] * 12
    return row | {"learned_from": True, "new_logp": [x - 1.0 for x in moved]}


def test_what_a_policy_learned_from_is_shown_with_the_ratio_and_the_clip(run, open_page):
    """One praised and one blamed segment are beyond the clip, one praised is on its way back."""
    write_lines(run, "samples.jsonl", [response(iteration=8)[0], learned_from()])
    file = explorer(run)
    page = open_page(file)
    assert page.locator("#left option").all_text_contents() == [
        "iteration 8",
        "iteration 8, learned from",
    ]
    assert page.locator("#left").input_value() == "8", "it begins with what is held out"
    assert "ratio of the policy" not in page.locator("#views").text_content()
    page = open_page(file, "#a=8-learned&m=recorded")
    said = "ratio of the policy after this update to the one before, 0.407 to 2.460"
    held = "the clip (dashed) would hold back"
    assert f"{said}; {held} 2 of 4 segments" in page.locator("#views").text_content()
    label = page.locator(".token").first.get_attribute("aria-label")
    assert f"ratio {np.exp(0.1):.3f}" in label, "the root of the product over a segment"
    page.get_by_label("PPO").check()
    assert re.search(rf"{re.escape(held)} \d+ of 12 tokens", page.locator("#views").text_content())
    page = open_page(file, "#a=8-learned&b=8")
    assert "no response to the same question" not in page.locator("#note").text_content()


def test_of_what_was_learned_from_a_few_are_kept_and_who_has_none_beside_it_is_told(run, open_page):
    held_out = [response(iteration=8, example_id=f"eval/{i}")[0] for i in range(9)]
    learned = [learned_from() | {"example_id": f"train/{i}"} for i in range(9)]
    write_lines(run, "samples.jsonl", held_out + learned)
    page = open_page(explorer(run), "#a=8&b=8-learned")
    said = "iteration 8, learned from: no response to the same question."
    assert said in page.locator("#note").text_content()
    page.locator("#left").select_option("8-learned")
    assert page.locator("#response option").count() == LEARNED_FROM


def test_a_clip_that_no_ratio_comes_near_is_not_drawn(run, open_page):
    """Its line would stand above the curve."""
    write_lines(run, "samples.jsonl", [response(iteration=8)[0], learned_from()])
    stored = json.loads((run / "config.json").read_text())
    config = {"value_at": "start", "clip_high": 9.0}
    stored |= {"settings": {"credit": "critic", "cut": "topk"}, "config": config}
    (run / "config.json").write_text(json.dumps(stored))
    page = open_page(explorer(run), "#a=8-learned&m=recorded")
    assert page.locator("[stroke-dasharray]").count() == 1
    assert "10" not in marks(page)[-1] and "0.8" in marks(page)[-1]


@pytest.mark.parametrize(
    "config, said",
    [
        ({"ratio": "token"}, "would hold back 7 of 12 tokens"),
        ({"ratio": "response"}, "would hold back 0 of 1 responses"),
        ({"ratio": "product"}, "would hold back 3 of 4 segments"),
        ({"clip_low": 0.95, "clip_high": 0.5}, "would hold back 1 of 4 segments"),
        ({"clip_low": 1.0, "clip_high": math.inf}, "; no clip"),
    ],
)
def test_as_recorded_the_ratio_and_the_clip_are_the_runs_own(run, open_page, config, said):
    row = learned_from()
    write_lines(run, "samples.jsonl", [response(iteration=8)[0], row])
    stored = json.loads((run / "config.json").read_text())
    stored |= {"settings": {"credit": "critic", "cut": "topk"}}
    stored |= {"config": {"value_at": "start"} | config}
    (run / "config.json").write_text(json.dumps(stored))
    page = open_page(explorer(run), "#a=8-learned&m=recorded")
    assert said in page.locator("#views").text_content()


def test_grpo_is_that_of_the_baselines(run, open_page):
    page = open_page(explorer(run))
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.25])
    mean, std = rewards.mean().item(), rewards.std().item()
    found = [
        page.evaluate("a => Credit.groupAdvantage(...a)", [r, mean, std]) for r in rewards.tolist()
    ]
    expected = baselines.group_advantages(rewards, 6).tolist()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def response(seed=0, T=12, **changes):
    """A row of samples.jsonl with a critic, as train.py writes it, and the numbers in it."""
    written, entropy, values, rewards = (x[0] for x in batch(1, T, seed))
    rewards = torch.zeros(T)
    rewards[written.nonzero().max()] = 1.0
    ends = sapo.entropy_ends(entropy[None], written[None], 0.3)[0]
    advantages, _ = sapo.segment_gae(rewards[None], values.float()[None], ends[None], written[None])
    row = sample(list("abcdefghijkl")[:T], ends=ends.tolist(), advantages=advantages[0].tolist())
    row |= {
        "written": written.tolist(),
        "entropy": entropy.tolist(),
        "token_values": values.tolist(),
        "rewards": rewards.tolist(),
        "steps": [[0, 1, True], [3, 5, False]],
    }
    return row | changes, (written, entropy, values, rewards)


def judged(example, values, reward=0.0, steps=((0, 1, True), (3, 5, False), (6, 8, False))):
    """A response with these V before its tokens, its first wrong step at tokens 3 to 5."""
    row, _ = response(written=[True] * 12, example_id=example, reward=reward)
    return row | {"token_values": values, "steps": [list(step) for step in steps]}


def test_it_opens_on_the_wrong_answer_of_which_the_critic_noticed_most(run, open_page):
    flat = judged("flat", [0.1] * 12)
    noticed = judged("noticed", [0.9] * 6 + [0.2] * 6)
    late = judged("late", [0.9] * 9 + [0.0] * 3)  # it falls at a wrong step, and not at the first
    hopeful = judged("hopeful", [0.1] * 6 + [0.8] * 6)  # it rises where it should fall
    right = judged("right", [0.9] * 6 + [0.0] * 6, reward=1.0, steps=[(0, 11, True)])
    write_lines(run, "samples.jsonl", [hopeful, flat, late, right, noticed])
    page = open_page(explorer(run))
    order = ["noticed", "right", "flat", "late", "hopeful"]  # as it falls; the right one by turns
    assert [r["id"] for r in page.evaluate("DATA.checkpoints[0].responses")] == order
    assert page.locator("#response").input_value() == "noticed"


@pytest.mark.parametrize(
    ("changes", "fall"),
    [
        ({}, 0.3),
        ({"written": [True] * 6 + [False] * 3 + [True] * 3}, 0.6),  # over what the world replied
        ({"steps": [[9, 11, False]]}, 0.9),  # at the end V is 0
        ({"steps": [[0, 11, True]]}, 0.0),
        ({"values": None}, 0.0),
    ],
)
def test_the_fall_of_v_at_the_first_wrong_step(changes, fall):
    values = [0.5] * 3 + [0.8] * 3 + [0.5] * 3 + [0.2] * 3
    values[9] = 0.2 if "steps" not in changes else 0.9
    told = {"values": values, "written": [True] * 12, "steps": [[0, 1, True], [3, 5, False]]}
    assert fall_at_first_wrong_step(told | changes) == pytest.approx(fall)


def shown(page, view=0):
    """The advantages of the tokens of a view."""
    tokens = page.locator("section").nth(view).locator(".token")
    return [float(tokens.nth(i).get_attribute("data-advantage")) for i in range(tokens.count())]


def test_moved_sliders_give_what_sapo_gives(run, open_page):
    row, (written, entropy, values, rewards) = response()
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run))

    def expected(ends, lam, gamma=1.0, at="start"):
        numbers, _ = sapo.segment_gae(
            rewards.double()[None], values[None], ends[None], written[None], gamma, lam, at
        )
        return numbers[0][written].tolist()

    page.locator("#k").fill("50")
    page.locator("#lam").fill("0.4")
    page.locator("#gamma").fill("0.9")
    half = sapo.entropy_ends(entropy[None], written[None], 0.5)[0]
    np.testing.assert_allclose(shown(page), expected(half, 0.4, 0.9), atol=1e-6)
    cuts = page.locator(".token.cut").count()
    assert cuts == half.sum()
    page.get_by_label("V at the end").check()
    np.testing.assert_allclose(shown(page), expected(half, 0.4, 0.9, "end"), atol=1e-6)
    page.get_by_label("PPO").check()
    np.testing.assert_allclose(shown(page), expected(written, 0.4, 0.9), atol=1e-6)
    page.get_by_label("as recorded").check()
    recorded = torch.tensor(row["advantages"])[written].tolist()
    np.testing.assert_allclose(shown(page), recorded, atol=1e-6)


def test_the_view_stands_in_the_address_and_comes_back_from_it(run, open_page):
    rows = [
        response(seed, iteration=i, example_id=f"eval/{seed}")[0] for i in (0, 8) for seed in (0, 1)
    ]
    write_lines(run, "samples.jsonl", rows)
    file = explorer(run)
    page = open_page(file)
    page.locator("#right").select_option("0")
    page.locator("#lam").fill("0.25")
    page.get_by_label("next response").click()
    assert page.locator("section").count() == 2
    page.wait_for_timeout(500)  # it is written a moment later
    fragment = page.evaluate("location.hash")
    state = {name: values[0] for name, values in parse_qs(fragment[1:]).items()}
    assert (state["l"], state["r"], state["a"], state["b"]) == ("0.25", "eval/1", "8", "0")
    again = open_page(file, fragment)
    assert again.locator("section").count() == 2
    for view in (0, 1):
        assert shown(again, view) == shown(page, view)
    assert "iteration 8, eval/1" in again.locator("h2").first.text_content()
    again.evaluate("location.hash = 'r=eval/0&a=0'")
    again.wait_for_timeout(200)
    assert again.locator("section").count() == 1
    assert "iteration 0, eval/0" in again.locator("h2").first.text_content()


def test_two_views_share_one_scale_of_colours(run, open_page):
    weak, strong = (
        response(iteration=i, written=[True] * 12, ends=[False] * 11 + [True])[0] for i in (0, 8)
    )
    weak["advantages"], strong["advantages"] = [0.25] * 12, [1.0] * 12
    write_lines(run, "samples.jsonl", [weak, strong])
    page = open_page(explorer(run), "#a=0&b=8&m=recorded")
    tint = "e => getComputedStyle(e).backgroundColor"
    tints = [page.locator("section").nth(i).locator(".token").first.evaluate(tint) for i in (0, 1)]
    assert tints[0] != tints[1]
    assert page.locator("#most").text_content() == "+1 credit"


def marks(page, view=0):
    """What is written beside the curves of a view."""
    curves = page.locator("section").nth(view).locator(".curve")
    return [curve.locator(".mark").all_text_contents() for curve in curves.all()]


def test_two_views_share_the_scales_of_their_curves(run, open_page):
    low, high = (
        response(iteration=i, entropy=[number] * 12, token_values=[value] * 12)[0]
        for i, number, value in ((0, 0.01, -1.0), (8, 1.0, 2.0))
    )
    write_lines(run, "samples.jsonl", [low, high])
    page = open_page(explorer(run), "#a=0&b=8&m=recorded")
    assert marks(page, 0)[:2] == [["0.01", "1"], ["−1", "2", "0", "1"]] == marks(page, 1)[:2]
    heights = [
        page.locator("section").nth(i).locator("[stroke='var(--entropy)']").get_attribute("d")
        for i in (0, 1)
    ]
    assert heights[0].startswith("M0 60H") and heights[1].startswith("M0 4H")
    page.get_by_label("rank").check()
    assert marks(page, 0)[0] == ["", ""]


def test_the_lines_of_a_curve_are_named_and_none_is_doubled(run, open_page):
    """Not 0 beside -0.01, and no line at 1 nat in the logarithm of the entropy."""
    row, _ = response(written=[True] * 12, entropy=[0.1, 10.0] * 6, token_values=[-0.01] * 12)
    row["advantages"] = [-0.5] * 6 + [0.5] * 6
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#m=recorded")
    assert marks(page) == [["0.1", "10"], ["−0.01", "1"], ["−0.5", "0.5", "0"]]
    for curve, named in zip(page.locator(".curve").all(), marks(page), strict=True):
        assert curve.locator("[d^='M0 '][stroke='var(--line)']").count() == len(named)


def test_the_clip_is_dashed_and_named(run, open_page):
    write_lines(run, "samples.jsonl", [response(iteration=8)[0], learned_from()])
    page = open_page(explorer(run), "#a=8-learned&m=recorded")
    dashed = [curve.locator("[stroke-dasharray]").count() for curve in page.locator(".curve").all()]
    assert dashed == [0, 0, 0, 2]
    assert marks(page)[-1] == ["1.2", "0.8", "2.5", "1"], "0.41 stands too near to 0.8"


def test_a_curve_can_be_pointed_at(run, open_page):
    row, _ = response(written=[True] * 12)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run))
    curve = page.locator("svg").last
    box = curve.bounding_box()
    curve.hover(position={"x": box["width"] * 7.5 / 12, "y": 30})
    label = page.locator(".token").nth(7).get_attribute("aria-label")
    assert page.locator(".numbers").text_content() == label
    assert page.locator(".pointer").first.get_attribute("d") == "M7.5 0V64"


def test_a_curve_shows_turns_and_as_many_cuts_as_leave_it_legible(run, open_page):
    count = 60
    turns = [{"first": i, "last": i + 19, "said": "Go on.", "image": None} for i in (0, 20, 40)]
    row = sample(["a"] * count, written=[True] * count, turns=turns, token_values=[0.5] * count)
    del row["image"]
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#k=20&m=sapo")
    curve = page.locator(".curve").first
    bars = curve.locator("path[d$=' 0V64']:not(.pointer)")
    few = bars.count()
    assert few > 3
    assert page.locator(".curve [stroke='var(--faint)']").count() == 9, "three turns, three curves"
    page.get_by_label("PPO").check()
    assert bars.count() == 3


def test_the_legend_has_the_tints_of_the_tokens(run, open_page):
    """At -1, -0.75, ... 1 of the strongest advantage."""
    advantages = [i / 4 for i in range(-4, 5)]
    row, _ = response(T=9, written=[True] * 9, advantages=advantages, steps=[])
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#m=recorded")
    tint = "e => getComputedStyle(e).backgroundColor"
    tints = [page.locator(".token").nth(i).evaluate(tint) for i in range(9)]
    image = page.locator(".scale").evaluate("e => getComputedStyle(e).backgroundImage")
    assert re.findall(r"rgba?\(.*?\)", image)[::2] == tints


def test_noise_is_faint(run, open_page):
    row, _ = response(written=[True] * 12, advantages=[-1e-5] * 6 + [0.0] * 6, steps=[])
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#m=recorded")
    assert page.locator("#least").text_content() == "blame −0.02"
    alpha = "e => +getComputedStyle(e).backgroundColor.match(/[\\d.]+(?=\\))/)[0]"
    assert page.locator(".token").first.evaluate(alpha) < 0.02
    label = page.locator(".token").first.get_attribute("aria-label")
    assert "advantage 0.000" in label, "and no minus before a zero"


def test_a_minus_is_no_hyphen(run, open_page):
    row, _ = response(written=[True] * 12, advantages=[-0.914] * 12, token_values=[-0.5] * 12)
    write_lines(run, "samples.jsonl", [row])
    text = open_page(explorer(run), "#m=recorded").locator("main").inner_text()
    assert "−0.91" in text and not re.search(r"-\d", text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_token_is_legible_at_the_strongest_tint(run, open_page, scheme):
    """A contrast of 4.5 and more, as WCAG 2 (AA) asks for."""
    ends = [False, False, True] * 4
    row, _ = response(written=[True] * 12, ends=ends, advantages=[-1.0] * 6 + [1.0] * 6)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#m=recorded", color_scheme=scheme)

    def colour(selector, name):
        text = page.locator(selector).evaluate(f"e => getComputedStyle(e).{name}")
        return [float(part) for part in re.findall(r"[\d.]+", text)]

    def luminance(channels):
        low = [c / 255 for c in channels]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in low]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper, ink = colour("body", "backgroundColor"), colour("body", "color")
    for token in (".token >> nth=0", ".token >> nth=11"):
        *tint, alpha = colour(token, "backgroundColor")
        mixed = [alpha * t + (1 - alpha) * p for t, p in zip(tint, paper, strict=True)]
        dark, light = sorted((luminance(mixed), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_tints_stay_where_a_reader_forces_his_own_colours(run, open_page):
    row, _ = response(written=[True] * 12, advantages=[-1.0] * 6 + [1.0] * 6)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#m=recorded", forced_colors="active")
    corners = []  # what is painted: the computed style does not know what is forced
    for place in (0, 11):
        picture = page.locator(".token").nth(place).screenshot()
        corners.append(Image.open(io.BytesIO(picture)).convert("RGB").getpixel((3, 4)))
    (red, _, blue), (other_red, _, other_blue) = corners
    assert red > blue and other_blue > other_red


def test_every_control_has_a_name(run, open_page):
    write_lines(run, "samples.jsonl", [response()[0]])
    page = open_page(explorer(run))
    for role, names in {
        "slider": ["top-k", "lambda", "gamma"],  # and nothing more: the value is said beside it
        "combobox": ["response", "checkpoint", "beside it"],
        "button": ["previous response", "next response"],
    }.items():
        assert page.get_by_role(role).count() == len(names)
        for name in names:
            exact = role == "slider"
            assert page.get_by_role(role, name=name, exact=exact).count() == 1


def test_a_perfect_critic_blames_the_first_wrong_step_alone(run, open_page):
    row, _ = response(written=[True] * 12, rewards=[0.0] * 12, reward=0.0)
    row["entropy"] = [0.0, 0.0, 1.0] * 4  # segments abc def ghi jkl
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#k=30&l=0&m=perfect")
    assert shown(page) == [0.0] * 3 + [-1.0] * 3 + [0.0] * 6
    assert perfect_values([], 12) is None and perfect_values([[0, 3, True]], 5) == [1.0] * 5


WRONG, RIGHT = [[3, 5, False]], [[3, 5, True]]


@pytest.mark.parametrize(
    ("steps", "blame", "praise", "said"),
    [
        (
            WRONG,
            -0.04,
            1.0,
            "Nothing is blamed, though “def” was the first wrong step: it has 4% of",
        ),
        (
            WRONG,
            -0.06,
            1.0,
            "“def”, has 6% of all credit and blame; the segment “def”, where it st",
        ),
        (
            RIGHT,
            -0.04,
            1.0,
            "No step is known to be wrong. The segment “jkl” has the most credit; no",
        ),
        (
            RIGHT,
            -1.0,
            0.04,
            "No step is known to be wrong. Nothing is praised; “def” the most blame.",
        ),
        ([], -1.0, 1.0, "The segment “jkl” has the most credit; “def” the most blame."),
        (RIGHT, 0.0, 0.0, "Nobody is praised or blamed."),
        (WRONG, 0.0005, 0.0005, "Nobody is praised or blamed."),
    ],
)
def test_the_sentence_names_no_blame_that_cannot_be_seen(
    run, open_page, steps, blame, praise, said
):
    advantages = [0.0] * 3 + [blame] * 3 + [0.0] * 3 + [praise] * 3
    ends = [False, False, True] * 4
    row, _ = response(written=[True] * 12, ends=ends, advantages=advantages, steps=steps)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#m=recorded")
    assert said in page.locator(".verdict").text_content()


@pytest.mark.parametrize("fragment", ["#r=99&a=7&b=x&m=nothing", "#k=900&l=-3&g=zzz", "#%%%"])
def test_an_address_that_makes_no_sense_shows_the_page_all_the_same(run, open_page, fragment):
    write_lines(run, "samples.jsonl", [response()[0]])
    assert open_page(explorer(run), fragment).locator(".token").count() > 5


def test_an_address_that_says_no_number_leaves_the_runs_own(run, open_page):
    """And one that says too much is held within the range."""
    write_lines(run, "samples.jsonl", [response()[0]])
    file = explorer(run)

    def sliders(fragment):
        page = open_page(file, fragment)
        return [float(page.locator(name).input_value()) for name in ("#k", "#lam", "#gamma")]

    own = sliders("")
    assert own == [30.0, 0.99, 1.0]
    assert sliders("#k=abc&l=&g=x") == sliders("#k=Infinity&l=NaN&g=+") == own
    assert sliders("#k=900&l=-3&g=.5") == [100.0, 0.0, 0.5]


def test_a_slider_that_nothing_heeds_says_so(run, open_page):
    write_lines(run, "samples.jsonl", [response()[0]])
    page = open_page(explorer(run))
    dead = {"SAPO": "", "PPO": "k", "GRPO": "k lam gamma", "as recorded": "k lam gamma"}
    for method, names in dead.items():
        page.get_by_label(method, exact=True).check()
        for name in ("k", "lam", "gamma"):
            slider = page.locator(f"#{name}")
            assert slider.is_disabled() == (name in names.split())
            text = slider.get_attribute("aria-valuetext")
            assert slider.is_disabled() == (text == "not used here")
            assert page.locator(f"label[for={name}]").text_content().endswith(text)


def test_a_response_of_unknown_steps_is_shown_as_recorded_and_the_page_says_so(run, open_page):
    known, _ = response(example_id=1)
    unknown, _ = response(example_id=2, steps=[])
    write_lines(run, "samples.jsonl", [known, unknown])
    page = open_page(explorer(run), "#m=perfect&r=1")
    assert "as recorded" not in page.locator("#note").text_content()
    assert not page.locator("#k").is_disabled()
    page.locator("#response").select_option("2")
    assert "so it is shown as recorded" in page.locator("#note").text_content()
    written = [a for a, own in zip(unknown["advantages"], unknown["written"], strict=True) if own]
    np.testing.assert_allclose(shown(page), written, atol=1e-6)
    assert page.locator("#k").is_disabled()
    assert page.get_by_label("SAPO, a perfect critic").is_checked()


def test_the_way_to_another_checkpoint_and_back_leads_to_the_same_response(run, open_page):
    rows = [response(iteration=8, example_id=f"eval/{i}")[0] for i in range(3)]
    rows.append(learned_from() | {"example_id": "train/0"})
    write_lines(run, "samples.jsonl", rows)
    page = open_page(explorer(run))
    page.locator("#response").select_option("eval/2")
    page.locator("#left").select_option("8-learned")
    assert "train/0" in page.locator("h2").text_content()
    page.locator("#left").select_option("8")
    assert "eval/2" in page.locator("h2").text_content()


def test_a_sentence_says_where_the_blame_landed(run, open_page):
    advantages = [0.0] * 12
    advantages[3:6] = [-0.5] * 3
    row, _ = response(
        written=[True] * 12,
        advantages=advantages,
        ends=[False] * 2 + [True] + [False] * 2 + [True] + [False] * 5 + [True],
        reward=0.0,
    )
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run))
    page.get_by_label("as recorded").check()
    said = page.locator(".verdict").text_content()
    assert said == (
        "The first wrong step, “def”, has 100% of all credit and blame; the segment “def”, where "
        "it stands, has the most blame."
    )
    wrong = page.locator(".token.wrong")
    assert "".join(wrong.nth(i).text_content() for i in range(wrong.count())) == "def"


def test_numbers_are_read_by_keyboard_and_by_screen_readers(run, open_page):
    write_lines(run, "samples.jsonl", [response()[0]])
    page = open_page(explorer(run))
    page.locator("input[name=scale]").last.focus()
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.className")
    assert "token" in focused
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert page.locator(".numbers").text_content() == label
    for part in ("a: advantage ", "entropy ", "value before it ", "in a step that is right given"):
        assert part in label
    pointers = page.locator(".pointer")
    assert all(pointers.nth(i).get_attribute("d") == "M0.5 0V64" for i in range(pointers.count()))
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "b"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "l"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "l", "one stop of the Tab key"


def test_a_token_is_watched_while_a_slider_moves(run, open_page):
    row, _ = response(written=[True] * 12)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run))
    token = page.locator(".token").nth(4)
    token.focus()
    page.locator("#lam").focus()
    before = page.locator(".numbers").text_content()
    page.keyboard.press("Home")
    assert page.locator("#lam").input_value() == "0"
    label = token.get_attribute("aria-label")
    assert page.locator(".numbers").text_content() == label != before
    assert page.locator(".pointer").first.get_attribute("d") == "M4.5 0V64"
    page.locator("input[name=scale]").last.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "e", "the Tab stop stays"


def test_each_view_keeps_its_token_and_another_response_has_its_own(run, open_page):
    rows = [response(s, iteration=i, example_id=s)[0] for i in (0, 8) for s in (0, 1)]
    write_lines(run, "samples.jsonl", rows)
    page = open_page(explorer(run), "#a=8&b=0")
    for view, place in ((0, 2), (1, 5)):
        page.locator("section").nth(view).locator(".token").nth(place).hover()
    page.locator("#k").fill("50")
    readouts = page.locator(".numbers")
    for view, place in ((0, 2), (1, 5)):
        token = page.locator("section").nth(view).locator(".token").nth(place)
        assert readouts.nth(view).text_content() == token.get_attribute("aria-label")
    page.get_by_label("next response").click()
    assert "Point at a token" in readouts.first.text_content()


def test_a_screen_reader_hears_the_sentence_and_no_number_twice(run, open_page):
    """Live is the sentence; a token's numbers are its name already."""
    write_lines(run, "samples.jsonl", [response()[0]])
    page = open_page(explorer(run))
    assert page.locator("[aria-live]").count() == 0
    for name in ("GRPO", "PPO"):
        page.get_by_label(name).check()
        said = page.locator(".verdict").text_content()
        assert page.get_by_role("status").text_content() == said


@pytest.mark.parametrize("fragment", ["#a=8-learned", "#a=8-learned&b=8"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_numbers_move_nothing(run, open_page, width, fragment):
    """A line is reserved for each that they need."""
    held_out, _ = response(iteration=8, written=[True] * 12)
    rows = [held_out, learned_from() | {"tokens": ["</answer>"] * 12}]
    write_lines(run, "samples.jsonl", rows)
    page = open_page(explorer(run), fragment, viewport={"width": width, "height": 3000})
    curves = page.locator(".curve")
    before = [curve.bounding_box() for curve in curves.all()]
    for token in page.locator(".token").all():
        token.hover()
        assert [curve.bounding_box() for curve in curves.all()] == before


def test_the_numbers_are_seen_beside_a_game_of_many_turns(run, open_page):
    turns = [{"first": i, "last": i, "said": "Go on.", "image": png()} for i in range(12)]
    row, _ = response(written=[True] * 12, turns=turns)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), viewport={"width": 390, "height": 700})
    for place in (0, 5, 11):
        page.locator(".token").nth(place).hover()
        readout = page.locator(".numbers").bounding_box()
        assert readout["y"] >= 0 and readout["y"] + readout["height"] <= 700


def test_a_game_shows_its_turns(run, open_page):
    written = [True] * 4 + [False] * 3 + [True] * 5
    turns = [
        {"first": 0, "last": 3, "said": "Find it.", "image": png()},
        {"first": 7, "last": 11, "said": "Go on.", "image": None},
    ]
    row, _ = response(written=written, turns=turns)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run))
    assert page.locator(".turn").count() == 2 and page.locator(".turn img").count() == 1
    texts = page.locator(".token")
    assert "".join(texts.nth(i).text_content() for i in range(texts.count())) == "abcdhijkl"
    assert page.locator(".heard").all_text_contents() == ["1. Find it.", "2. Go on."]
    assert "exact" not in page.locator("#methods").text_content(), "a wrong step may be made good"


def test_a_map_in_text_stands_in_its_lines_and_once(run, open_page):
    world = "Find it.\n  ?#\n<b>@\u202e"
    turns = [
        {"first": 0, "last": 5, "said": world, "image": None},
        {"first": 6, "last": 11, "said": "Go on.\n.." + "x" * 900, "image": None},
    ]
    row, _ = response(written=[True] * 12, turns=turns, prompt=world)
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), viewport={"width": 375, "height": 800})
    assert page.locator("section").inner_text().count("Find it.") == 1
    assert page.locator(".rest").first.text_content() == "  ?#\n<b>@\\u202e"
    lines = page.locator(".rest").first.evaluate(
        "e => e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight)"
    )
    assert round(lines) == 2 and page.locator(".rest").last.text_content().endswith("x…")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_a_space_is_seen_and_said(run, open_page):
    tokens = [" ", "go west", "", "\n", *"efghijkl"]
    row, _ = response(written=[True] * 12, tokens=tokens, prompt=7)  # a prompt can be a number
    write_lines(run, "samples.jsonl", [row])
    tokens = open_page(explorer(run)).locator(".token")
    assert tokens.all_text_contents()[:4] == ["·", "go·west", "\u00a0", "⏎"]
    labels = [tokens.nth(i).get_attribute("aria-label").split(":")[0] for i in range(4)]
    assert labels == ["space", "go west", "nothing", "⏎"]


def test_a_game_that_knows_its_exact_values_shows_what_they_would_credit(run, open_page):
    written = [True] * 4 + [False] * 3 + [True] * 5
    turns = [
        {"first": 0, "last": 3, "said": "Find it.", "image": None},
        {"first": 7, "last": 11, "said": "Go on.", "image": None},
    ]
    exact = [0.75] * 4 + [0.0] * 3 + [0.5] * 5
    row, _ = response(written=written, turns=turns, exact_values=exact)
    row |= {"rewards": [0.0] * 11 + [1.0], "entropy": [0.0] * 11 + [1.0]}  # a segment is a turn
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#k=1&l=0&g=1&m=perfect")
    assert shown(page)[:4] == [-0.25] * 4 and shown(page)[-4:] == [0.5] * 4
    assert "SAPO, exact values" in page.locator("#methods").text_content()
    assert "from the game itself" in page.locator("#note").text_content()
    row |= {"steps": [[0, 1, False], [2, 3, True], [7, 8, True], [9, 11, False]], "correct": False}
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#k=1&l=0&g=1&m=perfect")
    assert "first wrong step, “jkl”" in page.locator(".verdict").text_content(), "a command"
    assert "not won" in page.locator("section").text_content(), "as the game says"
    assert "value before it 0.750" in page.locator(".token").first.get_attribute("aria-label")
    page = open_page(explorer(run), "#k=1&l=0&g=1&m=sapo")
    assert "“ab” was the first wrong step" in page.locator(".verdict").text_content()
    row["steps"] = [[0, 1, False], [2, 3, True], [9, 11, True]]
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run), "#k=1&l=0&g=1&m=perfect")
    said = "No command is known to be wrong; thoughts are not judged here. The segment “hijkl” has"
    assert said in page.locator(".verdict").text_content()
    row["exact_values"] = [0.5]
    write_lines(run, "samples.jsonl", [row])
    with pytest.raises(ValueError, match="1 exact_values for 12 tokens"):
        explorer(run)


HOSTILE = [
    "<script>document.title='gone'</script>",
    "</script><img src=x onerror=alert(1)>",
    "</style><!--",
    "\u2028\u2029",
    "\u202e\u2066\u061c\u200b",
    "\x00\x1b",
    "\ud800",
    "&lt;",
    "__DATA__",
    '"\\',
    "骰子🎲",
    "",
]


def test_hostile_text_is_shown_and_does_nothing(run, open_page):
    row, _ = response(written=[True] * 12)
    row |= {name: "".join(HOSTILE) for name in ("prompt", "answer", "predicted", "example_id")}
    row["tokens"] = HOSTILE
    write_lines(run, "samples.jsonl", [row])
    file = explorer(run)
    (data,) = re.findall(r'id="data">(.*)</script>', file.read_text())
    assert data.isascii() and "<" not in data
    page = open_page(file)
    tokens = page.locator(".token").all_text_contents()
    assert tokens[0] == HOSTILE[0] and tokens[1] == HOSTILE[1].replace(" ", "·")
    assert tokens[3] == "\\u2028\\u2029" and tokens[4] == "\\u202e\\u2066\\u061c\\u200b"
    assert tokens[8] == "__DATA__" and tokens[10] == "骰子🎲"
    assert "Where the credit goes" in page.title()
    assert page.locator("main img[onerror]").count() == 0 and page.locator("script").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(run, open_page, scheme):
    write_lines(run, "samples.jsonl", [response()[0]])
    page = open_page(explorer(run), viewport={"width": 375, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for button in page.locator("button").all():
        assert min(button.bounding_box()[side] for side in ("width", "height")) >= 32
    turns = [{"first": 0, "last": 11, "said": "no" * 200, "image": png()}]
    game, _ = response(written=[True] * 12, turns=turns, tokens=["word" * 3] * 12)
    write_lines(run, "samples.jsonl", [game])
    page = open_page(explorer(run), viewport={"width": 375, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 23, 26)"}[scheme]


def test_a_run_without_a_critic_shows_what_it_has(run, open_page):
    row, _ = response()
    row.pop("token_values"), row.pop("values")
    write_lines(run, "samples.jsonl", [row])
    page = open_page(explorer(run))
    labels = page.locator("#methods label").all_text_contents()
    assert [label.strip() for label in labels] == ["SAPO, a perfect critic", "GRPO", "as recorded"]
    assert page.locator(".token").count() > 5


def test_of_many_checkpoints_the_first_and_the_last_are_kept(run):
    rows = [response(example_id=f"eval/{i}", iteration=t)[0] for t in range(9) for i in range(40)]
    write_lines(run, "samples.jsonl", rows)
    text = explorer(run).read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [c["key"] for c in data["checkpoints"]] == ["0", "3", "5", "8"]
    assert all(len(c["responses"]) == RESPONSES for c in data["checkpoints"])
    assert len(text) < 1_000_000


def test_a_page_of_these_examples_alone(run):
    rows = [response(example_id=f"eval/{i}", iteration=t)[0] for t in (0, 4) for i in range(6)]
    write_lines(run, "samples.jsonl", rows)
    text = explorer(run, ["eval/5", "eval/2"]).read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    for checkpoint in data["checkpoints"]:
        assert [response["id"] for response in checkpoint["responses"]] == ["eval/5", "eval/2"]
    with pytest.raises(ValueError, match="samples.jsonl: no response to 'eval/7'"):
        explorer(run, ["eval/7"])


def test_pictures_stand_there_once_and_the_page_stays_small(run, open_page, monkeypatch):
    rows = [response(example_id=f"eval/{i}", iteration=t)[0] for t in (0, 4) for i in range(6)]
    write_lines(run, "samples.jsonl", rows)
    file = explorer(run)
    whole = len(file.read_text())
    assert file.read_text().count(png()) == 1
    page = open_page(file, "#b=0")
    assert page.locator("img").count() == 2
    assert page.locator("img").first.evaluate("image => image.naturalWidth") == 32
    monkeypatch.setattr("lab.explorer.LARGEST", whole - 1)
    explorer(run)
    assert whole * 0.8 < len(file.read_text()) < whole
    assert open_page(file).locator("#response option").count() == 5


def test_what_is_not_known_is_left_out(run, open_page):
    row, _ = response(steps=[])
    for key in ("prompt", "answer", "entropy", "example_id", "predicted"):
        row.pop(key)
    empty = response(written=[False] * 12)[0]
    write_lines(run, "samples.jsonl", [row, empty])
    page = open_page(explorer(run))
    labels = page.locator("#methods label").all_text_contents()
    assert [label.strip() for label in labels] == ["PPO", "GRPO", "as recorded"]
    assert "true answer" not in page.locator("section").text_content()


def test_a_missing_key_is_named(run):
    row, _ = response()
    row.pop("ends")
    write_lines(run, "samples.jsonl", [row])
    with pytest.raises(ValueError, match="samples.jsonl, iteration 4, example 7: no ends"):
        explorer(run)


def test_lists_that_do_not_fit_are_named(run):
    write_lines(run, "samples.jsonl", [response(entropy=[0.1])[0]])
    with pytest.raises(ValueError, match="1 entropy for 12 tokens"):
        explorer(run)


def test_a_step_that_is_none_is_named(run):
    write_lines(run, "samples.jsonl", [response(steps=[[0, 10**12, False]])[0]])
    with pytest.raises(ValueError, match="example 7: the step .*within 12 tokens"):
        explorer(run)


@pytest.mark.parametrize("line", ['{"iteration": ' + "9" * 5000 + "}", "[" * 100_000])
def test_a_line_that_json_cannot_read_is_named(run, line):
    row = json.dumps(response()[0])
    (run / "samples.jsonl").write_text(f"{row}\n{line}\n{row}\n")
    with pytest.raises(ValueError, match="samples.jsonl, line 2 is not JSON"):
        explorer(run)
