"""`flashgen tune --plan`: estimates from stored trials with their basis named; `--study`: knobs are separate parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from store_support import make
from tuner_support import GOOD, Compiler

from flashgen import KernelConfig, Problem, Target
from flashgen.cli.main import run
from flashgen.store import Record, open_store
from flashgen.tuner import predicted, tune
from flashgen.tuner.context import choose_variant, legal_list, source_of
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


def test_seeds_count_all_that_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known-good tiles, the near winner, and what a neighbour's trials teach; each once, and nothing for who learns nothing."""
    variant, source = choose_variant(PROBLEM, H100), source_of(choose_variant(PROBLEM, H100), PROBLEM)
    legal, known = legal_list(variant, PROBLEM, H100)
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())
    monkeypatch.setattr("flashgen.tuner.portfolio.configs", lambda variant, spec, target: [known[0].config])
    others = [config for config in legal if config not in {row.config for row in known}]

    def row(config: KernelConfig, seqlen: int, **fields: Any) -> Record:
        shape = {**PROBLEM.shape, "seqlen_q": seqlen, "seqlen_k": seqlen}
        return make(
            spec_key=source.spec.key, variant=variant.name, digest=fields.pop("digest", source.digest), gpu="h100", shape=shape,
            config=config.to_dict(), **fields,
        )  # fmt: skip

    def seeds(stored: list[Record], **options: Any) -> int:
        values: dict[str, Any] = {"mode": "measured", "max_trials": 10, "workers": 1, **options}
        return plan(PROBLEM, H100, stored=stored, **values).seeds

    alone = len(known)
    assert seeds([]) == alone
    winner, lesson = row(others[0], 1024), row(others[1], 2048, digest="f" * 64)
    assert seeds([winner]) == alone + 1  # of this very shape
    assert seeds([winner, lesson]) == alone + 2
    assert seeds([winner, lesson], mode="predicted") == alone + 1  # a forecast learns from no neighbour
    assert seeds([winner, lesson], strategy="walk") == 0
    assert seeds([winner, lesson], strategy="random") == 0


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


@pytest.mark.parametrize("problem", [PROBLEM, Problem.preset("llama3-8b", seqlen=1024)], ids=["portable", "gluon"])
@pytest.mark.parametrize("trials", [None, 3])
def test_a_plan_without_the_gpu_counts_what_is_compiled(
    problem: Problem, trials: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(predicted, "CompilePool", compiler)
    monkeypatch.setattr(predicted, "_check", lambda context, config: GOOD)
    planned = plan(problem, H100, mode="predicted", max_trials=trials, workers=1, stored=[])
    tune(problem, target=H100, mode="predicted", max_trials=trials, progress=False)
    assert len(compiler.asked) == planned.trials <= planned.legal


def test_a_plan_knows_the_stored_trials_of_every_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a pair the second is of another operation: its rows are looked up too."""
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    with open_store(write=True) as store:
        store.add(
            [
                make(op=op, spec_key=key, variant=variant, facts={"compile_s": seconds}, session=op)
                for op, key, variant, seconds in (
                    ("attention_fwd", "attention_fwd-fp32-d128-causal-lse", "triton_fwd", 3.0),
                    ("attention_bwd", "attention_bwd-fp32-d128-causal", "triton_bwd", 77.0),
                )
            ]
        )
    words = ["tune", "--plan", "--train", "--preset", "llama3-8b", "--dtype", "fp32", "--target", "h100", "--json"]
    assert run([*words, "--mode", "predicted", "--trials", "5", "--workers", "1"]) == 0
    first, second = json.loads(capsys.readouterr().out)["problems"]
    assert "at 3.0 s (median of 1 trials of your database)" in first["basis"]
    assert "at 77.0 s (median of 1 trials of your database)" in second["basis"]
