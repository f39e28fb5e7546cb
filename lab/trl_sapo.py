"""Train on one process or on many, through TRL and Accelerate (lab/trl_trainer.py).

    python -m lab.trl_sapo --seed 0     # DiceSum, the tiny model -> results/trl-DiceSum-seed0.json
    accelerate launch --num_processes 8 -m lab.trl_sapo --device cuda --model FOLDER

The flags are train.py's, for tasks of one turn: --batch and --minibatch count the responses of all
processes together, --micro_batch those of one process at once. What --trl gives are GRPOConfig's
settings. The policy and critic.pt end under runs/<name>-trl/. docs/models.md has more.
"""

import importlib.metadata
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import baselines
import checkpoint
import env  # noqa: F401  importing it registers the SAPO/... environments
import evaluation
import flags
import models
import rollout
import sapo
import tiny
import train
import vlm
from lab.common import writable

RESULTS = Path(__file__).parents[1] / "results"
# transformers' Trainer skips no step, so there is no KL bound. A flag wins over it
USUAL = {"target_kl": float("inf")}
# Flags of train.py that nothing here would read
NOT_READ = (
    *("method", "cut", "credit", "critic", "resume", "generate_batch", "actor_half_life"),
    *("value_pretraining", "token_budget", "eval_every", "checkpoint_every", "tensorboard"),
    *("group", "branching", "segment_tokens", "tree_advantage", "continuations", "loss_below"),
    "role_temperature",
)
LOGGED = ("step", "reward", "clip_fraction", "approx_kl", "value_loss", "explained_variance")


@dataclass
class Own:
    """The flags that train.py has not."""

    trl: list[str] = sapo.setting([], "name=value: GRPOConfig's settings")
    out: str = sapo.setting("", "the file of the outcome, if not results/trl-<task>-seed<n>.json")


# ---------------------------------------------------------------- an environment, as TRL takes it


def rows_of(episode, count):
    """The first `count` training examples of an environment, as a data set for TRL: the turns of
    each prompt, its pictures, its number.

    It holds the numbers alone: prompts and pictures are made when a batch is asked for.
    """
    import datasets  # which comes with TRL

    def turn(role, text, pictures=()):
        parts = [{"type": "image"} for _ in pictures]
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    def rows(batch):
        prompts, images = [], []
        system = episode.unwrapped.task.system
        for index in batch["index"]:
            observation, _ = episode.reset(options={"index": index})
            images.append(rollout.pictures_of(observation))
            user = turn("user", observation["prompt"], images[-1])
            prompts.append([turn("system", system), user] if system else [user])
        return {"prompt": prompts, "images": images, "index": batch["index"]}

    return datasets.Dataset.from_dict({"index": list(range(count))}).with_transform(rows)


def rewards_of(episode):
    """A reward function as TRL calls it: what an environment pays for each whole response."""

    def reward(completions, index, **_):
        rewards = []
        for completion, number in zip(completions, index, strict=True):
            episode.reset(options={"index": number})
            rewards.append(episode.step(completion[0]["content"])[1])
        return rewards

    return reward


# -------------------------------------------------------------------------------------- a run


def build(settings, config, options=None, folder="runs/trl"):
    """A run to evaluate, and the trainer of its policy. -> (train.Run, SegmentAlignedTrainer)

    settings, config: as of `parse`; options: of GRPOConfig; folder: of TRL's checkpoints.
    ValueError for settings that do not fit, ImportError for a missing package.
    """
    from lab import trl_trainer  # which needs TRL, and names it

    train.check_device(settings.device)
    from accelerate import PartialState  # which comes with TRL

    state = PartialState(cpu=settings.device == "cpu")
    # Evaluations write as many responses at once as there are environments: as many as TRL does
    at_once = max(settings.batch // state.num_processes, 1)
    envs = [train.make_env(settings) for _ in range(at_once + 1)]
    if envs[0].unwrapped.task.replies:
        raise ValueError(f"--env {settings.env}: expected a task of one turn")
    settings = train.asked_once(settings, envs[0].unwrapped.task)
    try:
        args = trl_trainer.engine_config(
            config,
            settings.batch,
            state.num_processes,
            max_completion_length=settings.max_new_tokens,
            temperature=settings.temperature,
            gradient_checkpointing=settings.gradient_checkpointing,
            seed=settings.seed,
            use_cpu=settings.device == "cpu",
            output_dir=str(folder),
            **options or {},
        )
    except TypeError as error:  # GRPOConfig has no such name, or a flag sets it already
        raise ValueError(f"--trl {options}: {error}") from error
    policy = opened(envs[0].unwrapped.task, settings, state.device)
    if not args.use_vllm:
        banned = policy.banned.nonzero().flatten().tolist()
        args.generation_kwargs = {"suppress_tokens": banned} | (args.generation_kwargs or {})
    prompts = settings.iterations * settings.batch // args.num_generations
    trainer = trl_trainer.SegmentAlignedTrainer(
        policy.model,
        rewards_of(envs[0]),
        args,
        config,
        hears=settings.critic_hears == "logp",
        train_dataset=rows_of(envs[0], prompts),
        processing_class=policy.processor,
        peft_config=models.lora_config(policy, settings.lora) if settings.lora else None,
    )
    of_run = models.Models(policy, None, None, None, None)
    progress = train.Progress()
    run = train.Run(settings, config, Path(folder), of_run, envs[1:], envs[0], progress)
    return run, trainer


def opened(task, settings, device) -> vlm.VLM:
    """The policy that training begins from."""
    start = tiny.cached_warm_start(task, settings) if settings.model == "tiny" else settings.model
    with models.named_by_its_flag():
        return vlm.load(start, str(device), settings.dtype)


def learn(run, trainer) -> dict:
    """Train. -> held-out accuracies before and after, and a few metrics of each rollout.

    Where weights are sharded, nothing is evaluated.
    """

    def accuracies():
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return None
        with trainer.accelerator.autocast():  # in the precision of training
            return evaluation.by_decoding(run, evaluation.evaluate(run))

    before = accuracies()
    begin = time.time()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    of_rollouts = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "processes": trainer.accelerator.num_processes,
        "rollouts": run.settings.iterations,
        "seconds": round(time.time() - begin, 1),
        "evaluations_before": before,
        "evaluations": accuracies(),
        "log": [{name: row[name] for name in LOGGED} for row in of_rollouts],
    }


def run_to_its_end(run, trainer) -> dict:
    """`learn`. SystemExit, with one line, where something prevents it that has a remedy."""
    try:
        return learn(run, trainer)
    except torch.OutOfMemoryError as error:
        advice = "lower --micro_batch, then --batch or --max_new_tokens; or add --lora 16"
        reason = f"out of memory: {advice} ({flags.one_line(error)})"
    except (OSError, FloatingPointError, sapo.NaNError) as error:
        reason = train.reason_of(run, error)
    raise SystemExit(flags.one_line(f"step {trainer.state.global_step}: {reason}"))


# --------------------------------------------------------------------------- the command line


def parse(words):
    """-> (train.Settings, SAPOConfig, what --trl gives, the file of the outcome)."""
    given = flags.given(words, (Own, train.Settings, sapo.SAPOConfig), __doc__.split("\n\n")[0])
    for name in NOT_READ:
        if name in given:
            raise ValueError(f"--{name} {given[name]}: not read here; leave it out")
    settings, config = train.made_of(baselines.SETTINGS["sapo"] | USUAL | given)
    settings.name = settings.name or flags.default_name(settings)
    flags.check_folder(settings)
    float32 = "float32, as TRL's Adam loses the small steps of others; or --lora"
    for name, fits, expected in (
        ("iterations", settings.iterations > 0, "at least 1"),
        ("device", settings.device in ("cpu", "cuda"), "cpu, or cuda: Accelerate picks the card"),
        ("dtype", settings.dtype == "float32" or settings.lora, float32),
    ):
        if not fits:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected {expected}")
    options = {}
    for pair in given.get("trl", []):
        name, equals, word = pair.partition("=")
        if not equals:
            raise ValueError(f"--trl {pair}: expected name=value")
        options[name] = flags.value_of(name, word)
    task = settings.env.split("/")[-1].split("-")[0]
    file = given.get("out", RESULTS / f"trl-{task}-seed{settings.seed}.json")
    return settings, config, options, Path(file)


def main(argv=None):
    """The command line. Whatever is wrong with the input becomes one line here."""
    words = sys.argv[1:] if argv is None else argv
    try:
        settings, config, options, file = parse(words)
        writable(file)  # before hours of work
        folder = Path(settings.runs) / f"{settings.name}-trl"
        run, trainer = build(settings, config, options, folder)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"python -m lab.trl_sapo: {flags.one_line(error)}") from error
    outcome = run_to_its_end(run, trainer)
    if not trainer.accelerator.is_main_process:
        return
    packages = ("torch", "transformers", "trl", "accelerate")
    made = {
        "command": shlex.join(["python", "-m", "lab.trl_sapo", *words]),
        "seed": settings.seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    checkpoint.write_json(file, made | outcome)
    print(f"written to {file}, the policy to {folder}")


if __name__ == "__main__":
    main()
