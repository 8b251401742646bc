"""`flashgen memory`."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from flashgen import plot
from flashgen.cli import memory_training
from flashgen.cli.output import json_option, print_json, print_table
from flashgen.errors import InvalidProblemError
from flashgen.memory import (
    OPTIMIZERS,
    PRECISIONS,
    Account,
    ModelAccount,
    ModelTraining,
    Optimizer,
    Precision,
    of_model,
    size,
    training_of,
)  # fmt: skip
from flashgen.presets import find
from flashgen.target import Target

_BASIS = "bytes counted by the IO analysis of FlashAttention (arXiv 2205.14135, section 3.2), not measured"
_DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


@click.command()
@click.option("--preset", required=True, metavar="NAME[/KIND]", help="A model, or one kind of its layers.")
@click.option(
    "--seqlens", metavar="N,N,...", help="Sequence lengths; powers of two from 1024 to 32768 where not given."
)
@click.option("--batch", type=click.IntRange(min=1), help="The preset's own where not given.")
@click.option("--target", "target_name", metavar="NAME", default="h100", show_default=True)
@click.option("--train", is_flag=True, help="Also what training keeps and its peak, by layer and by model.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="With --train; autocast, and fp32 for a preset in fp32, where not given.",
)
@click.option("--dropout", is_flag=True, help="With --train: masks of dropout are kept too.")
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), help="With --train: whose state lies beside; adamw where not given."
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A picture: .png, .svg or .pdf.",
)
@json_option
def memory(
    preset: str,
    seqlens: str | None,
    batch: int | None,
    target_name: str,
    train: bool,
    precision: Precision | None,
    dropout: bool,
    optimizer: Optimizer | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Activation memory and HBM traffic of a model's attention, flash against materialised.

    Counted with the tiles that a call would run; nothing is measured. With --train also what every layer keeps for the backward
    and the peak of a step, with and without gradient checkpointing.
    """
    lengths, target = _lengths(seqlens), Target.named(target_name)
    for name, given in (("--precision", precision), ("--dropout", dropout), ("--optimizer", optimizer)):
        if given and not train:
            raise InvalidProblemError(f"{name} says how a step is trained: give --train too.")
    if plot_file is not None:
        plot.check(plot_file)
    # Where a tile comes from is a column here; the hint to tune, once per length, would bury the table.
    logger = logging.getLogger("flashgen")
    logger.addFilter(_no_hints)
    try:
        rows = [of_model(preset, seqlen=n, target=target, batch=batch, train=train) for n in lengths]
    finally:
        logger.removeFilter(_no_hints)
    steps: list[ModelTraining] = []
    plain = find(preset)[0].mlp_width is not None
    if train and plain:
        chosen: Optimizer = optimizer or "adamw"
        steps = [
            training_of(preset, seqlen=n, batch=batch, precision=precision, dropout=dropout, optimizer=chosen)
            for n in lengths
        ]
    if plot_file is not None:
        if steps:
            memory_training.draw(steps, plot_file)
        else:
            draw(rows, plot_file)
    if as_json:
        documents = [to_json(row) for row in rows]
        for document, one in zip(documents, steps, strict=False):
            document["training"] = memory_training.to_json(one)
        print_json({"basis": _BASIS, "plot": plot_file, "models": documents})
        return
    print_table(_headers(train), [line for row in rows for line in _lines(row)])
    click.echo(f"{_BASIS}; K/V traffic of flash: what programs ask for (issued), and the share of it that HBM sees.")
    what = "all that exists at once; all layers: of the largest"
    if train:
        what = (
            "saved for the backward, materialised the least that code can do (scores in the dtype of q); all layers: with "
            "what the last one holds beside it"
        )
    click.echo(f"memory: attention alone, {what}.")
    for text in dict.fromkeys(_not_covered(row) for row in rows):
        if text:
            click.echo(text)
    if steps:
        click.echo()
        print_table(memory_training.headers(steps[0]), [line for one in steps for line in memory_training.lines(one)])
        for text in memory_training.notes(steps[0]):
            click.echo(text)
    elif train:
        click.echo(
            f"the layers of {rows[0].preset} are no plain ones (experts, levels, cross-attention): only attention is counted."
        )
    if plot_file is not None:
        click.echo(f"plot: {plot_file}")


def _no_hints(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def _lengths(text: str | None) -> tuple[int, ...]:
    if text is None:
        return _DEFAULT_LENGTHS
    try:
        lengths = tuple(int(word) for word in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise InvalidProblemError(
            f"--seqlens {text!r} must be lengths of 1 and more, divided by commas, e.g. 1024,2048."
        )
    return tuple(dict.fromkeys(lengths))


def to_json(row: ModelAccount) -> dict[str, Any]:
    """A model's account as a document, bytes everywhere."""
    return {
        "preset": row.preset,
        "seqlen": row.seqlen,
        "batch": row.batch,
        "target": row.target,
        "train": row.train,
        "layers": [
            {
                "kind": layer.kind,
                "count": layer.count,
                "problem": str(layer.account.problem),
                "tile": asdict(layer.account.tile),
                "config_source": layer.config_source,
                "uncovered": list(layer.uncovered),
                "flash": {**asdict(layer.account.flash), "issued": layer.account.flash.issued},
                "materialised": {**asdict(layer.account.materialised), "hbm": layer.account.materialised.hbm},
            }
            for layer in row.layers
        ],
        "model": {
            "flash_memory": row.flash_memory,
            "materialised_memory": row.materialised_memory,
            "flash_issued": row.total(lambda a: a.flash.issued),
            "flash_hbm_least": row.total(lambda a: a.flash.hbm_least),
            "flash_hbm_estimate": row.total(lambda a: a.flash.hbm_estimate),
            "flash_hbm_most": row.total(lambda a: a.flash.hbm_most),
            "materialised_hbm": row.total(lambda a: a.materialised.hbm),
        },
    }


def _headers(train: bool) -> list[str]:
    what = "saved" if train else "memory"
    return [
        "length", "layers", "tile", f"flash {what}", f"materialised {what}", "less", "flash issued", "flash HBM (least to most)",
        "materialised HBM", "less",
    ]  # fmt: skip


def _lines(row: ModelAccount) -> list[list[str]]:
    lines = []
    for layer in row.layers:
        one = layer.account
        flash, other = (
            (one.flash.saved, one.materialised.saved) if row.train else (one.flash.live, one.materialised.live)
        )
        tile = f"{one.tile.block_m}x{one.tile.block_n} ({layer.config_source}{'; no kernel yet' if layer.uncovered else ''})"
        bounds = (one.flash.hbm_least, one.flash.hbm_estimate, one.flash.hbm_most)
        lines.append(_line(row.seqlen, f"1 of {layer.count} {layer.kind}", tile, flash, other, one.flash.issued, bounds, one.materialised.hbm))  # fmt: skip
    totals = to_json(row)["model"]
    bounds = (totals["flash_hbm_least"], totals["flash_hbm_estimate"], totals["flash_hbm_most"])
    count = sum(layer.count for layer in row.layers)
    lines.append(_line(row.seqlen, f"all {count}", "", row.flash_memory, row.materialised_memory, totals["flash_issued"], bounds, totals["materialised_hbm"]))  # fmt: skip
    return lines


def _line(
    seqlen: int, layers: str, tile: str, flash: int, other: int, issued: int, bounds: tuple[int, int, int], hbm: int
) -> list[str]:
    least, estimate, most = bounds
    return [
        str(seqlen), layers, tile, size(flash), size(other), _ratio(other, flash), size(issued),
        f"{size(estimate)} ({size(least)} to {size(most)})", size(hbm), _ratio(hbm, estimate),
    ]  # fmt: skip


def _ratio(more: int, less: int) -> str:
    return f"{more / less:.1f}x" if less else "-"


def _not_covered(row: ModelAccount) -> str:
    kinds = [f"{layer.kind} ({', '.join(layer.uncovered)})" for layer in row.layers if layer.uncovered]
    if not kinds:
        return ""
    return (
        f"no kernel yet for {'; '.join(kinds)}: these layers run in the torch backend today; counted is a tiled kernel with "
        "the tile of the same attention without these options."
    )


def draw(rows: list[ModelAccount], path: Path) -> None:
    """Memory and HBM traffic over the lengths, of the whole model, on logarithmic axes.

    Raises:
        InvalidProblemError: the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    first = rows[0]
    title = f"{first.preset}, attention of all layers, batch {first.batch}, {first.target} (counted, not measured)"
    made, (left, right) = plot.figure(2, title=title)
    lengths = [row.seqlen for row in rows]
    gib = 2.0**30

    def total(row: ModelAccount, name: str) -> float:
        return float(row.total(lambda one: _traffic(one)[name])) / gib

    left.plot(lengths, [row.materialised_memory / gib for row in rows], marker="o", label="materialised")
    left.plot(lengths, [row.flash_memory / gib for row in rows], marker="o", label="flash")
    left.set_ylabel("saved for the backward, GiB" if first.train else "memory of the largest layer, GiB")
    right.plot(lengths, [total(row, "materialised") for row in rows], marker="o", label="materialised")
    right.plot(lengths, [total(row, "estimate") for row in rows], marker="o", label="flash (estimate)")
    right.fill_between(
        lengths,
        [total(row, "least") for row in rows],
        [total(row, "most") for row in rows],
        alpha=0.2,
        color=plot.COLOURS[1],
        label="flash: each operand once, to every re-read",
    )
    right.set_ylabel("HBM traffic of a forward, GiB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        axes.set_xlabel("sequence length")
        axes.legend()
    plot.save(made, path)


def _traffic(one: Account) -> dict[str, int]:
    flash = one.flash
    return {
        "least": flash.hbm_least, "estimate": flash.hbm_estimate, "most": flash.hbm_most, "materialised": one.materialised.hbm,
    }  # fmt: skip
