"""How much memory does scoring take at a large vocabulary? Three ways to log-probabilities."""

import threading
import time
from pathlib import Path

import torch
import transformers

import vlm

PROMPT = 8  # tokens


def measure(rows=4, tokens=512, vocabulary=151_936) -> dict:
    """Peak memory of scoring (rows, tokens) and of its gradient. -> results/bench_memory.json.

    The head on all positions at once, by log_softmax or by torch.distributions, and in pieces under
    checkpointing as `vlm.score` does it. One small text model for all.
    """
    torch.manual_seed(0)
    model = small_model(vocabulary)
    policy = vlm.VLM(model, None, torch.zeros(vocabulary, dtype=torch.bool), [7])
    inputs = {
        "input_ids": torch.full((rows, PROMPT), 9),
        "attention_mask": torch.ones(rows, PROMPT, dtype=torch.long),
    }
    responses = torch.randint(10, vocabulary, (rows, tokens))
    mask = torch.ones(rows, tokens, dtype=torch.bool)

    def logits():
        """Of every response token at once, (rows, tokens, vocabulary)."""
        output = model(**vlm.joined(inputs, responses, mask))
        return output.logits[:, PROMPT - 1 : -1].float()

    def in_pieces():
        logp, _ = vlm.score(policy, inputs, responses, mask)
        return logp

    def by_log_softmax():
        return logits().log_softmax(-1).gather(2, responses[..., None])[..., 0]

    def by_distributions():
        return torch.distributions.Categorical(logits=logits()).log_prob(responses)

    ways = {
        "in pieces": in_pieces,
        "log_softmax": by_log_softmax,
        "torch.distributions": by_distributions,
    }
    measured, expected = {}, None
    for name, way in ways.items():
        model.zero_grad()
        megabytes, logp = peak_of(way)
        result = logp.detach(), model.lm_head.weight.grad.clone()
        if expected is None:
            expected = result
        pairs = zip(result, expected, strict=True)
        differences = [_largest_difference(*pair) for pair in pairs]
        measured[name] = {"megabytes": round(megabytes), "largest_difference": differences}
        print(f"{name:22}{measured[name]['megabytes']:8} MB above the start")
    return {
        "what": "Peak resident memory above the start, in MB, of log-probabilities and their "
        "gradient; differences of the two relative to the largest number.",
        "shape": [rows, tokens, vocabulary],
        "ways": measured,
    }


def _largest_difference(tensor, expected):
    """Relative to the largest expected number."""
    return float((tensor - expected).abs().max() / expected.abs().max())


def small_model(vocabulary):
    """A text model of one narrow layer, so that the head is nearly all of it."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def peak_of(way):
    """(the most resident MB above the start while `way` and its gradient are made, its result)."""
    start = resident_megabytes()
    peak = 0
    finished = threading.Event()

    def watch():
        nonlocal peak
        while not finished.is_set():
            peak = max(peak, resident_megabytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    logp = way()
    logp.sum().backward()
    finished.set()
    watcher.join()
    return peak - start, logp


def resident_megabytes():
    """What this process holds in memory now. Linux alone says it: in pages of 4096 bytes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096 / 2**20
