"""How things are timed: one launch, several taking turns in rounds, and where it happened.

`timing` is what the tuner uses; `rounds` is the protocol of `flashgen bench`; `environment` names the machine.
"""

from __future__ import annotations

from flashgen.bench.timing import (
    FLUSH_BYTES,
    PROTOCOL_FINAL,
    PROTOCOL_GRAPH,
    PROTOCOL_SEARCH,
    Measurement,
    Timer,
    measure,
    measure_interleaved,
    summarise,
)

__all__ = [
    "FLUSH_BYTES",
    "PROTOCOL_FINAL",
    "PROTOCOL_GRAPH",
    "PROTOCOL_SEARCH",
    "Measurement",
    "Timer",
    "measure",
    "measure_interleaved",
    "summarise",
]
