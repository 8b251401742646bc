"""Element types, and what rounding to them does.

16-bit floats are held as the float32 that equals them, so that NumPy adds and BLAS multiplies them exactly as fp32
hardware accumulation does; only stores, loads and casts touch their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class DType:
    """One element type of the kernel language.

    Attributes:
        name: Triton's name.
        primitive_bitwidth: bits of an element.
        held: the NumPy type its values are held in.
        raw: the NumPy type of its bytes in memory.
        rank: order of promotion; the higher of two wins.
    """

    def __init__(self, name: str, bits: int, held: Any, rank: int, raw: Any = None) -> None:
        self.name, self.primitive_bitwidth, self.rank = name, bits, rank
        self.held, self.raw = np.dtype(held), np.dtype(held if raw is None else raw)
        self.is_float = self.held.kind == "f"
        self.nbytes = max(1, bits // 8)
        self.narrow = self.is_float and bits == 16
        self.poison: Any = np.nan if self.is_float else (True if bits == 1 else 0x5A)

    def __repr__(self) -> str:
        return self.name

    @property
    def scalar(self) -> DType:
        return self

    @property
    def element_ty(self) -> DType:
        return self

    @property
    def itemsize(self) -> int:
        return self.nbytes

    def is_floating(self) -> bool:
        return bool(self.is_float)

    def is_int(self) -> bool:
        return not self.is_float

    def is_bf16(self) -> bool:
        return self is bfloat16

    def is_fp16(self) -> bool:
        return self is float16

    def is_fp32(self) -> bool:
        return self is float32

    def is_fp8(self) -> bool:
        return False


int1 = DType("int1", 1, np.bool_, 0)
int8, uint8 = DType("int8", 8, np.int8, 1), DType("uint8", 8, np.uint8, 1)
int16, uint16 = DType("int16", 16, np.int16, 2), DType("uint16", 16, np.uint16, 2)
int32, uint32 = DType("int32", 32, np.int32, 3), DType("uint32", 32, np.uint32, 3)
int64, uint64 = DType("int64", 64, np.int64, 4), DType("uint64", 64, np.uint64, 4)
float16 = DType("float16", 16, np.float32, 10, np.float16)
bfloat16 = DType("bfloat16", 16, np.float32, 10, np.uint16)
float32, float64 = DType("float32", 32, np.float32, 12), DType("float64", 64, np.float64, 13)
ALL = {
    t.name: t
    for t in (
        int1, int8, uint8, int16, uint16, int32, uint32, int64, uint64, float16, bfloat16, float32, float64,
    )
}  # fmt: skip


def of_torch(dtype: Any) -> DType | None:
    """The element type of a torch dtype, None where there is none."""
    name = str(dtype).removeprefix("torch.")
    return ALL.get("int1" if name == "bool" else name)


def bfloat16_bits(values: Array) -> Array:
    """The bfloat16 nearest to each float32, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    rounded_bits = ((bits + half) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded_bits = np.where(nan, np.uint16(0x7FC0), rounded_bits)
    result: Array = rounded_bits.reshape(np.shape(values))
    return result


def decode(raw: Array, dtype: DType) -> Array:
    """Bytes of memory as held values; always a copy or a new array for 16-bit floats."""
    if dtype is bfloat16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(dtype.held)


def encode(values: Array, dtype: DType) -> Array:
    """Held values as bytes of memory, rounded to nearest even."""
    return bfloat16_bits(values) if dtype is bfloat16 else values.astype(dtype.raw)


def rounded(values: Any, dtype: DType) -> Array:
    """Values as `dtype` holds them."""
    if dtype is bfloat16:
        return decode(bfloat16_bits(np.asarray(values, np.float32)), dtype)
    if dtype is float16:
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)
    array: Array = np.asarray(values)
    if array.dtype.kind == "f" and not dtype.is_float:
        array = np.trunc(np.nan_to_num(array)).astype(np.int64)
    return array.astype(dtype.held, copy=False)
