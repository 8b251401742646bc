"""A fixed sample of the Hopper backward's mutants; `make torture` studies all of them under every schedule."""

from __future__ import annotations

import backward
import pytest

SAMPLE = 16  # every sixteenth: a spread over all functions of the file


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize(("key", "schedule"), list(zip(backward.SAMPLED, ("random", "lazy"), strict=True)))
def test_sampled_mutants_are_found(key: str, schedule: str) -> None:
    study = backward.study_of(key)
    known = backward.REVIEWED[key]
    sample = [m for m in study.mutants[5::SAMPLE] if m.key not in known and not backward.of_huge_rows(m)]
    assert len(sample) > 10
    # One schedule may never bring two thread blocks to the same rows at a time.
    tries = ((schedule, 3), ("priority", 3), ("random", 4))
    survivors = [m for m in sample if not any(study.verdict(m.text, schedule=one, seed=seed) for one, seed in tries)]
    assert not survivors, "\n".join(map(str, survivors))


ORDERED = (
    ('sem="acquire"', 'sem="relaxed"'),
    ('sem="release"', 'sem="relaxed"'),
    ("store_wait(0, read_only=False)", "store_wait(0)"),
    ("\n            store_wait(0, read_only=False)\n", "\n"),
    ("\n            partition_barrier()\n            gl.atomic_add", "\n            gl.atomic_add"),
)
# In any order: who stores a block of rows, and when others may add to it.
FIRST = (
    ("gl.atomic_cas(turn, 0, 1, ", "gl.atomic_add(turn, 0, "),
    ('sem="release"', 'sem="relaxed"'),
    (
        'if state == 1:\n                while gl.atomic_add(turn, 0, sem="acquire") == 1:\n                    pass',
        "pass",
    ),
    ("\n                store_wait(0, read_only=False)\n", "\n"),
    ("\n                partition_barrier()\n", "\n"),
    ("is_first = state == 0", "is_first = state != 2"),
)


@pytest.mark.parametrize("schedule", ["eager", "priority"])
@pytest.mark.parametrize(("old", "new"), ORDERED)
def test_what_keeps_sums_of_dq_in_order_is_needed(old: str, new: str, schedule: str) -> None:
    study = backward.study_of(backward.SPECS[0])
    assert old in study.text
    # The first of all stores: what is not ordered with it races.
    assert study.verdict(study.text.replace(old, new), schedule=schedule, seed=3) in ("unordered-sum", "global-race")


@pytest.mark.parametrize(("old", "new"), FIRST)
def test_what_lets_the_first_store_is_needed(old: str, new: str) -> None:
    """Thread blocks that come one after the other never meet: some schedule must bring two of them together."""
    study = backward.study_of(backward.SPECS[0])
    assert old in study.text
    tried = ((schedule, seed) for schedule in ("random", "priority") for seed in (3, 4, 5))
    found = (study.verdict(study.text.replace(old, new), schedule=schedule, seed=seed) for schedule, seed in tried)
    assert next((verdict for verdict in found if verdict is not None), None) in ("global-race", "numbers")


@pytest.mark.slow
@pytest.mark.parametrize("key", backward.SAMPLED)
def test_the_original_is_right(key: str) -> None:
    """Of all, under every schedule, where `make torture` studies them."""
    study = backward.study_of(key)
    assert study.verdict(study.text, schedule="priority", seed=3) is None


@pytest.mark.parametrize("key", backward.SPECS)
def test_reviewed_mutants_exist(key: str) -> None:
    assert set(backward.REVIEWED[key]) <= {mutant.key for mutant in backward.study_of(key).mutants}
