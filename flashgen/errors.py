"""The exceptions flashgen raises.

FlashgenError
├── InvalidProblemError      the call is wrong (also a ValueError)
├── UnsupportedProblemError  the call is legal, but nothing covers it yet
├── AccuracyError            a kernel's result left the error budget
├── RenderError              a template could not be rendered
├── BuildError               a rendered kernel could not be imported, compiled or run
├── TuningError              no candidate of a tuning run survived
├── MissingExtraError        an optional dependency is not installed
└── DatabaseError            the tuning database cannot be used
    └── SchemaVersionError   its schema is older or newer than this flashgen
"""

from __future__ import annotations

from collections.abc import Mapping


class FlashgenError(Exception):
    """Root of every exception that flashgen raises on purpose."""


class InvalidProblemError(FlashgenError, ValueError):
    """The call itself is wrong: shapes, dtypes, ranges, unknown names."""


class UnsupportedProblemError(FlashgenError):
    """The call is legal, but no variant covers it.

    Attributes:
        reasons: variant name -> why it refused (empty when the whole function is not built yet).
        per_score: of mods without a trace those, by the names that messages use, that are known to be right for 0-d arguments alone.
    """

    per_score: frozenset[str] = frozenset()

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons: dict[str, str] = dict(reasons or {})
        if self.reasons:
            message += "".join(f"\n  {name}: {reason}" for name, reason in self.reasons.items())
        super().__init__(message)


class AccuracyError(FlashgenError):
    """A kernel's result lies outside the error budget of `flashgen.accuracy`."""


class RenderError(FlashgenError):
    """A template could not be rendered."""


class BuildError(FlashgenError):
    """A rendered kernel could not be imported, compiled or run."""


class TuningError(FlashgenError):
    """A tuning run ended without a single usable candidate.

    Attributes:
        causes: candidate -> why it failed.
    """

    def __init__(self, message: str, causes: Mapping[str, str] | None = None) -> None:
        self.causes: dict[str, str] = dict(causes or {})
        if self.causes:
            message += "".join(f"\n  {name}: {cause}" for name, cause in self.causes.items())
        super().__init__(message)


class MissingExtraError(FlashgenError):
    """An optional dependency is not installed; the message says which extra brings it."""


class DatabaseError(FlashgenError):
    """The tuning database cannot be read or written; the message names the way out."""


class SchemaVersionError(DatabaseError):
    """The database's schema is older or newer than this flashgen understands."""
