"""What a longer run met: cases by kernel and by option, and what failed; written after every case, so that nothing ends it unseen.

python tests/fuzz/tally.py -o benchmarks/results/h200_fuzz.json RUN.json ...     # joins the runs of several processes
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cases import Case

OWN = ("cases", "failed", "kernels", "options", "failures", "running")


def kernel_of(case: Case) -> str:
    """`gluon forward`, `triton ordered backward` and the like."""
    if not case.grad:
        return f"{case.backend} forward"
    return f"{case.backend} {'ordered ' * case.deterministic}backward"


def options_of(case: Case) -> Iterator[str]:
    """What a case asks for beside plain attention, and what its tensors look like."""
    yield case.dtype
    yield f"head dim {case.head_dim}"
    names = (
        "causal",
        "softcap",
        "sinks",
        "seqused",
        "bias",
        "bias_inf",
        "attn_mask",
        "alibi",
        "lse",
        "spread",
        "dropout_p",
    )
    yield from (name for name in names if getattr(case, name))
    for name in ("score_mod", "mask_mod", "block_mask"):
        if getattr(case, name):
            yield name
            yield f"{name}: {getattr(case, name)}"
    for name, there in {
        "window": case.window != (-1, -1),
        "packed": bool(case.lengths),
        "grouped heads": case.group > 1,
        "two head dims": case.head_dim != case.head_dim_v,
        "top-left": case.causal and case.top_left,
        "heads first": case.layout == "bhsd",
        "given scale": case.scale is not None,
        f"values: {case.values}": case.values != "normal",
        f"strides: {case.strides}": case.strides != "dense",
    }.items():
        if there:
            yield name


class Tally:
    """Counts of one process.

    Args:
        path: a JSON file that follows; None keeps nothing.
        about: said with the counts, e.g. the device.
    """

    def __init__(self, path: Path | None = None, **about: Any) -> None:
        self._path, self._about = path, about
        self.kernels: Counter[str] = Counter()
        self._options: dict[str, Counter[str]] = {}
        self._failures: list[dict[str, Any]] = []

    def begin(self, case: Case) -> None:
        """A case is about to run: should the process end in it, the file names it."""
        self._write(running=case.dumps())

    def end(self, case: Case, said: str | None) -> None:
        """A case ran; `said` is what is wrong with it."""
        kernel = kernel_of(case)
        self.kernels[kernel] += 1
        for option in options_of(case):
            self._options.setdefault(option, Counter())[kernel] += 1
        if said is not None:
            self._failures.append({"kernel": kernel, "case": json.loads(case.dumps()), "said": said})
        self._write()

    def _write(self, running: str | None = None) -> None:
        if self._path is None:
            return
        beside = self._path.with_suffix(".part")
        counts = {
            "cases": self.kernels.total(),
            "failed": len(self._failures),
            "kernels": self.kernels,
            "options": self._options,
        }
        now = {} if running is None else {"running": json.loads(running)}
        beside.write_text(json.dumps(self._about | counts | {"failures": self._failures} | now))
        os.replace(beside, self._path)


def joined(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several runs together, their failures one after another; a case in which a run ended is one of them."""
    about: dict[str, Any] = {}
    kernels: Counter[str] = Counter()
    options: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    for run in runs:
        about |= {name: value for name, value in run.items() if name not in OWN}
        kernels.update(run["kernels"])
        for name, found in run["options"].items():
            options.setdefault(name, Counter()).update(found)
        failures += run["failures"]
        if "running" in run:
            case = Case.loads(json.dumps(run["running"]))
            failures.append({"kernel": kernel_of(case), "case": run["running"], "said": "the process ended in it"})
    counts = {"cases": kernels.total(), "failed": len(failures), "kernels": dict(sorted(kernels.items()))}
    sorted_options = {name: dict(sorted(found.items())) for name, found in sorted(options.items())}
    return about | counts | {"options": sorted_options, "failures": failures}


def text_of(total: dict[str, Any]) -> str:
    """JSON with a line for each option and each failure."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(value)}"
        for name, value in total.items()
        if name not in ("options", "failures")
    ]
    for name in ("options", "failures"):
        rows = total[name]
        each = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()] if isinstance(rows, dict) else map(json.dumps, rows)  # fmt: skip
        inner, (begin, end) = ",\n  ".join(each), "{}" if isinstance(rows, dict) else "[]"
        lines.append(f'"{name}": {begin}\n  {inner}\n {end}' if inner else f'"{name}": {begin}{end}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def main(arguments: list[str]) -> int:
    """Join files; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    total = joined(json.loads(path.read_text()) for path in given.runs)
    given.output.write_text(text_of(total))
    print(f"{total['cases']} cases, {total['failed']} failed; {', '.join(f'{n} {name}' for name, n in total['kernels'].items())}")  # fmt: skip
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
