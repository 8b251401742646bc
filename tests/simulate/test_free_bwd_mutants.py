"""Broken edits of what options add to the Hopper backward: each is noticed by the case that runs its line."""

from __future__ import annotations

import pytest
from free_backward import Free, launch, make, references
from free_cases import BIASES, CASES, GROUPS, TALL, bands_of_heads

from flashgen.gradients import ByIdentity
from flashgen.simulator import SimulationError

OF = {case.why: case for case in (*CASES, *BIASES)}
FIRST_KEYS = OF["nobody sees the first keys, in whole blocks"]
LOW = Free(why="", sizes={"seqlen_q": 150, "seqlen_k": 200}, window=(-1, 150), values="low")
BOTH_ENDS, CAUSAL_WINDOW = OF["a window with both ends in the middle"], OF["a causal window"]
OUTSIDE = OF["rows beyond the last key, keys before the first row"]
CHUNKS, COLUMNS = OF["chunks, with ranges by keys"], OF["a mask of columns"]
SQUARED = OF["a score with a derivative, of heads and batches"]
ALIBI, SOFTCAP = OF["ALiBi, causal, rows without a key"], OF["a strong softcap, causal, with sinks"]
DROPOUT = OF["dropout"]
BLOCKS = OF["a BlockMask of each batch, causal, beside a mask"]
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64}
BANDS = Free(why="", sizes={"seqlen_q": 300, "seqlen_k": 260, "num_heads_q": 2}, mask_mod=bands_of_heads, knobs=SMALL)
WINDOWS = Free(why="", sizes={"seqlen_q": 300, "seqlen_k": 260}, window=(70, 90), knobs=SMALL)
WINDOWS_OF_GROUPS = Free(why="", sizes={**GROUPS, "seqlen_q": 300, "seqlen_k": 260}, window=(70, 90), knobs=SMALL)
HEADS = Free(
    why="",
    sizes={**GROUPS, "seqlen_q": 300, "seqlen_k": 260},
    mask_mod=lambda b, h, i, j: (h % 2 == 1) | (j <= i),
    knobs=SMALL,
)
SHARED = OF["a bias that heads share"]
LISTS = Free(why="", sizes={"seqlen_q": 300, "seqlen_k": 260}, block_mask="11", block_size=(64, 64), knobs=SMALL)
SINKS = Free(why="", sizes={**TALL, "seqlen_q": 400, "seqlen_k": 130}, window=(60, 60), sinks=True)
RAGGED = Free(
    why="", sizes={"seqlen_q": 130, "seqlen_k": 128}, score_mod=lambda s, b, h, i, j: s + 1.0 / (130 - i), knobs=SMALL
)

MUTANTS: tuple[tuple[str, Free, str, str], ...] = (
    ("the window shows one row too many", BOTH_ENDS, "offs_n - causal_offset + window_left + 1\n", "offs_n - causal_offset + window_left + 2\n"),
    ("the window hides its first row", BOTH_ENDS, "offs_n - causal_offset - window_right, 2147", "offs_n - causal_offset - window_right + 1, 2147"),
    ("rows after the window", BOTH_ENDS, "setp.lt.and.s32 seen, $2, $4, seen;", "setp.ge.and.s32 seen, $2, 0, seen;"),
    ("keys that do not exist", LOW, "exists = (offs_n >= first_key) & (offs_n < end_key)", "exists = offs_n >= 0"),
    ("blocks of rows from a later one on", WINDOWS, "first_key) - causal_offset - window_right, 0) // BLOCK_M", "first_key) - causal_offset - window_right, 0) // BLOCK_M + 1"),
    ("blocks of rows end early", WINDOWS, "window_left + 1, seqlen_q), BLOCK_M)", "window_left - 63, seqlen_q), BLOCK_M)"),
    ("whole blocks from the first row on", WINDOWS, "full = gl.cdiv(gl.maximum(start_n + BLOCK_N - 1 -", "full = gl.cdiv(gl.maximum(start_n -"),
    ("whole blocks one too far", WINDOWS, "rows_full // BLOCK_M, end)", "rows_full // BLOCK_M + 1, end)"),
    ("rows loaded from the first of all", OUTSIDE, "[off_b, off_h, start_m - first_row, 0], q_full", "[off_b, off_h, start_m, 0], q_full"),
    ("gradients loaded from the first of all", OUTSIDE, "[off_b, off_h, start_m - first_row, 0], do_full", "[off_b, off_h, start_m, 0], do_full"),
    ("keys loaded from the first of all", BOTH_ENDS, "    start_n -= first_key\n", "    start_n -= 0\n"),
    ("dk stored where keys are loaded", BOTH_ENDS, "tma_store(dk_desc, [off_b, off_hkv, start_n, 0]", "tma_store(dk_desc, [off_b, off_hkv, start_n - first_key, 0]"),
    ("keys before the first one keep what they held", FIRST_KEYS, "gradient[:, :first_key].zero_()", "pass"),
    ("turns in the order of keys", WINDOWS, "before = gl.minimum(end_n - 1,", "before = n_block - gl.minimum(0,"),
    ("the second side forgotten", WINDOWS, "for part in range(2 * group):", "for part in range(group):"),
    ("a step twice", WINDOWS, "shift = gl.where(is_before, begin, full_end) - first_step", "shift = begin - first_step"),
    ("delta of rows without a key", OUTSIDE, 'tl.where(lse == -float("inf"), 0.0, delta)', "delta"),
    ("sinks of rows without a key left out", SINKS, "-(sink_p * delta.view(batch, num_heads_q, -1))", "-(sink_p * delta.view(batch, num_heads_q, -1))[:, :, 100:]"),
    ("a sink in base e", SINKS, "sinks.float()[:, None] * 1.4426950408889634", "sinks.float()[:, None]"),
    ("mask_mod not evaluated", COLUMNS, "    first_m = gl.maximum(first_m, gl.where((offs_n + off_b) % 4 != 1, 0, 2147483647))\n", ""),
    ("rows before a key's first one", CHUNKS, "setp.le.s32 seen, $3, $2;", "setp.ge.s32 seen, $2, 0;"),
    ("another comparison of rows and keys", CHUNKS, "setp.eq.and.s32 seen, $4, $5, seen;", "setp.ge.and.s32 seen, $4, $5, seen;"),
    ("rows behind a key's last one", BANDS, "setp.lt.and.s32 seen, $4, $5, seen;", "setp.le.and.s32 seen, $4, $5, seen;"),
    ("ranges of the first block of keys", CHUNKS, "gl.minimum(start_n, seqlen_k - 1) // BLOCK_N * 4", "gl.minimum(start_n, 0) * 4"),
    ("blocks that hide something taken for whole ones", BANDS, "full = gl.maximum(full, gl.load(ranges + 1))\n        full_end = gl.minimum(full_end, gl.load(ranges + 2))", "full = begin\n        full_end = gl.minimum(full_end, gl.load(ranges + 3))"),
    ("the last block of rows forgotten", BANDS, "end = gl.minimum(end, gl.load(ranges + 3))", "end = gl.minimum(end, gl.load(ranges + 3) - 1)"),
    ("visits of whole blocks alone", BANDS, "begin, _, _, end = row_blocks(", "_, begin, end, _ = row_blocks("),
    ("visits of earlier keys", BANDS, "range(n_block + 1, end_n, 128)", "range(0, n_block, 128)"),
    ("ranges of the first head of a group", OF["a mask of heads alone, of all batches"], "first = torch.where(first < end, first, 2**30).amin(2)", "first = first[:, :, 0]"),
    ("a group unmasked where one head is", HEADS, "full.amax(2), full_end.amin(2)", "full.amin(2), full_end.amax(2)"),
    ("NaN in a key that nobody sees", OF["keys hidden everywhere in a block hold NaN"], "keys.to(gl.float32) * 0.0 == 0.0", "keys.to(gl.float32) * 0.0 != 1.0"),
    ("NaN in a value that nobody sees", OF["keys hidden everywhere in a block hold NaN"], "values.to(gl.float32) * 0.0 == 0.0", "values.to(gl.float32) * 0.0 != 1.0"),
    ("no derivative of the score", SQUARED, "    p = d_value_2\n", "    p = p * 1.0\n"),
    ("the score before the scale", OF["a score of positions"], "scaled = scores * sm_scale", "scaled = scores"),
    ("a score of rows that do not exist", RAGGED, "        visible &= (rows_m < seqlen_q)[None, :]\n", ""),
    ("the ragged block of rows taken for a whole one", RAGGED, "full_end = gl.minimum(full_end, seqlen_q // BLOCK_M)", "full_end = end"),
    ("no derivative of the cap", SOFTCAP, "p *= 1.0 - squashed * squashed", "p *= 1.0"),
    ("the cap without its factor", SOFTCAP, "squashed * (softcap * qk_scale)", "squashed * qk_scale"),
    ("an even tanh", SOFTCAP, "grown = gl.exp2(x)", "grown = gl.exp2(gl.abs(x))"),
    ("ALiBi from the top left", ALIBI, "(start_m + alibi_shift - start_n,", "(start_m - start_n,"),
    ("ALiBi with one sign on both sides", OF["ALiBi, top-left, more rows than keys"], "seqlen_k - seqlen_q >= causal_offset", "True"),
    ("ALiBi with one sign on both sides under a cap", OF["softcap and ALiBi, distances of both signs"], "seqlen_k - seqlen_q >= causal_offset", "True"),
    ("ALiBi falls with the key", ALIBI, "lift = (slope * qk_scale)", "lift = -(slope * qk_scale)"),
    ("heads behind the first forgotten", WINDOWS_OF_GROUPS, "group * before + member * behind", "group * before"),
    ("ALiBi of the first head", ALIBI, "off_h * stride_alibi_h", "off_hkv * 0"),
    ("ALiBi a bonus in front of the diagonal", OF["ALiBi of each batch"], "slope * gl.abs(distances(", "slope * (distances("),
    ("the caller's mask inverted", OF["attn_mask of rows and keys"], "attn_mask != 0", "attn_mask == 0"),
    ("the caller's mask of the first head", Free(why="", sizes=GROUPS, attn_mask="1h1j"), "off_h.to(gl.int64) * stride_attn_mask_h", "off_hkv.to(gl.int64) * stride_attn_mask_h"),
    ("the bias of the first keys", OF["a bias with -inf"], "near_n.to(gl.int64) * stride_bias_n", "(near_n % 16).to(gl.int64) * stride_bias_n"),
    ("the bias of a thread's first key for all of its keys", SHARED, "far_n.to(gl.int64) * stride_bias_n", "0 * far_n.to(gl.int64) * stride_bias_n"),
    ("the bias of a thread's first rows for all of its rows", SHARED, "(places & -7).to(gl.int64) * stride_bias_m", "0 * (places & -7).to(gl.int64) * stride_bias_m"),
    ("the last row's bias is that of the row before", SHARED, "COLUMN), seqlen_q - 1).to(gl.uint32)", "COLUMN), seqlen_q - 2).to(gl.uint32)"),
    ("the bias's gradient after the score's derivative", OF["a bias of every pair, under a score"], "largest_ptr, ds, exists", "largest_ptr, ds * 1.05, exists"),
    ("the bias's gradient of one row", OF["a bias of keys"], "gl.sum(ds, 1), offs_n", "gl.max(ds, 1), offs_n"),
    ("the bias's gradient stored by each head", SHARED, "dbias.numel() == batch * num_heads_q *", "dbias.numel() == batch *"),
    ("dq of the pass before", SHARED, "            dq_sum.zero_()\n", ""),
    ("turns of the pass before", SHARED, "            turns.zero_()\n", ""),
    ("units of twice the size", SHARED, "shift = (188 - term_bits", "shift = (187 - term_bits"),
    ("the least contribution noted", SHARED, "gl.max(gl.max(bits, 1), 0)", "gl.min(gl.min(bits, 1), 0)"),
    ("a second pass that adds no integers", SHARED, "None else 3, 3))", "None else 2, 3))"),
    ("dropout of the first head", DROPOUT, "(off_b * num_heads_kv + off_hkv) * group + member", "(off_b * num_heads_kv + off_hkv) * group"),
    ("dropout of the first keys", DROPOUT, "c0 = (start_n // 2 +", "c0 = (0 * start_n +"),
    ("dropout's words swapped", DROPOUT, "kept.permute((0, 4, 1, 2, 5, 3))", "kept.permute((0, 5, 1, 2, 4, 3))"),
    ("nine rounds of dropout", DROPOUT, "gl.static_range(10)", "gl.static_range(9)"),
    ("dp not dropped", DROPOUT, "dp = gl.where(signed_p < 0.0, 0.0, dp * dropout_scale)", "dp = dp * 1.0"),
    ("p not scaled for dv", DROPOUT, "gl.where(signed_p < 0.0, 0.0, signed_p * dropout_scale)", "gl.where(signed_p < 0.0, 0.0, signed_p)"),
    ("delta missing", SQUARED, "(dp - delta[None, :])", "dp"),
    ("dk not scaled", SOFTCAP, "k.store((dk * sm_scale).to(DTYPE))", "k.store(dk.to(DTYPE))"),
    ("dq not scaled", SOFTCAP, "PANEL]) * sm_scale", "PANEL])"),
    ("dq not added", WINDOWS, "        tma_reduce_add(dq_desc, [off_bh, m_block * (BLOCK_M * PANEL // 256), 0], dq_tiles.index(dq_stage))\n", "        pass\n"),
    ("dk and dv of the first head of a group", SQUARED, "off_h = heads_before + member", "off_h = heads_before"),
    ("the wrong heads of a group", SQUARED, "heads_before = off_hkv * group", "heads_before = off_hkv"),
    ("full blocks of a BlockMask masked", BLOCKS, "(kind == 2) | ((kind == 1) & allowed)", "(kind >= 1) & allowed"),
    ("a block that is not listed", BLOCKS, "(kind == 2) | ((kind == 1) & allowed)", "(kind == 2) | allowed"),
    ("the list of the first keys", LISTS, "wide_n * stride_row_blocks_n", "0 * wide_n * stride_row_blocks_n"),
    ("turns of a list counted from the front", LISTS, "(visits.flip(2).cumsum(2).flip(2) - visits)", "(visits.cumsum(2) - visits)"),
    ("kinds of the first head", OF["a BlockMask of each head, whose keys are shared"], "off_h.to(gl.int64) * stride_block_kinds_h", "off_hkv.to(gl.int64) * stride_block_kinds_h"),
)  # fmt: skip


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[name.replace(" ", "-") for name, *_ in MUTANTS])
def test_a_broken_line_is_noticed(index: int) -> None:
    name, case, old, new = MUTANTS[index]
    text = case.source.text
    assert old in text, f"{name}: not in the text any more"
    broken = text.replace(old, new)
    buffers, values = make(case, 2)
    try:
        launch(case, buffers, values, text=broken, schedule="priority", seed=3, max_steps=60_000)
    except SimulationError:
        return
    assert not buffers.check(references(ByIdentity(case), 2, True)).ok, f"{name}: nobody noticed"
