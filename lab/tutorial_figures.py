"""The pictures of tutorial.md, drawn from committed results.

    python -m lab.figures tutorial        # -> results/tutorial-*.svg

Most show the one episode that the tutorial follows, results/episode.json (lab/episode.py). The
credit in them is computed here, by sapo.py. Each picture holds the hash of what it was made of, so
that a test can tell when it is stale.
"""

import base64
import hashlib
import io
import json
from pathlib import Path

import torch
from PIL import Image

import sapo
from lab.common import BLUE, FAINT, GREEN, INK, PURPLE, VERMILLION, new_figure, read_lines, save_svg
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


def draw_tokens(axes, episode, ends=None, advantages=None, name=""):
    """A row of boxes, one per token: tinted by advantage, a bar behind each end, the wrong step
    underlined."""
    from matplotlib.patches import Rectangle  # drawn with, only when something is

    largest = max(max(map(abs, advantages)), 1e-9) if advantages else 1.0
    left = 0.0
    first_wrong, last_wrong = wrong_span(episode)
    for t, token in enumerate(episode["tokens"]):
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


def episode_figure(episode):
    """The dice, what the policy wrote token by token, and what it earned."""
    figure, (picture, strip) = new_figure(1.7, 2, width_ratios=[1, 8])
    image = Image.open(io.BytesIO(base64.b64decode(episode["image"])))
    picture.imshow(image, interpolation="nearest")
    picture.set_axis_off()
    draw_tokens(strip, episode)
    strip.set_xlim(left=-0.5)
    strip.set_title(
        f"One response: {len(episode['tokens'])} tokens, reward {episode['reward']:.0f} "
        f"(right is {episode['answer']}). Underlined: the step that was wrong",
        fontsize=10,
    )
    return figure


def step_figure(episode):
    """The probability of each digit before one step of REINFORCE and after it."""
    figure, panels = new_figure(2.8, 2)
    for axes, (name, place) in zip(panels, episode["digits"].items(), strict=True):
        for shift, (when, colour) in enumerate((("before", FAINT), ("after", VERMILLION))):
            heights = [100 * share for share in place[when]]
            axes.bar(
                [d + 0.4 * shift - 0.2 for d in range(10)], heights, 0.4, color=colour, label=when
            )
        axes.set_xticks(range(10))
        axes.set(xlabel=f"digit; written was {place['written']}", ylabel="probability (%)")
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    title = "One step of REINFORCE: the wrong digit becomes rarer, the right one likelier"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure


def values_figure(episode):
    """V before each token, by a critic that hears the policy and by one that does not."""
    figure, (axes,) = new_figure(3, 1)
    positions = range(len(episode["tokens"]))
    axes.plot(positions, episode["blind_values"], color=FAINT, marker="o", markersize=3)
    axes.plot(positions, episode["token_values"], color=GREEN, marker="o", markersize=3)
    first, last = wrong_span(episode)
    axes.axvspan(first - 0.5, last + 0.5, color=VERMILLION, alpha=0.18, linewidth=0)
    axes.text(last + 0.7, 0.93, "the wrong step", color=VERMILLION, fontsize=9)
    end = len(episode["tokens"]) - 0.6
    axes.text(end, episode["token_values"][-1], "hears", color=GREEN, va="center", fontsize=9)
    axes.text(
        end, episode["blind_values"][-1], "hears nothing", color=FAINT, va="center", fontsize=9
    )
    axes.set_xticks(positions, episode["tokens"], fontsize=7, family="monospace", rotation=60)
    axes.set(ylim=(0, 1), ylabel="V before the token", xlim=(-0.7, end + 3.5))
    axes.set_title("A critic that sees drops after the wrong step", fontsize=11, fontweight="bold")
    return figure


def gae_row(episode, ends, lam):
    """Advantages of the episode's tokens under a cut, as a list."""
    _, values, rewards, mask = tensors(episode)
    return sapo.segment_gae(rewards, values, ends, mask, lam=lam)[0][0].tolist()


def units_figure(episode):
    """The same response as tokens, as segments, and as one answer: cut and credit."""
    figure, panels = new_figure(2.6, 1, rows=3)
    entropy, _, _, mask = tensors(episode)
    cut = sapo.entropy_ends(entropy, mask)
    whole = [episode["reward"] - episode["baseline"]] * len(episode["tokens"])
    draw_tokens(
        panels[0], episode, mask[0], gae_row(episode, sapo.token_ends(mask), 0.7), "token (PPO)"
    )
    draw_tokens(panels[1], episode, cut[0], gae_row(episode, cut, 0.7), "segment (SAPO)")
    draw_tokens(panels[2], episode, sapo.response_ends(mask)[0], whole, "answer (GRPO)")
    title = "Three units of credit. Orange is blame, blue is praise, a bar is a cut"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure


def lambdas_figure(episode):
    """Segment GAE at three lambdas."""
    figure, panels = new_figure(2.6, 1, rows=len(LAMBDAS))
    entropy, _, _, mask = tensors(episode)
    cut = sapo.entropy_ends(entropy, mask)
    for axes, lam in zip(panels, LAMBDAS, strict=True):
        draw_tokens(axes, episode, cut[0], gae_row(episode, cut, lam), f"lambda {lam:g}")
    title = "The smaller lambda is, the fewer segments before the slip are blamed for it"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure


# --------------------------------------------------------------------------- ratio, clip, runs


def clip_figure():
    """The clipped objective for both signs of A, and the root against the product."""
    figure, (good, bad, lengths) = new_figure(3, 3)
    ratios = torch.linspace(0, 2, 201)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axes, advantage in ((good, 1.0), (bad, -1.0)):
        objective = [
            -sapo.policy_loss(ratio.view(1, 1), torch.tensor([[advantage]]), mask)[0].item()
            for ratio in ratios
        ]
        axes.plot(ratios, [ratio * advantage for ratio in ratios], color="#B8B8B8", linestyle="--")
        axes.plot(ratios, objective, color=BLUE, linewidth=2.2)
        axes.axvspan(0.8, 1.2, color=FAINT, alpha=0.12, linewidth=0)
        axes.set(xlabel="ratio", ylabel="objective")
        what = (
            "beyond 1.2 nothing more to gain" if advantage > 0 else "below 0.8 nothing more to gain"
        )
        axes.set_title(f"A = {advantage:+.0f}: {what}", fontsize=10)
    tokens = range(1, 51)
    lengths.plot(
        tokens, [1.02**n for n in tokens], color=VERMILLION, label="product of token ratios"
    )
    lengths.plot(tokens, [1.02] * 50, color=BLUE, label="their geometric mean (Eq. 8)")
    lengths.set(xlabel="tokens in the segment, each 2% likelier", ylabel="ratio")
    lengths.legend(fontsize=8, frameon=False)
    lengths.set_title("A product grows with the length", fontsize=10)
    return figure


def run_figure(lines):
    """The learning curve of the default run, with what to look at."""
    figure, (accuracy, critic, clip) = new_figure(3.2, 3)
    trained = [line for line in lines if "accuracy" in line]
    iterations = [line["iteration"] for line in trained]
    for axes, key, colour, scale in (
        (accuracy, "accuracy", BLUE, 100),
        (critic, "explained_variance", GREEN, 1),
        (clip, "clip_fraction", PURPLE, 100),
    ):
        axes.plot(iterations, [scale * line[key] for line in trained], color=colour, alpha=0.9)
        axes.set_xlabel("iteration")
    held_out = [line for line in lines if "eval_accuracy" in line]
    accuracy.plot(
        [line["iteration"] for line in held_out],
        [100 * line["eval_accuracy"] for line in held_out],
        "o",
        color=INK,
        label="held out",
    )
    accuracy.legend(loc="lower right", fontsize=8, frameon=False)
    accuracy.set(ylabel="answers that are right (%)", ylim=(0, 100))
    accuracy.set_title("It learns: batches (line), held out (dots)", fontsize=10)
    critic.set(ylabel="explained variance", ylim=(-0.2, 1))
    critic.set_title("The critic comes to see: above 0", fontsize=10)
    clip.set(ylabel="tokens clipped (%)")
    clip.set_title("The clip is at work: some tokens, not many", fontsize=10)
    return figure


BROKEN = {
    "no clip, 4 epochs": "SAPO without a clip, 4 epochs",
    "grpo, 8 epochs": "GRPO, 8 epochs",
    "ppo, 8 epochs": "PPO, 8 epochs",
}


def broken_figure(results):
    """Three runs that broke: accuracy, and the number that told of it."""
    runs = {run["label"]: run for run in results["runs"] if run["seed"] == 0}
    figure, panels = new_figure(3, 3)
    for axes, (label, title) in zip(panels, BROKEN.items(), strict=True):
        curve = runs[label]["curve"]
        iterations = range(1, len(curve["accuracy"]) + 1)
        axes.plot(iterations, [100 * share for share in curve["accuracy"]], color=BLUE)
        axes.set(xlabel="iteration", ylim=(0, 100))
        axes.set_ylabel("answers that are right (%)", color=BLUE)
        divergence = axes.twinx()
        divergence.plot(iterations, curve["approx_kl"], color=VERMILLION, linestyle="--")
        divergence.set_yscale("log")
        divergence.set_ylim(1e-3, 10)
        divergence.set_ylabel("approx_kl (nats)", color=VERMILLION)
        axes.set_title(title, fontsize=10)
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
    episode = json.loads(EPISODE.read_text())
    pictures = {
        "episode": episode_figure(episode),
        "step": step_figure(episode),
        "values": values_figure(episode),
        "units": units_figure(episode),
        "lambdas": lambdas_figure(episode),
        "clip": clip_figure(),
        "run": run_figure(read_lines(RUN)),
        "broken": broken_figure(json.loads(REUSE.read_text())),
    }
    for name, figure in pictures.items():
        path = RESULTS / f"tutorial-{name}.svg"
        yield save_svg(figure, path, description=made_of(name))
