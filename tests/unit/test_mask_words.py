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
    "nothing": lambda b, h, i, j: j < 0,
    "all": lambda b, h, i, j: j >= 0,
}


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    block_ranges.forget()
    yield
    block_ranges.forget()


def looked_up(
    program: Any, tensors: Any, problem: Problem = PROBLEM, tile: tuple[int, int] = (64, 64)
) -> tuple[Tensor | None, Tensor | None]:
    found = block_ranges.looked_up(program, tensors, problem, tile)
    assert found["mask_lists"] is None
    return found["mask_ranges"], found["mask_words"]


def made(mask: Callable[..., Any], problem: Problem = PROBLEM, block: int = 64) -> tuple[Tensor, Tensor]:
    program, tensors = mods.program(None, {"mask_mod": mask}, CPU)
    found = block_ranges.looked_up(program, tensors, problem, (64, block))
    table, words = found["mask_ranges"], found["mask_words"]
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
        table, words = looked_up(program, tensors, problem, (64, 128))
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
    table, words = looked_up(program, tensors)
    assert words is None and table is not None and table[..., 4].max() < 0


def test_words_of_another_content_are_not_used() -> None:
    """A write that PyTorch does not count: every block is masked, and the table says that its words count for nothing."""
    ids = IDS.clone()
    program, tensors = mods.program(None, {"mask_mod": lambda b, h, i, j: ids[i] == ids[j]}, CPU)
    first, words = looked_up(program, tensors)
    np.asarray(ids)[:] = 7
    second, same = looked_up(program, tensors)
    assert first is not None and second is not None and same is words
    assert first[..., 4].min() >= 1 and second[..., 4].max() == -1
    assert second[..., :4].tolist() == [[[[0, 6, 6, 6]] * 4]]
    ids += 1  # counted: analysed anew
    third, others = looked_up(program, tensors)
    assert third is not None and others is not words and third[..., 4].min() >= 1


def test_a_score_that_reads_a_tensor_beside_a_mask_that_does_not() -> None:
    table = torch.rand(3)
    program, tensors = mods.program(lambda s, b, h, i, j: s + table[h], {"mask_mod": MASKS["causal"]}, CPU)
    assert looked_up(program, tensors)[1] is not None


# -- lists --

SCATTERED: dict[str, Callable[..., Any]] = {
    "every fourth block": lambda b, h, i, j: (i // 64 - j // 64) % 4 == 0,
    "sinks and a window": lambda b, h, i, j: (j < 4) | ((i - j).abs() < 100),
    "whole blocks, by heads": lambda b, h, i, j: (i // 128 + j // 128 + h) % 3 == 0,
    "rows that see nothing": lambda b, h, i, j: ((i // 64 - j // 64) % 4 == 0) & (i >= 300) & (i < 600),
    "a tensor": lambda b, h, i, j: KINDS[i // 64] == KINDS[j // 64],
}
KINDS = torch.tensor([0, 1, 2, 3, 0, 2, 1, 3, 0, 0, 1, 1, 2, 3, 2, 0], dtype=torch.int32)
LONG = replace(PROBLEM, seqlen_q=900, seqlen_k=1000, num_heads_q=3, num_heads_kv=3)


@pytest.mark.parametrize("tile", [(128, 64), (192, 64), (128, 128)])
@pytest.mark.parametrize("name", SCATTERED)
def test_lists_and_words_together_are_the_mask(name: str, tile: tuple[int, int]) -> None:
    program, tensors = mods.program(None, {"mask_mod": SCATTERED[name]}, CPU)
    found = block_ranges.looked_up(program, tensors, LONG, tile)
    table, words = found["mask_lists"], found["mask_words"]
    if table is None and tile != (128, 64) and name != "sinks and a window":
        return  # of such wide tiles most are seen
    assert table is not None and words is not None and found["mask_ranges"] is None
    p, groups, (rows, block) = LONG, tile[0] // 64, tile
    i, j = torch.arange(p.seqlen_q)[:, None], torch.arange(p.seqlen_k)[None]
    assert not words[:groups].any()
    for h in range(p.num_heads_q):
        seen = torch.zeros(-(-p.seqlen_q // rows) * rows, -(-p.seqlen_k // block) * block, dtype=torch.bool)
        for m, (masked, full, place, _, *blocks) in enumerate(table[0, h % table.shape[1]].tolist()):
            assert masked + full >= 1 and len(set(blocks[: masked + full])) == masked + full
            for index, n in enumerate(blocks[: masked + full]):
                for w in range(groups):
                    part = seen[m * rows + 64 * w : m * rows + 64 * w + 64, n * block : n * block + block]
                    part.copy_(
                        unpacked(words[place + index * groups + w], block) if index < masked else torch.tensor(True)
                    )
        want = SCATTERED[name](torch.tensor(0), torch.tensor(h), i, j).expand(p.seqlen_q, p.seqlen_k)
        assert torch.equal(seen[: p.seqlen_q, : p.seqlen_k], want)
        assert not seen[:, p.seqlen_k :].any()


def test_masks_without_gaps_have_no_lists() -> None:
    for name in ("causal", "documents", "nothing", "all", "columns"):
        program, tensors = mods.program(None, {"mask_mod": MASKS[name]}, CPU)
        assert block_ranges.looked_up(program, tensors, PROBLEM, (128, 64))["mask_lists"] is None, name


def test_beside_a_diagonal_there_are_no_lists() -> None:
    program, tensors = mods.program(None, {"mask_mod": SCATTERED["every fourth block"]}, CPU)
    for other in ({"causal": True}, {"window_size": (5, 5)}):
        assert block_ranges.looked_up(program, tensors, replace(LONG, **other), (128, 64))["mask_lists"] is None


def test_a_list_of_another_content_says_so() -> None:
    kinds = KINDS.clone()
    program, tensors = mods.program(None, {"mask_mod": lambda b, h, i, j: kinds[i // 64] == kinds[j // 64]}, CPU)
    before = block_ranges.looked_up(program, tensors, LONG, (128, 64))
    np.asarray(kinds)[3] = 2
    after = block_ranges.looked_up(program, tensors, LONG, (128, 64))
    first, second = before["mask_lists"], after["mask_lists"]
    assert first is not None and second is not None and after["mask_words"] is before["mask_words"]
    assert first[..., 2].min() >= 0 and second[..., 2].max() == -1


def test_longer_tiles_come_first() -> None:
    """Tickets count down: the last line names the tile with the most blocks; every tile has a turn."""
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([300, 40, 500, 20, 140]))
    documents = mods.program(None, {"mask_mod": lambda b, h, i, j: (ids[i] == ids[j]) & (j <= i)}, CPU)
    stripes = mods.program(None, {"mask_mod": lambda b, h, i, j: ((i // 64 - j // 64) % 4 == 0) & (j <= i)}, CPU)
    for (program, tensors), name in ((documents, "mask_ranges"), (stripes, "mask_lists")):
        table = block_ranges.looked_up(program, tensors, LONG, (128, 64))[name]
        assert table is not None
        lines = table[0, 0]
        if name == "mask_lists":
            turns, lengths = lines[:, 3].tolist(), (lines[:, 0] + lines[:, 1]).tolist()
        else:
            turns = lines[:8, 5].tolist()
            pairs = [lines[2 * m : 2 * m + 2] for m in range(8)]
            lengths = [int(pair[:, 3].max() - pair[:, 0].min()) for pair in pairs]
        assert sorted(turns) == list(range(8)) and [lengths[m] for m in turns] == sorted(lengths)
        assert turns != sorted(turns)


# -- on the host --


@pytest.mark.parametrize("tile", [(128, 32), (128, 64), (192, 64), (128, 128)])
@pytest.mark.parametrize("name", [*MASKS, *SCATTERED, "floats"])
def test_the_host_and_the_device_give_the_same_bits(
    name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = {**MASKS, **SCATTERED}.get(name, lambda b, h, i, j: (i - j) * 0.5 < 9.25)
    program, tensors = mods.program(None, {"mask_mod": mask}, CPU)
    here: list[int] = []
    evaluate = mask_words._evaluated_here
    monkeypatch.setattr(mask_words, "_AT_ONCE_HERE", 3 * 64 * tile[1])  # several steps
    monkeypatch.setattr(mask_words, "_evaluated_here", lambda *a: here.append(1) or evaluate(*a))
    one = block_ranges.looked_up(program, tensors, LONG if name in SCATTERED else PROBLEM, tile)
    assert len(here) == (name != "floats"), "numbers that round are left to what rounds them like the kernel"
    block_ranges.forget()
    monkeypatch.setattr(mask_words, "_HERE", -1)
    other = block_ranges.looked_up(program, tensors, LONG if name in SCATTERED else PROBLEM, tile)
    assert len(here) == (name != "floats")
    for key, value in one.items():
        assert (value is None) == (other[key] is None), key
        assert value is None or (torch.equal(value, other[key]) and value.dtype == torch.int32), key  # type: ignore[arg-type]
