"""Facts on disk, by the kernel's text, the configuration, the architecture, Triton's version and the strides."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from flashgen import settings
from flashgen.config import KernelConfig
from flashgen.errors import BuildError
from flashgen.facts.record import CompiledFacts, Constants, Strides
from flashgen.render import KernelSource
from flashgen.target import Target

FORMAT = 5  # of the files
DIVISIBLE = ":16"


def specialised(value: int) -> str:
    """What Triton compiles an integer argument as: a constant where it is 1, else its width and whether 16 divides it."""
    if value == 1:
        return "constexpr"
    return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64") + (DIVISIBLE if value % 16 == 0 else "")


@cache
def triton_version() -> str:
    """Version of the installed Triton, without importing it.

    Raises:
        BuildError: it is not installed.
    """
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise BuildError("triton is not installed: pip install triton") from None


def cached(
    source: KernelSource, target: Target, config: KernelConfig, strides: Strides | None = None
) -> CompiledFacts | None:
    """The facts from the disk cache, or None; a corrupt file counts as none."""
    return read(path_of(source, target, config, strides))


def read(path: Path) -> CompiledFacts | None:
    """What a file holds; None where there is none, or one of another format, or a corrupt one."""
    try:
        data = json.loads(path.read_text())
        return CompiledFacts.from_json(data) if data["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def path_of(source: KernelSource, target: Target, config: KernelConfig, strides: Strides | None = None) -> Path:
    """The file of a configuration, all kernels of its launch together."""
    return file_of(source.digest, "", config.to_dict(), target.arch, strides)


def file_of(digest: str, kernel: str, values: Constants, arch: str, strides: Strides | None) -> Path:
    """The file of one kernel compiled with these values; the name of all together is empty."""
    parts = [FORMAT, digest, kernel, values, arch, triton_version()]
    # Equal forms are equal binaries; the usual one (multiples of 16) is the one that no strides mean.
    forms = {name: form for name, value in (strides or {}).items() if (form := _form(name, value)) != "i32:16"}
    key = json.dumps([*parts, forms] if forms else parts, sort_keys=True)
    return settings.read().cache_dir / "facts" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def write(path: Path, data: dict[str, Any]) -> None:
    """Atomic, so that processes may race; a cache that cannot be written is no failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(data, file)
        os.replace(temporary, path)
    except OSError:
        return


def _form(name: str, value: int) -> str:
    """What a stride is compiled as; of a constant and of a pointer the value itself."""
    return f"={value}" if name.isupper() or name.endswith("_ptr") else specialised(value)
