"""What goes wrong first, as cases: rows without keys, nothing at all, scores at the ends of the range, one per option."""

from __future__ import annotations

from dataclasses import replace

from cases import STRIDES, Case

_TALL = Case(seqlen_q=37, seqlen_k=9, head_dim=8, head_dim_v=5, causal=True, lse=True, grad=True)
_WIDE = replace(_TALL, seqlen_q=21, seqlen_k=53, heads_kv=2, group=2, batch=2, causal=False)
_PACKED = replace(_WIDE, batch=1, lengths=((13, 30, 17), (0, 5, 5), (20, 0, 0), (7, 19, 3)), seqused=True, causal=True)

EDGES: dict[str, Case] = {
    "rows without a key": _TALL,
    "rows without a key, top-left window": replace(_TALL, causal=False, top_left=True, window=(3, 2)),
    "rows without a key, sinks": replace(_TALL, sinks=True),
    "no row has a key": replace(_WIDE, mask_mod="nothing"),
    "no row has a key, sinks": replace(_WIDE, mask_mod="nothing", sinks=True),
    "no keys": replace(_WIDE, seqlen_k=0),
    "no keys, sinks": replace(_WIDE, seqlen_k=0, sinks=True),
    "no queries": replace(_WIDE, seqlen_q=0),
    "empty batch": replace(_WIDE, batch=0),
    "no keys, forward": Case(seqlen_q=17, seqlen_k=0, head_dim=16, head_dim_v=16, lse=True),
    "no queries, forward": Case(seqlen_q=0, seqlen_k=17, head_dim=16, head_dim_v=16, lse=True),
    "rows without a key, forward": Case(seqlen_q=37, seqlen_k=9, head_dim=16, head_dim_v=16, causal=True, lse=True),
    "empty batch, forward": Case(batch=0, seqlen_q=5, seqlen_k=17, head_dim=16, head_dim_v=16, lse=True),
    "lse far below -88.7": replace(_WIDE, values="low", dtype="bf16"),
    "lse far below -88.7, fp32": replace(_WIDE, values="low"),
    "logits of thousands": replace(_WIDE, values="large", dtype="fp16"),
    "logits of thousands, sinks": replace(_WIDE, values="large", dtype="fp16", sinks=True),
    "a scale of 0": replace(_WIDE, scale=0.0),
    "a negative scale": replace(_WIDE, scale=-0.4),
    "bottom-right": replace(_WIDE, causal=True),
    "top-left": replace(_WIDE, causal=True, top_left=True),
    "heads first": replace(_WIDE, layout="bhsd", causal=True),
    "heads first, forward": Case(layout="bhsd", batch=2, seqlen_q=21, seqlen_k=37, heads_kv=2, group=2, head_dim=16, head_dim_v=16, causal=True, lse=True),
    **{f"{strides} strides": replace(_WIDE, strides=strides, causal=True) for strides in STRIDES if strides != "dense"},
    "left window": replace(_WIDE, window=(4, -1)),
    "right window": replace(_WIDE, window=(-1, 3)),
    "both windows": replace(_WIDE, window=(5, 2), causal=True),
    "softcap": replace(_WIDE, softcap=0.5),
    "alibi": replace(_WIDE, alibi="bh", top_left=True, causal=True),
    "sinks": replace(_WIDE, sinks=True),
    "bias": replace(_WIDE, bias="bhij", bias_inf=True),
    "bias of a column": replace(_WIDE, bias="1h1j"),
    "bias of a row": replace(_WIDE, bias="b1i1"),
    "bias of one": replace(_WIDE, bias="1"),
    "attn_mask": replace(_WIDE, attn_mask="bhij"),
    "attn_mask of a column": replace(_WIDE, attn_mask="1h1j"),
    "hidden keys under a gated score": replace(_WIDE, mask_mod="columns", score_mod="gated"),
    "softcap, score_mod, alibi, bias in this order": replace(_WIDE, softcap=2.0, score_mod="squared", alibi="h", bias="ij"),
    "captured table": replace(_WIDE, score_mod="table"),
    "captured table, in order": replace(_WIDE, score_mod="gated", deterministic=True),
    "bias of a batch, in order": replace(_WIDE, bias="1hij", deterministic=True, softcap=2.0),
    "bias of one, in order": replace(_WIDE, bias="1", deterministic=True),
    "a mask that leaves bands of rows": replace(_WIDE, mask_mod="document", seqlen_q=53, causal=True, top_left=True),
    "mask_mod": replace(_WIDE, mask_mod="thirds"),
    "block_mask": replace(_WIDE, block_mask="document"),
    "block_mask of blocks that no tile divides": replace(_WIDE, block_mask="thirds", block_size=(24, 40), causal=True),
    "block_mask of one block": replace(_WIDE, block_mask="columns", block_size=(128, 128), mask_mod="rows"),
    "block_mask, window, captured table": replace(_WIDE, block_mask="document", window=(5, 9), score_mod="gated", bias="1h1j"),
    "block_mask that lists nothing": replace(_WIDE, block_mask="nothing", sinks=True),
    "dropout": replace(_WIDE, dropout_p=0.5),
    "dropout near 1": replace(_WIDE, dropout_p=0.97, sinks=True),
    "packed": _PACKED,
    "packed, top-left window": replace(_PACKED, top_left=True, window=(6, 1)),
    "packed, bias": replace(_PACKED, bias="bhij"),
    "packed, bias of a column": replace(_PACKED, bias="1h1j", sinks=True),
    "packed, alibi, mask": replace(_PACKED, alibi="bh", attn_mask="b1ij", causal=False),
    "packed, mods, dropout": replace(_PACKED, mask_mod="columns", score_mod="gated", dropout_p=0.3),
    "packed, bias of a row, sinks, window": replace(_PACKED, bias="1hi1", sinks=True, window=(9, 4), deterministic=True),
    "fp16": replace(_WIDE, dtype="fp16", seqlen_k=97, head_dim=64, head_dim_v=64),
    "bf16, everything": replace(_WIDE, dtype="bf16", sinks=True, bias="1hij", softcap=2.0, alibi="h", dropout_p=0.1, causal=True),
}  # fmt: skip
