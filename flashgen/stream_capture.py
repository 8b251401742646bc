"""CUDA graphs under capture: work that no graph may hold runs apart, and what CUDA refuses meanwhile is allowed for a moment.

While a stream is captured in CUDA's default mode (`torch.cuda.graph`'s, too), a call of *any* thread that might synchronise ends the
capture with an error: loading a module, copying from the host's ordinary memory, waiting for a stream. In the relaxed mode, which each
thread takes for itself (PyTorch's allocator and NCCL do), they are allowed; that they touch no captured stream is this module's care.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only compiles has no need of it
    import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_STREAMS = 33  # PyTorch hands out 32 of a device in turns: one more than there are

_apart: dict[torch.device, torch.cuda.Stream] = {}


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is captured into a graph."""
    if device.type != "cuda":
        return False
    import torch

    return torch.cuda.is_current_stream_capturing()


@contextmanager
def relaxed() -> Iterator[None]:
    """What this thread does inside ends nobody's capture."""
    driver = _driver()
    mode = ctypes.c_int(_RELAXED)  # the call puts the mode before it there
    failed = driver is None or driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        if not failed:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Under capture, run what is inside now instead of recording it, on another stream, and wait for it; else as always.

    It may read nothing that captured work writes: that has not run.
    """
    if not capturing(device):
        yield
        return
    import torch

    with relaxed():
        stream = free_stream(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def free_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody captures, the same one where that is possible: memory that was freed on one is taken again on it alone."""
    import torch

    stream = _apart.get(device)
    for _ in range(_STREAMS):
        if stream is not None and not _is_captured(stream):
            break
        stream = torch.cuda.Stream(device)
    assert stream is not None
    _apart[device] = stream
    return stream


def _is_captured(stream: torch.cuda.Stream) -> bool:
    import torch

    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


@cache
def _driver() -> Any:
    """libcuda, or None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        _ = library.cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return library
