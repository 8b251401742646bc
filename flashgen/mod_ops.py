"""Attention with mods as operators: what a compiled graph holds in the place of Python functions.

A mod that a compiler has read is a graph. It is kept here as a function, by a digest of its text; the operators take that digest, the tensors
and the numbers that the mod reads, and put them together again when they run. So what a mod reads is the graph's own input, never a
constant in it. Nothing that was kept is forgotten: a compiled graph has no other name for it.

Loaded where `torch.compile` meets such a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashgen import ops
from flashgen.block_lists import PARTS
from flashgen.execution import allocate, backward, cast_like, forward
from flashgen.operands import Operands
from flashgen.scalars import Scalars

# -- mods, kept --

KINDS = ("tensor", "int", "float")  # of what a mod captures


@dataclass(frozen=True, slots=True, kw_only=True)
class Mods:
    """The functions of a call, with all that they read as keyword arguments.

    Attributes:
        functions: by `score_mod`, `mask_mod` or `block_mask`.
        reads: what each is to be given, in the order of what the graph captured: its keyword, None where it does not read it.
        kinds: of each thing that the graph captured: one of `KINDS`.
        lists: how many of a BlockMask's four tables come first among the tensors; then its block sizes and lengths are the first numbers.
    """

    functions: dict[str, Callable[..., Any]]
    reads: dict[str, tuple[str | None, ...]]
    kinds: tuple[str, ...]
    lists: int

    def operands(self, given: Operands, read: Read) -> Operands:
        """What the call brings along, its functions included."""
        tensors = [x.detach().requires_grad_() if at in read.wanted else x for at, x in enumerate(read.tensors)]
        numbers = read.numbers[4:] if self.lists else read.numbers
        floats = [x.item() for x in read.floats]
        rest = dict(zip(KINDS, map(iter, (tensors[self.lists :], numbers, floats)), strict=True))
        values = [next(rest[kind]) for kind in self.kinds]
        made: dict[str, Any] = {}
        for name, function in self.functions.items():
            keywords = {word: x for word, x in zip(self.reads[name], values, strict=True) if word is not None}
            made[name] = partial(function, **keywords) if keywords else function
        if self.lists:
            made["block_mask"] = _BlockMask(tensors[: self.lists], read.numbers[:4], made["block_mask"])
        named = {name: getattr(given, name) for name in ops.TENSORS}
        return Operands(**named, **made, captured_as=tuple(tensors[at] for at in read.wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the mods of one call read.

    Attributes:
        tensors: a BlockMask's tables, then what mods captured.
        numbers: sizes of a BlockMask, then captured integers.
        floats: captured numbers that are none, as fp64 tensors of the CPU: a graph has no others that change.
        wanted: which of the tensors want gradients.
    """

    tensors: Sequence[Tensor]
    numbers: Sequence[int]
    floats: Sequence[Tensor]
    wanted: Sequence[int]


class _BlockMask:
    """As much of PyTorch's `BlockMask` as is read of one."""

    def __init__(self, lists: Sequence[Tensor], sizes: Sequence[int], mask_mod: Any) -> None:
        self.kv_num_blocks, self.kv_indices = lists[:2]
        full: Sequence[Tensor | None] = lists[2:] or (None, None)
        self.full_kv_num_blocks, self.full_kv_indices = full
        self.BLOCK_SIZE, self.seq_lengths, self.mask_mod = tuple(sizes[:2]), tuple(sizes[2:]), mask_mod


def lists_of(block_mask: Any) -> list[Tensor]:
    """A BlockMask's tables, two or four."""
    found = [getattr(block_mask, name) for name in PARTS]
    return [x for x in found if x is not None]


_kept: dict[str, Mods] = {}


def keep(digest: str, mods: Mods) -> None:
    """Keep mods under the digest of their text."""
    _kept.setdefault(digest, mods)


# -- the operators --

_READ_SCHEMA = "str mods, Tensor[] read, SymInt[] numbers, Tensor[] floats, int[] wanted"
_library = torch.library.Library("flashgen", "FRAGMENT")
_library.define(
    "mod_arguments(Tensor like, bool learns) -> (Tensor score, Tensor b, Tensor h, Tensor q_idx, Tensor kv_idx)"
)
_library.define("mod_result(Tensor result, str described) -> Tensor")
_library.define(
    f"attention_mods_fwd(Tensor q, Tensor k, Tensor v, {ops.OPERAND_SCHEMA}, {ops.SCALAR_SCHEMA}, {_READ_SCHEMA}) -> (Tensor out, Tensor lse)"
)
_library.define(
    f"attention_mods_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {ops.OPERAND_SCHEMA}, "
    f"{ops.SCALAR_SCHEMA}, bool bias_grad, bool sinks_grad, {_READ_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks, Tensor[] dread)"
)


def _arguments(like: Tensor, learns: bool) -> tuple[Tensor, ...]:
    """What mods are called with; never run."""
    zero = like.detach().new_zeros((), dtype=torch.float32)
    return zero.clone().requires_grad_(learns), *(zero.int() for _ in range(4))


def _result(result: Tensor, described: str) -> Tensor:
    """What a mod returned, marked, as a number that is used, so that no compiler drops it; never run."""
    return result.detach().sum()


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], str, Read]:
    *rest, mods, tensors, numbers, floats, wanted = arguments
    return tuple(rest), mods, Read(tensors=tensors, numbers=numbers, floats=floats, wanted=wanted)


def _with_mods(rest: tuple[Any, ...], mods: str, read: Read) -> tuple[Operands, Scalars]:
    operands, scalars = ops.split(rest)
    return _kept[mods].operands(operands, read), scalars


def _fwd(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, *_with_mods(*_split(arguments)))


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return allocate(q, v, ops.split(_split(arguments)[0])[1])


def _bwd(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Any, ...]:
    (*rest, bias_grad, sinks_grad), mods, read = _split(arguments)
    operands, scalars = _with_mods(tuple(rest), mods, read)
    dq, dk, dv, sums = backward(dout, dlse, q, k, v, out, lse, operands, scalars, bias_grad, sinks_grad)
    extra = (cast_like(sums.bias, operands.bias), cast_like(sums.sinks, operands.sinks))
    of_read = [total.to(x.dtype) for total, x in zip(sums.captured, operands.options_captured(), strict=True)]
    return (dq, dk, dv, *(q.new_empty((0,)) if x is None else x for x in extra), of_read)


def _bwd_fake(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Any, ...]:
    (*rest, bias_grad, sinks_grad), _, read = _split(arguments)
    operands, _ = ops.split(tuple(rest))
    extra = ((bias_grad, operands.bias), (sinks_grad, operands.sinks))
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    others = (x.new_empty(x.shape) if wanted and x is not None else q.new_empty((0,)) for wanted, x in extra)
    return (*grads, *others, [read.tensors[at].new_empty(read.tensors[at].shape) for at in read.wanted])


_library.impl("mod_arguments", _arguments, "CompositeImplicitAutograd")
_library.impl("mod_result", _result, "CompositeImplicitAutograd")
_library.impl("attention_mods_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("attention_mods_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_mods_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("flashgen::attention_mods_bwd", _bwd_fake, lib=_library)
