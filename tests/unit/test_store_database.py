"""The SQL store: what is added comes back, best is a query, damage is found."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from store_support import KERNEL, SHAPE, make, predicted, python

from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.store import Store, open_store
from flashgen.store.models import VERSION_TABLE, Base, Trial
from flashgen.store.records import STATUSES, Record
from flashgen.store.schema import HEAD, REVISIONS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database may be made."""
    return tmp_path / "folder" / "tuning.sqlite3"


def fill(path: Path, *records: Record) -> None:
    with open_store(path, write=True) as store:
        store.add(records)


def execute(path: Path, *statements: str) -> None:
    """Change a file behind the store's back."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


EVERY = [
    make(
        status=status,
        message=f"m\n{status}",
        facts={"n_regs": 255},
        rank=1,
        latency_p10_ms=None,
        target={"a": [1, None]},
    )
    for status in STATUSES
]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_what_is_added_comes_back(path: Path, where: str) -> None:
    with open_store(path if where == "file" else "sqlite://", write=True) as store:
        assert store.add(EVERY) == len(EVERY)
        assert store.trials() == EVERY
        assert store.verify() == []
    if where == "file":
        with open_store(path) as store:
            assert store.trials() == EVERY


def test_a_row_is_added_once(path: Path) -> None:
    with open_store(path, write=True) as store:
        assert store.add([make(), make(), predicted()]) == 2
        assert store.add([make(), replace(make(), origin="colleague")]) == 0
        assert store.add([make(session="s2")]) == 1
        assert store.add([]) == 0
        assert [row.origin for row in store.trials()] == ["local"] * 3
        info = store.info()
        assert (info["trials"], info["kernels"], info["targets"]) == (3, 1, ["h100"])


def test_adding_is_all_or_nothing(path: Path) -> None:
    def rows() -> object:
        yield make()
        raise RuntimeError("the tuner died")

    with open_store(path, write=True) as store:
        with pytest.raises(RuntimeError):
            store.add(rows())  # type: ignore[arg-type]
        assert store.trials() == []


def test_filters(path: Path) -> None:
    other = make(
        op="attention_bwd", spec_key="k2", variant="v2", digest="e" * 64, gpu="a100", arch="sm_80", session="s2"
    )
    failed = make(status="timeout")
    with open_store(path, write=True) as store:
        store.add([make(), other, failed])
        for name in ("op", "spec_key", "variant", "digest", "gpu", "arch", "session"):
            assert store.trials(**{name: getattr(other, name)}) == [other]
            assert store.trials(**{name: "unknown"}) == []
        assert store.trials(status="timeout", gpu="h100") == [failed]


def test_best_is_the_selects_answer(path: Path) -> None:
    fast, slow = make(latency_ms=1.0), make(latency_ms=2.0)
    other_kernel = make(latency_ms=0.1, digest="e" * 64)
    other_gpu = make(latency_ms=0.1, gpu="a100", arch="sm_80")
    guess = predicted(predicted_ms=0.01)
    fill(path, slow, fast, other_kernel, other_gpu, guess)
    with open_store(path) as store:
        assert store.best(*KERNEL, SHAPE, predicted=False) == fast
        assert store.best(*KERNEL, SHAPE | {"batch": 7}, predicted=False) == fast
        assert store.best(*KERNEL, SHAPE, predicted=True) == guess
        assert store.best(*KERNEL[:3], "b200", SHAPE, predicted=False) is None
        with pytest.raises(InvalidProblemError, match="shape lacks"):
            store.best(*KERNEL, {"batch": 1}, predicted=False)


def test_winners_and_info(path: Path) -> None:
    measured = make(latency_ms=1.0)
    long = {"seqlen_q": 8192}
    guess = predicted(shape=long, rank=0)
    fill(
        path, make(latency_ms=2.0), measured, predicted(), guess, predicted(shape=long, rank=1), make(status="crashed")
    )
    with open_store(path) as store:
        assert store.winners() == [measured, guess]  # one a shape, and a measurement hides its prediction
        assert store.winners(gpu="a100") == []
        info = store.info()
    assert info == {
        "path": str(path),
        "schema": HEAD,
        "trials": 6,
        "winners": 2,
        "winners_measured": 1,
        "winners_predicted": 1,
        "by_status": {"crashed": 1, "ok": 2, "predicted": 3},
        "kernels": 1,
        "targets": ["h100"],
        "sessions": 1,
    }


def test_a_new_database_is_empty_but_valid(path: Path) -> None:
    with open_store(path, write=True) as store:
        assert store.info()["trials"] == store.info()["winners"] == 0
        assert store.verify() == []


def test_a_reader_does_not_add(path: Path) -> None:
    fill(path)
    with open_store(path) as store, pytest.raises(DatabaseError, match=r"write=True"):
        store.add([make()])


def test_a_closed_store_says_so(path: Path) -> None:
    store = open_store(path, write=True)
    store.close()
    store.close()
    for use in (store.trials, store.info, store.verify, lambda: store.add([make()])):
        with pytest.raises(DatabaseError, match="is closed"):
            use()


def test_sqlite_is_set_up_for_many_processes(path: Path) -> None:
    fill(path, make())
    with open_store(path, write=True) as store, store._engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "busy_timeout", "foreign_keys")
        }
    assert pragmas["journal_mode"] == "wal"
    assert pragmas["busy_timeout"] >= 5000
    assert pragmas["foreign_keys"] == 1


def test_a_prediction_cannot_get_a_time_even_by_sql(path: Path) -> None:
    fill(path, predicted())
    with pytest.raises(sqlite3.IntegrityError, match="predicted_is_not_timed"):
        execute(path, "UPDATE flashgen_trials SET latency_ms = 1.0")


def test_threads_share_a_store(path: Path) -> None:
    with open_store(path, write=True) as store:
        rows = [[make(session=f"s{thread}", rank=number) for number in range(10)] for thread in range(4)]
        threads = [threading.Thread(target=lambda mine=mine: [store.add([row]) for row in mine]) for mine in rows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.info()["trials"] == 40
        assert store.verify() == []


DAMAGE = {
    "a changed config": (r"trial 1 .*config does not match config_sha", """SET config = '{"BLOCK_M":256}'"""),
    "a config that is no JSON": ("trial 1 .*not a valid record", "SET config = '{'"),
    "a faster time": ("trial 1 .*do not match content_sha", "SET latency_ms = 0.001"),
    "an unknown status": ("trial 1 .*status 'great' is not known", "SET status = 'great'"),
    "facts that are no JSON": ("trial 1: a column that should hold JSON", "SET facts = '{'"),
    "a lost kernel": (
        "foreign keys: row 1 of flashgen_trials refers to a row of flashgen_kernels",
        "SET kernel_id = 99",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds(path: Path, damage: str) -> None:
    message, change = DAMAGE[damage]
    fill(path, make(facts={"n_regs": 1}), make(session="s2"))
    execute(path, "PRAGMA foreign_keys=OFF", f"UPDATE flashgen_trials {change} WHERE id = 1")
    with open_store(path) as store:
        problems = store.verify()
        assert any(re.search(message, problem) for problem in problems), problems
        assert not any("trial 2" in problem for problem in problems)


def test_verify_finds_changed_hardware_facts(path: Path) -> None:
    fill(path, make())
    execute(path, """UPDATE flashgen_targets SET hardware = '{"num_sms": 1}'""")
    with open_store(path) as store:
        first, second = store.verify()
    assert "target 1 (h100): its hardware facts do not match" in first
    assert "content_sha" in second


def test_verify_finds_a_damaged_page(path: Path) -> None:
    fill(path, *(make(rank=number, message="x" * 500) for number in range(50)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(bytes(content))
    with open_store(path) as store:
        assert store.verify()


@pytest.mark.parametrize("change", ["config = '{'", "facts = '{'", "status = 'great'"])
def test_a_damaged_row_is_told_with_the_way_out(path: Path, change: str) -> None:
    fill(path, make(facts={}))
    execute(path, f"UPDATE flashgen_trials SET {change}")
    with open_store(path) as store, pytest.raises(DatabaseError, match="flashgen db verify") as caught:
        store.trials()
    assert str(path) in str(caught.value)


def test_another_tools_tables_live_beside_ours(path: Path) -> None:
    fill(path, make())
    names = ("trials", "studies", "alembic_version")  # Optuna's
    execute(
        path,
        *(f"CREATE TABLE {name} (version_num VARCHAR)" for name in names),
        "INSERT INTO alembic_version VALUES ('v9')",
    )
    with open_store(path, write=True) as store:
        store.add([predicted()])
    with open_store(path) as store:
        assert store.info()["trials"] == 2
    assert all(table.startswith("flashgen_") for table in Base.metadata.tables)


def test_models_and_migrations_agree(path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    import flashgen.store.migrations as migrations

    fill(path)
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        found = sqlalchemy.inspect(connection).get_check_constraints("flashgen_trials")
    engine.dispose()
    assert [check["name"] for check in found] == ["ck_flashgen_trials_predicted_is_not_timed"]
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    chain = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(chain)) == REVISIONS


def test_models_are_legal_on_postgresql() -> None:
    dialect = postgresql.dialect()
    ddl = [str(CreateTable(table).compile(dialect=dialect)) for table in Base.metadata.sorted_tables]
    assert "id BIGSERIAL NOT NULL" in ddl[-1]
    assert "DOUBLE PRECISION" in ddl[-1]
    statement = postgresql.insert(Trial.__table__).values(session="s").on_conflict_do_nothing()
    assert "ON CONFLICT DO NOTHING" in str(statement.compile(dialect=dialect))


def test_alembic_is_for_the_first_write_alone(tmp_path: Path) -> None:
    python(
        "import sys\n"
        "from flashgen.store import open_store\n"
        "path = sys.argv[1]\n"
        "open_store(path, write=True).close()\n"
        "assert 'alembic' in sys.modules\n",
        tmp_path / "db.sqlite3",
    )
    python(
        "import sys\n"
        "from flashgen.store import open_store\n"
        "path = sys.argv[1]\n"
        "with open_store(path) as store: store.info()\n"
        "with open_store(path, write=True) as store: store.info()\n"
        "assert not {'alembic', 'torch', 'triton', 'optuna', 'flashgen.spec'} & set(sys.modules)\n",
        tmp_path / "db.sqlite3",
    )


def test_creating_prints_and_configures_nothing(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    alembic = logging.getLogger("alembic")
    before = (list(root.handlers), root.level, alembic.level, alembic.disabled, list(alembic.handlers))
    fill(path, make())
    assert (list(root.handlers), root.level, alembic.level, alembic.disabled, list(alembic.handlers)) == before
    assert capfd.readouterr() == ("", "")


def test_the_settings_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (str(tmp_path / "a.db"), f"sqlite:///{tmp_path}/b.db"):
        monkeypatch.setenv("FLASHGEN_DB", value)
        with open_store(write=True) as store:
            store.add([make()])
        with open_store() as store:
            assert store.info()["trials"] == 1
    monkeypatch.delenv("FLASHGEN_DB")
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    open_store(write=True).close()
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")) == [
        "a.db",
        "b.db",
        "cache",
    ]
    assert (tmp_path / "cache" / "tuning.sqlite3").is_file()


def test_store_is_exported() -> None:
    with open_store("sqlite://", write=True) as store:
        assert isinstance(store, Store)
