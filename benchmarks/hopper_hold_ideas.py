"""A held reference in the Hopper forward (`parts/fwd_hold.py.jinja`) beside the running maximum, on a GPU.

    python benchmarks/hopper_hold_ideas.py compile            # every kernel once, a process each: fills Triton's cache; checks the results
    python benchmarks/hopper_hold_ideas.py time --csv FILE     # shuffled rounds, medians over the first

An idea is a kernel's text and changes of its configuration: `base` follows the running maximum, `held` holds references (LAZY_SUM) up to a quarter of a
lane's sum, `half` up to half of it, `free` up to 2^8; `+four` has four warpgroups.

`benchmarks/results/h200_hopper_hold.csv` names what was held up to: in run 1 to 1 and a share of the sum, with integers compared in causal kernels too but
for `numbers`; `wait first` waited for the product of values before it decided about references, `late` waited for it, and corrected, behind the exponentials;
in run 2 `stored later` stored a tile under the first product of the next. Its `base` of head dims over 64 summed rows at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
from flashgen.variants import by_name

VARIANT = by_name("gluon_fwd_sm90")


def half(text: str) -> str:
    """References are held up to half of a lane's sum."""
    return once(text, "mul.f32 t, ${2}, 0f3E800000;", "mul.f32 t, ${2}, 0f3F000000;")


def free(text: str) -> str:
    """References are held up to 2^8 whatever their row's sum: more error where rows are sharp; what there is to win."""
    return once(
        text, "lg2.approx.ftz.f32 t, t; max.f32 t, t, 0f00000000; min.f32 t, t, 0f41000000;", "mov.f32 t, 0f41000000;"
    )


TEXTS: dict[str, Callable[[str], str]] = {"base": str, "held": str, "half": half, "free": free}
KNOBS: dict[str, dict[str, Any]] = {
    "four": {"BLOCK_M": 256, "BLOCK_N": 64, "STAGES": 4, "CONSUMER_REGS": 112, "PRODUCER_REGS": 32, "TAKE_TURNS": True},
}
# What is timed of each kernel, the most telling first.
PLAN: dict[str, tuple[str, ...]] = {
    "d64-causal": ("base", "held", "half", "base+four", "held+four"),
    "d128-causal": ("base", "held", "half"),
    "d64": ("base", "held", "half"),
    "d128": ("base", "held", "half"),
    "d256": ("base", "held", "half"),
    "d256-causal": ("base", "held", "half"),
}
LENGTHS = (8192, 1024, 2048)


def spec_of(word: str) -> AttentionSpec:
    return AttentionSpec.from_key(f"attention_fwd-bf16-{word}")


def source_of(name: str, spec: AttentionSpec) -> KernelSource:
    return KernelSource(text=TEXTS[name.partition("+")[0]](render(spec, VARIANT).text), spec=spec, variant=VARIANT.name)


def config_of(name: str, spec: AttentionSpec, target: Target) -> KernelConfig:
    changed = {key: value for one in name.split("+")[1:] for key, value in KNOBS[one].items()}
    changed["LAZY_SUM"] = not name.startswith("base")
    return KernelConfig(variant=VARIANT.name, **{**VARIANT.default(spec, target).to_dict(), **changed})


def launcher(name: str, spec: AttentionSpec) -> Callable[..., Any]:
    from flashgen.build import build

    return partial(build(source_of(name, spec)).launch, **config_of(name, spec, Target.detect()))


# -- correctness --


def check(word: str, name: str) -> int:
    """Against the error budget: whole blocks, large logits in both dtypes, logits that rise by more than references are held."""
    import torch

    from flashgen.accuracy import make_buffers

    worst: dict[str, float] = {}
    for dtype in ("bf16",) if "+" in name else ("bf16", "fp16"):
        spec = AttentionSpec.from_key(f"attention_fwd-{dtype}-{word}")
        launch = launcher(name, spec)
        for values, scale in (("normal", 1.0), ("normal", 3.0), ("low", 1.0), ("large", 1.0)):
            for seed in (1, 2):
                problem = replace(
                    problem_of(spec, 8192), dtype=spec.dtype, batch=2, seqlen_q=768, seqlen_k=768, num_heads_q=2, num_heads_kv=1,
                    softmax_scale=scale * spec.head_dim**-0.5,
                )  # fmt: skip
                buffers = make_buffers(problem, seed=seed, device="cuda", strides="dense", values=values)  # type: ignore[arg-type]
                launch(buffers.q, buffers.k, buffers.v, buffers.o, None, **buffers.scalars)
                torch.cuda.synchronize()
                report = buffers.check()
                key = f"{dtype} {values}{' x3' if scale != 1 else ''}"
                worst[key] = max(worst.get(key, 0.0), report.ratio)
    told = ", ".join(f"{key} {ratio:.3f}" for key, ratio in worst.items())
    ok = all(ratio <= 1 for key, ratio in worst.items() if "normal" in key)
    print(f"check {word} {name}: {'ok' if ok else 'WRONG'}; {told}", flush=True)
    return 0 if ok else 1


def compile_all(words: Sequence[str], limit_s: float, jobs: int) -> int:
    """A process a kernel: it compiles, launches and checks; what fails is named and left out of the timing."""
    start = time.monotonic()

    def one(pair: tuple[str, str]) -> tuple[tuple[str, str], str, int]:
        left = limit_s - (time.monotonic() - start)
        if left < 5:
            return pair, "not started: the time is spent", 1
        try:
            done = subprocess.run(
                [sys.executable, __file__, "check-one", "--words", pair[0], "--names", pair[1]],
                capture_output=True,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return pair, "timed out", 1
        said = done.stdout.strip() or " | ".join(done.stderr.strip().splitlines()[-3:])
        return pair, said, done.returncode

    pairs = [(word, name) for word in words for name in PLAN[word]]
    wrong = 0
    with ThreadPoolExecutor(jobs) as pool:
        for pair, said, code in pool.map(one, pairs):
            wrong += code != 0
            print(
                f"{said if said.startswith('check') else f'check {pair[0]} {pair[1]}: FAILED: {said[-400:]}'}",
                flush=True,
            )
    print(f"{len(pairs)} kernels, {wrong} wrong or failed, {time.monotonic() - start:.0f} s", flush=True)
    return 0


# -- speed --


def measure(words: Sequence[str], path: Path | None, lengths: Sequence[int], rounds: int, limit_s: float) -> int:
    """Medians of shuffled rounds, the first idea twice; ratios over the first."""
    import torch

    from flashgen.bench import Timer, measure_interleaved

    timer, card, start = Timer(), torch.cuda.get_device_name(), time.monotonic()
    for seqlen in lengths:
        for word in words:
            if time.monotonic() - start > limit_s - 4:
                print("the time is spent", flush=True)
                return 1
            spec = spec_of(word)
            problem = problem_of(spec, seqlen)
            generator = torch.Generator(device="cuda").manual_seed(0)
            shape = (problem.batch, seqlen, problem.num_heads_q, spec.head_dim)
            q, k, v = (torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
            runs: dict[str, Callable[[], Any]] = {}
            for name in (*PLAN[word], f"{PLAN[word][0]} again"):
                try:
                    run = partial(
                        launcher(name.removesuffix(" again"), spec), q, k, v, torch.empty_like(q), None, **scalars
                    )
                    run()
                    torch.cuda.synchronize()
                    runs[name] = run
                except Exception as error:
                    print(f"{word} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            times = measure_interleaved(runs, once=timer.once, rounds=rounds)
            flops = 4 * problem.batch * problem.num_heads_q * seqlen**2 * spec.head_dim / (2 if spec.causal else 1)
            base = next(iter(times.values())).latency_ms
            rows = [
                {
                    "gpu": card, "spec": spec.key, "seqlen": seqlen, "idea": name, "ms": round(one.latency_ms, 5), "p10_ms": round(one.latency_p10_ms, 5),
                    "p90_ms": round(one.latency_p90_ms, 5), "over_base": round(one.latency_ms / base, 4), "tflops": round(flops / one.latency_ms / 1e9, 1), "rounds": rounds,
                }
                for name, one in times.items()
            ]  # fmt: skip
            append(path, rows)
            told = "  ".join(f"{row['idea']} {row['over_base']:.3f}" for row in rows)
            print(f"{word} S {seqlen}: {rows[0]['ms']:.4f} ms, {rows[0]['tflops']}; {told}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "check-one", "time", "facts"))
    parser.add_argument("--words", nargs="+", default=list(PLAN), help="ends of spec keys")
    parser.add_argument("--names", nargs="+", default=[], help="of check-one")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=float(os.environ.get("LIMIT", "150")))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.what == "compile":
        return compile_all(arguments.words, arguments.limit_s, arguments.jobs)
    if arguments.what == "check-one":
        return max(check(word, name) for word in arguments.words for name in arguments.names)
    if arguments.what == "facts":
        from flashgen.facts import inspect

        for word in arguments.words:
            for name in PLAN[word]:
                target = Target.named("h100")
                facts = inspect(source_of(name, spec_of(word)), target, config_of(name, spec_of(word), target))
                print(
                    word,
                    name,
                    facts.triton_version,
                    facts.n_regs,
                    facts.spill_bytes,
                    facts.serialised,
                    facts.loop.get("total"),
                    facts.smem_bytes,
                    flush=True,
                )
        return 0
    return measure(arguments.words, arguments.csv, arguments.lengths, arguments.rounds, arguments.limit_s)


if __name__ == "__main__":
    sys.exit(main())
