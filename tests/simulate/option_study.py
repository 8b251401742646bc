"""The mutation study of kernels with options: every automatic mutant of the lines that options add; part of `make torture`.

    python tests/simulate/option_study.py [--results FILE.csv] [--every N] [KERNEL or SUBJECT ...]

A mutant is found when a case notices: a defect that the simulator reports, memory written outside, a result outside the error
budget, or other work than the original's. Each is run under one schedule of the simulator, which one in turn, and under the
others as well where that one notices nothing. Lines that a plain kernel has too are the study's of plain kernels, `study.py`.
Exit code 1 when a mutant survives that is neither reviewed nor known to be open.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import logging
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # One thread: those of BLAS spin for each other on a machine that others use, and take thirty times as long.
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import option_subjects as subjects
import torch

BAR = 0.85  # of all that is tried; what is not found is reviewed one by one, or stands in `OPEN`
COLUMNS = ("kernel", "option", "digests", "mutants", "tried", "found", "kinds", "survivors")


def digests_of(subject: subjects.Subject) -> str:
    """Of the texts that were broken, so that a result of another text shows as such."""
    texts = dict.fromkeys(run.text for run in subject.runs)
    return " ".join(hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts)


def study(subject: subjects.Subject, every: int, results: Path | None = None) -> bool:
    """Study one subject, or every N-th of its mutants; returns whether each survivor is reviewed."""
    start, kinds, left, good = time.process_time(), collections.Counter[str](), list[str](), True
    whole = subjects.considered(subject)
    for number, broken in enumerate(whole[::every]):
        kind = subjects.verdict(broken, subjects.all_schedules(number))
        kinds[kind or "survived"] += 1
        if kind is None:
            left.append(broken.mutant.key)
            if subjects.reviewed(subject.kernel, broken.mutant.key) is None:
                print(f"  SURVIVES: {broken.mutant}\n      {broken.line}", flush=True)
                good = False
    tried = sum(kinds.values())
    said = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    took = time.process_time() - start
    print(f"{subject.name}: {tried - len(left)} of {tried} found ({said}), {took:.0f} s of CPU time", flush=True)
    if results:
        keep(results, subject, len(whole), kinds, left)
    return good


def read(results: Path) -> list[dict[str, str]]:
    """The rows of a file of results; none where there is no file."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(
    results: Path, subject: subjects.Subject, whole: int, kinds: collections.Counter[str], survivors: list[str]
) -> None:
    """Put one row into the file, in the place of an older one."""
    tried = sum(kinds.values())
    row = {
        "kernel": subject.kernel, "option": subject.option, "digests": digests_of(subject), "mutants": str(whole), "tried": str(tried),
        "found": str(tried - len(survivors)),
        "kinds": "; ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()) if kind != "survived"),
        "survivors": "; ".join(survivors),
    }  # fmt: skip
    order = [(one.kernel, one.option) for one in subjects.SUBJECTS]
    known = [
        old
        for old in read(results)
        if (place := (old["kernel"], old["option"])) in order and place != (subject.kernel, subject.option)
    ]
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*known, row], key=lambda one: order.index((one["kernel"], one["option"]))))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subjects", nargs="*", help="kernels or subjects; all where none is named")
    parser.add_argument("--every", type=int, default=1, help="every N-th mutant alone")
    parser.add_argument("--results", type=Path, help="a CSV file; rows of the same subject are replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flashgen").setLevel(logging.ERROR)
    wanted = [
        one for one in subjects.SUBJECTS if not options.subjects or {one.kernel, one.name} & set(options.subjects)
    ]
    failed = [one.name for one in wanted if not study(one, options.every, options.results)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
