"""Calls with functions, which have no operator around them, where something else than their values is asked: tracers, fake and meta tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flashgen
from flashgen import UnsupportedProblemError, interpret

MODS: dict[str, dict[str, Any]] = {
    "score": {"score_mod": lambda score, b, h, i, j: score + j},
    "mask": {"mask_mod": lambda b, h, i, j: i >= j},
}


def tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 12, heads, 16, generator=generator).to(dtype) for heads in (2, 1, 1)]


def call(backend: Any, options: dict[str, Any]) -> Callable[..., Any]:
    return lambda q, k, v: flashgen.attention(q, k, v, backend=backend, **options)


def jit_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    def trace(*arguments: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python numbers that become constants, and of its own age
            return torch.jit.trace(function, arguments, check_trace=False)

    return trace


TRACERS: dict[str, Callable[..., Any]] = {
    "make_fx": make_fx,
    "make_fx, fake": lambda function: make_fx(function, tracing_mode="fake"),
    "jit.trace": jit_trace,
}


@pytest.mark.parametrize("options", MODS.values(), ids=list(MODS))
@pytest.mark.parametrize("tracer", TRACERS.values(), ids=list(TRACERS))
def test_a_graph_never_holds_a_kernels_untouched_memory(tracer: Callable[..., Any], options: dict[str, Any]) -> None:
    """What is launched without an operator is not in the graph; the tensor that it writes would be."""
    for backend in ("triton", "gluon"):
        with pytest.raises(UnsupportedProblemError, match=r"tracing .*another backend than 'torch'"):
            tracer(call(backend, options))(*tensors())
    function = call("torch", options)
    traced = tracer(function)(*tensors())
    others = tensors(1)
    torch.testing.assert_close(traced(*others), function(*others))


@pytest.mark.parametrize("options", MODS.values(), ids=list(MODS))
@pytest.mark.parametrize("backend", ["torch", "triton", "gluon"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_what_has_no_values_has_shapes(
    kind: str, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors stand for a GPU's: a kernel that got their addresses would end the process."""

    def launched(*_: Any) -> Any:
        raise AssertionError("a kernel got a tensor without memory")

    monkeypatch.setattr(interpret, "launch_of", launched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a fake tensor's address
        with FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else torch.device("meta"):
            leaves = [torch.empty(1, 12, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (2, 1, 1)]
            out, lse = call(backend, {**options, "return_lse": True})(*leaves)
            (out.sum() + lse.sum()).backward()
    assert (out.shape, lse.shape) == ((1, 12, 2, 16), (1, 2, 12))
    assert [x.grad.shape for x in leaves if x.grad is not None] == [x.shape for x in leaves]
