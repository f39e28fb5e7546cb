"""Train on one process or on many, through TRL and Accelerate (lab/trl_trainer.py).

    python -m lab.trl_sapo --seed 0     # DiceSum, the tiny model -> results/trl-DiceSum-seed0.json
    accelerate launch --num_processes 8 -m lab.trl_sapo --device cuda --model FOLDER

The flags are train.py's, for tasks of one turn: --batch and --minibatch count the responses of all
processes together, --micro_batch those of one process at once. What --trl gives are GRPOConfig's
settings. The policy's rate falls as TRL's scheduler says (linearly to 0), not by --actor_half_life;
the critic is a head (--critic is not read); --eval_every and checkpoints are TRL's to set, too.
The policy and critic.pt end under runs/<name>-trl/.
"""

import argparse
import contextlib
import importlib.metadata
import json
import shlex
import sys
import time
from pathlib import Path

import env  # noqa: F401  importing it registers the SAPO/... environments
import evaluation
import models
import rollout
import tiny
import train
import vlm

RESULTS = Path(__file__).parents[1] / "results"
# A head alone learns less than a critic with a backbone of its own: it takes larger steps, and is
# listened to less. No step can be skipped in TRL, so there is no KL bound. Flags win over these
USUAL = ("--lam", "0.95", "--critic_lr", "1e-2", "--target_kl", "inf")
LOGGED = ("step", "reward", "clip_fraction", "approx_kl", "value_loss", "explained_variance")


def rows_of(episode, count):
    """The first `count` training examples of an environment. -> a data set as TRL takes it"""
    import datasets  # which comes with TRL

    rows = []
    for index in range(count):
        observation, _ = episode.reset(options={"index": index})
        pictures = rollout.pictures_of(observation)
        words = {"type": "text", "text": observation["prompt"]}
        content = [{"type": "image"} for _ in pictures] + [words]
        turns = [{"role": "user", "content": content}]
        if episode.unwrapped.task.system:
            system = {"type": "text", "text": episode.unwrapped.task.system}
            turns.insert(0, {"role": "system", "content": [system]})
        rows.append({"prompt": turns, "images": pictures, "index": index})
    if not any(row["images"] for row in rows):
        rows = [{"prompt": row["prompt"], "index": row["index"]} for row in rows]
    return datasets.Dataset.from_list(rows)


def rewards_of(episode):
    """A reward function as TRL calls it: what an environment pays for each whole response."""

    def reward(completions, index, **_):
        rewards = []
        for completion, number in zip(completions, index, strict=True):
            episode.reset(options={"index": number})
            rewards.append(episode.step(completion[0]["content"])[1])
        return rewards

    return reward


def build(settings, config, options=None, folder="runs/trl"):
    """A run to evaluate, and the trainer of its policy. -> (train.Run, SegmentAlignedTrainer)

    settings, config: as of train.parse; options: of GRPOConfig; folder: of TRL's checkpoints.
    ValueError for settings that do not fit, ImportError for a missing package.
    """
    from lab import trl_trainer  # which needs TRL

    if (settings.method, settings.cut) != ("sapo", "topk"):
        given = f"--method {settings.method} --cut {settings.cut}"
        raise ValueError(f"{given}: expected --method sapo --cut topk")
    envs = [train.make_env(settings) for _ in range(settings.batch + 1)]
    task = envs[0].unwrapped.task
    if task.replies:
        raise ValueError(f"--env {settings.env}: expected a task of one turn")
    on_cpu = settings.device == "cpu"
    state = trl_trainer.PartialState(cpu=on_cpu)
    usual = {
        "generation_batch_size": settings.batch,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "num_train_epochs": 1,
        "logging_steps": config.epochs * max(settings.batch // config.minibatch, 1),  # a rollout's
        "bf16": False,
        "use_cpu": on_cpu,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder),
    }
    args = trl_trainer.engine_config(config, state.num_processes, **usual | (options or {}))
    start = tiny.cached_warm_start(task, settings) if settings.model == "tiny" else settings.model
    policy = vlm.load(start, str(state.device), settings.dtype)
    if not args.use_vllm:
        banned = policy.banned.nonzero().flatten().tolist()
        args.generation_kwargs = {"suppress_tokens": banned} | (args.generation_kwargs or {})
    of_run = models.Models(policy, None, None, None, None)
    run = train.Run(settings, config, Path(folder), of_run, envs[1:], envs[0], train.Progress())
    prompts = settings.iterations * settings.batch // args.num_generations
    trainer = trl_trainer.SegmentAlignedTrainer(
        policy.model,
        rewards_of(train.make_env(settings)),
        args,
        config,
        hears=settings.critic_hears == "logp",
        train_dataset=rows_of(envs[0], prompts),
        processing_class=policy.processor,
        peft_config=models.lora_config(policy, settings.lora) if settings.lora else None,
    )
    return run, trainer


def learn(run, trainer) -> dict:
    """Train. -> held-out accuracies before and after, and a few metrics of each rollout.

    Where weights are sharded, nothing is evaluated.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

    def accuracies():
        return None if sharded else evaluation.by_decoding(run, evaluation.evaluate(run))

    before = accuracies()
    begin = time.time()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    seconds = time.time() - begin
    return {
        "processes": trainer.accelerator.num_processes,
        "rollouts": run.settings.iterations,
        "seconds": round(seconds, 1),
        "evaluations_before": before,
        "evaluations": accuracies(),
        "log": [
            {name: row[name] for name in LOGGED}
            for row in trainer.state.log_history
            if "reward" in row
        ],
    }


def parse(words):
    """-> (train.Settings, SAPOConfig, what --trl gives, the file of the outcome)."""
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m lab.trl_sapo", description=about)
    parser.add_argument("--trl", nargs="+", default=[], help="name=value: GRPOConfig's settings")
    parser.add_argument("--out", type=Path, help="the file of the outcome")
    own, of_train = parser.parse_known_args(words)
    settings, config = train.parse([*USUAL, *of_train])
    options = dict(pair.split("=", 1) for pair in own.trl)
    for name, word in options.items():
        with contextlib.suppress(ValueError):  # not a number: it stays a word
            options[name] = json.loads(word)
    task = settings.env.split("/")[-1].split("-")[0]
    file = own.out or RESULTS / f"trl-{task}-seed{settings.seed}.json"
    return settings, config, options, file


def main(argv=None):
    """The command line. Whatever is wrong with the input becomes one line here."""
    words = sys.argv[1:] if argv is None else argv
    try:
        settings, config, options, file = parse(words)
        folder = Path(settings.runs) / f"{settings.name}-trl"
        run, trainer = build(settings, config, options, folder)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.trl_sapo: {error}") from error
    outcome = learn(run, trainer)
    if not trainer.accelerator.is_main_process:
        return
    packages = ("torch", "transformers", "trl", "accelerate")
    made = {
        "command": shlex.join(["python", "-m", "lab.trl_sapo", *words]),
        "seed": settings.seed,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    file.write_text(json.dumps(made | outcome, indent=1) + "\n")
    print(f"written to {file}, the policy to {folder}")


if __name__ == "__main__":
    main()
