"""The final rounds as the measuring worker runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from flashgen.tuner import shootout
from flashgen.tuner.case import Case
from flashgen.tuner.faults import WrongResultError, failure
from flashgen.tuner.trial import Contestant, checked


def run_final(case: Case, request: dict[str, Any]) -> dict[str, Any]:
    """Time the finalists side by side; the first is the incumbent. See `shootout`.

    The winner has to pass all small problems as well, which may have to be compiled for.

    A finalist that fails on the way ends it: the reply names it by its `index`, and the caller asks again without it.
    """
    provider, contestants = case.provider, [Contestant(case, config) for config in request["configs"]]
    log = RoundLog(provider.state)
    index = -1  # whose turn it is
    try:
        for contestant in contestants:
            index += 1
            contestant.first()
        protocol = shootout.PROTOCOL
        if provider.short_ms and min(contestants[0].once() for _ in range(3)) < provider.short_ms:
            protocol = shootout.PROTOCOL_GRAPH
            for contestant in contestants:
                contestant.shorten()
        runs = {str(number): contestant.once for number, contestant in enumerate(contestants)}
        index = -1  # from here on nobody knows whose fault it was, until each is checked
        verdict = shootout.shoot_out(runs, once=lambda run: run(), most=request["most"], each_round=log)  # type: ignore[arg-type, return-value]
        for contestant in contestants:
            index += 1
            contestant.check()
        index = int(verdict.winner)
        whole = checked(case, request["configs"][index])
        if not whole.ok:
            raise WrongResultError(whole.message)
    except Exception as error:
        return {**failure(error), "index": index}
    unsteady = log.dropped > verdict.rounds // 2
    return {
        "status": "ok",
        "protocol": protocol,
        "winner": int(verdict.winner),
        "floor": verdict.floor,
        "quality": "low" if unsteady else verdict.quality,
        "rounds": verdict.rounds,
        "dropped": log.dropped,
        "states": log.states,
        "samples": [[round(ms, 6) for ms in verdict.samples[name]] for name in runs],
        "twin": [round(ms, 6) for ms in verdict.samples[shootout.TWIN]],
        "intervals": [None if name not in verdict.intervals else asdict(verdict.intervals[name]) for name in runs],
    }


class RoundLog:
    """What the card was like in each round; a round in which its throttling changed does not count.

    A card that changes all the time would leave no rounds: beyond as many as a decision needs they count, and the caller
    calls the result low in quality.
    """

    def __init__(self, state: Callable[[], dict[str, Any] | None]) -> None:
        self._state = state
        self._before = state()
        self.states: list[dict[str, Any]] = []
        self.dropped = 0

    def __call__(self, number: int) -> bool:
        now, before = self._state(), self._before
        self._before = now
        if now is None:
            return True
        changed = before is not None and before["throttle"] != now["throttle"]
        counts = not changed or self.dropped >= shootout.LEAST_ROUNDS
        self.dropped += not counts
        self.states.append({"round": number, "counted": counts, **now})
        return counts
