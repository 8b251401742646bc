"""Named barriers in inline assembly: turns are counted and order nothing, what is handed over is ordered, misuse has a line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subjects import SCHEDULES

from flashgen import simulator as sim

TEXT = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def come(x, WHAT: gl.constexpr, NUMBER: gl.constexpr, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(
        f"bar.{WHAT} {NUMBER}, {THREADS}; mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def player(out_ptr, box, ME: gl.constexpr, ROUNDS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if ME == 1:
        come(0, "arrive", 8, 256)
    for i in range(ROUNDS):
        come(i, "sync", 8 + ME, 256)
        # PLAY
        come(i, "arrive", 8 + (ME + 1) % 2, 256)
    gl.store(out_ptr + ME + gl.arange(0, 1, layout), gl.full([1], ROUNDS, gl.int32, layout))


@gluon.jit
def game(out_ptr, ROUNDS: gl.constexpr):
    box = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize([(player, (out_ptr, box, 0, ROUNDS)), (player, (out_ptr, box, 1, ROUNDS))], [4], [128])


def launch(out, ROUNDS):
    game[(1,)](out, ROUNDS, num_warps=4)
"""
PLAY = "        # PLAY\n"


def play(text: str = TEXT, schedule: str = "random", seed: int = 0) -> list[int]:
    out = torch.zeros(2, dtype=torch.int32)
    sim.simulate(text, {"out": out, "ROUNDS": 5}, schedule=schedule, seed=seed)
    return out.tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_partitions_take_turns(schedule: str) -> None:
    for seed in range(5):
        assert play(schedule=schedule, seed=seed) == [5, 5]


@pytest.mark.parametrize(
    ("old", "new", "kind", "said"),
    [
        ('    if ME == 1:\n        come(0, "arrive", 8, 256)\n', "", sim.DeadlockError, "waits at named barrier 8: 128 of 256 threads"),
        ('come(0, "arrive", 8, 256)', 'come(0, "arrive", 8, 96)', sim.BarrierError, "(128 threads come to named barrier 8, which 96 open|waits for 256 threads, this one says 96)"),
        ('come(i, "sync", 8 + ME, 256)', 'come(i, "sync", 8 + ME, 384)', sim.BarrierError, "waits for (256|384) threads, this one says (384|256)"),
        ('come(i, "sync", 8 + ME, 256)', 'come(i, "sync", 15 + ME, 256)', sim.BarrierError, "numbers go to 15"),
        ('come(i, "sync", 8 + ME, 256)', 'come(i, "sync", 8 + ME, 250)', sim.BarrierError, "threads in warps of 32"),
    ],
)  # fmt: skip
def test_misuse_is_reported(old: str, new: str, kind: type[sim.SimulationError], said: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(kind, match=said):
        play(TEXT.replace(old, new))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_race_that_only_turns_prevent_is_reported(schedule: str) -> None:
    text = TEXT.replace(PLAY, "        box.store(gl.full([1], ME, gl.int32, layout))\n")
    with pytest.raises(sim.SharedRaceError, match="box"):
        play(text, schedule)


def test_other_assembly_stays_unknown() -> None:
    with pytest.raises(sim.UnsupportedOperationError, match="register_asm"):
        play(TEXT.replace("bar.{WHAT}", "bar.red.{WHAT}"))


HAND_OVER = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def come(stage, WHAT: gl.constexpr, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(
        f"bar.{WHAT} $1, {THREADS}; mov.b32 $0, 0;", "=r,r", [8 + stage], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def give(box, ROUNDS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(ROUNDS):
        box.index(i % 2).store(gl.full([1], 10 + i, gl.int32, layout))
        come(i % 2, "arrive", 160)
        come(2 + i % 2, "sync", 160)


@gluon.jit
def take(out_ptr, box, ROUNDS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(ROUNDS):
        come(i % 2, "sync", 160)
        gl.store(out_ptr + i + gl.arange(0, 1, layout), box.index(i % 2).load(layout))
        come(2 + i % 2, "arrive", 160)


@gluon.jit
def game(out_ptr, ROUNDS: gl.constexpr):
    box = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize([(give, (box, ROUNDS)), (take, (out_ptr, box, ROUNDS))], [1], [24])


def launch(out, ROUNDS):
    game[(1,)](out, ROUNDS, num_warps=4)
"""


MISSED = (
    sim.SharedRaceError,
    sim.BarrierError,
)  # what nobody waited for: a race, or more who come than the barrier counts


def hand_over(text: str = HAND_OVER, schedule: str = "random", seed: int = 0) -> list[int]:
    out = torch.zeros(6, dtype=torch.int32)
    sim.simulate(text, {"out": out, "ROUNDS": 6}, schedule=schedule, seed=seed)
    return out.tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_number_in_a_register_hands_data_over(schedule: str) -> None:
    for seed in range(3):
        assert hand_over(schedule=schedule, seed=seed) == [10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        ('        come(i % 2, "sync", 160)\n', '        come(i % 2, "arrive", 160)\n', MISSED),
        ('        come(2 + i % 2, "sync", 160)\n', '        come(2 + i % 2, "arrive", 160)\n', MISSED),
        ('        come(i % 2, "arrive", 160)\n        come(2', "        come(2", sim.DeadlockError),
        ('f"bar.{WHAT} $1, {THREADS}', 'f"bar.{WHAT} 8, {THREADS}', MISSED),
    ],
)
def test_without_it_there_is_a_race(old: str, new: str, kinds: Any, schedule: str) -> None:
    assert HAND_OVER.count(old) == 1
    with pytest.raises(kinds):
        hand_over(HAND_OVER.replace(old, new), schedule)
