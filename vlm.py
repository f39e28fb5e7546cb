"""A vision-language model's edge: open one, encode prompts, write responses, score them.

One path for the tiny model (tiny.py) and for real ones: a directory or hub name, opened with
`AutoProcessor` and `AutoModelForImageTextToText`, never with `trust_remote_code`.

    opened = vlm.load("HuggingFaceTB/SmolVLM-256M-Instruct", device="cuda", dtype="bfloat16")
    inputs = vlm.encode(opened, ["How many dice?"], [picture])
    tokens, mask = vlm.generate(opened, inputs, max_new_tokens=64)
    logp, entropy = vlm.score(opened, inputs, tokens, mask)

Four rules hold throughout:

- Sampling and scoring use one distribution: the same temperature and the same banned tokens (image
  placeholders, padding and other special ids, since a sampled one would crash the next forward
  pass). There is no top-k or top-p in training.
- Padding is by length, never by token id. Where the padding token is the EOS token, an id cannot
  tell the stop that the policy wrote from filling.
- Log-probabilities and entropies are float32 under any dtype of the weights.
- The text of a response is never tokenised again: tokens and text travel side by side.

Nothing here knows a model family. What a processor returns for a prompt travels with that prompt
(`Inputs`), and the language-model head reads only the tokens that count, in pieces (`score`).

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary,
H hidden size, N tokens under a mask.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from tokenizers import decoders
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

# Logits that `score` holds at once: 64 MiB in float32. A card is fast enough to need larger pieces:
# below some 400 rows, reading a vocabulary of 150,000 takes it longer than the product does.
PIECE = 2**24
PIECE_ON_CARD = 2**26


# -------------------------------------------------------------- a loaded model and its inputs


@dataclass
class VLM:
    """A loaded model with what sampling needs to know of it."""

    model: torch.nn.Module
    """a transformers model with a language-model head"""
    processor: transformers.ProcessorMixin
    """makes the model's inputs from text and pictures; holds the tokenizer"""
    banned: Tensor
    """bool (V,): ids that are never sampled and score -inf"""
    eos_ids: list[int]
    """ids that end a response; the first one also fills up behind it"""
    adapter: str = ""
    """of a LoRA view (models.lora): the adapter it speaks through, or "none"; "": a plain model"""

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @functools.cached_property
    def stacks_pictures(self) -> frozenset:
        """The names of picture tensors whose first dimension counts prompts, however many pictures
        a prompt has; that of the others counts pictures, tiles or patches."""
        blank = Image.new("RGB", (32, 32))
        tensors = _process(self, [_chat(self, "", 2, "")], [[blank, blank]])
        of_text = tensors["input_ids"].shape
        return frozenset(
            name for name, tensor in tensors.items() if len(tensor) == 1 and tensor.shape != of_text
        )

    def enter(self) -> torch.nn.Module:
        """Make the model this view's: its adapter on, recomputing where there are gradients."""
        if self.adapter == "none":
            self.model.disable_adapters()
        elif self.adapter:
            self.model.enable_adapters()
            self.model.set_adapter(self.adapter)
        _recompute_for_gradients(self.model)
        return self.model

    def hidden(self, inputs: dict) -> Tensor:
        """The backbone's last hidden states, (B, L, H)."""
        return self.enter().base_model(**inputs, use_cache=False).last_hidden_state


def _recompute_for_gradients(module):
    """Let layers with gradient checkpointing recompute their activations, if gradients are kept.

    Layers checkpoint in training mode alone. They get this mode without their parts (there is no
    dropout), and only where there are gradients, because it would cost generation its cache.
    """
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = layer.gradient_checkpointing and torch.is_grad_enabled()


class Inputs(dict):
    """What a model takes for B prompts, by name.

    Text tensors are (B, P). The first dimension of a picture tensor need not be B: it counts
    pictures, tiles or patches. `counts[name][b]` says how many of its rows belong to prompt b
    (0 where the prompt has no picture). A tensor that is not in `counts` has one row per prompt.
    """

    def __init__(self, tensors: dict, counts: dict[str, list[int]] | None = None):
        super().__init__(tensors)
        self.counts = counts or {}


def _counts(inputs):
    """The counts of `Inputs`; a plain dict of tensors has one row per prompt everywhere."""
    return getattr(inputs, "counts", {})


def _up_to(lengths, width):
    """bool (B, width): True on the first lengths[b] positions of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


# --------------------------------------------------------------------------------------- open


def load(
    name_or_directory,
    device: str = "cpu",
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
) -> VLM:
    """Open a checkpoint: a directory or a hub name (owner/name).

    dtype: of the weights, "float32", "bfloat16" or "float16".
    gradient_checkpointing: keep fewer activations, and make them again for the gradient.

    Raises OSError when no such checkpoint opens, ImportError when its processor needs a package
    that is missing (torchvision, for the Qwen-VL families), and ValueError when its head is not its
    last layer. The message is a line that begins with the name.
    """
    prepare(device)
    processor = open_processor(name_or_directory)
    with _refusals_in_a_line(name_or_directory):
        model = AutoModelForImageTextToText.from_pretrained(  # with PyTorch's own (sdpa) attention
            name_or_directory, dtype=getattr(torch, dtype)
        )
    model.to(device).eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = processor.tokenizer.eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else list(eos)
    # A checkpoint's repetition penalty, min-p and the like would reach sampling but not scoring.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=eos, pad_token_id=eos_ids[0]
    )
    banned = _banned_ids(model.config, processor.tokenizer, eos_ids)
    if not _head_is_last(model, torch.tensor([eos_ids], device=device)):
        raise ValueError(
            f"{name_or_directory}: its logits are capped or scaled behind its head: not supported"
        )
    return VLM(model, processor, banned.to(device), eos_ids)


def prepare(device) -> None:
    """Switch off cuDNN's attention where a card is used.

    In PyTorch 2.13 its gradients can be NaN on H100 and H200, with an explicit mask and a length
    that is 64 modulo 128 (pytorch issue 196678); prompts padded on the left make our masks
    explicit. Flash, memory-efficient and plain attention stay. To look at again with PyTorch 2.14.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def idefics3_image_processor() -> type:
    """Idefics3's image processor that needs no torchvision, made known to transformers.

    Where torchvision is missing, transformers 5.17 shows a placeholder in this class's place, which
    raises when it is used, although the class itself works without torchvision.
    """
    package = sys.modules["transformers.models.idefics3"]
    package.Idefics3ImageProcessorPil = Idefics3ImageProcessorPil
    return Idefics3ImageProcessorPil


OPENED = "give one that transformers opens as an image-text-to-text model"


@contextlib.contextmanager
def _refusals_in_a_line(name_or_directory):
    """Within it, what transformers says of a checkpoint that does not open is an OSError of one
    line: that there are no weights, that they are damaged, that the hub does not answer."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name_or_directory}: does not open ({reason}); {OPENED}") from error


def open_processor(name_or_directory):
    """A checkpoint's processor alone. OSError and ImportError as of `load`."""
    place = Path(name_or_directory)
    is_hub_name = not place.exists() and str(name_or_directory).count("/") == 1
    if not place.is_dir() and not is_hub_name:
        raise OSError(
            f"{name_or_directory}: neither a folder nor a hub name (owner/name); {OPENED}"
        )
    idefics3_image_processor()
    try:
        with _refusals_in_a_line(name_or_directory):
            processor = AutoProcessor.from_pretrained(name_or_directory)
    except ImportError as error:
        missing = str(error).strip().splitlines()[0]
        if "torchvision" in str(error).lower():  # the first line does not always name it
            missing = "torchvision"
        raise ImportError(
            f"{name_or_directory}: its processor needs {missing}, which is not installed"
        ) from None
    processor.tokenizer.padding_side = "left"
    return processor


def _banned_ids(config, tokenizer, eos_ids):
    """bool (V,): the ids that no response may hold. EOS ids are allowed, also where they pad."""
    banned = torch.zeros(config.get_text_config().vocab_size, dtype=torch.bool)
    banned[len(tokenizer) :] = True  # rows that only fill the embedding up to a round size
    banned[tokenizer.all_special_ids] = True
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            banned[token_id] = True
    for name in ("image_token_id", "video_token_id"):
        token_id = getattr(config, name, None)
        if token_id is not None:
            banned[token_id] = True
    banned[eos_ids] = False
    return banned


@torch.no_grad()
def _head_is_last(model, token_ids):
    """Are the model's logits its head's output? `score` applies the head itself, and no more."""
    logits = model(input_ids=token_ids).logits
    hidden = model.base_model(input_ids=token_ids).last_hidden_state
    # bfloat16 tells numbers apart that differ by 0.8%
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    return torch.allclose(logits, model.get_output_embeddings()(hidden), tolerance, 1e-5)


# ------------------------------------------------------------------------------------- encode


def encode(vlm: VLM, prompts: list[str], images: list, system: str = "") -> Inputs:
    """Prompts and their pictures -> the model's inputs, (B, P) and more.

    Padded on the left, never truncated.
    images: for each prompt a picture (PIL or array), a list of them, or None. Where they stand in
        the prompt is the chat template's business.
    system: the text of a system turn before each prompt; "": none.
    Raises ValueError when there are not as many images as prompts.
    """
    pictures = [_as_list(image) for image in images]

    @functools.cache  # the prompts of a task repeat its question
    def chat(prompt, count):
        return _chat(vlm, prompt, count, system)

    texts = [chat(prompt, len(own)) for prompt, own in zip(prompts, pictures, strict=True)]
    return _encoded(vlm, texts, pictures)


def _encoded(vlm, texts, pictures, goes_on=False):
    """Texts as the model reads them, each with its list of pictures -> Inputs. See `_process`."""
    numbers = {len(own) for own in pictures}
    if numbers == {0} or numbers == {1}:  # the usual case: the processor is called once
        tensors = _process(vlm, texts, pictures, goes_on)
        if all(len(tensor) == len(texts) for tensor in tensors.values()):
            return Inputs(tensors)

    # Otherwise one text at a time, which shows what rows of a picture tensor belong to a text.
    rows = [
        _process(vlm, [text], [own], goes_on) for text, own in zip(texts, pictures, strict=True)
    ]
    text_shape = rows[0]["input_ids"].shape
    tensors, counts = {}, {}
    for name in dict.fromkeys(name for row in rows for name in row):  # every name, once, in order
        parts = [row[name] for row in rows if name in row]
        if name in rows[0] and rows[0][name].shape == text_shape:
            filling = vlm.eos_ids[0] if name == "input_ids" else 0
            tensors[name] = _stacked(parts, left=True, filling=filling)
        else:
            tensors[name] = _stacked(parts, left=False, filling=0)
            counts[name] = [len(row[name]) if name in row else 0 for row in rows]
    return Inputs(tensors, counts)


def _as_list(image):
    """A prompt's pictures as a list: of one, of several, or of None."""
    if image is None:
        return []
    if isinstance(image, list | tuple):
        return list(image)
    return [image]


def _chat(vlm, prompt, count, system):
    """The text of a system turn, a user turn with `count` pictures, and the start of an answer."""
    if not getattr(vlm.processor, "chat_template", None):
        # a base model: its processor puts the pictures first
        return f"{system}\n{prompt}" if system else prompt

    def rendered(*turns):
        return vlm.processor.apply_chat_template(turns, add_generation_prompt=True)

    if not system:
        return rendered(_turn("user", prompt, count))
    try:
        return rendered(_turn("system", system), _turn("user", prompt, count))
    except TemplateError:  # a template without a system role
        return rendered(_turn("user", f"{system}\n\n{prompt}", count))


def _turn(role, text, count=0):
    """One message of a chat: `count` pictures, then text."""
    pictures = [{"type": "image"} for _ in range(count)]
    return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}


def _process(vlm, texts, pictures, goes_on=False):
    """The processor's tensors for some prompts with equally many pictures each.

    goes_on: the texts stand behind others, so nothing that begins a prompt is put before them.
    """
    kwargs = {}
    bos = vlm.tokenizer.bos_token
    if goes_on or (bos and texts[0].startswith(bos)):  # or the chat template wrote it already
        kwargs["add_special_tokens"] = False
    inputs = vlm.processor(
        text=texts,
        images=pictures if pictures[0] else None,
        padding=True,
        return_tensors="pt",
        **kwargs,
    )
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name != "labels":  # PaliGemma's processor makes labels
            tensors[name] = value.to(vlm.model.device)
    return tensors


def _stacked(parts, left, filling):
    """The rows of all parts. Where other dimensions differ, the smaller parts are filled up.

    left: whether the filling goes before the content or behind it.
    """
    sizes = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled = []
    for part in parts:
        padding = []  # F.pad wants (before, behind) of the last dimension first
        for size, length in zip(reversed(sizes), reversed(part.shape[1:]), strict=True):
            gap = size - length
            padding += [gap, 0] if left else [0, gap]
        filled.append(F.pad(part, padding, value=filling))
    return torch.cat(filled)


def encode_responses(vlm: VLM, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Responses to learn from: tokens (B, T), with an EOS behind each response, and mask (B, T)."""
    eos = vlm.eos_ids[0]
    token_ids = vlm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [torch.tensor([*ids, eos]) for ids in token_ids]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos)  # (B, T)
    mask = _up_to(torch.tensor([len(row) for row in rows]), tokens.shape[1])
    return tokens.to(vlm.model.device), mask.to(vlm.model.device)


# -------------------------------------------------------------------------- rows and prefixes


def take(inputs: dict, rows: Tensor) -> Inputs:
    """Some prompts of the inputs, with their pictures. rows: their numbers; they may repeat."""
    counts = _counts(inputs)
    rows = torch.as_tensor(rows, device=inputs["input_ids"].device)
    tensors = {name: tensor[rows] for name, tensor in inputs.items() if name not in counts}
    numbers = rows.tolist() if counts else []
    taken_counts = {}
    for name, count in counts.items():
        taken = [count[row] for row in numbers]
        if any(taken):  # where none of these prompts has a picture, there is no picture tensor
            parts = inputs[name].split(count)  # one part per prompt
            tensors[name] = torch.cat([parts[row] for row in numbers])
            taken_counts[name] = taken
    return Inputs(tensors, taken_counts)


def joined(inputs: dict, tokens: Tensor, mask: Tensor) -> dict:
    """Prompt and response as one input, (B, P + T). What the mask leaves out is not attended to,
    unless it was heard (`Transcripts`)."""
    attention = inputs["attention_mask"]
    if "heard" in inputs:  # tokens between the turns of a game, which the policy reads too
        mask = mask | inputs["heard"][:, : mask.shape[1]]
    whole = {
        **{name: tensor for name, tensor in inputs.items() if name != "heard"},
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),  # (B, P + T)
        "attention_mask": torch.cat([attention, mask.to(attention.dtype)], 1),  # (B, P + T)
    }
    # Some families mark the kind of each token; this is how they mark the text of an answer.
    for name, answer_text in (("mm_token_type_ids", 0), ("token_type_ids", 1)):
        if name in inputs:
            whole[name] = torch.cat([inputs[name], torch.full_like(tokens, answer_text)], 1)
    return whole


def extended(inputs: dict, tokens: Tensor, lengths: Tensor) -> Inputs:
    """The inputs with the first lengths[b] tokens of a response as part of the prompt.

    Padded on the left again: each row is rolled to the right, so that its last kept token comes to
    stand last, and the tokens it does not keep become padding on the left.
    """
    T = tokens.shape[1]
    whole = joined(inputs, tokens, _up_to(lengths, T))
    L = whole["input_ids"].shape[1]
    # source[b, p]: the column that column p of row b is read from
    source = (torch.arange(L, device=tokens.device) - (T - lengths)[:, None]) % L  # (B, L)
    first = L - int(whole["attention_mask"].sum(1).max())  # columns up to here are all padding
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in whole:
            whole[name] = whole[name].gather(1, source)[:, first:]  # (B, L - first)
    return Inputs(whole, _counts(inputs))


def noised(inputs: dict) -> Inputs:
    """The inputs with every picture replaced by Gaussian noise of the pixels' mean and spread.

    Draws from torch's global random stream.
    """
    pixels = inputs["pixel_values"]
    real = pixels != 0  # what a processor fills up stays zero, and no real pixel is exactly that
    noise = pixels[real].mean() + pixels[real].std() * torch.randn_like(pixels)
    return Inputs({**inputs, "pixel_values": torch.where(real, noise, 0.0)}, _counts(inputs))


# -------------------------------------------------------------------------------- transcripts

MARK = "@@what the policy wrote@@"  # stands for a turn of the policy, and is cut out again


def encode_replies(vlm: VLM, replies: list[str], images: list) -> list[tuple[Tensor, dict]]:
    """What a policy reads between two of its turns: the end of its own turn, the reply as a user
    turn, the start of its next. -> for each its token ids (N,), and its picture tensors by name.

    images: for each reply a list of pictures, which may be empty. ValueError for a picture where
    the model is told of its prompt's pictures in a way that a reply's cannot be added to.
    """
    if not replies:
        return []
    between = functools.cache(functools.partial(_between_turns, vlm))  # replies repeat, too
    texts = [between(reply, len(own)) for reply, own in zip(replies, images, strict=True)]
    if not any(images):
        ids = vlm.tokenizer(texts, add_special_tokens=False)["input_ids"]
        flat = torch.tensor(sum(ids, []), dtype=torch.long, device=vlm.model.device)
        return [(row, {}) for row in flat.split([len(row) for row in ids])]
    inputs = _encoded(vlm, texts, images, goes_on=True)
    _check_picture_of_reply(inputs)
    encoded = []
    for row in range(len(texts)):
        own = take(inputs, torch.tensor([row]))
        ids, is_text = own["input_ids"], own["attention_mask"].bool()
        pictures = {name: part for name, part in own.items() if part.shape != ids.shape}
        encoded.append((ids[is_text], pictures))
    return encoded


def _between_turns(vlm, reply, count):
    """The text from the end of one turn of the policy to the start of its next."""
    if not getattr(vlm.processor, "chat_template", None):
        return f"\n{reply}\n"
    turns = [_turn("user", ""), _turn("assistant", MARK), _turn("user", reply, count)]
    chat = vlm.processor.apply_chat_template(turns, add_generation_prompt=True)
    if MARK not in chat:
        raise ValueError(
            "this model's chat template leaves out what the assistant said before; expected one "
            "that shows all turns, as a game has several"
        )
    return chat.partition(MARK)[2]


def _check_picture_of_reply(tensors):
    """ValueError for the families whose extra inputs describe the prompt's pictures: the kind of
    each of its tokens (Qwen-VL, PaliGemma), or how many pictures there are (LLaVA-OneVision)."""
    for name, tensor in tensors.items():
        is_kind = name in ("mm_token_type_ids", "token_type_ids")
        if is_kind or tensor.dim() == 1:
            raise ValueError(
                f"replies with pictures: this model's input {name} is not supported; expected "
                "a model that reads each picture by itself, or replies in words alone"
            )


class Transcripts:
    """B episodes that go on, turn by turn: the prompts, and what was written and heard since.

    Tokens are kept as they came, never tokenised again. A transcript ends with a token of the
    policy, or is about to be continued.
    """

    def __init__(self, vlm: VLM, inputs: Inputs):
        self.vlm, self.inputs = vlm, inputs
        count = len(inputs["input_ids"])
        empty = inputs["input_ids"].new_zeros(0)
        self.prompt_lengths = inputs["attention_mask"].sum(1).tolist()
        self.tokens = [empty] * count  # of each row, (T of the row,)
        self.written = [empty.bool()] * count  # which of them the policy wrote
        # (tokens before it, its picture tensors by name) of each reply that has pictures
        self.pictures = [[] for _ in range(count)]

    def write(self, row: int, tokens: Tensor):
        """The policy wrote these tokens."""
        self._append(row, tokens, True)

    def hear(self, row: int, tokens: Tensor, pictures: dict):
        """The world replied: an item of `encode_replies`."""
        if pictures:
            self.pictures[row].append((len(self.tokens[row]), pictures))
        self._append(row, tokens, False)

    def length(self, row: int) -> int:
        """Of the prompt and all that came after it, in tokens."""
        return self.prompt_lengths[row] + len(self.tokens[row])

    def open_turn(self, row: int) -> int:
        """How many tokens the policy has written since it last heard something."""
        heard = (~self.written[row]).nonzero()
        return len(self.written[row]) - (int(heard[-1]) + 1 if len(heard) else 0)

    def up_to(self, rows: Tensor, lengths: Tensor) -> "Transcripts":
        """New ones: the first lengths[k] tokens of row rows[k]."""
        shorter = Transcripts(self.vlm, take(self.inputs, rows))
        for k, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            shorter.tokens[k] = self.tokens[row][:length]
            shorter.written[k] = self.written[row][:length]
            shorter.pictures[k] = [part for part in self.pictures[row] if part[0] < length]
        return shorter

    def _append(self, row, tokens, is_written):
        self.tokens[row] = torch.cat([self.tokens[row], tokens])
        flags = torch.full_like(tokens, is_written, dtype=torch.bool)
        self.written[row] = torch.cat([self.written[row], flags])

    def tensors(self, rows=None):
        """(inputs, tokens (B, T), written (B, T)) of some rows, of all if None.

        In the inputs, `heard` (B, T) marks the replies' tokens, and the pictures of the replies
        stand behind the prompt's.
        """
        rows = range(len(self.tokens)) if rows is None else rows
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        tokens = pad([self.tokens[row] for row in rows], padding_value=self.vlm.eos_ids[0])
        written = pad([self.written[row] for row in rows])
        lengths = torch.tensor([len(self.tokens[row]) for row in rows], device=tokens.device)
        inputs = self._with_pictures(rows)
        inputs["heard"] = _up_to(lengths, tokens.shape[1]) & ~written
        return inputs, tokens, written

    def prompts(self, rows) -> Inputs:
        """All of it so far as the prompts of the next turn, padded on the left."""
        inputs, tokens, _ = self.tensors(rows)
        lengths = torch.tensor([len(self.tokens[row]) for row in rows], device=tokens.device)
        return extended(inputs, tokens, lengths)

    def _with_pictures(self, rows):
        """The prompts of these rows, with the pictures of their replies behind their own."""
        taken = take(self.inputs, torch.tensor(list(rows)))
        if not any(self.pictures[row] for row in rows):
            return taken
        own = [
            [take(self.inputs, [row]), *(pictures for _, pictures in self.pictures[row])]
            for row in rows
        ]
        pictures = _joined_pictures(self.vlm, own)
        return Inputs({**taken, **pictures}, {**_counts(taken), **_counts(pictures)})


def _joined_pictures(vlm, of_rows):
    """The picture tensors of some rows. of_rows: for each, the dicts that its pictures stand in, in
    their order; what is not of pictures is left out."""
    names = {
        name
        for parts in of_rows
        for part in parts
        for name in part
        if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    tensors, counts = {}, {}
    for name in names:
        joined_parts = []
        for parts in of_rows:
            own = [part[name] for part in parts if name in part]
            if own and name in vlm.stacks_pictures:  # (1, pictures, ...) each
                own = [_stacked([part.transpose(0, 1) for part in own], False, 0).transpose(0, 1)]
            joined_parts.append(own)
        tensors[name] = _stacked([part for own in joined_parts for part in own], False, 0)
        counts[name] = [sum(map(len, own)) for own in joined_parts]
    return Inputs(tensors, counts)


def context_tokens(vlm: VLM) -> float:
    """How many tokens the model can read at once; inf where its configuration does not say."""
    config = vlm.model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or float("inf")


def can_keep_cache(inputs: dict) -> bool:
    """Can keys and values of these prompts be kept for a next turn (`with_cache`)? Not where a
    model is told the kind of each token (Qwen-VL, PaliGemma): there the next turn reads it all.
    """
    return not {"token_type_ids", "mm_token_type_ids"} & set(inputs)


def with_cache(vlm: VLM, inputs: Inputs) -> Inputs:
    """Prompts whose keys and values `generate` keeps, so that `continued` can go on from them."""
    cache = transformers.DynamicCache(config=vlm.model.config.get_text_config())
    return Inputs({**inputs, "past_key_values": cache}, _counts(inputs))


def continued(vlm: VLM, inputs: Inputs, rows, tokens: Tensor, written: Tensor, replies) -> Inputs:
    """The prompts of the next turn on top of kept keys and values: only what is new is read.

    inputs: those of the turn before, from `with_cache` or from here; rows: which of them go on, in
    ascending order; tokens, written: what `generate` made of them; replies: an item of
    `encode_replies` for each of the rows. Rows are not aligned again: between what one has read and
    its reply there may be a gap, which the attention mask leaves out, and by which positions are
    counted.
    """
    cache, attention = inputs["past_key_values"], inputs["attention_mask"]
    rows = torch.as_tensor(rows, device=tokens.device)
    if len(rows) < len(attention):  # of all rows the cache would be copied for nothing
        cache.batch_select_indices(rows)
    ids = [of_row[None] for of_row, _ in replies]
    heard = _stacked(ids, left=True, filling=vlm.eos_ids[0])
    is_heard = _stacked([torch.ones_like(of_row) for of_row in ids], left=True, filling=0)
    pictures = _joined_pictures(vlm, [[of_reply] for _, of_reply in replies])
    return Inputs(
        {
            "input_ids": torch.cat([inputs["input_ids"][rows], tokens[rows], heard], 1),
            "attention_mask": torch.cat(
                [attention[rows], written[rows].to(attention), is_heard.to(attention)], 1
            ),
            "past_key_values": cache,
            **pictures,
        },
        _counts(pictures),
    )


# ----------------------------------------------------------------------------------- generate


@torch.no_grad()
def generate(
    vlm: VLM,
    inputs: dict,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: str | None = None,
    return_logp: bool = False,
    at_once: int = 0,
):
    """Sample one response per prompt. -> tokens (B, T) long, mask (B, T) bool [, logp (B, T)].

    A row ends with an EOS id, with the token that completes the string `stop`, or at
    max_new_tokens. This last token belongs to the response.
    temperature: 0 is greedy. Otherwise the draws come from torch's global random stream.
    return_logp: return also the log-probability of each token under the distribution that it was
        sampled from.
    at_once: prompts that are answered at a time, which bounds the memory of keys, values and
        pictures; 0: all. Each part draws in its turn, so another split gives other samples of the
        same distribution; greedy in float32, it gives the same ones. ValueError for kept keys and
        values.
    FloatingPointError where a response was drawn from probabilities that are NaN.
    """
    B = len(inputs["input_ids"])
    if 0 < at_once < B:
        if "past_key_values" in inputs:
            raise ValueError(f"at_once: {at_once} of {B} prompts whose keys and values are kept")
        parts = [
            generate(vlm, take(inputs, rows), max_new_tokens, temperature, top_p, stop, return_logp)
            for rows in torch.arange(B).split(at_once)
        ]
        fillings = (vlm.eos_ids[0], 0, 0)  # of tokens, mask, logp
        columns = zip(*parts, strict=True)
        return tuple(
            _stacked(list(column), left=False, filling=filling)
            for column, filling in zip(columns, fillings, strict=False)
        )
    P = inputs["input_ids"].shape[1]
    config = transformers.GenerationConfig(  # greedy: `_Draw` makes a sample of what is likeliest
        max_new_tokens=max_new_tokens,
        eos_token_id=vlm.eos_ids,
        pad_token_id=vlm.eos_ids[0],
    )
    drawing, stopping = _Draw(temperature > 0), _Stop(vlm, P, stop)
    sequences = vlm.enter().generate(
        **inputs,
        generation_config=config,
        logits_processor=[*_distribution(vlm, temperature, top_p), drawing],
        stopping_criteria=[stopping],
    )
    if drawing.is_broken:
        raise FloatingPointError(
            "the policy's probabilities are NaN: its weights are broken, lower the learning rates"
        )
    tokens = sequences[:, P:]  # (B, T)
    T = tokens.shape[1]
    lengths = stopping.lengths.masked_fill(stopping.lengths == 0, T)  # (B,): 0 means never stopped
    mask = _up_to(lengths.to(tokens.device), T)  # (B, T)
    if not return_logp:
        return tokens, mask
    return tokens, mask, torch.where(mask, torch.stack(drawing.logp, 1), 0.0)


def _distribution(vlm, temperature, top_p) -> list[LogitsProcessor]:
    """What turns logits into those of the distribution that is drawn from."""
    processors = [_Ban(vlm.banned)]
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if temperature > 0 and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


class _Ban(LogitsProcessor):
    """Banned tokens get a logit of -inf.

    `suppress_tokens` would do the same, but looks through the whole vocabulary again at each token
    (`torch.isin`), and the CPU waits for the GPU.
    """

    def __init__(self, banned):
        self.banned = banned  # bool (V,)

    def __call__(self, input_ids, scores):
        return scores.masked_fill(self.banned.to(scores.device), -float("inf"))


class _Draw(LogitsProcessor):
    """Draws a token from p = softmax(scores) and gives it the largest score, for greedy decoding to
    take; and keeps its log-probability.

    With e_i drawn from the exponential distribution, p_i / e_i is the largest with probability p_i.
    `torch.multinomial` draws one token in the same way, from the same random numbers, but first
    asks twice whether p is valid, and the CPU waits for the GPU.
    """

    def __init__(self, is_sampling):
        self.is_sampling = is_sampling  # otherwise the likeliest token is the one
        self.logp = []  # of (B,) each, per token
        self.is_broken = False  # was p NaN? Read once, at the end

    def __call__(self, input_ids, scores):
        p = scores.softmax(-1)  # (B, V)
        drawn = p / torch.empty_like(p).exponential_() if self.is_sampling else scores
        token = drawn.argmax(-1, keepdim=True)
        self.logp.append(p.gather(1, token).squeeze(1).log())
        self.is_broken = self.is_broken | self.logp[-1].isnan().any()
        return drawn


class _Stop(StoppingCriteria):
    """Ends a row at an EOS id or at the stop string, and remembers how long the row was.

    These `lengths`, (B,) and 0 for a row that goes on, are the only ones to trust: an EOS id behind
    a row's end is padding. Finished rows do not move the random stream of the others.
    """

    def __init__(self, vlm, prompt_tokens, stop):
        self.vlm = vlm
        self.prompt_tokens = prompt_tokens
        self.stop = stop
        self.lengths = None
        self.is_over = None  # (B,), where the model is: moved there only when a row ends
        self.is_eos = torch.zeros(len(vlm.banned), dtype=torch.bool)
        self.is_eos[vlm.eos_ids] = True
        self.may_complete = _may_complete(vlm.tokenizer, stop, len(vlm.banned))

    def __call__(self, input_ids, scores, **kwargs):
        # A token holds at least one byte and a character at most four, so a stop string that was
        # just completed lies within the last 4 * len(stop) tokens. It may begin in the prompt.
        recent = input_ids[:, -4 * len(self.stop or " ") :].cpu()
        if self.lengths is None:
            self.lengths = torch.zeros(len(recent), dtype=torch.long)
        last = recent[:, -1]  # (B,)
        ended = self.is_eos[last]
        candidates = self.may_complete[last] & (self.lengths == 0)
        for row in candidates.nonzero().flatten().tolist():
            with_last, before = self.vlm.tokenizer.batch_decode([recent[row], recent[row, :-1]])
            if with_last.count(self.stop) > before.count(self.stop):
                ended[row] = True
        ended &= self.lengths == 0  # now, not earlier
        if self.is_over is None or ended.any():
            self.lengths[ended] = input_ids.shape[1] - self.prompt_tokens
            self.is_over = (self.lengths > 0).to(input_ids.device)
        return self.is_over


@functools.lru_cache
def _may_complete(tokenizer, stop, V):
    """bool (V,): the tokens after which `stop` may be complete, so that others need no decoding.

    Such a token holds `stop`, or begins with an end of it, or with half a character (U+FFFD).
    """
    if not stop:
        return torch.zeros(V, dtype=torch.bool)
    texts = tokenizer.batch_decode([[token_id] for token_id in range(min(V, len(tokenizer)))])
    beginnings = (*(stop[k:] for k in range(len(stop))), "\ufffd")
    possible = [stop in text or text.startswith(beginnings) for text in texts]
    return torch.tensor(possible + [False] * (V - len(texts)))  # ids without a token never do


def token_texts(vlm: VLM, tokens: Tensor, mask: Tensor, end: str) -> list[list[str]]:
    """The text that each token adds, per response; joined they are the whole response.

    An EOS id reads as `end`. A token that stops inside a multi-byte character adds "", and the
    token that completes the character adds it: a segment that ends between the two loses nothing.
    """
    rows = zip(tokens.cpu(), mask.cpu(), strict=True)
    return [_texts_of(vlm, row[own].tolist(), end) for row, own in rows]


def _texts_of(vlm, ids, end):
    stream = decoders.DecodeStream(skip_special_tokens=False)
    texts = []  # None where the stream holds back a character that is unfinished
    for token_id in ids:
        if token_id in vlm.eos_ids:
            texts.append(end)
        else:
            texts.append(stream.step(vlm.tokenizer.backend_tokenizer, token_id))

    count = len(ids)
    if ids and ids[-1] in vlm.eos_ids:
        count -= 1
    if count and texts[count - 1] is None:  # it still shows, as U+FFFD
        shown = "".join(text or "" for text in texts[:count])
        texts[count - 1] = vlm.tokenizer.decode(ids[:count])[len(shown) :]
    return [text or "" for text in texts]


# -------------------------------------------------------------------------------------- score


def score(
    vlm: VLM, inputs: dict, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of the distribution it came from, in nats.

    (B, T) each, float32, 0 off the mask. Log-probabilities are differentiable; the entropy is a
    measurement and is not. A banned token inside the mask scores -inf.

    Logits are made for the N tokens under the mask alone, PIECE numbers at a time, and made again
    for the gradient, so that (B, T, V) is never in memory. What the pieces say about the head's
    weights is summed in float32.
    """
    P = inputs["input_ids"].shape[1]
    T = _used_columns(mask)
    hidden = vlm.hidden(joined(inputs, tokens[:, :T], mask[:, :T]))  # (B, P + T, H)
    written = mask.nonzero(as_tuple=True)  # of the N tokens: (row, column)
    hidden = hidden[:, P - 1 : -1][written]  # (N, H): position p predicts token p + 1
    head = vlm.model.get_output_embeddings()
    size = max(1, (PIECE_ON_CARD if hidden.is_cuda else PIECE) // len(vlm.banned))
    pieces = list(zip(hidden.split(size), tokens[written].split(size), strict=True))
    if len(pieces) > 1:
        head = _summing_gradients_in_float32(head)
    logps, entropies = [], []
    for piece in pieces:
        arguments = (head, *piece, vlm.banned, temperature)
        if len(pieces) > 1:
            logp, entropy = checkpoint(_token_scores, *arguments, use_reentrant=False)
        else:
            logp, entropy = _token_scores(*arguments)
        logps.append(logp)
        entropies.append(entropy)
    zeros = hidden.new_zeros(mask.shape, dtype=torch.float32)
    logp = zeros.masked_scatter(mask, torch.cat(logps))  # (N,) -> (B, T)
    entropy = zeros.masked_scatter(mask, torch.cat(entropies))  # (N,) -> (B, T)
    return logp, entropy


def _summing_gradients_in_float32(head):
    """The same head, whose uses send their gradients to its weights through float32.

    Autograd sums the gradients of a weight's uses in the weight's dtype. Of many pieces in bfloat16
    the later ones would be rounded away: one more of 256 equal terms is below half of a step.
    """
    trains_low_precision = any(
        parameter.requires_grad and parameter.dtype != torch.float32
        for parameter in head.parameters()
    )
    if not (trains_low_precision and torch.is_grad_enabled()):
        return head  # nothing is summed, or in float32 anyway
    wide = {name: parameter.float() for name, parameter in head.named_parameters()}

    def apply(hidden):
        narrow = {name: parameter.to(hidden.dtype) for name, parameter in wide.items()}
        return torch.func.functional_call(head, narrow, (hidden,))

    return apply


def _used_columns(mask):
    """How many columns of a (B, T) mask hold anything: the others are not worth a forward pass."""
    numbered = torch.arange(1, mask.shape[1] + 1, device=mask.device)  # (T,)
    return int((numbered * mask).max()) or mask.shape[1]


def _token_scores(head, hidden, tokens, banned, temperature):
    """hidden (N, H), tokens (N,) -> log-probabilities and entropies, (N,) each."""
    # The division makes a copy, so that the ban is not written into the head's own output.
    logits = (head(hidden).float() / temperature).masked_fill_(banned, -torch.inf)  # (N, V)
    logp = logits.log_softmax(-1)
    with torch.no_grad():
        finite = logp.clamp(min=torch.finfo(logp.dtype).min)  # a banned token adds 0 * min = 0
        entropy = -(logp.exp() * finite).sum(-1)  # (N,)
    return logp.gather(1, tokens[:, None]).squeeze(1), entropy


def prefix_values(
    critic, inputs: dict, tokens: Tensor, mask: Tensor, surprise: Tensor | None = None
) -> Tensor:
    """The critic's V of the prefix *before* each response token: (B, T) float32, 0 off the mask.

    critic: a module that maps the model's inputs to a value per position, (B, L), where position p
    has read the tokens up to and including p (a `sapo.SegmentCritic`).
    surprise: what a critic that hears is told after each response token, (B, T).
    """
    P = inputs["input_ids"].shape[1]
    T = _used_columns(mask)
    _recompute_for_gradients(critic)
    told = {}
    if surprise is not None:  # before the first token nothing was surprising
        told["surprise"] = F.pad(surprise[:, :T], (P, 0))  # (B, P + T)
    whole = joined(inputs, tokens[:, :T], mask[:, :T])
    values = critic(**whole, **told, use_cache=False)  # (B, P + T)
    values = torch.where(mask[:, :T], values[:, P - 1 : -1], 0.0)  # (B, T used)
    return F.pad(values, (0, mask.shape[1] - T))  # (B, T)


def in_parts(function: Callable, count: int, size: int):
    """function(rows) of `count` responses, `size` of them at a time (0: all), joined.

    function returns one tensor, or a tuple of tensors, with a row per response.
    """
    parts = [function(rows) for rows in torch.arange(count).split(size or count)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
