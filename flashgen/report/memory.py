"""The memory section: what `flashgen memory` counts for a preset, at a few lengths."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flashgen.memory import of_model
from flashgen.presets import find
from flashgen.target import Target

LENGTHS = (2048, 8192, 32768)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """A model's attention at one length, one forward, in bytes; counted, not measured."""

    preset: str
    target: str
    seqlen: int
    batch: int
    flash_memory: int
    materialised_memory: int
    flash_hbm: int
    materialised_hbm: int


def memory_of(preset: str, target: Target) -> tuple[MemoryRow, ...]:
    """Count a preset at its own length and at some others.

    Raises:
        InvalidProblemError: unknown preset.
        UnsupportedProblemError: no kernel runs even plain attention of its shape.
    """
    model, _ = find(preset)
    # Where a tile comes from is said by `flashgen memory`; the hint to tune, once per length, would be noise here.
    logger = logging.getLogger("flashgen")
    logger.addFilter(_no_hints)
    try:
        rows = [of_model(preset, seqlen=n, target=target) for n in sorted({*LENGTHS, model.seqlen})]
    finally:
        logger.removeFilter(_no_hints)
    return tuple(
        MemoryRow(
            preset=row.preset,
            target=row.target,
            seqlen=row.seqlen,
            batch=row.batch,
            flash_memory=row.flash_memory,
            materialised_memory=row.materialised_memory,
            flash_hbm=row.total(lambda one: one.flash.hbm_estimate),
            materialised_hbm=row.total(lambda one: one.materialised.hbm),
        )
        for row in rows
    )


def _no_hints(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING
