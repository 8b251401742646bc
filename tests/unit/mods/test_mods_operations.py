"""Every operation of the table: traced, emitted, run in Triton's interpreter and in NumPy, and compared with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mods_running import CPU, in_torch, in_triton

from flashgen import mods
from flashgen.mods import semantics

EDGES = torch.tensor([-2, 0, 3, 3, 9])
SMALL = torch.tensor([-7, 5, 3, -2, 0, 1, 9, -4, 100, -128, 127, 2, 33, -1, 6, 8], dtype=torch.int8)
FLAGS = torch.tensor([True, False] * 8)
HALF = torch.linspace(-3.0, 3.0, 16).half()
BRAIN = torch.linspace(-3.0, 3.0, 16).bfloat16()
WIDE = torch.tensor([2**40 + n * 12345 for n in range(16)])
BYTES = torch.arange(240, 256, dtype=torch.uint8)
DOUBLE = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64)

# Each operation of `graph`, in the ways in which users write it. q and k run over 0..15, s holds random numbers and every edge.
EXACT: dict[str, Callable[..., Any]] = {
    "add": lambda s, b, h, q, k: s + q - k * 2,
    "subtract from a number": lambda s, b, h, q, k: 1 - s,
    "alpha": lambda s, b, h, q, k: torch.sub(torch.add(s, q, alpha=3), k, alpha=2),
    "divide": lambda s, b, h, q, k: torch.floor(s / 3.0),
    "divide by a power of two": lambda s, b, h, q, k: s / 8,
    "divide integers": lambda s, b, h, q, k: torch.floor((q - k) / 3),
    "integer division": lambda s, b, h, q, k: s + (q - k) // 3 + (q - 8) // (k + 1) + (k - 9) // -4,
    "remainder": lambda s, b, h, q, k: s + (q - k) % 3 + (q - 8) % (k + 1) + (k - 9) % -4,
    "numbers divided": lambda s, b, h, q, k: s + 7 // (k + 1) + -7 // (k + 1) + 7 % (k - 20) + -7 % (q + 1),
    "rounding modes": lambda s, b, h, q, k: (
        s + torch.div(q - k, 3, rounding_mode="floor") + torch.div(q - k, -3, rounding_mode="trunc")
    ),
    "fmod": lambda s, b, h, q, k: s + torch.fmod(q - k, 3) + torch.fmod(q - k, -4),
    "integer power": lambda s, b, h, q, k: (q - k) ** 3 + s**2,
    "power of zero": lambda s, b, h, q, k: s**0,
    "absolute": lambda s, b, h, q, k: torch.abs(q - k) + s.abs(),
    "negate": lambda s, b, h, q, k: -s - (-q),
    "sign": lambda s, b, h, q, k: torch.sign(s) + torch.sgn(q - k),
    "floor": lambda s, b, h, q, k: torch.floor(s) + torch.ceil(s * 2),
    "round": lambda s, b, h, q, k: torch.round(s) + torch.round((q - k) / 2),
    "trunc": lambda s, b, h, q, k: torch.trunc(s),
    "square root": lambda s, b, h, q, k: torch.floor(torch.sqrt(q.float() * k)),
    "minimum": lambda s, b, h, q, k: torch.minimum(s, q.float()) + torch.maximum(q, k),
    "maximum with NaN": lambda s, b, h, q, k: torch.maximum(torch.where(q == 3, torch.nan, s), s.new_tensor(0.5)),
    "maximum of two": lambda s, b, h, q, k: torch.max(torch.where(q == 3, torch.nan, s), (k - q).float()),
    "fmax": lambda s, b, h, q, k: torch.fmax(torch.where(q == 3, torch.nan, s), (k - q).float()),
    "fmin": lambda s, b, h, q, k: torch.fmin((k - q).float(), torch.where(q == 3, torch.nan, s)),
    "clamp": lambda s, b, h, q, k: torch.clamp(s, -1.0, 1.0) + (q - k).clamp(min=-2) + (q - k).clamp(max=3),
    "clamp to tensors": lambda s, b, h, q, k: torch.clamp(s, -q.float(), k.float()),
    "relu": lambda s, b, h, q, k: torch.relu(s) + torch.nn.functional.relu(q - k),
    "where": lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf),
    "where of numbers": lambda s, b, h, q, k: s * torch.where(q >= k, 1, 0) + torch.where(q < k, 2.5, 0.0),
    "masked_fill": lambda s, b, h, q, k: s.masked_fill(q < k, -1e4),
    "logic": lambda s, b, h, q, k: torch.where((q > 3) & ~(k < 2) | (q == k) ^ (k != 7), s, 0.0),
    "a condition of scalars": lambda s, b, h, q, k: torch.where(~((h == 2) & (q >= k)), s, 0.0),
    "logical functions": lambda s, b, h, q, k: torch.where(
        torch.logical_and(q - 3, k) | torch.logical_not(k) | torch.logical_xor(q, k) & torch.logical_or(q, k), s, 1.0
    ),
    "bool arithmetic": lambda s, b, h, q, k: s + ((q > 3) + (k > 2)) * 1 + (q > 3) * (k > 2) + (q > 1) * 2,
    "bits": lambda s, b, h, q, k: s + ((q & 5) | (k ^ 3)) + ~(q - k),
    "shifts": lambda s, b, h, q, k: s + (q << 2) + ((k - 9) >> 1) + (1 << k),
    "shifts too far": lambda s, b, h, q, k: s + (q << (k * 4)) + ((q - 9) >> (k * 5)) + (q << 40) + ((q - 9) >> 40),
    "comparisons": lambda s, b, h, q, k: (s < q) * 1 + (s <= 0.1) * 2 + (s > k) * 4 + (s >= q) * 8 + (s == s) * 16,
    "comparison of an integer with a fraction": lambda s, b, h, q, k: torch.where(q < 2.5, s, 0.0),
    "isnan": lambda s, b, h, q, k: torch.where(torch.isnan(s / 0.0) | torch.isinf(s), 1.0, s),
    "casts": lambda s, b, h, q, k: (s * 10).to(torch.int32).to(torch.float32) + (q * 100).to(torch.int8) + s.bool(),
    "cast of a bool": lambda s, b, h, q, k: s + (q > k).float() + (q > k).int() * 3,
    "half and brain float": lambda s, b, h, q, k: s.half() * 3 + (s.bfloat16() + 1).float() + s.half() * s.bfloat16(),
    "brain float compared": lambda s, b, h, q, k: torch.where(s.bfloat16() < 0.1, s, 1.0),
    "type_as": lambda s, b, h, q, k: q.type_as(s) + s.to(s.dtype),
    "overflow": lambda s, b, h, q, k: (q * 2**28) * 3 + s * 0,
    "the least integers": lambda s, b, h, q, k: s + ((q + 2**31 >= k - 2**31) & (SMALL[q] - 128 < SMALL[k])),
    "int64": lambda s, b, h, q, k: ((q.long() * 2**40 + k) >> 38) + s,
    "in place": lambda s, b, h, q, k: s.add_(q).mul_(2),
    "constant": lambda s, b, h, q, k: torch.full_like(s, 2.5),
    "independent of the score": lambda s, b, h, q, k: (q + 1).float(),
    "created": lambda s, b, h, q, k: s + torch.tensor(3.0) + s.new_zeros(()) + torch.ones(()) + torch.zeros_like(s),
    "two to an integer": lambda s, b, h, q, k: s + 2 ** (k - 3) + 4**h + 1**q + 2 ** (k * 4),
    "threshold of a sum": lambda s, b, h, q, k: (
        s + torch.stack([q > 3, k > 2, q == k]).sum() + torch.stack([q, k]).sum()
    ),
    "any and all": lambda s, b, h, q, k: torch.where(
        torch.stack([q - 3, k]).all() | torch.stack([q > 9, k > 9, s > 0]).any(0), s, 1.0
    ),
    "lookup in a list": lambda s, b, h, q, k: s + torch.isin(q, EDGES) * 1 + torch.isin(k, 3, invert=True) * 2,
    "buckets": lambda s, b, h, q, k: (
        s + torch.bucketize(q - 3, EDGES) + torch.bucketize(s, EDGES.float(), right=True, out_int32=True)
    ),
    "stacked": lambda s, b, h, q, k: s + torch.stack([q, k, -k], 0)[(q - k) % 3] + torch.stack([q.float(), s])[-1],
    "squeezed": lambda s, b, h, q, k: s + HALF[None, :, None].squeeze()[q] + HALF[None].squeeze(0)[k],
    "nothing": lambda s, b, h, q, k: s,
    "0-d arguments": lambda s, b, h, q, k: s + b * 10 + h,
}
LOADS: dict[str, Callable[..., Any]] = {
    "int8": lambda s, b, h, q, k: s + SMALL[q] * SMALL[k],
    "bool": lambda s, b, h, q, k: torch.where(FLAGS[q] ^ FLAGS[k], s, 0.0),
    "half": lambda s, b, h, q, k: s + HALF[q] * HALF[k],
    "bfloat16": lambda s, b, h, q, k: s + BRAIN[q] * BRAIN[k] - BRAIN[(q + k) // 2],
    "int64": lambda s, b, h, q, k: s + (WIDE[q] - WIDE[k]),
    "uint8": lambda s, b, h, q, k: s + (BYTES[q] + BYTES[k]),
    "float64": lambda s, b, h, q, k: s + DOUBLE[q] * DOUBLE[k] * 0.1,
    "negative indices": lambda s, b, h, q, k: s + HALF[q - k],
    "two dimensions": lambda s, b, h, q, k: s + HALF.view(4, 4)[h, k // 4] + HALF.view(4, 4)[q // 4, h],
    "transposed": lambda s, b, h, q, k: s + HALF.view(4, 4).T[h, k // 4] + HALF.view(2, 8).permute(1, 0)[q // 2, b],
    "sliced": lambda s, b, h, q, k: s + HALF[2:10][k // 2] + HALF[::2][q // 2] + HALF[:, None][q, 0],
    "of a number": lambda s, b, h, q, k: s + HALF[3] + SMALL[-1],
    "of an index that is captured": lambda s, b, h, q, k: s + HALF[SMALL.abs()[q].long() % 16],
    "computed before it is indexed": lambda s, b, h, q, k: (
        s + (HALF * 2 + SMALL)[q] + torch.exp2(HALF.float()).floor()[k]
    ),
    "0-d": lambda s, b, h, q, k: s * HALF[7] + torch.where(q < ZERO_D, 1, 0) * ZERO_D,
    "reshaped": lambda s, b, h, q, k: s + HALF.view(2, 8)[b].view(4, 2)[h, k % 2] + SMALL.view(4, -1)[-h, k % 4],
    "made in the function": lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 4.0, 8.0])[k % 4],
}
ZERO_D = torch.tensor(9)
CLOSE: dict[str, Callable[..., Any]] = {
    "exp": lambda s, b, h, q, k: torch.exp(s) + torch.exp2(s),
    "log": lambda s, b, h, q, k: torch.log(s.abs() + 0.1) + torch.log2(q + 1),
    "rsqrt": lambda s, b, h, q, k: torch.rsqrt(s.abs() + 0.1) + torch.sqrt(k),
    "tanh": lambda s, b, h, q, k: torch.tanh(s) + 20 * torch.tanh(s / 20),
    "sigmoid": lambda s, b, h, q, k: torch.sigmoid(s),
    "trigonometry": lambda s, b, h, q, k: torch.sin(s) + torch.cos(q * 0.1),
    "erf": lambda s, b, h, q, k: torch.erf(s),
    "reciprocal": lambda s, b, h, q, k: torch.reciprocal(s.abs() + 1) + 1 / (q + 1),
    "silu": lambda s, b, h, q, k: torch.nn.functional.silu(s) + torch.nn.functional.mish(s),
    "gelu": lambda s, b, h, q, k: torch.nn.functional.gelu(s) + torch.nn.functional.gelu(s * 0.5, approximate="tanh"),
    "softplus": lambda s, b, h, q, k: (
        torch.nn.functional.softplus(s * 9) + torch.nn.functional.softplus(s, beta=2.0, threshold=3.0)
    ),
    "bent lines": lambda s, b, h, q, k: (
        torch.nn.functional.leaky_relu(s, 0.1) + torch.nn.functional.elu(s) + torch.nn.functional.selu(s)
    ),
    "hard lines": lambda s, b, h, q, k: (
        torch.nn.functional.hardtanh(s) + torch.nn.functional.hardswish(s) + torch.nn.functional.relu6(s * 4)
    ),
    "one plus": lambda s, b, h, q, k: torch.log1p(s * s) + torch.expm1(s) + torch.log10(s.abs() + 1) + torch.erfc(s),
    "fused": lambda s, b, h, q, k: (
        torch.lerp(s, q.float(), 0.25) + torch.addcmul(s, q.float(), s, value=0.5) + torch.addcdiv(s, s, k.float() + 1)
    ),
    "means": lambda s, b, h, q, k: s + (HALF.float().view(4, 4)[q // 4] * HALF.view(4, 4)[k // 4]).mean(-1),
    "dot": lambda s, b, h, q, k: s + torch.dot(HALF.float().view(4, 4)[q // 4], HALF.float().view(4, 4)[k // 4]),
    "sum of a captured row": lambda s, b, h, q, k: s + HALF.view(4, 4)[h].float().sum(-1) + HALF.float().sum(),
    "power of two": lambda s, b, h, q, k: s * 2.0 ** (-(h + 1) / 2) + 3.0 ** (q / 16),
    "power": lambda s, b, h, q, k: (q - k) ** ((k - 8).float()) + (s.abs() + 0.1) ** (k / 10) + q**0.5,
}


def scores() -> torch.Tensor:
    found = torch.randn(16, 16, generator=torch.Generator().manual_seed(3)) * 3
    found[0, :8] = torch.tensor([0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.1])
    return found


def in_numpy(function: Callable[..., Any], score: torch.Tensor, b: int, h: int) -> torch.Tensor:
    program, tensors = mods.program(function, {}, CPU)
    assert program.score is not None
    tables = [np.asarray(x.detach().float() if x.dtype == torch.bfloat16 else x.detach()) for x in tensors]
    index = np.arange(16, dtype=np.int32)
    inputs = {
        "score": score.numpy(),
        "b": np.int32(b),
        "h": np.int32(h),
        "q_idx": index[:, None],
        "kv_idx": index[None],
    }
    return torch.from_numpy(np.broadcast_to(semantics.evaluate(program.score, inputs, tables), (16, 16)).copy())


@pytest.mark.parametrize("name", [*EXACT, *(f"load {name}" for name in LOADS)])
def test_exact_operations_have_every_bit_of_pytorch(name: str) -> None:
    function = LOADS[name.removeprefix("load ")] if name.startswith("load ") else EXACT[name]
    score = scores()
    expected = in_torch("score_mod", function, score, 1, 2)
    for found in (in_triton("score_mod", function, score, 1, 2), in_numpy(function, score, 1, 2)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CLOSE)
def test_functions_are_as_close_as_fp32_allows(name: str) -> None:
    score = scores()
    expected = in_torch("score_mod", CLOSE[name], score, 1, 2)
    assert expected.isfinite().any()
    for found in (in_triton("score_mod", CLOSE[name], score, 1, 2), in_numpy(CLOSE[name], score, 1, 2)):
        torch.testing.assert_close(found, expected, rtol=4e-6, atol=1e-6, equal_nan=True)


def test_tanh_keeps_its_digits_near_zero() -> None:
    x = torch.linspace(-1.0, 1.0, 256).view(16, 16) ** 3
    found = in_triton("score_mod", lambda s, b, h, q, k: torch.tanh(s), x, 0, 0)
    relative = ((found.double() - x.double().tanh()) / x.double().tanh()).abs().max()
    assert relative < 5e-7, relative
    assert math.isfinite(relative)


@pytest.mark.parametrize("function", [torch.log1p, torch.expm1])
def test_functions_of_one_plus_a_little_keep_their_digits(function: Callable[..., Any]) -> None:
    x = torch.linspace(-0.9, 0.9, 256).view(16, 16) ** 7
    found = in_triton("score_mod", lambda s, b, h, q, k: function(s), x, 0, 0)
    wanted = function(x.double())
    assert ((found.double() - wanted) / wanted).abs().max() < 5e-7


def test_names_keep_clear_of_the_kernels_own() -> None:
    seqlen, kv, documents = (torch.arange(16, dtype=torch.int32) for _ in range(3))
    program, _ = mods.program(
        None, {"mask_mod": lambda b, h, q, k: (seqlen[q] == kv[k]) & (documents[q] == documents[k])}, CPU
    )
    emission = program.emit_mask()
    assert {row.name for row in program.captures} == {"mod_seqlen", "mod_kv", "documents"}
    assert emission.result == "(mod_seqlen_q == mod_kv_k) & (documents_q == documents_k)"


def test_indexing_step_by_step_is_right_for_single_indices() -> None:
    """`table[h][q]` is no elementwise function of blocks, but one of 0-d indices, as FlexAttention calls it."""
    table = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    found = in_triton("score_mod", lambda s, b, h, q, k: s + table[h][q] * table[:, k][h], torch.zeros(16, 16), 0, 2)
    assert torch.equal(found, table[2][:, None] * table[2][None])


def test_a_kernel_reads_nothing_outside_a_captured_tensor() -> None:
    """Rows and keys beyond the lengths fill up a tile: there 0 is read, whatever lies behind the tensor."""
    short = torch.full((16,), 7.0)[:5]
    found = in_triton("score_mod", lambda s, b, h, q, k: s + short[q] + short[k - 9], torch.zeros(16, 16), 0, 0)
    index = torch.arange(16)
    rows, columns = torch.where(index < 5, 7.0, 0.0), torch.where((index - 9 >= -5) & (index - 9 < 5), 7.0, 0.0)
    assert torch.equal(found, rows[:, None] + columns[None])
