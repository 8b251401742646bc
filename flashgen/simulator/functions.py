"""The functions of the kernel language that compute: creation, elementwise functions, reductions, layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from flashgen.simulator import context
from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.dtypes import Array, DType, float32, int32, rounded
from flashgen.simulator.errors import IntegerError, KernelAssertionError, ShapeError, UnsupportedOperationError
from flashgen.simulator.layouts import Layout, SliceLayout, common, inferred
from flashgen.simulator.scalars import Scalar, scalar
from flashgen.simulator.tensors import Tensor, binary, plain, promoted, sizes


def program_id(axis: Any) -> Any:
    """Index of the running CTA along an axis of the grid."""
    return scalar(partition().cta.pid[int(axis)], int32)


def num_programs(axis: Any) -> Any:
    """Size of the grid along an axis."""
    return scalar(launch().grid[int(axis)], int32)


def num_warps() -> int:
    """Warps of the running partition; a compile-time value."""
    return partition().num_warps


def num_ctas() -> int:
    """CTAs of a cluster: clusters are not simulated."""
    return 1


def arange(start: Any, end: Any, layout: Layout | None = None) -> Tensor:
    """Consecutive int32 values."""
    return Tensor(np.arange(int(start), int(end), dtype=np.int32), int32, layout)


def full(shape: Any, value: Any, dtype: DType, layout: Layout | None = None) -> Tensor:
    """A tensor of one value."""
    plain(value)
    return Tensor(np.full(sizes([shape]), rounded(np.asarray(value), dtype), dtype.held), dtype, layout)


def zeros(shape: Any, dtype: DType, layout: Layout | None = None) -> Tensor:
    """A tensor of zeros."""
    return full(shape, 0, dtype, layout)


def full_like(input: Tensor, value: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    """A tensor of one value, in another one's shape, dtype and layout."""
    return full(shape or input.shape, value, dtype or input.dtype, layout or input.layout)


def zeros_like(input: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
    """A tensor of zeros, in another one's shape, dtype and layout."""
    return full_like(input, 0, shape, dtype, layout)


def convert_layout(value: Any, layout: Layout, assert_trivial: bool = False) -> Tensor:
    """The same values in another layout."""
    plain(value)
    return Tensor(value.values, value.dtype, layout)


def set_auto_layout(value: Any, layout: Layout) -> Tensor:
    """Fix an inferred layout."""
    return convert_layout(value, layout)


def where(condition: Any, x: Any, y: Any) -> Any:
    """Values of x where the condition holds, else of y."""
    plain(condition, x, y)
    tensors = [operand for operand in (condition, x, y) if isinstance(operand, Tensor)]
    if not tensors:
        chosen = x if condition else y
        # A literal becomes a value of the kernel, which can be cast.
        return chosen if hasattr(chosen, "to") or isinstance(chosen, bool) else scalar(chosen, _of_python(x, y))
    layout = functools.reduce(common, (tensor.layout for tensor in tensors))
    if len({tensor.values.ndim for tensor in tensors}) > 1:
        fail(ShapeError, f"where: operands of shapes {[tensor.shape for tensor in tensors]}")
    dtype = promoted(x, y) if isinstance(x, Tensor) or isinstance(y, Tensor) else _of_python(x, y)
    a, b = (v.values if isinstance(v, Tensor) else np.asarray(v, dtype.held) for v in (x, y))
    chosen = np.where(condition.values if isinstance(condition, Tensor) else bool(condition), a, b)
    return Tensor(chosen.astype(dtype.held, copy=False), dtype, layout)


def _of_python(*values: Any) -> DType:
    return float32 if any(isinstance(value, float) for value in values) else int32


def unary(name: str, function: Callable[[Any], Array]) -> Callable[[Any], Any]:
    """An elementwise function of the language; integers become float32."""

    def elementwise(x: Any) -> Any:
        plain(x)
        if not isinstance(x, Tensor):
            with np.errstate(all="ignore"):
                return scalar(function(np.float32(x)), float32)
        dtype = x.dtype if x.dtype.is_float else float32
        result = function(x.values if x.dtype.is_float else x.values.astype(np.float32))
        return Tensor(rounded(result, dtype) if dtype.narrow else result, dtype, x.layout)

    elementwise.__name__ = name
    return elementwise


def absolute(x: Any) -> Any:
    """The absolute value, of the operand's own type."""
    plain(x)
    return Tensor(np.abs(x.values), x.dtype, x.layout) if isinstance(x, Tensor) else abs(x)


_erf = np.vectorize(math.erf, otypes=[np.float32])
ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    name: unary(name, function)
    for name, function in (
        ("exp", np.exp), ("exp2", np.exp2), ("log", np.log), ("log2", np.log2), ("sqrt", np.sqrt), ("sqrt_rn", np.sqrt),
        ("sin", np.sin), ("cos", np.cos), ("floor", np.floor), ("ceil", np.ceil), ("erf", _erf),
        ("rsqrt", lambda x: np.float32(1) / np.sqrt(x)),
    )
}  # fmt: skip


def _reduction(input: Any, axis: Any, keep_dims: bool, function: Callable[..., Any], dtype: DType) -> Any:
    plain(input)
    along = None if axis is None else int(axis)
    values = input.values if dtype is input.dtype else rounded(input.values, dtype)
    result = function(values, axis=along, keepdims=keep_dims)
    if np.ndim(result) == 0:
        return scalar(result, dtype)
    if dtype is int32:  # NumPy widened a sum to 64 bits
        low, high = np.min(result, initial=0), np.max(result, initial=0)
        if low < -(2**31) or high >= 2**31:
            fail(IntegerError, f"int32 overflow in a sum: [{low}, {high}]")
    return Tensor(rounded(result, dtype), dtype, _reduced(input.layout, along, keep_dims))


def reduce_sum(input: Any, axis: Any = None, keep_dims: bool = False, dtype: DType | None = None) -> Any:
    """The sum along an axis, or of all elements; integers narrower than int32 are summed as int32."""
    kind = dtype or (int32 if not input.dtype.is_float and input.dtype.rank < int32.rank else input.dtype)
    return _reduction(input, axis, keep_dims, np.sum, kind)


def _extreme(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(
        input: Any,
        axis: Any = None,
        return_indices: bool = False,
        return_indices_tie_break_left: bool = True,
        keep_dims: bool = False,
    ) -> Any:
        if return_indices:
            fail(UnsupportedOperationError, f"{name} with return_indices is not simulated")
        return _reduction(input, axis, keep_dims, function, input.dtype)

    extreme.__name__ = name
    return extreme


reduce_max, reduce_min = _extreme("max", np.max), _extreme("min", np.min)  # a NaN stays: poison must show


def _reduced(layout: Layout | None, axis: int | None, keep_dims: bool) -> Layout | None:
    if inferred(layout) or axis is None:
        return None
    return layout if keep_dims else SliceLayout(axis, layout)


def reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: bool = False) -> Any:
    """Reduce along an axis with a function of two values, from the left."""
    plain(input)
    slices = [Tensor(part, input.dtype) for part in np.moveaxis(input.values, int(axis), 0)]
    result = functools.reduce(combine_fn, slices)
    if result.values.ndim == 0:
        return scalar(result.values[()], input.dtype)
    values = np.expand_dims(result.values, int(axis)) if keep_dims else result.values
    return Tensor(values, input.dtype, _reduced(input.layout, int(axis), keep_dims))


def _extremum(name: str, function: Callable[..., Array], pick: Callable[..., Any]) -> Callable[..., Any]:
    def extremum(x: Any, y: Any, propagate_nan: Any = None) -> Any:
        plain(x, y)
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return binary(x, y, function)
        chosen = pick(x, y)
        run_time = isinstance(x, Scalar) or isinstance(y, Scalar)
        return scalar(chosen, int32) if run_time and type(chosen) is int else chosen

    extremum.__name__ = name
    return extremum


maximum, minimum = _extremum("maximum", np.fmax, max), _extremum("minimum", np.fmin, min)


def clamp(x: Any, min: Any, max: Any, propagate_nan: Any = None) -> Any:
    """The value between two bounds."""
    return minimum(maximum(x, min), max)


def fma(x: Any, y: Any, z: Any) -> Any:
    """x·y + z, rounded twice where the hardware rounds once."""
    return x * y + z


def umulhi(x: Any, y: Any) -> Any:
    """The upper 32 bits of a product of uint32."""
    return binary(
        x, y, lambda a, b: (a.astype(np.uint64) * np.asarray(b, np.uint64) >> np.uint64(32)).astype(np.uint32)
    )


def fdiv(x: Any, y: Any, ieee_rounding: bool = False, approx: bool = False) -> Any:
    """The quotient x / y."""
    return x / y


def add(x: Any, y: Any, sanitize_overflow: bool = True) -> Any:
    """The sum x + y."""
    return x + y


def sub(x: Any, y: Any, sanitize_overflow: bool = True) -> Any:
    """The difference x - y."""
    return x - y


def mul(x: Any, y: Any, sanitize_overflow: bool = True) -> Any:
    """The product x * y."""
    return x * y


def cdiv(x: Any, div: Any) -> Any:
    """The quotient x / div, rounded up."""
    return (x + (div - 1)) // div


def expand_dims(input: Tensor, axis: Any) -> Tensor:
    """Add a dimension of size 1."""
    where_to = int(axis) % (input.values.ndim + 1)
    return input[tuple(None if i == where_to else slice(None) for i in range(input.values.ndim + 1))]


def broadcast(input: Any, other: Any) -> Any:
    """Two operands in their common shape."""
    zero = binary(input, other, lambda a, b: np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))))
    return tuple(
        Tensor(np.broadcast_to(v.values, zero.values.shape), v.dtype, zero.layout) if isinstance(v, Tensor) else v
        for v in (input, other)
    )


def reshape(input: Tensor, *shape: Any, can_reorder: bool = False) -> Tensor:
    """The values in another shape, their layout inferred."""
    plain(input)
    return input.reshape(*shape)


def permute(input: Tensor, *dims: Any) -> Tensor:
    """Dimensions in another order."""
    plain(input)
    return input.permute(*dims)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a last dimension of 2."""
    plain(a)
    return a.split()


def join(a: Tensor, b: Tensor) -> Tensor:
    """Two tensors along a new last dimension."""
    plain(a, b)
    return Tensor(np.stack([a.values, b.values], -1), a.dtype)


def cast(input: Any, dtype: DType, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Any:
    """Values as another type."""
    plain(input)
    return input.to(dtype, bitcast) if hasattr(input, "to") else scalar(input, dtype)


def to_tensor(x: Any) -> Any:
    """A value as a run-time value."""
    return scalar(x, int32) if type(x) is int else x


def _hint(name: str) -> Callable[..., Any]:
    def hint(input: Any, values: Any = None) -> Any:
        return input

    hint.__name__ = name
    return hint


multiple_of, max_contiguous, max_constancy = map(_hint, ("multiple_of", "max_contiguous", "max_constancy"))


def assume(cond: Any) -> None:
    """A promise to the compiler, held to here."""
    if not isinstance(cond, Tensor) and not cond:
        fail(KernelAssertionError, "assume: the condition does not hold")


def device_assert(cond: Any, msg: str = "", mask: Any = None) -> None:
    """Fail where a condition does not hold."""
    values = cond.values if isinstance(cond, Tensor) else np.asarray(bool(cond))
    if mask is not None:
        values = values | ~(mask.values if isinstance(mask, Tensor) else np.asarray(bool(mask)))
    if not values.all():
        fail(KernelAssertionError, f"device_assert: {msg}")


def static_assert(cond: Any, msg: str = "") -> None:
    """Fail where a compile-time condition does not hold."""
    if not cond:
        fail(KernelAssertionError, f"static_assert: {msg}")


def device_print(prefix: str, *args: Any, hex: bool = False) -> None:
    """Print nothing: a simulated kernel is silent."""


def static_print(*values: Any, sep: str = " ", end: str = "\n", file: Any = None, flush: bool = False) -> None:
    """Print nothing: a simulated kernel is silent."""


def device_range(*bounds: Any, **_: Any) -> Any:
    """Python's range; in a kernel its values are run-time int32. Hints of the compiler are ignored."""
    if context.active() is None:
        return range(*bounds)
    return (scalar(value, int32) for value in range(*map(int, bounds)))


def static_range(arg1: Any, arg2: Any = None, step: Any = None) -> range:
    """A range unrolled at compile time: its values are literals."""
    first, end = (0, arg1) if arg2 is None else (arg1, arg2)
    return range(int(first), int(end), 1 if step is None else int(step))
