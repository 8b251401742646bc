"""PyTorch's `BlockMask`, as given, as the lists of tiles that kernels walk; made on its device, and nothing synchronises.

A tile may be smaller or larger than the mask's blocks: it is visited if it reaches into a listed one, and needs no mask only where all
that it reaches into are full. What a diagonal hides, and whether a tile is full of keys, is folded in, so that a kernel knows of each
listed tile whether it has to be masked.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashgen import checks, settings
from flashgen.problem import Problem
from flashgen.stream_capture import capturing

NONE, PARTIAL, FULL = 0, 1, 2
PARTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
)  # the tensors of a BlockMask that are read
_KEPT = 64  # masks and tiles whose lists are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The tiles of one walk.

    Attributes:
        blocks: int32 (batch or 1, num_heads or 1, walkers, walked): the tiles that each walker visits, first those that need a mask, then
            those that need none; what follows is not visited. Dimensions of one count for all: their stride is 0.
        counts: int32 (batch or 1, num_heads or 1, walkers, 2): how many of both.
    """

    blocks: Tensor
    counts: Tensor


def kinds(block_mask: Any) -> Tensor:
    """The block mask by its own blocks: uint8 (batch or 1, num_heads or 1, blocks of queries, blocks of keys), NONE, PARTIAL or FULL.

    Args:
        block_mask: `torch.nn.attention.flex_attention.BlockMask`.
    """
    size_k = block_mask.BLOCK_SIZE[1]
    columns = max(block_mask.kv_indices.shape[-1], -(-block_mask.seq_lengths[1] // size_k))
    found = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, columns).to(torch.uint8)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
        found = torch.where(full, FULL, found)
    return _broadcast(found)


def _listed(counts: Tensor, lists: Tensor, columns: int) -> Tensor:
    """Whether each block of keys stands among the first `counts` entries of a row's list."""
    there = torch.arange(lists.shape[-1], device=lists.device) < counts.unsqueeze(-1)
    found = torch.zeros((*counts.shape, columns + 1), dtype=torch.bool, device=lists.device)
    # A last column takes what does not count.
    found.scatter_(-1, torch.where(there & (lists >= 0) & (lists < columns), lists, columns).long(), True)
    return found[..., :columns]


def listed(block_mask: Any, problem: Problem, block_m: int, block_n: int, *, turned: bool = False) -> Listed:
    """The tiles of keys that each tile of queries visits.

    Args:
        block_mask: as in `kinds`.
        problem: the call, with its diagonal; of packed sequences there are no block masks.
        block_m, block_n: queries and keys of a tile.
        turned: the tiles of queries that each tile of keys visits, as a backward for keys and values walks them.
    """
    size_q, size_k = block_mask.BLOCK_SIZE
    found = _regrouped(kinds(block_mask), 2, problem.seqlen_q, size_q, block_m)
    found = _regrouped(found, 3, problem.seqlen_k, size_k, block_n)
    found = torch.minimum(found, _of_diagonal(problem, block_m, block_n, found.device))
    if problem.has_mask_mod:  # looked at in every tile
        found = found.clamp(max=PARTIAL)
    walked, block = (problem.seqlen_q, block_m) if turned else (problem.seqlen_k, block_n)
    if turned:
        found = found.transpose(2, 3)
    if walked % block:
        # A tile beyond the end needs its bounds masked.
        last = torch.arange(found.shape[3], device=found.device) == found.shape[3] - 1
        found = torch.where(last, found.clamp(max=PARTIAL), found)
    counts = torch.stack([(found == kind).sum(-1) for kind in (PARTIAL, FULL)], -1).int()
    order = torch.where(found == NONE, FULL + 1, found)
    blocks = torch.sort(order, dim=-1, stable=True).indices.int()
    return Listed(blocks=_broadcast(blocks), counts=_broadcast(counts))


def _regrouped(found: Tensor, dim: int, length: int, size: int, block: int) -> Tensor:
    """Kinds of blocks of `size` along a dimension as those of blocks of `block`."""
    first = torch.arange(0, length, block, device=found.device)
    start, stop = first // size, (first + block).clamp(max=length).sub(1) // size
    lows = highs = found.index_select(dim, start)
    for step in range(1, (block - 1) // size + 2):
        part = found.index_select(dim, torch.minimum(start + step, stop))
        lows, highs = torch.minimum(lows, part), torch.maximum(highs, part)
    return torch.where(lows == FULL, FULL, highs.clamp(max=PARTIAL))


def _of_diagonal(problem: Problem, block_m: int, block_n: int, device: torch.device) -> Tensor:
    """What causality and a window alone make of each tile."""
    q0 = torch.arange(0, problem.seqlen_q, block_m, device=device)[:, None]
    k0 = torch.arange(0, problem.seqlen_k, block_n, device=device)[None, :]
    q1, k1 = (q0 + block_m).clamp(max=problem.seqlen_q) - 1, (k0 + block_n).clamp(max=problem.seqlen_k) - 1
    offset, (left, right) = problem.causal_offset, problem.window_size
    right = 0 if problem.causal else right
    some = torch.ones(q0.shape[0], k0.shape[1], dtype=torch.bool, device=device)
    every = some.clone()
    if right >= 0:
        some &= k0 <= q1 + offset + right
        every &= k1 <= q0 + offset + right
    if left >= 0:
        some &= k1 >= q0 + offset - left
        every &= k0 >= q1 + offset - left
    return some.to(torch.uint8) + (some & every).to(torch.uint8)


def _broadcast(table: Tensor) -> Tensor:
    """A table whose batch or heads of one count for all: a stride of 0 says so."""
    table = table.contiguous()
    steps = [0 if table.shape[dim] == 1 else table.stride(dim) for dim in (0, 1)]
    return table.as_strided(table.shape, (*steps, *table.stride()[2:]))


# -- what was made once --

# With the mask and, on the CPU, copies of its tensors: NumPy and other libraries write there, and comparing waits for nothing. On a GPU a comparison costs
# a dozen launches and its remedy, lists made anew in each call, some thirty: more than the attention of a small problem takes the host.
_known: OrderedDict[tuple[Any, ...], tuple[weakref.ref[Any], dict[str, Any], list[Tensor]]] = OrderedDict()
_lock = threading.Lock()


def launch_values(block_mask: Any, problem: Problem, tiles: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What a rendered launch takes of a block mask, by name; remembered while the mask lives and nobody writes into its tensors.

    On a GPU a write that PyTorch does not count is seen with FLASHGEN_CHECK_VALUES, or told by `reread_block_mask`.

    Args:
        block_mask: as in `kinds`.
        problem: the call.
        tiles: of `Variant.mask_tiles`: tiles of queries x keys.
    """
    tensors = [x for x in (getattr(block_mask, name) for name in PARTS) if x is not None]
    device = tensors[0].device
    if any(x.is_inference() for x in tensors) or capturing(device):
        return _made(block_mask, problem, tiles)  # no counter of writes; or memory of the captured graph
    versions = tuple((id(x), x._version) for x in tensors)
    diagonal = (problem.causal, problem.window_size, problem.causal_offset, problem.has_mask_mod)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sizes = (problem.seqlen_q, problem.seqlen_k, diagonal, tuple(tiles.items()), stream)
    key = (id(block_mask), tuple(block_mask.BLOCK_SIZE), versions, sizes)
    compares = device.type == "cpu" or settings.read().check_values
    with _lock:
        found = _known.get(key)
        if found is not None and found[0]() is block_mask and (not compares or _same(found[2], tensors)):
            _known.move_to_end(key)
            return found[1]
    copies = [x.clone() for x in tensors] if compares else []
    values = _made(block_mask, problem, tiles)
    with _lock:
        for old in [old for old, (alive, *_) in _known.items() if alive() is None]:
            del _known[old]
        _known[key] = (weakref.ref(block_mask), values, copies)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return values


def _same(copies: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(copies) == len(tensors) and all(map(torch.equal, copies, tensors))


def reread_block_mask(block_mask: Any) -> None:
    """Have the next call read a BlockMask's tensors anew, after they were written on a GPU in a way that PyTorch does not count.

    PyTorch's own in-place operations are counted, and seen by themselves; so is whatever is written on a CPU. Not counted are another library's
    kernel, a write through `.data`, and the replay of a CUDA graph that writes there. A call that is captured into a graph reads them in every replay.

    Args:
        block_mask: `torch.nn.attention.flex_attention.BlockMask`.

    Raises:
        InvalidProblemError: it is no BlockMask.
    """
    checks.is_block_mask(block_mask)
    with _lock:
        for key in [key for key, (mask, *_) in _known.items() if mask() is None or mask() is block_mask]:
            del _known[key]


def _made(block_mask: Any, problem: Problem, tiles: dict[str, tuple[int, int]]) -> dict[str, Any]:
    size_q, size_k = block_mask.BLOCK_SIZE
    values: dict[str, Any] = {"block_kinds": kinds(block_mask), "block_size_q": size_q, "block_size_k": size_k}
    for walks, prefix in (("keys", "key"), ("rows", "row")):
        tile = tiles.get("lists", tiles.get("keys")) if walks == "keys" else tiles.get(walks)
        if tile is not None:
            found = listed(block_mask, problem, *tile, turned=walks == "rows")
            values |= {f"{prefix}_blocks": found.blocks, f"{prefix}_counts": found.counts}
        else:
            values |= {f"{prefix}_blocks": None, f"{prefix}_counts": None}
    return values
