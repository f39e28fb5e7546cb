"""Train a vision-language model with SAPO (arXiv:2605.01327), or with one of its neighbours (baselines.py).

    python train.py                                          # DiceSum, tiny model built on the spot, two CPU cores
    python train.py --method ppo --seed 1                    # the same with tokens for segments
    python train.py --model FOLDER --env SAPO/Dataset-v0 --env_args path=mine.parquet --lora 16
    python train.py --resume runs/DiceSum-sapo-topk-seed0    # go on where it was cut

One iteration: reset one Gymnasium environment per response; the policy writes whole responses; they are scored, judged
by the critic, cut into segments, and replayed segment by segment through `env.step`; `sapo.sapo_update` learns.
Left out: several devices. The README explains the files under runs/<name>/, and each metric.
"""

import base64
import contextlib
import copy
import hashlib
import importlib.util
import inspect
import io
import json
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import transformers
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

import baselines
import bench
import env
import figures
import sapo
import vlm
from sapo import setting

STATEFUL = ("critic", "actor_optimizer", "critic_optimizer")  # what a checkpoint holds beside the policy
STOP = "</answer>"  # writing on after the answer earns nothing: the episode is over

@dataclass
class Settings(baselines.Method):
    """Everything that is not the algorithm's (that is sapo.SAPOConfig)."""
    env: str = setting("SAPO/DiceSum-v0", "Gymnasium id of the task")
    env_args: list[str] = field(default_factory=list, metadata={"help": "keywords of the task: n=9, length=12 grid=5"})
    model: str = setting("tiny", "'tiny', or a checkpoint: a directory or a hub name")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = setting("float32", "dtype of the weights: float32, or bfloat16 (then Adam keeps float32 copies)")
    lora: int = setting(0, "rank of LoRA adapters, by which policy, critic and reference share one backbone; 0: none")
    critic: Literal["separate", "shared"] = setting("separate", "without --lora: its own weights, or a head alone")
    gradient_checkpointing: bool = setting(False, "keep fewer activations and make them again for the gradient")
    seed: int = setting(0, "of the weights, the demonstrations, the sampling and the shuffling")
    name: str = setting("", "the run's folder under --runs; made from the settings when empty")
    runs: str = setting("runs", "folder of all runs and of the warm-start cache")
    resume: str = setting("", "folder of a run to continue; flags given beside it change its settings")
    iterations: int = setting(60, "rollouts to learn from")
    token_budget: int = setting(0, "stop also when so many tokens were generated, the credit's own included; 0: never")
    batch: int = setting(256, "responses per rollout, all written at once")
    max_new_tokens: int = setting(64, "longest response, in tokens")
    temperature: float = setting(1.0, "of sampling and scoring in training")
    warm_start_steps: int = setting(600, "supervised steps on noisy demonstrations before RL; 0 for none")
    warm_start_batch: int = setting(64, "demonstrations per step")
    warm_start_lr: float = setting(3e-3, "peak learning rate of the warm start")
    error_rate: float = setting(0.075, "probability that a demonstrated step is wrong")
    actor_half_life: float = setting(5e5, "generated tokens in which --actor_lr falls by half; inf: it stays")
    eval_every: int = setting(20, "iterations between held-out evaluations at temperature 1")
    eval_episodes: int = setting(512, "held-out episodes per evaluation")
    checkpoint_every: int = setting(20, "iterations between checkpoints")
    tensorboard: bool = setting(False, "also write TensorBoard event files")

def parse(argv=None) -> tuple[Settings, sapo.SAPOConfig]:
    """The command line -> settings. --resume starts from that run's config.json, and --method from its own defaults."""
    parser = transformers.HfArgumentParser((Settings, sapo.SAPOConfig), description=__doc__.split("\n\n")[0])
    known, _ = parser.parse_known_args(argv)
    if known.resume:
        if not (config := Path(known.resume) / "config.json").is_file():
            raise SystemExit(f"--resume {known.resume}: no config.json there; give the folder of a run, runs/<name>")
        stored = json.loads(config.read_text())
        parser.set_defaults(**{**stored["settings"], **stored["config"], "resume": known.resume})
    else:
        parser.set_defaults(**baselines.SETTINGS[known.method])
    settings, config = parser.parse_args_into_dataclasses(argv)
    task = [settings.env.split("/")[-1].split("-")[0], settings.method, settings.cut, *settings.env_args]
    settings.name = settings.name or "-".join([*task, f"seed{settings.seed}"]).replace("/", "_")
    return settings, config

def make_env(settings):
    """One environment, from --env and --env_args (numbers, or else words)."""
    try:
        keywords = dict(word.split("=", 1) for word in settings.env_args)
        for name, word in keywords.items():
            with contextlib.suppress(ValueError):
                keywords[name] = json.loads(word)
        return gym.make(settings.env, disable_env_checker=True, **keywords)
    except (ValueError, TypeError, ImportError, gym.error.Error) as error:
        raise SystemExit(f"--env {settings.env} --env_args {' '.join(settings.env_args)}: expected a known id and "
                         f"name=value pairs, such as n=9 ({error})") from None

# -------------------------------------------------------------------------------------------------------- warm start
def warm_start(settings, directory):
    """A tiny model, saved in `directory`, that has read demonstrations whose every step was wrong with probability
    error_rate and then carried on consistently: it knows the format, and makes such slips. RL can take them away again.
    """
    task = make_env(settings).unwrapped.task
    image = task.example_at(0).image
    model = vlm.load(vlm.build_tiny(directory, image.size[0] if image else 16, seed=settings.seed), settings.device)
    rng, steps = np.random.default_rng(settings.seed), settings.warm_start_steps
    optimizer = torch.optim.Adam(model.model.parameters(), lr=settings.warm_start_lr, eps=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.warm_start_lr, total_steps=steps + 1)
    for _ in (bar := tqdm(range(steps), "warm start", disable=None)):
        examples = [task.example_at(int(i)) for i in rng.integers(2**31, size=settings.warm_start_batch)]
        texts = [task.demonstrate(example, rng, settings.error_rate) for example in examples]
        inputs = vlm.encode(model, [e.question for e in examples], [e.image for e in examples])
        tokens, mask = vlm.encode_responses(model, texts)
        loss = -vlm.score(model, inputs, tokens, mask)[0].sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.3f} nats per token", refresh=False)
    model.model.save_pretrained(directory)

def digest(folder):
    """{file: sha256} of everything in a folder but the manifest itself."""
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.iterdir() if x.name != "manifest.json"}

def cached_warm_start(settings) -> Path:
    """The warm start's folder, made when it is missing or damaged. Its name is a hash of everything that shaped it."""
    sources = [(Path(__file__).parent / name).read_text() for name in ("env.py", "vlm.py")]
    shaped = [settings.env, settings.env_args, settings.seed, settings.warm_start_steps, settings.warm_start_batch,
              settings.warm_start_lr, settings.error_rate, settings.device, torch.__version__, transformers.__version__,
              *sources, inspect.getsource(warm_start)]
    folder = Path(settings.runs) / "cache" / hashlib.sha256(json.dumps(shaped).encode()).hexdigest()[:16]
    manifest = folder / "manifest.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # runs side by side wait for the one that makes it
        if folder.exists():
            with contextlib.suppress(ValueError, OSError):
                if json.loads(manifest.read_text()) == digest(folder):
                    return folder
            warnings.warn(f"the cached warm start {folder} is damaged: building it again", stacklevel=2)
        with replacing(folder) as aside:
            warm_start(settings, aside)
            (aside / "manifest.json").write_text(json.dumps(digest(aside)))
    return folder

# ------------------------------------------------------------------------------------------------------- checkpoints
@contextlib.contextmanager
def replacing(folder):
    """`with replacing(folder) as aside`: write `aside`; it takes the folder's place at the end, whole or not at all.
    Between the two renames only `folder.old` exists, and `newest` finds it: a kill at any moment leaves a whole one."""
    folder, aside, old = (Path(f"{folder}{end}") for end in ("", ".new", ".old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside  # an exception in the block ends it here
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

def newest(folder) -> Path:
    """The whole checkpoint of a run folder: `checkpoint`, or `checkpoint.old` after a kill between two renames."""
    for name in ("checkpoint", "checkpoint.old"):
        if (Path(folder) / name / "trainer.pt").is_file():
            return Path(folder) / name
    raise SystemExit(f"{folder}: no checkpoint there yet; start the run again without --resume")

def trained(run):
    """The parameters that the optimizers move: adapters and float32 copies are not in the policy's own files."""
    optimizers = filter(None, (run.actor_optimizer, run.critic_optimizer))
    return [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]

def save(run):
    """Write the checkpoint: policy and processor in Hugging Face format, the rest in trainer.pt."""
    with replacing(run.folder / "checkpoint") as aside:
        run.policy.enter().save_pretrained(aside)
        run.policy.processor.save_pretrained(aside)
        state = {part: getattr(run, part) and getattr(run, part).state_dict() for part in STATEFUL}
        state["weights"] = trained(run) if run.settings.lora or run.settings.dtype != "float32" else []
        torch.save({**state, "progress": run.progress, "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state_all()}, aside / "trainer.pt")

def models(run, start, stored):
    """Policy, critic and reference with their optimizers: models of their own, or with --lora three views of one."""
    settings, config, run.critic, run.critic_optimizer = run.settings, run.config, None, None
    load = lambda checkpoint: vlm.load(checkpoint, settings.device, settings.dtype, settings.gradient_checkpointing)
    run.policy = load(start if settings.lora else stored or start)
    if settings.lora:
        run.policy, judge, run.reference = vlm.lora(run.policy, settings.lora)
    run.reference = (run.reference if settings.lora else load(start)) if config.kl_coef else None
    run.actor_optimizer = vlm.adam([p for p in run.policy.enter().parameters() if p.requires_grad], config.actor_lr)
    if settings.credit == "critic":
        view = judge if settings.lora else run.policy if settings.critic == "shared" else None
        backbone = vlm.Backbone(view) if view else copy.deepcopy(run.policy.model.base_model)
        run.critic = sapo.SegmentCritic(backbone, run.policy.hidden_size).to(settings.device)
        run.critic_optimizer = vlm.adam(run.critic.parameters(), config.critic_lr)

def build(settings, config):
    """The run: models, optimizers, environments and progress; fresh, or from the newest checkpoint with --resume."""
    transformers.utils.logging.disable_progress_bar()
    if settings.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise SystemExit("--tensorboard needs a package that is not installed: pip install tensorboard")
    envs = [make_env(settings) for _ in range(settings.batch + 1)]
    if size := getattr(envs[0].unwrapped.task, "size", None):  # a data set ends: no row is judged twice
        settings.eval_episodes = min(settings.eval_episodes, size("eval"))
    baselines.check(settings, not {"image", "images"}.isdisjoint(envs[0].observation_space.spaces))
    folder = Path(settings.resume or f"{settings.runs}/{settings.name}")
    run = SimpleNamespace(settings=settings, config=config, folder=folder, written=0, envs=envs[1:], judge=envs[0])
    torch.manual_seed(settings.seed)
    started, stored = time.time(), newest(folder) if settings.resume else None
    warm = settings.model == "tiny" and (config.kl_coef or settings.lora or not stored)
    start = cached_warm_start(settings) if warm else settings.model
    if folder.exists() and not stored:  # an earlier run of the same name is kept, under the time of the move
        folder.rename(f"{folder}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}")
    run.progress = {"iteration": 0, "episodes": 0, "generated_tokens": 0, "seconds": 0.0, "threshold": None,
                    "skipped_in_a_row": 0, "warm_start_seconds": time.time() - started}
    models(run, start, stored)
    if stored:
        saved = torch.load(stored / "trainer.pt", map_location="cpu", weights_only=True)
        for part in STATEFUL:
            if saved[part]:
                getattr(run, part).load_state_dict(saved[part])
        for p, kept in zip(trained(run), saved["weights"], strict=False):
            p.data.copy_(kept)
        run.progress = saved["progress"]
        torch.set_rng_state(saved["rng"]), torch.cuda.set_rng_state_all(saved["cuda_rng"])
    run.folder.mkdir(parents=True, exist_ok=True)
    run.board = settings.tensorboard and importlib.import_module("torch.utils.tensorboard").SummaryWriter(run.folder)
    (run.folder / "config.json").write_text(json.dumps({"method": settings.method, "env": settings.env, "seed":
        settings.seed, "settings": asdict(settings), "config": asdict(config)}, indent=1))
    for file in (run.folder / "metrics.jsonl", run.folder / "samples.jsonl"):  # what came after the checkpoint goes
        lines = file.read_text().splitlines(keepends=True) if stored and file.exists() else []
        file.write_text("".join(x for x in lines if x.endswith("}\n")
                                and json.loads(x)["iteration"] <= run.progress["iteration"]))
    return run

# ----------------------------------------------------------------------------------------------------------- rollout
def ask(run, indices, split):
    """Reset an environment per index. -> (environments, the model's inputs)."""
    envs = run.envs[:len(indices)]
    seen = [e.reset(options={"index": int(i), "split": split})[0] for e, i in zip(envs, indices, strict=True)]
    first, place = np.unique(indices, return_index=True, return_inverse=True)[1:]  # a group's prompt is prepared once
    seen = [seen[i] for i in first]
    pictures = [list(map(Image.fromarray, o.get("images", [o["image"]] if "image" in o else []))) for o in seen]
    inputs = vlm.encode(run.policy, [o["prompt"] for o in seen], pictures, envs[0].unwrapped.task.system)
    return envs, vlm.take(inputs, torch.from_numpy(place))

def write(run, inputs, temperature, top_p=1.0, limit=None):
    """The policy's answers, of at most `limit` tokens. -> (tokens, mask, texts per token)."""
    stop = STOP if run.judge.unwrapped.task.cut(f"<answer>{STOP}")[1] else None
    tokens, mask = vlm.generate(run.policy, inputs, limit or run.settings.max_new_tokens, temperature, top_p, stop)
    run.written += int(mask.sum())
    return tokens, mask, vlm.token_texts(run.policy, tokens, mask, env.END)

def replay(envs, texts, ends, mask):
    """Pass each segment to its environment. -> rewards (B, T), each on its segment's last token; mask, less the tokens
    that an environment no longer took because the episode was over; last infos."""
    rewards, mask, infos = np.zeros(mask.shape, np.float32), mask.cpu().clone(), []
    for row, (e, pieces, cuts) in enumerate(zip(envs, texts, ends.tolist(), strict=True)):
        first, over = 0, False
        for last in [t for t in range(len(pieces)) if cuts[t]]:
            if over:
                mask[row, first:] = False
                break
            _, rewards[row, last], terminated, truncated, info = e.step("".join(pieces[first:last + 1]))
            first, over = last + 1, terminated or truncated
        infos.append(info)
    return torch.from_numpy(rewards).to(ends.device), mask.to(ends.device), infos

@torch.no_grad()
def collect(run, indices, split="train"):
    """One batch of responses, scored, cut, replayed and credited. -> a namespace: a sapo.Rollout and what made it."""
    settings, policy, temperature, tree = run.settings, run.policy, run.settings.temperature, None
    size = run.config.micro_batch or run.config.minibatch
    in_parts = lambda function: vlm.in_parts(function, size, inputs, tokens, mask)
    envs, inputs = ask(run, indices, split)
    after = lambda rows, prefix, lengths, limit: write(
        run, vlm.extended(vlm.take(inputs, rows), prefix, lengths), temperature, limit=limit)
    if settings.credit == "tree":
        prompt, tokens, mask, tree = baselines.grow(
            len(indices), settings, after, lambda text: bool(envs[0].unwrapped.task.cut(text)[1]))
        indices, texts = indices[prompt.numpy()], vlm.token_texts(policy, tokens, mask, env.END)
        envs, inputs = ask(run, indices, split)
    else:
        tokens, mask, texts = write(run, inputs, temperature)
    logp, entropy = in_parts(lambda *x: vlm.score(policy, *x, temperature))
    ref_logp = in_parts(lambda *x: vlm.score(run.reference, *x, temperature)[0]) if run.reference else None
    values = in_parts(lambda *x: vlm.prefix_values(run.critic, *x)) if run.critic else None
    if settings.cut == "causal" and run.progress["threshold"] is None:  # a first threshold needs a batch of its own
        run.progress["threshold"] = sapo.entropy_quantile(entropy, mask, run.config.top_k)
        return collect(run, indices, split)
    ends = baselines.cut(settings.cut, mask, entropy, logp, texts, run.config.top_k, run.progress["threshold"],
                         settings.segment_tokens)
    rewards, used, infos = replay(envs, texts, ends, mask)
    batch = SimpleNamespace(rollout=sapo.Rollout(used, ends & used, logp, rewards, values, ref_logp), tree=tree,
                            inputs=inputs, tokens=tokens, mask=mask, texts=texts, entropy=entropy, infos=infos,
                            envs=envs, indices=indices)

    def judge(row, prefix, text):
        run.judge.reset(options={"index": int(indices[row]), "split": split, "response": prefix})
        return run.judge.step(text)[1]
    baselines.give_credit(
        batch, settings, run.config, lambda rows, lengths, limit: after(rows, tokens[rows], lengths, limit)[2], judge,
        lambda mask, noised: vlm.score(policy, vlm.noised(inputs) if noised else inputs, tokens, mask, temperature)[0])
    return batch

def train_indices(settings, iteration):
    """Which training examples iteration 1, 2, ... sees: fresh ones each time, each `group` times for a group's mean."""
    count = settings.batch // (per := baselines.responses_per_prompt(settings))
    return np.repeat(np.arange(count) + count * (iteration - 1), 1 if settings.credit == "tree" else per)

def step(run) -> dict:
    """One iteration: collect, update. -> metrics of the last epoch."""
    progress, settings, before = run.progress, run.settings, run.written
    lr = run.config.actor_lr * 0.5 ** (progress["generated_tokens"] / settings.actor_half_life)
    lr = run.actor_optimizer.param_groups[0]["lr"] = lr * (progress["iteration"] >= settings.value_pretraining)
    progress["iteration"] += 1
    rollout = (batch := collect(run, train_indices(settings, progress["iteration"]))).rollout
    if settings.cut == "causal":
        progress["threshold"] = sapo.entropy_quantile(batch.entropy, rollout.mask, run.config.top_k)
    part = lambda rows: (vlm.take(batch.inputs, rows), batch.tokens[rows], batch.mask[rows])
    learned = rollout if batch.keep is None else baselines.masked(rollout, batch.keep, run.config)
    history = sapo.sapo_update(
        learned, lambda rows: vlm.score(run.policy, *part(rows), settings.temperature),
        run.critic and (lambda rows: vlm.prefix_values(run.critic, *part(rows))),
        run.actor_optimizer, run.critic_optimizer, run.config, skipped_in_a_row=progress["skipped_in_a_row"])
    progress["skipped_in_a_row"] = history[-1]["skipped_in_a_row"]
    progress |= (counts := {"episodes": progress["episodes"] + len(rollout.mask),
                            "generated_tokens": progress["generated_tokens"] + run.written - before})
    return {"accuracy": np.mean([i["correct"] for i in batch.infos]).item(),
            "reward": rollout.rewards.sum(1).mean().item(), **history[-1], **counts, "actor_lr": lr,
            "response_tokens": rollout.mask.sum(1).float().mean().item()}

# -------------------------------------------------------------------------------------------------------- evaluation
def evaluate(run, temperature=1.0, top_p=1.0) -> dict:
    """Accuracy on the first eval_episodes held-out examples, with its 95% interval."""
    right, n = 0, run.settings.eval_episodes
    for first in range(0, n, len(run.envs)):
        envs, inputs = ask(run, range(first, min(n, first + len(run.envs))), "eval")
        texts = write(run, inputs, temperature, top_p)[2]
        right += sum(e.step("".join(text))[4]["correct"] for e, text in zip(envs, texts, strict=True))
    return dict(zip(("eval_accuracy", "eval_low", "eval_high"), (right / n, *figures.wilson(right, n)), strict=True))

def samples(run, count=64):
    """Held-out responses with their credit, token by token, for figures.credit_map."""
    prompts = train_indices(run.settings, 1)  # as many, and as often, as in training; here of the held-out ones
    batch = collect(run, prompts[prompts < count], "eval")
    advantages, rollout = sapo.credit(batch.rollout, run.config)[0], batch.rollout
    reads = sapo.boundaries(rollout.ends, rollout.mask, run.config.value_at)  # elsewhere V is neither read nor trained
    values = None if rollout.values is None else sapo.segment_sum(rollout.values * reads, rollout.ends, rollout.mask)
    for row in np.unique(batch.indices, return_index=True)[1]:  # the first response to each prompt
        e, info = batch.envs[row].unwrapped, batch.infos[row]
        example, task = e.example, e.task
        tokens = batch.texts[row][:(n := int(rollout.mask[row].sum()))]
        token_of = [t for t, text in enumerate(tokens) for _ in text]  # character -> token
        response, png = "".join(tokens), io.BytesIO()
        if example.image:
            example.image.save(png, "PNG")
        spans = zip(task.step_spans(response), task.check_steps(example, response), strict=True)
        row_of = lambda x: None if x is None else [round(float(v), 4) for v in x[row, :n]]  # noqa: B023
        yield {"iteration": run.progress["iteration"], "example_id": info["example_id"], "method": run.settings.method,
               "cut": run.settings.cut, "prompt": example.question, "answer": example.answer,
               "image": example.image and base64.b64encode(png.getvalue()).decode(), "predicted": info["predicted"],
               "reward": float(rollout.rewards[row].sum()), "tokens": tokens, "entropy": row_of(batch.entropy),
               "values": row_of(values), "advantages": row_of(advantages),
               "ends": rollout.ends[row, :n].tolist(),
               "steps": [[token_of[a], token_of[b - 1], right] for (a, b), right in spans if b > a]}

# ---------------------------------------------------------------------------------------------------------- the loop
def log(run, name, *rows):
    """Append JSON lines to a file of the run."""
    with open(run.folder / name, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

def train(run) -> bool:
    """The loop. -> True when it came to its end, False after Ctrl-C; the checkpoint is written either way."""
    settings, progress, stop = run.settings, run.progress, []
    spent = lambda: 0 < settings.token_budget <= progress["generated_tokens"]
    previous = signal.signal(signal.SIGINT, lambda *_: (stop.append(1), signal.signal(signal.SIGINT, previous)))
    if "before" not in progress:
        progress["before"] = evaluate(run)
        log(run, "metrics.jsonl", {"iteration": 0, **progress["before"]})
        save(run)
    started = time.time() - progress["seconds"]
    bar = tqdm(total=settings.iterations, initial=progress["iteration"], desc=settings.method, disable=None)
    try:
        while progress["iteration"] < settings.iterations and not stop and not spent():
            row = {"iteration": progress["iteration"] + 1, **step(run)}
            progress["seconds"] = row["seconds"] = time.time() - started
            if row["iteration"] % settings.eval_every == 0 or row["iteration"] == settings.iterations or spent():
                row |= evaluate(run)
                log(run, "samples.jsonl", *samples(run))
            log(run, "metrics.jsonl", row)
            for key, x in row.items() if run.board else ():
                run.board.add_scalar(key, x, row["iteration"])
            bar.set_postfix_str(f"accuracy {row['accuracy']:.2f}, entropy {row.get('entropy', 0):.3f}", refresh=False)
            bar.update()
            if row["iteration"] % settings.checkpoint_every == 0 and row["iteration"] < settings.iterations:
                save(run)
        save(run)
    finally:
        bar.close(), signal.signal(signal.SIGINT, previous)
    return not stop

def finish(run):
    """Final evaluations, summary.json, pictures, and the table on the terminal."""
    settings, progress = run.settings, run.progress
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])  # evaluated, but after some resumes
    final = {x: last[x] for x in progress["before"]} if "eval_accuracy" in last else evaluate(run)
    seen = {"temperature 1": final, "temperature 0.6, top-p 0.95": evaluate(run, 0.6, 0.95), "greedy": evaluate(run, 0)}
    summary = {"command": run.command, "date": time.strftime("%Y-%m-%d"), "method": settings.method,
               "env": settings.env, "seed": settings.seed, "threads": torch.get_num_threads(), "versions": {
                   "python": sys.version.split()[0], **{x.__name__: x.__version__ for x in (torch, transformers)}},
               "warm_start_accuracy": progress["before"]["eval_accuracy"], "accuracy": final["eval_accuracy"],
               "accuracy_low": final["eval_low"], "accuracy_high": final["eval_high"],
               **{x: progress[x] for x in ("episodes", "generated_tokens", "seconds", "warm_start_seconds")},
               "peak_rss_mb": bench.peak_megabytes(), "eval_episodes": settings.eval_episodes, "evaluations": seen}
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1))
    figures.report(run.folder, progress["before"])

def main(argv=None):
    """The command line."""
    try:
        run = build(*parse(argv))
    except (ValueError, OSError, ImportError) as error:  # a checkpoint or a data set that is not what it should be
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    run.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        finished = train(run)
    except (FloatingPointError, RuntimeError) as error:  # the last checkpoint is from before it
        reason = bench.out_of_memory(run, error) if isinstance(error, RuntimeError) else error
        raise SystemExit(f"iteration {run.progress['iteration']}: {reason}") from None
    if not finished:
        return print(f"stopped at iteration {run.progress['iteration']}; python train.py --resume {run.folder} goes on")
    finish(run)

if __name__ == "__main__":
    main()
