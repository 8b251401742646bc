"""TMA: descriptors over real strides, loads with clipping and zero fill, stores and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashgen.simulator import shared
from flashgen.simulator.barriers import live
from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.dtypes import Array, decode, encode, rounded
from flashgen.simulator.errors import DescriptorError, LayoutError, OutOfBoundsError, ShapeError
from flashgen.simulator.global_memory import Buffer, Footprint, Pointer
from flashgen.simulator.layouts import NVMMASharedLayout
from flashgen.simulator.order import IN_FLIGHT, Access
from flashgen.simulator.schedule import Event
from flashgen.simulator.shared import SharedView
from flashgen.simulator.sites import here

Box = tuple[slice, ...]


def _refuse(message: str) -> None:
    """Report a tensor that TMA cannot describe, on the host or in a kernel."""
    site = here().site()
    raise DescriptorError(f"{message}\n    at {site}", sites=(site,))


class TensorDescriptor:
    """A TMA descriptor, with the driver's and Triton's rules of alignment and size.

    Args:
        base: the tensor.
        shape, strides: in elements; the last stride is 1, the others multiples of 16 bytes.
        block_shape: the box that one operation moves: powers of two.
        layout: an NVMMASharedLayout of the element's width.
        padding: "zero" or "nan": what lies outside.

    Raises:
        DescriptorError: a rule is broken; names it.
    """

    def __init__(
        self,
        base: Any,
        shape: Any,
        strides: Any,
        block_shape: Any,
        layout: NVMMASharedLayout,
        padding: str = "zero",
        round_f32_to_tf32: bool = False,
    ) -> None:
        self.base, self.layout, self.padding = base, layout, padding
        self._describe(Buffer(base), int(base.storage_offset()), shape, strides, block_shape)
        if base.data_ptr() % 16:
            _refuse(f"the base address must be a multiple of 16 bytes, got {base.data_ptr() % 16} beyond one")

    @classmethod
    def of_pointer(
        cls, base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding: str
    ) -> TensorDescriptor:
        """A descriptor made by the kernel itself."""
        new = cls.__new__(cls)
        new.base, new.layout, new.padding = base, layout, padding
        new._describe(base.buffer, int(base.offset), shape, strides, block_shape)
        return new

    def _describe(self, buffer: Buffer, offset: int, shape: Any, strides: Any, block_shape: Any) -> None:
        self.shape = [int(size) for size in shape]
        self.strides = [int(stride) for stride in strides]
        self.block_shape = [int(size) for size in block_shape]
        self.buffer, self.offset, self.dtype = buffer, offset, buffer.dtype
        self._check()
        self.nbytes_per_cta = math.prod(self.block_shape) * self.dtype.nbytes
        self.block_type = SimpleNamespace(shape=self.block_shape, element_ty=self.dtype, nbytes=self.nbytes_per_cta)
        self.type = SimpleNamespace(
            block_type=self.block_type, nbytes_per_cta=self.nbytes_per_cta, layout=self.layout, shape=self.block_shape
        )
        self.fill: Any = np.nan if self.padding == "nan" else 0

    def _check(self) -> None:
        rank, nbytes, layout = len(self.shape), self.dtype.nbytes, self.layout
        if not (1 <= rank <= 5 and rank == len(self.strides) == len(self.block_shape)):
            _refuse(f"ranks must be equal and 1 to 5: {self.shape}, strides {self.strides}, box {self.block_shape}")
        if any(size <= 0 for size in self.shape):
            _refuse(f"sizes must be positive: {self.shape}")
        if self.strides[-1] != 1:
            _refuse(f"the last stride must be 1: {self.strides}")
        wrong = [stride for stride in self.strides[:-1] if stride * nbytes % 16 or not 0 <= stride * nbytes < 2**40]
        if wrong or self.offset * nbytes % 16:
            _refuse(f"base and strides must be multiples of 16 bytes: offset {self.offset}, strides {self.strides}")
        if any(size < 1 or size & (size - 1) for size in self.block_shape):
            _refuse(f"the box must consist of powers of two: {self.block_shape}")
        if self.block_shape[-1] * nbytes < 16:
            _refuse(f"a row of the box must have 16 bytes at least: {self.block_shape} of {self.dtype}")
        if not isinstance(layout, NVMMASharedLayout):
            _refuse(f"the layout must be an NVMMASharedLayout, got {layout}")
        if layout.element_bitwidth != self.dtype.primitive_bitwidth:
            _refuse(f"a layout of {layout.element_bitwidth} bits for elements of {self.dtype}")
        if layout.rank is not None and layout.rank != rank:
            _refuse(f"a layout of rank {layout.rank} for a box of rank {rank}")
        if layout.swizzle_byte_width and self.block_shape[-1] * nbytes < layout.swizzle_byte_width:
            _refuse(f"a row of the box {self.block_shape} is shorter than the swizzle of {layout.swizzle_byte_width}")
        if self.padding not in ("zero", "nan") or (self.padding == "nan" and not self.dtype.is_float):
            _refuse(f"padding {self.padding!r} of {self.dtype}; known are zero, and nan for floats")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        # Addresses are taken modulo 2^64: a shape that goes all the way round says nothing, and each box is looked at.
        self.wraps = last * nbytes >= 2**64
        if self.offset < self.buffer.first or (last >= self.buffer.end and not self.wraps):
            _refuse(f"shape {self.shape} with strides {self.strides} reaches beyond the tensor")

    @property
    def handle(self) -> TensorDescriptor:
        """What a kernel's own builtin hands to `_semantic.builder`."""
        return self

    def view(self, flat: Array) -> Array:
        """The described tensor, as a view of a flat array of its storage."""
        # As `as_strided`, at a fifth of its time; bounds were checked when the descriptor was made.
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.ndarray(self.shape, flat.dtype, flat, self.offset * flat.itemsize, steps)

    def footprint(self, box: Box) -> Footprint:
        """The elements of a box that is in bounds."""
        if self.wraps:
            return Footprint.elements(self._elements(box))

        def assign(flat: Array, value: Any) -> None:
            self.view(flat)[box] = value

        return Footprint(lambda flat: self.view(flat)[box], assign)

    def _elements(self, box: Box) -> Array:
        """Where the elements of a box lie, addresses modulo 2^64."""
        nbytes = self.dtype.nbytes
        address = np.full((), self.offset * nbytes, np.uint64)
        for dim, (part, stride) in enumerate(zip(box, self.strides, strict=True)):
            # Of unsigned arrays products and sums are modulo 2^64 themselves.
            steps = np.arange(part.start, part.stop).astype(np.uint64) * np.uint64(stride * nbytes)
            address = address + steps.reshape(-1, *[1] * (len(box) - 1 - dim))
        index: Array = address.view(np.int64) // nbytes
        low, high = int(index.min()), int(index.max())
        if low < self.buffer.first or high >= self.buffer.end:
            first, size = self.buffer.first, self.buffer.end - self.buffer.first
            fail(
                OutOfBoundsError,
                f"a TMA box of elements {low - first} to {high - first} of a tensor of {size} elements",
            )
        return index

    @staticmethod
    def from_tensor(
        tensor: Any, block_shape: Any, layout: NVMMASharedLayout, padding: str = "zero", round_f32_to_tf32: bool = False
    ) -> TensorDescriptor:
        """A descriptor of a whole tensor."""
        return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block_shape, layout, padding, round_f32_to_tf32)


def make_tensor_descriptor(
    base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero"
) -> TensorDescriptor:
    """A descriptor made by the kernel itself."""
    return TensorDescriptor.of_pointer(base, shape, strides, block_shape, layout, padding_option)


def _clip(desc: TensorDescriptor, coord: Any, view: SharedView) -> tuple[Box, Box] | None:
    """The part of the tensor and of the box that is in bounds; None where the box lies wholly outside."""
    if len(coord) != len(desc.shape):
        fail(ShapeError, f"{len(coord)} coordinates for a descriptor of rank {len(desc.shape)}")
    if list(view.data.shape) != desc.block_shape:
        fail(ShapeError, f"a descriptor of box {desc.block_shape}, but shared memory {view}")
    if view.dtype is not desc.dtype:
        fail(ShapeError, f"a descriptor of {desc.dtype}, but shared memory {view} of {view.dtype}")
    if not view.reshaped and view.layout != desc.layout:
        fail(LayoutError, f"a descriptor of layout {desc.layout}, but shared memory of {view.layout}")
    inside, box = [], []
    for position, size, block in zip(coord, desc.shape, desc.block_shape, strict=True):
        start = int(position)
        if not -(2**31) <= start < 2**31:
            fail(OutOfBoundsError, f"TMA coordinate {start} does not fit into int32")
        low, high = max(start, 0), min(start + block, size)
        if low >= high:
            return None
        inside.append(slice(low, high))
        box.append(slice(low - start, high - start))
    return tuple(inside), tuple(box)


def tma_load(tensor_desc: TensorDescriptor, coord: Any, barrier: SharedView, result: SharedView, pred: Any) -> None:
    """Start a load into shared memory that signals the barrier; outside of the tensor it reads the padding."""
    if not pred:
        return
    desc, bar, part = tensor_desc, live(barrier), partition()
    nbytes, clipped = result.data.size * desc.dtype.nbytes, _clip(desc, coord, result)
    access = shared.write(result, "async", "TMA load", (bar.component, IN_FLIGHT))
    result.data[...] = desc.dtype.poison  # until it lands, whatever is read is wrong
    if clipped is not None:
        note = Access(part.world, part.knows.world.tick(part.world), "async", "TMA load", part.name, access.mark)
        footprint = desc.footprint(clipped[0])
        desc.buffer.shadow().read(part.elected_world(), footprint, note)

    def land() -> None:
        if clipped is None:
            result.data[...] = desc.fill
        else:
            box = clipped[1]
            if result.data[box].size != result.data.size:
                result.data[...] = desc.fill
            result.data[box] = decode(footprint.select(desc.buffer.flat), desc.dtype)
        result.written[...] = True
        launch().counters.tma_load_bytes += nbytes
        bar.land(event, nbytes, access)

    event = Event("load", part, land, lambda: str(access))
    bar.loads.append(event)
    launch().scheduler.events.append(event)
    launch().scheduler.point()


Reduce = Callable[[Array, Array], Array]


def tma_store(tensor_desc: TensorDescriptor, coord: Any, src: SharedView, reduce: Reduce | None = None) -> None:
    """Start a store, or an atomic reduction, of shared memory; what lies outside of the tensor is dropped."""
    desc, part, clipped = tensor_desc, partition(), _clip(tensor_desc, coord, src)
    if any(int(position) < 0 for position in coord):
        fail(
            OutOfBoundsError, f"a TMA store at {list(map(int, coord))}: coordinates below 0 are an illegal instruction"
        )
    what = "TMA store" if reduce is None else "TMA reduction"
    part.stores_issued += 1
    part.last_store = here()
    shared.read(src, "async", what, (part.store, part.stores_issued))
    if clipped is not None:
        mark = part.last_store
        adds = reduce is np.add and desc.dtype.is_float
        note = Access(part.world_store, part.stores_issued, "async", what, part.name, mark, reduce is not None, adds)
        footprint = desc.footprint(clipped[0])
        desc.buffer.shadow().write(part.elected_world(), footprint, note)

    def run() -> None:
        launch().counters.tma_store_bytes += src.data.size * desc.dtype.nbytes
        if clipped is None:
            return
        values = src.data[clipped[1]]
        if reduce is not None:
            values = rounded(reduce(decode(footprint.select(desc.buffer.flat), desc.dtype), values), desc.dtype)
        footprint.assign(desc.buffer.flat, encode(values, desc.dtype))

    event = Event("store", part, run, number=part.stores_issued)
    part.stores.append(event)
    launch().scheduler.events.append(event)
    launch().scheduler.point()


def store_wait(pendings: Any, read_only: Any = True) -> None:
    """Wait until all but `pendings` stores have read their source; with `read_only=False`, have written it too.

    Only the thread that issued the stores knows of it, until a barrier of the partition.
    """
    part = partition()
    # All but the latest, whichever of them are done already: a later store may have been faster.
    done = part.stores_issued - int(pendings)
    while late := [event for event in part.stores if event.number <= done]:
        launch().scheduler.perform(late[0])
    part.elected_store = max(part.elected_store, done)
    if not read_only:
        part.elected_written = max(part.elected_written, done)
    if "store-wait" in launch().settings.relax:
        part.knows.seen.raise_to(part.store, part.elected_store)
        part.knows.world.raise_to(part.world_store, part.elected_written)
    launch().scheduler.point()
