"""The tuner: what it proposes, keeps, excludes and lets win. The compiler and the GPU are stood in for where they are not the point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuner_support import A100, FACTS, GOOD, H100, KNOWN, LEGAL, PROBLEM, VARIANT, Compiler, isolate, stand_in

import flashgen
from flashgen import (
    BuildError,
    InvalidProblemError,
    KernelConfig,
    Problem,
    Target,
    TuningError,
    UnsupportedProblemError,
)
from flashgen.accuracy import AccuracyReport
from flashgen.facts import CompiledFacts
from flashgen.store import open_store
from flashgen.tuner import policy, predicted, strategies, tune
from flashgen.tuner.context import Context, choose_variant, legal_list
from flashgen.tuner.search import new_study, proposals

_FAIL = optuna.trial.TrialState.FAIL

own_cache = pytest.fixture(autouse=True)(isolate)
compiler = pytest.fixture(stand_in)


# -- search --


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_legal_point_once_and_no_other(data: st.DataObject) -> None:
    legal = data.draw(st.lists(st.sampled_from(LEGAL), unique=True, min_size=1, max_size=12))
    name = data.draw(st.sampled_from(strategies.NAMES))
    seeds = data.draw(st.lists(st.sampled_from(LEGAL), max_size=4))
    strategy = strategies.make(name, legal, seeds=seeds, vetoed=frozenset(legal[:1]))
    study = new_study(strategy, legal, "test")
    proposed = []
    for trial, config in proposals(study, legal):
        proposed.append(config)
        failed = data.draw(st.booleans())
        study.tell(trial, None if failed else 1.0 + len(proposed), state=_FAIL if failed else None)
    assert sorted(proposed, key=str) == sorted(legal, key=str)
    wanted = [seed for seed in dict.fromkeys(seeds) if seed in legal[1:]]
    assert name != "auto" or proposed[: len(wanted)] == wanted


def test_an_enqueued_trial_comes_first_and_is_not_repeated() -> None:
    order = list(LEGAL[:5])
    study = new_study(strategies.InOrder(order), order, "test")
    study.enqueue_trial(order[3].to_dict())
    proposed = []
    for trial, config in proposals(study, order):
        proposed.append(config)
        study.tell(trial, 1.0)
    assert proposed[0] == order[3] and sorted(proposed, key=str) == sorted(order, key=str)


def test_a_study_in_a_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    order, path = list(LEGAL[:6]), str(tmp_path / "study.sqlite3")
    first = new_study(strategies.InOrder(order), order, "test", path)
    for (trial, _), value in zip(proposals(first, order), (3.0, 2.0), strict=False):
        first.tell(trial, value)
    again = new_study(strategies.InOrder(order), order, "test", path)
    assert [config for _, config in _told(again, order)] == order[2:]


def _told(study: Any, order: list[KernelConfig]) -> list[tuple[Any, KernelConfig]]:
    found = []
    for trial, config in proposals(study, order):
        study.tell(trial, 1.0)
        found.append((trial, config))
    return found


def test_strategies_by_name() -> None:
    with pytest.raises(InvalidProblemError, match="strategy='best' is not known"):
        tune(PROBLEM, target=H100, strategy="best")


# -- predicted --


@pytest.mark.usefixtures("compiler")
def test_a_predicted_run_ranks_stores_and_is_dispatched() -> None:
    result = tune(PROBLEM, target=H100, progress=False)
    (row,) = result.problems
    assert result.mode == "predicted" and len(row.trials) == row.legal == len(LEGAL) >= 40
    assert {trial.status for trial in row.trials} == {"predicted"}
    assert all(trial.latency_ms is None for trial in row.trials)
    assert sorted(trial.rank for trial in row.trials) == list(range(1, len(LEGAL) + 1))  # type: ignore[type-var]
    assert row.winner is not None and row.winner.error_ratio == 0.5
    assert row.winner.config in [known.config.to_dict() for known in KNOWN]
    plan = flashgen.dispatch.resolve(PROBLEM, H100)
    assert (plan.config_source, plan.config.to_dict()) == ("predicted", row.winner.config)
    shown = result.to_json()["problems"][0]["winner"]
    assert "latency_ms" not in shown and shown["predicted_rank"] == row.winner.rank


def test_what_does_not_fit_is_excluded_exactly_and_recorded(compiler: Compiler) -> None:
    compiler.facts = lambda config: replace(FACTS, smem_bytes=H100.smem_bytes + (1 if config.num_stages == 4 else 0))
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    out = [trial for trial in row.trials if trial.status == "out_of_resources"]
    assert out and all(trial.config["num_stages"] == 4 for trial in out)
    assert {trial.config["num_stages"] for trial in row.trials if trial.status == "predicted"} == {2, 3}
    assert all("232449 bytes of shared memory" in reason for reason in row.excluded.values()) and len(
        row.excluded
    ) == len(out)


def test_failures_are_trials(compiler: Compiler) -> None:
    texts = {
        32: "x does not compile",
        64: "a worker was killed after 60 s (timeout)",
        128: "a worker died (exit status 7)",
    }
    compiler.facts = lambda c: BuildError(texts[c.BLOCK_M]) if c.BLOCK_M in texts and c.BLOCK_N == 16 else FACTS
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    assert {k: row.counts()[k] for k in ("compile_error", "timeout", "crashed")}.keys() == {
        "compile_error",
        "timeout",
        "crashed",
    }
    assert row.winner is not None


def test_a_spilling_tile_of_the_table_does_not_win(compiler: Compiler) -> None:
    spilling = replace(FACTS, loop={**FACTS.loop, "spill": 60})
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    assert row.winner is not None and "measured table" in (row.winner.message or "")
    best = row.winner.config
    compiler.facts = lambda config: spilling if config.to_dict() == best else FACTS
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    assert row.winner is not None and row.winner.config != best
    vetoed = next(trial for trial in row.trials if trial.config == best)
    assert vetoed.status == "predicted" and "60 spill instructions" in (vetoed.message or "")  # vetoed, not excluded
    compiler.facts = lambda config: spilling
    with pytest.raises(TuningError, match="60 spill instructions in its main loop"):
        tune(PROBLEM, target=H100, progress=False, database=None)


@pytest.mark.usefixtures("compiler")
def test_every_predicted_row_says_which_rule_chose_it() -> None:
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    assert row.winner is not None and (row.winner.message or "").startswith("chosen by measured table")
    assert all((trial.message or "").startswith(("chosen by", "not chosen")) for trial in row.trials)
    (row,) = tune(PROBLEM, target=A100, progress=False).problems
    assert row.winner is not None and (row.winner.message or "").startswith("chosen by known good")


def test_where_no_known_tile_fits_the_model_ranks_its_shortlist(compiler: Compiler) -> None:
    measured_tiles = VARIANT.measured_tiles(PROBLEM.spec, H100)
    known = set(policy.considered(VARIANT, PROBLEM.spec, H100, measured_tiles, KNOWN))
    too_large = replace(FACTS, smem_bytes=H100.smem_bytes + 1)
    compiler.facts = lambda config: too_large if config in known else FACTS
    (row,) = tune(PROBLEM, target=H100, max_trials=1, progress=False).problems
    assert set(compiler.asked) > known and len(compiler.asked) == len(set(compiler.asked)) < len(LEGAL)
    assert row.winner is not None and "no measured or known-good tile fits" in (row.winner.message or "")


def test_a_tile_that_fails_the_accuracy_check_does_not_win(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, checked = replace(GOOD, ok=False, max_ratio=3.0, message="too far off"), []

    def verdict(context: Context, config: KernelConfig) -> AccuracyReport:
        checked.append(config)
        return bad if len(checked) == 1 else GOOD

    monkeypatch.setattr(predicted, "_check", verdict)
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    assert row.winner is not None and row.winner.config == checked[1].to_dict()
    failed = next(trial for trial in row.trials if trial.config == checked[0].to_dict())
    assert failed.status == "wrong_result" and failed.error_ratio == 3.0


@pytest.mark.usefixtures("compiler")
def test_without_calibration_there_are_no_milliseconds() -> None:
    (row,) = tune(PROBLEM, target=A100, progress=False).problems
    assert all(
        trial.predicted_ms is None and trial.latency_ms is None and trial.bound_by
        for trial in row.trials
        if trial.status == "predicted"
    )
    (row,) = tune(PROBLEM, target=H100, progress=False).problems
    assert all(trial.predicted_ms for trial in row.trials if trial.status == "predicted")


def test_known_good_tiles_are_compiled_however_few_trials(compiler: Compiler) -> None:
    (row,) = tune(PROBLEM, target=H100, max_trials=1, progress=False).problems
    measured_tiles = VARIANT.measured_tiles(PROBLEM.spec, H100)
    assert set(compiler.asked) == set(policy.considered(VARIANT, PROBLEM.spec, H100, measured_tiles, KNOWN))
    assert row.winner is not None


def test_ctrl_c_keeps_what_is_done(compiler: Compiler) -> None:
    def interrupted(config: KernelConfig) -> CompiledFacts:
        if len(compiler.asked) == 7:
            raise KeyboardInterrupt
        return FACTS

    compiler.facts = interrupted
    result = tune([PROBLEM, Problem.preset("bert-base")], target=H100, progress=False)
    assert result.interrupted and len(result.problems) == 1
    with open_store() as store:
        assert len(store.trials()) == 6
    assert flashgen.dispatch.resolve(PROBLEM, H100).config_source in (
        "seed",
        "default",
    )  # nothing was checked: nothing wins


def test_resume_does_not_check_again(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # the real `_check`, which looks at what is stored first
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(predicted, "CompilePool", compiler)
    calls: list[int] = []

    def check_launch(*arguments: Any, **options: Any) -> AccuracyReport:
        calls.append(1)
        return GOOD

    monkeypatch.setattr("flashgen.accuracy.check_launch", check_launch)
    database = str(tmp_path / "own.sqlite3")
    # The kernel is the same in the third run: its verdict is remembered, too.
    for resume, expected in ((False, 1), (True, 1), (False, 1)):
        (row,) = tune(PROBLEM, target=H100, progress=False, database=database, resume=resume).problems
        assert row.winner is not None and row.winner.error_ratio == 0.5 and len(calls) == expected


def test_two_problems_in_one_run(compiler: Compiler) -> None:
    result = tune([PROBLEM, Problem.preset("bert-base")], target=H100, progress=False)
    assert [row.winner is not None for row in result.problems] == [True, True]
    assert result.problems[0].digest != result.problems[1].digest
    with open_store() as store:
        assert store.info()["winners"] == 2


def test_a_kernel_that_the_model_cannot_rank_takes_the_first_of_its_own_list(compiler: Compiler) -> None:
    problem = Problem.preset("llama3-8b", seqlen=1024)
    variant = choose_variant(problem, H100)
    assert variant.name == "gluon_fwd_sm90" and not variant.modelled
    _, known = legal_list(variant, problem, H100)
    (row,) = tune(problem, target=H100, progress=False).problems
    assert set(compiler.asked) == {one.config for one in known[: policy._UNRANKED]}
    assert row.winner is not None and row.winner.config == known[0].config.to_dict()
    first = known[0].config
    compiler.facts = lambda config: replace(FACTS, loop={**FACTS.loop, "spill": 500}) if config == first else FACTS
    (row,) = tune(problem, target=H100, progress=False, database=None).problems
    assert row.winner is not None and row.winner.config == known[1].config.to_dict()


# -- what cannot be tuned --


def test_an_empty_space_counts_every_reason() -> None:
    tiny = replace(H100, smem_bytes=1024)
    with pytest.raises(
        TuningError, match=r"no configuration of triton_fwd is legal for .* on h100: all 96 are refused"
    ) as caught:
        tune(PROBLEM, target=tiny, progress=False)
    counted = [int(cause.split()[0]) for cause in caught.value.causes]
    assert sum(counted) == 96 and len(counted) >= 2 and counted == sorted(counted, reverse=True)
    assert any("bytes of shared memory" in why for why in caught.value.causes.values())


# -- arguments --


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_trials": 0}, "max_trials=0 must be positive"),
        ({"timeout_s": -1.0}, "timeout_s=-1.0"),
        ({"workers": 0}, "workers=0"),
        ({"workers": True}, "workers=True must be positive, an integer"),
        ({"max_trials": 2.5}, "max_trials=2.5 must be positive, an integer"),
        ({"max_trials": "5"}, "max_trials='5'"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"timeout_s": 0}, "timeout_s=0 must be positive"),
        ({"mode": "guess"}, "mode='guess' is not known"),
        ({"target": Target.named("cpu")}, "target 'cpu' is no GPU"),
    ],
)
def test_wrong_arguments_are_explained(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidProblemError, match=match):
        flashgen.tune(PROBLEM, **{"target": H100, **options})
    with pytest.raises(InvalidProblemError, match="problems is empty"):
        flashgen.tune([], target=H100)


def test_measuring_needs_the_gpu() -> None:
    if Target.detect().name == "h100":
        pytest.skip("it is here")
    with pytest.raises(UnsupportedProblemError, match=r"h100 cannot be measured.*--mode predicted"):
        flashgen.tune(PROBLEM, target=H100, mode="measured")


@pytest.mark.slow
def test_the_real_compiler_and_the_real_check_end_to_end() -> None:
    result = flashgen.tune(PROBLEM, target="h100", max_trials=4, progress=False)
    (row,) = result.problems
    assert row.winner is not None and row.winner.error_ratio is not None and 0.0 < row.winner.error_ratio <= 1.0
    assert row.winner.facts is not None and row.winner.facts["loop"]["hgmma"] > 0
