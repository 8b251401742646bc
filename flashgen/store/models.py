"""The tables, once for SQLite and PostgreSQL. Trials are only ever added; "best" is a query (see `select`).

Every name starts with `flashgen_`, the version table included, so that other tools' tables (Optuna's are `trials`,
`studies`, `alembic_version`) can live in the same database.
"""

from __future__ import annotations

import json
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from flashgen.store.records import SHAPE_KEYS, Quality, Record, Status, Tunable, canonical, sha256

VERSION_TABLE = "flashgen_alembic_version"

# SQLite numbers rows by itself only in a column that is exactly INTEGER.
_Id = BigInteger().with_variant(Integer(), "sqlite")
_Sha = String(64)


class Base(DeclarativeBase):
    """Declarative base; constraints are named by rule, so that later migrations can find them on any server."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Kernel(Base):
    """What was compiled: one rendered text of one spec and variant."""

    __tablename__ = "flashgen_kernels"
    __table_args__ = (UniqueConstraint("spec_key", "variant", "digest", "op"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    op: Mapped[str] = mapped_column(String)
    spec_key: Mapped[str] = mapped_column(String)
    variant: Mapped[str] = mapped_column(String)
    digest: Mapped[str] = mapped_column(_Sha)


class Hardware(Base):
    """Where it ran, or is to run: a target with the facts known about it."""

    __tablename__ = "flashgen_targets"
    __table_args__ = (UniqueConstraint("gpu", "arch", "hardware_sha"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    gpu: Mapped[str] = mapped_column(String)
    arch: Mapped[str] = mapped_column(String)
    hardware: Mapped[dict[str, Any]] = mapped_column(JSON)
    hardware_sha: Mapped[str] = mapped_column(_Sha)


class Trial(Base):
    """One trial of one configuration, failures included."""

    __tablename__ = "flashgen_trials"
    __table_args__ = (
        UniqueConstraint("content_sha"),
        Index(None, "kernel_id", "target_id"),
        # Two columns, two kinds of number: a forecast can never be taken for a measurement.
        CheckConstraint("status <> 'predicted' OR latency_ms IS NULL", name="predicted_is_not_timed"),
    )

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    content_sha: Mapped[str] = mapped_column(_Sha)
    kernel_id: Mapped[int] = mapped_column(ForeignKey(Kernel.id))
    target_id: Mapped[int] = mapped_column(ForeignKey(Hardware.id))
    batch: Mapped[int] = mapped_column(BigInteger)
    seqlen_q: Mapped[int] = mapped_column(BigInteger)
    seqlen_k: Mapped[int] = mapped_column(BigInteger)
    num_heads_q: Mapped[int] = mapped_column(BigInteger)
    num_heads_kv: Mapped[int] = mapped_column(BigInteger)
    config: Mapped[str] = mapped_column(Text)
    config_sha: Mapped[str] = mapped_column(_Sha)
    status: Mapped[str] = mapped_column(String)
    latency_ms: Mapped[float | None] = mapped_column(Double)
    latency_p10_ms: Mapped[float | None] = mapped_column(Double)
    latency_p90_ms: Mapped[float | None] = mapped_column(Double)
    max_abs_error: Mapped[float | None] = mapped_column(Double)
    error_ratio: Mapped[float | None] = mapped_column(Double)
    facts: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    rank: Mapped[int | None] = mapped_column(BigInteger)
    bound_by: Mapped[str | None] = mapped_column(Text)
    predicted_ms: Mapped[float | None] = mapped_column(Double)
    model: Mapped[str | None] = mapped_column(Text)
    message: Mapped[str | None] = mapped_column(Text)
    quality: Mapped[str] = mapped_column(String)
    versions: Mapped[dict[str, str]] = mapped_column(JSON)
    protocol: Mapped[str] = mapped_column(Text)
    session: Mapped[str] = mapped_column(String, index=True)
    created: Mapped[str] = mapped_column(String)
    origin: Mapped[str] = mapped_column(String)

    kernel: Mapped[Kernel] = relationship(lazy="joined", innerjoin=True)
    target: Mapped[Hardware] = relationship(lazy="joined", innerjoin=True)


# Columns that hold a record's field under the same name.
PLAIN_COLUMNS = (
    "status",
    "latency_ms",
    "latency_p10_ms",
    "latency_p90_ms",
    "max_abs_error",
    "error_ratio",
    "facts",
    "rank",
    "bound_by",
    "predicted_ms",
    "model",
    "message",
    "quality",
    "versions",
    "protocol",
    "session",
    "created",
    "origin",
)


def kernel_values(record: Record) -> dict[str, Any]:
    """The row of `flashgen_kernels` that a record belongs to."""
    return {"op": record.op, "spec_key": record.spec_key, "variant": record.variant, "digest": record.digest}


def target_values(record: Record) -> dict[str, Any]:
    """The row of `flashgen_targets` that a record belongs to."""
    sha = sha256(canonical(record.target))
    return {"gpu": record.gpu, "arch": record.arch, "hardware": record.target, "hardware_sha": sha}


def trial_values(record: Record) -> dict[str, Any]:
    """The row of `flashgen_trials` that a record is, without its two foreign keys."""
    config = record.config_json
    return {
        "content_sha": record.sha,
        "config": config,
        "config_sha": sha256(config),
        **record.shape,
        **{name: getattr(record, name) for name in PLAIN_COLUMNS},
    }


def to_record(trial: Trial) -> Record:
    """The record that a row holds.

    Raises:
        InvalidProblemError: the row holds values that no record may have.
        ValueError: its config is not JSON.
    """
    plain = {name: getattr(trial, name) for name in PLAIN_COLUMNS if name not in ("status", "quality")}
    return Record(
        op=trial.kernel.op,
        spec_key=trial.kernel.spec_key,
        variant=trial.kernel.variant,
        digest=trial.kernel.digest,
        gpu=trial.target.gpu,
        arch=trial.target.arch,
        target=trial.target.hardware,
        shape={name: getattr(trial, name) for name in SHAPE_KEYS},
        config=cast(dict[str, Tunable], json.loads(trial.config)),
        status=cast(Status, trial.status),
        quality=cast(Quality, trial.quality),
        **plain,
    )
