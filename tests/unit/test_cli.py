"""The command line's edges: what errors name, one document whatever happens, interrupts, pipes, terminals, passwords."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_support import environment, make

import flashgen
from flashgen import accuracy
from flashgen.cli import main as command_line
from flashgen.cli.main import run
from flashgen.cli.output import print_table
from flashgen.store import open_store

SPEC = "attention_fwd-bf16-d64"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Fails unless stdout is exactly one JSON document and stderr silent."""
    code, out, err = call(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


# -- what an error names: the argument, the value, what is allowed --

NAMES = [
    (["nope"], ["'nope'", "doctor", "quickstart", "db"]),
    ([], ["name a command", "doctor", "db"]),
    (["show"], ["name a command", "variants", "plan"]),
    (["db", "nope"], ["'nope'", "info", "verify"]),
    (["render", "--prest", "x"], ["'--prest'", "--preset", "--variant", "--output"]),
    (["show", "plan", "--preset", "gpt"], ["'gpt'", "llama3-8b", "minilm-l6"]),
    (["show", "plan", "--preset", "llama3-8b", "--target", "tpu"], ["'tpu'", "a100", "h100", "cpu"]),
    (["show", "plan", "--preset", "llama3-8b", "--backend", "cuda"], ["--backend", "'cuda'", "gluon", "torch"]),
    (["render", SPEC, "--variant", "best"], ["'best'", "triton_fwd"]),
    (["render", SPEC, "--variant", "torch_blocked"], ["torch_blocked", "triton_fwd"]),
    (["render", SPEC, "--config", "BLOCK_M=64"], ["BLOCK_N", "num_stages", "num_warps"]),
    (
        ["render", SPEC, "--target", "h100", "--config", "BLOCK_M=48,BLOCK_N=64,num_warps=4,num_stages=2"],
        ["BLOCK_M=48", "power of two"],
    ),
    (["render", SPEC, "--dtype", "fp16"], [SPEC, "--dtype"]),
    (["export", SPEC, "--preset", "llama3-8b", "-o", "x.py"], [SPEC, "--preset"]),
    (["render", "--preset", "llama3-8b", "--preset", "minilm-l6"], ["llama3-8b, minilm-l6", "one preset"]),
    (["check", "--dtype", "int8"], ["--dtype", "'int8'", "bf16"]),
    (["check", SPEC, "--seqlen", "64"], [SPEC, "--seqlen"]),
    (["quickstart", "-o", "nowhere"], ["nowhere", "does not exist"]),
    (["quickstart", "--target", "tpu"], ["'tpu'", "h100"]),
]


@pytest.mark.parametrize(("arguments", "said"), NAMES, ids=[" ".join(row[0]) or "nothing" for row in NAMES])
def test_wrong_usage_names_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert [text for text in said if text not in err] == []
    if arguments and arguments != ["show"]:  # a group has no --json of its own
        code, shown = document(capsys, *arguments)
        assert code == 2 and [text for text in said if text not in shown["error"]["message"]] == []


# -- databases that cannot be used --


@pytest.mark.parametrize("kind", ["folder", "corrupt", "empty", "mysql"])
def test_a_database_that_cannot_be_used_is_1(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"folder": str(tmp_path), "mysql": "mysql://host/name"}.get(kind, str(tmp_path / "db.sqlite3"))
    if kind in ("corrupt", "empty"):
        Path(place).write_bytes(b"x" * 5000 if kind == "corrupt" else b"")
    monkeypatch.setenv("FLASHGEN_DB", place)
    commands = (
        ["db", "info"],
        ["db", "verify"],
        ["show", "plan", "--preset", "minilm-l6", "--target", "h100"],
        ["export", SPEC, "--target", "h100", "-o", str(tmp_path / "k.py")],
    )
    for command in commands:
        code, out, err = call(capsys, *command)
        assert (code, out) == (1, "") and place in err and "FLASHGEN_DB" in err and "Traceback" not in err
    code, shown = document(capsys, "doctor")
    assert code == 1 and place in shown["database"]["error"] and len(shown["broken"]) == 1
    assert shown["backends"]["torch"] == "works", "the patient is not asked whether others are well"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_database_reads_and_does_not_tune(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db.sqlite3"
    with open_store(str(path), write=True) as store:
        store.add([make()])
    path.chmod(0o444)
    monkeypatch.setenv("FLASHGEN_DB", str(path))
    assert document(capsys, "db", "info")[1]["trials"] == 1
    code, _, err = call(capsys, "tune", "--preset", "minilm-l6", "--target", "h100")
    assert code == 1 and "read-only" in err


def test_a_password_is_never_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_DB", "postgresql+psycopg://me:hunter2@127.0.0.1:1/name")
    for command in (["db", "path"], ["db", "info"], ["doctor"]):
        _, out, err = call(capsys, *command)
        assert "hunter2" not in out + err and ("me:***@" in out + err or "psycopg" in out + err)


# -- one document, one exit code, whatever happens --


def test_debug_may_stand_anywhere_and_changes_no_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "render", "x"], ["render", "x", "--debug"], ["render", "x", "--debug", "--json"]):
        code, out, err = call(capsys, *arguments)
        assert code == 2 and "Traceback" in err and "InvalidProblemError" in out + err
        assert "--json" not in arguments or json.loads(out)["error"]["type"] == "InvalidProblemError"


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("oh"), 1), (MemoryError(), 1)], ids=repr
)
def test_whatever_a_command_raises(
    raised: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("flashgen.cli.render.render_source", broken)
    got, out, err = call(capsys, "render", SPEC)
    assert (got, out) == (code, "") and err.strip() and "Traceback" not in err
    run(["render", SPEC, "--json"])
    assert json.loads(capsys.readouterr().out)["error"]["type"] == type(raised).__name__


def test_a_check_that_fails_is_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = accuracy.check_launch

    def off(*arguments: Any, **options: Any) -> Any:
        return replace(honest(*arguments, **options), ok=False, message="off by one key")

    monkeypatch.setattr(accuracy, "check_launch", off)
    code, out, err = call(capsys, "check", "attention_fwd-fp16-d16")
    assert code == 1 and "off by one key" in out and "0 of 1 inside" in out and "attention_fwd-fp16-d16" in err
    code, shown = document(capsys, "check", "attention_fwd-fp16-d16")
    assert code == 1 and shown["ok"] is False and shown["checks"][0]["message"] == "off by one key"


def test_check_takes_what_the_options_leave_open(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = document(capsys, "check", "--dtype", "fp16", "--head-dim", "16")
    assert code == 0
    assert [row["spec"] for row in shown["checks"]] == [
        "attention_fwd-fp16-d16-lse",
        "attention_fwd-fp16-d16-causal-lse",
    ]
    code, sized = document(
        capsys, "check", "--dtype", "fp16", "--head-dim", "16", "--causal", "--seqlen", "70", "--heads-q", "2"
    )
    assert sized["checks"][0]["problems"] == shown["checks"][1]["problems"] + 1


def test_doctor_tells_a_backend_that_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = flashgen.attention

    def attention(*arguments: Any, backend: str, **options: Any) -> Any:
        out = honest(*arguments, backend=backend, **options)  # type: ignore[arg-type]
        return out * 1.01 if backend == "triton" else out

    monkeypatch.setattr(flashgen, "attention", attention)
    code, shown = document(capsys, "doctor")
    assert code == 1 and "off by" in shown["backends"]["triton"] and shown["backends"]["torch"] == "works"
    assert shown["backends"]["gluon"].startswith(("works", "does not run on this GPU")) and [
        text.split(":")[0] for text in shown["broken"]
    ] == ["backend triton"]


def test_plan_is_what_a_call_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["show", "plan", "--preset", "llama3-8b", "--seqlen", "2048", "--target", "h100"]
    plan = flashgen.dispatch.resolve(flashgen.Problem.preset("llama3-8b", seqlen=2048), flashgen.Target.named("h100"))
    assert call(capsys, *arguments)[:2] == (0, f"{plan}\n")
    code, shown = document(capsys, *arguments)
    assert code == 0 and (shown["variant"], shown["config"]) == (plan.variant, plan.config.to_dict())


def test_the_commands_are_those_of_the_contract() -> None:
    contract = ["doctor", "quickstart", "tune", "bench", "check", "render", "show", "export", "memory", "report", "db"]
    assert list(command_line._COMMANDS) == contract


# -- terminals, pipes, signals --


def test_tables_are_ruled_on_a_terminal_and_cut_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table(["a", "b"], [[1, 2]])
    assert capsys.readouterr().out == "a\tb\n1\t2\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    print_table(["a", "b"], [[1, 2]])
    out = capsys.readouterr().out
    assert "│" in out and "\x1b[3" not in out, "ruled, and without colour"


def test_a_reader_that_leaves_is_no_error() -> None:
    script = f'"{sys.executable}" -m flashgen render attention_fwd-bf16-d64 | head -n 1'
    done = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.startswith('"""attention_fwd-bf16-d64') and done.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flashgen", "--help"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "click" in loaded and not loaded & {"torch", "triton", "optuna", "sqlalchemy", "jinja2", "rich", "numpy"}
