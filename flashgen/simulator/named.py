"""Named barriers of a CTA (`bar.sync`, `bar.arrive` in inline assembly).

Two forms, told apart by where the number stands. `bar.sync 8, 256` takes turns: threads are counted, and that is all. Hardware also orders the
memory of those who meet; that is not modelled, so that a kernel stays right without its turns, and a race that only they prevent is reported.
`bar.sync $1, 288`, the number in a register, hands something over: memory is ordered as hardware does, from each thread that came to each
that waited. Threads of a partition do not meet by it: what one warpgroup reads is not over for the other.
"""

from __future__ import annotations

import re
from typing import Any

from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.errors import BarrierError
from flashgen.simulator.order import Knowledge
from flashgen.simulator.sites import here

# One instruction; what may follow gives the assembly the result that every inline assembly has.
_TEXT = re.compile(r"bar(?:rier)?\.(sync|arrive)(?:\.aligned)? (\d+|\$1), (\d+); mov\.b32 \$0, 0;")
_MOST = 16
_LANES = 32


class NamedBarrier:
    """One of a CTA's 16 barriers.

    Attributes:
        arrived: threads that have come since it last opened.
        opened: how often it has.
        threads: how many open it; whoever comes first says so.
        released: what those who hand over knew when they came.
        completed: `released` when it last opened: what a waiter learns.
    """

    def __init__(self) -> None:
        self.arrived = self.opened = self.threads = 0
        self.released, self.completed = Knowledge(), Knowledge()


def parse(text: str, arguments: Any = ()) -> tuple[str, int, int, bool] | None:
    """(sync or arrive, number, threads, whether it hands over) of an assembly text that is a named barrier, else None."""
    match = _TEXT.fullmatch(" ".join(text.split()))
    if match is None:
        return None
    hands_over = match[2] == "$1"
    return match[1], int(arguments[0]) if hands_over else int(match[2]), int(match[3]), hands_over


def meet(what: str, number: int, threads: int, hands_over: bool = False) -> None:
    """Come to a barrier: `sync` waits until it opens, `arrive` does not."""
    part, scheduler, mark = partition(), launch().scheduler, here()
    if number >= _MOST or threads % _LANES or not threads:
        fail(BarrierError, f"bar.{what} {number}, {threads}: numbers go to {_MOST - 1}, threads in warps of {_LANES}")
    barrier = part.cta.named.setdefault(number, NamedBarrier())
    if barrier.arrived and barrier.threads != threads:
        fail(BarrierError, f"named barrier {number} waits for {barrier.threads} threads, this one says {threads}")
    barrier.threads = threads
    barrier.arrived += part.num_warps * _LANES
    if barrier.arrived > threads:
        fail(BarrierError, f"{barrier.arrived} threads come to named barrier {number}, which {threads} open")
    if hands_over:
        part.knows.seen.tick(part.generic)
        told = part.knows.copy()
        # Each thread has waited for its own products: who waits for all threads knows them to be over.
        told.seen.raise_to(part.product, part.products_waited)
        barrier.released.join(told)
    before = barrier.opened
    if barrier.arrived == threads:
        barrier.arrived, barrier.opened = 0, before + 1
        barrier.released, barrier.completed = Knowledge(), barrier.released

    def blocked() -> tuple[str, Any]:
        return f"waits at named barrier {number}: {barrier.arrived} of {threads} threads are there", mark

    if what == "sync":
        scheduler.point(lambda: barrier.opened > before, blocked)
        if hands_over:
            part.knows.join(barrier.completed)
    else:
        scheduler.point()
