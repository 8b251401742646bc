"""The exported file stands alone: copied to an empty folder it tests itself, and imports only torch and triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flashgen
from flashgen import AttentionSpec, InvalidProblemError, Problem, UnsupportedProblemError

KEYS = ["attention_fwd-bf16-d64-causal", "attention_fwd-fp16-d40-dv24-lse", "attention_fwd-fp32-d16-causal-lse"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_it_runs_alone(key: str, tmp_path: Path) -> None:
    written = flashgen.export(AttentionSpec.from_key(key), tmp_path / "kernel.py", target="h100")
    text = written.read_text()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "kernel.py").write_text(text)
    done = subprocess.run([sys.executable, "-I", "kernel.py"], cwd=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "self-test passed" in done.stdout, done.stdout + done.stderr
    imports = {a.name.split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    imports |= {str(n.module).split(".")[0] for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert imports <= {"torch", "triton", "numpy", *sys.stdlib_module_names}
    for words in (key, "under any terms, without notice", "h100", "CONFIGS", "default: nothing was tuned"):
        assert words in text
    assert "{{" not in text and "{%" not in text


@pytest.mark.slow
def test_a_broken_kernel_fails_its_own_test(tmp_path: Path) -> None:
    path = flashgen.export(AttentionSpec.from_key(KEYS[0]), tmp_path / "kernel.py", target="h100")
    text = path.read_text()
    assert text.count("(offs_m + causal_offset)[:, None]") == 1
    path.write_text(text.replace("(offs_m + causal_offset)[:, None]", "(offs_m + causal_offset + 1)[:, None]"))
    done = subprocess.run([sys.executable, "-I", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "self-test FAILED" in done.stdout


@pytest.mark.parametrize("key", KEYS)
def test_it_is_formatted_and_clean(key: str, tmp_path: Path) -> None:
    path = flashgen.export(AttentionSpec.from_key(key), tmp_path / "kernel.py", target="h100")
    for command in (["format", "--check"], ["check", "--select", "F,E9"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_it_carries_what_was_tuned_nearest_shape_first(tmp_path: Path) -> None:
    problem = Problem.preset("llama3-8b", seqlen=64, batch=1)
    tuned = flashgen.tune(problem, target="a100", max_trials=1, progress=False).problems[0].winner
    assert tuned is not None
    text = flashgen.export(problem, tmp_path / "kernel.py", target="a100").read_text()
    assert "(64, 64, 32): {" in text and "predicted (rank" in text and "never timed" in text
    assert all(f'"{name}": {value}' in text for name, value in tuned.config.items())


def test_where_it_may_write(tmp_path: Path) -> None:
    spec = AttentionSpec.from_key(KEYS[0])
    assert flashgen.export(spec, tmp_path, target="h100").name == "attention_fwd_bf16_d64_causal.py"
    own = flashgen.export(spec, tmp_path / "kernel.py", target="h100")
    assert flashgen.export(spec, own, target="h100") == own  # its own file may be written again
    own.write_text("precious")
    with pytest.raises(InvalidProblemError, match="was not written by flashgen"):
        flashgen.export(spec, own, target="h100")
    assert own.read_text() == "precious"
    with pytest.raises(InvalidProblemError, match="does not exist"):
        flashgen.export(spec, tmp_path / "no" / "kernel.py", target="h100")
    with pytest.raises(InvalidProblemError, match="format='zip'"):
        flashgen.export(spec, own, format="zip", target="h100")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedProblemError, match="export format 'aot'"):
        flashgen.export(spec, own, format="aot", target="h100")
    with pytest.raises(UnsupportedProblemError, match="dropout_p"):
        flashgen.export(AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64, dropout=True), tmp_path, target="h100")
