"""The interpreter's bf16, repaired by the worker, pinned by value (Triton 3.6 and 3.9 are both wrong without)."""

from __future__ import annotations

import pytest
import torch
from handwritten import kernel
from torch import Tensor

from flashgen import interpret

ROUND_UP = 1 + 3 * 2.0**-8  # halfway between 1 + 2^-7 and 1 + 2^-6: to the even one, above
CASTS = [
    (1.0 + 2.0**-8, 1.0),  # halfway: to the even one, below
    (ROUND_UP, 1.0 + 2.0**-6),
    (1.0 + 2.0**-8 + 2.0**-20, 1.0 + 2.0**-7),  # just above halfway
    (-ROUND_UP, -1.0 - 2.0**-6),
    (2.0 - 2.0**-9, 2.0),  # the carry runs into the exponent
    (3.4e38, float("inf")),  # above the largest bf16, 3.39e38
    (float("inf"), float("inf")),
    (float("-inf"), float("-inf")),
    (float("nan"), float("nan")),
    (-0.0, -0.0),
    (1e-40, 9.183549615799121e-41),  # subnormal
    (0.1, 0.10009765625),
]


def run(body: str, q: Tensor, o: Tensor) -> Tensor:
    interpret.launch(kernel(body), q, q.clone(), q.clone(), o, None, sm_scale=1.0, causal_offset=0)
    return o


def padded(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values + [0.0] * (16 - len(values)), dtype=dtype).reshape(1, 1, 1, 16)


@pytest.mark.parametrize("how", ["tl.load(q + i).to(tl.bfloat16)", "tl.load(q + i)"], ids=["cast", "store"])
def test_a_cast_to_bf16_rounds_to_nearest_even(how: str) -> None:
    o = run(
        f"i = tl.arange(0, N)\ntl.store(o + i, {how})",
        padded([x for x, _ in CASTS], torch.float32),
        padded([], torch.bfloat16),
    )
    expected = padded([y for _, y in CASTS], torch.bfloat16)
    torch.testing.assert_close(o, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(o.signbit(), expected.signbit())


def test_every_bf16_widens_exactly() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    q = bits.view(torch.bfloat16).reshape(1, 1, 1, -1)
    body = "i = tl.arange(0, N)\nx = tl.load(q + i)\ntl.store(o + i, x.to(tl.float32))"
    o = run(body, q, torch.zeros(q.shape, dtype=torch.float32))
    torch.testing.assert_close(o, q.float(), rtol=0, atol=0, equal_nan=True)


def test_bf16_and_fp16_convert_into_each_other() -> None:
    q = padded([1.0 + 2.0**-8, 65504.0, 1e-7, float("inf")], torch.float16)
    body = "i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i).to(tl.bfloat16))"
    assert torch.equal(run(body, q, padded([], torch.bfloat16)), q.bfloat16())
    q = padded([1.5, 1e6, 1e-30], torch.bfloat16)
    body = "i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i).to(tl.float16))"
    assert torch.equal(run(body, q, padded([], torch.float16)), q.half())


@pytest.mark.parametrize("precision", ["", ', input_precision="ieee"'])
def test_a_bf16_dot_multiplies_values_and_accumulates_in_fp32(precision: str) -> None:
    q = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    body = f"""
i = tl.arange(0, 16)
ij = i[:, None] * 16 + i[None, :]
x = tl.load(q + ij)
acc = tl.full([16, 16], 0.5, tl.float32)
acc = tl.dot(x, tl.trans(x), acc{precision})
tl.store(o + ij, acc)
"""
    o = run(body, q, torch.zeros(1, 1, 16, 16))
    exact = q[0, 0].double() @ q[0, 0].double().T + 0.5
    torch.testing.assert_close(o[0, 0].double(), exact, rtol=1e-6, atol=1e-6)


def test_masked_loads_of_bf16_fill_with_zero() -> None:
    body = "i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i, mask=i < 3, other=0.0))"
    o = run(body, padded([1.0] * 16, torch.bfloat16), padded([], torch.bfloat16))
    assert o.flatten().tolist() == [1.0] * 3 + [0.0] * 13
