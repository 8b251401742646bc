"""Tuning without the GPU: compile every candidate for the target, exclude what does not fit, rank the rest.

Nothing here is a time. The winner is no argmax of the model: it is the best-ranked of the *known-good* tiles that fit and do not
spill in their main loop, and it passes the accuracy check in the interpreter before it is stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flashgen import accuracy, costmodel, interpret
from flashgen.accuracy import AccuracyReport
from flashgen.compile_pool import CompilePool, Result
from flashgen.config import KernelConfig
from flashgen.costmodel import Prediction
from flashgen.errors import BuildError
from flashgen.facts import CompiledFacts
from flashgen.store import Record
from flashgen.tuner.context import Context
from flashgen.tuner.search import new_study, proposals
from flashgen.tuner.strategies import InOrder

PROTOCOL = "compile-only-1"

Ranked = list[tuple[KernelConfig, Prediction]]


def run(context: Context, *, study_storage: str | None = None) -> None:
    """Compile, exclude, rank, choose, check and store one problem's candidates.

    A KeyboardInterrupt keeps what is compiled: it is ranked and stored, without a winner, and raised again.
    """
    facts: dict[KernelConfig, CompiledFacts] = {}
    failures: list[Record] = []
    study = new_study(
        InOrder(context.order),
        context.order,
        f"{context.source.name}-{context.target.name}-{context.session}",
        study_storage,
    )
    trials = {config: trial for trial, config in proposals(study, context.order)}
    try:
        with CompilePool(context.workers) as pool:
            for config, result in pool.map(context.source, context.target, list(trials)):
                failure = _failure(context, config, result)
                if failure is not None:
                    failures.append(failure)
                    context.result.excluded[config.label] = failure.message or failure.status
                    study.tell(trials[config], state=_fail())
                elif isinstance(result, CompiledFacts):
                    facts[config] = result
                    study.tell(trials[config], _predict(context, config, result).cost)
                context.tell(len(facts) + len(failures), len(trials), _best(context, facts), "compiling")
                if context.expired():
                    break
    except KeyboardInterrupt:
        _store(context, _rank(context, facts), facts, failures, {})
        raise
    ranked = _rank(context, facts)
    winner, reports = _choose(context, ranked, facts)
    _store(context, ranked, facts, failures, reports)
    if winner is not None:
        context.result.winner = next(row for row in context.result.trials if row.config == winner.to_dict())


def _failure(context: Context, config: KernelConfig, result: Result) -> Record | None:
    """The record of a candidate that cannot run, or None."""
    if isinstance(result, BuildError):
        text = str(result)
        status = "timeout" if "(timeout)" in text else "crashed" if "exit status" in text else "compile_error"
        return context.record(config, status, protocol=PROTOCOL, message=text[:500])
    reason = context.variant.illegal(context.problem.spec, context.target, config, result)
    if reason is None:
        return None
    return context.record(config, "out_of_resources", protocol=PROTOCOL, facts=result, message=reason)


def _predict(context: Context, config: KernelConfig, facts: CompiledFacts) -> Prediction:
    return costmodel.predict(facts, context.problem, context.target, config)


def _rank(context: Context, facts: dict[KernelConfig, CompiledFacts]) -> Ranked:
    return costmodel.rank([(config, _predict(context, config, known)) for config, known in facts.items()])


def _best(context: Context, facts: dict[KernelConfig, CompiledFacts]) -> str:
    ranked = _rank(context, facts) if len(facts) < 8 or len(facts) % 8 == 0 else []
    if not ranked:
        return ""
    config, prediction = ranked[0]
    return f"predicted best so far: {config.label}, bound by {prediction.bound_by}"


def _choose(
    context: Context, ranked: Ranked, facts: dict[KernelConfig, CompiledFacts]
) -> tuple[KernelConfig | None, dict[KernelConfig, AccuracyReport | BuildError]]:
    """The winner, and the verdicts of the accuracy check on the way to it."""
    known = {row.config: row.source for row in context.known_good}
    reports: dict[KernelConfig, AccuracyReport | BuildError] = {}
    reasons: dict[str, str] = {}
    for config, _ in ranked:
        if config not in known:
            continue
        spills = facts[config].loop_spill_ops
        if spills:
            reasons[config.label] = f"{spills} spill instructions in its main loop"
            continue
        context.tell(len(ranked), len(ranked), f"{config.label} (known good)", "checking accuracy")
        verdict = _check(context, config)
        reports[config] = verdict
        if isinstance(verdict, AccuracyReport) and verdict.ok:
            context.result.message = f"known good: {known[config]}"
            return config, reports
        reasons[config.label] = str(verdict if isinstance(verdict, BuildError) else verdict.message)
    for config in known:
        if config not in facts:
            reasons.setdefault(config.label, context.result.excluded.get(config.label, "was not compiled"))
    told = "; ".join(f"{label}: {reason}" for label, reason in reasons.items()) or "none is listed"
    context.result.message = (
        f"no known-good tile qualifies as a predicted winner: {told}. Measure on the GPU: flashgen tune --mode measured"
    )
    return None, reports


def _values(config: KernelConfig) -> dict[str, Any]:
    return dict(config)


def _check(context: Context, config: KernelConfig) -> AccuracyReport | BuildError:
    earlier = context.earlier.get(config)
    if earlier is not None and earlier.error_ratio is not None:
        return AccuracyReport(
            ok=earlier.error_ratio <= 1.0,
            max_error=earlier.max_abs_error or 0.0,
            mean_error=0.0,
            max_ratio=earlier.error_ratio,
            mean_ratio=0.0,
            lse_error=0.0,
            lse_ratio=0.0,
            message="checked before",
        )
    launch: Any = partial(interpret.launch, context.source, **_values(config))
    try:
        return accuracy.check_launch(launch, context.problem.spec)
    except BuildError as error:
        return error


def _store(
    context: Context,
    ranked: Ranked,
    facts: dict[KernelConfig, CompiledFacts],
    failures: list[Record],
    reports: dict[KernelConfig, AccuracyReport | BuildError],
) -> None:
    rows = list(failures)
    for place, (config, prediction) in enumerate(ranked, start=1):
        values: dict[str, Any] = {
            "rank": place,
            "bound_by": prediction.bound_by,
            "predicted_ms": prediction.ms,
            "model": prediction.model,
        }
        status, report = "predicted", reports.get(config)
        if isinstance(report, AccuracyReport):
            values |= {"max_abs_error": report.max_error, "error_ratio": report.ratio, "message": report.message}
        elif report is not None:
            values["message"] = str(report)[:500]
        if report is not None and (isinstance(report, BuildError) or not report.ok):
            status = "wrong_result"
        rows.append(context.record(config, status, protocol=PROTOCOL, facts=facts[config], **values))
    context.finish(rows)


def _fail() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL
