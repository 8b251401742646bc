"""Every FLASHGEN_* environment variable, typed, in one place.

Nothing is cached: `read()` looks at the environment when it is called, so tests and long-lived
processes see a change at once. Importing this module touches no disk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from flashgen.errors import InvalidProblemError

OnMiss = Literal["default", "error"]
OnFallback = Literal["warn", "error", "silent"]
Backend = Literal["auto", "gluon", "triton", "torch"]

BACKENDS: tuple[Backend, ...] = ("auto", "gluon", "triton", "torch")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A snapshot of the environment.

    Attributes:
        db: FLASHGEN_DB, a path or an SQLAlchemy URL (SQLite or PostgreSQL); None means the default file.
        cache_dir: FLASHGEN_CACHE_DIR, else platformdirs' cache folder for flashgen.
        on_miss: FLASHGEN_ON_MISS, what a call without a tuned configuration does.
        on_fallback: FLASHGEN_ON_FALLBACK, what a fall to the torch backend on a GPU does.
        backend: FLASHGEN_BACKEND, used where a call says `backend="auto"`.
        log: FLASHGEN_LOG, the level of the `flashgen` logger, or None to leave logging alone.
        require_db_digest: FLASHGEN_REQUIRE_DB_DIGEST, the digest (`flashgen db digest`) that the database must have, or None.
        check_values: FLASHGEN_CHECK_VALUES, whether each call looks at what lies on a GPU before anything runs: every index that a mod
            takes of a captured tensor, O(S^2), and the offsets of packed sequences. For debugging: it synchronises.
        stand_ins: FLASHGEN_STAND_INS, whether other kernels run a first call while its own is compiled.
    """

    db: str | None
    cache_dir: Path
    on_miss: OnMiss
    on_fallback: OnFallback
    backend: Backend
    log: str | None
    require_db_digest: str | None
    check_values: bool = False
    stand_ins: bool = True

    @property
    def database_url(self) -> str:
        """The tuning database as an SQLAlchemy URL."""
        if self.db is not None and "://" in self.db:
            return self.db
        return f"sqlite:///{self.database_path}"

    @property
    def database_path(self) -> Path | None:
        """The database file, or None when FLASHGEN_DB names a server."""
        if self.db is None:
            return self.cache_dir / "tuning.sqlite3"
        if "://" not in self.db:
            return Path(self.db).expanduser().absolute()
        scheme, _, rest = self.db.partition("://")
        if not scheme.startswith("sqlite"):
            return None
        return Path(rest.removeprefix("/")).absolute()


def _choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name) or default
    if value not in allowed:
        raise InvalidProblemError(
            f"{name}={value!r} is not known: allowed are {', '.join(allowed)}. Unset or correct it."
        )
    return value


def _digest(name: str) -> str | None:
    value = os.environ.get(name)
    if value and not re.fullmatch("[0-9a-f]{64}", value):
        raise InvalidProblemError(
            f"{name}={value!r} is no digest: it is the 64 hex digits that `flashgen db digest` prints. Unset or correct it."
        )
    return value or None


def default_cache_dir() -> Path:
    """Platformdirs' cache folder for flashgen (not created)."""
    import platformdirs  # here, so that importing flashgen stays light

    return Path(platformdirs.user_cache_dir("flashgen", appauthor=False))


VARIABLES = (
    "FLASHGEN_DB",
    "FLASHGEN_CACHE_DIR",
    "FLASHGEN_ON_MISS",
    "FLASHGEN_ON_FALLBACK",
    "FLASHGEN_BACKEND",
    "FLASHGEN_LOG",
    "FLASHGEN_REQUIRE_DB_DIGEST",
    "FLASHGEN_CHECK_VALUES",
    "FLASHGEN_STAND_INS",
)


# os.environ decodes at every look-up; the mapping behind it does not. Where there is none, os.environ itself serves.
_RAW = getattr(os.environ, "_data", os.environ)
_ENCODE = getattr(os.environ, "encodekey", str)
_RAW_NAMES = tuple(map(_ENCODE, VARIABLES))


def raw() -> tuple[object, ...]:
    """The undecoded values of all variables: a key for what depends on them, in half a microsecond, for the path of every call."""
    return tuple(map(_RAW.get, _RAW_NAMES))


def read() -> Settings:
    """Read the environment now.

    Raises:
        InvalidProblemError: a variable holds a value that is not allowed.
    """
    cache = os.environ.get("FLASHGEN_CACHE_DIR")
    log = os.environ.get("FLASHGEN_LOG")
    if log:
        log = _choice("FLASHGEN_LOG", LOG_LEVELS, "warning")
    return Settings(
        db=os.environ.get("FLASHGEN_DB") or None,
        cache_dir=Path(cache).expanduser().absolute() if cache else default_cache_dir(),
        on_miss=cast(OnMiss, _choice("FLASHGEN_ON_MISS", ("default", "error"), "default")),
        on_fallback=cast(OnFallback, _choice("FLASHGEN_ON_FALLBACK", ("warn", "error", "silent"), "warn")),
        backend=cast(Backend, _choice("FLASHGEN_BACKEND", BACKENDS, "auto")),
        log=log or None,
        require_db_digest=_digest("FLASHGEN_REQUIRE_DB_DIGEST"),
        check_values=_choice("FLASHGEN_CHECK_VALUES", ("0", "1"), "0") == "1",
        stand_ins=_choice("FLASHGEN_STAND_INS", ("0", "1"), "1") == "1",
    )
