"""Atomics on global memory: what orders one CTA after another.

A release publishes what the partition knows at the element; an acquire of that element learns it, through any number
of read-modify-writes in between (a release sequence). Threads of a partition publish what the other threads of theirs
have done only after a barrier. Blocks of more than `ORDERED_ELEMENTS` pointers are taken as relaxed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashgen.simulator import context
from flashgen.simulator.context import fail, partition
from flashgen.simulator.dtypes import Array, decode, encode, int1, rounded
from flashgen.simulator.errors import LayoutError, ShapeError
from flashgen.simulator.global_memory import Footprint, Pointer, layout_of, note
from flashgen.simulator.layouts import NVMMADistributedLayout
from flashgen.simulator.order import VectorClock
from flashgen.simulator.scalars import scalar
from flashgen.simulator.sites import here
from flashgen.simulator.tensors import Tensor, plain

ORDERED_ELEMENTS = 1024
_SEMANTICS = {None: "acq_rel", "acquire": "acquire", "release": "release", "acq_rel": "acq_rel", "relaxed": "relaxed"}


def _semantics(sem: Any, default: str = "acq_rel") -> tuple[bool, bool]:
    """Whether an access acquires, and whether it releases."""
    name = default if sem is None else str(sem)
    if name not in _SEMANTICS:
        fail(ShapeError, f"memory semantics {sem!r}; known are acquire, release, acq_rel and relaxed")
    return name in ("acquire", "acq_rel"), name in ("release", "acq_rel")


def _published() -> VectorClock:
    """What the running partition's elected thread can vouch for."""
    part = partition()
    clock = part.knows.world.copy()
    if part.unsettled is not None:
        clock.values[part.world] = min(clock[part.world], part.unsettled - 1)
    return clock


def _combine(name: str, op: Callable[[Array, Array], Array]) -> Callable[..., Any]:
    def atomic(pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Any:
        return _modify(name, pointer, val, mask, sem, op)

    atomic.__name__ = name
    return atomic


def _turns(elements: Array) -> list[Any]:
    """Which updates can be done at once: all where no element comes twice, else each element's first ones, then its second ones, ..."""
    if elements.size == 1:
        return [slice(None)]
    order = np.argsort(elements, kind="stable")
    first = np.flatnonzero(np.diff(elements[order], prepend=elements[order[0]] - 1))
    if first.size == elements.size:
        return [slice(None)]
    before = np.arange(elements.size) - np.repeat(first, np.diff(first, append=elements.size))
    by_turn = np.argsort(before, kind="stable")
    return np.split(order[by_turn], np.cumsum(np.bincount(before))[:-1])


def _modify(name: str, pointer: Pointer, val: Any, mask: Any, sem: Any, op: Callable[[Array, Array], Array]) -> Any:
    plain(val)
    context.launch().scheduler.point(yields=True)
    acquires, releases = _semantics(sem)
    index, keep = pointer.resolve(mask)
    if (
        index.ndim > 1
        and 1 in index.shape
        and index.size > 1
        and isinstance(layout_of(pointer), NVMMADistributedLayout)
    ):
        shape = list(index.shape)
        why = f"{name} of a tensor of {shape} in {layout_of(pointer)}: each register that holds a replica adds (an H200, Triton 3.6)"
        fail(LayoutError, why)
    buffer, dtype = pointer.buffer, pointer.buffer.dtype
    shadow, part = buffer.shadow(), partition()
    values = np.broadcast_to(rounded(val.values if isinstance(val, Tensor) else np.asarray(val), dtype), index.shape)
    old = decode(buffer.flat[index if keep is None else np.where(keep, index, buffer.first)], dtype)
    used, given = (index, values) if keep is None else (index[keep], values[keep])
    elements = np.atleast_1d(used).ravel()
    ordered = elements.tolist() if elements.size <= ORDERED_ELEMENTS else []
    if acquires:
        for element in ordered:
            if element in shadow.sync:
                part.knows.world.join(shadow.sync[element])
    scheduler, changed = context.launch().scheduler, elements.size != 1
    if elements.size:
        adds = name == "atomic_add" and dtype.is_float
        access = note(name, block=index.ndim > 0, atomic=True, adds=adds)
        shadow.write(part.knows.world, Footprint.elements(used), access)
        if releases:
            published = _published()
            for element in ordered:
                shadow.sync.setdefault(element, VectorClock()).join(published)
        operands = np.atleast_1d(given).ravel()
        for turn in _turns(elements):
            place = elements[turn]
            raw = buffer.flat[place]
            new = encode(rounded(op(decode(raw, dtype), operands[turn]), dtype), dtype)
            changed |= bool(new[0] != raw[0])
            buffer.flat[place] = new
    # What waits reads by an atomic, or tries to take; a maximum or a sum that happens to change nothing is work, and ends.
    if not changed and (name in _TAKES or (not dtype.is_float and given.ravel()[0] == _READS.get(name))):
        scheduler.polled((buffer.key, int(elements[0])))
    else:
        scheduler.changed()
    if index.ndim == 0:
        return scalar(old[()], dtype)
    return Tensor(old, dtype, layout_of(pointer))


_READS = {"atomic_add": 0, "atomic_or": 0, "atomic_xor": 0, "atomic_and": -1}  # operands that change no integer
_TAKES = ("atomic_xchg", "atomic_cas")
atomic_add = _combine("atomic_add", np.add)
atomic_max = _combine("atomic_max", np.maximum)
atomic_min = _combine("atomic_min", np.minimum)
atomic_and = _combine("atomic_and", np.bitwise_and)
atomic_or = _combine("atomic_or", np.bitwise_or)
atomic_xor = _combine("atomic_xor", np.bitwise_xor)
atomic_xchg = _combine("atomic_xchg", lambda old, new: new)


def atomic_cas(pointer: Pointer, cmp: Any, val: Any, sem: Any = None, scope: Any = None) -> Any:
    """Store `val` where the element equals `cmp`; returns what stood there."""
    expected = cmp.values if isinstance(cmp, Tensor) else np.asarray(cmp)
    return _modify("atomic_cas", pointer, val, None, sem, lambda old, new: np.where(old == expected, new, old))


def _observe(name: str, pointer: Pointer, mask: Any, acquires: bool) -> tuple[Array, Array]:
    """Read atomically; returns values and flat indices."""
    index, keep = pointer.resolve(mask)
    buffer, part = pointer.buffer, partition()
    shadow = buffer.shadow()
    used = index if keep is None else index[keep]
    if acquires:
        for element in np.atleast_1d(used).ravel().tolist():
            if element in shadow.sync:
                part.knows.world.join(shadow.sync[element])
    if used.size:
        access = note(name, block=index.ndim > 0, atomic=True)
        shadow.read(part.knows.world, Footprint.elements(used), access)
    if used.size == 1:
        context.launch().scheduler.polled((buffer.key, int(np.ravel(used)[0])))
    safe = index if keep is None else np.where(keep, index, buffer.first)
    return decode(buffer.flat[safe], buffer.dtype), index


def atomic_load(pointer: Pointer, mask: Any = None, sem: Any = None, scope: Any = None) -> Any:
    """Read atomically, acquiring unless relaxed."""
    context.launch().scheduler.point(yields=True)
    values, index = _observe("atomic_load", pointer, mask, _semantics(sem, "acquire")[0])
    return scalar(values[()], pointer.buffer.dtype) if index.ndim == 0 else Tensor(values, pointer.buffer.dtype)


def atomic_store(pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> None:
    """Write atomically, releasing unless relaxed."""
    _modify("atomic_store", pointer, val, mask, sem or "release", lambda old, new: new)


def atomic_poll(
    pointer: Pointer, expected_value: Any, sem: Any = None, scope: Any = None, timeout_ns: Any = None
) -> Any:
    """Wait until the element equals the expected value."""
    buffer, mark = pointer.buffer, here()
    index, _ = pointer.resolve(None)
    wanted = expected_value.values if isinstance(expected_value, Tensor) else expected_value

    def ready() -> bool:
        return bool(np.all(decode(buffer.flat[index], buffer.dtype) == wanted))

    context.launch().scheduler.point(ready, lambda: (f"polls for {wanted}", mark))
    values, _ = _observe("atomic_poll", pointer, None, _semantics(sem, "acquire")[0])
    return True if index.ndim == 0 else Tensor(np.ones(values.shape, np.bool_), int1)
