"""Free-form attention as `hopper_freeform.py` times it: eight kinds of mask or score, flashgen and FlexAttention on each, and who judges them.

Every kind is written as each library's users write it: flashgen's own option where it has one, FlexAttention's mask_mod and
score_mod, whose BlockMask is made outside of all times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashgen
from flashgen.dispatch import Plan
from flashgen.errors import UnsupportedProblemError
from flashgen.peers import BenchOp, Flashgen, Peer, Tensors
from flashgen.peers.base import BACKWARD_FLOPS, Call
from flashgen.peers.flex import Flex
from flashgen.peers.judge import Judge, _Part
from flashgen.problem import Problem
from flashgen.reference.plain import full_fp32

WINDOW, PREFIX, CAP, REACH = 1024, 512, 30.0, 6
TILE = 128  # of the tiles that are counted as touched; also FlexAttention's BLOCK_SIZE
_BLOCK_PAIRS = 1 << 25  # scores held at once

Visible = Callable[[Any, Any], Any]  # of q_idx and kv_idx


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One mask or score.

    Attributes:
        name: as the table says it.
        visible: (length, device) -> function of q_idx and kv_idx; elementwise, of tensors or of what a mod is traced with.
        options: (heads, device) -> flashgen's own options; with `mask_mod` as a marker where the mask is given as a function.
        by_mod: flashgen gets the mask as `mask_mod`.
        cap: softcap of the scores, 0 for none.
        alibi: adds -slope[h] * distance.
    """

    name: str
    visible: Callable[[int, Any], Visible]
    options: Callable[[int, Any], dict[str, Any]]
    by_mod: bool = False
    cap: float = 0.0
    alibi: bool = False


def slopes(heads: int, device: Any) -> Tensor:
    """ALiBi's, arXiv 2108.12409, section 3: 2^(-8/n), 2^(-16/n), ..."""
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)


@functools.cache
def document_lengths(length: int) -> tuple[int, ...]:
    """Documents of 32 tokens to a quarter of the sequence, spread evenly over the octaves, until it is full; the same everywhere."""
    generator, lengths, left = torch.Generator().manual_seed(length), [], length
    octaves = max(1.0, math.log2(length / 4) - 5.0)
    while left:
        drawn = int(2.0 ** (5.0 + octaves * torch.rand((), generator=generator).item()))
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return tuple(lengths)


@functools.cache
def documents(length: int, device: Any) -> Tensor:
    """The number of each token's document, int32."""
    counts = torch.tensor(document_lengths(length))
    return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts).to(device)


@functools.cache
def subtree_ends(length: int, device: Any) -> Tensor:
    """Of each token the end of what descends from it, int32: half a sequence is a prompt, the rest a tree of four children a node.

    Nodes stand in the order of a walk, so that a node's descendants follow it.
    """
    ends = torch.full((length,), length, dtype=torch.int32)

    def grow(first: int, count: int) -> None:
        ends[first] = first + count
        start, rest = first + 1, count - 1
        for child in range(4):
            share = (rest + 3 - child) // 4
            if share:
                grow(start, share)
                start += share

    grow(length // 2, length - length // 2)
    return ends.to(device)


def _causal(length: int, device: Any) -> Visible:
    return lambda i, j: j <= i


def _window(length: int, device: Any) -> Visible:
    return lambda i, j: (j <= i) & (i - j < WINDOW)


def _prefix(length: int, device: Any) -> Visible:
    return lambda i, j: (j < PREFIX) | (j <= i)


def _documents(length: int, device: Any) -> Visible:
    of = documents(length, device)
    return lambda i, j: (j <= i) & (of[i] == of[j])


def _tree(length: int, device: Any) -> Visible:
    ends = subtree_ends(length, device)
    return lambda i, j: (j <= i) & (i < ends[j])


def width(length: int) -> int:
    """Columns of an image of so many patches: square, or twice as wide as high."""
    return 1 << -(-(length.bit_length() - 1) // 2)


def _neighbourhood(length: int, device: Any) -> Visible:
    columns = width(length)
    return lambda i, j: ((i // columns - j // columns).abs() <= REACH) & ((i % columns - j % columns).abs() <= REACH)


def _nothing(heads: int, device: Any) -> dict[str, Any]:
    return {}


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name="causal", visible=_causal, options=lambda h, d: {"causal": True}),
        Kind(name="window", visible=_window, options=lambda h, d: {"causal": True, "window_size": (WINDOW - 1, 0)}),
        Kind(name="prefix", visible=_prefix, options=_nothing, by_mod=True),
        Kind(name="documents", visible=_documents, options=_nothing, by_mod=True),
        Kind(
            name="alibi",
            visible=_causal,
            options=lambda h, d: {"causal": True, "alibi_slopes": slopes(h, d)},
            alibi=True,
        ),
        Kind(name="softcap", visible=_causal, options=lambda h, d: {"causal": True, "softcap": CAP}, cap=CAP),
        Kind(name="tree", visible=_tree, options=_nothing, by_mod=True),
        Kind(name="neighbourhood", visible=_neighbourhood, options=_nothing, by_mod=True),
    )
}


@functools.cache
def counted(name: str, length: int) -> tuple[int, int]:
    """Visible pairs of one head, and pairs in tiles of TILE x TILE that hold a visible one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    visible, j = KINDS[name].visible(length, device), torch.arange(length, dtype=torch.int32, device=device)[None, :]
    pairs = touched = 0
    for start in range(0, length, TILE):
        i = torch.arange(start, min(start + TILE, length), dtype=torch.int32, device=device)[:, None]
        seen = visible(i, j)
        pairs += int(seen.sum())
        columns = seen.any(0)
        touched += TILE * TILE * sum(bool(x) for x in torch.stack([c.any() for c in columns.split(TILE)]).tolist())
    return pairs, touched


def mask_mod(kind: Kind, length: int, device: Any) -> Callable[..., Any]:
    """FlexAttention's mask_mod, which flashgen takes too."""
    visible = kind.visible(length, device)
    return lambda b, h, q_idx, kv_idx: visible(q_idx, kv_idx)


def score_mod(kind: Kind, heads: int, device: Any) -> Callable[..., Any] | None:
    """FlexAttention's score_mod; None for none."""
    if kind.alibi:
        slope = slopes(heads, device)
        return lambda score, b, h, q_idx, kv_idx: score - slope[h] * (q_idx - kv_idx)
    if kind.cap:
        return lambda score, b, h, q_idx, kv_idx: torch.tanh(score / kind.cap) * kind.cap
    return None


def flops(name: str, problem: Problem, op: BenchOp) -> float:
    """Of one call: products over visible pairs."""
    pairs = counted(name, problem.seqlen_q)[0]
    forward = 2.0 * problem.batch * problem.num_heads_q * pairs * (problem.head_dim + problem.head_dim_v)
    return forward * (1.0 if op == "attention_fwd" else BACKWARD_FLOPS)


# -- contestants --


class _Judged(Peer):
    """What flashgen and FlexAttention share: one kind, its operations, its judge."""

    kind: Kind

    def judge(self, problem: Problem, op: BenchOp, tensors: Tensors) -> Judge:
        return KindJudge(self.kind, problem, op, tensors)

    def flops(self, problem: Problem, op: BenchOp) -> float:
        return flops(self.kind.name, problem, op)


class Own(_Judged, Flashgen):
    """`flashgen.attention` with a kind's options."""

    def __init__(self, kind: Kind, backend: str = "auto", *, name: str | None = None) -> None:
        super().__init__(backend)
        self.kind, self.computes = kind, kind.name
        self.name = name or self.name

    def options(self, problem: Problem) -> dict[str, Any]:
        """Keywords of a call; made once a problem, as a model makes its mask once."""
        found = self.kind.options(problem.num_heads_q, problem.device)
        if self.kind.by_mod:
            found["mask_mod"] = mask_mod(self.kind, problem.seqlen_q, problem.device)
        return {**found, "backend": self.backend}

    def _plan(self, problem: Problem, op: BenchOp) -> Plan:
        gradient = op == "attention_bwd"
        q, k, v = (
            torch.empty(
                problem.batch, problem.seqlen_q, problem.num_heads_q, problem.head_dim,
                dtype=torch.bfloat16, device=problem.device, requires_grad=gradient,
            )
            for _ in range(3)
        )  # fmt: skip
        return flashgen.explain(q, k, v, **self.options(problem))

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        try:
            plan = self._plan(problem, op)
        except UnsupportedProblemError as error:
            return str(error)
        which = plan.backward if op == "attention_bwd" else plan
        if problem.device.startswith("cuda") and (which is None or which.backend == "torch"):
            return "no generated kernel takes it: the call falls to the torch backend"
        return None

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = self.options(problem)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = flashgen.attention(q, k, v, **options)  # type: ignore[assignment]  # no lse is asked for
            return out

        return run


class FlexKind(_Judged, Flex):
    """Compiled FlexAttention with a kind's mods.

    Args:
        kind: what is computed.
        tiles: head dim -> kernel_options, found by max-autotune on the causal kind; without one for its head dim a problem is autotuned.
    """

    def __init__(self, kind: Kind, tiles: dict[int, dict[str, Any]]) -> None:
        self.kind, self.computes, self._tiles = kind, kind.name, tiles

    def detail(self, problem: Problem, op: BenchOp) -> str:
        tile = self._tiles.get(problem.head_dim)
        if tile is None:
            return "max-autotune-no-cudagraphs"
        prefix = "fwd_" if op == "attention_fwd" else "bwd_"
        words = ", ".join(f"{name[4:]} {value}" for name, value in tile.items() if name.startswith(prefix))
        return words or "inductor's default tile"

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, device = problem.seqlen_q, problem.device
        torch.compiler.reset()  # what earlier problems left
        tile = self._tiles.get(problem.head_dim)
        gpu = device.startswith("cuda")
        mode = "max-autotune-no-cudagraphs" if gpu and tile is None else None
        compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
        keep = mask_mod(self.kind, length, device)
        options: dict[str, Any] = {
            "block_mask": create_block_mask(keep, None, None, length, length, device=device),
            "score_mod": score_mod(self.kind, problem.num_heads_q, device),
            "kernel_options": tile if gpu else None,
        }

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, **options)
            return out

        return run


def contestants(kind: Kind, tiles: dict[int, dict[str, Any]], names: tuple[str, ...]) -> list[Peer]:
    """The named ones; flashgen's plain causal kernel last, for its speed."""
    every: dict[str, Callable[[], Peer]] = {
        "flashgen": lambda: Own(kind),
        "flashgen-triton": lambda: Own(kind, "triton"),
        "flex": lambda: FlexKind(kind, tiles),
        "plain-causal": lambda: Own(KINDS["causal"], name="flashgen plain causal"),
    }
    return [
        make()
        for name, make in every.items()
        if name in names and not (name == "plain-causal" and kind.name == "causal")
    ]


# -- the reference --


class KindJudge(Judge):
    """`flashgen.peers.judge.Judge` for a kind: the same rows or heads, the same units, other scores."""

    def __init__(self, kind: Kind, problem: Problem, op: BenchOp, tensors: Tensors) -> None:
        super().__init__(problem, op, tensors)
        self._kind = kind
        self._visible = kind.visible(problem.seqlen_q, tensors.q.device)
        self._slopes = slopes(problem.num_heads_q, tensors.q.device)

    def _scores(self, raw: Tensor, heads: slice, start: int) -> tuple[Tensor, Tensor | float]:
        """Masked scores of (heads, rows, keys), and the derivative of the score by q.k * scale."""
        i = torch.arange(start, start + raw.shape[-2], device=raw.device, dtype=torch.int32)[:, None]
        j = torch.arange(raw.shape[-1], device=raw.device, dtype=torch.int32)[None, :]
        scores, derivative = raw, 1.0
        if self._kind.cap:
            bent = torch.tanh(raw / self._kind.cap)
            scores, derivative = bent * self._kind.cap, 1.0 - bent * bent  # type: ignore[assignment]
        if self._kind.alibi:
            scores = scores - self._slopes[heads].to(raw.dtype)[:, None, None] * (i - j)
        return scores.masked_fill(~self._visible(i, j), -torch.inf), derivative

    def _forward(self) -> Iterator[_Part]:
        t, p = self._tensors, self._problem
        group = p.num_heads_q // p.num_heads_kv
        keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (t.k, t.v))
        for start, stop in self._blocks():
            rows = t.q[:, start:stop].transpose(1, 2)
            oracle = self._rows(rows.double(), keys, values, start, None)
            with full_fp32():
                low = self._rows(rows.float(), keys, values, start, t.q.dtype).to(t.q.dtype)
            where = ((slice(None), slice(start, stop)),)
            yield _Part(where=where, oracle=[oracle.transpose(1, 2)], low=[low.transpose(1, 2)])

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, start: int, rounded_to: torch.dtype | None) -> Tensor:
        """Of (batch, heads, rows, dim), in q's dtype; probabilities rounded where a dtype says to what."""
        scores, _ = self._scores(q @ k.to(q.dtype).mT * self._problem.scale, slice(None), start)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))  # every kind lets a row see itself
        used = weights if rounded_to is None else weights.to(rounded_to).to(q.dtype)
        return used @ v.to(q.dtype) / weights.sum(-1, keepdim=True)

    def _backward(self) -> Iterator[_Part]:
        p, t = self._problem, self._tensors
        group = p.num_heads_q // p.num_heads_kv
        assert t.dout is not None  # a backward's inputs have one
        for batch, head in self._heads():
            heads = slice(head * group, (head + 1) * group)
            queries, keys = (batch, slice(None), heads), (batch, slice(None), head)
            parts = (t.q[queries], t.k[keys], t.v[keys], t.dout[queries])
            oracle = self._gradients(*parts, heads=heads, low=False)
            with full_fp32():
                low = self._gradients(*parts, heads=heads, low=True)
            yield _Part(where=(queries, keys, keys), oracle=oracle, low=low)

    def _gradients(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, heads: slice, low: bool) -> list[Tensor]:
        """As `flashgen.peers.judge.gradients`, with the derivative of the score."""
        dtype, work, scale = q.dtype, torch.float32 if low else torch.float64, self._problem.scale

        def rounded(x: Tensor) -> Tensor:
            return x.to(dtype).to(work) if low else x

        queries, grads = q.transpose(0, 1).to(work), dout.transpose(0, 1).to(work)
        keys, values = k.to(work), v.to(work)
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        step = max(1, _BLOCK_PAIRS // max(1, q.shape[1] * k.shape[0]))
        for start in range(0, q.shape[0], step):
            block = slice(start, min(start + step, q.shape[0]))
            scores, derivative = self._scores(queries[:, block] @ keys.mT * scale, heads, start)
            p = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
            out, do = rounded(rounded(p) @ values), grads[:, block]
            ds = p * (do @ values.mT - (out * do).sum(-1, keepdim=True)) * derivative
            dq[:, block] = rounded(ds) @ keys * scale
            dk += (rounded(ds).mT @ queries[:, block]).sum(0) * scale
            dv += (rounded(p).mT @ do).sum(0)
        found = [dq.transpose(0, 1), dk, dv]
        return [x.to(dtype) for x in found] if low else found


__all__ = ["KINDS", "TILE", "Call", "FlexKind", "Kind", "KindJudge", "Own", "contestants", "counted", "flops"]
