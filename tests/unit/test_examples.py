"""Every example runs as its first lines say, alone, and prints what it tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What each prints when its story came true; an example that is not listed fails.
TELLS = {
    "attention": ("agree with PyTorch", "  runs     "),
    "check_without_gpu": ("inside the budget", "off by one key is not"),
    "find_a_race": ("[shared-race]", "x = tile.load(layout)", "mended: no defect found", "other mistakes are found"),
    "masks": (
        "tree of drafts",
        "(q_idx >= kv_idx) & (document_q == document_k)",
        "every tile of every mask is what eager PyTorch says",
        "every generated kernel gives eager attention, within",
    ),
    "training_memory": ("materialised, checkpointed, bf16 autocast", "count and measurement agree within"),
    "train_tiny_gpt": ("flashgen     loss 3.4", "plot: train_tiny_gpt.png", "the loss curves agree within rounding"),
    "read_the_kernel": ("attention_fwd-bf16-d96-causal-", "only in the causal kernel:\n", "causal_offset"),
}
# Smaller than what a reader runs.
ARGUMENTS = {
    "training_memory": [
        "--seqlen",
        "256",
        "--hidden",
        "64",
        "--heads",
        "2",
        "--layers",
        "2",
        "--vocab",
        "128",
        "--steps",
        "1",
    ],
    "train_tiny_gpt": ["--steps", "12"],
}
LEAVES = {"train_tiny_gpt": {"train_tiny_gpt.png"}}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(TELLS)
    readme = (ROOT / "README.md").read_text()
    assert [name for name in TELLS if f"| `{name}` |" not in readme] == [], "README lists the examples"


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TELLS))
def test_it_runs(name: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / f"{name}.py"
    assert f"python examples/{name}.py" in path.read_text(), "the docstring gives the command"
    if name == "train_tiny_gpt":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install flashgen[plot]")
    command = [sys.executable, str(path), *ARGUMENTS.get(name, [])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for text in TELLS[name]:
        assert text in result.stdout, f"{text!r} is not in:\n{result.stdout}"
    left = {made.name for made in tmp_path.iterdir()}
    assert left == LEAVES.get(name, set()), "an example leaves nothing behind but what it says"


@pytest.mark.long
def test_the_gallery_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install flashgen[plot]")
    path = tmp_path / "gallery.png"
    command = [sys.executable, str(ROOT / "examples" / "masks.py"), str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(path.read_bytes()) > 20_000, "nine masks are more than an empty page"
    refused = subprocess.run([*command[:-1], "gallery.doc"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "'.doc' is not known" in refused.stderr
