"""Comparisons as rows of a CSV file that only grows, and as one JSON document."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flashgen.bench.environment import Environment
from flashgen.bench.rounds import PROTOCOL_SIDE_BY_SIDE
from flashgen.errors import InvalidProblemError
from flashgen.peers.compare import Comparison, Contestant

_SIZES = ("dtype", "batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "head_dim", "head_dim_v", "causal", "causal_alignment")  # fmt: skip
_LIBRARIES = ("flashgen", "torch", "triton", "python")

# One row per contestant and problem; times in milliseconds, ratios are contestant / baseline. A figure that was not
# measured is empty. benchmarks/README.md says what each column means.
COLUMNS = (
    "date", "protocol", "op", *_SIZES, "contestant", "version", "detail", "status", "message", "budget_used", "samples",
    "median_ms", "p10_ms", "p90_ms", "ratio_median", "ratio_p10", "ratio_p90", "ratio_low", "ratio_high", "verdict", "floor",
    "tflops", "gbps", "prepare_s", "cuda_graph", "copies", "overflows", "settled", "device", "gpu", "driver",
    "sm_mhz_before", "sm_mhz_after", "cpu", "threads", *_LIBRARIES,
)  # fmt: skip


def check_csv(path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Refuse a file that rows cannot be appended to, before any work.

    Raises:
        InvalidProblemError: it is no file in a writable folder, or its first line is another header.
    """
    if not path.parent.is_dir():
        raise InvalidProblemError(f"--csv {path}: the folder {path.parent} does not exist. Make it first.")
    if path.is_dir():
        raise InvalidProblemError(f"--csv {path} is a folder: name a file.")
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if tuple(found) != tuple(columns):
        odd = sorted(set(found) ^ set(columns)) or ["their order"]
        raise InvalidProblemError(
            f"--csv {path} has another header than {PROTOCOL_SIDE_BY_SIDE}'s, it differs in {', '.join(odd)}: "
            "rows are only ever appended to a file of the same columns. Name another file."
        )


def append_csv(path: Path, comparison: Comparison, environment: Environment) -> None:
    """Append one comparison's rows, with the header where the file is new.

    Raises:
        InvalidProblemError: as `check_csv`.
    """
    append_rows(path, [row(comparison, entry, environment) for entry in comparison.contestants])


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows of these columns, with the header where the file is new.

    Raises:
        InvalidProblemError: as `check_csv`.
    """
    check_csv(path, columns)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of such a file.

    Raises:
        InvalidProblemError: as `check_csv`.
    """
    check_csv(path, columns)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(comparison: Comparison, entry: Contestant, environment: Environment) -> dict[str, Any]:
    """One contestant as `COLUMNS` name it."""
    found: dict[str, Any] = {name: getattr(comparison.problem, name) for name in _SIZES}
    found |= {
        name: getattr(comparison, name) for name in ("protocol", "op", "cuda_graph", "copies", "overflows", "settled")
    }
    if comparison.options:  # so that nobody takes the row for plain attention
        found["op"] = f"{comparison.op}:{'+'.join(comparison.options)}"
    found |= {name: getattr(entry, name) for name in ("version", "detail", "status", "message", "verdict")}
    figures: dict[str, float | None] = {
        "budget_used": entry.budget_used,
        "prepare_s": entry.prepare_s,
        "tflops": entry.tflops,
        "gbps": entry.gbps,
        "floor": comparison.floor,
        "sm_mhz_before": comparison.gpu_before.get("sm_mhz"),
        "sm_mhz_after": comparison.gpu_after.get("sm_mhz"),
    }
    if entry.time is not None:
        figures |= {"median_ms": entry.time.latency_ms}
        figures |= {"p10_ms": entry.time.latency_p10_ms, "p90_ms": entry.time.latency_p90_ms}
    if entry.ratio is not None:
        figures |= {f"ratio_{name}": getattr(entry.ratio, name) for name in ("median", "p10", "p90", "low", "high")}
    found |= {name: "" if value is None else f"{value:.6g}" for name, value in figures.items()}
    machine = {name: getattr(environment, name) for name in ("date", "device", "gpu", "driver", "cpu", "threads")}
    versions = {name: environment.versions.get(name, "") for name in _LIBRARIES}
    return found | machine | versions | {"contestant": entry.name, "samples": len(entry.samples)}


def document(
    comparisons: Sequence[Comparison],
    environment: Environment,
    *,
    not_run: Sequence[str] = (),
    interrupted: bool = False,
) -> dict[str, Any]:
    """Everything that was measured, samples included, as one JSON-ready value."""
    return {
        "protocol": PROTOCOL_SIDE_BY_SIDE,
        "environment": asdict(environment),
        "absent": absent(comparisons),
        "comparisons": [_comparison(one) for one in comparisons],
        "not_run": list(not_run),
        "interrupted": interrupted,
    }


def absent(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Peers that are not there -> why."""
    entries = (entry for one in comparisons for entry in one.contestants)
    return {entry.name: entry.message for entry in entries if entry.status == "absent"}


def _comparison(one: Comparison) -> dict[str, Any]:
    entries = [asdict(entry) for entry in one.contestants if entry.status != "absent"]
    names = (
        "op", "protocol", "cuda_graph", "floor", "copies", "overflows", "coverage", "warm_up_rounds", "settled", "gpu_before",
        "gpu_after", "notes", "interrupted", "expired",
    )  # fmt: skip
    return {
        "problem": asdict(replace(one.problem, mods=None)),
        "key": str(one.problem),
        "options": one.options,
        "flops": one.flops,
        "bytes": one.moved_bytes,
        **{name: getattr(one, name) for name in names},
        "contestants": entries,
    }
