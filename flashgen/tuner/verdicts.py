"""Verdicts of the accuracy check in the interpreter, remembered on disk: it takes seconds, and warps and stages do not change it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flashgen
from flashgen import gradients, interpret, samples, settings
from flashgen.accuracy import AccuracyReport
from flashgen.config import KernelConfig
from flashgen.coverage import has_options
from flashgen.errors import BuildError
from flashgen.facts import triton_version
from flashgen.problem import Problem
from flashgen.render import KernelSource

_FORMAT = 1
_NOT_INTERPRETED = ("num_warps", "num_stages")  # the interpreter runs a program as one thread


def of(source: KernelSource, config: KernelConfig, problem: Problem | None = None) -> AccuracyReport | BuildError:
    """Check one tile of a kernel against the reference, or remember that it was checked.

    Args:
        source: the rendered kernel.
        problem: of a kernel with options one of its problems; None for plain attention.
        config: its knobs; those that the interpreter ignores do not matter.

    Returns:
        The report; a BuildError where the kernel could not be interpreted, which is never remembered.
    """
    like = problem if problem is not None and has_options(source.spec) else None
    path = _path(source, config, like)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        data = json.loads(path.read_text())
        return AccuracyReport(**{field.name: data[field.name] for field in fields(AccuracyReport)})
    knobs: dict[str, Any] = dict(config)
    launch: Any = partial(interpret.launch_of(source), source, **knobs)
    try:
        if like is None:
            report = gradients.check_launch(launch, source.spec)
        else:
            report = samples.check_launch(launch, like, config)
    except BuildError as error:
        return error
    _write(path, asdict(report))
    return report


def _path(source: KernelSource, config: KernelConfig, like: Problem | None) -> Path:
    structure = {name: value for name, value in config.items() if name not in _NOT_INTERPRETED}
    versions = [flashgen.__version__, triton_version(), metadata.version("torch")]
    numbers: list[Any] = []
    if like is not None:
        numbers = [list(like.window_size), like.softcap, like.dropout_p]
        contents = () if like.mods is None else like.mods.samples
        numbers += [
            hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for x in contents
        ]
    key = json.dumps([_FORMAT, source.digest, config.variant, structure, versions, *numbers], sort_keys=True)
    return settings.read().cache_dir / "accuracy" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _write(path: Path, data: dict[str, Any]) -> None:
    """Atomic; a cache that cannot be written is no failure."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(data, file)
        os.replace(temporary, path)
