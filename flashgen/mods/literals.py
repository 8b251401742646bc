"""A mask as an *or* of *and*s of literals, each of a kind that ranges of queries and keys can be narrowed by.

The kinds, in the order in which they are tried:

    Zone      bounds of q, of kv and of their distance q - kv (difference bounds: Dill, CAV 1989); causal, windows, prefixes, sinks
    On        a condition on one of q, kv and q - kv alone, kept as the runs in which it holds; dilation, flags of a token
    Order     f(q) <= g(kv) of numbers; documents, chunks, grids
    Opaque    anything else: judged on intervals

Equality is two orders, inequality an *or* of two, |x| <= c two bounds. A mask that grows beyond `LIMIT` terms is opaque as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np

from flashgen.mods import intervals, semantics
from flashgen.mods.dtypes import bounds, is_integer
from flashgen.mods.graph import COMPARISONS, Graph, Node
from flashgen.mods.intervals import Interval
from flashgen.mods.lines import Line, Runs, Table

Array = Any
Axis = Literal["q", "k", "d"]
LIMIT = 64
_SPLIT = 4  # runs of one condition that become terms of their own, which leaves no gaps inside a term

_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_FAR = 1 << 40


@dataclass(frozen=True, slots=True)
class On:
    """A condition on one axis."""

    axis: Axis
    runs: Runs


@dataclass(frozen=True, slots=True)
class Order:
    """f(q) <= g(kv), or < where strict; the other way round where `swapped`: g(kv) <= f(q)."""

    query: Line
    key: Line
    strict: bool
    swapped: bool


@dataclass(frozen=True, slots=True)
class Opaque:
    """A condition of which nothing is known but its graph."""

    node: Node
    negated: bool


@dataclass(frozen=True, slots=True)
class Term:
    """Literals that hold together.

    Attributes:
        zone: (low, high) of each axis, inclusive.
        rest: the other literals.
    """

    zone: Mapping[Axis, tuple[int, int]]
    rest: tuple[On | Order | Opaque, ...] = ()

    def is_dense(self, block: int) -> bool:
        """Whether the keys of a block of queries are one range without gaps that a block of keys could fall into."""
        return all(self._is_dense(literal, block) for literal in self.rest)

    @staticmethod
    def _is_dense(literal: On | Order | Opaque, block: int) -> bool:
        if isinstance(literal, On):
            return literal.runs.largest_gap < block
        return isinstance(literal, Order) and literal.query.direction != 0 and literal.key.direction != 0

    def narrowed(self, axis: Axis, low: int, high: int) -> Term:
        """With one more bound."""
        old = self.zone[axis]
        return Term({**self.zone, axis: (max(old[0], low), min(old[1], high))}, self.rest)

    def with_(self, literal: On | Order | Opaque) -> Term:
        """With one more literal."""
        return Term(self.zone, (*self.rest, literal))


class TooManyTermsError(Exception):
    """The mask has more alternatives than are worth telling apart."""


@dataclass
class Reader:
    """Takes a mask of one batch and head apart.

    Attributes:
        graph: makes nodes.
        tables: captured tensors by number, as NumPy arrays.
        seqlen_q, seqlen_k: positions, at least one each.
    """

    graph: Graph
    tables: Sequence[Array]
    seqlen_q: int
    seqlen_k: int
    _lines: dict[tuple[Any, ...], Line] = field(default_factory=dict)
    _known: dict[int, Interval] = field(default_factory=dict)

    @property
    def whole(self) -> dict[Axis, tuple[int, int]]:
        """Bounds of every axis without any condition."""
        return {
            "q": (0, self.seqlen_q - 1),
            "k": (0, self.seqlen_k - 1),
            "d": (1 - self.seqlen_k, self.seqlen_q - 1),
        }

    def terms(self, mask: Node, *, negated: bool) -> list[Term]:
        """The alternatives under which a mask is true, or false where negated.

        Raises:
            TooManyTermsError: there are more than `LIMIT`.
        """
        ends = {
            "q_idx": Interval(np.int64(0), np.int64(self.seqlen_q - 1)),
            "kv_idx": Interval(np.int64(0), np.int64(self.seqlen_k - 1)),
        }
        intervals.evaluate(mask, ends, None, self._known)
        return self._read(mask, negated)

    # -- logic --

    def _read(self, node: Node, negated: bool) -> list[Term]:
        if node.op == "const":
            return [Term(self.whole)] if bool(node.value) != negated else []
        if len(node.depends) == 1 and not self._difference(node):
            return self._on(node, negated, "q" if "q_idx" in node.depends else "k")
        if node.op == "not":
            return self._read(node.args[0], not negated)
        if node.op in ("and", "or") and node.dtype == "bool":
            left, right = (self._read(arg, negated) for arg in node.args)
            return _either(left, right) if (node.op == "or") != negated else _both(left, right)
        if node.op == "where" or (node.op in ("xor", "ne", "eq") and node.args[0].dtype == "bool"):
            return self._choice(node, negated)
        if node.op in COMPARISONS:
            x, y = node.args
            return self._compared(_NEGATED[node.op] if negated else node.op, x, y, node, negated)
        if self._is_of_distance(node):
            return self._on(node, negated, "d")
        return [Term(self.whole, (Opaque(node, negated),))]

    def _choice(self, node: Node, negated: bool) -> list[Term]:
        """where(c, x, y) is c & x | ~c & y; xor and (in)equality of bools are of that form."""
        if node.op == "where":
            condition, x, y = node.args
            first, second = self._read(x, negated), self._read(y, negated)
        else:
            condition, y = node.args
            flipped = node.op == "eq"
            first, second = self._read(y, (not negated) ^ flipped), self._read(y, negated ^ flipped)
        return _either(_both(self._read(condition, False), first), _both(self._read(condition, True), second))

    def _on(self, node: Node, negated: bool, axis: Axis) -> list[Term]:
        def at(positions: Array) -> Array:
            return self._at(node, positions, axis) != negated

        runs = Runs.of(Line(at, *self.whole[axis]))
        whole = Term(self.whole)
        if len(runs) <= _SPLIT:
            return [
                whole.narrowed(axis, int(start), int(stop) - 1)
                for start, stop in zip(runs.starts, runs.stops, strict=True)
            ]
        return [whole.with_(On(axis, runs))]

    # -- comparisons --

    def _compared(self, op: str, x: Node, y: Node, node: Node, negated: bool) -> list[Term]:
        if op in ("gt", "ge"):
            return self._compared({"gt": "lt", "ge": "le"}[op], y, x, node, negated)
        absolute = self._of_absolute(op, x, y, node, negated)
        if absolute is not None:
            return absolute
        sums = self._sums(x, y)
        if sums is None:
            if self._is_of_distance(node):
                return self._on(node, negated, "d")
            return self._separate(op, x, y, node, negated)
        # sum <= 0, of integers.
        if op == "eq":
            return _both(self._at_most(sums, 0), self._at_most(_times(sums, -1), 0))
        if op == "ne":
            return _either(self._at_most(sums, -1), self._at_most(_times(sums, -1), -1))
        return self._at_most(sums, -1 if op == "lt" else 0)

    def _of_absolute(self, op: str, x: Node, y: Node, node: Node, negated: bool) -> list[Term] | None:
        """|e| <= c is e <= c and -e <= c; c <= |e| an alternative; None where neither side is an absolute value."""
        if not is_integer(x.dtype) or "abs" not in (x.op, y.op) or op in ("eq", "ne"):
            return None
        inner = (x if x.op == "abs" else y).args[0]
        if self._known[id(inner)].low == bounds(inner.dtype)[0]:
            return None  # its negative would wrap
        minus = self.graph.make("neg", inner)
        self._known.setdefault(id(minus), Interval(-self._known[id(inner)].high, -self._known[id(inner)].low))
        if x.op == "abs":
            return _both(self._compared(op, inner, y, node, negated), self._compared(op, minus, y, node, negated))
        return _either(self._compared(op, x, inner, node, negated), self._compared(op, x, minus, node, negated))

    def _at_most(self, sums: dict[Node | None, int], limit: int) -> list[Term]:
        """Sum <= limit, of a sum whose every part depends on q alone or kv alone."""
        factors = {part: factor for part, factor in sums.items() if part is not None}
        limit -= sums.get(None, 0)
        whole = Term(self.whole)
        if not factors:
            return [whole] if limit >= 0 else []
        raw = {part.value if part.op == "input" else "": factor for part, factor in factors.items()}
        if "" not in raw:
            q, k = raw.get("q_idx", 0), raw.get("kv_idx", 0)
            if k == 0 or q == 0 or q == -k:
                axis: Axis = "q" if k == 0 else "k" if q == 0 else "d"
                factor = k if q == 0 else q
                if factor > 0:
                    return [whole.narrowed(axis, -_FAR, limit // factor)]
                return [whole.narrowed(axis, -(limit // -factor), _FAR)]
        query = self._sum_line({part: f for part, f in factors.items() if "q_idx" in part.depends}, "q", 1, 0)
        key = self._sum_line({part: f for part, f in factors.items() if "q_idx" not in part.depends}, "k", -1, limit)
        return [whole.with_(Order(query, key, strict=False, swapped=False))]

    def _sum_line(self, factors: Mapping[Node, int], axis: Axis, sign: int, offset: int) -> Line:
        def at(positions: Array) -> Array:
            total = np.full(np.shape(positions), offset, np.int64)
            for part, factor in factors.items():
                total += sign * factor * self._at(part, positions, axis).astype(np.int64)
            return total

        if len(factors) == 1:
            ((part, factor),) = factors.items()
            table = self._whole_table(part, self.whole[axis][1])
            if table is not None and is_integer(part.dtype):
                bare = self._lines.setdefault(
                    (id(table), axis), Line(lambda at: table[at[0] : at[-1] + 1], *self.whole[axis])
                )
                return Table(table, sign * factor, offset, *self.whole[axis], rising=lambda: bare.direction)
        key = (axis, sign, offset, *((id(part), factor) for part, factor in factors.items()))
        return self._lines.setdefault(key, Line(at, *self.whole[axis]))

    def _separate(self, op: str, x: Node, y: Node, node: Node, negated: bool) -> list[Term]:
        """A comparison of floats, one side of q alone, the other of kv alone."""
        whole = Term(self.whole)
        sides = {tuple(sorted(x.depends)), tuple(sorted(y.depends))}
        may_be_nan = self._known[id(x)].nan or self._known[id(y)].nan
        if sides != {("q_idx",), ("kv_idx",)} or may_be_nan:
            return [whole.with_(Opaque(node, negated))]
        first = "q_idx" in x.depends
        query_node, key_node = (x, y) if first else (y, x)
        query = Line(lambda positions: self._at(query_node, positions, "q"), *self.whole["q"])
        key = Line(lambda positions: self._at(key_node, positions, "k"), *self.whole["k"])

        def ordered_by(strict: bool, swapped: bool) -> Term:
            return whole.with_(Order(query, key, strict, swapped))

        if op == "eq":
            return _both([ordered_by(False, False)], [ordered_by(False, True)])
        if op == "ne":
            return [ordered_by(True, False), ordered_by(True, True)]
        return [ordered_by(op == "lt", not first)]

    # -- forms --

    def _sums(self, x: Node, y: Node) -> dict[Node | None, int] | None:
        """X - y as factors of parts that depend on q alone or kv alone (None: the number); None where it is no such sum."""
        if not is_integer(x.dtype):
            return None
        total: dict[Node | None, int] = {}
        self._add(total, x, 1)
        self._add(total, y, -1)
        total = {part: factor for part, factor in total.items() if factor}
        one_sided = all(part is None or len(part.depends) == 1 for part in total)
        return total if one_sided else None

    def _add(self, total: dict[Node | None, int], node: Node, factor: int) -> None:
        if node.op == "const":
            total[None] = total.get(None, 0) + factor * int(node.value)
        elif node.op in ("add", "sub") and self._stays(node):
            self._add(total, node.args[0], factor)
            self._add(total, node.args[1], factor if node.op == "add" else -factor)
        elif node.op == "neg" and self._stays(node):
            self._add(total, node.args[0], -factor)
        elif node.op == "mul" and self._stays(node) and "const" in (node.args[0].op, node.args[1].op):
            number, other = node.args if node.args[0].op == "const" else node.args[::-1]
            self._add(total, other, factor * int(number.value))
        elif node.op == "cast" and is_integer(node.args[0].dtype) and self._stays(node):
            self._add(total, node.args[0], factor)
        else:
            total[node] = total.get(node, 0) + factor

    def _stays(self, node: Node) -> bool:
        """Whether an integer operation surely does not wrap round."""
        sides = [(int(self._known[id(arg)].low), int(self._known[id(arg)].high)) for arg in node.args]
        low, high = sides[0]
        if node.op == "add":
            low, high = low + sides[1][0], high + sides[1][1]
        elif node.op == "sub":
            low, high = low - sides[1][1], high - sides[1][0]
        elif node.op == "neg":
            low, high = -high, -low
        elif node.op == "mul":
            corners = [a * b for a, b in product(*sides)]
            low, high = min(corners), max(corners)
        least, most = bounds(node.dtype)
        return least <= low and high <= most

    def _difference(self, node: Node) -> bool:
        """Whether a condition on one axis is plain bounds, which are cheaper than runs."""
        if node.op not in COMPARISONS or not is_integer(node.args[0].dtype):
            return False
        sums = self._sums(*node.args)
        return sums is not None and all(part is None or part.op == "input" for part in sums)

    def _is_of_distance(self, node: Node) -> bool:
        """Whether a value depends on q and kv by their difference alone."""
        if node.op == "const":
            return True
        if node.op == "input":
            return False
        if is_integer(node.dtype) and node.op in ("add", "sub", "neg", "mul", "cast"):
            total: dict[Node | None, int] = {}
            self._add(total, node, 1)
            raw = {part.value: factor for part, factor in total.items() if part is not None and part.op == "input"}
            if raw and raw.get("q_idx", 0) == -raw.get("kv_idx", 0):
                rest = [part for part in total if part is not None and part.op != "input"]
                return all(part is not node and self._is_of_distance(part) for part in rest)
        return bool(node.args) and all(self._is_of_distance(arg) for arg in node.args)

    def _at(self, node: Node, positions: Array, axis: Axis) -> Array:
        """A value at positions of one axis; of a distance at a pair of indices that has it."""
        inputs = {"q_idx": positions, "kv_idx": positions}
        if axis == "d":
            inputs = {"q_idx": np.maximum(positions, 0), "kv_idx": np.maximum(-positions, 0)}
        table = self._whole_table(node, int(np.max(positions, initial=0))) if axis != "d" else None
        if table is not None:
            return table[positions]
        return semantics.evaluate(node, inputs, self.tables)

    def _whole_table(self, node: Node, last: int) -> Array | None:
        """The captured tensor that a value is an element of, read at the position itself and long enough; else None."""
        if node.op != "load" or len(node.args) != 1 or node.args[0].op != "input":
            return None
        table = self.tables[node.value]
        return table if len(table) > last else None


def _times(sums: Mapping[Node | None, int], factor: int) -> dict[Node | None, int]:
    return {part: factor * value for part, value in sums.items()}


def _either(x: list[Term], y: list[Term]) -> list[Term]:
    if len(x) + len(y) > LIMIT:
        raise TooManyTermsError
    return [*x, *y]


def _both(x: list[Term], y: list[Term]) -> list[Term]:
    if len(x) * len(y) > LIMIT:
        raise TooManyTermsError
    found = []
    for one, other in product(x, y):
        zone: dict[Axis, tuple[int, int]] = {
            axis: (max(one.zone[axis][0], other.zone[axis][0]), min(one.zone[axis][1], other.zone[axis][1]))
            for axis in one.zone
        }
        if all(low <= high for low, high in zone.values()):
            found.append(Term(zone, (*one.rest, *other.rest)))
    return found
