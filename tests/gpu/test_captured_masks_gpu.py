"""Masks that read tensors, on a GPU: what they read may change by any means, and no result follows what they read before."""

from __future__ import annotations

import gc
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import block_ranges, dispatch, graph_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZE = 1024


def draw(seed: int) -> Tensor:
    return torch.randn(2, SIZE, 4, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def documents(length: int) -> Tensor:
    return (torch.arange(SIZE, device="cuda") // length).to(torch.int32)


def masked(ids: Tensor) -> Any:
    return lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)


def both(ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the torch backend."""
    q, k, v = (draw(seed) for seed in range(3))
    outs = [flashgen.attention(q, k, v, mask_mod=masked(ids), backend=name) for name in ("auto", "torch")]  # type: ignore[arg-type]
    return outs[0], outs[1]  # type: ignore[return-value]


def agree(ids: Tensor) -> None:
    kernel, expected = both(ids)
    torch.testing.assert_close(kernel.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_no_call_after_the_first_synchronises() -> None:
    dispatch.forget()
    q, ids = draw(0), documents(100)
    flashgen.attention(q, q, q, mask_mod=masked(ids))
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode calls itself a prototype
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            flashgen.attention(q, q, q, mask_mod=masked(ids))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["counted", "data", "graph"])
def test_what_is_read_may_change_by_any_means(how: str) -> None:
    ids, other = documents(100), documents(37)
    agree(ids)
    agree(ids)
    if how == "counted":
        ids.copy_(other)
    elif how == "data":
        ids.data.copy_(other)
    else:  # a replay writes without anybody counting
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ids.copy_(other)
        version = ids._version
        ids_before = documents(100)
        ids.copy_(ids_before)
        agree(ids)
        graph.replay()
        assert ids._version == version + 1
    agree(ids)
    agree(ids)


@pytest.mark.parametrize("known", [False, True], ids=["met under capture", "met before"])
def test_a_captured_call_follows_what_its_mask_reads(known: bool) -> None:
    q, k, v = (draw(seed) for seed in range(3))
    ids = documents(100)
    flashgen.attention(q, k, v, mask_mod=masked(ids))  # compiles
    if not known:
        block_ranges.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, k, v, mask_mod=masked(ids))
    block_ranges.forget()  # what the graph reads is held, whoever forgets it
    spoil = [torch.full((1 << 20,), 7, dtype=torch.int32, device="cuda") for _ in range(8)]
    for length in (100, 37, 100, 512):
        ids.copy_(documents(length))
        graph.replay()
        expected = flashgen.attention(q, k, v, mask_mod=masked(ids), backend="torch")
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)  # type: ignore[union-attr]
    del spoil


def test_whole_blocks_are_left_out() -> None:
    """Of 64 documents a call takes a fraction of the time that it takes where every block is masked: at least half is saved."""
    q = torch.randn(1, 16384, 8, 64, device="cuda", dtype=torch.bfloat16)
    ids = (torch.arange(16384, device="cuda") // 256).to(torch.int32)

    def milliseconds() -> float:
        times = []
        for _ in range(7):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            flashgen.attention(q, q, q, mask_mod=masked(ids))
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        return min(times)

    flashgen.attention(q, q, q, mask_mod=masked(ids))
    with_ranges = milliseconds()
    ids.data[0] = 12345  # nobody counts this: the comparison fails, and every block is masked
    without = milliseconds()
    assert with_ranges < without / 2


def test_other_streams_find_what_one_stream_made() -> None:
    """Remembered ranges are complete before anybody else may take them, also where the first stream has much to do."""
    q, k, v = (draw(seed) for seed in range(3))
    busy = torch.randn(4096, 4096, device="cuda")
    for length in (90, 41, 13):
        block_ranges.forget()
        ids, streams = documents(length), [torch.cuda.Stream() for _ in range(3)]
        expected = flashgen.attention(q, k, v, mask_mod=masked(ids), backend="torch")
        torch.cuda.synchronize()
        outs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                for _ in range(5):
                    busy = busy @ busy * 1e-4
                outs.append(flashgen.attention(q, k, v, mask_mod=masked(ids)))
        torch.cuda.synchronize()
        for out in outs:
            torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)  # type: ignore[union-attr]


def captured(q: Tensor, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one masked call, after a warm one, and what it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            flashgen.attention(q, q, q, mask_mod=masked(ids))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, q, q, mask_mod=masked(ids))
    assert isinstance(out, Tensor)
    return graph, out


def test_what_graphs_read_is_held_as_long_as_they_live() -> None:
    """Ten graphs, one after another, of ten contents: what the dead ones read is let go, what the living one reads is not."""
    held = graph_memory._held
    gc.collect()
    torch.cuda.synchronize()
    time.sleep(0.5)  # the driver's thread
    graph_memory.sweep()  # what earlier graphs read
    before, q, sizes = len(held), draw(0), list[int]()
    graph = None
    for length in range(50, 60):
        ids = documents(length)
        graph, out = captured(q, ids)
        assert all(one.semaphore for one in held.values()), "the driver took a user object"
        sizes.append(len(held) - before)
        block_ranges.forget()
        torch.empty(1 << 22, device="cuda").fill_(-1)  # what was given back is written over
        graph.replay()
        want = flashgen.attention(q, q, q, mask_mod=masked(ids), backend="torch")
        torch.testing.assert_close(out.float(), want.float(), atol=2e-2, rtol=2e-2)  # type: ignore[union-attr]
    # This graph's, the last one's, which lived when it was captured, and one that the driver may not have told of yet.
    assert sizes[0] == 1 and max(sizes) <= 3, sizes
    del graph
    gc.collect()
    torch.cuda.synchronize()
    time.sleep(0.5)
    graph_memory.sweep()
    assert len(held) <= before
