"""Progress of a run: a bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flashgen.tuner.context import Event

_PLAIN_EVERY_S = 5.0


@contextmanager
def reporter(progress: bool, on_event: Callable[[Event], None] | None) -> Iterator[Callable[[Event], None]]:
    """A function that takes events, for the length of a run."""
    if on_event is not None:
        yield on_event
    elif not progress:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _plain()


@contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    tasks: dict[tuple[str, str], TaskID] = {}
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[best]}"),
        console=Console(stderr=True),
    )  # fmt: skip
    with bar:

        def report(event: Event) -> None:
            key = (event.problem, event.phase)
            if key not in tasks:
                tasks[key] = bar.add_task(f"{event.phase} {event.problem}", total=event.total, best="")
            fields: dict[str, Any] = {"best": event.best} if event.best else {}
            bar.update(tasks[key], completed=event.done, total=event.total, **fields)

        yield report


def _plain() -> Callable[[Event], None]:
    last = 0.0
    best = ""

    def report(event: Event) -> None:
        nonlocal last, best
        best = event.best or best
        if event.done < event.total and time.monotonic() - last < _PLAIN_EVERY_S:
            return
        last = time.monotonic()
        print(f"{event.phase} {event.problem}: {event.done}/{event.total}  {best}", file=sys.stderr, flush=True)

    return report
