"""Spots of a candidate's result on the tuned problem, held against the fp64 oracle after the timing.

Of a forward, blocks of rows. Of a backward all gradients of a head's group, since every row adds to every key; they are
computed once for all candidates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashgen import accuracy
from flashgen.accuracy import AccuracyReport
from flashgen.reference import (
    attention_low_precision,
    attention_oracle,
    exact,
    gradients_low_precision,
    gradients_oracle,
    same_precision,
)
from flashgen.tuner.case import Case

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.operands import Operands

_CHECKED_ROWS = 64
_HONEST_RUNS = 4
# Of one group of heads; where it has more, one group is looked at instead of two. About a second of an H100's fp64.
_MOST_SCORES = 1 << 32


def spot_check(case: Case) -> AccuracyReport:
    """Look at the first and the last (batch, head); their results must be there."""
    outputs = case.results()
    if not all(x.numel() for x in outputs):
        nothing = outputs[0].new_empty((0,))
        return accuracy.check(nothing, None, (nothing, None), (nothing, None), case.problem.dtype)
    if case.given is not None:
        return _with_options(case)
    return _gradients(case) if case.spec.op == "attention_bwd" else _rows(case)


def _tensors(case: Case) -> dict[str, Tensor]:
    return {name: one.tensor for name, one in {**case.inputs, **case.outputs}.items() if one is not None}


def _rows(case: Case) -> AccuracyReport:
    """Blocks at the start, in the middle and at the end."""
    import torch

    p, tensors = case.problem, _tensors(case)
    starts = sorted({0, max(0, p.seqlen_q // 2 - _CHECKED_ROWS), max(0, p.seqlen_q - _CHECKED_ROWS)})
    group = p.num_heads_q // p.num_heads_kv
    found: list[list[Tensor]] = [[], [], []]
    for batch, head in dict.fromkeys(((0, 0), (p.batch - 1, p.num_heads_q - 1))):
        keys = tuple(tensors[name][batch : batch + 1, :, head // group : head // group + 1] for name in "kv")
        for start in starts:
            rows = slice(start, start + _CHECKED_ROWS)
            options: dict[str, Any] = {
                "causal": p.causal,
                "sm_scale": p.scale,
                "causal_offset": p.causal_offset + start,
            }
            block = tensors["q"][batch : batch + 1, rows, head : head + 1]
            found[0].append(tensors["o"][batch : batch + 1, rows, head : head + 1])
            found[1].append(attention_oracle(block, *keys, **options)[0])
            found[2].append(attention_low_precision(block, *keys, **options)[0])
    out, oracle, low = (torch.cat(blocks, dim=1) for blocks in found)
    return accuracy.check(out, None, (oracle, None), (low, None), p.dtype)


def _with_options(case: Case) -> AccuracyReport:
    """The same blocks of rows of a problem with options: of the output, or backward of dq.

    A row's dq depends on no other row; those of keys and values do on all, and are held against the oracle on the small problems alone.
    """
    from flashgen import samples

    p, tensors, given = case.problem, _tensors(case), case.given
    assert given is not None
    backward = case.spec.op == "attention_bwd"
    starts = sorted({0, max(0, p.seqlen_q // 2 - _CHECKED_ROWS), max(0, p.seqlen_q - _CHECKED_ROWS)})
    group = p.num_heads_q // p.num_heads_kv
    places = [(b, h, start) for b, h in dict.fromkeys(((0, 0), (p.batch - 1, p.num_heads_q - 1))) for start in starts]
    if case.reference is None:
        case.reference = []
        for batch, head, start in places:
            rows = slice(start, start + _CHECKED_ROWS)
            q = tensors["q"][batch : batch + 1, rows, head : head + 1]
            keys = (tensors[name][batch : batch + 1, :, head // group : head // group + 1] for name in "kv")
            part = replace(
                samples.call(p, _part(given, batch, head, rows), q, *keys),
                first_batch=batch, first_head=head, first_row=start, whole=(p.num_heads_q, p.seqlen_q),
            )  # fmt: skip
            if backward:
                part = replace(part, dout=tensors["dout"][batch : batch + 1, rows, head : head + 1])
            oracle = exact(part, gradients=backward)
            honest = same_precision(part, runs=_HONEST_RUNS, gradients=backward)
            case.reference.append([one.gradients["q"] if backward else one.out for one in (oracle, *honest)])
    name = "dq" if backward else "o"
    found = [tensors[name][b : b + 1, start : start + _CHECKED_ROWS, h : h + 1] for b, h, start in places]
    out = _joined(found)
    oracle_out, unit, *others = (_joined(list(parts)) for parts in zip(*case.reference, strict=True))
    dtype = out.dtype
    return accuracy.check(
        out,
        None,
        (oracle_out, None),
        (unit.to(dtype), None),
        p.dtype,
        gradient=backward,
        others=[x.to(dtype) for x in others],
    )


def _part(given: Operands, batch: int, head: int, rows: slice) -> Operands:
    """The operands of some rows of one head."""

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        for dim, wanted in ((-2, rows), (-3, slice(head, head + 1)), (-4, slice(batch, batch + 1))):
            if x.dim() >= -dim and x.shape[dim] != 1:
                x = x.movedim(dim, 0)[wanted].movedim(0, dim)
        return x

    slopes = given.alibi_slopes
    return replace(
        given,
        alibi_slopes=None if slopes is None else slopes[..., head : head + 1],
        sinks=None if given.sinks is None else given.sinks[head : head + 1],
        bias=cut(given.bias),
        attn_mask=cut(given.attn_mask),
    )


def _joined(parts: list[Tensor]) -> Tensor:
    """Blocks of rows one after another."""
    import torch

    return torch.cat(parts, dim=1)


def _gradients(case: Case) -> AccuracyReport:
    """The gradients of whole groups of heads."""
    p, tensors = case.problem, _tensors(case)
    group = p.num_heads_q // p.num_heads_kv
    places = list(dict.fromkeys(((0, 0), (p.batch - 1, p.num_heads_kv - 1))))
    if group * p.seqlen_q * p.seqlen_k > _MOST_SCORES:
        places = places[:1]

    def part(name: str, batch: int, head: int) -> Tensor:
        tensor = tensors[name][batch : batch + 1]
        if name == "lse":
            return tensor[:, head * group : (head + 1) * group]
        width = 1 if name in ("k", "v", "dk", "dv") else group
        return tensor[:, :, head * width : (head + 1) * width]

    if case.reference is None:
        options: dict[str, Any] = {"causal": p.causal, "sm_scale": p.scale, "causal_offset": p.causal_offset}
        case.reference = []
        for place in places:
            dout, q, k, v, out, lse = (part(name, *place) for name in ("dout", "q", "k", "v", "out", "lse"))
            oracle = gradients_oracle(dout, q, k, v, **options)
            case.reference.append((oracle, gradients_low_precision(dout, q, k, v, out, lse, **options)))
    reports = []
    for place, (oracle, low) in zip(places, case.reference, strict=True):
        for name, true, honest in zip(("dq", "dk", "dv"), oracle, low, strict=True):
            report = accuracy.check(part(name, *place), None, (true, None), (honest, None), p.dtype, gradient=True)
            reports.append(replace(report, message=f"{name}: {report.message}"))
    return max(reports, key=lambda report: (not report.ok, report.ratio))
