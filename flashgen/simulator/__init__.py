"""Run a Gluon kernel without a GPU, and find what is wrong with its synchronisation.

    from flashgen.simulator import simulate
    report = simulate(source, dict(q=q, k=k, v=v, o=o, lse=lse, sm_scale=0.125, causal_offset=0, ...))

The exact text runs, under simulated names of Triton and with NumPy's arithmetic; README.md in this folder says what is
modelled and what is not. `mutants` breaks a kernel in many small ways, to see whether a test would notice.
"""

from __future__ import annotations

from flashgen.simulator.assembly import register_asm
from flashgen.simulator.errors import (
    AccumulatorError,
    BarrierError,
    ByteCountError,
    DeadlockError,
    DescriptorError,
    GlobalRaceError,
    IntegerError,
    KernelAssertionError,
    KernelPythonError,
    LayoutError,
    LivelockError,
    OutOfBoundsError,
    PhaseError,
    ProxyFenceError,
    RaceError,
    ShapeError,
    SharedMemoryLimitError,
    SharedRaceError,
    SimulationError,
    UnfinishedError,
    UninitializedError,
    UnorderedSumError,
    UnsupportedOperationError,
)
from flashgen.simulator.mutate import Mutant, mutants
from flashgen.simulator.run import LaunchReport, SimulationReport, simulate
from flashgen.simulator.schedule import SCHEDULES, Schedule
from flashgen.simulator.sites import Site

__all__ = [
    "SCHEDULES",
    "AccumulatorError",
    "BarrierError",
    "ByteCountError",
    "DeadlockError",
    "DescriptorError",
    "GlobalRaceError",
    "IntegerError",
    "KernelAssertionError",
    "KernelPythonError",
    "LaunchReport",
    "LayoutError",
    "LivelockError",
    "Mutant",
    "OutOfBoundsError",
    "PhaseError",
    "ProxyFenceError",
    "RaceError",
    "Schedule",
    "ShapeError",
    "SharedMemoryLimitError",
    "SharedRaceError",
    "SimulationError",
    "SimulationReport",
    "Site",
    "UnfinishedError",
    "UninitializedError",
    "UnorderedSumError",
    "UnsupportedOperationError",
    "mutants",
    "register_asm",
    "simulate",
]
