"""Where a kernel is to run: the GPUs that are known, with their published figures, and the one that is installed."""

from __future__ import annotations

from flashgen.target.known import CPU, TARGETS
from flashgen.target.value import Target

__all__ = ["CPU", "TARGETS", "Target"]
