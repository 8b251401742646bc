"""PyTorch's fused CPU kernels, where the torch backend takes them: the same numbers as the blocked loops, and no others."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen.torch_blocked import Options, blocked, fused


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES = {
    "full": {"sq": 37, "sk": 53, "hq": 2, "hkv": 2, "causal": False},
    "grouped": {"sq": 37, "sk": 53, "hq": 6, "hkv": 2, "causal": False},
    "causal": {"sq": 40, "sk": 40, "hq": 2, "hkv": 1, "causal": True},
    "causal, keys that nobody sees": {"sq": 17, "sk": 40, "hq": 4, "hkv": 2, "causal": True},
    "causal, more queries than keys": {"sq": 40, "sk": 17, "hq": 4, "hkv": 2, "causal": True},
    "one query": {"sq": 1, "sk": 65, "hq": 2, "hkv": 2, "causal": False},
}


@pytest.mark.parametrize("strides", ["dense", "swapped", "expanded dout"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradients_against_fp64_and_the_blocked_loops(case: dict[str, Any], strides: str) -> None:
    sq, sk, hq, hkv, causal = (case[name] for name in ("sq", "sk", "hq", "hkv", "causal"))
    q, k, v = draw(2, sq, hq, 24, seed=0), draw(2, sk, hkv, 24, seed=1), draw(2, sk, hkv, 24, seed=2)
    dout = draw(2, sq, hq, 24, seed=3)
    if strides == "swapped":
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    elif strides == "expanded dout":
        dout = draw(1, 1, 1, 24, seed=3).expand(2, sq, hq, 24)
    hidden = slice(sq, None) if causal else slice(sk, None)
    k[:, hidden], v[:, hidden] = math.nan, math.nan  # nobody sees them
    options = Options(sm_scale=0.3, causal=causal)
    out, lse = torch.empty(2, sq, hq, 24), torch.empty(2, hq, sq)
    fused.forward(q, k, v, options, out, lse)
    assert fused.covers_backward(dout, None, q, k, v, lse, options)
    found = fused.backward(dout, q, k, v, out, lse, options)[:3]
    other = blocked.backward(dout, None, q, k, v, out, lse, options)[:3]

    exact = [x.double().nan_to_num().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", exact[0], exact[1].repeat_interleave(hq // hkv, 2)) * 0.3
    if causal:
        scores = scores.masked_fill(~torch.ones(sq, sk, dtype=torch.bool).tril(), -math.inf)
    result = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), exact[2].repeat_interleave(hq // hkv, 2))
    result.backward(dout.double())
    for a, b, x, like in zip(found, other, exact, (q, k, v), strict=True):
        assert x.grad is not None and a.shape == like.shape
        # As accurate as the blocked loops, which the error budget is held to everywhere.
        error, bar = (a - x.grad).abs(), (b - x.grad).abs()
        assert bar.max() <= 1e-5 * x.grad.abs().max()
        assert error.mean() <= 1.2 * bar.mean() and error.max() <= 2.0 * bar.max()


@pytest.mark.parametrize(
    ("why", "taken", "options"),
    [
        ("plain fp32", True, {}),
        ("16 bit: less accurate than the blocked one", False, {"dtype": torch.bfloat16}),
        ("a gradient of lse", False, {"lse": True}),
        ("bottom-right with a shift", False, {"causal": True}),
        ("a window", False, {"window_size": (3, 3)}),
        ("values of another head dim", False, {"dv": 8}),
    ],
)
def test_when_it_is_taken(why: str, taken: bool, options: dict[str, Any]) -> None:
    options = dict(options)
    dtype, with_lse, dv = options.pop("dtype", torch.float32), options.pop("lse", False), options.pop("dv", 16)
    q, k, v = (draw(1, n, 2, d, seed=d + n, dtype=dtype).requires_grad_() for n, d in ((20, 16), (30, 16), (30, dv)))
    with mock.patch.object(fused, "backward", wraps=fused.backward) as spy:
        out, lse = flashgen.attention(q, k, v, return_lse=True, **options)  # type: ignore[misc]
        (out.float().sum() + (lse.sum() if with_lse else 0.0)).backward()
    assert spy.called == taken, why
    assert q.grad is not None and bool(q.grad.isfinite().all())


def test_it_repeats_bit_for_bit() -> None:
    q, k, v, dout = (draw(2, 200, 4, 32, seed=i) for i in range(4))
    options = Options(sm_scale=0.2)
    out, lse = torch.empty_like(q), torch.empty(2, 4, 200)
    fused.forward(q, k, v, options, out, lse)
    first = fused.backward(dout, q, k, v, out, lse, options)[:3]
    for _ in range(3):
        again = fused.backward(dout, q, k, v, out, lse, options)[:3]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
