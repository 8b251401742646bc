"""What balances packed sequences of unequal lengths: blocks of rows (keys, in dK/dV), handed out one by one to whoever is free.

The rendered kernels' own functions say which block is whose; a simulation starts them in the order of their launch on 132 multiprocessors, each
block taking as long as it has pairs of blocks to work on, and compares when the last one ends with the ideal: the work divided evenly, or
the longest block where that takes longer.
"""

from __future__ import annotations

import ast
import heapq
import textwrap
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

SMS, HEADS = 132, 16
OVERHEAD = 1.0  # of a block, in blocks of the other side: what starts and ends it

LENGTHS: dict[str, list[int]] = {
    "equal": [2048] * 16,
    "one long, first": [16384, *[512] * 32],
    "one long, last": [*[512] * 32, 16384],
    "one long, in the middle": [*[512] * 16, 16384, *[512] * 16],
    "geometric": [16384 >> n for n in range(8)] * 2,
    "geometric, shortest first": [128 << n for n in range(8)] * 2,
    "many short": [*range(64, 700, 5)],
    "empty ones between": [0, 4096, 0, 0, 8192, 0, 128, 0],
    "odd": [1, 4095, 2, 8191, 3, 63, 65, 1000],
}


class Pointer:
    """Offsets in memory, as the kernels read them."""

    def __init__(self, values: list[int], at: int = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, step: int) -> Pointer:
        return Pointer(self.values, self.at + step)


class Language:
    """The few words that these functions use."""

    constexpr = int
    minimum, maximum = staticmethod(min), staticmethod(max)

    @staticmethod
    def where(condition: bool, x: int, y: int) -> int:
        return x if condition else y

    @staticmethod
    def load(pointer: Pointer) -> int:
        return pointer.values[pointer.at]


class Blocks(Language):
    """The words of `list_keys`, on arrays."""

    int64 = int
    arange, cdiv = staticmethod(np.arange), staticmethod(lambda x, y: -(-x // y))
    where, sum = staticmethod(np.where), staticmethod(np.sum)

    @staticmethod
    def load(pointer: Any, mask: Any = None, other: int = 0) -> Any:
        values, at = np.asarray(pointer.values), np.asarray(pointer.at)
        there = np.ones(at.shape, bool) if mask is None else mask
        return np.where(there, values[np.where(there, at, 0)], other)

    @staticmethod
    def store(pointer: Any, value: Any, mask: Any) -> None:
        pointer.values[pointer.at[mask]] = np.broadcast_to(value, mask.shape)[mask]


def listed_keys(known: dict[str, Callable[..., Any]], ends: list[int], block: int) -> Any:
    """(2, blocks): of each thread block of the Hopper backward its sequence and the number of its keys, as its preprocess lists them."""
    batch = len(ends) - 1
    count = ends[-1] // block + batch
    made = np.full(2 * count, -1)
    for sequence in range(batch):
        known["list_keys"](Pointer(made), Pointer(ends), Pointer(ends), sequence, batch, count, block)  # type: ignore[arg-type]
    return made.reshape(2, count)


def functions(variant: str) -> dict[str, Callable[..., Any]]:
    """The functions of a rendered kernel that say which block is whose, as Python."""
    op = by_name(variant).op
    text = render(
        AttentionSpec(op=op, dtype="bf16", head_dim=128, head_dim_v=128, causal=True, varlen=True), by_name(variant)
    ).text
    lists = variant == "gluon_bwd_sm90"
    space: dict[str, Any] = {"gl": Language, "tl": Blocks if lists else Language}
    if lists:
        space["sequence"] = lambda ends, b: (ends.values[b], ends.values[b + 1] - ends.values[b])
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in (
            "find_block",
            "tile_of",
            *(["list_keys"] if lists else []),
        ):
            node.decorator_list = []
            exec(textwrap.dedent(ast.unparse(node)), space)
    return space


def tiles_of(variant: str, ends: list[int], block: int, *, ordered: bool = False) -> Iterator[tuple[int, int]]:
    """(sequence, first row or key) of each thread block, or ticket, in the order in which they start."""
    known, batch = functions(variant), len(ends) - 1
    blocks = ends[-1] // block + batch
    if variant.startswith("gluon_bwd"):
        owners, numbers = listed_keys(known, ends, block)
        for number in range(blocks * HEADS):
            owner, n_block = int(owners[number % blocks]), int(numbers[number % blocks])
            length = ends[owner + 1] - ends[owner]
            if ordered and n_block * block < length:  # the last keys of a sequence start first
                n_block = -(-length // block) - 1 - n_block
            yield owner, n_block * block
        return
    for number in range(blocks * HEADS):
        if variant == "gluon_fwd_sm90":
            _, _, _, m_block = known["tile_of"](number, HEADS, 1, blocks, HEADS, 16, 1)
            yield known["find_block"](m_block, Pointer(ends), batch, block)
        elif variant == "triton_bwd":
            yield known["find_block"](number % blocks, Pointer(ends), batch, block)
        else:
            yield known["find_block"](blocks - 1 - number % blocks, Pointer(ends), batch, block)


def work_of(variant: str, length: int, start: int, block: int, causal: bool) -> float:
    """Blocks of the other side that a block meets; rows see the keys before them, keys are seen by the rows behind them."""
    if start >= length:
        return 0.0
    if not causal:
        return OVERHEAD + -(-length // block)
    seen = length - start if by_name(variant).op == "attention_bwd" else min(length, start + block)
    return OVERHEAD + -(-seen // block)


def schedule(works: list[float]) -> tuple[float, float]:
    """(end of the last, ideal): each in its turn to whoever is free first."""
    free = [0.0] * SMS
    for work in works:
        heapq.heapreplace(free, free[0] + work)
    return max(free), max(sum(works) / SMS, max(works, default=0.0))


VARIANTS = {"gluon_fwd_sm90": 128, "triton_fwd": 128, "triton_bwd": 128, "gluon_bwd_sm90": 128}
# The Hopper forward starts the last rows of all heads first; the others one head after another, whose last blocks may begin late.
MOST = {"gluon_fwd_sm90": 1.035, "triton_fwd": 1.11, "triton_bwd": 1.11, "gluon_bwd_sm90": 1.11}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LENGTHS)
def test_every_row_is_some_blocks_and_only_one(variant: str, name: str) -> None:
    block, lengths = VARIANTS[variant], LENGTHS[name]
    ends = [0, *accumulate(lengths)]
    found = [tile for tile in tiles_of(variant, ends, block) if tile[1] < lengths[tile[0]]]
    wanted = [(n, start) for n, length in enumerate(lengths) for start in range(0, length, block)]
    assert sorted(found) == sorted(wanted * HEADS)
    idle = (ends[-1] // block + len(lengths)) * HEADS - len(found)
    assert idle <= len(lengths) * HEADS, "at most one thread block a sequence and head finds nothing to do"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LENGTHS)
def test_unequal_lengths_are_balanced(variant: str, name: str, causal: bool) -> None:
    block, lengths = VARIANTS[variant], LENGTHS[name]
    works = [
        work_of(variant, lengths[n], start, block, causal)
        for n, start in tiles_of(variant, [0, *accumulate(lengths)], block)
    ]
    end, ideal = schedule(works)
    assert end <= ideal + max(works)  # Graham's bound, whatever the order
    assert end / ideal <= MOST[variant]


@pytest.mark.parametrize("name", LENGTHS)
def test_the_ordered_backward_is_balanced_too(name: str) -> None:
    lengths = LENGTHS[name]
    ends = [0, *accumulate(lengths)]
    found = list(tiles_of("gluon_bwd_sm90", ends, 128, ordered=True))
    assert sorted(found) == sorted(tiles_of("gluon_bwd_sm90", ends, 128)), "the same blocks in another order"
    works = [work_of("gluon_bwd_sm90", lengths[n], start, 128, True) for n, start in found]
    end, ideal = schedule(works)
    assert end / ideal <= 1.12


def test_a_thread_block_a_sequence_would_not_be() -> None:
    """The bound tells: whole sequences, or a fixed share of blocks each, leave most multiprocessors waiting."""
    lengths = LENGTHS["one long, last"]
    whole = [
        sum(work_of("triton_fwd", n, start, 128, True) for start in range(0, n, 128))
        for n in lengths
        for _ in range(HEADS)
    ]
    blocks = [
        work_of("triton_fwd", n, start, 128, True) for n in lengths for start in range(0, n, 128) for _ in range(HEADS)
    ]
    end, _ = schedule(whole)
    ideal = sum(blocks) / SMS
    assert end / ideal > 2
    share = -(-len(blocks) // SMS)
    static = max(sum(blocks[first : first + share]) for first in range(0, len(blocks), share))
    assert static / ideal > 1.5
