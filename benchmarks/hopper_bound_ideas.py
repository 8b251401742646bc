"""Blocks of the Hopper forward without a maximum (`parts/fwd_bound.py.jinja`) beside references that are held, on a GPU.

    python benchmarks/hopper_bound_ideas.py facts                # what the compiler says of each text; no GPU
    python benchmarks/hopper_bound_ideas.py compile              # every kernel once, a process each: fills Triton's cache; checks the results
    python benchmarks/hopper_bound_ideas.py time --csv FILE      # shuffled rounds, medians over `held`; --fa3-library FILE: FlashAttention 3 as well

`held` is the kernel as it is; `bound` leaves the maximum out; of `bound`, `late` waits for the product of values behind the exponentials, `eight` compares eight
sums a lane instead of four; a warp that had to look looks first for `two` blocks instead of four, or `never`. `--sharp 3` multiplies scores: the sharper rows are, the more often
references move.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hopper_edits import once
from hopper_experiments import append, problem_of

from flashgen.config import KernelConfig
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants.gluon_fwd_sm90 import GluonForwardSm90


class Bounded(GluonForwardSm90):
    """The variant with the template part switched on."""

    def bounds(self, spec: AttentionSpec) -> bool:
        return True


HELD, BOUNDED = GluonForwardSm90(), Bounded()
_WAIT = (
    "        acc = warpgroup_mma_wait(0, deps=(product,))\n        mbarrier.arrive(v_empty.index(v_stage), count=1)\n"
)


def late(text: str) -> str:
    """The product of values is waited for behind the exponentials."""
    text = once(
        text,
        _WAIT + "        p, alpha, m_i, sums_p, lately = look_back(",
        "        p, alpha, m_i, sums_p, lately = look_back(",
    )
    return once(
        text, "        acc = rescale(acc, alpha, BLOCK_DV)\n", _WAIT + "        acc = rescale(acc, alpha, BLOCK_DV)\n"
    )


def eight(text: str) -> str:
    """Twice as many sums are compared: closer to the largest probability."""
    return once(text, "SUMS_COMPARED = gl.constexpr(4)", "SUMS_COMPARED = gl.constexpr(8)")


def never(text: str) -> str:
    """Each block's exponentials come first, whatever the one before needed."""
    text = once(text, "LATELY = gl.constexpr(4.0)", "LATELY = gl.constexpr(0.0)")
    return once(text, "mov.f32 ${4 * n}, 0f40800000; @lately", "mov.f32 ${4 * n}, 0f00000000; @lately")


def two(text: str) -> str:
    """A warp looks first for two blocks after one in which it had to look, not four."""
    text = once(text, "LATELY = gl.constexpr(4.0)", "LATELY = gl.constexpr(2.0)")
    return once(text, "mov.f32 ${4 * n}, 0f40800000; @lately", "mov.f32 ${4 * n}, 0f40000000; @lately")


TEXTS: dict[str, Callable[[str], str]] = {
    "held": str,
    "bound": str,
    "late": late,
    "eight": eight,
    "two": two,
    "never": never,
}
PLAN: dict[str, tuple[str, ...]] = {
    "d128-causal": ("held", "bound", "two", "eight", "late", "never"),
    "d128": ("held", "bound", "late"),
    "d64-causal": ("held", "bound", "two", "eight"),
    "d64": ("held", "bound"),
    "d256-causal": ("held", "bound"),
    "d256": ("held", "bound"),
}
LENGTHS = (4096, 16384, 2048)


def source_of(name: str, spec: AttentionSpec) -> KernelSource:
    source = render(spec, HELD if name == "held" else BOUNDED)
    return replace(source, text=TEXTS[name](source.text))


def config_of(spec: AttentionSpec, target: Target) -> KernelConfig:
    return KernelConfig(variant=HELD.name, **{**HELD.default(spec, target).to_dict(), "LAZY_SUM": True})


def launcher(name: str, spec: AttentionSpec) -> Callable[..., Any]:
    from flashgen.build import build

    return partial(build(source_of(name, spec)).launch, **config_of(spec, Target.detect()))


# -- correctness --


def written(spec: AttentionSpec, launch: Callable[..., Any]) -> float:
    """The largest error where rows are flat for long and then rise: by more than fp16 and fp32 hold, in one lane, block after block; beside fp64."""
    import torch

    keys, rows = 2048, 256
    scores = torch.zeros(8, keys, device="cuda")  # of kinds of rows, as keys are met: the last first
    scores[1, 1500:] = 20.0
    scores[2, 1301] = 12.0
    scores[3, 1703] = 300.0
    scores[4, :64] = -900.0
    scores[5] = torch.arange(keys, device="cuda") // 64 * 30.0
    scores[6] = torch.arange(keys, device="cuda") // 64 * 0.4
    scores[7] = torch.arange(keys, device="cuda") // 64 * -40.0
    q = torch.zeros(
        1, rows, 1, spec.head_dim, device="cuda", dtype=getattr(torch, {"bf16": "bfloat16"}.get(spec.dtype, "float16"))
    )
    k, v, out = (
        torch.zeros_like(q[:, :1].expand(1, keys, 1, -1)),
        torch.randn(1, keys, 1, spec.head_dim, device="cuda").to(q.dtype),
        torch.empty_like(q),
    )
    worst = 0.0
    for kinds in (range(8), *([kind] for kind in range(8))):
        q.zero_()
        for i, kind in enumerate(kinds):
            q[0, i :: len(kinds), 0, i] = 1.0
            k[0, :, 0, i] = (scores[kind].flip(0) * 0.6931471805599453).to(k.dtype)
        launch(q, k, v, out, None, sm_scale=1.0, causal_offset=keys - rows)
        found = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
        if spec.causal:
            found = found.masked_fill(~torch.ones_like(found[0, 0]).tril(keys - rows).bool(), -torch.inf)
        wanted = torch.einsum("bhqk,bkhd->bqhd", found.softmax(-1), v.double())
        worst = max(worst, float((out.double() - wanted).abs().nan_to_num(torch.inf).max()))
    return worst


def check(word: str, name: str) -> int:
    """Against the error budget (normal, sharp, low and large logits), and rows as written."""
    import torch

    from flashgen.accuracy import make_buffers

    worst: dict[str, float] = {}
    for dtype in ("bf16", "fp16") if name == "bound" else ("bf16",):
        spec = AttentionSpec.from_key(f"attention_fwd-{dtype}-{word}")
        launch = launcher(name, spec)
        for values, scale in (("normal", 1.0), ("normal", 3.0), ("low", 1.0), ("large", 1.0)):
            problem = replace(
                problem_of(spec, 8192), dtype=spec.dtype, batch=2, seqlen_q=768, seqlen_k=768, num_heads_q=2, num_heads_kv=1,
                softmax_scale=scale * spec.head_dim**-0.5,
            )  # fmt: skip
            buffers = make_buffers(problem, seed=1, device="cuda", strides="dense", values=values)  # type: ignore[arg-type]
            launch(buffers.q, buffers.k, buffers.v, buffers.o, None, **buffers.scalars)
            torch.cuda.synchronize()
            worst[f"{dtype} {values}{' x3' if scale != 1 else ''}"] = buffers.check().ratio
        worst[f"{dtype} written /0.02"] = written(spec, launch) / 0.02
    ok = all(ratio <= 1 for key, ratio in worst.items() if "normal" in key or "written" in key)
    told = ", ".join(f"{key} {ratio:.3f}" for key, ratio in worst.items())
    print(f"check {word} {name}: {'ok' if ok else 'WRONG'}; {told}", flush=True)
    return 0 if ok else 1


def compile_all(plan: dict[str, tuple[str, ...]], limit_s: float, jobs: int) -> int:
    """A process a kernel: it compiles, launches and checks."""
    start = time.monotonic()

    def one(pair: tuple[str, str]) -> str:
        left = max(1.0, limit_s - (time.monotonic() - start))
        command = [sys.executable, __file__, "check-one", "--words", pair[0], "--ideas", pair[1]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return f"check {pair[0]} {pair[1]}: timed out"
        said = " | ".join(done.stderr.strip().splitlines()[-3:])
        return done.stdout.strip() or f"check {pair[0]} {pair[1]}: FAILED: {said[-400:]}"

    # `held` and `bound` of all words first: others may find no time.
    pairs = sorted(
        ((word, name) for word in plan for name in plan[word]), key=lambda pair: pair[1] not in ("held", "bound")
    )
    with ThreadPoolExecutor(jobs) as pool:
        for said in pool.map(one, pairs):
            print(said, flush=True)
    print(f"{len(pairs)} kernels, {time.monotonic() - start:.0f} s", flush=True)
    return 0


# -- speed --


def measure(plan: dict[str, tuple[str, ...]], arguments: argparse.Namespace) -> int:
    """Medians of shuffled rounds, the first idea twice; ratios over it."""
    import torch
    from fa3_library import FlashAttention3

    from flashgen.bench import Timer, measure_interleaved

    timer, card, start = Timer(), torch.cuda.get_device_name(), time.monotonic()
    peer = FlashAttention3(arguments.fa3_library) if arguments.fa3_library else None
    for seqlen in arguments.lengths:
        for word, names in plan.items():
            if time.monotonic() - start > arguments.limit_s - 4:
                print("the time is spent", flush=True)
                return 1
            spec = AttentionSpec.from_key(f"attention_fwd-bf16-{word}")
            problem = replace(problem_of(spec, seqlen), device="cuda")
            generator = torch.Generator(device="cuda").manual_seed(0)
            shape = (problem.batch, seqlen, problem.num_heads_q, spec.head_dim)
            q, k, v = (torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            q = q * arguments.sharp
            scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
            runs: dict[str, Callable[[], Any]] = {}
            for name in (*names, f"{names[0]} again", *(["fa3"] if peer else [])):
                try:
                    if name == "fa3" and peer:
                        run = partial(peer.forward(problem), q, k, v)
                    else:
                        run = partial(
                            launcher(name.removesuffix(" again"), spec), q, k, v, torch.empty_like(q), None, **scalars
                        )
                    run()
                    torch.cuda.synchronize()
                    runs[name] = run
                except Exception as error:
                    print(f"{word} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            times = measure_interleaved(runs, once=timer.once, rounds=arguments.rounds)
            flops = 4 * problem.batch * problem.num_heads_q * seqlen**2 * spec.head_dim / (2 if spec.causal else 1)
            base = next(iter(times.values())).latency_ms
            rows = [
                {
                    "gpu": card, "spec": spec.key, "seqlen": seqlen, "sharp": arguments.sharp, "idea": name, "ms": round(one.latency_ms, 5),
                    "p10_ms": round(one.latency_p10_ms, 5), "p90_ms": round(one.latency_p90_ms, 5), "over_held": round(one.latency_ms / base, 4),
                    "tflops": round(flops / one.latency_ms / 1e9, 1), "rounds": arguments.rounds,
                }
                for name, one in times.items()
            ]  # fmt: skip
            append(arguments.csv, rows)
            told = "  ".join(f"{row['idea']} {row['over_held']:.3f}" for row in rows)
            print(
                f"{word} S {seqlen} x{arguments.sharp:g}: {rows[0]['ms']:.4f} ms, {rows[0]['tflops']}; {told}",
                flush=True,
            )
    return 0


def facts(plan: dict[str, tuple[str, ...]]) -> int:
    """A line a kernel. `total` of a loop counts what a warp jumps over, too."""
    from flashgen.facts import inspect

    target = Target.named("h100")
    for word, names in plan.items():
        spec = AttentionSpec.from_key(f"attention_fwd-bf16-{word}")
        for name in names:
            found = inspect(source_of(name, spec), target, config_of(spec, target))
            print(
                word,
                name,
                found.triton_version,
                found.n_regs,
                found.spill_bytes,
                found.serialised,
                found.loop.get("total"),
                flush=True,
            )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "check-one", "time", "facts"))
    parser.add_argument("--words", nargs="+", default=list(PLAN), help="ends of spec keys")
    parser.add_argument(
        "--ideas", nargs="+", choices=list(TEXTS), help="instead of those of the plan; the first is the base"
    )
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--sharp", type=float, default=1.0, help="what queries are multiplied by")
    parser.add_argument("--fa3-library", type=Path, help="see fa3_library.py")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-s", type=float, default=float(os.environ.get("LIMIT", "150")))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    plan = {word: tuple(arguments.ideas or PLAN[word]) for word in arguments.words}
    if arguments.what == "compile":
        return compile_all(plan, arguments.limit_s, arguments.jobs)
    if arguments.what == "check-one":
        return max(check(word, name) for word in plan for name in plan[word])
    return facts(plan) if arguments.what == "facts" else measure(plan, arguments)


if __name__ == "__main__":
    sys.exit(main())
