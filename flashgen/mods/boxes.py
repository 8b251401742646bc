"""Narrow ranges of queries and keys to what a term allows: where nothing is left, no pair in them satisfies it.

Only pairs that cannot satisfy a term are removed, so an empty result is proof. Bounds of q, kv and q - kv are closed exactly (three
variables: one pass over each pair of edges), so for terms of such bounds alone every key left has a query left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashgen.mods import intervals
from flashgen.mods.intervals import Interval
from flashgen.mods.lines import shared
from flashgen.mods.literals import On, Opaque, Order, Term

Array = Any
_PASSES = 3  # further ones gain nothing in the families that are exact


@dataclass(slots=True)
class Boxes:
    """Ranges of queries and keys, inclusive; one array element a box.

    Attributes:
        q0, q1, k0, k1: the ranges; those of a dead box mean nothing.
        alive: whether a pair may be left.
    """

    q0: Array
    q1: Array
    k0: Array
    k1: Array
    alive: Array

    @classmethod
    def of(cls, q0: Array, q1: Array, k0: Array, k1: Array) -> Boxes:
        """Boxes from bounds that broadcast."""
        q0, q1, k0, k1 = shared((q0, q1, k0, k1))
        return cls(q0, q1, k0, k1, (q0 <= q1) & (k0 <= k1))

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All of it."""
        return self.q0, self.q1, self.k0, self.k1, self.alive


Judge = Callable[[Opaque, Boxes], Array]  # whether a literal may hold somewhere in each box


def narrowed(term: Term, boxes: Boxes, judge: Judge) -> Boxes:
    """What a term leaves of boxes.

    Args:
        term: the literals.
        boxes: ranges within the positions.
        judge: decides opaque literals.

    Returns:
        New boxes, each within its old one.
    """
    zone = term.zone
    q0, q1 = np.maximum(boxes.q0, zone["q"][0]), np.minimum(boxes.q1, zone["q"][1])
    k0, k1 = np.maximum(boxes.k0, zone["k"][0]), np.minimum(boxes.k1, zone["k"][1])
    left = Boxes(q0, q1, k0, k1, boxes.alive & (q0 <= q1) & (k0 <= k1))
    for _ in range(_PASSES if term.rest else 1):
        before = left.arrays
        _close(left, term)
        for literal in term.rest:
            if isinstance(literal, On) and literal.axis != "d":
                _on_axis(left, literal)
            elif isinstance(literal, Order):
                _in_order(left, literal)
        if all(map(np.array_equal, before, left.arrays)):
            break  # so would the next pass leave them
    if term.rest:
        _close(left, term)
    for literal in term.rest:
        if isinstance(literal, Opaque):
            left.alive &= judge(literal, left)
    return left


def _kept(boxes: Boxes, q0: Array, q1: Array, k0: Array, k1: Array) -> None:
    """Take over new bounds; boxes that are empty die and keep bounds that are safe to look up."""
    boxes.alive = boxes.alive & (q0 <= q1) & (k0 <= k1)
    alive = boxes.alive
    boxes.q0, boxes.q1 = np.where(alive, q0, boxes.q0), np.where(alive, q1, boxes.q1)
    boxes.k0, boxes.k1 = np.where(alive, k0, boxes.k0), np.where(alive, k1, boxes.k1)


def _safe(boxes: Boxes) -> None:
    """Bounds of dead boxes that are in order, so that look-ups do not fail."""
    boxes.q1, boxes.k1 = np.maximum(boxes.q0, boxes.q1), np.maximum(boxes.k0, boxes.k1)


def _close(boxes: Boxes, term: Term) -> None:
    """Tighten q, kv and their distance against each other."""
    d0 = np.maximum(term.zone["d"][0], boxes.q0 - boxes.k1)
    d1 = np.minimum(term.zone["d"][1], boxes.q1 - boxes.k0)
    for literal in term.rest:
        if isinstance(literal, On) and literal.axis == "d":
            first, last = literal.runs.hull(d0, d1)
            d0, d1 = np.maximum(d0, first), np.minimum(d1, last)
    boxes.alive = boxes.alive & (d0 <= d1)
    _kept(
        boxes,
        np.maximum(boxes.q0, boxes.k0 + d0),
        np.minimum(boxes.q1, boxes.k1 + d1),
        np.maximum(boxes.k0, boxes.q0 - d1),
        np.minimum(boxes.k1, boxes.q1 - d0),
    )


def _on_axis(boxes: Boxes, literal: On) -> None:
    if literal.axis == "q":
        first, last = literal.runs.hull(boxes.q0, boxes.q1)
        _kept(boxes, np.maximum(boxes.q0, first), np.minimum(boxes.q1, last), boxes.k0, boxes.k1)
    else:
        first, last = literal.runs.hull(boxes.k0, boxes.k1)
        _kept(boxes, boxes.q0, boxes.q1, np.maximum(boxes.k0, first), np.minimum(boxes.k1, last))


def _in_order(boxes: Boxes, literal: Order) -> None:
    """f(q) <= g(kv) leaves the keys with g at least the smallest f, and the queries with f at most the largest g."""
    _safe(boxes)
    query, key, strict = literal.query, literal.key, literal.strict
    least, most = query.bounds(boxes.q0, boxes.q1)
    bound = {"at_least": None, "at_most": most} if literal.swapped else {"at_least": least, "at_most": None}
    k0, k1 = key.hull(boxes.k0, boxes.k1, strict=strict, **bound)
    _kept(boxes, boxes.q0, boxes.q1, np.maximum(boxes.k0, k0), np.minimum(boxes.k1, k1))
    _safe(boxes)
    least, most = key.bounds(boxes.k0, boxes.k1)
    bound = {"at_least": least, "at_most": None} if literal.swapped else {"at_least": None, "at_most": most}
    q0, q1 = query.hull(boxes.q0, boxes.q1, strict=strict, **bound)
    _kept(boxes, np.maximum(boxes.q0, q0), np.minimum(boxes.q1, q1), boxes.k0, boxes.k1)


def judged_by_intervals(loads: intervals.Loads) -> Judge:
    """Opaque literals on the intervals of a box."""

    def judge(literal: Opaque, boxes: Boxes) -> Array:
        _safe(boxes)
        inputs = {"q_idx": Interval(boxes.q0, boxes.q1), "kv_idx": Interval(boxes.k0, boxes.k1)}
        found = intervals.evaluate(literal.node, inputs, loads)
        return found.low == 0 if literal.negated else found.high == 1

    return judge


def possible(terms: Sequence[Term], boxes: Boxes, judge: Judge) -> Array:
    """Whether some term may hold somewhere in each box; False is proof that none does."""
    found = np.zeros(np.shape(boxes.q0), bool)
    for term in terms:
        found |= narrowed(term, boxes, judge).alive
    return found
