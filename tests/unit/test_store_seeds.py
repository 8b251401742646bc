"""Shipped rows: JSON lines that need no database."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_support import make, predicted, python

from flashgen import assets
from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.store import seeds
from flashgen.store.records import Record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty seeds folder in the place of the shipped one."""
    place = tmp_path / "seeds"
    monkeypatch.setattr(assets, "seeds_dir", lambda: place)
    seeds.forget()
    yield place
    seeds.forget()


def test_nothing_shipped_is_no_error(folder: Path) -> None:
    assert seeds.load("h100", "attention_fwd") == ()
    assert seeds.load("../h100", "attention_fwd") == ()
    assert seeds.gpus() == ()


def test_what_is_written_is_loaded(folder: Path) -> None:
    rows = [make(), predicted(), make(gpu="a100", arch="sm_80"), make(op="attention_bwd")]
    paths = seeds.write(folder, rows)
    assert [str(path.relative_to(folder)) for path in paths] == [
        "a100/attention_fwd.jsonl",
        "h100/attention_bwd.jsonl",
        "h100/attention_fwd.jsonl",
    ]
    assert seeds.gpus() == ("a100", "h100")
    assert {row.sha for row in seeds.load("h100", "attention_fwd")} == {rows[0].sha, rows[1].sha}
    assert seeds.load("a100", "attention_fwd") == (rows[2],)


def test_writing_is_a_sorted_union(folder: Path) -> None:
    rows = [make(latency_ms=float(number), shape={"batch": number % 3 + 1}) for number in range(1, 9)]
    (path,) = seeds.write(folder, rows[:5])
    seeds.write(folder, rows[3:] + rows[:1])
    whole = path.read_bytes()
    assert len(whole.splitlines()) == len(rows)
    other = folder / "other"
    (again,) = seeds.write(other, rows[::-1])
    assert again.read_bytes() == whole  # neither order nor history shows
    batches = [Record.from_json(line).shape["batch"] for line in whole.decode().splitlines()]
    assert batches == sorted(batches)


def test_loading_is_remembered_until_written(folder: Path) -> None:
    (path,) = seeds.write(folder, [make()])
    first = seeds.load("h100", "attention_fwd")
    path.write_text("")
    assert seeds.load("h100", "attention_fwd") is first
    seeds.write(folder, [predicted()])
    assert seeds.load("h100", "attention_fwd") == (predicted(),)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken", "not JSON"),
        ("{}", "missing"),
        (make(gpu="a100").to_json(), "wrong file"),
        (make(op="attention_bwd").to_json(), "wrong file"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_corrupt_line_names_file_and_line(folder: Path, line: str | bytes, why: str) -> None:
    (path,) = seeds.write(folder, [make()])
    with path.open("ab") as file:
        file.write(b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=why) as caught:
        seeds.load("h100", "attention_fwd")
    assert str(path) in str(caught.value)
    assert "line 3" in str(caught.value) or isinstance(line, bytes)
    with pytest.raises(DatabaseError, match=why):
        seeds.write(folder, [predicted(), make(gpu="a100")])
    assert path.read_bytes() == before
    assert not (folder / "a100").exists()  # all or nothing


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = seeds.write(folder, [make()])
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DatabaseError, match="disk full"):
        seeds.write(folder, [predicted()])
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_names_cannot_leave_the_folder(folder: Path) -> None:
    with pytest.raises(InvalidProblemError, match="cannot name a seeds file"):
        seeds.write(folder, [make(gpu="../escape")])


def test_shipped_rows_are_readable() -> None:
    seeds.forget()
    for gpu in seeds.gpus():
        for path in (assets.seeds_dir() / gpu).glob("*.jsonl"):
            assert seeds.load(gpu, path.stem)


def test_light_parts_import_no_database_library() -> None:
    python(
        "import sys, flashgen.store, flashgen.store.seeds, flashgen.store.select, flashgen.store.records\n"
        "from flashgen.store import Record, seeds\n"
        "seeds.load('h100', 'attention_fwd')\n"
        "loaded = {'sqlalchemy', 'alembic', 'sqlite3', 'filelock', 'torch', 'triton'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
