"""The tables of README.md, made from what was measured (`results/`), so that no figure in them is typed.

    python benchmarks/tables.py                    # print them
    python benchmarks/tables.py --write README.md  # between their marks, <!-- table: NAME --> and <!-- end of table -->
    python benchmarks/tables.py --check README.md  # exit code 1 where one is not what its file says

A ratio is a peer's time over flashgen's, the median of the rounds' ratios: above 1 flashgen is faster. Means of ratios are geometric.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = {
    "fa4": "FlashAttention 4",
    "sdpa-cudnn": "cuDNN",
    "fa3": "FlashAttention 3",
    "sdpa-flash": "FlashAttention 2",
    "flex": "FlexAttention",
}
_MARK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
Row = dict[str, str]
Cell = dict[str, Row]  # contestant -> its row


def read(name: str) -> list[Row]:
    """The rows of a result; a cell measured twice counts as it was measured last."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells_of(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], Cell]:
    """Rows by the columns named, then by contestant."""
    found: dict[tuple[str, ...], Cell] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["contestant"]] = row
    return found


def with_peers(cells: dict[tuple[str, ...], Cell], rows: Iterable[Row], *names: str) -> None:
    """Add what another run timed: its other contestants, whose ratios are to the baseline that took turns with them there."""
    for key, cell in cells_of(rows, *names).items():
        for contestant, row in cell.items():
            if key in cells:
                cells[key].setdefault(contestant, row)


def peers_of(cells: dict[tuple[str, ...], Cell]) -> list[str]:
    """Those that were timed in any cell, in the order of `PEERS`."""
    return [name for name in PEERS if any(ratio(cell, name) is not None for cell in cells.values())]


def another_run(rows: Sequence[Row]) -> str:
    """Who was timed in a second run, and where; empty where there was none."""
    timed = [row for row in rows if row["median_ms"]]
    if not timed:
        return ""
    names = [PEERS[name] for name in PEERS if any(row["contestant"] == name for row in timed)]
    return (
        f" {', '.join(names)} are of another run, beside flashgen there: {where(timed)[:1].lower()}{where(timed)[1:]}."
    )


def ratio(cell: Cell, contestant: str) -> float | None:
    """A contestant's time over the baseline's; None where it was not timed."""
    text = cell.get(contestant, {}).get("ratio_median")
    return float(text) if text else None


def best(cell: Cell, peers: Sequence[str]) -> float | None:
    """The fastest peer's time over flashgen's."""
    return min((found for peer in peers if (found := ratio(cell, peer)) is not None), default=None)


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    return statistics.geometric_mean(list(values))


def where(rows: Sequence[Row]) -> str:
    """The machine and the versions, from the rows themselves; all must agree but for peers' versions."""
    one = {tuple(row[name] for name in ("gpu", "driver", "torch", "triton", "protocol")) for row in rows}
    if len(one) != 1:
        raise click.ClickException(f"rows of different machines or versions in one table: {sorted(one)}")
    gpu, driver, torch, triton, protocol = one.pop()
    clocks = [float(row[name]) for row in rows for name in ("sm_mhz_before", "sm_mhz_after") if row[name]]
    peers = sorted({row["version"] for row in rows if row["contestant"] in ("fa4", "fa3") and row["median_ms"]})
    return (
        f"One {gpu} (driver {driver}, {min(clocks):.0f} to {max(clocks):.0f} MHz; torch {torch}, Triton {triton}"
        f"{''.join(', ' + peer for peer in peers)}; protocol `{protocol}`)"
    )


def columns_of(lengths: Sequence[int], head: str) -> list[str]:
    """The two first lines of a table by length."""
    return [f"| {head} | " + " | ".join(f"S {n}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]


def dims(row: Sequence[str]) -> str:
    """`head dim 128`, or `head dims 192/128`."""
    d, dv = row
    return f"head dim {d}" if d == dv else f"head dims {d}/{dv}"


def summary(cells: dict[tuple[str, ...], Cell], peers: Sequence[str], group: Callable[[tuple[str, ...]], str]) -> str:
    """Geometric means over the best peer, all cells and by group, and the worst cells."""
    ratios = {key: found for key, cell in cells.items() if (found := best(cell, peers)) is not None}
    groups: dict[str, list[float]] = {}
    for key, value in ratios.items():
        groups.setdefault(group(key), []).append(value)
    low = sum(value < 0.95 for value in ratios.values())
    parts = ", ".join(f"{name} {mean(values):.3f}" for name, values in groups.items())
    return (
        f"Geometric mean against the best peer of each cell: {mean(ratios.values()):.3f} over {len(ratios)} cells ({parts}); "
        f"worst {min(ratios.values()):.3f}; {low} below 0.95."
    )


def forward() -> str:
    """Hopper forward."""
    rows, more = read("h200_forward.csv"), read("h200_forward_peers.csv")
    names = ("head_dim", "head_dim_v", "num_heads_q", "num_heads_kv", "causal", "seqlen_q")
    cells = cells_of(rows, *names)
    with_peers(cells, more, *names)
    peers = peers_of(cells)
    lengths = sorted({int(key[5]) for key in cells})
    lines = [
        f"{where(rows)}, bf16, 16,384 tokens of a model 2048 wide: TFLOP/s, and in brackets how many times longer "
        f"{', '.join(PEERS[name] for name in peers)} take.{another_run(more)}",
        "",
        *columns_of(lengths, "forward"),
    ]
    for d in sorted({int(key[0]) for key in cells}):
        for grouped in (False, True):
            for causal in ("False", "True"):
                found = {
                    int(key[5]): cell
                    for key, cell in cells.items()
                    if int(key[0]) == d and (key[2] != key[3]) == grouped and key[4] == causal
                }
                if found:
                    label = f"head dim {d}{', 4 query heads per key/value head' if grouped else ''}{', causal' if causal == 'True' else ''}"
                    lines.append(f"| {label} | " + " | ".join(_figures(found.get(n), peers) for n in lengths) + " |")
    return "\n".join([*lines, "", summary(cells, peers, lambda key: dims(key[:2]))])


def _figures(cell: Cell | None, peers: Sequence[str], *, own: str = "flashgen") -> str:
    if cell is None or not cell[own]["tflops"]:
        return "-"
    others = ["-" if (found := ratio(cell, peer)) is None else f"{found:.2f}" for peer in peers]
    return f"{float(cell[own]['tflops']):.0f} ({', '.join(others)})"


def backward() -> str:
    """Hopper backward, and what a fixed order of sums costs."""
    rows, more = read("h200_backward.csv"), read("h200_backward_peers.csv")
    names = ("head_dim", "head_dim_v", "causal", "seqlen_q")
    cells = cells_of(rows, *names)
    with_peers(cells, more, *names)
    peers = peers_of(cells)
    lengths = sorted({int(key[3]) for key in cells})
    lines = [
        f"{where(rows)}, bf16, 16,384 tokens of a model 2048 wide, through autograd: TFLOP/s, how many times longer "
        f"{', '.join(PEERS[name] for name in peers)} take, and after the semicolon the speed with `deterministic=True` as a part of it.{another_run(more)}",
        "",
        *columns_of(lengths, "backward"),
    ]
    for pair in sorted({key[:2] for key in cells}, key=lambda pair: tuple(map(int, pair))):
        for causal in ("False", "True"):
            texts = []
            for n in lengths:
                cell = cells.get((*pair, causal, str(n)))
                text = _figures(cell, peers)
                ordered = None if cell is None else ratio(cell, "flashgen-ordered")
                texts.append(text if ordered is None else f"{text[:-1]}; {1 / ordered:.2f})")
            lines.append(f"| {dims(pair)}{', causal' if causal == 'True' else ''} | " + " | ".join(texts) + " |")
    ordered = {key: 1 / found for key, cell in cells.items() if (found := ratio(cell, "flashgen-ordered")) is not None}
    worst = min(ordered, key=ordered.__getitem__)
    said = (
        f"Ordered sums run at {mean(ordered.values()):.2f} of the fast ones' speed (geometric mean), at least "
        f"{ordered[worst]:.2f} ({dims(worst[:2])}{', causal' if worst[2] == 'True' else ''}, S {worst[3]}); "
        f"{sum(value < 0.85 for value in ordered.values())} of {len(ordered)} cells are below 0.85."
    )
    return "\n".join([*lines, "", summary(cells, peers, lambda key: dims(key[:2])), said])


def portable_backward() -> str:
    """The portable kernel's backward beside FlashAttention 2's, on Hopper."""
    rows = read("h200_backward_portable.csv")
    cells = cells_of(rows, "head_dim", "head_dim_v", "causal", "seqlen_q")
    lengths = sorted({int(key[3]) for key in cells})
    lines = [
        f'{where(rows)}, the same sizes, `backend="triton"`: TFLOP/s, and how many times longer FlashAttention 2 takes.',
        "",
        *columns_of(lengths, "portable backward"),
    ]
    for pair in sorted({key[:2] for key in cells}, key=lambda pair: tuple(map(int, pair))):
        for causal in ("False", "True"):
            texts = [
                _figures(cells.get((*pair, causal, str(n))), ["sdpa-flash"], own="flashgen-triton") for n in lengths
            ]
            lines.append(f"| {dims(pair)}{', causal' if causal == 'True' else ''} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", summary(cells, ["sdpa-flash"], lambda key: dims(key[:2]))])


def freeform() -> str:
    """Free-form attention beside FlexAttention."""
    rows = read("h200_freeform.csv")
    if not rows:
        return "Not measured yet."
    cells = cells_of(rows, "kind", "op", "head_dim", "seqlen_q")
    lengths = sorted({int(key[3]) for key in cells})
    timed = [row for row in rows if row["samples"] not in ("", "0")]
    lines = [
        f"{where(timed)}, bf16, 16,384 tokens of a model 2048 wide: how many times longer FlexAttention takes, and after the semicolon the speed "
        "per visible pair (per pair in tiles of 128 x 128 that hold one) as a part of the plain causal kernel's; `-` where a kernel or a figure is missing.",
    ]
    for op, word in (("attention_fwd", "forward"), ("attention_bwd", "backward")):
        for d in sorted({int(key[2]) for key in cells}):
            lines += ["", *columns_of(lengths, f"{word}, head dim {d}")]
            for kind in dict.fromkeys(key[0] for key in cells):
                texts = [_freeform_figures(cells.get((kind, op, str(d), str(n)))) for n in lengths]
                lines.append(f"| {kind} | " + " | ".join(texts) + " |")
    for op, word in (("attention_fwd", "Forward"), ("attention_bwd", "Backward")):
        some = {key: cell for key, cell in cells.items() if key[1] == op}
        ratios = [found for cell in some.values() if (found := ratio(cell, "flex")) is not None]
        speeds = [
            float(text) for cell in some.values() if (text := cell.get("flashgen", {}).get("speed_of_plain_causal"))
        ]
        tiles = [
            float(text)
            for cell in some.values()
            if (text := cell.get("flashgen", {}).get("tile_speed_of_plain_causal"))
        ]
        missing = sum(not cell.get("flashgen", {}).get("median_ms") for cell in some.values())
        parts = [f"{word}: {len(ratios)} cells beside FlexAttention"]
        if ratios:
            parts.append(f"geometric mean {mean(ratios):.2f}, worst {min(ratios):.2f}")
        if speeds:
            parts.append(
                f"speed of plain causal per visible pair {mean(speeds):.2f}, per touched tile {mean(tiles):.2f}"
            )
        if missing:
            parts.append(f"{missing} cells that no generated kernel takes")
        lines += ["" if word == "Forward" else None, "; ".join(parts) + "."]  # type: ignore[list-item]
    both = [found for cell in cells.values() if (found := ratio(cell, "flex")) is not None]
    if both:
        low = sum(value < 1.0 for value in both)
        lines.append(
            f"Both ways: geometric mean {mean(both):.2f} over {len(both)} cells; FlexAttention is faster in {low}."
        )
    return "\n".join(line for line in lines if line is not None)


def _freeform_figures(cell: Cell | None) -> str:
    own = (cell or {}).get("flashgen", {})
    if cell is None or not own.get("median_ms"):
        return "-"
    found = ratio(cell, "flex")
    flex = "-" if found is None else f"{found:.2f}"
    speed = own.get("speed_of_plain_causal")
    return flex if not speed else f"{flex}; {float(speed):.2f} ({float(own['tile_speed_of_plain_causal']):.2f})"


def training_memory() -> str:
    """What a training step holds on a GPU."""
    document: dict[str, Any] = json.loads((RESULTS / "h200_training_memory.json").read_text())
    shape, ways = document["shape"], document["ways"]
    lines = [
        f"One {document['device']} (torch {document['torch']}), {shape['layers']} layers, width {shape['hidden']}, batch {shape['batch']}, "
        f"{shape['seqlen']} tokens, counted / measured:",
        "",
        "| a step | saved, fp32 | peak, fp32 | saved, bf16 autocast | peak, bf16 autocast |",
        "|---|---|---|---|---|",
    ]
    for kept in (False, True):
        for attention in ("materialised", "flash"):
            texts = []
            for precision in ("fp32", "autocast"):
                way = next(
                    (
                        w
                        for w in ways
                        if (w["attention"], w["checkpoint"], w["precision"]) == (attention, kept, precision)
                    ),
                    None,
                )
                for figure in ("saved", "peak"):
                    texts.append(
                        "-" if way is None else f"{_gib(way['counted'][figure])} / {_gib(way['measured'][figure])} GiB"
                    )
            lines.append(f"| {attention}{', layers checkpointed' if kept else ''} | " + " | ".join(texts) + " |")
    worst = max(
        abs(w["counted"][f] / w["measured"][f] - 1) for w in ways for f in ("saved", "peak", "parameters", "optimizer")
    )
    return "\n".join([*lines, "", f"The largest difference is {math.ceil(1e4 * worst) / 100:.2f} %."])


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


TABLES: dict[str, Callable[[], str]] = {
    "forward": forward,
    "backward": backward,
    "portable-backward": portable_backward,
    "freeform": freeform,
    "training-memory": training_memory,
}


def filled(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        click.ClickException: it marks a table that is not made here.
    """

    def made(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise click.ClickException(f"table {name!r} is not made here: there are {', '.join(TABLES)}.")
        return f"{match.group(1)}{TABLES[name]()}\n{match.group(4)}"

    return _MARK.sub(made, text)


@click.command()
@click.option("--write", type=click.Path(path_type=Path, exists=True), help="Fill in the tables that it marks.")
@click.option(
    "--check", type=click.Path(path_type=Path, exists=True), help="Exit code 1 where a table is not up to date."
)
def main(write: Path | None, check: Path | None) -> int:
    """Make README.md's tables."""
    if check is not None:
        stale = filled(check.read_text()) != check.read_text()
        if stale:
            click.echo(f"{check} is not up to date: python benchmarks/tables.py --write {check}", err=True)
        return int(stale)
    if write is not None:
        write.write_text(filled(write.read_text()))
        return 0
    for name, make in TABLES.items():
        click.echo(f"## {name}\n\n{make()}\n")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
