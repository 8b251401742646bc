"""A preset's training step, four ways: attention materialised or flash, layers checkpointed or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.memory.strategy import ATTENTIONS, PRECISIONS, Precision, Shape, Strategy
from flashgen.memory.training import OPTIMIZERS, Optimizer, Step, layer_flops, layer_recomputed_flops, step
from flashgen.memory.workspace import fused_kernels
from flashgen.presets import Layers, Preset, find


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the step.

    Attributes:
        step: its memory; of its FLOPs those below count, since kinds of layers see different pairs.
        flops: of a forward, embedding apart.
        recomputed_flops: what the step multiplies a second time.
    """

    step: Step
    flops: int
    recomputed_flops: int

    @property
    def name(self) -> str:
        """In words."""
        return self.step.strategy.attention + (", checkpointed" if self.step.strategy.checkpoint else "")

    @property
    def again(self) -> float:
        """What is multiplied twice, as a share of the step's three forwards."""
        return self.recomputed_flops / (3 * self.flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTraining:
    """A model's training step at one length.

    Attributes:
        preset, seqlen, batch, precision, dropout, optimizer: what was asked.
        layers: how many are counted.
        ways: materialised, flash, and both with checkpointed layers.
    """

    preset: str
    seqlen: int
    batch: int
    precision: Precision
    dropout: bool
    optimizer: Optimizer
    layers: int
    ways: tuple[Way, ...]


def training_of(
    preset: str,
    *,
    seqlen: int | None = None,
    batch: int | None = None,
    precision: Precision | None = None,
    dropout: bool = False,
    optimizer: Optimizer = "adamw",
) -> ModelTraining:
    """Count a preset's training step: plain layers of its width, heads and MLP (`transformer` says which).

    What a model has beyond them (norms of q and k, norms after a branch, a projection before the logits) is not counted.

    Args:
        preset: `name`, or `name/kind` for its layers of one kind.
        seqlen: None for the preset's own.
        batch: None for the preset's own.
        precision: None for fp32 where the preset is fp32, else autocast.
        dropout: whether there is any.
        optimizer: whose state lies beside.

    Raises:
        InvalidProblemError: unknown preset, kind, precision or optimiser; a length or batch below 1.
        UnsupportedProblemError: the model's layers are no plain ones.
    """
    model, kinds = find(preset)
    for name, value in (("seqlen", seqlen), ("batch", batch)):
        if value is not None and value < 1:
            raise InvalidProblemError(f"{name}={value} is not allowed: {name} must be 1 or more.")
    if precision is not None and precision not in PRECISIONS:
        raise InvalidProblemError(f"precision={precision!r} is not known: allowed are {', '.join(PRECISIONS)}.")
    if optimizer not in OPTIMIZERS:
        raise InvalidProblemError(f"optimizer={optimizer!r} is not known: allowed are {', '.join(OPTIMIZERS)}.")
    if model.mlp_width is None:
        raise UnsupportedProblemError(
            f"the layers of {model.name} are no plain ones (experts, levels of different width, or cross-attention): only their "
            "attention is counted, by flashgen.memory.of_model."
        )
    used: Precision = precision or ("fp32" if model.dtype == "fp32" else "autocast")
    shapes = [_shape(model, kind, seqlen or model.seqlen, batch or model.batch) for kind in kinds]
    whole = _together(shapes)
    ways = []
    for checkpoint, attention in product((False, True), ATTENTIONS):
        workspace = fused_kernels(whole)
        strategy = Strategy(
            attention=attention, checkpoint=checkpoint, precision=used, dropout=dropout, workspace=workspace
        )
        head = 2 * whole.rows * whole.hidden * whole.vocab
        ways.append(
            Way(
                step=step(whole, strategy, optimizer=optimizer),
                flops=head + sum(one.layers * layer_flops(one, strategy) for one in shapes),
                recomputed_flops=sum(one.layers * layer_recomputed_flops(one, strategy) for one in shapes),
            )
        )
    return ModelTraining(
        preset=preset.lower(),
        seqlen=whole.seqlen,
        batch=whole.batch,
        precision=used,
        dropout=dropout,
        optimizer=optimizer,
        layers=whole.layers,
        ways=tuple(ways),
    )


def _shape(model: Preset, kind: Layers, seqlen: int, batch: int) -> Shape:
    if model.mlp_width is None or kind.lengths(seqlen) != (seqlen, seqlen) or kind.head_dim_v is not None:
        raise UnsupportedProblemError(f"the {kind.kind} layers of {model.name} are no plain self-attention.")
    return Shape(
        batch=batch,
        seqlen=seqlen,
        hidden=model.hidden_size,
        heads_q=kind.num_heads_q,
        heads_kv=kind.num_heads_kv,
        head_dim=kind.head_dim,
        mlp_width=model.mlp_width,
        gated=model.gated,
        layers=kind.count,
        causal=kind.causal,
        window=kind.window,
        softcap=bool(kind.softcap),
        vocab=model.vocab,
    )


def _together(shapes: list[Shape]) -> Shape:
    """All layers as one kind: what they keep does not depend on the window, and is the same otherwise."""
    kinds = {replace(one, layers=1, window=None) for one in shapes}
    if len(kinds) != 1:
        raise UnsupportedProblemError("layers of different shapes keep different amounts: name one kind.")
    return replace(shapes[0], layers=sum(one.layers for one in shapes), window=None)
