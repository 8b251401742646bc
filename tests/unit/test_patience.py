"""Limits of time count what a process could do in it."""

import os
import time

import pytest

from flashgen import patience


def silent_pipe() -> int:
    read, _write = os.pipe()
    return read


@pytest.mark.parametrize(("load", "share"), [(0.0, 1.0), (1.0, 1.0), (6.0, 3.0), (900.0, 10.0)])
def test_a_busy_machine_stretches_a_limit(load: float, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert patience.share() == share
    began = time.monotonic()
    assert not patience.readable(silent_pipe(), 0.05)
    assert time.monotonic() - began >= 0.05 * share


def test_a_system_that_says_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert patience.share() == 1.0


def test_an_answer_and_a_stop_end_the_wait() -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    assert patience.readable(read, 60.0)
    began = time.monotonic()
    assert not patience.readable(silent_pipe(), 60.0, lambda: True)
    assert time.monotonic() - began < 30.0
