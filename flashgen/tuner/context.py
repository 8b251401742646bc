"""What both ways of tuning share: one problem's kernel, its legal list in order, and how a record is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import product
from typing import Any

import flashgen
from flashgen.config import KernelConfig
from flashgen.coverage import has_options, undrawn
from flashgen.errors import TuningError, UnsupportedProblemError
from flashgen.facts import CompiledFacts
from flashgen.problem import Problem
from flashgen.render import KernelSource, render
from flashgen.store import Record, utc_now
from flashgen.target import Target
from flashgen.tuner.result import ProblemResult
from flashgen.tuner.strategies import Strategy
from flashgen.variants import KnownGood, MeasuredTile, Variant, candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress: how many of a problem's trials are done, the best so far in words, and trials by status."""

    problem: str
    done: int
    total: int
    best: str
    phase: str
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Context:
    """One problem on one target in one run.

    Attributes:
        order: the legal list, as a strategy that learns nothing would try it.
        strategy: chooses what is measured next.
        max_trials: how many are measured at most; None for all.
        measured_tiles: the measured table of the problem, nearest first; only filled without the GPU.
        earlier: rows of this very kernel, target, shape and Triton, when the run resumes.
        condemned: what failed before and is not tried again (`condemned.condemned`).
        favourites: who defends its place in the final rounds: the first of these that was measured.
        trusted: the stored row of high quality for this shape, which a noisy run does not replace.
        trial_timeout_s: of one candidate in the measuring worker.
        left_s: seconds that the run has left, or None.
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
    strategy: Strategy
    max_trials: int | None
    session: str
    result: ProblemResult
    workers: int | None
    save: Callable[[Iterable[Record]], None]
    report: Callable[[Event], None]
    expired: Callable[[], bool]
    measured_tiles: tuple[MeasuredTile, ...] = ()
    earlier: dict[KernelConfig, Record] = field(default_factory=dict)
    condemned: dict[KernelConfig, Record] = field(default_factory=dict)
    favourites: tuple[KernelConfig, ...] = ()
    trusted: Record | None = None
    trial_timeout_s: float = 60.0
    left_s: Callable[[], float | None] = lambda: None

    _sent: Any = None

    @property
    def sent_mods(self) -> dict[str, Any] | None:
        """The problem's mods as another process reads them."""
        if self.problem.mods is not None and self._sent is None:
            from flashgen.mods import transport

            self._sent = transport.to_json(self.problem.mods.program, self.problem.mods.samples)
        return self._sent  # type: ignore[no-any-return]

    def timed(self) -> list[Record]:
        """The trials that ran, fastest first."""
        ran = (row for row in self.result.trials if row.status == "ok" and row.latency_ms is not None)
        return sorted(ran, key=lambda row: row.latency_ms or 0.0)

    def best(self) -> Record | None:
        """The fastest trial so far."""
        return next(iter(self.timed()), None)

    def record(
        self,
        config: KernelConfig,
        status: str,
        *,
        protocol: str,
        facts: CompiledFacts | None = None,
        device: Mapping[str, str] | None = None,
        shootout: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> Record:
        """A record of one trial, complete.

        Args:
            config: what was tried.
            status: what came of it.
            protocol: how it was timed.
            facts: the compiler's.
            device: what the worker said of its device; driver and UUID are kept among the versions.
            shootout: how the final rounds went, kept beside the compiler's facts.
            values: other fields of `Record`.
        """
        spec = self.problem.spec
        known = {} if facts is None else facts.to_json()
        if shootout is not None:
            known["shootout"] = dict(shootout)
        told = {name: value for name, value in (device or {}).items() if name in ("driver", "uuid")}
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
            facts=known or None,
            versions={**versions(), **told},
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
        excluded = {"excluded": len(self.result.excluded)} if self.result.excluded else {}
        counts = self.result.counts() or excluded  # without the GPU trials are stored at the end
        self.report(Event(problem=str(self.problem), done=done, total=total, best=best, phase=phase, counts=counts))


def choose_variant(problem: Problem, target: Target, name: str | None = None) -> Variant:
    """The generated variant that computes a problem on a target: the first, or the one named.

    Raises:
        UnsupportedProblemError: none does, or not the named one; lists the reasons.
    """
    spec, reasons = problem.spec, {}
    for variant in candidates(spec):
        if name not in (None, variant.name):
            continue
        reason = (
            variant.supports(spec, target)
            if variant.template is not None
            else "is no generated kernel: nothing to tune"
        ) or undrawn(spec)
        if reason is None:
            return variant
        reasons[variant.name] = reason
    raise UnsupportedProblemError(f"{problem} cannot be tuned for {target.name}:", reasons)


def legal_list(variant: Variant, problem: Problem, target: Target) -> tuple[list[KernelConfig], tuple[KnownGood, ...]]:
    """Every legal configuration, known-good tiles outside the knobs' grid included, and the legal known-good tiles."""
    spec = problem.spec
    known = tuple(row for row in variant.known_good(spec, target) if variant.illegal(spec, target, row.config) is None)
    return list(dict.fromkeys([*variant.space(spec, target), *(row.config for row in known)])), known


def require_space(variant: Variant, problem: Problem, target: Target) -> None:
    """Refuse a problem whose space is empty on a target.

    Raises:
        TuningError: no configuration is legal; counts them by reason.
    """
    spec = problem.spec
    legal, _ = legal_list(variant, problem, target)
    if legal:
        return
    counted: dict[str, list[str]] = {}
    names = [knob.name for knob in variant.knobs]
    for values in product(*(knob.values for knob in variant.knobs)):
        config = variant.config(**dict(zip(names, values, strict=True)))
        reason = variant.illegal(spec, target, config) or ""
        counted.setdefault(re.sub(r"\d+", "#", reason), []).append(f"{config.label}: {reason}")
    ranked = sorted(counted.values(), key=lambda rows: (-len(rows), rows[0]))
    total = sum(map(len, ranked))
    raise TuningError(
        f"no configuration of {variant.name} is legal for {spec.key} on {target.name}: all {total} are refused.",
        {
            f"{len(rows)} of {total}, for instance {rows[0].partition(': ')[0]}": rows[0].partition(": ")[2]
            for rows in ranked
        },
    )


def launch_strides(problem: Problem) -> dict[str, int]:
    """The strides of a problem's dense tensors by the kernel's names: what its candidates are compiled for and timed with."""
    p = problem
    rows = {
        "q": ("m", p.seqlen_q, p.num_heads_q, p.head_dim),
        "k": ("n", p.seqlen_k, p.num_heads_kv, p.head_dim),
        "v": ("n", p.seqlen_k, p.num_heads_kv, p.head_dim_v),
        "o": ("m", p.seqlen_q, p.num_heads_q, p.head_dim_v),
    }
    if p.op == "attention_bwd":
        rows |= {f"d{name}": row for name, row in rows.items()}
    found: dict[str, int] = {}
    if has_options(problem.spec):
        from flashgen import samples  # loads torch

        found |= samples.strides(problem)
    for name, (row, seqlen, heads, head_dim) in rows.items():
        sizes = (max(1, seqlen), max(1, heads), head_dim)
        found[f"stride_{name}b"] = sizes[0] * sizes[1] * sizes[2]
        found[f"stride_{name}{row}"] = sizes[1] * sizes[2]
        found[f"stride_{name}h"] = sizes[2]
    return found


def source_of(variant: Variant, problem: Problem) -> KernelSource:
    """The rendered kernel of a problem."""
    return render(problem.spec, variant)


def versions() -> dict[str, str]:
    """Versions that a stored figure depends on."""
    return dict(_versions())


@cache
def _versions() -> Mapping[str, str]:
    found = {"flashgen": flashgen.__version__}
    for name in ("torch", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)  # milliseconds each, and every trial asks
    return found
