"""How long an answer of another process may take on a machine that others use, too."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

# Beyond this nobody waits: a machine so full must not make a process that hangs wait for hours.
_MOST = 10.0


def share() -> float:
    """By how much processes that want a processor outnumber the processors, over the last minute: from 1 (all had one) to 10.

    1, too, where the system does not say (no load average).
    """
    try:
        waiting = os.getloadavg()[0]
    except (AttributeError, OSError):
        return 1.0
    return min(_MOST, max(1.0, waiting / (os.cpu_count() or 1)))


def readable(fd: int, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Wait until `fd` can be read, at most `timeout_s` seconds of a machine of one's own.

    Where others hold the processors the time counts for less: a process that gets a tenth of a core has done a tenth of the work.

    Args:
        fd: of a pipe.
        timeout_s: seconds.
        stopped: asked ten times a second whether to wait no longer.

    Returns:
        Whether it can be read.
    """
    began = time.monotonic()
    while not stopped():
        left = timeout_s * share() - (time.monotonic() - began)
        if select.select([fd], [], [], min(0.1, max(0.0, left)))[0]:
            return True
        if left <= 0:
            break
    return False
