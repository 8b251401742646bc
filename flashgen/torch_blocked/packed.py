"""Packed sequences: the blocked loops once per sequence, on views; nothing is padded or copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from flashgen import checks
from flashgen.torch_blocked import blocked
from flashgen.torch_blocked.options import GradientSums, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where each sequence stands.

    Attributes:
        queries: per sequence, its slice of the packed queries.
        keys: per sequence, its slice of the packed keys, shortened to `seqused_k` where given.
        bottom_right: whether causal and window are shifted by each sequence's own Sk - Sq.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    bottom_right: bool

    @classmethod
    def make(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqused_k: Tensor | None,
        bottom_right: bool,
        *,
        totals: tuple[int, int],
        longest: tuple[int, int],
    ) -> Packing:
        """Read the offsets (a synchronisation on a GPU), and check what a GPU call could not check before.

        Args:
            cu_seqlens_q, cu_seqlens_k, seqused_k: as in `varlen_attention()`.
            bottom_right: see the attributes.
            totals: rows of q and of k.
            longest: max_seqlen_q and max_seqlen_k.

        Raises:
            InvalidProblemError: an offset or a length is out of range.
        """
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        used = None if seqused_k is None else seqused_k.tolist()
        checks.packing_values(ends_q, ends_k, used, totals, longest)
        keys = []
        for index, (start, stop) in enumerate(pairwise(ends_k)):
            keys.append(slice(start, stop if used is None else min(stop, start + used[index])))
        queries = tuple(slice(start, stop) for start, stop in pairwise(ends_q))
        return cls(queries=queries, keys=tuple(keys), bottom_right=bottom_right)

    def sequences(self, options: Options) -> Iterator[tuple[slice, slice, Options]]:
        """Per sequence: its queries, its keys, and the options as it sees them."""
        for index, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            shift = (keys.stop - keys.start) - (queries.stop - queries.start)
            yield (
                queries,
                keys,
                replace(
                    options,
                    first_batch=index,
                    offset=shift if self.bottom_right else 0,
                    alibi_shift=shift,
                    alibi=_of_sequence(options.alibi, index),
                    bias=corner(options.bias, index, queries, keys),
                    attn_mask=corner(options.attn_mask, index, queries, keys),
                ),
            )


def _of_sequence(slopes: Tensor | None, index: int) -> Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[index]


def corner(x: Tensor | None, index: int, queries: slice, keys: slice) -> Tensor | None:
    """One sequence's part of something broadcastable to (B, Hq, max_seqlen_q, max_seqlen_k): a view."""
    if x is None:
        return None
    for dim, start, length in ((-4, index, 1), (-2, 0, queries.stop - queries.start), (-1, 0, keys.stop - keys.start)):
        if x.dim() >= -dim and x.shape[dim] != 1:
            x = x.narrow(dim, start, length)
    return x


def forward(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options, out: Tensor, lse: Tensor | None
) -> None:
    """Blocked forward of packed (total, heads, dim) tensors into `out` and `lse` (num_heads_q, total_q)."""
    for queries, keys, local in packing.sequences(options):
        blocked.forward(
            q[None, queries],
            k[None, keys],
            v[None, keys],
            local,
            out[None, queries],
            None if lse is None else lse[None, :, queries],
        )


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing,
    options: Options,
    *,
    bias_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, GradientSums]:
    """Blocked backward of packed tensors; as `blocked.backward`."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    totals = blocked.gradient_sums(options, bias_grad, sinks_grad)
    for index, (queries, keys, local) in enumerate(packing.sequences(options)):
        dq_i, dk_i, dv_i, sums = blocked.backward(
            None if dout is None else dout[None, queries],
            None if dlse is None else dlse[None, :, queries],
            q[None, queries],
            k[None, keys],
            v[None, keys],
            out[None, queries],
            lse[None, :, queries],
            local,
            bias_grad=bias_grad,
            sinks_grad=sinks_grad,
        )
        dq[queries], dk[keys], dv[keys] = dq_i[0], dk_i[0], dv_i[0]
        if sums.bias is not None:
            part = corner(totals.bias, index, queries, keys)
            assert part is not None  # the sums of a sequence have a bias only where the totals have one
            part += sums.bias
        if totals.sinks is not None and sums.sinks is not None:
            totals.sinks += sums.sinks
        for total, grad in zip(totals.captured, sums.captured, strict=True):
            total += grad
    return dq, dk, dv, totals
