"""Recorded surfaces in the place of a GPU: how good a search is, judged without one.

A surface holds every configuration's time of one problem. A replayed trial costs one of the budget, whether or not its point was seen
before, and reads the recorded time with multiplicative noise; the finalists are re-timed as a tuning run does.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError
from flashgen.problem import Problem
from flashgen.tuner.experience import Case, Lesson, weight
from flashgen.tuner.strategies import Strategy, Tried

FINALISTS = 3
RETIMINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """One problem's recorded space.

    Attributes:
        problem: what was run.
        times_ms: per legal configuration its time, or None where it failed or was cut off as slow.
    """

    problem: Problem
    times_ms: Mapping[KernelConfig, float | None]

    @property
    def best_ms(self) -> float:
        """The least recorded time."""
        return min(time for time in self.times_ms.values() if time is not None)

    def slowdown(self, config: KernelConfig) -> float:
        """True time over the best; infinite for what failed."""
        time = self.times_ms[config]
        return math.inf if time is None else time / self.best_ms


def load_surfaces(path: Path, variant: str) -> list[Surface]:
    """The surfaces of a file of recorded times, one JSON object a line (see `benchmarks/data/README.md`).

    Args:
        path: the file.
        variant: whose configurations they are.

    Raises:
        InvalidProblemError: a line lacks a field; names file and line.
    """
    found: dict[Problem, dict[KernelConfig, float | None]] = defaultdict(dict)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        row: dict[str, Any] = json.loads(line)
        try:
            if row.get("error", "") and "OutOfResources" in row["error"]:
                continue  # does not fit: no legal list holds it
            problem = Problem(
                dtype=row["dtype"], batch=row["batch"], seqlen_q=row["seqlen"], seqlen_k=row["seqlen"], num_heads_q=row["num_heads"],
                num_heads_kv=row["num_heads"], head_dim=row["head_dim"], head_dim_v=row["head_dim"], causal=row["causal"],
            )  # fmt: skip
            found[problem][KernelConfig(variant=variant, **row["config"])] = row["ms"]
        except KeyError as error:
            raise InvalidProblemError(f"{path}:{number}: the line has no field {error}.") from None
    return [Surface(problem=problem, times_ms=times) for problem, times in found.items()]


def case_of(problem: Problem) -> Case:
    """A problem as experience sees it."""
    return Case(spec=problem.spec, shape=problem.shape)


def lessons_for(surface: Surface, surfaces: Iterable[Surface]) -> list[Lesson]:
    """What all other problems teach about a surface's; its own times are never among them."""
    return [
        Lesson(
            weight=weight(case_of(surface.problem), case_of(other.problem)),
            times_ms={config: time for config, time in other.times_ms.items() if time is not None},
        )
        for other in surfaces
        if other.problem != surface.problem
    ]


def replay(
    surface: Surface, strategy: Strategy, *, checkpoints: Sequence[int], noise: float = 0.03, seed: int = 0
) -> dict[int, float]:
    """Search a surface.

    Args:
        surface: to search.
        strategy: proposes.
        checkpoints: after how many trials to stop and choose; the search goes on after each as if it had not.
        noise: standard deviation of the log of a reading.
        seed: of the noise.

    Returns:
        Per checkpoint the true slowdown of what a run that stopped there would choose.
    """
    generator = np.random.default_rng(seed)
    tried: list[Tried] = []
    answers: dict[int, float] = {}
    for number in range(1, max(checkpoints) + 1):
        config = strategy.propose(tried)
        if config is not None:
            time = surface.times_ms[config]
            reading = None if time is None else time * math.exp(generator.normal(0.0, noise))
            tried.append(Tried(config=config, value=reading))
        if number in checkpoints:
            answers[number] = surface.slowdown(choose(strategy, tried, _retimer(surface, noise, seed * 1009 + number)))
    return answers


def _retimer(surface: Surface, noise: float, seed: int) -> Callable[[KernelConfig], float]:
    generator = np.random.default_rng(seed)

    def retime(config: KernelConfig) -> float:
        time = surface.times_ms[config]
        assert time is not None  # a finalist ran
        return time * math.exp(generator.normal(0.0, noise))

    return retime


def choose(strategy: Strategy, tried: Sequence[Tried], retime: Callable[[KernelConfig], float]) -> KernelConfig:
    """The winner: three finalists are re-timed four times each, and the least mean of those (in logs) wins.

    The reading that made a finalist does not count: it was chosen for being low.
    """
    finalists = strategy.finalists(tried, FINALISTS)
    if not finalists:
        return tried[0].config
    scores = {config: sum(math.log(retime(config)) for _ in range(RETIMINGS)) for config in finalists}
    return min(finalists, key=scores.__getitem__)
