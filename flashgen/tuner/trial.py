"""What a measuring worker does with a candidate: checks it, times it, and checks it again.

Before a time counts the candidate has passed the error budget on a poisoned problem that is the tuned one cut short, and so runs the same
binary; then it runs on the tuned problem. There every
buffer lies between guard bytes, the output holds NaN before each launch, and each timed launch must leave the very bits of the first one.
After the timing guards and inputs are looked at, and parts of the output are held against the fp64 oracle (`spot`): faults
that only show at full size, or only in the twentieth launch, are wrong results like any other. Who wins has passed all small problems, too
(`final`): they are compiled for, each some seconds, and that is worth it for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from flashgen import gradients
from flashgen.accuracy import AccuracyReport
from flashgen.bench import PROTOCOL_GRAPH, PROTOCOL_SEARCH, measure
from flashgen.problem import Problem
from flashgen.tuner.case import Case, bits
from flashgen.tuner.faults import WrongResultError
from flashgen.tuner.providers import GRAPH_LAUNCHES
from flashgen.tuner.spot import spot_check

if TYPE_CHECKING:
    from torch import Tensor

CENSOR_FACTOR = 3.0  # one launch slower than this many times the best so far is not timed further
_LENGTHS = 768  # a multiple of every tile's rows and keys: what is cut by it keeps its remainders


class Contestant:
    """One configuration on the tuned problem, every launch of it watched."""

    def __init__(self, case: Case, config: dict[str, Any]) -> None:
        self._case, self._config = case, config
        # What is added in no fixed order is judged by its error alone.
        self._unordered = case.variant.unordered(case.problem)
        self._first: list[Tensor] = []
        self._strayed: Tensor | None = None
        self._replay: Callable[[], object] | None = None
        self.launches = 1

    def first(self) -> None:
        """The first launch: faults show here, and its bits are what all others must repeat.

        Raises:
            WrongResultError: NaN is left, or something was written where it must not be.
        """
        self._case.poison()
        self._run()
        self._case.provider.synchronize()
        if any(bool(out.isnan().any()) for out in self._case.results()):
            raise WrongResultError("the output holds NaN: not every row was written, or what was written is wrong")
        self._first = self._bits()
        self._look()

    def once(self) -> float:
        """Milliseconds of a launch; what it left is compared with the first, on the device and outside the timed span."""
        self._case.poison()
        time = self._case.provider.once(self._replay or self._run) / self.launches
        strayed = reduce(or_, [new != old for new, old in zip(self._bits(), self._first, strict=True)])
        self._strayed = strayed.int() if self._strayed is None else self._strayed + strayed
        return time

    def shorten(self) -> None:
        """From now on time several launches at once, each on the next copy of the inputs."""
        copies = self._case.rotated()
        count = max(GRAPH_LAUNCHES, len(copies))
        runs = [partial(self._case.run_on, copies[i % len(copies)], self._config) for i in range(count)]
        self._replay, self.launches = self._case.provider.together(runs), count

    def check(self) -> AccuracyReport:
        """The verdict after the timing.

        Raises:
            WrongResultError: launches differed, guards or inputs were written to, or rows left the error budget.
        """
        self._case.provider.synchronize()
        if self._strayed is not None and int(self._strayed):
            raise WrongResultError(f"{int(self._strayed)} timed launches left another output than the first one")
        self._case.poison()
        self._run()
        self._case.provider.synchronize()
        self._look()
        report = spot_check(self._case)
        if not report.ok:
            raise WrongResultError(f"on the tuned problem: {report.message}")
        return report

    def _bits(self) -> list[Tensor]:
        return [bits(out) for out in self._case.results(but=self._unordered)]

    def _run(self) -> None:
        self._case.run_on(self._case.own, self._config)

    def _look(self) -> None:
        if found := self._case.touched():
            raise WrongResultError("; ".join(found), spoilt=True)


def cut(problem: Problem) -> Problem:
    """A problem of at most some 1,500 rows and keys that is compiled like this one: as ragged, as aligned, its heads as grouped."""

    def shorter(length: int) -> int:
        return length if length < 2 * _LENGTHS else _LENGTHS + length % _LENGTHS

    heads = problem.num_heads_kv
    # Where the head dims are no multiples of 16, the number of heads decides whether the strides are.
    if problem.head_dim % 16 == 0 and problem.head_dim_v % 16 == 0:
        heads = min(heads, 2)
    group = problem.num_heads_q // max(1, problem.num_heads_kv)
    return replace(
        problem, batch=2, seqlen_q=shorter(problem.seqlen_q), seqlen_k=shorter(problem.seqlen_k), num_heads_q=heads * group,
        num_heads_kv=heads,
    )  # fmt: skip


def checked(case: Case, config: dict[str, Any], problems: list[Problem] | None = None) -> AccuracyReport:
    """The error budget on small problems with dense strides; None for those that every winner has to pass."""
    launch, device = partial(case.launch, **config), case.provider.device
    if case.given is None:
        return gradients.check_launch(launch, case.spec, device=device, strides=("dense",), problems=problems)
    from flashgen import samples

    of_variant = case.variant.config(**config)
    return samples.check_launch(launch, case.problem, of_variant, device=device, strides=("dense",), problems=problems)


def run_trial(case: Case, request: dict[str, Any]) -> dict[str, Any]:
    """Check, screen with one launch, time, check again.

    Raises:
        WrongResultError: see `Contestant`.
    """
    provider, config = case.provider, request["config"]
    # Dense strides are what is timed; every other kind of stride would compile the candidate once more.
    # A backward is not compiled for lengths, and its references cost: it is checked on the small problems at once.
    problems = [cut(case.problem)] if case.spec.op == "attention_fwd" else None
    report = checked(case, config, problems)
    verdict = {"max_abs_error": report.max_error, "error_ratio": report.ratio}
    if not report.ok:
        return {"status": "wrong_result", "message": report.message[:500], **verdict}
    contestant = Contestant(case, config)
    contestant.first()
    screen, best = contestant.once(), request["best_ms"]
    if best is not None and screen > CENSOR_FACTOR * max(best, provider.short_ms):
        screen = min(screen, contestant.once(), contestant.once())  # it may have been the machine
    if best is not None and screen > CENSOR_FACTOR * max(best, provider.short_ms):
        message = f"the best of three launches took {screen:.4g} ms, over {CENSOR_FACTOR:g} times the best so far"
        return {"status": "censored", "message": message, **verdict}
    protocol = PROTOCOL_SEARCH
    if screen < provider.short_ms:
        contestant.shorten()
        protocol = PROTOCOL_GRAPH
    times = measure(contestant.once, once=lambda run: run(), protocol=protocol)  # type: ignore[arg-type, return-value]
    after = contestant.check()
    verdict = {
        "max_abs_error": max(report.max_error, after.max_error),
        "error_ratio": max(report.ratio, after.ratio),
    }
    figures = {name: getattr(times, name) for name in ("latency_ms", "latency_p10_ms", "latency_p90_ms", "protocol")}
    return {"status": "ok", **verdict, **figures}
