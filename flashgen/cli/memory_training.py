"""The training part of `flashgen memory --train`: table, document and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashgen import plot
from flashgen.memory import PARTS, ModelTraining, Step, size

BASIS = (
    "training: counted from a walk over a plain transformer's step (arXiv 2205.05198, section 4.1, with what PyTorch keeps in eager mode), "
    "not measured"
)
# Columns of the picture: materialised in one colour, flash in the other, checkpointed dashed.
_STYLES = {
    "materialised": (0, "-"),
    "flash": (1, "-"),
    "materialised, checkpointed": (0, "--"),
    "flash, checkpointed": (1, "--"),
}


def headers(row: ModelTraining) -> list[str]:
    """Of the table: lengths down, ways across."""
    return ["length", "counted", *(way.name for way in row.ways)]


def lines(row: ModelTraining) -> list[list[str]]:
    """A layer part by part, then the model."""
    steps = [way.step for way in row.ways]
    count = steps[0].shape.layers
    one = f"1 of {count} layers"
    table: list[tuple[str, list[str]]] = []
    for part in PARTS:
        sizes = [part_of(step, part) for step in steps]
        if any(sizes):
            table.append((f"{one}: {part}", [size(n) for n in sizes]))
    table += [
        (f"{one}: saved", [size(step.layer_saved) for step in steps]),
        (f"{one}: saved, in its backward", [size(sum(k.size for k in step.recomputing)) for step in steps]),
        ("model: saved", [size(step.saved) for step in steps]),
        ("model: peak of a step, gradients in it", [size(step.peak) for step in steps]),
        ("the same with weights and optimiser", [size(step.total) for step in steps]),
        ("multiplied again", [f"{way.again:.1%}" for way in row.ways]),
    ]
    return [[str(row.seqlen), name, *cells] for name, cells in table]


def part_of(step: Step, part: str) -> int:
    """What one layer keeps of a part when its forward is over."""
    return sum(kept.size for kept in step.layer if kept.part == part)


def notes(row: ModelTraining) -> list[str]:
    """Under the table."""
    precision = {
        "fp32": "all in fp32",
        "autocast": "autocast: weights, residuals and norms in fp32, products in 16 bit on cast copies",
        "16bit": "all in 16 bit, norms' statistics and the loss in fp32",
    }[row.precision]
    state = {
        "adamw": "AdamW's two fp32 moments",
        "sgd": "SGD without momentum",
        "none": "no optimiser",
    }[row.optimizer]
    masters = " and fp32 masters" if row.precision == "16bit" and row.optimizer != "none" else ""
    shape = row.ways[0].step.shape
    return [
        BASIS,
        f"{precision}; {'dropout' if row.dropout else 'no dropout'}; {state}{masters}; materialised as eager code does it, with a softmax in "
        f"{'16 bit' if row.precision == '16bit' else 'fp32'}.",
        "multiplied again: FLOPs of products done twice, as a share of three forwards; a checkpointed layer runs forward again but for its last product, "
        "flash attention multiplies q k^T again.",
        *([] if shape.vocab else ["embedding and output projection are not counted: not every token gets logits."]),
    ]


def to_json(row: ModelTraining) -> dict[str, Any]:
    """A document, bytes everywhere."""
    shape = row.ways[0].step.shape
    return {
        "precision": row.precision,
        "dropout": row.dropout,
        "optimizer": row.optimizer,
        "model": {
            "layers": shape.layers, "hidden": shape.hidden, "heads_q": shape.heads_q, "heads_kv": shape.heads_kv,
            "head_dim": shape.head_dim, "mlp_width": shape.mlp_width, "gated": shape.gated, "vocab": shape.vocab,
        },
        "ways": [
            {
                "attention": way.step.strategy.attention,
                "checkpoint": way.step.strategy.checkpoint,
                "layer": {kept.name: kept.size for kept in way.step.layer},
                "layer_parts": {part: part_of(way.step, part) for part in PARTS},
                "layer_saved": way.step.layer_saved,
                "layer_saved_in_its_backward": sum(kept.size for kept in way.step.recomputing),
                "saved": way.step.saved,
                "peak": way.step.peak,
                "parameters": way.step.parameters,
                "gradients": way.step.gradients,
                "optimizer": way.step.optimizer,
                "total": way.step.total,
                "flops": way.flops,
                "recomputed_flops": way.recomputed_flops,
            }
            for way in row.ways
        ],
    }  # fmt: skip


def draw(rows: list[ModelTraining], path: Path) -> None:
    """What is saved, and the peak of a step, over the lengths.

    Raises:
        InvalidProblemError: the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    first = rows[0]
    title = f"{first.preset}, training, batch {first.batch}, {first.precision} (counted, not measured)"
    made, (left, right) = plot.figure(2, title=title)
    lengths, gib = [row.seqlen for row in rows], 2.0**30
    for number, way in enumerate(first.ways):
        colour, style = _STYLES[way.name]
        same: dict[str, Any] = {"color": plot.COLOURS[colour], "linestyle": style, "marker": "o", "label": way.name}
        left.plot(lengths, [row.ways[number].step.saved / gib for row in rows], **same)
        right.plot(lengths, [row.ways[number].step.total / gib for row in rows], **same)
    left.set_ylabel("saved for the backward, GiB")
    right.set_ylabel("peak with gradients, weights and optimiser, GiB")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        axes.set_xlabel("sequence length")
        axes.legend()
    plot.save(made, path)
