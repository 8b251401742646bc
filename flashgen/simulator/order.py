"""Happens-before: vector clocks, what a partition knows, and the accesses that are checked against it.

Every access carries a component and a value of it. An access is over, for a partition, once the partition's clock has
reached that value; synchronisation carries clocks from one partition to the other. A missing wait is thus found by
what the partition *cannot know*, even where this run's interleaving happened to be harmless (FastTrack, Flanagan and
Freund 2009, with a component more for every asynchronous engine).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flashgen.simulator.sites import Mark

Proxy = Literal["generic", "async"]
IN_FLIGHT = math.inf


class VectorClock:
    """A growing vector of counters; what lies beyond its end is zero."""

    __slots__ = ("values",)

    def __init__(self, values: list[float] | None = None) -> None:
        self.values: list[float] = [] if values is None else values

    def __getitem__(self, component: int) -> float:
        values = self.values
        return values[component] if component < len(values) else 0

    def raise_to(self, component: int, value: float) -> None:
        """Learn that `component` has reached `value`."""
        values = self.values
        if component >= len(values):
            values.extend([0] * (component + 1 - len(values)))
        if value > values[component]:
            values[component] = value

    def tick(self, component: int) -> float:
        """Count one more event of a component of one's own."""
        self.raise_to(component, self[component] + 1)
        return self.values[component]

    def join(self, other: VectorClock) -> None:
        """Learn all that `other` knows."""
        mine, theirs = self.values, other.values
        common = len(theirs)
        if len(mine) == common:
            self.values = [a if a > b else b for a, b in zip(mine, theirs)]  # noqa: B905  (of one length)
        else:
            mine.extend([0] * (common - len(mine)))
            mine[:common] = [a if a > b else b for a, b in zip(mine, theirs)]  # noqa: B905  (what lies beyond stays)

    def copy(self) -> VectorClock:
        return VectorClock(self.values.copy())


class Knowledge:
    """What a partition, a barrier or a memory location knows to be over.

    Attributes:
        seen: accesses of shared memory, over the components of one CTA.
        fenced: the part of `seen` that a proxy fence has made visible to TMA and wgmma.
        world: accesses of global memory, over the components of the whole launch.
    """

    __slots__ = ("fenced", "seen", "world")

    def __init__(self) -> None:
        self.seen, self.fenced, self.world = VectorClock(), VectorClock(), VectorClock()

    def join(self, other: Knowledge) -> None:
        self.seen.join(other.seen)
        self.fenced.join(other.fenced)
        self.world.join(other.world)

    def copy(self) -> Knowledge:
        new = Knowledge()
        new.seen, new.fenced, new.world = self.seen.copy(), self.fenced.copy(), self.world.copy()
        return new


@dataclass(slots=True)
class Access:
    """One access of memory.

    Attributes:
        component, clock: over for whoever knows that `component` has reached `clock`.
        proxy: through the ordinary path, or TMA and wgmma.
        what: the operation, in words.
        who: the partition.
        mark: its source line.
        atomic: an atomic access of global memory: such never race with each other.
        adds: an atomic addition of floats: its result depends on its place among others.
    """

    component: int
    clock: float
    proxy: Proxy
    what: str
    who: str
    mark: Mark
    atomic: bool = False
    adds: bool = False

    def over_for(self, clock: VectorClock) -> bool:
        return self.clock <= clock[self.component]

    def __str__(self) -> str:
        return f"{self.what} by {self.who}\n        {self.mark.site()}"
