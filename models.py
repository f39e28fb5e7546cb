"""The models of a run: policy, critic and reference, with the optimizers that train them.

Policy and reference are language models (`vlm.VLM`); the critic is a `sapo.SegmentCritic`. There
are three ways to make them:

    (default)          a model each: the critic starts as a copy of the policy's backbone
    --critic shared    the critic is a head on the policy's backbone, and trains the head alone
    --lora RANK        one frozen backbone in memory; policy and critic each train an adapter on it,
                       and the backbone without an adapter is the reference

`trained_parameters` are what the optimizers move; `explain_out_of_memory` says where memory went.
"""

import contextlib
import copy
import hashlib
import inspect
import resource
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import vlm
from sapo import SAPOConfig, SegmentCritic
from vlm import VLM

# --------------------------------------------------------------- policy, critic and reference


@dataclass
class Models:
    """What a run computes with."""

    policy: VLM
    """writes the responses; the model that is trained and saved"""
    critic: SegmentCritic | None
    """values every prefix of a response; None where the method's credit needs no critic"""
    reference: VLM | None
    """the model that the policy is kept close to by a KL penalty; None without one (kl_coef 0)"""
    actor_optimizer: "Adam"
    """moves the policy's trainable parameters"""
    critic_optimizer: "Adam | None"
    """moves the critic's; None where there is no critic"""


def build(settings, config: SAPOConfig, start: str | Path, stored: Path | None = None) -> Models:
    """Make the models of a run.

    settings: train.Settings; lora, critic, critic_hears, credit, device, dtype and
        gradient_checkpointing count.
    config: kl_coef, actor_lr and critic_lr count.
    start: the checkpoint that training begins from. It is also the reference, and with LoRA the
        frozen backbone.
    stored: a saved policy to go on from, in place of `start`. With LoRA it is not read here: its
        weights are the adapters, which the caller restores (checkpoint.restore).

    A new critic's head draws from torch's global random stream, as LoRA's adapters do.
    """

    def opened(name):
        with named_by_its_flag():
            return vlm.load(name, settings.device, settings.dtype, settings.gradient_checkpointing)

    if settings.lora:
        policy, critic_view, reference = lora(opened(start), settings.lora)
        if not config.kl_coef:
            reference = None
    else:
        policy = opened(stored or start)
        reference = opened(start) if config.kl_coef else None

    trainable = [p for p in policy.enter().parameters() if p.requires_grad]
    actor_optimizer = Adam(trainable, config.actor_lr)
    if settings.credit != "critic":
        return Models(policy, None, reference, actor_optimizer, None)

    if settings.lora:
        backbone = Backbone(critic_view)
    elif settings.critic == "shared":
        backbone = Backbone(policy)
    else:
        backbone = copy.deepcopy(policy.model.base_model)
    hears = settings.critic_hears == "logp"
    critic = SegmentCritic(backbone, policy.hidden_size, hears).to(settings.device)
    critic_optimizer = Adam(critic.parameters(), config.critic_lr)
    return Models(policy, critic, reference, actor_optimizer, critic_optimizer)


@contextlib.contextmanager
def named_by_its_flag():
    """Within it, what `vlm` cannot open is an OSError that names the flag."""
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        raise OSError(f"--model {error}") from error


def fingerprint(opened: VLM) -> str:
    """A hash of a model's weights, without adapters: the same wherever its files lie and in
    whichever dtype it is opened.

    Of each tensor it reads a thousand numbers at most, evenly spaced, as bfloat16: milliseconds for
    a large model, too. Training moves nearly all numbers of a tensor, so that is enough.
    """
    sha = hashlib.sha256()
    for name, parameter in opened.model.named_parameters():
        if "lora_" in name:
            continue
        numbers = parameter.detach().flatten()
        some = numbers[:: len(numbers) // 1000 + 1].bfloat16().view(torch.int16)
        sha.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
        sha.update(some.cpu().numpy().tobytes())
    return sha.hexdigest()


def trained_parameters(models: Models) -> list[Tensor]:
    """The parameters that the optimizers move, the actor's first.

    They are not all in the policy's own files: LoRA's adapters of the critic are not, nor are the
    float32 copies behind weights of lower precision (`Adam`).
    """
    parameters = list(_parameters_of(models.actor_optimizer))
    if models.critic_optimizer is not None:
        parameters += _parameters_of(models.critic_optimizer)
    return parameters


def _parameters_of(optimizer):
    return optimizer.param_groups[0]["params"]  # `Adam` makes one group


# ------------------------------------------------------------------ one backbone, three views


class Backbone(torch.nn.Module):
    """A shared model's hidden states, as a module that owns, trains and saves one adapter alone.

    Of a view without an adapter it owns nothing, and gradients stop here.
    """

    def __init__(self, view: VLM):
        super().__init__()
        self.shared = [view]  # in a list, so that the model does not become a part of this module
        self.adapter = torch.nn.ParameterList()
        if view.adapter:
            for name, parameter in view.model.named_parameters():
                if f".{view.adapter}." in name:
                    self.adapter.append(parameter)

    def forward(self, use_cache=False, **inputs) -> Tensor:
        """The model's inputs -> hidden states, (B, L, H). use_cache is accepted and never used."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and len(self.adapter) > 0):
            return self.shared[0].hidden(inputs)


def lora_config(opened: VLM, rank: int):
    """peft's settings of adapters on the text model's linear layers, with alpha = 2 rank.

    Raises ImportError where peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ImportError(
            "--lora needs a package that is not installed: pip install peft"
        ) from None
    text_modules = set(opened.model.get_decoder().modules())
    layers = []
    for name, module in opened.model.named_modules():
        if module in text_modules and isinstance(module, torch.nn.Linear):
            layers.append(name)
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)


def lora(opened: VLM, rank: int) -> tuple[VLM, VLM, VLM]:
    """Put low-rank adapters on a model. -> (policy, critic, reference), views of one backbone.

    Low-rank adaptation (arXiv:2106.09685) of the text model's linear layers, with alpha = 2 rank.
    The backbone is frozen; policy and critic have an adapter each, which adds nothing before
    training, and the reference has none. Adapters have the dtype of the weights, since float32 ones
    would make the layers' activations float32, too; `Adam` keeps float32 copies of them.
    Raises ImportError where peft is not installed.
    """
    adapter_config = lora_config(opened, rank)
    for adapter in ("policy", "critic"):
        opened.model.add_adapter(adapter_config, adapter)
    for name, parameter in opened.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(opened.model.dtype)
    return (
        replace(opened, adapter="policy"),
        replace(opened, adapter="critic"),
        replace(opened, adapter="none"),
    )


# ------------------------------------------------------------------------------ the optimizer


class Adam(torch.optim.Adam):
    """Adam, for weights of any dtype.

    Weights of lower precision learn through float32 copies, because a step of 1e-6 would vanish in
    bfloat16. Their gradients are summed in float32, so that micro-batches lose nothing. The copies
    are what the optimizer holds, clips and saves.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float):
        copies, self.low_precision = [], []  # the latter: (parameter, its copy)
        for parameter in parameters:
            if parameter.dtype == torch.float32:
                copies.append(parameter)
            else:
                copies.append(torch.nn.Parameter(parameter.detach().float()))
                self.low_precision.append((parameter, copies[-1]))
                _move_gradients(parameter, copies[-1])
        # At PyTorch's eps of 1e-8, gradients that are noise would get steps of full size.
        super().__init__(copies, lr, eps=1e-5, fused=True)
        self.register_step_post_hook(lambda *_: self.write_back())

    def write_back(self):
        """Round the float32 copies to the weights that the models compute with."""
        for parameter, float_copy in self.low_precision:
            parameter.data.copy_(float_copy)


def _move_gradients(parameter, float_copy):
    """After each backward pass, add the parameter's gradient to that of its copy, and drop it."""

    def move(parameter):  # as an argument: a closure over itself would keep a parameter alive
        if float_copy.grad is None:
            float_copy.grad = parameter.grad.float()
        else:
            float_copy.grad.add_(parameter.grad)
        parameter.grad = None

    parameter.requires_grad_()  # off in an adapter that is not its model's active one just now
    parameter.register_post_accumulate_grad_hook(move)


# ------------------------------------------------------------------------------------- memory


def peak_megabytes() -> float:
    """The most memory that this process has held, in MB (2**20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # in bytes, or in KiB


def explain_out_of_memory(models: Models, settings, config: SAPOConfig, error: Exception) -> str:
    """What took a run's memory, measured at the failure, and what to lower: one line.

    Whether responses were written or learned from is seen by where the error comes from: the
    one holds keys and values of --generate_batch responses, the other activations of --micro_batch.
    Any error that is not about memory is raised again.
    """
    _raise_unless_memory(error)
    fixed = _fixed_bytes(models) / 2**30
    if "cuda" in settings.device:
        peak = torch.cuda.max_memory_allocated(settings.device) / 2**30
    else:
        peak = peak_megabytes() / 2**10
    written_at_once = settings.generate_batch or settings.batch
    if _was_writing(error):
        doing = "written"
        size = written_at_once
        advice = (
            f"Lower --generate_batch to {max(size // 2, 1)} or less, or --max_new_tokens; or add"
        )
    else:
        doing = "scored or learned from"
        size = config.micro_batch or min(config.minibatch, settings.batch)
        advice = (
            f"Lower --micro_batch to {max(size // 2, 1)} or less, then --generate_batch "
            f"({written_at_once} are written at once) or --max_new_tokens; or add "
            "--gradient_checkpointing,"
        )
    each = max(peak - fixed, 0) / size
    return (
        f"out of memory beyond {peak:.2f} GiB, while responses were {doing}. Measured: weights, "
        f"gradients and Adam take {fixed:.2f}, and {size} responses at once at least {each:.3f} "
        f"each. {advice} --dtype bfloat16, --lora 16. ({_first_line(error)})"
    )


def _was_writing(error):
    """Was it raised while the policy wrote responses?"""
    writing = inspect.unwrap(vlm.generate).__code__  # within torch.no_grad, which many share
    return any(frame.f_code is writing for frame, _ in traceback.walk_tb(error.__traceback__))


def _first_line(error):
    """What an error says, in one line; its kind where it says nothing, as a MemoryError."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def explain_out_of_memory_at_start(settings, error: Exception) -> str:
    """What to do where memory ran out in the warm start or while the models were made: one line.

    Any error that is not about memory is raised again.
    """
    _raise_unless_memory(error)
    return (
        f"out of memory before training began: --model {settings.model} in "
        f"{settings.dtype}, --lora {settings.lora}, --critic {settings.critic}. What makes it "
        "less: --dtype bfloat16, --lora 16 (one backbone for policy, critic and reference), "
        f"--critic shared, a smaller model. ({_first_line(error)})"
    )


# Of errors about memory that have no class of their own. "can't" from PyTorch, "Cannot" from Linux;
# the others from CUDA and its libraries, which take memory beside PyTorch
REFUSALS = (
    "t allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def _raise_unless_memory(error):
    """Raise an error again that is not about memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return
    if not any(words in str(error) for words in REFUSALS):
        raise error


def _fixed_bytes(models):
    """Bytes of all weights, and for what is trained of its gradient and Adam's two moments too."""
    modules = [models.policy.model]
    if models.critic is not None:
        modules.append(models.critic)
    if models.reference is not None:
        modules.append(models.reference.model)
    sizes = {}  # by parameter: one that two views share counts once
    for module in modules:
        for parameter in module.parameters():
            sizes[parameter] = parameter.nbytes
    for parameter in trained_parameters(models):
        sizes[parameter] = 4 * parameter.nbytes
    return sum(sizes.values())
