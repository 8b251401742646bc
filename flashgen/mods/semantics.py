"""What each operation of the graph computes, in NumPy, with PyTorch's meaning; and a whole graph on arrays of indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from flashgen.mods.dtypes import converted, numpy_type

if TYPE_CHECKING:
    from flashgen.mods.graph import Node

Array = Any  # an ndarray of the type that `held` names

_erf = np.vectorize(math.erf, otypes=[np.float64])


def held(dtype: str) -> Any:
    """What NumPy keeps values of a type in; bfloat16 in float32."""
    return numpy_type(dtype)


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    def shift(x: Array, y: Array) -> Array:
        # Beyond the width PyTorch shifts everything out: zeros, or the sign to the right.
        width = x.dtype.itemsize * 8
        inside = (y >= 0) & (y < width)
        by = np.where(inside, y, 0).astype(x.dtype)
        if left:
            return np.where(inside, np.left_shift(x, by), 0).astype(x.dtype)
        last = np.right_shift(x, np.asarray(width - 1, x.dtype)) if x.dtype.kind == "i" else np.zeros_like(x)
        return np.where(inside, np.right_shift(x, by), last)

    return shift


def _truncdiv(x: Array, y: Array) -> Array:
    quotient = np.floor_divide(x, y)
    return quotient + ((quotient * y != x) & ((x < 0) != (y < 0))).astype(x.dtype)


def _fmod(x: Array, y: Array) -> Array:
    return np.fmod(x, y)


def _sigmoid(x: Array) -> Array:
    return (1.0 / (1.0 + np.exp(-x))).astype(x.dtype)


def _rsqrt(x: Array) -> Array:
    return (1.0 / np.sqrt(x)).astype(x.dtype)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": lambda x: (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype),  # of NaN: 0, as in PyTorch
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "trunc": np.trunc,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": _rsqrt,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "sin": np.sin,
    "cos": np.cos,
    "erf": lambda x: _erf(x).astype(x.dtype),
    "not": np.invert,
}
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "truncdiv": _truncdiv,
    "fmod": _fmod,
    "min": np.minimum,
    "max": np.maximum,
    "fmin": np.fmin,
    "fmax": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
UNARY, BINARY = tuple(_UNARY), tuple(_BINARY)


def apply(op: str, values: Sequence[Array], dtype: str) -> Array:
    """One operation on arrays of operands of one type (`where`: its condition first).

    Args:
        op: the operation.
        values: operands.
        dtype: the operands' type, since bfloat16 is kept as float32.
    """
    with np.errstate(all="ignore"):
        return _apply(op, values, dtype)


def _apply(op: str, values: Sequence[Array], dtype: str) -> Array:
    if op == "where":
        return np.where(*values)
    result = _UNARY[op](*values) if op in _UNARY else _BINARY[op](*values)
    return converted(result, dtype) if dtype == "bfloat16" and result.dtype != np.bool_ else result


def evaluate(root: Node, inputs: Mapping[str, Array], captures: Sequence[Array]) -> Array:
    """A graph on arrays that broadcast against each other.

    Args:
        root: the value that is wanted.
        inputs: by argument; int32, and fp32 for `score`.
        captures: captured tensors by number, as `held` keeps them. Negative indices count from the end, those beyond a
            dimension read zero, as in a kernel.

    Returns:
        The values; broadcastable to the inputs' common shape.
    """
    with np.errstate(all="ignore"):
        return _evaluated(root, inputs, captures)


@lru_cache(maxsize=1024)
def _order(root: Node) -> tuple[Node, ...]:
    """The nodes of a value in order: it is evaluated many times where a mask is analysed."""
    from flashgen.mods.graph import ordered

    return tuple(ordered(root))


def _evaluated(root: Node, inputs: Mapping[str, Array], captures: Sequence[Array]) -> Array:
    values: dict[int, Array] = {}
    for node in _order(root):
        args = [values[id(arg)] for arg in node.args]
        if node.op == "input":
            value = np.asarray(inputs[node.value], dtype=held(node.dtype))
        elif node.op == "const":
            value = np.asarray(node.value, dtype=held(node.dtype))
        elif node.op == "load":
            value = _load(captures[node.value], args)
        elif node.op == "cast":
            value = converted(args[0], node.dtype)
        else:
            value = _apply(node.op, args, node.args[-1].dtype)
        values[id(node)] = value
    return values[id(root)]


def _load(table: Array, indices: Sequence[Array]) -> Array:
    if not indices:
        return table
    if 0 in table.shape:
        return np.zeros(np.broadcast_shapes(*(index.shape for index in indices)), table.dtype)
    places, inside = [], np.asarray(True)
    for index, size in zip(indices, table.shape, strict=True):
        wide = index.astype(np.int64)
        wide = np.where(wide < 0, wide + size, wide)
        inside = inside & (wide >= 0) & (wide < size)
        places.append(np.clip(wide, 0, size - 1))
    read = table[tuple(places)]
    return read if np.all(inside) else np.where(inside, read, np.zeros((), table.dtype))
