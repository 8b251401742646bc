"""Facts without a GPU: the compiler itself on a few kernels, one per architecture."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

import flashgen
from flashgen import AttentionSpec, BuildError, InvalidProblemError, KernelConfig, Target, UnsupportedProblemError
from flashgen.compile_pool import CompilePool
from flashgen.facts import CompiledFacts, cached
from flashgen.render import KernelSource, render
from flashgen.variants import by_name

SPEC = AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64)
TILE = KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)

# Per architecture: the class of its products, and how often a block computes the scores of this tile. Products of gfx942 have
# 32 rows: its four wavefronts cover the tile's 64 rows twice, in the scores; the output they share out by columns.
ARCHITECTURES = {
    "a100": ("hmma", 1),
    "l40s": ("hmma", 1),
    "h100": ("hgmma", 1),
    "b200": ("utcmma", 1),
    "rtx5090": ("hmma", 1),
    "mi300x": ("mfma", 2),
}


@pytest.mark.sampled(every=3)
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_compilers_facts(name: str) -> None:
    target, (product, times) = Target.named(name), ARCHITECTURES[name]
    facts = flashgen.compile_facts(SPEC, TILE, target)
    assert facts.arch == target.arch and facts.num_warps == 4
    assert 32 <= facts.n_regs <= 255 and facts.spill_bytes == facts.stack_bytes == facts.loop_spill_ops == 0
    assert 16 * 1024 <= facts.smem_bytes <= target.smem_bytes
    assert facts.loop[product] >= 8 and facts.undefined_registers == 0
    # One exponential a score, and one a row to rescale; a warp's threads share 64 * 64 scores.
    per_thread = times * 64 * 64 // (4 * target.warp_size)
    assert per_thread <= facts.loop["mufu"] <= per_thread + 4
    # The products of one step over the keys: scores and output, both 64 x 64 x 64.
    assert facts.loop_macs == (times + 1) * 64**3
    assert (facts.tmem_columns > 0) == (name == "b200") and facts.tmem_columns <= 512
    assert (facts.scalar_regs > 0) == (name == "mi300x") and facts.accumulation_regs <= facts.n_regs
    assert cached(render(SPEC, by_name("triton_fwd")), target, TILE) == facts
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
    with pytest.raises(UnsupportedProblemError, match="paged"):
        flashgen.compile_facts(replace(SPEC, paged=True), TILE, Target.named("h100"))
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
