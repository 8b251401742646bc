"""`flashgen bench` and the CSV it appends to; the script that runs it on a Hopper GPU, as far as that goes without one."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from flashgen.bench.environment import Environment, cache_bytes, free_bytes, parse_nvidia_smi
from flashgen.cli.main import run
from flashgen.errors import InvalidProblemError
from flashgen.peers import Flashgen, output
from flashgen.peers.compare import compare
from flashgen.problem import Problem

ROOT = Path(__file__).resolve().parents[2]
TINY = ["bench", "--dtype", "fp32", "--head-dim", "16", "--heads-q", "2", "--seqlen", "32", "--rounds", "2"]
NO_FLEX = ["--peers", "sdpa-flash,sdpa-math,sdpa-cudnn,fa3"]


class Tick:
    """A clock that runs the calls and says a tenth of a second for each, so that the warm-up is short."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        return [100.0] * len(calls)


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    monkeypatch.setattr("flashgen.peers.compare.WallClock", Tick)
    monkeypatch.setattr("flashgen.peers.inputs.cache_bytes", lambda device: 1 << 16)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run([*TINY, *NO_FLEX, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "--op", "both", "--backends", "auto,triton", "--json")
    shown = json.loads(out)
    assert code == 0 and err == "" and shown["protocol"] == "side-by-side-2" and not shown["interrupted"]
    assert set(shown["absent"]) == {"sdpa-cudnn", "fa3"} and all(shown["absent"].values())
    assert [one["op"] for one in shown["comparisons"]] == ["attention_fwd", "attention_bwd"]
    one = shown["comparisons"][0]
    by_name = {entry["name"]: entry for entry in one["contestants"]}
    assert list(by_name) == ["flashgen", "flashgen-triton", "sdpa-flash", "sdpa-math", "flashgen (A/A)"]
    assert "interpreter" in by_name["flashgen-triton"]["message"] and by_name["flashgen-triton"]["time"] is None
    assert by_name["sdpa-math"]["ratio"]["median"] == 1.0 and by_name["sdpa-math"]["samples"] == [100.0, 100.0]
    assert one["problem"]["seqlen_q"] == 32 and one["floor"] == 0.005 and one["copies"] > 2
    environment = shown["environment"]
    assert environment["cpu"] and environment["versions"]["torch"] and environment["date"].endswith("+00:00")


def test_the_table_names_everybody(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert code == 0 and "attention_fwd of" in err
    rows = {line.split("\t")[0]: line.split("\t") for line in out.splitlines() if "\t" in line}
    assert rows["sdpa-math"][1:4] == ["100.0000"] * 3 and rows["sdpa-math"][6:10] == ["1.000", "1.000", "1.000", "tied"]
    assert rows["flashgen"][9] == "ok" and "not here: fa3: needs a CUDA device" in out and "torch_blocked" in out


def test_the_csv_grows_and_holds_what_the_json_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    for _ in range(2):
        assert call(capsys, "--csv", str(path))[0] == 0
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(output.COLUMNS) and lines.count(lines[0]) == 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["flashgen", "sdpa-flash", "sdpa-cudnn", "sdpa-math", "fa3", "flashgen (A/A)"]
    assert [row["contestant"] for row in rows] == 2 * names
    assert rows[2]["status"] == "absent" and rows[2]["median_ms"] == "" and rows[2]["message"]
    math = rows[3]
    assert (math["dtype"], math["head_dim"], math["causal"], math["samples"]) == ("fp32", "16", "False", "2")
    assert float(math["median_ms"]) == 100.0 and float(math["ratio_median"]) == 1.0 and math["verdict"] == "tied"
    problem = Problem(
        dtype="fp32", batch=1, seqlen_q=32, seqlen_k=32, num_heads_q=2, num_heads_kv=2, head_dim=16, head_dim_v=16
    )
    assert float(math["tflops"]) == pytest.approx(problem.flops / 0.1 / 1e12, rel=1e-4)
    assert all(row[name] for row in rows for name in ("date", "protocol", "cpu", "torch", "flashgen", "device"))


def test_a_csv_with_another_header_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "old.csv"
    path.write_text("a,b\n1,2\n")
    code, out, err = call(capsys, "--csv", str(path))
    assert code == 2 and out == "" and "another header" in err and "attention_fwd of" not in err
    assert path.read_text() == "a,b\n1,2\n"
    path.write_text(",".join(reversed(output.COLUMNS)) + "\n")
    with pytest.raises(InvalidProblemError, match="their order"):
        output.check_csv(path)
    for bad, why in ((tmp_path / "no" / "x.csv", "does not exist"), (tmp_path, "is a folder")):
        code, _, err = call(capsys, "--csv", str(bad))
        assert code == 2 and why in err


USAGE = [
    (["--peers", "fa9"], "peer 'fa9'"),
    (["--peers", ","], "--peers is empty"),
    (["--backends", "cuda"], "backend 'cuda'"),
    (["--rounds", "0"], "--rounds"),
    (["--op", "attention_decode"], "--op"),
    (["--cuda-graph", "--device", "cpu"], "needs a GPU"),
    (["--preset", "gpt-9"], "preset 'gpt-9'"),
    (["--timeout", "0"], "--timeout"),
]


@pytest.mark.parametrize(("arguments", "why"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and why in err


def test_a_problem_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 2 and "name a problem" in capsys.readouterr().err


def test_the_interpreter_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "--backends", "triton")
    assert code == 1 and out == "" and "interpreter" in err


def interrupting(at: int) -> type[Tick]:
    class Impatient(Tick):
        calls = 0

        def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
            Impatient.calls += 1
            if Impatient.calls == at:
                raise KeyboardInterrupt
            return super().times(calls)

    return Impatient


def test_ctrl_c_keeps_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = interrupting(20)
    monkeypatch.setattr("flashgen.peers.compare.WallClock", clock)
    path = tmp_path / "bench.csv"
    code, out, _ = call(capsys, "--op", "both", "--rounds", "1000", "--csv", str(path), "--json")
    shown = json.loads(out)
    assert code == 130 and shown["interrupted"] and clock.calls == 20
    (one,) = shown["comparisons"]
    assert one["interrupted"] and 0 < len(one["contestants"][0]["samples"]) < 20
    assert len(shown["not_run"]) == 1 and "attention_bwd" in shown["not_run"][0]
    assert "interrupted" in one["notes"][0] and len(path.read_text().splitlines()) == 7


def test_ctrl_c_while_a_peer_is_prepared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, problem: Problem) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashgen.peers.sdpa.SdpaMath.forward", stop)
    code, _, err = call(capsys)
    assert code == 130 and "not run: attention_fwd of" in err and "interrupted" in err


def test_the_timeout_leaves_the_rest_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    now = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    code, out, _ = call(capsys, "--op", "both", "--rounds", "500", "--timeout", "15", "--json")
    shown = json.loads(out)
    assert code == 0 and 0 < len(shown["comparisons"][0]["contestants"][0]["samples"]) < 15
    assert shown["comparisons"][0]["expired"] and "the time was over" in shown["comparisons"][0]["notes"][0]
    assert [text.split()[0] for text in shown["not_run"]] == ["attention_bwd"]


def test_a_wrong_flashgen_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flashgen.peers.own as own

    right = own.attention
    monkeypatch.setattr(own, "attention", lambda *args, **options: right(*args, **options) * 1.01)
    code, out, err = call(capsys)
    rows = {line.split("\t")[0]: line.split("\t") for line in out.splitlines() if "\t" in line}
    assert code == 1 and "error budget" in err and rows["flashgen"][9] == "wrong" and rows["flashgen"][1] == "-"
    assert rows["sdpa-math"][1] == "100.0000" and rows["sdpa-math"][6] == "-" and "flashgen (A/A)" not in rows


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (extra plot)")
def test_the_plot_names_the_contestants(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bench.svg"
    code, _, _ = call(capsys, "--op", "both", "--plot", str(path))
    text = path.read_text()
    assert code == 0 and all(f"<!-- {name} -->" in text for name in ("flashgen", "sdpa-flash", "sdpa-math"))
    # Names stand as comments; the ids between them are random letters.
    assert "(A/A)" not in text and "<!-- fa3" not in text and "side-by-side-2" in text and "backward" in text


def test_a_plot_that_cannot_be_drawn_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "--plot", "figure.gif")
    assert code == 2 and out == "" and "figure.gif" in err and "attention_fwd of" not in err


# -- the machine --


def test_the_environment_names_the_machine() -> None:
    found = Environment.read("cpu")
    assert found.cpu and found.threads >= 1 and found.gpu == found.driver == "" and "python" in found.versions
    assert cache_bytes("cpu") >= 1 << 18 and free_bytes("cpu") > 1 << 20


def test_what_nvidia_smi_says() -> None:
    assert parse_nvidia_smi("580.1, 1980, 512.30, 61\n") == {
        "driver": "580.1",
        "sm_mhz": 1980.0,
        "power_w": 512.3,
        "temperature_c": 61.0,
    }
    assert parse_nvidia_smi("580.1, [N/A], 80, 40") == {"driver": "580.1", "power_w": 80.0, "temperature_c": 40.0}
    assert parse_nvidia_smi("No devices were found") == {}


# -- the whole thing, on real clocks --


@pytest.mark.slow
def test_on_this_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    words = ["--dtype", "fp32", "--head-dim", "64", "--heads-q", "4", "--seqlen", "256", "--batch", "2", "--causal"]
    code = run(["bench", *words, "--rounds", "10", "--peers", "sdpa-flash,sdpa-math", "--json", "--device", "cpu"])
    (one,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert code == 0
    for entry in one["contestants"]:
        assert entry["status"] == "ok" and len(entry["samples"]) == 10
        assert 0.0 < entry["time"]["latency_p10_ms"] <= entry["time"]["latency_ms"] <= entry["time"]["latency_p90_ms"]
    assert {entry["name"] for entry in one["contestants"] if entry["ratio"]} == {
        "sdpa-flash",
        "sdpa-math",
        "flashgen (A/A)",
    }


# -- benchmarks/hopper_forward.py --


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("hopper_forward", monkeypatch)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hopper_script_lists_its_cells(hopper: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert hopper.main(["--dry-run", "--json"], standalone_mode=False) == 0
    cells = [cell["problem"] for cell in json.loads(capsys.readouterr().out)]
    assert len(cells) == 40 == len(set(cells)) and sum("causal" in cell for cell in cells) == 20
    assert sum("d64" in cell for cell in cells) == 10 == sum("heads 16/4" in cell for cell in cells)
    assert cells[0] == "attention_fwd-bf16-d128-causal batch 4 seqlen 4096x4096 heads 16"
    for problem in hopper.cells("cuda"):
        assert problem.batch * problem.seqlen_q == 16384 and problem.num_heads_q * problem.head_dim == 2048


def test_the_hopper_script_goes_on_where_it_stopped(
    hopper: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first, second, *_ = hopper.cells("cuda")
    small = replace(first, batch=1, seqlen_q=8, seqlen_k=8, num_heads_q=1, num_heads_kv=1, device="cpu")
    found = compare(small, "attention_fwd", [Flashgen()], clock=Tick(), rounds=2)
    path, machine = tmp_path / "forward.csv", Environment.read("cpu")
    found.problem = first
    output.append_csv(path, found, machine)
    for entry in found.contestants:
        entry.time = None
    found.problem = second  # as it is written where it could not be timed
    output.append_csv(path, found, machine)
    assert hopper.main(["--dry-run", "--csv", str(path)], standalone_mode=False) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n39 cells\n") and f"{first}:" not in out and f"{second}:" in out


def test_the_hopper_script_needs_a_gpu_to_measure(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(click.ClickException, match="no GPU here"):
        hopper.main([], standalone_mode=False)


def test_flexattention_has_one_tile_a_kernel(hopper: Any, tmp_path: Path) -> None:
    flex = hopper.contestants("auto", "sdpa-flash,flex", tmp_path, None)[-1]
    first, *others = (p for p in hopper.cells("cuda") if p.head_dim == 64 and p.causal)
    assert flex.tile(first) is None and flex.detail(first, "attention_fwd") == "max-autotune-no-cudagraphs"
    flex._file(first).write_text('{"fwd_BLOCK_M": 128, "fwd_num_warps": 8}')
    assert all(flex.tile(p) == {"fwd_BLOCK_M": 128, "fwd_num_warps": 8} for p in (first, *others))
    assert flex.detail(others[0], "attention_fwd") == "BLOCK_M 128, num_warps 8"
    files = {flex._file(p) for p in hopper.cells("cuda")}
    assert len(files) == 8 and files == {
        flex._file(shard[0]) for shard in hopper.side_by_side.shards([*hopper.cells("cuda")])
    }
    names = [peer.name for peer in hopper.contestants("auto", "sdpa-flash", None, tmp_path)]
    assert names == ["flashgen", "sdpa-flash", "fa3"]


# -- benchmarks/hopper_backward.py --


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("hopper_backward", monkeypatch)


def test_the_backward_script_lists_its_cells(backward: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert backward.main(["--dry-run", "--json"], standalone_mode=False) == 0
    cells = [cell["problem"] for cell in json.loads(capsys.readouterr().out)]
    assert len(cells) == 28 == len(set(cells)) and sum("causal" in cell for cell in cells) == 14
    assert all("d192-dv128" in cell for cell in cells[-4:]) and not any("d192" in cell for cell in cells[:-4])
    assert backward.main(["--dry-run", "--lengths", "2048", "--head-dim", "64"], standalone_mode=False) == 0
    assert capsys.readouterr().out.endswith("\n2 cells\n")
    with pytest.raises(click.BadParameter, match="5 is no length of this table"):
        backward.main(["--dry-run", "--lengths", "5"], standalone_mode=False)


def test_a_forward_row_is_no_backward_cell(backward: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = next(iter(backward.cells("cuda")))
    small = replace(first, batch=1, seqlen_q=8, seqlen_k=8, num_heads_q=1, num_heads_kv=1, device="cpu")
    for op, left in (("attention_fwd", 28), ("attention_bwd", 27)):
        found = compare(small, op, [Flashgen()], clock=Tick(), rounds=2)  # type: ignore[arg-type]
        found.problem = first
        output.append_csv(tmp_path / "both.csv", found, Environment.read("cpu"))
        assert backward.main(["--dry-run", "--csv", str(tmp_path / "both.csv")], standalone_mode=False) == 0
        assert capsys.readouterr().out.endswith(f"\n{left} cells\n")


def test_a_shard_is_what_compiles_one_kernel(hopper: Any) -> None:
    cells = list(hopper.cells("cuda"))
    shards = hopper.side_by_side.shards(cells)
    assert len(shards) == 8 and sorted(str(p) for shard in shards for p in shard) == sorted(map(str, cells))
    assert all(len({(p.spec.key, p.num_heads_q // p.num_heads_kv) for p in shard}) == 1 for shard in shards)


def test_cells_are_timed_until_the_budget_is_spent(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On small problems of this CPU, with a clock that says a second a cell."""
    cells = [
        replace(p, batch=1, seqlen_q=n, seqlen_k=n, num_heads_q=1, num_heads_kv=1, device="cpu", dtype="fp32")
        for n, p in enumerate(list(hopper.cells("cuda"))[:3], start=8)
    ]
    now = iter(range(1000))
    shared = hopper.side_by_side
    monkeypatch.setattr(shared, "need_gpu", lambda: None)
    monkeypatch.setattr(shared.time, "monotonic", lambda: float(next(now)))
    machine = Environment.read("cpu")
    monkeypatch.setattr(shared.Environment, "read", classmethod(lambda cls, device: machine))
    real = shared.compare
    monkeypatch.setattr(shared, "compare", lambda p, op, who, **rest: real(p, op, who, clock=Tick(), **rest))
    path = tmp_path / "few.csv"
    options: dict[str, Any] = {"path": path, "rounds": 2}
    assert shared.run(cells, "attention_fwd", [Flashgen()], budget_s=5.0, **options) == 1
    assert "cells left: the budget of 5 s is spent" in capsys.readouterr().err
    left = shared.missing(cells, "attention_fwd", path)
    assert 0 < len(left) < 3
    assert shared.run(left, "attention_fwd", [Flashgen()], budget_s=500.0, **options) == 0
    assert shared.missing(cells, "attention_fwd", path) == []
