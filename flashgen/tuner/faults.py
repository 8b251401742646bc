"""What can go wrong with a candidate in the measuring process, as a trial's status."""

from __future__ import annotations

from typing import Any


class WrongResultError(Exception):
    """A launch computed or touched what it must not.

    Attributes:
        spoilt: memory that is not its own was written to: this process cannot be trusted any further.
    """

    def __init__(self, message: str, *, spoilt: bool = False) -> None:
        super().__init__(message)
        self.spoilt = spoilt


# After these a CUDA context answers every call with the same error: the process has to go.
_STICKY = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "cuda error",
    "hardware",
)


def failure(error: Exception) -> dict[str, Any]:
    """The status of an exception, its message, and whether the process is spoilt (`sticky`)."""
    text = f"{type(error).__name__}: {error}"
    kind, module = type(error).__name__, type(error).__module__
    status, sticky = "crashed", False
    if isinstance(error, WrongResultError):
        status, text, sticky = "wrong_result", str(error), error.spoilt
    elif isinstance(error, MemoryError) or kind == "OutOfResources" or "out of memory" in text.lower():
        status = "out_of_resources"
    elif module.startswith("triton") or kind in ("BuildError", "CompilationError"):
        status = "compile_error"
    else:
        sticky = any(word in text.lower() for word in _STICKY)
    return {"status": status, "message": text[:500], "sticky": sticky}
