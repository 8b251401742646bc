"""Calls of `attention()` for `compile_calls.py`: what a launch specialises on beside the spec, once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Options = Callable[["Sizes"], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a call; odd ones are no multiple of anything, even ones of 128."""

    queries: int = 700
    keys: int = 900
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2


ODD, EVEN = Sizes(), Sizes(queries=512, keys=1024)
# Into what is read of a mask: as it is made, no words (they would be too many), nothing (a first call under capture).
TABLES = ("made", "no words", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call.

    Attributes:
        options: what stands beside q, k and v.
        sizes: lengths and heads.
        head_dims: of keys and of values.
        tables: one of `TABLES`.
        grad: whether its backward is compiled, too.
        row: which tile of the variant's portfolio the forward takes; None for the default.
        deterministic: whether gradients have to repeat bit for bit.
    """

    options: Options
    sizes: Sizes = ODD
    head_dims: tuple[int, int] = (64, 64)
    tables: str = "made"
    grad: bool = False
    row: int | None = None
    deterministic: bool = False


# -- what captured tensors look like: contiguous, with gaps, at odd addresses, with steps of 0 and beyond 32 bits --


def odd_address(x: Tensor) -> Tensor:
    """The same values at an address that 16 does not divide."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def gaps(x: Tensor) -> Tensor:
    """The same values, each followed by one that nobody reads."""
    return torch.stack((x, x), -1)[..., 0]


def far(x: Tensor) -> Tensor:
    """The same values, the step of a dimension of one element beyond 32 bits."""
    return x[None].as_strided((1, *x.shape), (1 << 40, *x.stride()))


def documents(s: Sizes) -> Tensor:
    return (torch.arange(max(s.keys, s.queries)) // 70).to(torch.int32)


def table(s: Sizes, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, s.heads * s.keys).view(s.heads, s.keys).to(dtype)


def _document(change: Callable[[Tensor], Tensor] = lambda x: x) -> Options:
    def options(s: Sizes) -> dict[str, Any]:
        ids = change(documents(s))
        return {"mask_mod": lambda b, h, i, j: (ids[i] == ids[j]) | (j < 20)}

    return options


def _added(change: Callable[[Tensor], Tensor] = lambda x: x, dtype: torch.dtype = torch.float32) -> Options:
    def options(s: Sizes) -> dict[str, Any]:
        values = change(table(s, dtype))
        return {"score_mod": lambda score, b, h, i, j: score + values[h, j]}

    return options


def _learned(s: Sizes) -> dict[str, Any]:
    values = torch.randn(s.heads, 5, requires_grad=True)
    return {"score_mod": lambda score, b, h, i, j: score * torch.sigmoid(values[h, (i - j) % 5])}


def _pairs(s: Sizes) -> dict[str, Any]:
    """A value and a byte of each pair, both of the smaller types, and a number."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(s.batch, 1, s.queries, s.keys, generator=generator).to(torch.bfloat16)
    seen = torch.rand(s.batch, s.queries, s.keys, generator=generator) < 0.7
    factor = torch.tensor(0.5)
    return {
        "score_mod": lambda score, b, h, i, j: score * factor + bias[b, 0, i, j],
        "mask_mod": lambda b, h, i, j: seen[b, i, j],
    }


def _indirect(s: Sizes) -> dict[str, Any]:
    """A place that is read, and what stands there: a page table; lengths of each batch in 64 bits."""
    order = torch.randperm(s.keys, generator=torch.Generator().manual_seed(0)).int()
    lengths = torch.full((s.batch,), s.keys - 30)
    offsets = torch.arange(s.heads, dtype=torch.int16)
    return {"mask_mod": lambda b, h, i, j: (order[j] <= i + offsets[h]) & (j < lengths[b])}


def _at_distance(s: Sizes) -> dict[str, Any]:
    values = torch.randn(2 * max(s.queries, s.keys), generator=torch.Generator().manual_seed(0)).half()
    middle = max(s.queries, s.keys)
    return {"causal": True, "score_mod": lambda score, b, h, i, j: score + values[i - j + middle]}


def _numbers(s: Sizes) -> dict[str, Any]:
    return {
        "score_mod": lambda score, b, h, i, j: 20 * torch.tanh(score / 20) - 0.1 * (i - j).abs(),
        "mask_mod": lambda b, h, i, j: ((i // 128 + j // 32 + h) % 3 == 0) | (i == j),
    }


def _listed(s: Sizes) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    ids = documents(s)
    given = create_block_mask(lambda b, h, i, j: ids[i] == ids[j], s.batch, s.heads, s.queries, s.keys, "cpu")
    return {**_added()(s), "block_mask": given}


def _operands(span: tuple[bool, bool, bool, bool], *, rest: bool = False) -> Options:
    """A bias and a mask that span some of batch, heads, queries and keys; with every other option where `rest` is given."""

    def options(s: Sizes) -> dict[str, Any]:
        whole = (s.batch, s.heads, s.queries, s.keys)
        shape = [size if there else 1 for size, there in zip(whole, span, strict=True)]
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        found: dict[str, Any] = {"bias": bias, "attn_mask": bias < 1.0}
        if rest:
            found |= {"dropout_p": 0.1, "softcap": 20.0, "sinks": torch.randn(s.heads).to(torch.bfloat16), **_window(s)}
        return found

    return options


def _window(s: Sizes) -> dict[str, Any]:
    slopes = torch.exp2(-torch.arange(1.0, s.heads + 1))
    return {"causal": True, "window_size": (100, 0), "softcap": 20.0, "alibi_slopes": slopes}


def _packed(more: Options) -> Options:
    # The second sequence is the longer one.
    return lambda s: {**more(replace(s, queries=s.queries + 40, keys=s.keys + 40)), "packed": True}


def both(*parts: Options) -> Options:
    """Options of several, together."""
    return lambda s: {name: x for part in parts for name, x in part(s).items()}


_DOCUMENTS_AND_TABLE = both(_document(), _added())
CALLS: dict[str, Call] = {
    # Every form of the tables of a mask that reads tensors, and of one that does not; wide and narrow.
    **{f"documents, tables {kind}": Call(options=_document(), tables=kind) for kind in TABLES},
    **{f"documents and a table, tables {kind}": Call(options=_DOCUMENTS_AND_TABLE, tables=kind) for kind in TABLES},
    **{f"numbers, tables {kind}": Call(options=_numbers, tables=kind) for kind in TABLES},
    **{
        f"documents, head dims {dims}, tables none": Call(options=_DOCUMENTS_AND_TABLE, head_dims=dims, tables="none")
        for dims in ((128, 128), (256, 256), (192, 128), (64, 128), (128, 64))
    },
    **{
        f"causal documents, tables {kind}": Call(options=both(_document(), lambda s: {"causal": True}), tables=kind)
        for kind in TABLES
    },
    **{
        f"documents, alibi, tables {kind}": Call(options=both(_document(), _window), tables=kind) for kind in TABLES[1:]
    },
    # Strides and addresses of what is captured.
    **{
        f"captured: {change.__name__}": Call(options=both(_document(change), _added(change)))
        for change in (odd_address, gaps)
    },
    "captured: even": Call(options=_DOCUMENTS_AND_TABLE, sizes=EVEN),
    "captured: even, tables none": Call(options=_DOCUMENTS_AND_TABLE, sizes=EVEN, tables="none"),
    "captured: far": Call(options=lambda s: {"score_mod": _far_table(s)}),
    "captured: one head": Call(options=_DOCUMENTS_AND_TABLE, sizes=Sizes(heads=1, kv_heads=1, batch=1)),
    "captured: one query": Call(options=_DOCUMENTS_AND_TABLE, sizes=Sizes(queries=1)),
    **{
        f"captured: {dtype}": Call(options=_added(dtype=getattr(torch, dtype)))
        for dtype in ("bfloat16", "float16", "int64", "uint8", "bool", "int8")
    },
    "of each pair": Call(options=_pairs, grad=True),
    "of each pair, tables none": Call(options=_pairs, tables="none"),
    "indirect": Call(options=_indirect, grad=True),
    "indirect, tables none": Call(options=_indirect, tables="none"),
    "at a distance": Call(options=_at_distance, grad=True),
    "learned": Call(options=both(_document(), _learned), grad=True),
    "learned, ordered": Call(options=both(_document(), _learned), grad=True, deterministic=True),
    "listed": Call(options=_listed, grad=True),
    "listed, wide": Call(options=_listed, head_dims=(128, 128), grad=True),
    "packed documents": Call(options=_packed(_DOCUMENTS_AND_TABLE)),
    "packed window": Call(options=_packed(_window), grad=True),
    **{
        f"operands of {span}": Call(options=_operands(tuple(letter in span for letter in "bhij")), grad=True)  # type: ignore[arg-type]
        for span in ("bhij", "hij", "j", "bi", "h", "")
    },
    "operands, even": Call(options=_operands((False, True, True, True)), sizes=EVEN, grad=True),
    "operands and the rest": Call(options=_operands((True, True, True, True), rest=True), grad=True),
    **{
        f"portfolio: tile {row}, head dims {dims}, tables {kind}": Call(
            options=_DOCUMENTS_AND_TABLE, head_dims=dims, row=row, tables=kind
        )
        for dims in ((64, 64), (128, 128), (256, 256))
        for row in range(5)
        for kind in ("made", "none")
    },
}  # fmt: skip


def _far_table(s: Sizes) -> Callable[..., Tensor]:
    values = far(table(s))
    return lambda score, b, h, i, j: score + values[0, h, j]
