"""PyTorch's own fused CPU attention, where it means exactly the same: plain or top-left causal, equal head dims.

At (1, 1024, 32, 64) fp32 on one core of a shared machine it took 0.38 and 0.37 s, the blocked loops in turn with it 0.90 and 0.91 s:
OMP_NUM_THREADS=1 python -c "import time, torch; from flashgen.torch_blocked import Options, blocked, fused; x = torch.randn(1, 1024, 32, 64)
for f in (fused, blocked) * 2: t = time.perf_counter(); f.forward(x, x, x, Options(sm_scale=.125), x.clone(), None); print(time.perf_counter() - t)"

The backward is taken in fp32 alone: in 16 bit PyTorch's loses two to three times what the blocked one loses against fp64 (bf16, head dims 32 and
64, lengths 128 and 2048), outside the error budget that every backend is held to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.torch_blocked.blocked import large
from flashgen.torch_blocked.options import GradientSums, Options


def covers(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether `forward` below computes this call."""
    o = options
    plain = (
        all(x is None for x in (o.alibi, o.sinks, o.bias, o.score_mod, o.philox))
        and not o.has_free_mask
        and not o.softcap
    )
    if o.causal and o.sm_scale <= 0:
        return False  # it hides scores before it scales them: -inf times a negative scale is inf, and the row NaN
    no_window = o.window == (-1, -1) and (not o.causal or o.offset == 0)
    return q.device.type == "cpu" and plain and no_window and q.shape[3] == v.shape[3] and min(*q.shape, *k.shape) > 0


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor, lse: Tensor | None) -> None:
    """As `blocked.forward`, for calls that `covers` admits."""
    if options.causal:
        # Keys behind the last query are seen by nobody and may hold anything, NaN included.
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    # That kernel reads rows as if their elements lay side by side, whatever the last stride says.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    value, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, options.causal, scale=options.sm_scale
    )
    out.copy_(value.transpose(1, 2))
    if lse is not None:
        lse.copy_(log_sum)


def covers_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, options: Options
) -> bool:
    """Whether `backward` below computes this call; PyTorch's takes lse as it is, also where that is too large to hold a row's sum."""
    given = dout is not None and dlse is None and q.dtype == torch.float32
    return given and covers(q, k, v, options) and not large(lse)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, GradientSums]:
    """As `blocked.backward`, for calls that `covers_backward` admits: nothing but q, k and v wants a gradient."""
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    if options.causal:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    # Strides of broadcast gradients are 0: that kernel reads them as if they were not.
    dout, q, k, v, out = (x.contiguous() for x in (dout, q, k, v, out))
    group = q.shape[2] // heads_kv
    if group > 1:
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
        lse.contiguous(),
        0.0,
        options.causal,
        scale=options.sm_scale,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    if group > 1:
        dk, dv = (x.unflatten(2, (heads_kv, group)).sum(3) for x in (dk, dv))
    if dk.shape[1] < seqlen_k:  # nobody saw the rest
        dk, dv = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, seqlen_k - x.shape[1])) for x in (dk, dv))
    return dq, dk, dv, GradientSums(bias=None, sinks=None, captured=[])
