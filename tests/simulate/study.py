"""The mutation study: every automatic mutant of every subject under every schedule alone; part of `make torture`.

    python tests/simulate/study.py [SUBJECT ...]

Exit code 1 when a mutant survives that is not on the reviewed list, when a reviewed one is found by every schedule (the
list is stale), or when less than 98 % of a subject's mutants are found under some schedule.
"""

from __future__ import annotations

import collections
import sys
import time

import backward
import forward
import subjects
import torch

from flashgen.simulator import SCHEDULES, Schedule, mutants

BAR = 0.98
SEED = 1


def study(name: str) -> bool:
    """Study one subject; prints a line a schedule; returns whether all is well."""
    rendered = forward if name in forward.SPECS else backward if name in backward.SPECS else None
    kernel = rendered.study_of(name) if rendered else None
    if rendered is forward:
        found = forward.considered(name)
    else:
        found = kernel.mutants if kernel else mutants(subjects.text_of(name))
    reviewed = rendered.REVIEWED.get(name, {}) if rendered else {}

    def verdict(text: str, schedule: Schedule) -> str | None:
        if kernel:
            return kernel.verdict(text, schedule=schedule, seed=SEED)
        return subjects.verdict(name, text, schedule, SEED)

    good, survivors = True, collections.Counter[str]()
    for schedule in SCHEDULES:
        kinds, start = collections.Counter[str](), time.monotonic()
        for mutant in found:
            kind = verdict(mutant.text, schedule)
            kinds[kind or "survived"] += 1
            if kind is None:
                survivors[mutant.key] += 1
                if mutant.key not in reviewed:
                    print(f"  SURVIVES {schedule}: {mutant}")
                    good = False
        share = 1 - kinds["survived"] / len(found)
        good &= share >= BAR
        said = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        print(
            f"{name} {schedule}: {share:.1%} of {len(found)} found ({said}), {time.monotonic() - start:.0f} s",
            flush=True,
        )
    keys = {mutant.key for mutant in found}
    for key in sorted(set(reviewed) & keys):
        if not survivors[key]:
            print(f"  STALE: every schedule finds {key}")
            good = False
    return good


def main() -> int:
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*subjects.SUBJECTS, *forward.SPECS, *backward.SPECS]
    failed = [name for name in names if not study(name)]  # all of them, whatever the first one says
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
