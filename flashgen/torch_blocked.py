"""The torch backend: blocked exact attention in plain torch operations, with its own blocked backward.

It is the fallback on every device and a second oracle for the kernels. Scores exist only for one block of queries and
keys at a time, so memory beyond inputs and outputs does not grow with seqlen_q x seqlen_k (FlashAttention, arXiv
2205.14135, algorithms 1 and 4). Products and softmax are computed in fp32 whatever the dtype of the inputs.

All tensors are in `bshd` order (any strides); lse is `(batch, num_heads_q, seqlen_q)` fp32, natural logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores of one step: 2^22 fp32 elements are 16 MiB, small beside any inputs for which blocking matters.
_SCORE_BUDGET = 1 << 22
_BLOCK_Q = 256
_BLOCK_K = 512


class _Tile(NamedTuple):
    """A step: slices of the batch and of the query rows, and how many keys the rows may see together."""

    batch: slice
    rows: slice
    kv_end: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    causal_offset: int,
    sm_scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Blocked forward into `out` (and `lse` where given).

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k: (batch, seqlen_k, num_heads_kv, head_dim).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        causal: query i sees keys j <= i + causal_offset.
        causal_offset: see causal.
        sm_scale: factor of the scores.
        out: (batch, seqlen_q, num_heads_q, head_dim_v), written.
        lse: (batch, num_heads_q, seqlen_q) fp32, written; None where nobody wants it.
    """
    heads_kv = k.shape[2]
    for tile in _tiles(q, k, causal, causal_offset):
        q_i = _grouped(q[tile.batch, tile.rows], heads_kv).float() * sm_scale
        m_i = q_i.new_full(q_i.shape[:-1], -torch.inf)
        l_i = torch.zeros_like(m_i)
        acc = q_i.new_zeros((*q_i.shape[:-1], v.shape[3]))
        for keys in _blocks(tile.kv_end, _BLOCK_K):
            scores = q_i @ _grouped(k[tile.batch, keys], heads_kv).float().mT
            _mask(scores, tile, keys, causal, causal_offset)
            m_new = torch.maximum(m_i, scores.amax(-1))
            # A row that has seen no key keeps m = -inf; subtracting it would make NaN.
            m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)
            p = scores.sub_(m_safe.unsqueeze(-1)).exp_()
            alpha = (m_i - m_safe).exp_()
            l_i = l_i * alpha + p.sum(-1)
            acc = acc * alpha.unsqueeze(-1) + p @ _grouped(v[tile.batch, keys], heads_kv).float()
            m_i = m_new
        empty = l_i == 0
        acc /= l_i.masked_fill(empty, 1.0).unsqueeze(-1)
        out[tile.batch, tile.rows] = _ungrouped(acc).to(out.dtype)
        if lse is not None:
            value = (m_i + l_i.log()).masked_fill(empty, -torch.inf)
            lse[tile.batch, :, tile.rows] = value.flatten(1, 2)


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    causal_offset: int,
    sm_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocked backward (FlashAttention-2, arXiv 2307.08691, section 3.1.2), deterministic.

    Args:
        dout: gradient of out, or None for zero.
        dlse: gradient of lse (batch, num_heads_q, seqlen_q), or None for zero.
        q, k, v: as in `forward`.
        out, lse: what `forward` wrote.
        causal, causal_offset, sm_scale: as in `forward`.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k and v; gradients of shared heads are summed in fp32.
    """
    heads_kv = k.shape[2]
    dq = torch.zeros_like(q)
    dk = torch.zeros_like(k, dtype=torch.float32)
    dv = torch.zeros_like(v, dtype=torch.float32)
    for tile in _tiles(q, k, causal, causal_offset):
        q_i = _grouped(q[tile.batch, tile.rows], heads_kv).float()
        lse_i = lse[tile.batch, :, tile.rows].unflatten(1, (heads_kv, -1))
        # exp(-inf - -inf) would be NaN: a row without keys has only -inf scores, which 0 turns into p = 0.
        lse_i = lse_i.masked_fill(lse_i == -torch.inf, 0.0).unsqueeze(-1)
        delta = torch.zeros_like(lse_i)
        if dout is not None:
            dout_i = _grouped(dout[tile.batch, tile.rows], heads_kv).float()
            delta += (dout_i * _grouped(out[tile.batch, tile.rows], heads_kv).float()).sum(-1, keepdim=True)
        else:
            dout_i = q_i.new_zeros((*q_i.shape[:-1], v.shape[3]))
        if dlse is not None:
            delta -= dlse[tile.batch, :, tile.rows].unflatten(1, (heads_kv, -1)).unsqueeze(-1)
        dq_i = torch.zeros_like(q_i)
        for keys in _blocks(tile.kv_end, _BLOCK_K):
            k_j = _grouped(k[tile.batch, keys], heads_kv).float()
            scores = (q_i * sm_scale) @ k_j.mT
            _mask(scores, tile, keys, causal, causal_offset)
            p = scores.sub_(lse_i).exp_()
            dv[tile.batch, keys] += (p.mT @ dout_i).sum(2).transpose(1, 2)
            ds = p.mul_(dout_i @ _grouped(v[tile.batch, keys], heads_kv).float().mT - delta)
            dq_i += ds @ k_j
            dk[tile.batch, keys] += (ds.mT @ q_i).sum(2).transpose(1, 2) * sm_scale
        dq[tile.batch, tile.rows] = _ungrouped(dq_i * sm_scale).to(q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _tiles(q: Tensor, k: Tensor, causal: bool, causal_offset: int) -> Iterator[_Tile]:
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_k = k.shape[1]
    block_q = max(1, min(_BLOCK_Q, seqlen_q, _SCORE_BUDGET // (heads_q * max(1, min(_BLOCK_K, seqlen_k)))))
    batches = max(1, _SCORE_BUDGET // (heads_q * block_q * max(1, min(_BLOCK_K, seqlen_k))))
    for items in _blocks(batch, batches):
        for rows in _blocks(seqlen_q, block_q):
            kv_end = min(seqlen_k, max(0, rows.stop + causal_offset)) if causal else seqlen_k
            yield _Tile(items, rows, kv_end)


def _blocks(stop: int, size: int) -> Iterator[slice]:
    for start in range(0, stop, size):
        yield slice(start, min(start + size, stop))


def _mask(scores: Tensor, tile: _Tile, keys: slice, causal: bool, causal_offset: int) -> None:
    if not causal or keys.stop - 1 <= tile.rows.start + causal_offset:
        return
    rows = torch.arange(tile.rows.start, tile.rows.stop, device=scores.device)
    columns = torch.arange(keys.start, keys.stop, device=scores.device)
    scores.masked_fill_(columns > rows.unsqueeze(-1) + causal_offset, -torch.inf)


def _grouped(x: Tensor, heads_kv: int) -> Tensor:
    """(b, s, h, d) as (b, heads_kv, h / heads_kv, s, d): query heads beside the key/value head they share."""
    return x.unflatten(2, (heads_kv, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    """The inverse of `_grouped`."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)
