"""The measuring process comes up while the run's own modules load, is used where it fits, and never outlives the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cpu_kernel import CPU, PROBLEM, TILES, use

from flashgen.errors import InvalidProblemError
from flashgen.tuner import devices, run, tune
from flashgen.tuner.ahead import ahead
from flashgen.tuner.worker import Device, MeasuringWorker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[MeasuringWorker]:
    """Every process that was started, by its worker."""
    found: list[MeasuringWorker] = []
    real = MeasuringWorker.spawn

    def spawn(self: MeasuringWorker) -> None:
        before = self._process
        real(self)
        if self._process is not before:
            found.append(self)

    monkeypatch.setattr(MeasuringWorker, "spawn", spawn)
    return found


def test_it_starts_before_the_store_opens_and_serves_the_run(
    spawned: list[MeasuringWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, TILES[:1])
    order: list[str] = []
    opened = run.open_store

    def open_store(*words: Any, **options: Any) -> Any:
        order.append(f"store after {len(spawned)} processes")
        return opened(*words, **options)

    monkeypatch.setattr(run, "open_store", open_store)
    database = f"sqlite:///{tmp_path / 'db.sqlite3'}"
    result = tune(PROBLEM, target=CPU, mode="measured", provider="cpu", database=database, progress=False)
    assert result.problems[0].winner is not None
    assert order[0] == "store after 1 processes" and len(spawned) == 1
    assert spawned[0]._process is None, "it ends with the run"


def test_it_ends_with_a_run_that_is_refused(spawned: list[MeasuringWorker]) -> None:
    with pytest.raises(InvalidProblemError, match="mode="):
        tune(PROBLEM, target=CPU, mode="thorough", provider="cuda", progress=False)  # type: ignore[arg-type]
    with ahead("measured", None, "cpu") as worker:
        assert worker is not None and worker._process is not None
        process = worker._process
    assert process.poll() is not None


@pytest.mark.parametrize(("mode", "cluster"), [("predicted", None), ("auto", "auto")])
def test_none_starts_where_nothing_is_measured_here(
    spawned: list[MeasuringWorker], mode: str, cluster: str | None
) -> None:
    with mock.patch.object(devices, "has_driver", lambda: True), ahead(mode, cluster) as worker:
        assert worker is None
    with mock.patch.object(devices, "has_driver", lambda: False), ahead("auto", None) as worker:
        assert worker is None
    assert not spawned


def test_a_process_of_another_device_is_not_taken(
    spawned: list[MeasuringWorker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, TILES[:1])
    other = MeasuringWorker(Device(kind="cpu", visible="7"))
    other.spawn()
    try:
        database = f"sqlite:///{tmp_path / 'db.sqlite3'}"
        tune(PROBLEM, target=CPU, mode="measured", provider="cpu", database=database, progress=False, worker=other)
    finally:
        other.close()
    assert [worker.device.visible for worker in spawned] == ["7", None]


def test_the_measuring_process_loads_neither_store_nor_search() -> None:
    code = (
        "import sys, flashgen.tuner.measure_worker; "
        "print(sorted({'sqlalchemy', 'alembic', 'optuna', 'rich', 'click', 'flashgen.tuner.run', 'flashgen.ops', 'flashgen.mods'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
