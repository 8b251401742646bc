"""Search strategies: the model, what other problems teach, and replayed surfaces as the judge."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgen import InvalidProblemError, KernelConfig, Problem
from flashgen.store import Record
from flashgen.tuner import strategies
from flashgen.tuner.experience import Case, Lesson, expected_slowdowns, lessons_from, portfolio, weight
from flashgen.tuner.replay import FINALISTS, Surface, case_of, choose, lessons_for, load_surfaces, replay
from flashgen.tuner.strategies import Tried
from flashgen.tuner.surrogate import Surrogate, expected_improvement, features

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "benchmarks" / "data"
SPACE = [
    KernelConfig(variant="v", BLOCK_M=m, BLOCK_N=n, lazy=lazy)
    for m in (32, 64, 128, 256)
    for n in (16, 32, 64, 128)
    for lazy in (False, True)
]
PROBLEM = Problem.preset("llama3-8b", seqlen=2048)


def bowl(config: KernelConfig) -> float:
    """A smooth surface whose best is 128x64, lazy."""
    return (
        1.0
        + 0.1 * abs(math.log2(config.BLOCK_M / 128))
        + 0.15 * abs(math.log2(config.BLOCK_N / 64))
        + (not config.lazy) * 0.05
    )


SURFACE = Surface(problem=PROBLEM, times_ms={config: bowl(config) for config in SPACE})


# -- the model --


def test_features_are_doublings_in_the_unit_cube() -> None:
    points = features(
        [KernelConfig(variant="v", a=1, b=True, c="x", d=5), KernelConfig(variant="v", a=3, b=False, c="y", d=5)]
    )
    # a: one column; b: one; c: a column a word; d never varies and is left out.
    assert points.tolist() == [[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]]


def test_the_process_interpolates_and_knows_where_it_knows_nothing() -> None:
    points = features(SPACE)
    truth = np.array([bowl(config) for config in SPACE])
    values = (truth - truth.mean()) / truth.std()
    seen = list(range(0, len(SPACE), 2))
    mean, std = Surrogate(points).predict(seen, values[seen])
    unseen = [i for i in range(len(SPACE)) if i not in seen]
    assert np.abs(mean[seen] - values[seen]).max() < 0.2
    assert np.corrcoef(mean[unseen], values[unseen])[0, 1] > 0.9
    assert std[seen].max() < std[unseen].min() + 1e-6 or std[seen].mean() < 0.5 * std[unseen].mean()


def test_expected_improvement_against_sampling() -> None:
    draws = 0.3 + 0.5 * np.random.default_rng(0).standard_normal(400_000)
    sampled = np.maximum(0.0, 0.2 - draws).mean()
    assert expected_improvement(np.array([0.3]), np.array([0.5]), 0.2)[0] == pytest.approx(sampled, rel=0.01)


# -- experience --


def test_nearer_problems_weigh_more() -> None:
    def case(seqlen: int = 2048, gpu: str = "h100", **changes: Any) -> Case:
        problem = Problem.preset("llama3-8b", seqlen=seqlen, **changes)
        return Case(spec=problem.spec, shape=problem.shape, gpu=gpu)

    here = case()
    assert weight(here, here) == 1.0
    ranked = [weight(here, there) for there in (
        case(seqlen=4096), case(causal=False), case(dtype="fp32"), case(head_dim=64, head_dim_v=64),
        case(head_dim=64, head_dim_v=64, gpu="a100"),
    )]  # fmt: skip
    assert ranked == sorted(ranked, reverse=True) and ranked[-1] > 0.0


def test_the_portfolio_covers_what_no_single_configuration_covers() -> None:
    a, b, c = SPACE[:3]
    lessons = [
        Lesson(weight=1.0, times_ms={a: 1.0, b: 2.0, c: 1.2}),
        Lesson(weight=1.0, times_ms={a: 2.0, b: 1.0, c: 1.2}),
    ]
    # c is the best compromise; after it a and b complete the cover.
    assert portfolio([a, b, c], lessons, 3)[0] == c and set(portfolio([a, b, c], lessons, 3)) == {a, b, c}
    assert portfolio([a, b], [], 3) == [] and portfolio([], lessons, 3) == []
    slow = expected_slowdowns([a, b, c], lessons)
    assert slow[2] == pytest.approx(math.log(1.2)) and slow[0] == pytest.approx(math.log(2.0) / 2)


def test_lessons_leave_out_the_case_itself_and_what_did_not_run() -> None:
    def row(seqlen: int, status: str, ms: float | None) -> Record:
        problem = Problem.preset("llama3-8b", seqlen=seqlen)
        return Record(
            op="attention_fwd", spec_key=problem.spec.key, variant="v", digest="0" * 64, gpu="h100", arch="sm_90", target={},
            shape=problem.shape, config={"BLOCK_M": 64, "BLOCK_N": 64, "lazy": True}, status=status,  # type: ignore[arg-type]
            latency_ms=ms, error_ratio=0.5 if ms else None, versions={}, protocol="p", session="s", created="2026-01-31T12:00:00+00:00",
        )  # fmt: skip

    here = Case(spec=PROBLEM.spec, shape=PROBLEM.shape, gpu="h100")
    rows = [row(2048, "ok", 1.0), row(4096, "ok", 3.0), row(4096, "ok", 2.0), row(1024, "crashed", None)]
    (lesson,) = lessons_from(rows, here, "v")
    assert list(lesson.times_ms.values()) == [2.0]
    assert lessons_from(rows, here, "another") == []


# -- strategies --


def run(name: str, trials: int, **options: Any) -> list[Tried]:
    strategy, tried = strategies.make(name, SPACE, **options), list[Tried]()
    for _ in range(trials):
        config = strategy.propose(tried)
        if config is None:
            break
        tried.append(Tried(config=config, value=bowl(config)))
    return tried


@pytest.mark.parametrize("name", ["auto", "gp", "walk", "tpe"])
def test_what_learns_finds_the_best_in_half_the_space(name: str) -> None:
    tried = run(name, len(SPACE) // 2)
    assert min(trial.value or 9.0 for trial in tried) == pytest.approx(1.0), name


@pytest.mark.parametrize("name", strategies.NAMES)
def test_failures_do_not_stop_a_strategy(name: str) -> None:
    strategy, tried = strategies.make(name, SPACE[:12]), list[Tried]()
    while (config := strategy.propose(tried)) is not None:
        tried.append(Tried(config=config, value=None if len(tried) % 2 else 1.0 + len(tried)))
    assert len({trial.config for trial in tried}) == len(tried) == 12
    assert all(config in {t.config for t in tried if t.value is not None} for config in strategy.finalists(tried, 3))


def test_the_vetoed_come_last_and_still_come() -> None:
    vetoed = frozenset(SPACE[:5])
    tried = run("auto", len(SPACE), vetoed=vetoed)
    assert {trial.config for trial in tried[-5:]} == vetoed and len(tried) == len(SPACE)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match="strategy='best' is not known"):
        strategies.make("best", SPACE)


def test_finalists_are_pulled_back_to_what_the_model_says() -> None:
    """A reading that is low by luck in a bad corner does not push out good ones."""
    tried = run("auto", 24)
    spoiled = [
        Tried(config=t.config, value=1.04)
        if bowl(t.config) > 1.4 and t is max(tried, key=lambda t: bowl(t.config))
        else t
        for t in tried
    ]
    first = strategies.make("auto", SPACE).finalists(spoiled, 1)[0]
    assert bowl(first) < 1.2


# -- replay --


def test_a_replayed_trial_counts_and_the_choice_is_retimed() -> None:
    asked: list[KernelConfig] = []

    class Stubborn(strategies.Strategy):
        def propose(self, tried: Sequence[Tried]) -> KernelConfig | None:
            asked.append(SPACE[0])
            return SPACE[0]

    assert replay(SURFACE, Stubborn(), checkpoints=(3,), noise=0.0) == {3: pytest.approx(bowl(SPACE[0]))}
    assert len(asked) == 3  # the point was known after the first, and cost a trial each time

    best, worse = sorted(SPACE, key=bowl)[:2]
    tried = [Tried(config=worse, value=0.5), Tried(config=best, value=9.0)]
    assert choose(strategies.Strategy(), tried, bowl) == best
    with_failures = [*tried, *(Tried(config=config, value=None) for config in SPACE[:4])]
    assert len(strategies.Strategy().finalists(with_failures, FINALISTS)) == 2


def test_lessons_are_of_other_problems_only() -> None:
    other = Surface(problem=Problem.preset("llama3-8b", seqlen=4096), times_ms=SURFACE.times_ms)
    assert len(lessons_for(SURFACE, [SURFACE, other])) == 1
    assert case_of(PROBLEM).shape == PROBLEM.shape


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"dtype": "bf16"}\n')
    with pytest.raises(InvalidProblemError, match=r"x\.jsonl:1: the line has no field 'batch'"):
        load_surfaces(tmp_path / "x.jsonl", "v")


@pytest.mark.slow
def test_recorded_surfaces_put_auto_before_the_others() -> None:
    """A sample of `benchmarks/search_quality.py`, which holds the figures."""
    spec = importlib.util.spec_from_file_location("search_quality", ROOT / "benchmarks" / "search_quality.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for file, variant in benchmark.FAMILIES.values():
        surfaces = load_surfaces(DATA / file, variant)
        assert len(surfaces) == 8
        rows = {name: benchmark.judge(surfaces, name, 4) for name in ("auto", "auto, cold", "random", "walk")}
        after = {name: row["geometric_mean"] for name, row in rows.items()}
        assert all(after["auto"][i] < min(after["random"][i], after["walk"][i]) for i in range(3))
        assert after["auto"][0] < 1.03 and after["auto, cold"][2] < after["random"][2]
        assert rows["auto"]["trials_per_minute"] > 0
