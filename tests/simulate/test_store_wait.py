"""A wait for TMA stores leaves the latest ones pending, in the order in which they were issued, whichever were faster."""

from __future__ import annotations

import pytest
import torch
from subjects import SCHEDULES

from flashgen import simulator as sim

# Two buffers in turn; the one that is written next is free once at most one store is pending.
TEXT = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def fill(y_desc, rows):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    out = gl.allocate_shared_memory(y_desc.dtype, [2, 32, 16], y_desc.layout)
    for i in range(rows):
        tma.store_wait(1)
        gl.barrier()
        out.index(i % 2).store(gl.full([32, 16], 1.0, gl.float32, layout) * (i + 1))
        fence_async_shared()
        tma.async_store(y_desc, [i * 32, 0], out.index(i % 2))
    tma.store_wait(0)


def launch(y):
    layout = gl.NVMMASharedLayout.get_default_for([32, 16], gl.float32)
    fill[(1,)](TensorDescriptor.from_tensor(y, [32, 16], layout), y.shape[0] // 32, num_warps=4)
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_an_older_store_is_waited_for_where_a_later_one_was_faster(schedule: str, seed: int) -> None:
    y = torch.full((40 * 32, 16), torch.nan)
    sim.simulate(TEXT, {"y": y}, schedule=schedule, seed=seed)
    assert torch.equal(y, torch.arange(1.0, 41.0).repeat_interleave(32)[:, None].expand(-1, 16))
