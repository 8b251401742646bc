"""The descriptor of the Hopper forward: what it supports, what is legal, and that its arithmetic is the compiler's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashgen.config import KernelConfig
from flashgen.facts import compile_facts, inspect
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import seeds
from flashgen.target import CPU, Target
from flashgen.variants import by_name

VARIANT, H100 = by_name("gluon_fwd_sm90"), Target.named("h100")
HEAD_DIMS = ("d64", "d128", "d256", "d192-dv128", "d64-dv256", "d8", "d72-dv80")


def spec_of(words: str) -> AttentionSpec:
    return AttentionSpec.from_key(f"attention_fwd-{words}")


@pytest.mark.parametrize(
    ("words", "target", "reason"),
    [
        ("bf16-d128-causal-lse", H100, None),
        ("fp16-d192-dv128", Target.named("h200"), None),
        ("bf16-d64", CPU, None),
        ("bf16-d128", Target.named("a100"), "written for Hopper"),
        ("bf16-d128", Target.named("b200"), "written for Hopper"),
        ("bf16-d128", Target.named("mi300x"), "written for Hopper"),
        ("fp32-d128", H100, "takes fp16 and bf16"),
        ("bf16-d100", H100, "head_dim 100 is no multiple of 8"),
        ("bf16-d64-dv33", H100, "head_dim_v 33 is no multiple of 8"),
        ("bf16-d64-window-softcap-alibi-sinks-bias-attn_mask-dropout-varlen", H100, None),
        ("bf16-d64-paged", H100, "paged: not covered"),
        ("bf16-d192-dv128-window", H100, None),
        ("bf16-d64-dv256-attn_mask-varlen", H100, None),
    ],
)
def test_supports_names_the_reason(words: str, target: Target, reason: str | None) -> None:
    said = VARIANT.supports(spec_of(words), target)
    assert said is None if reason is None else reason in (said or "")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_defaults_and_portfolio_are_legal(head_dim: str) -> None:
    spec = spec_of(f"bf16-{head_dim}-causal")
    space = VARIANT.space(spec, H100)
    assert VARIANT.illegal(spec, H100, VARIANT.default(spec, H100)) is None
    assert space and len(set(space)) == len(space)
    assert all(known.source for known in VARIANT.known_good(spec, H100))


def changed(**knobs: Any) -> KernelConfig:
    return KernelConfig(variant=VARIANT.name, **{**VARIANT.default(spec_of("bf16-d128"), H100).to_dict(), **knobs})


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"BLOCK_M": 64}, "BLOCK_M=64 must be 128, 192 or 256"),
        ({"BLOCK_M": True}, "BLOCK_M=True must be"),
        ({"BLOCK_N": 48}, "BLOCK_N=48 must be one of"),
        ({"STAGES": 0}, "STAGES=0 must be from 1"),
        ({"STAGES": "2"}, "STAGES='2' must be from 1"),
        ({"SECTION": 0}, "SECTION=0 must be from 1"),
        ({"LAZY_SUM": 1}, "LAZY_SUM=1 must be True or False"),
        ({"TAKE_TURNS": 0}, "TAKE_TURNS=0 must be True or False"),
        ({"CONSUMER_REGS": 236}, "CONSUMER_REGS=236 must be a multiple of 8"),
        ({"PRODUCER_REGS": 16}, "PRODUCER_REGS=16 must be a multiple of 8 from 24"),
        ({"CONSUMER_REGS": 248}, "need more than the 504 registers"),
        ({"CONSUMER_REGS": 160}, "leaves the first warpgroup 320"),
        ({"BLOCK_M": 192, "CONSUMER_REGS": 160, "PRODUCER_REGS": 32}, "need about 190 registers a thread"),
        ({"STAGES": 3}, "bytes of shared memory"),
    ],
)
def test_illegal_names_the_knob(knobs: dict[str, Any], reason: str) -> None:
    assert reason in (VARIANT.illegal(spec_of("bf16-d128"), H100, changed(**knobs)) or "legal")


def test_the_caps_polynomial_is_tanh() -> None:
    """`late_cap` in fp32, over all that it takes for near: to 1e-6 of tanh."""
    text = render(spec_of("bf16-d64-causal-softcap"), VARIANT).text
    line = next(line for line in text.splitlines() if line.strip().startswith("near = "))
    rate = np.float32(0.004)
    score = np.linspace(-0.25, 0.25, 20001).astype(np.float32) / rate
    space: dict[str, Any] = {"qk": score, "squares": score * score, "rate": rate}
    exec(line.strip(), space)
    with np.errstate(invalid="ignore"):
        error = np.abs(space["near"] * np.float64(rate) / np.tanh(score.astype(np.float64) * rate) - 1)
    assert np.nanmax(error) < 1e-6 and "0.25 / rate" in text


def test_the_exponents_polynomial_is_tanh() -> None:
    """The terms of `capped_exponents` in fp32, over all that it takes for near: to 1e-6 of tanh."""
    text = render(spec_of("bf16-d128-causal-softcap"), VARIANT).text
    lines = [line.strip(" ,") for line in text.splitlines() if line.strip().endswith("rate * rate * qk_scale,")]
    rate = np.float32(0.004)
    score = np.linspace(-0.25, 0.25, 20001).astype(np.float32) / rate
    fifth, third = (np.float32(eval(line, {"rate": rate, "qk_scale": np.float32(1)})) for line in lines)
    squares = score * score
    near = score * (squares * (squares * fifth + third) + np.float32(1))
    with np.errstate(invalid="ignore"):
        error = np.abs(near * np.float64(rate) / np.tanh(score.astype(np.float64) * rate) - 1)
    assert np.nanmax(error) < 1e-6 and "0.25 / rate" in text


def test_masks_need_q_until_the_end() -> None:
    """Where a mask hides keys their values may be NaN, and the tile is then computed anew from q."""
    reason = VARIANT.illegal(spec_of("bf16-d128-window"), H100, changed(OWN_STAGING=False)) or ""
    assert "needed till the end" in reason


def test_staging_in_the_memory_of_q_needs_equal_widths() -> None:
    reason = VARIANT.illegal(spec_of("bf16-d64-dv128"), H100, changed(OWN_STAGING=False)) or ""
    assert "another width" in reason


def test_shipped_rows_are_of_todays_text_and_legal() -> None:
    rows = [row for row in seeds.load("h200", "attention_fwd") if row.variant == VARIANT.name]
    assert len(rows) >= 50
    for row in rows:
        spec = AttentionSpec.from_key(row.spec_key)
        assert row.digest == render(spec, VARIANT).digest, f"{row.spec_key}: measured with another text: measure anew"
        assert VARIANT.parse_config(row.config, spec, H100) is not None


@pytest.mark.sampled(every=3)
@pytest.mark.slow
@pytest.mark.parametrize("words", ["bf16-d128-causal", "fp16-d64-lse", "bf16-d256-causal"])
def test_the_compiler_agrees(words: str) -> None:
    """No spill, no serialised product in the main loop, and as much shared memory as the predicate says."""
    spec = spec_of(words)
    config = VARIANT.default(spec, H100)
    facts = compile_facts(spec, config, H100)
    needed = VARIANT.smem_bytes(spec, config)  # type: ignore[attr-defined]
    assert needed - 512 <= facts.smem_bytes <= needed <= H100.smem_bytes
    assert (facts.loop_spill_ops, facts.serialised, facts.undefined_registers) == (0, False, 0)
    assert facts.loop_macs == config.BLOCK_M * config.BLOCK_N * (spec.head_dim + spec.head_dim_v)
    assert VARIANT.illegal(spec, H100, config, facts) is None


@pytest.mark.sampled(every=4)
@pytest.mark.slow
@pytest.mark.parametrize("words", ["causal-window-lse", "causal-sinks-lse", "window-varlen-lse"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_unmasked_block_costs_what_it_costs_in_the_plain_kernel(head_dim: int, words: str) -> None:
    """Instructions of the loop over blocks that need no mask, at the plain kernel's tile; nothing spilled there."""
    plain = spec_of(f"bf16-d{head_dim}-causal-lse")
    # References follow the maximum in both: a plain kernel that holds them has a path that is jumped over, which counts here.
    tile = next(known.config for known in VARIANT.known_good(plain, H100) if not known.config.LAZY_SUM)
    limit = inspect(render(plain, VARIANT), H100, tile).loop["total"]
    facts = inspect(render(spec_of(f"bf16-d{head_dim}-{words}"), VARIANT), H100, tile)
    assert facts.loop["total"] <= limit + 8
    assert (facts.loop_spill_ops, facts.serialised, facts.undefined_registers) == (0, False, 0)
