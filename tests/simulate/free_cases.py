"""The table of Hopper backwards with options: the simulator and a GPU run it."""

from __future__ import annotations

from typing import Any

import torch
from free_backward import Free
from torch import Tensor

WIDE: dict[str, Any] = {"seqlen_q": 200, "seqlen_k": 300}
TALL: dict[str, Any] = {"seqlen_q": 300, "seqlen_k": 200, "num_heads_q": 2, "num_heads_kv": 2}
GROUPS: dict[str, Any] = {"seqlen_q": 150, "seqlen_k": 200, "num_heads_q": 4, "num_heads_kv": 2, "batch": 2}
BR, TL = "bottom-right", "top-left"

DOCUMENTS = (torch.arange(400) // 70).to(torch.int32)
SHUFFLED = ((torch.arange(400) * 7) % 11).to(torch.int32)


def own_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & (kv_idx <= q_idx)


def shuffled(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return SHUFFLED[kv_idx] != 3


def chunks(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx // 64 == kv_idx // 64) & (kv_idx <= q_idx)


def bands_of_heads(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx < 20 * (h + 1)) & (q_idx - kv_idx > -30 * b - 10)


def heads_alone(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx < 25 * (h + 1)) & (kv_idx <= q_idx + 60 * (h % 2))


def columns(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx + b) % 4 != 1


def prefix(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx < 140) | (kv_idx <= q_idx)


def later_keys(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx >= q_idx) & (kv_idx - q_idx < 90 + 20 * h)


def anti_diagonal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx + kv_idx < 280


def nothing(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx < 0


def second_half(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx >= 150


def relative(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return s + 0.01 * (q_idx - kv_idx)


def squared(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return s * (1.0 + 0.1 * h + 0.2 * b) - 0.1 * s * s


def of_documents(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.tanh(s) * (1.0 + DOCUMENTS[q_idx])


def inverse_of_position(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return s + 1.0 / (150 - q_idx)  # infinite at the first row that does not exist


CASES = (
    Free(why="a window with both ends in the middle", sizes=WIDE, window=(40, 70)),
    Free(why="a window of whole blocks", sizes={"seqlen_q": 512, "seqlen_k": 512}, window=(256, 128)),
    Free(why="a causal window", sizes=WIDE, window=(40, -1), causal=BR, head_dim=128),
    Free(why="a window no wider than a key", sizes=TALL, window=(0, 0), dtype="fp16"),
    Free(why="rows beyond the last key, keys before the first row", sizes={**TALL, "seqlen_k": 100}, window=(20, 30)),
    Free(why="a window to the left alone", sizes=GROUPS, window=(50, -1), dtype="fp16", head_dim=128),
    Free(why="a window to the right alone", sizes=GROUPS, window=(-1, 10), causal=""),
    Free(why="nobody sees the first keys, in whole blocks", sizes={"seqlen_q": 100, "seqlen_k": 500}, window=(30, 5)),
    Free(why="a window and sinks: rows without a key have one", sizes={**TALL, "seqlen_q": 400, "seqlen_k": 130}, window=(60, 60), sinks=True),
    Free(why="chunks, with ranges by keys", sizes=TALL, mask_mod=chunks),
    Free(why="chunks, every block masked", sizes=TALL, mask_mod=chunks, known=False),
    Free(why="documents of a captured tensor", sizes=TALL, mask_mod=own_document, head_dim=128),
    Free(why="keys hidden everywhere in a block hold NaN", sizes=GROUPS, mask_mod=shuffled, dtype="fp16"),
    Free(why="a mask of heads that share keys", sizes=GROUPS, mask_mod=bands_of_heads),
    Free(why="a mask of heads alone, of all batches", sizes=GROUPS, mask_mod=heads_alone, dtype="fp16"),
    Free(why="a mask of columns", sizes=GROUPS, mask_mod=columns, head_dim=128),
    Free(why="a prefix: whole blocks, then a diagonal", sizes={"seqlen_q": 384, "seqlen_k": 384}, mask_mod=prefix),
    Free(why="nobody sees anything", sizes=GROUPS, mask_mod=nothing),
    Free(why="the first blocks of keys are seen by nobody", sizes=TALL, mask_mod=second_half),
    Free(why="a mask inside a causal window", sizes=WIDE, mask_mod=columns, window=(90, 0), causal=TL),
    Free(why="a mask beside causality", sizes=TALL, mask_mod=prefix, causal=BR, sinks=True),
    Free(why="a score of positions", sizes=WIDE, score_mod=relative),
    Free(why="a score with a derivative, of heads and batches", sizes=GROUPS, score_mod=squared, head_dim=128, causal=BR),
    Free(why="a score that reads a tensor", sizes=GROUPS, score_mod=of_documents),
    Free(why="a score that is infinite where no row is", sizes={**GROUPS, "num_heads_q": 2}, score_mod=inverse_of_position),
    Free(why="a score and a mask", sizes=TALL, score_mod=squared, mask_mod=own_document, softcap=0.8),
    Free(why="a BlockMask of blocks as large as the tile", sizes={"seqlen_q": 500, "seqlen_k": 400}, block_mask="11"),
    Free(why="a BlockMask of each head, whose keys are shared", sizes=GROUPS, block_mask="bh", block_size=(32, 16), head_dim=128),
    Free(why="a BlockMask of each batch, causal, beside a mask", sizes=GROUPS, block_mask="b1", block_size=(64, 128), causal=BR, mask_mod=columns),
    Free(why="a BlockMask in a window, scores and dropout", sizes=TALL, block_mask="11", block_size=(128, 64), window=(150, 60), score_mod=squared, dropout_p=0.2),
    Free(why="wide: a BlockMask", sizes=GROUPS, block_mask="1h", block_size=(64, 64), head_dim=256),
    Free(why="softcap", sizes=WIDE, softcap=0.7),
    Free(why="a strong softcap, causal, with sinks", sizes=TALL, softcap=0.1, causal=BR, sinks=True, head_dim=128),
    Free(why="ALiBi of each batch", sizes=GROUPS, alibi="bh"),
    Free(why="ALiBi, causal, rows without a key", sizes=TALL, alibi="h", causal=BR, sinks=True, head_dim=128),
    Free(why="ALiBi, top-left, more rows than keys", sizes={**TALL, "batch": 2}, alibi="bh", causal=TL, spread=True),
    Free(why="ALiBi in a causal window of a mask", sizes=GROUPS, alibi="bh", causal=BR, window=(90, 0), mask_mod=columns),
    Free(why="softcap and ALiBi", sizes=GROUPS, alibi="h", causal=BR, softcap=0.7),
    Free(why="ALiBi, causal from the top left, more rows than keys: distances of both signs", sizes={**TALL, "batch": 2}, alibi="bh", causal=TL, spread=True),
    Free(why="softcap and ALiBi, distances of both signs", sizes={"seqlen_q": 200, "seqlen_k": 100}, alibi="h", causal=TL, softcap=0.7),
    Free(why="ALiBi and dropout, causal", sizes={"seqlen_q": 130, "seqlen_k": 200}, alibi="h", causal=BR, dropout_p=0.2),
    Free(why="operands with gaps", sizes=GROUPS, alibi="bh", bias="bhij", attn_mask="bhij", sinks=True, spread=True),
    Free(why="later keys are seen by fewer rows", sizes={"seqlen_q": 300, "seqlen_k": 260}, mask_mod=anti_diagonal, head_dim=16, knobs={"BLOCK_M": 64, "BLOCK_N": 64}),
    Free(why="a mask of later keys, grouped", sizes=GROUPS, mask_mod=later_keys),
    Free(why="sinks alone", sizes=GROUPS, sinks=True),
    Free(why="dropout", sizes=GROUPS, dropout_p=0.3),
    Free(why="dropout, causal, tall tiles of 128 rows", sizes=TALL, dropout_p=0.1, causal=BR, sinks=True, dtype="fp16"),
    Free(why="dropout in a window of scores", sizes=GROUPS, dropout_p=0.5, window=(70, 40), score_mod=squared, head_dim=128),
    Free(why="wide: dropout", sizes=GROUPS, dropout_p=0.5, softcap=1.0, head_dim=72, head_dim_v=136),
    Free(why="dropout that keeps nothing", sizes=WIDE, dropout_p=1 - 2**-40),
    Free(why="attn_mask of rows and keys", sizes=GROUPS, attn_mask="b1ij"),
    Free(why="attn_mask of keys, causal", sizes=GROUPS, attn_mask="b11j", causal=BR),
    Free(why="attn_mask of rows, in a window", sizes=WIDE, attn_mask="11i1", window=(70, 40), head_dim=128),
    Free(why="a bias with -inf", sizes=GROUPS, bias="bhij", bias_inf=True),
    Free(why="a bias of keys, causal, under a cap", sizes=GROUPS, bias="1h1j", causal=TL, softcap=0.6, head_dim=128),
    Free(
        why="everything at once", sizes=GROUPS, bias="1h1j", causal=BR, softcap=0.6, attn_mask="11i1", window=(60, 0), alibi="h",
        sinks=True, score_mod=squared, mask_mod=columns,
    ),
    Free(why="wide: a window", sizes=WIDE, window=(40, 70), head_dim=192, head_dim_v=128),
    Free(why="wide: scores and masks", sizes=GROUPS, softcap=0.6, head_dim=256, mask_mod=chunks, score_mod=squared, sinks=True),
    Free(why="wide: operands", sizes=GROUPS, head_dim=72, head_dim_v=192, alibi="h", bias="bhij", attn_mask="b1ij", causal=BR),
)  # fmt: skip

PAIRS = torch.randn(4, 31, generator=torch.Generator().manual_seed(1)).requires_grad_()
ROWS = torch.randn(2, 300, generator=torch.Generator().manual_seed(2)).requires_grad_()
KEYS = (1.0 + 0.3 * torch.randn(300, generator=torch.Generator().manual_seed(3))).requires_grad_()
HEADS = (1.0 + 0.3 * torch.randn(4, generator=torch.Generator().manual_seed(4))).requires_grad_()


def of_pairs(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, table: Tensor) -> Tensor:
    return s + table[h, torch.clamp(q_idx - kv_idx, -15, 15) + 15]


def of_rows(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, table: Tensor) -> Tensor:
    return s * torch.sigmoid(table[h % 2, q_idx])


def of_keys(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, table: Tensor) -> Tensor:
    return s * table[kv_idx]


def of_keys_and_rows(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, table: Tensor) -> Tensor:
    return s * (1.0 + 0.3 * table[0, kv_idx]) + table[1, q_idx]


def of_heads(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, table: Tensor) -> Tensor:
    return s * table[h] + 0.01 * table[h] * (q_idx - kv_idx)


# Gradients of captured tensors, in fast mode alone.
LEARNED = (
    Free(why="a table of distances", sizes=GROUPS, learned=of_pairs, table=PAIRS, causal=BR),
    Free(why="a table of as many keys as there are", sizes={**GROUPS, "seqlen_k": 300}, learned=of_keys, table=KEYS),
    Free(why="a table of rows, beside a mask", sizes=TALL, learned=of_rows, table=ROWS, mask_mod=shuffled, softcap=2.0),
    Free(why="a table of keys", sizes=GROUPS, learned=of_keys, table=KEYS, head_dim=128, window=(60, 40)),
    Free(why="a number of each head, read twice, under a bias", sizes=GROUPS, learned=of_heads, table=HEADS, bias="1hij", dbias=True),
    Free(why="a table of distances, blocks without a mask", sizes={"seqlen_q": 330, "seqlen_k": 100}, learned=of_pairs, table=PAIRS, causal=TL),
    Free(why="a table of keys and of rows", sizes={"seqlen_q": 130, "seqlen_k": 200}, learned=of_keys_and_rows, table=ROWS),
    Free(why="wide: a table of distances", sizes=GROUPS, learned=of_pairs, table=PAIRS, head_dim=136),
)  # fmt: skip

# The gradient of a bias.
BIASES = (
    Free(why="a bias of every pair, under a score", sizes=GROUPS, bias="bhij", dbias=True, score_mod=squared, softcap=0.8),
    Free(why="a bias of every pair with -inf, beside a mask", sizes=GROUPS, bias="bhij", bias_inf=True, dbias=True, mask_mod=shuffled),
    Free(why="a bias that heads share", sizes={**GROUPS, "seqlen_q": 230}, bias="b1ij", dbias=True, head_dim=128, causal=TL),  # some blocks need no mask
    Free(why="a bias of keys", sizes=GROUPS, bias="1h1j", dbias=True, attn_mask="b11j"),
    Free(why="a bias of rows", sizes=WIDE, bias="11i1", dbias=True, window=(60, 30)),
    Free(why="a bias with gaps", sizes=GROUPS, bias="bhij", dbias=True, spread=True),
    Free(why="one number", sizes=TALL, bias="1111", dbias=True, dropout_p=0.2),
    Free(why="wide: a bias of every pair", sizes=GROUPS, bias="bhij", dbias=True, head_dim=192, head_dim_v=128, softcap=0.8),
    Free(why="a bias that heads share, the diagonal at the bottom right", sizes={"seqlen_q": 230, "seqlen_k": 340}, bias="b1ij", dbias=True, head_dim=128, causal=BR),
)  # fmt: skip
