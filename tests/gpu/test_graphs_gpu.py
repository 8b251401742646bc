"""Training steps in CUDA graphs and over and over: the bits of an eager call, with options, on every backend that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch_once import OPTIONS, Sizes, call, packed
from torch import Tensor

pytestmark = pytest.mark.gpu
SIZES = Sizes(queries=700, keys=900)
CASES = {**OPTIONS, "packed": packed}
BACKENDS = ("auto", "triton")


def step(leaves: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    """Out, lse and the three gradients."""
    out, lse = call(leaves, options, backend=backend, deterministic=True)
    return [out, lse, *torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])]


def inputs(name: str, head_dim: int) -> tuple[list[Tensor], dict[str, Any]]:
    return SIZES.leaves(head_dim, requires_grad=True), CASES[name](SIZES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_a_captured_step_replays_the_bits_of_an_eager_one(name: str, head_dim: int, backend: str) -> None:
    leaves, options = inputs(name, head_dim)
    step(leaves, options, backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves, options, backend)
    for turn in range(3):
        with torch.no_grad():
            for x in leaves:
                x.mul_(-0.5 if turn else 1.0)  # what the graph reads changes between replays
        for x in captured:
            x.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for which, got, want in zip(
            ("out", "lse", "dq", "dk", "dv"), captured, step(leaves, options, backend), strict=True
        ):
            assert torch.equal(got, want), (turn, which)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])  # plain: test_gluon_backward_gpu.py
def test_a_hundred_steps_have_the_same_bits(name: str, backend: str) -> None:
    leaves, options = inputs(name, 64)
    first = step(leaves, options, backend)
    for _ in range(99):
        for which, got, want in zip(
            ("out", "lse", "dq", "dk", "dv"), step(leaves, options, backend), first, strict=True
        ):
            assert torch.equal(got, want), which
