"""`flashgen tune`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from flashgen import settings
from flashgen.cli.output import json_option, print_json, print_table
from flashgen.cli.problems import problem_options, problems_of, take, target_of
from flashgen.errors import DatabaseError, InvalidProblemError, UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.store import Record, open_store, portfolios, seeds
from flashgen.target import Target
from flashgen.tuner import STRATEGIES, TuneResult, choose_mode, devices, portfolio
from flashgen.tuner import tune as run_tuner
from flashgen.tuner.ahead import ahead
from flashgen.tuner.context import choose_variant
from flashgen.tuner.plan import plan
from flashgen.tuner.progress import clock_time
from flashgen.tuner.run import with_gradients
from flashgen.tuner.worker import MeasuringWorker


@click.command()
@problem_options
@click.option("--train", is_flag=True, help="The forward that training runs, which keeps lse, and its backward.")
@click.option(
    "--target", "target_name", metavar="NAME", help="A GPU by name, e.g. h100; the installed one where not given."
)
@click.option("--mode", type=click.Choice(["auto", "measured", "predicted"]), default="auto", show_default=True)
@click.option("--strategy", type=click.Choice(STRATEGIES), default="auto", show_default=True)
@click.option("--trials", type=click.IntRange(min=1), help="At most so many configurations per problem.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), help="Of the whole run, seconds.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Compiling processes (one per core where not given), and at most so many GPUs side by side (this host's current one "
    "where not given; all of a cluster's).",
)
@click.option(
    "--cluster", metavar="ADDRESS", help="Measure on the GPUs of a Ray cluster: host:port of its head, auto, or local."
)
@click.option("--study", metavar="FILE", help="Keep Optuna's studies in this storage (never the tuning database).")
@click.option("--resume", is_flag=True, help="Do not repeat what the database holds already.")
@click.option("--retry-failed", is_flag=True, help="Also try what crashed, hung or was wrong in an earlier run.")
@click.option("--plan", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--write-seeds",
    "seeds_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the winners as seeds, and the portfolios of all trials.",
)
@click.option("--database", metavar="PATH_OR_URL", help="Instead of the user's own.")
@click.option("--quiet", is_flag=True, help="No progress.")
@json_option
def tune(as_json: bool, **values: Any) -> int:
    """Search the best configuration of a problem and store every trial.

    On the installed GPU candidates are measured; for another target they are compiled and ranked, and every figure is
    called predicted.
    """
    problems = problems_of(take(values), all_kinds=True)
    if values["train"]:
        problems = _pairs(problems)
    target = target_of(values["target_name"])
    if values["plan"]:
        return _run(problems, target, values, as_json, None)
    with ahead(values["mode"], values["cluster"]) as worker:
        return _run(problems, target, values, as_json, worker)


def _run(
    problems: list[Problem], target: Target | None, values: dict[str, Any], as_json: bool, worker: MeasuringWorker | None
) -> int:  # fmt: skip
    left_out: list[dict[str, str]] = []
    if values["cluster"] is None or target is not None:  # else the cluster says what its GPUs are
        problems, left_out = _coverable(problems, target or devices.installed())
    if values["plan"]:
        return _plan(problems, left_out, target or devices.installed(), values, as_json)
    result = run_tuner(
        problems,
        target=target,
        mode=values["mode"],
        max_trials=values["trials"],
        timeout_s=values["timeout_s"],
        database=values["database"],
        workers=values["workers"],
        progress=not values["quiet"] and not as_json,
        strategy=values["strategy"],
        study=values["study"],
        resume=values["resume"],
        retry_failed=values["retry_failed"],
        cluster=values["cluster"],
        worker=worker,
    )
    written: tuple[Path, ...] = ()
    if values["seeds_folder"] is not None:
        written = _write_seeds(values["seeds_folder"], result)
    if as_json:
        print_json({**result.to_json(), "not_tuned": left_out, "seeds": [str(path) for path in written]})
    else:
        _print(result, written)
        _print_left_out(left_out)
    return 130 if result.interrupted else 0


def _pairs(problems: list[Problem]) -> list[Problem]:
    """The problems with those of their gradients.

    Raises:
        InvalidProblemError: they are those of gradients alone.
    """
    if any(problem.op != "attention_fwd" for problem in problems):
        raise InvalidProblemError(
            "--train tunes a forward with its backward: leave --op out, or --train for the backward alone."
        )
    return with_gradients([replace(problem, requires_grad=True) for problem in problems])


def _write_seeds(folder: Path, result: TuneResult) -> tuple[Path, ...]:
    """The winners as seeds, and the portfolios of what was tuned, from every trial: the folder's, the database's, this run's."""
    winners = [row.winner for row in result.problems if row.winner is not None]
    files = seeds.write(folder, winners)
    if not winners:
        return files
    arch = winners[0].arch
    rows = [row for path in sorted(folder.glob("*/*.jsonl")) for row in seeds.read(path) if row.arch == arch]
    with open_store(result.database) as store:
        rows += store.trials(arch=arch)
    rows += [row for problem in result.problems for row in problem.trials]
    tuned = {(row.op, row.variant) for row in winners}
    members = [row for row in portfolio.derive(rows) if row.arch == arch and (row.op, row.variant) in tuned]
    return (*files, *portfolios.write(portfolio.folder_beside(folder), members))


def _coverable(problems: list[Problem], target: Target) -> tuple[list[Problem], list[dict[str, str]]]:
    """The problems that a kernel covers, and those that none does, with the reason.

    Raises:
        UnsupportedProblemError: no kernel covers any of them.
    """
    covered, left_out = [], []
    for problem in dict.fromkeys(problems):
        try:
            choose_variant(problem, target)
        except UnsupportedProblemError as error:
            if len(problems) == 1:
                raise
            reason = "; ".join(f"{name}: {why}" for name, why in error.reasons.items())
            left_out.append({"problem": str(problem), "spec": problem.spec.key, "reason": reason})
        else:
            covered.append(problem)
    if not covered:
        raise UnsupportedProblemError(
            f"nothing to tune for {target.name}: no kernel covers any of the {len(left_out)} kinds of layers:",
            {row["problem"]: row["reason"] for row in left_out},
        )
    return covered, left_out


def _print_left_out(left_out: list[dict[str, str]]) -> None:
    for row in left_out:
        click.echo(f"not tuned, runs in the torch backend: {row['problem']}: {row['reason']}")


def _plan(
    problems: list[Problem], left_out: list[dict[str, str]], target: Target, values: dict[str, Any], as_json: bool
) -> int:
    # A cluster's GPUs are not here to be asked, and it measures.
    mode = "measured" if values["cluster"] is not None else choose_mode(values["mode"], target)
    env = settings.read()
    where = values["database"] or env.database_url
    stored: list[Record] = []
    if values["database"] is not None or (env.database_path is not None and env.database_path.exists()):
        with contextlib.suppress(DatabaseError), open_store(where) as store:
            for op in sorted({problem.spec.op for problem in problems}):
                stored += store.trials(op=op)
    plans = [
        plan(
            problem, target, mode=mode, max_trials=values["trials"], workers=values["workers"], stored=stored,
            strategy=values["strategy"],
        )
        for problem in problems
    ]  # fmt: skip
    known = [row.estimate_s for row in plans if row.estimate_s is not None]
    total = sum(known) if len(known) == len(plans) else None
    if as_json:
        print_json(
            {
                "target": target.name,
                "mode": mode,
                "strategy": values["strategy"],
                "database": where,
                "estimate_s": total,
                "problems": [
                    {**asdict(row), "problem": str(row.problem), "spec": row.problem.spec.key, "strategy": values["strategy"]}
                    for row in plans
                ],
                "not_tuned": left_out,
            }
        )  # fmt: skip
        return 0
    print_table(
        ["problem", "variant", "legal", "seeds", "trials", "compiled already", "strategy", "estimate"],
        [
            [row.problem, row.variant, row.legal, row.seeds, row.trials, row.cached, values["strategy"], _about(row.estimate_s)]
            for row in plans
        ],
    )  # fmt: skip
    for basis in dict.fromkeys(row.basis for row in plans):
        click.echo(f"estimate: {basis}")
    click.echo(
        f"target {target.name}, mode {mode}, database {where}; in all {_about(total)} (an estimate); nothing was done (--plan)"
    )
    _print_left_out(left_out)
    return 0


def _about(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"about {clock_time(seconds)}"


def _print(result: TuneResult, written: tuple[Path, ...]) -> None:
    rows = []
    for row in result.problems:
        config = (
            "none"
            if row.winner is None
            else " ".join(f"{name}={value}" for name, value in sorted(row.winner.config.items()))
        )
        rows.append([str(row.problem), config, _figure(row.winner), len(row.trials), len(row.excluded)])
    print_table(
        ["problem", "winner", "predicted" if result.mode == "predicted" else "measured", "trials", "excluded"], rows
    )
    for row in result.problems:
        if row.message:
            click.echo(f"{row.spec_key}: {row.message}")
    click.echo(
        f"{result.mode} for {result.target} in {result.elapsed_s:.1f} s; stored in {result.database} (session {result.session})"
    )
    for path in written:
        click.echo(f"seeds: {path}")
    if result.interrupted or result.timed_out:
        ended = "interrupted" if result.interrupted else "the time was up"
        click.echo(f"{ended}: what was finished is stored; --resume goes on", err=True)


def _figure(winner: Record | None) -> str:
    if winner is None:
        return "-"
    if winner.status == "predicted":
        time = f", predicted {winner.predicted_ms:.3g} ms" if winner.predicted_ms is not None else ""
        return f"predicted rank {winner.rank}, bound by {winner.bound_by}{time}"
    if winner.latency_ms is None:
        return winner.status
    return f"{winner.latency_ms:.4f} ms" + (" (low quality)" if winner.quality == "low" else "")
