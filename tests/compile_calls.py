"""Compile what real calls ask for, with whatever Triton is first on the path: no GPU.

    python tests/compile_calls.py                      every call of the table
    python tests/compile_calls.py --assemble NAME ...  these, down to machine code
    python tests/compile_calls.py --seeds 0:40         random calls of the fuzz, those that a Hopper kernel takes

`compile_goldens.py` compiles a kernel as an aligned call without mods specialises it. A call says more: which strides are 1 and which 16
divides, which addresses are aligned, whether the last block of keys is whole, and which tables were made of a mask. Each of those is other
code, and one of them crashed the compiler. So here `attention()` itself is called, forward and backward, on CPU tensors and as if they
lay on a GPU of the target; its launches compile and run nothing. Each call has a process of its own: a failed assertion ends it.

Without --assemble it stops where Triton hands over to LLVM, which with ptxas takes most of the time. Exit code 1, with the names, when a call fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    _TESTS = Path(__file__).resolve().parent
    sys.path[:0] = [str(_TESTS.parent), str(_TESTS / "fuzz")]

import torch
from calls import CALLS, Call

TIMEOUT_S = 600.0

# -- a GPU that is not there --


def pretend(assemble: bool) -> None:
    """Make this process call kernels on CPU tensors as on a Hopper GPU, where launches compile only."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.runtime.driver import driver as drivers

    from flashgen import Target, execution

    hopper = Target.named("h200")
    drivers._active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=None,
    )
    Target.detect = classmethod(lambda cls, device=None: hopper)  # type: ignore[method-assign,assignment]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)  # type: ignore[assignment]
    execution._ran.compiles_only = True
    if assemble:
        return

    def named(self: Any, text: str, metadata: dict[str, Any], *_: Any) -> str:
        metadata["name"] = re.findall(r"define [^@]*ptx_kernel[^@]* @(\w+)", text)[0]
        return ""

    # Triton's own passes alone: LLVM's and ptxas take ten times as long, and have not died yet.
    compiler.llvm = SimpleNamespace(**{**vars(compiler.llvm), "optimize_module": lambda *_, **__: None})
    compiler.CUDABackend.make_ptx, compiler.CUDABackend.make_cubin = named, lambda *_: b""


def no_tables(kind: str) -> None:
    """Leave out what is made of a mask."""
    from flashgen import block_ranges

    tables = block_ranges._tables

    def fewer(*arguments: Any) -> Any:
        found = tables(*arguments)
        return None if kind == "none" or found is None else replace(found, words=None, slots=None)

    if kind != "made":
        block_ranges._tables = fewer


def compile_call(call: Call) -> None:
    """Compile the kernels of a call, in a process that pretends."""
    import flashgen
    from flashgen.variants import by_name

    s, (width, width_v) = call.sizes, call.head_dims
    no_tables(call.tables)
    given = call.options(s)
    packed = given.pop("packed", False)
    shapes = (
        (s.batch, s.queries, s.heads, width),
        (s.batch, s.keys, s.kv_heads, width),
        (s.batch, s.keys, s.kv_heads, width_v),
    )
    leaves = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=call.grad) for shape in shapes]
    keywords = {**given, "backend": "gluon", "return_lse": True, "deterministic": call.deterministic}
    if packed:
        rows, keys = (torch.tensor([0, n - 40, 2 * n], dtype=torch.int32) for n in (s.queries, s.keys))
        q, k, v = (x.flatten(0, 1) for x in leaves)
        out, _ = flashgen.varlen_attention(q, k, v, rows, keys, s.queries + 40, s.keys + 40, **keywords)
    else:
        if call.row is not None:
            variant = by_name("gluon_fwd_sm90")
            spec = flashgen.explain(*leaves, **keywords).problem.spec
            legal = [one.config for one in variant.known_good(spec, flashgen.Target.named("h200"))]
            if call.row >= len(legal):
                return
            keywords["config"] = dict(legal[call.row])
        out, _ = flashgen.attention(*leaves, **keywords)
    if call.grad:
        out.sum().backward()


def compile_seed(seed: int) -> bool:
    """Compile the kernels of a random call; whether a Hopper kernel takes it."""
    import fuzz
    from cases import make
    from judge import covered, run

    fuzz.covered = lambda case, device: covered(case)
    case = fuzz.for_gpu(seed)
    if case.backend != "gluon":
        return False
    run(case, make(case))
    return True


def child(name: str, assemble: bool, log: str) -> None:
    """A process of one call, which says nothing but into its log."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pretend(assemble)
    if name in CALLS:
        compile_call(CALLS[name])
    elif not compile_seed(int(name)):
        print("another kernel's", flush=True)


# -- all of them --


def compile_all(names: list[str], assemble: bool, jobs: int, folder: Path) -> Iterator[tuple[str, str, float]]:
    """(name, what went wrong or "", seconds) of each, as they end; forked, since importing takes as long as compiling."""
    fork, waiting = multiprocessing.get_context("fork"), list(enumerate(names))
    running: dict[Any, tuple[str, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, name = waiting.pop(0)
            log = folder / f"{number}.log"
            process = fork.Process(target=child, args=(name, assemble, str(log)))
            process.start()
            running[process] = (name, log, time.monotonic())
        multiprocessing.connection.wait([process.sentinel for process in running], 1.0)
        for process, (name, log, start) in list(running.items()):
            seconds = time.monotonic() - start
            if seconds > TIMEOUT_S:
                process.kill()
            elif process.is_alive():
                continue
            process.join()
            del running[process]
            said = log.read_text(errors="replace").splitlines() if log.exists() else []
            telling = [line for line in said if "Assert" in line or re.match(r"\w[\w.]*Error", line)] or said[-1:]
            wrong = f"exit {process.exitcode} " + " | ".join(telling) if process.exitcode else ""
            yield name, wrong[:600], seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="calls or parts of their names; all when left out")
    parser.add_argument("--seeds", metavar="FIRST:COUNT", help="random calls instead")
    parser.add_argument("--assemble", action="store_true", help="run ptxas, too")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    import triton

    import flashgen.execution  # noqa: F401  before the forks

    names = [name for name in CALLS if not arguments.names or any(part in name for part in arguments.names)]
    if arguments.seeds:
        first, count = map(int, arguments.seeds.split(":"))
        names = [str(seed) for seed in range(first, first + count)]
    if not names:
        print(f"no call matches {arguments.names}", file=sys.stderr)
        return 1
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = os.environ["FLASHGEN_CACHE_DIR"] = cache
        for name, problem, seconds in compile_all(names, arguments.assemble, arguments.jobs, Path(cache)):
            print(f"{'FAILED' if problem else 'ok':6} {seconds:4.0f} s {name} {problem}".rstrip(), flush=True)
            failed += [name] if problem else []
    print(f"Triton {triton.__version__}: {len(names) - len(failed)} of {len(names)} calls compiled")
    for name in failed:
        print(name, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
