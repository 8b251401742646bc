"""The judgement of the cost model: its arithmetic, its data, and that the policy keeps its bounds with the judged data held out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def quality() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import model_quality

        yield model_quality
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_rank_correlation(quality: Any) -> None:
    assert quality.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert quality.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert quality.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert quality.spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)  # ties share a rank
    assert quality.spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_expectation_of_the_best_of_some_draws(quality: Any) -> None:
    slow = [1.0, 1.1, 1.5, 2.0, 3.0]
    for draws in (1, 2, 5):
        expected = math.exp(mean(math.log(min(drawn)) for drawn in combinations(slow, draws)))
        assert quality.expected_best(slow, draws) == pytest.approx(expected)


@pytest.mark.slow
def test_the_judgement_refits_and_the_policy_keeps_its_bounds(
    quality: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two points instead of 48: the whole grid takes half a minute.
    monkeypatch.setattr(quality, "GRID", {"spill_cycles": (8.0, 24.0), "two_stages": (0.15,), "exposed": (0.3,)})
    assert quality.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held_out = [method for method in found["bounds"]["kept"] if "held out" in method]
    assert len(held_out) == 2
    for method in held_out:
        row = found["plain"]["summary"][method]
        assert 1.0 <= row["pick_geo"] <= 1.05 and row["pick_worst"] <= 1.10
        assert row["pick_worst"] == max(figures["pick"] for figures in found["plain"]["problems"][method].values())
        assert len(found["plain"]["problems"][method]) == 8
    assert {found["constants"][f"fitted on d{d}"]["spill_cycles"] for d in (64, 128)} <= {8.0, 24.0}
    assert found["gluon"]["summary"]["model's form, counts by hand"]["spearman"] < 0.5

    monkeypatch.setattr(quality, "BOUND_GEO", 1.0)
    assert quality.main([]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_held_out_means_held_out(quality: Any) -> None:
    """The policy's pick for a problem does not change when that problem's times do."""
    facts, _ = quality.surfaces.load_facts([])
    times = quality.surfaces.plain()
    problem, *others = (p for p in times if p.head_dim == 128)
    away = [p for p in times if p.head_dim == 64]
    turned = {**times, problem: {tile: 1.0 / ms for tile, ms in times[problem].items()}}
    picks = []
    for surface in (times, turned):
        judge = quality.Judge(surface, facts)
        for table, listed in (
            (judge.winners(others), judge.winners([*others, *away])),
            ([], judge.winners(away)),
        ):
            pick = judge.policy(problem, table, listed, quality.costmodel.FITTED)["pick"]
            best = min(judge.times[problem].values())
            picks.append({tile for tile, ms in judge.times[problem].items() if ms / best == pick})
    assert picks[0] & picks[2] and picks[1] & picks[3]


def test_the_data_is_whole(quality: Any) -> None:
    plain, gluon = quality.surfaces.plain(), quality.surfaces.gluon()
    assert sum(map(len, plain.values())) == 400 and sum(map(len, gluon.values())) == 592
    facts, remarks = quality.surfaces.load_facts([p.spec.key for p in plain])
    assert all(set(surface) == set(facts[problem.spec.key]) for problem, surface in plain.items())
    assert "Triton" in remarks[0]
