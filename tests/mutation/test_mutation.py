"""Every broken template is noticed, and the whole one is not."""

from __future__ import annotations

import json
import subprocess
import sys

import backends
import pytest
from mutate import MUTANTS, Mutant, caught_by, place_of, whole

# Every broken plain forward; of the backwards and the options, which take longer, those that must never be missing and every sixth
# of all. `make torture` tries all.
NAMED = {
    f"backward: {name}"
    for name in ("dk without delta", "dq without delta", "dk without the scale", "dq without the scale", "dk not accumulated",
                 "one head of the group", "the wrong heads of the group", "dlse dropped")
} | {
    f"options: {name}"
    for name in ("the window shows one key too many on the left", "blocks that mask_mod hides in part taken for whole ones",
                 "dropout shifted by a key", "the sink missing in the denominator", "dv of what dropout dropped",
                 "operands of the first head", "packed: always bottom-right", "the bias's gradient unreduced over rows",
                 "the bias's gradient unreduced over keys", "dk and dv see one key too many on the left",
                 "dq sees one key too many on the left", "rows that mask_mod hides in part taken for whole ones",
                 "dp of what dropout dropped", "the sinks' gradient with the wrong sign")
} | {
    f"options, Hopper: {name}"
    for name in ("full blocks of the first row on the left", "blocks left of the walk not released", "values that a mask hides from all",
                 "dropout shifted by a row", "rows of the next sequence written", "the window shows one key too many on the left",
                 "blocks that mask_mod hides in part taken for whole ones", "the sink missing in the denominator",
                 "the maximum of lse without the sink")
}  # fmt: skip
TRIED = [
    broken
    for number, broken in enumerate(MUTANTS)
    if not broken.name.startswith(("backward: ", "options: ", "options, Hopper: "))
    or broken.name in NAMED
    or number % 6 == 0
]


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("check", list(dict.fromkeys(name for broken in TRIED for name in broken.checks)))
def test_the_whole_template_passes(check: str) -> None:
    """What notices the mutants that are tried here; `make torture` runs every check."""
    whole()[check]()


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("broken", TRIED, ids=lambda broken: broken.name)
def test_it_is_caught(broken: Mutant) -> None:
    result = caught_by(broken)
    assert result is not None, f"no check notices when {broken.file} is broken so: {broken.name}"


@pytest.mark.parametrize("broken", MUTANTS, ids=lambda broken: broken.name)
def test_the_edit_changes_the_template(broken: Mutant) -> None:
    """A template that was edited since must not silently disable a mutant: `old` stands there exactly once."""
    assert broken.old != broken.new
    place_of(broken)


def test_names_are_unique() -> None:
    assert {broken.name for broken in MUTANTS} >= NAMED
    assert len({broken.name for broken in MUTANTS}) == len(MUTANTS)


# -- broken torch backends --


@pytest.mark.parametrize("broken", backends.MUTANTS, ids=lambda broken: broken.name)
def test_the_edit_changes_the_backend(broken: backends.Mutant) -> None:
    text = (backends.ROOT / "flashgen" / broken.file).read_text()
    assert broken.old != broken.new and text.count(broken.old) == 1


@pytest.mark.long
def test_broken_backends_are_caught() -> None:
    """A sample of them, beside the whole backend's edge cases in `tests/fuzz`; `make torture` tries all."""
    command = [sys.executable, backends.__file__, "--every", "4", "--broken-alone", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert len(results) >= 10 and all(results.values())
