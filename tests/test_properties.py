"""What must hold for every input: the identities of the paper, as Hypothesis properties of the functions of sapo.py.

Each test's first line says its identity in the paper's terms. `SAPO_EXAMPLES=1000 python -m pytest` looks harder.
"""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import averages, batches, discounts, masks, numbers, seeds, shares, sides, tensors

import sapo

close = torch.testing.assert_close  # float64: relative 1e-7, absolute 1e-7
exact = lambda a, b: close(a, b, rtol=1e-9, atol=1e-9)


def segments(ends, mask):
    """The segments of each response, as lists of positions of policy tokens; in the order of the text."""
    responses = []
    for row_ends, row_mask in zip(ends.tolist(), mask.tolist(), strict=True):
        found = [[]]
        for t, (end, policy) in enumerate(zip(row_ends, row_mask, strict=True)):
            found[-1] += [t] * policy
            found += [[]] * end
        responses.append([z for z in found if z])
    return responses


def read_at(segment, value_at):
    """The position at which V(s_m) is read."""
    return segment[0] if value_at == "start" else segment[-1]


# ------------------------------------------------------------------------------------------ the cut (Eq. 5 and Eq. 11)
@given(st.data(), masks(), shares)
def test_entropy_cut_has_the_promised_number_of_ends(data, mask, top_k):
    """max(1, ceil(k n)) tokens of highest entropy end a segment, besides those that always do; ties: the earlier."""
    coarse = st.integers(0, 5).map(float)  # so that ties are common
    entropy = data.draw(tensors(*mask.shape, coarse))
    ends, always = sapo.entropy_ends(entropy, mask, top_k), sapo.response_ends(mask)
    for b, row in enumerate(mask.tolist()):
        policy = [t for t, kept in enumerate(row) if kept]
        ranked = sorted(policy, key=lambda t: (-entropy[b, t].item(), t))
        top = set(ranked[:max(1, math.ceil(top_k * len(policy) - 1e-9))])
        assert set(ends[b].nonzero()[:, 0].tolist()) == top | set(always[b].nonzero()[:, 0].tolist())


@given(st.data(), masks(), shares)
def test_entropy_cut_knows_only_the_order_of_the_entropies(data, mask, top_k):
    """A strictly increasing function of H_t (of all H_t alike) leaves the cut where it is."""
    entropy = data.draw(tensors(*mask.shape, st.integers(0, 40).map(lambda n: n / 8)))
    expected = sapo.entropy_ends(entropy, mask, top_k)
    for increasing in (torch.exp, torch.atan, lambda h: 3 * h - 7, lambda h: h**3 + h):
        assert torch.equal(sapo.entropy_ends(increasing(entropy), mask, top_k), expected)


@given(batches("entropy"), shares, shares)
def test_entropy_cut_refines_as_top_k_grows(batch, k, more):
    """Every end at k% is an end at more than k%: a larger share splits segments, it moves none of their ends."""
    coarse, fine = (sapo.entropy_ends(batch.entropy, batch.mask, share) for share in sorted((k, more)))
    assert not (coarse & ~fine).any()


@given(batches("entropy", "future"), numbers, st.integers(1, 7))
def test_threshold_cut_is_causal(batch, threshold, t):
    """Whether y_t ends a segment depends on H_t alone: what comes later may change, the cut up to there does not."""
    changed = torch.where(torch.arange(batch.mask.shape[1]) < t, batch.entropy, batch.future)
    before, after = (sapo.threshold_ends(h, batch.mask, threshold) for h in (batch.entropy, changed))
    assert torch.equal(before[:, :t], after[:, :t])


def test_entropy_cut_is_not_causal():
    """The paper's cut ranks the whole response: a later token's entropy moves an earlier end. The causal cut stays."""
    mask, calm = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[1.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    agitated = torch.tensor([[1.0, 2.0, 1.0, 9.0, 9.0, 0.0]])
    assert not torch.equal(sapo.entropy_ends(calm, mask)[:, :3], sapo.entropy_ends(agitated, mask)[:, :3])
    assert torch.equal(sapo.threshold_ends(calm, mask, 1.5)[:, :3], sapo.threshold_ends(agitated, mask, 1.5)[:, :3])


@given(batches("entropy"), shares)
def test_entropy_quantile_cuts_the_promised_share(batch, top_k):
    """Of N policy tokens ceil(k N) exceed the quantile; with ties, fewer, but never more."""
    assume(batch.mask.any())
    h = batch.entropy[batch.mask]
    exceed, wanted = (h > sapo.entropy_quantile(batch.entropy, batch.mask, top_k)).sum().item(), top_k * len(h) - 1e-9
    assert exceed <= math.ceil(wanted)
    assert exceed == math.ceil(wanted) or len(h.unique()) < len(h)


@given(batches("entropy"), st.data(), shares)
def test_every_cut_closes_a_response_and_stays_on_the_mask(batch, data, top_k):
    """e_M = T (Eq. 5): the last policy token, and the last one before a hole, end a segment under every cut."""
    mask, delimiter = batch.mask, data.draw(tensors(*batch.mask.shape, st.booleans()))
    always = sapo.response_ends(mask)
    for ends in (sapo.entropy_ends(batch.entropy, mask, top_k), sapo.threshold_ends(batch.entropy, mask, 0.5),
                 sapo.delimiter_ends(delimiter, mask), sapo.low_prob_ends(batch.entropy, mask), sapo.token_ends(mask)):
        assert ends.dtype == torch.bool and not (ends & ~mask).any() and not (always & ~ends).any()


@given(batches())
def test_segments_part_the_response(batch):
    """y = z_1 || ... || z_M (Eq. 5): numbered from 0 in the order of the text, the number grows by one after an end."""
    index = sapo.segment_index(batch.ends)
    assert (index[:, 0] == 0).all()
    assert torch.equal(index.diff(dim=1), batch.ends[:, :-1].long())


@given(batches("x"))
def test_segment_mean_is_a_projection(batch):
    """A segment's mean is constant on it: averaging again changes nothing, and the response's sum is kept."""
    mean = sapo.segment_mean(batch.x, batch.ends, batch.mask)
    exact(sapo.segment_mean(mean, batch.ends, batch.mask), mean)
    exact(mean.sum(1), (batch.x * batch.mask).sum(1))


# ------------------------------------------------------------------------------------------- advantages (Eq. 6 and 7)
@given(batches("rewards", "values", cut="token", holes=False), discounts, discounts, sides)
def test_one_token_per_segment_is_ppo(batch, gamma, lam, value_at):
    """SAPO with one token per segment *is* PPO: segment GAE is token GAE (Eq. 4), wherever V is read."""
    advantages, _ = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, gamma, lam, value_at)
    expected = torch.zeros_like(batch.values)
    for b, length in enumerate(batch.mask.sum(1).tolist()):
        running = next_value = 0.0
        for t in reversed(range(length)):
            running = batch.rewards[b, t] + gamma * next_value - batch.values[b, t] + gamma * lam * running
            expected[b, t], next_value = running, batch.values[b, t]
    exact(advantages, expected)


@given(batches("logp", "old_logp", cut="token"))
def test_one_token_per_segment_gives_the_token_ratio(batch):
    """SAPO with one token per segment *is* PPO: the segment ratio (Eq. 8) is the token ratio (Eq. 2)."""
    ratio = sapo.segment_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask)
    exact(ratio[batch.mask], (batch.logp - batch.old_logp).exp()[batch.mask])


@given(batches("rewards", "values", cut="response", holes=False), discounts, discounts)
def test_one_segment_gives_return_minus_value(batch, gamma, lam):
    """With M = 1, A = R - V(s_1) for every lambda and gamma: a critic-baselined sequence-level method."""
    advantages, returns = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, gamma, lam)
    total = (batch.rewards * batch.mask).sum(1, keepdim=True)
    exact(advantages, torch.where(batch.mask, total - batch.values[:, :1], 0.0))
    exact(returns, torch.where(batch.mask, total, 0.0))


@given(batches("rewards", "values"), sides)
def test_lambda_one_telescopes(batch, value_at):
    """With gamma = lambda = 1 the deltas telescope: A_m = (rewards from z_m on) - V(s_m), and R_m is that sum."""
    advantages, returns = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, 1.0, 1.0, value_at)
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        for m, z in enumerate(zs):
            to_go = sum(batch.rewards[b, t] for z_later in zs[m:] for t in z_later)
            exact(returns[b, z], to_go.expand(len(z)))
            exact(advantages[b, z], (to_go - batch.values[b, read_at(z, value_at)]).expand(len(z)))


@given(batches("rewards", "values"), discounts, sides)
def test_lambda_zero_gives_the_td_error(batch, gamma, value_at):
    """With lambda = 0, A_m = delta_m = r_m + gamma V(s_{m+1}) - V(s_m), where V after the last segment is 0."""
    advantages, _ = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, gamma, 0.0, value_at)
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        v = [batch.values[b, read_at(z, value_at)] for z in zs] + [0.0]
        for m, z in enumerate(zs):
            delta = batch.rewards[b, z].sum() + gamma * v[m + 1] - v[m]
            exact(advantages[b, z], delta.expand(len(z)))


@given(batches("rewards", "more", "values"), discounts, discounts, sides, numbers)
def test_advantages_are_linear_in_the_rewards(batch, gamma, lam, value_at, c):
    """A(r + c r', V) = A(r, V) + c A(r', 0), and A(0, V) + A(r, 0) = A(r, V): Eq. 6 and 7 are linear."""
    gae = lambda r, v: sapo.segment_gae(r, v, batch.ends, batch.mask, gamma, lam, value_at)[0]
    nothing = torch.zeros_like(batch.values)
    exact(gae(batch.rewards + c * batch.more, batch.values),
          gae(batch.rewards, nothing) + gae(nothing, batch.values) + c * gae(batch.more, nothing))


@given(batches("rewards", "values"), discounts, discounts, sides)
def test_returns_are_advantages_plus_values_and_both_are_constant_on_a_segment(batch, gamma, lam, value_at):
    """R_m = A_m + V(s_m) (Eq. 7), and every token of z_m gets A_m; 0 off the mask."""
    advantages, returns = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, gamma, lam, value_at)
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        for z in zs:
            exact(returns[b, z], (advantages[b, z[0]] + batch.values[b, read_at(z, value_at)]).expand(len(z)))
            assert len(advantages[b, z].unique()) == 1
    assert not advantages[~batch.mask].any() and not returns[~batch.mask].any()


@given(batches("rewards", "values"), st.data())
def test_with_lambda_one_later_cuts_do_not_matter(batch, data):
    """With gamma = lambda = 1 a segment's advantage is blind to how the rest of the response is cut."""
    t = data.draw(st.integers(0, batch.mask.shape[1] - 1))
    rows = batch.mask[:, t]  # in which a segment ends at t, in both cuts
    other = data.draw(tensors(*batch.mask.shape, st.booleans())) & batch.mask
    other[:, :t], other[:, t], batch.ends[:, t] = batch.ends[:, :t], rows, rows
    one, two = (sapo.segment_gae(batch.rewards, batch.values, ends, batch.mask, 1.0, 1.0)[0]
                for ends in (batch.ends, other))
    exact(one[rows, :t + 1], two[rows, :t + 1])


# --------------------------------------------------------------------------------------------- ratio (Eq. 8 and 19-26)
@given(batches("logp"))
def test_ratio_is_one_on_policy(batch):
    """pi = pi_old: every segment's ratio is exactly 1, on the mask and off it."""
    assert (sapo.segment_ratio(batch.logp, batch.logp.clone(), batch.ends, batch.mask) == 1).all()


@given(batches("old_logp", "shift"), st.data())
def test_ratio_is_invariant_to_splitting_a_segment_of_equal_log_ratios(batch, data):
    """Where a segment's tokens have equal log-ratios, the geometric mean is theirs: a further cut changes nothing."""
    logp = batch.old_logp + sapo.segment_mean(batch.shift, batch.ends, batch.mask)
    finer = batch.ends | data.draw(tensors(*batch.mask.shape, st.booleans())) & batch.mask
    exact(sapo.segment_ratio(logp, batch.old_logp, batch.ends, batch.mask),
          sapo.segment_ratio(logp, batch.old_logp, finer, batch.mask))


@given(batches("logp", "old_logp"))
def test_ratio_is_a_geometric_mean(batch):
    """s_m to the power |z_m| is the product of the token ratios, so s_m lies between the least and the greatest."""
    ratio = sapo.segment_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask)
    token = (batch.logp - batch.old_logp).exp()
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        for z in zs:
            close(ratio[b, z] ** len(z), token[b, z].prod().expand(len(z)))
            assert token[b, z].min() - 1e-9 <= ratio[b, z[0]] <= token[b, z].max() + 1e-9


@given(batches("logp", "old_logp"))
def test_ratio_of_the_reverse_is_the_reciprocal(batch):
    """Swapping pi and pi_old inverts every ratio."""
    there = sapo.segment_ratio(batch.logp, batch.old_logp, batch.ends, batch.mask)
    exact(there * sapo.segment_ratio(batch.old_logp, batch.logp, batch.ends, batch.mask), torch.ones_like(there))


@given(st.lists(st.floats(-0.5, 0.5, allow_subnormal=False), min_size=1, max_size=12))
def test_bias_of_the_geometric_mean_is_bounded(log_ratios):
    """|R - R~| <= e^(L |mu|) (L - 1) |mu| (Eq. 26): R the product of a segment's token ratios, R~ the segment ratio."""
    d = torch.tensor([log_ratios], dtype=torch.float64)
    mask, length, mu = torch.ones_like(d, dtype=torch.bool), d.shape[1], d.mean().item()
    ratio = sapo.segment_ratio(d, torch.zeros_like(d), sapo.response_ends(mask), mask)[0, 0].item()
    bound = math.exp(length * abs(mu)) * (length - 1) * abs(mu)
    assert abs(d.sum().exp().item() - ratio) <= bound * (1 + 1e-9) + 1e-12


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.data())
def test_mean_of_approx_kl_is_the_exact_kl(counts, data):
    """E under pi_old of e^d - 1 - d is KL(pi_old || pi): on tokens in pi_old's proportions it is that very number."""
    logits = torch.tensor(data.draw(st.lists(numbers, min_size=len(counts), max_size=len(counts))), dtype=torch.float64)
    log_old, log_new = (torch.tensor(counts).double() / sum(counts)).log(), logits.log_softmax(0)
    tokens = torch.tensor([[v for v, n in enumerate(counts) for _ in range(n)]])  # token v stands there n_v times
    estimate = sapo.approx_kl(log_new[tokens], log_old[tokens], torch.ones_like(tokens, dtype=torch.bool))
    assert estimate == pytest.approx((log_old.exp() * (log_old - log_new)).sum().item(), abs=1e-9)


@given(batches("logp", "old_logp"))
def test_approx_kl_is_never_negative(batch):
    """Every single term e^d - 1 - d is >= 0, and 0 only at pi = pi_old: the estimate's sign is never wrong."""
    kl = sapo.approx_kl(batch.logp, batch.old_logp, batch.mask)
    apart = (batch.logp - batch.old_logp)[batch.mask].abs().amax().item() if batch.mask.any() else 0.0
    assert kl >= 0 and sapo.approx_kl(batch.logp, batch.logp, batch.mask) == 0
    assert kl > 0 or apart < 1e-6


# --------------------------------------------------------------------------------------------- losses (Eq. 9, 10, 13)
@given(batches("log_ratio", "advantages"), averages)
def test_clipped_objective_is_a_lower_bound(batch, average):
    """min(s A, clip(s) A) <= s A for either sign of A: clipping only takes hope away. Dual clip gives some back."""
    ratio, per_token = batch.log_ratio.exp(), {}
    for name, options in {"clipped": {}, "dual": {"dual_clip": 1.5}, "free": {"clip_low": 99, "clip_high": 99}}.items():
        per_token[name] = -sapo.policy_loss(ratio, batch.advantages, batch.mask, average=average, **options)[0]
    assert per_token["clipped"] <= per_token["free"] + 1e-9
    assert per_token["clipped"] <= per_token["dual"] + 1e-9


@given(st.floats(0.01, 9), numbers)
@example(5.0, -1.0)  # A < 0 far above the clip: the objective must keep falling, there is nothing to clip
@example(5.0, 1.0)
@example(0.1, -1.0)
@example(0.1, 1.0)
def test_clip_stops_only_the_rewarding_direction(ratio, advantage):
    """A > 0: s is capped at 1 + eps; A < 0: floored at 1 - eps. In the other direction the objective follows s A."""
    one = lambda x: torch.tensor([[x]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = sapo.policy_loss(one(ratio), one(advantage), mask, 0.2, 0.28)
    seen = min(ratio, 1.28) if advantage > 0 else max(ratio, 0.8)
    assert loss.item() == pytest.approx(-seen * advantage)
    assert stats["clip_fraction"] == (seen != ratio and abs(advantage) > 0)


@given(batches("logits", "advantages"), averages, seeds)
def test_gradient_at_ratio_one_is_equation_13(batch, average, seed):
    """grad J = sum over t of s_m A_m (1/|z_m|) sum over i in z_m of grad log pi(y_i) (Eq. 13): autograd and formula."""
    (rows, tokens), generator = batch.mask.shape, torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens, 5, dtype=torch.float64, generator=generator).requires_grad_()
    taken = torch.randint(5, (rows, tokens), generator=generator)
    logp = logits.log_softmax(-1).gather(-1, taken[..., None])[..., 0]
    advantages = sapo.segment_mean(batch.advantages, batch.ends, batch.mask)  # one number per segment
    loss, _ = sapo.policy_loss(sapo.segment_ratio(logp, logp.detach(), batch.ends, batch.mask), advantages, batch.mask,
                               average=average)
    loss.backward()

    score = torch.nn.functional.one_hot(taken, 5) - logits.detach().softmax(-1)  # grad log pi of a categorical
    expected = torch.zeros_like(logits)
    policy_tokens = batch.mask.sum(1).tolist()
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        weight = 1 / (rows * policy_tokens[b]) if average == "response" and zs else 1 / max(sum(policy_tokens), 1)
        for z in zs:
            for _ in z:  # each of the segment's tokens pulls at all of them
                expected[b, z] += weight * advantages[b, z[0]] / len(z) * score[b, z]
    exact(-logits.grad, expected)


@given(batches("values", "returns", "old_values"), sides, averages, st.floats(0.01, 2))
def test_value_clip_only_adds_loss(batch, value_at, average, value_clip):
    """The clipped loss is the larger of two errors: never below Eq. 10, and equal to it for a critic that stayed."""
    loss = lambda old, clip: sapo.value_loss(batch.values, batch.returns, batch.ends, batch.mask, value_at, old, clip,
                                             average)[0]
    assert loss(batch.old_values, value_clip) >= loss(None, None) - 1e-12
    exact(loss(batch.values, value_clip), loss(None, None))


@given(batches("rewards", "values"), sides, averages)
def test_value_loss_is_zero_exactly_at_the_returns(batch, value_at, average):
    """Eq. 10 is 0 where V(s_m) = R_m, whatever V is at positions nobody reads."""
    _, returns = sapo.segment_gae(batch.rewards, batch.values, batch.ends, batch.mask, value_at=value_at)
    perfect = batch.values.clone()
    for b, zs in enumerate(segments(batch.ends, batch.mask)):
        for z in zs:
            perfect[b, read_at(z, value_at)] = returns[b, z[0]]
    assert sapo.value_loss(perfect, returns, batch.ends, batch.mask, value_at, average=average)[0] == 0


@given(batches("x"), st.floats(0.5, 3), numbers)
def test_whitening(batch, scale, shift):
    """Zero mean, unit variance over the mask; blind to the scale and the origin of advantages."""
    white, count = sapo.whiten(batch.x, batch.mask), batch.mask.sum().item()
    assert white.isfinite().all() and not white[~batch.mask].any()
    assume(count > 1 and batch.x[batch.mask].std() > 0.1)  # else the 1e-8 under the root is felt
    assert white[batch.mask].mean().abs() < 1e-9
    assert white[batch.mask].std().item() == pytest.approx(1, abs=1e-5)
    close(sapo.whiten(scale * batch.x + shift, batch.mask), white, rtol=1e-5, atol=1e-5)


@given(masks(), st.floats(-1e30, 1e30))
def test_whitening_nothing_is_finite(mask, level):
    """No spread, no advantage: equal tokens, a single one or none give zeros, never NaN."""
    assert not sapo.whiten(torch.full(mask.shape, level, dtype=torch.float64), mask).any()


# ------------------------------------------------------------------------------------ what must not matter, end to end
def learn(batch, value_at="start", average="response", gamma=0.9, lam=0.9):
    """Everything that a batch teaches: the cut, both losses, and their gradients at each token."""
    logp, critic = batch.logp.clone().requires_grad_(), batch.critic.clone().requires_grad_()
    ends = batch.ends & sapo.entropy_ends(batch.entropy, batch.mask) | sapo.threshold_ends(batch.entropy, batch.mask, 1)
    advantages, returns = sapo.segment_gae(batch.rewards, batch.values, ends, batch.mask, gamma, lam, value_at)
    ratio = sapo.segment_ratio(logp, batch.old_logp, ends, batch.mask)
    policy, _ = sapo.policy_loss(ratio, sapo.whiten(advantages, batch.mask), batch.mask, dual_clip=3, average=average)
    value, _ = sapo.value_loss(critic, returns, ends, batch.mask, value_at, batch.values, 0.5, average)
    (policy + value).backward()
    return {"policy": policy.detach(), "value": value.detach(), "ends": ends, "advantages": advantages,
            "returns": returns, "ratio": ratio.detach() - 1, "logp": logp.grad, "critic": critic.grad}


FIELDS = ("entropy", "rewards", "values", "critic", "logp", "old_logp")


def change(batch, function):
    return type(batch)(**{name: function(x) for name, x in vars(batch).items()})


@given(batches(*FIELDS), sides, averages, st.integers(1, 3), numbers)
def test_padding_does_not_matter(batch, value_at, average, extra, filler):
    """Columns of padding, whatever stands in them, change no number and get no gradient."""
    T = batch.mask.shape[1]
    fill = lambda x: torch.full((len(x), extra), filler, dtype=x.dtype)
    pad = lambda x: torch.cat([x, torch.zeros_like(fill(x)) if x.dtype == torch.bool else fill(x)], dim=1)
    plain, padded = learn(batch, value_at, average), learn(change(batch, pad), value_at, average)
    for name, x in plain.items():
        exact(padded[name][:, :T] if x.dim() else padded[name], x)
        assert not x.dim() or not padded[name][:, T:].any()


@given(batches(*FIELDS), sides, averages, st.randoms(use_true_random=False))
def test_order_of_the_batch_does_not_matter(batch, value_at, average, random):
    """Permuting the responses permutes what each is taught."""
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    plain, permuted = learn(batch, value_at, average), learn(change(batch, lambda x: x[order]), value_at, average)
    for name, x in plain.items():
        exact(permuted[name], x[order] if x.dim() else x)


@given(batches("logp", "values", "advantages", "returns"), averages, st.integers(1, 3))
def test_micro_batches_do_not_matter(batch, average, size):
    """Losses of parts, weighted by the responses or the tokens (the critic: segments) they hold, add up."""
    losses = {"policy": lambda b: sapo.policy_loss(b.logp.exp(), b.advantages, b.mask, average=average)[0],
              "value": lambda b: sapo.value_loss(b.values, b.returns, b.ends, b.mask, average=average)[0]}
    counted = {"policy": batch.mask, "value": sapo.boundaries(batch.ends, batch.mask)}
    rows = len(batch.mask)
    for name, loss in losses.items():
        held = [1] * rows if average == "response" else counted[name].sum(1).tolist()
        parts = torch.arange(rows).split(size)
        losses_of_parts = [loss(change(batch, lambda x, part=part: x[part])) for part in parts]
        total = sum(sum(held[b] for b in part) * x for part, x in zip(parts, losses_of_parts, strict=True))
        exact(torch.as_tensor(total / max(sum(held), 1)), loss(batch))
