"""Launches of one kind: from the second on the kernels are known, and Triton's look-up, which takes longer than small problems do, is left out.

Triton looks at each argument of each launch (its dtype, its alignment, whether an integer is 1 or divisible by 16) to find what it compiled
for such a one. Where the caller knows that all of this is the same as the last time, so is what was found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class _Thread(threading.local):
    """What this thread is in.

    Attributes:
        known: the launch of a kind.
        watcher: who watches it (`replays`): has `steps`, a list, and `knows(tensor, whose)`.
    """

    known: _Known | None = None
    watcher: Any = None


thread = _Thread()


def current() -> _Known | None:
    """The launch of a kind that this thread is in."""
    return thread.known


class Noted:
    """A compiled kernel's launcher, which tells who watches what it is given.

    Args:
        launcher: Triton's.
    """

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher

    def __call__(self, *arguments: Any) -> Any:
        """Launch."""
        if thread.watcher is not None:
            thread.watcher.steps.append((self.launcher, arguments))
        return self.launcher(*arguments)


class Counters:
    """A rendered file's `ticket_counter`, which tells who watches which tensors it gave.

    Args:
        real: the file's own: a tensor of a device's current stream.

    Attributes:
        known: by device and stream, for who knows both.
    """

    def __init__(self, real: Callable[[Any], Any]) -> None:
        self.real, self.known = real, dict[tuple[Any, int], Any]()

    def __call__(self, device: Any) -> Any:
        """The counter of the current stream."""
        watcher, thread.watcher = thread.watcher, None
        try:
            found = self.real(device)
        finally:
            thread.watcher = watcher
        if watcher is not None:
            watcher.knows(found, self)
        return found


class Kernels:
    """What `launched` remembers of a kind: the kernels that a launch runs, in their order."""

    def __init__(self) -> None:
        self.found: tuple[tuple[Any, Any, tuple[str, ...]], ...] | None = None


def launched(kernels: Kernels, launch: Callable[..., None], *tensors: Any, **scalars: Any) -> None:
    """Call a rendered `launch`; from the second of a kind on, Triton need not look its kernels up, which takes longer than small problems do.

    Args:
        kernels: of this kind alone: all that Triton specialises on (dtypes, alignment, strides, integers) is the same in each.
        launch, *tensors, **scalars: what is called, with what.
    """
    if thread.known is not None:
        launch(*tensors, **scalars)
        return
    thread.known = known = _Known(kernels.found)
    try:
        launch(*tensors, **scalars)
    finally:
        thread.known = None
    if kernels.found is None or known.differs:
        kernels.found = tuple(known.made)


class _Known:
    """One launch: what an earlier one ran, or what this one runs.

    Args:
        found: (jit function, its kernel, arguments that are given by name) of the earlier one; None where there is none.
    """

    def __init__(self, found: tuple[tuple[Any, Any, tuple[str, ...]], ...] | None) -> None:
        self._found, self._at = found or (), 0
        self.differs = found is None
        self.made: list[tuple[Any, Any, tuple[str, ...]]] = []

    def run(self, function: Any, arguments: tuple[Any, ...], grid: Any, more: dict[str, Any]) -> Any:
        """Run a kernel."""
        if not self.differs and self._at < len(self._found) and self._found[self._at][0] is function:
            _, kernel, names = self._found[self._at]
            self._at += 1
            self.made.append((function, kernel, names))
            kernel[(*grid, 1, 1)[:3]](*arguments, *[more[name] for name in names])
            return kernel
        self.differs = True
        kernel = type(function).run(function, *arguments, grid=grid, warmup=False, **more)
        self.made.append((function, kernel, tuple(function.arg_names[len(arguments) :])))
        return kernel
