"""What several test files need."""

import numpy as np
import torch
from PIL import Image


def picture(seed, size=(32, 32)):
    """Random colours, as a PIL picture of so many (rows, columns) of pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictures(count, size=(32, 32)):
    """So many different ones."""
    return [picture(seed, size) for seed in range(count)]


@torch.no_grad()
def plain_logp(model, inputs, row, ids, temperature=1.0):
    """Oracle: one response alone, unpadded, the model called directly. -> log-probs (T, V)."""
    kept = inputs["attention_mask"][row].bool()
    pixels = {k: tensor[row : row + 1] for k, tensor in inputs.items() if k.startswith("pixel")}
    prompt = inputs["input_ids"][row][kept]  # (P,)
    whole = torch.cat([prompt, torch.tensor(ids, dtype=torch.long)])[None]  # (1, P + T)
    output = model.model(input_ids=whole, attention_mask=torch.ones_like(whole), **pixels)
    logits = output.logits[0, len(prompt) - 1 : -1].clone()  # (T, V)
    logits[:, model.banned] = -torch.inf
    return (logits / temperature).log_softmax(-1)
