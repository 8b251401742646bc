"""Register tensors, and the accumulator of a product that has not been waited for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from flashgen.simulator.context import fail
from flashgen.simulator.dtypes import Array, DType, decode, encode, float32, int1, int32, int64, rounded, uint32
from flashgen.simulator.errors import AccumulatorError, IntegerError, LayoutError, ShapeError, UnsupportedOperationError
from flashgen.simulator.layouts import Layout, SliceLayout, common, inferred
from flashgen.simulator.scalars import INT32_MAX, INT32_MIN, Scalar
from flashgen.simulator.sites import Mark

if TYPE_CHECKING:
    from flashgen.simulator.machine import Partition


def sizes(args: Any) -> tuple[int, ...]:
    """A shape given as one sequence or as arguments."""
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        args = args[0]
    return tuple(int(size) for size in args)


class Tensor:
    """A block tensor in registers.

    Attributes:
        values: its elements, as `dtype` holds them.
        dtype: element type.
        layout: its layout; None where the compiler infers it.
    """

    __slots__ = ("dtype", "layout", "values")
    __array_ufunc__ = None  # NumPy scalars on the left leave the operation to this class

    def __init__(self, values: Array, dtype: DType, layout: Layout | None = None) -> None:
        self.values, self.dtype, self.layout = values, dtype, layout

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    @property
    def handle(self) -> Tensor:
        """What a kernel's own builtin hands to `_semantic.builder`."""
        return self

    @property
    def numel(self) -> int:
        return self.values.size

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    def __bool__(self) -> bool:
        fail(ShapeError, f"a tensor of shape {self.shape} is used as a condition")

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        """The tensor cast to `dtype`, or its bits seen as `dtype`."""
        if dtype is self.dtype:
            return self
        if bitcast:
            if self.dtype.raw.itemsize != dtype.raw.itemsize:
                fail(UnsupportedOperationError, f"bitcast of {self.dtype} to {dtype}")
            raw = np.ascontiguousarray(encode(self.values, self.dtype)).view(dtype.raw)
            return Tensor(decode(raw, dtype), dtype, self.layout)
        return Tensor(rounded(self.values, dtype), dtype, self.layout)

    def cast(self, dtype: DType, bitcast: bool = False) -> Tensor:
        return self.to(dtype, bitcast)

    def __getitem__(self, index: Any) -> Tensor:
        values, layout = self.values, self.layout
        for axis, part in enumerate(index if isinstance(index, tuple) else (index,)):
            if part is None:
                values = np.expand_dims(values, axis)
                if isinstance(layout, SliceLayout):
                    if layout.dim != axis:
                        fail(LayoutError, f"dimension {axis} added to a tensor of SliceLayout dimension {layout.dim}")
                    layout = layout.parent
                elif not inferred(layout):
                    fail(LayoutError, f"a dimension can only be added to a SliceLayout, got {layout}")
            elif part != slice(None):
                fail(UnsupportedOperationError, f"tensor index {part!r}: only None and : are known to Triton")
        return Tensor(values, self.dtype, layout)

    def reshape(self, *shape: Any) -> Tensor:
        wanted = sizes(shape)
        if np.prod(wanted, dtype=int) != self.values.size:
            fail(ShapeError, f"a tensor of shape {self.shape} reshaped to {list(wanted)}")
        return Tensor(self.values.reshape(wanted), self.dtype)

    def permute(self, *order: Any) -> Tensor:
        return Tensor(self.values.transpose(sizes(order)), self.dtype)

    def trans(self, *order: Any) -> Tensor:
        return self.permute(*(order or (1, 0)))

    @property
    def T(self) -> Tensor:
        return self.trans()

    def split(self) -> tuple[Tensor, Tensor]:
        if self.values.shape[-1] != 2:
            fail(ShapeError, f"split needs a last dimension of 2, got {self.shape}")
        return Tensor(self.values[..., 0], self.dtype), Tensor(self.values[..., 1], self.dtype)

    def __neg__(self) -> Tensor:
        return Tensor(-self.values, self.dtype, self.layout)

    def __invert__(self) -> Tensor:
        return Tensor(~self.values, self.dtype, self.layout)


class Accumulator:
    """The result of an asynchronous wgmma: only `warpgroup_mma_wait` or another wgmma may take it."""

    def __init__(self, owner: Partition, sequence: int, shape: tuple[int, ...], layout: Layout, mark: Mark) -> None:
        self.owner, self.sequence, self.block, self.layout, self.mark = owner, sequence, shape, layout, mark
        self.value: Tensor | None = None

    def misused(self, *_: Any) -> NoReturn:
        fail(
            AccumulatorError,
            "the result of a wgmma is used before it was waited for; use what warpgroup_mma_wait returns. Issued at\n"
            f"        {self.mark.site()}",
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.misused()


for _name in [
    "getitem",
    "bool",
    "neg",
    "invert",
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "mod",
    "rmod",
    "floordiv",
    "rfloordiv",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "rand",
    "or",
    "ror",
    "xor",
    "rxor",
]:
    setattr(Accumulator, f"__{_name}__", Accumulator.misused)


def plain(*operands: Any) -> None:
    """Refuse operands that are products in flight."""
    for operand in operands:
        if isinstance(operand, Accumulator):
            operand.misused()


def values_of(operand: Any) -> Any:
    """The array of a tensor, the plain number of a scalar."""
    if isinstance(operand, Tensor):
        return operand.values
    if isinstance(operand, (bool, np.bool_)):
        return bool(operand)
    return float(operand) if isinstance(operand, (float, np.floating)) else int(operand)


def promoted(a: Any, b: Any) -> DType:
    """The element type of an operation on a and b, one of them a tensor."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype is b.dtype:
            return a.dtype
        if a.dtype.narrow and b.dtype.narrow:
            return float32
        return a.dtype if a.dtype.rank >= b.dtype.rank else b.dtype
    tensor, other = (a, b) if isinstance(a, Tensor) else (b, a)
    if isinstance(other, (float, np.floating)):
        return tensor.dtype if tensor.dtype.is_float else float32
    if tensor.dtype is int1:
        return int1 if isinstance(other, (bool, np.bool_)) else int32
    if isinstance(other, Scalar) and not tensor.dtype.is_float and other.dtype.rank > tensor.dtype.rank:
        return other.dtype
    if not tensor.dtype.is_float and not INT32_MIN <= int(other) <= INT32_MAX:
        unsigned = 0 <= int(other) < 2**32
        return int64 if not unsigned else tensor.dtype if tensor.dtype.rank > uint32.rank else uint32
    return tensor.dtype


def binary(
    a: Any, b: Any, op: Callable[..., Array], *, compare: bool = False, quotient: bool = False, integer: bool = False
) -> Any:
    """An elementwise operation of two operands, tensors or scalars, with Triton's promotion and Gluon's layout rule.

    Args:
        a, b: tensors, or one of them a scalar.
        op: the NumPy function.
        compare: the result is int1.
        quotient: a true division: integers become float32.
        integer: a floor division or remainder: negative operands are refused.
    """
    x: Any
    y: Any
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        x, y = a.values, b.values
        left, right = x.shape, y.shape
        if left != right and (
            len(left) != len(right) or any(p != q and 1 not in (p, q) for p, q in zip(left, right, strict=True))
        ):
            fail(ShapeError, f"operands of shape {list(left)} and {list(right)}")
        layout = common(a.layout, b.layout)
    else:
        plain(a, b)
        for operand in (a, b):
            if not isinstance(operand, (Tensor, int, float, np.number, np.bool_)):
                return NotImplemented
        layout = a.layout if isinstance(a, Tensor) else b.layout
        x, y = values_of(a), values_of(b)
    dtype = promoted(a, b)
    if integer and (np.any(np.less(x, 0)) or np.any(np.less(y, 0))):
        fail(IntegerError, "integer division of negative values: Triton truncates, Python floors")
    if dtype is int32 and not compare:  # in 64 bits first: NumPy would wrap round in silence
        wide = op(np.asarray(x, np.int64), np.asarray(y, np.int64)) if not quotient else op(x, y)
        if not quotient and wide.size and (wide.min() < INT32_MIN or wide.max() > INT32_MAX):
            fail(IntegerError, f"int32 overflow in a tensor: [{wide.min()}, {wide.max()}] (cast to int64)")
        result = wide
    else:
        result = op(x, y)
    if compare:
        return Tensor(result, int1, layout)
    if quotient and not dtype.is_float:
        dtype = float32
    if dtype.narrow or result.dtype != dtype.held:
        result = rounded(result, dtype)
    return Tensor(result, dtype, layout)


def _operator(op: Callable[..., Array], swap: bool, flags: dict[str, bool]) -> Callable[[Tensor, Any], Any]:
    if swap:
        return lambda self, other: binary(other, self, op, **flags)
    return lambda self, other: binary(self, other, op, **flags)


_OPERATORS: dict[str, tuple[Callable[..., Array], dict[str, bool]]] = {
    "add": (np.add, {}),
    "sub": (np.subtract, {}),
    "mul": (np.multiply, {}),
    "truediv": (np.divide, {"quotient": True}),
    "floordiv": (np.floor_divide, {"integer": True}),
    "mod": (np.mod, {"integer": True}),
    "and": (np.bitwise_and, {}),
    "or": (np.bitwise_or, {}),
    "xor": (np.bitwise_xor, {}),
    "lshift": (np.left_shift, {}),
    "rshift": (np.right_shift, {}),
}
for _name, (_op, _flags) in _OPERATORS.items():
    setattr(Tensor, f"__{_name}__", _operator(_op, False, _flags))
    setattr(Tensor, f"__r{_name}__", _operator(_op, True, _flags))
for _name, _op in (
    ("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal), ("eq", np.equal),
    ("ne", np.not_equal),
):  # fmt: skip
    setattr(Tensor, f"__{_name}__", _operator(_op, False, {"compare": True}))
Tensor.__hash__ = None  # type: ignore[assignment]
