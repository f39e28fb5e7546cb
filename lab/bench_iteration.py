"""How long is one iteration? SAPO and GRPO here, and TRL's GRPO where TRL is installed."""

import tempfile
import time

import torch

import tiny
import train
import vlm
from tasks import DiceSum, read_answer

OURS = {"GRPO": "grpo", "SAPO": "sapo"}
TRL = "TRL's GRPO"


def measure(rounds=6, each=3) -> dict:
    """Seconds per iteration on the tiny checkpoint and DiceSum. -> results/bench_iteration.json.

    All do the same: 256 responses, one scoring pass and one training pass in two minibatches, 8
    responses to a prompt for both GRPOs. In each round `each` iterations of everyone.
    """
    runs = {}
    once = ["--batch", "256", "--epochs", "1", "--minibatch", "128"]
    for name, method in OURS.items():
        flags = ["--method", method, "--name", f"bench-{method}", *once]
        runs[name] = train.build(*train.parse(flags))
    start = tiny.cached_warm_start(DiceSum(), runs["GRPO"].settings)
    seconds = {name: [] for name in OURS}
    try:
        import trl
    except ImportError:
        versions = {}
        print("TRL is not installed (pip install trl): it does not take part")
    else:
        versions = {"trl": trl.__version__}
        seconds[TRL] = []
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += seconds_here(run, each)
        if versions:
            seconds[TRL] += seconds_in_trl(start, each)
    median = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    of_grpo = {name: middle / median["GRPO"] for name, middle in median.items()}
    for name, middle in median.items():
        print(f"{name:12}{middle:8.2f} s   {of_grpo[name]:.2f} of GRPO")
    return {
        "what": "Seconds per iteration on the tiny checkpoint and DiceSum: 256 responses, one "
        "scoring pass and one training pass in two minibatches, 8 responses to a prompt for both "
        "GRPOs. In turn, in one process; the median of rounds x each.",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "seconds": seconds,
        "median": median,
        "of_grpo": of_grpo,
    }


def seconds_here(run, count):
    """Seconds of each of `count` iterations of a run."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        train.iterate(run)
        seconds.append(time.perf_counter() - begin)
    return seconds


def seconds_in_trl(start, count):
    """Seconds of each of `count` iterations of TRL's GRPOTrainer, from the checkpoint `start`."""
    import datasets
    import transformers
    import trl

    policy, task = vlm.load(start), DiceSum()
    rows = [_as_trl_row(task.example_at(i)) for i in range(32 * count)]
    stamps = []  # at the start of each optimizer step, and at the end

    def reward(completions, answer, **_):
        answered = [read_answer(completion[0]["content"]) for completion in completions]
        return [float(a == right) for a, right in zip(answered, answer, strict=True)]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder,
            per_device_train_batch_size=128,
            steps_per_generation=2,
            num_generations=8,
            learning_rate=3e-4,
            max_completion_length=64,
            beta=0.0,
            temperature=1.0,
            max_steps=2 * count,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
            gradient_checkpointing=False,
            generation_kwargs={"suppress_tokens": policy.banned.nonzero().flatten().tolist()},
        )
        trl.GRPOTrainer(
            policy.model,
            reward,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=policy.processor,
            callbacks=[Clock()],
        ).train()
    # An iteration is two optimizer steps: from every second stamp to the one after the next.
    return [end - begin for begin, end in zip(stamps[:-2:2], stamps[2::2], strict=True)]


def _as_trl_row(example):
    """An example as TRL's data sets hold them."""
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    return {
        "prompt": [{"role": "user", "content": content}],
        "image": example.image,
        "answer": example.answer,
    }
