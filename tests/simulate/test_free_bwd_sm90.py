"""The Hopper backward with options, run by the simulator, at the bar of gradients."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from free_backward import VARIANT, Free, launch, make, run
from free_cases import (
    BIASES,
    CASES,
    GROUPS,
    LEARNED,
    TALL,
    WIDE,
    bands_of_heads,
    chunks,
    own_document,
    prefix,
    shuffled,
)

import flashgen
from flashgen.simulator import SCHEDULES


@pytest.mark.sampled(every=2, by="index")  # the modes share their references
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "ordered"])
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.why.replace(" ", "-") for case in CASES])
def test_case(index: int, deterministic: bool) -> None:
    """Each row in both modes, each under another schedule."""
    case = CASES[index]
    run(case, index, deterministic=deterministic, schedule=SCHEDULES[(index + 2 * deterministic) % 4]).require(case.why)


def test_loops_apart_as_under_triton_3_6() -> None:
    """The simulator has the names of both versions, and takes the text's newer half: here the older one."""
    sizes = {"seqlen_q": 300, "seqlen_k": 260}
    case = Free(why="a window", sizes=sizes, window=(70, 90), knobs={"BLOCK_M": 64, "BLOCK_N": 64})
    text = case.source.text
    older = text.replace('APART = gl.constexpr(not hasattr(gl, "barrier"))', "APART = gl.constexpr(True)")
    assert older != text and "nought_of(masked_end)" in text and "nought_of(unmasked_end)" in text
    buffers, values = make(case, 3)
    launch(case, buffers, values, text=older, schedule="random", seed=5)
    buffers.check().require(case.why)


SUMS = (*BIASES, *LEARNED)


@pytest.mark.sampled(every=2, by="index")  # the modes share their references
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "ordered"])
@pytest.mark.parametrize("index", range(len(SUMS)), ids=[case.why.replace(" ", "-") for case in SUMS])
def test_gradients_of_a_bias_and_of_captured_tensors(index: int, deterministic: bool) -> None:
    schedule = SCHEDULES[(index + 2 * deterministic) % 4]
    run(SUMS[index], index, deterministic=deterministic, schedule=schedule).require(SUMS[index].why)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(
    "case", (BIASES[2], BIASES[3], LEARNED[0], LEARNED[4]), ids=lambda case: case.why.replace(" ", "-")
)
def test_sums_in_a_fixed_order_have_the_same_bits_under_every_schedule(case: Free) -> None:
    found = []
    for schedule in SCHEDULES:
        buffers, values = make(case, 4)
        launch(case, buffers, values, deterministic=True, schedule=schedule, seed=7)
        found.append({name: x.clone() for name, x in buffers.outputs.items()})
    for other in found[1:]:
        for name, x in other.items():
            assert torch.equal(x, found[0][name]), name


def test_what_is_no_number_makes_a_sum_in_a_fixed_order_none() -> None:
    """One row of dout: integers would hide it."""
    case = BIASES[3]
    buffers, values = make(case, 4)
    buffers.inputs["dout"][0, 5, 0] = torch.nan  # type: ignore[index]
    buffers.before["dout"] = buffers.allocations["dout"].clone()
    launch(case, buffers, values, deterministic=True)
    assert buffers.outputs["dbias"].isnan().all()


def test_what_is_refused_has_its_reason() -> None:
    """Nothing in either order but a mod that was not traced."""
    for case in (LEARNED[0], BIASES[0], CASES[9]):
        for deterministic in (False, True):
            problem = replace(case.problem, bias_grad=case.dbias, deterministic=deterministic)
            assert VARIANT.refuses(problem) is None
    assert "traced" in str(VARIANT.refuses(replace(CASES[9].problem, mods=None)))


def carried(text: str) -> list[str]:
    """Scalars that a loop hands on to another of its own: Triton 3.6 compiles every pass with the first value."""
    found = []
    for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
        stored = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        for loop in (node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While))):
            before = {name.id for name in stored if name.lineno < loop.lineno} | {x.arg for x in function.args.args}
            inside = {
                name.id for name in ast.walk(loop) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
            for node in ast.walk(loop):
                if (
                    isinstance(node, ast.Assign)
                    and isinstance(node.value, ast.Name)
                    and node.value.id in before & inside
                ):
                    found.append(ast.unparse(node))
    return found


def test_no_loop_hands_a_scalar_on() -> None:
    assert carried("def f():\n a = 0\n b = 1\n for i in range(2):\n  a = b\n  b = 2") == ["a = b"]
    for case in CASES:
        assert not carried(case.source.text), case.why


KNOBS: tuple[dict[str, Any], ...] = (
    {"BLOCK_M": 64, "BLOCK_N": 64, "DQ_STAGES": 2},
    {"BLOCK_M": 64, "SCORES_AHEAD": True, "DV_FIRST": True},
    {"PEELED": False},
)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_structure(knobs: dict[str, Any]) -> None:
    for number, case in enumerate((
        Free(why="window", sizes={**WIDE, "num_heads_q": 2}, window=(80, 100), knobs=knobs),
        Free(why="mask", sizes=TALL, mask_mod=prefix, knobs=knobs),
        Free(why="scores", sizes=GROUPS, causal="bottom-right", alibi="h", softcap=1.0, knobs=knobs),
    )):  # fmt: skip
        run(case, number, schedule=SCHEDULES[number], deterministic=number != 1).require(f"{case.why}: {knobs}")


def bits(case: Free, **options: Any) -> tuple[bytes, ...]:
    """The bits of a launch's gradients; dq in fp32, since rounding to 16 bits hides the order of a few sums."""
    buffers, values = make(case, 5)
    dq = torch.empty(buffers.outputs["dq"].shape)
    buffers = replace(buffers, outputs={**buffers.outputs, "dq": dq})
    launch(case, buffers, values, **options)
    return tuple(x.float().numpy().tobytes() for x in buffers.outputs.values())


SMALL: dict[str, Any] = {"head_dim": 16, "knobs": {"BLOCK_M": 64, "BLOCK_N": 64}}
ORDERED = (
    Free(why="window", sizes={"seqlen_q": 200, "seqlen_k": 260}, window=(70, 20), **SMALL),
    Free(why="mask", sizes={"seqlen_q": 260, "seqlen_k": 200}, mask_mod=chunks, **SMALL),
    Free(why="heads", sizes={"seqlen_q": 130, "seqlen_k": 200, "num_heads_q": 2}, mask_mod=bands_of_heads, **SMALL),
    Free(why="unknown", sizes={"seqlen_q": 130, "seqlen_k": 200}, mask_mod=own_document, known=False, **SMALL),
    Free(why="scores", sizes={"seqlen_q": 130, "seqlen_k": 200}, alibi="h", causal="bottom-right", **SMALL),
)


@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.why)
def test_ordered_sums_are_the_same_bits_under_any_schedule(case: Free) -> None:
    seen = {bits(case, schedule=SCHEDULES[seed % 4], seed=seed, processors=1 + seed % 4) for seed in range(12)}
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["q", "dout"])
def test_a_row_that_sees_no_key_may_hold_anything(name: str) -> None:
    """A window beyond the last key: such rows are not read."""
    case = Free(why="", sizes={"seqlen_q": 300, "seqlen_k": 100}, window=(20, 5))
    results = []
    for value in (0.0, torch.nan):
        buffers, values = make(case, 2)
        tensor = buffers.inputs[name]
        assert tensor is not None
        unseen = ~buffers.call.visible().any(-1).all(1)[0]
        assert unseen.any()
        tensor[:, unseen] = value
        launch(case, buffers, values, schedule="lazy")
        results.append(buffers.outputs)
    for key, gradient in results[0].items():
        assert torch.equal(gradient, results[1][key])
    assert not results[0]["dq"][:, unseen].any()


def test_a_nan_that_somebody_sees_is_not_hidden() -> None:
    """A key that nobody sees is zeroed where it is multiplied; one that a row sees leaves NaN in that row's gradient."""
    case = Free(why="", sizes={"seqlen_q": 130, "seqlen_k": 130}, mask_mod=shuffled)
    buffers, values = make(case, 2)
    k, lse = buffers.inputs["k"], buffers.inputs["lse"]
    assert k is not None and lse is not None
    k[0, 20] = torch.nan
    lse.fill_(torch.nan)  # as a forward that met it
    launch(case, buffers, values)
    assert buffers.outputs["dq"].isnan().all()


@pytest.mark.parametrize(
    "of", [lambda x: x.abs(), lambda x: (2.0 * x).abs(), lambda x: torch.sign(x - 0.1) * torch.sigmoid(-x)]
)
def test_a_value_of_a_head_goes_through_functions_and_choices(of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What depends on the head alone is a scalar of the kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 33, 2, 32, generator=generator).half() for _ in range(3))
    table = torch.randn(2, 3, generator=generator, requires_grad=True)

    def slope(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s - of(table[h, 1]) * (i - j).abs()

    found = []
    for backend in ("gluon", "torch"):
        out: Any = flashgen.attention(q, k, v, score_mod=slope, backend=backend)  # type: ignore[call-overload]
        (gradient,) = torch.autograd.grad(out.float().square().sum(), table)
        found += [out, gradient]
    torch.testing.assert_close(found[0], found[2], atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(found[1], found[3], atol=0.2, rtol=2e-3)
