"""The one writer of a run: rows reach the database, or a file beside it, or the terminal; none is lost in silence."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
        for folder in (_folder(self._url), Path(tempfile.gettempdir())):
            if folder is None:
                continue
            path = folder / f"{_stem(self._url)}{_MARK}{self._session}.jsonl"
            with suppress(OSError):
                size = path.stat().st_size if path.exists() else 0
                try:
                    with path.open("a") as file:
                        file.write(text)
                except OSError:
                    with path.open("r+") as file:
                        file.truncate(size)  # no half lines
                    raise
                return f"in {path}: the next `flashgen tune` with this database adds them."
        print(text, file=sys.stderr, end="", flush=True)
        return "printed above as JSON lines, since no file could be written either."


def recover(store: Store, url: str) -> int:
    """Add what an earlier run could not store, and remove its files; returns how many rows were new.

    Raises:
        DatabaseError: they cannot be stored now either; the files stay.
    """
    added = 0
    for folder in dict.fromkeys((_folder(url), Path(tempfile.gettempdir()))):
        if folder is None or not folder.is_dir():
            continue
        for path in sorted(folder.glob(f"{_stem(url)}{_MARK}*.jsonl")):
            try:
                rows = [Record.from_json(line) for line in path.read_text().splitlines() if line]
            except (OSError, DatabaseError):
                continue  # another user's, or damaged: it stays, and harms nobody
            added += store.add(rows)
            path.unlink(missing_ok=True)
    return added


def _folder(url: str) -> Path | None:
    path = locate(url).path
    return None if path is None else path.parent


def _stem(url: str) -> str:
    path = locate(url).path
    return "flashgen" if path is None else path.name
