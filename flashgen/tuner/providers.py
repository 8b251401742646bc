"""Where a measuring worker's launches run, and how they are timed there: a CUDA device, or the CPU.

The CPU has no generated kernels of its own: it is there so that everything round a kernel (faults, statistics, several workers) runs,
and is tested, where there is no GPU.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flashgen.bench import Timer, nvml
from flashgen.errors import InvalidProblemError

Call = Callable[[], object]

# Below this an event pair measures the launch, not the kernel: such kernels are timed many at a time, in a CUDA graph.
SHORT_MS = 0.020
GRAPH_LAUNCHES = 32


class Provider(Protocol):
    """A device as the worker uses it.

    Attributes:
        device: torch's name of it.
        short_ms: launches shorter than this are timed `together`; 0 where none are.
        cache_bytes: what inputs have to rotate through, so that no launch finds its own in a cache.
    """

    device: str
    short_ms: float
    cache_bytes: int

    def once(self, run: Call) -> float:
        """Milliseconds of one call."""

    def together(self, runs: Sequence[Call]) -> Call:
        """One call that does all of them with the least time between."""

    def synchronize(self) -> None:
        """Wait for all launches; raises what they raised."""

    def describe(self) -> dict[str, str]:
        """The device: `name`, and what a stored time depends on (`driver`, `uuid`)."""

    def state(self) -> dict[str, Any] | None:
        """Clocks, throttling, other processes now (`nvml.GpuState`); None where nothing tells."""


class CudaProvider:
    """The process's first CUDA device: events, the L2 cache flushed before each, graphs for short kernels."""

    device = "cuda"
    short_ms = SHORT_MS

    def __init__(self) -> None:
        import torch

        self._torch, self._timer = torch, Timer()
        self._properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = 2 * int(self._properties.L2_cache_size)
        self._watch = nvml.watch(str(self._properties.uuid))

    def once(self, run: Call) -> float:
        return self._timer.once(run)

    def together(self, runs: Sequence[Call]) -> Call:
        graph = self._torch.cuda.CUDAGraph()
        stream = self._torch.cuda.Stream()
        stream.wait_stream(self._torch.cuda.current_stream())
        with self._torch.cuda.stream(stream):
            runs[0]()  # whatever is set up at a first launch may not be captured
        self._torch.cuda.current_stream().wait_stream(stream)
        with self._torch.cuda.graph(graph):
            for run in runs:
                run()
        replay: Call = graph.replay
        return replay

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def describe(self) -> dict[str, str]:
        from flashgen.bench.environment import gpu_state

        return {
            "name": str(self._properties.name),
            "uuid": str(self._properties.uuid),
            "driver": str(gpu_state().get("driver", "")),
        }

    def state(self) -> dict[str, Any] | None:
        found = None if self._watch is None else self._watch.read()
        return None if found is None else found.to_json()


class CpuProvider:
    """The host: its clock, no cache flushed."""

    device = "cpu"
    short_ms = 0.0
    cache_bytes = 0

    def once(self, run: Call) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def together(self, runs: Sequence[Call]) -> Call:
        def every() -> None:
            for run in runs:
                run()

        return every

    def synchronize(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {"name": platform.processor() or platform.machine()}

    def state(self) -> dict[str, Any] | None:
        return None


def make(kind: str) -> Provider:
    """A provider by its name.

    Raises:
        InvalidProblemError: the name is not known.
    """
    if kind == "cuda":
        return CudaProvider()
    if kind == "cpu":
        return CpuProvider()
    raise InvalidProblemError(f"provider {kind!r} is not known: allowed are cuda, cpu.")
