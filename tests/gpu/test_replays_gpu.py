"""Calls that are replayed on a GPU: the bits of the first call, at other addresses, on another stream, in a graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import dispatch, replays
from flashgen.target import Target

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_alignment": "top-left"},
    "window": {"window_size": (40, 10)},
    "alibi": {"alibi_slopes": 4},
    "sinks": {"sinks": 4},
    "bias": {"bias": (4, 200, 200)},
    "heads first": {"causal": True, "layout": "bhsd"},
}


def inputs(seed: int, layout: str) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(2, 200, 4, 64), (2, 200, 2, 64), (2, 200, 2, 64)]
    drawn = [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]
    return [(x if layout == "bshd" else x.transpose(1, 2).contiguous()).requires_grad_() for x in drawn]


def step(given: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Out and the gradients; then the same without autograd."""
    out: Any = flashgen.attention(*given, deterministic=True, **options)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).bfloat16()
    found = [out.detach(), *torch.autograd.grad(out, given, weights)]
    with torch.no_grad():
        plain: Any = flashgen.attention(*given, deterministic=True, **options)
    return [*found, plain]


@pytest.mark.parametrize("what", list(OPTIONS))
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_replays_give_the_bits_of_first_calls(backend: str, what: str) -> None:
    if backend == "gluon" and Target.detect().arch != "sm_90":
        pytest.skip("Hopper's")
    generator = torch.Generator("cuda").manual_seed(5)
    options: dict[str, Any] = {
        name: torch.randn(value, device="cuda", generator=generator)
        if name in ("alibi_slopes", "sinks", "bias")
        else value
        for name, value in OPTIONS[what].items()
    }
    options["backend"] = backend
    layout = str(options.get("layout", "bshd"))
    sets = [inputs(seed, layout) for seed in range(4)]
    wanted = []
    for given in sets:
        dispatch.forget()  # each is a first call
        wanted.append(step(given, options))
    dispatch.forget()
    for given in sets:
        step(given, options)

    def compare(found: list[Tensor], want: list[Tensor]) -> None:
        torch.cuda.synchronize()
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)

    summed = what in ("sinks", "bias")  # the backward's launch computes beside its kernels, and is launched as ever
    never = mock.patch.object(replays.Kind, "__call__", side_effect=AssertionError("launched as ever"))
    with nullcontext() if summed else never:
        for given, want in zip(sets, wanted, strict=True):
            compare(step(given, options), want)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compare(step(sets[1], options), wanted[1])
        torch.cuda.synchronize()
        graph, static = torch.cuda.CUDAGraph(), [x.detach().clone().requires_grad_() for x in sets[0]]
        with torch.cuda.graph(graph):
            captured = step(static, options)
    for given, want in list(zip(sets, wanted, strict=True))[::-1]:
        with torch.no_grad():
            for x, y in zip(static, given, strict=True):
                x.copy_(y)
        graph.replay()
        compare(captured, want)
