"""Functions of one position, over all positions 0 .. size - 1: their bounds on ranges, where they cross a value, where they hold.

Values are computed in chunks and never kept as a whole, so that a table of 128k tokens costs some kilobytes: of a function that
grows or falls throughout (sorted document ids, a chunk's number) only the direction is kept, of another the bounds of each
few positions, of a condition the runs in which it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

Array = Any
_STEP = 1 << 13  # positions that are computed at once
_SAMPLES = 1 << 12  # values that are kept of functions that grow or fall throughout


class Line:
    """A number at each position.

    Args:
        at: positions (int64) -> values; called with positions of [first, last] alone.
        first, last: of the positions, inclusive.
    """

    def __init__(self, at: Callable[[Array], Array], first: int, last: int) -> None:
        self.at, self.first, self.last = at, first, last
        # Of how many positions one value is a sample: it divides what is computed at once.
        self._step = min(_STEP, 1 << ((last - first) // _SAMPLES).bit_length())
        # Positions whose bounds are kept together: a divisor of every tile, and few numbers in all.
        self._chunk = min(64, max(8, 1 << ((last - first + 1) // 2048).bit_length()))

    def steps(self) -> Iterator[tuple[int, Array]]:
        """All values, some thousand at a time, with the position of the first."""
        for start in range(self.first, self.last + 1, _STEP):
            positions = np.arange(start, min(start + _STEP, self.last + 1))
            yield start, np.broadcast_to(self.at(positions), positions.shape)

    @cached_property
    def direction(self) -> int:
        """1 where values never fall, -1 where they never grow (and are not all equal), else 0."""
        rises = falls = True
        before: Any = None
        samples: list[Array] = []
        for _, values in self.steps():
            samples.append(values[:: self._step].copy())
            if before is not None:
                rises, falls = rises and before <= values[0], falls and before >= values[0]
            rises = rises and bool(np.all(values[1:] >= values[:-1]))
            falls = falls and bool(np.all(values[1:] <= values[:-1]))
            if not (rises or falls):
                return 0
            before = values[-1]
        self._samples = np.concatenate(samples)
        return 1 if rises else -1

    def bounds(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Minimum and maximum on [low, high], both within the positions; of no monotone function they are of whole chunks."""
        if self.direction:
            ends = self.at(low), self.at(high)
            return ends if self.direction > 0 else ends[::-1]
        minima, maxima = self._levels
        left, right = (low - self.first) // self._chunk, (high - self.first) // self._chunk
        # Two overlapping stretches of 2^level chunks cover the range (a sparse table).
        level = np.frexp((right - left + 1).astype(np.float64))[1] - 1
        second = right - (1 << level) + 1
        return (
            np.minimum(minima[level, left], minima[level, second]),
            np.maximum(maxima[level, left], maxima[level, second]),
        )

    @cached_property
    def _levels(self) -> tuple[Array, Array]:
        """Bounds of 2^level chunks from each chunk on, by level."""
        parts: list[tuple[Array, Array]] = []
        for _, values in self.steps():
            edges = np.arange(0, len(values), self._chunk)
            parts.append((np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)))
        levels = []
        for side, pick in ((0, np.minimum), (1, np.maximum)):
            rows = [np.concatenate([part[side] for part in parts])]
            while (1 << len(rows)) <= len(rows[0]):
                reach = 1 << (len(rows) - 1)
                row = rows[-1].copy()
                row[:-reach] = pick(row[:-reach], row[reach:])
                rows.append(row)
            levels.append(np.stack(rows))
        return levels[0], levels[1]

    def hull(self, low: Array, high: Array, at_least: Array | None, at_most: Array | None, strict: bool) -> Any:
        """The smallest [low', high'] within [low, high] that holds all positions whose value is in bounds; empty where low' > high'.

        Args:
            low, high: ranges of positions.
            at_least, at_most: one of them: bounds that values must keep.
            strict: whether the bound itself is out.
        """
        sign = 1 if at_least is not None else -1
        limit = at_least if at_least is not None else -np.asarray(at_most)

        def fine(positions: Array) -> Array:
            values = self.at(positions)
            values = values if sign > 0 else -values
            return values > limit if strict else values >= limit

        if self.direction == 0:
            return self._chunk_hull(low, high, limit, sign, strict)
        if self.direction * sign > 0:  # it holds from some position on
            return self._crossing(low, high, fine, sign, limit, "right" if strict else "left"), high
        stop = self._crossing(low, high, lambda x: ~fine(x), -sign, -np.asarray(limit), "left" if strict else "right")
        return low, stop - 1

    def _crossing(
        self, low: Array, high: Array, fine: Callable[[Array], Array], sign: int, limit: Array, side: Literal["left", "right"]
    ) -> Array:  # fmt: skip
        """The first position in [low, high + 1] from which on `fine` holds: among the samples, then by bisection between two of them.

        Args:
            low, high: ranges of positions.
            fine: whether it holds.
            sign, limit, side: the same of sign * value, which never falls: the place of `limit` among them.
        """
        samples = sign * self._samples.astype(np.float64 if self._samples.dtype.kind == "f" else np.int64)
        place = np.searchsorted(samples, limit, side=side)
        # Fine from here on, where there is such a sample; not fine at the sample before it.
        reach = self.first + place * self._step
        low, high = np.asarray(low), np.asarray(high)
        below = np.maximum(low - 1, np.minimum(reach - self._step, high))  # not fine; fine
        above = np.maximum(np.where(place < len(samples), np.minimum(high + 1, reach), high + 1), below + 1)
        for _ in range((self._step - 1).bit_length()):
            middle = (below + above) >> 1
            inside = (middle > below) & (middle < above)
            good = fine(np.clip(middle, self.first, self.last))
            above = np.where(inside & good, middle, above)
            below = np.where(inside & ~good, middle, below)
        return above

    def _chunk_hull(self, low: Array, high: Array, limit: Array, sign: int, strict: bool) -> tuple[Array, Array]:
        minima, maxima = self._levels
        best = maxima[0] if sign > 0 else -minima[0]
        count = len(best)
        # The largest value up to a chunk, and from it on: both monotone, so that a limit is found by bisection.
        upto, onward = np.maximum.accumulate(best), np.maximum.accumulate(best[::-1])
        side: Literal["left", "right"] = "right" if strict else "left"
        first = np.searchsorted(upto, limit, side=side)
        last = count - 1 - np.searchsorted(onward, limit, side=side)
        none = first >= count
        low = np.maximum(low, self.first + first * self._chunk)
        high = np.minimum(high, self.first + last * self._chunk + self._chunk - 1)
        return np.where(none, high + 1, low), high


class Table(Line):
    """scale * table[position] + offset, of integers: a captured tensor itself, looked up without computing.

    Args:
        table: one value a position or more.
        scale: not 0.
        offset: added.
        first, last: of the positions.
        rising: tells whether the table itself never falls (1), never grows (-1) or neither (0).
    """

    def __init__(self, table: Array, scale: int, offset: int, first: int, last: int, rising: Callable[[], int]) -> None:
        super().__init__(lambda positions: table[positions].astype(np.int64) * scale + offset, first, last)
        self._table, self._scale, self._offset = table[first : last + 1], scale, offset
        self._rising = rising

    @cached_property
    def direction(self) -> int:
        return self._rising() * (1 if self._scale > 0 else -1)

    @cached_property
    def _samples(self) -> Array:  # type: ignore[override]  # the direction is told, so nothing has kept them on the way
        return self.at(np.arange(self.first, self.last + 1, self._step))

    def hull(self, low: Array, high: Array, at_least: Array | None, at_most: Array | None, strict: bool) -> Any:
        rising = self.direction * (1 if self._scale > 0 else -1)
        if rising != 1:
            return super().hull(low, high, at_least, at_most, strict)
        # As a bound of the table's own values, which then is one search in it.
        lower = (at_least is not None) == (self._scale > 0)
        limit = np.asarray(at_least if at_least is not None else at_most) - self._offset
        limit = limit if self._scale > 0 else -limit
        size = abs(self._scale)
        if lower:  # table >= limit / size, or >
            wanted = limit // size + 1 if strict else -(-limit // size)
        else:  # table <= limit / size, or <: up to the first value beyond
            wanted = -(-limit // size) if strict else limit // size + 1
        place = self.first + self._search(wanted)
        return (np.maximum(low, place), high) if lower else (low, np.minimum(high, place - 1))

    def _search(self, wanted: Array) -> Array:
        """The first place in the table, from 0, whose value is at least as wanted; its length where there is none."""
        limits = np.iinfo(self._table.dtype)
        found = np.searchsorted(self._table, np.clip(wanted, limits.min, limits.max).astype(self._table.dtype))
        return np.where(wanted > limits.max, len(self._table), found)


class Runs:
    """Where a condition holds.

    Args:
        starts, stops: of the maximal ranges in which it holds, [start, stop), in order.
    """

    def __init__(self, starts: Array, stops: Array) -> None:
        self.starts, self.stops = starts, stops

    @classmethod
    def of(cls, line: Line) -> Runs:
        """The runs of a bool at each position."""
        edges: list[Array] = []
        before = False
        for start, values in line.steps():
            changed = np.flatnonzero(values[1:] != values[:-1]) + 1 + start
            if bool(values[0]) != before:
                changed = np.concatenate([[start], changed])
            edges.append(changed)
            before = bool(values[-1])
        flat = np.concatenate([*edges, [line.last + 1] if before else []]).astype(np.int64)
        return cls(flat[::2], flat[1::2])

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def largest_gap(self) -> int:
        """The most positions in a row, between two runs, where the condition does not hold."""
        return int(np.max(self.starts[1:] - self.stops[:-1], initial=0))

    def hull(self, low: Array, high: Array) -> tuple[Array, Array]:
        """The first and the last position in [low, high] where the condition holds; empty where low' > high'."""
        if not len(self):
            return low, low - 1
        after = np.searchsorted(self.stops, low, side="right")
        first = np.maximum(low, self.starts[np.minimum(after, len(self) - 1)])
        before = np.searchsorted(self.starts, high, side="right") - 1
        last = np.minimum(high, self.stops[np.maximum(before, 0)] - 1)
        none = (after >= len(self)) | (before < 0)
        return np.where(none, high + 1, first), np.where(none, low - 1, last)


def shared(values: Sequence[Array]) -> tuple[Array, ...]:
    """Arrays of one shape."""
    return tuple(np.array(value, dtype=np.int64) for value in np.broadcast_arrays(*values))
