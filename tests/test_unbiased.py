"""Is SAPO's policy gradient unbiased?  Answered exactly, by writing out every response there is.

    python tests/test_unbiased.py     # measures the table below, prints it and writes results/unbiased.json

A baseline is free. Subtract V(s_m) from the return of a segment and the *expected* gradient stays what it was, because
a token's score, grad log pi(y_t | y_<t), is zero on average over y_t: what multiplies it may depend on y_<t, and adds
nothing. It must not depend on y_t, nor on what comes after. That puts two questions to SAPO:

  1. *Where is V read?*  At the start of z_m (the paper): the prefix before its first token, which came before all of
     its tokens. At the end of z_m (the released code): the prefix before its *last* token, which contains the others;
     they help to choose the baseline that they are judged by.
  2. *Who decides where z_m starts?*  If the cut after y_t is decided from y_<=t, as with fixed positions, delimiters,
     unlikely tokens or an entropy threshold set beforehand, then V(s_m) does come before every token of z_m. The
     paper's top-k% ranks the entropies of the whole response: whether a segment ends at y_t, hence where the next
     starts, hence which baseline a token is given, depends on tokens not written yet.

The paper discusses neither, and both can be checked without a sample, without a tolerance for noise, without training.
Take three tokens and four steps: 81 responses. Draw at random a policy (a distribution per prefix), a reward per
response and a critic (a number per prefix). The sum over all responses y of

    pi(y)  x  gradient of sapo.policy_loss(sapo.segment_ratio(...), advantages of sapo.segment_gae(...))

*is* the expected gradient of SAPO's first step, where pi = pi_old, and is held against the gradient of the expected
reward. lambda = gamma = 1, so that GAE adds no bias of its own: A_m = R - V(s_m).

One factor has to be cleared away first. The sum over a response's tokens of s_m A_m has the gradient of REINFORCE with
a baseline (of a segment's |z_m| tokens each pulls at all of them with 1/|z_m|: Eq. 13). Eq. 9 takes the mean, so that
this comes divided by the length T. Here every response is multiplied by its T again. Where all have four tokens this
is only a scale; but let a third token *stop*, and 1/T is a bias by itself, whatever the cut: the last test.
"""

import argparse
import json
import math
import sys
from datetime import date
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the command above, which pytest does without

import sapo

VOCABULARY, STEPS, STOP = 3, 4, 2
SEEDS = range(20)


# --------------------------------------------------------------------------------------------- every response there is
@cache
def world(seed, stops=False):
    """A random policy, critic and reward, on all responses: of STEPS tokens, or shorter if token STOP `stops` them."""
    responses, prefixes, growing = [], [], [()]
    while growing:
        prefixes.append(prefix := growing.pop(0))
        for token in range(VOCABULARY):
            y = (*prefix, token)
            (responses if len(y) == STEPS or stops and token == STOP else growing).append(y)

    generator = torch.Generator().manual_seed(seed)
    normal = lambda n, *more: torch.randn(n, *more, dtype=torch.float64, generator=generator)
    w = SimpleNamespace(
        tokens=torch.tensor([[*y, *[0] * (STEPS - len(y))] for y in responses]),     # (B, T)
        mask=torch.tensor([[t < len(y) for t in range(STEPS)] for y in responses]),  # (B, T)
        prefix=torch.tensor([[prefixes.index(y[:t]) if t < len(y) else 0 for t in range(STEPS)]
                             for y in responses]),                                   # (B, T): the one before token t
        logits=1.5 * normal(len(prefixes), VOCABULARY), reward=normal(len(responses)),
        critics={"random": normal(len(prefixes))})                                   # a value per prefix
    w.entropy = sapo.token_entropy(w.logits)                                         # per prefix
    w.logp, w.probability = token_logp(w, w.logits), probability(w, w.logits)

    begins = torch.tensor([[y[:len(prefix)] == prefix for y in responses] for prefix in prefixes]).double()
    w.critics["exact"] = begins @ (w.probability * w.reward) / (begins @ w.probability)  # E[R | prefix]

    logits = w.logits.clone().requires_grad_()
    [w.truth] = torch.autograd.grad((probability(w, logits) * w.reward).sum(), logits)
    return w


def token_logp(w, logits):
    """log pi of each token of each response, (B, T)."""
    return (logits - logits.logsumexp(-1, keepdim=True))[w.prefix, w.tokens]


def probability(w, logits):
    """pi of each response, (B,)."""
    return torch.where(w.mask, token_logp(w, logits), 0.0).sum(1).exp()


CUTS = {
    "every token (PPO)": lambda w: sapo.token_ends(w.mask),
    "whole response": lambda w: sapo.response_ends(w.mask),
    "fixed positions": lambda w: sapo.delimiter_ends(torch.tensor([False, True] * 2).expand_as(w.mask), w.mask),
    "delimiter": lambda w: sapo.delimiter_ends(w.tokens == 1, w.mask),
    "low probability": lambda w: sapo.low_prob_ends(w.logp, w.mask, threshold=0.5, every=2),
    "entropy threshold": lambda w: sapo.threshold_ends(w.entropy[w.prefix], w.mask, w.entropy.median().item()),
    "entropy top-k": lambda w: sapo.entropy_ends(w.entropy[w.prefix], w.mask, top_k=0.3),
}
LOOKS_AHEAD = "entropy top-k"
CAUSAL = [cut for cut in CUTS if cut != LOOKS_AHEAD]
SEVERAL_TOKENS = [cut for cut in CUTS if cut != "every token (PPO)"]


# ------------------------------------------------------------------------------------------------ the expected gradient
def expected_gradient(w, cut, value_at, critic="random", over_length=False):
    """Sum over all responses of pi(y) x T x SAPO's gradient; with `over_length` without that T, as Eq. 9 has it."""
    ends, values = CUTS[cut](w), w.critics[critic][w.prefix]
    rewards = torch.where(sapo.response_ends(w.mask), w.reward[:, None], 0.0)   # on the last token
    advantages, _ = sapo.segment_gae(rewards, values, ends, w.mask, gamma=1.0, lam=1.0, value_at=value_at)

    # policy_loss is a mean over responses, and linear in the advantages: their weights can go in there.
    weight = len(w.mask) * w.probability * (1 if over_length else w.mask.sum(1))  # (B,)
    logits = w.logits.clone().requires_grad_()
    ratio = sapo.segment_ratio(token_logp(w, logits), w.logp, ends, w.mask)     # 1; its gradient is not 0
    loss, _ = sapo.policy_loss(ratio, weight[:, None] * advantages, w.mask)
    return -torch.autograd.grad(loss, logits)[0]


def relative_error(cut, value_at, seed, critic="random", stops=False, over_length=False):
    """|expected gradient - true gradient| / |true gradient|."""
    w = world(seed, stops)
    return ((expected_gradient(w, cut, value_at, critic, over_length) - w.truth).norm() / w.truth.norm()).item()


# -------------------------------------------------------------------------------------------------------- what is true
either_world = pytest.mark.parametrize("stops", [False, True], ids=["four tokens", "with a stop token"])


def errors(*args, **options):
    return [relative_error(*args, seed=seed, **options) for seed in SEEDS]


@either_world
def test_these_are_all_responses(stops):
    """Their probabilities add up to 1; 81 of four tokens, or 31 of one to four."""
    assert len(world(0, stops).mask) == (31 if stops else 81)
    assert all(world(seed, stops).probability.sum().item() == pytest.approx(1, abs=1e-12) for seed in SEEDS)


@either_world
@pytest.mark.parametrize("critic", ["random", "exact"])
@pytest.mark.parametrize("cut", CAUSAL)
def test_a_causal_cut_with_v_at_the_start_is_unbiased(cut, critic, stops):
    """To rounding, under any critic, however wrong."""
    assert max(errors(cut, "start", critic=critic, stops=stops)) < 1e-10


@pytest.mark.parametrize("critic", ["random", "exact"])
@pytest.mark.parametrize("cut", SEVERAL_TOKENS)
def test_v_at_the_end_is_biased(cut, critic):
    """The released code's choice, whatever cuts the response; even a perfect critic does not help."""
    assert min(errors(cut, "end", critic=critic)) > 0.1


def test_v_at_the_start_of_a_cut_that_looks_ahead_is_biased():
    """The paper's choice. How much varies from world to world: a little in some, more than all of it in others."""
    found = errors(LOOKS_AHEAD, "start")
    assert min(found) > 1e-3 and sum(found) / len(found) > 0.2


def test_a_perfect_critic_makes_looking_ahead_less_harmful_not_harmless():
    """V(s) = E[R | s]. But given that a segment starts here, the rest of the response is no longer any rest."""
    random, perfect = errors(LOOKS_AHEAD, "start"), errors(LOOKS_AHEAD, "start", critic="exact")
    assert min(perfect) > 1e-3 and 0.03 < sum(perfect) / len(perfect) < 0.5 * sum(random) / len(random)


@either_world
def test_with_one_token_per_segment_start_and_end_are_one(stops):
    """PPO is unbiased either way."""
    assert max(errors("every token (PPO)", "end", stops=stops)) < 1e-10


@pytest.mark.parametrize("cut", CUTS)
def test_without_a_critic_no_cut_is_biased(cut):
    """V = 0: A_m = R for every segment. The baseline is what is biased, not the segments."""
    w = world(0)
    blind = SimpleNamespace(**vars(w) | {"critics": {"random": torch.zeros_like(w.entropy)}})
    assert (expected_gradient(blind, cut, "end") - w.truth).norm() < 1e-10 * w.truth.norm()


def test_the_mean_over_tokens_has_a_bias_of_length():
    """Eq. 9's 1/T, where a token can stop the response: a gradient counts for more where the response is short."""
    assert min(errors("fixed positions", "start", stops=True, over_length=True)) > 0.1


# ----------------------------------------------------------------------------------------------------------- the table
def table():
    """One row per critic, cut and place of V; then Eq. 9's mean over tokens, which needs responses of several lengths.

    Each row: the relative error (mean, least and greatest over the seeds) and the mean angle to the truth in degrees.
    """
    rows = [dict(cut=cut, value_at=value_at, critic=critic, stops=False, over_length=False)
            for critic in ("random", "exact") for cut in CUTS for value_at in ("start", "end")]
    rows += [dict(cut="fixed positions", value_at="start", critic=critic, stops=True, over_length=True)
             for critic in ("random", "exact")]
    for row in rows:
        found, angles = errors(**row), []
        for seed in SEEDS:
            w = world(seed, row["stops"])
            gradient = expected_gradient(w, *[row[name] for name in ("cut", "value_at", "critic", "over_length")])
            cosine = (gradient * w.truth).sum() / gradient.norm() / w.truth.norm()
            angles.append(math.degrees(math.acos(min(1.0, cosine.item()))))
        row |= {"mean": sum(found) / len(found), "min": min(found), "max": max(found),
                "angle": sum(angles) / len(angles)}
    return rows


def main():
    parser = argparse.ArgumentParser(description="Relative error of SAPO's expected policy gradient, by enumeration.")
    parser.add_argument("--out", default=Path(__file__).parents[1] / "results" / "unbiased.json", type=Path)
    out, rows = parser.parse_args().out, table()
    print(f"relative error of the expected gradient, mean [least, greatest] of {len(SEEDS)} seeds, and its mean angle")
    for row in rows:
        name = row["cut"] + (" / T" if row["over_length"] else "")
        print(f"{name:19} V at {row['value_at']:5}  {row['critic']:6} critic  {row['mean']:8.2g}  "
              f"[{row['min']:.2g}, {row['max']:.2g}]  {row['angle']:.0f} deg")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({
        "what": "Relative error of SAPO's expected policy gradient against the gradient of the expected reward; exact, "
                "by enumeration of 3 tokens, 4 steps (stops: token 2 ends a response); lambda = gamma = 1. angle: deg.",
        "command": "python tests/test_unbiased.py", "date": date.today().isoformat(), "seeds": list(SEEDS),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
