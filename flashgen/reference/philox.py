"""Dropout's random words from the definition of Philox4x32-10, in numpy: nothing shared with the backends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Words = tuple["NDArray[Any]", "NDArray[Any]", "NDArray[Any]", "NDArray[Any]"]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 from the definition: four words of 32 bits, as uint64, for every counter.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = np.uint64(0xFFFFFFFF)
    x0, x1, x2, x3 = (np.asarray(x).astype(np.uint64) & low for x in counter)
    for step in range(10):
        k0 = np.uint64((key[0] + step * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + step * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (b >> np.uint64(32)) ^ x1 ^ k0, b & low, (a >> np.uint64(32)) ^ x3 ^ k1, a & low
    return x0, x1, x2, x3


def dropout_words(
    philox: tuple[int, int], heads: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]
) -> NDArray[Any]:
    """The random word of every element (b * num_heads_q + h, i, j); uint64, below 2^32.

    An element is kept when its word is at least round(p * 2^32). Four elements share one call of Philox4x32-10:
    {i, i + 8} x {j, j + 8} of a 16 x 16 square.
    """
    counter = (columns // 16 * 8 + columns % 8, rows // 16 * 8 + rows % 8, heads, np.asarray(philox[1]))
    words = philox4x32(counter, (philox[0] & 0xFFFFFFFF, philox[0] >> 32 & 0xFFFFFFFF))
    number = rows // 8 % 2 * 2 + columns // 8 % 2
    chosen: NDArray[Any] = np.choose(number, np.broadcast_arrays(*words))
    return chosen
