"""Every automatic mutant of the small kernels is found, under each schedule alone."""

from __future__ import annotations

import ast
import collections

import pytest
from subjects import KERNELS, SCHEDULES, SUBJECTS, text_of, verdict

from flashgen import simulator as sim


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_mutant_is_found(name: str, schedule: str) -> None:
    survivors = [str(m) for m in sim.mutants(text_of(name)) if verdict(name, m.text, schedule, seed=1) is None]
    assert not survivors, "\n".join(survivors)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_mutant_is_one_change_that_keeps_the_lines(name: str) -> None:
    text = text_of(name)
    found = sim.mutants(KERNELS / f"{name}.py")
    assert found == sim.mutants(text)
    assert len({mutant.text for mutant in found}) == len(found) >= 10
    for mutant in found:
        old, new = text.splitlines(), mutant.text.splitlines()
        ast.parse(mutant.text)
        assert len(old) == len(new)
        changed = [number for number, pair in enumerate(zip(old, new, strict=True), 1) if pair[0] != pair[1]]
        assert 1 <= len(changed) <= 6 and abs(changed[0] - mutant.line) <= 6
        assert f"line {mutant.line}" in str(mutant) and mutant.before in str(mutant)
        assert mutant.key == f"{mutant.function}: {mutant.rule}: {mutant.before}"


def test_the_rules_cover_what_synchronises() -> None:
    rules = collections.Counter(mutant.rule for name in SUBJECTS for mutant in sim.mutants(text_of(name)))
    wanted = {
        "drop wait", "drop arrive", "drop expect", "drop init", "drop fence_async_shared", "drop store_wait", "drop barrier",
        "wrong phase", "half the bytes", "twice the bytes", "count + 1", "arrive twice", "early arrive", "drop wgmma wait",
        "weaker wgmma wait", "weaker store wait", "drop accumulator", "coordinate + 1", "index + 1", "stage + 1",
        "comparison off by one", "relaxed atomic", "atomic value + 1", "choices swapped", "late fence_async_shared",
    }  # fmt: skip
    assert wanted <= set(rules), wanted - set(rules)


def test_host_code_is_left_alone() -> None:
    text = "def launch(x):\n    x.store(1)\n    return x - y\n"
    assert sim.mutants(text) == ()
