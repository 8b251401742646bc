"""Free-form attention beside FlexAttention on a Hopper GPU: bf16, 16k tokens, hidden size 2048, through the harness of `flashgen bench`.

    python benchmarks/hopper_freeform.py --dry-run
    python benchmarks/hopper_freeform.py --tune-flex benchmarks/results/h200_flex_tiles.json
    python benchmarks/hopper_freeform.py --flex-tiles benchmarks/results/h200_flex_tiles.json --compile --compile-csv compile.csv
    python benchmarks/hopper_freeform.py --flex-tiles benchmarks/results/h200_flex_tiles.json --csv benchmarks/results/h200_freeform.csv

Causal, a window of 1024, a prefix of 512, documents of mixed length, ALiBi, a softcap of 30 with causal, a tree of drafted tokens, and the 13 x 13
neighbourhoods of an image (`freeform.py`) x head dims 64, 128 x lengths 2k to 16k x forward and backward: 128 cells. Contestants: flashgen as a
call chooses, its portable kernel, FlexAttention, and flashgen's plain causal kernel, whose speed per visible pair is what a mask should not cost.
FlexAttention is autotuned (max-autotune-no-cudagraphs) on the causal kind once a head dim by `--tune-flex`, and gets the winners as
kernel_options for every kind; without `--flex-tiles` each cell is autotuned, which takes about a minute. Block masks are made outside of all times,
compiling is in none. Every result is judged against fp64 before and after. A second run with the same CSV goes on where the first one stopped.
Exit code 0 done, 1 something is wrong or cells are left, 130 Ctrl-C.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import freeform
import side_by_side

from flashgen.bench.environment import Environment
from flashgen.bench.rounds import pairwise_ratio
from flashgen.errors import FlashgenError
from flashgen.peers import BenchOp
from flashgen.peers.compare import Comparison, compare
from flashgen.peers.output import COLUMNS, append_rows, read_csv, row
from flashgen.problem import Problem

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (128, 64)
LENGTHS = (8192, 2048, 4096, 16384)
OPS: tuple[BenchOp, ...] = ("attention_fwd", "attention_bwd")
OWN_COLUMNS = (
    "kind",
    "visible_pairs",
    "touched_pairs",
    "speed_of_plain_causal",
    "tile_speed_of_plain_causal",
    *COLUMNS,
)
NAMES = ("flashgen", "flashgen-triton", "flex", "plain-causal")
PLAIN = "flashgen plain causal"
_TUNABLES = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages", "USE_TMA")
Cell = tuple[str, BenchOp, Problem]


def cells(device: str) -> Iterator[Cell]:
    """All of them, the most telling length first, and of a length every kind before the next head dim."""
    for length in LENGTHS:
        for head_dim in HEAD_DIMS:
            for op in OPS:
                for kind in freeform.KINDS:
                    yield kind, op, problem(length, head_dim, device)


def problem(length: int, head_dim: int, device: str) -> Problem:
    """The sizes of a cell; its mask is not the problem's."""
    heads = HIDDEN // head_dim
    return Problem(
        dtype="bf16", batch=TOKENS // length, seqlen_q=length, seqlen_k=length, num_heads_q=heads, num_heads_kv=heads,
        head_dim=head_dim, head_dim_v=head_dim, device=device,
    )  # fmt: skip


def key_of(cell: Cell) -> tuple[str, ...]:
    """A cell as the CSV spells it."""
    kind, op, p = cell
    return kind, op, str(p.seqlen_q), str(p.head_dim)


def missing(todo: list[Cell], path: Path | None) -> list[Cell]:
    """The cells that a CSV does not hold yet: those without a timed flashgen, or said not to be taken by any kernel."""
    rows = read_csv(path, OWN_COLUMNS) if path is not None else []
    done = {
        (row["kind"], row["op"], row["seqlen_q"], row["head_dim"])
        for row in rows
        if row["contestant"] == "flashgen" and (row["median_ms"] or row["status"] == "unsupported")
    }
    return [cell for cell in todo if key_of(cell) not in done]


def rows_of(kind: str, one: Comparison, environment: Environment) -> list[dict[str, Any]]:
    """One cell's rows: those of the harness, and what is said of masks."""
    mine, causal = (freeform.counted(name, one.problem.seqlen_q) for name in (kind, "causal"))
    plain = next((entry for entry in one.contestants if entry.name == PLAIN), None)
    found = []
    for entry in one.contestants:
        pairs, touched = causal if entry is plain else mine
        own: dict[str, Any] = {"kind": kind, "visible_pairs": pairs, "touched_pairs": touched}
        if plain is not None and plain.samples and entry.samples and entry is not plain:
            times = pairwise_ratio(plain.samples, entry.samples).median
            own["speed_of_plain_causal"] = f"{times * pairs / causal[0]:.6g}"
            own["tile_speed_of_plain_causal"] = f"{times * touched / causal[1]:.6g}"
        found.append(own | row(one, entry, environment))
    return found


def unsupported(cell: Cell, reason: str, environment: Environment) -> dict[str, Any]:
    """The row of a cell that no generated kernel takes: kept, so that a table cannot leave it out."""
    from flashgen.peers.compare import Contestant

    one = Comparison(problem=cell[2], op=cell[1])
    entry = Contestant(name="flashgen", status="unsupported", message=reason)
    one.contestants.append(entry)
    return rows_of(cell[0], one, environment)[0]


def run(
    todo: list[Cell],
    names: tuple[str, ...],
    tiles: dict[int, dict[str, Any]],
    *,
    path: Path | None,
    budget_s: float,
    rounds: int,
    timer: Callable[..., Comparison] = compare,
    environment: Environment | None = None,
) -> int:
    """Time cells until the budget is spent: 0 done, 1 something is wrong or cells are left, 130 Ctrl-C."""
    start = time.monotonic()
    environment = environment or Environment.read("cuda")
    wrong, longest = 0, 0.0
    for number, cell in enumerate(todo, start=1):
        began = time.monotonic()
        if began - start + longest > budget_s:
            click.echo(f"{len(todo) - number + 1} cells left: the budget of {budget_s:g} s is spent", err=True)
            return 1
        kind, op, p = cell
        head = f"[{number}/{len(todo)}, {began - start:.0f} s] {kind} {op[-3:]} d{p.head_dim} s{p.seqlen_q}"
        peers = freeform.contestants(freeform.KINDS[kind], tiles, names)
        try:
            one = timer(p, op, peers, rounds=rounds, warm_up_ms=(50.0, 500.0))
        except FlashgenError as error:
            click.echo(f"{head}: {str(error).splitlines()[0]}")
            if path is not None:
                append_rows(path, [unsupported(cell, str(error), environment)], OWN_COLUMNS)
            continue
        rows = rows_of(kind, one, environment)
        if path is not None and one.baseline.samples:
            append_rows(path, rows, OWN_COLUMNS)
        longest = max(longest, min(time.monotonic() - began, 20.0))  # one slow compiler does not end the table
        wrong += one.baseline.status != "ok"
        click.echo(f"{head}: {said(one, rows)}")
        for entry in one.contestants:
            if entry.status not in ("ok", "absent"):
                click.echo(f"  {entry.name}: {entry.status}: {entry.message[:300]}")
        if one.interrupted:
            return 130
    return 1 if wrong else 0


def said(one: Comparison, rows: list[dict[str, Any]]) -> str:
    """One cell in one line."""
    base = one.baseline
    mine = (
        "-" if base.tflops is None or base.time is None else f"{base.time.latency_ms:.4f} ms {base.tflops:.0f} TFLOP/s"
    )
    others = [f"{e.name} {e.ratio.median:.3f}" for e in one.contestants[1:] if e.ratio is not None]
    speed = rows[0].get("speed_of_plain_causal")
    return f"{mine} [{base.status}]; time / flashgen: {', '.join(others)}; of plain causal {speed or '-'}"


# -- FlexAttention's tiles --


def tune_flex(path: Path, budget_s: float) -> int:
    """max-autotune the causal kind once a head dim, in processes side by side, and write the winners as kernel_options.

    What is not tuned when the budget is spent (the backward comes last) has no options: inductor then takes its default tile.
    """
    side_by_side.need_gpu()
    import torch

    end = time.monotonic() + budget_s
    where = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    found: dict[str, Any] = {**where, "seconds": {}, "kernel_options": {}}
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for head_dim in HEAD_DIMS:
            # Read by inductor: every autotuned FlexAttention kernel's choices, best first.
            env = {**os.environ, "TORCHINDUCTOR_FLEX_ATTENTION_LOGGING_FILE": f"{folder}/{head_dim}"}
            words = [sys.executable, sys.argv[0], "--tune-flex-one", str(head_dim)]
            processes[head_dim] = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
        for head_dim, process in processes.items():
            try:
                out, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                out, _ = process.communicate()
            lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            log = Path(folder) / f"{head_dim}.json"
            choices = [one for one in lines if "choices" in one] or (
                json.loads(log.read_text()) if log.exists() else []
            )
            found["kernel_options"][str(head_dim)] = options_of(choices)
            found["seconds"][str(head_dim)] = next(
                (one["seconds"] for one in lines if "seconds" in one), "not finished"
            )
    path.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(path.read_text())
    return 0 if all(seconds != "not finished" for seconds in found["seconds"].values()) else 1


def options_of(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The first choice of the last forward and of the last backward in inductor's log, as kernel_options.

    An entry is {"kernel_type": ..., "choices": [...]}; in PyTorch 2.11 {shapes: [...]}, with the type in each choice.
    """
    options: dict[str, Any] = {}
    for entry in log:
        choices = entry["choices"] if "choices" in entry else next(iter(entry.values()))
        best = choices[0]
        prefix = {"forward": "fwd_", "backward": "bwd_"}.get(entry.get("kernel_type") or best.get("kernel_type"))
        if prefix is not None:
            options |= {f"{prefix}{name}": best[name] for name in _TUNABLES if best.get(name) is not None}
    return options


def tune_flex_one(head_dim: int) -> None:
    """In a process of its own: compile and run forward and backward once."""
    import torch
    from torch._inductor.select_algorithm import add_feedback_saver

    # For releases that keep no log of FlexAttention's choices.
    add_feedback_saver(lambda timings, name, *rest, **more: print(json.dumps(choice_of(timings, name)), flush=True))
    start = time.monotonic()
    p = problem(LENGTHS[0], head_dim, "cuda")
    inputs = side_by_side.Inputs(p, "attention_bwd", cache=0, memory=0)
    peer = freeform.FlexKind(freeform.KINDS["causal"], {})
    peer.prepare(p, "attention_fwd", inputs.of("bhsd")[:1])[0]()
    forward = time.monotonic() - start
    peer.prepare(p, "attention_bwd", inputs.of("bhsd")[:1])[0]()
    torch.cuda.synchronize()
    seconds = {"forward": round(forward, 1), "forward and backward": round(time.monotonic() - start - forward, 1)}
    click.echo(json.dumps({"seconds": seconds}))


def choice_of(timings: dict[Any, float], name: str) -> dict[str, Any]:
    """The fastest of inductor's choices in the form of its log, read from its description: `..., BLOCK_M=128, ..., num_warps=8`."""
    best = min(timings, key=timings.__getitem__)
    found = dict(re.findall(r"(\w+)=([\w.]+)", str(getattr(best, "description", ""))))
    words = {"True": True, "False": False}
    values = {key: words.get(text, text) for key, text in found.items() if key in _TUNABLES}
    values = {key: int(value) if isinstance(value, str) else value for key, value in values.items()}
    return {"kernel_type": "backward" if "backward" in name else "forward", "choices": [values]}


def read_tiles(path: Path | None) -> dict[int, dict[str, Any]]:
    """What `--tune-flex` wrote; nothing without a file."""
    if path is None:
        return {}
    return {int(head_dim): options for head_dim, options in json.loads(path.read_text())["kernel_options"].items()}


# -- kernels compiled beforehand --


def shards(todo: list[Cell]) -> list[list[Cell]]:
    """One a kind and head dim: what one process compiles, no other compiles too."""
    found: dict[tuple[str, int], list[Cell]] = {}
    for cell in todo:
        found.setdefault((cell[0], cell[2].head_dim), []).append(cell)
    return list(found.values())


def prepare(todo: list[Cell], names: tuple[str, ...], tiles: dict[int, dict[str, Any]], path: Path | None) -> None:
    """Call every contestant once; how long each took goes to a CSV."""
    import torch

    for kind, op, p in todo:
        inputs = side_by_side.Inputs(p, op, cache=0, memory=0)
        for peer in freeform.contestants(freeform.KINDS[kind], tiles, names):
            reason = peer.available(p.device) or peer.supports(p, op)
            start, words = time.monotonic(), reason or "ok"
            if reason is None:
                try:
                    peer.prepare(p, op, inputs.of(peer.layout)[:1])[0]()
                    torch.cuda.synchronize()
                except Exception as error:  # the timed run says it again, and keeps it
                    words = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            line = [kind, op, p.head_dim, p.seqlen_q, peer.name, f"{time.monotonic() - start:.2f}", words[:200]]
            click.echo(" ".join(map(str, line)))
            if path is not None:
                with path.open("a", newline="") as file:  # a line is one write: processes do not mix theirs
                    csv.writer(file).writerow(line)
        del inputs
        torch.cuda.empty_cache()


@click.command()
@click.option(
    "--csv", "path", type=click.Path(path_type=Path), help="Append to this file; its cells are not run again."
)
@click.option("--budget-s", type=click.FloatRange(min=1), default=540.0, show_default=True, help="Wall-clock seconds.")
@click.option("--contestants", default=",".join(NAMES), show_default=True, help="flashgen is always one.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--kinds", default=",".join(freeform.KINDS), show_default=True, help="Cells of these alone.")
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), help="Cells of this one alone.")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, help="Cells of these alone.")
@click.option("--op", type=click.Choice(OPS), help="Cells of this one alone.")
@click.option("--flex-tiles", type=click.Path(path_type=Path, exists=True), help="What --tune-flex wrote.")
@click.option(
    "--tune-flex",
    type=click.Path(path_type=Path),
    help="Autotune FlexAttention's causal kernels into this file, and stop.",
)
@click.option("--tune-flex-one", type=int, hidden=True)
@click.option("--dry-run", is_flag=True, help="List the cells that would run, and run none.")
@click.option("--compile", "ahead", is_flag=True, help="Compile alone, a process a kind and head dim.")
@click.option(
    "--compile-csv", type=click.Path(path_type=Path), help="With --compile: seconds to each first result, appended."
)
@click.option("--only-peers", is_flag=True, help="With --compile: flashgen's kernels are there already.")
@click.option("--prepare", "shard", type=int, hidden=True, help="One shard's cells, called once.")
def main(
    path: Path | None,
    budget_s: float,
    contestants: str,
    rounds: int,
    kinds: str,
    head_dim: str | None,
    lengths: str,
    op: str | None,
    flex_tiles: Path | None,
    tune_flex: Path | None,
    tune_flex_one: int | None,
    dry_run: bool,
    ahead: bool,
    compile_csv: Path | None,
    only_peers: bool,
    shard: int | None,
) -> int:
    """Time 128 cells of free-form attention beside FlexAttention."""
    if tune_flex_one is not None:
        _tune_flex_one(tune_flex_one)
        return 0
    if tune_flex is not None:
        return _tune_flex(tune_flex, budget_s)
    chosen = _words("--kinds", kinds, tuple(freeform.KINDS))
    names = ("flashgen", *_words("--contestants", contestants, NAMES))
    wanted = {int(word) for word in _words("--lengths", lengths, tuple(map(str, LENGTHS)))}
    todo = [
        cell
        for cell in missing(list(cells("cuda")), path)
        if cell[0] in chosen and op in (None, cell[1]) and cell[2].seqlen_q in wanted
        if head_dim in (None, str(cell[2].head_dim))
    ]
    if dry_run:
        for kind, which, p in todo:
            pairs, touched = freeform.counted(kind, p.seqlen_q)
            share = pairs / p.seqlen_q**2
            click.echo(
                f"{kind} {which} d{p.head_dim} s{p.seqlen_q}: visible {share:.4f}, in touched tiles {touched / p.seqlen_q**2:.4f}"
            )
        click.echo(f"{len(todo)} cells")
        return 0
    side_by_side.need_gpu()
    tiles = read_tiles(flex_tiles)
    if shard is not None:
        prepare(shards(todo)[shard], names[1:] if only_peers else names, tiles, compile_csv)
        return 0
    if ahead:
        return side_by_side.prepare_apart(len(shards(todo)))
    return run(todo, names, tiles, path=path, budget_s=budget_s, rounds=rounds)


_tune_flex, _tune_flex_one = tune_flex, tune_flex_one  # the options of `main` hide them


def _words(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(filter(None, text.split(",")))
    if odd := [word for word in found if word not in allowed]:
        raise click.BadParameter(f"{option}: {odd[0]!r} is not known: allowed are {', '.join(allowed)}.")
    return found


if __name__ == "__main__":
    os.environ.setdefault(
        "FLASHGEN_STAND_INS", "0"
    )  # each call's own kernel is timed, here and in the processes that compile
    raise SystemExit(side_by_side.exit_code(main))
