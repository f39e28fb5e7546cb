"""SAPO: Segment-Aligned Policy Optimization, in one file that reads from top to bottom.

Paper: Gao et al., ICML 2026, arXiv:2605.01327; the equation numbers are its own. Name clash: TRL, EasyR1, ms-swift and
verl call *Soft Adaptive* Policy Optimization (arXiv:2511.20347) "SAPO": another method, not this one.

A response is a few reasoning *segments*, and the segment is the unit of everything: cut where token entropy is high; a
critic judges the prefix before each segment; GAE runs over segments; a segment's tokens share one advantage and one
ratio, a geometric mean; clip as in PPO (one token per segment *is* PPO). The released code departs from the paper: see
`SAPOConfig.paper()` and `.released()`. Ours, in neither: `threshold_ends`, a cut that does not look ahead.

    python train.py     # warm start, then SAPO on pictures of dice, with a tiny vision-language model
    python -m pytest    # every function here against plain loops, identities and Hypothesis properties

Shapes: B responses, T tokens (right-padded), M segments, V vocabulary. `mask` (B, T) bool is True on tokens the policy
wrote; False on padding and on *holes*, tokens an environment wrote between two turns. `ends` (B, T) bool is True on the
last token of each segment. `values[b, t]` is V of the prefix *before* token t. Every function takes any float dtype and
device, changes no argument, and raises ValueError naming the argument that is wrong.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------------------------- settings
def setting(default, help):
    """A dataclass field with its meaning, which command lines show."""
    return field(default=default, metadata={"help": help})

@dataclass
class SAPOConfig:
    """Settings of the algorithm. The defaults are the paper's mathematics, at learning rates for a tiny model."""
    gamma: float = setting(1.0, "discount per segment, in [0, 1] (Eq. 6)")
    lam: float = setting(0.99, "GAE's lambda per segment, in [0, 1] (Eq. 7)")
    critic_lam: float | None = setting(None, "lambda of the critic's returns, if not lam (VC-PPO decouples them)")
    top_k: float = setting(0.30, "share of tokens, those of highest entropy, that end a segment, in (0, 1] (Eq. 11)")
    value_at: Literal["start", "end"] = setting("start", "read V before a segment's first token, or before its last")
    ratio: Literal["segment", "token"] = setting("segment", "unit of the importance ratio: Eq. 8, or PPO's Eq. 2")
    average: Literal["response", "token"] = setting("response", "losses: mean per response first, or over all tokens")
    clip_low: float = setting(0.2, "the ratio is clipped below at 1 - clip_low (Eq. 9)")
    clip_high: float = setting(0.2, "the ratio is clipped above at 1 + clip_high (Eq. 9)")
    dual_clip: float | None = setting(None, "bound the loss of a negative advantage A at -dual_clip * A")
    whiten_advantages: bool = setting(False, "advantages to zero mean and unit variance over the batch's tokens")
    advantage_clamp: float = setting(math.inf, "then clamp advantages to +- this")
    value_clip: float | None = setting(None, "limit the critic's move from the rollout's values to +- this")
    value_coef: float = setting(1.0, "factor on the value loss")
    kl_coef: float = setting(0.0, "KL to the reference model (k1), subtracted from each token's reward")
    epochs: int = setting(1, "passes over a rollout; the cut stays the same in all of them")
    minibatch: int = setting(128, "responses per optimizer step")
    micro_batch: int = setting(0, "responses per backward pass, 0: the whole minibatch; changes memory, not numbers")
    actor_lr: float = setting(3e-4, "Adam learning rate of the policy")
    critic_lr: float = setting(4e-4, "Adam learning rate of the critic")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")

    @classmethod
    def paper(cls):
        """The paper's settings (Table 7, Geo3K)."""
        return cls(actor_lr=1e-6, critic_lr=2e-6, kl_coef=0.001)

    @classmethod
    def released(cls):
        """What the authors' released code computes."""
        return cls(actor_lr=1e-6, critic_lr=2e-6, kl_coef=0.001, value_at="end", average="token", clip_high=0.28,
                   dual_clip=3.0, whiten_advantages=True, advantage_clamp=5.0, value_clip=0.5, value_coef=0.5)

# ------------------------------------------------------------------------------------------------------------ checks
class NaNError(ValueError):
    """A NaN where a policy token should have a number."""

def _require(right, name, seen, expected):
    if not right:
        raise ValueError(f"{name}: {seen!r}, expected {expected}")

def _check(mask, called="mask", /, **tensors):
    """Raise ValueError, naming the argument, on an empty or ill-typed mask, a wrong shape, a NaN on a policy token."""
    _require(mask.dtype == torch.bool and mask.dim() == 2 and mask.numel() > 0, called,
             (mask.dtype, tuple(mask.shape)), "a bool tensor (B, T) with B and T at least 1")
    for name, x in tensors.items():
        _require(x.shape == mask.shape, name, tuple(x.shape), f"the mask's shape {tuple(mask.shape)}")
        _require(x.dtype == torch.bool or name not in ("ends", "is_delimiter"), name, x.dtype, "torch.bool")
        if torch.isnan(x.sum()) and (bad := torch.isnan(x) & mask).any():  # a sum is quicker than a search
            raise NaNError(f"{name}: NaN on a policy token (row, position: {bad.nonzero()[0].tolist()})")

def _wide(x):
    """x in float32 at least: bfloat16 sums lose the small terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

# ---------------------------------------------------------------------------------------------------------- segments
# y = z_1 || ... || z_M (Eq. 5). A cut is the bool tensor `ends`; the rest of the file knows nothing else of it. The
# "always-ends": a response's last policy token, and the last one before a hole, end a segment under every cut.

def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution, in nats: H_t = -sum_v pi(v) log pi(v) (Eq. 11).
    logits (..., V) -> (...), in float32 or better. A banned token (logit -inf) contributes 0."""
    logp = _wide(logits).log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)

def response_ends(mask: Tensor) -> Tensor:
    """One segment per response: its last policy token, and the last before each hole. (B, T) -> bool (B, T)."""
    _check(mask)
    return mask & ~F.pad(mask[:, 1:], (0, 1))

def token_ends(mask: Tensor) -> Tensor:
    """Every policy token is a segment: PPO's unit. (B, T) -> bool (B, T)."""
    _check(mask)
    return mask.clone()

def entropy_ends(entropy: Tensor, mask: Tensor, top_k: float = 0.30) -> Tensor:
    """SAPO's cut: the top_k share of a response's tokens, those of highest entropy, end a segment (Eq. 11, k = 30%).
    Of n policy tokens, max(1, ceil(top_k n)) (ties: the earlier token), and the always-ends. entropy (B, T) in nats
    -> bool (B, T). It ranks the whole response, so it looks ahead: that biases the gradient (tutorial.md)."""
    _check(mask, entropy=entropy)
    _require(0 < top_k <= 1, "top_k", top_k, "a share in (0, 1]")
    wanted = (top_k * mask.sum(1).double() - 1e-9).ceil().clamp(min=1)  # (B,); 0.28 * 25 is 7.000000000000001
    order = entropy.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)  # (B, T): by rank, place
    return mask & (order.argsort(dim=1) < wanted[:, None]) | response_ends(mask)

def threshold_ends(entropy: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """The causal cut (ours): a token whose entropy exceeds `threshold` (nats) ends a segment, and the always-ends.
    H_t is known before y_t is drawn: with a threshold set beforehand the cut does not look ahead, V at a segment's
    start is a true baseline, and the gradient is unbiased. entropy (B, T) -> bool (B, T)."""
    _check(mask, entropy=entropy)
    _require(not math.isnan(threshold), "threshold", threshold, "nats (entropy_quantile gives one)")
    return mask & (_wide(entropy) > threshold) | response_ends(mask)

def entropy_quantile(entropy: Tensor, mask: Tensor, top_k: float = 0.30) -> float:
    """The threshold (nats) that would have cut the top_k share of this batch's policy tokens: use the last batch's.
    Of N policy tokens ceil(top_k N) exceed it (fewer on ties). entropy (B, T); the mask needs a policy token."""
    _check(mask, entropy=entropy)
    _require(0 < top_k <= 1, "top_k", top_k, "a share in (0, 1]")
    _require(mask.any(), "mask", "no policy token", "at least one")
    ordered = entropy[mask].sort(descending=True).values  # (N,)
    wanted = math.ceil(top_k * len(ordered) - 1e-9)
    return ordered[wanted].item() if wanted < len(ordered) else ordered[-1].item() - 1e-6

def delimiter_ends(is_delimiter: Tensor, mask: Tensor) -> Tensor:
    """Tokens marked in `is_delimiter` (newline, "Step n") end a segment, and the always-ends. (B, T) bool -> bool."""
    _check(mask, is_delimiter=is_delimiter)
    return mask & is_delimiter | response_ends(mask)

def low_prob_ends(logp: Tensor, mask: Tensor, threshold: float = 0.9, every: int = 5) -> Tensor:
    """SPO-chain's cut (arXiv:2505.23564): every `every`-th token of probability below `threshold`, and the always-ends.
    logp (B, T): log pi_old of each token, in nats. -> bool (B, T)."""
    _check(mask, logp=logp)
    _require(0 < threshold <= 1, "threshold", threshold, "a probability in (0, 1]")
    _require(every >= 1, "every", every, "at least 1")
    cutpoint = mask & (_wide(logp) < math.log(threshold))
    return cutpoint & (cutpoint.cumsum(1) % every == 0) | response_ends(mask)

def segment_index(ends: Tensor) -> Tensor:
    """Which segment a token is in: how many ends stand before it. bool (B, T) -> long (B, T)."""
    _check(ends, "ends")
    return F.pad(ends.cumsum(1), (1, -1))

def boundaries(ends: Tensor, mask: Tensor, value_at: str = "start") -> Tensor:
    """Where V(s_m) is read: each segment's first policy token ("start", the paper) or last ("end"). -> bool (B, T)."""
    _check(mask, ends=ends)
    _require(value_at in ("start", "end"), "value_at", value_at, "'start' or 'end'")
    index, T = segment_index(ends), mask.shape[1]
    if value_at == "start":  # the nearest policy token on that side is in another segment; index never falls in a row
        neighbour = F.pad(index.masked_fill(~mask, -1).cummax(1).values, (1, -1), value=-1)
    else:
        neighbour = F.pad(index.masked_fill(~mask, T).flip(1).cummin(1).values.flip(1), (-1, 1), value=T)
    return mask & (neighbour != index)

def _sums(x, index, mask):
    """Sums of x over each segment's policy tokens: x, index (B, T) -> (B, M)."""
    kept = torch.where(mask, _wide(x), 0.0)  # where, not x * mask: a NaN off the mask must not survive
    return kept.new_zeros(len(kept), int(index.max()) + 1).scatter_add(1, index, kept)

def segment_sum(x: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Sum of x over the policy tokens of each segment, given back to each of them; 0 off the mask. (B, T)."""
    _check(mask, x=x, ends=ends)
    index = segment_index(ends)
    return torch.where(mask, _sums(x, index, mask).gather(1, index), 0.0)

def segment_mean(x: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the policy tokens of each segment, given back to each of them; 0 off the mask. (B, T)."""
    _check(mask, x=x, ends=ends)
    index = segment_index(ends)
    means = _sums(x, index, mask) / _sums(mask, index, mask).clamp(min=1)  # (B, M)
    return torch.where(mask, means.gather(1, index), 0.0)

# ------------------------------------------------------------------------------------------------------------ critic
class SegmentCritic(nn.Module):
    """V of every prefix: a backbone's last hidden states -> a float32 value per position, zero before training.
    forward hands its arguments to the backbone: hidden states (B, L, H) -> values (B, L). Position p has read the
    tokens up to *and including* p, so V before response token t, after a prompt of P tokens, is at P + t - 1."""
    def __init__(self, backbone: nn.Module, hidden_size: int | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size or getattr(backbone.config, "text_config", backbone.config).hidden_size, 1)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)  # the first advantages are the plain returns

    def forward(self, *args, **kwargs) -> Tensor:
        output = self.backbone(*args, **kwargs)
        hidden = getattr(output, "last_hidden_state", output)
        return F.linear(hidden.float(), self.head.weight.float(), self.head.bias.float()).squeeze(-1)  # (B, L)

# -------------------------------------------------------------------------------------------------------- advantages
def segment_gae(rewards: Tensor, values: Tensor, ends: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.99,
                value_at: str = "start") -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with segments as steps (Eq. 6 and 7).

        delta_m = r_m + gamma V(s_{m+1}) - V(s_m),  A_m = sum_l (gamma lam)^l delta_{m+l},  R_m = A_m + V(s_m)

    r_m sums the rewards of the segment's policy tokens; V after the last segment is 0. rewards, values (B, T) ->
    (advantages, returns), (B, T) each, one number per segment, 0 off the mask. value_at: see `boundaries`; at "end" the
    baseline depends on the segment's own tokens, hence a biased gradient."""
    _check(mask, rewards=rewards, values=values, ends=ends)
    _require(0 <= gamma <= 1, "gamma", gamma, "a number in [0, 1]")
    _require(0 <= lam <= 1, "lam", lam, "a number in [0, 1]")
    starts = boundaries(ends, mask)
    index = (starts.cumsum(1) - 1).clamp(min=0)                                  # (B, T): 0 .. M_b - 1, without gaps
    reads = starts if value_at == "start" else boundaries(ends, mask, value_at)
    r = _sums(rewards, index, mask)                                              # (B, M)
    v = _sums(values, index, reads)                                              # (B, M), 0 after the last segment
    delta = r + gamma * F.pad(v[:, 1:], (0, 1)) - v
    running, steps = 0.0, []
    for delta_m in reversed(delta.T.contiguous().unbind()):                      # (B,) each
        running = delta_m + gamma * lam * running
        steps.append(running)
    advantages = torch.stack(steps[::-1], dim=1)                                 # (B, M)
    return tuple(torch.where(mask, x.gather(1, index), 0.0) for x in (advantages, advantages + v))

def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(Bessel's variance + 1e-8) over the mask, 0 off it; one, no or equal tokens: zeros. (B, T)."""
    _check(mask, x=x)
    count = mask.sum()
    if count < 2:
        return torch.zeros_like(x)
    x = torch.where(mask, _wide(x) - x[mask][0], 0.0)  # equal tokens become exact zeros, whatever their size
    x = torch.where(mask, x - x.sum() / count, 0.0)
    return x * (x.square().sum() / (count - 1) + 1e-8).rsqrt()

# ------------------------------------------------------------------------------------------------------------- ratio
def _log_ratio(logp, old_logp, mask):
    """log pi - log pi_old, clamped to +-20; 0 off the mask, where banned tokens may be -inf on both sides."""
    _check(mask, logp=logp, old_logp=old_logp)
    difference = torch.where(mask, _wide(logp) - _wide(old_logp), 0.0)
    _check(mask, **{"logp - old_logp": difference})  # -inf on both sides: a banned token was sampled
    return difference.clamp(-20.0, 20.0)

def segment_ratio(logp: Tensor, old_logp: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
    """Importance ratio of each segment, a geometric mean over its tokens (Eq. 8).

        s_m = (pi(z_m | s_m) / pi_old(z_m | s_m))^(1/|z_m|) = exp(mean over the segment of log pi - log pi_old)

    logp, old_logp (B, T), nats -> (B, T), 1 off the mask. Token log-ratios are clamped to +-20 first. Bias against the
    product of the ratios: at most e^(L|mu|) (L - 1) |mu|, for length L and mean log-ratio mu (Eq. 26)."""
    return segment_mean(_log_ratio(logp, old_logp, mask), ends, mask).exp()

def approx_kl(logp: Tensor, old_logp: Tensor, mask: Tensor) -> float:
    """KL(pi_old || pi) in nats per token, from tokens of pi_old: mean of e^d - 1 - d, d = log pi - log pi_old
    (Schulman's "k3": unbiased, never negative). (B, T) each -> float, 0 without policy tokens."""
    d = _log_ratio(logp.detach(), old_logp, mask)
    return _average(torch.expm1(d) - d, mask, "token").item()

# ------------------------------------------------------------------------------------------------------------ losses
def _average(x, mask, average):
    """Mean of x over the mask: of each response, then of all responses ("response"); or of all tokens ("token")."""
    _require(average in ("response", "token"), "average", average, "'response' or 'token'")
    total, count = torch.where(mask, _wide(x), 0.0).sum(1), mask.sum(1)  # (B,)
    return (total / count.clamp(min=1)).mean() if average == "response" else total.sum() / count.sum().clamp(min=1)

def policy_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.28,
                dual_clip: float | None = None, average: str = "response") -> tuple[Tensor, dict]:
    """The clipped objective, negated (Eq. 9).

        J = E[ 1/T sum_t min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t) ]

    ratio, advantages (B, T) -> (scalar, {"clip_fraction": share of policy tokens that this clip leaves without
    gradient}). dual_clip=c > 1 bounds the loss of a negative A at -c A. An empty response counts as a 0."""
    _check(mask, ratio=ratio, advantages=advantages)
    advantages = torch.where(mask, advantages, 0.0)  # off the mask may stand a NaN, and 0 * NaN is NaN
    _require(dual_clip is None or dual_clip > 1, "dual_clip", dual_clip, "a number above 1, or None")
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(plain, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -_average(objective, mask, average), {"clip_fraction": _average(clipped < plain, mask, "token").item()}

def value_loss(values: Tensor, returns: Tensor, ends: Tensor, mask: Tensor, value_at: str = "start",
               old_values: Tensor | None = None, value_clip: float | None = None,
               average: str = "response") -> tuple[Tensor, dict]:
    """Squared error of the critic, only where V(s_m) is read: 1/M sum_m (V(s_m) - R_m)^2 (Eq. 10). No factor 0.5.
    values, returns (B, T) -> (scalar, {"value_clip_fraction"}). With value_clip, the larger of the plain error and the
    error of the values kept within +-value_clip of old_values (B, T)."""
    _check(mask, values=values, returns=returns, ends=ends)
    reads = boundaries(ends, mask, value_at)
    error = clipped = torch.where(reads, values - returns, 0.0)
    if value_clip is not None:
        _require(old_values is not None, "old_values", None, "the rollout's values (B, T), as value_clip is set")
        _check(mask, old_values=old_values)
        clipped = torch.where(reads, values.clamp(old_values - value_clip, old_values + value_clip) - returns, 0.0)
    return (_average(torch.maximum(error.square(), clipped.square()), reads, average),
            {"value_clip_fraction": _average(clipped.abs() > error.abs(), reads, "token").item()})

# ------------------------------------------------------------------------------------------------------------ update
@dataclass
class Rollout:
    """What a batch of responses left behind, (B, T) each: all that `sapo_update` learns from."""
    mask: Tensor
    ends: Tensor
    logp: Tensor                      # log pi_old of each token, in nats
    rewards: Tensor
    values: Tensor | None = None      # V of the prefix before each token
    ref_logp: Tensor | None = None    # log-probabilities under the reference model
    advantages: Tensor | None = None  # a baseline's own credit (GRPO's, say), in place of a critic's

def credit(rollout: Rollout, config: SAPOConfig) -> tuple[Tensor, Tensor | None, dict]:
    """(advantages, returns, metrics) of a rollout: KL penalty (k1) into the rewards, then segment GAE. Not whitened."""
    mask, rewards, advantages, returns = rollout.mask, rollout.rewards, rollout.advantages, None
    _require(rollout.values is not None or advantages is not None, "values", None, "values (B, T), or advantages")
    _check(mask, **{name: x for name, x in vars(rollout).items() if x is not None and name != "mask"})
    if rollout.ref_logp is not None:
        rewards = rewards - config.kl_coef * _log_ratio(rollout.logp, rollout.ref_logp, mask)
    if advantages is None:
        gae = lambda lam: segment_gae(rewards, rollout.values, rollout.ends, mask, config.gamma, lam, config.value_at)
        advantages, returns = gae(config.lam)
        returns = returns if config.critic_lam is None else gae(config.critic_lam)[1]
    reads = boundaries(rollout.ends, mask, config.value_at)
    metrics = {"advantage_mean": (mean := _average(advantages, mask, "token")).item(),
               "advantage_std": _average((advantages - mean).square(), mask, "token").sqrt().item(),
               "segments_per_response": reads.sum().item() / len(mask),
               "tokens_per_segment": (mask.sum() / reads.sum().clamp(min=1)).item()}
    if returns is not None:  # 0 when all returns are equal: there is nothing to explain
        spread, left = (x[reads].var(correction=0) for x in (returns, returns - rollout.values))
        metrics["explained_variance"] = (1 - left / spread).item() if spread > 0 else 0.0
    return advantages, returns, metrics

def _learn(rows, loss_of, counted, optimizer, config, name):
    """One optimizer step on some rows, skipped if a number is not finite. -> stats. A micro-batch weighs as much as it
    holds of the minibatch (responses, or `counted` positions), so that the split changes nothing."""
    stats = defaultdict(float)
    for part in rows.split(config.micro_batch or len(rows)):
        share = (counted[part].sum() / counted[rows].sum().clamp(min=1)).item()  # metrics are means over these
        held = len(part) / len(rows) if config.average == "response" else share
        try:
            loss, found = loss_of(part)
            (held * loss).backward()
        except NaNError:  # the model gives NaN: the same as a loss that is not finite
            loss, found = torch.tensor(math.nan), {}
        stats[f"{name}_loss"] += held * loss.item()
        stats.update({key: stats[key] + share * x for key, x in found.items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stats[f"{name}_grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    if all(map(math.isfinite, stats.values())):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats

def sapo_update(rollout: Rollout, score, value, actor_optimizer, critic_optimizer, config: SAPOConfig,
                generator: torch.Generator | None = None, skipped_in_a_row: int = 0) -> list[dict]:
    """Learn from one rollout: `config.epochs` passes of shuffled minibatches (Algorithm 1). -> metrics of each epoch.
    `score(rows)` gives (logp, entropy), (len(rows), T) each, of the current policy on those rows of the rollout;
    `value(rows)` the critic's values, or value=None without a critic. Cut and advantages are made once and kept. A
    non-finite loss or gradient skips its step and is counted (`skipped_steps`); three minibatches in a row with one
    raise FloatingPointError: hand the last epoch's `skipped_in_a_row` to the next call so that the count goes on."""
    advantages, returns, metrics = credit(rollout, config)
    mask, ends = rollout.mask, rollout.ends
    _require(config.ratio in ("segment", "token"), "ratio", config.ratio, "'segment' or 'token'")
    advantages = whiten(advantages, mask) if config.whiten_advantages else advantages
    advantages = advantages.clamp(-config.advantage_clamp, config.advantage_clamp)
    unit, reads = ends if config.ratio == "segment" else token_ends(mask), boundaries(ends, mask, config.value_at)

    def policy(part):
        logp, entropy = score(part)
        ratio = segment_ratio(logp, rollout.logp[part], unit[part], mask[part])
        loss, stats = policy_loss(ratio, advantages[part], mask[part], config.clip_low, config.clip_high,
                                  config.dual_clip, config.average)
        return loss, stats | {"approx_kl": approx_kl(logp, rollout.logp[part], mask[part]),
                              "ratio": _average(ratio.detach(), mask[part], "token").item(),
                              "entropy": _average(entropy.detach(), mask[part], "token").item()}
    def critic(part):
        loss, stats = value_loss(value(part), returns[part], ends[part], mask[part], config.value_at,
                                 rollout.values[part], config.value_clip, config.average)
        return config.value_coef * loss, stats

    history = []
    for _ in range(config.epochs):
        steps, skipped = [], 0
        for rows in torch.randperm(len(mask), generator=generator).split(config.minibatch):
            stats = _learn(rows, policy, mask, actor_optimizer, config, "policy")
            if value is not None:
                stats |= _learn(rows, critic, reads, critic_optimizer, config, "value")
            finite = all(map(math.isfinite, stats.values()))
            steps, skipped = steps + [stats] * finite, skipped + (not finite)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            if skipped_in_a_row >= 3:
                raise FloatingPointError(f"three minibatches in a row were not finite, the last: {dict(stats)}; lower "
                                         "the learning rates and resume from the last checkpoint")
        means = {key: sum(s[key] for s in steps) / len(steps) for key in (steps[0] if steps else {})}
        history.append({**means, **metrics, "skipped_steps": skipped, "skipped_in_a_row": skipped_in_a_row})
    return history
