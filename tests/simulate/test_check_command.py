"""`flashgen check --simulate` and `--mutate`."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import forward
import pytest

from flashgen import mutation
from flashgen.cli import simulation
from flashgen.cli.main import run
from flashgen.simulator import mutants


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_a_right_kernel_passes_under_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "check", "attention_fwd-bf16-d64-causal-lse", "--simulate", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["ok"] and shown["target"] == "h100"
    assert [row["schedule"] for row in shown["checks"]] == ["eager", "lazy", "random", "priority"]
    assert all(row["ok"] and row["variant"] == "gluon_fwd_sm90" and 0 < row["ratio"] <= 1 for row in shown["checks"])


def test_a_backward_is_simulated_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    key = "attention_bwd-bf16-d64-causal"
    code, out, _ = call(capsys, "check", key, "--simulate", "--json")
    rows = json.loads(out)["checks"]
    assert code == 0 and len(rows) == 4 and all(row["ok"] and row["variant"] == "gluon_bwd_sm90" for row in rows)
    broken(monkeypatch, 'sem="release"', 'sem="relaxed"')
    code, out, _ = call(capsys, "check", key, "--simulate", "--json")
    # The first to come stores where the others add, so that what is not ordered is a race.
    assert code == 1 and {row["kind"] for row in json.loads(out)["checks"]} == {"global-race"}


def test_sums_whose_order_the_schedule_chooses_are_a_defect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each addition knows the one before it, but who comes first is not said: whoever finds the counter as it was."""
    broken(
        monkeypatch,
        'gl.atomic_add(turn, 0, sem="acquire") != n_block',
        'gl.atomic_add(turn, 0, sem="acquire") == n_block',
    )
    # Some schedules leave a thread block waiting for ever; how long it is watched changes nothing here.
    monkeypatch.setattr(simulation, "simulate", partial(simulation.simulate, max_steps=20_000))
    code, out, _ = call(capsys, "check", "attention_bwd-fp16-d128", "--simulate", "--json")
    kinds = [row["kind"] for row in json.loads(out)["checks"]]
    assert code == 1 and "unordered-sum" in kinds


def broken(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Templates that render a broken kernel."""
    from flashgen.render import render

    def spoiled(spec: Any, variant: Any) -> Any:
        source = render(spec, variant)
        assert old in source.text
        return type(source)(text=source.text.replace(old, new), spec=source.spec, variant=source.variant)

    monkeypatch.setattr(simulation, "render", spoiled)


def test_a_defect_is_shown_with_its_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "        fence_async_shared()\n", "")
    code, out, err = call(capsys, "check", "attention_fwd-bf16-d64-lse", "--simulate")
    assert code == 1 and out.count("proxy-fence") == 4
    assert "0 of 4 without a defect" in out
    assert "no fence_async_shared" in err and "tma_store(o_desc" in err and ".store(acc.to(DTYPE))" in err


def test_wrong_numbers_are_a_defect_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "* 0.6931471805599453", "* 0.7")
    code, out, _ = call(capsys, "check", "attention_fwd-bf16-d64-lse", "--simulate", "--json")
    assert code == 1 and {row["kind"] for row in json.loads(out)["checks"]} == {"numbers"}


@pytest.mark.long
def test_mutants_are_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    key = forward.SPECS[0]
    found = mutants(forward.study_of(key).text)
    # A survivor runs every case, 6 s each: the first four of those that were reviewed.
    reviewed = [mutant for mutant in found if mutant.key in forward.REVIEWED[key]][:4]
    sample = [*(mutant for mutant in found if mutant.rule == "drop fence_async_shared"), *reviewed]
    monkeypatch.setattr(mutation, "mutants", lambda text: tuple(sample))
    code, out, _ = call(capsys, "check", key, "--mutate", "--json")
    (row,) = json.loads(out)["mutants"]
    # The fence is found, the reviewed survive: far below the bar. Two of those stand in an arm that a full kernel compiles out.
    assert code == 1 and not row["ok"] and len(sample) >= 4
    assert row["found"] == {"proxy-fence": 1} and row["mutants"] == len(sample)
    assert row["unreached"] == 2 and len(row["survivors"]) == len(sample) - 3
    sample = [mutant for mutant in sample if str(mutant) in row["survivors"]][:1]
    code, out, err = call(capsys, "check", key, "--mutate")
    assert code == 1 and out.count("not found, ") == 1 and "fewer than 98% of the mutants" in err


def test_what_does_not_run_in_the_simulator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "check", "attention_fwd-fp32-d64", "--simulate")
    assert code == 1 and out == "" and "no Gluon kernel computes this" in err and "gluon_fwd_sm90" in err
    code, _, err = call(capsys, "check", "attention_fwd-bf16-d64", "--mutate", "--config", "BLOCK_M=128")
    assert code == 2 and "chooses its own sizes" in err
