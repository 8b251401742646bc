"""The rendered Hopper forward as a subject of the mutation study, and its reviewed survivors."""

from __future__ import annotations

import functools

from flashgen.mutation import Study
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

SPECS = ("attention_fwd-bf16-d64-lse", "attention_fwd-bf16-d64-causal-lse")

# Survivors, with the reason why they are no defects.
_ALWAYS = {
    "attend: early arrive: mbarrier.arrive(k_empty.index(k_stage), count=1)": (
        "this stage's keys are loaded anew only after a wait for v_empty of a later step, which is released after the products"
    ),
}
_MASKED_ARM = "every row of a full kernel sees a key: its calls compile this arm out"
REVIEWED: dict[str, dict[str, str]] = {
    "attention_fwd-bf16-d64-lse": {
        **_ALWAYS,
        'online_softmax: choices swapped: gl.where(m_new == -float("inf"), 0.0, m_new)': _MASKED_ARM,
        'online_softmax: comparison inverted: m_new == -float("inf")': _MASKED_ARM,
    },
    "attention_fwd-bf16-d64-causal-lse": {
        **_ALWAYS,
        "consume: ± 1 dropped: start_m + causal_offset + 1": (
            "a block that every row sees is masked as well where it ends at the diagonal; the mask changes nothing there"
        ),
    },
}


@functools.cache
def study_of(key: str) -> Study:
    return Study(AttentionSpec.from_key(key), by_name("gluon_fwd_sm90"), Target.named("h100"))
