"""What tuning_db/seeds ships: today's kernels, labelled as they are, for every preset's layers that a kernel covers on every target."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashgen import Problem, Target, UnsupportedProblemError, dispatch
from flashgen.presets import PRESETS
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import Record, seeds, select
from flashgen.target import TARGETS
from flashgen.tuner.context import choose_variant
from flashgen.variants import by_name

VARIANT = by_name("gluon_fwd_sm90")
GPUS = [name for name in TARGETS if name != "cpu"]
HOPPER = [name for name in GPUS if TARGETS[name].arch == "sm_90"]
LAYERS = {
    f"{name}/{layers.kind}": Problem.preset(name, layer=layers.kind)
    for name, model in PRESETS.items()
    for layers in model.layers
}
AGAIN = "run scripts/predict_seeds.py again (measured rows: measure again)"


@pytest.fixture(autouse=True)
def shipped_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "silent")
    dispatch.forget()


def covered(problem: Problem, target: Target) -> bool:
    """Whether it is a plain layer that some kernel takes: rows of layers with options are not shipped yet."""
    if not set(problem.spec.flags) <= {"causal", "has_lse"}:
        return False
    try:
        choose_variant(problem, target)
    except UnsupportedProblemError:
        return False
    return True


@pytest.mark.parametrize("gpu", GPUS)
def test_every_covered_layer_has_a_row(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_ON_MISS", "error")  # a miss would raise
    target = Target.named(gpu)
    sources = {
        name: dispatch.resolve(problem, target, backend="triton").config_source
        for name, problem in LAYERS.items()
        if covered(problem, target)
    }
    assert len(sources) >= 10 and set(sources.values()) <= {"seed", "predicted"}


@pytest.mark.parametrize("gpu", GPUS)
def test_the_gradients_of_every_covered_layer_have_a_row(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_ON_MISS", "error")
    target = Target.named(gpu)
    plans = [
        dispatch.resolve(problem.backward, target, backend="triton")
        for problem in LAYERS.values()
        if covered(problem.backward, target)
    ]
    assert len(plans) >= 10
    for plan in plans:
        assert plan.variant == "triton_bwd" and plan.config_source in ("seed", "predicted")


@pytest.mark.parametrize("gpu", GPUS)
def test_a_layer_with_options_has_no_row_and_runs_a_default(gpu: str) -> None:
    target, keys = Target.named(gpu), {row.spec_key for row in seeds.load(gpu, "attention_fwd")}
    left_out = {name: problem for name, problem in LAYERS.items() if not covered(problem, target)}
    for name, problem in left_out.items():
        assert problem.spec.key not in keys, name
        plan = dispatch.resolve(problem, target)
        variants = ("gluon_fwd_sm90", "triton_fwd") if target.arch == "sm_90" else ("triton_fwd",)
        assert plan.variant in variants and plan.config_source == "default", name


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd"])
@pytest.mark.parametrize("gpu", GPUS)
def test_rows_are_of_todays_kernels_legal_and_labelled_as_they_are(gpu: str, op: str) -> None:
    target = Target.named(gpu)
    rows = seeds.load(gpu, op)
    assert rows
    for row in rows:
        spec, variant = AttentionSpec.from_key(row.spec_key), by_name(row.variant)
        assert row.digest == render(spec, variant).digest, f"{row.spec_key} on {gpu} is of an older kernel: {AGAIN}"
        assert row.arch == target.arch and row.error_ratio is not None and row.error_ratio <= 1.0
        assert variant.parse_config(row.config, spec, target)
        if row.status == "ok":
            assert row.latency_ms and row.predicted_ms is None
        else:
            assert row.status == "predicted" and row.model and row.latency_ms is None
            assert (row.message or "").startswith(
                ("chosen by measured table", "chosen by known good", "chosen by model")
            )


@pytest.mark.parametrize("gpu", HOPPER)
def test_hopper_gpus_have_rows_of_both_kernels(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper forward has a row for every covered layer, and for all that was measured on any Hopper GPU."""
    monkeypatch.setenv("FLASHGEN_ON_MISS", "error")
    target = Target.named(gpu)
    sources = {
        name: dispatch.resolve(problem, target, backend="gluon").config_source
        for name, problem in LAYERS.items()
        if VARIANT.supports(problem.spec, target) is None and covered(problem, target)
    }
    assert len(sources) >= 10 and set(sources.values()) <= {"seed", "predicted"}
    rows = [row for row in seeds.load(gpu, "attention_fwd") if row.variant == VARIANT.name]
    here = {(row.spec_key, tuple(row.shape.values())) for row in rows}
    there = [row for name in HOPPER for row in seeds.load(name, "attention_fwd")]
    measured = [row for row in there if (row.variant, row.status) == (VARIANT.name, "ok")]
    assert len(measured) >= 30 and {(row.spec_key, tuple(row.shape.values())) for row in measured} <= here
    for row in rows:
        # Nothing forecasts this kernel: no predicted time, and the message says so.
        assert row.predicted_ms is None
        assert row.status == "ok" or "not ranked: the cost model has no forecast" in (row.message or "")


def _what(row: Record) -> tuple[object, ...]:
    return (row.variant, row.spec_key, row.shape)


def test_the_portable_kernel_was_measured_on_an_h100() -> None:
    rows = [row for row in seeds.load("h100", "attention_fwd") if row.status == "ok"]
    assert {row.spec_key for row in rows if row.variant == "triton_fwd"} == {
        "attention_fwd-bf16-d128-causal",
        "attention_fwd-fp16-d64",
        "attention_fwd-fp32-d32",
    }


@pytest.mark.parametrize("gpu", HOPPER)
def test_what_was_measured_is_not_predicted_as_well(gpu: str) -> None:
    rows = seeds.load(gpu, "attention_fwd")
    for row in [row for row in rows if row.status == "ok"]:
        assert not [r for r in rows if r.status == "predicted" and _what(r) == _what(row)]
        assert select.best_measured(rows, row.shape) is not None
