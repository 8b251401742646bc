"""The measuring process that a run will most likely want, started before anything else is loaded: its imports take as long as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashgen.tuner import devices
from flashgen.tuner.worker import Device, DeviceLostError, MeasuringWorker


@contextmanager
def ahead(mode: str, cluster: str | None, provider: str = "cuda") -> Iterator[MeasuringWorker | None]:
    """A worker of this host's current device that is coming up, or None where a run will surely not measure here.

    Whoever takes it closes it; left over it is closed at the end. That it does not start is for its user to find out.
    """
    if mode == "predicted" or cluster is not None or (provider != "cpu" and not devices.has_driver()):
        yield None
        return
    worker = MeasuringWorker(Device(kind=provider))
    try:
        worker.spawn()
    except DeviceLostError:
        yield None
        return
    try:
        yield worker
    finally:
        worker.close()
