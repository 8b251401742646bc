"""The mutation study: every automatic mutant of every subject under every schedule alone; part of `make torture`.

    python tests/simulate/study.py [--results FILE.csv] [SUBJECT ...]

Exit code 1 when a mutant survives that is not on the reviewed list, when a reviewed one is found by every schedule (the
list is stale), or when less than 98 % of a subject's mutants are found under some schedule. With `--results` a row for each
subject and schedule replaces what the file says of them; `test_study_results.py` holds the shipped file to the same bar.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # One thread: those of BLAS spin for each other on a machine that others use, and take thirty times as long.
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}

import backward
import forward
import subjects
import torch

from flashgen.simulator import SCHEDULES, Mutant, Schedule, mutants

BAR = 0.98
SEED = 1
COLUMNS = ("subject", "digest", "schedule", "mutants", "found", "kinds", "survivors")


def rendered_of(name: str) -> object:
    """The module that knows a rendered subject; None for the small kernels of this folder."""
    return forward if name in forward.SPECS else backward if name in backward.SPECS else None


def text_of(name: str) -> str:
    """What is broken."""
    rendered = rendered_of(name)
    return rendered.study_of(name).text if rendered else subjects.text_of(name)  # type: ignore[attr-defined]


def digest_of(name: str) -> str:
    """Of the text, so that a result of another text shows as such."""
    return hashlib.sha256(text_of(name).encode()).hexdigest()[:12]


def considered(name: str) -> tuple[Mutant, ...]:
    """The mutants of a subject."""
    rendered = rendered_of(name)
    return rendered.considered(name) if rendered else mutants(subjects.text_of(name))  # type: ignore[attr-defined]


def reviewed_of(name: str) -> dict[str, str]:
    """Key of a mutant -> why it is no defect."""
    rendered = rendered_of(name)
    return rendered.REVIEWED.get(name, {}) if rendered else {}  # type: ignore[attr-defined]


def verdict(name: str, text: str, schedule: Schedule) -> str | None:
    """How a broken copy is found under one schedule; None where it survives."""
    rendered = rendered_of(name)
    if rendered:
        return rendered.study_of(name).verdict(text, schedule=schedule, seed=SEED)  # type: ignore[attr-defined]
    return subjects.verdict(name, text, schedule, SEED)


def study(name: str, results: Path | None = None) -> bool:
    """Study one subject; prints a line a schedule; returns whether all is well."""
    found, reviewed = considered(name), reviewed_of(name)
    good, survivors = True, collections.Counter[str]()
    for schedule in SCHEDULES:
        kinds, left, start = collections.Counter[str](), list[str](), time.process_time()
        rendered = rendered_of(name)
        said = verdict(name, rendered.study_of(name).text, schedule) if rendered else None  # type: ignore[attr-defined]
        if said is not None:
            print(f"  WRONG {schedule}: the original itself: {said}", flush=True)
            good = False
        for mutant in found:
            kind = verdict(name, mutant.text, schedule)
            kinds[kind or "survived"] += 1
            if kind is None:
                survivors[mutant.key] += 1
                left.append(mutant.key)
                if mutant.key not in reviewed:
                    print(f"  SURVIVES {schedule}: {mutant}", flush=True)
                    good = False
        share = 1 - kinds["survived"] / len(found)
        good &= share >= BAR
        said = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        print(
            f"{name} {schedule}: {share:.1%} of {len(found)} found ({said}), {time.process_time() - start:.0f} s of CPU time",
            flush=True,
        )
        if results:
            keep(results, name, schedule, len(found), kinds, left)
    keys = {mutant.key for mutant in found}
    for key in sorted(set(reviewed) & keys):
        if not survivors[key]:
            print(f"  STALE: every schedule finds {key}")
            good = False
    return good


def read(results: Path) -> list[dict[str, str]]:
    """The rows of a file of results; none where there is no file."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(
    results: Path, name: str, schedule: str, count: int, kinds: collections.Counter[str], survivors: list[str]
) -> None:
    """Put one row into the file, in the place of an older one."""
    row = {
        "subject": name, "digest": digest_of(name), "schedule": schedule, "mutants": str(count),
        "found": str(count - kinds["survived"]),
        "kinds": "; ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()) if kind != "survived"),
        "survivors": "; ".join(survivors),
    }  # fmt: skip
    rows = [old for old in read(results) if (old["subject"], old["schedule"]) != (name, schedule)]
    rows = sorted([*rows, row], key=lambda one: (one["subject"], SCHEDULES.index(one["schedule"])))  # type: ignore[arg-type]
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="every automatic mutant of every subject under every schedule alone")
    parser.add_argument("subjects", nargs="*", help="all where none is named")
    parser.add_argument("--results", type=Path, help="a CSV file; rows of the same subject and schedule are replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.subjects or [*subjects.SUBJECTS, *forward.SPECS, *backward.SPECS]
    # All of them, whatever the first one says.
    failed = [name for name in names if not study(name, options.results)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
