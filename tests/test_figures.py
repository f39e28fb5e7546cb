"""lab/figures.py: what its pictures show, whether they can be read, and what they refuse."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from run_files import finished_run, sample, write_lines

from lab import common, critic, figures
from lab.credit_page import credit_map
from lab.explorer import explorer
from lab.sweep import EXPERIMENTS, REUSED

ROOT = Path(__file__).parent.parent
TASKS = ("DiceSum", "ArrowPath-length=10-grid=4")


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)


def sweep(accuracies, experiment="main", task="DiceSum", budget=3000, seeds=None, **curves):
    """A sweep's JSON, made up: for each label the held-out accuracy of every seed, all with these
    curves. Labels alone get accuracies for `seeds` seeds, and curves that end there."""
    if seeds is not None:
        accuracies = {
            label: [0.6 + 0.05 * (3 * i % 5) + 0.01 * seed for seed in range(seeds)]
            for i, label in enumerate(accuracies)
        }
    tokens = [budget * part // 3 for part in (1, 2, 3)]
    runs = []
    for label, of_seeds in accuracies.items():
        for seed, accuracy in enumerate(of_seeds):
            end = 0.7 if seeds is None else accuracy
            curve = {"generated_tokens": tokens, "accuracy": [0.5, (0.5 + end) / 2, end]}
            run = {"label": label, "seed": seed, "accuracy": accuracy, "warm_start_accuracy": 0.5}
            runs.append(run | {"curve": curve | curves})
    keys = {"experiment": experiment, "task": task, "budget_tokens": budget}
    return keys | {"runs": runs}


@pytest.fixture(params=itertools.product(figures.ROWS, TASKS), ids="-".join)
def results(request):
    """A whole comparison of each experiment that has a figure, on a task of a short and of a long
    name."""
    experiment, task = request.param
    return sweep(EXPERIMENTS[experiment], experiment, task, 150_000, seeds=5)


def is_grey(colour):
    red, green, blue = to_rgb(colour)
    return red == green == blue


def names_of_lines(axes):
    return [text.get_text() for text in axes.texts]


def boxes_of_texts(figure):
    """(text, its box in pixels) of all that is written in a figure but for numbers at ticks."""
    figure.draw_without_rendering()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        named = [tick for tick in axes.get_yticklabels() if not tick.get_text()[-1:].isdigit()]
        texts += named
    for legend in figure.legends:
        texts += legend.get_texts()
    # Text's own extent: that of an annotation holds its leader, too.
    return [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_text()]


def assert_readable(figure):
    """Nothing written is cut off by the edge of the figure, and nothing covers another."""
    boxes = boxes_of_texts(figure)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, f"{text!r} is cut"
        assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, f"{text!r} is cut"
    for (one, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), f"{one!r} covers {other!r}"


# ------------------------------------------------------------------------- the learning curve


def thick_line(axes):
    """(iterations, means) of the one moving mean on these axes."""
    (line,) = [line for line in axes.lines if line.get_label().startswith("mean over")]
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def test_learning_curve_is_a_picture_of_the_promised_size(run):
    path = figures.learning_curve(run)
    assert path == run / "learning_curve.png"
    with Image.open(path) as picture:
        assert picture.size == (1650, 600)
        pixels = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    colours = {colour for _, colour in pixels}
    # Accuracy and entropy in training, accuracy held out, the critic
    for colour in (common.FAINT, common.INK, common.GREEN):
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_learning_curve_can_be_read(run):
    lines = common.read_lines(run / "metrics.jsonl")
    figure = figures.learning_figure(lines, "SAPO on DiceSum, seed 3")
    assert_readable(figure)
    assert figure.get_suptitle().endswith(": held-out accuracy 50% → 90% in 20 iterations")


@pytest.mark.parametrize(
    "lines",
    [
        [{"iteration": 0, "eval_accuracy": 0.5, "eval_low": 0.4, "eval_high": 0.6}],
        [
            {"iteration": 0, "eval_accuracy": 0.5, "eval_low": None},
            {"iteration": 1, "accuracy": 0.5, "explained_variance": None},
        ],
        [{"iteration": 1, "accuracy": 0.5, "entropy": float("nan")}],
        [{"iteration": 1, "accuracy": 0.5, "explained_variance": float("nan")}],
        [{"iteration": i, "accuracy": 0.5, "entropy": 0.2} for i in (*range(1, 30), 20, 21)],
        [{"iteration": 3}],
    ],
    ids=["only the warm start", "nulls", "nan", "nan of the critic", "resumed at 20", "no metric"],
)
def test_learning_curve_draws_what_there_is(run, lines):
    write_lines(run, "metrics.jsonl", lines)
    (run / "config.json").unlink()
    assert figures.learning_curve(run).stat().st_size > 10_000


def test_of_two_lines_of_an_iteration_the_later_is_drawn():
    lines = [{"iteration": i, "entropy": i} for i in (1, 2, 3)]
    figure = figures.learning_figure([*lines, {"iteration": 2, "entropy": 7}], "resumed at 2")
    (line,) = figure.axes[1].lines
    assert line.get_ydata().tolist() == [1, 7, 3]


@pytest.mark.parametrize("count", [20, 39, 40, 60, 200])
def test_the_thick_line_has_no_point_before_a_whole_window(count):
    """Nor behind the last one; in between, each is the mean of the values around it."""
    values = [math.sin(i) + i / 10 for i in range(count)]
    lines = [{"iteration": i + 1, "entropy": value} for i, value in enumerate(values)]
    iterations, means = thick_line(figures.learning_figure(lines, "a run that rises").axes[1])
    reach = count // 20
    assert iterations == list(range(1 + reach, count - reach + 1))
    for iteration, mean in zip(iterations, means, strict=True):
        window = [values[iteration - 1 + offset] for offset in range(-reach, reach + 1)]
        assert mean == pytest.approx(sum(window) / len(window))


def test_a_run_too_short_for_a_window_has_no_thick_line():
    lines = [{"iteration": i, "entropy": 0.2} for i in range(19)]
    (line,) = figures.learning_figure(lines, "19 iterations").axes[1].lines
    assert line.get_label() == "training batch"


def test_the_third_panel_draws_the_explained_variance():
    """Not the value loss; with a dashed line at 0, where a constant guess would be."""
    values = [-0.3, 0.1, 0.4]
    lines = []
    for i, value in enumerate(values):
        lines.append({"iteration": i, "explained_variance": value, "value_loss": 9.0})
    critic = figures.learning_figure(lines, "a critic that learns").axes[2]
    logged, constant = critic.lines
    assert logged.get_ydata().tolist() == values
    assert set(constant.get_ydata()) == {0} and constant.get_linestyle() == "--"
    assert "1 perfect, 0 a constant guess" in critic.get_title()
    assert "explained variance" in critic.get_ylabel()
    low, high = critic.get_ylim()
    assert low < min(values) and high > 1


def test_a_critic_far_below_a_constant_guess_leaves_the_scale_as_it_is():
    lines = [{"iteration": i, "explained_variance": value} for i, value in enumerate((-40, 0.5))]
    low, high = figures.learning_figure(lines, "an untaught critic").axes[2].get_ylim()
    assert -1.1 < low < -1 and 1 < high < 1.1


def test_a_method_without_a_critic_says_so():
    lines = [{"iteration": i, "accuracy": 0.5, "entropy": 0.2} for i in range(5)]
    critic = figures.learning_figure(lines, "GRPO on DiceSum, seed 0").axes[2]
    assert names_of_lines(critic) == ["not logged in this run"]
    assert not critic.lines


def test_without_matplotlib_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib") as caught:
        figures.learning_curve(run)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    credit_map(run)  # needs none


def test_importing_figures_does_not_import_matplotlib():
    program = "import sys, lab.figures; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ------------------------------------------------------------- the names at the ends of lines

heights = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=9)


@given(heights)
def test_spread_heights_keep_their_order_their_gap_and_their_range(heights):
    gap = 0.1
    moved = common.spread(heights, gap, 0, 1)
    for i, j in itertools.combinations(range(len(heights)), 2):
        assert abs(moved[i] - moved[j]) >= gap - 1e-9
        if heights[i] < heights[j]:
            assert moved[i] < moved[j]
    assert min(moved) >= -1e-9 and max(moved) <= 1 + 1e-9


@given(heights, st.lists(st.floats(0, 1, allow_subnormal=False), min_size=10, max_size=10))
def test_no_other_heights_a_gap_apart_are_nearer(heights, slack):
    """Against any others: a start and the room between neighbours, scaled into the range."""
    heights = sorted(heights)
    gap, count = 0.1, len(heights)
    moved = common.spread(heights, gap, 0, 1)
    room = 1 - (count - 1) * gap
    scale = room / max(1, sum(slack[: count + 1]))
    others = [scale * sum(slack[: i + 1]) + i * gap for i in range(count)]

    def distance(places):
        return sum((a - b) ** 2 for a, b in zip(places, heights, strict=True))

    assert distance(moved) <= distance(others) + 1e-9


@pytest.mark.parametrize(
    "heights, expected",
    [
        ([5.0, 1.0, 9.0], [5, 1, 9]),  # far apart: they stay
        ([5.0, 5.0], [4, 6]),
        ([5.0, 5.0, 5.0], [3, 5, 7]),
        ([0.0, 0.0], [0, 2]),  # at the lower edge
        ([10.0, 9.5], [10, 8]),  # at the upper one
    ],
)
def test_spread_heights_by_hand(heights, expected):
    assert common.spread(heights, 2, 0, 10) == pytest.approx(expected)


# ---------------------------------------------------------------------------- the comparisons


def test_one_row_and_one_line_are_coloured_and_the_others_are_greys_that_differ(results):
    rows = figures.ROWS[results["experiment"]]
    ends, *paths = figures.comparison_figure(results).axes
    assert {line.get_color() for line in ends.lines} == {common.PURPLE, common.GREYS[2]}
    (coloured,) = [tick for tick in ends.get_yticklabels() if tick.get_color() == common.PURPLE]
    assert coloured.get_text() == figures.in_words(rows.highlighted)
    for axes in paths:
        (strong,) = [line for line in axes.lines if not is_grey(line.get_color())]
        assert strong.get_label() == rows.highlighted
        styles = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(set(styles)) == len(styles)


def test_every_row_and_every_line_is_named_and_no_name_covers_another(results):
    experiment = results["experiment"]
    figure = figures.comparison_figure(results)
    ends, *paths = figure.axes
    named = {tick.get_text() for tick in ends.get_yticklabels()}
    assert named == {figures.in_words(label) for label in EXPERIMENTS[experiment]}
    assert bool(paths) == bool(figures.ROWS[experiment].paths)
    for axes in paths:
        assert [line.get_label() for line in axes.lines] == list(figures.ROWS[experiment].paths)
        for line, name in zip(axes.lines, axes.texts, strict=True):
            assert name.xy == pytest.approx(line.get_xydata()[-1])
            assert name.get_text() == figures.in_words(line.get_label())
    assert_readable(figure)


def test_names_of_lines_that_end_together_do_not_cover_each_other():
    for scale in ("linear", "log"):
        figure, (axes,) = common.new_figure(4)
        for letter in "abcdefghijkl":
            axes.plot([1, 2], [3, 0.5], label=f"method {letter}")
        axes.set(yscale=scale, ylim=(0.1, 10))
        axes.yaxis.set_major_formatter("{x:g}")
        common.name_lines(axes)
        assert_readable(figure)


def test_rows_come_in_the_order_of_their_ends_but_shares_in_their_own():
    ends, _ = figures.comparison_figure(sweep({"sapo": [0.7], "ppo": [0.9], "grpo": [0.8]})).axes
    assert [tick.get_text() for tick in ends.get_yticklabels()] == ["PPO", "GRPO", "SAPO"]
    (ends,) = figures.comparison_figure(sweep({"5%": [0.7], "30%": [0.9]}, "topk")).axes
    assert [tick.get_text() for tick in ends.get_yticklabels()] == ["5%", "30%"]


def test_ppo_once_more_is_left_out():
    same = {"sapo": [0.7, 0.8], "ppo": [0.5, 0.6], "ppo, lambda of sapo": [0.5, 0.6]}
    for accuracies, count in ((same, 2), (same | {"ppo, lambda of sapo": [0.5, 0.7]}, 3)):
        ends, _ = figures.comparison_figure(sweep(accuracies)).axes
        assert len(ends.get_yticklabels()) == count


HIGH, LOW = [0.8, 0.81, 0.82, 0.83, 0.84], [0.6, 0.61, 0.62, 0.63, 0.64]


@pytest.mark.parametrize(
    ("accuracies", "experiment", "text"),
    [
        ({"sapo": HIGH, "ppo": HIGH}, "main", "Five seeds do not tell SAPO apart from any other"),
        ({"sapo": HIGH, "ppo": LOW, "vineppo": HIGH}, "main", "SAPO ends above PPO, level with Vi"),
        ({"sapo": LOW, "ppo": HIGH, "vc-ppo": HIGH}, "main", "SAPO ends below PPO and VC-PPO"),
        (
            {"sapo": HIGH, "ppo": LOW, "vc-ppo": LOW, "grpo": LOW, "gspo": LOW, "srpo": HIGH},
            "main",
            "SAPO ends above four others, level with SRPO",
        ),
        (
            {"sapo": HIGH, "sapo, token ratio": LOW, "sapo, V at end": HIGH},
            "controls",
            "SAPO ends above one other, level with one other",
        ),
        ({"30%": HIGH, "5%": LOW}, "topk", "A cut at 30% of the tokens ends above 5%"),
        (
            {"topk": HIGH * 2, "causal": HIGH},
            "cuts",
            "5 or 10 seeds do not tell the cut by entropy",
        ),
        ({"sapo": HIGH[:4], "ppo": LOW[:2]}, "main", "All of them learn, no order yet (2 or 4 see"),
        ({"sapo": [0.9], "ppo": [0.4]}, "main", "No order (one seed)"),  # 0.5 was the warm start
        ({"ppo": HIGH, "grpo": LOW}, "main", "Where they end (five seeds)"),
    ],
)
def test_a_title_says_what_the_seeds_tell(accuracies, experiment, text):
    figure = figures.comparison_figure(sweep(accuracies, experiment))
    assert figure.get_suptitle().startswith(text)


def test_a_panel_says_what_was_run():
    results = sweep({"sapo": [0.7] * 3, "ppo": [0.6]}, task="ArrowPath-length=10-grid=4")
    ends, _ = figures.comparison_figure(results).axes
    said = "ArrowPath (length=10, grid=4), 3,000 tokens, 1 or 3 seeds\n(before training: 50%)"
    assert ends.get_title() == said


def test_a_comparison_shows_the_interquartile_mean_the_interval_and_the_start():
    results = sweep({"sapo": [0.5, 0.6, 0.7, 0.9], "ppo": [0.4]})
    ends, paths = figures.comparison_figure(results).axes
    low, value, high = 100 * 0.5, 100 * 0.65, 100 * 0.9
    bar, dot, *_ = ends.lines  # SAPO's, which ends first
    assert dot.get_xdata()[0] == pytest.approx(value)
    assert low <= bar.get_xdata()[0] < value < bar.get_xdata()[1] <= high
    for line in paths.lines:
        assert line.get_xdata().tolist() == pytest.approx([1, 2, 3])  # thousands of tokens
        assert line.get_ydata().tolist() == pytest.approx([50, 60, 70])


def test_a_curve_ends_with_its_shortest_run():
    results = sweep({"sapo": [0.5, 0.5]})
    results["runs"][1] |= {"curve": {"generated_tokens": [3000, 4000], "accuracy": [0.7, 0.8]}}
    _, paths = figures.comparison_figure(results).axes
    (line,) = paths.lines
    assert line.get_xdata().tolist() == pytest.approx([2, 3])
    assert line.get_ydata().tolist() == pytest.approx([60, 70])


def test_a_sweep_without_a_finished_run_is_refused(tmp_path):
    file = tmp_path / "main-DiceSum.json"
    file.write_text(json.dumps(sweep({})))
    with pytest.raises(ValueError, match="main-DiceSum.json holds no finished run"):
        figures.comparison(file)


def truths():
    """What lab.truth writes, made up: from one row to the next less."""
    methods = {}
    names = ["sapo", "ppo", "vc-ppo", "ppo, lambda of sapo", "sapo, lambda 0.9", "grpo", "gspo"]
    for i, name in enumerate([*names, "srpo", "spo-chain", "vineppo", "spo-tree"]):
        credit = {"auroc": 0.7, "auroc_of_first_wrong_step": 0.73 - i / 50}
        methods[name] = credit | {"cosine": [0.7 - i / 25, 0.67 - i / 25, 0.74 - i / 25]}
    return {"task": "DiceSum", "methods": methods}


def test_truth_colours_the_row_of_sapo_in_both_panels():
    figure = figures.truth_figure(truths())
    for axes in figure.axes:
        rows = [line for line in axes.lines if line.get_color() == common.PURPLE]
        assert rows and all(set(line.get_ydata()) == {0} for line in rows)  # the first row
        assert all(is_grey(line.get_color()) for line in axes.lines if line not in rows)
    first, *others = figure.axes[0].get_yticklabels()  # of both panels
    assert first.get_text() == "SAPO" and first.get_color() == common.PURPLE
    assert all(name.get_color() != common.PURPLE for name in others)
    assert len(others) == 9  # all but SAPO at another lambda
    assert figure.get_suptitle().startswith("A critic taught beforehand sees the first wrong step")
    assert_readable(figure)


def dots(axes):
    """{label: value} of the rows of a panel."""
    values = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    names = [name.get_text() for name in axes.get_yticklabels()]
    return dict(zip(names, values, strict=True))


def test_the_committed_truth_tells_the_blind_from_the_seeing():
    """Of the first wrong step: of all steps GRPO's AUROC is 0.60, though its credit is blind."""
    results = common.read_outcome(ROOT / "results" / "truth-DiceSum.json")
    figure = figures.truth_figure(results)
    seen = dots(figure.axes[0])
    methods = results["methods"]
    assert seen["GRPO"] == methods["grpo"]["auroc_of_first_wrong_step"]
    blind = ("GRPO", "SRPO", "SPO-chain")
    assert all(abs(seen.pop(name) - 0.5) < 0.03 for name in blind)
    assert min(seen.values()) > 0.6 and methods["grpo"]["auroc_interval"][0] > 0.55
    drawn = (ROOT / "results" / "truth-DiceSum.svg").read_text()
    for text in (figure.get_suptitle(), figure.axes[0].get_title()):
        assert f"<!-- {text} -->" in drawn


def test_truth_leaves_out_gspo_where_it_is_grpo_and_claims_no_more_than_it_holds():
    results = truths()
    results["methods"]["gspo"] = results["methods"]["grpo"]
    results["methods"]["vineppo"]["cosine"] = [0.68, 0.6, 0.7]  # above PPO's
    figure = figures.truth_figure(results)
    assert len(figure.axes[0].get_yticklabels()) == 9
    assert figure.get_suptitle() == "Credit and gradient on DiceSum, policy frozen"
    results = truths()
    results["methods"]["vc-ppo"]["auroc_of_first_wrong_step"] = 0.5  # a critic as blind as GRPO
    figure = figures.truth_figure(results)
    assert figure.get_suptitle() == "Credit and gradient on DiceSum, policy frozen"


def test_truth_is_drawn_where_no_step_was_wrong():
    results = truths()
    for row in results["methods"].values():
        row["auroc_of_first_wrong_step"] = None
    assert figures.truth_figure(results).get_suptitle().startswith("Credit and gradient on DiceSum")


def reuse(seeds=5):
    """The experiment on reuse, made up: all kinds of ratio alike, but at eight epochs."""
    results = sweep(EXPERIMENTS["reuse"], "reuse", budget=80_000, seeds=seeds)
    for run in results["runs"]:
        often = run["label"].endswith(" 8 epochs")
        run["accuracy"] = 0.25 if often else 0.75
        run["curve"] |= {"clip_fraction": [0.01, 0.03], "approx_kl": [0.125, 0.5 if often else 0.0]}
    return results


def test_reuse_can_be_read():
    figure = figures.reuse_figure(reuse())
    assert_readable(figure)
    assert "(DiceSum, 80,000 tokens, five seeds)" in figure.axes[0].get_title()
    assert (
        figure.get_suptitle()
        == "Used eight times: the segment's ratio ends at 25%, at a wide clip 25%"
    )


def test_reuse_shows_three_measures_against_the_epochs():
    """Those of the table: a mean of the accuracies' middle half, a mean, and the largest of all."""
    results = reuse()
    results["runs"][0]["curve"]["clip_fraction"] = [0.12]  # segment ratio, one epoch, seed 0
    results["runs"][0]["curve"]["approx_kl"] = [0.25]
    accuracy, clipped, kl = figures.reuse_figure(results).axes
    expected = {
        accuracy: [75, 75, 75, 25],
        clipped: [2, 2, 2, 2],
        kl: [0.125, 0.125, 0.125, 0.5],
    }
    for axes, heights in expected.items():
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == list(REUSED)
        assert names_of_lines(axes) == [figures.in_words(label) for label in REUSED]
        for kind, line in lines.items():
            first, *others = line.get_ydata().tolist()
            assert line.get_xdata().tolist() == [1, 2, 4, 8] and others == pytest.approx(
                heights[1:]
            )
            assert (line.get_color() == common.PURPLE) == (kind == "segment ratio")
            if kind != "segment ratio":
                assert first == pytest.approx(heights[0])
    of_sapo = [axes.lines[0].get_ydata()[0] for axes in (accuracy, clipped, kl)]
    assert of_sapo == pytest.approx([75, (12 + 4 * 2) / 5, 0.25])


def test_the_title_of_reuse_tells_the_narrow_clip_from_the_wide_one():
    results = reuse()
    for run in results["runs"]:
        if run["label"] == "segment ratio, clip 0.2, 8 epochs":
            run["accuracy"] = 0.125
    title = figures.reuse_figure(results).get_suptitle()
    assert title == "Used eight times: the segment's ratio ends at 25%, at a wide clip 12%"


def test_reuse_shows_what_is_there_of_a_sweep_that_is_under_way():
    results = reuse(seeds=1)
    results["runs"] = results["runs"][: len(REUSED) + 1]  # all kinds once, one at two epochs, too
    figure = figures.reuse_figure(results)
    lines = {line.get_label(): line.get_xdata().tolist() for line in figure.axes[0].lines}
    assert lines.pop("segment ratio") == [1, 2]
    assert all(epochs == [1] for epochs in lines.values())
    assert figure.get_suptitle() == "How often can a rollout be used?"


def test_lift_can_be_read():
    by_critic = {"0.5": [0.87, 0.79, 0.96], "0.2": [0.33, 0.18, 0.5], "0.05": [0.7, 0.2, 1.29]}
    sampled = {"0.5": [1.31, 1.19, 1.42], "0.2": [1.85, 1.53, 2.14], "0.05": [2.1, 1.36, 2.74]}
    early = {"critic": {"lift": by_critic}, "Monte Carlo": {"lift": sampled}}
    late = {"critic": {"lift": by_critic}, "Monte Carlo": {"lift": sampled | {"0.05": [2.1, 1, 6]}}}
    figure = figures.lift_figure({"task": "DiceSum", "early": early, "late": late})
    assert_readable(figure)
    for axes in figure.axes:
        drawn = {}
        for line in axes.lines:
            drawn[line.get_label()] = line.get_ydata()
        assert list(drawn["V by the critic"]) == [0.87, 0.33, 0.7]
        assert list(drawn["V by 64 continuations"]) == [1.31, 1.85, 2.1]
        assert axes.get_ylim() == pytest.approx((0, 6.3))  # of the highest of both panels


def test_the_title_of_lift_has_that_of_the_tenth():
    tenth = {"critic": {"lift": {"0.1": [1, 0, 2]}}, "Monte Carlo": {"lift": {"0.1": [3.12, 2, 4]}}}
    figure = figures.lift_figure({"task": "DiceSum", "early": tenth, "late": tenth})
    said = "V jumps 3.1 times as often at unsure tokens as at any; after it, 3.1 times"
    assert figure.get_suptitle().endswith(said)


# ----------------------------------------------------------------------------- what critics see


def sight(steps, explained, auroc):
    """A measurement of lab/critic.py."""
    seen = {"explained_variance": explained, "auroc_of_first_wrong_step": auroc}
    seen |= {"auroc_in_wrong_responses": auroc, "share_of_blame": [0.2, 0.1, 0.3]}
    return seen | {
        "optimizer_steps": steps,
        "generated_tokens": 1000 * steps,
        "wrong_responses": 40,
    }


def critics(variants, tasks=("dice",), seeds=(10, 11)):
    """What lab/critic.py writes, made up: the i-th variant on seed s ends with an explained
    variance e of i/10 + (s - 10)/5, and an AUROC of (1 + e)/2."""
    measured = []
    for task, seed in itertools.product(tasks, seeds):
        where = {"task": task, "seed": seed, "flags": "", "accuracy": 0.4 + (seed - 10) / 5}
        for i, variant in enumerate(variants):
            end = i / 10 + (seed - 10) / 5
            curve = [sight(32, end / 2, 0.5), sight(64, end, (1 + end) / 2)]
            measured.append(where | {"variant": variant, "curve": curve})
        seen = sight(0, 0.6 + (seed - 10) / 5, 0.7)
        del seen["optimizer_steps"], seen["generated_tokens"]
        seen |= {"responses": 96, "continuations": 64}
        measured.append(where | {"variant": "ceiling", "curve": [seen]})
    return {"variants": {name: {"lr": 2e-3} for name in variants}, "measured": measured}


@pytest.mark.parametrize("tasks", [list(critic.TASKS), ["dice"]], ids=" ".join)
def test_what_critics_see_can_be_read_and_hears_stands_out(tasks):
    figure = figures.critic_figure(critics(critic.VARIANTS, tasks))
    assert_readable(figure)
    assert len(figure.axes) == 2 * len(tasks)
    for axes, task in zip(figure.axes, tasks, strict=False):  # the upper row
        assert axes.get_title() == f"{figures.POLICIES[task]}:\n50% right"
    for place, axes in enumerate(figure.axes):
        styles = {line.get_label(): line for line in axes.lines}
        assert list(styles) == list(figures.SEEN_BY.values())
        hears = styles.pop("reads and hears")
        assert hears.get_color() == common.GREEN
        assert hears.get_linewidth() > max(line.get_linewidth() for line in styles.values())
        assert all(is_grey(line.get_color()) for line in styles.values())
        is_last = (place + 1) % len(tasks) == 0
        assert names_of_lines(axes) == (list(figures.SEEN_BY.values()) if is_last else [])


def test_a_critics_line_is_the_mean_over_seeds_by_hand():
    figure = figures.critic_figure(critics(["as before", "hears"], ["dice", "nine"]))
    for axes in figure.axes:
        before, hears, sampled = axes.lines
        assert before.get_xdata().tolist() == hears.get_xdata().tolist() == [32, 64]
        assert list(sampled.get_xdata()) == pytest.approx([32, 64])
        assert list(sampled.get_ydata()) == pytest.approx([0.7, 0.7])
    for axes in figure.axes[:2]:  # explained variance of both policies
        before, hears, _ = axes.lines
        assert before.get_ydata().tolist() == pytest.approx([0.05, 0.1])  # of 0 and 0.2
        assert hears.get_ydata().tolist() == pytest.approx([0.1, 0.2])  # of 0.1 and 0.3
    for axes in figure.axes[2:]:
        before, hears, _ = axes.lines
        assert before.get_ydata().tolist() == pytest.approx([0.5, 0.55])
        assert hears.get_ydata().tolist() == pytest.approx([0.5, 0.6])


def test_the_title_of_what_critics_see_says_who_explains_the_most_where_it_is_so():
    """Of the policies that are right more than half the time."""
    said = "Of a policy that is mostly right, a critic that hears explains the most"
    for order, accuracy, title in (
        (["as before", "hears"], 0.6, said),
        (["hears", "as before"], 0.6, "What critics see of frozen policies"),
        (["hears", "as before"], 0.4, "What critics see of frozen policies"),
    ):
        results = critics(order)
        for row in results["measured"]:
            row["accuracy"] = accuracy
        assert figures.critic_figure(results).get_suptitle() == title


def test_critics_without_a_ceiling_yet_are_drawn(tmp_path):
    file = tmp_path / "critic.json"
    results = critics(["as before", "hears"])
    measured = [row for row in results["measured"] if row["variant"] != "ceiling"]
    file.write_text(json.dumps(results | {"measured": measured}))
    assert figures.critic(file) == tmp_path / "critic.svg"
    assert "<path" in (tmp_path / "critic.svg").read_text()


def test_critics_that_the_figure_does_not_show_leave_it_empty_but_drawn():
    results = critics(["logistic"])
    results["measured"] = results["measured"][:1]
    assert not figures.critic_figure(results).axes[0].lines


# -------------------------------------------------------------------------- a folder of results


def test_the_same_results_give_the_same_bytes(tmp_path):
    """Whatever was drawn in between, and without a date."""
    file = tmp_path / "main-DiceSum.json"
    file.write_text(json.dumps(sweep({"sapo": [0.7, 0.8], "ppo": [0.6, 0.7]})))
    first = figures.comparison(file).read_bytes()
    figures.comparison_figure(sweep({"grpo": [0.5]}))
    assert figures.comparison(file).read_bytes() == first
    assert b"<dc:date>" not in first


def test_a_folder_of_results_is_drawn_but_for_what_has_no_figure(tmp_path):
    """A tuning, a run's summary and a benchmark have none."""
    for experiment in EXPERIMENTS:
        made = sweep(EXPERIMENTS[experiment], experiment, seeds=1)
        if experiment == "reuse":
            made = reuse(seeds=1)
        (tmp_path / f"{experiment}-DiceSum.json").write_text(json.dumps(made))
    (tmp_path / "critic.json").write_text(json.dumps(critics(["as before", "hears"])))
    for name in ("bench_math", "default-sapo-seed0"):
        (tmp_path / f"{name}.json").write_text('{"seconds": 1}')
    names = [path.name for path in figures.drawn(tmp_path)]
    assert names == [
        "controls-DiceSum.svg",
        "critic.svg",
        "cuts-DiceSum.svg",
        "games-DiceSum.svg",
        "horizon-DiceSum.svg",
        "main-DiceSum.svg",
        "parts-DiceSum.svg",
        "reuse-DiceSum.svg",
        "seeds-DiceSum.svg",
        "seeing-DiceSum.svg",
        "topk-DiceSum.svg",
    ]
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == sorted(names)


# ------------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize(
    "make, name", [(figures.learning_curve, "metrics.jsonl"), (credit_map, "samples.jsonl")]
)
def test_a_torn_last_line_is_dropped(run, make, name):
    path = run / name
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index(b"\n") // 2])  # killed while it wrote a line
    make(run)
    # Torn inside a character; blank lines between the others.
    path.write_bytes(whole.replace(b"\n", b"\n\n") + b'{"iteration": "\xe2')
    make(run)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no complete line"),
        ('{"iter', "no complete line"),
        ("[1]\n", "line 1: no object"),
        ('{"a": 1}\n', "line 1: no object"),
        ('{"iter\n{"iteration": 1}\n', "line 1 is not JSON"),
    ],
)
@pytest.mark.parametrize(
    "make, name", [(figures.learning_curve, "metrics.jsonl"), (credit_map, "samples.jsonl")]
)
def test_unusable_files_are_named_in_one_line(run, make, name, text, message):
    path = run / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        make(run)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, name", [(figures.learning_curve, "metrics.jsonl"), (credit_map, "samples.jsonl")]
)
def test_missing_files_are_named(run, make, name):
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        make(run)


TOO_LARGE = 10**400  # for a float


@pytest.mark.parametrize("make", [credit_map, explorer])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokens": [1, 2, 3]}, r"tokens\[0\] is 1, expected a text"),
        ({"tokens": "abc"}, "tokens is 'abc', expected a list, a text for each token"),
        ({"values": ["a", 0, 0]}, r"values\[0\] is 'a', expected a number"),
        ({"values": [0, [1], 0]}, r"values\[1\] is \[1\], expected a number"),
        ({"advantages": [0, 0, TOO_LARGE]}, r"advantages\[2\] is 1000+, expected a number"),
        ({"advantages": [True] * 3}, r"advantages\[0\] is True, expected a number"),
        ({"entropy": 5}, "entropy is 5, expected a list"),
        ({"logp": ["x"] * 3}, r"logp\[0\] is 'x', expected a number"),
        ({"exact_values": [0.0]}, "1 exact_values for 3 tokens"),
        ({"ends": [0, 7, 1]}, r"ends\[0\] is 0, expected true or false"),
        ({"written": "abc"}, "written is 'abc', expected a list"),
        ({"image": [1]}, r"image is \[1\], expected a PNG in base64"),
        ({"reward": "x"}, "reward is 'x', expected a finite number"),
        ({"reward": TOO_LARGE}, "reward is 1000+, expected a finite number"),
        ({"reward": math.nan}, "reward is nan, expected a finite number"),
        ({"correct": "no"}, "correct is 'no', expected true or false"),
        ({"prompt": {"a": 1}}, "prompt is {'a': 1}, expected a text or a number"),
        ({"steps": [[0, 10**12, True]]}, "the step .*within 3 tokens"),
        ({"turns": "x"}, "turns 'x', expected a list"),
        ({"turns": [{}]}, "the turn {}, expected the tokens"),
        ({"turns": [{"first": 0, "last": 10**12, "said": ""}]}, "the turn .*within 3 tokens"),
        ({"turns": [{"first": 0, "last": 1, "said": 5}]}, "the turn .*what was `said`"),
        ({"turns": [{"first": 0, "last": 1, "said": ""}] * 2}, "the turn .* from 2 on within 3"),
        ({"turns": [{"first": 0, "last": 1, "said": "", "image": 7}]}, "image is 7, expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_field_of_a_sample_that_is_none_is_named_in_one_line(run, make, changed, told):
    """With its iteration and example, before anything is drawn."""
    write_lines(run, "samples.jsonl", [sample(list("abc")), sample(list("abc")) | changed])
    where = r"^\S*samples.jsonl, iteration 4, example 7: "
    with pytest.raises(ValueError, match=f"{where}.*{told}") as refused:
        make(run)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("make", [credit_map, explorer])
def test_a_task_of_ones_own_may_have_any_answer(run, make):
    write_lines(run, "samples.jsonl", [sample(list("abc"), answer=[1, {"a": 2}], predicted=3)])
    assert make(run).is_file()


def test_the_page_computes_with_finite_numbers(run):
    write_lines(run, "samples.jsonl", [sample(list("abc"), token_values=[0, math.nan, 0])])
    with pytest.raises(ValueError, match=r"example 7: token_values\[1\] is nan, expected a finite"):
        explorer(run)


@pytest.mark.parametrize("key", common.DRAWN)
@pytest.mark.parametrize("value", [TOO_LARGE, "x", [0.5]])
def test_a_metric_that_is_no_number_is_named_in_one_line(run, key, value):
    write_lines(run, "metrics.jsonl", [{"iteration": 3, key: value}])
    with pytest.raises(ValueError, match=f"metrics.jsonl, iteration 3: {key} is .*a number"):
        figures.learning_curve(run)


@pytest.mark.parametrize("word", common.NOT_FINITE)
def test_a_metric_that_is_not_finite_is_read_as_it_was(run, word):
    write_lines(run, "metrics.jsonl", [{"iteration": 3, "explained_variance": word}])
    (row,) = common.read_metrics(run / "metrics.jsonl")
    assert str(row["explained_variance"]) == word and isinstance(row["explained_variance"], float)


@pytest.mark.parametrize(
    ("make", "name"), [(figures.learning_curve, "metrics.jsonl"), (credit_map, "samples.jsonl")]
)
@pytest.mark.parametrize("iteration", [10**30, -1, True, 0.5])
def test_an_iteration_is_a_whole_number_that_can_be_drawn(run, make, name, iteration):
    write_lines(run, name, [{"iteration": iteration}])
    with pytest.raises(ValueError, match="line 1: no object with a whole `iteration`"):
        make(run)


def test_a_run_of_which_nothing_is_held_out_is_told_so(run):
    write_lines(run, "samples.jsonl", [sample(list("abc"), learned_from=True)])
    with pytest.raises(ValueError, match="holds no held-out response"):
        credit_map(run)


@pytest.mark.parametrize("lam", ["NaN", "1" + "0" * 400, "[1]"])
def test_settings_that_are_no_numbers_leave_those_of_the_paper(run, lam):
    told = (
        '{"config": {"value_at": "start", "lam": %s}, "settings": {"credit": "critic", "cut": ""}}'
    )
    (run / "config.json").write_text(told % lam)
    assert '"lam":0.99' in explorer(run).read_text(encoding="utf-8")


def test_no_clip_is_a_large_one_on_the_page(run):
    """In config.json it is a word."""
    config = {"value_at": "start", "clip_high": "inf"}
    stored = {"config": config, "settings": {"credit": "critic", "cut": ""}}
    (run / "config.json").write_text(json.dumps(stored))
    assert '"clip_high":1000000000.0' in explorer(run).read_text(encoding="utf-8")


# --------------------------------------------------------------------------- the command line


def command(*arguments):
    """`python -m lab.figures` as a process of its own."""
    program = [sys.executable, "-m", "lab.figures", *map(str, arguments)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True)


def test_the_command_draws_a_run(run):
    done = command(run, "--count", "2")
    assert done.returncode == 0, done.stderr
    drawn = ("learning_curve.png", "credit.svg", "credit.html")
    assert done.stdout.split() == [str(run / name) for name in drawn]


def test_the_command_draws_a_folder_of_results(tmp_path):
    (tmp_path / "cuts-DiceSum.json").write_text(json.dumps(sweep({"topk": [0.5]}, "cuts")))
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "cuts-DiceSum.svg")]


def test_the_command_says_in_one_line_why_it_cannot_draw(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "main-DiceSum.json").write_text('{"runs": [')
    cases = [("none", "is no folder"), ("empty", "metrics.jsonl is missing")]
    cases += [("cut", "main-DiceSum.json: expected one whole object of JSON (Expecting value")]
    for folder, message in cases:
        failed = command(tmp_path / folder)
        assert failed.returncode == 1
        assert message in failed.stderr and failed.stderr.count("\n") == 1
