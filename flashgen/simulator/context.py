"""The launch that is being simulated, and the partition that runs: one of each at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from flashgen.simulator.errors import SimulationError
from flashgen.simulator.sites import here

if TYPE_CHECKING:
    from flashgen.simulator.machine import Launch, Partition

_launch: Launch | None = None


def enter(launch: Launch | None) -> None:
    """Make a launch the running one; None ends it."""
    global _launch
    _launch = launch


def active() -> Launch | None:
    """The running launch, None on the host."""
    return _launch


def launch() -> Launch:
    """The running launch.

    Raises:
        RuntimeError: none runs; a device function was called from the host.
    """
    if _launch is None:
        raise RuntimeError("a function of the kernel language was called outside of a simulated launch")
    return _launch


def partition() -> Partition:
    """The partition that runs now."""
    if _launch is None:
        launch()  # says why
    return _launch.scheduler.current.partition  # type: ignore[union-attr, return-value]


def fail(kind: type[SimulationError], message: str) -> NoReturn:
    """Report a defect at the line that runs now."""
    site = here().site()
    names = (partition().name,) if _launch is not None else ()
    by = f" by {names[0]}" if names else ""
    raise kind(f"{message}\n    at {site}{by}", sites=(site,), partitions=names)
