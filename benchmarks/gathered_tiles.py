"""Two tiles of the Hopper forward at head dim 128 where score_mod gathers a captured tensor pair by pair, in turns: bf16, 16 heads, 16k tokens.

    FLASHGEN_STAND_INS=0 python benchmarks/gathered_tiles.py [LENGTH ...] >> rows.jsonl

`rel` reads a table at a distance, `pair` at (q_idx, kv_idx); `wide16` has blocks of 128 keys, `narrow` of 64. One JSON line a kind: milliseconds (median of 9
rounds of 3 calls), and in `wrong` what failed or differs from the first tile. `results/h200_gathered_tiles.jsonl` is one NVIDIA H200 (torch 2.11.0, Triton
3.6.0), BlockMask's row of a first form of this script with more tiles.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen.config import KernelConfig
from flashgen.variants import by_name

TILES = {
    "wide16": (128, 128, 2, 240, 24, 16, True, True, False),
    "narrow": (128, 64, 3, 240, 24, 16, True, True, False),
}
ROUNDS, CALLS = 9, 3


def config(tile: tuple[Any, ...]) -> KernelConfig:
    """A tile as a configuration."""
    variant = by_name("gluon_fwd_sm90")
    return variant.config(**dict(zip((knob.name for knob in variant.knobs), tile, strict=True)))


def row(length: int, score: str, mask: str) -> dict[str, Any]:
    """Times of both tiles."""
    q, k, v = (torch.randn(16384 // length, length, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ids = (torch.arange(length, device="cuda") // 700).int()
    rel, table = torch.randn(16, 64, device="cuda"), torch.randn(length, length, device="cuda")

    def documents(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (ids[i] == ids[j]) & (j <= i)

    def added(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + (rel[h, (i - j) % 64] if score == "rel" else table[i, j])

    options: dict[str, Any] = {"score_mod": added}
    if mask == "causal":
        options["causal"] = True
    elif mask == "documents":
        options["mask_mod"] = documents
    elif mask == "BlockMask":
        options["block_mask"] = create_block_mask(documents, None, None, length, length, device="cuda")
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name, tile in TILES.items():
        try:
            found[name] = flashgen.attention(q, k, v, config=config(tile), **options)
        except flashgen.FlashgenError as error:
            wrong.append(f"{name}: {error}")
            continue
        if not torch.allclose(found[name].float(), next(iter(found.values())).float(), atol=2e-2, rtol=2e-2):
            wrong.append(f"{name} differs")
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(ROUNDS):
        for name in found:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # the host is ahead: launches are not timed
            begin.record()
            for _ in range(CALLS):
                flashgen.attention(q, k, v, config=config(TILES[name]), **options)
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / CALLS)
    medians = {name: round(statistics.median(each), 4) for name, each in times.items()}
    return {"S": length, "score": score, "mask": mask, **medians, "wrong": wrong}


def main() -> None:
    """Print a line a kind."""
    for length in map(int, sys.argv[1:] or ("8192",)):
        for score in ("rel", "pair"):
            for mask in ("causal", "none", "documents", "BlockMask"):
                print(json.dumps(row(length, score, mask)), flush=True)


if __name__ == "__main__":
    main()
