"""The kernel that masks share, in the simulator: each mask's own result, and from words where a tile is computed anew (what is hidden is NaN there)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_options_sm90 import CASES

from flashgen import block_ranges, execution, shared_masks, stand_ins

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from judge import judge

SHARED = [
    "mask_mod",
    "mask_mod of columns",
    "mask_mod of nothing",
    "mask_mod by heads",
    "mask_mod in a window",
    "mask_mod of scattered blocks",
]


@pytest.mark.parametrize("keys", [0, 32, 128])
@pytest.mark.parametrize("name", SHARED)
def test_the_shared_kernel_says_what_a_mask_says(name: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cases have it; with blocks of which 64 keys, those of a tile computed anew, are two; and of which they are half."""
    from dataclasses import replace

    case = CASES[name]
    if keys:
        case = replace(case, tile=(128, keys))
    monkeypatch.setattr(shared_masks, "_ON_CPU", True)
    seen: list[int] = []

    def noted(plan: Any) -> Any:
        spec = shared_masks.kernel_spec(plan)
        seen.append(spec.mods.program.looked_up)  # type: ignore[union-attr]
        return spec

    monkeypatch.setattr(execution, "kernel_spec", noted)
    said = judge(case, again=False)  # the same schedule again gives the same bits
    assert said is None, said
    assert seen and all(seen), "a kernel of its own ran"


@pytest.mark.parametrize("name", ["mask_mod that reads", "mask_mod of blocks that it reads"])
def test_the_shared_kernel_stands_in_for_a_mask_that_reads_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the call that makes the tables; the mask's own kernel, which runs in the next one, gives the same bits."""
    monkeypatch.setattr(shared_masks, "_ON_CPU", True)
    ran: list[tuple[bool, Any, Any]] = []
    run = execution._run_kernel

    def noted(plan: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, operands: Any) -> None:
        for _ in range(2):
            chosen.clear()
            run(plan, q, k, v, out, lse, operands)
            ran.append((chosen[0], out.clone(), None if lse is None else lse.clone()))

    chosen: list[bool] = []
    choose = stand_ins.ways

    def choosing(*arguments: Any) -> Any:
        for way in choose(*arguments):
            chosen.append(way.stands_in)
            yield way

    monkeypatch.setattr(execution, "_run_kernel", noted)
    monkeypatch.setattr(stand_ins, "ways", choosing)
    block_ranges.forget()
    said = judge(CASES[name])
    assert said is None, said
    assert [stood_in for stood_in, *_ in ran[:2]] == [True, False]
    (_, *first), (_, *second) = ran[:2]
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(first, second, strict=True))
