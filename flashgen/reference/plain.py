"""Causal attention in fp64 and as an honest kernel computes it; blocked over query rows, so that long sequences fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Scores held at once, per (batch, key/value head): 32 MiB in fp64, whatever the lengths.
_MAX_SCORES = 1 << 22


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, causal_offset: int, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Exact attention: fp64 throughout, from the inputs as they were rounded.

    Keys and values that no query of their (batch, head) may see are not read, so they may hold anything.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), any float dtype, any strides.
        k: (batch, seqlen_k, num_heads_kv, head_dim); num_heads_q is a multiple of num_heads_kv.
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        causal: query i sees keys j <= i + causal_offset.
        causal_offset: seqlen_k - seqlen_q for bottom-right alignment, 0 for top-left; ignored unless causal.
        sm_scale: what scores are multiplied by.

    Returns:
        out (batch, seqlen_q, num_heads_q, head_dim_v) and lse (batch, num_heads_q, seqlen_q), natural logarithm, both
        fp64. A row that sees no key: 0 and -inf.

    """
    out, lse = _allocate(q, v, torch.float64, torch.float64)
    for rows in row_blocks(q, k, causal, causal_offset):
        q_rows, keys, values = (x.double() for x in rows.slice(q, k, v))
        scores = rows.mask((q_rows @ keys.mT) * sm_scale)
        weights, m, total = softmax_parts(scores)
        rows.store(out, lse, divide(weights @ values, total), m + torch.log(total))
    return out, lse


def attention_low_precision(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, causal_offset: int, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """What an honest flash kernel of the inputs' dtype computes, with one block of keys.

    Scores and softmax in fp32, P = exp(s - max) rounded to the input dtype, P·V accumulated in fp32, divided by the
    fp32 sum of the unrounded P, one rounding out. Its distance from `attention_oracle` is the unit of the budget.

    Args:
        q, k, v, causal, causal_offset, sm_scale: as in `attention_oracle`; q, k and v of one dtype.

    Returns:
        out in the input dtype and lse in fp32, shaped as in `attention_oracle`.

    """
    out, lse = _allocate(q, v, q.dtype, torch.float32)
    with full_fp32():
        for rows in row_blocks(q, k, causal, causal_offset):
            q_rows, keys, values = (x.float() for x in rows.slice(q, k, v))
            scores = rows.mask((q_rows @ keys.mT) * sm_scale)
            weights, m, total = softmax_parts(scores)
            rounded = weights.to(q.dtype).float()
            rows.store(out, lse, divide(rounded @ values, total).to(q.dtype), m + torch.log(total))
    return out, lse


def visible_keys(seqlen_q: int, seqlen_k: int, causal: bool, causal_offset: int) -> int:
    """How many leading keys at least one query may see; what lies behind them must never matter."""
    if seqlen_q == 0:
        return 0
    return min(max(seqlen_q + causal_offset, 0), seqlen_k) if causal else seqlen_k


class _Rows:
    """One block of query rows of one (batch, key/value head): all query heads of its group."""

    def __init__(
        self, batch: int, head_kv: int, group: int, start: int, stop: int, keys: int, offset: int | None
    ) -> None:
        self.batch, self.head_kv = batch, head_kv
        self.heads = slice(head_kv * group, (head_kv + 1) * group)
        self.rows = slice(start, stop)
        self.keys = keys
        self.offset = offset

    def slice(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (group, rows, head_dim), k (keys, head_dim), v (keys, head_dim_v)."""
        return self.of(q), self.keys_of(k), self.keys_of(v)

    def of(self, x: Tensor) -> Tensor:
        """These rows of a tensor like q, (group, rows, dim): a view."""
        return x[self.batch, self.rows, self.heads].transpose(0, 1)

    def keys_of(self, x: Tensor) -> Tensor:
        """The keys that some of these rows see, of a tensor like k, (keys, dim): a view."""
        return x[self.batch, : self.keys, self.head_kv]

    def mask(self, scores: Tensor) -> Tensor:
        """Hidden scores become -inf."""
        if self.offset is None:
            return scores
        i = torch.arange(self.rows.start, self.rows.stop, device=scores.device)[:, None]
        j = torch.arange(self.keys, device=scores.device)[None, :]
        return scores.masked_fill(j > i + self.offset, -torch.inf)

    def store(self, out: Tensor, lse: Tensor, out_rows: Tensor, lse_rows: Tensor) -> None:
        """Put (group, rows, head_dim_v) and (group, rows, 1) where they belong."""
        out[self.batch, self.rows, self.heads] = out_rows.transpose(0, 1)
        lse[self.batch, self.heads, self.rows] = lse_rows.squeeze(-1)


def row_blocks(q: Tensor, k: Tensor, causal: bool, causal_offset: int) -> Iterator[_Rows]:
    """The blocks that hold all rows which see a key, each once; keys that none of a block sees are left out of it."""
    batch, seqlen_q, num_heads_q, _ = q.shape
    _, seqlen_k, num_heads_kv, _ = k.shape
    group = num_heads_q // num_heads_kv
    step = max(1, _MAX_SCORES // max(1, group * seqlen_k))
    for b in range(batch):
        for h in range(num_heads_kv):
            for start in range(0, seqlen_q, step):
                stop = min(start + step, seqlen_q)
                # Keys behind the last visible one are cut off, not masked: 0 times their NaN would be NaN.
                keys = visible_keys(stop, seqlen_k, causal, causal_offset)
                if keys > 0:  # the outputs hold 0 and -inf already
                    yield _Rows(b, h, group, start, stop, keys, causal_offset if causal else None)


def _allocate(q: Tensor, v: Tensor, out_dtype: torch.dtype, lse_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, num_heads_q, _ = q.shape
    out = torch.zeros(batch, seqlen_q, num_heads_q, v.shape[-1], dtype=out_dtype, device=q.device)
    lse = torch.full((batch, num_heads_q, seqlen_q), -torch.inf, dtype=lse_dtype, device=q.device)
    return out, lse


def softmax_parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(s - m), the maximum m and the sum of each row; a row without a key has m = 0 and sum 0."""
    m = scores.amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    weights = torch.exp(scores - m)
    return weights, m, weights.sum(-1, keepdim=True)


def divide(accumulated: Tensor, total: Tensor) -> Tensor:
    """Accumulated / total; a row without a key, whose total is 0, stays 0."""
    return accumulated / total.masked_fill(total == 0, 1.0)


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Products in real fp32: a caller who allowed TF32 must not loosen the yardstick."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
