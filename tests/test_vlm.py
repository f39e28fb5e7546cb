"""vlm.py on real (tiny) models: what is sampled is what is scored, and padding changes nothing.

test_vlm_text.py has where a response ends and what its tokens read; test_families.py has the same
claims on other families' models.
"""

import copy
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import picture, pictures, plain_logp
from PIL import Image

import sapo
import vlm

ROOT = Path(__file__).parents[1]
PROMPTS = ["Sum the dice.", "?", "Follow 12 arrows, then stop.", "Add 3 5."] * 4
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def critic(sharp):
    made = sapo.SegmentCritic(copy.deepcopy(sharp.model.base_model))
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    return made


def sample(model, images=True, T=40, temperature=1.0, seed=0, **kwargs):
    """Responses to PROMPTS, each with a picture of its own or with none. -> (inputs, tokens, mask)
    and what else `generate` is asked for."""
    inputs = vlm.encode(model, PROMPTS, pictures(16) if images else [None] * 16)
    torch.manual_seed(seed)
    return inputs, *vlm.generate(model, inputs, T, temperature, **kwargs)


def response_of(model, text):
    """The ids of some text, as one response. -> tokens (1, T), mask (1, T)."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)


# ----------------------------------------------------------------- sampling and scoring agree


@pytest.mark.parametrize("images", [True, False], ids=["each", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_sampled_is_what_is_scored(sharp, temperature, images):
    inputs, tokens, mask, logp = sample(
        sharp, images, temperature=temperature, stop="e", return_logp=True
    )
    # padding on both sides, or the test would mean little
    assert (inputs["attention_mask"] == 0).any() and not mask.all()
    scored, _ = vlm.score(sharp, inputs, tokens, mask, temperature)
    close(scored, logp, rtol=0, atol=1e-4)
    other, _ = vlm.score(sharp, inputs, tokens, mask, temperature + 0.5)
    assert (other - logp).abs().max() > 0.1
    assert logp.dtype == scored.dtype == torch.float32
    assert (scored[~mask] == 0).all() and (logp[~mask] == 0).all()


def test_score_and_entropy_against_the_model_called_directly(sharp):
    inputs, tokens, mask = sample(sharp, temperature=0.7, stop="e")
    logp, entropy = vlm.score(sharp, inputs, tokens, mask, 0.7)
    for row, n in enumerate(mask.sum(1).tolist()):
        ids = tokens[row, :n].tolist()
        expected = plain_logp(sharp, inputs, row, ids, 0.7)
        close(logp[row, :n], expected[range(n), ids], rtol=0, atol=1e-4)
        close(entropy[row, :n], sapo.token_entropy(expected), rtol=0, atol=1e-4)
    assert (entropy[~mask] == 0).all() and (entropy[mask] > 0).all()


def test_sampling_takes_nothing_from_the_checkpoints_own_generation_config(sharp_folder, tmp_path):
    """Published checkpoints bring a repetition penalty, a top-k and more; scoring knows none."""
    shutil.copytree(sharp_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "generation_config.json"
    config = json.loads(file.read_text())
    config |= {"do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.5}
    file.write_text(json.dumps(config | {"repetition_penalty": 1.5}))
    opened = vlm.load(tmp_path)
    inputs, tokens, mask, logp = sample(opened, return_logp=True)
    close(vlm.score(opened, inputs, tokens, mask)[0], logp, rtol=0, atol=1e-4)
    greedy = sample(opened, temperature=0.0)[1]
    assert torch.equal(greedy, sample(vlm.load(sharp_folder), temperature=0.0)[1])


def test_greedy_takes_the_likeliest_token_and_small_top_p_too(sharp):
    inputs, tokens, mask = sample(sharp, T=12, temperature=0.0)
    for row in range(0, len(tokens), 5):
        ids = tokens[row, : mask[row].sum()].tolist()
        assert plain_logp(sharp, inputs, row, ids).argmax(-1).tolist() == ids
    assert torch.equal(tokens, sample(sharp, T=12, top_p=1e-6)[1])
    assert torch.equal(tokens, sample(sharp, T=12, temperature=0.0, seed=1)[1])


def test_a_draw_is_that_of_multinomial():
    """The same tokens from the same random numbers, banned ones never; and what they score."""
    scores = 3 * torch.randn(16, 97)
    scores[:, ::5] = -torch.inf
    draw = vlm._Draw(is_sampling=True)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        torch.manual_seed(seed)
        assert torch.equal(draw(None, scores).argmax(-1), expected)
        logp = scores.log_softmax(-1).gather(1, expected[:, None]).squeeze(1)
        close(draw.logp[-1], logp, rtol=0, atol=1e-5)
    assert not draw.is_broken
    draw(None, torch.full((2, 3), torch.nan))
    assert draw.is_broken


def test_sampling_follows_the_global_random_stream(sharp):
    first, again, other = (sample(sharp, T=12, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batch_equals_one_by_one(sharp, critic):
    inputs, tokens, mask = sample(sharp, stop="e")
    batched = (
        *vlm.score(sharp, inputs, tokens, mask),
        vlm.prefix_values(critic, inputs, tokens, mask),
    )
    greedy, greedy_mask = vlm.generate(sharp, inputs, 12, 0.0)
    for row, n in enumerate(mask.sum(1).tolist()):
        alone = vlm.encode(sharp, PROMPTS[row : row + 1], [picture(row)])
        response = tokens[row : row + 1, :n]
        whole = torch.ones(1, n, dtype=torch.bool)
        singly = (
            *vlm.score(sharp, alone, response, whole),
            vlm.prefix_values(critic, alone, response, whole),
        )
        for together, single in zip(batched, singly, strict=True):
            close(together[row, :n], single[0], rtol=0, atol=1e-4)
        if row < 4:
            answer, answer_mask = vlm.generate(sharp, alone, 12, 0.0)
            assert answer[answer_mask].tolist() == greedy[row][greedy_mask[row]].tolist()


@pytest.mark.parametrize("at_once", [1, 5, 16, 100])
def test_written_in_parts_greedy_answers_are_the_same(sharp, at_once):
    inputs, tokens, mask, logp = sample(sharp, T=12, temperature=0.0, stop="e", return_logp=True)
    parts = vlm.generate(sharp, inputs, 12, 0.0, 1.0, "e", return_logp=True, at_once=at_once)
    assert torch.equal(parts[1], mask) and torch.equal(parts[0][mask], tokens[mask])
    close(parts[2], logp, rtol=0, atol=1e-4)
    assert (~mask).any()  # answers of several lengths


def test_written_in_parts_samples_score_as_they_were_drawn(sharp):
    inputs, tokens, mask, logp = sample(sharp, return_logp=True, at_once=5)
    again = sample(sharp, return_logp=True, at_once=5)
    assert torch.equal(tokens, again[1]) and len(tokens) == 16
    close(vlm.score(sharp, inputs, tokens, mask)[0], logp, rtol=0, atol=1e-4)


def test_kept_keys_and_values_are_not_split(sharp):
    inputs = vlm.with_cache(sharp, vlm.encode(sharp, PROMPTS, [None] * 16))
    with pytest.raises(ValueError, match="at_once: 4 of 16 prompts"):
        vlm.generate(sharp, inputs, 4, at_once=4)


def test_take_gives_the_rows_of_every_input(sharp):
    inputs, tokens, mask = sample(sharp, T=8)
    rows = torch.tensor([5, 2, 11])
    part, _ = vlm.score(sharp, vlm.take(inputs, rows), tokens[rows], mask[rows])
    close(part, vlm.score(sharp, inputs, tokens, mask)[0][rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 16, 100, 0])
def test_in_parts_of_any_size_is_the_whole(sharp, size):
    inputs, tokens, mask = sample(sharp, T=4)

    sizes = []

    def sums(rows):
        sizes.append(len(rows))
        return tokens[rows].sum(1), inputs["input_ids"][rows].sum(1)

    parts = vlm.in_parts(sums, 16, size)
    assert max(sizes) == min(size or 16, 16)
    for part, expected in zip(parts, sums(torch.arange(16)), strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(vlm.in_parts(lambda rows: mask[rows].sum(1), 16, size), mask.sum(1))


@pytest.mark.parametrize("pieces", [1, 400])
def test_in_bfloat16_the_heads_gradient_is_summed_over_pieces_in_float32(
    sharp_folder, monkeypatch, pieces
):
    """Summed in bfloat16, 400 pieces miss it by 4% of its norm."""
    half = vlm.load(sharp_folder, dtype="bfloat16")
    gradients = []
    inputs, tokens, mask = sample(half)
    assert mask.sum() >= 400
    for size in (2**24, len(half.banned) * (int(mask.sum()) // pieces)):
        monkeypatch.setattr(vlm, "PIECE", size)
        half.model.zero_grad()
        vlm.score(half, inputs, tokens, mask)[0].sum().backward()
        gradients.append(half.model.get_output_embeddings().weight.grad.float().clone())
    whole, in_pieces = gradients
    assert (in_pieces - whole).norm() < 0.01 * whole.norm()


def test_a_head_that_is_not_last_is_seen_in_half_precision_too():
    """bfloat16's own rounding, below 1%, is no reason to refuse a model."""

    def model(factor):
        class Head(torch.nn.Module):
            dtype = torch.bfloat16

            def __call__(self, input_ids):
                return SimpleNamespace(logits=factor * torch.ones(1, 4, dtype=self.dtype))

            def base_model(self, input_ids):
                return SimpleNamespace(last_hidden_state=torch.ones(1, 4, dtype=self.dtype))

            def get_output_embeddings(self):
                return torch.nn.Identity()

        return Head()

    ids = torch.tensor([[0]])
    assert vlm._head_is_last(model(1 + 2**-7), ids)
    assert not vlm._head_is_last(model(1.05), ids)


def test_cudnns_attention_is_off_where_a_card_is_used():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        vlm.prepare("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        vlm.prepare("cuda:1")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# ------------------------------------------------------------------------------ banned tokens


@pytest.mark.parametrize("name, side", [("sharp", 32), ("bpe", 16)])
def test_banned_tokens_are_never_sampled(request, name, side):
    model = request.getfixturevalue(name)
    inputs = vlm.encode(model, ["a"] * 64, pictures(64, (side, side)))
    torch.manual_seed(0)
    tokens = torch.cat([vlm.generate(model, inputs, 64, 5.0)[0].flatten() for _ in range(3)])
    assert len(tokens) > 10_000 and not model.banned[tokens].any()
    names = model.tokenizer.convert_ids_to_tokens(model.banned.nonzero().flatten().tolist())
    assert {"<unk>", "<image>", "<fake_token_around_image>", "<global-img>"} == set(names)
    assert not model.banned[model.eos_ids].any()  # although it is the padding, too


def test_a_banned_token_scores_minus_infinity(sharp):
    tokens, mask = response_of(sharp, "12<fake_token_around_image>3")
    logp, entropy = vlm.score(sharp, vlm.encode(sharp, ["a"], [None]), tokens, mask)
    assert torch.isinf(logp[0]).tolist() == [False, False, True, False] and logp[0, 2] < 0
    assert torch.isfinite(entropy).all()


def test_scoring_does_not_write_into_the_models_logits(sharp):
    """`.float()` of a float32 tensor is that tensor: a -inf would reach the model's own output."""
    outputs = []

    def keep(module, arguments, output):
        outputs.append((output, output.clone()))

    hook = sharp.model.get_output_embeddings().register_forward_hook(keep)
    tokens, mask = response_of(sharp, "3+5=8")
    try:
        vlm.score(sharp, vlm.encode(sharp, ["a"], [picture(0)]), tokens, mask)
    finally:
        hook.remove()
    ((output, as_it_was),) = outputs
    assert torch.isfinite(output).all() and torch.equal(output, as_it_was)


def test_gradients_are_finite_beside_banned_tokens(sharp):
    own = copy.deepcopy(sharp.model)
    model = vlm.VLM(own, sharp.processor, sharp.banned, sharp.eos_ids)
    inputs, tokens, mask = sample(model, T=12)
    logp, entropy = vlm.score(model, inputs, tokens, mask)
    (logp.sum() + entropy.sum()).backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, _ in own.named_parameters():
        if "vision" in name and "embed" in name:
            assert name in gradients


# -------------------------------------------------------------------------- what is looked at


def test_the_pixels_change_the_log_probs(sharp):
    tokens, mask = response_of(sharp, "<see>35</see>")

    def logp_with(image):
        return vlm.score(sharp, vlm.encode(sharp, ["Sum."], [image]), tokens, mask)[0]

    first = logp_with(picture(0))
    close(logp_with(picture(0)), first, rtol=0, atol=0)
    assert (logp_with(picture(1)) - first).abs().max() > 1e-3
    assert (logp_with(None) - first).abs().max() > 1e-3
    dotted = np.array(picture(0))  # an array, with one pixel changed
    dotted[20, 20] = 255 - dotted[20, 20]
    assert (logp_with(dotted) - first).abs().max() > 1e-5


def test_without_a_picture_there_are_no_pixels(sharp):
    inputs = vlm.encode(sharp, ["Add 3 5.", "?"], [None, None])
    assert not any(name.startswith("pixel") for name in inputs)
    assert "<image>" not in sharp.tokenizer.decode(inputs["input_ids"][0])
    with_picture = vlm.encode(sharp, ["Add 3 5."], [picture(0)])
    image = sharp.tokenizer.convert_tokens_to_ids("<image>")
    assert (with_picture["input_ids"] == image).sum() == 4  # one token per 16 x 16 block


def test_prompts_are_never_truncated(sharp):
    long = "0123456789" * 700  # beyond the model's 4096 positions
    inputs = vlm.encode(sharp, [long, "short"], [picture(0), picture(1)])
    kept = inputs["input_ids"][0]
    assert long in sharp.tokenizer.decode(kept) and inputs["attention_mask"][0].all()
    attention = inputs["attention_mask"][1].tolist()
    assert attention == sorted(attention)  # padded on the left
    assert "short" in sharp.tokenizer.decode(inputs["input_ids"][1])


def test_a_models_context_is_what_its_configuration_says(sharp, monkeypatch):
    assert vlm.context_tokens(sharp) == 4096
    silent = SimpleNamespace(get_text_config=SimpleNamespace)
    monkeypatch.setattr(sharp.model, "config", silent)
    assert vlm.context_tokens(sharp) == float("inf")


def test_prompt_and_response_are_told_apart_by_a_newline(sharp):
    """The chat template ends the user's turn with one."""
    inputs = vlm.encode(sharp, ["Add 3 5."], [None])
    assert sharp.tokenizer.decode(inputs["input_ids"][0]) == "Add 3 5.\n"


def test_prompts_and_pictures_must_match_in_number(sharp):
    with pytest.raises(ValueError):
        vlm.encode(sharp, ["a", "b"], [None])


def test_tokens_after_the_mask_change_nothing(sharp, critic):
    inputs, tokens, mask = sample(sharp, stop="e")
    noise = torch.randint(5, 60, tokens.shape, generator=torch.Generator().manual_seed(0))
    changed = torch.where(mask, tokens, noise)
    assert (changed != tokens).any()

    def numbers(tokens):
        values = vlm.prefix_values(critic, inputs, tokens, mask)
        return *vlm.score(sharp, inputs, tokens, mask), values

    for expected, same in zip(numbers(tokens), numbers(changed), strict=True):
        close(same, expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_prefix_value_knows_the_tokens_before_it_and_no_others(sharp, critic):
    """Row t has another token at t: values up to and with t must stay, the next one must move;
    logp[t] moves too."""
    tokens, mask = (tensor.repeat(9, 1) for tensor in response_of(sharp, "3+5=8;12"))
    T = tokens.shape[1]
    changed = tokens.clone()
    changed[range(T), range(T)] += 1  # (T + 1 rows: the last stays as it was)
    inputs = vlm.encode(sharp, ["Sum."] * 9, [picture(0)] * 9)
    values = vlm.prefix_values(critic, inputs, changed, mask)
    logp, _ = vlm.score(sharp, inputs, changed, mask)
    for t in range(T):
        close(values[t, : t + 1], values[-1, : t + 1], rtol=0, atol=1e-5)
        close(logp[t, :t], logp[-1, :t], rtol=0, atol=1e-5)
        assert (values[t, t + 1 : t + 2] - values[-1, t + 1 : t + 2]).abs().gt(1e-3).all()
        assert (logp[t, t] - logp[-1, t]).abs() > 1e-3
    other = vlm.encode(sharp, ["Sum?"] * 9, [picture(0)] * 9)
    other_values = vlm.prefix_values(critic, other, changed, mask)
    assert (other_values[:, 0] - values[:, 0]).abs().min() > 1e-3


@torch.no_grad()
def test_a_prefix_value_hears_the_log_probabilities_before_it_and_no_others(sharp, critic):
    """V before token t is the plain critic's, and u times the surprise after token t - 1."""
    hearing = sapo.SegmentCritic(critic.backbone, hears=True)
    hearing.head.load_state_dict(critic.head.state_dict())
    torch.nn.init.constant_(hearing.per_nat, 0.5)
    inputs, tokens, mask = sample(sharp, T=8, stop="e")
    assert not mask.all()
    logp, _ = vlm.score(sharp, inputs, tokens, mask)

    def values(logp):
        return vlm.prefix_values(hearing, inputs, tokens, mask, sapo.surprise(logp, mask))

    plain, heard = vlm.prefix_values(critic, inputs, tokens, mask), values(logp)
    for row, n in enumerate(mask.sum(1).tolist()):
        least = 0.0
        for t in range(n):
            assert (heard[row, t] - plain[row, t]).item() == pytest.approx(0.5 * least, abs=1e-4)
            least = min(least, logp[row, t].item())
    assert not heard[~mask].any()
    for t in range(mask.shape[1]):
        other = logp.clone()
        other[:, t] = -20.0
        moved = values(other) != heard
        assert not moved[:, : t + 1].any()
        assert torch.equal(moved[:, t + 1 : t + 2], mask[:, t + 1 : t + 2])


def test_prefix_values_of_a_critic_that_hears_need_something_to_hear(sharp):
    tokens, mask = response_of(sharp, "12")
    inputs = vlm.encode(sharp, ["Sum."], [picture(0)])
    hearing = sapo.SegmentCritic(sharp.model.base_model, hears=True)
    with pytest.raises(ValueError, match=r"^surprise\b"):
        vlm.prefix_values(hearing, inputs, tokens, mask)


def test_prefix_values_are_the_critics_own_values_moved_by_one(sharp, critic):
    tokens, mask = response_of(sharp, "12")
    inputs = vlm.encode(sharp, ["Sum."], [picture(0)])
    P = inputs["input_ids"].shape[1]
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.ones(1, P + 2, dtype=torch.long),
    }
    close(vlm.prefix_values(critic, inputs, tokens, mask), critic(**whole)[:, -3:-1])


# ------------------------------------------------------------------ prefixes, and the picture


def test_a_prefix_as_prompt_is_the_same_state(sharp):
    """Prefixes of different lengths move into the prompt: what follows scores as it did before."""
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")]
    inputs = vlm.encode(sharp, ["Sum.", "Sum the dice.", "?"], images)
    texts = ["<see>3526</see><think>3+5", "<see>11</see>", "<see>6</see><think>6+6"]
    tokens, mask = vlm.encode_responses(sharp, texts)
    lengths = torch.tensor([4, 0, 3])
    with torch.no_grad():
        whole, _ = vlm.score(sharp, inputs, tokens, mask)
        prompt = vlm.extended(inputs, tokens, lengths)
        attended = inputs["attention_mask"].sum(1) + lengths
        assert prompt["attention_mask"].sum(1).tolist() == attended.tolist()
        assert prompt["attention_mask"][:, -1].all()  # padded on the left
        for row, n in enumerate(lengths.tolist()):
            alone = vlm.take(prompt, torch.tensor([row]))
            one = slice(row, row + 1)
            logp, _ = vlm.score(sharp, alone, tokens[one, n:], mask[one, n:])
            close(logp, whole[one, n:], rtol=0, atol=1e-4)


def test_noise_replaces_the_picture_and_nothing_else(sharp):
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    inputs = vlm.encode(sharp, ["Sum."], [image])
    as_they_were = {name: tensor.clone() for name, tensor in inputs.items()}
    noised = vlm.noised(inputs)
    assert all(torch.equal(inputs[name], as_they_were[name]) for name in as_they_were)
    changed = {name for name in inputs if not torch.equal(noised[name], inputs[name])}
    assert changed == {"pixel_values"}
    pixels, noise = inputs["pixel_values"], noised["pixel_values"]
    assert abs(noise.mean() - pixels.mean()) < 0.1 * pixels.std()
    assert abs(noise.std() / pixels.std() - 1) < 0.1


# --------------------------------------------------------------------------- dtype and device


def test_bfloat16_weights_give_float32_log_probs(sharp_folder, sharp):
    half = vlm.load(sharp_folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    inputs, tokens, mask, sampled = sample(half, T=12, return_logp=True)
    logp, entropy = vlm.score(half, inputs, tokens, mask)
    assert logp.dtype == entropy.dtype == sampled.dtype == torch.float32
    values = vlm.prefix_values(sapo.SegmentCritic(half.model.base_model), inputs, tokens, mask)
    assert values.dtype == torch.float32
    expected, expected_entropy = vlm.score(sharp, inputs, tokens, mask)
    close(logp, expected, rtol=0, atol=0.5)
    close(entropy, expected_entropy, rtol=0, atol=0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.3)])
def test_cuda_agrees_with_itself_and_with_the_cpu(sharp_folder, sharp, dtype, tolerance):
    card = vlm.load(sharp_folder, "cuda", dtype)
    inputs, tokens, mask, sampled = sample(card, stop="e", return_logp=True)
    scores = vlm.score(card, inputs, tokens, mask)
    close(scores[0], sampled, rtol=0, atol=tolerance)
    on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}
    expected = vlm.score(sharp, on_cpu, tokens.cpu(), mask.cpu())
    for on_card, right in zip(scores, expected, strict=True):
        assert on_card.device.type == "cuda" and on_card.dtype == torch.float32
        close(on_card.cpu(), right, rtol=0, atol=tolerance)
    assert not card.banned[tokens].any()
    assert len(vlm.token_texts(card, tokens, mask, "<end>")) == len(PROMPTS)


# --------------------------------------------------------------------------------------- open


def test_importing_vlm_changes_nothing_in_transformers():
    """What it must set there is set where a processor is opened, not behind an importer's back."""
    code = (
        "import transformers.models.idefics3 as package\n"
        "import transformers.models.idefics3.image_processing_pil_idefics3\n"
        "class Placeholder: pass\n"
        "package.Idefics3ImageProcessorPil = Placeholder\n"
        "import vlm\n"
        "assert package.Idefics3ImageProcessorPil is Placeholder\n"
        "real = vlm.idefics3_image_processor()\n"
        "assert package.Idefics3ImageProcessorPil is real is not Placeholder\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_so_in_one_line(sharp_folder, tmp_path):
    """What Qwen2.5-VL's processor is made from; no weights are needed to reach the error."""
    for file in sharp_folder.glob("token*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ImportError) as caught:
        vlm.load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "torchvision" in message and "not installed" in message
    assert "\n" not in message


def nothing(folder):
    shutil.rmtree(folder)


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("weights")


def an_empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def a_damaged_config(folder):
    (folder / "config.json").write_text("{")


def a_model_of_text_alone(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


REFUSED = {  # what was done to a checkpoint -> what is said of it
    nothing: "neither a folder nor a hub name (owner/name); ",
    a_file: "neither a folder nor a hub name (owner/name); ",
    an_empty_folder: "does not open (Unrecognized processing class in",
    no_weights: "does not open (Error no file named model.safetensors",
    damaged_weights: "does not open (Error while deserializing header",
    a_damaged_config: "does not open (Expecting property name",
    a_model_of_text_alone: "does not open (Unrecognized configuration class",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_what_is_no_checkpoint_is_refused_in_one_line(sharp_folder, tmp_path, damage, offline):
    """Without a look at the hub, which is asked for a name alone."""
    folder = tmp_path / "model"
    shutil.copytree(sharp_folder, folder)
    damage(folder)
    with pytest.raises(OSError) as caught:
        vlm.load(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder}: {REFUSED[damage]}") and "\n" not in said
    assert said.endswith("; give one that transformers opens as an image-text-to-text model")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def unanswered(_):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr(vlm, "AutoProcessor", SimpleNamespace(from_pretrained=unanswered))
    line = "owner/name: does not open .We couldn't connect to 'https://huggingface.co'..; give one"
    with pytest.raises(OSError, match=f"^{line}[^\n]*$"):
        vlm.load("owner/name")
