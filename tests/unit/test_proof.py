"""The offline proof: what counts as wrong, and what the command says and returns."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from flashgen import proof
from flashgen.cli.show import show
from flashgen.facts import CompiledFacts
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

H100 = Target.named("h100")
SPEC = AttentionSpec.from_key("attention_fwd-bf16-d128-causal")
GOOD = CompiledFacts(
    arch="sm_90", triton_version="3.6.0", n_regs=168, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0, smem_bytes=197_060,
    num_warps=4, serialised=False, undefined_registers=0, loop={"hgmma": 16, "total": 447}, compile_s=1.0,
)  # fmt: skip


def compiled(monkeypatch: pytest.MonkeyPatch, facts: CompiledFacts) -> None:
    monkeypatch.setattr(proof, "compile_facts", lambda *_: facts)


def shown(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(show, ["proof", *arguments])
    return result.exit_code, result.output


def test_every_head_dim_full_and_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(monkeypatch, GOOD)
    forward = {row.spec for row in proof.prove(H100)}
    assert forward == {f"attention_fwd-bf16-d{d}{causal}" for d in (64, 128, 256) for causal in ("", "-causal")}
    assert len(proof.proven(H100, lse=True)) == len(proof.proven(H100)) + 6
    assert not any(row.wrong for row in proof.prove(H100))
    assert {row.variant for row in proof.prove(H100, op="attention_bwd")} == {"gluon_bwd_sm90"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spill_load_bytes": 8}, "spills 8 bytes, outside of the main loop"),
        ({"spill_store_bytes": 4, "loop": {"spill": 1, "total": 9}}, "spills 4 bytes, also in the main loop"),
        ({"serialised": True}, "serialised its asynchronous products"),
        ({"smem_bytes": 232_449}, "needs 232449 bytes of shared memory, h100 has 232448"),
        ({"undefined_registers": 2}, "2 instructions read registers that nothing wrote"),
        ({"loop": {}}, "no main loop"),
    ],
)
def test_what_a_default_must_not_have(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str) -> None:
    compiled(monkeypatch, replace(GOOD, **change))
    code, out = shown()
    assert code == 1 and said in out
    code, out = shown("--json")
    assert code == 1 and all(said in row["wrong"][0] for row in json.loads(out)["proofs"])


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(monkeypatch, GOOD)
    code, out = shown()
    assert code == 0 and "Triton 3.6.0, sm_90a" in out and out.count("197060 of 232448") >= 6
    code, out = shown("--json")
    assert code == 0 and json.loads(out)["proofs"][0]["registers"] == 168
    code, out = shown("--target", "a100")
    assert code == 0 and "no Gluon kernel of attention_fwd is written for a100" in out


@pytest.mark.slow
def test_the_installed_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One real row, which `test_gluon_variant.py` compiles, too; `make proof` shows all of them, by two versions."""
    monkeypatch.setattr(proof, "proven", lambda *_, **__: [(by_name("gluon_fwd_sm90"), SPEC)])
    (row,) = proof.prove(H100)
    assert (row.spec, row.wrong, row.registers) == (SPEC.key, (), 168) and row.loop > 300
