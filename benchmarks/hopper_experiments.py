"""Ideas for the Hopper kernels beyond what is shipped: each an edit of the rendered text, with its compile facts and its time.

    python benchmarks/hopper_experiments.py facts [--csv FILE] [NAME ...]      # no GPU: machine code by the installed Triton
    python benchmarks/hopper_experiments.py check [NAME ...]                   # a GPU: results against the error budget
    python benchmarks/hopper_experiments.py time --csv FILE [NAME ...]         # a GPU: interleaved with the shipped text

An idea that wins becomes a part of the template (TAKE_TURNS did); one that loses stays here or in `hopper_ideas.py`, so that it can be
tried again on another compiler. `a+b` is both; `--op attention_bwd` takes the backward's; `--knobs STAGES=3,DV_FIRST=True` changes the
variant's default configuration for all. `results/h200_hopper_experiments.csv` holds the first run, in which the base took no turns,
`h200_hopper_ideas.csv` the later ones. Bodies of inline PTX are not simulated: `check` runs on a GPU alone. Timing: bf16, 16,384
tokens of a model 2048 wide, every candidate in shuffled rounds (`flashgen.bench`); `base again` gives the floor.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hopper_ideas
import hopper_more_ideas
from hopper_ideas import hexadecimal, once, rescale_unless

from flashgen import Problem, Target
from flashgen.config import KernelConfig, Tunable
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name
from flashgen.variants.base import Variant

VARIANT = by_name("gluon_fwd_sm90")
BACKWARD = by_name("gluon_bwd_sm90")
WORDS = ("d64", "d64-causal", "d128", "d128-causal")
_EXP2 = "    p = gl.exp2(qk * qk_scale - m_safe[:, None])\n"
_SOFTMAX = "@gluon.jit\ndef online_softmax("
_TILE_OF = "@gluon.jit\ndef tile_of("
# 2^f on [0, 1) as 1 + f (a + f (b + f c)): the cubic of least relative error that is exact at 0, see `fit`.
COEFFICIENTS = (0.695146, 0.227564, 0.077119)


# -- exp2 partly on the FMA units --


def cubic(source: str, result: str) -> str:
    """PTX of one exp2 without the special-function unit: floor by a rounded-down add, a cubic, the exponent added to its bits."""
    a, b, c = map(hexadecimal, COEFFICIENTS)
    magic = hexadecimal(12582912.0)  # 1.5 * 2^23: the sum's low bits are the floor
    return (
        "{ .reg .f32 x, t, f, p; .reg .b32 n, r; "
        f"max.ftz.f32 x, {source}, {hexadecimal(-127.0)}; add.rm.ftz.f32 t, x, {magic}; sub.rn.ftz.f32 f, t, {magic}; "
        f"sub.rn.ftz.f32 f, x, f; fma.rn.ftz.f32 p, f, {c}, {b}; fma.rn.ftz.f32 p, f, p, {a}; "
        f"fma.rn.ftz.f32 p, f, p, {hexadecimal(1.0)}; "
        f"mov.b32 n, t; shl.b32 n, n, 23; mov.b32 r, p; add.s32 r, r, n; mov.b32 {result}, r; }} "
    )


def polynomial(text: str, *, of: int) -> str:
    """One exp2 of every `of` that a lane holds is a cubic."""
    asm = "".join(f"ex2.approx.ftz.f32 ${i}, ${of + i}; " for i in range(of - 1)) + cubic(
        f"${2 * of - 1}", f"${of - 1}"
    )
    constraints = ",".join(["=f"] * of + ["f"] * of)
    helper = (
        "@gluon.jit\ndef exp2_mixed(x):\n    return gl.inline_asm_elementwise(\n"
        f'        "{asm}",\n        "{constraints}", [x], dtype=gl.float32, is_pure=True, pack={of}\n    )\n\n\n'
    )
    text = once(text, _SOFTMAX, helper + _SOFTMAX)
    return once(text, _EXP2, "    p = exp2_mixed(qk * qk_scale - m_safe[:, None])\n")


# -- no rescale while the maximum grows by less than 2^8 --


def skip_rescale(text: str, *, columns: int) -> str:
    """A maximum that grew by 8 (base 2) or less stays: probabilities up to 2^8, exact once divided by the row's sum.

    The accumulator is then multiplied by 1: a warp whose rows all stay jumps over it.
    """
    text = once(
        rescale_unless(text, columns),
        "    m_safe = m_new\n",
        "    m_new = gl.where(m_new - m_i > 8.0, m_new, m_i)\n    m_safe = m_new\n",
    )
    return text


# -- the sum of what is multiplied --


def rounded_sums(text: str, dtype: str) -> str:
    """Rows are divided by the sum of their rounded probabilities: what the products see, where logits are large."""
    if dtype == "bf16":  # the upper half of an fp32 value
        back = "shl.b32 l, t, 16; mov.b32 $0, l; and.b32 t, t, 0xffff0000; mov.b32 $1, t;"
        asm = f"{{ .reg .b32 t, l; cvt.rn.bf16x2.f32 t, $3, $2; {back} }}"
    else:
        back = "mov.b32 {l, h}, t; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;"
        asm = f"{{ .reg .b32 t; .reg .b16 l, h; cvt.rn.f16x2.f32 t, $3, $2; {back} }}"
    helper = (
        "@gluon.jit\ndef rounded(p):\n    return gl.inline_asm_elementwise(\n"
        f'        "{asm}",\n        "=f,=f,f,f", [p], dtype=gl.float32, is_pure=True, pack=2\n    )\n\n\n'
    )
    text = once(text, _SOFTMAX, helper + _SOFTMAX)
    return once(text, _EXP2, _EXP2.replace("= gl.exp2(", "= rounded(gl.exp2(").replace("\n", ")\n"))


def _columns(spec: AttentionSpec) -> int:
    return int(VARIANT.block_dv(spec))  # type: ignore[attr-defined]


EXPERIMENTS: dict[str, hopper_ideas.Edit] = {
    "base": lambda text, spec: text,
    "turns": lambda text, spec: text,
    "no-turns": lambda text, spec: text,
    "cubic-1-of-8": lambda text, spec: polynomial(text, of=8),
    "cubic-1-of-4": lambda text, spec: polynomial(text, of=4),
    "cubic-1-of-2": lambda text, spec: polynomial(text, of=2),
    "skip-rescale": lambda text, spec: skip_rescale(text, columns=_columns(spec)),
    "rounded-sums": lambda text, spec: rounded_sums(text, spec.dtype),
    **hopper_ideas.FORWARD,
    **hopper_more_ideas.MORE,
}
EXPERIMENTS_BACKWARD: dict[str, hopper_ideas.Edit] = {"base": EXPERIMENTS["base"], **hopper_ideas.BACKWARD}
KNOBS: dict[str, dict[str, bool]] = {"turns": {"TAKE_TURNS": True}, "no-turns": {"TAKE_TURNS": False}}


def variant_of(spec: AttentionSpec) -> Variant:
    return BACKWARD if spec.op == "attention_bwd" else VARIANT


def source_of(name: str, spec: AttentionSpec) -> KernelSource:
    """The edited kernel; `a+b` takes both edits."""
    variant, edits = variant_of(spec), EXPERIMENTS if spec.op == "attention_fwd" else EXPERIMENTS_BACKWARD
    text = render(spec, variant).text
    for one in name.split("+"):
        text = edits[one](text, spec)
    return KernelSource(text=text, spec=spec, variant=variant.name)


def config_of(name: str, spec: AttentionSpec, target: Target, knobs: dict[str, Tunable] | None = None) -> KernelConfig:
    """The default configuration, what an idea changes of it, and what the caller does."""
    variant = variant_of(spec)
    changed = {key: value for one in name.split("+") for key, value in KNOBS.get(one, {}).items()}
    return KernelConfig(variant=variant.name, **{**variant.default(spec, target).to_dict(), **changed, **(knobs or {})})


def specs(words: Sequence[str] = WORDS, op: str = "attention_fwd") -> list[AttentionSpec]:
    return [AttentionSpec.from_key(f"{op}-bf16-{one}") for one in words]


def append(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a CSV, at once: a run may be cut off."""
    if path is None or not rows:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


# -- what can be said without a GPU --


def facts_of(name: str, spec: AttentionSpec, knobs: dict[str, Tunable]) -> dict[str, Any]:
    """Machine code of one idea: warp instructions for 128 x 128 scores, as `sass_quality` counts them; a backward's, of a step."""
    from sass_quality import per_tile

    from flashgen.facts import inspect

    target = Target.named("h100")
    config = config_of(name, spec, target, knobs)
    facts = inspect(source_of(name, spec), target, config)
    counts = per_tile(facts, int(config.BLOCK_N)) if spec.op == "attention_fwd" else facts.loop
    return {
        "spec": spec.key, "idea": name, "triton": facts.triton_version, "registers": facts.n_regs, "spill_bytes": facts.spill_bytes,
        "serialised": facts.serialised, **{kind: round(count) for kind, count in counts.items()},
    }  # fmt: skip


def print_facts(
    names: Sequence[str], path: Path | None, kernels: Sequence[AttentionSpec], knobs: dict[str, Tunable]
) -> int:
    for spec in kernels:
        for name in names:
            try:
                row = facts_of(name, spec, knobs)
            except Exception as error:  # an idea that does not compile is a result
                print(f"{spec.key} {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
                continue
            append(path, [row])
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return 0


# -- on a GPU --


def launcher(name: str, spec: AttentionSpec, knobs: dict[str, Tunable]) -> Callable[..., Any]:
    from flashgen.build import build

    return partial(build(source_of(name, spec)).launch, **config_of(name, spec, Target.detect(), knobs))


def check(names: Sequence[str], kernels: Sequence[AttentionSpec], knobs: dict[str, Tunable]) -> int:
    """The results of square problems of whole blocks, which share their binary with what is timed."""
    from flashgen.gradients import check_launch, small_problems

    wrong = 0
    for spec in kernels:
        square = [one for one in small_problems(spec) if one.seqlen_q == one.seqlen_k == 256]
        for name in names:
            start = time.monotonic()
            try:
                launch = launcher(name, spec, knobs)
                report = check_launch(launch, spec, device="cuda", strides=("dense",), problems=square)
                said, ok = f"{'ok' if report.ok else 'WRONG'} at {report.ratio:.3f} of the budget", report.ok
            except Exception as error:
                said, ok = f"{type(error).__name__}: {str(error)[:300]}", False
            wrong += not ok
            print(f"check {spec.key} {name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if wrong else 0


def problem_of(spec: AttentionSpec, seqlen: int) -> Problem:
    narrower = min(spec.head_dim, spec.head_dim_v)
    return Problem(
        dtype="bf16", batch=16384 // seqlen, seqlen_q=seqlen, seqlen_k=seqlen, num_heads_q=2048 // narrower,
        num_heads_kv=2048 // narrower, head_dim=spec.head_dim, head_dim_v=spec.head_dim_v, causal=spec.causal,
    )  # fmt: skip


def calls_of(
    spec: AttentionSpec, problem: Problem, names: Sequence[str], knobs: dict[str, Tunable]
) -> dict[str, Callable[[], Any]]:
    """A launch of each idea on the same inputs; a backward's twice, its sums in any order and in a fixed one."""
    import torch

    from flashgen.build import build

    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (problem.batch, problem.seqlen_q, problem.num_heads_q)
    widths = (spec.head_dim, spec.head_dim, spec.head_dim_v, spec.head_dim_v)
    q, k, v, dout = (torch.randn(*shape, x, generator=generator, device="cuda", dtype=torch.bfloat16) for x in widths)
    scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
    out = torch.empty_like(dout)
    both = (*names, f"{names[0]} again")
    if spec.op == "attention_fwd":
        return {
            name: partial(launcher(name.removesuffix(" again"), spec, knobs), q, k, v, out, None, **scalars)
            for name in both
        }
    forward = AttentionSpec.from_key(spec.key.replace("attention_bwd", "attention_fwd") + "-lse")
    lse = torch.empty(problem.batch, problem.num_heads_q, problem.seqlen_q, device="cuda")
    build(render(forward, VARIANT)).launch(q, k, v, out, lse, **scalars, **VARIANT.default(forward, Target.detect()))
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    return {
        f"{name}, {mode}": partial(
            launcher(name.removesuffix(" again"), spec, knobs), dout, None, q, k, v, out, lse, *gradients, **scalars, deterministic=mode == "ordered"
        )
        for name in both
        for mode in ("fast", "ordered")
    }  # fmt: skip


def measure(
    names: Sequence[str], path: Path | None, kernels: Sequence[AttentionSpec], knobs: dict[str, Tunable], rounds: int
) -> int:
    """Times of all ideas of a problem, in shuffled rounds, with the first one twice; a ratio is over the first of its mode."""
    import torch

    from flashgen.bench import Timer, measure_interleaved

    timer, card = Timer(), torch.cuda.get_device_name()
    for seqlen in (8192, 2048):
        for spec in kernels:
            problem = problem_of(spec, seqlen)
            runs = calls_of(spec, problem, names, knobs)
            for run in runs.values():
                run()
            times = measure_interleaved(runs, once=timer.once, rounds=rounds)
            products = (
                3 * spec.head_dim + 2 * spec.head_dim_v
                if spec.op == "attention_bwd"
                else spec.head_dim + spec.head_dim_v
            )
            flops = 2 * problem.batch * problem.num_heads_q * seqlen**2 * products / (2 if spec.causal else 1)
            rows = []
            for name, one in times.items():
                base = times[next(key for key in times if key.partition(", ")[2] == name.partition(", ")[2])].latency_ms
                rows.append(
                    {
                        "gpu": card, "spec": spec.key, "seqlen": seqlen, "idea": name, "ms": round(one.latency_ms, 5),
                        "p10_ms": round(one.latency_p10_ms, 5), "p90_ms": round(one.latency_p90_ms, 5),
                        "over_base": round(one.latency_ms / base, 4), "tflops": round(flops / one.latency_ms / 1e9, 1), "rounds": rounds,
                    }
                )  # fmt: skip
            append(path, rows)
            told = "  ".join(f"{row['idea']} {row['over_base']:.3f}" for row in rows)
            print(f"{spec.key} S {seqlen}: {rows[0]['ms']:.4f} ms; over the first: {told}", flush=True)
    return 0


def knobs_of(text: str) -> dict[str, Tunable]:
    """`STAGES=3,DV_FIRST=True` as values."""
    pairs = (one.partition("=") for one in text.split(",") if one)
    return {
        name: {"True": True, "False": False}.get(value, value) if value.isalpha() else int(value)
        for name, _, value in pairs
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "check", "time"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; base and all others when left out")
    parser.add_argument("--op", choices=("attention_fwd", "attention_bwd"), default="attention_fwd")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--words", nargs="+", default=WORDS, help="ends of spec keys")
    parser.add_argument("--knobs", type=knobs_of, default={}, help="changes of the default configuration")
    arguments = parser.parse_args()
    kernels = specs(arguments.words, arguments.op)
    names = arguments.names or list(EXPERIMENTS if arguments.op == "attention_fwd" else EXPERIMENTS_BACKWARD)
    if arguments.what == "facts":
        return print_facts(names, arguments.csv, kernels, arguments.knobs)
    if arguments.what == "check":
        return check(names, kernels, arguments.knobs)
    return measure(names, arguments.csv, kernels, arguments.knobs, arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
