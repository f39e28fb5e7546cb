"""The model's edge: load a vision-language model, or build a tiny one; write responses; score them.

One path for both: a directory or hub name, opened with `AutoProcessor` and `AutoModelForImageTextToText` (never
`trust_remote_code`). The tiny model is a real `Idefics3ForConditionalGeneration` (SmolVLM's class, 0.27 M parameters,
one token per character and per tag), saved with its processor and loaded like any other; it needs no torchvision.

Sampling and scoring use one distribution: the same temperature, and the same banned tokens (image placeholders, padding
and other special ids: a sampled one would crash the next forward pass). There is no top-k or top-p in training. Padding
is by length, never by token id: with pad = EOS, an id cannot tell the stop the policy wrote from filling. Log-probs and
entropy are float32 under any model dtype. The text of a response is never tokenised again.

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.
"""

import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.distributions import Categorical
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

# transformers 5.17 shows a placeholder for this class where torchvision is missing, although it works without
sys.modules["transformers.models.idefics3"].Idefics3ImageProcessorPil = Idefics3ImageProcessorPil

TAGS = ("<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)

@dataclass
class VLM:
    """A loaded model with what sampling needs to know of it."""
    model: torch.nn.Module
    processor: transformers.ProcessorMixin
    banned: Tensor       # bool (V,): ids that are never sampled and score -inf
    eos_ids: list[int]   # ids that end a response

    @property
    def tokenizer(self):
        return self.processor.tokenizer

# -------------------------------------------------------------------------------------------------- build and load
def build_tiny(directory, image_size: int = 32, hidden_size: int = 64, layers: int = 4, seed: int = 0) -> Path:
    """Write a tiny random SmolVLM-family checkpoint, with its processor, into `directory`. -> the directory.

    image_size: side of the picture in pixels, a multiple of 16: a 16 x 16 block becomes one image token (patch 8, pixel
    shuffle 2). The alphabet is printable ASCII and newline, one token per character, one per tag.
    """
    if image_size < 16 or image_size % 16:
        raise ValueError(f"image_size: {image_size}, expected a positive multiple of 16 (patch 8, pixel shuffle 2)")
    tokenizer = _tiny_tokenizer()
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(do_image_splitting=False, size={"longest_edge": image_size},
                                  max_image_size={"longest_edge": image_size}),
        tokenizer, image_seq_len=(image_size // 16) ** 2, chat_template=CHAT_TEMPLATE)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        vision_config=dict(hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
                           num_attention_heads=4, image_size=image_size, patch_size=8),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
            **ids))
    with torch.random.fork_rng(devices=[]):  # the caller's random stream does not move
        torch.manual_seed(seed)
        model = transformers.Idefics3ForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)

def _tiny_tokenizer():
    """One token per printable character and per tag; pad is EOS, as in many real checkpoints."""
    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", *characters])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    end = "<end_of_utterance>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token=end, pad_token=end,
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<global-img>", end])

def load(name_or_directory, device: str = "cpu", dtype: str = "float32") -> VLM:
    """Open a checkpoint: a directory or a hub name. dtype is that of the weights: "float32", "bfloat16" or "float16".

    Raises ImportError when its processor needs a package that is missing (torchvision, for the Qwen-VL families), and
    OSError when there is no such checkpoint.
    """
    if not Path(name_or_directory).exists() and str(name_or_directory).count("/") != 1:  # a hub name is owner/name
        raise OSError(f"{name_or_directory}: neither a folder nor a hub name (owner/name)")
    try:
        processor = AutoProcessor.from_pretrained(name_or_directory)
    except ValueError as error:
        raise OSError(f"{name_or_directory}: no checkpoint there ({error})") from None
    except ImportError as error:
        what = "torchvision" if "torchvision" in str(error).lower() else str(error).strip().splitlines()[0]
        raise ImportError(f"{name_or_directory}: its processor needs {what}, which is not installed") from None
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(name_or_directory, dtype=getattr(torch, dtype))
    model.to(device).eval()
    tokenizer, generation = processor.tokenizer, model.generation_config
    eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else list(eos)
    # a checkpoint's repetition penalty, min-p and the like would reach sampling but not scoring
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=eos_ids[0])
    banned = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
    banned[len(tokenizer):] = True  # rows that only fill the embedding up to a round size
    banned[tokenizer.all_special_ids] = True
    banned[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special]] = True
    for name in ("image_token_id", "video_token_id"):
        if getattr(model.config, name, None) is not None:
            banned[getattr(model.config, name)] = True
    banned[eos_ids] = False
    return VLM(model, processor, banned.to(device), eos_ids)

# ---------------------------------------------------------------------------------------------------------- prompts
def encode(vlm: VLM, prompts: list[str], images: list) -> dict:
    """Prompts and their pictures (PIL or array, None for text alone) -> the model's inputs, (B, P) and more.

    Every tensor has B as its first dimension. Prompts are padded on the left and never truncated.
    """
    texts = []
    for prompt, image in zip(prompts, images, strict=True):
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        texts.append(vlm.processor.apply_chat_template([{"role": "user", "content": content}],
                                                       add_generation_prompt=True))
    pictures = [[image] for image in images if image is not None]
    inputs = vlm.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt",
                           **({} if vlm.tokenizer.bos_token is None else {"add_special_tokens": False}))
    return {name: x.to(vlm.model.device) for name, x in inputs.items()}

def encode_responses(vlm: VLM, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Written responses, for supervised training: tokens (B, T) with an EOS at the end of each, and mask (B, T)."""
    rows = [ids + vlm.eos_ids[:1] for ids in vlm.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], True, vlm.eos_ids[0])
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(ids) for ids in rows])[:, None]
    return tokens.to(vlm.model.device), mask.to(vlm.model.device)

def take(inputs: dict, rows: Tensor) -> dict:
    """Some rows of the inputs."""
    return {name: x[rows] for name, x in inputs.items()}

def _joined(inputs, tokens, mask):
    """Prompt and response as one input. Everything after a response's length is hidden from attention."""
    attention = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], 1)  # (B, P + T)
    joined = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1), "attention_mask": attention}
    if "mm_token_type_ids" in inputs:  # 0 marks text
        joined["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    return joined

def extended(inputs: dict, tokens: Tensor, lengths: Tensor) -> dict:
    """The inputs with the first lengths[b] tokens of a response as part of the prompt, padded on the left again."""
    T = tokens.shape[1]
    joined = _joined(inputs, tokens, torch.arange(T, device=tokens.device) < lengths[:, None])
    L = joined["input_ids"].shape[1]
    source = (torch.arange(L, device=tokens.device) - (T - lengths)[:, None]) % L  # (B, L): what is cut off goes left
    first = L - int(joined["attention_mask"].sum(1).max())
    rolled = {name: joined[name].gather(1, source)[:, first:]
              for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in joined}
    return {**joined, **rolled}

def noised(inputs: dict) -> dict:
    """The inputs with every picture replaced by Gaussian noise of the pixels' mean and spread."""
    pixels = inputs["pixel_values"]
    return {**inputs, "pixel_values": pixels.mean() + pixels.std() * torch.randn_like(pixels)}

# --------------------------------------------------------------------------------------------------------- generate
class _Stop(StoppingCriteria):
    """Ends a row at an EOS id or at the stop string, and remembers how long the row was: the only trusted length."""

    def __init__(self, vlm, prompt_tokens, stop):
        self.vlm, self.prompt_tokens, self.stop, self.lengths = vlm, prompt_tokens, stop, None
        V = len(vlm.banned)
        self.eos = torch.zeros(V, dtype=torch.bool)
        self.eos[vlm.eos_ids] = True
        tokens = vlm.tokenizer.batch_decode([[i] for i in range(min(V, len(vlm.tokenizer)))])
        may_stop = [bool(stop) and (stop[-1] in t or "\ufffd" in t) for t in tokens]  # U+FFFD: a part of a character
        self.may_stop = torch.tensor(may_stop + [False] * (V - len(tokens)))

    def __call__(self, input_ids, scores, **kwargs):
        written = input_ids[:, self.prompt_tokens:].cpu()
        if self.lengths is None:
            self.lengths = torch.zeros(len(written), dtype=torch.long)
        last, T = written[:, -1], written.shape[1]
        done = self.eos[last]
        for row in (self.may_stop[last] & (self.lengths == 0)).nonzero().flatten().tolist():
            # a token holds at least one byte, so the stop string lies within its last 4 * len(stop) tokens
            done[row] |= self.stop in self.vlm.tokenizer.decode(written[row, -4 * len(self.stop):])
        self.lengths[done & (self.lengths == 0)] = T
        return (self.lengths > 0).to(input_ids.device)

@torch.no_grad()
def generate(vlm: VLM, inputs: dict, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
             stop: str | None = None, return_logp: bool = False):
    """Sample one response per prompt. -> tokens (B, T) long, mask (B, T) bool [, logp (B, T) with return_logp].

    A row ends with an EOS id, with the token that completes `stop`, or at max_new_tokens; these last tokens belong to
    the response. temperature 0 is greedy. Draws from torch's global random stream. logp is that of the distribution
    sampled from; ask for it only with small vocabularies, since it keeps (T, B, V) scores.
    """
    P = inputs["input_ids"].shape[1]
    stopping = _Stop(vlm, P, stop)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature > 0 else {}
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=vlm.eos_ids, pad_token_id=vlm.eos_ids[0], **sampling,
        suppress_tokens=vlm.banned.nonzero().flatten().tolist(),
        return_dict_in_generate=True, output_scores=return_logp)
    out = vlm.model.generate(**inputs, generation_config=config, stopping_criteria=[stopping])
    tokens = out.sequences[:, P:]
    lengths = stopping.lengths.masked_fill(stopping.lengths == 0, tokens.shape[1]).to(tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    if not return_logp:
        return tokens, mask
    logp = torch.stack(out.scores, 1).float().log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
    return tokens, mask, torch.where(mask, logp, 0.0)

def token_texts(vlm: VLM, tokens: Tensor, mask: Tensor, end: str) -> list[list[str]]:
    """The text that each token adds, per response; they join to the whole. An EOS id reads as `end`.

    A token that stops inside a multi-byte character adds "", and the one that completes it the character, so a cut
    between the two loses nothing.
    """
    rows = []
    for ids in (row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)):
        stream, texts = decoders.DecodeStream(skip_special_tokens=False), []
        for i in ids:
            texts.append(end if i in vlm.eos_ids else stream.step(vlm.tokenizer.backend_tokenizer, i) or "")
        written = len(ids) - bool(ids and ids[-1] in vlm.eos_ids)
        if written:  # a character left unfinished at the end still shows, as U+FFFD
            texts[written - 1] += vlm.tokenizer.decode(ids[:written])[len("".join(texts[:written])):]
        rows.append(texts)
    return rows

# ------------------------------------------------------------------------------------------------------------ score
def score(vlm: VLM, inputs: dict, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token written, and the entropy of the distribution it came from: (B, T) each, nats.

    float32, differentiable, 0 off the mask. A banned token inside the mask scores -inf.
    """
    logits = vlm.model(**_joined(inputs, tokens, mask), logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]  # (B, T, V)
    # masked_fill copies: writing -inf into logits.float() would write into the model's own tensor when it is float32
    distribution = Categorical(logits=logits.float().masked_fill(vlm.banned, -torch.inf) / temperature,
                               validate_args=False)
    logp = distribution.log_prob(torch.where(mask, tokens, vlm.eos_ids[0]))
    return torch.where(mask, logp, 0.0), torch.where(mask, distribution.entropy(), 0.0)

def prefix_values(critic, inputs: dict, tokens: Tensor, mask: Tensor) -> Tensor:
    """The critic's V of the prefix before each response token: (B, T) float32, 0 off the mask."""
    values = critic(**_joined(inputs, tokens, mask))  # (B, P + T): position p has read token p
    P, T = inputs["input_ids"].shape[1], tokens.shape[1]
    return torch.where(mask, values[:, P - 1:P + T - 1], 0.0)
