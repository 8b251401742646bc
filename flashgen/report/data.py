"""From trials to what a report says: one `Subject` per problem, kernel text and GPU. Values only, nothing is drawn here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flashgen.errors import FlashgenError
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.report.importance import Importance, importances
from flashgen.report.surface import Surface, surface_of
from flashgen.spec import AttentionSpec
from flashgen.store import Record
from flashgen.store.records import SHAPE_KEYS
from flashgen.store.select import best_measured, best_predicted
from flashgen.variants import by_name

MEANING = {
    "ok": "ran, was checked and timed",
    "censored": "ran, and was dropped as clearly slower before it was fully timed",
    "compile_error": "the compiler refused it",
    "out_of_resources": "compiled, but needs more than the GPU has",
    "wrong_result": "ran, and its result left the accuracy budget",
    "timeout": "compiling or running took too long",
    "crashed": "its process died",
    "predicted": "compiled, never timed",
}
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One trial of the history: its number, configuration, status, time, and the best time so far."""

    number: int
    label: str
    status: str
    latency_ms: float | None
    best_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One configuration of the final rounds.

    Attributes:
        median_ms, low_ms, high_ms: median, p10 and p90 over the rounds.
        ratio: its median over the least one.
        interval: low, middle and high of its time over the incumbent's, pair by pair (bootstrap), less 1; None for the
            incumbent itself, and in protocols that do not store it.
        floor: what a difference had to clear, likewise; None where it is not stored.
        rounds: how many there were; 0 where that is not stored.
    """

    label: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    interval: tuple[float, float, float] | None
    floor: float | None
    rounds: int
    winner: bool
    quality: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Trials that ended alike: their status, a message for all of them (one's own numbers in it), and how many."""

    status: str
    count: int
    message: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Errors against the fp64 reference, over the trials that were checked.

    Attributes:
        checked, outside: trials that were checked, and those beyond the budget.
        worst_ratio: largest error over the budget; at most 1 is inside.
        winner_ratio, winner_error: of the winner; its largest absolute error.
    """

    checked: int
    outside: int
    worst_ratio: float
    winner_ratio: float | None
    winner_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One problem, kernel text and GPU.

    Attributes:
        name: how it is linked within the page.
        measured: whether anything was timed; else every figure is a prediction.
        winner: the row a call would take from these, or None.
        tflops: of a measured winner, where the problem's work is known.
        counts: trials by status.
        ranked: the first predicted rows, by place.
        text_age: "today's" where the kernel text is what is rendered now, "older" or "unknown" elsewhere.
    """

    name: str
    spec_key: str
    variant: str
    gpu: str
    arch: str
    shape: dict[str, int]
    digest: str
    text_age: str
    measured: bool
    winner: Record | None
    tflops: float | None
    counts: dict[str, int]
    surface: Surface | None
    history: tuple[Step, ...]
    finals: tuple[Finalist, ...]
    importance: tuple[Importance, ...]
    failures: tuple[Failure, ...]
    accuracy: Accuracy | None
    ranked: tuple[Record, ...]
    versions: dict[str, tuple[str, ...]]
    protocols: tuple[str, ...]
    sessions: tuple[str, ...]
    first: str
    last: str
    origins: tuple[str, ...]

    @property
    def trials(self) -> int:
        """How many trials there are."""
        return sum(self.counts.values())

    @property
    def title(self) -> str:
        """The problem in words."""
        spec, s = AttentionSpec.from_key(self.spec_key), self.shape
        heads = f"{s['num_heads_q']}" + (f"/{s['num_heads_kv']}" if s["num_heads_kv"] != s["num_heads_q"] else "")
        length = f"{s['seqlen_q']}" + (f"×{s['seqlen_k']}" if s["seqlen_k"] != s["seqlen_q"] else "")
        dims = f"{spec.head_dim}" + (f"/{spec.head_dim_v}" if spec.head_dim_v != spec.head_dim else "")
        flags = ", ".join(flag.removeprefix("has_") for flag in spec.flags) or "full"
        return f"{spec.dtype}, head dim {dims}, {flags}; batch {s['batch']}, length {length}, heads {heads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        source: the database, or the shipped rows.
        shipped: whether these are shipped rows, because the database holds none.
        subjects: measured ones first, then by name.
        version: flashgen's.
        created: ISO 8601, UTC.
    """

    source: str
    shipped: bool
    subjects: tuple[Subject, ...]
    version: str
    created: str


def gather(rows: Iterable[Record]) -> tuple[Subject, ...]:
    """The subjects of trials: those with measurements first, those with most trials first."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for row in rows:
        sizes = tuple(row.shape[name] for name in SHAPE_KEYS)
        groups.setdefault((row.gpu, row.spec_key, row.variant, sizes, row.digest), []).append(row)
    found = [_subject(group) for group in groups.values()]
    found.sort(key=lambda one: (not one[1].measured, -one[1].trials, one[0]))
    return tuple(subject for _, subject in found)


def compact(config: dict[str, object]) -> str:
    """A configuration in few words, e.g. `128×64, 8 warps, 3 stages`."""
    left = dict(config)
    words = []
    if {"BLOCK_M", "BLOCK_N"} <= left.keys():
        words.append(f"{left.pop('BLOCK_M')}×{left.pop('BLOCK_N')}")
    for knob in ("num_warps", "num_stages"):
        if knob in left:
            words.append(f"{left.pop(knob)} {knob.removeprefix('num_')}")
    return ", ".join([*words, *(f"{name}={value}" for name, value in sorted(left.items()))])


def side_by_side(row: Record) -> bool:
    """Whether a row was timed in the final rounds."""
    return row.protocol.startswith("shootout") or "interleaved" in row.protocol


def _subject(rows: list[Record]) -> tuple[tuple[object, ...], Subject]:
    first = rows[0]
    rows = sorted(rows, key=lambda row: row.created)
    timed = [row for row in rows if row.status == "ok"]
    winner = best_measured(rows, first.shape) or best_predicted(rows, first.shape)
    spec = AttentionSpec.from_key(first.spec_key)
    searched = [row for row in rows if not side_by_side(row)]
    points = _once(searched if any(row.status == "ok" for row in searched) or not timed else rows)
    sizes = tuple(first.shape[name] for name in SHAPE_KEYS)
    name = "-".join([first.gpu, first.spec_key, first.variant, *map(str, sizes), first.digest[:8]])
    subject = Subject(
        name=re.sub(r"[^A-Za-z0-9_-]", "_", name),
        spec_key=first.spec_key,
        variant=first.variant,
        gpu=first.gpu,
        arch=first.arch,
        shape=dict(first.shape),
        digest=first.digest,
        text_age=_age(spec, first),
        measured=bool(timed),
        winner=winner,
        tflops=_tflops(spec, winner),
        counts={status: n for status in MEANING if (n := sum(row.status == status for row in rows))},
        surface=surface_of(points, winner, predicted=not timed),
        history=_history(searched) if timed else (),
        finals=_finals(rows, winner),
        importance=importances([(row.config, row.latency_ms) for row in points if row.status == "ok" and row.latency_ms]),
        failures=_failures(rows),
        accuracy=_accuracy(rows, winner),
        ranked=tuple(sorted((r for r in rows if r.status == "predicted" and r.rank is not None), key=lambda r: (r.rank or 0, r.config_json)))[:10],
        versions=_versions(rows),
        protocols=tuple(sorted({row.protocol for row in rows})),
        sessions=tuple(dict.fromkeys(row.session for row in rows)),
        first=rows[0].created,
        last=rows[-1].created,
        origins=tuple(sorted({row.origin for row in rows})),
    )  # fmt: skip
    return (first.gpu, first.spec_key, sizes, first.variant, first.digest), subject


def _once(rows: Sequence[Record]) -> list[Record]:
    """One row per configuration: its least time, else the last that happened to it."""
    found: dict[str, Record] = {}
    for row in rows:
        old = found.get(row.config_json)
        if old is None or old.latency_ms is None or (row.latency_ms is not None and row.latency_ms < old.latency_ms):
            found[row.config_json] = row
    return list(found.values())


def _age(spec: AttentionSpec, row: Record) -> str:
    try:
        return "today's" if render(spec, by_name(row.variant)).digest == row.digest else "older"
    except (FlashgenError, KeyError):
        return "unknown"


def _tflops(spec: AttentionSpec, winner: Record | None) -> float | None:
    """Useful work per second; known where no option with a number of its own removes work."""
    if winner is None or winner.latency_ms is None or not set(spec.flags) <= {"causal", "has_lse"}:
        return None
    if spec.op != "attention_fwd":
        return None
    problem = Problem(
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        causal=spec.causal,
        batch=winner.shape["batch"],
        seqlen_q=winner.shape["seqlen_q"],
        seqlen_k=winner.shape["seqlen_k"],
        num_heads_q=winner.shape["num_heads_q"],
        num_heads_kv=winner.shape["num_heads_kv"],
    )
    return problem.flops / winner.latency_ms / 1e9


def _history(rows: Sequence[Record]) -> tuple[Step, ...]:
    steps, best = [], None
    for number, row in enumerate(rows, start=1):
        usable = row.status == "ok" and row.error_ratio is not None and row.error_ratio <= 1.0
        if usable and row.latency_ms is not None and (best is None or row.latency_ms < best):
            best = row.latency_ms
        steps.append(Step(number=number, label=compact(dict(row.config)), status=row.status, latency_ms=row.latency_ms, best_ms=best))  # fmt: skip
    return tuple(steps)


def _finals(rows: Sequence[Record], winner: Record | None) -> tuple[Finalist, ...]:
    """The newest run's final rounds."""
    timed = [row for row in rows if row.status == "ok" and row.latency_ms is not None and side_by_side(row)]
    if not timed:
        return ()
    newest = [row for row in timed if row.session == timed[-1].session]
    best = min(row.latency_ms or 0.0 for row in newest)
    return tuple(_finalist(row, best, winner) for row in sorted(newest, key=lambda row: row.latency_ms or 0.0))


def _finalist(row: Record, best: float, winner: Record | None) -> Finalist:
    final: dict[str, Any] = (row.facts or {}).get("shootout") or {}
    found = final.get("interval")
    return Finalist(
        label=compact(dict(row.config)),
        median_ms=row.latency_ms or 0.0,
        low_ms=row.latency_p10_ms or row.latency_ms or 0.0,
        high_ms=row.latency_p90_ms or row.latency_ms or 0.0,
        ratio=(row.latency_ms or 0.0) / best,
        interval=None
        if found is None
        else (math.expm1(found["low"]), math.expm1(found["middle"]), math.expm1(found["high"])),
        floor=None if final.get("floor") is None else math.expm1(final["floor"]),
        rounds=int(final.get("rounds", 0)),
        winner=winner is not None and row.config == winner.config,
        quality=row.quality,
        message=row.message or "",
    )


def _failures(rows: Sequence[Record]) -> tuple[Failure, ...]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        if row.status not in ("ok", "predicted"):
            groups.setdefault((row.status, _NUMBER.sub("0", row.message or "")), []).append(row)
    found = [
        Failure(status=status, count=len(alike), message=alike[0].message or "", label=compact(dict(alike[0].config)))
        for (status, _), alike in groups.items()
    ]
    return tuple(sorted(found, key=lambda one: (-one.count, one.status, one.message)))


def _accuracy(rows: Sequence[Record], winner: Record | None) -> Accuracy | None:
    ratios = [row.error_ratio for row in rows if row.error_ratio is not None]
    if not ratios:
        return None
    return Accuracy(
        checked=len(ratios),
        outside=sum(ratio > 1.0 for ratio in ratios),
        worst_ratio=max(ratios),
        winner_ratio=None if winner is None else winner.error_ratio,
        winner_error=None if winner is None else winner.max_abs_error,
    )


def _versions(rows: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    names = sorted({name for row in rows for name in row.versions})
    return {name: tuple(sorted({row.versions[name] for row in rows if name in row.versions})) for name in names}
