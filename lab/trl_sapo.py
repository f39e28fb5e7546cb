"""Train on one process or on many, through TRL and Accelerate (lab/trl_trainer.py).

    python -m lab.trl_sapo --seed 0     # DiceSum, the tiny model -> results/trl-DiceSum-seed0.json
    accelerate launch --num_processes 8 -m lab.trl_sapo --device cuda --model FOLDER

The flags are train.py's, for tasks of one turn: --batch and --minibatch count the responses of all
processes together, --micro_batch those of one process at once. What --trl gives are GRPOConfig's
settings. Flags that nothing here would read are refused (`NOT_READ`). The policy and critic.pt end
under runs/<name>-trl/.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shlex
import sys
import time
from pathlib import Path

import torch

import checkpoint
import env  # noqa: F401  importing it registers the SAPO/... environments
import evaluation
import models
import rollout
import sapo
import tiny
import train
import vlm
from lab.common import command_line, writable

RESULTS = Path(__file__).parents[1] / "results"
# A head alone learns less than a critic with a backbone of its own: it takes larger steps, and is
# listened to less. No step can be skipped in TRL, so there is no KL bound. Flags win over these
USUAL = ("--lam", "0.95", "--critic_lr", "1e-2", "--target_kl", "inf")
# Flags of train.py that nothing here reads, and what to do in place of each
NOT_READ = {
    "resume": "take --trl resume_from_checkpoint=FOLDER",
    "generate_batch": "a process writes its share of a rollout at once: lower --batch",
    "critic": "the critic is a head on the policy: leave it out",
    "actor_half_life": "the rate falls by --trl lr_scheduler_type=..., linearly if not given",
    "value_pretraining": "the policy learns from the first rollout on: leave it out",
    "token_budget": "bound the run by --iterations",
    "eval_every": "evaluations are before and after training: leave it out",
    "checkpoint_every": "take --trl save_strategy=steps save_steps=...",
    "tensorboard": "take --trl report_to=tensorboard",
}
LOGGED = ("step", "reward", "clip_fraction", "approx_kl", "value_loss", "explained_variance")


def rows_of(episode, count):
    """The first `count` training examples of an environment. -> a data set as TRL takes it

    It holds their numbers alone: prompts and pictures are made when a batch is asked for.
    """
    import datasets  # which comes with TRL

    def rows(batch):
        examples = [row_of(episode, index) for index in batch["index"]]
        return {name: [example[name] for example in examples] for name in examples[0]}

    return datasets.Dataset.from_dict({"index": list(range(count))}).with_transform(rows)


def row_of(episode, index):
    """A training example as TRL takes it: the turns of its prompt, its pictures, its number."""
    observation, _ = episode.reset(options={"index": index})
    pictures = rollout.pictures_of(observation)
    words = {"type": "text", "text": observation["prompt"]}
    content = [{"type": "image"} for _ in pictures] + [words]
    turns = [{"role": "user", "content": content}]
    if episode.unwrapped.task.system:
        system = {"type": "text", "text": episode.unwrapped.task.system}
        turns.insert(0, {"role": "system", "content": [system]})
    return {"prompt": turns, "images": pictures, "index": index}


def rewards_of(episode):
    """A reward function as TRL calls it: what an environment pays for each whole response."""

    def reward(completions, index, **_):
        rewards = []
        for completion, number in zip(completions, index, strict=True):
            episode.reset(options={"index": number})
            rewards.append(episode.step(completion[0]["content"])[1])
        return rewards

    return reward


def refuse(settings):
    """ValueError, of one line, for settings that would not be read here or would do harm."""
    given = (settings.method, settings.cut, settings.credit)
    if given != ("sapo", "topk", "critic"):
        raise ValueError(
            "--method {} --cut {} --credit {}: ".format(*given)
            + "expected --method sapo --cut topk --credit critic"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, instead in NOT_READ.items():
        value = getattr(settings, name)
        if value != defaults[name]:
            raise ValueError(f"--{name} {value}: not read here; {instead}")
    if settings.iterations < 1:
        raise ValueError(f"--iterations {settings.iterations}: expected at least 1")
    if settings.device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {settings.device}: expected cpu or cuda, of which each process takes the "
            "card that Accelerate gives it (CUDA_VISIBLE_DEVICES chooses among them)"
        )
    train.check_device(settings.device)
    if settings.dtype != "float32" and not settings.lora:
        raise ValueError(
            f"--dtype {settings.dtype}: expected float32 where all weights are trained, since "
            "TRL's Adam keeps no float32 copies and small steps vanish: take --trl bf16=true, or "
            "--lora"
        )


def build(settings, config, options=None, folder="runs/trl"):
    """A run to evaluate, and the trainer of its policy. -> (train.Run, SegmentAlignedTrainer)

    settings, config: as of train.parse; options: of GRPOConfig; folder: of TRL's checkpoints.
    ValueError for settings that do not fit, ImportError for a missing package.
    """
    from lab import trl_trainer  # which needs TRL

    refuse(settings)
    from accelerate import PartialState  # which comes with TRL: without it, TRL is to be named

    on_cpu = settings.device == "cpu"
    state = PartialState(cpu=on_cpu)
    # Evaluations write as many responses at once as there are environments: as many as TRL does
    at_once = max(settings.batch // state.num_processes, 1)
    envs = [train.make_env(settings) for _ in range(at_once + 1)]
    task = envs[0].unwrapped.task
    if task.replies:
        raise ValueError(f"--env {settings.env}: expected a task of one turn")
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
    try:
        args = trl_trainer.engine_config(config, state.num_processes, **usual | (options or {}))
    except TypeError as error:  # a name that GRPOConfig does not have
        raise ValueError(f"--trl: {error}") from error
    except ZeroDivisionError as error:
        zeros = [
            f"{name}=0"
            for name, value in (options or {}).items()
            if type(value) is int and not value
        ]
        raise ValueError(f"--trl {' '.join(zeros)}: expected at least 1") from error
    start = tiny.cached_warm_start(task, settings) if settings.model == "tiny" else settings.model
    with models.named_by_its_flag():
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
        if sharded:
            return None
        with trainer.accelerator.autocast():  # in the precision of training
            return evaluation.by_decoding(run, evaluation.evaluate(run))

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


def run_to_its_end(run, trainer) -> dict:
    """`learn`, where whatever breaks a run becomes one line."""
    try:
        return learn(run, trainer)
    except (OSError, FloatingPointError) as error:
        reason = error
    except (sapo.NaNError, RuntimeError) as error:
        if isinstance(error, sapo.NaNError) or "probability tensor" in str(error):  # in sampling
            reason = f"{error}; the weights are broken: lower the learning rates and begin again"
        else:
            reason = explain_out_of_memory(error)
    raise SystemExit(f"step {trainer.state.global_step}: {reason}")


def explain_out_of_memory(error) -> str:
    """What to do where memory ran out: one line. Any other error is raised again."""
    reason = str(error).splitlines()[0] if str(error) else ""
    if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in reason:
        raise error
    return (
        "out of memory: lower --micro_batch, then --batch (a process writes its share at once) or "
        f"--max_new_tokens; or add --gradient_checkpointing, --lora 16 ({reason})"
    )


def parse(words):
    """-> (train.Settings, SAPOConfig, what --trl gives, the file of the outcome)."""
    parser = command_line("trl_sapo", __doc__)
    parser.add_argument("--trl", nargs="+", default=[], help="name=value: GRPOConfig's settings")
    parser.add_argument("--out", type=Path, help="the file of the outcome")
    own, of_train = parser.parse_known_args(words)
    for word in of_train:  # train.py, which gets the rest, knows no flags but its own
        given = word.split("=")[0]
        for flag in ("--out", "--trl"):
            if len(given) > 2 and flag.startswith(given):
                raise ValueError(f"{word}: no flag of this program; did you mean {flag}?")
    settings, config = train.parse([*USUAL, *of_train])
    options = {}
    for pair in own.trl:
        name, equals, word = pair.partition("=")
        if not equals:
            raise ValueError(f"--trl {pair}: expected name=value")
        options[name] = word
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
        writable(file)  # before hours of work
        folder = Path(settings.runs) / f"{settings.name}-trl"
        run, trainer = build(settings, config, options, folder)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.trl_sapo: {error}") from error
    except RuntimeError as error:
        reason = explain_out_of_memory(error)
        raise SystemExit(f"python -m lab.trl_sapo: {reason}") from None
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
