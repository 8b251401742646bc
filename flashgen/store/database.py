"""`Store`: the tuning database, open for reading or for writing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, Select, Table, delete, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.store import exchange, schema
from flashgen.store.engines import read_stable, reading_engine, writing, writing_engine
from flashgen.store.location import Location, locate, translated
from flashgen.store.models import Base, Hardware, Kernel, Trial, kernel_values, target_values, to_record, trial_values
from flashgen.store.records import SHAPE_KEYS, Record
from flashgen.store.select import best_measured, best_predicted, usable_measurement, usable_prediction
from flashgen.store.verify import problems_of

_T = TypeVar("_T")
_Key = tuple[object, ...]
_BATCH = 500  # values of one statement: SQLite takes 999 in old builds


def open_store(url: str | os.PathLike[str] | None = None, *, write: bool = False) -> Store:
    """Open the tuning database.

    Reading creates and changes nothing, works on read-only files and folders, and never imports alembic. Writing
    creates the file, its folder and the schema where they are missing; it never changes a file that is not flashgen's
    or has another schema.

    Args:
        url: a path, or an SQLAlchemy URL for SQLite or PostgreSQL; None for what the settings say (FLASHGEN_DB, else
            the default file).
        write: whether rows will be added.

    Returns:
        The store; use it as a context manager, or close it.

    Raises:
        SchemaVersionError: its schema is older (`flashgen db migrate`) or newer (upgrade flashgen).
        DatabaseError: reading and there is no database; or it is unreadable, read-only, damaged or not flashgen's.
    """
    location = locate(url)
    with translated(location):
        if write:
            schema.ensure(location)
            engine = writing_engine(location)
            if location.is_sqlite and location.path is None:
                schema.create(engine)  # memory: it is there as long as its one connection
        else:
            if not schema.check(location):
                raise DatabaseError(f"there is no tuning database at {location.name} yet: `flashgen tune` makes one.")
            engine = reading_engine(location)
    return Store(location, engine, write=write)


class Store:
    """An open tuning database; made by `open_store`. Threads may share one.

    Rows are never changed, and only `remove` takes any away. A winner is the answer to a query, by the rules of
    `flashgen.store.select`.
    """

    def __init__(self, location: Location, engine: Engine, *, write: bool) -> None:
        self._location = location
        self._engine = engine
        self._write = write
        self._closed = False

    # -- writing --

    def add(self, records: Iterable[Record]) -> int:
        """Add trials, all or none; one that is there already (same content) is not added again.

        Args:
            records: any trials, of any kernels and GPUs.

        Returns:
            How many were new.

        Raises:
            DatabaseError: opened for reading, closed, or the database cannot be written.
        """
        rows = list(records)  # whatever makes them must not run while others wait for the lock
        self._check_writing()
        if not rows:
            return 0
        with translated(self._location), writing(self._engine) as connection:
            return _Adder(connection).add(rows)

    def remove(self, records: Iterable[Record]) -> int:
        """Take trials away, all or none, and kernels and targets that no trial is left of. Nothing is copied before.

        Returns:
            How many were there.

        Raises:
            DatabaseError: as `add`.
        """
        shas = [record.sha for record in records]
        self._check_writing()
        removed = 0
        with translated(self._location), writing(self._engine) as connection:
            for start in range(0, len(shas), _BATCH):
                batch = shas[start : start + _BATCH]
                removed += connection.execute(delete(Trial).where(Trial.content_sha.in_(batch))).rowcount
            for model, used in ((Kernel, Trial.kernel_id), (Hardware, Trial.target_id)):
                connection.execute(delete(model).where(model.id.not_in(select(used))))
        return removed

    # -- reading --

    def trials(
        self,
        *,
        op: str | None = None,
        spec_key: str | None = None,
        variant: str | None = None,
        digest: str | None = None,
        gpu: str | None = None,
        arch: str | None = None,
        status: str | None = None,
        session: str | None = None,
    ) -> list[Record]:
        """Trials in the order they were added; a filter that is None matches all.

        Raises:
            DatabaseError: the store is closed, or a row cannot be read.
        """
        query = select(Trial).join(Trial.kernel).join(Trial.target).order_by(Trial.id)
        filters = (
            (Kernel.op, op),
            (Kernel.spec_key, spec_key),
            (Kernel.variant, variant),
            (Kernel.digest, digest),
            (Hardware.gpu, gpu),
            (Hardware.arch, arch),
            (Trial.status, status),
            (Trial.session, session),
        )
        for column, value in filters:
            if value is not None:
                query = query.where(column == value)
        return self._records(query)

    def best(
        self, spec_key: str, variant: str, digest: str, gpu: str, shape: Mapping[str, int], *, predicted: bool
    ) -> Record | None:
        """The winner for a shape, by `select.best_predicted` or `select.best_measured`.

        Raises:
            DatabaseError: the store is closed, or a row cannot be read.
            InvalidProblemError: `shape` lacks a size.
        """
        status = "predicted" if predicted else "ok"
        rows = self.trials(spec_key=spec_key, variant=variant, digest=digest, gpu=gpu, status=status)
        return best_predicted(rows, shape) if predicted else best_measured(rows, shape)

    def winners(self, *, op: str | None = None, spec_key: str | None = None, gpu: str | None = None) -> list[Record]:
        """One row for every kernel, GPU and shape that has a usable trial: the measured winner, else the predicted one.

        Raises:
            DatabaseError: the store is closed, or a row cannot be read.
        """
        groups: dict[_Key, list[Record]] = {}
        for status, usable in (("ok", usable_measurement), ("predicted", usable_prediction)):
            for row in filter(usable, self.trials(op=op, spec_key=spec_key, gpu=gpu, status=status)):
                groups.setdefault(_winner_key(row), []).append(row)
        best = (
            best_measured(rows, rows[0].shape) or best_predicted(rows, rows[0].shape)
            for _, rows in sorted(groups.items())
        )
        return [row for row in best if row is not None]

    def info(self) -> dict[str, Any]:
        """What is in the database, as plain JSON values.

        Returns:
            path, schema, trials, winners (measured and predicted together), winners_measured, winners_predicted,
            by_status, kernels, targets (their GPUs' names), sessions.

        Raises:
            DatabaseError: the store is closed, or a row cannot be read.
        """
        winners = self.winners()
        measured = sum(row.status == "ok" for row in winners)

        def count(session: Session) -> dict[str, Any]:
            by_status = session.execute(
                select(Trial.status, func.count().label("number")).group_by(Trial.status).order_by(Trial.status)
            )
            return {
                "trials": session.scalar(select(func.count(Trial.id))),
                "by_status": {row.status: row.number for row in by_status},
                "kernels": session.scalar(select(func.count(Kernel.id))),
                "targets": list(session.scalars(select(Hardware.gpu).distinct().order_by(Hardware.gpu))),
                "sessions": session.scalar(select(func.count(Trial.session.distinct()))),
            }

        return {
            "path": self._location.name,
            "schema": schema.HEAD,
            **self._read(count),
            "winners": len(winners),
            "winners_measured": measured,
            "winners_predicted": len(winners) - measured,
        }

    def digest(self) -> str:
        """Digest of all rows, see `exchange.digest_of`: equal on two machines whose calls find the same rows.

        Raises:
            DatabaseError: the store is closed, or the database cannot be read.
        """
        query = select(Trial.content_sha, Trial.origin)
        return self._read(lambda session: exchange.digest_of((row[0], row[1]) for row in session.execute(query)))

    def verify(self) -> list[str]:
        """Check the file and every row.

        Runs SQLite's integrity and foreign-key checks, recomputes the digests of configs and contents, and looks for
        values that no record may have.

        Returns:
            Readable problems; empty where all is well.

        Raises:
            DatabaseError: the store is closed.
        """
        self._check_open()
        try:
            return self._read(problems_of)
        except DatabaseError as error:
            return [str(error)]

    # -- life --

    def close(self) -> None:
        """Close every connection; a second call does nothing."""
        self._closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DatabaseError(f"the store {self._location.name} is closed: open it again with open_store().")

    def _check_writing(self) -> None:
        self._check_open()
        if not self._write:
            raise DatabaseError(
                f"{self._location.name} is open for reading: use open_store(write=True) to change its rows."
            )

    def _records(self, query: Select[Trial]) -> list[Record]:
        def run(session: Session) -> list[Record]:
            return [self._record(trial) for trial in session.scalars(query)]

        return self._read(run)

    def _record(self, trial: Trial) -> Record:
        try:
            return to_record(trial)
        except (InvalidProblemError, ValueError) as error:
            raise self._damaged(f"row {trial.id} of {Trial.__tablename__}: {error}") from error

    def _damaged(self, what: str) -> DatabaseError:
        return DatabaseError(
            f"the tuning database {self._location.name} is damaged: {what} `flashgen db verify` lists every problem. "
            "Move the file away and run `flashgen tune` again, or set FLASHGEN_DB to another file."
        )

    def _read(self, query: Callable[[Session], _T]) -> _T:
        self._check_open()

        def run() -> _T:
            with self._transaction() as session:
                return query(session)

        with translated(self._location):
            return run() if self._write else read_stable(self._location, run)

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            try:
                yield session
            except ValueError as error:  # a JSON column that holds no JSON
                raise self._damaged(f"a row cannot be read ({error}).") from error


class _Adder:
    """One transaction that adds rows; kernels and targets are looked up once each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # Both servers have INSERT ... ON CONFLICT DO NOTHING, which two writers may run at once; plain SQL has not.
        self._insert: Callable[[Table], Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}.get(
            connection.dialect.name, insert
        )
        self._known: dict[_Key, int] = {}

    def add(self, records: list[Record]) -> int:
        return sum(self._add_one(record) for record in records)

    def _add_one(self, record: Record) -> int:
        values = trial_values(record)
        values["kernel_id"] = self._id_of(Kernel, kernel_values(record), ("op", "spec_key", "variant", "digest"))
        values["target_id"] = self._id_of(Hardware, target_values(record), ("gpu", "arch", "hardware_sha"))
        return int(self._put(Trial, values))

    def _put(self, model: type[Base], values: dict[str, Any]) -> int:
        statement = self._insert(model.__table__).values(values).on_conflict_do_nothing()  # type: ignore[arg-type]
        return int(self._connection.execute(statement).rowcount)

    def _id_of(self, model: type[Kernel] | type[Hardware], values: dict[str, Any], unique: tuple[str, ...]) -> int:
        key = (model, *(values[name] for name in unique))
        if key not in self._known:
            self._put(model, values)
            query = select(model.id).where(*(getattr(model, name) == values[name] for name in unique))
            self._known[key] = self._connection.execute(query).scalar_one()
        return self._known[key]


def _winner_key(row: Record) -> _Key:
    return (row.op, row.spec_key, row.variant, row.digest, row.gpu, *(row.shape[name] for name in SHAPE_KEYS))
