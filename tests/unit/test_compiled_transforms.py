"""`torch.func` inside of `torch.compile`: the same numbers as outside, in one graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashgen

_generator = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, n, heads, 8, generator=_generator) for n, heads in ((9, 4), (11, 2), (11, 2)))
MAPPED, BIAS = torch.randn(3, *Q.shape, generator=_generator), torch.randn(9, 11, generator=_generator)
PACKED, OFFSETS = Q.flatten(0, 1), torch.tensor([0, 5, 5, 18], dtype=torch.int32)


def loss(q: Tensor, k: Tensor = K, bias: Tensor | None = None) -> Tensor:
    out = flashgen.attention(q, k, V, causal=True, bias=bias)
    assert isinstance(out, Tensor)
    return out.sin().sum()


def packed(q: Tensor) -> Tensor:
    out = flashgen.varlen_attention(q, PACKED, PACKED, OFFSETS, OFFSETS, 13, 13, causal=True)
    assert isinstance(out, Tensor)
    return out.sin().sum()


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "grad": (lambda q: torch.func.grad(loss)(q), Q),
    "grad of keys": (lambda k: torch.func.grad(lambda k: loss(Q, k))(k), K),
    "grad of a bias": (lambda bias: torch.func.grad(lambda bias: loss(Q, K, bias))(bias), BIAS),
    "vjp": (lambda q: torch.func.vjp(loss, q)[1](torch.ones(()))[0], Q),
    "jacrev": (lambda q: torch.func.jacrev(loss)(q), Q),
    "vmap of grad": (lambda x: torch.vmap(torch.func.grad(loss))(x), MAPPED),
    "grad of vmap": (lambda x: torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(x), MAPPED),
    "vmap": (lambda x: torch.vmap(loss)(x), MAPPED),
    "grad of packed sequences": (lambda q: torch.func.grad(packed)(q), PACKED),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_the_same_as_outside(what: str) -> None:
    """Dynamo says that what torch.func.grad wraps requires no gradient: the operator alone was traced, and its gradient was zero."""
    function, x = FUNCTIONS[what]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))


def test_the_outside_gets_gradients_of_what_is_mapped() -> None:
    torch.compiler.reset()
    x, (function, _) = MAPPED.clone().requires_grad_(), FUNCTIONS["vmap"]
    (want,) = torch.autograd.grad(function(x).sum(), x)
    (got,) = torch.autograd.grad(torch.compile(function, backend="aot_eager", fullgraph=True)(x).sum(), x)
    assert torch.equal(got, want)


def test_forward_mode_is_refused_by_name() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda q: torch.func.jvp(loss, (q,), (q,))[1], backend="eager")
    with pytest.raises(Exception, match=r"forward-mode derivative of flashgen\.attention"):
        compiled(Q)
