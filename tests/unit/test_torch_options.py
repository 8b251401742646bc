"""The torch backend with every option of the contract, against unblocked fp64 autograd."""

from __future__ import annotations

import math
import random
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen import InvalidProblemError, ops
from flashgen.torch_blocked import blocked
from flashgen.torch_blocked.philox import keep_mask, philox4x32

FORWARD_BOUND, GRADIENT_BOUND = 2e-6, 2e-5  # fp32 against fp64, entries of order 1


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks both ways at sizes that an oracle can follow."""
    monkeypatch.setattr(blocked, "_BLOCK_Q", 16)
    monkeypatch.setattr(blocked, "_BLOCK_K", 24)


@pytest.fixture
def fixed_philox(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The seed that every dropout call of the test draws."""
    seed = torch.tensor([0x1234_5678_9ABC_DEF0, 7])
    monkeypatch.setattr(ops, "draw_philox", lambda q, p, generator: seed if p else None)
    return seed


def random_case(seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves that want gradients, and the options of a call."""
    pick = random.Random(seed)
    torch.manual_seed(seed)

    def maybe(value: Any, p: float = 0.4) -> Any:
        return value() if pick.random() < p else None

    batch, seqlen_q, seqlen_k = pick.choice([1, 2]), pick.choice([1, 7, 37, 50]), pick.choice([0, 1, 5, 37, 61])
    heads_kv = pick.choice([1, 2])
    heads = heads_kv * pick.choice([1, 3])
    head_dim, head_dim_v = pick.choice([3, 8]), pick.choice([5, 8])
    leaves = {
        "q": torch.randn(batch, seqlen_q, heads, head_dim),
        "k": torch.randn(batch, seqlen_k, heads_kv, head_dim),
        "v": torch.randn(batch, seqlen_k, heads_kv, head_dim_v),
    }
    shape = pick.choice(
        [
            (1, heads, seqlen_q, seqlen_k),
            (batch, 1, 1, seqlen_k),
            (seqlen_q, seqlen_k),
            (batch, heads, seqlen_q, 1),
            (1,),
        ]
    )
    leaves |= {
        name: x
        for name, x in (("bias", maybe(lambda: torch.randn(shape))), ("sinks", maybe(lambda: torch.randn(heads))))
        if x is not None
    }
    options = {
        "causal": pick.random() < 0.5,
        "causal_alignment": pick.choice(["bottom-right", "top-left"]),
        "softmax_scale": pick.choice([None, 0.7, -0.3]),
        "window_size": pick.choice([(-1, -1), (3, -1), (4, 9), (-1, 2), (0, 0)]),
        "softcap": pick.choice([0.0, 2.0]),
        "alibi_slopes": maybe(lambda: torch.rand(pick.choice([(heads,), (batch, heads)]))),
        "attn_mask": maybe(lambda: torch.rand(batch, 1, seqlen_q, seqlen_k) < 0.6),
        "mask_mod": maybe(lambda: lambda b, h, i, j: (i + j + h) % 3 != 0),
        "dropout_p": pick.choice([0.0, 0.4]),
    }
    if pick.random() < 0.5:
        leaves["table"] = torch.randn(heads, 5)
    return leaves, options


def with_mod(leaves: dict[str, Tensor]) -> Any:
    table = leaves.get("table")
    return None if table is None else lambda s, b, h, i, j: s + table[h, (i - j) % 5].to(s.dtype) * s


def call(function: Any, leaves: dict[str, Tensor], options: dict[str, Any], **extra: Any) -> tuple[Tensor, Tensor]:
    operands = {name: leaves[name] for name in ("bias", "sinks") if name in leaves}
    result: tuple[Tensor, Tensor] = function(
        leaves["q"], leaves["k"], leaves["v"], score_mod=with_mod(leaves), **operands, **options, **extra
    )
    return result


def assert_same(
    leaves: dict[str, Tensor], exact: dict[str, Tensor], got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]
) -> None:
    """Outputs and all gradients, of out and lse together."""
    finite = want[1].isfinite()
    assert torch.equal(finite, got[1].isfinite())
    got_out, got_lse, want_out, want_lse = (x.detach() for x in (*got, *want))
    worst = [float((got_out - want_out).abs().max()) if want_out.numel() else 0.0]
    worst.append(float((got_lse - want_lse)[finite].abs().max()) if finite.any() else 0.0)
    assert max(worst) <= FORWARD_BOUND * 4, worst
    generator = torch.Generator().manual_seed(0)
    dout, dlse = (torch.randn(x.shape, generator=generator) for x in want)
    losses = [(o * dout).sum() + (torch.where(finite, s, 0.0) * dlse).sum() for o, s in (got, want)]
    a = torch.autograd.grad(losses[0], list(leaves.values()), allow_unused=True)
    b = torch.autograd.grad(losses[1], list(exact.values()), allow_unused=True)
    for name, x, y in zip(leaves, a, b, strict=True):
        if y is None or y.numel() == 0:
            continue
        assert x is not None and x.dtype == leaves[name].dtype and x.shape == y.shape, name
        assert float((x - y).abs().max()) <= GRADIENT_BOUND * max(1.0, float(y.abs().max())), f"d{name}"


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.usefixtures("small_blocks")
def test_every_combination(seed: int, fixed_philox: Tensor) -> None:
    drawn, options = random_case(seed)
    leaves = {name: x.clone().requires_grad_() for name, x in drawn.items()}
    exact = {name: x.double().requires_grad_() for name, x in drawn.items()}
    got = call(flashgen.attention, leaves, options, return_lse=True)
    assert_same(leaves, exact, got, call(naive.attention, exact, options, philox=fixed_philox))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.usefixtures("small_blocks")
def test_packed_sequences_are_the_sequences_one_by_one(seed: int, fixed_philox: Tensor) -> None:
    drawn, options = random_case(seed)
    pick = random.Random(seed)
    heads, heads_kv = drawn["q"].shape[2], drawn["k"].shape[2]
    lengths_q = [pick.choice([0, 1, 13, 30]) for _ in range(3)]
    lengths_k = [pick.choice([0, 1, 17, 40]) for _ in range(3)]
    used = [pick.randint(0, n) for n in lengths_k] if pick.random() < 0.5 else lengths_k
    drawn["q"] = torch.randn(sum(lengths_q), heads, drawn["q"].shape[3])
    drawn["k"] = torch.randn(sum(lengths_k), heads_kv, drawn["k"].shape[3])
    drawn["v"] = torch.randn(sum(lengths_k), heads_kv, drawn["v"].shape[3])
    longest_q, longest_k = max(lengths_q), max(lengths_k)
    if "bias" in drawn:
        drawn["bias"] = torch.randn(pick.choice([(3, heads, longest_q, longest_k), (1, 1, longest_q, 1), (3, 1, 1, 1)]))
    if options["attn_mask"] is not None:
        options["attn_mask"] = torch.rand(3, 1, longest_q, longest_k) < 0.6
    if options["alibi_slopes"] is not None:
        options["alibi_slopes"] = torch.rand(pick.choice([(heads,), (3, heads)]))
    ends = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    leaves = {name: x.clone().requires_grad_() for name, x in drawn.items()}
    exact = {name: x.double().requires_grad_() for name, x in drawn.items()}
    # Keys beyond seqused_k belong to nobody.
    for index, count in enumerate(used):
        start, stop = int(ends[1][index]) + count, int(ends[1][index + 1])
        leaves["k"].data[start:stop] = math.nan
    operands = {name: leaves[name] for name in ("bias", "sinks") if name in leaves}
    got = flashgen.varlen_attention(
        leaves["q"], leaves["k"], leaves["v"], *ends, longest_q, longest_k, seqused_k=torch.tensor(used, dtype=torch.int32),
        return_lse=True, score_mod=with_mod(leaves), **operands, **options,
    )  # fmt: skip
    outs, lses = [], []
    for index in range(3):
        rows = slice(int(ends[0][index]), int(ends[0][index + 1]))
        keys = slice(int(ends[1][index]), int(ends[1][index]) + used[index])
        own = dict(options)
        if own["alibi_slopes"] is not None and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][index : index + 1]
        if own["attn_mask"] is not None:
            own["attn_mask"] = own["attn_mask"][index : index + 1, :, : lengths_q[index], : used[index]]
        part = {**exact, "q": exact["q"][None, rows], "k": exact["k"][None, keys], "v": exact["v"][None, keys]}
        if "bias" in exact:
            full = exact["bias"].expand(3, heads, longest_q, longest_k)
            part["bias"] = full[index : index + 1, :, : lengths_q[index], : used[index]]
        out, lse = call(naive.attention, part, own, philox=fixed_philox, first_batch=index)
        outs.append(out[0])
        lses.append(lse[0])
    assert_same(leaves, exact, got, (torch.cat(outs), torch.cat(lses, 1)))  # type: ignore[arg-type]


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123 1.09, philox4x32 with 10 rounds."""
    for word, expected in (
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        x = torch.full((1,), word, dtype=torch.int64)
        assert tuple(int(w) for w in philox4x32((x, x, x, x), (x, x))) == expected


def test_dropout_is_a_function_of_seed_and_element_alone() -> None:
    i, j = torch.arange(96).view(-1, 1), torch.arange(128)
    seed = torch.tensor([3, 4])
    whole = keep_mask(seed, 0.25, torch.tensor(5), i, j)
    assert torch.equal(whole[17:40, 33:90], keep_mask(seed, 0.25, torch.tensor(5), i[17:40], j[33:90]))
    assert abs(float(whole.float().mean()) - 0.75) < 0.02
    for other in (keep_mask(seed + 1, 0.25, torch.tensor(5), i, j), keep_mask(seed, 0.25, torch.tensor(6), i, j)):
        assert 0.3 < float((whole != other).float().mean()) < 0.45  # two independent masks differ at 2 * 0.25 * 0.75


def test_dropout_repeats_with_a_generator() -> None:
    q = torch.randn(1, 40, 2, 8)
    runs = [flashgen.attention(q, q, q, dropout_p=0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])  # type: ignore[arg-type]


def test_block_masks_are_taken_as_given() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        return ((i - j).abs() <= 20) & (j <= i + h)

    q, k, v = (torch.randn(2, 200, 2, 8) for _ in range(3))
    mask = flex.create_block_mask(near, 2, 2, 200, 200, device="cpu", BLOCK_SIZE=(64, 32))
    want, _ = naive.attention(q.double(), k.double(), v.double(), mask_mod=near)
    torch.testing.assert_close(flashgen.attention(q, k, v, block_mask=mask), want.float(), atol=2e-6, rtol=0)
    both, _ = naive.attention(q.double(), k.double(), v.double(), mask_mod=near, causal=True)
    torch.testing.assert_close(
        flashgen.attention(q, k, v, block_mask=mask, causal=True), both.float(), atol=2e-6, rtol=0
    )


def writes_into_the_score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    s.mul_(1.0 + 0.1 * h).add_(torch.tanh(s))
    return s


def writes_into_an_index(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    i += 5
    return i >= j


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_mod_may_write_into_its_arguments(softcap: float) -> None:
    """Whatever it does to them: the raw scores and the indices of other masks stay what they are."""

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        scaled = s * (1.0 + 0.1 * h)
        return scaled + torch.tanh(scaled)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + 5 >= j

    found = []
    for score_mod, mask_mod in ((writes_into_the_score, writes_into_an_index), (score, mask)):
        leaves = [
            torch.randn(1, n, 2, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (90, 70, 80)
        ]
        q, k, v = leaves[0], leaves[1], leaves[2][:, :70]
        listed = create_block_mask(mask, 1, 1, 90, 70, device="cpu", BLOCK_SIZE=16)
        listed.mask_mod = mask_mod
        options: dict[str, Any] = {
            "score_mod": score_mod,
            "mask_mod": mask_mod,
            "block_mask": listed,
            "softcap": softcap,
        }
        out = flashgen.attention(q, k, v, backend="torch", **options)
        found.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))  # type: ignore[union-attr]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_keys_that_nobody_sees_never_matter() -> None:
    q, k, v = (torch.randn(1, 64, 2, 8) for _ in range(3))
    seen = torch.rand(1, 2, 1, 64) < 0.5  # per head, whole columns
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    clean = flashgen.attention(*leaves, attn_mask=seen)
    grads = torch.autograd.grad(clean.sum(), leaves)  # type: ignore[union-attr]
    hidden = ~seen[0, :, 0].T  # (64, 2)
    k[0][hidden], v[0][hidden] = math.nan, math.inf
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dirty = flashgen.attention(*leaves, attn_mask=seen)
    assert torch.equal(clean, dirty)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(dirty.sum(), leaves), strict=True))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"alibi_slopes": torch.rand(3)}, r"alibi_slopes has shape \(3,\): it must be \(2,\) or \(1, 2\)"),
        ({"sinks": torch.rand(1, 2)}, r"sinks has shape \(1, 2\)"),
        ({"bias": torch.rand(5, 4)}, r"bias has shape \(5, 4\): it must broadcast to .* \(1, 2, 4, 4\)"),
        ({"bias": torch.ones(4, 4, dtype=torch.int32)}, "bias has dtype torch.int32"),
        ({"attn_mask": torch.ones(1, 1, 1, 4, 4, dtype=torch.bool)}, "attn_mask has shape"),
        ({"sinks": [1.0, 2.0]}, "sinks is a list"),
        ({"dropout_p": 1.5}, "dropout_p=1.5"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_wrong_operands_are_explained(option: dict[str, Any], match: str) -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(InvalidProblemError, match=match):
        flashgen.attention(q, q, q, **option)


def test_wrong_offsets_are_explained() -> None:
    q, good = torch.randn(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    for bad, match in (
        (torch.tensor([0, 4, 2], dtype=torch.int32), "never fall"),
        (torch.tensor([0, 2, 9], dtype=torch.int32), "end at 6"),
        (torch.tensor([0, 2, 6]), "int32"),
        (torch.tensor([0, 6], dtype=torch.int32), "equally long"),
    ):
        with pytest.raises(InvalidProblemError, match=match):
            flashgen.varlen_attention(q, q, q, good, bad, 4, 4)
    with pytest.raises(InvalidProblemError, match="max_seqlen_q=3 is less"):
        flashgen.varlen_attention(q, q, q, good, good, 3, 4)


def test_of_two_captured_tensors_one_may_be_computed_from_the_other() -> None:
    """Each gets its own gradient; what the first hands on to the second is autograd's to add, and was counted twice."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 8, generator=generator) for _ in range(3))
    leaf = torch.randn(2, generator=generator).requires_grad_()
    grads = []
    for materialised in (False, True):
        moved = leaf + 1
        if materialised:
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
            scores = scores * (1 + (moved * leaf)[:, None, None])
            out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        else:
            found = flashgen.attention(q, k, v, score_mod=lambda s, b, h, i, j, x=moved: s + x[h] * s * leaf[h])
            assert isinstance(found, torch.Tensor)
            out = found
        grads += torch.autograd.grad(out.sin().sum(), leaf)
    torch.testing.assert_close(*grads)
