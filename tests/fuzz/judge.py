"""Run one case on its backend and hold everything it gives against the oracle: `judge(case)`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from cases import MASK_MODS, SCORE_MODS, Case, Tensors, make
from oracle import joined, mask_mod, poison, reference_calls
from torch import Tensor

import flashgen
from flashgen import accuracy, block_ranges, execution, ops, shared_masks, stand_ins
from flashgen.config import KernelConfig
from flashgen.errors import FlashgenError, UnsupportedProblemError
from flashgen.reference import exact, same_precision
from flashgen.torch_blocked import blocked
from flashgen.variants.triton_bwd import TritonBackward

# A unit of one run may be small by luck; see `same_precision`.
HONEST_RUNS = 8


def judge(case: Case, device: str = "cpu", *, again: bool = True) -> str | None:
    """What is wrong with the backend's answer, in one line; None when nothing is. A refusal is wrong: see `covered`.

    Tensors are drawn and references computed on the CPU; the backend gets copies with the same strides and poison on `device`.
    Without `again` it is not run a second time, whose bits must be the first one's.
    """
    tensors = make(case)
    calls = reference_calls(case, tensors)
    poison(case, tensors, calls)
    before = {name: x.clone() for name, x in tensors.allocations.items()}
    there = tensors if device == "cpu" else moved(tensors, device)
    try:
        first = run(case, there)
        # What is wrong at once is not run again: a broken kernel mostly is.
        want, units = references(replace(case, backend="torch", tile=Case().tile, words="", deterministic=False))
        said = _compare(case, first, want, units)
        if said is not None:
            return said
        second = run(case, there) if again else first
        other = run(case, there, tile=(16, 24)) if case.backend == "torch" else None
    except FlashgenError as error:
        return f"refused: {type(error).__name__}: {error}"
    if any(not torch.equal(x.cpu(), before[name]) for name, x in there.allocations.items()):
        return "an input's memory was written"
    for name, x in first.items():
        # Unless they are asked to repeat, the Hopper backward's sums of dq and those of biases and captured tensors have no fixed order.
        loose = not case.deterministic and (
            (name == "dq" and case.backend == "gluon")
            or (device != "cpu" and name not in ("out", "lse", "dq", "dk", "dv"))
        )
        if not loose and not _same_bits(x, second[name]):
            return f"{name} differs between two runs"
    return None if other is None else _compare(case, other, want, units, "16x24 blocks: ")


@lru_cache(maxsize=32)
def references(case: Case) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The oracle's results and those of honest runs, the same for every backend and tile: a case's tensors are drawn from its seed."""
    tensors = make(case)
    calls = reference_calls(case, tensors)
    want = joined(case, calls, [exact(call, gradients=case.grad) for call in calls])
    runs = zip(*(same_precision(call, runs=HONEST_RUNS, gradients=case.grad) for call in calls), strict=True)
    return want, [joined(case, calls, list(run)) for run in runs]


def moved(t: Tensors, device: str) -> Tensors:
    """The tensors on a device: allocations byte by byte, q, k and v as the same views of them."""
    allocations = {name: x.to(device) for name, x in t.allocations.items()}
    views = {
        name: allocations[name].view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
        for name, x in (("q", t.q), ("k", t.k), ("v", t.v))
    }
    names = ("alibi", "sinks", "bias", "attn_mask", "table", "ids", "order", "kinds", "dout", "dlse")
    others = {name: None if (x := getattr(t, name)) is None else x.to(device) for name in names}
    return replace(t, allocations=allocations, **views, **others)


def covered(case: Case, device: str = "cpu") -> bool:
    """Whether some variant of the case's backend takes it, its backward included where the case has one."""
    named, t = _leaves(case, make(case) if device == "cpu" else moved(make(case), device))
    args = options(case, t) | {"backend": case.backend, "deterministic": case.deterministic}
    if case.lengths:
        ends, used = _offsets(case, t.q.device)
        args |= {"seqused_k": used, "max_seqlen_q": case.sizes["i"], "max_seqlen_k": case.sizes["j"]}
        args |= {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    else:
        args |= {"block_mask": _block_mask(case, t), "layout": case.layout}
    try:
        flashgen.explain(named["q"], named["k"], named["v"], **args)
    except UnsupportedProblemError:
        return False
    return True


# -- the call --


def options(case: Case, t: Tensors) -> dict[str, Any]:
    """Every keyword that `attention()` and `varlen_attention()` share."""
    return {
        "causal": case.causal,
        "causal_alignment": "top-left" if case.top_left else "bottom-right",
        "softmax_scale": case.scale,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": t.alibi,
        "sinks": t.sinks,
        "bias": t.bias,
        "attn_mask": t.attn_mask,
        "score_mod": _score_mod(case, t.table),
        "mask_mod": mask_mod(case.mask_mod, t),
        "dropout_p": case.dropout_p,
        "return_lse": case.lse,
    }


def _score_mod(case: Case, table: Tensor) -> Any:
    mod = SCORE_MODS.get(case.score_mod)
    if mod is None or case.score_mod not in ("table", "gated"):
        return mod
    return lambda s, b, h, i, j: mod(s, b, h, i, j, table)


def _leaves(case: Case, t: Tensors) -> tuple[dict[str, Tensor], Tensors]:
    """What has a gradient, each a leaf of its own, by name; and the tensors of the case with them."""
    leaves = {"q": t.q, "k": t.k, "v": t.v, "bias": t.bias, "sinks": t.sinks}
    if case.score_mod in ("table", "gated"):
        leaves["captured0"] = t.table
    named = {name: x.detach().requires_grad_(case.grad) for name, x in leaves.items() if x is not None}
    return named, replace(t, bias=named.get("bias"), sinks=named.get("sinks"), table=named.get("captured0", t.table))


def run(case: Case, tensors: Tensors, tile: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """out, lse and the gradients of one call, by name."""
    named, t = _leaves(case, tensors)
    keywords = options(case, t) | {"backend": case.backend, "deterministic": case.deterministic}
    if case.backend == "triton" and not t.q.is_cuda:
        keywords["config"] = {"BLOCK_M": case.tile[0], "BLOCK_N": case.tile[1], "num_warps": 4, "num_stages": 2}
    if case.backend == "gluon" and case.tile[0] > 64:  # else the default
        keywords["config"] = hopper_tile(case)
    with _settings(t, tile, case):
        if case.lengths:
            ends, used = _offsets(case, t.q.device)
            got = flashgen.varlen_attention(
                named["q"], named["k"], named["v"], *ends, case.sizes["i"], case.sizes["j"],
                seqused_k=used, **keywords,
            )  # fmt: skip
        else:
            got = flashgen.attention(
                named["q"],
                named["k"],
                named["v"],
                layout=case.layout,
                block_mask=_block_mask(case, t),
                **keywords,
            )  # type: ignore[arg-type]
        out, lse = got if isinstance(got, tuple) else (got, None)
        result = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
        if not case.grad:
            return {name: x.cpu() for name, x in result.items()}
        outputs, gradients = [out], [t.dout]
        if lse is not None:
            outputs, gradients = [out, lse], [t.dout, t.dlse]
        grads = torch.autograd.grad(outputs, list(named.values()), gradients, allow_unused=True, materialize_grads=True)
    result |= {f"d{name}": x for name, x in zip(named, grads, strict=True)}
    return {name: x.cpu() for name, x in result.items()}


def hopper_tile(case: Case) -> dict[str, Any]:
    """The configuration of a tile of two or three warpgroups of 64 rows."""
    wide = case.tile[0] == 192
    return {
        "BLOCK_M": case.tile[0], "BLOCK_N": case.tile[1], "STAGES": 2, "SECTION": 2, "OWN_STAGING": True,
        "CONSUMER_REGS": 160 if wide else 240, "PRODUCER_REGS": 32 if wide else 24, "LAZY_SUM": not wide, "TAKE_TURNS": wide,
    }  # fmt: skip


@contextlib.contextmanager
def _settings(t: Tensors, tile: tuple[int, int] | None, case: Case) -> Iterator[None]:
    """Outputs begin as NaN, dropout draws the case's seed, and the torch backend walks in the given blocks.

    A portable backward, whose configuration no argument names, takes the case's tile with twice the keys, since the interpreter
    is slow; for dq with rows and keys exchanged.
    """
    allocate = execution.allocate

    def poisoned(*args: Any) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = allocate(*args)
        return pair[0].fill_(math.nan), pair[1].fill_(math.nan)

    seed = torch.tensor(t.philox, device=t.q.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(execution, "allocate", poisoned))
        stack.enter_context(mock.patch.object(ops, "draw_philox", lambda q, p, generator: seed if p else None))
        if case.backend == "triton" and case.grad and not t.q.is_cuda:
            rows, keys = case.tile[0], min(64, 2 * case.tile[1])
            config = KernelConfig(
                variant="triton_bwd", BLOCK_M=rows, BLOCK_N=keys, BLOCK_M_DQ=keys, BLOCK_N_DQ=rows, num_warps=4, num_stages=1
            )  # fmt: skip
            stack.enter_context(mock.patch.object(TritonBackward, "default", lambda self, spec, target: config))
        stack.enter_context(mock.patch.object(stand_ins, "compile_own", lambda *_: None))  # of each case one call
        if case.seed % 4:  # on a GPU the first call of a kernel that is in no cache runs its brief form, else
            stack.enter_context(mock.patch.object(stand_ins, "_may_be_brief", lambda plan, spec: False))
        if case.seed % 2 == 0:  # on a GPU the first call of a mask that reads tensors runs the shared kernel, else
            stack.enter_context(mock.patch.object(shared_masks, "may_stand_in", lambda plan: False))
        if case.words:
            stack.callback(block_ranges.forget)
            block_ranges.forget()
            stack.enter_context(mock.patch.object(block_ranges, "_analysed", _other_tables(case.words)))
        if tile is not None:
            stack.enter_context(mock.patch.object(blocked, "_BLOCK_Q", tile[0]))
            stack.enter_context(mock.patch.object(blocked, "_BLOCK_K", tile[1]))
        yield


def _other_tables(kind: str) -> Any:
    """What stands in the place of `block_ranges._analysed`: no words, or tables of another content that say so."""
    analysed = block_ranges._analysed

    def changed(
        program: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], device: str, walk: int
    ) -> block_ranges.Tables:
        found = analysed(program, tensors, sizes, device, walk)
        if walk in (block_ranges._RANGES, block_ranges._TURNED):
            return found
        if kind == "none":
            table = found.table.clone()
            table[..., 2 if found.listed else 4] = -1
            return replace(found, table=table, words=None, slots=None)
        if not program.mask_reads:  # never stale
            return found
        other = analysed(program, tuple(x.flip(-1).contiguous() for x in tensors), sizes, device, walk)
        return replace(other, table=block_ranges._everything(other, sizes, False), slots=None)

    return changed


def _offsets(case: Case, device: Any = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """cu_seqlens_q and cu_seqlens_k, and seqused_k where the case has it."""
    rows = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    ends = [torch.nn.functional.pad(rows[:, axis].cumsum(0), (1, 0)).int() for axis in (0, 1)]
    return ends, rows[:, 2].contiguous() if case.seqused else None


def _block_mask(case: Case, t: Tensors) -> Any:
    if not case.listed_mask:
        return None
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    if case.listed_mask == "given":
        lists = []
        for kind in (1, 2):
            there = t.kinds == kind
            lists += [there.sum(-1).int(), torch.sort((~there).int(), dim=-1, stable=True).indices.int()]
        lengths = (case.seqlen_q, case.seqlen_k)
        return BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=case.block_size, mask_mod=MASK_MODS["thirds"], seq_lengths=lengths
        )
    return create_block_mask(
        mask_mod(case.listed_mask, t), case.batch, case.heads_q, case.seqlen_q, case.seqlen_k, device=str(t.q.device), BLOCK_SIZE=case.block_size
    )  # fmt: skip


# -- the comparison --


def _compare(
    case: Case,
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    units: list[dict[str, Tensor]],
    where: str = "",
) -> str | None:
    dtypes = {x: name for name, x in accuracy.TORCH_DTYPES.items()}
    for name, x in got.items():
        if x.shape != want[name].shape:
            return f"{where}{name} has shape {tuple(x.shape)}, not {tuple(want[name].shape)}"
        if name == "lse":
            empty = x.new_zeros(0)
            report = accuracy.check(empty, x, (empty, want["lse"]), (empty, None), case.dtype)  # type: ignore[arg-type]
        else:
            # A captured fp32 tensor of a bf16 call: the errors are those of bf16.
            unit, *others = (run[name].to(x.dtype) for run in units)
            dtype = case.dtype if name != "out" else dtypes[x.dtype]
            report = accuracy.check(
                x, None, (want[name], None), (unit, None), dtype, gradient=name != "out", others=others
            )  # type: ignore[arg-type]
        if not report.ok:
            return f"{where}{name}: {report.message}"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True
