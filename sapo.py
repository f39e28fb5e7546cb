"""SAPO: Segment-Aligned Policy Optimization, in one file that reads from top to bottom.

Paper: Gao et al., ICML 2026, arXiv:2605.01327. Equation numbers are the paper's.

Name clash: TRL, EasyR1, ms-swift and verl call *Soft Adaptive* Policy Optimization
(arXiv:2511.20347) "SAPO". That is another method. This file is not it.

The idea. A response is a few reasoning *segments*, and the segment is the unit of everything:

1. Segments     a response is cut where the policy was unsure (high token entropy).
2. Critic       judges the text before each segment.
3. Advantages   generalised advantage estimation (GAE) runs over segments, not over tokens.
4. Ratio        a segment's tokens share one importance ratio, a geometric mean.
5. Losses       the usual clipped objective and a squared error of the critic.
6. Update       some epochs of shuffled minibatches, as in PPO.

With one token per segment this is PPO. With one segment per response it is GSPO with a critic.

What differs. The authors' released code departs from their paper in several places (the table is
in tutorial.md, appendix A): `SAPOConfig.paper()` and `SAPOConfig.released()` are its two sides.
Three things are in neither: `threshold_ends`, our cut that does not look ahead; a critic that
hears; the bound on the KL divergence, `target_kl`, which many PPO codes have. Two follow the
released code under any settings: token log-ratios are clamped to +-20, and V is 0 after a response
that ran out of tokens, too. Left out: models and tokens (vlm.py), environments (env.py), who makes
the cut (rollout.py, by the name in baselines.py) and the training loop (train.py).

    python train.py     # a warm start, then SAPO on pictures of dice, with a tiny model
    python -m pytest    # every function here against plain loops, identities and properties

Shapes. B responses, T token positions (right-padded), M segments (of the response that has most),
V vocabulary. Inside an equation, T and M are a response's own numbers.

    mask (B, T) bool      True on *policy tokens*: those that the policy wrote. False on padding and
                          on *holes*: tokens that an environment wrote between two turns.
    ends (B, T) bool      True on the last token of each segment: a subset of the mask. The cuts
                          below always close a response; where an `ends` does not, what is left
                          over at the end is a segment, too.
    values (B, T)         values[b, t] is V of the prefix *before* token t.

What refuses wrong input (`_require`, `_check`) and widens bfloat16 (`_wide`) stands at the end.
Every function of tensors takes any float dtype and device, leaves its arguments alone, and raises
ValueError naming the argument that is wrong.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------- settings


def setting(default, help, within=""):
    """A dataclass field with its meaning and, of a number or a list of them, the interval that it
    lies in, as it is written in mathematics: "[0, 1)".

    Both stand in the help text, which is all that HfArgumentParser lets a field say: so the command
    line shows the same interval that `check_settings` holds a value to.
    """
    metadata = {"help": f"{help}; in {within}" if within else help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SAPOConfig:
    """Settings of the algorithm. The defaults are the paper's mathematics, with the numbers that
    teach a tiny model fast: rates, minibatches, two epochs, and a lambda that listens to the critic
    (`paper` has the paper's own); and with a bound on the KL divergence, which the paper has not.
    """

    gamma: float = setting(1.0, "discount per segment (Eq. 6)", "[0, 1]")
    lam: float = setting(
        0.9,
        "GAE's lambda per segment (Eq. 7): at 1 V is a baseline only, at 0 the next V "
        "stands for all that follows",
        "[0, 1]",
    )
    critic_lam: float | None = setting(
        None, "lambda of the critic's returns, if not lam (VC-PPO decouples them)", "[0, 1]"
    )
    top_k: float = setting(
        0.30, "share of tokens, those of highest entropy, that end a segment (Eq. 11)", "(0, 1]"
    )
    value_at: Literal["start", "end"] = setting(
        "start", "read V before a segment's first token, or before its last"
    )
    ratio: Literal["segment", "token", "response", "product"] = setting(
        "segment",
        "importance ratio: Eq. 8 over a segment, PPO's Eq. 2 per token, Eq. 8 over the whole "
        "response (GSPO), or a segment's true weight: the product of its token ratios",
    )
    average: Literal["response", "token"] = setting(
        "response", "losses: mean per response first, or over all tokens"
    )
    clip_low: float = setting(
        0.2, "the ratio is clipped below at 1 - clip_low (Eq. 9); train.py's sapo 0.04", "[0, inf]"
    )
    clip_high: float = setting(
        0.2, "the ratio is clipped above at 1 + clip_high (Eq. 9); train.py's sapo 0.04", "[0, inf]"
    )
    dual_clip: float | None = setting(
        None, "bound the loss of a negative advantage A at -dual_clip * A", "(1, inf)"
    )
    whiten_advantages: bool = setting(
        False, "advantages to zero mean and unit variance over the batch's tokens"
    )
    advantage_clamp: float = setting(math.inf, "then clamp advantages to +- this", "(0, inf]")
    value_clip: float | None = setting(
        None, "limit the critic's move from the rollout's values to +- this", "(0, inf)"
    )
    value_coef: float = setting(1.0, "factor on the value loss", "[0, inf)")
    kl_coef: float = setting(
        0.0, "KL to the reference model (k1), subtracted from each token's reward", "[0, inf)"
    )
    epochs: int = setting(
        2, "passes over a rollout; the cut stays the same in all of them", "[1, inf)"
    )
    minibatch: int = setting(32, "responses per optimizer step", "[1, inf)")
    micro_batch: int = setting(
        0,
        "responses per backward pass, 0: the whole minibatch; changes memory, not numbers",
        "[0, inf)",
    )
    target_kl: float = setting(
        0.015,
        "after a minibatch whose approx_kl exceeds this (nats per token), the policy stays as it "
        "is until the next rollout, and only the critic learns on; inf: it never stays",
        "(0, inf]",
    )
    actor_lr: float = setting(2e-4, "Adam learning rate of the policy", "[0, inf)")
    critic_lr: float = setting(2e-3, "Adam learning rate of the critic", "[0, inf)")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", "(0, inf]")

    def __post_init__(self):
        check_settings(self)

    @classmethod
    def paper(cls):
        """The paper's settings (Table 7, Geo3K)."""
        return cls(
            lam=0.99,
            epochs=1,
            minibatch=128,
            actor_lr=1e-6,
            critic_lr=2e-6,
            kl_coef=0.001,
            target_kl=math.inf,
        )

    @classmethod
    def released(cls):
        """What the authors' released code computes."""
        return replace(
            cls.paper(),
            value_at="end",
            average="token",
            clip_high=0.28,
            dual_clip=3.0,
            whiten_advantages=True,
            advantage_clamp=5.0,
            value_clip=0.5,
            value_coef=0.5,
        )


# ----------------------------------------------------------------------------------- segments
#
# A response is the concatenation of its segments, y = z_1 || z_2 || ... || z_M (Eq. 5). A cut is
# the bool tensor `ends`, and the rest of the file knows nothing else of it. Under every cut a
# response's last policy token ends a segment, and so does the last one before each hole: the
# docstrings call them the *always-ends*.


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution, in nats (Eq. 11).

        H_t = -sum_v pi(v) log pi(v)

    logits (..., V) -> (...), in float32 or better. A banned token (logit -inf) contributes 0. Where
    a logit is NaN, or every token is banned, so is the entropy, and a cut that meets it raises.
    """
    _require(
        logits.dim() > 0 and logits.numel() > 0,
        "logits",
        tuple(logits.shape),
        "(..., V), not empty",
    )
    logp = _wide(logits).log_softmax(-1)
    # exp(-inf) * -inf is NaN: a banned token's log-probability is set to 0 before the product
    return (logp.exp() * -logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)


def response_ends(mask: Tensor) -> Tensor:
    """One segment per response, or with holes one per turn: only the always-ends.

    (B, T) -> bool (B, T).
    """
    _check(mask)
    next_is_policy = F.pad(mask[:, 1:], (0, 1))
    return mask & ~next_is_policy


def token_ends(mask: Tensor) -> Tensor:
    """Every policy token is a segment of its own: the unit of PPO (Eq. 1-4), whose token ratio
    (Eq. 2) and token GAE (Eq. 4) are `segment_ratio` and `segment_gae` under this cut.

    (B, T) -> bool (B, T).
    """
    _check(mask)
    return mask.clone()


def entropy_ends(entropy: Tensor, mask: Tensor, top_k: float = 0.30) -> Tensor:
    """SAPO's cut: the tokens of highest entropy end a segment (Eq. 11, k = 30%).

    Of a response's n policy tokens, max(1, ceil(top_k n)) do, the earlier token on ties; and so
    do the always-ends. The cut ranks the whole response, so it looks ahead, and that biases the
    policy gradient: see tutorial.md, appendix B, and `threshold_ends`.

    entropy (B, T) in nats -> bool (B, T). ValueError for a top_k outside (0, 1].
    """
    _check(mask, entropy=entropy)
    _require(0 < top_k <= 1, "top_k", top_k, "a share in (0, 1]")
    # max(1, ceil) is the released code's rounding. 0.28 * 25 is 7.000000000000001 in floating
    # point: without the 1e-9 it would count as 8
    wanted = (top_k * mask.sum(1).double() - 1e-9).ceil().clamp(min=1)  # (B,)
    by_entropy = entropy.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    # True for the first `wanted` ranks of each row; rank 0 has the highest entropy
    is_wanted = torch.arange(mask.shape[1], device=mask.device) < wanted[:, None]
    chosen = torch.zeros_like(mask).scatter(1, by_entropy, is_wanted)
    return (mask & chosen) | response_ends(mask)


def threshold_ends(entropy: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """The causal cut (ours): entropy above `threshold` (nats) ends a segment.

    H_t is known before y_t is drawn. So with a threshold set beforehand the cut does not look
    ahead, and V at a segment's start is a true baseline: it leaves the expected gradient alone
    (exactly so at lambda = gamma = 1; below, GAE brings in the critic's errors). The always-ends
    end a segment too.

    entropy (B, T) in nats -> bool (B, T). ValueError for a threshold that is None or NaN.
    """
    _check(mask, entropy=entropy)
    _require(
        threshold is not None and not math.isnan(threshold),
        "threshold",
        threshold,
        "nats (entropy_quantile gives one)",
    )
    return (mask & (_wide(entropy) > threshold)) | response_ends(mask)


def entropy_quantile(entropy: Tensor, mask: Tensor, top_k: float = 0.30) -> float:
    """The threshold (nats) that would have cut the top_k share of this batch's policy tokens.

    Of N policy tokens, ceil(top_k N) exceed it (fewer on ties). For a causal cut, use the
    previous batch's.

    entropy (B, T) in nats -> float. ValueError for a mask without a policy token, or a top_k
    outside (0, 1].
    """
    _check(mask, entropy=entropy)
    _require(0 < top_k <= 1, "top_k", top_k, "a share in (0, 1]")
    _require(mask.any(), "mask", "no policy token", "at least one")
    ordered = entropy[mask].sort(descending=True).values  # (N,)
    wanted = math.ceil(top_k * len(ordered) - 1e-9)
    if wanted < len(ordered):
        return ordered[wanted].item()
    lowest = ordered[-1].item()
    return lowest - 1e-6 * max(1.0, abs(lowest))  # all of them: just below, also in float32


def delimiter_ends(is_delimiter: Tensor, mask: Tensor) -> Tensor:
    """Marked tokens (a newline, "Step n") end a segment, and so do the always-ends.

    is_delimiter bool (B, T) -> bool (B, T).
    """
    _check(mask, is_delimiter=is_delimiter)
    return (mask & is_delimiter) | response_ends(mask)


def low_prob_ends(logp: Tensor, mask: Tensor, threshold: float = 0.9, every: int = 5) -> Tensor:
    """SPO-chain's cut (arXiv:2505.23564): every `every`-th token of probability below `threshold`
    ends a segment, and so do the always-ends.

    logp (B, T): log pi_old of each token, in nats -> bool (B, T). ValueError for a threshold
    outside (0, 1], or an `every` that is no whole number of at least 1.
    """
    _check(mask, logp=logp)
    _require(0 < threshold <= 1, "threshold", threshold, "a probability in (0, 1]")
    _require(every >= 1 and every % 1 == 0, "every", every, "a whole number, at least 1")
    improbable = mask & (_wide(logp) < math.log(threshold))
    return (improbable & (improbable.cumsum(1) % every == 0)) | response_ends(mask)


def segment_index(ends: Tensor) -> Tensor:
    """Which segment a token is in: how many ends stand before it. bool (B, T) -> long (B, T)."""
    _check(ends, "ends")
    return F.pad(ends.cumsum(1), (1, -1))  # shifted right: an end still belongs to its segment


def boundaries(ends: Tensor, mask: Tensor, value_at: str = "start") -> Tensor:
    """Where V(s_m) is read: each segment's first policy token ("start", the paper) or its last
    ("end", the released code). -> bool (B, T). ValueError for another value_at."""
    _check(mask, ends=ends)
    _require(value_at in ("start", "end"), "value_at", value_at, "'start' or 'end'")
    index = segment_index(ends)
    T = mask.shape[1]
    # A policy token is a boundary if the nearest policy token on that side (holes are skipped) is
    # in another segment. As the index never falls along a row, that neighbour's index is a running
    # maximum from the left, or a running minimum from the right. -1 and T are no segment's index.
    if value_at == "start":
        policy_index = index.masked_fill(~mask, -1)
        up_to_here = policy_index.cummax(1).values
        neighbour = F.pad(up_to_here, (1, -1), value=-1)
    else:
        policy_index = index.masked_fill(~mask, T)
        from_here_on = policy_index.flip(1).cummin(1).values.flip(1)
        neighbour = F.pad(from_here_on, (-1, 1), value=T)
    return mask & (neighbour != index)


def _sums(x, index, mask, segments=None):
    """Sums of x over each segment's policy tokens: x, index (B, T) -> (B, segments).

    None: room for T segments, since to ask a card how many there are is to wait for it.
    """
    kept = torch.where(mask, _wide(x), 0.0)  # not x * mask: a NaN off the mask must not survive
    segments = segments or mask.shape[1]
    return kept.new_zeros(len(kept), segments).scatter_add(1, index, kept)


def segment_sum(x: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Sum of x over each segment's policy tokens, given back to each of them.

    x (B, T) -> (B, T), 0 off the mask.
    """
    _check(mask, x=x, ends=ends)
    index = segment_index(ends)
    return torch.where(mask, _sums(x, index, mask).gather(1, index), 0.0)


def segment_mean(x: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over each segment's policy tokens, given back to each of them.

    x (B, T) -> (B, T), 0 off the mask.
    """
    _check(mask, x=x, ends=ends)
    index = segment_index(ends)
    means = _sums(x, index, mask) / _sums(mask, index, mask).clamp(min=1)  # (B, T)
    return torch.where(mask, means.gather(1, index), 0.0)


# ------------------------------------------------------------------------------------- critic


class SegmentCritic(nn.Module):
    """V of every prefix: a backbone's last hidden states -> one float32 value per position.

        V_p = w . h_p + b                     the paper's critic
        V_p = w . h_p + b + u surprise_p      hears=True: it hears the policy, too (ours)

    forward(...) hands its arguments to the backbone: hidden states (B, L, H) -> values (B, L).
    Position p has read the tokens up to *and including* p. So V of the prefix before response
    token t (from 0), after a prompt of P tokens, stands at position P + t - 1.

    surprise (B, L), in nats: the smallest log pi_old of any token written up to p (the function
    below), 0 within the prompt. A slip is a token to which the policy gave little probability, and
    a critic that is told so sees it long before it could see it in the picture. The surprise is a
    function of the prefix, so V(s_m) stays one, and a valid baseline. But it is no proof: such a
    critic can be swayed by confidence, and a small lambda may then teach the policy to be sure, not
    right.

    The head and u start at zero, so the first advantages know nothing of the critic.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int | None = None, hears: bool = False):
        super().__init__()
        self.backbone = backbone
        if hidden_size is None:
            config = getattr(backbone.config, "text_config", backbone.config)
            hidden_size = config.hidden_size
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.per_nat = nn.Parameter(torch.zeros(())) if hears else None  # u

    @property
    def hears(self) -> bool:
        return self.per_nat is not None

    def forward(self, *args, surprise: Tensor | None = None, **kwargs) -> Tensor:
        output = self.backbone(*args, **kwargs)
        hidden = getattr(output, "last_hidden_state", output)  # (B, L, H)
        values = F.linear(hidden.float(), self.head.weight.float(), self.head.bias.float())
        values = values.squeeze(-1)  # (B, L)
        if self.hears:
            _require(surprise is not None, "surprise", None, "a tensor (B, L), as the critic hears")
            values = values + self.per_nat.float() * surprise
        return values


def surprise(logp: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of the least likely policy token so far: min over i <= t of
    log pi_old(y_i). The lower, the more the policy was surprised by what it wrote.

    logp (B, T) in nats -> (B, T), float32 or better, at most 0, clamped to -20 as log-ratios are.
    """
    _check(mask, logp=logp)
    return torch.where(mask, _wide(logp), 0.0).clamp(-20.0, 0.0).cummin(1).values


# --------------------------------------------------------------------------------- advantages


def segment_gae(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.99,
    value_at: str = "start",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with segments as steps (Eq. 6 and 7).

        delta_m = r_m + gamma V(s_{m+1}) - V(s_m)
        A_m     = sum_l (gamma lam)^l delta_{m+l}
        R_m     = A_m + V(s_m)

    r_m is the sum of the rewards on the segment's policy tokens. V after the last segment is 0,
    also where a response was cut off by its token budget, as in the released code.
    With value_at="start" V(s_m) is read before the segment's first token (the paper), with "end"
    before its last (the released code): then the baseline depends on the segment's own tokens,
    and the policy gradient is biased.

    rewards, values (B, T) -> (advantages A, returns R), (B, T) each, one number per segment, 0 off
    the mask. ValueError for a gamma or lam outside [0, 1].
    """
    _check(mask, rewards=rewards, values=values, ends=ends)
    _require(0 <= gamma <= 1, "gamma", gamma, "a number in [0, 1]")
    _require(0 <= lam <= 1, "lam", lam, "a number in [0, 1]")
    starts = boundaries(ends, mask)
    # Counting the starts numbers each row's segments 0, 1, 2, ... without a gap, so that V(s_{m+1})
    # stands right behind V(s_m). `segment_index` has gaps where an end is off the mask.
    index = (starts.cumsum(1) - 1).clamp(min=0)  # (B, T)
    reads = starts if value_at == "start" else boundaries(ends, mask, value_at)
    segments = int(index.max()) + 1  # M
    segment_rewards = _sums(rewards, index, mask, segments)  # (B, M)
    segment_values = _sums(values, index, reads, segments)  # (B, M): each the sum of one number
    next_values = F.pad(segment_values[:, 1:], (0, 1))  # (B, M)
    deltas = segment_rewards + gamma * next_values - segment_values

    # Eq. 7, from the last segment backwards: A_m = delta_m + gamma lam A_{m+1}
    advantage = torch.zeros_like(deltas[:, 0])  # (B,): nothing follows the last segment
    backwards = []
    for delta in reversed(deltas.T.contiguous().unbind()):  # (B,) each
        advantage = delta + gamma * lam * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)  # (B, M)
    returns = advantages + segment_values

    def to_tokens(per_segment):
        return torch.where(mask, per_segment.gather(1, index), 0.0)  # (B, M) -> (B, T)

    return to_tokens(advantages), to_tokens(returns)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the mask, as VeRL: (x - mean) / sqrt(variance + 1e-8).

    The variance has Bessel's correction. x (B, T) -> (B, T), float32 or better, 0 off the mask. One
    token, none, or equal tokens give zeros, never NaN.
    """
    _check(mask, x=x)
    count = mask.sum()
    x = _wide(x)
    if count < 2:
        return torch.zeros_like(x)
    # One of the numbers is subtracted first, so that equal numbers become exact zeros; and large
    # ones are scaled down before they are squared, so that no square is infinite
    shifted = torch.where(mask, x - x[mask][0], 0.0)
    centred = torch.where(mask, shifted - shifted.sum() / count, 0.0)
    scale = centred.abs().max().clamp(min=1.0)
    centred = centred / scale
    variance = centred.square().sum() / (count - 1)
    return centred / (variance + 1e-8 / scale**2).sqrt()


# -------------------------------------------------------------------------------------- ratio

RATIOS = ("segment", "token", "response", "product")


def _log_ratio(logp, old_logp, mask):
    """log pi - log pi_old of each token, clamped to +-20. (B, T) -> (B, T), 0 off the mask."""
    _check(mask, logp=logp, old_logp=old_logp)
    # Off the mask banned tokens may be -inf on both sides, and -inf minus -inf is NaN
    difference = torch.where(mask, _wide(logp) - _wide(old_logp), 0.0)
    _check(mask, **{"logp - old_logp": difference})  # NaN here: a banned token was sampled
    return difference.clamp(-20.0, 20.0)


def segment_ratio(logp: Tensor, old_logp: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Importance ratio of each segment, a geometric mean over its tokens (Eq. 8).

        ratio_m = (pi(z_m | s_m) / pi_old(z_m | s_m))^(1/|z_m|)
                = exp(mean over the segment's tokens of log pi - log pi_old)

    Token log-ratios are clamped to +-20 first, as in the released code. The root is not the true
    weight, which is the product of the token ratios: they differ by at most
    e^(L|mu|) (L - 1) |mu|, for a segment of length L and mean log-ratio mu (Eq. 19-26).

    logp, old_logp (B, T) in nats -> (B, T), 1 off the mask.
    """
    return segment_mean(_log_ratio(logp, old_logp, mask), ends, mask).exp()


def importance_ratio(
    logp: Tensor, old_logp: Tensor, ends: Tensor, mask: Tensor, kind: str = "segment"
) -> Tensor:
    """The ratio that the loss clips, of one of four kinds.

        segment   Eq. 8: the geometric mean over the token's segment (SAPO)
        token     Eq. 2: the token's own (PPO)
        response  Eq. 8 with the whole response as the segment (GSPO, arXiv:2507.18071)
        product   a segment's true weight, prod over its tokens of pi / pi_old (Eq. 19's R)

    Log-ratios are clamped to +-20: each token's, and the product's sum, too.
    logp, old_logp (B, T) in nats -> (B, T), 1 off the mask. ValueError for another kind.
    """
    _require(kind in RATIOS, "ratio", kind, f"one of {', '.join(RATIOS)}")
    if kind == "product":
        log_ratio = segment_sum(_log_ratio(logp, old_logp, mask), ends, mask)
        return log_ratio.clamp(-20.0, 20.0).exp()
    if kind == "token":
        ends = token_ends(mask)
    elif kind == "response":
        ends = torch.zeros_like(mask)  # no end at all: a response is one segment, holes or not
    return segment_ratio(logp, old_logp, ends, mask)


def approx_kl(logp: Tensor, old_logp: Tensor, mask: Tensor) -> float:
    """KL(pi_old || pi) in nats per token, estimated from tokens of pi_old.

    The mean of e^d - 1 - d with d = log pi - log pi_old: Schulman's "k3" estimator, unbiased and
    never negative. logp, old_logp (B, T) in nats -> float, 0 without policy tokens.
    """
    log_ratio = _log_ratio(logp.detach(), old_logp, mask)
    return _average(torch.expm1(log_ratio) - log_ratio, mask, "token").item()


# ------------------------------------------------------------------------------------- losses


def _average(x, mask, average):
    """Mean of x over the mask: of each response and then of all responses ("response"), or over
    all tokens of the batch ("token"). (B, T) -> scalar. A row without a token counts as 0."""
    _require(average in ("response", "token"), "average", average, "'response' or 'token'")
    total = torch.where(mask, _wide(x), 0.0).sum(1)  # (B,)
    count = mask.sum(1)  # (B,)
    if average == "response":
        return (total / count.clamp(min=1)).mean()
    return total.sum() / count.sum().clamp(min=1)


def policy_loss(
    ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    average: str = "response",
) -> tuple[Tensor, dict]:
    """The clipped objective, negated (Eq. 9).

        J = E[ 1/T sum_t min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t) ]

    With average="token" (the released code) the mean is over all tokens of the batch, not over
    those of each response first. dual_clip = c > 1 bounds the loss of a negative advantage A at
    -c A (the released code: 3). An empty response counts as 0.

    The gradient, through `segment_ratio` (Eq. 13): sum_t ratio_m A_m (1/|z_m|) sum_{i in z_m}
    grad log pi(y_i). A segment's length cancels: at ratio 1 each token is pushed by A_m / T.

    ratio, advantages (B, T) -> (scalar, stats). stats["clip_fraction"] is the share of policy
    tokens that the two-sided clip leaves without gradient. ValueError for a dual_clip of 1 or less,
    and a clip below 0.
    """
    _check(mask, ratio=ratio, advantages=advantages)
    _require(
        dual_clip is None or dual_clip > 1, "dual_clip", dual_clip, "a number above 1, or None"
    )
    _require(clip_low >= 0, "clip_low", clip_low, "a number of at least 0")
    _require(clip_high >= 0, "clip_high", clip_high, "a number of at least 0")
    ratio = _wide(ratio)
    advantages = torch.where(mask, _wide(advantages), 0.0)  # a NaN off the mask: 0 * NaN is NaN
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(plain, clipped)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    clip_fraction = _average(clipped < plain, mask, "token").item()
    return -_average(objective, mask, average), {"clip_fraction": clip_fraction}


def value_loss(
    values: Tensor,
    returns: Tensor,
    ends: Tensor,
    mask: Tensor,
    value_at: str = "start",
    old_values: Tensor | None = None,
    value_clip: float | None = None,
    average: str = "response",
) -> tuple[Tensor, dict]:
    """Squared error of the critic, only where V(s_m) is read (Eq. 10). No factor 0.5.

        1/M sum_m (V(s_m) - R_m)^2

    With average="token" (the released code) the mean is over all segments of the batch. With
    value_clip it is the larger of that error and the error of the values kept within
    +-value_clip of old_values, the rollout's (as PPO's value clipping).

    values, returns, old_values (B, T) -> (scalar, stats). stats["value_clip_fraction"] is the
    share of segments where the clip was active. ValueError for a value_clip without old_values, or
    not above 0.
    """
    given = {"values": values, "returns": returns, "ends": ends}
    if old_values is not None:
        given["old_values"] = old_values
    _check(mask, **given)
    reads = boundaries(ends, mask, value_at)
    values, returns = _wide(values), _wide(returns)
    error = torch.where(reads, values - returns, 0.0)
    if value_clip is None:
        clipped_error = error
    else:
        expected = "the rollout's values (B, T), as value_clip is set"
        _require(old_values is not None, "old_values", None, expected)
        _require(value_clip > 0, "value_clip", value_clip, "a number above 0, or None")
        near_old = values.clamp(old_values - value_clip, old_values + value_clip)
        clipped_error = torch.where(reads, near_old - returns, 0.0)
    loss = _average(torch.maximum(error.square(), clipped_error.square()), reads, average)
    clip_fraction = _average(clipped_error.abs() > error.abs(), reads, "token").item()
    return loss, {"value_clip_fraction": clip_fraction}


# ------------------------------------------------------------------------------------- credit


@dataclass
class Rollout:
    """What a batch of responses left behind, (B, T) each: all that the update learns from."""

    mask: Tensor  # policy tokens to learn from: those that an environment took
    ends: Tensor  # the cut: made once, kept through all epochs
    logp: Tensor  # log pi_old of each token, in nats
    rewards: Tensor  # the environment's, each on its segment's last token
    values: Tensor | None = None  # V of the prefix before each token
    ref_logp: Tensor | None = None  # log-probabilities under the reference model, in nats

    def take(self, rows: Tensor) -> "Rollout":
        """Some of the responses, by their numbers."""
        tensors = {name: x if x is None else x[rows] for name, x in vars(self).items()}
        return Rollout(**tensors)


def _check_rollout(rollout):
    tensors = {name: tensor for name, tensor in vars(rollout).items() if tensor is not None}
    _check(tensors.pop("mask"), **tensors)


def penalised_rewards(rollout: Rollout, config: SAPOConfig) -> Tensor:
    """Each token's reward less kl_coef times its log-ratio to the reference model.

    log pi_old - log pi_ref of a sampled token is Schulman's "k1" estimate of the KL divergence,
    in nats (clamped to +-20, as every log-ratio). Without a reference the rewards stay as they
    are. -> (B, T).
    """
    _check_rollout(rollout)
    if rollout.ref_logp is None:
        return rollout.rewards
    log_ratio = _log_ratio(rollout.logp, rollout.ref_logp, rollout.mask)
    return rollout.rewards - config.kl_coef * log_ratio


def credit(rollout: Rollout, config: SAPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and the critic's returns of a rollout: KL penalty, then segment GAE (Eq. 6, 7).

    Nothing is whitened yet: `sapo_update` does that, after the returns are formed. With critic_lam
    the returns have a lambda of their own. -> (advantages, returns), (B, T) each. ValueError for
    a rollout without values.
    """
    _require(rollout.values is not None, "values", None, "values (B, T) of the rollout")
    rewards = penalised_rewards(rollout, config)
    values, ends, mask = rollout.values, rollout.ends, rollout.mask
    advantages, returns = segment_gae(
        rewards, values, ends, mask, config.gamma, config.lam, config.value_at
    )
    if config.critic_lam is not None:
        _, returns = segment_gae(
            rewards, values, ends, mask, config.gamma, config.critic_lam, config.value_at
        )
    return advantages, returns


# ------------------------------------------------------------------------------------- update


def scaled_advantages(advantages: Tensor, mask: Tensor, config: SAPOConfig) -> Tensor:
    """Advantages as the policy's loss reads them: whitened over the whole batch, if the settings
    say so, then clamped. (B, T) -> (B, T)."""
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return advantages.clamp(-config.advantage_clamp, config.advantage_clamp)


def actor_loss(
    logp: Tensor, entropy: Tensor, rollout: Rollout, advantages: Tensor, config: SAPOConfig
) -> tuple[Tensor, dict]:
    """Eq. 9 for a policy that gives the rollout's tokens these log-probabilities.

    logp, entropy (B, T) in nats, advantages (B, T) -> (scalar, stats): those of `policy_loss`, the
    policy's distance `approx_kl`, and the means of ratio and entropy over policy tokens. Entropy
    is only reported: the objective has no entropy bonus.
    """
    mask = rollout.mask
    ratio = importance_ratio(logp, rollout.logp, rollout.ends, mask, config.ratio)
    clip = (config.clip_low, config.clip_high, config.dual_clip)
    loss, stats = policy_loss(ratio, advantages, mask, *clip, config.average)
    stats["approx_kl"] = approx_kl(logp, rollout.logp, mask)
    stats["ratio"] = _average(ratio.detach(), mask, "token").item()
    stats["entropy"] = _average(entropy.detach(), mask, "token").item()
    return loss, stats


def critic_loss(
    values: Tensor, rollout: Rollout, returns: Tensor, config: SAPOConfig
) -> tuple[Tensor, dict]:
    """Eq. 10 times value_coef, for a critic with these values.

    values, returns (B, T) -> (scalar, stats of `value_loss`).
    """
    ends, mask, old_values = rollout.ends, rollout.mask, rollout.values
    loss, stats = value_loss(
        values, returns, ends, mask, config.value_at, old_values, config.value_clip, config.average
    )
    return config.value_coef * loss, stats


def sapo_update(
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor | None,
    score,
    value,
    optimizers,
    config: SAPOConfig,
    generator: torch.Generator | None = None,
    skipped_in_a_row: int = 0,
) -> list[dict]:
    """Learn from one rollout: `config.epochs` passes of shuffled minibatches (Algorithm 1).

    advantages, returns   (B, T), made once, kept in every epoch; advantages are whitened (if the
                          settings say so) and clamped here; returns may be None without critic
    score(rows)           (logp, entropy) of the current policy on those rows, (len(rows), T) each,
                          in nats; logp is differentiable. score=None: the policy stays as it is
    value(rows)           the critic's values, (len(rows), T); value=None: there is no critic
    optimizers            (the policy's, the critic's or None)
    generator             of the shuffling, on the CPU; None: torch's global one

    Where a minibatch measures an approx_kl above config.target_kl, its own step is still taken;
    then the policy stays as it is until the next rollout, and only the critic learns. So the bound
    limits how many steps a rollout gives, not the size of the last one. `policy_steps` is the share
    of minibatches in which the policy took a step, and its metrics are means over those.

    -> the metrics of each epoch, means over its minibatches; an epoch in which the policy stayed
    has none of the policy's (`update_metrics` puts them together). A loss or gradient that is not
    finite skips its optimizer step, and `skipped_steps` counts the minibatches with one. Three of
    them in a row raise FloatingPointError; hand the last epoch's `skipped_in_a_row` to the next
    call, so that the count goes on.
    """
    _check_update(rollout, advantages, returns, value, config)
    mask = rollout.mask
    advantages = scaled_advantages(advantages, mask, config)
    reads = boundaries(rollout.ends, mask, config.value_at)
    actor_optimizer, critic_optimizer = optimizers

    def of_policy(rows):
        return actor_loss(*score(rows), rollout.take(rows), advantages[rows], config)

    def of_critic(rows):
        return critic_loss(value(rows), rollout.take(rows), returns[rows], config)

    history = []
    policy_stays = score is None  # or, later, it has been moved as far as target_kl allows
    for _ in range(config.epochs):
        order = torch.randperm(len(mask), generator=generator).to(mask.device)
        minibatches = []  # the stats of each
        for rows in order.split(config.minibatch):
            stats = {"policy_steps": 0.0 if policy_stays else 1.0}
            if not policy_stays:
                stats |= _descend("policy", of_policy, rows, mask, actor_optimizer, config)
                policy_stays = _finite(stats) and stats["approx_kl"] > config.target_kl
            if value is not None:
                stats |= _descend("value", of_critic, rows, reads, critic_optimizer, config)
            minibatches.append(stats)
            skipped_in_a_row = _skipped_up_to(stats, skipped_in_a_row)
        history.append(_means_of_finite(minibatches) | {"skipped_in_a_row": skipped_in_a_row})
    return history


def _check_update(rollout, advantages, returns, value, config):
    """What a caller got wrong is an error here, before it could count as a step to skip."""
    check_settings(config)  # once more: they may have been set since
    _check_rollout(rollout)
    _check(rollout.mask, advantages=advantages)
    if value is not None:
        _require(returns is not None, "returns", None, "returns (B, T), as there is a critic")
    if returns is not None:
        _check(rollout.mask, returns=returns)
        _require(rollout.values is not None, "values", None, "values (B, T), as there are returns")


def _descend(name, objective, rows, counted, optimizer, config) -> dict:
    """One optimizer step on some rows, skipped if a number is not finite. -> stats: what the
    objective reports, and "policy_loss", "policy_grad_norm" or, by `name`, those of "value".

    Each micro-batch is weighted by its share of the minibatch, so the split changes memory, not
    numbers. The loss is weighted by the share of responses, or of `counted` positions (B, T) where
    losses are means over tokens; what the objective reports by that of counted positions.
    """
    stats = defaultdict(float)
    for part in rows.split(config.micro_batch or len(rows)):
        stats_weight = (counted[part].sum() / counted[rows].sum().clamp(min=1)).item()
        loss_weight = len(part) / len(rows) if config.average == "response" else stats_weight
        try:
            loss, part_stats = objective(part)
            (loss_weight * loss).backward()
        except NaNError:  # the model gave a NaN: the same as a loss that is not finite
            loss, part_stats = torch.tensor(math.nan), {}
        stats[f"{name}_loss"] += loss_weight * loss.item()
        for key, number in part_stats.items():
            stats[key] += stats_weight * number
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    stats[f"{name}_grad_norm"] = grad_norm.item()
    if _finite(stats):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(stats)


def _skipped_up_to(stats, skipped_in_a_row):
    """Minibatches in a row that skipped a step, up to this one; FloatingPointError at the third."""
    if _finite(stats):
        return 0
    if skipped_in_a_row + 1 >= 3:
        raise FloatingPointError(
            f"three minibatches in a row were not finite, the last: {stats}; "
            "lower the learning rates"
        )
    return skipped_in_a_row + 1


def _finite(stats):
    return all(map(math.isfinite, stats.values()))


# ------------------------------------------------------------------------------------ metrics


def outcomes(rollout: Rollout, config: SAPOConfig) -> Tensor:
    """What is earned from each segment on, which V(s_m) foretells: G_m = sum_l gamma^l r_{m+l}.

    Eq. 7's R_m at lambda 1, where the critic cancels out. Rewards less the KL penalty. -> (B, T),
    one number per segment, 0 off the mask.
    """
    rewards = penalised_rewards(rollout, config)
    no_values = torch.zeros_like(rewards)
    # With V = 0 and lambda = 1, A_m = R_m = G_m
    earned, _ = segment_gae(rewards, no_values, rollout.ends, rollout.mask, config.gamma, lam=1.0)
    return earned


def credit_metrics(rollout: Rollout, advantages: Tensor, config: SAPOConfig) -> dict:
    """The cut and the credit as numbers to log. advantages (B, T): not whitened yet.

    explained_variance = 1 - Var(G_m - V(s_m)) / Var(G_m), G_m as in `outcomes`: 1 for values that
    foretell every outcome, 0 for values that are the same everywhere. (The critic's own targets,
    R_m, contain V below lambda 1: measured against them, a critic flatters itself.) 0 where all
    outcomes are equal, as there is nothing to explain; absent without values.
    positive_advantages is the share of policy tokens with A > 0.
    """
    mask = rollout.mask
    reads = boundaries(rollout.ends, mask, config.value_at)
    mean = _average(advantages, mask, "token")
    metrics = {
        "advantage_mean": mean.item(),
        "advantage_std": _average((advantages - mean).square(), mask, "token").sqrt().item(),
        "positive_advantages": _average(advantages > 0, mask, "token").item(),
        "segments_per_response": reads.sum().item() / len(mask),
        "tokens_per_segment": (mask.sum() / reads.sum().clamp(min=1)).item(),
    }
    if rollout.values is not None:
        earned = outcomes(rollout, config)
        spread = earned[reads].var(correction=0)
        unexplained = (earned - rollout.values)[reads].var(correction=0)
        metrics["explained_variance"] = (1 - unexplained / spread).item() if spread > 0 else 0.0
    return metrics


def _means_of_finite(minibatches):
    """The mean of each number over the minibatches whose numbers are all finite; "skipped_steps"
    counts the others."""
    finite = [stats for stats in minibatches if _finite(stats)]
    numbers = defaultdict(list)
    for stats in finite:
        for key, number in stats.items():
            numbers[key].append(number)
    means = {key: sum(of_key) / len(of_key) for key, of_key in numbers.items()}
    return means | {"skipped_steps": len(minibatches) - len(finite)}


def update_metrics(history: list[dict]) -> dict:
    """The metrics of a whole update, from those of its epochs (what `sapo_update` returns).

    How far it went shows at its end, so most numbers are those of the last epoch that has them. But
    `policy_steps` is the mean over the epochs, `clip_fraction` the mean weighted by it (the ratio
    begins at 1, and in the first epoch hardly a token is clipped), and `skipped_steps` the sum.
    """
    metrics = {}
    for epoch in history:
        metrics |= epoch
    taken = [epoch.get("policy_steps", 0.0) for epoch in history]
    clipped = [epoch.get("clip_fraction", 0.0) for epoch in history]
    metrics["policy_steps"] = sum(taken) / len(history)
    metrics["skipped_steps"] = sum(epoch["skipped_steps"] for epoch in history)
    if "clip_fraction" in metrics:
        of_steps = sum(share * fraction for share, fraction in zip(taken, clipped, strict=True))
        metrics["clip_fraction"] = of_steps / sum(taken)
    return metrics


# ------------------------------------------------------------------------------------- checks


class NaNError(ValueError):
    """A NaN where a policy token should have a number."""


def _require(condition, name, value, expected):
    if not condition:
        raise ValueError(f"{name}: {value!r}, expected {expected}")


def check_settings(settings) -> None:
    """ValueError, naming the field, for a value that is not of the field's type, and for a number
    outside the interval of its `setting`, or so large or small that 32 bits do not hold it."""
    hints = get_type_hints(type(settings))  # HfArgumentParser changes the types that fields have
    for part in fields(settings):
        value, hint = getattr(settings, part.name), hints[part.name]
        if not _is_of_type(value, hint):
            raise ValueError(f"{part.name}: {value!r}, expected {_in_words(hint)}")
        _, has_range, within = part.metadata.get("help", "").rpartition("; in ")
        numbers = value if isinstance(value, list) else [value]
        if has_range and not all(_is_within(number, within) for number in numbers):
            raise ValueError(f"{part.name}: {value}, expected a number in {within}")
        if has_range and not all(_is_held(number, within) for number in numbers):
            raise ValueError(
                f"{part.name}: {value}, expected a number in {within} that 32 bits hold"
            )


def _is_of_type(value, hint):
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of_type(item, inner[0]) for item in value)
    if inner:  # a union, as float | None
        return any(_is_of_type(value, one) for one in inner)
    if isinstance(value, bool):  # which is a number to Python
        return hint is bool
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint))


def _in_words(hint):
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(hint) is list:
        return f"a list, each {_in_words(inner[0])}"
    if inner:
        return " or ".join(map(_in_words, inner))
    words = {int: "a whole number", float: "a number", str: "a word", bool: "True or False"}
    return words.get(hint, "None")


def _is_within(number, within):
    if number is None:  # a setting that is off
        return True
    low, high = map(float, within[1:-1].split(","))
    above = number >= low if within[0] == "[" else number > low
    below = number <= high if within[-1] == "]" else number < high
    return above and below  # NaN is neither


def _is_held(number, within):
    """Is a number the same one to the tensors that it meets? In float32 1e308 is infinite and
    1e-320 is 0. A whole number ends at 2**31 - 1, unless its interval ends elsewhere."""
    if number is None:
        return True
    if isinstance(number, Integral):
        return number < 2**31 or not within.endswith("inf)")
    in_float32 = torch.tensor(float(number), dtype=torch.float32).item()
    return math.isclose(in_float32, number, rel_tol=1e-3)


def _check(mask, called="mask", /, **tensors):
    """Raise ValueError, naming the argument, for a mask that is empty or not bool (B, T), a tensor
    of another shape, a cut that is not bool, or a NaN on a policy token."""
    _require(
        mask.dtype == torch.bool and mask.dim() == 2 and mask.numel() > 0,
        called,
        (mask.dtype, tuple(mask.shape)),
        "a bool tensor (B, T) with B and T at least 1",
    )
    for name, tensor in tensors.items():
        _require(
            tensor.shape == mask.shape,
            name,
            tuple(tensor.shape),
            f"the mask's shape {tuple(mask.shape)}",
        )
        if name in ("ends", "is_delimiter"):
            _require(tensor.dtype == torch.bool, name, tensor.dtype, "torch.bool")
    numbers = {name: x for name, x in tensors.items() if x.is_floating_point()}
    # One sum over all tensors shows whether any is NaN, and makes the CPU wait for a GPU only once
    if not numbers or not torch.isnan(sum(x.sum() for x in numbers.values())):
        return
    for name, x in numbers.items():
        where = (torch.isnan(x) & mask).nonzero()
        if len(where):
            row, position = where[0].tolist()
            raise NaNError(f"{name}: NaN on a policy token (row {row}, position {position})")


def _wide(x):
    """x in float32 at least: sums in bfloat16 lose the small terms, squares in float16 overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
