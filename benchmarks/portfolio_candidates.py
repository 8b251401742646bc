"""Which tiles `portfolio.py` times beside the known-good ones, the shipped winners and the portfolio; data alone."""

from __future__ import annotations

from typing import Any

MOST = {"gluon_fwd_sm90": 20, "gluon_bwd_sm90": 7}  # candidates of a problem; 12 of others
SECTIONS = (1, 2, 4, 8, 16)  # heads in one go, of the Hopper forward: every one with the tile that leads the list
# Beside known-good tiles and portfolio, by variant and wider padded head dim: values of the knobs in their order.
MORE: dict[tuple[str, int], tuple[tuple[Any, ...], ...]] = {
    # BLOCK_M, BLOCK_N, STAGES, DS_STAGES, DQ_STAGES, PRODUCER_REGS, SCORES_AHEAD, DV_FIRST, PEELED
    ("gluon_bwd_sm90", 64): (
        (128, 128, 2, 1, 1, 24, False, False, False),
        (128, 128, 2, 1, 1, 24, False, True, True),
        (64, 128, 2, 1, 2, 24, False, False, True),
        (64, 128, 3, 2, 2, 24, True, False, True),
        (64, 128, 3, 2, 2, 24, True, True, True),
    ),
    ("gluon_bwd_sm90", 128): (
        (64, 128, 2, 1, 1, 24, False, False, True),
        (64, 128, 2, 1, 2, 24, False, False, False),
        (64, 128, 2, 1, 2, 24, False, True, True),
        (64, 128, 2, 2, 1, 24, False, False, True),
        (64, 128, 2, 1, 1, 24, True, False, True),
    ),
    ("gluon_bwd_sm90", 256): tuple(
        (64, 64, stages, 1, dq_stages, 24, False, True, peeled)
        for stages, dq_stages in ((2, 3), (2, 2), (2, 4), (2, 1), (1, 3))
        for peeled in (True, False)
    ),
    # BLOCK_M, BLOCK_N, BLOCK_M_DQ, BLOCK_N_DQ, num_warps, num_stages
    ("triton_bwd", 64): (
        (64, 128, 128, 64, 8, 2),
        (64, 128, 128, 64, 4, 2),
        (64, 64, 64, 64, 4, 2),
        (64, 64, 64, 64, 4, 3),
        (32, 128, 128, 64, 4, 3),
        (64, 128, 128, 128, 8, 2),
        (128, 128, 128, 128, 8, 2),
        (64, 128, 64, 128, 4, 3),
    ),
    ("triton_bwd", 128): (
        (64, 128, 128, 64, 8, 2),
        (64, 128, 128, 64, 8, 3),
        (64, 64, 64, 64, 4, 2),
        (64, 64, 128, 64, 8, 2),
        (32, 128, 128, 64, 8, 3),
        (32, 64, 64, 64, 4, 3),
        (64, 128, 128, 128, 8, 2),
        (64, 128, 128, 32, 8, 2),
    ),
    ("triton_bwd", 256): (
        (64, 64, 64, 64, 8, 1),
        (64, 64, 64, 64, 8, 2),
        (64, 64, 64, 64, 4, 1),
        (64, 64, 128, 32, 8, 2),
        (64, 64, 128, 64, 8, 1),
        (32, 64, 64, 64, 8, 2),
        (64, 128, 128, 32, 8, 1),
        (64, 128, 128, 64, 8, 1),
    ),
    # BLOCK_M, BLOCK_N, num_warps, num_stages
    ("triton_fwd", 64): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    ("triton_fwd", 128): ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    ("triton_fwd", 256): ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 3)),
    # as in gluon_portfolio.py
    ("gluon_fwd_sm90", 64): (
        *((256, 64, 4, 112, 32, section, True, False, True) for section in (4, 16, 8)),  # four warpgroups, without lse
        *((256, 64, 4, 112, 32, section, True, True, True) for section in (16, 8)),
        (192, 128, 2, 160, 32, 4, True, False, False),
        (192, 128, 3, 160, 32, 4, True, False, True),
        (192, 128, 4, 160, 32, 4, True, False, True),
        (192, 64, 3, 160, 32, 4, True, True, True),
        (192, 64, 3, 160, 32, 16, True, True, False),
        (128, 128, 2, 240, 24, 4, True, False, True),
        (128, 128, 3, 240, 24, 16, True, False, True),
    ),
    ("gluon_fwd_sm90", 128): (
        *((128, 128, 2, 240, 24, section, True, False, False) for section in (4, 2, 8, 1, 32)),
        *((128, 128, 2, 240, 24, section, True, True, True) for section in (16, 4, 2)),
        *((128, 128, 2, 240, 24, section, True, False, True) for section in (16, 32)),
    ),
    ("gluon_fwd_sm90", 256): (
        (128, 64, 2, 240, 24, 4, False, True, True),
        (128, 64, 2, 240, 24, 8, False, False, False),
        (128, 64, 2, 240, 24, 4, False, False, True),
        (128, 128, 2, 240, 24, 4, True, True, False),
    ),
}
