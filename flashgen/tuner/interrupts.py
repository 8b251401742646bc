"""Ctrl-C during a run: the first ends it and keeps what is done, the second ends the process at once.

A row that is being stored is stored first. Nothing is corrupt after the second either: the database's transactions are atomic, and
worker processes end when the pipe to this one does.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_holding = 0  # sections of the main thread that may not be interrupted half-way
_waiting = False  # whether Ctrl-C came meanwhile


@contextmanager
def two_stage() -> Iterator[None]:
    """Handle Ctrl-C in two stages; in threads other than the main one, which hear no signals, it does nothing."""
    global _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        global _waiting
        count += 1
        if count > 1:
            os.write(2, b"\ninterrupted twice: ended at once; what was stored stays\n")
            os._exit(130)
        os.write(2, b"\ninterrupted: what is measured is kept; Ctrl-C again ends at once\n")
        if _holding:
            _waiting = True
            return
        raise KeyboardInterrupt

    _waiting = False
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held() -> Iterator[None]:
    """A section that Ctrl-C does not cut: the first is raised at its end."""
    global _holding, _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
        if _waiting and not _holding:
            _waiting = False
            raise KeyboardInterrupt
