"""What an exported file says and does beyond passing its own test: provenance, choice of configuration, a drop-in function."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from store_support import make, predicted

import flashgen
from flashgen import AttentionSpec, InvalidProblemError, Problem
from flashgen.render import render
from flashgen.store import open_store, seeds
from flashgen.variants import by_name

SPEC = AttentionSpec.from_key("attention_fwd-fp32-d16-causal-lse")
DIGEST = render(SPEC, by_name("triton_fwd")).digest
SHAPE = {"batch": 1, "seqlen_q": 256, "seqlen_k": 256, "num_heads_q": 4, "num_heads_kv": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)


def row(maker: Any = make, **changes: Any) -> Any:
    values = {"spec_key": SPEC.key, "digest": DIGEST, "shape": SHAPE, "error_ratio": 0.5}
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return maker(**{**values, **changes, "config": tile | changes.get("config", {})})


def store(*rows: Any) -> None:
    (Path(os.environ["FLASHGEN_CACHE_DIR"])).mkdir(exist_ok=True)
    with open_store(write=True) as opened:
        opened.add(rows)


def configs(text: str) -> list[str]:
    """The lines of CONFIGS."""
    return [line.strip() for line in text.split("CONFIGS = {\n")[1].split("}\n\n")[0].splitlines() if "(" in line]


def alone(path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a file in its own folder, without flashgen on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLASHGEN_"))}
    command = [sys.executable, path.name, *arguments]
    return subprocess.run(
        command, cwd=path.parent, env={**kept, **variables}, capture_output=True, text=True, check=False
    )


def test_the_header_tells_where_it_comes_from(tmp_path: Path) -> None:
    store(row(latency_ms=0.1234, versions={"torch": "2.11.0", "triton": "3.6.0"}))
    text = flashgen.export(SPEC, tmp_path / "k.py", target="h100").read_text()
    head = text.split('"""')[1]
    for words in (
        SPEC.key, DIGEST, "NVIDIA H100", "sm_90", flashgen.__version__, "under any terms, without notice",
        "(256, 256, 4): BLOCK_M=64 BLOCK_N=32 num_stages=2 num_warps=4", "measured 0.1234 ms", "torch 2.11.0", "2026-01-31",
        "from k import attention",
    ):  # fmt: skip
        assert words in head


def test_configurations_follow_the_order_of_dispatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = SHAPE | {"seqlen_q": 4096, "seqlen_k": 4096}
    shipped = (row(latency_ms=0.01, config={"num_stages": 4}), row(shape=longer, config={"num_stages": 4}))
    monkeypatch.setattr(seeds, "load", lambda gpu, op: shipped if gpu == "h100" else ())
    store(
        row(latency_ms=9.0),
        row(shape=longer, status="ok", error_ratio=2.0, config={"num_stages": 3}),  # a wrong result wins nowhere
        row(maker=predicted, shape=longer, config={"num_stages": 3}),
        row(maker=predicted, shape=SHAPE | {"seqlen_k": 64}, config={"num_stages": 3}),
        row(digest="e" * 64, shape=SHAPE | {"seqlen_k": 1}),  # of another text of the kernel
        row(gpu="a100", arch="sm_80", shape=SHAPE | {"seqlen_k": 2}),
    )
    text = flashgen.export(SPEC, tmp_path / "k.py", target="h100").read_text()
    kept = [(line.split(": {")[0], line.split('"num_stages": ')[1][0], line.split("# ")[1]) for line in configs(text)]
    assert kept == [
        ("(256, 64, 4)", "3", "predicted"),
        ("(256, 256, 4)", "2", "database"),
        ("(4096, 4096, 4)", "4", "seed"),
    ]


def test_a_problem_puts_its_shape_first_choice(tmp_path: Path) -> None:
    store(row())
    problem = Problem(dtype="fp32", head_dim=16, head_dim_v=16, causal=True, return_lse=True, **SHAPE | {"batch": 3})
    text = flashgen.export(problem, tmp_path / "k.py", target="h100").read_text()
    assert [line.split(": ")[0] for line in configs(text)] == ["(256, 256, 4)", "(256, 256, 12)"]
    assert "database: the nearest tuned shape's" in text


@pytest.mark.slow
def test_any_python_file_name_will_do(tmp_path: Path) -> None:
    path = flashgen.export(SPEC, tmp_path / "my-kernel.py", target="h100")
    assert "import attention" not in path.read_text().split('"""')[1]
    done = alone(path)
    assert done.returncode == 0 and done.stdout.startswith("self-test passed: max error"), done.stderr
    with pytest.raises(InvalidProblemError, match=r"kernel\.txt.*\.py"):
        flashgen.export(SPEC, tmp_path / "kernel.txt", target="h100")


def test_without_a_target_it_carries_what_there_is(tmp_path: Path) -> None:
    text = flashgen.export(SPEC, tmp_path / "k.py", target="cpu").read_text()
    assert "no GPU in particular" in text and "default: nothing was tuned" in text


DROP_IN = """
import sys
import torch
from kernel import CONFIGS, attention, pick_config

sys.modules["flashgen"] = None  # importing it would be an ImportError
sdpa = torch.nn.functional.scaled_dot_product_attention
q, k, v = (torch.randn(2, 33, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
turned = [x.transpose(1, 2) for x in (q, k, v)]
expected = sdpa(*turned, is_causal=True, enable_gqa=True)
out = attention(q, k, v)
assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5) and out.shape == q.shape
out, lse = attention(*turned, layout="bhsd", return_lse=True, causal=True, causal_alignment="top-left")
assert torch.allclose(out, expected, atol=1e-5) and out.is_contiguous() and lse.shape == (2, 4, 33)
assert torch.allclose(lse[:, :, 0], (turned[0][:, :, 0] * turned[1].repeat_interleave(2, 1)[:, :, 0]).sum(-1) / 4, atol=1e-5)
odd = torch.randn(2, 33, 16, 4).transpose(2, 3)  # its last stride is not 1
assert torch.allclose(attention(odd, k, v), attention(odd.contiguous(), k, v))
flipped = attention(q, k, v, softmax_scale=-0.5), attention(-q, k, v, softmax_scale=0.5)
assert torch.allclose(*flipped)
assert attention(q[:, :0], k, v).shape == (2, 0, 4, 16) and attention(q[:0], k[:0], v[:0]).shape == (0, 33, 4, 16)

assert set(CONFIGS) == {(256, 256, 4), (4096, 4096, 4)}
assert pick_config(300, 200, 8) is CONFIGS[(256, 256, 4)] and pick_config(9000, 3000, 1) is CONFIGS[(4096, 4096, 4)]

def refused(what, *arguments, **options):
    try:
        attention(*arguments, **options)
    except (ValueError, RuntimeError) as error:
        assert what in str(error), (what, str(error))
    else:
        raise AssertionError(f"not refused: {what}")

refused("causal=False", q, k, v, causal=False)
refused("layout='sbhd'", q, k, v, layout="sbhd")
refused("causal_alignment='left'", q, k, v, causal_alignment="left")
refused("torch.float16", q.half(), k, v)
refused("head dim 16", q[..., :8], k, v)
refused("do not fit together", q[:, :, :3], k, v)
refused("do not fit together", q, k, v[:, :5])
refused("no backward", q.clone().requires_grad_(), k, v)
print("drop-in")
"""


@pytest.mark.slow
def test_its_function_is_a_drop_in(tmp_path: Path) -> None:
    longer = SHAPE | {"seqlen_q": 4096, "seqlen_k": 4096}
    store(row(), row(shape=longer, config={"BLOCK_N": 16}))
    flashgen.export(SPEC, tmp_path / "kernel.py", target="h100")
    (tmp_path / "use.py").write_text(DROP_IN)
    done = alone(tmp_path / "use.py", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (0, "drop-in\n"), done.stderr
    done = alone(tmp_path / "kernel.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_on_cpu_tensors_it_says_what_it_needs(tmp_path: Path) -> None:
    spec = AttentionSpec.from_key("attention_fwd-fp16-d16")
    flashgen.export(spec, tmp_path / "kernel.py", target="h100")
    (tmp_path / "use.py").write_text(
        "import torch\nfrom kernel import attention\nq = torch.zeros(1, 1, 1, 16, dtype=torch.float16)\n"
        "for options in ({}, {'return_lse': True}):\n    try:\n        attention(q, q, q, **options)\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    done = alone(tmp_path / "use.py")
    first, second = done.stdout.splitlines()
    assert "TRITON_INTERPRET=1" in first and "attention_fwd-fp16-d16-lse" in second.format(SPEC=spec.key)


@pytest.mark.slow
def test_the_self_test_runs_every_configuration(tmp_path: Path) -> None:
    store(row(), row(shape=SHAPE | {"seqlen_q": 4096}, config={"BLOCK_N": 16}))
    path = flashgen.export(SPEC, tmp_path / "kernel.py", target="h100")
    text = path.read_text()
    # Wrong with one configuration alone, which no test's shape would pick.
    assert text.count("    programs = triton.cdiv(") == 1
    path.write_text(
        text.replace(
            "    programs = triton.cdiv(", "    v = v * 2 if BLOCK_N == 16 else v\n    programs = triton.cdiv("
        )
    )
    done = alone(path)
    assert done.returncode == 1 and "self-test FAILED" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ro"
    folder.mkdir(mode=0o555)
    with pytest.raises(InvalidProblemError, match="read-only"):
        flashgen.export(SPEC, folder, target="h100")
