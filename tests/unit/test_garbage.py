"""Python's garbage collector is put off for a first call's milliseconds, and is afterwards what it was."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Iterator

import pytest

from flashgen import garbage


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    was = gc.isenabled()
    yield
    (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("was_on", [True, False])
def test_it_is_put_off_and_then_what_it_was(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    with pytest.raises(ZeroDivisionError), garbage.put_off():
        assert not gc.isenabled()
        with garbage.put_off(), garbage.as_ever():
            assert gc.isenabled() == was_on
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled() == was_on


def test_the_last_of_several_threads_puts_it_back() -> None:
    gc.enable()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with garbage.put_off():
            entered.set()
            leave.wait(30.0)

    thread = threading.Thread(target=other)
    with garbage.put_off():
        thread.start()
        assert entered.wait(30.0)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_what_works_beside_changes_nothing() -> None:
    """A thread that compiles for seconds neither keeps the collector off nor turns it off again at its end."""
    gc.enable()
    seen: list[bool] = []

    def other() -> None:
        garbage.leave_alone()
        with garbage.put_off():
            seen.append(gc.isenabled())
        with garbage.as_ever():
            seen.append(gc.isenabled())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [True, True]
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_inside_collects() -> None:
    gc.enable()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with garbage.put_off():
            entered.set()
            leave.wait(30.0)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads
        child = os.fork()
    if child == 0:
        os._exit(0 if gc.isenabled() and garbage._inside == 0 else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_outside_nothing_is_changed() -> None:
    gc.disable()
    with garbage.as_ever():
        assert not gc.isenabled()
