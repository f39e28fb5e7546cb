"""What fits on a card? The memory of a run, by arithmetic.

    python -m lab.memory      # the table of docs/models.md, for cards of 24, 48 and 80 GB

Three sums, in bytes; e is the bytes of a weight (2 in bfloat16, 4 in float32).

    fixed       weights e each. A trained one has a gradient and Adam's two moments, 4 each, and
                below float32 its float32 copy, 4 more (models.Adam). A critic of its own counts as
                a whole model, an adapter of rank r as r (inputs + outputs) for each linear layer of
                the text model. And the batch's pictures, in float32.
    generation  rows x max( pictures, prompt, writing )
                pictures  N (3 Hv + 3 Fv) e: a layer of the vision tower
                prompt    P (6 H + 3 F) e beside the keys and values of the prompt
                writing   (P + T) tokens of keys and values, 2 x layers x kv heads x head size x e
                          each; one layer's keys are there twice while a token is added to them.
                          And 16 V: the next token's logits and what sampling makes of them
    update      micro-batch x (P + T) e (layers x H + 11 H + 4 F) with gradient checkpointing: the
                input of every layer, and all that one layer keeps for its gradient; without it all
                that every layer keeps. Where all weights are trained, the same of the vision tower
                for N patches, with 9 Hv + 2 Fv (4 Fv where it is gated, as Qwen's): its layers'
                inputs stay until the text model is done, and then one layer of its own takes the
                place of the text's. And of the logits five float32
                copies of one piece (vlm.score); a head in pieces below float32 has 8 V H more, for
                its float32 copy and gradient

The most that a run needs is `fixed` and the larger of the two others. H, F and V: the text model's
hidden size, inner size and vocabulary; Hv, Fv: the vision tower's sizes; N patches of a prompt; P
prompt tokens, a picture's too; T written ones.

The counts of H and F are of Llama's and Idefics3's layers, and meet what PyTorch's profiler sees of
small models (`peak_bytes`; tests/test_memory.py). What a card adds (its context, fragmentation,
workspaces) is not in them: `SHARE` leaves a tenth of it free.
"""

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

import vlm
from lab.bench_gpu import SIZES
from lab.common import command_line
from lab.tables import markdown

GIB = 2**30
SHARE = 0.9
CARDS = (24, 48, 80)
PICTURE_TOKENS = {  # of one picture, as the published processors make them
    "SmolVLM-256M": 17 * 64,  # 16 tiles and the whole
    "SmolVLM-2.2B": 17 * 81,
    "Qwen2.5-VL-3B": 256,  # 448 x 448 pixels
    "Qwen2.5-VL-7B": 256,
}
TRAININGS = {  # what is trained: {name: (rank of the adapters, models that are trained)}
    "LoRA 16": (16, 2),
    "all weights, shared critic": (0, 1),
    "all weights, own critic": (0, 2),
}


@dataclass
class Load:
    """What a run asks of its memory."""

    prompt: int  # tokens, those of its picture too
    picture: int  # tokens of the picture alone
    written: int  # tokens of a response at most
    batch: int
    micro_batch: int
    bytes_per_number: int = 2
    checkpointing: bool = True
    piece: int = vlm.PIECE_ON_CARD  # logits held at once


def fixed_bytes(size, rank, trained_models, load) -> int:
    """Of weights, gradients, optimizers and pictures. size: a bench_gpu.Architecture; rank: of the
    adapters that are trained, 0: all weights are; trained_models: 2 with a critic of its own, 1
    without."""
    with torch.device("meta"):
        model = size.kind._from_config(size.config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    e = load.bytes_per_number
    per_trained = 12 if e == 4 else 16
    numbers = sum(t.numel() for t in size.pictures(1).values() if t.is_floating_point())
    of_size = size.picture_tokens.count(size.config.image_token_id)
    pictures = load.batch * numbers * load.picture // of_size * 4
    if not rank:
        return trained_models * weights * (e + per_trained) + pictures
    text = set(model.get_decoder().modules())
    linear = [module for module in text if isinstance(module, torch.nn.Linear)]
    adapter = rank * sum(module.in_features + module.out_features for module in linear)
    return weights * e + trained_models * adapter * (e + per_trained) + pictures


def generation_bytes(size, load) -> int:
    """Of one response, while it is written."""
    text, e = size.config.get_text_config(), load.bytes_per_number
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    head_size = hidden // text.num_attention_heads
    per_token = 2 * layers * text.num_key_value_heads * head_size * e
    vision = size.config.vision_config
    patches = load.picture * _patches_per_token(size.config)
    pictures = patches * (3 * vision.hidden_size + 3 * vision.intermediate_size) * e
    prompt = load.prompt * ((6 * hidden + 3 * inner) * e + per_token)
    writing = (load.prompt + load.written) * per_token * (1 + 1 / (2 * layers))
    writing += 4 * text.vocab_size * 4  # logits and what sampling makes of them, in float32
    return round(max(pictures, prompt, writing))


def update_bytes(size, rank, load) -> int:
    """Of one backward pass."""
    text, e = size.config.get_text_config(), load.bytes_per_number
    tokens = load.micro_batch * (load.prompt + load.written)
    inputs, one_layer, all_layers = _kept(text, tokens, text.num_hidden_layers, (11, 4), e)
    activations = inputs + one_layer if load.checkpointing else all_layers
    if not rank:
        vision = size.config.vision_config
        layers = getattr(vision, "num_hidden_layers", None) or vision.depth
        patches = load.micro_batch * load.picture * _patches_per_token(size.config)
        counts = (9, 4) if "qwen" in vision.model_type else (9, 2)
        inputs, one_layer, all_layers = _kept(vision, patches, layers, counts, e)
        if load.checkpointing:
            activations = inputs + max(activations, one_layer)
        else:
            activations += all_layers
    numbers = load.micro_batch * load.written * text.vocab_size
    logits = 5 * 4 * min(numbers, load.piece)
    if numbers > load.piece and not rank and e < 4:  # the head in float32, and its gradient
        logits += 8 * text.vocab_size * text.hidden_size
    return activations + logits


def _kept(config, positions, layers, counts, e):
    """Bytes of the inputs of all layers, of what one keeps for its gradient, of what all keep.

    counts: how often a layer keeps numbers of the hidden size, and of the inner size.
    """
    of_hidden, of_inner = counts
    numbers = of_hidden * config.hidden_size + of_inner * config.intermediate_size
    one_layer = positions * numbers * e
    return positions * layers * config.hidden_size * e, one_layer, layers * one_layer


def _patches_per_token(config):
    """How many of the vision tower's patches become one token of the text model."""
    if hasattr(config, "scale_factor"):  # Idefics3's
        return config.scale_factor**2
    return config.vision_config.spatial_merge_size**2


def peak_bytes(function) -> int:
    """The most that PyTorch held on the CPU at once while `function()` ran, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def table(text=200, written=512, micro_batch=4, batch=64) -> str:
    """The largest --generate_batch, up to `batch`, with which each model trains on each card.

    For prompts of one picture and `text` tokens, and answers of `written` tokens.
    """
    rows = []
    for name, size in SIZES.items():
        picture = PICTURE_TOKENS[name]
        load = Load(picture + text, picture, written, batch, micro_batch)
        each = generation_bytes(size, load)
        for training, (rank, trained_models) in TRAININGS.items():
            fixed = fixed_bytes(size, rank, trained_models, load)
            update = update_bytes(size, rank, load)
            cells = [f"{fixed / GIB:.1f}", f"{update / GIB:.1f}", f"{each / GIB:.2f}"]
            for card in CARDS:
                room = SHARE * card * GIB - fixed
                fitting = [n for n in (64, 32, 16, 8, 4, 2, 1) if n <= batch and n * each <= room]
                cells.append(str(fitting[0]) if fitting and update <= room else "no")
            rows.append([name, training, *cells])
    header = ["model", "trained", "fixed", "update", "per response written"]
    return markdown(header + [f"{card} GB" for card in CARDS], rows)


if __name__ == "__main__":
    command_line("memory", __doc__).parse_args()
    print(table())
