"""Reads NVIDIA machine code: where the main loop is, and which instructions one warp issues in a pass of it.

The input is `cuobjdump -sass` of a cubin. Products are UTCHMMA on sm_100 (one instruction of one thread for the whole block,
accumulators in tensor memory), HGMMA on sm_90 (four warps together), HMMA on sm_80 to sm_89 and on sm_120, and FFMA where fp32 is
multiplied on the CUDA cores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashgen.disassembly import Instruction, Loop, product_loops

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
# Scheduling notes that cuobjdump 12.9 and newer may print before the semicolon of code for sm_120: `&req={0} ?trans1`.
_SCHEDULING = re.compile(r"\s+[&?][A-Za-z].*$")
_BRANCH = re.compile(r"0x([0-9a-f]+)\s*$")

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
    "tensor_memory": ("LDTM", "STTM", "UTCCP"),
    "async_copy": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "global": ("LDG", "STG"),
    "spill": ("LDL", "STL"),
    "barrier": ("BAR", "WARPSYNC", "SYNCS", "UTCBAR"),
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes}
_UNIFORM = re.compile(r"UR(\d+)(?:\.\w+)*")
_PREDICATE = re.compile(r"!?U?P(?:\d|T)")
_ANY_UNIFORM = re.compile(r"\bUR(\d+)\b")
_GDESC = re.compile(r"gdesc\[UR(\d+)\]")
_IDESC = re.compile(r"idesc\[UR(\d+)\]")
_IMMEDIATE = re.compile(r"UMOV(?:\.32)? UR(\d+), 0x([0-9a-f]+)")
# Their first operand is a register they read.
_UNIFORM_READERS = ("BRX", "BRXU", "JMX", "JMXU", "CALL", "RET", "USETMAXREG", "NANOSLEEP", "SETCTAID", "WARPSYNC")
_NO_REGISTER_WRITTEN = ("SETP", "PLOP3")  # predicates only
_MASKED_SELECTS = 8  # a masked loop selects once per score a thread holds, an unmasked one hardly ever
_COPY = re.compile(r"UMOV(?:\.32)? UR(\d+), UR(\d+)")
_MMA_SHAPE = re.compile(r"\.(\d{4,5})\b")
_GMMA_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_MMA_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


@dataclass(frozen=True, slots=True)
class _Line:
    address: int
    opcode: str  # with modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def text(self) -> str:
        return f"{self.opcode} {self.operands}".strip()


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in order."""
    found = []
    immediates: dict[int, int] = {}  # of uniform registers, as last written above
    for line in _lines(text):
        moved = _IMMEDIATE.fullmatch(line.text)
        if moved:
            immediates[int(moved[1])] = int(moved[2], 16)
        elif (written := _uniform_written(line)) is not None:
            immediates.pop(written, None)
        branch = _BRANCH.search(line.operands) if line.name == "BRA" else None
        kind = _CLASS_OF.get(line.name, "other")
        found.append(
            Instruction(
                address=line.address,
                opcode=line.name,
                kind=kind,
                target=int(branch[1], 16) if branch else None,
                ends=line.name == "EXIT",
                macs=_macs(kind, line, immediates),
                per_block=kind == "utcmma",
            )
        )
    return found


def masked(loop: Loop) -> bool:
    """Whether a loop masks scores."""
    return loop.selects > _MASKED_SELECTS


def main_loop(text: str) -> Loop | None:
    """The unmasked main loop (the masked one where there is no other); None where no loop holds products."""
    loops = product_loops(parse(text))
    return max(loops, key=lambda loop: (not masked(loop), loop.products), default=None)


def undefined_registers(text: str) -> list[str]:
    """Uniform registers that an instruction reads though nothing above it wrote them: a miscompiled kernel.

    Code runs from the top, so a first read above the first write cannot be meant. HGMMA's `gdesc[URn]` with the first operand in
    registers reads n + 2 and n + 3.

    A register that is borrowed (MOV.SPILL, later R2UR.FILL) or copied (UMOV) may hold nothing yet: that is no use of it, and
    whoever uses what was restored or copied from it is found instead.

    Returns:
        The offending lines, shortened; empty for sound code.
    """
    written: set[int] = set()
    empty: set[str] = set()  # registers that hold a saved nothing
    found = []
    for line in _lines(text):
        target = _uniform_written(line)
        if line.opcode == "MOV.SPILL" and target is None:
            into, _, saved = line.operands.partition(", UR")
            (empty.discard if saved.isdigit() and int(saved) in written else empty.add)(into)
            continue
        copied = _COPY.fullmatch(line.text)
        if copied and int(copied[2]) not in written:  # nothing is copied: whoever uses the copy is the one at fault
            written.discard(int(copied[1]))
            continue
        if line.opcode == "R2UR.FILL" and line.operands.rpartition(", ")[2] in empty:
            continue
        read = [int(n) for n in _ANY_UNIFORM.findall(line.operands)]
        if target is not None:
            read.remove(target)  # its first mention is the write
        if line.name == "HGMMA":
            read = [int(n) + extra for n in _GDESC.findall(line.operands) for extra in (2, 3)]
        found += [f"{line.address:04x}: {line.text}" for n in read if n not in written][:1]
        if target is not None:
            written |= set(range(target, target + _width(line.opcode)))
    return found


def _lines(text: str) -> list[_Line]:
    matches = (_LINE.match(line) for line in text.splitlines())
    return [
        _Line(int(match["address"], 16), match["opcode"], _SCHEDULING.sub("", match["operands"]).strip())
        for match in matches
        if match is not None
    ]


def _uniform_written(line: _Line) -> int | None:
    """The (first) uniform register that an instruction writes: its first operand after predicates, not in brackets."""
    if line.name in _UNIFORM_READERS or line.name.endswith(_NO_REGISTER_WRITTEN):
        return None
    for operand in line.operands.split(","):
        if _PREDICATE.fullmatch(operand.strip()):
            continue
        match = _UNIFORM.fullmatch(operand.strip())
        return int(match[1]) if match else None
    return None


def _width(opcode: str) -> int:
    """Registers an instruction writes."""
    for suffix, width in ((".256", 8), (".128", 4), (".64", 2), ("WIDE", 2)):
        if suffix in opcode:
            return width
    return 1


def _macs(kind: str, line: _Line, immediates: dict[int, int]) -> int | None:
    """Multiply-adds of one product as one warp issues it; of UTCHMMA, for the whole block."""
    if kind == "hmma":
        shape = _MMA_SHAPE.search(line.opcode)
        return _MMA_SHAPES.get(shape[1]) if shape else None
    if kind == "hgmma":
        gmma = _GMMA_SHAPE.search(line.opcode)
        return int(gmma[1]) * int(gmma[2]) * int(gmma[3]) // 4 if gmma else None
    if kind == "utcmma":
        # The shape stands in the instruction descriptor: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28 (PTX ISA,
        # tcgen05 instruction descriptor). The depth of a 16-bit product is 16.
        register = _IDESC.search(line.operands)
        descriptor = immediates.get(int(register[1])) if register else None
        if descriptor is None or line.name != "UTCHMMA" or ".2CTA" in line.opcode:
            return None
        return (descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8 * 16
    return 0
