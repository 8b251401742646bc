"""The loops of kernels with a mask_mod beside those of the plain kernel in the same tile, read from machine code.

    python tests/unit/free_form_facts.py [h100 a100 ...]     # without names: one card of each architecture

A line each; exit code 1 where an unmasked tile costs more instructions than the plain kernel's, or a loop spills. Part of `make torture`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import triton

from flashgen.facts import CompiledFacts
from flashgen.facts.compiler import compile_kernel
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.target import Target
from flashgen.variants import by_name

CARDS = ("a100", "rtx4090", "h100", "b200", "rtx5090")
SCALARS = 64  # bytes that may be spilled outside of the loops, such as pointers of the results
IDS = torch.arange(8192, dtype=torch.int32) // 500


def problem(head_dim: int) -> Problem:
    return Problem(
        dtype="bf16", batch=1, seqlen_q=8192, seqlen_k=8192, num_heads_q=8, num_heads_kv=8, head_dim=head_dim, head_dim_v=head_dim, return_lse=True
    )  # fmt: skip


def documents(plain: Problem) -> Problem:
    return replace(plain, causal=False).modified(mask_mod=lambda b, h, i, j: (i >= j) & (IDS[i] == IDS[j]))


def compared(head_dim: int, variant: str, target: Target) -> dict[str, tuple[CompiledFacts, CompiledFacts]]:
    """Of each kernel with products the facts of the plain one, whose rows see every key, and of the one of documents, both in the latter's tile."""
    chosen = by_name(variant)
    plain, free = problem(head_dim), documents(problem(head_dim))
    if chosen.op == "attention_bwd":
        plain, free = plain.backward, free.backward
    config = chosen.default(free.spec, target)
    found = {}
    for name, constants in chosen.kernels(free.spec, config).items():
        if "preprocess" not in name:
            of_plain = compile_kernel(render(plain.spec, chosen), target, config, name, constants)
            found[name] = of_plain, compile_kernel(render(free.spec, chosen), target, config, name, constants)
    return found


def verdict(plain: CompiledFacts, free: CompiledFacts) -> str | None:
    """None, or what a kernel with a mask costs that the plain one does not."""
    if free.loop_macs != plain.loop_macs or not free.loop_macs:
        return f"another tile: {free.loop_macs} multiply-adds instead of {plain.loop_macs}"
    if free.loop.get("select", 0) > 8:
        return "no loop without a mask"
    if free.loop["total"] > plain.loop["total"]:
        return f"{free.loop['total']} instructions instead of {plain.loop['total']}"
    if free.loop_spill_ops or free.spill_load_bytes > SCALARS:
        return f"spills {free.loop_spill_ops} instructions in the loop, {free.spill_load_bytes} bytes in all"
    return None


def main() -> int:
    bad = 0
    for name in sys.argv[1:] or CARDS:
        target = Target.named(name)
        for variant in ("triton_fwd", "triton_bwd"):
            for head_dim in (64, 128):
                for kernel, (plain, free) in compared(head_dim, variant, target).items():
                    said = verdict(plain, free)
                    bad += said is not None
                    counts = f"{free.loop['total']} beside {plain.loop['total']}, spilled {free.spill_load_bytes} bytes"
                    print(
                        f"Triton {triton.__version__} {target.arch} D{head_dim} {kernel}: {counts}: {said or 'ok'}",
                        flush=True,
                    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
