"""The torch backend against the fp64 oracle and against fp64 autograd, on every path of its blocking."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashgen import UnsupportedProblemError, attention, torch_blocked
from flashgen.accuracy import check
from flashgen.reference import attention_low_precision, attention_oracle
from flashgen.torch_blocked.options import Block

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v: why
CASES = [
    (2, 37, 101, 4, 2, 33, 17),  # primes, GQA, D != Dv
    (1, 700, 1100, 2, 1, 16, 16),  # several blocks both ways, more keys than queries
    (1, 600, 520, 2, 2, 8, 24),  # fewer keys than queries: rows without any key under bottom-right
    (3, 1, 1, 1, 1, 1, 1),  # the least of everything
    (2, 5, 0, 2, 2, 8, 8),  # no keys
    (0, 5, 3, 2, 2, 8, 8),  # no batch
    (2, 0, 3, 2, 2, 8, 8),  # no queries
]


def tensors(case: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v = case
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, seqlen_q, heads_q, head_dim),
        (batch, seqlen_k, heads_kv, head_dim),
        (batch, seqlen_k, heads_kv, head_dim_v),
    )
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("alignment", ["full", "bottom-right", "top-left"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_inside_the_budget(case: tuple[int, ...], dtype: str, alignment: str) -> None:
    q, k, v = tensors(case, DTYPES[dtype])
    causal = alignment != "full"
    offset = k.shape[1] - q.shape[1] if alignment == "bottom-right" else 0
    scale = q.shape[3] ** -0.5
    out, lse = attention(
        q,
        k,
        v,
        causal=causal,
        causal_alignment="top-left" if alignment == "top-left" else "bottom-right",
        return_lse=True,
    )
    options = {"causal": causal, "causal_offset": offset, "sm_scale": scale}
    report = check(out, lse, attention_oracle(q, k, v, **options), attention_low_precision(q, k, v, **options), dtype)  # type: ignore[arg-type]
    report.require()


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, offset: int, scale: float) -> tuple[Tensor, Tensor]:
    """Unblocked fp64 attention that autograd can differentiate; rows without keys give 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(group, 2)) * scale
    if causal:
        hidden = torch.arange(k.shape[1]) > torch.arange(q.shape[1]).unsqueeze(-1) + offset
        scores = scores.masked_fill(hidden, -math.inf)
    dead = (scores == -math.inf).all(-1)
    safe = scores.masked_fill(dead.unsqueeze(-1), 0.0)
    p = safe.softmax(-1).masked_fill(dead.unsqueeze(-1), 0.0)
    lse = safe.logsumexp(-1).masked_fill(dead, -math.inf)
    return torch.einsum("bhmn,bnhd->bmhd", p, v.repeat_interleave(group, 2)), lse


@pytest.mark.parametrize("alignment", ["full", "bottom-right", "top-left"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[3]], ids=str)
def test_gradients_of_out_and_lse(case: tuple[int, ...], layout: str, alignment: str) -> None:
    q, k, v = tensors(case, torch.float32)
    causal, offset = alignment != "full", k.shape[1] - q.shape[1] if alignment == "bottom-right" else 0
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    given = [(x if layout == "bshd" else x.transpose(1, 2)).detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*given, causal=causal, causal_alignment="top-left" if alignment == "top-left" else "bottom-right", return_lse=True, layout=layout)  # type: ignore[arg-type,misc]  # fmt: skip
    out2, lse2 = naive(*exact, causal, offset, q.shape[3] ** -0.5)  # type: ignore[misc]
    generator = torch.Generator().manual_seed(1)
    dout, dlse = torch.randn(out2.shape, generator=generator), torch.randn(lse2.shape, generator=generator)
    dlse = dlse.masked_fill(lse2 == -math.inf, 0.0)
    dout_given = dout if layout == "bshd" else dout.transpose(1, 2)
    got = torch.autograd.grad((out, lse), given, (dout_given, dlse))
    want = torch.autograd.grad((out2, lse2), exact, (dout.double(), dlse.double()))
    for name, a, b in zip("qkv", got, want, strict=True):
        a = a if layout == "bshd" else a.transpose(1, 2)
        assert (a - b).abs().max() <= 2e-5 * max(1.0, float(b.abs().max())), f"d{name}"
    only_lse = torch.autograd.grad(attention(*given, causal=causal, return_lse=True, layout=layout)[1].nan_to_num(neginf=0).sum(), given[:2])  # type: ignore[arg-type]  # fmt: skip
    assert all(grad.isfinite().all() for grad in only_lse)


def test_half_precision_gradients_come_in_the_inputs_dtype() -> None:
    given = [x.requires_grad_() for x in tensors(CASES[0], torch.bfloat16)]
    grads = torch.autograd.grad(attention(*given).sum(), given)  # type: ignore[union-attr]
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3
    assert [g.shape for g in grads] == [x.shape for x in given]


def test_hidden_keys_never_matter() -> None:
    q, k, v = tensors((1, 40, 90, 2, 2, 8, 8), torch.float32)
    clean = attention(q, k, v, causal=True, causal_alignment="top-left")
    k[:, 40:], v[:, 40:] = math.nan, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dirty = attention(*leaves, causal=True, causal_alignment="top-left")
    assert torch.equal(clean, dirty)  # type: ignore[arg-type]
    grads = torch.autograd.grad(dirty.sum(), leaves)  # type: ignore[union-attr]
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][:, 40:].eq(0).all() and grads[2][:, 40:].eq(0).all()


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 4, 4, 1, 1, 4, 4), torch.float32))
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)  # type: ignore[union-attr]
    # Beside another term, a gradient that passed for a constant would give a wrong number instead of an error.
    with pytest.raises(UnsupportedProblemError, match=r"second derivative of flashgen\.attention"):
        (dq.pow(2).sum() + q.sum()).backward()


def test_memory_does_not_grow_with_the_product_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = Block.scores

    def spy(self: Block, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal largest
        largest = max(largest, raw.numel())
        return original(self, raw)

    monkeypatch.setattr(Block, "scores", spy)
    q, k, v = tensors((1, 2048, 4096, 4, 1, 8, 8), torch.float32)
    attention(q, k, v, causal=True)
    assert 0 < largest <= torch_blocked.SCORE_BUDGET


def test_repeats_bit_for_bit() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(CASES[1], torch.float32))
    runs = [torch.autograd.grad(attention(q, k, v, causal=True).sum(), (q, k, v)) for _ in range(2)]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
