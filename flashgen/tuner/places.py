"""Where units of work are done: one place a device, one problem a unit, so that one device decides one winner.

A place that is lost costs only its unit, which begins again elsewhere, at most twice. Rows go to one writer, whoever made them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from flashgen.compile_pool import CompilePool
from flashgen.problem import Problem
from flashgen.tuner import measured
from flashgen.tuner.compiled import NoCompiler
from flashgen.tuner.context import Context
from flashgen.tuner.worker import Device, DeviceLostError, MeasuringWorker

RETRIES = 2


class Place(Protocol):
    """A device with its worker, here or elsewhere."""

    name: str

    def run(self, context: Context) -> None:
        """Tune one problem.

        Raises:
            DeviceLostError: the device, or the process or host that holds it, is gone.
        """

    def revive(self) -> bool:
        """After a loss: whether it can go on."""

    def abort(self) -> None:
        """End what runs, from another thread: `run` then raises KeyboardInterrupt."""

    def close(self) -> None:
        """End its processes."""


class LocalPlace:
    """A device of this host, with a measuring process and compiling ones of its own.

    Args:
        device: where.
        workers: compiling processes; None for one per core.
        study: an Optuna storage, or None.
        worker: the device's measuring process where it was started already; None to make one.
    """

    def __init__(
        self, device: Device, *, workers: int | None = None, study: str | None = None, worker: MeasuringWorker | None = None
    ) -> None:  # fmt: skip
        self.name = device.visible or device.kind
        self._worker = worker or MeasuringWorker(device)
        self._compiler = CompilePool(workers)
        self._device, self._study = device, study

    def prepare(self) -> None:
        """Start the measuring process, and do not wait for it."""
        self._worker.spawn()

    def run(self, context: Context) -> None:
        compiler = NoCompiler() if self._device.kind == "cpu" else self._compiler
        measured.run(context, self._worker, compiler, study_storage=self._study)

    def revive(self) -> bool:
        return False  # its worker could not be started again: so it was lost

    def abort(self) -> None:
        self._worker.abort()
        self._compiler.close()

    def close(self) -> None:
        self._worker.close()
        self._compiler.close()


def spread(
    problems: Sequence[Problem],
    places: Sequence[Place],
    begin: Callable[[Problem], Context],
    *,
    stopped: Callable[[], bool],
) -> None:
    """Tune every problem, each at one place.

    Args:
        problems: the units.
        places: at least one; they are not closed.
        begin: makes a unit's context, at the time it begins: what earlier units taught is in it.
        stopped: asked before each unit; True leaves the rest undone.

    Raises:
        DeviceLostError: no place is left, or a unit was lost three times; the other units are done first.
        KeyboardInterrupt: Ctrl-C; what ran was ended.
    """
    if len(places) == 1:
        _Spread(problems, begin, stopped).work(places[0])
        return
    shared = _Spread(problems, begin, stopped)
    threads = [threading.Thread(target=shared.guarded, args=(place,), daemon=True) for place in places]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # in steps, so that Ctrl-C is heard
    except KeyboardInterrupt:
        shared.end()
        for place in places:
            place.abort()
        for thread in threads:
            thread.join(10.0)
        raise
    shared.settle()


class _Spread:
    """The units that are left, and what went wrong."""

    def __init__(
        self, problems: Sequence[Problem], begin: Callable[[Problem], Context], stopped: Callable[[], bool]
    ) -> None:
        self._todo: queue.Queue[tuple[Problem, int]] = queue.Queue()
        for problem in problems:
            self._todo.put((problem, 0))
        self._begin, self._stopped = begin, stopped
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._running = 0
        self._lost: list[str] = []
        self._error: BaseException | None = None

    def end(self) -> None:
        """Begin nothing more."""
        self._ended.set()

    def guarded(self, place: Place) -> None:
        """`work` in a thread: its error is kept for the caller."""
        try:
            self.work(place, wait=True)
        except KeyboardInterrupt:
            return
        except DeviceLostError:
            return  # kept in `_lost`; `settle` tells
        except BaseException as error:
            self._error = self._error or error
            self.end()

    def settle(self) -> None:
        """Raise what went wrong, once every thread has ended.

        Raises:
            DeviceLostError: units are left, or were given up.
        """
        if self._error is not None:
            raise self._error
        if self._lost and (not self._todo.empty() or any("given up" in text for text in self._lost)):
            raise DeviceLostError("; ".join(self._lost))

    def work(self, place: Place, *, wait: bool = False) -> None:
        """Do units until none is left.

        Raises:
            DeviceLostError: the place is lost for good.
        """
        given_up: list[str] = []
        while not self._ended.is_set() and not self._stopped():
            unit = self._next()
            if unit is None:
                # Another place may lose its unit yet: it must not be left undone because this one went home.
                if wait and self._running:
                    self._ended.wait(0.1)
                    continue
                break
            problem, losses = unit
            try:
                with self._lock:
                    context = self._begin(problem)
                place.run(context)
            except DeviceLostError as error:
                context.result.message = context.result.message or str(error)
                if losses < RETRIES:
                    self._todo.put((problem, losses + 1))
                    self._note(f"{place.name} was lost with {problem}: {error}")
                else:
                    given_up.append(
                        f"{problem} was given up after {losses + 1} losses, the last on {place.name}: {error}"
                    )
                    self._note(given_up[-1])
                if not place.revive():
                    raise
            finally:
                with self._lock:
                    self._running -= 1
        if given_up and not wait:
            raise DeviceLostError("; ".join(given_up))

    def _next(self) -> tuple[Problem, int] | None:
        with self._lock:
            try:
                unit = self._todo.get_nowait()
            except queue.Empty:
                return None
            self._running += 1
            return unit

    def _note(self, text: str) -> None:
        with self._lock:
            self._lost.append(text)
