"""The score and mask mods of FlexAttention's documentation, gallery and tests, written anew from what they compute.

As a table: name -> function. Sizes fit blocks of queries 48..63 and keys 32..47 (and the start), batch 1 of 2, head 2 of 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from flex_further_mods import FURTHER_MASK_MODS, FURTHER_SCORE_MODS

SIZE, HEADS, BATCH = 64, 4, 2
_random = torch.Generator().manual_seed(11)

SLOPES = torch.exp2(-8.0 * (torch.arange(HEADS) + 1) / HEADS)
RELATIVE = torch.randn(HEADS, 2 * SIZE, generator=_random)
BUCKETS = torch.randn(HEADS, 32, generator=_random)
HEAD_BIAS = torch.randn(HEADS, generator=_random)
BATCH_HEAD_BIAS = torch.randn(BATCH, HEADS, generator=_random).half()
POSITION_BIAS = torch.randn(SIZE, SIZE, generator=_random).bfloat16()
FULL_BIAS = torch.randn(BATCH, HEADS, SIZE, SIZE, generator=_random)
PER_KEY = torch.randn(SIZE, generator=_random)
SCALE = torch.tensor(1.25)
LENGTHS = torch.tensor([64, 40])
DOCUMENT = torch.sort(torch.randint(0, 5, (SIZE,), generator=_random))[0].int()
POSITION = torch.arange(SIZE, dtype=torch.int32) - torch.searchsorted(DOCUMENT, DOCUMENT, out_int32=True)
PREFIX = torch.tensor([5, 41], dtype=torch.int32)
MODALITY = torch.tensor([0, 0, 1, 1, 1, 0, 0, 2] * 8)
PARENTS = torch.zeros(SIZE, SIZE, dtype=torch.bool)  # ancestor or self, in a tree of draft tokens of fan-out 2
for _child in range(SIZE):
    _node = _child
    while True:
        PARENTS[_child, _node] = True
        if _node == 0:
            break
        _node = (_node - 1) // 2
OFFSETS = torch.tensor([0, 7, 30, 31, 64], dtype=torch.int32)  # of packed sequences
SEQUENCE = torch.bucketize(torch.arange(SIZE), OFFSETS[1:-1], right=True, out_int32=True)
PAGES = torch.randperm(8, generator=_random).int()
SPARSE = torch.rand(HEADS, 8, 8, generator=_random) < 0.5
OFFSET = torch.tensor(16, dtype=torch.int32)  # of the first query, in decoding
GATES = torch.rand(HEADS, generator=_random)
TEMPERATURE = torch.rand(HEADS, generator=_random) + 0.5
SHIFTS = torch.randint(0, SIZE, (SIZE,), generator=_random).int()
IMAGES = torch.tensor(
    [-1, 8, 8, 30, 30, 30, 47, 47] * 8, dtype=torch.int32
)  # first token of the image that a text token follows
FRAMES = 4  # of a video, of SIZE // FRAMES tokens each
WIDTH = 8  # of an image whose patches are the tokens


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def bucket(q: Any, k: Any) -> Any:
    """T5's bucket of a distance: exact up to 8, logarithmic beyond, 16 for each direction."""
    distance = k - q
    near = distance.abs()
    far = 8 + (torch.log(near.float() / 8) / math.log(128 / 8) * 8).to(torch.int32)
    return torch.where(distance > 0, 16, 0) + torch.where(near < 8, near, far.clamp(max=15))


def soft_cap(limit: float) -> Callable[..., Any]:
    return lambda s, b, h, q, k: limit * torch.tanh(s / limit)


def offset_by(mask: Callable[..., Any], offset: int) -> Callable[..., Any]:
    """A mask for queries that begin at a later position, as in decoding."""
    return lambda b, h, q, k: mask(b, h, q + offset, k)


def all_of(*parts: Callable[..., Any]) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = b.new_ones((), dtype=torch.bool)
        for part in parts:
            found = found & part(b, h, q, k)
        return found

    return mask


def any_of(*parts: Callable[..., Any]) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = b.new_zeros((), dtype=torch.bool)
        for part in parts:
            found = found | part(b, h, q, k)
        return found

    return mask


def then(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    """One score_mod after another."""
    return lambda s, b, h, q, k: second(first(s, b, h, q, k), b, h, q, k)


def relative(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + (q - k)


def alibi(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s + SLOPES[h] * (k - q)


def natten(kernel: int) -> Callable[..., Any]:
    """A neighbourhood of kernel x kernel patches, moved inside at the image's edges."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        reach = kernel // 2
        q_x, q_y, k_x, k_y = q // WIDTH, q % WIDTH, k // WIDTH, k % WIDTH
        centre_x, centre_y = q_x.clamp(reach, WIDTH - 1 - reach), q_y.clamp(reach, WIDTH - 1 - reach)
        return ((centre_x - k_x).abs() <= reach) & ((centre_y - k_y).abs() <= reach)

    return mask


def twisted(q: Any) -> tuple[Any, Any]:
    """Row and column of a patch in Morton order: every second bit."""
    x = (q & 1) | ((q >> 1) & 2) | ((q >> 2) & 4)
    y = ((q >> 1) & 1) | ((q >> 2) & 2) | ((q >> 3) & 4)
    return x, y


def morton(b: Any, h: Any, q: Any, k: Any) -> Any:
    (q_x, q_y), (k_x, k_y) = twisted(q), twisted(k)
    return ((q_x - k_x).abs() <= 2) & ((q_y - k_y).abs() <= 2)


def tiled(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Sliding tiles of 4 x 4 patches."""
    q_x, q_y, k_x, k_y = q // WIDTH // 4, q % WIDTH // 4, k // WIDTH // 4, k % WIDTH // 4
    return ((q_x - k_x).abs() <= 1) & (q_y == k_y)


def paged(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Causal, of keys that lie in pages: the logical position of a physical one."""
    logical = PAGES[k // 8] * 8 + k % 8
    return torch.where(logical >= 0, q >= logical, False)


def of_each_batch(*masks: Callable[..., Any]) -> Callable[..., Any]:
    """Another mask for every item of the batch."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = masks[0](b, h, q, k)
        for number, one in enumerate(masks[1:], 1):
            found = torch.where(b == number, one(b, h, q, k), found)
        return found

    return mask


def clamped_documents(mask: Callable[..., Any]) -> Callable[..., Any]:
    """A mask of positions inside a document, where queries beyond the last offset belong to the last document."""

    def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
        q_own, k_own = SEQUENCE[q.clamp(max=SIZE - 1)], SEQUENCE[k.clamp(max=SIZE - 1)]
        return (q_own == k_own) & mask(b, h, q - OFFSETS[q_own], k - OFFSETS[k_own])

    return documents


def video(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Heads of space look at their own frame and the first one, heads of time at the same place of every frame."""
    tokens = SIZE // FRAMES
    space = ((q // tokens - k // tokens).abs() <= 1) | (k < tokens)
    time = ((q % tokens - k % tokens).abs() <= 2) | (k < tokens)
    return torch.where(h % 2 == 0, space, time)


def twice(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """A joint graph that branches."""
    return torch.cos(s) * torch.sin(s) + torch.tan(b.float() * 0.3)


SCORE_MODS: dict[str, Callable[..., Any]] = {
    "identity": lambda s, b, h, q, k: s,
    "causal by score": lambda s, b, h, q, k: torch.where(q >= k, s, float("-inf")),
    "inverse causal": lambda s, b, h, q, k: torch.where(q <= k, s, float("-inf")),
    "relative bias": relative,
    "relative causal": lambda s, b, h, q, k: torch.where(q <= k, s + (q - k), float("-inf")),
    "alibi": alibi,
    "alibi causal": lambda s, b, h, q, k: torch.where(q >= k, s + 0.5 * (q - k), float("-inf")),
    "alibi computed": lambda s, b, h, q, k: s + (k - q) * torch.exp2(-((h + 1) * 8.0 / HEADS)),
    "times two": lambda s, b, h, q, k: s * 2,
    "squared": lambda s, b, h, q, k: s * s,
    "head offset": lambda s, b, h, q, k: s * 2 * HEAD_BIAS[h],
    "head bias": lambda s, b, h, q, k: s + 2 * h,
    "relative table": lambda s, b, h, q, k: s + RELATIVE[h, q - k + SIZE],
    "relative table by bucket": lambda s, b, h, q, k: s + BUCKETS[h, bucket(q, k)],
    "head and position": lambda s, b, h, q, k: s + h * (q - k) * 0.1,
    "soft cap": soft_cap(20.0),
    "soft cap of a bias": then(relative, soft_cap(30.0)),
    "tanh": lambda s, b, h, q, k: torch.tanh(s),
    "silu": lambda s, b, h, q, k: s * torch.sigmoid(s),
    "trigonometry": lambda s, b, h, q, k: torch.sin(s) + torch.cos(q * 0.1) * torch.sin(k * 0.1),
    "checkerboard": lambda s, b, h, q, k: torch.where((k - q) % 2 == 0, s * 0.5, torch.where((k - q) % 2 == 1, s * 2, s)),
    "batch and head bias": lambda s, b, h, q, k: s + BATCH_HEAD_BIAS[b, h],
    "position bias": lambda s, b, h, q, k: s + POSITION_BIAS[q, k],
    "full bias": lambda s, b, h, q, k: s + FULL_BIAS[b, h, q, k],
    "bias of keys": lambda s, b, h, q, k: s + PER_KEY[k] - PER_KEY[q],
    "view of a buffer": lambda s, b, h, q, k: s + FULL_BIAS.view(BATCH * HEADS, SIZE, SIZE)[b * HEADS + h, q, k],
    "captured scale": lambda s, b, h, q, k: s * SCALE,
    "captured scale and table": lambda s, b, h, q, k: s * SCALE + PER_KEY[k],
    "closure of a number": (lambda factor: lambda s, b, h, q, k: s * factor + (q - k) / factor)(7),
    "distance of documents": lambda s, b, h, q, k: torch.where(DOCUMENT[q] == DOCUMENT[k], s - (POSITION[q] - POSITION[k]), s),
    "batch and head terms": lambda s, b, h, q, k: s + b - h * 0.5 + q * 0.01 - k * 0.02,
    "number of a sequence": lambda s, b, h, q, k: s + (q - OFFSETS[SEQUENCE[q]]) * 0.1,
    "exponential decay": lambda s, b, h, q, k: s - torch.log2(1.0 + (q - k).abs()) * torch.rsqrt(h + 1.0),
    "where in a where": lambda s, b, h, q, k: torch.where(q > k, torch.where(h > 1, s, s + 1), torch.where(b == 1, s * 2, -s)),
    "clipped distance": lambda s, b, h, q, k: s + PER_KEY[(q - k).clamp(-8, 8) + 8],
    "masked fill": lambda s, b, h, q, k: s.masked_fill(LENGTHS[b] <= k, float("-inf")),
    "nested trigonometry": lambda s, b, h, q, k: torch.sin(torch.cos(s)) + torch.tan(b),
    "branching trigonometry": twice,
    "head scale": lambda s, b, h, q, k: s * HEAD_BIAS[h],
    "head gate": lambda s, b, h, q, k: s * torch.sigmoid(GATES[h]),
    "temperature of a head": lambda s, b, h, q, k: s / TEMPERATURE[h],
    "multiplied by queries": lambda s, b, h, q, k: s * PER_KEY[q],
    "symmetric bias": lambda s, b, h, q, k: s + PER_KEY[q] + PER_KEY[k],
    "flipped indices": lambda s, b, h, q, k: s + POSITION_BIAS[k, q],
    "indirect index": lambda s, b, h, q, k: s + PER_KEY[SHIFTS[q]],
    "window of a table": lambda s, b, h, q, k: torch.where((q - k).abs() <= 8, s + PER_KEY[(q - k + 8).clamp(0, 16)], float("-inf")),
    "one layer of a table": lambda s, b, h, q, k: s + FULL_BIAS[1][h, q, k],
    "sequences by score": lambda s, b, h, q, k: torch.where(DOCUMENT[q] == DOCUMENT[k], s, float("-inf")),
    "bidirectional prefix by score": lambda s, b, h, q, k: torch.where((k < PREFIX[b]) | (q >= k), s, -float("inf")),
    "buffer computed first": lambda s, b, h, q, k: s + (PER_KEY * 2 + 1)[k],
    "two calls of a mod": then(then(alibi, relative), lambda s, b, h, q, k: s * 0.5),
    "16 bit": lambda s, b, h, q, k: s.bfloat16() * 1.5 + PER_KEY[k].half(),
}  # fmt: skip

MASK_MODS: dict[str, Callable[..., Any]] = {
    "none": lambda b, h, q, k: q.new_ones((), dtype=torch.bool),
    "causal": causal,
    "causal with an offset": offset_by(causal, 16),
    "sliding window": lambda b, h, q, k: (q >= k) & (q - k <= 10),
    "two-sided window": lambda b, h, q, k: (q - k).abs() <= 10,
    "prefix": lambda b, h, q, k: (k < PREFIX[b]) | (q >= k),
    "prefix of a function": any_of(lambda b, h, q, k: k < 20, causal),
    "document": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
    "document and causal": all_of(causal, lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k]),
    "document and window": all_of(lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k], lambda b, h, q, k: (q - k).abs() < 9),
    "causal inside documents": lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (POSITION[q] >= POSITION[k]),
    "packed sequences": lambda b, h, q, k: (SEQUENCE[q] == SEQUENCE[k]) & (q - OFFSETS[SEQUENCE[q]] >= k - OFFSETS[SEQUENCE[k]]),
    "padding": lambda b, h, q, k: (q < LENGTHS[b]) & (k < LENGTHS[b]),
    "padding and causal": all_of(lambda b, h, q, k: k < LENGTHS[b], causal),
    "dilated window": lambda b, h, q, k: (q >= k) & (q - k <= 32) & ((q - k) % 4 == 0),
    "dilated by head": lambda b, h, q, k: (q - k) % (h + 1) == 0,
    "strided": lambda b, h, q, k: (q >= k) & ((q - k < 8) | ((q - k) % 8 == 7)),
    "chunked": lambda b, h, q, k: (q // 16 == k // 16) & (q >= k),
    "block diagonal": lambda b, h, q, k: q // 8 == k // 8,
    "local and global": lambda b, h, q, k: ((q - k).abs() <= 5) | (k < 4) | (q < 4),
    "sink and window": lambda b, h, q, k: (q >= k) & ((k < 4) | (q - k < 16)),
    "random blocks": lambda b, h, q, k: SPARSE[h, q // 8, k // 8],
    "natten": natten(3),
    "natten with a wider kernel": natten(5),
    "natten in Morton order": morton,
    "sliding tiles": tiled,
    "tree": lambda b, h, q, k: PARENTS[q, k],
    "tree behind a prefix": lambda b, h, q, k: torch.where(k < 16, True, PARENTS[q, (k - 16).clamp(min=0)]),
    "modalities": lambda b, h, q, k: (q >= k) | ((MODALITY[q] == MODALITY[k]) & (MODALITY[q] > 0)),
    "pages": paged,
    "by head": lambda b, h, q, k: torch.where(h % 2 == 0, q >= k, (q - k).abs() < 7),
    "by batch": lambda b, h, q, k: (b == 0) | (q >= k),
    "negated": lambda b, h, q, k: ~((q - k).abs() < 6),
    "exclusive or": lambda b, h, q, k: (q >= k) ^ (k % 3 == 0),
    "logical functions": lambda b, h, q, k: torch.logical_and(q >= k, torch.logical_not(k % 5 == 0)),
    "bits": lambda b, h, q, k: ((q ^ k) & 4) == 0,
    "inverse causal": lambda b, h, q, k: q <= k,
    "causal with a captured offset": lambda b, h, q, k: q + OFFSET >= k,
    "another of each batch": of_each_batch(causal, lambda b, h, q, k: (q - k).abs() < 9),
    "documents, clamped": clamped_documents(causal),
    "images before a text": lambda b, h, q, k: (q >= k) & ((k <= IMAGES[q]) | (IMAGES[q] < 0)),
    "frames of a video": video,
    "a nest of all and any": any_of(all_of(causal, any_of(lambda b, h, q, k: k < 7, lambda b, h, q, k: q - k < 13)), lambda b, h, q, k: q == k),
    "fractions": lambda b, h, q, k: (q / 7).floor() == (k / 7).floor(),
}  # fmt: skip

SCORE_MODS |= FURTHER_SCORE_MODS
MASK_MODS |= FURTHER_MASK_MODS
