"""Compile every golden kernel for real, with whatever Triton is first on the path: no GPU, no torch, no flashgen.

    python tests/compile_goldens.py [--arch 80 90] [--jobs 2] [NAME ...]

Exit code 1, with the names, when one does not compile. CI runs it under the oldest and the newest Triton.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent / "golden"
# A tile that fits every golden on every architecture, and enough stages that loads are pipelined.
TUNABLES = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def launch_constants(path: Path) -> tuple[str, dict[str, Any]]:
    """The kernel that `launch` runs, and the compile-time constants it passes, read from the text."""
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(functions["launch"]):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        ):
            values = {}
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant):
                    values[str(keyword.arg)] = keyword.value.value
                elif isinstance(keyword.value, ast.Name):
                    values[str(keyword.arg)] = TUNABLES[keyword.value.id]
            return node.func.value.id, values
    raise ValueError(f"{path}: launch() launches no kernel")


def compile_one(path: Path, arch: int) -> str:
    """Compile one golden for one architecture.

    Returns:
        "" or what went wrong.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        name, values = launch_constants(path)
        spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        dtype = path.stem.split("-")[1]
        signature, divisible = {}, {}
        for index, argument in enumerate(kernel.arg_names):
            if argument in values:
                signature[argument] = "constexpr"
            elif argument.endswith("_ptr"):
                signature[argument] = "*fp32" if argument == "lse_ptr" else POINTERS[dtype]
            else:
                signature[argument] = "fp32" if argument == "sm_scale" else "i32"
            # What the launcher finds out about aligned tensors; without it nothing would be copied asynchronously.
            if argument.endswith("_ptr") or argument.startswith("stride_"):
                divisible[(index,)] = [["tt.divisibility", 16]]
        constants = {key: value for key, value in values.items() if key in kernel.arg_names}
        options = {key: value for key, value in values.items() if key not in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        if not compiled.asm.get("cubin"):
            return "no cubin came out"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="golden files or parts of their names; all when left out")
    parser.add_argument(
        "--arch", nargs="+", type=int, default=[80, 90], help="compute capabilities; 90 compiles for sm_90a"
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
    failed, start = [], time.monotonic()
    jobs = [(path, arch) for path in paths for arch in arguments.arch]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile, do not look up
        with ProcessPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(compile_one, *job) for job in jobs]
            for (path, arch), future in zip(jobs, futures, strict=True):
                try:
                    problem = future.result()
                except BrokenProcessPool as error:  # the compiler crashed in this one or a neighbour
                    problem = str(error)
                print(f"{'FAILED' if problem else 'ok':6} sm_{arch} {path.relative_to(GOLDEN)}", flush=True)
                if problem:
                    failed.append(f"sm_{arch} {path.relative_to(GOLDEN)}: {problem}")
    elapsed_s = time.monotonic() - start
    print(f"Triton {triton.__version__}: {len(jobs) - len(failed)} of {len(jobs)} compiled in {elapsed_s:.0f} s")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
