"""What a run has learned: held-out accuracy, responses with their credit, the final outcome.

Nothing here changes what a run has learned. The policy writes on held-out examples, and never
learns from them; that draws from torch's random stream, resets the environments, and counts tokens.
`run` is a `train.Run`.
"""

import base64
import io
import json
import math
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import torch
import transformers

import models
import rollout
import sapo
from tasks.games import STOP

EVALUATION = ("eval_accuracy", "eval_low", "eval_high")  # a share, and its 95% interval


def evaluate(run, temperature=1.0, top_p=1.0) -> dict:
    """Accuracy on the first --eval_episodes held-out examples, with its 95% interval (Wilson).

    temperature 0 is greedy. Draws from torch's global random stream.
    """
    right, count = 0, run.settings.eval_episodes
    for first in range(0, count, len(run.envs)):
        indices = range(first, min(count, first + len(run.envs)))
        played = rollout.play(run, np.array(indices), "eval", temperature, top_p)
        rollout.begin_again(played, "eval")
        ends = sapo.response_ends(played.written)
        _, _, infos = rollout.replay(played.envs, played.texts, ends, played.written)
        right += sum(info["correct"] for info in infos)
    low, high = wilson(right, count)
    return dict(zip(EVALUATION, (right / count, low, high), strict=True))


def wilson(right, n, z=1.96):
    """Wilson's score interval of a share, `right` of `n`: (low, high), in [0, 1] up to rounding.

    With p = right / n:  (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n),  here multiplied
    through by n. z = 1.96 gives 95%. Unlike the normal interval it is right near 0 and 1. Source:
    Wilson (1927), "Probable inference, the law of succession, and statistical inference". Raises
    ZeroDivisionError for n = 0.
    """
    centre = right + z * z / 2
    spread = z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def by_decoding(run, at_temperature_1) -> dict:
    """Held-out accuracy for each way of decoding: {its name: evaluation}. That at temperature 1 is
    handed in, as it has been measured already.

    A model that only slips now and then is right when greedy; one that has learned a thing wrongly
    is wrong however it is decoded. So only the three together tell sharpening from learning.
    """
    return {
        "temperature 1": at_temperature_1,
        "temperature 0.6, top-p 0.95": evaluate(run, 0.6, 0.95),
        "greedy": evaluate(run, 0),
    }


# ---------------------------------------------------------------- responses with their credit


def sample_indices(settings, count=64) -> np.ndarray:
    """Held-out examples for samples.jsonl: as many, and each as often, as an iteration has."""
    indices = rollout.train_indices(settings, 1)
    return indices[indices < count]


def samples(run, batch, advantages, new_logp=None, count=None) -> list[dict]:
    """The rows of samples.jsonl: the first response to each of a batch's first `count` prompts (all
    of them, if None), token by token.

    new_logp: the tokens' log-probabilities under the policy that has learned from this batch, where
    it has.
    """
    batch, advantages = _on_cpu(batch), advantages.cpu()  # once, not once a number
    episodes = batch.rollout
    values = None
    if episodes.values is not None:  # V is neither read nor trained but at the boundaries
        reads = sapo.boundaries(episodes.ends, episodes.mask, run.config.value_at)
        values = sapo.segment_sum(episodes.values * reads, episodes.ends, episodes.mask)
    _, first_of_each_prompt = np.unique(batch.indices, return_index=True)
    rows = first_of_each_prompt[:count]
    told = [sample(run, batch, row, advantages, values) for row in rows]
    add_exact_values(told, [batch.envs[row].unwrapped for row in rows])
    if new_logp is not None:
        new_logp = new_logp.cpu()
        for row, response in zip(rows, told, strict=True):
            response["learned_from"] = True
            response["new_logp"] = rounded(new_logp, row, len(response["tokens"]))
    return told


def rounded(numbers, row, length) -> list[float]:
    """The first numbers of a row, to six digits."""
    return [float(f"{number:.6g}") for number in numbers[row, :length].tolist()]


def _on_cpu(batch):
    """A batch whose numbers of each token are on the CPU."""
    tensors = vars(batch.rollout).items()
    episodes = {name: None if tensor is None else tensor.cpu() for name, tensor in tensors}
    return replace(batch, rollout=sapo.Rollout(**episodes), entropy=batch.entropy.cpu())


def sample(run, batch, row, advantages, values) -> dict:
    """One response with its credit. Its rewards are those less the KL penalty, if there is one.

    values: V of each token's segment, token_values: of the prefix before each token. steps: [first
    token, last token, was it right?] each.
    """
    task, example = batch.envs[row].unwrapped.task, batch.envs[row].unwrapped.example
    info = batch.infos[row]
    positions = batch.rollout.mask[row].nonzero().flatten().tolist()  # the others were heard
    length = positions[-1] + 1
    pieces = batch.texts[row][:length]

    def of_tokens(numbers):
        return rounded(numbers, row, length)

    turns = {}
    if task.replies:
        turns["turns"] = turns_of(task, example, pieces, positions)
    return {
        "iteration": run.progress.iteration,
        "example_id": info["example_id"],
        "method": run.settings.method,
        "cut": run.settings.cut,
        "prompt": example.question,
        "answer": example.answer,
        "image": example.image and png_base64(example.image),
        "predicted": info["predicted"],
        "correct": info["correct"],
        "reward": float(batch.rollout.rewards[row].sum()),
        "tokens": pieces,
        "written": batch.rollout.mask[row, :length].tolist(),
        "logp": of_tokens(batch.rollout.logp),
        "entropy": of_tokens(batch.entropy),
        "values": None if values is None else of_tokens(values),
        "token_values": None if values is None else of_tokens(batch.rollout.values),
        "rewards": of_tokens(sapo.penalised_rewards(batch.rollout, run.config)),
        "advantages": of_tokens(advantages),
        "ends": batch.rollout.ends[row, :length].tolist(),
        "steps": step_tokens(task, example, pieces, positions),
        **turns,
    }


def turns_of(task, example, pieces, positions) -> list[dict]:
    """The turns of a game: the first and the last token of each, what was said before it, and the
    picture that was seen. positions: of the tokens that the policy wrote."""
    parts = runs_of(positions)
    texts = ["".join(pieces[first : last + 1]) for first, last in parts]
    return [
        {"first": first, "last": last, "said": words, "image": picture and png_base64(picture)}
        for (first, last), (words, picture) in zip(
            parts, task.observed(example, texts), strict=True
        )
    ]


def add_exact_values(told, environments):
    """Give samples of a game that knows them `exact_values`: V of the prefix before each token, for
    the game's own player who gives a wrong command as often as the samples do.

    A turn begins with the V of its moment. From the tag on that closes its command, V is what the
    command leads to. A game that raises here goes without.
    """
    task = environments[0].task
    if not (task.replies and hasattr(task.game, "exact_value") and hasattr(task.game, "check")):
        return
    examples = [environment.example for environment in environments]
    turns = [["".join(_pieces(row, turn)) for turn in row["turns"]] for row in told]
    try:
        right = []
        for example, of_row in zip(examples, turns, strict=True):
            right += task.were_right(example, of_row)
        error_rate = 1 - np.mean(right).item() if right else 0.0
        values = [
            task.exact_values(example, of_row, error_rate)
            for example, of_row in zip(examples, turns, strict=True)
        ]
    except Exception as error:  # whatever a foreign game does, the run goes on
        warnings.warn(f"{task}: no exact values, as they raised {error!r}", stacklevel=2)
        return
    if None in values:
        return
    for row, of_turns in zip(told, values, strict=True):
        row["exact_values"] = _exact_values_of_tokens(row, of_turns)


def _pieces(row, turn):
    """What the tokens of a sample's turn read."""
    return row["tokens"][turn["first"] : turn["last"] + 1]


def _exact_values_of_tokens(row, of_turns):
    """V before each token of a sample, from (V before it, V behind its command) of its turns."""
    exact = [0.0] * len(row["tokens"])  # what was heard has none
    for turn, (before, behind) in zip(row["turns"], of_turns, strict=True):
        pieces = _pieces(row, turn)
        text = "".join(pieces)
        closes_at = text.find(STOP) if STOP in text else len(text)
        start = 0  # of the token, in characters of its turn
        for t, piece in enumerate(pieces, turn["first"]):
            exact[t] = round(behind if start >= closes_at else before, 6)
            start += len(piece)
    return exact


def runs_of(positions) -> list[tuple[int, int]]:
    """(first, last) of every run of neighbours among some positions, in order."""
    runs = []
    for t in positions:
        if runs and runs[-1][1] == t - 1:
            runs[-1] = runs[-1][0], t
        else:
            runs.append((t, t))
    return runs


def step_tokens(task, example, pieces, positions=None) -> list[list]:
    """[first token, last token, was it right?] of every reasoning step in a response, whose tokens
    read `pieces`. A step is given in characters; a token counts to it if one of its characters
    does.

    positions: of the tokens that the policy wrote, all if None. The others are replies, which part
    its turns.
    """
    positions = range(len(pieces)) if positions is None else positions
    turns = ["".join(pieces[first : last + 1]) for first, last in runs_of(positions)]
    token_of = [t for t in positions for _ in pieces[t]]  # character of all turns -> token
    steps = []
    for (start, end), right in task.checked(example, turns):
        if end > start:
            steps.append([token_of[start], token_of[end - 1], right])
    return steps


def png_base64(image) -> str:
    """A picture as the text of a PNG file, for JSON and for a page's data: address."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# -------------------------------------------------------------------------- the final outcome


def final_evaluations(run) -> dict:
    """Held-out accuracy at the end, by the way of decoding. An evaluation of the last iteration is
    used again."""
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    if "eval_accuracy" in last:
        at_temperature_1 = {name: last[name] for name in EVALUATION}
    else:  # resumed after Ctrl-C, with nothing left to do
        at_temperature_1 = evaluate(run)
    return by_decoding(run, at_temperature_1)


def mechanism(folder) -> dict:
    """Did the parts of the algorithm do their work? Numbers of a run's metrics.jsonl, over its
    iterations: the mean of explained_variance over the second half (None without a critic), the
    mean of clip_fraction, the largest approx_kl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "clip_fraction" in row]  # not the evaluation before training
    second_half = rows[len(rows) // 2 :]
    # float: infinity stands there as a word (checkpoint.as_json)
    explained = [float(row["explained_variance"]) for row in second_half if "value_loss" in row]
    clipped = [float(row["clip_fraction"]) for row in rows]
    return {
        "explained_variance_second_half": float(np.mean(explained)) if explained else None,
        "clip_fraction": float(np.mean(clipped)) if clipped else None,
        "largest_approx_kl": max((float(row["approx_kl"]) for row in rows), default=None),
    }


def summarise(run, evaluations) -> dict:
    """The content of summary.json: accuracies before and after, cost, and what made them."""
    settings, progress = run.settings, run.progress
    after = evaluations["temperature 1"]
    return {
        "command": run.command,
        "date": time.strftime("%Y-%m-%d"),
        "method": settings.method,
        "env": settings.env,
        "seed": settings.seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "warm_start_accuracy": progress.evaluations_before["temperature 1"]["eval_accuracy"],
        "accuracy": after["eval_accuracy"],
        "accuracy_low": after["eval_low"],
        "accuracy_high": after["eval_high"],
        "episodes": progress.episodes,
        "generated_tokens": progress.generated_tokens,
        "seconds": progress.seconds,
        "warm_start_seconds": progress.warm_start_seconds,
        "peak_rss_mb": models.peak_megabytes(),
        **of_card(settings.device),
        "eval_episodes": settings.eval_episodes,
        "mechanism": mechanism(run.folder),
        "evaluations_before": progress.evaluations_before,
        "evaluations": evaluations,
    }


def of_card(device) -> dict:
    """What a run on a card says of it, its most memory too; nothing of a CPU."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return {}
    return {
        "card": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "peak_card_mb": torch.cuda.max_memory_allocated(device) / 2**20,
    }


def print_summary(summary, folder) -> None:
    """The outcome as a table on the terminal: a row per way of decoding, before and after."""
    print(
        f"\n{summary['method']} on {summary['env']}, seed {summary['seed']}: right answers to "
        f"{summary['eval_episodes']} held-out questions, with 95% intervals\n"
        f"{'':30}{'before':26}after"
    )
    for kind, after in summary["evaluations"].items():
        earlier = summary["evaluations_before"][kind]
        print(f"  {kind:28}{_share(earlier):26}{_share(after)}")
    greedy_before, greedy_after = (
        summary[when]["greedy"]["eval_accuracy"] for when in ("evaluations_before", "evaluations")
    )
    if greedy_after < greedy_before:
        print(f"  greedy accuracy FELL, from {greedy_before:.1%} to {greedy_after:.1%}")
    parts = summary["mechanism"]
    if parts["clip_fraction"] is not None:
        print(f"  the clip holds back {parts['clip_fraction']:.2%} of the tokens", end="")
        explained = parts["explained_variance_second_half"]
        if explained is not None:
            print(
                f"; in the second half the critic explains {explained:.0%} of the outcomes", end=""
            )
        print()
    print(
        f"  {summary['seconds']:.0f} s of training, "
        f"{summary['warm_start_seconds']:.0f} s of warm start, "
        f"{summary['peak_rss_mb']:.0f} MB at most; files in {folder}"
    )


def _share(evaluation):
    """An accuracy with its interval, "51.2% (46.8% to 55.5%)"."""
    accuracy, low, high = (evaluation[name] for name in EVALUATION)
    return f"{accuracy:.1%} ({low:.1%} to {high:.1%})"
