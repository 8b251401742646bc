"""Edge cases and a fixed sample of random calls, on every backend that covers them; see `fuzz.py` for longer runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import fuzz
import pytest
import torch
from cases import MASK_MODS, SCORE_MODS, STRIDES, Case, draw
from edges import EDGES
from judge import covered, hopper_tile, judge
from tally import Tally, joined, text_of

from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

# Read while pytest collects, before conftest hides the user's settings.
FIRST, COUNT = map(int, os.environ.get("FLASHGEN_FUZZ", "0:240").split(":"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("backend", ["torch", "triton", "gluon"])
@pytest.mark.parametrize("name", EDGES)
def test_edge(name: str, backend: str) -> None:
    case = replace(EDGES[name], backend=backend)
    if not covered(case):
        case = replace(case, grad=False)  # the forward alone, of a kernel without a backward
    if not covered(case):
        assert backend != "torch", "the torch backend covers every option"
        pytest.skip(f"no {backend} kernel covers this case")
    said = fuzz.verdict(case)
    assert said is None, f"{said}\n{fuzz.command(case)}"


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_case(seed: int) -> None:
    case = fuzz.settled(draw(seed))
    said = fuzz.verdict(case)
    if said is not None:
        pytest.fail(fuzz.report(case, said))


def test_the_sample_holds_every_option() -> None:
    cases = [draw(seed) for seed in range(240)]
    plain = Case()
    for field in fields(Case):
        values = {getattr(case, field.name) for case in cases}
        assert len(values - {getattr(plain, field.name)}) > 0, field.name
    assert sum(case.backend == "triton" for case in cases) == 60
    assert {case.score_mod for case in cases} >= set(SCORE_MODS) and {case.mask_mod for case in cases} >= set(MASK_MODS)
    assert {case.strides for case in cases} == set(STRIDES)
    assert sum(case.backend == "gluon" for case in cases) == 30


@pytest.mark.parametrize("backend", ["torch", "triton", "gluon"])
def test_every_backend_meets_every_option(backend: str) -> None:
    """In a longer run, each with gradients and without; a kernel that does not cover one of its cases hands it on."""
    cases = [case for case in map(draw, range(1600)) if case.backend == backend]
    options = ("window", "softcap", "alibi", "sinks", "bias", "attn_mask", "score_mod", "mask_mod", "block_mask", "dropout_p", "lengths", "seqused", "spread")  # fmt: skip
    for name in options:
        chosen = [case for case in cases if getattr(case, name) != getattr(Case(), name)]
        assert {case.grad for case in chosen} == {True, False}, name
        assert any(case.head_dim != case.head_dim_v for case in chosen), name
    assert {case.deterministic for case in cases if case.grad} == {True, False}
    assert any(case.block_mask == "given" for case in cases)
    assert {case.words for case in cases} == ({"", "none", "stale"} if backend == "gluon" else {""})
    if backend == "gluon":  # tiles of keys and of values of another width, keys hidden in them
        apart = [case for case in cases if (case.head_dim <= 64) != (case.head_dim_v <= 64)]
        assert all(
            any(getattr(case, name) != getattr(Case(), name) for case in apart)
            for name in ("mask_mod", "attn_mask", "window", "lengths")
        )


@pytest.mark.parametrize("seed", range(50))
def test_a_case_survives_its_text(seed: int) -> None:
    assert Case.loads(draw(seed).dumps()) == draw(seed)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="a case has no colour"):
        Case.loads('{"colour": 1}')


def test_what_a_run_met_is_counted_and_a_case_it_ended_in_is_a_failure(tmp_path: Path) -> None:
    cases = [
        Case(backend="gluon", causal=True, group=2),
        Case(backend="triton", grad=True, causal=True, mask_mod="rows"),
    ]
    tally = Tally(tmp_path / "first.json", device="a card")
    for case, said in zip(cases, (None, "dq: wrong"), strict=True):
        tally.begin(case)
        tally.end(case, said)
    other = Tally(tmp_path / "second.json")
    other.begin(cases[0])  # and the process ends
    total = json.loads(text_of(joined(json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))))
    assert (total["device"], total["cases"], total["failed"]) == ("a card", 2, 2)
    assert total["kernels"] == {"gluon forward": 1, "triton backward": 1}
    assert total["options"]["causal"] == {"gluon forward": 1, "triton backward": 1}
    assert total["options"]["mask_mod: rows"] == {"triton backward": 1} and "grouped heads" in total["options"]
    assert [Case.loads(json.dumps(one["case"])) for one in total["failures"]] == [cases[1], cases[0]]
    assert [one["said"] for one in total["failures"]] == ["dq: wrong", "the process ended in it"]


def test_cases_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option in either pass, on the Hopper kernel and, every third, on the portable one; a kernel that refuses hands on."""
    monkeypatch.setattr(fuzz, "covered", lambda case, device: case.backend == "triton" or case.head_dim % 8 == 0)
    hopper, h200 = by_name("gluon_fwd_sm90"), Target.named("h200")
    for only in ("forward", "backward"):
        cases = [fuzz.for_gpu(seed, only) for seed in range(300)]
        assert {case.grad for case in cases} == {only == "backward"}
        assert {case.deterministic for case in cases} == ({True, False} if only == "backward" else {False})
        for backend in ("gluon", "triton"):
            mine = [case for case in cases if case.backend == backend]
            for name in ("window", "softcap", "sinks", "bias", "attn_mask", "score_mod", "mask_mod", "block_mask", "dropout_p", "lengths"):  # fmt: skip
                assert any(getattr(case, name) != getattr(Case(), name) for case in mine), (only, backend, name)
        for case in cases:
            if case.backend == "gluon" and case.tile[0] > 64 and not case.head_dim_v % 8:
                spec = AttentionSpec(dtype="bf16", head_dim=case.head_dim, head_dim_v=case.head_dim_v)
                assert hopper.illegal(spec, h200, hopper.config(**hopper_tile(case))) is None, case.dumps()
    edges = fuzz.edges_for_gpu("backward")
    assert all(case.grad for case in edges)
    assert all(sum(case.backend == name for case in edges) > 20 for name in ("gluon", "triton"))


@pytest.mark.slow
def test_a_planted_bug_is_found_shrunk_and_repeated(tmp_path: Path) -> None:
    """Softcap without its factor: the shrunken case keeps softcap and little else, and the printed command repeats it."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import sys, runpy\n"
        "import torch\n"
        "from flashgen.torch_blocked.options import Block\n"
        "Block._capped = lambda self, raw: torch.tanh(raw / self.options.softcap) if self.options.softcap else raw\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[:0] = [sys.argv[0].rpartition('/')[0]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    seed = next(
        seed
        for seed, case in ((seed, draw(seed)) for seed in range(4000))
        if case.backend == "torch" and case.softcap and case.values == "normal" and case.scale is None and case.batch
        and not case.lengths and min(case.seqlen_q, case.seqlen_k) > 8 and not (case.score_mod or case.mask_mod or case.block_mask)
    )  # fmt: skip

    def planted(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    found = planted(["tests/fuzz/fuzz.py", "--seeds", f"{seed}:1"])
    assert found.returncode == 1, found.stdout + found.stderr
    line = next(line for line in found.stdout.splitlines() if line.startswith("python tests/fuzz/fuzz.py --case"))
    words = shlex.split(line)
    small = Case.loads(words[-1])
    assert small.softcap and small.batch == small.seqlen_q == small.heads_kv == small.group == 1
    assert not (small.sinks or small.bias or small.alibi or small.dropout_p or small.mask_mod or small.causal)
    again = planted(words[1:])
    assert again.returncode == 1 and "failed: " in again.stdout, again.stdout + again.stderr
    whole = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert whole.returncode == 0 and "passed" in whole.stdout, whole.stdout + whole.stderr


def test_what_the_judge_holds() -> None:
    """Every kind of tensor of a call is compared: each one wrong by a thousandth alone is noticed."""
    import judge as module

    case = replace(EDGES["bf16, everything"], dtype="fp32", score_mod="table")
    for name in ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "dcaptured0"):
        run = module.run

        def broken(
            case: Case, tensors: object, tile: object = None, *, name: str = name, run: object = run
        ) -> dict[str, torch.Tensor]:
            result: dict[str, torch.Tensor] = run(case, tensors, tile)  # type: ignore[operator]
            return result | {name: result[name] * 1.001}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run", broken)
            said = judge(case)
        assert said is not None and said.startswith(f"{name}:"), (name, said)
