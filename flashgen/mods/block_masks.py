"""PyTorch's `BlockMask`, as given, as the ranges that kernels walk."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashgen.mods.ranges import KeyRanges, Rows

Array = Any


def key_ranges_of(
    block_mask: Any, *, seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, turned: bool = False
) -> KeyRanges:
    """The keys that a BlockMask lists for each block of queries.

    Listed blocks are visited and no others; those among the full ones need no mask. The tile may be smaller or larger than the
    mask's blocks: a tile that reaches into several is full only if all are.

    Args:
        block_mask: `torch.nn.attention.flex_attention.BlockMask`; its lists are copied to the host.
        seqlen_q, seqlen_k: lengths of the call.
        block_m, block_n: the tile.
        turned: the queries of each block of keys instead, as in `query_ranges`.

    Returns:
        Ranges of shape (B, H, blocks of queries) with the mask's own B and H, either of which may be 1.
    """
    size_q, size_k = block_mask.BLOCK_SIZE
    kinds = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, -(-seqlen_k // size_k)).astype(np.int8)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, kinds.shape[-1])
        kinds = np.where(full, np.int8(2), kinds)
    kinds = _regrouped(kinds, 2, seqlen_q, size_q, block_m)
    kinds = _regrouped(kinds, 3, seqlen_k, size_k, block_n)
    if turned:
        kinds, seqlen_k, block_n = kinds.swapaxes(2, 3).copy(), seqlen_q, block_m
    if seqlen_k % block_n:
        kinds[..., -1] = np.minimum(kinds[..., -1], 1)  # a block that is not full of keys needs its bounds masked
    batch, heads = kinds.shape[:2]
    parts = [Rows.of_classes(kinds[b, h]) for b in range(batch) for h in range(heads)]
    return KeyRanges.stacked(parts, (batch, heads), block_n)


def _listed(counts: Any, lists: Any, columns: int) -> Array:
    """Whether each block of keys stands among the first `counts` entries of a row's list."""
    count, listed = counts.detach().cpu().numpy(), lists.detach().cpu().numpy()
    there = np.arange(listed.shape[-1]) < count[..., None]
    found = np.zeros((*count.shape, columns + 1), bool)  # a last column for what does not count
    np.put_along_axis(found, np.where(there & (listed < columns), listed, columns), True, -1)
    return found[..., :columns]


def _regrouped(kinds: Array, axis: int, length: int, size: int, block: int) -> Array:
    """Classes of blocks of `size` along an axis as those of blocks of `block`."""
    first = np.arange(0, length, block)
    last = np.minimum(first + block, length) - 1
    start, stop = first // size, last // size
    lows = highs = np.take(kinds, start, axis)
    for step in range(1, int((stop - start).max(initial=0)) + 1):
        part = np.take(kinds, np.minimum(start + step, stop), axis)
        lows, highs = np.minimum(lows, part), np.maximum(highs, part)
    return np.where(lows == 2, 2, np.minimum(highs, 1)).astype(np.int8)
