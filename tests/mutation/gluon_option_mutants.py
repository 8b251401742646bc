"""Broken edits of what options add to the Hopper forward: (name, text that stands there once, what it becomes, file, check that notices)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from cases import Case
from judge import judge

from flashgen.errors import AccuracyError

FORWARD = "gluon/attention_fwd_sm90.py.jinja"
RANGE, WALK, SCORES, CAPS, RECOMPUTE, DROPOUT, PACKING, LAUNCH = (
    f"gluon/parts/fwd_{part}.py.jinja"
    for part in ("key_range", "walk", "scores", "caps", "recompute", "dropout", "packing", "launch_options")
)

_SMALL = {
    "backend": "gluon", "dtype": "fp16", "batch": 2, "seqlen_q": 70, "seqlen_k": 150, "heads_kv": 1, "group": 1,
    "head_dim": 16, "head_dim_v": 16, "lse": True, "tile": (128, 32), "seed": 3,
}  # fmt: skip
_LONG = {**_SMALL, "batch": 1, "seqlen_q": 200, "seqlen_k": 230}
_PACKED = {**_SMALL, "batch": 1, "lengths": ((30, 70, 60), (0, 5, 5), (140, 90, 33)), "seqused": True, "causal": True}

CASES: dict[str, Case] = {
    "window": Case(**{**_LONG, "window": (80, 30), "group": 4}),  # more tiles than thread blocks
    "narrow window": Case(**{**_LONG, "window": (3, 2)}),
    "causal window": Case(**{**_SMALL, "window": (9, 9), "causal": True}),
    "one-sided window": Case(**{**_SMALL, "window": (-1, 4)}),
    "softcap": Case(**{**_SMALL, "softcap": 0.5}),
    "softcap, wide": Case(**{**_SMALL, "softcap": 0.5, "head_dim": 72, "head_dim_v": 72}),
    "alibi": Case(**{**_SMALL, "alibi": "bh"}),
    "sinks": Case(**{**_SMALL, "sinks": True, "group": 2, "heads_kv": 3, "batch": 1, "causal": True, "seqlen_q": 20, "scale": 0.01}),  # above the scores
    "bias": Case(**{**_SMALL, "bias": "bhij"}),
    "attn_mask": Case(**{**_SMALL, "attn_mask": "bhij", "group": 2, "batch": 1}),
    "attn_mask of columns": Case(**{**_SMALL, "attn_mask": "b11j", "heads_kv": 2}),
    "window, more queries": Case(**{**_LONG, "window": (80, 3), "seqlen_q": 192, "seqlen_k": 130}),
    "window at the other boundary": Case(**{**_LONG, "window": (80, 1)}),
    "causal sinks at the other boundary": Case(**{**_LONG, "sinks": True, "causal": True, "seqlen_q": 193, "seqlen_k": 224}),
    "block_mask as given, whole tiles": Case(**{**_LONG, "block_mask": "given", "block_size": (64, 64), "seqlen_q": 192, "heads_kv": 2, "batch": 2}),
    "block_mask as given, wide blocks": Case(**{**_LONG, "block_mask": "given", "block_size": (128, 64), "seqlen_q": 256, "heads_kv": 2, "batch": 2}),
    "block_mask as given, hidden values in narrow tiles": Case(**{**_LONG, "block_mask": "given", "block_size": (128, 24), "seqlen_q": 100, "heads_kv": 2}),
    "window over one block of keys": Case(**{**_LONG, "window": (400, 30), "seqlen_q": 300, "seqlen_k": 30, "group": 5}),
    "window at a boundary": Case(**{**_LONG, "window": (80, 3)}),
    "causal sinks at a boundary": Case(**{**_LONG, "sinks": True, "causal": True, "seqlen_q": 193, "seqlen_k": 193}),
    "mask_mod of bands": Case(**{**_LONG, "mask_mod": "wide bands", "seqlen_q": 192, "heads_kv": 2, "batch": 2}),
    **{
        f"{name}, {words}": Case(**{**_LONG, "mask_mod": mod, "seqlen_q": 230, "heads_kv": 2, "words": words, **more})
        for name, mod, words, more in (
            ("mask_mod of wide bands", "wide bands", "none", {"batch": 2}),
            ("mask_mod of columns", "columns", "none", {"batch": 2}),
            ("mask_mod of sequences", "sequences", "none", {"batch": 2}),
            ("mask_mod of a band", "band", "none", {"seqlen_q": 300, "seqlen_k": 130}),
            ("mask_mod of sequences", "sequences", "stale", {"alibi": "h"}),
            ("mask_mod of pages", "pages", "stale", {"sinks": True}),
            ("mask_mod of scattered blocks", "scattered", "", {"batch": 2}),
            ("mask_mod of scattered blocks", "scattered", "none", {"batch": 2, "seqlen_q": 300}),
            ("mask_mod of read blocks", "read blocks", "", {"batch": 2, "spread": True}),
            ("mask_mod of read blocks", "read blocks", "stale", {"batch": 2}),
        )
    },
    "mask_mod, rows without a key": Case(**{**_LONG, "mask_mod": "band", "seqlen_q": 300, "seqlen_k": 130}),
    "packed, top-left, heads": Case(**{**_PACKED, "top_left": True, "heads_kv": 2, "group": 2, "attn_mask": "b1ij", "sinks": False}),
    "packed, heads": Case(**{**_PACKED, "causal": False, "window": (60, 20), "heads_kv": 2, "group": 2}),
    "packed, mask_mod that reads": Case(**{**_PACKED, "mask_mod": "sequences"}),
    "sinks above low scores": Case(**{**_SMALL, "sinks": True, "values": "low", "batch": 1}),
    "causal sinks, top-left": Case(**{**_LONG, "sinks": True, "causal": True, "top_left": True, "seqlen_q": 193, "seqlen_k": 130}),
    "block_mask as given": Case(**{**_LONG, "block_mask": "given", "block_size": (64, 32), "heads_kv": 2, "batch": 2}),
    "block_mask as given, odd blocks": Case(**{**_LONG, "block_mask": "given", "block_size": (24, 40), "group": 2, "seqlen_q": 192, "seqlen_k": 240}),
    "block_mask as given, hidden values": Case(**{**_LONG, "block_mask": "given", "block_size": (128, 64), "seqlen_q": 100, "heads_kv": 2, "tile": (128, 128)}),
    "spread, bias": Case(**{**_SMALL, "bias": "bhij", "spread": True, "heads_kv": 2}),
    "spread, attn_mask": Case(**{**_SMALL, "attn_mask": "bhij", "spread": True, "heads_kv": 2}),
    "spread, alibi": Case(**{**_SMALL, "alibi": "bh", "sinks": True, "spread": True, "heads_kv": 2}),
    "spread, captured": Case(**{**_SMALL, "score_mod": "table", "spread": True, "heads_kv": 2}),
    "spread, sequences": Case(**{**_SMALL, "mask_mod": "sequences", "spread": True, "heads_kv": 2}),
    "spread, pages": Case(**{**_SMALL, "mask_mod": "pages", "spread": True}),
    "dropout of batches": Case(**{**_SMALL, "dropout_p": 0.3, "heads_kv": 2}),
    "mask_mod": Case(**{**_LONG, "mask_mod": "document"}),
    "mask_mod of columns": Case(**{**_SMALL, "mask_mod": "columns"}),
    "mask_mod of sequences": Case(**{**_LONG, "mask_mod": "sequences", "seqlen_q": 230}),
    "mask_mod of pages": Case(**{**_SMALL, "mask_mod": "pages"}),
    "score_mod": Case(**{**_SMALL, "score_mod": "table", "group": 2, "batch": 1}),
    "relative": Case(**{**_SMALL, "score_mod": "relative"}),
    "block_mask": Case(**{**_SMALL, "block_mask": "document"}),
    "block_mask of large blocks": Case(**{**_LONG, "block_mask": "document", "block_size": (64, 64)}),
    "dropout": Case(**{**_SMALL, "dropout_p": 0.3, "group": 2, "batch": 1}),
    "packed": Case(**_PACKED),
    "gradients, packed": Case(**{**_PACKED, "grad": True, "deterministic": True, "group": 2, "tile": (64, 64)}),
    "gradients, packed to the left": Case(**{**_PACKED, "grad": True, "causal": False, "window": (9, 70), "lengths": ((30, 200, 190), (140, 33, 33), (70, 150, 150)), "tile": (64, 64)}),
    "gradients, packed window": Case(**{**_PACKED, "grad": True, "causal": False, "window": (40, 9), "sinks": True, "top_left": True, "tile": (64, 64)}),
}  # fmt: skip

FULL_END = ' - 1, full_first - 1, -1):\n{{ attend_with_options("n * BLOCK_N", "False") | indent(16'
FULL = f"gl.where(part == 0, full_end, full_first){FULL_END}"
MASKED = "gl.where(part == 0, full_end, first) - 1, -1\n"
FIRST = "rows_m + (causal_offset - window_left - 1 - start_n)"
LAST = "last_n = gl.minimum(rows_m + (causal_offset + window_right), seqlen_k - 1)"
KEEP = "c1 = quarter(zero + (start_m // 2 + i // 16 * 8 + i % 8)[:, None], BLOCK_N)"

MUTANTS: tuple[tuple[str, str, str, str, str], ...] = (
    ("the window shows one key too many on the left", FIRST, FIRST.replace("window_left - 1", "window_left - 2"), SCORES, "window"),
    ("the window hides its first key", FIRST, FIRST.replace("window_left - 1", "window_left"), SCORES, "narrow window"),
    ("the window shows one key too many on the right", LAST, LAST.replace("window_right", "window_right + 1"), SCORES, "window"),
    ("the ragged tail of a window", LAST, "last_n = rows_m + (causal_offset + window_right)", SCORES, "one-sided window"),
    ("a causal window looks ahead", "    window_right = 0\n", "    window_right = max(window_right, 0)\n", LAUNCH, "causal window"),
    ("no limit taken for 0", "window_left = widest if window_left < 0 else", "window_left = 0 if window_left < 0 else", LAUNCH, "one-sided window"),
    ("the first block of a window too late", "first = kv_start // BLOCK_N\n", "first = kv_start // BLOCK_N + 1\n", RANGE, "window"),
    ("the end of a window too early", "gl.maximum(last_m + causal_offset + window_right + 1, 0))", "gl.maximum(first_m + causal_offset + window_right + 1, 0))", RANGE, "window"),
    ("full blocks of the first row on the left", "full_first = gl.cdiv(gl.maximum(last_m +", "full_first = gl.cdiv(gl.maximum(first_m +", RANGE, "window"),
    ("full blocks of the last row on the right", "full_end = gl.minimum(kv_end, gl.maximum(first_m + causal_offset + window_right", "full_end = gl.minimum(kv_end, gl.maximum(last_m + causal_offset + window_right", RANGE, "window"),
    ("full blocks rounded up", "gl.maximum(last_m + causal_offset - window_left, 0), BLOCK_N)", "gl.maximum(last_m + causal_offset - window_left, 0) - BLOCK_N + 1, BLOCK_N)", RANGE, "window"),
    ("the blocks of the first warpgroup for all", "n_end = gl.maximum(n_end, end)", "n_end = gl.where(n_end > 0, n_end, end)", "gluon/parts/fwd_produce.py.jinja", "window"),
    ("ranges of the first rows", "ranges += gl.minimum(first_m, seqlen_q - 1) // WG_ROWS * 8", "ranges += 0", RANGE, "mask_mod"),
    ("mask_mod's last block forgotten", "end = gl.minimum(end, gl.load(ranges + 3))", "end = gl.minimum(end, gl.load(ranges + 3) - 1)", RANGE, "mask_mod"),
    ("blocks that mask_mod hides in part taken for whole ones", "full_first = gl.maximum(full_first, gl.load(ranges + 1))\n        full_end = gl.minimum(full_end, gl.load(ranges + 2))", "full_first = gl.maximum(full_first, gl.load(ranges))\n        full_end = gl.minimum(full_end, gl.load(ranges + 3))", RANGE, "mask_mod of columns"),
    ("the first masked block before the whole ones left out", MASKED, "gl.where(part == 0, full_end, first), -1\n", WALK, "window"),
    ("whole blocks walked twice", FULL, f"full_end{FULL_END}", WALK, "window"),
    ("a listed block left out", "for place in range(gl.where(part == 0, 1, n_listed), gl.where(part == 0, n_masked, n_listed)):", "for place in range(gl.where(part == 0, 1, n_listed), gl.where(part == 0, n_masked - 1, n_listed)):", WALK, "block_mask"),
    ("the first listed block met twice", "for place in range(gl.where(part == 0, 1, n_listed),", "for place in range(gl.where(part == 0, 0, n_listed),", WALK, "block_mask"),
    ("kinds of the first rows", "block_row = gl.minimum(start_m, seqlen_q - 1) // block_size_q", "block_row = gl.minimum(start_m, 0)", SCORES, "block_mask of large blocks"),
    ("blocks left of the walk not released", "        for _ in range(first - n_first):\n", "        for _ in range(0 * (first - n_first)):\n", FORWARD, "window"),
    ("softcap without its factor", "2.8853900817779268 * rate, 1.0 / rate]", "2.8853900817779268 * rate, 1.0]", CAPS, "softcap"),
    ("a cap in the exponents without its factor", "            qk_scale / rate,\n", "            qk_scale,\n", CAPS, "softcap, wide"),
    ("scores not scaled before options", "    qk *= sm_scale\n", "", SCORES, "bias"),
    ("ALiBi in front of the diagonal is a bonus", "qk -= slope * gl.abs(less_columns(", "qk -= slope * (less_columns(", SCORES, "alibi"),
    ("ALiBi from the top left", "    qk -= slope * gl.abs(less_columns(rows_m + (alibi_shift - start_n)", "    qk -= slope * gl.abs(less_columns(rows_m + (0 * alibi_shift - start_n)", SCORES, "alibi"),
    ("ALiBi of the first sequence", "alibi_slopes_ptr + off_b.to(gl.int64) * stride_alibi_b", "alibi_slopes_ptr", FORWARD, "alibi"),
    ("the sink missing in the denominator", "l_i = l_i * alpha + gl.exp2(sink - m_last)", "l_i = l_i * alpha", FORWARD, "sinks"),
    ("the sink in base e", "sink = gl.load(sink_ptrs).to(gl.float32) * 1.4426950408889634", "sink = gl.load(sink_ptrs).to(gl.float32)", FORWARD, "sinks"),
    ("the sink of the tile's first head", "(off_h + row // ROWS).to(gl.int64) * stride_sinks", "(off_h + 0 * row).to(gl.int64) * stride_sinks", FORWARD, "sinks"),
    ("values not rescaled for the sink", "        norm *= alpha\n", "        norm *= 1.0\n", FORWARD, "sinks"),
    ("the maximum of lse without the sink", '{{ "m_last" if spec.has_sinks else "m_i" }}', "m_i", FORWARD, "sinks"),
    ("operands of the first sequence", "_ptr + off_b.to(gl.int64) * stride_{{ name }}_b", "_ptr", FORWARD, "bias"),
    ("operands of the first head", "        {{ name }}_head += off_h.to(gl.int64) * stride_{{ name }}_h\n", "", FORWARD, "attn_mask"),
    ("the bias of the first keys", "columns = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, QK_LAYOUT))\n    if", "columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, QK_LAYOUT))\n    if", SCORES, "bias"),
    ("the bias of keys beyond the last", "columns = gl.minimum(columns, seqlen_k - 1)", "columns = columns + 0", SCORES, "bias"),
    ("the mask of rows beyond the last", "rows = gl.minimum(rows_m, seqlen_q - 1)", "rows = rows_m", SCORES, "attn_mask"),
    ("attn_mask inverted", "qk = gl.where(attn_mask != 0, qk", "qk = gl.where(attn_mask == 0, qk", SCORES, "attn_mask"),
    ("values that a mask hides from all", "if is_spoiled(acc, rows_m, seqlen_q, O_LAYOUT)", "if is_spoiled(acc * 0.0 + 1.0, rows_m * 0 + seqlen_q, seqlen_q, O_LAYOUT)", FORWARD, "attn_mask of columns"),
    ("values read that only others see", "v_mask = (seen & (keys < end))[:, None]", "v_mask = (keys < end)[:, None]", RECOMPUTE, "attn_mask of columns"),
    ("computed anew with another maximum", 'else "m_s" }}[:, None])', 'else "m_s" }}[:, None] * 0.5)', RECOMPUTE, "attn_mask of columns"),
    ("mask_mod not evaluated", "seen = gl.where({{ mask.result }}, qk, 0).reshape(", "seen = qk.reshape(", "gluon/parts/fwd_bits.py.jinja", "mask_mod of columns, none"),
    ("a distance that counts columns once too often", "- eights[None, :][:, :, None]", "- 2.0 * eights[None, :][:, :, None]", SCORES, "relative"),
    ("score_mod not evaluated", "    qk = {{ score.result }}\n", "", SCORES, "score_mod"),
    ("dropout without its factor", "        norm *= dropout_scale\n", "", FORWARD, "dropout"),
    ("dropout shifted by a row", KEEP, KEEP.replace("start_m // 2", "start_m // 2 + 1"), DROPOUT, "dropout"),
    ("dropout transposed", "words = gl.join(left, right)", "words = gl.join(left, right).permute([0, 1, 2, 3, 5, 4])", DROPOUT, "dropout"),
    ("the same dropout in every head", "off_bh = off_b * num_heads_q + off_h", "off_bh = off_b * num_heads_q", FORWARD, "dropout"),
    ("seqused_k ignored", "seqlen_k = gl.minimum(seqlen_k, gl.load(seqused_k_ptr + off_b))", "seqlen_k = seqlen_k + 0", PACKING, "packed"),
    ("a block of the next sequence", "// TILE_ROWS + middle <= block", "// TILE_ROWS + middle < block", PACKING, "packed"),
    ("rows of the next sequence written", "        if start_m + ROWS <= seqlen_q:\n", "        if start_m < seqlen_q:\n", FORWARD, "packed"),
    ("too few blocks for ragged sequences", "num_m_blocks = total_q // BLOCK_M + batch", "num_m_blocks = -(-total_q // BLOCK_M)", FORWARD, "packed"),
    ("lse of every sequence at the start", "off_h.to(gl.int64) * total_q + first_q + rows_m", "off_h.to(gl.int64) * total_q + rows_m", FORWARD, "packed"),
)  # fmt: skip


def _run(case: Case) -> None:
    said = judge(case, again=False)  # that bits repeat is a test of the fuzz
    if said is not None:
        raise AccuracyError(said)


CHECKS: dict[str, Callable[[], None]] = {
    f"Hopper options-{name}": (lambda case=case: _run(case)) for name, case in CASES.items()
}
