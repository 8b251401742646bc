"""A gallery of masks: what each becomes in a kernel, which tiles it skips, runs unmasked or masks, and that eager PyTorch agrees.

python examples/masks.py               # a table
python examples/masks.py gallery.png   # and a picture (pip install flashgen[plot])

White tiles are never loaded, green ones run without a mask, in orange ones the mask is computed for each pair; dark pairs are visible.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flashgen
from flashgen import mods, plot
from flashgen.errors import FlashgenError

TOKENS, TILE, HEADS = 96, 8, 4
CPU = torch.device("cpu")
TILES = flashgen.KernelConfig(
    variant="triton_fwd", BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1
)  # of the kernel that is run

document = torch.tensor([0] * 30 + [1] * 11 + [2] * 55, dtype=torch.int32)  # three texts, packed
slopes = torch.exp2(-8.0 * torch.arange(1, HEADS + 1) / HEADS)
width, reach = 12, 2  # of an image of 12 x 8 patches, and of its neighbourhoods

# A tree of drafted tokens behind 48 certain ones. An ancestor's walk through the tree encloses those of all below it.
first_draft = 48
enter, leave = torch.zeros(TOKENS, dtype=torch.int32), torch.zeros(TOKENS, dtype=torch.int32)


def walk(node: int, clock: int = 0) -> int:
    """Number the nodes of the tree in the order of a walk; node n has the children 2n + 1 and 2n + 2."""
    if first_draft + node >= TOKENS:
        return clock
    enter[first_draft + node] = clock
    clock = walk(2 * node + 2, walk(2 * node + 1, clock + 1))
    leave[first_draft + node] = clock
    return clock


walk(0)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """No query sees a later key."""
    return q_idx >= kv_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The last 20 keys."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 20)


def prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A prompt that sees itself, then causal."""
    return (kv_idx < 28) | (q_idx >= kv_idx)


def packed(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Causal, within each document."""
    return (q_idx >= kv_idx) & (document[q_idx] == document[kv_idx])


def dilated(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Every fourth of the last 48 keys."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 48) & ((q_idx - kv_idx) % 4 == 0)


def tree(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Speculative decoding: a drafted token sees the certain ones, its ancestors and itself."""
    below = (enter[q_idx] >= enter[kv_idx]) & (enter[q_idx] < leave[kv_idx])
    drafted = (q_idx >= first_draft) & (kv_idx >= first_draft) & below
    return torch.where(kv_idx < first_draft, q_idx >= kv_idx, drafted)


def neighbourhood(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Patches at most two rows and two columns away (NATTEN in two dimensions)."""
    rows = (q_idx // width - kv_idx // width).abs() <= reach
    return rows & ((q_idx % width - kv_idx % width).abs() <= reach)


def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A penalty for distance, of its own slope for each head."""
    return score - slopes[h] * (q_idx - kv_idx)


def soft_cap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Scores held below 20."""
    return 20 * torch.tanh(score / 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the gallery."""

    name: str
    mask: Callable[..., Any]
    score: Callable[..., Any] | None = None


GALLERY = (
    Entry(name="causal", mask=causal),
    Entry(name="sliding window", mask=window),
    Entry(name="prefix", mask=prefix),
    Entry(name="documents", mask=packed),
    Entry(name="dilated window", mask=dilated),
    Entry(name="tree of drafts", mask=tree),
    Entry(name="2-D neighbourhood", mask=neighbourhood),
    Entry(name="ALiBi", mask=causal, score=alibi),
    Entry(name="soft cap", mask=causal, score=soft_cap),
)


def judged(entry: Entry) -> tuple[Any, Any]:
    """The pairs that eager PyTorch lets through, and the class of each tile: 0 none, 1 some, 2 all."""
    zero = torch.zeros((), dtype=torch.int32)
    index = torch.arange(TOKENS, dtype=torch.int32)
    pairs = entry.mask(zero, zero, index[:, None], index[None, :]).numpy()

    program, tensors = mods.program(entry.score, {"mask_mod": entry.mask}, CPU)
    program.check_bounds(tensors, batch=1, num_heads=HEADS, seqlen_q=TOKENS, seqlen_k=TOKENS)
    assert program.mask is not None
    tables = mods.arrays_of(tensors)
    size = {"batch": 1, "num_heads": HEADS, "seqlen_q": TOKENS, "seqlen_k": TOKENS, "block_m": TILE, "block_n": TILE}
    kinds = mods.key_ranges(program.mask, tables, **size).classes(TOKENS // TILE)[0, 0]

    for (i, j), kind in np.ndenumerate(kinds):
        tile = pairs[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
        if (kind == 0 and tile.any()) or (kind == 2 and not tile.all()):
            raise SystemExit(f"{entry.name}: tile {i}, {j} is misjudged")
    skipped, masked, full = (int((kinds == kind).sum()) for kind in (0, 1, 2))
    emission = program.emit_score() if entry.score is not None else program.emit_mask()
    print(f"{entry.name:18} {skipped:4} skipped {full:4} full {masked:4} masked   {emission.result}")
    return pairs, kinds


def attend(entry: Entry) -> float:
    """The generated kernel, run in Triton's interpreter, beside attention as eager PyTorch writes it: the largest difference."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, HEADS, 16) for _ in range(3))
    out = flashgen.attention(q, k, v, mask_mod=entry.mask, score_mod=entry.score, config=TILES)
    assert isinstance(out, torch.Tensor)  # no lse was asked for

    b, h = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.arange(HEADS, dtype=torch.int32).view(1, -1, 1, 1)
    i, j = (torch.arange(TOKENS, dtype=torch.int32).view(shape) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4  # the root of the head dim
    if entry.score is not None:
        scores = entry.score(scores, b, h, i, j)
    scores = scores.masked_fill(~entry.mask(b, h, i, j), -torch.inf)
    eager = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return float((out - eager).abs().max())


def draw(found: list[tuple[Any, Any]], path: Path) -> None:
    """All masks with their tiles."""
    made, axes = plot.figure(3, rows=3, title=f"{TOKENS} tokens in tiles of {TILE} x {TILE}", size=(3.6, 3.8))
    from matplotlib.colors import ListedColormap

    # Hidden and visible pairs of tiles that are skipped, masked and full.
    colours = ListedColormap(["#ffffff", "#000000", "#fbe3c0", "#d9822b", "#c9e7d5", "#2a8a57"])
    for entry, (pairs, kinds), one in zip(GALLERY, found, axes, strict=True):
        tiles = np.kron(kinds, np.ones((TILE, TILE), int))
        one.imshow(2 * tiles + pairs, cmap=colours, vmin=0, vmax=5, interpolation="nearest")
        one.set_title(entry.name)
        one.set_xticks(range(0, TOKENS + 1, 24))
        one.set_yticks(range(0, TOKENS + 1, 24))
        one.grid(False)
    plot.save(made, path)


def main() -> None:
    """Judge every mask; draw them if a file is named."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        if path is not None:
            plot.check(path)
        found = [judged(entry) for entry in GALLERY]
        print("every tile of every mask is what eager PyTorch says")
        worst = max(attend(entry) for entry in GALLERY)
        if worst > 1e-5:
            raise SystemExit(f"a generated kernel is {worst:.1e} off eager attention")
        print(f"every generated kernel gives eager attention, within {worst:.0e}")
        if path is not None:
            draw(found, path)
            print(f"drawn in {path}")
    except FlashgenError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
