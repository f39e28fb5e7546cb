"""sapo.py against the authors' released numbers, against plain loops, and held to its promises.

In this order: the released code's outputs, a loop for each function, what every function promises (errors, holes,
dtypes, no loop over tokens), the settings, the critic, the update. Identities are in test_properties.py.
"""

import json
import math
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sapo
from sapo import Rollout, SAPOConfig, SegmentCritic, sapo_update

close = torch.testing.assert_close
exact = partial(close, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- what the released code computes
CASES = json.loads((Path(__file__).parent / "released_public.json").read_text())["cases"]


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case['seed']}")
def released(request):
    """One released case: tensors (B, T) for lists of lists, its other settings, and the settings of `released()`."""
    case = {name: torch.tensor(x, dtype=torch.float64) if isinstance(x, list) else x
            for name, x in request.param.items()}
    case["mask"] = torch.arange(case["values"].shape[1]) < case["lengths"][:, None]
    config = SAPOConfig.released()
    for name in ("gamma", "lam", "top_k"):  # the random cases vary these
        setattr(config, name, case[name])
    config.kl_coef = 0.0  # the cases' rewards have their KL penalty in them
    return SimpleNamespace(**case, config=config)


def test_released_settings_are_those_of_the_cases(released):
    for name in ("clip_low", "clip_high", "dual_clip", "value_clip"):
        assert getattr(released.config, name) == getattr(released, name)


def test_released_functions(released):
    c, config, mask = released, released.config, released.mask
    same = lambda ours, theirs: close(torch.as_tensor(ours, dtype=torch.float64), torch.tensor(theirs).double(),
                                      rtol=0, atol=1e-6)
    on_mask = lambda x: x[mask].tolist()
    theirs = {name: torch.tensor(x, dtype=torch.float64) for name, x in c.out.items()}
    ends = sapo.entropy_ends(c.entropy, mask, config.top_k)
    advantages, returns = sapo.segment_gae(c.rewards, c.values, ends, mask, config.gamma, config.lam, config.value_at)
    advantages = sapo.whiten(advantages, mask).clamp(-config.advantage_clamp, config.advantage_clamp)
    same(advantages[mask], on_mask(theirs["advantages"]))
    same(returns[mask], on_mask(theirs["returns"]))

    ratio = sapo.segment_ratio(c.logp, c.old_logp, ends, mask)
    same(ratio.log()[mask], on_mask(theirs["segment_log_ratio"]))
    loss, stats = sapo.policy_loss(ratio, advantages, mask, config.clip_low, config.clip_high, config.dual_clip,
                                   config.average)
    same(loss, c.out["policy_loss"])
    same(stats["clip_fraction"], c.out["clip_fraction"])
    # What the released code logs as approximate KL is the mean of minus the log-ratio ("k1"): it can be negative, and
    # here it is, in most cases. Ours, from the same tokens, cannot.
    same(-ratio.log()[mask].mean(), c.out["approx_kl"])
    assert sapo.approx_kl(c.logp, c.old_logp, mask) >= 0

    loss, stats = sapo.value_loss(c.value_pred, returns, ends, mask, config.value_at, c.values, config.value_clip,
                                  config.average)
    same(config.value_coef * loss, c.out["value_loss"])  # their factor 0.5 is our value_coef
    same(stats["value_clip_fraction"], c.out["value_clip_fraction"])


def test_released_update(released):
    """The same numbers come out of `sapo_update`: it puts the pieces together in the released order."""
    c = released
    rollout = Rollout(c.mask, sapo.entropy_ends(c.entropy, c.mask, c.top_k), c.old_logp, c.rewards, c.values)
    logp, values = c.logp.clone().requires_grad_(), c.value_pred.clone().requires_grad_()
    [metrics] = sapo_update(rollout, lambda rows: (logp[rows], c.entropy[rows]), lambda rows: values[rows],
                            torch.optim.SGD([logp], lr=0), torch.optim.SGD([values], lr=0), c.config)
    for name in ("policy_loss", "clip_fraction", "value_loss", "value_clip_fraction"):
        assert metrics[name] == pytest.approx(c.out[name], abs=1e-6), name


# ------------------------------------------------------------------------------------------ a plain loop per function
def random_batch(seed, rows=8, tokens=10):
    """Responses of every kind: full, of one token, empty, with holes. The cut closes some of them, others not; in one
    an end stands at every hole too, which parts the segments around it and makes none of its own."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(rows, tokens, generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[:3] = torch.tensor([tokens, 1, 0])
    mask = torch.arange(tokens) < lengths[:, None]
    mask[4:] &= uniform()[4:] < 0.75
    ends = mask & (uniform() < 0.35)
    ends[5] |= ~mask[5]
    ends[::2] |= mask[::2] & ~torch.cat([mask[::2, 1:], torch.zeros_like(mask[::2, :1])], dim=1)
    numbers = {name: torch.randn(rows, tokens, dtype=torch.float64, generator=generator)
               for name in ("rewards", "values", "old_values", "x", "advantages", "returns")}
    old_logp = -3 * uniform().double()
    return SimpleNamespace(
        mask=mask, ends=ends, **numbers, old_logp=old_logp, entropy=(8 * uniform()).floor().double() / 4,  # with ties
        logp=old_logp + 0.4 * torch.randn(rows, tokens, dtype=torch.float64, generator=generator),
        ratio=torch.exp(0.5 * torch.randn(rows, tokens, dtype=torch.float64, generator=generator)),
        is_delimiter=uniform() < 0.3)


@pytest.fixture(params=range(12), ids=lambda seed: f"batch{seed}")
def batch(request):
    return random_batch(request.param)


def policy_tokens(mask):
    """For each response, the positions of its policy tokens."""
    return [[t for t, kept in enumerate(row) if kept] for row in mask.tolist()]


def always_ends(mask):
    """For each response, the policy tokens with no policy token right behind them."""
    return [[t for t in policy if t + 1 not in policy] for policy in policy_tokens(mask)]


def segments(ends, mask):
    """For each response its segments, each a list of positions of policy tokens."""
    found = []
    for row, policy in zip(ends.tolist(), policy_tokens(mask), strict=True):
        open_segment, closed = [], []
        for t in range(len(row)):
            if t in policy:
                open_segment.append(t)
            if row[t]:
                closed, open_segment = [*closed, open_segment], []
        found.append([z for z in [*closed, open_segment] if z])
    return found


def cut_of(positions, mask):
    ends = torch.zeros_like(mask)
    for b, row in enumerate(positions):
        for t in row:
            ends[b, t] = True
    return ends


def filled(segment_values, ends, mask, off=0.0):
    """(B, T): what `segment_values(b, segments)` gives for each segment, on its tokens; `off` elsewhere."""
    out = torch.full(mask.shape, off, dtype=torch.float64)
    for b, zs in enumerate(segments(ends, mask)):
        for z, value in zip(zs, segment_values(b, zs), strict=True):
            for t in z:
                out[b, t] = value
    return out


@pytest.mark.parametrize("banned", [(), (1,), (0, 2, 3)])
def test_token_entropy_is_the_sum(banned):
    logits = 3 * torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[..., list(banned)] = -math.inf
    entropy = sapo.token_entropy(logits)
    assert entropy.shape == (4, 5)
    for i, j in product(range(4), range(5)):
        weights = [math.exp(x) for x in logits[i, j].tolist()]
        p = [w / sum(weights) for w in weights]
        assert entropy[i, j].item() == pytest.approx(-sum(x * math.log(x) for x in p if x > 0))


def test_token_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf], [5.0] + 3 * [-math.inf]])
    close(sapo.token_entropy(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    assert sapo.token_entropy(torch.zeros(3, 8, dtype=torch.bfloat16)).dtype == torch.float32
    logits = logits.clone().requires_grad_()
    sapo.token_entropy(logits).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [1e-12, 0.1, 0.28, 0.3, 0.5, 1.0])
def test_entropy_ends_takes_the_first_of_the_ranking(batch, top_k):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_tokens(batch.mask)):
        ranked = sorted(policy, key=lambda t: (-batch.entropy[b, t].item(), t))
        expected[b] += ranked[:max(1, math.ceil(top_k * len(policy) - 1e-9))]
    assert torch.equal(sapo.entropy_ends(batch.entropy, batch.mask, top_k), cut_of(expected, batch.mask))


def test_entropy_ends_counts_like_arithmetic_not_like_floats():
    """0.28 * 25 is 7.000000000000001 to a computer; seven tokens are 28% of 25."""
    entropy, mask = -torch.arange(25.0)[None], torch.ones(1, 25, dtype=torch.bool)
    assert sapo.entropy_ends(entropy, mask, 0.28)[0].nonzero()[:, 0].tolist() == [*range(7), 24]
    assert sapo.entropy_ends(entropy, mask, 0.2801)[0].nonzero()[:, 0].tolist() == [*range(8), 24]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.75, 1.0, math.inf])
def test_threshold_ends_compares_each_token(batch, threshold):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_tokens(batch.mask)):
        expected[b] += [t for t in policy if batch.entropy[b, t] > threshold]
    assert torch.equal(sapo.threshold_ends(batch.entropy, batch.mask, threshold), cut_of(expected, batch.mask))


@pytest.mark.parametrize("top_k", [1e-6, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_entropy_quantile_lets_the_share_pass(batch, top_k, dtype):
    generator = torch.Generator().manual_seed(0)
    distinct = 0.1 * torch.randperm(batch.mask.numel(), generator=generator).to(dtype).view(batch.mask.shape)
    policy = [distinct[b, t].item() for b, row in enumerate(policy_tokens(batch.mask)) for t in row]
    threshold = sapo.entropy_quantile(distinct, batch.mask, top_k)
    assert isinstance(threshold, float)
    wanted = math.ceil(top_k * len(policy) - 1e-9)
    assert sum(h > threshold for h in policy) == wanted
    above = cut_of([[t for t in row if distinct[b, t].item() >= sorted(policy)[-wanted]]
                    for b, row in enumerate(policy_tokens(batch.mask))], batch.mask)
    cut = sapo.threshold_ends(distinct, batch.mask, threshold)
    assert torch.equal(cut, above | sapo.response_ends(batch.mask))  # nothing is lost between a float and the dtype


def test_delimiter_token_and_response_ends(batch):
    mask, always = batch.mask, always_ends(batch.mask)
    marked = [[t for t in policy if batch.is_delimiter[b, t]] for b, policy in enumerate(policy_tokens(mask))]
    both = [x + y for x, y in zip(marked, always, strict=True)]
    assert torch.equal(sapo.delimiter_ends(batch.is_delimiter, mask), cut_of(both, mask))
    assert torch.equal(sapo.token_ends(mask), cut_of(policy_tokens(mask), mask))
    assert torch.equal(sapo.response_ends(mask), cut_of(always, mask))


@pytest.mark.parametrize(("threshold", "every"), [(0.9, 5), (0.9, 1), (0.3, 2), (1.0, 3)])
def test_low_prob_ends_counts_the_unlikely_tokens(batch, threshold, every):
    expected = always_ends(batch.mask)
    for b, policy in enumerate(policy_tokens(batch.mask)):
        unlikely = [t for t in policy if math.exp(batch.old_logp[b, t]) < threshold]
        expected[b] += unlikely[every - 1::every]
    assert torch.equal(sapo.low_prob_ends(batch.old_logp, batch.mask, threshold, every), cut_of(expected, batch.mask))


def test_segment_index_counts_the_ends_before(batch):
    index = sapo.segment_index(batch.ends)
    assert index.dtype == torch.long
    for b, row in enumerate(batch.ends.tolist()):
        assert index[b].tolist() == [sum(row[:t]) for t in range(len(row))]


@pytest.mark.parametrize("wrong", [torch.ones(3, dtype=torch.bool), torch.ones(2, 3), torch.ones(0, 3) > 0])
def test_segment_index_needs_a_cut(wrong):
    with pytest.raises(ValueError, match=r"^ends\b"):
        sapo.segment_index(wrong)


def test_segment_sum_and_mean(batch):
    ends, mask, x = batch.ends, batch.mask, batch.x.tolist()
    total = lambda b, z: sum(x[b][t] for t in z)
    exact(sapo.segment_sum(batch.x, ends, mask), filled(lambda b, zs: [total(b, z) for z in zs], ends, mask))
    exact(sapo.segment_mean(batch.x, ends, mask), filled(lambda b, zs: [total(b, z) / len(z) for z in zs], ends, mask))


@pytest.mark.parametrize("value_at", ["start", "end"])
def test_boundaries_are_first_or_last_tokens(batch, value_at):
    read = [[z[0] if value_at == "start" else z[-1] for z in zs] for zs in segments(batch.ends, batch.mask)]
    assert torch.equal(sapo.boundaries(batch.ends, batch.mask, value_at), cut_of(read, batch.mask))


@pytest.mark.parametrize("value_at", ["start", "end"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.99), (1.0, 1.0), (0.9, 0.0), (0.8, 0.7), (0.0, 1.0)])
def test_segment_gae_is_the_sum_over_later_deltas(batch, gamma, lam, value_at):
    rewards, values = batch.rewards.tolist(), batch.values.tolist()

    def value(b, z):
        return values[b][z[0] if value_at == "start" else z[-1]]

    def advantage(b, zs):
        v = [value(b, z) for z in zs] + [0.0]
        delta = [sum(rewards[b][t] for t in z) + gamma * v[m + 1] - v[m] for m, z in enumerate(zs)]
        return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[m:])) for m in range(len(zs))]

    def the_return(b, zs):
        return [a + value(b, z) for a, z in zip(advantage(b, zs), zs, strict=True)]

    advantages, returns = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, gamma, lam, value_at)
    exact(advantages, filled(advantage, batch.ends, batch.mask))
    exact(returns, filled(the_return, batch.ends, batch.mask))


@pytest.mark.parametrize("scale", [1.0, 100.0])  # at 100 the clamp of single log-ratios to +-20 bites
def test_segment_ratio_is_the_geometric_mean(batch, scale):
    logp, old = (scale * batch.logp).tolist(), (scale * batch.old_logp).tolist()

    def ratio(b, zs):
        return [math.exp(sum(max(-20, min(20, logp[b][t] - old[b][t])) for t in z) / len(z)) for z in zs]

    ours = sapo.segment_ratio(scale * batch.logp, scale * batch.old_logp, batch.ends, batch.mask)
    exact(ours, filled(ratio, batch.ends, batch.mask, off=1.0))


def mean_of(terms, average):
    """Of each response first, then of all responses; or of all tokens. An empty response counts as 0."""
    if average == "response":
        return sum(sum(row) / max(len(row), 1) for row in terms) / len(terms)
    return sum(map(sum, terms)) / sum(map(len, terms))


@pytest.mark.parametrize("average", ["response", "token"])
@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.1, 0.1)])
def test_policy_loss_term_by_term(batch, average, dual_clip, low, high):
    objective, clipped = [], []
    for b, policy in enumerate(policy_tokens(batch.mask)):
        row, row_clipped = [], []
        for t in policy:
            s, a = batch.ratio[b, t].item(), batch.advantages[b, t].item()
            best = min(s * a, min(max(s, 1 - low), 1 + high) * a)
            row_clipped.append(float(best < s * a))
            if dual_clip is not None and a < 0:
                best = max(best, dual_clip * a)
            row.append(best)
        objective, clipped = [*objective, row], [*clipped, row_clipped]
    loss, stats = sapo.policy_loss(batch.ratio, batch.advantages, batch.mask, low, high, dual_clip, average)
    assert loss.item() == pytest.approx(-mean_of(objective, average), abs=1e-12)
    assert stats["clip_fraction"] == pytest.approx(mean_of(clipped, "token"))


@pytest.mark.parametrize("average", ["response", "token"])
@pytest.mark.parametrize("value_clip", [None, 0.5])
@pytest.mark.parametrize("value_at", ["start", "end"])
def test_value_loss_term_by_term(batch, average, value_clip, value_at):
    errors, clipped = [], []
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        row, row_clipped = [], []
        for z in zs:
            t = z[0] if value_at == "start" else z[-1]
            v, old, r = (x[b, t].item() for x in (batch.values, batch.old_values, batch.returns))
            kept = v if value_clip is None else min(max(v, old - value_clip), old + value_clip)
            row.append(max((v - r) ** 2, (kept - r) ** 2))
            row_clipped.append(float((kept - r) ** 2 > (v - r) ** 2))
        errors, clipped = [*errors, row], [*clipped, row_clipped]
    loss, stats = sapo.value_loss(batch.values, batch.returns, batch.ends, batch.mask, value_at, batch.old_values,
                                  value_clip, average)
    assert loss.item() == pytest.approx(mean_of(errors, average))
    assert stats["value_clip_fraction"] == pytest.approx(mean_of(clipped, "token"))


def test_whiten_is_bessels(batch):
    policy = [(b, t) for b, row in enumerate(policy_tokens(batch.mask)) for t in row]
    x = [batch.x[b, t].item() for b, t in policy]
    mean = sum(x) / len(x)
    variance = sum((y - mean) ** 2 for y in x) / (len(x) - 1)
    expected = torch.zeros_like(batch.x)
    for (b, t), y in zip(policy, x, strict=True):
        expected[b, t] = (y - mean) / math.sqrt(variance + 1e-8)
    exact(sapo.whiten(batch.x, batch.mask), expected)


def test_whiten_adds_1e_8_under_the_root():
    x = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)  # variance 2e-8
    exact(sapo.whiten(x, torch.ones(1, 2, dtype=torch.bool)), x / math.sqrt(3e-8))


def test_whiten_without_spread():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1e8, 1e8, math.nan], [1e8, 5.0, -math.inf]])
    for few in (mask, mask & False, mask & torch.tensor([[True, False, False], [False] * 3])):
        assert torch.equal(sapo.whiten(x, few), torch.zeros(2, 3))


def test_approx_kl_token_by_token(batch):
    terms = []
    for b, policy in enumerate(policy_tokens(batch.mask)):
        d = [(batch.logp[b, t] - batch.old_logp[b, t]).item() for t in policy]
        terms.append([math.exp(x) - 1 - x for x in d])
    assert sapo.approx_kl(batch.logp, batch.old_logp, batch.mask) == pytest.approx(mean_of(terms, "token"))
    assert sapo.approx_kl(batch.logp, batch.old_logp, batch.mask & False) == 0


# ---------------------------------------------------------------------------------------- what every function promises
TENSORS = {  # function -> its (B, T) arguments, the mask last; `value_clip` comes along so that old_values are read
    "entropy_ends": ("entropy", "mask"),
    "threshold_ends": ("entropy", "mask"),
    "entropy_quantile": ("entropy", "mask"),
    "delimiter_ends": ("is_delimiter", "mask"),
    "low_prob_ends": ("logp", "mask"),
    "token_ends": ("mask",),
    "response_ends": ("mask",),
    "segment_sum": ("x", "ends", "mask"),
    "segment_mean": ("x", "ends", "mask"),
    "segment_gae": ("rewards", "values", "ends", "mask"),
    "whiten": ("x", "mask"),
    "segment_ratio": ("logp", "old_logp", "ends", "mask"),
    "approx_kl": ("logp", "old_logp", "mask"),
    "policy_loss": ("ratio", "advantages", "mask"),
    "value_loss": ("values", "returns", "old_values", "ends", "mask"),
}
OPTIONS = {"threshold_ends": {"threshold": 0.9}, "value_loss": {"value_clip": 0.5}}
BOOLEAN = ("mask", "ends", "is_delimiter")
FLOAT_ARGUMENTS = [(f, name) for f, names in TENSORS.items() for name in names if name not in BOOLEAN]
DIFFERENTIABLE = {"segment_sum": ("x",), "segment_mean": ("x",), "whiten": ("x",), "segment_gae": ("rewards", "values"),
                  "segment_ratio": ("logp", "old_logp"), "policy_loss": ("ratio", "advantages"),
                  "value_loss": ("values", "returns")}
every_function = pytest.mark.parametrize("function", TENSORS)


def arguments(function, batch, **changed):
    return {name: getattr(batch, name) for name in TENSORS[function]} | OPTIONS.get(function, {}) | changed


def call(function, batch, **changed):
    return getattr(sapo, function)(**arguments(function, batch, **changed))


def tensors_of(result):
    return [torch.as_tensor(x) for x in tree_leaves(result)]


@every_function
def test_arguments_stay_as_they_were(function):
    given = arguments(function, random_batch(0))
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    result = getattr(sapo, function)(**given)
    for name, x in before.items():
        assert torch.equal(given[name], x), name
    for out in tensors_of(result):  # nor is the result a view, through which they could be changed later
        assert all(out.data_ptr() != given[name].data_ptr() for name in before)


@pytest.mark.parametrize(("function", "name"), FLOAT_ARGUMENTS)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_what_stands_off_the_mask_never_matters(function, name, rubbish):
    """Neither in the values nor in the gradients: in a model's output, padding and banned tokens hold anything."""
    batch = random_batch(1)
    weights = torch.randn(batch.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outcomes, slopes = [], []
    for filler in (None, rubbish):
        given = {x: getattr(batch, x).clone() for x in TENSORS[function]}
        if filler is not None:
            given[name] = given[name].masked_fill(~batch.mask, filler)
        learned = [given[x].requires_grad_() for x in DIFFERENTIABLE.get(function, ())]
        result = tensors_of(call(function, batch, **given))
        outcomes.append([x.detach() for x in result])
        if learned:
            total = sum((x * weights if x.dim() else x).sum() for x in result if x.requires_grad)
            slopes.append(torch.autograd.grad(total, learned))
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*outcomes, strict=True))
    for clean, dirty in zip(*slopes or ((), ()), strict=True):  # of each argument, whichever holds the rubbish
        assert clean.any() and torch.equal(clean, dirty) and not clean[~batch.mask].any()


def test_banned_off_the_mask_on_both_sides():
    """Where old and new log-probability are both -inf, the difference is NaN: off the mask nobody asks."""
    batch = random_batch(2)
    logp, old_logp = (x.masked_fill(~batch.mask, -math.inf) for x in (batch.logp, batch.old_logp))
    for function in ("segment_ratio", "approx_kl"):
        expected = call(function, batch)
        assert tensors_of(call(function, batch, logp=logp, old_logp=old_logp))[0].equal(tensors_of(expected)[0])
    logp.requires_grad_()
    call("segment_ratio", batch, logp=logp, old_logp=old_logp).sum().backward()
    assert logp.grad.isfinite().all() and not logp.grad[~batch.mask].any()


@pytest.mark.parametrize(("function", "name"), FLOAT_ARGUMENTS)
def test_nan_on_a_policy_token_is_refused(function, name):
    batch = random_batch(3)
    broken = getattr(batch, name).clone()
    broken[0, 4] = math.nan
    with pytest.raises(ValueError, match=rf"^{name}\b.*NaN.*\[0, 4\]"):
        call(function, batch, **{name: broken})


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, names in TENSORS.items() for n in names if n != "mask"])
def test_wrong_shapes_are_refused(function, name):
    batch = random_batch(3)
    x = getattr(batch, name)
    for wrong in (x[:, :-1], x[:-1], x[0], x[..., None], x[:, :1]):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            call(function, batch, **{name: wrong})


@every_function
def test_masks_of_wrong_shape_or_type_are_refused(function):
    batch = random_batch(3)
    for wrong in (batch.mask[0], batch.mask[..., None], batch.mask.long(), batch.mask.double()):
        with pytest.raises(ValueError, match=r"^mask\b"):
            call(function, batch, mask=wrong)


@every_function
def test_an_empty_batch_is_refused(function):
    batch = random_batch(3)
    for part in ((slice(0), slice(None)), (slice(None), slice(0))):
        with pytest.raises(ValueError, match=r"^mask\b"):
            call(function, batch, **{name: getattr(batch, name)[part] for name in TENSORS[function]})


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, names in TENSORS.items() for n in names
                                                if n in ("ends", "is_delimiter")])
def test_cuts_must_be_bool(function, name):
    batch = random_batch(3)
    for wrong in (getattr(batch, name).long(), getattr(batch, name).double()):
        with pytest.raises(ValueError, match=rf"^{name}\b.*bool"):
            call(function, batch, **{name: wrong})


@pytest.mark.parametrize(("function", "name", "wrong"), [
    *product(["entropy_ends", "entropy_quantile"], ["top_k"], [0.0, -0.1, 1.001, 30, math.nan]),
    *product(["segment_gae"], ["gamma", "lam"], [-0.01, 1.01, math.nan, math.inf]),
    *product(["segment_gae", "value_loss"], ["value_at"], ["middle", None]),
    *product(["policy_loss", "value_loss"], ["average"], ["batch", None]),
    *product(["policy_loss"], ["dual_clip"], [1.0, 0.5, math.nan]),
    *product(["low_prob_ends"], ["threshold"], [0.0, 1.1, math.nan]),
    ("low_prob_ends", "every", 0), ("threshold_ends", "threshold", math.nan),
    ("value_loss", "old_values", None),
])
def test_settings_out_of_range_are_refused(function, name, wrong):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call(function, random_batch(3), **{name: wrong})


def test_quantile_needs_a_policy_token():
    batch = random_batch(3)
    with pytest.raises(ValueError, match=r"^mask\b"):
        sapo.entropy_quantile(batch.entropy, batch.mask & False)


@pytest.mark.parametrize("function", [f for f in TENSORS if f != "entropy_quantile"])
def test_batches_without_policy_tokens_give_nothing(function):
    """0 everywhere, False everywhere, a loss of 0; the ratio is 1."""
    batch = random_batch(4)
    empty = batch.mask & False
    changed = {"mask": empty} | ({"ends": empty} if "ends" in TENSORS[function] else {})
    for out in tensors_of(call(function, batch, **changed)):
        assert torch.equal(out, torch.full_like(out, function == "segment_ratio"))


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype(function, dtype):
    batch = random_batch(5)
    rounded = {name: x.to(dtype) for name in TENSORS[function] if (x := getattr(batch, name)).is_floating_point()}
    found = tensors_of(call(function, batch, **rounded))
    expected = tensors_of(call(function, batch, **{name: x.double() for name, x in rounded.items()}))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(found, expected, strict=True):
        close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_sums_of_half_precision_are_made_in_single():
    """In bfloat16 256 + 1 is 256: a long segment's sum would stop growing."""
    mask = torch.ones(1, 4097, dtype=torch.bool)
    ones = torch.ones(1, 4097, dtype=torch.bfloat16)
    ends = sapo.response_ends(mask)
    assert sapo.segment_sum(ones, ends, mask)[0, 0].item() == 4097
    assert sapo.segment_gae(ones, 0 * ones, ends, mask)[1][0, 0].item() == 4097
    assert sapo.policy_loss(ones, ones, mask)[0] == -1
    assert sapo.value_loss(ones, 0 * ones, mask, mask)[0] == 1


class Counter(TorchDispatchMode):
    """Counts the operations that reach PyTorch, and remembers the largest result of any."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@every_function
def test_no_loop_over_responses_or_tokens(function):
    """As many operations for 2 x 8 tokens as for 32 x 64, both in two segments; none with more than B T numbers."""
    counts = []
    for rows, tokens in ((2, 8), (32, 64)):
        batch = random_batch(6, rows=8, tokens=8)
        stretch = lambda x, rows=rows, tokens=tokens: x[:1].repeat(rows, tokens // 8)
        batch = SimpleNamespace(**{name: stretch(x) for name, x in vars(batch).items()})
        batch.mask = torch.ones_like(batch.mask)
        batch.ends = sapo.response_ends(batch.mask)
        batch.ends[:, 3] = True
        with Counter() as counter:
            call(function, batch)
        counts.append(counter.operations)
        assert counter.largest <= rows * tokens
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------------------- settings and critic
def test_defaults_are_the_papers_mathematics():
    """Table 7 and the equations; only the learning rates differ, and the small KL term."""
    paper, default = vars(SAPOConfig.paper()), vars(SAPOConfig())
    assert {name for name in paper if paper[name] != default[name]} == {"actor_lr", "critic_lr", "kl_coef"}
    expected = {"gamma": 1.0, "lam": 0.99, "top_k": 0.3, "value_at": "start", "ratio": "segment", "minibatch": 128,
                "average": "response", "dual_clip": None, "whiten_advantages": False, "advantage_clamp": math.inf,
                "value_clip": None, "value_coef": 1.0, "kl_coef": 0.001, "actor_lr": 1e-6, "critic_lr": 2e-6}
    assert {name: paper[name] for name in expected} == expected
    assert paper["clip_low"] == paper["clip_high"]  # 1 +- eps


def test_released_departs_from_the_paper_as_listed():
    paper, released = vars(SAPOConfig.paper()), vars(SAPOConfig.released())
    assert {name: x for name, x in released.items() if x != paper[name]} == {
        "value_at": "end", "average": "token", "clip_high": 0.28, "dual_clip": 3.0, "whiten_advantages": True,
        "advantage_clamp": 5.0, "value_clip": 0.5, "value_coef": 0.5}
    assert released["clip_low"] == 0.2


def test_every_setting_says_what_it_means():
    for field in SAPOConfig.__dataclass_fields__.values():
        assert len(field.metadata["help"]) > 10, field.name


class Backbone(nn.Module):
    """Hidden states from token ids, as a tensor or as transformers models give them."""

    def __init__(self, as_object, dtype=torch.float32):
        super().__init__()
        self.table, self.as_object = nn.Embedding(6, 4, dtype=dtype), as_object
        text = SimpleNamespace(hidden_size=4)
        self.config = SimpleNamespace(text_config=text, get_text_config=lambda: text)

    def forward(self, ids, scale=1.0):
        hidden = scale * self.table(ids)
        return SimpleNamespace(last_hidden_state=hidden) if self.as_object else hidden


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_critic(as_object, dtype):
    critic, ids = SegmentCritic(Backbone(as_object, dtype)), torch.tensor([[0, 1, 2], [3, 4, 5]])
    values = critic(ids, scale=2.0)
    assert values.shape == (2, 3) and values.dtype == torch.float32 and not values.any()  # zero before training
    values.sum().backward()
    assert critic.head.weight.grad.any() and critic.head.bias.grad.item() == 6  # the head moves first,
    assert not critic.backbone.table.weight.grad.any()                          # as it blocks the way while zero
    with torch.no_grad():
        critic.head.weight += 0.5
        critic.head.bias += 1
    values = critic(ids, scale=2.0)
    exact(values, 2.0 * critic.backbone.table(ids).float().sum(-1) * 0.5 + 1)
    values.sum().backward()
    assert critic.backbone.table.weight.grad.all()


def test_critic_of_a_given_width_and_type():
    critic = SegmentCritic(nn.Embedding(6, 3), hidden_size=3).to(torch.bfloat16)  # all of it, the head too
    assert critic(torch.tensor([[1, 2]])).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------- the update
def free_numbers(seed=0, **fields):
    """The smallest learner: a rollout, and a free number per token as log-probability and as value, both to learn."""
    b = random_batch(seed)
    keep = [0, 1, 3, 4, 5, 6, 7, 2]  # the empty response last
    part = {name: x[keep] for name, x in vars(b).items()}
    fields = {"mask": part["mask"], "ends": part["ends"] | sapo.response_ends(part["mask"]), "logp": part["old_logp"],
              "rewards": part["rewards"], "values": part["values"]} | fields
    learner = SimpleNamespace(rollout=Rollout(**fields), entropy=part["entropy"],
                              logp=part["logp"].clone().requires_grad_(),
                              values=part["old_values"].clone().requires_grad_())
    learner.score = lambda rows: (learner.logp[rows], learner.entropy[rows])
    learner.value = lambda rows: learner.values[rows]
    learner.optimizers = (torch.optim.SGD([learner.logp], lr=2.0), torch.optim.SGD([learner.values], lr=3.0))
    return learner


def update(learner, config, seed=0, **options):
    return sapo_update(learner.rollout, learner.score, learner.value, *learner.optimizers, config,
                       torch.Generator().manual_seed(seed), **options)


CONFIGS = {"paper": SAPOConfig.paper(), "released": SAPOConfig.released(),
           "token ratio": SAPOConfig(ratio="token", average="token", value_clip=0.1, advantage_clamp=0.5)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_update_by_hand(config):
    """Two epochs are: credit once, from the rollout; then two steps down the losses. The cut is never made again."""
    config = SAPOConfig(**vars(config) | {"epochs": 2, "max_grad_norm": 0.05})
    learner, byhand = free_numbers(), free_numbers()
    r, mask = byhand.rollout, byhand.rollout.mask
    advantages, returns = sapo.segment_gae(r.rewards, r.values, r.ends, mask, config.gamma, config.lam, config.value_at)
    if config.whiten_advantages:
        advantages = sapo.whiten(advantages, mask)
    advantages = advantages.clamp(-config.advantage_clamp, config.advantage_clamp)
    unit = r.ends if config.ratio == "segment" else mask
    expected = []
    for _ in range(2):
        ratio = sapo.segment_ratio(byhand.logp, r.logp, unit, mask)
        policy, stats = sapo.policy_loss(ratio, advantages, mask, config.clip_low, config.clip_high, config.dual_clip,
                                         config.average)
        value, value_stats = sapo.value_loss(byhand.values, returns, r.ends, mask, config.value_at, r.values,
                                             config.value_clip, config.average)
        expected.append({"policy_loss": policy.item(), "value_loss": config.value_coef * value.item(),
                         "ratio": ratio[mask].mean().item(), "entropy": byhand.entropy[mask].mean().item(),
                         "approx_kl": sapo.approx_kl(byhand.logp, r.logp, mask), **stats, **value_stats})
        (policy + config.value_coef * value).backward()
        for x, rate, name in ((byhand.logp, 2.0, "policy"), (byhand.values, 3.0, "value")):
            norm = x.grad.norm().item()
            expected[-1][f"{name}_grad_norm"] = norm
            x.data -= rate * x.grad * min(1, config.max_grad_norm / norm)
            x.grad = None

    history = update(learner, config)
    close(learner.logp, byhand.logp, rtol=0, atol=1e-6)
    close(learner.values, byhand.values, rtol=0, atol=1e-6)
    assert len(history) == 2
    for epoch, by_hand in zip(history, expected, strict=True):
        for name, x in by_hand.items():
            assert epoch[name] == pytest.approx(x, rel=1e-5, abs=1e-7), name
        assert epoch["skipped_steps"] == epoch["skipped_in_a_row"] == 0


def test_metrics_by_hand():
    """What a practitioner watches, from plain loops; advantages as they are before whitening."""
    learner = free_numbers()
    r, config = learner.rollout, SAPOConfig(whiten_advantages=True, advantage_clamp=0.1, lam=0.9)
    learner.logp.data.copy_(r.logp)  # the first step of the first epoch: the policy is still the one that sampled
    [metrics] = update(learner, config)
    advantages, returns = sapo.segment_gae(r.rewards, r.values, r.ends, r.mask, lam=0.9)
    a = [advantages[b, t].item() for b, row in enumerate(policy_tokens(r.mask)) for t in row]
    zs = segments(r.ends, r.mask)
    count = sum(map(len, zs))
    expected = {"ratio": 1.0, "clip_fraction": 0.0, "approx_kl": 0.0, "advantage_mean": sum(a) / len(a),
                "segments_per_response": count / len(zs), "tokens_per_segment": len(a) / count}
    expected["advantage_std"] = math.sqrt(sum((x - expected["advantage_mean"]) ** 2 for x in a) / len(a))
    reads = [(b, z[0]) for b, row in enumerate(zs) for z in row]
    variance = lambda x: sum((y - sum(x) / len(x)) ** 2 for y in x) / len(x)
    of_returns = [returns[b, t].item() for b, t in reads]
    left = [returns[b, t].item() - r.values[b, t].item() for b, t in reads]
    expected["explained_variance"] = 1 - variance(left) / variance(of_returns)
    for name, x in expected.items():
        assert metrics[name] == pytest.approx(x, abs=1e-12), name
    assert set(metrics) == {*expected, "policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm", "entropy",
                            "value_clip_fraction", "skipped_steps", "skipped_in_a_row"}
    assert all(math.isfinite(x) for x in metrics.values())


def test_explained_variance_of_known_critics():
    """1 for a critic that knows every return, 0 for one that says the same everywhere and where nothing varies."""
    learner = free_numbers()
    r, config = learner.rollout, SAPOConfig(lam=1.0)
    _, returns = sapo.segment_gae(r.rewards, r.values, r.ends, r.mask, lam=1.0)
    for values, expected in ((returns, 1.0), (0 * returns + 7, 0.0)):
        r.values = values
        assert sapo.credit(r, config)[2]["explained_variance"] == pytest.approx(expected, abs=1e-9)
    r.rewards = 0 * r.rewards
    assert sapo.credit(r, config)[2]["explained_variance"] == 0


@pytest.mark.parametrize("average", ["response", "token"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_micro_batches_change_memory_not_numbers(average, micro_batch):
    """Neither the parameters nor the metrics; with ragged responses, an empty one, and steps of 6 and of 2."""
    whole, split = free_numbers(), free_numbers()
    config = {"average": average, "epochs": 2, "minibatch": 6, "value_clip": 0.5, "max_grad_norm": 0.1}
    expected = update(whole, SAPOConfig(**config))
    found = update(split, SAPOConfig(**config, micro_batch=micro_batch))
    close(split.logp, whole.logp, rtol=0, atol=1e-6)
    close(split.values, whole.values, rtol=0, atol=1e-6)
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("average", ["response", "token"])
def test_a_minibatch_without_policy_tokens_is_no_failure(average):
    """An empty response, alone in its minibatch: nothing to learn, nothing to skip."""
    learner = free_numbers()
    [metrics] = update(learner, SAPOConfig(average=average, minibatch=1))
    assert metrics["skipped_steps"] == 0


def test_each_epoch_sees_every_response_once_in_a_new_order():
    learner, seen = free_numbers(), []
    score = learner.score
    learner.score = lambda rows: seen.append(rows.tolist()) or score(rows)
    config = SAPOConfig(epochs=3, minibatch=3)
    update(learner, config, seed=1)
    assert [len(rows) for rows in seen] == [3, 3, 2] * 3
    epochs = [sum(seen[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    update(learner, config, seed=1)
    assert seen[9:] == seen[:9]  # the generator decides, and nothing else


def test_the_rollout_is_left_alone():
    learner = free_numbers(ref_logp=random_batch(9).logp)
    before = {name: x.clone() for name, x in vars(learner.rollout).items() if x is not None}
    update(learner, SAPOConfig.released())
    for name, x in before.items():
        assert torch.equal(getattr(learner.rollout, name), x), name


def test_kl_to_the_reference_goes_into_the_reward():
    """k1: each token pays kl_coef (log pi_old - log pi_ref); a segment pays for its tokens."""
    learner = free_numbers()
    r = learner.rollout
    r.ref_logp = torch.where(r.mask, random_batch(9).logp, math.nan)  # off the mask a reference may say anything
    advantages, returns, _ = sapo.credit(r, SAPOConfig(kl_coef=0.3, lam=1.0))

    def to_go(b, zs):
        paid = [sum((r.rewards[b, t] - 0.3 * (r.logp[b, t] - r.ref_logp[b, t])).item() for t in z) for z in zs]
        return [sum(paid[m:]) for m in range(len(zs))]

    exact(returns, filled(to_go, r.ends, r.mask))
    exact(advantages, returns - filled(lambda b, zs: [r.values[b, z[0]] for z in zs], r.ends, r.mask))


def test_given_advantages_need_no_critic():
    """GRPO's way: one advantage per response, token ratio, no values; the critic's metrics are absent, not zero."""
    learner = free_numbers(values=None)
    r = learner.rollout
    r.advantages = torch.where(r.mask, torch.arange(8.0, dtype=torch.float64)[:, None] - 3, math.nan)
    start, learner.value, learner.optimizers = learner.logp.detach().clone(), None, (learner.optimizers[0], None)
    [metrics] = update(learner, SAPOConfig(ratio="token", clip_low=99, clip_high=99, max_grad_norm=math.inf))
    assert not {"value_loss", "value_grad_norm", "explained_variance"} & set(metrics)
    assert metrics["advantage_mean"] == pytest.approx(r.advantages[r.mask].mean().item())
    step = torch.zeros_like(start)  # J = mean over responses of the mean over tokens of s_t A; SGD's rate is 2
    for b, policy in enumerate(policy_tokens(r.mask)):
        for t in policy:
            step[b, t] = 2 * math.exp(start[b, t] - r.logp[b, t]) * r.advantages[b, t] / len(policy) / 8
    close(learner.logp.detach(), start + step)


def broken(learner, how, when=lambda call: True):
    """Let the learner's policy fail in one of the ways models fail, at those calls of `score` that `when` picks."""
    score, calls = learner.score, []

    def failing(rows):
        logp, entropy = score(rows)
        calls.append(rows)
        if when(len(calls) - 1):
            if how == "NaN log-probability":
                logp = logp + math.nan
            elif how == "infinite loss":  # two log-ratios at the clamp: e^20 times an advantage of 1e308
                logp = logp + 1e9
            elif how == "NaN gradient":
                logp = logp + (0 * logp).sqrt()  # the number is right, its slope 0 * inf
            elif how == "infinite gradient":
                logp = logp + 0 * logp
                logp.register_hook(lambda gradient: gradient * math.inf)
        return logp, entropy

    learner.score = failing
    return learner


FAILURES = ["NaN log-probability", "infinite loss", "NaN gradient", "infinite gradient"]


def unrewarded(how):
    """A learner whose policy always fails in this way."""
    learner = broken(free_numbers(), how)
    if how == "infinite loss":
        learner.rollout.rewards = learner.rollout.rewards - 1e305
    learner.optimizers = (torch.optim.Adam([learner.logp]), torch.optim.Adam([learner.values]))
    return learner


@pytest.mark.parametrize("how", FAILURES)
def test_a_step_that_is_not_finite_is_skipped_and_counted(how):
    learner = unrewarded(how)
    before = learner.logp.detach().clone()
    [metrics] = update(learner, SAPOConfig())
    assert torch.equal(learner.logp.detach(), before)      # bit for bit
    assert not learner.optimizers[0].state[learner.logp]   # Adam's moments did not see it either
    assert learner.logp.grad is None                       # and nothing is left for the next step to trip over
    assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == 1


@pytest.mark.parametrize("how", FAILURES)
def test_three_in_a_row_stop_the_run(how):
    learner = unrewarded(how)
    with pytest.raises(FloatingPointError, match="three minibatches in a row"):
        update(learner, SAPOConfig(minibatch=2))


def test_three_in_a_row_across_calls():
    learner, skipped = unrewarded("NaN gradient"), 0
    for call_number in range(2):
        [metrics] = update(learner, SAPOConfig(), skipped_in_a_row=skipped)
        skipped = metrics["skipped_in_a_row"]
        assert skipped == call_number + 1
    with pytest.raises(FloatingPointError):
        update(learner, SAPOConfig(), skipped_in_a_row=skipped)


def test_a_good_step_ends_the_row():
    """Of four minibatches the first, the second and the last fail: three, but not in a row."""
    learner = broken(free_numbers(), "NaN gradient", when=lambda call: call in (0, 1, 3))
    before = learner.logp.detach().clone()
    [metrics] = update(learner, SAPOConfig(minibatch=2))
    assert metrics["skipped_steps"] == 3 and metrics["skipped_in_a_row"] == 1
    assert not torch.equal(learner.logp.detach(), before) and learner.logp.isfinite().all()
    assert all(math.isfinite(x) for x in metrics.values())  # means over the steps that were taken


def test_one_bad_micro_batch_spoils_the_step():
    """The gradients of the good parts are dropped with it: half a minibatch is another one."""
    learner = broken(free_numbers(), "NaN log-probability", when=lambda call: call == 2)
    before = learner.logp.detach().clone()
    [metrics] = update(learner, SAPOConfig(micro_batch=2))
    assert torch.equal(learner.logp.detach(), before) and metrics["skipped_steps"] == 1


def test_a_critic_that_fails_is_counted_too():
    learner = free_numbers()
    learner.value = lambda rows: learner.values[rows] * math.nan
    before = learner.values.detach().clone()
    [metrics] = update(learner, SAPOConfig())
    assert torch.equal(learner.values.detach(), before) and metrics["skipped_steps"] == 1


def test_a_rollout_that_is_wrong_is_an_error_not_a_skip():
    """Only a *model* may give NaN; a rollout with one, or without what the method needs, is a mistake to be told."""
    spoil = lambda x: x.masked_fill(torch.arange(80).view(8, 10) == 4, math.nan)  # on a policy token
    for name in ("rewards", "logp", "values"):
        learner = free_numbers()
        setattr(learner.rollout, name, spoil(getattr(learner.rollout, name)))
        with pytest.raises(ValueError, match=name):
            update(learner, SAPOConfig())
    for advantages in (None, spoil(free_numbers().rollout.rewards), torch.ones(8, 1)):
        learner = free_numbers(values=None, advantages=advantages)
        learner.value = None
        with pytest.raises(ValueError, match="values|advantages"):
            update(learner, SAPOConfig())


def test_a_wrong_shape_is_an_error_not_a_skip():
    learner = free_numbers()
    learner.score = lambda rows: (learner.logp[rows][:, :-1], learner.entropy[rows])
    with pytest.raises(ValueError, match=r"^logp\b"):
        update(learner, SAPOConfig())


# ------------------------------------------------------------------------------------------------- does it learn, then?
class Adding(nn.Module):
    """A task small enough to enumerate: write three digits below 6, the third the sum of the others modulo 6.

    Policy and critic are tables with a row per prefix: 1 empty, 6 of one digit, 36 of two."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Embedding.from_pretrained(torch.zeros(43, 6), freeze=False)
        self.critic = SegmentCritic(nn.Embedding(43, 8), hidden_size=8)
        nn.init.normal_(self.critic.backbone.weight, generator=self.generator)

    @staticmethod
    def prefixes(y):
        """tokens (B, 3) -> the row of the prefix before each of them, (B, 3)."""
        return torch.stack([0 * y[:, 0], 1 + y[:, 0], 7 + 6 * y[:, 0] + y[:, 1]], dim=1)

    def score(self, y):
        logits = self.logits(self.prefixes(y))  # (B, 3, 6)
        return logits.log_softmax(-1).gather(-1, y[..., None])[..., 0], sapo.token_entropy(logits)

    @torch.no_grad()
    def expected_reward(self):
        y = torch.tensor([(a, b, (a + b) % 6) for a in range(6) for b in range(6)])
        return self.score(y)[0].sum(1).exp().sum().item()

    @torch.no_grad()
    def rollout(self, responses, cut):
        y = torch.zeros(responses, 3, dtype=torch.long)
        for t in range(3):
            p = self.logits(self.prefixes(y))[:, t].softmax(-1)
            y[:, t] = torch.multinomial(p, 1, generator=self.generator)[:, 0]
        mask, (logp, entropy), rewards = torch.ones_like(y, dtype=torch.bool), self.score(y), torch.zeros(responses, 3)
        rewards[:, 2] = ((y[:, 0] + y[:, 1]) % 6 == y[:, 2]).float()
        return y, Rollout(mask, cut(entropy, mask), logp, rewards, self.critic(self.prefixes(y)))


@pytest.mark.parametrize("cut", ["entropy", "threshold"])
def test_sapo_learns_to_add(cut):
    """From 1/6, by chance, to nearly always right, and the critic comes to know how good a prefix is."""
    model = Adding(seed=0)
    ends = {"entropy": sapo.entropy_ends, "threshold": lambda h, mask: sapo.threshold_ends(h, mask, 1.0)}[cut]
    optimizers = [torch.optim.Adam(m.parameters(), lr=lr) for m, lr in ((model.logits, 0.1), (model.critic, 0.02))]
    config = SAPOConfig(epochs=2, minibatch=64, max_grad_norm=10.0)
    assert model.expected_reward() == pytest.approx(1 / 6)
    for _ in range(40):
        y, rollout = model.rollout(128, ends)
        history = sapo_update(rollout, lambda rows, y=y: model.score(y[rows]),
                              lambda rows, y=y: model.critic(model.prefixes(y[rows])), *optimizers, config,
                              model.generator)
    assert model.expected_reward() > 0.8
    assert history[-1]["entropy"] < math.log(6) and history[-1]["clip_fraction"] < 0.5
