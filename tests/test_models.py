"""models.py: policy, critic and reference as copies or as views of one backbone, and their Adam."""

import copy
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import SUPPORTED, encoded_prompts
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from small_runs import equal

import models
import sapo
import tiny
import train
import vlm

close = torch.testing.assert_close


def responses(model, family):
    """(inputs, tokens, mask): a few tokens that the model itself wrote to a family's prompts."""
    _, inputs = encoded_prompts(model, family)
    return inputs, *vlm.generate(model, inputs, 6)


def parameter_count(parameters):
    return sum(parameter.numel() for parameter in parameters)


# ------------------------------------------------------------ LoRA: one backbone, three views


@pytest.fixture
def views(open_family):
    """A function: family -> (its plain log-probabilities, LoRA's three views, responses)."""
    pytest.importorskip("peft", reason="LoRA needs peft")

    def made(family):
        model = open_family(family, dtype="bfloat16")
        answers = responses(model, family)
        logp = vlm.score(model, *answers)[0].detach()
        return logp, models.lora(model, 4), answers

    return made


def adapters_of(view):
    return {name: p for name, p in view.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("family", SUPPORTED)
def test_lora_is_one_backbone_and_three_views(open_family, family):
    pytest.importorskip("peft", reason="LoRA needs peft")
    model = open_family(family, dtype="bfloat16")
    count = parameter_count(model.model.parameters())
    policy, critic, reference = models.lora(model, 4)
    assert policy.model is critic.model is reference.model is model.model
    adapters = adapters_of(policy)
    assert parameter_count(model.model.parameters()) == count + parameter_count(adapters.values())
    assert all(p.dtype == torch.bfloat16 for p in adapters.values())  # Adam has float32 copies
    assert not [name for name in adapters if "vision" in name or "visual" in name]


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_fresh_adapter_adds_nothing(views, family):
    logp, of_one_backbone, answers = views(family)
    for view in of_one_backbone:
        assert torch.equal(vlm.score(view, *answers)[0].detach(), logp)


@pytest.mark.parametrize("family", SUPPORTED)
def test_policy_and_critic_train_an_adapter_each_and_nothing_else(views, family):
    logp, (policy, critic, reference), answers = views(family)
    value = sapo.SegmentCritic(models.Backbone(critic), policy.hidden_size)
    optimizers = [
        models.Adam([p for p in policy.enter().parameters() if p.requires_grad], 1e-2),
        models.Adam(value.parameters(), 1e-2),
    ]
    adapters = adapters_of(policy)
    half = parameter_count(adapters.values()) // 2
    head = value.head.weight.numel() + 1
    trained = [parameter_count(o.param_groups[0]["params"]) for o in optimizers]
    assert trained == [half, half + head]

    torch.nn.init.ones_(value.head.weight)
    frozen = {}
    for name, parameter in policy.model.named_parameters():
        if name not in adapters:
            frozen[name] = parameter.detach().clone()

    def policy_loss():
        return vlm.score(policy, *answers)[0].sum()

    def value_loss():
        return vlm.prefix_values(value, *answers).sum()

    for _ in range(2):
        for optimizer, loss in zip(optimizers, (policy_loss, value_loss), strict=True):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    for view in (policy, critic):
        assert not torch.equal(vlm.score(view, *answers)[0].detach(), logp)
    assert torch.equal(vlm.score(reference, *answers)[0].detach(), logp)
    now = dict(policy.model.named_parameters())
    assert all(torch.equal(now[name], parameter) for name, parameter in frozen.items())


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_critic_on_a_view_saves_its_adapter_and_its_head_alone(views, family):
    _, (_, critic, _), _ = views(family)
    value = sapo.SegmentCritic(models.Backbone(critic), critic.hidden_size)
    names = set(value.state_dict())
    assert {"head.weight", "head.bias"} < names
    others = names - {"head.weight", "head.bias"}
    assert others and all(name.startswith("backbone.adapter.") for name in others)


def test_loras_adapters_are_scaled_by_two(open_family):
    """alpha over rank, with alpha = 2 rank."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    policy, _, _ = models.lora(open_family("llava"), 4)
    scalings = [m.scaling for m in policy.model.modules() if hasattr(m, "lora_A")]
    assert scalings and all(s == {"policy": 2, "critic": 2} for s in scalings)


def test_transformers_takes_every_peft_within_our_bounds():
    """It refuses one that is too old; and all pages that say what to install say the same."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION

    root = Path(models.__file__).parent
    bounds = {
        found
        for file in ("requirements.txt", "docs/models.md", ".ci/run")
        for found in re.findall(r"peft(>=[\d.]+,<[\d.]+)", (root / file).read_text())
    }
    assert len(bounds) == 1
    allowed = SpecifierSet(bounds.pop())
    assert version("peft") in allowed
    oldest = next(bound.version for bound in allowed if bound.operator == ">=")
    assert Version(oldest) >= Version(MIN_PEFT_VERSION)


def test_lora_without_peft_says_what_to_install(monkeypatch, open_family):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        models.lora(open_family("llava"), 4)


def test_a_shared_critic_is_a_head_alone(open_family):
    model = open_family("llava")
    critic = sapo.SegmentCritic(models.Backbone(model), 48)
    answers = responses(model, "llava")
    assert parameter_count(critic.parameters()) == 49
    torch.nn.init.ones_(critic.head.weight)
    values = vlm.prefix_values(critic, *answers)
    own = sapo.SegmentCritic(model.model.base_model, 48)
    own.load_state_dict({**own.state_dict(), "head.weight": critic.head.weight})
    close(values, vlm.prefix_values(own, *answers), rtol=0, atol=1e-5)
    values.sum().backward()
    assert critic.head.weight.grad is not None
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_fingerprint_is_of_the_weights_in_any_dtype_with_or_without_adapters(open_family, family):
    pytest.importorskip("peft", reason="LoRA needs peft")
    narrow = open_family(family, dtype="bfloat16")
    found = models.fingerprint(narrow)
    wide = open_family(family, dtype="float32")
    assert models.fingerprint(wide) == found
    models.lora(wide, 4)
    assert models.fingerprint(wide) == found
    last = [parameter for name, parameter in narrow.model.named_parameters()][-1]
    last.data += 0.5
    assert models.fingerprint(narrow) != found


# --------------------------------------------------------------------------------------- Adam


def test_bfloat16_weights_learn_through_float32_copies():
    torch.manual_seed(0)
    half = torch.nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    full = torch.nn.Linear(4, 1, bias=False, dtype=torch.float32)
    full.weight.data.copy_(half.weight.data)
    start = half.weight.detach().float().clone()
    layers = (half, full)
    optimizers = [models.Adam(layer.parameters(), 1e-5) for layer in layers]
    for _ in range(200):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            for part in (3.0, -1.0):  # two micro-batches; their sum points against the second
                layer(torch.full((1, 4), part, dtype=layer.weight.dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    moved = half.weight.detach().float() - start
    assert (moved < -1.5e-3).all()  # 200 steps of 1e-5, each far below what bfloat16 can hold
    close(half.weight.detach(), full.weight.detach().bfloat16())


def test_what_is_restored_into_the_copies_reaches_the_weights():
    layer = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    optimizer = models.Adam(layer.parameters(), 1e-3)
    for float_copy in optimizer.param_groups[0]["params"]:
        float_copy.data.fill_(0.5)
    optimizer.write_back()
    assert all((parameter == 0.5).all() for parameter in layer.parameters())


def test_float32_weights_are_moved_themselves():
    layer = torch.nn.Linear(2, 1)
    optimizer = models.Adam(layer.parameters(), 1e-3)
    parameters = optimizer.param_groups[0]["params"]
    assert parameters[0] is layer.weight and parameters[1] is layer.bias


def test_a_gradient_that_is_noise_hardly_moves_a_weight():
    """Adam divides a gradient by its own size, and would make a full step of any."""
    weights = {gradient: torch.nn.Parameter(torch.zeros(1)) for gradient in (1e-8, 1.0)}
    for gradient, weight in weights.items():
        optimizer = models.Adam([weight], 1e-3)
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    assert abs(weights[1e-8].item()) < 1e-5
    assert weights[1.0].item() == pytest.approx(-1e-3, rel=1e-3)


# ------------------------------------------------------------------------ the models of a run


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.build_tiny(tmp_path_factory.mktemp("start"), 16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Another policy, as a checkpoint of a run holds it."""
    return tiny.build_tiny(tmp_path_factory.mktemp("stored"), 16, seed=1)


def build(start, stored=None, kl_coef=0.0, **changes):
    settings = {"lora": 0, "critic": "separate", "credit": "critic", "device": "cpu"}
    settings |= {"dtype": "float32", "gradient_checkpointing": False, "critic_hears": "logp"}
    config = sapo.SAPOConfig(kl_coef=kl_coef)
    return models.build(SimpleNamespace(**settings | changes), config, start, stored)


def weights(folder):
    return vlm.load(folder).model.state_dict()


def test_the_critic_begins_as_a_copy_of_the_policy_and_values_nothing(start):
    made = build(start)
    backbone = made.policy.model.base_model
    assert equal(dict(made.critic.backbone.state_dict()), dict(backbone.state_dict()))
    assert made.critic.backbone is not backbone and not made.critic.head.weight.any()
    assert made.critic.per_nat == 0
    own = set(made.critic.parameters())
    assert own.isdisjoint(made.policy.model.parameters())
    assert made.reference is None


def test_policy_and_critic_learn_at_their_own_rates(start):
    made = build(start)
    config = sapo.SAPOConfig()
    assert config.actor_lr != config.critic_lr
    assert made.actor_optimizer.param_groups[0]["lr"] == config.actor_lr
    assert made.critic_optimizer.param_groups[0]["lr"] == config.critic_lr


def test_a_reference_is_made_only_for_a_kl_penalty(start):
    made = build(start, kl_coef=0.1)
    assert made.reference.model is not made.policy.model
    assert equal(made.reference.model.state_dict(), weights(start))


def test_a_stored_policy_goes_on_and_the_start_stays_the_reference(start, stored):
    made = build(start, stored, kl_coef=0.1)
    assert equal(made.policy.model.state_dict(), weights(stored))
    assert equal(made.reference.model.state_dict(), weights(start))


@pytest.mark.parametrize("credit", ["group", "tree", "continuations", "roles"])
def test_only_the_critics_credit_has_a_critic(start, credit):
    made = build(start, credit=credit)
    assert made.critic is None and made.critic_optimizer is None
    trained = models.trained_parameters(made)
    assert len(trained) == len(list(made.policy.model.parameters()))
    assert all(a is b for a, b in zip(trained, made.policy.model.parameters(), strict=True))


def test_a_shared_critic_adds_a_head_to_what_is_trained(start):
    made = build(start, critic="shared")
    trained, head = models.trained_parameters(made), made.critic.head
    policy = list(made.policy.model.parameters())
    own = trained[len(policy) :]
    assert len(own) == 3 and {*own} == {head.weight, head.bias, made.critic.per_nat}


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize(("critic_hears", "hears"), [("nothing", False), ("logp", True)])
def test_the_critic_hears_what_the_settings_say(start, critic, critic_hears, hears):
    made = build(start, critic=critic, critic_hears=critic_hears)
    assert made.critic.hears is hears
    names = {name for name, _ in made.critic.named_parameters()}
    assert ("per_nat" in names) is hears
    if hears:
        per_nat = made.critic.per_nat
        assert any(p is per_nat for p in made.critic_optimizer.param_groups[0]["params"])


def test_with_lora_the_backbone_is_the_start_and_the_reference_a_view_of_it(start, stored):
    pytest.importorskip("peft", reason="LoRA needs peft")
    made = build(start, stored, kl_coef=0.1, lora=2)
    assert made.reference.model is made.policy.model and made.reference.adapter == "none"
    plain = weights(start)
    for name, parameter in made.policy.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")])
    count = parameter_count(models.trained_parameters(made))
    head = made.policy.hidden_size + 2  # the bias, and what a nat is worth
    assert count == parameter_count(adapters_of(made.policy).values()) + head
    assert build(start, lora=2).reference is None  # without a KL penalty it serves no one


def test_with_lora_no_parameter_is_both_the_policys_and_the_critics(start):
    pytest.importorskip("peft", reason="LoRA needs peft")
    made = build(start, lora=2)
    optimizers = (made.actor_optimizer, made.critic_optimizer)
    actor, critic = (set(optimizer.param_groups[0]["params"]) for optimizer in optimizers)
    assert len(actor) > 2 and len(critic) > 2 and actor.isdisjoint(critic)


def test_under_bfloat16_the_trained_parameters_are_float32_copies(start):
    made = build(start, dtype="bfloat16")
    policy = list(made.policy.model.parameters())
    copies = models.trained_parameters(made)[: len(policy)]
    for parameter, float_copy in zip(policy, copies, strict=True):
        assert parameter.dtype == torch.bfloat16 and float_copy.dtype == torch.float32
        assert torch.equal(parameter, float_copy.bfloat16())


# ------------------------------------------------------------------------------ out of memory


@pytest.fixture
def large():
    """A policy and a reference of 1 GiB each, which take no memory; the policy is trained."""
    policy, reference = (torch.nn.Linear(2**15, 2**13, bias=False, device="meta") for _ in range(2))
    optimizer = torch.optim.Adam(policy.parameters())
    return models.Models(
        policy=SimpleNamespace(model=policy),
        critic=None,
        reference=SimpleNamespace(model=reference),
        actor_optimizer=optimizer,
        critic_optimizer=None,
    )


def said_of(made, error):
    settings = SimpleNamespace(device="cpu", batch=8, generate_batch=0)
    config = sapo.SAPOConfig(micro_batch=2)
    return models.explain_out_of_memory(made, settings, config, error)


def test_out_of_memory_counts_weights_gradients_and_adams_moments(large):
    """1 GiB of reference; of the policy the weights, their gradient and two moments."""
    assert "Adam take 5.00" in said_of(large, RuntimeError("can't allocate memory"))


def test_out_of_memory_counts_a_shared_backbone_once(large):
    shared = copy.copy(large)
    shared.reference = shared.policy
    assert "Adam take 4.00" in said_of(shared, torch.OutOfMemoryError("CUDA out of memory"))


def test_out_of_memory_is_one_line_with_what_to_lower(large):
    said = said_of(large, RuntimeError("can't allocate memory: you tried\nat line 7"))
    assert "\n" not in said and "you tried" in said
    assert "--micro_batch to 1 or less" in said and "(8 are written at once)" in said
    assert "responses were scored or learned from" in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
        MemoryError("Unable to allocate 8.00 EiB for an array"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_way_to_say_that_memory_ran_out_is_known(large, error):
    said = said_of(large, error)
    assert "\n" not in said and (str(error).splitlines() or ["MemoryError"])[0] in said


def test_the_peak_is_that_of_the_runs_own_card(large, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda card: asked.append(card) or 0)
    settings = SimpleNamespace(device="cuda:1", batch=8, generate_batch=0)
    config, error = sapo.SAPOConfig(), MemoryError()
    models.explain_out_of_memory(large, settings, config, error)
    assert asked == ["cuda:1"]


def test_an_error_that_is_not_about_memory_is_raised_again(large):
    error = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        said_of(large, error)
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_before_any_work_is_one_line_too(monkeypatch, tmp_path, error):
    def refused(*_):
        raise error

    monkeypatch.setattr(models, "build", refused)
    with pytest.raises(SystemExit) as caught:
        train.main(["--warm_start_steps", "1", "--batch", "8", "--runs", str(tmp_path)])
    said = str(caught.value)
    assert "\n" not in said and str(error) in said
    assert "out of memory before training began: --model tiny" in said and "--lora 16" in said


def test_the_peak_of_memory_is_in_megabytes():
    assert 50 < models.peak_megabytes() < 100_000
