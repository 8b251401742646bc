"""Reads NVIDIA machine code: where the main loop is, and which instructions one warp issues in a pass of it.

The input is `cuobjdump -sass` of a cubin. A loop is a backward branch; the main loop is an innermost one around the
products (HGMMA on Hopper, HMMA before, FFMA where fp32 is multiplied on the CUDA cores). A generated forward has two: one for
blocks that every row sees, and a masked one, told by its selects.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")

# Which pipe an opcode occupies; what is not listed only takes an issue slot.
_CLASSES: dict[str, tuple[str, ...]] = {
    "hgmma": ("HGMMA", "QGMMA"),
    "hmma": ("HMMA", "IMMA"),
    "utcmma": ("UTCHMMA", "UTCQMMA"),
    "mufu": ("MUFU",),
    "fp32": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
    "select": ("FSEL", "SEL"),
    "alu": ("FMNMX", "FMNMX3", "FSETP", "ISETP", "IADD3", "LOP3", "SHF", "PRMT", "F2FP", "VIADD", "LEA", "PLOP3"),
    "shuffle": ("SHFL",),
    "shared": ("LDS", "LDSM", "STS", "STSM"),
    "async_copy": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "global": ("LDG", "STG"),
    "spill": ("LDL", "STL"),
    "barrier": ("BAR", "WARPSYNC", "SYNCS"),
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes}
_UNIFORM = re.compile(r"UR(\d+)")
_ANY_UNIFORM = re.compile(r"\bUR(\d+)\b")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
_UNIFORM_WRITERS = ("R2UR", "S2UR", "VOTEU", "REDUX")
_MASKED_SELECTS = 8  # a masked loop selects once per score a thread holds, an unmasked one hardly ever
_LEAST_FFMA = 64  # fewer fp32 multiply-adds than this are a softmax, not a product


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    opcode: str
    target: int | None


@dataclass(frozen=True, slots=True)
class Loop:
    """One innermost loop around products."""

    counts: dict[str, int]

    @property
    def masked(self) -> bool:
        """Whether it masks scores."""
        return self.counts.get("select", 0) > _MASKED_SELECTS

    @property
    def products(self) -> int:
        """Tensor-core products a warp issues in a pass, or fp32 multiply-adds where there are none."""
        return _products(self.counts)


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        opcode = match["opcode"].split(".")[0]
        target = _TARGET.search(match["operands"].strip()) if opcode == "BRA" else None
        found.append(Instruction(int(match["address"], 16), opcode, int(target[1], 16) if target else None))
    return found


def product_loops(instructions: list[Instruction]) -> list[Loop]:
    """The innermost loops that hold products, in program order."""
    spans = []
    for instruction in instructions:
        if instruction.target is None or instruction.target > instruction.address:
            continue
        body = [i for i in instructions if instruction.target <= i.address <= instruction.address]
        # A retry stub behind the function's end branches back across an EXIT: no loop.
        if any(i.opcode == "EXIT" for i in body):
            continue
        counts = count(body)
        if _products(counts):
            spans.append((instruction.target, instruction.address, counts))
    innermost = [
        (start, counts)
        for start, stop, counts in spans
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b, _ in spans)
    ]
    return [Loop(counts) for _, counts in sorted(innermost, key=lambda span: span[0])]


def main_loop(text: str) -> dict[str, int]:
    """Instruction counts by class of the unmasked main loop (of the masked one where there is no other), or {}."""
    loops = product_loops(parse(text))
    if not loops:
        return {}
    return max(loops, key=lambda loop: (not loop.masked, loop.products)).counts


def undefined_registers(text: str) -> list[str]:
    """Uniform registers that an instruction reads though nothing above it wrote them: a miscompiled kernel.

    Code runs from the top, so a first read above the first write cannot be meant. HGMMA's `gdesc[URn]` with the first operand in
    registers reads n + 2 and n + 3.

    Returns:
        The offending lines, shortened; empty for sound code.
    """
    written: set[int] = set()
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        opcode, operands = match["opcode"], [operand.strip() for operand in match["operands"].split(",")]
        name = opcode.split(".")[0]
        target = _UNIFORM.fullmatch(operands[0])
        writes = target is not None and (name.startswith("U") or name in _UNIFORM_WRITERS)
        read = [int(n) for operand in operands[1 if writes else 0 :] for n in _ANY_UNIFORM.findall(operand)]
        if name == "HGMMA":
            read = [int(n) + extra for n in _DESCRIPTOR.findall(match["operands"]) for extra in (2, 3)]
        found += [
            f"{match['address']}: {line.split('*/', 1)[1].split(';')[0].strip()}" for n in read if n not in written
        ][:1]
        if writes and target is not None:
            width = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
            written |= set(range(int(target[1]), int(target[1]) + width))
    return found


def count(instructions: list[Instruction]) -> dict[str, int]:
    """How many instructions of each class; `total` counts all."""
    counts = Counter(_CLASS_OF.get(i.opcode, "other") for i in instructions)
    return {"total": len(instructions), **{name: counts[name] for name in (*_CLASSES, "other") if counts[name]}}


def _products(counts: dict[str, int]) -> int:
    tensor = sum(counts.get(name, 0) for name in ("hgmma", "hmma", "utcmma"))
    if tensor:
        return tensor
    fp32 = counts.get("fp32", 0)
    return fp32 if fp32 >= _LEAST_FFMA else 0
