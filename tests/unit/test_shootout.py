"""The statistics of the final rounds, on synthetic machines: drift, outliers, throttled rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from flashgen.tuner.shootout import LEAST_ROUNDS, MOST_ROUNDS, Verdict, judge, shoot_out


class Machine:
    """Times drift by 8 % both ways, one in 33 is an outlier of up to three times, and each reading is off by `noise`."""

    def __init__(self, seed: int, *, noise: float = 0.02, drift: float = 0.08, outliers: float = 0.03) -> None:
        self._generator = np.random.default_rng(seed)
        self._phase, self._period = self._generator.uniform(0, 2 * math.pi), self._generator.uniform(50, 2000)
        self._noise, self._drift, self._outliers, self._calls = noise, drift, outliers, 0

    def once(self, run: Callable[[], object]) -> float:
        self._calls += 1
        time = float(run()) * (1 + self._drift * math.sin(self._phase + 2 * math.pi * self._calls / self._period))  # type: ignore[arg-type]
        time *= math.exp(self._generator.normal(0.0, self._noise))
        return time * self._generator.uniform(1.1, 3.0) if self._generator.random() < self._outliers else time


def contest(seed: int, incumbent: float, challenger: float, **machine: float) -> Verdict:
    runs = {"incumbent": lambda: incumbent, "challenger": lambda: challenger}
    return shoot_out(runs, once=Machine(seed, **machine).once, seed=seed)


@pytest.mark.slow
def test_a_true_gap_of_two_percent_is_rarely_judged_wrong() -> None:
    """1,000 shoot-outs, the faster one in either seat."""
    wrong = sum(contest(seed, 1.02, 1.0).winner != "challenger" for seed in range(500))
    wrong += sum(contest(seed, 1.0, 1.02).winner != "incumbent" for seed in range(500, 1000))
    assert wrong <= 20


def test_equal_contestants_keep_the_incumbent() -> None:
    assert sum(contest(seed, 1.0, 1.0).winner != "incumbent" for seed in range(40)) == 0


def test_one_after_another_would_have_chosen_by_drift() -> None:
    """What the rounds are for: on this machine thirty launches in a row of the slower one can look faster."""
    fooled = 0
    for seed in range(40):
        machine = Machine(seed)
        slow = np.median([machine.once(lambda: 1.02) for _ in range(30)])
        fast = np.median([machine.once(lambda: 1.0) for _ in range(30)])
        fooled += bool(slow < fast)
    assert fooled > 3
    assert sum(contest(seed, 1.02, 1.0).winner != "challenger" for seed in range(40)) <= 1


def test_a_quiet_machine_decides_early_and_a_noisy_one_says_so() -> None:
    quiet = contest(0, 1.1, 1.0, noise=0.002, outliers=0.0)
    assert (quiet.winner, quiet.quality, quiet.rounds) == ("challenger", "high", LEAST_ROUNDS)
    assert quiet.intervals["challenger"].high < -quiet.floor and quiet.floor < 0.01
    noisy = contest(0, 1.0, 1.0, noise=0.3)
    assert (noisy.winner, noisy.quality, noisy.rounds) == ("incumbent", "low", MOST_ROUNDS)


def test_rounds_that_do_not_count_are_not_counted() -> None:
    machine = Machine(0, noise=0.002, outliers=0.0)
    told: list[int] = []

    def even(number: int) -> bool:
        told.append(number)
        return number % 2 == 0

    verdict = shoot_out({"a": lambda: 1.0, "b": lambda: 1.2}, once=machine.once, each_round=even)
    assert verdict.rounds == LEAST_ROUNDS and len(told) == 2 * LEAST_ROUNDS - 1
    assert all(len(values) == verdict.rounds for values in verdict.samples.values())


def test_the_best_of_several_challengers_wins() -> None:
    base = [1.0, 1.01, 0.99] * 20
    samples = {
        "incumbent": base,
        "b": [0.95 * x for x in base],
        "c": [0.9 * x for x in base],
        "d": [1.3 * x for x in base],
        "A/A twin": base,
    }
    verdict = judge(samples)
    assert verdict.winner == "c" and verdict.floor == 0.005
    assert verdict.intervals["d"].low > 0.2
