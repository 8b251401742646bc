"""Masks by name for `flashgen bench --mask`: those of the gallery (`examples/masks.py`), of any length, as FlexAttention's users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgen.errors import InvalidProblemError
from flashgen.problem import Problem

MaskMod = Callable[..., Any]
PREFIX, STEP, DILATED, REACH, CHUNK = 512, 4, 1024, 6, 1024


def _prefix(length: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (kv_idx < PREFIX) | (q_idx >= kv_idx)


def _documents(length: int) -> MaskMod:
    """Causal within documents of lengths that double, from 32 tokens to a quarter of the sequence, again and again."""
    lengths: list[int] = []
    size = 32
    while sum(lengths) < length:
        lengths.append(min(size, length - sum(lengths)))
        size = 32 if size * 8 > length else size * 2
    ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])


def _dilated(length: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < DILATED) & ((q_idx - kv_idx) % STEP == 0)


def _chunked(length: int) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx // CHUNK == kv_idx // CHUNK)


def _tree(length: int) -> MaskMod:
    """Drafted tokens in the second half, a binary tree in the order of a walk: each sees the certain ones, its ancestors and itself."""
    first, ends = length // 2, torch.full((length,), length, dtype=torch.int32)
    waiting = [(first, length)]
    while waiting:
        node, end = waiting.pop()
        if node >= end:
            continue
        ends[node] = end
        middle = (node + 1 + end) // 2
        waiting += [(node + 1, middle), (middle, end)]
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & ((kv_idx < first) | (q_idx < ends[kv_idx]))


def _neighbourhood(length: int) -> MaskMod:
    """Patches of an image twice as wide as high, or square, at most REACH rows and columns away."""
    width = 1 << -(-(length.bit_length() - 1) // 2)
    return lambda b, h, q_idx, kv_idx: (
        ((q_idx // width - kv_idx // width).abs() <= REACH) & ((q_idx % width - kv_idx % width).abs() <= REACH)
    )


_MASKS: dict[str, Callable[[int], MaskMod]] = {
    "prefix": _prefix,
    "documents": _documents,
    "dilated": _dilated,
    "chunked": _chunked,
    "tree": _tree,
    "neighbourhood": _neighbourhood,
}
NAMES = tuple(_MASKS)


def masked(problem: Problem, name: str) -> Problem:
    """The problem with a named mask as its mask_mod.

    Raises:
        InvalidProblemError: the name is not known, or queries and keys differ in number.
    """
    if name not in _MASKS:
        raise InvalidProblemError(f"--mask {name!r} is not known: allowed are {', '.join(NAMES)}.")
    if problem.seqlen_q != problem.seqlen_k:
        raise InvalidProblemError(
            f"--mask {name} is of one length, the problem has {problem.seqlen_q} queries and {problem.seqlen_k} keys."
        )
    return problem.modified(mask_mod=_MASKS[name](problem.seqlen_k))


def visible(length: int, name: str) -> Tensor:
    """The whole mask, for tests: (length, length) bool."""
    index, zero = torch.arange(length, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    found: Tensor = _MASKS[name](length)(zero, zero, index[:, None], index[None, :])
    return found
