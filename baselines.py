"""The neighbours of SAPO, each as what differs from it. None has a loss of its own.

| method    | segments            | value                 | advantage              | ratio         |
| --------- | ------------------- | --------------------- | ---------------------- | ------------- |
| PPO       | every token         | critic                | GAE, lambda 0.95       | token         |
| VC-PPO    | every token         | critic, pre-trained   | GAE, decoupled lambdas | token         |
| GRPO      | whole response      | mean of a group       | (R - mean) / std       | token         |
| GSPO      | whole response      | mean of a group       | as GRPO                | Eq. 8         |
| SRPO      | see / think         | mean of a group       | GRPO x role weight     | token         |
| SPO-chain | low probability     | continuations         | V(s_{m+1}) - V(s_m)    | token, masked |
| VinePPO   | delimiters          | continuations         | V(s_{m+1}) - V(s_m)    | token         |
| SPO-tree  | fixed, in a tree    | mean of the children  | V(child) - V(parent)   | token         |
| SAPO      | top-k% entropy      | critic, segment start | GAE, lambda 0.99 (0.9) | segment       |

PPO arXiv:1707.06347, VC-PPO arXiv:2503.01491, GRPO arXiv:2402.03300, GSPO arXiv:2507.18071,
SPO (Segment Policy Optimization) arXiv:2505.23564, VinePPO arXiv:2410.01679. SRPO is Structured
Role-aware Policy Optimization, arXiv:2605.07274 (others share the acronym). Its formulas are not
public to us: the functional form added to its text is *ours*, and says so.

So a method is nothing but settings (`SETTINGS`), and any other mixture is a flag away:
`--method sapo --credit continuations`, say. This module knows no model and no environment. What it
needs of them it takes as functions. Left out: each paper's own KL term (--kl_coef puts k1 into the
reward under any method). SAPO's lambda is 0.99 in the paper, and 0.9 by default here.

Shapes: B responses, T token positions, as in sapo.py.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import sapo
from sapo import setting

# What a method changes in the settings. The paper runs PPO at lambda 0.95 and SAPO at 0.99 (here it
# is 0.9): a comparison that changes the unit and the horizon at once. --method ppo --lam 0.9 has
# SAPO's lambda; the unit, and with it ratio and clip, is what is left. A ratio that is a mean, over
# a segment or a response, moves less than a token's, so SAPO and GSPO have a narrower clip.
SETTINGS = {
    "sapo": {"clip_low": 0.04, "clip_high": 0.04},
    "ppo": {"cut": "token", "ratio": "token", "lam": 0.95},
    "vc-ppo": {
        "cut": "token",
        "ratio": "token",
        "lam": 0.99,
        "critic_lam": 1.0,
        "value_pretraining": 5,
    },
    "grpo": {"cut": "response", "credit": "group", "ratio": "token"},
    "gspo": {"cut": "response", "credit": "group", "clip_low": 3e-4, "clip_high": 4e-4},
    "srpo": {"cut": "response", "credit": "roles", "ratio": "token"},
    "spo-chain": {
        "cut": "low-prob",
        "credit": "continuations",
        "ratio": "token",
        "lam": 0.0,
        "average": "token",
        "loss_below": 0.9,
    },
    "vineppo": {"cut": "delimiter", "credit": "continuations", "ratio": "token", "lam": 0.0},
    "spo-tree": {"cut": "fixed", "credit": "tree", "ratio": "token", "average": "token"},
}


@dataclass
class Method:
    """Where segments come from, and where credit comes from: a method beside its SAPOConfig."""

    method: Literal[*SETTINGS] = setting(
        "sapo", "presets of the settings (baselines.py); flags beside it win"
    )
    cut: Literal[
        "topk", "causal", "delimiter", "low-prob", "fixed", "token", "turn", "response"
    ] = setting(
        "topk",
        "segments end at high entropy (topk of the response, or above last batch's threshold: "
        "causal), at a newline, ';' or closed tag, at improbable tokens, every --segment_tokens, "
        "everywhere, or at the end of a turn or response",
    )
    credit: Literal["critic", "group", "roles", "continuations", "tree"] = setting(
        "critic",
        "advantages: GAE on a critic, the group's mean, that times role weights, Monte-Carlo "
        "values, a tree",
    )
    group: int = setting(8, "group, roles: responses per prompt", "[2, inf)")
    continuations: int = setting(
        9, "continuations: responses sampled from each segment's start", "[1, 65536]"
    )
    segment_tokens: int = setting(10, "fixed, tree: tokens per segment", "[1, inf)")
    branching: list[int] = setting([4, 4, 4], "tree: children per level", "[1, inf)")
    tree_advantage: Literal["rloo", "grpo"] = setting(
        "rloo", "tree: V(child) - V(parent), or that over the spread"
    )
    loss_below: float = setting(
        1.0,
        "continuations: tokens at or above this probability leave the loss (SPO-chain: 0.9)",
        "(0, 1]",
    )
    role_temperature: float = setting(
        1.0, "roles: nats of the signal that change a weight e-fold; inf is GRPO", "(0, inf]"
    )
    value_pretraining: int = setting(
        0, "first iterations in which only the critic learns (VC-PPO)", "[0, inf)"
    )

    def __post_init__(self):
        sapo.check_settings(self)


def responses_per_prompt(method: Method) -> int:
    """How many responses of a batch answer one prompt: a group, a tree's leaves, or one."""
    if method.credit in ("group", "roles"):
        return method.group
    if method.credit == "tree":
        return math.prod(method.branching)  # at most: a branch may end early
    return 1


def check(settings, has_picture: bool, replies: bool = False) -> None:
    """ValueError if the batch does not divide into groups or trees, SRPO finds no picture, or a
    method cannot play a world that replies."""
    if replies and settings.credit in ("roles", "tree"):
        raise ValueError(
            f"--method {settings.method}: {settings.env} replies, and --credit {settings.credit} "
            "is for answers of one turn; choose --method sapo, ppo, vc-ppo, grpo, gspo, spo-chain "
            "or vineppo"
        )
    per_prompt = responses_per_prompt(settings)
    if settings.batch % per_prompt:
        raise ValueError(
            f"--batch {settings.batch}: --credit {settings.credit} needs a multiple of the "
            f"{per_prompt} responses to one prompt (--group, or --branching)"
        )
    if settings.credit == "roles" and not has_picture:
        raise ValueError(
            f"--method {settings.method}: {settings.env} has no picture, and SRPO weighs what was "
            "seen on one; choose an environment with a picture, or --method grpo"
        )


def check_numbers(settings, config: sapo.SAPOConfig) -> None:
    """ValueError for numbers that contradict each other in a run that is to be trained.

    A minibatch that nobody chose may be larger than the batch: then it is all of it. So may a
    method's own pre-training be longer than a run, which is then a trial of its parts.
    """
    if settings.credit == "tree":
        _check_room(settings)
        if max(settings.branching) == 1:
            raise ValueError(
                f"--branching {' '.join(map(str, settings.branching))}: no node has two children "
                "to compare, so every advantage would be 0; give a level more, such as 4 4 4"
            )
    if config.minibatch > settings.batch and config.minibatch != sapo.SAPOConfig.minibatch:
        raise ValueError(
            f"--minibatch {config.minibatch}: above --batch {settings.batch}, the responses that "
            "there are; lower it, or raise --batch"
        )
    minibatch = min(config.minibatch, settings.batch)
    if config.micro_batch > minibatch:
        raise ValueError(
            f"--micro_batch {config.micro_batch}: above the {minibatch} responses of a minibatch, "
            "of which it is a part; lower it, or give 0 for the whole minibatch"
        )
    pretraining = settings.value_pretraining
    if pretraining and settings.credit != "critic":
        raise ValueError(
            f"--value_pretraining {pretraining}: --credit {settings.credit} has no critic, and "
            "nothing would learn meanwhile; give 0, or --credit critic"
        )
    of_method = SETTINGS[settings.method].get("value_pretraining", 0)
    if 0 < settings.iterations <= pretraining != of_method:
        raise ValueError(
            f"--value_pretraining {pretraining}: not below --iterations {settings.iterations}, so "
            "the policy would never learn; lower it, or raise --iterations"
        )
    if settings.credit == "continuations" and config.value_at != "start":
        raise ValueError(
            f"--value_at {config.value_at}: --credit continuations samples values at the starts of "
            "segments alone; leave it out, or give --credit critic"
        )


def unread(settings, config: sapo.SAPOConfig) -> list[str]:
    """The settings that nothing reads beside these: who gives one expects what will not be."""
    credit, cut = settings.credit, settings.cut
    # Who goes on needs the start of training only under adapters, or for a KL penalty
    is_resumed_without = settings.resume and not settings.lora and not config.kl_coef
    warms_up = settings.model == "tiny" and not is_resumed_without
    is_read = {
        "lam gamma value_at": credit in ("critic", "continuations"),
        "critic_lam critic_lr critic_hears value_clip value_coef": credit == "critic",
        "critic": credit == "critic" and not settings.lora,
        "top_k": cut in ("topk", "causal"),
        "segment_tokens": cut == "fixed" or credit == "tree",
        "group": credit in ("group", "roles"),
        "role_temperature": credit == "roles",
        "continuations loss_below": credit == "continuations",
        "branching tree_advantage": credit == "tree",
        "warm_start_steps warm_start_batch warm_start_lr habits error_rate": warms_up,
    }
    return [name for names, read in is_read.items() if not read for name in names.split()]


def note(settings, config: sapo.SAPOConfig, given) -> str:
    """A line on what the command line gives and nothing reads: "" where there is nothing to say.

    given: the names of the settings that stand there.
    """
    flags = [f"--{name}" for name in unread(settings, config) if name in given]
    if not flags:
        return ""
    causes = ("method", "cut", "credit", "lora", "model", "resume")
    by = [f"--{name} {getattr(settings, name)}" for name in causes if name in given]
    return f"not read by {' '.join(by) or f'--method {settings.method}'}: {', '.join(flags)}"


# ----------------------------------------------------------------------------------- segments

# What parts the moves of a response: our tasks write ";" where prose has newlines
DELIMITERS = ("\n", ";", "</see>", "</think>")


def fixed_ends(mask: Tensor, tokens: int) -> Tensor:
    """Every `tokens`-th policy token ends a segment, and so do the always-ends.

    (B, T) -> bool (B, T). ValueError for fewer than 1 token.
    """
    if tokens < 1:
        raise ValueError(f"segment_tokens: {tokens}, expected at least 1")
    return (mask & (mask.cumsum(1) % tokens == 0)) | sapo.response_ends(mask)


def is_delimiter(texts: list[list[str]], mask: Tensor) -> Tensor:
    """The tokens whose text holds one of DELIMITERS. -> bool (B, T)."""
    marked = torch.zeros(mask.shape, dtype=torch.bool)
    for row, pieces in enumerate(texts):
        has_delimiter = [any(mark in piece for mark in DELIMITERS) for piece in pieces]
        marked[row, : len(pieces)] = torch.tensor(has_delimiter)
    return marked.to(mask.device)


def cut(
    name: str,
    mask: Tensor,
    entropy: Tensor,
    logp: Tensor,
    texts: list[list[str]],
    top_k: float = 0.30,
    threshold: float | None = None,
    segment_tokens: int = 10,
) -> Tensor:
    """The cut called `name` (see `Method.cut`) of responses.

    entropy, logp (B, T) in nats; texts: what each token of each response reads -> bool (B, T).
    ValueError for an unknown name.
    """
    if name == "topk":
        return sapo.entropy_ends(entropy, mask, top_k)
    if name == "causal":
        return sapo.threshold_ends(entropy, mask, threshold)
    if name == "delimiter":
        return sapo.delimiter_ends(is_delimiter(texts, mask), mask)
    if name == "low-prob":
        return sapo.low_prob_ends(logp, mask)
    if name == "fixed":
        return fixed_ends(mask, segment_tokens)
    if name == "token":
        return sapo.token_ends(mask)
    if name in ("turn", "response"):
        return sapo.response_ends(mask)
    raise ValueError(f"cut: {name!r}, expected one of those of Method.cut")


def restrict(
    rollout: sapo.Rollout, advantages: Tensor, loss_mask: Tensor | None
) -> tuple[sapo.Rollout, Tensor]:
    """The rollout and its advantages as a loss sees them that reads only some of the tokens.

    loss_mask (B, T) bool: SPO-chain's improbable tokens, or a tree's edges, each once; None means
    all tokens, and nothing changes. The credit is made before, from whole responses. What is left
    of a segment is no segment any more, so every token becomes one.
    """
    if loss_mask is None:
        return rollout, advantages
    ends = sapo.token_ends(loss_mask)
    return sapo.Rollout(loss_mask, ends, rollout.logp, rollout.rewards), advantages * loss_mask


# --------------------------------------------------------------------------------- GRPO, GSPO


def response_rewards(rollout: sapo.Rollout, config: sapo.SAPOConfig) -> Tensor:
    """R of each response: the sum of its rewards, less the KL penalty. -> (B,)."""
    rewards = sapo.penalised_rewards(rollout, config)
    whole = torch.zeros_like(rollout.mask)  # no end at all: a response is one segment, holes or not
    totals = sapo.segment_sum(rewards, whole, rollout.mask)  # (B, T), the same on each policy token
    first = rollout.mask.long().argmax(1, keepdim=True)  # (B, 1): the first policy token
    return totals.gather(1, first).squeeze(1)  # (B,)


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """GRPO's advantage within the group of responses to one prompt (arXiv:2402.03300).

        A = (R - mean) / (std + 1e-6)

    rewards (B,), one per response, groups of `group` side by side -> (B,). std has Bessel's
    correction; equal rewards give zeros. ValueError when B is 0 or not a multiple of `group`, or
    group is below 2.
    """
    if group < 2 or rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group:
        raise ValueError(
            f"group: {group} for rewards of shape {tuple(rewards.shape)}, expected (B,) with B a "
            "multiple of the group, and at least 2 responses per group"
        )
    grouped = rewards.view(-1, group)  # (B / group, group)
    grouped = grouped - grouped[:, :1]  # equal rewards become exact zeros, whatever their size
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


# --------------------------------------------------------------------------------------- SRPO


def perception(texts: list[list[str]], mask: Tensor) -> Tensor:
    """The tokens that say what is seen: all up to the one that closes the first `</see>`.

    None where nothing closes; the other policy tokens reason. texts: what each token of a response
    reads. -> bool (B, T).
    """
    perceives = torch.zeros_like(mask)
    for row, pieces in enumerate(texts):
        text = ""
        for t, piece in enumerate(pieces):
            text += piece
            if "</see>" in text:
                perceives[row, : t + 1] = True
                break
    return perceives & mask


def role_weights(
    signal: Tensor, mask: Tensor, temperature: float = 1.0, limit: float = 1.0
) -> Tensor:
    """SRPO's weights of a response's tokens: positive, of mean 1, larger where the signal is.

    The form is ours:

        w_t = exp(clip((signal_t - b) / temperature, -limit, limit)) / (its mean over the response)

    signal (B, T), nats: for a perception token how much its log-probability drops when the picture
    is corrupted; for a reasoning token how much it drops when the perception is hidden. Both roles
    share one baseline b, the response's mean signal. temperature in (0, inf]; inf gives ones, and
    so GRPO. -> (B, T), 0 off the mask. ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"role_temperature: {temperature}, expected a positive number, or inf for GRPO"
        )
    whole = torch.zeros_like(mask)  # no end at all: a response is one segment, also across holes
    centred = torch.where(mask, signal - sapo.segment_mean(signal, whole, mask), 0.0)
    weights = (centred / temperature).clamp(-limit, limit).exp()
    mean = sapo.segment_mean(weights, whole, mask).clamp(min=1e-30)  # not 0 off the mask
    return torch.where(mask, weights / mean, 0.0)


# ------------------------------------------------------------------------- SPO-chain, VinePPO


def continuation_values(ends: Tensor, mask: Tensor, settings, rewards_after: Callable) -> Tensor:
    """Monte-Carlo values: V(s_m) is the mean of what fresh continuations of the prefix before
    segment m earn (arXiv:2505.23564, arXiv:2410.01679).

    There are `settings.continuations` of each. `sapo.segment_gae` at lambda 0 turns the values into
    SPO's advantages: r_m + V(s_{m+1}) - V(s_m), where V after the last segment is 0.

    rewards_after(rows, positions)  continues response rows[k] after its first positions[k] tokens,
                                    for at most `settings.batch` of them at once; gives the reward
                                    that each earns from there on

    -> (B, T), read at segment starts and 0 elsewhere. ValueError for fewer than 1 continuation.
    """
    count = settings.continuations
    if count < 1:
        raise ValueError(f"continuations: {count}, expected at least 1")
    states = sapo.boundaries(ends, mask).nonzero()  # (K, 2): row, position
    rewards = []
    for part in states.repeat_interleave(count, 0).split(settings.batch):
        rewards += rewards_after(*part.unbind(1))
    values = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    per_state = torch.tensor(rewards, device=mask.device).view(-1, count)  # (K, count)
    values[states.unbind(1)] = per_state.mean(1)
    return values


# ----------------------------------------------------------------------------------- SPO-tree


@dataclass
class Tree:
    """Responses that share their beginnings. A node is a segment; a leaf ends a response.

    The prompts come first among the nodes, so a parent's number is smaller than its children's.
    """

    parent: list[int]  # the node before each node, or -1 for a prompt
    leaf: list[int]  # (B,): the last node of each row
    nodes: Tensor  # (B, T): the node that each token belongs to


@dataclass
class _Path:
    """A response in the making: from the prompt to a node."""

    node: int  # the last node
    tokens: list[int]
    nodes: list[int]  # the node of each token
    text: str


def grow(
    prompts: int, settings, write: Callable, ended: Callable
) -> tuple[Tensor, Tensor, Tensor, Tree]:
    """Grow a tree of responses from each prompt (SPO-tree, arXiv:2505.23564).

    A node gets `settings.branching[level]` children of `settings.segment_tokens` tokens each. The
    last level runs to the end of the response, at most `settings.max_new_tokens` in all.

    write(prompt, prefix, lengths, limit)   continues answers to prompt[k], the first lengths[k]
                                            tokens of prefix[k], by at most `limit` tokens; gives
                                            (tokens (K, N), mask (K, N), their texts)
    ended(text)                             is a response over?

    -> (prompt (B,), tokens (B, T), mask (B, T), tree): one row per leaf, in the order of the tree.
    ValueError for a tree without branches, or without room for its last level.
    """
    _check_room(settings)
    parent = [-1] * prompts  # of each node; grows with the tree
    leaves = []
    growing = [_Path(node, [], [], "") for node in range(prompts)]
    for level, children in enumerate(settings.branching):
        stems = [path for path in growing for _ in range(children)]
        is_last_level = level + 1 == len(settings.branching)
        if is_last_level:
            limit = settings.max_new_tokens - min(len(stem.tokens) for stem in stems)
        else:
            limit = settings.segment_tokens
        growing = []
        for path in _grow_level(stems, parent, limit, write):
            if is_last_level or ended(path.text):
                leaves.append(path)
            else:
                growing.append(path)
        if not growing:
            break
    leaves.sort(key=lambda path: _ancestors(path.node, parent))
    prompt_of_leaf = torch.tensor([_ancestors(path.node, parent)[0] for path in leaves])  # (B,)
    mask = _padded([[True] * len(path.tokens) for path in leaves]).bool()
    tree = Tree(parent, [path.node for path in leaves], _padded([path.nodes for path in leaves]))
    return prompt_of_leaf, _padded([path.tokens for path in leaves]), mask, tree


def _check_room(settings):
    """ValueError for a tree without branches, or without room for its last level."""
    branching, segment_tokens = settings.branching, settings.segment_tokens
    longest = settings.max_new_tokens
    is_tree = branching and min(branching) >= 1 and segment_tokens >= 1
    if not is_tree or segment_tokens * (len(branching) - 1) >= longest:
        raise ValueError(
            f"branching: {branching}, segment_tokens: {segment_tokens}; expected positive numbers, "
            f"such as 4 4 4, and room for the last level within max_new_tokens={longest}"
        )


def _grow_level(stems, parent, limit, write) -> list[_Path]:
    """One more segment, of at most `limit` tokens, on each stem. `parent` gets the new nodes."""
    prompt = torch.tensor([_ancestors(stem.node, parent)[0] for stem in stems])  # (K,)
    prefix = _padded([stem.tokens for stem in stems])  # (K, N)
    lengths = torch.tensor([len(stem.tokens) for stem in stems])  # (K,)
    tokens, mask, texts = write(prompt, prefix, lengths, limit)
    grown = []
    for stem, row, kept, pieces in zip(stems, tokens.cpu(), mask.cpu(), texts, strict=True):
        node = len(parent)
        parent.append(stem.node)
        added = row[kept].tolist()
        nodes = stem.nodes + [node] * len(added)
        grown.append(_Path(node, stem.tokens + added, nodes, stem.text + "".join(pieces)))
    return grown


def _padded(lists):
    """Lists of numbers -> long (B, T), zeros on the right."""
    rows = [torch.tensor(numbers, dtype=torch.long) for numbers in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _ancestors(node, parent):
    """The path from the prompt to a node, the node included."""
    path = []
    while node >= 0:
        path.append(node)
        node = parent[node]
    return path[::-1]


def tree_values(tree: Tree, rewards: Tensor) -> Tensor:
    """V of every node: a leaf's is its reward, another's the mean of its children's.

    rewards (B,) of the leaves -> float64 (nodes,).
    """
    values = torch.zeros(len(tree.parent), dtype=torch.float64)
    values[tree.leaf] = rewards.double().cpu()
    children = defaultdict(list)
    for node in reversed(range(len(tree.parent))):  # children before their parents
        if node in children:
            values[node] = values[children[node]].mean()
        children[tree.parent[node]].append(node)
    return values


def tree_advantages(tree: Tree, rewards: Tensor, kind: str = "rloo") -> Tensor:
    """A(node) = V(node) - V(parent) ("rloo"), or that over the siblings' spread ("grpo").

    The spread is the standard deviation of the siblings' values, with Bessel's correction, plus
    1e-6; an only child gets 0 either way. rewards (B,) of the leaves -> float64 (nodes,), 0 for the
    prompts. ValueError for another kind.
    """
    if kind not in ("rloo", "grpo"):
        raise ValueError(f"tree_advantage: {kind!r}, expected 'rloo' or 'grpo'")
    values = tree_values(tree, rewards)
    siblings = defaultdict(list)
    for node, parent in enumerate(tree.parent):
        if parent >= 0:
            siblings[parent].append(node)
    advantages = torch.zeros_like(values)
    for parent, nodes in siblings.items():
        difference = values[nodes] - values[parent]
        # Means of means round: what is that small is 0, an edge that the loss does not read
        difference[difference.abs() < 1e-9 * values.abs().max()] = 0.0
        if kind == "grpo":
            spread = difference.std() if len(nodes) > 1 else 0.0
            difference = difference / (spread + 1e-6)
        advantages[nodes] = difference
    return advantages


def tree_credit(
    tree: Tree, rewards: Tensor, mask: Tensor, kind: str = "rloo"
) -> tuple[Tensor, Tensor]:
    """Advantages of a tree's tokens, and the tokens that the loss reads. (B, T) each.

    Every edge is one training sample: the loss reads its tokens only in the first row that passes
    through it, and not at all if its advantage is 0. rewards (B,) of the leaves.
    """
    advantages = tree_advantages(tree, rewards, kind).to(mask.device, torch.float32)  # (nodes,)
    first_row = [-1] * len(tree.parent)
    for row, leaf in enumerate(tree.leaf):
        for node in _ancestors(leaf, tree.parent):
            if first_row[node] < 0:
                first_row[node] = row
    nodes = tree.nodes.to(mask.device)
    # the row that trains each token, (B, T)
    owner = torch.tensor(first_row, device=mask.device)[nodes]
    is_owner = owner == torch.arange(len(nodes), device=mask.device)[:, None]
    token_advantages = advantages[nodes]  # (B, T)
    return token_advantages * mask, mask & is_owner & (token_advantages != 0)
