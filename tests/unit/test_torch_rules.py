"""The contract's sentences about the torch backend that no random case is sure to meet, one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen import checks
from flashgen.torch_blocked import Options, blocked, fused

INT32 = torch.int32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_BLOCK_Q", 16)
    monkeypatch.setattr(blocked, "_BLOCK_K", 24)
    torch.manual_seed(0)


def qkv(seqlen_q: int = 40, seqlen_k: int = 56, heads: int = 4, heads_kv: int = 2, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:  # fmt: skip
    shapes = [(batch, seqlen_q, heads, 8), *[(batch, seqlen_k, heads_kv, 8)] * 2]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def double(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def close(got: Any, want: Any, bound: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.equal(a.isfinite(), b.isfinite())
        a, b = (x.detach().double().nan_to_num(posinf=0, neginf=0) for x in (a, b))
        assert float((a - b).abs().max()) <= bound * max(1.0, float(b.abs().max()))


# -- PyTorch's fused path --


def run_both(q: Tensor, k: Tensor, v: Tensor, options: Options) -> list[tuple[Tensor, Tensor]]:
    results = []
    for forward in (fused.forward, blocked.forward):
        out, lse = torch.full_like(q, math.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
        forward(q, k, v, options, out, lse)
        results.append((out, lse))
    return results


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 9), (9, 5), (513, 300), (300, 513)], ids=str)
def test_the_fused_path_means_the_same(lengths: tuple[int, int], dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (x.detach() for x in qkv(*lengths, dtype=dtype))
    options = Options(sm_scale=0.3, causal=causal)
    assert fused.covers(q, k, v, options)
    (out, lse), (want_out, want_lse) = run_both(q, k, v, options)
    half = torch.finfo(dtype).eps  # both round once; the fused kernel also rounds its probabilities
    assert float((out.float() - want_out.float()).abs().max()) <= (2e-6 if dtype == torch.float32 else 4 * half)
    assert float((lse - want_lse).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-4) * max(1.0, float(want_lse.abs().max()))  # fmt: skip


def test_the_fused_path_keeps_the_rules_of_nan() -> None:
    """A NaN stays in its (batch, head); keys behind the last query reach nobody; both paths agree which lse it reaches."""
    q, k, v = (x.detach().clone() for x in qkv(40, 56, 2, 2))
    k[0, 30, 0], v[1, 20, 1] = math.nan, math.inf
    k[:, 40:], v[:, 40:] = math.nan, math.nan
    results = run_both(q, k, v, Options(sm_scale=0.3, causal=True))
    for out, lse in results:
        assert lse[1].isfinite().all() and out[1, :, 0].isfinite().all() and out[0, :, 1].isfinite().all()
    assert torch.equal(results[0][1].isnan(), results[1][1].isnan())


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_sign_of_the_scale(scale: float, causal: bool) -> None:
    leaves = qkv(40, 40)
    exact = double(leaves)
    got = flashgen.attention(*leaves, causal=causal, softmax_scale=scale, return_lse=True)
    want = naive.attention(*exact, causal=causal, softmax_scale=scale)
    close(got, want)
    close(torch.autograd.grad(got[0].sum(), leaves), torch.autograd.grad(want[0].sum(), exact))


# -- bias --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=4)), ids=lambda x: "".join("bhij"[n] if k else "1" for n, k in enumerate(x)))  # fmt: skip
def test_bias_gradient_has_the_bias_own_shape_and_dtype(kept: tuple[bool, ...], dtype: torch.dtype) -> None:
    leaves = qkv(20, 30)
    shape = [size if keep else 1 for size, keep in zip((2, 4, 20, 30), kept, strict=True)]
    bias = torch.randn(shape).to(dtype).requires_grad_()
    exact = double([*leaves, bias])
    out, want = flashgen.attention(*leaves, bias=bias), naive.attention(*exact[:3], bias=exact[3])[0]
    weight = torch.randn(want.shape)
    (got,) = torch.autograd.grad((out * weight).sum(), bias)
    assert got.dtype == dtype and got.shape == bias.shape
    bound = 2e-5 if dtype in (torch.float32, torch.float64) else float(torch.finfo(dtype).eps)
    close([got], torch.autograd.grad((want * weight).sum(), exact[3]), bound)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_bias_of_fewer_dimensions(dims: int) -> None:
    leaves = [*qkv(20, 30), torch.randn((2, 4, 20, 30)[4 - dims :]).requires_grad_()]
    exact = double(leaves)
    got, want = flashgen.attention(*leaves[:3], bias=leaves[3]), naive.attention(*exact[:3], bias=exact[3])[0]
    close(torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), exact))


def test_bias_of_minus_infinity_hides_and_has_no_gradient() -> None:
    leaves = qkv(20, 30)
    bias = torch.randn(2, 4, 20, 30)
    bias[:, :, 3], bias[0, 1, 5, 7], bias[1, :, :, :12] = -math.inf, -math.inf, -math.inf
    hidden, bias = bias == -math.inf, bias.requires_grad_()
    out, lse = flashgen.attention(*leaves, bias=bias, return_lse=True)
    assert out[:, 3].eq(0).all() and (lse[:, :, 3] == -math.inf).all()
    grads = torch.autograd.grad(out.square().sum() + lse.nan_to_num(neginf=0.0).sum(), [*leaves, bias])
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[3][hidden].eq(0).all() and grads[3][~hidden].ne(0).any() and grads[0][:, 3].eq(0).all()


# -- rows without keys, and sinks --


@pytest.mark.parametrize("seqlen_k", [0, 56])
def test_rows_without_keys_give_the_sink(seqlen_k: int) -> None:
    leaves, sinks = qkv(40, seqlen_k), torch.tensor([0.5, -2.0, 90.0, -math.inf]).requires_grad_()
    seen = torch.zeros(40, 1, dtype=torch.bool)
    out, lse = flashgen.attention(*leaves, sinks=sinks, attn_mask=seen, return_lse=True)
    assert out.eq(0).all() and torch.equal(lse, sinks.detach().view(1, 4, 1).expand(2, 4, 40))
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(out.sum(), [*leaves, sinks], retain_graph=True))
    weight = torch.randn(2, 3, 40)
    *zero, dsinks = torch.autograd.grad((lse[:, :3] * weight).sum(), [*leaves, sinks])
    assert all(grad.eq(0).all() for grad in zero)
    torch.testing.assert_close(dsinks[:3], weight.sum((0, 2)))
    assert float(dsinks[3]) == 0


# -- masks together --


def test_every_mask_is_anded() -> None:
    leaves = qkv(70, 90)
    exact = double(leaves)

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ((i - j).abs() <= 30) | (j % 7 == h)

    def odd(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i + j + b) % 3 != 0

    attn_mask = torch.rand(2, 1, 70, 90) < 0.8
    common = {"mask_mod": odd, "causal": True, "window_size": (50, 3), "causal_alignment": "bottom-right"}
    block_mask = create_block_mask(near, None, 4, 70, 90, device="cpu", BLOCK_SIZE=(16, 32))
    got = flashgen.attention(*leaves, block_mask=block_mask, attn_mask=attn_mask, return_lse=True, **common)  # type: ignore[arg-type]
    index = [
        torch.arange(n).view(shape) for n, shape in ((2, (-1, 1, 1, 1)), (4, (1, -1, 1, 1)), (70, (-1, 1)), (90, (-1,)))
    ]
    want = naive.attention(*exact, attn_mask=attn_mask & near(*index), **common)  # type: ignore[arg-type]
    close(got, want)
    close(torch.autograd.grad(got[0].square().sum(), leaves), torch.autograd.grad(want[0].square().sum(), exact))


@pytest.mark.parametrize("alignment", ["bottom-right", "top-left"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 5), (7, 11), (-1, 4), (4, -1), (200, 200)], ids=str)
def test_windows_follow_the_alignment(window: tuple[int, int], causal: bool, alignment: Any) -> None:
    """Row by row from the contract's inequality, more keys than queries and fewer."""
    for seqlen_q, seqlen_k in ((40, 56), (56, 40)):
        q, k, v = (x.detach() for x in qkv(seqlen_q, seqlen_k, 1, 1, 1))
        _, lse = flashgen.attention(
            q, k, v, causal=causal, window_size=window, causal_alignment=alignment, return_lse=True
        )
        d = seqlen_k - seqlen_q if alignment == "bottom-right" else 0
        left, right = window
        for i in range(seqlen_q):
            keys = [
                j
                for j in range(seqlen_k)
                if (left < 0 or j >= i + d - left) and (right < 0 or j <= i + d + right) and (not causal or j <= i + d)
            ]
            want = (k[0, keys, 0] @ q[0, i, 0] * 8**-0.5).logsumexp(0) if keys else torch.tensor(-math.inf)
            torch.testing.assert_close(lse[0, 0, i], want, atol=1e-5, rtol=1e-5)


# -- what nobody sees --


@pytest.mark.parametrize("option", ["attn_mask", "mask_mod", "block_mask", "seqused_k"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 3.0}, {"sinks": torch.zeros(4)}, {"dropout_p": 0.3}, {"bias": torch.zeros(1)}], ids=lambda x: next(iter(x), "plain"))  # fmt: skip
def test_what_nobody_sees_never_matters(option: str, extra: dict[str, Any]) -> None:
    """Bit for bit, in out, lse and every gradient, for every way of hiding whole keys."""
    table = torch.rand(64) < 0.6
    table[32:48] = False  # a whole block of a BlockMask
    if option == "seqused_k":
        table = torch.arange(64) < 41
    masks = {
        "attn_mask": {"attn_mask": table},
        "mask_mod": {"mask_mod": lambda b, h, i, j: table[j]},
        "block_mask": {"block_mask": create_block_mask(lambda b, h, i, j: table[j], None, None, 40, 64, device="cpu", BLOCK_SIZE=16)},
        "seqused_k": {},
    }  # fmt: skip
    q, k, v = (x.detach() for x in qkv(40, 64, batch=1))
    results = []
    for poison in (None, math.nan, math.inf):
        if poison is not None:
            k[:, ~table], v[:, ~table] = poison, poison
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        more = {name: x.clone().requires_grad_() if isinstance(x, Tensor) else x for name, x in extra.items()}
        inputs = [*leaves, *(x for x in more.values() if isinstance(x, Tensor))]
        if "dropout_p" in more:
            more["generator"] = torch.Generator().manual_seed(1)
        if option == "seqused_k":
            ends = [torch.tensor([0, n], dtype=INT32) for n in (40, 64)]
            used = torch.tensor([41], dtype=INT32)
            out, lse = flashgen.varlen_attention(*(x[0] for x in leaves), *ends, 40, 64, seqused_k=used, return_lse=True, **more)  # type: ignore[misc]  # fmt: skip
        else:
            out, lse = flashgen.attention(*leaves, return_lse=True, **masks[option], **more)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)])
    for dirty in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], dirty, strict=True))


# -- mods --


def test_captured_tensors_get_their_gradients() -> None:
    """From closures, defaults and modules; with broadcast and repeated indices, in the tensor's own dtype."""
    leaves = qkv(20, 30)
    table, scale = torch.randn(4, 5).requires_grad_(), torch.tensor(0.7, dtype=torch.bfloat16).requires_grad_()

    def mod(s: Any, b: Any, h: Any, i: Any, j: Any, scale: Any = scale) -> Any:
        return s * scale + table[h, (i - j) % 5]

    got = flashgen.attention(*leaves, score_mod=mod, causal=True)
    exact = [x.detach().double().requires_grad_() for x in (*leaves, table, scale)]
    want, _ = naive.attention(
        *exact[:3], score_mod=lambda s, b, h, i, j: s * exact[4] + exact[3][h, (i - j) % 5], causal=True
    )
    a, b = (
        torch.autograd.grad(got.square().sum(), [*leaves, table, scale]),
        torch.autograd.grad(want.square().sum(), exact),
    )
    assert [x.dtype for x in a] == [torch.float32] * 4 + [torch.bfloat16]
    close(a[:4], b[:4])
    close(a[4:], b[4:], float(torch.finfo(torch.bfloat16).eps))


def test_mods_of_packed_sequences_see_the_sequence_and_its_number() -> None:
    q, k, v = (torch.randn(30, 2, 8) for _ in range(3))
    ends = torch.tensor([0, 10, 10, 30], dtype=INT32)
    seen: set[tuple[int, int, int]] = set()

    def spy(b: Any, h: Any, i: Any, j: Any) -> Any:
        if b.numel() == 1 and i.any():  # trials have two, or index 0 alone
            seen.add((int(b), int(i.max()), int(j.max())))
        assert {x.dtype for x in (b, h, i, j)} == {INT32}
        return i >= 0

    flashgen.varlen_attention(q, k, v, ends, ends, 20, 20, mask_mod=spy)
    assert seen == {(0, 9, 9), (2, 15, 19), (2, 19, 19)} | {s for s in seen if s[0] == 2} and {s[0] for s in seen} == {
        0,
        2,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_every_option(dtype: torch.dtype) -> None:
    leaves = [
        *qkv(40, 56, dtype=dtype),
        torch.randn(4, 1, 56).to(dtype).requires_grad_(),
        torch.randn(4).to(dtype).requires_grad_(),
    ]
    exact = double(leaves)
    options: dict[str, Any] = {"softcap": 4.0, "alibi_slopes": torch.rand(2, 4), "window_size": (30, 20), "mask_mod": lambda b, h, i, j: (i + j) % 5 != 0}  # fmt: skip
    got = flashgen.attention(*leaves[:3], bias=leaves[3], sinks=leaves[4], return_lse=True, **options)
    want = naive.attention(*exact[:3], bias=exact[3], sinks=exact[4], **options)
    eps = float(torch.finfo(dtype).eps)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    close(got[:1], want[:1], eps)
    close(got[1:], want[1:], 1e-5)
    grads = torch.autograd.grad(got[0].sum() + got[1].sum(), leaves)
    assert [x.dtype for x in grads] == [dtype] * 5
    close(grads, torch.autograd.grad(want[0].sum() + want[1].sum(), exact), 4 * eps)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("size", [-1e30, 3e7, torch.finfo(torch.float32).min])
def test_rows_of_huge_scores_have_gradients(size: float, sinks: bool) -> None:
    """Their lse, one number, does not hold the sum of their scores: it is made anew. Beside them a row of usual scores."""
    q, k, v = qkv()
    bias = torch.zeros(40, 56)
    bias[3:9] = size
    leaves = [q, k, v, *([torch.randn(4).requires_grad_()] if sinks else [])]
    dout = torch.randn(2, 40, 4, 8)
    out = flashgen.attention(q, k, v, bias=bias, sinks=leaves[3] if sinks else None)
    assert isinstance(out, Tensor)
    got = torch.autograd.grad(out, leaves, dout)

    exact = double(leaves)
    keys, values = (x.repeat_interleave(2, 2) for x in exact[1:3])
    scores = torch.einsum("bihd,bjhd->bhij", exact[0], keys) / 8**0.5
    # What is added rounds in fp32; the scores' own gradients pass.
    scores = scores + ((scores.detach().float() + bias).double() - scores.detach())
    if sinks:
        scores = torch.cat([scores, exact[3].view(1, -1, 1, 1).expand(2, -1, 40, 1)], -1)
    want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., :56], values)
    close(got, torch.autograd.grad(want, exact, dout.double()))


def test_a_kernel_does_not_differentiate_them() -> None:
    lse, dout = torch.zeros(2, 4, 5), torch.zeros(2, 5, 4, 8)
    lse[1, 2, 3], lse[0, 0, 0] = -1e30, -math.inf
    checks.row_sums(dout, None, lse, "bshd")  # nothing reaches it
    dout[1, 3, 2, 7] = 1e-9
    for gradients, layout in (((dout, None), "bshd"), ((dout.transpose(1, 2), None), "bhsd"), ((None, lse), "bshd")):
        with pytest.raises(flashgen.UnsupportedProblemError, match=r"as large as 1e\+30.*backend='torch'"):
            checks.row_sums(*gradients, lse, layout)  # type: ignore[arg-type]
    with pytest.raises(flashgen.UnsupportedProblemError):
        checks.row_sums(dout[1], None, lse[1], "bshd")
    lse[1, 2, 3] = 1e5
    checks.row_sums(dout, None, lse, "bshd")
