"""vlm.py on small random checkpoints of the families that people use.

test_models.py has LoRA, critics and optimizers on the same checkpoints, test_families_train.py
whole trainings.
"""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from families import PROMPTS, SUPPORTED, SYSTEM, encoded_prompts, picture_counts
from helpers import picture

import sapo
import vlm

close = torch.testing.assert_close


# ----------------------------------------------------------------------- pictures and prompts


@pytest.mark.parametrize("family", SUPPORTED)
def test_pictures_stay_with_their_rows(open_family, family):
    """A row in a batch of one, two and no pictures scores as it does alone, in any selection and
    order."""
    model = open_family(family)
    images, inputs = encoded_prompts(model, family)
    torch.manual_seed(0)
    tokens, mask = vlm.generate(model, inputs, 9)
    rows_alone = []
    for row, (prompt, own) in enumerate(zip(PROMPTS, images, strict=True)):
        alone = vlm.encode(model, [prompt], [own], SYSTEM)
        one = slice(row, row + 1)
        rows_alone.append(vlm.score(model, alone, tokens[one], mask[one])[0])
    expected = torch.cat(rows_alone)
    for rows in ([0, 1, 2], [2, 0], [1, 1, 2, 0], [2], [1]):
        selection = vlm.take(inputs, torch.tensor(rows))
        logp, _ = vlm.score(model, selection, tokens[rows], mask[rows])
        close(logp, expected[rows], rtol=0, atol=1e-4)

    def score(rows):
        return vlm.score(model, vlm.take(inputs, rows), tokens[rows], mask[rows])

    close(vlm.in_parts(score, 3, 2)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_picture_matters_to_its_own_row_alone(open_family, family):
    model = open_family(family)
    images, inputs = encoded_prompts(model, family)
    torch.manual_seed(0)
    tokens, mask = vlm.generate(model, inputs, 9)
    changed_images = [[picture(99, (40, 90)), *own[1:]] if own else own for own in images]
    changed = vlm.encode(model, PROMPTS, changed_images, SYSTEM)
    logp, _ = vlm.score(model, inputs, tokens, mask)
    changed_logp, _ = vlm.score(model, changed, tokens, mask)
    moved = (changed_logp - logp).abs().amax(1) > 1e-3
    assert moved.tolist() == [count > 0 for count in picture_counts(family)]


@pytest.mark.parametrize("family", SUPPORTED)
def test_prompts_are_filled_up_with_an_end(open_family, family):
    model = open_family(family)
    _, inputs = encoded_prompts(model, family)
    filling = inputs["input_ids"][inputs["attention_mask"] == 0]
    assert len(filling) and set(filling.tolist()) == {model.eos_ids[0]}
    assert "labels" not in inputs  # PaliGemma's processor makes some


@pytest.mark.parametrize("family", SUPPORTED)
def test_what_is_sampled_is_what_is_scored(open_family, family):
    model = open_family(family)
    _, inputs = encoded_prompts(model, family)
    torch.manual_seed(0)
    tokens, mask, logp = vlm.generate(model, inputs, 12, 0.8, return_logp=True)
    scored, _ = vlm.score(model, inputs, tokens, mask, 0.8)
    close(scored, logp, rtol=0, atol=1e-4)
    # and a response may become a part of the prompt
    longer = vlm.extended(inputs, tokens, torch.tensor([4, 0, 2]))
    more, more_mask, more_logp = vlm.generate(model, longer, 6, return_logp=True)
    close(vlm.score(model, longer, more, more_mask)[0], more_logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_noise_moves_the_rows_with_a_picture_and_no_others(open_family, family):
    model = open_family(family)
    _, inputs = encoded_prompts(model, family)
    torch.manual_seed(0)
    tokens, mask = vlm.generate(model, inputs, 12)
    logp, _ = vlm.score(model, inputs, tokens, mask)
    noised_logp, _ = vlm.score(model, vlm.noised(inputs), tokens, mask)
    moved = (noised_logp - logp).abs().amax(1) > 1e-3
    assert moved.tolist() == [count > 0 for count in picture_counts(family)]


@pytest.mark.parametrize("family", ["idefics3", "llava", "paligemma"])
def test_the_system_turn_reaches_the_prompt(open_family, family):
    model = open_family(family)
    inputs = vlm.encode(model, ["How many?"], [picture(0)], "Be brief.")
    text = model.tokenizer.decode(inputs["input_ids"][0])
    assert text.index("Be brief.") < text.index("How many?"), text
    if model.tokenizer.bos_token:
        assert text.count(model.tokenizer.bos_token) == 1


def test_a_template_without_a_system_role_gets_it_in_the_user_turn(open_family):
    model = open_family("llava")
    model.processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "USER: <image>\n{{ messages[0]['content'][-1]['text'] }} ASSISTANT:"
    )
    inputs = vlm.encode(model, ["How many?"], [picture(0)], "Be brief.")
    text = model.tokenizer.decode(inputs["input_ids"][0])
    assert "Be brief.\n\nHow many? ASSISTANT:" in text


def test_logits_behind_a_cap_are_refused(family_folder):
    folder = family_folder("paligemma2")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        ids = torch.tensor([[5]])
        uncapped = model.lm_head(model.model(input_ids=ids).last_hidden_state)
        capped = not torch.equal(model(input_ids=ids).logits, uncapped)
    if not capped:
        pytest.skip("this version of transformers does not cap PaliGemma2's logits")
    model.get_output_embeddings().weight.data.mul_(20)  # random logits are too small to feel it
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="capped"):
        vlm.load(folder)


# ------------------------------------------------------------------------------------- memory


def gradient(model, inputs, tokens, mask):
    """(logp, entropy, the gradient of each parameter) of a loss on the log-probabilities."""
    model.model.zero_grad()
    logp, entropy = vlm.score(model, inputs, tokens, mask)
    logp.square().mean().backward()
    gradients = {}
    for name, parameter in model.model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return logp.detach(), entropy, gradients


def kept_bytes(function):
    """(what a function returns, bytes that autograd keeps of it for the gradient)."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return result, sum(sizes)


@pytest.mark.parametrize("family", ["idefics3", "llava", "paligemma"])
def test_the_head_in_pieces_changes_no_number(monkeypatch, open_family, family):
    model = open_family(family)
    _, inputs = encoded_prompts(model, family)
    tokens, mask = vlm.generate(model, inputs, 12)
    mask = mask & (torch.arange(mask.shape[1]) < torch.tensor([9, 4, 7])[:, None])
    whole = gradient(model, inputs, tokens, mask)
    monkeypatch.setattr(vlm, "PIECE", 3 * len(model.banned))
    for expected, in_pieces in zip(whole, gradient(model, inputs, tokens, mask), strict=True):
        close(in_pieces, expected, rtol=1e-5, atol=1e-5)


def test_memory_of_scoring_is_bounded(monkeypatch):
    """Bytes kept for the gradient, and the largest tensor made, at a vocabulary of 151,936: none is
    (B, T, V)."""
    V = 151_936
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    opened = transformers.LlamaForCausalLM(config).eval()
    model = vlm.VLM(opened, None, torch.zeros(V, dtype=torch.bool), [7])
    ids = torch.full((2, 3), 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens, mask = torch.randint(10, V, (2, 32)), torch.ones(2, 32, dtype=torch.bool)
    monkeypatch.setattr(vlm, "PIECE", 4 * V)
    piece_sizes, kept = [], []
    token_scores = vlm._token_scores

    def noted(head, hidden, *arguments):
        piece_sizes.append(len(hidden))
        return token_scores(head, hidden, *arguments)

    def keep(tensor):
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(vlm, "_token_scores", noted)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp, _ = vlm.score(model, inputs, tokens, mask)
    beside_the_head = [t.numel() for t in kept if t.dim() != 2 or t.shape[0] != V]
    assert max(beside_the_head) < 4 * V
    assert piece_sizes == [4] * 16
    logp.sum().backward()
    assert piece_sizes == [4] * 32  # each piece made once more


@pytest.mark.parametrize("family", SUPPORTED)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(open_family, family):
    def measured(gradient_checkpointing):
        model = open_family(family, gradient_checkpointing=gradient_checkpointing)
        _, inputs = encoded_prompts(model, family)
        torch.manual_seed(0)
        tokens, mask = vlm.generate(model, inputs, 8)
        critic = sapo.SegmentCritic(copy.deepcopy(model.model.base_model), model.hidden_size)
        (logp, _), of_policy = kept_bytes(lambda: vlm.score(model, inputs, tokens, mask))
        logp.sum().backward()
        _, of_critic = kept_bytes(lambda: vlm.prefix_values(critic, inputs, tokens, mask))
        torch.manual_seed(0)
        again, _ = vlm.generate(model, inputs, 8)
        assert torch.equal(tokens, again)  # generation still has its cache
        numbers = logp.detach(), model.model.get_input_embeddings().weight.grad
        return tokens, numbers, of_policy, of_critic

    plain_tokens, plain_numbers, plain_of_policy, plain_of_critic = measured(False)
    tokens, numbers, of_policy, of_critic = measured(True)
    assert torch.equal(tokens, plain_tokens)
    assert of_policy < 0.75 * plain_of_policy and of_critic < 0.75 * plain_of_critic
    close(numbers, plain_numbers, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["idefics3", "llava", "paligemma"])
def test_micro_batches_change_no_gradient(open_family, family):
    """One optimizer step on the whole minibatch and on one response at a time: the same weights."""
    model = open_family(family)
    _, inputs = encoded_prompts(model, family)
    torch.manual_seed(1)
    tokens, mask = vlm.generate(model, inputs, 10)
    mask = mask & (torch.arange(mask.shape[1]) < torch.tensor([10, 3, 7])[:, None])
    logp = vlm.score(model, inputs, tokens, mask)[0].detach()
    ends = sapo.entropy_ends(torch.rand(mask.shape), mask)
    rollout = sapo.Rollout(mask, ends, logp, torch.rand(mask.shape) * mask)
    advantages = torch.randn(mask.shape) * mask

    def weights_after(micro_batch):
        policy = replace(model, model=copy.deepcopy(model.model))
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        config = sapo.SAPOConfig(minibatch=3, micro_batch=micro_batch, max_grad_norm=1e9)

        def score(rows):
            return vlm.score(policy, vlm.take(inputs, rows), tokens[rows], mask[rows])

        sapo.sapo_update(rollout, advantages, None, score, None, (optimizer, None), config)
        return flat_weights(policy)

    whole = weights_after(0)
    assert (whole - flat_weights(model)).abs().max() > 1e-3
    for micro_batch in (1, 2):
        close(weights_after(micro_batch), whole, rtol=0, atol=1e-5)


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.model.parameters()])
