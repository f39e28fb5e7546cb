"""vlm.py and train.py on small random checkpoints of the families that people use, opened by path as a user would."""

import copy
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, build, can_open, without_videos
from PIL import Image

import data
import env
import sapo
import train
import vlm

PICTURES = {"paligemma": (1, 2, 1)}  # of each prompt; PaliGemma takes no prompt without one
PROMPTS, SYSTEM = ["Sum the dice.", "What is 2?", "Follow 3 arrows: which cell, 金?"], "Think, then answer."
OPENABLE = [name for name in FAMILIES if name != "paligemma2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    def folder(family):
        made[family] = made.get(family) or build(family, tmp_path_factory.mktemp(family))
        return made[family]
    return folder


def opened(monkeypatch, folders, family, **kwargs):
    """As vlm.load opens it; without torchvision a Qwen-VL loses its video half, which nothing here uses."""
    if not can_open(family):
        if family == "smolvlm2":
            pytest.skip("the processor of SmolVLM2 needs torchvision and num2words, which are not installed")
        monkeypatch.setattr(vlm, "AutoProcessor", SimpleNamespace(from_pretrained=without_videos))
    return vlm.load(folders(family), **kwargs)


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def prompts(model, family):
    images = [[picture(10 * i + j, ((40, 90), (64, 48), (33, 33))[j]) for j in range(n)]
              for i, n in enumerate(PICTURES.get(family, (1, 2, 0)))]
    return images, vlm.encode(model, PROMPTS, images, SYSTEM)


@pytest.mark.parametrize("family", OPENABLE)
def test_pictures_stay_with_their_rows(monkeypatch, folders, family):
    """A row in a batch of one, two and no pictures scores as it does alone, in any selection and order."""
    model = opened(monkeypatch, folders, family)
    images, inputs = prompts(model, family)
    filled = inputs["input_ids"][inputs["attention_mask"] == 0]
    assert len(filled) and set(filled.tolist()) == {model.eos_ids[0]}
    assert "labels" not in inputs  # PaliGemma's processor makes some
    torch.manual_seed(0)
    tokens, mask = vlm.generate(model, inputs, 9)
    singly = [vlm.encode(model, [prompt], [of], SYSTEM) for prompt, of in zip(PROMPTS, images, strict=True)]
    alone = torch.cat([vlm.score(model, x, tokens[i:i + 1], mask[i:i + 1])[0] for i, x in enumerate(singly)])
    for rows in ([0, 1, 2], [2, 0], [1, 1, 2, 0], [2], [1]):
        found, _ = vlm.score(model, vlm.take(inputs, torch.tensor(rows)), tokens[rows], mask[rows])
        torch.testing.assert_close(found, alone[rows], rtol=0, atol=1e-4)
    parts = vlm.in_parts(lambda *x: vlm.score(model, *x), 2, inputs, tokens, mask)[0]
    torch.testing.assert_close(parts, alone, rtol=0, atol=1e-4)
    other = vlm.encode(model, PROMPTS, [[picture(99, (40, 90)), *x[1:]] if x else x for x in images], SYSTEM)
    changed = (vlm.score(model, other, tokens, mask)[0] - alone).abs().amax(1) > 1e-3
    assert changed.tolist() == [len(x) > 0 for x in images]  # the picture matters, to its own row alone


@pytest.mark.parametrize("family", OPENABLE)
def test_what_is_sampled_is_what_is_scored(monkeypatch, folders, family):
    model = opened(monkeypatch, folders, family)
    inputs = prompts(model, family)[1]
    torch.manual_seed(0)
    tokens, mask, logp = vlm.generate(model, inputs, 12, 0.8, return_logp=True)
    scored, _ = vlm.score(model, inputs, tokens, mask, 0.8)
    torch.testing.assert_close(scored, logp, rtol=0, atol=1e-4)
    lengths = torch.tensor([4, 0, 2])  # and what was written may become a part of the prompt
    longer = vlm.extended(inputs, tokens, lengths)
    rest, kept, again = vlm.generate(model, longer, 6, return_logp=True)
    torch.testing.assert_close(vlm.score(model, longer, rest, kept)[0], again, rtol=0, atol=1e-4)
    noised = vlm.score(model, vlm.noised(inputs), tokens, mask, 0.8)[0]
    assert ((noised - scored).abs().amax(1) > 1e-3).tolist() == [n > 0 for n in PICTURES.get(family, (1, 2, 0))]


def test_the_system_turn_reaches_the_prompt(monkeypatch, folders):
    for family in ("idefics3", "llava", "paligemma"):
        model = opened(monkeypatch, folders, family)
        inputs = vlm.encode(model, ["How many?"], [picture(0, (32, 32))], "Be brief.")
        text = model.tokenizer.decode(inputs["input_ids"][0])
        assert text.index("Be brief.") < text.index("How many?"), text
        if model.tokenizer.bos_token:
            assert text.count(model.tokenizer.bos_token) == 1


def test_a_template_without_a_system_role_gets_it_in_the_user_turn(monkeypatch, folders):
    model = opened(monkeypatch, folders, "llava")
    model.processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "USER: <image>\n{{ messages[0]['content'][-1]['text'] }} ASSISTANT:")
    text = model.tokenizer.decode(vlm.encode(model, ["How many?"], [picture(0, (32, 32))], "Be brief.")["input_ids"][0])
    assert "Be brief.\n\nHow many? ASSISTANT:" in text


def test_logits_behind_a_cap_are_refused(folders):
    head = vlm.transformers.AutoModelForImageTextToText.from_pretrained(folders("paligemma2"))
    with torch.no_grad():
        ids = torch.tensor([[5]])
        capped = not torch.equal(head(input_ids=ids).logits, head.lm_head(head.model(input_ids=ids).last_hidden_state))
    if not capped:
        pytest.skip("this version of transformers does not cap PaliGemma2's logits")
    head.get_output_embeddings().weight.data.mul_(20)  # random logits are too small to feel the cap
    head.save_pretrained(folders("paligemma2"))
    with pytest.raises(ValueError, match="capped"):
        vlm.load(folders("paligemma2"))


# ------------------------------------------------------------------------------------------------ memory and precision
def gradient(model, inputs, tokens, mask):
    model.model.zero_grad()
    logp, entropy = vlm.score(model, inputs, tokens, mask)
    logp.square().mean().backward()
    return logp.detach(), entropy, {k: p.grad.clone() for k, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["idefics3", "llava", "paligemma"])
def test_the_head_in_pieces_changes_no_number(monkeypatch, folders, family):
    model = opened(monkeypatch, folders, family)
    inputs = prompts(model, family)[1]
    tokens, mask = vlm.generate(model, inputs, 12)
    mask = mask & (torch.arange(mask.shape[1]) < torch.tensor([9, 4, 7])[:, None])
    whole = gradient(model, inputs, tokens, mask)
    monkeypatch.setattr(vlm, "PIECE", 3 * len(model.banned))
    for a, b in zip(whole, gradient(model, inputs, tokens, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_memory_of_scoring_is_bounded(monkeypatch):
    """Bytes kept for the gradient, and the largest tensor made, at a vocabulary of 151,936: none is (B, T, V)."""
    V, seen = 151_936, []
    config = vlm.transformers.LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                          num_attention_heads=1, num_key_value_heads=1)
    model = vlm.VLM(vlm.transformers.LlamaForCausalLM(config).eval(), None, torch.zeros(V, dtype=torch.bool), [7])
    inputs = {"input_ids": torch.full((2, 3), 9), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    tokens, mask = torch.randint(10, V, (2, 32)), torch.ones(2, 32, dtype=torch.bool)
    monkeypatch.setattr(vlm, "PIECE", 4 * V)
    head = vlm._head
    monkeypatch.setattr(vlm, "_head", lambda *x: seen.append(len(x[1])) or head(*x))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logp, _ = vlm.score(model, inputs, tokens, mask)
    assert max(x.numel() for x in kept if x.dim() != 2 or x.shape[0] != V) < 4 * V  # but for the head's own weights
    assert seen == [4] * 16
    logp.sum().backward()
    assert seen == [4] * 32  # each piece made once more


@pytest.mark.parametrize("family", OPENABLE)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(monkeypatch, folders, family):
    found = []
    for on in (False, True):
        model = opened(monkeypatch, folders, family, gradient_checkpointing=on)
        inputs, kept = prompts(model, family)[1], []
        torch.manual_seed(0)
        tokens, mask = vlm.generate(model, inputs, 8)
        critic, of_critic = sapo.SegmentCritic(copy.deepcopy(model.model.base_model), model.hidden_size), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):  # noqa: B023
            logp, _ = vlm.score(model, inputs, tokens, mask)
        logp.sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: of_critic.append(x.nbytes) or x, lambda x: x):  # noqa: B023
            vlm.prefix_values(critic, inputs, tokens, mask)
        found.append((tokens, logp.detach(), model.model.get_input_embeddings().weight.grad, sum(kept), sum(of_critic)))
        torch.manual_seed(0)
        assert torch.equal(tokens, vlm.generate(model, inputs, 8)[0])  # generation still has its cache
    (tokens, logp, grad, *bytes_plain), (*same, bytes_kept, bytes_of_critic) = found
    assert torch.equal(tokens, same[0]) and bytes_kept < 0.75 * bytes_plain[0]
    assert bytes_of_critic < 0.75 * bytes_plain[1]
    torch.testing.assert_close((logp, grad), tuple(same[1:]), rtol=0, atol=1e-6)


def test_bfloat16_weights_learn_through_float32_copies():
    torch.manual_seed(0)
    half, full = (torch.nn.Linear(4, 1, bias=False, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    full.weight.data.copy_(half.weight.data)
    optimizers = [vlm.adam(x.parameters(), 1e-5) for x in (half, full)]
    start = half.weight.detach().float().clone()
    for _ in range(200):
        for layer, optimizer in zip((half, full), optimizers, strict=True):
            for part in (3.0, -1.0):  # two micro-batches, whose sum points the other way than the second
                layer(torch.full((1, 4), part, dtype=layer.weight.dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    moved = half.weight.detach().float() - start
    assert (moved < -1.5e-3).all()  # 200 steps of 1e-5, each far below what bfloat16 can hold
    torch.testing.assert_close(half.weight.detach(), full.weight.detach().bfloat16())


@pytest.mark.parametrize("family", ["idefics3", "llava", "paligemma"])
def test_micro_batches_change_no_gradient(monkeypatch, folders, family):
    """One optimizer step on the whole minibatch and on one response at a time: the same weights."""
    model = opened(monkeypatch, folders, family)
    inputs = prompts(model, family)[1]
    torch.manual_seed(1)
    tokens, mask = vlm.generate(model, inputs, 10)
    mask = mask & (torch.arange(mask.shape[1]) < torch.tensor([10, 3, 7])[:, None])
    logp = vlm.score(model, inputs, tokens, mask)[0].detach()
    rollout = sapo.Rollout(mask, sapo.entropy_ends(torch.rand(mask.shape), mask), logp, torch.rand(mask.shape) * mask,
                           advantages=torch.randn(mask.shape) * mask)
    found = []
    for micro_batch in (0, 1, 2):
        policy = vlm.replace(model, model=copy.deepcopy(model.model))
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        config = sapo.SAPOConfig(minibatch=3, micro_batch=micro_batch, max_grad_norm=1e9)
        score = lambda rows, policy=policy: vlm.score(policy, vlm.take(inputs, rows), tokens[rows], mask[rows])
        sapo.sapo_update(rollout, score, None, optimizer, None, config)
        found.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert (found[0] - torch.cat([p.detach().flatten() for p in model.model.parameters()])).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- one backbone, three views
@pytest.mark.parametrize("family", OPENABLE)
def test_lora_is_one_backbone_and_three_views(monkeypatch, folders, family):
    pytest.importorskip("peft", reason="LoRA needs peft")
    model = opened(monkeypatch, folders, family, dtype="bfloat16")
    inputs = prompts(model, family)[1]
    tokens, mask = vlm.generate(model, inputs, 6)
    base, before = vlm.score(model, inputs, tokens, mask)[0].detach(), sum(p.numel() for p in model.model.parameters())
    policy, critic, reference = vlm.lora(model, 4)
    assert policy.model is critic.model is reference.model is model.model
    added = {name: p for name, p in model.model.named_parameters() if "lora_" in name}
    assert sum(p.numel() for p in model.model.parameters()) == before + sum(p.numel() for p in added.values())
    assert all(p.dtype == torch.float32 for p in added.values())
    assert not [name for name in added if "vision" in name or "visual" in name]
    assert torch.equal(vlm.score(policy, inputs, tokens, mask)[0].detach(), base)  # a fresh adapter adds nothing

    value = sapo.SegmentCritic(vlm.Backbone(critic), model.model.config.get_text_config().hidden_size)
    optimizers = [vlm.adam([p for p in policy.enter().parameters() if p.requires_grad], 1e-2),
                  vlm.adam(value.parameters(), 1e-2)]
    half = sum(p.numel() for p in added.values()) // 2
    assert [sum(p.numel() for p in x.param_groups[0]["params"]) for x in optimizers] == [
        half, half + value.head.weight.numel() + 1]
    torch.nn.init.ones_(value.head.weight)
    frozen = {name: p.detach().clone() for name, p in model.model.named_parameters() if name not in added}
    losses = (lambda: vlm.score(policy, inputs, tokens, mask)[0].sum(),
              lambda: vlm.prefix_values(value, inputs, tokens, mask).sum())
    for _ in range(2):
        for optimizer, loss in zip(optimizers, losses, strict=True):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    for view, moved in ((policy, True), (critic, True), (reference, False)):
        found = vlm.score(view, inputs, tokens, mask)[0].detach()
        assert torch.equal(found, base) != moved
    assert all(torch.equal(p, frozen[name]) for name, p in model.model.named_parameters() if name in frozen)
    assert set(value.state_dict()) == {"head.weight", "head.bias"} | {
        name for name in value.state_dict() if name.startswith("backbone.adapter.")}


def test_a_shared_critic_is_a_head_alone(monkeypatch, folders):
    model = opened(monkeypatch, folders, "llava")
    critic = sapo.SegmentCritic(vlm.Backbone(model), 48)
    inputs = prompts(model, "llava")[1]
    tokens, mask = vlm.generate(model, inputs, 6)
    assert sum(p.numel() for p in critic.parameters()) == 49
    torch.nn.init.ones_(critic.head.weight)
    values = vlm.prefix_values(critic, inputs, tokens, mask)
    own = sapo.SegmentCritic(model.model.base_model, 48)
    own.load_state_dict({**own.state_dict(), "head.weight": critic.head.weight})
    torch.testing.assert_close(values, vlm.prefix_values(own, inputs, tokens, mask), rtol=0, atol=1e-5)
    values.sum().backward()
    assert critic.head.weight.grad is not None and all(p.grad is None for p in model.model.parameters())


def test_lora_without_peft_says_what_to_install(monkeypatch, folders):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        vlm.lora(opened(monkeypatch, folders, "llava"), 4)


# ------------------------------------------------------------------------------------------ train.py on data, as a user
@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Twenty of our drawings in the layout of hiyouga/geometry3k."""
    datasets = pytest.importorskip("datasets", reason="SAPO/Dataset-v0 needs datasets")
    examples = [env.DiceSum(n=2).example_at(i) for i in range(20)]
    rows = {"images": [[e.image] for e in examples], "problem": [f"<image>{e.question}" for e in examples],
            "answer": [e.answer for e in examples]}
    features = datasets.Features({"images": datasets.Sequence(datasets.Image()), "problem": datasets.Value("string"),
                                  "answer": datasets.Value("string")})
    path = tmp_path_factory.mktemp("data") / "geo3k.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))
    return path


def flags(folder, parquet, runs, *more):
    return ["--model", str(folder), "--env", "SAPO/Dataset-v0", "--env_args", f"path={parquet}", "--batch", "4",
            "--minibatch", "4", "--micro-batch", "2", "--max-new-tokens", "10", "--iterations", "2",
            "--eval_every", "1", "--eval_episodes", "2", "--runs", str(runs), *more]


@pytest.fixture
def earnings(monkeypatch):
    """A reward that random weights can earn: of any two responses about one does."""
    replay = train.replay

    def paid(envs, texts, ends, mask):
        rewards, used, infos = replay(envs, texts, ends, mask)
        for row, pieces in enumerate(texts):
            rewards[row, len(pieces) - 1] += zlib.crc32("".join(pieces).encode()) % 2
        return rewards, used, infos
    monkeypatch.setattr(train, "replay", paid)


def trained(run_folder):
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(len(rows)))
    assert all(np.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    return rows, torch.load(run_folder / "checkpoint" / "trainer.pt", weights_only=True)


@pytest.mark.parametrize("family", OPENABLE)
def test_every_family_trains_through_the_same_flags(monkeypatch, folders, parquet, tmp_path, earnings, family):
    model = opened(monkeypatch, folders, family)
    argv = flags(folders(family), parquet, tmp_path, "--name", family, "--actor_lr", "1e-3", "--eval_episodes", "99",
                 "--env_args", f"path={parquet}", "style=boxed")
    if family == "idefics3":  # the whole command once; its last evaluations and pictures know no family
        train.main(argv)
        assert {"learning_curve.png", "credit.html", "summary.json"} <= {x.name for x in (tmp_path / family).iterdir()}
        summary = json.loads((tmp_path / family / "summary.json").read_text())  # never more than there are rows
        held_out = train.make_env(train.parse(argv)[0]).unwrapped.task.size("eval")
        assert summary["eval_episodes"] == held_out < 20
    else:
        train.train(train.build(*train.parse(argv)))
    rows, _ = trained(tmp_path / family)
    assert len(rows) == 3 and rows[-1]["response_tokens"] > 0
    after = vlm.load(tmp_path / family / "checkpoint").model.state_dict()
    assert any(not torch.equal(x, after[name]) for name, x in model.model.state_dict().items())
    sample = json.loads((tmp_path / family / "samples.jsonl").read_text().splitlines()[0])
    assert sample["image"] and "<image>" not in sample["prompt"] and sample["steps"] == []


@pytest.mark.parametrize("style, stop", [("boxed", None), ("tags", train.STOP)])
def test_a_style_asks_in_a_system_turn_and_knows_its_end(monkeypatch, folders, parquet, tmp_path, style, stop):
    run = train.build(*train.parse(flags(folders("llava"), parquet, tmp_path, "--method", "grpo", "--group", "2",
                                         "--env_args", f"path={parquet}", f"style={style}")))
    _, inputs = train.ask(run, [0], "train")
    words = "".join(run.policy.tokenizer.batch_decode(inputs["input_ids"][0][:, None]))
    assert words.count(data.STYLES[style].split()[-1]) and words.index(data.STYLES[style][:12]) < words.index("Sum the")
    generate, stops = vlm.generate, []
    monkeypatch.setattr(vlm, "generate", lambda *args: stops.append(args[-1]) or generate(*args))
    train.write(run, inputs, 1.0)
    assert stops == [stop]


@pytest.mark.parametrize("more", ["--lora 4 --dtype bfloat16 --kl_coef 0.01 --gradient_checkpointing",
                                  "--critic shared", "--dtype bfloat16", "--method grpo --group 2"])
def test_a_resumed_run_ends_where_an_uncut_one_does(monkeypatch, folders, parquet, tmp_path, earnings, more):
    more = more.split()
    if "--lora" in more:
        pytest.importorskip("peft", reason="LoRA needs peft")
    rate = ["--actor_lr", "1e-3", "--critic_lr", "1e-3"]
    whole, cut = (flags(folders("llava"), parquet, tmp_path, *rate, *more, "--name", name) for name in ("whole", "cut"))
    for argv in (whole, [*cut, "--iterations", "1"], ["--resume", str(tmp_path / "cut"), "--iterations", "2"]):
        train.train(train.build(*train.parse(argv)))
    (whole, a), (cut, b) = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    strip = lambda rows: [{k: x for k, x in row.items() if k != "seconds"} for row in rows]
    assert strip(whole) == strip(cut)
    torch.testing.assert_close((a["actor_optimizer"]["state"], a["critic"] or {}, a["weights"]),
                               (b["actor_optimizer"]["state"], b["critic"] or {}, b["weights"]), rtol=0, atol=0)
    assert bool(a["weights"]) == ("bfloat16" in more) and whole[1]["policy_grad_norm"] > 0
    if "--lora" in more:
        assert (tmp_path / "cut" / "checkpoint" / "adapter_config.json").is_file()


def test_out_of_memory_is_one_line_with_what_to_lower(monkeypatch, folders, parquet, tmp_path):
    monkeypatch.setattr(sapo, "credit", lambda *_: torch.empty(2**60))  # a real refusal of the allocator
    with pytest.raises(SystemExit) as left:
        train.main(flags(folders("llava"), parquet, tmp_path, "--name", "large"))
    said = str(left.value)
    assert "\n" not in said and "allocate memory" in said and "--micro_batch to 1 or less" in said
    assert all(x in said for x in ("GiB", "--max_new_tokens", "--lora", f"--resume {tmp_path / 'large'}"))
    monkeypatch.setattr(sapo, "credit", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # any other error keeps its trace
        train.main(flags(folders("llava"), parquet, tmp_path, "--name", "other"))
