"""total += each CTA's row sums, in the order of the CTAs: a semaphore lets one in after the other."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def ordered_sum(x_ptr, total_ptr, turn_ptr, columns, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pid = gl.program_id(0)
    offsets = gl.arange(0, BLOCK, layout=layout)
    mask = offsets < columns
    x = gl.load(x_ptr + pid * columns + offsets, mask=mask, other=0.0)
    while gl.atomic_add(turn_ptr, 0, sem="acquire") != pid:
        pass
    total = gl.load(total_ptr + offsets, mask=mask, other=0.0)
    gl.store(total_ptr + offsets, total + x, mask=mask)
    gl.barrier()
    last = pid == gl.num_programs(0) - 1
    gl.atomic_xchg(turn_ptr, gl.where(last, 0, pid + 1), sem="release")


def launch(x, total, turn, BLOCK=64):
    ordered_sum[(x.shape[0],)](x, total, turn, x.shape[1], BLOCK, num_warps=4)
