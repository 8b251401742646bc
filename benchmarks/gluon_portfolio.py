"""The Hopper forward on a GPU: candidates of its portfolio, the portable kernel and SDPA's backends, interleaved.

    python benchmarks/gluon_portfolio.py compile SPEC_KEY ...       # launches every candidate once: in parallel, before timing
    python benchmarks/gluon_portfolio.py time -o results.jsonl [--budget-s 200]
    python benchmarks/gluon_portfolio.py seeds results.jsonl ...    # no GPU: the fastest candidates as rows of tuning_db/seeds

This protocol made `results/h100_gluon_fwd.jsonl` and `results/h200_gluon_fwd.jsonl`. One line a problem and kernel: milliseconds of a
launch with a cold L2 cache, median of 16 shuffled rounds (`flashgen.bench`). Times hold what the host takes beyond the 50 microseconds
that flushing the cache hides.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgen
from flashgen import Problem, Target
from flashgen.accuracy import TORCH_DTYPES, AccuracyReport, check_launch, small_problems
from flashgen.bench import Timer, measure_interleaved
from flashgen.build import build
from flashgen.config import KernelConfig
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import Record, seeds, utc_now
from flashgen.variants import by_name

GLUON, PORTABLE = by_name("gluon_fwd_sm90"), by_name("triton_fwd")
# Beside the portfolio: the same with other sections of heads and depths, by the wider padded head dim.
_NAMES = [knob.name for knob in GLUON.knobs]
MORE: dict[int, tuple[tuple[Any, ...], ...]] = {
    64: (
        *((192, 128, 3, 160, 32, section, True, lazy, True) for section in (2, 4, 8, 32) for lazy in (False, True)),
        *((256, 64, 4, 112, 32, section, True, lazy, True) for section in (4, 8, 16, 32) for lazy in (False, True)),
        (192, 128, 2, 160, 32, 4, True, False, True),
        (128, 128, 3, 240, 24, 16, True, False, True),
    ),
    128: (
        *((128, 128, 2, 240, 24, section, True, True, False) for section in (1, 2, 8)),
        *((128, 128, 2, 240, 24, section, True, False, False) for section in (1, 2, 8, 16)),
        (128, 128, 2, 240, 24, 4, True, False, True),
    ),
    256: (
        *((128, 64, 2, 240, 24, section, False, lazy, False) for section in (1, 2, 8) for lazy in (False, True)),
        *((128, 64, 2, 240, 24, section, False, False, True) for section in (1, 4)),
        (128, 64, 2, 240, 24, 4, False, True, False),
    ),
}


def problems() -> Iterator[Problem]:
    """16,384 tokens of a model 2048 wide, full and causal; three named shapes."""
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            for lse, lengths in ((False, (512, 1024, 2048, 4096, 8192, 16384)), (True, (2048, 8192))):
                for seqlen in lengths:
                    heads = 2048 // head_dim
                    sizes = {"batch": 16384 // seqlen, "seqlen_q": seqlen, "seqlen_k": seqlen}
                    dims = {"num_heads_q": heads, "num_heads_kv": heads, "head_dim": head_dim, "head_dim_v": head_dim}
                    yield Problem(dtype="bf16", causal=causal, return_lse=lse, **sizes, **dims)
    for causal in (False, True):
        for seqlen in (1024, 2048, 4096, 8192, 16384):
            sizes = {"batch": 16384 // seqlen, "seqlen_q": seqlen, "seqlen_k": seqlen}
            yield Problem(
                dtype="bf16", causal=causal, **sizes, num_heads_q=16, num_heads_kv=4, head_dim=128, head_dim_v=128
            )
    yield Problem.preset("llama3-8b")
    yield Problem.preset("bert-base")
    yield Problem.preset(
        "llama3-8b", seqlen=4096, num_heads_q=128, num_heads_kv=128, head_dim=192, head_dim_v=128
    )  # DeepSeek's heads


def candidates(problem: Problem, target: Target) -> list[KernelConfig]:
    """The legal part of the portfolio and of `MORE`."""
    spec = problem.spec
    width = max(GLUON.block_d(spec), GLUON.block_dv(spec))  # type: ignore[attr-defined]
    more = [GLUON.config(**dict(zip(_NAMES, values, strict=True))) for values in MORE[width]]
    every = dict.fromkeys([*(known.config for known in GLUON.known_good(spec, target)), *more])
    return [config for config in every if GLUON.illegal(spec, target, config) is None]


def inputs(problem: Problem) -> list[torch.Tensor]:
    """q, k and v, normal."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    p, options = problem, {"device": "cuda", "dtype": TORCH_DTYPES[problem.dtype], "generator": generator}
    shapes = (
        (p.batch, p.seqlen_q, p.num_heads_q, p.head_dim),
        (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim),
        (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim_v),
    )
    return [torch.randn(shape, **options) for shape in shapes]


def launcher(problem: Problem, config: KernelConfig, q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """One launch of a generated kernel."""
    out, lse = q.new_empty((*q.shape[:3], problem.head_dim_v)), None
    if problem.spec.has_lse:
        lse = torch.empty((problem.batch, problem.num_heads_q, problem.seqlen_q), device="cuda")
    launch = build(render(problem.spec, by_name(config.variant))).launch
    scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
    return partial(launch, q, k, v, out, lse, **scalars, **config)


def peers(problem: Problem, q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    """SDPA's backends that take the problem."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found: dict[str, Callable[[], Any]] = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def run(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                grouped = problem.num_heads_q != problem.num_heads_kv
                F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=grouped)

        try:
            run()
        except RuntimeError as error:
            print(f"{problem}: {name} is left out: {error}", file=sys.stderr)
            continue
        found[name] = run
    return found


@functools.cache
def verdict(spec: AttentionSpec, config: KernelConfig) -> AccuracyReport:
    """The binary that is timed: whole blocks, one head a tile. tests/gpu holds the others."""
    square = [one for one in small_problems(spec) if one.seqlen_q == one.seqlen_k == 256]
    launch = partial(build(render(spec, GLUON)).launch, **config)
    return check_launch(launch, spec, device="cuda", strides=("dense",), problems=square)


def compile_all(keys: Sequence[str]) -> int:
    """Launch every candidate of some specs once, so that their binaries lie in Triton's cache."""
    target = Target.detect()
    todo = {p.spec: p for p in problems() if p.spec.key in keys}
    for problem in todo.values():
        small = replace(problem, batch=1, seqlen_q=512, seqlen_k=512)
        tensors = inputs(small)
        for config in candidates(problem, target):
            launcher(small, config, *tensors)()
        torch.cuda.synchronize()
    return 0


def measure(output: Path, budget_s: float, with_peers: bool, keys: Sequence[str]) -> int:
    """Time every problem; stops at the budget, with whole problems written."""
    target, timer, start = Target.detect(), Timer(), time.monotonic()
    meta = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "target": target.name,
    }
    with output.open("w") as file:
        file.write(json.dumps({"meta": {**meta, "date": utc_now()}}) + "\n")
        for problem in [one for one in problems() if not keys or one.spec.key in keys]:
            if time.monotonic() - start > budget_s:
                print("the budget is spent", file=sys.stderr)
                return 1
            spec, tensors = problem.spec, inputs(problem)
            configs = {config.label: config for config in candidates(problem, target)}
            runs = {label: launcher(problem, config, *tensors) for label, config in configs.items()}
            if with_peers:
                runs["triton_fwd"] = launcher(problem, PORTABLE.default(spec, target), *tensors)
                runs |= peers(problem, *tensors)
            times = measure_interleaved(runs, once=timer.once, rounds=16)
            passed = False  # the fastest are held against the reference until one passes
            for name, taken in sorted(times.items(), key=lambda item: item[1].latency_ms):
                row = {"spec": spec.key, "shape": problem.shape, "ms": taken.latency_ms}
                row |= {"p10": taken.latency_p10_ms, "p90": taken.latency_p90_ms}
                row["tflops"] = problem.flops / taken.latency_ms / 1e9
                if name in configs:
                    row |= {
                        "variant": GLUON.name,
                        "digest": render(spec, GLUON).digest,
                        "config": configs[name].to_dict(),
                    }
                    if not passed:
                        report = verdict(spec, configs[name])
                        passed = report.ok
                        row |= {"ok": report.ok, "ratio": report.ratio, "err": report.max_error}
                else:
                    row["peer"] = name
                file.write(json.dumps(row) + "\n")
            file.flush()
            best = min(configs, key=lambda label: times[label].latency_ms)
            shown = {"gluon": times[best], **{name: times[name] for name in times if name not in configs}}
            tflops = "  ".join(f"{name} {problem.flops / t.latency_ms / 1e9:.0f}" for name, t in shown.items())
            print(f"{problem}: {tflops} TFLOP/s; {best}", flush=True)
    return 0


def write_seeds(paths: Sequence[Path], folder: Path) -> int:
    """Put the fastest correct candidate of each problem among the shipped rows of its GPU, in place of older rows of this variant."""
    for path in paths:
        meta, *rows = (json.loads(line) for line in path.read_text().splitlines())
        meta = meta["meta"]
        target = Target.named(meta["target"])
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            key = json.dumps([row["spec"], row["shape"]])
            if "config" in row and row.get("ok") and row["ms"] < best.get(key, {"ms": float("inf")})["ms"]:
                best[key] = row
        stale = [
            row for row in best.values() if render(AttentionSpec.from_key(row["spec"]), GLUON).digest != row["digest"]
        ]
        if stale:
            print(f"{path}: {len(stale)} rows are of another text; measure again", file=sys.stderr)
            return 1
        session = f"gluon-{meta['date'][:10].replace('-', '')}"
        records = [
            Record(
                op=GLUON.op, spec_key=row["spec"], variant=GLUON.name, digest=row["digest"], gpu=target.name, arch=target.arch,
                target={"gpu": target.gpu, "num_sms": target.num_sms, "smem_bytes": target.smem_bytes}, shape=row["shape"],
                config=row["config"], status="ok", latency_ms=row["ms"], latency_p10_ms=row["p10"], latency_p90_ms=row["p90"],
                max_abs_error=row["err"], error_ratio=row["ratio"], protocol="events-interleaved-1", session=session, created=meta["date"],
                versions={"flashgen": flashgen.__version__, "torch": meta["torch"].split("+")[0], "triton": meta["triton"]},
            )
            for row in best.values()
        ]  # fmt: skip
        old = [row for row in seeds.load(target.name, GLUON.op) if (row.variant, row.status) != (GLUON.name, "ok")]
        (folder / target.name / f"{GLUON.op}.jsonl").unlink(missing_ok=True)  # `write` would keep its rows
        seeds.write(folder, [*old, *records])
        print(f"{target.name}: {len(records)} measured rows")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "time", "seeds", "specs"))
    parser.add_argument("names", nargs="*", help="spec keys to compile or time (all); result files for seeds")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--peers", action="store_true", help="time the portable kernel and SDPA's backends, too")
    parser.add_argument("--budget-s", type=float, default=600.0)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "tuning_db" / "seeds")
    arguments = parser.parse_args()
    if arguments.what == "specs":
        print("\n".join(dict.fromkeys(problem.spec.key for problem in problems())))
        return 0
    if arguments.what == "compile":
        return compile_all(arguments.names)
    if arguments.what == "seeds":
        return write_seeds([Path(name) for name in arguments.names], arguments.folder)
    if arguments.output is None:
        parser.error("time needs -o FILE")
    return measure(arguments.output, arguments.budget_s, arguments.peers, arguments.names)


if __name__ == "__main__":
    sys.exit(main())
