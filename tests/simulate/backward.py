"""The rendered Hopper backward as a subject of the mutation study, and its reviewed survivors."""

from __future__ import annotations

import functools

from flashgen.mutation_backward import BackwardStudy
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

# Head dims that do not fill a tile, causal; that do, full; and the kernel of wide head dims.
SPECS = ("attention_bwd-bf16-d40-dv24-causal", "attention_bwd-bf16-d64", "attention_bwd-bf16-d192-dv136-causal")
SAMPLED = SPECS[::2]

# Survivors, with the reason why they are no defects.
_MASKED_MORE = "a block is masked as well that needs no mask, which changes nothing there"
_ALWAYS = {"row_blocks: comparison off by one: start_n + BLOCK_N > seqlen_k": _MASKED_MORE}
_CAUSAL = {"row_blocks: ± 1 dropped: start_n + BLOCK_N - 1": _MASKED_MORE}
_NARROW = {"attend: stage + 1: step % DS_STAGES": "the same buffers in another order: nothing else names them"}
_WIDE = {
    "produce: late wait: mbarrier.wait(rows_empty.index(stage), phase ^ 1)": (
        "who has waited for gradients to be read knows that the queries before them were, too"
    ),
    "write_dq: stage + 1: step % STAGES": (
        "the producer loads in order, and what it waits for instead comes a step later"
    ),
}
_FILLED = "the head dim fills its tile"
REVIEWED: dict[str, dict[str, str]] = {
    "attention_bwd-bf16-d40-dv24-causal": {**_ALWAYS, **_CAUSAL, **_NARROW},
    "attention_bwd-bf16-d64": {
        **_ALWAYS,
        **_NARROW,
        "attention_bwd_preprocess: comparison off by one: offs_d < HEAD_DIM_V": _FILLED,
        "attention_bwd_postprocess: comparison off by one: offs_d < HEAD_DIM": _FILLED,
    },
    "attention_bwd-bf16-d192-dv136-causal": {**_ALWAYS, **_CAUSAL, **_WIDE},
}


@functools.cache
def study_of(key: str) -> BackwardStudy:
    return BackwardStudy(AttentionSpec.from_key(key), by_name("gluon_bwd_sm90"), Target.named("h100"))
