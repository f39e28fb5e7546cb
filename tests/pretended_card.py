"""A CUDA card that is only pretended: what a run would get wrong on one is seen without one.

    with PretendedCard() as card:
        run = train.build(*train.parse(["--device", "cuda", ...]))
        train.iterate(run)
    card.syncs  # {("rollout.py:389 replay", "to host"): 1, ...}

On a card three things go wrong that no test on a CPU can see: tensors of two devices meet in one
operation, NumPy is handed a tensor that is not in the CPU's memory, and lines wait for the card
again and again (a *synchronisation*). Here all numbers stay on the CPU, and every storage has a
tag: is it meant to lie on the card? Two of torch's modes keep the tags:

    _Calls       what Python calls: answers `.device`, takes device="cuda", moves, refuses NumPy
    _Operations  what is computed in the end, backward passes too: refuses to mix devices

What it cannot see: the card's kernels and their rounding, its memory and its time. Nor does it say
where a tensor lies to what is called within a backward pass (activations that are made again), and
what a function of torch that is written in Python makes there lies where its arguments do.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
CARD = torch.device("cuda", 0)

# Operations that wait until the card has answered: how large their result is, or what it is
WAITING = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
# torch.multinomial asks twice, out of sight: are the numbers probabilities, is their sum 0?
HIDDEN_WAITS = {"multinomial": 2}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"copy_", "_to_copy"}
# Elsewhere a number, as a tensor without dimensions on the CPU, may meet tensors of the card
TAKES_NO_NUMBER = {"stack", "_fused_adam_", "_fused_adamw_"}


class PretendedCard:
    """`with PretendedCard() as card`: "cuda" is a device there, whatever the machine has.

    Raises, as CUDA does, RuntimeError where an operation gets tensors of both devices, and
    TypeError where NumPy is handed a tensor of the card.
    """

    def __init__(self):
        self.syncs = Counter()
        """{(the project's line, "to host" or "to card"): how often the CPU waited there}"""
        self.makes_on_card = False
        """do tensors that are made out of nothing lie on the card? Inside a call that says so"""
        self._modes = [_Operations(self), _Calls(self)]

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def wait(self, direction: str):
        """Count a synchronisation for the line of the project that is being run."""
        frame = sys._getframe(1)
        while frame and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        where = "?"
        if frame:
            file = Path(frame.f_code.co_filename).relative_to(ROOT)
            where = f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        self.syncs[where, direction] += 1

    def counted(self, direction=None) -> int:
        """How often the CPU waited so far, in one direction or in both."""
        return sum(n for (_, way), n in self.syncs.items() if direction in (None, way))


def on_card(tensor: Tensor) -> bool:
    """Is a tensor meant to lie on the card? Views share their storage's tag."""
    return getattr(tensor.untyped_storage(), "is_on_card", False)


def _put(tensors, is_on_card):
    for tensor in _tensors(tensors):
        tensor.untyped_storage().is_on_card = is_on_card


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_ours(file):
    return file.startswith(f"{ROOT}/") and file != __file__ and "site-packages" not in file


def _is_card(device):
    """Is this, as a caller names a device, a card?"""
    if isinstance(device, str | torch.device):
        return torch.device(device).type == "cuda"
    return isinstance(device, int)  # "device=1" is the second card


# ------------------------------------------------------------------------- what Python calls

DEVICE, IS_CUDA, IS_CPU = (
    getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")
)


class _Calls(TorchFunctionMode):
    """Answers for the card where a caller asks for it, or for where a tensor lies."""

    def __init__(self, card):
        super().__init__()
        self.card = card

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        name = getattr(function, "__name__", "")
        given = _tensors((args, kwargs))
        lies_there = any(map(on_card, given))
        if function == DEVICE:
            return CARD if lies_there else function(first)
        if function == IS_CUDA:
            return lies_there
        if function == IS_CPU:
            return not lies_there
        if isinstance(first, Tensor):
            if name == "to":
                return self._moved(first, *args[1:], **kwargs)
            if name in ("cpu", "cuda"):
                return self._moved(first, name)
            if name in ("as_tensor", "asarray") and kwargs:
                return self._moved(first, **kwargs)
            if name in ("numpy", "__array__") and on_card(first):
                raise TypeError(
                    f"can't convert {CARD} device type tensor to numpy. Use Tensor.cpu() to copy "
                    "the tensor to host memory first."
                )
            if name == "tolist" and on_card(first):
                self.card.wait("to host")

        made_there = lies_there
        if kwargs.get("device") is not None:
            made_there = _is_card(kwargs["device"])
            if made_there:
                kwargs["device"] = "cpu"
                if name in ("tensor", "as_tensor", "asarray"):  # from numbers of the host
                    self.card.wait("to card")
        result = self._call(function, args, kwargs, made_there)
        if kwargs.get("device") is not None or name == "__deepcopy__":
            _put(result, made_there)
        return result

    def _call(self, function, args, kwargs, made_there):
        """Call it; what it makes out of nothing inside of torch lies there or not."""
        before = self.card.makes_on_card
        self.card.makes_on_card = made_there
        try:
            return function(*args, **kwargs)
        finally:
            self.card.makes_on_card = before

    def _moved(self, tensor, *args, copy=False, **kwargs):
        """Tensor.to, under its three signatures: a device, a dtype, or another tensor."""
        was_there = on_card(tensor)
        if args and isinstance(args[0], Tensor):
            device, dtype = CARD if on_card(args[0]) else "cpu", args[0].dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        goes_there = was_there if device is None else _is_card(device)
        crosses = goes_there != was_there
        if crosses:
            self.card.wait("to card" if goes_there else "to host")
        with torch._C.DisableTorchFunction():
            moved = tensor.to(dtype=dtype or tensor.dtype, copy=copy or crosses)
        if crosses:
            _put(moved, goes_there)
        return moved


# -------------------------------------------------------------------------- what is computed


class _Operations(TorchDispatchMode):
    """Checks the devices of every operation, and says where its results lie."""

    def __init__(self, card):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation._schema.name.split("::")[1]
        given = _tensors((args, kwargs))
        lie_there = [on_card(tensor) for tensor in given]
        if any(lie_there):
            self._count(name, args, lie_there)
            if not all(lie_there) and name not in COPYING:
                _check_meeting(name, operation, args, given, lie_there)
        result = operation(*args, **kwargs)
        if any(lie_there) and name not in COPYING:
            _put(result, True)
        elif name == "_to_copy":
            _put(result, lie_there[0])
        elif not given and self.card.makes_on_card:
            _put(result, True)
        return result

    def _count(self, name, args, lie_there):
        """Count what waits: for an answer, for a copy, or for a mask's number of True."""
        for _ in range(HIDDEN_WAITS.get(name, name in WAITING)):
            self.card.wait("to host")
        if name == "copy_" and not lie_there[0]:
            self.card.wait("to host")
        if name == "copy_" and not lie_there[1] and args[1].dim():  # a number travels along
            self.card.wait("to card")
        if name in INDEXING:
            for index in _tensors(args[1]):
                if not on_card(index):
                    self.card.wait("to card")
                elif index.dtype == torch.bool:
                    self.card.wait("to host")


def _check_meeting(name, operation, args, given, lie_there):
    """RuntimeError where tensors of both devices may not meet, as CUDA has it.

    They may where the CPU's are numbers (tensors without dimensions) that are only read, and a
    tensor of the card may be indexed by one of the CPU.
    """
    writes_to_cpu = operation._schema.is_mutable and isinstance(args[0], Tensor)
    writes_to_cpu = writes_to_cpu and not on_card(args[0])
    if name in INDEXING and on_card(args[0]):
        values = _tensors(args[2:])
        may_meet = all(on_card(value) or value.dim() == 0 for value in values)
    elif name in INDEXING or name in TAKES_NO_NUMBER or writes_to_cpu:
        may_meet = False
    else:
        strangers = [tensor for tensor, there in zip(given, lie_there, strict=True) if not there]
        may_meet = all(tensor.dim() == 0 for tensor in strangers)
    if not may_meet:
        shapes = [
            f"{CARD if there else 'cpu'} {tuple(tensor.shape)}"
            for tensor, there in zip(given, lie_there, strict=True)
        ]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{CARD} and cpu! ({name}: {', '.join(shapes)})"
        )
