"""Facts without a GPU: the reader of machine code on texts, the compiler itself on a few kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

import flashgen
from flashgen import AttentionSpec, BuildError, InvalidProblemError, KernelConfig, Target, UnsupportedProblemError, sass
from flashgen.compile_pool import CompilePool
from flashgen.facts import CompiledFacts, cached
from flashgen.render import KernelSource, render
from flashgen.variants import by_name

SPEC = AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64)
TILE = KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)

LOOPS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   MUFU.EX2 R3, R3 ;
        /*0030*/                   STL [R1], R3 ;
        /*0040*/              @P0  BRA 0x10 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
{selects}
        /*0200*/             @!P0  BRA 0x50 ;
        /*0210*/                   EXIT ;
        /*0220*/                   BRA 0x0 ;
"""


def test_the_main_loop_is_the_unmasked_innermost_one() -> None:
    selects = "\n".join(f"        /*{0x60 + 16 * i:04x}*/                   FSEL R4, R4, R5, P1 ;" for i in range(10))
    text = LOOPS.format(selects=selects)
    loops = sass.product_loops(sass.parse(text))
    assert [loop.masked for loop in loops] == [False, True]
    assert sass.main_loop(text) == {"total": 4, "hgmma": 1, "mufu": 1, "spill": 1, "other": 1}
    assert sass.main_loop("") == {}


def test_registers_that_nothing_wrote_are_found() -> None:
    """The shape of what ptxas 12.8 made of a narrow value tile: an increment of a register before its first write."""
    broken = """
        /*0000*/                   R2UR UR4, R6 ;
        /*0010*/                   UIADD3 UR46, UP0, UR46, 0x20, URZ ;
        /*0020*/                   UMOV UR7, 0xc0000010 ;
        /*0030*/                   USGXT.U32 UR6, UR4, 0xe ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56 ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R56, R32, gdesc[UR48].tnspB, R56 ;
"""
    assert [line.split(":")[0] for line in sass.undefined_registers(broken)] == ["0010", "0050"]
    assert sass.undefined_registers(broken.replace("UR46, 0x20", "UR4, 0x20").split("/*0050*/")[0]) == []


@pytest.mark.parametrize(("target", "product"), [("h100", "hgmma"), ("a100", "hmma")])
def test_the_compilers_facts(target: str, product: str) -> None:
    facts = flashgen.compile_facts(SPEC, TILE, Target.named(target))
    assert facts.arch == Target.named(target).arch and facts.num_warps == 4
    assert 32 <= facts.n_regs <= 255 and facts.spill_bytes == facts.stack_bytes == facts.loop_spill_ops == 0
    assert 16 * 1024 <= facts.smem_bytes <= Target.named(target).smem_bytes
    assert facts.loop[product] >= 8 and facts.loop["mufu"] >= 32 and facts.undefined_registers == 0
    assert cached(render(SPEC, by_name("triton_fwd")), Target.named(target), TILE) == facts
    assert CompiledFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_a_corrupt_cache_file_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = render(SPEC, by_name("triton_fwd")), Target.named("h100")
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    facts = flashgen.compile_facts(SPEC, TILE, target)
    (path,) = (tmp_path / "facts").iterdir()
    assert cached(source, target, TILE) == facts
    path.write_text("{")
    assert cached(source, target, TILE) is None
    path.write_text(json.dumps({**facts.to_json(), "format": 0}))
    assert cached(source, target, TILE) is None


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match="target 'cpu' is no GPU"):
        flashgen.compile_facts(SPEC, TILE, Target.named("cpu"))
    with pytest.raises(UnsupportedProblemError, match="softcap"):
        flashgen.compile_facts(replace(SPEC, softcap=True), TILE, Target.named("h100"))
    with pytest.raises(InvalidProblemError, match="power of two"):
        flashgen.compile_facts(
            SPEC, KernelConfig(**{"variant": "triton_fwd", **TILE, "BLOCK_M": 48}), Target.named("h100")
        )


def test_a_compiler_error_is_one_candidates_and_names_it() -> None:
    good = render(SPEC, by_name("triton_fwd"))
    broken = KernelSource(
        text=good.text.replace("tl.dot(q, tl.trans(k)", "tl.dot(q, tl.nonsense(k)"), spec=SPEC, variant="triton_fwd"
    )
    with CompilePool(workers=1) as pool:
        ((config, result),) = pool.map(broken, Target.named("h100"), [TILE])
    assert config == TILE and isinstance(result, BuildError)
    assert "does not compile for sm_90" in str(result) and "BLOCK_M=64" in str(result)


def test_a_candidate_that_takes_too_long_is_killed() -> None:
    slow = KernelSource(text="import time\ntime.sleep(60)\n", spec=SPEC, variant="triton_fwd")
    with CompilePool(workers=1, timeout_s=1.0) as pool:
        ((_, result),) = pool.map(slow, Target.named("h100"), [TILE])
    assert isinstance(result, BuildError) and "(timeout)" in str(result)


def test_a_worker_that_dies_costs_one_candidate() -> None:
    other = KernelConfig(**{"variant": "triton_fwd", **TILE, "num_stages": 2})
    deadly = KernelSource(text="import os\nos._exit(7)\n", spec=SPEC, variant="triton_fwd")
    with CompilePool(workers=1) as pool:
        results = dict(pool.map(deadly, Target.named("h100"), [TILE, other]))
    assert set(results) == {TILE, other}
    assert all(isinstance(r, BuildError) and "exit status 7" in str(r) for r in results.values())


def test_facts_need_neither_triton_nor_torch_in_the_caller() -> None:
    code = textwrap.dedent(
        """
        import sys
        from flashgen.facts import compile_facts
        from flashgen import AttentionSpec, KernelConfig, Target
        spec = AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64)
        tile = KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
        compile_facts(spec, tile, Target.named("h100"))
        print([name for name in ("torch", "triton") if name in sys.modules])
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
