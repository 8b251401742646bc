"""Tuning without the GPU: compile candidates for the target, exclude what does not fit, let the policy choose.

Nothing here is a time. The winner is no argmax of the model: it is the first choice of `flashgen.tuner.policy`, and it passes the
accuracy check in the interpreter before it is stored. Every stored row's `message` says which rule chose it, or that none did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashgen import costmodel
from flashgen.accuracy import AccuracyReport
from flashgen.compile_pool import CompilePool, Result
from flashgen.config import KernelConfig
from flashgen.costmodel import Prediction
from flashgen.errors import BuildError
from flashgen.facts import CompiledFacts
from flashgen.store import Record
from flashgen.tuner import policy, verdicts
from flashgen.tuner.context import Context
from flashgen.tuner.policy import Decision
from flashgen.tuner.search import new_study, proposals
from flashgen.tuner.strategies import InOrder

PROTOCOL = "compile-only-2"

Ranked = list[tuple[KernelConfig, Prediction]]


def run(context: Context, *, study_storage: str | None = None) -> None:
    """Compile, exclude, rank, choose, check and store one problem's candidates.

    A KeyboardInterrupt keeps what is compiled: it is ranked and stored, without a winner, and raised again.
    """
    compiled = _Compiled(context)
    name = f"{context.source.name}-{context.target.name}-{context.session}"
    study = new_study(InOrder(context.order), context.order, name, study_storage)
    trials = {config: trial for trial, config in proposals(study, context.order)}
    told: dict[KernelConfig, AccuracyReport | BuildError] = {}
    try:
        with CompilePool(context.workers) as pool:
            compiled.add(pool, list(trials), lambda config, cost: _tell_study(study, trials[config], cost))
            decision = _decide(context, compiled.facts)
            if not decision.choices and context.variant.modelled and not context.expired():
                # No tile that anybody vouches for fits: the model's turn, for which its shortlist is compiled.
                legal = context.variant.space(context.problem.spec, context.target)
                compiled.add(pool, [c for c in policy.shortlist(legal) if c not in compiled.seen], lambda *_: None)
                decision = _decide(context, compiled.facts)
    except KeyboardInterrupt:
        _store(context, compiled, Decision(choices=(), vetoed={}), told)
        raise
    winner = _choose(context, decision, compiled, told)
    _store(context, compiled, decision, told)
    if winner is not None:
        context.result.winner = next(row for row in context.result.trials if row.config == winner.to_dict())


class _Compiled:
    """What the compiler said of one problem's candidates."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.facts: dict[KernelConfig, CompiledFacts] = {}
        self.failures: list[Record] = []
        self.seen: set[KernelConfig] = set()

    def add(
        self, pool: CompilePool, configs: Sequence[KernelConfig], told: Callable[[KernelConfig, float | None], None]
    ) -> None:
        """Compile candidates until they are done or the time is up; `told` gets each one's predicted cost, or None."""
        context, total = self._context, len(self.seen) + len(configs)
        for config, result in pool.map(context.source, context.target, configs):
            failure = _failure(context, config, result)
            if failure is not None:
                self.failures.append(failure)
                context.result.excluded[config.label] = failure.message or failure.status
                told(config, None)
            elif isinstance(result, CompiledFacts):
                self.facts[config] = result
                told(config, _predict(context, config, result).cost)
            self.seen.add(config)
            context.tell(len(self.seen), total, _best(context, self.facts), "compiling")
            if context.expired():
                break


def _tell_study(study: Any, trial: Any, cost: float | None) -> None:
    if cost is None:
        study.tell(trial, state=_fail())
    else:
        study.tell(trial, cost)


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
    ranked = costmodel.rank([(config, _predict(context, config, known)) for config, known in facts.items()])
    if context.variant.modelled:
        return ranked
    listed = [row.config for row in context.known_good]
    return sorted(ranked, key=lambda row: listed.index(row[0]) if row[0] in listed else len(listed))


def _best(context: Context, facts: dict[KernelConfig, CompiledFacts]) -> str:
    ranked = _rank(context, facts) if len(facts) < 8 or len(facts) % 8 == 0 else []
    if not ranked:
        return ""
    config, prediction = ranked[0]
    return f"predicted best so far: {config.label}, bound by {prediction.bound_by}"


def _decide(context: Context, facts: dict[KernelConfig, CompiledFacts]) -> Decision:
    return policy.decide(
        context.problem, context.target, facts, measured=context.measured_tiles, known_good=context.known_good
    )


def _choose(
    context: Context, decision: Decision, compiled: _Compiled, told: dict[KernelConfig, AccuracyReport | BuildError]
) -> KernelConfig | None:
    """The first choice that passes the accuracy check; the verdicts on the way to it go into `told`."""
    reasons = dict(decision.vetoed)
    done = len(compiled.seen)
    for choice in decision.choices:
        context.tell(done, done, choice.config.label, "checking accuracy")
        verdict = told[choice.config] = _check(context, choice.config)
        if isinstance(verdict, AccuracyReport) and verdict.ok:
            context.result.message = choice.rule
            return choice.config
        reasons[choice.config.label] = str(verdict if isinstance(verdict, BuildError) else verdict.message)
    for row in context.known_good:
        if row.config not in compiled.facts:
            reasons.setdefault(row.config.label, context.result.excluded.get(row.config.label, "was not compiled"))
    listed = "; ".join(f"{label}: {reason}" for label, reason in reasons.items()) or "none is listed"
    context.result.message = (
        f"no tile qualifies as a predicted winner: {listed}. Measure on the GPU: flashgen tune --mode measured"
    )
    return None


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
    return verdicts.of(context.source, config, context.problem)


def _store(
    context: Context, compiled: _Compiled, decision: Decision, told: dict[KernelConfig, AccuracyReport | BuildError]
) -> None:
    rows = list(compiled.failures)
    rules = {choice.config: choice.rule for choice in decision.choices}
    for place, (config, prediction) in enumerate(_rank(context, compiled.facts), start=1):
        values: dict[str, Any] = {
            "rank": place,
            "bound_by": prediction.bound_by,
            "predicted_ms": prediction.ms,
            "model": prediction.model,
        }
        status, report = "predicted", told.get(config)
        if isinstance(report, AccuracyReport):
            values |= {"max_abs_error": report.max_error, "error_ratio": report.ratio}
        if report is None:
            vetoed = decision.vetoed.get(config.label)
            values["message"] = "not chosen: " + (f"vetoed, {vetoed}" if vetoed else rules.get(config, "only ranked"))
        elif isinstance(report, AccuracyReport) and report.ok:
            values["message"] = f"chosen by {rules[config]}"
        else:
            status, values["message"] = "wrong_result", str(getattr(report, "message", report))[:500]
        rows.append(context.record(config, status, protocol=PROTOCOL, facts=compiled.facts[config], **values))
    context.finish(rows)


def _fail() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL
