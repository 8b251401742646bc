"""Warm calls: the short way gives what the long way gives, is taken where it may be, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import warm_support
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from warm_support import K, Q, V

import flashgen
from flashgen import InvalidProblemError, UnsupportedProblemError, dispatch

gpu, short = warm_support.gpu, warm_support.short

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_alignment": "top-left"},
    "scale": {"softmax_scale": 0.3},
    "lse": {"return_lse": True},
    "lse, causal": {"return_lse": True, "causal": True},
    "explicit backend": {"backend": "triton"},
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", CALLS.values(), ids=list(CALLS))
def test_both_ways_agree(gpu: list[dict[str, Any]], short: list[int], options: dict[str, Any], layout: str) -> None:
    tensors = [x if layout == "bshd" else x.transpose(1, 2) for x in (Q, K, V)]
    first = flashgen.attention(*tensors, layout=layout, **options)
    assert not short and len(gpu) == 1
    again = flashgen.attention(*tensors, layout=layout, **options)
    assert len(short) == 1 and len(gpu) == 2 and gpu[0] == gpu[1]
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (first, again)), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    # And new values are computed, not remembered.
    other = flashgen.attention(tensors[0] + 1, *tensors[1:], layout=layout, **options)
    assert not torch.equal(
        other[0] if isinstance(other, tuple) else other, again[0] if isinstance(again, tuple) else again
    )


def test_what_changes_the_call_changes_the_kind(gpu: list[dict[str, Any]], short: list[int]) -> None:
    flashgen.attention(Q, K, V)
    spread = torch.zeros(2 * 4096, dtype=torch.bfloat16).as_strided(Q.shape, (4096, 128, 32, 1))
    variations: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((Q[:1], K[:1], V[:1]), {}),
        ((Q[:, :20], K, V), {}),
        ((spread, K, V), {}),
        ((Q.half(), K.half(), V.half()), {}),
        ((Q, K, V), {"causal": True}),
        ((Q, K, V), {"softmax_scale": 0.5}),
        ((Q, K, V), {"return_lse": True}),
        ((Q, K, V), {"backend": "triton"}),
    ]
    for tensors, options in variations:
        flashgen.attention(*tensors, **options)
    assert not short


def test_alignment_is_part_of_the_kind(gpu: list[dict[str, Any]], short: list[int]) -> None:
    """A kernel compiled for addresses that are multiples of 16 must not meet another."""
    flashgen.attention(Q, K, V)
    moved = torch.empty(Q.numel() + 1, dtype=Q.dtype)[1:].view(Q.shape).copy_(Q)
    assert moved.stride() == Q.stride() and moved.data_ptr() % 16
    flashgen.attention(moved, K, V)
    assert not short
    # Nor is one of the three another: what was compiled for an odd q takes k in words of 16 bytes.
    moved = torch.empty(K.numel() + 1, dtype=K.dtype)[1:].view(K.shape).copy_(K)
    flashgen.attention(Q, moved, V)
    assert not short


def test_a_changed_setting_is_seen(
    gpu: list[dict[str, Any]], short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flashgen.attention(Q, K, V)
    flashgen.attention(Q, K, V)
    assert len(short) == 1
    monkeypatch.setenv("FLASHGEN_BACKEND", "torch")
    flashgen.attention(Q, K, V)
    assert len(short) == 1 and len(gpu) == 2
    monkeypatch.delenv("FLASHGEN_BACKEND")
    flashgen.attention(Q, K, V)
    assert len(short) == 2


def test_forgotten_plans_are_forgotten_here(gpu: list[dict[str, Any]], short: list[int]) -> None:
    flashgen.attention(Q, K, V)
    dispatch.forget()
    flashgen.attention(Q, K, V)
    assert not short


def test_what_autograd_records_is_a_kind_of_its_own(gpu: list[dict[str, Any]], short: list[int]) -> None:
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        flashgen.attention(q, K, V)
        flashgen.attention(q, K, V)
    assert len(short) == 1
    out = flashgen.attention(q, K, V)  # test_recorded.py has what comes next
    assert len(short) == 1 and isinstance(out, Tensor) and out.requires_grad
    out.float().sum().backward()
    assert q.grad is not None
    with torch.inference_mode():
        flashgen.attention(Q, K, V)
    assert len(short) == 2


def test_views_and_duals_that_hold_other_values_go_the_long_way(gpu: list[dict[str, Any]], short: list[int]) -> None:
    q = torch.randn(2, 24, 4, 32)
    k, v = K.float(), V.float()
    flashgen.attention(q, k, v)
    negated = torch.complex(q, q).conj().imag  # -q, lazily
    assert negated.is_neg()
    out = flashgen.attention(negated.contiguous() if negated.stride(-1) != 1 else negated, k, v)
    plain = flashgen.attention(-q, k, v)
    assert isinstance(out, Tensor) and isinstance(plain, Tensor) and torch.equal(out, plain)
    taken = len(short)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedProblemError, match="forward-mode derivative"):
            flashgen.attention(dual, k, v)
    with pytest.raises(UnsupportedProblemError, match="forward-mode derivative"):
        torch.func.jvp(lambda x: flashgen.attention(x, k, v), (q,), (torch.ones_like(q),))
    assert len(short) == taken
    with pytest.raises(InvalidProblemError, match=r"q has layout torch\.sparse_coo"):
        flashgen.attention(q.to_sparse(), k, v)


class Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_whoever_listens_sees_the_operator(gpu: list[dict[str, Any]], short: list[int]) -> None:
    flashgen.attention(Q, K, V)
    with Listener() as listener:
        flashgen.attention(Q, K, V)
    assert "flashgen.attention_fwd.default" in listener.names and not short
    flashgen.attention(Q.as_subclass(Subclass), K, V)
    assert not short
    with FakeTensorMode() as mode:
        fake = flashgen.attention(*(mode.from_tensor(x) for x in (Q, K, V)))
    assert isinstance(fake, Tensor) and fake.shape == (2, 24, 4, 16) and not short
    compiled = torch.compile(lambda q, k, v: flashgen.attention(q, k, v), backend="eager", fullgraph=True)
    assert torch.equal(compiled(Q, K, V), flashgen.attention(Q, K, V)) and len(short) == 1
