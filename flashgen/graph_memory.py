"""What a captured CUDA graph reads at every replay, held for as long as the graph, or what was instantiated of it, lives.

A graph takes a reference to a *user object* (CUDA's own means for this), whose destructor the driver calls when the last graph is gone: on a
thread of its own, where neither Python nor CUDA may be called, even after the interpreter has ended. So the destructor is libc's
`sem_post`, and a semaphore that was posted tells the next capture to let go.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

_T = TypeVar("_T")

_SEM_BYTES = 64  # of a sem_t: 32 on Linux
_NO_DESTRUCTOR_SYNC = _MOVE = 1


class _Held(NamedTuple):
    value: Any
    semaphore: int  # its address; 0: held for good


_held: dict[
    tuple[int, int], _Held
] = {}  # by the value and the capture; a graph's handle may be another's, once it is gone
_lock = threading.Lock()


def held(value: _T, device: str) -> _T:
    """A value whose memory a graph under capture will read at every replay: it is kept while the graph lives, whatever is forgotten."""
    if value is None or not device.startswith("cuda") or not torch.cuda.is_current_stream_capturing():
        return value
    with _lock:
        sweep()
        graph, number = _capture(int(torch.cuda.current_stream(torch.device(device)).cuda_stream))
        if (id(value), number) not in _held:
            _held[id(value), number] = _Held(value, _retained(graph) if graph else 0)
    return value


def sweep() -> None:
    """Let go of what graphs read that are gone."""
    for key, one in list(_held.items()):
        if one.semaphore and _posted(one.semaphore):
            del _held[key]
            _libc().free(ctypes.c_void_p(one.semaphore))


# -- the driver --


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    return libc


@cache
def _driver() -> Any:
    """libcuda, or None where it lacks what this needs."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        _ = library.cuStreamGetCaptureInfo_v2, library.cuUserObjectCreate, library.cuGraphRetainUserObject
        _ = _libc().sem_post, _libc().sem_init
    except (OSError, AttributeError):
        return None
    return library


def _capture(stream: int) -> tuple[int, int]:
    """The graph that a stream is captured into, and the number of the capture, which no other has; zeros where they cannot be known."""
    driver = _driver()
    if driver is None:
        return 0, 0
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    places = (ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), None, None)
    failed = driver.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), *places)
    return (0, 0) if failed or status.value != 1 else (graph.value or 0, number.value)


def _retained(graph: int) -> int:
    """The address of a semaphore that is posted once a graph and all that was instantiated of it are gone; 0 if that failed."""
    driver, libc = _driver(), _libc()
    semaphore = libc.malloc(_SEM_BYTES)  # never Python's: it may be posted after the interpreter has ended
    if not semaphore or libc.sem_init(ctypes.c_void_p(semaphore), 0, 0):
        return 0
    made = ctypes.c_void_p()
    post: Callable[..., Any] = libc.sem_post
    created = driver.cuUserObjectCreate(ctypes.byref(made), ctypes.c_void_p(semaphore), post, 1, _NO_DESTRUCTOR_SYNC)
    if created or driver.cuGraphRetainUserObject(ctypes.c_void_p(graph), made, 1, _MOVE):
        return 0
    return int(semaphore)


def _posted(semaphore: int) -> bool:
    count = ctypes.c_int()
    return not _libc().sem_getvalue(ctypes.c_void_p(semaphore), ctypes.byref(count)) and count.value > 0
