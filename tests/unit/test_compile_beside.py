"""The backward's kernels are compiled while the forward's is: by another thread, once, and what a launch asks for."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import flashgen
from flashgen import Target, dispatch, execution, warm

H100 = Target.named("h100")
SECONDS = 0.3  # that compiling one kernel takes here


class Compiler:
    """Stands for `triton.compile`: notes what is compiled, by whom and when."""

    def __init__(self) -> None:
        self.done: list[tuple[str, bool, float, float]] = []
        self.launched: list[str] = []
        self.sources: list[Any] = []  # as Triton's compiled kernels keep theirs
        # The main thread's kernels take until another thread compiles, at most so long.
        self.elsewhere, self.patience = threading.Event(), SECONDS

    def __call__(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        start = time.perf_counter()
        self.sources.append(src)
        src.make_ir()
        mine = threading.current_thread() is threading.main_thread()
        if mine:
            self.elsewhere.wait(self.patience)
        else:
            self.elsewhere.set()
            time.sleep(SECONDS)
        self.done.append((src.name, mine, start, time.perf_counter()))
        return SimpleNamespace(
            launch_metadata=lambda *_: None,
            function=0,
            packed_metadata=(),
            run=lambda *_: self.launched.append(src.name),
        )

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.done]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    yield compiling(monkeypatch, tmp_path)
    for thread in threading.enumerate():
        if thread.name == "flashgen-backward":
            thread.join(30.0)
    execution._beside.clear()
    dispatch.forget()


def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """CPU tensors count as on an h100, and kernels are compiled by what takes its time and gives nothing."""
    import triton.compiler
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.driver import driver as drivers

    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=None,
    )
    made = Compiler()
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(drivers, "_active", active)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setattr(triton.compiler, "compile", made)
    monkeypatch.setattr(ASTSource, "make_ir", lambda *_: None)
    monkeypatch.setattr(Target, "detect", classmethod(lambda cls, device=None: H100))
    monkeypatch.setattr("flashgen.build._built", {})
    dispatch.forget()
    return made


def drawn(grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (torch.randn(1, 64, heads, 64, dtype=torch.float16) for heads in (4, 2))
    return q.requires_grad_(grad), k.requires_grad_(grad)


BACKWARD = ["attention_bwd_preprocess", "attention_bwd_dkdv", "attention_bwd_dq"]


def attend(q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    out = flashgen.attention(q, k, k, backend="triton", **options)
    return out[0] if isinstance(out, tuple) else out


def test_the_backward_is_compiled_beside_the_forward_and_then_launched(compiler: Compiler) -> None:
    table = torch.randn(4)
    compiler.patience = 60.0  # on a machine that others use a text is not rendered in SECONDS
    out = attend(*drawn(), score_mod=lambda s, b, h, i, j: s + table[h], mask_mod=lambda b, h, i, j: i - j < 9)
    forward = next(row for row in compiler.done if row[0] == "attention_fwd")
    assert forward[1] and compiler.launched == ["attention_fwd"]
    out.sum().backward()
    others = [row for row in compiler.done if row[0] != "attention_fwd"]
    assert sorted(name for name, *_ in others) == sorted(BACKWARD), "each once"
    assert not any(mine for _, mine, _, _ in others), "the main thread compiled none of them"
    assert others[0][2] < forward[3], "beside the forward, not after it"
    assert sorted(compiler.launched) == sorted(["attention_fwd", *BACKWARD])


class Mark:
    """Lives as long as the node that has it."""


MARKS: list[weakref.ref[Mark]] = []


class Marked(torch.autograd.Function):
    """A node of autograd's graph that can be watched."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark = Mark()
        MARKS.append(weakref.ref(ctx.mark))
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


def test_while_it_is_compiled_no_graph_of_autograd_lives_on(compiler: Compiler) -> None:
    q, k = drawn()
    out = attend(Marked.apply(q), k)  # type: ignore[no-untyped-call]
    (thread,) = execution._beside.values()
    assert MARKS[-1]() is not None and thread.is_alive()
    with gc_off():
        del out
        assert MARKS[-1]() is None and thread.is_alive()


def test_what_is_compiled_keeps_nothing_of_the_call(compiler: Compiler) -> None:
    """An autograd graph that lived on kept its leaves' accumulators, which remember a stream: a captured backward then failed."""
    q, k = drawn()
    out = attend(q, k)
    torch.autograd.grad(out.sum(), [q, k])
    watch = weakref.ref(out)
    with gc_off():
        del out
        assert watch() is None, "by its count of references: PyTorch collects no cycles before a capture"
    assert len(compiler.sources) == 1 + len(BACKWARD)


@contextmanager
def gc_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_warm_call_waits_for_what_is_being_compiled(compiler: Compiler) -> None:
    q, k = drawn()
    outs = [attend(q, k) for _ in range(2)]
    assert "RecordedCall" in type(outs[1].grad_fn).__name__
    outs[1].sum().backward()
    assert sorted(compiler.names) == sorted(["attention_fwd", *BACKWARD]), "each once"
    assert not execution._beside


def test_who_wants_no_gradient_starts_nothing(compiler: Compiler) -> None:
    q, k = drawn()
    with torch.no_grad():
        attend(q, k)
    attend(*drawn(grad=False))
    assert compiler.names == ["attention_fwd"] and not execution._beside


def test_a_forward_that_is_compiled_already_starts_nothing(compiler: Compiler) -> None:
    q, k = drawn()
    with torch.no_grad():
        attend(q, k, return_lse=True)
    warm.forget()
    attend(q, k, return_lse=True)
    assert compiler.names == ["attention_fwd"] and not execution._beside


def test_a_bias_that_wants_a_gradient_waits_for_its_turn(compiler: Compiler) -> None:
    attend(*drawn(), bias=torch.randn(64, 64, requires_grad=True))
    assert compiler.names == ["attention_fwd"] and not execution._beside


def test_a_backward_that_cannot_be_compiled_says_so_where_it_is_asked_for(compiler: Compiler) -> None:
    with mock.patch.object(execution, "gradients", side_effect=MemoryError("no room")):
        out = attend(*drawn())
        (thread,) = execution._beside.values()
        thread.join()
        with pytest.raises(MemoryError, match="no room"):
            out.sum().backward()
    assert compiler.names == ["attention_fwd"]


SHORT = """
import sys
from pathlib import Path
import pytest
import test_compile_beside as t
t.SECONDS = 1.0
made = t.compiling(pytest.MonkeyPatch(), Path(sys.argv[1]))
t.attend(*t.drawn())
assert any(x.name == "flashgen-backward" for x in t.threading.enumerate()), made.names
print("the end", flush=True)
"""


def test_a_process_that_ends_meanwhile_ends_well(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SHORT, str(tmp_path)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(flashgen.__file__).parents[1])])
    done = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": f"{paths}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr
