"""The files of a made-up run, as train.py writes them: what the pictures are drawn from."""

import base64
import io
import json

from PIL import Image


def write_lines(folder, name, lines):
    """A .jsonl file of these objects."""
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def png():
    """A small picture, as samples.jsonl holds it."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (0, 120, 80)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def sample(tokens, reward=1.0, iteration=4, **changes):
    """A line of samples.jsonl: a response of these tokens, with numbers that differ by token."""
    n = len(tokens)
    fields = {
        "iteration": iteration,
        "example_id": 7,
        "prompt": "Add up the dice.",
        "image": png(),
        "answer": "16",
        "predicted": "16" if reward else "15",
        "reward": reward,
        "tokens": tokens,
        "entropy": [0.1 * (i % 5) for i in range(n)],
        "values": [i / n for i in range(n)],
        "advantages": [(-1) ** i * i / n for i in range(n)],
        "ends": [i % 3 == 2 or i == n - 1 for i in range(n)],
        "method": "sapo",
        "cut": "topk",
    }
    return fields | changes


def finished_run(folder):
    """Files of 20 iterations, evaluated at 0, 10 and 20; four responses sampled at 4, one at 0."""
    training = []
    for i in range(1, 21):
        line = {"iteration": i, "accuracy": 0.5 + i / 50, "entropy": 0.3 - i / 100}
        line |= {"value_loss": 0.2 / i, "explained_variance": i / 40, "clip_fraction": 0.1}
        training.append(line)
    evaluations = []
    for i in (0, 10, 20):
        share = 0.5 + i / 50
        bounds = {"eval_low": share - 0.05, "eval_high": share + 0.05}
        evaluations.append({"iteration": i, "eval_accuracy": share, **bounds})
    start, middle, end = evaluations
    write_lines(folder, "metrics.jsonl", [start, *training[:10], middle, *training[10:], end])
    early = [sample(["early"], iteration=0)]
    late = [sample(list("<3526> 16"), reward) for reward in (1.0, 1.0, 1.0, 0.0)]
    write_lines(folder, "samples.jsonl", early + late)
    config = {"method": "sapo", "env": "SAPO/DiceSum-v0", "seed": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
