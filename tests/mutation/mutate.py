"""Break the template on purpose, one way at a time, and see which check notices: a suite that passes all is worthless.

    python tests/mutation/mutate.py [NAME ...]

prints a line for each mutant, after every check has passed on the whole templates; exit code 1 when one survives or a check fails.
`test_mutation.py` runs a sample of both as part of the tests.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

import backward_mutants as backward
import gluon_option_mutants as hopper
import jinja2
import option_mutants as options
from problems import BR, FAR, TL, Row, far_tensors, row

from flashgen import interpret, render
from flashgen.accuracy import check, make_buffers
from flashgen.assets import templates_dir
from flashgen.errors import AccuracyError, BuildError, RenderError
from flashgen.variants import by_name

FORWARD = "triton/attention_fwd.py.jinja"
SOFTMAX = "triton/parts/softmax.py.jinja"
LAUNCH = "triton/parts/launch_fwd.py.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One broken edit.

    Attributes:
        name: what is broken.
        old: text that stands in the template exactly once.
        new: what it becomes.
        file: the template.
        check: the one check that must notice; empty for any of the template's.
    """

    name: str
    old: str
    new: str
    file: str = FORWARD
    check: str = ""

    @property
    def checks(self) -> dict[str, Callable[[], None]]:
        """Those that run what the template is for."""
        if self.check:
            return {self.check: {**options.CHECKS, **hopper.CHECKS}[self.check]}
        found = CHECKS if self.file in (FORWARD, SOFTMAX, LAUNCH) else backward.CHECKS
        if "32-bit" in self.name:  # only far tensors show it: those first
            return dict(sorted(found.items(), key=lambda one: "far-" not in one[0]))
        return found


def mutant(name: str, old: str, new: str, file: str = FORWARD) -> Mutant:
    """A mutant in few words."""
    return Mutant(name=name, old=old, new=new, file=file)


CAUSAL_MASK = "visible {{ set_or_and }} (start_n + offs_n)[None, :] <= (offs_m + causal_offset)[:, None]"
KV_END = "kv_end = tl.minimum(seqlen_k, tl.maximum(last_m + causal_offset + 1, 0))"
FULL_END = "full_end = tl.minimum(kv_end, tl.maximum(start_m + causal_offset + 1, 0)) // BLOCK_N * BLOCK_N"
LOAD_Q = "q = tl.load(q_ptrs, mask=(offs_m < seqlen_q)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)"
LOAD_K = "k = tl.load(k_ptrs, mask=(start_n + offs_n < kv_end)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)"
LOAD_V = "v = tl.load(v_ptrs, mask=(start_n + offs_n < kv_end)[:, None] & (offs_dv < HEAD_DIM_V)[None, :], other=0.0)"
STORE_O = "acc.to(o_ptr.dtype.element_ty), mask=(offs_m < seqlen_q)[:, None] & (offs_dv < HEAD_DIM_V)[None, :]"
DOT_PV = 'acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")'
# As it stands where sequences are not packed.
HKV = "off_hkv = (off_h // (num_heads_q // num_heads_kv)).to(tl.int64)\n    off_b ="
Q_SHAPE = "batch, seqlen_q, num_heads_q, _ = q.shape\n"
K_SHAPE = "_, seqlen_k, num_heads_kv, _ = k.shape\n"

MUTANTS: tuple[Mutant, ...] = (
    # -- masks and ranges --
    mutant("the causal mask shows one key too many", CAUSAL_MASK, CAUSAL_MASK.replace("offset)", "offset + 1)")),
    mutant("the causal mask hides the diagonal", CAUSAL_MASK, CAUSAL_MASK.replace("<=", "<")),
    mutant("always top-left", Q_SHAPE, f"{Q_SHAPE}    causal_offset = 0\n", LAUNCH),
    mutant("always bottom-right", K_SHAPE, f"{K_SHAPE}    causal_offset = seqlen_k - seqlen_q\n", LAUNCH),
    mutant("kv_end one key short", KV_END, KV_END.replace("causal_offset + 1", "causal_offset")),
    mutant("kv_end one key far", KV_END, KV_END.replace("causal_offset + 1", "causal_offset + 2")),
    mutant("kv_end ignores seqlen_k", KV_END, "kv_end = tl.maximum(last_m + causal_offset + 1, 0)"),
    mutant("full_end not rounded to a block", FULL_END, FULL_END.removesuffix(" // BLOCK_N * BLOCK_N")),
    mutant("full_end of the tile's last row", FULL_END, FULL_END.replace("start_m", "last_m")),
    mutant("full_end not rounded, not causal", "full_end = kv_end // BLOCK_N * BLOCK_N", "full_end = kv_end"),
    mutant(
        "the ragged tail of keys is seen, causal", "visible &= (start_n + offs_n < kv_end)[None, :]", "visible &= True"
    ),
    mutant(
        "the ragged tail of keys is seen",
        " visible {{ set_or_and }} (start_n + offs_n < kv_end)[None, :]",
        " visible = (start_n + offs_n >= 0)[None, :]",
    ),
    mutant(
        "the first tile of rows is skipped",
        "(num_m_blocks - 1 - pid % num_m_blocks)",
        "(num_m_blocks - pid % num_m_blocks)",
    ),
    # -- softmax --
    mutant("acc not rescaled", DOT_PV, DOT_PV.replace(" * alpha[:, None]", "")),
    mutant("l not rescaled", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)", SOFTMAX),
    mutant(
        "m not carried over",
        "m_new = tl.maximum(m_i, tl.max(scores, 1) * qk_scale)",
        "m_new = tl.max(scores, 1) * qk_scale",
        SOFTMAX,
    ),
    mutant(
        "no guard against -inf minus -inf",
        'm_safe = tl.where(m_new == -float("inf"), 0.0, m_new)',
        "m_safe = m_new",
        SOFTMAX,
    ),
    mutant("the maximum of unmasked blocks not scaled", "tl.max(scores, 1) * qk_scale", "tl.max(scores, 1)", SOFTMAX),
    mutant("a negative scale not flipped", "if sm_scale < 0:", "if sm_scale != sm_scale:", LAUNCH),
    mutant("a negative scale not folded into q", "q, sm_scale = -q, -sm_scale", "q, sm_scale = q, -sm_scale", LAUNCH),
    mutant(
        "no qk_scale",
        "p = tl.exp2(scores * qk_scale - m_safe[:, None])",
        "p = tl.exp2(scores - m_safe[:, None])",
        SOFTMAX,
    ),
    mutant(
        "no qk_scale, fp32",
        "p = tl.exp2((scores - m_safe[:, None]) * qk_scale)",
        "p = tl.exp2(scores - m_safe[:, None])",
        SOFTMAX,
    ),
    mutant(
        "alpha not scaled, fp32", "alpha = tl.exp2((m_i - m_safe) * qk_scale)", "alpha = tl.exp2(m_i - m_safe)", SOFTMAX
    ),
    mutant("lse of an unscaled maximum, fp32", "(m_i * qk_scale + tl.log2(l_i))", "(m_i + tl.log2(l_i) * 1.0)"),
    mutant("a scale of 0 left in the kernel", "q, sm_scale = q * 0.0, 1.0", "pass", LAUNCH),
    mutant("base e where base 2 is meant", "qk_scale = sm_scale * 1.4426950408889634", "qk_scale = sm_scale * 1.0"),
    mutant("lse in base 2", "(m_i + tl.log2(l_i)) * 0.6931471805599453", "(m_i + tl.log2(l_i))"),
    mutant("lse without the maximum", "(m_i + tl.log2(l_i))", "tl.log2(l_i)"),
    mutant("the output not normalised", "acc = acc / tl.where(has_key, l_i, 1.0)[:, None]", "acc = acc * 1.0"),
    mutant("0/0 for rows without a key", "tl.where(has_key, l_i, 1.0)[:, None]", "l_i[:, None]"),
    # -- precision --
    mutant(
        "scores rounded to the input dtype",
        'qk = tl.dot(q, tl.trans(k), input_precision="ieee")',
        'qk = tl.dot(q, tl.trans(k), input_precision="ieee").to(q.dtype).to(tl.float32)',
    ),
    mutant("acc rounded to the input dtype at each step", DOT_PV, f"{DOT_PV}.to(v.dtype).to(tl.float32)"),
    mutant("p not rounded to the values' dtype", "p.to(v.dtype), v,", "p, v,"),
    # -- addresses --
    mutant(
        "the wrong key/value head", HKV, HKV.replace("off_h // (num_heads_q // num_heads_kv)", "off_h % num_heads_kv")
    ),
    mutant("q's batch stride for k", "k_ptr += off_b * stride_kb", "k_ptr += off_b * stride_qb"),
    mutant(
        "k's head stride for v", "off_b * stride_vb + off_hkv * stride_vh", "off_b * stride_vb + off_hkv * stride_kh"
    ),
    mutant("k's row stride for v", "v_ptrs = v_ptr + first * stride_vn", "v_ptrs = v_ptr + first * stride_kn"),
    mutant(
        "q's row stride for o", "offs_m.to(tl.int64)[:, None] * stride_om", "offs_m.to(tl.int64)[:, None] * stride_qm"
    ),
    mutant("lse of the wrong head", "lse_ptr + off_bh.to(tl.int64)", "lse_ptr + off_h.to(tl.int64)"),
    mutant("q's padding columns read", LOAD_Q, LOAD_Q.replace(" & (offs_d < HEAD_DIM)[None, :]", "")),
    mutant("k's padding columns read, masked", LOAD_K, LOAD_K.replace(" & (offs_d < HEAD_DIM)[None, :]", "")),
    mutant(
        "k's padding columns read, unmasked",
        "k = tl.load(k_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)",
        "k = tl.load(k_ptrs)",
    ),
    mutant("k's rows beyond the end read", LOAD_K, LOAD_K.replace("(start_n + offs_n < kv_end)[:, None] & ", "")),
    mutant("v not zeroed under the mask", LOAD_V, LOAD_V.replace("(start_n + offs_n < kv_end)[:, None] & ", "")),
    mutant("rows beyond the end stored", STORE_O, STORE_O.replace("(offs_m < seqlen_q)[:, None] & ", "")),
    mutant("padding columns stored", STORE_O, STORE_O.replace(" & (offs_dv < HEAD_DIM_V)[None, :]", "")),
    mutant("lse beyond the end stored", "seqlen_q + offs_m, lse, mask=offs_m < seqlen_q)", "seqlen_q + offs_m, lse)"),
    mutant("32-bit batch offsets", "off_b = (off_bh // num_heads_q).to(tl.int64)", "off_b = off_bh // num_heads_q"),
    mutant("32-bit key/value head offsets", HKV, HKV.replace(".to(tl.int64)\n    off_b", "\n    off_b")),
    mutant("32-bit row offsets of q", "offs_m.to(tl.int64)[:, None] * stride_qm", "offs_m[:, None] * stride_qm"),
    mutant("32-bit row offsets of k", "offs_n.to(tl.int64)[:, None] * stride_kn", "offs_n[:, None] * stride_kn"),
    mutant("32-bit row offsets of o", "offs_m.to(tl.int64)[:, None] * stride_om", "offs_m[:, None] * stride_om"),
    mutant("32-bit block offsets", "first = tl.full([], start_n, tl.int64)", "first = start_n"),
    *(mutant(f"backward: {name}", old, new, backward.TEMPLATE) for name, old, new in backward.MUTANTS),
    *(mutant(f"backward: {name}", old, new, backward.TILES) for name, old, new in backward.TILE_MUTANTS),
    *(
        Mutant(name=f"options: {name}", old=old, new=new, file=file, check=f"options-{check}")
        for name, old, new, file, check in options.MUTANTS
    ),
    *(
        Mutant(name=f"options, Hopper: {name}", old=old, new=new, file=file, check=f"Hopper options-{check}")
        for name, old, new, file, check in hopper.MUTANTS
    ),
)

# The least table that kills them all; what each row is for stands in the table of tests/problems.py.
ROWS: tuple[Row, ...] = (
    row("", "fp16", 17, 35, 37, dv=20, causal=BR, heads=(4, 2), batch=2),
    row("", "fp32", 16, 20, 75, blocks=(32, 16)),
    row("", "bf16", 32, 75, 20, causal=BR),
    row("", "fp16", 16, 20, 75, causal=TL, blocks=(16, 64)),
    row("", "fp32", 16, 50, 20, causal=TL),
    row("", "bf16", 33, 20, 83, dv=16, blocks=(32, 16)),
    row("", "bf16", 64, 20, 75, values="low"),
    row("", "fp16", 32, 20, 75, scale=-0.25, values="large"),
    row("", "bf16", 32, 75, 40, scale=0.0, causal=BR),
)


def _run_row(case: Row) -> None:
    buffers = make_buffers(case.problem, seed=1, strides=case.strides, values=case.values)
    b = buffers
    _launch(buffers.problem.spec, case.blocks, (b.q, b.k, b.v, b.o, b.lse), b.scalars)
    buffers.check().require(case.id)


def _run_far(where: str, tensor: str) -> None:
    buffers, tensors = far_tensors(where, tensor, "fp16")
    _launch(buffers.problem.spec, FAR[where][-1], (*tensors.values(), buffers.lse), buffers.scalars)
    check(tensors["o"], buffers.lse, *buffers.references(), "fp16").require(f"{tensor} by {where}")


def _launch(spec: Any, blocks: tuple[int, int], tensors: tuple[Any, ...], scalars: dict[str, Any]) -> None:
    source = render.render(spec, by_name("triton_fwd"))
    interpret.launch(source, *tensors, **scalars, BLOCK_M=blocks[0], BLOCK_N=blocks[1], num_warps=4, num_stages=2)


CHECKS: dict[str, Callable[[], None]] = {
    **{case.id: (lambda case=case: _run_row(case)) for case in ROWS},
    **{
        f"far-{tensor}-{where}": (lambda where=where, tensor=tensor: _run_far(where, tensor))
        for where, tensor in (("batch", "k"), ("head", "v"), ("row", "q"), ("row", "k"), ("row", "o"), ("block", "k"))
    },
}


class _Compiled(jinja2.BytecodeCache):
    """Templates compiled to Python, by their text: all but the broken one are those of the mutant before, in another folder."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Any] = {}

    def get_cache_key(self, name: str, filename: str | None = None) -> str:
        return name

    def load_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        bucket.code = self._found.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        self._found[bucket.key, bucket.checksum] = bucket.code


_COMPILED = _Compiled()


@contextlib.contextmanager
def templates_of(folder: Path) -> Iterator[None]:
    """Render from another folder of templates."""

    def forget() -> None:
        render._environment.cache_clear()
        render.render.cache_clear()

    with mock.patch.object(render, "templates_dir", lambda: folder):
        forget()
        render._environment().bytecode_cache = _COMPILED
        try:
            yield
        finally:
            forget()


def place_of(broken: Mutant) -> str:
    """Which template holds the text to break.

    Raises:
        ValueError: it does not stand there exactly once.
    """
    holds = [part for part in parts_of(broken.file) for _ in range(_text(part).count(broken.old))]
    if len(holds) != 1:
        raise ValueError(f"{broken.name}: {broken.file} holds {len(holds)} times, not once: {broken.old!r}")
    return holds[0]


def apply(broken: Mutant, folder: Path) -> None:
    """Put the templates, one of them broken, into a folder.

    Raises:
        ValueError: as `place_of`.
    """
    part = place_of(broken)
    shutil.copytree(templates_dir(), folder, dirs_exist_ok=True)
    (folder / part).write_text(_text(part).replace(broken.old, broken.new))


@functools.cache
def _text(part: str) -> str:
    return (templates_dir() / part).read_text()


@functools.cache
def parts_of(file: str) -> list[str]:
    """A template and all that it includes or imports, each once."""
    found = [file]
    for name in found:
        for part in re.findall(r'{% (?:include|from) "(.+?)"', _text(name)):
            if part not in found:
                found.append(part)
    return found


def caught_by(broken: Mutant) -> tuple[str, str] | None:
    """The first check that notices, and what it says; None when the mutant survives."""
    with tempfile.TemporaryDirectory() as folder:
        apply(broken, Path(folder))
        with templates_of(Path(folder)):
            for name, run in broken.checks.items():
                try:
                    run()
                except (AccuracyError, BuildError, RenderError) as error:
                    return name, str(error)
    return None


def whole() -> dict[str, Callable[[], None]]:
    """Every check, by name: what passes on the whole templates, or a mutant that it notices shows nothing."""
    return {**CHECKS, **backward.CHECKS, **options.CHECKS, **hopper.CHECKS}


def main(names: list[str]) -> int:
    """Report on the named mutants, or on all."""
    survivors = 0
    for name, run in {} if names else whole().items():
        try:
            run()
        except (AccuracyError, BuildError, RenderError) as error:
            survivors += 1
            print(f"FAILED    {name}, and no template is broken: {str(error).splitlines()[0][:200]}", flush=True)
    for broken in MUTANTS:
        if names and not any(name in broken.name for name in names):
            continue
        result = caught_by(broken)
        survivors += result is None
        if result is None:
            print(f"SURVIVED  {broken.name}", flush=True)
        else:
            print(f"caught    {broken.name}\n          by {result[0]}: {result[1].splitlines()[0][:200]}", flush=True)
    print(f"{survivors} survived or failed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
