"""Connections: how SQLite files are opened for reading and for writing, and engines on top of that.

Reading must leave no trace: a read-only connection to a cleanly closed WAL file would create `-wal` and `-shm` beside
it, and fails where the folder is read-only. So a reader looks first: without a log all data is in the file, which is
opened `immutable` (no locks, no side files) and read again if it changed meanwhile; with a log a writer is alive (or
was killed), and the log's own files are used as they are.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from flashgen.errors import DatabaseError
from flashgen.store.location import Location

BUSY_TIMEOUT_S = 30.0
_WRITES = "flashgen_writes"

FileState = tuple[int, int, int] | None
_T = TypeVar("_T")
_READ_ATTEMPTS = 50


def file_state(path: Path) -> FileState:
    """What identifies the content of a database file that has no log; None where a log holds part of the content."""
    if _size(path, "-wal") or _size(path, "-journal"):
        return None
    status = path.stat()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def read_stable(location: Location, action: Callable[[], _T]) -> _T:
    """Run a reading action on one state of the file: again, should a writer come or go meanwhile.

    Raises:
        DatabaseError: the file never stands still.
    """
    path = location.path
    if path is None:
        return action()
    for _ in range(_READ_ATTEMPTS):
        before = file_state(path)
        try:
            result = action()
        except (SQLAlchemyError, sqlite3.Error, DatabaseError):
            if file_state(path) == before:
                raise
        else:
            if file_state(path) == before:
                return result
        time.sleep(0.01)
    raise DatabaseError(f"{location.name} changes faster than it can be read. Try again when its writers are done.")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction that holds the write lock from its start, so that it cannot fail half-way."""
    with engine.connect().execution_options(**{_WRITES: True}) as connection, connection.begin():
        yield connection


def reading_engine(location: Location) -> Engine:
    """An engine whose connections only read. It opens a file anew each time, since the way depends on the log.

    Raises:
        DatabaseError: memory, or a server's driver is not installed.
    """
    if not location.is_sqlite:
        return _server_engine(location).execution_options(postgresql_readonly=True)
    path = location.path
    if path is None:
        raise DatabaseError(
            "an in-memory database cannot be opened for reading: it is always empty. Set FLASHGEN_DB to a path."
        )
    engine = create_engine("sqlite://", creator=lambda: _connect_read(path), poolclass=NullPool)
    _prepare(engine)
    return engine


def writing_engine(location: Location) -> Engine:
    """An engine that writes to a database that is there (files are never created by it).

    Raises:
        DatabaseError: a server's driver is not installed.
    """
    if not location.is_sqlite:
        return _server_engine(location)
    path = location.path
    if path is None:
        engine = create_engine("sqlite://", creator=lambda: _connect(":memory:"), poolclass=StaticPool)
    else:
        engine = create_engine("sqlite://", creator=lambda: _connect(_uri(path, "mode=rw")), poolclass=QueuePool)
    _prepare(engine)
    return engine


def create_empty(path: Path) -> None:
    """An empty SQLite file in WAL mode, which the file keeps; only a temporary name of the store is ever passed."""
    with closing(_connect(str(path))) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def copy_file(path: Path, copy: Path) -> None:
    """A consistent copy, what is still in the log included, by SQLite's own backup.

    Copying bytes would miss the log; and closing a file that SQLite has open elsewhere in this process drops its locks.
    """
    part = copy.with_name(f"{copy.name}.part")
    part.unlink(missing_ok=True)
    with closing(_connect_read(path)) as source, closing(_connect(str(part))) as target:
        source.backup(target)
    os.replace(part, copy)


def _server_engine(location: Location) -> Engine:
    try:
        return create_engine(location.url, pool_pre_ping=True)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise DatabaseError(
            f"the tuning database {location.name} needs a driver that is not installed ({error}). "
            "Install it with `pip install 'flashgen[postgres]'` and write the URL as postgresql+psycopg://..."
        ) from error


def _prepare(engine: Engine) -> None:
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _connect(database: str) -> sqlite3.Connection:
    # isolation_level None: sqlite3's own BEGIN is deferred and leaves DDL outside; ours comes from the "begin" event.
    # check_same_thread False: the pool hands a connection to one thread at a time.
    connection = sqlite3.connect(
        database,
        uri=database.startswith("file:"),
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _connect_read(path: Path) -> sqlite3.Connection:
    if file_state(path) is not None:
        return _connect(_uri(path, "mode=ro&immutable=1"))
    # readonly_shm: never create the log's index; where it is missing SQLite refuses, and a copy is recovered in memory.
    connection = _connect(_uri(path, "mode=ro&readonly_shm=1"))
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if "unable to open" not in str(error) and "readonly" not in str(error):
            raise
        return _recovered_copy(path)
    return connection


def _recovered_copy(path: Path) -> sqlite3.Connection:
    """The content of a file whose log lost its index (both were copied here, or a system crash), in memory."""
    memory = _connect(":memory:")
    with tempfile.TemporaryDirectory(prefix="flashgen-") as folder:
        copy = Path(folder) / "copy"
        shutil.copyfile(path, copy)
        for suffix in ("-wal", "-journal"):
            if _size(path, suffix):
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        with closing(_connect(str(copy))) as source:
            source.backup(memory)
    return memory


def _uri(path: Path, options: str) -> str:
    return f"{path.as_uri()}?{options}"


def _size(path: Path, suffix: str) -> int:
    try:
        return Path(f"{path}{suffix}").stat().st_size
    except FileNotFoundError:
        return 0
