"""The rule that picks the best row: nearest shape, trust, time; and never a forecast instead of a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import SHAPE, make, predicted

from flashgen.errors import InvalidProblemError
from flashgen.store.records import SHAPE_KEYS, Record
from flashgen.store.select import GQA_WEIGHT, best_measured, best_predicted, distance


def tile(block: int, **changes: object) -> Record:
    return make(config={"BLOCK_M": block}, **changes)


def forecast(block: int, **changes: object) -> Record:
    return predicted(config={"BLOCK_M": block}, **changes)


def test_nothing_gives_nothing() -> None:
    assert best_measured([], SHAPE) is None
    assert best_predicted([], SHAPE) is None


def test_fastest_at_the_shape_wins() -> None:
    rows = [tile(64, latency_ms=2.0), tile(128, latency_ms=1.0), tile(256, latency_ms=3.0)]
    assert best_measured(rows, SHAPE) == rows[1]


def test_the_nearest_shape_comes_before_the_time() -> None:
    near = tile(64, latency_ms=9.0, shape={"seqlen_q": 2048, "seqlen_k": 2048})
    far = tile(128, latency_ms=1.0, shape={"seqlen_q": 128, "seqlen_k": 128})
    assert best_measured([far, near], SHAPE) == near


def test_predictions_and_measurements_never_meet() -> None:
    rows = [forecast(64, predicted_ms=0.001), tile(128, latency_ms=5.0)]
    measured, guessed = best_measured(rows, SHAPE), best_predicted(rows, SHAPE)
    assert measured is not None
    assert measured.status == "ok"
    assert guessed is not None
    assert guessed.status == "predicted"
    assert best_measured([forecast(64)], SHAPE) is None
    assert best_predicted([tile(64)], SHAPE) is None


@pytest.mark.parametrize("ratio", [None, 1.0000001, 50.0])
def test_outside_the_accuracy_budget_never_wins(ratio: float | None) -> None:
    assert best_measured([tile(64, error_ratio=ratio)], SHAPE) is None
    assert best_predicted([forecast(64, error_ratio=ratio)], SHAPE) is None
    slow = tile(128, latency_ms=100.0, error_ratio=1.0)
    assert best_measured([tile(64, error_ratio=ratio), slow], SHAPE) == slow


@pytest.mark.parametrize(
    "status", ["censored", "compile_error", "out_of_resources", "wrong_result", "timeout", "crashed"]
)
def test_failures_never_win(status: str) -> None:
    rows = [make(status=status, latency_ms=0.1)]
    assert best_measured(rows, SHAPE) is None
    assert best_predicted(rows, SHAPE) is None


def test_low_quality_never_beats_high_at_the_same_shape() -> None:
    low, high = tile(64, latency_ms=0.1, quality="low"), tile(128, latency_ms=9.0)
    assert best_measured([low, high], SHAPE) == high
    assert best_measured([low], SHAPE) == low


def test_local_comes_before_imported_of_equal_quality() -> None:
    imported, local = tile(64, latency_ms=0.1, origin="colleague"), tile(128, latency_ms=9.0)
    assert best_measured([imported, local], SHAPE) == local
    assert best_measured([imported, tile(128, quality="low")], SHAPE) == imported


def test_the_newest_session_then_the_lowest_rank_is_predicted() -> None:
    old = forecast(64, rank=0, session="a-late-name", created="2026-01-01T00:00:00Z")
    first = forecast(128, rank=1, session="a", created="2026-02-01T00:00:00+00:00")
    second = forecast(256, rank=2, session="a", created="2026-02-01T00:00:09+00:00")
    unranked = forecast(32, rank=None, session="a", created="2026-02-01T00:00:09+00:00")
    assert best_predicted([unranked, second, old, first], SHAPE) == first
    assert best_predicted([unranked, old], SHAPE) == unranked


def test_distance_is_in_doublings() -> None:
    def to(**changes: int) -> float:
        return distance(SHAPE, SHAPE | changes)

    assert to() == 0
    assert to(seqlen_q=2048) == to(seqlen_q=512) == 1
    assert to(seqlen_k=4096) == 2
    assert to(batch=4) == 1
    assert to(batch=4, num_heads_q=16, num_heads_kv=4) == 0  # the same number of heads at the same ratio
    assert to(num_heads_kv=16) == GQA_WEIGHT
    assert 0 < GQA_WEIGHT < 1


def test_zero_counts_as_one() -> None:
    assert distance(SHAPE | {"seqlen_q": 0, "batch": 0}, SHAPE | {"seqlen_q": 1, "batch": 1}) == 0
    assert best_measured([tile(64, shape={"seqlen_k": 0})], SHAPE | {"seqlen_k": 0}) is not None


def test_gqa_ratio_counts_a_little() -> None:
    other_ratio = tile(64, shape={"num_heads_kv": 32})
    other_length = tile(128, shape={"seqlen_q": 2048}, latency_ms=9.0)
    same_ratio = tile(256, shape={"num_heads_kv": 16}, latency_ms=9.0)
    assert best_measured([other_ratio, same_ratio], SHAPE) == same_ratio
    assert best_measured([other_ratio, other_length], SHAPE) == other_ratio


def test_the_shape_itself_comes_before_an_equivalent_one() -> None:
    itself = tile(64, latency_ms=9.0)
    equivalent = tile(128, latency_ms=1.0, shape={"batch": 1, "num_heads_q": 64, "num_heads_kv": 16})
    assert distance(itself.shape, equivalent.shape) == 0
    assert best_measured([equivalent, itself], SHAPE) == itself


def test_a_shape_must_be_whole() -> None:
    with pytest.raises(InvalidProblemError, match="shape lacks seqlen_k"):
        best_measured([tile(64)], {name: 1 for name in SHAPE_KEYS if name != "seqlen_k"})


def test_ties_do_not_depend_on_the_order() -> None:
    up, down = {"seqlen_q": 2048}, {"seqlen_q": 512}
    rows = [
        tile(64, shape=up),
        tile(64, shape=down),
        tile(128, shape=down),
        tile(64, shape=down, session="s2"),
        tile(64, shape=down, error_ratio=0.25),
    ]
    winners = [best_measured(order, SHAPE) for order in itertools.permutations(rows)]
    assert winners[0] is not None
    assert all(winner == winners[0] for winner in winners)


sizes = st.integers(0, 70_000)
shapes = st.fixed_dictionaries(dict.fromkeys(SHAPE_KEYS, sizes))
rows_of_any_kind = st.lists(
    st.builds(
        lambda status, **values: make(status=status, latency_ms=1.0 if status == "ok" else None, **values),
        status=st.sampled_from(["ok", "predicted", "wrong_result"]),
        shape=st.sampled_from([{}, {"batch": 4}, {"seqlen_q": 0}, {"num_heads_kv": 1}]),
        quality=st.sampled_from(["high", "low"]),
        origin=st.sampled_from(["local", "elsewhere"]),
        error_ratio=st.sampled_from([None, 0.5, 1.0, 2.0]),
        rank=st.sampled_from([None, 0, 1]),
        session=st.sampled_from(["s1", "s2"]),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(rows_of_any_kind, shapes, st.randoms())
def test_any_order_gives_the_same_usable_winner(rows: list[Record], shape: dict[str, int], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for best, status in ((best_measured, "ok"), (best_predicted, "predicted")):
        winner = best(rows, shape)
        assert winner == best(shuffled, shape) or winner.sha == best(shuffled, shape).sha  # type: ignore[union-attr]
        usable = [r for r in rows if r.status == status and r.error_ratio is not None and r.error_ratio <= 1]
        assert (winner is None) == (not usable)
        if winner is not None:
            assert winner in usable
            assert all(distance(winner.shape, shape) <= distance(row.shape, shape) for row in usable)
            same = [row for row in usable if row.shape == winner.shape]
            assert winner.quality == "high" or all(row.quality == "low" for row in same)


@given(shapes, shapes)
@settings(max_examples=50, deadline=None)
def test_distance_is_symmetric(a: dict[str, int], b: dict[str, int]) -> None:
    assert distance(a, b) == distance(b, a) >= 0
    assert distance(a, a) == 0
