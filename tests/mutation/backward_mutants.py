"""Broken edits of the backward's templates, as (name, text that stands there once, what it becomes), and the checks that must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from problems import BR, FAR, TL, Row, far_gradients, row

from flashgen import interpret, render
from flashgen.errors import AccuracyError
from flashgen.gradients import make_gradient_buffers
from flashgen.variants import by_name

TEMPLATE = "triton/attention_bwd.py.jinja"
TILES = "triton/parts/load_tile.py.jinja"

K_SHAPE = "_, seqlen_k, num_heads_kv, _ = k.shape\n"
MASK_T = '["offs_n[:, None] <= (rows + causal_offset)[None, :]"]'
MASK = '["keys[None, :] <= (offs_m + causal_offset)[:, None]"]'
DS_T = "ds = p * (dp - delta[None, :])"
DS = "ds = p * (dp - delta[:, None])"
DV = 'dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")'
DK = 'dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")'
DQ = 'dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")'
ROW_BEGIN = "row_begin = tl.maximum(start_n - causal_offset, 0)"
FULL_BEGIN = "full_begin = tl.cdiv(tl.maximum(last_n - causal_offset, 0), BLOCK_M) * BLOCK_M"
KV_END = "kv_end = tl.minimum(seqlen_k, tl.maximum(last_m + causal_offset + 1, 0))"
FULL_END = "full_end = tl.minimum(kv_end, tl.maximum(start_m + causal_offset + 1, 0)) // BLOCK_N * BLOCK_N"
LOG2E = "qk_scale = sm_scale * 1.4426950408889634  # log2(e): exponentials are taken in base 2\n"
ROW_START = "row_start = (off_b * num_heads_q + off_h) * seqlen_q"
RAGGED = "tile = tl.load(ptrs, mask=live[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)"
STORED = "mask = live[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]"

MUTANTS: tuple[tuple[str, str, str], ...] = (
    # -- the formula --
    ("dk without delta", DS_T, "ds = p * dp"),
    ("dq without delta", DS, "ds = p * dp"),
    ("delta added instead of subtracted", DS_T, DS_T.replace("dp - delta", "dp + delta")),
    ("delta of out with itself", "delta = tl.sum(o * do, 1)", "delta = tl.sum(o * o, 1)"),
    ("dlse dropped", "delta -= dlse", "delta -= 0.0 * dlse"),
    ("dlse with the wrong sign", "delta -= dlse", "delta += dlse"),
    ("dk without the scale", "store_tile(dk_ptrs, dk * sm_scale,", "store_tile(dk_ptrs, dk,"),
    ("dq without the scale", "store_tile(dq_ptrs, dq * sm_scale,", "store_tile(dq_ptrs, dq,"),
    ("dk in the base of the scores", "store_tile(dk_ptrs, dk * sm_scale,", "store_tile(dk_ptrs, dk * qk_scale,"),
    ("dv from dS", DV, DV.replace("p.to", "(p * p).to")),
    ("dv from a transposed P", DV, DV.replace("p.to(do.dtype)", "tl.trans(p).to(do.dtype)")),
    ("dk from a transposed dS", DK, DK.replace("ds.to(q.dtype)", "tl.trans(ds).to(q.dtype)")),
    ("dk not accumulated", DK, DK.replace("q, dk,", "q, tl.zeros_like(dk),")),
    ("lse taken for base 2", 'float("inf"), lse * 1.4426950408889634)', 'float("inf"), lse)'),
    ("dk and dv in base e", f"{LOG2E}{{% endif %}}\n    # -- every", "qk_scale = sm_scale * 1.0\n{% endif %}\n    # -- every"),
    ("dq in base e", f"{LOG2E}{{% endif %}}\n{{% set whole", "qk_scale = sm_scale * 1.0\n{% endif %}\n{% set whole"),
    ("no guard against lse of -inf", 'tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)', "lse * 1.4426950408889634"),
    # -- heads --
    ("one head of the group", "tl.range(0, group)", "tl.range(0, 1)"),
    ("the wrong heads of the group", "off_h = off_hkv * group + member", "off_h = off_hkv + member * num_heads_kv"),
    ("rows of the wrong head", ROW_START, ROW_START.replace("num_heads_q", "num_heads_kv")),
    ("the wrong key/value head of dq", "off_h = off_bh % num_heads_q\n    off_hkv = (off_h // (num_heads_q // num_heads_kv))", "off_h = off_bh % num_heads_q\n    off_hkv = (off_h % num_heads_kv)"),
    # -- masks and ranges --
    ("dk and dv see one key too many", MASK_T, MASK_T.replace("causal_offset)", "causal_offset + 1)")),
    ("dk and dv hide the diagonal", MASK_T, MASK_T.replace("<=", "<")),
    ("dq sees one key too many", MASK, MASK.replace("causal_offset)", "causal_offset + 1)")),
    ("dq hides the diagonal", MASK, MASK.replace("<=", "<")),
    ("always top-left", K_SHAPE, f"{K_SHAPE}    causal_offset = 0\n"),
    ("always bottom-right", K_SHAPE, f"{K_SHAPE}    causal_offset = seqlen_k - seqlen_q\n"),
    ("row_begin one row late", ROW_BEGIN, ROW_BEGIN.replace("causal_offset", "causal_offset + 1")),
    ("full_begin not rounded to a block", FULL_BEGIN, "full_begin = tl.maximum(last_n - causal_offset, 0)"),
    ("full_begin of the block's first key", FULL_BEGIN, FULL_BEGIN.replace("last_n", "start_n")),
    ("keys that nobody sees are read", "seen_end = tl.minimum(seqlen_k, tl.maximum(seqlen_q + causal_offset, 0))", "seen_end = seqlen_k"),
    ("kv_end one key short", KV_END, KV_END.replace("causal_offset + 1", "causal_offset")),
    ("full_end not rounded to a block", FULL_END, FULL_END.removesuffix(" // BLOCK_N * BLOCK_N")),
    ("full_end not rounded, not causal", "full_end = kv_end // BLOCK_N * BLOCK_N", "full_end = kv_end"),
    ("dq's ragged tail of keys is seen", '["(keys < kv_end)[None, :]"]', '["(keys >= 0)[None, :]"]'),
    ("dq's ragged tail of keys is seen, causal", 'diagonal + ["(keys < kv_end)[None, :]"]', 'diagonal or ["(keys < kv_end)[None, :]"]'),
    ("rows that see no key are read", "live &= rows >= row_begin", "live &= rows >= 0"),
    ("rows beyond the end are read", "        # -- query --\n        live = rows < seqlen_q", "        live = rows >= 0"),
    # -- precision --
    ("dk rounded to the input dtype at each step", DK, f"{DK}.to(q.dtype).to(tl.float32)"),
    ("dq rounded to the input dtype at each step", DQ, f"{DQ}.to(k.dtype).to(tl.float32)"),
    # -- addresses --
    ("k's head stride for v", "off_hkv * stride_vh + n * stride_vn", "off_hkv * stride_kh + n * stride_vn"),
    ("q's row stride for dout", "first * stride_dom", "first * stride_qm"),
    ("out's row stride for dout", "rows * stride_dom", "rows * stride_om"),
    ("dk's row stride for dv", "n * stride_dvn", "n * stride_dkn"),
    ("q's row stride for dq", "m * stride_dqm", "m * stride_qm"),
    ("32-bit block offsets of rows", "first = tl.full([], start_m, tl.int64)", "first = start_m"),
    ("32-bit block offsets of keys", "first = tl.full([], start_n, tl.int64)", "first = start_n"),
    ("32-bit row offsets of dout", "do_offs = offs_m.to(tl.int64)[:, None]", "do_offs = offs_m[:, None]"),
    ("32-bit row offsets of out", "rows = offs_m.to(tl.int64)[:, None]", "rows = offs_m[:, None]"),
    ("32-bit key offsets of dk and dv", "n = offs_n.to(tl.int64)[:, None]", "n = offs_n[:, None]"),
    ("32-bit row offsets of dq", "m = offs_m.to(tl.int64)[:, None]", "m = offs_m[:, None]"),
)  # fmt: skip
TILE_MUTANTS: tuple[tuple[str, str, str], ...] = (
    ("padding columns read", RAGGED, RAGGED.replace(" & (offs_d < HEAD_DIM)[None, :]", "")),
    ("rows beyond the end read in a padded tile", RAGGED, RAGGED.replace("live[:, None] & ", "")),
    ("rows beyond the end read in a whole tile", "tile = tl.load(ptrs, mask=live[:, None], other=0.0)", "tile = tl.load(ptrs)"),
    ("padding columns read where every row is live", "tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)", "tile = tl.load(ptrs) + 0.0"),
    ("padding columns stored", STORED, "mask = live[:, None]"),
    ("rows beyond the end stored", STORED, STORED.replace("live[:, None] & ", "")),
)  # fmt: skip

# The least table that kills them all.
ROWS: tuple[Row, ...] = (
    row("", "fp16", 17, 21, 23, dv=20, causal=BR, heads=(4, 2), batch=2),
    row("", "fp16", 16, 20, 53, causal=TL, blocks=(16, 32)),
    row("", "bf16", 32, 50, 20, causal=BR, blocks=(16, 32)),
    row("", "fp32", 16, 35, 40, dv=33),
    row("", "bf16", 256, 150, 18),
    row("", "bf16", 256, 18, 150, values="low"),
    row("", "fp16", 16, 40, 20, causal=TL, values="low"),
    row("", "bf16", 16, 16, 900),  # dq is a sum of many steps
)


def launch(problem: Any, arguments: tuple[Any, ...], scalars: dict[str, Any], blocks: tuple[int, int]) -> None:
    """Run a backward with tiles of these blocks."""
    block_m, block_n = blocks
    knobs: dict[str, Any] = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_M_DQ": block_m, "BLOCK_N_DQ": block_n, "num_warps": 4, "num_stages": 1
    }  # fmt: skip
    source = render.render(problem.spec_for("attention_bwd"), by_name("triton_bwd"))
    interpret.launch_backward(source, *arguments, **scalars, **knobs)


def _run_row(case: Row) -> None:
    buffers = make_gradient_buffers(case.problem, seed=1, strides=case.strides, values=case.values)
    launch(case.problem, buffers.arguments, buffers.scalars, case.blocks)
    buffers.check().require(case.id)


def _run_far(tensor: str, where: str) -> None:
    buffers, tensors = far_gradients(where, tensor, "fp16")
    launch(buffers.problem, tuple(tensors.values()), buffers.scalars, FAR[where][-1])
    if tensor in buffers.outputs:
        buffers.outputs[tensor].copy_(tensors[tensor])  # type: ignore[arg-type]
    buffers.check().require(f"{tensor} by {where}")


def _run_infinite() -> None:
    """Scores of -inf throughout: out is 0, lse -inf, and no probability is left to differentiate."""
    buffers = make_gradient_buffers(row("", "fp32", 16, 9, 11).problem, seed=2, strides="dense")
    b = {name: x for name, x in buffers.inputs.items() if x is not None}
    b["q"][..., 0], b["k"][..., 0] = 1e30, -1e30  # overflows in the product
    b["out"].zero_(), b["lse"].fill_(-math.inf)  # type: ignore[func-returns-value]
    launch(buffers.problem, buffers.arguments, buffers.scalars, (16, 16))
    for name in ("dk", "dv"):
        if not torch.equal(buffers.outputs[name], torch.zeros_like(buffers.outputs[name])):
            raise AccuracyError(f"{name} is not zero where no key has a probability")


def _run_hidden() -> None:
    """NaN in a row that sees no key reaches nobody."""
    buffers = make_gradient_buffers(row("", "fp16", 16, 40, 20, causal=BR).problem, seed=5)
    wanted = buffers.references()
    for name in ("q", "dout"):
        buffers.inputs[name][:, :20] = math.nan  # type: ignore[index]
    launch(buffers.problem, buffers.arguments, buffers.scalars, (16, 16))
    for name in ("dk", "dv"):
        error = (buffers.outputs[name].double() - wanted[0].gradients[name[1:]]).abs().max().item()
        if not error < 0.05:
            raise AccuracyError(f"{name} is off by {error}")


CHECKS: dict[str, Callable[[], None]] = {
    **{f"backward-{case.id}": (lambda case=case: _run_row(case)) for case in ROWS},
    "backward-infinite": _run_infinite,
    "backward-hidden": _run_hidden,
    **{
        f"backward-far-{tensor}-{where}": (lambda where=where, tensor=tensor: _run_far(tensor, where))
        for tensor, where in (
            ("q", "block"), ("k", "block"), ("dout", "row"), ("out", "row"), ("dv", "row"), ("dq", "row")
        )
    },
}  # fmt: skip
