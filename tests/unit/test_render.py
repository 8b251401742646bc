"""Rendering is pure: same text for the same spec, no torch, no GPU, and errors that name file and line."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashgen import render as render_module
from flashgen.errors import RenderError, UnsupportedProblemError
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name

SPEC = AttentionSpec(dtype="bf16", head_dim=128, head_dim_v=128, causal=True, has_lse=True)
VARIANT = by_name("triton_fwd")


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder of templates instead of the real one."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(render_module, "templates_dir", lambda: tmp_path)
    render_module._environment.cache_clear()
    render.cache_clear()
    yield tmp_path / "triton" / "attention_fwd.py.jinja"
    render_module._environment.cache_clear()
    render.cache_clear()


def test_same_arguments_same_text_in_another_process_too() -> None:
    source = render(SPEC, VARIANT)
    code = (
        "import sys\nfrom flashgen.render import render\nfrom flashgen.spec import AttentionSpec\n"
        "from flashgen.variants import by_name\n"
        f"print(render(AttentionSpec.from_key({SPEC.key!r}), by_name('triton_fwd')).digest, 'triton' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [source.digest, "False"]


def test_digest_and_name() -> None:
    source = render(SPEC, VARIANT)
    assert source.digest == hashlib.sha256(source.text.encode()).hexdigest()
    assert source.name == f"attention_fwd-bf16-d128-causal-lse-{source.digest[:8]}.py"
    assert source.spec == SPEC
    assert source.variant == "triton_fwd"


def test_every_covered_field_changes_the_text() -> None:
    keys = [
        "attention_fwd-bf16-d128",
        "attention_fwd-fp16-d128",
        "attention_fwd-fp32-d128",
        "attention_fwd-bf16-d96",
        "attention_fwd-bf16-d128-dv64",
        "attention_fwd-bf16-d128-causal",
        "attention_fwd-bf16-d128-lse",
        "attention_fwd-bf16-d128-causal-lse",
    ]
    digests = {render(AttentionSpec.from_key(key), VARIANT).digest for key in keys}
    assert len(digests) == len(keys)


def test_a_variant_without_a_template_refuses() -> None:
    with pytest.raises(UnsupportedProblemError, match="torch_blocked is not generated"):
        render(SPEC, by_name("torch_blocked"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fine\n{% if spec.causal %}\n", r"attention_fwd\.py\.jinja:\d+: "),
        ("{{ spec.no_such_field }}", "could not be rendered for attention_fwd-bf16-d128-causal-lse.*no_such_field"),
        ("{{ no_such_name }}", "no_such_name"),
        ("{% include 'triton/parts/missing.py.jinja' %}", "missing"),
        (None, "attention_fwd.py.jinja"),
    ],
)
def test_broken_templates_are_named(templates: Path, text: str | None, message: str) -> None:
    if text is not None:
        templates.write_text(text)
    with pytest.raises(RenderError, match=message):
        render(SPEC, VARIANT)


@pytest.mark.parametrize("key", ["attention_fwd-bf16-d128-causal-lse", "attention_fwd-fp32-d33-dv17"])
def test_offsets_that_can_pass_2_to_the_31_are_64_bit(key: str) -> None:
    """Every product with a stride has a 64-bit factor; the interpreter's tests hold the values."""
    text = render(AttentionSpec.from_key(key), VARIANT).text
    nodes = list(ast.walk(ast.parse(text)))
    wide = {
        ast.unparse(node.targets[0])
        for node in nodes
        if isinstance(node, ast.Assign) and "tl.int64" in ast.unparse(node.value)
    }
    products = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)]
    factors = [ast.unparse(node.left) for node in products if ast.unparse(node.right).startswith("stride_")]
    assert len(factors) == 14, "three for k and v each of a program, two in the loop, one per row; q and o"
    for factor in factors:
        assert "tl.int64" in factor or factor in wide, f"{factor} times a stride is computed in 32 bits"
    if "lse_ptr" in text:
        assert "off_bh.to(tl.int64) * seqlen_q" in text


def test_lengths_and_offsets_do_not_recompile() -> None:
    text = render(SPEC, VARIANT).text
    block = text[text.index("do_not_specialize") : text.index("def attention_fwd")]
    for name in ("causal_offset", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv"):
        assert f'"{name}"' in block
