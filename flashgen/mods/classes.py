"""Block classes of a mask: which tiles are all true, all false, or mixed; and the keys of each block of queries as ranges.

The mask is an *or* of terms (`literals`), its negation too. For a block of queries each term leaves a range of keys (`boxes`); keys
outside all ranges of the mask see nothing, keys outside all ranges of its negation are seen by every query. So a block of
queries costs a few comparisons, whatever the number of keys, and no list of all tiles is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flashgen.mods import semantics
from flashgen.mods.boxes import Boxes, Judge, judged_by_intervals, narrowed, possible
from flashgen.mods.graph import Graph, Node, ordered, rebuilt
from flashgen.mods.intervals import Interval, anything
from flashgen.mods.lines import Line
from flashgen.mods.literals import Opaque, Reader, Term, TooManyTermsError
from flashgen.mods.ranges import KeyRanges, Rows

Array = Any
NONE, SOME, ALL = 0, 1, 2  # of a tile's pairs
# Of tiles that are looked at: samples along each side, at once, at most, and the pairs of those whose samples are of one kind.
_SAMPLES, _TILES, _MOST_LOOKED, _MOST_PAIRS = 8, 128, 1 << 13, 1 << 20


@dataclass(frozen=True, slots=True)
class Classifier:
    """A mask of one batch and head, ready to judge tiles.

    Attributes:
        true, false: the terms of the mask and of its negation.
        judge: decides opaque literals.
        seqlen_q, seqlen_k: lengths, at least one each.
    """

    true: tuple[Term, ...]
    false: tuple[Term, ...]
    judge: Judge
    seqlen_q: int
    seqlen_k: int

    def classify(self, q0: Array, q1: Array, k0: Array, k1: Array) -> Array:
        """NONE, SOME or ALL of tiles [q0, q1] x [k0, k1], bounds inclusive and within the lengths."""
        boxes = Boxes.of(q0, q1, k0, k1)
        some, gaps = possible(self.true, boxes, self.judge), possible(self.false, boxes, self.judge)
        return np.where(~some, NONE, np.where(gaps, SOME, ALL))

    def is_dense(self, block: int) -> bool:
        """Whether ranges of keys have no gaps as wide as a block, so that `rows` alone is exact."""
        return all(term.is_dense(block) for term in (*self.true, *self.false))

    def rows(self, block_m: int) -> tuple[list[Boxes], list[Boxes]]:
        """For blocks of queries, what each term of the mask and of its negation leaves of all keys."""
        first = np.arange(0, self.seqlen_q, block_m)
        boxes = Boxes.of(first, np.minimum(first + block_m, self.seqlen_q) - 1, 0, self.seqlen_k - 1)
        true, false = ([narrowed(term, boxes, self.judge) for term in side] for side in (self.true, self.false))
        return true, false


def classifier(
    mask: Node, tables: Sequence[Array], *, seqlen_q: int, seqlen_k: int, b: int = 0, h: int = 0
) -> Classifier:
    """Take a mask apart for one batch and head.

    Args:
        mask: a bool of b, h, q_idx and kv_idx.
        tables: captured tensors by number, as NumPy arrays (`arrays_of`).
        seqlen_q, seqlen_k: lengths, at least one each.
        b, h: the batch and the head.
    """
    graph = Graph()
    numbers = {"b": graph.const(b, "int32"), "h": graph.const(h, "int32")}
    mask = rebuilt(
        graph,
        mask,
        {id(node): numbers[node.value] for node in ordered(mask) if node.op == "input" and node.value in numbers},
    )
    mask = _without_numbers(graph, mask, tables)
    reader = Reader(graph, tables, seqlen_q, seqlen_k)
    try:
        true, false = tuple(reader.terms(mask, negated=False)), tuple(reader.terms(mask, negated=True))
    except TooManyTermsError:
        true, false = ((Term(reader.whole, (Opaque(mask, negated),)),) for negated in (False, True))
    return Classifier(true, false, judged_by_intervals(_Loads(tables, seqlen_q, seqlen_k)), seqlen_q, seqlen_k)


def _without_numbers(graph: Graph, mask: Node, tables: Sequence[Array]) -> Node:
    """Elements that depend on no index become the numbers that they are."""
    fixed = {
        id(node): graph.const(np.asarray(semantics.evaluate(node, {}, tables)).item(), node.dtype)
        for node in ordered(mask)
        if node.op == "load" and not node.depends
    }
    return rebuilt(graph, mask, fixed) if fixed else mask


class _Loads:
    """Bounds of a captured tensor's elements over ranges of an index that is q_idx or kv_idx itself."""

    def __init__(self, tables: Sequence[Array], seqlen_q: int, seqlen_k: int) -> None:
        self._tables, self._lengths = tables, {"q_idx": seqlen_q, "kv_idx": seqlen_k}
        self._lines: dict[int, Line] = {}

    def __call__(self, node: Node, indices: Sequence[Interval]) -> Interval:
        table = self._tables[node.value]
        if node.dtype == "bool":
            table = table.view(np.uint8) if table.dtype == np.bool_ else table
        if len(indices) != 1 or not len(table) or not np.issubdtype(table.dtype, np.integer):
            return anything(node.dtype)
        line = self._lines.setdefault(node.value, Line(lambda positions: table[positions], 0, len(table) - 1))
        low, high = np.broadcast_arrays(indices[0].low, indices[0].high)
        inside = (low >= 0) & (high < len(table))
        least, most = line.bounds(np.clip(low, 0, len(table) - 1), np.clip(high, 0, len(table) - 1))
        every = anything(node.dtype)
        return Interval(
            np.where(inside, least.astype(np.int64), every.low), np.where(inside, most.astype(np.int64), every.high)
        )


def arrays_of(tensors: Sequence[Tensor], read: Sequence[int] | None = None) -> list[Array]:
    """Captured tensors for the analysis: NumPy's view of what lies on the CPU, a copy of the rest.

    Args:
        tensors: by number.
        read: the numbers that are wanted, None for all; in the place of the others stands None.
    """
    return [
        np.asarray(
            (tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 2 else tensor).detach().cpu()
        )
        if read is None or number in read
        else None
        for number, tensor in enumerate(tensors)
    ]


class Looked:
    """Classes of tiles that several terms see or hide together, such as a chunk's end beside the diagonal: no term alone is proof.

    A few pairs of a tile are evaluated, and all of them where these are of one kind.

    Args:
        mask, tables, b, h: as of `classifier`.
        pairs: how many may be evaluated in tiles whose samples are of one kind; tiles beyond them stay as they are, which is safe.
    """

    def __init__(self, mask: Node, tables: Sequence[Array], b: int, h: int, pairs: int) -> None:
        self._mask, self._tables, self._fixed, self._left = mask, tables, {"b": np.int32(b), "h": np.int32(h)}, pairs

    def __call__(self, q0: Array, q1: Array, k0: Array, k1: Array) -> Array:
        kinds, steps = np.full(len(q0), SOME, np.int8), np.arange(_SAMPLES)
        for first in range(0, len(q0), _TILES):
            part = slice(first, first + _TILES)
            q, k = (
                low[part, None] + (high - low)[part, None] * steps // (_SAMPLES - 1)
                for low, high in ((q0, q1), (k0, k1))
            )
            seen = self._at(q[:, :, None], k[:, None, :]).reshape(len(q), -1)
            for tile in first + np.flatnonzero(seen.all(1) | ~seen.any(1)):
                size = int((q1[tile] - q0[tile] + 1) * (k1[tile] - k0[tile] + 1))
                if size > self._left:
                    return kinds
                self._left -= size
                rows, keys = np.arange(q0[tile], q1[tile] + 1), np.arange(k0[tile], k1[tile] + 1)
                pairs = self._at(rows[:, None], keys[None])
                kinds[tile] = ALL if pairs.all() else SOME if pairs.any() else NONE
        return kinds

    def _at(self, q: Array, k: Array) -> Array:
        index = {**self._fixed, "q_idx": q.astype(np.int32), "kv_idx": k.astype(np.int32)}
        return np.broadcast_to(
            semantics.evaluate(self._mask, index, self._tables), np.broadcast_shapes(q.shape, k.shape)
        )


def key_ranges(
    mask: Node,
    tables: Sequence[Array],
    *,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_m: int,
    block_n: int,
) -> KeyRanges:
    """The keys of each block of queries, as ranges of whole blocks of keys.

    Args:
        mask: a bool of b, h, q_idx and kv_idx.
        tables: captured tensors (`arrays_of`).
        batch, num_heads, seqlen_q, seqlen_k: of the problem.
        block_m, block_n: the tile.

    Returns:
        Ranges of shape (batch or 1, num_heads or 1, blocks of queries): 1 where the mask does not depend on it.
    """
    batches = range(batch if "b" in mask.depends else 1)
    heads = range(num_heads if "h" in mask.depends else 1)
    found = []
    for b in batches:
        for h in heads:
            one = classifier(mask, tables, seqlen_q=seqlen_q, seqlen_k=seqlen_k, b=b, h=h)
            rows = _rows(one, block_m, block_n)
            if len(one.true) > 1 or len(one.false) > 1:
                looked = Looked(mask, tables, b, h, _MOST_PAIRS // (len(batches) * len(heads)))
                most = _MOST_LOOKED // (len(batches) * len(heads))
                rows = rows.refined(looked, seqlen_q, seqlen_k, block_m, block_n, most)
            found.append(rows)
    return KeyRanges.stacked(found, (len(batches), len(heads)), block_n)


def query_ranges(
    mask: Node,
    tables: Sequence[Array],
    *,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_m: int,
    block_n: int,
) -> KeyRanges:
    """The queries of each block of keys, as a backward for keys and values walks them; arguments as in `key_ranges`.

    Returns:
        Ranges whose rows are blocks of keys and whose positions count blocks of `block_m` queries, the last of which is never
        full where queries do not fill it.
    """
    graph = Graph()
    other = {"q_idx": graph.input("kv_idx"), "kv_idx": graph.input("q_idx")}
    inputs = [node for node in ordered(mask) if node.op == "input" and node.value in other]
    turned = rebuilt(graph, mask, {id(node): other[node.value] for node in inputs})
    return key_ranges(
        turned,
        tables,
        batch=batch,
        num_heads=num_heads,
        seqlen_q=seqlen_k,
        seqlen_k=seqlen_q,
        block_m=block_n,
        block_n=block_m,
    )


def _rows(one: Classifier, block_m: int, block_n: int) -> Rows:
    true, false = one.rows(block_m)
    rows = Rows.of(true, false, one.seqlen_k, block_n)
    return (
        rows
        if one.is_dense(min(block_m, block_n))
        else rows.refined(one.classify, one.seqlen_q, one.seqlen_k, block_m, block_n)
    )
