"""The surface of one problem as heat maps: two knobs span a map, the others make small multiples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashgen.store import Record
from flashgen.store.records import Tunable

MOST_PANELS = 12
WORDS = {
    "censored": "slow", "compile_error": "error", "out_of_resources": "too big", "wrong_result": "wrong", "timeout": "time-out",
    "crashed": "crash", "predicted": "compiled",
}  # fmt: skip
# From the best to three times slower, dark to light: lightness alone orders it, whatever colours an eye can tell.
_STOPS = ((11, 72, 107), (17, 120, 134), (75, 161, 140), (166, 199, 153), (242, 233, 201))
_PALEST = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One configuration on a map.

    Attributes:
        text: milliseconds, a predicted place (`#3`), or why there is no time.
        status: of the trial; "" where there was none.
        colour, ink: background and text, as CSS colours; "" leaves the page's own.
        best: whether it is the least time of the whole surface.
        winner: whether it is what was chosen in the end.
    """

    text: str
    status: str = ""
    colour: str = ""
    ink: str = ""
    best: bool = False
    winner: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One map: the values of the knobs that are fixed in it, and its cells row by row."""

    title: str
    cells: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """All maps of a problem.

    Attributes:
        row_knob, column_knob: what a map spans.
        rows, columns: their values.
        panels: one for each combination of the other knobs.
        left_out: combinations beyond the most that are shown.
        predicted: the cells hold predicted places, not times.
    """

    row_knob: str
    column_knob: str
    rows: tuple[Tunable, ...]
    columns: tuple[Tunable, ...]
    panels: tuple[Panel, ...]
    left_out: int
    predicted: bool


def surface_of(rows: Sequence[Record], winner: Record | None, *, predicted: bool) -> Surface | None:
    """The surface of one problem's trials, one per configuration; None where two knobs do not vary.

    Args:
        rows: one trial per configuration.
        winner: what was chosen.
        predicted: whether places of a prediction are shown instead of times.
    """
    values = {
        name: sorted({row.config[name] for row in rows}, key=_by_size) for name in (rows[0].config if rows else ())
    }
    varying = sorted(
        (name for name in values if len(values[name]) > 1),
        key=lambda name: (not name.startswith("BLOCK"), -len(values[name]), name),
    )
    if len(varying) < 2:
        return None
    down, across = sorted(varying[:2])
    others = [name for name in values if name not in (down, across)]
    groups: dict[tuple[Tunable, ...], dict[tuple[Tunable, Tunable], Record]] = {}
    for row in rows:
        fixed = tuple(row.config[name] for name in others)
        groups.setdefault(fixed, {})[row.config[down], row.config[across]] = row
    best = min((row.latency_ms for row in rows if row.latency_ms is not None), default=None)
    places = [row.rank for row in rows if row.rank is not None]
    shown = sorted(groups, key=lambda fixed: -len(groups[fixed]))[:MOST_PANELS]
    panels = [
        Panel(
            title=", ".join(f"{name}={value}" for name, value in zip(others, fixed, strict=True)),
            cells=tuple(
                tuple(_cell(groups[fixed].get((r, c)), best, places, predicted, None if winner is None else winner.config) for c in values[across]) for r in values[down]
            ),
        )
        for fixed in sorted(shown, key=lambda fixed: tuple(map(_by_size, fixed)))
    ]  # fmt: skip
    return Surface(
        row_knob=down,
        column_knob=across,
        rows=tuple(values[down]),
        columns=tuple(values[across]),
        panels=tuple(panels),
        left_out=len(groups) - len(shown),
        predicted=predicted,
    )


def _by_size(value: Tunable) -> tuple[bool, float, str]:
    return (isinstance(value, str), 0.0 if isinstance(value, str) else float(value), str(value))


def _cell(
    row: Record | None, best: float | None, places: Sequence[int], predicted: bool, chosen: Mapping[str, Tunable] | None
) -> Cell:
    if row is None:
        return Cell(text="·")
    if predicted and row.rank is not None:
        # Places are spread over the scale: they say an order, nothing of how much.
        share = (row.rank - min(places)) / max(1, max(places) - min(places))
        paint = _paint(share)
        return Cell(
            text=f"#{row.rank}",
            status=row.status,
            colour=paint["colour"],
            ink=paint["ink"],
            winner=row.config == chosen,
        )
    if row.latency_ms is None or row.status != "ok":
        return Cell(text=WORDS.get(row.status, row.status), status=row.status)
    slowdown = row.latency_ms / (best or row.latency_ms)
    paint = _paint(min(1.0, math.log(slowdown) / math.log(_PALEST)))
    return Cell(
        text=figure(row.latency_ms),
        status=row.status,
        colour=paint["colour"],
        ink=paint["ink"],
        best=row.latency_ms == best,
        winner=row.config == chosen,
    )


def figure(value: float) -> str:
    """Three digits, never an exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 6)}f}"


def _paint(share: float) -> dict[str, str]:
    """Background at a place of the scale, and black or white, whichever stands out more."""
    place = share * (len(_STOPS) - 1)
    lower = min(int(place), len(_STOPS) - 2)
    mix = [round(a + (b - a) * (place - lower)) for a, b in zip(_STOPS[lower], _STOPS[lower + 1], strict=True)]
    light = luminance(mix)
    white = 1.05 / (light + 0.05) >= (light + 0.05) / 0.05
    return {"colour": "#{:02x}{:02x}{:02x}".format(*mix), "ink": "#fff" if white else "#000"}


def luminance(rgb: Iterable[int]) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [v / 12.92 if (v := value / 255) <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for value in rgb]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def scale() -> list[Mapping[str, str]]:
    """The legend: slowdown in words, colour and ink."""
    steps = (1.0, 1.05, 1.2, 1.5, 2.0, 3.0)
    return [
        {"text": f"{step:g}x" + (" or more" if step == _PALEST else ""), **_paint(math.log(step) / math.log(_PALEST))}
        for step in steps
    ]
