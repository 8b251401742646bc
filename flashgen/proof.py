"""The offline proof: that the default configurations of a kernel come out of the compiler as they are meant to, shown without a GPU.

Asynchronous products that ptxas serialised, accumulators that it spilled and shared memory that no card has do not show in a result:
a kernel with them is right, and slow, or refuses to launch where nobody looks. So defaults are compiled and the facts are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from flashgen.facts import CompiledFacts, compile_facts
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import REGISTRY, Variant

HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One default configuration, compiled.

    Attributes:
        spec: key of what it computes.
        variant: its recipe.
        config: its knobs, as a label.
        triton: which compiled it.
        arch: for which architecture.
        registers: of a thread at launch; warp-specialised kernels trade them afterwards.
        spill_bytes: stored and loaded, of a thread, over the whole kernel.
        loop_spills: spill instructions in a pass of the main loop.
        smem_bytes: shared memory of a block, of the `smem_limit` that the target has.
        serialised: whether ptxas warned (C7510 to C7519) that it serialised asynchronous products.
        loop: instructions of one warp in a pass of the main loop.
        wrong: what is not as it is meant to be; empty where all is well.
    """

    spec: str
    variant: str
    config: str
    triton: str
    arch: str
    registers: int
    spill_bytes: int
    loop_spills: int
    smem_bytes: int
    smem_limit: int
    serialised: bool
    loop: int
    wrong: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def proven(target: Target, *, op: str = "attention_fwd", lse: bool = False) -> list[tuple[Variant, AttentionSpec]]:
    """What is shown for a target: each Gluon variant's bf16 kernels of the usual head dims, full and causal."""
    found = []
    for variant in REGISTRY:
        if (variant.backend, variant.op) != ("gluon", op):
            continue
        forms = (False, True) if lse and variant.op == "attention_fwd" else (False,)
        for head_dim in HEAD_DIMS:
            for causal in (False, True):
                for has_lse in forms:
                    flags = ("-causal" if causal else "") + ("-lse" if has_lse else "")
                    spec = AttentionSpec.from_key(f"{variant.op}-bf16-d{head_dim}{flags}")
                    if variant.supports(spec, target) is None:
                        found.append((variant, spec))
    return found


def prove(target: Target, *, op: str = "attention_fwd", lse: bool = False, workers: int | None = None) -> list[Proof]:
    """Compile the defaults of a target's Gluon kernels with the installed Triton; answered from the disk cache where they were before.

    Args:
        target: for which GPU.
        op: whose kernels.
        lse: the forward kernels that also return lse, too.
        workers: compiling processes; None for one a core.

    Raises:
        BuildError: the compiler refused one.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as threads:
        return list(threads.map(lambda one: _prove(one[0], one[1], target), proven(target, op=op, lse=lse)))


def _prove(variant: Variant, spec: AttentionSpec, target: Target) -> Proof:
    config = variant.default(spec, target)
    facts = compile_facts(spec, config, target)
    return Proof(
        spec=spec.key, variant=variant.name, config=config.label, triton=facts.triton_version, arch=facts.arch,
        registers=facts.n_regs, spill_bytes=facts.spill_bytes, loop_spills=facts.loop_spill_ops, smem_bytes=facts.smem_bytes,
        smem_limit=target.smem_bytes, serialised=facts.serialised, loop=facts.loop.get("total", 0), wrong=tuple(_wrong(facts, target)),
    )  # fmt: skip


def _wrong(facts: CompiledFacts, target: Target) -> Sequence[str]:
    """What a default must not have."""
    found = []
    if facts.spill_bytes:
        where = "also in the main loop" if facts.loop_spill_ops else "outside of the main loop"
        found.append(f"spills {facts.spill_bytes} bytes, {where}")
    if facts.serialised:
        found.append("ptxas serialised its asynchronous products")
    if facts.smem_bytes > target.smem_bytes:
        found.append(f"needs {facts.smem_bytes} bytes of shared memory, {target.name} has {target.smem_bytes} a block")
    if facts.undefined_registers:
        found.append(f"{facts.undefined_registers} instructions read registers that nothing wrote: miscompiled")
    if not facts.loop:
        found.append("no main loop was found in its machine code")
    return found
