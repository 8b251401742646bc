"""What a tuning run would do, and about how long: nothing is compiled, measured or written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from flashgen.config import KernelConfig
from flashgen.facts import cached
from flashgen.problem import Problem
from flashgen.store import Record, seeds
from flashgen.target import Target
from flashgen.tuner import policy
from flashgen.tuner.compiled import processes
from flashgen.tuner.context import choose_variant, launch_strides, legal_list, source_of
from flashgen.tuner.openings import openings


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemPlan:
    """One problem.

    Attributes:
        legal: configurations that the predicate admits before compiling.
        seeds: of these, how many the strategy tries first for what is known: near winners, the portfolio, known-good tiles,
            and what other problems taught.
        trials: how many are tried at most: without the GPU not all of a kernel that the model cannot rank.
        cached: of those that may be tried, how many are compiled already.
        estimate_s: seconds, or None where nothing is known to estimate from.
        basis: what the estimate is made from, in words.
    """

    problem: Problem
    variant: str
    legal: int
    seeds: int
    trials: int
    cached: int
    estimate_s: float | None
    basis: str


def plan(
    problem: Problem,
    target: Target,
    *,
    mode: str,
    max_trials: int | None,
    workers: int | None,
    stored: Sequence[Record],
    strategy: str = "auto",
) -> ProblemPlan:
    """Plan one problem.

    Args:
        problem: what would be tuned.
        target: where.
        mode: "measured" or "predicted".
        max_trials: as in `tune`.
        workers: compiling processes; None for one per core.
        stored: trials of the user's database, for the seeds and the estimate.
        strategy: as in `tune`.
    """
    variant = choose_variant(problem, target)
    source = source_of(variant, problem)
    legal, known = legal_list(variant, problem, target)
    table = policy.measured_tiles(variant, problem, target) if mode == "predicted" else ()
    considered = policy.considered(variant, problem.spec, target, table, known)
    searched = policy.searched(variant, legal, considered, mode)
    own = [
        row for row in stored if (row.spec_key, row.digest, row.gpu) == (source.spec.key, source.digest, target.name)
    ]
    taught = [row for row in stored if (row.op, row.variant) == (source.spec.op, variant.name)]
    first = openings(problem, variant, target, mode=mode, known=known, own=own, taught=taught)
    trials = min(len(searched), max(max_trials or len(searched), len(considered) if mode == "predicted" else 1))
    strides = launch_strides(problem) if mode == "measured" else None
    compiled = sum(cached(source, target, config, strides) is not None for config in searched)
    estimate, basis = _estimate(searched, variant.name, target, mode, trials, compiled, workers, stored)
    return ProblemPlan(
        problem=problem, variant=variant.name, legal=len(legal), seeds=len(first.of(strategy, searched, mode)), trials=trials, cached=compiled,
        estimate_s=estimate, basis=basis,
    )  # fmt: skip


def _estimate(
    searched: Sequence[KernelConfig],
    variant: str,
    target: Target,
    mode: str,
    trials: int,
    compiled: int,
    workers: int | None,
    stored: Sequence[Record],
) -> tuple[float | None, str]:
    own = [row for row in stored if row.variant == variant and row.origin == "local"]
    shipped = [row for gpu in seeds.gpus() for op in {row.op for row in stored} | {"attention_fwd"} for row in seeds.load(gpu, op)]  # fmt: skip
    seconds, whose = _compile_s(own), "trials of your database"
    if not seconds:
        seconds, whose = (
            _compile_s([row for row in shipped if row.variant == variant]),
            "shipped trials of other machines",
        )
    if not seconds:
        return None, "nothing is stored to estimate from"
    compilers = processes(workers)
    fresh = max(0, trials - compiled * trials // max(1, len(searched)))
    total = fresh * median(seconds) / compilers
    basis = f"{fresh} to compile at {median(seconds):.1f} s (median of {len(seconds)} {whose}) by {compilers} processes"
    if mode == "measured":
        gaps = _gaps([row for row in own if row.gpu == target.name])
        if not gaps:
            return None, f"{basis}; no run on {target.name} is stored to say how long a trial takes"
        total += trials * median(gaps)
        basis += f", {trials} trials at {median(gaps):.2f} s (median of {len(gaps)} between trials of your database)"
    return total, basis


def _compile_s(rows: Sequence[Record]) -> list[float]:
    return [float(row.facts["compile_s"]) for row in rows if row.facts and row.facts.get("compile_s")]


def _gaps(rows: Sequence[Record]) -> list[float]:
    """Seconds between one measured trial and the next, run by run."""
    runs: dict[str, list[float]] = {}
    for row in rows:
        if row.status in ("ok", "censored", "wrong_result"):
            runs.setdefault(row.session, []).append(datetime.fromisoformat(row.created).timestamp())
    return [b - a for times in map(sorted, runs.values()) for a, b in itertools.pairwise(times)]
