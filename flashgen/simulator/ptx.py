"""Inline assembly that holds all of a lane's part of a tile of scores, run statement by statement: a warp's lanes side by side, a branch by warps.

The tile is a warpgroup's, as wgmma lays it out and `by_lanes` of the Hopper forward shapes it: rows, groups of eight columns, lanes that share a row, two
neighbours. Registers that a text has not written are poison.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from flashgen.simulator.context import fail
from flashgen.simulator.dtypes import Array, DType, bfloat16, encode, float16
from flashgen.simulator.errors import UnsupportedOperationError

_WARPS, _LANES = 4, 32
_POISON = {"f": np.float32(np.nan), "r": np.int32(0x5A5A5A5A)}


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _packed(kind: DType) -> Callable[[Array, Array], Array]:
    """The first operand is the upper half."""

    def pack(high: Array, low: Array) -> Array:
        bits = [encode(x, kind).view(np.uint16).astype(np.uint32) for x in (high, low)]
        found: Array = (bits[0] << 16 | bits[1]).view(np.int32)
        return found

    return pack


_COMPUTES: dict[str, Callable[..., Array]] = {
    "mov.f32": np.copy,
    "neg.f32": np.negative,
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "mul.f32": np.multiply,
    "max.f32": np.fmax,
    "min.f32": np.fmin,
    "fma.rn.f32": _fma,
    "ex2.approx.ftz.f32": np.exp2,
    "cvt.rn.bf16x2.f32": _packed(bfloat16),
    "cvt.rn.f16x2.f32": _packed(float16),
    "setp.gt.f32": np.greater,
    "setp.gt.or.f32": lambda a, b, before: (a > b) | before,
    "vote.sync.any.pred": lambda told, members: np.repeat(told.any(1, keepdims=True), _LANES, 1),
    "shfl.sync.bfly.b32": lambda x, mask, *_: x[:, np.arange(_LANES) ^ int(mask)],
}


@lru_cache(maxsize=64)
def _statements(text: str) -> tuple[tuple[str, ...], ...]:
    """Words of each statement; a label stands alone, with its colon."""
    body = re.sub(r"(\w+): ", r"\1:; ", text.removeprefix("{ ").removesuffix("}") + " ")
    found = (tuple(re.findall(r"[^\s,]+", one)) for one in body.split(";"))
    return tuple(words for words in found if words and words[0] != ".reg")


def is_of_a_tile(args: Sequence[Any], pack: int) -> bool:
    """Whether a call hands over all that a lane has of a tile at once."""
    shapes: list[tuple[int, ...]] = [np.shape(arg.values) for arg in args if hasattr(arg, "values")]
    whole: tuple[int, ...] = max(shapes, key=np.prod, default=())
    return len(whole) == 4 and whole[0] == 16 * _WARPS and whole[2:] == (4, 2) and pack == 4 * whole[1]


def _registers(x: Array, groups: int) -> Array:
    """A tile by registers, warps and lanes."""
    x = np.broadcast_to(x, (16 * _WARPS, groups, 4, 2)).reshape(_WARPS, 2, 8, groups, 4, 2)
    return x.transpose(3, 1, 5, 0, 2, 4).reshape(4 * groups, _WARPS, _LANES)


def _tile(registers: Array, groups: int) -> Array:
    """The inverse."""
    x = registers.reshape(groups, 2, 2, _WARPS, 8, 4)
    return np.ascontiguousarray(x.transpose(3, 1, 4, 0, 5, 2).reshape(16 * _WARPS, groups, 4, 2))


def run(text: str, constraints: str, groups: int, *operands: Array) -> list[Array]:
    """The outputs of a text.

    Args:
        text: with single blanks.
        constraints: of its operands, outputs first.
        groups: of eight columns.
        operands: arrays that broadcast to a tile.
    """
    n, kinds = 4 * groups, constraints.replace("&", "").split(",")
    outputs = [kind.removeprefix("=") for kind in kinds if kind.startswith("=")]
    state: dict[str, Array] = {
        f"${i}": np.full((_WARPS, _LANES), _POISON[kind], _POISON[kind].dtype) for i, kind in enumerate(outputs)
    }
    given = [register for x in operands for register in _registers(np.asarray(x), groups)]
    for i, (kind, register) in enumerate(zip(kinds[len(outputs) :], given, strict=True), len(outputs)):
        state[f"${kind}" if kind.isdigit() else f"${i}"] = register.copy()
    awake, waits = np.ones(_WARPS, bool), [""] * _WARPS
    with np.errstate(all="ignore"):
        for words in _statements(text):
            awake = _step(words, state, awake, waits)
    return [_tile(np.stack([state[f"${i}"] for i in range(k, k + n)]), groups) for k in range(0, len(outputs), n)]


def _step(words: tuple[str, ...], state: dict[str, Array], awake: Array, waits: list[str]) -> Array:
    """Runs a statement in the warps that are awake; says who is then."""
    opcode, *rest = words
    if opcode.endswith(":"):
        return np.array([on or label == opcode[:-1] for on, label in zip(awake, waits, strict=True)])
    if not awake.any():
        return awake
    if opcode.startswith("@"):
        told = state[opcode.lstrip("@!")]
        taken = ~told if opcode.startswith("@!") else told
        if (taken.any(1) != taken.all(1))[awake].any() or rest[0] != "bra":
            fail(UnsupportedOperationError, f"inline assembly: lanes of a warp part at {' '.join(words)!r}")
        leaves = taken.all(1) & awake
        for warp in np.flatnonzero(leaves):
            waits[warp] = rest[1]
        return awake & ~leaves
    if opcode not in _COMPUTES:
        fail(UnsupportedOperationError, f"inline assembly: {' '.join(words)!r}")
    target, *sources = rest
    found = _COMPUTES[opcode](*(state[word] if word in state else _number(word) for word in sources))
    found = np.broadcast_to(found, (_WARPS, _LANES))
    old = state.get(target, np.zeros((_WARPS, _LANES), found.dtype))
    state[target] = np.where(awake[:, None], found, old)
    return awake


def _number(word: str) -> Any:
    """A literal; what nothing has written is refused."""
    if word.startswith("0f"):
        return np.full((_WARPS, _LANES), np.uint32(int(word[2:], 16)).view(np.float32))
    try:
        return int(word, 0)
    except ValueError:
        return fail(UnsupportedOperationError, f"inline assembly reads {word}, which nothing has written")
