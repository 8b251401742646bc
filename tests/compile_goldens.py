"""Compile every golden kernel for real, with whatever Triton is first on the path: no GPU, no torch.

    python tests/compile_goldens.py [--targets a100 h100] [--jobs 2] [--record FILE.csv] [NAME ...]

Each golden text is compiled with its variant's default configuration for one GPU of every architecture that the variant
supports, and the result is read: shared memory fits, no register is read that nothing wrote, and in fp16 and bf16 the reader of
machine code finds all products of a tile in the main loop; up to head dim 128 no spill stands in that loop, but for what is listed as
open. Beyond and in fp32 spills are told, not judged. Products of Gluon kernels stay asynchronous (no C7510 to C7519 of ptxas).

Exit code 1, with the names, when one fails. CI runs it under the oldest and the newest Triton. `--record` keeps what was told, a row for each kernel and
Triton: benchmarks/results/compiled_spills.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from flashgen.config import KernelConfig
from flashgen.errors import FlashgenError
from flashgen.facts import CompiledFacts, inspect
from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

GOLDEN = Path(__file__).resolve().parent / "golden"
TARGETS = ("a100", "a10g", "l40s", "h100", "b200", "rtx5090", "mi300x")  # one of each architecture
# ptxas makes nearly the same of sm_86 and sm_89: a sample of the former, to save time.
SAMPLE = {
    "a10g": (
        "attention_bwd-bf16-d128-causal",
        "bf16-d128-causal-lse",
        "bf16-d192-dv128-causal-lse",
        "fp16-d80-causal-lse",
        "fp32-d64-causal-lse",
    )
}
# A backward is three kernels. Of those whose spills are told only, one GPU of each kind of tensor core is enough.
TOLD_BACKWARD = ("a100", "h100", "b200", "mi300x")
# Recorded, by Triton: spill instructions that are left, at most; under the other one none. They are addresses of a
# whole kernel that a step reads back. A tile that spills none is slower (1.16 and 1.47 times, benchmarks/results/h200_backward_option_tiles.csv).
OPEN = {
    ("3.6.0", "sm_90", "gluon_bwd_sm90", "attention_bwd-bf16-d128-causal-bias"): 5,
    ("3.9.0", "sm_90", "gluon_bwd_sm90", "attention_bwd-bf16-d128-causal-window-softcap-alibi-sinks"): 8,
}
COLUMNS = ("triton", "arch", "kernel", "loop_spills")
# Options add statements to the loops of the same kernels: one GPU of each of NVIDIA's tensor cores is enough.
OPTIONS = ("a100", "h100", "b200")


def wanted(path: Path, target_name: str) -> bool:
    """Whether a golden is compiled for a GPU: its variant is written for it, and it says something new there."""
    spec, variant = AttentionSpec.from_key(path.stem), by_name(path.parent.name)
    if target_name in SAMPLE and not path.stem.endswith(SAMPLE[target_name]):
        return False
    if set(spec.flags) - {"causal", "has_lse"} and target_name not in OPTIONS:
        return False
    told = spec.itemsize == 4 or spec.head_dim == 1 or max(spec.head_dim, spec.head_dim_v) > 128
    if spec.op == "attention_bwd" and told and target_name not in TOLD_BACKWARD:
        return False
    return variant.supports(spec, Target.named(target_name)) is None


def compile_one(path: Path, target_name: str) -> tuple[str, str]:
    """Compile one golden for one GPU.

    Returns:
        (what went wrong or "", what is to be told or "").
    """
    try:
        spec, target, variant = AttentionSpec.from_key(path.stem), Target.named(target_name), by_name(path.parent.name)
        source = KernelSource(text=path.read_text(), spec=spec, variant=variant.name)
        config = variant.default(spec, target)
        return judge(spec, target, config, inspect(source, target, config))
    except FlashgenError as error:
        return str(error), ""


def judge(spec: AttentionSpec, target: Target, config: KernelConfig, facts: CompiledFacts) -> tuple[str, str]:
    """(what is wrong with a compiled default or "", what is to be told or "")."""
    wrong, half = [], spec.itemsize == 2
    if facts.smem_bytes > target.smem_bytes:
        wrong.append(f"needs {facts.smem_bytes} bytes of shared memory of {target.smem_bytes}")
    if facts.undefined_registers:
        wrong.append(f"{facts.undefined_registers} instructions read registers that nothing wrote: miscompiled")
    if not facts.loop:
        wrong.append("no main loop was found in its machine code")
    gluon = by_name(config.variant).backend == "gluon"
    tile = config.BLOCK_M * config.BLOCK_N * by_name(config.variant).loop_columns(spec)
    if half and facts.loop_macs < tile:
        wrong.append(f"{facts.loop_macs} multiply-adds were read in the main loop of a tile of {tile}")
    if gluon and facts.serialised:
        wrong.append("ptxas serialised its asynchronous products")
    spills = facts.loop_spill_ops
    if (
        half
        and spills > OPEN.get((facts.triton_version, target.arch, config.variant, spec.key), 0)
        and max(spec.head_dim, spec.head_dim_v) <= 128
    ):
        wrong.append(f"{spills} spill instructions in the main loop with the default {config.label}")
    return "; ".join(wrong), f"{spills} spills in the loop" if spills and not wrong else ""


def spills_of(told: str) -> int:
    """How many spill instructions were told."""
    return int(told.split()[0]) if told else 0


def record(path: Path, row: tuple[str, ...]) -> None:
    """Put a row in the place of an older one of the same Triton, architecture and kernel; sorted, so that a difference reads well."""
    old = list(csv.reader(path.open()))[1:] if path.exists() else []
    rows = {tuple(known[:3]): tuple(known) for known in old} | {row[:3]: row}
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(rows[key] for key in sorted(rows))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="golden files or parts of their names; all when left out")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="GPUs, see `flashgen show targets`")
    parser.add_argument(
        "--record", type=Path, metavar="FILE.csv", help="keep the spills in the loop of each kernel there"
    )
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()

    import triton

    paths = [
        path
        for path in sorted(GOLDEN.glob("*/*/*.py"))
        if not arguments.names or any(name in str(path) for name in arguments.names)
    ]
    if not paths:
        print(f"no golden matches {arguments.names}", file=sys.stderr)
        return 1
    jobs = [(path, name) for path in paths for name in arguments.targets if wanted(path, name)]
    failed, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = os.environ["FLASHGEN_CACHE_DIR"] = cache  # compile, do not look up
        with ProcessPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(compile_one, *job) for job in jobs]
            for (path, name), future in zip(jobs, futures, strict=True):
                what = f"{Target.named(name).arch:7} {path.relative_to(GOLDEN)}"
                try:
                    problem, told = future.result()
                except BrokenProcessPool as error:  # the compiler crashed in this one or a neighbour
                    problem, told = str(error), ""
                if arguments.record and not problem:
                    row = (
                        triton.__version__,
                        Target.named(name).arch,
                        str(path.relative_to(GOLDEN)),
                        str(spills_of(told)),
                    )
                    record(arguments.record, row)
                print(f"{'FAILED' if problem else 'ok':6} {what} {told}".rstrip(), flush=True)
                if problem:
                    failed.append(f"{what}: {problem}")
    elapsed_s = time.monotonic() - start
    print(f"Triton {triton.__version__}: {len(jobs) - len(failed)} of {len(jobs)} compiled in {elapsed_s:.0f} s")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
