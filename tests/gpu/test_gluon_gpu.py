"""The Hopper forward on a Hopper GPU: the problem table, sizes of its own tiles, streams and graphs, offsets beyond 2^31."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from last_bit import is_extreme, require_last_bit
from problems import BR, FAR, TABLE, TL, Row, far_tensors, row

from flashgen.accuracy import Buffers, check, make_buffers
from flashgen.build import build
from flashgen.checks import tma_addressable
from flashgen.config import KernelConfig
from flashgen.render import render
from flashgen.target import Target
from flashgen.variants import by_name

GLUON, H100 = by_name("gluon_fwd_sm90"), Target.named("h100")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
COVERED = [case for case in TABLE if GLUON.supports(case.problem.spec, H100) is None]


def launch(buffers: Buffers, config: KernelConfig) -> None:
    b = buffers
    build(render(b.problem.spec, GLUON)).launch(b.q, b.k, b.v, b.o, b.lse, **b.scalars, **config)


def run(case: Row, config: KernelConfig) -> Buffers:
    buffers = make_buffers(case.problem, seed=1, device="cuda", strides=case.strides, values=case.values)
    if not all(tma_addressable(x) for x in (buffers.q, buffers.k, buffers.v, buffers.o)):
        pytest.skip("TMA cannot express these strides: dispatch takes the portable kernel")
    launch(buffers, config)
    torch.cuda.synchronize()
    return buffers


@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.id)
def test_problem(case: Row) -> None:
    buffers = run(case, GLUON.default(case.problem.spec, H100))
    if is_extreme(case.problem.dtype, case.values):
        require_last_bit(buffers)
    else:
        buffers.check().require(case.why)


LONG = [
    row("", dtype, d, 1000, 1337, dv=dv, causal=causal, heads=(6, 2), batch=2, layout=layout, strides="dense")
    for dtype, d, dv in (
        ("bf16", 64, 64),
        ("fp16", 128, 128),
        ("bf16", 256, 256),
        ("bf16", 192, 128),
        ("fp16", 64, 256),
    )
    for causal, layout in ((None, "bshd"), (BR, "bhsd"), (TL, "bshd"))
]


# Each a test of its own: compiling all of a case's in one takes longer than a worker may.
PORTFOLIO = [
    pytest.param(case, known.config, id=f"{case.id}-{number}")
    for case in LONG
    for number, known in enumerate(GLUON.known_good(case.problem.spec, H100))
]


@pytest.mark.parametrize(("case", "config"), PORTFOLIO)
def test_every_configuration_of_the_portfolio(case: Row, config: KernelConfig) -> None:
    run(case, config).check().require(config.label)


@pytest.mark.parametrize("queries, heads", [(1, (16, 2)), (5, (8, 1)), (64, (4, 2)), (2, (64, 1)), (30, (12, 1))])
def test_heads_that_share_a_tile(queries: int, heads: tuple[int, int]) -> None:
    case = row("", "bf16", 128, queries, 2000, causal=BR, heads=heads)
    run(case, GLUON.default(case.problem.spec, H100)).check().require(case.id)


def dense(case: Row) -> tuple[Any, KernelConfig]:
    return make_buffers(case.problem, seed=5, device="cuda", strides="dense"), GLUON.default(case.problem.spec, H100)


def test_launches_of_several_streams_do_not_share_tickets() -> None:
    case = row("", "bf16", 128, 2048, 2048, causal=BR, heads=(16, 4), batch=2)
    buffers, config = dense(case)
    launch(buffers, config)
    torch.cuda.synchronize()
    want = buffers.o.clone()
    kernel, streams, outs = build(render(case.problem.spec, GLUON)), [torch.cuda.Stream() for _ in range(3)], []
    for turn in range(30):
        with torch.cuda.stream(streams[turn % 3]):
            out = torch.full_like(buffers.o, torch.nan)
            lse = torch.empty_like(buffers.lse)
            kernel.launch(buffers.q, buffers.k, buffers.v, out, lse, **buffers.scalars, **config)
            outs.append(out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_a_captured_graph_replays_beside_eager_launches() -> None:
    case = row("", "bf16", 64, 1000, 1300, causal=BR, heads=(4, 2))
    buffers, config = dense(case)
    launch(buffers, config)  # warm: compiles
    torch.cuda.synchronize()
    eager = buffers.o.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(buffers, config)
    for _ in range(5):
        buffers.o.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffers.o, eager)
        launch(buffers, config)
        torch.cuda.synchronize()
        assert torch.equal(buffers.o, eager)


@pytest.mark.parametrize("tensor", ["q", "k", "v", "o"])
@pytest.mark.parametrize("where", FAR)
def test_offsets_beyond_2_to_the_31_elements(tensor: str, where: str) -> None:
    """One tensor of 4 to 6 GiB, of which a few rows are touched."""
    buffers, tensors = far_tensors(where, tensor, "fp16", "cuda")
    spec = buffers.problem.spec
    build(render(spec, GLUON)).launch(*tensors.values(), buffers.lse, **buffers.scalars, **GLUON.default(spec, H100))
    check(tensors["o"], buffers.lse, *buffers.references(), "fp16").require(f"{tensor} by {where}")
