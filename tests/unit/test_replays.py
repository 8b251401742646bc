"""Launches that are replayed hand Triton's compiled launcher what the plain way hands it, with their own addresses; what cannot be is not."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from warm_support import H100, K, Q, V, draw

import flashgen
from flashgen import Target, build, dispatch, launches, replays

ROOT = Path(__file__).resolve().parents[2]
Given = list[tuple[Any, ...]]


class PyCUtensorMap:
    """Triton's, made of an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyCUtensorMap) and self.address == other.address

    __hash__ = None  # type: ignore[assignment]


class Descriptor:
    """Triton's TensorDescriptor, as far as launchers look."""

    def __init__(self, base: Tensor) -> None:
        self.base, self.shape, self.block_shape = base, list(base.shape), [1]


class Last:
    """Triton's compiled launcher."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def __call__(self, *values: Any) -> None:
        flat = [one for x in values for one in (x if isinstance(x, list) else [x])]
        self.given.append(tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in flat))


def expanded(values: tuple[Any, ...]) -> list[Any]:
    return [
        one
        for x in values
        for one in ((PyCUtensorMap(x.base.data_ptr()), *x.shape) if isinstance(x, Descriptor) else (x,))
    ]


class Launcher:
    """Triton's CudaLauncher: of 3.6, which hands over one flat list, or of later ones, whose last argument is a list."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, given: Given, nested: bool = False) -> None:
        launcher, self.nested = Last(given), nested

        def flat(*values: Any) -> None:
            launcher(*values[:9], *expanded(values[9:]))

        def inner(*values: Any) -> None:
            launcher(*values[:-1], expanded(values[-1]))

        self.launch = inner if nested else flat

    def __call__(self, x: int, y: int, z: int, stream: Any, function: int, packed: Any, *rest: Any) -> None:
        metadata, enter, leave, *given = rest
        if enter is not None:
            enter(metadata)
        first = (x, y, z, stream, function, packed, metadata, enter, leave)
        self.launch(*first, tuple(given)) if self.nested else self.launch(*first, *given)


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    from triton.runtime.driver import driver as drivers

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    monkeypatch.setattr(drivers, "_active", active)
    return active


def noted(launcher: Any, *given: Any, enter: Any = None) -> None:
    launches.Noted(launcher)(3, 2, 1, 77, 1234, (4, 1, 0), None, enter, None, *given)


COUNTERS = launches.Counters(lambda device: torch.zeros(1, dtype=torch.int32))


def launch_of(launcher: Any) -> Callable[..., None]:
    def launch(x: Tensor, y: Tensor | None, *, n: int, more: Tensor | None = None) -> None:
        sums, rest = x.new_empty((2, 5, 7))
        late = torch.empty((3, 4), dtype=torch.int32)
        noted(launcher, x, y, n, Descriptor(rest), sums, late)
        noted(launcher, COUNTERS(x.device), Descriptor(x[:, 2:]), more, 2.5, Descriptor(sums), rest[1:])

    return launch


@pytest.mark.parametrize("nested", [False, True])
def test_replayed_launches_give_what_the_plain_way_gives(nested: bool) -> None:
    given: Given = []
    kind = replays.Kind(launch_of(Launcher(given, nested)), {"n": 6})
    plain: Given = []
    for turn in range(5):
        x, y, more = torch.zeros(4, 8), torch.zeros(9), torch.zeros(3)
        given.clear()
        tensors = (x, y, more)
        if kind.replay is None:
            kind((x, y), {"more": more})
        else:
            assert kind.replay([t.data_ptr() for t in tensors])
        first, second = given
        start = x.data_ptr()
        assert first[:5] == second[:5] == (3, 2, 1, 77, 1234)
        assert first[9:12] == (x.data_ptr(), y.data_ptr(), 6) and second[10:13] == (PyCUtensorMap(start + 8), 4, 6)
        assert second[13:15] == (more.data_ptr(), 2.5)
        sums = first[15]
        assert second[-1] == sums + 4 * (35 + 7)
        assert first[12] == PyCUtensorMap(sums + 4 * 35) and second[15] == PyCUtensorMap(sums)
        assert first[13:15] == (5, 7) == second[16:18] and first[16] not in (sums, start)
        assert [len(values) for values in given] == [17, 19]
        plain.extend(given if not turn else ())
        assert (kind.replay is not None) == (turn > 0), "watched from the second launch on"
    assert [len(values) for values in plain] == [17, 19]


def test_an_address_that_comes_back_finds_its_descriptor() -> None:
    given: Given = []
    kind = replays.Kind(lambda x: noted(launcher, Descriptor(x)), {})
    launcher = Launcher(given)
    x, other = torch.zeros(8), torch.zeros(8)
    for _ in range(2):
        kind((x,))
    assert kind.replay is not None
    for tensor in (x, other, x, other):
        kind.replay([tensor.data_ptr()])
    maps = [values[9] for values in given[2:]]
    assert [one.address for one in maps] == [t.data_ptr() for t in (x, other, x, other)]
    assert maps[0] is maps[2] and maps[1] is maps[3]


def _scratch_of_triton(given: Given) -> Any:
    made = Launcher(given)
    made.global_scratch_size = 16  # type: ignore[misc]
    return made


def _python(given: Given) -> Any:
    made = Launcher(given)
    made.launch = lambda *values: given.append(values)
    return made


SOMEBODYS = torch.zeros(3)
REFUSED: dict[str, tuple[Callable[[Given], Any], Callable[[Any, Tensor], Any]]] = {
    "zeros": (Launcher, lambda launcher, x: noted(launcher, x, torch.zeros(3))),
    "computed": (Launcher, lambda launcher, x: noted(launcher, -x)),
    "written": (Launcher, lambda launcher, x: noted(launcher, x.zero_())),
    "copied": (Launcher, lambda launcher, x: noted(launcher, x.clone())),
    "read": (Launcher, lambda launcher, x: noted(launcher, x, int(x[0].item()))),
    "somebody's": (Launcher, lambda launcher, x: noted(launcher, x, SOMEBODYS)),
    "somebody's, by a descriptor": (Launcher, lambda launcher, x: noted(launcher, Descriptor(SOMEBODYS))),
    "an address": (Launcher, lambda launcher, x: noted(launcher, x, x.data_ptr() + 4)),
    "nothing": (Launcher, lambda launcher, x: None),
    "no memory": (Launcher, lambda launcher, x: noted(launcher, x[:0])),
    "Triton allocates": (_scratch_of_triton, lambda launcher, x: noted(launcher, x)),
    "another Triton": (_python, lambda launcher, x: noted(launcher, x)),
    "somebody listens": (Launcher, lambda launcher, x: noted(launcher, x, enter=lambda metadata: None)),
}


def test_what_has_no_elements_is_written_in_vain() -> None:
    given: Given = []
    launcher = Launcher(given)

    def launch(x: Tensor) -> None:
        x[:0].zero_()
        noted(launcher, x[1:])

    kind = replays.Kind(launch, {})
    for _ in range(2):
        kind((torch.zeros(8),))
    assert kind.replay is not None and kind.replay([160])
    assert given[-1][9:] == (164,)


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_known_is_launched_as_ever(what: str) -> None:
    given: Given = []
    make, launch = REFUSED[what]
    launcher = make(given)
    kind = replays.Kind(lambda x: launch(launcher, x), {})
    for _ in range(5):
        kind((torch.zeros(8),))
    assert kind.replay is None and len(given) == (0 if what == "nothing" else 5)
    assert launches.thread.watcher is None


def test_one_tensor_in_two_places_is_not_one_in_all() -> None:
    given: Given = []
    launcher = Launcher(given)
    kind = replays.Kind(lambda x, y, *, z: noted(launcher, x, y, z), {})
    x, y, z = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    for _ in range(2):
        kind((x, x), {"z": x})
    assert kind.replay is not None
    kind.replay([t.data_ptr() for t in (x, y, z)])
    assert given[-1][9:] == tuple(t.data_ptr() for t in (x, y, z))
    assert given[0][9:] == given[1][9:] == (x.data_ptr(),) * 3


def test_hooks_of_triton_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    given: Given = []
    launcher = Launcher(given)
    kind = replays.Kind(lambda x: noted(launcher, x), {})
    x = torch.zeros(8)
    for _ in range(2):
        kind((x,))
    assert kind.replay is not None and kind.replay([x.data_ptr()])
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", hook)
    assert not kind.replay([x.data_ptr()]) and len(given) == 3
    hook.calls.clear()
    assert kind.replay([x.data_ptr()])


def test_nothing_of_a_launch_is_kept() -> None:
    given: Given = []
    kind = replays.Kind(launch_of(Launcher(given)), {"n": 6})
    watched = []
    for _ in range(3):
        x, y = torch.zeros(4, 8), torch.zeros(9)
        watched += [weakref.ref(x), weakref.ref(y)]
        kind((x, y), {"more": None}) if kind.replay is None else kind.replay([x.data_ptr(), y.data_ptr()])
    del x, y
    gc.collect()
    assert kind.replay is not None and not any(watch() is not None for watch in watched)


@pytest.mark.parametrize("large", [False, True])
def test_scratch_memory_is_one_piece_where_it_is_small(large: bool) -> None:
    given: Given = []
    launcher = Launcher(given)
    size = replays._ONE_PIECE // (4 if large else 64)

    def launch(x: Tensor) -> None:
        a, b = x.new_empty(size), x.new_empty(size)
        noted(launcher, a, b)

    kind = replays.Kind(launch, {})
    x = torch.zeros(8)
    for _ in range(2):
        kind((x,))
    assert kind.replay is not None
    kind.replay([x.data_ptr()])
    a, b = given[-1][9:11]
    assert (b - a == size * 4) == (not large) and abs(b - a) >= size * 4
    assert a % 16 == b % 16 == 0


def test_whoever_listens_to_operators_hears_them_as_ever() -> None:
    class Listens(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    launcher = Launcher([])
    kind = replays.Kind(lambda x: noted(launcher, x), {})
    with Listens():  # type: ignore[no-untyped-call]
        for _ in range(3):
            kind((torch.zeros(8),))
    assert kind.replay is None


def test_another_threads_launch_is_not_watched() -> None:
    given: Given = []
    launcher = Launcher(given)

    def elsewhere(x: Tensor) -> None:
        noted(launcher, x + 1, 5)

    def launch(x: Tensor) -> None:
        other = threading.Thread(target=elsewhere, args=(x,))
        other.start()
        other.join()
        noted(launcher, x)

    kind = replays.Kind(launch, {})
    for _ in range(2):
        kind((torch.zeros(8),))
    assert kind.replay is not None
    given.clear()
    kind.replay([160])
    assert [values[9:] for values in given] == [(160,)]


# -- the calls above --


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
    for turn in range(6):
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
    assert [isinstance(values[3], int) for values in gpu] == [True] * 6


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
