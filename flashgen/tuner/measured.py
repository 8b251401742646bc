"""Tuning on the GPU: compile side by side, measure one candidate at a time in a worker process that may die.

A candidate is compiled in the pool first, which decides legality exactly and fills Triton's own cache; then the worker checks
its accuracy on poisoned small problems, screens it with one launch, times it, and compares its output again. Whatever goes
wrong is a trial's status, never the end of the run. The three best are timed once more, interleaved, and that decides.
"""

from __future__ import annotations

import json
import os
import select as os_select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from flashgen.bench import PROTOCOL_SEARCH
from flashgen.compile_pool import CompilePool
from flashgen.config import KernelConfig
from flashgen.errors import BuildError
from flashgen.facts import CompiledFacts
from flashgen.interpret_worker import receive, send
from flashgen.store import Record
from flashgen.tuner.context import Context
from flashgen.tuner.search import history, new_study, proposals

if TYPE_CHECKING:
    import optuna

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flashgen.tuner.measure_worker import main; main(*map(int, sys.argv[2:]))"
)
_START_TIMEOUT_S = 120.0
_TRIAL_TIMEOUT_S = 60.0
FINALISTS = 3
CENSOR_FACTOR = 3.0  # one launch slower than this many times the best so far is not timed further


class Bench(Protocol):
    """The worker as the loop sees it; tests put their own in its place."""

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A reply with at least `status`; `crashed` and `timeout` where the process did not answer."""

    def close(self) -> None:
        """End it."""


def run(context: Context, *, study_storage: str | None = None, bench: Callable[[], Bench] | None = None) -> None:
    """Measure one problem's candidates and store every trial as it ends.

    Where every legal configuration is to be measured, all are compiled first, side by side: compiling is the bill. A bounded
    search compiles what the strategy proposes when it proposes it.

    A KeyboardInterrupt keeps what is measured, and is raised again.
    """
    context.result.trials.extend(context.earlier.values())
    limit = len(context.order) if context.max_trials is None else context.max_trials  # an earlier run's count too
    study = new_study(
        context.strategy, context.order, f"{context.source.name}-{context.target.name}-{context.session}", study_storage
    )
    _remember(study, context)
    worker = (bench or GpuWorker)()
    try:
        with CompilePool(context.workers) as pool:
            compiled = _compile(context, pool, context.order if limit >= len(context.order) else [])
            number = 0
            for trial, config in proposals(study, context.order):
                if context.expired() or number + len(context.earlier) >= limit:
                    break
                if config not in compiled:
                    compiled |= _compile(context, pool, [config])
                facts = compiled[config]
                number += 1
                if facts is None:
                    study.tell(trial, state=_fail())
                    continue
                record = _trial(context, worker, config, facts, _best(context))
                context.finish([record])
                study.tell(trial, *_told(record))
                shown = _best(context)
                text = (
                    f"best so far {shown.latency_ms:.4f} ms: {_label(shown)}"
                    if shown is not None and shown.latency_ms
                    else ""
                )
                context.tell(number, limit - len(context.earlier), text, "measuring")
        _decide(context, worker, context.strategy.finalists(history(study, context.order), FINALISTS))
    finally:
        worker.close()


def _remember(study: optuna.Study, context: Context) -> None:
    """An earlier run's trials become trials of the study: the strategy reads nothing else."""
    import optuna

    known = {trial.config for trial in history(study, context.order)}
    space = {
        name: optuna.distributions.CategoricalDistribution(sorted({config[name] for config in context.order}))
        for name in (context.order[0] if context.order else ())
    }
    for config, row in context.earlier.items():
        if config in known or config not in set(context.order):
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


def _compile(
    context: Context, pool: CompilePool, configs: Sequence[KernelConfig]
) -> dict[KernelConfig, CompiledFacts | None]:
    """Facts of what fits; what does not is recorded and excluded, and None here. What an earlier run finished is left out."""
    todo = [config for config in configs if config not in context.earlier]
    compiled: dict[KernelConfig, CompiledFacts | None] = {}
    for number, (config, result) in enumerate(pool.map(context.source, context.target, todo), start=1):
        reason: str | None
        if isinstance(result, BuildError):
            reason, status, facts = str(result), "compile_error", None
        else:
            reason, status, facts = (
                context.variant.illegal(context.problem.spec, context.target, config, result),
                "out_of_resources",
                result,
            )
        compiled[config] = facts if reason is None else None
        if reason is not None:
            context.result.excluded[config.label] = reason
            context.finish(
                [context.record(config, status, protocol=PROTOCOL_SEARCH, facts=facts, message=reason[:500])]
            )
        if len(todo) > 1:
            context.tell(number, len(todo), "", "compiling")
    return compiled


def _trial(context: Context, worker: Bench, config: KernelConfig, facts: CompiledFacts, best: Record | None) -> Record:
    request = {
        **_request(context),
        "do": "trial",
        "config": config.to_dict(),
        "best_ms": None if best is None else best.latency_ms,
    }
    reply = worker.ask(request, _TRIAL_TIMEOUT_S)
    return _as_record(context, config, reply, facts)


def _as_record(context: Context, config: KernelConfig, reply: dict[str, Any], facts: CompiledFacts | None) -> Record:
    names = ("latency_ms", "latency_p10_ms", "latency_p90_ms", "max_abs_error", "error_ratio", "message")
    values = {name: reply[name] for name in names if reply.get(name) is not None}
    return context.record(
        config, reply["status"], protocol=reply.get("protocol", PROTOCOL_SEARCH), facts=facts, **values
    )


def _request(context: Context) -> dict[str, Any]:
    return {
        "spec": context.source.spec.key,
        "variant": context.variant.name,
        "text": context.source.text,
        "problem": {name: getattr(context.problem, name) for name in context.problem.__slots__},
        "key": f"{context.source.digest} {context.problem}",
    }


def _best(context: Context) -> Record | None:
    timed = [row for row in context.result.trials if row.status == "ok" and row.latency_ms is not None]
    return min(timed, key=lambda row: row.latency_ms or 0.0, default=None)


def _decide(context: Context, worker: Bench, finalists: list[KernelConfig]) -> None:
    """Re-time the best few side by side; the least median wins."""
    timed = sorted((row for row in context.result.trials if row.status == "ok"), key=lambda row: row.latency_ms or 0.0)
    if not finalists:
        causes = dict(list(context.result.excluded.items())[:5])
        causes |= {_label(row): row.message or row.status for row in context.result.trials[:5] if row.status != "ok"}
        context.result.message = "no candidate could be measured: " + "; ".join(f"{k}: {v}" for k, v in causes.items())
        return
    context.tell(0, 1, "", "re-timing the best")
    reply = worker.ask(
        {**_request(context), "do": "final", "configs": [c.to_dict() for c in finalists]}, _TRIAL_TIMEOUT_S
    )
    rows: list[Record] = []
    if reply["status"] == "ok":
        by_config = {KernelConfig(variant=context.variant.name, **row.config): row for row in reversed(timed)}
        for config, one in zip(finalists, reply["times"], strict=True):
            old = by_config[config]
            facts = None if old.facts is None else CompiledFacts.from_json(old.facts)
            verdict = {"status": "ok", "max_abs_error": old.max_abs_error, "error_ratio": old.error_ratio}
            rows.append(_as_record(context, config, {**verdict, **one}, facts))
        context.finish(rows)
    else:
        context.result.message = f"the re-timing failed ({reply.get('message')}); the search's times decide"
    context.tell(1, 1, "", "re-timing the best")
    context.result.winner = min(rows or timed, key=lambda row: row.latency_ms or 0.0)


def _label(row: Record) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(row.config.items()))


def _told(record: Record) -> tuple[Any, ...]:
    import optuna

    if record.status == "ok":
        return (record.latency_ms,)
    return (None, optuna.trial.TrialState.FAIL)


def _fail() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


class GpuWorker:
    """The measuring process: respawned when it dies, hangs, or reports an error that a CUDA context does not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._replies = -1

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait; a process that does not answer is killed, and that is the trial's status."""
        try:
            if self._process is None:
                self._start()
            send(self._requests, request)
            reply = self._receive(timeout_s)
        except BrokenPipeError:
            reply = None
        except TimeoutError:
            self.close()
            return {"status": "timeout", "message": f"gave no answer within {timeout_s:g} s and was killed"}
        if reply is None:
            code = self._process.wait() if self._process is not None else None
            self.close()
            return {"status": "crashed", "message": f"the measuring process died (exit status {code})"}
        if reply.get("sticky"):
            self.close()
        return reply

    def _start(self) -> None:
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), str(request_read), str(reply_write)],
                pass_fds=(request_read, reply_write),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
                start_new_session=True,  # Ctrl-C is the parent's to handle, and a kill takes the compiler's children along
            )
        finally:
            os.close(request_read)
            os.close(reply_write)
        hello = self._receive(_START_TIMEOUT_S)
        if hello is None or "error" in hello:
            why = "it ended before it answered" if hello is None else hello["error"]
            self.close()
            raise BuildError(f"the measuring process did not start: {why}")

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout_s
        ready, _, _ = os_select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        return receive(self._replies)

    def close(self) -> None:
        """Kill the process and its children; may be called twice."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, 9)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None
        for fd in (self._requests, self._replies):
            if fd >= 0:
                os.close(fd)
        self._requests = self._replies = -1


def times_json(measurement: Any) -> dict[str, Any]:
    """A Measurement as part of a reply."""
    return {name: value for name, value in asdict(measurement).items() if name != "samples"}
