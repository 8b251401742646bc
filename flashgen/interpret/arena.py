"""The memory that the caller and the interpreting worker share: guard, tensor, guard, tensor, ..., guard; all that is no input is NaN."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashgen.errors import BuildError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    # Bytes are filled and compared by numpy: torch does it in OpenMP threads, which hang in a forked child.
    Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_GUARD_BYTES = 1 << 16  # of NaN before and after each tensor
_POISON = 0xFF  # NaN in every float dtype when it fills an element
_ALIGN = 256
# A tensor whose elements are spread wider than this (a stride test beyond 2^31) is not filled, copied or checked whole.
_SPARSE_BYTES = 1 << 30


@dataclass(slots=True)
class Slot:
    """One tensor's place in the arena, in bytes."""

    tensor: Tensor
    offset: int
    nbytes: int
    span: int
    output: bool

    @property
    def sparse(self) -> bool:
        return self.nbytes > _SPARSE_BYTES

    @property
    def message(self) -> dict[str, Any]:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return {
            "dtype": dtype,
            "offset": self.offset,
            "span": self.span,
            "shape": list(self.tensor.shape),
            "stride": list(self.tensor.stride()),
        }


def place(tensors: dict[str, Tensor | None], outputs: tuple[str, ...]) -> tuple[dict[str, Slot], int]:
    """Where each tensor goes, and how many bytes all of them take with their guards."""
    slots, end = {}, _GUARD_BYTES
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        span = 0
        if tensor.numel():
            span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        # Same alignment as the caller's tensor, so that a kernel sees what it would see in place.
        offset = end + (tensor.data_ptr() % _ALIGN if span else 0)
        slots[name] = Slot(tensor, offset, span * tensor.element_size(), span, name in outputs)
        end = -(-(offset + slots[name].nbytes + _GUARD_BYTES) // _ALIGN) * _ALIGN
    return slots, end


def fill(memory: Bytes, slots: dict[str, Slot], size: int) -> None:
    """Inputs copied, with what lies between their elements; everything else is NaN."""
    import torch

    for start, stop in _gaps(slots, size):
        memory[start:stop] = _POISON
    for slot in slots.values():
        tensor = slot.tensor.detach()
        if slot.sparse and not slot.output:
            elements(memory, slot, unique=True).copy_(_without_repeats(tensor))
        elif slot.sparse:
            elements(memory, slot).copy_(torch.full((), torch.nan, dtype=tensor.dtype))
        elif slot.output:
            memory[slot.offset : slot.offset + slot.nbytes] = _POISON
        elif slot.span:
            # The whole span, so that what lies between the elements (NaN, in a test) travels too.
            flat = tensor.as_strided((slot.span,), (1,), tensor.storage_offset())
            memory[slot.offset : slot.offset + slot.nbytes] = flat.view(torch.uint8).numpy()


def check_guards(memory: Bytes, slots: dict[str, Slot], size: int, name: str) -> None:
    """Refuse a launch that wrote outside its outputs; copy them before, since it poisons them.

    Raises:
        BuildError: says how many bytes, and where.
    """
    import torch

    for key, slot in slots.items():
        if slot.output and slot.span and not slot.sparse:
            # Where writing was allowed the poison is put back; whatever differs now was written between elements.
            bits = _bits(memory, slot)
            bits.fill_(0xFF if bits.dtype == torch.uint8 else -1)  # all ones
            touched = int((memory[slot.offset : slot.offset + slot.nbytes] != _POISON).sum())
            if touched:
                raise BuildError(f"{name} wrote {touched} bytes between the elements of {key}, outside its rows.")
    edges = list(slots.items())
    for index, (start, stop) in enumerate(_gaps(slots, size)):
        wrong = (memory[start:stop] != _POISON).nonzero()[0]
        if len(wrong):
            after = f"after the end of {edges[index - 1][0]}" if index else ""
            before = f"before the start of {edges[index][0]}" if index < len(edges) else ""
            place = " and ".join(filter(None, (after, before)))
            raise BuildError(
                f"{name} wrote {len(wrong)} bytes outside every tensor, {place} (the first at byte {wrong[0]} there)."
            )


def _gaps(slots: dict[str, Slot], size: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for slot in slots.values() for edge in (slot.offset, slot.offset + slot.nbytes)), size]
    return list(zip(edges[::2], edges[1::2], strict=True))


def elements(memory: Bytes, slot: Slot, *, unique: bool = False) -> Tensor:
    """The tensor as it lies in the arena; `unique`: without its broadcast repetitions."""
    import torch

    tensor = slot.tensor.detach()
    like = _without_repeats(tensor) if unique else tensor
    if not slot.span:
        return torch.empty_like(like)
    flat = torch.from_numpy(memory[slot.offset : slot.offset + slot.nbytes]).view(tensor.dtype)
    return flat.as_strided(like.shape, like.stride())


def _bits(memory: Bytes, slot: Slot) -> Tensor:
    """The elements as integers."""
    import torch

    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[slot.tensor.element_size()]
    flat = torch.from_numpy(memory[slot.offset : slot.offset + slot.nbytes]).view(kind)
    return flat.as_strided(slot.tensor.shape, slot.tensor.stride())


def _without_repeats(tensor: Tensor) -> Tensor:
    for dim, step in enumerate(tensor.stride()):
        if step == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def checksum(memory: Bytes, slot: Slot) -> int:
    """Of a tensor with its gaps; 0 for one that is too wide to be read whole."""
    if slot.sparse:
        return 0
    return zlib.crc32(memory[slot.offset : slot.offset + slot.nbytes].data)
