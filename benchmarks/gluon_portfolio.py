"""The Hopper forward on a GPU: candidates of its portfolio, the portable kernel and SDPA's backends, interleaved.

    python benchmarks/gluon_portfolio.py -o results.jsonl

This protocol made `results/h100_gluon_fwd.jsonl`, from which the shipped rows are (the fastest candidate of each problem). One line
a problem and kernel: milliseconds of a launch with a cold L2 cache, median of 16 shuffled rounds (`flashgen.bench`). Times hold what
the host takes beyond the 50 microseconds that flushing the cache hides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashgen import Problem, Target
from flashgen.accuracy import TORCH_DTYPES, check_launch, small_problems
from flashgen.bench import Timer, measure_interleaved
from flashgen.build import build
from flashgen.config import KernelConfig
from flashgen.render import render
from flashgen.variants import by_name

GLUON, PORTABLE = by_name("gluon_fwd_sm90"), by_name("triton_fwd")
# Beside the portfolio: the same with other sections of heads and depths, by the wider padded head dim.
_NAMES = [knob.name for knob in GLUON.knobs]
MORE: dict[int, tuple[tuple[Any, ...], ...]] = {
    64: (
        (192, 128, 2, 160, 32, 16, True, False),
        (192, 128, 3, 160, 32, 4, True, False),
        (192, 128, 4, 160, 32, 4, True, False),
        (192, 64, 3, 160, 32, 4, True, True),
    ),
    128: ((128, 128, 2, 240, 24, 16, True, False), (192, 64, 3, 160, 32, 4, True, True)),
    256: (
        (128, 64, 2, 240, 24, 4, False, True),
        (128, 64, 2, 240, 24, 16, False, True),
        (128, 64, 2, 240, 24, 16, False, False),
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    target, timer = Target.detect(), Timer()
    meta = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    with arguments.output.open("w") as file:
        file.write(json.dumps({"meta": meta}) + "\n")
        for problem in problems():
            spec, tensors = problem.spec, inputs(problem)
            configs = {config.label: config for config in candidates(problem, target)}
            runs = {label: launcher(problem, config, *tensors) for label, config in configs.items()}
            runs["triton_fwd"] = launcher(problem, PORTABLE.default(spec, target), *tensors)
            runs |= peers(problem, *tensors)
            times = measure_interleaved(runs, once=timer.once, rounds=16)
            # The binary that was timed: whole blocks, one head a tile. tests/gpu holds the others.
            square = [one for one in small_problems(spec) if one.seqlen_q == one.seqlen_k == 256]
            for name, time in times.items():
                row = {"spec": spec.key, "shape": problem.shape, "ms": time.latency_ms}
                row |= {"p10": time.latency_p10_ms, "p90": time.latency_p90_ms}
                row["tflops"] = problem.flops / time.latency_ms / 1e9
                if name in configs:
                    source = render(spec, GLUON)
                    launch = partial(build(source).launch, **configs[name])
                    report = check_launch(launch, spec, device="cuda", strides=("dense",), problems=square)
                    row |= {"variant": GLUON.name, "digest": source.digest, "config": configs[name].to_dict()}
                    row |= {"ok": report.ok, "ratio": report.ratio, "err": report.max_error}
                else:
                    row["peer"] = name
                file.write(json.dumps(row) + "\n")
            best = min(configs, key=lambda label: times[label].latency_ms)
            shown = {"gluon": times[best], **{name: times[name] for name in times if name not in configs}}
            tflops = "  ".join(f"{name} {problem.flops / t.latency_ms / 1e9:.0f}" for name, t in shown.items())
            print(f"{problem}: {tflops} TFLOP/s; {best}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
