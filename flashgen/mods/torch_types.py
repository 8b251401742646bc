"""PyTorch's types by the graph's names, and what PyTorch says is the type of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from flashgen.mods.arrays import Array
from flashgen.mods.graph import Graph

Handler = Callable[[Graph, str, Sequence[Any], Mapping[str, Any]], Array]

DTYPES: dict[torch.dtype, str] = {
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}


class NotInTableError(Exception):
    """An operator, or a form of it, that the graph has no operation for; the message says which form."""


def result_type(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The type of an operator's result, by running it on ones."""
    made = func(*[as_ones(arg) for arg in args], **{name: as_ones(arg) for name, arg in kwargs.items()})
    if not isinstance(made, torch.Tensor) or made.dtype not in DTYPES:
        raise NotInTableError(f"with a result of {getattr(made, 'dtype', type(made).__name__)}")
    return DTYPES[made.dtype]


@cache
def _ones(dtype: str, varies: bool) -> torch.Tensor:
    return torch.ones((1,) if varies else (), dtype=TORCH[dtype], device="cpu")


def as_ones(arg: Any) -> Any:
    """An argument of an operator with tensors of a single one in the place of arrays."""
    if isinstance(arg, Array):
        # A clone, since an operator may work in place.
        return _ones(arg.dtype, arg.varies).clone()
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    return arg
