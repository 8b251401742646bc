"""Elements beyond 2^31 of their tensor: strides that far apart, over memory that is mapped but not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen

FAR = (1 << 29) + 8  # elements between one token and the next: the fifth one lies beyond 2^31


def far(shape: tuple[int, ...], axis: int, seed: int) -> Tensor:
    """Random fp16 of that shape whose steps along one axis are `FAR` elements; only the pages of its elements are touched."""
    inner = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        inner[dim] = inner[dim + 1] * shape[dim + 1]
    inner[axis] = FAR
    storage = torch.empty(FAR * (shape[axis] - 1) + 4096, dtype=torch.float16)
    x = storage.as_strided(shape, inner)
    return x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "causal": True}, {"window_size": (2, 1), "return_lse": True}])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_torch_backend_reaches_them(axis: int, options: dict[str, Any]) -> None:
    """The fused path, the blocked loops and both backwards give what they give on compact copies, up to rounding."""
    size = 6
    shape = (*(size if dim == axis else 2 for dim in range(3)), 16)
    q, k, v = (far(shape, axis, seed) for seed in range(3))
    assert (size - 1) * k.stride(axis) > 2**31

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = flashgen.attention(*leaves, backend="torch", **options)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    got, want = run(q, k, v), run(*(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)))
    for a, b in zip(got, want, strict=True):
        assert b.float().abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)  # a product may be blocked otherwise


def test_packed_sequences_reach_them() -> None:
    q, k, v = (far((6, 2, 16), 0, seed) for seed in range(3))
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    got, want = (
        flashgen.varlen_attention(*tensors, ends, ends, 4, 4, backend="torch")
        for tensors in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous()))
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)
