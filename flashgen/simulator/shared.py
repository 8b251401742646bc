"""Shared memory: allocations poisoned with NaN, views of them, and every access checked by happens-before."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.dtypes import Array, DType
from flashgen.simulator.errors import (
    OutOfBoundsError,
    ProxyFenceError,
    ShapeError,
    SharedMemoryLimitError,
    SharedRaceError,
    SimulationError,
    UninitializedError,
    UnsupportedOperationError,
)
from flashgen.simulator.layouts import Layout
from flashgen.simulator.order import Access, Proxy
from flashgen.simulator.sites import Mark, here
from flashgen.simulator.tensors import Tensor, plain, sizes

if TYPE_CHECKING:
    from flashgen.simulator.barriers import Barrier
    from flashgen.simulator.machine import Partition


class Region:
    """An exact set of elements of one allocation, shared by all views that cover exactly these.

    Attributes:
        overlapping: regions that share an element with it, itself included.
        inside: regions that lie wholly in it, itself included: a write of it is their last access too.
        write: the last write of exactly this region.
        reads: the last read of each component since then.
    """

    def __init__(self, mask: Array) -> None:
        self.mask = mask
        self.overlapping: list[Region] = [self]
        self.inside: list[Region] = [self]
        self.write: Access | None = None
        self.reads: dict[int, Access] = {}


class Allocation:
    """One `allocate_shared_memory` of one CTA."""

    def __init__(self, dtype: DType, shape: tuple[int, ...], layout: Layout, name: str) -> None:
        self.dtype, self.layout, self.name = dtype, layout, name
        self.data = np.full(shape, dtype.poison, dtype.held)
        self.written = np.zeros(shape, np.bool_)
        self.regions: dict[tuple[int, tuple[tuple[int, int], ...]], Region] = {}
        self.barriers: dict[int, Barrier] = {}

    def region(self, view: Array) -> Region:
        """The region of a view of `written`; one object per set of elements, however it is viewed."""
        offset = view.__array_interface__["data"][0] - self.written.__array_interface__["data"][0]
        merged: list[tuple[int, int]] = []  # (stride, size), neighbours that are one run joined
        for stride, size in sorted(((s, n) for s, n in zip(view.strides, view.shape, strict=True) if n > 1))[::-1]:
            if merged and merged[-1][0] == stride * size:
                merged[-1] = (stride, merged[-1][1] * size)
            else:
                merged.append((stride, size))
        key = (offset, tuple(merged))
        if key not in self.regions:
            self.regions[key] = self._new_region(offset, view)
        return self.regions[key]

    def _new_region(self, offset: int, view: Array) -> Region:
        mask = np.zeros(self.written.shape, np.bool_)
        np.lib.stride_tricks.as_strided(mask.reshape(-1)[offset:], view.shape, view.strides)[...] = True
        new = Region(mask)
        for old in self.regions.values():
            if (old.mask & mask).any():
                new.overlapping.append(old)
                old.overlapping.append(new)
                if not (old.mask & ~mask).any():
                    new.inside.append(old)
                if not (mask & ~old.mask).any():
                    old.inside.append(new)
        return new


class SharedView:
    """A view of shared memory: Gluon's `shared_memory_descriptor`.

    Attributes:
        data, written: the elements it covers, and which of them were ever written.
        reshaped: whether its shape is no longer the allocation's own, so that layouts cannot be compared.
    """

    def __init__(self, allocation: Allocation, data: Array, written: Array, reshaped: bool = False) -> None:
        self.allocation, self.data, self.written, self.reshaped = allocation, data, written, reshaped
        self._views: dict[Any, SharedView] = {}
        self._region: Region | None = None
        self.barrier: Barrier | None = None  # that it was seen to hold
        self._whole = False  # every element was seen to be written: what was written once stays so

    @property
    def dtype(self) -> DType:
        return self.allocation.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def rank(self) -> int:
        return self.data.ndim

    @property
    def numel(self) -> int:
        return self.data.size

    @property
    def layout(self) -> Layout:
        return self.allocation.layout

    @property
    def handle(self) -> SharedView:
        """What a kernel's own builtin hands to `_semantic.builder`."""
        return self

    @property
    def nbytes_per_cta(self) -> int:
        return self.data.size * self.dtype.nbytes

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape, element_ty=self.dtype, layout=self.layout, nbytes=self.nbytes_per_cta)

    @property
    def region(self) -> Region:
        if self._region is None:
            self._region = self.allocation.region(self.written)
        return self._region

    @property
    def whole(self) -> bool:
        """Whether every element was ever written."""
        if not self._whole:
            self._whole = bool(self.written.all())
        return self._whole

    def __str__(self) -> str:
        return f"{self.allocation.name}{self.shape}"

    def _view(self, key: Any, change: Callable[[Array], Array], reshaped: bool) -> SharedView:
        if key not in self._views:
            data, written = change(self.data), change(self.written)
            self._views[key] = SharedView(self.allocation, data, written, self.reshaped or reshaped)
        return self._views[key]

    def index(self, index: Any) -> SharedView:
        at = int(index)
        if not 0 <= at < self.data.shape[0]:
            fail(OutOfBoundsError, f"index {at} of {self}")
        return self._view(("index", at), lambda array: array[at], False)

    def slice(self, start: Any, length: Any, dim: Any = 0) -> SharedView:
        first, count, axis = int(start), int(length), int(dim)
        if first < 0 or first + count > self.data.shape[axis]:
            fail(OutOfBoundsError, f"slice of {count} from {first} along dimension {axis} of {self}")
        part = (slice(None),) * axis + (slice(first, first + count),)
        return self._view(("slice", first, count, axis), lambda array: array[part], False)

    def permute(self, order: Any) -> SharedView:
        axes = sizes([order])
        return self._view(("permute", axes), lambda array: array.transpose(axes), True)

    def reshape(self, shape: Any) -> SharedView:
        wanted = sizes([shape])

        def change(array: Array) -> Array:
            view = array.reshape(wanted)
            if not np.shares_memory(view, array):
                raise ValueError
            return view

        try:
            return self._view(("reshape", wanted), change, True)
        except ValueError:
            fail(ShapeError, f"{self} cannot be reshaped to {list(wanted)} in place")

    def _reinterpret(self, *_: Any, **__: Any) -> NoReturn:
        fail(UnsupportedOperationError, "shared memory reinterpreted as another dtype, shape or layout")

    reinterpret = _reinterpret

    def load(self, layout: Layout | None = None) -> Tensor:
        read(self, "generic", "shared load")
        return Tensor(self.data.copy(), self.dtype, layout)

    def store(self, value: Any) -> None:
        plain(value)
        if tuple(value.values.shape) != self.data.shape:
            fail(ShapeError, f"a tensor of shape {value.shape} stored into {self}")
        if value.dtype is not self.dtype:
            fail(ShapeError, f"a tensor of {value.dtype} stored into {self} of {self.dtype}")
        write(self, "generic", "shared store")
        self.data[...] = value.values
        self.written[...] = True
        launch().scheduler.changed()

    def _keep_alive(self) -> None:
        """Keep the allocation alive: nothing is ever freed here."""


def allocate_shared_memory(element_ty: DType, shape: Any, layout: Layout, value: Any = None) -> SharedView:
    """Allocate shared memory in the running CTA, poisoned with NaN."""
    mark, cta = here(), partition().cta
    text = mark.site().text
    name = text.split("=")[0].strip() if "=" in text.split("(")[0] else f"allocation at line {mark.line}"
    name = name.split(":")[0].strip()
    block = sizes([shape])
    cta.smem_bytes += math.prod(block) * element_ty.nbytes
    limit = launch().settings.smem_bytes
    if cta.smem_bytes > limit:
        fail(SharedMemoryLimitError, f"{cta.smem_bytes} bytes of shared memory, a CTA has {limit}")
    allocation = Allocation(element_ty, block, layout, name)
    view = SharedView(allocation, allocation.data, allocation.written)
    if value is not None:
        view.store(value)
    return view


def _access(part: Partition, proxy: Proxy, what: str, mark: Mark, over: tuple[int, float] | None) -> Access:
    """The record of an access: over at `over`, or for an ordinary one as soon as it is known of."""
    component, clock = over if over is not None else (part.generic, part.knows.seen.tick(part.generic))
    return Access(component, clock, proxy, what, part.name, mark)


def _report(
    kind: type[SimulationError], view: SharedView, why: str, what: str, part: Partition, mark: Mark, other: Access
) -> NoReturn:
    sites = (mark.site(), other.mark.site())
    raise kind(
        f"{why} in {view}:\n    {what} by {part.name}\n        {sites[0]}\n    against {other}",
        sites=sites,
        partitions=(part.name, other.who),
    )


def _unfenced(part: Partition, proxy: Proxy, other: Access) -> bool:
    return proxy == "async" and other.proxy == "generic" and not other.over_for(part.knows.fenced)


def read(view: SharedView, proxy: Proxy, what: str, over: tuple[int, float] | None = None) -> None:
    """Check and note a read of the running partition.

    Args:
        view: what is read.
        proxy: "async" for TMA and wgmma.
        what: the operation, in words.
        over: component and clock from which the read is known to be over; None for an ordinary one.
    """
    part, mark, region = partition(), here(), view.region
    for other in region.overlapping:
        last = other.write
        if last is None:
            continue
        if not last.over_for(part.knows.seen):
            _report(SharedRaceError, view, "data is read that may still be being written", what, part, mark, last)
        if _unfenced(part, proxy, last):
            why = "no fence_async_shared between an ordinary write and an asynchronous read"
            _report(ProxyFenceError, view, why, what, part, mark, last)
    if not view.whole:
        site = mark.site()
        raise UninitializedError(
            f"{what} by {part.name} of {view}, of which {int((~view.written).sum())} elements were never written\n"
            f"    at {site}",
            sites=(site,),
            partitions=(part.name,),
        )
    access = _access(part, proxy, what, mark, over)
    region.reads[access.component] = access


def write(view: SharedView, proxy: Proxy, what: str, over: tuple[int, float] | None = None) -> Access:
    """Check and note a write of the running partition; arguments as for `read`."""
    part, mark, region = partition(), here(), view.region
    seen, strict = part.knows.seen, "fence-after-load" not in launch().settings.relax
    for other in region.overlapping:
        last = other.write
        if last is not None:
            if not last.over_for(seen):
                _report(SharedRaceError, view, "two writes that nothing orders", what, part, mark, last)
            if _unfenced(part, proxy, last):
                why = "no fence_async_shared between an ordinary write and an asynchronous one"
                _report(ProxyFenceError, view, why, what, part, mark, last)
        for earlier in other.reads.values():
            if not earlier.over_for(seen):
                why = "data is overwritten that may still be being read"
                _report(SharedRaceError, view, why, what, part, mark, earlier)
            if strict and _unfenced(part, proxy, earlier):
                why = "no fence_async_shared between an ordinary read and an asynchronous write"
                _report(ProxyFenceError, view, why, what, part, mark, earlier)
    for covered in region.inside:
        covered.write = None
        covered.reads.clear()
    region.write = _access(part, proxy, what, mark, over)
    return region.write


def fence_async_shared(cluster: bool = False) -> None:
    """Make what the partition knows of shared memory visible to TMA and wgmma."""
    knows = partition().knows
    knows.fenced.join(knows.seen)


def thread_barrier() -> None:
    """All threads of the partition meet."""
    partition().meet()
    launch().scheduler.point()
