"""Logits near 10^4 in 16 bit: a result may differ from the exact one in its last bit, and in nothing else."""

from __future__ import annotations

import torch

from flashgen.accuracy import Buffers


def is_extreme(dtype: str, values: str) -> bool:
    """Whether a row of the table is judged so: large logits in 16 bit (fp32 kernels subtract the maximum before they scale)."""
    return values == "large" and dtype != "fp32"


def require_last_bit(buffers: Buffers) -> None:
    """ARCHITECTURE.md, "The softmax has two forms": one key takes all, so that the honest run is exact and the budget no unit.

    Raises:
        AssertionError: an element is further off than its last bit, or lse is wrong.
    """
    (exact, exact_lse), _ = buffers.references()
    dtype = torch.finfo(buffers.o.dtype)
    ulp = dtype.eps * exact.abs().clamp_min(dtype.tiny)
    assert ((buffers.o.double() - exact).abs() <= ulp).all()
    if buffers.lse is not None and exact_lse is not None:
        assert torch.allclose(buffers.lse.double(), exact_lse.double(), rtol=2**-22, atol=1e-4)
