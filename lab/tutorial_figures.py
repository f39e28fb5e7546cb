"""The pictures of tutorial.md, drawn from committed results.

    python -m lab.figures tutorial        # -> results/tutorial-*.svg

Most show the one episode that the tutorial follows, results/episode.json (lab/episode.py). The
credit in them is computed here, by sapo.py. Each picture holds the hash of what it was made of, so
that a test can tell when it is stale.
"""

import base64
import hashlib
import io
from pathlib import Path

import torch
from PIL import Image

import sapo
from lab.common import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    PURPLE,
    VERMILLION,
    headline,
    name_lines,
    new_figure,
    read_lines,
    read_outcome,
    save_svg,
)
from lab.sweep import ROOT

RESULTS = ROOT / "results"
EPISODE = RESULTS / "episode.json"
RUN = RESULTS / "default-sapo-seed0-metrics.jsonl"
REUSE = RESULTS / "reuse-DiceSum.json"
LAMBDAS = (0.0, 0.5, 0.99)


# -------------------------------------------------------------------------------- the episode


def tensors(episode):
    """(entropy, values, rewards, mask) of the episode, (1, T) each."""
    rows = [episode["entropy"], episode["token_values"], episode["rewards"]]
    entropy, values, rewards = (torch.tensor([row]) for row in rows)
    return entropy, values, rewards, torch.ones_like(entropy, dtype=torch.bool)


def wrong_span(episode):
    """(first, last) token of the first wrong step."""
    return next((first, last) for first, last, right in episode["steps"] if not right)


def draw_tokens(axes, episode, ends=None, advantages=None, largest=1.0, name=""):
    """A row of boxes, one per token: tinted by advantage (in full where it is `largest`), a bar
    behind each end, the wrong step underlined. -> the left edge of each box."""
    from matplotlib.patches import Rectangle  # drawn with, only when something is

    lefts, left = [], 0.0
    first_wrong, last_wrong = wrong_span(episode)
    for t, token in enumerate(episode["tokens"]):
        lefts.append(left)
        width = 0.9 + 0.62 * (len(token) - 1)
        strength = advantages[t] / largest if advantages else 0.0
        colour = BLUE if strength > 0 else VERMILLION
        box = {"facecolor": colour, "alpha": 0.75 * abs(strength), "linewidth": 0}
        axes.add_patch(Rectangle((left, 0), width, 1, **box))
        axes.add_patch(Rectangle((left, 0), width, 1, fill=False, edgecolor="#D0D0D0"))
        place = left + width / 2
        axes.text(place, 0.5, token, ha="center", va="center", fontsize=8, family="monospace")
        if first_wrong <= t <= last_wrong:
            axes.plot([left + 0.1, left + width - 0.1], [-0.22, -0.22], color=INK, linewidth=2.2)
        left += width
        if ends is not None and ends[t]:
            axes.plot([left, left], [-0.12, 1.12], color=INK, linewidth=1.8)
    axes.text(-0.5, 0.5, name, ha="right", va="center", fontsize=9)
    axes.set(xlim=(-9.5, left + 0.3), ylim=(-0.5, 1.3))
    axes.set_axis_off()
    return lefts


def episode_figure(episode):
    """The dice, what the policy wrote token by token, and what it earned."""
    figure, (picture, strip) = new_figure(1.7, 2, width_ratios=[1, 8])
    image = Image.open(io.BytesIO(base64.b64decode(episode["image"])))
    picture.imshow(image, interpolation="nearest")
    picture.set_axis_off()
    draw_tokens(strip, episode)
    strip.set(xlim=(-0.5, strip.get_xlim()[1]), ylim=(-1.2, 2.2))
    headline(
        figure,
        f"One response of {len(episode['tokens'])} tokens: reward {episode['reward']:.0f} "
        f"(right is {episode['answer']}). Underlined: the wrong step",
    )
    return figure


def step_figure(episode):
    """The probability of each digit before one step of REINFORCE and after it."""
    figure, panels = new_figure(3, 2, sharey=True)
    titles = ("the digit misread", "the digit before it, read rightly")
    for axes, place, title in zip(panels, episode["digits"].values(), titles, strict=True):
        for shift, (when, colour) in enumerate((("before", "#B8B8B8"), ("after", INK))):
            heights = [100 * share for share in place[when]]
            axes.bar(
                [d + 0.4 * shift - 0.2 for d in range(10)], heights, 0.4, color=colour, label=when
            )
        axes.set_xticks(range(10))
        axes.set_xlabel(f"digit; written was {place['written']}")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("probability (%)")
    panels[0].legend(fontsize=9, frameon=False)
    text = "the written 5 becomes rarer, the 6 likelier; a sure digit hardly moves"
    headline(figure, f"One step of REINFORCE: {text}")
    return figure


def values_figure(episode):
    """V before each token, by a critic that hears the policy and by one that does not."""
    figure, (axes, strip) = new_figure(3.4, 1, rows=2, height_ratios=[6, 1], sharex=True)
    places = draw_tokens(strip, episode)
    first, last = wrong_span(episode)
    axes.axvspan(places[first], places[last + 1], color="#E4E4E4", linewidth=0)
    wrong = {"color": FAINT, "fontsize": 9, "va": "bottom"}
    axes.text(places[last + 1] + 0.2, 0.01, "the wrong step", **wrong)
    for key, name, colour, width in (
        ("token_values", "hears", GREEN, 2.2),
        ("blind_values", "hears nothing", FAINT, 1.4),
    ):
        style = {"color": colour, "linewidth": width, "marker": "o", "markersize": 3}
        axes.plot(places, episode[key], label=name, **style)
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 1), ylabel="V before the token", xlim=(-0.5, strip.get_xlim()[1]))
    axes.set_xticks(places)
    headline(figure, "The critic that hears drops after the wrong step")
    name_lines(axes)
    return figure


def gae_row(episode, ends, lam):
    """Advantages of the episode's tokens under a cut, as a list."""
    _, values, rewards, mask = tensors(episode)
    return sapo.segment_gae(rewards, values, ends, mask, lam=lam)[0][0].tolist()


def draw_credit(rows, text):
    """Rows of (name, episode, ends, advantages) below each other, all on one scale."""
    figure, panels = new_figure(3, 1, rows=len(rows))
    largest = max(abs(a) for *_, advantages in rows for a in advantages)
    for axes, (name, episode, ends, advantages) in zip(panels, rows, strict=True):
        draw_tokens(axes, episode, ends, advantages, largest, name)
    headline(figure, text)
    key = f"Orange: blame, blue: praise; in full at an advantage of {largest:.2f}, in all rows"
    figure.supxlabel(f"{key}. A bar ends a segment. Underlined: the wrong step", fontsize=9)
    return figure


def units_figure(episode):
    """The same response as tokens, as segments, and as one answer: cut and credit."""
    entropy, _, _, mask = tensors(episode)
    token, cut = sapo.token_ends(mask), sapo.entropy_ends(entropy, mask)
    whole = [episode["reward"] - episode["baseline"]] * len(episode["tokens"])
    rows = [
        ("token (PPO)", episode, token[0], gae_row(episode, token, 0.9)),
        ("segment (SAPO)", episode, cut[0], gae_row(episode, cut, 0.9)),
        ("answer (GRPO)", episode, sapo.response_ends(mask)[0], whole),
    ]
    return draw_credit(rows, "GRPO blames every token alike, the others most of all the slip")


def lambdas_figure(episode):
    """Segment GAE at three lambdas."""
    entropy, _, _, mask = tensors(episode)
    cut = sapo.entropy_ends(entropy, mask)
    rows = [(f"lambda {lam:g}", episode, cut[0], gae_row(episode, cut, lam)) for lam in LAMBDAS]
    return draw_credit(
        rows, "The smaller lambda is, the fewer segments before the slip are blamed for it"
    )


# --------------------------------------------------------------------------- ratio, clip, runs


def clip_figure():
    """The clipped objective for both signs of A, and the root against the product."""
    figure, (good, bad, lengths) = new_figure(3.4, 3)
    ratios = torch.linspace(0, 2, 201)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axes, advantage, title in (
        (good, 1.0, "Praise, A = +1: no more to gain beyond 1.2"),
        (bad, -1.0, "Blame, A = \N{MINUS SIGN}1: no more to gain below 0.8"),
    ):
        objective = [
            -sapo.policy_loss(ratio.view(1, 1), torch.tensor([[advantage]]), mask)[0].item()
            for ratio in ratios
        ]
        unclipped = [ratio * advantage for ratio in ratios]
        axes.plot(ratios, unclipped, color=FAINT, linestyle="--", label="without a clip")
        axes.plot(ratios, objective, color=INK, linewidth=2.2, label="clipped")
        axes.axvspan(0.8, 1.2, color="#E4E4E4", linewidth=0)
        beside = {"transform": axes.get_xaxis_transform(), "ha": "center", "fontsize": 8}
        axes.text(1, 0.96, "1 ± 0.2", va="top", **beside)
        axes.set_xlabel("ratio")
        axes.set_title(title, fontsize=10)
    good.set_ylabel("objective")
    good.legend(loc="lower right", fontsize=8, frameon=False)
    tokens = range(1, 51)
    lengths.plot(tokens, [1.02**n for n in tokens], color=FAINT, label="product of token ratios")
    mean = {"color": PURPLE, "linewidth": 2.2, "label": "geometric mean (SAPO, Eq. 8)"}
    lengths.plot(tokens, [1.02] * 50, **mean)
    lengths.set(xlabel="tokens in the segment, each 2% likelier", ylabel="ratio")
    lengths.legend(fontsize=8, frameon=False)
    lengths.set_title("A product grows with the length", fontsize=10)
    headline(figure, "The clip ends the gain, not the loss; a mean keeps length out of the ratio")
    return figure


def run_figure(lines):
    """The learning curve of the default run, with what to look at."""
    figure, (accuracy, critic, clip) = new_figure(3.4, 3)
    trained = [line for line in lines if "accuracy" in line]
    iterations = [line["iteration"] for line in trained]
    for axes, key, colour, scale in (
        (accuracy, "accuracy", FAINT, 100),
        (critic, "explained_variance", GREEN, 1),
        (clip, "clip_fraction", INK, 100),
    ):
        axes.plot(iterations, [scale * line[key] for line in trained], color=colour, alpha=0.9)
        axes.set_xlabel("iteration")
    held_out = [line for line in lines if "eval_accuracy" in line]
    accuracy.plot(
        [line["iteration"] for line in held_out],
        [100 * line["eval_accuracy"] for line in held_out],
        "o",
        color=INK,
    )
    accuracy.set(ylabel="answers that are right (%)", ylim=(0, 100))
    accuracy.set_title("It learns: batches (line), held out (dots)", fontsize=10)
    critic.set(ylabel="explained variance", ylim=(-0.2, 1))
    critic.set_title("The critic comes to see: above 0", fontsize=10)
    clip.set(ylabel="tokens clipped (%)")
    clip.set_title("The clip is at work on some tokens", fontsize=10)
    first, last = held_out[0]["eval_accuracy"], held_out[-1]["eval_accuracy"]
    headline(figure, f"A good run: held-out accuracy {first:.0%} → {last:.0%}")
    return figure


BROKEN = {
    "no clip, 4 epochs": "SAPO without a clip, 4 epochs",
    "segment ratio, clip 0.2, 8 epochs": "SAPO, clip 0.2, 8 epochs",
    "ppo, 8 epochs": "PPO, 8 epochs",
}
WARNING = 0.1  # an approx_kl that the tutorial's table calls too large


def broken_figure(results):
    """Three runs that broke: accuracy, and below it the number that told of it."""
    runs = {run["label"]: run for run in results["runs"] if run["seed"] == 0}
    figure, panels = new_figure(4.4, 3, rows=2, sharex="col", sharey="row")
    for place, (label, title) in enumerate(BROKEN.items()):
        curve = runs[label]["curve"]
        iterations = range(1, len(curve["accuracy"]) + 1)
        accuracy, divergence = panels[place], panels[place + 3]
        accuracy.plot(iterations, [100 * share for share in curve["accuracy"]], color=INK)
        accuracy.set_title(title, fontsize=10)
        divergence.plot(iterations, curve["approx_kl"], color=INK)
        divergence.axhline(WARNING, color=FAINT, linestyle="--", linewidth=1.2)
        divergence.set_xlabel("iteration")
        divergence.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set(ylim=(0, 100), ylabel="answers that\nare right (%)")
    panels[3].set(yscale="log", ylabel="approx_kl\n(nats per token)")
    panels[3].yaxis.set_major_formatter("{x:g}")
    panels[3].text(1, 1.2 * WARNING, f"{WARNING}: too large", fontsize=9)
    headline(figure, f"Runs that broke: each moved further than {WARNING} on one rollout")
    return figure


# ----------------------------------------------------------------------------------- all of it


def made_of(name):
    """The hash of what a picture is made of: its data and the code that draws it."""
    sources = {"run": [RUN], "broken": [REUSE], "clip": []}.get(name, [EPISODE])
    sha = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        sha.update(source.read_bytes())
    return sha.hexdigest()


def drawn():
    """Draw all of them into results/; yields the path of each."""
    episode = read_outcome(EPISODE)
    pictures = {
        "episode": episode_figure(episode),
        "step": step_figure(episode),
        "values": values_figure(episode),
        "units": units_figure(episode),
        "lambdas": lambdas_figure(episode),
        "clip": clip_figure(),
        "run": run_figure(read_lines(RUN)),
        "broken": broken_figure(read_outcome(REUSE)),
    }
    for name, figure in pictures.items():
        path = RESULTS / f"tutorial-{name}.svg"
        yield save_svg(figure, path, description=made_of(name))
