"""`flashgen bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from flashgen import plot
from flashgen.bench.environment import Environment
from flashgen.cli.output import json_option, print_json, print_table
from flashgen.cli.problems import OPTION_NAMES, problems_of, shape_options
from flashgen.errors import InvalidProblemError
from flashgen.peers import NAMES, OPS, BenchOp, Flashgen, Peer, choose, figure, masks
from flashgen.peers.compare import Comparison, Contestant, compare
from flashgen.peers.output import absent, append_csv, check_csv, document
from flashgen.problem import Problem
from flashgen.settings import BACKENDS


@click.command()
@shape_options
@click.option("--op", type=click.Choice([*OPS, "both"]), default="attention_fwd", show_default=True)
@click.option(
    "--peers", "peer_names", metavar="NAME,...", default="all", show_default=True, help=f"Of {', '.join(NAMES)}."
)
@click.option(
    "--backends", metavar="NAME,...", default="auto", show_default=True, help="Of flashgen; the first is the baseline."
)
@click.option("--mask", type=click.Choice(masks.NAMES), help="A mask_mod by name, beside the options above.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Samples of each contestant.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs and of the order.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="The GPU where there is one, if not given.")
@click.option("--cuda-graph", is_flag=True, help="Time replays of captured calls: host time vanishes. GPU only.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append the results; the file only grows.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the results (.png, .svg or .pdf).",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the whole run, seconds: what is measured then is kept.",
)
@json_option
def bench(op: str, as_json: bool, **values: Any) -> int:
    """Time flashgen beside every installed peer on the same work.

    Each contestant is checked against fp64 first; then all take turns, call by call, in an order shuffled every round, on
    inputs that rotate past the cache. Ratios are formed round by round; a twin of flashgen shows the noise.
    """
    given = {name: values.pop(name) for name in OPTION_NAMES if name != "op"}
    problems = problems_of({**given, "op": "attention_fwd"})
    mask = values.pop("mask")
    if mask is not None:
        problems = [masks.masked(problem, mask) for problem in problems]
    contestants = [*_own(values["backends"]), *choose(_words("--peers", values["peer_names"]))]
    device = _device(values["device"], values["cuda_graph"])
    if values["csv_path"] is not None:
        check_csv(values["csv_path"])
    if values["plot_path"] is not None:
        plot.check(values["plot_path"])
    run = _Run(device, contestants, values, quiet=as_json)
    for problem, one_op in _work(problems, op, device):
        run.one(problem, one_op)
    if values["plot_path"] is not None and run.comparisons:
        figure.draw(run.comparisons, run.environment, values["plot_path"])
    if as_json:
        print_json(document(run.comparisons, run.environment, not_run=run.not_run, interrupted=run.interrupted))
    else:
        _print(run)
    if run.interrupted:
        return 130
    return (
        1
        if any(entry.name.startswith("flashgen") and entry.status in ("wrong", "failed") for entry in run.entries)
        else 0
    )


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InvalidProblemError(f"{option} is empty: name at least one, separated by commas.")
    return words


def _own(text: str) -> list[Peer]:
    names = _words("--backends", text)
    for name in names:
        if name not in BACKENDS:
            raise InvalidProblemError(f"backend {name!r} is not known: allowed are {', '.join(BACKENDS)}.")
    return [Flashgen(name) for name in dict.fromkeys(names)]


def _device(asked: str | None, cuda_graph: bool) -> str:
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise InvalidProblemError("--device cuda: torch sees no GPU here. Leave it out, or see `flashgen doctor`.")
    device = asked or ("cuda" if there else "cpu")
    if cuda_graph and device == "cpu":
        raise InvalidProblemError("--cuda-graph needs a GPU: on a CPU there is nothing to capture. Leave it out.")
    return device


def _work(problems: list[Problem], op: str, device: str) -> Iterator[tuple[Problem, BenchOp]]:
    from dataclasses import replace

    for problem in problems:
        for one in OPS:
            if op in (one, "both"):
                yield replace(problem, device=device), one


class _Run:
    """The problems one after another: whatever ends the run, what was measured stays."""

    def __init__(self, device: str, contestants: list[Peer], values: dict[str, Any], *, quiet: bool) -> None:
        self._contestants, self._values = contestants, values
        self.environment = Environment.read(device)
        self.comparisons: list[Comparison] = []
        self.not_run: list[str] = []
        self.interrupted = False
        self._say: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))
        limit = values["timeout_s"]
        self._end = None if limit is None else time.monotonic() + limit

    @property
    def entries(self) -> list[Contestant]:
        """Every contestant of every problem."""
        return [entry for one in self.comparisons for entry in one.contestants]

    def _expired(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def one(self, problem: Problem, op: BenchOp) -> None:
        """Measure one problem and write it down at once."""
        if self.interrupted or self._expired():
            self.not_run.append(f"{op} of {problem}")
            return
        self._say(f"{op} of {problem}")
        names = ("rounds", "seed", "cuda_graph")
        options = {name: self._values[name] for name in names}
        try:
            found = compare(problem, op, self._contestants, expired=self._expired, say=self._say, **options)
        except KeyboardInterrupt:
            self.interrupted = True
            self.not_run.append(f"{op} of {problem}")
            return
        self.interrupted = found.interrupted
        self.comparisons.append(found)
        if self._values["csv_path"] is not None:
            append_csv(self._values["csv_path"], found, self.environment)


# -- output --


def _print(run: _Run) -> None:
    environment = run.environment
    where = f"{environment.gpu} (driver {environment.driver or 'unknown'})" if environment.gpu else "CPU"
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    click.echo(f"{where}; host {environment.cpu}, {environment.threads} threads; {versions}; {environment.date}")
    for one in run.comparisons:
        _print_one(one)
    for name, reason in absent(run.comparisons).items():
        click.echo(f"not here: {name}: {reason}")
    for text in run.not_run:
        click.echo(f"not run: {text}", err=True)
    if run.interrupted:
        click.echo(
            "interrupted: what was measured is shown above" + (" and in the CSV" if run._values["csv_path"] else ""),
            err=True,
        )


def _print_one(one: Comparison) -> None:
    clocks = " to ".join(str(state["sm_mhz"]) for state in (one.gpu_before, one.gpu_after) if "sm_mhz" in state)
    floor = "" if one.floor is None else f", noise floor {100 * one.floor:.1f} %"
    click.echo(
        f"\n{one.op} of {one.problem}: {one.flops / 1e9:.4g} GFLOP, {one.copies} copies of the inputs{floor}"
        + (f", SM clock {clocks} MHz" if clocks else "")
    )
    headers = [
        "contestant",
        "ms",
        "p10",
        "p90",
        "TFLOP/s",
        "GB/s",
        "time / flashgen",
        "p10",
        "p90",
        "verdict",
        "budget",
        "prepared in",
    ]
    print_table(headers, [_cells(entry) for entry in one.contestants if entry.status != "absent"])
    for entry in one.contestants:
        if entry.detail:
            click.echo(f"{entry.name}: {entry.detail}")
        if entry.message and entry.status != "absent":
            click.echo(f"{entry.name}: {entry.status}: {entry.message}", err=entry.status in ("wrong", "failed"))
    for note in one.notes:
        click.echo(f"note: {note}")


def _cells(entry: Contestant) -> list[str]:
    time_, ratio = entry.time, entry.ratio
    cells = [entry.name]
    cells += (
        ["-"] * 3
        if time_ is None
        else [f"{x:.4f}" for x in (time_.latency_ms, time_.latency_p10_ms, time_.latency_p90_ms)]
    )
    cells += ["-" if x is None else f"{x:.4g}" for x in (entry.tflops, entry.gbps)]
    cells += ["-"] * 3 if ratio is None else [f"{x:.3f}" for x in (ratio.median, ratio.p10, ratio.p90)]
    cells.append(
        ", ".join(filter(None, (entry.verdict, entry.status if entry.verdict is None or entry.status != "ok" else "")))
    )
    cells.append("-" if entry.budget_used is None else f"{entry.budget_used:.2f}")
    cells.append("-" if entry.prepare_s is None else f"{entry.prepare_s:.2f} s")
    return cells
