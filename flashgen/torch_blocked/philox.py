"""Dropout's random numbers, defined once for every backend: Philox4x32-10 with a counter of (b, h, i, j).

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter and a 64-bit key
to four 32-bit words. flashgen's dropout uses

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (16-group column, 16-group row, b * num_heads_q + h, offset low 32 bits)

where row i belongs to counter word 1 = (i // 16) * 8 + i % 8 and column j to counter word 0 = (j // 16) * 8 + j % 8. The
four words of one call cover the four elements {i, i + 8} x {j, j + 8}: word 2 * (i // 8 % 2) + j // 8 % 2 is element
(i, j)'s. In the accumulator layout of NVIDIA's tensor cores (mma m16n8 and wgmma) one thread holds rows r and r + 8 and
columns c and c + 8, so it needs every word it draws, in the forward (queries x keys) and transposed in the backward.

Of the offset only the low 32 bits count, so offsets 2^32 apart give the same mask; of the seed all 64 do. b * num_heads_q + h counts
modulo 2^32. An element is kept when its word is at least round(dropout_p * 2^32): dropout_p is rounded to a multiple of 2^-32,
and one so close to 1 that it rounds to 2^32 keeps nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def _mulhilo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * x, both below 2^32, in int64 without overflow of what is kept."""
    low_part, high_part = a * (x & 0xFFFF), a * (x >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = ((high_part << 16) + low_part) & _MASK
    return high, low


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words per counter, each an int64 tensor of values below 2^32.

    Args:
        counter: four broadcastable int64 tensors of values below 2^32.
        key: two, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def keep_mask(philox: Tensor, dropout_p: float, heads: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Which elements dropout keeps.

    Args:
        philox: (2,) int64: seed and offset.
        dropout_p: probability of dropping an element.
        heads: int64, b * num_heads_q + h, broadcastable with rows and columns.
        rows: int64 query indices i.
        columns: int64 key indices j.

    Returns:
        bool, of the broadcast shape.
    """
    words = _words(philox, heads, (rows // 16) * 8 + rows % 8, (columns // 16) * 8 + columns % 8)
    index = 2 * (rows // 8 % 2) + columns // 8 % 2
    word = torch.where(
        index < 2, torch.where(index == 0, words[0], words[1]), torch.where(index == 2, words[2], words[3])
    )
    return word >= threshold(dropout_p)


def keep_block(philox: Tensor, dropout_p: float, heads: Tensor, rows: slice, columns: slice) -> Tensor:
    """As `keep_mask`, for a rectangle: each call's four words are all used, so it takes a quarter of the time and memory.

    Args:
        philox, dropout_p: as in `keep_mask`.
        heads: (batch, heads, 1, 1) int64, b * num_heads_q + h.
        rows, columns: the ranges of i and j.

    Returns:
        (batch, heads, rows, columns) bool.
    """
    first_row, first_column = rows.start // 16, columns.start // 16
    tall, wide = -(-rows.stop // 16) - first_row, -(-columns.stop // 16) - first_column
    counter_rows = torch.arange(tall * 8, device=philox.device).view(-1, 1) + first_row * 8
    counter_columns = torch.arange(wide * 8, device=philox.device) + first_column * 8
    least = threshold(dropout_p)
    words = torch.stack([word >= least for word in _words(philox, heads, counter_rows, counter_columns)])
    batch, num_heads = words.shape[1:3]
    # (i // 8 % 2, j // 8 % 2, b, h, i // 16, i % 8, j // 16, j % 8) -> (b, h, i, j)
    grid = words.view(2, 2, batch, num_heads, tall, 8, wide, 8).permute(2, 3, 4, 0, 5, 6, 1, 7)
    grid = grid.reshape(batch, num_heads, tall * 16, wide * 16)
    top, left = rows.start - first_row * 16, columns.start - first_column * 16
    return grid[:, :, top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]


def _words(philox: Tensor, heads: Tensor, counter_rows: Tensor, counter_columns: Tensor) -> tuple[Tensor, ...]:
    seed, offset = philox[0], philox[1]
    counter = (counter_columns, counter_rows, heads & _MASK, offset & _MASK)
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))


def threshold(dropout_p: float) -> int:
    """The least word that is kept."""
    return round(dropout_p * 2**32)
