"""What failed before and is not tried again unasked: a fault costs a process, and a card may not survive many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flashgen.config import KernelConfig
from flashgen.errors import BuildError
from flashgen.store import Record

COMPILE_ONLY = "compile-only"  # how protocols begin that never launch anything
PROTOCOL_COMPILE = f"{COMPILE_ONLY}-1"
FAILED = ("compile_error", "out_of_resources", "wrong_result", "timeout", "crashed")


def compile_status(error: BuildError) -> str:
    """The status of a candidate that the compiling pool gave up on."""
    text = str(error)
    return "timeout" if "(timeout)" in text else "crashed" if "exit status" in text else "compile_error"


def condemned(
    stored: Iterable[Record], *, triton: str, shape: Mapping[str, int], variant: str
) -> dict[KernelConfig, Record]:
    """Per configuration that failed the newest row that says so, unless a newer one says that it ran.

    What the compiler refused, what crashed and what was wrong counts at every shape. What ran out of time or of memory
    on the device counts at its own shape only.

    Args:
        stored: rows of one kernel text (digest) on one GPU.
        triton: the installed version; rows of others say nothing.
        shape: of the problem that is tuned.
        variant: whose configurations.
    """
    found: dict[KernelConfig, Record] = {}
    for row in sorted(stored, key=lambda row: row.created):
        if row.variant != variant or row.versions.get("triton") != triton:
            continue
        config = KernelConfig(variant=variant, **row.config)
        compiled = row.protocol.startswith(COMPILE_ONLY)
        if row.status in FAILED:
            anywhere = compiled or row.status in ("compile_error", "wrong_result", "crashed")
            if anywhere or row.shape == dict(shape):
                found[config] = row
        elif config in found and (row.status != "predicted" or found[config].protocol.startswith(COMPILE_ONLY)):
            del found[config]
    return found


def reason(row: Record) -> str:
    """Why a configuration is left out, in words."""
    return (
        f"{row.status} before ({row.created[:10]}, session {row.session}): {row.message or 'no message'}; "
        "--retry-failed tries it again"
    )
