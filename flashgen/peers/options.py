"""Options in a comparison: what a problem names, drawn once and shared by all contestants, and results with it held to fp64.

The numbers of a problem (a window, a cap) are its own; biases, masks, slopes and sinks are drawn (`flashgen.samples`), so that a
peer that knows an option computes the same as flashgen. Gradients are those of q, k and v alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashgen import ops, samples
from flashgen.coverage import options_of
from flashgen.operands import Operands
from flashgen.peers.base import BenchOp, Tensors
from flashgen.peers.judge import Judge, _Part
from flashgen.problem import Problem
from flashgen.reference import Call, exact, same_precision

_SEED = 7  # of dropout
_ROWS_AT_ONCE = 512


class _Same:
    """A problem as a key: which options it has, and of what; not whose gradients are wanted."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._key = (problem.device, str(replace(problem, mods=None)), problem.mods and problem.mods.digest)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._key == other._key


@lru_cache(maxsize=2)
def _drawn(same: _Same) -> Operands:
    return samples.operands(same.problem, device=same.problem.device)


def drawn(problem: Problem) -> Operands:
    """The problem's options as tensors and functions, on its device."""
    plain = replace(problem, op="attention_fwd", requires_grad=False, return_lse=False, deterministic=False)
    return _drawn(_Same(plain))


def generator(problem: Problem) -> torch.Generator | None:
    """What dropout is to draw from, each call from its beginning."""
    return torch.Generator(problem.device).manual_seed(_SEED) if problem.dropout_p else None


def keywords(problem: Problem) -> dict[str, Any]:
    """The options as `flashgen.attention` takes them."""
    given = drawn(problem)
    names = ("alibi_slopes", "sinks", "bias", "attn_mask", "score_mod", "mask_mod")
    return {
        "window_size": problem.window_size,
        "softcap": problem.softcap,
        "dropout_p": problem.dropout_p,
        **{name: getattr(given, name) for name in names if getattr(given, name) is not None},
    }


def flex_mods(problem: Problem) -> tuple[Any, Any]:
    """score_mod and mask_mod that are the options, causality included; each None where there is nothing to do."""
    given, offset = drawn(problem), problem.causal_offset
    (left, right), cap = problem.window_size, problem.softcap
    shift = problem.seqlen_k - problem.seqlen_q

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = torch.tanh(s / cap) * cap if cap else s
        if given.score_mod is not None:
            s = given.score_mod(s, b, h, i, j)
        if given.alibi_slopes is not None:
            s = s - given.alibi_slopes[h] * (i + shift - j).abs()
        return s if given.bias is None else s + given.bias[0, h if given.bias.shape[1] > 1 else 0, i, j]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i + offset) if problem.causal else (j >= 0)
        seen = seen & (j >= i + offset - left) if left >= 0 else seen
        seen = seen & (j <= i + offset + right) if right >= 0 else seen
        seen = seen if given.attn_mask is None else seen & given.attn_mask[0, 0, i, j]
        return seen if given.mask_mod is None else seen & given.mask_mod(b, h, i, j)

    scores = cap or any(x is not None for x in (given.score_mod, given.alibi_slopes, given.bias))
    masks = (
        problem.causal or problem.window_size != (-1, -1) or given.attn_mask is not None or given.mask_mod is not None
    )
    return score if scores else None, mask if masks else None


def dense_mask(problem: Problem) -> Tensor | None:
    """Bias and boolean mask as SDPA's one argument; None where there is neither. Causality is in it, since SDPA takes no other beside."""
    given = drawn(problem)
    if given.bias is None and given.attn_mask is None:
        return None
    seen = given.attn_mask
    if problem.causal:
        i, j = (torch.arange(n, device=problem.device) for n in (problem.seqlen_q, problem.seqlen_k))
        diagonal = j[None, :] <= i[:, None] + problem.causal_offset
        seen = diagonal if seen is None else seen & diagonal
    if given.bias is None:
        return seen
    return given.bias if seen is None else given.bias.masked_fill(~seen, -torch.inf)


def visible_pairs(problem: Problem) -> int:
    """How many (query, key) pairs of one head are seen, over all masks; counted, some rows at a time."""
    p, given = problem, drawn(problem)
    q = torch.empty(1, 1, 1, 1, device=p.device)
    total = 0
    for start in range(0, p.seqlen_q, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, p.seqlen_q))
        part = q.expand(1, rows.stop - rows.start, 1, 1)
        total += int(_call(p, given, part, q.expand(1, p.seqlen_k, 1, 1), 0, slice(0, 1), rows).visible().sum())
    return total


def option_bytes(problem: Problem) -> int:
    """Of a bias or mask with an element for each pair, which a call reads."""
    given = drawn(problem)
    return sum(x.numel() * x.element_size() for x in (given.bias, given.attn_mask) if x is not None)


def _call(problem: Problem, given: Operands, q: Tensor, k: Tensor, batch: int, heads: slice, rows: slice) -> Call:
    """A part of the call for the references: some rows of some heads."""
    philox = None
    if problem.dropout_p:
        philox = ops.draw_philox(q, problem.dropout_p, generator(problem))
    whole = samples.call(problem, replace(given, philox=philox), q, k, k)
    bias, mask = given.bias, given.attn_mask
    if bias is not None:
        bias = (bias[:, heads] if bias.shape[1] > 1 else bias)[..., rows, :]
    return replace(
        whole,
        alibi=None if given.alibi_slopes is None else given.alibi_slopes[heads],
        sinks=None if given.sinks is None else given.sinks[heads],
        bias=bias,
        attn_mask=None if mask is None else mask[..., rows, :],
        first_batch=batch,
        first_head=heads.start,
        first_row=rows.start,
        whole=(problem.num_heads_q, problem.seqlen_q),
    )


class OptionsJudge(Judge):
    """`Judge` with options: the same rows or heads, by the references that know every option."""

    def _part(self, batch: int, head: int, rows: slice, *, gradient: bool) -> tuple[Call, tuple[Any, Any]]:
        p, t = self._problem, self._tensors
        group = p.num_heads_q // p.num_heads_kv
        heads, batches = slice(head * group, (head + 1) * group), slice(batch, batch + 1)
        queries, keys = (batches, rows, heads), (batches, slice(None), slice(head, head + 1))
        call = _call(p, drawn(p), t.q[queries], t.k[keys], batch, heads, rows)
        dout = t.dout[queries] if gradient and t.dout is not None else None
        return replace(call, v=t.v[keys], dout=dout), (queries, keys)

    def _forward(self) -> Iterator[_Part]:
        p = self._problem
        for batch in range(p.batch):
            for head in range(p.num_heads_kv):
                for start, stop in self._blocks():
                    call, (queries, _) = self._part(batch, head, slice(start, stop), gradient=False)
                    yield _Part(
                        where=(queries,),
                        oracle=[exact(call, gradients=False).out],
                        low=[same_precision(call, gradients=False)[0].out],
                    )

    def _backward(self) -> Iterator[_Part]:
        p = self._problem
        for batch, head in self._heads():
            call, (queries, keys) = self._part(batch, head, slice(0, p.seqlen_q), gradient=True)
            oracle, low = exact(call).gradients, same_precision(call)[0].gradients
            yield _Part(
                where=(queries, keys, keys),
                oracle=[oracle[name] for name in "qkv"],
                low=[low[name].to(self._tensors.q.dtype) for name in "qkv"],
            )


def has_options(problem: Problem) -> bool:
    """Whether a problem is more than full or causal attention."""
    return bool(options_of(problem.spec))


def judge_of(problem: Problem, op: BenchOp, tensors: Tensors) -> Judge:
    """The judge of a problem's own attention."""
    return (OptionsJudge if has_options(problem) else Judge)(problem, op, tensors)
