"""Which row is best: pure functions that shipped rows and the database share, and that tuner and dispatch both call.

Measured and predicted rows are chosen by two functions, so a forecast can never be compared with a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from flashgen.errors import InvalidProblemError
from flashgen.store.records import SHAPE_KEYS, Record

# A doubled GQA ratio counts as a quarter of a doubled length: it changes the K/V traffic, hardly the best tile.
GQA_WEIGHT = 0.25


def distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """How far two shapes are apart: Euclidean over log2 of seqlen_q, seqlen_k and batch*num_heads_q, and the GQA ratio.

    Sizes of 0 count as 1. The result is rounded, so that equal distances tie on every machine.

    Args:
        a: batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv.
        b: the same.

    Returns:
        0 for shapes that differ at most in how batch and heads share one product.

    Raises:
        InvalidProblemError: a size is missing.
    """
    coordinates_a, coordinates_b = _coordinates(a), _coordinates(b)
    return round(math.dist(coordinates_a, coordinates_b), 9)


def usable_measurement(record: Record) -> bool:
    """Whether a row may win as a measurement: it ran, was timed, and was inside the accuracy budget."""
    return record.status == "ok" and record.latency_ms is not None and _accurate(record)


def usable_prediction(record: Record) -> bool:
    """Whether a row may win as a prediction: it was compiled, ranked, and checked to be inside the accuracy budget."""
    return record.status == "predicted" and _accurate(record)


def best_measured(records: Iterable[Record], shape: Mapping[str, int]) -> Record | None:
    """The measured winner for a shape.

    The nearest shape decides first; at that shape trusted quality before low, local before imported, side by side before
    one after another. Among what was timed side by side a configuration that lost its latest final rounds is out, since a
    tie keeps the incumbent whatever the medians say, and since times of two runs do not compare as well as times of one.
    Then the least time; remaining ties go to the config that sorts first. The order of `records` never matters.

    Args:
        records: rows of one (spec, variant, digest, gpu): the caller filters.
        shape: the sizes of the call.

    Returns:
        The winner, or None where no row is usable.

    Raises:
        InvalidProblemError: `shape` lacks a size.
    """
    rows = _nearest(filter(usable_measurement, records), shape)
    beaten = _beaten(rows)

    def order(row: Record) -> tuple[Any, ...]:
        trust = (*_trust(row), not _side_by_side(row))
        return (*trust, (*trust, row.config_json) in beaten, row.latency_ms, row.config_json)

    return _first(rows, order)


def _beaten(rows: Iterable[Record]) -> set[tuple[Any, ...]]:
    """The configurations, by trust, whose latest final rounds another one won."""
    latest: dict[tuple[Any, ...], tuple[datetime, int]] = {}
    for row in rows:
        if row.rank is None or not _side_by_side(row):
            continue
        key = (*_trust(row), False, row.config_json)
        latest[key] = max(latest.get(key, (datetime.min.replace(tzinfo=UTC), 0)), (_when(row), row.rank))
    return {key for key, (_, rank) in latest.items() if rank > 1}


def _when(row: Record) -> datetime:
    return datetime.fromisoformat(row.created)


def best_predicted(records: Iterable[Record], shape: Mapping[str, int]) -> Record | None:
    """The predicted winner for a shape.

    The nearest shape decides first; at that shape trusted quality before low, local before imported, then the session
    with the newest row, then the lowest rank (a row without one comes last).

    Args:
        records: rows of one (spec, variant, digest, gpu): the caller filters.
        shape: the sizes of the call.

    Returns:
        The winner, or None where no row is usable.

    Raises:
        InvalidProblemError: `shape` lacks a size.
    """
    rows = _nearest(filter(usable_prediction, records), shape)
    newest: dict[str, float] = {}
    for row in rows:
        newest[row.session] = max(newest.get(row.session, -math.inf), datetime.fromisoformat(row.created).timestamp())

    def order(row: Record) -> tuple[Any, ...]:
        rank = math.inf if row.rank is None else row.rank
        return (*_trust(row), -newest[row.session], row.session, rank, row.config_json)

    return _first(rows, order)


def _accurate(record: Record) -> bool:
    return record.error_ratio is not None and record.error_ratio <= 1.0


def _side_by_side(record: Record) -> bool:
    """Candidates timed one after another drift with the card's clocks; the finalists' interleaved times decide."""
    return "interleaved" in record.protocol or record.protocol.startswith("shootout")


def _trust(record: Record) -> tuple[bool, bool]:
    return (record.quality == "low", record.origin != "local")


def _coordinates(shape: Mapping[str, int]) -> tuple[float, ...]:
    missing = [name for name in SHAPE_KEYS if name not in shape]
    if missing:
        raise InvalidProblemError(f"shape lacks {', '.join(missing)}: it needs {', '.join(SHAPE_KEYS)}.")
    batch, seqlen_q, seqlen_k, heads_q, heads_kv = (math.log2(max(shape[name], 1)) for name in SHAPE_KEYS)
    return (seqlen_q, seqlen_k, batch + heads_q, GQA_WEIGHT * (heads_q - heads_kv))


def _nearest(records: Iterable[Record], shape: Mapping[str, int]) -> list[Record]:
    """The rows of the one nearest shape; the shape itself before those that split batch and heads differently."""
    wanted = _coordinates(shape)
    groups: dict[tuple[int, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.shape[name] for name in SHAPE_KEYS), []).append(record)
    if not groups:
        return []
    exact = tuple(shape[name] for name in SHAPE_KEYS)

    def order(sizes: tuple[int, ...]) -> tuple[Any, ...]:
        there = _coordinates(dict(zip(SHAPE_KEYS, sizes, strict=True)))
        return (round(math.dist(wanted, there), 9), sizes != exact, sizes)

    return groups[min(groups, key=order)]


def _first(rows: list[Record], order: Callable[[Record], tuple[Any, ...]]) -> Record | None:
    """The least row; the content digest, dear to compute, only breaks what is left of ties."""
    if not rows:
        return None
    keyed = [(order(row), row) for row in rows]
    least = min(key for key, _ in keyed)
    return min((row for key, row in keyed if key == least), key=lambda row: row.sha)
