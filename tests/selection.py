"""Which tests `make test` leaves to `make test-long`: those marked `long`, and of what is many of a kind all but a sample."""

from __future__ import annotations

import pytest

LONG = pytest.StashKey[dict[str, bool]]()  # of every test that was collected, before any was chosen


def choose(items: list[pytest.Item]) -> dict[str, bool]:
    """Mark as `long` what no sample holds, and what is long as `slow`, which `make check` leaves out; whether each is long, by its id."""
    found = {}
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None and _place(item, **sampled.kwargs):
            item.add_marker("long")
        found[item.nodeid] = item.get_closest_marker("long") is not None
        if found[item.nodeid]:
            item.add_marker("slow")
    return found


def _place(item: pytest.Item, *, every: int, by: str = "") -> int:
    """Where a case stands among so many of its test: 0 is in the sample.

    By one parametrisation, or else by the sum over all, so that of two each value of either is met by turns.
    """
    marks = list(item.iter_markers("parametrize"))
    if by not in ("", *(mark.args[0] for mark in marks)):
        raise pytest.UsageError(f"{item.nodeid} is sampled by {by!r}, of which it has no parametrisation")
    number = max(item.callspec.indices.values())  # type: ignore[attr-defined] # among all, the last parametrisation's values by turns
    place = 0
    for mark in reversed(marks):
        number, index = divmod(number, len(mark.args[1]))
        if by in ("", mark.args[0]):
            place += index
    return place % every
