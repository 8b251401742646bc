"""`build`: a rendered source becomes a readable file in the cache and an imported module with a `launch` function."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flashgen import jit, settings
from flashgen.errors import BuildError
from flashgen.render import KernelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """An imported kernel file. Triton compiles a config at its first launch.

    Attributes:
        source: what was rendered.
        path: the file it was imported from.
        module: the imported module, with the jit functions by name.
        launch: `launch(q, k, v, o, lse, *, sm_scale, causal_offset, **tunables)`.
    """

    source: KernelSource
    path: Path
    module: ModuleType
    launch: Callable[..., None]


_built: dict[tuple[Path, str], CompiledKernel] = {}
_lock = threading.Lock()


def write_source(source: KernelSource) -> Path:
    """Write the source to `<cache>/kernels/<name>` unless it stands there already; atomic, so processes may race.

    Returns:
        The path of the file.

    Raises:
        BuildError: the cache folder cannot be written; names FLASHGEN_CACHE_DIR.
    """
    folder = settings.read().cache_dir / "kernels"
    path = folder / source.name
    try:
        if path.exists() and path.read_text() == source.text:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{source.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(source.text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise BuildError(
            f"the rendered kernel could not be written to {path}: {error}. Set FLASHGEN_CACHE_DIR to a writable folder."
        ) from error
    return path


def load_module(path: Path) -> ModuleType:
    """Import a rendered kernel file by its path; Triton's cache knows its functions by the digest of its text.

    Raises:
        BuildError: triton is missing or the file does not import.
    """
    spec = importlib.util.spec_from_file_location(f"flashgen_kernel_{path.stem.replace('-', '_')}", path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is no importable Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        text = path.read_text()
        with jit.lines_known(path, text):
            spec.loader.exec_module(module)
        jit.adopt(module, path, hashlib.sha256(text.encode()).hexdigest())
    except Exception as error:
        raise BuildError(f"the kernel file {path} does not import: {type(error).__name__}: {error}") from error
    return module


def build(source: KernelSource) -> CompiledKernel:
    """Write and import a rendered kernel, once per process.

    Raises:
        BuildError: it cannot be written or imported.
    """
    key = (settings.read().cache_dir, source.digest)
    with _lock:
        if key not in _built:
            path = write_source(source)
            module = load_module(path)
            launch: Any = getattr(module, "launch", None)
            if launch is None:
                raise BuildError(f"{path} has no launch function: its template is broken.")
            _built[key] = CompiledKernel(source=source, path=path, module=module, launch=launch)
        return _built[key]
