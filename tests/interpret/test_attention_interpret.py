"""The problem table through Triton's interpreter: every structural configuration once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import FAR, TABLE, Row, far_tensors, row

from flashgen import interpret
from flashgen.accuracy import Buffers, check, make_buffers
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.variants import by_name

TRITON_FWD = by_name("triton_fwd")


def launch(buffers: Buffers, blocks: tuple[int, int]) -> None:
    """Run the problem's own kernel; num_warps and num_stages change nothing in the interpreter."""
    b = buffers
    tunables: dict[str, Any] = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "num_warps": 4, "num_stages": 2}
    interpret.launch(render(b.problem.spec, TRITON_FWD), b.q, b.k, b.v, b.o, b.lse, **b.scalars, **tunables)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_problem(case: Row) -> None:
    buffers = make_buffers(case.problem, seed=1, strides=case.strides, values=case.values)
    launch(buffers, case.blocks)
    buffers.check().require(case.why)


def test_ids_are_unique() -> None:
    assert len({case.id for case in TABLE}) == len(TABLE)


def test_low_and_large_values_are_what_they_claim() -> None:
    for kind, low, high in (("low", -650.0, -500.0), ("large", 20000.0, 90000.0)):
        case = next(case for case in TABLE if case.values == kind and not case.problem.causal)
        lse = make_buffers(case.problem, seed=1, values=case.values).references()[0][1]
        assert lse is not None
        assert low < lse.min() and lse.max() < high


def test_fully_masked_rows_are_zero_and_minus_inf() -> None:
    buffers = make_buffers(row("", "bf16", 32, 75, 20, causal="bottom-right").problem, seed=3)
    launch(buffers, (16, 16))
    assert buffers.lse is not None
    assert torch.equal(buffers.o[:, :55], torch.zeros_like(buffers.o[:, :55]))
    assert torch.equal(buffers.lse[..., :55], torch.full_like(buffers.lse[..., :55], -torch.inf))
    assert torch.isfinite(buffers.lse[..., 55:]).all()


def test_repeated_runs_are_bitwise_equal() -> None:
    problem = row("", "fp16", 33, 40, 70, causal="bottom-right", heads=(4, 2), batch=2).problem
    runs = []
    for _ in range(2):
        buffers = make_buffers(problem, seed=4)
        launch(buffers, (16, 32))
        runs.append(buffers)
    assert torch.equal(runs[0].o, runs[1].o)
    assert torch.equal(runs[0].lse, runs[1].lse)  # type: ignore[arg-type]


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Batch invariance at a fixed config: the same sequence alone and beside two others, bit for bit."""
    buffers = make_buffers(row("", "bf16", 32, 35, 50, causal="bottom-right", heads=(2, 1), batch=3).problem, seed=5)
    launch(buffers, (16, 16))
    alone = torch.full_like(buffers.o[1:2].contiguous(), torch.nan)
    lse = torch.empty(1, 2, 35)
    q, k, v = (x[1:2] for x in (buffers.q, buffers.k, buffers.v))
    tunables: dict[str, Any] = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    interpret.launch(render(buffers.problem.spec, TRITON_FWD), q, k, v, alone, lse, **buffers.scalars, **tunables)
    assert torch.equal(alone, buffers.o[1:2])
    assert torch.equal(lse, buffers.lse[1:2])  # type: ignore[index]


def test_nan_in_a_seen_key_shows() -> None:
    """The poison is live: one NaN where somebody looks must reach the output."""
    buffers = make_buffers(row("", "fp16", 16, 20, 35).problem, seed=6)
    buffers.v[0, 7, 0, 3] = torch.nan
    buffers.before.clear()
    launch(buffers, (16, 16))
    assert buffers.o[..., 3].isnan().all()


@pytest.mark.parametrize(
    ("where", "dtype"), [("batch", "fp16"), ("head", "bf16"), ("row", "fp16"), ("row", "fp32"), ("block", "bf16")]
)
@pytest.mark.parametrize("tensor", ["q", "k", "v", "o"])
def test_offsets_beyond_2_to_the_31_elements(tensor: str, where: str, dtype: str) -> None:
    buffers, tensors = far_tensors(where, tensor, dtype)
    block_m, block_n = FAR[where][-1]
    tunables: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}
    source = render(buffers.problem.spec, TRITON_FWD)
    interpret.launch(source, *tensors.values(), buffers.lse, **buffers.scalars, **tunables)
    check(tensors["o"], buffers.lse, *buffers.references(), buffers.problem.dtype).require(f"{tensor} by {where}")


def test_the_mini_transformer_shape() -> None:
    """A real encoder's shape (MiniLM: 12 heads of 32) end to end through one launch."""
    problem = Problem(
        dtype="fp32",
        batch=1,
        seqlen_q=32,
        seqlen_k=32,
        num_heads_q=12,
        num_heads_kv=12,
        head_dim=32,
        head_dim_v=32,
        layout="bhsd",
    )
    buffers = make_buffers(problem, seed=8, strides="dense")
    launch(buffers, (32, 32))
    buffers.check().require()
