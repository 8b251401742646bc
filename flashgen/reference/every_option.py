"""Every option of `attention()` with its gradients, exactly and as an honest kernel computes them; for small sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flashgen.reference.philox import dropout_words
from flashgen.reference.plain import divide, full_fp32, softmax_parts

if TYPE_CHECKING:
    from torch import Tensor

# Head dims of one step of a product, as of one tensor-core instruction: the sum over steps is rounded to fp32 each time.
_STEP = 16

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
        first_batch, first_head, first_row: indices of the first sequence, head and query, which mods and dropout see.
        whole: (num_heads_q, seqlen_q) of the call that this is a part of; None where it is all of it.
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
    first_head: int = 0
    first_row: int = 0
    whole: tuple[int, int] | None = None
    dout: Tensor | None = None
    dlse: Tensor | None = None

    @property
    def indices(self) -> tuple[Tensor, ...]:
        """Int32 b, h, q_idx and kv_idx, shaped to broadcast to the scores."""
        batch, seqlen_q, heads, _ = self.q.shape
        sizes = (batch, heads, seqlen_q, self.k.shape[1])
        starts = (self.first_batch, self.first_head, self.first_row, 0)
        return tuple(
            torch.arange(start, start + size, dtype=torch.int32, device=self.q.device).view(
                [-1 if axis == dim else 1 for axis in range(4)]
            )
            for dim, (start, size) in enumerate(zip(starts, sizes, strict=True))
        )

    @property
    def shift(self) -> int:
        """By how much keys outnumber queries."""
        return self.k.shape[1] - (self.q.shape[1] if self.whole is None else self.whole[1])

    def visible(self) -> Tensor:
        """The whole mask, (batch, num_heads_q, seqlen_q, seqlen_k) bool."""
        b, h, i, j = self.indices
        diagonal = i + (0 if self.top_left else self.shift)
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
        """Everything between scale * q.k and the masks, in the order that the public functions promise."""
        b, h, i, j = self.indices
        s = torch.tanh(scaled / self.softcap) * self.softcap if self.softcap else scaled
        if self.score_mod is not None:
            s = self.score_mod(s, b, h, i, j, *captured)
        if self.alibi is not None:
            slopes = self.alibi.to(s.dtype)[..., None, None]
            s = s - slopes * (i + self.shift - j).abs()
        return s if bias is None else s + bias

    def kept(self) -> Tensor | float:
        """What dropout multiplies probabilities with: 0 or 1 / (1 - p)."""
        if not self.dropout_p:
            return 1.0
        b, h, i, j = (x.long().cpu().numpy() for x in self.indices)
        heads = self.q.shape[2] if self.whole is None else self.whole[0]
        words = dropout_words(self.philox, b * heads + h, i, j)
        keep = torch.from_numpy(words >= round(self.dropout_p * 2.0**32)).to(self.q.device)
        return keep.double() / (1.0 - self.dropout_p)

    def heads_first(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Bshd as (batch, num_heads_q, seqlen, dim): shared heads repeated, keys that nobody sees zeroed."""
        x = x.transpose(1, 2).repeat_interleave(self.q.shape[2] // x.shape[2], 1)
        return x if seen is None else torch.where(seen.any(2).unsqueeze(-1), x, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a reference gives.

    Attributes:
        out: (batch, seqlen_q, num_heads_q, head_dim_v).
        lse: (batch, num_heads_q, seqlen_q).
        gradients: by name: q, k, v (bshd), bias, sinks, captured0, captured1, ...; none where they were not asked for.
    """

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]


def exact(call: Call, *, gradients: bool = True) -> Result:
    """Every option in fp64, gradients by autograd; a row without a key gives 0, -inf (or the sink) and no gradient."""
    leaves = {name: x.detach().double().requires_grad_(gradients) for name, x in _leaves(call).items()}
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
    if not gradients:
        return Result(out=out, lse=lse, gradients={})
    loss = out.sum() * 0.0
    if call.dout is not None:
        loss = loss + (out * call.dout.double()).sum()
    if call.dlse is not None:
        loss = loss + (torch.where(dead[..., 0], 0.0, lse) * call.dlse.double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Result(out=out.detach(), lse=lse.detach(), gradients=dict(zip(leaves, grads, strict=True)))


def same_precision(call: Call, *, runs: int = 1, gradients: bool = True) -> tuple[Result, ...]:
    """What honest kernels of the inputs' dtype compute: the unit of the budget, forward and backward.

    S and softmax in fp32, P rounded to the input dtype, sums in fp32, one rounding out. Backward: S recomputed with the
    scale folded into q, so that its fp32 roundings are not the forward's; delta from the rounded output, P and dS rounded
    to the input dtype. The gradients are left in fp32, for packed sequences to be summed.

    Args:
        call: of q, k and v of one dtype.
        runs: how many. The first rounds to nearest. Each further one draws the errors of P, out and dS uniformly within
            half a unit in the last place, and that of every fp32 sum within the root of its number of steps of 16 terms
            (of scores, whose exponential shows it, in units of the terms where these cancel),
            as another order of sums or another running maximum would leave them (random rounding: Vignes, "A stochastic arithmetic
            for reliable scientific computation", 1993). Where few elements decide, the error of one run may be near 0
            by luck; of eight it is not.
        gradients: whether they are wanted; out and lse are the same without.

    Returns:
        One result per run.

    """
    with full_fp32():
        shared = _Shared(call)
        folded = _product(shared.q * call.sm_scale, shared.k) if gradients else None
        return tuple(_same_precision(shared, folded, _Rounding(call.q.dtype, seed)) for seed in range(runs))


class _Shared:
    """What all runs of a call have in common, computed once: most of the products.

    Attributes:
        q, k, v: heads first, in fp32; what nobody sees is zeroed.
        seen, kept: the mask, and what dropout multiplies with.
        scaled: products of q and k, times the scale.
        terms: what a score's terms amount to, whatever they leave: of terms in the thousands that cancel, a sum keeps their error.
        sink: broadcast to the rows.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.seen, self.kept = call.visible(), torch.as_tensor(call.kept()).float()
        self.q = q = call.heads_first(call.q.float())
        self.k, self.v = (call.heads_first(x.float(), self.seen) for x in (call.k, call.v))
        self.scaled = _product(q, self.k) * call.sm_scale
        self.terms = torch.sqrt(_product(q * q, self.k * self.k)) * abs(call.sm_scale)
        sink = call.q.new_full((q.shape[1],), -torch.inf).float() if call.sinks is None else call.sinks.float()
        self.sink = sink.view(1, -1, 1, 1).expand(*q.shape[:3], 1)


def _forward(shared: _Shared, rounding: _Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """Out before it is rounded, lse, and lse where a row without a key has 0."""
    head_dim, seqlen_k = shared.q.shape[3], shared.k.shape[2]
    raw = rounding.among(shared.scaled, shared.terms, head_dim)
    with torch.no_grad():
        s = rounding.sum(_scores(shared.call, raw)[0], head_dim)
    weights, m, total = softmax_parts(torch.cat([torch.where(shared.seen, s, -torch.inf), shared.sink], -1))
    summed = rounding.sum(rounding.input(weights[..., :-1] * shared.kept) @ shared.v, seqlen_k)
    lse = m + torch.log(total)
    return divide(summed, total), lse, torch.where(lse == -torch.inf, 0.0, lse)


def _same_precision(shared: _Shared, folded: Tensor | None, rounding: _Rounding) -> Result:
    """One run; `folded` are the products of the backward, whose q had the scale folded in, None where none is wanted."""
    unrounded, lse, safe = _forward(shared, rounding)
    gradients = {} if folded is None else _gradients(shared, folded, rounding, unrounded, safe)
    out = unrounded.to(shared.call.q.dtype).transpose(1, 2)
    return Result(out=out, lse=lse.squeeze(-1), gradients=gradients)


def _gradients(
    shared: _Shared, folded: Tensor, rounding: _Rounding, unrounded: Tensor, safe: Tensor
) -> dict[str, Tensor]:
    call, q, k, v, seen, kept = shared.call, shared.q, shared.k, shared.v, shared.seen, shared.kept
    dout = torch.zeros_like(unrounded) if call.dout is None else call.dout.float().transpose(1, 2)
    delta = rounding.sum((dout * rounding.input(unrounded)).sum(-1, keepdim=True), v.shape[3])
    if call.dlse is not None:
        delta = delta - call.dlse.float().unsqueeze(-1)
    live, raw, leaves = _scores(call, rounding.among(folded, shared.terms, q.shape[3]))
    p = torch.exp(torch.where(seen, rounding.sum(live.detach(), q.shape[3]), -torch.inf) - safe)
    dv = rounding.input(p * kept).mT @ dout
    dp = rounding.sum(dout @ v.mT, v.shape[3])
    ds = torch.where(seen, p * (dp * kept - delta), 0.0)
    draw, *others = torch.autograd.grad(live, [raw, *leaves.values()], ds, allow_unused=True, materialize_grads=True)
    draw = rounding.input(draw) * call.sm_scale
    scores, rows = seen.numel(), q.shape[2]
    gradients = {
        "q": rounding.sum((draw @ k).transpose(1, 2), k.shape[2]),
        "k": rounding.sum(_grouped_sum(draw.mT @ q, call.k.shape[2]), rows),
        "v": rounding.sum(_grouped_sum(dv, call.k.shape[2]), rows),
        **{name: rounding.sum(x, scores // max(1, x.numel())) for name, x in zip(leaves, others, strict=True)},
    }
    if call.sinks is not None:
        dsinks = -(torch.exp(shared.sink - safe) * delta).sum((0, 2, 3))
        gradients["sinks"] = rounding.sum(dsinks, q.shape[0] * rows)
    return gradients


class _Rounding:
    """To nearest for seed 0; else with errors drawn uniformly."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed) if seed else None  # of the CPU: the same everywhere
        self._other = torch.Generator().manual_seed(seed + 1_000_003)

    def input(self, x: Tensor) -> Tensor:
        """Rounded to the input dtype, as fp32."""
        return x.to(self.dtype).float() if self.generator is None else self._drawn(x, self.dtype)

    def sum(self, x: Tensor, terms: int) -> Tensor:
        """Fp32 sums of so many terms, every step of which was rounded; another order would round otherwise."""
        steps = max(1.0, terms / _STEP)
        return x if self.generator is None else self._drawn(x, torch.float32, math.sqrt(steps))

    def among(self, x: Tensor, terms: Tensor, count: int) -> Tensor:
        """Fp32 sums of so many terms that amount to `terms` on the way: where they cancel, the rounding of those stays."""
        if self.generator is None:
            return x
        units = math.sqrt(max(1.0, count / _STEP)) * torch.finfo(torch.float32).eps / 2
        drawn = torch.empty(x.shape).uniform_(-1.0, 1.0, generator=self._other).to(x.device).mul_(units)
        return drawn.mul_((terms - x.abs()).clamp_min_(0.0).nan_to_num_(0.0, 0.0, 0.0)).add_(x)

    def _drawn(self, x: Tensor, dtype: torch.dtype, units: float = 0.5) -> Tensor:
        info = torch.finfo(dtype)
        # The power of two below each number, by its bits: `frexp` and `ldexp` took most of a reference's time.
        unit = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        as_it_is = (unit == torch.inf).logical_or_(x == 0)
        unit.mul_(info.eps).clamp_min_(info.eps * info.tiny)
        if dtype == torch.float32:
            units = max(
                units, 1.0
            )  # in fp32 itself only whole units show: none in half of the cases, one up or down else
        drawn = torch.empty(x.shape).uniform_(-1.0, 1.0, generator=self.generator).to(x.device)
        return torch.where(as_it_is, x, drawn.mul_(units).mul_(unit).add_(x))


def _product(q: Tensor, k: Tensor) -> Tensor:
    """Q @ k^T, summed over the head dim in steps."""
    total = torch.zeros(*q.shape[:3], k.shape[2], device=q.device)
    for a, b in zip(q.split(_STEP, -1), k.split(_STEP, -1), strict=True):
        total += a @ b.mT
    return total


def _scores(call: Call, raw: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scores by raw = scale * q.k, with raw, bias and captured tensors as leaves of raw's dtype; nothing hidden."""
    raw = raw.detach().requires_grad_()
    leaves = {
        name: x.detach().to(raw.dtype).requires_grad_()
        for name, x in _leaves(call).items()
        if name not in ("q", "k", "v", "sinks")
    }
    captured = tuple(x for name, x in leaves.items() if name.startswith("captured"))
    s = call.modified(raw, leaves.get("bias"), captured).to(raw.dtype)
    return s.expand(raw.shape) + 0.0 * raw, raw, leaves  # a constant score_mod has a gradient, too: 0


def _leaves(call: Call) -> dict[str, Tensor]:
    named = {"q": call.q, "k": call.k, "v": call.v, "bias": call.bias, "sinks": call.sinks}
    named |= {f"captured{index}": x for index, x in enumerate(call.captured)}
    return {name: x for name, x in named.items() if x is not None}


def _grouped_sum(x: Tensor, heads_kv: int) -> Tensor:
    """(batch, num_heads_q, seqlen, dim) summed over query heads that share one: bshd."""
    summed: Tensor = x.unflatten(1, (heads_kv, -1)).sum(2)
    return summed.transpose(1, 2)
