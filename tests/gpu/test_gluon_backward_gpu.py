"""The Hopper backward on a Hopper GPU: the problem table with gradients, sizes of its own tiles, bits, streams and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import BR, TABLE, TL, Row, row

import flashgen
from flashgen.build import build
from flashgen.checks import tma_addressable
from flashgen.config import KernelConfig
from flashgen.gradients import GradientBuffers, make_gradient_buffers
from flashgen.render import render
from flashgen.target import Target
from flashgen.variants import by_name

BACKWARD, FORWARD, H100 = by_name("gluon_bwd_sm90"), by_name("gluon_fwd_sm90"), Target.named("h100")
MODES = (False, True)  # deterministic
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
COVERED = [case for case in TABLE if BACKWARD.supports(case.problem.backward.spec, H100) is None]


def default(case: Row) -> KernelConfig:
    return BACKWARD.default(case.problem.backward.spec, H100)


def take_forward(buffers: GradientBuffers) -> None:
    """Out and lse of the Hopper forward: with large logits only a pair that rounds alike is exact."""
    spec = buffers.problem.spec
    q, k, v, out, lse = (buffers.inputs[name] for name in ("q", "k", "v", "out", "lse"))
    assert out is not None
    assert lse is not None
    found = torch.empty(out.shape, dtype=out.dtype, device=out.device), torch.empty_like(lse)
    build(render(spec, FORWARD)).launch(q, k, v, *found, **buffers.scalars, **FORWARD.default(spec, H100))
    buffers.take(*found)


def launch(buffers: GradientBuffers, config: KernelConfig, deterministic: bool) -> None:
    kernel = build(render(buffers.problem.backward.spec, BACKWARD))
    kernel.launch(*buffers.arguments, **buffers.scalars, **config, deterministic=deterministic)
    torch.cuda.synchronize()


def run(case: Row, config: KernelConfig, deterministic: bool, seed: int = 1, dlse: bool = True) -> GradientBuffers:
    buffers = make_gradient_buffers(
        case.problem, seed=seed, device="cuda", strides=case.strides, values=case.values, dlse=dlse
    )
    through_tma = (*(buffers.inputs[name] for name in "qkv"), buffers.outputs["dk"], buffers.outputs["dv"])
    if not all(x is not None and tma_addressable(x) for x in through_tma):
        pytest.skip("TMA cannot express these strides: dispatch takes the portable kernel")
    if min(case.problem.seqlen_q, case.problem.seqlen_k) > 0:
        take_forward(buffers)
    launch(buffers, config, deterministic)
    return buffers


@pytest.mark.parametrize("deterministic", MODES, ids=["fast", "ordered"])
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.id)
def test_problem(case: Row, deterministic: bool) -> None:
    run(case, default(case), deterministic).check().require(case.why)


WIDTHS = (
    ("bf16", 64, 64),
    ("fp16", 128, 128),
    ("bf16", 128, 64),
    ("fp16", 64, 128),
    ("bf16", 80, 96),
    ("bf16", 192, 128),
    ("fp16", 256, 256),
    ("bf16", 64, 256),
)
LONG = [
    row("", dtype, d, 1000, 1337, dv=dv, causal=causal, heads=(6, 2), batch=2, layout=layout, strides="dense")
    for dtype, d, dv in WIDTHS
    for causal, layout in ((None, "bshd"), (BR, "bhsd"), (TL, "bshd"))
]


# Each a test of its own: compiling all of a case's in one takes longer than a worker may.
PORTFOLIO = [
    pytest.param(case, number, known.config, id=f"{case.id}-{number}")
    for case in LONG
    for number, known in enumerate(BACKWARD.known_good(case.problem.backward.spec, H100))
]


@pytest.mark.parametrize("deterministic", MODES, ids=["fast", "ordered"])
@pytest.mark.parametrize(("case", "number", "config"), PORTFOLIO)
def test_every_configuration_of_the_portfolio(
    case: Row, number: int, config: KernelConfig, deterministic: bool
) -> None:
    buffers = run(case, config, deterministic, seed=number, dlse=deterministic)
    buffers.check().require(f"{config.label}, deterministic {deterministic}")


# Thread blocks that need no mask beside some that do: Triton 3.6's ptxas miscompiled those that skip the masked loop.
MIXED = [
    row("", "bf16", d, 333, 777, dv=dv, causal=causal, heads=(4, 1), strides="dense")
    for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256))
    for causal in (None, BR)
]


def with_ahead(config: KernelConfig) -> KernelConfig:
    return KernelConfig(variant=config.variant, **{**config.to_dict(), "SCORES_AHEAD": True})


def with_and_without(case: Row) -> list[KernelConfig]:
    """The portfolio of a case, each also with scores multiplied ahead where that is legal."""
    spec, found = case.problem.backward.spec, dict[KernelConfig, None]()
    for known in BACKWARD.known_good(spec, H100):
        legal = BACKWARD.illegal(spec, H100, with_ahead(known.config)) is None
        found |= dict.fromkeys((known.config, with_ahead(known.config)) if legal else (known.config,))
    return list(found)


EACH_MIXED = [
    pytest.param(case, config, id=f"{case.id}-{number}")
    for case in MIXED
    for number, config in enumerate(with_and_without(case))
]


@pytest.mark.parametrize(("case", "config"), EACH_MIXED)
def test_blocks_of_keys_with_and_without_a_mask(case: Row, config: KernelConfig) -> None:
    run(case, config, deterministic=False).check().require(config.label)


def gradients(buffers: GradientBuffers, deterministic: bool) -> tuple[torch.Tensor, ...]:
    launch(buffers, BACKWARD.default(buffers.problem.backward.spec, H100), deterministic)
    return tuple(x.clone() for x in buffers.outputs.values())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [None, BR, TL])
def test_ordered_gradients_are_the_same_bits_in_100_runs(head_dim: int, causal: Any) -> None:
    case = row("", "bf16", head_dim, 2000, 2500, causal=causal, heads=(8, 4), batch=2, strides="dense")
    buffers = make_gradient_buffers(case.problem, seed=3, device="cuda", strides="dense")
    first = gradients(buffers, deterministic=True)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(buffers, deterministic=True), strict=True))


def test_more_thread_blocks_than_processors_that_wait_for_each_other() -> None:
    """Ordered sums over 300 blocks of keys a head: later ones wait for earlier ones, which must all have started."""
    case = row("", "bf16", 64, 300, 38400, heads=(2, 1), strides="dense")
    for causal in (None, BR):
        buffers = make_gradient_buffers(
            row("", "bf16", 64, 300, 38400, causal=causal, heads=(2, 1)).problem, seed=4, device="cuda", strides="dense"
        )
        take_forward(buffers)
        launch(buffers, default(case), deterministic=True)
        buffers.check().require(str(causal))


@pytest.mark.parametrize("deterministic", MODES)
def test_a_captured_graph_replays(deterministic: bool) -> None:
    case = row("", "bf16", 128, 700, 900, causal=BR, heads=(4, 2), strides="dense")
    buffers = make_gradient_buffers(case.problem, seed=6, device="cuda", strides="dense")
    launch(buffers, default(case), deterministic)
    kernel = build(render(buffers.problem.backward.spec, BACKWARD))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(*buffers.arguments, **buffers.scalars, **default(case), deterministic=deterministic)
    for _ in range(3):
        for gradient in buffers.outputs.values():
            gradient.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    buffers.check().require("replayed")


@pytest.mark.parametrize("deterministic", [True, None])
def test_attention_repeats_bit_for_bit_when_asked(deterministic: bool | None) -> None:
    """By the argument, or by torch's own switch where the argument is None."""
    q, k, v, dout = (torch.randn(2, 1500, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan = flashgen.explain(*leaves, causal=True, deterministic=deterministic)
    assert plan.backward is not None and plan.backward.variant == "gluon_bwd_sm90"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic is None)
    try:
        out = flashgen.attention(*leaves, causal=True, deterministic=deterministic)
        first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        for _ in range(20):
            again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(before)
