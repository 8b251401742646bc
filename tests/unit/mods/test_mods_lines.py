"""Lines of one position: where they cross a value, against looking at every position; and mods tried without their device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flashgen import probe
from flashgen.errors import InvalidProblemError
from flashgen.mods import lines
from flashgen.mods.lines import Line


@pytest.mark.parametrize("samples", [1 << 12, 4])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("side", ["at_least", "at_most"])
@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize(
    ("size", "steps"), [(1, 3), (63, 5), (64, 1), (65, 40), (1000, 7), (20000, 900), (20000, 20000)]
)
def test_the_hull_of_a_monotone_line_is_exact(
    size: int, steps: int, falling: bool, side: str, strict: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if samples == 4:  # so few that a sample stands for all that is computed at once
        monkeypatch.setattr(lines, "_SAMPLES", samples)
        monkeypatch.setattr(lines, "_STEP", 64)
    random = np.random.default_rng(size + steps)
    values = np.sort(random.integers(-steps, steps, size))
    values = values[::-1].copy() if falling else values
    first = -7
    line = Line(lambda positions: values[positions - first], first, first + size - 1)
    low = random.integers(first, first + size, 300)
    high = np.minimum(low + random.integers(0, size + 3, 300), first + size - 1)
    limit = random.integers(-steps - 2, steps + 2, 300)
    bound: dict[str, Any] = {"at_least": None, "at_most": None, side: limit}
    found_low, found_high = line.hull(low, high, strict=strict, **bound)
    assert line.direction == (-1 if falling and np.any(values != values[0]) else 1)
    for number in range(300):
        part = values[low[number] - first : high[number] - first + 1]
        held = part > limit[number] if side == "at_least" else part < limit[number]
        held |= (part == limit[number]) & (not strict)
        places = np.flatnonzero(held) + low[number]
        if len(places):
            assert (found_low[number], found_high[number]) == (places[0], places[-1])
        else:
            assert found_low[number] > found_high[number]


def test_mods_are_tried_where_their_tensors_are_not() -> None:
    """Tensors without memory stand for those of a GPU: none of their elements is looked at."""
    table, ids = torch.empty(2, 8, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")
    cpu = torch.device("cpu")
    with probe.on_the_cpu():
        probe.score_mod(lambda s, b, h, i, j: s + table[h, (i - j) % 8], cpu)
        probe.score_mod(lambda s, b, h, i, j: torch.where(ids[i] > 3, s, torch.zeros((), device=ids.device)), cpu)
        probe.mask_mod(
            "mask_mod", lambda b, h, i, j: (ids[i] == ids[j]) & torch.stack([ids[i] > 0, ids[i] > 1])[0], cpu
        )
        with pytest.raises(InvalidProblemError, match=r"returns torch\.int32"):
            probe.mask_mod("mask_mod", lambda b, h, i, j: ids[i], cpu)
        with pytest.raises(InvalidProblemError, match="reduces"):
            probe.score_mod(lambda s, b, h, i, j: (s + table[h, j]).sum(-1, keepdim=True), cpu)
        with pytest.raises(InvalidProblemError, match="IndexError"):
            probe.score_mod(lambda s, b, h, i, j: s + table[h, j, i], cpu)
