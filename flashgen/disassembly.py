"""What the readers of machine code share: instructions, and the loops around matrix products.

A loop is a backward branch; the main loop is an innermost one around the products. A generated forward has two: one for blocks
that every row sees, and a masked one, told by its selects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PRODUCTS = ("hgmma", "hmma", "utcmma", "mfma")  # the classes of tensor-core products
_LEAST_FFMA = 64  # fewer fp32 multiply-adds than this are a softmax, not a product


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a disassembly.

    Attributes:
        address: in bytes, or any number that grows along the program.
        opcode: without modifiers.
        kind: its class (the keys of `CompiledFacts.loop`).
        target: address that a branch goes to, else None.
        ends: whether the program ends here.
        macs: multiply-adds of a tensor-core product, 0 of anything else; None where its shape cannot be read.
        per_block: whether one warp issues it for the whole block; else every warp issues its own share.
    """

    address: int
    opcode: str
    kind: str = "other"
    target: int | None = None
    ends: bool = False
    macs: int | None = 0
    per_block: bool = False


@dataclass(frozen=True, slots=True)
class Loop:
    """One innermost loop around products.

    Attributes:
        counts: instructions by class; `total` counts all.
        warp_macs: multiply-adds of the products that every warp issues; None where a shape cannot be read.
        block_macs: of those that one warp issues for the block; None likewise.
    """

    counts: dict[str, int]
    warp_macs: int | None = 0
    block_macs: int | None = 0

    @property
    def products(self) -> int:
        """Tensor-core products a warp issues in a pass, or fp32 multiply-adds where there are none."""
        return products(self.counts)

    @property
    def selects(self) -> int:
        """Selects a warp issues in a pass: a masked loop has one per score a thread holds."""
        return self.counts.get("select", 0)

    def macs(self, num_warps: int) -> int:
        """Multiply-adds of tensor cores that a block issues in a pass; 0 where there are none or a shape is unreadable."""
        if self.warp_macs is None or self.block_macs is None:
            return 0
        return self.warp_macs * num_warps + self.block_macs


def product_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that hold products, in program order."""
    ends: dict[int, int] = {}  # several branches back to one address are one loop, up to the last of them
    for instruction in instructions:
        start, stop = instruction.target, instruction.address
        if start is None or start > stop:
            continue
        # A retry stub behind the function's end branches back across its end: no loop.
        if not any(i.ends for i in instructions if start <= i.address <= stop):
            ends[start] = max(stop, ends.get(start, stop))
    spans = []
    for start, stop in ends.items():
        body = [i for i in instructions if start <= i.address <= stop]
        if products(count(body)):
            spans.append((start, stop, body))
    innermost = [
        (start, body)
        for start, stop, body in spans
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b, _ in spans)
    ]
    return [_loop(body) for _, body in sorted(innermost, key=lambda span: span[0])]


def count(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each class; `total` counts all."""
    counts = Counter(i.kind for i in instructions)
    return {"total": len(instructions), **{kind: counts[kind] for kind in sorted(counts)}}


def products(counts: dict[str, int]) -> int:
    """Tensor-core products among counted instructions, or fp32 multiply-adds where there are none; 0 for a mere softmax."""
    tensor = sum(counts.get(name, 0) for name in PRODUCTS)
    if tensor:
        return tensor
    fp32 = counts.get("fp32", 0)
    return fp32 if fp32 >= _LEAST_FFMA else 0


def _loop(body: Sequence[Instruction]) -> Loop:
    return Loop(count(body), _total(body, lambda i: not i.per_block), _total(body, lambda i: i.per_block))


def _total(body: Sequence[Instruction], wanted: Callable[[Instruction], bool]) -> int | None:
    macs = [i.macs for i in body if wanted(i)]
    known = [value for value in macs if value is not None]
    return sum(known) if len(known) == len(macs) else None
