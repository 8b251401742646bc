"""Tuning a backward: a kernel file on CPU tensors that computes gradients, misbehaves where a test says so, and needs no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernel import CPU
from cpu_kernel import PROBLEM as FORWARD
from cpu_kernel import source as forward_source

import flashgen
from flashgen import KernelConfig, Problem
from flashgen.cli.main import run
from flashgen.reference import Call, exact, gradients_low_precision, gradients_oracle
from flashgen.render import KernelSource
from flashgen.store import open_store
from flashgen.tuner import tune
from flashgen.tuner.case import Case, prepare
from flashgen.tuner.final import run_final
from flashgen.tuner.providers import CpuProvider
from flashgen.tuner.run import with_gradients
from flashgen.tuner.trial import Contestant, WrongResultError, run_trial
from flashgen.variants.triton_bwd import TritonBackward

PROBLEM = replace(FORWARD, num_heads_q=4, num_heads_kv=2, batch=2).backward
KNOBS = {"BLOCK_M_DQ": 64, "BLOCK_N_DQ": 32, "num_warps": 4, "num_stages": 1}
TILES = [KernelConfig(variant="triton_bwd", BLOCK_M=32, BLOCK_N=block_n, **KNOBS) for block_n in (64, 128)]

# `FAULTS` maps BLOCK_N to what goes wrong, on the tuned problem alone.
_TEXT = """
import torch

from flashgen.reference import gradients_low_precision

FAULTS = {faults!r}
counts = {{}}


def launch(dout, dlse, q, k, v, out, lse, dq, dk, dv, *, sm_scale, causal_offset, BLOCK_M, BLOCK_N, BLOCK_M_DQ, BLOCK_N_DQ, num_warps, num_stages):
    tuned = q.shape[1] == 70 and k.shape[1] == 70
    counts[BLOCK_N] = counts.get(BLOCK_N, 0) + tuned
    fault = FAULTS.get(BLOCK_N) if tuned else None
    fp32 = [x.float() for x in (dout, q, k, v, out)]
    if dlse is not None:
        # -dlse joins delta: as if the output were larger by it in one more column.
        fp32[0], fp32[4] = torch.cat([fp32[0], fp32[0].new_ones(*dout.shape[:3], 1)], 3), torch.cat(
            [fp32[4], -dlse.masked_fill(lse == -torch.inf, 0.0).transpose(1, 2).unsqueeze(3)], 3
        )
        fp32[3] = torch.cat([fp32[3], fp32[3].new_zeros(*v.shape[:3], 1)], 3)
    causal = {causal!r}
    found = gradients_low_precision(*fp32, lse, causal=causal, causal_offset=causal_offset, sm_scale=sm_scale)
    for into, gradient in zip((dq, dk, dv), found):
        into.copy_(gradient[..., : into.shape[3]])
    if fault == "nan":
        dv[0, -1] = float("nan")
    elif fault == "guard":
        torch.as_strided(dk, (1,), (1,), dk.storage_offset() + dk.numel()).fill_(1.0)
    elif fault == "input":
        lse[0, 0, 0] = 7.0
    elif fault == "wrong":
        dk[0, :, 0] *= 1.01
    elif fault == "last":
        dv[-1, :, -1] *= 1.01
    elif fault == "group":
        dk.mul_(0.5)
    elif fault == "jitter":
        dq.mul_(1.0 + 1e-7 * (counts[BLOCK_N] % 5))
"""
FAULTS = {
    "nan": "holds NaN",
    "guard": "bytes beside dk were written to",
    "input": "lse is an input and was written to",
    "wrong": "on the tuned problem: dk: ",
    "last": "on the tuned problem: dv: ",
    "group": "on the tuned problem: dk: ",
    "jitter": "left another output than the first",
}


def source(faults: dict[int, str] | None = None) -> KernelSource:
    text = _TEXT.format(faults=faults or {}, causal=PROBLEM.causal)
    return KernelSource(text=text, spec=PROBLEM.spec, variant="triton_bwd")


def case_of(faults: dict[int, str] | None = None) -> Case:
    problem = {name: getattr(PROBLEM, name) for name in PROBLEM.__slots__}
    request = {
        "spec": PROBLEM.spec.key, "variant": "triton_bwd", "text": source(faults).text, "problem": problem, "key": "k"
    }  # fmt: skip
    return prepare(request, CpuProvider())


# -- the yardstick --


@pytest.mark.parametrize("offset", [None, 0, 30])
def test_blocked_gradients_are_those_of_every_options_reference(
    offset: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, top-left and bottom-right; blocks of a few rows; the group of heads is summed."""
    monkeypatch.setattr("flashgen.reference.plain._MAX_SCORES", 400)
    generator = torch.Generator().manual_seed(0)
    seqlen_q, seqlen_k = 20, 50 if offset else 15
    q, dout = (torch.randn(2, seqlen_q, 4, dim, generator=generator).bfloat16() for dim in (8, 6))
    k, v = (torch.randn(2, seqlen_k, 2, dim, generator=generator).bfloat16() for dim in (8, 6))
    call = Call(q=q, k=k, v=v, sm_scale=0.3, causal=offset is not None, top_left=offset == 0, dout=dout)
    want = exact(call)
    options: dict[str, Any] = {"causal": offset is not None, "causal_offset": offset or 0, "sm_scale": 0.3}
    found = gradients_oracle(dout, q, k, v, **options)
    low = gradients_low_precision(dout, q, k, v, want.out.bfloat16(), want.lse.float(), **options)
    for name, oracle, honest in zip("qkv", found, low, strict=True):
        torch.testing.assert_close(oracle, want.gradients[name], rtol=1e-12, atol=1e-12)
        assert honest.dtype == torch.bfloat16
        error = (honest.double() - want.gradients[name]).abs().max()
        assert 0 < error < 0.03 * want.gradients[name].abs().max()


# -- one candidate --


def test_a_good_backward_is_timed_and_its_gradients_are_looked_at() -> None:
    case = case_of()
    assert list(case.inputs) == ["dout", "dlse", "q", "k", "v", "out", "lse"] and list(case.outputs) == [
        "dq",
        "dk",
        "dv",
    ]
    reply = run_trial(case, {"config": TILES[0].to_dict(), "best_ms": None})
    assert reply["status"] == "ok" and 0.0 < reply["error_ratio"] <= 1.0 and reply["latency_ms"] > 0
    assert len(case.reference) == 2  # the first group of heads and the last
    verdict = run_final(case, {"configs": [tile.to_dict() for tile in TILES], "most": 8})
    assert verdict["status"] == "ok" and len(verdict["samples"]) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_backward_is_a_wrong_result(fault: str) -> None:
    contestant = Contestant(case_of({64: fault}), TILES[0].to_dict())
    with pytest.raises(WrongResultError, match=FAULTS[fault]):
        contestant.first()
        for _ in range(3):
            contestant.once()
        contestant.check()


def test_sums_in_no_fixed_order_are_judged_by_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackward, "unordered", lambda self, problem: () if problem.deterministic else ("dq",))
    for deterministic in (False, True):
        case = case_of({64: "jitter"})
        case.problem = replace(case.problem, deterministic=deterministic)
        contestant = Contestant(case, TILES[0].to_dict())
        contestant.first()
        contestant.once()
        contestant.once()
        if deterministic:
            with pytest.raises(WrongResultError, match="another output"):
                contestant.check()
        else:
            assert contestant.check().ok


def test_small_problems_of_a_candidate_are_judged_by_their_gradients() -> None:
    case = case_of()
    launch = case.launch

    def forgets_delta(*tensors: Any, **options: Any) -> None:
        dout, dlse, q, k, v, out, *rest = tensors
        launch(dout, dlse, q, k, v, torch.zeros_like(out), *rest, **options)

    case.launch = forgets_delta
    reply = run_trial(case, {"config": TILES[0].to_dict(), "best_ms": None})
    assert reply["status"] == "wrong_result" and "dq: " in reply["message"] + "dk: "


# -- a whole run --


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operations run files on CPU tensors, the backward's first tile a wrong one."""
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    flashgen.dispatch.forget()
    kernels = {"attention_fwd": replace_spec(forward_source()), "attention_bwd": source({64: "wrong"})}
    monkeypatch.setattr("flashgen.tuner.run.source_of", lambda variant, problem: kernels[problem.op])
    forward = [KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=2)]
    tiles = {"attention_fwd": forward, "attention_bwd": TILES}
    monkeypatch.setattr("flashgen.tuner.run.legal_list", lambda variant, problem, target: (list(tiles[problem.op]), ()))
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())


def replace_spec(kernel: KernelSource) -> KernelSource:
    return KernelSource(text=kernel.text, spec=replace(kernel.spec, has_lse=True), variant=kernel.variant)


def test_a_problem_with_gradients_is_a_pair() -> None:
    training = replace(FORWARD, requires_grad=True)
    forward, backward = with_gradients([training, training])
    assert forward == replace(FORWARD, return_lse=True) and forward.spec == training.spec
    assert backward == training.backward and backward.spec.key == "attention_bwd-fp32-d16-causal"
    assert with_gradients([forward, backward]) == [forward, backward]
    assert with_gradients([FORWARD]) == [FORWARD]


@pytest.mark.slow
@pytest.mark.usefixtures("files")
def test_forward_and_backward_are_tuned_as_a_pair_and_alone() -> None:
    training = replace(FORWARD, batch=2, num_heads_q=4, num_heads_kv=2, requires_grad=True)
    options: dict[str, Any] = {
        "target": CPU,
        "mode": "measured",
        "provider": "cpu",
        "progress": False,
        "strategy": "exhaustive",
    }
    pair = tune(training, **options)
    assert [row.problem.op for row in pair.problems] == ["attention_fwd", "attention_bwd"]
    alone = tune(training.backward, **options)
    for result in (*pair.problems[1:], *alone.problems):
        assert result.winner is not None and result.winner.config == TILES[1].to_dict() and result.winner.latency_ms
    with open_store() as store:
        rows = {op: store.trials(op=op) for op in ("attention_fwd", "attention_bwd")}
    assert {row.spec_key for row in rows["attention_fwd"]} == {"attention_fwd-fp32-d16-causal-lse"}
    assert {(row.spec_key, row.variant) for row in rows["attention_bwd"]} == {
        ("attention_bwd-fp32-d16-causal", "triton_bwd")
    }
    # The wrong one was kept with its reason, and not tried again.
    bad = [row for row in rows["attention_bwd"] if row.config == TILES[0].to_dict()]
    assert [row.status for row in bad] == ["wrong_result"] and "dk: " in (bad[0].message or "")


# -- the command line --


def test_train_plans_both_and_refuses_the_backward_alone(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tune", "--preset", "llama3-8b", "--target", "h100", "--plan", "--json", "--train"]
    assert run(given) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["spec"] for row in shown["problems"]] == [
        "attention_fwd-bf16-d128-causal-lse",
        "attention_bwd-bf16-d128-causal",
    ]
    assert run([*given, "--op", "attention_bwd"]) == 2
    assert "--train tunes a forward with its backward" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.slow
def test_a_backward_is_predicted_for_a_gpu_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, judged in the interpreter, stored as its own operation; a training call then runs it."""
    problem = Problem(
        dtype="bf16", batch=1, seqlen_q=256, seqlen_k=256, num_heads_q=2, num_heads_kv=1, head_dim=64, head_dim_v=64
    )  # fmt: skip
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    flashgen.dispatch.forget()
    target = flashgen.Target.named("a100")
    (row,) = tune(problem.backward, target=target, mode="predicted", progress=False, workers=1, max_trials=1).problems
    assert row.winner is not None and (row.winner.op, row.winner.status) == ("attention_bwd", "predicted")
    plan = flashgen.dispatch.resolve(replace(problem, requires_grad=True, device="cuda:0"), target)
    assert plan.backward is not None and plan.backward.config_source == "predicted"
    assert plan.backward.config.to_dict() == row.winner.config
