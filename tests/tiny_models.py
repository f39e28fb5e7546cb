"""Variants of the tiny model that tests look at: one with a sharp head, one with byte-level BPE."""

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tiny
import vlm


def build_sharp(folder, image_size=32):
    """The tiny model with its last layer scaled up. -> the folder.

    Random weights give nearly uniform distributions, under which few mistakes show.
    """
    opened = vlm.load(tiny.build_tiny(folder, image_size))
    opened.model.get_output_embeddings().weight.data *= 2.4
    opened.model.save_pretrained(folder)
    return folder


def build_sharp_bpe(folder):
    """The same with a byte-level BPE tokenizer in place of its own, and smaller pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_tokenizer", _byte_level)
        return build_sharp(folder, image_size=16)


def _byte_level(tags):
    """A real byte-level BPE, trained here, with the names that the tiny model's processor needs."""
    special = ["<unk>", "<fake_token_around_image>", "<image>", "<global-img>"]
    special += ["<end_of_utterance>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = "the sum of the dice is <answer>12</answer>\n the answer is 骰子 é 🎲 naïve"
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    inner.train_from_iterator([text] * 50, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=special[0],
        eos_token=special[-1],
        pad_token=special[-1],
        additional_special_tokens=special[1:],
    )
