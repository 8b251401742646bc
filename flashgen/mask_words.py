"""Masks as bits: of each tile of scores that a mask hides in part, a word for each row and each of the four lanes that hold it.

What a mask says of a tile is evaluated once, on the device, and looked up by the kernel, whatever the mask computes. Only tiles that are
neither empty nor full are kept, so that causality, windows, prefixes, chunks and sorted documents take memory in proportion to the length.
"""

from __future__ import annotations

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
_AT_ONCE = 1 << 21  # scores that are evaluated at a time
_HERE = (
    1 << 22
)  # scores up to which integers are evaluated on the host: a GPU first loads each operation, some milliseconds each
_AT_ONCE_HERE = 1 << 17  # of those at a time, so that they stay in the cache


def add(
    table: Tensor, program: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], device: str
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a mask in the tiles that it hides in part: on its device, or where that is little work, of integers alone, on the host.

    Args:
        table: on the host, int32 (batch or 1, num_heads or 1, blocks of 64 queries, 4): first block of keys, first and end of those where nothing is
            hidden, end.
        program: the traced mods.
        tensors: what they capture.
        sizes: batch, num_heads, seqlen_q, seqlen_k, 64, and the keys of a block, 128 at most.
        device: of the words.

    Returns:
        The table, on the host, with rows of 8, of which the fifth says where the words of a block of queries start, -1 for nowhere; and the words, int32
        (tiles + 1, 64, 4), the first of which hide everything; None where they would be too many. Bit 2 k + e of a row's word l is
        column 8 k + 2 l + e.
    """
    wide = torch.full((*table.shape[:3], WIDTH), -1, dtype=torch.int32)
    wide[..., :4] = table
    block = sizes[5]
    first, full_first, full_end, end = table.long().unbind(-1)
    before, after = (full_first - first).flatten(), (end - full_end).flatten()
    counts = before + after
    total = int(counts.sum())
    if block > 128 or total > _MOST_A_ROW * counts.numel() or (total + 1) * ROWS * LANES > _MOST_WORDS:
        return wide, None
    places = 1 + counts.cumsum(0) - counts
    wide[..., 4] = places.view(first.shape).int()
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(total) - (places - 1)[row]
    key = torch.where(
        within < before[row], first.flatten()[row] + within, full_end.flatten()[row] + within - before[row]
    )
    tiles = torch.stack(
        [row // first.shape[2] // first.shape[1], row // first.shape[2] % first.shape[1], row % first.shape[2], key]
    )
    if total * ROWS * block <= _HERE and _of_integers(program.mask):
        return wide, _evaluated_here(program, tensors, tiles, sizes).to(device)
    words = torch.zeros((total + 1, ROWS, LANES), dtype=torch.int32, device=device)
    step = max(1, _AT_ONCE // (ROWS * block))
    for start in range(0, total, step):
        part = tiles[:, start : start + step].int().to(device)
        words[1 + start : 1 + start + part.shape[1]] = _packed(_visible(program, tensors, part, sizes))
    return wide, words


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
    from flashgen.mods.graph import ordered

    return not any(node.dtype.startswith(("float", "bfloat")) for node in ordered(mask))


def _evaluated_here(program: Any, tensors: tuple[Tensor, ...], tiles: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The words, evaluated by NumPy."""
    from flashgen.mods import arrays_of, semantics

    _, _, seqlen_q, seqlen_k, _, block = sizes
    tables = arrays_of(tensors, program.mask_reads)
    numbers = tiles.numpy().astype(np.int32)
    words = np.zeros((numbers.shape[1] + 1, ROWS, LANES), np.int32)
    rows, columns = np.arange(ROWS, dtype=np.int32)[None, :, None], np.arange(block, dtype=np.int32)[None, None, :]
    step = max(1, _AT_ONCE_HERE // (ROWS * block))
    for start in range(0, numbers.shape[1], step):
        b, h, row, key = (x[:, None, None] for x in numbers[:, start : start + step])
        q_idx, kv_idx = row * np.int32(ROWS) + rows, key * np.int32(block) + columns
        inputs = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        seen = semantics.evaluate(program.mask, inputs, tables) & (q_idx < seqlen_q) & (kv_idx < seqlen_k)
        lanes = np.broadcast_to(seen, (len(b), ROWS, block)).reshape(len(b), ROWS, block // 8, LANES, 2)
        bits = np.packbits(lanes.transpose(0, 1, 3, 2, 4).reshape(len(b), ROWS, LANES, block // 4), -1, "little")
        padded = np.zeros((len(b), ROWS, LANES, 4), np.uint8)
        padded[..., : bits.shape[-1]] = bits
        words[1 + start : 1 + start + len(b)] = padded.view("<i4")[..., 0]
    return torch.from_numpy(words)
