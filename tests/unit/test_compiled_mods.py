"""Calls with score_mod, mask_mod or a BlockMask inside of `torch.compile(fullgraph=True)`: the bits and the kernels of eager calls."""

from __future__ import annotations

from functools import partial
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
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(x, prefix)
        out.square().sum().backward()
    assert inside == [False], "as without the compiler: kernels trace the mods"
    assert torch.equal(out, want)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.equal(found[name], grad), name


def test_what_changes_between_calls_is_seen() -> None:
    model = Model("mask")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, prefix = torch.randn(2, SIZE, 16), torch.tensor([3, 5], dtype=torch.int32)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.ids.add_(torch.arange(SIZE) // 5),
            lambda: setattr(model, "window", 2),
        ):
            change()
            assert torch.equal(compiled(x, prefix), model(x, prefix))
        before = compiled(x, prefix)
        prefix.mul_(3)
        assert torch.equal(compiled(x, prefix), model(x, prefix))
        assert not torch.equal(before, compiled(x, prefix))


_generator = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, SIZE, heads, 8, generator=_generator) for heads in (4, 2, 2))
TABLE, WIDE = torch.randn(4, generator=_generator), torch.randn(SIZE, 6, generator=_generator)
IDS, STARTS = torch.arange(SIZE, dtype=torch.int32) // 9, torch.tensor([0, 9, 18], dtype=torch.int32)


def attended(backend: str = "auto", **mods: Any) -> Tensor:
    out = flashgen.attention(Q * 1.5, K, V, backend=backend, **mods)  # type: ignore[call-overload]
    assert isinstance(out, Tensor)
    return out


def held(run: Any, *calls: tuple[Any, ...]) -> None:
    """Each call, compiled into one graph, is what it is in eager mode, gradients of its tensors included."""
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for call in calls:
        leaves = [x for x in call if isinstance(x, Tensor) and x.requires_grad]
        want, got = run(*call), compiled(*call)
        assert torch.equal(got, want) and got.requires_grad == want.requires_grad
        if leaves:
            grads = [torch.autograd.grad(out.sin().sum(), leaves) for out in (want, got)]
            assert all(map(torch.equal, *grads))


def shifted(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, table: Tensor, by: float = 1.0) -> Tensor:
    with torch.no_grad():  # without gradients, and written into: neither is lost
        beside = s * 0.5
        beside.add_(table[h])
    return s * table[h] + beside * by + (i - STARTS[IDS[i]]) * 0.1


def made(number: float, table: Tensor) -> Any:
    return lambda s, b, h, i, j: s * number + table[h] * (i - j)


def test_mods_of_every_kind() -> None:
    learned = TABLE.clone().requires_grad_()
    held(
        lambda t, by: attended(score_mod=partial(shifted, table=t, by=by)),
        (learned, 1.0),
        (learned, 0.5),
        (learned, 2.5),
    )
    held(
        lambda mod: attended(score_mod=mod), *((made(n, TABLE + n),) for n in (2, 3, 4, 5))
    )  # numbers of closures made outside

    def both(
        t: Tensor, w: Tensor
    ) -> Tensor:  # one that is computed from the other; rows that are right for single values alone
        u = t.exp()
        return attended(score_mod=lambda s, b, h, i, j: s + u[h] * t[h] + torch.dot(w[i], w[j]) * w[i].shape[0])

    held(both, (learned, WIDE.clone().requires_grad_()))


def test_lengths_and_block_masks_may_change() -> None:
    def run(q: Tensor, k: Tensor, block_mask: Any) -> Tensor:
        mask = lambda b, h, i, j: (i >= j) | (j > q.shape[1] - 3)  # noqa: E731  a length in a closure
        out = flashgen.attention(q, k, k, mask_mod=mask, block_mask=block_mask)
        assert isinstance(out, Tensor)
        return out

    def call(size: int, window: int) -> tuple[Any, ...]:
        mask = create_block_mask(lambda b, h, i, j: i - j < window, 2, None, size, size, device="cpu", BLOCK_SIZE=8)
        return Q[:, :size].clone(), K[:, :size].clone(), mask

    held(run, call(SIZE, 5), call(SIZE, 9), call(20, 4), call(17, 2))


def test_the_kernel_is_the_one_of_an_eager_call() -> None:
    """Names and text included: what was rendered, tuned and compiled for one serves the other."""
    rendered: list[str] = []
    render = execution.render

    def seen(*arguments: Any) -> Any:
        rendered.append(render(*arguments).digest)
        return render(*arguments)

    mod = made(2.0, TABLE.clone().requires_grad_())
    with mock.patch("flashgen.execution.render", seen):
        held(lambda: attended("triton", score_mod=mod, mask_mod=lambda b, h, i, j: IDS[i] == IDS[j]), ())
    assert len(rendered) == 2 and len(set(rendered)) == 1


class Doubled(torch.autograd.Function):
    """One whose backward is its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5


def test_what_cannot_be_in_a_graph_is_refused_in_words() -> None:
    def compiled(**mods: Any) -> Tensor:
        torch._dynamo.reset()
        result: Tensor = torch.compile(lambda: attended(**mods), backend="aot_eager", fullgraph=True)()
        return result

    with pytest.raises(Exception, match=r"torch\.autograd\.Function.*torch\.compiler\.disable"):
        compiled(score_mod=lambda s, b, h, i, j: Doubled.apply(s))
    with pytest.raises(Exception, match=r"(?s)Data-dependent.*needs fullgraph=False"):
        compiled(score_mod=lambda s, b, h, i, j: s if i > 3 else s * 2)
    with pytest.raises(Exception, match=r"(?i)table outside its bounds \(.*test_compiled_mods\.py:\d+\)"):
        compiled(score_mod=lambda s, b, h, i, j: s + TABLE[i])
    with pytest.raises(
        Exception, match=r"flashgen with score_mod, mask_mod or block_mask inside of torch\.func.*fullgraph=False"
    ):
        torch.compile(
            lambda q: torch.vmap(lambda q: flashgen.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 2))(q),
            backend="eager", fullgraph=True,
        )(Q[None])  # fmt: skip
    torch._dynamo.reset()
    assert torch.equal(torch.compile(attended, backend="eager")(score_mod=_prints), attended(score_mod=_prints)), (
        "broken"
    )


def _prints(s: Tensor, *indices: Tensor) -> Tensor:
    print(end="")
    return s * 2


def test_new_functions_of_the_same_code_compile_nothing_anew() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = Model("score and mask")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, prefix = torch.randn(2, SIZE, 16), torch.tensor([3, 5], dtype=torch.int32)
    frames = []
    for _ in range(12):  # more often than the compiler would try
        compiled(x, prefix).sum().backward()
        frames.append(counters["frames"]["total"])
    assert frames[1:] == [frames[0]] * 11
