"""What a mod reads: an index out of bounds, a tensor elsewhere, a value in Python. Refused in words on every backend, before any launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen import InvalidProblemError, checks, execution

SIZE = 20
t = torch.randn(5)  # its name is too short for a kernel: there it is called `mod_t`
POSITIONS = torch.tensor([0, 4, 5, 1] * 5, dtype=torch.int32)


def qkv(grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, SIZE, 2, 16).requires_grad_(grad) for _ in range(3)]


def packed(grad: bool = False) -> tuple[Any, ...]:
    ends = torch.tensor([0, 12, 40], dtype=torch.int32)
    return (*(x.detach().flatten(0, 1).requires_grad_(grad) for x in qkv()), ends, ends, 28, 28)


def attend(**options: Any) -> Any:
    return flashgen.attention(*qkv(), **options)


def train(**options: Any) -> Any:
    return flashgen.attention(*qkv(grad=True), **options)


def explain(**options: Any) -> Any:
    return flashgen.explain(*qkv(), **options)


def attend_packed(**options: Any) -> Any:
    return flashgen.varlen_attention(*packed(), **options)


CALLS = [attend, train, explain, attend_packed]
BACKENDS = ["auto", "torch", "triton"]
BY_KEY: dict[str, Any] = {
    "score_mod": {"score_mod": lambda s, b, h, i, j: s + t[j]},
    "mask_mod": {"mask_mod": lambda b, h, i, j: t[j] > 0},
}


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "allocate", lambda *_: pytest.fail("an output was allocated"))


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", BY_KEY)
@pytest.mark.parametrize("call", CALLS)
def test_an_index_that_surely_leaves_a_tensor_is_refused(call: Callable[..., Any], kind: str, backend: str) -> None:
    longest = 28 if call is attend_packed else SIZE
    with pytest.raises(
        InvalidProblemError,
        match=rf"a mod reads t outside its bounds .*test_bad_reads.py:\d+\): its index in dimension 0 runs from 0 to {longest - 1}, "
        rf"and the tensor of shape \(5,\) has 5 elements there. kv_idx < {longest} in this call",
    ):
        call(**BY_KEY[kind], backend=backend)


@pytest.mark.usefixtures("no_launch")
def test_that_of_a_block_mask_too() -> None:
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, SIZE, SIZE, device="cpu")
    block.mask_mod = lambda b, h, i, j: t[j] > 0
    with pytest.raises(InvalidProblemError, match=r"a mod reads t outside its bounds"):
        attend(block_mask=block)


def test_the_last_element_and_one_from_the_end_are_inside() -> None:
    table = torch.randn(SIZE)
    attend(score_mod=lambda s, b, h, i, j: s + table[j] + table[j - SIZE])


def undecided(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + t[POSITIONS[j]]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", [attend, attend_packed])
def test_an_index_that_only_its_values_decide_is_an_error_in_words(call: Callable[..., Any], grad: bool) -> None:
    short = packed(grad) if call is attend_packed else qkv(grad)
    function = flashgen.varlen_attention if call is attend_packed else flashgen.attention
    values = torch.tensor([0, 4, 5, 1] * 7, dtype=torch.int32)
    with pytest.raises(InvalidProblemError, match=r"outside its bounds: .*FLASHGEN_CHECK_VALUES=1") as raised:
        function(*short, score_mod=lambda s, b, h, i, j: s + t[values[j]])
    assert isinstance(raised.value.__cause__, IndexError)


def test_so_is_one_that_goes_wrong_in_the_backward() -> None:
    positions = torch.zeros(SIZE, dtype=torch.int32)
    out = flashgen.attention(*qkv(grad=True), score_mod=lambda s, b, h, i, j: s + t[positions[j]])
    positions.numpy()[3] = 9  # that nobody counts
    with pytest.raises(InvalidProblemError, match=r"outside its bounds: .*FLASHGEN_CHECK_VALUES=1"):
        out.sum().backward()  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [attend, train, explain])
def test_the_switch_looks_at_every_index(
    call: Callable[..., Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHGEN_CHECK_VALUES", "1")
    with pytest.raises(
        InvalidProblemError,
        match=r"a mod reads t outside its bounds .*: its index in dimension 0 is 5 at kv_idx = 2, and",
    ):
        call(score_mod=undecided, backend=backend)


def test_the_switch_keeps_to_each_sequence_of_a_packed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CHECK_VALUES", "1")
    flat, starts, limit = torch.randn(40), torch.tensor([0, 12], dtype=torch.int32), torch.zeros(28)
    mod = lambda s, b, h, i, j: s + flat[starts[b] + j] + limit[j]  # noqa: E731
    flashgen.varlen_attention(*packed(), score_mod=mod)
    used = torch.tensor([12, 20], dtype=torch.int32)
    flashgen.varlen_attention(*packed(), seqused_k=used, score_mod=lambda s, b, h, i, j: s + flat[:32][starts[b] + j])
    starts[1] = 13
    with pytest.raises(InvalidProblemError, match=r"reads flat outside.* is 40 at b = 1, kv_idx = 27"):
        flashgen.varlen_attention(*packed(), score_mod=mod)


def test_the_switch_keeps_calls_from_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashgen import warm

    monkeypatch.setenv("FLASHGEN_CHECK_VALUES", "1")
    plan = mock.Mock(backend="triton", **{"target.backend": "cuda", "problem.copies": ()})
    known: dict[Any, Any] = {}
    with mock.patch.object(warm, "_launcher", return_value="bound"):
        warm.bind(warm.Call(("kind",)), plan, known)
        monkeypatch.setenv("FLASHGEN_CHECK_VALUES", "0")
        warm.bind(warm.Call(("other",)), plan, known)
    assert known == {("kind",): None, ("other",): "bound"}


def test_the_switch_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CHECK_VALUES", "yes")
    with pytest.raises(InvalidProblemError, match=r"FLASHGEN_CHECK_VALUES='yes' is not known: allowed are 0, 1"):
        explain()


# -- offsets on a GPU: looked at where the switch is on, since that waits for it --


class Ends:
    """int32 offsets on a GPU."""

    dtype, device = torch.int32, torch.device("cuda", 0)

    def __init__(self, *values: int) -> None:
        self.values, self.read = values, 0

    def dim(self) -> int:
        return 1

    def numel(self) -> int:
        return len(self.values)

    def stride(self, dim: int) -> int:
        return 1

    def tolist(self) -> list[int]:
        self.read += 1
        return list(self.values)


@pytest.mark.parametrize("values", [(1, 12, 40), (0, 41, 40), (0, 12, 39), (0, 12, 41)])
def test_wrong_offsets_on_a_gpu(values: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Any = mock.Mock(device=torch.device("cuda", 0), shape=(40, 2, 16))
    wrong: Any = Ends(*values)
    right: Any = Ends(0, 12, 40)
    assert checks.packing(rows, rows, wrong, right, None, 41, 28) == 2 and not wrong.read
    monkeypatch.setenv("FLASHGEN_CHECK_VALUES", "1")
    assert checks.packing(rows, rows, right, right, None, 28, 28) == 2
    with pytest.raises(InvalidProblemError, match=r"cu_seqlens_q=.* must start at 0, never fall, and end at 40"):
        checks.packing(rows, rows, wrong, right, None, 41, 28)


# -- a tensor elsewhere, and values in Python --


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_captured_tensor_on_another_device_is_named(call: Callable[..., Any], backend: str) -> None:
    slopes = torch.zeros(2, device="meta")
    with pytest.raises(
        InvalidProblemError, match=r"score_mod.*slopes that it captures is on meta, q is on cpu.*Move it"
    ):
        call(score_mod=lambda s, b, h, i, j: s * slopes[h], backend=backend)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, i, j: s if i > j else -s,
        lambda s, b, h, i, j: s if (i > j) and (j > 2) else -s,
        lambda s, b, h, i, j: s * int(i),
        lambda s, b, h, i, j: s * float(t[j % 5]),
        lambda s, b, h, i, j: s * i.item(),
    ],
)
def test_control_flow_on_data_is_refused_with_what_to_write(mod: Any, backend: str) -> None:
    with pytest.raises(InvalidProblemError, match=r"score_mod .*cannot branch on data.*torch.where"):
        attend(score_mod=mod, backend=backend)
