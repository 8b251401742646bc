"""The oracle against torch's own attention in fp64, and the low-precision reference against its description."""

from __future__ import annotations

from itertools import combinations
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashgen.reference import (
    Call,
    attention_low_precision,
    attention_oracle,
    dropout_words,
    exact,
    plain,
    same_precision,
    visible_keys,
)
from flashgen.reference.every_option import _Rounding
from flashgen.reference.philox import philox4x32


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
    monkeypatch.setattr(plain, "_MAX_SCORES", 7 * 2 * 40)  # 7 rows at a time
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


# -- every option --


def column(*values: float) -> Tensor:
    """One sequence, one head, head dim 1."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (1.0, 3.0)),
        ({"sinks": torch.tensor([log(4.0)])}, (1.0, 3.0)),
        ({"bias": torch.tensor([log(2.0), 0.0])}, (2.0, 3.0)),
        ({"alibi": torch.tensor([log(2.0)])}, (0.5, 3.0)),
        ({"alibi": torch.tensor([log(2.0)]), "top_left": True}, (0.5, 3.0)),  # the distance knows no alignment
        ({"causal": True, "top_left": True}, (1.0, 0.0)),
        ({"causal": True}, (1.0, 3.0)),
        ({"window": (0, -1)}, (0.0, 3.0)),
        ({"window": (-1, 0), "top_left": True}, (1.0, 0.0)),
        ({"attn_mask": torch.tensor([False, True])}, (0.0, 3.0)),
        ({"mask_mod": lambda b, h, i, j: j == 0}, (1.0, 0.0)),
        ({"score_mod": lambda s, b, h, i, j: s + (j == 0) * log(5.0)}, (5.0, 3.0)),
        ({"softcap": 1.0}, (1.0, float(np.exp(np.tanh(log(3.0)))))),
        ({"sm_scale": 2.0}, (1.0, 9.0)),
    ],
)
def test_two_keys_by_hand(options: dict[str, Any], weights: tuple[float, float]) -> None:
    """Q = 1, k = (0, ln 3), v = (4, 8), dout = 2, dlse = 3: everything follows from the two weights."""
    call = Call(**({"sm_scale": 1.0} | options), q=column(1), k=column(0, log(3.0)), v=column(4, 8), dout=column(2), dlse=torch.full((1, 1, 1), 3.0))  # fmt: skip
    got, v = exact(call), np.array([4.0, 8.0])
    sink = 4.0 if "sinks" in options else 0.0
    total = sum(weights) + sink
    p = np.array(weights) / total
    out = p @ v
    ds = p * (2 * (v - out) + 3)
    assert got.out.item() == pytest.approx(out, rel=1e-6)
    assert got.lse.item() == pytest.approx(log(total), rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(got.gradients["v"].flatten(), 2 * p, rtol=1e-6, atol=1e-12)
    slope = options.get("sm_scale", 1.0)
    if "softcap" in options:
        slope = np.array([1.0, 1 - np.tanh(log(3.0)) ** 2])
    np.testing.assert_allclose(got.gradients["k"].flatten(), ds * slope, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got.gradients["q"].item(), (ds * slope)[1] * log(3.0), rtol=1e-6, atol=1e-7)
    if sink:
        assert got.gradients["sinks"].item() == pytest.approx(sink / total * (3 - 2 * out), rel=1e-6)
    if "bias" in options:
        np.testing.assert_allclose(got.gradients["bias"], ds, rtol=1e-6)
    (low,) = same_precision(call)
    for name, x in got.gradients.items():
        torch.testing.assert_close(low.gradients[name].double(), x, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(low.out.double(), got.out, rtol=1e-6, atol=1e-6)


def materialised(call: Call, table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Bias, ALiBi, mask and window written out as one matrix for torch's own attention in fp64, gradients by autograd."""
    leaves = {name: getattr(call, name).double().requires_grad_() for name in ("q", "k", "v", "bias")}
    leaves["captured0"] = table.double().requires_grad_()
    assert call.alibi is not None and call.attn_mask is not None
    (batch, sq, heads, _), sk = call.q.shape, call.k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(sq):
                row = []
                for j in range(sk):
                    d = sk - sq
                    seen = j <= i + d and j >= i + d - call.window[0] and bool(call.attn_mask[0, 0, i, j])
                    term = leaves["bias"][b, 0, 0, j] - call.alibi[b, h].double() * abs(i + d - j)
                    row.append(term + leaves["captured0"][h, (i - j) % 5] if seen else term.detach() * 0 - torch.inf)
                rows.append(torch.stack(row))
    matrix = torch.stack(rows).view(batch, heads, sq, sk)
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=matrix, scale=call.sm_scale)
    out = out.transpose(1, 2)
    assert call.dout is not None
    grads = torch.autograd.grad(out, list(leaves.values()), call.dout.double())
    return out.detach(), dict(zip(leaves, grads, strict=True))


def test_exact_is_torchs_attention_over_a_written_out_matrix() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = tensors(5, 8, 4, 2, 6, 3, batch=2)
    mask = torch.rand(1, 1, 5, 8, generator=g) < 0.7
    mask[..., 3] = True  # no row without a key: torch's own gives NaN there
    table = torch.randn(4, 5, generator=g)
    call = Call(
        q=q, k=k, v=v, sm_scale=0.4, causal=True, window=(4, -1), attn_mask=mask,
        alibi=torch.rand(2, 4, generator=g), bias=torch.randn(2, 1, 1, 8, generator=g),
        score_mod=lambda s, b, h, i, j, table: s + table[h, (i - j) % 5], captured=(table,),
        dout=torch.randn(2, 5, 4, 3, generator=g),
    )  # fmt: skip
    got, (out, gradients) = exact(call), materialised(call, table)
    torch.testing.assert_close(got.out, out, rtol=1e-12, atol=1e-13)
    assert got.gradients.keys() == gradients.keys()
    for name, want in gradients.items():
        torch.testing.assert_close(got.gradients[name], want, rtol=1e-10, atol=1e-12)


def test_dropout_multiplies_probabilities_after_the_softmax() -> None:
    q, k, v = tensors(9, 20, 2, 1, 4, 4, batch=2)
    call = Call(q=q, k=k, v=v, sm_scale=0.5, dropout_p=0.4, philox=(5, 6))
    whole = exact(Call(q=q, k=k, v=v, sm_scale=0.5))
    p = (call.heads_first(q.double()) @ call.heads_first(k.double()).mT * 0.5).softmax(-1)
    for b, h, i, j in np.ndindex(2, 2, 9, 20):
        word = int(dropout_words((5, 6), np.array(b * 2 + h), np.array(i), np.array(j)))
        p[b, h, i, j] *= (word >= round(0.4 * 2**32)) / 0.6
    torch.testing.assert_close(exact(call).out, (p @ call.heads_first(v.double())).transpose(1, 2))
    assert torch.equal(exact(call).lse, whole.lse)  # the denominator is of all keys


def test_a_row_without_a_key_has_no_gradient_and_hidden_keys_are_not_read() -> None:
    q, k, v = tensors(5, 7, 2, 1, 4, 4)
    options: dict[str, Any] = {"sm_scale": 0.5, "mask_mod": lambda b, h, i, j: (i != 1) & (j != 6)}
    options |= {"dout": torch.ones(1, 5, 2, 4), "dlse": torch.ones(1, 2, 5)}
    clean = Call(q=q, k=k.clone(), v=v.clone(), **options)
    k[:, 6], v[:, 6] = torch.nan, torch.nan
    for run in (exact, lambda call: same_precision(call)[0]):
        got, want = run(Call(q=q, k=k, v=v, **options)), run(clean)
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
        assert all(torch.equal(got.gradients[name], want.gradients[name]) for name in "qkv")
        assert not got.out[:, 1].any() and (got.lse[..., 1] == -torch.inf).all()
        assert not got.gradients["q"][:, 1].any() and not got.gradients["k"][:, 6].any()
        assert torch.isfinite(got.lse[..., 2]).all() and got.gradients["q"][:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_first_honest_run_is_the_one_of_long_sequences(dtype: torch.dtype) -> None:
    q, k, v = tensors(33, 47, 4, 2, dtype=dtype)
    (got,) = same_precision(Call(q=q, k=k, v=v, sm_scale=0.25, causal=True))
    out, lse = attention_low_precision(q, k, v, causal=True, causal_offset=14, sm_scale=0.25)
    torch.testing.assert_close(got.out, out, rtol=0, atol=5e-7 if dtype == torch.float32 else 0)
    torch.testing.assert_close(got.lse, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_further_honest_runs_err_as_the_first_does(dtype: torch.dtype) -> None:
    """Over many elements every run has nearly the same mean error: a judge who takes the largest loosens little."""
    q, k, v = tensors(64, 96, 4, 2, 32, 32, batch=2, dtype=dtype)
    dout = tensors(64, 96, 4, 2, 32, 32, batch=2, dtype=dtype)[0].flip(1)
    call = Call(q=q, k=k, v=v, sm_scale=0.2, dout=dout, bias=torch.zeros(4, 64, 96, dtype=dtype))
    want, runs = exact(call), same_precision(call, runs=4)
    assert not any(torch.equal(a.gradients["q"], b.gradients["q"]) for a, b in combinations(runs, 2))
    again = same_precision(call, runs=4)
    assert all(torch.equal(a.gradients["k"], b.gradients["k"]) for a, b in zip(runs, again, strict=True))
    for name in ("q", "k", "v", "bias"):
        first, *others = ((run.gradients[name].double() - want.gradients[name]).abs().mean() for run in runs)
        assert all(0.8 * first < other < 1.3 * first for other in others), (name, first, others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_drawn_roundings_are_as_large_as_real_ones(dtype: torch.dtype) -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[:2] = torch.tensor([0.0, -torch.inf])
    nearest, drawn = (_Rounding(dtype, seed).input(x) - x for seed in (0, 1))
    unit = torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps / 2), torch.frexp(x).exponent)[2:]
    assert (drawn[2:].abs() <= unit / 2).all() and abs((drawn[2:] / unit).mean()) < 0.01
    torch.testing.assert_close((drawn[2:] / unit).std(), (nearest[2:] / unit).std(), rtol=0.03, atol=0)
    assert torch.equal(_Rounding(dtype, 1).input(x)[:2], x[:2])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    """The vectors that Random123 (Salmon et al., SC 2011) publishes for philox4x32 with 10 rounds."""

    def numbers(text: str) -> list[Any]:
        return [int(word, 16) for word in text.split()]

    c, k = [np.array(x, dtype=np.uint64) for x in numbers(counter)], numbers(key)
    assert [int(word) for word in philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))] == numbers(words)


def test_four_elements_share_a_call() -> None:
    """Element (i, j) of head h: counter (column of the 16-group, row of the 16-group, h, offset), word by i and j // 8."""
    seed = 0x1234_5678_9ABC_DEF0
    words = philox4x32((np.array(8 + 3), np.array(16 + 5), np.array(7), np.array(99)), (seed & 0xFFFFFFFF, seed >> 32))
    for number, (i, j) in enumerate(((37, 19), (37, 27), (45, 19), (45, 27))):
        assert dropout_words((seed, 99), np.array(7), np.array(i), np.array(j)) == words[number]
