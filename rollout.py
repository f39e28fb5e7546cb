"""One batch of episodes: write responses, score them, cut them, replay them, value them.

This is the first half of an iteration (Algorithm 1 of the paper); train.py has the other half. A
response is written whole and cut afterwards, since SAPO's top-k cut needs all of its entropies.
The environment is deterministic, so replaying the segments through `env.step` afterwards earns
what stepping while writing would have earned. (A game is stepped while it is written, too, turn by
turn: its replies are a part of the transcript. Then it begins again, and its turns are replayed.)

A response's tokens and its text travel side by side: a text is never tokenised again.

Throughout, `run` is a `train.Run`. Shapes: B responses, T token positions (right-padded).
"""

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import baselines
import env
import sapo
import vlm


@dataclass
class Responses:
    """What the policy wrote to a batch of prompts."""

    indices: np.ndarray  # (B,): which example of the split each response answers
    envs: list  # B environments, reset to those examples
    inputs: vlm.Inputs  # the prompts as the model takes them
    tokens: Tensor  # (B, T) long
    written: Tensor  # (B, T) bool: tokens that the policy generated; the others are padding, or
    #                  were heard from a world that replies (inputs["heard"])
    texts: list[list[str]]  # what each token reads; the written ones join to its text
    tree: baselines.Tree | None  # how responses share their beginnings (SPO-tree)
    transcripts: vlm.Transcripts | None  # of games: the same, from which to play on


@dataclass
class Batch(Responses):
    """One batch of episodes: what was written, and what the environments made of it."""

    rollout: sapo.Rollout  # what the update learns from; its mask has the tokens that were *used*:
    #                        those written before the environment ended the episode
    entropy: Tensor  # (B, T): of the distribution each token was drawn from, in nats
    infos: list[dict]  # each episode's last info
    generated_tokens: int  # by the policy for this batch: continuations and trees count too


# ---------------------------------------------------------------------------- the whole batch


@torch.no_grad()
def collect(run, indices, split="train") -> Batch:
    """One batch of episodes: responses to the examples `indices` of a split, scored, cut, replayed
    and valued. Who deserves credit for the rewards is not decided here."""
    settings, config = run.settings, run.config
    tokens_before = run.tokens_written
    threshold = run.progress.threshold  # of the rollout before
    if settings.cut == "causal" and threshold is None:
        threshold = first_threshold(run, indices, split)

    responses = respond(run, indices, split)
    logp, entropy = score(run, run.models.policy, responses)
    ref_logp = None
    if run.models.reference is not None:
        ref_logp, _ = score(run, run.models.reference, responses)
    ends = baselines.cut(
        settings.cut,
        responses.written,
        entropy,
        logp,
        responses.texts,
        config.top_k,
        threshold,
        settings.segment_tokens,
    )
    begin_again(responses, split)
    rewards, used, infos = replay(responses.envs, responses.texts, ends, responses.written)
    ends = ends & used
    values = None
    if settings.credit == "critic":
        values = critic_values(run, responses, logp)
    elif settings.credit == "continuations":
        values = sampled_values(run, responses, ends, used, split)

    return Batch(
        **vars(responses),
        rollout=sapo.Rollout(used, ends, logp, rewards, values, ref_logp),
        entropy=entropy,
        infos=infos,
        generated_tokens=run.tokens_written - tokens_before,
    )


def train_indices(settings, iteration) -> np.ndarray:
    """The training examples of iteration 1, 2, ...: fresh ones each time. (responses,), or
    (prompts,) for a tree.

    Where a method compares a group of responses, an example is repeated for each of them, side by
    side. A tree branches from its prompt by itself, so there every example stands once.
    """
    per_prompt = baselines.responses_per_prompt(settings)
    prompts = settings.batch // per_prompt
    examples = np.arange(prompts) + prompts * (iteration - 1)
    if settings.credit == "tree":
        return examples
    return np.repeat(examples, per_prompt)


# -------------------------------------------------------------------------------------- write


def ask(run, indices, split):
    """Reset an environment per index. -> (the environments, the prompts as the model takes them).

    A prompt that a group shares is prepared once.
    """
    envs = run.envs[: len(indices)]
    observations = []
    for environment, index in zip(envs, indices, strict=True):
        observation, _ = environment.reset(options={"index": int(index), "split": split})
        observations.append(observation)
    _, first, place = np.unique(indices, return_index=True, return_inverse=True)
    distinct = [observations[i] for i in first]
    prompts = [observation["prompt"] for observation in distinct]
    pictures = [pictures_of(observation) for observation in distinct]
    system = envs[0].unwrapped.task.system
    inputs = vlm.encode(run.models.policy, prompts, pictures, system)
    return envs, vlm.take(inputs, torch.from_numpy(place))


def pictures_of(observation) -> list:
    """An observation's pictures as PIL images; there may be several ("images"), one or none."""
    if "images" in observation:
        arrays = observation["images"]
    elif "image" in observation:
        arrays = [observation["image"]]
    else:
        arrays = []
    return [Image.fromarray(array) for array in arrays]


def write(run, inputs, temperature, top_p=1.0, limit=None):
    """The policy's answers, of at most `limit` tokens (--max_new_tokens, if None).

    -> (tokens (B, T), written (B, T) bool, what each token reads).
    """
    tokens, written = vlm.generate(
        run.models.policy,
        inputs,
        limit or run.settings.max_new_tokens,
        temperature,
        top_p,
        run.grading_env.unwrapped.task.stop,
        at_once=run.settings.generate_batch,
    )
    run.tokens_written += int(written.sum())
    return tokens, written, vlm.token_texts(run.models.policy, tokens, written, env.END)


def respond(run, indices, split) -> Responses:
    """The policy's responses to a batch of prompts: one to each, or a tree from each."""
    if run.settings.credit != "tree":
        return play(run, indices, split, run.settings.temperature)
    envs, inputs = ask(run, indices, split)

    def write_on(rows, prefix, lengths, limit):
        return continue_responses(run, inputs, rows, prefix, lengths, limit)

    def ended(text):
        _, end_reason = envs[0].unwrapped.task.until_end(text)
        return bool(end_reason)

    prompt, tokens, written, tree = baselines.grow(len(indices), run.settings, write_on, ended)
    indices = indices[prompt.numpy()]  # one row per leaf
    device = run.models.policy.model.device
    tokens, written = tokens.to(device), written.to(device)  # a tree grows on the CPU
    texts = vlm.token_texts(run.models.policy, tokens, written, env.END)
    envs, inputs = ask(run, indices, split)
    return Responses(indices, envs, inputs, tokens, written, texts, tree, transcripts=None)


def play(run, indices, split, temperature, top_p=1.0) -> Responses:
    """One response to each prompt, with the replies of worlds that reply. An answer to a question
    is an episode of one turn."""
    envs, inputs = ask(run, indices, split)
    if not run.grading_env.unwrapped.task.replies:
        tokens, written, texts = write(run, inputs, temperature, top_p)
        return Responses(indices, envs, inputs, tokens, written, texts, tree=None, transcripts=None)
    transcripts = vlm.Transcripts(run.models.policy, inputs)
    texts, _ = play_on(run, envs, transcripts, temperature, top_p)
    inputs, tokens, written = transcripts.tensors()
    return Responses(indices, envs, inputs, tokens, written, texts, None, transcripts)


def play_on(run, envs, transcripts, temperature, top_p=1.0) -> tuple[list[list[str]], list[float]]:
    """Play games on from where they stand until none goes on, --generate_batch of them at a time.

    The transcripts grow. -> (what each new token reads, the reward from here on) of each episode.
    """
    texts, rewards = [], []
    for rows in torch.arange(len(envs)).split(run.settings.generate_batch or len(envs)):
        of_part = play_side_by_side(run, envs, transcripts, rows.tolist(), temperature, top_p)
        texts += of_part[0]
        rewards += of_part[1]
    return texts, rewards


def play_side_by_side(run, envs, transcripts, rows, temperature, top_p):
    """`play_on` of some rows, all at once, turn by turn.

    A game that could go on stops all the same where a turn was cut off at --max_new_tokens, and
    where reply and next turn would not fit into what the model can read.
    """
    policy, longest = run.models.policy, run.settings.max_new_tokens
    context = vlm.context_tokens(policy)
    read = functools.cache(lambda token: policy.tokenizer.decode([token]))
    texts, rewards = {row: [] for row in rows}, dict.fromkeys(rows, 0.0)
    live = rows  # those whose game goes on
    in_turn = [transcripts.open_turn(row) for row in live]  # tokens of its turn that it has already
    inputs = transcripts.prompts(live)
    if vlm.can_keep_cache(inputs):
        inputs = vlm.with_cache(policy, inputs)
    while True:
        limit = longest - min(in_turn)
        tokens, written, pieces_of = write(run, inputs, temperature, top_p, limit)
        # of a row's tokens the first `room`: less for one that begins in the middle of a turn
        room = longest - torch.tensor(in_turn)
        written &= written.cumsum(1) <= room[:, None].to(written.device)
        observations = {}  # row -> what followed its turn, of the episodes that go on
        for k, row in enumerate(live):
            pieces = pieces_of[k][: longest - in_turn[k]]
            transcripts.write(row, tokens[k][written[k]])
            texts[row] += pieces
            observation, reward, terminated, truncated, _ = envs[row].step("".join(pieces))
            rewards[row] += reward
            if not (terminated or truncated or envs[row].unwrapped.turn_is_open):
                observations[row] = observation
        replies = {
            row: reply
            for row, reply in _replies(policy, observations).items()
            if transcripts.length(row) + len(reply[0]) + longest <= context
        }
        if not replies:
            return list(texts.values()), list(rewards.values())
        for row, (heard, pictures) in replies.items():
            transcripts.hear(row, heard, pictures)
            texts[row] += [read(token) for token in heard.tolist()]
        if "past_key_values" in inputs:
            going_on = [live.index(row) for row in replies]
            inputs = vlm.continued(
                policy, inputs, going_on, tokens, written, list(replies.values())
            )
        else:
            inputs = transcripts.prompts(list(replies))
        live = list(replies)
        in_turn = [0] * len(live)


def _replies(policy, observations):
    """{row: its reply as the policy reads it} of some rows' observations."""
    words = [observation["reply"] for observation in observations.values()]
    pictures = [pictures_of(observation) for observation in observations.values()]
    return dict(zip(observations, vlm.encode_replies(policy, words, pictures), strict=True))


def continue_responses(run, inputs, rows, prefix, lengths, limit):
    """Continue answers to the prompts `rows` (K,) after the first lengths[k] tokens of prefix[k].

    prefix (K, T), lengths (K,) -> as `write`: the new tokens alone.
    """
    device = run.models.policy.model.device  # a tree's branches come from the CPU
    prompts = vlm.extended(vlm.take(inputs, rows), prefix.to(device), lengths.to(device))
    return write(run, prompts, run.settings.temperature, limit=limit)


# ------------------------------------------------------------------------------- score, value


def score(run, model, responses) -> tuple[Tensor, Tensor]:
    """How likely a model finds what was written: (log-probability of each token, entropy of the
    distribution it was drawn from), (B, T) each, in nats."""
    score_rows = functools.partial(scores_of, run, model, responses)
    return vlm.in_parts(score_rows, len(responses.tokens), _at_once(run))


def scores_of(run, model, responses, rows) -> tuple[Tensor, Tensor]:
    """`score` of some rows, all at once; differentiable in the log-probabilities."""
    inputs = vlm.take(responses.inputs, rows)
    tokens, written = responses.tokens[rows], responses.written[rows]
    return vlm.score(model, inputs, tokens, written, run.settings.temperature)


def critic_values(run, responses, logp) -> Tensor:
    """The critic's V of the prefix before each token, (B, T). logp: log pi_old of each token."""
    value_rows = functools.partial(values_of, run.models.critic, responses, logp)
    return vlm.in_parts(value_rows, len(responses.tokens), _at_once(run))


def values_of(critic, responses, logp, rows) -> Tensor:
    """`critic_values` of some rows, all at once; differentiable."""
    tokens, written = responses.tokens[rows], responses.written[rows]
    surprise = sapo.surprise(logp[rows], written) if critic.hears else None
    return vlm.prefix_values(critic, vlm.take(responses.inputs, rows), tokens, written, surprise)


def _at_once(run):
    """As many responses at once as in training, which bounds the memory of a rollout too."""
    return run.config.micro_batch or run.config.minibatch


def sampled_values(run, responses, ends, used, split) -> Tensor:
    """V at each segment's start by fresh continuations (SPO-chain, VinePPO). (B, T)."""
    is_game = responses.transcripts is not None
    rewards_after = _played_after if is_game else _answered_after

    def rewards(rows, positions):
        return rewards_after(run, responses, rows, positions, split)

    values = baselines.continuation_values(ends, used, run.settings, rewards)
    begin_again(responses, split)  # games were played on in the same environments
    return values


def _answered_after(run, responses, rows, positions, split):
    """What continuations of answers earn. Prefix and continuation have at most --max_new_tokens."""
    longest, prefixes = run.settings.max_new_tokens, responses.tokens[rows]
    limit = longest - int(positions.min())  # the shortest prefix has most room
    _, _, texts = continue_responses(run, responses.inputs, rows, prefixes, positions, limit)
    rewards = []
    for row, t, pieces in zip(rows.tolist(), positions.tolist(), texts, strict=True):
        index, prefix = int(responses.indices[row]), "".join(responses.texts[row][:t])
        run.grading_env.reset(options={"index": index, "split": split, "response": prefix})
        _, reward, *_ = run.grading_env.step("".join(pieces[: longest - t]))
        rewards.append(reward)
    return rewards


def _played_after(run, responses, rows, positions, split):
    """What games earn that are played on from the middle: their commands are given again."""
    envs = run.envs[: len(rows)]
    for environment, row, t in zip(envs, rows.tolist(), positions.tolist(), strict=True):
        index = int(responses.indices[row])
        prefix = written_text(responses, row, t)
        environment.reset(options={"index": index, "split": split, "response": prefix})
    transcripts = responses.transcripts.up_to(rows, positions)
    _, rewards = play_on(run, envs, transcripts, run.settings.temperature)
    return rewards


def written_text(responses, row, end) -> str:
    """What the policy wrote in a response's first `end` tokens, without what it heard."""
    return "".join(itertools.compress(responses.texts[row][:end], responses.written[row].tolist()))


@torch.no_grad()
def role_signal(run, batch) -> Tensor:
    """How many nats each token's log-probability drops without what it rests on (SRPO). (B, T).

    A perception token loses its picture to noise. A reasoning token has the perception that the
    model wrote itself hidden from attention.
    """
    perceives = baselines.perception(batch.texts, batch.written)
    policy = run.models.policy
    noised, _ = score(run, policy, replace(batch, inputs=vlm.noised(batch.inputs)))
    without_perception, _ = score(run, policy, replace(batch, written=batch.written & ~perceives))
    return batch.rollout.logp - torch.where(perceives, noised, without_perception)


# -------------------------------------------------------------------------------- cut, replay


def first_threshold(run, indices, split) -> float:
    """The causal cut's first threshold (nats), from a batch written for nothing else."""
    responses = respond(run, indices, split)
    _, entropy = score(run, run.models.policy, responses)
    return sapo.entropy_quantile(entropy, responses.written, run.config.top_k)


def begin_again(responses, split):
    """Reset each environment to its example, if writing has played it to its end."""
    if responses.envs[0].unwrapped.task.replies:
        for environment, index in zip(responses.envs, responses.indices, strict=True):
            environment.reset(options={"index": int(index), "split": split})


def replay(envs, texts, ends, written) -> tuple[Tensor, Tensor, list[dict]]:
    """Pass each segment of each response to its environment, one `step` per segment.

    texts: what each token reads; ends (B, T): the cut; written (B, T): by the policy. -> rewards
    (B, T), each on its segment's last token; `written` less the segments that an environment no
    longer took, as the episode was over; each episode's last info. ValueError for a response
    without a segment.
    """
    rewards = np.zeros(written.shape, np.float32)
    used = written.to("cpu", copy=True)
    infos = []
    rows = zip(envs, texts, ends.tolist(), used.tolist(), strict=True)
    for row, (environment, pieces, row_ends, row_written) in enumerate(rows):
        segments = segments_of(pieces, row_ends, row_written)
        if not segments:
            raise ValueError(f"ends: response {row} has no segment, expected at least one")
        for last, segment in segments:
            _, reward, terminated, truncated, info = environment.step(segment)
            rewards[row, last] = reward
            if terminated or truncated:
                used[row, last + 1 :] = False
                break
        infos.append(info)
    return torch.from_numpy(rewards).to(ends.device), used.to(ends.device), infos


def segments_of(pieces, ends, written) -> list[tuple[int, str]]:
    """A response's segments: (number of its last token, its text). What was heard is in no text."""
    segments, first = [], 0
    for last in range(len(pieces)):
        if ends[last]:
            own = slice(first, last + 1)
            segments.append((last, "".join(itertools.compress(pieces[own], written[own]))))
            first = last + 1
    return segments
