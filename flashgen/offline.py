"""The public functions that are no calls: tune, export, compile. Each loads its room when it is called, so that a call never does."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flashgen.config import KernelConfig
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.target import Target

if TYPE_CHECKING:
    from flashgen.facts import CompiledFacts
    from flashgen.tuner import TuneResult


def tune(
    problems: Problem | Sequence[Problem],
    *,
    target: Target | str | None = None,
    mode: Literal["auto", "measured", "predicted"] = "auto",
    max_trials: int | None = None,
    timeout_s: float | None = None,
    database: str | PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> TuneResult:
    """Search the best configuration of each problem and store every trial.

    Args:
        problems: one or several.
        target: a Target, its name, or None for the installed GPU.
        mode: "measured" times candidates on the installed GPU; "predicted" compiles and ranks them without one;
            "auto" measures where the target is installed.
        max_trials: how many candidates of a problem at most; None for all legal ones.
        timeout_s: of the whole run, seconds.
        database: a path or an SQLAlchemy URL; None for the user's own.
        workers: compiling processes, None for one per core; where more GPUs of that kind are installed, up to so many of them
            measure side by side, a problem each.
        progress: show a progress bar (plain lines where stderr is no terminal).

    Returns:
        Per problem: all trials, what was excluded and why, and the winner.

    Raises:
        InvalidProblemError: a value is out of range, or no target can be found.
        TuningError: no candidate survived; carries each cause.
        DatabaseError: the database cannot be written.
    """
    from flashgen import tuner  # the tuner is imported by nobody but this function and the command line
    from flashgen.tuner.ahead import ahead

    where = Target.named(target) if isinstance(target, str) else target
    with ahead(mode, None) as worker:  # it comes up while the search is imported
        return tuner.tune(
            problems,
            target=where,
            mode=mode,
            max_trials=max_trials,
            timeout_s=timeout_s,
            database=None if database is None else str(database),
            workers=workers,
            progress=progress,
            worker=worker,
        )


def export(
    spec_or_problem: AttentionSpec | Problem,
    path: str | PathLike[str],
    *,
    format: Literal["py", "aot", "hf-kernels"] = "py",
    target: Target | str | None = None,
) -> Path:
    """Write a kernel that works without flashgen.

    Args:
        spec_or_problem: what to export.
        path: the file to write, or a folder.
        format: "py": one readable file that imports only torch and triton and tests itself under `python file.py`;
            "aot" and "hf-kernels" are not built yet.
        target: whose configurations to carry; None for the installed GPU.

    Returns:
        The path of what was written.

    Raises:
        InvalidProblemError: unknown format, or a path that cannot be written.
        UnsupportedProblemError: nothing covers it, or the format is not built yet.
    """
    from flashgen import exporter

    where = Target.named(target) if isinstance(target, str) else target
    return exporter.export(spec_or_problem, Path(path), format=format, target=where)


def compile_facts(spec: AttentionSpec, config: KernelConfig, target: Target) -> CompiledFacts:
    """Compile a configuration without a GPU and read the compiler's facts (cached on disk).

    Args:
        spec: what to compile.
        config: the knobs, of the variant that compiles it.
        target: for which architecture.

    Returns:
        Registers, spills, shared memory and the main loop's instruction counts.

    Raises:
        InvalidProblemError: the config is not legal, or the target is no GPU.
        UnsupportedProblemError: the variant does not cover the spec.
        BuildError: the compiler refused.
    """
    from flashgen import facts  # light, but of no use to a call

    return facts.compile_facts(spec, config, target)
