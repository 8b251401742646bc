"""Other libraries' signatures and the merging of parts: the same numbers as theirs, nothing dropped silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as of_pytorch

import flashgen
from flashgen import InvalidProblemError, UnsupportedProblemError
from flashgen.integrations import flash_attn
from flashgen.integrations.flex import flex_attention

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])


def draw(*shapes: tuple[int, ...], grad: bool = False, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


# -- FlexAttention --

SCORE: dict[str, Any] = {"score_mod": lambda score, b, h, i, j: torch.tanh(score) - 0.1 * (i - j).abs() * (h + b)}
CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, 40, 56, device="cpu", BLOCK_SIZE=16)
FLEX: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "score": SCORE,
    "mask": {"block_mask": CAUSAL},
    "all": {**SCORE, "block_mask": CAUSAL, "scale": -0.2},
}


@pytest.mark.filterwarnings("ignore:.*flex_attention")
@pytest.mark.parametrize("options", FLEX.values(), ids=list(FLEX))
def test_flex_attention_is_pytorchs(options: dict[str, Any]) -> None:
    q, k, v = draw((2, 4, 40, 16), (2, 2, 56, 16), (2, 2, 56, 16))
    asked = {**options, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
    out, aux = flex_attention(q, k, v, **asked)
    want, beside = of_pytorch(q, k, v, **asked)  # which has no gradients on a CPU
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(aux.lse, beside.lse, atol=2e-5, rtol=1e-4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = flex_attention(*leaves, **options, enable_gqa=True).sin().sum()
    scale = {"softmax_scale": options["scale"]} if "scale" in options else {}
    rest = {name: value for name, value in options.items() if name != "scale"}
    plain = flashgen.attention(*leaves, **rest, **scale, layout="bhsd").sin().sum()
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(a, b)


def test_flex_attention_returns_what_is_asked_for() -> None:
    q, k, v = draw((3, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
    mask = create_block_mask(lambda b, h, i, j: i >= j + b, 3, None, 8, 8, device="cpu")
    out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    whole = flex_attention(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), block_mask=mask)
    assert torch.equal(out, whole) and lse.shape == (3, 2, 8)
    assert flex_attention(q, k.expand_as(q), v.expand_as(q), return_aux=AuxRequest())[1] == (None, None)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kernel_options": {"BLOCK_M": 64}}, UnsupportedProblemError, "kernel_options"),
        ({"return_aux": AuxRequest(max_scores=True)}, UnsupportedProblemError, "max_scores"),
        ({"return_aux": AuxRequest(lse=True), "return_lse": True}, InvalidProblemError, "only one"),
        ({}, InvalidProblemError, "query has 4 heads, key 2: .*enable_gqa=True"),
        ({"query": torch.ones(3)}, InvalidProblemError, r"query has shape \(3,\)"),
        ({"value": None}, InvalidProblemError, "value is a NoneType"),
    ],
)
def test_flex_attention_drops_nothing(options: dict[str, Any], error: type[Exception], said: str) -> None:
    q, k, v = draw((1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
    with pytest.raises(error, match=said):
        flex_attention(**{"query": q, "key": k, "value": v, **options})


# -- flash-attn --

FLASH: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.2},
    "options": {"window_size": (5, 2), "softcap": 3.0, "alibi_slopes": SLOPES, "deterministic": True},
}


@pytest.mark.parametrize("options", FLASH.values(), ids=list(FLASH))
def test_flash_attn_is_attention(options: dict[str, Any]) -> None:
    q, k, v = draw((2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 16))
    want = flashgen.attention(q, k, v, return_lse=True, **options)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **options), want[0])
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and probabilities is None
    kv = torch.stack([k, v], 2)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, **options), want[0])
    qkv = torch.stack([q, *(x[:, :9].repeat_interleave(2, 2) for x in (k, v))], 2).requires_grad_()
    packed = flash_attn.flash_attn_qkvpacked_func(qkv, **options)
    apart = flashgen.attention(*qkv.unbind(2), **options)
    assert torch.equal(packed, apart)
    gradients = [torch.autograd.grad(x.sin().sum(), qkv)[0] for x in (packed, apart)]
    assert torch.equal(*gradients)
    ends_q, ends_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 11))
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *flat, ends_q, ends_k, 9, 11, return_attn_probs=True, **options
    )  # fmt: skip
    torch.testing.assert_close(out.view(want[0].shape), want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.view(4, 2, 9).transpose(0, 1), want[1], atol=1e-5, rtol=1e-5)


def test_flash_attn_drops_nothing() -> None:
    q, k, v = draw((1, 8, 4, 16), (1, 8, 4, 16), (1, 8, 4, 16))
    ends = torch.tensor([0, 8], dtype=torch.int32)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v, 0.5), flash_attn.flash_attn_func(q, k, v))
    with pytest.raises(UnsupportedProblemError, match="return_attn_probs=True beside dropout"):
        flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    with pytest.raises(UnsupportedProblemError, match="block_table"):
        flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 8, 8, block_table=ends)
    with pytest.raises(InvalidProblemError, match=r"qkv has shape .*\(batch, seqlen, 3, heads, head_dim\)"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(InvalidProblemError, match=r"kv is a list.*\(batch, seqlen, 2, heads"):
        flash_attn.flash_attn_kvpacked_func(q, [k, v])


# -- merging --


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_parts_merge_to_the_whole(packed: bool) -> None:
    q, k, v = draw((2, 9, 4, 16), (2, 30, 2, 16), (2, 30, 2, 8), grad=True)
    mask = torch.ones(9, 30, dtype=torch.bool)
    mask[0], mask[1, :13], mask[2, 13:] = False, False, False  # seen by neither part, by the second, by the first

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        out, lse = flashgen.attention(q, k[:, keys], v[:, keys], attn_mask=mask[:, keys], return_lse=True)
        return (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)) if packed else (out, lse)

    merged = flashgen.merge_attention_states(*part(slice(0, 13)), *part(slice(13, 30)))
    whole = part(slice(0, 30))
    pairs = [(a, b) for a, b in zip(merged, whole, strict=True)]
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    both = [
        torch.autograd.grad(out.sin().sum() + lse[lse.isfinite()].cos().sum(), (q, k, v))
        for out, lse in (merged, whole)
    ]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_part_that_saw_nothing_counts_for_nothing() -> None:
    out, other = draw((1, 2, 1, 4), (1, 2, 1, 4))
    lse = torch.tensor([[[700.0, -torch.inf]]])
    none, garbage = torch.full_like(lse, -torch.inf), torch.full_like(out, torch.nan)
    merged, total = flashgen.merge_attention_states(out, lse, garbage, none)
    assert torch.equal(merged[:, 0], out[:, 0]) and not merged[:, 1].any() and torch.equal(total, lse)
    half = flashgen.merge_attention_states(out.half(), lse, other.half(), lse)[0]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half[:, 0].float(), (out + other)[:, 0] / 2, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (1, torch.zeros(1, 2, 1), r"lse_a has shape \(1, 2, 1\).*must be \(1, 1, 2\)"),
        (3, torch.zeros(1, 1, 2).half(), r"lse_b has .*float16: it must be \(1, 1, 2\) and torch.float32"),
        (2, torch.zeros(1, 2, 1, 4).half(), "out_b has .*float16"),
        (0, torch.zeros(2, 4), r"out_a has shape \(2, 4\)"),
        (2, None, "out_b is a NoneType"),
        (3, torch.zeros(1, 1, 2, device="meta"), "lse_b is on meta"),
    ],
)
def test_parts_that_do_not_fit_are_refused(place: int, value: Any, said: str) -> None:
    parts: list[Any] = [torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2), torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2)]
    parts[place] = value
    with pytest.raises(InvalidProblemError, match=said):
        flashgen.merge_attention_states(*parts)
