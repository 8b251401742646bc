"""The oracle (fp64) and the honest low-precision run that the error budget of `accuracy.py` is derived from.

`attention_oracle` and `attention_low_precision` know causality alone and are blocked over query rows only, so that long
sequences fit in memory. `exact` and `same_precision` know every option of `attention()` and the backward, unblocked, for
small sizes. All take `(batch, seqlen, num_heads, head_dim)` tensors and are meant to be read: plain torch, one formula
per line, nothing of it shared with a backend. They are slow; never use them to compute attention, only to judge it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
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
    for rows in _row_blocks(q, k, causal, causal_offset):
        q_rows, keys, values = (x.double() for x in rows.slice(q, k, v))
        scores = rows.mask((q_rows @ keys.mT) * sm_scale)
        weights, m, total = _softmax_parts(scores)
        rows.store(out, lse, _divide(weights @ values, total), m + torch.log(total))
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
    with _full_fp32():
        for rows in _row_blocks(q, k, causal, causal_offset):
            q_rows, keys, values = (x.float() for x in rows.slice(q, k, v))
            scores = rows.mask((q_rows @ keys.mT) * sm_scale)
            weights, m, total = _softmax_parts(scores)
            rounded = weights.to(q.dtype).float()
            rows.store(out, lse, _divide(rounded @ values, total).to(q.dtype), m + torch.log(total))
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
        q_rows = q[self.batch, self.rows, self.heads].transpose(0, 1)
        return q_rows, k[self.batch, : self.keys, self.head_kv], v[self.batch, : self.keys, self.head_kv]

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


def _row_blocks(q: Tensor, k: Tensor, causal: bool, causal_offset: int) -> Iterator[_Rows]:
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


def _softmax_parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(s - m), the maximum m and the sum of each row; a row without a key has m = 0 and sum 0."""
    m = scores.amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    weights = torch.exp(scores - m)
    return weights, m, weights.sum(-1, keepdim=True)


def _divide(accumulated: Tensor, total: Tensor) -> Tensor:
    return accumulated / total.masked_fill(total == 0, 1.0)


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
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


# -- every option: unblocked, for small sizes --

Mod = Callable[..., "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call with every option of `attention()`, and the gradients that come back to it.

    Attributes:
        q, k, v: bshd, any float dtype; what no query of a (batch, head) may see is not read.
        sm_scale, causal, top_left, window, softcap: as in `attention()`.
        alibi, sinks, bias, attn_mask, mask_mod: as in `attention()`.
        score_mod: called with (score, b, h, q_idx, kv_idx, *captured).
        captured: tensors of score_mod whose gradients are wanted.
        dropout_p, philox: probability; seed and offset.
        first_batch: index of the first sequence, which mods and dropout see.
        dout, dlse: gradients of out (bshd) and of lse (batch, num_heads_q, seqlen_q); None for zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sm_scale: float
    causal: bool = False
    top_left: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    attn_mask: Tensor | None = None
    score_mod: Mod | None = None
    captured: tuple[Tensor, ...] = ()
    mask_mod: Mod | None = None
    dropout_p: float = 0.0
    philox: tuple[int, int] = (0, 0)
    first_batch: int = 0
    dout: Tensor | None = None
    dlse: Tensor | None = None

    @property
    def indices(self) -> tuple[Tensor, ...]:
        """Int32 b, h, q_idx and kv_idx, shaped to broadcast to the scores."""
        batch, seqlen_q, heads, _ = self.q.shape
        sizes = (batch, heads, seqlen_q, self.k.shape[1])
        starts = (self.first_batch, 0, 0, 0)
        return tuple(
            torch.arange(start, start + size, dtype=torch.int32).view([-1 if axis == dim else 1 for axis in range(4)])
            for dim, (start, size) in enumerate(zip(starts, sizes, strict=True))
        )

    def visible(self) -> Tensor:
        """The whole mask, (batch, num_heads_q, seqlen_q, seqlen_k) bool."""
        b, h, i, j = self.indices
        diagonal = i + (0 if self.top_left else self.k.shape[1] - self.q.shape[1])
        left, right = self.window
        seen = (b >= 0) & (h >= 0) & (i >= 0) & (j >= 0)
        if self.causal:
            seen = seen & (j <= diagonal)
        if left >= 0:
            seen = seen & (j >= diagonal - left)
        if right >= 0:
            seen = seen & (j <= diagonal + right)
        if self.attn_mask is not None:
            seen = seen & self.attn_mask
        return seen & self.mask_mod(b, h, i, j) if self.mask_mod is not None else seen

    def modified(self, scaled: Tensor, bias: Tensor | None, captured: tuple[Tensor, ...]) -> Tensor:
        """Everything between scale * q.k and the masks, in the order of the contract."""
        b, h, i, j = self.indices
        s = torch.tanh(scaled / self.softcap) * self.softcap if self.softcap else scaled
        if self.score_mod is not None:
            s = self.score_mod(s, b, h, i, j, *captured)
        if self.alibi is not None:
            slopes = self.alibi.to(s.dtype)[..., None, None]
            s = s - slopes * (i + self.k.shape[1] - self.q.shape[1] - j).abs()
        return s if bias is None else s + bias

    def kept(self) -> Tensor | float:
        """What dropout multiplies probabilities with: 0 or 1 / (1 - p)."""
        if not self.dropout_p:
            return 1.0
        b, h, i, j = (x.long().numpy() for x in self.indices)
        words = dropout_words(self.philox, b * self.q.shape[2] + h, i, j)
        keep = torch.from_numpy(words >= round(self.dropout_p * 2.0**32))
        return keep.double() / (1.0 - self.dropout_p)

    def heads_first(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Bshd as (batch, num_heads_q, seqlen, dim): shared heads repeated, keys that nobody sees zeroed."""
        x = x.transpose(1, 2).repeat_interleave(self.q.shape[2] // x.shape[2], 1)
        return x if seen is None else torch.where(seen.any(2).unsqueeze(-1), x, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """out, lse, and gradients by name: q, k, v, bias, sinks, captured0, captured1, ..."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]


def exact(call: Call) -> Result:
    """Every option in fp64, gradients by autograd; a row without a key gives 0, -inf (or the sink) and no gradient."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in _leaves(call).items()}
    captured = tuple(x for name, x in leaves.items() if name.startswith("captured"))
    seen = call.visible()
    q, k, v = call.heads_first(leaves["q"]), *(call.heads_first(leaves[name], seen) for name in "kv")
    s = call.modified(q @ k.mT * call.sm_scale, leaves.get("bias"), captured)
    s = torch.where(seen, s, -torch.inf)
    if "sinks" in leaves:
        s = torch.cat([s, leaves["sinks"].view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    dead = (s == -torch.inf).all(-1, keepdim=True)
    s = torch.cat([torch.where(dead, 0.0, s), torch.where(dead, 0.0, -torch.inf)], -1)  # never without an entry
    p = torch.where(dead, 0.0, s.softmax(-1))[..., : k.shape[2]]
    lse = torch.where(dead[..., 0], -torch.inf, s.logsumexp(-1))
    out = ((p * call.kept()) @ v).transpose(1, 2)
    loss = out.sum() * 0.0
    if call.dout is not None:
        loss = loss + (out * call.dout.double()).sum()
    if call.dlse is not None:
        loss = loss + (torch.where(dead[..., 0], 0.0, lse) * call.dlse.double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Result(out=out.detach(), lse=lse.detach(), gradients=dict(zip(leaves, grads, strict=True)))


def same_precision(call: Call) -> Result:
    """What an honest kernel of the inputs' dtype computes: the unit of the budget, forward and backward.

    Backward: delta from the rounded output, P and dS rounded to the input dtype, sums in fp32. The gradients are left
    in fp32, for packed sequences to be summed.
    """
    dtype = call.q.dtype
    with _full_fp32():
        seen = call.visible()
        q, k, v = call.heads_first(call.q.float()), *(call.heads_first(x.float(), seen) for x in (call.k, call.v))
        raw = (q @ k.mT * call.sm_scale).requires_grad_()
        leaves = {name: x.detach().float().requires_grad_() for name, x in _leaves(call).items() if name not in "qkv"}
        captured = tuple(x for name, x in leaves.items() if name.startswith("captured"))
        live = (
            call.modified(raw, leaves.get("bias"), captured).float().expand(raw.shape) + 0.0 * raw
        )  # a constant score_mod, too
        s = torch.where(seen, live.detach(), -torch.inf)
        sink = call.q.new_full((q.shape[1],), -torch.inf).float() if call.sinks is None else call.sinks.float()
        sink = sink.view(1, -1, 1, 1).expand(*s.shape[:3], 1)
        weights, m, total = _softmax_parts(torch.cat([s, sink], -1))
        kept = torch.as_tensor(call.kept()).float()
        out = _divide(((weights[..., :-1] * kept).to(dtype).float() @ v), total).to(dtype)
        lse = m + torch.log(total)

        # Backward.
        dout = torch.zeros_like(out).float() if call.dout is None else call.dout.float().transpose(1, 2)
        delta = (dout * out.float()).sum(-1, keepdim=True)
        if call.dlse is not None:
            delta = delta - call.dlse.float().unsqueeze(-1)
        safe = torch.where(lse == -torch.inf, 0.0, lse)
        p = torch.exp(s - safe)
        dv = (p * kept).to(dtype).float().mT @ dout
        ds = p * ((dout @ v.mT) * kept - delta)
        inputs = [raw, *(x for name, x in leaves.items() if name != "sinks")]
        draw, *others = torch.autograd.grad(
            live, inputs, torch.where(seen, ds, 0.0), allow_unused=True, materialize_grads=True
        )
        draw = draw.to(dtype).float() * call.sm_scale
    gradients = {
        "q": (draw @ k).transpose(1, 2),
        "k": _grouped_sum(draw.mT @ q, call.k.shape[2]),
        "v": _grouped_sum(dv, call.k.shape[2]),
        **dict(zip((name for name in leaves if name != "sinks"), others, strict=True)),
    }
    if call.sinks is not None:
        gradients["sinks"] = -(torch.exp(sink - safe) * delta).sum((0, 2, 3))
    return Result(out=out.transpose(1, 2), lse=lse.squeeze(-1), gradients=gradients)


def _leaves(call: Call) -> dict[str, Tensor]:
    named = {"q": call.q, "k": call.k, "v": call.v, "bias": call.bias, "sinks": call.sinks}
    named |= {f"captured{index}": x for index, x in enumerate(call.captured)}
    return {name: x for name, x in named.items() if x is not None}


def _grouped_sum(x: Tensor, heads_kv: int) -> Tensor:
    """(batch, num_heads_q, seqlen, dim) summed over query heads that share one: bshd."""
    summed: Tensor = x.unflatten(1, (heads_kv, -1)).sum(2)
    return summed.transpose(1, 2)


def dropout_words(
    philox: tuple[int, int], heads: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]
) -> NDArray[Any]:
    """Philox4x32-10's word of every element (b * num_heads_q + h, i, j), from the definition; uint64, below 2^32.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. An element is kept when its word is at least
    round(p * 2^32). Four elements share one call: {i, i + 8} x {j, j + 8} of a 16 x 16 square.
    """
    low = np.uint64(0xFFFFFFFF)
    c = [columns // 16 * 8 + columns % 8, rows // 16 * 8 + rows % 8, heads, np.int64(philox[1])]
    x0, x1, x2, x3 = (np.asarray(x).astype(np.uint64) & low for x in c)
    key0, key1 = philox[0] & 0xFFFFFFFF, philox[0] >> 32 & 0xFFFFFFFF
    for step in range(10):
        k0 = np.uint64((key0 + step * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key1 + step * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (b >> np.uint64(32)) ^ x1 ^ k0, b & low, (a >> np.uint64(32)) ^ x3 ^ k1, a & low
    number = rows // 8 % 2 * 2 + columns // 8 % 2
    return np.choose(number, np.broadcast_arrays(x0, x1, x2, x3))
