"""First calls on a GPU whose kernel is in no cache: the brief form runs, and gives the bits that the call's own kernel then gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import build, dispatch, stand_ins
from flashgen.dispatch import resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="brief forms are Hopper's"
    ),
]


def scattered(b: Any, h: Any, i: Any, j: Any) -> Any:
    return ((i // 64 - j // 64) % 5 == 0) | (i // 64 - j // 64 == 7)


def near(b: Any, h: Any, i: Any, j: Any) -> Any:
    return ((i - j < 300) & (i >= j)) | (j < 64)


# (head dim, seqlen_q, seqlen_k, options); tensors are made from functions of the device's generator.
KINDS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "causal, cap, sinks": (128, 1100, 1100, {"causal": True, "softcap": 30.0, "sinks": lambda: torch.randn(8, device="cuda")}),
    "window, slopes": (64, 900, 1300, {"window_size": (200, 50), "alibi_slopes": lambda: torch.rand(8, device="cuda")}),
    "bias": (64, 500, 700, {"bias": lambda: torch.randn(8, 500, 700, device="cuda")}),
    "attn_mask, dropout": (128, 500, 700, {"attn_mask": lambda: torch.rand(500, 700, device="cuda") > 0.4, "dropout_p": 0.2}),
    "mask": (128, 1000, 1000, {"mask_mod": near}),
    "scattered mask": (64, 1000, 1100, {"mask_mod": scattered}),
    "score and mask": (64, 1000, 1000, {"mask_mod": near, "score_mod": lambda s, b, h, i, j: s - 0.01 * (i - j)}),
    "few queries": (128, 7, 3000, {"softcap": 10.0, "causal": True}),
    "wide": (256, 600, 900, {"causal": True, "softcap": 20.0}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton import knobs

    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "flashgen"))
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setattr(build, "_built", {})
    dispatch.forget()
    yield
    stand_ins.settle()
    stand_ins._own.clear()
    dispatch.forget()


def drawn(head_dim: int, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    shapes = ((2, seqlen_q, 8, head_dim), (2, seqlen_k, 2, head_dim), (2, seqlen_k, 2, head_dim))
    q, k, v = (torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("name", KINDS)
def test_the_brief_form_gives_the_bits_of_the_kernel_that_follows(name: str) -> None:
    *sizes, given = KINDS[name]
    q, k, v = drawn(*sizes)
    options = {key: x() if key in ("sinks", "alibi_slopes", "bias", "attn_mask") else x for key, x in given.items()}

    def run(**how: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(5)
        out, lse = flashgen.attention(q, k, v, return_lse=True, generator=generator, **options, **how)
        return out, lse

    first = run()
    (own,) = stand_ins._own.values()
    assert own.brief
    stand_ins.settle()
    assert not own.failed
    for x, y in zip(first, run(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(first, run(backend="torch"), strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=3e-2, rtol=3e-2)


def test_a_first_call_is_differentiated_and_repeats() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(128, 700, 700))
    options: dict[str, Any] = {"causal": True, "softcap": 15.0}

    def gradients(**how: Any) -> tuple[Tensor, ...]:
        out: Any = flashgen.attention(q, k, v, **options, **how)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    first = gradients()
    assert any(own.brief for own in stand_ins._own.values())
    stand_ins.settle()
    again, expected = gradients(), gradients(backend="torch")
    assert torch.equal(first[0], again[0])
    for x, y, z in zip(first, again, expected, strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(x.float(), z.float(), atol=5e-2, rtol=5e-2)


def test_a_graph_that_is_captured_after_a_first_call_holds_its_own_kernel() -> None:
    q, k, v = drawn(128, 512, 512)
    first = flashgen.attention(q, k, v, softcap=12.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, k, v, softcap=12.0)
    assert not any(own.thread.is_alive() for own in stand_ins._own.values()), "the capture waited for it"
    graph.replay()
    assert torch.equal(out, first)  # type: ignore[arg-type]


def test_where_bits_are_to_repeat_nothing_stands_in() -> None:
    q, k, v = drawn(64, 300, 300)
    flashgen.attention(q, k, v, softcap=9.0, deterministic=True)
    assert not stand_ins._own
    plan = resolve(flashgen.Problem.from_tensors(q, k, v, softcap=9.0))
    assert plan.variant == "gluon_fwd_sm90"
