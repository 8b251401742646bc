"""PyTorch's BlockMask, taken as given, against the same mask judged here and against its own lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mods_running import CPU
from test_mods_classes import EXACT, elementwise, tiles
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flashgen import mods


def made(name: str, rows: int, columns: int, block: tuple[int, int]) -> BlockMask:
    return create_block_mask(EXACT[name], 2, 2, rows, columns, device="cpu", BLOCK_SIZE=block)


@pytest.mark.parametrize("name", ["causal", "document and causal", "local and global", "length and causal", "nothing"])
def test_a_block_mask_is_the_mask_it_was_made_of(name: str) -> None:
    found = mods.key_ranges_of(made(name, 192, 160, (32, 16)), seqlen_q=192, seqlen_k=160, block_m=32, block_n=16)
    program, tensors = mods.program(None, {"mask_mod": EXACT[name]}, CPU)
    assert program.mask is not None
    tables = mods.arrays_of(tensors)
    for b, h in np.ndindex(2, 2):
        expected = tiles(elementwise(program.mask, tables, 192, 160, b, h), 32, 16)
        np.testing.assert_array_equal(found.classes(10)[b, h], expected)


def test_the_queries_of_keys_are_the_transpose() -> None:
    mask = made("document and causal", 192, 160, (32, 32))
    sizes = {"seqlen_q": 192, "seqlen_k": 160, "block_m": 32, "block_n": 32}
    found, turned = mods.key_ranges_of(mask, **sizes), mods.key_ranges_of(mask, **sizes, turned=True)
    np.testing.assert_array_equal(turned.classes(6), found.classes(5).swapaxes(2, 3))


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (48, 80)], ids=str)
def test_the_tile_may_be_smaller_or_larger_than_the_masks_blocks(tile: tuple[int, int]) -> None:
    mask = made("document and causal", 192, 160, (32, 32))
    block_m, block_n = tile
    found = mods.key_ranges_of(mask, seqlen_q=192, seqlen_k=160, block_m=block_m, block_n=block_n)
    # What the lists say of single pairs.
    dense = mask.to_dense()[0, 0].bool()
    full = torch.zeros(6, 5, dtype=torch.bool)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        full[row, mask.full_kv_indices[0, 0, row, :count].long()] = True
    seen = torch.kron(dense, torch.ones(32, 32, dtype=torch.bool)).numpy()
    whole = torch.kron(full, torch.ones(32, 32, dtype=torch.bool)).numpy()
    expected = np.where(tiles(whole, *tile) == 2, 2, np.minimum(tiles(seen, *tile), 1))
    np.testing.assert_array_equal(found.classes(expected.shape[1])[0, 0], expected)


def test_lists_count_even_where_they_contradict_the_function() -> None:
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    lists = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, lists, BLOCK_SIZE=(16, 16), mask_mod=EXACT["nothing"])
    found = mods.key_ranges_of(mask, seqlen_q=32, seqlen_k=32, block_m=16, block_n=16)
    assert found.classes(2)[0, 0].tolist() == [[0, 1], [1, 1]]
    assert (found.first[0, 0].tolist(), found.last[0, 0].tolist()) == ([1, 0], [2, 2])


def test_a_ragged_last_block_is_never_full() -> None:
    mask = create_block_mask(EXACT["everything"], 1, 1, 32, 40, device="cpu", BLOCK_SIZE=16)
    found = mods.key_ranges_of(mask, seqlen_q=32, seqlen_k=40, block_m=16, block_n=16)
    assert found.classes(3)[0, 0].tolist() == [[2, 2, 1]] * 2
