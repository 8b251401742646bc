"""Broken edits of what options add to the portable forward: (name, text that stands there once, what it becomes, check that notices)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from cases import Case
from judge import judge

import flashgen
from flashgen.config import KernelConfig
from flashgen.errors import AccuracyError
from flashgen.variants.triton_bwd import TritonBackward

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
    "gradients, mask_mod of columns": Case(**{**_WIDE, "grad": True, "mask_mod": "columns", "group": 1, "seqlen_k": 40}),
    "window, more queries": Case(**{**_WIDE, "window": (20, 9), "seqlen_q": 71, "seqlen_k": 37}),
    "mask_mod of bands": Case(**{**_WIDE, "mask_mod": "bands", "seqlen_q": 75, "seqlen_k": 96}),
    "block_mask as given, of each head": Case(**{**_WIDE, "grad": True, "block_mask": "given", "block_size": (32, 16), "seqlen_q": 80, "group": 1}),
    "block_mask as given, odd blocks": Case(**{**_WIDE, "grad": True, "block_mask": "given", "block_size": (24, 40), "seqlen_q": 50, "seqlen_k": 90, "group": 1}),
    "window, odd head dims": Case(**{**_WIDE, "window": (20, 9), "head_dim": 17, "head_dim_v": 20, "grad": True, "seqlen_k": 50, "group": 1}),
    "spread, bias": Case(**{**_WIDE, "bias": "bhij", "spread": True}),
    "spread, attn_mask": Case(**{**_WIDE, "attn_mask": "bhij", "spread": True}),
    "spread, alibi": Case(**{**_WIDE, "alibi": "bh", "spread": True, "sinks": True}),
    "spread, captured": Case(**{**_WIDE, "score_mod": "table", "spread": True}),
    "spread, sequences": Case(**{**_WIDE, "mask_mod": "sequences", "spread": True}),
    "spread, pages": Case(**{**_WIDE, "mask_mod": "pages", "spread": True}),
    "gradients, spread bias": Case(**{**_WIDE, "grad": True, "bias": "bhij", "seqlen_k": 40, "spread": True}),
    "gradients, spread operands": Case(**{**_WIDE, "grad": True, "alibi": "bh", "attn_mask": "bhij", "sinks": True, "seqlen_k": 40, "spread": True}),
    "gradients, spread table": Case(**{**_WIDE, "grad": True, "score_mod": "gated", "mask_mod": "sequences", "seqlen_k": 40, "spread": True}),
    "gradients, mask_mod of bands": Case(**{**_WIDE, "grad": True, "mask_mod": "bands", "seqlen_q": 75}),
    "gradients, window, more queries": Case(**{**_WIDE, "grad": True, "window": (12, 5), "seqlen_q": 71, "seqlen_k": 37}),
    "mask_mod of sequences": Case(**{**_WIDE, "mask_mod": "sequences", "seqlen_q": 75, "tile": (16, 32)}),
    "mask_mod of pages": Case(**{**_WIDE, "mask_mod": "pages", "group": 1}),
    "score_mod": Case(**{**_WIDE, "score_mod": "table"}),
    "relative": Case(**{**_WIDE, "score_mod": "relative"}),
    "score_mod and softcap": Case(**{**_WIDE, "score_mod": "squared", "softcap": 0.5}),
    "dropout": Case(**{**_WIDE, "dropout_p": 0.3, "tile": (32, 16)}),
    "gradients, window": Case(**{**_WIDE, "grad": True, "window": (20, 9), "softcap": 0.5, "alibi": "bh"}),
    "gradients, narrow window": Case(**{**_WIDE, "grad": True, "window": (2, 1), "seqlen_q": 75, "seqlen_k": 40}),
    "gradients, attn_mask": Case(**{**_WIDE, "grad": True, "attn_mask": "b11j", "window": (-1, 9)}),
    "gradients, rows of a mask": Case(**{**_WIDE, "grad": True, "attn_mask": "11i1", "causal": True}),
    "gradients, dropout": Case(**{**_WIDE, "grad": True, "dropout_p": 0.3, "sinks": True}),
    "gradients, mask_mod": Case(**{**_WIDE, "grad": True, "mask_mod": "document", "seqlen_q": 75, "seqlen_k": 60, "group": 1}),
    "gradients, mask_mod of a band": Case(**{**_WIDE, "grad": True, "mask_mod": "band", "seqlen_q": 125, "group": 1}),
    "gradients, mask_mod of sequences": Case(**{**_WIDE, "grad": True, "mask_mod": "sequences", "group": 1}),
    "gradients, score_mod": Case(**{**_WIDE, "grad": True, "score_mod": "table", "seqlen_k": 40}),
    "gradients, squared": Case(**{**_WIDE, "grad": True, "score_mod": "squared", "seqlen_k": 40}),
    "gradients, captured and hidden": Case(**{**_WIDE, "grad": True, "score_mod": "gated", "mask_mod": "columns", "group": 1, "seqlen_k": 40}),
    "gradients, bias of keys": Case(**{**_WIDE, "grad": True, "bias": "b11j", "seqlen_k": 40}),
    "gradients, bias of rows": Case(**{**_WIDE, "grad": True, "bias": "1hi1", "seqlen_k": 40}),
    "gradients, bias of heads": Case(**{**_WIDE, "grad": True, "bias": "1hij", "seqlen_k": 40}),
    "gradients, bias and softcap": Case(**{**_WIDE, "grad": True, "bias": "bhij", "softcap": 0.5, "seqlen_k": 40}),
    "gradients, ordered": Case(**{**_WIDE, "grad": True, "bias": "1h1j", "score_mod": "table", "deterministic": True, "seqlen_k": 40}),
    "gradients, packed": Case(**{**_PACKED, "grad": True, "sinks": True, "bias": "bhij", "window": (6, 1), "top_left": True}),
    "block_mask": Case(**{**_WIDE, "grad": True, "block_mask": "thirds", "block_size": (32, 64)}),
    "block_mask of odd blocks": Case(**{**_WIDE, "grad": True, "block_mask": "document", "block_size": (24, 40)}),
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
BEHIND = "start_n += tl.where(place >= gap_start, gap, 0)"
BEHIND_T = BEHIND.replace("start_n", "start_m")
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
    ("softcap after the bias", "        qk += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)\n", "        qk += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)\n        qk = soft_cap(qk, softcap)\n", FORWARD, "softcap, then bias"),
    ("attn_mask inverted", "mask=inside, other=0) != 0", "mask=inside, other=0) == 0", FORWARD, "attn_mask"),
    ("values that a mask hides from all", "{% if spec.has_attn_mask %}\n        v = tl.where(seen[:, None], v, 0.0)", "{% if spec.has_attn_mask %}\n        v = v + 0.0", FORWARD, "attn_mask of columns"),
    ("mask_mod's first block too late", "tl.maximum(first_block, tl.load(ranges) * BLOCK_N)", "tl.maximum(first_block, (tl.load(ranges) + 1) * BLOCK_N)", FORWARD, "mask_mod"),
    ("mask_mod's last block forgotten", "tl.minimum(kv_end, tl.load(ranges + 3) * BLOCK_N)", "tl.minimum(kv_end, (tl.load(ranges + 3) - 1) * BLOCK_N)", FORWARD, "mask_mod"),
    ("blocks that mask_mod hides in part taken for whole ones", MOD_FULL, "full_start = first_block\n        full_end = tl.minimum(full_end, tl.load(ranges + 3) * BLOCK_N)\n", FORWARD, "mask_mod of columns"),
    ("the ranges of the first block of queries", "start_m // BLOCK_M * 4", "0", FORWARD, "mask_mod"),
    ("rows beyond the end see keys", "last_key = tl.where(offs_m < seqlen_q, kv_end - 1, -1)", "last_key = tl.where(offs_m >= 0, kv_end - 1, -1)", FORWARD, "mask_mod, ragged"),
    ("keys behind those without a mask begin a block late", BEHIND, BEHIND.replace(">=", ">"), FORWARD, "mask_mod in small tiles"),
    ("keys behind those without a mask looked for before them", BEHIND, BEHIND.replace("gap, 0", "0, 0"), FORWARD, "mask_mod in small tiles"),
    ("keys behind those without a mask forgotten", '("True", "first_block", "kv_end - gap")', '("True", "first_block", "full_start")', FORWARD, "mask_mod in small tiles"),
    ("keys without a mask masked once more", '("False", "full_start", "full_end")] %}\n{% set listed', '("False", "first_block", "full_end")] %}\n{% set listed', FORWARD, "mask_mod in small tiles"),
    ("keys that no row sees told from the others by their scores", "tl.where(visible, scores.to(tl.int32, bitcast=True), 2147483647)", "scores.to(tl.int32, bitcast=True)", FORWARD, "mask_mod of columns"),
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
    ("row_end one row short", "last_n - causal_offset + window_left + 1, 0))\n", "last_n - causal_offset + window_left, 0))\n", BACKWARD, "gradients, narrow window"),
    ("keys before every window are read", "in_range = (offs_n >= seen_begin) & (offs_n < seen_end)", "in_range = offs_n < seqlen_k", BACKWARD, "gradients, window"),
    ("gradients of a cap without its derivative", "        ds *= slack\n", "        ds *= 1.0\n", BACKWARD, "gradients, window"),
    ("gradients of ALiBi from the other end", "({{ rows }} + seqlen_k - seqlen_q)", "({{ rows }} + seqlen_q - seqlen_k)", BACKWARD, "gradients, window"),
    ("dp of what dropout dropped", "        dp = tl.dot(v, tl.trans(do), input_precision=\"ieee\")\n{% if spec.dropout %}", "        dp = tl.dot(v, tl.trans(do), input_precision=\"ieee\")\n{% if spec.varlen %}", BACKWARD, "gradients, dropout"),
    ("dv of what dropout dropped", "tl.where(kept, p * dropout_scale, 0.0)\n        dv", "p * dropout_scale\n        dv", BACKWARD, "gradients, dropout"),
    ("the sinks' gradient with the wrong sign", "dsinks.copy_(-(sink_p * delta).sum((0, 2)))", "dsinks.copy_((sink_p * delta).sum((0, 2)))", BACKWARD, "gradients, dropout"),
    ("keys that a mask hides from all reach dq", "{% if spec.has_attn_mask %}\n        k = tl.where(", "{% if spec.has_attn_mask %}\n        tl.where(", BACKWARD, "gradients, attn_mask"),
    ("a mask alone, where a diagonal hides too", 'visible {{ "=" if loop.first and not spec.has_attn_mask else "&=" }} {{ condition }}', 'visible {{ "=" if loop.first and not spec.has_attn_mask else "|=" }} {{ condition }}', BACKWARD, "gradients, rows of a mask"),
    ("rows that mask_mod leaves begin a block late", "begin = tl.maximum(begin, tl.load(ranges) * BLOCK_M)", "begin = tl.maximum(begin, (tl.load(ranges) + 1) * BLOCK_M)", BACKWARD, "gradients, mask_mod"),
    ("rows that mask_mod hides in part taken for whole ones", "full_start = tl.maximum(tl.maximum(full_start, tl.load(ranges + 1) * BLOCK_M), begin)", "full_start = begin", BACKWARD, "gradients, mask_mod"),
    ("the last rows that mask_mod leaves forgotten", "stop = tl.minimum(stop, tl.load(ranges + 3) * BLOCK_M)", "stop = tl.minimum(stop, (tl.load(ranges + 3) - 1) * BLOCK_M)", BACKWARD, "gradients, mask_mod of a band"),
    ("rows behind those without a mask begin a block late", BEHIND_T, BEHIND_T.replace(">=", ">"), BACKWARD, "mask_mod in small tiles"),
    ("rows behind those without a mask looked for before them", BEHIND_T, BEHIND_T.replace("gap, 0", "0, 0"), BACKWARD, "mask_mod in small tiles"),
    ("rows behind those without a mask forgotten", '("True", "begin", "stop - gap")', '("True", "begin", "full_start")', BACKWARD, "mask_mod in small tiles"),
    ("rows that mask_mod hides in part unmasked", '("False", "full_start", "full_stop")', '("False", "begin", "full_stop")', BACKWARD, "mask_mod in small tiles"),
    ("dq: keys behind those without a mask begin a block late", BEHIND, BEHIND.replace(">=", ">"), BACKWARD, "mask_mod in small tiles"),
    ("dq: keys behind those without a mask looked for before them", BEHIND, BEHIND.replace("gap, 0", "0, 0"), BACKWARD, "mask_mod in small tiles"),
    ("dq: keys behind those without a mask forgotten", '("True", "first_block", "kv_end - gap")', '("True", "first_block", "full_start")', BACKWARD, "mask_mod in small tiles"),
    ("hidden pairs are not told from others", '"hide(p, visible)" if spec.has_free_mask else', '"tl.where(visible, p, 0.0)" if True else', BACKWARD, "gradients, mask_mod of columns"),
    ("dq: keys that a mask_mod hides from all", "            k = tl.where(any_sees(p)[:, None], k, 0.0)", "            k = k + 0.0", BACKWARD, "gradients, mask_mod of columns"),
    ("row ranges of the first block of keys", "start_n // BLOCK_N * 4\n", "0\n", BACKWARD, "gradients, mask_mod"),
    ("hidden keys reach what score_mod captures", "            if IS_MASKED:\n                live &= ~hidden(p)\n", "", BACKWARD, "gradients, captured and hidden"),
    ("score_mod's derivative left out", "        ds = {{ slope.score }}\n", "        ds = ds * 1.0\n", BACKWARD, "gradients, squared"),
    ("score_mod's derivative at the new score", "        raw = qk\n", "        raw = qk * 0.5\n", BACKWARD, "gradients, squared"),
    ("what is captured gets the gradient of one tile", "tl.atomic_add(sum_ptr + places, value,", "tl.store(sum_ptr + places, value,", BACKWARD, "gradients, score_mod"),
    ("rows beyond the end add to what is captured", "live = (offs_m < seqlen_q)[:, None]", "live = (offs_m >= 0)[:, None]", BACKWARD, "gradients, constant of -inf"),
    ("the bias's gradient unreduced over rows", "part = tl.sum(part, 0, keep_dims=True)", "part = tl.max(part, 0, keep_dims=True)", BACKWARD, "gradients, bias of keys"),
    ("the bias's gradient unreduced over keys", "part = tl.sum(part, 1, keep_dims=True)", "part = tl.max(part, 1, keep_dims=True)", BACKWARD, "gradients, bias of rows"),
    ("the bias's gradient of the last batch alone", "whole_bias = shape == tuple(bias.shape)", "whole_bias = shape[1:] == tuple(bias.shape)[1:]", BACKWARD, "gradients, bias of heads"),
    ("the bias's gradient after the cap's derivative", "            part = tl.where(live, ds, 0.0)\n", "            part = tl.where(live, ds * slack, 0.0)\n", BACKWARD, "gradients, bias and softcap"),
    ("the bias's gradient of the first sequence", "off_b * stride_dbias_b + off_h * stride_dbias_h", "off_h * stride_dbias_h", BACKWARD, "gradients, packed"),
    ("ordered sums with units too small to count", "factor = ((62 - term_bits", "factor = ((12 - term_bits", BACKWARD, "gradients, ordered"),
    ("ordered sums read in other units", "- 126 + term_bits - 62\n", "- 126 + term_bits - 61\n", BACKWARD, "gradients, ordered"),
    ("ordered sums of the first pass alone", "passes.append((fixed, 3, 3))", "passes.append((fixed, 3, 2))", BACKWARD, "gradients, ordered"),
    ("a partial block taken for a full one", "(kind == 2) | ((kind == 1) & allowed)", "(kind == 2) | (kind == 1)", FORWARD, "block_mask"),
    ("a block mask's full blocks masked", "(kind == 2) | ((kind == 1) & allowed)", "(kind > 0) & allowed", FORWARD, "block_mask as given"),
    ("the kinds of the first rows", "({{ rows }} // block_size_q).to(tl.int64)", "({{ rows }} * 0).to(tl.int64)", FORWARD, "block_mask as given, odd blocks"),
    ("a tile's kind from the wrong block", "tl.load(kind_row + start_n // block_size_k)", "tl.load(kind_row)", FORWARD, "block_mask as given"),
    ("one kind of a tile that has several", "block_size_k % BLOCK_N == 0", "block_size_k % 8 == 0", FORWARD, "block_mask as given, odd blocks"),
    ("unmasked blocks from where the masked ones begin", '("False", "masked", "listed")', '("False", "0", "listed")', FORWARD, "block_mask as given"),
    ("block lists of the first head", "row_blocks_ptr + off_b * stride_row_blocks_b + off_h * stride_row_blocks_h", "row_blocks_ptr + off_b * stride_row_blocks_b", BACKWARD, "block_mask as given"),
    ("block lists of the first queries", "key_blocks_ptr += (start_m // BLOCK_M).to(tl.int64) * stride_key_blocks_m", "key_blocks_ptr += 0", FORWARD, "block_mask as given"),
    ("packed: gradients of keys that are not in use", "    dk = tl.where((offs_n < seqlen_k)[:, None], dk, 0.0)\n", "", BACKWARD, "gradients, packed"),
    ("packed: lse from the start", "row_start = off_h * total_q + first_q\n{% else %}\n        row_start", "row_start = off_h * total_q\n{% else %}\n        row_start", BACKWARD, "gradients, packed"),
    ("packed: keys of dk where queries start", "dk_ptr += first_k * stride_dkn", "dk_ptr += first_q * stride_dkn", BACKWARD, "gradients, packed"),
    ("packed: too few blocks of keys", "(total_k // BLOCK_N + batch)", "triton.cdiv(total_k, BLOCK_N)", BACKWARD, "gradients, packed"),
    ("packed: sinks of every row at once", "dsinks.copy_(-(sink_p * delta).sum(1))", "dsinks.copy_(-(sink_p * delta).sum(1) * 0.5)", BACKWARD, "gradients, packed"),
    ("seqused_k ignored", "seqlen_k = tl.minimum(seqlen_k, tl.load(seqused_k_ptr + off_b))", "seqlen_k = seqlen_k + 0", FORWARD, "packed"),
    ("packed: always bottom-right", "causal_offset = (seqlen_k - seqlen_q) * bottom_right", "causal_offset = seqlen_k - seqlen_q", FORWARD, "packed, top-left"),
    ("values from where queries start", "v_ptr += first_k *", "v_ptr += first_q *", FORWARD, "packed"),
    ("lse of every sequence at the start", "off_h.to(tl.int64) * total_q + first_q + offs_m", "off_h.to(tl.int64) * total_q + offs_m", FORWARD, "packed"),
    ("dropout numbers sequences by 0", "off_bh = off_b * num_heads_q + off_h\n", "off_bh = off_h\n", FORWARD, "packed, everything"),
    ("too few blocks for ragged sequences", "programs = (total_q // BLOCK_M + batch)", "programs = triton.cdiv(total_q, BLOCK_M)", LAUNCH, "packed"),
    ("a block of the next sequence", "// BLOCK_M + middle <= block", "// BLOCK_M + middle < block", PACKING, "packed"),
)  # fmt: skip


def _of_infinities() -> None:
    """A score that rows beyond the end would have as infinity: it reaches neither dk nor what is captured."""
    q, k, v = (drawn(1, seqlen, 2, 16, seed=seqlen) for seqlen in (20, 24, 25))
    v = v[:, :24]
    scale = torch.rand(2, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + scale[h] / (20 - q_idx)

    _agree((q, k, v), (scale,), score_mod=mod)


def _in_small_tiles() -> None:
    """Of each tile the blocks before and behind those that the mask leaves whole; what a key holds that nobody sees stays where it is."""
    q, k, v = (drawn(1, seqlen, 2, 16, seed=seqlen) for seqlen in (90, 85, 86))
    _agree((q, k, v[:, :85]), (), mask_mod=lambda b, h, i, j: (i - j < 30) & (j - i < 40))


def _as_given(size: tuple[int, int]) -> None:
    """A BlockMask whose full blocks its mask_mod would hide in part, and whose lists are of each head and in no order."""
    g = torch.Generator().manual_seed(1)
    rows, columns = -(-40 // size[0]), -(-100 // size[1])
    lists = [
        part
        for _ in range(2)
        for part in (
            torch.randint(0, columns + 1, (2, 4, rows), generator=g, dtype=torch.int32),
            torch.rand((2, 4, rows, columns), generator=g).argsort(-1).int(),
        )
    ]
    mask = BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=size, mask_mod=lambda b, h, i, j: (i + j) % 3 > 0, seq_lengths=(40, 100)
    )
    q, k, v = (drawn(2, *shape, 16, seed=seed) for seed, shape in enumerate(((40, 4), (100, 2), (100, 2))))
    _agree((q, k, v), (), block_mask=mask)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _agree(tensors: tuple[Tensor, ...], captured: tuple[Tensor, ...], **options: Any) -> None:
    """Results and gradients of the kernels beside the torch backend's."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    config = KernelConfig(
        variant="triton_bwd", BLOCK_M=16, BLOCK_N=16, BLOCK_M_DQ=16, BLOCK_N_DQ=16, num_warps=4, num_stages=1
    )  # fmt: skip
    found = []
    with mock.patch.object(TritonBackward, "default", lambda self, spec, target: config):
        for keywords in ({"backend": "torch"}, {"backend": "triton", "config": tile}):
            out = flashgen.attention(*tensors, **options, **keywords)  # type: ignore[call-overload]
            weights = torch.arange(out.numel()).view(out.shape).sin()
            found.append((out, *torch.autograd.grad((out * weights).sum(), (*tensors, *captured))))
    for want, got in zip(*found, strict=True):
        if not torch.allclose(want, got, rtol=1e-4, atol=2e-5):
            raise AccuracyError(f"off by {(want - got).abs().max()}")


def _run(case: Case) -> None:
    said = judge(case, again=False)  # that bits repeat is a test of the fuzz
    if said is not None:
        raise AccuracyError(said)


CHECKS: dict[str, Callable[[], None]] = {
    **{f"options-{name}": (lambda case=case: _run(case)) for name, case in CASES.items()},
    "options-gradients, constant of -inf": _of_infinities,
    "options-mask_mod in small tiles": _in_small_tiles,
    "options-block_mask as given": lambda: _as_given((16, 16)),
    "options-block_mask as given, odd blocks": lambda: _as_given((16, 40)),
}
