"""`KeyRanges`: which blocks of keys each block of queries visits, and which of them unmasked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashgen.mods.boxes import Boxes

Array = Any
_TILES = 1 << 14  # judged at once
_MOST_TILES = 1 << 16  # judged one by one at all: beyond it ranges with gaps stay as they are, which is safe


@dataclass(frozen=True, slots=True)
class Rows:
    """Segments of blocks of keys, per block of queries; in order, disjoint, none empty.

    Attributes:
        count: (rows,) how many.
        start, stop: (rows, segments) [start, stop) in blocks of keys.
        full: (rows, segments) whether all pairs of these tiles are visible.
    """

    count: Array
    start: Array
    stop: Array
    full: Array

    @classmethod
    def of(cls, true: Sequence[Boxes], false: Sequence[Boxes], seqlen_k: int, block_n: int) -> Rows:
        """From the keys that terms of the mask and of its negation leave."""
        rows = len((true or false)[0].alive) if true or false else 0
        if not true:
            return cls(np.zeros(rows, np.int32), *(np.zeros((rows, 1), kind) for kind in (np.int32, np.int32, bool)))
        seen = [_blocks(boxes, block_n) for boxes in true]
        gaps = [_blocks(boxes, block_n) for boxes in false]
        # A last block that is not full of keys needs its bounds masked.
        if seqlen_k % block_n:
            ragged = np.full(rows, seqlen_k // block_n)
            gaps.append((ragged, ragged + 1))
        cuts = np.sort(np.stack([edge for pair in (*seen, *gaps) for edge in pair], axis=1), axis=1)
        start, stop = cuts[:, :-1], cuts[:, 1:]
        visible, holes = _covered(start, seen), _covered(start, gaps)
        return _merged(start, stop, visible & (start < stop), visible & ~holes)

    @classmethod
    def of_classes(cls, kinds: Array) -> Rows:
        """From the class of every tile: 0 none, 1 some, 2 all; (rows, blocks of keys)."""
        row, key = np.nonzero(kinds)
        return _packed(len(kinds), row, key, key + 1, kinds[row, key] == 2)

    def refined(
        self,
        classify: Callable[..., Array],
        seqlen_q: int,
        seqlen_k: int,
        block_m: int,
        block_n: int,
        most: int = _MOST_TILES,
    ) -> Rows:
        """Judge every tile that is not known to be full by itself: ranges may have gaps. More than `most` stay as they are."""
        sizes = np.where(self.full, 0, self.stop - self.start)
        sizes = np.where(np.arange(sizes.shape[1]) < self.count[:, None], sizes, 0)
        row, segment = np.nonzero(sizes)
        length = sizes[row, segment]
        if not len(row) or int(length.sum()) > most:
            return self
        tile_row = np.repeat(row, length)
        within = np.arange(len(tile_row)) - np.repeat(np.cumsum(length) - length, length)
        tile_key = np.repeat(self.start[row, segment], length) + within
        found = np.empty(len(tile_row), np.int8)
        for first in range(0, len(tile_row), _TILES):
            part = slice(first, first + _TILES)
            q0, k0 = tile_row[part].astype(np.int64) * block_m, tile_key[part].astype(np.int64) * block_n
            q1, k1 = np.minimum(q0 + block_m, seqlen_q) - 1, np.minimum(k0 + block_n, seqlen_k) - 1
            kinds = classify(q0, q1, k0, k1)
            found[part] = np.where((kinds == 2) & (k0 + block_n > seqlen_k), 1, kinds)
        keep = found > 0
        whole_row, whole = np.nonzero(self.full & (np.arange(sizes.shape[1]) < self.count[:, None]))
        rows = np.concatenate([tile_row[keep], whole_row])
        starts = np.concatenate([tile_key[keep], self.start[whole_row, whole]])
        stops = np.concatenate([tile_key[keep] + 1, self.stop[whole_row, whole]])
        full = np.concatenate([found[keep] == 2, np.ones(len(whole_row), bool)])
        order = np.lexsort((starts, rows))
        return _packed(len(self.count), rows[order], starts[order], stops[order], full[order])


def _blocks(boxes: Boxes, block_n: int) -> tuple[Array, Array]:
    """[start, stop) in blocks that hold the keys of each box; empty for a dead one."""
    start = np.where(boxes.alive, boxes.k0 // block_n, 0)
    return start, np.where(boxes.alive, boxes.k1 // block_n + 1, 0)


def _covered(start: Array, ranges: Sequence[tuple[Array, Array]]) -> Array:
    found = np.zeros(start.shape, bool)
    for low, high in ranges:
        found |= (start >= low[:, None]) & (start < high[:, None])
    return found


def _merged(start: Array, stop: Array, keep: Array, full: Array) -> Rows:
    """Segments that are kept, neighbours of one kind joined."""
    row, place = np.nonzero(keep)
    return _packed(len(start), row, start[row, place], stop[row, place], full[row, place])


def _packed(rows: int, row: Array, start: Array, stop: Array, full: Array) -> Rows:
    """Segments in order of row and start, as a table; neighbours of one kind joined."""
    joins = np.zeros(len(row), bool)
    if len(row):
        joins[1:] = (row[1:] == row[:-1]) & (start[1:] == stop[:-1]) & (full[1:] == full[:-1])
    heads = np.flatnonzero(~joins)
    last = np.append(heads[1:], len(row)) - 1
    row, start, stop, full = row[heads], start[heads], stop[last] if len(row) else stop, full[heads]
    count = np.bincount(row, minlength=rows).astype(np.int32)
    width = max(1, int(count.max(initial=0)))
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    table = [np.zeros((rows, width), kind) for kind in (np.int32, np.int32, bool)]
    for one, values in zip(table, (start, stop, full), strict=True):
        one[row, place] = values
    return Rows(count, *table)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRanges:
    """Which keys each block of queries visits. All arrays are int32 but `segment_full`; positions count blocks of `block_n` keys.

    Attributes:
        block_n: keys of a block.
        first, last: (B, H, rows) all visited blocks lie in [first, last); equal where there are none.
        full_first, full_last: (B, H, rows) the longest range of blocks whose tiles are all visible; equal where there is none.
        segment_count: (B, H, rows) how many segments.
        segment_start, segment_stop: (B, H, rows, segments) [start, stop) of blocks, in order, disjoint.
        segment_full: (B, H, rows, segments) whether these tiles are all visible, so that no mask is needed.
    """

    block_n: int
    first: Array
    last: Array
    full_first: Array
    full_last: Array
    segment_count: Array
    segment_start: Array
    segment_stop: Array
    segment_full: Array

    @classmethod
    def stacked(cls, parts: Sequence[Rows], shape: tuple[int, int], block_n: int) -> KeyRanges:
        """Rows of several batches and heads, in row-major order."""
        width = max(part.start.shape[1] for part in parts)

        def table(name: str) -> Array:
            padded = [np.pad(getattr(one, name), ((0, 0), (0, width - one.start.shape[1]))) for one in parts]
            return np.stack(padded).reshape(*shape, -1, width)

        count = np.stack([part.count for part in parts]).reshape(*shape, -1)
        start, stop, full = table("start"), table("stop"), table("full")
        there = np.arange(width) < count[..., None]
        longest = np.argmax(np.where(there & full, stop - start, 0), axis=-1)[..., None]
        whole = np.take_along_axis(there & full, longest, -1)[..., 0]
        first = np.where(count > 0, start[..., 0], 0)
        last = np.max(np.where(there, stop, 0), axis=-1, initial=0)
        return cls(
            block_n=block_n,
            first=first.astype(np.int32),
            last=last.astype(np.int32),
            full_first=np.where(whole, np.take_along_axis(start, longest, -1)[..., 0], last).astype(np.int32),
            full_last=np.where(whole, np.take_along_axis(stop, longest, -1)[..., 0], last).astype(np.int32),
            segment_count=count,
            segment_start=start,
            segment_stop=stop,
            segment_full=full,
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether `first`, `full_first`, `full_last` and `last` say all: no gaps, and one range of full tiles a row."""
        there = np.arange(self.segment_start.shape[-1]) < self.segment_count[..., None]
        visited = np.where(there, self.segment_stop - self.segment_start, 0)
        whole = np.where(self.segment_full, visited, 0).sum(-1)
        return bool(
            np.all(visited.sum(-1) == self.last - self.first) and np.all(whole == self.full_last - self.full_first)
        )

    def classes(self, num_blocks: int) -> Array:
        """(B, H, rows, num_blocks) 0 none, 1 some, 2 all of a tile; for pictures and tests, since it holds every tile."""
        found = np.zeros((*self.first.shape, num_blocks), np.int8)
        for index in np.ndindex(self.first.shape):
            for place in range(self.segment_count[index]):
                one = (*index, place)
                found[index][self.segment_start[one] : self.segment_stop[one]] = 1 + self.segment_full[one]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        names = ("first", "last", "full_first", "full_last", "segment_count", "segment_start", "segment_stop")
        return sum(int(getattr(self, name).nbytes) for name in (*names, "segment_full"))
