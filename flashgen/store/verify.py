"""What `Store.verify` looks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from flashgen.errors import InvalidProblemError
from flashgen.store.models import Hardware, Trial, to_record
from flashgen.store.records import STATUSES, canonical, sha256

_BATCH = 500


def problems_of(session: Session) -> list[str]:
    """Readable problems of a whole database; empty where all is well."""
    problems: list[str] = []
    try:
        if session.get_bind().dialect.name == "sqlite":
            problems += _file_problems(session)
        problems += _target_problems(session)
        problems += _trial_problems(session)
    except SQLAlchemyError as error:
        problems.append(f"reading stopped: {getattr(error, 'orig', None) or error}")
    return problems


def _file_problems(session: Session) -> Iterator[str]:
    for (message,) in session.execute(text("PRAGMA integrity_check")):
        if message != "ok":
            yield f"integrity check: {message}"
    for table, row, parent, _ in session.execute(text("PRAGMA foreign_key_check")):
        yield f"foreign keys: row {row} of {table} refers to a row of {parent} that does not exist"


def _target_problems(session: Session) -> Iterator[str]:
    for number in session.scalars(select(Hardware.id).order_by(Hardware.id)).all():
        try:
            row = session.get_one(Hardware, number)
        except ValueError as error:
            yield f"target {number}: its hardware facts are not JSON ({error})"
            continue
        if sha256(canonical(row.hardware)) != row.hardware_sha:
            yield f"target {number} ({row.gpu}): its hardware facts do not match their digest: changed afterwards"


def _trial_problems(session: Session) -> Iterator[str]:
    numbers = session.scalars(select(Trial.id).order_by(Trial.id)).all()
    for start in range(0, len(numbers), _BATCH):
        batch = numbers[start : start + _BATCH]
        try:
            trials = session.scalars(select(Trial).where(Trial.id.in_(batch)).order_by(Trial.id)).all()
        except ValueError:  # one of them holds no JSON where JSON belongs: find which
            yield from _one_by_one(session, batch)
            continue
        for trial in trials:
            yield from _of_trial(trial)
        session.expunge_all()  # a large database does not have to fit into memory


def _one_by_one(session: Session, numbers: Sequence[int]) -> Iterator[str]:
    for number in numbers:
        try:
            trial = session.scalars(select(Trial).where(Trial.id == number)).one_or_none()
        except ValueError as error:
            yield f"trial {number}: a column that should hold JSON does not ({error})"
            continue
        if trial is not None:  # None: its kernel or target is gone, which the foreign keys have told
            yield from _of_trial(trial)


def _of_trial(trial: Trial) -> Iterator[str]:
    name = f"trial {trial.id} (session {trial.session})"
    if trial.status not in STATUSES:
        yield f"{name}: status {trial.status!r} is not known: allowed are {', '.join(STATUSES)}"
    if sha256(trial.config) != trial.config_sha:
        yield f"{name}: its config does not match config_sha: changed after it was written"
    try:
        record = to_record(trial)
    except (InvalidProblemError, ValueError) as error:
        yield f"{name}: not a valid record: {error}"
        return
    if record.sha != trial.content_sha:
        yield f"{name}: its values do not match content_sha: changed after they were written"
