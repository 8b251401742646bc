"""Exported kernels with options: alone in a folder they test themselves, and compute what flashgen computes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import alone

import flashgen
from flashgen import Problem, UnsupportedProblemError

BASE = Problem(
    dtype="fp16", batch=1, seqlen_q=512, seqlen_k=512, num_heads_q=2, num_heads_kv=1, head_dim=16, head_dim_v=16, return_lse=True
)  # fmt: skip
IDS = (torch.arange(512) // 90).int()
TABLE = torch.randn(2, 1100)


def of_numbers(b: Any, h: Any, i: Any, j: Any) -> Any:
    return ((i - j).abs() < 40) | (j < 3)


PROBLEMS: dict[str, Problem] = {
    "mask of numbers": BASE.modified(mask_mod=of_numbers),
    "mods that read": BASE.modified(
        mask_mod=lambda b, h, i, j: (IDS[i] == IDS[j]) & (i >= j),
        score_mod=lambda s, b, h, i, j: torch.tanh(s / 20) * 20 + TABLE[h, i - j + 512],
    ),
    "closed options": replace(
        BASE,
        causal=True,
        window_size=(60, 0),
        softcap=4.0,
        has_alibi=True,
        has_sinks=True,
        has_bias=True,
        has_attn_mask=True,
    ),
    "window, no lse": replace(BASE, window_size=(9, 9), return_lse=False),
}
# A line of each kernel -> the same line a little wrong.
BROKEN = {
    "mask of numbers": (
        "last_key = tl.where(offs_m < seqlen_q, kv_end - 1, -1)",
        "last_key = tl.where(offs_m < seqlen_q, kv_end, -1)",
    ),
    "mods that read": ("visible &= (ids_q == ids_k)", "visible &= (ids_q != ids_k)"),
    "closed options": ("qk += tl.load(bias_ptrs", "qk -= tl.load(bias_ptrs"),
    "window, no lse": ("offs_m + causal_offset - window_left", "offs_m + causal_offset - window_left + 1"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_tests_itself_and_fails_when_it_is_broken(name: str, tmp_path: Path) -> None:
    path = flashgen.export(PROBLEMS[name], tmp_path / "kernel.py", target="h100")
    done = alone(path)
    assert done.returncode == 0 and "self-test passed" in done.stdout, done.stdout + done.stderr
    text = path.read_text()
    good, bad = BROKEN[name]
    assert text.count(good) == 1, name
    path.write_text(text.replace(good, bad))
    done = alone(path)
    assert done.returncode == 1 and "self-test FAILED" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_formatted_and_clean(name: str, tmp_path: Path) -> None:
    path = flashgen.export(PROBLEMS[name], tmp_path / "kernel.py", target="h100")
    text = path.read_text()
    assert (
        "{{" not in text
        and "{%" not in text
        and "flashgen" not in text.replace("Written by flashgen", "").split('"""', 2)[2]
    )
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


USE = """
import torch
from kernel import attention, pick_config, ranges_of

q, k, v = (torch.randn(2, 90, heads, 16, generator=torch.Generator().manual_seed(heads)).half() for heads in (2, 1, 1))
ids = (torch.arange(512) // 37).int()
table = torch.randn(2, 1100, generator=torch.Generator().manual_seed(5))
captured = {"captured_ids": ids, "captured_table": table}
config = pick_config(90, 90, 4)
ranges = ranges_of(2, 2, 90, 90, config["BLOCK_M"], config["BLOCK_N"], "cpu", **captured)
assert ranges.shape[:2] == (1, 1) and ranges.stride()[:2] == (0, 0)
outs = [attention(q, k, v, mask_ranges=given, **captured) for given in (None, ranges)]
assert torch.equal(*outs)
torch.save((q, k, v, ids, table, outs[0], ranges, config), "result.pt")
for wrong in ({**captured, "captured_ids": ids.long()}, {**captured, "captured_ids": None}, {**captured, "captured_table": table[0]}):
    try:
        attention(q, k, v, **wrong)
    except ValueError as error:
        assert "captured_" in str(error)
    else:
        raise AssertionError("not refused")
print("used")
"""


def test_it_computes_what_flashgen_computes_and_finds_the_same_ranges(tmp_path: Path) -> None:
    flashgen.export(PROBLEMS["mods that read"], tmp_path / "kernel.py", target="h100")
    (tmp_path / "use.py").write_text(USE)
    done = alone(tmp_path / "use.py", TRITON_INTERPRET="1")
    assert done.stdout == "used\n", done.stderr
    q, k, v, ids, table, out, ranges, config = torch.load(tmp_path / "result.pt")
    mods: dict[str, Any] = {
        "mask_mod": lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j),
        "score_mod": lambda s, b, h, i, j: torch.tanh(s / 20) * 20 + table[h, i - j + 512],
    }
    expected = flashgen.attention(q, k, v, backend="torch", **mods)
    torch.testing.assert_close(out, expected, atol=4e-3, rtol=4e-3)
    from flashgen import mods as traced

    program, tensors = traced.program(None, {"mask_mod": mods["mask_mod"]}, torch.device("cpu"))
    found = traced.key_ranges(
        program.mask, traced.arrays_of(tensors), batch=2, num_heads=2, seqlen_q=90, seqlen_k=90,
        block_m=config["BLOCK_M"], block_n=config["BLOCK_N"],
    )  # fmt: skip
    ours = torch.stack([torch.as_tensor(x) for x in (found.first, found.full_first, found.full_last, found.last)], -1)
    assert torch.equal(ranges, ours.int())


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    for problem, why in (
        (replace(BASE, dropout_p=0.1), "belongs to training"),
        (replace(BASE, varlen=True), "packed sequences"),
        (replace(BASE, has_mask_mod=True), r"Problem\.modified"),
        (PROBLEMS["closed options"].backward, "the export of attention_bwd"),
    ):
        with pytest.raises(UnsupportedProblemError, match=why):
            flashgen.export(problem, tmp_path, target="h100")
