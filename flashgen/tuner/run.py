"""`tune`: the door of the tuner; it prepares each problem and hands it to the predicted or the measured way."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from flashgen import dispatch, settings
from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError, TuningError, UnsupportedProblemError
from flashgen.facts import require_gpu, triton_version
from flashgen.problem import Problem
from flashgen.store import Record, Store, open_store, seeds, select
from flashgen.target import Target
from flashgen.tuner import measured, policy, predicted
from flashgen.tuner.context import Context, Event, choose_variant, legal_list, source_of
from flashgen.tuner.progress import reporter
from flashgen.tuner.result import Mode, ProblemResult, TuneResult
from flashgen.tuner.search import check_strategy, ordered

_FINAL_STATUSES = (
    "ok",
    "censored",
    "compile_error",
    "out_of_resources",
    "wrong_result",
    "timeout",
    "crashed",
    "predicted",
)


def tune(
    problems: Problem | Sequence[Problem],
    *,
    target: Target | None = None,
    mode: Mode = "auto",
    max_trials: int | None = None,
    timeout_s: float | None = None,
    database: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    strategy: str = "auto",
    study: str | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> TuneResult:
    """Tune problems one after another; see `flashgen.tune` for the common arguments.

    Args:
        strategy: order of the trials, see `search.STRATEGIES`.
        study: an Optuna storage (a path or URL) for the studies; None keeps them in memory.
        resume: do not repeat what the database holds of the same kernel, target, shape and Triton.
        on_event: called with every step of progress, instead of the progress bar.

    Raises:
        InvalidProblemError: a value is out of range, or no target can be found.
        UnsupportedProblemError: no variant covers a problem, or measuring is asked for where it cannot be done.
        TuningError: no problem found a winner; carries each cause. What was tried is stored.
        DatabaseError: the database cannot be written.
    """
    todo = [problems] if isinstance(problems, Problem) else list(problems)
    _check_arguments(todo, max_trials, timeout_s, workers)
    check_strategy(strategy)
    where = target or Target.detect()
    way = choose_mode(mode, where)
    url = database or settings.read().database_url
    start = time.monotonic()
    result = TuneResult(problems=[], session=_session(), mode=way, target=where.name, database=str(url))
    with open_store(url, write=True) as store, reporter(progress, on_event) as report:
        try:
            for problem in todo:
                context = _context(
                    problem, where, way, store, report, result, max_trials=max_trials, workers=workers, strategy=strategy, resume=resume,
                    expired=lambda: timeout_s is not None and time.monotonic() - start > timeout_s,
                )  # fmt: skip
                result.problems.append(context.result)
                (measured if way == "measured" else predicted).run(context, study_storage=study)
                if context.expired():
                    result.interrupted = True
                    break
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            dispatch.forget()
    result.elapsed_s = time.monotonic() - start
    if not result.interrupted and all(row.winner is None for row in result.problems):
        raise TuningError(
            f"no configuration won for {where.name}; {sum(len(row.trials) for row in result.problems)} trials are stored in {url}:",
            {row.spec_key: row.message for row in result.problems},
        )
    return result


def choose_mode(mode: Mode, target: Target) -> Mode:
    """Resolve "auto", and refuse what cannot be done.

    Raises:
        InvalidProblemError: unknown mode, or no GPU is named or installed.
        UnsupportedProblemError: measuring without the GPU.
    """
    if mode not in ("auto", "measured", "predicted"):
        raise InvalidProblemError(f"mode={mode!r} is not known: allowed are auto, measured, predicted.")
    require_gpu(target)
    installed = Target.detect()
    if mode == "measured" and installed.name != target.name:
        there = "there is no GPU here" if installed.backend == "cpu" else f"the installed GPU is {installed.name}"
        raise UnsupportedProblemError(
            f"{target.name} cannot be measured: {there}. Use mode='predicted' (--mode predicted), or run on a {target.gpu}."
        )
    if mode == "auto":
        return "measured" if installed.name == target.name else "predicted"
    return mode


def _check_arguments(
    problems: list[Problem], max_trials: int | None, timeout_s: float | None, workers: int | None
) -> None:
    if not problems:
        raise InvalidProblemError("problems is empty: give at least one Problem.")
    for name, value in (("max_trials", max_trials), ("timeout_s", timeout_s), ("workers", workers)):
        if value is not None and not value > 0:
            raise InvalidProblemError(f"{name}={value!r} must be positive, or None.")


def _session() -> str:
    return uuid.uuid4().hex[:12]


def _context(
    problem: Problem,
    target: Target,
    mode: Mode,
    store: Store,
    report: Callable[[Event], None],
    result: TuneResult,
    *,
    max_trials: int | None,
    workers: int | None,
    strategy: str,
    resume: bool,
    expired: Callable[[], bool],
) -> Context:
    variant = choose_variant(problem, target)
    source = source_of(variant, problem)
    legal, known = legal_list(variant, problem, target)
    measured_tiles = policy.measured_tiles(variant, problem, target) if mode == "predicted" else ()
    legal = list(dict.fromkeys([*legal, *policy.considered(variant, problem.spec, target, measured_tiles, known)]))
    if mode == "predicted" and not variant.modelled:
        legal = [row.config for row in known]  # nothing would choose among the others
    stored = store.trials(spec_key=source.spec.key, digest=source.digest, gpu=target.name)
    order = ordered(
        legal,
        [*(row.config for row in known), *_near_winners(problem, variant.name, stored, source.spec.op, target)],
        strategy,
    )
    if max_trials is not None:
        # What the policy chooses among is compiled however short the list is cut.
        first = policy.considered(variant, problem.spec, target, measured_tiles, known) if mode == "predicted" else []
        order = list(dict.fromkeys([*first, *order]))[: max(max_trials, len(first))]
    return Context(
        problem=problem,
        target=target,
        variant=variant,
        source=source,
        known_good=known,
        measured_tiles=measured_tiles,
        order=order,
        session=result.session,
        result=ProblemResult(
            problem=problem, spec_key=source.spec.key, variant=variant.name, digest=source.digest, legal=len(legal)
        ),
        workers=workers,
        save=lambda rows: _save(store, rows),
        report=report,
        expired=expired,
        earlier=_earlier(stored, problem, variant.name) if resume else {},
    )


def _save(store: Store, rows: Iterable[Record]) -> None:
    store.add(rows)


def _earlier(stored: Iterable[Record], problem: Problem, variant: str) -> dict[KernelConfig, Record]:
    """The newest finished row per configuration, of this shape and this Triton."""
    here = triton_version()
    found: dict[KernelConfig, Record] = {}
    for row in sorted(stored, key=lambda row: row.created):
        if row.shape == problem.shape and row.versions.get("triton") == here and row.status in _FINAL_STATUSES:
            config = KernelConfig(variant=variant, **row.config)
            old = found.get(config)
            # A predicted row with a verdict is worth more than a newer one without.
            if old is None or row.error_ratio is not None or old.error_ratio is None:
                found[config] = row
    return found


def _near_winners(
    problem: Problem, variant: str, stored: Iterable[Record], op: str, target: Target
) -> list[KernelConfig]:
    """Winners of the nearest shapes, the user's and the shipped ones: worth a try first."""
    shipped = [
        row for row in seeds.load(target.name, op) if row.spec_key == problem.spec.key and row.variant == variant
    ]
    rows = (select.best_measured(stored, problem.shape), select.best_measured(shipped, problem.shape))
    return [KernelConfig(variant=variant, **row.config) for row in rows if row is not None]
