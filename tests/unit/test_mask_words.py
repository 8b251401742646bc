"""Masks as words: every bit is the mask's, no more tiles than a mask hides in part, and none of a content that is no longer there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashgen import block_ranges, mask_words, mods
from flashgen.problem import Problem

CPU = torch.device("cpu")
PROBLEM = Problem(
    dtype="bf16", batch=2, seqlen_q=200, seqlen_k=333, num_heads_q=3, num_heads_kv=3, head_dim=64, head_dim_v=64, has_mask_mod=True,
)  # fmt: skip
IDS = torch.tensor([0] * 70 + [1] * 3 + [2] * 260, dtype=torch.int32)
MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: j <= i,
    "documents": lambda b, h, i, j: IDS[i] == IDS[j],
    "columns": lambda b, h, i, j: j % 3 != 1,
    "heads": lambda b, h, i, j: (i - j < 20 * (h + 1)) & (j < 300 - 100 * b),
    "two ranges": lambda b, h, i, j: (j < 4) | ((i - j).abs() < 9),
    "nothing": lambda b, h, i, j: j < 0,
    "all": lambda b, h, i, j: j >= 0,
}


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    block_ranges.forget()
    yield
    block_ranges.forget()


def made(mask: Callable[..., Any], problem: Problem = PROBLEM, block: int = 64) -> tuple[Tensor, Tensor]:
    program, tensors = mods.program(None, {"mask_mod": mask}, CPU)
    table, words = block_ranges.ranges_and_words(program, tensors, problem, (64, block))
    assert table is not None and words is not None
    return table, words


def unpacked(words: Tensor, block: int) -> Tensor:
    """(64, keys) of a tile's words."""
    keys = torch.arange(block)
    return (words[:, keys % 8 // 2] >> (2 * (keys // 8) + keys % 2)) & 1 != 0


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_ranges_and_words_together_are_the_mask(name: str, block: int) -> None:
    table, words = made(MASKS[name], block=block)
    p = PROBLEM
    i, j = torch.arange(p.seqlen_q)[:, None], torch.arange(p.seqlen_k)[None]
    stored = 0
    for b in range(p.batch):
        for h in range(p.num_heads_q):
            one = table[b % table.shape[0], h % table.shape[1]]
            seen = torch.zeros(-(-p.seqlen_q // 64) * 64, -(-p.seqlen_k // block) * block, dtype=torch.bool)
            for row, (first, full_first, full_end, end, place, *_) in enumerate(one.tolist()):
                for n in range(first, end):
                    tile = seen[row * 64 : row * 64 + 64, n * block : n * block + block]
                    if full_first <= n < full_end:
                        tile.fill_(True)
                    else:
                        tile.copy_(unpacked(words[place], block))
                        place, stored = place + 1, stored + 1
            want = MASKS[name](torch.tensor(b), torch.tensor(h), i, j).expand(p.seqlen_q, p.seqlen_k)
            assert torch.equal(seen[: p.seqlen_q, : p.seqlen_k], want)
            # Keys that do not exist are hidden from all rows.
            assert not seen[:, p.seqlen_k :].any()
    copies = p.batch // table.shape[0] * (p.num_heads_q // table.shape[1])
    assert stored == (len(words) - 1) * copies and not words[0].any()


@pytest.mark.parametrize(("name", "tiles"), [("causal", 2), ("documents", 5), ("columns", None)])
def test_memory_grows_with_the_length(name: str, tiles: int | None) -> None:
    """Of masks that hide few tiles in part; one that hides some of every tile has no words at all where it is long."""
    length = 1 << 14
    global IDS
    before, IDS = IDS, (torch.arange(length) // 1000).to(torch.int32)
    try:
        program, tensors = mods.program(None, {"mask_mod": MASKS[name]}, CPU)
        problem = replace(PROBLEM, seqlen_q=length, seqlen_k=length)
        table, words = block_ranges.ranges_and_words(program, tensors, problem, (64, 128))
    finally:
        IDS = before
    assert table is not None
    if tiles is None:
        assert words is None and bool((table[..., 4] == -1).all())
    else:
        assert words is not None and len(words) <= 1 + tiles * length // 64


def test_too_many_words_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_words, "_MOST_WORDS", 3 * 64 * 4)
    program, tensors = mods.program(None, {"mask_mod": MASKS["causal"]}, CPU)
    table, words = block_ranges.ranges_and_words(program, tensors, PROBLEM, (64, 64))
    assert words is None and table is not None and table[..., 4].max() < 0


def test_words_of_another_content_are_not_used() -> None:
    """A write that PyTorch does not count: every block is masked, and the table says that its words count for nothing."""
    ids = IDS.clone()
    program, tensors = mods.program(None, {"mask_mod": lambda b, h, i, j: ids[i] == ids[j]}, CPU)
    first, words = block_ranges.ranges_and_words(program, tensors, PROBLEM, (64, 64))
    np.asarray(ids)[:] = 7
    second, same = block_ranges.ranges_and_words(program, tensors, PROBLEM, (64, 64))
    assert first is not None and second is not None and same is words
    assert first[..., 4].min() >= 1 and second[..., 4].max() == -1
    assert second[..., :4].tolist() == [[[[0, 6, 6, 6]] * 4]]
    ids += 1  # counted: analysed anew
    third, others = block_ranges.ranges_and_words(program, tensors, PROBLEM, (64, 64))
    assert third is not None and others is not words and third[..., 4].min() >= 1


def test_a_score_that_reads_a_tensor_beside_a_mask_that_does_not() -> None:
    table = torch.rand(3)
    program, tensors = mods.program(lambda s, b, h, i, j: s + table[h], {"mask_mod": MASKS["causal"]}, CPU)
    assert block_ranges.ranges_and_words(program, tensors, PROBLEM, (64, 64))[1] is not None


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("name", [*MASKS, "floats"])
def test_the_host_and_the_device_give_the_same_bits(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = MASKS.get(name, lambda b, h, i, j: (i - j) * 0.5 < 9.25)
    here: list[int] = []
    evaluate = mask_words._evaluated_here
    monkeypatch.setattr(mask_words, "_AT_ONCE_HERE", 3 * 64 * block)  # several steps
    monkeypatch.setattr(mask_words, "_evaluated_here", lambda *a: here.append(1) or evaluate(*a))
    table, words = made(mask, block=block)
    assert len(here) == (name != "floats"), "numbers that round are left to what rounds them like the kernel"
    block_ranges.forget()
    monkeypatch.setattr(mask_words, "_HERE", -1)
    other, others = made(mask, block=block)
    assert len(here) == (name != "floats")
    assert torch.equal(table, other) and torch.equal(words, others) and words.dtype == others.dtype
