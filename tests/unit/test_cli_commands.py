"""The command line: exit codes, one JSON document, no traceback, and what each command does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashgen.cli.main import run

# No measured rows are shipped for the L40S: they would go before a prediction. The Hopper kernel, whose compilation takes longer, is tuned in `test_tuner_run`.
FAST = ["--trials", "1", "--target", "l40s", "--dtype", "bf16", "--head-dim", "64", "--heads-q", "2", "--seqlen", "64"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code, out, _ = call(capsys, *arguments, "--json")
    return code, json.loads(out)


USAGE = [
    (["tune", "--preset", "gpt-9", "--target", "h100"], "preset 'gpt-9'"),
    (["tune", "--preset", "llama3-8b", "--target", "tpu"], "target 'tpu'"),
    (["tune", "--target", "h100"], "name a problem"),
    (["tune", "--trials", "0", "--preset", "llama3-8b"], "--trials"),
    (["tune", "--strategy", "best"], "--strategy"),
    (["tune", "--nonsense"], "No such option"),
    (["render", "nonsense"], "'nonsense' is not a spec key"),
    (["render", "attention_fwd-bf16-d64", "--variant", "x"], "variant 'x'"),
    (["render", "attention_fwd-bf16-d64", "--config", "BLOCK_M"], "BLOCK_M"),
    (
        [
            "render",
            "attention_fwd-bf16-d128",
            "--target",
            "a100",
            "--config",
            "BLOCK_M=128,BLOCK_N=128,num_warps=8,num_stages=5",
        ],
        "not legal",
    ),
    (["show", "plan", "--preset", "llama3-8b", "--backend", "cuda"], "--backend"),
    (["show", "plan", "--preset", "llama3-8b", "--target", "x"], "target 'x'"),
    (["export", "attention_fwd-bf16-d64", "-o", "nowhere/x.py"], "does not exist"),
    (["export", "attention_fwd-bf16-d64", "-o", "kernel.txt"], "kernel.txt"),
    (["export", "attention_fwd-bf16-d64", "--format", "zip", "-o", "x.py"], "--format"),
    (["bench"], "name a problem"),
    (["tune", "--preset", "llama3-8b", "--target", "h100", "--cluster", "nowhere"], "'nowhere' is not host:port"),
    (["tune", "--preset", "llama3-8b", "--target", "h100", "--strategy", "best"], "'best' is not one of"),
    (["tune", "--preset", "llama3-8b", "--target", "h100", "--timeout", "nan"], "timeout_s=nan must be positive"),
    (["tune", "--preset", "llama3-8b", "--target", "h100", "--timeout", "0"], "--timeout"),
    (["tune", "--preset", "llama3-8b", "--target", "h100", "--trials", "0"], "--trials"),
    (["nonsense"], "No such command"),
]
UNBUILT = [
    ["tune", "--op", "attention_decode", "--target", "h100"],
    ["export", "attention_fwd-bf16-d64", "--format", "aot", "-o", "x.py"],
    ["export", "attention_fwd-bf16-d64", "--format", "hf-kernels", "-o", "x"],
    ["render", "attention_fwd-bf16-d64-paged"],
]


@pytest.mark.parametrize(("arguments", "said"), USAGE, ids=[" ".join(row[0])[:60] for row in USAGE])
def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and said in err and "Traceback" not in err
    code, shown = document(capsys, *arguments)
    assert code == 2 and said in shown["error"]["message"]


@pytest.mark.parametrize("arguments", UNBUILT, ids=" ".join)
def test_what_is_not_built_is_1_and_says_so(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 1 and out == "" and ("not supported" in err or "not covered" in err)
    code, shown = document(capsys, *arguments)
    assert code == 1 and shown["error"]["type"] == "UnsupportedProblemError"


@pytest.mark.slow
def test_the_whole_chain_by_command(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    code, planned = document(capsys, "tune", *FAST, "--plan")
    assert code == 0 and planned["mode"] == "predicted" and planned["problems"][0]["legal"] >= 40
    assert not (own_cache / "cache" / "tuning.sqlite3").exists()
    code, tuned = document(capsys, "tune", *FAST, "--write-seeds", str(own_cache / "seeds"))
    assert code == 0 and tuned["problems"][0]["winner"]["predicted_rank"] >= 1
    assert (own_cache / "seeds" / "l40s" / "attention_fwd.jsonl").read_text().count("\n") == 1
    (member,) = (own_cache / "portfolios" / "sm_89" / "attention_fwd.jsonl").read_text().splitlines()
    assert json.loads(member)["config"] == tuned["problems"][0]["winner"]["config"] and '"predicted"' in member
    code, info = document(capsys, "db", "info")
    assert (
        code == 0
        and info["trials"] == tuned["problems"][0]["trials"]
        and info["winners"] == 1
        and info["schema"]
        and info["path"]
    )
    code, rows = document(capsys, "db", "list")
    assert rows["rows"][0]["config"] == tuned["problems"][0]["winner"]["config"]
    code, plan = document(capsys, "show", "plan", *FAST[2:])
    assert plan["config_source"] == "predicted" and plan["config"] == tuned["problems"][0]["winner"]["config"]
    assert document(capsys, "db", "verify") == (0, {"ok": True, "problems": []})
    code, out, err = call(capsys, "tune", *FAST, "--resume", "--quiet")
    assert code == 0 and "predicted rank" in out and err == ""
    # Anew, with a table to read; what is compiled is known by now. "predicted" stands wherever a figure does.
    (own_cache / "cache" / "tuning.sqlite3").unlink()
    code, out, err = call(capsys, "tune", *FAST)
    assert (
        code == 0
        and "predicted rank" in out
        and " ms" not in out.replace("predicted 0", "predicted").split("predicted rank")[0]
    )
    assert all("predicted" in line for line in err.splitlines() if "best so far" in line)


def test_the_miss_logs_a_command_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from flashgen import Problem

    words = Problem.preset(
        "llama3-8b", head_dim_v=64, causal_alignment="top-left", return_lse=True
    ).tune_arguments.split()
    code, planned = document(capsys, "tune", *words, "--target", "h100", "--plan")
    assert code == 0 and planned["problems"][0]["spec"] == "attention_fwd-bf16-d128-dv64-causal-lse"


def test_render(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    code, out, _ = call(capsys, "render", "attention_fwd-bf16-d128-causal")
    assert code == 0 and "def attention_fwd(" in out
    path = own_cache / "k.py"
    code, said, _ = call(capsys, "render", "--dtype", "bf16", "--head-dim", "128", "--causal", "-o", str(path))
    assert code == 0 and path.read_text() == out and str(path) in said
    code, shown = document(capsys, "render", "attention_fwd-bf16-d128-causal", "--target", "a100")
    assert shown["text"] == out and len(shown["digest"]) == 64
    code, shown = document(capsys, "render", "attention_fwd-bf16-d128-causal", "--target", "h100")
    assert shown["variant"] == "gluon_fwd_sm90" and "from triton.experimental import gluon" in shown["text"]


@pytest.mark.parametrize("what", ["variants", "targets", "presets", "spaces"])
def test_show(capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, _ = call(capsys, "show", what)
    assert code == 0 and len(out.splitlines()) >= 3
    assert document(capsys, "show", what)[1][what]


def test_check_runs_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = document(capsys, "check", "--dtype", "fp16", "--head-dim", "32", "--causal")
    assert code == 0 and shown["ok"] and 0 < shown["checks"][0]["ratio"] <= 1


def test_doctor_and_broken_databases(
    capsys: pytest.CaptureFixture[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = document(capsys, "doctor")
    assert (
        code == 0
        and shown["versions"]["torch"]
        and shown["backends"]["torch"] == "works"
        and len(shown["templates"]["digest"]) == 64
    )
    corrupt = own_cache / "corrupt.sqlite3"
    corrupt.write_text("this is no database, but it is long enough to be taken for one" * 20)
    before = corrupt.read_bytes()
    for path in (corrupt, own_cache):
        monkeypatch.setenv("FLASHGEN_DB", str(path))
        for command in (["db", "info"], ["db", "list"], ["db", "verify"], ["db", "migrate"], ["tune", *FAST]):
            code, shown = document(capsys, *command)
            assert (
                code == 1
                and shown["error"]["type"] in ("DatabaseError", "SchemaVersionError")
                and str(path) in shown["error"]["message"]
            )
        code, shown = document(capsys, "doctor")
        assert code == 1 and "error" in shown["database"]
    assert corrupt.read_bytes() == before


def test_help_is_quick_and_ctrl_c_is_quiet() -> None:
    code = "import sys; sys.argv = ['flashgen', '--help']\nfrom flashgen.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n    print([m for m in ('torch', 'triton', 'optuna', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "quickstart" in done.stdout


def test_python_dash_m_and_debug() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "flashgen", "--version"], capture_output=True, text=True, check=True, env=environment
    )
    assert "0.1.0" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "flashgen", "--debug", "render", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" in done.stderr and "InvalidProblemError" in done.stderr
