"""Warm calls that autograd records: the long way's results and gradients, launches and refusals, from the second call on."""
# ruff: noqa: F811  (fixtures that are imported)

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from test_warm_options import HIDE
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from warm_support import K, Q, V, draw, gpu, short  # noqa: F401  # fixtures

import flashgen
from flashgen import recorded, warm

Launches = list[dict[str, Any]]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.3},
    "top-left": {"causal": True, "causal_alignment": "top-left"},
    "portable": {"backend": "triton"},
}


def leaves() -> list[Tensor]:
    return [x.clone().requires_grad_() for x in (Q, K, V)]


def step(given: list[Tensor], with_lse: bool = True, **options: Any) -> list[Tensor]:
    """Out, lse and the gradients of both."""
    out, lse = flashgen.attention(*given, return_lse=True, **options)
    weights = draw(*out.shape, seed=7), draw(*lse.shape, dtype=torch.float32, seed=8)
    ends = ([out, lse], list(weights)) if with_lse else ([out], [weights[0]])
    return [out, lse, *torch.autograd.grad(ends[0], given, ends[1])]


def agree(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_both_ways_agree(
    gpu: Launches,
    short: list[int],
    options: dict[str, Any],
    layout: str,
    with_lse: bool,
) -> None:
    given = [x if layout == "bshd" else x.detach().transpose(1, 2).requires_grad_() for x in leaves()]
    first = step(given, with_lse, layout=layout, **options)
    assert not short and len(gpu) == 1
    again = step(given, with_lse, layout=layout, **options)
    assert len(short) == 1 and len(gpu) == 2 and gpu[0] == gpu[1]
    assert type(again[0].grad_fn).__name__ == "RecordedCallBackward"
    agree(again, first)
    other = step([(x + 1).detach().requires_grad_() for x in given], with_lse, layout=layout, **options)
    assert len(short) == 2 and not torch.equal(other[2], again[2]), "new values are computed, not remembered"


def test_one_gradient_is_enough(gpu: Launches, short: list[int]) -> None:
    k = K.clone().requires_grad_()
    found = []
    for _ in range(2):
        out = flashgen.attention(Q, k, V, causal=True)
        found.append(torch.autograd.grad(out.float().sum(), k))  # type: ignore[union-attr]
    assert len(short) == 1
    agree(list(found[1]), list(found[0]))


def test_nothing_asked_gives_nothing(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    step(given)
    out, lse = flashgen.attention(*given, return_lse=True)
    assert short
    total = (out.detach() * 2).sum() + sum(x.float().sum() for x in given)
    assert all(x.eq(1).all() for x in torch.autograd.grad(total, given))
    del lse


def test_second_derivatives_are_refused_by_name(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    step(given)
    out = flashgen.attention(*given, return_lse=True)[0]
    gradients = torch.autograd.grad(out.float().sum(), given, create_graph=True)
    assert short and all(x.requires_grad for x in gradients)
    with pytest.raises(flashgen.UnsupportedProblemError, match="second derivative"):
        gradients[0].float().sum().backward()


def test_an_input_that_was_written_into_is_noticed(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    step(given)
    scaled = given[0] * 1
    out = flashgen.attention(scaled, *given[1:], return_lse=True)[0]
    assert short
    with torch.no_grad():
        scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


def test_the_order_of_sums_is_part_of_the_kind(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    step(given)
    try:
        torch.use_deterministic_algorithms(True)
        step(given)
        assert not short, "another kind"
        step(given)
        assert len(short) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    step(given, deterministic=True)
    assert len(short) == 1


def test_what_kernels_get_of_operands_is_the_calls_own(
    gpu: Launches,
    short: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of forward and backward; a seed of dropout is drawn at each call, and is the same in its backward."""
    seen: list[dict[str, Any]] = []
    real = recorded._backward

    def noted(plan: Any, operands: Any, launch: Any) -> Any:
        return real(plan, operands, lambda *_, **values: seen.append(values))

    monkeypatch.setattr(recorded, "_backward", noted)
    given = leaves()
    alibi = torch.rand(4)
    for turn in range(3):
        sinks = draw(4, dtype=torch.float32, seed=turn)
        operands = {"sinks": sinks, "attn_mask": HIDE.clone(), "alibi_slopes": alibi}
        step(given, dropout_p=0.25, backend="triton", **operands)
        if not turn:
            continue
        forward, after = gpu[-1], seen[-1]
        for name, value in operands.items():
            assert forward[name] is value, name
            assert after[name].data_ptr() == value.data_ptr(), name
        assert torch.equal(forward["philox"], after["philox"]) and after["dropout_p"] == 0.25
        assert after["dsinks"].shape == (4,)
    assert len(short) == 2 and len(seen) == 2
    assert not torch.equal(gpu[-1]["philox"], gpu[-2]["philox"])


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_operands_that_want_gradients_go_the_long_way(gpu: Launches, short: list[int], name: str) -> None:
    given = leaves()
    value = {"bias": draw(24, 30), "sinks": draw(4, dtype=torch.float32)}[name].requires_grad_()
    for _ in range(2):
        flashgen.attention(*given, backend="triton", **{name: value})  # type: ignore[arg-type]
        flashgen.attention(*given, backend="triton", mask_mod=lambda b, h, i, j: i >= j)
    assert not short


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(gpu: Launches, short: list[int], reentrant: bool) -> None:
    given = leaves()
    want = step(given, with_lse=False)

    def run(*tensors: Tensor) -> Any:
        return flashgen.attention(*tensors, return_lse=True)[0]

    out = checkpoint(run, *given, use_reentrant=reentrant)
    found = torch.autograd.grad if not reentrant else None
    if found is None:
        out.backward(draw(*out.shape, seed=7))
        mine = [x.grad for x in given]
    else:
        mine = list(found(out, given, draw(*out.shape, seed=7)))
    assert short
    for a, b in zip(mine, want[2:], strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_hooks_on_saved_tensors_see_them(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    want = step(given)
    sizes: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = step(given)
    assert short
    agree(found, want)
    assert sizes[:5] == [Q.shape, K.shape, V.shape, want[0].shape, want[1].shape], "nothing quadratic"


def test_a_graph_dies_with_its_output(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    step(given)
    out = flashgen.attention(*given, return_lse=True)[0]
    assert short
    watch = weakref.ref(out)
    gc.disable()
    try:
        del out
        assert watch() is None
    finally:
        gc.enable()


def test_what_was_forgotten_still_has_its_backward(gpu: Launches, short: list[int]) -> None:
    given = leaves()
    want = step(given)
    out, lse = flashgen.attention(*given, return_lse=True)
    warm.forget()
    weights = draw(*out.shape, seed=7), draw(*lse.shape, dtype=torch.float32, seed=8)
    agree(list(torch.autograd.grad([out, lse], given, list(weights))), want[2:])
    assert short


def test_packed_sequences_are_warm(gpu: Launches, short: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    real = recorded._backward
    monkeypatch.setattr(
        recorded, "_backward", lambda plan, operands, launch: real(plan, operands, lambda *_, **v: seen.append(v))
    )
    q, k, v = (x[0].detach().requires_grad_() for x in leaves())
    for ends in ([0, 7, 24], [0, 20, 24], [0, 3, 24]):
        cu = [torch.tensor(row, dtype=torch.int32) for row in (ends, [0, 12, 30])]
        out = flashgen.varlen_attention(q, k, v, *cu, 24, 30, causal=True, backend="triton")
        if short:
            torch.autograd.grad(out.float().sum(), [q, k, v])  # type: ignore[union-attr]
            assert seen[-1]["cu_seqlens_q"].data_ptr() == cu[0].data_ptr()
    assert len(short) == 2 and len(seen) == 2
