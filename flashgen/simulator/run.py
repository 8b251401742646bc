"""`simulate`: run a kernel file on CPU tensors and report what it did, or what is wrong with it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.errors import InvalidProblemError
from flashgen.simulator import load, sites
from flashgen.simulator.errors import KernelPythonError, SimulationError
from flashgen.simulator.jit import RUN, JitFunction, Run
from flashgen.simulator.machine import Launch, Settings
from flashgen.simulator.schedule import SCHEDULES, Schedule

if TYPE_CHECKING:
    from flashgen.render import KernelSource

RELAXATIONS = ("fence-after-load", "store-wait")
_one_at_a_time = threading.RLock()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchReport:
    """What one launch did.

    Attributes:
        kernel: name of the jit function.
        grid: CTAs along the three axes.
        smem_bytes: the most shared memory a CTA allocated.
        tma_load_bytes, tma_store_bytes: bytes that TMA moved, clipped parts included.
        products: wgmmas performed.
        sum_order: digest of which CTAs added floats to which elements, in order, where sums had to be ordered (`ordered_sums`):
            the same under every schedule, else the kernel's bits depend on it.
        steps: scheduling points; switches: how often another partition took over.
    """

    kernel: str
    grid: tuple[int, int, int]
    smem_bytes: int
    tma_load_bytes: int
    tma_store_bytes: int
    products: int
    sum_order: str
    steps: int
    switches: int

    @classmethod
    def of(cls, launch: Launch) -> LaunchReport:
        counters, scheduler = launch.counters, launch.scheduler
        return cls(
            kernel=launch.kernel,
            grid=launch.grid,
            smem_bytes=counters.smem_bytes,
            tma_load_bytes=counters.tma_load_bytes,
            tma_store_bytes=counters.tma_store_bytes,
            products=counters.products,
            sum_order=launch.sum_order(),
            steps=scheduler.steps,
            switches=scheduler.switches,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """A simulation that found no defect.

    Attributes:
        schedule, seed: what chose the interleaving; the same two repeat it.
        launches: what each launch did, in order.
    """

    schedule: Schedule
    seed: int
    launches: tuple[LaunchReport, ...]

    def __str__(self) -> str:
        lines = [f"no defect found under schedule {self.schedule!r}, seed {self.seed}"]
        lines += [
            f"  {one.kernel}: grid {one.grid}, {one.steps} steps, {one.products} wgmma, "
            f"{one.tma_load_bytes} bytes loaded and {one.tma_store_bytes} stored by TMA, "
            f"{one.smem_bytes} bytes of shared memory"
            for one in self.launches
        ]
        return "\n".join(lines)


def simulate(
    source: str | Path | KernelSource,
    args: Mapping[str, Any],
    *,
    schedule: Schedule = "random",
    seed: int = 0,
    entry: str = "launch",
    grid: Any = None,
    processors: int = 3,
    max_steps: int = 1_000_000,
    timeout_s: float = 300.0,
    smem_bytes: int = 232_448,
    relax: Collection[str] = (),
    ordered_sums: bool = False,
) -> SimulationReport:
    """Run a Gluon kernel on the CPU, checking every access of memory by happens-before.

    Args:
        source: the text of a kernel file, its path, or a rendered `KernelSource`.
        args: arguments of the entry function, by name; CPU tensors, into which results are written.
        schedule: who runs when and when asynchronous work completes: "eager" at once, "lazy" as late as possible,
            "random", or "priority" (random priorities that change now and then).
        seed: of the schedule's choices: the same schedule and seed repeat a run.
        entry: the function of the file to call: a host function that launches kernels (as `launch` of rendered files),
            or a jit function, which is launched with `grid`.
        grid: CTAs of a jit entry, a tuple of up to three; launch options (num_warps) stand in `args`.
        processors: CTAs that run at a time, and what `multi_processor_count` says.
        max_steps, timeout_s: scheduling points, and seconds without one, after which a launch counts as endless.
        smem_bytes: shared memory of a CTA (default: sm_90).
        relax: rules to leave out that may be stricter than a compiler needs: "fence-after-load" (a proxy fence is also
            needed between an ordinary read and the asynchronous write that overwrites it), "store-wait" (only the
            issuing thread knows of a `tma.store_wait` until its partition's next barrier).
        ordered_sums: whether atomic additions of floats to the same element must be ordered (`UnorderedSumError`), as
            those of a deterministic kernel are; else they may come in any order.

    Returns:
        What the launches did; no defect was found.

    Raises:
        InvalidProblemError: source, args or options are wrong.
        SimulationError: the first defect, one subclass per kind, with the source lines of both sides.
    """
    if schedule not in SCHEDULES:
        raise InvalidProblemError(f"schedule {schedule!r} is unknown; known are {', '.join(SCHEDULES)}.")
    unknown = set(relax) - set(RELAXATIONS)
    if unknown:
        raise InvalidProblemError(f"relax holds {sorted(unknown)}; known are {', '.join(RELAXATIONS)}.")
    if processors < 1:
        raise InvalidProblemError(f"processors is {processors}: at least one CTA must run.")
    settings = Settings(
        schedule=schedule, seed=seed, processors=processors, max_steps=max_steps, timeout_s=timeout_s,
        smem_bytes=smem_bytes, relax=frozenset(relax), ordered_sums=ordered_sums,
    )  # fmt: skip
    text, shown = load.read(source)
    with _one_at_a_time:
        loaded = load.Loaded(text, shown, processors)
        token = RUN.set(run := Run(settings))
        try:
            _call(loaded, entry, grid, dict(args))
        finally:
            RUN.reset(token)
            loaded.close()
    return SimulationReport(schedule=schedule, seed=seed, launches=tuple(map(LaunchReport.of, run.launches)))


def _call(loaded: load.Loaded, entry: str, grid: Any, args: dict[str, Any]) -> None:
    function = loaded.namespace.get(entry)
    if not callable(function):
        names = sorted(name for name, value in loaded.namespace.items() if isinstance(value, JitFunction))
        raise InvalidProblemError(
            f"the file has no function {entry!r}; give entry=, one of its kernels with grid=: {', '.join(names)}."
        )
    if isinstance(function, JitFunction):
        if grid is None:
            raise InvalidProblemError(f"{entry} is a kernel: give grid=, the number of CTAs.")
        function[grid](**args)
        return
    if grid is not None:
        raise InvalidProblemError(f"{entry} launches by itself: grid= is for a kernel.")
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        raise InvalidProblemError(f"args do not fit {entry}{inspect.signature(function)}: {error}.") from error
    try:
        with load.poisoning():
            function(**args)
    except (SimulationError, InvalidProblemError):
        raise
    except Exception as error:
        site = sites.innermost(error).site()
        raise KernelPythonError(
            f"{entry} raised {type(error).__name__}: {error}\n    at {site}", sites=(site,)
        ) from error
