"""Gradients that are summed over tiles, of a bias and of what score_mod captures: places, orders, and what is no number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import execution
from flashgen.config import KernelConfig
from flashgen.mods import programs
from flashgen.variants.triton_bwd import TritonBackward

TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
CONFIG = KernelConfig(
    variant="triton_bwd", BLOCK_M=16, BLOCK_N=16, BLOCK_M_DQ=16, BLOCK_N_DQ=16, num_warps=4, num_stages=1
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    backend: str, wanted: tuple[Tensor, ...], tensors: tuple[Tensor, ...] | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """Gradients of `wanted`; the torch backend's may not stand in for the kernel's."""
    q, k, v = tensors or (drawn(2, 21, 4, 16), drawn(2, 37, 2, 16, seed=1), drawn(2, 37, 2, 16, seed=2))
    guard = {"backward": None} if backend == "triton" else {}
    keywords = {"config": TILE} if backend == "triton" else {}
    with (
        mock.patch.object(TritonBackward, "default", lambda self, spec, target: CONFIG),
        mock.patch.multiple(execution.torch_blocked, **guard) if guard else contextlib.nullcontext(),
    ):
        out = flashgen.attention(q, k, v, backend=backend, **keywords, **options)  # type: ignore[call-overload]
        weights = torch.arange(out[0, :, 0].numel()).view(1, out.shape[1], 1, -1).sin()  # the same for each head
        return torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)


HEADS, ROWS, KEYS = drawn(4, seed=3), drawn(21, seed=4), drawn(37, seed=5)
PAIRS, NUMBER, WIDE = drawn(21, 37, seed=6), drawn(seed=7), drawn(2, 4, 3, seed=8).double()
IDS = torch.arange(37) // 9

# name -> (captured tensors, score_mod of them)
MODS: dict[str, tuple[tuple[Tensor, ...], Callable[..., Callable[..., Tensor]]]] = {
    "a number": ((NUMBER,), lambda x: lambda s, b, h, i, j: s * x),
    "of heads": ((HEADS,), lambda x: lambda s, b, h, i, j: s + x[h] * (i - j)),
    "of rows and of keys": ((ROWS, KEYS), lambda x, y: lambda s, b, h, i, j: s * x[i] + y[j]),
    "of pairs": ((PAIRS,), lambda x: lambda s, b, h, i, j: s + torch.tanh(x[i, j])),
    "from the end": ((ROWS,), lambda x: lambda s, b, h, i, j: s * x[-1 - i]),
    "twice": ((ROWS,), lambda x: lambda s, b, h, i, j: s * x[i] + x[20 - i] * x[j // 2]),
    "of three dimensions, fp64": ((WIDE,), lambda x: lambda s, b, h, i, j: s + x[b, h, (i + j) % 3].float()),
    "at places that are read": ((KEYS,), lambda x: lambda s, b, h, i, j: s + x[IDS[j]]),
    "chosen": ((HEADS, ROWS), lambda x, y: lambda s, b, h, i, j: torch.where(i >= j, s * x[h], y[i])),
    "compared alone": ((HEADS,), lambda x: lambda s, b, h, i, j: torch.where(x[h] > 0, s, -s)),
}


@pytest.mark.parametrize(("name", "deterministic"), [(name, number % 2 == 1) for number, name in enumerate(MODS)])
def test_what_is_captured_gets_what_the_torch_backend_gives_it(name: str, deterministic: bool) -> None:
    values, build = MODS[name]
    leaves = tuple(x.clone().requires_grad_() for x in values)
    options = {"score_mod": build(*leaves), "causal": True, "deterministic": deterministic}
    for want, got in zip(gradients("torch", leaves, **options), gradients("triton", leaves, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "deterministic"),
    [
        ((2, 4, 21, 37), True), ((1, 4, 21, 37), False), ((1, 4, 21, 37), True), ((2, 1, 1, 37), True), ((4, 21, 1), False), ((37,), False),
        ((2, 1, 1, 1), True), ((), False),
    ],
)  # fmt: skip
def test_a_bias_gets_its_gradient_in_its_own_shape(shape: tuple[int, ...], deterministic: bool) -> None:
    bias = drawn(*shape, seed=9).requires_grad_()
    options = {"bias": bias, "softcap": 2.0, "window_size": (9, 5), "deterministic": deterministic}
    (want,), (got,) = (gradients(backend, (bias,), **options) for backend in ("torch", "triton"))
    assert got.shape == bias.shape
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_an_ordered_sum_does_not_depend_on_the_order() -> None:
    """Items of the batch and heads exchanged: other programs come first, and the sums are the same to the bit; unordered ones are not."""
    tensors = drawn(4, 21, 2, 16), drawn(4, 37, 2, 16, seed=1), drawn(4, 37, 2, 16, seed=2)
    turned = tuple(x.flip(0, 2).contiguous() for x in tensors)
    bias, table = drawn(21, 37, seed=3).requires_grad_(), drawn(5, seed=4).requires_grad_()
    options = {"bias": bias, "score_mod": lambda s, b, h, i, j: s * table[(i - j) % 5]}
    same = []
    for deterministic in (True, False):
        one, other = (
            gradients("triton", (bias, table), x, deterministic=deterministic, **options) for x in (tensors, turned)
        )
        same.append([torch.equal(*pair) for pair in zip(one, other, strict=True)])
    assert same == [[True, True], [False, False]]


def test_a_nan_is_not_lost_in_integers() -> None:
    tensors = drawn(1, 21, 1, 16), drawn(1, 37, 1, 16, seed=1), drawn(1, 37, 1, 16, seed=2)
    tensors[2][0, 7, 0, 3] = torch.nan
    table = drawn(5, seed=4).requires_grad_()
    for deterministic in (False, True):
        (got,) = gradients(
            "triton", (table,), tensors, deterministic=deterministic, score_mod=lambda s, b, h, i, j: s * table[j % 5]
        )
        assert got.isnan().any()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_ordered_sums_have_the_range_of_fp32(size: float) -> None:
    factor = torch.tensor(1.0).requires_grad_()
    options = {"score_mod": lambda s, b, h, i, j: s + factor * (j == 3) * 0.5, "deterministic": True}
    q, k, v = drawn(1, 21, 1, 16), drawn(1, 37, 1, 16, seed=1), drawn(1, 37, 1, 16, seed=2)
    (want,), (got,) = (gradients(backend, (factor,), (q, k, v * size), **options) for backend in ("torch", "triton"))
    assert got.isfinite() and got != 0
    torch.testing.assert_close(got / want, torch.tensor(1.0), rtol=1e-4, atol=0.0)


def test_a_gradient_that_nobody_wants_costs_no_pass() -> None:
    """Neither of two operands' gradients: dQ runs once, and nothing of their size is allocated."""
    bias = drawn(21, 37, seed=3)
    q = drawn(2, 21, 4, 16).requires_grad_()
    k = v = drawn(2, 37, 2, 16, seed=1)
    seen: list[Any] = []
    launch = execution._launch

    def spied(plan: Any, operands: Any, *arguments: Any, **extra: Any) -> None:
        seen.append(extra)
        launch(plan, operands, *arguments, **extra)

    with mock.patch.object(execution, "_launch", spied):
        out = flashgen.attention(q, k, v, bias=bias, backend="triton", deterministic=True)
        torch.autograd.grad(out.sum(), q)  # type: ignore[union-attr]
    assert seen[-1]["dbias"] is None


def test_a_number_that_is_copied_to_the_device_gets_its_gradient() -> None:
    """As on a GPU, where a 0-d tensor of the CPU is moved: the kernel has another tensor than the user."""
    factor = torch.tensor(0.7).requires_grad_()

    def copied(made: Any, tensors: Any, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(x.detach().clone() for x in bound(made, tensors, device))

    options = {"score_mod": lambda s, b, h, i, j: s * factor}
    (want,) = gradients("torch", (factor,), **options)
    bound = programs.bound
    with mock.patch.object(programs, "bound", copied):
        (got,) = gradients("triton", (factor,), **options)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_bias_of_each_score_in_fp64_is_stored_in_its_own_type() -> None:
    """Eight bytes an element: the interpreter's guard between elements counts them all."""
    bias = drawn(2, 4, 21, 37, seed=9).double().requires_grad_()
    (got,), (want,) = (gradients(backend, (bias,), bias=bias) for backend in ("triton", "torch"))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_ordered_sums_are_of_the_largest_row() -> None:
    """One row's gradient is 2^40 of the others': the units of all have to leave room for it."""
    tensors = drawn(1, 21, 1, 16).requires_grad_(), drawn(1, 37, 1, 16, seed=1), drawn(1, 37, 1, 16, seed=2)
    table = drawn(5, seed=4).requires_grad_()
    weights = torch.ones(1, 21, 1, 16).cumsum(-1).sin()
    weights[:, 3] *= 2.0**40
    found = []
    for backend in ("torch", "triton"):
        with mock.patch.object(TritonBackward, "default", lambda self, spec, target: CONFIG):
            out: Any = flashgen.attention(
                *tensors, score_mod=lambda s, b, h, i, j: s + table[(i - j) % 5], backend=backend, deterministic=True
            )  # type: ignore[call-overload]
            found += torch.autograd.grad((out * weights).sum(), table)
    torch.testing.assert_close(found[1] / found[0], torch.ones(5), rtol=1e-4, atol=0.0)
