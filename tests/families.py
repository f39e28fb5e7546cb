"""Small random checkpoints of real vision-language families, built in seconds.

They are what vlm.py must open beside the tiny model. Each is a real class under 0.2 M parameters,
with its real processor and a byte-level BPE tokenizer trained on the spot, in which a tag takes
several tokens and a character up to four. Special tokens, chat template, who adds the BOS, several
EOS ids, a vocabulary padded to a round size, generation settings and tied embeddings are as in the
published checkpoint that a builder names.

    build("llava", directory)        # then vlm.load(directory)
    build("qwen2_5_vl", directory)   # can_open("qwen2_5_vl")? AutoProcessor needs NEEDS[family]

The processor of a family in NEEDS cannot even be made without these packages, because of its
videos: its files are written by hand, in the hub's layout, and `without_videos(directory)` opens it
(but not SmolVLM2's) for pictures and text. conftest.py has fixtures that build each family once
(`family_folder`) and open it (`open_family`).

Left out on purpose: videos, and weights that know anything.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from chat_templates import IDEFICS3, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL
from helpers import picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import vlm
from tasks import ArrowPath, DiceSum, TextSum

SIDE = 32  # of the picture that a vision tower sees, in pixels; of a tile, if tiles are cut
PATCH = 8  # of what the tower reads as one
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # (height, width), tiled
SENTENCES = (
    "The {} {} sees a {} die on the table.",
    "How many {} arrows does the {} {} follow?",
    "Well, {}: {}; {}!",
    "Ich höre den {} {} nicht, {}.",
    "El {} {} está aquí, {}.",
    "我看见 {} 和 {} 在 {}。",
    "{} → {} → {} 🎲",
)
WORDS = [
    *("small", "quick", "brown", "fox", "red", "river", "answer", "number"),
    *("golden", "cell", "nothing", "looking", "over", "under", "first", "second"),
]


# ------------------------------------------------------------------------------ the tokenizer


def corpus():
    """A few hundred lines: questions and demonstrations of the tasks, and several languages."""
    rng = np.random.default_rng(0)
    for task in (DiceSum(), ArrowPath(), TextSum()):
        for index in range(40):
            example = task.example_at(index)
            yield f"{example.question} {task.demonstrate(example, rng, 0.1)}"
    for i in range(280):
        yield SENTENCES[i % len(SENTENCES)].format(*rng.choice(WORDS, 3))


def _tokenizer(special, bos=None, eos=None, pad=None, unk=None, adds_bos=False):
    """Byte-level BPE, digits one by one, no prefix space.

    adds_bos: the tokenizer, not the template, writes the BOS.
    """
    named = [token for token in (unk, bos, eos, pad) if token]
    special = [*dict.fromkeys(named + special)]  # each once, in this order
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(corpus(), trainer)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos} $B:1", [(bos, inner.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        additional_special_tokens=special,
    )


# ------------------------------------------------------------------------- saving, any family


def _vocabulary(tokenizer):
    """A round size, as in most checkpoints: the last rows stand for no token."""
    return 64 * (len(tokenizer) // 64 + 1)


def _ids(tokenizer, *eos):
    """The ids that a configuration names. eos: the tokens that end a response, if not the usual."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in eos or (tokenizer.eos_token,)]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }


def _save_model(directory, seed, model_class, config, ids, **generation):
    """Weights of spread 1 / sqrt(inputs): logits of spread 1, to which every input matters."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
    model.generation_config = transformers.GenerationConfig(**ids, **generation)
    model.save_pretrained(directory)


def _write_processor(
    directory, processor_class, tokenizer, image_processor, video_processor, template, **settings
):
    """A processor's files in the hub's layout, by hand.

    One with a video processor cannot even be made where torchvision is missing.
    """

    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (Path(directory) / name).write_text(text, encoding="utf-8")

    tokenizer.save_pretrained(directory)
    pixels = image_processor.to_dict()
    pixels.pop("image_processor_type", None)
    kind = type(image_processor).__name__.removesuffix("Pil")
    write(
        "preprocessor_config.json",
        {**pixels, "image_processor_type": kind, "processor_class": processor_class},
    )
    write(
        "video_preprocessor_config.json",
        {"video_processor_type": video_processor, "processor_class": processor_class},
    )
    write("processor_config.json", {"processor_class": processor_class, **settings})
    write("chat_template.jinja", template)


# ------------------------------------------------------------------------------- the families


def _idefics3_parts(directory, seed, model_class, config_class, image_processor_class, split):
    """Write the model; -> (tokenizer, image processor), from which the caller makes a processor."""
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer = _tokenizer(
        ["<fake_token_around_image>", "<image>", "<global-img>", *rows],
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
    )
    ids = _ids(tokenizer)
    config = config_class(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config=dict(VISION),
        text_config=transformers.LlamaConfig(vocab_size=_vocabulary(tokenizer), **TEXT, **ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(directory, seed, model_class, config, ids)
    image_processor = image_processor_class(
        do_image_splitting=split,
        size={"longest_edge": 2 * SIDE},
        max_image_size={"longest_edge": SIDE},
    )
    return tokenizer, image_processor


IDEFICS3_IMAGE_TOKENS = (SIDE // PATCH) ** 2 // 4  # of a tile: pixel shuffle 2


def _idefics3(directory, seed, split):
    tokenizer, image_processor = _idefics3_parts(
        directory,
        seed,
        transformers.Idefics3ForConditionalGeneration,
        transformers.Idefics3Config,
        Idefics3ImageProcessorPil,
        split,
    )
    transformers.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IDEFICS3_IMAGE_TOKENS, chat_template=IDEFICS3
    ).save_pretrained(directory)


def idefics3(directory, seed=0):
    """One tile per picture: HuggingFaceTB/SmolVLM-256M-Instruct with do_image_splitting=False."""
    _idefics3(directory, seed, split=False)


def idefics3_split(directory, seed=0):
    """Up to 2 x 2 tiles and the whole picture: HuggingFaceTB/SmolVLM-256M-Instruct and others."""
    _idefics3(directory, seed, split=True)


def smolvlm2(directory, seed=0):
    """HuggingFaceTB/SmolVLM2-256M-Video-Instruct."""
    tokenizer, image_processor = _idefics3_parts(
        directory,
        seed,
        transformers.SmolVLMForConditionalGeneration,
        transformers.SmolVLMConfig,
        SmolVLMImageProcessorPil,
        split=True,
    )
    _write_processor(
        directory,
        "SmolVLMProcessor",
        tokenizer,
        image_processor,
        "SmolVLMVideoProcessor",
        IDEFICS3,
        image_seq_len=IDEFICS3_IMAGE_TOKENS,
    )


def _llava_tokenizer():
    return _tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", adds_bos=True)


def llava(directory, seed=0):
    """llava-hf/llava-1.5-7b-hf: no BOS in the template, the tokenizer writes it."""
    tokenizer = _llava_tokenizer()
    ids = _ids(tokenizer)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(vocab_size=_vocabulary(tokenizer), **TEXT, **ids),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    _save_model(directory, seed, transformers.LlavaForConditionalGeneration, config, ids)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    ).save_pretrained(directory)


def llava_next(directory, seed=0):
    """llava-hf/llava-v1.6-mistral-7b-hf: tiles; the picture's shape decides the image tokens."""
    tokenizer = _llava_tokenizer()
    ids = _ids(tokenizer)
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.MistralConfig(
            vocab_size=_vocabulary(tokenizer), sliding_window=None, **TEXT, **ids
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        image_grid_pinpoints=PINPOINTS,
    )
    _save_model(directory, seed, transformers.LlavaNextForConditionalGeneration, config, ids)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    transformers.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT,
    ).save_pretrained(directory)


def llava_onevision(directory, seed=0):
    """llava-hf/llava-onevision-qwen2-0.5b-ov-hf: tiles, but none where a prompt has several."""
    tokenizer = _tokenizer(
        ["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>", pad="<|endoftext|>"
    )
    ids = _ids(tokenizer)
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(
            vocab_size=_vocabulary(tokenizer), tie_word_embeddings=True, **TEXT, **ids
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    _save_model(directory, seed, transformers.LlavaOnevisionForConditionalGeneration, config, ids)
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    _write_processor(
        directory,
        "LlavaOnevisionProcessor",
        tokenizer,
        image_processor,
        "LlavaOnevisionVideoProcessor",
        LLAVA_ONEVISION,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


def _paligemma(directory, seed, text_class, **text):
    tokenizer = _tokenizer(
        ["<image>"], bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", adds_bos=True
    )
    image_processor = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_seq_length=(SIDE // PATCH) ** 2
    )
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    processor.save_pretrained(directory)
    tokenizer = processor.tokenizer  # now with 1152 more tokens, for places and shapes
    ids = _ids(tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={
            **VISION,
            "projection_dim": 48,
            "vision_use_head": False,
            "model_type": "siglip_vision_model",
        },
        text_config=text_class(
            vocab_size=_vocabulary(tokenizer), head_dim=12, **TEXT, **ids, **text
        ),
        image_token_index=processor.image_token_id,
        projection_dim=48,
        hidden_size=48,
        **ids,
    )
    _save_model(directory, seed, transformers.PaliGemmaForConditionalGeneration, config, ids)


def paligemma(directory, seed=0):
    """google/paligemma-3b-mix-224: no chat template; a prompt that attends to itself both ways, and
    token types, 0 for the prompt and 1 for the response."""
    _paligemma(directory, seed, transformers.GemmaConfig)


def paligemma2(directory, seed=0):
    """google/paligemma2-3b-mix-224: soft-capped logits and a sliding window, here of 64 tokens."""
    _paligemma(
        directory, seed, transformers.Gemma2Config, sliding_window=64, query_pre_attn_scalar=12
    )


QWEN_SPECIAL = ["im_start", "im_end", "vision_start", "vision_end", "vision_pad"]
QWEN_SPECIAL += ["image_pad", "video_pad"]


def _qwen_parts(directory, seed, model_class, config_class, text, vision):
    """Write the model; -> its tokenizer."""
    tokenizer = _tokenizer(
        [f"<|{name}|>" for name in QWEN_SPECIAL], eos="<|im_end|>", pad="<|endoftext|>"
    )
    ids = _ids(tokenizer, "<|im_end|>", "<|endoftext|>")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    config = config_class(
        text_config={
            **TEXT,
            "vocab_size": _vocabulary(tokenizer),
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            **text,
            **ids,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": PATCH,
            **vision,
        },
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    sampling = {  # what a training loop must not sample with
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.8,
        "temperature": 0.7,
        "repetition_penalty": 1.05,
    }
    _save_model(directory, seed, model_class, config, ids, **sampling)
    return tokenizer


def _qwen_image_processor(**settings):
    size = {"shortest_edge": 256, "longest_edge": 4096}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, size=size, **settings)


def qwen2_5_vl(directory, seed=0):
    """Qwen/Qwen2.5-VL-3B-Instruct: a token per 16 x 16 pixels of any shape; two EOS ids; no BOS."""
    tokenizer = _qwen_parts(
        directory,
        seed,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLConfig,
        text={},
        vision={"window_size": 32, "fullatt_block_indexes": [1]},
    )
    image_processor = _qwen_image_processor()
    _write_processor(
        directory,
        "Qwen2_5_VLProcessor",
        tokenizer,
        image_processor,
        "Qwen2VLVideoProcessor",
        QWEN2_5_VL,
    )


def qwen3_vl(directory, seed=0):
    """Qwen/Qwen3-VL-2B-Instruct: no system turn of its own; a picture enters at several depths."""
    tokenizer = _qwen_parts(
        directory,
        seed,
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLConfig,
        text={"head_dim": 12},
        vision={"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )
    half = [0.5, 0.5, 0.5]
    image_processor = _qwen_image_processor(image_mean=half, image_std=half)
    _write_processor(
        directory,
        "Qwen3VLProcessor",
        tokenizer,
        image_processor,
        "Qwen3VLVideoProcessor",
        QWEN3_VL,
    )


# ----------------------------------------------------------------------------- what tests use


FAMILIES = {
    "idefics3": idefics3,
    "idefics3_split": idefics3_split,
    "llava": llava,
    "llava_next": llava_next,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "smolvlm2": smolvlm2,
    "llava_onevision": llava_onevision,
}
NEEDS = {  # the packages without which the family's AutoProcessor fails
    "qwen2_5_vl": ("torchvision",),
    "qwen3_vl": ("torchvision",),
    "llava_onevision": ("torchvision",),
    "smolvlm2": ("torchvision", "num2words"),
}
SUPPORTED = [name for name in FAMILIES if name != "paligemma2"]  # vlm.load refuses capped logits

PROMPTS = ["Sum the dice.", "What is 2?", "Follow 3 arrows: which cell, 金?"]
SYSTEM = "Think, then answer."
PICTURE_SIZES = ((40, 90), (64, 48))  # (height, width) of a prompt's first and second picture


def build(family, directory, seed=0):
    """Write the checkpoint of a family, one of `FAMILIES`, into `directory`. -> the directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    FAMILIES[family](directory, seed)
    return Path(directory)


def can_open(family):
    """Is what the family's AutoProcessor needs installed?"""
    return all(importlib.util.find_spec(name) for name in NEEDS.get(family, ()))


def without_videos(directory):
    """The processor of a family that needs torchvision alone, less its video part.

    It is the real class, which makes of pictures and text what `AutoProcessor` would. What it
    saves opens only here again.
    """
    file = Path(directory) / "processor_config.json"
    name = json.loads(file.read_text(encoding="utf-8"))["processor_class"]

    def attributes(cls):
        return ["image_processor", "tokenizer"]

    real = getattr(transformers, name)
    pictures_only = type(name, (real,), {"get_attributes": classmethod(attributes)})
    return pictures_only.from_pretrained(directory)


def picture_counts(family):
    """Pictures of each of PROMPTS. PaliGemma takes no prompt without one."""
    return (1, 2, 1) if family == "paligemma" else (1, 2, 0)


def encoded_prompts(opened, family):
    """PROMPTS with one, two and no pictures. -> (pictures of each prompt, the model's inputs)."""
    images = []
    for i, count in enumerate(picture_counts(family)):
        images.append([picture(10 * i + j, PICTURE_SIZES[j]) for j in range(count)])
    return images, vlm.encode(opened, PROMPTS, images, SYSTEM)
