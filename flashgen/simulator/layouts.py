"""Layouts carry no numbers here: they are compared where Gluon demands the same one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from flashgen.simulator.dtypes import DType
from flashgen.simulator.errors import LayoutError
from flashgen.simulator.sites import here


class Layout:
    """A layout: its class and its fields, by value.

    Attributes:
        FIELDS: names of the positional fields, in Triton's order.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **fields: Any) -> None:
        given = {**dict(zip(self.FIELDS, args, strict=False)), **fields}
        unknown = set(given) - set(self.FIELDS)
        if len(args) > len(self.FIELDS) or unknown:
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.FIELDS)}; got {args} {fields}")
        for name in self.FIELDS:
            setattr(self, name, given.get(name))
        self.key = (type(self).__name__, *((name, str(given[name])) for name in self.FIELDS if given.get(name)))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{self.key[0]}({', '.join(f'{name}={value}' for name, value in self.key[1:])})"


class AutoLayout(Layout):
    """Inferred by the compiler."""


class CoalescedLayout(Layout):
    """Chosen by the compiler for coalesced accesses."""


class BlockedLayout(Layout):
    """Registers dealt out in blocks."""

    FIELDS = ("size_per_thread", "threads_per_warp", "warps_per_cta", "order", "cga_layout")


class SliceLayout(Layout):
    """A layout with one dimension taken out."""

    FIELDS = ("dim", "parent")
    dim: int
    parent: Layout


class DotOperandLayout(Layout):
    """A register operand of a matrix product."""

    FIELDS = ("operand_index", "parent", "k_width")
    operand_index: int
    parent: Layout


class NVMMADistributedLayout(Layout):
    """The accumulator of a tensor core product."""

    FIELDS = ("version", "warps_per_cta", "instr_shape", "cga_layout")


class DistributedLinearLayout(Layout):
    """Registers by linear bases."""

    FIELDS = ("reg_bases", "lane_bases", "warp_bases", "block_bases", "shape")


class SwizzledSharedLayout(Layout):
    """Shared memory with the swizzle of ordinary loads."""

    FIELDS = ("vec", "per_phase", "max_phase", "order", "cga_layout")


class PaddedSharedLayout(Layout):
    """Shared memory with padding."""

    FIELDS = ("interval_padding_pairs", "offset_bases", "cga_layout", "shape", "block_bases")


class SharedLinearLayout(Layout):
    """Shared memory by linear bases."""

    FIELDS = ("offset_bases", "block_bases", "alignment")


class MBarrierLayout(Layout):
    """Shared memory of mbarriers."""

    FIELDS = ("cga_layout",)


class NVMMASharedLayout(Layout):
    """Shared memory as TMA and wgmma swizzle it."""

    FIELDS = ("swizzle_byte_width", "element_bitwidth", "rank", "transposed", "fp4_padded", "cga_layout")
    swizzle_byte_width: int
    element_bitwidth: int
    rank: int | None

    @staticmethod
    def get_default_for(
        block_shape: Any, dtype: DType, transposed: bool = False, fp4_padded: bool = False, cga_layout: Any = None
    ) -> NVMMASharedLayout:
        """The widest swizzle that divides the inner dimension; none where fewer than eight rows would share it."""
        shape = [int(size) for size in block_shape]
        if transposed:
            shape = [*shape[1:], *shape[:1]]
        inner = shape[-1] * dtype.primitive_bitwidth // 8
        swizzle = next((width for width in (128, 64, 32) if inner >= width and inner % width == 0), 0)
        if len(shape) < 2 or math.prod(shape[:-1]) < 8:
            swizzle = 0
        return NVMMASharedLayout(
            swizzle_byte_width=swizzle,
            element_bitwidth=dtype.primitive_bitwidth,
            rank=len(shape),
            transposed=transposed,
            fp4_padded=fp4_padded,
        )


def inferred(layout: Layout | None) -> bool:
    """Whether the compiler is free to choose the layout."""
    return layout is None or isinstance(layout, (AutoLayout, CoalescedLayout))


def common(a: Layout | None, b: Layout | None) -> Layout | None:
    """The layout of two operands' result.

    Raises:
        LayoutError: both are fixed, and they differ.
    """
    if inferred(a):
        return b
    if inferred(b) or a == b:
        return a
    site = here().site()
    raise LayoutError(f"operands have different layouts: {a} and {b}\n    at {site}", sites=(site,))
