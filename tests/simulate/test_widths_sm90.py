"""Masks of the Hopper forward where D and Dv are padded to different widths: what is computed anew goes through memory of Dv's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import flashgen
from flashgen.simulator import SCHEDULES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from cases import Case
from judge import judge

_CASE: dict[str, Any] = {
    "backend": "gluon", "dtype": "bf16", "batch": 1, "seqlen_q": 140, "seqlen_k": 200, "heads_kv": 1, "group": 2, "lse": True, "tile": (128, 64),
    "seed": 5,
}  # fmt: skip
_PACKED: dict[str, Any] = {**_CASE, "lengths": ((130, 100, 90), (0, 5, 5), (40, 3, 0), (70, 130, 66)), "seqused": True}

# Wider keys, wider values, and each with columns that only padding has.
WIDTHS = ((192, 128), (96, 64), (64, 128), (128, 64), (256, 40), (64, 256), (136, 64), (256, 128), (72, 200))
MASKS: dict[str, dict[str, Any]] = {
    "causal and mask_mod": {**_CASE, "causal": True, "mask_mod": "columns"},
    "documents": {**_CASE, "mask_mod": "document", "seqlen_q": 200},
    "attn_mask": {**_CASE, "attn_mask": "bhij"},
    "window": {**_CASE, "window": (60, 10), "top_left": True},
    "words of another content": {**_CASE, "mask_mod": "sequences", "batch": 2, "words": "stale"},
    "block_mask": {**_CASE, "block_mask": "columns", "mask_mod": "rows"},
    "packed": {**_PACKED, "causal": True},
    "everything": {
        **_CASE, "window": (120, 20), "softcap": 2.0, "alibi": "bh", "sinks": True, "bias": "1h1j", "attn_mask": "b1ij", "score_mod": "table",
        "mask_mod": "columns", "dropout_p": 0.3,
    },
}  # fmt: skip
# Every mask at the widths of DeepSeek's attention, and every pair of widths with a mask that hides whole keys.
TABLE = {
    **{f"192/128, {mask}": Case(**{**given, "head_dim": 192, "head_dim_v": 128}) for mask, given in MASKS.items()},
    **{
        f"{d}/{dv}, {mask}": Case(**{**MASKS[mask], "head_dim": d, "head_dim_v": dv})
        for number, (d, dv) in enumerate(WIDTHS[1:])
        for mask in ("causal and mask_mod", tuple(MASKS)[1 + number % (len(MASKS) - 1)])
    },
}


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", TABLE)
def test_widths(name: str) -> None:
    said = judge(TABLE[name], again=False)  # the same schedule again gives the same bits
    assert said is None, said


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = flashgen.interpret.simulate
    monkeypatch.setattr(flashgen.interpret, "simulate", lambda *a, **k: real(*a, **k, schedule=schedule, seed=5))
    for d, dv in ((192, 128), (64, 128)):
        said = judge(
            Case(**{**_CASE, "mask_mod": "columns", "head_dim": d, "head_dim_v": dv, "seqlen_q": 300}), again=False
        )
        assert said is None, said
