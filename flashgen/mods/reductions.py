"""What puts elements of captured tensors together: sums, any and all, stacks, look-ups in short tables.

Everything is written out, element by element: what a mod reduces is a handful of numbers for each score (a position in space, a slice of
an embedding), and a loop inside of a kernel's expression would hide what it costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flashgen.mods import arrays
from flashgen.mods.arrays import Array
from flashgen.mods.dtypes import computing, is_float
from flashgen.mods.graph import Graph, Node
from flashgen.mods.torch_types import DTYPES, Handler, NotInTableError, as_ones

MOST_ELEMENTS = 64


def _elements(graph: Graph, array: Array, dims: Sequence[int], place: tuple[Node, ...]) -> list[Node]:
    """The elements that meet in one place of the result, whose dimensions are those that stay."""
    stays = iter(place)
    ranges: list[Sequence[Node]] = [
        [graph.const(at, "int32") for at in range(size)] if dim in dims else [next(stays)]
        for dim, size in enumerate(array.shape)
    ]
    return [array.element(index) for index in itertools.product(*ranges)]


def reduced(
    graph: Graph,
    array: Array,
    dims: Sequence[int] | None,
    keepdim: bool,
    dtype: str,
    combine: Callable[[list[Node]], Node],
) -> Array:
    """An array reduced over some dimensions (None: all of them), whose elements `combine` puts together.

    Raises:
        NotInTableError: over more elements than are written out, or over a single score.
    """
    rank = len(array.shape)
    if not rank:
        raise NotInTableError("of a single value: it would reduce over scores")
    over = sorted({dim % rank for dim in (dims if dims else range(rank))})
    count = math.prod(array.shape[dim] for dim in over)
    if not 0 < count <= MOST_ELEMENTS:
        raise NotInTableError(f"over {count} elements: 1 to {MOST_ELEMENTS} are written out")
    shape = tuple(1 if dim in over else size for dim, size in enumerate(array.shape) if keepdim or dim not in over)

    def element(index: tuple[Node, ...]) -> Node:
        stays = tuple(at for dim, at in enumerate(index) if dim not in over) if keepdim else index
        return combine(_elements(graph, array, over, stays))

    return Array(shape, dtype, element, array.varies)


def total(graph: Graph, nodes: Sequence[Node], dtype: str) -> Node:
    """Their sum, computed as wide as PyTorch does."""
    inner = computing(dtype)
    found = graph.cast(nodes[0], inner)
    for node in nodes[1:]:
        found = graph.make("add", found, graph.cast(node, inner))
    return graph.cast(found, dtype)


def mean(graph: Graph, nodes: Sequence[Node], dtype: str) -> Node:
    """Their mean."""
    inner = computing(dtype)
    summed = total(graph, [graph.cast(node, inner) for node in nodes], inner)
    return graph.cast(graph.make("div", summed, graph.const(len(nodes), inner)), dtype)


def logical(graph: Graph, op: str, nodes: Sequence[Node]) -> Node:
    """Whether one, or each, is not zero."""
    found = graph.cast(nodes[0], "bool")
    for node in nodes[1:]:
        found = graph.make(op, found, graph.cast(node, "bool"))
    return found


def summed_type(dtype: str) -> str:
    """The type of a sum: of integers and bools int64."""
    return dtype if is_float(dtype) else "int64"


def stacked(graph: Graph, arrays: Sequence[Array], dim: int, dtype: str) -> Array:
    """Arrays of one shape along a new dimension."""
    rank = len(arrays[0].shape) + 1
    at = dim % rank
    shape = (*arrays[0].shape[:at], len(arrays), *arrays[0].shape[at:])

    def element(index: tuple[Node, ...]) -> Node:
        rest = (*index[:at], *index[at + 1 :])
        parts = [graph.cast(array.element(rest), dtype) for array in arrays]
        which = index[at]
        if which.op == "const":
            return parts[int(which.value) % len(parts)]
        found = parts[-1]
        for number, part in reversed(list(enumerate(parts[:-1]))):
            same = graph.make("eq", which, graph.const(number, which.dtype))
            if which.dtype != "uint8":
                same = graph.make("or", same, graph.make("eq", which, graph.const(number - len(parts), which.dtype)))
            found = graph.make("where", same, part, found)
        return found

    return Array(shape, dtype, element, any(array.varies for array in arrays))


# -- rows of the table: the type follows from the elements' --


def _reduction(kind: str) -> Handler:
    def handler(graph: Graph, _: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        array = args[0]
        dims, keepdim = kwargs.get("dim", args[1] if len(args) > 1 else None), args[2] if len(args) > 2 else False
        dims = [dims] if isinstance(dims, int) else dims
        asked = kwargs.get("dtype")
        if kind in ("and", "or"):
            dtype = "bool"
            combine = lambda nodes: logical(graph, kind, nodes)  # noqa: E731
        else:
            dtype = summed_type(array.dtype) if kind == "sum" else array.dtype
            dtype = DTYPES[asked] if asked is not None else dtype
            made = total if kind == "sum" else mean
            combine = lambda nodes: made(graph, nodes, dtype)  # noqa: E731
        return reduced(graph, array, dims, bool(kwargs.get("keepdim", keepdim)), dtype, combine)

    return handler


def _dot(graph: Graph, _: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    x, y = args[:2]
    product = arrays.elementwise(graph, computing(x.dtype), lambda a, b: _times(graph, a, b, computing(x.dtype)), x, y)
    return reduced(graph, product, None, False, x.dtype, lambda nodes: total(graph, nodes, x.dtype))


def _times(graph: Graph, a: Node, b: Node, dtype: str) -> Node:
    return graph.make("mul", graph.cast(a, dtype), graph.cast(b, dtype))


def _stack(graph: Graph, _: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    parts = args[0]
    if any(part.shape != parts[0].shape for part in parts):
        raise RuntimeError(f"stack expects tensors of one shape, not {', '.join(str(part.shape) for part in parts)}")
    dtype = DTYPES[torch.stack([as_ones(part).reshape(()) for part in parts]).dtype]
    return stacked(graph, parts, kwargs.get("dim", args[1] if len(args) > 1 else 0), dtype)


def _type_of(number: Any) -> str:
    return DTYPES[torch.as_tensor(number).dtype]


def _isin(graph: Graph, _: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    x, elements = (one if isinstance(one, Array) else arrays.filled(graph, (), one, _type_of(one)) for one in args[:2])
    count = math.prod(elements.shape)
    flat = arrays.reshaped(graph, elements, (count,))
    within = DTYPES[torch.result_type(as_ones(x), as_ones(elements))]

    def function(one: Node) -> Node:
        same = [
            graph.make("eq", graph.cast(one, within), graph.cast(flat.element((graph.const(at, "int32"),)), within))
            for at in range(count)
        ]
        found = logical(graph, "or", same) if same else graph.const(False, "bool")
        return graph.make("not", found) if kwargs.get("invert") else found

    if count > MOST_ELEMENTS:
        raise NotInTableError(f"of {count} elements: at most {MOST_ELEMENTS} are written out")
    return arrays.elementwise(graph, "bool", function, x)


def _bucketize(graph: Graph, _: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    value, bounds = args[:2]
    (count,) = bounds.shape
    if count > MOST_ELEMENTS:
        raise NotInTableError(f"of {count} boundaries: at most {MOST_ELEMENTS} are written out")
    dtype = "int32" if kwargs.get("out_int32") else "int64"
    within = DTYPES[torch.result_type(as_ones(value), as_ones(bounds))]

    def function(one: Node) -> Node:
        found = graph.const(0, dtype)
        for at in range(count):
            bound = graph.cast(bounds.element((graph.const(at, "int32"),)), within)
            below = graph.make("le" if kwargs.get("right") else "lt", bound, graph.cast(one, within))
            found = graph.make("add", found, graph.cast(below, dtype))
        return found

    return arrays.elementwise(graph, dtype, function, value)


SHAPED: dict[str, Handler] = {
    "sum": _reduction("sum"),
    "mean": _reduction("mean"),
    "any": _reduction("or"),
    "all": _reduction("and"),
    "dot": _dot,
    "stack": _stack,
    "isin": _isin,
    "bucketize": _bucketize,
}
ELEMENTWISE = ("isin", "bucketize")
