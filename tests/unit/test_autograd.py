"""What stands around the operators: autograd's rules, checkpointing, autocast, vmap; on the torch backend, whose kernels are fast here."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import flashgen
from flashgen import UnsupportedProblemError, autograd, dispatch, execution
from flashgen.variants import by_name

MAPPED = 3


def tensors(*, grad: bool = False, mapped: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lead = (MAPPED, 2) if mapped else (2,)
    shapes = ((9, 4, 8), (11, 2, 8), (11, 2, 6))
    q, k, v = (torch.randn((*lead, *shape), generator=generator).requires_grad_(grad) for shape in shapes)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = flashgen.attention(q, k, v, causal=True, **options)
    assert isinstance(out, Tensor)
    return out


# -- autograd --


def test_what_is_saved_is_inputs_outputs_and_nothing_quadratic() -> None:
    q, k, v = tensors(grad=True)
    saved: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(q, k, v)
    assert sorted(saved) == sorted([(2, 9, 4, 8), (2, 11, 2, 8), (2, 11, 2, 6), (2, 9, 4, 6), (2, 4, 9)])


def test_a_process_waits_before_it_ends_for_what_a_backward_on_a_gpu_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, registered = [], []
    monkeypatch.setattr(autograd, "_at_exit", [])
    monkeypatch.setattr(autograd.atexit, "register", lambda *what: registered.append(what))
    wait = autograd.wait_at_exit
    monkeypatch.setattr(autograd, "wait_at_exit", lambda x: (asked.append(x.device.type), wait(x)))
    q, k, v = tensors(grad=True)
    attend(q, k, v).sum().backward()
    assert asked == ["cpu"] and not registered  # a CPU's backward runs in its caller's thread
    for _ in range(2):
        wait(SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]
    ((function, seconds),) = registered
    assert function is time.sleep and 0 < seconds < 0.1


def test_without_gradients_no_lse_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    allocate = execution.allocate

    def spy(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = allocate(*arguments)
        seen.append(lse)
        return out, lse

    monkeypatch.setattr("flashgen.execution.allocate", spy)
    q, k, v = tensors(grad=True)
    with torch.no_grad():
        attend(q, k, v)
    attend(q, k, v)
    assert [lse.numel() for lse in seen] == [0, 2 * 4 * 9]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    results = []
    for wrap in (False, True):
        leaves = tensors(grad=True)
        out = checkpoint(attend, *leaves, use_reentrant=reentrant) if wrap else attend(*leaves)
        out.square().sum().backward()
        results.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_second_derivatives_are_refused_by_name() -> None:
    q, k, v = tensors(grad=True)
    (dq,) = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedProblemError, match=r"second derivative of flashgen\.attention"):
        dq.sum().backward()
    q, k, v = tensors()
    once = torch.func.grad(lambda q: attend(q, k, v).sum())
    with pytest.raises(UnsupportedProblemError, match=r"second derivative of flashgen\.attention"):
        torch.func.grad(lambda q: once(q).sum())(q)


def test_forward_mode_is_refused_and_not_zero() -> None:
    q, k, v = tensors()
    with pytest.raises(UnsupportedProblemError, match=r"forward-mode derivative of flashgen\.attention"):
        torch.func.jvp(lambda q: attend(q, k, v), (q,), (q,))
    with forward_ad.dual_level():
        attend(q, k, v)  # no tangent anywhere
        with pytest.raises(UnsupportedProblemError, match="forward-mode"):
            attend(q, forward_ad.make_dual(k, k), v)
        bias = forward_ad.make_dual(torch.zeros(9, 11), torch.ones(9, 11))
        with pytest.raises(UnsupportedProblemError, match="forward-mode"):
            attend(q, k, v, bias=bias)


def test_forward_mode_below_other_transforms_is_refused_by_name() -> None:
    """What another transform wraps shows no tangent; it was an error of PyTorch's own, or a tangent of zero."""
    q, k, v = tensors()
    mapped = torch.stack([q, q])
    functions: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (torch.func.grad(lambda q: attend(q, k, v).sum()), q),
        (torch.vmap(lambda q: attend(q, k, v)), mapped),
        (lambda k: torch.vmap(lambda q: attend(q, k, v))(mapped), k),
        (lambda bias: torch.vmap(lambda q: attend(q, k, v, bias=bias))(mapped), torch.zeros(9, 11)),
        # A constant of the inner gradient, which depends on the outer variable.
        (lambda k: torch.func.grad(lambda x: (attend(q, k, v) * x).sum())(torch.ones(())), k),
    ]
    for function, x in functions:
        with pytest.raises(UnsupportedProblemError, match=r"forward-mode derivative of flashgen\.attention"):
            torch.func.jvp(function, (x,), (x,))
    with pytest.raises(UnsupportedProblemError, match=r"derivative of flashgen\.attention"):
        torch.func.hessian(lambda q: attend(q, k, v).sum())(q)


# -- autocast: the rule of scaled_dot_product_attention --


def test_autocast_casts_as_sdpa_does() -> None:
    q, k, v = tensors(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v)
        plan = flashgen.explain(q, k, v, causal=True)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
        )
    assert out.dtype == theirs.dtype == torch.bfloat16 and plan.problem.dtype == "bf16"
    want = attend(*(x.bfloat16() for x in (q, k, v)))
    assert torch.equal(out, want)
    for loss in (out, want):
        loss.float().square().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert attend(q, k, v).dtype == torch.float32


def test_autocast_gives_tensors_of_several_dtypes_one() -> None:
    """Rotary embeddings in fp32 leave q and k there, beside a v in bf16 of a linear layer."""
    q, k, v = tensors(grad=True)
    half = v.detach().bfloat16().requires_grad_()
    want = attend(*(x.bfloat16() for x in (q, k, half)), dropout_p=0.3, generator=torch.Generator().manual_seed(1))
    packed = [x[0] for x in (q, k, half)]
    offsets = [torch.tensor([0, n], dtype=torch.int32) for n in (9, 11)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(q, k, half, dropout_p=0.3, generator=torch.Generator().manual_seed(1))
        assert flashgen.explain(q, k, half, causal=True).problem.dtype == "bf16"
        alone = flashgen.varlen_attention(packed[0], packed[1], packed[2], offsets[0], offsets[1], 9, 11, causal=True)
    assert torch.equal(got, want)
    assert isinstance(alone, Tensor) and alone.dtype == torch.bfloat16
    grads = [torch.autograd.grad(out.float().sum(), (q, k, half)) for out in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(flashgen.InvalidProblemError, match="one dtype"):
        attend(q, k, half)


def test_autocast_does_not_reach_the_products_inside() -> None:
    """A fp16 call under bf16 autocast is a bf16 call, and its fp32 scores stay fp32; in the backward as well."""
    q, k, v = (x.detach().half().requires_grad_() for x in tensors())
    bias = torch.randn(9, 11)
    want = attend(*(x.bfloat16() for x in (q, k, v)), bias=bias)
    want_grad = torch.autograd.grad(want.float().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(q, k, v, bias=bias)
        got_grad = torch.autograd.grad(got.float().sum(), (q, k, v))
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got_grad, want_grad, strict=True))


# -- torch.func --


def looped(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return torch.stack([function(*(x[index] for x in arguments)) for index in range(MAPPED)])


def test_vmap_folds_into_the_batch() -> None:
    q, k, v = tensors(mapped=True)
    assert torch.equal(torch.vmap(attend)(q, k, v), looped(attend, q, k, v))
    both = torch.vmap(lambda q, k, v: flashgen.attention(q, k, v, return_lse=True))(q, k, v)
    assert both[1].shape == (MAPPED, 2, 4, 9)
    part = torch.vmap(attend, in_dims=(1, None, None), out_dims=1)(q.movedim(0, 1), k[0], v[0])
    assert torch.equal(part, torch.stack([attend(x, k[0], v[0]) for x in q], 1))


def test_vmap_over_nothing() -> None:
    q, k, v = (x[:0] for x in tensors(mapped=True))
    assert torch.vmap(attend)(q, k, v).shape == (0, 2, 9, 4, 6)


@pytest.mark.parametrize(
    "options", [{}, {"score_mod": lambda s, b, h, i, j: s - j}, {"mask_mod": lambda b, h, i, j: i >= j}], ids=[*"-sm"]
)
def test_meta_tensors_have_shapes_and_gradients(options: dict[str, Any]) -> None:
    q, k, v = (x.detach().to("meta").requires_grad_() for x in tensors())
    out = attend(q, k, v, **options)
    assert out.shape == (2, 9, 4, 6) and out.is_meta
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in (dq, dk, dv)] == [q.shape, k.shape, v.shape]


def test_autograd_outside_of_vmap_gets_its_gradients() -> None:
    """The mapped tensors hide that what they wrap is recorded; with a bias, item by item."""
    leaves = tensors(grad=True, mapped=True)
    bias = torch.randn(4, 9, 11, requires_grad=True)
    plain = torch.autograd.grad(looped(attend, *leaves).sin().sum(), leaves)
    mapped = torch.autograd.grad(torch.vmap(attend)(*leaves).sin().sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, mapped, strict=True))

    def biased(*x: Tensor) -> Tensor:
        return attend(*x, bias=bias)

    (want,) = torch.autograd.grad(looped(biased, *leaves).sin().sum(), bias)
    (got,) = torch.autograd.grad(torch.vmap(biased)(*leaves).sin().sum(), bias)
    torch.testing.assert_close(got, want)


def test_gradients_of_samples() -> None:
    q, k, v = tensors(mapped=True)

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda k: attend(q, k, v).sin().sum())(k)
        return found

    assert torch.equal(torch.vmap(gradient)(q, k, v), looped(gradient, q, k, v))
    jacobian = torch.func.jacrev(lambda v: attend(q[0], k[0], v))(v[0])
    rows = torch.autograd.functional.jacobian(lambda v: attend(q[0], k[0], v), v[0])
    torch.testing.assert_close(jacobian, rows)


def test_vmap_with_operands_runs_one_after_another() -> None:
    q, k, v = tensors(mapped=True)
    generator = torch.Generator().manual_seed(1)
    shared, own = torch.randn(4, 9, 11, generator=generator), torch.randn(MAPPED, 4, 9, 11, generator=generator)
    got = torch.vmap(lambda q, k, v: attend(q, k, v, bias=shared))(q, k, v)
    assert torch.equal(got, looped(lambda q, k, v: attend(q, k, v, bias=shared), q, k, v))

    def gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda bias: attend(q, k, v, bias=bias).sin().sum())(bias)
        return found

    torch.testing.assert_close(torch.vmap(gradient)(q, k, v, own), looped(gradient, q, k, v, own))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_transforms_that_functions_would_get_wrong_are_refused_by_name(backend: Any) -> None:
    q, k, v = tensors()
    table = torch.randn(4)

    def of_table(x: Tensor) -> Tensor:
        out: Any = flashgen.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + x[h] * j, backend=backend)
        return out.sin().sum()

    def of_q(x: Tensor) -> Tensor:
        out: Any = flashgen.attention(x, k, v, score_mod=lambda s, b, h, i, j: s + table[h] * j, backend=backend)
        return out.sin().sum()

    for refused in (
        lambda: torch.func.grad(of_table)(table),
        lambda: torch.vmap(of_table)(torch.stack([table, table])),
        lambda: torch.func.grad(of_q)(q),
    ):
        with pytest.raises(UnsupportedProblemError, match=r"torch\.func"):
            refused()
    if backend == "torch":  # a mask needs no derivative

        def masked(x: Tensor) -> Tensor:
            out: Any = flashgen.attention(x, k, v, mask_mod=lambda b, h, i, j: (i - j).abs() < 4)
            return out.sin().sum()

        leaf = q.clone().requires_grad_()
        assert torch.equal(torch.func.grad(masked)(q), torch.autograd.grad(masked(leaf), leaf)[0])


# -- deterministic= --


def test_a_gradient_that_a_named_backend_lacks_is_refused_by_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = type(by_name("gluon_bwd_sm90"))
    monkeypatch.setattr(backward, "refuses", lambda self, problem: "no bias learns here" if problem.bias_grad else None)
    dispatch.forget()
    q, k, v = (torch.randn(1, 64, 2, 64, dtype=torch.float16) for _ in range(3))
    bias = torch.randn(64, 64, requires_grad=True)
    options: dict[str, Any] = {"bias": bias, "backend": "gluon", "deterministic": True}
    with pytest.raises(UnsupportedProblemError, match="no bias learns here"):
        flashgen.attention(q, k, v, **options)
    with torch.no_grad():
        assert flashgen.explain(q, k, v, **options).variant == "gluon_fwd_sm90"
    monkeypatch.undo()
    dispatch.forget()
    out: Any = flashgen.attention(q, k, v, **options)
    out.sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "switch", "wanted"), [(None, False, False), (None, True, True), (True, False, True), (False, True, False)]
)
def test_deterministic_follows_torch_unless_told(given: bool | None, switch: bool, wanted: bool) -> None:
    """What the variant of the backward is asked for; the switch of torch is read at the call, not at the backward."""
    q, k, v = tensors(grad=True)
    torch.use_deterministic_algorithms(switch)
    try:
        plan = flashgen.explain(q, k, v, deterministic=given)
        out = attend(q, k, v, deterministic=given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert plan.problem.deterministic is wanted
    assert plan.backward is not None and plan.backward.problem.deterministic is wanted
    assert out.grad_fn is not None and out.grad_fn.scalars.deterministic is wanted
