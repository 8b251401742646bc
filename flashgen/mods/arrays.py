"""Values while a function is traced: a shape and a rule that gives the node of each element.

Nothing is computed when an array is added to another or viewed: only the elements that the function's result needs become
nodes. So `(table * 2)[h]` is one load and one product, and a captured tensor is never read as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flashgen.mods.graph import Graph, Node

Index = tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """A lazy array.

    Attributes:
        shape: sizes; () of what stands for one score or index.
        dtype: of the elements.
        element: index -> node.
        varies: whether the value depends on an argument, so that it has dimensions in a call on whole blocks; what has
            none is a 0-d tensor there, and takes less part in promotion.
    """

    shape: tuple[int, ...]
    dtype: str
    element: Callable[[Index], Node]
    varies: bool

    @property
    def node(self) -> Node:
        """The value of a 0-d array."""
        return self.element(())


def of_node(node: Node, *, varies: bool = True) -> Array:
    """A 0-d array."""
    return Array((), node.dtype, lambda _: node, varies)


def captured(graph: Graph, number: int, shape: Sequence[int], dtype: str) -> Array:
    """A captured tensor."""
    return Array(tuple(shape), dtype, lambda index: graph.load(number, index, dtype), bool(shape))


def filled(graph: Graph, shape: Sequence[int], value: Any, dtype: str, *, varies: bool = False) -> Array:
    """An array of one number."""
    node = graph.const(value, dtype)
    return Array(tuple(shape), dtype, lambda _: node, varies or bool(shape))


def elementwise(graph: Graph, dtype: str, function: Callable[..., Node], *operands: Array) -> Array:
    """A function of elements, operands broadcast as in PyTorch.

    Raises:
        ValueError: the shapes do not broadcast.
    """
    shape = broadcast(graph, *operands)

    def element(index: Index) -> Node:
        return function(*(operand.element(_aligned(graph, index, operand.shape)) for operand in operands))

    return Array(shape, dtype, element, any(operand.varies for operand in operands))


def broadcast(graph: Graph, *operands: Array) -> tuple[int, ...]:
    """The common shape.

    Raises:
        ValueError: there is none.
    """
    rank = max((len(operand.shape) for operand in operands), default=0)
    sizes = [1] * rank
    for operand in operands:
        for place, size in enumerate(operand.shape, start=rank - len(operand.shape)):
            if size != 1 and sizes[place] not in (1, size):
                shapes = ", ".join(str(one.shape) for one in operands)
                raise ValueError(f"shapes {shapes} do not broadcast")
            sizes[place] = max(sizes[place], size) if size else 0
    return tuple(sizes)


def _aligned(graph: Graph, index: Index, shape: tuple[int, ...]) -> Index:
    """An element's index in an operand that was broadcast: leading dimensions dropped, 0 where the size is 1."""
    zero = graph.const(0, "int32")
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(zero if size == 1 else place for place, size in zip(tail, shape, strict=True))


def expanded(graph: Graph, array: Array, shape: Sequence[int]) -> Array:
    """A view of a larger shape."""
    sizes = list(shape)
    offset = len(sizes) - len(array.shape)
    for place, size in enumerate(array.shape):
        if sizes[offset + place] == -1:
            sizes[offset + place] = size
    return Array(
        tuple(sizes), array.dtype, lambda index: array.element(_aligned(graph, index, array.shape)), array.varies
    )


def permuted(array: Array, order: Sequence[int]) -> Array:
    """Dimensions in another order: result dimension i is dimension order[i]."""
    rank = len(array.shape)
    order = [place % rank for place in order]

    def element(index: Index) -> Node:
        source = dict(zip(order, index, strict=True))
        return array.element(tuple(source[place] for place in range(rank)))

    return Array(tuple(array.shape[place] for place in order), array.dtype, element, array.varies)


def reshaped(graph: Graph, array: Array, shape: Sequence[int]) -> Array:
    """The elements in row-major order under another shape."""
    sizes = tuple(shape)
    total = math.prod(array.shape)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes = tuple(total // known if size == -1 else size for size in sizes)

    def element(index: Index) -> Node:
        flat = _flat(graph, index, sizes)
        places: list[Node] = []
        for size in reversed(array.shape):
            wide = graph.const(size, flat.dtype)
            places.append(graph.make("mod", flat, wide) if len(places) + 1 < len(array.shape) else flat)
            flat = graph.make("floordiv", flat, wide)
        return array.element(tuple(reversed(places)))

    return Array(sizes, array.dtype, element, array.varies)


def _from_start(graph: Graph, place: Node, size: int) -> Node:
    """An index that counts from the start, of a dimension that is sliced: -1 must not run into what was cut off."""
    if place.op in ("const", "input"):
        return place
    negative = graph.make("lt", place, graph.const(0, place.dtype))
    return graph.make("where", negative, graph.make("add", place, graph.const(size, place.dtype)), place)


def _flat(graph: Graph, index: Index, sizes: tuple[int, ...]) -> Node:
    flat = graph.const(0, "int64")
    for place, size in zip(index, sizes, strict=True):
        # From the end, where an index is negative: the flat index must not mix signs.
        wide, length = graph.cast(place, "int64"), graph.const(size, "int64")
        if place.op != "const":
            negative = graph.make("lt", wide, graph.const(0, "int64"))
            wide = graph.make("where", negative, graph.make("add", wide, length), wide)
        flat = graph.make("add", graph.make("mul", flat, length), wide)
    return flat


def indexed(graph: Graph, array: Array, index: Any) -> Array:
    """`array[index]` with integers, slices, None, Ellipsis and traced 0-d integers.

    Args:
        graph: makes the nodes.
        array: what is indexed.
        index: one index or a tuple of them; traced ones as 0-d `Array`.

    Raises:
        IndexError: too many indices, or a number beyond its dimension.
        TypeError: an index of another kind, e.g. a boolean mask or an array of indices.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    if taken > len(array.shape):
        raise IndexError(f"{taken} indices for a tensor of {len(array.shape)} dimensions")
    missing = [slice(None)] * (len(array.shape) - taken)
    if Ellipsis in [part if not isinstance(part, Array) else None for part in parts]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = missing
    else:
        parts += missing

    # Per dimension of the array: a node that stands still, or (result dimension, start, step, whether all of it).
    sources: list[Node | tuple[int, int, int, bool]] = []
    sizes: list[int] = []
    varies = array.varies
    for part in parts:
        if part is None:
            sizes.append(1)
            continue
        size = array.shape[len(sources)]
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            sources.append((len(sizes), start, step, (start, stop, step) == (0, size, 1)))
            sizes.append(len(range(start, stop, step)))
        elif isinstance(part, Array):
            if part.shape or part.dtype in ("bool", "uint8") or "float" in part.dtype:
                raise TypeError(f"an index of shape {part.shape} and {part.dtype}; it must be one integer")
            sources.append(part.node)
            varies = varies or part.varies
        elif isinstance(part, int) and not isinstance(part, bool):
            if not -size <= part < size:
                raise IndexError(f"index {part} is out of bounds of a dimension of size {size}")
            sources.append(graph.const(part % size, "int32"))
        else:
            raise TypeError(f"an index of type {type(part).__name__}")

    def element(place: Index) -> Node:
        found = []
        for source in sources:
            if isinstance(source, Node):
                found.append(source)
                continue
            dimension, start, step, whole = source
            if whole:
                found.append(place[dimension])
                continue
            node = _from_start(graph, place[dimension], sizes[dimension])
            if step != 1:
                node = graph.make("mul", node, graph.const(step, node.dtype))
            found.append(graph.make("add", node, graph.const(start, node.dtype)) if start else node)
        return array.element(tuple(found))

    return Array(tuple(sizes), array.dtype, element, varies)
