"""mbarriers: arrivals, expected bytes, phases, and what their completion tells those who wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.dtypes import int64
from flashgen.simulator.errors import BarrierError, ByteCountError, PhaseError, ShapeError
from flashgen.simulator.layouts import MBarrierLayout
from flashgen.simulator.order import Access, Knowledge
from flashgen.simulator.schedule import Event
from flashgen.simulator.shared import SharedView, allocate_shared_memory
from flashgen.simulator.sites import here

if TYPE_CHECKING:
    from flashgen.simulator.machine import Partition


class Barrier:
    """One mbarrier.

    Attributes:
        component: of `Knowledge.seen`: the number of its completed phases.
        count: arrivals a phase needs; None before init and after invalidate.
        pending: arrivals the running phase still lacks.
        bytes_left: bytes expected and not landed; negative when more landed.
        phase: completed phases.
        loads: TMA loads in flight that signal it.
        released: what those who arrived knew.
        completed: `released` at the end of the last phase: what a waiter learns.
    """

    def __init__(self, name: str, component: int) -> None:
        self.name, self.component = name, component
        self.count: int | None = None
        self.invalidated = False
        self.pending = self.bytes_left = self.phase = 0
        self.loads: list[Event] = []
        self.released, self.completed = Knowledge(), Knowledge()
        self.last_load: Access | None = None
        self._landed = False
        self._arrivals: list[tuple[int, float]] = []
        self._last_arrivals: list[tuple[int, float]] = []

    def state(self) -> str:
        return (
            f"{self.name}: {self.phase} phases completed, {self.pending} of {self.count} arrivals missing, "
            f"{self.bytes_left} bytes outstanding"
        )

    def known_to(self, part: Partition) -> int:
        """Completed phases that a partition can know of.

        It has waited for them, heard of them from one who did, or knows of every arrival of the last one.
        """
        seen = part.knows.seen
        if self._last_arrivals and all(clock <= seen[component] for component, clock in self._last_arrivals):
            return self.phase
        return int(seen[self.component])

    def arrive(self, count: int, part: Partition) -> None:
        """Count arrivals of a partition that releases what it knows."""
        if self.phase > self.known_to(part):
            fail(
                PhaseError,
                f"{part.name} arrives for phase {self.phase} of {self.name} without knowing that phase "
                f"{self.phase - 1} has completed: in another order the arrival counts for the wrong phase",
            )
        if self.pending < count:
            fail(BarrierError, f"more arrivals than the barrier's count; {self.state()}")
        self.released.join(part.knows)
        self.pending -= count
        self._arrivals.append((part.generic, part.knows.seen[part.generic]))
        self.settle()

    def land(self, event: Event, nbytes: int, access: Access) -> None:
        """A TMA load has written its bytes: it is over for whoever knows of this phase's completion."""
        access.clock = self.phase + 1
        self.last_load = access
        self.loads.remove(event)
        self.bytes_left -= nbytes
        self._landed = True
        self.settle()

    def settle(self) -> None:
        """Complete the phase when nothing is missing."""
        if self.pending or self.bytes_left > 0:
            return
        if self.bytes_left < 0:
            self._wrong_bytes("more bytes landed than were expected")
        if self.loads:
            self._wrong_bytes(f"a phase completes while a load is in flight ({self.loads[0].describe()})")
        self.phase += 1
        self.pending = self.count or 0
        # Landed bytes are nobody's arrival: whoever knows of all arrivals does not yet know of the load.
        self._last_arrivals = [] if self._landed else self._arrivals
        self._arrivals, self._landed = [], False
        self.released.seen.raise_to(self.component, self.phase)
        self.completed = self.released.copy()

    def _wrong_bytes(self, why: str) -> NoReturn:
        mark = here()
        raise ByteCountError(f"{why}; {self.state()}\n    at {mark.site()}", sites=(mark.site(),))


def barrier_of(view: SharedView) -> Barrier:
    """The barrier that a view of one int64 holds."""
    if isinstance(view, SharedView) and view.barrier is not None:
        return view.barrier
    if not isinstance(view, SharedView) or view.data.size != 1 or view.dtype is not int64:
        fail(ShapeError, f"{view} is not one mbarrier")
    allocation, cta = view.allocation, partition().cta
    address = view.data.__array_interface__["data"][0]
    barrier = allocation.barriers.get(address)
    if barrier is None:
        number = (address - allocation.data.__array_interface__["data"][0]) // 8
        barrier = allocation.barriers[address] = Barrier(f"{allocation.name}[{number}]", cta.component())
        cta.barriers.append(barrier)
    view.barrier = barrier
    return barrier


def live(view: SharedView) -> Barrier:
    """The barrier, which must be initialised."""
    barrier = barrier_of(view)
    if barrier.count is None:
        when = "after mbarrier.invalidate" if barrier.invalidated else "before mbarrier.init"
        fail(BarrierError, f"{barrier.name} is used {when}")
    return barrier


def init(mbarrier: SharedView, count: Any) -> None:
    """Initialise with the number of arrivals of a phase."""
    barrier = barrier_of(mbarrier)
    if barrier.count is not None:
        fail(BarrierError, f"{barrier.name} is initialised twice without mbarrier.invalidate")
    if count < 1:
        fail(BarrierError, f"{barrier.name} is initialised with count {count}")
    barrier.count = barrier.pending = int(count)
    barrier.phase = barrier.bytes_left = 0


def invalidate(mbarrier: SharedView) -> None:
    """End the barrier's use."""
    barrier = live(mbarrier)
    if barrier.loads:
        fail(BarrierError, f"{barrier.name} is invalidated with a TMA load in flight")
    barrier.count, barrier.invalidated = None, True


def expect(mbarrier: SharedView, bytes: Any, pred: Any = True) -> None:
    """Arrive once and expect bytes in the running phase."""
    if not pred:
        return
    barrier, part = live(mbarrier), partition()
    barrier.bytes_left += int(bytes)
    part.knows.seen.tick(part.generic)
    barrier.arrive(1, part)


def arrive(mbarrier: SharedView, *, count: Any = 1, pred: Any = True) -> None:
    """Arrive: all threads of the partition meet, and one of them signals."""
    if not pred:
        return
    barrier, part = live(mbarrier), partition()
    # The signalling thread is the one that waited for its TMA stores; the others learn of that at a barrier of theirs.
    part.unsettled = None
    seen, world = part.knows.seen, part.knows.world
    seen.tick(part.generic)
    seen.raise_to(part.product, part.products_waited)
    kept, part.knows.world = seen[part.store], part.elected_world()
    seen.raise_to(part.store, part.elected_store)
    try:
        barrier.arrive(int(count), part)
    finally:
        seen.values[part.store], part.knows.world = kept, world
    launch().scheduler.point()


def wait(mbarrier: SharedView, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    """Wait until the phase of this parity has completed."""
    if not pred:
        return
    barrier, part, parity, mark = live(mbarrier), partition(), int(phase), here()
    if parity not in (0, 1):
        fail(PhaseError, f"phase {parity} is neither 0 nor 1")
    start, scheduler = barrier.phase, launch().scheduler
    if start & 1 == parity:

        def blocked() -> tuple[str, Any]:
            return f"waits for phase {parity} of {barrier.state()}", mark

        scheduler.point(lambda: barrier.phase != start, blocked)
        if barrier.phase != start + 1:
            missed = barrier.phase - start
            fail(PhaseError, f"{barrier.name} completed {missed} phases while {part.name} waited for one of them")
    else:
        scheduler.point()
        if barrier.phase & 1 == parity:
            fail(PhaseError, f"{barrier.name} ran a phase ahead before {part.name} had looked")
    known = barrier.known_to(part)
    if barrier.phase - known > 1:
        fail(
            PhaseError,
            f"{part.name} takes phase {barrier.phase - 1} of {barrier.name} for phase {known}: it missed phases, "
            "and parity cannot tell them apart",
        )
    if barrier.phase:
        part.knows.join(barrier.completed)


def allocate_mbarrier(batch: Any = None, two_ctas: bool = False) -> SharedView:
    """Shared memory for one barrier, or for `batch` of them."""
    return allocate_shared_memory(int64, [1] if batch is None else [batch, 1], MBarrierLayout())
