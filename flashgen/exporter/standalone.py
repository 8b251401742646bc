"""One readable file: kernel, configurations, launcher, provenance, self-test; it imports only torch and triton."""

from __future__ import annotations

import ast
import json
import keyword
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import flashgen
from flashgen import dispatch, settings
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.exporter import options
from flashgen.problem import Problem
from flashgen.render import render, render_template
from flashgen.spec import AttentionSpec
from flashgen.store import open_store, seeds, select
from flashgen.store.records import Record
from flashgen.target import Target
from flashgen.variants import Variant, candidates

_TORCH_DTYPE = {"fp16": "torch.float16", "bf16": "torch.bfloat16", "fp32": "torch.float32"}
_MARK = "Written by flashgen "


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One entry of CONFIGS: its origin in a word, and where it comes from in full."""

    shape: tuple[int, int, int]
    config: dict[str, Any]
    origin: str
    provenance: str


def write_standalone(spec: AttentionSpec, problem: Problem | None, path: Path, target: Target, *, force: bool) -> Path:
    """Write the file; see `flashgen.exporter.export`."""
    path = destination(spec, path, force=force)
    options.refuse(spec, problem)
    variant = _variant(spec, target)
    source = render(spec, variant)
    rows = _rows(spec, problem, variant, source.digest, target)
    on_gpu = target.backend != "cpu"
    text = render_template(
        "export/standalone.py.jinja",
        spec=spec,
        variant=variant,
        meta={
            "file": path.name,
            "module": path.stem if _is_module(path.stem) else None,
            "flashgen": flashgen.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "versions": _versions(),
            "digest": source.digest,
            "gpu": f"{target.gpu} ({target.name}, {target.arch})" if on_gpu else "no GPU in particular: none was named",
            "arch": target.arch if on_gpu else None,
            "provenance": [
                line for row in rows for line in (f"{row.shape}: {_words(row.config)}", f"    {row.provenance}")
            ],
            "configs": [(row.shape, json.dumps(row.config), row.origin) for row in rows],
            "torch_dtype": _TORCH_DTYPE[spec.dtype],
            "kernel": _body(source.text),
            "options": options.of(spec, problem),
        },
    )
    _write(path, text)
    return path


def destination(spec: AttentionSpec, path: Path, *, force: bool = False) -> Path:
    """Where an export to `path` goes.

    Raises:
        InvalidProblemError: it cannot be written there, or a file of somebody else's stands there.
    """
    if path.is_dir():
        path = path / f"{spec.key.replace('-', '_')}.py"
    if not path.parent.is_dir():
        raise InvalidProblemError(
            f"{path} cannot be written: the folder {path.parent} does not exist. Create it first."
        )
    if path.suffix != ".py":
        raise InvalidProblemError(f"{path.name!r} is no name of a Python file: allowed are names that end in .py.")
    try:
        foreign = path.exists() and _MARK not in path.read_text(errors="replace")[:2000]
    except OSError as error:
        raise InvalidProblemError(f"{path} exists and cannot be read: {error}. Choose another name.") from error
    if foreign and not force:
        raise InvalidProblemError(
            f"{path} exists and was not written by flashgen: choose another name, or --force to overwrite it."
        )
    if not os.access(path.parent, os.W_OK):
        raise InvalidProblemError(
            f"{path} cannot be written: the folder {path.parent} is read-only. Choose another folder."
        )
    return path


def _is_module(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _versions() -> str:
    found = []
    for name in ("torch", "triton"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # rendering needs neither
            found.append(f"no {name}")
    return ", ".join(found)


def _variant(spec: AttentionSpec, target: Target) -> Variant:
    reasons = {}
    for variant in candidates(spec):
        if variant.template is None:
            reason: str | None = "is no generated kernel"
        elif variant.backend == "gluon":
            reason = "an exported file tests itself on any machine, and Gluon runs on its GPU alone"
        else:
            reason = variant.supports(spec, target)
        if reason is None:
            return variant
        reasons[variant.name] = reason
    raise UnsupportedProblemError(f"{spec.key} cannot be exported for {target.name}:", reasons)


def _body(text: str) -> str:
    """The kernel file without its docstring and imports: what stands from the first definition on."""
    first = next(node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    line = min([first.lineno, *(decorator.lineno for decorator in first.decorator_list)])
    return "\n".join(text.splitlines()[line - 1 :]).rstrip()


# -- which configurations --


def _rows(spec: AttentionSpec, problem: Problem | None, variant: Variant, digest: str, target: Target) -> list[_Row]:
    """The winner of every stored shape; what dispatch says for the given problem; at least the default."""
    gpu = None if target.backend == "cpu" else target.name
    kept = [row for row in _stored(spec, digest, gpu) if row.variant == variant.name]
    shipped = [row for row in _shipped(spec, digest, gpu) if row.variant == variant.name]
    rows: dict[tuple[int, int, int], _Row] = {}
    # The order of dispatch: what was measured first, the user's own before what is shipped.
    for origin, best, records in (
        ("database", select.best_measured, kept),
        ("seed", select.best_measured, shipped),
        ("predicted", select.best_predicted, kept),
        ("predicted", select.best_predicted, shipped),
    ):
        for shape, group in _by_shape(records).items():
            row = best(group, group[0].shape)
            if row is not None and shape not in rows and _is_legal(row, spec, variant, target):
                rows[shape] = _Row(
                    shape=shape, config=dict(sorted(row.config.items())), origin=origin, provenance=_provenance(row)
                )
    if problem is not None and _key(problem.shape) not in rows:
        plan = dispatch.resolve(problem, target, backend=variant.backend)
        shape, what = _key(problem.shape), "nothing was tuned for this kernel on this GPU"
        if plan.config_source != "default":
            what = "the nearest tuned shape's, as a call would take it"
        origin = plan.config_source
        rows[shape] = _Row(shape=shape, config=plan.config.to_dict(), origin=origin, provenance=f"{origin}: {what}")
    if not rows:
        shape, what = (4096, 4096, 32), "default: nothing was tuned for this kernel on this GPU"
        config = variant.default(spec, target).to_dict()
        rows[shape] = _Row(shape=shape, config=config, origin="default", provenance=what)
    return [rows[shape] for shape in sorted(rows)]


def _by_shape(records: Iterable[Record]) -> dict[tuple[int, int, int], list[Record]]:
    groups: dict[tuple[int, int, int], list[Record]] = {}
    for row in records:
        groups.setdefault(_key(row.shape), []).append(row)
    return groups


def _is_legal(row: Record, spec: AttentionSpec, variant: Variant, target: Target) -> bool:
    """Whether today's predicate still allows a stored winner."""
    try:
        variant.parse_config(row.config, spec, target)
    except InvalidProblemError:
        return False
    return True


def _stored(spec: AttentionSpec, digest: str, gpu: str | None) -> list[Record]:
    path = settings.read().database_path
    if path is not None and not path.exists():
        return []
    with open_store() as store:
        return store.trials(spec_key=spec.key, digest=digest, gpu=gpu)


def _shipped(spec: AttentionSpec, digest: str, gpu: str | None) -> list[Record]:
    names = [gpu] if gpu else seeds.gpus()
    return [
        row for name in names for row in seeds.load(name, spec.op) if row.spec_key == spec.key and row.digest == digest
    ]


def _key(shape: dict[str, int]) -> tuple[int, int, int]:
    return (shape["seqlen_q"], shape["seqlen_k"], shape["batch"] * shape["num_heads_q"])


def _words(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def _provenance(row: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(row.versions.items()))
    figure = (
        f"measured {row.latency_ms:.4f} ms ({row.protocol})"
        if row.latency_ms is not None
        else f"predicted (rank {row.rank}, never timed)"
    )
    return f"{figure} on {row.gpu}, {row.created[:10]}, {versions}"


def _write(path: Path, text: str) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidProblemError(f"{path} cannot be written: {error}. Choose another folder.") from error
