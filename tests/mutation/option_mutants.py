"""Broken edits of what options add to the portable forward: (name, text that stands there once, what it becomes, check that notices)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from cases import Case
from judge import judge

from flashgen.errors import AccuracyError

FORWARD = "triton/attention_fwd.py.jinja"
LAUNCH = "triton/parts/launch_fwd.py.jinja"
DROPOUT = "triton/parts/dropout.py.jinja"
PACKING = "triton/parts/packing.py.jinja"
SOFTCAP = "triton/parts/softcap.py.jinja"
BACKWARD = "triton/attention_bwd.py.jinja"

_WIDE = {
    "backend": "triton", "dtype": "fp16", "batch": 2, "seqlen_q": 37, "seqlen_k": 71, "heads_kv": 2, "group": 2,
    "head_dim": 16, "head_dim_v": 16, "lse": True, "tile": (16, 16), "seed": 3,
}  # fmt: skip
_PACKED = {
    **_WIDE,
    "batch": 1,
    "lengths": ((13, 30, 17), (0, 5, 5), (40, 3, 0), (7, 19, 3)),
    "seqused": True,
    "causal": True,
}

CASES: dict[str, Case] = {
    "window": Case(**{**_WIDE, "window": (20, 9)}),
    "narrow window": Case(**{**_WIDE, "window": (3, 2), "tile": (16, 32)}),
    "causal window": Case(**{**_WIDE, "window": (9, 9), "causal": True}),
    "one-sided window": Case(**{**_WIDE, "window": (-1, 4)}),
    "softcap": Case(**{**_WIDE, "softcap": 0.5}),
    "softcap, fp32": Case(**{**_WIDE, "softcap": 1000.0, "dtype": "fp32"}),
    "strong softcap, fp32": Case(**{**_WIDE, "softcap": 2.0, "dtype": "fp32"}),
    "alibi": Case(**{**_WIDE, "alibi": "bh", "causal": False}),
    "sinks": Case(**{**_WIDE, "sinks": True, "seqlen_q": 80, "causal": True}),
    "sinks, fp32": Case(**{**_WIDE, "sinks": True, "dtype": "fp32", "scale": 0.7}),
    "bias": Case(**{**_WIDE, "bias": "bhij"}),
    "bias of -inf": Case(**{**_WIDE, "bias": "bhi1", "bias_inf": True}),
    "softcap, then bias": Case(**{**_WIDE, "bias": "1h1j", "softcap": 0.5}),
    "attn_mask": Case(**{**_WIDE, "attn_mask": "bhij"}),
    "attn_mask of columns": Case(**{**_WIDE, "attn_mask": "b11j"}),
    "mask_mod": Case(**{**_WIDE, "mask_mod": "document", "seqlen_q": 75, "tile": (16, 32)}),
    "mask_mod, ragged": Case(**{**_WIDE, "mask_mod": "document"}),
    "mask_mod of columns": Case(**{**_WIDE, "mask_mod": "columns", "group": 1}),
    "score_mod": Case(**{**_WIDE, "score_mod": "table"}),
    "score_mod and softcap": Case(**{**_WIDE, "score_mod": "squared", "softcap": 0.5}),
    "dropout": Case(**{**_WIDE, "dropout_p": 0.3, "tile": (32, 16)}),
    "gradients, window": Case(**{**_WIDE, "grad": True, "window": (20, 9), "softcap": 0.5, "alibi": "bh"}),
    "gradients, narrow window": Case(**{**_WIDE, "grad": True, "window": (2, 1), "seqlen_q": 75, "seqlen_k": 40}),
    "gradients, attn_mask": Case(**{**_WIDE, "grad": True, "attn_mask": "b11j", "window": (-1, 9)}),
    "gradients, rows of a mask": Case(**{**_WIDE, "grad": True, "attn_mask": "11i1", "causal": True}),
    "gradients, dropout": Case(**{**_WIDE, "grad": True, "dropout_p": 0.3, "sinks": True}),
    "packed": Case(**_PACKED),
    "packed, top-left": Case(**{**_PACKED, "top_left": True, "seqused": False}),
    "packed, everything": Case(**{**_PACKED, "alibi": "bh", "bias": "bhij", "sinks": True, "dropout_p": 0.4, "window": (9, 2)}),
}  # fmt: skip

LEFT = "(offs_m + causal_offset - window_left)[:, None]"
RIGHT = "(offs_m + causal_offset + window_right)[:, None]"
KV_START = "kv_start = tl.maximum(start_m + causal_offset - window_left, 0)"
KV_END = "kv_end = tl.minimum(seqlen_k, tl.maximum(last_m + causal_offset + window_right + 1, 0))"
FULL_END = "tl.maximum(start_m + causal_offset + window_right + 1, 0)) // BLOCK_N * BLOCK_N"
FULL_START = "full_start = tl.cdiv(tl.maximum(last_m + causal_offset - window_left, 0), BLOCK_N) * BLOCK_N"
IN_RANGE = "in_range = (start_n + offs_n >= kv_start) & (start_n + offs_n < kv_end)"
MOD_FULL = (
    "full_start = tl.maximum(tl.maximum(full_start, tl.load(ranges + 1) * BLOCK_N), first_block)\n"
    "        full_end = tl.minimum(full_end, tl.load(ranges + 2) * BLOCK_N)\n"
)
CAPPED = "return softcap * tl.where(x < 0.0, -y, y)"
SINK = "l_i = l_i * alpha + tl.exp2(sink - m_safe)"

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    ("the window shows one key too many on the left", LEFT, LEFT.replace("window_left", "window_left - 1"), FORWARD, "window"),
    ("the window hides its first key", LEFT, LEFT.replace("window_left", "window_left + 1"), FORWARD, "narrow window"),
    ("the window shows one key too many on the right", RIGHT, RIGHT.replace("window_right", "window_right + 1"), FORWARD, "window"),
    ("kv_start one key late", KV_START, KV_START.replace("window_left", "window_left + 1"), FORWARD, "window"),
    ("kv_start ignored", IN_RANGE, "in_range = start_n + offs_n < kv_end", FORWARD, "window"),
    ("the window's kv_end one key short", KV_END, KV_END.replace("window_right + 1", "window_right"), FORWARD, "narrow window"),
    ("the window's full_end of the last row", FULL_END, FULL_END.replace("start_m", "last_m"), FORWARD, "window"),
    ("full_start of the first row", FULL_START, FULL_START.replace("last_m", "start_m"), FORWARD, "window"),
    ("full_start rounded down", FULL_START, "full_start = tl.maximum(last_m + causal_offset - window_left, 0) // BLOCK_N * BLOCK_N", FORWARD, "window"),
    ("a causal window looks ahead", "    window_right = 0\n", "    window_right = max(window_right, 0)\n", LAUNCH, "causal window"),
    ("no limit taken for 0", "window_left = widest if window_left < 0 else", "window_left = 0 if window_left < 0 else", LAUNCH, "one-sided window"),
    ("softcap without its factor", CAPPED, "return tl.where(x < 0.0, -y, y)", SOFTCAP, "softcap"),
    ("softcap of unscaled scores", "{% if spec.modifies_scores %}\n        qk *= sm_scale\n", "{% if spec.has_bias %}\n        qk *= sm_scale\n", FORWARD, "softcap"),
    ("an even tanh", CAPPED, "return softcap * y", SOFTCAP, "softcap"),
    ("the series far from 0", "tl.abs(x) < 0.3", "tl.abs(x) < 1.5", SOFTCAP, "strong softcap, fp32"),
    ("no series near 0", "tl.abs(x) < 0.3", "tl.abs(x) < 0.0", SOFTCAP, "softcap, fp32"),
    ("ALiBi in front of the diagonal is a bonus", "slope * tl.abs(distance).to(tl.float32)", "slope * distance.to(tl.float32)", FORWARD, "alibi"),
    ("ALiBi from the top left", "distance = (offs_m + seqlen_k - seqlen_q)", "distance = (offs_m)", FORWARD, "alibi"),
    ("ALiBi of the first sequence", "alibi_slopes_ptr + off_b * stride_alibi_b", "alibi_slopes_ptr", FORWARD, "alibi"),
    ("the sink missing in the denominator", SINK, "l_i = l_i * alpha", FORWARD, "sinks"),
    ("the sink in base e", "sink = tl.load(sinks_ptr + off_h * stride_sinks).to(tl.float32) * 1.4426950408889634", "sink = tl.load(sinks_ptr + off_h * stride_sinks).to(tl.float32)", FORWARD, "sinks"),
    ("the sink of the key/value head", "sinks_ptr + off_h *", "sinks_ptr + off_hkv *", FORWARD, "sinks"),
    ("values not rescaled for the sink", "    acc = acc * alpha[:, None]\n    m_i = m_new", "    m_i = m_new", FORWARD, "sinks"),
    ("the sink beside an unscaled maximum", "    m_i *= qk_scale\n", "", FORWARD, "sinks, fp32"),
    ("operands of the first sequence", "off_b.to(tl.int64) * stride_{{ name }}_b + ", "", FORWARD, "bias"),
    ("operands of the first head", " + off_h.to(tl.int64) * stride_{{ name }}_h\n", "\n", FORWARD, "attn_mask"),
    ("the bias of the first keys", "bias_rows + (first + offs_n)[None, :]", "bias_rows + (offs_n)[None, :]", FORWARD, "bias"),
    ("rows that a bias leaves without a key", "online_softmax(qk, m_i, l_i, qk_scale, IS_MASKED=True)", "online_softmax(qk, m_i, l_i, qk_scale, IS_MASKED)", FORWARD, "bias of -inf"),
    ("softcap after the bias", "        qk += tl.load(bias_ptrs, mask=bias_mask, other=0.0).to(tl.float32)\n", "        qk += tl.load(bias_ptrs, mask=bias_mask, other=0.0).to(tl.float32)\n        qk = soft_cap(qk, softcap)\n", FORWARD, "softcap, then bias"),
    ("attn_mask inverted", "mask=inside, other=0) != 0", "mask=inside, other=0) == 0", FORWARD, "attn_mask"),
    ("values that a mask hides from all", "> 0\n        v = tl.where(seen[:, None], v, 0.0)", "> 0\n        v = v + 0.0", FORWARD, "attn_mask of columns"),
    ("mask_mod's first block too late", "tl.maximum(first_block, tl.load(ranges) * BLOCK_N)", "tl.maximum(first_block, (tl.load(ranges) + 1) * BLOCK_N)", FORWARD, "mask_mod"),
    ("mask_mod's last block forgotten", "tl.minimum(kv_end, tl.load(ranges + 3) * BLOCK_N)", "tl.minimum(kv_end, (tl.load(ranges + 3) - 1) * BLOCK_N)", FORWARD, "mask_mod"),
    ("blocks that mask_mod hides in part taken for whole ones", MOD_FULL, "full_start = first_block\n        full_end = tl.minimum(full_end, tl.load(ranges + 3) * BLOCK_N)\n", FORWARD, "mask_mod of columns"),
    ("the ranges of the first block of queries", "start_m // BLOCK_M * 4", "0", FORWARD, "mask_mod"),
    ("rows beyond the end see keys", "visible &= (offs_m < seqlen_q)[:, None]", "visible &= (offs_m >= 0)[:, None]", FORWARD, "mask_mod, ragged"),
    ("mask_mod not evaluated", "            visible &= {{ mask.result }}\n", "", FORWARD, "mask_mod of columns"),
    ("score_mod of the key/value head", "    h = off_h\n", "    h = off_hkv.to(tl.int32)\n", FORWARD, "score_mod"),
    ("score_mod before softcap", "        qk = {{ score.result }}\n", "        qk = soft_cap({{ score.result }}, softcap)\n", FORWARD, "score_mod and softcap"),
    ("dropout without its factor", "acc = acc * dropout_scale", "acc = acc * 1.0", FORWARD, "dropout"),
    ("dropout shifted by a key", "start_n // 2 + tl.arange", "start_n // 2 + 1 + tl.arange", DROPOUT, "dropout"),
    ("dropout transposed", "(w2 >= least).to(tl.int8))\n    lower = tl.join((w1", "(w1 >= least).to(tl.int8))\n    lower = tl.join((w2", DROPOUT, "dropout"),
    ("the same dropout in every head", "off_bh.to(tl.uint32) + zero", "zero", DROPOUT, "dropout"),
    ("dropout without the offset", "offset.to(tl.uint32) + zero", "zero", DROPOUT, "dropout"),
    ("dk and dv see one key too many on the left", ">= (rows + causal_offset - window_left)[None, :]", ">= (rows + causal_offset - window_left - 1)[None, :]", BACKWARD, "gradients, window"),
    ("dq sees one key too many on the left", ">= (offs_m + causal_offset - window_left)[:, None]", ">= (offs_m + causal_offset - window_left - 1)[:, None]", BACKWARD, "gradients, window"),
    ("row_end one row short", "last_n - causal_offset + window_left + 1", "last_n - causal_offset + window_left", BACKWARD, "gradients, narrow window"),
    ("keys before every window are read", "in_range = (offs_n >= seen_begin) & (offs_n < seen_end)", "in_range = offs_n < seqlen_k", BACKWARD, "gradients, window"),
    ("dk of a cap without its derivative", "        ds = p * (dp - delta[None, :])\n{% if spec.softcap %}", "        ds = p * (dp - delta[None, :])\n{% if spec.varlen %}", BACKWARD, "gradients, window"),
    ("dq of a cap without its derivative", "        ds = p * (dp - delta[:, None])\n{% if spec.softcap %}", "        ds = p * (dp - delta[:, None])\n{% if spec.varlen %}", BACKWARD, "gradients, window"),
    ("dk and dv of ALiBi transposed", "(rows + seqlen_k - seqlen_q)[None, :] - offs_n[:, None]", "(rows + seqlen_q - seqlen_k)[None, :] - offs_n[:, None]", BACKWARD, "gradients, window"),
    ("dp of what dropout dropped", "        dp = tl.dot(v, tl.trans(do), input_precision=\"ieee\")\n{% if spec.dropout %}", "        dp = tl.dot(v, tl.trans(do), input_precision=\"ieee\")\n{% if spec.varlen %}", BACKWARD, "gradients, dropout"),
    ("dv of what dropout dropped", "tl.where(kept, p * dropout_scale, 0.0)\n        dv", "p * dropout_scale\n        dv", BACKWARD, "gradients, dropout"),
    ("the sinks' gradient with the wrong sign", "dsinks.copy_(-(sink_p", "dsinks.copy_((sink_p", BACKWARD, "gradients, dropout"),
    ("keys that a mask hides from all reach dq", "[:, None], k, 0.0)", "[:, None], k, k)", BACKWARD, "gradients, attn_mask"),
    ("dq of keys that mask and diagonal hide together", "        if IS_MASKED:\n            seen &= visible\n        p = tl.where(seen, p, 0.0)", "        p = tl.where(seen, p, 0.0)", BACKWARD, "gradients, rows of a mask"),
    ("seqused_k ignored", "seqlen_k = tl.minimum(seqlen_k, tl.load(seqused_k_ptr + off_b))", "seqlen_k = seqlen_k + 0", FORWARD, "packed"),
    ("packed: always bottom-right", "causal_offset = (seqlen_k - seqlen_q) * bottom_right", "causal_offset = seqlen_k - seqlen_q", FORWARD, "packed, top-left"),
    ("values from where queries start", "v_ptr += first_k *", "v_ptr += first_q *", FORWARD, "packed"),
    ("lse of every sequence at the start", "off_h.to(tl.int64) * total_q + first_q + offs_m", "off_h.to(tl.int64) * total_q + offs_m", FORWARD, "packed"),
    ("dropout numbers sequences by 0", "off_bh = off_b * num_heads_q + off_h\n", "off_bh = off_h\n", FORWARD, "packed, everything"),
    ("too few blocks for ragged sequences", "programs = (total_q // BLOCK_M + batch)", "programs = triton.cdiv(total_q, BLOCK_M)", LAUNCH, "packed"),
    ("a block of the next sequence", "// BLOCK_M + middle <= block", "// BLOCK_M + middle < block", PACKING, "packed"),
)  # fmt: skip


def _run(case: Case) -> None:
    said = judge(case)
    if said is not None:
        raise AccuracyError(said)


CHECKS: dict[str, Callable[[], None]] = {
    f"options-{name}": (lambda case=case: _run(case)) for name, case in CASES.items()
}
