"""Schema versions: which one a database has, creating it, and migrating it. Alembic is imported only where it works."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from flashgen.errors import DatabaseError, SchemaVersionError
from flashgen.store.engines import copy_file, create_empty, read_stable, reading_engine, writing, writing_engine
from flashgen.store.location import ELSEWHERE, Location, check_readable, check_writable, locate, translated
from flashgen.store.models import VERSION_TABLE

# Oldest first, here so that a reader can tell old from new without alembic; a test compares it with the migrations.
REVISIONS = ("0001", "0002")
HEAD = REVISIONS[-1]

_LOCK_TIMEOUT_S = 60.0
_PG_LOCK = 0x666C617368  # any number that all flashgen processes share


def schema_version(url: str | os.PathLike[str] | None = None) -> str:
    """The schema revision of a database, whether this flashgen can use it or not.

    Args:
        url: a path or an SQLAlchemy URL; None for what the settings say.

    Raises:
        DatabaseError: there is none, it cannot be read, or it is not flashgen's.
    """
    location = locate(url)
    revision = _revision_of(location)
    if revision is None:
        raise DatabaseError(f"the tuning database {location.name} is empty: `flashgen tune` fills it.")
    return revision


def migrate(url: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Bring a database to this flashgen's schema. A file is copied to `<name>.bak-<old revision>` first.

    A server's database is not copied: dump it before.

    Args:
        url: a path or an SQLAlchemy URL; None for what the settings say.

    Returns:
        (revision before, revision now); equal, and nothing was touched, where there was nothing to do.

    Raises:
        SchemaVersionError: its schema is newer than this flashgen.
        DatabaseError: there is none, it is not flashgen's, or it cannot be copied or written.
    """
    location = locate(url)
    old = schema_version(url)
    _refuse_newer(location, old)
    if old == HEAD:
        return old, old
    path = location.path
    with translated(location):
        if path is not None:
            check_writable(path)
        with _locked(location):
            engine = writing_engine(location)
            try:
                with writing(engine) as connection:
                    # Read again under the write lock: another process may have migrated since.
                    old = _read_revision(connection, location) or old
                    _refuse_newer(location, old)
                    if old != HEAD:
                        if path is not None:
                            keep_copy(path, old)
                        upgrade(connection)
            finally:
                engine.dispose()
    return old, HEAD


def check(location: Location) -> bool:
    """Whether a database holds flashgen's schema as it is today.

    Returns:
        False for a server's database without any schema of flashgen's; a file is never without.

    Raises:
        SchemaVersionError: the schema is older or newer.
        DatabaseError: the file is missing, unreadable, damaged, or not flashgen's.
    """
    revision = _revision_of(location)
    if revision is None:
        return False
    _refuse_newer(location, revision)
    if revision != HEAD:
        raise SchemaVersionError(
            f"the tuning database {location.name} has schema {revision}, this flashgen uses {HEAD}. "
            "Run `flashgen db migrate` (it keeps a copy beside the file)."
        )
    return True


def ensure(location: Location) -> None:
    """Make sure there is a database with today's schema, creating what is missing and nothing else.

    A file is made under a temporary name and moved into place when it is complete, so that no other process, and no
    later one after a crash, ever meets a half-made database.

    Raises:
        SchemaVersionError: the schema is older or newer.
        DatabaseError: it cannot be created or written, or what is there is not flashgen's.
    """
    with translated(location):
        path = location.path
        if path is None:
            if location.is_sqlite or check(location):
                return
            _create_in(location)
            return
        if not _is_missing(path):
            check_readable(path)
            check(location)
            check_writable(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
        with _locked(location):
            if _is_missing(path):
                _create_file(path)
        check(location)


def create(engine: Engine) -> None:
    """Give an empty database today's schema, as a whole or not at all."""
    with writing(engine) as connection:
        upgrade(connection)


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run the migrations up to a revision on a connection whose transaction the caller owns."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    # Alembic reads options through configparser, for which % is special.
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _PG_LOCK})
    command.upgrade(config, revision)


def _is_missing(path: Path) -> bool:
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def _revision_of(location: Location) -> str | None:
    with translated(location):
        if location.path is not None:
            check_readable(location.path)
        engine = reading_engine(location)
        try:
            return read_stable(location, lambda: _connected_revision(engine, location))
        finally:
            engine.dispose()


def _connected_revision(engine: Engine, location: Location) -> str | None:
    with engine.connect() as connection:
        return _read_revision(connection, location)


def _read_revision(connection: Connection, location: Location) -> str | None:
    inspector = inspect(connection)
    found: list[str] = []
    if inspector.has_table(VERSION_TABLE):
        found = list(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars())
    if len(found) == 1:
        return str(found[0])
    # A server's database may hold other tools' tables, and so may hold none of ours yet; a file is one or the other.
    if not found and location.path is None and not inspector.has_table(VERSION_TABLE):
        return None
    problem = (
        f"its table {VERSION_TABLE} has {len(found)} rows"
        if found
        else f"it has no table {VERSION_TABLE} with a revision"
    )
    raise DatabaseError(
        f"{location.name} is a database, but not one of flashgen's ({problem}). It is left as it is: {ELSEWHERE}, or "
        "move it away and run `flashgen tune` again."
    )


def _refuse_newer(location: Location, revision: str) -> None:
    if revision not in REVISIONS:
        raise SchemaVersionError(
            f"the tuning database {location.name} has schema {revision}, newer than this flashgen knows ({HEAD}). "
            f"Upgrade flashgen (`pip install --upgrade flashgen`), or {ELSEWHERE}."
        )


def _create_in(location: Location) -> None:
    engine = writing_engine(location)
    try:
        create(engine)
    finally:
        engine.dispose()


def _create_file(path: Path) -> None:
    """Called under the file lock, when nothing (or an empty file) is at `path`."""
    fresh = path.with_name(f"{path.name}.new")
    for leftover in _with_side_files(fresh):
        leftover.unlink(missing_ok=True)
    create_empty(fresh)
    _create_in(locate(fresh))
    # The log of a database that was deleted would be replayed into the new one.
    for orphan in _with_side_files(path)[1:]:
        orphan.unlink(missing_ok=True)
    os.replace(fresh, path)


def _with_side_files(path: Path) -> list[Path]:
    return [path, *(path.with_name(f"{path.name}{suffix}") for suffix in ("-wal", "-shm", "-journal"))]


def keep_copy(path: Path, label: str) -> Path:
    """Copy a database to `<name>.bak-<label>`, numbered where that is taken; the copy's path."""
    copy = path.with_name(f"{path.name}.bak-{label}")
    number = 1
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.name}.bak-{label}-{number}")
    copy_file(path, copy)
    return copy


@contextmanager
def _locked(location: Location) -> Iterator[None]:
    """Hold the lock beside the file while a schema is created or changed; writers of rows need only SQLite's own."""
    if location.path is None:
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(f"{location.path}.lock", timeout=_LOCK_TIMEOUT_S)
    try:
        # FileLock waits for a file that can never be made; say so at once.
        os.close(os.open(lock.lock_file, os.O_CREAT | os.O_RDWR, 0o644))
    except OSError as error:
        raise DatabaseError(
            f"{lock.lock_file} cannot be made beside the tuning database: {error}. Make the folder writable, or {ELSEWHERE}."
        ) from error
    try:
        lock.acquire()
    except Timeout as error:
        raise DatabaseError(
            f"another process has been creating or migrating {location.path} for {_LOCK_TIMEOUT_S:.0f} s "
            f"(it holds {lock.lock_file}). Try again when it is done."
        ) from error
    try:
        yield
    finally:
        lock.release()
