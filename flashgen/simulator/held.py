"""Inline assembly of the Hopper forward that holds references: known to the last letter, so that no other text passes for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from flashgen.simulator.dtypes import Array

_ABOVE = "mul.f32 t, ${2}, 0f3E800000; lg2.approx.ftz.f32 t, t; max.f32 t, t, 0f00000000; min.f32 t, t, 0f41000000; neg.f32 u, ${0}; fma.rn.f32 u, ${1}, $8, u; "
_MOVED = (
    "mul.f32 t, ${2}, $8; shfl.sync.bfly.b32 u, t, 1, 0x1f, 0xffffffff; max.f32 t, t, u; shfl.sync.bfly.b32 u, t, 2, 0x1f, 0xffffffff; "
    "max.f32 t, t, u; max.f32 t, t, ${0}; sub.f32 u, ${0}, t; ex2.approx.ftz.f32 ${1}, u; mov.f32 ${0}, t; "
)
HOLD = (
    "{ .reg .pred above; .reg .f32 t, u; "
    + _ABOVE.format(0, 4, 10)
    + "setp.gt.f32 above, u, t; "
    + _ABOVE.format(1, 5, 11)
    + "setp.gt.or.f32 above, u, t, above; vote.sync.any.pred above, above, 0xffffffff; "
    "mov.f32 $2, 0f3F800000; mov.f32 $3, 0f3F800000; @!above bra HELD; "
    + _MOVED.format(0, 2, 4)
    + _MOVED.format(1, 3, 5)
    + "HELD: }"
)
_RESCALE = re.compile(r"\{ \.reg \.pred moved; setp\.neu\.f32 moved, \$(\d+), ")
ROWS, LANES = 16, 4  # of a warp; that share a row


def rescale(registers: int) -> str:
    """The text that multiplies so many registers of a lane unless all of a warp's corrections are 1."""
    first = 2 * registers
    return (
        f"{{ .reg .pred moved; setp.neu.f32 moved, ${first}, 0f3F800000; setp.neu.or.f32 moved, ${first + 2}, 0f3F800000, moved; "
        "vote.sync.any.pred moved, moved, 0xffffffff; @!moved bra SAME; "
        + " ".join(f"mul.f32 ${i}, ${i}, ${i + first};" for i in range(registers))
        + " SAME: }"
    )


def hold(largest: Any, reference: Any, scale: Any, sums: Any) -> tuple[Array, Array]:
    """What `HOLD` computes of two rows of a lane: references stay while no score of a warp exceeds them by more than its row's share."""
    scaled = largest * scale
    share = np.clip(np.log2(np.maximum(sums * np.float32(0.25), 1)), 0, 8)
    above = (scaled - reference > share).reshape(-1, ROWS, LANES).any((1, 2))
    most = np.fmax(reference, scaled.max(1, keepdims=True))
    found = np.where(np.repeat(above, ROWS)[:, None], most, reference)
    return found, np.exp2(reference - found)


def parse(text: str) -> Callable[..., Any] | None:
    """What a text computes of its operands; None where it is neither of these.

    Args:
        text: with single blanks.
    """
    if text == HOLD:
        return hold
    found = _RESCALE.match(text)
    registers = int(found[1]) // 2 if found else 0
    return np.multiply if found and text == rescale(registers) else None
