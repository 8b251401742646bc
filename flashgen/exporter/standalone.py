"""One readable file: kernel, configurations, launcher, provenance, self-test; it imports only torch and triton."""

from __future__ import annotations

import ast
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flashgen
from flashgen import dispatch, settings
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.render import render, render_template
from flashgen.spec import AttentionSpec
from flashgen.store import open_store, seeds, select
from flashgen.store.records import SHAPE_KEYS, Record
from flashgen.target import Target
from flashgen.variants import Variant, candidates

_TORCH_DTYPE = {"fp16": "torch.float16", "bf16": "torch.bfloat16", "fp32": "torch.float32"}
_MARK = "Written by flashgen "


@dataclass(frozen=True, slots=True)
class _Row:
    """One entry of CONFIGS."""

    shape: tuple[int, int, int]
    config: dict[str, Any]
    source: str


def write_standalone(spec: AttentionSpec, problem: Problem | None, path: Path, target: Target, *, force: bool) -> Path:
    """Write the file; see `flashgen.exporter.export`."""
    if path.is_dir():
        path = path / f"{spec.key.replace('-', '_')}.py"
    _check_path(path, force)
    variant = _variant(spec, target)
    source = render(spec, variant)
    rows = _rows(spec, problem, variant, source.digest, target)
    text = render_template(
        "export/standalone.py.jinja",
        spec=spec,
        variant=variant,
        meta={
            "module": path.stem,
            "flashgen": flashgen.__version__,
            "kernel_template": f"templates/{variant.template}",
            "date": datetime.now(UTC).date().isoformat(),
            "digest": source.digest,
            "gpu": f"{target.gpu} ({target.name}, {target.arch})",
            "provenance": [
                line for row in rows for line in (f"{row.shape}: {_words(row.config)}", f"    {row.source}")
            ],
            "configs": [(row.shape, json.dumps(row.config)) for row in rows],
            "torch_dtype": _TORCH_DTYPE[spec.dtype],
            "kernel": _body(source.text),
        },
    )
    _write(path, text)
    return path


def _check_path(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise InvalidProblemError(
            f"{path} cannot be written: the folder {path.parent} does not exist. Create it first."
        )
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise InvalidProblemError(
            f"{path.name!r} cannot be imported: name the file like a Python module, e.g. {path.stem.replace('-', '_')}.py."
        )
    if path.exists() and not force and _MARK not in path.read_text(errors="replace")[:2000]:
        raise InvalidProblemError(
            f"{path} exists and was not written by flashgen: choose another name, or --force to overwrite it."
        )


def _variant(spec: AttentionSpec, target: Target) -> Variant:
    reasons = {}
    for variant in candidates(spec):
        reason = variant.supports(spec, target) if variant.template is not None else "is no generated kernel"
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
    stored = [*_stored(spec, digest, gpu), *_shipped(spec, digest, gpu)]
    shapes = {tuple(row.shape[name] for name in SHAPE_KEYS): row.shape for row in stored}
    rows: dict[tuple[int, int, int], _Row] = {}
    for shape in shapes.values():
        at_shape = [row for row in stored if row.shape == shape]
        best = select.best_measured(at_shape, shape) or select.best_predicted(at_shape, shape)
        if best is not None and variant.illegal(spec, target, variant.config(**best.config)) is None:
            rows.setdefault(_key(shape), _Row(_key(shape), dict(sorted(best.config.items())), _provenance(best)))
    if problem is not None and _key(problem.shape) not in rows:
        plan = dispatch.resolve(problem, target, backend=variant.backend)
        rows[_key(problem.shape)] = _Row(_key(problem.shape), plan.config.to_dict(), f"from: {plan.config_source}")
    if not rows:
        default = variant.default(spec, target).to_dict()
        rows[(4096, 4096, 32)] = _Row((4096, 4096, 32), default, "default: nothing was tuned for this GPU")
    return [rows[key] for key in sorted(rows)]


def _stored(spec: AttentionSpec, digest: str, gpu: str | None) -> Iterable[Record]:
    path = settings.read().database_path
    if path is not None and not path.exists():
        return []
    with open_store() as store:
        return store.trials(spec_key=spec.key, digest=digest, gpu=gpu)


def _shipped(spec: AttentionSpec, digest: str, gpu: str | None) -> Iterable[Record]:
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
