"""Rows whose scores are too large for their lse, one fp32 number, in the kernels of the backward: NaN where a gradient reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import checks

HUGE, USUAL = (3, 17), 0  # query rows


def gradients(backend: str, bias: Tensor, dout: Tensor, dlse: Tensor | None, rows: Sequence[int] = ()) -> list[Tensor]:
    """Of q, k, v, bias; queries but `rows`."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, 1, 64, generator=generator).half() for n in (40, 56, 56))
    kept = [i for i in range(40) if i not in rows]
    leaves = [q[:, kept].requires_grad_(), k.requires_grad_(), v.requires_grad_(), bias[kept].requires_grad_()]
    out, lse = flashgen.attention(*leaves[:3], bias=leaves[3], return_lse=True, backend=backend)
    wanted: list[Tensor | None] = [dout[:, kept], None if dlse is None else dlse[..., kept]]
    outputs = [(out, wanted[0])] + ([] if dlse is None else [(lse, wanted[1])])
    return list(torch.autograd.grad([x for x, _ in outputs], leaves, [g for _, g in outputs]))


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_nan_where_a_gradient_reaches_them_and_nothing_where_none_does(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "row_sums", lambda *_: None)  # what refuses them wherever it may look
    bias = torch.zeros(40, 56)
    bias[list(HUGE)] = torch.tensor([[-1e9], [3e7]])
    dout = torch.randn(1, 40, 1, 64, generator=torch.Generator().manual_seed(6)).half()
    dout[:, list(HUGE)] = 0
    # None reaches them: as if there were no such queries.
    got, want = gradients(backend, bias, dout, None), gradients(backend, bias, dout, None, HUGE)
    kept = [i for i in range(40) if i not in HUGE]
    for ours, theirs in zip((got[0][:, kept], *got[1:3], got[3][kept]), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert not got[0][:, list(HUGE)].any() and not got[3][list(HUGE)].any()
    # One does, by the output or by lse.
    dlse = torch.zeros(1, 1, 40)
    dlse[..., HUGE[1]] = 1.0
    dq, dk, _, dbias = gradients(backend, bias, dout, dlse)
    assert dq[:, HUGE[1]].isnan().all() and dk.isnan().all() and dbias[HUGE[1]].isnan().all()
    assert not dq[:, HUGE[0]].any() and not dq[:, USUAL].isnan().any()
    dout[0, HUGE[0], 0, 7] = 1e-3
    dq, dk, dv, dbias = gradients(backend, bias, dout, None)
    assert dq[:, HUGE[0]].isnan().all() and dk.isnan().all() and dv.isnan().all() and dbias[HUGE[0]].isnan().all()
    assert not dq[:, HUGE[1]].any() and not dq[:, USUAL].isnan().any()


def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Two sequences, one of each HUGE row, in batch form."""
    lengths = (torch.tensor([0, 9, 40], dtype=torch.int32), torch.tensor([0, 20, 56], dtype=torch.int32))
    out, lse = flashgen.varlen_attention(q[0], k[0], v[0], *lengths, 31, 36, **options)
    return out[None], lse[None]


@pytest.mark.parametrize(
    ("backend", "call", "options"),
    [
        ("triton", flashgen.attention, {}),
        ("gluon", flashgen.attention, {}),
        ("triton", flashgen.attention, {"window_size": (9, 4)}),
        ("gluon", flashgen.attention, {"mask_mod": lambda b, h, i, j: (i + j) % 3 != 0}),
        ("triton", packed, {"causal": True}),
    ],
    ids=["plain", "plain on Hopper", "window", "mask on Hopper", "packed"],
)
def test_large_q_and_k_are_such_rows_in_every_kernel(
    backend: str, call: Callable[..., Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "row_sums", lambda *_: None)
    generator = torch.Generator().manual_seed(7)
    q, k, v, dout = (torch.randn(1, n, 1, 64, generator=generator).half() for n in (40, 56, 56, 40))
    k[..., 0] = 32
    q[:, list(HUGE)] = 0
    q[0, list(HUGE), 0, 0] = torch.tensor([60000.0, -60000.0]).half()  # scores of 240,000 and -240,000
    dout[:, list(HUGE)], dlse = 0, torch.zeros(1, 1, 40)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients_by(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves, return_lse=True, backend=backend, **options), leaves, [dout, dlse])

    got = gradients_by(backend)
    assert not got[0][:, list(HUGE)].any()
    for ours, theirs in zip(got, gradients_by("torch"), strict=True):
        # Of the first column of q, 32 times a sum of 0, only the rounding would be compared.
        torch.testing.assert_close(ours[..., 1:], theirs[..., 1:], rtol=4e-3, atol=4e-3)
    dout[0, HUGE[0], 0, 7], dlse[..., HUGE[1]] = 1e-3, 1.0
    dq, dk, dv = gradients_by(backend)
    assert dq[:, list(HUGE)].isnan().all() and dk.isnan().any() and dv.isnan().any()
    assert not dq[:, [i for i in range(40) if i not in HUGE]].isnan().any()
