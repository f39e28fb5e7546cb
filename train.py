"""Train a vision-language model with SAPO (arXiv:2605.01327), or with one of its neighbours.

    python train.py                                          # DiceSum, a tiny model, two CPU cores
    python train.py --method ppo --seed 1                    # PPO: tokens in place of segments
    python train.py --model FOLDER --env SAPO/Dataset-v0 --env_args path=mine.parquet --lora 16
    python train.py --resume runs/DiceSum-sapo-topk-seed0    # go on where it was cut

One iteration is the paper's Algorithm 1, and `iterate` shows its three parts:

1. collect  The policy writes a batch of responses, whole. They are scored (each token's
            log-probability and entropy) and cut into segments where entropy is high; `env.step`
            takes the segments one by one and pays the reward; the critic values each prefix.
            -> a Batch (rollout.py)
2. credit   GAE over segments turns rewards, less a KL penalty if there is one, and values into one
            advantage per segment, which all of its tokens get (`assign_credit`, sapo.credit)
3. update   Epochs of shuffled minibatches: ratio, clip, losses of policy and critic, backward
            passes and optimizer steps (sapo.sapo_update)

The rest of the file is what stands around it: the settings, what a run is, the loop with its
evaluations and checkpoints, how a run begins, and the command line. docs/metrics.md explains the
files under runs/<name>/ and every metric. Several devices are not supported.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import baselines
import checkpoint
import env  # noqa: F401  importing it registers the SAPO/... environments
import evaluation
import flags
import health
import models
import rollout
import sapo
import tiny
from lab import credit_page, explorer, figures
from sapo import setting
from tasks import GAMES, TASKS

# ----------------------------------------------------------------------------------- settings


@dataclass
class Settings(baselines.Method):
    """Task, model and budget. --method, --cut, --credit and what belongs to them are inherited from
    baselines.Method; the numbers of the algorithm are sapo.SAPOConfig's.

    The sizes for which something is made or written before an error could come end at 65536 and
    1048576: above what anybody trains with, and low enough that a slip of the hand is one line."""

    env: str = setting("SAPO/DiceSum-v0", "Gymnasium id of the task")
    env_args: list[str] = setting([], "keywords of the task: n=9, length=12 grid=5")
    model: str = setting("tiny", "'tiny', or a checkpoint: a directory or a hub name")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the weights: float32, or bfloat16 (then Adam keeps float32 copies)"
    )
    lora: int = setting(
        0,
        "rank of LoRA adapters, by which policy, critic and reference share one backbone; 0: none",
        "[0, 65536]",
    )
    critic: Literal["separate", "shared"] = setting(
        "separate",
        "without --lora: separate is a copy of the backbone, shared a head on the policy's",
    )
    critic_hears: Literal["nothing", "logp"] = setting(
        "logp",
        "what the critic is told beside the text: nothing (the paper), or how unlikely the "
        "policy's least likely token so far was (ours)",
    )
    gradient_checkpointing: bool = setting(
        False, "keep fewer activations and make them again for the gradient"
    )
    seed: int = setting(
        0, "of the weights, the demonstrations, the sampling and the shuffling", "[0, 4294967295]"
    )
    name: str = setting("", "the run's folder under --runs; made from the settings when empty")
    runs: str = setting("runs", "folder of all runs and of the warm-start cache")
    resume: str = setting(
        "", "folder of a run to continue; flags given beside it change its settings"
    )
    iterations: int = setting(68, "rollouts to learn from", "[0, inf)")
    token_budget: int = setting(
        0,
        "stop also when so many tokens were generated, continuations and trees included; 0: never",
        "[0, inf)",
    )
    batch: int = setting(128, "responses per rollout", "[1, 65536]")
    generate_batch: int = setting(
        0,
        "responses that are written at a time, 0: all of a rollout; bounds the memory of keys and "
        "values; another split draws other samples",
        "[0, inf)",
    )
    max_new_tokens: int = setting(64, "longest response, in tokens", "[1, 1048576]")
    temperature: float = setting(1.0, "of sampling and scoring in training", "[0.01, 100]")
    warm_start_steps: int = setting(
        600, "supervised steps on noisy demonstrations before RL; 0 for none", "[0, inf)"
    )
    warm_start_batch: int = setting(64, "demonstrations per step", "[1, 65536]")
    warm_start_lr: float = setting(5e-3, "peak learning rate of the warm start", "(0, 1]")
    habits: float = setting(
        0.6,
        "how often a demonstration follows a bad habit of the task where there is one; 0: none",
        "[0, 1]",
    )
    error_rate: float = setting(
        0.02, "probability that a demonstrated step slips besides", "[0, 1]"
    )
    actor_half_life: float = setting(
        1.5e5, "generated tokens in which --actor_lr falls by half; inf: it stays", "(0, inf]"
    )
    eval_every: int = setting(
        30, "iterations between held-out evaluations at temperature 1", "[1, inf)"
    )
    eval_episodes: int = setting(512, "held-out episodes per evaluation", "[1, 1048576]")
    checkpoint_every: int = setting(30, "iterations between checkpoints", "[1, inf)")
    tensorboard: bool = setting(False, "also write TensorBoard event files")


# -------------------------------------------------------------------------------------- a run


@dataclass
class Progress:
    """How far a run has come: the part of its state that a checkpoint keeps as plain numbers."""

    iteration: int = 0  # of the last rollout that was collected
    episodes: int = 0  # responses in them
    generated_tokens: int = 0  # by the policy in training; continuations and trees count too
    seconds: float = 0.0  # of training, with the evaluations in between
    warm_start_seconds: float = 0.0
    threshold: float | None = None  # --cut causal: entropy (nats) above which a segment ends
    skipped_in_a_row: int = 0  # minibatches without a finite loss, up to now
    evaluations_before: dict | None = None  # held-out accuracy before training, by decoding
    ailing_since: dict[str, int] = field(default_factory=dict)  # see health.warnings
    start: str | None = None  # models.fingerprint of the weights that training began from


@dataclass
class Run:
    """A training run: its settings, its models, its environments, and how far it has come."""

    settings: Settings
    config: sapo.SAPOConfig
    folder: Path  # of its files
    models: models.Models  # policy, critic and reference with their optimizers
    envs: list[gym.Env]  # one per response of a batch: each holds the example it asked about
    grading_env: gym.Env  # one more: it grades Monte-Carlo continuations and knows the task
    progress: Progress
    board: Any = None  # a TensorBoard writer, with --tensorboard
    tokens_written: int = 0  # by the policy since the process began, in evaluations too
    command: str = ""  # the command line, for summary.json


# ------------------------------------------------------------------------------ one iteration


@dataclass
class Credit:
    """What each token of a batch is praised or blamed for, (B, T) each."""

    advantages: Tensor  # of every token that the environments took
    returns: Tensor | None  # what the critic's values are trained towards; None: no critic
    loss_mask: Tensor | None = None  # the tokens that the loss reads; None: all of them


def iterate(run) -> dict:
    """One iteration (Algorithm 1): collect, credit, update. -> metrics of the rollout and of the
    update. Before an evaluation, samples.jsonl gets what was learned from."""
    settings, progress = run.settings, run.progress
    actor_lr = current_actor_lr(run)  # before the count goes up
    run.models.actor_optimizer.param_groups[0]["lr"] = actor_lr  # it has one group
    progress.iteration += 1

    batch = rollout.collect(run, rollout.train_indices(settings, progress.iteration))
    credit = assign_credit(run, batch)
    history = update(run, batch, credit)

    progress.skipped_in_a_row = history[-1]["skipped_in_a_row"]
    progress.episodes += len(batch.tokens)
    progress.generated_tokens += batch.generated_tokens
    if settings.cut == "causal":
        progress.threshold = sapo.entropy_quantile(
            batch.entropy, batch.rollout.mask, run.config.top_k
        )
    if is_evaluated(run):
        log(run, "samples.jsonl", *learned_from(run, batch, credit))
    return {
        "accuracy": np.mean([info["correct"] for info in batch.infos]).item(),
        "reward": batch.rollout.rewards.sum(1).mean().item(),
        **sapo.credit_metrics(batch.rollout, credit.advantages, run.config),
        **sapo.update_metrics(history),
        "episodes": progress.episodes,
        "generated_tokens": progress.generated_tokens,
        "actor_lr": actor_lr,
        "response_tokens": batch.rollout.mask.sum(1).float().mean().item(),
    }


def assign_credit(run, batch) -> Credit:
    """SAPO's credit (PPO's and VC-PPO's too), or, without a critic, the method's own."""
    if run.settings.credit == "critic":
        advantages, returns = sapo.credit(batch.rollout, run.config)
        return Credit(advantages, returns)
    return credit_without_critic(run, batch)


def credit_without_critic(run, batch) -> Credit:
    """Credit by sampled values, a tree of responses, or a group of them: see baselines.py."""
    settings, config, episodes = run.settings, run.config, batch.rollout
    if settings.credit == "continuations":  # SPO-chain, VinePPO: sampled values stand where V would
        advantages, _ = sapo.credit(episodes, config)
        improbable = None
        if settings.loss_below < 1:  # SPO's probability mask
            improbable = episodes.mask & (episodes.logp.exp() < settings.loss_below)
        return Credit(advantages, None, improbable)

    rewards = baselines.response_rewards(episodes, config)  # (B,), less the KL penalty
    if settings.credit == "tree":  # SPO-tree
        advantages, edges = baselines.tree_credit(
            batch.tree, rewards, episodes.mask, settings.tree_advantage
        )
        return Credit(advantages, None, edges)

    group_advantages = baselines.group_advantages(rewards, settings.group)  # (B,)
    advantages = group_advantages[:, None] * episodes.mask  # (B, T): GRPO, GSPO
    if settings.credit == "roles":  # SRPO
        dropped = rollout.role_signal(run, batch)  # nats, without what each token rests on
        advantages = advantages * baselines.role_weights(
            dropped, episodes.mask, settings.role_temperature
        )
    return Credit(advantages, None)


def update(run, batch, credit) -> list[dict]:
    """Epochs of minibatches, each scored and valued anew by the models as they move. -> the metrics
    of each epoch.

    The models read all that was written; tokens after an episode's end get no loss. At a rate of 0,
    as in value pre-training, the policy is left alone, and so are its optimizer's moments.
    """
    policy, critic = run.models.policy, run.models.critic
    # What the loss reads: for SPO's methods some of the tokens only; for all others this changes
    # nothing
    learned, advantages = baselines.restrict(batch.rollout, credit.advantages, credit.loss_mask)

    def score(rows):
        return rollout.scores_of(run, policy, batch, rows)

    def value(rows):
        return rollout.values_of(critic, batch, batch.rollout.logp, rows)

    return sapo.sapo_update(
        learned,
        advantages,
        credit.returns,
        score if run.models.actor_optimizer.param_groups[0]["lr"] else None,
        None if critic is None else value,
        (run.models.actor_optimizer, run.models.critic_optimizer),
        run.config,
        skipped_in_a_row=run.progress.skipped_in_a_row,
    )


def current_actor_lr(run) -> float:
    """--actor_lr, halved with every --actor_half_life generated tokens, and 0 in the first
    --value_pretraining iterations: then the policy stays, and only the critic learns."""
    if run.progress.iteration < run.settings.value_pretraining:
        return 0.0
    half_lives = run.progress.generated_tokens / run.settings.actor_half_life
    return run.config.actor_lr * 0.5**half_lives


# ----------------------------------------------------------------------------------- the loop


def train(run) -> bool:
    """The loop. -> True when it came to its end, False after Ctrl-C or SIGTERM.

    The checkpoint is written either way.
    """
    settings, progress = run.settings, run.progress
    with stop_as_a_flag() as interrupted:
        if progress.evaluations_before is None:
            evaluate_before(run)
        started = time.time() - progress.seconds
        bar = tqdm(
            total=settings.iterations,
            initial=progress.iteration,
            desc=settings.method,
            disable=None,
        )
        with bar:
            while not is_done(run) and not interrupted():
                metrics = iterate(run)
                progress.seconds = time.time() - started
                row = {"iteration": progress.iteration, **metrics, "seconds": progress.seconds}
                after_iteration(run, bar, row)
            checkpoint.save(run)
        return is_done(run)  # also when Ctrl-C came in the last iteration


def evaluate_before(run) -> None:
    """How good is the policy before it is trained? It leaves the training's random stream alone,
    but for the evaluation at temperature 1."""
    start = evaluation.evaluate(run)
    with torch.random.fork_rng(devices=checkpoint.own_card(run.settings.device)):
        run.progress.evaluations_before = evaluation.by_decoding(run, start)
        before = samples(run)
    log(run, "metrics.jsonl", {"iteration": 0, **start})
    log(run, "samples.jsonl", *before)
    checkpoint.save(run)


def after_iteration(run, bar, row) -> None:
    """Evaluate and save where it is time, log the iteration's metrics, show them, and warn."""
    progress, settings = run.progress, run.settings
    if is_evaluated(run):
        row |= evaluation.evaluate(run)
        log(run, "samples.jsonl", *samples(run))
    log(run, "metrics.jsonl", row)
    show(run, bar, row)
    for line in health.warnings(row, progress.ailing_since):
        bar.write(line)
    due = progress.iteration % settings.checkpoint_every == 0
    if due and progress.iteration < settings.iterations:
        checkpoint.save(run)


def is_evaluated(run) -> bool:
    """Does an evaluation follow the iteration that was made last?"""
    return run.progress.iteration % run.settings.eval_every == 0 or is_done(run)


def is_done(run) -> bool:
    """Has the run made its iterations, or spent its tokens?"""
    if run.progress.iteration >= run.settings.iterations:
        return True
    return 0 < run.settings.token_budget <= run.progress.generated_tokens


def log(run, name, *rows) -> None:
    """Append JSON lines to a file of the run."""
    checkpoint.append_lines(run.folder / name, rows)


def show(run, bar, row) -> None:
    """An iteration's metrics on the progress bar, and on TensorBoard if there is one."""
    entropy = row.get("entropy", 0)  # missing when every minibatch was skipped
    bar.set_postfix_str(f"accuracy {row['accuracy']:.2f}, entropy {entropy:.3f}", refresh=False)
    bar.update()
    if run.board is not None:
        for name, number in row.items():
            run.board.add_scalar(name, number, row["iteration"])


def samples(run) -> list[dict]:
    """Held-out responses with their credit, token by token: rows of samples.jsonl."""
    batch = rollout.collect(run, evaluation.sample_indices(run.settings), "eval")
    return evaluation.samples(run, batch, assign_credit(run, batch).advantages)


@torch.no_grad()
def learned_from(run, batch, credit) -> list[dict]:
    """Rows of samples.jsonl of a rollout that the policy has just learned from: with the
    log-probabilities that it now gives to the same tokens, and so the ratio."""
    new_logp, _ = rollout.score(run, run.models.policy, batch)
    return evaluation.samples(run, batch, credit.advantages, new_logp, count=16)


def finish(run) -> None:
    """Final evaluations, summary.json, the table on the terminal, the pictures and the page."""
    summary = evaluation.summarise(run, evaluation.final_evaluations(run))
    checkpoint.write_json(run.folder / "summary.json", summary)
    evaluation.print_summary(summary, run.folder)
    for draw in (explorer.explorer, credit_page.credit_map, figures.learning_curve):
        try:
            draw(run.folder)
        except (ImportError, ValueError) as reason:  # no matplotlib: the run is no less finished
            print(reason)


# --------------------------------------------------------------------------- how a run begins

# What gym.make takes for itself, and what shows an episode: nothing of it is the task's
NOT_OF_THE_TASK = {"id", "max_episode_steps", "disable_env_checker", "render_mode"}


def make_env(settings) -> gym.Env:
    """One environment, from --env and --env_args: values as in JSON, or else words. A task that
    demonstrates gets --habits, too. ValueError for an unknown id, and for keywords that the task
    refuses."""
    try:
        keywords = dict(pair.split("=", 1) for pair in settings.env_args)
        if len(keywords) < len(settings.env_args):
            raise ValueError("a name stands there twice")
        for name in NOT_OF_THE_TASK & keywords.keys():
            raise ValueError(f"{name} is no keyword of a task; leave it out")
        keywords = {name: flags.value_of(name, word) for name, word in keywords.items()}
        module, _, name = settings.env.rpartition(":")
        if module:  # "my_module:MyTask-v0" registers itself on import
            importlib.import_module(module)
        spec = gym.registry.get(name)
        of_spec = {} if spec is None else spec.kwargs
        task_name = of_spec.get("task") or of_spec.get("game")
        if isinstance(task_name, str) and task_name in {**TASKS, **GAMES}:
            keywords = {"habits": settings.habits} | keywords
        made = gym.make(settings.env, disable_env_checker=True, **keywords)
        if not hasattr(made.unwrapped, "task"):
            raise ValueError("its actions are no segments of text")
        return made
    except (ValueError, TypeError, ImportError, gym.error.Error) as error:
        raise ValueError(
            f"--env {settings.env} --env_args {' '.join(settings.env_args)}: expected a known id "
            f"and name=value pairs, such as n=9 ({error})"
        ) from None


def build(settings, config, command="") -> Run:
    """A run: fresh, or from its newest checkpoint with --resume.

    ValueError for settings that do not fit together, OSError for a model that is not there,
    ImportError for a missing package.
    """
    transformers.utils.logging.disable_progress_bar()
    check_device(settings.device)
    if settings.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ImportError(
            "--tensorboard needs a package that is not installed: pip install tensorboard"
        )
    grading_env = make_env(settings)
    task = grading_env.unwrapped.task
    settings = asked_once(settings, task)
    for split in ("train", "eval"):  # whatever is wrong with them is seen before any long work
        task.example_at(0, split)
    observed = grading_env.observation_space.spaces
    baselines.check(
        settings, has_picture="image" in observed or "images" in observed, replies=task.replies
    )
    envs = [make_env(settings) for _ in range(settings.batch)]

    folder = folder_of(settings)
    torch.manual_seed(settings.seed)
    started = time.time()
    saved = checkpoint.newest(folder) if settings.resume else None
    start = settings.model  # the checkpoint that training begins, or once began, from
    # Who resumes has the policy's own weights, and needs the start only as the reference of a KL
    # penalty or under LoRA's adapters
    needs_start = saved is None or config.kl_coef or settings.lora
    if settings.model == "tiny" and needs_start:
        start = tiny.cached_warm_start(task, settings)
    progress = Progress(warm_start_seconds=time.time() - started)
    run_models = models.build(settings, config, start, saved)
    if saved is not None:
        progress = Progress(**checkpoint.restore(run_models, saved, settings.device))
        # The checkpoint has the rates of its time. The policy's is set anew in every iteration
        if run_models.critic_optimizer is not None:
            run_models.critic_optimizer.param_groups[0]["lr"] = config.critic_lr
    if needs_start:
        check_start(settings, run_models, progress)

    if saved is None:  # nothing can fail any more that would leave an earlier run without its name
        checkpoint.set_aside(folder)
    prepare_folder(folder, settings, config, progress)
    board = None
    if settings.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        board = SummaryWriter(folder)
    return Run(
        settings, config, folder, run_models, envs, grading_env, progress, board, command=command
    )


def asked_once(settings, task) -> Settings:
    """Settings with no more held-out questions than there are: a data set ends, and no row of it is
    asked twice."""
    held_out = task.size("eval")
    if held_out is None:
        return settings
    return replace(settings, eval_episodes=min(settings.eval_episodes, held_out))


def check_start(settings, run_models, progress) -> None:
    """ValueError where a run resumes on another start than it began from: its adapters were learned
    for the weights of that one, and its KL penalty was measured from them.

    A new run notes its start. A checkpoint from before starts were noted is taken as it is.
    """
    found = models.fingerprint(run_models.reference or run_models.policy)  # neither is trained yet
    if settings.resume and progress.start not in (None, found):
        raise ValueError(
            f"--resume {settings.resume}: --model {settings.model} has other weights here than "
            "those that the run began from, on which its adapters or its KL penalty rest; leave "
            "out --model and --device, or put the run's own start back (of tiny: runs/cache)"
        )
    if not settings.resume:
        progress.start = found


def folder_of(settings) -> Path:
    """Where a run's files are."""
    return Path(settings.resume or f"{settings.runs}/{settings.name}")


def check_device(name) -> None:
    """ValueError for a device that torch does not know, this machine does not have, or that does
    not compute, as meta."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # a CPU build asserts that CUDA is there
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; expected cpu, or a card as cuda") from None


def prepare_folder(folder, settings, config, progress) -> None:
    """Write config.json, and let the logs hold what the run's progress says."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "method": settings.method,
        "env": settings.env,
        "seed": settings.seed,
        "settings": asdict(settings),
        "config": asdict(config),
    }
    kept = {}  # file -> its lines up to the checkpoint; all are read before one is written
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = folder / name
        file.touch()
        kept[file], iterations = checkpoint.lines_up_to(file, progress.iteration)
        was_logged = progress.evaluations_before is not None and name == "metrics.jsonl"
        if was_logged and progress.iteration not in iterations:
            raise ValueError(
                f"{file}: no row of iteration {progress.iteration}, that of the checkpoint; put "
                "it back from a copy, or start the run again without --resume"
            )
    for file, lines in kept.items():
        checkpoint.write_whole(file, "".join(lines))
    checkpoint.write_json(folder / "config.json", content)


# ------------------------------------------------------------------------------------ signals

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


@contextlib.contextmanager
def signals_handled(handler) -> Iterator[Callable[[], None]]:
    """`with signals_handled(handler) as restore`: Ctrl-C, and the SIGTERM that clusters send, call
    it, until the block ends or restore() is called. Only a main thread may have handlers: in
    another nothing changes."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for kind, earlier in previous.items():
            signal.signal(kind, earlier)

    for kind in previous:
        signal.signal(kind, handler)
    try:
        yield restore
    finally:
        restore()


@contextlib.contextmanager
def stop_as_a_flag() -> Iterator[Callable[[], bool]]:
    """`with stop_as_a_flag() as interrupted`: the first signal makes interrupted() true and no
    more, so that an iteration ends in order; a second one interrupts at once."""
    received = []

    def on_signal(*_):
        received.append(True)
        restore()

    with signals_handled(on_signal) as restore:
        yield lambda: bool(received)


def interrupt(*_) -> None:
    """A handler that interrupts at once, wherever the program is: SIGTERM as Ctrl-C does."""
    raise KeyboardInterrupt


# --------------------------------------------------------------------------- the command line


def stored_settings(folder) -> dict:
    """The settings of a run's config.json, all of them in one dict; those that are new since then
    are left out. ValueError, naming the file, for anything that the command line would refuse."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"--resume {folder}: no config.json there; give the folder of a run, runs/<name>"
        )
    stored = {}
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        for key, kind in (("settings", Settings), ("config", sapo.SAPOConfig)):
            part = content.get(key)
            if not isinstance(part, dict):
                raise ValueError(f"{key}: {part!r}, expected an object")
            for name in part.keys() - {known.name for known in fields(kind)}:
                raise ValueError(f"{name}: not a setting of this version")
            part = with_infinity(part, kind)
            kind(**part)  # checks each of them
            stored |= part
    except ValueError as error:
        raise ValueError(
            f"{file}: {error}; put it back from a copy, or start the run again without --resume"
        ) from None
    return stored


def with_infinity(part, kind) -> dict:
    """Settings as they were before config.json had a word for infinity (checkpoint.as_json). A
    setting that is no number may be that word itself."""
    hints = get_type_hints(kind)
    values = {}
    for name, value in part.items():
        is_number = float in (hints[name], *get_args(hints[name]))
        values[name] = math.inf if is_number and value == "inf" else value
    return values


def given_flags(argv=None) -> dict:
    """What the command line sets, {name: value}."""
    return flags.given(argv, (Settings, sapo.SAPOConfig), __doc__.split("\n\n")[0])


def made_of(values) -> tuple[Settings, sapo.SAPOConfig]:
    """Settings of these values, and of defaults. ValueError for a value that may not be."""
    parts = []
    for kind in (Settings, sapo.SAPOConfig):
        names = {known.name for known in fields(kind)}
        parts.append(kind(**{name: value for name, value in values.items() if name in names}))
    return tuple(parts)


def parse(argv=None) -> tuple[Settings, sapo.SAPOConfig]:
    """The command line -> settings.

    --method brings its own defaults, --resume those of that run's config.json; flags win.
    """
    given = given_flags(argv)
    asked, _ = made_of(given)  # which checks every value before one is used
    if asked.resume:
        stored = stored_settings(asked.resume)
        settings, config = made_of(stored | given)
        flags.check_resumed(settings, config, stored)
        # A run's folder may come from elsewhere, and must not choose what is imported
        if ":" in settings.env and "env" not in given:
            raise ValueError(
                f"--resume {settings.resume}: its environment is {settings.env}, and a module is "
                f"imported only where it is named; add --env {settings.env}"
            )
    else:
        settings, config = made_of(baselines.SETTINGS[asked.method] | given)
    settings.name = settings.name or flags.default_name(settings)
    flags.check_folder(settings)
    return settings, config


def main(argv=None) -> None:
    """The command line: begin a run, and train it to its end. SystemExit, with one line, for wrong
    input, for a run that failed, and (status 130) for an interruption."""
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    run = None
    try:
        with signals_handled(interrupt), contextlib.ExitStack() as lock:
            run = begin(argv, command, lock)
            run_to_its_end(run)
    except KeyboardInterrupt:
        if run is None:
            print("interrupted before training began; give the same command again")
        else:
            print(f"interrupted in iteration {run.progress.iteration}; {how_to_go_on(run)}")
        raise SystemExit(INTERRUPTED) from None


def begin(argv, command, lock) -> Run:
    """The run that the command line asks for. lock, an ExitStack, holds its folder.

    SystemExit, with one line, for whatever is wrong.
    """
    try:
        settings, config = parse(argv)
        baselines.check_numbers(settings, config)
        note = baselines.note(settings, config, given_flags(argv))
        if note:
            print(flags.one_line(note))
        lock.enter_context(checkpoint.held(folder_of(settings), settings.runs))
        try:
            return build(settings, config, command)
        except (RuntimeError, MemoryError) as error:
            raise OSError(models.explain_out_of_memory_at_start(settings, error)) from None
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.py: {flags.one_line(error)}") from error


def how_to_go_on(run) -> str:
    """The command that goes on with a run that has not come to its end."""
    if not checkpoint.is_there(run.folder):
        return "there is no checkpoint yet: the same command begins it again"
    words = ["python", "train.py", "--resume", str(run.folder)]
    if ":" in run.settings.env:  # see `parse`
        words += ["--env", run.settings.env]
    return f"{shlex.join(words)} goes on from the last checkpoint"


def run_to_its_end(run) -> None:
    """Train, and write what came out. SystemExit, with one line, where something prevents it."""
    try:
        if train(run):
            finish(run)
        else:
            print(f"stopped at iteration {run.progress.iteration}; {how_to_go_on(run)}")
    except (OSError, FloatingPointError, sapo.NaNError, RuntimeError, MemoryError) as error:
        where, reason = f"iteration {run.progress.iteration}", reason_of(run, error)
        raise SystemExit(flags.one_line(f"{where}: {reason}; {how_to_go_on(run)}")) from error


def reason_of(run, error) -> str:
    """What ended a run, in a line. A RuntimeError that is not about memory is raised again."""
    if isinstance(error, sapo.NaNError):
        return f"{error}: the weights are broken, lower the learning rates"
    if isinstance(error, OSError | FloatingPointError):  # a full disk, a reward that is infinite
        return str(error)
    return models.explain_out_of_memory(run.models, run.settings, run.config, error)


if __name__ == "__main__":
    main()
