"""Tuning on a device: compile side by side, measure one candidate at a time in a worker process that may die.

A candidate is compiled in the pool first, which decides legality exactly and fills Triton's own cache; then the worker (`trial`)
checks and times it. Whatever goes wrong is a trial's status, never the end of the run, and what failed once is not tried again
unasked (`condemned`). The best few are timed once more, side by side, and that decides (`decision`).
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from flashgen.bench import PROTOCOL_SEARCH
from flashgen.config import KernelConfig
from flashgen.facts import CompiledFacts
from flashgen.store import Record
from flashgen.tuner import condemned, decision
from flashgen.tuner.compiled import Compiled, Compiler
from flashgen.tuner.context import Context
from flashgen.tuner.search import history, new_study, proposals

if TYPE_CHECKING:
    import optuna

FINALISTS = 3
FINAL_SHARE = 0.25  # of the time that is left when a problem begins: kept for the final rounds, and to check the winner
PROBES = 4  # trials after which it is known what compiling and measuring the whole list would take


class Bench(Protocol):
    """The worker as the loop sees it; tests put their own in its place."""

    hello: dict[str, str]

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A reply with at least `status`; `crashed` and `timeout` where the process did not answer."""


def run(context: Context, bench: Bench, compiler: Compiler, *, study_storage: str | None = None) -> None:
    """Measure one problem's candidates and store every trial as it ends.

    Where every legal configuration is to be measured and the time allows it, all are compiled first, side by side: compiling is the bill.
    Where there is a time limit, the first trials tell what that costs. A bounded search compiles what the strategy
    proposes when it proposes it.

    A KeyboardInterrupt keeps what is measured, and is raised again; so does the loss of the device.

    Raises:
        DeviceLostError: no worker can be started.
    """
    context.result.trials.extend(context.earlier.values())
    context.result.excluded |= {
        config.label: condemned.reason(row) for config, row in context.condemned.items() if config in context.order
    }
    limit = len(context.order) if context.max_trials is None else context.max_trials  # an earlier run's count too
    study = new_study(
        context.strategy, context.order, f"{context.source.name}-{context.target.name}-{context.session}", study_storage
    )
    _remember(study, context)
    compiled = Compiled(context, compiler)
    undecided = limit >= len(context.order)  # whether all are compiled at once
    paces: list[float] = []
    kept_s = FINAL_SHARE * (context.left_s() or 0.0)
    number = 0
    for trial, config in proposals(study, context.order):
        if number + len(context.earlier) >= limit:
            break
        left_s = context.left_s()
        if context.expired() or (left_s is not None and left_s < kept_s):
            context.result.cut_short = True
            break
        was_vetoed = config in compiled.vetoed
        if undecided and (left_s is None or len(paces) == PROBES):
            undecided = False
            known = (compiled, context.earlier, context.condemned)
            rest = [one for one in context.order if not any(one in place for place in known)]
            if compiled.affordable(rest, median(paces) if paces else 0.0, kept_s):
                compiled.add(rest)
        compiled.add([config])
        if config not in compiled:
            context.result.cut_short = True
            break
        if config in compiled.vetoed and not was_vetoed:
            trial.set_user_attr("vetoed", compiled.vetoed[config])
            study.tell(trial, state=_state("PRUNED"))  # its turn comes when nothing else is left
            continue
        number += 1
        if not compiled.runs(config):
            study.tell(trial, state=_state("FAIL"))
            continue
        start = time.monotonic()
        record = _trial(context, bench, config, compiled.facts(config))
        paces.append(time.monotonic() - start)
        context.finish([record])
        study.tell(trial, *_told(record))
        context.tell(number, limit - len(context.earlier), _shown(context), "measuring")
    _tell_vetoed(context, compiled)
    finalists = context.strategy.finalists(history(study, context.order), FINALISTS)
    decision.decide(context, bench, finalists)


def _tell_vetoed(context: Context, compiled: Compiled) -> None:
    """What was put off until the run's end is left out, with the reason."""
    tried = [row.config for row in context.result.trials]
    for config, reason in compiled.vetoed.items():
        if config.to_dict() not in tried:
            context.result.excluded[config.label] = f"not measured, the cost model advises against it: {reason}"


def _remember(study: optuna.Study, context: Context) -> None:
    """An earlier run's trials, and what is condemned, become trials of the study: the strategy reads nothing else."""
    import optuna

    known = {trial.config for trial in history(study, context.order)}
    space = {
        name: optuna.distributions.CategoricalDistribution(sorted({config[name] for config in context.order}))
        for name in (context.order[0] if context.order else ())
    }
    legal = set(context.order)
    for config, row in {**context.condemned, **context.earlier}.items():
        if config in known or config not in legal:
            continue
        ran = row.status == "ok" and row.latency_ms is not None
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if ran else optuna.trial.TrialState.FAIL,
                params=config.to_dict(),
                distributions=space,  # type: ignore[arg-type]
                value=row.latency_ms if ran else None,
            )
        )


def _trial(context: Context, bench: Bench, config: KernelConfig, facts: CompiledFacts | None) -> Record:
    best = context.best()
    best_ms = None if best is None else best.latency_ms
    request = {**decision.request_of(context), "do": "trial", "config": config.to_dict(), "best_ms": best_ms}
    # The incumbent's time bounds what a candidate may take: each is launched some ten times, and once through the checks.
    reply = bench.ask(request, max(context.trial_timeout_s, 50 * (best_ms or 0.0) / 1e3))
    names = ("latency_ms", "latency_p10_ms", "latency_p90_ms", "max_abs_error", "error_ratio", "message")
    values = {name: reply[name] for name in names if reply.get(name) is not None}
    return context.record(
        config,
        reply["status"],
        protocol=reply.get("protocol", PROTOCOL_SEARCH),
        facts=facts,
        device=bench.hello,
        # Timed one after another, so the card's drift is in it: only the final rounds make a time to be relied on.
        quality="low" if reply["status"] == "ok" else "high",
        **values,
    )


def _shown(context: Context) -> str:
    best = context.best()
    if best is None or best.latency_ms is None:
        return ""
    return f"best so far {best.latency_ms:.4f} ms: {decision.label(best)}"


def _told(record: Record) -> tuple[Any, ...]:
    return (record.latency_ms,) if record.status == "ok" else (None, _state("FAIL"))


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]
