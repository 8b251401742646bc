"""How a run ends when it is not let finish: Ctrl-C once and twice, a full disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from cpu_kernel import CPU, PROBLEM, TILES, use

import flashgen
from flashgen import DatabaseError, patience
from flashgen.store import Record, database, open_store
from flashgen.tuner import interrupts, tune
from flashgen.tuner.saving import recover
from flashgen.tuner.worker import MeasuringWorker

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    flashgen.dispatch.forget()


def start(log: Path, body: str) -> subprocess.Popen[str]:
    """A run of its own process: the first tile is measured, the second hangs."""
    script = f"""
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]
    import pytest
    from cpu_kernel import *
    from flashgen.tuner import tune
    from flashgen.store import Store
    patch = pytest.MonkeyPatch()
    use(patch, TILES[:3], {{at(TILES[1]): "hang"}}, {str(log)!r})
    """
    call = """
    result = tune(PROBLEM, target=CPU, mode="measured", provider="cpu", strategy="exhaustive", progress=False)
    print(result.interrupted, [trial.status for row in result.problems for trial in row.trials])
    """
    text = textwrap.dedent(script) + textwrap.dedent(body) + textwrap.dedent(call)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log: Path, lines: int, process: subprocess.Popen[str]) -> list[str]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = log.read_text().splitlines() if log.exists() else []
        if len(found) >= lines:
            return found
        time.sleep(0.02)
    raise AssertionError(f"the run did not get so far: {process.communicate()}")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_the_first_ctrl_c_keeps_what_is_measured_and_leaves_no_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(log, "")
    lines = wait_for(log, 2, process)  # the second one hangs now
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "True ['ok']"), err
    assert "interrupted: what is measured is kept" in err and "Traceback" not in err
    assert gone(int(lines[0].split()[0]))
    with open_store() as store:
        assert [row.status for row in store.trials()] == ["ok"] and store.verify() == []


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once_and_nothing_is_corrupt(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Storing the first row takes forever, so that the first Ctrl-C has to wait for it.
    process = start(log, f"""
        import time
        def slow(self, rows):
            open({str(tmp_path / "storing")!r}, "w").write("x")
            time.sleep(600)
        patch.setattr(Store, "add", slow)
    """)  # fmt: skip
    (line, *_) = wait_for(log, 1, process)
    wait_for(tmp_path / "storing", 1, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    began = time.monotonic()
    # At once, of a machine of one's own: what it stands in would take ten minutes.
    _, err = process.communicate(timeout=20 * patience.share())
    assert process.returncode == 130 and time.monotonic() - began < 10 * patience.share()
    assert "interrupted twice: ended at once" in err and gone(int(line.split()[0]))
    with open_store() as store:
        assert store.trials() == [] and store.verify() == []


def test_what_is_being_stored_is_stored_before_ctrl_c_counts() -> None:
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.two_stage():
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                done.append("stored")
            done.append("never")
        assert done == ["stored"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """The database takes so many calls, then its disk is full."""
    add, calls = database._Adder.add, [0]

    def fails(self: Any, records: list[Record]) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise sqlite3.OperationalError("database or disk is full")
        return add(self, records)

    monkeypatch.setattr(database._Adder, "add", fails)
    return calls


def answer(self: MeasuringWorker, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """A worker that needs no process."""
    if request["do"] == "final":
        return {"status": "crashed", "message": "not the point here"}
    return {"status": "ok", "latency_ms": 1.0, "latency_p10_ms": 1.0, "latency_p90_ms": 1.0, "error_ratio": 0.5}


def go() -> flashgen.tuner.TuneResult:
    return tune(PROBLEM, target=CPU, mode="measured", provider="cpu", strategy="exhaustive", progress=False)


def test_a_full_disk_loses_no_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, TILES[:3])
    monkeypatch.setattr(MeasuringWorker, "spawn", lambda self: None)
    monkeypatch.setattr(MeasuringWorker, "ask", answer)
    with monkeypatch.context() as patch:
        full_disk(patch, after=1)
        with pytest.raises(
            DatabaseError, match=r"disk is full.*1 rows that could not be stored are in (\S+): the next `flashgen tune`"
        ):
            go()
    (aside,) = tmp_path.glob("*.unsaved-*.jsonl")
    (line,) = aside.read_text().splitlines()
    assert Record.from_json(line).config == TILES[1].to_dict()
    with open_store() as store:
        assert len(store.trials()) == 1 and store.verify() == []
    go()
    with open_store() as store:
        rows = store.trials()
    assert Record.from_json(line) in rows and not aside.exists() and len({row.session for row in rows}) == 2
    # Where no file can be written either, the rows go to the terminal; where only the database's disk is full, elsewhere.
    with monkeypatch.context() as patch:
        full_disk(patch, after=0)
        open_file = Path.open

        def full(self: Path, *arguments: Any, **options: Any) -> Any:
            if ".unsaved-" in self.name:
                raise OSError(28, "No space left on device")
            return open_file(self, *arguments, **options)

        patch.setattr(Path, "open", full)
        with pytest.raises(DatabaseError, match="are printed above as JSON lines"):
            go()
    printed = [text for text in capfd.readouterr().err.splitlines() if text.startswith("{")]
    assert [Record.from_json(text).config for text in printed] == [TILES[0].to_dict()]


def test_a_damaged_file_of_unsaved_rows_stays_and_harms_nobody(tmp_path: Path) -> None:
    aside = tmp_path / "tuning.sqlite3.unsaved-x.jsonl"
    aside.write_text("{half a li")
    with open_store(write=True) as store:
        assert recover(store, str(tmp_path / "tuning.sqlite3")) == 0
    assert aside.exists()
