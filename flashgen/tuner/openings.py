"""What a tuning run tries first: winners of the nearest shapes, the portfolio, known-good tiles, and what other problems teach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashgen.config import KernelConfig
from flashgen.problem import Problem
from flashgen.store import Record, seeds, select
from flashgen.target import Target
from flashgen.tuner import portfolio
from flashgen.tuner.experience import Case, Lesson, lessons_from
from flashgen.tuner.experience import portfolio as lessons_portfolio
from flashgen.tuner.strategies import NAMES, SEEDS
from flashgen.variants import KnownGood, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Openings:
    """One problem's first tries.

    Attributes:
        near: winners of the nearest shapes, the user's first, then the shipped one.
        listed: those, then the portfolio, then known-good tiles: in this order a search begins, legal or not, repeats included.
        lessons: other problems' measurements; only filled where this one is measured, too.
    """

    near: tuple[KernelConfig, ...]
    listed: tuple[KernelConfig, ...]
    lessons: tuple[Lesson, ...]

    def of(self, strategy: str, legal: Sequence[KernelConfig], mode: str) -> list[KernelConfig]:
        """What a strategy takes from them, in order: `auto` all, others what a run without measuring compiles first.

        Args:
            strategy: its name.
            legal: the legal list.
            mode: "measured" or "predicted".
        """
        if strategy in (("random", "exhaustive") if mode == "predicted" else set(NAMES) - {"auto"}):
            return []
        taught = lessons_portfolio(legal, self.lessons, SEEDS) if strategy == "auto" else []
        allowed = set(legal)
        return [config for config in dict.fromkeys([*self.listed, *taught]) if config in allowed]


def openings(
    problem: Problem,
    variant: Variant,
    target: Target,
    *,
    mode: str,
    known: Sequence[KnownGood],
    own: Iterable[Record],
    taught: Iterable[Record],
) -> Openings:
    """Gather them.

    Args:
        problem: what is tuned.
        variant: by which kernel.
        target: where.
        mode: "measured" or "predicted"; lessons are for measuring.
        known: the legal known-good tiles.
        own: the user's trials of this very kernel on this GPU.
        taught: the user's trials of the variant, whatever the problem and the GPU.
    """
    spec = problem.spec
    shipped = [
        row for row in seeds.load(target.name, spec.op) if row.spec_key == spec.key and row.variant == variant.name
    ]
    best = (select.best_measured(own, problem.shape), select.best_measured(shipped, problem.shape))
    near = tuple(KernelConfig(variant=variant.name, **row.config) for row in best if row is not None)
    shared = portfolio.configs(variant, spec, target)[:SEEDS]
    lessons: Iterable[Lesson] = ()
    if mode == "measured":
        here = Case(spec=spec, shape=problem.shape, gpu=target.name)
        everywhere = [row for gpu in seeds.gpus() for row in seeds.load(gpu, spec.op)]
        lessons = lessons_from([*taught, *everywhere], here, variant.name)
    return Openings(near=near, listed=(*near, *shared, *(row.config for row in known)), lessons=tuple(lessons))
