"""What other problems teach about this one: which configurations to try first, and what to expect of the rest.

Measured over recorded surfaces (`benchmarks/search_quality.py`): a few configurations that were good on *near* problems beat every
sampler that starts cold, since few configurations ever win, and the winner of a neighbouring shape is within some
percent at the first try.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashgen.config import KernelConfig
from flashgen.coverage import options_of
from flashgen.spec import AttentionSpec
from flashgen.store import Record
from flashgen.store.select import distance, usable_measurement
from flashgen.tuner.surrogate import Array

# A slowdown counts up to e: how bad a bad configuration is teaches nothing about the good ones.
CAP = 1.0
# What a difference between problems takes off the weight of one's experience for the other, in e-folds.
_HEAD_DIM, _MASK, _DTYPE, _GPU, _DOUBLING = 6.0, 1.5, 3.0, 6.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One other problem's measurements.

    Attributes:
        weight: how much it counts here, from 0 to 1.
        times_ms: median of each configuration that ran.
    """

    weight: float
    times_ms: Mapping[KernelConfig, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What experience is compared by: the kernel, the sizes and the GPU."""

    spec: AttentionSpec
    shape: Mapping[str, int]
    gpu: str = ""


def weight(here: Case, there: Case) -> float:
    """How much measurements of one case say about another: 1 for its twin, less by head dim, dtype, mask, size and GPU."""
    a, b = here.spec, there.spec
    apart = _DOUBLING * distance(here.shape, there.shape)
    apart += _HEAD_DIM * ((a.block_head_dim, a.block_head_dim_v) != (b.block_head_dim, b.block_head_dim_v))
    apart += _MASK * len({*options_of(a)} ^ {*options_of(b)})
    apart += _MASK * (a.causal != b.causal) + _DTYPE * (a.itemsize != b.itemsize) + _GPU * (here.gpu != there.gpu)
    return math.exp(-apart)


def lessons_from(records: Iterable[Record], here: Case, variant: str) -> list[Lesson]:
    """What stored trials of other shapes, specs and GPUs teach; the case's own rows are left out.

    Args:
        records: any rows; measured ones of the variant count, whatever the template's text was.
        here: the case that is tuned.
        variant: whose configurations.
    """
    times: dict[str, dict[KernelConfig, float]] = {}
    weights: dict[str, float] = {}
    for row in records:
        if row.variant != variant or not usable_measurement(row) or row.latency_ms is None:
            continue
        there = Case(spec=AttentionSpec.from_key(row.spec_key), shape=row.shape, gpu=row.gpu)
        key = f"{row.gpu} {row.spec_key} {sorted(row.shape.items())}"
        if there.spec.key == here.spec.key and dict(there.shape) == dict(here.shape) and there.gpu == here.gpu:
            continue
        weights[key] = weight(here, there)
        config = KernelConfig(variant=variant, **row.config)
        known = times.setdefault(key, {})
        known[config] = min(row.latency_ms, known.get(config, math.inf))
    return [Lesson(weight=weights[key], times_ms=known) for key, known in times.items()]


def expected_slowdowns(candidates: Sequence[KernelConfig], lessons: Sequence[Lesson]) -> Array:
    """Log slowdown of each candidate against the best, averaged over the lessons; what was never measured counts as bad."""
    table, weights = _table(candidates, lessons)
    if not lessons:
        return np.zeros(len(candidates))
    return np.asarray(weights @ table / weights.sum())


def portfolio(candidates: Sequence[KernelConfig], lessons: Sequence[Lesson], size: int) -> list[KernelConfig]:
    """The configurations to try first: greedily the one that lowers the weighted best-of-so-far slowdown most.

    Args:
        candidates: legal here; those that no lesson timed are not chosen.
        lessons: from other problems; without any the portfolio is empty.
        size: how many at most.
    """
    timed = [config for config in candidates if any(config in lesson.times_ms for lesson in lessons)]
    if not timed:
        return []
    table, weights = _table(timed, lessons)
    reached = np.full(len(lessons), CAP)
    chosen: list[int] = []
    for _ in range(min(size, len(timed))):
        loss = weights @ np.minimum(table, reached[:, None]) + 1e-3 * (weights @ table)
        loss[chosen] = np.inf
        chosen.append(int(loss.argmin()))
        reached = np.minimum(reached, table[:, chosen[-1]])
    return [timed[index] for index in chosen]


def _table(candidates: Sequence[KernelConfig], lessons: Sequence[Lesson]) -> tuple[Array, Array]:
    table = np.full((len(lessons), len(candidates)), CAP)
    for row, lesson in enumerate(lessons):
        best = min(lesson.times_ms.values())
        for column, config in enumerate(candidates):
            if config in lesson.times_ms:
                table[row, column] = min(CAP, math.log(lesson.times_ms[config] / best))
    return table, np.array([lesson.weight for lesson in lessons])
