"""Reads AMD's assembly: the resources of a kernel, its main loop, and which instructions one wavefront issues in a pass of it.

The input is what Triton calls `amdgcn`: LLVM's assembly with the kernel's metadata below it. Classes have the names of
`flashgen.sass` where they mean the same: `mufu` is the transcendental unit, `shared` the LDS, `shuffle` whatever crosses lanes, `spill`
scratch memory. `mfma` are the products on the matrix cores, `scalar` what runs once per wavefront beside the vector pipes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashgen.disassembly import Instruction, Loop, product_loops

_LABEL = re.compile(r"^(?P<label>[.\w$]+):")
_LINE = re.compile(r"^\s+(?P<opcode>[a-z][a-z0-9_]*)(?:\s+(?P<operands>[^;]*))?")
_MFMA = re.compile(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_")
_FOLDED = re.compile(r"(\d+)-byte Folded (Spill|Reload)")
_METADATA = {
    "vgprs": re.compile(r"^\s+\.vgpr_count:\s+(\d+)", re.MULTILINE),
    "agprs": re.compile(r"^\s+(?:- )?\.agpr_count:\s+(\d+)", re.MULTILINE),
    "sgprs": re.compile(r"^\s+\.sgpr_count:\s+(\d+)", re.MULTILINE),
    "scratch_bytes": re.compile(r"^\s+\.private_segment_fixed_size:\s+(\d+)", re.MULTILINE),
}

# In order: the first pattern that an opcode matches says its class.
_CLASSES = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("mfma", r"v_s?mfma"),
        ("mufu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
        ("shuffle", r"ds_b?permute|ds_swizzle|v_permlane|v_\w+_dpp$"),
        ("fp32", r"v_(pk_)?(fma|fmac|fmaak|fmamk|mul|add|sub|subrev|mac|mad)(_legacy)?_f32"),
        ("select", r"v_cndmask"),
        ("accumulator_move", r"v_accvgpr_"),
        ("alu", r"v_"),
        ("spill", r"scratch_"),
        ("async_copy", r"(global|buffer)_load_lds"),
        ("shared", r"ds_"),
        ("global", r"(global|buffer|flat)_"),
        ("barrier", r"s_barrier"),
        ("wait", r"s_waitcnt"),
        ("scalar", r"s_"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the metadata says of one lane, and what the compiler noted at its spills.

    Attributes:
        vgprs: vector registers, accumulation registers included (one file on CDNA 2 and 3).
        agprs: those of them that are accumulation registers.
        sgprs: scalar registers of a wavefront.
        scratch_bytes: private memory of a lane.
        spill_store_bytes, spill_load_bytes: written to and read from it where registers ran out, over the whole text.
    """

    vgprs: int
    agprs: int
    sgprs: int
    scratch_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def resources(text: str) -> Resources:
    """The resources of the kernel.

    Raises:
        ValueError: the text has no metadata of a kernel.
    """
    found = {}
    for name, pattern in _METADATA.items():
        match = pattern.search(text)
        if match is None:
            raise ValueError(f"no {name} in the assembly's metadata")
        found[name] = int(match[1])
    folded = [(int(size), what) for size, what in _FOLDED.findall(text)]
    return Resources(
        **found,
        spill_store_bytes=sum(size for size, what in folded if what == "Spill"),
        spill_load_bytes=sum(size for size, what in folded if what == "Reload"),
    )


def parse(text: str) -> list[Instruction]:
    """The instructions of an assembly text, in order; addresses are line numbers."""
    lines = text.splitlines()
    labels = {match["label"]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    found = []
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            continue
        opcode, operands = match["opcode"], (match["operands"] or "").strip()
        kind = _kind(opcode, operands)
        if kind is None:
            continue
        found.append(
            Instruction(
                address=number,
                opcode=opcode,
                kind=kind,
                target=labels.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None,
                ends=opcode == "s_endpgm",
                macs=_macs(opcode) if kind == "mfma" else 0,
            )
        )
    return found


def main_loop(text: str) -> Loop | None:
    """The loop with the fewest selects per product, the unmasked one; None where no loop holds products.

    A number of selects tells nothing here: Triton rounds to bf16 with one per value, masked or not.
    """
    return min(product_loops(parse(text)), key=lambda loop: loop.selects / loop.products, default=None)


def _kind(opcode: str, operands: str) -> str | None:
    if opcode.startswith("buffer_load") and operands.endswith(" lds"):
        return "async_copy"
    return next((name for name, pattern in _CLASSES if pattern.match(opcode)), None)


def _macs(opcode: str) -> int | None:
    """Multiply-adds of one wavefront's product: M x N x K, times the blocks it holds."""
    shape = _MFMA.match(opcode)
    if shape is None:
        return None
    return int(shape[1]) * int(shape[2]) * int(shape[3]) * int(shape[4] or 1)
