"""Captured tensors: which a mod reads, what the user calls them, and what kernels call them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flashgen.errors import InvalidProblemError
from flashgen.mods import aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A tensor that a function reads.

    Attributes:
        name: what the user calls it, made a valid and unique name.
        given: what the user calls it, for messages.
        dtype: of its elements.
        shape: when it was traced.
        requires_grad: whether gradients are wanted.
        tensor: itself, where a later call could not find it again in the function; then the trace is not kept.
        constant: whether the function makes it anew from numbers in its own code.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    tensor: Tensor | None = None
    constant: bool = False
    given: str = ""

    @property
    def shown(self) -> str:
        """What a message calls it."""
        return self.given or self.name


class Captures:
    """The captured tensors of one or several functions, numbered in the order in which they are met.

    Args:
        names: id of a tensor -> what the user calls it.
        device: where tensors of one dimension or more must lie.
    """

    def __init__(self, names: dict[int, str], device: torch.device) -> None:
        self._names, self._device = names, device
        self._numbers: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.rows: list[Capture] = []

    def number(self, tensor: Tensor, *, constant: bool = False) -> int:
        """The number of a tensor.

        Raises:
            InvalidProblemError: it is on another device, or of a type that no kernel has.
        """
        known = self._numbers.get(id(tensor))
        if known is not None:
            return known
        name = self._names.get(id(tensor))
        shown = name or "a tensor"
        if tensor.dtype not in aten.DTYPES:
            raise InvalidProblemError(
                f"{shown} that it captures is {tensor.dtype}: a kernel has no such type. Cast it."
            )
        # A number on the CPU is copied; the gradient of the copy would be nobody's.
        number = tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad
        if tensor.device != self._device and not number and not constant:
            raise InvalidProblemError(
                f"{shown} that it captures is on {tensor.device}, q is on {self._device}: they must be on one device. Move it."
            )
        taken = {row.name for row in self.rows}
        base = _identifier(name or ("constant" if constant else "captured"))
        unique = next(one for n in itertools.count(1) if (one := base if n == 1 else f"{base}_{n}") not in taken)
        self._numbers[id(tensor)] = len(self.rows)
        self.tensors.append(tensor)
        self.rows.append(
            Capture(
                name=unique,
                dtype=aten.DTYPES[tensor.dtype],
                shape=tuple(tensor.shape),
                requires_grad=tensor.requires_grad,
                tensor=tensor if constant or name is None else None,
                constant=constant,
                given=(name or "").rpartition(".")[2],
            )
        )
        return self._numbers[id(tensor)]


def _identifier(name: str) -> str:
    """A user's name in the form that kernels use: lower case, ASCII, none of a kernel's own words."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name.rpartition(".")[2]).strip("_")
    kept = kept.lower() or "captured"
    own = kept in _TAKEN or kept.startswith("sum_of_")
    return f"mod_{kept}" if kept[0].isdigit() or own or len(kept) == 1 else kept


# What kernels call things of their own, less the suffix: `seqlen` read at a query would become `seqlen_q`, a length.
_TAKEN = {
    "do", "dq", "dk", "dv", "dsinks", "dbias", "dlse", "dq_sum", "lse", "lse2", "safe_lse", "delta", "acc", "out",
    "score", "bias", "mask", "mask_ranges", "ranges", "sinks", "alibi", "alibi_slopes", "attn_mask", "philox", "seed",
    "turn", "counter", "data", "seqlen", "max_seqlen", "num_heads", "total", "first", "last", "start", "stop", "load",
    "stride", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seqused", "seqused_k", "block", "kv", "head_dim",
    "causal_offset", "row_ranges", "block_kinds", "key_blocks", "key_counts", "row_blocks", "row_counts", "blocks",
    "largest", "mask_words", "bits",
}  # fmt: skip
