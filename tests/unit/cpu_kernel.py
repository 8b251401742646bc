"""A kernel file that runs on CPU tensors, and misbehaves for the configurations that a test names; a run on it needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashgen import KernelConfig, Problem, Target
from flashgen.render import KernelSource
from flashgen.variants import by_name

CPU = Target.named("cpu")
PROBLEM = Problem(
    dtype="fp32", batch=1, seqlen_q=70, seqlen_k=70, num_heads_q=2, num_heads_kv=1, head_dim=16, head_dim_v=16, causal=True
)  # fmt: skip
TILES = [
    KernelConfig(variant="triton_fwd", BLOCK_M=64, BLOCK_N=block_n, num_warps=4, num_stages=stages)
    for block_n in (16, 32, 64, 128)
    for stages in (2, 3, 4)
]

# `FAULTS` maps (BLOCK_N, num_stages) to what goes wrong. Launches are counted per process, on the tuned problem alone.
_TEXT = """
import os
import time

import torch

from flashgen.reference import attention_low_precision

FAULTS = {faults!r}
LOG = {log!r}
counts = {{}}


def launch(q, k, v, o, lse, *, sm_scale, causal_offset, BLOCK_M, BLOCK_N, num_warps, num_stages):
    tuned = q.shape[0] == 1 and q.shape[1] == 70 and k.shape[1] == 70
    key = (BLOCK_N, num_stages)
    if tuned:
        counts[key] = counts.get(key, 0) + 1
        if counts[key] == 1 and LOG:
            with open(LOG, "a") as file:
                file.write(f"{{os.getpid()}} {{BLOCK_N}} {{num_stages}}\\n")
    fault = FAULTS.get(key) if tuned else None
    if fault == "hang":
        time.sleep(600)
    elif fault == "kill":
        os.kill(os.getpid(), 9)
    elif fault == "memory":
        raise MemoryError
    elif fault == "sticky":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif fault == "bug":
        raise TypeError("a launch that is simply wrong")
    elif isinstance(fault, float) and counts[key] == 1:
        time.sleep(fault)
    out, sums = attention_low_precision(q, k, v, causal=True, sm_scale=sm_scale, causal_offset=causal_offset)
    o.copy_(out)
    if lse is not None:
        lse.copy_(sums)
    if fault == "nan":
        o[:, -1] = float("nan")
    elif fault == "unwritten":
        o[:, -1] = o.new_tensor(float("nan"))
    elif fault == "guard":
        torch.as_strided(o, (1,), (1,), o.storage_offset() + o.numel()).fill_(1.0)
    elif fault == "input":
        q[0, 0, 0, 0] = 7.0
    elif fault == "late" and counts[key] >= 20:
        o[0, 0, 0, 0] += 1.0
    elif fault == "once" and counts[key] == 6:
        o[0, 0, 0, 0] += 1.0
    elif fault == "wrong" or (FAULTS.get(key) == "elsewhere" and q.shape[1] != 70):
        o.mul_(1.01)
"""


def source(faults: dict[tuple[int, int], Any] | None = None, log: Path | None = None) -> KernelSource:
    """The file; `faults` by (BLOCK_N, num_stages), `log` gets a line for the first launch of each configuration in a process."""
    text = _TEXT.format(faults=faults or {}, log=str(log) if log else "")
    return KernelSource(text=text, spec=PROBLEM.spec, variant="triton_fwd")


def use(
    monkeypatch: pytest.MonkeyPatch, tiles: list[KernelConfig], faults: dict[tuple[int, int], Any] | None = None, log: Path | None = None
) -> None:  # fmt: skip
    """Let the tuner tune that file over these tiles."""
    kernel = source(faults, log)
    monkeypatch.setattr("flashgen.tuner.run.source_of", lambda variant, problem: kernel)
    monkeypatch.setattr("flashgen.tuner.run.legal_list", lambda variant, problem, target: (list(tiles), ()))
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())
    assert by_name("triton_fwd").illegal(PROBLEM.spec, CPU, tiles[0]) is None


def at(tile: KernelConfig) -> tuple[Any, Any]:
    """A tile's key among the faults."""
    return (tile["BLOCK_N"], tile["num_stages"])
