"""Bad input, argument by argument: one table. Every row is refused by name, with the value given, before any work.

Each call is long enough (96 queries and keys) that the output, let alone the scores, would be far larger than anything that a check may make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import flashgen
from flashgen import InvalidProblemError, UnsupportedProblemError, execution, torch_blocked

BATCH, SEQLEN, HEADS, HEADS_KV, HEAD_DIM = 2, 96, 4, 2, 16
MOST = 256  # elements of the largest tensor that a check may make; q has 12288
INT32 = torch.int32


def raising(*arguments: Any) -> Tensor:
    raise IndexError("index 7 is out of bounds")


def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def block_mask(batch: int | None, heads: int | None, seqlen_q: int, seqlen_k: int) -> Any:
    return create_block_mask(visible, batch, heads, seqlen_q, seqlen_k, device="cpu")


def bad_inside() -> Any:
    mask = block_mask(None, None, SEQLEN, SEQLEN)
    mask.mask_mod = lambda b, h, i, j: (i - j).float()
    return mask


# argument, the value, what the message must hold beside the argument's name
ANY_CALL: list[tuple[str, Any, str]] = [
    ("causal", "False", r"causal='False'.*True or False"),
    ("causal", torch.ones(2), r"causal=tensor.*True or False"),
    ("causal_alignment", "top", r"causal_alignment='top'.*one of bottom-right, top-left"),
    ("causal_alignment", None, r"causal_alignment=None"),
    ("softmax_scale", math.nan, r"softmax_scale=nan.*finite"),
    ("softmax_scale", -math.inf, r"softmax_scale=-inf.*finite"),
    ("softmax_scale", 1e39, r"softmax_scale=1e\+39.*fp32 can hold"),
    ("softmax_scale", 10**400, r"softmax_scale=10{400} .*fp32 can hold"),
    ("softmax_scale", "0.1", r"softmax_scale='0.1' is a str"),
    ("softmax_scale", torch.ones(2), r"softmax_scale=tensor\(\[1\., 1\.\]\) is a Tensor: it must be a number"),
    (
        "softmax_scale",
        torch.tensor(0.1, requires_grad=True),
        r"softmax_scale is a tensor that wants a gradient.*scale q",
    ),
    ("softcap", torch.tensor(5.0, requires_grad=True), r"softcap is a tensor that wants a gradient"),
    ("dropout_p", torch.tensor(0.1, requires_grad=True), r"dropout_p is a tensor that wants a gradient"),
    ("window_size", 128, r"window_size=128 must be a pair"),
    ("window_size", (1, 2, 3), r"window_size=\(1, 2, 3\) must be a pair"),
    ("window_size", (1.0, 2), r"window_size=\(1\.0, 2\) must be a pair .* of ints"),
    ("window_size", (-2, 0), r"window_size=\(-2, 0\).*-1 \(no limit\)"),
    ("window_size", (True, 0), r"window_size=\(True, 0\) must be a pair"),
    ("window_size", None, r"window_size=None must be a pair"),
    ("softcap", math.nan, r"softcap=nan.*finite"),
    ("softcap", math.inf, r"softcap=inf.*finite"),
    ("softcap", -1.0, r"softcap=-1.0.*0 \(off\) or a positive"),
    ("softcap", None, r"softcap=None is a NoneType: it must be a number"),
    ("dropout_p", 1.0, r"dropout_p=1.0.*from 0 up to, not including, 1"),
    ("dropout_p", -0.1, r"dropout_p=-0.1.*from 0"),
    ("dropout_p", math.nan, r"dropout_p=nan"),
    ("dropout_p", None, r"dropout_p=None is a NoneType"),
    ("generator", 5, r"generator=5 is a int: it must be a torch.Generator"),
    ("return_lse", "no", r"return_lse='no'.*True or False"),
    ("deterministic", "yes", r"deterministic='yes'.*True or False"),
    ("backend", "cuda", r"backend='cuda'.*auto, gluon, triton, torch"),
    ("backend", None, r"backend=None"),
    ("config", 5, r"config=5 is a int"),
    ("config", {"BLOCK_M": 64.0}, r"config: 'BLOCK_M'=64.0 is a float"),
    ("config", {64: 64}, r"config: 64=64"),
    ("alibi_slopes", [1.0] * HEADS, r"alibi_slopes is a list"),
    ("alibi_slopes", torch.rand(3), r"alibi_slopes has shape \(3,\): it must be \(4,\) or \(2, 4\)"),
    ("alibi_slopes", torch.rand(HEADS).half(), r"alibi_slopes has dtype torch.float16: it must be torch.float32"),
    ("alibi_slopes", torch.rand(HEADS, device="meta"), r"alibi_slopes is on meta, q on cpu"),
    ("sinks", 1.0, r"sinks is a float"),
    ("sinks", torch.rand(1, HEADS), r"sinks has shape \(1, 4\): it must be \(4,\)"),
    ("sinks", torch.rand(HEADS_KV), r"sinks has shape \(2,\): it must be \(4,\)"),
    ("sinks", torch.ones(HEADS, dtype=INT32), r"sinks has dtype torch.int32"),
    ("sinks", torch.rand(HEADS, device="meta"), r"sinks is on meta, q on cpu"),
    ("bias", "mask", r"bias is a str"),
    ("bias", torch.zeros(5), r"bias has shape \(5,\): it must broadcast .*\(2, 4, 96, 96\)"),
    ("bias", torch.zeros(HEADS, 1), r"bias has shape \(4, 1\): it must broadcast"),
    ("bias", torch.zeros(1, 1, 1, 1, 1), r"bias has shape \(1, 1, 1, 1, 1\): it must broadcast"),
    ("bias", torch.zeros(1, dtype=INT32), r"bias has dtype torch.int32"),
    ("bias", torch.zeros(1, dtype=torch.bool), r"bias has dtype torch.bool"),
    ("bias", torch.zeros(1, device="meta"), r"bias is on meta, q on cpu"),
    ("attn_mask", torch.zeros(1), r"attn_mask has dtype torch.float32: it must be torch.bool.*`bias`"),
    ("attn_mask", torch.ones(1, dtype=torch.uint8), r"attn_mask has dtype torch.uint8: it must be torch.bool"),
    ("attn_mask", torch.ones(7, dtype=torch.bool), r"attn_mask has shape \(7,\): it must broadcast"),
    ("attn_mask", torch.ones(1, dtype=torch.bool, device="meta"), r"attn_mask is on meta"),
    ("attn_mask", True, r"attn_mask is a bool"),
    ("score_mod", 3, r"score_mod is a int: it must be a function"),
    ("score_mod", raising, r"score_mod raises IndexError: index 7 is out of bounds"),
    ("score_mod", lambda s, b, h: s, r"score_mod raises TypeError"),
    ("score_mod", lambda s, b, h, i, j: None, r"score_mod returns a NoneType"),
    ("score_mod", lambda s, b, h, i, j: 0.0, r"score_mod returns a float"),
    ("score_mod", lambda s, b, h, i, j: s > 0, r"score_mod returns torch.bool"),
    ("score_mod", lambda s, b, h, i, j: s.to(torch.complex64), r"score_mod returns torch.complex64"),
    ("score_mod", lambda s, b, h, i, j: s.sum(-1), r"score_mod returns shape \(2, 3, 4\)"),
    ("score_mod", lambda s, b, h, i, j: s.amax(-1, keepdim=True), r"score_mod returns shape \(2, 3, 4, 1\).*reduces"),
    ("score_mod", lambda s, b, h, i, j: s.mean(), r"score_mod returns shape \(\).*reduces"),
    ("score_mod", lambda s, b, h, i, j: s[None], r"score_mod returns shape \(1, 2, 3, 4, 5\)"),
    ("score_mod", lambda s, b, h, i, j: s.mT, r"score_mod returns shape \(2, 3, 5, 4\)"),
    (
        "score_mod",
        lambda s, b, h, i, j: s if i > j else -s,
        r"score_mod reads the value of a tensor in Python .*test_bad_input.py:\d+.*torch.where",
    ),
    ("score_mod", lambda s, b, h, i, j: s + torch.zeros(9), r"score_mod raises RuntimeError: The size"),
    ("mask_mod", "causal", r"mask_mod is a str: it must be a function"),
    ("mask_mod", raising, r"mask_mod raises IndexError"),
    ("mask_mod", lambda s, b, h, i, j: s, r"mask_mod raises TypeError"),
    ("mask_mod", lambda b, h, i, j: True, r"mask_mod returns a bool: it must return a torch.Tensor"),
    ("mask_mod", lambda b, h, i, j: (i - j).float(), r"mask_mod returns torch.float32: it must return torch.bool"),
    ("mask_mod", lambda b, h, i, j: i & 1, r"mask_mod returns torch.int32"),
    ("mask_mod", lambda b, h, i, j: (i >= j).all(-1), r"mask_mod returns shape \(1, 1, 4\)"),
    ("mask_mod", lambda b, h, i, j: (i >= j).flatten(), r"mask_mod returns shape \(20,\)"),
]
ATTENTION: list[tuple[str, Any, str]] = [
    ("layout", "sbhd", r"layout='sbhd'.*one of bshd, bhsd"),
    ("layout", 3, r"layout=3"),
    ("block_mask", object(), r"block_mask is a object: it must be a torch.nn.attention.flex_attention.BlockMask"),
    (
        "block_mask",
        block_mask(None, None, SEQLEN, 128),
        r"block_mask was made for Q_LEN, KV_LEN = \(96, 128\).*\(96, 96\)",
    ),
    ("block_mask", block_mask(None, None, 64, SEQLEN), r"block_mask was made for Q_LEN, KV_LEN = \(64, 96\)"),
    ("block_mask", block_mask(3, None, SEQLEN, SEQLEN), r"block_mask was made for batch 3 and 1 heads.*batch 2 and 4"),
    ("block_mask", block_mask(None, HEADS_KV, SEQLEN, SEQLEN), r"block_mask was made for batch 1 and 2 heads"),
    ("block_mask", bad_inside(), r"block_mask\.mask_mod returns torch.float32"),
    ("q", [1.0], r"q is a list: it must be a torch.Tensor"),
    ("k", None, r"k is a NoneType"),
    ("k", torch.zeros(BATCH, SEQLEN, HEADS_KV, HEAD_DIM).half(), r"k has dtype torch.float16, q has torch.float32"),
    ("v", torch.zeros(BATCH, SEQLEN, HEADS_KV, HEAD_DIM, device="meta"), r"v is on meta, q on cpu"),
    ("v", torch.zeros(BATCH, SEQLEN, HEADS_KV), r"v has shape \(2, 96, 2\): it must have 4 dimensions"),
    ("k", torch.zeros(BATCH, SEQLEN, HEADS_KV, HEAD_DIM).to_sparse(), r"k has layout torch.sparse_coo"),
    ("k", torch.zeros(BATCH, SEQLEN, HEADS_KV, 8), r"head_dim of k is 8, but q's is 16"),
]
ENDS = [0, 40, SEQLEN * BATCH]
PACKED: list[tuple[str, Any, str]] = [
    ("q", torch.zeros(BATCH, SEQLEN, HEADS, HEAD_DIM), r"q has shape .*3 dimensions, \(total, heads, head_dim\)"),
    ("cu_seqlens_q", None, r"cu_seqlens_q=None"),
    ("cu_seqlens_k", None, r"cu_seqlens_k is a NoneType"),
    ("cu_seqlens_k", ENDS, r"cu_seqlens_k is a list: it must be"),
    ("cu_seqlens_q", torch.tensor(ENDS), r"cu_seqlens_q is torch.int64 of shape \(3,\).*int32"),
    ("cu_seqlens_k", torch.tensor(ENDS).float(), r"cu_seqlens_k is torch.float32"),
    (
        "cu_seqlens_q",
        torch.tensor([ENDS], dtype=INT32),
        r"cu_seqlens_q is torch.int32 of shape \(1, 3\).*1-dimensional",
    ),
    ("cu_seqlens_q", torch.tensor(ENDS, dtype=INT32, device="meta"), r"cu_seqlens_q is on meta, q on cpu"),
    ("cu_seqlens_q", torch.tensor([1, *ENDS[1:]], dtype=INT32), r"cu_seqlens_q=\[1, 40, 192\] must start at 0"),
    ("cu_seqlens_k", torch.tensor([0, 193, 192], dtype=INT32), r"cu_seqlens_k=\[0, 193, 192\] must .*never fall"),
    ("cu_seqlens_k", torch.tensor([0, 40, 193], dtype=INT32), r"cu_seqlens_k=\[0, 40, 193\] must .*end at 192"),
    ("cu_seqlens_q", torch.tensor([0, 40, 191], dtype=INT32), r"cu_seqlens_q=\[0, 40, 191\] must .*end at 192"),
    ("cu_seqlens_q", torch.tensor([0], dtype=INT32), r"cu_seqlens_q has 1 entries, cu_seqlens_k 3"),
    ("cu_seqlens_q", torch.tensor([], dtype=INT32), r"length of cu_seqlens_q=0 is not allowed"),
    ("max_seqlen_q", 151, r"max_seqlen_q=151 is less than the longest sequence, 152"),
    ("max_seqlen_k", 0, r"max_seqlen_k=0 is less than the longest sequence, 152"),
    ("max_seqlen_k", -1, r"max_seqlen_k=-1.*int from 0 up"),
    ("max_seqlen_q", 152.0, r"max_seqlen_q=152\.0.*int"),
    ("max_seqlen_q", torch.tensor(152), r"max_seqlen_q=tensor\(152\).*\.item\(\)"),
    ("max_seqlen_k", None, r"max_seqlen_k=None"),
    ("seqused_k", [40, 100], r"seqused_k is a list"),
    ("seqused_k", torch.tensor([40, 100]), r"seqused_k is torch.int64"),
    ("seqused_k", torch.tensor([40], dtype=INT32), r"length of seqused_k is 1, but the number of sequences is 2"),
    ("seqused_k", torch.tensor([41, 100], dtype=INT32), r"seqused_k\[0\]=41, but sequence 0 has 40 keys"),
    ("seqused_k", torch.tensor([40, -1], dtype=INT32), r"seqused_k\[1\]=-1, but sequence 1 has 152 keys"),
]


def cases(table: list[tuple[str, Any, str]]) -> list[Any]:
    return [pytest.param(*row, id=f"{row[0]}-{number}") for number, row in enumerate(table)]


def attention_arguments(grad: bool) -> dict[str, Any]:
    q, k, v = (
        torch.zeros(BATCH, SEQLEN, heads, HEAD_DIM).requires_grad_(grad) for heads in (HEADS, HEADS_KV, HEADS_KV)
    )
    return {"q": q, "k": k, "v": v}


def packed_arguments(grad: bool) -> dict[str, Any]:
    flat = {name: x.detach().flatten(0, 1).requires_grad_(grad) for name, x in attention_arguments(False).items()}
    ends = torch.tensor(ENDS, dtype=INT32)
    return {**flat, "cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 152, "max_seqlen_k": 152}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a call that allocates an output, enters the backend, draws a seed, or makes a tensor larger than a check needs."""

    def worked(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(execution, "allocate", worked)
    monkeypatch.setattr(torch_blocked, "forward", worked)
    monkeypatch.setattr(torch_blocked, "packed_forward", worked)
    state = torch.get_rng_state()
    yield
    assert torch.equal(state, torch.get_rng_state()), "the generator moved"


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and not function.is_view:
                self.largest = max(self.largest, x.numel())
        return result


def refuse(function: Callable[..., Any], arguments: dict[str, Any], match: str) -> None:
    with Sizes() as sizes, pytest.raises(InvalidProblemError, match=match):
        function(**arguments)
    assert sizes.largest <= MOST


FUNCTIONS = ("attention", "varlen_attention", "explain", "explain packed")


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("name", "value", "match"), cases(ANY_CALL))
@pytest.mark.usefixtures("no_work")
def test_every_call_refuses(function: str, name: str, value: Any, match: str, grad: bool) -> None:
    packed = function in ("varlen_attention", "explain packed")
    if packed and "2, 4, 96, 96" in match:
        match = match.replace("96, 96", "152, 152")
    arguments = packed_arguments(grad) if packed else attention_arguments(grad)
    assert name in match
    refuse(getattr(flashgen, function.split()[0]), {**arguments, name: value}, match)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("function", ["attention", "explain"])
@pytest.mark.parametrize(("name", "value", "match"), cases(ATTENTION))
@pytest.mark.usefixtures("no_work")
def test_attention_refuses(function: str, name: str, value: Any, match: str, grad: bool) -> None:
    refuse(getattr(flashgen, function), {**attention_arguments(grad), name: value}, match)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("function", ["varlen_attention", "explain"])
@pytest.mark.parametrize(("name", "value", "match"), cases(PACKED))
@pytest.mark.usefixtures("no_work")
def test_varlen_attention_refuses(function: str, name: str, value: Any, match: str, grad: bool) -> None:
    refuse(getattr(flashgen, function), {**packed_arguments(grad), name: value}, match)


def test_the_table_calls_are_right_but_for_the_one_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the bad argument every call of the tables runs, and the guards above do see its work."""
    for grad in (False, True):
        for function, arguments in (
            ("attention", attention_arguments(grad)),
            ("varlen_attention", packed_arguments(grad)),
        ):
            call = getattr(flashgen, function)
            assert flashgen.explain(**arguments).backend == "torch"
            with Sizes() as sizes:
                call(**arguments)
            assert sizes.largest > MOST
            with monkeypatch.context() as patch:
                patch.setattr(execution, "allocate", lambda *a: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    call(**arguments)


@pytest.mark.parametrize("function", [flashgen.attention, flashgen.explain])
def test_what_is_unusual_but_legal_passes(function: Callable[..., Any]) -> None:
    arguments = attention_arguments(False)
    table = torch.rand(HEADS, 8)
    for options in (
        {"score_mod": lambda s, b, h, i, j: torch.zeros(())},
        {"score_mod": lambda s, b, h, i, j: i - j},
        {"score_mod": lambda s, b, h, i, j: s.double() * table[h, (i - j) % 8]},
        {"score_mod": lambda s, b, h, i, j: table[h, j % 8]},
        {"mask_mod": lambda b, h, i, j: h >= 1},
        {"mask_mod": lambda b, h, i, j: torch.ones((), dtype=torch.bool)},
        {"bias": torch.zeros(())},
        {"bias": torch.zeros(1, dtype=torch.float64)},
        {"sinks": torch.zeros(HEADS, dtype=torch.bfloat16)},
        {"attn_mask": torch.tensor(True)},
        {"softmax_scale": 1, "softcap": 5, "dropout_p": 0, "causal": 1},
        {"softmax_scale": torch.tensor(0.25), "window_size": [4, 4]},
        {"softmax_scale": torch.nn.Parameter(torch.tensor(0.25), requires_grad=False)},
        {"block_mask": block_mask(1, HEADS, SEQLEN, SEQLEN)},
        {"block_mask": block_mask(BATCH, 1, SEQLEN, SEQLEN)},
    ):
        function(**arguments, **options)


@pytest.mark.parametrize(
    "option",
    [
        {"score_mod": lambda s, b, h, i, j: s.softmax(-1)},
        {"score_mod": lambda s, b, h, i, j: s * s.max().item()},
        {"score_mod": lambda s, b, h, i, j: s - s.mean(-2, keepdim=True)},
        {"score_mod": lambda s, b, h, i, j: s + torch.rand_like(s)},
        {"mask_mod": lambda b, h, i, j: torch.rand_like(i * j * 1.0) > 0.5},
    ],
    ids=["softmax", "maximum", "mean", "random", "random mask"],
)
def test_a_mod_that_looks_at_other_scores_or_draws_numbers_is_refused(option: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    with pytest.raises(InvalidProblemError, match="must be elementwise and give the same each time"):
        flashgen.attention(q, k, v, **option)
    bessel = flashgen.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + torch.special.bessel_j0(i * 1.0))
    assert isinstance(bessel, torch.Tensor)  # an operation that kernels lack, but elementwise


def test_a_mod_is_not_tried_where_it_never_runs() -> None:
    """Without keys, the tables that a mod reads may be empty."""
    q, k, v = (x[:, :length] for x, length in zip(attention_arguments(False).values(), (96, 0, 0), strict=True))
    table = torch.rand(0)
    out = flashgen.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[j])
    assert torch.equal(out, torch.zeros_like(q))  # type: ignore[arg-type]


def test_used_keys_are_what_max_seqlen_k_bounds() -> None:
    """Sk is seqused_k where it is given."""
    arguments = packed_arguments(False) | {"max_seqlen_k": 40, "seqused_k": torch.tensor([40, 30], dtype=INT32)}
    flashgen.varlen_attention(**arguments)
    with pytest.raises(InvalidProblemError, match="max_seqlen_k=39"):
        flashgen.varlen_attention(**arguments | {"max_seqlen_k": 39})


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_k"])
def test_offsets_lie_side_by_side(name: str) -> None:
    """Kernels read them as they lie."""
    arguments = packed_arguments(False) | {"seqused_k": torch.tensor([40, 30], dtype=INT32)}
    arguments[name] = torch.stack([arguments[name], arguments[name]], 1)[:, 0]
    with pytest.raises(InvalidProblemError, match=f"{name} has stride 2: it must be contiguous"):
        flashgen.varlen_attention(**arguments)


@pytest.mark.parametrize("function", [flashgen.attention, flashgen.explain])
@pytest.mark.usefixtures("no_work")
def test_head_dims_above_256_are_named(function: Callable[..., Any]) -> None:
    """They are legal, so the error is another one: the call is right, nothing covers it."""
    for dims, match in (((320, 8), "head_dim 320 .*1 to 256"), ((8, 257), "head_dim_v 257 .*1 to 256")):
        q, v = torch.zeros(1, 8, 2, dims[0]), torch.zeros(1, 8, 2, dims[1])
        with pytest.raises(UnsupportedProblemError, match=match):
            function(q, q, v)


def test_explain_sees_every_gradient_that_the_call_would() -> None:
    arguments = attention_arguments(False)
    table = torch.rand(8, requires_grad=True)
    for options in (
        {"bias": torch.zeros(1, requires_grad=True)},
        {"sinks": torch.zeros(HEADS, requires_grad=True)},
        {"score_mod": lambda s, b, h, i, j: s * table[j % 8]},
    ):
        assert flashgen.explain(**arguments, **options).problem.requires_grad
        with torch.no_grad():
            assert not flashgen.explain(**arguments, **options).problem.requires_grad
