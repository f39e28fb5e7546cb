"""Ground truth on one frozen policy: is a method's credit right, are its values, is its gradient?

The tasks know which steps of a response are right, Monte Carlo knows what a prefix is worth, and a
REINFORCE gradient over thousands of responses knows where the objective rises. All methods meet the
same policy. `truth` measures these three; `lifts` asks whether V jumps where entropy is high
(Eq. 12 of arXiv:2605.01327).

Shapes: B responses, T tokens, as in sapo.py.
"""

import math
import shlex
from dataclasses import asdict, replace

import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

import baselines
import evaluation
import models
import rollout
import sapo
import train
import vlm
from flags import is_same
from lab.stats import auroc, interval, lift
from lab.sweep import BATCHES, EXPERIMENTS, execute, of_methods, plan

# {label: flags of train.py}: SAPO at its lambda and at others, and the methods beside it.
TRUTH = {
    "sapo": [],
    **{f"sapo, lambda {lam}": ["--lam", str(lam)] for lam in (0.99, 0.7, 0.5, 0.0)},
    **{name: flags for name, flags in EXPERIMENTS["main"].items() if name != "sapo"},
}
SHARES = (0.5, 0.3, 0.2, 0.1, 0.05)  # of tokens called high-entropy: q of Eq. 12


def mean(values):
    """Mean over the last axis."""
    return values.mean(-1)


# -------------------------------------------------------------------- before the first run
def check_runs(all_flags: list[list[str]]) -> None:
    """ValueError, OSError or ImportError where train.py would refuse one of a sweep's runs, given
    what it is told in each: the last may begin hours after the first.

    They share task, model and device, and only the processor of a model is opened.
    """
    parsed = [train.parse(flags) for flags in all_flags]
    shared, _ = parsed[0]
    train.check_device(shared.device)
    if shared.model != "tiny":
        with models.named_by_its_flag():
            vlm.open_processor(shared.model)
    world = train.make_env(shared)
    observed = world.observation_space.spaces
    for settings, config in parsed:
        baselines.check_numbers(settings, config)
        has_picture = "image" in observed or "images" in observed
        baselines.check(settings, has_picture, world.unwrapped.task.replies)


# Settings that do not make another run: `train.build` asks no more episodes than a data set has
OF_NO_MATTER = ("resume", "runs", "eval_episodes")


def check_left(all_flags: list[list[str]]) -> None:
    """ValueError where the folder of one of a sweep's runs holds a run of other settings, which
    would be gone on with, or taken for this one."""
    for words in all_flags:
        settings, config = train.parse(words)
        folder = train.folder_of(settings)
        if not (folder / "config.json").is_file():
            continue
        asked = asdict(settings) | asdict(config)
        for name, stored in train.stored_settings(folder).items():
            if name not in OF_NO_MATTER and not is_same(name, asked[name], stored):
                raise ValueError(
                    f"{folder}: a run with --{name} {stored} lies there, and this one has "
                    f"{asked[name]}; take another --tag or --runs, or move it away"
                )


# ------------------------------------------------------------------------- one policy for all
def frozen(sweep, extra, flags, critic_rollouts=0):
    """A run whose policy stays as it is; its critic learns from `critic_rollouts` batches first.

    Whatever the method, that policy is the same.
    """
    run = train.build(*train.parse(frozen_flags(sweep, extra, flags)))
    if run.models.critic is None:
        return run
    label = f"critic, {' '.join(flags)}"
    for _ in tqdm(range(critic_rollouts), label, leave=False, disable=None):
        train.iterate(run)
    return run


def frozen_flags(sweep, extra, flags):
    """What train.py is told for a run of `frozen`."""
    argv = [*sweep.task_flags, "--seed", str(sweep.first_seed), "--batch", "256"]
    # The rate stands last, where no other overrides it: only the critic learns
    place = ["--runs", sweep.runs, "--name", "truth"]
    return [*argv, *place, *flags, *extra, "--actor_lr", "0", "--value_pretraining", "0"]


def same_batch(run, count, group=8, seed=0):
    """`count` responses to held-out prompts, `group` to each, as a rollout.Batch.

    The same under every method, as the policy and the seed are. Except for a tree, which grows its
    own responses to each prompt.
    """
    torch.manual_seed(seed)
    if run.settings.credit == "tree":
        indices = np.arange(count // baselines.responses_per_prompt(run.settings))
    else:
        indices = np.repeat(np.arange(count // group), group)
    return rollout.collect(run, indices, "eval")


# ----------------------------------------------------------------------- is the credit right?
def step_tokens(environment, token_texts):
    """The steps of a response, in tokens: [(first, past the last, is the step right?), ...].

    token_texts: what each of the response's tokens reads. Empty steps are left out.
    """
    task, example = environment.unwrapped.task, environment.unwrapped.example
    steps = evaluation.step_tokens(task, example, token_texts)
    return [(first, last + 1, right) for first, last, right in steps]


def share_on_first_wrong(advantages, steps):
    """Sum of |A| over the first wrong step, as a share of the whole response's. advantages (T,).

    None where no step is wrong or every advantage is 0.
    """
    total = np.abs(advantages).sum()
    for first, end, right in steps:
        if not right and total > 0:
            return float(np.abs(advantages[first:end]).sum() / total)
    return None


def pooled_auroc(responses):
    """AUROC over all steps of some responses: do right steps have the higher advantage?

    responses: of each its steps as [(mean advantage, is the step right?), ...]. NaN where all
    steps are right, or all wrong.
    """
    steps = [step for response in responses for step in response]
    return auroc([advantage for advantage, _ in steps], [right for _, right in steps])


def deepest_until_lost(advantages, steps):
    """Of a response that has a wrong step: [(smallest advantage in the step, is it right?), ...].

    The wrong steps after the first are left out: a response can be lost only once, and then V has
    nowhere to fall to. A step may span several segments, and the smallest advantage is that of the
    one where the value falls most. advantages (T,); steps as `step_tokens` gives them.
    """
    deepest, lost = [], False
    for first, end, right in steps:
        if right or not lost:
            deepest.append((float(advantages[first:end].min()), right))
        lost = lost or not right
    return deepest if lost else []


def credit_accuracy(run, count):
    """How well the advantages tell right steps from wrong ones, over `count` responses: see
    `accuracy_of`. The advantages are the method's own; with --lam 0 they are the TD errors."""
    batch = same_batch(run, count)
    # Of all used tokens: what the loss leaves out (SPO's confident tokens, say) has credit too.
    return accuracy_of(train.assign_credit(run, batch).advantages, batch)


def accuracy_of(advantages, batch, draws=200):
    """How well advantages (B, T) tell a batch's right steps from its wrong ones.

    "auroc": of all steps, its 95% interval by bootstrap over responses (slow; None at no draws).
    "auroc_in_wrong_responses": within responses that have a wrong step; 0.5 where all their steps
    are blamed alike. "auroc_of_first_wrong_step": there, the first wrong step against the right
    ones (`deepest_until_lost`). "share_on_first_wrong_step": the mean over responses, and its 95%
    interval. "wrong_responses": how many have a wrong step.
    """
    responses, shares, deepest = [], [], []
    advantages = advantages.cpu()
    for row, environment in enumerate(batch.envs):
        steps = step_tokens(environment, batch.texts[row])
        of_tokens = advantages[row].numpy()  # (T,)
        responses.append([(float(of_tokens[i:j].mean()), right) for i, j, right in steps])
        deepest.append(deepest_until_lost(of_tokens, steps))
        share = share_on_first_wrong(of_tokens, steps)
        if share is not None:
            shares.append(share)
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(draws):
        rows = rng.integers(len(responses), size=len(responses))
        resampled.append(pooled_auroc([responses[row] for row in rows]))
    wrong = [steps for steps in responses if not all(right for _, right in steps)]
    return {
        "auroc": pooled_auroc(responses),
        # Quantiles without the NaN of a draw whose steps are all right.
        "auroc_interval": np.nanquantile(resampled, (0.025, 0.975)).tolist() if draws else None,
        "auroc_in_wrong_responses": pooled_auroc(wrong) if wrong else None,
        "auroc_of_first_wrong_step": pooled_auroc(deepest) if wrong else None,
        "share_on_first_wrong_step": interval(shares, mean) if shares else None,
        "wrong_responses": len(wrong),
    }


# ----------------------------------------------------- does the gradient point the right way?
def gradient(run, batch, learned, advantages):
    """The gradient of the policy loss (Eq. 9) from one batch at ratio 1, as a vector (parameters,).

    learned: the sapo.Rollout as the loss reads it; advantages (B, T), not whitened. Scored one
    minibatch at a time, weighted so that the split changes nothing.
    """
    config, model = run.config, run.models.policy.model
    # (B,): how much of the mean over the batch each response is.
    weight = learned.mask.sum(1) if config.average == "token" else torch.ones(len(advantages))
    model.zero_grad()
    for rows in torch.arange(len(advantages)).split(config.minibatch):
        logp, _ = rollout.scores_of(run, run.models.policy, batch, rows)
        ends, mask = learned.ends[rows], learned.mask[rows]
        ratio = sapo.importance_ratio(logp, learned.logp[rows], ends, mask, config.ratio)
        loss, _ = sapo.policy_loss(ratio, advantages[rows], mask, average=config.average)
        (loss * weight[rows].sum() / weight.sum().clamp(min=1)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradients(run, count, tokens, first=1):
    """`count` gradients, each the mean of batches until `tokens` generated tokens are passed.

    The batches are those of the training iterations from `first` on. -> (count, parameters).
    """
    means, iteration = [], first
    for _ in range(count):
        parts, spent = [], 0
        while not parts or spent < tokens:
            batch = rollout.collect(run, rollout.train_indices(run.settings, iteration))
            credit = train.assign_credit(run, batch)
            learned, advantages = baselines.restrict(
                batch.rollout, credit.advantages, credit.loss_mask
            )
            parts.append(gradient(run, batch, learned, advantages))
            spent += batch.generated_tokens
            iteration += 1
        means.append(torch.stack(parts).mean(0))
    return torch.stack(means)


def reference_gradient(run, batches):
    """REINFORCE with the batch's mean reward as baseline, in the mean over `batches` batches.

    -> (gradient (parameters,), cosine of the means of its two halves: how exact it is).
    """
    halves = [], []
    for i in tqdm(range(batches), "reference gradient", leave=False, disable=None):
        # Far from the iterations of `gradients`, so that the examples are other ones.
        batch = rollout.collect(run, rollout.train_indices(run.settings, 10_000 + i))
        rewards = batch.rollout.rewards.sum(1, keepdim=True)  # (B, 1)
        advantages = (rewards - rewards.mean()) * batch.rollout.mask  # (B, T)
        halves[i % 2].append(gradient(run, batch, batch.rollout, advantages))
    even, odd = (torch.stack(half).mean(0) for half in halves)
    return (even + odd) / 2, float(cosine_similarity(even, odd, dim=0))


def gradient_quality(drawn, reference):
    """How well some gradients (count, parameters) agree with the reference (parameters,).

    "cosine": the mean of their cosines with it, and its 95% interval. "variance": between them,
    mean_i |g_i - g|^2 / |g|^2 with g = mean_i g_i.
    """
    cosines = cosine_similarity(drawn, reference[None]).tolist()
    centre = drawn.mean(0)
    variance = (drawn - centre).square().sum(1).mean() / centre.square().sum()
    return {"cosine": interval(cosines, mean), "variance": float(variance)}


# ---------------------------------------------------------------------- are the values right?
def value_error(sweep, extra, flags, rollouts=40, continuations=64, responses=64):
    """The values of a critic taught by `rollouts` batches against Monte Carlo's, where V is read.

    `flags`: the critic's method. Monte Carlo: V(s_m) is the mean reward of `continuations` fresh
    continuations of s_m. -> (the errors, the critic's batch, Monte Carlo's batch of the same
    responses).
    """
    monte_carlo = ["--credit", "continuations", "--continuations", str(continuations)]
    monte_carlo += ["--lam", "0"]
    critic_batch = same_batch(frozen(sweep, extra, flags, rollouts), responses, group=1)
    exact_batch = same_batch(frozen(sweep, extra, [*flags, *monte_carlo]), responses, group=1)
    assert torch.equal(critic_batch.tokens, exact_batch.tokens)
    exact = exact_batch.rollout
    reads = sapo.boundaries(exact.ends, exact.mask)  # (B, T)
    guess = critic_batch.rollout.values[reads].cpu().numpy()  # (states,)
    values = exact.values[reads].cpu().numpy()  # (states,)
    # A critic that says one number everywhere has no correlation.
    correlation = float(np.corrcoef(guess, values)[0, 1]) if guess.std() > 0 else 0.0
    errors = {
        "rollouts": rollouts,
        "continuations": continuations,
        "responses": responses,
        "states": len(values),
        "rmse": float(np.sqrt(np.mean((guess - values) ** 2))),
        "spread_of_truth": float(values.std()),
        "correlation": correlation,
    }
    return errors, critic_batch, exact_batch


def lift_over_q(batch, draws=1000):
    """Lift (Eq. 12) by a batch's token values, for each q of SHARES.

    -> {"lift": {q: (Lift, low, high)}, with the 95% interval by bootstrap over responses; "large":
    the share of tokens with a large jump, above 10% where many jumps are equal}. A response's last
    token is left out: no V_{t+1} follows it.
    """
    mask = batch.rollout.mask & ~sapo.response_ends(batch.rollout.mask)
    mask = mask[:, :-1].cpu().numpy()  # (B, T - 1)
    entropy = batch.entropy[:, :-1].cpu().numpy()  # (B, T - 1)
    jump = batch.rollout.values.diff(dim=1).abs().cpu().numpy()  # (B, T - 1): |V_t - V_{t+1}|
    resampled = np.random.default_rng(0).integers(len(mask), size=(draws, len(mask)))
    curve = {}
    for q in SHARES:
        drawn = [lift(entropy[rows][mask[rows]], jump[rows][mask[rows]], q) for rows in resampled]
        low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
        curve[str(q)] = (lift(entropy[mask], jump[mask], q), low, high)
    large = jump[mask] >= np.quantile(jump[mask], 0.9)
    return {"large": float(large.mean()), "lift": curve}


def cut_steps(batch, top_k=0.3):
    """Does the entropy cut find the hard steps, those where the teacher had a bad habit?

    -> {"hard" or "easy": {"steps": how many, "cut": the share of them in which a segment ends by
    the cut (a token of the step is among the top_k), "cut_by_chance": that share if as many tokens
    of each response were drawn blindly, as a long step is cut more easily; "entropy": the mean over
    steps of the largest entropy in them, in nats}}.
    """
    ends = sapo.entropy_ends(batch.entropy, batch.rollout.mask, top_k)
    found = {"hard": [], "easy": []}
    for row, environment in enumerate(batch.envs):
        task, example = environment.unwrapped.task, environment.unwrapped.example
        response = "".join(batch.texts[row])
        steps = step_tokens(environment, batch.texts[row])
        spans = task.step_spans(response)
        are_hard = task.hard_steps(example, response)
        of_steps = [hard for (i, j), hard in zip(spans, are_hard, strict=True) if j > i]
        tokens, cuts = int(batch.rollout.mask[row].sum()), int(ends[row].sum())
        for (first, end, _), is_hard in zip(steps, of_steps, strict=True):
            missed = math.comb(tokens - (end - first), cuts) / math.comb(tokens, cuts)
            entropy = batch.entropy[row, first:end].max().item()
            is_cut = bool(ends[row, first:end].any())
            found["hard" if is_hard else "easy"].append((is_cut, 1 - missed, entropy))
    names = ("cut", "cut_by_chance", "entropy")
    return {
        kind: {"steps": len(steps)} | dict(zip(names, np.mean(steps, axis=0).tolist(), strict=True))
        for kind, steps in found.items()
        if steps
    }


# ------------------------------------------------------------------------ the two experiments
def lifts(sweep, extra, **sizes):
    """Lift over q by PPO's token critic and by Monte Carlo, before and after training with SAPO.

    The training is SAPO's run of the main comparison; it is made where it is missing. `sizes`: as
    `value_error` takes them. Yields what is measured so far, for results/lift-<task>.json.
    """
    of_methods(sweep, {"sapo": []})  # no other is trained here
    comparison = replace(sweep, experiment="main", methods=["sapo"], seeds=1)
    (planned,) = plan(comparison, extra)
    check_runs([planned.flags, frozen_flags(sweep, extra, ["--method", "ppo"])])
    check_left([planned.flags])
    execute(planned.folder, planned.flags)
    measured = {"seed": planned.seed, "run": shlex.join(planned.flags)}
    starts = {"early": [], "late": ["--model", str(planned.folder / "checkpoint")]}
    for when, start in starts.items():
        errors, critic_batch, exact_batch = value_error(
            sweep, [*extra, *start], ["--method", "ppo"], **sizes
        )
        measured[when] = {
            **errors,
            "critic": lift_over_q(critic_batch),
            "Monte Carlo": lift_over_q(exact_batch),
            "steps": cut_steps(critic_batch),
        }
        yield measured


def truth(
    sweep, extra, count=8, rollouts=40, continuations=64, large=64, responses=256, budget=16_000
):
    """All of the ground truth. Yields what is measured so far, for results/truth-<task>.json.

    count: gradients of each method; budget: generated tokens that each of them takes at least, as
        it is of whole batches
    rollouts: batches that teach a critic
    continuations: of each state, for its exact value
    large: batches of the reference gradient
    responses: to measure the credit on; an eighth of them for the values
    """
    compared = of_methods(sweep, TRUTH)
    of_runs = [["--method", "sapo"], ["--method", "ppo"], *compared.values()]
    of_runs += [[*BATCHES[name], *flags] for name, flags in compared.items() if name in BATCHES]
    check_runs([frozen_flags(sweep, extra, flags) for flags in of_runs])
    measured = {"methods": {}, "values": {}}
    for name, method in (("segment critic", "sapo"), ("token critic", "ppo")):
        flags = ["--method", method]
        errors, _, _ = value_error(sweep, extra, flags, rollouts, continuations, responses // 8)
        measured["values"][name] = errors
        yield measured
    judge = frozen(sweep, extra, ["--method", "sapo"])
    reference, agreement = reference_gradient(judge, large)
    measured["reference"] = {
        "responses": judge.settings.batch * large,
        "cosine_of_its_halves": agreement,
    }
    for name, flags in compared.items():
        run = frozen(sweep, extra, flags, rollouts)
        measured["methods"][name] = credit_accuracy(run, responses)
        if name in BATCHES:  # then its own batch size, as in the comparison
            run = frozen(sweep, extra, [*BATCHES[name], *flags])
        measured["methods"][name] |= gradient_quality(gradients(run, count, budget), reference)
        yield measured
