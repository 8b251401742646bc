"""The oracle against torch's own attention in fp64, and the low-precision reference against its description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen import reference
from flashgen.reference import attention_low_precision, attention_oracle, visible_keys


def tensors(
    sq: int, sk: int, hq: int = 1, hkv: int = 1, d: int = 16, dv: int = 16, batch: int = 1, dtype: Any = torch.float32
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, sq, hq, d), (batch, sk, hkv, d), (batch, sk, hkv, dv))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


def by_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool, offset: int, scale: float) -> tuple[Tensor, Tensor]:
    """Materialised attention by other means: scaled_dot_product_attention in fp64 and logsumexp."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    mask = (j <= i + offset) if causal else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    lse = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).logsumexp(-1)
    return out.transpose(1, 2).masked_fill((lse == -torch.inf).transpose(1, 2)[..., None], 0.0), lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alignment", ["bottom-right", "top-left"])
@pytest.mark.parametrize(
    ("sq", "sk", "hq", "hkv", "d", "dv"),
    [(7, 7, 1, 1, 16, 16), (5, 13, 4, 2, 3, 8), (13, 5, 6, 2, 8, 3), (1, 9, 8, 1, 16, 1), (9, 1, 3, 3, 1, 5)],
)
def test_oracle_is_exact_attention(
    causal: bool, alignment: str, sq: int, sk: int, hq: int, hkv: int, d: int, dv: int
) -> None:
    q, k, v = tensors(sq, sk, hq, hkv, d, dv, batch=2, dtype=torch.bfloat16)
    offset = sk - sq if alignment == "bottom-right" else 0
    out, lse = attention_oracle(q, k, v, causal=causal, causal_offset=offset, sm_scale=0.3)
    expected = by_torch(q, k, v, causal, offset, 0.3)
    assert out.dtype == lse.dtype == torch.float64
    assert out.shape == (2, sq, hq, dv)
    assert lse.shape == (2, hq, sq)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-13)


def test_blocking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(50, 40, 4, 2)
    options: dict[str, Any] = {"causal": True, "causal_offset": -10, "sm_scale": 0.25}
    whole = attention_oracle(q, k, v, **options)
    low = attention_low_precision(q, k, v, **options)
    monkeypatch.setattr(reference, "_MAX_SCORES", 7 * 2 * 40)  # 7 rows at a time
    torch.testing.assert_close(attention_oracle(q, k, v, **options), whole, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(attention_low_precision(q, k, v, **options), low, rtol=1e-6, atol=1e-6)


def test_rows_without_a_key_are_zero_and_minus_inf() -> None:
    q, k, v = tensors(10, 4)
    for run in (attention_oracle, attention_low_precision):
        out, lse = run(q, k, v, causal=True, causal_offset=-6, sm_scale=1.0)
        assert not out[:, :6].any()
        assert (lse[..., :6] == -torch.inf).all()
        assert torch.isfinite(lse[..., 6:]).all()


@pytest.mark.parametrize(("sq", "sk", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 5, 0)])
def test_empty(sq: int, sk: int, batch: int) -> None:
    for run in (attention_oracle, attention_low_precision):
        out, lse = run(*tensors(sq, sk, batch=batch), causal=False, causal_offset=0, sm_scale=1.0)
        assert out.shape == (batch, sq, 1, 16)
        assert not out.any()
        assert (lse == -torch.inf).all()


def test_keys_nobody_sees_are_never_read() -> None:
    q, k, v = tensors(4, 9)
    clean = attention_oracle(q, k, v, causal=True, causal_offset=1, sm_scale=1.0)
    k[:, 5:], v[:, 5:] = torch.nan, torch.nan
    assert visible_keys(4, 9, True, 1) == 5
    assert all(map(torch.equal, attention_oracle(q, k, v, causal=True, causal_offset=1, sm_scale=1.0), clean))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_what_it_says(dtype: torch.dtype) -> None:
    """Written out once more: S and softmax in fp32, P rounded, PV in fp32, one rounding out."""
    q, k, v = tensors(33, 47, dtype=dtype)
    out, lse = attention_low_precision(q, k, v, causal=False, causal_offset=0, sm_scale=0.25)
    s = (q[0, :, 0].float() @ k[0, :, 0].float().T) * 0.25
    p = torch.exp(s - s.amax(1, keepdim=True))
    expected = (p.to(dtype).float() @ v[0, :, 0].float() / p.sum(1, keepdim=True)).to(dtype)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out[0, :, 0], expected, rtol=0, atol=1e-7 if dtype == torch.float32 else 0)
    torch.testing.assert_close(lse[0, 0], s.logsumexp(1), rtol=1e-6, atol=1e-6)


def test_a_caller_who_allowed_tf32_does_not_loosen_the_reference() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        attention_low_precision(*tensors(5, 5), causal=False, causal_offset=0, sm_scale=1.0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_s_4096_fits_and_lse_stays_natural() -> None:
    q, k, v = tensors(4096, 4096, d=8, dv=4)
    out, lse = attention_oracle(q * 0, k, v, causal=True, causal_offset=0, sm_scale=1.0)
    torch.testing.assert_close(lse[0, 0], torch.arange(1, 4097, dtype=torch.float64).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[0, -1, 0], v[0, :, 0].double().mean(0), rtol=1e-10, atol=1e-12)
