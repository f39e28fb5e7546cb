"""vlm.py on real (tiny) models: what is sampled is what is scored, and nothing outside a response's length counts."""

import copy
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sapo
import vlm

ROOT = Path(__file__).parents[1]
END = "<end>"
PROMPTS = ["Sum the dice.", "?", "Follow 12 arrows, then stop.", "Add 3 5."] * 4
close = torch.testing.assert_close


def sharpened(directory):
    """Random weights give nearly uniform distributions, under which few mistakes show: scale the last layer's up."""
    opened = vlm.load(directory)
    head = opened.model.get_output_embeddings()
    head.weight.data *= 15
    opened.model.save_pretrained(directory)
    return vlm.load(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = vlm.build_tiny(tmp_path_factory.mktemp("tiny"))
    sharpened(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(directory):
    return vlm.load(directory)


def byte_level():
    """A real byte-level BPE tokenizer, trained here, with the names that the tiny model's processor needs."""
    special = ["<unk>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["the sum of the dice is <answer>12</answer>\n the answer is 骰子 é 🎲 naïve"] * 50
    inner.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=special[0], eos_token=special[-1], pad_token=special[-1],
        additional_special_tokens=special[1:])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The tiny model with that tokenizer in place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm, "_tiny_tokenizer", byte_level)
        folder = vlm.build_tiny(tmp_path_factory.mktemp("bpe"), 16)
    return sharpened(folder)


@pytest.fixture(scope="module")
def critic(tiny):
    made = sapo.SegmentCritic(copy.deepcopy(tiny.model.base_model))
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    return made


def picture(seed, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def pictures(count, size=32):
    return [picture(i, size) for i in range(count)]


def sample(model, prompts=PROMPTS, T=40, temperature=1.0, seed=0, images="each", **kwargs):
    inputs = vlm.encode(model, prompts, pictures(len(prompts)) if images == "each" else [None] * len(prompts))
    torch.manual_seed(seed)
    return inputs, *vlm.generate(model, inputs, T, temperature, **kwargs)


def response_of(model, text):
    """The ids of some text, as one response. -> tokens (1, T), mask (1, T)."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)


@torch.no_grad()
def plain_logp(model, inputs, row, ids, temperature=1.0):
    """Oracle: one response alone, unpadded, with the model called directly. -> log-probs (T, V) of every token."""
    kept = inputs["attention_mask"][row].bool()
    alone = {k: x[row:row + 1] for k, x in inputs.items() if k.startswith("pixel")}
    whole = torch.cat([inputs["input_ids"][row][kept], torch.tensor(ids, dtype=torch.long)])[None]
    logits = model.model(input_ids=whole, attention_mask=torch.ones_like(whole), **alone).logits[0]  # (P + T, V)
    logits = logits[len(whole[0]) - len(ids) - 1:-1].clone()
    logits[:, model.banned] = -torch.inf
    return (logits / temperature).log_softmax(-1)


# ------------------------------------------------------------------------------------- sampling and scoring agree
@pytest.mark.parametrize("images", ["each", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_sampled_is_what_is_scored(tiny, temperature, images):
    inputs, tokens, mask, logp = sample(tiny, temperature=temperature, images=images, stop="e", return_logp=True)
    assert (inputs["attention_mask"] == 0).any() and not mask.all()  # padding on both sides: the test means something
    scored, _ = vlm.score(tiny, inputs, tokens, mask, temperature)
    close(scored, logp, rtol=0, atol=1e-4)
    other, _ = vlm.score(tiny, inputs, tokens, mask, temperature + 0.5)
    assert (other - logp).abs().max() > 0.1
    assert logp.dtype == scored.dtype == torch.float32 and (scored[~mask] == 0).all() and (logp[~mask] == 0).all()


def test_score_and_entropy_against_the_model_called_directly(tiny):
    inputs, tokens, mask = sample(tiny, temperature=0.7, stop="e")
    logp, entropy = vlm.score(tiny, inputs, tokens, mask, 0.7)
    for row, n in enumerate(mask.sum(1).tolist()):
        ids = tokens[row, :n].tolist()
        expected = plain_logp(tiny, inputs, row, ids, 0.7)
        close(logp[row, :n], expected[range(n), ids], rtol=0, atol=1e-4)
        close(entropy[row, :n], sapo.token_entropy(expected), rtol=0, atol=1e-4)
    assert (entropy[~mask] == 0).all() and (entropy[mask] > 0).all()


def test_sampling_takes_nothing_from_the_checkpoints_own_generation_config(directory, tmp_path):
    """Published checkpoints bring a repetition penalty, a top-k and more; scoring knows none of them."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.5}))
    opened = vlm.load(tmp_path)
    inputs, tokens, mask, logp = sample(opened, return_logp=True)
    close(vlm.score(opened, inputs, tokens, mask)[0], logp, rtol=0, atol=1e-4)
    assert torch.equal(sample(opened, temperature=0.0)[1], sample(vlm.load(directory), temperature=0.0)[1])


def test_greedy_takes_the_likeliest_token_and_small_top_p_too(tiny):
    inputs, tokens, mask = sample(tiny, T=12, temperature=0.0)
    for row in range(0, len(tokens), 5):
        ids = tokens[row, :mask[row].sum()].tolist()
        assert plain_logp(tiny, inputs, row, ids).argmax(-1).tolist() == ids
    assert torch.equal(tokens, sample(tiny, T=12, top_p=1e-6)[1])
    assert torch.equal(tokens, sample(tiny, T=12, temperature=0.0, seed=1)[1])


def test_sampling_follows_the_global_random_stream(tiny):
    first, again, other = (sample(tiny, T=12, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batch_equals_one_by_one(tiny, critic):
    inputs, tokens, mask = sample(tiny, stop="e")
    logp, entropy = vlm.score(tiny, inputs, tokens, mask)
    values = vlm.prefix_values(critic, inputs, tokens, mask)
    greedy, greedy_mask = vlm.generate(tiny, inputs, 12, 0.0)
    for row, n in enumerate(mask.sum(1).tolist()):
        alone = vlm.encode(tiny, PROMPTS[row:row + 1], [picture(row)])
        one, whole = tokens[row:row + 1, :n], torch.ones(1, n, dtype=torch.bool)
        for batched, single in zip((logp, entropy, values), (*vlm.score(tiny, alone, one, whole),
                                                             vlm.prefix_values(critic, alone, one, whole)),
                                   strict=True):
            close(batched[row, :n], single[0], rtol=0, atol=1e-4)
        if row < 4:
            answer, length = vlm.generate(tiny, alone, 12, 0.0)
            assert answer[length].tolist() == greedy[row][greedy_mask[row]].tolist()


def test_take_gives_the_rows_of_every_input(tiny):
    inputs, tokens, mask = sample(tiny, T=8)
    rows = torch.tensor([5, 2, 11])
    part, _ = vlm.score(tiny, vlm.take(inputs, rows), tokens[rows], mask[rows])
    close(part, vlm.score(tiny, inputs, tokens, mask)[0][rows], rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------- banned tokens
@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_banned_tokens_are_never_sampled(request, name):
    model = request.getfixturevalue(name)
    prompts = ["a"] * 64
    inputs = vlm.encode(model, prompts, pictures(64, 16 if name == "bpe" else 32))
    torch.manual_seed(0)
    tokens = torch.cat([vlm.generate(model, inputs, 64, 5.0)[0].flatten() for _ in range(3)])
    assert len(tokens) > 10_000 and not model.banned[tokens].any()
    names = model.tokenizer.convert_ids_to_tokens(model.banned.nonzero().flatten().tolist())
    assert {"<unk>", "<image>", "<fake_token_around_image>", "<global-img>"} == set(names)
    assert not model.banned[model.eos_ids].any()  # although it is the padding, too


def test_a_banned_token_scores_minus_infinity(tiny):
    tokens, mask = response_of(tiny, "12<fake_token_around_image>3")
    logp, entropy = vlm.score(tiny, vlm.encode(tiny, ["a"], [None]), tokens, mask)
    assert torch.isinf(logp[0]).tolist() == [False, False, True, False] and logp[0, 2] < 0
    assert torch.isfinite(entropy).all()


def test_scoring_does_not_write_into_the_models_logits(tiny):
    """`.float()` of a float32 tensor is the tensor itself: -inf written into it would reach the model's own output."""
    seen = []
    keep = tiny.model.get_output_embeddings().register_forward_hook(lambda *a: seen.append((a[-1], a[-1].clone())))
    tokens, mask = response_of(tiny, "3+5=8")
    try:
        vlm.score(tiny, vlm.encode(tiny, ["a"], [picture(0)]), tokens, mask)
    finally:
        keep.remove()
    (output, before), = seen
    assert torch.isfinite(output).all() and torch.equal(output, before)


def test_gradients_are_finite_beside_banned_tokens(tiny):
    model = vlm.VLM(copy.deepcopy(tiny.model), tiny.processor, tiny.banned, tiny.eos_ids)
    inputs, tokens, mask = sample(model, T=12)
    logp, entropy = vlm.score(model, inputs, tokens, mask)
    (logp.sum() + entropy.sum()).backward()
    gradients = [p.grad for p in model.model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)
    assert all(p.grad is not None for n, p in model.model.named_parameters() if "vision" in n and "embed" in n)


# ------------------------------------------------------------------------------------------------- what is looked at
def test_the_pixels_change_the_log_probs(tiny):
    tokens, mask = response_of(tiny, "<see>35</see>")
    seen = [vlm.score(tiny, vlm.encode(tiny, ["Sum."], [image]), tokens, mask)[0] for image in (
        picture(0), picture(1), picture(0), None)]
    close(seen[0], seen[2], rtol=0, atol=0)
    assert all((seen[0] - other).abs().max() > 1e-3 for other in (seen[1], seen[3]))
    dotted = np.array(picture(0))
    dotted[20, 20] = 255 - dotted[20, 20]
    found, _ = vlm.score(tiny, vlm.encode(tiny, ["Sum."], [dotted]), tokens, mask)  # an array, one pixel changed
    assert (found - seen[0]).abs().max() > 1e-5


def test_without_a_picture_there_are_no_pixels(tiny):
    inputs = vlm.encode(tiny, ["Add 3 5.", "?"], [None, None])
    assert not any(name.startswith("pixel") for name in inputs)
    assert "<image>" not in tiny.tokenizer.decode(inputs["input_ids"][0])
    with_picture = vlm.encode(tiny, ["Add 3 5."], [picture(0)])
    image = tiny.tokenizer.convert_tokens_to_ids("<image>")
    assert (with_picture["input_ids"] == image).sum() == 4  # one token per 16 x 16 block


def test_prompts_are_never_truncated(tiny):
    long = "0123456789" * 700  # beyond the model's 4096 positions
    inputs = vlm.encode(tiny, [long, "short"], [picture(0), picture(1)])
    kept = inputs["input_ids"][0]
    assert long in tiny.tokenizer.decode(kept) and inputs["attention_mask"][0].all()
    assert inputs["attention_mask"][1].tolist() == sorted(inputs["attention_mask"][1].tolist())  # padded on the left
    assert "short" in tiny.tokenizer.decode(inputs["input_ids"][1])


def test_prompt_and_response_are_told_apart_by_a_newline(tiny):
    """The chat template ends the user's turn with one."""
    assert tiny.tokenizer.decode(vlm.encode(tiny, ["Add 3 5."], [None])["input_ids"][0]) == "Add 3 5.\n"


def test_prompts_and_pictures_must_match_in_number(tiny):
    with pytest.raises(ValueError):
        vlm.encode(tiny, ["a", "b"], [None])


def test_tokens_after_the_mask_change_nothing(tiny, critic):
    inputs, tokens, mask = sample(tiny, stop="e")
    noise = torch.randint(5, 60, tokens.shape, generator=torch.Generator().manual_seed(0))
    changed = torch.where(mask, tokens, noise)
    assert (changed != tokens).any()
    before, after = ((*vlm.score(tiny, inputs, x, mask), vlm.prefix_values(critic, inputs, x, mask))
                     for x in (tokens, changed))
    for a, b in zip(before, after, strict=True):
        close(a, b, rtol=0, atol=0)


@torch.no_grad()
def test_a_prefix_value_knows_the_tokens_before_it_and_no_others(tiny, critic):
    """Row t has another token at t: values up to and with t must stay, the next one must move; logp[t] moves too."""
    tokens, mask = (x.repeat(9, 1) for x in response_of(tiny, "3+5=8;12"))
    T = tokens.shape[1]
    changed = tokens.clone()
    changed[range(T), range(T)] += 1  # (T + 1 rows: the last stays as it was)
    inputs = vlm.encode(tiny, ["Sum."] * 9, [picture(0)] * 9)
    values, logp = vlm.prefix_values(critic, inputs, changed, mask), vlm.score(tiny, inputs, changed, mask)[0]
    for t in range(T):
        close(values[t, :t + 1], values[-1, :t + 1], rtol=0, atol=1e-5)
        close(logp[t, :t], logp[-1, :t], rtol=0, atol=1e-5)
        assert (values[t, t + 1:t + 2] - values[-1, t + 1:t + 2]).abs().gt(1e-3).all()
        assert (logp[t, t] - logp[-1, t]).abs() > 1e-3
    other = vlm.encode(tiny, ["Sum?"] * 9, [picture(0)] * 9)
    assert (vlm.prefix_values(critic, other, changed, mask)[:, 0] - values[:, 0]).abs().min() > 1e-3


def test_prefix_values_are_the_critics_own_values_moved_by_one(tiny, critic):
    tokens, mask = response_of(tiny, "12")
    inputs = vlm.encode(tiny, ["Sum."], [picture(0)])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
             "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)}
    close(vlm.prefix_values(critic, inputs, tokens, mask), critic(**whole)[:, -3:-1])


# --------------------------------------------------------------------------------------------- ends, stops, lengths
@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that has learned three texts by heart, each with its end. It costs about three seconds."""
    torch.manual_seed(0)
    model = vlm.load(vlm.build_tiny(tmp_path_factory.mktemp("taught"), 16))
    texts = {"a": "12", "b": "3+5=8;8", "c": "<answer>7</answer>99"}
    inputs = vlm.encode(model, list(texts), [None] * 3)
    tokens, mask = vlm.encode_responses(model, list(texts.values()))
    optimizer = torch.optim.Adam(model.model.parameters(), 3e-3)
    for _ in range(80):
        loss = -vlm.score(model, inputs, tokens, mask)[0].sum() / mask.sum()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss.item() < 0.05
    return model, texts, inputs


def test_written_responses_end_with_eos_inside_the_mask(tiny):
    tokens, mask = vlm.encode_responses(tiny, ["12", "<answer>7</answer>", ""])
    eos = tiny.eos_ids[0]
    assert mask.sum(1).tolist() == [3, 4, 1] and (tokens[range(3), mask.sum(1) - 1] == eos).all()
    assert tiny.tokenizer.decode(tokens[1][mask[1]][:-1]) == "<answer>7</answer>"


def test_eos_is_learned_although_it_is_the_padding(taught):
    model, texts, inputs = taught
    assert model.tokenizer.pad_token_id in model.eos_ids
    for temperature in (0.0, 0.5):
        tokens, mask = vlm.generate(model, inputs, 20, temperature)
        written = vlm.token_texts(model, tokens, mask, END)
        assert ["".join(row) for row in written] == [text + END for text in texts.values()]
        assert mask.sum(1).tolist() == [3, 8, 6] and tokens.shape[1] == 8  # the longest, and no step more
        assert (tokens[range(3), mask.sum(1) - 1] == model.eos_ids[0]).all()
    assert vlm.generate(model, inputs, 5, 0.0)[1].sum(1).tolist() == [3, 5, 5]  # cut by max_new_tokens


def test_the_stop_string_ends_a_row_and_belongs_to_it(taught):
    model, texts, inputs = taught
    tokens, mask = vlm.generate(model, inputs, 20, 0.0, stop="</answer>")
    written = ["".join(row) for row in vlm.token_texts(model, tokens, mask, END)]
    assert written == [texts["a"] + END, texts["b"] + END, "<answer>7</answer>"]
    written = vlm.token_texts(model, *vlm.generate(model, inputs, 20, 0.0, stop="=8;"), END)  # of several tokens
    assert ["".join(row) for row in written] == [texts["a"] + END, "3+5=8;", texts["c"] + END]


@pytest.mark.parametrize("name, stop", [("tiny", "e"), ("tiny", "text"), ("tiny", "\n"), ("bpe", "a"), ("bpe", "text"),
                                        ("bpe", "\n"), ("bpe", " "), ("bpe", "wide")])
def test_a_stop_string_ends_the_rows_that_wrote_it_and_no_others(request, name, stop):
    """The same random stream with and without it: finished rows must not move the others."""
    model = request.getfixturevalue(name)
    prompts = ["ab", "c"] * 32
    _, free, free_mask = sample(model, prompts, images="none", seed=3, temperature=3.0)
    texts = ["".join(row) for row in vlm.token_texts(model, free, free_mask, END)]
    if stop == "text":  # three characters that some row is known to write
        stop = next(text[6:9] for text in texts if text[6:9].isascii() and END not in text[:12])
    if stop == "wide":  # a character of several bytes
        stop = next(c for text in texts for c in text if c > "\x7f" and c != "\ufffd")
    _, tokens, mask = sample(model, prompts, images="none", seed=3, temperature=3.0, stop=stop)
    ended = 0
    for row in range(len(prompts)):
        ids = free[row][free_mask[row]].tolist()
        stops = [n for n in range(1, len(ids) + 1) if stop in model.tokenizer.decode(ids[:n])]
        expected = ids[:stops[0]] if stops else ids
        ended += bool(stops)
        assert tokens[row][mask[row]].tolist() == expected
    assert ended
    assert tokens.shape[1] == mask.sum(1).max()


def test_the_padding_id_inside_a_response_is_a_token_like_any_other(tiny):
    """Padding is by length: the token before and the tokens after it keep their scores and their place."""
    eos = tiny.eos_ids[0]
    ids = [20, eos, 30, eos, 40]
    tokens = torch.tensor([[*ids, eos, eos], [50] * 7])
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    inputs = vlm.encode(tiny, ["a", "longer"], [picture(0), picture(1)])
    logp, _ = vlm.score(tiny, inputs, tokens, mask)
    close(logp[0, :5], plain_logp(tiny, inputs, 0, ids)[range(5), ids], rtol=0, atol=1e-4)
    assert (logp[0, 5:] == 0).all() and (logp[0, :5] < 0).all()


# ------------------------------------------------------------------------------------------------------ token texts
def texts_of(model, ids):
    tokens = torch.tensor([ids], dtype=torch.long)
    return vlm.token_texts(model, tokens, torch.ones_like(tokens, dtype=torch.bool), END)[0]


def test_token_texts_join_to_the_response(tiny):
    _, tokens, mask = sample(tiny, stop="e")
    for row, pieces in enumerate(vlm.token_texts(tiny, tokens, mask, END)):
        ids = tokens[row][mask[row]].tolist()
        ended = ids[-1] in tiny.eos_ids
        assert len(pieces) == len(ids) and pieces.count(END) == ended
        assert "".join(pieces) == tiny.tokenizer.decode(ids[:len(ids) - ended]) + END * ended


def test_byte_level_texts_lose_nothing(bpe):
    """Characters of several bytes span tokens: the last one brings the character, and any cut loses nothing."""

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    @example("the answer is 🎲🎲 naïve 骰子\n")
    def check(text):
        ids = bpe.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = texts_of(bpe, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
        for n in range(1, len(ids)):  # a response cut there lacks the unfinished character, and no other
            cut, before = ("".join(x).rstrip("\ufffd") for x in (texts_of(bpe, ids[:n]), pieces[:n]))
            assert text.startswith(cut) and cut.startswith(before)

    check()


def test_a_character_comes_with_its_last_byte(bpe):
    ids = bpe.tokenizer("a☃b", add_special_tokens=False)["input_ids"]  # a snowman: three bytes, never seen in training
    assert texts_of(bpe, ids) == ["a", "", "", "☃", "b"]
    assert "".join(texts_of(bpe, ids[:3])).rstrip("\ufffd") == "a"


def test_any_ids_give_texts(bpe):
    """Random bytes are what an untrained policy writes. What is not valid UTF-8 reads as U+FFFD, as in `decode`."""
    allowed = [i for i in range(len(bpe.tokenizer)) if not bpe.banned[i] and i not in bpe.eos_ids]

    @given(st.lists(st.sampled_from(allowed), max_size=40))
    def check(ids):
        joined, whole = "".join(texts_of(bpe, ids)), bpe.tokenizer.decode(ids)
        assert whole.startswith(joined) and joined.replace("\ufffd", "") == whole.replace("\ufffd", "")

    check()


def test_text_before_an_unfinished_character_is_not_lost(bpe):
    """Some tokens hold a whole character and the first byte of another: as the last one, they bring the whole one."""
    half = next(i for i in range(len(bpe.tokenizer)) if (text := bpe.tokenizer.decode([i])).endswith("\ufffd")
                and text[0] != "\ufffd")
    first = bpe.tokenizer.decode([half])[0]
    assert "".join(texts_of(bpe, [half]))[:1] == first
    assert "".join(texts_of(bpe, [half, bpe.eos_ids[0]]))[:1] == first


# ------------------------------------------------------------------------------------------------- dtype and device
def test_bfloat16_weights_give_float32_log_probs(directory, tiny):
    half = vlm.load(directory, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    inputs, tokens, mask, sampled = sample(half, T=12, return_logp=True)
    logp, entropy = vlm.score(half, inputs, tokens, mask)
    assert logp.dtype == entropy.dtype == sampled.dtype == torch.float32
    values = vlm.prefix_values(sapo.SegmentCritic(half.model.base_model), inputs, tokens, mask)
    assert values.dtype == torch.float32
    expected, expected_entropy = vlm.score(tiny, inputs, tokens, mask)
    close(logp, expected, rtol=0, atol=0.5)
    close(entropy, expected_entropy, rtol=0, atol=0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.3)])
def test_cuda_agrees_with_itself_and_with_the_cpu(directory, tiny, dtype, tolerance):
    card = vlm.load(directory, "cuda", dtype)
    inputs, tokens, mask, sampled = sample(card, stop="e", return_logp=True)
    logp, entropy = vlm.score(card, inputs, tokens, mask)
    close(logp, sampled, rtol=0, atol=tolerance)
    on_cpu = {k: x.cpu() for k, x in inputs.items()}
    expected = vlm.score(tiny, on_cpu, tokens.cpu(), mask.cpu())
    for found, right in zip((logp, entropy), expected, strict=True):
        assert found.device.type == "cuda" and found.dtype == torch.float32
        close(found.cpu(), right, rtol=0, atol=tolerance)
    assert not card.banned[tokens].any() and len(vlm.token_texts(card, tokens, mask, END)) == len(PROMPTS)


# --------------------------------------------------------------------------------------------------- build and load
def test_the_tiny_model_is_a_small_smolvlm(tiny):
    assert type(tiny.model) is transformers.Idefics3ForConditionalGeneration
    assert 260_000 < sum(p.numel() for p in tiny.model.parameters()) < 290_000
    for tag in vlm.TAGS:
        assert len(tiny.tokenizer(tag, add_special_tokens=False)["input_ids"]) == 1
    every = "".join(map(chr, range(32, 127))) + "\n"
    ids = tiny.tokenizer(every, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(set(ids)) == 96 and tiny.tokenizer.decode(ids) == every


def test_build_tiny_is_a_function_of_its_seed_and_leaves_the_random_stream(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = [vlm.load(vlm.build_tiny(tmp_path / str(i), 16, seed=seed)).model.state_dict()
               for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights[0].values(), weights[2].values(), strict=True))


@pytest.mark.parametrize("size", [16, 48, 64])
def test_pictures_of_other_sizes(tmp_path, size):
    model = vlm.load(vlm.build_tiny(tmp_path, size))
    inputs = vlm.encode(model, ["a"], [picture(0, size)])
    image = model.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image).sum() == (size // 16) ** 2
    assert inputs["pixel_values"].shape[-2:] == (size, size)
    vlm.generate(model, inputs, 2)


@pytest.mark.parametrize("size", [20, 0, 8, -16])
def test_a_picture_that_does_not_divide_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"image_size: {size}, expected"):
        vlm.build_tiny(tmp_path / "new", size)
    assert not (tmp_path / "new").exists()


def test_the_tiny_model_needs_no_torchvision(tmp_path):
    code = ("import sys; sys.modules['torchvision'] = None\n"
            "import numpy as np, torch, vlm\n"
            "model = vlm.load(vlm.build_tiny(sys.argv[1], 16))\n"
            "inputs = vlm.encode(model, ['a'], [np.zeros((16, 16, 3), np.uint8)])\n"
            "print(vlm.generate(model, inputs, 2)[0].shape[1], 'tokens')\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " tokens" in done.stdout, done.stderr


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed: nothing is missing")
def test_a_processor_that_needs_torchvision_says_so_in_one_line(directory, tmp_path):
    """A directory with what Qwen2.5-VL's processor is made from; no weights are needed to reach the error."""
    for file in directory.glob("token*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}))
    with pytest.raises(ImportError) as caught:
        vlm.load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "torchvision" in message and "not installed" in message
    assert "\n" not in message


def test_a_missing_directory_says_so_in_one_line(tmp_path):
    with pytest.raises(OSError) as caught:
        vlm.load(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(OSError) as caught:
        vlm.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- prefixes, and the picture
def test_a_prefix_as_prompt_is_the_same_state(tiny):
    """Prefixes of different lengths move into the prompt: what follows scores as it did behind them."""
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")]
    inputs = vlm.encode(tiny, ["Sum.", "Sum the dice.", "?"], pictures)
    tokens, mask = vlm.encode_responses(tiny, ["<see>3526</see><think>3+5", "<see>11</see>", "<see>6</see><think>6+6"])
    lengths = torch.tensor([4, 0, 3])
    with torch.no_grad():
        whole, _ = vlm.score(tiny, inputs, tokens, mask)
        prompt = vlm.extended(inputs, tokens, lengths)
        assert prompt["attention_mask"].sum(1).tolist() == (inputs["attention_mask"].sum(1) + lengths).tolist()
        assert prompt["attention_mask"][:, -1].all()  # padded on the left
        for row, n in enumerate(lengths.tolist()):
            rest, kept = tokens[row:row + 1, n:], mask[row:row + 1, n:]
            found, _ = vlm.score(tiny, vlm.take(prompt, torch.tensor([row])), rest, kept)
            torch.testing.assert_close(found, whole[row:row + 1, n:], rtol=0, atol=1e-4)


def test_noise_replaces_the_picture_and_nothing_else(tiny):
    inputs = vlm.encode(tiny, ["Sum."], [Image.linear_gradient("L").resize((32, 32)).convert("RGB")])
    before = {name: x.clone() for name, x in inputs.items()}
    noised = vlm.noised(inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    assert {name for name in inputs if not torch.equal(noised[name], inputs[name])} == {"pixel_values"}
    pixels, noise = inputs["pixel_values"], noised["pixel_values"]
    assert abs(noise.mean() - pixels.mean()) < 0.1 * pixels.std() and abs(noise.std() / pixels.std() - 1) < 0.1
