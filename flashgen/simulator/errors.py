"""What the simulator finds, an error class per kind of defect.

SimulationError                     a defect of the kernel; `kind`, `sites` and `partitions` are filled in
├── RaceError
│   ├── SharedRaceError             two accesses of shared memory that nothing orders
│   ├── GlobalRaceError             the same in global memory, within a CTA or across CTAs
│   └── UnorderedSumError           atomic additions of floats whose order, and so whose sum, a schedule decides
├── UninitializedError              shared memory read before anything wrote it
├── ProxyFenceError                 an ordinary access and an asynchronous one without a proxy fence between them
├── AccumulatorError                the result of a wgmma used before warpgroup_mma_wait handed it out
├── BarrierError                    an mbarrier misused: not initialised, initialised twice, too many arrivals
│   ├── ByteCountError              expected and landed bytes differ
│   └── PhaseError                  a phase missed, overrun, or taken for another one
├── DeadlockError                   nobody can run and nothing is in flight
├── LivelockError                   the launch does not end
├── UnfinishedError                 a partition or CTA ends with asynchronous work not waited for
├── OutOfBoundsError                an access beyond the tensor or the shared allocation
├── IntegerError                    int32 overflow, or a division whose sign Triton and Python treat differently
├── ShapeError                      operands, boxes or views that do not fit
├── LayoutError                     layouts that differ where Gluon demands the same
├── DescriptorError                 a tensor that TMA cannot describe
├── SharedMemoryLimitError          more shared memory than a CTA has
├── KernelAssertionError            a device_assert or static_assert that does not hold
├── KernelPythonError               the kernel's text raised an ordinary Python exception
└── UnsupportedOperationError       an operation that the simulator does not know
"""

from __future__ import annotations

from typing import ClassVar

from flashgen.errors import FlashgenError
from flashgen.simulator.sites import Site


class SimulationError(FlashgenError):
    """A defect of a simulated kernel.

    Attributes:
        kind: the kind of defect, as in `SimulationReport.kind` and on the command line.
        sites: the source lines that take part, the access that noticed first.
        partitions: names of the partitions that take part, in the order of `sites`.
    """

    kind: ClassVar[str] = "defect"

    def __init__(self, message: str, *, sites: tuple[Site, ...] = (), partitions: tuple[str, ...] = ()) -> None:
        super().__init__(f"[{self.kind}] {message}")
        self.sites = sites
        self.partitions = partitions


class RaceError(SimulationError):
    """Two accesses of the same memory, at least one a write, that nothing orders."""

    kind = "race"


class SharedRaceError(RaceError):
    """A race on shared memory."""

    kind = "shared-race"


class GlobalRaceError(RaceError):
    """A race on global memory."""

    kind = "global-race"


class UnorderedSumError(RaceError):
    """Two atomic additions of floats to the same element that nothing orders: their sum depends on the schedule.

    Looked for with `simulate(..., ordered_sums=True)`.
    """

    kind = "unordered-sum"


class UninitializedError(SimulationError):
    """Shared memory is read before anything wrote it."""

    kind = "uninitialized"


class ProxyFenceError(SimulationError):
    """An ordinary and an asynchronous access of the same memory with no proxy fence between them."""

    kind = "proxy-fence"


class AccumulatorError(SimulationError):
    """The result of a wgmma is used before `warpgroup_mma_wait` handed it out."""

    kind = "accumulator"


class BarrierError(SimulationError):
    """An mbarrier is misused."""

    kind = "barrier"


class ByteCountError(BarrierError):
    """The bytes a barrier expects and those that land differ."""

    kind = "bytes"


class PhaseError(BarrierError):
    """A barrier's phase is missed, overrun, or taken for another one."""

    kind = "phase"


class DeadlockError(SimulationError):
    """No partition can run and nothing is in flight; the message lists every partition's line, barrier and phase."""

    kind = "deadlock"


class LivelockError(SimulationError):
    """The launch does not end: within its bound of steps or seconds, or ever, since all who can go on wait for each other."""

    kind = "livelock"


class UnfinishedError(SimulationError):
    """A partition or CTA ends with asynchronous work that nobody waited for."""

    kind = "unfinished"


class OutOfBoundsError(SimulationError):
    """An access lies outside the tensor or the shared allocation."""

    kind = "out-of-bounds"


class IntegerError(SimulationError):
    """An int32 overflow, or a `//` or `%` of negative values, which Triton truncates and Python floors."""

    kind = "integer"


class ShapeError(SimulationError):
    """Operands, boxes or views do not fit each other."""

    kind = "shape"


class LayoutError(SimulationError):
    """Layouts differ where Gluon demands the same one."""

    kind = "layout"


class DescriptorError(SimulationError):
    """TMA cannot describe the tensor."""

    kind = "descriptor"


class SharedMemoryLimitError(SimulationError):
    """The kernel allocates more shared memory than a CTA has."""

    kind = "shared-memory"


class KernelAssertionError(SimulationError):
    """A `device_assert` or `static_assert` of the kernel does not hold."""

    kind = "assertion"


class KernelPythonError(SimulationError):
    """The kernel's text raised an ordinary Python exception; it is the cause (`__cause__`)."""

    kind = "python"


class UnsupportedOperationError(SimulationError):
    """The simulator does not know an operation; the message names it and its line."""

    kind = "unsupported"
