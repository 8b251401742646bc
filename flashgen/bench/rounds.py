"""The protocol of `flashgen bench`: contestants take turns, and what is compared was timed in the same round.

1. Warm up in whole rounds until two neighbouring windows of rounds agree (clocks have settled), or for `most_ms`.
2. Every round runs each contestant once, in an order shuffled anew with a fixed seed, so that drift hits all alike.
3. Every call takes the next of several copies of the inputs, so that none finds its inputs in a cache.
4. A ratio is formed within each round and summarised after: drift that lasts longer than a round cancels out.
5. A twin of the baseline competes like everybody else: how far its ratio strays from 1 is the noise floor.

A change of any of these is a new name in `PROTOCOL_SIDE_BY_SIDE`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flashgen.bench.timing import Wait, summarise

PROTOCOL_SIDE_BY_SIDE = "side-by-side-2"  # 2: the host's time is hidden
LEAST_FLOOR = 0.005  # below half a percent nothing is claimed, however quiet the machine
_WINDOW = 5  # rounds that are compared with the five before them
_SETTLED = 0.01  # how far two windows' medians may lie apart
_RESAMPLES = 2000

Call = Callable[[], object]
Verdict = Literal["faster", "slower", "tied"]


class Clock(Protocol):
    """Times calls that follow each other; a test holds its own."""

    def times(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call, run in this order."""


class WallClock:
    """The host's clock, for work that is done when the call returns."""

    def times(self, calls: Sequence[Call]) -> list[float]:
        spans = []
        for call in calls:
            start = time.perf_counter_ns()
            call()
            spans.append((time.perf_counter_ns() - start) / 1e6)
        return spans


class EventClock:
    """CUDA events round every call, one synchronisation at the end.

    The device waits until the host has queued all calls: a call that is faster than its launch would else be timed as the launch. Where
    the host was too slow, the calls are run again, after a longer wait.
    """

    def __init__(self) -> None:
        self._wait = Wait()

    def times(self, calls: Sequence[Call]) -> list[float]:
        while True:
            spans, late = self._attempt(calls)
            if not late or not self._wait.lengthen():
                return spans

    def _attempt(self, calls: Sequence[Call]) -> tuple[list[float], bool]:
        import torch

        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        late = False
        self._wait.queue()
        for call, (start, stop) in zip(calls, events, strict=True):
            start.record()
            call()
            stop.record()
            late = late or bool(start.query())
        torch.cuda.synchronize()
        return [float(start.elapsed_time(stop)) for start, stop in events], late


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What was timed.

    Attributes:
        samples: contestant -> milliseconds of its calls; the i-th of each were taken in the same round.
        warm_up_rounds: rounds before the first sample.
        settled: whether the warm-up ended because the times had settled, not because its time was over.
        interrupted: Ctrl-C ended it; the rounds that were complete are kept.
        expired: the caller's time was over before all rounds were run.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    warm_up_rounds: int = 0
    settled: bool = False
    interrupted: bool = False
    expired: bool = False


def run_rounds(
    contestants: Mapping[str, Sequence[Call]],
    *,
    clock: Clock,
    rounds: int = 30,
    seed: int = 0,
    least_ms: float = 200.0,
    most_ms: float = 2000.0,
    expired: Callable[[], bool] = lambda: False,
) -> Rounds:
    """Time contestants side by side.

    Args:
        contestants: name -> its calls, one per copy of the inputs; equally many for all.
        clock: what times them.
        rounds: how many samples of each.
        seed: of the shuffles.
        least_ms, most_ms: bounds of the warm-up, in time that the clock saw.
        expired: asked before each round; True ends it early.

    Returns:
        Equally many samples of every contestant. An interrupt or the caller's deadline leaves fewer than `rounds`.
    """
    turn = _Turns(contestants, random.Random(seed), clock)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    warm: list[float] = []
    settled = interrupted = late = False
    try:
        while not (settled or late):
            if warm and sum(warm) >= most_ms:
                break
            warm.append(sum(turn.round().values()))
            settled = sum(warm) >= least_ms and _agree(warm)
            late = expired()
        for _ in range(rounds):
            if late:
                break
            for name, span in turn.round().items():
                samples[name].append(span)
            late = expired()
    except KeyboardInterrupt:
        interrupted = True
        whole = min(map(len, samples.values()), default=0)
        samples = {name: spans[:whole] for name, spans in samples.items()}
    return Rounds(
        samples=samples,
        warm_up_rounds=len(warm),
        settled=settled,
        interrupted=interrupted,
        expired=late and any(len(spans) < rounds for spans in samples.values()),
    )


class _Turns:
    """Shuffled orders, and copies of the inputs handed out in rotation over all calls."""

    def __init__(self, contestants: Mapping[str, Sequence[Call]], shuffler: random.Random, clock: Clock) -> None:
        self._contestants, self._shuffler, self._clock = contestants, shuffler, clock
        self._order = list(contestants)
        self._calls = 0

    def round(self) -> dict[str, float]:
        self._shuffler.shuffle(self._order)
        calls = []
        for name in self._order:
            # One counter for all: a copy is used again only after every other copy was, whoever's turn it is.
            copies = self._contestants[name]
            calls.append(copies[self._calls % len(copies)])
            self._calls += 1
        return dict(zip(self._order, self._clock.times(calls), strict=True))


def _agree(spans: Sequence[float]) -> bool:
    if len(spans) < 2 * _WINDOW:
        return False
    now, before = statistics.median(spans[-_WINDOW:]), statistics.median(spans[-2 * _WINDOW : -_WINDOW])
    return abs(now - before) <= _SETTLED * before


# -- statistics --


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A contestant's time over the baseline's, formed round by round: above 1 the baseline is faster.

    Attributes:
        median, p10, p90: of the rounds' ratios.
        low, high: 95 % bootstrap interval of the median.
        rounds: how many.
    """

    median: float
    p10: float
    p90: float
    low: float
    high: float
    rounds: int


def pairwise_ratio(times: Sequence[float], baseline: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratios of two contestants' times, pair by pair.

    Args:
        times: milliseconds, one per round; at least one.
        baseline: those of the same rounds.
        seed: of the bootstrap.
    """
    import numpy as np

    ratios = np.asarray(times, dtype=float) / np.asarray(baseline, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
    found = summarise(ratios.tolist(), PROTOCOL_SIDE_BY_SIDE)
    return Ratio(
        median=found.latency_ms,
        p10=found.latency_p10_ms,
        p90=found.latency_p90_ms,
        low=float(low),
        high=float(high),
        rounds=len(ratios),
    )


def noise_floor(twin: Ratio | None) -> float:
    """The least difference that may be called one: the far end of the twin's interval, at least `LEAST_FLOOR`."""
    return LEAST_FLOOR if twin is None else max(LEAST_FLOOR, abs(twin.low - 1.0), abs(twin.high - 1.0))


def verdict(ratio: Ratio, floor: float) -> Verdict:
    """What the contestant is against the baseline; `tied` unless the whole interval lies beyond the floor."""
    if ratio.high < 1.0 / (1.0 + floor):
        return "faster"
    return "slower" if ratio.low > 1.0 + floor else "tied"
