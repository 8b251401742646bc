"""What happens to a score between q.k and the softmax, and its derivative: every option of `attention()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashgen.problem import not_built
from flashgen.torch_blocked.philox import keep_block

Mod = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one call over `bshd` tensors, in the form the blocks need them.

    Attributes:
        sm_scale: factor of q.k.
        causal: query i sees keys j <= i + offset.
        offset: the alignment's shift d, of causal and window.
        window: (left, right): i + d - left <= j <= i + d + right; -1 for no limit.
        softcap: s <- softcap * tanh(s / softcap); 0 for none.
        alibi: slopes (Hq,) or (B, Hq) fp32.
        alibi_shift: Sk - Sq of the distance |i + Sk - Sq - j|.
        sinks: (Hq,) logits that join the denominator.
        bias: broadcastable to (B, Hq, Sq, Sk).
        attn_mask: bool, broadcastable to (B, Hq, Sq, Sk), True = may attend.
        score_mod, mask_mod: FlexAttention's signatures, elementwise.
        block_mask: torch's BlockMask.
        block_mod: its mask_mod, elementwise.
        dropout_p: probability of dropping.
        philox: (2,) int64 seed and offset.
        first_batch: index of the first sequence (packed sequences run one at a time).
        captured: tensors that score_mod reads and that want gradients.
    """

    sm_scale: float
    causal: bool = False
    offset: int = 0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Tensor | None = None
    alibi_shift: int = 0
    sinks: Tensor | None = None
    bias: Tensor | None = None
    attn_mask: Tensor | None = None
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    block_mask: Any = None
    block_mod: Mod | None = None
    dropout_p: float = 0.0
    philox: Tensor | None = None
    first_batch: int = 0
    captured: tuple[Tensor, ...] = field(default=())

    def kv_range(self, rows: slice, seqlen_k: int) -> tuple[int, int]:
        """The keys that rows may see by causality and window alone: [start, stop)."""
        left, right = self.window
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        start = max(0, first - left) if left >= 0 else 0
        stop = min(seqlen_k, last + right + 1) if right >= 0 else seqlen_k
        if self.causal:
            stop = min(stop, last + 1)
        return min(start, seqlen_k), max(min(start, seqlen_k), stop)

    @property
    def has_free_mask(self) -> bool:
        """Whether a mask other than causal and window may hide keys."""
        return self.attn_mask is not None or self.mask_mod is not None or self.block_mask is not None


@dataclass(frozen=True, slots=True)
class Block:
    """One step: a slice of the batch, of the query rows and of the keys, and index tensors shaped to broadcast.

    `kept` remembers dropout's mask, which the backward needs twice.
    """

    options: Options
    batch: slice
    rows: slice
    keys: slice
    num_heads: int
    device: torch.device
    kept: list[Tensor] = field(default_factory=list)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, q_idx, kv_idx as int32 of shapes (b,1,1,1), (1,h,1,1), (1,1,m,1), (1,1,1,n)."""
        first = self.options.first_batch
        ranges = (
            (self.batch.start + first, self.batch.stop + first),
            (0, self.num_heads),
            (self.rows.start, self.rows.stop),
            (self.keys.start, self.keys.stop),
        )
        shapes = ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
        b, h, i, j = (
            torch.arange(*ends, device=self.device, dtype=torch.int32).view(shape)
            for ends, shape in zip(ranges, shapes, strict=True)
        )
        return b, h, i, j

    def cut(self, x: Tensor) -> Tensor:
        """The block's part of something broadcastable to (B, Hq, Sq, Sk), right-aligned."""
        for dim, part in ((-1, self.keys), (-2, self.rows), (-4, self.batch)):
            if x.dim() >= -dim and x.shape[dim] != 1:
                x = x.narrow(dim, part.start, part.stop - part.start)
        return _four(x)

    # -- forward --

    def scores(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scores with -inf where hidden, visible or None where all is) from raw = scale * q.k, (b, h, m, n) fp32."""
        s = self._biased(self._modified(self._capped(raw)))
        visible = self.visible()
        return (s if visible is None else s.masked_fill(~visible, -torch.inf)), visible

    def visible(self) -> Tensor | None:
        """Which (b, h, i, j) are visible, broadcastable to the block; None where all are."""
        o = self.options
        parts: list[Tensor] = []
        d, (left, right) = o.offset, o.window
        b, h, i, j = self.indices()
        if o.causal and self.keys.stop - 1 > self.rows.start + d:
            parts.append(j <= i + d)
        if left >= 0 and self.keys.start < self.rows.stop - 1 + d - left:
            parts.append(j >= i + d - left)
        if right >= 0 and self.keys.stop - 1 > self.rows.start + d + right:
            parts.append(j <= i + d + right)
        if o.attn_mask is not None:
            parts.append(self.cut(o.attn_mask))
        if o.mask_mod is not None:
            parts.append(_four(o.mask_mod(*self.indices()).to(self.device)))  # its own, to write into
        if o.block_mask is not None:
            parts.append(_block_mask_visible(o.block_mask, b - o.first_batch, h, i, j, o.block_mod))
        if not parts:
            return None
        visible = parts[0]
        for part in parts[1:]:
            visible = visible & part
        return visible

    def dropped(self, p: Tensor) -> Tensor:
        """P with dropout applied: 0 where dropped, p / (1 - dropout_p) where kept."""
        o = self.options
        if o.philox is None:
            return p
        if not self.kept:
            b, h = (x.long() for x in self.indices()[:2])
            i, j = self.rows, self.keys
            self.kept.append(keep_block(o.philox.to(self.device), o.dropout_p, b * self.num_heads + h, i, j))
        keep = self.kept[0]
        return p.masked_fill(~keep, 0.0) / (1.0 - o.dropout_p)

    # -- backward --

    def raw_gradient(self, raw: Tensor, ds: Tensor, sums: GradientSums) -> Tensor:
        """The gradient of raw from that of the scores; gradients of bias and captured tensors go into `sums`."""
        o = self.options
        if sums.bias is not None and o.bias is not None:
            _add_reduced(self.cut(sums.bias), ds)
        if o.score_mod is not None:
            if torch._C._functorch.is_functorch_wrapped_tensor(raw):
                raise not_built("a torch.func transform of flashgen.attention with score_mod")
            # One that was computed from another would hand its gradient on, and autograd will do so itself.
            own = [one if one.is_leaf else one.detach().requires_grad_() for one in o.captured]
            computed = not all(one.is_leaf for one in o.captured)
            with torch.enable_grad(), _InPlaceOf(o.captured, own) if computed else nullcontext():
                x = self._capped(raw).detach().requires_grad_()
                y = self._modified(x)
            inputs = [x, *own]
            if y.requires_grad:
                grads = torch.autograd.grad(y, inputs, ds, allow_unused=True)
                ds = torch.zeros_like(ds) if grads[0] is None else grads[0]
                for total, grad in zip(sums.captured, grads[1:], strict=True):
                    if grad is not None:
                        total += grad
            else:
                ds = torch.zeros_like(ds)
        if o.softcap:
            ds = ds * (1.0 - torch.tanh(raw / o.softcap).square())
        return ds

    # -- the steps --

    def _capped(self, raw: Tensor) -> Tensor:
        cap = self.options.softcap
        return cap * torch.tanh(raw / cap) if cap else raw

    def _modified(self, s: Tensor) -> Tensor:
        mod = self.options.score_mod
        if mod is None:
            return s
        # A clone: a mod may write into its arguments (`score += ...`), and the raw scores are wanted again.
        return mod(s.clone(), *self.indices()).float().expand(s.shape)

    def _biased(self, s: Tensor) -> Tensor:
        o = self.options
        if o.alibi is not None:
            _, _, i, j = self.indices()
            slopes = o.alibi.float()
            slopes = (
                slopes.view(1, -1, 1, 1) if slopes.dim() == 1 else slopes[self.batch].view(-1, slopes.shape[1], 1, 1)
            )
            s = s - slopes * (i + o.alibi_shift - j).abs()
        if o.bias is not None:
            s = s + self.cut(o.bias).float()
        return s


@dataclass(slots=True)
class GradientSums:
    """fp32 accumulators of what is summed over blocks; None where nobody wants it."""

    bias: Tensor | None
    sinks: Tensor | None
    captured: list[Tensor]


def _four(x: Tensor) -> Tensor:
    """Something that broadcasts to (b, h, m, n), with all four dimensions."""
    return x.view((1,) * (4 - x.dim()) + tuple(x.shape)) if x.dim() < 4 else x


class _InPlaceOf(TorchFunctionMode):
    """Calls of a mod on captured tensors, as calls on others."""

    def __init__(self, captured: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._others = {id(x): other for x, other in zip(captured, others, strict=True) if x is not other}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._instead(tuple(args)), **self._instead(kwargs or {}))

    def _instead(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._others.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(map(self._instead, value))
        return {name: self._instead(one) for name, one in value.items()} if type(value) is dict else value


def _add_reduced(total: Tensor, x: Tensor) -> None:
    """Total += x summed over the dimensions that total broadcasts."""
    dims = [dim for dim in range(4) if total.shape[dim] == 1 and x.shape[dim] != 1]
    total += x.sum(dims, keepdim=True) if dims else x  # sum([]) would sum everything


def _block_mask_visible(mask: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, mod: Mod | None = None) -> Tensor:
    """A BlockMask as given: listed blocks only, its mask_mod inside the partial ones."""
    size_q, size_k = mask.BLOCK_SIZE
    partial = _listed(mask.kv_num_blocks, mask.kv_indices, b, h, i // size_q, j // size_k)
    inside = _four((mod or mask.mask_mod)(*(x.clone() for x in (b, h, i, j))).to(i.device))
    visible = partial & inside
    if mask.full_kv_num_blocks is not None:
        visible = visible | _listed(mask.full_kv_num_blocks, mask.full_kv_indices, b, h, i // size_q, j // size_k)
    return visible


def _listed(counts: Tensor, lists: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Whether block (row, column) stands among the first counts[b, h, row] entries of lists[b, h, row]."""
    b, h = (x if size != 1 else torch.zeros_like(x) for x, size in zip((b, h), counts.shape[:2], strict=True))
    rows = torch.arange(int(row.min()), int(row.max()) + 1, device=row.device).view(1, 1, -1, 1)
    listed = lists[b, h, rows].squeeze(3)  # (b, h, rows, listed)
    valid = torch.arange(lists.shape[-1], device=row.device) < counts[b, h, rows].squeeze(3).unsqueeze(-1)
    dense = torch.zeros((*listed.shape[:3], int(column.max()) + 1 + 1), dtype=torch.bool, device=row.device)
    last = dense.shape[-1] - 1
    dense.scatter_(3, torch.where(valid & (listed < last), listed, last).long(), True)
    dense[..., last] = False
    return dense[:, :, (row - rows.view(-1)[0]).flatten().long()][..., column.flatten().long()]


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """[start, stop) in slices of at most `size`."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
