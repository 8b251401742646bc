"""The timing protocol: CUDA events round single launches, the L2 cache flushed outside them, the median reported.

Versioned, since a time without its protocol is not a fact. Candidates are screened and searched one after another; what decides
is timed in interleaved, shuffled rounds, because a card's speed drifts with what ran before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PROTOCOL_SEARCH = "events-search-2"  # 2: NaN in the output before each launch, its bits compared after, both untimed
PROTOCOL_GRAPH = "graph-search-1"  # several launches in one CUDA graph, on inputs that rotate past the cache
PROTOCOL_FINAL = "events-interleaved-1"
FLUSH_BYTES = 128 << 20  # more than any L2 cache there is
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


class Timer:
    """Times launches on the current CUDA device, with events and a flush buffer of its own."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one launch, with a cold L2 cache."""
        torch = self._torch
        self._flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))


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
