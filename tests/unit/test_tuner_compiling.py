"""What a measured search compiles when, and what the compiler's facts put off to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu_kernel import CPU, TILES, use
from cpu_kernel import PROBLEM as CPU_PROBLEM
from tuner_support import FACTS, H100, PROBLEM, Bench, Compiler, timed

import flashgen
from flashgen import BuildError, KernelConfig, Problem, TuningError, costmodel
from flashgen.facts import CompiledFacts
from flashgen.store import open_store
from flashgen.tuner import TuneResult, cluster, measured, strategies, tune
from flashgen.tuner.context import Context
from flashgen.tuner.run import _context

SPILLING = replace(FACTS, loop={**FACTS.loop, "spill": 60})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())


def context_for(
    trials: int | None = None, strategy: str = "auto", left_s: Callable[[], float | None] = lambda: None
) -> Context:
    result = TuneResult(problems=[], session="s", mode="measured", target="h100", database="")
    return _context(
        PROBLEM, H100, "measured", open_store(write=True), lambda event: None, result, max_trials=trials, workers=2, strategy=strategy,
        resume=False, expired=lambda: False, left_s=left_s,
    )  # fmt: skip


def run(context: Context, facts: Callable[[KernelConfig], Any]) -> tuple[list[dict[str, Any]], Compiler]:
    """Configurations in the order they were measured, and the compiler that was asked."""
    bench, compiler = Bench(timed), Compiler(facts)
    measured.run(context, bench, compiler)
    return [request["config"] for request in bench.asked if request["do"] == "trial"], compiler


def spilling(config: KernelConfig) -> CompiledFacts:
    """Wide tiles spill; each further stage costs a block of an SM, so that no number of stages is better for nothing."""
    facts = SPILLING if config.BLOCK_N == 128 else FACTS
    return replace(facts, n_regs=32, smem_bytes={2: 50_000, 3: 70_000}.get(config.num_stages, 100_000))


# -- the veto --


@pytest.mark.parametrize("strategy", ["auto", "walk"])
def test_what_the_model_vetoes_is_measured_when_nothing_else_is_left(strategy: str) -> None:
    context = context_for(strategy=strategy)
    tried, _ = run(context, spilling)
    assert len(tried) == len(context.order)
    kept = [config.to_dict() for config in context.favourites]
    late = [i for i, config in enumerate(tried) if config["BLOCK_N"] == 128 and config not in kept]
    assert len(late) > 10 and late == list(range(len(tried) - len(late), len(tried)))


def test_exhaustive_takes_its_own_order() -> None:
    context = context_for(strategy="exhaustive")
    tried, _ = run(context, spilling)
    assert tried == [config.to_dict() for config in context.order]


def test_a_bounded_search_spends_no_trial_on_the_vetoed_and_says_why(tmp_path: Path) -> None:
    context = context_for(trials=12)
    tried, compiler = run(context, spilling)
    kept = [config.to_dict() for config in context.favourites]
    assert len(tried) == 12 and all(config["BLOCK_N"] != 128 or config in kept for config in tried)
    put_off = [config for config in compiler.asked if config.BLOCK_N == 128 and config.to_dict() not in kept]
    assert put_off and len(compiler.asked) == 12 + len(put_off)  # compiled once, though they may be proposed twice
    for config in put_off:
        assert "60 spill instructions" in context.result.excluded[config.label]


def test_two_stages_wait_where_three_are_known_to_fit() -> None:
    context = context_for()
    tried, _ = run(context, lambda config: FACTS)
    kept = [config.to_dict() for config in context.favourites]
    deeper = {tuple(sorted({**c, "num_stages": 2}.items())) for c in tried if c["num_stages"] == 3}
    two = [i for i, c in enumerate(tried) if tuple(sorted(c.items())) in deeper and c not in kept]
    assert len(two) > 5 and two == list(range(len(tried) - len(two), len(tried)))


def test_a_gluon_kernel_is_vetoed_for_spills_and_serialised_products_alone() -> None:
    problem = Problem.preset("llama3-8b", seqlen=1024)
    config = flashgen.variants.by_name("gluon_fwd_sm90").default(problem.spec, H100)
    plain = KernelConfig(variant="triton_fwd", BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
    serialised = replace(FACTS, serialised=True)
    assert costmodel.veto(config, FACTS, problem.spec, H100) is None
    assert "serialised" in (costmodel.veto(config, serialised, problem.spec, H100) or "")
    assert "60 spill" in (costmodel.veto(config, SPILLING, problem.spec, H100) or "")
    assert (
        costmodel.veto(plain, serialised, problem.spec, H100) is None
    )  # PyTorch's default tile is warned about, and is good


def test_the_winner_of_before_is_measured_whatever_the_model_says() -> None:
    context = context_for(trials=6)
    first = context.favourites[0].to_dict()
    tried, _ = run(context, lambda config: SPILLING)
    assert tried[0] == first


def test_a_pruned_trial_is_proposed_once_more() -> None:
    import optuna

    from flashgen.tuner.search import new_study, proposals

    order = context_for().order[:5]
    study = new_study(strategies.make("random", order), order, "test")
    proposed = []
    for trial, config in proposals(study, order):
        pruned = not proposed
        proposed.append(config)
        study.tell(trial, None if pruned else 1.0, state=optuna.trial.TrialState.PRUNED if pruned else None)
    assert len(proposed) == 6 and sorted(map(str, proposed[1:])) == sorted(map(str, order))


# -- the whole list, or not --


def batches(context: Context, compile_s: float) -> list[int]:
    """How many candidates each call of the compiler brought."""
    sizes: list[int] = []

    class Batched(Compiler):
        def map(self, source: Any, target: Any, configs: Any, strides: Any = None) -> Any:
            if configs:
                sizes.append(len(configs))
            return super().map(source, target, configs, strides)

    measured.run(context, Bench(timed), Batched(lambda config: replace(FACTS, compile_s=compile_s)))
    return sizes


def test_without_a_limit_everything_is_compiled_side_by_side_first() -> None:
    context = context_for(strategy="random")
    assert batches(context, 1e6) == [len(context.order)]


def test_the_whole_list_is_compiled_ahead_where_that_fits_the_timeout() -> None:
    context = context_for(strategy="random", left_s=lambda: 1000.0)
    rest = len(context.order) - measured.PROBES
    # Two processes: rest * 10 s / 2 is less than 1000 s, and the stand-ins measure in no time.
    assert rest * 5.0 < 900.0 and batches(context, 10.0) == [1] * measured.PROBES + [rest]


def test_a_timeout_that_the_list_does_not_fit_into_compiles_what_is_proposed() -> None:
    context = context_for(strategy="random", left_s=lambda: 1000.0)
    rest = len(context.order) - measured.PROBES
    assert rest * 50.0 > 1000.0 and set(batches(context, 100.0)) == {1}
    slow = context_for(strategy="random", left_s=lambda: 100.0)
    slow_trials = iter(range(10_000))
    clock = pytest.MonkeyPatch()
    with clock.context() as patch:  # measuring counts as well: each trial takes 30 s by this clock
        patch.setattr("flashgen.tuner.measured.time.monotonic", lambda: 15.0 * next(slow_trials))
        assert set(batches(slow, 0.0)) == {1}


def test_a_bounded_search_never_compiles_the_whole_list() -> None:
    assert set(batches(context_for(trials=10, strategy="random", left_s=lambda: 1e9), 0.0)) == {1}


def test_a_list_whose_first_candidates_do_not_compile_is_still_searched() -> None:
    context = context_for(strategy="random", left_s=lambda: 1000.0)
    broken = set(context.order[:6])
    tried, _ = run(context, lambda config: BuildError("ptxas gave up") if config in broken else FACTS)
    assert len(tried) == len(context.order) - 6


@pytest.mark.parametrize("left_s", [None, 100.0])
def test_an_actor_elsewhere_knows_how_much_time_is_left(left_s: float | None) -> None:
    """Its clock is its own: what is sent is a number, and without one nothing would bound what is compiled ahead."""
    seen: list[float | None] = []

    class Place:
        def run(self, context: Context) -> None:
            seen.append(context.left_s())
            context.result.cut_short = True

    station = cluster.Station("cpu", None)
    station._place = Place()  # type: ignore[assignment]
    context = context_for(trials=1)
    ((kind, result),) = station.run(cluster._sent(context), left_s)
    assert seen == [None] if left_s is None else 90.0 < (seen[0] or 0.0) <= 100.0
    cluster.RayPlace._take(context, kind, result)
    assert kind == "result" and context.result.cut_short


def test_problems_share_what_is_left_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def run(context: Context, *rest: Any, **options: Any) -> None:
        left.append(context.left_s() or 0.0)
        assert not context.expired()

    use(monkeypatch, TILES[:1])
    monkeypatch.setattr(measured, "run", run)
    problems = [replace(CPU_PROBLEM, num_heads_q=2 * heads) for heads in (1, 2, 3)]
    with pytest.raises(TuningError, match="no configuration won"):
        tune(problems, target=CPU, mode="measured", provider="cpu", progress=False, timeout_s=900.0)
    assert left == pytest.approx([300.0, 450.0, 900.0], rel=0.1)  # a third, half of what is left, the rest
