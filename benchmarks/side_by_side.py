"""What the scripts that time tables of problems share: cells that are missing, a budget of seconds, kernels compiled beforehand.

Not run by itself: `hopper_forward.py`, `hopper_backward.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from flashgen.bench.environment import Environment
from flashgen.errors import FlashgenError
from flashgen.peers import BenchOp, Peer
from flashgen.peers.compare import Comparison, compare
from flashgen.peers.inputs import Inputs
from flashgen.peers.output import append_csv, check_csv, read_csv
from flashgen.problem import Problem

_KEY = ("dtype", "batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "head_dim", "head_dim_v", "causal")


def measured(rows: Sequence[dict[str, str]], op: BenchOp) -> set[tuple[str, ...]]:
    """The cells of which a CSV holds a timed baseline."""
    return {
        _key(row) for row in rows if row["contestant"].startswith("flashgen") and row["median_ms"] and row["op"] == op
    }


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in _KEY)


def key_of(problem: Problem) -> tuple[str, ...]:
    """A cell as the CSV spells it."""
    return _key({name: getattr(problem, name) for name in Problem.__slots__})


def missing(cells: Sequence[Problem], op: BenchOp, path: Path | None) -> list[Problem]:
    """The cells that a CSV does not hold yet; all where there is none.

    Raises:
        InvalidProblemError: rows cannot be appended to that file.
    """
    if path is None:
        return list(cells)
    check_csv(path)
    done = measured(read_csv(path), op)
    return [problem for problem in cells if key_of(problem) not in done]


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
    return f"{one.problem}: {mine} [{base.status}]; time / {base.name}: {', '.join(others) or 'no peer'}"


def run(
    todo: Sequence[Problem],
    op: BenchOp,
    contestants: Sequence[Peer],
    *,
    path: Path | None,
    budget_s: float,
    rounds: int,
    cuda_graph: bool = False,
) -> int:
    """Time cells until the budget is spent: 0 done, 1 something is wrong or cells are left, 130 Ctrl-C."""
    start = time.monotonic()
    need_gpu()
    environment = Environment.read("cuda")
    wrong, longest = 0, 0.0
    for number, problem in enumerate(todo, start=1):
        began = time.monotonic()
        # A cell that cannot be finished is not begun: half a cell costs as much and says less.
        if began - start + longest > budget_s:
            click.echo(f"{len(todo) - number + 1} cells left: the budget of {budget_s:g} s is spent", err=True)
            return 1
        one = compare(problem, op, contestants, rounds=rounds, cuda_graph=cuda_graph)
        if path is not None and one.baseline.samples:
            append_csv(path, one, environment)
        longest = max(longest, time.monotonic() - began)
        wrong += one.baseline.status != "ok"
        click.echo(f"[{number}/{len(todo)}, {time.monotonic() - start:.0f} s] {line(one)}")
        for entry in one.contestants:
            if entry.status in ("failed", "wrong") or (number == 1 and entry.status == "absent"):
                click.echo(f"  {entry.name}: {entry.status}: {entry.message}")
        if one.interrupted:
            return 130
    return 1 if wrong else 0


def need_gpu() -> None:
    """Raise what the command line shows where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("no GPU here: --dry-run lists the cells.")


def show(todo: Sequence[Problem], as_json: bool) -> None:
    """List cells."""
    if as_json:
        click.echo(json.dumps([{"problem": str(p), "gflop": p.flops / 1e9} for p in todo], indent=2))
        return
    for problem in todo:
        click.echo(f"{problem}: {problem.flops / 1e12:.3f} TFLOP")
    click.echo(f"{len(todo)} cells")


# -- kernels compiled beforehand --


def shards(todo: Sequence[Problem]) -> list[list[Problem]]:
    """Cells by what is compiled: one shard a spec and group, so that no two processes compile the same kernel."""
    found: dict[tuple[str, int], list[Problem]] = {}
    for problem in todo:
        found.setdefault((problem.spec.key, problem.num_heads_q // problem.num_heads_kv), []).append(problem)
    return list(found.values())


def prepare(todo: Sequence[Problem], op: BenchOp, contestants: Sequence[Peer]) -> None:
    """Call every contestant once on every cell: what is compiled stays in the caches on disk."""
    import torch

    for problem in todo:
        copy_of = Inputs(problem, op, cache=0, memory=0)
        for peer in contestants:
            if peer.available(problem.device) or peer.supports(problem, op):
                continue
            start, said = time.monotonic(), "ready"
            try:
                peer.prepare(problem, op, copy_of.of(peer.layout)[:1])[0]()
                torch.cuda.synchronize()
            except Exception as error:  # the timed run says it again, and keeps it
                said = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            click.echo(f"{problem}: {peer.name} {said} after {time.monotonic() - start:.1f} s")
        del copy_of
        torch.cuda.empty_cache()


def prepare_apart(count: int) -> int:
    """Run this command once per shard, side by side, as `--prepare NUMBER`; 0 where each process ended well."""
    words = [sys.executable, *sys.argv]
    processes = [subprocess.Popen([*words, "--prepare", str(number)]) for number in range(count)]
    return max((process.wait() != 0 for process in processes), default=0)


def exit_code(main: Callable[..., Any]) -> int:
    """Run a click command and say what went wrong as the command line of flashgen does."""
    try:
        return int(main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FlashgenError as error:
        click.echo(f"Error: {error}", err=True)
        return 2 if isinstance(error, ValueError) else 1
