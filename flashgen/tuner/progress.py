"""Progress of a run, on stderr: a live table on a terminal, plain lines elsewhere. Colours follow NO_COLOR (rich does)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flashgen.tuner.context import Event

if TYPE_CHECKING:
    from rich.table import Table

_PLAIN_EVERY_S = 5.0
_MOST_ROWS = 12  # problems that a table shows: those begun last


@contextmanager
def reporter(progress: bool, on_event: Callable[[Event], None] | None) -> Iterator[Callable[[Event], None]]:
    """A function that takes events, for the length of a run."""
    if on_event is not None:
        yield on_event
    elif not progress:
        yield lambda event: None
    elif sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
        with _live() as report:
            yield report
    else:
        yield plain_lines()


@dataclass(slots=True)
class Row:
    """One problem on the board.

    Attributes:
        phase, done, total: of the newest event.
        incumbent: the best so far in words; a prediction is called one.
        counts: trials by status.
        began: when the phase began, by the board's clock.
        told: when the newest event came.
    """

    began: float
    phase: str = ""
    done: int = 0
    total: int = 0
    incumbent: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    told: float = 0.0

    def left_s(self) -> float | None:
        """Seconds until the phase ends, at its pace so far; None before the second step, and when it has ended."""
        if self.done < 2 or self.done >= self.total:
            return None
        return (self.told - self.began) / self.done * (self.total - self.done)


class Board:
    """What is known of every problem of a run; draws itself.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.rows: dict[str, Row] = {}

    def update(self, event: Event) -> None:
        """Take an event in."""
        now = self._clock()
        row = self.rows.setdefault(event.problem, Row(began=now))
        if event.phase != row.phase:
            row.phase, row.began = event.phase, now
        row.done, row.total, row.told = event.done, event.total, now
        row.incumbent = event.best.replace("best so far", "").replace(" :", ":").strip() or row.incumbent
        row.counts = event.counts or row.counts

    def __rich__(self) -> Table:
        """A table; the problems begun last where there are many."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        shown = list(self.rows.items())[-_MOST_ROWS:]
        title = f"{len(self.rows) - len(shown)} problems before these are done" if len(shown) < len(self.rows) else None
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, expand=True)
        for name, ratio in (
            ("problem", 4),
            ("phase", 2),
            ("done", None),
            ("left", None),
            ("trials", 3),
            ("incumbent", 5),
        ):
            table.add_column(name, ratio=ratio, overflow="fold", no_wrap=ratio is None)
        for problem, row in shown:
            table.add_row(problem, row.phase, f"{row.done}/{row.total}", left(row), trials(row.counts), row.incumbent)
        return table


def left(row: Row) -> str:
    """The estimate of what is left of a phase, e.g. `~1:05`; a dash where there is none."""
    seconds = row.left_s()
    return "-" if seconds is None else f"~{clock_time(seconds)}"


def clock_time(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def trials(counts: Mapping[str, int]) -> str:
    """Trials by status in words; those that ran first."""
    order = sorted(counts, key=lambda status: (status != "ok", -counts[status], status))
    return ", ".join(f"{counts[status]} {status}" for status in order)


@contextmanager
def _live() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.live import Live

    board = Board()
    # stdout is left alone: it belongs to the result, and may be a pipe.
    live = Live(
        get_renderable=board.__rich__, console=Console(stderr=True), refresh_per_second=4, redirect_stdout=False
    )
    with live:
        yield board.update


def plain_lines(
    clock: Callable[[], float] = time.monotonic, every_s: float = _PLAIN_EVERY_S
) -> Callable[[Event], None]:
    """Lines on stderr: every few seconds, and at the end of a phase.

    Args:
        clock: seconds, monotonic.
        every_s: at most one line in so many seconds, ends of phases aside.
    """
    board = Board(clock)
    last = float("-inf")

    def report(event: Event) -> None:
        nonlocal last
        board.update(event)
        row = board.rows[event.problem]
        now = clock()
        if event.done < event.total and now - last < every_s:
            return
        last = now
        words = [f"{event.phase} {event.problem}: {event.done}/{event.total}", row.incumbent, trials(row.counts)]
        if row.left_s() is not None:
            words.append(f"about {clock_time(row.left_s() or 0.0)} left")
        print("  ".join(filter(None, words)), file=sys.stderr, flush=True)

    return report
