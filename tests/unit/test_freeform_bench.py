"""benchmarks/hopper_freeform.py: its kinds, judges and cells, on this CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor

from flashgen.bench.environment import Environment
from flashgen.errors import UnsupportedProblemError
from flashgen.peers.compare import TWIN, compare
from flashgen.peers.inputs import Inputs
from flashgen.problem import Problem

ROOT = Path(__file__).resolve().parents[2]
OPS = ("attention_fwd", "attention_bwd")
SMALL = Problem(
    dtype="fp32", batch=2, seqlen_q=160, seqlen_k=160, num_heads_q=2, num_heads_kv=2, head_dim=16, head_dim_v=16
)
KINDS = ("causal", "window", "prefix", "documents", "alibi", "softcap", "tree", "neighbourhood")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("hopper_freeform")
    for name, value in {"WINDOW": 37, "PREFIX": 21, "REACH": 2, "CAP": 0.5}.items():
        monkeypatch.setattr(found.freeform, name, value)
    capped = replace(found.freeform.KINDS["softcap"], options=lambda h, d: {"causal": True, "softcap": 0.5}, cap=0.5)
    windowed = replace(found.freeform.KINDS["window"], options=lambda h, d: {"causal": True, "window_size": (36, 0)})
    monkeypatch.setitem(found.freeform.KINDS, "softcap", capped)
    monkeypatch.setitem(found.freeform.KINDS, "window", windowed)
    for name in ("counted", "documents", "document_lengths", "subtree_ends"):
        getattr(found.freeform, name).cache_clear()
    counted = found.freeform.counted
    yield found
    counted.cache_clear()


class Tick:
    """A clock that runs the calls and says 100 milliseconds for each."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        return [100.0] * len(calls)


def timer(problem: Problem, op: Any, peers: Any, **options: Any) -> Any:
    small = replace(SMALL, head_dim=problem.head_dim // 4, head_dim_v=problem.head_dim // 4)
    inputs = Inputs(small, op, cache=1000, memory=1 << 22)
    return compare(small, op, peers, clock=Tick(), inputs=inputs, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", KINDS)
def test_flashgen_is_right_and_another_kind_is_wrong(script: Any, name: str, op: Any) -> None:
    freeform = script.freeform
    kind, other = freeform.KINDS[name], freeform.KINDS["causal" if name != "causal" else "window"]
    wrong = freeform.Own(other, name="wrong")
    wrong.kind, wrong.computes = kind, name
    wrong.options = lambda problem: freeform.Own(other).options(problem)
    found = timer(SMALL, op, [freeform.Own(kind), wrong, freeform.Own(other, name="its own")], rounds=2)
    assert {e.name: e.status for e in found.contestants} == {
        "flashgen": "ok",
        "wrong": "wrong",
        "its own": "ok",
        TWIN: "ok",
    }


@pytest.mark.parametrize("name", KINDS)
def test_pairs_are_counted(script: Any, name: str) -> None:
    freeform, n = script.freeform, 256
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    seen = freeform.KINDS[name].visible(n, "cpu")(i, j)
    tiles = seen.view(2, 128, 2, 128).any(3).any(1)
    assert freeform.counted(name, n) == (int(seen.sum()), 128 * 128 * int(tiles.sum()))
    assert seen.diagonal().all(), "KindJudge takes every row to see a key"
    if name in ("documents", "tree", "neighbourhood", "window"):
        assert 0 < seen.sum() < n * (n + 1) // 2 and not seen.all(1).any()


def test_documents_and_trees_have_their_shape(script: Any) -> None:
    for n in script.LENGTHS:
        lengths = script.freeform.document_lengths(n)
        assert sum(lengths) == n and max(lengths) <= n // 4 and len(lengths) >= 6 and max(lengths) > 8 * min(lengths)
        ends, at = script.freeform.subtree_ends(n, "cpu"), torch.arange(n)
        assert (ends[: n // 2] == n).all() and (ends > at).all() and ends[n // 2] == n
        assert (ends[n // 2 :] == at[n // 2 :] + 1).sum() >= n // 8, "many nodes of such a tree are leaves"


def test_the_script_lists_its_cells_and_goes_on_where_it_stopped(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = list(script.cells("cpu"))
    assert len(todo) == 128 == len({script.key_of(cell) for cell in todo}) and len(script.shards(todo)) == 16
    path, machine = tmp_path / "freeform.csv", Environment.read("cpu")
    some = [cell for cell in todo if cell[0] in ("window", "tree") and cell[2].seqlen_q == 2048]
    options: dict[str, Any] = {"path": path, "rounds": 2, "timer": timer, "environment": machine}
    counted = script.freeform.counted
    script.freeform.counted = lambda name, length: counted(name, 256)
    try:
        assert script.run(some[:3], ("flashgen", "plain-causal"), {}, budget_s=500.0, **options) == 0
    finally:
        script.freeform.counted = counted
    rows = script.read_csv(path, script.OWN_COLUMNS)
    assert {row["contestant"] for row in rows} == {"flashgen", "flashgen plain causal", TWIN} and len(rows) == 9
    for row in rows:
        pairs = counted("causal" if "plain" in row["contestant"] else row["kind"], 256)
        assert (int(row["visible_pairs"]), int(row["touched_pairs"])) == pairs
        if row["contestant"] == "flashgen":  # all take 100 ms, so that the speed is the work alone
            assert float(row["speed_of_plain_causal"]) == pytest.approx(pairs[0] / counted("causal", 256)[0], rel=1e-4)
            assert float(row["tile_speed_of_plain_causal"]) == pytest.approx(
                pairs[1] / counted("causal", 256)[1], rel=1e-4
            )
    for row in rows:  # as if they had been of the sizes that were asked for
        cell = some[rows.index(row) // 3]
        row |= {"seqlen_q": str(cell[2].seqlen_q), "head_dim": str(cell[2].head_dim)}
    path.unlink()
    script.append_rows(path, rows, script.OWN_COLUMNS)
    assert script.missing(some, path) == some[3:]
    capsys.readouterr()


def test_the_budget_ends_a_run(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(script.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(script.freeform, "counted", lambda name, length: (1, 1))
    some = [cell for cell in script.cells("cpu") if cell[0] == "causal"][:4]
    options: dict[str, Any] = {"path": None, "rounds": 2, "timer": timer, "environment": Environment.read("cpu")}
    assert script.run(some, ("flashgen",), {}, budget_s=4.0, **options) == 1
    assert "cells left: the budget of 4 s is spent" in capsys.readouterr().err


def test_what_no_kernel_takes_is_a_row(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(*arguments: Any, **options: Any) -> Any:
        raise UnsupportedProblemError("nobody takes it")

    cell, path = next(script.cells("cpu")), tmp_path / "freeform.csv"
    options: dict[str, Any] = {"path": path, "rounds": 2, "environment": Environment.read("cpu")}
    assert script.run([cell], ("flashgen",), {}, budget_s=9.0, timer=refuses, **options) == 0
    (row,) = script.read_csv(path, script.OWN_COLUMNS)
    assert (row["status"], row["message"], row["median_ms"]) == ("unsupported", "nobody takes it", "")
    assert script.missing([cell], path) == []
    assert "nobody takes it" in capsys.readouterr().out


def test_the_winning_tiles_become_kernel_options(script: Any, tmp_path: Path) -> None:
    log = [
        {"kernel_type": "forward", "choices": [{"time": 1, "type": "triton", "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "USE_TMA": False}, {"time": 2, "BLOCK_M": 64}]},
        {"kernel_type": "backward", "choices": [{"time": 1, "BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64, "num_warps": 8, "num_stages": 3}]},
    ]  # fmt: skip
    options = script.options_of(log)
    assert options["fwd_BLOCK_M"] == 128 and options["bwd_BLOCK_N1"] == 128 and options["fwd_num_warps"] == 8
    assert set(options) == {"fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages", "fwd_USE_TMA", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_warps", "bwd_num_stages"}  # fmt: skip
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"kernel_options": {"64": options}}))
    tiles = script.read_tiles(path)
    flex = script.freeform.FlexKind(script.freeform.KINDS["causal"], tiles)
    assert (
        flex.detail(replace(SMALL, head_dim=64), "attention_fwd")
        == "BLOCK_M 128, BLOCK_N 64, num_warps 8, num_stages 3, USE_TMA False"
    )
    assert flex.detail(replace(SMALL, head_dim=128), "attention_bwd") == "max-autotune-no-cudagraphs"
    assert script.read_tiles(None) == {}


def test_a_choice_is_read_from_its_description(script: Any) -> None:
    class Choice:
        def __init__(self, description: str) -> None:
            self.description = description

    fast, slow = (
        Choice("BLOCK_M1=32, BLOCK_N1=64, SM_SCALE=0.125, USE_TMA=False, num_stages=3, num_warps=4"),
        Choice("BLOCK_M1=16"),
    )
    found = script.choice_of({slow: 2.0, fast: 1.0}, "flex_attention_backward")
    assert script.options_of([found]) == {
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_USE_TMA": False, "bwd_num_stages": 3, "bwd_num_warps": 4,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_gets_the_same_function(script: Any) -> None:
    """Eager FlexAttention with the mods that the compiled one gets, against the judge; its layout is heads first."""
    from torch.nn.attention.flex_attention import flex_attention

    freeform = script.freeform
    inputs = Inputs(SMALL, "attention_fwd", cache=1000, memory=1 << 22)
    t = inputs.of("bhsd")[0]
    for kind in freeform.KINDS.values():
        keep, score = freeform.mask_mod(kind, 160, "cpu"), freeform.score_mod(kind, 2, "cpu")
        i, j = torch.arange(160)[:, None], torch.arange(160)[None, :]
        seen = keep(0, 0, i, j)

        def both(s: Tensor, b: Any, h: Any, q: Any, k: Any, score: Any = score, seen: Tensor = seen) -> Tensor:
            s = s if score is None else score(s, b, h, q, k)
            return torch.where(seen[q, k], s, -torch.inf)

        out = flex_attention(t.q, t.k, t.v, score_mod=both)
        judge = freeform.FlexKind(kind, {}).judge(SMALL, "attention_fwd", inputs.of("bshd")[0])
        assert judge.judge(out, "bhsd", slack=1.0)[0] == "ok", kind.name


def test_bad_words(script: Any) -> None:
    for words, said in (
        (["--kinds", "causal,star"], "--kinds: 'star' is not known: allowed are causal, window"),
        (["--contestants", "fa9"], "--contestants: 'fa9' is not known"),
        (["--lengths", "1000"], "--lengths: '1000' is not known"),
    ):
        with pytest.raises(click.BadParameter, match=said):
            script.main([*words, "--dry-run"], standalone_mode=False)
