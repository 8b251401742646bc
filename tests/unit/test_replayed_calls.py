"""Calls whose launches are replayed: each hands kernels its own tensors, forward and backward; and Triton's own launcher is given the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from replay_support import Given, Launcher, driver, noted  # noqa: F401  # a fixture
from torch import Tensor
from warm_support import H100, K, Q, V, draw

import flashgen
from flashgen import Target, build, dispatch, replays

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("driver")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Given]:
    """CPU tensors count as on an h100; each launch is one kernel that gets all tensors, and what they are comes by name at the end."""
    given: Given = []
    launcher = Launcher(given)
    real = build.build

    def launch(*tensors: Tensor | None, **values: Any) -> None:
        named = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        noted(launcher, *tensors, *named.values(), tuple(named))

    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "silent")
    dispatch.forget()
    with (
        mock.patch.object(Target, "detect", classmethod(lambda cls, device=None: H100)),
        mock.patch("flashgen.execution.build", lambda source: replace(real(source), launch=launch)),
        mock.patch("flashgen.warm.build", lambda source: replace(real(source), launch=launch)),
    ):
        yield given
    dispatch.forget()


def addresses(*tensors: Any) -> tuple[Any, ...]:
    return tuple(None if x is None else x.data_ptr() for x in tensors)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_a_warm_call_replays_with_its_own_tensors(gpu: Given, with_lse: bool, layout: str) -> None:
    def call(turn: int) -> None:
        q, k, v = (x.clone() if layout == "bshd" else x.transpose(1, 2).contiguous() for x in (Q, K, V))
        bias, slopes = draw(24, 30, seed=turn), torch.rand(4)
        options: dict[str, Any] = {"bias": bias, "alibi_slopes": slopes, "layout": layout}
        found: Any = flashgen.attention(q, k, v, return_lse=with_lse, **options)
        out, lse = found if with_lse else (found, None)
        *places, names = gpu[-1][9:]
        assert len(gpu) == turn + 1 and set(names) == {"bias", "alibi_slopes"}
        assert tuple(places[:5]) == addresses(q, k, v, out, lse)
        assert dict(zip(names, places[5:], strict=True)) == {"bias": bias.data_ptr(), "alibi_slopes": slopes.data_ptr()}
        assert out.is_contiguous() and out.shape == (*q.shape[:-1], v.shape[-1]) and out.dtype == q.dtype

    for turn in range(5):
        call(turn)
    assert replayed(lambda: call(5))


def replayed(call: Callable[[], Any]) -> bool:
    """Whether all launches inside are replayed."""
    with mock.patch.object(replays.Kind, "__call__", side_effect=AssertionError("launched as ever")):
        call()
    return True


@pytest.mark.parametrize("dlse", [False, True])
@pytest.mark.parametrize("dout", ["contiguous", "expanded", "transposed"])
def test_a_recorded_call_replays_forward_and_backward(gpu: Given, dout: str, dlse: bool) -> None:
    def step(turn: int) -> None:
        given = [x.clone().requires_grad_() for x in (Q, K, V)]
        out, lse = flashgen.attention(*given, causal=True, return_lse=True)
        forward = gpu[-1]
        assert tuple(forward[9:14]) == addresses(*given, out, lse)
        weights = {
            "contiguous": lambda: draw(*out.shape, seed=turn),
            "expanded": lambda: draw(1, 1, 1, 1, seed=turn).expand(out.shape),
            "transposed": lambda: draw(*out.transpose(1, 2).shape, seed=turn).transpose(1, 2),
        }[dout]()
        ends = ([out, lse], [weights, torch.ones_like(lse)]) if dlse else ([out], [weights])
        saved = (*given, out, lse)
        found = torch.autograd.grad(ends[0], given, ends[1])
        places = gpu[-1][9:19]
        assert places[1:2] == ((addresses(ends[1][1])) if dlse else (None,))
        assert places[2:7] == addresses(*saved) and places[7:] == addresses(*found)
        assert (places[0] == weights.data_ptr()) == (dout != "expanded"), (
            "TMA cannot address a stride of 0: it is copied"
        )
        for x, gradient in zip(given, found, strict=True):
            assert gradient.shape == x.shape and gradient.is_contiguous() and gradient.dtype == x.dtype

    for turn in range(4):
        step(turn)
    assert replayed(lambda: step(5)) and len(gpu) == 10


def test_a_gradient_that_lies_otherwise_is_another_kind(gpu: Given) -> None:
    given = [x.clone().requires_grad_() for x in (Q, K, V)]

    def taken_as_it_is(weights: Tensor) -> bool:
        out: Any = flashgen.attention(*given, causal=True)
        torch.autograd.grad(out, given, weights)
        return bool(gpu[-1][9] == weights.data_ptr())

    plain = draw(2, 24, 4, 16)
    behind = torch.zeros(plain.numel() + 1, dtype=plain.dtype)[1:].view(plain.shape)
    narrow = draw(2, 24, 4, 17)[..., :16]
    for _ in range(4):
        assert taken_as_it_is(plain)
    assert replayed(lambda: taken_as_it_is(plain))
    with pytest.raises(AssertionError, match="launched as ever"):
        replayed(lambda: taken_as_it_is(behind))  # the launch copies it: its address is no multiple of 16 bytes
    for _ in range(4):
        assert not taken_as_it_is(narrow), "its strides are no multiples of 16 bytes"
        assert taken_as_it_is(plain)


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import torch
from idle_driver import idle_driver

with idle_driver() as launched:
    from triton.backends.nvidia import driver
    from triton.runtime.driver import driver as drivers
    from flashgen import replays
    from flashgen.build import load_module

    given, maps = [], {{}}

    class Last:
        def __init__(self, real): self.real = real
        def __call__(self, *values):
            flat = [one for x in values for one in (x if type(x) in (list, tuple) else [x])]
            given.append([maps[id(x)] if type(x).__name__ == "PyCUtensorMap" else x.data_ptr() if hasattr(x, "data_ptr") else repr(x)
                          if not isinstance(x, int) else x for x in flat])
            return self.real(*values)

    utils = drivers.active.utils
    for name in ("fill_tma_descriptor", "fill_tma_descriptor_tiled"):
        real = getattr(utils, name, None)
        if real is not None:
            def fill(address, *rest, real=real):
                made = real(address, *rest)
                maps[id(made)] = address
                keep.append(made)
                return made
            keep = []
            setattr(utils, name, fill)
    init = driver.CudaLauncher.__init__
    def spied(self, *arguments):
        init(self, *arguments)
        code = getattr(self.launch, "__code__", None)
        if code is None:
            self.launch = Last(self.launch)
        else:
            cell = dict(zip(code.co_freevars, self.launch.__closure__))["launcher"]
            cell.cell_contents = Last(cell.cell_contents)
    driver.CudaLauncher.__init__ = spied

    module = load_module(Path({file!r}))
    kind = replays.Kind(module.launch, {{"n": 7, "scale": 0.5}})
    rows = []
    for turn in range(4):
        x, y, z = torch.zeros(32, 64), torch.zeros(64), torch.zeros(64, 64)
        given.clear()
        before, replays_it = launched(), kind.replay is not None
        if replays_it:
            assert kind.replay([t.data_ptr() for t in (x, y, z)])
        else:
            kind((x, y), {{"z": z}})
        named = {{x.data_ptr(): "x", y.data_ptr(): "y", z.data_ptr() + 256: "z[1:]"}}
        rows.append((replays_it, launched() - before, [[named.get(v, v) if isinstance(v, int) else v for v in one] for one in given]))
    print(json.dumps(rows))
"""
KERNELS = """
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit(do_not_specialize=["n"])
def nothing(a, b, c_ptr, n, SIZE: gl.constexpr):
    pass


@triton.jit
def store(x_ptr, y_ptr, n, scale, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), n * scale)


def launch(x, y, *, z, n, scale):
    sums, more = x.new_empty((2, 16, 64))
    a = TensorDescriptor.from_tensor(x, [16, 16], LAYOUT)
    b = TensorDescriptor.from_tensor(more, [16, 16], LAYOUT)
    nothing[(3, 2)](a, b, z[1:], n, 16, num_warps=4, enable_fp_fusion=True)
    store[(5,)](y, sums, n, scale, SIZE=16, num_warps=2, enable_fp_fusion=True)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's driver is compiled by cc")
def test_tritons_own_launcher_is_given_the_same(tmp_path: Path) -> None:
    """Above a driver that does nothing: its flat or nested arguments, its TMA descriptors."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    script = SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), file=str(tmp_path / "kernels.py"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [(known, count) for known, count, _ in rows] == [(False, 2), (False, 2), (True, 2), (True, 2)]

    def comparable(launched: list[list[Any]]) -> list[list[Any]]:
        """Without where scratch memory lies, and hooks of Triton's that nobody hears."""
        large = [[("memory" if isinstance(v, int) and v > 1 << 32 else v) for v in one] for one in launched]
        return [
            [None if "HookChain" in str(v) or "LazyDict" in str(v) or v == "None" else v for v in one] for one in large
        ]

    first = comparable(rows[0][2])
    assert "x" in first[0] and "z[1:]" in first[0] and "y" in first[1] and first[0].count("memory") >= 1
    for _, _, launched in rows[1:]:
        assert comparable(launched) == first
