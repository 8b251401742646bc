"""Ideas for the Hopper forward beyond what is shipped: each an edit of the rendered text, with its compile facts and its time.

    python benchmarks/hopper_experiments.py facts [--csv FILE] [NAME ...]      # no GPU: machine code by the installed Triton
    python benchmarks/hopper_experiments.py check [NAME ...]                   # a GPU: results against the error budget
    python benchmarks/hopper_experiments.py time --csv FILE [NAME ...]         # a GPU: interleaved with the shipped text

An idea that wins becomes a tunable of the template (TAKE_TURNS did); one that loses stays here, so that it can be tried again on
another compiler. `results/h200_hopper_experiments.csv` holds the first run, in which the base took no turns.
Bodies of inline PTX are not simulated: `check` runs on a GPU alone. Timing: bf16, 16,384 tokens of a model 2048 wide, head dim 64 and
128, the variant's default configuration, every candidate in shuffled rounds (`flashgen.bench`); `base again` gives the floor.
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

from flashgen import Problem, Target
from flashgen.config import KernelConfig
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

VARIANT = by_name("gluon_fwd_sm90")
WORDS = ("d64", "d64-causal", "d128", "d128-causal")
_EXP2 = "    p = gl.exp2(qk * qk_scale - m_safe[:, None])\n"
_SOFTMAX = "@gluon.jit\ndef online_softmax("
_TILE_OF = "@gluon.jit\ndef tile_of("
# 2^f on [0, 1) as 1 + f (a + f (b + f c)): the cubic of least relative error that is exact at 0, see `fit`.
COEFFICIENTS = (0.695146, 0.227564, 0.077119)


def once(text: str, old: str, new: str) -> str:
    """Replace what stands exactly once.

    Raises:
        ValueError: it does not: the template has changed under the idea.
    """
    if text.count(old) != 1:
        raise ValueError(f"stands {text.count(old)} times in the rendered text: {old!r}")
    return text.replace(old, new)


# -- exp2 partly on the FMA units --


def _hex(value: float) -> str:
    import struct

    return "0f" + struct.pack(">f", value).hex().upper()


def cubic(source: str, result: str) -> str:
    """PTX of one exp2 without the special-function unit: floor by a rounded-down add, a cubic, the exponent added to its bits."""
    a, b, c = map(_hex, COEFFICIENTS)
    magic = _hex(12582912.0)  # 1.5 * 2^23: the sum's low bits are the floor
    return (
        "{ .reg .f32 x, t, f, p; .reg .b32 n, r; "
        f"max.ftz.f32 x, {source}, {_hex(-127.0)}; add.rm.ftz.f32 t, x, {magic}; sub.rn.ftz.f32 f, t, {magic}; "
        f"sub.rn.ftz.f32 f, x, f; fma.rn.ftz.f32 p, f, {c}, {b}; fma.rn.ftz.f32 p, f, p, {a}; "
        f"fma.rn.ftz.f32 p, f, p, {_hex(1.0)}; "
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
    held = columns // 2  # registers of the accumulator a lane holds of 64 rows by `columns` on 128 lanes
    muls = "".join(f"mul.ftz.f32 ${i}, ${i}, ${held * 2 + (i & 2)}; " for i in range(held))
    asm = (
        "{ .reg .pred p, s; "
        f"setp.neu.ftz.f32 p, ${held * 2}, {_hex(1.0)}; setp.neu.or.ftz.f32 p, ${held * 2 + 2}, {_hex(1.0)}, p; "
        f"vote.sync.any.pred s, p, 0xffffffff; @!s bra SAME; {muls} SAME: }}"
    )
    constraints = ",".join(["=f"] * held + [str(i) for i in range(held)] + ["f"] * held)
    helper = (
        "@gluon.jit\ndef rescale(acc, alpha):\n    return gl.inline_asm_elementwise(\n"
        f'        "{asm}",\n        "{constraints}", [acc, alpha], dtype=gl.float32, is_pure=True, pack={held}\n    )\n\n\n'
    )
    text = once(text, _SOFTMAX, helper + _SOFTMAX)
    text = once(
        text,
        "    m_new = gl.maximum(m_i, gl.max(qk, 1) * qk_scale)\n",
        "    m_new = gl.maximum(m_i, gl.max(qk, 1) * qk_scale)\n    m_new = gl.where(m_new - m_i > 8.0, m_new, m_i)\n",
    )
    return once(
        text,
        "    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]\n",
        "    acc = rescale(acc, gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None])\n",
    )


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


Edit = Callable[[str, AttentionSpec], str]
EXPERIMENTS: dict[str, Edit] = {
    "base": lambda text, spec: text,
    "turns": lambda text, spec: text,
    "no-turns": lambda text, spec: text,
    "cubic-1-of-8": lambda text, spec: polynomial(text, of=8),
    "cubic-1-of-4": lambda text, spec: polynomial(text, of=4),
    "cubic-1-of-2": lambda text, spec: polynomial(text, of=2),
    "skip-rescale": lambda text, spec: skip_rescale(text, columns=_columns(spec)),
    "rounded-sums": lambda text, spec: rounded_sums(text, spec.dtype),
}
KNOBS: dict[str, dict[str, bool]] = {"turns": {"TAKE_TURNS": True}, "no-turns": {"TAKE_TURNS": False}}


def source_of(name: str, spec: AttentionSpec) -> KernelSource:
    """The edited kernel."""
    shipped = render(spec, VARIANT)
    return KernelSource(text=EXPERIMENTS[name](shipped.text, spec), spec=spec, variant=VARIANT.name)


def config_of(name: str, spec: AttentionSpec, target: Target) -> KernelConfig:
    """The default configuration, and what an idea changes of it."""
    default = VARIANT.default(spec, target)
    return KernelConfig(variant=VARIANT.name, **{**default.to_dict(), **KNOBS.get(name, {})})


def specs(words: Sequence[str] = WORDS) -> list[AttentionSpec]:
    return [AttentionSpec.from_key(f"attention_fwd-bf16-{one}") for one in words]


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


def facts_of(name: str, spec: AttentionSpec) -> dict[str, Any]:
    """Machine code of one idea: warp instructions for 128 x 128 scores, as `sass_quality` counts them."""
    from sass_quality import per_tile

    from flashgen.facts import inspect

    target = Target.named("h100")
    config = config_of(name, spec, target)
    facts = inspect(source_of(name, spec), target, config)
    return {
        "spec": spec.key, "idea": name, "triton": facts.triton_version, "registers": facts.n_regs, "spill_bytes": facts.spill_bytes,
        "serialised": facts.serialised, **{kind: round(count) for kind, count in per_tile(facts, int(config.BLOCK_N)).items()},
    }  # fmt: skip


def print_facts(names: Sequence[str], path: Path | None, words: Sequence[str]) -> int:
    for spec in specs(words):
        for name in names:
            try:
                row = facts_of(name, spec)
            except Exception as error:  # an idea that does not compile is a result
                print(f"{spec.key} {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
                continue
            append(path, [row])
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return 0


# -- on a GPU --


def launcher(name: str, spec: AttentionSpec) -> Callable[..., Any]:
    from flashgen.build import build

    return partial(build(source_of(name, spec)).launch, **config_of(name, spec, Target.detect()))


def check(names: Sequence[str], words: Sequence[str]) -> int:
    """The results of square problems of whole blocks, which share their binary with what is timed."""
    from flashgen.accuracy import check_launch, small_problems

    wrong = 0
    for spec in specs(words):
        square = [one for one in small_problems(spec) if one.seqlen_q == one.seqlen_k == 256]
        for name in names:
            start = time.monotonic()
            try:
                launch = launcher(name, spec)
                report = check_launch(launch, spec, device="cuda", strides=("dense",), problems=square)
                said, ok = f"{'ok' if report.ok else 'WRONG'} at {report.ratio:.3f} of the budget", report.ok
            except Exception as error:
                said, ok = f"{type(error).__name__}: {str(error)[:300]}", False
            wrong += not ok
            print(f"check {spec.key} {name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if wrong else 0


def problem_of(spec: AttentionSpec, seqlen: int) -> Problem:
    heads, dim = 2048 // spec.head_dim, spec.head_dim
    return Problem(
        dtype="bf16", batch=16384 // seqlen, seqlen_q=seqlen, seqlen_k=seqlen, num_heads_q=heads, num_heads_kv=heads, head_dim=dim,
        head_dim_v=dim, causal=spec.causal,
    )  # fmt: skip


def measure(names: Sequence[str], path: Path | None, words: Sequence[str], rounds: int) -> int:
    """Times of all ideas of a problem, in shuffled rounds, with the shipped text twice."""
    import torch

    from flashgen.bench import Timer, measure_interleaved

    timer, card = Timer(), torch.cuda.get_device_name()
    for seqlen in (8192, 2048):
        for spec in specs(words):
            problem = problem_of(spec, seqlen)
            shape = (problem.batch, seqlen, problem.num_heads_q, spec.head_dim)
            generator = torch.Generator(device="cuda").manual_seed(0)
            q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
            runs: dict[str, Callable[[], Any]] = {}
            outs = {name: torch.full_like(q, torch.nan) for name in (*names, "base again")}
            for name, out in outs.items():
                launch = launcher(name.removesuffix(" again"), spec)
                runs[name] = partial(launch, q, k, v, out, None, **scalars)
                runs[name]()
            apart = {name: (out.float() - outs["base"].float()).abs().max().item() for name, out in outs.items()}
            times = measure_interleaved(runs, once=timer.once, rounds=rounds)
            base = times["base"].latency_ms
            rows = [
                {
                    "gpu": card, "spec": spec.key, "seqlen": seqlen, "idea": name, "ms": round(one.latency_ms, 5),
                    "p10_ms": round(one.latency_p10_ms, 5), "p90_ms": round(one.latency_p90_ms, 5),
                    "over_base": round(one.latency_ms / base, 4), "tflops": round(problem.flops / one.latency_ms / 1e9, 1), "rounds": rounds,
                    "max_apart": f"{apart[name]:.3g}",
                }
                for name, one in times.items()
            ]  # fmt: skip
            append(path, rows)
            told = "  ".join(f"{row['idea']} {row['over_base']:.3f}" for row in rows)
            print(f"{spec.key} S {seqlen}: base {base:.4f} ms; over base: {told}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "check", "time"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; all when left out")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--words", nargs="+", default=WORDS, help="ends of spec keys")
    arguments = parser.parse_args()
    names = arguments.names or list(EXPERIMENTS)
    if arguments.what == "facts":
        return print_facts(names, arguments.csv, arguments.words)
    if arguments.what == "check":
        return check(names, arguments.words)
    return measure(names, arguments.csv, arguments.words, arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
