"""Databases that must not be used as they are: the error names the way out, and the file stays as it was, byte for byte."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_support import make as record

from flashgen.errors import DatabaseError, SchemaVersionError
from flashgen.store import migrate, open_store, schema_version


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with open_store(tmp_path / "tuning.sqlite3", write=True) as store:
        store.add([record()])
    return tmp_path / "tuning.sqlite3"


def stamp(path: Path, revision: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE flashgen_alembic_version SET version_num = ?", (revision,))
    connection.close()


def untouched(path: Path, call: Callable[[], object], error: type[Exception], match: str) -> None:
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        call()
    assert path.read_bytes() == before


def both_ways(path: Path, error: type[Exception], match: str) -> None:
    for write in (False, True):
        untouched(path, lambda write=write: open_store(path, write=write).close(), error, match)  # type: ignore[misc]


def test_a_newer_schema_is_left_alone(path: Path) -> None:
    stamp(path, "9999")
    both_ways(path, SchemaVersionError, r"9999.*(?s:.*)[Uu]pgrade flashgen|[Uu]pgrade flashgen")
    untouched(path, lambda: migrate(path), SchemaVersionError, "9999")


def test_an_older_schema_names_the_command_and_migrates_with_a_copy(tmp_path: Path) -> None:
    from flashgen.store import schema
    from flashgen.store.location import locate

    old = tmp_path / "old.sqlite3"
    schema_engine = __import__("sqlalchemy").create_engine(f"sqlite:///{old}")
    with schema_engine.begin() as connection:
        schema.upgrade(connection, "0001")
    schema_engine.dispose()
    assert locate(old).is_sqlite and schema_version(old) == "0001"
    both_ways(old, SchemaVersionError, "flashgen db migrate")
    assert migrate(old) == ("0001", "0002") and schema_version(old) == "0002"
    assert any(copy.name.startswith("old.sqlite3.bak") for copy in tmp_path.iterdir())
    with open_store(old, write=True) as store:
        assert store.add([record()]) == 1


@pytest.mark.parametrize("text", ["not a database", "not a database, and long enough to be a header of one " * 40])
def test_a_corrupt_file_is_left_alone(tmp_path: Path, text: str) -> None:
    corrupt = tmp_path / "corrupt.sqlite3"
    corrupt.write_text(text)
    both_ways(corrupt, DatabaseError, "corrupt.sqlite3")


def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite3"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    untouched(other, lambda: open_store(other).close(), DatabaseError, "other.sqlite3")


def test_a_folder_and_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    for write in (False, True):
        with pytest.raises(DatabaseError, match=str(tmp_path)):
            open_store(tmp_path, write=write).close()
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DatabaseError, match=r"FLASHGEN_DB|file"):
        open_store(blocked / "tuning.sqlite3", write=True).close()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that nobody may write, root included")
def test_a_read_only_place_names_the_way_out() -> None:
    with pytest.raises(DatabaseError, match="FLASHGEN_DB"):
        open_store("/proc/tuning.sqlite3", write=True).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_can_be_read_and_not_written(path: Path) -> None:
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with open_store(path) as store:
            assert len(store.trials()) == 1
        with pytest.raises(DatabaseError, match="FLASHGEN_DB"):
            open_store(path, write=True).close()
    finally:
        path.parent.chmod(0o755)


def test_processes_that_create_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from flashgen.store import open_store; from store_support import make as record\n"
        "time.sleep(max(0.0, float(sys.argv[4]) - time.time()))\n"
        "for number in range(10):\n"
        "    with open_store(sys.argv[2], write=True) as store:\n"
        "        store.add([record(session=f'{sys.argv[3]}-{number}')])\n"
    )
    target = tmp_path / "new.sqlite3"
    start = str(time.time() + 3.0)
    here = str(Path(__file__).parent)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, here, str(target), name, start], stderr=subprocess.PIPE, text=True
        )
        for name in ("a", "b", "c")
    ]
    for process in running:
        _, error = process.communicate(timeout=90)
        assert process.returncode == 0, error
    with open_store(target) as store:
        assert len(store.trials()) == 30 and store.verify() == []


def test_a_killed_writer_leaves_a_readable_file(path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from flashgen.store import open_store; from store_support import make as record\n"
        "store = open_store(sys.argv[2], write=True)\n"
        "store.add([record(session='kept')])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(path)], check=False)
    assert done.returncode == -9
    with open_store(path) as store:
        assert {row.session for row in store.trials()} >= {"kept"} and store.verify() == []
