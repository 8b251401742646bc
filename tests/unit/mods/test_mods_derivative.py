"""Reverse mode on the graph against torch.autograd in fp64, and the emitted derivative in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mods_running import CPU, derivative_in_triton
from torch import Tensor

from flashgen import mods
from flashgen.mods import in_torch, semantics

HEADS = torch.linspace(0.25, 1.0, 4, dtype=torch.float64).requires_grad_()
TABLE = torch.linspace(-1.0, 1.0, 128, dtype=torch.float64).view(4, 32).requires_grad_()
SCALAR = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
FIXED = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64)
PAIRS = torch.linspace(-2.0, 2.0, 256, dtype=torch.float64).view(16, 16).clone().requires_grad_()
FREE = torch.linspace(-1.0, 1.5, 16, dtype=torch.float64).clone().requires_grad_()
ORDER = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3])

CASES: dict[str, Callable[..., Any]] = {
    "identity": lambda s, b, h, q, k: s,
    "independent": lambda s, b, h, q, k: (q - k).float(),
    "arithmetic": lambda s, b, h, q, k: 3 * s - s * q + (s - k) * s,
    "quotient": lambda s, b, h, q, k: (s + 1) / (s * s + 2) + 1 / (s**2 + 1),
    "powers": lambda s, b, h, q, k: s**3 + (s.abs() + 0.1) ** 2.5 + (s.abs() + 0.1) ** (s * 0.1) + s**0,
    "negative power": lambda s, b, h, q, k: (s - 10.0) ** -2.0,
    "absolute": lambda s, b, h, q, k: (s - 0.5).abs(),
    "where": lambda s, b, h, q, k: torch.where(q >= k, s * 2, s * s),
    "hidden": lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf),
    "clamp": lambda s, b, h, q, k: s.clamp(-1.0, 0.5) + s.clamp_min(0.5) + s.clamp(max=0.5),
    "clamp to tensors": lambda s, b, h, q, k: torch.clamp(s, s * 0.5 - 1, s * 0.25 + 1),
    "relu": lambda s, b, h, q, k: torch.relu(s) + torch.relu(s - 0.5),
    "maximum": lambda s, b, h, q, k: torch.maximum(s, s * s) + torch.minimum(s, s.new_tensor(0.5)),
    "fmax": lambda s, b, h, q, k: torch.fmax(s, s * s) + torch.fmin(s, s.new_tensor(0.5)),
    "exponentials": lambda s, b, h, q, k: torch.exp(s) + torch.exp2(s * 0.5),
    "logarithms": lambda s, b, h, q, k: torch.log(s.abs() + 0.1) + torch.log2(s * s + 0.1),
    "roots": lambda s, b, h, q, k: torch.sqrt(s * s + 0.1) + torch.rsqrt(s * s + 0.1) + (s * s + 0.1) ** 0.5,
    "tanh": lambda s, b, h, q, k: 20 * torch.tanh(s / 20) + torch.tanh(s),
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s * 2),
    "trigonometry": lambda s, b, h, q, k: torch.sin(s) * torch.cos(s * 2),
    "erf": lambda s, b, h, q, k: torch.erf(s),
    "silu": lambda s, b, h, q, k: torch.nn.functional.silu(s) + torch.nn.functional.mish(s),
    "gelu": lambda s, b, h, q, k: torch.nn.functional.gelu(s) + torch.nn.functional.gelu(s * 2, approximate="tanh"),
    "softplus": lambda s, b, h, q, k: torch.nn.functional.softplus(s * 30) + torch.nn.functional.softplus(s, beta=2.0),
    "bent lines": lambda s, b, h, q, k: torch.nn.functional.leaky_relu(s, 0.1) + torch.nn.functional.elu(s * 30) + torch.selu(s),
    "hard lines": lambda s, b, h, q, k: torch.nn.functional.hardtanh(s) + torch.nn.functional.hardswish(s * 2) * HEADS[h],
    "one plus": lambda s, b, h, q, k: torch.log1p(s * s) + torch.expm1(s) + torch.log10(s * s + 1) + torch.erfc(s),
    "fused": lambda s, b, h, q, k: torch.lerp(s, s * s, 0.25) + torch.addcmul(s, s, FREE[q], value=0.5) + torch.addcdiv(s, s, FREE[k] + 3),
    "rounding": lambda s, b, h, q, k: s * torch.floor(s * 3) + torch.ceil(s) + torch.round(s) + torch.sign(s) + s.trunc(),
    "to integers and back": lambda s, b, h, q, k: s * (s * 3).to(torch.int32),
    "a table": lambda s, b, h, q, k: s * HEADS[h] + HEADS[h] ** 2,
    "a table by distance": lambda s, b, h, q, k: s + TABLE[h, q - k + 16] * s,
    "negative indices": lambda s, b, h, q, k: s + TABLE[-1 - h, k - 16].exp(),
    "a table twice": lambda s, b, h, q, k: s * TABLE[h, q] + TABLE[h, k],
    "a 0-d tensor": lambda s, b, h, q, k: torch.tanh(s * SCALAR) * SCALAR,
    "a fixed table": lambda s, b, h, q, k: s * FIXED[q] + HEADS[h],
    "tangent": lambda s, b, h, q, k: torch.tan(s * 0.1) + torch.tan(b),
    "sine of a cosine": lambda s, b, h, q, k: torch.sin(torch.cos(s)) + torch.tan(b),
    "a bias of every pair": lambda s, b, h, q, k: s + PAIRS[q, k],
    "flipped indices": lambda s, b, h, q, k: s + PAIRS[k, q] * s,
    "a symmetric bias": lambda s, b, h, q, k: s + FREE[q] + FREE[k],
    "a factor of queries": lambda s, b, h, q, k: s * FREE[q],
    "a temperature of heads": lambda s, b, h, q, k: s / HEADS[h],
    "a gate of heads": lambda s, b, h, q, k: s * torch.sigmoid(HEADS[h]),
    "an indirect index": lambda s, b, h, q, k: s + FREE[ORDER[q]] * s,
    "a window of a table": lambda s, b, h, q, k: torch.where((q - k).abs() <= 3, s + FREE[(q - k + 3).clamp(0, 6)], -torch.inf),
    "two tables": lambda s, b, h, q, k: s * FREE[k] + PAIRS[q, k] - HEADS[h] * FREE[q],
    "a row of a table": lambda s, b, h, q, k: s + TABLE[3][k] * s + TABLE[1, 2],
    "reductions": lambda s, b, h, q, k: s * HEADS.sum() + TABLE.view(4, 8, 4)[h, q // 2].mean(-1) + PAIRS[q, :3].square().sum(-1),
    "shifted by bits": lambda s, b, h, q, k: s * (1 << (h - 1)) + s * ((q ^ k) & 3) + s * ((q - 9) // 2) + s * ((q - k) % 3),
    "remainders": lambda s, b, h, q, k: s * torch.fmod(q - k, 3) + s * torch.div(q - k, -3, rounding_mode="trunc") * HEADS[h],
    "casts": lambda s, b, h, q, k: s.double() * 2 + s.to(torch.float64).float() * HEADS[h] + s * (s > 0).float(),
    "minimum of a tie": lambda s, b, h, q, k: torch.minimum(s, s.clone()) + torch.max(s, HEADS[h].float()) * HEADS[h],
    "power of two": lambda s, b, h, q, k: s * 2.0 ** (-(h + 1) / 2) + 2.0 ** (s * 0.5) + (s.abs() + 0.5) ** 0.0,
    "computed before it is indexed": lambda s, b, h, q, k: s * (HEADS * 2).exp()[h],
}  # fmt: skip


def inputs() -> tuple[Tensor, Tensor]:
    """Scores with ties and kinks (0, 0.5, 1), and gradients."""
    generator = torch.Generator().manual_seed(5)
    score, grad = torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    score[0, :6] = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0, -0.5])
    return score.float().double(), grad.float().double()


def by_autograd(function: Callable[..., Any], score: Tensor, grad: Tensor, h: int) -> tuple[Tensor, dict[int, Tensor]]:
    s = score.clone().requires_grad_()
    i, j = torch.arange(16, dtype=torch.int32)[:, None], torch.arange(16, dtype=torch.int32)[None]
    new = function(s, torch.tensor([[0]]), torch.tensor([[h]]), i, j)
    leaves = [s, HEADS, TABLE, SCALAR, PAIRS, FREE]
    if not new.requires_grad:
        return torch.zeros_like(score), {}
    found = torch.autograd.grad(new, leaves, grad.expand(new.shape), allow_unused=True)
    tables = {id(leaf): g for leaf, g in zip(leaves[1:], found[1:], strict=True) if g is not None}
    return torch.zeros_like(score) if found[0] is None else found[0], tables


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_autograds(name: str) -> None:
    score, grad = inputs()
    program, tensors = mods.program(CASES[name], {}, CPU)
    tables = [np.asarray(tensor.detach()) for tensor in tensors]
    index = np.arange(16, dtype=np.int32)
    arguments = {"b": np.int32(0), "h": np.int32(2), "q_idx": index[:, None], "kv_idx": index[None]}
    arguments |= {"score": score.numpy().astype(np.float32), "grad": grad.numpy().astype(np.float32)}
    expected, expected_tables = by_autograd(CASES[name], score, grad, 2)

    found = semantics.evaluate(program.derivative.score, arguments, tables)
    np.testing.assert_allclose(np.broadcast_to(found, (16, 16)), expected.numpy(), rtol=2e-5, atol=2e-5)

    sums = {id(tensor): np.zeros(tensor.shape) for tensor in tensors if tensor.requires_grad}
    for one in program.derivative.contributions:
        value = np.broadcast_to(semantics.evaluate(one.value, arguments, tables), (16, 16))
        places = [np.broadcast_to(semantics.evaluate(i, arguments, tables), (16, 16)) for i in one.indices]
        total = sums[id(tensors[one.capture])]
        if places:
            np.add.at(total, tuple(places), value)
        else:
            total += value.sum()
    assert set(sums) == set(expected_tables)
    for key, total in sums.items():
        np.testing.assert_allclose(total, expected_tables[key].numpy(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _without(x: Tensor) -> Tensor:
    return x.exp()


def _inside(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    with torch.no_grad():
        scale = TABLE[h, q] * s
        with torch.enable_grad():
            again = s * HEADS[h]
    return s * scale + again


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: s * s.detach() + TABLE.detach()[h, q] * HEADS[h],
        lambda s, b, h, q, k: s * TABLE[h, q].detach() + TABLE.data[h, k] * TABLE[h, q],
        lambda s, b, h, q, k: s + (s.sigmoid().round() - s.sigmoid()).detach() * HEADS[h],
        lambda s, b, h, q, k: s * _without(TABLE[h, q]) + s.detach().half().float(),
        _inside,
    ],
    ids=["detach", "data", "straight through", "decorated", "no_grad"],
)
def test_a_gradient_stops_where_the_function_stops_it(mod: Callable[..., Any]) -> None:
    score, grad = inputs()
    program, tensors = mods.program(mod, {}, CPU)
    index = np.arange(16, dtype=np.int32)
    arguments = {"b": np.int32(0), "h": np.int32(2), "q_idx": index[:, None], "kv_idx": index[None]}
    arguments |= {"score": score.numpy().astype(np.float32), "grad": grad.numpy().astype(np.float32)}
    tables = [np.asarray(tensor.detach()) for tensor in tensors]
    expected, of_tables = by_autograd(mod, score, grad, 2)
    found = semantics.evaluate(program.derivative.score, arguments, tables)
    np.testing.assert_allclose(np.broadcast_to(found, (16, 16)), expected.numpy(), rtol=2e-5, atol=2e-5)
    reached = {id(tensors[one.capture]) for one in program.derivative.contributions}
    assert reached == set(of_tables)
    for tensor in tensors:
        parts = [one for one in program.derivative.contributions if tensors[one.capture] is tensor]
        total = sum(np.broadcast_to(semantics.evaluate(one.value, arguments, tables), (16, 16)).sum() for one in parts)
        if parts:
            np.testing.assert_allclose(total, of_tables[id(tensor)].sum().item(), rtol=1e-4, atol=1e-4)
    assert program.score is not None
    remade = in_torch.function(program.score, program.captures)  # the program written as PyTorch's stops there, too

    def again(*arguments: Tensor) -> Tensor:
        found: Tensor = remade(*arguments, *tensors)
        return found

    expected_again, of_tables_again = by_autograd(again, score, grad, 2)
    torch.testing.assert_close(expected_again.float(), expected.float(), rtol=1e-5, atol=1e-5)
    assert set(of_tables_again) == set(of_tables)


def test_a_contribution_says_what_it_is_summed_over() -> None:
    program, _ = mods.program(lambda s, b, h, q, k: s * TABLE[h, q] + HEADS[h] * SCALAR, {}, CPU)
    found = {program.captures[c.capture].name: c.summed_over for c in program.derivative.contributions}
    assert found == {
        "table": {"b", "kv_idx"},
        "heads": {"b", "q_idx", "kv_idx"},
        "scalar": {"b", "h", "q_idx", "kv_idx"},
    }


def test_tensors_that_want_no_gradient_get_none() -> None:
    program, _ = mods.program(lambda s, b, h, q, k: s * FIXED[q], {}, CPU)
    assert program.derivative.contributions == ()


# At most one captured tensor each; whole numbers of a table's gradient are added up in fp32.
EMITTED = [name for name in CASES if len(mods.program(CASES[name], {}, CPU)[1]) < 2 and name != "hidden"]


@pytest.mark.parametrize("name", EMITTED)
def test_the_emitted_derivative_is_the_graphs(name: str) -> None:
    score, grad = inputs()
    found, tables = derivative_in_triton(CASES[name], score.float(), grad.float(), 2)
    expected, expected_tables = by_autograd(CASES[name], score, grad, 2)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    for key, total in tables.items():
        torch.testing.assert_close(total.double(), expected_tables[key], rtol=1e-4, atol=1e-4)
