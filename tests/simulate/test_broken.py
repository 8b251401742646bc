"""A defect of each kind planted by hand: found under every schedule, as that kind, with the lines of both sides."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from subjects import SCHEDULES, check_copy, check_matmul, check_ordered_sum, check_tickets, normal, text_of

from flashgen import simulator as sim
from flashgen.simulator import schedule

CHECKS = {"matmul": check_matmul, "copy": check_copy, "ordered_sum": check_ordered_sum, "tickets": check_tickets}
LAYOUT = "gl.BlockedLayout([1], [32], [4], [0])"

FULL = "        mbarrier.wait(full.index(stage), phase)\n"
EMPTY = "        mbarrier.wait(empty.index(stage), phase ^ 1)\n"
DONE = "        acc = warpgroup_mma_wait(0, deps=(token,))\n"
ARRIVE = "        mbarrier.arrive(empty.index(stage), count=1)\n"
BYTES = "a_desc.block_type.nbytes + b_desc.block_type.nbytes"
FENCE = "    fence_async_shared()\n"
STORE = "    tma.async_store(c_desc, [gl.program_id(0) * block_m, 0], c_smem)\n"
STORED = "    tma.store_wait(0)\n"
STAGED = "    c_smem.store(acc.to(c_desc.dtype))\n"
INIT_FULL = "        mbarrier.init(full.index(stage), count=1)\n"
SPECIALIZE = "    gl.warp_specialize(\n"


@dataclass(frozen=True)
class Broken:
    """Edits of a kernel, the kinds of error they may show as, and what the first kind's message names."""

    edits: tuple[tuple[str, str], ...]
    kinds: tuple[type[sim.SimulationError], ...]
    names: tuple[str, ...] = ()
    kernel: str = "matmul"


def one(
    old: str, new: str, *kinds: type[sim.SimulationError], names: tuple[str, ...] = (), kernel: str = "matmul"
) -> Broken:
    return Broken(((old, new),), kinds, names, kernel)


def before_the_end(line: str, *kinds: type[sim.SimulationError], names: tuple[str, ...] = ()) -> Broken:
    """A line more in the main partition, after the barriers were initialised."""
    return one(SPECIALIZE, f"    {line}\n{SPECIALIZE}", *kinds, names=names)


BROKEN = {
    "products read while the load is in flight": one(
        FULL, "", sim.SharedRaceError, sim.UninitializedError, names=("wgmma", "TMA load", "consumer", "producer")
    ),
    "stage overwritten while a product reads it": one(
        DONE + ARRIVE, ARRIVE + DONE, sim.SharedRaceError, names=("TMA load", "wgmma", "consumer", "producer")
    ),
    "empty barrier not waited for": one(
        EMPTY, "", sim.SharedRaceError, sim.PhaseError, sim.BarrierError, sim.ByteCountError
    ),
    "shared memory never written": one(
        "warpgroup_mma(a_smem.index(stage)", "warpgroup_mma(c_smem.slice(0, 32, 1)", sim.UninitializedError,
        names=("c_smem", "never written"),
    ),
    "accumulator not waited for": one(
        DONE, "        acc = token * 1.0\n", sim.AccumulatorError, names=("before it was waited for", "is_async=True")
    ),
    "wait for products too weak": one(
        "_wait(0, deps", "_wait(1, deps", sim.AccumulatorError, sim.SharedRaceError, sim.UnfinishedError
    ),
    "product never waited for": Broken(
        ((DONE, "        acc = token\n"), ("acc.to(c_desc", "gl.zeros([block_m, block_n], gl.float32, acc_layout).to(c_desc")),
        (sim.UnfinishedError, sim.SharedRaceError), ("wgmma not waited for",),
    ),
    "no proxy fence before a TMA store": one(
        FENCE, "", sim.ProxyFenceError, names=("TMA store", "shared store", "fence_async_shared")
    ),
    "proxy fence after the TMA store": one(FENCE + STORE, STORE + FENCE, sim.ProxyFenceError),
    "overwritten while a TMA store reads": one(
        STORE, STORE + STAGED, sim.SharedRaceError, names=("shared store", "TMA store")
    ),
    "only the issuing thread knows of a store wait": one(STORED, STORED + STAGED, sim.SharedRaceError),
    "no proxy fence between a shared load and the next TMA load": one(
        ARRIVE,
        "        seen = a_smem.index(stage).load(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))\n" + ARRIVE,
        sim.ProxyFenceError, names=("TMA load", "shared load"),
    ),
    "partition ends with a TMA store": one(STORED, "", sim.UnfinishedError, names=("TMA stores not waited for",)),
    "load that nobody waits for": Broken(
        (("i < blocks - 1", "i < blocks"),), (sim.UnfinishedError,), ("load that nobody waited for",), "copy"
    ),
    "half of the bytes": one(
        BYTES, f"({BYTES}) // 2", sim.ByteCountError, sim.SharedRaceError, sim.PhaseError, names=("full[",)
    ),
    "too many bytes": one(
        BYTES, f"{BYTES} + 16", sim.DeadlockError, names=("full[0]", "16 bytes outstanding", "producer", "consumer")
    ),
    "wrong phase": one("phase ^ 1", "phase", sim.DeadlockError, names=("empty[0]", "waits for phase 0")),
    "missing arrive": one(ARRIVE, "", sim.DeadlockError, names=("empty[0]", "arrivals missing")),
    "no init": one(INIT_FULL, "", sim.BarrierError, names=("before mbarrier.init",)),
    "init twice": one(INIT_FULL, INIT_FULL + INIT_FULL, sim.BarrierError, names=("twice",)),
    "use after invalidate": before_the_end(
        "mbarrier.invalidate(full.index(0))", sim.BarrierError, names=("after mbarrier.invalidate",)
    ),
    "too many arrivals": one(ARRIVE, ARRIVE.replace("=1", "=2"), sim.BarrierError, names=("more arrivals",)),
    "box and shared memory differ": one(
        "b_desc.dtype, [STAGES, BLOCK_K, block_n]", "b_desc.dtype, [STAGES, BLOCK_K, 2 * block_n]", sim.ShapeError,
        names=("box", "b_smem"),
    ),
    "store of another dtype": one("acc.to(c_desc.dtype)", "acc", sim.ShapeError, names=("float32", "c_smem")),
    "shapes of a product": one(
        "gl.zeros([block_m, block_n], gl.float32", "gl.zeros([block_m, 16], gl.float32", sim.ShapeError, names=("wgmma",)
    ),
    "layouts differ": one(
        STAGED, "    acc = acc + gl.zeros([block_m, block_n], gl.float32, gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))\n" + STAGED,
        sim.LayoutError, names=("NVMMADistributedLayout", "BlockedLayout"),
    ),
    "global store out of bounds": before_the_end(
        f"gl.store(note_ptr + gl.arange(0, 16, {LAYOUT}), 1)", sim.OutOfBoundsError, names=("0 to 15", "8 elements")
    ),
    "a store below 0": one(
        STORE, STORE.replace("gl.program_id(0) * block_m", "-8"), sim.OutOfBoundsError, names=("illegal instruction",)
    ),
    "replicas in registers add": before_the_end(
        "gl.atomic_add(note_ptr + gl.arange(0, 8, gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])))[:, None], 1)",
        sim.LayoutError, names=("replica",),
    ),
    "index out of bounds": before_the_end("full.index(3)", sim.OutOfBoundsError, names=("index 3", "full")),
    "CTAs store to one place": before_the_end(
        "gl.store(note_ptr, 1)", sim.GlobalRaceError, names=("two writes of global memory", "cta1", "cta0")
    ),
    "int32 overflow": before_the_end("gl.num_programs(0) * 2000000000 * 2", sim.IntegerError, names=("int32 overflow",)),
    "int32 overflow in a tensor": before_the_end(
        f"gl.arange(0, 128, {LAYOUT}) * 2000000000", sim.IntegerError, names=("int32 overflow in a tensor",)
    ),
    "negative remainder": before_the_end("(gl.program_id(0) - 3) % 2", sim.IntegerError, names=("truncates",)),
    "too much shared memory": one(
        "c_desc.dtype, [block_m, block_n]", "c_desc.dtype, [64 * block_m, block_n]", sim.SharedMemoryLimitError,
        names=("232448",),
    ),
    "endless loop": before_the_end("while True:\n        mbarrier.wait(empty.index(0), 1)", sim.LivelockError),
    "device assertion": before_the_end("gl.device_assert(steps < 0, 'no steps')", sim.KernelAssertionError, names=("no steps",)),
    "unknown operation": before_the_end(
        "gl.histogram(steps, 8)", sim.UnsupportedOperationError, names=("language.histogram", "`gl.histogram(steps, 8)`")
    ),
    "an ordinary exception": before_the_end(
        "[][steps]", sim.KernelPythonError, names=("IndexError", "`[][steps]`")
    ),
    "tensor that TMA cannot describe": one(
        "descriptor(a, [64, BLOCK_K])", "descriptor(a[:, 1:], [64, BLOCK_K])", sim.DescriptorError, names=("16 bytes",)
    ),
    "box of no power of two": one("BLOCK_K=32)", "BLOCK_K=48)", sim.DescriptorError, names=("powers of two", "48")),
    # -- across CTAs --
    "semaphore taken without acquire": one(
        'sem="acquire"', 'sem="relaxed"', sim.GlobalRaceError, names=("gl.load(total_ptr", "gl.store(total_ptr"),
        kernel="ordered_sum",
    ),
    "semaphore given without release": one('sem="release"', 'sem="relaxed"', sim.GlobalRaceError, kernel="ordered_sum"),
    "semaphore given before the other threads are done": one(
        "    gl.barrier()\n", "", sim.GlobalRaceError, kernel="ordered_sum"
    ),
    "semaphore not waited for": one(
        'while gl.atomic_add(turn_ptr, 0, sem="acquire") != pid', "while False", sim.GlobalRaceError, kernel="ordered_sum"
    ),
    "semaphore never given": one(
        'gl.atomic_xchg(turn_ptr, gl.where(last, 0, pid + 1), sem="release")', "pass", sim.LivelockError,
        kernel="ordered_sum",
    ),
    "counter reset while tickets are drawn": one(
        "if ticket == tiles - 1", "if ticket == tiles - 2", sim.GlobalRaceError, kernel="tickets",
        names=("gl.store(counter_ptr, 0)", "gl.atomic_add(counter_ptr, 1)"),
    ),
    "two CTAs at one tile": one(
        "tile = ticket + gl.num_programs(0)", "tile = ticket + 1", sim.GlobalRaceError, kernel="tickets",
        names=("gl.store(y_ptr",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BROKEN)
def test_it_is_found(name: str, schedule: str) -> None:
    broken, text = BROKEN[name], text_of(BROKEN[name].kernel)
    for old, new in broken.edits:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(sim.SimulationError) as caught:
        CHECKS[broken.kernel](text, schedule=schedule, seed=1, max_steps=2000)
    error = caught.value
    assert isinstance(error, broken.kinds), error
    if isinstance(error, broken.kinds[0]):
        assert all(part in str(error) for part in broken.names), error


def test_a_race_names_the_lines_and_partitions_of_both_sides() -> None:
    text = text_of("matmul").replace(DONE + ARRIVE, ARRIVE + DONE)
    with pytest.raises(sim.SharedRaceError) as caught:
        check_matmul(text, seed=1)
    error, lines = caught.value, text.splitlines()
    sides = {name.split("/")[1]: site for name, site in zip(error.partitions, error.sites, strict=True)}
    load, product = sides["p1:producer"], sides["p0:consumer"]
    assert "tma.async_load" in load.text and lines[load.line - 1].strip() == load.text
    assert "warpgroup_mma(" in product.text and lines[product.line - 1].strip() == product.text
    assert error.kind == "shared-race" and str(load) in str(error) and str(product) in str(error)


def test_a_deadlock_lists_every_partition() -> None:
    with pytest.raises(sim.DeadlockError) as caught:
        check_matmul(text_of("matmul").replace(ARRIVE, ""), processors=2)
    said = str(caught.value)
    assert {"cta0/p0:consumer", "cta0/p1:producer", "cta1/p0:consumer", "cta1/p1:producer"} <= set(
        caught.value.partitions
    )
    assert "waits for phase 0 of empty[0]: 0 phases completed, 1 of 1 arrivals missing" in said
    assert "`mbarrier.wait(empty.index(stage), phase ^ 1)`" in said


def test_a_missing_wait_is_found_where_it_did_no_harm() -> None:
    """Eagerly every load has landed before anybody reads: only what the reader can know tells the difference."""
    text = text_of("copy").replace("        mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)\n", "")
    with pytest.raises(sim.SharedRaceError, match="data is read that may still be being written"):
        check_copy(text, schedule="eager")


def test_relaxed_rules_are_left_out() -> None:
    text = text_of("copy").replace("        gl.barrier()\n", "")
    with pytest.raises(sim.SharedRaceError):
        check_copy(text)
    check_copy(text, relax=["store-wait"])


def test_poison_shows_in_what_nothing_overwrote() -> None:
    x, y = normal(8, 20), torch.zeros(8, 20)
    text = text_of("copy").replace("out.store(x * 2)", "out.store(x * 2 + smem.index((i + 1) % STAGES).load(layout))")
    with pytest.raises(sim.SimulationError):
        sim.simulate(text, {"x": x, "y": y})


TWO_WARPGROUPS = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def square(out_ptr):
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16 * WARPS, 64], gl.bfloat16)
    a = gl.allocate_shared_memory(gl.bfloat16, [16 * WARPS, 64], shared)
    b = gl.allocate_shared_memory(gl.bfloat16, [64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16))
    a.store(gl.full([16 * WARPS, 64], 1.0, gl.bfloat16, layout))
    b.store(gl.full([64, 64], 2.0, gl.bfloat16, layout))
    fence_async_shared()
    product = warpgroup_mma(a, b, gl.zeros([16 * WARPS, 64], gl.float32, layout), is_async=True)
    product = warpgroup_mma_wait(0, deps=(product,))
    # MEET
    b.store(gl.full([64, 64], 3.0, gl.bfloat16, layout))
    gl.store(out_ptr, gl.sum(gl.sum(product, 1), 0))
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_warpgroup_waits_for_its_own_products(schedule: str) -> None:
    """What another warpgroup of the partition multiplies may still be read, until all have met."""

    def multiply(text: str, warps: int) -> float:
        out = torch.zeros(1)
        sim.simulate(text, {"out_ptr": out, "num_warps": warps}, entry="square", grid=(1,), schedule=schedule)
        return float(out)

    assert multiply(TWO_WARPGROUPS, 4) == 64 * 64 * 128
    met = TWO_WARPGROUPS.replace("# MEET", "gl.barrier()")
    assert multiply(met, 8) == 128 * 64 * 128
    with pytest.raises(sim.SharedRaceError, match="may still be being read"):
        multiply(TWO_WARPGROUPS, 8)


@pytest.mark.parametrize(
    "made",
    [
        "x.new_empty(x.shape)",
        "torch.empty(x.shape, device=x.device)",
        "torch.empty_like(x)",
        "x.new_empty_strided((64,), (1,))",
        "torch.empty_strided((64,), (1,))",
    ],
)
def test_what_a_launch_leaves_uninitialised_is_poison(made: str) -> None:
    """Else a kernel that reads it is right in one run and wrong in another."""
    text = f"""
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def copy(x_ptr, y_ptr):
    i = gl.arange(0, 64, layout={LAYOUT})
    gl.store(y_ptr + i, gl.load(x_ptr + i))

def launch(x, y):
    scratch = {made}
    copy[(1,)](scratch, y)
"""
    y = torch.zeros(64)
    sim.simulate(text, {"x": torch.zeros(64), "y": y})
    assert y.isnan().all()


def test_what_runs_without_an_end_is_ended() -> None:
    """Left to itself it would run on beside the next launch, and work on that one's partition and barriers."""
    text = f"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def spin(x_ptr):
    i = gl.arange(0, 64, layout={LAYOUT})
    while gl.max(i, 0) > 0:
        i = i + 0
    gl.store(x_ptr + i, i)
"""
    with pytest.raises(sim.LivelockError, match="no end after 0 s"):
        sim.simulate(text, {"x_ptr": torch.zeros(64)}, entry="spin", grid=(4,), timeout_s=0.3)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("simulated")]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_polling_what_nobody_will_change_ends_soon(schedule: str) -> None:
    text = text_of("ordered_sum").replace('gl.atomic_xchg(turn_ptr, gl.where(last, 0, pid + 1), sem="release")', "pass")
    with pytest.raises(sim.LivelockError, match=r"polled 1000 times(?s:.)*gl.atomic_add\(turn_ptr, 0"):
        CHECKS["ordered_sum"](text, schedule=schedule, seed=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_polling_for_long_is_not_endless(schedule: str) -> None:
    """What another one is about to change, by a store of its own after many steps, another element each time, or work that changes nothing."""
    text = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def wait(flag_ptr, data_ptr, sum_ptr):
    if gl.program_id(0) == 0:
        while gl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
            pass
        gl.store(data_ptr, 1)
    else:
        for i in range(3000):
            gl.atomic_add(data_ptr + 1 + i, 0)
        for i in range(1500):
            gl.atomic_max(data_ptr + 1, -i)
        for i in range(1500):
            gl.atomic_add(sum_ptr, 0.0)
        gl.atomic_xchg(flag_ptr, 1, sem="release")
"""
    flag, data = torch.zeros(1, dtype=torch.int32), torch.zeros(3001, dtype=torch.int32)
    given = {"flag_ptr": flag, "data_ptr": data, "sum_ptr": torch.zeros(1)}
    sim.simulate(text, given, entry="wait", grid=(2,), schedule=schedule)
    assert data.sum() == 1


def test_what_is_slow_is_not_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait of the launch ends without it, as on a machine that others use; in between the kernel went on."""
    text = f"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def walk(x_ptr):
    i = gl.arange(0, 64, layout={LAYOUT})
    for _ in range(2000):
        gl.atomic_add(x_ptr + i, 1.0)
"""
    waits, real = list[int](), schedule.Scheduler.__init__

    def init(self: schedule.Scheduler, *arguments: Any) -> None:
        real(self, *arguments)
        over = self.done.wait

        def wait(_: float | None = None) -> bool:
            waits.append(steps := self.steps)
            while not over(0.001):
                if self.steps > steps:
                    return False
            return True

        monkeypatch.setattr(self.done, "wait", wait)

    monkeypatch.setattr(schedule.Scheduler, "__init__", init)
    x = torch.zeros(64)
    sim.simulate(text, {"x_ptr": x}, entry="walk", grid=(1,), schedule="random")
    assert len(waits) > 2
    assert torch.equal(x, torch.full((64,), 2000.0))
