"""Random calls over every option at once, judged against the oracle; a failure is shrunk and can be repeated.

    python tests/fuzz/fuzz.py --seeds 1000:500        500 cases from seed 1000 on
    python tests/fuzz/fuzz.py --seconds 600           as many as fit
    python tests/fuzz/fuzz.py --case '{"causal": true}'   exactly this one

Exit code 1 when a case fails; its last line is the command that repeats the shrunken case.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from cases import Case, draw
from judge import judge

Judge = Callable[[Case], str | None]


def verdict(case: Case, judge: Judge = judge) -> str | None:
    """As `judge`; what a backend raises that it should not raise is a failure too."""
    try:
        return judge(case)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"


def simpler(case: Case) -> Iterator[Case]:
    """Cases one step simpler, the largest steps first: an option away, a size halved, a size less one."""
    plain = Case()
    for field in fields(Case):
        value, simplest = getattr(case, field.name), getattr(plain, field.name)
        if field.name in ("backend", "seed") or value == simplest:
            continue
        yield replace(case, **{field.name: simplest})
    for index in range(len(case.lengths)):
        if len(case.lengths) > 1:
            yield replace(case, lengths=case.lengths[:index] + case.lengths[index + 1 :])
        for axis, size in enumerate(case.lengths[index]):
            for less in _less(size, 0):
                row = list(case.lengths[index])
                row[axis] = less
                row[2] = min(row[1], row[2])
                yield replace(case, lengths=(*case.lengths[:index], tuple(row), *case.lengths[index + 1 :]))  # type: ignore[arg-type]
    for name in ("batch", "seqlen_q", "seqlen_k", "heads_kv", "group", "head_dim", "head_dim_v"):
        for less in _less(getattr(case, name), 1):
            yield replace(case, **{name: less})


def _less(size: int, least: int) -> list[int]:
    return [value for value in dict.fromkeys((size // 2, size - 1)) if least <= value < size]


def shrink(case: Case, judge: Judge = judge, *, seconds: float = 60.0) -> tuple[Case, str]:
    """The simplest case found that still fails in the same tensor or the same way, and what is said of it.

    Raises:
        ValueError: the case does not fail.
    """
    said = verdict(case, judge)
    if said is None:
        raise ValueError(f"there is nothing to shrink, this case passes: {case.dumps()}")
    end, moved = time.monotonic() + seconds, True
    while moved and time.monotonic() < end:
        moved = False
        for candidate in simpler(case):
            found = verdict(candidate, judge)
            if found is not None and found.partition(": ")[0] == said.partition(": ")[0]:  # the same failure
                case, said, moved = candidate, found, True
                break
    return case, said


def command(case: Case) -> str:
    """What repeats exactly this case, in the root of the checkout."""
    return f"python tests/fuzz/fuzz.py --case {shlex.quote(case.dumps())}"


def report(case: Case, said: str, judge: Judge = judge) -> str:
    """A failure, shrunk, with the command that repeats it as the last line."""
    small, small_said = shrink(case, judge)
    return f"seed {case.seed} failed: {said}\nshrunk: {small_said}\n{command(small)}"


def main(arguments: list[str]) -> int:
    """Run the cases of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", help="one case as JSON")
    parser.add_argument("--seeds", default="0:200", help="first:count")
    parser.add_argument("--seconds", type=float, help="stop after so long; with no --seeds, from seed 0 on")
    given: Any = parser.parse_args(arguments)
    if given.case is not None:
        case = Case.loads(given.case)
        said = verdict(case)
        print("passed" if said is None else f"failed: {said}\n{command(case)}")
        return 0 if said is None else 1
    first, count = map(int, given.seeds.split(":"))
    end = None if given.seconds is None else time.monotonic() + given.seconds
    failures = done = 0
    for seed in range(first, first + (count if end is None else sys.maxsize // 2)):
        if end is not None and time.monotonic() > end:
            break
        case, done = draw(seed), done + 1
        said = verdict(case)
        if said is not None:
            failures += 1
            print(report(case, said), flush=True)
    print(f"{done} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
