"""`tune`: the door of the tuner; it prepares each problem and hands it to the predicted or the measured way."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from flashgen import dispatch, settings
from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError, TuningError, UnsupportedProblemError
from flashgen.facts import require_gpu, triton_version
from flashgen.problem import Problem
from flashgen.store import Record, Store, open_store, select
from flashgen.target import Target
from flashgen.tuner import devices, policy, strategies
from flashgen.tuner.ahead import ahead
from flashgen.tuner.condemned import FAILED, condemned
from flashgen.tuner.context import Context, Event, choose_variant, legal_list, require_space, source_of
from flashgen.tuner.interrupts import two_stage
from flashgen.tuner.openings import openings
from flashgen.tuner.places import LocalPlace, Place, spread
from flashgen.tuner.progress import reporter
from flashgen.tuner.result import Mode, ProblemResult, TuneResult
from flashgen.tuner.saving import Writer, recover
from flashgen.tuner.search import check_strategy
from flashgen.tuner.worker import Device, DeviceLostError, MeasuringWorker

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
    retry_failed: bool = False,
    cluster: str | None = None,
    provider: str = "cuda",
    trial_timeout_s: float = 60.0,
    on_event: Callable[[Event], None] | None = None,
    variant: str | None = None,
    worker: MeasuringWorker | None = None,
) -> TuneResult:
    """Tune problems; see `flashgen.tune` for the common arguments.

    Args:
        problems: one or several; each is a unit of work that one device does alone. One that requires gradients is two: the
            forward that keeps lse, and the backward.
        target, mode, max_trials, timeout_s, database, progress: see `flashgen.tune`.
        workers: compiling processes; and at most so many GPUs, of this host or of the cluster, measure side by side.
        strategy: order of the trials, see `search.STRATEGIES`.
        study: an Optuna storage (a path or URL) for the studies; None keeps them in memory.
        resume: do not repeat what the database holds of the same kernel, target, shape and Triton.
        retry_failed: try again what failed before; else it is left out (`condemned`).
        cluster: address of a Ray cluster whose GPUs measure; None for this host's.
        provider: "cuda", or "cpu" for kernel files that run on CPU tensors (tests).
        trial_timeout_s: after which a candidate is killed while it is measured.
        on_event: called with every step of progress, instead of the progress bar.
        variant: name of the one to tune; None for the first that covers the problem, which is what dispatch takes.
        worker: a measuring process of this host's current device that is coming up (`ahead`); None to start one here.

    Raises:
        InvalidProblemError: a value is out of range, or no target can be found.
        UnsupportedProblemError: no variant covers a problem, or measuring is asked for where it cannot be done.
        TuningError: no problem found a winner; carries each cause. Or no configuration is legal, or the devices were
            lost. What was tried is stored.
        DatabaseError: the database cannot be written; what could not be stored is written beside it.
    """
    todo = with_gradients([problems] if isinstance(problems, Problem) else list(problems))
    _check_arguments(todo, max_trials, timeout_s, workers, trial_timeout_s)
    check_strategy(strategy)
    url = str(database or settings.read().database_url)
    start = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(two_stage())
        early = worker or stack.enter_context(ahead(mode, cluster, provider))
        places: list[Place] = []
        if cluster is not None:
            where, places = _on_cluster(stack, cluster, target, mode, provider, workers)
            way: Mode = "measured"
        else:
            where = target or devices.installed()
            way = choose_mode(mode, where, provider=provider)
        for problem in todo:
            require_space(choose_variant(problem, where, variant), problem, where)
        result = TuneResult(problems=[], session=_session(), mode=way, target=where.name, database=url)
        store = stack.enter_context(open_store(url, write=True))
        report = stack.enter_context(reporter(progress, on_event))
        writer = Writer(store, url, result.session)
        stack.callback(dispatch.forget)
        if way == "measured" and not places:
            here = [Device(kind="cpu")] * (workers or 1) if provider == "cpu" else devices.local(where, workers)
            for device in here:
                mine, early = (early, None) if early is not None and early.device == device else (None, early)
                place = LocalPlace(device, workers=workers, study=study, worker=mine)
                stack.callback(place.close)
                place.prepare()
                places.append(place)

        def left_s() -> float | None:
            return None if timeout_s is None else timeout_s - (time.monotonic() - start)

        def expired() -> bool:
            left = left_s()
            return left is not None and left < 0

        def begin(problem: Problem) -> Context:
            waiting = len(todo) - sum(row.problem != problem for row in result.problems)
            unit_left_s = _share(left_s(), math.ceil(waiting / max(1, len(places))))
            context = _context(
                problem, where, way, store, report, result, max_trials=max_trials, workers=workers, strategy=strategy, resume=resume,
                expired=lambda: (unit_left_s() or 0.0) < 0.0, retry_failed=retry_failed, save=writer.save, left_s=unit_left_s,
                trial_timeout_s=trial_timeout_s, variant_name=variant,
            )  # fmt: skip
            # A unit that begins again, since its device was lost, takes the place of its first attempt.
            result.problems[:] = [row for row in result.problems if row.problem != problem] + [context.result]
            return context

        try:
            recover(store, url)
            if way == "measured":
                spread(todo, places, begin, stopped=expired)
            else:
                for problem in todo:
                    if not expired():
                        _predict(begin(problem), study)
            result.timed_out = expired() or any(row.cut_short for row in result.problems)
        except KeyboardInterrupt:
            result.interrupted = True
        except DeviceLostError as error:
            raise _lost(result, error) from error
        result.problems.sort(key=lambda row: todo.index(row.problem))
    result.elapsed_s = time.monotonic() - start
    if not result.interrupted and all(row.winner is None for row in result.problems):
        raise TuningError(
            f"no configuration won for {where.name}; {sum(len(row.trials) for row in result.problems)} trials are stored in {url}:",
            {row.spec_key: row.message for row in result.problems},
        )
    return result


def with_gradients(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, each that requires gradients as a pair: the forward that keeps lse, and the backward."""
    found: list[Problem] = []
    for problem in problems:
        pair = (replace(problem, requires_grad=False, return_lse=True), problem.backward)
        found += pair if problem.requires_grad else (problem,)
    return list(dict.fromkeys(found))


def _share(left_s: float | None, units: int) -> Callable[[], float | None]:
    """What is left of a unit's part of the time: an equal one of each that a device still has to do; none where time is unlimited."""
    if left_s is None:
        return lambda: None
    end = time.monotonic() + left_s / units
    return lambda: end - time.monotonic()


def _predict(context: Context, study: str | None) -> None:
    from flashgen.tuner import predicted  # the accuracy check loads torch

    predicted.run(context, study_storage=study)


def _on_cluster(
    stack: ExitStack, address: str, target: Target | None, mode: Mode, provider: str, workers: int | None
) -> tuple[Target, list[Place]]:
    """The target and the places of a Ray cluster."""
    from flashgen.tuner.cluster import join  # Ray is an extra

    if mode == "predicted":
        raise InvalidProblemError("cluster is for measuring: a prediction needs no GPU. Leave one of the two out.")
    joined = stack.enter_context(join(address, provider=provider, most=workers, compilers=None))
    where = target or joined.target()
    return where, list(joined.places(where))


def _lost(result: TuneResult, error: DeviceLostError) -> TuningError:
    trials = sum(len(row.trials) for row in result.problems)
    won = sum(row.winner is not None for row in result.problems)
    return TuningError(
        f"the run ended because its device was lost: {error} What was measured is kept: {trials} trials, {won} of "
        f"{len(result.problems)} begun problems with a winner, in {result.database} (session {result.session}); --resume goes on.",
        {row.spec_key: row.message for row in result.problems if row.winner is None and row.message},
    )


def choose_mode(mode: Mode, target: Target, *, provider: str = "cuda") -> Mode:
    """Resolve "auto", and refuse what cannot be done.

    Raises:
        InvalidProblemError: unknown mode, or no GPU is named or installed.
        UnsupportedProblemError: measuring without the GPU.
    """
    if mode not in ("auto", "measured", "predicted"):
        raise InvalidProblemError(f"mode={mode!r} is not known: allowed are auto, measured, predicted.")
    if provider == "cpu" and mode != "predicted":
        return "measured"
    require_gpu(target)
    installed = devices.installed()
    if mode == "measured" and installed.name != target.name:
        there = "there is no GPU here" if installed.backend == "cpu" else f"the installed GPU is {installed.name}"
        raise UnsupportedProblemError(
            f"{target.name} cannot be measured: {there}. Use mode='predicted' (--mode predicted), or run on a {target.gpu}."
        )
    if mode == "auto":
        return "measured" if installed.name == target.name else "predicted"
    return mode


def _check_arguments(
    problems: list[Problem],
    max_trials: int | None,
    timeout_s: float | None,
    workers: int | None,
    trial_timeout_s: float,
) -> None:
    if not problems:
        raise InvalidProblemError("problems is empty: give at least one Problem.")
    for name, count in (("max_trials", max_trials), ("workers", workers)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InvalidProblemError(f"{name}={count!r} must be positive, an integer from 1 up, or None.")
    for name, seconds in (("timeout_s", timeout_s), ("trial_timeout_s", trial_timeout_s)):
        wrong = isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf
        if seconds is not None and wrong:
            raise InvalidProblemError(f"{name}={seconds!r} must be positive: seconds, finite, or None.")


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
    retry_failed: bool = False,
    save: Callable[[Iterable[Record]], None] | None = None,
    left_s: Callable[[], float | None] = lambda: None,
    trial_timeout_s: float = 60.0,
    variant_name: str | None = None,
) -> Context:
    variant = choose_variant(problem, target, variant_name)
    source = source_of(variant, problem)
    legal, known = legal_list(variant, problem, target)
    measured_tiles = policy.measured_tiles(variant, problem, target) if mode == "predicted" else ()
    considered = policy.considered(variant, problem.spec, target, measured_tiles, known)
    legal = policy.searched(variant, legal, considered, mode)
    stored = store.trials(spec_key=source.spec.key, digest=source.digest, gpu=target.name)
    taught = store.trials(op=source.spec.op, variant=variant.name) if mode == "measured" else ()
    first = openings(problem, variant, target, mode=mode, known=known, own=stored, taught=taught)
    failed: dict[KernelConfig, Record] = {}
    if mode == "measured" and not retry_failed:
        failed = condemned(stored, triton=triton_version(), shape=problem.shape, variant=variant.name)
    order = strategies.ordered(legal, first.listed, strategy)
    if max_trials is not None and mode == "predicted":
        # What the policy chooses among is compiled however short the list is cut.
        order = list(dict.fromkeys([*considered, *order]))[: max(max_trials, len(considered))]
    return Context(
        problem=problem,
        target=target,
        variant=variant,
        source=source,
        known_good=known,
        measured_tiles=measured_tiles,
        order=order,
        strategy=strategies.make(strategy, legal, seeds=first.listed, lessons=first.lessons),
        max_trials=max_trials,
        session=result.session,
        result=ProblemResult(
            problem=problem, spec_key=source.spec.key, variant=variant.name, digest=source.digest, legal=len(legal)
        ),
        workers=workers,
        save=save or (lambda rows: _add(store, rows)),
        report=report,
        expired=expired,
        left_s=left_s,
        earlier=_earlier(stored, problem, variant.name, _counted(mode, retry_failed)) if resume else {},
        condemned=failed,
        favourites=(*first.near, *(row.config for row in known[:1])),
        trusted=_trusted(stored, problem),
        trial_timeout_s=trial_timeout_s,
    )


def _add(store: Store, rows: Iterable[Record]) -> None:
    store.add(rows)


def _counted(mode: Mode, retry_failed: bool) -> tuple[str, ...]:
    """The statuses that a resumed run does not repeat. What was only predicted is still to be measured."""
    counted = tuple(status for status in _FINAL_STATUSES if mode == "predicted" or status != "predicted")
    return tuple(status for status in counted if not (retry_failed and status in FAILED))


def _trusted(stored: Iterable[Record], problem: Problem) -> Record | None:
    """The stored row that dispatch takes for exactly this shape, if it is of high quality."""
    best = select.best_measured((row for row in stored if row.shape == problem.shape), problem.shape)
    return best if best is not None and best.quality == "high" else None


def _earlier(
    stored: Iterable[Record], problem: Problem, variant: str, statuses: tuple[str, ...]
) -> dict[KernelConfig, Record]:
    """The newest finished row per configuration, of this shape and this Triton."""
    here = triton_version()
    found: dict[KernelConfig, Record] = {}
    for row in sorted(stored, key=lambda row: row.created):
        if row.shape == problem.shape and row.versions.get("triton") == here and row.status in statuses:
            config = KernelConfig(variant=variant, **row.config)
            old = found.get(config)
            # A predicted row with a verdict is worth more than a newer one without.
            if old is None or row.error_ratio is not None or old.error_ratio is None:
                found[config] = row
    return found
