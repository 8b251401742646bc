"""The contract's order of configurations, misses, fallbacks and the memo."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashgen
from flashgen import Problem, Target, UnsupportedProblemError, dispatch
from flashgen.render import render
from flashgen.store import Record, open_store, seeds, utc_now
from flashgen.variants import by_name
from flashgen.variants.gluon_bwd_sm90 import GluonBackwardSm90
from flashgen.variants.triton_bwd import TritonBackward

H100 = Target.named("h100")
# Head dim 124, no multiple of 8: the portable kernel's on every GPU.
PROBLEM = Problem.preset("llama3-8b", seqlen=1024, head_dim=124, head_dim_v=124)
FIRST = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
SECOND = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache, no shipped rows, and nothing remembered from other tests."""
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    monkeypatch.setattr(seeds, "load", lambda gpu, op: ())
    dispatch.forget()
    yield
    dispatch.forget()


def row(problem: Problem = PROBLEM, *, target: Target = H100, **changes: Any) -> Record:
    spec = problem.spec
    values: dict[str, Any] = {
        "op": spec.op,
        "spec_key": spec.key,
        "variant": "triton_fwd",
        "digest": render(spec, by_name("triton_fwd")).digest,
        "gpu": target.name,
        "arch": target.arch,
        "shape": problem.shape,
        "config": FIRST,
        "status": "ok",
        "latency_ms": 1.0,
        "error_ratio": 0.5,
        "versions": {},
        "protocol": "test",
        "session": "s",
        "created": utc_now(),
    }
    if changes.get("status") == "predicted":
        values |= {"latency_ms": None, "rank": 1}
    return Record(**(values | changes))


def save(*rows: Record) -> None:
    with open_store(flashgen.settings.read().database_url, write=True) as store:
        store.add(rows)
    dispatch.forget()


def test_the_order_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def source() -> tuple[str, dict[str, Any]]:
        plan = dispatch.resolve(PROBLEM, H100)
        return plan.config_source, plan.config.to_dict()

    shipped: list[Record] = []
    monkeypatch.setattr(seeds, "load", lambda gpu, op: tuple(shipped) if gpu == "h100" else ())
    assert source() == ("default", by_name("triton_fwd").default(PROBLEM.spec, H100).to_dict())
    shipped.append(row(status="predicted", config=SECOND))
    dispatch.forget()
    assert source() == ("predicted", SECOND)
    save(row(status="predicted", config=FIRST))
    assert source() == ("predicted", FIRST)
    shipped.append(row(config=SECOND))
    dispatch.forget()
    assert source() == ("seed", SECOND)
    save(row(config=FIRST))
    assert source() == ("database", FIRST)
    plan = dispatch.resolve(PROBLEM, H100, config=SECOND)
    assert (plan.config_source, plan.config.to_dict()) == ("explicit", SECOND)


def test_rows_of_other_texts_and_other_gpus_are_not_taken() -> None:
    save(
        row(digest="0" * 64),
        row(target=Target.named("a100")),
        row(status="wrong_result", error_ratio=9.0),
        row(error_ratio=None),
    )
    assert dispatch.resolve(PROBLEM, H100).config_source == "default"


def test_interpreted_calls_take_what_was_tuned_for_any_gpu() -> None:
    q = torch.randn(1, 4, 2, 8)
    problem = Problem.from_tensors(q, q, q)
    save(row(problem, status="predicted", config=SECOND))
    plan = flashgen.explain(q, q, q, backend="triton")
    assert (plan.config_source, plan.config.to_dict()) == ("predicted", SECOND)


def test_a_stored_config_that_is_not_legal_today_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    save(row(config={**FIRST, "BLOCK_M": 48}))
    with caplog.at_level(logging.WARNING, "flashgen"):
        assert dispatch.resolve(PROBLEM, H100).config_source == "default"
    assert "a stored winner is ignored" in caplog.text and "BLOCK_M=48" in caplog.text


def test_a_miss_logs_the_exact_command_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.WARNING, "flashgen"):
        for _ in range(3):
            dispatch.resolve(PROBLEM, H100)
            dispatch.resolve(PROBLEM, H100, backend="triton")
    lines = [record.message for record in caplog.records if "flashgen tune" in record.message]
    assert len(lines) == 1
    assert lines[0].endswith(f"flashgen tune {PROBLEM.tune_arguments} --target h100")
    monkeypatch.setenv("FLASHGEN_ON_MISS", "error")
    with pytest.raises(UnsupportedProblemError, match=r"FLASHGEN_ON_MISS=error.*flashgen tune --op attention_fwd"):
        dispatch.resolve(PROBLEM, H100)


def test_answers_are_memoised() -> None:
    assert dispatch.resolve(PROBLEM, H100) is dispatch.resolve(PROBLEM, H100)
    before = dispatch.resolve(PROBLEM, H100)
    dispatch.forget()
    assert dispatch.resolve(PROBLEM, H100) is not before


def test_a_fall_to_torch_on_a_gpu_is_said_once_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Target(**{**{f: getattr(H100, f) for f in H100.__slots__}, "name": "v100", "arch": "sm_70"})
    with pytest.warns(UserWarning, match="falls to the torch backend on v100.*compute capability 8.0"):
        assert dispatch.resolve(PROBLEM, old).backend == "torch"
    dispatch._memo.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.resolve(PROBLEM, old)  # said already
        monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "silent")
        dispatch.forget()
        dispatch.resolve(PROBLEM, old)
    monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "error")
    with pytest.raises(UnsupportedProblemError, match="FLASHGEN_ON_FALLBACK=error"):
        dispatch.resolve(PROBLEM, old)
    monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "warn")
    dispatch.forget()
    training = Problem.preset("llama3-8b", requires_grad=True)
    for backward in (TritonBackward, GluonBackwardSm90):
        monkeypatch.setattr(backward, "supports", lambda *_: "broken today")
    with pytest.warns(
        UserWarning, match="backward of .* falls to the torch backend on h100: .*triton_bwd: broken today"
    ):
        assert dispatch.resolve(training, H100).backend == "gluon"
    with pytest.raises(
        UnsupportedProblemError, match=r"(?s)triton_fwd runs forward, but the backward of .*broken today"
    ):
        dispatch.resolve(training, H100, backend="triton")


def test_a_training_call_resolves_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Problem.preset("llama3-8b", requires_grad=True)
    gradients, hopper = training.backward, by_name("gluon_bwd_sm90")
    tile = {**hopper.default(gradients.spec, H100).to_dict(), "DQ_STAGES": 1}
    digest = render(gradients.spec, hopper).digest
    save(row(gradients, variant=hopper.name, digest=digest, config=tile))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing falls to torch
        plan = dispatch.resolve(training, H100, config=FIRST)
    assert (plan.variant, plan.config.to_dict(), plan.config_source) == ("triton_fwd", FIRST, "explicit")
    assert plan.backward is not None and plan.backward.problem == gradients
    assert (plan.backward.variant, plan.backward.config.to_dict()) == (hopper.name, tile)
    assert plan.backward.config_source == "database"
    assert "the backward runs gluon_bwd_sm90 (backend gluon) with BLOCK_M=64" in str(plan)
    assert dispatch.resolve(PROBLEM, H100).backward is None


def test_a_backward_that_nobody_tuned_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(PROBLEM, requires_grad=True)
    save(row(training, digest=render(training.spec, by_name("triton_fwd")).digest, config=FIRST))
    monkeypatch.setenv("FLASHGEN_ON_MISS", "error")
    with pytest.raises(UnsupportedProblemError, match=r"flashgen tune --op attention_bwd .*--target h100") as caught:
        dispatch.resolve(training, H100)
    assert str(caught.value).startswith("nothing is tuned for attention_bwd")


def test_hopper_takes_the_gluon_backward_and_others_the_portable_one() -> None:
    training = Problem.preset("llama3-8b", requires_grad=True)

    def backward(target: Target, backend: str = "auto", **changes: Any) -> dispatch.Plan:
        plan = dispatch.resolve(Problem.preset("llama3-8b", requires_grad=True, **changes), target, backend=backend)
        assert plan.backward is not None
        return plan.backward

    assert (backward(H100).variant, backward(H100).rejected) == ("gluon_bwd_sm90", {})
    assert backward(H100, deterministic=True).variant == "gluon_bwd_sm90"
    assert backward(H100, "triton").variant == "triton_bwd"
    elsewhere = backward(Target.named("a100"))
    assert elsewhere.variant == "triton_bwd" and "written for Hopper" in elsewhere.rejected["gluon_bwd_sm90"]
    for reason, changes in {
        "head_dim 124": {"head_dim": 124},
        "not fp32": {"dtype": "fp32"},
        "q is not so": {"unaligned": ("q",)},
    }.items():
        plan = backward(H100, **changes)
        assert plan.variant == "triton_bwd" and reason in plan.rejected["gluon_bwd_sm90"]
    ordered, fast = (replace(training.backward, deterministic=how) for how in (True, False))
    variant = by_name("gluon_bwd_sm90")
    assert (variant.launch_options(ordered), variant.unordered(ordered)) == ({"deterministic": True}, ())
    assert (variant.launch_options(fast), variant.unordered(fast)) == ({"deterministic": False}, ("dq",))


def test_hopper_takes_the_gluon_kernel_and_others_the_portable_one() -> None:
    problem = Problem.preset("llama3-8b")
    plan = dispatch.resolve(problem, H100)
    assert (plan.backend, plan.variant, plan.rejected) == ("gluon", "gluon_fwd_sm90", {})
    elsewhere = dispatch.resolve(problem, Target.named("a100"))
    assert elsewhere.variant == "triton_fwd" and "written for Hopper" in elsewhere.rejected["gluon_fwd_sm90"]
    reasons = {
        "head_dim 124": Problem.preset("llama3-8b", head_dim=124),
        "not fp32": Problem.preset("llama3-8b", dtype="fp32"),
        "q is not so": Problem.preset("llama3-8b", unaligned=("q",)),
    }
    for reason, refused in reasons.items():
        plan = dispatch.resolve(refused, H100)
        assert plan.variant == "triton_fwd" and reason in plan.rejected["gluon_fwd_sm90"]


def test_a_dict_of_tunables_picks_the_variant_that_has_them() -> None:
    problem = Problem.preset("llama3-8b")
    assert dispatch.resolve(problem, H100, config=SECOND).variant == "triton_fwd"
    gluon = by_name("gluon_fwd_sm90").default(problem.spec, H100).to_dict()
    assert dispatch.resolve(problem, H100, config=gluon).variant == "gluon_fwd_sm90"
    with pytest.raises(flashgen.InvalidProblemError, match=r"config for .* lacks .*BLOCK_N"):
        dispatch.resolve(problem, H100, config={"BLOCK_M": 64})


def test_what_tma_cannot_express_falls_to_the_portable_kernel() -> None:
    def unaligned(x: torch.Tensor, other: torch.Tensor) -> tuple[str, ...]:
        return Problem.from_tensors(x, other, other).unaligned

    whole = torch.randn(2, 6, 4, 64).to(torch.bfloat16)
    wide = torch.randn(2, 6, 4, 68).to(torch.bfloat16)
    assert unaligned(whole, whole) == ()
    assert unaligned(whole[:, ::2], whole[:, ::2]) == ()  # a stride of two rows
    assert unaligned(wide[..., 4:], whole) == ("q",)  # rows of 136 bytes
    assert unaligned(wide.flatten()[: 2 * 6 * 4 * 64].view(2, 6, 4, 64), whole) == ()
    assert unaligned(wide.flatten()[1 : 1 + 2 * 6 * 4 * 64].view(2, 6, 4, 64), whole) == ("q",)  # an odd address
    assert unaligned(whole[:1].expand(2, -1, -1, -1), whole) == ("q",)  # a stride of 0
    assert (
        unaligned(whole[:1].as_strided((1, 6, 4, 64), (3, 256, 64, 1)), whole[:1]) == ()
    )  # one batch: its stride is not used
    columns = whole.transpose(2, 3).contiguous().transpose(2, 3)
    assert unaligned(columns, whole) == () and Problem.from_tensors(columns, whole, whole).copies == ("q",)


def test_plans_read_well() -> None:
    text = str(dispatch.resolve(PROBLEM, H100))
    assert "triton_fwd" in text and "BLOCK_M=" in text and "from: default" in text and "h100 (sm_90)" in text


def test_a_call_without_a_database_imports_no_sqlalchemy_and_creates_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, flashgen\n"
        "plan = flashgen.dispatch.resolve(flashgen.Problem.preset('llama3-8b'), flashgen.Target.named('h100'))\n"
        "assert plan.config_source in ('seed', 'default', 'predicted'), plan\n"
        "print([m for m in ('sqlalchemy', 'alembic', 'optuna', 'triton') if m in sys.modules])\n"
    )
    folder = tmp_path / "cache"
    environment = {"FLASHGEN_CACHE_DIR": str(folder), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    code = code.replace("import sys, flashgen\n", "import sys, flashgen\nimport flashgen.dispatch\n")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not folder.exists()
