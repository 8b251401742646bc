"""y = 3x over tiles that CTAs draw by an atomic ticket; the last ticket resets the counter for the next launch.

The drawing partition hands each ticket to the working one through shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def draw(counter_ptr, ticket_smem, full, empty, tiles):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile = gl.program_id(0)
    turn = 0
    while tile < tiles:
        ticket = gl.atomic_add(counter_ptr, 1)
        if ticket == tiles - 1:
            gl.store(counter_ptr, 0)
        tile = ticket + gl.num_programs(0)
        mbarrier.wait(empty, (turn & 1) ^ 1)
        ticket_smem.store(gl.full([1], tile, gl.int32, layout))
        mbarrier.arrive(full, count=1)
        turn += 1


@gluon.jit
def work(x_ptr, y_ptr, ticket_smem, full, empty, size, tiles, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.program_id(0)
    turn = 0
    while tile < tiles:
        offsets = tile * BLOCK + gl.arange(0, BLOCK, layout=layout)
        mask = offsets < size
        x = gl.load(x_ptr + offsets, mask=mask, other=0.0)
        gl.store(y_ptr + offsets, 3 * x, mask=mask)
        mbarrier.wait(full, turn & 1)
        tile = gl.max(ticket_smem.load(layout), 0)
        mbarrier.arrive(empty, count=1)
        turn += 1


@gluon.jit
def triple(x_ptr, y_ptr, counter_ptr, size, tiles, BLOCK: gl.constexpr):
    ticket_smem = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (work, (x_ptr, y_ptr, ticket_smem, full, empty, size, tiles, BLOCK)),
            (draw, (counter_ptr, ticket_smem, full, empty, tiles)),
        ],
        [1],
        [24],
    )


def launch(x, y, counter, BLOCK=32):
    tiles = (x.numel() + BLOCK - 1) // BLOCK
    triple[(min(3, tiles),)](x, y, counter, x.numel(), tiles, BLOCK, num_warps=4)
