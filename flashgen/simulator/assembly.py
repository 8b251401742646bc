"""Inline assembly: the texts that the simulator knows, and how it is taught others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashgen.simulator import held, named, predicates
from flashgen.simulator.context import fail
from flashgen.simulator.dtypes import int32, rounded
from flashgen.simulator.errors import UnsupportedOperationError
from flashgen.simulator.scalars import scalar
from flashgen.simulator.tensors import Tensor, plain

ASM: dict[str, Callable[..., Any]] = {
    "mov.b32 $0, $1;": np.copy,
    "mov.b32 $0, {$1, $2};": lambda low, high: (
        low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16
    ).view(np.int32),
    "mov.b32 {$0, $1}, $2;": lambda x: ((x & 0xFFFF).astype(np.uint16).view(np.int16), (x >> 16).astype(np.int16)),
    "shr.s32 $0, $1, 31;": lambda x: x >> 31,
    "{ .reg .pred seen; .reg .b32 bit; and.b32 bit, $2, $3; setp.ne.b32 seen, bit, 0; selp.f32 $0, $1, 0fFF800000, seen; }": (
        lambda x, bits, bit: np.where(bits & bit, x, np.float32(-np.inf))
    ),
    "bmsk.clamp.b32 $0, 0, $1;": lambda count: (
        ((np.int64(1) << np.clip(count, 0, 32)) - 1).astype(np.uint32).view(np.int32)
    ),
    "ex2.approx.ftz.f32 $0, $1;": np.exp2,
    "ex2.approx.f32 $0, $1;": np.exp2,
    "lg2.approx.f32 $0, $1;": np.log2,
    "rcp.approx.ftz.f32 $0, $1;": lambda x: np.float32(1) / x,
    # What a warp's lanes agree on, each says for itself here.
    "{ .reg .pred far, farther; setp.gt.f32 far, $2, $4; setp.gt.f32 farther, $3, $4; or.pred far, far, farther; "
    "vote.sync.any.pred far, far, 0xffffffff; selp.s32 $0, 1, 0, far; mov.s32 $1, $0; }": (
        lambda most, limit: (most > limit).astype(np.int32)
    ),
    "fma.rn.f32 $0, $1, $2, $3;": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}


def _capped(near: Any, score: Any, limit: Any, rate: Any, cap: Any) -> Any:
    """What `late_cap` of the Hopper forward's text is told of sixteen registers: all of a warp's are far where one is; here each for itself."""
    with np.errstate(over="ignore"):
        far = cap * (1 - 2 / (1 + np.exp2(rate * score)))
    return np.where(np.abs(score) > limit, far, near).astype(np.float32)


def _capped_exponents(score: Any, less: Any, is_far: Any, *coefficients: Any) -> Any:
    """What `capped_exponents` of that text makes of a score: by a polynomial, or exactly where one of its warp's is far."""
    fifth, third, scale, rate, cap = coefficients
    with np.errstate(over="ignore", invalid="ignore"):
        squares = score * score
        near = score * (squares * (squares * fifth + third) + scale) + less
        far = np.where(np.isneginf(score), score, cap * (1 - 2 / (1 + np.exp2(rate * score))) + less)
    return np.where(is_far != 0, far, near).astype(np.float32)


# How texts that are made for sixteen registers begin.
_MADE: dict[str, Callable[..., Any]] = {
    "{ .reg .f32 most, t; .reg .pred far; mov.f32 most, 0f00000000;": _capped,
    "{ .reg .f32 t, u; .reg .pred far; setp.ne.s32 far, $48, 0; @far bra FAR;": _capped_exponents,
}


def register_asm(text: str, function: Callable[..., Any]) -> None:
    """Teach the simulator an inline assembly text.

    Args:
        text: the text, as the kernel gives it; spaces and line ends do not matter.
        function: NumPy arrays of the operands in, the array of the result out (a tuple for several results).
    """
    ASM[" ".join(text.split())] = function


def inline_asm_elementwise(asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any) -> Any:
    """Run a registered assembly text on the elements."""
    plain(*args)
    barrier = named.parse(str(asm), args)
    if barrier is not None:
        named.meet(*barrier)
        return scalar(0, int32)
    text = " ".join(str(asm).split())
    by_start = next((one for start, one in _MADE.items() if text.startswith(start)), None)
    function = by_start or ASM.get(text) or predicates.parse(text) or held.parse(text)
    if function is None:
        fail(
            UnsupportedOperationError,
            f"inline assembly {asm!r}: teach it with flashgen.simulator.register_asm(text, function of arrays)",
        )
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    results = function(*(arg.values if isinstance(arg, Tensor) else np.asarray(arg) for arg in args))
    many = isinstance(dtype, (tuple, list))
    if not tensors and not many:  # of scalars a scalar
        return scalar(np.asarray(results).item(), dtype)
    made = tuple(
        Tensor(rounded(result, kind), kind, tensors[0].layout) if tensors else scalar(np.asarray(result).item(), kind)
        for result, kind in zip(results if many else [results], dtype if many else [dtype], strict=True)
    )
    return made if many else made[0]
