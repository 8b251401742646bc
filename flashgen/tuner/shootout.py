"""The final word: contestants timed in interleaved, shuffled rounds against the incumbent, whose twin measures the noise.

A card's speed drifts by some percent, and one-after-another timing turns drift into winners. Within a round everybody sees nearly the same
card, so the ratio to the incumbent of the same round is what is compared. The incumbent runs twice a round: the second run, its A/A twin,
differs by nothing but noise, and whoever wants to win must clear what it shows. The interval is a percentile bootstrap of the median
(Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

PROTOCOL = "shootout-2"  # 2: the host's time is hidden
PROTOCOL_GRAPH = "shootout-graph-1"  # each turn is a CUDA graph of several launches, on inputs that rotate
LEAST_ROUNDS = 30
MOST_ROUNDS = 240
_LOOKS = (30, 45, 60, 90, 120, 180, 240)  # rounds after which to look whether it is decided
LEAST_FLOOR = 0.005  # no difference below half a percent is called one
NOISY_FLOOR = 0.02  # above it the machine was too noisy: the result is of low quality
TWIN = "A/A twin"
_RESAMPLES = 400
_LEVEL = 0.99  # of the intervals: there are several contestants, looked at several times

Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A median log-ratio to the incumbent (negative: faster), with its bootstrap interval."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a shoot-out ended.

    Attributes:
        winner: name of the winner; the incumbent's where nobody beat it beyond the noise.
        floor: what a difference had to clear, as a log-ratio.
        quality: "low" where the twin itself differed by more than 2 %.
        intervals: per challenger.
        samples: milliseconds per contestant and round; the twin's under `A/A twin`.
        rounds: how many there were.
    """

    winner: str
    floor: float
    quality: str
    intervals: dict[str, Interval]
    samples: dict[str, list[float]]
    rounds: int


def shoot_out(
    runs: Runs,
    *,
    once: Callable[[Callable[[], object]], float],
    seed: int = 0,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
    each_round: Callable[[int], bool] = lambda number: True,
) -> Verdict:
    """Time contestants side by side until it is decided whether anyone beats the incumbent.

    Args:
        runs: name -> launch; the first is the incumbent.
        once: milliseconds of one launch.
        seed: of the shuffles and the bootstrap.
        least, most: rounds.
        each_round: told the number of a finished round; a round it answers False for does not count (the card throttled, say).

    Returns:
        The verdict. Ties keep the incumbent.
    """
    incumbent = next(iter(runs))
    everyone = {**runs, TWIN: runs[incumbent]}
    order = list(everyone)
    shuffle = random.Random(seed).shuffle
    for name in order:
        once(everyone[name])
    samples: dict[str, list[float]] = {name: [] for name in everyone}
    timed = 0
    for number in range(2 * most):
        shuffle(order)
        times = {name: once(everyone[name]) for name in order}
        if not each_round(number):
            continue
        for name, value in times.items():
            samples[name].append(value)
        timed += 1
        if timed >= most or (timed >= least and timed in _LOOKS and _decided(judge(samples, seed=seed))):
            break
    return judge(samples, seed=seed)


def judge(samples: Mapping[str, Sequence[float]], *, seed: int = 0) -> Verdict:
    """The verdict over rounds that were timed; the first name is the incumbent, the twin stands under `A/A twin`."""
    names = [name for name in samples if name != TWIN]
    incumbent, challengers = names[0], names[1:]
    generator = np.random.default_rng(seed)
    base = np.log(np.asarray(samples[incumbent]))
    twin = np.log(np.asarray(samples[TWIN]))
    aa = _interval(twin - base, generator)
    floor = max(LEAST_FLOOR, abs(aa.low), abs(aa.high))
    # Both runs of the incumbent are its time: their mean has less noise than either.
    reference = (base + twin) / 2
    intervals = {name: _interval(np.log(np.asarray(samples[name])) - reference, generator) for name in challengers}
    better = [name for name in challengers if intervals[name].high < -floor]
    winner = min(better, key=lambda name: (intervals[name].middle, names.index(name)), default=incumbent)
    return Verdict(
        winner=winner,
        floor=floor,
        quality="low" if floor > NOISY_FLOOR else "high",
        intervals=intervals,
        samples={name: list(values) for name, values in samples.items()},
        rounds=len(base),
    )


def _decided(verdict: Verdict) -> bool:
    """Whether more rounds could hardly change it: every challenger has won, or cannot win however low the floor falls.

    The floor of few rounds is mostly sampling noise: a challenger that misses it may clear it when more rounds are in.
    """
    return verdict.quality == "high" and all(
        one.high < -verdict.floor or one.low > -LEAST_FLOOR for one in verdict.intervals.values()
    )


def _interval(ratios: NDArray[np.float64], generator: np.random.Generator) -> Interval:
    picks = generator.integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.quantile(medians, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return Interval(middle=float(median(ratios)), low=float(low), high=float(high))
