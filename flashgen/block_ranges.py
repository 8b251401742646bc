"""Where a mask_mod leaves whole blocks of keys out, or hides nothing in them: four numbers for each block of queries.

A mask of numbers alone is analysed once for each digest and sizes. One that reads tensors (document ids) is analysed for what they
hold: they are copied to the host once, and a copy of them stays on the device. Each later call compares the tensors with that copy *on
the device* and takes the ranges only where nothing differs, else those that mask every block: nothing synchronises, an in-place write
that nobody counts (another library's kernel, the replay of a graph) is never met with stale ranges, and a captured graph stays right.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from flashgen import mask_words
from flashgen.config import KernelConfig
from flashgen.graph_memory import held
from flashgen.mask_words import Tables
from flashgen.problem import Problem
from flashgen.stream_capture import apart, capturing
from flashgen.variants.features import captured

_KEPT = 64  # masks without tensors, and contents of captured tensors, whose ranges are remembered
_MOST_BYTES = 1 << 26  # of captured tensors that are copied to the host, and kept once more on the device


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
        packed sequences, whose lengths are on the device; and masks whose tensors are large, or are met for the first time while a CUDA
        graph is captured, which may not synchronise.
    """
    return ranges(program, tensors, problem, (config.BLOCK_M, config.BLOCK_N))


def ranges(
    program: Any, tensors: tuple[Tensor, ...], problem: Problem, tile: tuple[int, int], *, turned: bool = False
) -> Tensor | None:
    """As `mask_ranges`, for any tile.

    Args:
        program, tensors, problem: as there.
        tile: its queries and keys.
        turned: rows are blocks of keys, and the numbers count blocks of queries, as a backward for keys and values walks them.
    """
    found = _tables(program, tensors, problem, tile, _TURNED if turned else _RANGES)
    return None if found is None else found.table


def looked_up(
    program: Any, tensors: tuple[Tensor, ...], problem: Problem, tile: tuple[int, int], *, surely: bool = False
) -> dict[str, Tensor | None]:
    """What a kernel takes that looks masked tiles up, by its names; see `mask_words.Tables`.

    Args:
        program, tensors, problem: as in `mask_ranges`.
        tile: queries of a thread block, a multiple of 64, and keys of a block.
        surely: whether the host is to wait until it knows that they say what the tensors hold, and else to make them anew.

    Returns:
        `mask_ranges`, or `mask_lists` of a mask without a diagonal that leaves blocks scattered; and `mask_words`. `mask_slots` tells of each block
        where its words are, for `shared_masks`, where the tables surely say all of the mask: it reads no tensors, they were made in this call, or
        `surely` was asked for. No words where they would be too many; nor under capture for a mask that reads tensors, since a graph's replay may meet others: words are of one content,
        and a kernel that is told of another evaluates each pair far from its fast loops.
    """
    # What a diagonal hides is not in a list.
    may_list = not problem.causal and problem.window_size == (-1, -1)
    kind = tile[0] if may_list else -tile[0]
    found = _tables(program, tensors, problem, (mask_words.ROWS, tile[1]), kind, surely)
    names: dict[str, Tensor | None] = dict.fromkeys(("mask_ranges", "mask_lists", "mask_words", "mask_slots"))
    if found is not None:
        names |= {"mask_lists" if found.listed else "mask_ranges": found.table, "mask_words": found.words}
        # A slot says where words are: without any there is nothing that a shared kernel could look up.
        names["mask_slots"] = None if found.words is None else found.slots
    return names


def launch_values(
    program: Any,
    tensors: tuple[Tensor, ...],
    problem: Problem,
    tiles: dict[str, tuple[int, int]],
    *,
    surely: bool = False,
) -> dict[str, Any]:
    """Captured tensors, and where a mask_mod leaves whole blocks out for each walk of a kernel, by the names of the rendered launch.

    Args:
        program, tensors, problem: as in `mask_ranges`.
        tiles: of `Variant.mask_tiles`; without any nothing is looked for.
        surely: as in `looked_up`.
    """
    # A kernel reads memory: what a lazily negated view holds there is the values before the minus.
    given = (x.resolve_neg() for x in tensors)
    values: dict[str, Any] = {captured(row.name): x for row, x in zip(program.captures, given, strict=True)}
    for x, source in zip(tensors, program.sources, strict=True):
        if source < 0:  # made inside a mod: nobody but the program has it
            held(x, problem.device)
    if problem.has_mask_mod and not problem.has_block_mask:
        for walks, name in (("keys", "mask_ranges"), ("rows", "row_ranges")):
            tile = tiles.get(walks)
            values[name] = tile and ranges(program, tensors, problem, tile, turned=walks == "rows")
        values |= {"mask_lists": None, "mask_words": None, "mask_slots": None}
        if "words" in tiles:
            values |= looked_up(program, tensors, problem, tiles["words"], surely=surely)
        # What a kernel takes that masks share (`shared_masks`), in the place of what its own would capture.
        values |= {captured("tile_slots"): values["mask_slots"], captured("tile_words"): values["mask_words"]}
    return values


# What is made of a mask; other numbers are queries of a tile: words, with lists where blocks are scattered, of a negative one without.
_RANGES, _TURNED = range(2)


def _tables(
    program: Any, tensors: tuple[Tensor, ...], problem: Problem, tile: tuple[int, int], kind: int, surely: bool = False
) -> Tables | None:
    if program.mask is None or problem.varlen or 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return None
    sizes = (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k, *tile)
    read = program.mask_reads
    if not read:
        made, stream = _of_code(_ByDigest(program), sizes, problem.device, kind)
        _used([x for x in (made.table, made.words, made.slots) if x is not None], stream)
        return held(made, problem.device)
    return _of_contents(program, tuple(tensors[number] for number in read), tensors, sizes, kind, surely)


class _ByDigest:
    """A program as a key of a cache."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def __hash__(self) -> int:
        return hash(self.program.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByDigest) and self.program.digest == other.program.digest


@lru_cache(maxsize=_KEPT)
def _of_code(program: _ByDigest, sizes: tuple[int, ...], device: str, kind: int) -> tuple[Tables, int]:
    with apart(torch.device(device)):  # what is remembered is no graph's, and no replay has to make it again
        made = _analysed(program.program, (), sizes, device, kind)
        slots = None if made.slots is None else broadcast(made.slots.to(device))
        made = replace(made, table=broadcast(made.table.to(device)), slots=slots)
        return made, _settled(made.table.device)


# -- streams: what is remembered is complete before any of them sees it, and not given back while one reads it --


def _settled(device: torch.device) -> int:
    """The current stream, once it has done all that it was asked; 0 where there are none."""
    if device.type != "cuda":
        return 0
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    return int(stream.cuda_stream)


def _used(tensors: Sequence[Tensor], made_on: int) -> None:
    """Note that the current stream reads tensors that were made on another one."""
    if not tensors or tensors[0].device.type != "cuda":
        return
    stream = torch.cuda.current_stream(tensors[0].device)
    # A captured graph's are held while it lives.
    if stream.cuda_stream != made_on and not torch.cuda.is_current_stream_capturing():
        for x in tensors:
            x.record_stream(stream)


# -- masks that read tensors --


@dataclass(slots=True)
class _Known:
    """The ranges of one content.

    Attributes:
        versions: PyTorch's counters of in-place writes; None of a tensor that has none (inference mode).
        storages: weak references to the tensors' memory: another tensor may come to lie at its address.
        copies: what the tensors held, as integers, on their device; none where the ranges leave nothing out anyway.
        precise: the ranges of that content.
        masked: ranges that mask every block.
        stream: on which all of these were made.
    """

    versions: tuple[int | None, ...]
    storages: tuple[StorageWeakRef, ...]
    copies: tuple[Tensor, ...]
    precise: Tables
    masked: Tensor
    stream: int

    def used(self) -> None:
        """Note that the current stream reads all of it."""
        made = (self.precise.table, self.precise.words, self.precise.slots, self.masked, *self.copies)
        _used([x for x in made if x is not None], self.stream)

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors hold the same content now; waits for the device."""
        return all(torch.equal(_bits(tensor), copy) for tensor, copy in zip(tensors, self.copies, strict=True))

    def current(self, tensors: Sequence[Tensor]) -> Tables:
        """The tables for what the tensors hold when the device gets there; no slots, since nothing stands for another content."""
        precise, masked, words = self.precise.table, self.masked, self.precise.words
        self.used()
        if not self.copies:
            return replace(self.precise, table=masked, slots=None)
        same: Tensor | None = None
        for tensor, copy in zip(tensors, self.copies, strict=True):
            equal = (_bits(tensor) == copy).all()
            same = equal if same is None else same & equal
        table = broadcast(torch.where(same, precise, masked))  # type: ignore[arg-type]
        return replace(self.precise, table=table, words=None if capturing(table.device) else words, slots=None)


_contents: OrderedDict[tuple[Any, ...], _Known] = OrderedDict()
_lock = threading.Lock()


def _of_contents(
    program: Any,
    read: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    kind: int,
    surely: bool = False,
) -> Tables | None:
    if any(x.is_neg() or x.is_conj() or x.layout != torch.strided for x in read):
        return None
    device = read[0].device  # all are beside q
    places = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in read)
    key = (program.digest, sizes, kind, str(device), places)
    with _lock:
        known = _contents.get(key)
        if known is not None:
            _contents.move_to_end(key)
    versions = tuple(_version(x) for x in read)
    alive = known is not None and not any(storage.expired() for storage in known.storages)
    if known is None or not alive or (known.versions != versions and not capturing(device)):
        # A capture takes what is known of an older content, too: where the tensors differ every block is masked.
        if capturing(device) or sum(x.numel() * x.element_size() for x in read) > _MOST_BYTES:
            return None
        known = _remember(key, program, read, tensors, sizes, kind, versions)
        # Analysed for what the stream holds at this place: nothing to compare, by operations that a GPU has yet to load.
        return known.precise
    held(known, str(device))
    with torch.no_grad():
        if surely and known.copies and not capturing(device):
            if not known.still(read):
                return _remember(key, program, read, tensors, sizes, kind, versions).precise
            known.used()
            return known.precise
        return known.current(read)


def _remember(
    key: tuple[Any, ...], program: Any, read: tuple[Tensor, ...], tensors: tuple[Tensor, ...], sizes: tuple[int, ...],
    kind: int, versions: tuple[int | None, ...],
) -> _Known:  # fmt: skip
    device = str(read[0].device)
    with torch.no_grad():
        # The copy is what is analysed: a write between the two would leave ranges that no comparison finds wrong.
        kept = {id(x): x.detach().clone() for x in read}
        frozen = tuple(kept.get(id(x), x) for x in tensors)
        precise = _analysed(program, frozen, sizes, device, kind)
        masked = _everything(precise, sizes, kind == _TURNED)
        indifferent = precise.words is None and torch.equal(precise.table[..., :4], masked[..., :4])
        known = _Known(
            versions=versions,
            storages=tuple(StorageWeakRef(x.untyped_storage()) for x in read),
            copies=() if indifferent else tuple(_bits(kept[id(x)]) for x in read),
            precise=replace(
                precise,
                table=broadcast(precise.table.to(device)),
                slots=None if precise.slots is None else broadcast(precise.slots.to(device)),
            ),
            masked=broadcast(masked.to(device)),
            stream=_settled(read[0].device),
        )
    with _lock:
        for old in [old for old, one in _contents.items() if any(storage.expired() for storage in one.storages)]:
            del _contents[old]
        _contents[key] = known
        while len(_contents) > _KEPT:
            _contents.popitem(last=False)
    return known


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers, in which a NaN equals itself."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach() if x.dtype == words else x.detach().view(words)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _everything(precise: Tables, sizes: tuple[int, ...], turned: bool) -> Tensor:
    """Every block visited, none known to be full, no words."""
    if precise.listed:
        table = precise.table.clone()
        table[..., 2] = -1
        return table
    _, _, seqlen_q, seqlen_k, block_m, block_n = sizes
    last = -(-seqlen_q // block_m) if turned else -(-seqlen_k // block_n)
    made = torch.full(precise.table.shape, last, dtype=torch.int32, device=precise.table.device)
    made[..., 0] = 0
    made[..., 4:] = -1
    return made


# -- the analysis --


def _analysed(program: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], device: str, kind: int) -> Tables:
    from flashgen import mods

    names = ("batch", "num_heads", "seqlen_q", "seqlen_k", "block_m", "block_n")
    analyse: Callable[..., Any] = mods.query_ranges if kind == _TURNED else mods.key_ranges
    arrays = mods.arrays_of(tensors, program.mask_reads)
    found = analyse(program.mask, arrays, **dict(zip(names, sizes, strict=True)))
    if kind in (_RANGES, _TURNED):
        rows = [torch.as_tensor(x) for x in (found.first, found.full_first, found.full_last, found.last)]
        return Tables(torch.stack(rows, -1).int().contiguous(), None, False)
    with torch.no_grad():
        made = None
        if kind > 0 and not found.is_contiguous:
            made = mask_words.of_lists(found, program, tensors, sizes, kind, device)
        return made or mask_words.of_ranges(found, program, tensors, sizes, abs(kind), device)


def broadcast(table: Tensor) -> Tensor:
    """A table whose batch or heads of one count for all: a stride of 0 says so."""
    steps = [0 if table.shape[dim] == 1 else table.stride(dim) for dim in (0, 1)]
    return table.as_strided(table.shape, (*steps, *table.stride()[2:]))


def forget() -> None:
    """Drop what was remembered of masks."""
    _of_code.cache_clear()
    with _lock:
        _contents.clear()
