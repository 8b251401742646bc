"""The door to matplotlib: what it refuses, and that what it writes is a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashgen import plot
from flashgen.errors import InvalidProblemError, MissingExtraError


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".PDF", b"%PDF-")])
def test_a_figure_is_written_in_the_format_of_its_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install flashgen[plot]")
    made, (left, right) = plot.figure(2, title="two")
    left.plot([1, 2], [3, 4])
    right.set_xlabel("keys")
    plot.save(made, tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(magic)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(("name", "said"), [("x.doc", "'.doc' is not known"), ("none/x.png", "does not exist")])
def test_what_cannot_be_written_is_said_first(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InvalidProblemError, match=said):
        plot.check(tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for door in (lambda: plot.check(tmp_path / "x.png"), plot.figure):
        with pytest.raises(MissingExtraError, match=r"pip install flashgen\[plot\]"):
            door()
