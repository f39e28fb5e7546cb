"""What does an iteration cost on a real card? True sizes, random weights: nothing is downloaded.

Seconds and peak memory of each phase, tokens per second, and the share of the card's matrix rate:
2 x parameters x positions over the seconds of a scoring pass, against a large matrix product.

`--small` runs two narrow models through the same lines, without a card too, to see that they work.
"""

import contextlib
import copy
import functools
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers

import models
import sapo
import vlm


# ----------------------------------------------------------------------------- the true sizes
@dataclass
class Architecture:
    """A model family at one size, as the published config.json has it."""

    kind: type
    """the transformers class"""
    config: transformers.PretrainedConfig
    """its configuration"""
    picture_tokens: list[int]
    """what one picture is in the prompt"""
    pictures: Callable
    """pictures(rows): the tensors of one random picture per response, by name"""


def smolvlm(hidden, layers, heads, kv_heads, inner, vision, side, scale) -> Architecture:
    """SmolVLM's: `side` pixels to a picture, of which `scale` x `scale` patches make a token."""
    text = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=49280,
        max_position_embeddings=8192,
    )
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=vision | {"image_size": side},
        scale_factor=scale,
        image_token_id=49190,
    )

    def pictures(rows):
        return {"pixel_values": torch.randn(rows, 1, 3, side, side)}

    tokens = (side // vision["patch_size"] // scale) ** 2
    kind = transformers.Idefics3ForConditionalGeneration
    return Architecture(kind, config, [config.image_token_id] * tokens, pictures)


def qwen(hidden, layers, heads, kv_heads, inner, vocabulary, tied, vision=None) -> Architecture:
    """Qwen2.5-VL's. `vision`: what differs from its vision tower, which all sizes share."""
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    tower = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [7, 15, 23, 31],
        **(vision or {}),
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, tie_word_embeddings=tied
    )

    def pictures(rows):
        return {
            "pixel_values": torch.randn(rows * 24 * 24, 1176),  # 24 x 24 patches
            "image_grid_thw": torch.tensor([[1, 24, 24]] * rows),
        }

    tokens = [config.image_token_id] * 144  # one of 2 x 2 patches
    tokens = [config.vision_start_token_id, *tokens, config.vision_end_token_id]
    return Architecture(transformers.Qwen2_5_VLForConditionalGeneration, config, tokens, pictures)


def _vision(hidden, layers, heads, inner, patch):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "patch_size": patch,
    }


SIZES = {
    "SmolVLM-256M": smolvlm(
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        inner=1536,
        vision=_vision(hidden=768, layers=12, heads=12, inner=3072, patch=16),
        side=512,
        scale=4,
    ),
    "SmolVLM-2.2B": smolvlm(
        hidden=2048,
        layers=24,
        heads=32,
        kv_heads=32,
        inner=8192,
        vision=_vision(hidden=1152, layers=27, heads=16, inner=4304, patch=14),
        side=378,
        scale=3,
    ),
    "Qwen2.5-VL-3B": qwen(
        hidden=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        inner=11008,
        vocabulary=151936,
        tied=True,
    ),
    "Qwen2.5-VL-7B": qwen(
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        inner=18944,
        vocabulary=152064,
        tied=False,
    ),
}


# Narrow models of the same two families, whose numbers mean nothing
SMALL = {
    "small SmolVLM": smolvlm(
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=4,
        inner=128,
        vision=_vision(hidden=32, layers=2, heads=2, inner=64, patch=8),
        side=32,
        scale=2,
    ),
    "small Qwen": qwen(
        hidden=128,
        layers=1,
        heads=1,
        kv_heads=1,
        inner=32,
        vocabulary=152_000,
        tied=True,
        vision={"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    ),
}


# ----------------------------------------------------------------------------------- one size
def one_size(size, device, lora, rows, new_tokens, prompt=64, micro_batch=4) -> dict:
    """One SAPO iteration with random weights, bfloat16, gradient checkpointing.

    size: an Architecture. lora: rank of the adapters, or 0 to train all weights. `rows` responses
    of `new_tokens` tokens each, to a picture and `prompt` tokens of text. -> a row of
    results/gpu.json, less the share of the card's matrix rate.
    """
    torch.manual_seed(0)
    model = random_model(size, device)
    parameters = sum(p.numel() for p in model.parameters())  # before there are adapters
    learners = random_learners(size, model, device, lora)
    inputs = random_prompts(size, device, rows, prompt)
    one_iteration(learners, inputs, new_tokens, micro_batch, device)  # warms up
    seconds, peaks = one_iteration(learners, inputs, new_tokens, micro_batch, device)
    positions = inputs["input_ids"].numel() + rows * new_tokens
    return {
        "parameters": parameters,
        "peak_gib": max(peaks.values()),
        "peak_gib_of": peaks,
        "seconds": seconds,
        "seconds_per_iteration": sum(seconds.values()),
        "trained": sum(p.numel() for p in models.trained_parameters(learners)),
        "generated_per_second": rows * new_tokens / seconds["generate"],
        "scored_per_second": positions / seconds["score"],
        "scoring_rate": 2 * parameters * positions / seconds["score"],
    }


def random_model(size, device):
    """A model of this size with random weights, made on the device: the CPU may lack the memory."""
    vlm.prepare(device)
    with torch.device(device):
        model = size.kind._from_config(size.config, dtype=torch.bfloat16).eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def random_learners(size, model, device, lora) -> models.Models:
    """Policy and critic with their optimizers, without a reference."""
    text = size.config.get_text_config()
    end = text.vocab_size - 1
    banned = torch.zeros(text.vocab_size, dtype=torch.bool, device=device)
    banned[[size.config.image_token_id, end]] = True  # the end too, so that all write as much
    policy = vlm.VLM(model, SimpleNamespace(tokenizer=None), banned, [end])
    if lora:
        policy, critic_view, _ = models.lora(policy, lora)
        backbone = models.Backbone(critic_view)
    else:
        backbone = copy.deepcopy(model.base_model)
    critic = sapo.SegmentCritic(backbone, text.hidden_size).to(device)
    trainable = [p for p in policy.enter().parameters() if p.requires_grad]
    actor_optimizer = models.Adam(trainable, 1e-6)
    critic_optimizer = models.Adam(critic.parameters(), 2e-6)
    return models.Models(policy, critic, None, actor_optimizer, critic_optimizer)


def random_prompts(size, device, rows, prompt) -> vlm.Inputs:
    """`rows` times picture tokens and `prompt` tokens of text, with a random picture each."""
    ids = torch.tensor([[*size.picture_tokens, *range(10, 10 + prompt)]] * rows)  # (B, P)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **size.pictures(rows)}
    if "image_grid_thw" in tensors:  # Qwen's models are told which tokens are a picture's
        tensors["mm_token_type_ids"] = (ids == size.config.image_token_id).long()
    counts = {}  # patches of each response's picture, where a row is a patch
    for name, tensor in tensors.items():
        if len(tensor) != rows:
            counts[name] = [len(tensor) // rows] * rows
    return vlm.Inputs({name: tensor.to(device) for name, tensor in tensors.items()}, counts)


def one_iteration(learners, inputs, new_tokens, micro_batch, device) -> tuple[dict, dict]:
    """Generate, score, value, update. -> (the seconds of each, the most GiB that each held)."""
    policy, critic = learners.policy, learners.critic
    seconds, peaks = {}, {}
    phase = functools.partial(measured, seconds, peaks, device=device)
    torch.manual_seed(1)
    with phase("generate"):
        tokens, mask = vlm.generate(policy, inputs, new_tokens)

    def score(rows):
        return vlm.score(policy, vlm.take(inputs, rows), tokens[rows], mask[rows])

    def value(rows):
        return vlm.prefix_values(critic, vlm.take(inputs, rows), tokens[rows], mask[rows])

    with torch.no_grad(), phase("score"):
        logp, entropy = vlm.in_parts(score, len(mask), micro_batch)
    with torch.no_grad(), phase("values"):
        values = vlm.in_parts(value, len(mask), micro_batch)
    luck = torch.rand(mask.shape, device=device).round()
    rewards = torch.where(sapo.response_ends(mask), luck, 0.0)
    rollout = sapo.Rollout(mask, sapo.entropy_ends(entropy, mask), logp, rewards, values)
    config = sapo.SAPOConfig(epochs=1, minibatch=len(mask), micro_batch=micro_batch)
    optimizers = learners.actor_optimizer, learners.critic_optimizer
    with phase("update"):
        advantages, returns = sapo.credit(rollout, config)
        sapo.sapo_update(rollout, advantages, returns, score, value, optimizers, config)
    return seconds, peaks


# ---------------------------------------------------------------------------------- the clock
@contextlib.contextmanager
def timed(seconds, part, device):
    """`with timed(seconds, part, device)`: how long the block takes there, into seconds[part]."""
    synchronize(device)
    begin = time.perf_counter()
    yield
    synchronize(device)
    seconds[part] = time.perf_counter() - begin


@contextlib.contextmanager
def measured(seconds, peaks, part, device):
    """`timed`, and the most that the card held meanwhile, in GiB, into peaks[part]. Of a CPU it is
    the most that the process ever held."""
    on_card = "cuda" in str(device)
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    with timed(seconds, part, device):
        yield
    held = torch.cuda.max_memory_allocated() / 2**20 if on_card else models.peak_megabytes()
    peaks[part] = held / 2**10


def synchronize(device):
    """Wait until the card has done what it was told: it works while Python goes on."""
    if "cuda" in str(device):
        torch.cuda.synchronize()


def matrix_rate(device, dtype, side):
    """Operations per second of a large matrix product: what the card can do at best."""
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = {}
    for repeat in range(5):
        with timed(seconds, repeat, device):
            for _ in range(4):
                torch.matmul(matrix, matrix)
    return 4 * 2 * side**3 / min(seconds.values())


def small() -> dict:
    """The narrow models, on the card where there is one: do the lines work? The numbers mean
    nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return measure(device, SMALL, rank=2, rows=2, new_tokens=3)


def measure(device="cuda", sizes=SIZES, rank=16, rows=16, new_tokens=256, keep=None) -> dict:
    """Every size with all its weights trained and with LoRA. -> results/gpu.json.

    A size that does not fit, or fails otherwise, says so in its row. keep(outcome) is called after
    each row, so that nothing is lost. Raises ValueError where torch sees no card.
    """
    on_card = "cuda" in device
    if on_card and not torch.cuda.is_available():
        raise ValueError("needs a CUDA card, and torch sees none here; nothing was written")
    best = matrix_rate(device, torch.bfloat16, 8192 if on_card else 64)
    outcome = {
        "what": "Random weights at true sizes on one card: seconds and peak memory of each phase, "
        "tokens per second, share of the card's matrix rate (2 x parameters x positions over the "
        "seconds of a scoring pass). A size that does not fit says so.",
        "card": torch.cuda.get_device_name() if on_card else "cpu",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matrix_rate": best,
        "responses": rows,
        "tokens": new_tokens,
        "rows": [],
    }
    for name, size in sizes.items():
        for lora in (0, rank):
            row = row_of(size, device, lora, rows, new_tokens, best)
            outcome["rows"].append({"model": name, "lora": lora} | row)
            print(json.dumps(outcome["rows"][-1]), flush=True)
            if keep is not None:
                keep(outcome)
    return outcome


def row_of(size, device, lora, rows, new_tokens, best) -> dict:
    """`one_size`, or what went wrong with it; and no memory of an earlier size in its numbers."""
    gc.collect()  # models hold each other in circles, which only this opens
    if "cuda" in device:
        torch.cuda.empty_cache()
    try:
        row = one_size(size, device, lora, rows, new_tokens)
        return row | {"share_of_matrix_rate": row["scoring_rate"] / best}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except Exception as error:  # whatever it is: the other sizes are worth measuring
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
