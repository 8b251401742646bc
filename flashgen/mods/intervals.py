"""A graph on intervals: for ranges of the indices, a range that holds every value (abstract interpretation).

Sound by construction: each rule gives bounds that no value of the operation leaves, given operands within theirs; what has no
rule may be anything. All bounds are NumPy arrays, so that many tiles are judged in one pass. A bool is an integer of
0 and 1: [1, 1] is *all true*, [0, 0] *all false*, [0, 1] *unknown*. Method: Cousot and Cousot, POPL 1977.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashgen.mods import semantics
from flashgen.mods.dtypes import bounds, converted, is_float
from flashgen.mods.graph import COMPARISONS, Node, ordered

Array = Any
_SAFE = float(1 << 62)  # products beyond it may leave int64 while they are computed

# Longer sequences than any kernel of this house can be given; so small that `q_idx + kv_idx` cannot overflow.
INDEX_LIMIT = (1 << 30) - 1


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds of an integer or bool (int64) or of a float (float64), both inclusive.

    Attributes:
        low, high: arrays that broadcast.
        nan: whether a float may be NaN, which no bound says.
    """

    low: Array
    high: Array
    nan: bool = False


Loads = Callable[[Node, Sequence[Interval]], Interval]


def anything(dtype: str) -> Interval:
    """Every value of a type."""
    if is_float(dtype):
        return Interval(np.float64(-np.inf), np.float64(np.inf), nan=True)
    low, high = bounds(dtype)
    return Interval(np.int64(low), np.int64(high))


def evaluate(
    root: Node, inputs: Mapping[str, Interval], loads: Loads | None = None, known: dict[int, Interval] | None = None
) -> Interval:
    """Bounds of a value.

    Args:
        root: whose bounds are wanted.
        inputs: of the arguments; one that is missing may be anything (an index: 0 to `INDEX_LIMIT`).
        loads: bounds of a captured tensor's elements by the load's node and its indices' bounds; without, anything.
        known: bounds by id of a node that are given; filled with those of every node on the way.

    Returns:
        The bounds, of the inputs' common shape.
    """
    values: dict[int, Interval] = known if known is not None else {}
    with np.errstate(all="ignore"):
        for node in ordered(root):
            if id(node) not in values:
                values[id(node)] = _one(node, [values[id(arg)] for arg in node.args], inputs, loads)
    return values[id(root)]


def _one(node: Node, args: list[Interval], inputs: Mapping[str, Interval], loads: Loads | None) -> Interval:
    if node.op == "input":
        return inputs.get(node.value) or (anything("float32") if node.value in ("score", "grad") else _INDEX)
    if node.op == "const":
        kind = np.float64 if is_float(node.dtype) else np.int64
        return Interval(kind(node.value), kind(node.value), nan=bool(node.value != node.value))
    if node.op == "load":
        return loads(node, args) if loads is not None else anything(node.dtype)
    if node.op == "cast":
        return _cast(args[0], node.args[0].dtype, node.dtype)
    if node.op == "where":
        return _where(*args)
    if node.op in COMPARISONS:
        return _compare(node.op, *args)
    rule = _RULES.get(node.op)
    if rule is None:
        return anything(node.dtype)
    if is_float(node.dtype):
        return _rounded(rule(node.dtype, *args), node.dtype)
    return _within(rule(node.dtype, *args), node.dtype)


_INDEX = Interval(np.int64(0), np.int64(INDEX_LIMIT))


def _within(found: Interval | None, dtype: str) -> Interval:
    """Where an integer may have wrapped round it may be anything."""
    every = anything(dtype)
    if found is None:
        return every
    inside = (found.low >= every.low) & (found.high <= every.high)
    return Interval(np.where(inside, found.low, every.low), np.where(inside, found.high, every.high))


def _rounded(found: Interval | None, dtype: str) -> Interval:
    """Bounds rounded as values are, which keeps their order; a bound that is no number may be anything."""
    if found is None:
        return anything(dtype)
    low = np.asarray(converted(np.asarray(found.low), dtype), np.float64)
    high = np.asarray(converted(np.asarray(found.high), dtype), np.float64)
    lost = np.isnan(low) | np.isnan(high)
    # inf - inf and 0 * inf are NaN: from infinite bounds on nothing is promised.
    endless = bool(np.any(lost | np.isinf(low) | np.isinf(high)))
    return Interval(np.where(lost, -np.inf, low), np.where(lost, np.inf, high), nan=found.nan or endless)


def _cast(x: Interval, source: str, dtype: str) -> Interval:
    if is_float(dtype):
        return _rounded(Interval(np.asarray(x.low, np.float64), np.asarray(x.high, np.float64), x.nan), dtype)
    if is_float(source):
        if x.nan:
            return anything(dtype)
        low, high = np.trunc(x.low), np.trunc(x.high)
        inside = (np.abs(low) < _SAFE) & (np.abs(high) < _SAFE)
        every = anything(dtype)
        return _within(
            Interval(
                np.where(inside, low, every.low).astype(np.int64), np.where(inside, high, every.high).astype(np.int64)
            ),
            dtype,
        )
    return _within(x, dtype)


def _where(condition: Interval, x: Interval, y: Interval) -> Interval:
    true, false = condition.low == 1, condition.high == 0
    low = np.where(true, x.low, np.where(false, y.low, np.minimum(x.low, y.low)))
    high = np.where(true, x.high, np.where(false, y.high, np.maximum(x.high, y.high)))
    return Interval(low, high, nan=x.nan or y.nan)


def truth(true: Array, false: Array) -> Interval:
    """A bool that is surely true, surely false, or unknown."""
    return Interval(np.where(true, 1, 0), np.where(false, 0, 1))


def _compare(op: str, x: Interval, y: Interval) -> Interval:
    if x.nan or y.nan:
        return Interval(np.int64(0), np.int64(1))
    if op in ("gt", "ge"):
        return _compare({"gt": "lt", "ge": "le"}[op], y, x)
    if op == "lt":
        return truth(x.high < y.low, x.low >= y.high)
    if op == "le":
        return truth(x.high <= y.low, x.low > y.high)
    same = (x.low == x.high) & (y.low == y.high) & (x.low == y.low)
    apart = (x.high < y.low) | (x.low > y.high)
    return truth(same, apart) if op == "eq" else truth(apart, same)


# -- rules: the operation's type and its operands' bounds -> bounds before rounding or wrapping; None for no promise --


def _corners(op: str) -> Callable[..., Interval | None]:
    """An operation that is monotone in each operand, up or down: its extremes are at the corners."""

    def rule(dtype: str, x: Interval, y: Interval) -> Interval | None:
        pairs = [(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
        if not is_float(dtype) and op == "mul":
            largest = np.maximum(np.abs(np.asarray(x.low, float)), np.abs(np.asarray(x.high, float))) * np.maximum(
                np.abs(np.asarray(y.low, float)), np.abs(np.asarray(y.high, float))
            )
            if np.any(largest >= _SAFE):
                return None
        found = [semantics.apply(op, pair, "float64") for pair in pairs]
        low, high = found[0], found[0]
        for value in found[1:]:
            low, high = np.minimum(low, value), np.maximum(high, value)
        return Interval(low, high, nan=x.nan or y.nan)

    return rule


def _sum(dtype: str, x: Interval, y: Interval) -> Interval | None:
    if dtype == "int64" and (_large(x) or _large(y)):
        return None
    return Interval(x.low + y.low, x.high + y.high, nan=x.nan or y.nan)


def _difference(dtype: str, x: Interval, y: Interval) -> Interval | None:
    if dtype == "int64" and (_large(x) or _large(y)):
        return None
    return Interval(x.low - y.high, x.high - y.low, nan=x.nan or y.nan)


def _large(x: Interval) -> bool:
    return bool(np.any(np.abs(np.asarray(x.low, float)) >= _SAFE) or np.any(np.abs(np.asarray(x.high, float)) >= _SAFE))


def _quotient(op: str) -> Callable[..., Interval | None]:
    corners = _corners(op)

    def rule(dtype: str, x: Interval, y: Interval) -> Interval | None:
        positive, negative = y.low > 0, y.high < 0
        if not np.all(positive | negative):
            return None  # a divisor that may be 0
        return corners(dtype, x, y)

    return rule


def _remainder(dtype: str, x: Interval, y: Interval) -> Interval | None:
    """Python's `%`: exact where the dividend stays within one multiple of a constant divisor."""
    if not np.all(y.low > 0):
        return None
    fixed = (y.low == y.high) & (np.floor_divide(x.low, y.low) == np.floor_divide(x.high, y.low))
    low = np.where(fixed, np.remainder(x.low, y.low), 0)
    high = np.where(fixed, np.remainder(x.high, y.low), y.high - 1)
    small = (x.low >= 0) & (x.high < y.low)
    return Interval(np.where(small, x.low, low), np.where(small, x.high, high))


def _c_remainder(dtype: str, x: Interval, y: Interval) -> Interval | None:
    if not np.all(x.low >= 0):
        return None
    return _remainder(dtype, x, y)


def _monotone(op: str) -> Callable[..., Interval | None]:
    def rule(dtype: str, x: Interval) -> Interval | None:
        return Interval(semantics.apply(op, [x.low], "float64"), semantics.apply(op, [x.high], "float64"), nan=x.nan)

    return rule


def _absolute(dtype: str, x: Interval) -> Interval | None:
    crosses = (x.low <= 0) & (x.high >= 0)
    a, b = np.abs(x.low), np.abs(x.high)
    return Interval(np.where(crosses, 0, np.minimum(a, b)), np.maximum(a, b), nan=x.nan)


def _negated(dtype: str, x: Interval) -> Interval | None:
    return None if dtype == "int64" and _large(x) else Interval(-x.high, -x.low, nan=x.nan)


def _extreme(function: Callable[[Array, Array], Array]) -> Callable[..., Interval | None]:
    return lambda dtype, x, y: Interval(function(x.low, y.low), function(x.high, y.high), nan=x.nan or y.nan)


def _bitwise(logic: Callable[[Interval, Interval], Interval], bits: Callable[..., Interval | None]) -> Any:
    return lambda dtype, x, y: logic(x, y) if dtype == "bool" else bits(x, y)


def _xor(x: Interval, y: Interval) -> Interval:
    known = (x.low == x.high) & (y.low == y.high)
    return truth(known & (x.low != y.low), known & (x.low == y.low))


def _mask_bits(x: Interval, y: Interval) -> Interval | None:
    """X & y of integers: no more than either that is not negative."""
    fine_x, fine_y = np.all(x.low >= 0), np.all(y.low >= 0)
    if fine_x and fine_y:
        return Interval(np.zeros_like(x.low), np.minimum(x.high, y.high))
    if fine_x or fine_y:
        return Interval(np.zeros_like(x.low), x.high if fine_x else y.high)
    return None


def _join_bits(x: Interval, y: Interval) -> Interval | None:
    """X | y of integers that are not negative: at least the larger, at most their sum."""
    if np.all(x.low >= 0) and np.all(y.low >= 0) and not (_large(x) or _large(y)):
        return Interval(np.maximum(x.low, y.low), x.high + y.high)
    return None


def _inverted(dtype: str, x: Interval) -> Interval | None:
    return Interval(1 - x.high, 1 - x.low) if dtype == "bool" else Interval(-1 - x.high, -1 - x.low)


def _shift_right(dtype: str, x: Interval, y: Interval) -> Interval | None:
    if not np.all((y.low >= 0) & (y.high < 63)):
        return None
    return _corners("floordiv")(dtype, x, Interval(np.int64(1) << y.low, np.int64(1) << y.high))


def _shift_left(dtype: str, x: Interval, y: Interval) -> Interval | None:
    if not np.all((y.low >= 0) & (y.high < 31)):
        return None
    return _corners("mul")(dtype, x, Interval(np.int64(1) << y.low, np.int64(1) << y.high))


def _float_only(rule: Callable[..., Interval | None]) -> Callable[..., Interval | None]:
    """NumPy's exp, log and tanh are not rounded exactly, so their bounds are widened by a few units in the last place."""

    def widened(dtype: str, x: Interval) -> Interval | None:
        found = rule(dtype, x)
        if found is None or np.any(np.isnan(found.low) | np.isnan(found.high)):
            return None
        margin = 1e-5
        low = found.low - margin * np.abs(found.low) - 1e-30
        high = found.high + margin * np.abs(found.high) + 1e-30
        return Interval(low, high, nan=found.nan)

    return widened


_RULES: dict[str, Callable[..., Interval | None]] = {
    "add": _sum,
    "sub": _difference,
    "mul": _corners("mul"),
    "div": _quotient("div"),
    "floordiv": _quotient("floordiv"),
    "truncdiv": _quotient("truncdiv"),
    "mod": _remainder,
    "fmod": _c_remainder,
    "min": _extreme(np.minimum),
    "max": _extreme(np.maximum),
    "neg": _negated,
    "abs": _absolute,
    **{op: _monotone(op) for op in ("floor", "ceil", "round", "trunc", "sign")},
    **{op: _float_only(_monotone(op)) for op in ("exp", "exp2", "expm1", "sqrt", "tanh", "sigmoid")},
    "and": _bitwise(lambda x, y: Interval(x.low & y.low, x.high & y.high), _mask_bits),
    "or": _bitwise(lambda x, y: Interval(x.low | y.low, x.high | y.high), _join_bits),
    "xor": _bitwise(_xor, lambda x, y: None),
    "not": _inverted,
    "shl": _shift_left,
    "shr": _shift_right,
}
