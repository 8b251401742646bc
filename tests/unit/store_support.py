"""What the tests of the store share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flashgen
from flashgen.store.records import Record

SHAPE = {"batch": 2, "seqlen_q": 1024, "seqlen_k": 1024, "num_heads_q": 32, "num_heads_kv": 8}
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
DIGEST = "d" * 64
KERNEL = ("attention_fwd-bf16-d128-causal", "triton_fwd", DIGEST, "h100")


def make(**changes: Any) -> Record:
    """A measured record; `shape` and `config` given as changes to the usual ones."""
    values: dict[str, Any] = {
        "op": "attention_fwd",
        "spec_key": KERNEL[0],
        "variant": KERNEL[1],
        "digest": DIGEST,
        "gpu": "h100",
        "arch": "sm_90",
        "target": {"num_sms": 132, "hbm_gbps": 3350.0},
        "status": "ok",
        "latency_ms": 1.25,
        "error_ratio": 0.5,
        "versions": {"torch": "2.13.0", "triton": "3.9.0"},
        "protocol": "events-1",
        "session": "s1",
        "created": "2026-01-31T12:00:00+00:00",
    }
    if changes.get("status", "ok") != "ok":
        values["latency_ms"] = None
    values |= changes
    values["shape"] = SHAPE | changes.get("shape", {})
    values["config"] = CONFIG | changes.get("config", {})
    return Record(**values)


def predicted(**changes: Any) -> Record:
    """A predicted record."""
    return make(**{"status": "predicted", "rank": 0, "model": "m1", "protocol": "compile", **changes})


def environment() -> dict[str, str]:
    """An environment in which a child process imports this flashgen."""
    return {**os.environ, "PYTHONPATH": str(Path(flashgen.__file__).parents[1])}


def python(code: str, *arguments: object, timeout: float = 60) -> str:
    """Run code in a new interpreter; what it printed."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout
