"""The cost model: what it may say, and that it says what the surfaces taught it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from flashgen import KernelConfig, Problem, Target
from flashgen.costmodel import FITTED, occupancy, predict, rank
from flashgen.facts import CompiledFacts
from flashgen.target import TARGETS

PROBLEM = Problem.preset("llama3-8b", seqlen=2048)
H100 = Target.named("h100")
TILE = KernelConfig(variant="triton_fwd", BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
FACTS = CompiledFacts(
    arch="sm_90",
    triton_version="3.9.0",
    n_regs=168,
    spill_store_bytes=0,
    spill_load_bytes=0,
    stack_bytes=0,
    smem_bytes=131072,
    num_warps=8,
    serialised=False,
    undefined_registers=0,
    loop={"total": 395, "hgmma": 12, "mufu": 34, "fp32": 136, "alu": 72, "shuffle": 8, "shared": 10, "async_copy": 8},
    compile_s=1.0,
)


def cost(
    facts: CompiledFacts = FACTS, problem: Problem = PROBLEM, config: KernelConfig = TILE, target: Target = H100
) -> float:
    return predict(facts, problem, target, config).cost


def test_spills_and_two_stages_cost_and_never_exclude() -> None:
    spilling = replace(FACTS, loop={**FACTS.loop, "spill": 60})
    two = KernelConfig(**{"variant": "triton_fwd", **TILE, "num_stages": 2})
    assert math.isfinite(cost(spilling)) and cost(spilling) > 1.2 * cost()
    assert cost(config=two) == pytest.approx(1.15 * cost(), rel=0.02)


def test_other_constants_are_taken() -> None:
    spilling = replace(FACTS, loop={**FACTS.loop, "spill": 60})
    for name, facts, config in (
        ("spill_cycles", spilling, TILE),
        ("two_stages", FACTS, KernelConfig(**{"variant": "triton_fwd", **TILE, "num_stages": 2})),
        ("exposed", FACTS, TILE),
    ):
        more = replace(FITTED, **{name: getattr(FITTED, name) * 1.5})
        assert predict(facts, PROBLEM, H100, config, constants=more).cost > cost(facts, config=config), name


def test_every_target_gets_a_finite_cost_and_an_unrolled_loop_counts_once() -> None:
    for target in (target for target in TARGETS.values() if target.backend != "cpu"):
        assert math.isfinite(cost(target=target)) and cost(target=target) > 0.0
    products = TILE.BLOCK_M * TILE.BLOCK_N * 256
    rolled = replace(FACTS, loop={"hmma": 64, "mufu": 34, "fp32": 136}, loop_macs=products)
    unrolled = replace(rolled, loop={"hmma": 128, "mufu": 68, "fp32": 272}, loop_macs=2 * products)
    a100 = Target.named("a100")
    assert cost(unrolled, target=a100) == pytest.approx(cost(rolled, target=a100))


def test_cost_grows_with_the_work() -> None:
    longer = Problem.preset("llama3-8b", seqlen=4096)
    assert 3.0 < cost(problem=longer) / cost() < 4.5
    full = replace(PROBLEM, causal=False)
    assert 1.3 < cost(problem=full) / cost() < 2.2  # twice the keys, the same number of blocks to start


def test_milliseconds_only_where_calibrated() -> None:
    here = predict(FACTS, PROBLEM, H100, TILE)
    assert here.calibrated and here.ms is not None and here.ms_low is not None and here.ms_high is not None
    assert here.ms_low < here.ms < here.ms_high and "predicted" in here.basis
    for target, problem in ((Target.named("a100"), PROBLEM), (H100, replace(PROBLEM, dtype="fp32"))):
        there = predict(FACTS, problem, target, TILE)
        assert not there.calibrated and there.ms is there.ms_low is there.ms_high is None
        assert there.bound_by and math.isfinite(there.cost) and "predicted" in there.basis


def test_occupancy_by_the_scarcest_resource() -> None:
    assert occupancy(FACTS, H100) == 1  # shared memory and registers both
    assert occupancy(replace(FACTS, smem_bytes=50_000, n_regs=64, num_warps=4), H100) == 4  # shared memory
    assert occupancy(replace(FACTS, smem_bytes=0, n_regs=128, num_warps=4), H100) == 4  # registers
    assert occupancy(replace(FACTS, smem_bytes=10**6), H100) == 1


def test_rank_is_deterministic_and_prefers_fewer_stages_at_equal_cost() -> None:
    four = KernelConfig(**{"variant": "triton_fwd", **TILE, "num_stages": 4})
    same = predict(FACTS, PROBLEM, H100, TILE)
    assert [config for config, _ in rank([(four, same), (TILE, same)])] == [TILE, four]
    better = replace(same, cost=same.cost * 0.5)
    assert rank([(TILE, same), (four, better)])[0][0] == four


def test_an_empty_problem_costs_nothing_but_is_no_error() -> None:
    assert cost(problem=replace(PROBLEM, seqlen_q=0)) >= 0.0
    assert cost(problem=replace(PROBLEM, seqlen_k=0)) >= 0.0
