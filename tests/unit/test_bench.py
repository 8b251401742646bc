"""The timing protocol, on a clock that the test holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashgen.bench import PROTOCOL_FINAL, PROTOCOL_SEARCH, measure, measure_interleaved, summarise


def test_percentiles() -> None:
    found = summarise([5.0, 1.0, 3.0, 2.0, 4.0], "p")
    assert (found.latency_ms, found.latency_p10_ms, found.latency_p90_ms, found.samples) == (3.0, 1.0, 5.0, 5)
    assert summarise([1.0, 2.0], "p").latency_ms == 1.5


@pytest.mark.parametrize(("each_ms", "samples"), [(10.0, 7), (1.0, 15), (0.001, 200)])
def test_search_stays_in_its_budget_but_never_below_seven_samples(each_ms: float, samples: int) -> None:
    found = measure(lambda: None, once=lambda run: each_ms, budget_ms=15.0)
    assert (found.samples, found.latency_ms, found.protocol) == (samples, each_ms, PROTOCOL_SEARCH)


def test_finalists_take_turns_in_shuffled_rounds() -> None:
    log: list[str] = []

    def once(run: Callable[[], object]) -> float:
        log.append(str(run()))
        return float(len(log))

    found = measure_interleaved({name: (lambda name=name: name) for name in "abc"}, once=once, rounds=10)  # type: ignore[misc]
    rounds = [log[i : i + 3] for i in range(3, 33, 3)]  # the first three warm up
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert all(one.samples == 10 and one.protocol == PROTOCOL_FINAL for one in found.values())
