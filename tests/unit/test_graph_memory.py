"""What captured graphs read is held while they live: a driver of no GPU stands for the real one, with its reference counts."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashgen import graph_memory


class Table:
    """A value that can be watched."""


class Driver:
    """The three calls, and graphs that die."""

    def __init__(self) -> None:
        self.graph, self.number, self.capturing = 100, 1, True
        self.made: dict[int, tuple[int, Any]] = {}  # user object -> its argument and destructor
        self.of_graph: dict[int, list[int]] = {}
        self.fails = ""

    def cuStreamGetCaptureInfo_v2(self, stream: Any, status: Any, number: Any, graph: Any, *rest: Any) -> int:
        assert stream.value == 7 and rest == (None, None)
        status._obj.value, number._obj.value, graph._obj.value = int(self.capturing), self.number, self.graph
        return int(self.fails == "info")

    def cuUserObjectCreate(self, made: Any, argument: Any, destroy: Any, count: int, flags: int) -> int:
        assert (count, flags) == (1, 1)  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        made._obj.value = 1000 + len(self.made)
        self.made[made._obj.value] = argument.value, destroy
        return int(self.fails == "create")

    def cuGraphRetainUserObject(self, graph: Any, made: Any, count: int, flags: int) -> int:
        assert (count, flags) == (1, 1)  # CU_GRAPH_USER_OBJECT_MOVE
        self.of_graph.setdefault(graph.value, []).append(made.value)
        return int(self.fails == "retain")

    def destroy(self, graph: int) -> None:
        for made in self.of_graph.pop(graph):
            argument, destructor = self.made[made]
            destructor(ctypes.c_void_p(argument))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(graph_memory, "_driver", lambda: made)
    monkeypatch.setattr(graph_memory, "_held", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    yield made


def test_a_value_lives_as_long_as_its_graph(driver: Driver) -> None:
    first, second = Table(), Table()
    watch = weakref.ref(first)
    assert graph_memory.held(first, "cuda:0") is first
    graph_memory.held(first, "cuda:0")
    assert len(graph_memory._held) == 1, "once for each graph"
    del first
    gc.collect()
    driver.graph, driver.number = 200, 2
    graph_memory.held(second, "cuda")
    assert watch() is not None and len(graph_memory._held) == 2
    driver.destroy(100)
    assert watch() is not None, "nothing happens on the driver's thread"
    driver.graph, driver.number = 300, 3
    graph_memory.held(second, "cuda")
    gc.collect()
    assert watch() is None and [one.value for one in graph_memory._held.values()] == [second, second]
    driver.destroy(300)
    graph_memory.sweep()
    assert [one.value for one in graph_memory._held.values()] == [second]


def test_a_graph_at_the_address_of_another_holds_for_itself(driver: Driver) -> None:
    """PyTorch destroys a captured graph once it is instantiated: the next one may have its handle, while the first still replays."""
    value = Table()
    graph_memory.held(value, "cuda")
    (first,) = driver.of_graph.pop(100)  # lives on in what was instantiated
    driver.number = 2
    graph_memory.held(value, "cuda")
    assert len(graph_memory._held) == 2
    argument, destructor = driver.made[first]
    destructor(ctypes.c_void_p(argument))
    graph_memory.sweep()
    assert [one.value for one in graph_memory._held.values()] == [value], "the second still reads it"


def test_outside_of_a_capture_and_on_a_cpu_nothing_is_held(driver: Driver) -> None:
    value = Table()
    assert graph_memory.held(value, "cpu") is value and graph_memory.held(None, "cuda") is None
    driver.capturing = False
    assert graph_memory.held(value, "cuda") is value and not graph_memory._held


@pytest.mark.parametrize("fails", ["info", "create", "retain", "none"])
def test_where_the_driver_cannot_say_it_is_held_for_good(
    driver: Driver, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails == "none":
        monkeypatch.setattr(graph_memory, "_driver", lambda: None)
    driver.fails = fails
    graph_memory.held(Table(), "cuda")
    for graph in list(driver.of_graph):
        driver.destroy(graph)
    graph_memory.sweep()
    assert len(graph_memory._held) == 1


def test_without_a_driver_there_is_none() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert graph_memory._driver() is None
