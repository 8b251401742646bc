"""Compile the Hopper backward of free-form masks and hold its blocks to the plain kernel's, with whatever Triton is first on the path: no GPU.

    python tests/compile_free_form.py [--head-dims 64 128] [MASK ...]

Of each mask, in the tile that documents run: instructions of a block that needs no mask, beside those of the plain causal and of the plain full
kernel. Exit code 1, with the names, where they are more than the causal kernel's, spill, or read a register that nothing wrote. What is known to
fall short under a version of Triton stands in KNOWN, with its figures, and is told.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from flashgen.config import KernelConfig
from flashgen.facts import CompiledFacts
from flashgen.facts.compiler import compile_kernel
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.target import Target
from flashgen.variants import by_name

LENGTH, COLUMNS, REACH = 8192, 128, 6
VARIANT, H100 = by_name("gluon_bwd_sm90"), Target.named("h100")
DOCUMENT = torch.arange(LENGTH, dtype=torch.int32) // 500
TREE_END = torch.arange(LENGTH, dtype=torch.int32) // 64 * 64 + 64

MASKS: dict[str, Callable[[Problem], Problem]] = {
    "window": lambda plain: replace(plain, causal=True, window_size=(1023, 0)),
    "prefix": lambda plain: plain.modified(mask_mod=lambda b, h, i, j: (j < 256) | (j <= i)),
    "documents": lambda plain: plain.modified(mask_mod=lambda b, h, i, j: (i >= j) & (DOCUMENT[i] == DOCUMENT[j])),
    "tree": lambda plain: plain.modified(mask_mod=lambda b, h, i, j: (j <= i) & (i < TREE_END[j])),
    "neighbourhood": lambda plain: plain.modified(
        mask_mod=lambda b, h, i, j: (
            ((i // COLUMNS - j // COLUMNS).abs() <= REACH) & ((i % COLUMNS - j % COLUMNS).abs() <= REACH)
        )
    ),
}
# (Triton, mask, head dim) -> why. Under 3.9 ptxas holds the number of a step in no uniform register.
KNOWN = {
    ("3.9.0", "documents", 64): "360 beside 353",
    ("3.9.0", "documents", 128): "416 beside 421, 8 spill instructions among them",
}


def plain(head_dim: int, causal: bool = False) -> Problem:
    """Without options."""
    return Problem(
        op="attention_bwd",
        dtype="bf16",
        batch=1,
        seqlen_q=LENGTH,
        seqlen_k=LENGTH,
        num_heads_q=8,
        num_heads_kv=8,
        head_dim=head_dim,
        head_dim_v=head_dim,
        causal=causal,
        return_lse=True,
    )


def tile(head_dim: int) -> KernelConfig:
    """What documents run with."""
    return VARIANT.default(MASKS["documents"](plain(head_dim)).spec, H100)


def facts(problem: Problem) -> CompiledFacts:
    """Of the kernel of dq, dk and dv of a problem, in that tile; the loop is that of blocks without a mask."""
    config = tile(problem.head_dim)
    name, constants = next(iter(VARIANT.kernels(problem.spec, config).items()))
    return compile_kernel(render(problem.spec, VARIANT), H100, config, name, constants)


def wrong(free: CompiledFacts, causal: CompiledFacts) -> str:
    """What a mask's kernel falls short in, or ""."""
    found = []
    if free.loop_macs != causal.loop_macs or not free.loop_macs:
        found.append(f"{free.loop_macs} multiply-adds where the plain kernel has {causal.loop_macs}: another loop")
    if free.loop["total"] > causal.loop["total"]:
        found.append(f"{free.loop['total']} instructions where the plain kernel has {causal.loop['total']}")
    if free.loop_spill_ops:
        found.append(f"{free.loop_spill_ops} spill instructions")
    if free.loop.get("select", 0):
        found.append("it selects: another loop")
    if free.serialised or free.undefined_registers:
        found.append("serialised or miscompiled")
    return "; ".join(found)


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masks", nargs="*", help=f"of {', '.join(MASKS)}; all when left out")
    parser.add_argument("--head-dims", nargs="+", type=int, default=(64, 128))
    arguments = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = os.environ["FLASHGEN_CACHE_DIR"] = cache  # compile, do not look up
        for head_dim in arguments.head_dims:
            causal, full = facts(plain(head_dim, causal=True)), facts(plain(head_dim))
            for name in arguments.masks or MASKS:
                free = facts(MASKS[name](plain(head_dim)))
                short, known = wrong(free, causal), KNOWN.get((triton.__version__, name, head_dim))
                counts = f"{free.loop['total']} beside {causal.loop['total']} causal and {full.loop['total']} full"
                state = "ok" if not short else "known" if known else "FAILED"
                print(f"{state:6} head dim {head_dim} {name}: {counts} {short}".rstrip(), flush=True)
                failed += [f"{name} {head_dim}: {short}"] if state == "FAILED" else []
    print(f"Triton {triton.__version__}: {len(failed)} fall short")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
