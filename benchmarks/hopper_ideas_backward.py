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


def two_writers(text: str, spec: AttentionSpec) -> str:
    """Two writer warps take the steps in turn: what one waits for in order, the other need not. DQ_STAGES must be 2."""
    constants = "    DQ_STAGES: gl.constexpr,\n    DETERMINISTIC: gl.constexpr,\n"
    text = once(text, constants + "):\n", constants + "    FIRST: gl.constexpr,\n):\n")
    loop = "    for step in range(group * (end - begin)):"
    before, after = text.split("def write_dq(")
    text = (
        before
        + "def write_dq("
        + after.replace(loop, loop.replace("range(", "range(FIRST, ").replace("):", ", 2):"), 1)
    )
    writer = re.search(r"            \(\n                write_dq,\n.*?\n            \),\n", text, re.DOTALL)
    if writer is None:
        raise ValueError("no writer")
    last = "                    DETERMINISTIC,\n"
    both = "".join(writer[0].replace(last, f"{last}                    {number},\n") for number in (0, 1))
    text = once(text, writer[0], both)
    text = once(text, "        [1, 1],\n", "        [1, 1, 1],\n")
    return once(
        text, "        [PRODUCER_REGS, PRODUCER_REGS],", "        [PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS],"
    )


IDEAS: dict[str, Edit] = {
    "poll-early": poll_early,
    "rotate": rotate,
    "pdl": pdl,
    "lse-early": lse_early,
    "meet-early": meet_early,
    "two-writers": two_writers,
}
