"""What a preset is: the attention of one published model, layer kind by layer kind."""

from __future__ import annotations

from dataclasses import dataclass

from flashgen.spec import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Attention layers of one kind: all equal, `count` of them in the model.

    Attributes:
        kind: its name within the preset, e.g. `local`.
        count: how many the model has.
        num_heads_q, num_heads_kv: heads.
        head_dim: of q and k.
        head_dim_v: of v; None for head_dim.
        causal: whether the future is masked.
        shrink: the length of q, and of k in self-attention, is the model's divided by this (rounded up).
        seqlen_q, seqlen_k: lengths that do not follow the model's, e.g. 77 text tokens; None where they do.
        window: keys that a query sees, itself included; None for all.
        softcap: scores pass through softcap * tanh(s / softcap); 0 for not.
        softmax_scale: None for 1/sqrt(head_dim).
        has_sinks: a learned logit per head in the denominator.
    """

    kind: str
    count: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int | None = None
    causal: bool = False
    shrink: int = 1
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    window: int | None = None
    softcap: float = 0.0
    softmax_scale: float | None = None
    has_sinks: bool = False

    def lengths(self, seqlen: int) -> tuple[int, int]:
        """(seqlen_q, seqlen_k) where the model's length is `seqlen`."""
        own = -(-seqlen // self.shrink)
        return (
            own if self.seqlen_q is None else self.seqlen_q,
            own if self.seqlen_k is None else self.seqlen_k,
        )

    @property
    def window_size(self) -> tuple[int, int]:
        """As `attention()` takes it: `window` keys are the query's own and window - 1 before it."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The attention of one model.

    Attributes:
        name: what `--preset` takes; `name/kind` names one kind of layers.
        dtype: the dtype it is usually run in.
        hidden_size: width of the residual stream (of the widest level, where there are several).
        seqlen: the length tuned for when none is given.
        batch: the batch tuned for when none is given.
        layers: the kinds of attention layers; the first is the main one.
        source: where the numbers stand.
        mlp_width, gated: inside a layer's MLP, and whether it has a gate; None where layers differ (experts, levels, cross-attention).
        vocab: rows of the output projection, which gives logits for every token; 0 where there is none, or only for some tokens.
    """

    name: str
    dtype: DType
    hidden_size: int
    seqlen: int
    batch: int
    layers: tuple[Layers, ...]
    source: str
    mlp_width: int | None = None
    gated: bool = False
    vocab: int = 0

    @property
    def num_layers(self) -> int:
        """Attention layers of all kinds."""
        return sum(layers.count for layers in self.layers)
