"""Masks on a Hopper GPU where head_dim and head_dim_v are padded to different widths, as in DeepSeek's attention: NaN where nobody looks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulate"))

from judge import judge
from test_widths_sm90 import TABLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.mark.parametrize("name", TABLE)
def test_widths(name: str) -> None:
    said = judge(TABLE[name], device="cuda")
    assert said is None, said


SIZE, HIDDEN = 1500, slice(640, 720)
MASKS: dict[str, dict[str, Any]] = {
    "documents": {"mask_mod": lambda b, h, i, j: (i // 400 == j // 400) & (j <= i) & ((j < 640) | (j >= 720))},
    "causal and columns": {"causal": True, "mask_mod": lambda b, h, i, j: (j < 640) | (j >= 720)},
    "window": {"causal": True, "window_size": (300, 0)},
}


def results(backend: str, d: int, dv: int, poisoned: bool, **options: Any) -> list[Tensor]:
    """The output, lse, and gradients of q, k and v, of several tiles a multiprocessor."""
    generator = torch.Generator(device="cuda").manual_seed(d + dv)

    def draw(heads: int, width: int) -> Tensor:
        return torch.randn(2, SIZE, heads, width, device="cuda", generator=generator).bfloat16()

    q, k, v, dout = draw(16, d), draw(4, d), draw(4, dv), draw(16, dv)
    if poisoned:
        k[:, HIDDEN], v[:, HIDDEN] = torch.nan, torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = flashgen.attention(q, k, v, return_lse=True, backend=backend, **options)  # type: ignore[arg-type]
    out.backward(dout)
    return [out.detach(), lse.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("d, dv", [(192, 128), (128, 64), (64, 128)])
@pytest.mark.parametrize("mask", MASKS)
def test_beside_the_portable_kernel(mask: str, d: int, dv: int) -> None:
    found = results("gluon", d, dv, "mask_mod" in MASKS[mask], **MASKS[mask])
    for name, x, y in zip(
        ("out", "lse", "dq", "dk", "dv"), found, results("triton", d, dv, False, **MASKS[mask]), strict=True
    ):
        finite = y.isfinite()
        assert torch.equal(finite, x.isfinite()), name
        assert (x.float() - y.float())[finite].abs().max() < 0.02 * y.float()[finite].abs().max(), name
