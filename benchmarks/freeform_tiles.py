"""Tiles of the Hopper forward on free-form attention, beside flashgen's plain causal kernel in the same rounds: bf16, 16k tokens, hidden size 2048.

    python benchmarks/freeform_tiles.py window,documents 64 192,64,6,160,32,16,1,1,0 128,128,3,240,24,16,1,1,0 >> rows.jsonl

Kinds of `freeform.py`; a tile is BLOCK_M, BLOCK_N, STAGES, CONSUMER_REGS, PRODUCER_REGS, SECTION, OWN_STAGING, LAZY_SUM, TAKE_TURNS. One JSON line a
kind, tile and length: milliseconds (median), and the speed per visible pair and per touched tile over plain causal's. Nothing is judged
here: `hopper_freeform.py` does that. `results/h200_freeform_tiles.csv` holds rows of one H200 taken this way by an earlier script, by text of the kernel:
its column `text` says which; this file has not run on a GPU yet.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import freeform
import torch
from torch import Tensor

import flashgen
from flashgen.config import KernelConfig
from flashgen.variants import by_name

ROUNDS, CALLS = 7, 4
LENGTHS = (8192, 2048)
Job = tuple[str, tuple[int, ...]]


def config(tile: tuple[int, ...]) -> KernelConfig:
    """A tile as a configuration."""
    variant = by_name("gluon_fwd_sm90")
    values = [bool(x) if number > 5 else x for number, x in enumerate(tile)]
    return variant.config(**dict(zip((knob.name for knob in variant.knobs), values, strict=True)))


def call(job: Job, x: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    """One forward: as flashgen chooses where no tile is given."""
    how: dict[str, Any] = {"config": config(job[1])} if job[1] else {"backend": "auto"}
    flashgen.attention(*x, **options, **how)


def rows(kinds: list[str], head_dim: int, tiles: list[tuple[int, ...]], length: int) -> list[dict[str, Any]]:
    """Times of all jobs of one length, interleaved."""
    heads, device = 2048 // head_dim, "cuda"
    shape = (16384 // length, length, heads, head_dim)
    x = [tuple(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)) for _ in range(2)]
    jobs: list[Job] = [("causal", ()), *((kind, tile) for kind in kinds for tile in tiles)]
    options: dict[str, dict[str, Any]] = {}
    for name in {"causal", *kinds}:
        kind = freeform.KINDS[name]
        options[name] = dict(kind.options(heads, device))
        if kind.by_mod:
            options[name]["mask_mod"] = freeform.mask_mod(kind, length, device)
    times: dict[Job, list[float]] = {job: [] for job in jobs}
    for turn in range(ROUNDS + 1):  # the first compiles
        for number in torch.randperm(len(jobs)).tolist():
            job = jobs[number]
            torch.cuda._sleep(4_000_000)  # the host is ahead
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for step in range(CALLS):
                call(job, x[step % 2], options[job[0]])  # type: ignore[arg-type]
            stop.record()
            torch.cuda.synchronize()
            if turn:
                times[job].append(start.elapsed_time(stop) / CALLS)
    median = {job: sorted(found)[len(found) // 2] for job, found in times.items()}
    plain, (pairs, touched) = median[jobs[0]], freeform.counted("causal", length)
    found = []
    for job, ms in median.items():
        own = freeform.counted(job[0], length)
        speeds = {"pair_speed": plain / ms * own[0] / pairs, "tile_speed": plain / ms * own[1] / touched}
        sizes = {"kind": job[0], "head_dim": head_dim, "seqlen": length, "tile": list(job[1])}
        found.append({**sizes, "ms": round(ms, 4), **{name: round(value, 3) for name, value in speeds.items()}})
    return found


def main() -> None:
    """Print the rows of the kinds, the head dim and the tiles that are named."""
    kinds, head_dim, *given = sys.argv[1:]
    tiles = [tuple(map(int, one.split(","))) for one in given]
    for length in LENGTHS:
        for row in rows(kinds.split(","), int(head_dim), tiles, length):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("FLASHGEN_STAND_INS", "0")  # each call's own kernel is timed
    main()
