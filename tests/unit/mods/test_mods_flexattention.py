"""FlexAttention's well-known mods: traced, emitted, run in Triton's interpreter, equal to eager PyTorch; masks also by the tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flex_mods import BATCH, HEADS, MASK_MODS, SCORE_MODS, SIZE
from mods_running import CPU, in_torch, in_triton
from test_mods_classes import elementwise, tiles

from flashgen import mods

# On functions that hardware and NumPy approximate; all others have every bit.
APPROXIMATE = {"alibi computed", "soft cap", "soft cap of a bias", "tanh", "silu", "trigonometry", "exponential decay"}
APPROXIMATE |= {
    "silu function",
    "gelu instead of softmax",
    "relu instead of softmax",
    "distance in space",
    "distance in space added",
}
APPROXIMATE |= {"latent attention", "latent attention by a sum", "graph edges"}
APPROXIMATE |= {"nested trigonometry", "branching trigonometry", "head gate"}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_scores_are_eagers(name: str) -> None:
    score = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) * 4
    expected = in_torch("score_mod", SCORE_MODS[name], score, 1, 2, 36, 32)
    found = in_triton("score_mod", SCORE_MODS[name], score, 1, 2, 36, 32)
    bound = 4e-6 if name in APPROXIMATE else 0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    if name != "identity":
        assert not torch.equal(found, score)


@pytest.mark.parametrize("name", MASK_MODS)
def test_masks_are_eagers(name: str) -> None:
    score = torch.zeros(16, 16)
    for first_q, first_k in ((48, 32), (0, 0), (16, 32)):
        expected = in_torch("mask_mod", MASK_MODS[name], score, 1, 2, first_q, first_k)
        assert torch.equal(in_triton("mask_mod", MASK_MODS[name], score, 1, 2, first_q, first_k), expected)


@pytest.mark.parametrize("name", MASK_MODS)
def test_no_tile_of_a_mask_is_misjudged(name: str) -> None:
    program, tensors = mods.program(None, {"mask_mod": MASK_MODS[name]}, CPU)
    program.check_bounds(tensors, batch=BATCH, num_heads=HEADS, seqlen_q=SIZE, seqlen_k=SIZE)
    assert program.mask is not None
    tables = mods.arrays_of(tensors)
    ranges = mods.key_ranges(
        program.mask,
        tables,
        batch=BATCH,
        num_heads=HEADS,
        seqlen_q=SIZE,
        seqlen_k=SIZE,
        block_m=16,
        block_n=8,
    )
    for b, h in np.ndindex(*ranges.first.shape[:2]):
        expected = tiles(elementwise(program.mask, tables, SIZE, SIZE, b, h), 16, 8)
        found = ranges.classes(SIZE // 8)[b, h]
        assert not ((found == 0) & (expected > 0)).any() and not ((found == 2) & (expected < 2)).any()
