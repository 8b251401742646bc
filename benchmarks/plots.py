"""Pictures of the tables' CSVs, with every contestant and its p10 to p90.

TFLOP/s over the length, a panel a head dim and mask; of free-form attention (`hopper_freeform.py`) bars by kind, a panel an
operation, head dim and length.

    python benchmarks/plots.py benchmarks/results/h200_forward.csv benchmarks/results/h200_forward.png

Needs matplotlib (`pip install flashgen[plot]`).
"""

from __future__ import annotations

from pathlib import Path

import click
import tables

from flashgen import plot
from flashgen.errors import FlashgenError
from flashgen.peers.compare import TWIN

NAMES = {**tables.PEERS, "flashgen-ordered": "flashgen, ordered sums", "flashgen-triton": "flashgen, portable"}


def panel_of(row: tables.Row) -> tuple[str, ...]:
    """What a panel shows, in words: operation or kind, head dim, grouped heads, mask."""
    d, dv, heads, kv = (int(row[name]) for name in ("head_dim", "head_dim_v", "num_heads_q", "num_heads_kv"))
    dims = f"d {d}" if d == dv else f"d {d}/{dv}"
    group = "" if heads == kv else f", {heads // kv} heads a group"
    mask = row.get("kind") or ("causal" if row["causal"] == "True" else "full")
    return row["op"].removeprefix("attention_"), f"{dims}{group}", mask


def draw(source: Path, target: Path) -> int:
    """Draw a CSV; the number of panels.

    Raises:
        InvalidProblemError, MissingExtraError: as `plot.save`.
    """
    plot.check(target)
    rows = [row for row in tables.read(str(source.resolve())) if row["median_ms"] and row["contestant"] != TWIN]
    if not rows:
        raise click.ClickException(f"{source} holds no timed row.")
    if "kind" in rows[0]:
        return _bars(rows, target)
    panels: dict[tuple[str, ...], list[tables.Row]] = {}
    for row in rows:
        panels.setdefault(panel_of(row), []).append(row)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    made, axes = plot.figure(columns, rows=lines, title=tables.where(rows), size=(3.6, 2.9))
    order = list(dict.fromkeys(row["contestant"] for row in rows))
    for one, (words, mine) in zip(axes, sorted(panels.items(), key=_order), strict=False):
        for number, name in enumerate(order):
            points = sorted((row for row in mine if row["contestant"] == name), key=lambda row: int(row["seqlen_q"]))
            if not points:
                continue
            values = [float(row["tflops"]) for row in points]
            # The slow end of the times is the low end of the speeds.
            spread = [
                [float(row["tflops"]) * float(row["median_ms"]) / float(row[q]) for row in points]
                for q in ("p90_ms", "p10_ms")
            ]
            errors = [
                [max(0.0, v - low) for v, low in zip(values, spread[0], strict=True)],
                [max(0.0, high - v) for v, high in zip(values, spread[1], strict=True)],
            ]
            one.errorbar(
                [int(row["seqlen_q"]) for row in points], values, yerr=errors, marker="o", markersize=3, linewidth=1.2,
                capsize=2, color=plot.COLOURS[number % len(plot.COLOURS)], label=NAMES.get(name, name),
            )  # fmt: skip
        one.set_title(", ".join(words), fontsize=9)
        one.set_xscale("log", base=2)
        one.set_ylim(bottom=0)
        ticks = sorted({int(row["seqlen_q"]) for row in mine})
        one.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        one.tick_params(labelsize=8)
    for one in axes[len(panels) :]:
        one.set_axis_off()
    for first in axes[::columns]:
        first.set_ylabel("TFLOP/s (median; p10 to p90)", fontsize=8)
    handles = {
        label: handle
        for one in axes[: len(panels)]
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    made.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    plot.save(made, target)
    return len(panels)


def _bars(rows: list[tables.Row], target: Path) -> int:
    """TFLOP/s over visible pairs, by kind."""
    panels: dict[tuple[int, str, int], list[tables.Row]] = {}
    for row in rows:
        panels.setdefault((int(row["seqlen_q"]), row["op"], int(row["head_dim"])), []).append(row)
    columns = min(4, len(panels))
    made, axes = plot.figure(columns, rows=-(-len(panels) // columns), title=tables.where(rows), size=(4.2, 2.9))
    kinds, order = (list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "contestant"))
    width = 0.8 / len(order)
    for one, ((length, op, head_dim), mine) in zip(
        axes,
        sorted(panels.items(), key=lambda item: (item[0][0], item[0][1] != "attention_fwd", item[0][2])),
        strict=False,
    ):
        for number, name in enumerate(order):
            found = {row["kind"]: row for row in mine if row["contestant"] == name}
            places = [place for place, kind in enumerate(kinds) if kind in found]
            at = [place + (number - (len(order) - 1) / 2) * width for place in places]
            one.bar(
                at,
                [float(found[kinds[place]]["tflops"]) for place in places],
                width,
                color=plot.COLOURS[number % len(plot.COLOURS)],
                label=NAMES.get(name, name),
            )
        one.set_title(f"{'forward' if op == 'attention_fwd' else 'backward'}, d {head_dim}, S {length}", fontsize=9)
        one.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=7)
        one.tick_params(axis="y", labelsize=8)
    for one in axes[len(panels) :]:
        one.set_axis_off()
    for first in axes[::columns]:
        first.set_ylabel("TFLOP/s over visible pairs", fontsize=8)
    handles = {
        label: handle
        for one in axes[: len(panels)]
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    made.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    plot.save(made, target)
    return len(panels)


def _order(item: tuple[tuple[str, ...], list[tables.Row]]) -> tuple[int, int, int, str]:
    row = item[1][0]
    return int(row["head_dim"]), int(row["head_dim_v"]), -int(row["num_heads_kv"]), item[0][2]


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
def main(source: Path, target: Path) -> int:
    """Draw SOURCE, a CSV of `flashgen bench` or of the scripts here, as TARGET."""
    click.echo(f"{draw(source, target)} panels: {target}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except FlashgenError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
