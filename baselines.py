"""The neighbours of SAPO, each as what differs from it. They call sapo.py's functions; none has a loss of its own.

| method    | segments             | value                     | advantage                     | ratio              |
| --------- | -------------------- | ------------------------- | ----------------------------- | ------------------ |
| PPO       | every token          | critic                    | token GAE, lambda 0.95        | token              |
| VC-PPO    | every token          | critic, pre-trained       | decoupled GAE, 0.99 and 1.0   | token              |
| GRPO      | whole response       | group mean                | (R - mean) / std of the group | token              |
| GSPO      | whole response       | group mean                | as GRPO                       | response, as Eq. 8 |
| SRPO      | see / think          | group mean                | GRPO x role weight            | token              |
| SPO-chain | low-probability cut  | Monte-Carlo continuations | V(s_{m+1}) - V(s_m)           | token, some masked |
| VinePPO   | delimiters           | Monte-Carlo continuations | V(s_{m+1}) - V(s_m)           | token              |
| SPO-tree  | fixed length, a tree | mean over the children    | V(child) - V(parent)          | token              |
| SAPO      | top-k% entropy       | critic at segment starts  | segment GAE, lambda 0.99      | segment            |

PPO arXiv:1707.06347, VC-PPO arXiv:2503.01491, GRPO arXiv:2402.03300, GSPO arXiv:2507.18071, SPO (Segment Policy
Optimization) arXiv:2505.23564, VinePPO arXiv:2410.01679. SRPO is Structured Role-aware Policy Optimization,
arXiv:2605.07274 (others share the acronym); its formulas are not public to us, and what the functional form adds to
its text is *ours* and says so. So a method is nothing but settings, `SETTINGS`, and any other mixture is a flag away:
`--method sapo --credit continuations`, say. This module knows no model and no environment: what it needs of them,
`train.py` hands it as functions. Left out: each paper's KL term (--kl_coef puts k1 into the reward under any method).

Shapes: B responses, T tokens, as in sapo.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

import sapo
from sapo import setting

# What a method changes in the settings. The paper runs PPO at lambda 0.95 and SAPO at 0.99: --lam undoes that confound.
SETTINGS = {
    "sapo": {},
    "ppo": {"cut": "token", "ratio": "token", "lam": 0.95},
    "vc-ppo": {"cut": "token", "ratio": "token", "lam": 0.99, "critic_lam": 1.0, "value_pretraining": 5},
    "grpo": {"cut": "response", "credit": "group", "ratio": "token"},
    "gspo": {"cut": "response", "credit": "group", "clip_low": 3e-4, "clip_high": 4e-4},
    "srpo": {"cut": "response", "credit": "roles", "ratio": "token"},
    "spo-chain": {"cut": "low-prob", "credit": "continuations", "ratio": "token", "lam": 0.0, "average": "token",
                  "loss_below": 0.9},
    "vineppo": {"cut": "delimiter", "credit": "continuations", "ratio": "token", "lam": 0.0},
    "spo-tree": {"cut": "fixed", "credit": "tree", "ratio": "token", "average": "token"},
}

@dataclass
class Method:
    """Where the segments come from, and where the credit: what a method is beside its SAPOConfig."""
    method: Literal[*SETTINGS] = setting("sapo", "presets of the settings (baselines.py); flags beside it win")
    cut: Literal["topk", "causal", "delimiter", "low-prob", "fixed", "token", "response"] = setting(
        "topk", "segments end at high entropy (topk of the response, or above last batch's threshold: causal), at a "
                "newline, ';' or closed tag, at improbable tokens, every --segment_tokens, everywhere, or at the end")
    credit: Literal["critic", "group", "roles", "continuations", "tree"] = setting(
        "critic", "advantages: GAE on a critic, the group's mean, that times role weights, Monte-Carlo values, a tree")
    group: int = setting(8, "group, roles: responses per prompt")
    continuations: int = setting(9, "continuations: responses sampled from each segment's start")
    segment_tokens: int = setting(10, "fixed, tree: tokens per segment")
    branching: list[int] = field(default_factory=lambda: [4, 4, 4], metadata={"help": "tree: children per level"})
    tree_advantage: Literal["rloo", "grpo"] = setting("rloo", "tree: V(child) - V(parent), or that over the spread")
    loss_below: float = setting(1.0, "continuations: tokens above this probability leave the loss (SPO-chain: 0.9)")
    role_temperature: float = setting(1.0, "roles: nats of the signal that change a weight e-fold; inf is GRPO")
    value_pretraining: int = setting(0, "first iterations in which only the critic learns (VC-PPO)")

def responses_per_prompt(method: Method) -> int:
    """How many responses of a batch answer one prompt: a group, a tree's leaves (at most), or one."""
    return {"group": method.group, "roles": method.group, "tree": math.prod(method.branching)}.get(method.credit, 1)

def check(settings, picture: bool):
    """Leave with one line if the batch does not divide into groups or trees, or SRPO finds no picture."""
    if settings.batch % responses_per_prompt(settings):
        raise SystemExit(f"--batch {settings.batch}: --credit {settings.credit} needs a multiple of the "
                         f"{responses_per_prompt(settings)} responses to one prompt (--group, or --branching)")
    if settings.credit == "roles" and not picture:
        raise SystemExit(f"--method {settings.method}: {settings.env} has no picture, and SRPO weighs what was seen on "
                         "one; choose an environment with a picture, or --method grpo")

def masked(rollout: sapo.Rollout, keep: Tensor, config: sapo.SAPOConfig) -> sapo.Rollout:
    """The rollout as the update sees it when its loss reads only the tokens in `keep` (B, T): SPO's probability mask,
    and a tree's edges, each once. The credit is made before, from whole responses."""
    advantages = sapo.credit(rollout, config)[0]
    return sapo.Rollout(keep, sapo.token_ends(keep), rollout.logp, rollout.rewards, advantages=advantages * keep)

# ---------------------------------------------------------------------------------------------------------- segments
DELIMITERS = ("\n", ";", "</see>", "</think>")  # our tasks part their moves with ";", as prose does with newlines

def fixed_ends(mask: Tensor, tokens: int) -> Tensor:
    """Every `tokens`-th policy token ends a segment, and the always-ends. (B, T) -> bool (B, T)."""
    if tokens < 1:
        raise ValueError(f"segment_tokens: {tokens}, expected at least 1")
    return mask & (mask.cumsum(1) % tokens == 0) | sapo.response_ends(mask)

def cut(name: str, mask: Tensor, entropy: Tensor, logp: Tensor, texts: list[list[str]], top_k: float = 0.30,
        threshold: float | None = None, segment_tokens: int = 10) -> Tensor:
    """The cut called `name` (see `Method.cut`) of responses whose tokens read `texts`. -> bool (B, T)."""
    if name == "delimiter":
        marked = torch.zeros_like(mask)
        for row, pieces in enumerate(texts):
            marked[row, :len(pieces)] = torch.tensor([any(d in text for d in DELIMITERS) for text in pieces])
        return sapo.delimiter_ends(marked, mask)
    return {"topk": lambda: sapo.entropy_ends(entropy, mask, top_k),
            "causal": lambda: sapo.threshold_ends(entropy, mask, threshold),
            "low-prob": lambda: sapo.low_prob_ends(logp, mask),
            "fixed": lambda: fixed_ends(mask, segment_tokens),
            "token": lambda: sapo.token_ends(mask),
            "response": lambda: sapo.response_ends(mask)}[name]()

# -------------------------------------------------------------------------------------------------------- GRPO, GSPO
def response_rewards(rollout: sapo.Rollout, config: sapo.SAPOConfig) -> Tensor:
    """R of each response, with the KL penalty: the advantage of a single segment before a critic that says 0. (B,)."""
    whole = replace(rollout, ends=torch.zeros_like(rollout.mask), values=torch.zeros_like(rollout.logp))
    return sapo.credit(whole, config)[0].gather(1, rollout.mask.long().argmax(1)[:, None]).squeeze(1)

def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """GRPO's advantage: (R - mean) / (std + 1e-6) within the group of responses to one prompt (arXiv:2402.03300).

    rewards (B,), one per response, groups of `group` side by side -> (B,). std has Bessel's correction; equal rewards
    give zeros. Raises ValueError when B is not a multiple of `group`, or group < 2.
    """
    if group < 2 or rewards.dim() != 1 or len(rewards) % group:
        raise ValueError(f"group: {group} for rewards of shape {tuple(rewards.shape)}, expected (B,) with B a multiple "
                         "of the group, and at least 2 responses per group")
    grouped = rewards.view(-1, group)  # (B / group, group)
    grouped = grouped - grouped[:, :1]  # equal rewards become exact zeros, whatever their size
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).flatten()

# -------------------------------------------------------------------------------------------------------------- SRPO
def perception(texts: list[list[str]], mask: Tensor) -> Tensor:
    """The tokens that say what is seen: all up to the one that closes the first `</see>`, none where nothing closes.
    The other policy tokens reason. texts: what each token of a response reads. -> bool (B, T)."""
    seen = torch.zeros_like(mask)
    for row, pieces in enumerate(texts):
        text = ""
        for t, piece in enumerate(pieces):
            text += piece
            if "</see>" in text:
                seen[row, :t + 1] = True
                break
    return seen & mask

def role_weights(signal: Tensor, mask: Tensor, temperature: float = 1.0, limit: float = 1.0) -> Tensor:
    """SRPO's weights of a response's tokens: positive, of mean 1, larger where the signal is. The form is ours:

        w_t = exp(clip((s_t - b) / temperature, -limit, limit)) / (mean of that over the response)

    signal (B, T), nats: for a perception token how much its log-probability drops when the picture is corrupted; for a
    reasoning token how much it drops when the perception is hidden. Both share one baseline b, the response's mean
    signal. temperature in (0, inf]; inf gives ones: GRPO. -> (B, T), 0 off the mask.
    """
    if not temperature > 0:
        raise ValueError(f"role_temperature: {temperature}, expected a positive number, or inf for GRPO")
    whole = torch.zeros_like(mask)  # no end at all: a response is one segment, also across holes
    centred = torch.where(mask, signal - sapo.segment_mean(signal, whole, mask), 0.0)
    weights = (centred / temperature).clamp(-limit, limit).exp()
    return torch.where(mask, weights / sapo.segment_mean(weights, whole, mask).clamp(min=1e-30), 0.0)

# ------------------------------------------------------------------------------------------------ SPO-chain, VinePPO
def continuation_values(batch, settings, go_on: Callable, judge: Callable) -> Tensor:
    """Monte-Carlo values: V(s_m) is the mean reward of `settings.continuations` fresh continuations of the prefix
    before segment m, each to at most `settings.max_new_tokens` tokens of response in all.

    `go_on(rows, lengths, limit)` continues response rows[k] of the batch after its first lengths[k] tokens, by at most
    `limit`, and gives the text of each new token; `judge(row, prefix, text)` the reward. -> values (B, T), read at
    segment starts and 0 elsewhere. `sapo.segment_gae` at lambda 0 makes SPO's advantages of them: V(s_{m+1}) - V(s_m),
    and R - V(s_M) for the last segment.
    """
    mask, count, longest = batch.rollout.mask, settings.continuations, settings.max_new_tokens
    if count < 1:
        raise ValueError(f"continuations: {count}, expected at least 1")
    states = sapo.boundaries(batch.rollout.ends, mask).nonzero()  # (K, 2): row, position
    rewards = []
    for part in states.repeat_interleave(count, 0).split(settings.batch):
        rows, at = part.unbind(1)
        for row, t, pieces in zip(*part.T.tolist(), go_on(rows, at, longest - int(at.min())), strict=True):
            rewards.append(judge(row, "".join(batch.texts[row][:t]), "".join(pieces[:longest - t])))
    values = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    values[states.unbind(1)] = torch.tensor(rewards, device=mask.device).view(-1, count).mean(1)
    return values

# ---------------------------------------------------------------------------------------------------------- SPO-tree
@dataclass
class Tree:
    """Responses that share their beginnings. A node is a segment; `parent[node]` is the one before it, or -1 for the
    prompts, which come first: a parent's number is smaller than its children's. One row per leaf."""
    parent: list[int]
    leaf: list[int]    # (B,): the last node of each row
    nodes: Tensor      # (B, T): the node that each token belongs to

def grow(prompts: int, settings, write: Callable, ended: Callable) -> tuple[Tensor, Tensor, Tensor, Tree]:
    """Grow a tree from each prompt: a node gets `settings.branching[level]` children of `settings.segment_tokens`
    tokens each, and the last level runs to the end of the response, at most `settings.max_new_tokens` in all.

    `write(prompt, prefix, lengths, limit)` goes on from prefixes of answers to prompt[k], the first lengths[k] tokens
    of prefix[k], by at most `limit` tokens, and gives (tokens (K, N), mask (K, N), their texts); `ended(text)` says if
    a response is over. -> (prompt (B,), tokens (B, T), mask (B, T), tree): one row per leaf, in the order of the tree.
    """
    branching, tokens = settings.branching, settings.segment_tokens
    if not branching or min(branching) < 1 or tokens < 1 or tokens * (len(branching) - 1) >= settings.max_new_tokens:
        raise ValueError(f"branching: {branching}, segment_tokens: {tokens}; expected positive numbers, such as 4 4 4, "
                         f"and room for the last level within max_new_tokens={settings.max_new_tokens}")
    parent, leaves = [-1] * prompts, []
    alive = [(node, [], [], "") for node in range(prompts)]  # a path: its last node, tokens, the node of each, text
    for level, children in enumerate(branching):
        paths = [path for path in alive for _ in range(children)]
        rows = torch.tensor([_ancestors(path[0], parent)[0] for path in paths])
        lengths = torch.tensor([len(path[1]) for path in paths])
        last = level + 1 == len(branching)
        limit = settings.max_new_tokens - int(lengths.min()) if last else tokens
        fresh, kept, texts = write(rows, _padded([path[1] for path in paths]), lengths, limit)
        alive = []
        for (node, ids, nodes, text), new, keep, pieces in zip(paths, fresh.cpu(), kept.cpu(), texts, strict=True):
            parent.append(node)
            new, text = new[keep].tolist(), text + "".join(pieces)
            path = (len(parent) - 1, ids + new, nodes + [len(parent) - 1] * len(new), text)
            (leaves if last or ended(text) else alive).append(path)
        if not alive:
            break
    leaves.sort(key=lambda path: _ancestors(path[0], parent))
    node, ids, nodes, _ = zip(*leaves, strict=True)
    mask = _padded([[True] * len(x) for x in ids]).bool()
    prompt = torch.tensor([_ancestors(x, parent)[0] for x in node])
    return prompt, _padded(ids), mask, Tree(parent, list(node), _padded(nodes))

def _padded(lists):
    """Lists of numbers -> long (B, T), zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], True)

def _ancestors(node, parent):
    """The path from the prompt to a node, the node included."""
    path = []
    while node >= 0:
        path.append(node)
        node = parent[node]
    return path[::-1]

def tree_values(tree: Tree, rewards: Tensor) -> Tensor:
    """V of every node: a leaf's is its reward, another's the mean of its children's. rewards (B,) -> (nodes,)."""
    values, children = torch.zeros(len(tree.parent), dtype=torch.float64), defaultdict(list)
    values[tree.leaf] = rewards.double().cpu()
    for node in reversed(range(len(tree.parent))):  # children before their parents
        if node in children:
            values[node] = values[children[node]].mean()
        children[tree.parent[node]].append(node)
    return values

def tree_advantages(tree: Tree, rewards: Tensor, kind: str = "rloo") -> Tensor:
    """A(node) = V(node) - V(parent) ("rloo"), or that over the standard deviation of the siblings' values plus 1e-6
    ("grpo"; Bessel's correction; an only child gets 0). rewards (B,) of the leaves -> (nodes,), 0 for the prompts."""
    if kind not in ("rloo", "grpo"):
        raise ValueError(f"tree_advantage: {kind!r}, expected 'rloo' or 'grpo'")
    values, siblings = tree_values(tree, rewards), defaultdict(list)
    for node, parent in enumerate(tree.parent):
        siblings[parent].append(node)
    advantages = torch.zeros_like(values)
    for parent, nodes in siblings.items():
        if parent >= 0:
            difference = values[nodes] - values[parent]
            spread = difference.std() if len(nodes) > 1 else torch.tensor(0.0)
            advantages[nodes] = difference if kind == "rloo" else difference / (spread + 1e-6)
    return advantages

def tree_credit(tree: Tree, rewards: Tensor, mask: Tensor, kind: str = "rloo") -> tuple[Tensor, Tensor]:
    """(advantages, keep), (B, T) each, of a tree's leaves. Every edge is one training sample: `keep` has its tokens in
    the first row that passes through it only, and not at all if its advantage is 0. rewards (B,)."""
    advantages, first = tree_advantages(tree, rewards, kind).to(mask.device, torch.float32), {}
    for row, leaf in enumerate(tree.leaf):
        for node in _ancestors(leaf, tree.parent):
            first.setdefault(node, row)
    owner = torch.tensor([first.get(node, -1) for node in range(len(tree.parent))], device=mask.device)
    nodes = tree.nodes.to(mask.device)
    own = owner[nodes] == torch.arange(len(nodes), device=mask.device)[:, None]  # (B, T)
    return advantages[nodes] * mask, mask & own & (advantages[nodes] != 0)

# ------------------------------------------------------------------------------------------------------ all of them
def give_credit(batch, settings, config: sapo.SAPOConfig, go_on: Callable, judge: Callable, score: Callable):
    """Into `batch.rollout` the values or advantages that --credit names, where they are not the critic's; into
    `batch.keep` the tokens that the loss reads (None: all). `go_on`, `judge`: see continuation_values; `score(mask,
    noised)` gives the log-probabilities of the batch's tokens that `mask` shows, before noise for a picture or not."""
    rollout, batch.keep = batch.rollout, None
    if settings.credit == "continuations":
        rollout.values = continuation_values(batch, settings, go_on, judge)
        if settings.loss_below < 1:
            batch.keep = rollout.mask & (rollout.logp.exp() <= settings.loss_below)
    elif settings.credit == "tree":
        rewards = response_rewards(rollout, config)
        rollout.advantages, batch.keep = tree_credit(batch.tree, rewards, rollout.mask, settings.tree_advantage)
    elif settings.credit in ("group", "roles"):
        advantages = group_advantages(response_rewards(rollout, config), settings.group)
        rollout.advantages = advantages[:, None] * rollout.mask
    if settings.credit == "roles":
        seen = perception(batch.texts, batch.mask)
        without = torch.where(seen, score(batch.mask, True), score(batch.mask & ~seen, False))
        rollout.advantages *= role_weights(rollout.logp - without, rollout.mask, settings.role_temperature)
