"""Winners of short lists on a GPU, without a search: every candidate of a problem in shuffled rounds, the fastest checked as the tuner checks.

    python benchmarks/portfolio.py --dry-run
    python benchmarks/portfolio.py --compile [--missing]           # fills Triton's cache, all specs side by side
    python benchmarks/portfolio.py -o benchmarks/results/h200_portfolio_tune.jsonl --budget-s 150
    python benchmarks/portfolio.py --seeds benchmarks/results/h200_portfolio_tune.jsonl   # no GPU: into tuning_db/seeds

Kernels: the Hopper backward and forward, the portable ones. Problems: 16,384 tokens of a model 2048 wide (head dims 64, 128, 256; 192/128; full and causal; S 2048 and 8192,
of the Hopper forward 512 to 16384, and with lse at 2048 and 8192) and every preset's plain layer that the kernel takes. Candidates: the known-good tiles, the shipped
winners of the spec (of whatever text), the portfolio, and `MORE`, the first `MOST`. A candidate's first launch must write everything and nothing else, each further one must leave the same bits (gradients that are
added in any order excepted), and the fastest are held against fp64 on the problem itself and, poisoned, on 256 x 256, until one of the first three passes: it wins.
One line a problem and candidate, in the record format of `tuning_db/README.md`; `rank` 1 won.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from portfolio_candidates import MORE, MOST, SECTIONS

from flashgen import Problem, Target, gradients
from flashgen.accuracy import AccuracyReport, small_problems
from flashgen.bench import measure_interleaved
from flashgen.bench.environment import own_version, version
from flashgen.config import KernelConfig
from flashgen.errors import FlashgenError
from flashgen.presets import PRESETS
from flashgen.render import render
from flashgen.spec import AttentionSpec, padded_head_dim
from flashgen.store import Record, portfolios, seeds, utc_now
from flashgen.tuner import providers, trial
from flashgen.tuner.case import Case
from flashgen.tuner.case import prepare as make_case
from flashgen.tuner.faults import WrongResultError
from flashgen.variants import Variant, by_name

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("gluon_bwd_sm90", "triton_bwd", "triton_fwd", "gluon_fwd_sm90")
ROUNDS, CHECKED = 12, 3


def problems(variant: Variant, target: Target) -> Iterator[Problem]:
    """What one kernel is measured on, each once."""
    found: dict[Problem, None] = {}
    backward, hopper_forward = variant.op == "attention_bwd", variant.name == "gluon_fwd_sm90"
    widths = ((64, 64), (128, 128), (256, 256), (192, 128))
    for name, model in PRESETS.items():
        for layers in model.layers:
            one = replace(Problem.preset(name, layer=layers.kind), softmax_scale=None)
            found[one.backward if backward else one] = None
    for head_dim, head_dim_v in widths:
        lengths = (8192, 2048, 16384, 4096, 1024, 512) if hopper_forward and head_dim == head_dim_v else (8192, 2048)
        for causal in (True, False):
            for seqlen in lengths:
                heads = 2048 // head_dim_v
                one = Problem(
                    dtype="bf16", batch=16384 // seqlen, seqlen_q=seqlen, seqlen_k=seqlen, num_heads_q=heads, num_heads_kv=heads,
                    head_dim=head_dim, head_dim_v=head_dim_v, causal=causal,
                )  # fmt: skip
                if backward:
                    found[one.backward] = None
                    continue
                if seqlen in (8192, 2048):
                    found[replace(one, return_lse=True)] = None
                if len(lengths) > 2:
                    found[one] = None
    for problem in found:
        # Plain layers: a case has no tensors for options.
        if set(problem.spec.flags) <= {"causal", "has_lse"} and variant.supports(problem.spec, target) is None:
            yield problem


def candidates(variant: Variant, problem: Problem, target: Target) -> list[KernelConfig]:
    """The legal ones of all lists, each once."""
    spec = problem.spec
    width = max(64, padded_head_dim(max(spec.head_dim, spec.head_dim_v)))
    names = [knob.name for knob in variant.knobs]
    every = [known.config for known in variant.known_good(spec, target)]
    for row in seeds.load(target.name, variant.op):
        if (row.variant, row.spec_key) == (variant.name, spec.key) and set(row.config) == set(names):
            every.append(variant.config(**row.config))
    dims = {
        "dtype": spec.dtype,
        "head_dim": padded_head_dim(spec.head_dim),
        "head_dim_v": padded_head_dim(spec.head_dim_v),
    }
    for member in portfolios.load(target.arch, variant.op):
        if member.variant == variant.name and all(getattr(member, name) == value for name, value in dims.items()):
            every.append(variant.config(**member.config))
    if "SECTION" in names and every:
        every[1:1] = [variant.config(**{**every[0].to_dict(), "SECTION": section}) for section in SECTIONS]
    every += [variant.config(**dict(zip(names, values, strict=True))) for values in MORE.get((variant.name, width), ())]
    return [config for config in dict.fromkeys(every) if variant.illegal(spec, target, config) is None][
        : MOST.get(variant.name, 12)
    ]


def case_of(variant: Variant, problem: Problem, provider: providers.Provider) -> Case:
    """The problem on the device, between guard bytes."""
    text = render(problem.spec, variant).text
    request = {"problem": asdict(problem), "spec": problem.spec.key, "text": text, "variant": variant.name, "key": ""}
    return make_case(request, provider)


def shards(target: Target, names: Sequence[str], missing: bool = False) -> list[tuple[Variant, Problem]]:
    """One problem a kernel file: what one process compiles; the widest head dims, which take longest, first.

    Args:
        target: the GPU.
        names: of variants.
        missing: only of problems without a measured row of today's text.
    """
    found = {}
    for name in names:
        variant = by_name(name)
        for problem in problems(variant, target):
            if (name, problem.spec.key) not in found and not (missing and shipped(variant, problem, target)):
                found[name, problem.spec.key] = (variant, problem)
    return sorted(found.values(), key=lambda one: -max(one[1].head_dim, one[1].head_dim_v))


def compile_one(variant: Variant, problem: Problem, target: Target) -> None:
    """Launch every candidate once, on a problem that is compiled alike."""
    provider = providers.make("cuda")
    case = case_of(variant, trial.cut(problem), provider)
    for config in candidates(variant, problem, target):
        start = time.monotonic()
        try:
            case.run_on(case.own, dict(config))
            provider.synchronize()
            said = "ok"
        except Exception as error:  # whatever the compiler raises; the timed run says it again
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        print(
            f"{variant.name} {problem.spec.key} {config.label}: {said} after {time.monotonic() - start:.1f} s",
            flush=True,
        )


def compile_all(target: Target, names: Sequence[str], processes: int, missing: bool) -> int:
    """A process a kernel file, so many at once."""
    count, running, failed = len(shards(target, names, missing)), [], 0
    for number in range(count):
        words = [sys.executable, __file__, "--compile-one", str(number), "--variants", ",".join(names)]
        words += ["--missing"] * missing
        running.append(subprocess.Popen(words))
        while len(running) >= processes:
            time.sleep(0.2)
            failed += sum(process.returncode != 0 for process in running if process.poll() is not None)
            running = [process for process in running if process.poll() is None]
    return int(bool(failed + sum(process.wait() != 0 for process in running)))


def verdict(case: Case, config: KernelConfig) -> AccuracyReport:
    """The binary that is timed, poisoned, on whole blocks."""
    square = [one for one in small_problems(case.spec) if one.seqlen_q == one.seqlen_k == 256]
    launch = partial(case.launch, **config)
    return gradients.check_launch(launch, case.spec, device=case.provider.device, strides=("dense",), problems=square)


def measure(
    variant: Variant,
    problem: Problem,
    target: Target,
    provider: providers.Provider,
    *,
    session: str,
    checked: dict[Any, AccuracyReport],
) -> list[Record]:
    """Time the candidates of a problem, check the fastest, name the winner."""
    configs = {config.label: config for config in candidates(variant, problem, target)}
    found: dict[str, dict[str, Any]] = {}
    spoilt = True
    while spoilt:  # whoever wrote beside its buffers is out, and the others begin anew
        case, contestants, spoilt = case_of(variant, problem, provider), {}, False
        for label in [label for label in configs if label not in found]:
            contestant = trial.Contestant(case, dict(configs[label]))
            try:
                contestant.first()
                contestants[label] = contestant
            except WrongResultError as error:
                found[label] = {"status": "wrong_result", "message": str(error)[:300]}
                if spoilt := error.spoilt:
                    break
            except Exception as error:  # of the compiler or the driver
                found[label] = {"status": "compile_error", "message": f"{type(error).__name__}: {str(error)[:300]}"}
    # `once` of a contestant is timed by the provider already.
    times = measure_interleaved(
        {label: one.once for label, one in contestants.items()}, once=lambda run: run(), rounds=ROUNDS  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    won = False
    for place, label in enumerate(sorted(times, key=lambda label: times[label].latency_ms)):
        taken = times[label]
        row: dict[str, Any] = {
            "status": "ok", "latency_ms": taken.latency_ms, "latency_p10_ms": taken.latency_p10_ms,
            "latency_p90_ms": taken.latency_p90_ms, "protocol": taken.protocol,
        }  # fmt: skip
        found[label] = row
        if won or place >= CHECKED:
            continue
        try:
            key = (problem.spec.key, variant.name, label)
            if key not in checked:
                checked[key] = verdict(case, configs[label])
            reports = [contestants[label].check(), checked[key]]
            worst = max(report.ratio for report in reports)
            row |= {"max_abs_error": max(report.max_error for report in reports), "error_ratio": worst}
            if not all(report.ok for report in reports):
                row |= {"status": "wrong_result", "message": next(r.message for r in reports if not r.ok)[:300]}
        except WrongResultError as error:
            row |= {"status": "wrong_result", "message": str(error)[:300]}
        if row["status"] == "ok" and not won:
            row["rank"], won = 1, True
    digest = render(problem.spec, variant).digest
    versions = {"flashgen": own_version(), "driver": provider.describe().get("driver", "")}
    versions |= {name: (version(name) or "").split("+")[0] for name in ("torch", "triton")}
    return [
        Record(
            op=variant.op, spec_key=problem.spec.key, variant=variant.name, digest=digest, gpu=target.name, arch=target.arch,
            target={"gpu": target.gpu, "num_sms": target.num_sms, "smem_bytes": target.smem_bytes}, shape=problem.shape,
            config=configs[label].to_dict(), session=session, created=utc_now(), versions=versions,
            **({"protocol": "events-interleaved-2"} | row),
        )
        for label, row in found.items()
    ]  # fmt: skip


def shipped(variant: Variant, problem: Problem, target: Target) -> bool:
    """Whether a measured row of today's text is shipped for it."""
    digest = render(problem.spec, variant).digest
    return any(
        (row.variant, row.spec_key, row.digest, row.shape, row.status) == (variant.name, problem.spec.key, digest, problem.shape, "ok")
        for row in seeds.load(target.name, variant.op)
    )  # fmt: skip


def run(target: Target, names: Sequence[str], output: Path, budget_s: float, missing: bool = False) -> int:
    """Measure every problem until the budget is spent; what a file holds already is not measured again."""
    start, provider, longest = time.monotonic(), providers.make("cuda"), 0.0
    old = [Record.from_json(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(row.variant, row.spec_key, row.digest, tuple(sorted(row.shape.items()))) for row in old}
    session, checked, lost = f"portfolio-{utc_now()[:10].replace('-', '')}", {}, 0  # type: ignore[var-annotated]
    for name in names:
        variant = by_name(name)
        for problem in problems(variant, target):
            digest = render(problem.spec, variant).digest
            if (name, problem.spec.key, digest, tuple(sorted(problem.shape.items()))) in done:
                continue
            if missing and shipped(variant, problem, target):
                continue
            began = time.monotonic()
            if began - start + longest > budget_s:
                print(f"the budget of {budget_s:g} s is spent", file=sys.stderr)
                return 1
            rows = measure(variant, problem, target, provider, session=session, checked=checked)
            with output.open("a") as file:
                file.write("".join(f"{row.to_json()}\n" for row in rows))
            longest = max(longest, min(time.monotonic() - began, 10.0))
            timed = sorted((row for row in rows if row.latency_ms), key=lambda row: row.latency_ms or 0.0)
            first = variant.default(problem.spec, target).to_dict()
            default = next((row.latency_ms for row in timed if row.config == first), None)
            best = next((row for row in timed if row.rank == 1), None)
            lost += best is None
            gain = "-" if best is None or default is None or not best.latency_ms else f"{default / best.latency_ms:.3f}"
            odd = {row.status for row in rows} - {"ok"}
            print(
                f"[{time.monotonic() - start:.0f} s] {name} {problem}: {len(timed)} of {len(rows)} timed{', ' + ', '.join(sorted(odd)) if odd else ''}; "
                + (f"{best.latency_ms:.4f} ms, default / best {gain}, {best.config}" if best else "no winner"),
                flush=True,
            )
            for row in rows:
                if row.status != "ok":
                    print(f"  {row.status} {row.config}: {(row.message or '')[:200]}", flush=True)
    return int(bool(lost))


def write_seeds(paths: Sequence[Path], folder: Path) -> int:
    """Winners into the shipped rows, in place of every older row of the same kernel, spec and sizes.

    A measured row of another shape stays while its kernel's text is today's.
    """
    rows = [Record.from_json(line) for path in paths for line in path.read_text().splitlines()]
    best = {(row.variant, row.spec_key, tuple(sorted(row.shape.items()))): row for row in rows if row.rank == 1}
    stale = [
        r for r in best.values() if render(AttentionSpec.from_key(r.spec_key), by_name(r.variant)).digest != r.digest
    ]
    if stale:
        print(
            f"{len(stale)} winners are of another text, for instance {stale[0].spec_key}; measure again",
            file=sys.stderr,
        )
        return 1
    for gpu, op in sorted({(row.gpu, row.op) for row in best.values()}):
        mine = [row for row in best.values() if (row.gpu, row.op) == (gpu, op)]
        kept = [
            row
            for row in seeds.load(gpu, op)
            if (row.variant, row.spec_key, tuple(sorted(row.shape.items()))) not in best
        ]
        (folder / gpu / f"{op}.jsonl").unlink(missing_ok=True)  # `write` would keep its rows
        seeds.write(folder, [*kept, *(replace(row, rank=None) for row in mine)])
        print(f"{gpu} {op}: {len(mine)} measured rows, {len(kept)} older ones")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--variants", default=",".join(ORDER), help="in this order")
    parser.add_argument("--budget-s", type=float, default=150.0)
    parser.add_argument("--missing", action="store_true", help="only problems without a measured row of today's text")
    parser.add_argument("--target", default="h200", help="with --dry-run: a GPU by name")
    parser.add_argument("--dry-run", action="store_true", help="list problems and candidates")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile-one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--folder", type=Path, default=ROOT / "tuning_db" / "seeds")
    a = parser.parse_args()
    names = a.variants.split(",")
    if unknown := set(names) - set(ORDER):
        parser.error(f"--variants: {sorted(unknown)[0]!r} is not one of {', '.join(ORDER)}")
    if a.seeds:
        return write_seeds(a.seeds, a.folder)
    if a.dry_run:
        target, total = Target.named(a.target), 0
        for name in names:
            for problem in problems(by_name(name), target):
                if a.missing and shipped(by_name(name), problem, target):
                    continue
                found = candidates(by_name(name), problem, target)
                total += 1
                print(f"{name} {problem}: {len(found)} candidates")
        print(f"{total} problems, {len(shards(target, names, a.missing))} kernel files")
        return 0
    target = Target.detect()
    if a.compile:
        return compile_all(target, names, a.processes, a.missing)
    if a.compile_one is not None:
        compile_one(*shards(target, names, a.missing)[a.compile_one], target)
        return 0
    if a.output is None:
        parser.error("name a file with -o")
    return run(target, names, a.output, a.budget_s, a.missing)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlashgenError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
