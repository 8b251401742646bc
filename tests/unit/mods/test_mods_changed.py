"""A mod that reads something else than before is another mod; what it reads gets its gradients, or an error."""

from __future__ import annotations

import itertools
import math
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.mods.fingerprint import fingerprint
from flashgen.operands import captured_tensors

Mod = Callable[..., Tensor]


def _class_attribute() -> tuple[Any, Callable[[], None]]:
    class Scaled:
        table: dict[str, float] = {"s": 2.0}  # noqa: RUF012

        def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.table["s"]

    return Scaled().mod, lambda: Scaled.table.update(s=-3.0)


def _function_attribute() -> tuple[Any, Callable[[], None]]:
    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * mod.scale  # type: ignore[attr-defined]

    mod.scale = 2.0  # type: ignore[attr-defined]
    return mod, lambda: setattr(mod, "scale", -3.0)


def _module_in_a_cell() -> tuple[Any, Callable[[], None]]:
    settings: Any = types.ModuleType("settings_of_a_test")
    settings.SCALE = 2.0
    return (lambda s, b, h, q, k: s * settings.SCALE), lambda: setattr(settings, "SCALE", -3.0)


def _imported_inside() -> tuple[Any, Callable[[], None]]:
    settings: Any = types.ModuleType("imported_by_a_test")
    settings.SCALE = 2.0
    sys.modules["imported_by_a_test"] = settings

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        import imported_by_a_test  # type: ignore[import-not-found]

        scaled: Tensor = s * imported_by_a_test.SCALE
        return scaled

    return mod, lambda: setattr(settings, "SCALE", -3.0)


def _attribute_of_a_library_object() -> tuple[Any, Callable[[], None]]:
    holder: Any = torch.nn.Module()
    holder.scale = 2.0
    return (lambda s, b, h, q, k: s * holder.scale), lambda: setattr(holder, "scale", -3.0)


def _slot_of_a_base() -> tuple[Any, Callable[[], None]]:
    class Base:
        __slots__ = ("scale",)
        scale: float

    class Scaled(Base):
        def __call__(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * self.scale

    mod = Scaled()
    mod.scale = 2.0
    return mod, lambda: setattr(mod, "scale", -3.0)


def _attribute_beside(value: Any) -> tuple[Any, Callable[[], None]]:
    """What an instance holds beside its elements, its number or its memory."""
    value.scale = 2.0
    return (lambda s, b, h, q, k: s * value.scale), lambda: setattr(value, "scale", -3.0)


class _Dict(dict[str, float]):
    pass


class _List(list[float]):
    pass


class _Set(set[float]):
    pass


class _Float(float):
    pass


def _private_attribute_of_a_module() -> tuple[Any, Callable[[], None]]:
    holder: Any = torch.nn.Module()
    holder._scale = 2.0
    return (lambda s, b, h, q, k: s * holder._scale), lambda: setattr(holder, "_scale", -3.0)


def _bound_method_of_a_dict() -> tuple[Any, Callable[[], None]]:
    numbers = {"s": 2.0}
    get = numbers.get
    return (lambda s, b, h, q, k: s * get("s")), lambda: numbers.update(s=-3.0)


LOOKED_UP: Any = types.ModuleType("looked_up_by_name")
LOOKED_UP.SCALE = 2.0


def _name_in_a_string(mod: Any) -> tuple[Any, Callable[[], None]]:
    return mod, lambda: setattr(LOOKED_UP, "SCALE", LOOKED_UP.SCALE + 1)


def _random_generator() -> tuple[Any, Callable[[], None]]:
    draws = random.Random(0)
    return (lambda s, b, h, q, k: s * draws.random()), lambda: draws.seed(1)


@pytest.mark.parametrize(
    "make",
    [
        _class_attribute, _function_attribute, _module_in_a_cell, _imported_inside, _attribute_of_a_library_object, _slot_of_a_base,
        *(partial(_attribute_beside, value) for value in (_Dict(), _List(), _Set(), _Float(1.0), torch.ones(2))),
        _private_attribute_of_a_module, _bound_method_of_a_dict, _random_generator,
        partial(_name_in_a_string, lambda s, b, h, q, k: s * getattr(LOOKED_UP, "SCALE")),  # noqa: B009
        partial(_name_in_a_string, lambda s, b, h, q, k: s * globals()["LOOKED_UP"].SCALE),
        partial(_name_in_a_string, lambda s, b, h, q, k: s * eval("LOOKED_UP.SCALE")),
    ],
)  # fmt: skip
def test_a_changed_value_is_another_key_or_none(make: Callable[[], tuple[Any, Callable[[], None]]]) -> None:
    mod, change = make()
    before = fingerprint([mod]).key
    change()
    after = fingerprint([mod]).key
    assert before is None or before != after


def test_what_did_not_change_keeps_its_key() -> None:
    mod, _ = _class_attribute()
    assert fingerprint([mod]).key is not None and fingerprint([mod]).key == fingerprint([mod]).key


def test_functions_in_c_and_what_hangs_on_tensors_are_known_by_value() -> None:
    table, columns = torch.ones(4), [1.0, 2.0]
    table.scale = 2.0  # type: ignore[attr-defined]
    of = columns.__getitem__

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return operator.add(s, math.sqrt(of(1)) * table.scale)  # type: ignore[attr-defined, no-any-return]

    assert fingerprint([mod]).key is not None and fingerprint([mod]).key == fingerprint([mod]).key


@pytest.mark.parametrize("where", ["captured", "q", "bias", "dout", "dlse"])
def test_a_lazily_negated_view_counts_with_its_sign(where: str) -> None:
    """As the imaginary part of a conjugate is: it shares memory with its negative, and kernels read memory."""

    def draw(name: str, *shape: int) -> Tensor:
        plain = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
        return torch._neg_view(-plain) if name == where else plain

    q, k, v = draw("q", 1, 6, 2, 16), draw("k", 1, 6, 2, 16), draw("v", 1, 6, 2, 16)
    table, bias, dout, dlse = draw("captured", 6), draw("bias", 6, 6), draw("dout", 1, 6, 2, 16), draw("dlse", 1, 2, 6)
    given = {"captured": table, "q": q, "bias": bias, "dout": dout, "dlse": dlse}[where]
    assert given.is_neg()
    found = []
    for backend in ("torch", "triton"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        options: dict[str, Any] = {"score_mod": lambda s, b, h, i, j: s + table[i], "bias": bias, "backend": backend}
        out, lse = flashgen.attention(*leaves, return_lse=True, **options)
        found.append((out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Unaskable:
    """Its attributes raise when they are asked for, like those of `torch.classes`."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_what_cannot_be_walked_is_unknown_and_runs() -> None:
    unaskable, chain = Unaskable(), [0.5]
    for _ in range(100_000):
        chain = [chain]  # type: ignore[list-item]
    for reads in (unaskable, chain):

        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, reads: Any = reads) -> Tensor:
            return s + 0.1 * j

        assert fingerprint([mod]).key is None
        q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
        flashgen.attention(q, k, v, score_mod=mod).sum().backward()  # type: ignore[union-attr]
        assert q.grad is not None


TABLE = {"w": torch.ones(2, requires_grad=True)}
NET: Any = torch.nn.Module()
NET.w = torch.nn.Parameter(torch.ones(2))


class Holder:
    """Not callable; its method is the mod."""

    def __init__(self) -> None:
        self.w = torch.ones(2, requires_grad=True)

    def mod(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + self.w[h] * k


def _default(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, w: Tensor = TABLE["w"]) -> Tensor:
    return s + w[h] * k


HOLDER = Holder()


@pytest.mark.parametrize(
    ("mod", "tensor"),
    [
        (lambda s, b, h, q, k: s + TABLE["w"][h] * k, TABLE["w"]),
        (lambda s, b, h, q, k: s + NET.w[h] * k, NET.w),
        (lambda s, b, h, q, k: (lambda: s + TABLE["w"][h] * k)(), TABLE["w"]),
        (_default, TABLE["w"]),
        (HOLDER.mod, HOLDER.w),
        (lambda s, b, h, q, k: HOLDER.mod(s, b, h, q, k), HOLDER.w),
    ],
    ids=["global dict", "global module", "inner function", "keyword default", "bound method", "object of a global"],
)
def test_what_a_mod_reads_gets_a_gradient(mod: Mod, tensor: Tensor) -> None:
    assert any(one is tensor for one in captured_tensors(mod))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    tensor.grad = None
    flashgen.attention(q, k, v, score_mod=mod).square().sum().backward()
    assert tensor.grad is not None and tensor.grad.abs().max() > 0
    tensor.grad = None


def test_a_captured_tensor_changed_in_place_before_the_backward_is_an_error() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    w = torch.ones(2, requires_grad=True)
    out = flashgen.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + w[h] * j)
    with torch.no_grad():
        w.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


def _later(backend: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two calls whose masks read one loop variable, differentiated together after the loop; and what they must be."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 12, 1, 16, requires_grad=True) for _ in range(3))
    parts = []
    for width in (1, 6):
        out = flashgen.attention(q, k, v, mask_mod=lambda b, h, i, j: (i - j).abs() <= width, backend=backend)  # noqa: B023
        parts.append(out.square().sum())  # type: ignore[union-attr]
    wanted = [torch.zeros_like(x) for x in (q, k, v)]
    for width in (1, 6):
        out = flashgen.attention(q, k, v, mask_mod=lambda b, h, i, j, w=width: (i - j).abs() <= w, backend="torch")
        for total, x in zip(wanted, torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):  # type: ignore[union-attr]
            total += x
    return list(torch.autograd.grad(parts[0] + parts[1], (q, k, v))), wanted


def test_a_loop_variable_in_a_mod_is_what_it_was_in_the_forward() -> None:
    for found, wanted in zip(*_later("triton"), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidProblemError, match=r"means something else in the backward .* functools.partial"):
        _later("torch")  # where Python runs the function again


def test_another_tensor_under_the_same_name_is_another_mod_in_the_backward() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    outs = []
    for table in (torch.ones(2), torch.zeros(2)):
        outs.append(flashgen.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h] * j))  # noqa: B023
    with pytest.raises(InvalidProblemError, match="means something else in the backward"):
        (outs[0] + outs[1]).sum().backward()  # type: ignore[operator]


@pytest.mark.parametrize("what", ["table of score_mod", "ids of mask_mod", "list of a block mask"])
def test_what_functions_read_and_was_written_before_the_backward_is_an_error(what: str) -> None:
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))
    table, ids = torch.ones(2), torch.arange(16) // 5
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, 16, 16, device="cpu", BLOCK_SIZE=8)
    option: dict[str, Any] = {
        "table of score_mod": {"score_mod": lambda s, b, h, i, j: s + table[h] * j},
        "ids of mask_mod": {"mask_mod": lambda b, h, i, j: ids[i] == ids[j]},
        "list of a block mask": {"block_mask": block},
    }[what]
    out = flashgen.attention(q, k, v, **option)
    for written in (table, ids, block.kv_num_blocks):
        written.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()  # type: ignore[union-attr]


class Slotted:
    __slots__ = ("found",)


class Plain(torch.nn.Module):
    """Its tensor is no parameter."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.found = tensor


@pytest.mark.parametrize("kind", ["slot", "plain attribute", "deque", "mapping", "module", "what no walk finds"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_is_found_wherever_the_tensor_hides(kind: str, backend: Any) -> None:
    hidden = torch.ones(2, requires_grad=True)
    slotted, module = Slotted(), types.ModuleType("of_a_test")
    slotted.found, module.found = hidden, hidden  # type: ignore[attr-defined]
    plain, queue, mapping = Plain(hidden), deque([hidden]), types.MappingProxyType({"found": hidden})
    iterator = itertools.repeat(hidden)
    mod: Mod = {
        "slot": lambda s, b, h, i, j: s + slotted.found[h] * j,
        "plain attribute": lambda s, b, h, i, j: s + plain.found[h] * j,
        "deque": lambda s, b, h, i, j: s + queue[0][h] * j,
        "mapping": lambda s, b, h, i, j: s + mapping["found"][h] * j,
        "module": lambda s, b, h, i, j: s + module.found[h] * j,
        "what no walk finds": lambda s, b, h, i, j: s + next(iterator)[h] * j,
    }[kind]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    flashgen.attention(q, k, v, score_mod=mod, backend=backend).square().sum().backward()  # type: ignore[union-attr]
    wanted = torch.ones(2, requires_grad=True)
    out = flashgen.attention(q, k, v, bias=wanted[:, None, None] * torch.arange(6))
    out.square().sum().backward()  # type: ignore[union-attr]
    torch.testing.assert_close(hidden.grad, wanted.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("leaf", ["bias", "sinks", "captured"])
def test_a_gradient_that_is_differentiated_again_is_refused_whatever_it_belongs_to(leaf: str) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    x = torch.ones(2, requires_grad=True)
    option: dict[str, Any] = {
        "bias": {"bias": x[:, None, None]},
        "sinks": {"sinks": x},
        "captured": {"score_mod": lambda s, b, h, i, j: s + x[h] * j},
    }[leaf]
    out = flashgen.attention(q, k, v, **option)
    (found,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedProblemError, match="second derivative"):
        found.sum().backward()


def test_dropout_runs_inside_functional_transforms() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    assert torch.func.grad(lambda x: flashgen.attention(x, k, v, dropout_p=0.5).sum())(q).shape == q.shape
    with pytest.raises(UnsupportedProblemError, match=r"vmap over .* with score_mod"):
        torch.vmap(lambda x: flashgen.attention(x, k, v, mask_mod=lambda b, h, i, j: i >= j))(q[None])


def test_a_configuration_names_the_kernel_that_traces_the_mod() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    config = flashgen.KernelConfig(variant="triton_fwd", BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)

    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + 0.1 * (i - j)

    out = flashgen.attention(q, k, v, score_mod=mod, config=config)
    torch.testing.assert_close(out, flashgen.attention(q, k, v, score_mod=mod, backend="torch"), atol=1e-5, rtol=1e-5)
