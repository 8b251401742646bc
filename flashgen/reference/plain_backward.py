"""Gradients of causal attention in fp64 and as an honest kernel computes them; blocked over query rows, as `plain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flashgen.reference.plain import divide, full_fp32, row_blocks, softmax_parts

if TYPE_CHECKING:
    from torch import Tensor

    Gradients = tuple[Tensor, Tensor, Tensor]


def gradients_oracle(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, causal_offset: int, sm_scale: float
) -> Gradients:
    """Exact gradients: fp64 throughout, from the inputs as they were rounded.

    Args:
        dout: gradient of the output, (batch, seqlen_q, num_heads_q, head_dim_v); lse has none.
        q, k, v, causal, causal_offset, sm_scale: as in `attention_oracle`.

    Returns:
        dq, dk and dv in the shapes of q, k and v, fp64; 0 for a row that sees no key and for a key that no row sees.

    """
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    for rows in row_blocks(q, k, causal, causal_offset):
        q_rows, keys, values = (x.double() for x in rows.slice(q, k, v))
        dout_rows = rows.of(dout).double()
        weights, _, total = softmax_parts(rows.mask(q_rows @ keys.mT * sm_scale))
        p = divide(weights, total)
        dp = dout_rows @ values.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * sm_scale
        rows.of(dq).copy_(ds @ keys)
        rows.keys_of(dk).add_((ds.mT @ q_rows).sum(0))
        rows.keys_of(dv).add_((p.mT @ dout_rows).sum(0))
    return dq, dk, dv


def gradients_low_precision(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    causal_offset: int,
    sm_scale: float,
) -> Gradients:
    """What an honest flash backward of the inputs' dtype computes from the out and lse that a forward left.

    P from lse in fp32, delta from the rounded output, P and dS rounded to the input dtype, sums in fp32 over the heads of a
    group too, one rounding out. Its distance from `gradients_oracle` is the unit of the budget.

    Args:
        dout, q, k, v, causal, causal_offset, sm_scale: as in `gradients_oracle`; of one dtype.
        out: the forward's output.
        lse: the forward's log-sum-exp, (batch, num_heads_q, seqlen_q), natural logarithm, fp32.

    Returns:
        dq, dk and dv in the input dtype.

    """
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    with full_fp32():
        for rows in row_blocks(q, k, causal, causal_offset):
            q_rows, keys, values = (x.float() for x in rows.slice(q, k, v))
            dout_rows = rows.of(dout).float()
            lse_rows = lse[rows.batch, rows.heads, rows.rows].unsqueeze(-1)
            scores = rows.mask(q_rows @ keys.mT * sm_scale)
            p = torch.exp(scores - lse_rows.masked_fill(lse_rows == -torch.inf, 0.0))
            delta = (dout_rows * rows.of(out).float()).sum(-1, keepdim=True)
            ds = (p * (dout_rows @ values.mT - delta)).to(q.dtype).float()
            rows.of(dq).copy_(ds @ keys * sm_scale)
            rows.keys_of(dk).add_((ds.mT @ q_rows).sum(0) * sm_scale)
            rows.keys_of(dv).add_((p.to(q.dtype).float().mT @ dout_rows).sum(0))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
