"""Warm calls: the short way gives what the long way gives, is taken where it may be, and nowhere else."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashgen
from flashgen import InvalidProblemError, Target, UnsupportedProblemError, build, dispatch, warm

ROOT = Path(__file__).resolve().parents[2]
H100 = Target.named("h100")


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = draw(2, 24, 4, 32), draw(2, 30, 2, 32, seed=1), draw(2, 30, 2, 16, seed=2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """CPU tensors count as on an h100; `launch` records its arguments and computes with the torch backend."""
    seen: list[dict[str, Any]] = []
    real = build.build

    def built(source: Any) -> Any:
        from dataclasses import replace

        def launch(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **scalars: Any) -> None:
            seen.append(scalars)
            options = flashgen.torch_blocked.Options(
                sm_scale=scalars["sm_scale"], causal=source.spec.causal, offset=scalars["causal_offset"]
            )
            flashgen.torch_blocked.forward(q, k, v, options, o, lse)

        def launch_backward(*tensors: Any, sm_scale: float, causal_offset: int, **tunables: Any) -> None:
            options = flashgen.torch_blocked.Options(sm_scale=sm_scale, causal=source.spec.causal, offset=causal_offset)
            *inputs, dq, dk, dv = tensors
            for into, gradient in zip((dq, dk, dv), flashgen.torch_blocked.backward(*inputs, options), strict=False):
                into.copy_(gradient)

        return replace(real(source), launch=launch if source.spec.op == "attention_fwd" else launch_backward)

    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "silent")
    dispatch.forget()
    with (
        mock.patch.object(Target, "detect", classmethod(lambda cls, device=None: H100)),
        mock.patch("flashgen.ops.build", built),
        mock.patch("flashgen.warm.build", built),
    ):
        yield seen
    dispatch.forget()


@pytest.fixture
def short(gpu: list[dict[str, Any]]) -> Iterator[list[int]]:
    """How often the short way was taken."""
    taken: list[int] = []
    real = warm.find

    def find(key: Any) -> Any:
        bound = real(key)
        if bound is not None:
            taken.append(1)
        return bound

    with mock.patch.object(warm, "find", find):
        yield taken


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


def test_what_autograd_records_goes_the_long_way(gpu: list[dict[str, Any]], short: list[int]) -> None:
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        flashgen.attention(q, K, V)
        flashgen.attention(q, K, V)
    assert len(short) == 1
    out = flashgen.attention(q, K, V)
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


@pytest.mark.parametrize(
    "options", [{"softmax_scale": [1.0]}, {"window_size": "ab"}, {"layout": "sbhd"}, {"backend": "cuda"}]
)
def test_wrong_arguments_are_refused_every_time(gpu: list[dict[str, Any]], options: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(InvalidProblemError):
            flashgen.attention(Q, K, V, **options)


def test_more_kinds_than_are_kept(gpu: list[dict[str, Any]], short: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_MOST", 2)
    for scale in (0.1, 0.2, 0.3, 0.4):
        flashgen.attention(Q, K, V, softmax_scale=scale)
        flashgen.attention(Q, K, V, softmax_scale=scale)
    assert len(warm.table()) <= 2 and len(short) == 4


def test_torch_calls_are_not_bound() -> None:
    dispatch.forget()
    flashgen.attention(Q, K, V)
    flashgen.attention(Q, K, V)
    assert list(warm.table().values()) == [None]
    dispatch.forget()


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("host_overhead", ROOT / "benchmarks" / "host_overhead.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    figures = benchmark.run(batches=2)
    # No bound on time: a shared machine may be slow. The short way is far shorter than the long one on any.
    assert (
        figures["attention(q, k, v, causal=True)"] * 3 < figures["... through the operator (what a traced call takes)"]
    )
