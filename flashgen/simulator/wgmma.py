"""Asynchronous products of a warpgroup: A from registers or shared memory, B from shared memory, fp32 accumulators."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashgen.simulator import shared
from flashgen.simulator.context import fail, launch, partition
from flashgen.simulator.dtypes import float32
from flashgen.simulator.errors import AccumulatorError, LayoutError, ShapeError
from flashgen.simulator.layouts import DotOperandLayout, NVMMADistributedLayout
from flashgen.simulator.schedule import Event
from flashgen.simulator.shared import SharedView
from flashgen.simulator.sites import here
from flashgen.simulator.tensors import Accumulator, Tensor, plain

WARPGROUP = 4  # warps


def warpgroup_mma_init(value: Any) -> Any:
    """An accumulator from a tensor."""
    return value


def warpgroup_mma(
    a: Any,
    b: Any,
    acc: Any,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: Any = False,
) -> Any:
    """Start acc + a @ b; products of a partition complete in order."""
    part, mark = partition(), here()
    plain(a, b)
    if not isinstance(b, SharedView):
        fail(ShapeError, "operand b of a wgmma must lie in shared memory")
    shape = acc.block if isinstance(acc, Accumulator) else tuple(acc.values.shape)
    (m, k), (rows, n) = tuple(a.shape), b.data.shape
    if k != rows or shape != (m, n):
        fail(ShapeError, f"wgmma of [{m}, {k}] times [{rows}, {n}] into {list(shape)}")
    if part.num_warps % 4 or m % 64 or n % 8 or k % 16:
        fail(
            ShapeError,
            f"wgmma of m {m}, n {n}, k {k} by {part.num_warps} warps: they are multiples of 64, 8, 16 and 4",
        )
    if a.dtype is not b.dtype or not a.dtype.narrow:
        fail(ShapeError, f"wgmma of {a.dtype} and {b.dtype}: both must be float16 or both bfloat16")
    layout = acc.layout
    if not isinstance(layout, NVMMADistributedLayout):
        fail(LayoutError, f"the accumulator of a wgmma has layout {layout}, not an NVMMADistributedLayout")
    if isinstance(a, Tensor) and not (
        isinstance(a.layout, DotOperandLayout) and a.layout.operand_index == 0 and a.layout.parent == layout
    ):
        fail(
            LayoutError, f"operand a of a wgmma in registers has layout {a.layout}, not a DotOperandLayout of {layout}"
        )
    if isinstance(acc, Accumulator) and acc.owner is not part:
        fail(AccumulatorError, "the accumulator belongs to another partition")
    part.products_issued += 1
    part.last_product = mark
    for operand in (a, b):
        if isinstance(operand, SharedView):
            shared.read(operand, "async", "wgmma", (part.product, part.products_issued))
    result = Accumulator(part, part.products_issued, shape, layout, mark)

    def run() -> None:
        product = np.matmul(a.data if isinstance(a, SharedView) else a.values, b.data)
        if use_acc:
            start: Any = acc.value if isinstance(acc, Accumulator) else acc
            product += start.values
        result.value = Tensor(product, float32, layout)
        launch().counters.products += 1

    part.products.append(Event("wgmma", part, run))
    return result if is_async else warpgroup_mma_wait(0, (result,))


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    """Wait until at most `num_outstanding` products are in flight; returns the values of those that are done.

    Each warpgroup waits for its own: in a partition of several, what the others read is over once all have met.
    """
    if deps is None:
        fail(AccumulatorError, "warpgroup_mma_wait needs deps: the accumulators it hands out")
    part, left = partition(), int(num_outstanding)
    launch().scheduler.point()
    while len(part.products) > left:
        launch().scheduler.perform(part.products[0])
    done = part.products_waited = max(part.products_waited, part.products_issued - left)
    if part.num_warps <= WARPGROUP:
        part.knows.seen.raise_to(part.product, done)
    values = tuple(
        dep.value if isinstance(dep, Accumulator) and dep.owner is part and dep.sequence <= done else dep
        for dep in deps
    )
    return values[0] if len(values) == 1 else values
