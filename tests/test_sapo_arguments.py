"""What every function of sapo.py promises of its arguments: each is left alone and checked, what
stands off the mask never matters, any float dtype will do, and no loop runs over tokens."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from plain_loops import random_batch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sapo

# function -> its (B, T) arguments, the mask last
TENSORS = {
    "entropy_ends": ("entropy", "mask"),
    "threshold_ends": ("entropy", "mask"),
    "entropy_quantile": ("entropy", "mask"),
    "delimiter_ends": ("is_delimiter", "mask"),
    "low_prob_ends": ("logp", "mask"),
    "token_ends": ("mask",),
    "response_ends": ("mask",),
    "boundaries": ("ends", "mask"),
    "segment_sum": ("x", "ends", "mask"),
    "segment_mean": ("x", "ends", "mask"),
    "segment_gae": ("rewards", "values", "ends", "mask"),
    "whiten": ("x", "mask"),
    "segment_ratio": ("logp", "old_logp", "ends", "mask"),
    "importance_ratio": ("logp", "old_logp", "ends", "mask"),
    "surprise": ("logp", "mask"),
    "approx_kl": ("logp", "old_logp", "mask"),
    "policy_loss": ("ratio", "advantages", "mask"),
    "value_loss": ("values", "returns", "old_values", "ends", "mask"),
}
# what else they are called with here
OPTIONS = {
    "threshold_ends": {"threshold": 0.9},
    "value_loss": {"value_clip": 0.5},
    "importance_ratio": {"kind": "product"},
}
# function -> the arguments that get a gradient
DIFFERENTIABLE = {
    "segment_sum": ("x",),
    "segment_mean": ("x",),
    "whiten": ("x",),
    "segment_gae": ("rewards", "values"),
    "segment_ratio": ("logp", "old_logp"),
    "importance_ratio": ("logp", "old_logp"),
    "policy_loss": ("ratio", "advantages"),
    "value_loss": ("values", "returns"),
}
BOOLEAN = ("mask", "ends", "is_delimiter")
ARGUMENTS = [(function, name) for function, names in TENSORS.items() for name in names]

every_function = pytest.mark.parametrize("function", TENSORS)
every_float_argument = pytest.mark.parametrize(
    ("function", "name"), [pair for pair in ARGUMENTS if pair[1] not in BOOLEAN]
)
every_cut_argument = pytest.mark.parametrize(
    ("function", "name"), [pair for pair in ARGUMENTS if pair[1] in ("ends", "is_delimiter")]
)
every_argument_but_the_mask = pytest.mark.parametrize(
    ("function", "name"), [pair for pair in ARGUMENTS if pair[1] != "mask"]
)


def call(function, batch, **changed):
    """A function on a batch's tensors, some of them or of its options `changed`."""
    arguments = {name: getattr(batch, name) for name in TENSORS[function]}
    return getattr(sapo, function)(**arguments | OPTIONS.get(function, {}) | changed)


def tensors_of(result):
    """All numbers of a result, each as a tensor."""
    return [torch.as_tensor(leaf) for leaf in tree_leaves(result)]


# ------------------------------------------------------------------------ they are left alone


@every_function
def test_arguments_stay_as_they_were(function):
    batch = random_batch(0)
    copies = {name: getattr(batch, name).clone() for name in TENSORS[function]}
    call(function, batch)
    for name, copy in copies.items():
        assert torch.equal(getattr(batch, name), copy), name


@every_function
def test_no_result_is_a_view_of_an_argument(function):
    """Through a view the argument could be changed later."""
    batch = random_batch(0)
    for result in tensors_of(call(function, batch)):
        for name in TENSORS[function]:
            assert result.data_ptr() != getattr(batch, name).data_ptr(), name


# ------------------------------------------------------------------------------- off the mask
#
# In a model's output, padding and banned tokens hold anything.

any_rubbish = pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])


def with_rubbish(batch, name, rubbish):
    return {name: getattr(batch, name).masked_fill(~batch.mask, rubbish)}


@any_rubbish
@every_float_argument
def test_what_stands_off_the_mask_changes_no_number(function, name, rubbish):
    batch = random_batch(1)
    clean = tensors_of(call(function, batch))
    dirty = tensors_of(call(function, batch, **with_rubbish(batch, name, rubbish)))
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


def gradients(function, batch, **changed):
    """Of a random weighting of all results, for every argument that gets a gradient."""
    leaves = {}
    for name in DIFFERENTIABLE[function]:
        leaves[name] = changed.get(name, getattr(batch, name)).clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(batch.mask.shape, dtype=torch.float64, generator=generator)
    total = 0.0
    for result in tensors_of(call(function, batch, **changed | leaves)):
        if result.requires_grad:
            total = total + (result * weights if result.dim() else result).sum()
    return torch.autograd.grad(total, list(leaves.values()))


@any_rubbish
@pytest.mark.parametrize(
    ("function", "name"),
    [pair for pair in ARGUMENTS if pair[0] in DIFFERENTIABLE and pair[1] not in BOOLEAN],
)
def test_what_stands_off_the_mask_changes_no_gradient(function, name, rubbish):
    """Of any argument, whichever holds the rubbish; and nothing off the mask gets a gradient."""
    batch = random_batch(1)
    clean = gradients(function, batch)
    dirty = gradients(function, batch, **with_rubbish(batch, name, rubbish))
    for one, other in zip(clean, dirty, strict=True):
        assert one.any()
        assert torch.equal(one, other)
        assert not one[~batch.mask].any()


def banned_on_both_sides(batch):
    """Log-probabilities with -inf off the mask, old and new: their difference is NaN there."""
    return with_rubbish(batch, "logp", -math.inf) | with_rubbish(batch, "old_logp", -math.inf)


@pytest.mark.parametrize("function", ["segment_ratio", "importance_ratio", "approx_kl"])
def test_tokens_banned_off_the_mask_on_both_sides_change_no_number(function):
    batch = random_batch(2)
    [clean] = tensors_of(call(function, batch))
    [dirty] = tensors_of(call(function, batch, **banned_on_both_sides(batch)))
    assert torch.equal(clean, dirty)


def test_tokens_banned_off_the_mask_on_both_sides_leave_the_gradient_finite():
    batch = random_batch(2)
    for gradient in gradients("segment_ratio", batch, **banned_on_both_sides(batch)):
        assert gradient.isfinite().all()
        assert not gradient[~batch.mask].any()


# ----------------------------------------------------------------------------------- refusals


@every_float_argument
def test_nan_on_a_policy_token_is_refused(function, name):
    """The message says which argument and where."""
    batch = random_batch(3)
    broken = getattr(batch, name).clone()
    broken[0, 4] = math.nan
    with pytest.raises(ValueError, match=rf"^{name}\b.*NaN.*row 0, position 4"):
        call(function, batch, **{name: broken})


@pytest.mark.parametrize("function", ["segment_ratio", "importance_ratio", "approx_kl"])
def test_a_sampled_token_that_is_banned_on_both_sides_is_refused(function):
    """-inf minus -inf, on a policy token: neither is NaN, but their difference is."""
    batch = random_batch(3)
    logp, old_logp = batch.logp.clone(), batch.old_logp.clone()
    logp[0, 4] = old_logp[0, 4] = -math.inf
    with pytest.raises(ValueError, match=r"^logp - old_logp\b.*NaN.*row 0, position 4"):
        call(function, batch, logp=logp, old_logp=old_logp)


@every_argument_but_the_mask
def test_wrong_shapes_are_refused(function, name):
    batch = random_batch(3)
    right = getattr(batch, name)
    for wrong in (right[:, :-1], right[:-1], right[0], right[..., None], right[:, :1]):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            call(function, batch, **{name: wrong})


@every_function
def test_masks_of_wrong_shape_or_type_are_refused(function):
    batch = random_batch(3)
    for wrong in (batch.mask[0], batch.mask[..., None], batch.mask.long(), batch.mask.double()):
        with pytest.raises(ValueError, match=r"^mask\b"):
            call(function, batch, mask=wrong)


@every_function
@pytest.mark.parametrize(
    "part",
    [(slice(0), slice(None)), (slice(None), slice(0))],
    ids=["no response", "no position"],
)
def test_an_empty_batch_is_refused(function, part):
    batch = random_batch(3)
    with pytest.raises(ValueError, match=r"^mask\b"):
        call(function, batch, **{name: getattr(batch, name)[part] for name in TENSORS[function]})


@every_cut_argument
def test_cuts_must_be_bool(function, name):
    batch = random_batch(3)
    for wrong in (getattr(batch, name).long(), getattr(batch, name).double()):
        with pytest.raises(ValueError, match=rf"^{name}\b.*bool"):
            call(function, batch, **{name: wrong})


def test_what_is_wrong_with_a_tensor_is_said_in_full():
    mask = torch.ones(2, 3, dtype=torch.bool)
    wrong = {
        "mask: (torch.float32, (2, 3)), expected a bool tensor (B, T) with B and T at least 1": (
            torch.ones(2, 3),
            {},
        ),
        "x: (2, 4), expected the mask's shape (2, 3)": (mask, {"x": torch.ones(2, 4)}),
        "ends: torch.int64, expected torch.bool": (mask, {"x": mask, "ends": mask.long()}),
    }
    for said, (of_mask, tensors) in wrong.items():
        with pytest.raises(ValueError) as refused:
            sapo.segment_sum(**{"x": mask.float(), "ends": mask, "mask": of_mask} | tensors)
        assert str(refused.value) == said


NO_ROWS = torch.zeros(0, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(3, dtype=torch.bool), torch.ones(2, 3), NO_ROWS],
    ids=["no batch", "float", "empty"],
)
def test_segment_index_needs_a_cut(wrong):
    with pytest.raises(ValueError, match=r"^ends\b"):
        sapo.segment_index(wrong)


@pytest.mark.parametrize(
    ("function", "name", "wrong"),
    [
        *product(["entropy_ends", "entropy_quantile"], ["top_k"], [0.0, -0.1, 1.001, 30, math.nan]),
        *product(["segment_gae"], ["gamma", "lam"], [-0.01, 1.01, math.nan, math.inf]),
        *product(["boundaries", "segment_gae", "value_loss"], ["value_at"], ["middle", None]),
        *product(["policy_loss", "value_loss"], ["average"], ["batch", None]),
        *product(["policy_loss"], ["dual_clip"], [1.0, 0.5, math.nan]),
        *product(["policy_loss"], ["clip_low", "clip_high"], [-0.1, math.nan]),
        *product(["value_loss"], ["value_clip"], [0.0, -0.5, math.nan]),
        *product(["low_prob_ends"], ["threshold"], [0.0, 1.1, math.nan]),
        *product(["low_prob_ends"], ["every"], [0, 1.5, math.nan]),
        *product(["threshold_ends"], ["threshold"], [math.nan, None]),
        ("value_loss", "old_values", None),
    ],
)
def test_settings_out_of_range_are_refused(function, name, wrong):
    """In one line: the name, the value seen, and what was expected."""
    with pytest.raises(ValueError) as refused:
        call(function, random_batch(3), **{name: wrong})
    said, expected = str(refused.value).split(", expected ")
    assert said == f"{name}: {wrong!r}" and expected != "None"


# -------------------------------------------------------------- batches without policy tokens


def test_a_quantile_needs_a_policy_token():
    batch = random_batch(3)
    with pytest.raises(ValueError, match="^mask: 'no policy token', expected at least one$"):
        sapo.entropy_quantile(batch.entropy, torch.zeros_like(batch.mask))


@pytest.mark.parametrize("function", [name for name in TENSORS if name != "entropy_quantile"])
def test_batches_without_policy_tokens_give_nothing(function):
    """0 everywhere, False everywhere, a loss of 0; the ratio is 1."""
    batch = random_batch(4)
    batch.mask = batch.ends = torch.zeros_like(batch.mask)
    nothing = 1 if function.endswith("_ratio") else 0
    for result in tensors_of(call(function, batch)):
        assert torch.equal(result, torch.full_like(result, nothing))


# ------------------------------------------------------------------------------------- dtypes


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype(function, dtype):
    batch = random_batch(5)
    names = [name for name in TENSORS[function] if name not in BOOLEAN]
    rounded = {name: getattr(batch, name).to(dtype) for name in names}
    in_double = {name: tensor.double() for name, tensor in rounded.items()}
    ours = tensors_of(call(function, batch, **rounded))
    expected = tensors_of(call(function, batch, **in_double))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(ours, expected, strict=True):
        assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# In bfloat16 256 + 1 is 256: a long segment's sum would stop growing.
LONG = torch.ones(1, 4097, dtype=torch.bool)
ONES = torch.ones(1, 4097, dtype=torch.bfloat16)
ZEROS = torch.zeros_like(ONES)


def test_segment_sums_of_half_precision_are_made_in_single():
    assert sapo.segment_sum(ONES, sapo.response_ends(LONG), LONG)[0, 0].item() == 4097


def test_returns_of_half_precision_are_made_in_single():
    _, returns = sapo.segment_gae(ONES, ZEROS, sapo.response_ends(LONG), LONG)
    assert returns[0, 0].item() == 4097


def test_losses_of_half_precision_are_made_in_single():
    assert sapo.policy_loss(ONES, ONES, LONG)[0] == -1
    assert sapo.value_loss(ONES, ZEROS, LONG, LONG)[0] == 1
    one, of = LONG[:1, :1], lambda number, dtype: torch.full((1, 1), number, dtype=dtype)
    half, brain = torch.float16, torch.bfloat16
    assert sapo.policy_loss(of(300.0, half), of(-300.0, half), one)[0] == 90_000  # not infinite
    assert sapo.value_loss(of(300.0, half), of(0.0, half), one, one)[0] == 90_000
    loss, _ = sapo.policy_loss(of(2.0, brain), of(1.0, brain), one)
    assert loss.item() == pytest.approx(-1.2)  # whose nearest bfloat16 is 1.203125


def test_log_ratios_of_half_precision_are_made_in_single():
    """In bfloat16 e^0.03125 = 1.0317 would be 1.03125."""
    logp = torch.full_like(ONES, -4.0)
    ratio = sapo.segment_ratio(logp, logp - 0.03125, sapo.response_ends(LONG), LONG)
    assert ratio.dtype == torch.float32
    assert ratio[0, 0].item() == pytest.approx(math.exp(0.03125), rel=1e-6)


# ---------------------------------------------------------------------------- time and memory


class Counter(TorchDispatchMode):
    """Counts the operations that reach PyTorch, and remembers the largest result of any."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


def in_two_segments(rows, tokens):
    """A batch of this size, 8 or more positions wide: full responses of two segments each."""
    small = random_batch(6, rows=8, tokens=8)
    batch = SimpleNamespace()
    for name, tensor in vars(small).items():
        setattr(batch, name, tensor[:1].repeat(rows, tokens // 8))
    batch.mask = torch.ones(rows, tokens, dtype=torch.bool)
    batch.ends = sapo.response_ends(batch.mask)
    batch.ends[:, 3] = True
    return batch


@every_function
def test_no_loop_over_responses_or_tokens(function):
    """As many operations for 2 x 8 tokens as for 32 x 64, and none gives more than B T numbers."""
    counts = []
    for rows, tokens in ((2, 8), (32, 64)):
        batch = in_two_segments(rows, tokens)
        with Counter() as counter:
            call(function, batch)
        counts.append(counter.operations)
        assert counter.largest <= rows * tokens
    assert counts[0] == counts[1] > 0
