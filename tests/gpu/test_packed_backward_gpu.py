"""Packed sequences by the Hopper backward on a Hopper GPU: TMA that ends where a sequence does, sums in a fixed order, the order of thread blocks."""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulate"))

from judge import judge
from test_packed_bwd_sm90 import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    said = judge(CASES[name], device="cuda")
    assert said is None, said


LENGTHS = (700, 64, 0, 1301, 5, 3000, 128, 257, 2000, 1, 90)


def gradients(backend: str, deterministic: bool, head_dim: int, **options: Any) -> list[Tensor]:
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(3)
    q, k, v, dout = (
        torch.randn(sum(LENGTHS), heads, head_dim, device="cuda", generator=generator).bfloat16()
        for heads in (4, 2, 2, 4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    out = flashgen.varlen_attention(
        q,
        k,
        v,
        ends,
        ends,
        3000,
        3000,
        backend=backend,
        deterministic=deterministic,
        **options,  # type: ignore[arg-type]
    )
    out.backward(dout)  # type: ignore[union-attr]
    return [x.grad for x in (q, k, v) if x.grad is not None]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window_size": (300, 0)}], ids=str)
def test_unequal_lengths(options: dict[str, Any], head_dim: int) -> None:
    """Beside the portable kernel, which is bitwise the same on every run; in order, twice."""
    fast, first, second = (gradients("gluon", ordered, head_dim, **options) for ordered in (False, True, True))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
    for found in (fast, first):
        for x, y in zip(found, gradients("triton", False, head_dim, **options), strict=True):
            assert (x.float() - y.float()).abs().max() < 0.02 * y.float().abs().max()
