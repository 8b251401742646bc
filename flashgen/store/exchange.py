"""Rows on their way between databases: the file that `flashgen db export` writes, and the digest of a set of rows.

A file is JSON lines: a header that counts its rows and holds their digest, then one record a line. A seeds file has the same
lines without a header, and is read too. Needs the standard library alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from flashgen.errors import DatabaseError
from flashgen.store.records import Record, canonical, sha256
from flashgen.store.seeds import replace_file

LOCAL = "local"
FORMAT = 1
_MARK = "flashgen_trials"


def digest_of(rows: Iterable[tuple[str, str]]) -> str:
    """Digest of a set of rows: equal where the same calls get the same configurations from them.

    Whether a row is local is part of it, since a local row goes before an imported one of equal quality.

    Args:
        rows: (content digest, origin) of each row, in any order.

    Returns:
        64 hex digits.
    """
    lines = sorted(f"{sha} {LOCAL if origin == LOCAL else 'imported'}" for sha, origin in rows)
    return sha256("\n".join(lines))


NO_ROWS = digest_of(())


def write_file(path: str | os.PathLike[str], records: Iterable[Record]) -> str:
    """Write an exchange file, as a whole or not at all.

    Returns:
        The digest of its rows.

    Raises:
        DatabaseError: it cannot be written.
    """
    rows = sorted(records, key=lambda row: (row.gpu, row.op, row.spec_key, row.created, row.sha))
    digest = digest_of((row.sha, row.origin) for row in rows)
    header = canonical({_MARK: FORMAT, "rows": len(rows), "digest": digest})
    replace_file(Path(path), "".join(f"{line}\n" for line in (header, *(row.to_json() for row in rows))))
    return digest


def read_file(path: str | os.PathLike[str]) -> list[Record]:
    """The rows of an exchange file or a seeds file.

    Raises:
        DatabaseError: it cannot be read, a line is no record, or what is there is not what its header says.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would split inside texts, too
    except (OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"{path} cannot be read: {error}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    header = _header(numbered[0][1]) if numbered else None
    rows = []
    for number, line in numbered[1:] if header is not None else numbered:
        try:
            rows.append(Record.from_json(line))
        except DatabaseError as error:
            raise DatabaseError(f"{path}, line {number} is not a tuning record: {error}. Nothing was taken.") from error
    if header is not None:
        _check(path, header, rows)
    return rows


def adopted(record: Record, origin: str) -> Record:
    """A record as it enters another database: one that was local elsewhere came from `origin`."""
    return replace(record, origin=origin) if record.origin == LOCAL else record


def _header(line: str) -> dict[str, object] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None  # the reader of records says what is wrong with the line
    return values if isinstance(values, dict) and _MARK in values else None


def _check(path: str | os.PathLike[str], header: dict[str, object], rows: list[Record]) -> None:
    if header[_MARK] != FORMAT:
        raise DatabaseError(
            f"{path} has format {header[_MARK]!r}, this flashgen reads {FORMAT}: upgrade flashgen. Nothing was taken."
        )
    found = (len(rows), digest_of((row.sha, row.origin) for row in rows))
    if found != (header.get("rows"), header.get("digest")):
        raise DatabaseError(
            f"{path} holds {found[0]} rows with digest {found[1][:8]}, its header says {header.get('rows')} with "
            f"{str(header.get('digest'))[:8]}: it was cut off or changed. Export it again. Nothing was taken."
        )
