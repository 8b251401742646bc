"""Tuning on a local Ray cluster, its actors' workers on the CPU provider; actors and nodes are killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu_kernel import CPU, PROBLEM, TILES, at, use

import flashgen
from flashgen import InvalidProblemError, TuningError
from flashgen.store import open_store
from flashgen.tuner import cluster, tune

ray = pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = pytest.mark.slow

PROBLEMS = [replace(PROBLEM, num_heads_q=heads) for heads in (2, 3, 4)]


@pytest.fixture(scope="module", autouse=True)
def local_cluster() -> Iterator[None]:
    """One cluster for all tests: starting one takes seconds."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=80 << 20
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    flashgen.dispatch.forget()


def go(problems: Any = PROBLEMS, **options: Any) -> flashgen.tuner.TuneResult:
    given = {"strategy": "exhaustive", "progress": False, "workers": 2, "trial_timeout_s": 20.0, **options}
    return tune(problems, target=CPU, provider="cpu", cluster="local", **given)


def by_device(log: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        pid, tile = line.split(" ", 1)
        found.setdefault(pid, []).append(tile)
    return found


def test_units_are_shared_out_and_rows_stream_to_the_one_writer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, seen = tmp_path / "log", []
    use(monkeypatch, TILES[:3], {at(TILES[1]): "bug"}, log)
    result = go(on_event=lambda event: seen.append(event))
    assert [row.problem for row in result.problems] == PROBLEMS
    for row in result.problems:
        # A unit that begins after the fault is known leaves that tile out: it is the same kernel.
        crashed = row.counts().get("crashed", 0)
        assert (
            row.winner is not None
            and crashed + len(row.excluded) == 1
            and set(row.counts()) <= {"ok", "crashed", "censored"}
        )
        assert row.winner in row.trials
    assert sum(row.counts().get("crashed", 0) for row in result.problems) in (1, 2)
    with open_store() as store:
        stored = store.trials()
    assert len(stored) == sum(len(row.trials) for row in result.problems) and {row.session for row in stored} == {
        result.session
    }
    assert len(by_device(log)) == 2 and {event.phase for event in seen} >= {"measuring", "re-timing the best"}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def kill_when(log: Path, killed: list[int], *, count: int) -> threading.Thread:
    """Kill the actors of the first processes that the log names, `count` of them."""

    def watch() -> None:
        seen: set[str] = set()
        deadline = time.monotonic() + 120
        while len(killed) < count and time.monotonic() < deadline:
            time.sleep(0.05)
            for line in log.read_text().splitlines() if log.exists() else []:
                worker = line.split()[0]
                if worker in seen or len(killed) >= count:
                    continue
                seen.add(worker)
                try:
                    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                killed.append(parent)
                os.kill(parent, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_an_actor_that_dies_costs_its_unit_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log, killed = tmp_path / "log", []
    use(monkeypatch, TILES[:3], {at(TILES[0]): 0.7}, log)
    thread = kill_when(log, killed, count=1)
    result = go(PROBLEMS[:2])
    thread.join()
    assert len(killed) == 1 and all(row.winner is not None for row in result.problems)
    assert {trial.status for row in result.problems for trial in row.trials} <= {
        "ok",
        "censored",
    }  # no candidate was blamed


def test_addresses_and_clusters_that_will_not_do() -> None:
    start = time.monotonic()
    for address, kind, match in (
        ("nowhere", InvalidProblemError, "'nowhere' is not host:port"),
        ("ray://head:10001", InvalidProblemError, "is not host:port"),
        ("127.0.0.1:1", TuningError, "no Ray cluster answers at '127.0.0.1:1'"),
    ):
        with pytest.raises(kind, match=match):
            tune(PROBLEM, target=CPU, provider="cpu", cluster=address, progress=False)
    with pytest.raises(InvalidProblemError, match="cluster is for measuring"):
        tune(PROBLEM, target=CPU, mode="predicted", cluster="local", progress=False)
    with pytest.raises(TuningError, match=r"the Ray cluster has no GPU: .*CPU 2"):
        tune(PROBLEM, target=flashgen.Target.named("h100"), cluster="local", progress=False)
    with cluster.join("local", provider="cpu") as joined:
        assert joined.target().name == "cpu"
        with pytest.raises(TuningError, match=r"no GPU of the cluster is h100 .*is cpu"):
            joined.places(flashgen.Target.named("h100"))
    assert time.monotonic() - start < 60
