"""The graph of a traced function: frozen nodes of explicit type, equal ones shared, constants folded.

Every node knows the type of its value and operands are cast by nodes of their own, so that what is emitted, evaluated on
intervals or differentiated never has to know a framework's rules of promotion. The operations are few:

    input, const, load            an argument; a number; an element of a captured tensor (indices are the operands)
    cast                          to the node's type; with the value `detach` to its own, for a derivative to stop at
    neg abs sign floor ceil round trunc exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid sin cos erf not
    add sub mul div pow           of one type; `div` and `pow` of floats only
    floordiv mod truncdiv fmod    of integers: rounded down (Python's) and towards zero (C's)
    min max fmin fmax             the first two hand NaN on, the last two prefer the number
    and or xor shl shr            of integers and bool; `not` likewise
    lt le gt ge eq ne             of operands of one type, to bool
    where                         condition, value, other value
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashgen.mods import semantics
from flashgen.mods.dtypes import BITS, bounds, converted, is_float, is_integer

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
INDICES = ("b", "h", "q_idx", "kv_idx")
INPUTS = ("score", *INDICES)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One value of the graph. Nodes of one `Graph` that are equal are one object, so `is` compares them.

    Attributes:
        op: the operation, see above.
        args: operands.
        dtype: of the value.
        value: of `const` the number (bool, int or float); of `input` the argument's name; of `load` the number of the
            captured tensor; else None.
        depends: names of the arguments that the value depends on.
    """

    op: str
    args: tuple[Node, ...]
    dtype: str
    value: Any = None
    depends: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        if self.op == "input":
            return str(self.value)
        if self.op == "const":
            return f"{self.value}"
        name = f"load{self.value}" if self.op == "load" else self.dtype if self.op == "cast" else self.op
        return f"{name}({', '.join(map(repr, self.args))})"


class Graph:
    """Makes nodes: shares equal ones, folds constants, drops what does nothing.

    Only rewrites that keep every bit are made (a signed zero counts as equal to zero, and a NaN as any NaN).
    """

    def __init__(self) -> None:
        self._nodes: dict[Any, Node] = {}

    def input(self, name: str) -> Node:
        """An argument: `score` in fp32, the indices in int32."""
        return self._share("input", (), "float32" if name in ("score", "grad") else "int32", name)

    def const(self, value: Any, dtype: str) -> Node:
        """A number, rounded to its type."""
        number = converted(np.asarray(value), dtype).item()
        return self._share("const", (), dtype, number)

    def load(self, capture: int, indices: Iterable[Node], dtype: str) -> Node:
        """An element of a captured tensor."""
        return self._share("load", tuple(indices), dtype, capture)

    def cast(self, x: Node, dtype: str) -> Node:
        """A value in another type."""
        if x.dtype == dtype:
            return x
        if x.op == "const":
            return self.const(x.value, dtype)
        # Widening twice is widening once; what a narrower type lost stays lost.
        if x.op == "cast" and x.value is None and _widens(x.args[0].dtype, x.dtype):
            return self.cast(x.args[0], dtype)
        if dtype == "bool":
            return self.make("ne", x, self.const(0, x.dtype))
        return self._share("cast", (x,), dtype)

    def detached(self, x: Node) -> Node:
        """The same value, which hands no gradient on."""
        return self._share("cast", (x,), x.dtype, "detach") if is_float(x.dtype) and x.op != "const" else x

    def make(self, op: str, *args: Node) -> Node:
        """An operation on operands of one type (`where`: a bool, then two of one type)."""
        if op == "where":
            condition, x, y = args
            if condition.op == "const":
                return x if condition.value else y
            return x if x is y else self._share(op, args, x.dtype)
        dtype = "bool" if op in COMPARISONS else args[0].dtype
        if all(arg.op == "const" for arg in args) and not (op in _DIVISIONS and args[1].value == 0):
            values = [np.asarray([arg.value], dtype=semantics.held(arg.dtype)) for arg in args]
            return self.const(semantics.apply(op, values, args[0].dtype)[0], dtype)
        return self._simpler(op, args) or self._share(op, args, dtype)

    def _simpler(self, op: str, args: tuple[Node, ...]) -> Node | None:
        """What an operation does with a neutral or an absorbing operand, else None."""
        if len(args) == 1:
            (x,) = args
            return x.args[0] if op in ("not", "neg") and x.op == op else None
        x, y = args
        if op in ("add", "mul", "and", "or", "xor") and x.op == "const" and y.op != "const":
            x, y = y, x
        if op in ("and", "or", "min", "max") and x is y:
            return x
        if y.op != "const":
            return None
        number, kind = y.value, x.dtype
        if (op in ("add", "sub") and number == 0) or (op in ("mul", "div", "floordiv", "truncdiv") and number == 1):
            return x
        if kind == "bool" and op == "and":
            return x if number else y
        if kind == "bool" and op == "or":
            return y if number else x
        if kind == "bool" and op in ("xor", "ne", "eq"):
            return self.make("not", x) if bool(number) == (op != "eq") else x
        if is_integer(kind):
            if number == 0 and op in ("mul", "and"):
                return y
            if number == 0 and op in ("or", "xor", "shl", "shr"):
                return x
            if number == 1 and op in ("mod", "fmod"):
                return self.const(0, kind)
            if op in ("shl", "shr") and not 0 <= number < BITS[kind]:
                # Everything is shifted out; to the right the sign stays.
                last = self.const(BITS[kind] - 1, kind)
                return self.make("shr", x, last) if op == "shr" and kind != "uint8" else self.const(0, kind)
        return None

    def _share(self, op: str, args: tuple[Node, ...], dtype: str, value: Any = None) -> Node:
        # repr tells -0.0 from 0.0 and makes NaN equal to itself.
        key = (op, tuple(map(id, args)), dtype, repr(value))
        node = self._nodes.get(key)
        if node is None:
            depends = frozenset().union(*(arg.depends for arg in args)) if args else frozenset()
            node = Node(op, args, dtype, value, frozenset({value}) if op == "input" else depends)
            self._nodes[key] = node
        return node


_DIVISIONS = ("floordiv", "mod", "truncdiv", "fmod")


def _widens(narrow: str, wide: str) -> bool:
    """Whether every value of one type is one of another."""
    if narrow == "bool":
        return True
    if is_float(narrow):
        return (narrow, wide) in {
            ("float16", "float32"),
            ("bfloat16", "float32"),
            ("float16", "float64"),
            ("bfloat16", "float64"),
            ("float32", "float64"),
        }
    if is_float(wide):
        return False  # to float and back to an integer is another rounding; never merged
    low, high = bounds(narrow)
    return wide != "bool" and bounds(wide)[0] <= low and high <= bounds(wide)[1]


def ordered(*roots: Node) -> list[Node]:
    """Every node that the roots need, operands before their users."""
    done: dict[int, Node] = {}
    stack: list[tuple[Node, Iterator[Node]]] = []
    for root in roots:
        if id(root) in done:
            continue
        stack.append((root, iter(root.args)))
        while stack:
            node, rest = stack[-1]
            child = next((arg for arg in rest if id(arg) not in done), None)
            if child is None:
                stack.pop()
                done[id(node)] = node
            else:
                stack.append((child, iter(child.args)))
    return list(done.values())


def rebuilt(graph: Graph, root: Node, replaced: dict[int, Node]) -> Node:
    """The same value with some nodes (by id) replaced, folded anew."""
    made = dict(replaced)
    for node in ordered(root):
        if id(node) in made:
            continue
        args = [made[id(arg)] for arg in node.args]
        if node.op in ("input", "const"):
            made[id(node)] = graph._share(node.op, (), node.dtype, node.value)
        elif node.op == "load":
            made[id(node)] = graph.load(node.value, args, node.dtype)
        elif node.op == "cast":
            made[id(node)] = graph.cast(args[0], node.dtype) if node.value is None else graph.detached(args[0])
        else:
            made[id(node)] = graph.make(node.op, *args)
    return made[id(root)]
