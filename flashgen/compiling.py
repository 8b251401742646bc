"""What a thread does where a launch's kernel has to be compiled: compile alone, refuse, or begin other work beside it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flashgen import garbage


class _Thread(threading.local):
    """What this thread is about.

    Attributes:
        beside: work to begin beside its next compilation.
        compiling: the threads in which its launches' kernels are compiled; None where they run.
        refuses: whether it would rather not compile.
    """

    beside: Callable[[], None] | None = None
    compiling: _Compiling | None = None
    refuses: bool = False


class NotCompiledError(Exception):
    """A kernel is in no cache, and who launched it refuses to wait for it."""


thread = _Thread()


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Call `work` once if a kernel has to be compiled inside, on this thread, as soon as its Python has been read.

    What follows the reading, nine tenths of the time, leaves the interpreter to other threads: `work` is to start one.
    """
    thread.beside = work
    try:
        yield
    finally:
        thread.beside = None


def begin_beside() -> None:
    """Begin now what `beside` was given, if nothing was compiled."""
    work, thread.beside = thread.beside, None
    if work is not None:
        work()


def after_reading(src: Any, work: Callable[[], None]) -> None:
    """Call `work` once a kernel's Python has been read.

    Args:
        src: Triton's source of the kernel.
        work: is let go with it.
    """

    def make_ir(*arguments: Any, **more: Any) -> Any:
        # A compiled kernel keeps its source, which must not keep the work: the call's tensors, and through the output its autograd graph.
        # Leaves of a graph that lives on remember the stream of that call, and a captured backward would have to wait for it.
        del src.make_ir
        made = src.make_ir(*arguments, **more)
        work()
        return made

    src.make_ir = make_ir


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Launches of rendered files' kernels, on this thread, compile and run nothing: all kernels of a launch at a time.

    Raises:
        Exception: what the first of them that does not compile raised, at the end of the block.
    """
    thread.compiling = kernels = _Compiling()
    try:
        yield
    finally:
        thread.compiling = None
        for one in kernels.threads:
            one.join()
    for error in kernels.errors:
        raise error


class _Compiling:
    """Kernels that are being compiled, each in a thread of its own: nine tenths of the time leave the interpreter to others."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.errors: list[Exception] = []

    def begin(self, function: Any, arguments: tuple[Any, ...], grid: Any, more: dict[str, Any]) -> None:
        """Begin one, for the device that is this thread's now."""
        from triton.runtime.driver import driver

        device = driver.active.get_current_device()

        def compile() -> None:
            garbage.leave_alone()
            try:
                if driver.active.get_current_device() != device:
                    driver.active.set_current_device(device)
                type(function).run(function, *arguments, grid=grid, warmup=True, **more)
            except Exception as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=compile, name="flashgen-kernel", daemon=False))
        self.threads[-1].start()


@contextlib.contextmanager
def refusing(wanted: bool = True) -> Iterator[None]:
    """Launches of rendered files' kernels, on this thread, compile nothing.

    Args:
        wanted: whether they are to.

    Raises:
        NotCompiledError: by the launch whose kernel is in no cache.
    """
    thread.refuses = wanted
    try:
        yield
    finally:
        thread.refuses = False
