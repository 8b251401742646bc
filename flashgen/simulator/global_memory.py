"""Global memory: the storages of torch tensors, a shadow of who accessed which element, and atomics that order CTAs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from flashgen.simulator import context
from flashgen.simulator.context import fail, partition
from flashgen.simulator.dtypes import Array, bfloat16, decode, encode, int64, of_torch, rounded
from flashgen.simulator.errors import (
    GlobalRaceError,
    OutOfBoundsError,
    ProxyFenceError,
    ShapeError,
    SimulationError,
    UnorderedSumError,
    UnsupportedOperationError,
)
from flashgen.simulator.layouts import Layout, common
from flashgen.simulator.order import Access, VectorClock
from flashgen.simulator.scalars import scalar
from flashgen.simulator.sites import here
from flashgen.simulator.tensors import Tensor, binary, plain

Select = Callable[[Array], Array]  # the elements of an access, out of a flat array of the storage
Assign = Callable[[Array, Any], None]


class Footprint:
    """The elements of global memory that an access touches."""

    def __init__(self, select: Select, assign: Assign) -> None:
        self.select, self.assign = select, assign

    @classmethod
    def elements(cls, index: Array) -> Footprint:
        """Elements by their flat index."""

        def assign(flat: Array, value: Any) -> None:
            flat[index] = value

        return cls(lambda flat: flat[index], assign)


class Shadow:
    """Who last wrote and read each element of a storage, in one launch.

    Reads are logged and written into their layers only once somebody writes the storage: most are never written.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.accesses: list[Access | None] = [None]
        self.writes = np.zeros(size, np.int32)
        self.written = False
        self.log: list[tuple[Footprint, int]] = []
        self.reads: dict[int, Array] = {}  # component -> the last read of each element
        self.sync: dict[int, VectorClock] = {}  # element -> what releases of it published
        self.adders: Array | None = (
            None  # a hash of who added floats to each element, in order; where sums must be ordered
        )

    def _number(self, access: Access) -> int:
        self.accesses.append(access)
        return len(self.accesses) - 1

    def read(self, world: VectorClock, footprint: Footprint, access: Access) -> None:
        """Check and note a read by somebody who knows `world`."""
        if self.written:
            for other in self._named(footprint.select(self.writes)):
                if not other.over_for(world) and not (access.atomic and other.atomic):
                    _report(GlobalRaceError, "global memory is read that may still be being written", access, other)
                if access.proxy == "async" and other.proxy == "generic":
                    why = "TMA reads what an ordinary store wrote in the same launch, and Gluon has no fence for that"
                    _report(ProxyFenceError, why, access, other)
        self.log.append((footprint, self._number(access)))

    def write(self, world: VectorClock, footprint: Footprint, access: Access) -> None:
        """Check and note a write or an atomic access by somebody who knows `world`."""
        for logged, number in self.log:
            component = self.accesses[number].component  # type: ignore[union-attr]
            if component not in self.reads:
                self.reads[component] = np.zeros(self.size, np.int32)
            logged.assign(self.reads[component], number)
        self.log.clear()
        ordered = context.launch().settings.ordered_sums
        if self.written:
            for other in self._named(footprint.select(self.writes)):
                if other.over_for(world):
                    continue
                if not (access.atomic and other.atomic):
                    _report(GlobalRaceError, "two writes of global memory that nothing orders", access, other)
                if ordered and access.adds and other.adds:
                    why = "two additions of floats that nothing orders: their sum depends on the schedule"
                    _report(UnorderedSumError, why, access, other)
        for layer in self.reads.values():
            for other in self._named(footprint.select(layer)):
                if not other.over_for(world) and not (access.atomic and other.atomic):
                    _report(GlobalRaceError, "global memory is overwritten that may still be being read", access, other)
        if ordered and access.adds:
            self._add(footprint)
        self.written = True
        footprint.assign(self.writes, self._number(access))

    def _add(self, footprint: Footprint) -> None:
        """Note that the running CTA adds next."""
        if self.adders is None:
            self.adders = np.zeros(self.size, np.uint64)
        (x, y, _), (width, height, _) = partition().cta.pid, context.launch().grid
        number = np.uint64(1 + x + width * (y + height * partition().cta.pid[2]))
        footprint.assign(self.adders, footprint.select(self.adders) * np.uint64(1_000_003) + number)

    def _named(self, numbers: Array) -> list[Access]:
        """The distinct accesses among their numbers."""
        if not numbers.size:
            return []
        low, high = int(numbers.min()), int(numbers.max())
        found = [low] if low == high else np.unique(numbers).tolist()
        return [access for access in (self.accesses[number] for number in found) if access is not None]


def _report(kind: type[SimulationError], why: str, access: Access, other: Access) -> NoReturn:
    sites = (access.mark.site(), other.mark.site())
    raise kind(f"{why}:\n    {access}\n    against {other}", sites=sites, partitions=(access.who, other.who))


class Buffer:
    """The storage behind a tensor, seen flat.

    Attributes:
        flat: every element of the storage, as raw bytes' type.
        first, end: the elements that belong to the tensor.
    """

    def __init__(self, tensor: Any) -> None:
        dtype = of_torch(tensor.dtype)
        if dtype is None:
            raise UnsupportedOperationError(f"tensors of {tensor.dtype} are not simulated")
        if tensor.device.type != "cpu":
            raise UnsupportedOperationError(f"tensors must be on the CPU, got one on {tensor.device}")
        import torch

        self.dtype = dtype
        storage = tensor.untyped_storage()
        self.key = storage.data_ptr()
        flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
        self.flat: Array = (
            flat.view(torch.int16).numpy().view(np.uint16) if dtype is bfloat16 else flat.view(tensor.dtype).numpy()
        )
        self.first = int(tensor.storage_offset())
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.first + (1 + int(extent) if tensor.numel() else 0)

    def shadow(self) -> Shadow:
        shadows = context.launch().shadows
        if self.key not in shadows:
            shadows[self.key] = Shadow(self.flat.size)
        return shadows[self.key]


class Pointer:
    """A pointer, or a block of pointers, into a buffer.

    Attributes:
        offset: element from the start of the storage, a number or an int64 tensor.
    """

    def __init__(self, buffer: Buffer, offset: Any) -> None:
        self.buffer, self.offset = buffer, offset

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.buffer.dtype, scalar=self.buffer.dtype, is_ptr=lambda: True)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.buffer.dtype, scalar=self.dtype)

    @property
    def shape(self) -> list[int]:
        return self.offset.shape if isinstance(self.offset, Tensor) else []

    def __add__(self, other: Any) -> Pointer:
        plain(other)
        mine = self.offset
        if isinstance(other, Tensor):
            other = Tensor(other.values.astype(np.int64), int64, other.layout)
        if isinstance(other, Tensor) or isinstance(mine, Tensor):
            return Pointer(self.buffer, binary(mine, other if isinstance(other, Tensor) else int(other), np.add))
        return Pointer(self.buffer, int(mine) + int(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self.__add__(-other)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.buffer, self.offset[index])

    def resolve(self, mask: Any) -> tuple[Array, Array | None]:
        """Flat indices and the mask, both of the block's shape.

        Raises:
            OutOfBoundsError: an element that the mask keeps lies outside the tensor.
        """
        plain(mask)
        index = self.offset.values if isinstance(self.offset, Tensor) else np.asarray(int(self.offset))
        keep = None
        if mask is not None:
            given = mask.values if isinstance(mask, Tensor) else np.asarray(bool(mask))
            if isinstance(mask, Tensor) and isinstance(self.offset, Tensor):
                common(mask.layout, self.offset.layout)
            keep = given if given.shape == index.shape else np.broadcast_to(given, index.shape)
        used = index if keep is None else index[keep]
        buffer = self.buffer
        if used.size and (used.min() < buffer.first or used.max() >= buffer.end):
            low, high = int(used.min()) - buffer.first, int(used.max()) - buffer.first
            fail(OutOfBoundsError, f"elements {low} to {high} of a tensor of {buffer.end - buffer.first} elements")
        return index, keep


def layout_of(pointer: Pointer) -> Layout | None:
    """The layout of a block of pointers."""
    return pointer.offset.layout if isinstance(pointer.offset, Tensor) else None


def note(what: str, *, block: bool, atomic: bool = False, adds: bool = False) -> Access:
    """The record of an ordinary global access of the running partition."""
    part = partition()
    clock = part.knows.world.tick(part.world)
    if block and part.unsettled is None:
        part.unsettled = clock
    return Access(part.world, clock, "generic", what, part.name, here(), atomic, adds)


def load(
    pointer: Pointer,
    mask: Any = None,
    other: Any = None,
    *,
    boundary_check: Any = (),
    padding_option: Any = "",
    cache_modifier: Any = None,
    eviction_policy: Any = None,
    volatile: Any = False,
    cache_policy: Any = None,
) -> Any:
    """Load from global memory; what the mask leaves out without `other` is poison."""
    if volatile:
        context.launch().scheduler.point(yields=True)  # somebody may be polling
    index, keep = pointer.resolve(mask)
    buffer = pointer.buffer
    used = index if keep is None else index[keep]
    if used.size:
        access = note("load", block=index.ndim > 0, atomic=bool(volatile))
        buffer.shadow().read(partition().knows.world, Footprint.elements(used), access)
        if volatile and used.size == 1:
            context.launch().scheduler.polled((buffer.key, int(np.ravel(used)[0])))
    if keep is None:
        result = decode(buffer.flat[index], buffer.dtype)
    else:
        plain(other)
        fill = buffer.dtype.poison if other is None else other.values if isinstance(other, Tensor) else other
        safe = np.where(keep, index, buffer.first if buffer.end > buffer.first else 0)
        found = decode(buffer.flat[safe], buffer.dtype) if buffer.flat.size else np.zeros(index.shape)
        result = np.where(keep, found, np.asarray(fill, buffer.dtype.held))
    if index.ndim == 0:
        return scalar(result[()], buffer.dtype)
    return Tensor(result, buffer.dtype, layout_of(pointer))


def store(
    pointer: Pointer,
    value: Any,
    mask: Any = None,
    *,
    boundary_check: Any = (),
    cache_modifier: Any = None,
    eviction_policy: Any = None,
    cache_policy: Any = None,
) -> None:
    """Store to global memory."""
    plain(value)
    index, keep = pointer.resolve(mask)
    buffer = pointer.buffer
    if isinstance(value, Tensor):
        if value.values.ndim != index.ndim:
            fail(ShapeError, f"a tensor of shape {value.shape} stored through pointers of shape {list(index.shape)}")
        common(value.layout, layout_of(pointer))
    values = rounded(value.values if isinstance(value, Tensor) else np.asarray(value), buffer.dtype)
    values = values if values.shape == index.shape else np.broadcast_to(values, index.shape)
    used, kept = (index, values) if keep is None else (index[keep], values[keep])
    if not np.size(used):
        return
    shadow = buffer.shadow()
    shadow.write(partition().knows.world, Footprint.elements(used), note("store", block=index.ndim > 0))
    if shadow.sync:
        for element in np.atleast_1d(used).ravel().tolist():
            shadow.sync.pop(element, None)
    buffer.flat[used] = encode(kept, buffer.dtype)
    context.launch().scheduler.changed()
