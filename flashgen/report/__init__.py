"""`flashgen report`: what was tuned and what it means, as one HTML file that asks nobody for anything.

`gather` turns trials into values, `memory_of` counts a preset's bytes, `page` renders both. No script, no font, no picture is loaded: charts
are SVG and tables, inline.
"""

from __future__ import annotations

from flashgen.report.data import Document, Subject, gather
from flashgen.report.memory import MemoryRow, memory_of
from flashgen.report.page import page

__all__ = ["Document", "MemoryRow", "Subject", "gather", "memory_of", "page"]
