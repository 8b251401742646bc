"""The oracle (fp64) and the honest low-precision run that the error budget of `accuracy` is derived from.

`attention_oracle` and `attention_low_precision` (`plain`), and their gradients (`plain_backward`), know causality alone and are
blocked over query rows only, so that long sequences fit in memory. `exact` and `same_precision` (`every_option`) know every option of `attention()` and
the backward, unblocked, for small sizes; `philox` holds dropout's random words. All take
`(batch, seqlen, num_heads, head_dim)` tensors and are meant to be read: plain torch, one formula per line, nothing of it
shared with a backend. They are slow; never use them to compute attention, only to judge it.
"""

from __future__ import annotations

from flashgen.reference.every_option import Call, Result, exact, same_precision
from flashgen.reference.philox import dropout_words
from flashgen.reference.plain import attention_low_precision, attention_oracle, visible_keys
from flashgen.reference.plain_backward import gradients_low_precision, gradients_oracle

__all__ = [
    "Call",
    "Result",
    "attention_low_precision",
    "attention_oracle",
    "dropout_words",
    "exact",
    "gradients_low_precision",
    "gradients_oracle",
    "same_precision",
    "visible_keys",
]
