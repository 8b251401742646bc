"""What the tuner's tests stand in for: the compiler, the accuracy check, the GPU; and the problem that they tune."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import flashgen
from flashgen import KernelConfig, Problem, Target
from flashgen.accuracy import AccuracyReport
from flashgen.facts import CompiledFacts
from flashgen.store import open_store
from flashgen.tuner import predicted, shootout
from flashgen.tuner.context import Context, choose_variant, legal_list
from flashgen.tuner.run import _context

H100, A100 = Target.named("h100"), Target.named("a100")
# Head dim 124, no multiple of 8: the portable kernel's on every GPU.
PROBLEM = Problem.preset("llama3-8b", seqlen=1024, head_dim=124, head_dim_v=124)
VARIANT = choose_variant(PROBLEM, H100)
LEGAL, KNOWN = legal_list(VARIANT, PROBLEM, H100)
FACTS = CompiledFacts(
    arch="sm_90",
    triton_version="0",
    n_regs=128,
    spill_store_bytes=0,
    spill_load_bytes=0,
    stack_bytes=0,
    smem_bytes=100_000,
    num_warps=8,
    serialised=False,
    undefined_registers=0,
    loop={"total": 400, "hgmma": 12, "mufu": 34, "fp32": 136},
    compile_s=0.1,
)
GOOD = AccuracyReport(
    ok=True, max_error=1e-3, mean_error=0.0, max_ratio=0.5, mean_ratio=0.5, lse_error=0.0, lse_ratio=0.0, message="fine"
)


class Compiler:
    """Stands in for the pool: facts by config, as the test says."""

    def __init__(self, facts: Any = None) -> None:
        self.facts = facts or (lambda config: FACTS)
        self.asked: list[KernelConfig] = []

    def __call__(self, workers: int | None = None, **options: Any) -> Compiler:
        return self

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def map(
        self, source: Any, target: Target, configs: Sequence[KernelConfig], strides: Any = None
    ) -> Iterator[tuple[KernelConfig, Any]]:
        for config in configs:
            self.asked.append(config)
            yield config, self.facts(config)


STAND_IN = Compiler()


def isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a database of the test's own, and no shipped rows."""
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    monkeypatch.setattr("flashgen.store.seeds.load", lambda gpu, op: ())
    flashgen.dispatch.forget()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """No compiler and no check: facts and a verdict that are good."""
    made = Compiler()
    monkeypatch.setattr(predicted, "CompilePool", made)
    monkeypatch.setattr(predicted, "_check", lambda context, config: GOOD)
    return made


class Bench:
    """Answers trials by config; records what was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked, self.hello = answer, [], {"driver": "1.2"}
        self.quality, self.winner = "high", -1  # the last finalist

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.asked.append(request)
        if request["do"] == "final":
            count = len(request["configs"])
            return {
                "status": "ok", "protocol": shootout.PROTOCOL, "winner": self.winner % count, "floor": 0.01, "quality": self.quality, "rounds": 3,
                "dropped": 0, "states": [], "twin": [1.0] * 3, "samples": [[1.0 + 0.001 * i] * 3 for i in range(count)],
                "intervals": [None] + [{"middle": 0.0, "low": 0.0, "high": 0.0}] * (count - 1),
            }  # fmt: skip
        return self.answer(request)


def context_for(trials: int, earlier: bool = False) -> tuple[Context, Any]:
    store = open_store(write=True)
    result = flashgen.tuner.TuneResult(problems=[], session="s", mode="measured", target="h100", database="")
    context = _context(
        PROBLEM, H100, "measured", store, lambda event: None, result, max_trials=trials, workers=1, strategy="auto", resume=earlier,
        expired=lambda: False,
    )  # fmt: skip
    return context, store


def timed(request: dict[str, Any]) -> dict[str, Any]:
    ms = request["config"]["BLOCK_M"] / 64 + request["config"]["BLOCK_N"] / 1000
    return {
        "status": "ok",
        "latency_ms": ms,
        "latency_p10_ms": ms,
        "latency_p90_ms": ms,
        "error_ratio": 0.5,
        "max_abs_error": 1e-3,
    }
