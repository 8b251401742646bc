"""Whether a contestant computed attention at all: its result against fp64, before its time counts and after.

The unit is that of `flashgen.accuracy`. flashgen must stay inside its own budget; a peer, whose authors promise less, may
use twice of it, and what lies between is reported as loose. Large problems are judged on rows of every head (forward), on some
whole heads (backward), and everywhere on shape and finiteness.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flashgen import accuracy
from flashgen.accuracy import AccuracyReport
from flashgen.peers.base import BenchOp, Tensors
from flashgen.problem import Layout, Problem
from flashgen.reference import attention_low_precision, attention_oracle

PEER_SLACK = 2.0
_ALL_PAIRS = 1 << 24  # (query, key) pairs over batch and heads up to which everything is judged
_ROWS = 64
_BLOCK_PAIRS = 1 << 23  # scores held at once

Judgement = Literal["ok", "loose", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is judged of the results: one index, one exact and one low-precision tensor for each of them."""

    where: tuple[Any, ...]
    oracle: list[Tensor]
    low: list[Tensor]


class Judge:
    """Holds the reference of one copy of the inputs, in the layout bshd, made when it is first asked for."""

    def __init__(self, problem: Problem, op: BenchOp, tensors: Tensors) -> None:
        self._problem, self._op, self._tensors = problem, op, tensors
        pairs = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
        self._whole = pairs <= _ALL_PAIRS
        self._references: list[_Part] | None = None

    @property
    def coverage(self) -> str:
        """What is compared with the reference, in words."""
        if self._whole:
            return "every element"
        if self._op == "attention_fwd":
            return (
                f"{sum(stop - start for start, stop in self._blocks())} of {self._problem.seqlen_q} rows of every head"
            )
        return f"{len(self._heads())} of {self._problem.batch * self._problem.num_heads_kv} key/value heads and their queries"

    def judge(self, result: Any, layout: Layout, *, slack: float) -> tuple[Judgement, float, str]:
        """Compare a result with the reference.

        Args:
            result: out, or (dq, dk, dv).
            layout: of it.
            slack: how often the budget may be used.

        Returns:
            The judgement, the part of the budget used, and what is wrong (empty if nothing).
        """
        names = ("out",) if self._op == "attention_fwd" else ("dq", "dk", "dv")
        results = [result] if self._op == "attention_fwd" else list(result)
        for name, tensor, shape in zip(names, results, self._shapes(), strict=True):
            wanted = shape if layout == "bshd" else (shape[0], shape[2], shape[1], shape[3])
            if tuple(tensor.shape) != wanted:
                return "wrong", float("inf"), f"{name} has shape {tuple(tensor.shape)} instead of {wanted}"
            if not bool(torch.isfinite(tensor).all()):
                return "wrong", float("inf"), f"{name} holds NaN or infinity"
        if layout == "bhsd":
            results = [tensor.transpose(1, 2) for tensor in results]
        worst = max(self._reports(results), key=lambda pair: pair[1].ratio)
        name, ratio = worst[0], worst[1].ratio
        if ratio > slack:
            return "wrong", ratio, f"{name} uses {ratio:.3g} of the error budget ({worst[1].message})"
        if ratio > 1.0:
            return "loose", ratio, f"{name} uses {ratio:.3g} of flashgen's error budget"
        return "ok", ratio, ""

    def _shapes(self) -> list[tuple[int, ...]]:
        t = self._tensors
        if self._op == "attention_fwd":
            return [(*t.q.shape[:3], t.v.shape[3])]
        return [tuple(x.shape) for x in (t.q, t.k, t.v)]

    def _reports(self, results: list[Tensor]) -> Iterator[tuple[str, AccuracyReport]]:
        """One report per tensor, over all its judged parts together: the budget's unit is a maximum over all of them."""
        if self._references is None:
            self._references = list(self._forward() if self._op == "attention_fwd" else self._backward())
        names = ("out",) if self._op == "attention_fwd" else ("dq", "dk", "dv")
        for number, name in enumerate(names):
            parts = [results[number][part.where[number]] for part in self._references]
            exact = [part.oracle[number] for part in self._references]
            unit = [part.low[number] for part in self._references]
            flat, oracle, low = (torch.cat([x.flatten() for x in pieces]) for pieces in (parts, exact, unit))
            gradient = self._op == "attention_bwd"
            yield name, accuracy.check(flat, None, (oracle, None), (low, None), self._problem.dtype, gradient=gradient)

    # -- references --

    def _options(self) -> dict[str, Any]:
        return {"causal": self._problem.causal, "sm_scale": self._problem.scale}

    def _blocks(self) -> list[tuple[int, int]]:
        rows = self._problem.seqlen_q
        if self._whole or rows <= 3 * _ROWS:
            return [(0, rows)]
        middle = rows // 2 - _ROWS // 2 + 1  # no multiple of any tile
        return [(0, _ROWS), (middle, middle + _ROWS), (rows - _ROWS, rows)]

    def _heads(self) -> list[tuple[int, int]]:
        """(batch, key/value head): the first, the last, and between them as many as the work allows, evenly spread."""
        p = self._problem
        every = [(b, h) for b in range(p.batch) for h in range(p.num_heads_kv)]
        if self._whole or len(every) <= 2:
            return every
        each = p.num_heads_q // p.num_heads_kv * p.seqlen_q * p.seqlen_k
        count = min(len(every), max(2, _ALL_PAIRS // each))
        return [every[number * (len(every) - 1) // (count - 1)] for number in range(count)]

    def _forward(self) -> Iterator[_Part]:
        t = self._tensors
        for start, stop in self._blocks():
            # A row's result depends on no other row: a block of rows is a problem of its own with a moved diagonal.
            options = {**self._options(), "causal_offset": self._problem.causal_offset + start}
            q = t.q[:, start:stop]
            oracle = attention_oracle(q, t.k, t.v, **options)[0]
            low = attention_low_precision(q, t.k, t.v, **options)[0]
            yield _Part(where=((slice(None), slice(start, stop)),), oracle=[oracle], low=[low])

    def _backward(self) -> Iterator[_Part]:
        p, t = self._problem, self._tensors
        group = p.num_heads_q // p.num_heads_kv
        for batch, head in self._heads():
            assert t.dout is not None  # a backward's inputs have one
            queries = (batch, slice(None), slice(head * group, (head + 1) * group))
            keys = (batch, slice(None), head)
            parts = (t.q[queries], t.k[keys], t.v[keys], t.dout[queries])
            options = {**self._options(), "causal_offset": p.causal_offset}
            oracle, low = (gradients(*parts, low=which, **options) for which in (False, True))
            yield _Part(where=(queries, keys, keys), oracle=oracle, low=low)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    causal: bool,
    causal_offset: int,
    sm_scale: float,
    low: bool,
) -> list[Tensor]:
    """Gradients of one key/value head and its queries (FlashAttention-2, arXiv 2307.08691, algorithm 2, unblocked in the keys).

    Args:
        q: (seqlen_q, group, head_dim); dout likewise with head_dim_v.
        k: (seqlen_k, head_dim); v likewise with head_dim_v.
        dout: gradient of the output.
        causal, causal_offset, sm_scale: as in `reference.attention_oracle`.
        low: what an honest kernel of the inputs' dtype computes: delta from the rounded output, P and dS rounded to the
            dtype, products accumulated in fp32, one rounding out. Else fp64 throughout.

    Returns:
        dq, dk, dv, shaped as q, k and v.
    """
    dtype, work = q.dtype, torch.float32 if low else torch.float64

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(work) if low else x

    queries, grads = q.transpose(0, 1).to(work), dout.transpose(0, 1).to(work)
    keys, values = k.to(work), v.to(work)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    rows, columns = q.shape[0], torch.arange(k.shape[0], device=q.device)
    step = max(1, _BLOCK_PAIRS // max(1, q.shape[1] * k.shape[0]))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        s = queries[:, block] @ keys.mT * sm_scale
        if causal:
            i = torch.arange(block.start, block.stop, device=q.device)[:, None]
            s = s.masked_fill(columns > i + causal_offset, -torch.inf)
        lse = s.logsumexp(-1, keepdim=True)
        p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0))
        out, do = rounded(rounded(p) @ values), grads[:, block]
        ds = p * (do @ values.mT - (out * do).sum(-1, keepdim=True))
        dq[:, block] = rounded(ds) @ keys * sm_scale
        dk += (rounded(ds).mT @ queries[:, block]).sum(0) * sm_scale
        dv += (rounded(p).mT @ do).sum(0)
    found = [dq.transpose(0, 1), dk, dv]
    return [x.to(dtype) for x in found] if low else found
