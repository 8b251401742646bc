"""What is timed and how: short kernels in graphs on rotated inputs, rounds logged through NVML, the records of a decision."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_kernel import PROBLEM, TILES, at, source

from flashgen import Problem
from flashgen.bench import PROTOCOL_GRAPH, PROTOCOL_SEARCH, Timer, nvml
from flashgen.bench.timing import Wait
from flashgen.store import Record, select
from flashgen.tuner import providers, shootout
from flashgen.tuner.case import Case, guarded, prepare
from flashgen.tuner.context import launch_strides
from flashgen.tuner.final import RoundLog, run_final
from flashgen.tuner.providers import GRAPH_LAUNCHES, CpuProvider
from flashgen.tuner.trial import Contestant, cut, run_trial


class Clock(CpuProvider):
    """A CPU whose launches take what the test says."""

    def __init__(self, ms: float = 1.0, *, short_ms: float = 0.0, cache_bytes: int = 0) -> None:
        self.ms, self.short_ms, self.cache_bytes = ms, short_ms, cache_bytes
        self.graphs: list[int] = []
        self.running = 1

    def once(self, run: providers.Call) -> float:
        self.running = 1
        run()
        return self.ms * self.running

    def together(self, runs: Any) -> providers.Call:
        self.graphs.append(len(runs))
        inner = super().together(runs)

        def replay() -> None:
            self.running = len(runs)
            inner()

        return replay


def case_of(provider: providers.Provider, faults: dict[Any, Any] | None = None) -> Case:
    kernel = source(faults)
    problem = {name: getattr(PROBLEM, name) for name in PROBLEM.__slots__}
    return prepare(
        {"spec": PROBLEM.spec.key, "variant": "triton_fwd", "text": kernel.text, "problem": problem, "key": "k"},
        provider,
    )


def request(*tiles: Any, **more: Any) -> dict[str, Any]:
    if more.get("final"):
        return {"configs": [tile.to_dict() for tile in tiles], "most": 30}
    return {"config": tiles[0].to_dict(), "best_ms": more.get("best_ms")}


def test_a_long_kernel_is_timed_launch_by_launch() -> None:
    provider = Clock(1.0, short_ms=0.02)
    reply = run_trial(case_of(provider), request(TILES[0]))
    assert (reply["status"], reply["protocol"], reply["latency_ms"]) == ("ok", PROTOCOL_SEARCH, 1.0)
    assert 0.0 < reply["error_ratio"] <= 1.0 and provider.graphs == []


def test_a_short_kernel_is_timed_in_graphs_on_inputs_that_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.bench.timing._MOST_SAMPLES", 8)
    provider = Clock(0.005, short_ms=0.02)
    case = case_of(provider)
    size = sum(one.tensor.numel() * one.tensor.element_size() for one in case.inputs.values() if one is not None)
    provider.cache_bytes = 39 * size  # 40 sets outgrow it
    seen: list[int] = []
    launch = case.launch
    case.launch = lambda q, *rest, **keywords: (seen.append(q.data_ptr()), launch(q, *rest, **keywords))[1]  # type: ignore[func-returns-value]
    reply = run_trial(case, request(TILES[0]))
    assert (reply["status"], reply["protocol"]) == ("ok", PROTOCOL_GRAPH) and reply["latency_ms"] == pytest.approx(
        0.005
    )
    assert (
        provider.graphs == [40] and len(set(seen[-41:-1])) == 40
    )  # each on its own copy; the last launch is the check's
    provider.cache_bytes, case.copies = 0, []
    run_trial(case, request(TILES[0]))
    assert provider.graphs[1:] == [GRAPH_LAUNCHES]
    verdict = run_final(case, request(*TILES[:2], final=True))
    assert verdict["status"] == "ok" and verdict["protocol"] == shootout.PROTOCOL_GRAPH
    assert provider.graphs[2:] == [GRAPH_LAUNCHES] * 2 and verdict["samples"][0][0] == pytest.approx(0.005)


def test_a_slow_launch_is_censored_only_when_it_is_slow_again() -> None:
    class Hiccup(Clock):
        calls = 0

        def once(self, run: providers.Call) -> float:
            self.calls += 1
            return super().once(run) * (50.0 if self.calls == 1 else 1.0)

    assert run_trial(case_of(Hiccup()), request(TILES[0], best_ms=0.9))["status"] == "ok"
    slow = run_trial(case_of(Clock(1.0)), request(TILES[0], best_ms=0.3))
    assert slow["status"] == "censored" and "latency_ms" not in slow
    # Below what events can tell nobody is called slow.
    assert run_trial(case_of(Clock(0.015, short_ms=0.02)), request(TILES[0], best_ms=0.002))["status"] == "ok"


@pytest.mark.parametrize(
    ("fault", "at_once"),
    [("nan", True), ("guard", True), ("input", True), ("wrong", False), ("late", False), ("once", False)],
)
def test_the_final_rounds_name_the_finalist_that_fails(fault: str, at_once: bool) -> None:
    case = case_of(Clock(), {at(TILES[1]): fault})
    reply = run_final(case, request(*TILES[:3], final=True))
    assert (reply["status"], reply["index"]) == ("wrong_result", 1)
    assert reply["sticky"] == (fault in ("guard", "input"))


def test_guards_are_seen_on_both_sides_and_tensors_are_aligned() -> None:
    for shape, dtype in (((3, 5), torch.bfloat16), ((1, 2, 2, 16), torch.float32), ((0, 4), torch.float16)):
        one = guarded(shape, dtype, "cpu")
        assert one.tensor.shape == shape and one.tensor.is_contiguous() and one.intact()
        assert one.tensor.data_ptr() % 16 == one.allocation.data_ptr() % 16
        one.tensor.fill_(1.0)
        assert one.intact()
        for place in (0, -1, -4096):
            one.allocation[place] = 0
            assert not one.intact()
            one.allocation[place] = 0xFF


def test_a_contestant_is_told_from_its_first_launch() -> None:
    contestant = Contestant(case_of(Clock()), TILES[0].to_dict())
    contestant.first()
    assert contestant.once() == 1.0 and contestant.check().ok


# -- NVML --


def test_who_wins_has_passed_the_small_problems_too() -> None:
    """Right on the tuned problem and on its twin, wrong on others: a candidate, but no winner."""
    case = case_of(Clock(), {at(TILES[0]): "elsewhere"})
    assert run_trial(case, request(TILES[0]))["status"] == "ok"
    reply = run_final(case, request(*TILES[:2], final=True))
    assert (reply["status"], reply["index"]) == ("wrong_result", 0)
    good = run_final(case, request(TILES[1], TILES[0], final=True))  # a finalist that is wrong there may still lose
    assert good["status"] == "ok" and good["winner"] == 0


class FakeNvml(SimpleNamespace):
    """The few functions that are called; `bits` and `pids` are what the test sets."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(bits=0, pids=[1], uuids=[], gone=False)

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        self.uuids.append(uuid)
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        if self.gone:
            raise self.NVMLError("GPU is lost")
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 650_123

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.bits

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]


def test_the_state_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    watch = nvml.watch("abc")
    assert watch is not None and fake.uuids == [b"GPU-abc"]
    fake.bits, fake.pids = 0x01 | 0x04 | 0x40, [os.getpid(), 7]  # idle is no throttling
    state = watch.read()
    assert state is not None and state.to_json() == {
        "sm_mhz": 1980, "memory_mhz": 2619, "power_w": 650.123, "temperature_c": 61,
        "throttle": ["power cap", "hardware thermal slowdown"], "others": 1,
    }  # fmt: skip
    fake.gone = True
    assert watch.read() is None
    watch.close()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    assert nvml.watch("abc") is None


def test_rounds_in_which_the_throttling_changes_do_not_count() -> None:
    states = [[], [], ["power cap"], ["power cap"], [], []]
    log = RoundLog(iter([{"throttle": throttle, "sm_mhz": 1} for throttle in states]).__next__)
    assert [log(number) for number in range(5)] == [True, False, True, False, True]
    assert log.dropped == 2 and [row["counted"] for row in log.states] == [True, False, True, False, True]
    assert [row["round"] for row in log.states] == list(range(5))


def test_a_card_that_throttles_all_the_time_gives_a_result_of_low_quality() -> None:
    class Unsteady(Clock):
        reads = 0

        def state(self) -> dict[str, Any] | None:
            self.reads += 1
            return {"throttle": ["power cap"] * (self.reads % 2)}

    verdict = run_final(case_of(Unsteady()), request(*TILES[:2], final=True))
    assert verdict["status"] == "ok" and verdict["dropped"] == shootout.LEAST_ROUNDS and verdict["rounds"] >= 30
    assert verdict["quality"] == "low"
    quiet = run_final(case_of(Clock()), request(*TILES[:2], final=True))
    assert (quiet["quality"], quiet["dropped"], quiet["winner"]) == ("high", 0, 0) and quiet["states"] == []


# -- what dispatch makes of it --


def row(session: int, tile: int, ms: float, **values: Any) -> Record:
    base: dict[str, Any] = {
        "op": "attention_fwd", "spec_key": PROBLEM.spec.key, "variant": "triton_fwd", "digest": "0" * 64, "gpu": "h100", "arch": "sm_90",
        "shape": PROBLEM.shape, "config": TILES[tile].to_dict(), "status": "ok", "latency_ms": ms, "error_ratio": 0.5, "versions": {},
        "protocol": shootout.PROTOCOL, "session": f"s{session}", "created": f"2026-01-0{session}T00:00:00+00:00",
    }  # fmt: skip
    return Record(**{**base, **values})


def best(*rows: Record) -> int:
    one, other = (select.best_measured(order, PROBLEM.shape) for order in (rows, rows[::-1]))
    assert one is not None and one == other
    return next(index for index, tile in enumerate(TILES) if tile.to_dict() == one.config)


def test_a_low_quality_row_never_replaces_a_high_one() -> None:
    assert best(row(1, 0, 2.0), row(2, 1, 1.0, quality="low", rank=1)) == 0
    assert best(row(1, 0, 2.0, quality="low"), row(2, 1, 1.0, quality="low")) == 1
    # A search's own times are of low quality: noisy final rounds still go before them.
    search = row(2, 2, 0.5, quality="low", protocol=PROTOCOL_SEARCH)
    assert best(row(2, 1, 1.0, quality="low", rank=1), search) == 1 and best(row(1, 0, 2.0), search) == 0


def test_the_verdict_counts_not_the_median() -> None:
    assert best(row(1, 0, 1.00, rank=1), row(1, 1, 0.99, rank=2)) == 0  # a tie kept the incumbent
    # Its next final rounds, on a slower day: what beat it there is the winner, whatever the clocks say.
    assert best(row(1, 0, 1.00, rank=1), row(2, 0, 1.10, rank=2), row(2, 1, 1.07, rank=1)) == 1
    # A noisy verdict takes nothing from a clean one.
    assert (
        best(row(1, 0, 1.00, rank=1), row(2, 0, 1.10, rank=2, quality="low"), row(2, 1, 0.5, rank=1, quality="low"))
        == 0
    )
    assert best(row(1, 0, 1.00), row(1, 1, 0.99)) == 1  # rows of older protocols have no rank


@pytest.mark.parametrize("seqlen_q", [1, 70, 1535, 1536, 2048, 8192, 8200])
def test_what_a_candidate_is_checked_on_is_compiled_like_the_tuned_problem(seqlen_q: int) -> None:
    for head_dim, heads_kv in ((128, 8), (60, 8), (64, 1)):
        problem = Problem.preset(
            "llama3-8b",
            seqlen=4096,
            head_dim=head_dim,
            head_dim_v=head_dim,
            num_heads_q=4 * heads_kv,
            num_heads_kv=heads_kv,
        )
        problem = replace(problem, seqlen_q=seqlen_q)
        small = cut(problem)
        assert small.spec == problem.spec and small.seqlen_q * small.seqlen_k * small.num_heads_q < 1536**2 * 32 + 1
        assert small.num_heads_q // small.num_heads_kv == 4 and small.batch == 2
        for name in ("seqlen_q", "seqlen_k"):
            was, now = getattr(problem, name), getattr(small, name)
            assert now == was if was < 1536 else (now >= 768 and now % 768 == was % 768)
        strides = (launch_strides(problem), launch_strides(small))
        assert {n: v % 16 for n, v in strides[0].items()} == {n: v % 16 for n, v in strides[1].items()}


def test_a_launch_that_the_host_was_late_with_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, waits = Timer.__new__(Timer), []
    timer._wait = Wait()

    def attempt(self: Timer, run: Any) -> tuple[float, bool]:
        waits.append(self._wait._cycles)
        return 9.0 - len(waits), len(waits) < late

    monkeypatch.setattr(Timer, "_attempt", attempt)
    late = 4
    assert timer.once(lambda: None) == 9.0 - 4 and waits == [waits[0] * 2**i for i in range(4)]
    waits.clear()
    late = 1
    assert (
        timer.once(lambda: None) == 8.0 and len(waits) == 1
    )  # it never gets shorter: the host is as slow the next time
    late = 1000
    waits.clear()
    timer.once(lambda: None)  # a launch that waits for the device itself: it ends all the same
    assert len(waits) < 10
