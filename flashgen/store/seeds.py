"""Shipped rows: `tuning_db/seeds/<gpu>/<op>.jsonl`, one record a line. Needs the standard library alone."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from flashgen import assets
from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.store.records import SHAPE_KEYS, Record

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def gpus() -> tuple[str, ...]:
    """Names of the GPUs that rows are shipped for, sorted.

    Raises:
        FlashgenError: flashgen's data folder is missing.
    """
    folder = assets.seeds_dir()
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("*.jsonl"))))


def load(gpu: str, op: str) -> tuple[Record, ...]:
    """The shipped rows of one GPU and operation; read once, then remembered.

    Args:
        gpu: name of the target, e.g. `h100`.
        op: e.g. `attention_fwd`.

    Returns:
        The rows, or () where none are shipped.

    Raises:
        DatabaseError: the file cannot be read or a line is corrupt; names file and line.
        FlashgenError: flashgen's data folder is missing.
    """
    if not (_PLAIN_NAME.fullmatch(gpu) and _PLAIN_NAME.fullmatch(op)):
        return ()  # no such file can have been written
    return _remembered(assets.seeds_dir() / gpu / f"{op}.jsonl")


def read(path: Path) -> tuple[Record, ...]:
    """The rows of one seeds file anywhere, not remembered.

    Raises:
        DatabaseError: as `load`.
    """
    return _parse(path)


def forget() -> None:
    """Drop remembered files, after something else changed them."""
    _remembered.cache_clear()


def write(directory: str | os.PathLike[str], records: Iterable[Record]) -> tuple[Path, ...]:
    """Merge records into `<directory>/<gpu>/<op>.jsonl`: a set union, sorted, each file replaced atomically.

    Two processes that write the same file at once may lose one's rows: seeds are written by hand, one run at a time.

    Args:
        directory: created where missing, e.g. `tuning_db/seeds`.
        records: of any GPU and operation.

    Returns:
        The files that hold these records, sorted.

    Raises:
        DatabaseError: a file there is corrupt (it is left as it is), or cannot be written.
        InvalidProblemError: a record's gpu or op cannot be a file name.
    """
    groups: dict[Path, dict[str, Record]] = {}
    for record in records:
        for name in (record.gpu, record.op):
            if not _PLAIN_NAME.fullmatch(name):
                raise InvalidProblemError(f"{name!r} cannot name a seeds file: letters, digits, '_', '-' and '.' only.")
        path = Path(directory) / record.gpu / f"{record.op}.jsonl"
        groups.setdefault(path, {}).setdefault(record.sha, record)
    # Everything is read before anything is written, so that a corrupt file leaves the whole folder as it was.
    merged = {path: {row.sha: row for row in _parse(path)} for path in groups}
    for path, rows in sorted(groups.items()):
        for sha, record in rows.items():
            merged[path].setdefault(sha, record)
        lines = [row.to_json() for _, row in sorted(merged[path].items(), key=lambda item: _order(*item))]
        replace_file(path, "".join(f"{line}\n" for line in lines))
    forget()
    return tuple(sorted(groups))


def _order(sha: str, row: Record) -> tuple[Any, ...]:
    """Rows of one kernel and shape stand together, so that a review reads winners and not hashes."""
    sizes = tuple(row.shape[name] for name in SHAPE_KEYS)
    return (row.spec_key, row.variant, row.digest, sizes, row.status, row.config_json, row.created, sha)


@lru_cache(maxsize=256)
def _remembered(path: Path) -> tuple[Record, ...]:
    return _parse(path)


def _parse(path: Path) -> tuple[Record, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"{path} cannot be read: {error}. {_way_out(path)}") from error
    rows = []
    # Not splitlines(): it also splits at separators that may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = Record.from_json(line)
        except DatabaseError as error:
            raise DatabaseError(f"{path}, line {number} is not a tuning record: {error}. {_way_out(path)}") from error
        if (row.gpu, row.op) != (path.parent.name, path.stem):
            raise DatabaseError(
                f"{path}, line {number} is a row of {row.gpu}/{row.op}: it stands in the wrong file. {_way_out(path)}"
            )
        rows.append(row)
    return tuple(rows)


def _way_out(path: Path) -> str:
    return f"Correct or remove it; reinstall flashgen if {path.name} was shipped with it."


def replace_file(path: Path, text: str) -> None:
    """Write a data file as a whole or not at all; its folder is made where missing.

    Raises:
        DatabaseError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp's 0600 would keep other users from shipped rows
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DatabaseError(f"{path} cannot be written: {error}. Choose a folder that is writable.") from error
