"""The Hopper forward of one warpgroup and one loop (BRIEF), in the simulator: bit for bit what the kernel that is compiled meanwhile gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_options_sm90 import CASES

from flashgen import interpret

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from judge import judge

# A diagonal and a window, heads that share a tile, ragged rows; tables, lists, and words of another content; a BlockMask; packed; all at once.
SOME = (
    "a cap in a window",
    "sinks of heads that share a tile",
    "alibi, causal, linear",
    "mask_mod",
    "mask_mod of scattered blocks",
    "lists of another content",
    "mask_mod of blocks that it reads",
    "block_mask",
    "packed",
    "everything",
)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", SOME)
def test_the_brief_kernel_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ran = vars(interpret)["simulate"], 0

    def both(source: Any, given: dict[str, Any], **more: Any) -> Any:
        nonlocal ran
        if source.spec.op != "attention_fwd":
            return real(source, given, **more)
        real(source, {**given, "BRIEF": True}, **more)
        brief = [given[name].clone() for name in ("o", "lse") if given[name] is not None]
        for x in (given["o"], given["lse"]):
            if x is not None:
                x.fill_(torch.nan)
        said = real(source, given, **more)
        whole = [given[name] for name in ("o", "lse") if given[name] is not None]
        ran += 1
        for x, y in zip(brief, whole, strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) and torch.equal(x.isnan(), y.isnan())
        return said

    monkeypatch.setattr(interpret, "simulate", both)
    said = judge(CASES[name], again=False)  # the same schedule again gives the same bits
    assert said is None, said
    assert ran
