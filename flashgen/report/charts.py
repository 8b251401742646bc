"""Where things stand in a chart: coordinates and tick marks. The template draws them as SVG, in the page's own text and colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashgen.memory import size
from flashgen.report.data import Finalist, Step
from flashgen.report.memory import MemoryRow
from flashgen.report.surface import figure

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 12, 40
_SLOWEST = 10.0  # times the best: slower readings stand on the upper edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A trial: where, what it was (`ok`, `clipped`, `failed`), and its text."""

    x: float
    y: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryChart:
    """Times over trials, and the incumbent as a stair."""

    stair: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """A finalist: its line of text, and its bar from p10 to p90 with the median on it."""

    text: str
    y: float
    low: float
    middle: float
    high: float
    winner: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalChart:
    """The final rounds; `band` is where the noise floor reaches, None where bars are milliseconds."""

    whiskers: tuple[Whisker, ...]
    ticks: tuple[Tick, ...]
    height: int
    band: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line over lengths: its name, path and points."""

    name: str
    path: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthChart:
    """Bytes over sequence lengths, both axes logarithmic."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def history_chart(steps: Sequence[Step]) -> HistoryChart | None:
    """The history of a measured search; None where nothing was timed."""
    times = [step.latency_ms for step in steps if step.latency_ms is not None]
    if not times:
        return None
    low, high = min(times), min(max(times), _SLOWEST * min(times))
    if high <= low:
        low, high = low / 1.1, high * 1.1
    x = _linear(1, max(2, len(steps)), _LEFT, WIDTH - _RIGHT)
    y = _log(low, high, HEIGHT - _BOTTOM, _TOP)
    marks, stair = [], ""
    for step in steps:
        where = x(step.number)
        if step.latency_ms is None:
            text = f"trial {step.number}: {step.status}, {step.label}"
            marks.append(Mark(x=where, y=_TOP - 6, kind="failed", text=text))
        else:
            kind = "clipped" if step.latency_ms > high else "ok"
            text = f"trial {step.number}: {figure(step.latency_ms)} ms, {step.label}"
            marks.append(Mark(x=where, y=y(min(high, step.latency_ms)), kind=kind, text=text))
        if step.best_ms is not None:
            level = round(y(min(high, step.best_ms)), 1)
            stair += f"M{where:.1f} {level}" if not stair else f"H{where:.1f}V{level}"
    return HistoryChart(
        stair=stair,
        marks=tuple(marks),
        x_ticks=tuple(Tick(at=x(n), text=str(n)) for n in _counts(len(steps))),
        y_ticks=tuple(Tick(at=y(value), text=figure(value)) for value in log_ticks(low, high)),
    )


def interval_chart(finals: Sequence[Finalist]) -> IntervalChart | None:
    """The final rounds; None where there were none.

    Where the protocol keeps them, bars are intervals of the time against the incumbent's, and the band is the noise of the
    incumbent's twin; else they reach from p10 to p90.
    """
    if not finals:
        return None
    paired = any(one.interval is not None for one in finals)
    floor = max((one.floor or 0.0 for one in finals), default=0.0) if paired else 0.0
    bars = [
        ((one.interval or (0.0, 0.0, 0.0)) if paired else (one.low_ms, one.median_ms, one.high_ms)) for one in finals
    ]
    low, high = min(bar[0] for bar in bars), max(bar[2] for bar in bars)
    if paired:
        low, high = min(low, -floor), max(high, floor)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    x = _linear(low - pad, high + pad, 10, WIDTH - 10)
    whiskers = tuple(
        Whisker(
            text=one.label + (" (winner)" if one.winner else "") + (" incumbent" if paired and one.interval is None else ""),
            y=34 + 44 * i, low=x(bar[0]), middle=x(bar[1]), high=x(bar[2]), winner=one.winner,
        )
        for i, (one, bar) in enumerate(zip(finals, bars, strict=True))
    )  # fmt: skip
    text: Callable[[float], str] = (lambda value: f"{100 * value:+.1f} %") if paired else figure
    ticks = tuple(Tick(at=x(value), text=text(value)) for value in _even(low, high, 4))
    band = (x(-floor), x(floor)) if paired else None
    return IntervalChart(whiskers=whiskers, ticks=ticks, height=44 * len(finals) + 46, band=band)


def growth_charts(rows: Sequence[MemoryRow]) -> tuple[GrowthChart, ...]:
    """Memory and traffic of a preset; empty where there are fewer than two lengths."""
    if len(rows) < 2:
        return ()
    pairs: tuple[tuple[str, dict[str, list[int]]], ...] = (
        ("Memory of the largest layer", {"materialised": [r.materialised_memory for r in rows], "flash": [r.flash_memory for r in rows]}),
        ("HBM traffic of a forward, all layers", {"materialised": [r.materialised_hbm for r in rows], "flash": [r.flash_hbm for r in rows]}),
    )  # fmt: skip
    return tuple(_growth(title, [row.seqlen for row in rows], lines) for title, lines in pairs)


def _growth(title: str, lengths: Sequence[int], lines: dict[str, list[int]]) -> GrowthChart:
    everything = [value for values in lines.values() for value in values]
    x = _log(lengths[0], lengths[-1], _LEFT + 20, WIDTH - _RIGHT - 12)
    y = _log(min(everything), max(everything), HEIGHT - _BOTTOM, _TOP)
    made = []
    for name, values in lines.items():
        points = tuple((round(x(n), 1), round(y(v), 1)) for n, v in zip(lengths, values, strict=True))
        path = "M" + "L".join(f"{a} {b}" for a, b in points)
        made.append(Line(name=name, path=path, points=points))
    powers = range(math.ceil(math.log2(min(everything))), math.floor(math.log2(max(everything))) + 1)
    every = max(1, math.ceil(len(powers) / 5))
    return GrowthChart(
        title=title,
        lines=tuple(made),
        x_ticks=tuple(Tick(at=x(n), text=str(n)) for n in lengths),
        y_ticks=tuple(Tick(at=y(2.0**p), text=size(2**p)) for p in powers[::every]),
    )


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values; the ends where fewer than two of these lie there."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) >= 2 else [low, math.sqrt(low * high), high]


def _even(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)] if high > low else [low]


def _counts(last: int) -> list[int]:
    step = max(1, round(last / 5))
    return sorted({1, *range(step, last - step // 2, step), last})


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def _log(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    scale = _linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))
