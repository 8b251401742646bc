"""Kernels compiled without the numbers of source lines: a quarter of the binary is left, and LLVM and ptxas have less to carry."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any


class _Thread(threading.local):
    """Whether this thread compiles without numbers of lines."""

    lineless: bool = False


_thread = _Thread()


class _Lineless:
    """Triton's knobs, as its compilers read them: this thread may do without the numbers of source lines. Machine code is the same."""

    def __init__(self, knobs: Any) -> None:
        self._knobs = knobs
        self.compilation = _Compilation(knobs.compilation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._knobs, name)


class _Compilation:
    def __init__(self, knobs: Any) -> None:
        self._knobs = knobs

    def __getattr__(self, name: str) -> Any:
        if (
            name == "disable_line_info" and _thread.lineless and name not in vars(self._knobs)
        ):  # there a program sets it
            return True
        return getattr(self._knobs, name)


@contextlib.contextmanager
def without_lines() -> Iterator[None]:
    """Compile without numbers of lines, unless the user's TRITON_DISABLE_LINE_INFO or Triton's knob of that name says what is wanted; the variable is a part of Triton's keys."""
    if "TRITON_DISABLE_LINE_INFO" in os.environ:
        yield
        return
    with contextlib.suppress(ImportError, AttributeError):
        from triton.backends.nvidia import compiler

        if not isinstance(compiler.knobs, _Lineless):
            compiler.knobs = _Lineless(compiler.knobs)
    _thread.lineless = True
    try:
        yield
    finally:
        _thread.lineless = False
