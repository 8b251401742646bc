"""Right kernels: the numbers, no false alarm under many schedules, and what a report says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from subjects import KERNELS, SCHEDULES, SUBJECTS, check_copy, nan_like, normal, text_of

from flashgen import simulator as sim
from flashgen.errors import FlashgenError, InvalidProblemError
from flashgen.simulator import dtypes

HEAD = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_numbers(name: str, schedule: str) -> None:
    for processors in (1, 2, 4):
        if name == "tickets" and processors == 1:
            continue  # fine as well, but the same as below
        SUBJECTS[name](text_of(name), schedule=schedule, seed=7, processors=processors)


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_no_false_alarm_under_random_schedules(name: str) -> None:
    for seed in range(30):
        for schedule in ("random", "priority"):
            SUBJECTS[name](text_of(name), schedule=schedule, seed=seed)


def test_the_seed_repeats_a_run() -> None:
    def steps(seed: int) -> tuple[int, int]:
        x = normal(70, 100)
        report = sim.simulate(text_of("copy"), {"x": x, "y": nan_like(x)}, seed=seed)
        return report.launches[0].steps, report.launches[0].switches

    assert steps(3) == steps(3)
    assert len({steps(seed) for seed in range(6)}) > 1


def test_a_report_says_what_was_done() -> None:
    x = normal(70, 100)
    report = sim.simulate(text_of("copy"), {"x": x, "y": nan_like(x), "STAGES": 2}, schedule="lazy", seed=5)
    (launch,) = report.launches
    assert (report.schedule, report.seed) == ("lazy", 5)
    assert (launch.kernel, launch.grid, launch.products) == ("double", (3, 1, 1), 0)
    boxes = 3 * 7 * 32 * 16 * 4
    assert launch.tma_load_bytes == launch.tma_store_bytes == boxes
    assert launch.smem_bytes == 3 * 32 * 16 * 4 + 2 * 8
    assert "double: grid (3, 1, 1)" in str(report) and "'lazy', seed 5" in str(report)


def test_sources_are_texts_paths_and_rendered_kernels() -> None:
    class Rendered:
        text, name = text_of("copy"), "copy-1234.py"

    check_copy(KERNELS / "copy.py")
    check_copy(str(KERNELS / "copy.py"))
    check_copy(Rendered())  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match="cannot be read"):
        sim.simulate(Path("nowhere.py"), {})
    with pytest.raises(InvalidProblemError, match="source is a int"):
        sim.simulate(3, {})  # type: ignore[arg-type]


def test_wrong_calls_are_refused() -> None:
    x, text = normal(32, 16), text_of("copy")
    with pytest.raises(InvalidProblemError, match="'fast' is unknown; known are eager"):
        sim.simulate(text, {"x": x, "y": x}, schedule="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match="missing a required argument: 'y'"):
        sim.simulate(text, {"x": x})
    with pytest.raises(InvalidProblemError, match=r"no function 'go'.* double, start"):
        sim.simulate(text, {"x": x}, entry="go")
    with pytest.raises(InvalidProblemError, match="give grid="):
        sim.simulate(text, {"x": x}, entry="double")
    with pytest.raises(InvalidProblemError, match="relax holds"):
        sim.simulate(text, {"x": x, "y": x}, relax=["races"])
    with pytest.raises(InvalidProblemError, match="processors is 0"):
        sim.simulate(text, {"x": x, "y": x}, processors=0)
    with pytest.raises(sim.KernelPythonError, match="the file does not load: ZeroDivisionError"):
        sim.simulate("a = 1\nb = a / 0\n", {})
    assert issubclass(sim.SimulationError, FlashgenError)


def test_a_kernel_without_a_host_function_is_launched_by_its_grid() -> None:
    text = f"""{HEAD}
@gluon.jit
def scale(x_ptr, y_ptr, factor, size, BLOCK: gl.constexpr):
    offsets = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [2], [0]))
    x = gl.load(x_ptr + offsets, mask=offsets < size)
    gl.store(y_ptr + offsets, x * factor, mask=offsets < size)
"""
    x = normal(100)
    y = nan_like(x)
    args = {"x_ptr": x, "y_ptr": y, "factor": 2.0, "size": 100, "BLOCK": 64, "num_warps": 2}
    sim.simulate(text, args, entry="scale", grid=(2,))
    assert torch.equal(y, 2 * x)


MOVE = (
    HEAD
    + """
@gluon.jit
def move(x_desc, y_desc, x_at, y_at, REDUCE: gl.constexpr):
    smem = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_load(x_desc, x_at, bar, smem)
    mbarrier.wait(bar, 0)
    if REDUCE:
        tma.async_atomic_add(y_desc, y_at, smem)
    else:
        tma.async_store(y_desc, y_at, smem)
    tma.store_wait(0)


def launch(x, y, block, x_at, y_at, swizzle, ctas=1, REDUCE=False):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=x.element_size() * 8, rank=len(block))
    descriptors = [TensorDescriptor.from_tensor(t, block, layout) for t in (x, y)]
    move[(ctas,)](*descriptors, x_at, y_at, REDUCE, num_warps=4)
"""
)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_tma_moves_boxes_of_strided_tensors_and_clips_them(rank: int, dtype: torch.dtype) -> None:
    """A box over both ends of a tensor with gaps: what lies outside reads as zero, and nothing beyond the end is written."""
    sizes, block = (3, 5, 6, 7, 19)[-rank:], (1, 2, 4, 4, 16)[-rank:]
    whole = (torch.arange(5 * 9 * 9 * 9 * 32) % 97).to(dtype).reshape(5, 9, 9, 9, 32)
    x = whole[(0,) * (5 - rank)][tuple(slice(0, size) for size in sizes)]
    y = torch.full_like(whole, 99)[(0,) * (5 - rank)][tuple(slice(0, size) for size in sizes)]
    ends = [size - 2 for size in sizes]
    at = [-1 if dim % 2 else end for dim, end in enumerate(ends)]
    args = {"x": x, "y": y, "block": list(block), "x_at": at, "y_at": ends, "swizzle": 0}
    sim.simulate(MOVE, args)
    # The same on tensors with room on every side.
    room, inside = 16, tuple(slice(16, 16 + size) for size in sizes)
    wide = torch.zeros([size + 2 * room for size in sizes], dtype=dtype)
    wide[inside] = x
    box = wide[tuple(slice(room + a, room + a + b) for a, b in zip(at, block, strict=True))].clone()
    assert box.any()
    wide.fill_(99)
    wide[tuple(slice(room + a, room + a + b) for a, b in zip(ends, block, strict=True))] = box
    assert torch.equal(y, wide[inside])


def test_tma_reductions_of_many_ctas_add_up() -> None:
    x, y = normal(8, 32), torch.zeros(8, 32)
    args = {"x": x, "y": y, "block": [8, 32], "x_at": [0, 0], "y_at": [0, 0], "swizzle": 128, "ctas": 5}
    sim.simulate(MOVE, {**args, "REDUCE": True})
    assert torch.allclose(y, 5 * x)
    with pytest.raises(sim.GlobalRaceError, match="TMA store"):
        sim.simulate(MOVE, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 1:], "multiples of 16 bytes"),
        (lambda x: x.T, "last stride must be 1"),
        (lambda x: x.flatten()[: 8 * 30].view(8, 30), "multiples of 16 bytes"),
        (lambda x: x[:0], "sizes must be positive"),
    ],
)
def test_tensors_that_tma_cannot_describe(change, message: str) -> None:
    x = change(normal(8, 32))
    args = {"x": x, "y": x, "block": [8, 32], "x_at": [0, 0], "y_at": [0, 0], "swizzle": 128}
    with pytest.raises(sim.DescriptorError, match=message):
        sim.simulate(MOVE, args)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_is_that_of_torch(name: str) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values = torch.cat(
        [
            bits.view(torch.float32),
            torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0]),
        ]
    )
    want = values.to(getattr(torch, name)).float()
    with np.errstate(all="ignore"):
        got = torch.from_numpy(dtypes.rounded(values.numpy(), dtypes.ALL[name]))
    assert torch.equal(got.nan_to_num(1e39), want.nan_to_num(1e39))
    assert torch.equal(got.isnan(), want.isnan())


SCALARS = f"""{HEAD}
@gluon.jit
def scalars(out_ptr, n, big):
    for i in range(n):
        gl.store(out_ptr + i, i * i)
    gl.store(out_ptr + n, (n.to(gl.int64) * 3000000000) // 1000000000)
    gl.store(out_ptr + n + 1, big // 1000000000)
    gl.store(out_ptr + n + 2, gl.maximum(n, 7) + gl.minimum(n, 7) + gl.cdiv(n, 2))


def launch(out, n, big):
    scalars[(1,)](out, n, big)
"""


def test_scalars_are_int32_unless_cast_or_given_wider() -> None:
    out = torch.zeros(8, dtype=torch.int32)
    sim.simulate(SCALARS, {"out": out, "n": 5, "big": 5_000_000_000})
    assert out.tolist() == [0, 1, 4, 9, 16, 15, 5, 15]
    with pytest.raises(sim.IntegerError, match="int32 overflow: 10000000000"):
        sim.simulate(SCALARS.replace("n.to(gl.int64) * 3", "n * 2"), {"out": out, "n": 5, "big": 1})


def test_an_argument_is_seen_only_as_far_as_it_reaches() -> None:
    """A margin round the tensor, of the same storage, is out of bounds."""
    text = f"""{HEAD}
@gluon.jit
def read(x_ptr, at):
    gl.load(x_ptr + at)
"""
    x = torch.zeros(12)[4:8]
    for at in (-1, 4):
        with pytest.raises(sim.OutOfBoundsError, match=f"elements {at} to {at} of a tensor of 4"):
            sim.simulate(text, {"x_ptr": x, "at": at}, entry="read", grid=(1,))
    sim.simulate(text, {"x_ptr": x, "at": 3}, entry="read", grid=(1,))


def test_nothing_is_left_behind() -> None:
    import linecache
    import threading

    with pytest.raises(sim.SimulationError):
        check_copy(
            text_of("copy").replace("    fence_async_shared()\n", "").replace("        fence_async_shared()\n", "")
        )
    check_copy(text_of("copy"))
    assert not [name for name in linecache.cache if "flashgen simulation" in name]
    for thread in threading.enumerate():
        if thread.name.startswith("simulated"):
            thread.join(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("simulated")]
