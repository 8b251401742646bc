"""The one writer of a run: rows reach the database, or a file beside it, or the terminal; none is lost in silence."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from flashgen import settings
from flashgen.errors import DatabaseError
from flashgen.store import Record, Store
from flashgen.store.location import locate
from flashgen.tuner.interrupts import held

_MARK = ".unsaved-"


class Writer:
    """Adds rows to the store, whichever thread brings them.

    Args:
        store: open for writing.
        url: of the database, which names the file for what cannot be stored.
        session: of the run.
    """

    def __init__(self, store: Store, url: str, session: str) -> None:
        self._store, self._url, self._session = store, url, session
        self._lock = threading.Lock()

    def save(self, rows: Iterable[Record]) -> None:
        """Add rows; Ctrl-C waits for it.

        Raises:
            DatabaseError: the database took none of them; the message says where they are instead.
        """
        kept = list(rows)
        with held(), self._lock:
            try:
                self._store.add(kept)
            except DatabaseError as error:
                place = self._aside(kept)
                raise DatabaseError(f"{error} The {len(kept)} rows that could not be stored are {place}") from error

    def _aside(self, rows: list[Record]) -> str:
        text = "".join(f"{row.to_json()}\n" for row in rows)
        folder, stem = _beside(self._url)
        name = f"{stem}{_MARK}{self._session}.jsonl"
        if _append(folder / name, text):
            return f"in {folder / name}: the next `flashgen tune` with this database adds them."
        elsewhere = Path(tempfile.gettempdir()) / name
        if _append(elsewhere, text):
            return f"in {elsewhere}: move it to {folder}, and the next `flashgen tune` with this database adds them."
        print(text, file=sys.stderr, end="", flush=True)
        return "printed above as JSON lines, since no file could be written either."


def _append(path: Path, text: str) -> bool:
    """Whether the whole text could be written; no half lines are left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.write(text)
        except OSError:
            with path.open("r+") as file:
                file.truncate(size)
            raise
    except OSError:
        return False
    return True


def recover(store: Store, url: str) -> int:
    """Add what an earlier run could not store, and remove its files; returns how many rows were new.

    Only files beside the database are read: a folder for everybody's temporary files may hold anybody's rows.

    Raises:
        DatabaseError: they cannot be stored now either; the files stay.
    """
    added = 0
    folder, stem = _beside(url)
    for path in sorted(folder.glob(f"{stem}{_MARK}*.jsonl")):
        try:
            rows = [Record.from_json(line) for line in path.read_text().splitlines() if line]
        except (OSError, DatabaseError):
            continue  # damaged, or not ours to read: it stays, and harms nobody
        added += store.add(rows)
        path.unlink(missing_ok=True)
    return added


def _beside(url: str) -> tuple[Path, str]:
    """The folder and the first part of the name of files that belong to a database; a server's lie in the cache folder."""
    path = locate(url).path
    if path is not None:
        return path.parent, path.name
    return settings.read().cache_dir, f"database-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
