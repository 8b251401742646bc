"""The simulated device: launches of CTAs, CTAs of partitions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashgen.simulator import context
from flashgen.simulator.context import fail
from flashgen.simulator.errors import (
    ByteCountError,
    KernelPythonError,
    ShapeError,
    SimulationError,
    UnfinishedError,
)
from flashgen.simulator.order import Knowledge, VectorClock
from flashgen.simulator.schedule import Event, Schedule, Scheduler, Stop
from flashgen.simulator.sites import HOST, Mark, here, innermost

if TYPE_CHECKING:
    from flashgen.simulator.barriers import Barrier
    from flashgen.simulator.global_memory import Shadow
    from flashgen.simulator.named import NamedBarrier


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How launches are simulated; see `flashgen.simulator.simulate` for the fields."""

    schedule: Schedule = "random"
    seed: int = 0
    processors: int = 3
    max_steps: int = 1_000_000
    timeout_s: float = 300.0
    smem_bytes: int = 232_448  # of a CTA on sm_90
    relax: frozenset[str] = frozenset()
    ordered_sums: bool = False


@dataclass(slots=True)
class Counters:
    """What a launch did."""

    tma_load_bytes: int = 0
    tma_store_bytes: int = 0
    products: int = 0
    smem_bytes: int = 0


class Partition:
    """A strand of a CTA: the whole CTA, or one warp-specialised partition of it.

    Attributes:
        name: for reports, `cta0/p1:producer`.
        knows: what is over for it.
        generic, product, store: its components of `knows.seen`: ordinary accesses, wgmma reads, TMA store reads.
        world, world_store: its components of `knows.world`: ordinary accesses of global memory, TMA stores to it.
    """

    def __init__(self, cta: Cta, name: str, num_warps: int) -> None:
        self.cta, self.name, self.num_warps = cta, name, num_warps
        self.knows = Knowledge()
        self.generic, self.product, self.store = (cta.component() for _ in range(3))
        self.world, self.world_store = (cta.launch.component() for _ in range(2))
        self.products: list[Event] = []
        self.products_issued = self.products_waited = 0
        self.stores: list[Event] = []
        self.stores_issued = 0
        # Stores known to be over by the one thread that issues and waits for them: read from their source, and written.
        self.elected_store = self.elected_written = 0
        self.last_product = self.last_store = HOST
        self.unsettled: float | None = None  # first global access since the partition's threads last met

    def meet(self) -> None:
        """All threads of the partition meet: each knows what the others have done."""
        self.knows.seen.raise_to(self.product, self.products_waited)
        self.knows.seen.raise_to(self.store, self.elected_store)
        self.knows.world.raise_to(self.world_store, self.elected_written)
        self.unsettled = None

    def elected_world(self) -> VectorClock:
        """What the thread that issues TMA operations knows of global memory: its own waits, too."""
        world = self.knows.world
        if self.elected_written > world[self.world_store]:
            world = world.copy()
            world.raise_to(self.world_store, self.elected_written)
        return world

    def finish(self) -> None:
        """Refuse to end with work that nobody waited for."""
        seen = self.knows.seen
        if self.products_issued > self.products_waited:
            left = self.products_issued - self.products_waited
            self._unfinished(f"{left} wgmma", self.last_product)
        done = max(self.elected_store, int(seen[self.store]))
        if self.stores_issued > done:
            self._unfinished(f"{self.stores_issued - done} TMA stores", self.last_store)

    def _unfinished(self, what: str, mark: Mark) -> None:
        site = mark.site()
        raise UnfinishedError(
            f"{self.name} ends with {what} not waited for; the last one was issued at\n        {site}",
            sites=(site,),
            partitions=(self.name,),
        )

    def drain(self) -> None:
        """Complete the stores that are still queued: they were waited for, up to a bound that allowed these."""
        while self.stores:
            self.cta.launch.scheduler.perform(self.stores[0])


class Cta:
    """A block of threads with its shared memory."""

    def __init__(self, launch: Launch, pid: tuple[int, int, int]) -> None:
        self.launch, self.pid = launch, pid
        self.smem_bytes = self.components = 0
        self.barriers: list[Barrier] = []
        self.named: dict[int, NamedBarrier] = {}
        self.name = f"cta{pid[0] if not any(pid[1:]) else pid}"

    def component(self) -> int:
        """A new component of the clocks of this CTA's shared memory."""
        self.components += 1
        return self.components - 1

    def partition(self, name: str, num_warps: int) -> Partition:
        part = Partition(self, f"{self.name}/{name}", num_warps)
        self.launch.scheduler.partitions.append(part)
        return part

    def finish(self, main: Partition) -> None:
        """Refuse to end with loads that may be in flight or bytes outstanding; `main` knows what all others know."""
        for barrier in self.barriers:
            last = barrier.last_load
            if barrier.loads or (last is not None and not last.over_for(main.knows.seen)):
                what = barrier.loads[0].describe() if barrier.loads else str(last)
                raise UnfinishedError(f"{self.name} ends with a load that nobody waited for: {what}")
            if barrier.count is not None and barrier.bytes_left:
                raise ByteCountError(f"{self.name} ends with bytes outstanding; {barrier.state()}")


@dataclass(slots=True)
class Launch:
    """One kernel launch.

    Attributes:
        grid: CTAs along the three axes.
        shadows: who accessed which element of global memory, by storage.
    """

    settings: Settings
    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    counters: Counters = field(default_factory=Counters)
    shadows: dict[int, Shadow] = field(default_factory=dict)
    components: int = 0
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.settings.schedule, self.settings.seed, self.settings.max_steps)

    @property
    def partition(self) -> Partition:
        task = self.scheduler.current
        assert task is not None and task.partition is not None
        return task.partition

    def component(self) -> int:
        """A new component of the clocks of global memory."""
        self.components += 1
        return self.components - 1

    def sum_order(self) -> str:
        """Digest of the order of all additions of floats that had to be ordered; empty where there were none."""
        adders = sorted(one.adders.tobytes() for one in self.shadows.values() if one.adders is not None)
        return hashlib.sha256(b"".join(adders)).hexdigest()[:16] if adders else ""

    def run(self, body: Callable[..., Any], args: list[Any]) -> None:
        """Run every CTA of the grid, `settings.processors` of them at a time.

        Raises:
            SimulationError: the first defect found.
        """
        x, y, z = self.grid
        pids = iter([(i, j, k) for k in range(z) for j in range(y) for i in range(x)])

        def start() -> bool:
            pid = next(pids, None)
            if pid is None:
                return False
            cta = Cta(self, pid)
            part = cta.partition("main", self.num_warps)
            self.scheduler.spawn(part.name, guarded(lambda: whole(cta, part)), part)
            return True

        def whole(cta: Cta, part: Partition) -> None:
            body(*args)
            part.finish()
            part.drain()
            cta.finish(part)
            self.scheduler.partitions.remove(part)
            self.counters.smem_bytes = max(self.counters.smem_bytes, cta.smem_bytes)
            start()

        for _ in range(self.settings.processors):
            if not start():
                break
        self.scheduler.run(self.settings.timeout_s)


def guarded(body: Callable[[], None]) -> Callable[[], None]:
    """A task's body that reports a plain Python exception of the kernel's text with its line."""

    def run() -> None:
        try:
            body()
        except (SimulationError, Stop):
            raise
        except Exception as error:
            site, name = innermost(error).site(), context.partition().name
            raise KernelPythonError(
                f"the kernel raised {type(error).__name__}: {error}\n    at {site} by {name}",
                sites=(site,),
                partitions=(name,),
            ) from error

    return run


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    """Run the first function in the current warps and each other one in a partition of its own."""
    launch, main = context.launch(), context.partition()
    (default, default_args), *workers = functions_and_args
    if len(worker_num_warps) != len(workers):
        fail(ShapeError, f"{len(workers)} worker partitions, but {len(worker_num_warps)} worker_num_warps")
    if worker_num_regs is not None and len(worker_num_regs) != len(workers):
        fail(ShapeError, f"{len(workers)} worker partitions, but {len(worker_num_regs)} worker_num_regs")
    cta, left = main.cta, len(workers)
    main.meet()
    main.name = f"{cta.name}/p0:{_name(default)}"
    mark = here()

    def work(part: Partition, function: Any, args: Any) -> None:
        nonlocal left
        function(*args)
        part.finish()
        part.drain()
        part.meet()
        main.knows.join(part.knows)
        launch.scheduler.partitions.remove(part)
        left -= 1

    def spawn(number: int, function: Any, args: Any, num_warps: int) -> None:
        part = cta.partition(f"p{number}:{_name(function)}", num_warps)
        part.knows.join(main.knows)
        launch.scheduler.spawn(part.name, guarded(lambda: work(part, function, args)), part)

    for number, ((function, args), num_warps) in enumerate(zip(workers, worker_num_warps, strict=True), 1):
        spawn(number, function, args, int(num_warps))
    task = launch.scheduler.current
    if task is not None:
        task.name = main.name
    result = default(*default_args)
    launch.scheduler.point(lambda: left == 0, lambda: ("has ended and waits for the other partitions", mark))
    return result


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))
