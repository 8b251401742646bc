"""One kernel for all masks that are looked up: what a mask computes is in its tables, and its kernel need not say it.

The Hopper forward reads a mask's bits wherever it masks a block; it evaluates pairs only where it computes a tile anew. A program that looks
each pair up in the same words says what any mask says there, so that its kernel serves every mask without captured tensors whose words
and tiles are known: a new one compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashgen.block_ranges import looked_up
from flashgen.dispatch import Plan
from flashgen.mask_words import ROWS
from flashgen.spec import AttentionSpec, Mods
from flashgen.variants import by_name

_ON_CPU = False  # where kernels run to be checked, it is each mask's own


def kernel_spec(plan: Plan) -> AttentionSpec:
    """The spec of the kernel that a plan runs: its own, or the one that all masks share.

    Its own where a configuration was measured for it, and where tables do not say all of it: a mask that reads tensors (which may hold something
    else by the time the kernel runs), beside a score_mod, or of so many tiles that some are evaluated.
    """
    spec = plan.problem.spec
    if (
        not may_share(spec)
        or plan.config_source in ("database", "seed")
        or (plan.target.backend == "cpu" and not _ON_CPU)
    ):
        return spec
    tile = by_name(plan.variant).mask_tiles(plan.config).get("words")
    if tile is None or looked_up(spec.mods.program, (), plan.problem, tile)["mask_slots"] is None:  # type: ignore[union-attr]
        return spec
    return shared(spec, tile[1])


def may_share(spec: AttentionSpec) -> bool:
    """Whether a spec's mods are masks alone and read nothing, so that tables say all of them."""
    return _masks_alone(spec) and not spec.mods.program.captures  # type: ignore[union-attr]


def _masks_alone(spec: AttentionSpec) -> bool:
    if spec.op != "attention_fwd" or spec.mods is None or spec.varlen or spec.has_block_mask:
        return False
    program = spec.mods.program
    return program.mask is not None and program.score is None


def may_stand_in(plan: Plan) -> bool:
    """Whether the shared kernel can run a plan of a mask that reads tensors, in calls whose tables surely say what those hold."""
    spec = plan.problem.spec
    if not _masks_alone(spec) or may_share(spec) or plan.config_source in ("database", "seed"):
        return False
    return (plan.target.backend != "cpu" or _ON_CPU) and "words" in by_name(plan.variant).mask_tiles(plan.config)


def stand_in(plan: Plan, made: Mapping[str, Any]) -> AttentionSpec | None:
    """The shared kernel's spec where a call's tables surely say all of its mask, else None.

    Args:
        plan: of `may_stand_in`.
        made: `Operands.of_mods`.
    """
    if made["mask_slots"] is None:
        return None
    return shared(plan.problem.spec, by_name(plan.variant).mask_tiles(plan.config)["words"][1])


def shared(spec: AttentionSpec, block_n: int) -> AttentionSpec:
    """The spec of the kernel that looks up what a spec's mask says.

    Args:
        spec: of masks alone.
        block_n: keys of a block, of which there are words.
    """
    return replace(spec, mods=_mods(block_n))


@cache
def _mods(block_n: int) -> Mods:
    from flashgen import mods

    empty = (torch.zeros((1,) * 4, dtype=torch.int32), torch.zeros((1,) * 3, dtype=torch.int32))
    made, _ = mods.program(None, {"mask_mod": _looked_up(block_n, *empty)}, torch.device("cpu"))
    program = replace(made, looked_up=block_n, title=f"any mask_mod, looked up in blocks of {block_n} keys")
    return Mods(digest=program.digest, program=program)


def _looked_up(block_n: int, tile_slots: Tensor, tile_words: Tensor) -> Callable[..., Any]:
    """A mask_mod that reads bits.

    Args:
        block_n: keys of a block.
        tile_slots: int32 (batch, num_heads, blocks of 64 queries, blocks of keys): which tile of words, -1 where all is seen.
        tile_words: of `mask_words.Tables`.
    """

    def looked_up(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        slot = tile_slots[b, h, q_idx // ROWS, kv_idx // block_n]
        column = kv_idx % block_n
        word = tile_words[torch.clamp(slot, min=0), q_idx % ROWS, column % 8 // 2]
        return (slot < 0) | ((word >> (column // 8 * 2 + column % 2)) & 1 == 1)

    return looked_up
