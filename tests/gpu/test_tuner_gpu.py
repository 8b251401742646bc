"""The tuner on a real card: faults that spoil a CUDA context, how launches are timed, and a whole measured search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import flashgen
from flashgen import KernelConfig, Problem, Target
from flashgen.bench import FLUSH_BYTES, PROTOCOL_GRAPH, PROTOCOL_SEARCH
from flashgen.bench.rounds import EventClock
from flashgen.render import KernelSource
from flashgen.store import open_store
from flashgen.tuner import ProblemResult, measured, providers, shootout, tune
from flashgen.tuner.context import choose_variant, legal_list, source_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# Head dim 60 is no multiple of 8: the portable kernel's on every card. Batch 1 tells the tuned problem from its checked twin.
PROBLEM = Problem.preset("llama3-8b", seqlen=528, head_dim=60, head_dim_v=60, num_heads_q=4, num_heads_kv=2)

# Appended to the rendered file. `FAULTS` maps (BLOCK_N, num_stages) to what goes wrong on the tuned problem.
_FAULTS = """

import os

import torch

FAULTS = {faults!r}
LOG = {log!r}
launches = {{}}
whole = launch


@triton.jit
def stray(pointer):
    tl.store(pointer + (1 << 40), 1.0)


@triton.jit
def spin(pointer):
    value = tl.load(pointer, volatile=True)
    while value == 0:
        value = tl.load(pointer, volatile=True)


def launch(q, k, v, o, lse, *, BLOCK_N, num_stages, **rest):
    tuned, key = q.shape[0] == 1 and q.shape[1] == 528, (BLOCK_N, num_stages)
    if tuned:
        launches[key] = launches.get(key, 0) + 1
        if launches[key] == 1:
            with open(LOG, "a") as file:
                file.write(f"{{os.getpid()}} {{BLOCK_N}} {{num_stages}}\\n")
    fault = FAULTS.get(key) if tuned else None
    if fault == "memory":
        torch.empty(1 << 45, device=q.device)
    whole(q, k, v, o, lse, BLOCK_N=BLOCK_N, num_stages=num_stages, **rest)
    if fault == "illegal":
        stray[(1,)](o)
    elif fault == "hang":
        spin[(1,)](torch.zeros(1, dtype=torch.int32, device=q.device))
    elif fault == "wrong":
        o.mul_(1.01)
    elif fault == "guard":
        torch.as_strided(o, (1,), (1,), o.storage_offset() + o.numel()).fill_(1.0)
    elif fault == "late" and launches[key] >= 4:
        o[0, 0, 0, 0] += 1.0
"""

FAULTS = {
    "illegal": ("crashed", "illegal memory access"),
    "hang": ("timeout", "no answer within"),
    "memory": ("out_of_resources", "out of memory"),
    "wrong": ("wrong_result", "on the tuned problem: "),
    "guard": ("wrong_result", "bytes beside o were written to"),
    "late": ("wrong_result", "left another output than the first"),
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "flashgen"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    flashgen.dispatch.forget()


def tiles(problem: Problem, count: int) -> list[KernelConfig]:
    """Small legal tiles that differ in BLOCK_N or in stages."""
    legal, _ = legal_list(choose_variant(problem, Target.detect()), problem, Target.detect())
    found = {(c.BLOCK_N, c.num_stages): c for c in legal if c.BLOCK_M == 64 and c.num_warps == 4}
    return list(found.values())[:count]


def measure(
    problem: Problem, configs: list[KernelConfig], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> ProblemResult:
    """Tune over these tiles alone."""
    monkeypatch.setattr("flashgen.tuner.run.legal_list", lambda variant, problem, target: (list(configs), ()))
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())
    (row,) = tune(problem, mode="measured", strategy="exhaustive", progress=False, **options).problems
    return row


def test_a_fault_costs_its_candidate_and_where_the_context_is_spoilt_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, configs = tmp_path / "log", tiles(PROBLEM, 2 * len(FAULTS))
    good = [configs[0], *configs[len(FAULTS) + 1 : len(FAULTS) + 3]]
    bad = configs[1 : len(FAULTS) + 1]
    assert len({c.label for c in (*good, *bad)}) == len(FAULTS) + 3
    faults = {(c.BLOCK_N, c.num_stages): name for c, name in zip(bad, FAULTS, strict=True)}
    plain = source_of(choose_variant(PROBLEM, Target.detect()), PROBLEM)
    source = KernelSource(
        text=plain.text + _FAULTS.format(faults=faults, log=str(log)), spec=PROBLEM.spec, variant=plain.variant
    )
    monkeypatch.setattr("flashgen.tuner.run.source_of", lambda variant, problem: source)
    row = measure(PROBLEM, [good[0], *bad, *good[1:]], monkeypatch, trial_timeout_s=20.0)
    found = {(t.config["BLOCK_N"], t.config["num_stages"]): t for t in reversed(row.trials)}
    for key, name in faults.items():
        status, word = FAULTS[name]
        assert (found[key].status, word in (found[key].message or "")) == (status, True), (name, found[key].message)
    assert [found[(c.BLOCK_N, c.num_stages)].status for c in good] == ["ok"] * 3
    assert row.winner is not None and row.winner.config in [c.to_dict() for c in good]
    # New processes after the illegal access, the hang and the write beside a buffer alone.
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 4


@pytest.mark.parametrize(
    "problem",
    [
        Problem.preset(
            "llama3-8b", seqlen=1040, dtype="fp32", head_dim=64, head_dim_v=64, num_heads_q=4, num_heads_kv=2
        ),
        PROBLEM,
        Problem.preset("llama3-8b", seqlen=1024, batch=1),
    ],
    ids=["fp32 d64", "bf16 d60", "bf16 d128"],
)
def test_what_was_compiled_ahead_is_what_is_launched(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One binary a candidate: had a launch asked for another specialisation, Triton would have made a second one."""
    legal, _ = legal_list(choose_variant(problem, Target.detect()), problem, Target.detect())
    decide, binaries = measured.decision.decide, list[int]()

    def counting(*arguments: Any) -> None:
        binaries.append(len(list((tmp_path / "triton").rglob("attention_fwd*.cubin"))))
        decide(*arguments)  # the winner passes all small problems, which are compiled for

    monkeypatch.setattr(measured.decision, "decide", counting)
    row = measure(problem, legal[:3], monkeypatch)
    assert {trial.status for trial in row.trials} == {"ok"} and binaries == [3]


def test_short_kernels_are_timed_in_graphs_and_long_ones_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Problem.preset("llama3-8b", seqlen=256)  # 9 us on an H200
    _, known = legal_list(choose_variant(small, Target.detect()), small, Target.detect())
    short = measure(small, [row.config for row in known[:2]], monkeypatch)
    assert short.winner is not None and short.winner.protocol == shootout.PROTOCOL_GRAPH
    assert {t.protocol for t in short.trials} == {PROTOCOL_GRAPH, shootout.PROTOCOL_GRAPH}
    assert short.winner.latency_ms is not None and short.winner.latency_ms < providers.SHORT_MS
    large = replace(PROBLEM, seqlen_q=4096, seqlen_k=4096, num_heads_q=32, num_heads_kv=8)
    long = measure(large, tiles(PROBLEM, 2), monkeypatch)
    assert {t.protocol for t in long.trials} == {PROTOCOL_SEARCH, shootout.PROTOCOL}
    assert long.winner is not None and (long.winner.latency_ms or 0.0) > providers.SHORT_MS


def test_a_graph_runs_every_launch_each_on_its_own_input() -> None:
    provider = providers.make("cuda")
    inputs = [torch.full((4,), float(i), device="cuda") for i in range(5)]
    seen = torch.zeros(5, device="cuda")
    replay = provider.together([lambda i=i: seen[i].add_(inputs[i][0]) for i in range(5)])  # type: ignore[misc]
    seen.zero_()
    for _ in range(2):
        replay()
    provider.synchronize()
    assert seen.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_the_cache_is_flushed_and_the_flush_is_not_timed() -> None:
    provider = providers.make("cuda")
    data = torch.ones(
        provider.cache_bytes // 8, device="cuda"
    )  # half of what is rotated through: a quarter of it fits the L2 cache
    small = data[: len(data) // 4]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def warm() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # as the timer waits, so that neither times the host
        small.sum()
        start.record()
        small.sum()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))

    cold = median(provider.once(lambda: small.sum()) for _ in range(50))
    hot = median(warm() for _ in range(50))
    flushing = median(provider.once(lambda: flush.zero_()) for _ in range(20))
    nothing = median(provider.once(lambda: None) for _ in range(50))
    assert cold > hot, (cold, hot)
    assert nothing < 0.5 * flushing, (nothing, flushing)


def test_what_the_host_takes_to_launch_is_not_timed() -> None:
    """A launch that takes the host 3 ms, of work that takes the device some microseconds: alone, and among others."""
    data = torch.ones(1024, device="cuda")

    def slow_to_launch() -> None:
        time.sleep(0.003)
        data.add_(1.0)

    provider, clock = providers.make("cuda"), EventClock()
    slow_to_launch()
    assert median(provider.once(slow_to_launch) for _ in range(5)) < 0.5
    assert all(ms < 0.5 for ms in clock.times([slow_to_launch, slow_to_launch, slow_to_launch]))


def test_clocks_and_throttling_are_logged_for_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: nothing tells the clocks")
    state = providers.make("cuda").state()
    assert state is not None, "NVML is installed and does not answer"
    assert 200 < state["sm_mhz"] < 5000 and 0 < state["power_w"] < 2000 and 0 < state["temperature_c"] < 120
    row = measure(PROBLEM, tiles(PROBLEM, 2), monkeypatch)
    assert row.winner is not None and row.winner.facts is not None
    final = row.winner.facts["shootout"]
    assert len(final["states"]) >= final["rounds"] and all(one["sm_mhz"] > 200 for one in final["states"])
    assert row.winner.versions["uuid"] and row.winner.versions["driver"]


def test_a_search_by_the_command_line_reaches_dispatch_and_resumes(tmp_path: Path) -> None:
    database = tmp_path / "own.sqlite3"

    def search(*options: str) -> dict[str, Any]:
        words = [
            "tune",
            "--preset",
            "llama3-8b",
            "--seqlen",
            "1024",
            "--mode",
            "measured",
            "--json",
            "--database",
            str(database),
            *options,
        ]
        done = subprocess.run([sys.executable, "-m", "flashgen", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    first = search("--trials", "6")["problems"][0]
    winner = first["winner"]
    assert winner["status"] == "ok" and winner["latency_ms"] > 0.0 and winner["error_ratio"] <= 1.0
    assert winner["protocol"].startswith("shootout") and sum(first["by_status"].values()) >= 6
    with open_store(str(database)) as store:
        trials = len(store.trials())
    again = search("--trials", "8", "--resume")["problems"][0]
    with open_store(str(database)) as store:
        added = store.trials()[trials:]
    assert (
        again["winner"]["status"] == "ok"
        and len([row for row in added if not row.protocol.startswith("shootout")]) == 2
    )
    os.environ["FLASHGEN_DB"] = str(database)
    try:
        flashgen.dispatch.forget()
        plan = flashgen.dispatch.resolve(Problem.preset("llama3-8b", seqlen=1024), Target.detect())
    finally:
        del os.environ["FLASHGEN_DB"]
    assert (plan.config_source, plan.config.to_dict()) == ("database", again["winner"]["config"])
