"""benchmarks/portfolio.py on this CPU: a kernel file that misbehaves, the winner's row, and seeds."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cpu_kernel import CPU, PROBLEM, TILES, at, source

from flashgen import Target
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import Record, seeds
from flashgen.tuner.providers import CpuProvider
from flashgen.variants import by_name

ROOT = Path(__file__).resolve().parents[2]
H200 = Target.named("h200")


@pytest.fixture
def portfolio(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("portfolio")


def test_problems_and_candidates_are_legal(portfolio: Any) -> None:
    for name in portfolio.ORDER:
        variant, seen = by_name(name), set()
        for problem in portfolio.problems(variant, H200):
            assert problem.op == variant.op and str(problem) not in seen
            seen.add(str(problem))
            found = portfolio.candidates(variant, problem, H200)
            assert 2 <= len(found) == len(set(found)) <= portfolio.MOST.get(name, 12)
            assert all(variant.illegal(problem.spec, H200, config) is None for config in found)
        assert len(seen) >= 4
    files = portfolio.shards(H200, portfolio.ORDER)
    assert len({(variant.name, problem.spec.key) for variant, problem in files}) == len(files)
    widths = [max(problem.head_dim, problem.head_dim_v) for _, problem in files]
    assert widths == sorted(widths, reverse=True)  # what takes longest is begun first


def test_what_is_measured_already_is_not_compiled(portfolio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("triton_fwd", "gluon_bwd_sm90")
    monkeypatch.setattr(
        portfolio, "shipped", lambda variant, problem, target: variant.name == "triton_fwd" or problem.head_dim != 128
    )
    every, left = (portfolio.shards(H200, names, missing) for missing in (False, True))
    wanted = [(v.name, p.spec.key) for v, p in every if v.name == "gluon_bwd_sm90" and p.head_dim == 128]
    assert wanted and [(v.name, p.spec.key) for v, p in left] == wanted


def test_the_fastest_right_candidate_wins(portfolio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = TILES[:5]
    faults = {at(tiles[0]): "wrong", at(tiles[1]): "nan", at(tiles[2]): "bug", at(tiles[3]): "guard"}
    monkeypatch.setattr(portfolio, "render", lambda spec, variant: source(faults))
    monkeypatch.setattr(portfolio, "candidates", lambda variant, problem, target: tiles)
    monkeypatch.setattr(portfolio, "CHECKED", 5)
    rows = portfolio.measure(by_name("triton_fwd"), PROBLEM, CPU, CpuProvider(), session="s", checked={})
    found = {(row.config["BLOCK_N"], row.config["num_stages"]): row for row in rows}
    statuses = [found[at(tile)].status for tile in tiles]
    assert statuses[1:] == ["wrong_result", "compile_error", "wrong_result", "ok"]
    first = found[at(tiles[0])]  # slower than the winner it is not looked at, faster it is found out
    assert first.status == "wrong_result" or (
        first.error_ratio is None and first.latency_ms > found[at(tiles[4])].latency_ms
    )
    winner = found[at(tiles[4])]
    assert winner.rank == 1 and winner.latency_ms and winner.error_ratio is not None and winner.error_ratio <= 1.0
    assert (
        [row.rank for row in rows].count(1) == 1
        and winner.shape == PROBLEM.shape
        and winner.digest == source(faults).digest
    )


def test_winners_become_seeds_in_place_of_what_was_there(
    portfolio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = seeds.load("h200", "attention_bwd")[0]  # measured or predicted
    assert old.latency_ms != 1.0
    spec = AttentionSpec.from_key(old.spec_key)
    digest = render(spec, by_name(old.variant)).digest
    measured = replace(
        old, status="ok", latency_ms=1.0, digest=digest, error_ratio=0.5, rank=1, model=None, message=None, predicted_ms=None,
        bound_by=None, protocol="events-interleaved-2", session="new",
    )  # fmt: skip
    slower = replace(measured, latency_ms=2.0, rank=None)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{measured.to_json()}\n{slower.to_json()}\n")
    assert portfolio.write_seeds([path], tmp_path / "seeds") == 0
    rows = [Record.from_json(line) for line in (tmp_path / "seeds/h200/attention_bwd.jsonl").read_text().splitlines()]
    same = [row for row in rows if (row.variant, row.spec_key, row.shape) == (old.variant, old.spec_key, old.shape)]
    assert [(row.status, row.latency_ms, row.rank) for row in same] == [("ok", 1.0, None)]
    assert len(rows) == len(seeds.load("h200", "attention_bwd"))
    path.write_text(json.dumps(json.loads(measured.to_json()) | {"digest": "0" * 64}) + "\n")
    assert portfolio.write_seeds([path], tmp_path / "other") == 1
    assert "1 winners are of another text" in capsys.readouterr().err and not (tmp_path / "other").exists()
