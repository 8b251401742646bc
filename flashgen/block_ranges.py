"""Where a mask_mod leaves whole blocks of keys out, or hides nothing in them: four numbers for each block of queries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashgen.config import KernelConfig
from flashgen.problem import Problem
from flashgen.variants import by_name


def mask_ranges(program: Any, tensors: tuple[Tensor, ...], problem: Problem, config: KernelConfig) -> Tensor | None:
    """What the kernel's loop over keys visits, from interval analysis of the mask (`flashgen.mods.key_ranges`).

    Args:
        program: the traced mods.
        tensors: what they capture.
        problem: the call.
        config: with BLOCK_M and BLOCK_N.

    Returns:
        int32 (batch or 1, num_heads or 1, blocks of queries, 4) on the problem's device: first block of keys, first and end of those
        where nothing is hidden, end. None where that is not known and every block is masked element by element:
        packed sequences, whose lengths are on the device, and masks that read tensors on a GPU, which would synchronise.
    """
    if program.mask is None or problem.varlen or 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return None
    tile = by_name(config.variant).mask_tiles(config)["keys"]
    sizes = (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k, *tile)
    if not tensors:
        return _of_code(program, sizes, problem.device)
    return _ranges(program, tensors, sizes, problem.device) if problem.device == "cpu" else None


class _ByDigest:
    """A program as a key of a cache."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def __hash__(self) -> int:
        return hash(self.program.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByDigest) and self.program.digest == other.program.digest


def _of_code(program: Any, sizes: tuple[Any, ...], device: str) -> Tensor:
    return _remembered(_ByDigest(program), sizes, device)


@lru_cache(maxsize=256)
def _remembered(program: _ByDigest, sizes: tuple[Any, ...], device: str) -> Tensor:
    return _ranges(program.program, (), sizes, device)


def _ranges(program: Any, tensors: tuple[Tensor, ...], sizes: tuple[Any, ...], device: str) -> Tensor:
    from flashgen import mods

    names = ("batch", "num_heads", "seqlen_q", "seqlen_k", "block_m", "block_n")
    found = mods.key_ranges(program.mask, mods.arrays_of(tensors), **dict(zip(names, sizes, strict=True)))
    rows = [torch.as_tensor(x) for x in (found.first, found.full_first, found.full_last, found.last)]
    stacked = torch.stack(rows, -1).int().contiguous().to(device)
    # A dimension of one counts for all: a stride of 0 says so.
    steps = [0 if stacked.shape[dim] == 1 else stacked.stride(dim) for dim in (0, 1)]
    return stacked.as_strided(stacked.shape, (*steps, *stacked.stride()[2:]))
