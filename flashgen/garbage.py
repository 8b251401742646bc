"""Python's cyclic garbage collector, put off while a first call makes tens of thousands of objects, nearly all of which stay.

They make it walk over all objects of the process: on an H200's host that took 109 of the 152 ms of a first call with gradients whose kernels were cached.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0  # blocks that put it off, of all threads
_was_on = False


class _Thread(threading.local):
    """Whether this thread works beside calls, for seconds: the collector is none of its business."""

    beside: bool = False


_thread = _Thread()


def leave_alone() -> None:
    """From now on nothing here changes anything on this thread."""
    _thread.beside = True


def _after_fork() -> None:
    """In a child, whose parent's other threads may have been inside: none of them is here to end it."""
    global _lock, _inside
    _lock = threading.Lock()
    if _inside > 0 and _was_on:
        gc.enable()
    _inside = 0


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Nothing is collected inside, by any thread; what is garbage by then is collected afterwards. For milliseconds alone."""
    global _inside, _was_on
    if _thread.beside:
        yield
        return
    with _lock:
        if _inside == 0:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _was_on:
                gc.enable()


@contextlib.contextmanager
def as_ever() -> Iterator[None]:
    """Inside of `put_off`, what takes longer: it is collected again."""
    if _thread.beside:
        yield
        return
    with _lock:
        resumed = _inside > 0 and _was_on and not gc.isenabled()
        if resumed:
            gc.enable()
    try:
        yield
    finally:
        with _lock:
            if resumed and _inside > 0:
                gc.disable()
