"""Calls with score_mod, mask_mod or a BlockMask inside of `torch.compile`: the graph breaks around them, and nothing else changes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen import execution

pytestmark = [
    pytest.mark.slow,  # the compiler is imported
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # the compiler looks at it itself
]
SIZE = 24


class Model(torch.nn.Module):
    """Projections, an attention whose mods read a parameter, a buffer, an argument and a number, and a projection."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what, self.window = what, 7
        self.into, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.slopes = torch.nn.Parameter(torch.randn(2))
        self.register_buffer("ids", torch.arange(SIZE, dtype=torch.int32) // 9)

    def forward(self, x: Tensor, prefix: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        window, slopes, ids = self.window, self.slopes, self.ids
        mods: dict[str, Any] = {}
        if "score" in self.what:
            mods["score_mod"] = lambda s, b, h, i, j: s + slopes[h] * (i - j)
        if "mask" in self.what:
            mods["mask_mod"] = lambda b, h, i, j: (ids[i] == ids[j]) & (i - j < window) | (j < prefix[b])
        if "block" in self.what:
            mods["block_mask"] = create_block_mask(lambda b, h, i, j: i >= j, None, None, SIZE, SIZE, device="cpu")
        if "packed" in self.what:
            ends = torch.tensor([0, 10, SIZE], dtype=torch.int32)
            packed = [y.flatten(0, 1) for y in (q[:1], k[:1], v[:1])]
            o = flashgen.varlen_attention(*packed, ends, ends, 14, 14, **mods)
            assert isinstance(o, Tensor)
            return self.out(o.flatten(-2)).sin()
        o = flashgen.attention(q, k, v, **mods)
        assert isinstance(o, Tensor)
        return self.out(o.flatten(-2)).sin()


@pytest.mark.parametrize("what", ["score", "mask", "score and mask", "block", "packed score and mask"])
def test_a_model_with_mods_compiles_and_trains(what: str) -> None:
    x, prefix = torch.randn(2, SIZE, 16), torch.tensor([3, 5], dtype=torch.int32)
    inside: list[bool] = []
    run = execution.forward

    def watched(*arguments: Any) -> Any:
        inside.append(torch.compiler.is_compiling())
        return run(*arguments)

    with mock.patch("flashgen.autograd.forward", watched):
        model = Model(what)
        want = model(x, prefix)
        want.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        out = compiled(x, prefix)
        out.square().sum().backward()
    assert inside == [False, False], "as without the compiler: kernels trace the mods"
    torch.testing.assert_close(out, want)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad)


def test_what_changes_between_calls_is_seen() -> None:
    model = Model("mask")
    compiled = torch.compile(model, backend="aot_eager")
    x, prefix = torch.randn(2, SIZE, 16), torch.tensor([3, 5], dtype=torch.int32)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.ids.add_(torch.arange(SIZE) // 5),
            lambda: setattr(model, "window", 2),
        ):
            change()
            torch.testing.assert_close(compiled(x, prefix), model(x, prefix))
        before = compiled(x, prefix)
        prefix.mul_(3)
        torch.testing.assert_close(compiled(x, prefix), model(x, prefix))
        assert not torch.equal(before, compiled(x, prefix))


@pytest.mark.parametrize("what", ["score", "mask", "block", "packed mask"])
def test_a_full_graph_is_refused_in_words(what: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Model(what), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"flashgen with score_mod, mask_mod or block_mask.*fullgraph=False"):
        compiled(torch.randn(2, SIZE, 16), torch.tensor([3, 5], dtype=torch.int32))


def test_new_functions_of_the_same_code_compile_nothing_anew() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = Model("score and mask")
    compiled = torch.compile(model, backend="aot_eager")
    x, prefix = torch.randn(2, SIZE, 16), torch.tensor([3, 5], dtype=torch.int32)
    frames = []
    for _ in range(12):  # more often than the compiler would try
        compiled(x, prefix).sum().backward()
        frames.append(counters["frames"]["total"])
    assert frames[1:] == [frames[0]] * 11
