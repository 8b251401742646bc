"""Write the predicted rows of `tuning_db/seeds`: every preset's layers that a kernel covers, for every target. No GPU needed.

    nice python scripts/predict_seeds.py [--folder tuning_db/seeds] [--workers N] [--target NAME ...]

Measured rows stay, and where one stands nothing is predicted. Old predicted rows go: run it again after a template changed. Only what the
policy chooses among is compiled (`flashgen.tuner.policy`), once for each architecture, and every winner's result is checked in the
interpreter. Nothing goes into your tuning database.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flashgen import Problem, Target
from flashgen.errors import TuningError, UnsupportedProblemError
from flashgen.presets import PRESETS
from flashgen.render import render
from flashgen.store import Record, seeds
from flashgen.target import TARGETS
from flashgen.tuner import tune
from flashgen.tuner.context import choose_variant


def problems() -> list[Problem]:
    """Every kind of layers of every preset, each once, and the gradients of each."""
    found = [Problem.preset(name, layer=layers.kind) for name, model in PRESETS.items() for layers in model.layers]
    # The softmax scale changes neither kernel nor tile, so that one row serves.
    plain = dict.fromkeys(replace(problem, softmax_scale=None) for problem in found)
    return [*plain, *(problem.backward for problem in plain)]


def covered(target: Target) -> list[Problem]:
    """Those that a kernel computes on a target."""
    found = []
    for problem in problems():
        try:
            choose_variant(problem, target)
        except UnsupportedProblemError:
            continue
        found.append(problem)
    return found


def measured(problem: Problem, target: Target) -> bool:
    """Whether a measured row of today's kernel and this very shape is shipped."""
    digest = render(problem.spec, choose_variant(problem, target)).digest
    return any(
        (row.status, row.digest, row.shape) == ("ok", digest, problem.shape)
        for row in seeds.load(target.name, problem.spec.op)
    )


def predict(target: Target, workers: int | None, database: str) -> tuple[list[Record], list[str]]:
    """The predicted winners of one target, and what has none."""
    todo = [problem for problem in covered(target) if not measured(problem, target)]
    try:
        result = tune(
            todo, target=target, mode="predicted", max_trials=1, workers=workers, database=database, progress=False
        )
    except TuningError as error:
        return [], [f"{target.name}: {error}"]
    # The compiler's facts can be had again with `flashgen.compile_facts`; the files stay readable without them.
    rows = [replace(row.winner, facts=None) for row in result.problems if row.winner is not None]
    return rows, [f"{target.name}, {row.problem}: {row.message}" for row in result.problems if row.winner is None]


def write(folder: Path, rows: Sequence[Record]) -> None:
    """Put rows in place of the predicted ones; each file is replaced whole."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for gpu, op in sorted({(row.gpu, row.op) for row in rows}):
            path = folder / gpu / f"{op}.jsonl"
            old = [Record.from_json(line) for line in path.read_text().splitlines()] if path.exists() else []
            new = [row for row in rows if (row.gpu, row.op) == (gpu, op)]
            seeds.write(scratch, [*(row for row in old if row.status != "predicted"), *new])
            path.parent.mkdir(exist_ok=True)
            os.replace(Path(scratch) / gpu / f"{op}.jsonl", path)
    seeds.forget()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; 1 where a covered problem has no row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "tuning_db" / "seeds")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--target", action="append", choices=[name for name in TARGETS if name != "cpu"])
    options = parser.parse_args(arguments)
    failed: list[str] = []
    for name in options.target or [name for name in TARGETS if name != "cpu"]:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            rows, missing = predict(Target.named(name), options.workers, str(Path(scratch) / "seeds.sqlite3"))
        write(options.folder, rows)
        failed += missing
        print(f"{name}: {len(rows)} predicted rows in {time.monotonic() - start:.0f} s", flush=True)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
