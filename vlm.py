"""The model's edge: load a vision-language model, or build a tiny one; write responses; score them.

One path for both: a directory or hub name, opened with `AutoProcessor` and `AutoModelForImageTextToText` (never
`trust_remote_code`). The tiny model is a real `Idefics3ForConditionalGeneration` (SmolVLM's class, 0.27 M parameters,
one token per character and per tag), saved with its processor and loaded like any other; it needs no torchvision.

Sampling and scoring use one distribution: the same temperature, and the same banned tokens (image placeholders, padding
and other special ids: a sampled one would crash the next forward pass). There is no top-k or top-p in training. Padding
is by length, never by token id: with pad = EOS, an id cannot tell the stop the policy wrote from filling. Log-probs and
entropy are float32 under any model dtype. The text of a response is never tokenised again.

Nothing here knows a model family: what a processor returns for a prompt travels with it (`Inputs`), the head reads only
the tokens that count, in pieces (`score`), and one backbone in memory can be policy, critic and reference (`lora`).

Shapes: B responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary.
"""

import functools
import string
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

# transformers 5.17 shows a placeholder for this class where torchvision is missing, although it works without
sys.modules["transformers.models.idefics3"].Idefics3ImageProcessorPil = Idefics3ImageProcessorPil

TAGS = ("<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)

PIECE = 2**24  # logits held at once by `score`: 64 MiB in float32

@dataclass
class VLM:
    """A loaded model with what sampling needs to know of it."""
    model: torch.nn.Module
    processor: transformers.ProcessorMixin
    banned: Tensor       # bool (V,): ids that are never sampled and score -inf
    eos_ids: list[int]   # ids that end a response
    adapter: str = ""    # with `lora`: the adapter that this view of the model speaks through, or "none"

    tokenizer = property(lambda self: self.processor.tokenizer)
    hidden_size = property(lambda self: self.model.config.get_text_config().hidden_size)

    def enter(self):
        """Make the model this view's: its adapter on, gradient checkpointing on where there are gradients."""
        if self.adapter == "none":
            self.model.disable_adapters()
        elif self.adapter:
            self.model.enable_adapters()
            self.model.set_adapter(self.adapter)
        _recompute(self.model)
        return self.model

    def hidden(self, inputs: dict) -> Tensor:
        """The backbone's last hidden states, (B, L, H)."""
        return self.enter().base_model(**inputs, use_cache=False).last_hidden_state

def _recompute(module):
    # Layers checkpoint in training mode alone: they get it without their parts (there is no dropout), and only where
    # there are gradients, as it would cost generation its cache.
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = layer.gradient_checkpointing and torch.is_grad_enabled()

class Inputs(dict):
    """What a model takes for B prompts: text tensors (B, P), and picture tensors whose first dimension need not be B;
    counts: how many rows of each of the latter belong to each prompt (pictures, tiles or patches, 0 for none)."""
    def __init__(self, tensors, counts=None):
        super().__init__(tensors)
        self.counts = counts or {}

# -------------------------------------------------------------------------------------------------- build and load
def build_tiny(directory, image_size: int = 32, hidden_size: int = 64, layers: int = 4, seed: int = 0) -> Path:
    """Write a tiny random SmolVLM-family checkpoint, with its processor, into `directory`. -> the directory.
    image_size: side of the picture in pixels, a multiple of 16: a 16 x 16 block becomes one image token (patch 8, pixel
    shuffle 2). The alphabet is printable ASCII and newline, one token per character, one per tag."""
    if image_size < 16 or image_size % 16:
        raise ValueError(f"image_size: {image_size}, expected a positive multiple of 16 (patch 8, pixel shuffle 2)")
    tokenizer = _tiny_tokenizer()
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(do_resize=False, do_image_splitting=False,  # one resize is enough, to
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

def load(name_or_directory, device: str = "cpu", dtype: str = "float32", gradient_checkpointing: bool = False) -> VLM:
    """Open a checkpoint: a directory or a hub name. dtype is that of the weights: "float32", "bfloat16" or "float16".
    Raises ImportError when its processor needs a package that is missing (torchvision, for the Qwen-VL families),
    OSError when there is no such checkpoint, ValueError when its head is not its last layer."""
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
    model = AutoModelForImageTextToText.from_pretrained(name_or_directory, dtype=getattr(torch, dtype))  # with sdpa
    model.to(device).eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
    with torch.no_grad():
        logits, hidden = (x(input_ids=torch.tensor([eos_ids], device=device)) for x in (model, model.base_model))
        if not torch.allclose(logits.logits, model.get_output_embeddings()(hidden.last_hidden_state), 1e-3, 1e-5):
            raise ValueError(f"{name_or_directory}: its logits are capped or scaled behind its head: not supported")
    return VLM(model, processor, banned.to(device), eos_ids)

# ---------------------------------------------------------------------------------------------------------- prompts
def encode(vlm: VLM, prompts: list[str], images: list, system: str = "") -> Inputs:
    """Prompts and their pictures -> the model's inputs, (B, P) and more. Padded on the left, never truncated.
    images: for each prompt a picture (PIL or array), a list of them, or None; the chat template says where they stand.
    system: the text of a system turn before each prompt."""
    images = [list(x) if isinstance(x, (list, tuple)) else [x] * (x is not None) for x in images]
    chat = functools.cache(lambda prompt, pictures: _chat(vlm, prompt, pictures, system))  # tasks repeat their question
    texts = [chat(prompt, len(pictures)) for prompt, pictures in zip(prompts, images, strict=True)]
    if len({len(pictures) for pictures in images}) == 1 and len(images[0]) < 2:  # the usual case, in one call
        inputs = _process(vlm, texts, images)
        if all(len(x) == len(texts) for x in inputs.values()):
            return Inputs(inputs)
    rows = [_process(vlm, [text], [pictures]) for text, pictures in zip(texts, images, strict=True)]
    words = {name for name, x in rows[0].items() if x.shape == rows[0]["input_ids"].shape}
    counts = {name: [len(row.get(name, ())) for row in rows] for row in rows for name in row.keys() - words}
    return Inputs({name: _stacked([row[name] for row in rows if name in row], name in words,
                                  vlm.eos_ids[0] * (name == "input_ids")) for name in (*words, *counts)}, counts)

def _chat(vlm, prompt, pictures, system):
    """The text of a system turn, a user turn with so many pictures, and the start of an answer."""
    if not getattr(vlm.processor, "chat_template", None):  # a base model: its processor puts the pictures first
        return "\n".join([system] * bool(system) + [prompt])
    turn = lambda role, text, n=0: {"role": role, "content": [{"type": "image"}] * n + [{"type": "text", "text": text}]}
    chat = lambda *turns: vlm.processor.apply_chat_template(turns, add_generation_prompt=True)
    try:
        return chat(*[turn("system", system)] * bool(system), turn("user", prompt, pictures))
    except TemplateError:  # a template without a system role
        return chat(turn("user", f"{system}\n\n{prompt}", pictures))

def _process(vlm, texts, images):
    """The processor's tensors for some prompts with equally many pictures each."""
    bos = vlm.tokenizer.bos_token  # some chat templates write it themselves
    kwargs = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
    inputs = vlm.processor(text=texts, images=images if images[0] else None, padding=True, return_tensors="pt",
                           **kwargs)
    return {name: x.to(vlm.model.device) for name, x in inputs.items()
            if isinstance(x, Tensor) and name != "labels"}

def _stacked(parts, left, fill):
    """The rows of all parts; where other dimensions differ, smaller parts are filled up, on the left or the right."""
    shape = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()
    gaps = [[n - m for n, m in zip(shape, part.shape[1:], strict=True)] for part in parts]
    pads = [[x for gap in reversed(of) for x in ((gap, 0) if left else (0, gap))] for of in gaps]
    return torch.cat([F.pad(part, pad, value=fill) for part, pad in zip(parts, pads, strict=True)])

def encode_responses(vlm: VLM, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Written responses, for supervised training: tokens (B, T) with an EOS at the end of each, and mask (B, T)."""
    rows = [ids + vlm.eos_ids[:1] for ids in vlm.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], True, vlm.eos_ids[0])
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(ids) for ids in rows])[:, None]
    return tokens.to(vlm.model.device), mask.to(vlm.model.device)

def take(inputs: dict, rows: Tensor) -> Inputs:
    """Some rows of the inputs, with their pictures."""
    counts = getattr(inputs, "counts", {})
    found = Inputs({name: x[rows] for name, x in inputs.items() if name not in counts})
    for name, count in counts.items():
        if any(kept := [count[row] for row in rows]):  # or none of them has a picture
            parts = inputs[name].split(count)
            found[name], found.counts[name] = torch.cat([parts[row] for row in rows]), kept
    return found

def _joined(inputs, tokens, mask):
    """Prompt and response as one input. Everything after a response's length is hidden from attention."""
    attention = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], 1)  # (B, P + T)
    joined = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1), "attention_mask": attention}
    for name, text in (("mm_token_type_ids", 0), ("token_type_ids", 1)):  # what marks an answer's text, if it is marked
        if name in inputs:
            joined[name] = torch.cat([inputs[name], torch.full_like(tokens, text)], 1)
    return joined

def extended(inputs: dict, tokens: Tensor, lengths: Tensor) -> dict:
    """The inputs with the first lengths[b] tokens of a response as part of the prompt, padded on the left again."""
    T = tokens.shape[1]
    joined = _joined(inputs, tokens, torch.arange(T, device=tokens.device) < lengths[:, None])
    L = joined["input_ids"].shape[1]
    source = (torch.arange(L, device=tokens.device) - (T - lengths)[:, None]) % L  # (B, L): what is cut off goes left
    first = L - int(joined["attention_mask"].sum(1).max())
    rolled = {name: joined[name].gather(1, source)[:, first:]
              for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids") if name in joined}
    return Inputs({**joined, **rolled}, getattr(inputs, "counts", {}))

def noised(inputs: dict) -> dict:
    """The inputs with every picture replaced by Gaussian noise of the pixels' mean and spread."""
    pixels = inputs["pixel_values"]
    real = pixels != 0  # what a processor fills up stays zero, and no real pixel is exactly that
    noise = torch.where(real, pixels[real].mean() + pixels[real].std() * torch.randn_like(pixels), 0.0)
    return Inputs({**inputs, "pixel_values": noise}, getattr(inputs, "counts", {}))

# --------------------------------------------------------------------------------------------------------- generate
@functools.lru_cache
def _completing(tokenizer, stop, V):
    """bool (V,): the tokens that can complete `stop`: they hold it, or begin with an end of it or half a character."""
    tokens = tokenizer.batch_decode([[i] for i in range(min(V, len(tokenizer)))]) if stop else []
    ends = tuple(stop[k:] for k in range(len(stop))) if stop else ()
    return torch.tensor([stop in t or t.startswith((*ends, "\ufffd")) for t in tokens] + [False] * (V - len(tokens)))

class _Stop(StoppingCriteria):
    """Ends a row at an EOS id or at the stop string, and remembers how long the row was: the only trusted length."""
    def __init__(self, vlm, prompt_tokens, stop):
        self.vlm, self.prompt_tokens, self.stop, self.lengths = vlm, prompt_tokens, stop, None
        self.eos = torch.zeros(len(vlm.banned), dtype=torch.bool)
        self.eos[vlm.eos_ids] = True
        self.may_stop = _completing(vlm.tokenizer, stop, len(vlm.banned))

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
    sampled from; ask for it only with small vocabularies, since it keeps (T, B, V) scores."""
    P = inputs["input_ids"].shape[1]
    stopping = _Stop(vlm, P, stop)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature > 0 else {}
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=vlm.eos_ids, pad_token_id=vlm.eos_ids[0], **sampling,
        suppress_tokens=vlm.banned.nonzero().flatten().tolist(),
        return_dict_in_generate=True, output_scores=return_logp)
    out = vlm.enter().generate(**inputs, generation_config=config, stopping_criteria=[stopping])
    tokens = out.sequences[:, P:]
    lengths = stopping.lengths.masked_fill(stopping.lengths == 0, tokens.shape[1]).to(tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    if not return_logp:
        return tokens, mask
    logp = torch.stack(out.scores, 1).float().log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
    return tokens, mask, torch.where(mask, logp, 0.0)

def token_texts(vlm: VLM, tokens: Tensor, mask: Tensor, end: str) -> list[list[str]]:
    """The text that each token adds, per response; they join to the whole. An EOS id reads as `end`. A token that stops
    inside a multi-byte character adds "", and the one that completes it the character: a cut between loses nothing."""
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
    float32, 0 off the mask; log-probabilities are differentiable, the entropy is a measurement. A banned token inside
    the mask scores -inf. Logits are made for the tokens under the mask alone, PIECE numbers at a time, and made again
    for the gradient, so that (B, T, V) is never in memory."""
    P, T = inputs["input_ids"].shape[1], _used(mask)
    hidden = vlm.hidden(_joined(inputs, tokens[:, :T], mask[:, :T]))[:, P - 1:-1][mask[:, :T]]  # (N, H)
    size = max(1, PIECE // len(vlm.banned))
    pieces = list(zip(hidden.split(size), tokens[mask].split(size), strict=True))
    again = (lambda *x: checkpoint(_head, *x, use_reentrant=False)) if len(pieces) > 1 else _head
    found = [again(vlm.model.get_output_embeddings(), *piece, vlm.banned, temperature) for piece in pieces]
    return tuple(hidden.new_zeros(mask.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(x))
                 for x in zip(*found, strict=True))

def _used(mask):
    """How many columns hold anything: what lies behind the longest of these responses is not worth a forward pass."""
    return int(mask.any(0).nonzero().max()) + 1 if mask.any() else mask.shape[1]

def _head(head, hidden, tokens, banned, temperature):
    """(N, H), (N,) -> log-probabilities and entropies, (N,)."""
    logits = (head(hidden).float() / temperature).masked_fill_(banned, -torch.inf)  # (N, V): the division copies
    logp = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)  # (N,): 0 for a banned token
    return logp.gather(1, tokens[:, None]).squeeze(1), entropy

def prefix_values(critic, inputs: dict, tokens: Tensor, mask: Tensor) -> Tensor:
    """The critic's V of the prefix before each response token: (B, T) float32, 0 off the mask."""
    P, T = inputs["input_ids"].shape[1], _used(mask)
    _recompute(critic)
    values = critic(**_joined(inputs, tokens[:, :T], mask[:, :T]), use_cache=False)  # (B, P + T): position p has read p
    return F.pad(torch.where(mask[:, :T], values[:, P - 1:-1], 0.0), (0, mask.shape[1] - T))

def in_parts(function, size: int | None, inputs: dict, tokens: Tensor, mask: Tensor):
    """function(inputs, tokens, mask) -> one tensor or several with a row per response, `size` responses at a time."""
    found = [function(take(inputs, rows), tokens[rows], mask[rows])
             for rows in torch.arange(len(mask)).split(size or len(mask))]
    return torch.cat(found) if isinstance(found[0], Tensor) else tuple(map(torch.cat, zip(*found, strict=True)))

# ------------------------------------------------------------------------------------------- one backbone, three views
class Backbone(torch.nn.Module):
    """A shared model's hidden states, as a module that owns, trains and saves the view's adapter alone. Without an
    adapter it owns nothing, and gradients stop here."""
    def __init__(self, vlm: VLM):
        super().__init__()
        self.shared = [vlm]  # in a list, so that the model does not become a part of this module
        self.adapter = torch.nn.ParameterList(
            p for name, p in vlm.model.named_parameters() if vlm.adapter and f".{vlm.adapter}." in name)

    def forward(self, use_cache=False, **inputs):
        with torch.set_grad_enabled(torch.is_grad_enabled() and len(self.adapter) > 0):
            return self.shared[0].hidden(inputs)

def lora(vlm: VLM, rank: int) -> tuple[VLM, VLM, VLM]:
    """Low-rank adapters (arXiv:2106.09685) on the text model's linear layers, in float32, alpha = 2 rank. -> (policy,
    critic, reference): three views of one frozen backbone, the last without an adapter."""
    try:
        import peft
    except ImportError:
        raise ImportError("--lora needs a package that is not installed: pip install peft") from None
    text = set(vlm.model.get_decoder().modules())
    layers = [name for name, x in vlm.model.named_modules() if x in text and isinstance(x, torch.nn.Linear)]
    for adapter in ("policy", "critic"):
        vlm.model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), adapter)
    for name, p in vlm.model.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    return tuple(replace(vlm, adapter=name) for name in ("policy", "critic", "none"))

def adam(parameters, lr: float) -> torch.optim.Adam:
    """Adam. Weights of lower precision learn through float32 copies, since a step of 1e-6 would vanish in bfloat16, and
    their gradients are summed in float32, so that micro-batches lose nothing."""
    pairs = [(p, p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())) for p in parameters]
    optimizer = torch.optim.Adam([copy for _, copy in pairs], lr, eps=1e-5, fused=True)  # at 1e-8 noise gets unit steps
    pairs = [pair for pair in pairs if pair[0] is not pair[1]]
    for p, copy in pairs:
        def hand_over(p, copy=copy):
            copy.grad = p.grad.float() if copy.grad is None else copy.grad.add_(p.grad)
            p.grad = None
        p.register_post_accumulate_grad_hook(hand_over)
    optimizer.register_step_post_hook(lambda *_: [p.data.copy_(copy) for p, copy in pairs])
    return optimizer
