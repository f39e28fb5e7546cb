"""Is a ratio 1 where nothing was learned? The noise of scoring, against GSPO's clip.

    python -m lab.ratio_noise    # -> results/ratio_noise.json

A rollout is scored in parts, and the update scores shuffled minibatches. The same
response then stands among others, padded to other lengths, and sums are made in another order. So
log pi - log pi_old is not quite 0 before the first step. GSPO clips the ratio of a response at
1 - 3e-4 and 1 + 4e-4 (arXiv:2507.18071): is the noise below that?
"""

import json
from types import SimpleNamespace

import numpy as np
import torch

import baselines
import rollout
import sapo
import train
import vlm
from lab import bench_gpu
from lab.bench import RESULTS, save
from lab.common import command_line, writable

COMMAND = "python -m lab.ratio_noise"
CLIP = baselines.SETTINGS["gspo"]["clip_low"]


def noise(policy, inputs, tokens, mask, part=32, minibatch=8, seed=0) -> dict:
    """The log-ratios of responses that are scored twice: `part` at a time in their order, and
    `minibatch` at a time shuffled.

    -> of |log-ratio|, in nats: the largest of a token; of a response's mean, the root of the mean
    square and the largest; and the share of responses beyond 3e-4, GSPO's lower clip.
    """

    def score(rows):
        return vlm.score(policy, vlm.take(inputs, rows), tokens[rows], mask[rows])[0]

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        old_logp = torch.cat([score(rows) for rows in torch.arange(len(mask)).split(part)])
        order = torch.randperm(len(mask), generator=generator)
        shuffled = torch.cat([score(rows) for rows in order.split(minibatch)])
    logp = torch.empty_like(shuffled)
    logp[order] = shuffled
    whole = torch.zeros_like(mask)
    of_response = sapo.segment_ratio(logp, old_logp, whole, mask)[:, 0].log().abs()  # (B,)
    return {
        "responses": len(mask),
        "part": part,
        "minibatch": minibatch,
        "token_largest": float((logp - old_logp).abs().max()),
        "response_rms": float(of_response.square().mean().sqrt()),
        "response_largest": float(of_response.max()),
        "beyond_clip": float((of_response > CLIP).float().mean()),
    }


def tiny_responses(dtype):
    """The default task's warm start in a dtype, and 128 responses of it."""
    run = train.build(*train.parse(["--dtype", dtype, "--name", "noise"]))
    torch.manual_seed(0)
    made = rollout.respond(run, np.arange(128), "eval")
    return run.models.policy, made.inputs, made.tokens, made.written


def random_responses(name, dtype, count=4, written=32):
    """A model of a true size with random weights, and ragged responses of random tokens."""
    size = bench_gpu.SIZES[name]
    torch.manual_seed(0)
    model = bench_gpu.random_model(size, "cpu").to(getattr(torch, dtype))
    vocabulary = size.config.get_text_config().vocab_size
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    policy = vlm.VLM(model, SimpleNamespace(tokenizer=None), banned, [vocabulary - 1])
    inputs = bench_gpu.random_prompts(size, "cpu", count, prompt=32)
    tokens = torch.randint(10, 40_000, (count, written))
    lengths = torch.randint(written // 2, written + 1, (count,))
    return policy, inputs, tokens, torch.arange(written) < lengths[:, None]


def measure() -> dict:
    """Both models in both dtypes. -> results/ratio_noise.json."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows.append({"model": "tiny, warm start", "dtype": dtype} | noise(*tiny_responses(dtype)))
        big = random_responses("SmolVLM-256M", dtype)
        rows.append(
            {"model": "SmolVLM-256M, random weights", "dtype": dtype}
            | noise(*big, part=4, minibatch=2)
        )
        print(*map(json.dumps, rows[-2:]), sep="\n", flush=True)
    return {
        "what": "|log pi - log pi_old| of unmoved weights, scored in other company, in nats: the "
        "largest of a token; of a response's mean the root mean square, the largest, and the "
        "share beyond GSPO's clip of 3e-4. On a CPU: a card's kernels sum in other orders.",
        "seeds": [0],
        "rows": rows,
    }


if __name__ == "__main__":
    command_line("ratio_noise", __doc__).parse_args()
    save(writable(RESULTS / "ratio_noise.json"), measure(), COMMAND)
