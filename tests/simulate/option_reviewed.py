"""Survivors of the study of kernels with options, each with the reason why it is no defect."""

_ONE_OF_2_32 = "one of 2^32 random words stands at the threshold itself"
_DROPOUT = {f"keep: comparison off by one: c{n} >= least": _ONE_OF_2_32 for n in range(4)}
_SHAPE_ALONE = "a choice between two equals: it lends them the condition's shape"
_INSIDE = "the mod keeps its index inside the table: it is never the table's size"
_TICKETS = (
    "the next tile's ticket is drawn once all have read the one before: they are done with the queries that lay here"
)
_NO_LIST = "a tile that no block is listed for walks one block, whichever it is: its kinds hide it"

REVIEWED: dict[str, dict[str, str]] = {
    "gluon_fwd_sm90": {
        **_DROPOUT,
        "is_spoiled: another reduction: gl.sum(acc * 0.0, 1)": "NumPy's maximum keeps a NaN as a sum does; a GPU's would not",
        "is_spoiled: factor dropped: acc * 0.0": "hidden values that are infinite leave NaN in acc, since 0 * inf is one: no sum of infinities alone",
        "recompute: comparison off by one: keys < end": "keys beyond the end are hidden: `seen` says so, too",
        "recompute: last term dropped: seen & (keys < end)": "keys beyond the end are hidden: `seen` says so, too",
        "key_range: factor dropped: kv_end // BLOCK_N": "what follows takes no more than all blocks but the last",
        "mask_scores: comparison inverted: qk == qk": _SHAPE_ALONE,
        "evaluated_bits: comparison inverted: qk == qk": _SHAPE_ALONE,
        "evaluated_bits: comparison inverted: (kv_idx + off_b) % 4 != 1": f"{_SHAPE_ALONE}, this copy alone",
        "evaluated_bits: stage + 1: (kv_idx + off_b) % 4": f"{_SHAPE_ALONE}, this copy alone",
        "mask_bits: factor dropped: place * 0": "what is loaded where no word stands is not used",
        "words_of: comparison off by one: place < 0": "words begin at 1: the first hide everything",
        "produce: drop wait: mbarrier.wait(q_empty.index(place), ((turn // Q_STAGES) & 1) ^ 1)": _TICKETS,
        "produce: late wait: mbarrier.wait(q_empty.index(place), ((turn // Q_STAGES) & 1) ^ 1)": _TICKETS,
        "modify_scores: comparison off by one: table_index1 < table_size1": _INSIDE,
        "produce: comparison off by one: n_listed > 0": _NO_LIST,
        "consume: comparison off by one: n_listed > 0": _NO_LIST,
        "recompute: stage + 1: part % PARTS": "the parts of a block in another order",
        "recompute: comparison off by one: BLOCK_N < KEYS": "blocks of as many keys end where they end",
    },
    "gluon_bwd_sm90": {},
    "triton_fwd": {**_DROPOUT},
    "triton_bwd": {**_DROPOUT},
}
