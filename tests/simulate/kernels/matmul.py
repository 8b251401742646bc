"""A product c = a @ b by one producer and one consumer partition, over a ring of stages."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def producer(a_desc, b_desc, a_smem, b_smem, full, empty, steps, STAGES: gl.constexpr, BLOCK_K: gl.constexpr):
    row = gl.program_id(0) * a_desc.block_type.shape[0]
    for k in range(steps):
        stage = k % STAGES
        phase = (k // STAGES) & 1
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_load(a_desc, [row, k * BLOCK_K], full.index(stage), a_smem.index(stage))
        tma.async_load(b_desc, [k * BLOCK_K, 0], full.index(stage), b_smem.index(stage))


@gluon.jit
def consumer(c_desc, a_smem, b_smem, c_smem, full, empty, steps, STAGES: gl.constexpr, acc_layout: gl.constexpr):
    block_m: gl.constexpr = c_desc.block_type.shape[0]
    block_n: gl.constexpr = c_desc.block_type.shape[1]
    acc = gl.zeros([block_m, block_n], gl.float32, acc_layout)
    for k in range(steps):
        stage = k % STAGES
        phase = (k // STAGES) & 1
        mbarrier.wait(full.index(stage), phase)
        token = warpgroup_mma(a_smem.index(stage), b_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(empty.index(stage), count=1)
    c_smem.store(acc.to(c_desc.dtype))
    fence_async_shared()
    tma.async_store(c_desc, [gl.program_id(0) * block_m, 0], c_smem)
    tma.store_wait(0)


@gluon.jit
def matmul(a_desc, b_desc, c_desc, note_ptr, steps, STAGES: gl.constexpr, BLOCK_K: gl.constexpr):
    block_m: gl.constexpr = c_desc.block_type.shape[0]
    block_n: gl.constexpr = c_desc.block_type.shape[1]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, block_n, 16]
    )
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES, block_m, BLOCK_K], a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_K, block_n], b_desc.layout)
    c_smem = gl.allocate_shared_memory(c_desc.dtype, [block_m, block_n], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (consumer, (c_desc, a_smem, b_smem, c_smem, full, empty, steps, STAGES, acc_layout)),
            (producer, (a_desc, b_desc, a_smem, b_smem, full, empty, steps, STAGES, BLOCK_K)),
        ],
        [1],
        [24],
    )


def descriptor(tensor, block):
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[tensor.dtype]
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def launch(a, b, c, note, STAGES=2, BLOCK_K=32):
    m, n, steps = a.shape[0], b.shape[1], (a.shape[1] + BLOCK_K - 1) // BLOCK_K
    a_desc, b_desc = descriptor(a, [64, BLOCK_K]), descriptor(b, [BLOCK_K, n])
    matmul[((m + 63) // 64,)](a_desc, b_desc, descriptor(c, [64, n]), note, steps, STAGES, BLOCK_K, num_warps=4)
