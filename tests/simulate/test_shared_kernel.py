"""The kernel that masks share, in the simulator: each mask's own result, and from words where a tile is computed anew (what is hidden is NaN there)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_options_sm90 import CASES

from flashgen import execution, shared_masks

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
    said = judge(case)
    assert said is None, said
    assert seen and all(seen), "a kernel of its own ran"
