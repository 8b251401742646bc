"""A mask taken apart for a kernel whose threads hold keys and walk over rows: bounds of rows for each key, comparisons, and the rest.

Bounds are computed once for a block of keys, comparisons of integers are said to the compiler one by one, and only the rest is a tile of
conditions. Exact: all parts together are the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashgen.mods.dtypes import BITS, is_integer
from flashgen.mods.graph import COMPARISONS, Graph, Node

LAST = 2**31 - 1  # no row stands there
_FAR = 1 << 20  # of a distance, such that a position plus it stays an int32
_TURNED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conjunction:
    """Parts of a mask that hold together.

    Attributes:
        first, end: of each key the first row that may see it and the end of those that may, int32 of `kv_idx` and `b` alone; None for none.
        pairs: (comparison, one side, other side) of int32 values.
        rest: what is left, a bool; None where nothing is.
    """

    first: Node | None
    end: Node | None
    pairs: tuple[tuple[str, Node, Node], ...]
    rest: Node | None

    @property
    def roots(self) -> tuple[Node, ...]:
        """The values that stand in a step: both sides of each comparison, then the rest."""
        return tuple(side for _, *sides in self.pairs for side in sides) + (() if self.rest is None else (self.rest,))


def split(graph: Graph, mask: Node) -> Conjunction:
    """The parts of a mask.

    Args:
        graph: makes nodes that are shared with the mask's.
        mask: a bool of any arguments.
    """
    first: Node | None = None
    end: Node | None = None
    pairs: list[tuple[str, Node, Node]] = []
    rest: Node | None = None
    for literal in _flat("and", mask):
        bounds = _bounds(graph, literal)
        if bounds is not None:
            first = _both(graph, "max", first, bounds[0])
            end = _both(graph, "min", end, bounds[1])
        elif (pair := _pair(graph, literal)) is not None:
            pairs.append(pair)
        else:
            rest = literal if rest is None else graph.make("and", rest, literal)
    return Conjunction(first=first, end=end, pairs=tuple(pairs), rest=rest)


def _both(graph: Graph, op: str, x: Node | None, y: Node | None) -> Node | None:
    return y if x is None else x if y is None else graph.make(op, x, y)


def _flat(op: str, node: Node) -> list[Node]:
    """The operands of a chain of one operation on bools."""
    if node.op != op or node.dtype != "bool":
        return [node]
    return [part for arg in node.args for part in _flat(op, arg)]


def _of_key(node: Node) -> bool:
    return node.depends <= {"kv_idx", "b"}


def _bounds(graph: Graph, literal: Node) -> tuple[Node | None, Node | None] | None:
    """(first row, end of rows) of each key where a condition says no more than that."""
    if _of_key(literal):
        return graph.make("where", literal, graph.const(0, "int32"), graph.const(LAST, "int32")), None
    if literal.op == "or":
        return _either(graph, literal)
    if literal.op not in COMPARISONS or literal.args[0].dtype != "int32":
        return None
    x, y = literal.args
    op = literal.op
    if _of_key(x):
        x, y, op = y, x, _TURNED[op]
    if (
        x.op == "abs"
        and y.op == "const"
        and 0 <= y.value <= _FAR
        and op in ("lt", "le")
        and _distance(x.args[0]) is not None
    ):
        key = graph.input("kv_idx")
        reach = graph.const(y.value - (op == "lt"), "int32")
        return graph.make("sub", key, reach), graph.make("add", graph.make("add", key, reach), graph.const(1, "int32"))
    bound, is_turned = _row_bound(graph, x, y)
    if bound is None or op == "ne":
        return None
    op = _TURNED[op] if is_turned else op
    # Behind the last row none is: a bound there may stay where it is.
    after = graph.make("add", graph.make("min", bound, graph.const(LAST - 1, "int32")), graph.const(1, "int32"))
    first = {"ge": bound, "gt": after, "eq": bound}.get(op)
    return first, {"lt": bound, "le": after, "eq": after}.get(op)


def _row_bound(graph: Graph, x: Node, y: Node) -> tuple[Node | None, bool]:
    """What q_idx is compared with where x is compared with y, and whether the other way round; None where x is not made of q_idx so.

    Sums with a number no larger than `_FAR` do not overflow, positions being what they are.
    """
    if not _of_key(y):
        return None, False
    if _is(x, "q_idx"):
        return y, False
    if (sign := _distance(x)) is not None and y.op == "const" and abs(y.value) <= _FAR:
        key = graph.input("kv_idx")
        return graph.make("add" if sign > 0 else "sub", key, y), sign < 0
    if x.op in ("add", "sub") and _is(y, "kv_idx"):
        row, number = x.args
        if _is(row, "q_idx") and number.op == "const" and abs(number.value) <= _FAR:
            return graph.make("sub" if x.op == "add" else "add", y, number), False
    return None, False


def _is(node: Node, name: str) -> bool:
    return node.op == "input" and node.value == name


def _distance(node: Node) -> int | None:
    """1 for q_idx - kv_idx, -1 for kv_idx - q_idx, None for anything else."""
    if node.op != "sub":
        return None
    x, y = node.args
    if _is(x, "q_idx") and _is(y, "kv_idx"):
        return 1
    return -1 if _is(x, "kv_idx") and _is(y, "q_idx") else None


def _either(graph: Graph, literal: Node) -> tuple[Node | None, Node | None] | None:
    """Of conditions that each begin somewhere, and end nowhere: the earliest beginning."""
    found: Node | None = None
    for branch in _flat("or", literal):
        parts = split(graph, branch) if branch.op != "or" else None
        if parts is None or parts.first is None or parts.end is not None or parts.pairs or parts.rest is not None:
            return None
        found = parts.first if found is None else graph.make("min", found, parts.first)
    return found, None


def _pair(graph: Graph, literal: Node) -> tuple[str, Node, Node] | None:
    """A comparison of integers as one of int32."""
    if literal.op not in COMPARISONS:
        return None
    x, y = literal.args
    if not is_integer(x.dtype) or BITS[x.dtype] > 32:
        return None
    return literal.op, graph.cast(x, "int32"), graph.cast(y, "int32")
