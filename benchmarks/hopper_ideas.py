"""Ideas for the Hopper kernels as edits of their rendered text: what `hopper_experiments.py` compiles, checks and times.

Forward: `late-wait` keeps the wait for a product behind the exponentials, `late-keys` and `last-keys` give key blocks back behind it,
`early-rescale` corrects what was accumulated under the next scores, `skip-same` jumps over a correction by 1, `q-registers` multiplies
queries from registers, `chains-N` takes a row's maximum in N chains of comparisons, `joint` loads keys and values on one barrier.
Backward: `late-dp-wait` is `late-wait` for dp, `late-dk` multiplies dk under the exponentials of the next step (three stages,
DV_FIRST, one buffer of ds), `no-reduce` leaves dq out: a diagnosis, wrong by construction.
"""

from __future__ import annotations

import re
import struct

import hopper_ideas_backward
from hopper_edits import Edit, once

from flashgen.spec import AttentionSpec
from flashgen.variants import by_name


def hexadecimal(value: float) -> str:
    """An fp32 number as PTX spells it."""
    return "0f" + struct.pack(">f", value).hex().upper()


# -- forward --

SOFTMAX = "@gluon.jit\ndef online_softmax("
_WAIT = "    acc = warpgroup_mma_wait(0, deps=(product,))\n    mbarrier.arrive(v_empty.index(v_stage), count=1)\n"
_KEYS = "    mbarrier.arrive(k_empty.index(k_stage), count=1)\n"
_EDGE = "    mbarrier.wait(v_full.index(v_stage), (step // STAGES) & 1)\n"
_RESCALE = "    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]\n"


def late_wait(text: str, spec: AttentionSpec) -> str:
    """A second wait for the same values ends ptxas's block, which else moves the wait for their product above the exponentials."""
    return once(text, _WAIT, _EDGE + _WAIT)


def late_keys(text: str, spec: AttentionSpec) -> str:
    """With `late-wait`: a key block is given back behind it, which saves a barrier of the partition."""
    return once(once(text, _KEYS, ""), _EDGE + _WAIT, _EDGE + _KEYS + _WAIT)


def last_keys(text: str, spec: AttentionSpec) -> str:
    """With `late-wait`: keys are given back together with values."""
    first, second = _WAIT.splitlines(keepends=True)
    return once(once(text, _KEYS, ""), _WAIT, first + _KEYS + second)


def early_rescale(text: str, spec: AttentionSpec) -> str:
    """What was accumulated is corrected under the next scores, not behind its own product."""
    text = once(text, _RESCALE + "    return p, acc, m_i, l_i\n", "    return p, acc, alpha, m_i, l_i\n")
    text = once(text, "    p,\n    acc,\n    m_i,\n    l_i,\n    qk_scale,\n    rows_m,\n", "    p,\n    acc,\n    alpha,\n    m_i,\n    l_i,\n    qk_scale,\n    rows_m,\n")  # fmt: skip
    product = "    product = warpgroup_mma(p, v, acc, is_async=True)\n"
    text = once(text, product, _RESCALE + product)
    text = text.replace("p, acc, m_i, l_i = attend(", "p, acc, alpha, m_i, l_i = attend(")
    text = re.sub(r"( +)acc,\n( +m_i,\n +l_i,\n +qk_scale,\n +rows_m,\n +n \*)", r"\1acc,\n\1alpha,\n\2", text)
    text = text.replace("        p, _, m_i, l_i = online_softmax(", "        p, alpha, m_i, l_i = online_softmax(")
    last = "        product = warpgroup_mma(p, v_tiles.index(stage)"
    return once(text, last, "    " + _RESCALE + last)


def rescale_unless(text: str, columns: int) -> str:
    """Registers of an accumulator are multiplied only where a warp holds a correction that is not 1."""
    held = columns // 2  # registers that a lane holds of 64 rows by `columns` on 128 lanes
    one = hexadecimal(1.0)
    muls = "".join(f"mul.ftz.f32 ${i}, ${i}, ${held * 2 + (i & 2)}; " for i in range(held))
    asm = (
        "{ .reg .pred p, s; "
        f"setp.neu.ftz.f32 p, ${held * 2}, {one}; setp.neu.or.ftz.f32 p, ${held * 2 + 2}, {one}, p; "
        f"vote.sync.any.pred s, p, 0xffffffff; @!s bra SAME; {muls} SAME: }}"
    )
    constraints = ",".join(["=f"] * held + [str(i) for i in range(held)] + ["f"] * held)
    helper = (
        "@gluon.jit\ndef rescale(acc, alpha):\n    return gl.inline_asm_elementwise(\n"
        f'        "{asm}",\n        "{constraints}", [acc, alpha], dtype=gl.float32, is_pure=True, pack={held}\n    )\n\n\n'
    )
    text = once(text, SOFTMAX, helper + SOFTMAX)
    return once(
        text, _RESCALE, "    acc = rescale(acc, gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None])\n"
    )


def skip_same(text: str, spec: AttentionSpec) -> str:
    """A correction by 1 is jumped over: the same bits."""
    return rescale_unless(text, int(by_name("gluon_fwd_sm90").block_dv(spec)))  # type: ignore[attr-defined]


def q_registers(text: str, spec: AttentionSpec) -> str:
    """Queries are register operands of the scores, loaded once a tile."""
    text = once(text, "    q = q_tiles.index(WG).reshape([WG_ROWS, BLOCK_D])\n", "")
    wait = "        mbarrier.wait(q_full.index(WG), turn & 1)\n"
    load = "        q = q_tiles.index(WG).reshape([WG_ROWS, BLOCK_D]).load(gl.DotOperandLayout(0, QK_LAYOUT, 2))\n"
    return once(text, wait, wait + load + "        fence_async_shared()\n")


def chains(text: str, spec: AttentionSpec, *, number: int) -> str:
    """The maximum of a row by several chains of comparisons; the kernel of head dim 64 has two."""
    shape, axis = ("[WG_ROWS, BLOCK_N // 8, 4, 2]", 1) if number == 2 else (
        f"[WG_ROWS, {number // 2}, BLOCK_N // {4 * number}, 4, 2]", 2
    )  # fmt: skip
    rest = "gl.max(gl.max(found, 2), 1)" if number == 2 else "gl.max(gl.max(gl.max(found, 3), 1), 1)"
    helper = (
        "@gluon.jit\ndef row_max(scores, BLOCK_N: gl.constexpr):\n"
        f"    found = gl.max(scores.reshape({shape}), {axis})\n    return {rest}\n\n\n"
    )
    if "def row_max(" in text:
        return re.sub(r"@gluon\.jit\ndef row_max\(.*?\n\n\n", lambda _: helper, text, count=1, flags=re.DOTALL)
    text = once(text, SOFTMAX, helper + SOFTMAX)
    return once(text, "gl.max(qk, 1) * qk_scale", "gl.convert_layout(row_max(qk, BLOCK_N), m_i.type.layout) * qk_scale")


def joint(text: str, spec: AttentionSpec) -> str:
    """Keys and values of a block come and go together: one barrier each way."""
    start, stop = (
        text.index("            # -- keys: zeros beyond"),
        text.index("            step += 1\n        # -- the next"),
    )
    text = text[:start] + (
        "            mbarrier.wait(v_empty.index(stage), phase ^ 1)\n"
        "            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)\n"
        "            tma_load(k_desc, [off_b, off_hkv, start_n, 0], k_full.index(stage), k_tiles.index(stage))\n"
        "            tma_load(v_desc, [off_b, off_hkv, start_n, 0], k_full.index(stage), v_tiles.index(stage))\n"
    ) + text[stop:]  # fmt: skip
    text = re.sub(r" +mbarrier\.arrive\(k_empty\.index\([^\n]*\n", "", text)
    return re.sub(r" +mbarrier\.wait\(v_full\.index\([^\n]*\n", "", text)


FORWARD: dict[str, Edit] = {
    "late-wait": late_wait,
    "late-keys": late_keys,
    "last-keys": last_keys,
    "early-rescale": early_rescale,
    "skip-same": skip_same,
    "q-registers": q_registers,
    "chains-2": lambda text, spec: chains(text, spec, number=2),
    "chains-4": lambda text, spec: chains(text, spec, number=4),
    "chains-8": lambda text, spec: chains(text, spec, number=8),
    "joint": joint,
}


# -- backward --

_OPERAND = "    p_operand = gl.convert_layout(p.to(DTYPE), P_LAYOUT)\n"


def late_dp_wait(text: str, spec: AttentionSpec) -> str:
    """All probabilities stand before the wait for dp: a tie for LLVM, the end of a block for ptxas."""
    edge = "    p = warpgroup_mma_wait(1, deps=(p,))\n    mbarrier.wait(do_full.index(stage), (step // STAGES) & 1)\n"
    return once(text, _OPERAND, edge + _OPERAND)


def late_dk(text: str, spec: AttentionSpec) -> str:
    """The product of dk is taken a step late, from shared memory, under the exponentials of the next."""
    dp = "    dp_product = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)\n"
    text = once(
        text, dp, dp + "    ds_tile = ds_tiles.index(0)\n"
        "    q_before = q_tiles.index(gl.maximum(step - 1, 0) % STAGES).reshape([BLOCK_M, BLOCK_D])\n"
        "    dk_product = warpgroup_mma(ds_tile, q_before, dk, is_async=True)\n",
    )  # fmt: skip
    text = once(text, "scores = warpgroup_mma_wait(1, deps=(scores_product,))", "scores = warpgroup_mma_wait(2, deps=(scores_product,))")  # fmt: skip
    start, stop = text.index("    if DV_FIRST:\n"), text.index("    delta = delta_tiles")
    text = text[:start] + (
        "    dv_product = warpgroup_mma(p_operand, do, dv, is_async=True)\n"
        "    dp, dk = warpgroup_mma_wait(1, deps=(dp_product, dk_product))\n"
    ) + text[stop:]  # fmt: skip
    text = once(
        text, "    if not DV_FIRST:\n        dv_product = warpgroup_mma(p_operand, do, dv, is_async=True)\n", ""
    )
    text = once(text, "    ds_operand = gl.convert_layout(ds, DS_LAYOUT)\n", "")
    text = once(text, "    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)\n", "")
    text = once(text, "    ds_tile = ds_tiles.index(step % DS_STAGES)\n", "    partition_barrier()\n")
    start = text.index("    dv = warpgroup_mma_wait(1, deps=(dv_product,))\n")
    stop = text.index("    dq_stage = step % DQ_STAGES\n", start)
    text = text[:start] + "    dv, dq = warpgroup_mma_wait(0, deps=(dv_product, dq_product))\n" + text[stop:]
    start, stop = (
        text.index("    if SCORES_AHEAD:\n        # The last step"),
        text.index("    # The fence stands behind"),
    )
    text = text[:start] + text[stop:]
    text = once(text, "    if SCORES_AHEAD:\n        scores = warpgroup_mma_wait(0, deps=(scores_product,))\n    return", "    return")  # fmt: skip
    text = once(text, "    q_tiles, k_tile, v_tile, _, _, _, _, _ = tiles\n", "    q_tiles, k_tile, v_tile, _, _, _, ds_tiles, _ = tiles\n")  # fmt: skip
    text = once(
        text, "    scores = nothing\n", "    scores = nothing\n    ds_tile = ds_tiles.index(0)\n"
        "    ds_tile.store(gl.zeros([BLOCK_N, BLOCK_M], DTYPE, SCORES_LAYOUT))\n    fence_async_shared()\n",
    )  # fmt: skip
    store = "    # -- store dk and dv through the memory of k and v, which nobody reads any more --\n"
    text = once(
        text, store, "    q = q_tiles.index((num_steps - 1) % STAGES).reshape([BLOCK_M, BLOCK_D])\n"
        "    dk = warpgroup_mma_wait(0, deps=(warpgroup_mma(ds_tile, q, dk, is_async=True),))\n" + store,
    )  # fmt: skip
    arrive = "        mbarrier.arrive(rows_empty.index(step % STAGES), count=1)\n"
    return once(text, arrive, "        if step > 0:\n    " + arrive.replace("step %", "(step - 1) %"))


def no_reduce(text: str, spec: AttentionSpec) -> str:
    """Staged dq is never added: what its way through L2 costs."""
    return re.sub(r"tma_(store|reduce_add)\(dq_desc, [^\n]*", "pass", text)


BACKWARD: dict[str, Edit] = {
    "late-dp-wait": late_dp_wait,
    "late-dk": late_dk,
    "no-reduce": no_reduce,
    **hopper_ideas_backward.IDEAS,
}
