"""`flashgen report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import flashgen
from flashgen import settings
from flashgen.cli.output import json_option, print_json
from flashgen.errors import FlashgenError, InvalidProblemError, UnsupportedProblemError
from flashgen.presets import PRESETS, find
from flashgen.problem import Problem
from flashgen.report import Document, MemoryRow, Subject, gather, memory_of, page
from flashgen.spec import OPS
from flashgen.store import Record, open_store, seeds, utc_now
from flashgen.target import TARGETS, Target

_MOST_MEMORIES = 3  # where no preset is named


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("flashgen-report.html"),
    show_default=True,
    metavar="FILE",
    help="The HTML file.",
)
@click.option("--preset", "presets", multiple=True, metavar="NAME[/KIND]", help="Only problems of this model; with its memory. May be repeated.")  # fmt: skip
@click.option("--target", "target_name", metavar="NAME", help="Only trials of this GPU.")
@click.option("--database", metavar="PATH_OR_URL", help="Instead of the user's own.")
@json_option
def report(output: Path, presets: tuple[str, ...], target_name: str | None, database: str | None, as_json: bool) -> int:
    """One HTML file without outside requests: what was tuned, how the search went, accuracy, memory.

    Predicted figures are called predicted. A database without trials: the rows shipped with flashgen.
    """
    for name in presets:
        find(name)
    target = None if target_name is None else Target.named(target_name)
    if not output.parent.is_dir():
        raise InvalidProblemError(f"-o {output}: the folder {output.parent} does not exist: make it, or name another.")
    rows, source, shipped = _rows(database)
    chosen = [row for row in rows if (target is None or row.gpu == target.name) and _is_of(row, presets)]
    if not chosen:
        what = " ".join([*(f"--preset {name}" for name in presets), *([f"--target {target.name}"] if target else [])])
        raise FlashgenError(
            f"nothing to report: none of the {len(rows)} trials in {source} is of {what}. Tune it: flashgen tune {what}"
        )
    subjects = gather(chosen)
    memory, left_out = _memory(presets, subjects, target)
    document = Document(
        source=source, shipped=shipped, subjects=subjects, version=flashgen.__version__, created=utc_now()
    )
    try:
        output.write_text(page(document, memory, left_out), encoding="utf-8")
    except OSError as error:
        raise InvalidProblemError(f"-o {output} cannot be written: {error.strerror}.") from error
    if as_json:
        print_json(_to_json(document, memory, left_out, output))
    else:
        measured = sum(one.measured for one in subjects)
        click.echo(
            f"{output}: {len(subjects)} problems ({measured} measured, {len(subjects) - measured} predicted), "
            f"{len(chosen)} trials of {source}"
        )
    return 0


def _rows(database: str | None) -> tuple[list[Record], str, bool]:
    """The trials, where they are from, and whether these are the shipped ones."""
    env = settings.read()
    url = database or env.database_url
    name = database or (str(env.database_path) if env.database_path is not None else url)
    rows: list[Record] = []
    if database is not None or env.db is not None or (env.database_path is not None and env.database_path.exists()):
        with open_store(url) as store:
            rows = store.trials()
    if rows:
        return rows, f"the database {name.rpartition('@')[2]}", False
    return [row for gpu in seeds.gpus() for op in OPS for row in seeds.load(gpu, op)], "the rows shipped with flashgen", True  # fmt: skip


def _is_of(row: Record, presets: tuple[str, ...]) -> bool:
    """Whether a row's kernel and heads are those of a preset's layers, at any length and batch."""
    return not presets or any(
        (row.spec_key, row.shape["num_heads_q"], row.shape["num_heads_kv"]) in _kernels(name) for name in presets
    )


def _kernels(preset: str) -> set[tuple[str, int, int]]:
    model, kinds = find(preset)
    found = set()
    for layers in kinds:
        for lse in (False, True):
            problem = Problem.preset(model.name, layer=layers.kind, return_lse=lse)
            found.add((problem.spec.key, problem.num_heads_q, problem.num_heads_kv))
    return found


def _memory(
    presets: tuple[str, ...], subjects: tuple[Subject, ...], target: Target | None
) -> tuple[list[tuple[MemoryRow, ...]], dict[str, str]]:
    """The memory of the named presets; where none is named, of the first few whose layers were measured."""
    kernels = {(one.spec_key, one.shape["num_heads_q"], one.shape["num_heads_kv"]) for one in subjects if one.measured}
    names = presets or [name for name in PRESETS if kernels & _kernels(name)][:_MOST_MEMORIES]
    where = target or next((TARGETS[one.gpu] for one in subjects if one.gpu in TARGETS), Target.named("h100"))
    rows, left_out = [], {}
    for name in names:
        try:
            rows.append(memory_of(name, where))
        except UnsupportedProblemError as error:
            left_out[name] = str(error)
    return rows, left_out


def _to_json(
    document: Document, memory: list[tuple[MemoryRow, ...]], left_out: dict[str, str], output: Path
) -> dict[str, Any]:
    return {
        "report": str(output),
        "source": document.source,
        "shipped": document.shipped,
        "created": document.created,
        "flashgen": document.version,
        "problems": [_subject(one) for one in document.subjects],
        "memory": [asdict(row) for rows in memory for row in rows],
        "memory_left_out": left_out,
    }


def _subject(one: Subject) -> dict[str, Any]:
    winner = one.winner
    return {
        "problem": one.title, "spec": one.spec_key, "variant": one.variant, "gpu": one.gpu, "shape": one.shape, "digest": one.digest,
        "kernel_text": one.text_age, "basis": "measured" if one.measured else "predicted",
        "winner": None if winner is None else {"config": winner.config, "status": winner.status, "latency_ms": winner.latency_ms, "tflops": one.tflops},
        "by_status": one.counts, "finals": [asdict(row) for row in one.finals], "importance": [asdict(row) for row in one.importance],
        "failures": [asdict(row) for row in one.failures], "accuracy": None if one.accuracy is None else asdict(one.accuracy),
        "versions": one.versions, "protocols": one.protocols, "sessions": one.sessions,
    }  # fmt: skip
