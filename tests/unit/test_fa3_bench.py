"""benchmarks/fa3_jax.py with a stand-in for the JAX library, on this CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flashgen.problem import Problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = importlib.import_module("fa3_jax")
    monkeypatch.setattr(found, "LOOP_S", 1e-4)
    monkeypatch.setattr(found, "SETTLE_S", 1e-3)
    return found


def small(fa3: Any, op: str) -> Problem:
    one = next(problem for which, problem in fa3.cells("cpu") if which == op)
    return replace(one, batch=1, seqlen_q=24, seqlen_k=24, num_heads_q=2, num_heads_kv=2, head_dim=16, head_dim_v=16)


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd"])
def test_both_are_judged_and_timed_in_turns(fa3: Any, op: Any) -> None:
    problem = small(fa3, op)
    found = {entry.name: entry for entry in fa3.compare(problem, op, fa3.own).contestants}
    assert {name: entry.status for name, entry in found.items()} == {
        "flashgen": "ok",
        "fa3-jax": "ok",
        "flashgen (A/A)": "ok",
    }
    assert {len(entry.samples) for entry in found.values()} == {fa3.TURNS}
    assert (
        found["fa3-jax"].ratio is not None and found["fa3-jax"].verdict is not None and found["flashgen"].ratio is None
    )
    flops = problem.flops * (1.0 if op == "attention_fwd" else 2.5)
    mine = found["flashgen"]
    assert mine.time is not None and mine.tflops == pytest.approx(flops / mine.time.latency_ms / 1e9)


def test_who_is_wrong_or_missing_is_not_timed(fa3: Any) -> None:
    problem = small(fa3, "attention_fwd")

    def wrong(*arguments: Any) -> tuple[list[Tensor], Callable[[int], float]]:
        results, loop = fa3.own(*arguments)
        return [results[0] * 1.05], loop

    def missing(*arguments: Any) -> Any:
        raise ValueError("head dim 64 was not built")

    for peer, status, said in (
        (wrong, "wrong", "of the error budget"),
        (missing, "failed", "head dim 64 was not built"),
    ):
        found = {entry.name: entry for entry in fa3.compare(problem, "attention_fwd", peer).contestants}
        assert (found["fa3-jax"].status, found["fa3-jax"].samples) == (status, []) and said in found["fa3-jax"].message
        assert found["flashgen"].samples


def test_a_loop_is_scaled_to_the_calls_asked_for(fa3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now = iter([0.0, 3.0])
    monkeypatch.setattr(fa3.time, "perf_counter", lambda: next(now))
    assert fa3._timed(lambda: calls.append(1), 20, 8, lambda: None) == pytest.approx(3.0 * 20 / 24)
    assert len(calls) == 3
