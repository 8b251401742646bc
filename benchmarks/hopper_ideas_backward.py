"""Ideas for the plain Hopper backward, as edits of the rendered text: `hopper_experiments.py --op attention_bwd` compiles, checks and times them.

Each raises where its text is not what it expects: the template has changed under the idea. `results/h200_backward_ideas.csv` holds what they did.
"""

from __future__ import annotations

import re

from hopper_edits import Edit, once

from flashgen.spec import AttentionSpec

_STEP = "        member, m_block = block_of(step, group, begin, full, end)\n"
_TURN = re.compile(
    r"        if DETERMINISTIC:\n            # -- wait for the thread blocks.*?            is_first = [^\n]*\n",
    re.DOTALL,
)
_MEET = "    # The other warpgroup may still be reading what was here.\n    partition_barrier()\n"


def poll_early(text: str, spec: AttentionSpec) -> str:
    """The writer asks for its turn while dq is still being computed, not once it is staged."""
    turn = _TURN.search(text)
    if turn is None:
        raise ValueError("no turn is waited for")
    text = once(text, turn[0], "")
    asked = turn[0].replace("        if DETERMINISTIC:\n", "        is_first = False\n        if DETERMINISTIC:\n", 1)
    text = re.sub(r"        is_first = False  #[^\n]*\n", "", text)
    text = text.replace(
        "        else:\n            if state == 0:", "        if not DETERMINISTIC:\n            if state == 0:"
    )
    before, after = text.split("def write_dq(")
    line = "        off_bh = bh_before + member\n"
    return before + "def write_dq(" + after.replace(line, line + asked, 1)


def rotate(text: str, spec: AttentionSpec) -> str:
    """Without a mask each block of keys starts at rows of its own. Only for sums in any order: in a fixed one they would wait in a circle."""
    if spec.causal:
        return text
    before, after = text.split("def write_dq(")
    before = once(before, _STEP, _STEP + "        m_block = (m_block + start_n // BLOCK_M) % end\n")
    after = once(after, _STEP, _STEP + "        m_block = (m_block + n_block * BLOCK_N // BLOCK_M) % end\n")
    return before + "def write_dq(" + after


def pdl(text: str, spec: AttentionSpec) -> str:
    """Programmatic dependent launch: each of the three kernels is put in place while the one before it ends."""
    asm = '{}.inline_asm_elementwise("griddepcontrol.{}; mov.b32 $0, 0;", "=r", [], dtype={}.int32, is_pure=False, pack=1)\n'
    wait, go = ("    " + asm.format("gl", what, "gl") for what in ("wait", "launch_dependents"))
    text = once(text, "    heads_before = off_hkv * group\n", "    heads_before = off_hkv * group\n" + wait)
    before, after = text.split("def write_dq(")
    line = "    bh_before = (off_b * num_heads_kv + off_hkv) * group\n"
    text = before + "def write_dq(" + after.replace(line, line + go + wait, 1)
    for name, what in (("preprocess", "launch_dependents"), ("postprocess", "wait")):
        at = text.index("    num_m_blocks", text.index(f"def attention_bwd_{name}("))
        text = text[:at] + "    " + asm.format("tl", what, "tl") + text[at:]
    before, after = text.split("    attention_bwd[(")
    after = after.replace("enable_fp_fusion=True,", "enable_fp_fusion=True, launch_pdl=True,")
    return before + "    attention_bwd[(" + after


def lse_early(text: str, spec: AttentionSpec) -> str:
    """Lse is loaded while scores are multiplied."""
    load = "    lse = lse_tiles.index(stage).reshape([BLOCK_M]).load(COLUMN)\n"
    text = once(text, load, "")
    product = re.search(r"    dp_product = warpgroup_mma\(v[^\n]*\n(    dp_product = [^\n]*\n)?", text)
    if product is None:
        raise ValueError("no product of dp")
    return text[: product.end()] + load + text[product.end() :]


def meet_early(text: str, spec: AttentionSpec) -> str:
    """Warpgroups meet between the exponentials and the wait for dp, which ptxas then leaves there."""
    where = "    # -- ds: in registers for dk, in shared memory for dq --\n"
    return once(once(text, _MEET, ""), where, _MEET + where)


def start_at_delta(text: str, spec: AttentionSpec) -> str:
    """Adds dp to -delta: nothing is subtracted while tensor cores wait for ds. Not timed yet."""
    load = "    delta = delta_tiles.index(stage).reshape([BLOCK_M]).load(COLUMN)\n"
    product = "    dp_product = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)\n"
    start = load.replace("delta = ", "start = 0.0 - ", 1) + "    _, start = gl.broadcast(nothing, start[None, :])\n"
    text = once(once(text, load, ""), "(p * (dp - delta[None, :])).to(DTYPE)", "(p * dp).to(DTYPE)")
    return once(text, product, start + product.replace("nothing, use_acc=False", "start"))


_HALVES = """    # -- scores and dp of both halves --
    HALF: gl.constexpr = BLOCK_M // 2
    q_1, q_2 = q.slice(0, HALF, dim=0), q.slice(HALF, HALF, dim=0)
    do_1, do_2 = do.slice(0, HALF, dim=0), do.slice(HALF, HALF, dim=0)
    lse_tile, delta_tile = lse_tiles.index(stage).reshape([BLOCK_M]), delta_tiles.index(stage).reshape([BLOCK_M])
    v = v_tile.reshape([BLOCK_N, BLOCK_DV])
    ds_tile = ds_tiles.index(step % DS_STAGES)
    mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)
    scores_1 = warpgroup_mma(k, q_1.permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(stage), (step // STAGES) & 1)
    dp_1 = warpgroup_mma(v, do_1.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores_2 = warpgroup_mma(k, q_2.permute((1, 0)), nothing, use_acc=False, is_async=True)
    p = warpgroup_mma_wait(2, deps=(scores_1,))
    p = gl.exp2(p * qk_scale - lse_tile.slice(0, HALF, dim=0).load(COLUMN)[None, :])
    if IS_MASKED:
        rows_m = start_m + gl.arange(0, HALF, COLUMN)
        p = gl.where(first_m[:, None] <= rows_m[None, :], p, 0.0)
    p_operand = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
    partition_barrier()
    dv = warpgroup_mma(p_operand, do_1, dv, is_async=True)
    dp = warpgroup_mma_wait(2, deps=(dp_1,))
    ds = (p * (dp - delta_tile.slice(0, HALF, dim=0).load(COLUMN)[None, :])).to(DTYPE)
    ds_tile.slice(0, HALF, dim=1).store(ds)
    dp_2 = warpgroup_mma(v, do_2.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dk = warpgroup_mma(gl.convert_layout(ds, DS_LAYOUT), q_1, dk, is_async=True)
    p = warpgroup_mma_wait(3, deps=(scores_2,))
    p = gl.exp2(p * qk_scale - lse_tile.slice(HALF, HALF, dim=0).load(COLUMN)[None, :])
    if IS_MASKED:
        rows_m = start_m + HALF + gl.arange(0, HALF, COLUMN)
        p = gl.where(first_m[:, None] <= rows_m[None, :], p, 0.0)
    p_operand = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
    dv = warpgroup_mma(p_operand, do_2, dv, is_async=True)
    dp = warpgroup_mma_wait(2, deps=(dp_2,))
    ds = (p * (dp - delta_tile.slice(HALF, HALF, dim=0).load(COLUMN)[None, :])).to(DTYPE)
    ds_tile.slice(HALF, HALF, dim=1).store(ds)
    fence_async_shared()
    dq_product = warpgroup_mma(ds_tile.permute((1, 0)), k, no_dq, use_acc=False, is_async=True)
    dk = warpgroup_mma(gl.convert_layout(ds, DS_LAYOUT), q_2, dk, is_async=True)
    dq, dv = warpgroup_mma_wait(1, deps=(dq_product, dv))
    dq_stage = step % DQ_STAGES
    mbarrier.wait(dq_empty.index(dq_stage), ((step // DQ_STAGES) & 1) ^ 1)
    dq_tile = dq_tiles.index(dq_stage).reshape([BLOCK_M * BLOCK_D // 256, 256])
    dq_tile.store(in_register_order(dq, BLOCK_M, BLOCK_D, WARP_COLS))
    dk = warpgroup_mma_wait(0, deps=(dk,))
    fence_async_shared()
    hand_over(dq_stage, BLOCK_N // 16)
    return scores, dk, dv


"""


def halves(text: str, spec: AttentionSpec) -> str:
    """128 rows in two halves: exponentials of one under products of the other. SCORES_AHEAD must be False."""
    start = text.index("    # -- scores of this block, and dp --\n", text.index("def attend("))
    text = text[:start] + _HALVES + text[text.index("@gluon.jit\ndef consume(", start) :]
    text = once(text, "[WARPS, 1], instr_shape=[16, BLOCK_M, 16]", "[WARPS, 1], instr_shape=[16, BLOCK_M // 2, 16]")
    return once(text, "nothing = gl.zeros([BLOCK_N, BLOCK_M]", "nothing = gl.zeros([BLOCK_N, BLOCK_M // 2]")


IDEAS: dict[str, Edit] = {
    "poll-early": poll_early,
    "rotate": rotate,
    "pdl": pdl,
    "lse-early": lse_early,
    "meet-early": meet_early,
    "start-at-delta": start_at_delta,
    "halves": halves,
}
