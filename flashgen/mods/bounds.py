"""Whether indices leave a captured tensor: decided where the range of the index is known to the last value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flashgen.errors import InvalidProblemError
from flashgen.mods import intervals, semantics
from flashgen.mods.captures import Capture
from flashgen.mods.graph import Node, ordered
from flashgen.mods.intervals import Interval

# Increasing or decreasing in each operand, so that the ends of the operands' ranges give the ends of theirs.
_MONOTONE = {"add", "sub", "neg", "min", "max", "cast", "floordiv", "mul", "floor", "ceil", "round", "trunc", "shr"}

_AT_ONCE = 1 << 20  # values of an index


def check(
    root: Node,
    captures: Sequence[Capture],
    shapes: Sequence[tuple[int, ...]],
    sizes: Mapping[str, int],
    sites: Mapping[int, Any],
) -> None:
    """Refuse a graph that reads outside a captured tensor for some b, h, q_idx and kv_idx.

    An index counts from the end where it is negative. What is not decided here (an index that is itself captured, or that a
    condition guards) is left alone: a kernel reads 0 there.

    Args:
        root: the graph.
        captures: the captured tensors.
        shapes: theirs now.
        sizes: how many values each index argument takes, each at least one.
        sites: the user's line of a load, by id of its node.

    Raises:
        InvalidProblemError: names the tensor, its dimension, the range of the index and the line.
    """
    inputs = {name: Interval(np.int64(0), np.int64(size - 1)) for name, size in sizes.items()}
    known: dict[int, Interval] = {}
    intervals.evaluate(root, inputs, None, known)
    for node in ordered(root):
        if node.op != "load":
            continue
        for place, (index, size) in enumerate(zip(node.args, shapes[node.value], strict=True)):
            low, high = int(known[id(index)].low), int(known[id(index)].high)
            if (-size <= low and high < size) or not attained(index):
                continue
            name, where = captures[node.value].shown, sites.get(id(node))
            raise InvalidProblemError(
                f"a mod reads {name} outside its bounds{f' ({where})' if where else ''}: its index in dimension {place} runs from "
                f"{low} to {high}, and the tensor of shape {tuple(shapes[node.value])} has {size} elements there. "
                f"{', '.join(f'{key} < {value}' for key, value in sizes.items() if key in index.depends)} in this call."
            )


def check_values(
    root: Node,
    captures: Sequence[Capture],
    tables: Sequence[Any],
    sizes: Mapping[str, int],
    sites: Mapping[int, Any],
    first_batch: int = 0,
) -> None:
    """Like `check`, by every value that each index takes: for debugging, since it may be one for each pair of a query and a key.

    Args:
        root, captures, sizes, sites: as in `check`.
        tables: captured tensors as NumPy arrays.
        first_batch: the first value of b.

    Raises:
        InvalidProblemError: names the tensor, the index, where it occurs and the line.
    """
    for node in ordered(root):
        if node.op != "load":
            continue
        for place, (index, size) in enumerate(zip(node.args, tables[node.value].shape, strict=True)):
            for inputs in _blocks(index, sizes, first_batch):
                values = np.asarray(semantics.evaluate(index, inputs, tables))
                outside = np.argwhere((values < -size) | (values >= size))
                if not len(outside):
                    continue
                at = tuple(outside[0])
                where = ", ".join(
                    f"{key} = {int(np.broadcast_to(value, values.shape)[at])}" for key, value in inputs.items()
                )
                raise InvalidProblemError(
                    f"a mod reads {captures[node.value].shown} outside its bounds ({sites.get(id(node), 'unknown line')}): its "
                    f"index in dimension {place} is {int(values[at])} at {where}, and the tensor of shape "
                    f"{tuple(tables[node.value].shape)} has {size} elements there."
                )


def _blocks(index: Node, sizes: Mapping[str, int], first_batch: int) -> Iterator[dict[str, Any]]:
    """All values of the arguments that an index depends on, some at a time, as arrays that broadcast."""
    names = [name for name in sizes if name in index.depends]
    ranges = [np.arange(sizes[name], dtype=np.int32) + (first_batch if name == "b" else 0) for name in names]
    grids = dict(zip(names, np.meshgrid(*ranges, indexing="ij", sparse=True), strict=True)) if names else {}
    if not {"q_idx", "kv_idx"} <= set(names):
        yield grids
        return
    step = max(1, _AT_ONCE // sizes["kv_idx"])
    rows = grids["q_idx"]
    for start in range(0, sizes["q_idx"], step):
        yield {**grids, "q_idx": np.take(rows, range(start, min(start + step, sizes["q_idx"])), names.index("q_idx"))}


def attained(node: Node) -> bool:
    """Whether the bounds of a value are values that it takes: every argument stands in it once, and all steps are monotone."""
    if node.op in ("input", "const"):
        return True
    if node.op not in _MONOTONE or "score" in node.depends:
        return False
    seen: set[str] = set()
    for arg in node.args:
        if seen & arg.depends or not attained(arg):
            return False
        seen |= arg.depends
    return True
