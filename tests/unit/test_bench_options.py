"""`flashgen bench` with options: what is drawn reaches every contestant alike, and a result without an option is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen import attention
from flashgen.cli.main import run as command
from flashgen.errors import InvalidProblemError
from flashgen.peers import Flashgen, masks, options
from flashgen.peers.compare import Comparison, compare
from flashgen.peers.inputs import Inputs
from flashgen.peers.sdpa import SdpaMath
from flashgen.problem import Problem

PLAIN = Problem(
    dtype="fp32", batch=2, seqlen_q=48, seqlen_k=48, num_heads_q=4, num_heads_kv=2, head_dim=16, head_dim_v=16
)
PROBLEMS: dict[str, Problem] = {
    "window and softcap": replace(PLAIN, window_size=(9, 0), softcap=1.0),
    "alibi and sinks, causal": replace(PLAIN, has_alibi=True, has_sinks=True, causal=True),
    "bias and mask, causal": replace(PLAIN, has_bias=True, has_attn_mask=True, causal=True),
    "dropout": replace(PLAIN, dropout_p=0.3),
    "fewer queries": replace(PLAIN, seqlen_q=20, causal=True, has_alibi=True, window_size=(11, -1)),
    "documents": masks.masked(replace(PLAIN, softcap=2.0), "documents"),
}


class Without(Flashgen):
    """A contestant that forgets an option."""

    def __init__(self, option: str) -> None:
        super().__init__("torch")
        self.name, self._option = f"without {option}", option

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        given = options.keywords(problem)
        del given[self._option]
        made = options.generator(problem)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if made is not None:
                made.manual_seed(made.initial_seed())
            out: Tensor = attention(q, k, v, causal=problem.causal, generator=made, **given)  # type: ignore[assignment]
            return out

        return run


def run(problem: Problem, op: Any, *others: Any) -> Comparison:
    inputs = Inputs(problem, op, cache=1, memory=1 << 24)
    return compare(problem, op, [Flashgen("torch"), *others], inputs=inputs, rounds=1, warm_up_ms=(0.0, 1.0))


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_option_is_computed_by_flashgen_and_held_to_fp64(name: str, op: Any) -> None:
    found = run(PROBLEMS[name], op, SdpaMath())
    assert found.baseline.status == "ok" and found.baseline.time is not None
    sdpa = found.contestants[1]
    if name.startswith("bias"):
        assert sdpa.status == "ok" and sdpa.time is not None
    else:
        assert sdpa.status == "unsupported" and sdpa.message.startswith("has no ")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("window and softcap", "window_size"),
        ("window and softcap", "softcap"),
        ("alibi and sinks, causal", "alibi_slopes"),
        ("alibi and sinks, causal", "sinks"),
        ("bias and mask, causal", "bias"),
        ("bias and mask, causal", "attn_mask"),
        ("dropout", "dropout_p"),
        ("documents", "mask_mod"),
    ],
)
def test_a_contestant_that_forgets_an_option_is_wrong(name: str, option: str) -> None:
    wrong = run(PROBLEMS[name], "attention_fwd", Without(option)).contestants[1]
    assert wrong.status == "wrong" and wrong.time is None


def test_flops_are_of_what_is_visible() -> None:
    assert options.visible_pairs(replace(PLAIN, causal=True)) == 48 * 49 // 2
    assert options.visible_pairs(replace(PLAIN, window_size=(9, 0))) == sum(min(i + 1, 10) for i in range(48))
    ids = masks.visible(48, "documents")
    assert options.visible_pairs(masks.masked(PLAIN, "documents")) == int(ids.sum())


@pytest.mark.parametrize("name", masks.NAMES)
def test_named_masks_are_masks(name: str) -> None:
    seen = masks.visible(4096, name)
    assert seen.diagonal().all(), "each token sees itself"
    assert not seen.all()
    assert seen.tril().equal(seen) or name in ("prefix", "neighbourhood")
    if name == "neighbourhood":
        assert seen.equal(seen.T) and int(seen[2000].sum()) == 13 * 13
    if name == "tree":
        assert seen[:, :2048].tril().equal(torch.ones(4096, 2048, dtype=torch.bool).tril())
        assert seen[2048:, 2048:].all(0).sum() == 1, "all descend from one root"


def test_a_mask_has_one_length() -> None:
    with pytest.raises(InvalidProblemError, match="20 queries and 48 keys"):
        masks.masked(replace(PLAIN, seqlen_q=20), "tree")


def test_the_command_takes_options_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.csv"
    words = "bench --dtype fp32 --head-dim 16 --heads-q 2 --seqlen 40 --device cpu --rounds 1 --peers sdpa-math --mask tree --alibi --json"
    assert command([*words.split(), "--csv", str(path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert found["options"] == ["alibi_slopes", "mask_mod"] and found["problem"]["mods"] is None
    assert [entry["status"] for entry in found["contestants"]] == ["ok", "unsupported", "ok"]
    with path.open() as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"attention_fwd:alibi_slopes+mask_mod"}
