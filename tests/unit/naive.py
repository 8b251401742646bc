"""Unblocked fp64 attention with every option, differentiable by autograd: the oracle of whole feature combinations.

Written against the contract, not against the code: masks are full matrices, the softmax is torch's, packed sequences are cut
apart. Only dropout's keep mask comes from the package, where it is defined (and tested against the published
Philox vectors).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashgen.torch_blocked.philox import keep_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of bshd tensors; every gradient by autograd."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, group = k.shape[1], heads // k.shape[2]
    shift = seqlen_k - seqlen_q
    d = shift if causal_alignment == "bottom-right" else 0
    b = torch.arange(first_batch, first_batch + batch).view(-1, 1, 1, 1)
    h = torch.arange(heads).view(1, -1, 1, 1)
    i = torch.arange(seqlen_q).view(1, 1, -1, 1)
    j = torch.arange(seqlen_k).view(1, 1, 1, -1)
    s = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(group, 2))
    s = s * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if score_mod is not None:
        s = score_mod(s, b, h, i, j)
    if alibi_slopes is not None:
        slopes = alibi_slopes.double()
        slopes = slopes.view(1, -1, 1, 1) if slopes.dim() == 1 else slopes.view(batch, -1, 1, 1)
        s = s - slopes * (i + shift - j).abs()
    if bias is not None:
        s = s + bias
    visible = torch.ones(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    if causal:
        visible &= j <= i + d
    if window_size[0] >= 0:
        visible &= j >= i + d - window_size[0]
    if window_size[1] >= 0:
        visible &= j <= i + d + window_size[1]
    if attn_mask is not None:
        visible &= attn_mask
    if mask_mod is not None:
        visible &= mask_mod(b, h, i, j)
    s = s.masked_fill(~visible, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.view(1, -1, 1, 1).expand(batch, heads, seqlen_q, 1)], -1)
    dead = (s == -math.inf).all(-1, keepdim=True) if s.shape[-1] else torch.ones(*s.shape[:3], 1, dtype=torch.bool)
    safe = s.masked_fill(dead, 0.0)
    p = safe.softmax(-1).masked_fill(dead, 0.0)
    lse = safe.logsumexp(-1).masked_fill(dead[..., 0], -math.inf)
    p = p[..., :seqlen_k]
    if dropout_p and philox is not None:
        p = p * keep_mask(philox, dropout_p, b * heads + h, i, j) / (1.0 - dropout_p)
    return torch.einsum("bhmn,bnhd->bmhd", p, v.repeat_interleave(group, 2)), lse
