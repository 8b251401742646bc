"""Traces are kept by content: the same meaning hits, whatever changes what is computed misses, and nothing is ever stale."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from mods_running import CPU
from torch.nn.attention.flex_attention import and_masks

from flashgen import mods
from flashgen.mods import programs
from flashgen.mods.graph import ordered
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.spec import Mods
from flashgen.variants import by_name

TABLE = torch.arange(16, dtype=torch.int32)
OTHER = torch.arange(16, 32, dtype=torch.int32)
WIDTH = 4
SETTINGS = types.ModuleType("settings_of_a_user")


def program(function: Callable[..., Any]) -> mods.Program:
    return mods.program(None, {"mask_mod": function}, CPU)[0]


def window(width: Any) -> Callable[..., Any]:
    return lambda b, h, q, k: q - k < width


def by_table(table: torch.Tensor) -> Callable[..., Any]:
    return lambda b, h, q, k: table[q] == table[k]


def test_a_new_lambda_of_the_same_meaning_hits() -> None:
    assert program(window(5)) is program(window(5))
    assert program(lambda b, h, q, k: q >= k) is program(lambda b, h, q, k: q >= k)
    assert program(and_masks(window(3), window(4))) is program(and_masks(window(3), window(4)))
    assert program(functools.partial(_keyword, width=2)) is program(functools.partial(_keyword, width=2))


def test_a_changed_constant_misses() -> None:
    assert program(window(5)).digest != program(window(6)).digest
    assert program(window(5)) is not program(window(5.0))
    assert program(window(True)) is not program(window(1))
    assert program(and_masks(window(3), window(4))).digest != program(and_masks(window(3), window(5))).digest
    assert program(lambda b, h, q, k: q >= k).digest != program(lambda b, h, q, k: q > k).digest
    assert program(lambda b, h, q, k: q - k < 5).digest != program(lambda b, h, q, k: q - k < 6).digest
    assert program(lambda b, h, q, k: q * 2.0 < k) is not program(lambda b, h, q, k: q * 2 < k)
    inner = [lambda b, h, q, k: (lambda: q < 7)(), lambda b, h, q, k: (lambda: q < 8)()]
    assert program(inner[0]).digest != program(inner[1]).digest
    assert program(functools.partial(_keyword, width=2)).digest != program(functools.partial(_keyword, width=3)).digest
    assert program(_defaulted(1)).digest != program(_defaulted(2)).digest


def _keyword(b: Any, h: Any, q: Any, k: Any, width: int) -> Any:
    return q - k < width


def _defaulted(value: int) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q: Any, k: Any, width: int = value) -> Any:
        return q - k < width

    return mask


def test_a_changed_global_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < WIDTH

    def helper(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (lambda: mask(b, h, q, k))()

    before = program(mask).digest, program(helper).digest
    monkeypatch.setattr(f"{__name__}.WIDTH", 9)
    assert program(mask).digest != before[0]
    assert program(helper).digest != before[1]


def test_a_changed_attribute_of_a_users_module_misses() -> None:
    SETTINGS.width = 3  # type: ignore[attr-defined]
    before = program(_by_module).digest
    SETTINGS.width = 4  # type: ignore[attr-defined]
    assert program(_by_module).digest != before


def _by_module(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k < SETTINGS.width


@dataclass
class _Window:
    width: int
    _secret: int = 0

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < self.width + self._secret

    def method(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < self.width + self._secret


def test_objects_and_methods_are_known_by_their_attributes() -> None:
    assert program(_Window(3)) is program(_Window(3))
    assert program(_Window(3).method) is program(_Window(3).method)
    one = _Window(3)
    before = program(one).digest
    one._secret = 1
    assert program(one).digest != before
    assert program(_Window(3).method).digest != program(one.method).digest


def test_another_tensor_of_the_same_kind_hits_and_is_bound() -> None:
    first, tensors = mods.program(None, {"mask_mod": by_table(TABLE)}, CPU)
    second, others = mods.program(None, {"mask_mod": by_table(OTHER)}, CPU)
    assert first is second
    assert tensors[0] is TABLE
    assert others[0] is OTHER


@pytest.mark.parametrize(
    "other", [TABLE.long(), TABLE[:8], TABLE.view(4, 4), TABLE.float().requires_grad_()], ids=["dtype", "length", "rank", "gradient"]
)  # fmt: skip
def test_a_tensor_of_another_kind_misses(other: torch.Tensor) -> None:
    def flat(table: torch.Tensor) -> Callable[..., Any]:
        return lambda b, h, q, k: table.view(-1)[q] >= k

    assert program(flat(TABLE)) is program(flat(OTHER))
    assert program(flat(TABLE)) is not program(flat(other))


def test_the_digest_does_not_depend_on_lengths() -> None:
    """A kernel takes sizes at run time: a longer document table compiles nothing."""
    assert program(by_table(TABLE)).digest == program(by_table(TABLE.repeat(5))).digest


def test_what_pytorch_is_set_to_belongs_to_the_meaning() -> None:
    def half(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q / 3 < k

    before = program(half).digest
    torch.set_default_dtype(torch.float64)
    try:
        assert program(half).digest != before
    finally:
        torch.set_default_dtype(torch.float32)
    programs.forget()
    with torch.device("meta"):
        assert program(half).digest == before


def test_a_function_may_ask_for_strides() -> None:
    def strided(table: torch.Tensor) -> Callable[..., Any]:
        return lambda b, h, q, k: q * table.stride(0) >= k

    assert program(strided(TABLE)).digest != program(strided(TABLE[::2])).digest


def test_two_tensors_are_told_apart() -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> Callable[..., Any]:
        return lambda b, h, q, k: x[q] == y[k]

    apart, tensors = mods.program(None, {"mask_mod": both(TABLE, OTHER)}, CPU)
    together, _ = mods.program(None, {"mask_mod": both(TABLE, TABLE)}, CPU)
    assert len(apart.captures) == 2
    assert tensors == (TABLE, OTHER)
    assert len(together.captures) == 1


class _Opaque:
    """Without a __dict__: nothing says what it is."""

    __slots__ = ("width",)

    def __init__(self, width: int) -> None:
        self.width = width


def test_what_cannot_be_compared_by_value_is_traced_anew() -> None:
    hidden = _Opaque(3)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < hidden.width

    before = program(mask).digest
    hidden.width = 4
    assert program(mask).digest != before


def test_numbers_made_inside_are_constants_and_kept() -> None:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k < torch.tensor([3, 5])[h]

    made, tensors = mods.program(None, {"mask_mod": mask}, CPU)
    assert tensors[0].tolist() == [3, 5]
    assert mods.program(None, {"mask_mod": mask}, CPU)[0] is made


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    programs.forget()
    monkeypatch.setattr(programs, "_KEPT", 4)
    for width in range(10):
        program(window(width))
    assert len(programs._cache) == 4


@pytest.mark.parametrize("variant", ["triton_fwd", "gluon_fwd_sm90", "triton_bwd", "gluon_bwd_sm90"])
def test_trace_analysis_and_rendering_of_ten_operations_take_50_ms(variant: str) -> None:
    ids = torch.arange(8192, dtype=torch.int32) // 500

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        near = ((q - k).abs() < 512) | (k < 16)
        return near & (q >= k) & (ids[q] == ids[k]) & ((q - k) % 2 == 0)

    problem = Problem(
        dtype="bf16", batch=1, seqlen_q=8192, seqlen_k=8192, num_heads_q=8, num_heads_kv=8, head_dim=128, head_dim_v=128
    )
    took = []
    for _ in range(4):
        programs.forget()
        render.cache_clear()
        start = time.thread_time()  # of the CPU: others may use the machine
        made, tensors = mods.program(None, {"mask_mod": mask}, CPU)
        assert made.mask is not None
        mods.key_ranges(
            made.mask,
            mods.arrays_of(tensors),
            batch=1,
            num_heads=1,
            seqlen_q=8192,
            seqlen_k=8192,
            block_m=128,
            block_n=128,
        )
        traced = replace(
            problem, op=by_name(variant).op, has_mask_mod=True, mods=Mods(digest=made.digest, program=made)
        )
        assert made.captures[0].name in render(traced.spec, by_name(variant)).text
        took.append(time.thread_time() - start)
    assert min(took) <= 0.050, f"{took} s of CPU time"


def test_a_value_used_again_and_again_is_one_node() -> None:
    """Doubling forty times is forty nodes, not 2^40."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        x = q.long()
        for _ in range(40):
            x = x + x
        return x >= k

    made = program(mask)
    assert made.mask is not None
    assert len(ordered(made.mask)) < 50
