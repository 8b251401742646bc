"""Gradients of the problem table through Triton's interpreter, forward and backward kernels as a pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import FAR, TABLE, Row, far_gradients, row
from torch.utils.checkpoint import checkpoint

import flashgen
from flashgen import execution, interpret, ops
from flashgen.gradients import GradientBuffers, check_launch, make_gradient_buffers, small_problems
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

TRITON_FWD, TRITON_BWD = by_name("triton_fwd"), by_name("triton_bwd")


def tunables(blocks: tuple[int, int], *, square: bool = False) -> dict[str, Any]:
    """dK/dV in tiles of the row's blocks, dQ in its own of the same sizes, or with rows and keys exchanged."""
    rows, keys = blocks if not square else blocks[::-1]
    return {
        "BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "BLOCK_M_DQ": rows, "BLOCK_N_DQ": keys, "num_warps": 4, "num_stages": 1
    }  # fmt: skip


def forward(buffers: GradientBuffers, blocks: tuple[int, int]) -> None:
    """Put the forward kernel's out and lse in the place of the reference's."""
    b = buffers
    out, lse = torch.empty_like(b.inputs["out"]), torch.empty_like(b.inputs["lse"])  # type: ignore[arg-type]
    q, k, v = (b.inputs[name] for name in "qkv")
    knobs: dict[str, Any] = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "num_warps": 4, "num_stages": 2}
    interpret.launch(render(b.problem.spec, TRITON_FWD), q, k, v, out, lse, **b.scalars, **knobs)  # type: ignore[arg-type]
    b.take(out, lse)


def launch(buffers: GradientBuffers, blocks: tuple[int, int], **options: Any) -> None:
    """Run the problem's own backward; num_warps and num_stages change nothing in the interpreter."""
    source = render(buffers.problem.spec_for("attention_bwd"), TRITON_BWD)
    interpret.launch_backward(source, *buffers.arguments, **buffers.scalars, **tunables(blocks, **options))  # type: ignore[arg-type]


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("number", "case"), list(enumerate(TABLE)), ids=[case.id for case in TABLE])
def test_problem(number: int, case: Row) -> None:
    """With and without a gradient of lse; tiles of dQ as of dK/dV, and exchanged."""
    buffers = make_gradient_buffers(
        case.problem, seed=1, strides=case.strides, values=case.values, dlse=number % 3 != 1
    )
    forward(buffers, case.blocks)
    launch(buffers, case.blocks, square=number % 2 == 1)
    buffers.check().require(case.why)


def test_rows_and_keys_that_see_nothing_get_zero() -> None:
    for alignment, lengths in (("bottom-right", (40, 20)), ("top-left", (20, 40))):
        buffers = make_gradient_buffers(row("", "bf16", 32, *lengths, causal=alignment).problem, seed=3)  # type: ignore[arg-type]
        launch(buffers, (16, 16))
        dq, dk, dv = buffers.outputs.values()
        if alignment == "bottom-right":
            assert torch.equal(dq[:, :20], torch.zeros_like(dq[:, :20])) and dq[:, 20:].abs().min() >= 0
            assert torch.isfinite(dq).all() and (dq[:, 21:] != 0).any()
        else:
            assert torch.equal(dk[:, 20:], torch.zeros_like(dk[:, 20:]))
            assert torch.equal(dv[:, 20:], torch.zeros_like(dv[:, 20:]))
            assert torch.isfinite(dk).all() and (dk[:, :20] != 0).any()


def test_a_row_that_sees_no_key_may_hold_anything() -> None:
    """NaN in its query, its gradient and its lse's gradient reach nobody, itself included."""
    buffers = make_gradient_buffers(row("", "fp16", 16, 40, 20, causal="bottom-right").problem, seed=5)
    clean = make_gradient_buffers(buffers.problem, seed=5)
    for name in ("q", "dout"):
        buffers.inputs[name][:, :20] = torch.nan  # type: ignore[index]
    buffers.inputs["dlse"][..., :20] = torch.nan  # type: ignore[index]
    for some in (buffers, clean):
        launch(some, (16, 16))
    for name, gradient in buffers.outputs.items():
        assert torch.equal(
            gradient[:, 20:] if name == "dq" else gradient,
            clean.outputs[name][:, 20:] if name == "dq" else clean.outputs[name],
        )


def test_repeated_runs_are_bitwise_equal() -> None:
    problem = row("", "fp16", 33, 40, 70, causal="bottom-right", heads=(4, 2), batch=2).problem
    runs = []
    for _ in range(3):
        buffers = make_gradient_buffers(problem, seed=4)
        launch(buffers, (32, 32))
        runs.append(buffers.outputs)
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in run)


def test_a_gradient_does_not_depend_on_its_batch() -> None:
    problem = row("", "bf16", 16, 20, 30, causal="bottom-right", heads=(2, 1), batch=2).problem
    buffers = make_gradient_buffers(problem, seed=5)
    launch(buffers, (16, 32))
    inputs = [None if x is None else x[1:] for x in buffers.inputs.values()]
    outputs = [torch.full_like(x[1:], torch.nan) for x in buffers.outputs.values()]
    source = render(problem.spec_for("attention_bwd"), TRITON_BWD)
    interpret.launch_backward(source, *inputs, *outputs, **buffers.scalars, **tunables((16, 32)))  # type: ignore[arg-type]
    assert all(torch.equal(alone, x[1:]) for alone, x in zip(outputs, buffers.outputs.values(), strict=True))


def test_nan_in_a_seen_key_shows() -> None:
    buffers = make_gradient_buffers(row("", "fp16", 16, 20, 35).problem, seed=6)
    buffers.inputs["v"][0, 7, 0, 3] = torch.nan  # type: ignore[index]
    launch(buffers, (16, 16))
    assert buffers.outputs["dq"].isnan().all()


FAR_CASES = [
    *((tensor, where) for tensor in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for where in ("batch", "row")),
    *((tensor, "head") for tensor in ("q", "k", "dv")),
    *((tensor, "block") for tensor in ("q", "k", "v", "dout")),
]


@pytest.mark.parametrize(("tensor", "where"), FAR_CASES)
def test_offsets_beyond_2_to_the_31_elements(tensor: str, where: str) -> None:
    buffers, tensors = far_gradients(where, tensor, "fp16")
    source = render(buffers.problem.spec_for("attention_bwd"), TRITON_BWD)
    interpret.launch_backward(source, **tensors, **buffers.scalars, **tunables(FAR[where][-1]))  # type: ignore[arg-type]
    if tensor in buffers.outputs:
        buffers.outputs[tensor].copy_(tensors[tensor])
    buffers.check().require(f"{tensor} by {where}")


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_autograd_runs_both_kernels(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`attention(backend="triton")` and backward(), against the blocked torch backend; no fall back, nothing copied that need not be."""
    generator = torch.Generator().manual_seed(7)

    def draw(seqlen: int, heads: int, head_dim: int) -> torch.Tensor:
        shape = (2, seqlen, heads, head_dim) if layout == "bshd" else (2, heads, seqlen, head_dim)
        return torch.randn(shape, generator=generator).requires_grad_()

    q, k, v = draw(20, 4, 16), draw(35, 2, 16), draw(35, 2, 24)
    gradients = {}
    for backend in ("torch", "triton"):
        out, lse = flashgen.attention(q, k, v, causal=True, return_lse=True, layout=layout, backend=backend)  # type: ignore[call-overload,arg-type]
        if backend == "triton":
            monkeypatch.setattr(
                execution.torch_blocked, "backward", lambda *_, **__: pytest.fail("the torch backward ran")
            )
        gradients[backend] = torch.autograd.grad((out**2).sum() + lse.sin().sum(), (q, k, v))
    torch.testing.assert_close(gradients["triton"], gradients["torch"], rtol=1e-5, atol=2e-5)


def test_gradients_through_one_output_alone() -> None:
    """A missing gradient counts as zero; one whose rows are all the same memory is copied."""
    q, k, v = (torch.randn(1, 9, 2, 16).requires_grad_() for _ in range(3))
    for pick in (0, 1):
        results = {b: flashgen.attention(q, k, v, return_lse=True, backend=b)[pick] for b in ("torch", "triton")}  # type: ignore[index,arg-type]
        got, want = (torch.autograd.grad(results[b].sum(), (q, k, v)) for b in ("triton", "torch"))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_stands_round_the_operator_runs_both_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors, checkpointing, autocast and vmap over the batch give the bits of the plain call."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, 9, heads, 16, generator=generator).bfloat16() for heads in (2, 1, 1))
    monkeypatch.setattr(execution.torch_blocked, "backward", lambda *_, **__: pytest.fail("the torch backward ran"))
    saved: list[tuple[int, ...]] = []

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(*x, causal=True, backend="triton")  # type: ignore[return-value]

    def gradients(run: Any, *x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [one.detach().requires_grad_() for one in x]
        return torch.autograd.grad(run(*leaves).float().sin().sum(), leaves)

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(*(x.detach().requires_grad_() for x in (q, k, v)))
    assert sorted(saved) == [(2, 2, 9), (2, 9, 1, 16), (2, 9, 1, 16), (2, 9, 2, 16), (2, 9, 2, 16)]

    plain = gradients(attend, q, k, v)
    kept = gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(attend, q.float(), k.float(), v.float())
    mapped = gradients(
        lambda *x: torch.func.vmap(lambda *one: attend(*(y[None] for y in one))[0])(*x), q, k, v
    )  # fmt: skip
    for other in (kept, cast, mapped):
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(plain, other, strict=True))


def test_the_operator_passes_torchs_own_check() -> None:
    q, k, v = (torch.randn(1, 5, 2, 16) for _ in range(3))
    flat = ops.flatten(flashgen.operands.Operands(), ops.Scalars(causal=True, training=True, backend="triton"))
    out, lse = torch.ops.flashgen.attention_fwd(q, k, v, *flat)
    arguments = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *flat, False, False)
    torch.library.opcheck(torch.ops.flashgen.attention_bwd.default, arguments)


def test_a_wrong_candidate_is_found() -> None:
    """What tuning demands of a backward: a kernel that forgets the scale does not pass."""
    spec = AttentionSpec.from_key("attention_bwd-fp16-d16-causal")
    problems = small_problems(spec)[1:2]
    source = render(spec, TRITON_BWD)

    def good(*tensors: Any, **scalars: Any) -> None:
        interpret.launch_backward(source, *tensors, **scalars, **tunables((32, 32)))

    def bad(*tensors: Any, sm_scale: float, **scalars: Any) -> None:
        good(*tensors, sm_scale=sm_scale, **scalars)
        tensors[-3].mul_(1.02)

    assert check_launch(good, spec, problems=problems).ok
    report = check_launch(bad, spec, problems=problems)
    assert not report.ok and "dq: " in report.message
    outside = make_gradient_buffers(problems[0], seed=1)
    outside.allocations["dk"][0] = 0
    assert outside.trespasses() == ["1 bytes outside dk were written to"]
    assert make_gradient_buffers(replace(problems[0], batch=0)).check().ok
