"""Write the predicted rows of `tuning_db/seeds`: every preset's plain layers, for every target and variant that covers them. No GPU needed.

    nice python scripts/predict_seeds.py [--folder tuning_db/seeds] [--workers N] [--target NAME ...] [--variant NAME ...]

Measured rows stay, and where one stands nothing is predicted. Old predicted rows of the chosen targets and variants go: run it again after a
template changed. A variant that the cost model cannot rank gets a row as well for every shape that was measured on another GPU of the same
architecture, or here with an earlier text: there the winner is known, and the forecast is that it wins here too. Else only what the policy chooses among is compiled
(`flashgen.tuner.policy`), once for each architecture, and every winner's result is checked in the interpreter or the simulator. Nothing goes
into your tuning database.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flashgen import Problem, Target
from flashgen.accuracy import AccuracyReport
from flashgen.config import KernelConfig
from flashgen.costmodel import MODEL
from flashgen.errors import TuningError, UnsupportedProblemError
from flashgen.presets import PRESETS
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import Record, seeds, utc_now
from flashgen.target import TARGETS
from flashgen.tuner import tune, verdicts
from flashgen.tuner.context import choose_variant, versions
from flashgen.variants import REGISTRY, Variant, candidates

RECORDED = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def problems() -> list[Problem]:
    """Every kind of plain layers of every preset, each once, and the gradients of each; layers with options run defaults."""
    found = [Problem.preset(name, layer=layers.kind) for name, model in PRESETS.items() for layers in model.layers]
    # The softmax scale changes neither kernel nor tile, so that one row serves.
    plain = dict.fromkeys(replace(problem, softmax_scale=None) for problem in found)
    plain = dict.fromkeys(problem for problem in plain if set(problem.spec.flags) <= {"causal", "has_lse"})
    return [*plain, *(problem.backward for problem in plain)]


def tunable(problem: Problem, target: Target) -> list[Variant]:
    """The generated variants that compute a problem on a target: each gets a row, since a call may ask for any backend."""
    found = []
    for variant in candidates(problem.spec):
        try:
            found.append(choose_variant(problem, target, variant.name))
        except UnsupportedProblemError:
            continue
    return found


def covered(target: Target, variant: Variant) -> list[Problem]:
    """Every kind of layers that a variant computes on a target."""
    return [problem for problem in problems() if variant in tunable(problem, target)]


def transferred(target: Target, variant: Variant) -> list[Record]:
    """The winners that another GPU of the same architecture measured, as predictions: the very same machine code, not ranked by any model.

    Only of a variant whose configurations the cost model cannot rank; a problem that was measured here is left out.
    """
    if variant.modelled:
        return []
    here = {
        (row.spec_key, tuple(row.shape.values())) for row in seeds.load(target.name, variant.op) if _today(row, variant)
    }
    found: dict[tuple[str, tuple[int, ...]], Record] = {}
    for gpu in seeds.gpus():
        if gpu == target.name or gpu not in TARGETS or TARGETS[gpu].arch != target.arch:
            continue
        for row in seeds.load(gpu, variant.op):
            key = (row.spec_key, tuple(row.shape.values()))
            spec = AttentionSpec.from_key(row.spec_key)
            config = KernelConfig(variant=row.variant, **row.config)
            if (
                key in here
                or key in found
                or not _today(row, variant)
                or variant.illegal(spec, target, config) is not None
            ):
                continue
            found[key] = _forecast(row, target, variant, "winner of this kernel on", "tuning_db/seeds")
    return list(found.values())


def earlier(target: Target, variant: Variant, known: Sequence[Record]) -> list[Record]:
    """The winners that GPUs of the same architecture measured with an earlier text of a kernel, as predictions of today's.

    Only of a variant whose configurations the cost model cannot rank; `known` problems, and those measured today, are left out. The recorded
    runs of `benchmarks/results` hold them, every trial of a problem: of its latest run the fastest one counts. That text was checked, today's is anew.

    Raises:
        TuningError: today's text is wrong with one of them.
    """
    if variant.modelled:
        return []
    here = [row for row in seeds.load(target.name, variant.op) if _today(row, variant)]
    taken = {(row.spec_key, tuple(row.shape.values())) for row in (*here, *known)}
    found: dict[tuple[str, tuple[int, ...]], Record] = {}
    for path in sorted(RECORDED.glob("*_tune.jsonl")):
        for row in map(Record.from_json, path.read_text().splitlines()):
            key = (row.spec_key, tuple(row.shape.values()))
            if (
                (row.status, row.variant, row.arch) != ("ok", variant.name, target.arch)
                or row.latency_ms is None
                or key in taken
            ):
                continue
            spec = AttentionSpec.from_key(row.spec_key)
            if variant.illegal(spec, target, KernelConfig(variant=row.variant, **row.config)) is not None:
                continue
            best = found.get(key)
            same_run = best is not None and best.session == row.session
            if best is None or (row.latency_ms < (best.latency_ms or 0.0) if same_run else row.created > best.created):
                found[key] = row
    rows = []
    for row in found.values():
        source = render(AttentionSpec.from_key(row.spec_key), variant)
        report = verdicts.of(source, KernelConfig(variant=row.variant, **row.config))
        if not isinstance(report, AccuracyReport) or not report.ok:
            raise TuningError(f"{row.spec_key} with {row.config}, which won with an earlier text: {report}")
        figures = {"max_abs_error": report.max_error, "error_ratio": report.ratio, "versions": versions()}
        told = _forecast(row, target, variant, "winner of an earlier text of this kernel on", "benchmarks/results")
        rows.append(replace(told, **figures))  # type: ignore[arg-type]
    return rows


def _forecast(row: Record, target: Target, variant: Variant, what: str, where: str) -> Record:
    """A measured row as the prediction of today's text on a target."""
    spec = AttentionSpec.from_key(row.spec_key)
    mask = "causal" if spec.causal else "full"
    message = f"chosen by measured table: {what} {row.gpu} ({where}), S {row.shape['seqlen_k']}, {mask}"
    return replace(
        row, gpu=target.name, status="predicted", latency_ms=None, latency_p10_ms=None, latency_p90_ms=None, facts=None,
        digest=render(spec, variant).digest, bound_by="not modelled", model=MODEL, message=message, protocol="transferred-1",
        target={"gpu": target.gpu, "num_sms": target.num_sms, "smem_bytes": target.smem_bytes}, created=utc_now(), rank=1,
    )  # fmt: skip


def _today(row: Record, variant: Variant) -> bool:
    """Whether a row is a measurement of today's text of a variant."""
    spec = AttentionSpec.from_key(row.spec_key)
    return (row.status, row.variant) == ("ok", variant.name) and row.digest == render(spec, variant).digest


def measured(problem: Problem, target: Target, variant: Variant) -> bool:
    """Whether a measured row of today's kernel and this very shape is shipped."""
    digest = render(problem.spec, variant).digest
    return any(
        (row.status, row.digest, row.shape) == ("ok", digest, problem.shape)
        for row in seeds.load(target.name, problem.spec.op)
    )


def predict(target: Target, variant: Variant, workers: int | None, database: str) -> tuple[list[Record], list[str]]:
    """The predicted winners of one variant on one target, and what has none."""
    known = transferred(target, variant)
    known += earlier(target, variant, known)
    have = {(row.spec_key, tuple(row.shape.values())) for row in known}
    todo = [problem for problem in covered(target, variant) if not measured(problem, target, variant)]
    todo = [problem for problem in todo if (problem.spec.key, tuple(problem.shape.values())) not in have]
    if not todo:
        return [_unranked(row) for row in known], []
    try:
        result = tune(
            todo, target=target, mode="predicted", max_trials=1, workers=workers, database=database, progress=False,
            variant=variant.name,
        )  # fmt: skip
    except TuningError as error:
        return [], [f"{target.name}, {variant.name}: {error}"]
    # The compiler's facts can be had again with `flashgen.compile_facts`; the files stay readable without them.
    rows = [*known, *(replace(row.winner, facts=None) for row in result.problems if row.winner is not None)]
    missing = [f"{target.name}, {row.problem}: {row.message}" for row in result.problems if row.winner is None]
    return [_unranked(row) if not variant.modelled else row for row in rows], missing


def _unranked(row: Record) -> Record:
    """A row of a variant whose configurations the cost model cannot order says so."""
    return replace(row, message=f"{row.message}; not ranked: the cost model has no forecast of {row.variant}")


def write(folder: Path, rows: Sequence[Record]) -> None:
    """Put rows in place of the predicted ones of the same variants; each file is replaced whole."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for gpu, op in sorted({(row.gpu, row.op) for row in rows}):
            path = folder / gpu / f"{op}.jsonl"
            old = [Record.from_json(line) for line in path.read_text().splitlines()] if path.exists() else []
            new = [row for row in rows if (row.gpu, row.op) == (gpu, op)]
            renewed = {row.variant for row in new}
            seeds.write(scratch, [*(r for r in old if r.status != "predicted" or r.variant not in renewed), *new])
            path.parent.mkdir(exist_ok=True)
            os.replace(Path(scratch) / gpu / f"{op}.jsonl", path)
    seeds.forget()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; 1 where a covered problem has no row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "tuning_db" / "seeds")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--target", action="append", choices=[name for name in TARGETS if name != "cpu"])
    parser.add_argument("--variant", action="append", choices=[v.name for v in REGISTRY if v.template is not None])
    options = parser.parse_args(arguments)
    failed: list[str] = []
    for name in options.target or [name for name in TARGETS if name != "cpu"]:
        target = Target.named(name)
        for variant in [v for v in REGISTRY if v.template is not None and v.name in (options.variant or [v.name])]:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                rows, missing = predict(target, variant, options.workers, str(Path(scratch) / "seeds.sqlite3"))
            write(options.folder, rows)
            failed += missing
            if rows or missing:
                print(
                    f"{name}, {variant.name}: {len(rows)} predicted rows, {time.monotonic() - start:.0f} s", flush=True
                )
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
