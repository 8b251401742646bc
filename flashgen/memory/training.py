"""What training costs in memory: saved for the backward, a layer and a model, and the peak of a step, four ways.

`layer(shape, strategy)` lists what one layer keeps, `step(shape, strategy)` walks a whole step. Counted from the operations of
`transformer`, in bytes; nothing is measured here. `examples/training_memory.py` holds the same figures to a real model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from flashgen.errors import InvalidProblemError
from flashgen.memory.strategy import Shape, Strategy
from flashgen.memory.tape import Tape
from flashgen.memory.transformer import Transformer

Part = Literal["norms", "projections", "attention", "MLP", "weights, cast"]
Optimizer = Literal["adamw", "sgd", "none"]

PARTS: tuple[Part, ...] = ("norms", "projections", "attention", "MLP", "weights, cast")
# Bytes of state for a parameter. AdamW keeps two moments in fp32; 16-bit weights have fp32 masters beside.
_MOMENTS: dict[Optimizer, int] = {"adamw": 8, "sgd": 0, "none": 0}
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "sgd", "none")
_MASTER = 4

_PART_OF: dict[str, Part] = {
    "residual": "norms",
    "embedded": "norms",
    "input": "norms",
    "norm statistics": "norms",
    "normed": "projections",
    "attention, dropped: mask": "projections",
    "weights, cast": "weights, cast",
    "up": "MLP",
    "gate and up": "MLP",
    "gate, activated": "MLP",
    "active": "MLP",
    "mlp, dropped: mask": "MLP",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Storages of one name that a layer keeps: their bytes together."""

    name: str
    part: Part
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A training step, in bytes where nothing else is said.

    Attributes:
        shape, strategy: what was counted.
        layer: what one layer keeps when its forward is over: with checkpointing its input alone.
        recomputing: what one layer keeps while its own backward runs; `layer` without checkpointing.
        saved: kept by all layers, embedding, head and loss when the forward is over, parameters themselves apart.
        peak: the most at once in forward and backward, gradients of parameters included, parameters and optimiser apart.
        parameters, gradients, optimizer: bytes of each; fp32 masters of 16-bit weights belong to the optimiser.
        flops: of one forward, products alone, two a multiply-add.
        recomputed_flops: what the step multiplies a second time.
    """

    shape: Shape
    strategy: Strategy
    layer: tuple[Kept, ...]
    recomputing: tuple[Kept, ...]
    saved: int
    peak: int
    parameters: int
    gradients: int
    optimizer: int
    flops: int
    recomputed_flops: int

    @property
    def layer_saved(self) -> int:
        """Bytes that one layer keeps when its forward is over."""
        return sum(kept.size for kept in self.layer)

    @property
    def total(self) -> int:
        """The peak with parameters and the optimiser's state."""
        return self.peak + self.parameters + self.optimizer


def layer(shape: Shape, strategy: Strategy) -> tuple[Kept, ...]:
    """What one layer keeps for its backward, its input included, by name in the order of the forward.

    Args:
        shape: of the model; `layers`, `vocab` and `positions` do not matter.
        strategy: how it runs.
    """
    tape = Tape()
    model = Transformer(tape, shape, strategy)
    y = model.run_layer(model.stream(), 0)
    model.leave_autocast()
    sizes: dict[str, int] = {}
    for buffer in tape.saved.values():
        if buffer.size == 0:
            continue  # a parameter: it is there anyhow
        sizes[buffer.name] = sizes.get(buffer.name, 0) + buffer.size
    del y
    return tuple(Kept(name=name, part=_PART_OF.get(name, "attention"), size=size) for name, size in sizes.items())


def step(shape: Shape, strategy: Strategy, *, optimizer: Optimizer = "adamw") -> Step:
    """Walk forward, loss and backward of one step whose gradients were set to None before.

    Args:
        shape: of the model.
        strategy: how it runs.
        optimizer: whose state lies beside: `adamw` (two fp32 moments a parameter), `sgd` (without momentum) or `none`.

    Raises:
        InvalidProblemError: an unknown optimiser.
    """
    if optimizer not in _MOMENTS:
        raise InvalidProblemError(f"optimizer={optimizer!r} is not known: allowed are {', '.join(OPTIMIZERS)}.")
    tape = Tape()
    model = Transformer(tape, shape, strategy)
    x = model.embed()
    for number in range(shape.layers):
        x = model.run_layer(x, number)
    result = model.head(x) if shape.vocab else x
    del x
    model.leave_autocast()
    if shape.vocab:
        result = model.loss(result)
    saved = sum(buffer.size for buffer in tape.saved.values())
    tape.run_backward(result, tape.new("gradient of the result", result.buffer.size))
    count = parameters(shape)
    masters = _MASTER if strategy.precision == "16bit" and optimizer != "none" else 0
    per_layer = layer(shape, strategy)
    return Step(
        shape=shape,
        strategy=strategy,
        layer=per_layer,
        recomputing=layer(shape, replace(strategy, checkpoint=False)) if strategy.checkpoint else per_layer,
        saved=saved,
        peak=tape.heap.peak,
        parameters=count * strategy.weight_size,
        gradients=count * strategy.weight_size,
        optimizer=count * (_MOMENTS[optimizer] + masters),
        flops=shape.layers * layer_flops(shape, strategy) + 2 * shape.rows * shape.hidden * shape.vocab,
        recomputed_flops=shape.layers * layer_recomputed_flops(shape, strategy),
    )


def parameters(shape: Shape) -> int:
    """Parameters of the model: projections without bias, norms with gain and offset, embedding and output projection untied."""
    columns = 2 * shape.mlp_width if shape.gated else shape.mlp_width
    per_layer = (
        shape.hidden * shape.qkv_width
        + shape.attention_width * shape.hidden
        + shape.hidden * columns
        + shape.mlp_width * shape.hidden
        + 4 * shape.hidden
    )
    around = (2 * shape.vocab + shape.positions + 2) * shape.hidden if shape.vocab else 0
    return shape.layers * per_layer + around


def layer_flops(shape: Shape, strategy: Strategy) -> int:
    """FLOPs of a layer's forward: products alone, two a multiply-add."""
    return sum(_layer_flops(shape, strategy))


def _layer_flops(shape: Shape, strategy: Strategy) -> tuple[int, int, int]:
    """(projections and the MLP up to its last product, attention, the last product) of a layer's forward."""
    columns = 2 * shape.mlp_width if shape.gated else shape.mlp_width
    before = 2 * shape.rows * shape.hidden * (shape.qkv_width + shape.attention_width + columns)
    # Materialised attention multiplies hidden pairs like any other, a tiled kernel skips them.
    pairs = shape.visible_pairs if strategy.attention == "flash" else shape.pairs
    return before, 4 * pairs * shape.head_dim, 2 * shape.rows * shape.hidden * shape.mlp_width


def layer_recomputed_flops(shape: Shape, strategy: Strategy) -> int:
    """FLOPs that a layer's backward spends on what its forward had.

    A checkpointed layer runs again up to its last product, whose operands are needed and whose result is not (torch stops there); flash
    attention multiplies q k^T again, in any case (arXiv 2205.14135, section 3.1).
    """
    before, attention, _ = _layer_flops(shape, strategy)
    scores = attention // 2 if strategy.attention == "flash" else 0
    return scores + (before + attention if strategy.checkpoint else 0)
