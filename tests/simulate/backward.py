"""The rendered Hopper backward as a subject of the mutation study, and its reviewed survivors."""

from __future__ import annotations

import functools

from flashgen.mutation_backward import BackwardStudy
from flashgen.simulator import Mutant
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

# Texts without options: narrow ones, whose head dims fill their tiles or not, and wide ones of three panels of dq and four (one and two
# differ in their number alone); causal and full. A study runs ordered and unordered sums of each.
SPECS = (
    "attention_bwd-bf16-d40-dv24-causal",
    "attention_bwd-bf16-d40-dv24",
    "attention_bwd-bf16-d192-dv136-causal",
    "attention_bwd-bf16-d64-causal",
    "attention_bwd-fp16-d128",
    "attention_bwd-bf16-d128-causal",
    "attention_bwd-fp16-d256",
    "attention_bwd-bf16-d192-dv128-causal",
)
SAMPLED = ("attention_bwd-bf16-d40-dv24-causal", "attention_bwd-bf16-d192-dv136-causal")

# Survivors, with the reason why they are no defects.
_MASKED_MORE = "a block is masked as well that needs no mask, which changes nothing there"
_ALWAYS = {"row_blocks: comparison off by one: start_n + BLOCK_N > seqlen_k": _MASKED_MORE}
_CAUSAL = {"row_blocks: ± 1 dropped: start_n + BLOCK_N - 1": _MASKED_MORE}
_NO_ROWS = "rows do not matter to the mask of a full kernel"
_NARROW = {"attend: stage + 1: step % DS_STAGES": "the same buffers in another order: nothing else names them"}
_SPLIT = {
    "produce: late wait: mbarrier.wait(rows_empty.index(stage), phase ^ 1)": (
        "who has waited for gradients to be read knows that the queries before them had come"
    ),
    "consume_ds: drop wait: mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1)": (
        "whose p has come had waited for the same queries"
    ),
}
_CLAIMS = {
    'write_dq: atomic value + 1: gl.atomic_xchg(turn, 2, sem="release")': (
        "any number but 0 and 1 says that the rows are there"
    )
}


def _consumer(key: str) -> str:
    """The function of a kernel that masks rows: wide ones have two that consume."""
    return "consume_p" if by_name("gluon_bwd_sm90").is_split(AttentionSpec.from_key(key)) else "consume"  # type: ignore[attr-defined]


REVIEWED: dict[str, dict[str, str]] = {
    key: {
        **_ALWAYS,
        **(_CAUSAL if "causal" in key else {f"{_consumer(key)}: stage + 1: step % (full - begin)": _NO_ROWS}),
        **(_SPLIT if _consumer(key) == "consume_p" else _NARROW),
        **(_CLAIMS if by_name("gluon_bwd_sm90").claims_rows(AttentionSpec.from_key(key)) else {}),  # type: ignore[attr-defined]
    }
    for key in SPECS
}


def of_huge_rows(mutant: Mutant) -> bool:
    """Whether a mutant changes the rule of rows whose scores are huge: no case here has any, `tests/interpret/test_huge_rows.py` has."""
    words = ("huge", "reached", "131072", "do != 0.0", "dlse != 0.0", "tl.abs(lse)")
    return mutant.function == "attention_bwd_preprocess" and any(word in mutant.before for word in words)


def considered(key: str) -> tuple[Mutant, ...]:
    """The mutants of a spec: all, but for those of huge rows and for `<=` in the place of `<` where columns are compared with a head dim that fills its tile.

    None of a tile's columns equals the number of them, so that both are the same program. Other specs have head dims that do not.
    """
    study, variant = study_of(key), by_name("gluon_bwd_sm90")
    spec = study.spec
    columns = variant.dq_panels(spec) * variant.dq_columns(
        spec
    )  # of dq: nothing else is compared with the head dim of keys
    tiles = {
        "HEAD_DIM": (spec.head_dim, columns),
        "HEAD_DIM_V": (spec.head_dim_v, variant.block_dv(spec)),
    }
    same = {f"offs_d < {name}" for name, (head_dim, tile) in tiles.items() if head_dim == tile}
    others = (m for m in study.mutants if not of_huge_rows(m))
    return tuple(m for m in others if not (m.rule == "comparison off by one" and m.before in same))


@functools.cache
def study_of(key: str) -> BackwardStudy:
    return BackwardStudy(AttentionSpec.from_key(key), by_name("gluon_bwd_sm90"), Target.named("h100"))
