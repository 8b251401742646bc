"""A fixed sample of the Hopper backward's mutants; `make torture` studies all of them under every schedule."""

from __future__ import annotations

import backward
import pytest

SAMPLE = 16  # every sixteenth: a spread over all functions of the file


@pytest.mark.slow
@pytest.mark.parametrize(("key", "schedule"), list(zip(backward.SAMPLED, ("random", "lazy"), strict=True)))
def test_sampled_mutants_are_found(key: str, schedule: str) -> None:
    study = backward.study_of(key)
    sample = [mutant for mutant in study.mutants[5::SAMPLE] if mutant.key not in backward.REVIEWED[key]]
    assert len(sample) > 10
    survivors = [mutant for mutant in sample if study.verdict(mutant.text, schedule=schedule, seed=3) is None]
    assert not survivors, "\n".join(map(str, survivors))


ORDERED = (
    ('sem="acquire"', 'sem="relaxed"'),
    ('sem="release"', 'sem="relaxed"'),
    ("store_wait(0, read_only=False)", "store_wait(0)"),
    ("            store_wait(0, read_only=False)\n", ""),
    ("            partition_barrier()\n            gl.atomic_add", "            gl.atomic_add"),
)


@pytest.mark.parametrize("schedule", ["eager", "priority"])
@pytest.mark.parametrize(("old", "new"), ORDERED)
def test_what_keeps_sums_of_dq_in_order_is_needed(old: str, new: str, schedule: str) -> None:
    study = backward.study_of(backward.SPECS[0])
    assert old in study.text
    assert study.verdict(study.text.replace(old, new), schedule=schedule, seed=3) == "unordered-sum"


@pytest.mark.slow
@pytest.mark.parametrize("key", backward.SPECS)
def test_the_original_is_right(key: str) -> None:
    study = backward.study_of(key)
    assert study.verdict(study.text, schedule="priority", seed=3) is None


@pytest.mark.parametrize("key", backward.SPECS)
def test_reviewed_mutants_exist(key: str) -> None:
    assert set(backward.REVIEWED[key]) <= {mutant.key for mutant in backward.study_of(key).mutants}
