"""y = 2x by one partition: TMA loads run a stage ahead, results are staged in shared memory and stored by TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def start(x_desc, smem, full, row, i, STAGES: gl.constexpr):
    stage = i % STAGES
    mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
    tma.async_load(x_desc, [row, i * x_desc.block_type.shape[1]], full.index(stage), smem.index(stage))


@gluon.jit
def double(x_desc, y_desc, blocks, STAGES: gl.constexpr):
    rows: gl.constexpr = x_desc.block_type.shape[0]
    columns: gl.constexpr = x_desc.block_type.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, rows, columns], x_desc.layout)
    out = gl.allocate_shared_memory(y_desc.dtype, [rows, columns], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    row = gl.program_id(0) * rows
    start(x_desc, smem, full, row, 0, STAGES)
    for i in range(blocks):
        if i < blocks - 1:
            start(x_desc, smem, full, row, i + 1, STAGES)
        mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
        x = smem.index(i % STAGES).load(layout)
        tma.store_wait(0)
        gl.barrier()
        out.store(x * 2)
        fence_async_shared()
        tma.async_store(y_desc, [row, i * columns], out)
    tma.store_wait(0)


def launch(x, y, STAGES=2):
    layout = gl.NVMMASharedLayout.get_default_for([32, 16], gl.float32)
    x_desc = TensorDescriptor.from_tensor(x, [32, 16], layout)
    y_desc = TensorDescriptor.from_tensor(y, [32, 16], layout)
    double[((x.shape[0] + 31) // 32,)](x_desc, y_desc, (x.shape[1] + 15) // 16, STAGES, num_warps=4)
