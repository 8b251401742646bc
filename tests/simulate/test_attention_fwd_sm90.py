"""The rendered Hopper forward, run by the simulator: the problem table at the bar of the portable kernel, and shapes of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BR, TABLE, TL, Row, row

from flashgen.accuracy import AccuracyReport, make_buffers
from flashgen.checks import tma_addressable
from flashgen.config import KernelConfig
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.simulator import SCHEDULES, simulate
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

VARIANT, H100 = by_name("gluon_fwd_sm90"), Target.named("h100")


def legal(spec: AttentionSpec) -> list[KernelConfig]:
    """The portfolio, as far as it is legal."""
    return [known.config for known in VARIANT.known_good(spec, H100) if not VARIANT.illegal(spec, H100, known.config)]


def run(case: Row, schedule: Any = "random", seed: int = 0, config: KernelConfig | None = None) -> AccuracyReport:
    """Simulate one row with a configuration, the default where none is given."""
    spec = case.problem.spec
    buffers = make_buffers(case.problem, seed=seed + 1, strides=case.strides, values=case.values)
    tensors = {name: getattr(buffers, name) for name in ("q", "k", "v", "o", "lse")}
    tunables = config or VARIANT.default(spec, H100)
    simulate(render(spec, VARIANT), {**tensors, **buffers.scalars, **tunables}, schedule=schedule, seed=seed)
    return buffers.check()


def is_covered(case: Row) -> bool:
    if VARIANT.supports(case.problem.spec, H100) is not None:
        return False
    buffers = make_buffers(case.problem, seed=1, strides=case.strides)
    return all(tma_addressable(x) for x in (buffers.q, buffers.k, buffers.v, buffers.o))


COVERED = [case for case in TABLE if is_covered(case)]


def test_the_table_is_covered() -> None:
    left = {case.problem.spec.dtype for case in TABLE if case not in COVERED and case.strides == "padded"}
    odd = [c for c in TABLE if c.problem.dtype != "fp32" and c not in COVERED and c.strides == "padded"]
    assert len(COVERED) >= 45
    assert "fp32" in left
    assert all(case.problem.head_dim % 8 or case.problem.head_dim_v % 8 for case in odd)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.id)
def test_problem(case: Row, schedule: Any) -> None:
    run(case, schedule).require(case.why)


# Sizes around this kernel's own tiles: 64 rows a warpgroup, 128 or 192 a block, 64 or 128 keys a step, heads that share a tile.
OWN = (
    row("one block of rows and of keys, exactly", "bf16", 64, 192, 128),
    row("several tiles a CTA: the tickets turn", "fp16", 64, 400, 300, heads=(4, 2), batch=2, causal=BR),
    row("the last warpgroup has no query", "bf16", 128, 70, 200, causal=BR),
    row("the diagonal on a boundary of blocks", "bf16", 128, 256, 512, causal=BR),
    row("the diagonal one beside a boundary: two masked blocks", "bf16", 128, 256, 513, causal=BR),
    row("the diagonal one before a boundary", "fp16", 128, 256, 511, causal=BR),
    row("whole tiles see no key", "bf16", 64, 500, 90, causal=BR),
    row("nobody sees the last blocks", "fp16", 64, 130, 500, causal=TL),
    row("8 heads of one query share a tile", "bf16", 128, 1, 300, heads=(16, 2), causal=BR),
    row("64 heads share a tile, one row each", "fp16", 64, 1, 200, heads=(64, 1), batch=2),
    row("a group of 6: two heads share a tile", "bf16", 64, 50, 300, heads=(6, 1), causal=BR),
    row("a group of 12: four heads of 7 queries", "bf16", 128, 7, 200, heads=(12, 1), causal=BR, layout="bhsd"),
    row("heads share a tile and see no key", "bf16", 64, 20, 7, heads=(4, 1), causal=BR),
    row("the widest", "bf16", 256, 200, 200, causal=BR, heads=(2, 1)),
    row("values wider than keys", "fp16", 64, 130, 200, dv=256, causal=BR),
    row("DeepSeek's 192/128 over several tiles", "bf16", 192, 200, 200, dv=128, causal=BR, heads=(2, 2)),
    row("72 columns: 8 beyond a swizzled row", "fp16", 72, 100, 200, dv=80),
    row("the least head dim TMA can move", "bf16", 8, 70, 140, causal=BR, lse=False),
    row("a negative scale over several blocks", "bf16", 128, 150, 300, causal=BR, scale=-0.2),
    row("a scale of 0 over several blocks", "fp16", 64, 150, 300, causal=TL, scale=0.0),
    row("logits near -600 over several blocks", "bf16", 128, 150, 400, causal=BR, values="low"),
    row("one slice of a fused projection", "bf16", 64, 200, 200, heads=(4, 4), strides="packed", causal=BR),
)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.id)
def test_every_configuration_of_the_portfolio(case: Row) -> None:
    for seed, config in enumerate(legal(case.problem.spec)):
        run(case, ("random", "lazy", "priority", "eager")[seed % 4], seed, config).require(
            f"{case.why}: {config.label}"
        )


@pytest.mark.parametrize("block_n", [32, 64])
def test_several_masked_blocks_a_warpgroup(block_n: int) -> None:
    """Small key blocks: the masked loop runs more than once."""
    case = row("", "bf16", 64, 200, 333, causal=BR, heads=(2, 1))
    config = replace_knobs(VARIANT.default(case.problem.spec, H100), BLOCK_N=block_n)
    for seed, schedule in enumerate(SCHEDULES):
        run(case, schedule, seed, config).require(config.label)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_depth_of_the_pipeline(stages: int) -> None:
    case = row("", "fp16", 64, 200, 700, causal=TL)
    config = replace_knobs(VARIANT.default(case.problem.spec, H100), STAGES=stages)
    run(case, "lazy", stages, config).require(config.label)


def replace_knobs(config: KernelConfig, **knobs: Any) -> KernelConfig:
    return KernelConfig(variant=config.variant, **{**config.to_dict(), **knobs})


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    case = row("", "bf16", 64, 150, 200, causal=BR, heads=(4, 2), batch=3)
    buffers = make_buffers(case.problem, seed=3, strides="dense")
    config = VARIANT.default(case.problem.spec, H100)
    source = render(case.problem.spec, VARIANT)

    def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[0], q.shape[2], q.shape[1]), torch.nan).float()
        simulate(source, {"q": q, "k": k, "v": v, "o": out, "lse": lse, **buffers.scalars, **config})
        return out, lse

    every = launch(buffers.q, buffers.k, buffers.v)
    for b in range(3):
        alone = launch(*(x[b : b + 1] for x in (buffers.q, buffers.k, buffers.v)))
        assert torch.equal(alone[0], every[0][b : b + 1])
        assert torch.equal(alone[1], every[1][b : b + 1])


def test_what_nobody_sees_is_not_read() -> None:
    """Keys beyond every query are NaN, also in a block that others of which are seen."""
    case = row("", "bf16", 64, 20, 75, causal=TL)
    problem: Problem = replace(case.problem, seqlen_k=200)
    run(replace(case, problem=problem)).require("unseen keys")


def rising(case: Row, config: KernelConfig, old: str = "", new: str = "") -> float:
    """The largest error where all logits are negative and rise by more than an exponential holds, from the last block of keys to the first."""
    problem, spec = case.problem, case.problem.spec
    buffers = make_buffers(problem, seed=1)
    q, k, v, out = torch.ones_like(buffers.q), torch.empty_like(buffers.k), buffers.v, torch.empty_like(buffers.o)
    k.copy_(-0.5 * torch.arange(1, problem.seqlen_k + 1)[None, :, None, None] / (problem.scale * spec.head_dim))
    k[:, ::2] -= 1000 / (problem.scale * spec.head_dim)  # the least of what each lane holds is below all others
    source = render(spec, VARIANT)
    assert not old or source.text.count(old) >= 1
    source = replace(source, text=source.text.replace(old, new)) if old else source
    tensors = {"q": q, "k": k, "v": v, "o": out, "lse": None}
    simulate(source, {**tensors, **buffers.scalars, **config}, schedule="random", seed=0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * problem.scale
    if spec.causal:
        seen = torch.ones_like(scores[0, 0]).tril(problem.causal_offset).bool()
        scores = scores.masked_fill(~seen, -torch.inf)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    return float((out.double() - wanted).abs().nan_to_num(torch.inf).max())


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("causal", [BR, None])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_maxima_of_negative_logits_are_no_integers(dim: int, causal: Any, lazy: bool) -> None:
    """Rows whose maximum is negative are compared as numbers: as integers the least of them would win. References follow logits that rise without end."""
    keys = 14 * (64 if dim == 256 else 128) + 30
    case = row("negative logits that rise", "bf16", dim, 130, keys, causal=causal, heads=(1, 1), lse=False)
    config = replace_knobs(VARIANT.default(case.problem.spec, H100), LAZY_SUM=lazy)
    assert rising(case, config) < 0.02
    if causal is None:  # a causal kernel compares numbers alone
        old = "gl.min(gl.min(m_i, 1), 0) >= -8.0" if lazy else "gl.min(m_i, 0) >= 0.0"
        assert rising(case, config, f"found = {old}", f"found = {old.replace('>=', '<')}") > 0.5


# What a kernel that holds references must not leave out, and what it does.
BROKEN = {
    "output not corrected": ("        acc = rescale(acc, alpha, BLOCK_DV)\n", ""),
    "sums not corrected": ("l_i = l_i * alpha + sums_p", "l_i = l_i + sums_p"),
    "references not kept": ("m_i, alpha = hold(found, m_i, l_i, qk_scale)", "_, alpha = hold(found, m_i, l_i, qk_scale)"),
    "sums of one block": ("l_i = l_i * alpha + sums_p", "l_i = l_i * 0.0 + sums_p"),
    "the maximum of a lane's odd columns": ("found = gl.max(gl.max(by_lanes(qk, BLOCK_N), 1), 2)", "found = gl.max(by_lanes(qk, BLOCK_N), 1).split()[1]"),
    "one lane's sum for the row": ("l_i = gl.convert_layout(gl.sum(l_i, 1), ROW_LAYOUT)", "l_i = gl.convert_layout(4.0 * gl.min(l_i, 1), ROW_LAYOUT)"),
    "one lane's reference for lse": ("m_i = gl.convert_layout(gl.max(m_i, 1), ROW_LAYOUT)", "m_i = gl.convert_layout(0.0 * gl.max(m_i, 1), ROW_LAYOUT)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_holding_references_needs(name: str) -> None:
    case = row("rows that rise, fall and stay", "bf16", 64, 130, 700, causal=BR, heads=(2, 1), scale=0.5)
    config = replace_knobs(VARIANT.default(case.problem.spec, H100), LAZY_SUM=True)
    run(case, config=config).require("as it is")
    old, new = BROKEN[name]
    source = render(case.problem.spec, VARIANT)
    assert old in source.text
    buffers = make_buffers(case.problem, seed=1)
    tensors = {name: getattr(buffers, name) for name in ("q", "k", "v", "o", "lse")}
    simulate(replace(source, text=source.text.replace(old, new)), {**tensors, **buffers.scalars, **config})
    assert not buffers.check().ok


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sharp_rows(dtype: str, lazy: bool) -> None:
    """Rows that few keys dominate: their weights are exact whether references are held or follow."""
    for seed, (dim, scale, values) in enumerate(
        ((64, 0.5, "normal"), (128, 0.3, "normal"), (64, None, "low"), (64, None, "large"))
    ):
        case = row("sharp", dtype, dim, 70, 600, causal=(BR, None)[seed % 2], heads=(1, 1), scale=scale, values=values)
        config = replace_knobs(VARIANT.default(case.problem.spec, H100), LAZY_SUM=lazy)
        run(case, SCHEDULES[seed % 4], seed, config).require(f"{case.why}: {config.label}")


def test_four_warpgroups_sum_rows_by_products() -> None:
    """The tile of 256 rows, which no default is: ragged rows and keys, rows without a key, negative logits, several tiles a block."""
    for seed, case in enumerate(
        (
            row("ragged", "bf16", 64, 300, 333, causal=BR, heads=(2, 2), batch=2, lse=False),
            row("full", "fp16", 64, 520, 200, heads=(3, 1), lse=False),
            row("rows without a key", "bf16", 64, 500, 90, causal=BR, lse=False),
            row("keys in half a swizzled row", "bf16", 32, 100, 100, causal=TL, lse=False),
            row("logits near -600", "bf16", 64, 150, 400, causal=BR, values="low", lse=False),
        )
    ):
        known = {"BLOCK_M": 256, "BLOCK_N": 64, "CONSUMER_REGS": 112, "PRODUCER_REGS": 32}
        for stages, turns in ((2, True), (4, False)):
            knobs = {**known, "STAGES": stages, "TAKE_TURNS": turns, "LAZY_SUM": turns == (seed % 2 == 0)}
            config = replace_knobs(VARIANT.default(case.problem.spec, H100), **knobs)
            assert VARIANT.illegal(case.problem.spec, H100, config) is None
            run(case, SCHEDULES[seed % 4], seed, config).require(f"{case.why}: {config.label}")


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("bf16-d128", "head dims up to 64"),
        ("bf16-d64-lse", "without lse"),
        ("bf16-d64-window", "without lse and options"),
    ],
)
def test_four_warpgroups_are_for_narrow_plain_kernels(word: str, why: str) -> None:
    spec = AttentionSpec.from_key(f"attention_fwd-{word}")
    config = replace_knobs(VARIANT.default(spec, H100), BLOCK_M=256, BLOCK_N=64, CONSUMER_REGS=112, PRODUCER_REGS=32)
    assert why in (VARIANT.illegal(spec, H100, config) or "")
