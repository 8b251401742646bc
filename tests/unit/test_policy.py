"""The policy without a GPU: what is taken first, what is vetoed, and that its table is what the data says."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashgen import KernelConfig, Problem, Target
from flashgen.costmodel import SPILL_VETO, veto
from flashgen.facts import CompiledFacts
from flashgen.store import Record
from flashgen.target import TARGETS
from flashgen.tuner import policy
from flashgen.variants import KnownGood, MeasuredTile, by_name
from flashgen.variants.triton_fwd_tiles import KNOWN_GOOD, MEASURED, family, key

ROOT = Path(__file__).parents[2]
H100, A100 = Target.named("h100"), Target.named("a100")
VARIANT = by_name("triton_fwd")
PROBLEM = Problem.preset("llama3-8b", seqlen=2048)
FACTS = CompiledFacts(
    arch="sm_90", triton_version="0", n_regs=128, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0, smem_bytes=60_000, num_warps=8,
    serialised=False, undefined_registers=0, loop={"total": 400, "hgmma": 12, "mufu": 34, "fp32": 136}, compile_s=0.1,
)  # fmt: skip


def tile(block_m: int, block_n: int = 64, num_warps: int = 8, num_stages: int = 3) -> KernelConfig:
    return VARIANT.config(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


def row(config: KernelConfig, seqlen: int, causal: bool, own: bool = False) -> MeasuredTile:
    return MeasuredTile(config=config, seqlen=seqlen, causal=causal, source="a test", own=own)


def test_nearest_by_mask_then_length_then_own_kernel() -> None:
    rows = [
        row(tile(128), 2048, False),
        row(tile(128), 8192, True),
        row(tile(64), 4096, True),
        row(tile(256), 4096, True, own=True),
    ]
    assert [(r.seqlen, r.causal, r.own) for r in policy.nearest(PROBLEM, rows)] == [
        (4096, True, True), (4096, True, False), (8192, True, False), (2048, False, False),
    ]  # fmt: skip
    assert policy.nearest(replace(PROBLEM, seqlen_k=0), rows)  # an empty problem has a length of 1


def test_the_table_goes_before_known_good_and_the_model_orders_only_those() -> None:
    small, large, measured = tile(64, num_warps=4), tile(128), tile(256)
    facts = {small: FACTS, large: replace(FACTS, loop={**FACTS.loop, "spill": 40}), measured: FACTS}
    known = [KnownGood(config=large, source="x"), KnownGood(config=small, source="y")]
    decision = policy.decide(PROBLEM, H100, facts, measured=[row(measured, 2048, True)], known_good=known)
    assert [choice.config for choice in decision.choices] == [measured, small, large]
    assert decision.choices[0].rule.startswith("measured table: a test, S 2048, causal")
    assert decision.choices[1].rule.startswith("known good, number 1 of 2 by the model: y")
    decision = policy.decide(PROBLEM, H100, facts, measured=[], known_good=[])
    assert {choice.config for choice in decision.choices} == {small, large}  # 16 rows a warp, and measured has 32
    assert all(choice.rule.startswith("model:") for choice in decision.choices)


def test_where_the_model_was_never_judged_the_list_keeps_its_order() -> None:
    large, small = tile(128), tile(64, num_warps=4)
    facts = {small: FACTS, large: replace(FACTS, loop={**FACTS.loop, "spill": 40})}
    known = [KnownGood(config=large, source="x"), KnownGood(config=small, source="y")]
    for problem, target, first in (
        (PROBLEM, H100, small),
        (PROBLEM, A100, large),
        (replace(PROBLEM, dtype="fp32"), H100, large),
    ):
        assert policy.decide(problem, target, facts, measured=[], known_good=known).choices[0].config == first


def test_three_stages_take_the_place_of_two_that_were_vetoed() -> None:
    two, three = tile(128, num_stages=2), tile(128)
    known = [KnownGood(config=two, source="x")]
    decision = policy.decide(PROBLEM, H100, {two: FACTS, three: FACTS}, measured=[], known_good=known)
    (choice,) = decision.choices
    assert choice.config == three and choice.rule == "known good: x, with three stages instead of two"


def test_what_was_not_compiled_or_does_not_fit_is_never_chosen() -> None:
    decision = policy.decide(
        PROBLEM, H100, {}, measured=[row(tile(128), 1, True)], known_good=[KnownGood(config=tile(64), source="x")]
    )
    assert decision.choices == ()


def test_vetoes() -> None:
    spec, two, three = PROBLEM.spec, tile(128, num_stages=2), tile(128)
    spilling = replace(FACTS, loop={**FACTS.loop, "spill": SPILL_VETO})
    barely = replace(FACTS, loop={**FACTS.loop, "spill": SPILL_VETO - 1})
    assert SPILL_VETO == 50 and "50 spill" in (veto(three, spilling, spec, H100) or "")
    assert veto(three, barely, spec, H100) is None
    deep = replace(FACTS, smem_bytes=70_000)  # three blocks an SM, as with 60,000 bytes; with 100,000 it is two
    assert "two stages" in (veto(two, FACTS, spec, H100, deep) or "")
    assert veto(two, FACTS, spec, H100, replace(FACTS, smem_bytes=120_000)) is None  # three stages cost a block
    assert veto(two, FACTS, spec, H100, None) is None  # three stages do not fit at all
    assert veto(three, FACTS, spec, H100, deep) is None
    # Serialised products spoil a kernel whose warpgroups overlap, and no portable one: not its backward either.
    serialised = replace(FACTS, serialised=True)
    for variant, refused in (("gluon_fwd_sm90", True), ("triton_fwd", False), ("triton_bwd", False)):
        kernel = by_name(variant)
        own = spec if kernel.op == "attention_fwd" else PROBLEM.backward.spec
        assert (veto(kernel.default(own, H100), serialised, own, H100) is not None) == refused, variant
    assert veto(two, FACTS, replace(spec, dtype="fp32"), H100, deep) is None  # not measured there
    assert veto(two, FACTS, spec, Target.named("mi300x"), deep) is None


def test_a_measurement_of_this_kernel_overrules_the_veto() -> None:
    two, three = tile(128, num_stages=2), tile(128)
    facts = {two: FACTS, three: FACTS}
    for own, first in ((True, two), (False, three)):
        rows = [row(two, 2048, True, own=own), row(three, 8192, False)]
        assert policy.decide(PROBLEM, H100, facts, measured=rows, known_good=[]).choices[0].config == first


def test_two_stage_tiles_are_compiled_with_three_as_well() -> None:
    two = tile(64, num_warps=4, num_stages=2)
    found = policy.considered(VARIANT, PROBLEM.spec, H100, [row(two, 1, True)], [])
    assert found == [two, tile(64, num_warps=4)]


def test_shipped_rows_of_the_same_family_join_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tile(32, 32, 4)
    record = Record(
        op="attention_fwd", spec_key="attention_fwd-fp16-d96-causal", variant="triton_fwd", digest="0" * 64, gpu="h100", arch="sm_90",
        shape={"batch": 1, "seqlen_q": 2048, "seqlen_k": 2048, "num_heads_q": 1, "num_heads_kv": 1}, config=shipped.to_dict(), status="ok",
        latency_ms=1.0, error_ratio=0.5, versions={}, protocol="p", session="s", created="2026-01-31T12:00:00+00:00",
    )  # fmt: skip
    monkeypatch.setattr("flashgen.store.seeds.gpus", lambda: ("h100", "unheard-of"))
    monkeypatch.setattr(
        "flashgen.store.seeds.load", lambda gpu, op: (record, replace(record, status="predicted", latency_ms=None))
    )
    for target, joins in ((H100, True), (Target.named("gh200"), True), (A100, False)):
        rows = policy.measured_tiles(VARIANT, PROBLEM, target)
        assert [r.config for r in rows if r.own] == ([shipped] if joins else [])
    assert not any(r.own for r in policy.measured_tiles(VARIANT, replace(PROBLEM, dtype="fp32"), H100))
    assert not any(r.own for r in policy.measured_tiles(VARIANT, replace(PROBLEM, head_dim=64, head_dim_v=64), H100))


def test_the_measured_table_is_what_the_surfaces_say() -> None:
    best: dict[Any, dict[Any, tuple[float, Any]]] = defaultdict(dict)
    for line in (ROOT / "benchmarks/data/h200_triton_attention_fwd.jsonl").read_text().splitlines():
        data = json.loads(line)
        if data["ms"]:
            knobs = tuple(data["config"][name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
            problem = (data["seqlen"], data["causal"])
            at = best[data["head_dim"]]
            at[problem] = min(at.get(problem, (9e9, None)), (data["ms"], knobs))
    found = {head_dim: tuple((s, c, at[s, c][1]) for s, c in sorted(at)) for head_dim, at in best.items()}
    assert found == {head_dim: rows for (_, _, head_dim), rows in MEASURED.items()}


def test_every_architecture_has_known_good_tiles() -> None:
    families = {family(target) for target in TARGETS.values()}
    assert families == {known for known, _, _ in KNOWN_GOOD}
    for target in TARGETS.values():
        for itemsize in (2, 4):
            for head_dim in (16, 64, 128, 256):
                assert KNOWN_GOOD[key(target, itemsize, head_dim)]
