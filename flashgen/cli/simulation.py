"""What `flashgen check --simulate` and `--mutate` do: Gluon kernels in the simulator, and broken copies of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from flashgen import accuracy, gradients
from flashgen.cli.output import print_json, print_table
from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.mutation import Study
from flashgen.mutation_backward import BackwardStudy
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.simulator import SCHEDULES, Schedule, SimulationError, simulate
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import Variant, candidates

if TYPE_CHECKING:
    from torch import Tensor

_BAR = 0.98  # of all mutants; the rest are to be read: some change nothing
Wanted = list[tuple[AttentionSpec, Problem | None]]


def check_simulated(wanted: Wanted, config: dict[str, Any] | None, *, mutate: bool, as_json: bool) -> int:
    """Simulate the Gluon kernels of the specs, or their mutants; print the result; return the exit code.

    Raises:
        UnsupportedProblemError: no Gluon variant supports any of the specs; lists the reasons.
    """
    target = _target()
    subjects, reasons = [], {}
    for spec, extra in wanted:
        for variant in candidates(spec):
            if variant.backend != "gluon":
                continue
            reason = variant.supports(spec, target)
            if reason is None:
                subjects.append((spec, extra, variant))
            else:
                reasons[f"{variant.name}, {spec.key}"] = reason
    if not subjects:
        raise UnsupportedProblemError("no Gluon kernel computes this, and only these run in the simulator:", reasons)
    row_of = _mutated if mutate else _simulated
    rows = [row for subject in subjects for row in row_of(*subject, target, config)]
    passed = all(row["ok"] for row in rows)
    if as_json:
        print_json({"target": target.name, "ok": passed, "mutants" if mutate else "checks": rows})
        return 0 if passed else 1
    (_print_mutated if mutate else _print_simulated)(rows)
    return 0 if passed else 1


def _target() -> Target:
    """The installed GPU where it is a Hopper, else an H100."""
    found = Target.detect()
    return found if found.backend == "cuda" and found.arch == "sm_90" else Target.named("h100")


_TENSORS = {
    "attention_fwd": ("q", "k", "v", "o", "lse"),
    "attention_bwd": ("dout", "dlse", "q", "k", "v", "out", "lse", "dq", "dk", "dv"),
}


def _launch(
    text: str, spec: AttentionSpec, config: KernelConfig, orders: list[str], schedule: Schedule,
    *tensors: Tensor | None, **scalars: Any,
) -> None:  # fmt: skip
    """Simulate one launch; a backward in its ordered form, whose sums must be ordered; the order goes to `orders`."""
    args = {**dict(zip(_TENSORS[spec.op], tensors, strict=True)), **scalars, **dict(config)}
    report = simulate(text, args, schedule=schedule, ordered_sums=spec.op == "attention_bwd")
    orders.append(" ".join(one.sum_order for one in report.launches))


def _simulated(
    spec: AttentionSpec, extra: Problem | None, variant: Variant, target: Target, given: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """A row a schedule."""
    config = variant.default(spec, target) if given is None else variant.parse_config(given, spec, target)
    text = render(spec, variant).text
    problems = [*accuracy.small_problems(spec), *([] if extra is None else [extra])]
    first: list[str] | None = None
    for schedule in SCHEDULES:
        row = {"spec": spec.key, "variant": variant.name, "config": config.label, "schedule": schedule}
        orders: list[str] = []
        launch = partial(_launch, text, spec, config, orders, schedule)
        try:
            report = gradients.check_launch(launch, spec, problems=problems)
        except SimulationError as error:
            yield {**row, "ok": False, "kind": error.kind, "message": str(error)}
            continue
        first = orders if first is None and report.ok else first
        if report.ok and orders != first:
            why = "floats are added in another order than under the schedule before: the bits depend on the schedule"
            yield {**row, "ok": False, "kind": "unordered-sum", "message": why}
        else:
            yield {
                **row, "ok": report.ok, "kind": None if report.ok else "numbers", "message": report.message,
                "max_error": report.max_error, "ratio": report.ratio,
            }  # fmt: skip


def _print_simulated(rows: list[dict[str, Any]]) -> None:
    print_table(
        ["spec", "config", "schedule", "part of the budget", ""],
        [
            [row["spec"], row["config"], row["schedule"], f"{row['ratio']:.2f}" if "ratio" in row else "",
             "ok" if row["ok"] else row["kind"]]
            for row in rows
        ],
    )  # fmt: skip
    bad = [row for row in rows if not row["ok"]]
    click.echo(f"{len(rows) - len(bad)} of {len(rows)} without a defect and inside the error budget, in the simulator")
    for row in bad:
        click.echo(f"Error: {row['spec']}, schedule {row['schedule']}: {row['message']}", err=True)


def _mutated(
    spec: AttentionSpec, extra: Problem | None, variant: Variant, target: Target, given: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """One row: how many mutants were found, and which were not."""
    if extra is not None or given is not None:
        raise InvalidProblemError(
            "--mutate chooses its own sizes and configurations: give a spec, no sizes, no --config."
        )
    study = (BackwardStudy if spec.op == "attention_bwd" else Study)(spec, variant, target)
    kinds, survivors, unreached = dict[str, int](), list[str](), 0
    for mutant in _shown(study.mutants, spec.key):
        kind = study.verdict(mutant.text)
        if kind is None and not study.reaches(mutant):
            unreached += 1
        elif kind is None:
            survivors.append(str(mutant))
        else:
            kinds[kind] = kinds.get(kind, 0) + 1
    share = 1 - len(survivors) / (len(study.mutants) - unreached)
    yield {
        "spec": spec.key, "variant": variant.name, "ok": share >= _BAR, "mutants": len(study.mutants), "share": share,
        "unreached": unreached, "found": kinds, "survivors": survivors,
    }  # fmt: skip


def _shown(found: Iterable[Any], name: str) -> Iterator[Any]:
    """The items, with a bar on a terminal; on stderr, so that stdout stays the result."""
    with click.progressbar(list(found), label=name, file=sys.stderr, hidden=not sys.stderr.isatty()) as items:
        yield from items


def _print_mutated(rows: list[dict[str, Any]]) -> None:
    print_table(
        ["spec", "mutants", "compiled out", "found", ""],
        [
            [row["spec"], row["mutants"], row["unreached"], f"{row['share']:.1%}",
             ", ".join(f"{kind} {count}" for kind, count in sorted(row["found"].items()))]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        for survivor in row["survivors"]:
            click.echo(f"not found, {row['spec']}: {survivor}")
        if not row["ok"]:
            click.echo(f"Error: {row['spec']}: fewer than {_BAR:.0%} of the mutants were found", err=True)
