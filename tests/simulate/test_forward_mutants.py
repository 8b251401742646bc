"""A fixed sample of the Hopper forward's mutants; `make torture` studies all of them under every schedule."""

from __future__ import annotations

import forward
import pytest

SAMPLE = 16  # every sixteenth: a spread over all functions of the file


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["random", "lazy"])
@pytest.mark.parametrize("key", forward.SAMPLED)
def test_sampled_mutants_are_found(key: str, schedule: str) -> None:
    study = forward.study_of(key)
    sample = [mutant for mutant in study.mutants[5::SAMPLE] if mutant.key not in forward.REVIEWED[key]]
    assert len(sample) > 10
    survivors = [mutant for mutant in sample if study.verdict(mutant.text, schedule=schedule, seed=3) is None]
    assert not survivors, "\n".join(map(str, survivors))


@pytest.mark.sampled(every=3)
@pytest.mark.slow
@pytest.mark.parametrize("key", (*forward.SAMPLED, "attention_fwd-bf16-d192-dv128-causal-lse"))
def test_the_original_is_right(key: str) -> None:
    """Of all, under every schedule, where `make torture` studies them."""
    study = forward.study_of(key)
    assert study.verdict(study.text, schedule="priority", seed=3) is None


@pytest.mark.parametrize("key", forward.SPECS)
def test_reviewed_mutants_exist(key: str) -> None:
    assert set(forward.REVIEWED[key]) <= {mutant.key for mutant in forward.study_of(key).mutants}
