"""Small random checkpoints of real vision-language families, built in seconds: what vlm.py must open beside its own.

Each is a real class under 0.2 M parameters, with its real processor and a byte-level BPE tokenizer trained on the spot,
in which a tag takes several tokens and a character up to four. Special tokens, chat template, who adds the BOS, several
EOS ids, a vocabulary padded to a round size, generation settings and tied embeddings are as in the published checkpoint
that a builder names.

    build("llava", directory)        # then vlm.load(directory)
    build("qwen2_5_vl", directory)   # can_open("qwen2_5_vl")? AutoProcessor needs the packages in NEEDS["qwen2_5_vl"]

The processor of a family in NEEDS cannot even be made without them, because of its videos: its files are written by
hand, in the hub's layout, and `without_videos(directory)` opens it (but not SmolVLM2's) for pictures and text.
Left out on purpose: videos, and weights that know anything.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import env

SIDE, PATCH = 32, 8  # of the picture that a vision tower sees, in pixels; a tile where the processor cuts tiles
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
              patch_size=PATCH)
TEXT = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=4096)
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # (height, width) of the tiled picture
SENTENCES = ("The {} {} sees a {} die on the table.", "How many {} arrows does the {} {} follow?", "Well, {}: {}; {}!",
             "Ich höre den {} {} nicht, {}.", "El {} {} está aquí, {}.", "我看见 {} 和 {} 在 {}。", "{} → {} → {} 🎲")
WORDS = "small quick brown fox red river answer number golden cell nothing looking over under first second".split()

# --------------------------------------------------------------------------------------------------- the tokenizer
def corpus():
    """A few hundred lines: questions and demonstrations of the tasks, and sentences in several languages."""
    rng = np.random.default_rng(0)
    for task in (kind() for kind in env.TASKS.values()):
        for example in map(task.example_at, range(40)):
            yield f"{example.question} {task.demonstrate(example, rng, 0.1)}"
    for i in range(280):
        yield SENTENCES[i % len(SENTENCES)].format(*rng.choice(WORDS, 3))

def _tokenizer(special, bos=None, eos=None, pad=None, unk=None, adds_bos=False):
    """Byte-level BPE, digits one by one, no prefix space. adds_bos: the tokenizer, not the template, writes the BOS."""
    special = [*dict.fromkeys([x for x in (unk, bos, eos, pad) if x] + special)]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400 + len(special), special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(corpus(), trainer)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos} $B:1", [(bos, inner.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk,
                                   additional_special_tokens=special)

# ------------------------------------------------------------------------------------------------- the templates
# Those of the published checkpoints, less tools and videos; PaliGemma has none.
IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
_IMAGES_FIRST = "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
_TEXTS_NEXT = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _IMAGES_FIRST + "{{ '<image>\n' }}{% endfor %}" + _TEXTS_NEXT + "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
LLAVA_NEXT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}" + _IMAGES_FIRST + "{{ '<image>\n' }}{% endfor %}" + _TEXTS_NEXT + "{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}")
LLAVA_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}" + _IMAGES_FIRST
    + "{{ '<image>' }}{% endfor %}" + _TEXTS_NEXT + "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3_VL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2_5_VL = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + QWEN3_VL)

# --------------------------------------------------------------------------------------------- saving, any family
def _vocabulary(tokenizer):
    return 64 * (len(tokenizer) // 64 + 1)  # a round size, as in most checkpoints: the last rows stand for no token

def _ids(tokenizer, *eos):
    convert = tokenizer.convert_tokens_to_ids
    ends = [convert(token) for token in eos or (tokenizer.eos_token,)]
    return dict(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends if len(ends) > 1 else ends[0])

def _save_model(directory, seed, model_class, config, ids, **generation):
    """Weights of spread 1 / sqrt(inputs): logits of spread 1, to which every picture and every token matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
    model.generation_config = transformers.GenerationConfig(**ids, **generation)
    model.save_pretrained(directory)

def _write_processor(directory, processor_class, tokenizer, image_processor, video_processor, template, **settings):
    # a processor with a video processor cannot even be made where torchvision is missing: the hub's files, by hand
    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (Path(directory) / name).write_text(text, encoding="utf-8")

    tokenizer.save_pretrained(directory)
    pixels = {name: x for name, x in image_processor.to_dict().items() if name != "image_processor_type"}
    kind = type(image_processor).__name__.removesuffix("Pil")
    write("preprocessor_config.json", {**pixels, "image_processor_type": kind, "processor_class": processor_class})
    write("video_preprocessor_config.json", {"video_processor_type": video_processor,
                                             "processor_class": processor_class})
    write("processor_config.json", {"processor_class": processor_class, **settings})
    write("chat_template.jinja", template)

# ------------------------------------------------------------------------------------------------- the families
def _idefics(directory, seed, split, smolvlm):
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer = _tokenizer(["<fake_token_around_image>", "<image>", "<global-img>", *rows], bos="<|im_start|>",
                           eos="<end_of_utterance>", pad="<|im_end|>", unk="<|endoftext|>")
    pixels = (SmolVLMImageProcessorPil if smolvlm else Idefics3ImageProcessorPil)(
        do_image_splitting=split, size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    image_tokens = (SIDE // PATCH) ** 2 // 4  # pixel shuffle 2
    ids = _ids(tokenizer)
    text = transformers.LlamaConfig(vocab_size=_vocabulary(tokenizer), **TEXT, **ids)
    config = (transformers.SmolVLMConfig if smolvlm else transformers.Idefics3Config)(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2, vision_config=dict(VISION),
        text_config=text, pad_token_id=tokenizer.pad_token_id)
    _save_model(directory, seed, transformers.SmolVLMForConditionalGeneration if smolvlm else
                transformers.Idefics3ForConditionalGeneration, config, ids)
    if smolvlm:
        _write_processor(directory, "SmolVLMProcessor", tokenizer, pixels, "SmolVLMVideoProcessor", IDEFICS3,
                         image_seq_len=image_tokens)
    else:
        transformers.Idefics3Processor(pixels, tokenizer, image_seq_len=image_tokens,
                                       chat_template=IDEFICS3).save_pretrained(directory)

def idefics3(directory, seed=0):
    """One tile per picture: HuggingFaceTB/SmolVLM-256M-Instruct with do_image_splitting=False."""
    _idefics(directory, seed, split=False, smolvlm=False)

def idefics3_split(directory, seed=0):
    """Up to 2 x 2 tiles and the whole picture: HuggingFaceTB/SmolVLM-256M-Instruct, HuggingFaceM4/Idefics3-8B."""
    _idefics(directory, seed, split=True, smolvlm=False)

def smolvlm2(directory, seed=0):
    """HuggingFaceTB/SmolVLM2-256M-Video-Instruct."""
    _idefics(directory, seed, split=True, smolvlm=True)

def llava(directory, seed=0):
    """llava-hf/llava-1.5-7b-hf: no BOS in the template, the tokenizer writes it."""
    tokenizer = _tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", adds_bos=True)
    ids = _ids(tokenizer)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(vocab_size=_vocabulary(tokenizer), **TEXT, **ids),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(SIDE // PATCH) ** 2)
    _save_model(directory, seed, transformers.LlavaForConditionalGeneration, config, ids)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA).save_pretrained(directory)

def llava_next(directory, seed=0):
    """llava-hf/llava-v1.6-mistral-7b-hf: tiles, and as many image tokens as the picture's shape asks for."""
    tokenizer = _tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", adds_bos=True)
    ids = _ids(tokenizer)
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.MistralConfig(vocab_size=_vocabulary(tokenizer), sliding_window=None, **TEXT, **ids),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(SIDE // PATCH) ** 2,
        image_grid_pinpoints=PINPOINTS)
    _save_model(directory, seed, transformers.LlavaNextForConditionalGeneration, config, ids)
    pixels = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
                                        image_grid_pinpoints=PINPOINTS)
    transformers.LlavaNextProcessor(
        pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT).save_pretrained(directory)

def llava_onevision(directory, seed=0):
    """llava-hf/llava-onevision-qwen2-0.5b-ov-hf: tiles for one picture, none where a prompt has several."""
    tokenizer = _tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], eos="<|im_end|>", pad="<|endoftext|>")
    ids, convert = _ids(tokenizer), tokenizer.convert_tokens_to_ids
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(vocab_size=_vocabulary(tokenizer), tie_word_embeddings=True, **TEXT,
                                             **ids),
        image_token_index=convert("<image>"), video_token_index=convert("<video>"), image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True)
    _save_model(directory, seed, transformers.LlavaOnevisionForConditionalGeneration, config, ids)
    pixels = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    _write_processor(directory, "LlavaOnevisionProcessor", tokenizer, pixels, "LlavaOnevisionVideoProcessor",
                     LLAVA_ONEVISION, num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full")

def _paligemma(directory, seed, text_class, **text):
    tokenizer = _tokenizer(["<image>"], bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", adds_bos=True)
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_seq_length=(SIDE // PATCH) ** 2)
    processor = transformers.PaliGemmaProcessor(pixels, tokenizer)  # adds 1152 tokens for places and shapes
    processor.save_pretrained(directory)
    ids = _ids(processor.tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config=dict(VISION, projection_dim=48, vision_use_head=False, model_type="siglip_vision_model"),
        text_config=text_class(vocab_size=_vocabulary(processor.tokenizer), head_dim=12, **TEXT, **ids, **text),
        image_token_index=processor.image_token_id, projection_dim=48, hidden_size=48, **ids)
    _save_model(directory, seed, transformers.PaliGemmaForConditionalGeneration, config, ids)

def paligemma(directory, seed=0):
    """google/paligemma-3b-mix-224: no chat template, a prompt that attends to itself both ways, 1 for the response."""
    _paligemma(directory, seed, transformers.GemmaConfig)

def paligemma2(directory, seed=0):
    """google/paligemma2-3b-mix-224: soft-capped logits and a sliding window, here of 64 tokens."""
    _paligemma(directory, seed, transformers.Gemma2Config, sliding_window=64, query_pre_attn_scalar=12)

def _qwen(directory, seed, model_class, config_class, processor_class, video_processor, template, text, vision, pixels):
    tokenizer = _tokenizer(["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                            "<|image_pad|>", "<|video_pad|>"], eos="<|im_end|>", pad="<|endoftext|>")
    ids, convert = _ids(tokenizer, "<|im_end|>", "<|endoftext|>"), tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
    config = config_class(
        text_config=dict(TEXT, vocab_size=_vocabulary(tokenizer), rope_parameters=rope, tie_word_embeddings=True,
                         **text, **ids),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48,
                           patch_size=PATCH, **vision),
        tie_word_embeddings=True, **{f"{name}_token_id": convert(f"<|{token}|>") for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"))})
    _save_model(directory, seed, model_class, config, ids, do_sample=True, top_k=20, top_p=0.8, temperature=0.7,
                repetition_penalty=1.05)  # what a training loop must not sample with
    pixels = Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": 256, "longest_edge": 4096}, **pixels)
    _write_processor(directory, processor_class, tokenizer, pixels, video_processor, template)

def qwen2_5_vl(directory, seed=0):
    """Qwen/Qwen2.5-VL-3B-Instruct: a token per 16 x 16 pixels of a picture of any shape; two EOS ids; no BOS."""
    _qwen(directory, seed, transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig,
          "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", QWEN2_5_VL, text={},
          vision=dict(window_size=32, fullatt_block_indexes=[1]), pixels={})

def qwen3_vl(directory, seed=0):
    """Qwen/Qwen3-VL-2B-Instruct: no system turn of its own; the picture enters at several depths."""
    half = [0.5, 0.5, 0.5]
    _qwen(directory, seed, transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig,
          "Qwen3VLProcessor", "Qwen3VLVideoProcessor", QWEN3_VL, text=dict(head_dim=12),
          vision=dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
          pixels=dict(image_mean=half, image_std=half))

FAMILIES = {builder.__name__: builder for builder in (
    idefics3, idefics3_split, llava, llava_next, paligemma, paligemma2,  # the others need torchvision
    qwen2_5_vl, qwen3_vl, smolvlm2, llava_onevision)}
NEEDS = {"qwen2_5_vl": ("torchvision",), "qwen3_vl": ("torchvision",), "llava_onevision": ("torchvision",),
         "smolvlm2": ("torchvision", "num2words")}  # the packages without which the family's AutoProcessor fails

def can_open(family):
    """Is what the family's AutoProcessor needs installed?"""
    return all(importlib.util.find_spec(name) for name in NEEDS.get(family, ()))

def without_videos(directory):
    """The processor of a family that needs torchvision alone, less its video part: the real class, which makes of
    pictures and text what `AutoProcessor` would. What it saves opens only here again."""
    name = json.loads((Path(directory) / "processor_config.json").read_text(encoding="utf-8"))["processor_class"]
    parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
    return type(name, (getattr(transformers, name),), {"get_attributes": parts}).from_pretrained(directory)

def build(family, directory, seed=0):
    """Write the checkpoint of a family, one of `FAMILIES`, into `directory`. -> the directory, a Path."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    FAMILIES[family](directory, seed)
    return Path(directory)
