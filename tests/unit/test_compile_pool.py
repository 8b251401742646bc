"""The pool's processes live on between calls, and what is compiled ahead is what a launch asks for."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashgen import BuildError, KernelConfig, Problem, Target, facts_gluon
from flashgen.build import load_module, write_source
from flashgen.compile_pool import CompilePool
from flashgen.facts import cached, compile_options, specialised
from flashgen.facts.cache import path_of
from flashgen.facts.compiler import constants_have_attributes, signature_of
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.tuner.context import launch_strides
from flashgen.variants import by_name

H100 = Target.named("h100")
SPEC = AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64)
TILE = KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
OTHER = KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


@pytest.mark.slow
def test_a_second_call_finds_the_process_of_the_first(tmp_path: Path) -> None:
    """The file that is compiled leaves its process id behind; it is no kernel, so compiling ends in an error."""
    log = tmp_path / "pids"
    text = f"import os\nwith open({str(log)!r}, 'a') as f: f.write(f'{{os.getpid()}}\\n')\n"
    source = KernelSource(text=text, spec=SPEC, variant="triton_fwd")
    with CompilePool(workers=1) as pool:
        for config in (TILE, OTHER):
            assert all(isinstance(result, BuildError) for _, result in pool.map(source, H100, [config]))
        pool_pids = log.read_text().split()
        other = KernelSource(
            text=text + "# another file, since one is imported once\n", spec=SPEC, variant="triton_fwd"
        )
        list(pool.map(other, H100, [TILE]))
    pids = log.read_text().split()
    assert len(pool_pids) >= 1 and len(pids) > len(pool_pids) and len(set(pids)) == 1
    with pytest.raises(ProcessLookupError):
        import_module("os").kill(int(pids[0]), 0)  # `close` ended it


def test_integers_are_compiled_by_tritons_rule() -> None:
    found = [specialised(value) for value in (1, 2, 16, 0, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, -16)]
    assert found == ["constexpr", "i32", "i32:16", "i32:16", "i32", "i64:16", "i64", "i32:16"]


def asked(launch: Any, kernel: Any, arguments: tuple[Any, ...], config: KernelConfig, monkeypatch: Any) -> Any:
    """(signature, constants, attributes) that Triton would compile for a launch; no GPU is asked."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    found: list[Any] = []

    def run(*values: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        # What JITFunction.run adds by itself; the compiler's defaults must be the same.
        keywords["debug"] = kernel.debug or knobs.runtime.debug
        for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):
            if hasattr(knobs.compilation, name):
                keywords[name] = getattr(knobs.compilation, name)
        bound, specialisation, options = binder(*values, **keywords)
        packed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialisation, options)
        assert packed.hash() == backend.parse_options(compile_options(config)).hash()
        found.append((signature, constants, attributes))

    monkeypatch.setattr(kernel, "run", run)
    launch(*arguments, sm_scale=0.125, causal_offset=0, **config)
    return found[0]


BASE = Problem(dtype="bf16", batch=2, seqlen_q=48, seqlen_k=80, num_heads_q=4, num_heads_kv=2, head_dim=64, head_dim_v=64)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        BASE,
        replace(BASE, batch=1, seqlen_q=1, num_heads_q=1, num_heads_kv=1, causal=True, return_lse=True),
        replace(BASE, head_dim=33, head_dim_v=17, return_lse=True),
        replace(BASE, head_dim=1, head_dim_v=1, num_heads_q=1, num_heads_kv=1),
        # 2^31 elements from one sequence to the next; a stand-in, since nothing may be allocated.
        replace(BASE, seqlen_k=1 << 20, num_heads_kv=32, num_heads_q=32),
    ],
    ids=["usual", "short", "odd", "ones", "long"],
)
def test_what_is_compiled_ahead_is_what_a_launch_asks_for(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    spec, variant = problem.spec, by_name("triton_fwd")
    module = load_module(write_source(render(spec, variant)))
    kernel = getattr(module, spec.op)

    def tensor(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        if torch.Size(shape).numel() < 1 << 24:
            return torch.empty(shape, dtype=dtype)
        return SimpleNamespace(
            shape=shape, stride=torch.empty(shape, device="meta").stride, dtype=dtype, data_ptr=lambda: 1 << 20
        )

    p = problem
    arguments = (
        tensor(p.batch, p.seqlen_q, p.num_heads_q, p.head_dim),
        tensor(p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim),
        tensor(p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim_v),
        tensor(p.batch, p.seqlen_q, p.num_heads_q, p.head_dim_v),
        tensor(p.batch, p.num_heads_q, p.seqlen_q, dtype=torch.float32) if spec.has_lse else None,
    )
    wanted = asked(module.launch, kernel, arguments, TILE, monkeypatch)
    values = variant.kernels(spec, TILE)[spec.op]
    assert signature_of(kernel, spec, values, launch_strides(problem)) == wanted
    usual = signature_of(kernel, spec, values) == wanted
    assert usual == (problem.head_dim % 16 == 0 and problem.seqlen_k < 1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("problem", [replace(BASE, causal=True), replace(BASE, head_dim=33, head_dim_v=17)])
def test_what_is_compiled_ahead_of_a_backward_is_what_a_launch_asks_for(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    p = problem.backward
    spec, variant = p.spec, by_name("triton_bwd")
    config = variant.default(spec, H100)
    module = load_module(write_source(render(spec, variant)))
    q, k = (
        torch.empty(p.batch, p.seqlen_q, p.num_heads_q, p.head_dim),
        torch.empty(p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim),
    )
    v, out = (x.new_empty((*x.shape[:3], p.head_dim_v)) for x in (k, q))
    q, k, v, out = (x.bfloat16() for x in (q, k, v, out))
    arguments = (out, None, q, k, v, out, torch.empty(p.batch, p.num_heads_q, p.seqlen_q), q, k, v)
    kernels = variant.kernels(spec, config)
    for name in kernels:
        for other in kernels:
            monkeypatch.setattr(getattr(module, other), "run", lambda *_, **__: None)
        wanted = asked(module.launch, getattr(module, name), arguments, config, monkeypatch)
        assert signature_of(getattr(module, name), spec, kernels[name], launch_strides(p)) == wanted, name


def test_facts_of_other_strides_are_other_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    source = render(SPEC, by_name("triton_fwd"))
    paths = [path_of(source, H100, TILE, strides) for strides in (None, {"stride_qb": 64}, {"stride_qb": 3})]
    assert paths[0] == paths[1] != paths[2] and cached(source, H100, TILE, {"stride_qb": 3}) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"head_dim": 64, "head_dim_v": 64, "dtype": "fp16", "return_lse": True}], ids=str
)
def test_a_gluon_kernel_is_compiled_ahead_under_the_key_of_its_launch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    problem = Problem.preset("llama3-8b", seqlen=1024, **options)
    spec, variant = problem.spec, by_name("gluon_fwd_sm90")
    module = load_module(write_source(render(spec, variant)))
    kernel, config = getattr(module, spec.op), variant.default(spec, H100)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keys: list[tuple[str, str]] = []

    def run(*values: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        keywords["debug"] = kernel.debug or knobs.runtime.debug
        for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):
            if hasattr(knobs.compilation, name):
                keywords[name] = getattr(knobs.compilation, name)
        bound, specialisation, given = binder(*values, **keywords)
        packed, *rest = kernel._pack_args(backend, keywords, bound, specialisation, given)
        keys.append((GluonASTSource(kernel, *rest).hash(), packed.hash()))

    monkeypatch.setattr(kernel, "run", run)
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    p, dtype = problem, {"bf16": torch.bfloat16, "fp16": torch.float16}[problem.dtype]
    q, k = (torch.empty(1, 1024, heads, p.head_dim, dtype=dtype) for heads in (p.num_heads_q, p.num_heads_kv))
    lse = torch.empty(1, p.num_heads_q, 1024) if spec.has_lse else None
    module.launch(q, k, k, torch.empty_like(q), lse, sm_scale=0.1, causal_offset=0, **config)
    ahead = facts_gluon.ast_source(kernel, spec, config, constants_have_attributes=constants_have_attributes(kernel))
    numbers = backend.parse_options({"enable_fp_fusion": True, "num_warps": variant.num_warps(spec, config)})
    assert keys == [(ahead.hash(), numbers.hash())]
