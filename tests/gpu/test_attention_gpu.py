"""The problem table on a CUDA device: the kernels that Triton compiles, poison and budget as in the interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from last_bit import is_extreme, require_last_bit
from problems import FAR, TABLE, Row, far_tensors, row

from flashgen.accuracy import Buffers, check, check_launch, make_buffers
from flashgen.build import build
from flashgen.config import KernelConfig
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

pytestmark = pytest.mark.gpu
TRITON_FWD = by_name("triton_fwd")


def launch(buffers: Buffers, config: KernelConfig) -> None:
    b = buffers
    build(render(b.problem.spec, TRITON_FWD)).launch(b.q, b.k, b.v, b.o, b.lse, **b.scalars, **config)
    torch.cuda.synchronize()


def tile_of(case: Row) -> KernelConfig:
    """The row's own tile where it is legal on this GPU, else the default."""
    spec, target = case.problem.spec, Target.detect()
    config = TRITON_FWD.config(BLOCK_M=case.blocks[0], BLOCK_N=case.blocks[1], num_warps=4, num_stages=2)
    return TRITON_FWD.default(spec, target) if TRITON_FWD.illegal(spec, target, config) else config


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
def test_problem(case: Row) -> None:
    buffers = make_buffers(case.problem, seed=1, device="cuda", strides=case.strides, values=case.values)
    launch(buffers, tile_of(case))
    if is_extreme(case.problem.dtype, case.values):
        require_last_bit(buffers)
    else:
        buffers.check().require(case.why)


DEFAULTS = sorted({case.problem.spec.key for case in TABLE})


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_default_configuration(key: str) -> None:
    spec = AttentionSpec.from_key(key)
    config = TRITON_FWD.default(spec, Target.detect())
    kernel = build(render(spec, TRITON_FWD))
    check_launch(partial(kernel.launch, **config), spec, device="cuda").require(config.label)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("causal", [None, "bottom-right"])
def test_every_known_good_tile_at_2048(dtype: str, causal: Any) -> None:
    case = row("long enough for a pipeline to fill", dtype, 128, 2048, 2048, causal=causal, heads=(4, 2))
    for known in TRITON_FWD.known_good(case.problem.spec, Target.detect()):
        buffers = make_buffers(case.problem, seed=2, device="cuda", strides="dense")
        launch(buffers, known.config)
        buffers.check().require(known.config.label)


def test_repeated_runs_are_bitwise_equal() -> None:
    case = row("", "bf16", 64, 333, 777, causal="bottom-right", heads=(4, 2), batch=2)
    runs = []
    for _ in range(5):
        buffers = make_buffers(case.problem, seed=3, device="cuda")
        launch(buffers, TRITON_FWD.default(case.problem.spec, Target.detect()))
        runs.append(buffers)
    assert all(torch.equal(run.o, runs[0].o) and torch.equal(run.lse, runs[0].lse) for run in runs)  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", ["q", "k", "v", "o"])
@pytest.mark.parametrize("where", FAR)
def test_offsets_beyond_2_to_the_31_elements(tensor: str, where: str) -> None:
    """One tensor of 4 to 6 GiB, of which a few rows are touched."""
    buffers, tensors = far_tensors(where, tensor, "fp16", "cuda")
    config = TRITON_FWD.config(BLOCK_M=FAR[where][-1][0], BLOCK_N=FAR[where][-1][1], num_warps=4, num_stages=2)
    source = render(buffers.problem.spec, TRITON_FWD)
    build(source).launch(*tensors.values(), buffers.lse, **buffers.scalars, **config)
    check(tensors["o"], buffers.lse, *buffers.references(), "fp16").require(f"{tensor} by {where}")


def test_a_captured_graph_replays_bit_for_bit() -> None:
    case = row("", "bf16", 64, 100, 300, causal="bottom-right", heads=(4, 2))
    buffers = make_buffers(case.problem, seed=5, device="cuda", strides="dense")
    config = TRITON_FWD.default(case.problem.spec, Target.detect())
    launch(buffers, config)  # warm: compiles
    eager = buffers.o.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        build(render(case.problem.spec, TRITON_FWD)).launch(
            buffers.q, buffers.k, buffers.v, buffers.o, buffers.lse, **buffers.scalars, **config
        )
    buffers.o.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(buffers.o, eager)
