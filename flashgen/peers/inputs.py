"""The inputs of a comparison: several copies of different N(0,1) values, so that calls in rotation find cold caches."""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.accuracy import TORCH_DTYPES
from flashgen.bench.environment import cache_bytes, free_bytes
from flashgen.peers.base import BenchOp, Tensors
from flashgen.problem import Layout, Problem

_MOST_COPIES = 128
_MEMORY_SHARE = 0.2  # of what is free, for the inputs in one layout


class Inputs:
    """Copies of q, k, v (and dout), handed out in either layout with the same values.

    Attributes:
        copies: how many there are; at least 2.
        bytes_each: of one copy.
        cache_bytes: of the cache that they are to overflow.
    """

    def __init__(
        self,
        problem: Problem,
        op: BenchOp,
        *,
        seed: int = 0,
        cache: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.problem, self.op, self._seed = problem, op, seed
        rows_q = problem.batch * problem.seqlen_q * problem.num_heads_q
        dout = rows_q * problem.head_dim_v * problem.spec.itemsize if op == "attention_bwd" else 0
        # io_bytes counts q, k, v and the output, which every call writes besides: the output is no part of a copy.
        out = rows_q * problem.head_dim_v * problem.spec.itemsize
        self.bytes_each = problem.io_bytes - out + dout
        self.cache_bytes = cache_bytes(problem.device) if cache is None else cache
        room = int(free_bytes(problem.device) * _MEMORY_SHARE) if memory is None else memory
        # When a copy's turn comes again, all others were touched since: they alone must be twice the cache.
        wanted = 1 + -(-2 * self.cache_bytes // max(1, self.bytes_each))
        self.copies = max(2, min(wanted, _MOST_COPIES, room // max(1, self.bytes_each)))
        self._made: dict[Layout, list[Tensors]] = {}

    @property
    def overflows(self) -> bool:
        """Whether the other copies alone are larger than the cache: else memory or their number bounded them."""
        return (self.copies - 1) * self.bytes_each > self.cache_bytes

    def of(self, layout: Layout) -> list[Tensors]:
        """All copies in one layout, contiguous."""
        if layout not in self._made:
            self._made[layout] = [self._draw(number, layout) for number in range(self.copies)]
        return self._made[layout]

    def _draw(self, number: int, layout: Layout) -> Tensors:
        p = self.problem
        generator = torch.Generator(p.device).manual_seed(1_000_003 * self._seed + number)

        def normal(seqlen: int, heads: int, dim: int) -> Tensor:
            shape = (p.batch, seqlen, heads, dim)
            # Drawn in one layout and one order whatever is asked for: the values of a copy are the same in both.
            drawn = torch.randn(shape, generator=generator, device=p.device).to(TORCH_DTYPES[p.dtype])
            return drawn if layout == "bshd" else drawn.transpose(1, 2).contiguous()

        return Tensors(
            q=normal(p.seqlen_q, p.num_heads_q, p.head_dim),
            k=normal(p.seqlen_k, p.num_heads_kv, p.head_dim),
            v=normal(p.seqlen_k, p.num_heads_kv, p.head_dim_v),
            dout=normal(p.seqlen_q, p.num_heads_q, p.head_dim_v) if self.op == "attention_bwd" else None,
        )
