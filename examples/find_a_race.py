"""Find a race in a Gluon kernel of your own, without a GPU, and see the two lines that run into each other.

python examples/find_a_race.py
"""

from __future__ import annotations

import torch

from flashgen.simulator import SharedRaceError, mutants, simulate

# A whole kernel file, as it would be launched on a GPU; a path to one does as well.
KERNEL = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def load(x_desc, tile, full, empty, blocks):
    for i in range(blocks):
        mbarrier.wait(empty, (i & 1) ^ 1)
        mbarrier.expect(full, x_desc.block_type.nbytes)
        tma.async_load(x_desc, [i * 16, 0], full, tile)


@gluon.jit
def work(y_ptr, tile, full, empty, blocks):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 32, gl.SliceLayout(0, layout))
    for i in range(blocks):
        mbarrier.wait(full, i & 1)
        mbarrier.arrive(empty, count=1)
        x = tile.load(layout)
        fence_async_shared()
        gl.store(y_ptr + (i * 16 + rows)[:, None] * 32 + columns[None, :], gl.exp2(x))


@gluon.jit
def exp2_rows(x_desc, y_ptr, blocks):
    tile = gl.allocate_shared_memory(gl.float32, [16, 32], x_desc.layout)
    full, empty = mbarrier.allocate_mbarrier(), mbarrier.allocate_mbarrier()
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [(work, (y_ptr, tile, full, empty, blocks)), (load, (x_desc, tile, full, empty, blocks))], [1], [24]
    )


def launch(x, y):
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float32)
    exp2_rows[(1,)](TensorDescriptor.from_tensor(x, [16, 32], layout), y, x.shape[0] // 16)
"""
EARLY = """\
        mbarrier.arrive(empty, count=1)
        x = tile.load(layout)
        fence_async_shared()
"""
# The tile is read, a fence shows that to TMA, and only then may it be overwritten.
MENDED = """\
        x = tile.load(layout)
        fence_async_shared()
        mbarrier.arrive(empty, count=1)
"""


def main() -> None:
    """Simulate the broken kernel and the mended one; then ask whether the check would notice other mistakes."""
    x = torch.randn(64, 32)
    y = torch.full_like(x, float("nan"))

    try:
        simulate(KERNEL, {"x": x, "y": y})
    except SharedRaceError as error:
        print(error)
        assert {site.text for site in error.sites} == {
            "x = tile.load(layout)",
            "tma.async_load(x_desc, [i * 16, 0], full, tile)",
        }

    assert EARLY in KERNEL
    kernel = KERNEL.replace(EARLY, MENDED)
    print("\nmended:", simulate(kernel, {"x": x, "y": y}))
    torch.testing.assert_close(y, torch.exp2(x))

    found = 0
    for mutant in mutants(kernel):
        y.fill_(float("nan"))
        try:
            simulate(mutant.text, {"x": x, "y": y}, max_steps=10_000)
            found += not torch.allclose(y, torch.exp2(x))
        except Exception:
            found += 1
    print(f"{found} of {len(mutants(kernel))} other mistakes are found")


if __name__ == "__main__":
    main()
