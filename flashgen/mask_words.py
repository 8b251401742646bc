"""Masks as bits: of each tile of scores that a mask hides in part, a word for each row and each of the four lanes that hold it.

What a mask says of a tile is evaluated once, on the device, and looked up by the kernel, whatever the mask computes. Only tiles that are
neither empty nor full are kept, so that causality, windows, prefixes, chunks and sorted documents take memory in proportion to the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 64  # of a tile: those of one warpgroup
LANES = 4  # lanes that hold a row; each has two columns of every eight
WIDTH = 8  # of a row of the table
_MOST_A_ROW = (
    32  # masked tiles of a block of rows, on average: beyond it a mask is dense in them, and words would take O(S^2)
)
_MOST_WORDS = 1 << 23  # 32 MB of one mask
_MOST_SLOTS = 1 << 20  # 4 MB of one mask
_MASKED = 0.3  # what a masked block costs beyond an unmasked one
_SAVES = 0.9  # of the time of ranges: what lists must be below to be worth it
_AT_ONCE = 1 << 21  # scores that are evaluated at a time
# Scores up to which integers are evaluated on the host, since a GPU first loads each operation, some milliseconds each; and how many of them
# at a time, so that they stay in the cache.
_HERE, _AT_ONCE_HERE = 1 << 22, 1 << 17


@dataclass(frozen=True, slots=True)
class Tables:
    """What a kernel walks over, and what it looks up.

    Attributes:
        table: int32 (batch or 1, num_heads or 1, ...), a size of 1 standing for all. Of ranges (..., blocks of 64 queries, 8): the first block
            of keys, the first and the end of those where nothing is hidden, the end, where the words start, and of as many lines as there are
            tiles of queries the tile whose turn it is; of lists (..., tiles of queries, 4 and more): how many blocks have to be masked
            and how many need no mask, where the words start, the tile whose turn it is, and the blocks in this order. No words: -1.
        words: int32 (tiles, 64, 4). Bit 2 k + e of a row's word l is column 8 k + 2 l + e of a block. Of ranges each masked block has a tile, in
            order; of lists one for each 64 queries of the tile. The first hide everything. None where they would be too many.
        listed: whether the table holds lists.
        slots: int32 (batch or 1, num_heads or 1, blocks of 64 queries, blocks of keys, padded to sixteen): the tile of words of each, -1 where
            all is seen. None without words, and where they would be too many.
    """

    table: Tensor
    words: Tensor | None
    listed: bool
    slots: Tensor | None = None


def of_ranges(
    found: Any, program: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], tile: int, device: str
) -> Tables:
    """Tables of a mask whose blocks lie in a row, or are to be treated so.

    Args:
        found: `mods.KeyRanges` of blocks of 64 queries.
        program: the traced mods.
        tensors: what they capture.
        sizes: batch, num_heads, seqlen_q, seqlen_k, 64, and the keys of a block, 128 at most.
        tile: queries of a thread block.
        device: of the words; the table is made on the CPU.
    """
    first, full_first, full_end, end = (
        torch.as_tensor(x).long() for x in (found.first, found.full_first, found.full_last, found.last)
    )
    table = torch.full((*first.shape, WIDTH), -1, dtype=torch.int32)
    table[..., :4] = torch.stack([first, full_first, full_end, end], -1)
    table[..., : -(-first.shape[2] // (tile // ROWS)), 5] = _turns(found.first, found.last, tile // ROWS)
    before, after = (full_first - first).flatten(), (end - full_end).flatten()
    counts = before + after
    total = int(counts.sum())
    if sizes[5] > 128 or total > _MOST_A_ROW * counts.numel() or (total + 1) * ROWS * LANES > _MOST_WORDS:
        return Tables(table, None, False)
    places = 1 + counts.cumsum(0) - counts
    table[..., 4] = places.view(first.shape)
    line = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(total) - (places - 1)[line]
    lower, upper = first.flatten()[line] + within, full_end.flatten()[line] + within - before[line]
    key = torch.where(within < before[line], lower, upper)
    words = _words(program, tensors, _tiles(line, first.shape, key), 1, sizes, device)
    return Tables(table, words, False, _slots_of_ranges(table[..., :5].numpy(), sizes))


def of_lists(
    found: Any, program: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], tile: int, device: str
) -> Tables | None:
    """Tables of a mask whose blocks are scattered; None where lists would save little, or would need too many words.

    Args:
        found, program, tensors, sizes, tile, device: as in `of_ranges`; a thread block walks over one list.
    """
    groups = tile // ROWS
    batch, heads, rows = found.first.shape
    where = np.nonzero(np.arange(found.segment_start.shape[-1]) < found.segment_count[..., None])
    start, stop, full = (
        x[where].astype(np.int64) for x in (found.segment_start, found.segment_stop, found.segment_full)
    )
    length = stop - start
    line = np.repeat((where[0] * heads + where[1]) * rows + where[2], length)
    key = np.repeat(start, length) + np.arange(len(line)) - np.repeat(np.cumsum(length) - length, length)
    blocks, tiles = int(found.last.max(initial=0)), -(-rows // groups)
    owner = line // rows * tiles + line % rows // groups
    place, times = np.unique(owner * max(1, blocks) + key, return_inverse=True)
    seen_full = np.bincount(times.reshape(-1), weights=np.repeat(full, length), minlength=len(place)).astype(np.int64)
    owner, key = place // max(1, blocks), place % max(1, blocks)
    is_masked = seen_full < np.minimum(groups, rows - owner % tiles * groups)
    spans = found.last.astype(np.int64) - found.first
    whole = found.full_last.astype(np.int64) - found.full_first
    in_order = spans.sum() + (spans - whole).sum() * _MASKED
    listed = groups * (len(key) + is_masked.sum() * _MASKED)
    total = int(is_masked.sum()) * groups
    if (
        listed > _SAVES * in_order
        or total > _MOST_A_ROW * batch * heads * rows
        or (total + groups) * ROWS * LANES > _MOST_WORDS
    ):
        return None
    order = np.lexsort((key, ~is_masked, owner))
    owner, key, is_masked = owner[order], key[order], is_masked[order]
    every = batch * heads * tiles
    masked, all_of = np.bincount(owner[is_masked], minlength=every), np.bincount(owner, minlength=every)
    # Whoever sees nothing works on a block whose words hide all of it.
    empty = all_of == 0
    table = np.zeros((every, 4 + max(1, int(all_of.max(initial=0)))), np.int32)
    table[:, 0], table[:, 1] = np.where(empty, 1, masked), all_of - masked
    table[:, 2] = np.where(empty, 0, groups * (1 + np.cumsum(masked) - masked))
    table[owner, 4 + np.arange(len(owner)) - np.repeat(np.cumsum(all_of) - all_of, all_of)] = key
    table[:, 3] = _by_turn(all_of.reshape(batch, heads, tiles)).reshape(-1)
    # A tile of words for each 64 queries of a masked block.
    line = (owner[is_masked] // tiles * tiles * groups + owner[is_masked] % tiles * groups).repeat(groups)
    line += np.tile(np.arange(groups), int(is_masked.sum()))
    shape = torch.Size((batch, heads, tiles * groups))
    at = _tiles(torch.from_numpy(line), shape, torch.from_numpy(key[is_masked].repeat(groups)))
    made = torch.from_numpy(table).view(batch, heads, tiles, -1)
    words = _words(program, tensors, at, groups, sizes, device)
    slots = _no_slots((batch, heads, tiles * groups), sizes)
    if slots is not None:
        place = (np.arange(len(owner)) - (np.cumsum(all_of) - all_of)[owner]) * groups + table[owner, 2]
        within = slots.reshape(every, groups, -1)
        for group in range(groups):
            within[owner, group, key] = np.where(is_masked, place + group, -1)
    return Tables(made, words, True, None if slots is None else torch.from_numpy(slots))


def _no_slots(lines: tuple[int, int, int], sizes: tuple[int, ...]) -> Any:
    """Slots of a mask that hides everything, which the first words say; None where they would be too many."""
    blocks = -(-sizes[3] // sizes[5])
    shape = (*lines, blocks + -blocks % 16)  # of a stride that Triton need not compile for anew
    return np.zeros(shape, np.int32) if np.prod(shape, dtype=np.int64) <= _MOST_SLOTS else None


def _slots_of_ranges(table: Any, sizes: tuple[int, ...]) -> Tensor | None:
    """Slots of (batch, num_heads, lines, 5): the first block, first and end of the unmasked, the end, where the words start."""
    slots = _no_slots(table.shape[:3], sizes)
    if slots is None:
        return None
    first, full_first, full_end, end, place = (table[..., number, None] for number in range(5))
    block = np.arange(slots.shape[-1], dtype=np.int32)
    at = place + block - first - np.where(block >= full_end, full_end - full_first, 0)
    at = np.where((block >= full_first) & (block < full_end), -1, at)
    return torch.from_numpy(np.where((block >= first) & (block < end), at, 0))


def _turns(first: Any, last: Any, groups: int) -> Tensor:
    """Which tile of queries each ticket takes: (batch or 1, num_heads or 1, tiles)."""
    missing = -first.shape[2] % groups

    def grouped(x: Any, other: int) -> Any:
        padded = np.pad(np.where(last > first, x, other), ((0, 0), (0, 0), (0, missing)), constant_values=other)
        return padded.reshape(*first.shape[:2], -1, groups)

    start, stop = grouped(first, int(last.max(initial=0))).min(-1), grouped(last, 0).max(-1)
    return torch.from_numpy(_by_turn(stop - np.minimum(start, stop)))


def _by_turn(lengths: Any) -> Any:
    """The tiles in the order of their lengths; the longest last, since tickets count down. What is equal stays in order."""
    return np.argsort(lengths, axis=-1, kind="stable").astype(np.int32)


def _tiles(line: Tensor, shape: torch.Size, key: Tensor) -> Tensor:
    """(4, tiles) batch, head, block of 64 queries and block of keys; `line` counts the blocks of queries of all heads."""
    row = line % shape[2]
    return torch.stack([line // shape[2] // shape[1], line // shape[2] % shape[1], row, key])


def _words(
    program: Any, tensors: tuple[Tensor, ...], tiles: Tensor, zeros: int, sizes: tuple[int, ...], device: str
) -> Tensor:
    """The words of tiles, behind `zeros` that hide everything: evaluated on their device, or on the host where that is little work."""
    total = tiles.shape[1]
    if total * ROWS * sizes[5] <= _HERE and _of_integers(program.mask):
        return _evaluated_here(program, tensors, tiles, zeros, sizes).to(device)
    words = torch.zeros((total + zeros, ROWS, LANES), dtype=torch.int32, device=device)
    step = max(1, _AT_ONCE // (ROWS * sizes[5]))
    for start in range(0, total, step):
        part = tiles[:, start : start + step].int().to(device)
        words[zeros + start : zeros + start + part.shape[1]] = _packed(_visible(program, tensors, part, sizes))
    return words


def _visible(program: Any, tensors: tuple[Tensor, ...], tiles: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(tiles, 64, keys) what each query of some tiles sees."""
    from flashgen.mods import in_torch

    _, _, seqlen_q, seqlen_k, _, block = sizes
    b, h, row, key = (x[:, None, None] for x in tiles)
    q_idx = row * ROWS + torch.arange(ROWS, dtype=torch.int32, device=tiles.device)[None, :, None]
    kv_idx = key * block + torch.arange(block, dtype=torch.int32, device=tiles.device)[None, None, :]
    # Of a mask that reads none of them, the captured tensors of a score need not be there.
    captured = tensors or (None,) * len(program.captures)
    seen: Tensor = in_torch.function(program.mask, program.captures)(b, h, q_idx, kv_idx, *captured)
    seen = seen & (q_idx < seqlen_q) & (kv_idx < seqlen_k)
    return seen.expand(tiles.shape[1], ROWS, block)


def _packed(seen: Tensor) -> Tensor:
    """(tiles, 64, 4) the bits of (tiles, 64, keys)."""
    tiles, rows, block = seen.shape
    lanes = seen.view(tiles, rows, block // 8, LANES, 2).transpose(2, 3).reshape(tiles, rows, LANES, block // 4)
    bits = torch.tensor([1 << bit for bit in range(block // 4)], dtype=torch.int64, device=seen.device)
    found = (lanes * bits).sum(-1)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).int()


# -- on the host --


def _of_integers(mask: Any) -> bool:
    """Whether a mask has no numbers that round: those are left to what rounds them like the kernel."""
    from flashgen.mods.graph import ordered

    return not any(node.dtype.startswith(("float", "bfloat")) for node in ordered(mask))


def _evaluated_here(
    program: Any, tensors: tuple[Tensor, ...], tiles: Tensor, zeros: int, sizes: tuple[int, ...]
) -> Tensor:
    """The words, evaluated by NumPy."""
    from flashgen.mods import arrays_of, semantics

    _, _, seqlen_q, seqlen_k, _, block = sizes
    tables = arrays_of(tensors, program.mask_reads)
    numbers = tiles.numpy().astype(np.int32)
    words = np.zeros((numbers.shape[1] + zeros, ROWS, LANES), np.int32)
    rows = np.arange(ROWS, dtype=np.int32)[None, :, None]
    # In the order of the bits of a row's four words, which so come one after the other.
    columns = np.arange(block, dtype=np.int32).reshape(block // 8, LANES, 2).transpose(1, 0, 2).reshape(1, 1, block)
    step = max(1, _AT_ONCE_HERE // (ROWS * block))
    for start in range(0, numbers.shape[1], step):
        b, h, row, key = (x[:, None, None] for x in numbers[:, start : start + step])
        q_idx, kv_idx = row * np.int32(ROWS) + rows, key * np.int32(block) + columns
        inputs = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        seen = semantics.evaluate(program.mask, inputs, tables) & (q_idx < seqlen_q) & (kv_idx < seqlen_k)
        lanes = np.broadcast_to(seen, (len(b), ROWS, block)).reshape(len(b), ROWS, LANES, block // 4)
        bits = np.packbits(lanes, -1, "little")
        padded = np.zeros((len(b), ROWS, LANES, 4), np.uint8)
        padded[..., : bits.shape[-1]] = bits
        words[zeros + start : zeros + start + len(b)] = padded.view("<i4")[..., 0]
    return torch.from_numpy(words)
