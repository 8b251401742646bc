"""Gradients of the problem table on a CUDA device, forward and backward kernels as a pair; what `attention()` runs there."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from problems import FAR, TABLE, Row, far_gradients, row
from torch.utils.checkpoint import checkpoint

import flashgen
from flashgen import dispatch
from flashgen.accuracy import TORCH_DTYPES, check
from flashgen.build import build
from flashgen.config import KernelConfig
from flashgen.gradients import GradientBuffers, check_launch, make_gradient_buffers
from flashgen.reference import gradients_low_precision, gradients_oracle
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

pytestmark = pytest.mark.gpu
TRITON_FWD, TRITON_BWD = by_name("triton_fwd"), by_name("triton_bwd")


def tile_of(case: Row, *, square: bool) -> KernelConfig:
    """The row's own blocks where they are legal on this GPU, else the default."""
    spec, target = case.problem.spec_for("attention_bwd"), Target.detect()
    rows, keys = case.blocks[::-1] if square else case.blocks
    config = TRITON_BWD.config(
        BLOCK_M=case.blocks[0], BLOCK_N=case.blocks[1], BLOCK_M_DQ=rows, BLOCK_N_DQ=keys, num_warps=4, num_stages=1
    )  # fmt: skip
    return TRITON_BWD.default(spec, target) if TRITON_BWD.illegal(spec, target, config) else config


def forward(buffers: GradientBuffers) -> None:
    """Put the forward kernel's out and lse in the place of the reference's."""
    b, spec = buffers, buffers.problem.spec
    out, lse = (torch.empty_like(b.inputs[name]) for name in ("out", "lse"))  # type: ignore[arg-type]
    config = TRITON_FWD.default(spec, Target.detect())
    build(render(spec, TRITON_FWD)).launch(*(b.inputs[name] for name in "qkv"), out, lse, **b.scalars, **config)
    b.take(out, lse)


def launch(buffers: GradientBuffers, config: KernelConfig) -> None:
    source = render(buffers.problem.spec_for("attention_bwd"), TRITON_BWD)
    build(source).launch(*buffers.arguments, **buffers.scalars, **config)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("number", "case"), list(enumerate(TABLE)), ids=[case.id for case in TABLE])
def test_problem(number: int, case: Row) -> None:
    buffers = make_gradient_buffers(
        case.problem, seed=1, device="cuda", strides=case.strides, values=case.values, dlse=number % 3 != 1
    )
    forward(buffers)
    launch(buffers, tile_of(case, square=number % 2 == 1))
    buffers.check().require(case.why)


DEFAULTS = sorted({case.problem.spec_for("attention_bwd").key for case in TABLE})


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_default_configuration(key: str) -> None:
    spec = AttentionSpec.from_key(key)
    config = TRITON_BWD.default(spec, Target.detect())
    check_launch(partial(build(render(spec, TRITON_BWD)).launch, **config), spec, device="cuda").require(config.label)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [None, "bottom-right"])
def test_the_default_configuration_at_2048(dtype: str, head_dim: int, causal: Any) -> None:
    """Long enough for a pipeline to fill."""
    p = row("", dtype, head_dim, 2048, 2048, causal=causal, heads=(4, 2)).problem
    generator = torch.Generator("cuda").manual_seed(2)
    q, k, v, dout = (
        torch.randn(1, 2048, heads, head_dim, generator=generator, device="cuda").to(TORCH_DTYPES[p.dtype])
        for heads in (4, 2, 2, 4)
    )
    out, lse = torch.empty_like(q), torch.empty(1, 4, 2048, device="cuda")
    options: dict[str, Any] = {"sm_scale": p.scale, "causal_offset": p.causal_offset}
    forward_config = TRITON_FWD.default(p.spec, Target.detect())
    build(render(p.spec, TRITON_FWD)).launch(q, k, v, out, lse, **options, **forward_config)
    found = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    spec = p.spec_for("attention_bwd")
    config = TRITON_BWD.default(spec, Target.detect())
    build(render(spec, TRITON_BWD)).launch(dout, None, q, k, v, out, lse, *found, **options, **config)
    exact = gradients_oracle(dout, q, k, v, causal=p.causal, **options)
    honest = gradients_low_precision(dout, q, k, v, out, lse, causal=p.causal, **options)
    for got, oracle, unit in zip(found, exact, honest, strict=True):
        check(got, None, (oracle, None), (unit, None), p.dtype, gradient=True).require(config.label)


@pytest.mark.parametrize(
    ("tensor", "where"), [("q", "batch"), ("k", "head"), ("dout", "row"), ("v", "block"), ("dk", "row")]
)
def test_offsets_beyond_2_to_the_31_elements(tensor: str, where: str) -> None:
    """One tensor of 4 to 6 GiB, of which a few rows are touched."""
    buffers, tensors = far_gradients(where, tensor, "fp16", "cuda")
    rows, keys = FAR[where][-1]
    config = TRITON_BWD.config(BLOCK_M=rows, BLOCK_N=keys, BLOCK_M_DQ=rows, BLOCK_N_DQ=keys, num_warps=4, num_stages=1)
    source = render(buffers.problem.spec_for("attention_bwd"), TRITON_BWD)
    build(source).launch(*tensors.values(), **buffers.scalars, **config)
    if tensor in buffers.outputs:
        buffers.outputs[tensor].copy_(tensors[tensor])  # type: ignore[arg-type]
    buffers.check().require(f"{tensor} by {where}")


# -- through `attention()` --


def leaves(dtype: torch.dtype = torch.bfloat16, **shape: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = ((333, 4), (777, 2), (777, 2))
    head_dim = shape.get("head_dim", 64)
    return [
        torch.randn(2, n, h, head_dim, generator=generator, device="cuda", dtype=dtype).requires_grad_()
        for n, h in lengths
    ]


def gradients(tensors: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    out, lse = flashgen.attention(*tensors, causal=True, return_lse=True, **options)  # type: ignore[misc]
    return torch.autograd.grad((out.float() ** 2).sum() + lse[lse.isfinite()].sum(), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_takes_a_fused_backward_and_says_nothing(dtype: torch.dtype) -> None:
    tensors = leaves(dtype)
    dispatch.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = flashgen.explain(*tensors, causal=True, return_lse=True)
        found = gradients(tensors)
    assert plan.backward is not None and plan.backward.backend in ("gluon", "triton")
    want = gradients(tensors, backend="torch")
    for got, expected in zip(found, want, strict=True):
        scale = expected.float().abs().max().item()
        assert (got - expected).float().abs().max().item() < (5e-5 if dtype == torch.float32 else 2e-2) * scale


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_a_bias_is_fused_too(deterministic: bool) -> None:
    tensors = leaves()
    bias = torch.randn(333, 777, device="cuda").requires_grad_()
    dispatch.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = flashgen.explain(*tensors, bias=bias, deterministic=deterministic)
    assert plan.backward is not None and plan.backward.backend in ("gluon", "triton")
    found, want = (
        torch.autograd.grad(
            flashgen.attention(*tensors, bias=bias, deterministic=deterministic, backend=backend).float().sum(),  # type: ignore[union-attr]
            bias,
        )[0]
        for backend in ("auto", "torch")
    )
    assert (found - want).abs().max() < 2e-2 * want.abs().max()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_hundred_runs_are_bitwise_equal(backend: str) -> None:
    tensors = leaves()
    first = gradients(tensors, backend=backend, deterministic=True)
    for _ in range(99):
        again = gradients(tensors, backend=backend, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_captured_training_step_replays_bit_for_bit() -> None:
    tensors = leaves()

    def step() -> tuple[torch.Tensor, ...]:
        out = flashgen.attention(*tensors, causal=True, backend="triton")
        return torch.autograd.grad((out.float() ** 2).sum(), tensors)  # type: ignore[union-attr]

    eager = step()  # warm: compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_checkpointing_autocast_and_compile() -> None:
    q, k, v = leaves()

    def run(*x: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(*x, causal=True, backend="triton")  # type: ignore[return-value]

    plain = torch.autograd.grad(run(q, k, v).float().sum(), (q, k, v))
    kept = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).float().sum(), (q, k, v))
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(q, k, v).float().sum(), (q, k, v))
    for other in (kept, compiled):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = run(*wide)
    assert out.dtype == torch.bfloat16
    cast = torch.autograd.grad(out.float().sum(), wide)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(plain, cast, strict=True))


def test_the_operator_passes_torchs_own_check() -> None:
    from flashgen import ops
    from flashgen.operands import Operands

    q, k, v = (x.detach() for x in leaves())
    flat = ops.flatten(Operands(), ops.Scalars(causal=True, training=True, backend="triton", deterministic=True))
    out, lse = torch.ops.flashgen.attention_fwd(q, k, v, *flat)
    arguments = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *flat, False, False)
    torch.library.opcheck(torch.ops.flashgen.attention_bwd.default, arguments)
