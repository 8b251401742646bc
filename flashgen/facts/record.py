"""What the compiler says about one configuration, as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashgen.config import Tunable

Strides = Mapping[str, int]  # a kernel's stride parameter -> elements
Constants = Mapping[str, Tunable | None]  # a kernel's parameter -> what it is compiled with


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledFacts:
    """What the compiler says about one configuration.

    A thread is a lane, a warp a wavefront on AMD.

    Attributes:
        arch: e.g. `sm_90`, `gfx942`.
        triton_version: which compiled it.
        n_regs: registers of a thread; on gfx942 vector registers, accumulation registers included (one file of 512).
        spill_store_bytes, spill_load_bytes: of a thread, over the whole kernel.
        stack_bytes: local (private) memory of a thread.
        smem_bytes: shared memory (LDS) of a block, exact.
        num_warps: warps of a block.
        serialised: whether ptxas warned (C7510 to C7519) that it serialised asynchronous products; always false elsewhere.
        undefined_registers: instructions that read a register nothing wrote (`sass.undefined_registers`): miscompiled. Not
            looked for on AMD, where it is 0.
        loop: instructions of one warp in one pass of the unmasked main loop (of a backward, that of dK/dV), by class (`flashgen.sass`, `flashgen.gcn`); UTCHMMA
            (`utcmma`) is issued by one warp for the whole block. Empty where no loop was found.
        compile_s: seconds it took.
        loop_macs: multiply-adds that the tensor cores do for a block in such a pass, as issued: more than the tile's own
            where warps compute the same products or the loop is unrolled. 0 without tensor cores, or where it cannot be read.
        tmem_columns: columns of tensor memory of a block (sm_100: 512 of 128 x 32 bit on an SM), else 0.
        accumulation_regs: those of `n_regs` that are AMD's accumulation registers, else 0.
        scalar_regs: scalar registers of a wavefront (AMD), else 0: NVIDIA reports none.
    """

    arch: str
    triton_version: str
    n_regs: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    smem_bytes: int
    num_warps: int
    serialised: bool
    undefined_registers: int
    loop: dict[str, int]
    compile_s: float
    loop_macs: int = 0
    tmem_columns: int = 0
    accumulation_regs: int = 0
    scalar_regs: int = 0

    @property
    def spill_bytes(self) -> int:
        """Bytes spilled, stores and loads."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def loop_spill_ops(self) -> int:
        """Spill instructions of one warp in one pass of the main loop: the ones that cost."""
        return self.loop.get("spill", 0)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CompiledFacts:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: it is no such form.
        """
        return cls(**{field.name: data[field.name] for field in fields(cls)})
