"""Threads that compile are waited for at the end of a process, whatever thread begins them."""

from __future__ import annotations

import _thread
import importlib
import sys
import threading
from unittest import mock

import pytest
import torch

from flashgen import compiling, stand_ins


@pytest.mark.parametrize("what", ["kernels of a launch", "beside a call"])
def test_no_thread_that_compiles_is_a_daemon(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("triton.runtime.driver")
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "driver", mock.MagicMock())
    seen: list[bool] = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: seen.append(self.daemon))
    done = threading.Event()

    def begin() -> None:
        # A thread that Python did not start, as PyTorch's autograd threads are, counts as a daemon, and what it begins would, too: killed
        # amid LLVM at the end of the process, which takes the process with it.
        assert threading.current_thread().daemon
        if what == "beside a call":
            stand_ins.compile_beside(lambda x: None, "test", torch.zeros(1)).start()
        else:
            compiling._Compiling().begin(None, (), (1,), {})
        done.set()

    _thread.start_new_thread(begin, ())
    assert done.wait(10.0)
    assert seen == [False]
