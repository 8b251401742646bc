"""What a mod must not do, each with the error that says so: the operation or the value, and the user's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mods_running import CPU

import flashgen
from flashgen import mods
from flashgen.errors import InvalidProblemError, UnsupportedProblemError

TABLE = torch.arange(16, dtype=torch.int32)
COMPLEX = torch.zeros(4, dtype=torch.complex64)


def branches(b: Any, h: Any, q: Any, k: Any) -> Any:
    if q > 3:
        return q >= k
    return q < k


def here(function: Callable[..., Any], line: int = 1) -> str:
    """The place of a line of a function."""
    return f"test_mods_errors.py:{function.__code__.co_firstlineno + line}"


def trace_mask(function: Callable[..., Any]) -> mods.Program:
    return mods.program(None, {"mask_mod": function}, CPU)[0]


def trace_score(function: Callable[..., Any]) -> mods.Program:
    return mods.program(function, {}, CPU)[0]


UNSUPPORTED: dict[str, tuple[Callable[..., Any], str]] = {
    "cumsum": (lambda b, h, q, k: q.cumsum(0) > 3, "aten.cumsum.default"),
    "a reduction of a captured tensor": (lambda b, h, q, k: TABLE.max() > q, "aten.max.default"),
    "random numbers": (lambda b, h, q, k: torch.rand(()) < q, "aten.rand.default"),
    "float remainder": (lambda b, h, q, k: q.float() % 3.0 < 1, "aten.remainder.Scalar of float32"),
    "float floor division": (lambda b, h, q, k: q / 2 // 3 < 1, "aten.floor_divide.default of float32"),
    "an integer to a captured power": (lambda b, h, q, k: q**k > 3, "aten.pow.Tensor_Tensor of int32"),
    "a boolean mask as an index": (lambda b, h, q, k: TABLE[TABLE > 3] > q, "an index of shape (16,) and bool"),
    "an array of indices": (lambda b, h, q, k: TABLE[TABLE] > q, "an index of shape (16,) and int32"),
    "assignment": (lambda b, h, q, k: TABLE.__setitem__(0, q), "an assignment"),
    "a write into a view": (lambda b, h, q, k: q.view_as(q).add_(1) > k, "aten.add_.Tensor on a view"),
    "a write into a row": (lambda b, h, q, k: TABLE[3].add_(q) > k, "aten.add_.Tensor on a view"),
    "reinterpreted bits": (lambda b, h, q, k: q.float().view(torch.int32) > 3, "reinterprets bits"),
    "where a tensor lies": (lambda b, h, q, k: q + TABLE.storage_offset() > k, "lies in memory (storage_offset())"),
    "where a view lies": (lambda b, h, q, k: q + TABLE[2:].storage_offset() > k, "lies in memory (storage_offset())"),
    "strides of a view": (lambda b, h, q, k: q + TABLE.view(4, 4).T.stride(0) > k, "lies in memory (stride())"),
    "a matrix product": (lambda b, h, q, k: TABLE.view(4, 4) @ TABLE.view(4, 4) > q, "aten.mm.default"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_operation_that_kernels_lack_is_named_with_its_line(name: str) -> None:
    function, operation = UNSUPPORTED[name]
    with pytest.raises(UnsupportedProblemError) as raised:
        trace_mask(function)
    message = str(raised.value)
    assert operation in message
    assert here(function, 0) in message
    assert message.startswith("mask_mod uses")
    assert "backend='torch'" in message


class OwnBackward(torch.autograd.Function):
    """Its gradient is not that of what it computes: a trace of the forward would lose it."""

    @staticmethod
    def forward(x: Any) -> Any:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 3 * (1 - ctx.saved_tensors[0] ** 2)


class OwnBackwardWithContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad


@pytest.mark.parametrize("own", [OwnBackward, OwnBackwardWithContext])
def test_a_function_with_its_own_backward_is_left_to_pytorch(own: Any) -> None:
    with pytest.raises(UnsupportedProblemError, match=rf"autograd.Function {own.__name__}, whose backward is its own"):
        trace_score(lambda s, b, h, q, k: 2 * own.apply(s / 2))
    trace_mask(lambda b, h, q, k: own.apply(q.float()) > 0)  # a mask has no gradient


def test_the_torch_backend_takes_a_functions_own_backward() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    found = []
    for mod in (lambda s, b, h, i, j: OwnBackward.apply(s), lambda s, b, h, i, j: 3 * s.tanh() - 2 * s.tanh().detach()):
        out = flashgen.attention(q, k, v, score_mod=mod)
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mod_may_print_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        print(q, f"{k}", repr(TABLE[q]), q - k)
        return q >= k

    trace_mask(mask)
    assert "traced(q_idx, torch.int32) traced(kv_idx, torch.int32) traced(load0(q_idx)" in capsys.readouterr().out


def test_what_is_reduced_is_written_out_up_to_64_elements() -> None:
    long = torch.zeros(4, 65)
    with pytest.raises(UnsupportedProblemError, match="over 65 elements: 1 to 64 are written out"):
        trace_score(lambda s, b, h, q, k: s + long[h].sum())
    with pytest.raises(UnsupportedProblemError, match="of a single value: it would reduce over scores"):
        trace_score(lambda s, b, h, q, k: s - s.sum())


VALUES: dict[str, Callable[..., Any]] = {
    "and": lambda b, h, q, k: (q >= k) and (q < 3),
    "not": lambda b, h, q, k: not (q >= k),
    "conditional": lambda b, h, q, k: q >= k if q > 3 else q < k,
    "int": lambda b, h, q, k: q >= int(k),
    "float": lambda b, h, q, k: q >= float(k),
    "item": lambda b, h, q, k: q >= k.item(),
    "range": lambda b, h, q, k: sum(q - k for _ in range(q)) > 0,
    "index of a list": lambda b, h, q, k: q >= [1, 2, 3][k],
    "value of a captured tensor": lambda b, h, q, k: q >= int(TABLE[3]),
    "tolist": lambda b, h, q, k: q >= TABLE.tolist()[3],
    "slice to a traced end": lambda b, h, q, k: TABLE[:q] > 3,
    "chained comparison": lambda b, h, q, k: 0 <= q <= k,
}


@pytest.mark.parametrize("name", VALUES)
def test_control_flow_on_values_is_refused_with_its_line(name: str) -> None:
    with pytest.raises(InvalidProblemError, match="reads the value of a tensor in Python") as raised:
        trace_mask(VALUES[name])
    assert here(VALUES[name], 0) in str(raised.value)
    assert "torch.where" in str(raised.value)


def test_the_line_is_the_one_of_the_branch_and_of_the_inner_function() -> None:
    with pytest.raises(InvalidProblemError) as raised:
        trace_mask(lambda b, h, q, k: branches(b, h, q, k) & (q >= k))
    assert here(branches) in str(raised.value)


RESULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "mask of numbers": ("mask", lambda b, h, q, k: q - k, "must return torch.bool"),
    "score of conditions": ("score", lambda s, b, h, q, k: s > 0, "returns torch.bool"),
    "a whole table": ("mask", lambda b, h, q, k: TABLE > 3, "returns shape (16,)"),
    "a row of a table": ("score", lambda s, b, h, q, k: s + TABLE.view(4, 4)[h], "returns shape (4,)"),
    "a number": ("score", lambda s, b, h, q, k: 3.0, "returns a float"),
    "a Python bool": ("mask", lambda b, h, q, k: True, "returns a bool"),
    "nothing": ("mask", lambda b, h, q, k: None, "returns a NoneType"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_of_the_wrong_kind_is_refused(name: str) -> None:
    kind, function, message = RESULTS[name]
    with pytest.raises(InvalidProblemError) as raised:
        (trace_mask if kind == "mask" else trace_score)(function)
    assert message in str(raised.value)
    assert here(function, 0) in str(raised.value)


def test_what_the_function_raises_is_said_with_its_line() -> None:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= undefined_name  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(InvalidProblemError, match="raises NameError") as raised:
        trace_mask(mask)
    assert here(mask) in str(raised.value)
    with pytest.raises(InvalidProblemError, match="positional argument"):
        trace_mask(lambda b, h, q: q >= 0)


def test_writing_into_a_captured_tensor_is_refused() -> None:
    table = torch.zeros(())
    with pytest.raises(InvalidProblemError, match="writes into a tensor that it captures"):
        trace_score(lambda s, b, h, q, k: table.add_(s))


def test_captured_tensors_must_be_on_the_device_and_of_a_kernels_type() -> None:
    elsewhere = torch.zeros(4, device="meta")
    with pytest.raises(InvalidProblemError, match="elsewhere that it captures is on meta, q is on cpu") as raised:
        trace_score(lambda s, b, h, q, k: s + elsewhere[h])
    assert "test_mods_errors.py" in str(raised.value)
    with pytest.raises(InvalidProblemError, match="complex64"):
        trace_score(lambda s, b, h, q, k: s + COMPLEX[h].real)


def test_a_number_on_the_cpu_may_serve_any_device() -> None:
    width = torch.tensor(5)
    made, _ = mods.program(None, {"mask_mod": lambda b, h, q, k: q - k < width}, CPU)
    assert [row.shape for row in made.captures] == [()]


def test_a_number_elsewhere_that_wants_a_gradient_is_refused() -> None:
    temperature = torch.tensor(2.0, requires_grad=True)  # what a kernel gets is a copy, whose gradient would be lost
    with pytest.raises(InvalidProblemError, match="temperature that it captures is on cpu, q is on meta"):
        mods.program(lambda s, b, h, q, k: s * temperature, {}, torch.device("meta"))


def test_an_index_that_leaves_a_table_is_refused_before_any_launch() -> None:
    sizes = {"batch": 2, "num_heads": 4, "seqlen_q": 20, "seqlen_k": 16}
    bias = torch.zeros(31)

    def table_by_query(b: Any, h: Any, q: Any, k: Any) -> Any:
        return TABLE[q] >= k

    made, tensors = mods.program(None, {"mask_mod": table_by_query}, CPU)
    with pytest.raises(
        InvalidProblemError, match=r"reads TABLE outside its bounds .*runs from 0 to 19.* 16 elements"
    ) as raised:
        made.check_bounds(tensors, **sizes)
    assert here(table_by_query) in str(raised.value)
    assert "q_idx < 20" in str(raised.value)
    with pytest.raises(InvalidProblemError, match="from 0 to 16"):
        made.check_bounds(tensors, **{**sizes, "seqlen_q": 17})
    made.check_bounds(tensors, **{**sizes, "seqlen_q": 16})

    made, tensors = mods.program(lambda s, b, h, q, k: s + bias[q - k + 15], {}, CPU)
    with pytest.raises(InvalidProblemError, match="from 0 to 34"):
        made.check_bounds(tensors, **sizes)
    made.check_bounds(tensors, **{**sizes, "seqlen_q": 16})

    made, tensors = mods.program(lambda s, b, h, q, k: s + bias[(q - k).clamp(-15, 15)], {}, CPU)
    made.check_bounds(tensors, **sizes)


def test_an_index_that_cannot_be_decided_is_left_alone() -> None:
    wide = torch.zeros(16)
    made, tensors = mods.program(lambda s, b, h, q, k: s + wide[TABLE[q] % 7] + wide[(q - q) + k], {}, CPU)
    made.check_bounds(tensors, batch=1, num_heads=1, seqlen_q=16, seqlen_k=16)


def test_every_index_can_be_tried_for_debugging() -> None:
    sizes = {"batch": 2, "num_heads": 3, "seqlen_q": 16, "seqlen_k": 16}
    wide = torch.zeros(16)
    shifted = torch.tensor([0, 3, 15, 16], dtype=torch.int32)
    made, tensors = mods.program(lambda s, b, h, q, k: s + wide[shifted[q % 3] + h * 0] + wide[(q - q) + k], {}, CPU)
    made.check_every_index(tensors, **sizes)
    made, tensors = mods.program(lambda s, b, h, q, k: s + wide[shifted[k % 4]], {}, CPU)
    made.check_bounds(tensors, **sizes)
    with pytest.raises(InvalidProblemError, match=r"is 16 at kv_idx = 3, .* 16 elements") as raised:
        made.check_every_index(tensors, **sizes)
    assert "test_mods_errors.py" in str(raised.value)
    made, tensors = mods.program(lambda s, b, h, q, k: s + wide[(q - k).abs() + h], {}, CPU)
    with pytest.raises(InvalidProblemError, match="is 16 at h = 1, q_idx = 0, kv_idx = 15"):
        made.check_every_index(tensors, **sizes)


def test_stand_ins_do_not_outlive_the_trace() -> None:
    kept = []

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        kept.append(q)
        return q >= k

    trace_mask(mask)
    with pytest.raises(InvalidProblemError, match="must not keep its arguments"):
        kept[0] + 1
