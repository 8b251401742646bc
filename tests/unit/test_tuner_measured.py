"""Measured runs of the tuner, with a bench that is told what to answer."""

from __future__ import annotations

from typing import Any

import pytest
from tuner_support import H100, PROBLEM, STAND_IN, Bench, context_for, isolate, stand_in, timed

import flashgen
from flashgen.tuner import measured, shootout, tune

own_cache = pytest.fixture(autouse=True)(isolate)
compiler = pytest.fixture(stand_in)


@pytest.mark.usefixtures("compiler")
def test_measured_trials_and_the_final_word() -> None:
    context, store = context_for(8)
    bench = Bench(timed)
    measured.run(context, bench, STAND_IN)
    assert [r["do"] for r in bench.asked] == ["trial"] * 8 + ["final"]
    finalists = bench.asked[-1]["configs"]
    assert 3 <= len(finalists) <= 4 and finalists[0] in [config.to_dict() for config in context.favourites]
    winner = context.result.winner
    assert winner is not None and winner.config == finalists[-1] and winner.protocol == shootout.PROTOCOL
    assert winner.versions["driver"] == "1.2" and winner.facts is not None and winner.facts["shootout"]["rounds"] == 3
    assert len(store.trials()) == 8 + len(finalists)
    assert {row.quality for row in store.trials() if row.protocol != shootout.PROTOCOL} == {"low"}
    flashgen.dispatch.forget()
    plan = flashgen.dispatch.resolve(PROBLEM, H100)
    assert (plan.config_source, plan.config.to_dict()) == (
        "database",
        finalists[-1],
    )  # though it has the largest median: it won


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "status", ["crashed", "timeout", "wrong_result", "out_of_resources", "compile_error", "censored"]
)
def test_a_bad_candidate_is_a_trial_and_the_run_goes_on(status: str) -> None:
    context, store = context_for(6)
    first = context.order[0].to_dict()
    bench = Bench(lambda r: {"status": status, "message": "so it was"} if r["config"] == first else timed(r))
    measured.run(context, bench, STAND_IN)
    row = next(row for row in store.trials() if row.config == first)
    assert (row.status, row.message, row.latency_ms) == (status, "so it was", None)
    assert context.result.winner is not None and context.result.winner.config != first


@pytest.mark.usefixtures("compiler")
def test_a_measured_run_resumes() -> None:
    context, _ = context_for(6)
    measured.run(context, Bench(timed), STAND_IN)
    again, _ = context_for(9, earlier=True)
    bench = Bench(timed)
    measured.run(again, bench, STAND_IN)
    tried = [r["config"] for r in bench.asked if r["do"] == "trial"]
    assert len(tried) == 3 and not any(config in [row.config for row in context.result.trials] for config in tried)


@pytest.mark.usefixtures("compiler")
def test_when_nothing_can_be_measured_the_causes_are_told() -> None:
    context, _ = context_for(4)
    measured.run(context, Bench(lambda r: {"status": "crashed", "message": "fell over"}), STAND_IN)
    assert context.result.winner is None and "fell over" in context.result.message


@pytest.mark.usefixtures("compiler")
def test_a_tie_keeps_the_incumbent_and_noise_never_replaces_a_trusted_row() -> None:
    context, store = context_for(5)
    bench = Bench(timed)
    measured.run(context, bench, STAND_IN)
    trusted = context.result.winner
    assert trusted is not None and trusted.quality == "high"
    again, _ = context_for(5)
    assert again.trusted == trusted and again.favourites[0].to_dict() == trusted.config
    noisy = Bench(timed)
    noisy.quality = "low"
    measured.run(again, noisy, STAND_IN)
    assert noisy.asked[-1]["configs"][0] == trusted.config  # the incumbent
    assert again.result.winner is not None and again.result.winner.quality == "low"
    assert again.result.winner.config != trusted.config and "too noisy to trust" in again.result.message
    key = (trusted.spec_key, trusted.variant, trusted.digest, trusted.gpu, trusted.shape)
    assert store.best(*key, predicted=False) == trusted
    tie, _ = context_for(5)
    bench = Bench(timed)
    bench.winner = 0
    measured.run(tie, bench, STAND_IN)
    assert tie.result.winner is not None and tie.result.winner.config == trusted.config


@pytest.mark.usefixtures("compiler")
def test_a_finalist_that_turns_out_wrong_is_stored_so_and_the_others_begin_again() -> None:
    context, store = context_for(6)
    bench = Bench(timed)
    finals: list[Any] = []

    def ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if request["do"] == "final":
            finals.append(request["configs"])
            if len(finals) == 1:
                return {"status": "wrong_result", "message": "strayed", "index": 1}
        return Bench.ask(bench, request, timeout_s)

    bench.ask = ask  # type: ignore[method-assign]
    measured.run(context, bench, STAND_IN)
    assert finals[1] == [finals[0][0], *finals[0][2:]]
    assert [row.config for row in store.trials(status="wrong_result")] == [finals[0][1]]
    assert context.result.winner is not None and context.result.winner.config == finals[1][-1]
    lost, _ = context_for(6)
    bench.ask = lambda r, t: timed(r) if r["do"] == "trial" else {"status": "crashed", "message": "died"}  # type: ignore[method-assign]
    measured.run(lost, bench, STAND_IN)
    assert lost.result.winner is not None and lost.result.winner.quality == "low" and "died" in lost.result.message


@pytest.mark.usefixtures("compiler")
def test_what_was_predicted_is_still_measured_when_a_run_resumes() -> None:
    tune(PROBLEM, target=H100, progress=False)
    context, _ = context_for(3, earlier=True)
    assert context.earlier == {}
