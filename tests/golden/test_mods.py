"""A free-form kernel reads as if written by hand: the user's expressions in the middle, and no trace of them elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specs import GOLDEN
from torch import Tensor

from flashgen import mods
from flashgen.render import render
from flashgen.spec import AttentionSpec, Mods
from flashgen.variants import by_name

VARIANTS = ("triton_fwd", "gluon_fwd_sm90")
DOCUMENTS = torch.zeros(64, dtype=torch.int32)
TABLE = torch.zeros(4, 5)


def from_a_table(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * torch.sigmoid(TABLE[h, (q_idx - kv_idx) % 5])


def document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & (kv_idx <= q_idx)


def spec() -> AttentionSpec:
    program, _ = mods.program(from_a_table, {"mask_mod": document}, torch.device("cpu"))
    return AttentionSpec(
        dtype="bf16", head_dim=128, head_dim_v=128, has_score_mod=True, has_mask_mod=True, has_lse=True,
        mods=Mods(digest=program.digest, program=program),
    )  # fmt: skip


def path_of(variant: str) -> Path:
    return GOLDEN / "mods" / f"{variant}_tables_document.py"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_golden(variant: str, pytestconfig: pytest.Config) -> None:
    text, path = render(spec(), by_name(variant)).text, path_of(variant)
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "if that is what you meant: pytest tests/golden --update-golden"
    for line in ("qk = qk * sigmoid(", "visible &= "):
        assert text.count(line) >= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_formatted_and_clean(variant: str) -> None:
    beside = Path(sys.executable).parent / "ruff"
    program = str(beside) if beside.exists() else "ruff"
    for arguments in (["format", "--check"], ["check", "--select", "E9,F"]):
        command = [program, *arguments, "--isolated", "--no-cache", "--line-length", "120", str(path_of(variant))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_other_words_for_the_same_mods_are_one_kernel() -> None:
    again = mods.program(lambda s, b, h, i, j: s * torch.sigmoid(TABLE[h, (i - j) % 5]), {"mask_mod": document}, torch.device("cpu"))[0]  # fmt: skip
    other = mods.program(lambda s, b, h, i, j: s * torch.sigmoid(TABLE[h, (i - j) % 4]), {"mask_mod": document}, torch.device("cpu"))[0]  # fmt: skip
    assert again.digest == spec().mods.digest != other.digest  # type: ignore[union-attr]
