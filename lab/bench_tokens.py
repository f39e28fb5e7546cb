"""Is the cost of an iteration linear in its tokens? CPU seconds per token, by batch and length."""

import tempfile
import time

import numpy as np
import torch

import train

SIZES = (  # (responses, tokens of each)
    *((32, 32), (64, 32), (128, 32), (256, 32), (512, 32)),
    *((128, 64), (128, 128), (128, 256)),
)
REFERENCE = (128, 32)  # near what the default run has


def measure(sizes=SIZES, rounds=3) -> dict:
    """CPU seconds of one thread for each token of a whole iteration. -> results/bench_tokens.json.

    The tiny model with random weights on DiceSum, minibatches of 32; nothing ends a response but
    its length. Medians; time that the process does not get on a busy machine does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {size: [] for size in sizes}
        for _ in range(rounds):
            for size in sizes:
                seconds[size].append(seconds_per_token(*size))
    finally:
        torch.set_num_threads(threads)
    median = {size: float(np.median(times)) for size, times in seconds.items()}
    rows = []
    for (responses, tokens), middle in median.items():
        of_reference = middle / median[REFERENCE]
        print(
            f"{responses:4} responses of {tokens:3} tokens   {1e6 * middle:6.0f} us per token   "
            f"{of_reference:.2f} of the reference"
        )
        rows.append(
            {
                "responses": responses,
                "tokens_each": tokens,
                "seconds_per_token": middle,
                "of_reference": of_reference,
            }
        )
    return {
        "what": "CPU seconds of one thread per token of one iteration (rollout, scoring, values, "
        f"update), by batch and by length; reference: {REFERENCE}. The tiny model on DiceSum.",
        "rows": rows,
    }


def seconds_per_token(responses, tokens):
    """One iteration, timed, after a first one that fills the caches."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--warm_start_steps", "0", "--runs", folder, "--batch", str(responses)]
        flags += ["--max_new_tokens", str(tokens), "--minibatch", "32"]
        run = train.build(*train.parse(flags))
        policy = run.models.policy
        policy.banned[[*policy.eos_ids, policy.tokenizer.convert_tokens_to_ids("</answer>")]] = True
        train.iterate(run)
        written, begin = run.progress.generated_tokens, time.process_time()
        train.iterate(run)
        return (time.process_time() - begin) / (run.progress.generated_tokens - written)
