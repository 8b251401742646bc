"""Launches of the Hopper backward with options, in the simulator, held against the oracle of every option.

What no row of a head may see is NaN in k and v, as everything around the tensors is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flashgen import block_lists, mods
from flashgen.accuracy import AccuracyReport, Values, place
from flashgen.config import KernelConfig
from flashgen.gradients import ByIdentity, GradientBuffers, make_gradient_buffers
from flashgen.problem import Problem
from flashgen.reference import same_precision
from flashgen.render import KernelSource, render
from flashgen.simulator import simulate
from flashgen.spec import Mods
from flashgen.target import Target
from flashgen.variants import by_name

VARIANT, H100 = by_name("gluon_bwd_sm90"), Target.named("h100")
PHILOX = (0x1234_5678_9ABC_DEF0, 2**40 + 7)
Mod = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Free:
    """One backward with options.

    Attributes:
        why: what would go unnoticed without it.
        sizes: of `Problem`, beside batch 1 and one head.
        alibi: slopes of `h` or `bh`; bias, attn_mask: the dimensions they span, e.g. `1h1j`; empty for none.
        block_mask: which of b and h the lists of a BlockMask span, e.g. `b1`; empty for none. A third of the blocks is not listed, a
            third is full, and in the others its mask_mod counts.
        bias_inf: whether a tenth of the bias is -inf.
        dbias: whether its gradient is wanted.
        known: whether the launch is told where a mask_mod hides whole blocks.
        learned: a score_mod that takes `table` as its last argument, which wants a gradient.
        knobs: of the configuration that differ from the default.
        spread: whether operands and captured tables have a gap after each element.
    """

    why: str
    sizes: dict[str, Any]
    dtype: str = "bf16"
    head_dim: int = 64
    head_dim_v: int = 0
    causal: str = ""
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    bias: str = ""
    bias_inf: bool = False
    dbias: bool = False
    attn_mask: str = ""
    score_mod: Mod | None = None
    learned: Mod | None = None
    table: Tensor | None = None
    mask_mod: Mod | None = None
    block_mask: str = ""
    block_size: tuple[int, int] = (128, 128)
    dropout_p: float = 0.0
    known: bool = True
    values: Values = "normal"
    knobs: dict[str, Any] = field(default_factory=dict)
    spread: bool = False

    @property
    def problem(self) -> Problem:
        """The gradients of the call, its mods traced."""
        sizes = {"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, **self.sizes}
        made = Problem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v or self.head_dim, causal=bool(self.causal),
            causal_alignment=self.causal or "bottom-right", window_size=self.window, softcap=self.softcap,
            has_alibi=bool(self.alibi), has_sinks=self.sinks, has_bias=bool(self.bias), has_attn_mask=bool(self.attn_mask),
            has_score_mod=self.score is not None, has_mask_mod=self.mask_mod is not None, has_block_mask=bool(self.block_mask), dropout_p=self.dropout_p, **sizes,
        )  # fmt: skip
        return replace(made.backward, mods=self.traced())

    @property
    def score(self) -> Mod | None:
        """The score_mod of FlexAttention's signature."""
        learned, table = self.learned, self.table
        if learned is None:
            return self.score_mod
        return lambda s, b, h, i, j: learned(s, b, h, i, j, table)

    def traced(self) -> Mods | None:
        if self.score is None and self.mask_mod is None and not self.block_mask:
            return None
        program, _ = self.program()
        return Mods(digest=program.digest, program=program)

    def program(self) -> tuple[Any, tuple[Tensor, ...]]:
        masks = {} if self.mask_mod is None else {"mask_mod": self.mask_mod}
        return mods.program(self.score, masks, torch.device("cpu"), third if self.block_mask else None)

    @property
    def config(self) -> KernelConfig:
        default = VARIANT.default(self.problem.spec, H100)
        return KernelConfig(variant=default.variant, **{**default.to_dict(), **self.knobs})

    @property
    def source(self) -> KernelSource:
        assert VARIANT.supports(self.problem.spec, H100) is None
        return render(self.problem.spec, VARIANT)


def third(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + 2 * kv_idx + h) % 3 != 0


def listed(case: Free, seed: int) -> tuple[BlockMask, Mod]:
    """A BlockMask whose lists say something else than its mask_mod, and what both say of each pair."""
    sizes, (size_q, size_k) = case.problem, case.block_size
    batch, heads = (sizes.batch if "b" in case.block_mask else 1), (sizes.num_heads_q if "h" in case.block_mask else 1)
    shape = (batch, heads, -(-sizes.seqlen_q // size_q), -(-sizes.seqlen_k // size_k))
    kinds = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed))
    parts = []
    for kind in (1, 2):
        there = kinds == kind
        order = torch.sort((~there).int(), dim=-1, stable=True).indices.int()
        parts += [there.sum(-1).int(), order]
    made = BlockMask.from_kv_blocks(
        *parts, BLOCK_SIZE=case.block_size, mask_mod=third, seq_lengths=(sizes.seqlen_q, sizes.seqlen_k)
    )

    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kind = kinds[b % batch, h % heads, q_idx // size_q, kv_idx // size_k]
        seen = (kind == 2) | ((kind == 1) & third(b, h, q_idx, kv_idx))
        return seen if case.mask_mod is None else seen & case.mask_mod(b, h, q_idx, kv_idx)

    return made, both


def drawn(case: Free, seed: int) -> dict[str, Tensor]:
    """The optional operands, by the names of the launch; each lies in the middle of NaN where its dtype has one."""
    p, generator = case.problem, torch.Generator().manual_seed(seed + 77)
    sizes = {"b": p.batch, "h": p.num_heads_q, "i": p.seqlen_q, "j": p.seqlen_k, "1": 1}
    found: dict[str, Tensor] = {}

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    if case.alibi:
        found["alibi_slopes"] = normal(tuple(sizes[x] for x in case.alibi), 0.1)
    if case.sinks:
        found["sinks"] = normal((p.num_heads_q,)).to(torch.float32)
    for name in ("bias", "attn_mask"):
        if spanned := getattr(case, name):
            value = normal(tuple(sizes[x] for x in spanned))
            if name == "attn_mask":
                found[name] = value < 0.8
                continue
            value = value.to({"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype])
            if case.bias_inf:
                value = torch.where(torch.rand(value.shape, generator=generator) < 0.1, -torch.inf, value)
            found[name] = value
    return {name: spread(x) for name, x in found.items()} if case.spread else found


def spread(x: Tensor) -> Tensor:
    """The same, each element followed by one that nobody may read."""
    return torch.stack((x, torch.full_like(x, torch.nan if x.is_floating_point() else True)), -1)[..., 0]


def make(case: Free, seed: int = 0, *, dlse: bool = True) -> tuple[GradientBuffers, dict[str, Any]]:
    """Buffers whose call has the options, and what the launch takes beside them."""
    p, operands = case.problem, drawn(case, seed)
    options = [
        name
        for name in ("alibi", "sinks", "bias", "attn_mask", "score_mod", "mask_mod", "block_mask")
        if getattr(p, f"has_{name}")
    ]
    plain = replace(
        p, op="attention_fwd", mods=None, window_size=(-1, -1), softcap=0.0, dropout_p=0.0,
        **{f"has_{name}": False for name in options},
    )  # fmt: skip
    buffers = make_gradient_buffers(plain, seed=seed, values=case.values, dlse=dlse)
    renamed = {"alibi_slopes": "alibi"}
    block_mask, mask_mod = listed(case, seed) if case.block_mask else (None, case.mask_mod)
    call = replace(
        buffers.call, window=case.window, softcap=case.softcap, score_mod=case.learned or case.score_mod, mask_mod=mask_mod,
        captured=() if case.table is None else (case.table,),
        dropout_p=case.dropout_p, philox=PHILOX, **{renamed.get(name, name): x for name, x in operands.items()},
    )  # fmt: skip
    hidden = ~call.visible().any(2)  # (batch, num_heads_q, seqlen_k)
    unseen = hidden.unflatten(1, (p.num_heads_kv, -1)).all(2).transpose(1, 2)
    for name in "kv":
        tensor = buffers.inputs[name]
        assert tensor is not None
        tensor[unseen] = torch.nan
        buffers.before[name] = buffers.allocations[name].clone()
    if buffers.inputs["dlse"] is not None and not case.sinks:
        buffers.inputs["dlse"][~call.visible().any(-1)] = torch.nan
        buffers.before["dlse"] = buffers.allocations["dlse"].clone()
        call = replace(call, dlse=torch.where(call.visible().any(-1), buffers.inputs["dlse"], 0.0))
    (result,) = same_precision(call, gradients=False)
    buffers.take(result.out, result.lse)
    outputs = dict(buffers.outputs)
    values: dict[str, Any] = {**operands, "dbias": None}
    if case.sinks:
        outputs["dsinks"], buffers.allocations["dsinks"] = place(
            (p.num_heads_q,), torch.float32, "cpu", False, "dense", "o"
        )
    if case.bias and case.dbias:
        shape = operands["bias"].shape
        outputs["dbias"], buffers.allocations["dbias"] = place(tuple(shape), torch.float32, "cpu", False, "dense", "o")
        outputs["dbias"].zero_()
    values |= {"window_left": case.window[0], "window_right": case.window[1], "softcap": case.softcap}
    values |= {"dropout_p": case.dropout_p, "philox": torch.tensor(PHILOX)}
    if p.mods is not None:
        program, tensors = case.program()
        values |= {f"captured_{row.name}": x for row, x in zip(program.captures, tensors, strict=True)}
        for name in VARIANT.sums(p.spec).values():  # type: ignore[attr-defined]
            learned = values[name[1:]]
            outputs[name], buffers.allocations[name] = place(
                tuple(learned.shape), torch.float32, "cpu", False, "dense", "o"
            )
            outputs[name].zero_()
        if block_mask is not None:
            values |= block_lists.launch_values(block_mask, p, VARIANT.mask_tiles(case.config))
        values["row_ranges"] = row_ranges(case, program, tensors) if case.known else None
    wanted = (*VARIANT.signature(p.spec).launch, *(["dbias"] if case.bias and not case.dbias else []))
    return replace(buffers, call=call, outputs=outputs), {name: values[name] for name in wanted}


def row_ranges(case: Free, program: Any, tensors: tuple[Tensor, ...]) -> Tensor | None:
    """As `Operands` gives them: for each block of keys the blocks of rows."""
    if program.mask is None:
        return None
    p, config = case.problem, case.config
    found = mods.query_ranges(
        program.mask, mods.arrays_of(tensors), batch=p.batch, num_heads=p.num_heads_q, seqlen_q=p.seqlen_q,
        seqlen_k=p.seqlen_k, block_m=config.BLOCK_M, block_n=config.BLOCK_N,
    )  # fmt: skip
    rows = [torch.as_tensor(x) for x in (found.first, found.full_first, found.full_last, found.last)]
    stacked = torch.stack(rows, -1).int().contiguous()
    steps = [0 if stacked.shape[dim] == 1 else stacked.stride(dim) for dim in (0, 1)]
    return stacked.as_strided(stacked.shape, (*steps, *stacked.stride()[2:]))


def launch(
    case: Free,
    buffers: GradientBuffers,
    values: dict[str, Any],
    *,
    text: str | None = None,
    deterministic: bool = True,
    **options: Any,
) -> Any:
    """Simulate a launch; `text` for a broken copy of the kernel."""
    arguments = {**buffers.inputs, **buffers.outputs, **buffers.scalars, **values, **case.config.to_dict()}
    return simulate(
        text or case.source, {**arguments, "deterministic": deterministic}, ordered_sums=deterministic, **options
    )


def run(
    case: Free, seed: int = 0, *, deterministic: bool = True, dlse: bool | None = None, **options: Any
) -> AccuracyReport:
    """Simulate one case and judge its gradients."""
    wanted = seed % 2 == 0 if dlse is None else dlse
    buffers, values = make(case, seed, dlse=wanted)
    launch(case, buffers, values, deterministic=deterministic, seed=seed, **options)
    return judged(buffers, references(ByIdentity(case), seed, wanted))


@lru_cache(maxsize=16)
def references(case: ByIdentity, seed: int, dlse: bool) -> Any:
    """Of the same inputs, once for the modes and schedules that follow each other."""
    return make(case.value, seed, dlse=dlse)[0].references()


def judged(buffers: GradientBuffers, references: Any = None) -> AccuracyReport:
    """The worst of all gradients, that of a captured tensor included."""
    oracle, honest = references or buffers.references()
    for name in buffers.outputs:
        if name.startswith("dcaptured_"):
            for result in (oracle, *honest):
                result.gradients[name[1:]] = result.gradients["captured0"]
    return buffers.check((oracle, honest))
