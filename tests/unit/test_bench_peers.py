"""Contestants: what they say of themselves, the inputs they get, and that a wrong one is never timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen.errors import UnsupportedProblemError
from flashgen.peers import Flashgen, Peer
from flashgen.peers.base import BenchOp
from flashgen.peers.compare import TWIN, Comparison, compare
from flashgen.peers.inputs import Inputs
from flashgen.peers.judge import Judge, gradients
from flashgen.peers.own import INTERPRETED
from flashgen.peers.sdpa import SdpaFlash, SdpaMath
from flashgen.problem import Problem
from flashgen.reference import attention_oracle

SMALL = Problem(
    dtype="fp32",
    batch=2,
    seqlen_q=40,
    seqlen_k=40,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=16,
    head_dim_v=16,
    causal=True,
)
CUDA = replace(SMALL, dtype="bf16", head_dim=64, head_dim_v=64, device="cuda")


class Planted(Peer):
    """Right, but for what is planted; counts its calls."""

    def __init__(self, name: str, spoil: Callable[[Tensor, int], Tensor], layout: Any = "bshd") -> None:
        self.name, self._spoil, self.layout = name, spoil, layout  # type: ignore[misc]
        self.calls = 0

    def available(self, device: str) -> str | None:
        return None

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        right = Flashgen("torch").forward(problem)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.calls += 1
            return self._spoil(right(q, k, v), self.calls)

        return run


class Tick:
    """A clock that runs the calls and says 100 milliseconds for each, so that the warm-up is short."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        return [100.0] * len(calls)


def run(problem: Problem, *others: Peer, op: BenchOp = "attention_fwd", **options: Any) -> Comparison:
    inputs = Inputs(problem, op, cache=1000, memory=1 << 20)
    return compare(problem, op, [Flashgen("torch"), *others], clock=Tick(), inputs=inputs, rounds=3, **options)


def entry(found: Comparison, name: str) -> Any:
    return next(one for one in found.contestants if one.name == name)


# -- wrong contestants --

SPOILED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "garbage": lambda out, n: torch.randn_like(out),
    "one row off": lambda out, n: out.index_fill(1, torch.tensor([17]), 0.25),
    "a percent": lambda out, n: out * 1.01,
    "nan": lambda out, n: out.masked_fill(out == out.flatten()[0], float("nan")),
    "zeros": lambda out, n: torch.zeros_like(out),
    "shape": lambda out, n: out[:, :-1],
    "layout": lambda out, n: out.transpose(1, 2),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_peer_is_reported_and_never_timed(name: str) -> None:
    peer = Planted(name, SPOILED[name])
    found = run(SMALL, peer)
    spoiled = entry(found, name)
    assert spoiled.status == "wrong" and spoiled.message and spoiled.budget_used > 2.0
    assert spoiled.samples == [] and spoiled.time is None and spoiled.ratio is None and spoiled.tflops is None
    assert peer.calls == 1, "it was not run again"
    assert entry(found, "flashgen-torch").time is not None, "the others are timed"


def test_a_peer_that_goes_wrong_later_loses_its_times() -> None:
    found = run(SMALL, Planted("tired", lambda out, n: out if n < 5 else out * 1.5))
    tired = entry(found, "tired")
    assert tired.status == "wrong" and tired.time is None and tired.samples == [] and tired.ratio is None


def test_a_peer_that_keeps_its_first_answer_is_caught() -> None:
    answers: list[Tensor] = []

    def cached(out: Tensor, n: int) -> Tensor:
        answers.append(out)
        return answers[0]

    assert entry(run(SMALL, Planted("cached", cached)), "cached").status == "wrong"


def test_a_wrong_backward_is_caught() -> None:
    # The right output, a gradient of twice the size.
    twice = Planted("twice", lambda out, n: out + (out - out.detach()))
    found = run(SMALL, twice, op="attention_bwd")
    assert entry(found, "flashgen-torch").status == "ok" and entry(found, "flashgen-torch").time is not None
    assert entry(found, "twice").status == "wrong" and entry(found, "twice").message.startswith("d")


def test_what_is_a_little_beyond_our_budget_is_loose_for_a_peer_and_wrong_for_us() -> None:
    problem = replace(SMALL, dtype="bf16", seqlen_q=64, seqlen_k=64)
    inputs = Inputs(problem, "attention_fwd", cache=0)
    copy = inputs.of("bshd")[0]
    judge = Judge(problem, "attention_fwd", copy)
    assert judge.coverage == "every element"
    (part,) = judge._forward()
    (oracle,), (low,) = part.oracle, part.low
    error = low.double() - oracle
    out = oracle + 2.0 * error  # twice the honest error: beyond (1.5, 1.1), inside twice of them
    assert judge.judge(low, "bshd", slack=1.0)[0] == "ok"
    assert judge.judge(out, "bshd", slack=2.0)[0] == "loose"
    assert judge.judge(out, "bshd", slack=1.0)[0] == "wrong"
    assert judge.judge(oracle + 6.0 * error, "bshd", slack=2.0)[0] == "wrong"


def test_a_peer_that_raises_is_failed_with_its_words() -> None:
    def fall(out: Tensor, n: int) -> Tensor:
        raise RuntimeError("no kernel\nmore lines")

    failed = entry(run(SMALL, Planted("falls", fall)), "falls")
    assert (failed.status, failed.message, failed.time) == ("failed", "RuntimeError: no kernel", None)


def test_peers_in_the_other_layout_are_judged_in_it() -> None:
    found = run(replace(SMALL, seqlen_q=33, seqlen_k=50, causal=False), SdpaMath(), SdpaFlash())
    assert [(one.name, one.status) for one in found.contestants[1:3]] == [("sdpa-math", "ok"), ("sdpa-flash", "ok")]


# -- large problems are judged in part --


def test_rows_of_every_head_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.peers.judge._ALL_PAIRS", 1000)
    monkeypatch.setattr("flashgen.peers.judge._ROWS", 8)
    problem = replace(SMALL, seqlen_q=61, seqlen_k=90)
    right = run(problem, SdpaMath(), Flashgen("auto"))
    assert right.coverage == "24 of 61 rows of every head"
    assert entry(right, "flashgen").status == entry(right, "flashgen-torch").status == "ok"
    nan = Planted(
        "nan", lambda out, n: out.index_fill(1, torch.tensor([10]), float("nan"))
    )  # a row that is not compared
    assert "NaN" in entry(run(problem, nan), "nan").message
    for row in (0, 29, 60):
        for head in range(4):

            def spoil(out: Tensor, n: int, row: int = row, head: int = head) -> Tensor:
                out = out.clone()
                out[1, row, head] += 0.1
                return out

            assert entry(run(problem, Planted("p", spoil)), "p").status == "wrong", (row, head)


def test_some_heads_are_judged_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.peers.judge._ALL_PAIRS", 1000)
    monkeypatch.setattr("flashgen.peers.judge._BLOCK_PAIRS", 500)
    found = run(replace(SMALL, seqlen_k=55), op="attention_bwd")
    assert (
        found.coverage == "2 of 4 key/value heads and their queries" and entry(found, "flashgen-torch").status == "ok"
    )
    assert found.flops == 2.5 * found.problem.flops and found.moved_bytes == 2 * found.problem.io_bytes


def test_as_many_heads_are_judged_as_the_work_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(SMALL, batch=5)  # 10 key/value heads of 2 * 40 * 40 pairs
    copy = Inputs(problem, "attention_bwd", cache=0).of("bshd")[0]
    found = {}
    for heads in (1, 4, 10):
        monkeypatch.setattr("flashgen.peers.judge._ALL_PAIRS", heads * 2 * 40 * 40)
        found[heads] = Judge(problem, "attention_bwd", copy)._heads()
    assert found == {
        1: [(0, 0), (4, 1)],
        4: [(0, 0), (1, 1), (3, 0), (4, 1)],
        10: [(b, h) for b in range(5) for h in range(2)],
    }


@pytest.mark.parametrize("offset", [0, 7, -9])
def test_the_gradients_are_autograds(offset: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (
        torch.randn(n, *heads, d, generator=generator, dtype=torch.float64)
        for n, heads, d in ((20, (2,), 8), (25, (), 8), (25, (), 6), (20, (2,), 6))
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    s = torch.einsum("ihd,jd->hij", leaves[0], leaves[1]) * 0.3
    hidden = torch.arange(25)[None, :] > torch.arange(20)[:, None] + offset
    p = torch.softmax(s.masked_fill(hidden, -torch.inf), -1)
    p = torch.where(hidden.all(-1)[None, :, None], 0.0, p)
    wanted = torch.autograd.grad(torch.einsum("hij,jd->ihd", p, leaves[2]), leaves, dout)
    found = gradients(q, k, v, dout, causal=True, causal_offset=offset, sm_scale=0.3, low=False)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.nan_to_num(other), rtol=1e-10, atol=1e-12)


def test_a_block_of_rows_is_the_problem_with_a_moved_diagonal() -> None:
    q, k = torch.randn(1, 30, 2, 8), torch.randn(1, 40, 2, 8)
    whole, _ = attention_oracle(q, k, k, causal=True, causal_offset=10, sm_scale=0.5)
    part, _ = attention_oracle(q[:, 12:20], k, k, causal=True, causal_offset=22, sm_scale=0.5)
    torch.testing.assert_close(whole[:, 12:20], part, rtol=1e-13, atol=1e-13)


# -- inputs --


def test_inputs_overflow_the_cache_and_differ() -> None:
    inputs = Inputs(SMALL, "attention_bwd", cache=50_000, memory=1 << 30)
    copies = inputs.of("bshd")
    each = sum(x.numel() * x.element_size() for x in (copies[0].q, copies[0].k, copies[0].v, copies[0].dout))
    assert inputs.bytes_each == each and inputs.copies == len(copies)
    assert (inputs.copies - 1) * each >= 2 * 50_000 > (inputs.copies - 2) * each and inputs.overflows
    pointers = {x.data_ptr() for copy in copies for x in (copy.q, copy.k, copy.v, copy.dout)}
    assert len(pointers) == 4 * len(copies), "every tensor has memory of its own"
    assert not torch.equal(copies[0].q, copies[1].q) and abs(float(copies[0].q.std()) - 1.0) < 0.1


def test_both_layouts_hold_the_same_values_contiguously() -> None:
    inputs = Inputs(SMALL, "attention_fwd", cache=0)
    for one, other in zip(inputs.of("bshd"), inputs.of("bhsd"), strict=True):
        for name in "qkv":
            assert torch.equal(getattr(one, name).transpose(1, 2), getattr(other, name))
            assert getattr(one, name).is_contiguous() and getattr(other, name).is_contiguous()
    assert inputs.copies == 2 and inputs.of("bshd") is inputs.of("bshd")


def test_memory_bounds_the_copies_and_it_is_said() -> None:
    inputs = Inputs(SMALL, "attention_fwd", cache=1 << 40, memory=0)
    assert inputs.copies == 2 and not inputs.overflows
    found = compare(SMALL, "attention_fwd", [Flashgen()], clock=Tick(), inputs=inputs, rounds=2)
    assert any("fit into the cache" in note for note in found.notes)


def test_every_copy_is_used_in_turn() -> None:
    seen: list[int] = []

    class Watching(Planted):
        def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            inner = super().forward(problem)

            def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                seen.append(q.data_ptr())
                return inner(q, k, v)

            return call

    inputs = Inputs(SMALL, "attention_fwd", cache=0, memory=1 << 30)
    compare(
        SMALL,
        "attention_fwd",
        [Flashgen("torch"), Watching("w", lambda out, n: out)],
        clock=Tick(),
        inputs=inputs,
        rounds=20,
    )
    assert set(seen) == {copy.q.data_ptr() for copy in inputs.of("bshd")}


# -- the comparison --


def test_the_baseline_has_a_twin_and_no_ratio() -> None:
    found = run(SMALL, SdpaMath())
    assert [one.name for one in found.contestants] == ["flashgen-torch", "sdpa-math", TWIN]
    assert (
        found.baseline.ratio is None and entry(found, TWIN).ratio.median == 1.0 and entry(found, TWIN).verdict is None
    )
    peer = entry(found, "sdpa-math")
    assert peer.ratio.median == 1.0 and peer.verdict == "tied" and len(peer.samples) == 3
    assert peer.tflops == pytest.approx(SMALL.flops / 0.1 / 1e12) and peer.gbps == pytest.approx(SMALL.io_bytes / 1e8)
    assert peer.prepare_s > 0.0 and found.protocol == "side-by-side-2"


def test_an_interrupt_in_the_rounds_keeps_what_was_timed() -> None:
    class Impatient(Tick):
        rounds = 0

        def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
            self.rounds += 1
            if self.rounds == 15:  # the warm-up takes ten
                raise KeyboardInterrupt
            return super().times(calls)

    one = replace(SMALL, batch=1, seqlen_q=2, seqlen_k=2)
    inputs = Inputs(one, "attention_fwd", cache=0)
    found = compare(one, "attention_fwd", [Flashgen("torch")], clock=Impatient(), inputs=inputs, rounds=500)
    assert found.interrupted and len(found.baseline.samples) == 4 and found.baseline.time is not None
    assert any("interrupted" in note for note in found.notes)


def test_the_interpreter_is_never_timed() -> None:
    assert Flashgen("triton").supports(SMALL, "attention_fwd") == INTERPRETED
    with pytest.raises(UnsupportedProblemError, match="interpreter"):
        compare(SMALL, "attention_fwd", [Flashgen("triton")])
    both = run(SMALL, Flashgen("triton"))
    assert entry(both, "flashgen-triton").status == "unsupported" and entry(both, "flashgen-torch").time is not None


def test_nor_when_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_BACKEND", "triton")
    assert Flashgen("auto").supports(SMALL, "attention_fwd") == INTERPRETED
    assert Flashgen("torch").supports(SMALL, "attention_fwd") is None


def test_options_that_cannot_be_drawn_are_refused() -> None:
    for field, why in (
        ("has_score_mod", "are code"),
        ("has_block_mask", "is not drawn"),
        ("varlen", "lengths are the user's"),
    ):
        with pytest.raises(UnsupportedProblemError, match=why):
            run(replace(SMALL, **{field: True}))
    with pytest.raises(UnsupportedProblemError, match="dropout and --cuda-graph"):
        run(replace(SMALL, dropout_p=0.1), cuda_graph=True)


def test_the_ordered_flashgen_asks_for_gradients_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashgen.peers import own

    asked: list[Any] = []
    real = own.attention
    monkeypatch.setattr(own, "attention", lambda *x, **rest: asked.append(rest["deterministic"]) or real(*x, **rest))
    found = run(SMALL, Flashgen("torch", deterministic=True), op="attention_bwd")
    assert [entry.name for entry in found.contestants] == ["flashgen-torch", "flashgen-torch-ordered", TWIN]
    assert [entry.status for entry in found.contestants] == ["ok", "ok", "ok"] and set(asked) == {None, True}
