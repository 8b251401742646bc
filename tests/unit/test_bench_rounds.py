"""Turns, ratios and verdicts, on clocks whose drift and noise the test decides."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from flashgen.bench.rounds import (
    LEAST_FLOOR,
    Ratio,
    Rounds,
    WallClock,
    noise_floor,
    pairwise_ratio,
    run_rounds,
    verdict,
)
from flashgen.bench.timing import summarise

Call = Callable[[], object]


class FakeClock:
    """A call returns its cost; the machine's speed is a function of how many calls ran, the noise is seeded."""

    def __init__(self, speed: Callable[[int], float] = lambda n: 1.0, noise: float = 0.0) -> None:
        self.speed, self.noise, self.calls = speed, noise, 0
        self._random = random.Random(7)

    def times(self, calls: Sequence[Call]) -> list[float]:
        spans = []
        for call in calls:
            self.calls += 1
            cost = call()
            assert isinstance(cost, float)
            spans.append(cost * self.speed(self.calls) * math.exp(self._random.gauss(0.0, self.noise)))
        return spans


def costs(**each_ms: float) -> dict[str, list[Call]]:
    return {name: [lambda cost=cost: cost] for name, cost in each_ms.items()}  # type: ignore[misc]


def quick(contestants: dict[str, list[Call]], clock: FakeClock, rounds: int = 30, seed: int = 0) -> Rounds:
    return run_rounds(contestants, clock=clock, rounds=rounds, seed=seed, least_ms=0.0, most_ms=1.0)


def test_drift_biases_times_taken_one_after_another_but_not_ratios_pair_by_pair() -> None:
    def slower_and_slower(calls: int) -> float:
        return 1.0 + 0.01 * calls

    one, two = (
        [FakeClock.times(clock, [lambda: 1.0])[0] for _ in range(30)] for clock in [FakeClock(slower_and_slower)] * 2
    )
    sequential = summarise(two, "").latency_ms / summarise(one, "").latency_ms
    assert sequential > 1.2, "equal contestants: the second looks over 20 % slower"
    samples = quick(costs(a=1.0, b=1.0), FakeClock(slower_and_slower), rounds=200).samples
    ratio = pairwise_ratio(samples["b"], samples["a"])
    assert ratio.median == pytest.approx(1.0, abs=0.01) and ratio.low <= 1.0 <= ratio.high


def test_a_planted_gap_is_seen_and_a_twin_is_not() -> None:
    found = quick(costs(base=1.0, peer=1.05, quick=0.95, twin=1.0), FakeClock(noise=0.01))
    ratios = {name: pairwise_ratio(samples, found.samples["base"]) for name, samples in found.samples.items()}
    floor = noise_floor(ratios["twin"])
    assert ratios["peer"].median == pytest.approx(1.05, abs=0.012)
    assert ratios["quick"].median == pytest.approx(0.95, abs=0.012)
    assert [verdict(ratios[name], floor) for name in ("peer", "quick", "twin")] == ["slower", "faster", "tied"]


def test_what_lies_below_the_floor_is_a_tie() -> None:
    found = quick(costs(base=1.0, peer=1.01, twin=1.0), FakeClock(noise=0.05))
    ratios = {name: pairwise_ratio(samples, found.samples["base"]) for name, samples in found.samples.items()}
    floor = noise_floor(ratios["twin"])
    assert floor > LEAST_FLOOR and verdict(ratios["peer"], floor) == "tied"


def test_a_quiet_machine_still_claims_nothing_under_half_a_percent() -> None:
    found = quick(costs(base=1.0, peer=1.004, twin=1.0), FakeClock())
    ratios = {name: pairwise_ratio(samples, found.samples["base"]) for name, samples in found.samples.items()}
    floor = noise_floor(ratios["twin"])
    assert floor == LEAST_FLOOR == noise_floor(None) and ratios["peer"].low > 1.0
    assert verdict(ratios["peer"], floor) == "tied"


def test_the_floor_is_the_far_end_of_the_twins_interval() -> None:
    twin = Ratio(median=1.0, p10=0.9, p90=1.1, low=0.97, high=1.01, rounds=30)
    assert noise_floor(twin) == pytest.approx(0.03)


def test_a_ratio_is_formed_within_its_round() -> None:
    times, baseline = [2.0, 40.0, 600.0], [1.0, 10.0, 100.0]
    ratio = pairwise_ratio(times, baseline)
    assert (ratio.median, ratio.p10, ratio.p90, ratio.rounds) == (4.0, 2.0, 6.0, 3)
    assert 2.0 <= ratio.low <= ratio.high <= 6.0
    assert pairwise_ratio(times, baseline) == ratio, "the bootstrap is seeded"


def _log_of(rounds: int, seed: int, copies: int = 1) -> tuple[list[tuple[str, int]], Rounds]:
    log: list[tuple[str, int]] = []

    def call(name: str, copy: int) -> Call:
        def run() -> float:
            log.append((name, copy))
            return 1.0

        return run

    contestants = {name: [call(name, copy) for copy in range(copies)] for name in "abc"}
    return log, quick(contestants, FakeClock(), rounds=rounds, seed=seed)


def test_every_round_runs_everybody_once_in_an_order_of_its_own() -> None:
    log, found = _log_of(rounds=20, seed=0)
    names = [name for name, _ in log]
    orders = [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]
    assert len(orders) == 20 + found.warm_up_rounds
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) == 6, "all six orders occur"
    assert {order.index("a") for order in orders} == {0, 1, 2}
    assert _log_of(rounds=20, seed=0)[0] == log != _log_of(rounds=20, seed=1)[0]


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_a_copy_comes_again_only_after_all_others(copies: int) -> None:
    log, _ = _log_of(rounds=20, seed=0, copies=copies)
    used = [copy for _, copy in log]
    assert all(sorted(used[i : i + copies]) == list(range(copies)) for i in range(0, len(used) - copies, copies))
    assert {name for name, copy in log if copy == 0} == {"a", "b", "c"}, "no contestant keeps a copy of its own"


def test_the_warm_up_lasts_until_the_times_have_settled() -> None:
    found = run_rounds(
        costs(a=1.0), clock=FakeClock(lambda n: 1.0 + math.exp(-n / 8)), rounds=30, least_ms=5.0, most_ms=500.0
    )
    assert found.settled and 20 < found.warm_up_rounds < 60
    assert all(span == pytest.approx(1.0, abs=0.03) for span in found.samples["a"])


def test_a_warm_up_that_never_settles_ends_and_says_so() -> None:
    found = run_rounds(costs(a=1.0), clock=FakeClock(lambda n: 1.02**n), rounds=3, least_ms=1.0, most_ms=30.0)
    assert not found.settled and found.warm_up_rounds < 30 and len(found.samples["a"]) == 3


def test_an_interrupt_keeps_whole_rounds() -> None:
    count = 0

    def call() -> float:
        nonlocal count
        count += 1
        if count == 32:
            raise KeyboardInterrupt
        return 1.0

    found = quick({"a": [call], "b": [call], "c": [call]}, FakeClock())
    assert found.interrupted and not found.expired
    assert {len(spans) for spans in found.samples.values()} == {10 - found.warm_up_rounds}


def test_an_interrupted_warm_up_leaves_no_sample() -> None:
    def call() -> float:
        raise KeyboardInterrupt

    found = quick({"a": [call]}, FakeClock())
    assert found.interrupted and found.samples == {"a": []}


def test_the_deadline_ends_the_rounds() -> None:
    clock = FakeClock()
    found = run_rounds(
        costs(a=1.0, b=1.0), clock=clock, rounds=30, least_ms=0.0, most_ms=2.0, expired=lambda: clock.calls >= 20
    )
    assert found.expired and {len(spans) for spans in found.samples.values()} == {10 - found.warm_up_rounds}
    late = run_rounds(costs(a=1.0), clock=FakeClock(), rounds=30, expired=lambda: True)
    assert late.expired and late.samples == {"a": []} and late.warm_up_rounds == 1


def test_the_hosts_clock_times_each_call() -> None:
    seen = []
    spans = WallClock().times([lambda: seen.append(1), lambda: sum(range(200_000))])
    assert seen == [1] and 0.0 <= spans[0] < spans[1]
