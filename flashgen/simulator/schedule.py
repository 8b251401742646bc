"""Seeded cooperative schedules: who runs next, and when asynchronous work completes.

Every partition is a thread, but exactly one runs at a time and hands the baton on at its scheduling points, so a run is
reproducible from its seed. TMA loads, TMA stores and products are events that a policy completes when it likes.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from flashgen.simulator.context import fail
from flashgen.simulator.errors import DeadlockError, LivelockError, SimulationError
from flashgen.simulator.sites import Mark

if TYPE_CHECKING:
    from flashgen.simulator.machine import Partition

Schedule = Literal["eager", "lazy", "random", "priority"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
_TRIES, _TRY_SECONDS = 20, 0.5  # to end a strand that a timeout has left running
_POLLS = 1000  # of one element by each who can go on, after which it counts as endless: a loop that gives up would have done so
_PATIENCE = 256  # scheduling points a partition may keep the baton under eager and lazy: it may be spinning


class Stop(BaseException):
    """Ends the threads of a launch that has failed; never seen outside."""


class Event:
    """An asynchronous operation in flight.

    Attributes:
        engine: "load", "store" or "wgmma".
        owner: the partition that issued it.
        run: performs it.
        describe: for reports.
        number: of a store, counted by its partition from 1.
    """

    __slots__ = ("describe", "engine", "number", "owner", "run")

    def __init__(
        self,
        engine: str,
        owner: Partition,
        run: Callable[[], None],
        describe: Callable[[], str] = lambda: "",
        number: int = 0,
    ) -> None:
        self.engine, self.owner, self.run, self.describe, self.number = engine, owner, run, describe, number


class Task:
    """One strand of execution.

    Attributes:
        ready: whether it can go on; None while it is not blocked.
        blocked: what it waits for, in words, and at which line.
        thread: what runs it.
        yields: whether it stands at an atomic: it may be spinning, and the order of CTAs matters most there.
    """

    def __init__(self, name: str, body: Callable[[], None], partition: Partition | None) -> None:
        self.name, self.body, self.partition = name, body, partition
        self.baton = threading.Lock()
        self.baton.acquire()
        self.ready: Callable[[], bool] | None = None
        self.blocked: Callable[[], tuple[str, Mark]] | None = None
        self.yields = False
        self.thread: threading.Thread | None = None


Choice = Task | Event
Place = tuple[int, int]  # the storage and the element of it that somebody polls
Policy = Callable[["Scheduler", list[Task], list[Event]], Choice]


def _stay(state: Scheduler, tasks: list[Task]) -> Task:
    """The task that runs, unless it stands at an atomic, where CTAs take turns, or has kept the baton for too long."""
    current = state.current
    if current is None or current not in tasks:
        state.streak = 0
        return tasks[0]
    state.streak += 1
    if state.streak < _PATIENCE and not current.yields:
        return current
    state.streak = 0
    return tasks[(tasks.index(current) + 1) % len(tasks)]


def _eager(state: Scheduler, tasks: list[Task], events: list[Event]) -> Choice:
    """Asynchronous work completes at once; CTAs run as far as they can, one after the other."""
    return events[0] if events else _stay(state, tasks)


def _lazy(state: Scheduler, tasks: list[Task], events: list[Event]) -> Choice:
    """Asynchronous work completes only when nobody can run, or all who can keep spinning; the latest first."""
    if tasks and not (events and state.spins > 2 * len(tasks)):
        chosen = _stay(state, tasks)
        state.spins = state.spins + 1 if chosen.yields else 0
        return chosen
    state.spins = 0
    return events[-1]


def _random(state: Scheduler, tasks: list[Task], events: list[Event]) -> Choice:
    """Any of what can go on; the running task somewhat more often."""
    if state.current in tasks and state.rng.random() < 0.4:
        return state.current  # type: ignore[return-value]
    choices: list[Choice] = [*tasks, *events]
    return state.rng.choice(choices)


def _priority(state: Scheduler, tasks: list[Task], events: list[Event]) -> Choice:
    """Random priorities of partitions and engines, drawn anew now and then (PCT, Burckhardt et al. 2010)."""
    if state.rng.random() < 0.02:
        state.priorities.clear()

    def priority(choice: Choice) -> float:
        key = choice.name if isinstance(choice, Task) else choice.engine
        return state.priorities.setdefault(key, state.rng.random())

    choices: list[Choice] = [*tasks, *events]
    return max(choices, key=priority)


_POLICIES: dict[str, Policy] = {"eager": _eager, "lazy": _lazy, "random": _random, "priority": _priority}


class Scheduler:
    """Passes one baton between the tasks of a launch.

    Args:
        schedule: name of the policy.
        seed: of its choices.
        max_steps: scheduling points until the launch counts as endless.
    """

    def __init__(self, schedule: Schedule, seed: int, max_steps: int) -> None:
        self.policy, self.rng, self.max_steps = _POLICIES[schedule], random.Random(seed), max_steps
        self.priorities: dict[str, float] = {}
        self.tasks: list[Task] = []
        self.events: list[Event] = []  # TMA; products wait in their partition's own queue, since they complete in order
        self.partitions: list[Partition] = []
        self.current: Task | None = None
        self.error: BaseException | None = None
        self.steps = self.switches = self.streak = self.spins = 0
        self.polls: dict[Task, tuple[Place, int]] = {}  # what each reads again and again, since anything last changed
        self.done = threading.Event()

    def spawn(self, name: str, body: Callable[[], None], partition: Partition | None = None) -> Task:
        """Add a task; it runs once the policy chooses it."""
        task = Task(name, body, partition)
        self.tasks.append(task)
        self.changed()
        task.thread = threading.Thread(target=self._main, args=(task,), name=f"simulated {name}", daemon=True)
        task.thread.start()
        return task

    def run(self, timeout_s: float) -> None:
        """Run all tasks to their end; raises what the first failing one raised.

        What is slow is not endless: on a machine that others use the same launch takes thirty times as long. So seconds count from one scheduling
        point to the next, and `max_steps` bounds how many there are.
        """
        self._pass(self.tasks[0] if self.tasks else None)
        seen = (0, 1)
        while not self.done.wait(timeout_s):
            reached = (self.steps, self.switches)
            if reached == seen:
                name = self.current.name if self.current is not None else "?"
                self.error = LivelockError(f"no end after {timeout_s:.0f} s; {name} runs without a scheduling point")
                self._interrupt()
                break
            seen = reached
        if self.error is not None:
            raise self.error

    def _interrupt(self) -> None:
        """End the strand that runs: it would go on beside the next launch, and take that one's partition for its own."""
        for _ in range(_TRIES):
            running = self.current
            if running is not None and running.thread is not None and running.thread.ident is not None:
                identity = ctypes.c_ulong(running.thread.ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(Stop))
            if self.done.wait(_TRY_SECONDS):
                return

    def point(
        self,
        ready: Callable[[], bool] | None = None,
        blocked: Callable[[], tuple[str, Mark]] | None = None,
        *,
        yields: bool = False,
    ) -> None:
        """A scheduling point of the running task; with `ready` it goes on only once that holds."""
        task = self.current
        assert task is not None
        self.steps += 1
        if self.steps > self.max_steps:
            fail(LivelockError, f"no end after {self.max_steps} scheduling points")
        if not yields:
            self.changed()
        task.ready, task.blocked, task.yields = ready, blocked, yields
        chosen = self._choose()
        if chosen is not task:
            self._pass(chosen)
            task.baton.acquire()
        task.ready, task.blocked, task.yields = None, None, False
        if self.error is not None:
            raise Stop

    def changed(self) -> None:
        """Note that somebody who polls may find another value now."""
        if self.polls:
            self.polls.clear()

    def polled(self, place: Place) -> None:
        """Note that the running task has read an element by an atomic that changed nothing.

        Where all who can go on have read nothing else for long, and nothing is in flight, nobody will ever find another value.
        """
        task = self.current
        assert task is not None
        before, count = self.polls.get(task, (place, 0))
        count = count + 1 if before == place else 1
        self.polls[task] = (place, count)
        if count % _POLLS or self.events or any(part.products for part in self.partitions):
            return
        waiting = (task for task in self.tasks if task.ready is None or task.ready())
        if all(task in self.polls and self.polls[task][1] >= _POLLS for task in waiting):
            fail(LivelockError, f"no end: all who can go on have polled {_POLLS} times, and nothing has changed since")

    def perform(self, event: Event) -> None:
        """Complete an asynchronous operation."""
        self.changed()
        if event.engine == "wgmma":
            event.owner.products.remove(event)
        else:
            self.events.remove(event)
            if event.engine == "store":
                event.owner.stores.remove(event)
        event.run()

    def _main(self, task: Task) -> None:
        task.baton.acquire()
        with np.errstate(all="ignore"):  # of this thread alone; NaN is poison here, not a warning
            self._run(task)

    def _run(self, task: Task) -> None:
        try:
            if self.error is None:
                task.body()
        except Stop:
            pass
        except BaseException as error:
            self.error = self.error or error
        self.tasks.remove(task)
        self.changed()
        try:
            chosen = self._choose()
        except BaseException as error:
            self.error = self.error or error
            chosen = self.tasks[0] if self.tasks else None
        self._pass(chosen)

    def _pass(self, task: Task | None) -> None:
        if task is None:
            self.done.set()
            return
        self.current = task
        self.switches += 1
        task.baton.release()

    def _choose(self) -> Task | None:
        """Complete events until the policy chooses a task; None once all have ended."""
        while True:
            if self.error is not None or not self.tasks:
                return self.tasks[0] if self.tasks else None
            ready = [task for task in self.tasks if task.ready is None or task.ready()]
            events = self.events + [part.products[0] for part in self.partitions if part.products]
            if not ready and not events:
                raise self._deadlock()
            choice = self.policy(self, ready, events)
            if isinstance(choice, Task):
                return choice
            self.perform(choice)

    def _deadlock(self) -> SimulationError:
        lines, sites = [], []
        for task in self.tasks:
            if task.blocked is None:
                continue
            what, mark = task.blocked()
            sites.append(mark.site())
            lines.append(f"    {task.name} {what}\n        {sites[-1]}")
        return DeadlockError(
            "no partition can run and nothing is in flight:\n" + "\n".join(lines),
            sites=tuple(sites),
            partitions=tuple(task.name for task in self.tasks),
        )
