"""Blocked forward and backward over `bshd` tensors of any strides; see the package's docstring."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashgen.checks import without_values
from flashgen.torch_blocked.options import Block, GradientSums, Options, blocks

# Scores of one step. A step holds some ten arrays of that many elements: they have to be small beside q, k, v and out of 32k
# tokens in two heads of 64 (32 MiB in 16 bit), also where those tokens are many short sequences, which one step takes together.
SCORE_BUDGET = 1 << 19
_BLOCK_Q = 256
_BLOCK_K = 512
# Beyond it the rounding of lse, one number for a row's maximum and its sum, changes probabilities by more than 3e-5.
LARGE_LSE = float(1 << 10)


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor, lse: Tensor | None) -> None:
    """Blocked forward into `out` (and `lse` where given).

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim).
        k: (batch, seqlen_k, num_heads_kv, head_dim).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        options: everything else of the call.
        out: (batch, seqlen_q, num_heads_q, head_dim_v), written.
        lse: (batch, num_heads_q, seqlen_q) fp32, written; None where nobody wants it.
    """
    heads_q, heads_kv = q.shape[2], k.shape[2]
    for batch, rows, (start, stop) in _tiles(q, k, options):
        q_i = _grouped(q[batch, rows], heads_kv).float() * options.sm_scale
        m_i = q_i.new_full((q_i.shape[0], heads_q, q_i.shape[3]), -torch.inf)
        l_i = torch.zeros_like(m_i)
        acc = q_i.new_zeros((*m_i.shape, v.shape[3]))
        for keys in blocks(start, stop, _BLOCK_K):
            block = Block(options, batch, rows, keys, heads_q, q.device)
            scores, visible = block.scores((q_i @ _grouped(k[batch, keys], heads_kv).float().mT).flatten(1, 2))
            m_new = torch.maximum(m_i, scores.amax(-1))
            # A row that has seen no key keeps m = -inf; subtracting it would make NaN.
            m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)
            p = (scores - m_safe.unsqueeze(-1)).exp_()
            alpha = (m_i - m_safe).exp_()
            l_i = l_i * alpha + p.sum(-1)
            acc = acc * alpha.unsqueeze(-1) + _times(
                block.dropped(p), _seen(v[batch, keys], heads_kv, visible, options)
            )
            m_i = m_new
        if options.sinks is not None:
            m_i, l_i, acc = _add_sinks(m_i, l_i, acc, options.sinks)
        empty = l_i == 0
        acc /= l_i.masked_fill(empty, 1.0).unsqueeze(-1)
        out[batch, rows] = acc.transpose(1, 2).to(out.dtype)
        if lse is not None:
            lse[batch, :, rows] = (m_i + l_i.log()).masked_fill(empty, -torch.inf)


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
    """Blocked backward (FlashAttention-2, arXiv 2307.08691, section 3.1.2), deterministic on a CPU.

    Args:
        dout: gradient of out, or None for zero.
        dlse: gradient of lse (batch, num_heads_q, seqlen_q), or None for zero.
        q, k, v, options: as in `forward`.
        out, lse: what `forward` wrote.
        bias_grad, sinks_grad: whether those gradients are wanted; captured tensors' always are.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k and v (shared heads are summed in fp32), and the fp32 sums of the
        gradients of bias, sinks and captured tensors.
    """
    heads_q, heads_kv = q.shape[2], k.shape[2]
    dq = torch.zeros_like(q)
    dk = torch.zeros_like(k, dtype=torch.float32)
    dv = torch.zeros_like(v, dtype=torch.float32)
    sums = gradient_sums(options, bias_grad, sinks_grad)
    for batch, rows, (start, stop) in _tiles(q, k, options):
        q_i = _grouped(q[batch, rows], heads_kv).float()
        lse_i = lse[batch, :, rows]
        # A row without keys has only -inf scores, which a finite lse turns into p = 0 instead of NaN.
        lse_i = lse_i.masked_fill(lse_i == -torch.inf, 0.0).unsqueeze(-1)
        dout_i, delta = _delta(dout, dlse, out, batch, rows)
        divisor = None
        if large(lse_i):
            lse_i, divisor = (x.unsqueeze(-1) for x in _normaliser(q_i, k, batch, rows, (start, stop), options))
        if sums.sinks is not None and options.sinks is not None:
            p_sink = (options.sinks.float().view(1, -1, 1) - lse_i.squeeze(-1)).exp()
            if divisor is not None:
                p_sink = p_sink / divisor.squeeze(-1)
            sums.sinks -= (p_sink * delta.squeeze(-1)).sum((0, 2))
        dq_i = torch.zeros_like(q_i)
        for keys in blocks(start, stop, _BLOCK_K):
            block = Block(options, batch, rows, keys, heads_q, q.device)
            k_j = _grouped(k[batch, keys], heads_kv).float()
            raw = ((q_i * options.sm_scale) @ k_j.mT).flatten(1, 2)
            scores, visible = block.scores(raw)
            p = (scores - lse_i).exp_()
            if divisor is not None:
                p /= divisor
            dv[batch, keys] += _grouped_sum(block.dropped(p), dout_i, heads_kv)
            dp = _times(dout_i, _seen(v[batch, keys], heads_kv, visible, options).mT)
            if visible is not None:
                # A hidden score may be NaN, and 0 * NaN would reach the gradients of what score_mod captured.
                raw = raw.masked_fill(~visible, 0.0)
            ds = block.raw_gradient(raw, p * (block.dropped(dp) - delta), sums)
            if visible is not None:
                # A hidden score has no gradient, whatever NaN its key would bring along.
                ds = ds.masked_fill(~visible, 0.0)
            dq_i += _times(ds, _seen(k[batch, keys], heads_kv, visible, options)).view_as(dq_i)
            dk[batch, keys] += _grouped_sum(ds, q_i.flatten(1, 2), heads_kv) * options.sm_scale
        dq[batch, rows] = (dq_i * options.sm_scale).flatten(1, 2).transpose(1, 2).to(q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), sums


def large(lse: Tensor) -> bool:
    """Whether a row's sum has to be made anew, since its lse is too large to hold it. Off the CPU nothing synchronises: always."""
    if without_values(lse):
        return False
    return lse.device.type != "cpu" or bool(((lse.abs() > LARGE_LSE) & lse.isfinite()).any())


def _normaliser(
    q_i: Tensor, k: Tensor, batch: slice, rows: slice, keys: tuple[int, int], options: Options
) -> tuple[Tensor, Tensor]:
    """The maximum of each row's scores, 0 where there is none, and the sum of exp(score - maximum), 1 where there is none: (b, h, m) both."""
    heads_kv, heads_q = k.shape[2], q_i.shape[1] * q_i.shape[2]
    m_i = q_i.new_full((q_i.shape[0], heads_q, q_i.shape[3]), -torch.inf)
    l_i = torch.zeros_like(m_i)
    for block_keys in blocks(*keys, _BLOCK_K):
        block = Block(options, batch, rows, block_keys, heads_q, q_i.device)
        k_j = _grouped(k[batch, block_keys], heads_kv).float()
        scores, _ = block.scores(((q_i * options.sm_scale) @ k_j.mT).flatten(1, 2))
        m_new = torch.maximum(m_i, scores.amax(-1))
        m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)
        l_i = l_i * (m_i - m_safe).exp_() + (scores - m_safe.unsqueeze(-1)).exp_().sum(-1)
        m_i = m_new
    if options.sinks is not None:
        m_i, l_i, _ = _add_sinks(m_i, l_i, m_i.new_zeros((*m_i.shape, 1)), options.sinks)
    return m_i.masked_fill(m_i == -torch.inf, 0.0), l_i.masked_fill(l_i == 0, 1.0)


def _tiles(q: Tensor, k: Tensor, options: Options) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Slices of the batch and of the query rows, with the range of keys that the rows may see together."""
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_k = k.shape[1]
    width = heads_q * max(1, min(_BLOCK_K, seqlen_k))
    block_q = max(1, min(_BLOCK_Q, seqlen_q, SCORE_BUDGET // width))
    for items in blocks(0, batch, max(1, SCORE_BUDGET // (width * block_q))):
        for rows in blocks(0, seqlen_q, block_q):
            yield items, rows, options.kv_range(rows, seqlen_k)


def _grouped(x: Tensor, heads_kv: int) -> Tensor:
    """(b, s, h, d) as (b, heads_kv, h / heads_kv, s, d): query heads beside the key/value head they share."""
    grouped: Tensor = x.unflatten(2, (heads_kv, -1))
    return grouped.permute(0, 2, 3, 1, 4)


def _seen(x: Tensor, heads_kv: int, visible: Tensor | None, options: Options) -> Tensor:
    """A block of keys or values as (b, heads_kv, 1 or group, s, d) fp32, 0 where no row of the block sees it: 0 * NaN is NaN."""
    blocked = _grouped(x, heads_kv).float()
    if visible is None or not options.has_free_mask:
        return blocked  # causality and windows hide no key of a block's range from all of its rows
    seen = visible.any(-2).unsqueeze(-1)  # (b or 1, h or 1, n, 1)
    seen = seen.unflatten(1, (heads_kv, -1)) if seen.shape[1] != 1 else seen.unsqueeze(2)
    return torch.where(seen, blocked, 0.0)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """A (b, h, m, n) @ b (b, heads_kv, 1 or group, n, d) -> (b, h, m, d)."""
    product: Tensor = a.unflatten(1, (b.shape[1], -1)) @ b
    return product.flatten(1, 2)


def _grouped_sum(a: Tensor, b: Tensor, heads_kv: int) -> Tensor:
    """Sum over query heads of a^T @ b, a (b, h, m, n), b (b, h, m, d), as (b, n, heads_kv, d)."""
    product: Tensor = a.unflatten(1, (heads_kv, -1)).mT @ b.unflatten(1, (heads_kv, -1))
    return product.sum(2).transpose(1, 2)


def _delta(dout: Tensor | None, dlse: Tensor | None, out: Tensor, batch: slice, rows: slice) -> tuple[Tensor, Tensor]:
    """Dout (b, h, m, d) fp32 and rowsum(dout * out) - dlse as (b, h, m, 1)."""
    out_i = out[batch, rows].transpose(1, 2).float()
    dout_i = torch.zeros_like(out_i) if dout is None else dout[batch, rows].transpose(1, 2).float()
    delta = (dout_i * out_i).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[batch, :, rows].unsqueeze(-1)
    return dout_i, delta


def _add_sinks(m_i: Tensor, l_i: Tensor, acc: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more logit in every row's denominator."""
    logits = sinks.float().view(1, -1, 1)
    m_new = torch.maximum(m_i, logits)
    m_safe = m_new.masked_fill(m_new == -torch.inf, 0.0)
    alpha = (m_i - m_safe).exp()
    return m_new, l_i * alpha + (logits - m_safe).exp(), acc * alpha.unsqueeze(-1)


def gradient_sums(options: Options, bias_grad: bool, sinks_grad: bool) -> GradientSums:
    """Zeroed accumulators for the gradients that are wanted."""

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    return GradientSums(
        bias=zeros(options.bias) if bias_grad and options.bias is not None else None,
        sinks=zeros(options.sinks) if sinks_grad and options.sinks is not None else None,
        captured=[zeros(x) for x in options.captured],
    )
