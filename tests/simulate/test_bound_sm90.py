"""The Hopper forward without a maximum of each block (`parts/fwd_bound.py.jinja`), run by the simulator: rows whose scores are written down, key by key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import BR, Row, row
from test_attention_fwd_sm90 import H100, replace_knobs

from flashgen.accuracy import make_buffers
from flashgen.render import render
from flashgen.simulator import SCHEDULES, ptx, simulate
from flashgen.simulator.errors import UnsupportedOperationError
from flashgen.spec import AttentionSpec
from flashgen.variants.gluon_fwd_sm90 import GluonForwardSm90

KEYS, BLOCK_N, BLOCKS = 384, 32, 12


class Bounded(GluonForwardSm90):
    def bounds(self, spec: AttentionSpec) -> bool:
        return self.holds(spec)


BOUNDED = Bounded()


def kinds_of_rows() -> dict[str, torch.Tensor]:
    """Scores of a row in base 2 by block and key; blocks are met from the last to the first, here they stand as they are met."""
    flat = torch.zeros(BLOCKS, BLOCK_N)
    late, lane, overflow, low, falls, slow, steps, far, share, huge = (flat.clone() for _ in range(10))
    late[7] += 20.0  # more than fp16 holds, long after the last that a warp looked in
    lane[6, 5] = 12.0  # of one lane alone
    overflow[8, 3] = 300.0
    low[0] -= 900.0
    falls += -40.0 * torch.arange(BLOCKS)[:, None]
    slow += 0.4 * torch.arange(BLOCKS)[:, None]
    steps += 30.0 * torch.arange(BLOCKS)[:, None]
    far[6:] += 7.5  # nearly 2^8, held or not
    huge[0], huge[7, 7] = -3e30, 3e30
    total = torch.full((4,), BLOCK_N / 4)
    for block in range(1, BLOCKS):  # as high as a quarter of what a lane has summed, were it not for 2^8
        share[block] = torch.log2(0.97 * total[0] / 4).clamp(min=0)
        total = total + 2.0 ** share[block, 0] * BLOCK_N / 4
    wave = 6 * torch.sin(torch.arange(BLOCKS * BLOCK_N).float()).view(BLOCKS, BLOCK_N)
    return {
        "flat": flat, "late": late, "lane": lane, "overflow": overflow, "low": low, "falls": falls, "slow": slow, "steps": steps, "far": far,
        "share": share, "huge": huge, "wave": wave,
    }  # fmt: skip


KINDS = kinds_of_rows()


def case_of(dtype: str, dim: int, causal: Any = None, lse: bool = True) -> Row:
    return row("rows as written", dtype, dim, 64, KEYS, causal=causal, heads=(1, 1), scale=1.0, lse=lse)


def error(case: Row, text: str, kinds: list[str], schedule: Any = "random", **knobs: Any) -> float:
    """The largest error of the output where row r is of kind r modulo how many there are, and of lse."""
    problem = case.problem
    buffers = make_buffers(problem, seed=1)
    q, k, out = torch.zeros_like(buffers.q), torch.zeros_like(buffers.k), torch.empty_like(buffers.o)
    for i, kind in enumerate(kinds):
        q[0, i :: len(kinds), 0, i] = 1.0
        k[0, :, 0, i] = (KINDS[kind].flip(0).reshape(-1) * 0.6931471805599453).to(k.dtype)
    lse = torch.full_like(buffers.lse, torch.nan) if buffers.lse is not None else None
    config = replace_knobs(BOUNDED.default(problem.spec, H100), LAZY_SUM=True, BLOCK_N=BLOCK_N, **knobs)
    source = replace(render(problem.spec, BOUNDED), text=text)
    simulate(
        source, {"q": q, "k": k, "v": buffers.v, "o": out, "lse": lse, **buffers.scalars, **config}, schedule=schedule
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    if problem.spec.causal:
        seen = torch.ones_like(scores[0, 0]).tril(problem.causal_offset).bool()
        scores = scores.masked_fill(~seen, -torch.inf)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), buffers.v.double())
    worst = float((out.double() - wanted).abs().nan_to_num(torch.inf).max())
    if lse is not None:
        true = scores.logsumexp(-1)
        apart = (lse.double() - true).abs() / true.abs().clamp(min=1)
        worst = max(worst, float(apart.nan_to_num(torch.inf).max()) * 100)
    return worst


def text_of(case: Row) -> str:
    return render(case.problem.spec, BOUNDED).text


KINDS_OF = {"bf16": [*KINDS], "fp16": [kind for kind in KINDS if kind != "huge"]}  # beyond fp16


@pytest.mark.parametrize(("dim", "dtype"), [(64, "bf16"), (128, "fp16"), (256, "bf16")])
def test_rows_that_rise_late_in_one_lane_or_without_end(dim: int, dtype: str) -> None:
    """All kinds in a warp, and each alone: a warp of one kind looks when that kind has it look."""
    for turn, causal in enumerate((None, BR)):
        case = case_of(dtype, dim, causal, lse=turn == 1)
        assert error(case, text_of(case), KINDS_OF[dtype], SCHEDULES[turn]) < 0.02
    for turn, kind in enumerate(("late", "lane", "overflow") if dim == 64 else ()):
        assert error(case, text_of(case), [kind], SCHEDULES[turn % len(SCHEDULES)]) < 0.02, kind


# What it must not leave out: a text of the rendered kernel, what stands there instead, and kinds of rows that show it.
BROKEN = {
    "no warp looks": ('_ABOVE_SHARE.format(f"${largest}", f"${largest + 2}", "KEPT")', '_ABOVE_SHARE.format("ta", "tb", "KEPT")', ["overflow"]),
    "a lane looks for itself": ("setp.gt.or.f32 above, {1}, tb, above; vote.sync.any.pred above, above, 0xffffffff; ", "setp.gt.or.f32 above, {1}, tb, above; ", ["lane"]),
    "one row of two": ("setp.gt.or.f32 above, {1}, tb, above; ", "", [*KINDS_OF["fp16"]]),
    "any share of the sum": ("max.f32 t{0}, t{0}, 0f3F800000; min.f32 t{0}, t{0}, 0f43800000; ", "max.f32 t{0}, t{0}, 0f3F800000; ", ["share"]),
    "held whatever comes": ("min.f32 t{0}, t{0}, 0f43800000; ", "mov.f32 t{0}, 0f4F800000; ", ["late"]),
    "maxima of one lane": ("shfl.sync.bfly.b32 y{0}, x{0}, 2, 0x1f, 0xffffffff; ", "", ["lane"]),
    "references that fall": ("max.f32 x{0}, x{0}, {1}; sub.f32", "sub.f32", ["falls", "late"]),
    "sums of both": ("mov.f32 {one}, 0f00000000; ", "", ["late", "lane"]),
    "corrections forgotten": ("p, alpha, m_i, sums_p, lately = look_back(", "p, _, m_i, sums_p, lately = look_back(", ["late"]),
    "the first half of a row": ("few = gl.sum(gl.sum(p, 3)", "few = gl.sum(gl.sum(gl.where(lanes == lanes, p, 0.0) * 0.0, 3)", ["late"]),
    "looks first, relative to what was": ("return of_lane(references, m_i, BLOCK_N), of_lane(corrections", "return m_i, of_lane(corrections", ["steps"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_it_needs(name: str) -> None:
    old, new, kinds = BROKEN[name]
    found = []
    for dim in (64, 128):
        case = case_of("fp16", dim)
        text = text_of(case)
        assert text.count(old) >= 1
        try:
            found.append(error(case, text.replace(old, new), kinds))
        except UnsupportedOperationError as refusal:
            assert "part at" in str(refusal)
            found.append(torch.inf)
    assert min(found) > 0.05


def test_what_is_not_a_number_stays_in_its_row() -> None:
    case = case_of("bf16", 64)
    problem = case.problem
    outputs = []
    for variant in (BOUNDED, GluonForwardSm90()):
        buffers = make_buffers(problem, seed=2)
        buffers.q[0, 3], buffers.q[0, 20], buffers.q[0, 50] = torch.nan, torch.inf, -torch.inf
        buffers.k.copy_(buffers.k.abs() + 0.5)
        config = replace_knobs(variant.default(problem.spec, H100), LAZY_SUM=True, BLOCK_N=BLOCK_N)
        tensors = {name: getattr(buffers, name) for name in ("q", "k", "v", "o", "lse")}
        simulate(render(problem.spec, variant), {**tensors, **buffers.scalars, **config})
        outputs.append((buffers.o, buffers.lse))
    for bounded, held in zip(*outputs, strict=True):
        torch.testing.assert_close(bounded, held, rtol=2e-2, atol=2e-2, equal_nan=True)
    told = outputs[0][0].isnan().flatten(2).any(-1).nonzero()[:, 1].tolist()
    assert told == [3, 20, 50]


def test_texts_of_a_tile() -> None:
    """A warp jumps alone, what is not written is poison, the first operand is the upper half, and what is unknown is refused."""
    scores = np.zeros((64, 1, 4, 2), np.float32)
    scores[20, 0, 1, 1] = 3.0  # of the second warp, row b of a lane of its own: register 1
    text = (
        "{ .reg .pred some; setp.gt.f32 some, $9, 0f00000000; vote.sync.any.pred some, some, 0xffffffff; cvt.rn.bf16x2.f32 $0, $9, $8; "
        "@!some bra NONE; mov.f32 $4, 0f3F800000; NONE: }"
    )
    registers = ",".join(["=&r"] * 4 + ["=&f"] * 4 + ["f"] * 4)
    packed, told = ptx.run(text, registers, 1, scores)
    assert packed[20, 0, 1, 0] == 0x4040 << 16 and packed[20, 0, 0, 0] == 0 and packed[20, 0, 1, 1] == 0x5A5A5A5A
    assert (told[16:24, 0, :, 0] == 1).all() and np.isnan(told[:16]).all() and np.isnan(told[24:]).all()
    for old, new, why in (
        ("vote.sync.any.pred some, some, 0xffffffff; ", "", "part"),
        ("cvt.rn.bf16x2", "cvt.rz.bf16x2", "cvt.rz"),
        ("$9, $8", "$9, t", "reads t"),
    ):
        with pytest.raises(UnsupportedOperationError, match=why):
            ptx.run(text.replace(old, new), registers, 1, scores)
