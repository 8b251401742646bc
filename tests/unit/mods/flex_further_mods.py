"""More of FlexAttention's mods, from PyTorch's tests and the attention-gym gallery, written anew from what they compute.

These index step by step, reduce what they captured, or apply activations. Sizes as in `flex_mods`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

SIZE, HEADS, BATCH = 64, 4, 2
_random = torch.Generator().manual_seed(12)

OF_BATCH = torch.randn(BATCH, SIZE, generator=_random)
LAYERS = torch.randn(3, BATCH, HEADS, SIZE, generator=_random)
VARIANTS = torch.randn(BATCH, HEADS, 3, SIZE, generator=_random)
WHICH = torch.tensor(2)
PLACES = torch.randn(SIZE, 3, generator=_random)  # of atoms in space
REACH = torch.logspace(0.001, 0.1, HEADS)
ROPE_Q = torch.randn(BATCH, HEADS, SIZE, 8, generator=_random)
ROPE_K = torch.randn(BATCH, 1, SIZE, 8, generator=_random)
SCALE_INT = torch.ones((), dtype=torch.int32)
LENGTHS = torch.arange(BATCH, dtype=torch.int32) + 1
BIDIRECTIONAL = torch.tensor([20, 41], dtype=torch.int32)
HOPS = torch.randint(0, 6, (BATCH, SIZE, SIZE), generator=_random, dtype=torch.int32)  # of a graph, between nodes
OF_HOPS = torch.randn(HEADS, 6, generator=_random)
EDGES = torch.randint(0, 5, (BATCH, SIZE, SIZE, 3), generator=_random, dtype=torch.int32)  # types along a path
OF_EDGES = torch.randn(HEADS, 3, 5, generator=_random)
SANDWICH = torch.cos(
    torch.arange(-SIZE, SIZE).abs()[:, None] / 10000 ** (2 * torch.arange(16, dtype=torch.float32) / 32)
).sum(-1)
RATIOS = HEADS / (8.0 * torch.arange(1, HEADS + 1))
INTERVALS = torch.tensor([[0, 30], [10, 50], [30, 64], [0, 64]], dtype=torch.int32)  # of text, for each image
IMAGE = torch.arange(4).repeat_interleave(16)
GLOBAL = torch.zeros(SIZE, dtype=torch.bool)
GLOBAL[[0, 33]] = True
GLOBAL_TOKENS = torch.tensor([0, 35, 50])
BOUNDS = torch.tensor([7, 30, 48], dtype=torch.int32)
# Of each document its start, and the start and end of its prefix; the first three share one.
DOCUMENTS = torch.tensor([[0, 0, 0], [10, 0, 10], [24, 0, 10], [40, 40, 40]], dtype=torch.int32)
SEGMENT = torch.bucketize(torch.arange(SIZE), torch.tensor([10, 24, 40]), right=True)
FRAME, PROMPT = 16, 8  # tokens of a frame, and before the first


def squared_distance(q: Any, k: Any) -> Any:
    return (PLACES[q] - PLACES[k]).pow(2).sum(-1)


def edges(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """The mean over a path's edges, each with its own weight; an edge without a type has none."""
    total: Any = 0.0
    length: Any = 0
    for step in range(3):
        kind = EDGES[b, q, k, step]
        total = total + torch.where(kind > 0, OF_EDGES[h, step, kind], 0.0)
        length = length + (kind > 0).int()
    return s + total / torch.clamp(length, min=1)


def natten_of_fractions(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """PyTorch's own test divides where a floor was meant."""
    near_x, near_y = (q / 8 - k / 8).abs() <= 1, (q % 8 - k % 8).abs() <= 1
    return torch.where(near_x | near_y, s, float("-inf"))


def checkerboard(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    s = torch.where(torch.abs(k - q) % 2 == 1, s * 0.5, s)
    return torch.where(torch.abs(k - q) % 2 == 0, s * 2.0, s)


def vision(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Text looks at the images of its interval."""
    interval = INTERVALS[IMAGE[k]]
    return (q >= interval[0]) & (q < interval[1])


def block_diffusion(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Noised tokens in the first half, clean ones in the second."""
    half, block = SIZE // 2, 4
    q_noised, k_noised = q < half, k < half
    q_block, k_block = q % half // block, k % half // block
    diagonal = (q_block == k_block) & (q_noised == k_noised)
    offset = (q_block > k_block) & q_noised & ~k_noised
    return diagonal | offset | ((q_block >= k_block) & ~q_noised & ~k_noised)


def shared_prefix(b: Any, h: Any, q: Any, k: Any) -> Any:
    start, prefix_start, prefix_end = (DOCUMENTS[SEGMENT[q], column] for column in range(3))
    return ((k >= start) & (q >= k)) | ((k >= prefix_start) & (k < prefix_end))


def draft_heads(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A prefix, then blocks that are causal inside."""
    prefix, block = 16, 6
    behind = k - prefix
    return (k < prefix) | ((k >= prefix) & (q // block == behind // block) & (behind % block <= q % block))


def sliding_tiles_and_text(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Tiles of 2 x 2 on a canvas of 6 x 8 patches, and text behind them that sees all."""
    seen, text = 48, 12

    def tile(index: Any) -> tuple[Any, Any]:
        return index // 4 // 4, index // 4 % 4

    (q_y, q_x), (k_y, k_x) = tile(q), tile(k)
    centre_y, centre_x = q_y.clamp(1, 1), q_x.clamp(1, 2)
    near = ((k_y - centre_y).abs() <= 1) & ((k_x - centre_x).abs() <= 1)
    to_text = (q < seen) & (k >= seen) & (k < seen + text)
    return ((q < seen) & (k < seen) & near) | to_text | ((q >= seen) & (k < seen + text))


def spatial(b: Any, h: Any, q: Any, k: Any) -> Any:
    width = math.floor(2 * FRAME / 8) * 8
    return (q < PROMPT) | (k < PROMPT + FRAME) | (torch.abs(q - k) < width)


def temporal(b: Any, h: Any, q: Any, k: Any) -> Any:
    width = 2 * FRAME // 4
    return (q < PROMPT) | (k < PROMPT) | (torch.abs((q - PROMPT) % FRAME - (k - PROMPT) % FRAME) < width)


def of_each_document(mask: Callable[..., Any], size: int) -> Callable[..., Any]:
    """A batch laid out in one sequence."""
    return lambda b, h, q, k: (q // size == k // size) & mask(b, h, q % size, k % size)


def tree_of_drafts(b: Any, h: Any, q: Any, k: Any) -> Any:
    """The ancestors of a node of a binary tree, computed from its number, behind a prefix."""
    node, other = q + 1, (k - 20).clamp(0, SIZE - 1) + 1
    found = node == other
    for _ in range(6):
        node = node >> 1
        found = found | ((node == other) & (node > 0))
    return (k < 20) | found


FURTHER_SCORE_MODS: dict[str, Callable[..., Any]] = {
    "index after index": lambda s, b, h, q, k: s + OF_BATCH[b][q],
    "three indices in two steps": lambda s, b, h, q, k: s + LAYERS[0][b, h][q],
    "indices and a captured index": lambda s, b, h, q, k: s + VARIANTS[b][h][WHICH, q],
    "a captured index": lambda s, b, h, q, k: s + VARIANTS[b, h, WHICH, q],
    "distance in space": lambda s, b, h, q, k: torch.exp(-squared_distance(q, k).sqrt() / REACH[h]) * s,
    "distance in space added": lambda s, b, h, q, k: s - squared_distance(q, k),
    "latent attention": lambda s, b, h, q, k: s + 0.1 * torch.dot(ROPE_Q[b, h, q], ROPE_K[b, h // HEADS, k]),
    "latent attention by a sum": lambda s, b, h, q, k: s + (ROPE_Q[b, h, q] * ROPE_K[b, h // HEADS, k]).sum(),
    "silu function": lambda s, b, h, q, k: torch.nn.functional.silu(s),
    "gelu instead of softmax": lambda s, b, h, q, k: torch.log(torch.nn.functional.gelu(s) + 1),
    "relu instead of softmax": lambda s, b, h, q, k: torch.log(torch.nn.functional.relu(s) + 1),
    "odd keys skipped": lambda s, b, h, q, k: torch.where(k % 2 == 0, s, float("-inf")),
    "scores below a length": lambda s, b, h, q, k: torch.where(s <= LENGTHS[b], torch.where(q >= k, s, float("-inf")), -float("inf")),
    "captured integer scale": lambda s, b, h, q, k: s + SCALE_INT,
    "division of queries by keys": lambda s, b, h, q, k: s - q // (1 + k),
    "natten of fractions": natten_of_fractions,
    "two frames seen both ways": lambda s, b, h, q, k: torch.where(((q <= BIDIRECTIONAL[b]) & (k <= BIDIRECTIONAL[b])) | (q >= k), s, -float("inf")),
    "checkerboard in two steps": checkerboard,
    "bias by hops": lambda s, b, h, q, k: s + OF_HOPS[h, HOPS[b, q, k]],
    "graph edges": edges,
    "sandwich": lambda s, b, h, q, k: s + SANDWICH[q - k + SIZE] * RATIOS[h],
    "head of zeros": lambda s, b, h, q, k: s + LAYERS[0, b, h.new_zeros(h.shape), k],
    "distance as an index": lambda s, b, h, q, k: s + OF_BATCH[0][torch.abs(q - k)],
    "sum of indices": lambda s, b, h, q, k: s + OF_BATCH.view(-1)[q + k],
}  # fmt: skip

FURTHER_MASK_MODS: dict[str, Callable[..., Any]] = {
    "vision": vision,
    "block diffusion": block_diffusion,
    "shared prefix": shared_prefix,
    "draft heads": draft_heads,
    "tree of drafts": tree_of_drafts,
    "sliding tiles and text": sliding_tiles_and_text,
    "spatial heads": spatial,
    "temporal heads": temporal,
    "batch in one sequence": of_each_document(lambda b, h, q, k: (q - k).abs() < 5, 16),
    "global tokens": lambda b, h, q, k: ((q - k).abs() <= 5) | GLOBAL[q] | GLOBAL[k],
    "listed global tokens": lambda b, h, q, k: ((q - k).abs() <= 5) | torch.isin(k, GLOBAL_TOKENS),
    "bucketized documents": lambda b, h, q, k: torch.bucketize(q, BOUNDS, right=True) == torch.bucketize(k, BOUNDS, right=True),
    "dilated window both ways": lambda b, h, q, k: ((q - k).abs() <= 12) & ((q - k).abs() % 4 == 0),
    "queries beyond a length": lambda b, h, q, k: (q < 40) & (h >= 0),
    "neither first nor last": lambda b, h, q, k: (k < 16) | (k >= 48),
    "square neighbourhood": lambda b, h, q, k: ((q // 8 - k // 8).abs() <= 2) & ((q % 8 - k % 8).abs() <= 2),
    "all of several": lambda b, h, q, k: torch.stack([q >= k, q - k < 20, k > 3]).all(),
    "any of several": lambda b, h, q, k: torch.any(torch.stack([q == k, k < 3])),
}  # fmt: skip
