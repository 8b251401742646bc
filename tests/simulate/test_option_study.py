"""The shipped results of the mutation study of kernels with options, a sample of its mutants, and what must never be missing."""

from __future__ import annotations

import collections
from pathlib import Path

import option_study
import pytest
import test_free_bwd_mutants
from option_reviewed import OPEN, REVIEWED
from option_subjects import KERNELS, SUBJECTS, all_schedules, considered, verdict

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "mutation_study_options.csv"
ROWS = option_study.read(RESULTS)


def test_every_option_of_every_kernel_was_studied() -> None:
    assert [(row["kernel"], row["option"]) for row in ROWS] == [(one.kernel, one.option) for one in SUBJECTS]
    assert {one.kernel for one in SUBJECTS} == set(KERNELS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kernel']}-{row['option']}".replace(" ", "-"))
def test_what_nobody_notices_is_reviewed(row: dict[str, str]) -> None:
    whole, tried, found = (int(row[name]) for name in ("mutants", "tried", "found"))
    survivors = [key for key in row["survivors"].split("; ") if key]
    kinds = sum(int(kind.split()[-1]) for kind in row["kinds"].split("; ") if kind)
    assert whole >= tried >= found == kinds and len(survivors) == tried - found
    assert set(survivors) <= {*REVIEWED[row["kernel"]], *OPEN[row["kernel"]]}


@pytest.mark.parametrize("kernel", KERNELS)
def test_most_are_found(kernel: str) -> None:
    rows = [row for row in ROWS if row["kernel"] == kernel]
    tried, found = (sum(int(row[name]) for row in rows) for name in ("tried", "found"))
    assert tried >= 100 and found >= option_study.BAR * tried
    # What is not explained stays rare, and goes once a case catches it.
    seen = {key for row in rows for key in row["survivors"].split("; ")}
    assert set(OPEN[kernel]) <= seen and len(OPEN[kernel]) <= 0.02 * tried
    assert not set(OPEN[kernel]) & set(REVIEWED[kernel])


# Of what can be broken, what each kernel with options must never survive: (break, kernel) -> broken edits that CI always tries,
# of tests/mutation or, for the Hopper backward, of `test_free_bwd_mutants`.
NEVER: dict[tuple[str, str], tuple[str, ...]] = {
    ("a mask off by one", "gluon_fwd_sm90"): ("options, Hopper: the window shows one key too many on the left",),
    ("a mask off by one", "gluon_bwd_sm90"): ("the window shows one row too many",),
    ("a mask off by one", "triton_fwd"): ("options: the window shows one key too many on the left",),
    ("a mask off by one", "triton_bwd"): (
        "options: dk and dv see one key too many on the left", "options: dq sees one key too many on the left",
    ),
    ("a wrong block class", "gluon_fwd_sm90"): ("options, Hopper: blocks that mask_mod hides in part taken for whole ones",),
    ("a wrong block class", "gluon_bwd_sm90"): ("blocks that hide something taken for whole ones",),
    ("a wrong block class", "triton_fwd"): ("options: blocks that mask_mod hides in part taken for whole ones",),
    ("a wrong block class", "triton_bwd"): ("options: rows that mask_mod hides in part taken for whole ones",),
    ("dropout shifted", "gluon_fwd_sm90"): ("options, Hopper: dropout shifted by a row",),
    ("dropout shifted", "gluon_bwd_sm90"): ("dropout of the first keys",),
    ("dropout shifted", "triton_fwd"): ("options: dropout shifted by a key",),
    ("dropout shifted", "triton_bwd"): ("options: dp of what dropout dropped", "options: dv of what dropout dropped"),
    ("the bias's gradient unreduced", "gluon_bwd_sm90"): ("the bias's gradient of one row",),
    ("the bias's gradient unreduced", "triton_bwd"): (
        "options: the bias's gradient unreduced over rows", "options: the bias's gradient unreduced over keys",
    ),
    ("the sink missing in lse", "gluon_fwd_sm90"): (
        "options, Hopper: the sink missing in the denominator", "options, Hopper: the maximum of lse without the sink",
    ),
    ("the sink missing in lse", "triton_fwd"): ("options: the sink missing in the denominator",),
    ("delta missing", "gluon_bwd_sm90"): ("delta missing",),
    ("delta missing", "triton_bwd"): ("backward: dk without delta", "backward: dq without delta"),
    ("the scale missing", "gluon_bwd_sm90"): ("dk not scaled", "dq not scaled"),
    ("the scale missing", "triton_bwd"): ("backward: dk without the scale", "backward: dq without the scale"),
    ("a dropped reduce", "gluon_bwd_sm90"): ("dq not added",),
    ("a dropped reduce", "triton_bwd"): ("backward: dk not accumulated",),
    ("a wrong sum over the group", "gluon_bwd_sm90"): ("dk and dv of the first head of a group", "the wrong heads of a group"),
    ("a wrong sum over the group", "triton_bwd"): ("backward: one head of the group", "backward: the wrong heads of the group"),
}  # fmt: skip


def test_what_must_never_survive_is_always_tried() -> None:
    from test_mutation import TRIED  # of tests/mutation

    tried = {broken.name for broken in TRIED} | {name for name, *_ in test_free_bwd_mutants.MUTANTS}
    named = collections.Counter(name for names in NEVER.values() for name in names)
    assert set(named) <= tried, set(named) - tried
    assert max(named.values()) == 1


@pytest.mark.long
def test_sampled_mutants_are_found() -> None:
    """Of one cheap subject; `make torture` studies all."""
    (subject,) = (one for one in SUBJECTS if one.name == "gluon_bwd_sm90: softcap, sinks and dsinks")
    sample = considered(subject)[::4]
    assert len(sample) > 4
    for number, broken in enumerate(sample):
        found = verdict(broken, all_schedules(number)[:1])
        assert found or broken.mutant.key in REVIEWED[subject.kernel], broken.mutant
