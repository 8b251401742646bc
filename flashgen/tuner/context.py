"""What both ways of tuning share: one problem's kernel, its legal list in order, and how a record is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import flashgen
from flashgen.config import KernelConfig
from flashgen.errors import UnsupportedProblemError
from flashgen.facts import CompiledFacts
from flashgen.problem import Problem
from flashgen.render import KernelSource, render
from flashgen.store import Record, utc_now
from flashgen.target import Target
from flashgen.tuner.result import ProblemResult
from flashgen.variants import KnownGood, MeasuredTile, Variant, candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress: how many of a problem's trials are done, and the best so far in words."""

    problem: str
    done: int
    total: int
    best: str
    phase: str


@dataclass(slots=True, kw_only=True)
class Context:
    """One problem on one target in one run.

    Attributes:
        measured_tiles: the measured table of the problem, nearest first; only filled without the GPU.
        earlier: rows of this very kernel, target, shape and Triton, when the run resumes.
        save: hands finished records to the store.
        report: progress.
        expired: whether the run's time is up.
    """

    problem: Problem
    target: Target
    variant: Variant
    source: KernelSource
    known_good: tuple[KnownGood, ...]
    order: list[KernelConfig]
    session: str
    result: ProblemResult
    workers: int | None
    save: Callable[[Iterable[Record]], None]
    report: Callable[[Event], None]
    expired: Callable[[], bool]
    measured_tiles: tuple[MeasuredTile, ...] = ()
    earlier: dict[KernelConfig, Record] = field(default_factory=dict)

    def record(
        self, config: KernelConfig, status: str, *, protocol: str, facts: CompiledFacts | None = None, **values: Any
    ) -> Record:
        """A record of one trial, complete."""
        spec = self.problem.spec
        return Record(
            op=spec.op,
            spec_key=spec.key,
            variant=self.variant.name,
            digest=self.source.digest,
            gpu=self.target.name,
            arch=self.target.arch,
            target={"gpu": self.target.gpu, "num_sms": self.target.num_sms, "smem_bytes": self.target.smem_bytes},
            shape=self.problem.shape,
            config=config.to_dict(),
            status=status,  # type: ignore[arg-type]  # Record checks it
            facts=None if facts is None else facts.to_json(),
            versions=versions(),
            protocol=protocol,
            session=self.session,
            created=utc_now(),
            **values,
        )

    def finish(self, records: Iterable[Record]) -> None:
        """Keep finished trials: in the result and in the store."""
        kept = list(records)
        self.result.trials.extend(kept)
        self.save(kept)

    def tell(self, done: int, total: int, best: str, phase: str) -> None:
        """Report progress."""
        self.report(Event(problem=str(self.problem), done=done, total=total, best=best, phase=phase))


def choose_variant(problem: Problem, target: Target) -> Variant:
    """The generated variant that computes a problem on a target.

    Raises:
        UnsupportedProblemError: none does; lists the reasons.
    """
    spec, reasons = problem.spec, {}
    for variant in candidates(spec):
        reason = (
            variant.supports(spec, target)
            if variant.template is not None
            else "is no generated kernel: nothing to tune"
        )
        if reason is None:
            return variant
        reasons[variant.name] = reason
    raise UnsupportedProblemError(f"{problem} cannot be tuned for {target.name}:", reasons)


def legal_list(variant: Variant, problem: Problem, target: Target) -> tuple[list[KernelConfig], tuple[KnownGood, ...]]:
    """Every legal configuration, known-good tiles outside the knobs' grid included, and the legal known-good tiles."""
    spec = problem.spec
    known = tuple(row for row in variant.known_good(spec, target) if variant.illegal(spec, target, row.config) is None)
    return list(dict.fromkeys([*variant.space(spec, target), *(row.config for row in known)])), known


def source_of(variant: Variant, problem: Problem) -> KernelSource:
    """The rendered kernel of a problem."""
    return render(problem.spec, variant)


def versions() -> dict[str, str]:
    """Versions that a stored figure depends on."""
    found: Mapping[str, str] = {"flashgen": flashgen.__version__}
    for name in ("torch", "triton"):
        try:
            found = {**found, name: metadata.version(name)}
        except metadata.PackageNotFoundError:
            continue
    return dict(found)
