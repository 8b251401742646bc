"""Under capture nothing that CUDA refuses reaches it: a driver of no GPU notes each thread's mode, and streams that are captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashgen import Target, block_ranges, compiling, dispatch, execution, jit, mods, stream_capture
from flashgen.mask_words import Tables
from flashgen.mods import programs
from flashgen.operands import Operands
from flashgen.scalars import Scalars
from flashgen.stream_capture import apart, free_stream, relaxed

GLOBAL, RELAXED = 0, 2
CUDA = torch.device("cuda:0")


class Stream:
    """One that is captured or not, with what was asked of it."""

    def __init__(self, name: str, captured: bool = False) -> None:
        self.name, self.captured, self.asked = name, captured, []  # type: ignore[var-annotated]

    def synchronize(self) -> None:
        assert not self.captured, "cudaErrorStreamCaptureUnsupported"
        self.asked.append("synchronize")

    def wait_stream(self, other: Stream) -> None:
        assert not other.captured, "this stream would join the capture"
        self.asked.append(f"wait for {other.name}")


class Driver:
    """The mode of each thread, and the current stream of the one thread that captures."""

    def __init__(self, captured: bool = True) -> None:
        self.modes: dict[int, int] = {}
        self.current = Stream("captured" if captured else "ordinary", captured)
        self.handed_out: list[Stream] = []
        self.fails = 0

    @property
    def mode(self) -> int:
        return self.modes.get(threading.get_ident(), GLOBAL)

    def cuThreadExchangeStreamCaptureMode(self, place: Any) -> int:
        if self.fails:
            return self.fails
        before = self.mode
        self.modes[threading.get_ident()] = place._obj.value
        place._obj.value = before
        return 0

    def unsafe(self) -> None:
        """What CUDA refuses while anybody captures in global mode."""
        assert self.mode == RELAXED, "cudaErrorStreamCaptureUnsafe"

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()

    def new(device: Any) -> Stream:
        # PyTorch's pool comes round: the first that it hands out is the captured one itself.
        made.handed_out.append(made.current if not made.handed_out else Stream(f"stream {len(made.handed_out)}"))
        return made.handed_out[-1]

    monkeypatch.setattr(stream_capture, "_driver", lambda: made)
    monkeypatch.setattr(stream_capture, "_apart", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.current.captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    monkeypatch.setattr(torch.cuda, "Stream", new)
    return made


def test_relaxed_is_for_this_thread_and_a_while(driver: Driver) -> None:
    seen: list[int] = []
    with relaxed():
        assert driver.mode == RELAXED
        other = threading.Thread(target=lambda: seen.append(driver.mode))
        other.start()
        other.join()
        with relaxed():
            assert driver.mode == RELAXED
        assert driver.mode == RELAXED
    assert driver.mode == GLOBAL and seen == [GLOBAL]
    with pytest.raises(KeyError), relaxed():
        raise KeyError
    assert driver.mode == GLOBAL


@pytest.mark.parametrize("kind", ["none", "refuses"])
def test_where_the_driver_cannot_it_goes_on(driver: Driver, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.fails = 3
    if kind == "none":
        monkeypatch.setattr(stream_capture, "_driver", lambda: None)
    with relaxed():
        assert driver.mode == GLOBAL
    assert driver.mode == GLOBAL


def test_apart_is_another_stream_that_is_waited_for(driver: Driver) -> None:
    captured = driver.current
    with apart(CUDA):
        driver.unsafe()
        own = driver.current
        assert own is not captured and not own.captured and own.asked == []
    assert driver.current is captured and driver.mode == GLOBAL
    assert own.asked == ["synchronize"] and captured.asked == []
    assert id(free_stream(CUDA)) == id(own), "memory of one stream alone"
    assert isinstance(own, Stream)
    own.captured = True  # handed out to somebody who captures it
    assert id(free_stream(CUDA)) != id(own)


def test_apart_is_nothing_where_nobody_captures(driver: Driver) -> None:
    driver.current.captured = False
    with apart(CUDA):
        assert driver.current.name == "captured" and driver.mode == GLOBAL
    with apart(torch.device("cpu")):
        assert driver.mode == GLOBAL
    assert not driver.handed_out


# -- who needs it --


class Kernel:
    """A compiled kernel of Triton."""

    def __init__(self, driver: Driver) -> None:
        self.module, self.driver, self.loads = None, driver, 0

    def _init_handles(self) -> None:
        if self.module is None:
            self.driver.unsafe()
            self.module, self.loads = object(), self.loads + 1  # type: ignore[assignment]


def test_a_module_is_loaded_in_relaxed_mode_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(driver)
    monkeypatch.setattr(jit, "_launcher_beside", lambda src: None)
    src = SimpleNamespace(signature={}, make_ir=lambda *_: None)
    assert jit._Compile(lambda *_, **__: kernel)(src) is kernel
    kernel._init_handles()
    kernel._init_handles()
    assert kernel.loads == 1 and driver.mode == GLOBAL


def test_ranges_of_a_mask_are_made_apart(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = mods.program(None, {"mask_mod": lambda b, h, i, j: i - j < 7301}, torch.device("cpu"))
    made_on: list[str] = []

    def analysed(*_: Any) -> Any:
        driver.unsafe()
        made_on.append(driver.current.name)
        return Tables(torch.zeros(1, 1, 4, 4, dtype=torch.int32), None, False)

    def settled(device: torch.device) -> int:
        driver.unsafe()
        driver.current.synchronize()
        return 5

    monkeypatch.setattr(block_ranges, "_analysed", analysed)
    monkeypatch.setattr(block_ranges, "_settled", settled)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: x)
    for _ in range(2):
        found, stream = block_ranges._of_code(block_ranges._ByDigest(program), (1, 1, 4, 4, 1, 1), "cuda:0", 0)
        assert found.table.shape == (1, 1, 4, 4) and stream == 5
    assert made_on == ["stream 1"] and driver.mode == GLOBAL


def test_a_number_of_the_cpu_is_moved_apart(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        driver.unsafe()
        return x

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(programs, "_numbers", type(programs._numbers)())
    assert programs._moved(torch.tensor(2.5), CUDA).item() == 2.5
    assert driver.handed_out[-1].asked == ["synchronize", "synchronize"]


def test_no_backward_is_compiled_beside_a_capture(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.forget()
    monkeypatch.setattr(Target, "detect", classmethod(lambda cls, device=None: Target.named("h100")))
    q, k = (torch.zeros(1, 64, 2, 64, dtype=torch.float16) for _ in range(2))
    scalars, operands = Scalars(training=True), Operands()
    plan = dispatch.resolve(execution.checked(q, k, k, operands, scalars))
    assert plan.backward is not None and plan.backward.backend != "torch"
    monkeypatch.setattr(compiling, "beside", lambda work: work)
    start: Any = execution._backward_beside(plan, q, k, k, q, q, operands, scalars)
    monkeypatch.setattr(execution, "capturing", lambda device: True)
    start()
    assert not execution._beside
    dispatch.forget()
