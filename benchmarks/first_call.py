"""What the first call of a new mask costs, part by part; on a GPU the whole call too, cold and from the caches.

    python benchmarks/first_call.py [--check] [--json]      # anywhere: trace, analyse, render, and a call without its launch
    python benchmarks/first_call.py --gpu [--profile] [--stages]  # on a GPU: whole first calls, in processes of their own

A mask of ten operations, a new one each time (another constant). The process has rendered a kernel before, as one that is in use has; what its
very first mask costs (importing Jinja, reading templates) is printed beside. Analysis is for 8,192 and 131,072 tokens; the latter also of
document ids. The call without its launch runs on CPU tensors with a fake h100 (`benchmarks/host_overhead.py`): fingerprint, trial on
zeros, trace, bounds, dispatch, rendering, the written and imported file, ranges. Times here are the thread's CPU time, which others
on the machine do not stretch. On a GPU a child process makes a call with another
mask first; then the new mask's first call is timed until the device is done: with empty caches of Triton and flashgen (cold),
and in a second process with those that the first one filled. Two more follow: one on other queries, as a model's next layer makes, and one on the
same queries, which waits for the call's own kernel (`flashgen/stand_ins.py`). With --first-mask the child's call before is a plain causal one, so that no kernel that
masks share is there. --stages says of a cold call what each kernel's Python and lowerings (LLVM: llir and ptx; ptxas: cubin) took, when it was begun and done; what is done after
the call is compiled for the next ones. --check exits 1 over 50 ms for trace + analyse + render here; on a GPU over 3 s cold or 50 ms cached.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flashgen
from flashgen import block_ranges, mods, render, stand_ins
from flashgen.spec import Mods
from flashgen.variants import by_name

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MS, LIMIT_COLD_MS, LIMIT_CACHED_MS = 50.0, 3000.0, 50.0
CONFIG = by_name("triton_fwd").config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
PARTS = ("trace", "analyse 8k", "analyse 128k", "render")


def mask_of_ten(width: int) -> Callable[..., Any]:
    """A local window, a prefix and chunks: ten operations."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return ((distance >= 0) & (distance < width)) | ((kv_idx < 64) & (q_idx // 128 == kv_idx // 128))

    return mask


def document_mask(ids: torch.Tensor) -> Callable[..., Any]:
    """Causal inside documents."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)

    return mask


def problem_of(program: Any, seqlen: int) -> flashgen.Problem:
    """One call's, 32 heads over 8, head dim 128."""
    problem = flashgen.Problem(
        dtype="bf16", batch=1, seqlen_q=seqlen, seqlen_k=seqlen, num_heads_q=32, num_heads_kv=8, head_dim=128,
        head_dim_v=128, has_mask_mod=True,
    )  # fmt: skip
    return replace(problem, mods=Mods(digest=program.digest, program=program))


def parts(mask: Callable[..., Any]) -> dict[str, float]:
    """Milliseconds of each part for a mask that was never seen."""
    times = [time.thread_time()]
    program, tensors = mods.program(None, {"mask_mod": mask}, torch.device("cpu"))
    times.append(time.thread_time())
    for seqlen in (1 << 13, 1 << 17):
        block_ranges.mask_ranges(program, tensors, problem_of(program, seqlen), CONFIG)
        times.append(time.thread_time())
    render.render(problem_of(program, 1 << 13).spec, by_name("triton_fwd"))
    times.append(time.thread_time())
    return {name: 1e3 * (b - a) for name, a, b in zip(PARTS, times, times[1:], strict=False)}


def here(repeat: int = 9) -> dict[str, float]:
    """The figures without a GPU, in milliseconds: of `repeat` new masks the least."""
    found = {f"first of the process: {name}": ms for name, ms in parts(mask_of_ten(1000)).items()}
    rows = [parts(mask_of_ten(1001 + number)) for number in range(repeat)]
    found |= {name: min(row[name] for row in rows) for name in PARTS}
    found["trace + analyse 8k + render"] = min(row["trace"] + row["analyse 8k"] + row["render"] for row in rows)
    found["trace + analyse 128k + render"] = min(row["trace"] + row["analyse 128k"] + row["render"] for row in rows)
    rows = [parts(document_mask(torch.arange(1 << 17, dtype=torch.int32) // (700 + n))) for n in range(repeat)]
    found["analyse 128k of document ids"] = min(row["analyse 128k"] for row in rows)
    found["a first call but for its launch"] = without_launch(repeat)
    return found


def without_launch(repeat: int) -> float:
    """Milliseconds of a new mask's first call on a fake h100 whose launches do nothing."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from host_overhead import fake_h100

    q, k = (torch.zeros(1, 8192, heads, 64, dtype=torch.bfloat16) for heads in (4, 1))
    times = []
    with fake_h100(), tempfile.TemporaryDirectory() as folder, environment(FLASHGEN_CACHE_DIR=folder):
        for number in range(repeat + 1):
            mask = mask_of_ten(5000 + number)
            start = time.thread_time()
            flashgen.attention(q, k, k, mask_mod=mask, backend="triton")
            times.append(1e3 * (time.thread_time() - start))
    return min(times[1:])


class environment:
    """Environment variables, for a while."""

    def __init__(self, **values: str) -> None:
        self.values, self.before = values, dict(os.environ)

    def __enter__(self) -> None:
        os.environ.update(self.values)

    def __exit__(self, *_: object) -> None:
        for name in self.values:
            os.environ.pop(name, None)
        os.environ.update({name: self.before[name] for name in self.values if name in self.before})


# -- on a GPU --

KINDS: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "mask of ten operations": lambda seqlen, device: {"mask_mod": mask_of_ten(1024)},
    "document ids": lambda seqlen, device: {
        "mask_mod": document_mask(torch.arange(seqlen, dtype=torch.int32, device=device) // 777)
    },
    "score of distances": lambda seqlen, device: {"score_mod": lambda s, b, h, i, j: s - 0.01 * (i - j)},
    "causal, softcap, sinks": lambda seqlen, device: {
        "causal": True,
        "softcap": 30.0,
        "sinks": torch.zeros(32, device=device),
    },
}


def compiled_by() -> list[dict[str, Any]]:
    """From now on each kernel that Triton compiles: milliseconds of reading its Python, of each lowering, and when it was done."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    rows: list[dict[str, Any]] = []
    of_thread = threading.local()
    read = {kind: kind.make_ir for kind in (ASTSource, GluonASTSource)}
    add_stages = CUDABackend.add_stages

    def reading(self: Any, *arguments: Any, **more: Any) -> Any:
        names = self.fn.arg_names
        brief = "BRIEF" in names and self.constants[(names.index("BRIEF"),)]
        of_thread.row = {"kernel": f"{'brief ' * brief}{self.name}", "begun": time.perf_counter()}
        rows.append(of_thread.row)
        made = read[type(self)](self, *arguments, **more)
        of_thread.row["python"] = round(1e3 * (time.perf_counter() - of_thread.row["begun"]), 1)
        return made

    def adding(self: Any, stages: dict[str, Any], *arguments: Any) -> None:
        add_stages(self, stages, *arguments)
        for name, lower in list(stages.items()):

            def timed(mod: Any, metadata: Any, name: str = name, lower: Callable[..., Any] = lower) -> Any:
                start = time.perf_counter()
                made = lower(mod, metadata)
                of_thread.row["done"] = time.perf_counter()
                of_thread.row[name] = round(1e3 * (of_thread.row["done"] - start), 1)
                return made

            stages[name] = timed

    ASTSource.make_ir = GluonASTSource.make_ir = reading
    CUDABackend.add_stages = adding
    return rows


def child(kind: str, backend: str, training: bool, profile: bool, stages: bool, first_mask: bool) -> None:
    """Calls that a process in use has made, then the first call of a kind, until the device is done; prints milliseconds."""
    entered = time.perf_counter()
    seqlen, device = 8192, "cuda"
    q = torch.randn(1, seqlen, 32, 128, dtype=torch.bfloat16, device=device, requires_grad=training)
    k = torch.randn(1, seqlen, 8, 128, dtype=torch.bfloat16, device=device, requires_grad=training)

    def call(q: torch.Tensor = q, **options: Any) -> float:
        start = time.perf_counter()
        out = flashgen.attention(q, k, k, backend=backend, **options)  # type: ignore[arg-type]
        if training:
            out.float().sum().backward()  # type: ignore[union-attr]
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    if first_mask:
        call(causal=True)
    else:
        call(mask_mod=lambda b, h, i, j: i - j < 77)
    if not kind:
        return
    stand_ins.settle()  # what stands in for that call's kernel is no part of the next one's
    options = KINDS[kind](seqlen, device)
    torch.cuda.synchronize()
    compiled = compiled_by() if stages else []
    began = time.perf_counter()
    watch = cProfile.Profile() if profile else None
    if watch is not None:
        watch.enable()
    first = call(**options)
    if watch is not None:
        watch.disable()
        pstats.Stats(watch, stream=sys.stderr).sort_stats("cumtime").print_stats(45)
    other = q.detach().clone().requires_grad_(training)
    torch.cuda.synchronize()
    second = call(other, **options)  # the next layer's; what still compiles goes on
    waited = call(**options)  # on the same queries: it waits for what still compiles
    for row in compiled:
        row |= {name: round(1e3 * (row[name] - began), 1) for name in ("begun", "done") if name in row}
    start = time.perf_counter()
    for _ in range(50):  # queued, not waited for
        flashgen.attention(q, k, k, backend=backend, **options)  # type: ignore[arg-type]
    host_us = (time.perf_counter() - start) / 50 * 1e6
    torch.cuda.synchronize()
    row = {"first_ms": first, "second_ms": second, "waited_ms": waited, "host_us": host_us}
    row["process_s"] = time.perf_counter() - entered
    print(json.dumps(row | ({"compiled": compiled} if stages else {})), flush=True)


def on_gpu(
    backend: str, training: bool, profile: bool, stages: bool, first_mask: bool, kinds: list[str]
) -> list[dict[str, Any]]:
    """Each kind cold, then from the caches."""
    rows = []
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

    def run(folder: str, kind: str, *more: str) -> str:
        caches = {
            "FLASHGEN_CACHE_DIR": f"{folder}/flashgen",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "PYTHONPATH": paths,
        }
        words = [
            sys.executable,
            __file__,
            "--child",
            kind,
            "--backend",
            backend,
            *["--training"] * training,
            *["--first-mask"] * first_mask,
            *more,
        ]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **caches})
        return done.stdout

    with tempfile.TemporaryDirectory() as base:
        run(base, "")  # what a process in use has compiled
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(base, folder, dirs_exist_ok=True)
                for state in ("cold", "cached"):
                    more = ["--profile"] * (profile and state == "cached") + ["--stages"] * (stages and state == "cold")
                    said = run(folder, kind, *more)
                    rows.append({"kind": kind, "caches": state, **json.loads(said.splitlines()[-1])})
                    print(f"{rows[-1]['first_ms']:9.1f} ms  {kind}, {state}{', with gradients' * training}", flush=True)
                    for one in rows[-1].get("compiled", ()):
                        print(f"{'':13}{', '.join(f'{name} {value}' for name, value in one.items())}", flush=True)
    return rows


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 over the limits")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--gpu", action="store_true", help="time whole first calls on the GPU")
    parser.add_argument("--kinds", help="of these first calls alone: words, separated by commas")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--training", action="store_true", help="with gradients")
    parser.add_argument("--profile", action="store_true", help="print where the host's time of a GPU's first call goes")
    parser.add_argument("--first-mask", action="store_true", help="no other mask was met before, by anybody")
    parser.add_argument(
        "--stages", action="store_true", help="what each kernel of a cold call took to compile, stage by stage"
    )
    parser.add_argument("--child", choices=["", *KINDS], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.child, given.backend, given.training, given.profile, given.stages, given.first_mask)
        return 0
    if given.gpu:
        kinds = [kind for kind in KINDS if given.kinds is None or any(word in kind for word in given.kinds.split(","))]
        rows = on_gpu(given.backend, given.training, given.profile, given.stages, given.first_mask, kinds)
        if given.json:
            print(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}))
        limits = {"cold": LIMIT_COLD_MS, "cached": LIMIT_CACHED_MS}
        return 0 if not given.check or all(row["first_ms"] <= limits[row["caches"]] for row in rows) else 1
    figures = here()
    ok = figures["trace + analyse 8k + render"] <= LIMIT_MS
    if given.json:
        print(json.dumps({"ms": figures, "limit_ms": LIMIT_MS, "ok": ok}))
    else:
        for name, value in figures.items():
            print(f"{value:9.2f} ms  {name}")
    return 0 if ok or not given.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
