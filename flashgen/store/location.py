"""Where the database is, and what to say when it cannot be used."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from flashgen import settings
from flashgen.errors import DatabaseError

ELSEWHERE = "set FLASHGEN_DB to another file"
WAY_OUT = f"Move it away and run `flashgen tune` again, or {ELSEWHERE}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A database: a file, a server, or memory (SQLite without a file).

    Attributes:
        url: for SQLAlchemy.
        path: the file itself, symbolic links followed as SQLite follows them; None for a server and for memory.
        name: what messages call it; never shows a password.
    """

    url: sqlalchemy.URL
    path: Path | None
    name: str

    @property
    def is_sqlite(self) -> bool:
        """Whether SQLite keeps it, in a file or in memory."""
        return self.url.get_backend_name() == "sqlite"


def locate(url: str | os.PathLike[str] | None = None) -> Location:
    """Turn what a user gave into a place.

    Args:
        url: a path, an SQLAlchemy URL (SQLite or PostgreSQL), or None for what the settings say.

    Raises:
        DatabaseError: the URL cannot be read, or names another kind of database.
    """
    if url is None:
        env = settings.read()
        url = env.db if env.db is not None and "://" in env.db else (env.database_path or env.database_url)
    if not isinstance(url, str) or "://" not in url:
        return _file(Path(url))
    try:
        parsed = sqlalchemy.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, SQLAlchemyError, ValueError) as error:
        raise DatabaseError(f"the database URL cannot be read ({error}). {_ALLOWED}") from error
    shown = parsed.render_as_string(hide_password=True)
    if backend == "sqlite":
        return _sqlite_url(parsed)
    if backend != "postgresql":
        raise DatabaseError(f"{shown} is a {backend} database, which is not supported. {_ALLOWED}")
    return Location(url=parsed, path=None, name=shown)


_ALLOWED = "Set FLASHGEN_DB to a path, sqlite:////absolute/path.sqlite3, or postgresql+psycopg://user@host/name."


def _file(path: Path) -> Location:
    shown = path.expanduser().absolute()
    real = Path(os.path.realpath(shown))
    return Location(url=sqlalchemy.URL.create("sqlite", database=str(real)), path=real, name=str(shown))


def _sqlite_url(url: sqlalchemy.URL) -> Location:
    if url.query or (url.database or "").startswith("file:"):
        raise DatabaseError(
            f"{url.render_as_string()}: options in an SQLite URL are not supported. Give the plain path instead."
        )
    if url.database in (None, "", ":memory:"):
        return Location(url=sqlalchemy.URL.create("sqlite"), path=None, name="sqlite:// (memory)")
    return _file(Path(str(url.database)))


@contextmanager
def translated(location: Location) -> Iterator[None]:
    """Turn what drivers and the file system raise into a DatabaseError that names the place and the way out.

    Raises:
        DatabaseError: instead of any SQLAlchemy, sqlite3 or OS error.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise DatabaseError(_explain(location, error)) from error


def _explain(location: Location, error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    text, name = f"{type(cause).__name__}: {cause}", location.name
    if not location.is_sqlite:
        return f"the tuning database {name} cannot be used ({text}). Check that the server runs, or {ELSEWHERE}."
    lower = text.lower()
    if "not a database" in lower:
        return f"{name} is not an SQLite database, or is damaged ({text}). {WAY_OUT}"
    if "malformed" in lower or "no such table" in lower or "no such column" in lower or "jsondecode" in lower:
        return f"the tuning database {name} is damaged ({text}). `flashgen db verify` says more. {WAY_OUT}"
    if "locked" in lower:
        return f"the tuning database {name} is busy ({text}): another process writes. Try again when it is done."
    if "readonly" in lower or "unable to open" in lower or isinstance(error, PermissionError):
        return (
            f"the tuning database {name} cannot be opened or written ({text}). Check its permissions, or {ELSEWHERE}."
        )
    return f"the tuning database {name} cannot be used ({text}). Check the disk and the permissions, or {ELSEWHERE}."


def check_readable(path: Path) -> None:
    """Refuse what cannot be a readable database before SQLite touches it.

    Raises:
        DatabaseError: nothing there, not a plain file, empty, or not readable by this user.
    """
    if not path.exists():
        raise DatabaseError(
            f"there is no tuning database at {path}. `flashgen tune` makes one; or set FLASHGEN_DB to one that exists."
        )
    _check_plain(path)
    if not os.access(path, os.R_OK):
        raise DatabaseError(
            f"the tuning database {path} is not readable by this user. Correct its permissions, or {ELSEWHERE}."
        )
    if path.stat().st_size == 0:
        raise DatabaseError(
            f"{path} is empty: it holds no tuning database yet. `flashgen tune` fills it, or {ELSEWHERE}."
        )


def check_writable(path: Path) -> None:
    """Refuse what cannot be written before any work is done; the folder of the file exists.

    Raises:
        DatabaseError: not a plain file, or file or folder are read-only.
    """
    _check_plain(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise DatabaseError(f"the tuning database {path} is read-only. Make it writable, or {ELSEWHERE}.")
    if not os.access(path.parent, os.W_OK):
        raise DatabaseError(
            f"the folder {path.parent} is read-only, but the tuning database {path.name} needs files beside "
            f"itself while it is written. Make the folder writable, or {ELSEWHERE}."
        )


def _check_plain(path: Path) -> None:
    if path.is_dir():
        raise DatabaseError(
            f"{path} is a directory, not a tuning database. Set FLASHGEN_DB to a file, e.g. {path / 'tuning.sqlite3'}."
        )
    if path.exists() and not path.is_file():
        raise DatabaseError(f"{path} is not a plain file (a device, pipe or socket). Set FLASHGEN_DB to a file.")
