"""The timing protocol: CUDA events round single launches, the L2 cache flushed outside them, the median reported.

The host must be done with a launch before the device begins to time it: else the time is the host's. So the device first waits, for
longer than the host takes; `Timer` sees when it did not. Without that wait a kernel of 9 us was read as 84 us on an H200 (bf16, head dim 128, S 256),
and one of 64 us as 154 us.

Versioned, since a time without its protocol is not a fact. Candidates are screened and searched one after another; what decides
is timed in interleaved, shuffled rounds, because a card's speed drifts with what ran before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# 2: NaN in the output before each launch, its bits compared after, both untimed. 3: the host's time is hidden.
PROTOCOL_SEARCH = "events-search-3"
PROTOCOL_GRAPH = "graph-search-1"  # several launches in one CUDA graph, on inputs that rotate past the cache
PROTOCOL_FINAL = "events-interleaved-2"  # 2: the host's time is hidden
FLUSH_BYTES = 128 << 20  # more than any L2 cache there is
_LEAST_WAIT_CYCLES, _MOST_WAIT_CYCLES = 1 << 17, 1 << 25  # at 2 GHz 65 us and 17 ms
_WARM_UP = 3
_LEAST_SAMPLES = 7
_MOST_SAMPLES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Times of one kernel.

    Attributes:
        latency_ms: median of a launch.
        latency_p10_ms, latency_p90_ms: percentiles.
        samples: how many launches were timed.
        protocol: how.
    """

    latency_ms: float
    latency_p10_ms: float
    latency_p90_ms: float
    samples: int
    protocol: str


class Wait:
    """Keeps the device busy until the host has queued what is to be timed."""

    def __init__(self) -> None:
        self._cycles = _LEAST_WAIT_CYCLES

    def queue(self) -> None:
        """Queue the wait."""
        import torch

        torch.cuda._sleep(self._cycles)  # what PyTorch's own benchmarks wait with

    def lengthen(self) -> bool:
        """Wait twice as long from now on; False where that would be absurd."""
        longer = self._cycles < _MOST_WAIT_CYCLES
        self._cycles = min(2 * self._cycles, _MOST_WAIT_CYCLES)
        return longer


class Timer:
    """Times launches on the current CUDA device, with events and a flush buffer of its own."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._wait = Wait()

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one launch, with a cold L2 cache and the launch queued before it is timed.

        Where the host was too slow for that it is launched again, after a longer wait.
        """
        while True:
            time, late = self._attempt(run)
            if not late or not self._wait.lengthen():
                return time

    def _attempt(self, run: Callable[[], object]) -> tuple[float, bool]:
        """The time, and whether the device began to time before the host was done."""
        torch = self._torch
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._wait.queue()
        self._flush.zero_()
        start.record()
        run()
        stop.record()
        late = bool(start.query())
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)), late


def measure(
    run: Callable[[], object],
    *,
    once: Callable[[Callable[[], object]], float],
    budget_ms: float = 15.0,
    protocol: str = PROTOCOL_SEARCH,
) -> Measurement:
    """Time one kernel alone, for search.

    Args:
        run: launches it.
        once: milliseconds of one launch, e.g. `Timer().once`.
        budget_ms: of GPU time; at least 7 launches are timed whatever it says.
        protocol: name of how `once` times.
    """
    for _ in range(_WARM_UP):
        once(run)
    samples: list[float] = []
    while len(samples) < _LEAST_SAMPLES or (sum(samples) < budget_ms and len(samples) < _MOST_SAMPLES):
        samples.append(once(run))
    return summarise(samples, protocol)


def measure_interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    once: Callable[[Callable[[], object]], float],
    rounds: int = 30,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Time several kernels side by side: every round runs each once, in a shuffled order.

    Args:
        runs: name -> launch.
        once: milliseconds of one launch.
        rounds: how many.
        seed: of the shuffles.
    """
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    for name in order:
        once(runs[name])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(once(runs[name]))
    return {name: summarise(values, PROTOCOL_FINAL) for name, values in samples.items()}


def summarise(samples: Sequence[float], protocol: str) -> Measurement:
    """Median, 10th and 90th percentile of samples in milliseconds."""
    ranked = sorted(samples)
    last = len(ranked) - 1
    median = (ranked[last // 2] + ranked[(last + 1) // 2]) / 2
    return Measurement(
        latency_ms=median,
        latency_p10_ms=ranked[round(0.1 * last)],
        latency_p90_ms=ranked[round(0.9 * last)],
        samples=len(ranked),
        protocol=protocol,
    )
