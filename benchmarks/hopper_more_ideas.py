"""Further ideas for the Hopper forward as edits of its rendered text, beside those of `hopper_ideas.py`; timed in its runs 3 and 4.

`named` gives buffers back at named barriers, `ring` keeps two tiles of queries, `early-ticket` hands the next ticket on before a tile's last block,
`integers` takes maxima as integers (a diagnosis: wrong where a row's scores are all negative), `guarded` mends that by a branch in PTX,
`q-free` frees queries' memory once they are in registers (with `q-registers`). They edit a causal
kernel of head dims over 64, whose text is the one that they were timed on; elsewhere the template has taken some of them.
"""

from __future__ import annotations

import re

from hopper_ideas import SOFTMAX, Edit, once

from flashgen.spec import AttentionSpec

_NAMED = '''@gluon.jit
def release(stage, FIRST: gl.constexpr, NUM_WG: gl.constexpr):
    gl.inline_asm_elementwise(
        f"{{ .reg .b32 n; add.s32 n, $1, {FIRST}; bar.arrive n, {NUM_WG * 128 + 32}; mov.b32 $0, 0; }}",
        "=r,r", [stage], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_release(stage, step, STAGES: gl.constexpr, FIRST: gl.constexpr, NUM_WG: gl.constexpr):
    gl.inline_asm_elementwise(
        f"{{ .reg .b32 n; .reg .pred used; setp.ge.s32 used, $2, {STAGES}; add.s32 n, $1, {FIRST}; @used bar.sync n, {NUM_WG * 128 + 32}; mov.b32 $0, 0; }}",
        "=r,r,r", [stage, step], dtype=gl.int32, is_pure=False, pack=1
    )


'''  # fmt: skip


def named(text: str, spec: AttentionSpec) -> str:
    """A buffer is given back at a named barrier, a warp at a time: no barrier of the partition."""
    text = once(text, "# -- the producer: one warp --\n\n\n", "# -- the producer: one warp --\n\n\n" + _NAMED)
    text = once(text, "FIRST_TURN = gl.constexpr(8)", "FIRST_TURN = gl.constexpr(6)")
    keys, values = "6 + NUM_WG", "6 + NUM_WG + STAGES"
    text, found = re.subn(
        r"mbarrier\.arrive\(k_empty\.index\((.*?)\), count=1\)\n", rf"release(\1, {keys}, NUM_WG)\n", text
    )
    values = values if found else keys  # after `joint`
    text = re.sub(r"mbarrier\.arrive\(v_empty\.index\((.*?)\), count=1\)\n", rf"release(\1, {values}, NUM_WG)\n", text)
    for name, first in (("k", keys), ("v", values)):
        wait = f"mbarrier.wait({name}_empty.index(stage), phase ^ 1)"
        text = text.replace(wait, f"await_release(stage, step, STAGES, {first}, NUM_WG)")
    return text


def ring(text: str, spec: AttentionSpec) -> str:
    """Two tiles of queries: the next tile's are loaded under this one's work."""
    start = text.index("        for w in gl.static_range(NUM_WG):\n            mbarrier.wait(q_empty")
    stop = text.index("        n_blocks = key_blocks(", start)
    load = text[start:stop].replace("index(w)", "index(place + w)").replace("(turn & 1) ^ 1", "((turn >> 1) & 1) ^ 1")
    text = text[:start] + "        place = (turn & 1) * NUM_WG\n" + load + text[stop:]
    text = once(text, "    q = q_tiles.index(WG).reshape([WG_ROWS, BLOCK_D])\n", "")
    text = once(
        text, "        mbarrier.wait(q_full.index(WG), turn & 1)\n", "        place = (turn & 1) * NUM_WG + WG\n"
        "        q = q_tiles.index(place).reshape([WG_ROWS, BLOCK_D])\n        mbarrier.wait(q_full.index(place), (turn >> 1) & 1)\n",
    )  # fmt: skip
    text = text.replace("mbarrier.arrive(q_empty.index(WG), count=1)", "mbarrier.arrive(q_empty.index(place), count=1)")
    text = once(text, "gl.allocate_shared_memory(DTYPE, [NUM_WG, 1, PACK, ROWS, BLOCK_D], q_desc", "gl.allocate_shared_memory(DTYPE, [2 * NUM_WG, 1, PACK, ROWS, BLOCK_D], q_desc")  # fmt: skip
    for name in ("q_full", "q_empty"):
        text = once(text, f"{name} = gl.allocate_shared_memory(gl.int64, [NUM_WG,", f"{name} = gl.allocate_shared_memory(gl.int64, [2 * NUM_WG,")  # fmt: skip
    return once(text, "    for w in gl.static_range(NUM_WG):\n        mbarrier.init(", "    for w in gl.static_range(2 * NUM_WG):\n        mbarrier.init(")  # fmt: skip


def early_ticket(text: str, spec: AttentionSpec) -> str:
    """The ticket is drawn and handed on before the last block is loaded."""
    start = text.index("        for j in range(n_blocks):\n")
    draw = text.index("        # -- the next ticket; whoever draws")
    stop = text.index("        turn += 1\n\n\n# -- the consumers")
    body = text[start:draw].split("\n", 1)[1]
    last = "        j = n_blocks - 1\n        if True:\n" + body
    return text[:start] + "        for j in range(n_blocks - 1):\n" + body + text[draw:stop] + last + text[stop:]


def integers(text: str, spec: AttentionSpec) -> str:
    """Maxima as integers, three at a time."""
    return once(text, "gl.max(qk, 1) * qk_scale", "gl.max(qk.to(gl.int32, bitcast=True), 1).to(gl.float32, bitcast=True) * qk_scale")  # fmt: skip


def _chain(operation: str, count: int) -> str:
    """PTX of the extreme of operands $1 to $count, in m: two chains of three-operand comparisons."""
    half = count // 2
    text = f"{operation} m, $1, $2; {operation} a, ${half + 1}, ${half + 2}; "
    for i in range(3, half + 1):
        text += f"{operation} m, m, ${i}; {operation} a, a, ${half + i}; "
    return text + f"{operation} m, m, a; "


def guarded(text: str, spec: AttentionSpec) -> str:
    """`integers`, and the least of what a lane holds as unsigned integers where all of it is negative."""
    lines = ["@gluon.jit", "def row_max(scores, BLOCK_N: gl.constexpr):"]
    lines += ["    x = scores.to(gl.int32, bitcast=True).reshape([WG_ROWS, BLOCK_N // 8, 4, 2])"]
    for arm, block_n in (("if BLOCK_N == 128", 128), ("else", 64)):
        lines += [f"    {arm}:", "        x0, x1 = gl.split(x)"]
        names, size = ["x0", "x1"], block_n // 8
        while size > 1:
            size //= 2
            for name in names:
                lines.append(
                    f"        {name}_0, {name}_1 = gl.split({name}.reshape([WG_ROWS, {size}, 2, 4]).permute((0, 1, 3, 2)))"
                )
            names = [f"{name}_{i}" for name in names for i in (0, 1)]
        asm = (
            "{ .reg .s32 m, a, n; .reg .pred p, s; " + _chain("max.s32", len(names)) + "setp.lt.s32 p, m, 0; vote.sync.any.pred s, p, 0xffffffff; "
            "@!s bra DONE; mov.b32 n, m; " + _chain("min.u32", len(names)) + "selp.b32 m, m, n, p; DONE: mov.b32 $0, m; }"
        )  # fmt: skip
        operands = ", ".join(f"{name}.reshape([WG_ROWS, 4])" for name in names)
        constraints = ",".join(["=r"] + ["r"] * len(names))
        lines.append(
            f'        m = gl.inline_asm_elementwise("{asm}", "{constraints}", [{operands}], dtype=gl.int32, is_pure=True, pack=1)'
        )
    lines += ["    return gl.max(m.to(gl.float32, bitcast=True), 1)"]
    text = once(text, SOFTMAX, "\n".join(lines) + "\n\n\n" + SOFTMAX)
    return once(text, "gl.max(qk, 1) * qk_scale", "gl.convert_layout(row_max(qk, BLOCK_N), m_i.type.layout) * qk_scale")


def q_free(text: str, spec: AttentionSpec) -> str:
    """With `q-registers`: queries' memory is free once they are in registers."""
    arrive = "        if OWN_STAGING:\n            mbarrier.arrive(q_empty.index(WG), count=1)\n"
    load = "QK_LAYOUT, 2))\n        fence_async_shared()\n"
    return once(once(text, arrive, ""), load, load + arrive)


MORE: dict[str, Edit] = {
    "named": named,
    "ring": ring,
    "early-ticket": early_ticket,
    "integers": integers,
    "guarded": guarded,
    "q-free": q_free,
}
