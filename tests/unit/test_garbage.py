"""Python's garbage collector is put off for a first call's milliseconds, and is afterwards what it was."""

from __future__ import annotations

import gc
import threading
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


def test_outside_nothing_is_changed() -> None:
    gc.disable()
    with garbage.as_ever():
        assert not gc.isenabled()
