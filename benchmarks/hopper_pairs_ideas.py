"""Probabilities carried by twos between the loops of a causal Hopper forward (`GluonForwardSm90.carries_pairs`) beside one by one, on a GPU.

    python benchmarks/hopper_pairs_ideas.py facts           # what the compiler says of each text; no GPU
    python benchmarks/hopper_pairs_ideas.py --csv FILE      # checked against fp64, then shuffled rounds, medians over `single`

`single` carries one probability after the other, `pairs` two in a register, `+turns` takes turns at the tensor cores. Each length is timed
with as many keys as queries and with 40 more, as a chunk of a longer prompt: there its diagonal crosses two blocks of keys, and a masked loop stands before the
other. Today pairs are carried there alone; rows of `results/h200_hopper_pairs.csv` without a chunk are of an earlier form that always carried them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hopper_experiments import append, problem_of

from flashgen.config import KernelConfig
from flashgen.problem import Problem
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants.gluon_fwd_sm90 import GluonForwardSm90


class Single(GluonForwardSm90):
    """One by one, as it was."""

    def carries_pairs(self, spec: AttentionSpec) -> bool:
        return False


class Pairs(GluonForwardSm90):
    """By twos wherever it is an idea."""

    def carries_pairs(self, spec: AttentionSpec) -> bool:
        return True


VARIANTS = {"single": Single(), "pairs": Pairs()}
IDEAS = ("single", "pairs", "single+turns", "pairs+turns")
WORDS = ("d64-causal", "d128-causal")


def source_of(name: str, spec: AttentionSpec) -> KernelSource:
    return render(spec, VARIANTS[name.partition("+")[0]])


def config_of(name: str, spec: AttentionSpec, target: Target) -> KernelConfig:
    variant = VARIANTS["pairs"]
    knobs = {**variant.default(spec, target).to_dict(), "LAZY_SUM": True, "TAKE_TURNS": name.endswith("+turns")}
    return KernelConfig(variant=variant.name, **knobs)


def launcher(name: str, spec: AttentionSpec) -> Callable[..., Any]:
    from flashgen.build import build

    return partial(build(source_of(name, spec)).launch, **config_of(name, spec, Target.detect()))


def problem(spec: AttentionSpec, seqlen: int, chunk: int) -> Problem:
    return replace(problem_of(spec, seqlen), seqlen_k=seqlen + chunk)


def worst_ratio(spec: AttentionSpec, launch: Callable[..., Any], chunk: int) -> float:
    """The largest part of the error budget, of normal values and of larger ones."""
    import torch

    from flashgen.accuracy import make_buffers

    found = 0.0
    for scale in (1.0, 3.0):
        small = replace(
            problem(spec, 768, chunk), batch=2, num_heads_q=2, num_heads_kv=1, softmax_scale=scale * spec.head_dim**-0.5
        )
        buffers = make_buffers(small, seed=1, device="cuda", strides="dense", values="normal")
        launch(buffers.q, buffers.k, buffers.v, buffers.o, None, **buffers.scalars)
        torch.cuda.synchronize()
        found = max(found, buffers.check().ratio)
    return found


def measure(word: str, seqlen: int, chunk: int, path: Path | None, rounds: int) -> None:
    import torch

    from flashgen.bench import Timer, measure_interleaved

    spec = AttentionSpec.from_key(f"attention_fwd-bf16-{word}")
    asked = problem(spec, seqlen, chunk)
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(asked.batch, n, asked.num_heads_q, spec.head_dim, generator=generator, device="cuda").bfloat16()
        for n in (seqlen, asked.seqlen_k, asked.seqlen_k)
    )
    runs: dict[str, Callable[[], Any]] = {}
    worst: dict[str, float] = {}
    for name in (*IDEAS, "single again"):
        launch = launcher(name.removesuffix(" again"), spec)
        worst[name] = worst_ratio(spec, launch, chunk)
        if worst[name] > 1:
            print(f"{word} {name}: WRONG, {worst[name]:.3f} of the error budget", flush=True)
            continue
        runs[name] = partial(
            launch, q, k, v, torch.empty_like(q), None, sm_scale=asked.scale, causal_offset=asked.causal_offset
        )
    times = measure_interleaved(runs, once=Timer().once, rounds=rounds)
    base = times["single"].latency_ms
    rows = [
        {
            "gpu": torch.cuda.get_device_name(), "spec": spec.key, "seqlen": seqlen, "chunk": chunk, "idea": name, "ms": round(one.latency_ms, 5),
            "p10_ms": round(one.latency_p10_ms, 5), "p90_ms": round(one.latency_p90_ms, 5), "over_single": round(one.latency_ms / base, 4),
            "error": round(worst[name], 4), "rounds": rounds,
        }
        for name, one in times.items()
    ]  # fmt: skip
    append(path, rows)
    told = "  ".join(f"{row['idea']} {row['over_single']:.3f}" for row in rows)
    print(f"{word} S {seqlen}+{chunk}: {base:.4f} ms; {told}", flush=True)


def facts() -> None:
    from flashgen.facts import inspect

    for word in WORDS:
        spec, target = AttentionSpec.from_key(f"attention_fwd-bf16-{word}"), Target.named("h100")
        for name in IDEAS:
            found = inspect(source_of(name, spec), target, config_of(name, spec, target))
            print(
                word,
                name,
                found.triton_version,
                found.n_regs,
                found.spill_bytes,
                found.serialised,
                found.loop.get("total"),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("facts", "time"), default="time")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--words", nargs="+", default=WORDS, help="ends of spec keys")
    parser.add_argument("--lengths", nargs="+", type=int, default=(4096, 1024, 2048, 16384))
    parser.add_argument("--rounds", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.what == "facts":
        facts()
        return 0
    for seqlen in arguments.lengths:
        for word in arguments.words:
            for chunk in (0, 40):
                measure(word, seqlen, chunk, arguments.csv, arguments.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
