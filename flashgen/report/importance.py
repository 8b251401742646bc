"""Which knobs matter: the share of the variance of log time that one knob explains alone.

A main-effect analysis of variance (Fisher's): the sum of squares between a knob's values over the total one. Spaces are not
full grids and knobs interact, so shares need not add up to 1. No forest is fitted: with some dozens of points, on a grid, group
means say the same and everyone can check them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashgen.store.records import Tunable


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """One knob.

    Attributes:
        knob: its name.
        share: of the variance of log time, 0 to 1.
        best: the value with the least mean log time.
        values: how many values were timed.
    """

    knob: str
    share: float
    best: Tunable
    values: int


def importances(times: Sequence[tuple[Mapping[str, Tunable], float]]) -> tuple[Importance, ...]:
    """The knobs by their share, largest first; empty where fewer than four configurations were timed or nothing varies.

    Args:
        times: (tunables, milliseconds) of each configuration, once.
    """
    if len(times) < 4:
        return ()
    logs = [math.log(ms) for _, ms in times]
    mean = sum(logs) / len(logs)
    total = sum((value - mean) ** 2 for value in logs)
    if total == 0.0:
        return ()
    found = []
    for knob in times[0][0]:
        groups: dict[Tunable, list[float]] = {}
        for (config, _), value in zip(times, logs, strict=True):
            groups.setdefault(config[knob], []).append(value)
        means = {value: sum(rows) / len(rows) for value, rows in groups.items()}
        between = sum(len(groups[value]) * (means[value] - mean) ** 2 for value in groups)
        best = min(means, key=lambda value: (means[value], str(value)))
        found.append(Importance(knob=knob, share=between / total, best=best, values=len(groups)))
    return tuple(sorted(found, key=lambda one: (-one.share, one.knob)))
