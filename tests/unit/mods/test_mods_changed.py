"""A mod that reads something else than before is another mod; what it reads gets its gradients, or an error."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen.errors import UnsupportedProblemError
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


@pytest.mark.parametrize(
    "make",
    [_class_attribute, _function_attribute, _module_in_a_cell, _imported_inside, _attribute_of_a_library_object, _slot_of_a_base],
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
