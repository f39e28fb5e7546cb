"""The tiny model that everything runs on by default, and its warm start.

The tiny model is a real `Idefics3ForConditionalGeneration` (SmolVLM's class) with 0.27 M parameters
and random weights. It has one token per character and per tag, is saved with its processor, opened
by `vlm.load` like any other checkpoint, and needs no torchvision.

Random weights never earn a reward, so there would be nothing to reinforce. The *warm start* lets
the model read the demonstrations of a teacher with bad habits, who slips now and then besides: it
then knows the format, and has the habits, which RL can take away again. It is cached under
runs/cache/.
"""

import hashlib
import json
import string
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm import tqdm

import checkpoint
import vlm
from tasks import TAGS

PATCH = 8  # pixels along the side of what the vision tower reads as one
SHUFFLE = 2  # patches along the side of what becomes one image token
BLOCK = PATCH * SHUFFLE  # pixels along the side of one image token: 16, a die or an arrow
# A system turn is left out: what is asked of it the tiny model learns from demonstrations.
CHAT_TEMPLATE = (
    "{% for message in messages if message['role'] != 'system' %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
SHOWN = 48  # examples whose presentation and demonstration name the cache; half a second at most


# ---------------------------------------------------------------------------------- the model


def build_tiny(
    directory,
    image_size: int = 32,
    hidden_size: int = 64,
    layers: int = 4,
    seed: int = 0,
    tags: tuple[str, ...] = TAGS,
) -> Path:
    """Write a tiny random checkpoint of SmolVLM's family into `directory`. -> the directory.

    image_size: side of the picture in pixels, a multiple of 16; a 16 x 16 block becomes one image
        token. Raises ValueError otherwise.
    hidden_size, layers: width and depth of the text model. Weights are drawn with a standard
        deviation of 1 / sqrt(hidden_size): transformers' usual 0.02 is for wide models; from it so
        narrow a one did not learn on every seed to copy what it read (docs/results.md).
    seed: of the weights. The caller's random stream does not move.
    tags: what there is one token for, besides characters.
    """
    if image_size < BLOCK or image_size % BLOCK:
        raise ValueError(
            f"image_size: {image_size}, expected a positive multiple of {BLOCK} "
            f"(patch {PATCH}, pixel shuffle {SHUFFLE})"
        )
    tokenizer = _tokenizer(tags)
    spread = hidden_size**-0.5
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = transformers.Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SHUFFLE,
        vision_config={
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": PATCH,
            "initializer_range": spread,
        },
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            initializer_range=spread,
            **ids,
        ),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Idefics3ForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(directory)
    _processor(tokenizer, image_size).save_pretrained(directory)
    return Path(directory)


def _tokenizer(tags):
    """One token per printable ASCII character, newline and tag; pad is EOS, as often elsewhere."""
    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    vocabulary = {character: i for i, character in enumerate(["<unk>", *characters])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    end = "<end_of_utterance>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token=end,
        pad_token=end,
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<global-img>", end],
    )


def _processor(tokenizer, image_size):
    """Takes pictures of exactly this side as they are: not resized, not cut into tiles."""
    image_processor = vlm.idefics3_image_processor()(
        do_resize=False,  # the bound on the longest edge below is a resize too, and enough
        do_image_splitting=False,
        max_image_size={"longest_edge": image_size},
    )
    return transformers.Idefics3Processor(
        image_processor,
        tokenizer,
        image_seq_len=(image_size // BLOCK) ** 2,
        chat_template=CHAT_TEMPLATE,
    )


# ----------------------------------------------------------------------------- the warm start

# In this share of the steps, the first, each turn of a game is learned by itself. To find one's way
# in a picture is hard for a small model, and harder yet among the pictures of all earlier turns.
ALONE = 1 / 2


def warm_start(task, settings, directory):
    """Write a tiny model into `directory` that has read noisy demonstrations of a task.

    Where the task has a habit it wins as often as the task says; any other step is wrong with
    probability settings.error_rate. What follows carries on consistently. Examples and slips are
    drawn from one NumPy generator, which settings.seed starts, as it does the weights; torch's
    random stream does not move.

    task: a tasks.Task. Raises its ValueError where it has no demonstrations.
    settings: train.Settings; seed, device, error_rate and those that begin with warm_start_ count.
    """
    build_tiny(directory, _picture_side(task), seed=settings.seed, tags=task.tags)
    model = vlm.load(directory, settings.device)
    parameters = list(model.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=settings.warm_start_lr, eps=1e-5)
    alone = round(ALONE * settings.warm_start_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.warm_start_lr, total_steps=settings.warm_start_steps + 1
    )
    rng = np.random.default_rng(settings.seed)
    bar = tqdm(range(settings.warm_start_steps), "warm start", disable=None)
    for step in bar:
        indices = rng.integers(2**31, size=settings.warm_start_batch)
        examples = [task.example_at(int(index)) for index in indices]
        inputs, tokens, mask = demonstrations(
            model, task, examples, rng, settings.error_rate, turns_alone=step < alone
        )
        logp, _ = vlm.score(model, inputs, tokens, mask)
        loss = -logp.sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"{loss.item():.3f} nats per token", refresh=False)
    model.model.save_pretrained(directory)


def demonstrations(model, task, examples, rng, error_rate, turns_alone=False):
    """Demonstrations of some examples, to learn from: (inputs, tokens, mask) as in training.

    turns_alone: each turn of a game is a row of its own, without the turns before it.
    """
    if not task.replies:
        questions = [example.question for example in examples]
        inputs = vlm.encode(model, questions, [example.image for example in examples])
        texts = [task.demonstrate(example, rng, error_rate) for example in examples]
        return inputs, *vlm.encode_responses(model, texts)
    episodes = [task.transcript(example, rng, error_rate) for example in examples]
    if turns_alone:
        episodes = [[turn] for turns in episodes for turn in turns]
    words, pictures, _ = zip(*[turns[0] for turns in episodes], strict=True)
    transcripts = vlm.Transcripts(model, vlm.encode(model, words, pictures))
    replies = [turn for turns in episodes for turn in turns[1:]]
    pictures = [[] if picture is None else [picture] for _, picture, _ in replies]
    heard = iter(vlm.encode_replies(model, [words for words, _, _ in replies], pictures))
    for row, turns in enumerate(episodes):
        written = model.tokenizer([text for _, _, text in turns], add_special_tokens=False)
        for number, ids in enumerate(written["input_ids"]):
            if number:
                transcripts.hear(row, *next(heard))
            transcripts.write(row, torch.tensor(ids, device=model.model.device))
    return transcripts.tensors()


def _picture_side(task):
    """Side of a task's pictures in pixels; without pictures, the smallest that a model can have."""
    image = task.example_at(0).image
    return image.size[0] if image else BLOCK


# ---------------------------------------------------------------------------------- its cache


def cached_warm_start(task, settings) -> Path:
    """The folder of a task's warm start, under settings.runs; made when missing or damaged.

    Its name is a hash of all that shapes the warm start (`_cache_key`), and its manifest.json holds
    the sha256 of each of its files.
    """
    folder = Path(settings.runs) / "cache" / _cache_key(task, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # runs side by side wait for the one that makes it
        if folder.exists():
            if (folder / "manifest.json").is_file() and not checkpoint.damaged(folder):
                return folder
            warnings.warn(
                f"the cached warm start {folder} is damaged: building it again", stacklevel=2
            )
        with checkpoint.replacing(folder) as aside:
            warm_start(task, settings, aside)
            (aside / "manifest.json").write_text(json.dumps(checkpoint.digest(aside)))
    return folder


def _cache_key(task, settings):
    """A hash of what shapes a warm start: settings, versions, the code that makes it, and the task.

    The task counts by what it shows (`fingerprint`), not by its source: another colour in the
    environment's renderer rebuilds nothing.
    """
    shaped = {
        "seed": settings.seed,
        "steps": settings.warm_start_steps,
        "batch": settings.warm_start_batch,
        "lr": settings.warm_start_lr,
        "error_rate": settings.error_rate,
        "device": settings.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sources": [Path(file).read_text() for file in (__file__, vlm.__file__)],
        "habits": getattr(task, "habits", None),  # which no repr of a task tells
        "tags": task.tags,
        "picture_side": _picture_side(task),
        "task": repr(task),
    }
    if settings.warm_start_steps:  # an untrained model is shown nothing
        shaped["shown"] = fingerprint(task, settings.error_rate)
    return hashlib.sha256(json.dumps(shaped).encode()).hexdigest()[:16]


def fingerprint(task, error_rate: float, count: int = SHOWN) -> str:
    """A hash of the questions, pictures and noisy demonstrations of a task's first examples.

    It changes with what the task draws, how it presents it and how it demonstrates it.
    """
    rng = np.random.default_rng(0)
    sha = hashlib.sha256()
    for index in range(count):
        example = task.example_at(index)
        if task.replies:
            turns = task.transcript(example, rng, error_rate)
            words = [[heard, written] for heard, _, written in turns]
            pictures = [picture for _, picture, _ in turns if picture]
        else:
            words = [example.question, task.demonstrate(example, rng, error_rate)]
            pictures = [example.image] if example.image else []
        sha.update(json.dumps(words).encode())
        for picture in pictures:
            sha.update(f"{picture.mode} {picture.size}".encode())
            sha.update(picture.tobytes())
    return sha.hexdigest()
