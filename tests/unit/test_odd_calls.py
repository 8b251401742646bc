"""Odd but legal calls that a kernel once answered wrongly: nothing is written where there are no queries, and caps far beyond the scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashgen
from flashgen import Problem, Target, UnsupportedProblemError, dispatch

H100 = Target.named("h100")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 3)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("sizes", [(0, 53), (53, 0)], ids=str)
def test_gradients_beside_nothing_are_zero(
    sizes: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The causal Hopper kernel left dk and dv as they were allocated where there are no queries."""
    honest = torch.empty

    def poisoned(*shape: Any, **rest: Any) -> torch.Tensor:
        made: torch.Tensor = honest(*shape, **rest)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    q, k, v = (
        torch.zeros(2, rows, heads, 16, dtype=torch.bfloat16, requires_grad=True)
        for rows, heads in ((sizes[0], 4), (sizes[1], 2), (sizes[1], 2))
    )
    out = flashgen.attention(q, k, v, backend="gluon", **options)
    assert isinstance(out, torch.Tensor)
    monkeypatch.setattr(torch, "empty", poisoned)
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert not gradient.any()


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 2.0**16), ("fp16", 2.0**16), ("fp32", 2.0**10)])
def test_a_cap_that_no_kernels_tanh_resolves_is_left_to_torch(dtype: Any, most: float) -> None:
    """At a cap of 2^20 the gradients of the Hopper kernel in bf16 were off by 9 %."""
    problem = Problem(
        dtype=dtype, batch=1, seqlen_q=64, seqlen_k=64, num_heads_q=2, num_heads_kv=1, head_dim=64, head_dim_v=64,
        softcap=most, requires_grad=True, device="cuda:0",
    )  # fmt: skip
    within = dispatch.resolve(problem, H100)
    assert "torch" not in (within.backend, within.backward.backend if within.backward else "")
    with pytest.warns(UserWarning, match="takes softcap up to"):
        beyond = dispatch.resolve(replace(problem, softcap=2 * most), H100)
    assert (beyond.backend, beyond.backward and beyond.backward.backend) == ("torch", "torch")
    for backend in ("triton", "gluon") if dtype != "fp32" else ("triton",):
        with pytest.raises(UnsupportedProblemError) as caught:
            dispatch.resolve(replace(problem, softcap=2 * most), H100, backend=backend)
        assert any("takes softcap up to" in reason for reason in caught.value.reasons.values())


def test_a_cap_far_beyond_the_scores_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8, generator=generator, requires_grad=True) for _ in range(3))
    plain, capped = (flashgen.attention(q, k, v, softcap=cap) for cap in (0.0, 1e9))
    torch.testing.assert_close(capped, plain)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (plain, capped)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
