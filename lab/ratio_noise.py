"""Is a ratio 1 where nothing was learned? The noise of scoring, against GSPO's clip.

    python -m lab.ratio_noise                  # -> results/ratio_noise.json
    python -m lab.ratio_noise --device cuda    # -> results/ratio_noise-cuda.json

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
import evaluation
import rollout
import sapo
import train
import vlm
from lab import bench_gpu
from lab.bench import RESULTS, save
from lab.common import command_line, writable

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


def tiny_responses(dtype, device):
    """The default task's warm start in a dtype, and 128 responses of it."""
    flags = ["--dtype", dtype, "--device", device, "--name", "noise"]
    run = train.build(*train.parse(flags))
    torch.manual_seed(0)
    made = rollout.respond(run, np.arange(128), "eval")
    return run.models.policy, made.inputs, made.tokens, made.written


def random_responses(name, dtype, device, count=4, written=32):
    """A model of a true size with random weights, and ragged responses of random tokens."""
    size = bench_gpu.SIZES[name]
    torch.manual_seed(0)
    model = bench_gpu.random_model(size, device).to(getattr(torch, dtype))
    vocabulary = size.config.get_text_config().vocab_size
    banned = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    policy = vlm.VLM(model, SimpleNamespace(tokenizer=None), banned, [vocabulary - 1])
    inputs = bench_gpu.random_prompts(size, device, count, prompt=32)
    tokens = torch.randint(10, 40_000, (count, written))
    lengths = torch.randint(written // 2, written + 1, (count,))
    mask = torch.arange(written) < lengths[:, None]
    return policy, inputs, tokens.to(device), mask.to(device)


def measure(device) -> dict:
    """Both models in both dtypes."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        small = tiny_responses(dtype, device)
        rows.append({"model": "tiny, warm start", "dtype": dtype} | noise(*small))
        big = random_responses("SmolVLM-256M", dtype, device)
        rows.append(
            {"model": "SmolVLM-256M, random weights", "dtype": dtype}
            | noise(*big, part=4, minibatch=2)
        )
        print(*map(json.dumps, rows[-2:]), sep="\n", flush=True)
    return {
        "what": "|log pi - log pi_old| of unmoved weights, scored in other company, in nats: the "
        "largest of a token; of a response's mean the root mean square, the largest, and the "
        "share beyond GSPO's clip of 3e-4. Another device's kernels sum in other orders.",
        "device": device,
        **evaluation.of_card(device),
        "seeds": [0],
        "rows": rows,
    }


def main(argv=None):
    """The command line."""
    parser = command_line("ratio_noise", __doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    device = parser.parse_args(argv).device
    try:
        train.check_device(device)
    except ValueError as error:
        raise SystemExit(f"python -m lab.ratio_noise: {error}") from None
    on_device = "" if device == "cpu" else f"-{device.replace(':', '')}"
    command = "python -m lab.ratio_noise" + (f" --device {device}" if on_device else "")
    file = writable(RESULTS / f"ratio_noise{on_device}.json")
    save(file, measure(device), command)


if __name__ == "__main__":
    main()
