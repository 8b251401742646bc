"""Launches of one kind run what the first of them found, with their own arguments, and notice where they differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from flashgen import compiling, launches
from flashgen.build import load_module
from flashgen.launches import Kernels, launched

TEXT = '''"""Two kernels."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def store(x_ptr, n, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), n)


@triton.jit
def twice(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr, 2 * tl.load(x_ptr))


def launch(x, *, n, SIZE, again=True):
    store[(3,)](x, n, SIZE=SIZE, num_warps=2, enable_fp_fusion=True)
    if again:
        twice[(1, 2)](x, SIZE, enable_fp_fusion=True)
'''
X = torch.zeros(16, dtype=torch.int32)


class Kernel:
    """A compiled kernel that notes its launches."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, ran: list[Any]) -> None:
        self.name, self.ran = name, ran

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        self.ran.append((self.name, (x, y, z), arguments[6:]))

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.ran.append((self.name, grid, arguments))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any], list[str]]]:
    """The module; what ran: kernel, grid and arguments; and what Triton looked up."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver as drivers
    from triton.runtime.jit import JITFunction

    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=None,
    )
    ran: list[Any] = []
    looked_up: list[str] = []
    monkeypatch.setattr(drivers, "_active", active)
    monkeypatch.setattr(triton.compiler, "compile", lambda src, **_: Kernel(src.name, ran))
    real = JITFunction.run

    def run(self: Any, *arguments: Any, **more: Any) -> Any:
        looked_up.append(self.__name__)
        return real(self, *arguments, **more)

    path = tmp_path / "kernels.py"
    path.write_text(TEXT)
    module = load_module(path)
    with mock.patch.object(JITFunction, "run", run):
        yield module, ran, looked_up


def test_the_second_launch_looks_nothing_up_and_has_its_own_arguments(made: Any) -> None:
    module, ran, looked_up = made
    kernels = Kernels()
    for n in (5, 6, 7):
        launched(kernels, module.launch, X, n=n, SIZE=16)
    assert looked_up == ["store", "twice"]
    assert [(name, grid) for name, grid, _ in ran] == [("store", (3, 1, 1)), ("twice", (1, 2, 1))] * 3
    for n, (_, _, arguments) in zip((5, 6, 7), ran[::2], strict=True):
        assert arguments[0] is X and arguments[1:] == (n, 16), "constants too, in the kernel's order"
    assert launches.current() is None


def test_kinds_do_not_share_and_others_are_looked_up_as_ever(made: Any) -> None:
    module, ran, looked_up = made
    one, other = Kernels(), Kernels()
    launched(one, module.launch, X, n=1, SIZE=16)
    launched(other, module.launch, X, n=1, SIZE=8)
    launched(other, module.launch, X, n=1, SIZE=8)
    launched(one, module.launch, X, n=1, SIZE=16)
    assert [arguments[-1] for _, _, arguments in ran] == [16, 16, 8, 8, 8, 8, 16, 16]
    assert len(looked_up) == 4
    module.launch(X, n=1, SIZE=16)
    assert len(looked_up) == 6


def test_a_launch_that_differs_is_noticed_and_remembered_anew(made: Any) -> None:
    module, ran, looked_up = made
    kernels = Kernels()
    launched(kernels, module.launch, X, n=1, SIZE=16, again=False)
    launched(kernels, module.launch, X, n=1, SIZE=16)
    assert looked_up == ["store", "twice"] and len(ran) == 3
    launched(kernels, module.launch, X, n=1, SIZE=16)
    assert looked_up == ["store", "twice"] and len(ran) == 5


def test_a_launch_that_fails_is_not_remembered(made: Any) -> None:
    module, _, looked_up = made
    kernels = Kernels()
    with pytest.raises(KeyError):
        launched(kernels, lambda *_, **__: (module.launch(X, n=1, SIZE=16), {}["torn"]))  # type: ignore[func-returns-value]
    assert kernels.found is None and launches.current() is None
    launched(kernels, module.launch, X, n=1, SIZE=16)
    assert looked_up == ["store", "twice"] * 2


def test_other_threads_and_who_only_compiles_are_not_in_it(made: Any) -> None:
    module, ran, looked_up = made
    kernels = Kernels()

    def launch() -> None:
        module.launch(X, n=1, SIZE=16)
        other = threading.Thread(target=module.launch, args=(X,), kwargs={"n": 9, "SIZE": 16})
        other.start()
        other.join()

    for _ in range(2):
        launched(kernels, launch)
    assert len(looked_up) == 6 and len(ran) == 8
    with compiling.compiling_only():
        launched(kernels, module.launch, X, n=1, SIZE=16)
    assert len(ran) == 8
