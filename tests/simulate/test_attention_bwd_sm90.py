"""The rendered Hopper backward, run by the simulator: the problem table at the bar of gradients, and shapes of its own."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BR, TABLE, TL, Row, row

from flashgen.accuracy import AccuracyReport
from flashgen.checks import tma_addressable
from flashgen.config import KernelConfig
from flashgen.gradients import GradientBuffers, make_gradient_buffers
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.simulator import SCHEDULES, simulate
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

VARIANT, FORWARD, H100 = by_name("gluon_bwd_sm90"), by_name("gluon_fwd_sm90"), Target.named("h100")
MODES = (False, True)  # deterministic


def spec_of(problem: Problem) -> AttentionSpec:
    return problem.backward.spec


def launch(buffers: GradientBuffers, config: KernelConfig | None = None, **options: Any) -> None:
    """Simulate a backward with a configuration, the default where none is given."""
    spec = spec_of(buffers.problem)
    tunables = {**buffers.scalars, **(config or VARIANT.default(spec, H100))}
    given = {"deterministic": options.pop("deterministic", True), **options}
    deterministic = given.pop("deterministic")
    arguments = {**buffers.inputs, **buffers.outputs, **tunables, "deterministic": deterministic}
    simulate(render(spec, VARIANT), arguments, ordered_sums=deterministic, **given)


def run(case: Row, config: KernelConfig | None = None, seed: int = 0, **options: Any) -> AccuracyReport:
    """Simulate one row and judge its gradients; every second seed without a gradient of lse.

    With large logits always with one: where a softmax picks one key, nothing else leaves more than rounding to judge.
    """
    dlse = seed % 2 == 0 or case.values == "large"
    buffers = inputs_of(case, seed, dlse)
    if case.values != "normal":
        take_forward(buffers)
    launch(buffers, config, seed=seed, **options)
    return buffers.check(references(case, seed, dlse))


def inputs_of(case: Row, seed: int, dlse: bool) -> GradientBuffers:
    return make_gradient_buffers(case.problem, seed=seed + 1, strides=case.strides, values=case.values, dlse=dlse)


@functools.lru_cache(maxsize=4)
def references(case: Row, seed: int, dlse: bool) -> Any:
    """Computed once for all launches on the same inputs."""
    return inputs_of(case, seed, dlse).references()


def take_forward(buffers: GradientBuffers) -> None:
    """Out and lse of the Hopper forward: with large logits only a pair that rounds alike is exact."""
    spec = buffers.problem.spec
    q, k, v, out, lse = (buffers.inputs[name] for name in ("q", "k", "v", "out", "lse"))
    assert out is not None
    assert lse is not None
    found = {"o": torch.empty(out.shape, dtype=out.dtype), "lse": torch.empty_like(lse)}
    simulate(render(spec, FORWARD), {"q": q, "k": k, "v": v, **found, **buffers.scalars, **FORWARD.default(spec, H100)})
    buffers.take(found["o"], found["lse"])


def with_knobs(config: KernelConfig, **knobs: Any) -> KernelConfig:
    return KernelConfig(variant=config.variant, **{**config.to_dict(), **knobs})


def is_covered(case: Row) -> bool:
    if VARIANT.supports(spec_of(case.problem), H100) is not None:
        return False
    buffers = make_gradient_buffers(case.problem, seed=1, strides=case.strides)
    through_tma = (*(buffers.inputs[name] for name in "qkv"), buffers.outputs["dk"], buffers.outputs["dv"])
    return all(x is not None and tma_addressable(x) for x in through_tma)


COVERED = [case for case in TABLE if is_covered(case)]


def test_the_table_is_covered() -> None:
    assert len(COVERED) >= 40
    half = [c for c in TABLE if c.problem.dtype != "fp32" and c not in COVERED and c.strides == "padded"]
    assert all(c.problem.head_dim % 8 or c.problem.head_dim_v % 8 for c in half)


@pytest.mark.sampled(every=3, by="index")  # the modes share their references
@pytest.mark.parametrize("deterministic", MODES, ids=["fast", "ordered"])
@pytest.mark.parametrize("index", range(len(COVERED)), ids=[case.id for case in COVERED])
def test_problem(index: int, deterministic: bool) -> None:
    """Three schedules a row, the fourth in the other mode and the other row."""
    case = COVERED[index]
    left_out = SCHEDULES[(index + 2 * deterministic) % len(SCHEDULES)]
    for schedule in SCHEDULES:
        if schedule == left_out:
            continue
        run(case, seed=index, schedule=schedule, deterministic=deterministic).require(case.why)


# Sizes around this kernel's own tiles: 64 or 128 rows a step, 128 keys a thread block.
OWN = (
    row("one block of rows and of keys, exactly", "bf16", 64, 128, 128),
    row("several blocks of both, none ragged", "fp16", 128, 256, 256),
    row("several blocks of both, both ragged", "bf16", 128, 300, 270, heads=(2, 2)),
    row("the diagonal on a boundary of blocks", "bf16", 64, 256, 384, causal=BR),
    row("the diagonal one beside a boundary", "fp16", 64, 256, 385, causal=BR),
    row("the diagonal one before a boundary", "bf16", 128, 256, 383, causal=BR),
    row("the first rows see no key", "bf16", 64, 400, 130, causal=BR),
    row("nobody sees the last blocks of keys, whose gradients are 0", "fp16", 64, 130, 500, causal=TL),
    row("a group of 3: sums over query heads", "bf16", 64, 150, 200, heads=(6, 2), batch=2, causal=BR),
    row("a group of 4 without a mask, ragged keys", "fp16", 128, 100, 150, heads=(4, 1)),
    row("heads before rows", "bf16", 64, 200, 200, heads=(4, 2), batch=2, layout="bhsd", causal=BR),
    row("values narrower than keys", "bf16", 128, 150, 200, dv=64, causal=BR),
    row("values wider than keys", "fp16", 64, 150, 200, dv=128),
    row("72 and 80 columns: beyond a swizzled row", "fp16", 72, 100, 200, dv=80, causal=BR),
    row("the least head dim TMA can move", "bf16", 8, 140, 140, causal=BR),
    row("a negative scale over several blocks", "bf16", 64, 150, 300, causal=BR, scale=-0.2),
    row("a scale of 0: only dv is not 0", "fp16", 64, 150, 300, causal=TL, scale=0.0),
    row("logits near -600: exp of a key that does not exist would overflow", "bf16", 64, 150, 200, values="low"),
    row("logits near -600, causal", "fp16", 128, 150, 200, causal=BR, values="low"),
    row("DeepSeek's 192/128 over several blocks", "bf16", 192, 150, 200, dv=128, causal=BR, heads=(4, 2)),
    row("the widest, both ragged", "bf16", 256, 150, 200, heads=(2, 2)),
    row("the widest, causal, top-left", "fp16", 256, 200, 150, causal=TL, heads=(2, 1)),
    row("wide values alone: one panel of dq, two of dv", "fp16", 64, 130, 200, dv=256, causal=BR),
    row("wide values: two panels of dq", "bf16", 128, 130, 200, dv=256, heads=(4, 2)),
    row("wide keys alone", "bf16", 200, 130, 200, dv=72, causal=BR, batch=2),
    row("wide, logits near -600", "bf16", 192, 130, 90, dv=160, values="low"),
    row("one query, many keys", "bf16", 64, 1, 300, heads=(8, 1), causal=BR),
    row("many queries, two keys", "fp16", 128, 300, 2),
    row("sections of two heads, the last of one", "bf16", 64, 100, 200, heads=(3, 3)),
    row("sections of two heads, causal, the last of one", "bf16", 64, 150, 200, heads=(3, 3), causal=BR),
)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.id)
def test_every_configuration_of_the_portfolio(case: Row) -> None:
    spec = spec_of(case.problem)
    for number, known in enumerate(VARIANT.known_good(spec, H100)):
        assert VARIANT.illegal(spec, H100, known.config) is None
        for deterministic in MODES:
            schedule = ("random", "lazy", "priority", "eager")[(2 * number + deterministic) % 4]
            run(case, known.config, OWN.index(case), schedule=schedule, deterministic=deterministic).require(
                f"{case.why}: {known.config.label}"
            )


KNOBS = (
    {"BLOCK_M": 64},
    {"BLOCK_M": 64, "BLOCK_N": 64},
    {"STAGES": 1, "SCORES_AHEAD": False},
    {"BLOCK_M": 64, "STAGES": 3},
    {"BLOCK_M": 64, "STAGES": 4, "DQ_STAGES": 2},
    {"DS_STAGES": 1},
    {"DQ_STAGES": 2, "DS_STAGES": 1},
    {"SCORES_AHEAD": True, "DV_FIRST": True},
    {"SCORES_AHEAD": True, "PEELED": False},
    {"SCORES_AHEAD": False, "DV_FIRST": True, "PEELED": False},
)


WIDE_KNOBS: tuple[dict[str, Any], ...] = (
    {"STAGES": 3},
    {"DQ_STAGES": 3},
    {"DQ_STAGES": 4},
    {"PEELED": False},
)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("knobs", WIDE_KNOBS, ids=str)
@pytest.mark.parametrize("causal", [BR, None])
def test_every_knob_of_wide_head_dims(knobs: dict[str, Any], causal: Any) -> None:
    case = row("", "bf16", 192, 200, 150, dv=128, causal=causal, heads=(2, 1))
    spec = spec_of(case.problem)
    config = with_knobs(VARIANT.default(spec, H100), **{"PEELED": True} | knobs)
    assert VARIANT.illegal(spec, H100, config) is None
    for number, schedule in enumerate(SCHEDULES):
        run(case, config, schedule=schedule, deterministic=number % 2 == 0).require(config.label)


def test_wide_head_dims_leave_some_knobs_no_choice() -> None:
    spec = AttentionSpec(op="attention_bwd", dtype="bf16", head_dim=256, head_dim_v=256)
    for knobs in ({"BLOCK_M": 128}, {"BLOCK_N": 128}, {"DS_STAGES": 2}, {"SCORES_AHEAD": True}, {"DV_FIRST": False}):
        config = with_knobs(VARIANT.default(spec, H100), **knobs)
        assert "head dim is above 128" in str(VARIANT.illegal(spec, H100, config))
    assert "shared memory" in str(VARIANT.illegal(spec, H100, with_knobs(VARIANT.default(spec, H100), STAGES=3)))
    assert "two at a time" in str(VARIANT.illegal(spec, H100, with_knobs(VARIANT.default(spec, H100), DQ_STAGES=1)))
    assert "STAGES must be 2" in str(VARIANT.illegal(spec, H100, with_knobs(VARIANT.default(spec, H100), STAGES=1)))
    starved = str(VARIANT.illegal(spec, H100, with_knobs(VARIANT.default(spec, H100), PRODUCER_REGS=64)))
    assert "warpgroup with p" in starved and "PRODUCER_REGS=64 leaves it 192" in starved


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("causal", [BR, None])
def test_every_knob(knobs: dict[str, Any], causal: Any) -> None:
    case = row("", "bf16", 64, 300, 200, causal=causal, heads=(2, 1))
    spec = spec_of(case.problem)
    config = with_knobs(VARIANT.default(spec, H100), **knobs)
    assert VARIANT.illegal(spec, H100, config) is None
    for number, schedule in enumerate(SCHEDULES):
        run(case, config, schedule=schedule, deterministic=number % 2 == 0).require(config.label)


def sums(buffers: GradientBuffers, config: KernelConfig, **options: Any) -> tuple[bytes, ...]:
    """The bits of a launch's gradients; dq in fp32, since rounding to 16 bits hides the order of a few sums."""
    dq = torch.empty(buffers.outputs["dq"].shape)
    launch(replace(buffers, outputs={**buffers.outputs, "dq": dq}), config, **options)
    return tuple(x.float().numpy().tobytes() for x in (dq, buffers.outputs["dk"], buffers.outputs["dv"]))


@functools.cache
def first_sums(causal: Any) -> tuple[GradientBuffers, KernelConfig, tuple[bytes, ...]]:
    """Three blocks of keys that add to the same rows: inputs, a configuration, and the bits of one run."""
    buffers = make_gradient_buffers(row("", "bf16", 16, 64, 130, causal=causal).problem, seed=5)
    config = with_knobs(VARIANT.default(spec_of(buffers.problem), H100), BLOCK_M=64, BLOCK_N=64)
    return buffers, config, sums(buffers, config, schedule="eager", processors=1)


# In parts, since a test's limit is one of wall time: all at once took 177 seconds beside nine other processes on two cores.
@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("part", range(len(SCHEDULES)))
@pytest.mark.parametrize("causal", [BR, None])
def test_ordered_sums_are_the_same_bits_under_100_schedules(causal: Any, part: int) -> None:
    """Fewer thread blocks run at a time than there are, or all of them; each part takes every schedule, and runs of its own."""
    buffers, config, first = first_sums(causal)
    for seed in range(25 * part, 25 * part + 25):
        options = {"schedule": SCHEDULES[seed % 4], "seed": seed, "processors": 1 + seed // 4 % 4}
        assert sums(buffers, config, **options) == first, options


def test_fast_sums_depend_on_the_schedule() -> None:
    """Else the test above would show nothing."""
    buffers = make_gradient_buffers(row("", "bf16", 16, 64, 130).problem, seed=5)
    config = with_knobs(VARIANT.default(spec_of(buffers.problem), H100), BLOCK_M=64, BLOCK_N=64)
    seen = {sums(buffers, config, seed=seed, deterministic=False) for seed in range(20)}
    assert len(seen) > 1


@pytest.mark.parametrize("deterministic", MODES)
@pytest.mark.parametrize("causal", [BR, None])
def test_sections_of_several_heads(causal: Any, deterministic: bool) -> None:
    """A device on which two heads run at a time, and a head that is left: with the usual three processors it is one at a time."""
    case = row("", "bf16", 64, 100, 200, causal=causal, heads=(6, 3))
    run(case, processors=5, deterministic=deterministic).require("sections")


@pytest.mark.parametrize("deterministic", MODES)
def test_a_row_that_sees_no_key_may_hold_anything(deterministic: bool) -> None:
    """NaN in its query, its gradient and its lse's gradient reaches nobody, itself included."""
    problem = row("", "bf16", 64, 200, 70, causal=BR, heads=(2, 1)).problem
    clean, dirty = (make_gradient_buffers(problem, seed=5) for _ in range(2))
    unseen = problem.seqlen_q - problem.seqlen_k
    for name in ("q", "dout", "out"):
        dirty.inputs[name][:, :unseen] = torch.nan  # type: ignore[index]
    dirty.inputs["dlse"][:, :, :unseen] = torch.nan  # type: ignore[index]
    for buffers in (clean, dirty):
        launch(buffers, deterministic=deterministic, schedule="lazy")
    for name, gradient in clean.outputs.items():
        assert torch.equal(gradient, dirty.outputs[name])
    assert not clean.outputs["dq"][:, :unseen].any()


def test_a_second_launch_starts_from_nothing() -> None:
    """Sums and turns are zeroed by each launch, rows that do not exist included."""
    case = row("", "fp16", 64, 100, 300, causal=TL)
    buffers = make_gradient_buffers(case.problem, seed=3)
    for _ in range(2):
        launch(buffers)
    buffers.check().require("the second launch")


@pytest.mark.parametrize("expanded", ["one number", "one row"])
def test_an_expanded_gradient_is_copied(expanded: str) -> None:
    case = row("", "bf16", 64, 50, 70)
    buffers = make_gradient_buffers(case.problem, seed=4, dlse=False)
    dout = buffers.inputs["dout"]
    assert dout is not None
    one = dout[:1, :1, :1] if expanded == "one row" else dout[:1, :1, :1, :1]
    same = replace(buffers, inputs={**buffers.inputs, "dout": one.expand(dout.shape)})
    if expanded == "one number":  # the last stride is 0: not this kernel's business
        same = replace(same, inputs={**same.inputs, "dout": one.expand(dout.shape).contiguous()})
    same = replace(same, call=replace(buffers.call, dout=same.inputs["dout"]))
    launch(same)
    same.check().require("an expanded dout")
