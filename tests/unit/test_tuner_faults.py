"""Every way a candidate can go wrong, injected for real: a kernel file on CPU tensors, in a real worker process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu_kernel import CPU, PROBLEM, TILES, at, use

import flashgen
from flashgen import Target, TuningError
from flashgen.compile_pool import CompilePool
from flashgen.render import KernelSource
from flashgen.store import Record, open_store, utc_now
from flashgen.tuner import TuneResult, devices, places, tune
from flashgen.tuner.compiled import NoCompiler
from flashgen.tuner.condemned import condemned
from flashgen.tuner.run import _context
from flashgen.tuner.worker import Device, DeviceLostError, MeasuringWorker

# What goes wrong, the status it must get, and a word of its message.
FAULTS: dict[str, tuple[str, str]] = {
    "hang": ("timeout", "no answer within"),
    "kill": ("crashed", "killed by SIGKILL"),
    "sticky": ("crashed", "illegal memory access"),
    "bug": ("crashed", "TypeError: a launch that is simply wrong"),
    "memory": ("out_of_resources", "MemoryError"),
    "nan": ("wrong_result", "holds NaN"),
    "guard": ("wrong_result", "bytes beside o were written to"),
    "input": ("wrong_result", "q is an input and was written to"),
    "wrong": ("wrong_result", "on the tuned problem: "),
    "late": ("wrong_result", "left another output than the first"),
    "once": ("wrong_result", "1 timed launches left another output"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    flashgen.dispatch.forget()


def go(**options: Any) -> TuneResult:
    given = {"strategy": "exhaustive", "progress": False, "trial_timeout_s": 3.0, **options}
    return tune(PROBLEM, target=CPU, mode="measured", provider="cpu", **given)


@pytest.mark.slow
def test_every_fault_is_a_status_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log, tiles = tmp_path / "log", TILES[: len(FAULTS) + 1]
    faults = {at(tile): name for tile, name in zip(tiles, FAULTS, strict=False)}
    use(monkeypatch, tiles, faults, log)
    (row,) = go().problems
    by_config = {(trial.config["BLOCK_N"], trial.config["num_stages"]): trial for trial in row.trials}
    for key, name in faults.items():
        status, word = FAULTS[name]
        assert by_config[key].status == status, (name, by_config[key])
        assert word in (by_config[key].message or ""), (name, by_config[key].message)
        assert by_config[key].latency_ms is None
    assert row.winner is not None and row.winner.config == tiles[-1].to_dict() and row.winner.latency_ms
    # A new process after the hang, the kill, the sticky error, and the writes to memory of others; none for the rest.
    pids = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(set(pids)) == 6 and str(os.getpid()) not in pids
    # None is tried again in a later run, whatever the strategy; `retry_failed` does.
    log.unlink()
    (again,) = go().problems
    assert [tuple(map(int, line.split()[1:])) for line in log.read_text().splitlines()] == [at(tiles[-1])]
    assert len(again.excluded) == len(FAULTS) and all(
        "--retry-failed tries it again" in why for why in again.excluded.values()
    )


def test_what_failed_is_tried_again_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TILES[:3])
    result = TuneResult(problems=[], session="s", mode="measured", target="cpu", database="")

    def begin(**options: Any) -> Any:
        given: dict[str, Any] = {
            "max_trials": None,
            "workers": 1,
            "strategy": "auto",
            "resume": False,
            "expired": lambda: False,
        }
        return _context(PROBLEM, CPU, "measured", store, lambda event: None, result, **{**given, **options})

    with open_store(write=True) as store:
        first = begin()
        first.finish(
            [first.record(TILES[0], "crashed", protocol="p"), first.record(TILES[1], "censored", protocol="p")]
        )
        assert set(begin().condemned) == {TILES[0]} and begin().earlier == {}
        assert begin(retry_failed=True).condemned == {}
        assert set(begin(resume=True).earlier) == {TILES[0], TILES[1]}
        again = begin(resume=True, retry_failed=True)
        assert set(again.earlier) == {TILES[1]} and again.condemned == {}


@pytest.mark.slow
def test_a_compiler_that_dies_or_hangs_costs_its_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TILES[:3])
    deadly = KernelSource(text="import os\nos._exit(7)\n", spec=PROBLEM.spec, variant="triton_fwd")
    endless = KernelSource(text="import time\ntime.sleep(60)\n", spec=PROBLEM.spec, variant="triton_fwd")

    class Compiler(NoCompiler):
        """The real pool for two candidates, with files that kill or stop the compiler."""

        def map(self, source: Any, target: Any, configs: Any, strides: Any = None) -> Any:
            bad = {TILES[0]: deadly, TILES[1]: endless}
            for config in configs:
                if config not in bad:
                    yield config, None
                    continue
                with CompilePool(workers=1, timeout_s=1.0) as pool:
                    yield from pool.map(bad[config], Target.named("h100"), [config], strides)

    monkeypatch.setattr(places, "NoCompiler", Compiler)
    (row,) = go().problems
    found = {trial.config["num_stages"]: trial for trial in row.trials if trial.status != "ok"}
    assert {stages: trial.status for stages, trial in found.items()} == {2: "crashed", 3: "timeout"}
    assert "exit status 7" in str(found[2].message) and row.winner is not None and len(row.excluded) == 2


@pytest.mark.slow
def test_a_device_that_disappears_ends_the_run_and_nobody_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second candidate takes the device with it: no process starts any more."""
    use(monkeypatch, TILES[:4], {at(TILES[1]): "kill"})
    start = MeasuringWorker.start

    def dies_after_the_first(self: MeasuringWorker) -> None:
        if self.starts and (self._process is None or self._process.poll() is not None):
            raise DeviceLostError("the measuring process did not start: no CUDA-capable device is detected.")
        start(self)

    monkeypatch.setattr(MeasuringWorker, "start", dies_after_the_first)
    with pytest.raises(
        TuningError, match=r"device was lost: .*no CUDA-capable device.*1 trials.*--resume goes on"
    ) as caught:
        go()
    assert not isinstance(caught.value, DeviceLostError)
    with open_store() as store:
        assert [row.status for row in store.trials()] == ["ok"]


@pytest.mark.slow
def test_a_worker_of_a_provider_that_is_not_there_says_why() -> None:
    if Target.detect().backend == "cuda":
        pytest.skip("there is a GPU: the worker would start")
    worker = MeasuringWorker(Device(kind="cuda"))
    with pytest.raises(DeviceLostError, match="the measuring process did not start: "):
        worker.ask({"do": "trial"}, 5.0)
    worker.close()


@pytest.mark.slow
def test_two_devices_share_the_problems_and_each_winner_is_one_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    use(monkeypatch, TILES[:3], {}, log)
    problems = [replace(PROBLEM, num_heads_q=2 * heads) for heads in (1, 2, 3, 4)]
    result = tune(
        problems, target=CPU, mode="measured", provider="cpu", workers=2, strategy="exhaustive", progress=False
    )
    assert [row.problem for row in result.problems] == problems and all(row.winner for row in result.problems)
    pids = {line.split()[0] for line in log.read_text().splitlines()}
    assert len(pids) == 2


def test_the_devices_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cards = ["h100", "a100", "h100", "h100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(Target, "detect", lambda device: Target.named(cards[int(device.removeprefix("cuda:"))]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    h100 = Target.named("h100")
    assert (
        [device.visible for device in devices.local(h100, None)]
        == [None]
        == [d.visible for d in devices.local(h100, 1)]
    )
    assert [device.visible for device in devices.local(h100, 8)] == ["0", "2", "3"]
    assert [device.visible for device in devices.local(h100, 2)] == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    chosen = devices.local(h100, 3)
    assert [device.environment["CUDA_VISIBLE_DEVICES"] for device in chosen] == ["7", "5", "4"]


def test_a_unit_that_is_lost_begins_again_elsewhere_at_most_twice() -> None:
    class Flaky:
        def __init__(self, losses: int, lives: int) -> None:
            self.name, self.losses, self.lives, self.runs = "flaky", losses, lives, 0

        def run(self, context: Any) -> None:
            self.runs += 1
            if self.losses:
                self.losses -= 1
                raise DeviceLostError("gone")

        def revive(self) -> bool:
            self.lives -= 1
            return self.lives > 0

        def abort(self) -> None: ...

        def close(self) -> None: ...

    class Unit:
        class result:
            message = ""

    def run(*stations: Flaky) -> None:
        places.spread([PROBLEM], stations, lambda problem: Unit(), stopped=lambda: False)  # type: ignore[arg-type, return-value]

    ok = Flaky(2, 9)
    run(ok)
    assert ok.runs == 3
    hopeless = Flaky(9, 9)
    with pytest.raises(DeviceLostError, match="given up after 3 losses"):
        run(hopeless)
    assert hopeless.runs == 3
    with pytest.raises(DeviceLostError, match="gone"):
        run(Flaky(1, 0))
    pair = (Flaky(1, 0), Flaky(0, 9))
    run(*pair)
    assert pair[1].runs == 1


def test_condemned_counts_where_it_must() -> None:
    tile = TILES[0]

    def row(status: str, **values: Any) -> Record:
        base = {"op": "attention_fwd", "spec_key": PROBLEM.spec.key, "variant": "triton_fwd", "digest": "0" * 64, "gpu": "cpu", "arch": "cpu",
                "shape": PROBLEM.shape, "config": tile.to_dict(), "versions": {"triton": "9"}, "protocol": "p", "session": "s", "created": utc_now()}  # fmt: skip
        return Record(**{**base, "status": status, **values})

    def left_out(*rows: Record) -> bool:
        return tile in condemned(rows, triton="9", shape=PROBLEM.shape, variant="triton_fwd")

    elsewhere = {**PROBLEM.shape, "batch": 7}
    assert all(
        left_out(row(status)) for status in ("crashed", "timeout", "wrong_result", "compile_error", "out_of_resources")
    )
    assert left_out(row("crashed", shape=elsewhere)) and not left_out(row("timeout", shape=elsewhere))
    assert left_out(row("timeout", shape=elsewhere, protocol="compile-only-1"))
    assert not left_out(row("crashed", versions={"triton": "8"})) and not left_out(row("censored"))
    assert not left_out(row("crashed"), row("ok", latency_ms=1.0)) and left_out(
        row("ok", latency_ms=1.0), row("crashed")
    )
    assert left_out(row("crashed"), row("predicted"))
