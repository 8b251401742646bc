"""`Case`: one random call of `attention()` or `varlen_attention()` as plain values, and its tensors in poisoned memory."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flashgen.accuracy import TORCH_DTYPES, place

HEAD_DIMS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 40, 64, 71, 80, 96, 113, 128, 160, 193, 256)
LENGTHS = (0, 1, 2, 7, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 53, 63, 64, 65, 97)
STRIDES = ("dense", "padded", "misaligned", "sbhd", "expanded", "packed", "corrupt")

# Elementwise functions of every shape of argument, as FlexAttention's; `table` (num_heads_q, 5) wants a gradient. `ids` (batch,
# longest) grows along its rows, as packed documents do; `order` (longest) is where a key stands that lies elsewhere, as in pages.
SCORE_MODS: dict[str, Callable[..., Tensor]] = {
    "relative": lambda s, b, h, i, j: s + 0.05 * (i - j),
    "scaled": lambda s, b, h, i, j: s * (1.0 + 0.1 * h + 0.2 * b),
    "squared": lambda s, b, h, i, j: s - 0.1 * s * s,
    "constant": lambda s, b, h, i, j: (i * 0.1 - j * 0.05).to(s.dtype),
    "table": lambda s, b, h, i, j, table: s + table[h, (i - j) % 5].to(s.dtype),
    "gated": lambda s, b, h, i, j, table: s * torch.sigmoid(table[h, (i + j + b) % 5].to(s.dtype)),
}
MASK_MODS: dict[str, Callable[..., Tensor]] = {
    "thirds": lambda b, h, i, j: (i + j + h + b) % 3 != 0,
    "document": lambda b, h, i, j: i // 8 == j // 8,
    "columns": lambda b, h, i, j: (j + b) % 4 != 1,
    "band": lambda b, h, i, j: (i - j < 30) & (j - i < 40),
    "nothing": lambda b, h, i, j: j < 0,
    "rows": lambda b, h, i, j: (i + h) % 5 != 2,
    "bands": lambda b, h, i, j: (i - j < 20 * (h + 1)) & (j - i < 25 + 10 * b),
    "wide bands": lambda b, h, i, j: (i - j < 60 * (h + 1)) & (j - i < 70 + 20 * b),
    "scattered": lambda b, h, i, j: ((i // 128 + j // 32 + b + h) % 3 == 0) | (i == j),
    "read blocks": lambda b, h, i, j, ids, order: ((ids[b, i // 64] + j // 32 + h) % 3 == 0) | (i == j),
    "sequences": lambda b, h, i, j, ids, order: ids[b, i] == ids[b, j],
    "pages": lambda b, h, i, j, ids, order: order[j] <= i,
}
CAPTURING = ("sequences", "pages", "read blocks")
HOPPER_HEAD_DIMS = (8, 16, 40, 64, 64, 64, 72, 96, 128, 128, 192, 256)
HOPPER_LENGTHS = (1, 17, 63, 64, 65, 97, 128, 130, 190, 193)
BROADCASTS = (
    "bhij",
    "1hij",
    "b1ij",
    "11ij",
    "bh1j",
    "bhi1",
    "111j",
    "11i1",
    "1h11",
    "1111",
    "ij",
    "1j",
    "i1",
    "j",
    "1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call; the defaults are the simplest, which is where shrinking goes.

    Attributes:
        backend: `torch`, `triton` or `gluon`.
        lengths: (seqlen_q, seqlen_k, seqused_k) of each packed sequence; empty for `attention()`.
        bias, attn_mask: which of b, h, i, j they span, e.g. `1h1j`; empty for none.
        values: of q and k: `normal`, `low` (scores near -600), `large` (scores of thousands).
        block_mask: a name of `MASK_MODS`, or `given`: lists of each batch and head that say something else than its mask_mod.
        block_size: blocks of queries and of keys of the block mask.
        words: where the Hopper forward has a mask_mod looked up: as it is made (empty), `none`, so that it is evaluated in the kernel, or
            `stale`, as where the mask's tensors hold something else by now.
        spread: whether the operands beside q, k and v have a gap after each element.
        deterministic: whether gradients have to repeat bit for bit.
        tile: block of rows and of keys.
    """

    backend: str = "torch"
    seed: int = 0
    dtype: str = "fp32"
    batch: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1
    heads_kv: int = 1
    group: int = 1
    head_dim: int = 1
    head_dim_v: int = 1
    layout: str = "bshd"
    strides: str = "dense"
    values: str = "normal"
    causal: bool = False
    top_left: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    bias: str = ""
    bias_inf: bool = False
    attn_mask: str = ""
    score_mod: str = ""
    mask_mod: str = ""
    block_mask: str = ""
    block_size: tuple[int, int] = (16, 8)
    deterministic: bool = False
    dropout_p: float = 0.0
    lengths: tuple[tuple[int, int, int], ...] = ()
    seqused: bool = False
    lse: bool = False
    grad: bool = False
    tile: tuple[int, int] = (16, 16)
    words: str = ""
    spread: bool = False

    @property
    def heads_q(self) -> int:
        """Query heads."""
        return self.heads_kv * self.group

    @property
    def listed_mask(self) -> str:
        """`block_mask` where torch can build one: not of nothing."""
        return self.block_mask if not self.lengths and min(self.batch, self.seqlen_q, self.seqlen_k) > 0 else ""

    @property
    def sizes(self) -> dict[str, int]:
        """What bias and attn_mask are broadcast to."""
        if self.lengths:
            i, j = (max(length[axis] for length in self.lengths) for axis in (0, 1))
            return {"b": len(self.lengths), "h": self.heads_q, "i": i, "j": j}
        return {"b": self.batch, "h": self.heads_q, "i": self.seqlen_q, "j": self.seqlen_k}

    def dumps(self) -> str:
        """JSON of what differs from the simplest case."""
        plain = asdict(Case())
        return json.dumps({name: x for name, x in asdict(self).items() if x != plain[name]})

    @classmethod
    def loads(cls, text: str) -> Case:
        """The case of `dumps`."""
        known = {field.name for field in fields(cls)}
        values = json.loads(text)
        if unknown := set(values) - known:
            raise ValueError(f"a case has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}.")
        for name in ("window", "tile", "block_size"):
            if name in values:
                values[name] = tuple(values[name])
        if "lengths" in values:
            values["lengths"] = tuple(map(tuple, values["lengths"]))
        return cls(**values)


def draw(seed: int) -> Case:
    """One random case; every fourth is for the portable kernel: plain, or with what it covers of every option in turn.

    Every eighth is for the Hopper kernels: what they do not cover of it is another's business (`fuzz.settled`).
    """
    r = random.Random(seed)

    def sometimes(value: Any, default: Any, p: float = 0.35) -> Any:
        return value if r.random() < p else default

    head_dim = r.choice(HEAD_DIMS)
    plain = seed % 4 == 3
    heads_kv, group = r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3, 4))
    varlen = not plain and r.random() < 0.3
    lengths = ()
    if varlen:
        rows = []
        for _ in range(r.choice((1, 2, 3))):
            seqlen_k = r.choice(LENGTHS)
            rows.append((r.choice(LENGTHS), seqlen_k, r.randint(0, seqlen_k)))
        lengths = tuple(rows)
    dtype = r.choice(("fp16", "bf16", "fp32"))
    scale = sometimes(r.choice((0.0, -0.2, 0.01, 1.0)), None, 0.3)
    common: dict[str, Any] = {
        "seed": seed,
        "dtype": dtype,
        "batch": r.choice((0, 1, 1, 1, 2, 2)) if not plain else r.choice((1, 2)),
        "seqlen_q": r.choice(LENGTHS),
        "seqlen_k": r.choice(LENGTHS),
        "heads_kv": heads_kv,
        "group": group,
        "head_dim": head_dim,
        "head_dim_v": r.choice((head_dim, head_dim, r.choice(HEAD_DIMS))),
        "layout": "bshd" if varlen else r.choice(("bshd", "bhsd")),
        "strides": "dense" if varlen and r.random() < 0.5 else r.choice(STRIDES),
        "causal": r.random() < 0.5,
        "top_left": r.random() < 0.5,
        "scale": scale,
        "lengths": lengths,
        "seqused": r.random() < 0.5,
        "lse": r.random() < 0.6,
        "tile": (r.choice((16, 32, 64)), r.choice((16, 32, 64))),
        "values": "normal" if scale == 0.0 else r.choice(("normal", "normal", "normal", "normal", "low", "large")),
    }
    if plain:  # few programs: the interpreter is slow
        small = {"heads_kv": min(2, heads_kv), "group": min(2, group), "batch": 1 if heads_kv > 1 else common["batch"]}
        widest = max(head_dim, common["head_dim_v"])
        if dtype == "fp32" and widest > 64:  # larger tiles are not legal: fp32 operands live in registers
            small["tile"] = (min(common["tile"][0], 32), min(common["tile"][1], 32 if widest <= 128 else 16))
        case = Case(backend="triton", **(common | small))
        return replace(case, grad=True) if seed % 8 == 3 else _with_options(case, r)
    if seed % 8 == 5:
        return _with_options(_for_hopper(Case(backend="gluon", **common), r), r, longest=200)
    bounded = common["values"] == "normal"  # a squared or capped score of thousands is no longer a fair question
    mods = sorted(SCORE_MODS) if bounded else ["relative", "table"]
    return Case(
        **common,
        window=sometimes(r.choice(((3, -1), (4, 9), (-1, 2), (0, 0), (20, 0))), (-1, -1)),
        softcap=sometimes(r.choice((0.5, 2.0, 30.0)), 0.0) if bounded else 0.0,
        alibi=sometimes(r.choice(("h", "bh")), ""),
        sinks=r.random() < 0.35,
        bias=sometimes(r.choice(BROADCASTS), ""),
        bias_inf=r.random() < 0.3,
        attn_mask=sometimes(r.choice(BROADCASTS), "", 0.25),
        score_mod=sometimes(r.choice(mods), ""),
        mask_mod=sometimes(r.choice(sorted(MASK_MODS)), "", 0.3),
        block_mask="" if varlen else sometimes(r.choice((*sorted(MASK_MODS), "given")), "", 0.15),
        dropout_p=sometimes(r.choice((0.1, 0.5, 0.97)), 0.0),
        grad=r.random() < 0.7,
        deterministic=r.random() < 0.3,
        spread=r.random() < 0.3,
    )


def _for_hopper(case: Case, r: random.Random) -> Case:
    """A case of the dtypes, head dims and layouts that TMA can move, of rows and keys in several tiles."""
    head_dim = r.choice(HOPPER_HEAD_DIMS)
    head_dim_v = head_dim if r.random() < 0.7 else r.choice(HOPPER_HEAD_DIMS)
    tile = (64, 64)  # the default
    if max(head_dim, head_dim_v) <= 64:
        tile = (r.choice((64, 128, 192)), r.choice((32, 64)))
    return replace(
        case, dtype=r.choice(("fp16", "bf16")), batch=r.choice((1, 1, 2)), seqlen_q=r.choice(HOPPER_LENGTHS),
        seqlen_k=r.choice(HOPPER_LENGTHS), heads_kv=min(2, case.heads_kv), group=min(3, case.group), head_dim=head_dim,
        head_dim_v=head_dim_v, strides=r.choice(("dense", "dense", "padded", "sbhd")), tile=tile, lengths=(), layout=r.choice(("bshd", "bhsd")),
    )  # fmt: skip


def _with_options(case: Case, r: random.Random, longest: int = 33) -> Case:
    """A plain case of a kernel with a few options, with their gradients two times out of three."""
    bounded = case.values == "normal"
    draws: dict[str, Any] = {
        "window": r.choice(((3, -1), (4, 9), (-1, 2), (0, 0), (20, 0), (33, 17))),
        "softcap": r.choice((0.5, 2.0, 30.0)) if bounded else 0.0,
        "alibi": r.choice(("h", "bh")),
        "sinks": True,
        "bias": r.choice(BROADCASTS),
        "attn_mask": r.choice(BROADCASTS),
        "dropout_p": r.choice((0.1, 0.5, 0.97)),
        "score_mod": r.choice(sorted(SCORE_MODS) if bounded else ["relative", "table"]),
        "mask_mod": r.choice(sorted(MASK_MODS)),
        "block_mask": r.choice((*sorted(MASK_MODS), "given")),
        "lengths": tuple((r.choice(LENGTHS), n, r.randint(0, n)) for n in r.choices(LENGTHS, k=r.choice((1, 2, 3)))),
    }
    chosen = r.sample(sorted(draws), r.choice((1, 2, 2, 3, 5)))
    more: dict[str, Any] = {"block_size": r.choice(((16, 8), (16, 16), (32, 64), (24, 40), (128, 128)))}
    more |= {"spread": r.random() < 0.4}
    if case.backend == "gluon" and "mask_mod" in chosen:
        more |= {"words": r.choice(("", "none", "stale"))}
    if "lengths" in chosen:
        more |= {"layout": "bshd", "batch": 1, "block_mask": ""}
        chosen = [name for name in chosen if name != "block_mask"]
    if r.random() < 0.67:
        # Twice the work and more: fewer rows.
        more |= {"grad": True, "deterministic": r.random() < 0.4}
        more |= {"seqlen_q": min(case.seqlen_q, longest), "seqlen_k": min(case.seqlen_k, longest + 14)}
    return replace(case, bias_inf=r.random() < 0.3, **{name: draws[name] for name in chosen}, **more)


@dataclass(slots=True, kw_only=True)
class Tensors:
    """The tensors of a case: q, k and v as the call takes them, inside allocations whose other bytes are NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    allocations: dict[str, Tensor]
    alibi: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None
    attn_mask: Tensor | None
    table: Tensor
    ids: Tensor
    order: Tensor
    kinds: Tensor
    philox: tuple[int, int]
    dout: Tensor
    dlse: Tensor

    def bshd(self, name: str, case: Case) -> Tensor:
        """Q, k, v or dout with sequences before heads."""
        x: Tensor = getattr(self, name)
        return x.transpose(1, 2) if case.layout == "bhsd" else x


def make(case: Case) -> Tensors:
    """Draw the tensors of a case; nothing is hidden or poisoned yet but the margins."""
    g = torch.Generator().manual_seed(case.seed)
    dtype = TORCH_DTYPES[case.dtype]
    total_q, total_k = (sum(length[axis] for length in case.lengths) for axis in (0, 1))
    batch, seqlen_q, seqlen_k = (1, total_q, total_k) if case.lengths else (case.batch, case.seqlen_q, case.seqlen_k)
    scale = abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    tensors: dict[str, Tensor] = {}
    allocations: dict[str, Tensor] = {}
    for name, seqlen, heads, dim in (
        ("q", seqlen_q, case.heads_q, case.head_dim),
        ("k", seqlen_k, case.heads_kv, case.head_dim),
        ("v", seqlen_k, case.heads_kv, case.head_dim_v),
    ):
        tensor, allocations[name] = place(
            (batch, seqlen, heads, dim), dtype, "cpu", case.layout == "bhsd", case.strides, name  # type: ignore[arg-type]
        )  # fmt: skip
        drawn = torch.randn(tensor.shape, generator=g)
        if name != "v" and case.values == "low":
            centre = math.sqrt(600.0 / (scale * case.head_dim))
            drawn = drawn / centre + (centre if name == "q" else -centre)
        if name != "v" and case.values == "large":
            drawn = drawn * math.sqrt(3000.0 / (scale * math.sqrt(case.head_dim)))
        for axis, step in enumerate(tensor.stride()):
            if step == 0 and tensor.shape[axis] > 1:  # broadcast memory takes one value
                drawn = drawn.narrow(axis, 0, 1).expand(tensor.shape)
        _copy(tensor, drawn)
        if case.lengths:
            tensor = tensor[0]
        tensors[name] = tensor.transpose(1, 2) if case.layout == "bhsd" else tensor
    out_shape = (*tensors["q"].shape[:-1], case.head_dim_v)
    lse_shape = (case.heads_q, total_q) if case.lengths else (case.batch, case.heads_q, case.seqlen_q)
    sizes, heads = case.sizes, case.heads_q
    longest, seeded = max(1, sizes["i"], sizes["j"]), torch.Generator().manual_seed(case.seed)
    kinds = (
        max(1, sizes["b"]),
        heads,
        *(-(-size // block) for size, block in zip((sizes["i"], sizes["j"]), case.block_size, strict=True)),
    )

    def broadcast(letters: str) -> tuple[int, ...]:
        return tuple(sizes.get(letter, 1) for letter in letters)

    def spread(x: Tensor) -> Tensor:
        """The same, each element followed by one that nobody may read."""
        if not case.spread:
            return x
        gap = (
            torch.full_like(x, math.nan)
            if x.is_floating_point()
            else torch.full_like(x, True if x.dtype == torch.bool else 1 << 20)
        )
        return torch.stack((x, gap), -1)[..., 0]

    bias = torch.randn(broadcast(case.bias), generator=g).to(dtype) if case.bias else None
    if bias is not None and case.bias_inf:
        bias = bias.masked_fill(torch.rand(bias.shape, generator=g) < 0.3, -torch.inf)
    return Tensors(
        **tensors,
        allocations=allocations,
        alibi=spread(torch.rand((sizes["b"], heads) if case.alibi == "bh" else (heads,), generator=g))
        if case.alibi
        else None,
        sinks=spread(torch.randn(heads, generator=g).to(dtype)) if case.sinks else None,
        bias=None if bias is None else spread(bias),
        attn_mask=spread(torch.rand(broadcast(case.attn_mask), generator=g) < 0.6) if case.attn_mask else None,
        table=spread(torch.randn(heads, 5, generator=g)),
        ids=spread(torch.randint(0, 4, (max(1, sizes["b"]), longest), generator=seeded).eq(0).cumsum(-1).int()),
        order=spread(torch.randperm(longest, generator=seeded).int()),
        kinds=torch.randint(0, 3, kinds, generator=seeded),
        philox=(0x1234_5678_9ABC_DEF0 ^ case.seed, 7 + case.seed),
        dout=torch.randn(out_shape, generator=g).to(dtype),
        dlse=torch.randn(lse_shape, generator=g),
    )


def _copy(tensor: Tensor, drawn: Tensor) -> None:
    for axis, step in enumerate(tensor.stride()):
        if step == 0:
            size = min(1, tensor.shape[axis])
            tensor, drawn = tensor.narrow(axis, 0, size), drawn.narrow(axis, 0, size)
    tensor.copy_(drawn)
