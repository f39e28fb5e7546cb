"""Compare methods on one budget: same warm start per seed, same number of generated tokens, intervals over seeds.

    python compare.py                                    # main: SAPO and its neighbours on DiceSum (Table 1, in little)
    python compare.py --experiment cuts                  # one of EXPERIMENTS: tune, main, cuts, topk, horizon, controls
    python compare.py --env SAPO/ArrowPath-v0 --env_args length=12 grid=4
    python compare.py --experiment truth     # on one frozen policy: is the credit right, are the values, the gradients?
    python compare.py --experiment lift                  # does V jump where entropy is high, before and after training?
    python compare.py --methods sapo ppo --seeds 3 --tokens 300000 --lam 0.9    # other flags are train.py's

The budget counts every token that the policy writes in training: groups, trees and Monte-Carlo continuations too. Each
run is a process of one thread, `--jobs` of them side by side; a sweep that was killed continues, and after each run
results/<experiment>-<task>.json is written anew. The learning rate of each method is chosen from one grid for all
(`--experiment tune`, its own seeds; same task and --tag), read from results/ where that exists.

Statistics as in Agarwal et al. (arXiv:2108.13264, the rliable paper): the interquartile mean over seeds, and its 95%
interval by bootstrap. Left out: significance tests; read the intervals.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import baselines
import sapo
import train
import vlm
from figures import interval, table
from sapo import setting

ROOT = Path(__file__).parent
METHODS = list(baselines.SETTINGS)
GRID = ["1e-4", "3e-4", "6e-4", "1.2e-3"]
# Monte-Carlo values cost many tokens per response, so these methods take smaller batches from the same budget.
BATCHES = {"spo-chain": ["--batch", "64", "--minibatch", "32", "--continuations", "4"],
           "vineppo": ["--batch", "32", "--minibatch", "16", "--continuations", "4"]}
EXPERIMENTS = {
    "tune": {f"{method} {lr}": ["--method", method, "--actor_lr", lr] for method in METHODS for lr in GRID},
    "main": {method: ["--method", method] for method in METHODS},
    "cuts": {name: ["--cut", name] for name in ("topk", "causal", "delimiter", "low-prob", "fixed")},
    "topk": {f"{k}%": ["--top_k", str(k / 100)] for k in (5, 10, 20, 30, 50, 100)},
    "horizon": {"sapo": [], "ppo": ["--method", "ppo"], "ppo, lambda 0.99": ["--method", "ppo", "--lam", "0.99"],
                "grpo": ["--method", "grpo"]},
    "controls": {"sapo": [], "sapo, token ratio": ["--ratio", "token"], "sapo, V at end": ["--value_at", "end"],
                 "sapo, token mean": ["--average", "token"]},
}
TRUTH = {**EXPERIMENTS["main"], "sapo, causal cut": ["--cut", "causal"], "sapo, V at end": ["--value_at", "end"]}

@dataclass
class Sweep:
    """What to compare."""
    experiment: str = setting("main", f"one of {', '.join(EXPERIMENTS)}, truth, lift")
    methods: list[str] = field(default_factory=list, metadata={"help": "only these methods, in place of all of main"})
    env: str = setting("SAPO/DiceSum-v0", "Gymnasium id of the task")
    env_args: list[str] = field(default_factory=list, metadata={"help": "keywords of the task: n=9, length=12 grid=5"})
    tag: str = setting("", "a word more for the names of the outcome and the runs; by default made of train.py's flags")
    seeds: int = setting(5, "runs per method")
    first_seed: int = setting(0, "the first of them; tuning takes others than the comparison")
    tokens: int = setting(500_000, "budget of a run, in tokens generated while training")
    jobs: int = setting(2, "processes side by side, one thread each")
    runs: str = setting("runs", "folder of all runs")
    results: str = setting("results", "folder of the outcomes")

    @property
    def task(self):
        return "-".join([self.env.split("/")[-1].split("-")[0], *self.env_args])

    @property
    def name(self):
        return "-".join([self.experiment, self.task, *[self.tag] * bool(self.tag)])

# --------------------------------------------------------------------------------------------------------- the runs
def best_rate(sweep, method):
    """The smallest learning rate within one standard error of the tuning's best, as flags; none without a tuning."""
    file = ROOT / sweep.results / f"{replace(sweep, experiment='tune').name}.json"
    if sweep.experiment == "tune" or not file.is_file():
        return []
    runs = json.loads(file.read_text())["runs"]
    found = {lr: x for lr in GRID if (x := [run["accuracy"] for run in runs if run["label"] == f"{method} {lr}"])}
    best, seeds = max(((np.mean(x), len(x)) for x in found.values()), default=(0, 1))
    within = best - math.sqrt(best * (1 - best) / (512 * seeds))  # of the evaluations alone: runs vary more
    return next((["--actor_lr", lr] for lr, x in found.items() if np.mean(x) >= within), [])

def plan(sweep, extra):
    """Every run of the sweep: (label, seed, folder, the flags of train.py)."""
    if sweep.experiment not in EXPERIMENTS:
        raise SystemExit(f"--experiment {sweep.experiment}: expected one of {', '.join(EXPERIMENTS)}")
    variants = EXPERIMENTS[sweep.experiment]
    if sweep.methods:
        variants = {label: flags for label, flags in variants.items() if label.split(" ")[0] in sweep.methods}
    for seed in range(sweep.first_seed, sweep.first_seed + sweep.seeds):  # all methods on a seed before the next seed
        for label, flags in variants.items():
            method = flags[flags.index("--method") + 1] if "--method" in flags else "sapo"
            if method == "srpo" and "TextSum" in sweep.env:
                continue
            name = f"{sweep.name}/{label.replace(' ', '_').replace(',', '')}-seed{seed}"
            yield label, seed, Path(sweep.runs) / name, [
                "--env", sweep.env, *(["--env_args"] * bool(sweep.env_args)), *sweep.env_args,
                *best_rate(sweep, method), *extra, *BATCHES.get(method, []), *flags, "--seed", str(seed),
                "--name", name, "--runs", sweep.runs, "--token_budget", str(sweep.tokens), "--iterations", "100000",
                "--eval_every", "100000"]

def execute(folder, flags):
    """One run, from where it was left; its output goes to a log beside the folder."""
    if (folder / "summary.json").is_file():
        return
    whole = any((folder / name / "trainer.pt").is_file() for name in ("checkpoint", "checkpoint.old"))
    command = [sys.executable, "train.py", *(["--resume", str(folder)] if whole else flags)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode or not (folder / "summary.json").is_file():
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}; see {folder}.log")

def outcome(label, seed, folder, flags, bins=20):
    """What results/ keeps of a run: its summary, and its training curves averaged over `bins` equal parts of it."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"actor_lr"' in line]
    parts = np.array_split(np.arange(len(rows)), min(bins, len(rows)))
    curve = {"generated_tokens": [rows[part[-1]]["generated_tokens"] for part in parts]}
    for key in ("accuracy", "entropy", "value_loss", "explained_variance", "response_tokens", "segments_per_response"):
        if key in rows[-1]:
            curve[key] = [round(float(np.mean([rows[i][key] for i in part if key in rows[i]])), 5) for part in parts]
    kept = ("warm_start_accuracy", "accuracy", "accuracy_low", "accuracy_high", "generated_tokens", "seconds")
    return {"label": label, "seed": seed, "flags": shlex.join(flags), "iterations": len(rows),
            **{key: summary[key] for key in kept}, "greedy": summary["evaluations"]["greedy"]["eval_accuracy"],
            "curve": curve}

def main(argv=None):
    """The command line."""
    parser = transformers.HfArgumentParser(Sweep, description=__doc__.split("\n\n")[0])
    sweep, extra = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    sweep.tag = sweep.tag or "_".join(word.strip("-").replace("/", "_") for word in extra)
    file = ROOT / sweep.results / f"{sweep.name}.json"
    found = {"command": shlex.join(["python", "compare.py", *(sys.argv[1:] if argv is None else argv)]),
             "experiment": sweep.experiment, "task": sweep.task, "budget_tokens": sweep.tokens, "jobs": sweep.jobs,
             "date": time.strftime("%Y-%m-%d"), "versions": {x.__name__: x.__version__ for x in (torch, transformers)}}
    file.parent.mkdir(exist_ok=True)
    write = lambda **more: file.write_text(json.dumps(found | more, indent=1) + "\n")
    if measure := {"truth": truth, "lift": lifts}.get(sweep.experiment):
        for part in measure(sweep, extra):
            write(**part)
        return print(file.read_text())
    runs = list(plan(sweep, extra))
    bar = tqdm(total=len(runs), desc=f"{sweep.experiment} on {sweep.task}", disable=None)
    with ThreadPoolExecutor(sweep.jobs) as pool:
        for _ in pool.map(lambda run: execute(*run[2:]), runs):
            write(runs=[outcome(*run) for run in runs if (run[2] / "summary.json").is_file()])
            bar.update()
    bar.close()
    print(table(json.loads(file.read_text())))

# ----------------------------------------------------------------------------------------------------- ground truth
def frozen(sweep, extra, flags, critic_rollouts=0):
    """A run whose policy stays as it is; its critic learns from `critic_rollouts` batches, the same for all methods."""
    run = train.build(*train.parse(
        ["--env", sweep.env, *(["--env_args"] * bool(sweep.env_args)), *sweep.env_args, "--seed", str(sweep.first_seed),
         "--value_pretraining", "1000000", "--runs", sweep.runs, "--name", "truth", *flags, *extra]))
    for _ in tqdm(range(critic_rollouts if run.critic else 0), f"critic, {' '.join(flags)}", leave=False, disable=None):
        train.step(run)
    return run

def same_batch(run, count, group=8, seed=0):
    """Responses to held-out prompts, `group` to each: the same under every method, as the policy and the seed are."""
    torch.manual_seed(seed)
    per = 1 if run.settings.credit == "tree" else group
    prompts = count // baselines.responses_per_prompt(run.settings) if per == 1 else count // group
    return train.collect(run, np.repeat(np.arange(prompts), per), "eval")

def auroc(scores, right):
    """P(score of a right step > score of a wrong one), ties half: 1 is perfect, 0.5 is blind."""
    scores, right = np.asarray(scores), np.asarray(right, bool)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]  # mean rank of equal scores, from 1
    n, m = right.sum(), (~right).sum()
    return float((rank[right].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")

def credit_accuracy(run, count):
    """How well the advantages tell right steps from wrong ones, and their share on the first wrong step."""
    batch, steps, shares = same_batch(run, count), [], []  # steps of each response: (mean advantage, is it right?)
    advantages = sapo.credit(batch.rollout, run.config)[0]
    for row, e in enumerate(batch.envs):
        task, example, pieces, a = e.unwrapped.task, e.unwrapped.example, batch.texts[row], advantages[row].numpy()
        text, token_of = "".join(pieces), [t for t, piece in enumerate(pieces) for _ in piece]
        spans = [(token_of[i], token_of[j - 1] + 1) for i, j in task.step_spans(text) if j > i]
        right = [r for (i, j), r in zip(task.step_spans(text), task.check_steps(example, text), strict=True) if j > i]
        steps.append([(float(a[i:j].mean()), r) for (i, j), r in zip(spans, right, strict=True)])
        if False in right and np.abs(a).sum() > 0:
            i, j = spans[right.index(False)]
            shares.append(float(np.abs(a[i:j]).sum() / np.abs(a).sum()))
    pick = lambda rows: auroc(*zip(*(step for i in rows for step in steps[i]), strict=True))
    rng = np.random.default_rng(0)
    drawn = [pick(rng.integers(len(steps), size=len(steps))) for _ in range(200)]
    wrong = [row for row, of in enumerate(steps) if not all(right for _, right in of)]
    return {"auroc": pick(range(len(steps))), "auroc_interval": np.nanquantile(drawn, (0.025, 0.975)).tolist(),
            "auroc_in_wrong_responses": pick(wrong) if wrong else None,  # 0.5: all steps blamed alike
            "share_on_first_wrong_step": interval(shares, lambda x: x.mean(-1)) if shares else None}

def gradient(run, batch, advantages=None):
    """The policy's gradient from one batch at ratio 1, as one vector (parameters,)."""
    rollout = batch.rollout if batch.keep is None else baselines.masked(batch.rollout, batch.keep, run.config)
    advantages = sapo.credit(rollout, run.config)[0] if advantages is None else advantages
    ends = rollout.ends if run.config.ratio == "segment" else sapo.token_ends(rollout.mask)
    run.policy.model.zero_grad()
    weight = rollout.mask.sum(1) if run.config.average == "token" else torch.ones(len(advantages))  # of each response
    for rows in torch.arange(len(advantages)).split(run.config.minibatch):
        logp, _ = vlm.score(run.policy, vlm.take(batch.inputs, rows), batch.tokens[rows], batch.mask[rows])
        ratio = sapo.segment_ratio(logp, rollout.logp[rows], ends[rows], rollout.mask[rows])
        loss, _ = sapo.policy_loss(ratio, advantages[rows], rollout.mask[rows], average=run.config.average)
        (loss * weight[rows].sum() / weight.sum().clamp(min=1)).backward()
    return torch.cat([p.grad.flatten() for p in run.policy.model.parameters() if p.grad is not None])

def gradients(run, count, tokens, first=1):
    """`count` gradients, each the mean of as many batches as `tokens` generated tokens buy. -> (count, parameters)."""
    found, iteration = [], first
    for _ in range(count):
        parts, before = [], run.written
        while not parts or run.written - before < tokens:
            parts.append(gradient(run, train.collect(run, train.train_indices(run.settings, iteration))))
            iteration += 1
        found.append(torch.stack(parts).mean(0))
    return torch.stack(found)

def lift(entropy, jump, q, top=0.1):
    """Eq. 12: P(D | A) / P(D), A the tokens in the top q of entropy, D those in the top 10% of |V_t - V_{t+1}|."""
    chosen, large = (x >= np.quantile(x, 1 - share) for x, share in ((entropy, q), (jump, top)))
    return float(large[chosen].mean() / large.mean())

def lift_over_q(batch, draws=1000):
    """lift: {q: (Lift, low, high)} by a batch's token values, its 95% interval by bootstrap over responses; large: the
    share of D, above 10% where many jumps are equal. A response's last token is left out: it has no V_{t+1}."""
    mask = (batch.rollout.mask & ~sapo.response_ends(batch.rollout.mask))[:, :-1].numpy()
    entropy, jump = batch.entropy[:, :-1].numpy(), batch.rollout.values.diff(dim=1).abs().numpy()
    drawn = [np.arange(len(mask)), *np.random.default_rng(0).integers(len(mask), size=(draws, len(mask)))]
    found = {q: [lift(entropy[i][mask[i]], jump[i][mask[i]], q) for i in drawn] for q in (0.5, 0.3, 0.2, 0.1, 0.05)}
    return {"large": float((jump[mask] >= np.quantile(jump[mask], 0.9)).mean()),
            "lift": {str(q): (x[0], *np.quantile(x[1:], (0.025, 0.975)).tolist()) for q, x in found.items()}}

def value_error(sweep, extra, flags, rollouts=40, continuations=64, responses=64):
    """A trained critic against Monte-Carlo values where it is read. -> (the errors, its batch, Monte Carlo's batch)."""
    critic = same_batch(frozen(sweep, extra, flags, rollouts), responses, group=1)
    exact = same_batch(frozen(sweep, extra, [*flags, "--lam", "0", "--credit", "continuations", "--continuations",
                                             str(continuations)]), responses, group=1)
    assert torch.equal(critic.tokens, exact.tokens)
    reads = sapo.boundaries(exact.rollout.ends, exact.rollout.mask)
    guess, truth = critic.rollout.values[reads].numpy(), exact.rollout.values[reads].numpy()
    return {"rollouts": rollouts, "continuations": continuations, "responses": responses, "states": len(truth),
            "rmse": float(np.sqrt(np.mean((guess - truth) ** 2))), "spread_of_truth": float(truth.std()),
            "correlation": float(np.corrcoef(guess, truth)[0, 1]) if guess.std() > 0 else 0.0}, critic, exact

def lifts(sweep, extra, **sizes):
    """Lift over q by the token critic and by Monte Carlo, before and after SAPO's run in the comparison."""
    (_, seed, folder, flags), = plan(replace(sweep, experiment="main", methods=["sapo"], seeds=1), extra)
    execute(folder, flags)
    found = {"seed": seed, "run": shlex.join(flags)}
    for when, start in {"early": [], "late": ["--model", str(folder / "checkpoint")]}.items():
        errors, critic, exact = value_error(sweep, [*extra, *start], ["--method", "ppo"], **sizes)
        found[when] = {**errors, "critic": lift_over_q(critic), "Monte Carlo": lift_over_q(exact)}
        yield found

def truth(sweep, extra, count=8, rollouts=40, continuations=64, large=64, responses=256, budget=16_000):
    """All of the ground truth, for results/truth-<task>.json. budget: generated tokens per gradient."""
    found = {"methods": {}, "values": {}}
    for name, flags in (("segment critic", ["--method", "sapo"]), ("token critic", ["--method", "ppo"])):
        found["values"][name] = value_error(sweep, extra, flags, rollouts, continuations, responses // 8)[0]
        yield found
    run, halves = frozen(sweep, extra, ["--method", "sapo"]), [[], []]
    for i in tqdm(range(large), "reference gradient", leave=False, disable=None):  # REINFORCE, the mean as baseline
        batch = train.collect(run, train.train_indices(run.settings, 10_000 + i))
        rewards = batch.rollout.rewards.sum(1, keepdim=True)
        halves[i % 2].append(gradient(run, batch, (rewards - rewards.mean()) * batch.rollout.mask))
    halves = [torch.stack(half).mean(0) for half in halves]
    reference, cosine = sum(halves) / 2, torch.nn.functional.cosine_similarity
    found["reference"] = {"responses": 256 * large, "cosine_of_its_halves": float(cosine(*halves, dim=0))}
    for name, flags in TRUTH.items():
        if sweep.methods and name not in sweep.methods:
            continue
        run = frozen(sweep, extra, flags, rollouts)
        found["methods"][name] = credit = credit_accuracy(run, responses)
        if name in BATCHES:
            run = frozen(sweep, extra, [*BATCHES[name], *flags])
        drawn = gradients(run, count, budget)
        cosines, mean = cosine(drawn, reference[None]).tolist(), drawn.mean(0)
        credit |= {"cosine": interval(cosines, lambda x: x.mean(-1)),
                   "variance": float((drawn - mean).square().sum(1).mean() / mean.square().sum())}
        yield found

if __name__ == "__main__":
    main()
