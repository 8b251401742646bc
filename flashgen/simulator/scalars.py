"""Integers of a kernel: int32 overflow is an error, and so is a division whose sign C and Python treat differently."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from flashgen.simulator.context import fail
from flashgen.simulator.dtypes import DType, int1, int32, int64, rounded
from flashgen.simulator.errors import IntegerError, UnsupportedOperationError

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


class Scalar(int):
    """A run-time integer of the kernel, int32 unless it is an `Int64`."""

    dtype: DType = int32
    shape: tuple[int, ...] = ()

    @property
    def type(self) -> DType:
        return self.dtype

    def to(self, dtype: DType, bitcast: bool = False) -> Any:
        return _bits(int(self), self.dtype, dtype) if bitcast else scalar(int(self), dtype)

    def __neg__(self) -> Any:
        return _made(-int(self), self, self)

    def __invert__(self) -> Any:
        return _made(~int(self), self, self)


class Int64(Scalar):
    """A run-time int64."""

    dtype = int64


class Float(float):
    """A run-time float, rounded to its type; what arithmetic makes of it has its type and is not rounded."""

    dtype: DType
    shape: tuple[int, ...] = ()

    def __neg__(self) -> Any:
        return _float(-float(self), self.dtype)

    def __abs__(self) -> Any:
        return _float(abs(float(self)), self.dtype)

    def to(self, dtype: DType, bitcast: bool = False) -> Any:
        return _bits(float(self), self.dtype, dtype) if bitcast else scalar(float(self), dtype)


def _float(value: float, dtype: DType) -> Float:
    made = Float(value)
    made.dtype = dtype
    return made


def _of_floats(op: Callable[[float, float], float], swap: bool) -> Callable[[Any, Any], Any]:
    def method(self: Float, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        a, b = (float(other), float(self)) if swap else (float(self), float(other))
        with np.errstate(all="ignore"):
            return _float(float(op(np.float64(a), np.float64(b))), self.dtype)

    return method


def _made(value: int, a: Any, b: Any) -> Any:
    """The result of an operation on a and b, at least one of them a Scalar; a literal takes the other's width."""
    wide = isinstance(a, Int64) or isinstance(b, Int64)
    wide = wide or any(type(x) is int and not INT32_MIN <= x <= INT32_MAX for x in (a, b))
    if wide:
        if not -(2**63) <= value < 2**63:
            fail(IntegerError, f"int64 overflow: {value}")
        return int.__new__(Int64, value)
    if not INT32_MIN <= value <= INT32_MAX:
        fail(IntegerError, f"int32 overflow: {value} (cast an operand to int64)")
    return int.__new__(Scalar, value)


def _arithmetic(op: Callable[[int, int], int], swap: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        # int's own method: `op` of a subclass would come here again.
        value = op(other, self) if swap else op(self, other)
        kind = type(other)
        # What most are, without another function call.
        narrow = type(self) is Scalar and (kind is Scalar or (kind is int and INT32_MIN <= other <= INT32_MAX))
        if narrow and INT32_MIN <= value <= INT32_MAX:
            return int.__new__(Scalar, value)
        return _made(value, self, other)

    return method


def _division(op: Callable[[int, int], int], swap: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        a, b = (int(other), int(self)) if swap else (int(self), int(other))
        if b == 0:
            fail(IntegerError, f"division of {a} by zero")
        if a < 0 or b < 0:
            fail(IntegerError, f"division of negative integers ({a}, {b}): Triton truncates, Python floors")
        return _made(op(a, b), self, other)

    return method


for _name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift"):
    _op = getattr(int, f"__{_name}__")
    setattr(Scalar, f"__{_name}__", _arithmetic(_op, False))
    setattr(Scalar, f"__r{_name}__", _arithmetic(_op, True))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(Float, f"__{_name}__", _of_floats(getattr(operator, _name), False))
    setattr(Float, f"__r{_name}__", _of_floats(getattr(operator, _name), True))
for _name, _op in (("floordiv", operator.floordiv), ("mod", operator.mod)):
    setattr(Scalar, f"__{_name}__", _division(_op, False))
    setattr(Scalar, f"__r{_name}__", _division(_op, True))


def _bits(value: float, held: DType, dtype: DType) -> Any:
    """The bits of a scalar seen as another type."""
    if held.raw.itemsize != dtype.raw.itemsize or held.narrow or dtype.narrow:
        fail(UnsupportedOperationError, f"bitcast of {held} to {dtype}")
    return scalar(np.asarray(value, held.held).view(dtype.held)[()], dtype)


def scalar(value: Any, dtype: DType) -> Any:
    """A Python value as a run-time scalar of `dtype`."""
    if dtype is int32:
        number = int(value)
        if not INT32_MIN <= number <= INT32_MAX:
            fail(IntegerError, f"{number} does not fit into int32")
        return int.__new__(Scalar, number)
    if dtype.is_float:
        made = Float(rounded(np.asarray(value), dtype) if dtype.nbytes <= 4 else value)
        made.dtype = dtype
        return made
    if dtype is int1:
        return bool(value)
    number = int(value)
    if dtype is int64:
        return int.__new__(Int64, number)
    return number % (1 << dtype.primitive_bitwidth) if dtype.held.kind == "u" else number
