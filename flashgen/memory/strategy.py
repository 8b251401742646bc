"""What is trained and how: a plain transformer's sizes, and the choices that decide what a step holds in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flashgen.errors import InvalidProblemError

Precision = Literal["fp32", "autocast", "16bit"]
AttentionKind = Literal["flash", "materialised"]
Device = Literal["cuda", "cpu"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "autocast", "16bit")
DEVICES: tuple[Device, ...] = ("cuda", "cpu")
ATTENTIONS: tuple[AttentionKind, ...] = ("materialised", "flash")
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A transformer and the batch it is trained on.

    Attributes:
        batch, seqlen: of one step.
        hidden: width of the residual stream.
        heads_q, heads_kv, head_dim: of attention.
        mlp_width: inside the MLP.
        gated: whether the MLP multiplies by a gate (SwiGLU, GeGLU) or has one GELU.
        layers: blocks.
        causal: whether the future is masked; with `window`, keys that a query sees, itself included.
        softcap: whether scores pass through a capped tanh.
        vocab: rows of embedding and output projection; 0 for a model without either.
        positions: rows of a learned position embedding; 0 for none.
    """

    batch: int
    seqlen: int
    hidden: int
    heads_q: int
    heads_kv: int
    head_dim: int
    mlp_width: int
    gated: bool = False
    layers: int
    causal: bool = False
    window: int | None = None
    softcap: bool = False
    vocab: int = 0
    positions: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen", "hidden", "heads_q", "heads_kv", "head_dim", "mlp_width", "layers"):
            if getattr(self, name) < 1:
                raise InvalidProblemError(f"{name}={getattr(self, name)} is not allowed: {name} must be 1 or more.")
        if self.heads_q % self.heads_kv:
            raise InvalidProblemError(
                f"heads_q={self.heads_q} is not a multiple of heads_kv={self.heads_kv}: every key/value head serves "
                "the same number of query heads."
            )
        for name in ("vocab", "positions"):
            if getattr(self, name) < 0:
                raise InvalidProblemError(f"{name}={getattr(self, name)} is not allowed: {name} is 0 (none) or more.")

    @property
    def rows(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seqlen

    @property
    def pairs(self) -> int:
        """Scores of one layer."""
        return self.batch * self.heads_q * self.seqlen**2

    @property
    def visible_pairs(self) -> int:
        """Scores that no mask hides: what a tiled kernel multiplies, whole blocks apart."""
        n, heads = self.seqlen, self.batch * self.heads_q
        if not self.causal:
            return heads * n * n
        width = n if self.window is None else min(self.window, n)
        return heads * (n * width - width * (width - 1) // 2)

    @property
    def qkv_width(self) -> int:
        """Columns of the fused projection."""
        return (self.heads_q + 2 * self.heads_kv) * self.head_dim

    @property
    def attention_width(self) -> int:
        """Columns of attention's result."""
        return self.heads_q * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Bytes that an attention kernel holds while it runs, beyond operands and results."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How a step is run.

    Attributes:
        attention: `flash`, or `materialised` as eager code does it: softmax in fp32, its result cast back.
        checkpoint: every layer keeps its input alone and runs forward again in the backward (torch.utils.checkpoint).
        precision: `fp32`; `autocast` (fp32 weights, residuals and norms, products in 16 bit on cast copies); `16bit` (everything but norms'
            statistics and the loss; materialised softmax in 16 bit too, as Korthikanti et al. count).
        dropout: whether there is any.
        device: whose PyTorch kernels run: on `cuda` the softmax's backward makes `grad * output` first (ATen/native/cuda/SoftMax.cu), one more array
            as large as the scores.
        workspace: of flash attention's kernels.
    """

    attention: AttentionKind = "flash"
    checkpoint: bool = False
    precision: Precision = "autocast"
    dropout: bool = False
    device: Device = "cuda"
    workspace: Workspace = field(default_factory=Workspace)

    def __post_init__(self) -> None:
        for name, allowed in (("attention", ATTENTIONS), ("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise InvalidProblemError(
                    f"{name}={getattr(self, name)!r} is not known: allowed are {', '.join(allowed)}."
                )

    @property
    def weight_size(self) -> int:
        """Bytes of a parameter, and of the residual stream."""
        return 2 if self.precision == "16bit" else _FP32

    @property
    def compute_size(self) -> int:
        """Bytes of what products read and write."""
        return _FP32 if self.precision == "fp32" else 2

    @property
    def softmax_size(self) -> int:
        """Bytes of a score where the softmax is materialised."""
        return 2 if self.precision == "16bit" else _FP32
