"""The tuning database: records, the rule that picks the best, shipped rows, and the SQL store.

A leaf: it imports nothing of flashgen but errors, settings and assets. Names load on first use (PEP 562): `records`,
`select` and `seeds` need the standard library alone; `open_store`, `Store`, `migrate` and `schema_version` import
sqlalchemy, and alembic only where a schema is created or migrated.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashgen.store.database import Store, open_store
    from flashgen.store.records import Record, utc_now
    from flashgen.store.schema import migrate, schema_version

__all__ = ["Record", "Store", "migrate", "open_store", "schema_version", "utc_now"]

_HOME = {
    "Record": "records",
    "Store": "database",
    "migrate": "schema",
    "open_store": "database",
    "schema_version": "schema",
    "utc_now": "records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flashgen.store' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"flashgen.store.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
