"""Named barriers of a CTA (`bar.sync`, `bar.arrive` in inline assembly): threads are counted, and that is all.

Hardware also orders the memory of those who meet. That is not modelled: a kernel that takes turns at a named barrier stays right
without them, and a race that only a named barrier prevents is reported.
"""

from __future__ import annotations

import re
from typing import Any

from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.errors import BarrierError
from flashgen.simulator.sites import here

# One instruction; what may follow gives the assembly the result that every inline assembly has.
_TEXT = re.compile(r"bar(?:rier)?\.(sync|arrive)(?:\.aligned)? (\d+), (\d+); mov\.b32 \$0, 0;")
_MOST = 16
_LANES = 32


class NamedBarrier:
    """One of a CTA's 16 barriers.

    Attributes:
        arrived: threads that have come since it last opened.
        opened: how often it has.
        threads: how many open it; whoever comes first says so.
    """

    def __init__(self) -> None:
        self.arrived = self.opened = self.threads = 0


def parse(text: str) -> tuple[str, int, int] | None:
    """(sync or arrive, number, threads) of an assembly text that is a named barrier, else None."""
    match = _TEXT.fullmatch(" ".join(text.split()))
    return (match[1], int(match[2]), int(match[3])) if match else None


def meet(what: str, number: int, threads: int) -> None:
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
    before = barrier.opened
    if barrier.arrived == threads:
        barrier.arrived, barrier.opened = 0, before + 1

    def blocked() -> tuple[str, Any]:
        return f"waits at named barrier {number}: {barrier.arrived} of {threads} threads are there", mark

    if what == "sync":
        scheduler.point(lambda: barrier.opened > before, blocked)
    else:
        scheduler.point()
