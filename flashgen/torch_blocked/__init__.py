"""The torch backend: blocked exact attention in plain torch operations, with its own blocked backward.

It is the fallback on every device and a second oracle for the kernels, and it covers every option. Scores exist only for
one block of queries and keys at a time, so memory beyond inputs and outputs does not grow with seqlen_q x seqlen_k
(FlashAttention, arXiv 2205.14135, algorithms 1 and 4). Products and softmax are fp32 whatever the inputs' dtype.

`options` holds what happens to a score and its derivative, `philox` dropout's random numbers, `blocked` the loops.
"""

from __future__ import annotations

from torch import Tensor

from flashgen.torch_blocked import blocked, fused
from flashgen.torch_blocked.blocked import SCORE_BUDGET
from flashgen.torch_blocked.options import GradientSums, Options
from flashgen.torch_blocked.packed import Packing
from flashgen.torch_blocked.packed import backward as packed_backward
from flashgen.torch_blocked.packed import forward as packed_forward

__all__ = [
    "SCORE_BUDGET",
    "GradientSums",
    "Options",
    "Packing",
    "backward",
    "forward",
    "packed_backward",
    "packed_forward",
]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor, lse: Tensor | None) -> None:
    """Forward into `out` and `lse`: PyTorch's fused CPU kernel where it means the same, else the blocked loops.

    Args:
        q, k, v, options, out, lse: as in `blocked.forward`.
    """
    run = fused.forward if fused.covers(q, k, v, options) else blocked.forward
    run(q, k, v, options, out, lse)


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    *,
    bias_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, GradientSums]:
    """Gradients: from PyTorch's fused CPU kernel where it means the same and is as accurate, else from the blocked loops.

    Args:
        dout, dlse, q, k, v, out, lse, options, bias_grad, sinks_grad: as in `blocked.backward`.
    """
    if dout is not None and fused.covers_backward(dout, dlse, q, k, v, lse, options):
        return fused.backward(dout, q, k, v, out, lse, options)
    return blocked.backward(dout, dlse, q, k, v, out, lse, options, bias_grad=bias_grad, sinks_grad=sinks_grad)
