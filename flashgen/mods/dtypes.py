"""Element types of a traced function: their names in torch, in the kernel languages and in NumPy, and how values round."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

DType = Literal["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]

BITS: dict[str, int] = {
    "bool": 1,
    "uint8": 8,
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "int64": 64,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
}

# NumPy has no bfloat16: its values are kept as float32, rounded.
_NUMPY: dict[str, Any] = {name: getattr(np, name) for name in BITS if name not in ("bool", "bfloat16")}
_NUMPY |= {"bool": np.bool_, "bfloat16": np.float32}


def is_float(dtype: str) -> bool:
    """Whether a type is floating point."""
    return "float" in dtype


def is_integer(dtype: str) -> bool:
    """Whether a type is an integer; bool is none."""
    return "int" in dtype


def bounds(dtype: str) -> tuple[int, int]:
    """Smallest and largest value of an integer type, or of bool."""
    if dtype == "bool":
        return 0, 1
    if dtype == "uint8":
        return 0, 255
    half = 1 << (BITS[dtype] - 1)
    return -half, half - 1


def computing(dtype: str) -> str:
    """The type that arithmetic of a type is done in: PyTorch computes 16-bit floats in fp32 and rounds each result."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def kernel_name(dtype: str) -> str:
    """The name that Triton and Gluon give a type, without their prefix."""
    return "int1" if dtype == "bool" else dtype


def numpy_type(dtype: str) -> Any:
    """What NumPy keeps values of a type in."""
    return _NUMPY[dtype]


def converted(values: Any, dtype: str) -> Any:
    """A NumPy array cast as PyTorch casts: to bool by `!= 0`, integers wrap, floats round to nearest even.

    Floats beyond an integer type's range have no defined value, in PyTorch neither.
    """
    array = np.asarray(values)
    with np.errstate(all="ignore"):
        if dtype == "bool":
            return array != 0
        if dtype == "bfloat16":
            return _bfloat16(array.astype(np.float32))
        if array.dtype.kind == "f" and is_integer(dtype):
            array = array.astype(np.int64)
        return array.astype(_NUMPY[dtype])


def _bfloat16(values: Any) -> Any:
    """fp32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.atleast_1d(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    result = (rounded & np.uint32(0xFFFF0000)).view(np.float32).reshape(values.shape)
    return np.where(np.isnan(values), values, result)
