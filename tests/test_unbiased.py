"""Is SAPO's policy gradient unbiased? Answered exactly, by writing out every response there is.

    python tests/test_unbiased.py     # prints the table below and writes results/unbiased.json

A baseline is free. Subtract V(s_m) from the return of a segment and the *expected* gradient stays
what it was, because a token's score, grad log pi(y_t | y_<t), is zero on average over y_t: what
multiplies it may depend on y_<t, and adds nothing. It must not depend on y_t, nor on what comes
after. That puts two questions to SAPO:

  1. *Where is V read?*  At the start of z_m (the paper): the prefix before its first token, which
     came before all of its tokens. At the end of z_m (the released code): the prefix before its
     *last* token, which contains the others; they help to choose the baseline that they are judged
     by.
  2. *Who decides where z_m starts?*  If the cut after y_t is decided from y_<=t, as with fixed
     positions, delimiters, unlikely tokens or an entropy threshold set beforehand, then V(s_m) does
     come before every token of z_m. The paper's top-k% ranks the entropies of the whole response:
     whether a segment ends at y_t, hence where the next starts, hence which baseline a token is
     given, depends on tokens not written yet.

The paper discusses neither, and both can be checked without a sample, without a tolerance for
noise, without training. Take three tokens and four steps: 81 responses. Draw at random a policy (a
distribution per prefix), a reward per response and a critic (a number per prefix). The sum over all
responses y of

    pi(y)  x  gradient of sapo.policy_loss(sapo.segment_ratio(...), advantages of segment_gae(...))

*is* the expected gradient of SAPO's first step, where pi = pi_old, and is held against the gradient
of the expected reward. lambda = gamma = 1, so that GAE adds no bias of its own: A_m = R - V(s_m).

One factor has to be cleared away first. The sum over a response's tokens of ratio times A has the
gradient of REINFORCE with a baseline (of a segment's |z_m| tokens each pulls at all of them with
1/|z_m|: Eq. 13). Eq. 9 takes the mean, so that this comes divided by the length T. Here every
response is multiplied by its T again. Where all have four tokens this is only a scale; but let a
third token *stop*, and 1/T is a bias by itself, whatever the cut: the last test.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the command above

import sapo
from lab.enumeration import world

SEEDS = range(20)

# --------------------------------------------------------------------------------- the cuts


def ends_of(cut, w):
    """The cut of this name of all responses of a world."""
    if cut == "every token (PPO)":
        return sapo.token_ends(w.mask)
    if cut == "whole response":
        return sapo.response_ends(w.mask)
    if cut == "fixed positions":
        every_second = torch.tensor([False, True] * 2).expand_as(w.mask)
        return sapo.delimiter_ends(every_second, w.mask)
    if cut == "delimiter":
        return sapo.delimiter_ends(w.tokens == 1, w.mask)
    if cut == "low probability":
        return sapo.low_prob_ends(w.token_logp(w.logits), w.mask, threshold=0.5, every=2)
    if cut == "entropy threshold":
        return sapo.threshold_ends(w.entropy[w.prefix], w.mask, w.entropy.median().item())
    assert cut == "entropy top-k"
    return sapo.entropy_ends(w.entropy[w.prefix], w.mask, top_k=0.3)


CUTS = [
    "every token (PPO)",
    "whole response",
    "fixed positions",
    "delimiter",
    "low probability",
    "entropy threshold",
    "entropy top-k",
]
LOOKS_AHEAD = "entropy top-k"
CAUSAL = [cut for cut in CUTS if cut != LOOKS_AHEAD]
SEVERAL_TOKENS = [cut for cut in CUTS if cut != "every token (PPO)"]

# ---------------------------------------------------------------------- the expected gradient


def expected_gradient(w, cut, value_at, critic="random", over_length=False):
    """Sum over all responses of pi(y) x T x SAPO's gradient, (N, V); with `over_length` without
    that T, as Eq. 9 has it."""
    ends = ends_of(cut, w)
    per_prefix = w.exact_critic() if critic == "exact" else w.random_critic
    values = per_prefix[w.prefix]  # (B, T)
    rewards = torch.where(sapo.response_ends(w.mask), w.reward[:, None], 0.0)  # on the last token
    advantages, _ = sapo.segment_gae(
        rewards, values, ends, w.mask, gamma=1.0, lam=1.0, value_at=value_at
    )

    # policy_loss is a mean over responses, and linear in the advantages: the weights go in there
    weight = len(w.mask) * w.probability(w.logits)  # (B,)
    if not over_length:
        weight = weight * w.mask.sum(1)
    logits = w.logits.clone().requires_grad_()
    logp = w.token_logp(logits)
    ratio = sapo.segment_ratio(logp, logp.detach(), ends, w.mask)  # 1, but its gradient is not 0
    loss, _ = sapo.policy_loss(ratio, weight[:, None] * advantages, w.mask)
    return -torch.autograd.grad(loss, logits)[0]


def error_and_angle(cut, value_at, seed, critic="random", stops=False, over_length=False):
    """|expected - true gradient| / |true gradient|, and the angle between them in degrees."""
    w = world(seed, stops)
    expected, true = expected_gradient(w, cut, value_at, critic, over_length), w.true_gradient()
    cosine = (expected * true).sum() / expected.norm() / true.norm()
    angle = math.degrees(math.acos(min(1.0, cosine.item())))
    return ((expected - true).norm() / true.norm()).item(), angle


def errors(cut, value_at, **options):
    """The relative error in each of the random worlds."""
    return [error_and_angle(cut, value_at, seed, **options)[0] for seed in SEEDS]


def mean(values):
    return sum(values) / len(values)


# ------------------------------------------------------------------------------- what is true

either_world = pytest.mark.parametrize("stops", [False, True], ids=["four tokens", "with a stop"])
either_critic = pytest.mark.parametrize("critic", ["random", "exact"])


@pytest.mark.parametrize(("stops", "count"), [(False, 81), (True, 31)])
def test_these_are_all_responses(stops, count):
    """81 of four tokens, or 31 of one to four; their probabilities add up to 1."""
    assert len(world(0, stops).mask) == count
    for seed in SEEDS:
        w = world(seed, stops)
        assert w.probability(w.logits).sum().item() == pytest.approx(1, abs=1e-12)


@either_world
def test_an_exact_critic_knows_the_expected_reward(stops):
    """Prefix 0 is the empty one, before anything is written."""
    w = world(0, stops)
    expected_reward = (w.probability(w.logits) * w.reward).sum().item()
    assert w.exact_critic()[0].item() == pytest.approx(expected_reward)


@either_world
@either_critic
@pytest.mark.parametrize("cut", CAUSAL)
def test_a_causal_cut_with_v_at_the_start_is_unbiased(cut, critic, stops):
    """To rounding, under any critic, however wrong."""
    assert max(errors(cut, "start", critic=critic, stops=stops)) < 1e-10


@either_critic
@pytest.mark.parametrize("cut", SEVERAL_TOKENS)
def test_v_at_the_end_is_biased(cut, critic):
    """The released code's choice, whatever cuts the response; a perfect critic does not help."""
    assert min(errors(cut, "end", critic=critic)) > 0.1


def test_v_at_the_start_of_a_cut_that_looks_ahead_is_biased():
    """The paper's choice. How much varies from world to world: a little in some, more than all of
    it in others."""
    random = errors(LOOKS_AHEAD, "start")
    assert min(random) > 1e-3
    assert mean(random) > 0.2


def test_a_perfect_critic_makes_looking_ahead_less_harmful_not_harmless():
    """V(s) = E[R | s]. But given that a segment starts here, what follows is no longer what
    follows s on average."""
    random = errors(LOOKS_AHEAD, "start")
    perfect = errors(LOOKS_AHEAD, "start", critic="exact")
    assert min(perfect) > 1e-3
    assert 0.03 < mean(perfect) < 0.5 * mean(random)


@either_world
def test_with_one_token_per_segment_start_and_end_are_one(stops):
    """PPO is unbiased either way."""
    assert max(errors("every token (PPO)", "end", stops=stops)) < 1e-10


@pytest.mark.parametrize("cut", CUTS)
def test_without_a_critic_no_cut_is_biased(cut):
    """V = 0: A_m = R for every segment. The baseline is what is biased, not the segments."""
    blind = replace(world(0), random_critic=torch.zeros_like(world(0).random_critic))
    true = blind.true_gradient()
    assert (expected_gradient(blind, cut, "end") - true).norm() < 1e-10 * true.norm()


def test_the_mean_over_tokens_has_a_bias_of_length():
    """Eq. 9's 1/T, where a token can stop the response: a gradient counts for more where the
    response is short."""
    assert min(errors("fixed positions", "start", stops=True, over_length=True)) > 0.1


# ---------------------------------------------------------------------------------- the table


def cases():
    """One per critic, cut and place of V; then Eq. 9's mean over tokens, which only matters where
    responses differ in length."""
    rows = []
    for critic in ("random", "exact"):
        for cut in CUTS:
            for value_at in ("start", "end"):
                case = {"cut": cut, "value_at": value_at, "critic": critic}
                rows.append(case | {"stops": False, "over_length": False})
    for critic in ("random", "exact"):
        case = {"cut": "fixed positions", "value_at": "start", "critic": critic}
        rows.append(case | {"stops": True, "over_length": True})
    return rows


def table():
    """Each case with its relative error (mean, least and greatest over the seeds) and the mean
    angle to the truth in degrees."""
    rows = []
    for case in cases():
        measured = [error_and_angle(seed=seed, **case) for seed in SEEDS]
        case_errors = [error for error, _ in measured]
        outcome = {"mean": mean(case_errors), "min": min(case_errors), "max": max(case_errors)}
        rows.append(case | outcome | {"angle": mean([angle for _, angle in measured])})
    return rows


def printed(row):
    name = row["cut"] + (" / T" if row["over_length"] else "")
    return (
        f"{name:19} V at {row['value_at']:5}  {row['critic']:6} critic  {row['mean']:8.2g}  "
        f"[{row['min']:.2g}, {row['max']:.2g}]  {row['angle']:.0f} deg"
    )


def main():
    parser = argparse.ArgumentParser(
        description="Relative error of SAPO's expected policy gradient, by enumeration."
    )
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--out", default=results / "unbiased.json", type=Path)
    out = parser.parse_args().out
    rows = table()
    print(
        "relative error of the expected gradient, mean [least, greatest] of "
        f"{len(SEEDS)} seeds, and its mean angle"
    )
    for row in rows:
        print(printed(row))
    out.parent.mkdir(exist_ok=True)
    content = {
        "what": "Relative error of SAPO's expected policy gradient against the gradient of the "
        "expected reward; exact, by enumeration of 3 tokens, 4 steps (stops: token 2 ends a "
        "response); lambda = gamma = 1. angle: deg.",
        "command": "python tests/test_unbiased.py",
        "date": date.today().isoformat(),
        "seeds": list(SEEDS),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "rows": rows,
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
