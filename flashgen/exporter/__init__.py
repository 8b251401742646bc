"""Kernels that work without flashgen. Built: one standalone `.py`; `aot` and `hf-kernels` are named, not built."""

from __future__ import annotations

from pathlib import Path

from flashgen.errors import InvalidProblemError
from flashgen.exporter.standalone import destination, write_standalone
from flashgen.problem import Problem, not_built
from flashgen.spec import AttentionSpec
from flashgen.target import Target

__all__ = ["FORMATS", "destination", "export"]

FORMATS = ("py", "aot", "hf-kernels")


def export(
    spec_or_problem: AttentionSpec | Problem,
    path: Path,
    *,
    format: str = "py",
    target: Target | None = None,
    force: bool = False,
) -> Path:
    """Write a kernel; see `flashgen.export`.

    Args:
        spec_or_problem: what; a problem puts its own shape first among the configurations.
        path: a file that ends in .py, or a folder, into which the spec's key is written as a module's name, e.g.
            `attention_fwd_bf16_d128_causal.py`. A file that flashgen wrote is replaced.
        format: one of `FORMATS`.
        target: whose configurations; None for the installed GPU.
        force: overwrite a file that flashgen did not write.

    Raises:
        InvalidProblemError: unknown format, or a path that cannot be written.
        UnsupportedProblemError: nothing covers it, or the format is not built yet.
    """
    if format not in FORMATS:
        raise InvalidProblemError(f"format={format!r} is not known: allowed are {', '.join(FORMATS)}.")
    if format != "py":
        raise not_built(f"export format {format!r}")
    problem = spec_or_problem if isinstance(spec_or_problem, Problem) else None
    spec = spec_or_problem.spec if isinstance(spec_or_problem, Problem) else spec_or_problem
    if spec.op != "attention_fwd":
        raise not_built(f"the export of {spec.op}")
    return write_standalone(spec, problem, Path(path), target or Target.detect(), force=force)
