"""The shipped results of the mutation study: every subject, every schedule, at the study's own bar; and how they are kept."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import study
from backward import SPECS as BACKWARD
from forward import SPECS as FORWARD

from flashgen.simulator import SCHEDULES

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "mutation_study.csv"


def test_every_rendered_subject_was_studied_under_every_schedule() -> None:
    seen = {(row["subject"], row["schedule"]) for row in study.read(RESULTS)}
    assert {(name, schedule) for name in (*FORWARD, *BACKWARD) for schedule in SCHEDULES} <= seen


@pytest.mark.parametrize("row", study.read(RESULTS), ids=lambda row: f"{row['subject']}-{row['schedule']}")
def test_each_schedule_alone_finds_nearly_all_and_the_rest_is_reviewed(row: dict[str, str]) -> None:
    count, found = int(row["mutants"]), int(row["found"])
    survivors = [key for key in row["survivors"].split("; ") if key]
    assert count > 10 and found >= study.BAR * count
    assert len(survivors) == count - found == count - sum(int(kind.split()[-1]) for kind in row["kinds"].split("; "))
    assert set(survivors) <= set(study.reviewed_of(row["subject"]))


def test_a_row_replaces_what_was_said_before(tmp_path: Path) -> None:
    path, name = tmp_path / "results.csv", FORWARD[0]
    for survivors in (["a: late wait: b"], []):
        kinds = collections.Counter({"deadlock": 2, **({"survived": 1} if survivors else {})})
        study.keep(path, name, "lazy", 2 + len(survivors), kinds, survivors)
        study.keep(path, name, "eager", 2, collections.Counter(deadlock=2), [])
    assert [(row["schedule"], row["mutants"], row["found"], row["survivors"]) for row in study.read(path)] == [
        ("eager", "2", "2", ""),
        ("lazy", "2", "2", ""),
    ]
    assert {row["digest"] for row in study.read(path)} == {study.digest_of(name)}
