"""The forward beside its peers on a Hopper GPU: bf16, 16k tokens, hidden size 2048, through the harness of `flashgen bench`.

    python benchmarks/hopper_forward.py --dry-run
    python benchmarks/hopper_forward.py --csv benchmarks/results/h200_forward.csv --budget-s 540

Head dims 64, 128, 256 x lengths 1k to 16k x full and causal, and head dim 128 again with 4 query heads per key/value head: 40 cells.
Cells run from the one that says most to the one that says least, each as a whole, until the budget is spent; a second run with the
same CSV goes on with the cells that are missing. Exit code 0 done, 1 something is wrong or cells are left, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from flashgen.bench.environment import Environment
from flashgen.errors import FlashgenError
from flashgen.peers import NAMES, Flashgen, choose
from flashgen.peers.compare import Comparison, compare
from flashgen.peers.output import append_csv, check_csv, read_csv
from flashgen.problem import Problem

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (128, 64, 256)
LENGTHS = (4096, 8192, 2048, 16384, 1024)
GROUP = 4


def cells(device: str) -> Iterator[Problem]:
    """All problems, the most telling first: middle lengths and head dim 128 before extremes."""
    for length in LENGTHS:
        for head_dim, group in ((HEAD_DIMS[0], 1), (HEAD_DIMS[0], GROUP), *((dim, 1) for dim in HEAD_DIMS[1:])):
            for causal in (True, False):
                heads = HIDDEN // head_dim
                yield Problem(
                    dtype="bf16",
                    batch=TOKENS // length,
                    seqlen_q=length,
                    seqlen_k=length,
                    num_heads_q=heads,
                    num_heads_kv=heads // group,
                    head_dim=head_dim,
                    head_dim_v=head_dim,
                    causal=causal,
                    device=device,
                )


def measured(rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
    """The cells of which a CSV holds a timed baseline."""
    return {
        _key(row)
        for row in rows
        if row["contestant"].startswith("flashgen") and row["median_ms"] and row["op"] == "attention_fwd"
    }


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    names = (
        "dtype",
        "batch",
        "seqlen_q",
        "seqlen_k",
        "num_heads_q",
        "num_heads_kv",
        "head_dim",
        "head_dim_v",
        "causal",
    )
    return tuple(str(row[name]) for name in names)


def key_of(problem: Problem) -> tuple[str, ...]:
    """A cell as the CSV spells it."""
    return _key({name: getattr(problem, name) for name in Problem.__slots__})


def line(one: Comparison) -> str:
    """One cell in one line: flashgen, and every peer's time over it."""
    base = one.baseline
    mine = (
        "-" if base.tflops is None or base.time is None else f"{base.time.latency_ms:.4f} ms {base.tflops:.0f} TFLOP/s"
    )
    others = [
        f"{entry.name} {entry.ratio.median:.3f}" if entry.ratio is not None else f"{entry.name} {entry.status}"
        for entry in one.contestants[1:]
        if entry.status not in ("absent", "unsupported")
    ]
    return f"{one.problem}: {mine} [{base.status}]; time / flashgen: {', '.join(others) or 'no peer'}"


@click.command()
@click.option(
    "--csv", "path", type=click.Path(path_type=Path), help="Append to this file; its cells are not run again."
)
@click.option("--budget-s", type=click.FloatRange(min=1), default=540.0, show_default=True, help="Wall-clock seconds.")
@click.option(
    "--peers",
    default="sdpa-flash,sdpa-cudnn,flex,fa2,fa3,fa4",
    show_default=True,
    help=f"Of {', '.join(NAMES)}, or all.",
)
@click.option("--backend", default="auto", show_default=True, help="Of flashgen.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--cuda-graph", is_flag=True, help="Time replays: host time vanishes.")
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), help="Cells of this one alone.")
@click.option("--dry-run", is_flag=True, help="List the cells that would run, and run none.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the list as JSON.")
def main(
    path: Path | None,
    budget_s: float,
    peers: str,
    backend: str,
    rounds: int,
    cuda_graph: bool,
    head_dim: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Time the forward of 40 cells beside every installed peer."""
    start = time.monotonic()
    if path is not None:
        check_csv(path)
    done = measured(read_csv(path)) if path is not None else set()
    todo = [problem for problem in cells("cuda") if key_of(problem) not in done]
    todo = [problem for problem in todo if head_dim in (None, str(problem.head_dim))]
    if dry_run:
        _list(todo, as_json)
        return 0
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("no GPU here: --dry-run lists the cells.")
    environment = Environment.read("cuda")
    contestants = [Flashgen(backend), *choose(peers.split(","))]
    wrong, longest = 0, 0.0
    for number, problem in enumerate(todo, start=1):
        began = time.monotonic()
        # A cell that cannot be finished is not begun: half a cell costs as much and says less.
        if began - start + longest > budget_s:
            click.echo(f"{len(todo) - number + 1} cells left: the budget of {budget_s:g} s is spent", err=True)
            return 1
        one = compare(problem, "attention_fwd", contestants, rounds=rounds, cuda_graph=cuda_graph)
        if path is not None and one.baseline.samples:
            append_csv(path, one, environment)
        longest = max(longest, time.monotonic() - began)
        wrong += one.baseline.status != "ok"
        click.echo(f"[{number}/{len(todo)}, {time.monotonic() - start:.0f} s] {line(one)}")
        if number == 1:
            for entry in one.contestants:
                if entry.status in ("absent", "failed"):
                    click.echo(f"  {entry.name}: {entry.status}: {entry.message}")
        if one.interrupted:
            return 130
    return 1 if wrong else 0


def _list(todo: list[Problem], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([{"problem": str(p), "gflop": p.flops / 1e9} for p in todo], indent=2))
        return
    for problem in todo:
        click.echo(f"{problem}: {problem.flops / 1e12:.3f} TFLOP")
    click.echo(f"{len(todo)} cells")


if __name__ == "__main__":
    try:
        raise SystemExit(main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except FlashgenError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
