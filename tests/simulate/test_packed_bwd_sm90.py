"""Packed sequences by the Hopper backward, in the simulator: at the bar of gradients, and what one sequence holds changes no other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import dispatch, execution, interpret, torch_blocked
from flashgen.config import KernelConfig
from flashgen.render import KernelSource
from flashgen.simulator import SCHEDULES, SimulationError
from flashgen.target import Target
from flashgen.variants import by_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from cases import Case
from judge import judge

VARIANT, H100 = by_name("gluon_bwd_sm90"), Target.named("h100")
# Sequences shorter and longer than blocks, more rows than keys and fewer, without rows, without keys, with keys that are not in use.
_LENGTHS = ((30, 70, 60), (0, 5, 5), (40, 3, 0), (140, 90, 90), (64, 128, 64), (1, 1, 1), (90, 150, 33))
_ROW: dict[str, Any] = {
    "backend": "gluon", "dtype": "bf16", "batch": 1, "seqlen_q": 1, "seqlen_k": 1, "heads_kv": 1, "group": 2, "head_dim": 16,
    "head_dim_v": 16, "lse": True, "grad": True, "seed": 3, "lengths": _LENGTHS, "seqused": True, "causal": True,
}  # fmt: skip
_ORDERED = {**_ROW, "deterministic": True}

CASES: dict[str, Case] = {
    "causal": Case(**_ROW),
    "causal, ordered": Case(**_ORDERED),
    "top-left": Case(**{**_ROW, "top_left": True, "seqused": False, "dtype": "fp16"}),
    "all keys, ordered": Case(**{**_ORDERED, "causal": False, "heads_kv": 2, "lse": False}),
    "a window with two ends": Case(**{**_ROW, "causal": False, "window": (20, 30)}),
    "a window, top-left, ordered": Case(**{**_ORDERED, "causal": False, "window": (40, 10), "top_left": True}),
    "a causal window, ordered": Case(**{**_ORDERED, "window": (70, 0), "head_dim": 128, "head_dim_v": 128}),
    "sinks and ALiBi": Case(**{**_ROW, "alibi": "bh", "sinks": True}),
    "ALiBi, top-left": Case(**{**_ROW, "alibi": "h", "top_left": True, "seqused": False}),
    "a cap and a bias of each pair": Case(**{**_ROW, "softcap": 1.0, "bias": "bhij", "group": 1}),
    "a bias of keys": Case(**{**_ROW, "bias": "1h1j"}),
    "a bias of keys, ordered": Case(**{**_ORDERED, "bias": "1h1j"}),
    "a table that learns, ordered": Case(**{**_ORDERED, "score_mod": "table"}),
    "attn_mask": Case(**{**_ROW, "attn_mask": "b1ij", "causal": False}),
    "a mask in a fixed order": Case(**{**_ORDERED, "mask_mod": "columns"}),
    "scores of positions in the sequence": Case(**{**_ROW, "score_mod": "relative", "strides": "padded"}),
    "everything": Case(**{
        **_ROW, "alibi": "bh", "bias": "b1ij", "sinks": True, "dropout_p": 0.4, "window": (90, 2), "softcap": 2.0, "mask_mod": "thirds",
        "score_mod": "squared", "attn_mask": "1hij", "group": 1,
    }),
}  # fmt: skip
LARGE = {
    "the default tile": Case(
        **{**_ROW, "lengths": ((130, 300, 170), (0, 5, 5), (40, 3, 0)), "head_dim": 64, "head_dim_v": 64}
    ),
    "a wide head dim": Case(**{**_ROW, "head_dim": 136, "head_dim_v": 136}),
    "wide, two panels of values, ordered": Case(**{**_ORDERED, "head_dim": 72, "head_dim_v": 192}),
    "wide, a window": Case(**{**_ROW, "head_dim": 192, "head_dim_v": 128, "causal": False, "window": (30, 20)}),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows and keys: more of them in the same time."""
    tile, real = {"BLOCK_M": 64, "BLOCK_N": 64}, type(VARIANT).default

    def default(self: Any, spec: Any, target: Any) -> KernelConfig:
        config = real(self, spec, target)
        return KernelConfig(variant=config.variant, **{**config.to_dict(), **tile})

    monkeypatch.setattr(type(VARIANT), "default", default)


@pytest.fixture
def plain_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The forward's results come from PyTorch: a tile that a neighbour's NaN reached is computed anew, to other bits."""

    def computed(plan: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Any, operands: Any) -> None:
        options, packing = operands.options(plan.problem), execution._packing(plan.problem, operands, q, k)
        torch_blocked.packed_forward(q, k, v, packing, options, out, lse)

    monkeypatch.setattr(execution, "_run_kernel", computed)
    dispatch.forget()
    yield
    monkeypatch.undo()
    dispatch.forget()


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[name.replace(" ", "-") for name in CASES])
def test_case(index: int, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row under another schedule."""
    simulated(monkeypatch, schedule=SCHEDULES[index % 4], seed=index)
    said = judge(list(CASES.values())[index], again=False)  # the same schedule again gives the same bits
    assert said is None, said


@pytest.mark.parametrize("name", LARGE)
def test_other_tiles(name: str) -> None:
    said = judge(LARGE[name], again=False)
    assert said is None, said


def simulated(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str] | None = None, **settings: Any) -> None:
    """Simulate with settings from now on, the backward's text changed first."""
    real = interpret.simulate

    def changed(source: KernelSource, arguments: dict[str, Any], **more: Any) -> Any:
        if source.spec.op != "attention_bwd":
            return real(source, arguments, **more)
        return real(source if change is None else change(source.text), arguments, **more, **settings)

    monkeypatch.setattr(interpret, "simulate", changed)


_FORWARDS: dict[Case, dict[str, Tensor]] = {}


def with_known_forward(case: Case, real: Any) -> Any:
    """The forward that a broken backward follows runs once for all copies of a case."""

    def run(source: KernelSource, tensors: dict[str, Any], outputs: tuple[str, ...], values: dict[str, Any]) -> None:
        if source.spec.op == "attention_bwd":
            real(source, tensors, outputs, values)
            return
        if case not in _FORWARDS:
            real(source, tensors, outputs, values)
            _FORWARDS[case] = {name: tensors[name].clone() for name in outputs if tensors[name] is not None}
        for name, x in _FORWARDS[case].items():
            tensors[name].copy_(x)

    return run


# -- other sequences --


def gradients(spoiled: tuple[int, ...], value: float, **options: Any) -> list[Tensor]:
    """Gradients of every sequence's rows and keys, where some sequences hold nothing but a value."""
    lengths = [length[:2] for length in _LENGTHS]
    sums = torch.tensor([[0, 0], *lengths], dtype=torch.int32).cumsum(0).int()
    generator = torch.Generator().manual_seed(5)
    shapes = ((sums[-1, 0], 2), (sums[-1, 1], 1), (sums[-1, 1], 1), (sums[-1, 0], 2))
    data = [torch.randn(int(size), heads, 16, generator=generator).bfloat16() for size, heads in shapes]
    for number in spoiled:
        for x, side in zip(data, (0, 1, 1, 0), strict=True):
            x[sums[number, side] : sums[number + 1, side]] = value
    q, k, v = (x.requires_grad_() for x in data[:3])
    out = flashgen.varlen_attention(q, k, v, *sums.T.contiguous(), 140, 150, backend="gluon", **options)
    out.backward(data[3])  # type: ignore[union-attr]
    found = []
    for x, side in ((q, 0), (k, 1), (v, 1)):
        assert x.grad is not None
        found += [
            part
            for number, part in enumerate(x.grad.split([length[side] for length in lengths]))
            if number not in spoiled
        ]
    return found


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (20, 30)}, {}], ids=str)
@pytest.mark.parametrize("spoiled", [(0, 2, 4, 6), (1, 3, 5)], ids=str)
def test_a_sequence_of_nan_changes_no_other(
    spoiled: tuple[int, ...], options: dict[str, Any], small: None, plain_forward: None
) -> None:
    """A block of rows or keys that ends behind its sequence begins the next one: neither read nor written."""
    clean, beside = (gradients(spoiled, value, deterministic=True, **options) for value in (0.0, torch.nan))
    for x, y in zip(clean, beside, strict=True):
        assert torch.equal(x, y)


ORDERED = {"causal": {"causal": True}, "window": {"window_size": (40, 10)}, "all": {}}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", ORDERED)
def test_ordered_sums_are_the_same_bits_under_any_schedule(
    name: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for seed in range(6):
        with monkeypatch.context() as patch:
            simulated(patch, schedule=SCHEDULES[seed % 4], seed=seed, processors=1 + seed % 4)
            found = gradients((), 0.0, deterministic=True, **ORDERED[name])
        seen.add(b"".join(x.float().numpy().tobytes() for x in found))
    assert len(seen) == 1


# -- broken copies --

CAUSAL, TURNS, WINDOW = CASES["causal"], CASES["causal, ordered"], CASES["a window with two ends"]
TOP_LEFT, ALL = CASES["top-left"], CASES["all keys, ordered"]
MUTANTS: tuple[tuple[str, Case, str, str], ...] = (
    ("rows from where keys start", CAUSAL, "                    first_q + first_row,\n", "                    first_k + first_row,\n"),
    ("rows of the first sequence", CAUSAL, "                    first_q + first_row,\n", "                    first_row,\n"),
    ("keys from where rows start", CAUSAL, "                    first_k + first_key,\n", "                    first_q + first_key,\n"),
    ("keys that are not in use are loaded", ALL, "                    first_k,\n                    seqlen_k,\n", "                    first_k,\n                    stored_k,\n"),
    ("dk and dv where keys of the last start", CAUSAL, "place(first_k, stored_k, start_n, BLOCK_N)", "place(first_k - 1, stored_k, start_n, BLOCK_N)"),
    ("dk and dv in the next sequence", CAUSAL, "place(first_k, stored_k, start_n, BLOCK_N)", "place(first_k, stored_k + BLOCK_N, start_n, BLOCK_N)"),
    ("keys that are not in use keep what they held", CAUSAL, "place(first_k, stored_k, start_n, BLOCK_N)", "place(first_k, seqlen_k, start_n, BLOCK_N)"),
    ("sums of the first sequence", CAUSAL, "row_block * (BLOCK_M", "m_block * (BLOCK_M"),
    ("sums of blocks without the one more of each sequence", CAUSAL, "first_block = first_q // BLOCK_M + off_b", "first_block = first_q // BLOCK_M"),
    ("lse of the first sequence", CAUSAL, "row = first_block * BLOCK_M + start_m", "row = start_m"),
    ("turns of the first sequence", TURNS, "all_m_blocks + row_block", "all_m_blocks + m_block"),
    ("turns of one head", TURNS, "off_bh * all_m_blocks", "0 * all_m_blocks"),
    ("turns of keys that are not in use", TURNS, "gl.cdiv(end_key, BLOCK_N),", "gl.cdiv(stored_k, BLOCK_N),"),
    ("turns of keys that nobody sees", ALL, "end = gl.maximum(gl.where(start_n < seqlen_k, end, begin), begin)", "end = gl.maximum(end, begin)"),
    ("a block of the next sequence", CAUSAL, "// BLOCK_M + middle <= block", "// BLOCK_M + middle < block"),
    ("two sequences in one place", CAUSAL, "(others < off_b)", "(others <= off_b)"),
    ("places of nobody are the first sequence's", CAUSAL, "place * 0 + (1 << 28) // BLOCK_N", "place * 0"),
    ("places beyond the last block are not written", CAUSAL, "    if off_b == 0:\n", "    if off_b < 0:\n"),
    ("blocks of keys of sequences as long as the first", CAUSAL, "    count = tl.cdiv(keys, BLOCK_N)\n", "    count = 1\n"),
    ("too few blocks of keys", CAUSAL, "total_k // BLOCK_N + batch", "-(-total_k // BLOCK_N)"),
    ("too few blocks of rows", CAUSAL, "total_q // BLOCK_M + batch, ", "-(-total_q // BLOCK_M), "),
    ("seqused_k ignored", CAUSAL, "seqlen_k = gl.minimum(seqlen_k, gl.load(seqused_k_ptr + off_b))", "seqlen_k = seqlen_k + 0"),
    ("always bottom-right", TOP_LEFT, "(seqlen_k - seqlen_q) * bottom_right", "(seqlen_k - seqlen_q)"),
    ("the diagonal of all keys", CAUSAL, "(seqlen_k - seqlen_q) * bottom_right", "(stored_k - seqlen_q) * bottom_right"),
    ("lse read from the start", CAUSAL, "row_start = off_h * total_q + first_q", "row_start = off_h * total_q"),
    ("dq written from the start", CAUSAL, "    m = (first_q + rows)[:, None]\n    dq = ", "    m = (0 * first_q + rows)[:, None]\n    dq = "),
    ("delta of the first rows", CAUSAL, "    m = (first_q + rows)[:, None]\n    mask", "    m = (0 * first_q + rows)[:, None]\n    mask"),
    ("dq of the next sequence's rows", CAUSAL, "mask = (rows < seqlen_q)[:, None]", "mask = (rows < seqlen_q + 1)[:, None]"),
    ("the window's last row", CASES["a window, top-left, ordered"], "end_row = gl.minimum(seqlen_q, seqlen_k - causal_offset + window_left)", "end_row = gl.minimum(seqlen_q, seqlen_k - causal_offset + window_left - 1)"),
    ("the window's first key", WINDOW, "first_key = gl.maximum(causal_offset - window_left, 0)", "first_key = gl.maximum(causal_offset - window_left + 1, 0)"),
    ("one sign of distances, top-left", CASES["ALiBi, top-left"], "bool(bottom_right)", "True"),
    ("wraps that do not come back", CAUSAL, "[2**34 - step, step,", "[2**34, step,"),
    ("sinks of one head", CASES["sinks and ALiBi"], "* delta).sum(1))", "* delta).sum((0, 1), keepdim=True)[0])"),
)  # fmt: skip
# What only NaN beyond a sequence tells.
SPOILED: tuple[tuple[str, str, str, str], ...] = (
    ("rows of the next sequence", "causal", "1073741824 - count + row)", "1073741824 - count - ROWS + row)"),
    ("rows of the next sequence before the first", "window", "(row < 0) & (row + ROWS <= count)", "row < 0"),
)


def broken(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, f"{old}: not in the text any more"
        return text.replace(old, new)

    return change


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[name.replace(" ", "-") for name, *_ in MUTANTS])
def test_a_broken_line_is_noticed(index: int, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, case, old, new = MUTANTS[index]
    simulated(monkeypatch, broken(old, new), schedule="priority", seed=3, max_steps=200_000)
    monkeypatch.setattr(interpret, "_run", with_known_forward(case, interpret._run))
    try:
        said = judge(case, again=False)
    except SimulationError:
        return
    assert said is not None, f"{name}: nobody noticed"


@pytest.mark.parametrize("index", range(len(SPOILED)), ids=[name.replace(" ", "-") for name, *_ in SPOILED])
def test_a_broken_end_is_noticed(index: int, small: None, plain_forward: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind, old, new = SPOILED[index]
    options = ORDERED[kind]

    def noticed() -> bool:
        try:
            clean, beside = (gradients((1, 3, 5), value, deterministic=True, **options) for value in (0.0, torch.nan))
        except SimulationError:
            return True
        return not all(torch.equal(x, y) for x, y in zip(clean, beside, strict=True))

    assert not noticed()
    simulated(monkeypatch, broken(old, new))
    assert noticed(), f"{name}: nobody noticed"


def test_scores_ahead_are_refused_where_a_block_may_have_no_step() -> None:
    spec = flashgen.AttentionSpec.from_key("attention_bwd-bf16-d128-causal-varlen")
    ahead = KernelConfig(variant=VARIANT.name, **{**VARIANT.default(spec, H100).to_dict(), "SCORES_AHEAD": True})
    assert "may have none" in str(VARIANT.illegal(spec, H100, ahead))
    assert all(VARIANT.illegal(spec, H100, known.config) is None for known in VARIANT.known_good(spec, H100))
