"""What orders CTAs and partitions in global memory: releases, acquires, barriers, waits for TMA stores, and what does not."""

from __future__ import annotations

import pytest
import torch
from subjects import SCHEDULES, nan_like, normal

from flashgen import simulator as sim

HEAD = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
"""

# The first CTA hands data to the second.
MESSAGE = (
    HEAD
    + """
@gluon.jit
def pass_on(data_ptr, flag_ptr, out_ptr):
    offsets = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    if gl.program_id(0) == 0:
        gl.store(data_ptr + offsets, offsets)
        gl.barrier()
        gl.atomic_xchg(flag_ptr, 1, sem="release")
    else:
        while gl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
            pass
        gl.store(out_ptr + offsets, gl.load(data_ptr + offsets))


def launch(data, flag, out):
    pass_on[(2,)](data, flag, out, num_warps=4)
"""
)
GIVE = 'gl.atomic_xchg(flag_ptr, 1, sem="release")'
TAKE = 'while gl.atomic_add(flag_ptr, 0, sem="acquire") == 0:\n            pass\n'


def deliver(text: str, schedule: str) -> None:
    data, flag = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros_like(data)
    sim.simulate(text, {"data": data, "flag": flag, "out": out}, schedule=schedule, seed=2, max_steps=5000)
    assert torch.equal(out, torch.arange(128, dtype=torch.int32))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ((GIVE, "gl.atomic_add(flag_ptr, 1)"),),  # what orders both ways orders one way
        ((GIVE, 'gl.atomic_store(flag_ptr, 1, sem="release")'), (TAKE, "gl.atomic_poll(flag_ptr, 1)\n")),
        ((TAKE, 'while gl.atomic_load(flag_ptr, sem="acquire") == 0:\n            pass\n'),),
        (
            (GIVE, "gl.atomic_cas(flag_ptr, 0, 1)"),
            (TAKE, "while gl.atomic_cas(flag_ptr, 1, 2) != 1:\n            pass\n"),
        ),
        # Seen relaxed, taken acquiring: the last read decides.
        ((TAKE, TAKE.replace("acquire", "relaxed") + '        gl.atomic_add(flag_ptr, 0, sem="acquire")\n'),),
    ],
    ids=["exchange", "acq_rel", "store and poll", "load", "compare and swap", "relaxed, then acquire"],
)
def test_a_release_orders_what_an_acquire_reads(changes: tuple[tuple[str, str], ...], schedule: str) -> None:
    text = MESSAGE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    deliver(text, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (GIVE, GIVE.replace("release", "relaxed")),
        (GIVE, GIVE.replace("release", "acquire")),
        (TAKE, TAKE.replace("acquire", "relaxed")),
        (TAKE, TAKE.replace("acquire", "release")),
        (TAKE, TAKE.replace('gl.atomic_add(flag_ptr, 0, sem="acquire")', "gl.load(flag_ptr, volatile=True)")),
        (TAKE, 'gl.atomic_poll(flag_ptr, 1, sem="relaxed")\n'),
        ("        gl.barrier()\n", ""),
        ("        gl.barrier()\n        " + GIVE, "        " + GIVE + "\n        gl.barrier()"),
        (TAKE, "\n"),
    ],
    ids=[
        "relaxed give", "acquiring give", "relaxed take", "releasing take", "volatile take", "relaxed poll", "no barrier",
        "late barrier", "no take",
    ],
)  # fmt: skip
def test_anything_weaker_is_a_race(old: str, new: str, schedule: str) -> None:
    assert old in MESSAGE
    with pytest.raises(sim.GlobalRaceError) as caught:
        deliver(MESSAGE.replace(old, new), schedule)
    assert {"gl.store(data_ptr + offsets, offsets)", "gl.store(out_ptr + offsets, gl.load(data_ptr + offsets))"} == {
        site.text for site in caught.value.sites
    }


def test_an_ordinary_store_is_no_signal() -> None:
    with pytest.raises(sim.GlobalRaceError, match="flag_ptr"):
        deliver(MESSAGE.replace(GIVE, "gl.store(flag_ptr, 1)"), "eager")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_release_reaches_through_relaxed_updates_in_between(schedule: str) -> None:
    """A release sequence: the second CTA's relaxed update stands between the first CTA's release and the third's acquire."""
    text = (
        MESSAGE.replace(
            "    else:\n",
            "    elif gl.program_id(0) == 1:\n"
            '        while gl.atomic_cas(flag_ptr, 1, 2, sem="relaxed") != 1:\n            pass\n'
            "    else:\n",
        )
        .replace('sem="acquire") == 0', 'sem="acquire") != 2')
        .replace("[(2,)]", "[(3,)]")
    )
    deliver(text, schedule)


LOCKED = (
    HEAD
    + """
@gluon.jit
def add_up(x_ptr, total_ptr, lock_ptr, SIZE: gl.constexpr):
    offsets = gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [4], [0]))
    x = gl.load(x_ptr + gl.program_id(0) * SIZE + offsets)
    while gl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1:
        pass
    gl.store(total_ptr + offsets, gl.load(total_ptr + offsets) + x)
    gl.barrier()
    gl.atomic_xchg(lock_ptr, 0, sem="release")


def launch(x, total, lock):
    add_up[(x.shape[0],)](x, total, lock, x.shape[1], num_warps=4)
"""
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_lock_orders_all_who_take_it(schedule: str) -> None:
    x, lock = (normal(9, 64) * 64).round(), torch.zeros(1, dtype=torch.int32)
    for seed in range(5):
        total = torch.zeros(64)
        sim.simulate(LOCKED, {"x": x, "total": total, "lock": lock}, schedule=schedule, seed=seed)
        assert torch.equal(total, x.sum(0)) and lock.item() == 0
    unlocked = LOCKED.replace('while gl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1', "while False")
    with pytest.raises(sim.GlobalRaceError):
        sim.simulate(unlocked, {"x": x, "total": total, "lock": lock}, schedule=schedule)


def test_atomic_sums_of_blocks_need_no_order_but_mix_with_nothing() -> None:
    text = LOCKED.split("    while gl")[0] + (
        "    gl.atomic_add(total_ptr + offsets, x)\n\n\n" + LOCKED[LOCKED.index("def launch") :]
    )
    x, total = (normal(9, 64) * 64).round(), torch.zeros(64)
    args = {"x": x, "total": total, "lock": total}
    sim.simulate(text, args)
    assert torch.equal(total, x.sum(0))
    with pytest.raises(sim.GlobalRaceError, match="load"):
        sim.simulate(text.replace("offsets, x)", "offsets, x)\n    gl.load(total_ptr)"), args)


def test_what_is_read_may_not_be_overwritten_by_another() -> None:
    text = f"""{HEAD}
@gluon.jit
def shift(x_ptr):
    offsets = gl.program_id(0) * 32 + gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(x_ptr + offsets, gl.load(x_ptr + offsets + 1))


def launch(x):
    shift[(3,)](x, num_warps=1)
"""
    for schedule in SCHEDULES:
        with pytest.raises(sim.GlobalRaceError, match="may still be being"):
            sim.simulate(text, {"x": normal(97)}, schedule=schedule)


# A tile through TMA: stored by the first CTA, read by the second.
TILE = (
    HEAD
    + """
@gluon.jit
def pass_tile(x_desc, y_ptr, y_desc, flag_ptr, out_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 32, gl.SliceLayout(0, layout))
    offsets = rows[:, None] * 32 + columns[None, :]
    smem = gl.allocate_shared_memory(gl.float32, [16, 32], x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    if gl.program_id(0) == 0:
        mbarrier.expect(bar, x_desc.block_type.nbytes)
        tma.async_load(x_desc, [0, 0], bar, smem)
        mbarrier.wait(bar, 0)
        # GIVE
        gl.barrier()
        gl.atomic_xchg(flag_ptr, 1, sem="release")
    else:
        while gl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
            pass
        # TAKE
        gl.store(out_ptr + offsets, got)


def launch(x, y, flag, out):
    layout = gl.NVMMASharedLayout.get_default_for([16, 32], gl.float32)
    x_desc, y_desc = [TensorDescriptor.from_tensor(t, [16, 32], layout) for t in (x, y)]
    pass_tile[(2,)](x_desc, y, y_desc, flag, out, num_warps=4)
"""
)
BY_TMA = "tma.async_store(y_desc, [0, 0], smem)\n        tma.store_wait(0, read_only=False)"
BY_STORE = "gl.store(y_ptr + offsets, smem.load(layout))"
LOADED = "got = gl.load(y_ptr + offsets)"
LOADED_BY_TMA = (
    "mbarrier.expect(bar, y_desc.block_type.nbytes)\n        tma.async_load(y_desc, [0, 0], bar, smem)\n"
    "        mbarrier.wait(bar, 0)\n        got = smem.load(layout)"
)


def tile(give: str, take: str, schedule: str) -> None:
    x = normal(16, 32)
    y, out = nan_like(x), nan_like(x)
    text = TILE.replace("# GIVE", give).replace("# TAKE", take)
    args = {"x": x, "y": y, "flag": torch.zeros(1, dtype=torch.int32), "out": out}
    sim.simulate(text, args, schedule=schedule, seed=4)
    assert torch.equal(out, x)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tma_store_is_handed_over_once_it_is_written(schedule: str) -> None:
    tile(BY_TMA, LOADED, schedule)
    tile(BY_TMA, LOADED_BY_TMA, schedule)
    tile(BY_STORE, LOADED, schedule)
    with pytest.raises(sim.GlobalRaceError, match="TMA store"):  # read is not written
        tile(BY_TMA.replace(", read_only=False", ""), LOADED, schedule)
    with pytest.raises(sim.GlobalRaceError, match="TMA store"):
        tile(BY_TMA.replace("store_wait(0", "store_wait(1") + "\n        tma.store_wait(0)", LOADED, schedule)
    with pytest.raises(sim.ProxyFenceError, match="Gluon has no fence for that"):
        tile(BY_STORE, LOADED_BY_TMA, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_partitions_of_a_cta_are_ordered_by_their_barriers(schedule: str) -> None:
    text = f"""{HEAD}
@gluon.jit
def give(data_ptr, bar):
    gl.store(data_ptr + gl.arange(0, 64, gl.BlockedLayout([1], [32], [1], [0])), 7)
    mbarrier.arrive(bar, count=1)


@gluon.jit
def take(data_ptr, out_ptr, bar):
    offsets = gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
    mbarrier.wait(bar, 0)
    gl.store(out_ptr + offsets, gl.load(data_ptr + offsets))


@gluon.jit
def both(data_ptr, out_ptr):
    bar = mbarrier.allocate_mbarrier()
    mbarrier.init(bar, count=1)
    gl.warp_specialize([(take, (data_ptr, out_ptr, bar)), (give, (data_ptr, bar))], [1], [24])
    gl.load(data_ptr)  # all partitions have ended: in order


def launch(data, out):
    both[(1,)](data, out, num_warps=4)
"""
    out = torch.zeros(64)
    sim.simulate(text, {"data": torch.zeros(64), "out": out}, schedule=schedule)
    assert (out == 7).all()
    with pytest.raises(sim.GlobalRaceError):
        sim.simulate(
            text.replace("    mbarrier.wait(bar, 0)\n", ""), {"data": torch.zeros(64), "out": out}, schedule=schedule
        )


# Each CTA adds its row to the total, by atomics or by TMA, in the order of the CTAs.
SUM = (
    HEAD
    + """
@gluon.jit
def add_up(x_desc, total_desc, turn_ptr, total_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    pid = gl.program_id(0)
    smem = gl.allocate_shared_memory(gl.float32, [1, 64], x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, x_desc.block_type.nbytes)
    tma.async_load(x_desc, [pid, 0], bar, smem)
    mbarrier.wait(bar, 0)
    while gl.atomic_add(turn_ptr, 0, sem="acquire") != pid:
        pass
    # ADD
    gl.barrier()
    gl.atomic_add(turn_ptr, 1, sem="release")


def launch(x, total, turn):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    x_desc, total_desc = [TensorDescriptor.from_tensor(t, [1, 64], layout) for t in (x, total)]
    add_up[(x.shape[0],)](x_desc, total_desc, turn, total, num_warps=4)
"""
)
ADD_BY_TMA = "tma.async_atomic_add(total_desc, [0, 0], smem)\n    tma.store_wait(0, read_only=False)"
ADD_BY_ATOMICS = (
    "columns = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]\n    gl.atomic_add(total_ptr + columns, smem.load(layout), "
    'sem="relaxed")'
)
RELEASED = '    gl.barrier()\n    gl.atomic_add(turn_ptr, 1, sem="release")'


def add(text: str, schedule: str, ordered: bool = True) -> torch.Tensor:
    return add_reported(text, schedule, ordered)[0]


def add_reported(text: str, schedule: str, ordered: bool = True) -> tuple[torch.Tensor, str]:
    """The sum, and the digest of its order."""
    x, total = normal(6, 64), torch.zeros(1, 64)
    args = {"x": x, "total": total, "turn": torch.zeros(1, dtype=torch.int32)}
    report = sim.simulate(text, args, schedule=schedule, seed=3, max_steps=5000, ordered_sums=ordered)
    return total, report.launches[0].sum_order


@pytest.mark.parametrize("how", [ADD_BY_TMA, ADD_BY_ATOMICS], ids=["TMA", "atomics"])
def test_the_order_of_sums_is_told_and_another_order_differs(how: str) -> None:
    text = SUM.replace("# ADD", how)
    (right,) = {add_reported(text, schedule)[1] for schedule in SCHEDULES}
    assert right and add_reported(text, "lazy", ordered=False)[1] == ""
    swapped = text.replace("!= pid", "!= pid // 2 * 2 + 1 - pid % 2")
    (other,) = {add_reported(swapped, schedule)[1] for schedule in ("random", "priority")}
    assert other not in ("", right)
    # All know of the one before, but whoever finds the counter at 0 goes on: no race, and an order of its own.
    anyone = text.replace("!= pid", "== pid")
    for schedule in SCHEDULES:
        try:
            assert add_reported(anyone, schedule)[1] != right
        except sim.SimulationError:
            pass


@pytest.mark.parametrize("how", [ADD_BY_TMA, ADD_BY_ATOMICS], ids=["TMA", "atomics"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sums_that_take_turns_are_ordered(how: str, schedule: str) -> None:
    want = torch.zeros(1, 64)
    for row in normal(6, 64):
        want = want + row
    assert torch.equal(add(SUM.replace("# ADD", how), schedule), want)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("how", "old", "new"),
    [
        (ADD_BY_TMA, 'sem="acquire"', 'sem="relaxed"'),
        (ADD_BY_TMA, 'sem="release"', 'sem="relaxed"'),
        (ADD_BY_TMA, "store_wait(0, read_only=False)", "store_wait(0)"),
        (ADD_BY_TMA, "store_wait(0, read_only=False)", "store_wait(1, read_only=False)\n    tma.store_wait(0)"),
        # The wait is known to the thread that issued the addition, until the partition meets.
        (ADD_BY_TMA, RELEASED, RELEASED.replace("    gl.barrier()\n", "")),
        (ADD_BY_ATOMICS, 'sem="acquire"', 'sem="relaxed"'),
        (ADD_BY_ATOMICS, 'sem="release"', 'sem="relaxed"'),
        (ADD_BY_ATOMICS, RELEASED, RELEASED.replace("    gl.barrier()\n", "")),
    ],
)
def test_sums_whose_order_is_not_known_are_found(how: str, old: str, new: str, schedule: str) -> None:
    text = SUM.replace("# ADD", how)
    assert old in text
    text = text.replace(old, new)
    with pytest.raises(sim.UnorderedSumError, match="depends on the schedule") as caught:
        add(text, schedule)
    assert caught.value.kind == "unordered-sum" and len(caught.value.sites) == 2
    add(text, schedule, ordered=False)  # right, but for the last bits
