"""`flashgen tune --plan`: estimates from stored trials with their basis named; `--study`: knobs are separate parameters."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from store_support import make

from flashgen import Problem, Target
from flashgen.tuner.context import choose_variant, legal_list
from flashgen.tuner.plan import ProblemPlan, plan
from flashgen.tuner.search import new_study, proposals
from flashgen.tuner.strategies import InOrder

H100 = Target.named("h100")
PROBLEM = Problem.preset("llama3-8b", seqlen=1024, dtype="fp32")  # of the portable kernel


def planned(mode: str = "measured", trials: int = 10, compile_s: float = 4.0) -> ProblemPlan:
    rows = [
        make(facts={"compile_s": compile_s}, config={"BLOCK_M": 2**i}, created=f"2026-01-31T12:00:{3 * i:02}+00:00")
        for i in range(4, 9)
    ]
    return plan(PROBLEM, H100, mode=mode, max_trials=trials, workers=2, stored=rows)


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))


def test_the_estimate_is_compiling_and_measuring_at_the_stored_pace() -> None:
    row = planned()
    assert row.trials == 10 and row.seeds >= 2 and row.legal >= 30 and row.cached == 0
    assert row.estimate_s == pytest.approx(10 * 4.0 / 2 + 10 * 3.0)
    assert "median of 5 trials of your database" in row.basis and "by 2 processes" in row.basis
    assert planned("predicted").estimate_s == pytest.approx(10 * 4.0 / 2)


def test_what_is_not_known_is_not_estimated() -> None:
    row = plan(PROBLEM, H100, mode="measured", max_trials=5, workers=1, stored=[])
    assert row.estimate_s is None and "stored" in row.basis


def test_a_study_file_holds_each_knob_as_a_parameter(tmp_path: Path) -> None:
    configs = legal_list(choose_variant(PROBLEM, H100), PROBLEM, H100)[0][:3]
    path = tmp_path / "study.sqlite3"
    study = new_study(InOrder(configs), configs, "mine", str(path))
    for number, (trial, _) in enumerate(proposals(study, configs)):
        study.tell(trial, 1.0 + number)
    (found,) = optuna.get_all_study_summaries(f"sqlite:///{path}")
    read = optuna.load_study(study_name=found.study_name, storage=f"sqlite:///{path}")
    assert [trial.params for trial in read.trials] == [config.to_dict() for config in configs]
    assert [trial.value for trial in read.trials] == [1.0, 2.0, 3.0]
    assert set(read.trials[0].distributions) == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
