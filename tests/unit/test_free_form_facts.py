"""An unmasked tile costs a free-form kernel no more instructions than the plain kernel: compiled for sm_90a, its loop read from machine code."""

from __future__ import annotations

from dataclasses import replace

import compile_free_form
import pytest
from free_form_facts import compared, documents, problem, verdict

from flashgen.facts import CompiledFacts, inspect
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.target import Target
from flashgen.variants import by_name

H100 = Target.named("h100")
PLAIN = problem(64)


def facts(problem: Problem, variant: str) -> CompiledFacts:
    """Of a problem in the tile that its free-form kernel runs."""
    chosen = by_name(variant)
    config = chosen.default(documents(problem).spec, H100)
    return inspect(render(problem.spec, chosen), H100, config)


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["triton_fwd", "gluon_fwd_sm90"])
def test_an_unmasked_tile_costs_what_it_costs_the_plain_kernel(variant: str) -> None:
    plain, free = facts(PLAIN, variant), facts(documents(PLAIN), variant)
    assert free.loop_macs == plain.loop_macs > 0
    assert free.loop["total"] <= plain.loop["total"]
    assert free.loop_spill_ops == 0 == free.loop.get("select", 0)


@pytest.mark.long
def test_so_it_does_on_sm_80() -> None:
    """The other architectures, and head dim 128: `free_form_facts.py`, part of `make torture`."""
    (pair,) = compared(64, "triton_fwd", Target.named("a100")).values()
    assert verdict(*pair) is None


@pytest.mark.long
@pytest.mark.parametrize("card", ["h100", "a100"])
def test_so_it_does_in_the_portable_backward(card: str) -> None:
    found = compared(64, "triton_bwd", Target.named(card))
    assert list(found) == ["attention_bwd_dkdv", "attention_bwd_dq"]
    assert [verdict(*pair) for pair in found.values()] == [None, None]


def test_the_portable_tile_beside_a_mask_is_one_that_does_not_spill() -> None:
    wide = replace(PLAIN, head_dim=128, head_dim_v=128)
    config = by_name("triton_fwd").default(documents(wide).spec, H100)
    assert (config.BLOCK_M, config.BLOCK_N, config.num_warps, config.num_stages) == (128, 64, 8, 3)
    assert by_name("triton_fwd").default(wide.spec, H100).BLOCK_N == 128


@pytest.mark.slow
def test_an_unmasked_block_of_the_hopper_backward_costs_what_it_costs_the_plain_kernel() -> None:
    """One mask here; the others, and head dim 128, in `make torture`."""
    plain = compile_free_form.plain(64)
    free = compile_free_form.facts(compile_free_form.MASKS["prefix"](plain))
    assert compile_free_form.wrong(free, compile_free_form.facts(replace(plain, causal=True))) == ""


def test_more_instructions_spills_and_another_loop_are_told() -> None:
    right = CompiledFacts(
        arch="sm_90", triton_version="3.6.0", n_regs=168, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0,
        smem_bytes=0, num_warps=8, serialised=False, undefined_registers=0, loop={"total": 335}, compile_s=0.0, loop_macs=64,
    )  # fmt: skip
    for changed, said in (
        (replace(right, loop={"total": 336}), "336 instructions where the plain kernel has 335"),
        (replace(right, loop={"total": 335, "spill": 1}), "1 spill"),
        (replace(right, loop={"total": 300, "select": 32}), "another loop"),
        (replace(right, loop_macs=32), "another loop"),
        (replace(right, undefined_registers=1), "miscompiled"),
    ):
        assert said in compile_free_form.wrong(changed, right)
    assert compile_free_form.wrong(right, right) == ""
