"""Kernels with options are tuned: judged with their options drawn, in another process, on the tuned problem too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgen import KernelConfig, Problem, Target, UnsupportedProblemError
from flashgen.coverage import untuned
from flashgen.render import KernelSource
from flashgen.store import open_store
from flashgen.tuner import tune
from flashgen.tuner.context import choose_variant, launch_strides
from flashgen.tuner.experience import Case, weight
from flashgen.tuner.portfolio import derive

CPU = Target.named("cpu")
BASE = Problem(
    dtype="fp32", batch=1, seqlen_q=1700, seqlen_k=1700, num_heads_q=2, num_heads_kv=1, head_dim=16, head_dim_v=16, causal=True
)  # fmt: skip
IDS = torch.arange(2000) // 300
TILES = [
    KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=block_n, num_warps=4, num_stages=2)
    for block_n in (16, 32, 64)
]

# The launch of a rendered kernel, by the torch backend; with 32 keys it forgets an option, with 64 only far from the start, and only where
# the problem is long.
_TEXT = """
from dataclasses import replace

from flashgen import torch_blocked


def launch(q, k, v, o, lse, *, sm_scale, causal_offset, BLOCK_M, BLOCK_N, num_warps, num_stages, **values):
    options = torch_blocked.Options(
        sm_scale=sm_scale, causal=True, offset=causal_offset, window=(values.get("window_left", -1), values.get("window_right", -1)),
        softcap=values.get("softcap", 0.0), alibi=values.get("alibi_slopes"), alibi_shift=k.shape[1] - q.shape[1],
        sinks=values.get("sinks"), bias=values.get("bias"), attn_mask=values.get("attn_mask"),
        dropout_p=values.get("dropout_p", 0.0), philox=values.get("philox"),
    )
    if "captured_ids" in values:
        ids, ranges = values["captured_ids"], values["mask_ranges"]
        assert ranges is None or ranges.shape[2] == -(-q.shape[1] // BLOCK_M)
        options = replace(options, mask_mod=lambda b, h, i, j: ids[i] == ids[j])
    whole = options
    if BLOCK_N == 32:
        options = replace(options, {forgotten})
    torch_blocked.forward(q, k, v, options, o, lse)
    if BLOCK_N == 64 and q.shape[1] > 1600:
        far = o.clone()
        torch_blocked.forward(q, k, v, replace(whole, {forgotten}), far, None)
        o[:, 1650:] = far[:, 1650:]
    if BLOCK_N == {writes}:
        values["bias"].add_(1.0)
"""


def use(monkeypatch: pytest.MonkeyPatch, problem: Problem, forgotten: str, writes: int = 0) -> None:
    text = _TEXT.format(forgotten=forgotten, writes=writes)
    kernel = KernelSource(text=text, spec=problem.spec, variant="triton_fwd")
    monkeypatch.setattr("flashgen.tuner.run.source_of", lambda variant, problem: kernel)
    monkeypatch.setattr("flashgen.tuner.run.legal_list", lambda variant, problem, target: (list(TILES), ()))
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())
    # There is one finalist, and nothing here is about its time.
    monkeypatch.setattr("flashgen.tuner.shootout.MOST_ROUNDS", 30)


def tuned(problem: Problem, tmp_path: Path) -> dict[int, Any]:
    result = tune(
        problem, target=CPU, mode="measured", provider="cpu", database=f"sqlite:///{tmp_path / 'db.sqlite3'}", progress=False,
        trial_timeout_s=400.0,
    )  # fmt: skip
    (row,) = result.problems
    assert row.winner is not None and row.winner.config["BLOCK_N"] == 16 and row.spec_key == problem.spec.key
    return {trial.config["BLOCK_N"]: trial for trial in row.trials if trial.rank is None}


@pytest.mark.sampled(every=3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "forgotten"),
    [
        (replace(BASE, has_bias=True, window_size=(600, 0)), "bias=None"),
        (BASE.modified(mask_mod=lambda b, h, i, j: IDS[i] == IDS[j]), "mask_mod=None"),
        (replace(BASE, has_sinks=True, softcap=3.0, has_alibi=True), "alibi=None"),
    ],
    ids=["bias and window", "mask_mod", "softcap, sinks and alibi"],
)
def test_a_kernel_that_forgets_an_option_is_a_wrong_result(
    problem: Problem, forgotten: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, problem, forgotten)
    by_tile = tuned(problem, tmp_path)
    assert by_tile[16].status == "ok", by_tile[16].message
    assert by_tile[32].status == "wrong_result"
    # Right on the problem that is cut short: found by its rows on the tuned one.
    assert by_tile[64].status == "wrong_result" and "on the tuned problem" in by_tile[64].message
    with open_store(f"sqlite:///{tmp_path / 'db.sqlite3'}") as store:
        assert {row.spec_key for row in store.trials(op="attention_fwd")} == {problem.spec.key}


@pytest.mark.slow
def test_an_operand_that_is_written_to_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = replace(BASE, seqlen_q=200, seqlen_k=200, has_bias=True)
    use(monkeypatch, problem, "bias=None", writes=64)
    by_tile = tuned(problem, tmp_path)
    assert by_tile[64].status == "wrong_result"


def test_what_can_be_tuned_and_what_not() -> None:
    h100 = Target.named("h100")
    for problem in (
        replace(BASE, has_bias=True),
        replace(BASE, softcap=3.0),
        BASE.modified(mask_mod=lambda b, h, i, j: IDS[i] > j),
    ):
        assert choose_variant(problem, h100).name == "triton_fwd" or choose_variant(problem, h100).backend == "gluon"
    with pytest.raises(UnsupportedProblemError, match=r"Problem\.modified"):
        choose_variant(replace(BASE, has_mask_mod=True), h100)
    with pytest.raises(UnsupportedProblemError, match="packed sequences"):
        choose_variant(replace(BASE, varlen=True), h100)
    assert untuned(replace(BASE, has_bias=True).spec) is None
    assert "flashgen.tune" in (untuned(replace(BASE, has_mask_mod=True).spec) or "")
    assert "varlen" in (untuned(replace(BASE, varlen=True).spec) or "")


def test_strides_are_those_of_the_drawn_operands() -> None:
    problem = replace(BASE, seqlen_q=48, seqlen_k=80, has_bias=True).modified(
        score_mod=lambda s, b, h, i, j: s + TABLE[h, j]
    )
    strides = launch_strides(problem)
    assert (strides["stride_bias_b"], strides["stride_bias_m"], strides["stride_bias_n"]) == (0, 80, 1)
    assert (strides["table_stride0"], strides["table_stride1"]) == (100, 1)


TABLE = torch.randn(4, 100)


def test_lessons_of_other_options_count_less_and_make_no_portfolio() -> None:
    from store_support import make

    plain, biased = (Case(spec=problem.spec, shape=problem.shape) for problem in (BASE, replace(BASE, has_bias=True)))
    assert weight(plain, plain) == 1.0 > weight(plain, biased)
    rows = [
        make(spec_key="attention_fwd-bf16-d128-causal-bias"),
        make(spec_key="attention_fwd-bf16-d128-mask_mod-mods_0123456789abcdef"),
    ]
    assert derive(rows) == [] and derive([make()])
