"""Portfolios: a few configurations per architecture, kernel, dtype and head dim that are good where nothing was tuned.

`tuning_db/portfolios/<arch>/<op>.jsonl`, one member a line, best first. `flashgen.tuner.portfolio` derives them from trials; a call reads
the first member before it falls to a variant's own default. Needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from flashgen import assets
from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.store.records import Tunable, canonical
from flashgen.store.seeds import replace_file

Basis = Literal["measured", "predicted"]

MOST = 12  # members of one portfolio
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_WIDTH = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One configuration of a portfolio.

    Attributes:
        arch: e.g. `sm_90`.
        op, variant: of the kernel.
        dtype: fp16, bf16 or fp32.
        head_dim, head_dim_v: padded to the tile.
        place: 1 for the first.
        config: the tunables alone.
        basis: `measured` where it is within the bound of the best on a measured problem, else `predicted`.
        problems: how many problems it is taken for.
        measured: how many of these were measured; the others are predicted.
        of: how many problems the portfolio was derived from.
        slowdown: its worst time over the best one, on the measured problems it is taken for; None for `predicted`.
        gpus: where those problems were measured, or what they were predicted for where none was.
        sessions: the tuning runs whose trials say so.
    """

    arch: str
    op: str
    variant: str
    dtype: str
    head_dim: int
    head_dim_v: int
    place: int
    config: dict[str, Tunable]
    basis: Basis
    problems: int
    measured: int
    of: int
    slowdown: float | None = None
    gpus: tuple[str, ...]
    sessions: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis):
            raise InvalidProblemError(f"basis {self.basis!r} is not known: allowed are {', '.join(get_args(Basis))}.")
        if {self.slowdown is not None, self.measured > 0} != {self.basis == "measured"}:
            raise InvalidProblemError(
                f"slowdown {self.slowdown!r} and {self.measured!r} measured problems of a {self.basis} member: a measured one has "
                "both, a predicted one neither."
            )
        if not 1 <= self.place <= MOST:
            raise InvalidProblemError(f"place {self.place!r} is out of range: allowed are 1 to {MOST}.")
        object.__setattr__(self, "gpus", tuple(self.gpus))
        object.__setattr__(self, "sessions", tuple(self.sessions))

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What one portfolio is for, within its architecture."""
        return (self.op, self.variant, self.dtype, self.head_dim, self.head_dim_v)

    def to_json(self) -> str:
        """The member as one line of canonical JSON, without the line's end."""
        return canonical({item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def from_json(cls, line: str) -> Member:
        """Read what `to_json` wrote.

        Raises:
            DatabaseError: it is no such line; the message does not know the file.
        """
        try:
            values: Any = json.loads(line)
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise DatabaseError(str(error)) from error


def load(arch: str, op: str) -> tuple[Member, ...]:
    """The shipped members of one architecture and operation, portfolio by portfolio; read once, then remembered.

    Returns:
        The members, or () where none are shipped.

    Raises:
        DatabaseError: the file cannot be read or a line is corrupt; names file and line.
        FlashgenError: flashgen's data folder is missing.
    """
    if not (_PLAIN_NAME.fullmatch(arch) and _PLAIN_NAME.fullmatch(op)):
        return ()
    return _remembered(assets.portfolios_dir() / arch / f"{op}.jsonl")


def forget() -> None:
    """Drop remembered files, after something else changed them."""
    _remembered.cache_clear()


def find(*, arch: str, op: str, variant: str, dtype: str, head_dim: int, head_dim_v: int) -> tuple[Member, ...]:
    """The portfolio of a kernel: of its dtype, else of another dtype as wide (fp16 and bf16 take the same tiles).

    Args:
        arch: of the target.
        op, variant, dtype: of the kernel.
        head_dim, head_dim_v: padded to the tile.

    Returns:
        Its members, best first; () where there is none.

    Raises:
        DatabaseError: as `load`.
    """
    wanted = (op, variant, head_dim, head_dim_v)
    rows = [row for row in load(arch, op) if (row.op, row.variant, row.head_dim, row.head_dim_v) == wanted]
    same = [row for row in rows if row.dtype == dtype]
    as_wide = [row for row in rows if _WIDTH.get(row.dtype) == _WIDTH.get(dtype)]
    first = min((row.dtype for row in as_wide), default=None)
    return tuple(same or [row for row in as_wide if row.dtype == first])


def write(directory: str | os.PathLike[str], members: Iterable[Member]) -> tuple[Path, ...]:
    """Write members to `<directory>/<arch>/<op>.jsonl`: portfolios that are given replace those of their key, others stay.

    Args:
        directory: created where missing, e.g. `tuning_db/portfolios`.
        members: whole portfolios.

    Returns:
        The files that hold them, sorted.

    Raises:
        DatabaseError: a file there is corrupt (it is left as it is), or cannot be written.
        InvalidProblemError: an architecture or op cannot be a file name.
    """
    groups: dict[Path, list[Member]] = {}
    for row in members:
        for name in (row.arch, row.op):
            if not _PLAIN_NAME.fullmatch(name):
                raise InvalidProblemError(
                    f"{name!r} cannot name a portfolio's file: letters, digits, '_', '-' and '.' only."
                )
        groups.setdefault(Path(directory) / row.arch / f"{row.op}.jsonl", []).append(row)
    texts = {}
    for path, rows in groups.items():
        keys = {row.key for row in rows}
        kept = [row for row in _parse(path) if row.key not in keys]
        lines = [row.to_json() for row in sorted([*kept, *rows], key=lambda row: (row.key, row.place))]
        texts[path] = "".join(f"{line}\n" for line in lines)
    for path, text in texts.items():
        replace_file(path, text)
    forget()
    return tuple(sorted(texts))


@lru_cache(maxsize=256)
def _remembered(path: Path) -> tuple[Member, ...]:
    return _parse(path)


def _parse(path: Path) -> tuple[Member, ...]:
    way_out = f"Correct or remove it; reinstall flashgen if {path.name} was shipped with it."
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DatabaseError(f"{path} cannot be read: {error}. {way_out}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(Member.from_json(line))
        except DatabaseError as error:
            raise DatabaseError(f"{path}, line {number} is not a portfolio's member: {error}. {way_out}") from error
    return tuple(rows)
