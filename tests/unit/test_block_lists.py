"""Lists of tiles of a BlockMask: every tile that holds a visible pair, unmasked only where all pairs are; against one pair at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flashgen
from flashgen import block_lists
from flashgen.problem import Problem
from flashgen.torch_blocked.options import _block_mask_visible


def problem(seqlen_q: int, seqlen_k: int, **options: Any) -> Problem:
    return Problem(
        dtype="bf16", batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads_q=3, num_heads_kv=1, head_dim=64, head_dim_v=64,
        has_block_mask=True, **options,
    )  # fmt: skip


def drawn(seqlen_q: int, seqlen_k: int, size: tuple[int, int], *, seed: int, full: bool = True) -> BlockMask:
    """Lists that no mask_mod would give, in no order, with garbage behind their ends."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = -(-seqlen_q // size[0]), -(-seqlen_k // size[1])
    shape = (2, 3, rows)

    def lists() -> tuple[Tensor, Tensor]:
        counts = torch.randint(0, columns + 1, shape, generator=g, dtype=torch.int32)
        return counts, torch.rand((*shape, columns), generator=g).argsort(-1).int()

    return BlockMask.from_kv_blocks(
        *lists(), *(lists() if full else (None, None)), BLOCK_SIZE=size, mask_mod=lambda b, h, i, j: (i + j) % 3 > 0,
        seq_lengths=(seqlen_q, seqlen_k),
    )  # fmt: skip


def pairs(mask: BlockMask, p: Problem) -> tuple[Tensor, Tensor]:
    """(visible, sure): which pairs may be seen, and which are seen whatever the mask_mod says; (b, h, i, j)."""
    b, h, i, j = torch.meshgrid(*map(torch.arange, (2, 3, p.seqlen_q, p.seqlen_k)), indexing="ij")
    b, h, i, j = b[:, :1, :1, :1], h[:1, :, :1, :1], i[:1, :1, :, :1], j[:1, :1, :1, :]
    anything = replace_mod(mask, True)
    visible, sure = (_block_mask_visible(one, b, h, i, j) for one in (anything, replace_mod(mask, False)))
    left, right = p.window_size
    near = torch.ones_like(i - j, dtype=torch.bool)
    if p.causal or right >= 0:
        near = near & (j <= i + p.causal_offset + (0 if p.causal else right))
    if left >= 0:
        near = near & (j >= i + p.causal_offset - left)
    return visible & near, sure & near & torch.tensor(not p.has_mask_mod)


def replace_mod(mask: BlockMask, value: bool) -> Any:
    class Same:
        kv_num_blocks, kv_indices = mask.kv_num_blocks, mask.kv_indices
        full_kv_num_blocks, full_kv_indices = mask.full_kv_num_blocks, mask.full_kv_indices
        BLOCK_SIZE = mask.BLOCK_SIZE

        @staticmethod
        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.full_like(i - j, value, dtype=torch.bool)

    return Same


SIZES = [(16, 16), (16, 8), (24, 40), (128, 128)]
TILES = [(16, 16), (64, 16), (16, 64), (48, 32)]
OPTIONS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"window_size": (20, 7)}, {"causal": True, "causal_alignment": "top-left", "has_mask_mod": True},
]  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_tile_is_what_its_pairs_are(options: dict[str, Any], turned: bool) -> None:
    """Visited exactly where a listed block and the diagonal leave a pair; unmasked exactly where every pair of it is sure."""
    for number, (size, (m, n)) in enumerate(itertools.product(SIZES, TILES)):
        p = problem(75, 101, **options)
        mask = drawn(75, 101, size, seed=number, full=number % 3 > 0)
        found = block_lists.listed(mask, p, m, n, turned=turned)
        visible, sure = pairs(mask, p)
        if turned:
            visible, sure, (m, n) = visible.mT, sure.mT, (n, m)
        walkers, walked = -(-visible.shape[2] // m), -(-visible.shape[3] // n)
        assert found.blocks.shape == (2, 3, walkers, walked) and found.blocks.dtype == torch.int32
        for b, h, row in itertools.product(range(2), range(3), range(walkers)):
            masked, full = found.counts[b, h, row].tolist()
            order = found.blocks[b, h, row].tolist()
            kinds = {}
            for column in range(walked):
                part = (b, h, slice(row * m, (row + 1) * m), slice(column * n, (column + 1) * n))
                # The blocks that a tile reaches into decide, where the diagonal leaves anything of it.
                whole = bool(sure[part].all()) and (column + 1) * n <= visible.shape[3]
                kinds[column] = 2 if whole else int(_reaches(mask, p, part, turned) and bool(_near(p, part, turned)))
            assert sorted(order[:masked]) == [column for column, kind in kinds.items() if kind == 1]
            assert sorted(order[masked : masked + full]) == [column for column, kind in kinds.items() if kind == 2]


def _ranges(part: Any, turned: bool) -> tuple[Any, Any, Any, Any]:
    b, h, first, second = part
    return (b, h, second, first) if turned else part


def _reaches(mask: BlockMask, p: Problem, part: Any, turned: bool) -> bool:
    b, h, rows, keys = _ranges(part, turned)
    i, j = torch.arange(p.seqlen_q)[rows], torch.arange(p.seqlen_k)[keys]
    one = (torch.tensor([[[[b]]]]), torch.tensor([[[[h]]]]), i.view(1, 1, -1, 1), j.view(1, 1, 1, -1))
    return bool(_block_mask_visible(replace_mod(mask, True), *one).any())


def _near(p: Problem, part: Any, turned: bool) -> Tensor:
    _, _, rows, keys = _ranges(part, turned)
    i, j = torch.arange(p.seqlen_q)[rows][:, None], torch.arange(p.seqlen_k)[keys]
    near = torch.ones(len(i), len(j), dtype=torch.bool)
    left, right = p.window_size
    if p.causal or right >= 0:
        near &= j <= i + p.causal_offset + (0 if p.causal else right)
    if left >= 0:
        near &= j >= i + p.causal_offset - left
    return near.any()


def test_a_shared_mask_has_strides_of_0() -> None:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    found = block_lists.listed(mask, problem(64, 64), 32, 32)
    assert found.blocks.stride()[:2] == found.counts.stride()[:2] == block_lists.kinds(mask).stride()[:2] == (0, 0)
    assert block_lists.kinds(mask)[0, 0].tolist() == [[2 if k < q else int(k == q) for k in range(4)] for q in range(4)]


def test_what_was_made_once_is_made_anew_after_a_write() -> None:
    mask = drawn(75, 101, (16, 16), seed=1)
    p, tiles = problem(75, 101), {"keys": (32, 32)}
    first = block_lists.launch_values(mask, p, tiles)
    assert block_lists.launch_values(mask, p, tiles) is first
    assert block_lists.launch_values(mask, replace(p, causal=True), tiles) is not first
    assert block_lists.launch_values(mask, p, {"keys": (32, 64)}) is not first
    mask.full_kv_num_blocks.zero_()  # type: ignore[union-attr]
    mask.kv_num_blocks.zero_()
    after = block_lists.launch_values(mask, p, tiles)
    assert after["key_counts"].sum() == 0 != first["key_counts"].sum()
    mask.kv_num_blocks.numpy()[...] = 1  # which PyTorch does not count
    assert block_lists.launch_values(mask, p, tiles)["key_counts"].sum() > 0
    assert after["row_blocks"] is None


def test_what_nobody_counted_is_read_anew_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where nothing is compared in a usual call."""
    monkeypatch.setattr(block_lists, "_same", lambda copies, tensors: True)
    mask, p = drawn(256, 256, (64, 64), seed=3), problem(256, 256)
    tiles = {"keys": (64, 64)}
    before = block_lists.launch_values(mask, p, tiles)
    mask.kv_num_blocks.data.zero_()
    assert block_lists.launch_values(mask, p, tiles) is before
    flashgen.reread_block_mask(mask)
    after = block_lists.launch_values(mask, p, tiles)
    assert after["key_counts"][..., 0].count_nonzero() == 0 < before["key_counts"][..., 0].count_nonzero()
    monkeypatch.undo()
    mask.full_kv_num_blocks.data.zero_()
    assert block_lists.launch_values(mask, p, tiles)["key_counts"].count_nonzero() == 0
    with pytest.raises(flashgen.InvalidProblemError, match="BlockMask"):
        flashgen.reread_block_mask(torch.zeros(3))
