"""The references of one case: its calls, one or one a packed sequence, and what they give as the call itself returns it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from cases import CAPTURING, MASK_MODS, SCORE_MODS, Case, Tensors
from torch import Tensor

from flashgen.reference import Call, Result


def mask_mod(name: str, t: Tensors) -> Any:
    """A mask_mod of FlexAttention's signature, its captured tensors those of the case; None for no name."""
    mod, ids, order = MASK_MODS.get(name), t.ids, t.order
    if mod is None or name not in CAPTURING:
        return mod
    return lambda b, h, i, j: mod(b, h, i, j, ids, order)


def _listed(case: Case, t: Tensors) -> Any:
    """What the block mask of a case shows, as a mask_mod."""
    if case.listed_mask != "given":
        return mask_mod(case.listed_mask, t)
    (size_q, size_k), kinds = case.block_size, t.kinds

    def given(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kind = kinds[b, h, i // size_q, j // size_k]
        return (kind == 2) | ((kind == 1) & MASK_MODS["thirds"](b, h, i, j))

    return given


def reference_calls(case: Case, t: Tensors) -> list[Call]:
    """The calls for the references: one, or one a packed sequence."""
    mods = [mod for mod in (mask_mod(case.mask_mod, t), _listed(case, t)) if mod is not None]
    call = Call(
        **{name: t.bshd(name, case).clone() for name in ("q", "k", "v")},
        sm_scale=case.head_dim**-0.5 if case.scale is None else case.scale,
        causal=case.causal,
        top_left=case.top_left,
        window=case.window,
        softcap=case.softcap,
        alibi=t.alibi,
        sinks=t.sinks,
        bias=t.bias,
        attn_mask=t.attn_mask,
        score_mod=SCORE_MODS.get(case.score_mod),
        captured=(t.table,) if case.score_mod in ("table", "gated") else (),
        mask_mod=(lambda b, h, i, j: torch.stack([mod(b, h, i, j).expand(torch.broadcast_shapes(*(x.shape for x in (b, h, i, j)))) for mod in mods]).all(0)) if mods else None,
        dropout_p=case.dropout_p,
        philox=t.philox,
        dout=t.bshd("dout", case) if case.grad else None,
        dlse=t.dlse if case.grad and case.lse else None,
    )  # fmt: skip
    if not case.lengths:
        return [call]
    calls = []
    for index, (queries, keys, own) in enumerate(_slices(case)):

        def corner(x: Tensor | None, index: int = index, own: tuple[int, int] = own) -> Tensor | None:
            if x is None:
                return None
            sizes = case.sizes
            whole = x.expand(sizes["b"], sizes["h"], sizes["i"], sizes["j"])
            return whole[index : index + 1, :, : own[0], : own[1]]

        calls.append(
            replace(
                call, q=call.q[None, queries], k=call.k[None, keys], v=call.v[None, keys], first_batch=index,
                alibi=call.alibi[index] if call.alibi is not None and call.alibi.dim() == 2 else call.alibi,
                bias=corner(call.bias), attn_mask=corner(call.attn_mask),
                dout=None if call.dout is None else call.dout[None, queries],
                dlse=None if call.dlse is None else call.dlse[None, :, queries],
            )
        )  # fmt: skip
    return calls


def _slices(case: Case) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Per packed sequence: its queries, its keys in use, and how many of both."""
    ends_q, ends_k = (
        [sum(length[axis] for length in case.lengths[:n]) for n in range(len(case.lengths) + 1)] for axis in (0, 1)
    )
    for (length_q, length_k, used), (first_q, _), (first_k, _) in zip(
        case.lengths, pairwise(ends_q), pairwise(ends_k), strict=True
    ):
        count = used if case.seqused else length_k
        yield slice(first_q, first_q + length_q), slice(first_k, first_k + count), (length_q, count)


def poison(case: Case, t: Tensors, calls: list[Call]) -> None:
    """NaN in keys and values that no query of their (batch, key/value head) may see, and beyond seqused_k."""
    if case.strides == "expanded":
        return  # one value stands in memory for all batches
    k, v = (t.bshd(name, case) for name in "kv")
    if case.lengths:
        hidden = torch.ones(k.shape[:2], dtype=torch.bool)
        for call, (_, keys, _) in zip(calls, _slices(case), strict=True):
            hidden[keys] = _hidden(case, call)[0]
    else:
        hidden = _hidden(case, calls[0])
    for x in (k, v):
        x[hidden] = math.nan


def _hidden(case: Case, call: Call) -> Tensor:
    seen = call.visible().unflatten(1, (case.heads_kv, case.group)).any(3).any(2)  # (b, heads_kv, keys)
    return ~seen.transpose(1, 2)


def joined(case: Case, calls: list[Call], results: list[Result]) -> dict[str, Tensor]:
    """The results of the sequences as the packed call returns them."""
    if not case.lengths:
        (result,) = results
        named = {"out": result.out, "lse": result.lse} | {f"d{name}": x for name, x in result.gradients.items()}
        for name in named.keys() & {"out", "dq", "dk", "dv"} if case.layout == "bhsd" else ():
            named[name] = named[name].transpose(1, 2)
        return named
    whole_batch = {"out": torch.cat([r.out[0] for r in results]), "lse": torch.cat([r.lse[0] for r in results], 1)}
    for name in results[0].gradients:
        parts = [r.gradients[name] for r in results]
        if name == "q":
            whole_batch["dq"] = torch.cat([part[0] for part in parts])
        elif name in ("k", "v"):
            total = sum(length[1] for length in case.lengths)
            whole = parts[0].new_zeros(total, *parts[0].shape[2:])
            for part, (_, keys, _) in zip(parts, _slices(case), strict=True):
                whole[keys] = part[0]
            whole_batch[f"d{name}"] = whole
        elif name == "bias":
            sizes = case.sizes
            whole = parts[0].new_zeros(sizes["b"], sizes["h"], sizes["i"], sizes["j"])
            for index, (part, (_, _, own)) in enumerate(zip(parts, _slices(case), strict=True)):
                whole[index, :, : own[0], : own[1]] = part[0]
            shape = tuple(sizes.get(letter, 1) for letter in case.bias)
            whole_batch["dbias"] = whole.sum_to_size(shape)
        else:
            whole_batch[f"d{name}"] = torch.stack(parts).sum(0)
    return whole_batch
